"""Print the keys of vLLM's compile cache for drafts that lie at one path, one after another.

    python keys.py VERIFIER DRAFT...

A key is printed per line. The drafts are given to vLLM under one path, so that nothing but what
they contain can tell them apart.
"""

import os
import sys
import tempfile
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs


def main(verifier: str, drafts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "draft"
        for draft in drafts:
            path.unlink(missing_ok=True)
            path.symlink_to(draft)
            speculation = {"method": "eagle", "model": str(path), "num_speculative_tokens": 3}
            engine = EngineArgs(model=verifier, max_model_len=256, speculative_config=speculation)
            print(engine.create_engine_config().compute_hash())


if __name__ == "__main__":
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    main(sys.argv[1], sys.argv[2:])
