"""The generator replica in this process: its answers equal those of bulk answering."""

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ragtune_ray import config, schema
from ragtune_ray.answering.pipeline import Task, answer_tasks
from ragtune_ray.answering.rewriting import kind_of, write_searches
from ragtune_ray.cluster import session
from ragtune_ray.cluster.serving import generator as generator_module
from ragtune_ray.cluster.serving.generator import GeneratorReplica
from ragtune_ray.generation.generator import load_generator
from ragtune_ray.models import weights
from ragtune_ray.serving.admission import slots_per_replica
from ragtune_ray.serving.backend import TOO_LATE, Finished, Job, Shown
from tests.support.endpoints import eventually

pytestmark = pytest.mark.cluster

QUESTIONS = ["What is the Sun?", "What are the moons of Mars, Phobos and Deimos?", "Who landed on the Moon?"]


@pytest.fixture(params=["together", "apart"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, generator_directory: Path) -> config.Config:
    return config.Config().using(
        f"workspace={tmp_path}",
        f"generator.model={generator_directory}",
        "generator.max_new_tokens=8",
        f"answer.reading={request.param}",
        "serve.generator.num_threads=1",
    )


@pytest.fixture
def replica(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[GeneratorReplica]:
    monkeypatch.setattr(session, "log_with_serve", lambda: None)  # so that pytest captures the logs
    made = GeneratorReplica(settings)
    yield made
    made.__del__()


def job_of(question: str, passages: list[schema.Passage]) -> Job:
    scores = tuple(1 / rank for rank in range(1, len(passages) + 1))
    return Job(question, "rag", tuple(passages), scores, "000001", (), "", 8, 0.0, (), 0)


def test_served_answers_equal_bulk_answers_whole_and_streamed(
    settings: config.Config, replica: GeneratorReplica, passages: list[schema.Passage]
) -> None:
    shown = passages[:3]
    generator = load_generator(settings.generator, Path(settings.generator.model))
    model = weights.resolve(settings.generator.model).fingerprint

    async def streamed(job: Job) -> list[object]:
        return [event async for event in replica.stream(job, 60)]

    for question in QUESTIONS:
        job = job_of(question, shown)
        query = schema.Query("ask", question, None, (), (), "all")
        (bulk,) = answer_tasks([Task(query, job.passages, job.scores, "000001")], generator, settings, model)
        whole = asyncio.run(replica.complete(job, 60))
        assert isinstance(whole, tuple)
        first, last = whole
        assert [passage.passage_id for passage in first.passages] == list(bulk.passage_ids)
        assert (first.scores, first.prompt_tokens) == (bulk.scores, bulk.prompt_tokens)
        measured = {"seconds": 0.0, "confidence": None}
        assert dataclasses.replace(last.answer, **measured) == dataclasses.replace(bulk, **measured)
        assert last.answer.confidence == pytest.approx(bulk.confidence, abs=1e-4)
        head, *pieces, end = asyncio.run(streamed(job))
        assert isinstance(head, Shown)
        assert isinstance(end, Finished)
        assert "".join(str(piece) for piece in pieces) == end.raw
        assert end.answer.answer == bulk.answer


def test_the_replica_writes_the_searches_that_bulk_answering_writes(
    settings: config.Config, replica: GeneratorReplica
) -> None:
    replica._settings = settings.using("retrieval.rewrite=generator", "retrieval.decompose=true")
    generator = load_generator(settings.generator, Path(settings.generator.model))
    said = (("user", "Who landed on the Moon?"), ("assistant", "Apollo 11 did."))
    for question in ("And when was that?", "What are its moons, and which of them is larger? " * 40):
        job = dataclasses.replace(job_of(question, []), history=said)
        (bulk,) = write_searches([job.query], generator, replica._settings)
        served = asyncio.run(replica.write_searches(job, 60))
        assert dataclasses.replace(served, seconds=0.0) == dataclasses.replace(bulk, seconds=0.0)
        assert bulk.completion_tokens > 0, "the tiny model wrote something"
    late = asyncio.run(replica.write_searches(job, 0))
    assert late.texts == (job.question,)
    assert [kind_of(reason) for reason in late.fallbacks] == [
        "rewrite: the generator failed",
        "split: the generator failed",
    ]


def test_a_disconnected_client_stops_every_reading(
    settings: config.Config, replica: GeneratorReplica, passages: list[schema.Passage]
) -> None:
    async def left_early() -> None:
        events = replica.stream(job_of(QUESTIONS[0], passages[:3]), 60)
        assert isinstance(await anext(events), Shown)
        await events.aclose()

    asyncio.run(left_early())
    eventually(lambda: _num_requests(replica) == 0, "generation stops")


def test_no_prompt_is_built_for_a_cancelled_or_late_job(
    replica: GeneratorReplica, passages: list[schema.Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[object] = []
    monkeypatch.setattr(generator_module, "task_prompt", lambda *given: built.append(given))
    go = threading.Event()
    replica._tokenizing.submit(go.wait, 60)  # the long prompt of another job

    async def leave() -> None:
        task = asyncio.create_task(replica.complete(job_of(QUESTIONS[0], passages[:3]), 60))
        await asyncio.to_thread(eventually, lambda: replica._tokenizing._work_queue.qsize() > 0, "the prompt is queued")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        late = asyncio.create_task(replica.complete(job_of(QUESTIONS[0], passages[:3]), 0))
        await asyncio.to_thread(eventually, lambda: replica._tokenizing._work_queue.qsize() > 1, "the next is queued")
        go.set()
        assert await late == TOO_LATE

    asyncio.run(leave())
    assert built == []


def test_the_engine_queues_as_many_jobs_as_serve_sends(
    settings: config.Config, replica: GeneratorReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replica._current.lease() as lease:
        engine = lease.resource.engine
    taken = engine._next
    monkeypatch.setattr(engine, "_next", lambda: None)  # no request starts
    num_jobs = slots_per_replica(settings.serve.generator)

    async def ask_all() -> list[object]:
        tasks = [asyncio.create_task(replica.complete(job_of(QUESTIONS[0], []), 60)) for _ in range(num_jobs)]
        told = [lambda: engine.stats().waiting == num_jobs, lambda: any(task.done() for task in tasks)]
        await asyncio.to_thread(eventually, lambda: any(each() for each in told), "all are waiting, or one was refused")
        monkeypatch.setattr(engine, "_next", taken)
        return await asyncio.gather(*tasks)

    assert [type(each) for each in asyncio.run(ask_all())] == [tuple] * num_jobs


def _num_requests(replica: GeneratorReplica) -> int:
    status = asyncio.run(replica.status())
    return int(status["running"]) + int(status["waiting"])
