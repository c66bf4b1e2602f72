"""A stand-in for vLLM's OpenAI-compatible server, on the loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

POSITIONS = 3


class VllmServer:
    """Answers each prompt with some tokens that depend on it, and counts as vLLM does.

    An answer to a prompt with n characters has n % 5 + 4 tokens. Of its steps, the first accepts
    three tokens, and each further one n % 3.

    Args:
        drafts: whether it speculates.
        template: whether its model has a chat template.
        changed: a text; prompts that contain it get another answer.
        key: the API key that it wants.

    Attributes:
        requests: the bodies of the requests, in order.
        at_once: the most requests that were answered at the same time.

    """

    def __init__(
        self,
        *,
        drafts: bool = True,
        template: bool = True,
        changed: str | None = None,
        key: str | None = None,
    ) -> None:
        self.drafts, self.template, self.changed, self.key = drafts, template, changed, key
        self.requests: list[dict[str, Any]] = []
        self.at_once = self._now = 0
        self._lock = threading.Lock()
        self._meeting = threading.Event()
        self.steps, self.accepted, self.generated = 0, [0] * POSITIONS, 0
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in._get(self)

            def do_POST(self) -> None:
                stand_in._post(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "VllmServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @staticmethod
    def answer(text: str) -> list[int]:
        return [100 + place for place in range(len(text) % 5 + 4)]

    @staticmethod
    def steps_of(text: str) -> list[int]:
        """The accepted tokens of each step."""
        return [3, *[len(text) % 3] * (len(text) % 5)]

    def metrics(self) -> str:
        labels = 'engine="0",model_name="org/verifier"'
        lines = [
            "# HELP vllm:generation_tokens_total Number of generation tokens processed.",
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total{{{labels}}} {float(self.generated)}",
        ]
        if self.drafts:
            lines += [
                f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(self.steps)}",
                f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.75e+09",
            ]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{at}"}} '
                f"{float(count)}"
                for at, count in enumerate(self.accepted)
            ]
        return "\n".join(lines) + "\n"

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/metrics":
            self._send(handler, 200, self.metrics().encode())
        elif self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            self._send_json(handler, 401, {"error": "Unauthorized"})
        elif handler.path == "/v1/models":
            self._send_json(handler, 200, {"data": [{"id": "org/verifier"}]})
        elif handler.path == "/version":
            self._send_json(handler, 200, {"version": "0.99.0"})
        else:
            self._send_json(handler, 404, {"detail": "Not Found"})

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        chat = handler.path == "/v1/chat/completions"
        if chat and not self.template:
            message = "As of transformers v4.44, default chat template is no longer allowed"
            self._send_json(handler, 400, {"error": {"message": message, "code": 400}})
            return
        with self._lock:
            self.requests.append(body)
            self._now += 1
            self.at_once = max(self.at_once, self._now)
            if self._now > 1:
                self._meeting.set()
        if body["max_tokens"] > 1:
            self._meeting.wait(0.1)
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        tokens = self.answer(text)[: body["max_tokens"]]
        if self.changed and self.changed in text:
            tokens = [*tokens[:2], 7]
        with self._lock:
            self._now -= 1
            self.generated += len(tokens)
            if body["max_tokens"] > 1:
                for accepted in self.steps_of(text):
                    self.steps += 1
                    for at in range(accepted):
                        self.accepted[at] += 1
        answer = {
            "choices": [{"index": 0, "token_ids": tokens}],
            "usage": {"prompt_tokens": len(text), "completion_tokens": len(tokens)},
        }
        self._send_json(handler, 200, answer)

    def _send_json(self, handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
        self._send(handler, status, json.dumps(content).encode())

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
