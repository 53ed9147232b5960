"""The confidence threshold for skipping retrieval, against hand computation."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ragtune_ray import config, schema
from ragtune_ray.evaluation import adaptive, intervals
from ragtune_ray.evaluation.retrieval_fit import RetrievalFit, Tried
from ragtune_ray.storage import artifacts

RULE = {"margin": 0.02, "confidence": 0.95}
ANSWER = schema.Answer("q", "?", "yes", (), (), (), False, 0.1, 9, 1, "ok", "", "", "model", 0.8)
FOUND = adaptive.RetrievalCalibration(0.75, 0.5, intervals.Interval(0.1, 0.0, 0.2, 40), "model")


def test_lowest_threshold_without_loss_is_found() -> None:
    confidences = np.arange(2000) / 2000
    closed = (confidences >= 0.6).astype(float)  # right from there on, as the answers with passages always are
    found = adaptive.calibrate(confidences, closed, np.ones(2000), **RULE)
    assert (found.threshold, found.share) == (0.6, 0.4)
    added = [1.0, -1.0] + [
        0.0
    ] * 800  # the interval is that of 800 equal answers, one gain and one loss, at 1 - .05 / 10
    half = stats.t.ppf(0.9975, 801) * stats.sem(added)
    assert found.difference is not None
    assert dataclasses.astuple(found.difference) == pytest.approx((0.0, -half, half, 800))


def test_few_confident_answers_give_no_threshold() -> None:
    found = adaptive.calibrate([0.9] * 100 + [0.1] * 100, [1.0] * 100 + [0.0] * 100, [1.0] * 200, **RULE)
    assert found.threshold is None


def test_no_threshold_where_passages_are_always_needed() -> None:
    confidences = np.arange(200) / 200
    assert adaptive.calibrate(confidences, np.zeros(200), np.ones(200), **RULE) == adaptive.RetrievalCalibration(
        None, 0.0, None
    )


def test_fewer_than_thirty_confident_answers_give_no_threshold() -> None:
    confidences = [0.9] * 29 + [0.1] * 29
    found = adaptive.calibrate(confidences, [1.0] * 29 + [0.0] * 29, [1.0] * 58, **RULE)
    assert found.threshold is None


def test_no_questions_give_no_threshold() -> None:
    assert adaptive.calibrate([], [], [], **RULE).threshold is None


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=60, max_size=120),
    st.floats(0, 0.2),
)
def test_skipping_retrieval_loses_at_most_the_margin(rows: list[tuple[float, bool, bool]], margin: float) -> None:
    sure, closed, opened = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    found = adaptive.calibrate(sure, closed, opened, margin=margin, confidence=0.95)
    if found.threshold is None:
        return
    kept = sure >= found.threshold
    assert found.threshold > 0
    assert kept.sum() >= 30
    assert found.share == kept.mean()
    assert (closed - opened)[kept].mean() >= -margin


@pytest.mark.parametrize(
    ("change", "is_used"),
    [
        ({}, True),
        ({"confidence": 0.75}, True),
        ({"confidence": 0.74}, False),
        ({"confidence": None}, False),
        ({"abstained": True}, False),
        ({"status": "failed"}, False),
        ({"model": "another"}, False),
    ],
)
def test_answer_is_used_only_if_confident_and_from_calibrated_model(change: dict[str, object], is_used: bool) -> None:
    assert adaptive.is_confident_enough(dataclasses.replace(ANSWER, **change), FOUND) is is_used


def test_calibration_is_read_back_for_its_arm_only(tmp_path: Path) -> None:
    settings = config.Config().using(f"workspace={tmp_path}")
    assert adaptive.read_calibration(settings) is None
    adaptive.publish_calibration(settings, "first", dataclasses.replace(FOUND, threshold=None, difference=None))
    adaptive.publish_calibration(settings, "second", FOUND)
    assert adaptive.read_calibration(settings) == FOUND
    assert adaptive.read_calibration(settings.using("answer.arm=rag+ft")) is None
    (tmp_path / "calibrations" / "rag" / "second" / "calibration.json").write_text("{}")
    with pytest.raises(artifacts.ArtifactError, match=r"calibration\.json"):
        adaptive.read_calibration(settings)


def test_the_fit_of_retrieval_lies_beside_the_calibration(tmp_path: Path) -> None:
    settings = config.Config(workspace=str(tmp_path))
    tried = Tried({"retrieval.mode": "lexical"}, 0.5, intervals.Interval(0.1, 0.05, 0.15, 40))
    fit = RetrievalFit("nDCG@10", 40, (tried,), {"retrieval.mode": "lexical"}, {1: 0.4, 10: 0.6})
    url = adaptive.publish_calibration(settings, "fitted", FOUND, fit)
    written = json.loads((Path(url) / "retrieval.json").read_text(encoding="utf-8"))
    assert written["tried"][0] == {
        "settings": {"retrieval.mode": "lexical"},
        "score": 0.5,
        "difference": {"value": 0.1, "low": 0.05, "high": 0.15, "n": 40},
    }
    assert (written["advised"], written["recalls"]) == ({"retrieval.mode": "lexical"}, {"1": 0.4, "10": 0.6})
    assert adaptive.read_calibration(settings) == FOUND
    assert not (Path(adaptive.publish_calibration(settings, "plain", FOUND)) / "retrieval.json").exists()
