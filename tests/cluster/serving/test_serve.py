"""The endpoint on a local Ray, called over HTTP and with the real OpenAI client."""

import concurrent.futures
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest

from ragtune_ray import config, schema
from ragtune_ray.answering.pipeline import Task, task_prompt
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.answering.evaluate import read_answers
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import upsert_documents
from ragtune_ray.cluster.serving.serve import running
from ragtune_ray.evaluation import adaptive
from ragtune_ray.generation.continuous import ContinuousGenerator
from ragtune_ray.generation.generator import TransformersGenerator
from ragtune_ray.index import versions
from ragtune_ray.models import weights
from ragtune_ray.serving.sanitizing import AnswerText
from ragtune_ray.storage import artifacts
from ragtune_ray.training import trainable
from tests.support.endpoints import CHAT, QUICK, eventually, question, replica_processes
from tests.support.models import save_adapter

pytestmark = [pytest.mark.timeout(1500), pytest.mark.serve, pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, settings_for, generator_directory: Path, shared_ray: None
) -> config.Config:
    """An index, a LoRA adapter for the arm ft, and a calibration that always trusts the closed-book answer of the arm rag."""
    workspace = tmp_path_factory.mktemp("workspace")
    made = settings_for(workspace, *QUICK, "serve.adapter_arms=[ft]")
    build_index(made)
    folder = workspace / "models" / "ft"
    staging = artifacts.stage(str(folder / "tuned"))
    shutil.copytree(generator_directory, staging, dirs_exist_ok=True)  # the merged model, unused here
    save_adapter(generator_directory, staging / trainable.ADAPTER, 1)
    artifacts.publish(staging, str(folder / "tuned"), "model")
    artifacts.make_current(str(folder), "tuned")
    model = weights.resolve(str(generator_directory)).fingerprint
    adaptive.publish_calibration(made, "sure", adaptive.RetrievalCalibration(1e-9, 1.0, None, model))
    return made


@pytest.fixture(scope="module")
def address(settings: config.Config) -> Iterator[str]:
    with running(settings) as found:
        yield found


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=300) as client:
        yield client


@pytest.fixture
def sdk(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client_gets_equal_plain_and_streamed_answers(sdk: openai.OpenAI) -> None:
    plain = sdk.chat.completions.create(model="rag", **question())
    assert plain.choices[0].message.content is not None
    assert plain.usage is not None
    sources = plain.model_extra["sources"]
    assert len(sources) == 5
    chunks = list(
        sdk.chat.completions.create(model="rag", stream=True, stream_options={"include_usage": True}, **question())
    )
    assert chunks[0].model_extra["sources"] == sources
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage
    response = sdk.responses.create(model="rag", input=question()["messages"])
    assert (response.output_text, response.model_extra["sources"]) == (text, sources)
    *_, last = sdk.responses.create(model="rag", input=question()["messages"], stream=True)
    assert last.type == f"response.{response.status}"
    assert last.response.output[0].content == response.output[0].content
    listed = [model.id for model in sdk.models.list()]
    assert listed[:-1] == ["rag", "base", "ft"]
    assert sdk.chat.completions.create(model="base", **question()).model_extra["sources"] == []
    vectors = sdk.embeddings.create(model=listed[-1], input=["a", "b"]).data
    assert [len(vector.embedding) for vector in vectors] == [64, 64]
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="gpt-4", **question())
    with pytest.raises(openai.BadRequestError):
        sdk.chat.completions.create(model="rag", logprobs=True, **question())
    choices = sdk.chat.completions.create(model="rag", n=2, temperature=1.0, top_p=0.9, **question()).choices
    assert len(choices) == 2


def test_a_served_answer_equals_that_of_the_bulk_job(http: httpx.Client, settings: config.Config) -> None:
    rows = {row.query: row for row in read_answers(str(answer(settings)))}
    for number in range(0, 40, 4):
        served = http.post(CHAT, json=question(number)).json()
        row = rows[f"What is the code of vessel{number}?"]
        assert served["choices"][0]["message"]["content"] == row.answer
        assert tuple(source["id"] for source in served["sources"]) == row.passage_ids
        assert [source["score"] for source in served["sources"]] == pytest.approx(list(row.scores))
        assert [(c["id"], c["start"], c["end"]) for c in served["citations"]] == [
            (c.passage_id, c.start, c.end) for c in row.citations
        ]
        assert served["index_version"] == row.index_version
        assert served["generator"] == row.model
        assert served["usage"]["prompt_tokens"] == row.prompt_tokens


