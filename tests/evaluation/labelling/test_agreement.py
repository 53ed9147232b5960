"""Agreement against scikit-learn's kappa, and between people."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from ragtune_ray.evaluation.labelling.agreement import Agreement, agreement, between_labellers
from ragtune_ray.evaluation.labelling.labels import Label, Labels


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    one = generator.choice(3, 60, p=[0.5, 0.2, 0.3])
    other = np.where(generator.random(60) < 0.7, one, generator.integers(0, 3, 60))
    found = agreement(one / 2, other / 2)
    assert found.kappa == pytest.approx(cohen_kappa_score(one, other, weights="linear", labels=[0, 1, 2]))
    assert found.alike == int((one == other).sum())
    assert found.n == 60


def test_chance_and_constant_grades() -> None:
    assert agreement([0, 1, 0, 1], [0, 0, 1, 1]).kappa == 0
    assert agreement([1, 1], [1, 1]) == Agreement(2, 2, None)
    assert agreement([], []) == Agreement(0, 0, None)
    assert agreement([1, 1, 0], [0.75, 1, 0]).alike == 2, "one of two people saw it otherwise"


def test_agreement_of_many_answers_takes_little_memory() -> None:
    """Of 200,000 answers, every pair at once would be 320 GB."""
    generator = np.random.default_rng(0)
    one, other = generator.choice(3, (2, 200_000))
    found = agreement(one / 2, other / 2)
    assert found.kappa == pytest.approx(cohen_kappa_score(one, other, weights="linear", labels=[0, 1, 2]))
    scores = generator.random(50)  # a score with as many values as answers
    pairs = [abs(a - b) for a in one[:50] / 2 for b in scores]
    expected = 1 - float(np.abs(one[:50] / 2 - scores).mean()) / (sum(pairs) / 2500)
    assert agreement(one[:50] / 2, scores).kappa == pytest.approx(expected)


def test_people_agree_by_pairs_of_labels() -> None:
    def label(answer: str, grade: float, labeller: str) -> Label:
        return Label("q", "?", answer, grade, labeller, "")

    alone = Labels((label("a", 1.0, "ann"), label("a", 0.0, "ann")))
    assert between_labellers(alone) is None
    rows = (label("a", 0.0, "bob"), label("b", 1.0, "bob"), label("b", 1.0, "ann"), label("b", 0.5, "cid"))
    # a: ann 0, bob 0. b: ann 1, bob 1, cid 0.5.
    assert between_labellers(Labels((*alone.rows, *rows))) == agreement([0, 1, 1, 1], [0, 1, 0.5, 0.5])
