"""An OpenAI-compatible chat server on loopback: it runs a real model, and misbehaves when it is told to."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from quarterlight.images import load_image

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


class ChatServer(ThreadingHTTPServer):
    """``POST /v1/chat/completions``; a context manager.

    model: gives the log-probabilities of all tokens after a user's turn, and has a tokenizer.
    trouble: called with the request's number, from 0, and its body; may answer in place of the model.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, model: Any = None, trouble: Callable[[int, Any], Answer | None] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.trouble = trouble
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    def __enter__(self) -> ChatServer:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def complete(self, body: Any) -> Answer:
        """What vLLM would send for this request."""
        content = []
        for part in body["messages"][0]["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                content.append({"type": "image", "image": load_image(data)})
            else:
                content.append(part)
        assert body["max_tokens"] == 1
        with self.lock:
            scores = self.model.log_probabilities(content)
        tokenizer = self.model.processor.tokenizer
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice["message"] = {"role": "assistant", "content": tokenizer.decode(int(scores.argmax()))}
        if body.get("logprobs"):
            best = scores.topk(body["top_logprobs"])
            top = [
                {"token": tokenizer.decode(one), "logprob": value}
                for value, one in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return answer({"object": "chat.completion", "model": body["model"], "choices": [choice]})


def answer(content: Any, status: int = 200, **headers: str) -> Answer:
    """Anything as JSON, bytes as they are."""
    return status, headers, content if isinstance(content, bytes) else json.dumps(content).encode()


def says(text: str) -> Answer:
    """A completion without log-probabilities."""
    return answer({"choices": [{"message": {"role": "assistant", "content": text}, "logprobs": None}]})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
        found = self.server.trouble(number, body) if self.server.trouble else None
        status, headers, content = found or self.server.complete(body)
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the client has gone

    def log_message(self, *_: object) -> None:
        pass


def hang(_number: int, _body: Any) -> None:
    """Longer than any test waits for an answer."""
    time.sleep(2)
