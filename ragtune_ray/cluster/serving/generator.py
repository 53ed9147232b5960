"""The generator replica of Ray Serve: generates answers with the published model and hot-swaps to newer ones.

Details of a failure are logged, without the question; the client receives a general message.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ragtune_ray import config, schema
from ragtune_ray.answering import prompts, rewriting
from ragtune_ray.answering.pipeline import Task, finished_answer, likeliest, parts_of, task_prompt
from ragtune_ray.cluster import session
from ragtune_ray.cluster.serving.replicas import TRIAL_QUESTION, SwappingReplica, prepare_process
from ragtune_ray.generation.interface import Completion, GeneratorError, Prompt
from ragtune_ray.generation.request import Overloaded, Request, RequestFailed
from ragtune_ray.models import arms as arms_module
from ragtune_ray.models import hardware, weights
from ragtune_ray.serving.admission import slots_per_replica
from ragtune_ray.serving.backend import TOO_LATE, Event, Failed, Finished, Job, Shown
from ragtune_ray.serving.hot_swap import HotSwap
from ragtune_ray.storage import checksums

TRIAL_SECONDS = 60.0

logger = logging.getLogger(__name__)


class _Reading(NamedTuple):
    """One prompt of a job and its request to the engine; with `answer.reading=apart`, a job has one per passage."""

    task: Task
    prompt: Prompt
    request: Request


@dataclass(frozen=True, slots=True)
class _Loaded:
    tokenizer: Any
    engine: Any
    fingerprint: str
    adapters: dict[str, str]
    """Arm -> fingerprint of model and adapter together."""


class GeneratorReplica(SwappingReplica):
    """The language model in one process; requests join and leave its batch while it runs."""

    def __init__(self, settings: config.Config, models: Mapping[str, str] | None = None) -> None:
        limits = settings.serve.generator
        prepare_process(limits.num_threads or int(session.cores_of_this_machine() / limits.max_replicas), models)
        self._settings = settings
        self._settings_by_job: dict[tuple[config.Arm, bool], config.Config] = {}
        # A tokenizer must not be used by two threads at once, and a long prompt must not block the event loop.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._current = HotSwap(
            "model", latest=lambda: json.dumps(self._published()), load=self._load, release=self._release
        )
        self._current.poll(settings.serve.poll_seconds)

    async def stream(self, job: Job, seconds: float) -> AsyncGenerator[Event, None]:
        """`Shown`, pieces of text, then `Finished`; or `Failed` at any point."""
        started = time.monotonic()
        with self._current.lease() as lease:
            loaded = lease.resource
            try:
                readings = await self._submit(loaded, job, seconds)
            except (prompts.PromptError, Overloaded, GeneratorError, RequestFailed) as error:
                yield _failed(error)
                return
            try:
                passages = tuple(passage for reading in readings for passage in reading.prompt.passages)
                prompt_tokens = sum(reading.prompt.num_tokens for reading in readings)
                yield Shown(passages, job.scores[: len(passages)], prompt_tokens)
                first_token_seconds = 0.0
                for reading in readings:
                    async with contextlib.aclosing(reading.request.apieces()) as pieces:  # type: ignore[type-var]
                        async for piece in pieces:
                            first_token_seconds = first_token_seconds or time.monotonic() - started
                            if len(readings) == 1:
                                yield piece
                answer, completion = self._likeliest(readings, loaded.adapters.get(job.arm, loaded.fingerprint))
                seconds = time.monotonic() - started
                text = completion.text
                if len(readings) > 1:
                    text = answer.answer  # without citation marks, which would refer to a prompt of one passage
                    yield text
                yield Finished(answer, text, completion.finish, first_token_seconds or seconds, seconds)
            except RequestFailed as error:
                yield _failed(error)
            finally:
                _cancel(readings)

    def _likeliest(self, readings: list[_Reading], fingerprint: str) -> tuple[schema.Answer, Completion]:
        completions = [reading.request.completion() for reading in readings]
        abstention = self._settings.training.abstention
        answers = [
            (
                finished_answer(reading.task, reading.prompt, completion, fingerprint, abstention),
                completion.log_probability or 0.0,
            )
            for reading, completion in zip(readings, completions, strict=True)
        ]
        index, answer = likeliest(answers, self._settings.answer.rank_weight)
        return answer, completions[index]

    async def complete(self, job: Job, seconds: float) -> tuple[Shown, Finished] | Failed:
        """The first and last event of `stream`."""
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

    async def write_searches(self, job: Job, seconds: float) -> schema.Searches:
        """The texts with which to search for the question of a job; where the generator fails, the question itself."""
        deadline, query, retrieval = time.monotonic() + seconds, job.query, self._settings.retrieval
        found = rewriting.begun(query, retrieval)
        with self._current.lease() as lease:
            for step in rewriting.steps(query, retrieval):
                written = await self._write(lease.resource, step, job, found, deadline)
                found = rewriting.after(step, query, found, written)
        return found

    async def _write(
        self, loaded: _Loaded, step: rewriting.Step, job: Job, found: schema.Searches, deadline: float
    ) -> Completion | None:
        """The generator's reply to a step; None if its prompt is too long."""

        def submit() -> list[_Reading]:
            max_tokens = self._settings.prompt.max_tokens
            prompt = rewriting.step_prompt(step, job.query, found, loaded.tokenizer, max_tokens)
            if prompt is None:
                return []
            options = rewriting.step_options(step, self._settings)
            left, adapter = _seconds_left(deadline), job.arm if job.arm in loaded.adapters else ""
            request = loaded.engine.submit(prompt, **options, deadline_seconds=left, adapter=adapter)
            return [_Reading(Task(job.query), prompt, request)]

        readings: list[_Reading] = []
        try:
            readings = await self._in_tokenizing_thread(submit)
            for reading in readings:
                async with contextlib.aclosing(reading.request.apieces()) as pieces:  # type: ignore[type-var]
                    async for _ in pieces:
                        pass
                return reading.request.completion()
        except (Overloaded, GeneratorError, RequestFailed) as error:
            return Completion("", 0, 0, 0.0, "stop", str(error))
        finally:
            _cancel(readings)
        return None

    async def status(self) -> dict[str, Any]:
        """The model in use, the refused model if any, and the number of requests."""
        with self._current.lease() as lease:
            stats = lease.resource.engine.stats()
            return {
                "model": lease.resource.fingerprint,
                "adapters": dict(lease.resource.adapters),
                "refused": self._refused(),
                "running": stats.running,
                "waiting": stats.waiting,
            }

    async def _submit(self, loaded: _Loaded, job: Job, seconds: float) -> list[_Reading]:
        return await self._in_tokenizing_thread(partial(self._submit_all, loaded, job, time.monotonic() + seconds))

    async def _in_tokenizing_thread(self, submit: Callable[[], list[_Reading]]) -> list[_Reading]:
        future: Future[list[_Reading]] = self._tokenizing.submit(submit)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:  # the client has disconnected; cancel what the thread may still submit
            if not future.cancel():
                future.add_done_callback(_cancel_result)
            raise

    def _submit_all(self, loaded: _Loaded, job: Job, deadline: float) -> list[_Reading]:
        """Submit all readings of a job, or none."""
        task = Task(job.query, job.passages, job.scores, job.index_version)
        readings: list[_Reading] = []
        try:
            parts = parts_of(task, self._settings_of(job))
            readings.extend(self._submit_one(loaded, job, part, deadline) for part in parts)
        except BaseException:
            _cancel(readings)
            raise
        return readings

    def _submit_one(self, loaded: _Loaded, job: Job, task: Task, deadline: float) -> _Reading:
        _seconds_left(deadline)  # check before building the prompt, so that a late job does not delay the next ones
        prompt = task_prompt(task, loaded.tokenizer, self._settings_of(job))
        request = loaded.engine.submit(
            prompt,
            max_new_tokens=job.max_new_tokens,
            temperature=job.temperature,
            stop=job.stop,
            seed=job.seed,
            top_p=job.top_p,
            presence_penalty=job.presence_penalty,
            frequency_penalty=job.frequency_penalty,
            deadline_seconds=_seconds_left(deadline),
            adapter=job.arm if job.arm in loaded.adapters else "",
        )
        return _Reading(task, prompt, request)

    def _settings_of(self, job: Job) -> config.Config:
        if (job.arm, job.closed_book) not in self._settings_by_job:
            changed = {"answer.arm": job.arm, "answer.closed_book": job.closed_book}
            self._settings_by_job[job.arm, job.closed_book] = self._settings.with_values(changed)
        return self._settings_by_job[job.arm, job.closed_book]

    def _published(self) -> list[str]:
        """The published model, then the tuned model of each arm in `serve.adapter_arms`."""
        settings = self._settings
        arms = () if config.is_tuned(settings.answer.arm) else settings.serve.adapter_arms
        return [
            arms_module.current_generator(settings),
            *(arms_module.tuned_model(settings.workspace, arm) for arm in arms),
        ]

    def _load(self, name: str, _: _Loaded | None) -> _Loaded:
        """Load and test a model and its adapters; the previous ones are still in use."""
        from ragtune_ray.generation.generator import open_generator
        from ragtune_ray.generation.threaded import PassThroughGenerator

        settings = arms_module.with_tuned_models(self._settings)
        if settings.generator.engine == "openai":
            generator, fingerprint = open_generator(settings)
            num_threads = settings.serve.generator.max_ongoing_requests
            engine = PassThroughGenerator(generator, max_running=num_threads)
            return _Loaded(generator, engine, fingerprint, {})
        model, *tuned = json.loads(name)
        loaded = _load_here(settings, model, dict(zip(settings.serve.adapter_arms, tuned, strict=False)))
        try:
            self._test(loaded)
        except BaseException:
            loaded.engine.close(0)
            raise
        return loaded

    def _test(self, loaded: _Loaded) -> None:
        job = Job(TRIAL_QUESTION, self._settings.answer.arm, (), (), "", (), "", 2, 0.0, (), 0)
        (reading,) = self._submit_all(loaded, job, time.monotonic() + TRIAL_SECONDS)
        reading.request.completion()

    def _release(self, loaded: _Loaded) -> None:
        """Close the engine in a thread: the last lease may end in the event loop, and closing takes time."""

        def close(engine: Any) -> None:
            engine.close(self._settings.serve.grace_seconds)
            # Weights and threads may be in reference cycles, which only the garbage collector frees.
            collecting = threading.Timer(1.0, _collect)
            collecting.daemon = True
            collecting.start()

        threading.Thread(target=close, args=(loaded.engine,), name="release", daemon=True).start()

    def check_health(self) -> None:
        """Raise if polling or the generation thread has died."""
        super().check_health()
        with self._current.lease() as lease:
            if not lease.resource.engine.is_alive():
                raise RuntimeError("the generation thread has died; see the log of this replica")


