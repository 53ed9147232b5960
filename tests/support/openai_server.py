"""A scripted OpenAI-compatible server, and a real one."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray.generation.interface import Prompt

SECRET = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Answers each request from the list of replies for its question, in order; the last reply is repeated."""

    daemon_threads = True
    request_queue_size = 256  # the default of 5 drops connections when many requests arrive at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts: dict[str, list] = {}
        self.requests: list[dict] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.active = self.most_active = 0
        self.barrier: threading.Barrier | None = None
        self.crowded = threading.Event()
        self.released = threading.Event()
        self.finish = "length"
        self.reply: Callable[[dict], Any] | None = None
        """What answers the body of a request for whose question there is no script."""

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.requests.append(body)
            server.keys.add(self.headers["Authorization"])
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            if server.barrier is not None and server.active > server.barrier.parties:
                server.crowded.set()
            script = server.scripts.get(question, [])
            reply = (
                script.pop(0) if len(script) > 1 else (script[0] if script else self.server.reply or question.upper())
            )
        try:
            if server.barrier is not None:
                server.barrier.wait(timeout=10)
                server.crowded.wait(0.15)  # time for a request beyond the limit to arrive
            self.answer(reply(body) if callable(reply) else reply, stream=body.get("stream", False))
        finally:
            with server.lock:
                server.active -= 1

    def answer(self, reply: Any, *, stream: bool) -> None:
        if callable(reply):
            reply = reply(self.server.requests[-1])
        if reply == "hang":
            self.server.released.wait(timeout=20)
            self.close_connection = True
            return
        if isinstance(reply, tuple):
            status, headers, text = reply
            self.send(status, text.encode(), headers)
        elif stream:
            pieces = [reply] if isinstance(reply, dict) else [{"content": letter} for letter in reply]
            chunks = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
            # Servers send the finish reason in a chunk without text and the usage in one without choices.
            chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": self.server.finish}]}, {"choices": []}]
            lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
            self.send(200, "".join(lines).encode(), {"Content-Type": "text/event-stream"})
        else:
            message = reply if isinstance(reply, dict) else {"content": reply}
            choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": self.server.finish}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            self.send(200, json.dumps({"choices": [choice], "usage": usage}).encode(), {})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def prompts_of(*questions: str) -> list[Prompt]:
    return [Prompt((("system", "S"), ("user", question)), (), 5) for question in questions]


@contextlib.contextmanager
def transformers_server(directory: Path, log: Path) -> Iterator[str]:
    """`transformers serve` with a model on this machine; yields the root of its API."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(directory)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            threading.Event().wait(0.2)  # polls, because the process has no other sign that it is ready
    pytest.fail(f"no server: {log.read_text()}")
