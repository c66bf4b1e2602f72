"""Generate with one build of this project, in a process of its own, when told.

    python benchmarks/on_gpu/build.py

The modules of ``speculators`` are those on PYTHONPATH. The first line of standard input is the job,
as JSON; each further line is a task. What was measured is printed as a line of JSON for each; the
first line says that the models are loaded.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from on_gpu.process import Process, kernel_times, tell_by_stdout

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Build"]


class Build(Process):
    """A process with one build, seen from outside.

    Args:
        source: the folder that has the package ``speculators``.
        job: ``verifier`` and ``draft``, two folders, or no ``verifier`` for a constructed pair;
            ``prompts``, as messages.
        log: where it logs to.

    """

    def __init__(self, source: Path, job: Mapping[str, Any], log: Path) -> None:
        paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        super().__init__(__file__, job, environment, log)

    def run(self, **task: Any) -> dict[str, Any]:
        """Do a task, see ``Worker``."""
        return self.ask(task)


class Worker:
    """The process inside: the models, and what can be asked of them."""

    def __init__(self, job: dict[str, Any], work: Path) -> None:
        import torch
        from loguru import logger

        logger.remove()
        logger.add(sys.stderr, level="DEBUG")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = None
        if job["verifier"] is None:
            from on_gpu.constructed_pair import SHAPES, construct

            pair = construct(SHAPES[job["shape"]], 0.65, self.device, torch.bfloat16)
            self.verifier, self.draft = pair.verifier, pair.draft
            generator = torch.Generator().manual_seed(0)
            vocabulary = pair.verifier.config.vocab_size
            self.prompts = [
                torch.randint(vocabulary, (40 + 7 * number % 80,), generator=generator).tolist()
                for number in range(job["count"])
            ]
        else:
            self._load(job, work)

    def _load(self, job: dict[str, Any], work: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from speculators.convert.eagle import EagleConverter
        from speculators.models.eagle import EagleSpeculator

        verifier: Any = AutoModelForCausalLM.from_pretrained(job["verifier"], dtype=torch.bfloat16)
        self.verifier = verifier.to(self.device).eval()
        converted = EagleConverter().convert(
            Path(job["draft"]), work / "draft", Path(job["verifier"]), validate=False
        )
        draft: Any = EagleSpeculator.from_pretrained(
            converted, verifier=self.verifier, dtype=torch.bfloat16
        )
        self.draft = draft.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(job["verifier"])
        self.prompts = [
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            for messages in job["prompts"]
        ]

    def padded(self, numbers: list[int]) -> tuple[Any, ...]:
        """Prompts, padded at the left, and their mask."""
        import torch

        prompts = [self.prompts[number] for number in numbers]
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(one)) + one for one in prompts]
        mask = [[0] * (longest - len(one)) + [1] * len(one) for one in prompts]
        return tuple(torch.tensor(rows, device=self.device) for rows in (ids, mask))

    def generate(self, numbers: list[int], new_tokens: int, plain: bool = False) -> dict[str, Any]:
        """Generate for prompts at once, and measure that."""
        import torch

        from on_gpu.bench import synchronize

        ids, mask = self.padded(numbers)
        settings: dict[str, Any] = {
            "attention_mask": mask,
            "max_new_tokens": new_tokens,
            "do_sample": False,
        }
        accepted: list[list[int]]
        synchronize(self.device)
        start = time.perf_counter()
        if plain:
            sequences, accepted = self.verifier.generate(ids, **settings), []
        else:
            result: Any = self.draft.generate(
                ids, num_draft_tokens=3, return_dict_in_generate=True, **settings
            )
            sequences, accepted = result.sequences, result.accepted
        synchronize(self.device)
        seconds = time.perf_counter() - start
        ends = self.verifier.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        outputs = [cut(row, ends) for row in sequences[:, ids.shape[1] :].tolist()]
        return {
            "seconds": seconds,
            "tokens": sum(map(len, outputs)),
            "steps": sum(map(len, accepted)),
            "passes": max(map(len, accepted), default=0),
            "accepted": sum(map(sum, accepted)),
            "outputs": outputs,
            "recordings": len(self.draft._workspace.recordings),
            "memory": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
        }

    def profile(self, numbers: list[int], new_tokens: int) -> dict[str, Any]:
        """Count kernels by name: milliseconds and launches, of generating for prompts at once."""
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
            told = self.generate(numbers, new_tokens)
        return {
            "kernels": kernel_times(record),
            "steps": told["passes"],
            "seconds": told["seconds"],
        }

    def graphs(self) -> dict[str, Any]:
        """Milliseconds of each recorded graph on the GPU, replayed alone."""
        from on_gpu.bench import device_ms

        found: dict[str, Any] = {}
        workspace = self.draft._workspace
        kept = workspace.recordings | getattr(workspace, "prompts", {})
        for key, recording in kept.items():
            names = ("proposing", "verifying", "gathering", "graph")
            graphs = {name: getattr(recording, name, None) for name in names}
            found[str(key)] = {
                name: device_ms(graph.replay, self.device)
                for name, graph in graphs.items()
                if graph
            }
        return found


def cut(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the one that ends the text."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def main(stdin: IO[str]) -> None:
    """Be such a process."""
    tell = tell_by_stdout()
    with tempfile.TemporaryDirectory() as work:
        worker = Worker(json.loads(stdin.readline()), Path(work))
        tell({"ready": True})
        for line in stdin:
            task = json.loads(line)
            tell(getattr(worker, task.pop("do"))(**task))


if __name__ == "__main__":
    main(sys.stdin)
