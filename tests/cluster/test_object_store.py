"""The same commands with corpus, questions and workspace in an S3 bucket: a real S3 protocol server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import yaml

from ragtune_ray import config
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.inputs import ChangedError
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.schema import Document
from tests.support.corpora import write_corpus, write_queries

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty bucket; this process and those it starts reach it through the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAGTUNE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("ragtune-test")
    yield "s3://ragtune-test"
    store.invalidate_cache()
    store.rm("ragtune-test", recursive=True)  # servers of one process share their buckets
    server.stop()


def ragtune(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    result = subprocess.run(
        [sys.executable, "-m", "ragtune_ray.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


def test_a_folder_of_objects_is_listed_with_their_etags_and_a_replaced_one_is_noticed(bucket: str) -> None:
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    names = [f"{top}/{part}/{number}.txt" for top in "ab" for part in range(20) for number in range(3)]
    for name in [*names, "top.md", ".git/config.txt", "a/.hidden.md"]:
        store.pipe_file(f"ragtune-test/docs/{name}", f"Text of {name}".encode())
    plan = plan_units(f"{bucket}/docs")
    assert [file.path for file in plan.files] == sorted(f"{bucket}/docs/{name}" for name in [*names, "top.md"])
    etag = hashlib.md5(b"Text of top.md", usedforsecurity=False).hexdigest()
    assert plan.files[-1].stamp == f"14-{etag}", "not the time, which a copy onto itself changes"
    found = [item for unit in plan.units for item in read_documents(unit, config.Corpus())]
    assert [item.text for item in found if isinstance(item, Document)] == [
        f"Text of {name}" for name in sorted([*names, "top.md"])
    ]
    store.pipe_file("ragtune-test/docs/top.md", b"Text of TOP.MD")
    with pytest.raises(ChangedError, match=r"top\.md changed while it was indexed; run again"):
        list(read_documents(plan.units[-1], config.Corpus()))
    store.rm("ragtune-test/docs/b/7/1.txt")
    with pytest.raises(ChangedError, match=r"b/7/1\.txt changed"):
        list(read_documents(plan.units[-1], config.Corpus()))


def test_index_retrieve_verify_and_resume_work_on_s3(bucket: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    write_corpus(tmp_path / "corpus.jsonl", 40)
    write_queries(tmp_path / "queries.jsonl", 20)
    for name in ("corpus.jsonl", "queries.jsonl"):
        store.put_file(str(tmp_path / name), f"ragtune-test/{name}")
    settings = {
        "workspace": f"{bucket}/workspace",
        "corpus": {"path": f"{bucket}/corpus.jsonl"},
        "queries": {"path": f"{bucket}/queries.jsonl"},
        "encoder": {"model": "hashing-64", "unit_passages": 64},
        "retrieval": {"mode": "lexical"},
        "cluster": {"encoder_workers": 1},
    }
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(settings))

    assert ragtune("index", str(written)) == f"{bucket}/workspace/index/versions/000001"
    assert store.cat_file("ragtune-test/workspace/index/CURRENT") == b"000001\n"
    assert not store.exists("ragtune-test/workspace/index/building"), "what was under way is cleared"
    run = ragtune("retrieve", str(written))
    measured = json.loads(store.cat_file(f"{run.removeprefix('s3://')}/metrics.json"))
    assert measured["recall@1"]["value"] == 1, "a vessel's number stands in its document alone"
    assert measured["recall@1"]["n"] == 20
    report = json.loads(ragtune("verify", str(written), "--json"))
    assert report["problems"] == []
    assert report["checked"] == 3
    assert ragtune("index", str(written)) == f"{bucket}/workspace/index/versions/000001", (
        "nothing to do the second time"
    )
