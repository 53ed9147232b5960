"""Grades an answer by its meaning: the cosine of answer and gold answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ragtune_ray.evaluation.grading.task import Grade, Task
from ragtune_ray.models.encoder import Encoder


class SemanticGrader:
    """`semantic`: the cosine of an answer and the closest gold answer, by the encoder of the config.

    A negative cosine counts as 0. Texts are encoded as passages, without the prefix of queries: answer and gold answer are of
    one kind. An encoder of passages sees whether two texts are about the same thing, and hardly sees a negation or another
    number (docs/comparing.md has figures).
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def grade(self, tasks: Sequence[Task]) -> list[Grade]:
        """One grade per task; each distinct text is encoded once."""
        texts = list(dict.fromkeys(text for task in tasks for text in (task.answer, *task.golds)))
        vectors = dict(zip(texts, self._encoder.encode_passages(texts), strict=True))
        return [_grade(vectors[task.answer], np.stack([vectors[gold] for gold in task.golds])) for task in tasks]


def _grade(answer: np.ndarray, golds: np.ndarray) -> Grade:
    cosine = float((golds @ answer).max())
    if not np.isfinite(cosine):
        return Grade(error="the encoder returned a vector that is not finite")
    return Grade({"semantic": min(1.0, max(0.0, cosine))})
