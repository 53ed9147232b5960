"""The endpoint on a local Ray: tenants, overload, autoscaling, hot-swapped models and shutdown."""

import concurrent.futures
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import yaml

from ragtune_ray import config
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.serving.serve import running
from ragtune_ray.storage import artifacts
from tests.support.endpoints import (
    CHAT,
    QUICK,
    WAIT_SECONDS,
    eventually,
    question,
    replica_processes,
    wait_until_ready,
)
from tests.support.processes import Command

pytestmark = [pytest.mark.timeout(1500), pytest.mark.serve, pytest.mark.cluster, pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def shared_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tenants with equal texts, so that only isolation separates them."""
    path = tmp_path_factory.mktemp("tenants") / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(40):
            for tenant in ("acme", "umbra"):
                row = {
                    "document_id": f"{tenant}-{number}",
                    "text": f"The code of vessel{number} is secret{number}.",
                    "metadata": {"owner": tenant},
                }
                file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.slow
def test_tenants_are_isolated_and_limits_enforced(
    tmp_path: Path, shared_documents: Path, settings_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {name: f"{name}-secret-0123456789" for name in ("acme", "umbra")}
    rows = [{"name": name, "key": key, "tenant": name} for name, key in secrets.items()]
    (tmp_path / "keys.yaml").write_text(json.dumps({"keys": rows}))
    settings = settings_for(
        tmp_path / "workspace",
        *QUICK,
        f"corpus.path={shared_documents}",
        "index.tenant_field=owner",
        f"serve.keys_path={tmp_path / 'keys.yaml'}",
        "serve.generator.max_ongoing_requests=1",
        "serve.generator.max_queued_requests=1",
        "serve.generator.min_replicas=1",
    )
    build_index(settings.using("retrieval.tenant=acme"))
    source = random.Random(0)
    filters: list[Any] = [
        None,
        {"owner": "umbra"},
        {"owner": ["acme", "umbra"]},
        {"owner": {"gte": ""}},
        {"document_id": "umbra-1"},
        {"owner": True},
        {"owner.x": 1},
    ]
    with running(settings) as address, httpx.Client(base_url=address, timeout=300) as http:
        assert http.post("/v1/retrieve", json={"query": "x"}).status_code == 401
        for _ in range(1000):
            tenant = source.choice(sorted(secrets))
            body = {
                "query": f"vessel{source.randrange(40)} {source.choice(['acme', 'umbra', 'owner'])}",
                "top_k": source.choice([1, 5, 50, 50, 51, -1, 10**18]),
                "filter": source.choice(filters),
            }
            reply = http.post("/v1/retrieve", json=body, headers={"Authorization": f"Bearer {secrets[tenant]}"})
            assert reply.status_code == (200 if 1 <= body["top_k"] <= 50 else 400), reply.text
            assert all(found["document_id"].startswith(tenant) for found in reply.json().get("data", ()))
        mine = {"Authorization": f"Bearer {secrets['acme']}"}
        found = http.post("/v1/retrieve", json={"query": "vessel3", "top_k": 50}, headers=mine).json()["data"]
        assert len(found) == 40
        _overload(address, mine)


def _overload(address: str, headers: dict[str, str]) -> None:
    """Send ten requests to an endpoint with room for two; the others are refused with Retry-After."""

    def ask(number: int) -> tuple[int, float, str | None]:
        with httpx.Client(base_url=address, timeout=300, headers=headers) as own:
            started = time.monotonic()
            reply = own.post(CHAT, json=question(number, max_tokens=128, temperature=1.0))
            return reply.status_code, time.monotonic() - started, reply.headers.get("retry-after")

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(ask, range(10)))
    refused = [reply for reply in replies if reply[0] == 429]
    assert {status for status, _, _ in replies} == {200, 429}
    assert len(refused) >= 5
    assert all(int(retry_after or 0) >= 1 for _, _, retry_after in refused)


@pytest.mark.slow
def test_replicas_scale_with_load_and_swap_in_a_tuned_model(
    tmp_path: Path, settings_for, generator_directory: Path
) -> None:
    folder = tmp_path / "workspace" / "models" / "rag+ft"

    def publish(name: str) -> None:
        staging = artifacts.stage(str(folder / name))
        shutil.copytree(generator_directory, staging, dirs_exist_ok=True)
        (staging / "note.json").write_text(json.dumps(name))  # changes the fingerprint
        artifacts.publish(staging, str(folder / name), "model")
        artifacts.make_current(str(folder), name)

    publish("first")
    settings = settings_for(
        tmp_path / "workspace",
        *QUICK,
        "answer.arm=rag+ft",
        "serve.generator.max_replicas=2",
        "serve.generator.target_ongoing_requests=1",
        "serve.generator.upscale_delay_seconds=0",
        "serve.generator.downscale_delay_seconds=1",
    )
    build_index(settings)

    def ask(number: int) -> str:
        with httpx.Client(base_url=address, timeout=300) as own:
            reply = own.post(CHAT, json=question(number % 40, max_tokens=200, temperature=1.0))
            assert reply.status_code == 200, reply.text
            return reply.json()["generator"]

    with running(settings) as address, httpx.Client(base_url=address, timeout=300) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["rag+ft", "hashing-64"]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = []

            def loaded() -> bool:
                answers.extend(pool.submit(ask, number) for number in range(6 - sum(not a.done() for a in answers)))
                return len(replica_processes("Generator")) == 2

            eventually(loaded, "a second generator replica starts")
            assert len(replica_processes("Retriever")) == 1, "each deployment scales on its own"
            (before,) = {future.result() for future in answers}
            publish("second")
            eventually(lambda: ask(0) != before, "the new model is swapped in")
        eventually(lambda: len(replica_processes("Generator")) == 1, "the second generator replica stops")
        assert http.post(CHAT, json=question()).status_code == 200


def test_a_second_endpoint_on_a_cluster_is_refused(tmp_path: Path, settings_for) -> None:
    settings = settings_for(tmp_path, *QUICK, "answer.arm=base")
    with running(settings) as address:
        with pytest.raises(RuntimeError, match="Ray Serve already runs on this cluster"), running(settings):
            pass
        assert httpx.get(f"{address}/healthz").status_code == 200
        with (
            pytest.raises(config.ConfigError, match=r"serve\.port"),
            running(settings.using(f"serve.port={address.rpartition(':')[2]}")),
        ):
            pass


def test_ctrl_c_lets_a_stream_finish_and_ends_in_one_line(tmp_path: Path, settings_for) -> None:
    """As a terminal sends it, to the whole process group. Meanwhile, a client that never ends its headers is cut off."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = settings_for(tmp_path / "w", *QUICK, "answer.arm=base", f"serve.port={port}", "serve.grace_seconds=30")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "ragtune_ray.cli", "serve", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    long = question(max_tokens=512, temperature=1.0, stream=True)
    with (
        subprocess.Popen(command, start_new_session=True, **pipes) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http,
    ):
        wait_until_ready(http, process, lambda: process.stderr.read() if process.stderr else "")
        assert process.stderr is not None
        assert process.stdout is not None
        said = []
        while not said or "Ctrl-C" not in said[-1]:  # its signal handlers are installed only now
            said.append(process.stderr.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        with http.stream("POST", CHAT, json=long) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.killpg(process.pid, signal.SIGINT)
            rest = "\n".join(lines)
        assert rest.rstrip().endswith("[DONE]")
        assert process.wait(600) == 0
        said += process.stderr.readlines()
        assert [line.partition(" at http")[0].rstrip() for line in said] == [
            "serve: loading",
            "serve: web page",
            "serve: stopping; requests in flight may finish",
        ]
        assert process.stdout.read() == ""


def test_sigterm_during_startup_stops_every_process(tmp_path: Path, settings_for) -> None:
    settings = settings_for(tmp_path / "w", *QUICK, "answer.arm=base")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = Command(["serve", str(path)], tmp_path / "log.txt")
    try:
        eventually(lambda: bool(command.workers("ServeController")), "Serve starts")
        workers = command.workers("ray::")
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(600) == 130, command.log.read_text()
    finally:
        if command.process.poll() is None:
            command.kill()
    assert "SIGTERM received" not in command.log.read_text()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive
