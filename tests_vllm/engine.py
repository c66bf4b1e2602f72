"""Run vLLM in a process of its own: a job comes as JSON by standard input.

    {"refused": {name: engine, ...}, "engine": engine, "prompts": [[token, ...], ...], ...}

An engine is what ``LLM`` takes. First those that must not start are tried, then the one that may
be left out answers. What came out goes to the file that is named, as JSON: why each engine did not
start, the tokens of each answer, and what was drafted and accepted.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def why_not(engine: dict[str, Any]) -> str | None:
    """The error that an engine ends with at start."""
    try:
        LLM(**engine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def answer(engine: dict[str, Any], prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """What an engine says, and how its draft did."""
    llm = LLM(**engine)
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=max_tokens),
        use_tqdm=False,
    )
    found: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    drafts = found.get("vllm:spec_decode_num_drafts")
    accepted = found.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return {
        "tokens": [list(it.outputs[0].token_ids) for it in answers],
        "drafts": drafts.value if drafts else 0,
        "accepted": accepted.values if accepted else [],
    }


def main(result: Path) -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    found: dict[str, Any] = {
        "refused": {name: why_not(engine) for name, engine in job["refused"].items()}
    }
    if job["engine"]:
        found["answers"] = answer(job["engine"], job["prompts"], job["max_tokens"])
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
