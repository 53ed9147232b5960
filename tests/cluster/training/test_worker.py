"""What a training worker does around each step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ragtune_ray import config
from ragtune_ray.cluster.training import train, worker
from ragtune_ray.models import hardware
from ragtune_ray.storage import artifacts
from ragtune_ray.training import optimization


def test_freed_memory_is_returned_every_twenty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    settings = config.Config().using("training.evaluate_steps=1000", "training.checkpoint_steps=1000")
    run: Any = SimpleNamespace(settings=settings, worker=1, num_steps=1000)
    monkeypatch.setattr(hardware, "return_freed_memory", lambda: given_back.append(run.step))
    for run.step in range(1, 51):
        worker._after_step(run)
    assert given_back == [20, 40]


def test_unreached_weights_are_found_on_the_training_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train.torch

    seen = []
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("meta"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda module, **_: module)
    monkeypatch.setattr(optimization, "freeze_unreached", lambda module, *_: seen.append(module.weight.device.type))
    worker._distribute(torch.nn.Linear(2, 2), config.Training(), [])
    assert seen == ["meta"]


def test_the_result_of_a_training_reads_its_metrics(tmp_path: Path) -> None:
    url = str(tmp_path / "model")
    staging = artifacts.stage(url)
    rows = [{"step": 0, "score": 0.5}, {"step": 1, "loss": 2.0}]
    (staging / worker.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifacts.publish(staging, url, "model", best={"step": 1, "score": 0.75})
    result = train.TrainResult(url)
    assert result.manifest["best"]["step"] == 1
    assert result.to_arrow().to_pylist() == [
        {"step": 0, "score": 0.5, "loss": None},
        {"step": 1, "score": None, "loss": 2.0},
    ]
