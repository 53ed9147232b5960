"""The doors for `ray job submit`, and the files that describe a cluster."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from ragtune_ray.cluster.environment import SERVE_ENVIRONMENT
from tests.support.corpora import write_corpus

ROOT = Path(__file__).parent.parent.parent


def test_cluster_yaml_is_accepted_by_rays_own_validator() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    described = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(described))
    started = " ".join(described["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in started
    assert "RAY_AUTH_MODE=token" in started
    assert all("RAY_AUTH_MODE=token" in line for line in described["worker_start_ray_commands"] if "start" in line)
    # Serve's processes read these where they start, on every node.
    starts = [described["head_start_ray_commands"][-1], described["worker_start_ray_commands"][-1]]
    image = (ROOT / "deploy" / "Dockerfile").read_text()
    for name, value in SERVE_ENVIRONMENT.items():
        if name != "RAY_SERVE_LOG_TO_STDERR":  # others than `ragtune serve` may show the logs of replicas
            assert all(f"{name}={value} " in text for text in (*starts, image)), name
    kinds = described["available_node_types"]
    assert any(kind["resources"].get("GPU") for kind in kinds.values())
    workers = [kind for name, kind in kinds.items() if name != "head"]
    assert all(kind["min_workers"] < kind["max_workers"] for kind in workers)
    # Ray gives its default profile to the head alone, and the workers read and write the bucket.
    assert all(kind["node_config"]["IamInstanceProfile"]["Name"] for kind in workers)


def test_a_cluster_yaml_with_a_misspelt_key_is_refused() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    described = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    described["max_wrokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config(described))


@pytest.mark.parametrize("verb", ["index", "retrieve", "answer", "evaluate", "tune"])
def test_a_job_takes_the_arguments_of_its_verb(verb: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"jobs.{verb}", "nowhere.yaml"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 2
    assert "nowhere.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of one node with a dashboard, started as an operator would, and stopped by its own processes' ids."""
    import psutil

    port, dashboard, client = free_ports(3)
    # Ray's sockets live below this directory and their paths must stay under 108 characters.
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = Path(folder) / "token"
        token.write_text("0123456789abcdef0123456789abcdef")
        token.chmod(0o600)
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        ray = str(Path(sys.executable).parent / "ray")
        arguments = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        arguments += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--num-cpus=4", "--disable-usage-stats"]
        arguments += ["--dashboard-agent-listen-port=0", "--block"]
        with (Path(folder) / "head.log").open("w") as log:
            process = subprocess.Popen([ray, "start", "--head", *arguments], env=environment, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for each in family:
                if each.is_running():
                    each.terminate()
            _, alive = psutil.wait_procs(family, timeout=120)
            for each in alive:
                each.kill()
            process.wait(120)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_submitted_to_a_cluster_leaves_a_sound_artifact(
    head: tuple[str, dict[str, str]], tmp_path: Path, eventually_up
) -> None:
    address, environment = head
    eventually_up(address)
    write_corpus(tmp_path / "corpus.jsonl", 30)
    config = {
        "workspace": str(tmp_path / "workspace"),
        "corpus": {"path": str(tmp_path / "corpus.jsonl")},
        "encoder": {"model": "hashing-64"},
        "cluster": {"encoder_workers": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    ray = str(Path(sys.executable).parent / "ray")
    submit = [ray, "job", "submit", "--address", address, "--working-dir", ".", "--"]
    job = [sys.executable, "jobs/index.py", str(tmp_path / "config.yaml"), "--json"]
    result = subprocess.run(
        [*submit, *job], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    from ragtune_ray.index import snapshot

    version = snapshot.open_index(str(tmp_path / "workspace"))
    assert version.manifest["num_documents"] == 30
    printed = next(line for line in result.stdout.splitlines() if line.startswith("{"))
    assert json.loads(printed)["num_documents"] == 30

    stranger = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    stranger |= {"RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(
        [ray, "job", "list", "--address", address],
        env=stranger,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert refused.returncode != 0, "a client without the token is refused"
