"""Jobs on machines that share nothing but an S3 server: in each job a machine dies and another one joins."""

import logging
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx2 as httpx
import pyarrow.parquet as pq
import pytest
import yaml

from ragtune_ray import config
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.generation.generator import load_generator
from ragtune_ray.index import contents
from ragtune_ray.models import arms
from ragtune_ray.storage import artifacts
from tests.support import machines as support
from tests.support.corpora import write_corpus, write_queries
from tests.support.endpoints import question
from tests.support.indexes import living, segment_manifests
from tests.support.machines import Machines, eventually
from tests.support.processes import Command

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.machines, pytest.mark.timeout(1500)]
logger = logging.getLogger(__name__)

BUCKET = "s3://ragtune"
NUM_DOCUMENTS, NUM_QUERIES = 500, 80
KEY = "key-of-the-test-0123456789"
OF_RAY = {
    *("JobSupervisor", "ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor", "ServeController"),
    *("ProxyActor", "DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher", "SynchronizationActor"),
    "TrainController",
}
LIGHT = {"_Board", "MapBatches(_load_step)", "ServeReplica:ragtune:Ingress"}
"""Passes on the progress, looks up the examples of a training step, or takes requests."""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, generator_directory: Path) -> Iterator[Machines]:
    """A head without CPUs, and two machines."""
    support.require()
    with pytest.MonkeyPatch.context() as patch, Machines(hidden=[tmp_path_factory.getbasetemp()]) as started:
        for name, value in started.store.environment.items():
            patch.setenv(name, value)
        patch.setenv("RAGTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("ragtune")
        shutil.copytree(generator_directory, started.head.folder / "home" / "generator")  # the driver alone has it
        for _ in range(2):
            started.add()
        yield started


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, generator_directory: Path) -> dict[str, Any]:
    """A config for this process, without Ray, and an index built by it; the files are in a local folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_corpus(folder / "corpus.jsonl", NUM_DOCUMENTS)
    write_queries(folder / "queries.jsonl", NUM_QUERIES)
    found = {
        "workspace": str(folder / "workspace"),
        "corpus": {"path": str(folder / "corpus.jsonl"), "unit_bytes": 2000},
        "queries": {"path": str(folder / "queries.jsonl"), "split_by": "document"},
        "encoder": {"model": "hashing-64", "unit_passages": 16},
        "chunking": {"size_tokens": 32, "overlap_tokens": 4},
        "index": {"kind": "ivf", "segment_passages": 500},
        "generator": {"model": str(generator_directory), "precision": "float32", "max_new_tokens": 4},
        "prompt": {"max_tokens": 1500},
        "answer": {"unit_queries": 4},
    }
    build_index(config.Config.model_validate(found))
    return found


@pytest.fixture(scope="module")
def config_file(settings: dict[str, Any], machines: Machines) -> str:
    """The path of the same config on each machine; all files, and the index, are in the bucket."""
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.put(settings["workspace"], "ragtune/workspace", recursive=True)
    there: dict[str, Any] = {**settings, "workspace": f"{BUCKET}/workspace"}
    for section, name in (("corpus", "corpus.jsonl"), ("queries", "queries.jsonl")):
        store.put_file(settings[section]["path"], f"ragtune/{name}")
        there[section] = {**settings[section], "path": f"{BUCKET}/{name}"}
    there["generator"] = {**settings["generator"], "model": f"{machines.seen}/home/generator"}
    (machines.head.folder / "home" / "config.yaml").write_text(yaml.safe_dump(there))
    return f"{machines.seen}/home/config.yaml"


def num_done(machines: Machines, name: str) -> int:
    """Units that machines have finished, with repetitions."""
    return sum(len(machine.done(name)) for machine in machines.workers)


def assert_head_did_no_work(machines: Machines) -> None:
    """Nothing but small actors ran beside the driver."""
    assert not machines.head.done()
    assert machines.head.ran() <= OF_RAY | LIGHT


def test_index(machines: Machines, settings: dict[str, Any], config_file: str) -> None:
    workspace = f"{BUCKET}/built"
    for machine in machines.workers:
        machine.pause(4)
    job = machines.submit("index", "jobs/index.py", config_file, f"workspace={workspace}")
    job.until(lambda: num_done(machines, "embed") >= 30)
    late = machines.add(4)
    joined = time.time()
    (first, *_) = job.until(late.done)
    logger.info("the late machine finished its first work %.1f s after it had joined", first - joined)
    (embedded, *_) = job.until(lambda: late.done("embed"))
    logger.info("the late machine embedded its first unit %.1f s after it had joined", embedded - joined)
    killed = machines.workers[0]
    assert killed.workers("EmbedUnits")
    killed.kill()
    for machine in machines.workers:
        machine.pause(0)
    job.wait()
    assert segment_manifests(workspace) == segment_manifests(settings["workspace"])
    assert living(workspace) == {f"d{number}" for number in range(NUM_DOCUMENTS)}
    assert contents.index_problems(workspace) == []
    assert_head_did_no_work(machines)


def answers(url: str) -> list[tuple[Any, ...]]:
    with fsspec.open(f"{url}/answers.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    columns = ("query_id", "answer", "citations", "passage_ids", "scores", "status", "prompt_tokens", "index_version")
    return [tuple(str(row[name]) for name in columns) for row in rows]


def test_answer(machines: Machines, settings: dict[str, Any], config_file: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    alone = Command(["answer", str(tmp_path / "config.yaml")], tmp_path / "log.txt")
    for machine in machines.workers:
        machine.pause(3)
    job = machines.submit("answer", "jobs/answer.py", config_file)
    before = num_done(machines, "commit_unit")
    job.until(lambda: num_done(machines, "commit_unit") >= before + 10)
    killed = job.until(lambda: [machine for machine in machines.workers if machine.workers("GenerateUnit")])[0]
    killed.kill()
    machines.add()
    for machine in machines.workers:
        machine.pause(0)
    (url,) = re.findall(r"^s3://\S+$", job.wait(), re.MULTILINE)
    found = answers(url)
    assert [row[0] for row in found] == [f"q{number}" for number in range(NUM_QUERIES)]
    assert found == answers(alone.wait().splitlines()[-1])
    assert_head_did_no_work(machines)


def test_train(machines: Machines, settings: dict[str, Any], config_file: str, tmp_path: Path) -> None:
    short = ["training.arm=ft", "training.batch_examples=4", "training.epochs=4", "training.precision=float32"]
    often = ["training.workers=2", "training.checkpoint_steps=10", "training.evaluate_steps=40"]
    job = machines.submit("train", "jobs/train.py", config_file, *short, *often)
    store = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    job.until(lambda: store.glob("ragtune/workspace/models/.work/*/train/step-*/manifest.json"))
    killed = next(machine for machine in machines.workers if machine.workers("RayTrainWorker"))
    killed.kill()
    machines.add()
    job.wait()
    url = arms.tuned_model(f"{BUCKET}/workspace", "ft")
    assert artifacts.read_manifest(url)["num_steps"] > 0
    store.get(url, str(tmp_path / "model"), recursive=True)
    assert load_generator(config.Config.model_validate(settings).generator, tmp_path / "model")
    assert_head_did_no_work(machines)


def test_serve(machines: Machines, config_file: str) -> None:
    two = [
        f"serve.{name}.{limit}_replicas=2" for name in ("ingress", "retriever", "generator") for limit in ("min", "max")
    ]
    two += ["serve.timeout_seconds=10"]
    two += [f"serve.{name}.max_replicas_per_node=1" for name in ("ingress", "retriever", "generator")]
    light = ["serve.retriever.num_cpus=0.5", "serve.generator.num_cpus=0.5", "serve.generator.num_threads=1"]
    verb = ["-m", "ragtune_ray.cli", "serve", config_file, "serve.host=0.0.0.0", "serve.port=8000"]
    job = machines.submit("serve", *verb, *two, *light, RAGTUNE_API_KEYS=KEY)
    address = f"http://{machines.head.address}:8000"
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as http:
        job.until(lambda: is_ready(http))
        expected = [hits(http, number) for number in range(20)]
        assert all(expected)
        (killed, *_) = machines.workers
        killed.kill()
        lost = time.monotonic()
        assert [hits(http, number) for number in range(20)] == expected
        logger.info("20 questions were answered %.1f s after a machine was lost", time.monotonic() - lost)
        late = machines.add()
        job.until(lambda: late.workers("Retriever") and hits(http, 0) == expected[0])
        assert [hits(http, number) for number in range(20)] == expected
        assert answered(http, "/v1/chat/completions", question(3))["choices"][0]["message"]["content"]
    machines.stop("serve")
    assert_head_did_no_work(machines)


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def answered(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The response to a request, which is repeated as clients do: it is refused, or its replica does not answer in time."""

    def ask() -> httpx.Response | None:
        response = http.post(path, json=body)
        if response.status_code == 503:
            assert int(response.headers["Retry-After"]) > 0
            return None
        return None if response.status_code == 504 else response

    response = eventually(ask, path)
    assert response is not None
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def hits(http: httpx.Client, number: int) -> list[tuple[Any, ...]]:
    body = {"query": f"What is the code of vessel{number}?", "top_k": 5}
    return [(row["id"], row["text"], row["score"]) for row in answered(http, "/v1/retrieve", body)["data"]]
