"""Which questions need no retrieval: those to which the generator is sure enough of its own, closed-book answer.

In: for validation questions, how sure the generator was of its closed-book answer, and what that answer and the one with
passages scored. Out: from which confidence on a closed-book answer is as good. The measure of sureness is the geometric mean of
the tokens' probabilities, as in FLARE (Jiang et al. 2023), here over the whole answer; what it is worth is not assumed but
measured. This module knows nothing of generators, servers or Ray.
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

__all__ = [
    "Calibration",
    "calibrate",
    "confidence_of",
    "current_calibration",
    "is_sure",
    "load_calibration",
    "publish_calibration",
    "read_calibration",
]

CUTS = 10
"""Confidences that are tried: those that leave a tenth, two tenths, ... of the questions without retrieval."""
FEWEST_QUESTIONS = 30
"""Of which a confidence must have been right on average: fewer say nothing."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """From which confidence on an arm answers without retrieval."""

    threshold: float | None
    """None: no confidence was found from which a closed-book answer is as good; every question is retrieved for."""
    share: float
    """Of the validation questions, those that this leaves without retrieval."""
    difference: intervals.Interval | None
    """On these: the closed-book answers' scores less those with passages. None where there is no threshold."""
    model: str = ""
    """Fingerprint of the generator that was asked: of another one this says nothing."""


def calibrate(
    confidences: npt.ArrayLike,
    closed_book: npt.ArrayLike,
    retrieved: npt.ArrayLike,
    *,
    margin: float,
    confidence: float,
    resamples: int,
    seed: int,
) -> Calibration:
    """The lowest confidence from which on closed-book answers are not worse by more than a margin.

    Of `CUTS` confidences that is the lowest for which a loss of more than `margin` lies below the interval of the paired
    difference. They are `CUTS` looks at the same questions, so each interval is as wide as that many need (Bonferroni), and no
    narrower than what so many questions may not show (`significance.with_unseen`).

    >>> sure = [0.9] * 400 + [0.2] * 400
    >>> found = calibrate(sure, [1.0] * 400 + [0.0] * 400, [1.0] * 800, margin=0.02, confidence=0.95, resamples=200, seed=0)
    >>> found.threshold, found.share
    (0.9, 0.5)

    Args:
        confidences: (num_queries,) of the closed-book answers, 0 to 1; 0 for those that must not stand.
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
        return Calibration(None, 0.0, None)
    each = 1 - (1 - confidence) / CUTS
    cuts = {float(value) for value in np.quantile(sure, np.arange(CUTS) / CUTS, method="higher")}
    for cut in sorted(cuts - {0.0}):
        kept = sure >= cut
        if kept.sum() < FEWEST_QUESTIONS:
            break
        bootstrapped = intervals.paired_bootstrap(opened[kept], closed[kept], resamples, each, seed)
        found = significance.with_unseen(bootstrapped, closed[kept] - opened[kept], each)
        if found.low >= -margin:
            return Calibration(cut, float(kept.mean()), found)
    return Calibration(None, 0.0, None)


def is_sure(answer: schema.Answer, calibration: Calibration) -> bool:
    """Whether a closed-book answer stands: given by the calibrated generator, and sure enough."""
    threshold, sure = calibration.threshold, confidence_of(answer)
    return threshold is not None and answer.model == calibration.model and sure >= threshold


def confidence_of(answer: schema.Answer) -> float:
    """How sure the generator was, 0 to 1; 0 where it abstained or failed, since such an answer must not stand."""
    return 0.0 if answer.abstained or answer.status != "ok" else answer.confidence or 0.0


def publish_calibration(settings: config.Config, name: str, calibration: Calibration, **facts: Any) -> str:
    """Make a calibration of the arm of `answer.arm` the one that is read from now on; its directory."""
    folder = _folder(settings)
    url = filesystem.join(folder, name)
    if not artifacts.is_finished(url):
        staging = artifacts.stage(url)
        text = json.dumps(dataclasses.asdict(calibration), indent=1) + "\n"
        (staging / "calibration.json").write_text(text, encoding="utf-8")
        artifacts.publish(staging, url, "calibration", config=settings.model_dump(mode="json"), **facts)
    artifacts.make_current(folder, name)
    return url


def read_calibration(settings: config.Config) -> Calibration | None:
    """The last calibration of the arm of `answer.arm`; None where there is none.

    Raises:
        storage.ArtifactError: it is damaged.
    """
    url = current_calibration(settings)
    return None if url is None else load_calibration(url)


def current_calibration(settings: config.Config) -> str | None:
    """The directory of the last calibration of the arm of `answer.arm`; None where there is none. Cheap."""
    return artifacts.current(_folder(settings))


def load_calibration(url: str) -> Calibration:
    """The calibration of a directory.

    Raises:
        storage.ArtifactError: it is damaged.
    """
    path = artifacts.open_artifact(url, "calibration").path
    found: dict[str, Any] = json.loads((path / "calibration.json").read_text(encoding="utf-8"))
    difference = found.pop("difference")
    return Calibration(**found, difference=intervals.Interval(**difference) if difference else None)


def _folder(settings: config.Config) -> str:
    return filesystem.join(settings.workspace, "calibrations", settings.answer.arm)
