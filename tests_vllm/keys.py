"""Print the keys of vLLM's compile cache for drafts that lie at one path, one after another.

    python keys.py VERIFIER DRAFT...

The last line is a JSON list of the keys. The drafts are given to vLLM under one path, so that
nothing but what they contain can tell them apart.
"""

import json
import sys
import tempfile
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs


def key(verifier: str, draft: Path) -> str:
    speculation = {"method": "eagle", "model": str(draft), "num_speculative_tokens": 3}
    engine = EngineArgs(model=verifier, max_model_len=256, speculative_config=speculation)
    found: str = engine.create_engine_config().compute_hash()
    return found


def main(verifier: str, drafts: list[str]) -> None:
    keys = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "draft"
        for draft in drafts:
            path.unlink(missing_ok=True)
            path.symlink_to(draft)
            keys.append(key(verifier, path))
    print(json.dumps(keys))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
