"""Ray Serve: the copy that generates.

In: jobs of `backend`. Out: answers as they are generated. It follows the models that are published; what a client may not see
of a failure stays in the log of the copy, without the question. This module knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ragtune_ray import config, schema
from ragtune_ray.answering import prompts
from ragtune_ray.answering.pipeline import Task, finished_answer, likeliest, parts_of, task_prompt
from ragtune_ray.cluster import session
from ragtune_ray.cluster.serving.replicas import TOO_LATE, TRIAL_QUESTION, Following, prepare_process, refusal_of
from ragtune_ray.generation.interface import GeneratorError, Prompt
from ragtune_ray.generation.request import Overloaded, Request, RequestFailed
from ragtune_ray.models import arms as arms_module
from ragtune_ray.models import hardware, weights
from ragtune_ray.serving.admission import places
from ragtune_ray.serving.backend import Failed, Finished, Job, Shown
from ragtune_ray.serving.following import Follower
from ragtune_ray.storage import checksums

__all__ = ["GeneratorReplica"]

TRIAL_SECONDS = 60.0

_Submitted: TypeAlias = tuple[Task, Prompt, Request]
"""What is read, its prompt, and the request on its way."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A generator that serves."""

    tokenizer: Any
    engine: Any
    fingerprint: str
    adapters: dict[str, str]
    """By arm, the fingerprint of model and adapter together."""


