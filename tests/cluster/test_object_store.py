"""The same commands with corpus, questions and workspace in an S3 bucket: a real S3 protocol server on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import yaml

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
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("ragtune-test")
    yield "s3://ragtune-test"
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
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))

    assert ragtune("index", str(config)) == f"{bucket}/workspace/index/versions/000001"
    assert store.cat_file("ragtune-test/workspace/index/CURRENT") == b"000001\n"
    assert not store.exists("ragtune-test/workspace/index/building"), "what was under way is cleared"
    run = ragtune("retrieve", str(config))
    measured = json.loads(store.cat_file(f"{run.removeprefix('s3://')}/metrics.json"))
    assert measured["recall@1"]["value"] == 1, "a vessel's number stands in its document alone"
    assert measured["recall@1"]["n"] == 20
    report = json.loads(ragtune("verify", str(config), "--json"))
    assert report["problems"] == []
    assert report["checked"] == 3
    assert ragtune("index", str(config)) == f"{bucket}/workspace/index/versions/000001", "nothing to do the second time"
