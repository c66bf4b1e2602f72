"""vLLM in processes of its own, one at a time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafts import ROOT, VERIFIER

MAX_TOKENS = 48
START_SECONDS = 300
"""How long vLLM may take on a busy machine."""

ENGINE = {
    "model": str(VERIFIER),
    # In bfloat16 rounding decides between tokens that are nearly as likely.
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,  # so that prompts are prefilled in chunks
    "kv_cache_memory_bytes": 128 << 20,
    "enforce_eager": True,
    "disable_log_stats": False,
}
"""Small enough for two cores; ``LLM``'s arguments."""

OF_TWO_WORKERS = {
    # One core each; and two workers are processes in any case.
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
}


@dataclass(frozen=True)
class Answers:
    """What vLLM said, and how its draft did."""

    tokens: list[list[int]]
    drafts: int
    draft_tokens: int
    accepted: list[int]

    @property
    def acceptance_length(self) -> float:
        """Tokens for one pass of the verifier: the accepted ones, and the verifier's own."""
        return 1 + sum(self.accepted) / self.drafts


@dataclass(frozen=True)
class Stopped:
    """An engine that did not start."""

    log: str


def run_engine(
    prompts: list[list[int]], result: Path, *, plugins: str | None = None, **engine: Any
) -> Answers | Stopped:
    """Start vLLM, let it answer, and stop it.

    Args:
        prompts: tokens.
        result: a file to use.
        plugins: which to load, by name; all, if not given.
        **engine: arguments of ``LLM`` beside ``ENGINE``.

    """
    job = {"engine": ENGINE | engine, "prompts": prompts, "max_tokens": MAX_TOKENS}
    environment = dict(ENVIRONMENT)
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    if engine.get("tensor_parallel_size", 1) > 1:
        environment |= OF_TWO_WORKERS
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("engine.py"), result],
        check=False,
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=START_SECONDS + 300,
    )
    if done.returncode:
        return Stopped(done.stdout)
    return Answers(**json.loads(result.read_text()))


def speculation(draft: Path, tokens: int = 3) -> dict[str, Any]:
    """The argument of ``LLM`` that names a draft."""
    return {
        "speculative_config": {
            "method": "eagle",
            "model": str(draft),
            "num_speculative_tokens": tokens,
        }
    }


@dataclass(frozen=True)
class Server:
    """The OpenAI-compatible server, on this machine's loopback."""

    address: str

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        with self._open(path, body) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The pieces of a streamed answer."""
        with self._open(path, body | {"stream": True}) as response:
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)

    def metric(self, name: str) -> float:
        """A counter of /metrics."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)


@contextmanager
def serve(model: Path, log: Path) -> Iterator[Server]:
    """Run `vllm serve` until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "host": "127.0.0.1",
        "port": port,
        "dtype": ENGINE["dtype"],
        "max-model-len": ENGINE["max_model_len"],
        "max-num-seqs": ENGINE["max_num_seqs"],
        "max-num-batched-tokens": ENGINE["max_num_batched_tokens"],
        "kv-cache-memory-bytes": ENGINE["kv_cache_memory_bytes"],
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--enforce-eager", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}")
    try:
        _wait_until_ready(server, process, log)
        yield server
    finally:
        # Its whole group: the engine is a process of its own.
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
    raise AssertionError(f"vllm serve did not start:\n{log.read_text()}")
