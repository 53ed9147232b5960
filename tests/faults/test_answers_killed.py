"""SIGKILL in the middle of bulk answering: every query is answered exactly once in the end."""

import dataclasses
import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ragtune_ray import config, schema
from ragtune_ray.answering.rewriting import write_searches
from ragtune_ray.cluster import staged_queries
from ragtune_ray.generation.generator import load_generator
from tests.support.corpora import write_corpus, write_queries
from tests.support.processes import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def settings(tmp_path: Path, generator: Path) -> dict[str, object]:
    write_corpus(tmp_path / "corpus.jsonl", 120)
    write_queries(tmp_path / "queries.jsonl", 120)
    return {
        "workspace": str(tmp_path / "workspace"),
        "corpus": {"path": str(tmp_path / "corpus.jsonl")},
        "queries": {"path": str(tmp_path / "queries.jsonl")},
        "encoder": {"model": "hashing-64"},
        "chunking": {"size_tokens": 32, "overlap_tokens": 4},
        "generator": {"model": str(generator), "precision": "float32", "max_new_tokens": 6},
        "prompt": {"max_tokens": 1500},
        "answer": {"unit_queries": 4},
        "cluster": {"generator_workers": 2},
    }


def essence(path: str) -> list[tuple[object, ...]]:
    rows = pq.read_table(Path(path) / "answers.parquet").to_pylist()
    return [(row["query_id"], row["answer"], tuple(row["passage_ids"]), row["status"]) for row in rows]


@pytest.mark.parametrize("shard_bytes", [2**33, 1])
def test_killed_workers_and_a_killed_driver_leave_every_answer_once(
    tmp_path: Path, run, generator_directory: Path, shard_bytes: int
) -> None:
    given = settings(tmp_path, generator_directory)
    given |= {"cluster": {"generator_workers": 2, "shard_bytes": shard_bytes}, "index": {"segment_passages": 100}}
    run("index", given).wait()
    undisturbed = run("answer", given, f"workspace={tmp_path / 'workspace'}").wait().splitlines()[-1]
    expected = essence(undisturbed)
    (Path(undisturbed) / "manifest.json").rename(tmp_path / "moved.json")
    for file in Path(undisturbed).iterdir():
        file.unlink()
    Path(undisturbed).rmdir()

    work = tmp_path / "workspace" / "runs" / ".work"
    for wanted in (4, 12):
        command = run("answer", given)
        eventually(lambda wanted=wanted: len(list(work.glob("answer-*/answers/unit-*.json"))) >= wanted, command)
        (worker, *_) = eventually(lambda command=command: command.workers("GenerateUnit"), command)
        worker.send_signal(signal.SIGKILL)
        count = len(list(work.glob("answer-*/answers/unit-*.json")))
        eventually(lambda count=count: len(list(work.glob("answer-*/answers/unit-*.json"))) >= count + 3, command)
        command.kill()
    said = run("answer", given).wait()
    assert "were finished by an earlier run and are skipped" in said
    found = essence(said.splitlines()[-1])
    assert sorted(row[0] for row in found) == sorted(f"q{number}" for number in range(120)), "as a multiset"
    assert found == expected


def test_a_driver_killed_while_follow_ups_are_rewritten_goes_on_with_the_units_that_are_left(
    tmp_path: Path, run, generator_directory: Path
) -> None:
    given = settings(tmp_path, generator_directory)
    rows = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()[:32]]
    said_before = [{"role": "user", "content": "Which vessels are there?"}, {"role": "assistant", "content": "Many."}]
    text = "".join(json.dumps({**row, "messages": said_before}) + "\n" for row in rows)
    (tmp_path / "queries.jsonl").write_text(text)
    given |= {"retrieval": {"rewrite": "generator"}, "cluster": {"generator_workers": 1, "encoder_workers": 1}}
    run("index", given).wait()
    command = run("retrieve", given)
    work = tmp_path / "workspace" / "runs" / ".work"
    eventually(lambda: len(list(work.glob("rewrite-*/searches/unit-*.json"))) >= 2, command)
    command.kill()
    finished = len(list(work.glob("rewrite-*/searches/unit-*.json")))
    assert 2 <= finished < 8
    said = run("retrieve", given).wait()
    assert f"rewrite: {4 * finished} of 32 queries were finished by an earlier run and are skipped" in said
    (published,) = (tmp_path / "workspace" / "runs").glob("rewrite-*/searches.parquet")
    found = list(schema.from_table(pq.read_table(published), schema.Searches))

    resolved = config.Config.model_validate(given)
    generator = load_generator(resolved.generator, generator_directory)
    expected = write_searches(staged_queries.selected_queries(resolved), generator, resolved)
    assert [dataclasses.replace(each, seconds=0.0) for each in found] == [
        dataclasses.replace(each, seconds=0.0) for each in expected
    ]
    assert all(each.completion_tokens for each in found)


POISON = '''
import os
import ragtune_ray.cluster.answering.workers as generating

def patched():
    """Run in every worker: the question about vessel5 kills the process that tries to answer it."""
    answer_tasks = generating.answer_tasks

    def deadly(tasks, *arguments):
        if any("vessel5?" in task.query.text for task in tasks):
            os._exit(1)
        return answer_tasks(tasks, *arguments)

    generating.answer_tasks = deadly
'''


def test_a_row_that_kills_its_worker_ends_as_a_failed_row(
    tmp_path: Path, generator_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run in a process of its own, since the Ray session needs a hook in its workers."""
    import subprocess
    import sys

    given = {
        **settings(tmp_path, generator_directory),
        "queries": {"path": str(tmp_path / "queries.jsonl"), "limit": 12},
    }
    (tmp_path / "poison.py").write_text(POISON)
    (tmp_path / "driver.py").write_text(
        f"""
import json, sys
sys.path.insert(0, {str(tmp_path)!r})
import ray
import poison
from ragtune_ray import config
from ragtune_ray.cluster.answering.answer import answer
from ragtune_ray.cluster.indexing.index import build_index

settings = config.Config.model_validate(json.loads({json.dumps(given)!r}))
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error",
         runtime_env={{"worker_process_setup_hook": poison.patched, "env_vars": {{"PYTHONPATH": {str(tmp_path)!r}}}}})
build_index(settings)
print(answer(settings))
ray.shutdown()
"""
    )
    result = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py")], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = pq.read_table(Path(result.stdout.splitlines()[-1]) / "answers.parquet").to_pylist()
    assert [row["query_id"] for row in rows] == [f"q{number}" for number in range(12)]
    failed = {row["query_id"]: row["error"] for row in rows if row["status"] == "failed"}
    assert failed == {"q5": "the worker process died on this row"}
