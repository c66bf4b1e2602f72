"""Run a vLLM engine in a process of its own, and have it answer when told.

    python benchmarks/on_gpu/engine.py

The first line of standard input is the job, as JSON: the arguments of ``LLM``, the conversations,
and how many tokens to answer with at most. Each further line is a task: groups of conversations, by
their numbers. The groups are answered one after the other, the members of a group at once. What was
measured is printed as a line of JSON for each task; the first line says when the engine was ready.
"""

from __future__ import annotations

import json
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from on_gpu.process import Process, kernel_times, tell_by_stdout

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Engine"]

PROFILED_TOKENS = 32


class Engine(Process):
    """A process with a vLLM engine, seen from outside.

    Args:
        arguments: of ``LLM``.
        chats: the conversations, as messages.
        max_tokens: of an answer.
        environment: of the process.
        log: where vLLM logs to.

    """

    def __init__(
        self,
        arguments: dict[str, Any],
        chats: list[Any],
        max_tokens: int,
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self.started = time.perf_counter()
        job = {"arguments": arguments, "chats": chats, "max_tokens": max_tokens}
        super().__init__(__file__, job, environment, log)

    def wait(self) -> float:
        """Wait until it is ready; returns the seconds from the start of the process."""
        # On Linux, all processes read the same clock.
        return float(self.told()["ready"]) - self.started

    def answer(self, groups: list[list[int]], *, profiled: bool = False) -> dict[str, Any]:
        """Have it answer groups of conversations, and measure that.

        Args:
            groups: the numbers of conversations that are asked at once.
            profiled: answer with few tokens, and measure the kernels on the GPU.

        """
        return self.ask({"groups": groups, "profiled": profiled})


def main(stdin: IO[str]) -> None:
    """Be such a process."""
    tell = tell_by_stdout()
    from vllm import LLM, SamplingParams

    job = json.loads(stdin.readline())
    llm = LLM(**job["arguments"])
    tokenizer = llm.get_tokenizer()
    prompts: Any = [
        {
            "prompt_token_ids": tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False
            )
        }
        for chat in job["chats"]
    ]
    tell({"ready": time.perf_counter()})
    for line in stdin:
        task = json.loads(line)
        groups = [[prompts[number] for number in group] for group in task["groups"]]
        if task["profiled"]:
            tell(profile(llm, groups, SamplingParams(temperature=0, max_tokens=PROFILED_TOKENS)))
        else:
            sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"])
            tell(timed(llm, groups, sampling))


def timed(llm: Any, groups: list[list[Any]], sampling: Any) -> dict[str, Any]:
    """Answer, and count seconds, tokens, drafts, and accepted tokens by position."""
    before = counters(llm)
    start = time.perf_counter()
    answers = answered(llm, groups, sampling)
    seconds = time.perf_counter() - start
    counted = [after - old for after, old in zip(counters(llm), before, strict=True)]
    return {
        "seconds": seconds,
        "tokens": sum(map(len, answers)),
        "drafts": counted[0],
        "accepted": counted[1:],
        "answers": [sha256(str(list(it)).encode()).hexdigest()[:8] for it in answers],
    }


def profile(llm: Any, groups: list[list[Any]], sampling: Any) -> dict[str, Any]:
    """Answer, and count milliseconds and launches of each kernel on the GPU."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        answers = answered(llm, groups, sampling)
    return {"tokens": sum(map(len, answers)), "kernels": kernel_times(record)}


def answered(llm: Any, groups: list[list[Any]], sampling: Any) -> list[Any]:
    """The tokens of each answer."""
    return [
        answer.outputs[0].token_ids
        for group in groups
        for answer in llm.generate(group, sampling, use_tqdm=False)
    ]


def counters(llm: Any) -> list[int]:
    """How often tokens were drafted, and how many were accepted at each position, so far."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    drafts = found.get("vllm:spec_decode_num_drafts")
    accepted = found.get("vllm:spec_decode_num_accepted_tokens_per_pos")
    return [drafts.value, *accepted.values] if drafts and accepted else [0]


if __name__ == "__main__":
    main(sys.stdin)