def test_a_confident_answer_skips_retrieval_and_equals_the_bulk_one(
    http: httpx.Client, settings: config.Config
) -> None:
    closed = {row.query: row for row in read_answers(str(answer(settings.using("answer.closed_book=true"))))}
    base = {row.query: row for row in read_answers(str(answer(settings.using("answer.arm=base"))))}
    for number in range(0, 40, 8):
        served = http.post(CHAT, json=question(number, retrieval="auto")).json()
        row = closed[f"What is the code of vessel{number}?"]
        assert row.answer == base[row.query].answer
        assert served["retrieved"] is row.abstained
        if not row.abstained:
            assert served["choices"][0]["message"]["content"] == row.answer
            assert (served["sources"], served["index_version"], served["generator"]) == ([], "", row.model)
    # A calibration of another generator does not apply; calibrations are hot-swapped, too.
    certain = next(number for number in range(40) if not closed[f"What is the code of vessel{number}?"].abstained)
    adaptive.publish_calibration(settings, "other", adaptive.RetrievalCalibration(1e-9, 1.0, None, "another generator"))
    eventually(
        lambda: http.post(CHAT, json=question(certain, retrieval="auto")).json()["retrieved"],
        "the new calibration is used",
    )
    adaptive.publish_calibration(settings, "sure", adaptive.RetrievalCalibration(1e-9, 1.0, None, row.model))
    eventually(
        lambda: not http.post(CHAT, json=question(certain, retrieval="auto")).json()["retrieved"],
        "the first calibration is used again",
    )


def test_one_replica_serves_a_tuned_arm_and_the_base_model(
    http: httpx.Client, settings: config.Config, generator_directory: Path
) -> None:
    (adapter,) = (Path(settings.workspace) / "models" / "ft" / "tuned").glob(trainable.ADAPTER)
    generator = TransformersGenerator(generator_directory, precision="float32", batch_tokens=4096)
    engine = ContinuousGenerator(generator, adapters={"ft": adapter})
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        bodies = [question(number, model=arm, max_tokens=8) for number in range(3) for arm in ("base", "ft")]
        served = list(pool.map(lambda body: http.post(CHAT, json=body).json(), bodies))
    for body, reply in zip(bodies, served, strict=True):
        text = body["messages"][0]["content"]
        arm = body["model"]
        task = Task(schema.Query("ask", text, None, (), (), "all"))
        prompt = task_prompt(task, generator, settings.using("answer.arm=base"))
        request = engine.submit(prompt, max_new_tokens=8, adapter="ft" if arm == "ft" else "")
        expected = AnswerText(())
        expected.add(request.completion().text)
        assert reply["choices"][0]["message"]["content"] == expected.whole()
        assert reply["arm"] == arm
    engine.close(0)
    assert len({reply["generator"] for reply in served}) == 2
    texts = [reply["choices"][0]["message"]["content"] for reply in served]
    assert texts[::2] != texts[1::2], "the adapter changes the answer"


def test_a_client_that_disconnects_frees_its_slot(http: httpx.Client) -> None:
    def running_now() -> int:
        return sum(replica["running"] + replica["waiting"] for replica in http.get("/readyz").json()["generators"])

    long = question(stream=True, max_tokens=512, temperature=1.0, top_k=1)
    with http.stream("POST", CHAT, json=long) as reply:
        lines = reply.iter_lines()
        for line in lines:
            if '"content":"' in line and '"content":""' not in line:
                break
    left = time.monotonic()
    eventually(lambda: running_now() == 0, "generation continues after the client has left")
    assert time.monotonic() - left < 20
    text = http.get("/metrics").text
    assert "ragtune_cancelled_total" in text


def test_a_killed_replica_fails_no_plain_request(http: httpx.Client, address: str) -> None:
    def ask(number: int) -> int:
        with httpx.Client(base_url=address, timeout=300) as own:
            return own.post(CHAT, json=question(number % 40)).status_code

    for deployment in ("Retriever", "Generator"):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            replies = [pool.submit(ask, number) for number in range(12)]
            (process,) = replica_processes(deployment)
            os.kill(process, signal.SIGKILL)
            replies += [pool.submit(ask, number) for number in range(12)]
            assert [reply.result() for reply in replies] == [200] * 24, deployment
        eventually(lambda: http.get("/readyz").status_code == 200, "the replica is replaced")


