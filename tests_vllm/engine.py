"""Run vLLM once, in a process of its own: a job comes as JSON by standard input.

    {"engine": {...}, "prompts": [[token, ...], ...], "max_tokens": 48}

What came out goes to the file that is named, as JSON: the tokens of each answer, and how many
drafts there were, how many tokens they had, and how many of each position were accepted.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main(result: Path) -> None:
    job: dict[str, Any] = json.load(sys.stdin)
    llm = LLM(**job["engine"])
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=job["max_tokens"]),
        use_tqdm=False,
    )
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    prefix = "vllm:spec_decode_num_"
    drafted = prefix + "drafts" in metrics
    result.write_text(
        json.dumps(
            {
                "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
                "drafts": metrics[prefix + "drafts"].value if drafted else 0,
                "draft_tokens": metrics[prefix + "draft_tokens"].value if drafted else 0,
                "accepted": metrics[prefix + "accepted_tokens_per_pos"].values if drafted else [],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
