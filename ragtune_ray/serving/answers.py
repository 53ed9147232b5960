"""Answers questions in any format: retrieves, generates, and sends the answer as one body or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse

from ragtune_ray import config, schema
from ragtune_ray.answering import rewriting
from ragtune_ray.evaluation import adaptive
from ragtune_ray.generation.openai_client import MAX_STOPS
from ragtune_ray.index import filters
from ragtune_ray.serving import requests, sources
from ragtune_ray.serving.admission import Load, capacity
from ragtune_ray.serving.api_keys import Key, visible_filter
from ragtune_ray.serving.backend import TOO_LATE, Backend, Event, Failed, Finished, Found, Job, Shown
from ragtune_ray.serving.conversations import Conversation
from ragtune_ray.serving.formats import Format, Served
from ragtune_ray.serving.middleware import INTERNAL_ERROR, traceback_without_message
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.sanitizing import AnswerText
from ragtune_ray.serving.telemetry import Telemetry

Item = TypeVar("Item")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """What a client asks, in any format. None means: as the config says."""

    conversation: Conversation
    model: str = ""
    """The arm that answers; empty: the arm of the config."""
    num_answers: int = 1
    """How many answers to draw, with consecutive seeds."""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int | None = None
    """How many passages to retrieve."""
    filter: dict[str, Any] | None = None
    """Conditions on documents' metadata, in addition to those of the key."""
    retrieval: config.RetrievalUse | None = None
    """`auto` retrieves only if the generator is unsure without passages."""
    timeout_seconds: float | None = None


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


def generator_name(settings: config.Config, arm: config.Arm) -> str:
    """The name of the model that answers in an arm, for people; programs should compare fingerprints.

    >>> generator_name(config.Config(), "rag"), generator_name(config.Config(), "rag+ft")
    ('SmolLM2-135M-Instruct', 'SmolLM2-135M-Instruct, fine-tuned')
    """
    name = settings.generator.model.rstrip("/").rsplit("/", 1)[-1]
    return f"{name}, fine-tuned" if config.is_tuned(arm) else name


@contextlib.contextmanager
def timeout_as_504() -> Iterator[None]:
    """Turn a TimeoutError into ApiError 504."""
    try:
        yield
    except TimeoutError:
        raise TOO_LATE.error() from None


async def retrieve_before(
    deadline: float,
    backend: Backend,
    telemetry: Telemetry,
    text: str,
    top_k: int,
    visible: filters.Filter,
    parts: Sequence[str] = (),
) -> Found:
    """Retrieve until the deadline (monotonic time); ApiError 400 if the text is empty, 504 after the deadline."""
    started = time.monotonic()
    if not text.strip():
        raise requests.invalid("query", "must not be empty")
    with timeout_as_504():
        async with asyncio.timeout(deadline - started):
            found = await backend.retrieve(text, top_k, visible, deadline - started, parts)
    telemetry.retrieval_seconds.observe(time.monotonic() - started)
    return found


@dataclass(slots=True)
class _Accepted:
    job: Job
    """The closed-book job, without passages."""
    num_answers: int
    visible: filters.Filter
    top_k: int
    started: float
    timeout_seconds: float
    calibration: adaptive.RetrievalCalibration | None
    """Decides when a closed-book answer is confident enough; None: always retrieve."""
    searches: schema.Searches | None = None
    """What the generator wrote to search for; None: nothing, or not yet."""
    rewriting_seconds: float = 0.0
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


_Completion: TypeAlias = tuple[Job, Shown, Finished]


