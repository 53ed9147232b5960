"""On a cluster of several nodes that was started before: models, variables and work reach all of them."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import stores
from tests.support.corpora import write_corpus
from tests.support.indexes import living
from tests.support.nodes import DRIVER, RAY, ROOT, Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

DEADLINE_SECONDS = 200  # against a hang


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, eventually_up) -> Iterator[Nodes]:
    """Two nodes with caches of their own, and one whose cache cannot be written."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(
        'import fsspec\nfsspec.register_implementation("folder", "tests.support.stores.FolderStore")\n'
    )
    with Nodes() as started:
        eventually_up(started.dashboard)
        started.environment["PYTHONPATH"] = f"{folder}/site:{ROOT}"  # folder:// in all workers
        for cache in (f"{folder}/a", f"{folder}/b", "/dev/null/c"):
            started.add(2, {"RAGTUNE_CACHE": cache, "OF_THE_NODE": cache})
        yield started


def run(nodes: Nodes, *arguments: str, **variables: str) -> tuple[Any, str]:
    """What a driver prints, and its progress."""
    environment = {**nodes.environment, "RAY_ADDRESS": nodes.address, **variables}
    command = [*DRIVER, *arguments]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_each_node_fetches_a_model_once_and_one_that_cannot_is_left_out(
    nodes: Nodes, tmp_path: Path, encoder_directory: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(encoder_directory, own)
    found, progress = run(nodes, "models", f"folder://{tmp_path}/store", str(own), RAGTUNE_CACHE=str(tmp_path / "d"))
    assert [unit for unit, *_ in found["found"]] == list(range(40))
    assert {fingerprint for *_, fingerprint in found["found"]} == {found["fingerprint"]}
    places = {where: directory for _, where, directory, _ in found["found"]}
    assert len(places) == 2
    assert {Path(directory).parents[1].name for directory in places.values()} == {"a", "b"}
    assert progress.count("cannot start Opening and gets no more: NotADirectoryError") == 1
    staged = tmp_path / "store" / "models" / ".staged" / found["fingerprint"]
    assert sorted(stores.downloads(staged)) == sorted(
        [path.name for path in encoder_directory.iterdir() if path.is_file()] * 2
    )


@pytest.mark.parametrize("when", [pytest.param((), marks=pytest.mark.long), ("joining",)])
def test_a_build_leaves_out_a_node_that_cannot_open_its_model(
    nodes: Nodes, tmp_path: Path, encoder_directory: Path, when: tuple[str, ...]
) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 40)
    shutil.copytree(encoder_directory, tmp_path / "own")
    num_left_out, progress = run(nodes, "index", str(tmp_path), "./own", *when, RAGTUNE_CACHE=str(tmp_path / "d"))
    assert num_left_out == 1
    assert progress.count("cannot open the models and gets no work: ") == 1
    assert living(f"folder://{tmp_path}/store") == {f"d{number}" for number in range(40)}


def test_variables_of_the_driver_reach_the_workers(nodes: Nodes) -> None:
    given = {"RAGTUNE_CACHE_BYTES": "12345", "A_KEY": "secret", "ANOTHER": "stays here", "AWS_REGION": "eu-north-1"}
    found, _ = run(nodes, "environment", "A_KEY", **given)
    begun, now = found["begun"], found["now"]
    expected = {name: given[name] for name in ("RAGTUNE_CACHE_BYTES", "A_KEY", "AWS_REGION")}
    expected |= {"MALLOC_ARENA_MAX": "1", "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
    assert {name: begun.get(name) for name in expected} == expected, (
        "at the start of the process, when libraries read them"
    )
    assert "ANOTHER" not in now
    assert now["RAGTUNE_CACHE"] == now["OF_THE_NODE"], "a folder is a matter of the node"
    assert found["address"] in {each.address for each in psutil.net_if_addrs()[now["GLOO_SOCKET_IFNAME"]]}


def test_variables_of_a_submitted_job_are_added_to(nodes: Nodes) -> None:
    of_job = {"RAGTUNE_CACHE_BYTES": "777", "A_KEY": "of the job", "GLOO_SOCKET_IFNAME": "chosen", "OWN": "1"}
    submit = [RAY, "job", "submit", "--address", nodes.dashboard, "--working-dir", "."]
    command = [*DRIVER, "environment", "A_KEY"]
    result = subprocess.run(
        [*submit, "--runtime-env-json", json.dumps({"env_vars": of_job, "excludes": [".git", "data"]}), "--", *command],
        env=nodes.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    printed = next(line for line in result.stdout.splitlines() if line.startswith('{"now"'))
    begun = json.loads(printed)["begun"]
    expected = {**of_job, "MALLOC_ARENA_MAX": "1"}
    assert {name: begun.get(name) for name in expected} == expected


def test_node_that_joins_gets_work(nodes: Nodes, tmp_path: Path) -> None:
    # The cluster has no second node yet.
    with Nodes() as started:
        started.add(1, {})
        driver = subprocess.Popen(
            [*DRIVER, "growing", str(tmp_path)],
            env={**started.environment, "RAY_ADDRESS": started.address},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        while not [*tmp_path.iterdir()]:
            assert driver.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(0.1)
        started.add(2, {})
        output, _ = driver.communicate(timeout=DEADLINE_SECONDS)
        assert driver.returncode == 0
    found = json.loads(output.splitlines()[-1])
    assert found["units"] == list(range(40))
    assert len(found["nodes"]) == 2
