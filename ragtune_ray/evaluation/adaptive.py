"""Decides which questions need no retrieval: those where the generator is confident enough of its closed-book answer.

Confidence is the geometric mean of the token probabilities, as in FLARE (Jiang et al. 2023) but over the whole answer. The
threshold is not assumed: it is measured on validation questions.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ragtune_ray import config, schema
from ragtune_ray.evaluation import intervals, significance
from ragtune_ray.storage import artifacts, filesystem

NUM_THRESHOLDS = 10
"""Number of thresholds tried: they leave a tenth, two tenths, ... of the questions without retrieval."""
MIN_CONFIDENT = 30
"""Fewer confident questions than this are too few to judge a threshold."""


@dataclass(frozen=True, slots=True)
class RetrievalCalibration:
    """When an arm answers without retrieval."""

    threshold: float | None
    """Least confidence of a closed-book answer that is used; None: every question needs retrieval."""
    share: float
    """Share of the validation questions that this leaves without retrieval."""
    difference: intervals.Interval | None
    """On these questions: scores without passages minus scores with passages. None without a threshold."""
    model: str = ""
    """Fingerprint of the calibrated generator; the threshold holds for no other."""


def calibrate(
    confidences: npt.ArrayLike,
    closed_book: npt.ArrayLike,
    retrieved: npt.ArrayLike,
    *,
    margin: float,
    confidence: float,
    resamples: int,
    seed: int,
) -> RetrievalCalibration:
    """Find the lowest threshold at which closed-book answers are not worse by more than a margin.

    That is the lowest of `NUM_THRESHOLDS` confidences where the interval of the paired difference is above -margin. Each interval
    is widened for the number of thresholds tried (Bonferroni) and for unseen losses (`significance.with_unseen`).

    >>> confidences = [0.9] * 400 + [0.2] * 400
    >>> closed_book, retrieved = [1.0] * 400 + [0.0] * 400, [1.0] * 800
    >>> found = calibrate(confidences, closed_book, retrieved, margin=0.02, confidence=0.95, resamples=200, seed=0)
    >>> found.threshold, found.share
    (0.9, 0.5)

    Args:
        confidences: (num_queries,) of the closed-book answers, 0 to 1; 0 for those that must not be used.
        closed_book: (num_queries,) scores of the closed-book answers.
        retrieved: (num_queries,) scores of the answers with passages.
        margin: a smaller loss does not matter.
        confidence: of all intervals together.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        metrics.MetricError: the rows differ in length, or one is empty.
    """
    sure, closed, opened = (np.asarray(values, dtype=np.float64) for values in (confidences, closed_book, retrieved))
    if not len(sure):
        return RetrievalCalibration(None, 0.0, None)
    each = 1 - (1 - confidence) / NUM_THRESHOLDS
    shares = np.arange(NUM_THRESHOLDS) / NUM_THRESHOLDS
    thresholds = {float(value) for value in np.quantile(sure, shares, method="higher")}
    for threshold in sorted(thresholds - {0.0}):
        kept = sure >= threshold
        if kept.sum() < MIN_CONFIDENT:
            break
        bootstrapped = intervals.paired_bootstrap(opened[kept], closed[kept], resamples, each, seed)
        found = significance.with_unseen(bootstrapped, closed[kept] - opened[kept], each)
        if found.low >= -margin:
            return RetrievalCalibration(threshold, float(kept.mean()), found)
    return RetrievalCalibration(None, 0.0, None)


def is_sure(answer: schema.Answer, calibration: RetrievalCalibration) -> bool:
    """Whether a closed-book answer is used: the calibrated generator gave it with enough confidence."""
    threshold = calibration.threshold
    return threshold is not None and answer.model == calibration.model and confidence_of(answer) >= threshold


def confidence_of(answer: schema.Answer) -> float:
    """Confidence of the generator, 0 to 1; 0 if it abstained or failed, since such an answer must not be used."""
    return 0.0 if answer.abstained or answer.status != "ok" else answer.confidence or 0.0


def publish_calibration(settings: config.Config, name: str, calibration: RetrievalCalibration, **facts: Any) -> str:
    """Write a calibration of the arm `answer.arm` and make it the current one; returns its directory."""
    folder = _folder(settings)
    url = filesystem.join(folder, name)
    if not artifacts.is_finished(url):
        staging = artifacts.stage(url)
        text = json.dumps(dataclasses.asdict(calibration), indent=1) + "\n"
        (staging / "calibration.json").write_text(text, encoding="utf-8")
        artifacts.publish(staging, url, "calibration", config=settings.model_dump(mode="json"), **facts)
    artifacts.make_current(folder, name)
    return url


def read_calibration(settings: config.Config) -> RetrievalCalibration | None:
    """The current calibration of the arm `answer.arm`; None if it has none.

    Raises:
        storage.ArtifactError: it is damaged.
    """
    url = current_calibration(settings)
    return None if url is None else load_calibration(url)


def current_calibration(settings: config.Config) -> str | None:
    """The directory of the current calibration of the arm `answer.arm`; None if it has none. Cheap."""
    return artifacts.current(_folder(settings))


def load_calibration(url: str) -> RetrievalCalibration:
    """Read the calibration in a directory.

    Raises:
        storage.ArtifactError: it is damaged.
    """
    path = artifacts.open_artifact(url, "calibration").path
    found: dict[str, Any] = json.loads((path / "calibration.json").read_text(encoding="utf-8"))
    difference = found.pop("difference")
    return RetrievalCalibration(**found, difference=intervals.Interval(**difference) if difference else None)


def _folder(settings: config.Config) -> str:
    return filesystem.join(settings.workspace, "calibrations", settings.answer.arm)
