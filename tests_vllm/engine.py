"""Run vLLM in a process of its own: a job arrives as JSON on standard input.

    {"engines": {name: {...}, ...}, "prompts": [[token, ...], ...], "sampling": [{...}, ...]}

An engine is given by the arguments of ``LLM``, and the sampling of each prompt by those of
``SamplingParams``. One after another starts, answers, and stops. The
result is written to the file that is named, as JSON by the engine's name: the tokens of each
answer, what was drafted for it step by step, and how many tokens were accepted; or why the engine
did not start.
"""

import gc
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vllm import LLM, SamplingParams


def try_engine(
    engine: dict[str, Any], prompts: list[list[int]], sampling: list[dict[str, Any]]
) -> dict[str, Any]:
    try:
        llm = LLM(**engine)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    proposals = recorded_proposals(llm)
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**it) for it in sampling],
        use_tqdm=False,
    )
    found: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
    drafts = found.get("vllm:spec_decode_num_drafts")
    accepted = found.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "drafts": drafts.value if drafts else 0,
        "accepted": accepted.values if accepted else [],
        "proposals": [proposals[int(answer.request_id)] for answer in answers],
    }


def recorded_proposals(llm: LLM) -> dict[int, list[list[int]]]:
    """What will be drafted for each request, step by step: no public interface tells it."""
    found: dict[int, list[list[int]]] = defaultdict(list)
    core: Any = llm.llm_engine.engine_core
    executor = core.engine_core.model_executor
    take = executor.take_draft_token_ids

    def take_and_record() -> Any:
        drafted = take()
        if drafted is not None:
            for request, tokens in zip(drafted.req_ids, drafted.draft_token_ids, strict=True):
                # Releases since 0.31 append something random to a request's number.
                found[int(request.partition("-")[0])].append(list(tokens))
        return drafted

    executor.take_draft_token_ids = take_and_record
    return found


def main(result: Path) -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    outcomes = {}
    for name, engine in job["engines"].items():
        # vLLM does so ten times for each engine, every time through all that is imported here.
        with patch.object(gc, "collect", return_value=0):
            outcomes[name] = try_engine(engine, job["prompts"], job["sampling"])
        gc.collect()
    result.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
