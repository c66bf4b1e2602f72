"""Generate with one build of this project, in a process of its own, when told.

    python benchmarks/on_gpu/build.py

The modules of ``speculators`` are those on PYTHONPATH. The first line of standard input is the job,
as JSON; each further line is a task. What was measured is printed as a line of JSON for each; the
first line says that the models are loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Build"]


class Build:
    """A process with one build, seen from outside.

    Args:
        source: the folder that has the package ``speculators``.
        job: ``verifier`` and ``draft``, two folders, or no ``verifier`` for a constructed pair;
            ``prompts``, as messages.
        log: where it logs to.

    """

    def __init__(self, source: Path, job: Mapping[str, Any], log: Path) -> None:
        here = Path(__file__).resolve().parents[1]
        paths = [str(source), str(here), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        self._tell(job)

    def wait(self) -> dict[str, Any]:
        """What it says once it is ready: the version of the package, and how it was loaded."""
        return self._told()

    def run(self, **task: Any) -> dict[str, Any]:
        """Do a task, see ``Worker``."""
        self._tell(task)
        return self._told()

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()

    def _tell(self, what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def _told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"A build stopped; its log, {self.log}, says why.")
        told: dict[str, Any] = json.loads(line)
        return told


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
        kernels: dict[str, list[float]] = {}
        for event in record.events():
            if event.device_time_total:
                one = kernels.setdefault(event.name, [0.0, 0])
                one[0] += event.device_time_total / 1000
                one[1] += 1
        return {"kernels": kernels, "steps": told["passes"], "seconds": told["seconds"]}

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
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(measured: dict[str, Any]) -> None:
        output.write(json.dumps(measured) + "\n")
        output.flush()

    with tempfile.TemporaryDirectory() as work:
        worker = Worker(json.loads(stdin.readline()), Path(work))
        tell({"ready": True})
        for line in stdin:
            task = json.loads(line)
            tell(getattr(worker, task.pop("do"))(**task))


if __name__ == "__main__":
    main(sys.stdin)