def _load_here(settings: config.Config, name: str, tuned: dict[str, str]) -> _Loaded:
    """A model that this process computes, or vLLM's processes for it."""
    from ragtune_ray.training.trainable import ADAPTER

    adapters = {arm: weights.weights_of(weights.resolve(directory)) / ADAPTER for arm, directory in tuned.items()}
    for arm, directory in adapters.items():
        if not directory.is_dir():
            raise weights.ModelError(
                f"serve.adapter_arms: the model of the arm {arm} has no adapter, because all its weights were tuned; serve "
                f"it with answer.arm={arm}, or train it with training.lora_rank=16"
            )
    limits, found = settings.serve.generator, weights.resolve(name)
    num_prompts = settings.serve.max_top_k if settings.answer.reading == "apart" else 1
    options: dict[str, Any] = {
        "max_running": limits.max_ongoing_requests,
        "max_waiting": slots_per_replica(limits) * num_prompts,
        "adapters": adapters,
    }
    generator, engine = _engine(settings.generator, found.directory, options)
    fingerprints = {
        arm: checksums.digest([found.fingerprint, weights.fingerprint(directory)])
        for arm, directory in adapters.items()
    }
    return _Loaded(generator, engine, found.fingerprint, fingerprints)


def _engine(settings: config.Generator, directory: Path | None, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The tokenizer and the engine of a model."""
    assert directory is not None, "it was resolved"
    if settings.engine == "vllm":
        from ragtune_ray.generation.vllm_generator import VllmGenerator

        served = VllmGenerator(directory, settings, **options)
        return served, served
    from ragtune_ray.generation.continuous import ContinuousGenerator
    from ragtune_ray.generation.generator import TransformersGenerator, load_generator

    generator = load_generator(settings, directory)
    assert isinstance(generator, TransformersGenerator)
    return generator, ContinuousGenerator(generator, **options)


def _seconds_left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise RequestFailed("deadline", "the deadline passed before the prompt was built")
    return seconds


def _failed(error: Exception) -> Failed:
    """The failure that a client sees, without the exception's message, which may quote the question."""
    match error:
        case prompts.PromptError():
            return Failed(
                400, "question and system messages do not fit into the prompt; shorten them", "question_too_long"
            )
        case Overloaded():
            return Failed(429, "too many requests are waiting; try again later", "overloaded", 1.0)
        case RequestFailed(reason="deadline"):
            return TOO_LATE
        case RequestFailed(reason="cancelled"):
            return Failed(499, "the request was cancelled", "cancelled")
        case RequestFailed():
            logger.error("a generation failed: %s", error)
            return Failed(502, "the generator failed; see its log", "generation_failed")
        case _:
            return Failed(400, "this model cannot generate an answer to this request", "not_generable")


def _collect() -> None:
    gc.collect()
    hardware.return_freed_memory()


def _cancel(readings: list[_Reading]) -> None:
    for reading in readings:
        reading.request.cancel()


def _cancel_result(future: Future[list[_Reading]]) -> None:
    if not future.cancelled() and future.exception() is None:
        _cancel(future.result())