@dataclass(slots=True)
class Answerer:
    """Answers questions and writes the answers in the format of their request."""

    settings: config.Config
    backend: Backend
    telemetry: Telemetry
    calibration: Callable[[], adaptive.RetrievalCalibration | None]
    """Returns the current calibration of adaptive retrieval; None if `ragtune calibrate` has not run."""
    load: Load = field(init=False)
    """The questions in flight, in all formats."""

    def __post_init__(self) -> None:
        self.load = Load(capacity(self.settings.serve.generator))

    async def respond(self, questions: Sequence[Question], key: Key, written: Format, *, stream: bool) -> Response:
        """The response to the questions of one request, in its format; a stream answers the only one."""
        accepted = [self._accept(question, key) for question in questions]
        if not stream:
            num_answers = self._num_answers(accepted)
            with self.load.admit(accepted[0].timeout_seconds, num_answers):
                answers = await _all([self._answers(each) for each in accepted])
                return JSONResponse(written.whole([answer for each in answers for answer in each]))
        (only,) = accepted
        events = self._stream_events(only, written)
        first = await anext(events)  # an error before the first event still sets the HTTP status
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(_prepend(first, events), media_type="text/event-stream", headers=headers)

    def _num_answers(self, accepted: Sequence[_Accepted]) -> int:
        """How many answers a request asks for; ApiError 400 if an idle endpoint has fewer slots, so that waiting never helps."""
        asked = sum(each.num_answers for each in accepted)
        if asked > self.load.capacity:
            reason = f"{asked} answers at once; this endpoint has room for {self.load.capacity}; ask for fewer"
            raise requests.invalid("n" if len(accepted) == 1 else "prompt", reason, code="over_limit")
        return asked

    def _accept(self, question: Question, key: Key) -> _Accepted:
        started = time.monotonic()
        arms, generator = served_arms(self.settings), self.settings.generator
        if question.model and question.model not in arms:
            reason = f"not served here; use one of: {', '.join(arms)}"
            raise requests.invalid("model", reason, status=404, code="model_not_found")
        longest = self.settings.serve.max_new_tokens
        stop = (*generator.stop, *question.stop)
        if generator.engine == "openai" and len(stop) > MAX_STOPS:
            reason = f"more than {MAX_STOPS - len(generator.stop)}; the server behind this endpoint accepts no more"
            raise requests.invalid("stop", reason)
        job = Job(
            question=question.conversation.question,
            arm=next(arm for arm in arms if question.model in ("", arm)),
            passages=(),
            scores=(),
            index_version="",
            history=question.conversation.history,
            instruction=question.conversation.instruction,
            max_new_tokens=min(question.max_new_tokens or generator.max_new_tokens, longest),
            temperature=generator.temperature if question.temperature is None else question.temperature,
            stop=stop,
            seed=self.settings.seed if question.seed is None else question.seed,
            closed_book=True,
            top_p=question.top_p,
            presence_penalty=question.presence_penalty,
            frequency_penalty=question.frequency_penalty,
        )
        return _Accepted(
            job=job,
            num_answers=question.num_answers,
            visible=visible_filter(self.settings, key, question.filter),
            top_k=requests.top_k_of(question.top_k, self.settings),
            started=started,
            timeout_seconds=requests.timeout_of(question.timeout_seconds, self.settings),
            calibration=self._calibration_for(question),
        )

    def _calibration_for(self, question: Question) -> adaptive.RetrievalCalibration | None:
        if (question.retrieval or self.settings.serve.retrieval) == "always":
            return None
        # The calibration is for the arm of the config; another arm's adapter makes it another generator.
        calibration = self.calibration()
        if calibration is None or question.model not in ("", self.settings.answer.arm):
            if question.retrieval is None:
                return None
            reason = "`auto` needs a calibration, and this arm has none; leave the field out"
            raise requests.invalid("retrieval", reason, status=409, code="not_calibrated")
        return calibration

    async def _answers(self, accepted: _Accepted) -> list[Served]:
        """All answers to one question; the deadline is theirs together."""
        with timeout_as_504():
            async with accepted.timeout():
                closed_book = await self._confident_closed_book_answer(accepted)
                job = closed_book[0] if closed_book else await self._open_book_job(accepted)
                seeds = range(job.seed + (closed_book is not None), job.seed + accepted.num_answers)
                jobs = [dataclasses.replace(job, seed=seed) for seed in seeds]
                others = await _all([self._complete(accepted, each) for each in jobs])
        completions = [closed_book, *others] if closed_book else others
        served = [self._served_whole(accepted, *completion) for completion in completions]
        return [served[0], *(dataclasses.replace(each, prompt_tokens=0) for each in served[1:])]

    def _served_whole(self, accepted: _Accepted, job: Job, shown: Shown, finished: Finished) -> Served:
        text = AnswerText(shown.passages, self.settings.serve.link_hosts)
        text.add(finished.raw)
        return self._served(accepted, job, shown, finished, text.whole(cut=finished.finish == "length"))

    async def _confident_closed_book_answer(self, accepted: _Accepted) -> _Completion | None:
        """The answer without passages, if the request allows it and the generator is confident enough."""
        if accepted.calibration is None:
            return None
        started = time.monotonic()
        completion = await self._complete(accepted, accepted.job)
        accepted.closed_book_seconds = time.monotonic() - started
        is_confident = adaptive.is_confident_enough(completion[2].answer, accepted.calibration)
        self.telemetry.adaptive.labels("closed_book" if is_confident else "retrieved").inc()
        return completion if is_confident else None

    async def _open_book_job(self, accepted: _Accepted) -> Job:
        job = dataclasses.replace(accepted.job, closed_book=False)
        if not config.retrieves(job.arm):
            return job
        text, *parts = await self._texts(accepted)
        started = time.monotonic()
        found = await retrieve_before(
            accepted.deadline, self.backend, self.telemetry, text, accepted.top_k, accepted.visible, parts
        )
        accepted.retrieval_seconds = time.monotonic() - started
        return dataclasses.replace(job, passages=found.passages, scores=found.scores, index_version=found.index_version)

    async def _texts(self, accepted: _Accepted) -> tuple[str, ...]:
        """The texts to search for, as in bulk answering."""
        query, retrieval = accepted.job.query, self.settings.retrieval
        if not rewriting.steps(query, retrieval):
            return rewriting.begun(query, retrieval).texts
        started = time.monotonic()
        with timeout_as_504():
            async with accepted.timeout():
                found = await self.backend.write_searches(accepted.job, accepted.seconds_left)
        accepted.searches, accepted.rewriting_seconds = found, time.monotonic() - started
        self.telemetry.prompt_tokens.inc(found.prompt_tokens)
        self.telemetry.completion_tokens.inc(found.completion_tokens)
        return found.texts

    async def _complete(self, accepted: _Accepted, job: Job) -> _Completion:
        result = await self.backend.complete(job, accepted.seconds_left)
        if isinstance(result, Failed):
            raise result.error()
        return job, *result

    async def _stream_events(self, accepted: _Accepted, written: Format) -> AsyncGenerator[bytes, None]:
        """The events of a stream. An error before the first event is raised; a later one is sent as an event."""
        has_begun = False
        with self.load.admit(accepted.timeout_seconds):
            try:
                async with accepted.timeout():
                    closed_book = await self._confident_closed_book_answer(accepted)
                    job = closed_book[0] if closed_book else await self._open_book_job(accepted)
                events = _replay(*closed_book[1:]) if closed_book else self.backend.stream(job, accepted.seconds_left)
                async with contextlib.aclosing(self._written(accepted, job, events, written)) as pieces:
                    async for piece in _until(accepted.deadline, pieces):
                        has_begun = True
                        yield piece
            except Exception as error:  # noqa: BLE001  # any exception must reach the client as an event
                if not has_begun:
                    raise TOO_LATE.error() if isinstance(error, TimeoutError) else error from None
                failure = _client_error(error)
                self.telemetry.refused.labels(failure.code).inc()
                for piece in written.failed(failure):
                    yield piece

    async def _written(
        self, accepted: _Accepted, job: Job, events: AsyncGenerator[Event, None], written: Format
    ) -> AsyncGenerator[bytes, None]:
        """The events of an answer in the format of its request."""
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
                        known = {"sources": sources.sources(shown.passages, shown.scores)}
                        for each in written.begin(job.arm, known | {"index_version": job.index_version}):
                            yield each
                    case str():
                        for each in _pieces(written, text.add(event)):
                            yield each
                    case Finished():
                        assert shown is not None
                        for each in _pieces(written, text.end(cut=event.finish == "length")):
                            yield each
                        for each in written.end(self._served(accepted, job, shown, event, text.shown)):
                            yield each
                        return
        raise ApiError(502, "the answer ended early; ask again", code="incomplete_answer")

    def _served(self, accepted: _Accepted, job: Job, shown: Shown, finished: Finished, text: str) -> Served:
        """An answer with its sources, citations and facts; also counts it in the metrics."""
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
        written: dict[str, Any] = {}
        if accepted.searches:
            timings["rewriting_seconds"] = accepted.rewriting_seconds
            written["searched"] = _searched_body(accepted.searches)
        found = sources.sources(shown.passages, shown.scores)
        return Served(
            arm=job.arm,
            text=text,
            finish=finished.finish,
            annotations=sources.url_citations(text, answer.citations, found),
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            extensions={
                "citations": sources.citations_body(answer),
                "sources": found,
                "index_version": job.index_version,
                "arm": job.arm,
                "retrieved": config.retrieves(job.arm) and not job.closed_book,
                "abstained": answer.abstained,
                "generator": answer.model,
                "generator_name": generator_name(self.settings, job.arm),
                "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
                **written,
            },
        )


def _searched_body(searches: schema.Searches) -> dict[str, Any]:
    """What the generator wrote to search for, without the details of its errors."""
    return {
        "texts": list(searches.texts),
        "fallbacks": [rewriting.kind_of(reason) for reason in searches.fallbacks],
        "prompt_tokens": searches.prompt_tokens,
        "completion_tokens": searches.completion_tokens,
    }


def _pieces(written: Format, text: str) -> Iterator[bytes]:
    if text:
        yield from written.piece(text)


async def _all(calls: Sequence[Coroutine[Any, Any, Item]]) -> list[Item]:
    """The results of calls that run at once; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _replay(shown: Shown, finished: Finished) -> AsyncGenerator[Event, None]:
    """The events of an answer that is already complete."""
    yield shown
    yield finished.raw
    yield finished


async def _until(deadline: float, items: AsyncGenerator[Item, None]) -> AsyncIterator[Item]:
    """The items until the deadline, then TimeoutError."""
    # One `asyncio.timeout` around the loop would fail if several tasks consume the stream. Until Python 3.12, `wait_for` forgets
    # that it was cancelled if an item is ready at that moment, and the answer to a client that has left would go on.
    while True:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                item = await anext(items)
        except StopAsyncIteration:
            return
        yield item


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
