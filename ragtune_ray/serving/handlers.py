"""What the routes of the endpoint do, over a backend.

In: the body of a request whose key was checked. Out: OpenAI's answers, plain or streamed, with the passages they rest on. This
module knows nothing of models or Ray, nor of which path leads where; its backend may be a test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse

from ragtune_ray import config, schema
from ragtune_ray.evaluation import adaptive
from ragtune_ray.index import filters
from ragtune_ray.serving import requests, responses
from ragtune_ray.serving.admission import Load, capacity
from ragtune_ray.serving.api_keys import ANYONE, Key
from ragtune_ray.serving.backend import Backend, Change, Failed, Finished, Found, Job, Shown
from ragtune_ray.serving.middleware import INTERNAL_ERROR, where
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.sanitizing import AnswerText
from ragtune_ray.serving.telemetry import Telemetry

__all__ = ["Gateway", "served_arms"]

READY_SECONDS = 5.0
DOCUMENTS_SECONDS = 600.0
logger = logging.getLogger(__name__)


def served_arms(settings: config.Config) -> tuple[config.Arm, ...]:
    """The arms a request may choose as its model, the default first: those that the generator at hand is meant for.

    >>> served_arms(config.Config())
    ('rag', 'base')
    """
    arm = settings.answer.arm
    if config.is_tuned(arm):
        return (arm,)
    plain: tuple[config.Arm, ...] = ("rag", "base") if arm == "rag" else ("base", "rag")
    return (*plain, *settings.serve.adapter_arms)


Event = TypeVar("Event")


@dataclass(slots=True)
class Gateway:
    """What the routes do."""

    settings: config.Config
    backend: Backend
    telemetry: Telemetry
    calibration: Callable[[], adaptive.Calibration | None]
    """When an answer needs no retrieval, as it is known now; None: it was not found out."""
    generating: Load = field(init=False)
    """The requests that generate."""
    retrieving: Load = field(init=False)
    """Those that retrieve or embed alone."""

    def __post_init__(self) -> None:
        self.generating = Load(capacity(self.settings.serve.generator))
        self.retrieving = Load(capacity(self.settings.serve.retriever))

    async def chat(self, body: bytes, key: Key) -> Response:
        """POST /v1/chat/completions."""
        asked = self._asked(requests.parse(requests.ChatRequest, body), key)
        if not asked.request.stream:
            with self.generating.entered(asked.deadline - asked.started):
                return await self._whole(asked)
        events = self._events(asked)
        first = await anext(events)  # what fails before anything was sent still gets its status
        return StreamingResponse(
            _resumed(first, events), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )

    async def retrieve(self, body: bytes, key: Key) -> Response:
        """POST /v1/retrieve."""
        started = time.monotonic()
        request = requests.parse(requests.RetrieveRequest, body)
        query = requests.checked_text(request.query, "query", self.settings.serve.max_question_characters)
        chosen = self.visible(key, request.filter)
        seconds = self._seconds(request.timeout_seconds)
        with self.retrieving.entered(seconds):
            found = await self._retrieved(query, self._top_k(request.top_k), chosen, started + seconds)
        return JSONResponse(
            {
                "object": "list",
                "data": _sources(found.passages, found.scores),
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
            raise ApiError(400, "input: a text is empty", code="invalid_value", param="input")
        with self.retrieving.entered(limits.timeout_seconds):
            found = await _in_time(self.backend.embed(texts, request.input_type, limits.timeout_seconds))
        if request.model and request.model != found.model:
            raise ApiError(404, "the model is not served; see /v1/models", code="model_not_found", param="model")
        if request.dimensions not in (None, found.vectors.shape[1]):
            raise ApiError(
                400,
                f"dimensions: this encoder makes {found.vectors.shape[1]}",
                code="invalid_value",
                param="dimensions",
            )
        return JSONResponse(
            responses.embeddings_body(found.vectors, found.model, request.encoding_format, found.num_tokens)
        )

    async def upsert(self, body: bytes, _: Key) -> Response:
        """POST /v1/documents."""
        request = requests.parse(requests.DocumentsRequest, body)
        field_name = self.settings.index.tenant_field
        rows = []
        for document in request.documents:
            requests.checked_text(document.document_id, "documents.document_id", 512)
            owner = document.metadata.get(field_name) if field_name else "-"
            if not isinstance(owner, str) or not owner:
                raise ApiError(
                    400,
                    f"documents.metadata.{field_name}: must say whose the document is",
                    code="tenant_missing",
                    param="documents",
                )
            rows.append(document.model_dump())
        return await self._changed(Change(upserted=tuple(rows)))

    async def delete(self, body: bytes, _: Key) -> Response:
        """DELETE /v1/documents."""
        request = requests.parse(requests.DeletedDocuments, body)
        ids = tuple(requests.checked_text(name, "document_ids", 512) for name in request.document_ids)
        return await self._changed(Change(deleted=ids))

    async def _changed(self, change: Change) -> Response:
        return JSONResponse(dict(await _in_time(self.backend.change_documents(change, DOCUMENTS_SECONDS))))

    async def models(self) -> Response:
        """GET /v1/models: the arms."""
        data = [
            {"id": arm, "object": "model", "created": 0, "owned_by": "ragtune-ray"}
            for arm in served_arms(self.settings)
        ]
        return JSONResponse({"object": "list", "data": data})

    async def ready(self, *, draining: bool) -> Response:
        """GET /readyz: 200 where a question would be answered."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                status = await self.backend.status()
        except TimeoutError:
            return JSONResponse({"ready": False, "problems": ["the copies do not answer"]}, 503)
        problems = [*status.problems, *(["this endpoint is being stopped"] if draining else [])]
        facts = {
            "ready": not problems,
            "problems": problems,
            "retrievers": [dict(copy) for copy in status.retrievers],
            "generators": [dict(copy) for copy in status.generators],
        }
        return JSONResponse(facts, 503 if problems else 200)

    async def metrics(self) -> Response:
        """GET /metrics."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                status = await self.backend.status()
                others = await self.backend.counted_elsewhere()
            text = self.telemetry.text(status.retrievers, status.generators, others)
        except TimeoutError:
            text = self.telemetry.text((), ())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def visible(self, key: Key, wanted: dict[str, Any] | None) -> filters.Filter:
        """What a request may see: the config's filter, the key's tenant and the request's own filter all narrow it.

        Raises:
            ApiError: 400, the request's filter is malformed; 403, documents have tenants and the key has none.
        """
        parts = [filters.parse_filter(self.settings.retrieval.filter)]
        field_name = self.settings.index.tenant_field
        if field_name:
            tenant = self.settings.retrieval.tenant if key is ANYONE else key.tenant
            if not tenant:
                raise ApiError(403, "documents here belong to tenants, and this key has none", code="no_tenant")
            parts.append(filters.tenant_filter(field_name, tenant))
        try:
            parts.append(filters.parse_filter(wanted or {}))
        except (ValueError, RecursionError, TypeError) as error:
            raise ApiError(400, str(error)[:300], code="invalid_filter", param="filter") from None
        return filters.combine(*parts)

    def _asked(self, request: requests.ChatRequest, key: Key) -> _Asked:
        started = time.monotonic()
        arms = served_arms(self.settings)
        if request.model and request.model not in arms:
            raise ApiError(
                404, f"the model is not served; there are: {', '.join(arms)}", code="model_not_found", param="model"
            )
        return _Asked(
            request=request,
            request_id=responses.new_id(),
            arm=next(arm for arm in arms if request.model in ("", arm)),
            said=requests.conversation(request, self.settings.serve),
            chosen=self.visible(key, request.filter),
            top_k=self._top_k(request.top_k),
            max_new_tokens=requests.max_new_tokens_of(request, self.settings),
            stop=requests.stops_of(request),
            started=started,
            deadline=started + self._seconds(request.timeout_seconds),
            calibration=self._calibration_for(request),
        )

    def _calibration_for(self, request: requests.ChatRequest) -> adaptive.Calibration | None:
        if (request.retrieval or self.settings.serve.retrieval) == "always":
            return None
        # The calibration is of the arm of the config; another arm's adapter is another generator.
        calibration = self.calibration()
        if calibration is None or request.model not in ("", self.settings.answer.arm):
            if request.retrieval is None:
                return None
            raise ApiError(
                409,
                "retrieval: this arm was not calibrated, so nothing says when it may answer without; leave it out",
                code="not_calibrated",
                param="retrieval",
            )
        return calibration

    def _top_k(self, wanted: int | None) -> int:
        default = min(self.settings.retrieval.top_k, self.settings.serve.max_top_k)
        return default if wanted is None else requests.limited(wanted, self.settings.serve.max_top_k, "top_k")

    def _seconds(self, wanted: float | None) -> float:
        longest = self.settings.serve.timeout_seconds
        return longest if wanted is None else min(wanted, longest)

    async def _retrieved(self, text: str, top_k: int, chosen: filters.Filter, deadline: float) -> Found:
        started = time.monotonic()
        seconds = deadline - started
        if not text.strip():
            raise ApiError(400, "query: is empty", code="invalid_value", param="query")
        try:
            async with asyncio.timeout(seconds):
                found = await self.backend.retrieve(text, top_k, chosen, seconds)
        except TimeoutError:
            raise _too_late() from None
        self.telemetry.retrieval_seconds.observe(time.monotonic() - started)
        return found

    async def _job(self, asked: _Asked) -> Job:
        found = Found("", (), (), 0.0)
        if config.retrieves(asked.arm):
            started = time.monotonic()
            found = await self._retrieved(asked.said.search, asked.top_k, asked.chosen, asked.deadline)
            asked.retrieval_seconds = time.monotonic() - started
        return self._job_of(asked, found, closed_book=False)

    def _job_of(self, asked: _Asked, found: Found, *, closed_book: bool) -> Job:
        given, request = self.settings.generator, asked.request
        return Job(
            question=asked.said.question,
            arm=asked.arm,
            passages=found.passages,
            scores=found.scores,
            index_version=found.index_version,
            history=asked.said.history,
            instruction=asked.said.instruction,
            max_new_tokens=asked.max_new_tokens,
            temperature=given.temperature if request.temperature is None else request.temperature,
            stop=(*given.stop, *asked.stop),
            seed=self.settings.seed if request.seed is None else request.seed,
            closed_book=closed_book,
        )

    async def _sure(self, asked: _Asked) -> tuple[Job, Shown, Finished] | None:
        """The closed-book answer, if one is wanted and the generator is sure enough of it."""
        if asked.calibration is None:
            return None
        started = time.monotonic()
        closed = await self._completed(asked, self._job_of(asked, Found("", (), (), 0.0), closed_book=True))
        asked.closed_book_seconds = time.monotonic() - started
        is_sure = adaptive.is_sure(closed[2].answer, asked.calibration)
        self.telemetry.adaptive.labels("closed_book" if is_sure else "retrieved").inc()
        return closed if is_sure else None

    async def _whole(self, asked: _Asked) -> Response:
        try:
            async with asyncio.timeout_at(_loop_time(asked.deadline)):
                sure = await self._sure(asked)
                job, shown, finished = sure or await self._completed(asked, await self._job(asked))
        except TimeoutError:
            raise _too_late() from None
        text = AnswerText(shown.passages, self.settings.serve.link_hosts)
        text.add(finished.raw)
        facts = self._facts(asked, job, shown, finished)
        return JSONResponse(
            responses.completion_body(
                asked.request_id, asked.arm, finished.answer, text.whole(), facts, finished.finish
            )
        )

    async def _completed(self, asked: _Asked, job: Job) -> tuple[Job, Shown, Finished]:
        result = await self.backend.complete(job, asked.deadline - time.monotonic())
        if isinstance(result, Failed):
            raise _error_of(result)
        return job, *result

    async def _events(self, asked: _Asked) -> AsyncGenerator[bytes, None]:
        """The events of a stream; errors before the first are raised, later ones are events."""
        has_begun = False
        with self.generating.entered(asked.deadline - asked.started):
            try:
                async with asyncio.timeout_at(_loop_time(asked.deadline)):
                    sure = await self._sure(asked)
                job = sure[0] if sure else await self._job(asked)
                source = _again(*sure[1:]) if sure else self.backend.stream(job, asked.deadline - time.monotonic())
                async with contextlib.aclosing(self._stream(asked, job, source)) as stream:
                    async for event in _timed(stream, asked.deadline):
                        has_begun = True
                        yield responses.event(event)
                yield responses.DONE
            except Exception as error:  # noqa: BLE001  # the border: whatever it is, a stream never ends in silence
                if not has_begun:
                    raise _too_late() if isinstance(error, TimeoutError) else error from None
                failure = _failure_of(error)
                self.telemetry.refused.labels(failure.code).inc()
                yield responses.event(failure.body())  # never a silent end

    async def _stream(
        self, asked: _Asked, job: Job, events: AsyncGenerator[Shown | str | Finished | Failed, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        text = AnswerText((), ())
        shown: Shown | None = None
        async with contextlib.aclosing(events):
            async for event in events:
                match event:
                    case Failed():
                        raise _error_of(event)
                    case Shown():
                        shown = event
                        text = AnswerText(shown.passages, self.settings.serve.link_hosts)
                        facts = {"sources": _sources(shown.passages, shown.scores), "index_version": job.index_version}
                        delta = {"role": "assistant", "content": ""}
                        yield responses.chunk(asked.request_id, asked.arm, delta, facts)
                    case str():
                        piece = text.add(event)
                        if piece:
                            yield responses.chunk(asked.request_id, asked.arm, {"content": piece})
                    case Finished():
                        assert shown is not None
                        for last in self._last_chunks(asked, job, shown, event, text):
                            yield last
                        return
        raise ApiError(502, "the answer broke off", code="incomplete_answer")

    def _last_chunks(
        self, asked: _Asked, job: Job, shown: Shown, finished: Finished, text: AnswerText
    ) -> Iterator[dict[str, Any]]:
        rest = text.end()
        if rest:
            yield responses.chunk(asked.request_id, asked.arm, {"content": rest})
        facts = self._facts(asked, job, shown, finished)
        sources = facts.pop("sources")
        marks = responses.url_citations(text.shown, finished.answer.citations, sources)
        facts["citations"] = responses.citations_body(finished.answer)
        yield responses.chunk(asked.request_id, asked.arm, {"annotations": marks}, facts, finished.finish)
        options = asked.request.stream_options
        if options is not None and options.include_usage:
            usage = responses.usage_body(finished.answer)
            yield responses.chunk(asked.request_id, asked.arm, {}, {"choices": [], "usage": usage})

    def _facts(self, asked: _Asked, job: Job, shown: Shown, finished: Finished) -> dict[str, Any]:
        meters, answer = self.telemetry, finished.answer
        meters.generation_seconds.observe(finished.seconds)
        total = time.monotonic() - asked.started
        meters.first_token_seconds.observe(max(0.0, total - finished.seconds + finished.first_token_seconds))
        meters.prompt_tokens.inc(answer.prompt_tokens)
        meters.completion_tokens.inc(answer.completion_tokens)
        timings = {
            "closed_book_seconds": asked.closed_book_seconds,
            "retrieval_seconds": asked.retrieval_seconds,
            "first_token_seconds": finished.first_token_seconds,
            "generation_seconds": finished.seconds,
            "total_seconds": total,
        }
        return {
            "sources": _sources(shown.passages, shown.scores),
            "index_version": job.index_version,
            "arm": asked.arm,
            "retrieved": config.retrieves(asked.arm) and not job.closed_book,
            "abstained": answer.abstained,
            "generator": answer.model,
            "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
        }


@dataclass(slots=True)
class _Asked:
    """A chat request whose every part was found acceptable."""

    request: requests.ChatRequest
    request_id: str
    arm: config.Arm
    said: requests.Conversation
    chosen: filters.Filter
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...]
    started: float
    deadline: float
    calibration: adaptive.Calibration | None
    """When a closed-book answer is sure enough; None: always retrieved for."""
    retrieval_seconds: float = 0.0
    closed_book_seconds: float = 0.0
    """Spent on finding out whether retrieval is needed."""


def _sources(passages: Sequence[schema.Passage], scores: Sequence[float]) -> list[dict[str, Any]]:
    return [
        responses.source(number, passage, score)
        for number, (passage, score) in enumerate(zip(passages, scores, strict=True), start=1)
    ]


async def _again(shown: Shown, finished: Finished) -> AsyncGenerator[Shown | str | Finished | Failed, None]:
    """An answer that is already there, as a stream."""
    yield shown
    yield finished.raw
    yield finished


async def _timed(events: AsyncGenerator[Event, None], deadline: float) -> AsyncIterator[Event]:
    # Not one `asyncio.timeout` around the loop: what consumes a stream may do so from more than one task.
    while True:
        try:
            yield await asyncio.wait_for(anext(events), max(0.0, deadline - time.monotonic()))
        except StopAsyncIteration:
            return


async def _resumed(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(events):
        yield first
        async for event in events:
            yield event


async def _in_time(call: Awaitable[Event]) -> Event:
    try:
        return await call
    except TimeoutError:
        raise _too_late() from None


def _loop_time(monotonic: float) -> float:
    return asyncio.get_running_loop().time() + monotonic - time.monotonic()


def _too_late() -> ApiError:
    return ApiError(504, "the answer was not ready in time", code="deadline_exceeded")


def _failure_of(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return _too_late()
    logger.error("a stream failed: %s", where(error))
    return INTERNAL_ERROR


def _error_of(failed: Failed) -> ApiError:
    return ApiError(failed.status, failed.message, code=failed.code, retry_after_seconds=failed.retry_after_seconds)
