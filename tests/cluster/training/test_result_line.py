"""The last line of a training names the metric that decides, as it is: a loss is not shown as a negative score."""

from typing import Any, cast

import pytest

from ragtune_ray.cluster.training import train
from ragtune_ray.training.manifest import ModelManifest


@pytest.mark.parametrize(
    ("start", "best", "expected"),
    [
        ({"loss": 2.5, "score": -2.5}, {"step": 8, "loss": 1.25, "score": -1.25}, "best after step 8: validation loss 1.2500, at the start 2.5000"),
        ({"loss": 2.5, "score": -2.5}, {"step": 0, "loss": 2.5, "score": -2.5}, "no step was better than the start (validation loss 2.5000): the weights are unchanged"),
        ({"MRR@10": 0.5, "first_stage_weight": 0.1, "score": 0.5}, {"step": 1, "MRR@10": 0.75, "first_stage_weight": 0.2, "score": 0.75}, "best after step 1: validation MRR@10 0.7500, at the start 0.5000"),
    ],
)  # fmt: skip
def test_the_result_names_its_metric(
    start: dict[str, float], best: dict[str, float], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts: dict[str, Any] = {"num_steps": 10, "start": start, "best": best}
    train._say_result(cast(ModelManifest, facts))
    assert capsys.readouterr().err == f"train: 10 steps, {expected}\n"
