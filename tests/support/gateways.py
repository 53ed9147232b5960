"""A fake backend without models, and the endpoint over it, in this process."""

import asyncio
import socket
import threading
from collections.abc import Mapping
from typing import Any

import httpx2 as httpx
import numpy as np
import uvicorn
from starlette.types import ASGIApp

from ragtune_ray import config, schema
from ragtune_ray.answering.citations import parse_citations
from ragtune_ray.evaluation import adaptive
from ragtune_ray.generation.interface import Finish
from ragtune_ray.index import snapshot
from ragtune_ray.serving.api_keys import Key, Keys
from ragtune_ray.serving.app import build_app
from ragtune_ray.serving.backend import Change, Embedded, Failed, Finished, Found, Job, Listed, Shown, Status
from ragtune_ray.serving.requests import ApiError

PASSAGES = tuple(
    schema.Passage(f"d{n}#0", f"d{n}", f"The code of vessel{n} is secret{n}.", f"Vessel {n}", "{}", 0, 33)
    for n in range(3)
)
SECRETS = {"user": "user-key-0123456789", "admin": "admin-key-0123456789", "other": "other-key-0123456789"}


class FakeBackend:
    """Answers with `self.raw` in pieces of 3 characters, and records its calls in `asked`."""

    def __init__(self) -> None:
        self.raw = "It is secret0 [1]."
        self.finish: Finish = "stop"
        self.asked: list[Any] = []
        self.retrieval_error: ApiError | None = None
        self.failure: Failed | None = None
        self.fail_after = 0
        self.gate: asyncio.Event | None = None
        self.confidence = 0.5
        self.closed = 0
        self.parts: tuple[str, ...] = ()
        self.written = ("What moons has Mars?",)
        self.fallbacks: tuple[str, ...] = ()

    async def retrieve(self, text, top_k, visible, seconds, parts=()) -> Found:
        self.asked.append(("retrieve", text, top_k, visible, seconds))
        self.parts = tuple(parts)
        if self.retrieval_error:
            raise self.retrieval_error
        return Found("000007", PASSAGES[:top_k], (0.3, 0.2, 0.1)[:top_k], 0.001)

    async def write_searches(self, job: Job, seconds: float) -> schema.Searches:
        self.asked.append(("write", job, seconds))
        return schema.Searches("ask", job.question, self.written, self.fallbacks, 40, 6, 0.1)

    async def embed(self, texts, input_type, seconds) -> Embedded:
        self.asked.append(("embed", texts, input_type))
        return Embedded(np.eye(4, dtype=np.float32)[np.arange(len(texts)) % 4], "all-MiniLM-L6-v2", 9)

    async def stream(self, job: Job, seconds: float):
        self.asked.append(("stream", job, seconds))
        try:
            if self.failure and not self.fail_after:
                yield self.failure
                return
            yield Shown(job.passages, job.scores, 11)
            for number, start in enumerate(range(0, len(self.raw), 3), start=1):
                if self.gate:
                    await self.gate.wait()
                yield self.raw[start : start + 3]
                if self.failure and number == self.fail_after:
                    yield self.failure
                    return
            yield self._finished(job)
        finally:
            self.closed += 1

    async def complete(self, job: Job, seconds: float):
        self.asked.append(("complete", job, seconds))
        if self.gate:
            await self.gate.wait()
        if self.failure:
            return self.failure
        return Shown(job.passages, job.scores, 11), self._finished(job)

    def _finished(self, job: Job) -> Finished:
        text, citations = parse_citations(self.raw, job.passages)
        ids = tuple(passage.passage_id for passage in job.passages)
        row = (
            "ask",
            job.question,
            text,
            citations,
            ids,
            job.scores,
            False,
            0.1,
            11,
            5,
            "ok",
            "",
            job.index_version,
            "model",
            self.confidence,
        )
        return Finished(schema.Answer(*row), self.raw, self.finish, 0.05, 0.1)

    async def change_documents(self, change: Change, seconds: float) -> Mapping[str, Any]:
        self.asked.append(("change", change))
        return {"index_version": "000008"}

    async def list_documents(self, visible, after, limit, seconds) -> Listed:
        self.asked.append(("list", visible, after, limit))
        rows = [snapshot.ListedDocument(f"d{n}", f"Vessel {n}", '{"year": 2020}', 1) for n in range(3)]
        rows = [row for row in rows if row.document_id > after]
        return Listed("000007", tuple(rows[:limit]), len(rows) > limit)

    async def status(self) -> Status:
        return Status(
            ({"index_version": "000007", "refused": None},),
            ({"model": "m", "refused": None, "running": 0, "waiting": 0},),
        )

    async def metrics_of_other_processes(self) -> list[bytes]:
        return []


def keys(**tenants: str) -> Keys:
    rows = [{"name": name, "key": secret, "admin": name == "admin"} for name, secret in SECRETS.items()]
    return Keys([Key.model_validate(row | {"tenant": tenants.get(row["name"], "")}) for row in rows])


def client(
    *overrides: str,
    backend: FakeBackend | None = None,
    keys: Keys | None = None,
    address: str = "127.0.0.1",
    **headers: str,
) -> httpx.AsyncClient:
    """An HTTP client of an endpoint in this process, with its `middleware` and `backend` as attributes."""
    settings = config.Config().using(*overrides)
    backend = backend or FakeBackend()
    middleware = build_app(settings, backend, keys or Keys([]), lambda: adaptive.read_calibration(settings))
    transport = httpx.ASGITransport(app=middleware, client=(address, 4242))
    made = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)
    made.middleware, made.backend = middleware, backend
    return made


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


def question(text: str = "What is the code of vessel0?", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


class InThread:
    """An application on a local port, in a thread of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


class Served(InThread):
    """The endpoint on a local port."""

    def __init__(self, backend: FakeBackend, allowed: Keys, settings: config.Config | None = None) -> None:
        self.backend = backend
        super().__init__(build_app(settings or config.Config(), backend, allowed, lambda: None))
        self.address = self.address.rstrip("/")
