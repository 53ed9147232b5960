"""Handles the routes that neither answer questions (`openai/`) nor concern documents (`documents`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from ragtune_ray import config
from ragtune_ray.serving import requests, sources
from ragtune_ray.serving.admission import Load, capacity
from ragtune_ray.serving.answers import retrieve_before, served_arms
from ragtune_ray.serving.api_keys import Key, visible_filter
from ragtune_ray.serving.backend import Backend
from ragtune_ray.serving.openai import embeddings
from ragtune_ray.serving.telemetry import Telemetry

READY_SECONDS = 5.0


@dataclass(slots=True)
class Handlers:
    """The handlers, one method per route. Keys are already checked."""

    settings: config.Config
    backend: Backend
    telemetry: Telemetry
    load: Load = field(init=False)
    """The requests that retrieve or embed without generating."""

    def __post_init__(self) -> None:
        self.load = Load(capacity(self.settings.serve.retriever))

    async def retrieve(self, body: bytes, key: Key) -> Response:
        """POST /v1/retrieve."""
        started = time.monotonic()
        request = requests.parse(requests.RetrieveRequest, body)
        query = requests.checked_text(request.query, "query", self.settings.serve.max_question_characters)
        visible = visible_filter(self.settings, key, request.filter)
        seconds = requests.timeout_of(request.timeout_seconds, self.settings)
        with self.load.admit(seconds):
            top_k = requests.top_k_of(request.top_k, self.settings)
            found = await retrieve_before(started + seconds, self.backend, self.telemetry, query, top_k, visible)
        return JSONResponse(
            {
                "object": "list",
                "data": sources.sources(found.passages, found.scores),
                "index_version": found.index_version,
                "timings": {"retrieval_seconds": round(time.monotonic() - started, 4)},
            }
        )

    async def embed(self, body: bytes, _: Key) -> Response:
        """POST /v1/embeddings."""
        with self.load.admit(self.settings.serve.timeout_seconds):
            return await embeddings.embed(self.settings, self.backend, body)

    def served_models(self) -> tuple[str, ...]:
        """The arms, then the model that embeds."""
        embedding = embeddings.embedding_model(self.settings)
        return (*served_arms(self.settings), *([embedding] if embedding else []))

    async def models(self) -> Response:
        """GET /v1/models: the arms and the model that embeds."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.served_models()]})

    def model_handler(self, name: str) -> Callable[[], Awaitable[Response]]:
        """GET /v1/models/NAME."""

        async def send() -> Response:
            return JSONResponse(self._model(name))

        return send

    def _model(self, name: str) -> dict[str, Any]:
        """A model as OpenAI lists it; the extension `task` tells an arm, which answers, from the model that embeds."""
        task = "answer" if name in served_arms(self.settings) else "embed"
        return {"id": name, "object": "model", "created": 0, "owned_by": "ragtune-ray", "task": task}

    async def ready(self, *, draining: bool) -> Response:
        """GET /readyz: 200 if the endpoint can answer questions, otherwise 503 and the reasons."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                status = await self.backend.status()
        except TimeoutError:
            return JSONResponse({"ready": False, "problems": ["the replicas do not respond"]}, 503)
        problems = [*status.problems, *(["this endpoint is shutting down"] if draining else [])]
        facts = {
            "ready": not problems,
            "problems": problems,
            "retrievers": [dict(replica) for replica in status.retrievers],
            "generators": [dict(replica) for replica in status.generators],
        }
        return JSONResponse(facts, 503 if problems else 200)

    async def metrics(self) -> Response:
        """GET /metrics, in Prometheus' format."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                status = await self.backend.status()
                others = await self.backend.metrics_of_other_processes()
            text = self.telemetry.text(status.retrievers, status.generators, others)
        except TimeoutError:
            text = self.telemetry.text((), ())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
