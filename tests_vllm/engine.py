"""Run vLLM in a process of its own: a job arrives as JSON on standard input.

    {"engines": {name: {...}, ...}, "prompts": [[token, ...], ...], "max_tokens": 32}

An engine is given by the arguments of ``LLM``. One after another starts, answers, and stops. The
result is written to the file that is named, as JSON by the engine's name: the tokens of each
answer, and how many tokens were drafted and accepted; or why the engine did not start.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def try_engine(engine: dict[str, Any], prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    try:
        llm = LLM(**engine)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=max_tokens),
        use_tqdm=False,
    )
    found: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    drafts = found.get("vllm:spec_decode_num_drafts")
    accepted = found.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "drafts": drafts.value if drafts else 0,
        "accepted": accepted.values if accepted else [],
    }


def main(result: Path) -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    outcomes = {}
    for name, engine in job["engines"].items():
        outcomes[name] = try_engine(engine, job["prompts"], job["max_tokens"])
        gc.collect()
    result.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