class GeneratorReplica(Following):
    """The language model in one process; requests join and leave its running batch."""

    def __init__(self, settings: config.Config) -> None:
        limits = settings.serve.generator
        prepare_process(limits.num_threads or int(session.cores_of_this_machine() / limits.max_replicas))
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
                submitted = await self._submitted(loaded, job, seconds)
            except (prompts.PromptError, Overloaded, GeneratorError, RequestFailed) as error:
                yield _failed(error)
                return
            try:
                passages = tuple(passage for _, prompt, _ in submitted for passage in prompt.passages)
                yield Shown(passages, job.scores[: len(passages)], sum(prompt.num_tokens for _, prompt, _ in submitted))
                first_token_seconds = 0.0
                for _, _, request in submitted:
                    async with contextlib.aclosing(request.apieces()) as pieces:  # type: ignore[type-var]
                        async for piece in pieces:
                            first_token_seconds = first_token_seconds or time.monotonic() - started
                            if len(submitted) == 1:
                                yield piece
                fingerprint = loaded.adapters.get(job.arm, loaded.fingerprint)
                completions = [request.completion() for _, _, request in submitted]
                taught = self._settings.training.abstention
                place, answer = likeliest(
                    [
                        (
                            finished_answer(task, prompt, completion, fingerprint, taught),
                            completion.log_probability or 0.0,
                        )
                        for (task, prompt, _), completion in zip(submitted, completions, strict=True)
                    ],
                    self._settings.answer.rank_weight,
                )
                chosen, seconds = completions[place], time.monotonic() - started
                text = chosen.text
                if len(submitted) > 1:
                    # Which answer is the likeliest is not known before, and its marks number one passage alone.
                    text = answer.answer
                    yield text
                yield Finished(answer, text, chosen.finish, first_token_seconds or seconds, seconds)
            except RequestFailed as error:
                yield _failed(error)
            finally:
                for _, _, request in submitted:
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
                "refused": refusal_of(self._follower),
                "running": stats.running,
                "waiting": stats.waiting,
            }

    async def _submitted(self, loaded: _Loaded, job: Job, seconds: float) -> list[_Submitted]:
        submit = partial(self._submit, loaded, job, time.monotonic() + seconds)
        future: Future[list[_Submitted]] = self._work.submit(submit)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:  # the client has left meanwhile; what the thread begins must not run for nobody
            if not future.cancel():
                future.add_done_callback(_cancel)
            raise

    def _submit(self, loaded: _Loaded, job: Job, deadline: float) -> list[_Submitted]:
        """One request, or with answer.reading=apart one per passage; all of them or none."""
        query = schema.Query("ask", job.question, None, (), (), "all")
        task = Task(query, job.passages, job.scores, job.index_version, "", job.history, job.instruction)
        submitted: list[_Submitted] = []
        try:
            parts = parts_of(task, self._settings_of(job))
            submitted.extend(self._submit_part(loaded, job, part, deadline) for part in parts)
        except BaseException:
            for _, _, request in submitted:
                request.cancel()
            raise
        return submitted

    def _submit_part(self, loaded: _Loaded, job: Job, task: Task, deadline: float) -> _Submitted:
        if (
            time.monotonic() >= deadline
        ):  # others' long prompts came first; this one must not hold up those behind it too
            raise RequestFailed("deadline", "the deadline passed before the prompt was built")
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
            self._of_job[job.arm, job.closed_book] = self._settings.with_values(
                {"answer.arm": job.arm, "answer.closed_book": job.closed_book}
            )
        return self._of_job[job.arm, job.closed_book]

    def _meant(self) -> list[str]:
        """The model, then the tuned model of each arm whose adapter is served beside it, as they are at this moment."""
        settings = self._settings
        arms = () if config.is_tuned(settings.answer.arm) else settings.serve.adapter_arms
        return [
            arms_module.current_generator(settings),
            *(arms_module.tuned_model(settings.workspace, arm) for arm in arms),
        ]

    def _load(self, name: str, _: _Loaded | None) -> _Loaded:
        """Load a model and its adapters beside those that serve, and try it."""
        from ragtune_ray.generation.generator import open_generator
        from ragtune_ray.generation.threaded import PassThroughGenerator

        settings = arms_module.with_tuned_models(self._settings)
        if settings.generator.engine == "openai":
            generator, fingerprint = open_generator(settings)
            num_threads = settings.serve.generator.max_ongoing_requests
            return _Loaded(generator, PassThroughGenerator(generator, max_running=num_threads), fingerprint, {})
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
        ((_, _, request),) = self._submit(loaded, job, time.monotonic() + TRIAL_SECONDS)
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
    from ragtune_ray.generation.continuous import ContinuousGenerator
    from ragtune_ray.generation.generator import TransformersGenerator, open_generator
    from ragtune_ray.training.trainable import ADAPTER

    adapters = {arm: weights.weights_of(weights.resolve(directory)) / ADAPTER for arm, directory in tuned.items()}
    for arm, directory in adapters.items():
        if not directory.is_dir():
            raise weights.ModelError(
                f"serve.adapter_arms: the model of the arm {arm} was tuned whole, so it is no adapter; serve it with "
                f"answer.arm={arm}, or train it with training.lora_rank=16"
            )
    generator, fingerprint = open_generator(settings, name)
    assert isinstance(generator, TransformersGenerator)
    limits = settings.serve.generator
    num_prompts = settings.serve.max_top_k if settings.answer.reading == "apart" else 1
    max_waiting = places(limits) * num_prompts
    engine = ContinuousGenerator(
        generator, max_running=limits.max_ongoing_requests, max_waiting=max_waiting, adapters=adapters
    )
    marks = {
        arm: checksums.digest([fingerprint, weights.fingerprint(directory)]) for arm, directory in adapters.items()
    }
    return _Loaded(generator, engine, fingerprint, marks)


def _failed(error: Exception) -> Failed:
    """What a client may know of a failure; its message may hold the question."""
    match error:
        case prompts.PromptError():
            return Failed(400, "the question is too long for the prompt's budget", "question_too_long")
        case Overloaded():
            return Failed(429, "more requests wait than may; try again later", "overloaded", 1.0)
        case RequestFailed(reason="deadline"):
            return TOO_LATE
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


def _cancel(future: Future[list[_Submitted]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for _, _, request in future.result():
            request.cancel()
