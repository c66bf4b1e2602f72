"""A client of a server that serves a draft with vLLM: its answers, and its counters; without torch.

Prompts go to the OpenAI-compatible API: as conversations, to which the server applies the chat
template of its model as this package does, or as plain text if the model has none. vLLM counts
verification steps, and drafted tokens that were accepted by position, as Prometheus counters
(vllm/v1/spec_decode/metrics.py).
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from speculators.errors import EvaluationError, printable
from speculators.evaluate.metrics import Acceptance
from speculators.evaluate.prompts import Prompt
from speculators.evaluate.report import Settings

__all__ = ["Answer", "Counters", "Server"]

KEY = "VLLM_API_KEY"
"""The environment variable with the server's API key, by vLLM's own name."""

SHORT, LONG = 30.0, 3600.0
"""Seconds to wait for what is known, and for an answer."""

SETTLING = 5.0
"""Seconds to wait for counters: they are updated a moment after the answer is sent."""

STEPS = "vllm:spec_decode_num_drafts"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
GENERATED = "vllm:generation_tokens"

SAMPLE = re.compile(r"^(?P<name>vllm:\w+?)(?:_total)?\{(?P<labels>.*)\} (?P<value>[0-9.eE+-]+)$")
"""A line of Prometheus's text format."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a server.

    Attributes:
        prompt_tokens: how many tokens the prompt has.
        tokens: new tokens, one that ends the answer included.
        seconds: until the answer was there.

    """

    prompt_tokens: int
    tokens: list[int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server has counted since its start.

    Attributes:
        generated: new tokens.
        steps: verification steps, which vLLM calls drafts; 0 without a draft.
        accepted: by position, the steps in which the drafted token there was accepted.

    """

    generated: int
    steps: int
    accepted: tuple[int, ...]

    def since(self, before: "Counters") -> Acceptance:
        """The steps since earlier counters; a token is taken to be drafted at every position."""
        steps = self.steps - before.steps
        accepted = [
            later - earlier for later, earlier in zip(self.accepted, before.accepted, strict=True)
        ]
        if not steps:
            return Acceptance()
        return Acceptance(
            steps=steps,
            offered=(steps,) * len(accepted),
            reached=(steps, *accepted[:-1]),
            accepted=tuple(accepted),
        )


class Server:
    """An OpenAI-compatible server of vLLM.

    Args:
        url: its address, with or without ``/v1``.

    Attributes:
        model: the name of the model that it serves.
        version: of vLLM, if it tells.
        uses_chat: whether it applies a chat template to prompts.

    Raises:
        EvaluationError: if it is not a URL, or the server cannot be reached.

    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            raise EvaluationError(
                "Give the server's address, such as http://localhost:8000; a key for it is "
                f"read from the environment variable {KEY}."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.uses_chat = True
        models = self._json("/v1/models").get("data") or [{}]
        self.model = str(models[0].get("id"))
        try:
            self.version: str | None = self._json("/version").get("version")
        except EvaluationError:
            self.version = None

    def check_template(self, prompt: Prompt) -> None:
        """Find out whether the server's model has a chat template, by a short answer.

        Raises:
            EvaluationError: if it does not answer.

        """
        short = Settings(prompts_total=1, max_new_tokens=1)
        try:
            self.answer(prompt, short, 0)
        except EvaluationError as error:
            if "chat template" not in str(error):
                raise
            self.uses_chat = False
            self.answer(prompt, short, 0)

    def answer(self, prompt: Prompt, settings: Settings, seed: int) -> Answer:
        """Let the server answer a prompt.

        Args:
            prompt: the prompt.
            settings: how to decode.
            seed: for sampling.

        Raises:
            EvaluationError: if it does not, or without the answer's tokens.

        """
        body = {
            "model": self.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "return_token_ids": True,
        }
        if settings.temperature:
            body |= {"top_p": settings.top_p, "top_k": 0, "seed": seed}
        messages = [message.model_dump() for message in prompt.messages]
        start = time.perf_counter()
        if self.uses_chat:
            answer = self._json("/v1/chat/completions", body | {"messages": messages})
        else:
            text = "\n\n".join(message["content"] for message in messages)
            answer = self._json("/v1/completions", body | {"prompt": text})
        seconds = time.perf_counter() - start
        tokens = (answer.get("choices") or [{}])[0].get("token_ids")
        prompt_tokens = (answer.get("usage") or {}).get("prompt_tokens")
        if not isinstance(tokens, list) or not isinstance(prompt_tokens, int):
            raise EvaluationError(
                f"{self.url} does not return the tokens of its answers (return_token_ids), as vLLM "
                "does from 0.11 on."
            )
        return Answer(prompt_tokens, tokens, seconds)

    def counters(self, generated: int = 0) -> Counters:
        """Read the counters, once this many tokens are among them, or in some seconds.

        Raises:
            EvaluationError: if they cannot be read.

        """
        deadline = time.monotonic() + SETTLING
        while (counters := self._counters()).generated < generated:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return counters

    def _counters(self) -> Counters:
        found: dict[str, float] = {}
        positions: dict[int, float] = {}
        for line in self._get("/metrics").decode(errors="replace").splitlines():
            match = SAMPLE.match(line)
            if match is None or match["name"] not in {STEPS, BY_POSITION, GENERATED}:
                continue
            value = float(match["value"])  # one for each engine
            if match["name"] == BY_POSITION:
                position = re.search(r'position="(\d+)"', match["labels"])
                if position is not None:
                    at = int(position[1])
                    positions[at] = positions.get(at, 0) + value
            else:
                found[match["name"]] = found.get(match["name"], 0) + value
        return Counters(
            generated=int(found.get(GENERATED, 0)),
            steps=int(found.get(STEPS, 0)),
            accepted=tuple(int(positions[at]) for at in sorted(positions)),
        )

    def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = self._get(path, body)
        try:
            parsed = json.loads(data)
        except ValueError as error:
            raise EvaluationError(f"{self.url}{path} does not answer with JSON.") from error
        if not isinstance(parsed, dict):
            raise EvaluationError(f"{self.url}{path} does not answer with a JSON object.")
        return parsed

    def _get(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SHORT if body is None else LONG) as got:
                content: bytes = got.read()
        except urllib.error.HTTPError as error:
            said = printable(_message(error.read()))
            raise EvaluationError(
                f"{self.url}{path} answers with status {error.code}: {said}"
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise EvaluationError(
                f"The server {self.url} cannot be reached ({reason}); is it running?"
            ) from error
        return content


def _message(body: bytes) -> str:
    """What an error's body says, which is JSON with vLLM."""
    text = body.decode(errors="replace")
    try:
        parsed = json.loads(text)
    except ValueError:
        return text
    if isinstance(parsed, dict):
        inner = parsed.get("error", parsed)
        return str(inner.get("message", text) if isinstance(inner, dict) else inner)
    return text