def test_a_published_version_is_swapped_in_and_never_mixed(
    http: httpx.Client, address: str, settings: config.Config, tmp_path: Path
) -> None:
    before = versions.current_version(settings.workspace)
    seen: list[tuple[int, str, str]] = []

    def ask(_: int) -> None:
        with httpx.Client(base_url=address, timeout=300) as own:
            reply = own.post("/v1/retrieve", json={"query": "What is the code of vessel3?", "top_k": 1})
            body = reply.json()
            seen.append((reply.status_code, body["index_version"], body["data"][0]["text"]))

    path = tmp_path / "new.jsonl"
    path.write_text(json.dumps({"document_id": "d3", "text": "The code of vessel3 is secret3 renewed."}) + "\n")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, number) for number in range(40)]
        upsert_documents(settings, str(path))
        after = versions.current_version(settings.workspace)
        eventually(
            lambda: http.get("/readyz").json()["retrievers"][0]["index_version"] == after, "the version is swapped in"
        )
        asked += [pool.submit(ask, number) for number in range(10)]
        concurrent.futures.wait(asked)
    assert {status for status, _, _ in seen} == {200}
    assert {version for _, version, _ in seen} == {before, after}
    assert all(("renewed" in text) == (version == after) for _, version, text in seen if "vessel3 " in text)
    assert any("renewed" in text for _, version, text in seen if version == after)
    folder = Path(settings.workspace) / "index" / "readers"
    holders = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    alive = {holder["version"] for holder in holders if psutil.pid_exists(holder["process"])}
    assert alive == {after}, "the old version is no longer held"


def test_added_documents_are_found_and_deleted_ones_are_not(http: httpx.Client) -> None:
    def first() -> str:
        found = http.post("/v1/retrieve", json={"query": "What is the code of kraken?", "top_k": 1}).json()["data"]
        return found[0]["text"]

    # Larger than Ray's limit for small objects and than replicas may send each other.
    metadata = {"kind": "beast", "page": "<p>" * 2**21, "url": "https://kraken.example/"}
    row = {"document_id": "kraken", "text": "The code of kraken is tentacle.", "metadata": metadata}
    reply = http.post("/v1/documents", json={"documents": [row]})
    assert reply.status_code == 200, reply.text
    counts = {"added": 1, "replaced": 0, "deleted": 0, "unchanged": 0, "missing": [], "rejected": []}
    assert reply.json() == {"index_version": reply.json()["index_version"], **counts, "copies_that_serve_it": 1}
    assert first() == "The code of kraken is tentacle."
    narrowed = http.post("/v1/retrieve", json={"query": "code", "filter": {"kind": "beast"}, "top_k": 9}).json()["data"]
    assert [(source["document_id"], source["url"]) for source in narrowed] == [("kraken", "https://kraken.example/")]
    listed = http.get("/v1/documents", params={"filter": '{"kind": "beast"}'}).json()
    found = [(row["document_id"], row["num_passages"], row["metadata"]) for row in listed["data"]]
    assert found == [("kraken", 1, None)], "without its metadata, which is longer than a page"
    gone = http.request("DELETE", "/v1/documents", json={"document_ids": ["kraken", "nobody"]}).json()
    assert (gone["added"], gone["deleted"], gone["missing"]) == (0, 1, ["nobody"])
    assert "tentacle" not in first()


def test_a_broken_version_is_refused_while_the_old_one_serves(
    http: httpx.Client, settings: config.Config, tmp_path: Path
) -> None:
    serving = versions.current_version(settings.workspace)
    broken = f"{int(serving) + 1:06d}"
    url = Path(versions.version_url(settings.workspace, broken))
    shutil.copytree(versions.version_url(settings.workspace, serving), url)
    manifest = url / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    current = Path(settings.workspace) / "index" / "CURRENT"
    current.write_text(f"{broken}\n")
    try:
        eventually(
            lambda: http.get("/readyz").json()["retrievers"][0]["refused"] is not None, "the refusal is reported"
        )
        state = http.get("/readyz")
        assert state.status_code == 200, "the old version serves"
        assert state.json()["retrievers"] == [{"index_version": serving, "refused": {"version": broken}}]
        assert http.post("/v1/retrieve", json={"query": "x"}).json()["index_version"] == serving
        assert 'ragtune_refused_versions{kind="retriever"} 1.0' in http.get("/metrics").text
    finally:
        current.write_text(f"{serving}\n")
        shutil.rmtree(url)
    eventually(lambda: http.get("/readyz").json()["retrievers"][0]["refused"] is None, "the refusal is cleared")
