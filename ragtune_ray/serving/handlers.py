"""Handles all routes of the endpoint except chat completions (`chat`) and documents (`documents`)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from starlette.responses import JSONResponse, Response

from ragtune_ray import config
from ragtune_ray.serving import requests, responses
from ragtune_ray.serving.admission import Load, capacity
from ragtune_ray.serving.api_keys import Key, visible_filter
from ragtune_ray.serving.backend import Backend
from ragtune_ray.serving.chat import retrieve_before, served_arms, timeout_as_504
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
                "data": responses.sources(found.passages, found.scores),
                "index_version": found.index_version,
                "timings": {"retrieval_seconds": round(time.monotonic() - started, 4)},
            }
        )

    async def embed(self, body: bytes, _: Key) -> Response:
        """POST /v1/embeddings."""
        request = requests.parse(requests.EmbeddingsRequest, body)
        limits = self.settings.serve
        texts = [requests.checked_text(text, "input", limits.max_question_characters) for text in request.texts()]
        requests.limited(len(texts), limits.max_texts, "input")
        if not all(text.strip() for text in texts):
            raise requests.invalid("input", "texts must not be empty")
        with self.load.admit(limits.timeout_seconds), timeout_as_504():
            found = await self.backend.embed(texts, request.input_type, limits.timeout_seconds)
        if request.model and request.model != found.model:
            reason = f"this endpoint embeds with {found.model}"
            raise requests.invalid("model", reason, status=404, code="model_not_found")
        dimension = found.vectors.shape[1]
        if request.dimensions not in (None, dimension):
            raise requests.invalid("dimensions", f"must be {dimension} for this encoder")
        return JSONResponse(
            responses.embeddings_body(found.vectors, found.model, request.encoding_format, found.num_tokens)
        )

    async def models(self) -> Response:
        """GET /v1/models: the arms."""
        common = {"object": "model", "created": 0, "owned_by": "ragtune-ray"}
        return JSONResponse({"object": "list", "data": [{"id": arm, **common} for arm in served_arms(self.settings)]})

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
