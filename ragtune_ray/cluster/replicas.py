"""Ray Serve: the two copies behind the gateway, one that retrieves and one that generates.

In: queries and jobs of `backend`. Out: what was found, and answers as they are generated. Each copy follows what is published:
an index version, a tuned model. What a client may not see of a failure stays in the log of the copy, without the question. This
module knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ray import serve

from ragtune_ray import (
    config,
    hardware,
    models,
    pairs,
    prompts,
    retention,
    schema,
    selection,
    snapshot,
    storage,
    versions,
)
from ragtune_ray.answering import Task, finished_answer, task_prompt
from ragtune_ray.backend import Embedded, Failed, Finished, Found, Job, Shown
from ragtune_ray.cluster import session
from ragtune_ray.cluster.generating import row_by_row_if_needed
from ragtune_ray.completion import GeneratorError
from ragtune_ray.following import Follower
from ragtune_ray.request import Overloaded, Request, RequestFailed

__all__ = ["GeneratorReplica", "RetrieverReplica"]

BATCH_QUERIES = 32
TRIAL_QUESTION = "Is this a trial?"
TRIAL_SECONDS = 60.0

Wanted: TypeAlias = tuple[str, int, selection.Filter, float]
"""A query: text, top_k, filter, and the time (monotonic) after which nobody waits for it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _OpenVersion:
    """An index version that cannot be removed from the workspace while it is held here."""

    index: snapshot.Index
    hold: contextlib.ExitStack


class _Following:
    """A copy that follows what is published."""

    _follower: Follower[Any]

    def check_health(self) -> None:
        """Whether the copy can go on; Serve replaces it where this raises."""
        self._follower.check()

    def __del__(self) -> None:
        if hasattr(self, "_follower"):
            self._follower.stop()


