"""Decides which questions need no retrieval, because the generator is confident enough of its closed-book answer.

Confidence is the geometric mean of the token probabilities, as in FLARE (Jiang et al. 2023) but over the whole answer. The
threshold is measured on validation questions.
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
from ragtune_ray.evaluation.retrieval_fit import RetrievalFit
from ragtune_ray.evaluation.search_fit import SearchFit
from ragtune_ray.storage import artifacts, filesystem

NUM_THRESHOLDS = 10
"""Number of thresholds tried: they leave a tenth, two tenths, ... of the questions without retrieval."""
MIN_CONFIDENT = 30
"""A threshold is judged on at least this many confident questions."""


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
    """Fingerprint of the calibrated generator; the threshold applies to no other."""


def calibrate(
    confidences: npt.ArrayLike,
    closed_book: npt.ArrayLike,
    retrieved: npt.ArrayLike,
    *,
    margin: float,
    confidence: float,
) -> RetrievalCalibration:
    """Find the lowest threshold at which closed-book answers are not worse by more than a margin.

    `NUM_THRESHOLDS` confidences are tried, and the interval of the paired difference (`significance.difference_ends`) must be
    above -margin. It is widened for the number of thresholds (Bonferroni; `confidence` is that of all intervals together). All
    arrays are (num_queries,); the confidence of an answer that must not be used is 0.

    >>> confidences = [0.9] * 400 + [0.2] * 400
    >>> closed_book, retrieved = [1.0] * 400 + [0.0] * 400, [1.0] * 800
    >>> found = calibrate(confidences, closed_book, retrieved, margin=0.02, confidence=0.95)
    >>> found.threshold, found.share
    (0.9, 0.5)
    """
    arrays = (np.asarray(values, dtype=np.float64) for values in (confidences, closed_book, retrieved))
    confident, closed, opened = arrays
    if not len(confident):
        return RetrievalCalibration(None, 0.0, None)
    each = 1 - (1 - confidence) / NUM_THRESHOLDS
    shares = np.arange(NUM_THRESHOLDS) / NUM_THRESHOLDS
    thresholds = {float(value) for value in np.quantile(confident, shares, method="higher")}
    for threshold in sorted(thresholds - {0.0}):
        kept = confident >= threshold
        if kept.sum() < MIN_CONFIDENT:
            break
        differences = closed[kept] - opened[kept]
        value, n = float(differences.mean()), len(differences)
        low, high = significance.difference_ends(value, float(differences.std(ddof=1)), n, each)
        if low >= -margin:
            return RetrievalCalibration(threshold, float(kept.mean()), intervals.Interval(value, low, high, n))
    return RetrievalCalibration(None, 0.0, None)


def is_confident_enough(answer: schema.Answer, calibration: RetrievalCalibration) -> bool:
    """Whether a closed-book answer is used: it is from the calibrated generator, with enough confidence."""
    threshold = calibration.threshold
    return threshold is not None and answer.model == calibration.model and confidence_of(answer) >= threshold


def confidence_of(answer: schema.Answer) -> float:
    """Confidence of the generator, 0 to 1; 0 if it abstained or failed, since such an answer must not be used."""
    return 0.0 if answer.abstained or answer.status != "ok" else answer.confidence or 0.0


def publish_calibration(
    settings: config.Config,
    name: str,
    calibration: RetrievalCalibration,
    fit: RetrievalFit | None = None,
    searches: SearchFit | None = None,
    **facts: Any,
) -> str:
    """Write a calibration of the arm `answer.arm`, and the fits of its retrieval if there are any, and make it the current one.

    Returns its directory.
    """
    folder = _folder(settings)
    url = filesystem.join(folder, name)
    if not artifacts.is_finished(url):
        staging = artifacts.stage(url)
        text = json.dumps(dataclasses.asdict(calibration), indent=1) + "\n"
        (staging / "calibration.json").write_text(text, encoding="utf-8")
        for name_of_file, fitted in (("retrieval.json", fit), ("searches.json", searches)):
            if fitted is not None:
                text = json.dumps(dataclasses.asdict(fitted), indent=1) + "\n"
                (staging / name_of_file).write_text(text, encoding="utf-8")
        artifacts.publish(staging, url, "calibration", config=settings.model_dump(mode="json"), **facts)
    artifacts.make_current(folder, name)
    return url


def read_calibration(settings: config.Config) -> RetrievalCalibration | None:
    """The current calibration of the arm `answer.arm`, or None; raises ArtifactError if it is damaged."""
    url = current_calibration(settings)
    return None if url is None else load_calibration(url)


def current_calibration(settings: config.Config) -> str | None:
    """The directory of the current calibration of the arm `answer.arm`; None if it has none. Cheap."""
    return artifacts.current(_folder(settings))


def load_calibration(url: str) -> RetrievalCalibration:
    """Read the calibration in a directory; raises ArtifactError if it is damaged."""
    path = artifacts.open_artifact(url, "calibration").path
    found: dict[str, Any] = json.loads((path / "calibration.json").read_text(encoding="utf-8"))
    difference = found.pop("difference")
    return RetrievalCalibration(**found, difference=intervals.Interval(**difference) if difference else None)


def _folder(settings: config.Config) -> str:
    return filesystem.join(settings.workspace, "calibrations", settings.answer.arm)
