"""Handles POST /v1/chat/completions: retrieves, generates, and sends the answer as one body or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse

from ragtune_ray import config
from ragtune_ray.evaluation import adaptive
from ragtune_ray.index import filters
from ragtune_ray.serving import requests, responses
from ragtune_ray.serving.admission import Load, capacity
from ragtune_ray.serving.api_keys import Key, visible_filter
from ragtune_ray.serving.backend import TOO_LATE, Backend, Event, Failed, Finished, Found, Job, Shown
from ragtune_ray.serving.middleware import INTERNAL_ERROR, traceback_without_message
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.sanitizing import AnswerText
from ragtune_ray.serving.telemetry import Telemetry

Item = TypeVar("Item")
logger = logging.getLogger(__name__)


def served_arms(settings: config.Config) -> tuple[config.Arm, ...]:
    """The arms that a request may name as its model, the default first.

    >>> served_arms(config.Config())
    ('rag', 'base')
    """
    arm = settings.answer.arm
    if config.is_tuned(arm):
        return (arm,)
    plain: tuple[config.Arm, ...] = ("rag", "base") if arm == "rag" else ("base", "rag")
    return (*plain, *settings.serve.adapter_arms)


@contextlib.contextmanager
def timeout_as_504() -> Iterator[None]:
    """Turn a TimeoutError into ApiError 504."""
    try:
        yield
    except TimeoutError:
        raise TOO_LATE.error() from None


async def retrieve_before(
    deadline: float, backend: Backend, telemetry: Telemetry, text: str, top_k: int, visible: filters.Filter
) -> Found:
    """Retrieve until the deadline (monotonic time); ApiError 400 if the text is empty, 504 after the deadline."""
    started = time.monotonic()
    if not text.strip():
        raise requests.invalid("query", "must not be empty")
    with timeout_as_504():
        async with asyncio.timeout(deadline - started):
            found = await backend.retrieve(text, top_k, visible, deadline - started)
    telemetry.retrieval_seconds.observe(time.monotonic() - started)
    return found


@dataclass(slots=True)
class _AcceptedRequest:
    request_id: str
    job: Job
    """The closed-book job, without passages."""
    query: str
    """What to search for."""
    visible: filters.Filter
    top_k: int
    include_usage: bool
    started: float
    timeout_seconds: float
    calibration: adaptive.RetrievalCalibration | None
    """Decides when a closed-book answer is confident enough; None: always retrieve."""
    retrieval_seconds: float = 0.0
    closed_book_seconds: float = 0.0
    """Spent on the closed-book answer that decides whether to retrieve."""

    @property
    def deadline(self) -> float:
        """In monotonic time."""
        return self.started + self.timeout_seconds

    @property
    def seconds_left(self) -> float:
        """Time until the deadline."""
        return self.deadline - time.monotonic()

    def timeout(self) -> asyncio.Timeout:
        """A context manager that raises TimeoutError at the deadline."""
        return asyncio.timeout(self.seconds_left)

    def chunk(
        self, delta: dict[str, Any], extensions: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """One chunk of the streamed answer."""
        return responses.chunk(self.request_id, self.job.arm, delta, extensions, finish)


_Completion: TypeAlias = tuple[Job, Shown, Finished]


@dataclass(slots=True)
class ChatHandler:
    """Answers chat requests."""

    settings: config.Config
    backend: Backend
    telemetry: Telemetry
    calibration: Callable[[], adaptive.RetrievalCalibration | None]
    """Returns the current calibration of adaptive retrieval; None if `ragtune calibrate` has not run."""
    load: Load = field(init=False)

    def __post_init__(self) -> None:
        self.load = Load(capacity(self.settings.serve.generator))

    async def __call__(self, body: bytes, key: Key) -> Response:
        """POST /v1/chat/completions."""
        request = requests.parse(requests.ChatRequest, body)
        accepted = self._accept(request, key)
        if not request.stream:
            with self.load.admit(accepted.timeout_seconds):
                return await self._complete_response(accepted)
        events = self._stream_events(accepted)
        first = await anext(events)  # an error before the first event still sets the HTTP status
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(_prepend(first, events), media_type="text/event-stream", headers=headers)

    def _accept(self, request: requests.ChatRequest, key: Key) -> _AcceptedRequest:
        started = time.monotonic()
        arms = served_arms(self.settings)
        if request.model and request.model not in arms:
            reason = f"not served here; use one of: {', '.join(arms)}"
            raise requests.invalid("model", reason, status=404, code="model_not_found")
        conversation, generator = requests.conversation(request, self.settings.serve), self.settings.generator
        visible = visible_filter(self.settings, key, request.filter)
        top_k = requests.top_k_of(request.top_k, self.settings)
        job = Job(
            question=conversation.question,
            arm=next(arm for arm in arms if request.model in ("", arm)),
            passages=(),
            scores=(),
            index_version="",
            history=conversation.history,
            instruction=conversation.instruction,
            max_new_tokens=requests.max_new_tokens_of(request, self.settings),
            temperature=generator.temperature if request.temperature is None else request.temperature,
            stop=(*generator.stop, *requests.stops_of(request)),
            seed=self.settings.seed if request.seed is None else request.seed,
            closed_book=True,
        )
        return _AcceptedRequest(
            request_id=responses.new_id(),
            job=job,
            query=conversation.search,
            visible=visible,
            top_k=top_k,
            include_usage=request.stream_options is not None and request.stream_options.include_usage,
            started=started,
            timeout_seconds=requests.timeout_of(request.timeout_seconds, self.settings),
            calibration=self._calibration_for(request),
        )

    def _calibration_for(self, request: requests.ChatRequest) -> adaptive.RetrievalCalibration | None:
        if (request.retrieval or self.settings.serve.retrieval) == "always":
            return None
        # The calibration is for the arm of the config; another arm's adapter makes it another generator.
        calibration = self.calibration()
        if calibration is None or request.model not in ("", self.settings.answer.arm):
            if request.retrieval is None:
                return None
            reason = "`auto` needs a calibration, and this arm has none; leave the field out"
            raise requests.invalid("retrieval", reason, status=409, code="not_calibrated")
        return calibration

    async def _complete_response(self, accepted: _AcceptedRequest) -> Response:
        with timeout_as_504():
            async with accepted.timeout():
                closed_book = await self._confident_closed_book_answer(accepted)
                job, shown, finished = closed_book or await self._complete(
                    accepted, await self._open_book_job(accepted)
                )
        text = AnswerText(shown.passages, self.settings.serve.link_hosts)
        text.add(finished.raw)
        extensions = self._extensions(accepted, job, shown, finished)
        request_id, answer = accepted.request_id, finished.answer
        return JSONResponse(
            responses.completion_body(
                request_id, job.arm, answer, text.whole(cut=finished.finish == "length"), extensions, finished.finish
            )
        )

    async def _confident_closed_book_answer(self, accepted: _AcceptedRequest) -> _Completion | None:
        """The answer without passages, if the request allows it and the generator is confident enough."""
        if accepted.calibration is None:
            return None
        started = time.monotonic()
        completion = await self._complete(accepted, accepted.job)
        accepted.closed_book_seconds = time.monotonic() - started
        is_confident = adaptive.is_confident_enough(completion[2].answer, accepted.calibration)
        self.telemetry.adaptive.labels("closed_book" if is_confident else "retrieved").inc()
        return completion if is_confident else None

    async def _open_book_job(self, accepted: _AcceptedRequest) -> Job:
        job = dataclasses.replace(accepted.job, closed_book=False)
        if not config.retrieves(job.arm):
            return job
        started = time.monotonic()
        found = await retrieve_before(
            accepted.deadline, self.backend, self.telemetry, accepted.query, accepted.top_k, accepted.visible
        )
        accepted.retrieval_seconds = time.monotonic() - started
        return dataclasses.replace(job, passages=found.passages, scores=found.scores, index_version=found.index_version)

    async def _complete(self, accepted: _AcceptedRequest, job: Job) -> _Completion:
        result = await self.backend.complete(job, accepted.seconds_left)
        if isinstance(result, Failed):
            raise result.error()
        return job, *result

    async def _stream_events(self, accepted: _AcceptedRequest) -> AsyncGenerator[bytes, None]:
        """The events of a stream. An error before the first event is raised; a later one is sent as an event."""
        has_begun = False
        with self.load.admit(accepted.timeout_seconds):
            try:
                async with accepted.timeout():
                    closed_book = await self._confident_closed_book_answer(accepted)
                    job = closed_book[0] if closed_book else await self._open_book_job(accepted)
                events = _replay(*closed_book[1:]) if closed_book else self.backend.stream(job, accepted.seconds_left)
                async with contextlib.aclosing(self._chunks(accepted, job, events)) as chunks:
                    async for chunk in _until(accepted.deadline, chunks):
                        has_begun = True
                        yield responses.event(chunk)
                yield responses.DONE
            except Exception as error:  # noqa: BLE001  # any exception must reach the client as an event
                if not has_begun:
                    raise TOO_LATE.error() if isinstance(error, TimeoutError) else error from None
                failure = _client_error(error)
                self.telemetry.refused.labels(failure.code).inc()
                yield responses.event(failure.body())

    async def _chunks(
        self, accepted: _AcceptedRequest, job: Job, events: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        text = AnswerText((), ())
        shown: Shown | None = None
        async with contextlib.aclosing(events):
            async for event in events:
                match event:
                    case Failed():
                        raise event.error()
                    case Shown():
                        shown = event
                        text = AnswerText(shown.passages, self.settings.serve.link_hosts)
                        sources = responses.sources(shown.passages, shown.scores)
                        extensions = {"sources": sources, "index_version": job.index_version}
                        yield accepted.chunk({"role": "assistant", "content": ""}, extensions)
                    case str():
                        piece = text.add(event)
                        if piece:
                            yield accepted.chunk({"content": piece})
                    case Finished():
                        assert shown is not None
                        for chunk in self._last_chunks(accepted, job, shown, event, text):
                            yield chunk
                        return
        raise ApiError(502, "the answer ended early; ask again", code="incomplete_answer")

    def _last_chunks(
        self, accepted: _AcceptedRequest, job: Job, shown: Shown, finished: Finished, text: AnswerText
    ) -> Iterator[dict[str, Any]]:
        rest = text.end(cut=finished.finish == "length")
        if rest:
            yield accepted.chunk({"content": rest})
        extensions = self._extensions(accepted, job, shown, finished)
        sources = extensions.pop("sources")
        annotations = responses.url_citations(text.shown, finished.answer.citations, sources)
        extensions["citations"] = responses.citations_body(finished.answer)
        yield accepted.chunk({"annotations": annotations}, extensions, finished.finish)
        if accepted.include_usage:
            yield accepted.chunk({}, {"choices": [], "usage": responses.usage_body(finished.answer)})

    def _extensions(self, accepted: _AcceptedRequest, job: Job, shown: Shown, finished: Finished) -> dict[str, Any]:
        """The fields of an answer beyond OpenAI's format; also counts the answer in the metrics."""
        telemetry, answer = self.telemetry, finished.answer
        telemetry.generation_seconds.observe(finished.seconds)
        total = time.monotonic() - accepted.started
        telemetry.first_token_seconds.observe(max(0.0, total - finished.seconds + finished.first_token_seconds))
        telemetry.prompt_tokens.inc(answer.prompt_tokens)
        telemetry.completion_tokens.inc(answer.completion_tokens)
        timings = {
            "closed_book_seconds": accepted.closed_book_seconds,
            "retrieval_seconds": accepted.retrieval_seconds,
            "first_token_seconds": finished.first_token_seconds,
            "generation_seconds": finished.seconds,
            "total_seconds": total,
        }
        return {
            "sources": responses.sources(shown.passages, shown.scores),
            "index_version": job.index_version,
            "arm": job.arm,
            "retrieved": config.retrieves(job.arm) and not job.closed_book,
            "abstained": answer.abstained,
            "generator": answer.model,
            "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
        }


async def _replay(shown: Shown, finished: Finished) -> AsyncGenerator[Event, None]:
    """The events of an answer that is already complete."""
    yield shown
    yield finished.raw
    yield finished


async def _until(deadline: float, items: AsyncGenerator[Item, None]) -> AsyncIterator[Item]:
    """The items until the deadline, then TimeoutError."""
    # One `asyncio.timeout` around the loop would fail if several tasks consume the stream.
    while True:
        try:
            yield await asyncio.wait_for(anext(items), max(0.0, deadline - time.monotonic()))
        except StopAsyncIteration:
            return


async def _prepend(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(events):
        yield first
        async for event in events:
            yield event


def _client_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return TOO_LATE.error()
    logger.error("a stream failed: %s", traceback_without_message(error))
    return INTERNAL_ERROR