class RetrieverReplica(_Following):
    """Encoder and index in one process. Queries that come together are searched together."""

    def __init__(self, settings: config.Config) -> None:
        limits = settings.serve.retriever
        _prepare(limits.num_threads or round(limits.num_cpus))
        from ragtune_ray.encoder import load_encoder
        from ragtune_ray.retriever import load_reranker

        self._settings = settings
        self._encoder = None if settings.retrieval.mode == "lexical" else load_encoder(settings.encoder)
        self._reranker = load_reranker(settings.retrieval)
        self._work = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        workspace = settings.workspace
        self._follower = Follower(
            "index version",
            latest=lambda: versions.current_version(workspace),
            load=self._open,
            release=lambda opened: opened.hold.close(),
            fallbacks=lambda: versions.list_versions(workspace)[::-1],
        )
        self._follower.follow(settings.serve.poll_seconds)

    async def retrieve(self, text: str, top_k: int, chosen: selection.Filter, seconds: float) -> Found | Failed:
        """The hits of one query, all of one version."""
        return await self._retrieve_batch((text, top_k, chosen, time.monotonic() + seconds))  # type: ignore[no-any-return]

    async def embed(self, texts: Sequence[str], input_type: str) -> Embedded | Failed:
        """Vectors of texts."""
        if self._encoder is None:
            return Failed(409, "this endpoint retrieves without an encoder (retrieval.mode is lexical)", "no_encoder")
        encode = self._encoder.encode_queries if input_type == "query" else self._encoder.encode_passages
        vectors = await asyncio.get_running_loop().run_in_executor(self._work, encode, list(texts))
        num_tokens = sum(len(text.split()) for text in texts)
        return Embedded(vectors, self._settings.encoder.model.rstrip("/").rsplit("/", 1)[-1], num_tokens)

    async def refresh(self) -> str:
        """Look for a new version now, even one that was refused; the version that serves then."""
        await asyncio.to_thread(self._follower.refresh, again=True)
        return self._follower.name

    async def status(self) -> dict[str, Any]:
        """Which version serves, and which was refused."""
        return {"index_version": self._follower.name, "refused": _refusal(self._follower)}

    @serve.batch(max_batch_size=BATCH_QUERIES, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _retrieve_batch(self, wanted: list[Wanted]) -> list[Found | Failed]:
        return await asyncio.get_running_loop().run_in_executor(self._work, self._retrieve_all, wanted)

    def _retrieve_all(self, wanted: list[Wanted]) -> list[Found | Failed]:
        """Queries that may see the same are searched together; one lease, so all of a response is of one version."""
        results: list[Found | Failed] = [_TOO_LATE] * len(wanted)
        groups: dict[tuple[int, selection.Filter], list[int]] = {}
        now = time.monotonic()
        for place, (_, top_k, chosen, deadline) in enumerate(wanted):
            if deadline > now:
                groups.setdefault((top_k, chosen), []).append(place)
        with self._follower.lease() as lease:
            for (top_k, chosen), places in groups.items():
                started = time.monotonic()
                found = self._search(lease.held.index, [wanted[place][0] for place in places], top_k, chosen)
                seconds = time.monotonic() - started
                for place, row in zip(places, found, strict=True):
                    results[place] = (
                        Failed(422, "this query cannot be encoded", "query_not_encodable")
                        if isinstance(row, str)
                        else Found(lease.name, tuple(row[0]), tuple(row[1]), seconds)
                    )
        return results

    def _search(
        self, opened: snapshot.Index, texts: list[str], top_k: int, chosen: selection.Filter
    ) -> list[tuple[list[schema.Passage], list[float]] | str]:
        from ragtune_ray.retriever import Retriever

        retriever = Retriever(opened, self._encoder, self._settings.retrieval, self._reranker, chosen)
        return row_by_row_if_needed(texts, lambda some: retriever.retrieve_passages(some, top_k))

    def _open(self, name: str, before: _OpenVersion | None) -> _OpenVersion:
        """Open a version beside the one that serves, and try it."""
        hold = contextlib.ExitStack()
        try:
            hold.enter_context(retention.held(self._settings.workspace, name))
            opened = snapshot.open_index(self._settings.workspace, name, reuse=before.index if before else None)
            self._try(opened)
        except BaseException:
            hold.close()
            raise
        return _OpenVersion(opened, hold)

    def _try(self, opened: snapshot.Index) -> None:
        (found,) = self._search(opened, [TRIAL_QUESTION], 1, selection.Filter())
        if isinstance(found, str) or (opened.num_passages and self._encoder is not None and not found[0]):
            raise storage.ArtifactError(f"index version {opened.version}: a trial query finds nothing in it")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A generator that serves."""

    tokenizer: Any
    engine: Any
    fingerprint: str
    adapters: dict[str, str]
    """By arm, the fingerprint of model and adapter together."""


class GeneratorReplica(_Following):
    """The language model in one process; requests join and leave its running batch."""

    def __init__(self, settings: config.Config) -> None:
        limits = settings.serve.generator
        _prepare(limits.num_threads or int(session.cores_of_this_machine() / limits.max_replicas))
        self._settings = settings
        self._of_job: dict[tuple[config.Arm, bool], config.Config] = {}
        # A tokenizer must not be used by two threads at once, and a long prompt must not hold up the others' pieces.
        self._work = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._follower = Follower(
            "model", latest=lambda: json.dumps(self._meant()), load=self._load, release=self._release
        )
        self._follower.follow(settings.serve.poll_seconds)

    async def stream(self, job: Job, seconds: float) -> AsyncGenerator[Shown | str | Finished | Failed, None]:
        """`Shown`, pieces and `Finished`; or `Failed`."""
        started = time.monotonic()
        with self._follower.lease() as lease:
            loaded = lease.held
            try:
                task, prompt, request = await self._submitted(loaded, job, seconds)
            except (prompts.PromptError, Overloaded, GeneratorError, RequestFailed) as error:
                yield _failed(error)
                return
            try:
                yield Shown(prompt.passages, job.scores[: len(prompt.passages)], prompt.num_tokens)
                first_token_seconds = 0.0
                async with contextlib.aclosing(request.apieces()) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        first_token_seconds = first_token_seconds or time.monotonic() - started
                        yield piece
                completion = request.completion()
                fingerprint = loaded.adapters.get(job.arm, loaded.fingerprint)
                answer = finished_answer(task, prompt, completion, fingerprint)
                seconds = time.monotonic() - started
                yield Finished(answer, completion.text, completion.finish, first_token_seconds or seconds, seconds)
            except RequestFailed as error:
                yield _failed(error)
            finally:
                request.cancel()

    async def complete(self, job: Job, seconds: float) -> tuple[Shown, Finished] | Failed:
        """The same, at once."""
        shown: Shown | None = None
        async with contextlib.aclosing(self.stream(job, seconds)) as events:
            async for event in events:
                match event:
                    case Shown():
                        shown = event
                    case Finished():
                        assert shown is not None
                        return shown, event
                    case Failed():
                        return event
        raise AssertionError("a stream ends with Finished or Failed")

    async def refresh(self) -> str:
        """Look for a new model now; the name of the one that serves then."""
        await asyncio.to_thread(self._follower.refresh, again=True)
        return self._follower.name

    async def status(self) -> dict[str, Any]:
        """Which model serves, which was refused, and how many requests there are."""
        with self._follower.lease() as lease:
            stats = lease.held.engine.stats()
            return {
                "model": lease.held.fingerprint,
                "adapters": dict(lease.held.adapters),
                "refused": _refusal(self._follower),
                "running": stats.running,
                "waiting": stats.waiting,
            }

    async def _submitted(self, loaded: _Loaded, job: Job, seconds: float) -> tuple[Task, prompts.Prompt, Request]:
        submit = partial(self._submit, loaded, job, time.monotonic() + seconds)
        future: Future[tuple[Task, prompts.Prompt, Request]] = self._work.submit(submit)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:  # the client has left meanwhile; what the thread begins must not run for nobody
            future.add_done_callback(_cancel)
            raise

    def _submit(self, loaded: _Loaded, job: Job, deadline: float) -> tuple[Task, prompts.Prompt, Request]:
        query = schema.Query("ask", job.question, None, (), (), "all")
        task = Task(query, job.passages, job.scores, job.index_version, "", job.history, job.instruction)
        prompt = task_prompt(task, loaded.tokenizer, self._settings_of(job))
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise RequestFailed("deadline", "the deadline passed before the prompt was built")
        request = loaded.engine.submit(
            prompt,
            max_new_tokens=job.max_new_tokens,
            temperature=job.temperature,
            stop=job.stop,
            seed=job.seed,
            deadline_seconds=seconds,
            adapter=job.arm if job.arm in loaded.adapters else "",
        )
        return task, prompt, request

    def _settings_of(self, job: Job) -> config.Config:
        if (job.arm, job.closed_book) not in self._of_job:
            chosen = (f"answer.arm={job.arm}", f"answer.closed_book={json.dumps(job.closed_book)}")
            self._of_job[job.arm, job.closed_book] = self._settings.using(*chosen)
        return self._of_job[job.arm, job.closed_book]

    def _meant(self) -> list[str]:
        """The model, then the tuned model of each arm whose adapter is served beside it, as they are at this moment."""
        settings = self._settings
        arms = () if config.is_tuned(settings.answer.arm) else settings.serve.adapter_arms
        return [models.generator_meant(settings), *(models.tuned_model(settings.workspace, arm) for arm in arms)]

    def _load(self, name: str, _: _Loaded | None) -> _Loaded:
        """Load a model and its adapters beside those that serve, and try it."""
        from ragtune_ray.generator import load_generator
        from ragtune_ray.passthrough import PassThroughGenerator

        settings = pairs.with_tuned_models(self._settings)
        if settings.generator.engine == "openai":
            generator = load_generator(settings.generator, None)
            num_threads = settings.serve.generator.max_ongoing_requests
            return _Loaded(
                generator, PassThroughGenerator(generator, max_running=num_threads), settings.generator.model, {}
            )
        model, *tuned = json.loads(name)
        loaded = _loaded(settings, model, dict(zip(settings.serve.adapter_arms, tuned, strict=False)))
        try:
            self._try(loaded)
        except BaseException:
            loaded.engine.close(0)
            raise
        return loaded

    def _try(self, loaded: _Loaded) -> None:
        job = Job(TRIAL_QUESTION, self._settings.answer.arm, (), (), "", (), "", 2, 0.0, (), 0)
        _, _, request = self._submit(loaded, job, time.monotonic() + TRIAL_SECONDS)
        request.completion()

    def _release(self, loaded: _Loaded) -> None:
        """In a thread: the last lease may end in the event loop, and an engine takes a moment to stop."""

        def close(engine: Any) -> None:
            engine.close(self._settings.serve.grace_seconds)
            # Weights and threads may refer to each other in circles; by then nobody else refers to them.
            collecting = threading.Timer(1.0, _collect)
            collecting.daemon = True
            collecting.start()

        threading.Thread(target=close, args=(loaded.engine,), name="release", daemon=True).start()

    def check_health(self) -> None:
        """Also whether its thread lives."""
        super().check_health()
        with self._follower.lease() as lease:
            if not lease.held.engine.is_alive():
                raise RuntimeError("the generation thread has died; the log says why")


def _loaded(settings: config.Config, name: str, tuned: dict[str, str]) -> _Loaded:
    from ragtune_ray.continuous import ContinuousGenerator
    from ragtune_ray.generator import TransformersGenerator, load_generator
    from ragtune_ray.trainable import ADAPTER

    model = models.resolve(name)
    adapters = {arm: models.weights_of(models.resolve(directory)) / ADAPTER for arm, directory in tuned.items()}
    for arm, directory in adapters.items():
        if not directory.is_dir():
            raise models.ModelError(
                f"serve.adapter_arms: the model of the arm {arm} was tuned whole, so it is no adapter; serve it with "
                f"answer.arm={arm}, or train it with training.lora_rank=16"
            )
    generator = load_generator(settings.generator, model.directory)
    assert isinstance(generator, TransformersGenerator)
    most = settings.serve.generator.max_ongoing_requests
    engine = ContinuousGenerator(generator, max_running=most, max_waiting=most, adapters=adapters)
    marks = {
        arm: storage.digest([model.fingerprint, models.fingerprint(directory)]) for arm, directory in adapters.items()
    }
    return _Loaded(generator, engine, model.fingerprint, marks)


_TOO_LATE = Failed(504, "the answer was not ready in time", "deadline_exceeded")


def _failed(error: Exception) -> Failed:
    """What a client may know of a failure; its message may hold the question."""
    match error:
        case prompts.PromptError():
            return Failed(400, "the question is too long for the prompt's budget", "question_too_long")
        case Overloaded():
            return Failed(429, "more requests wait than may; try again later", "overloaded", 1.0)
        case RequestFailed(reason="deadline"):
            return _TOO_LATE
        case RequestFailed(reason="cancelled"):
            return Failed(499, "the request was cancelled", "cancelled")
        case RequestFailed():
            logger.error("a generation failed: %s", error)
            return Failed(502, "the generator failed; the log says why", "generation_failed")
        case _:
            return Failed(400, "this cannot be generated with this model", "not_generable")


def _collect() -> None:
    gc.collect()
    hardware.return_freed_memory()


def _cancel(future: Future[tuple[Task, prompts.Prompt, Request]]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result()[2].cancel()


def _refusal(follower: Follower[Any]) -> dict[str, str] | None:
    refused = follower.refused
    return {"version": refused.name.strip('"[]').rstrip("/").rsplit("/", 1)[-1]} if refused else None


def _prepare(num_threads: int) -> None:
    session.log_with_serve()
    session.use_threads(max(1, num_threads))
