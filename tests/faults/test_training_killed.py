"""SIGKILL while training: the same steps on the same batches, and in the end the weights of a run that was left alone."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ragtune_ray.storage import artifacts
from tests.support.corpora import write_corpus, write_queries
from tests.support.processes import DEADLINE_SECONDS, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def settings(tmp_path: Path, generator: Path) -> dict[str, object]:
    write_corpus(tmp_path / "corpus.jsonl", 60)
    write_queries(tmp_path / "queries.jsonl", 60)
    return {
        "workspace": str(tmp_path / "workspace"),
        "corpus": {"path": str(tmp_path / "corpus.jsonl")},
        "queries": {"path": str(tmp_path / "queries.jsonl"), "split_by": "document"},
        "generator": {"model": str(generator)},
        "training": {
            "arm": "ft",
            "batch_examples": 4,
            "epochs": 6,
            "max_failures": 0,
            "precision": "float32",
            "learning_rate": 0.001,
            "checkpoint_steps": 10,
            "evaluate_steps": 20,
        },
    }


def weights(output: str) -> dict[str, torch.Tensor]:
    return load_file(Path(output.splitlines()[-1]) / "model.safetensors")


def test_a_killed_worker_and_torn_checkpoints_change_nothing(tmp_path: Path, run, generator_directory: Path) -> None:
    given = settings(tmp_path, generator_directory)
    undisturbed = run("train", given, f"workspace={tmp_path / 'undisturbed'}").wait()
    expected, facts = weights(undisturbed), artifacts.read_manifest(undisturbed.splitlines()[-1])

    work = tmp_path / "workspace" / "models" / ".work"

    def saved() -> list[str]:
        return sorted(path.parent.name for path in work.glob("*/train/step-*/manifest.json"))

    command = run("train", given)
    eventually(lambda: len(saved()) >= 2, command)
    (worker, *_) = command.workers("RayTrainWorker")
    worker.send_signal(signal.SIGKILL)
    assert command.process.wait(DEADLINE_SECONDS) == 1
    assert "run the command again" in command.log.read_text()

    # What a power cut leaves: the newest checkpoint cut short, the list of checkpoints torn.
    newest = max(work.glob("*/train/step-*"))
    (newest / "weights.safetensors").write_bytes((newest / "weights.safetensors").read_bytes()[:1000])
    (newest.parent / "checkpoint_manager_snapshot.json").write_text('{"torn": ')
    said = run("train", given).wait()
    assert f"{newest.name}" in said
    assert "the checkpoint before it is used" in said
    found = weights(said)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
    again = artifacts.read_manifest(said.splitlines()[-1])
    assert (again["num_steps"], again["best"]["step"]) == (facts["num_steps"], facts["best"]["step"])
