"""vLLM in processes of its own, one at a time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drafts import ROOT, VERIFIER

MAX_TOKENS = 32
LENGTH = 3
"""The number of drafted tokens per step."""

START_SECONDS = 300
"""The time that vLLM may take to start on a busy machine, in seconds."""

ENGINE: dict[str, Any] = {
    "model": str(VERIFIER),
    # In bfloat16, rounding would decide between tokens that are almost equally likely.
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,  # so that prompts are prefilled in chunks
    "kv_cache_memory_bytes": 256 << 20,
    "enforce_eager": True,
    "disable_log_stats": False,
}
"""Arguments of ``LLM`` for an engine that is small enough for two cores."""

ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
}
# vLLM binds no threads to cores here, and two would wait for each other on a busy machine.
IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
ONE_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
WITHOUT_PLUGINS = {"VLLM_PLUGINS": ""}


@dataclass(frozen=True)
class Answers:
    """What vLLM generated, and how well its draft did."""

    tokens: list[list[int]]
    drafts: int
    accepted: list[int]
    """How many tokens were accepted at each position."""
    proposals: list[list[list[int]]] = field(compare=False)
    """What was drafted for each prompt, step by step; perhaps also before the whole prompt was
    read, and once more after the last step."""

    @property
    def acceptance_length(self) -> float:
        """The tokens per pass of the verifier: the accepted ones, and the verifier's own."""
        return 1 + sum(self.accepted) / self.drafts


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of a process's engines, by their names."""

    answers: dict[str, Answers]
    refused: dict[str, str]
    """Why an engine did not start."""


def engine(draft: Path, **arguments: Any) -> dict[str, Any]:
    """The arguments of an engine with a draft."""
    speculation = {"method": "eagle", "model": str(draft), "num_speculative_tokens": LENGTH}
    return ENGINE | arguments | {"speculative_config": speculation}


def run(
    result: Path,
    prompts: list[list[int]],
    engines: Mapping[str, Mapping[str, Any]],
    environment: Mapping[str, str] | None = None,
    max_tokens: int = MAX_TOKENS,
    sampling: Sequence[Mapping[str, Any]] | None = None,
) -> Outcomes:
    """Start engines one after another in one process, and let each answer and stop.

    Args:
        result: the file to write the result to.
        prompts: the tokens of each prompt.
        engines: name → arguments of ``LLM``.
        environment: environment variables to set for the process.
        max_tokens: how many tokens each answer may have.
        sampling: arguments of ``SamplingParams`` for each prompt; greedy by default.

    """
    shared = {"temperature": 0, "max_tokens": max_tokens}
    of_each = [shared | dict(it) for it in sampling or [{}] * len(prompts)]
    job = {"engines": engines, "prompts": prompts, "sampling": of_each}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("engine.py"), result],
        check=False,
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **IN_ONE_PROCESS, **(environment or {})},
        timeout=len(engines) * START_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    outcomes = json.loads(result.read_text())
    return Outcomes(
        answers={name: Answers(**it) for name, it in outcomes.items() if "error" not in it},
        refused={name: it["error"] for name, it in outcomes.items() if "error" in it},
    )


@dataclass(frozen=True)
class Server:
    """The OpenAI-compatible server, on this machine's loopback."""

    address: str

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        with self._open(path, body) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        with self._open(path, body | {"stream": True}) as response:
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)

    def metric(self, name: str) -> float:
        """The value of a counter of /metrics."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=300)


class DidNotStartError(Exception):
    """The server stopped before it answered; the message is its log."""


@contextmanager
def serve(log: Path, model: Path, *options: str) -> Iterator[Server]:
    """Run `vllm serve` until the block ends.

    Raises:
        DidNotStartError: if it ends before it can answer.

    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = set(ENGINE) - {"model", "enforce_eager", "disable_log_stats"}
    arguments = [f"--{name.replace('_', '-')}={ENGINE[name]}" for name in sorted(names)]
    vllm = str(Path(__file__).with_name("vllm_command.py"))
    command = [sys.executable, vllm, "serve", str(model)]
    command += ["--host=127.0.0.1", f"--port={port}", "--enforce-eager", *arguments, *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}")
    try:
        _wait_until_ready(server, process, log)
        yield server
    finally:
        # Stop the whole group: the engine and its workers are processes of their own.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise DidNotStartError(log.read_text())
