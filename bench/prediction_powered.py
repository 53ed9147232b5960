"""How often the intervals that labels correct contain the truth, and how wide they are, by simulation.

    python -m bench.prediction_powered [--draws 500] [--questions 1000] [--only coverage|verdicts]

Each draw invents two arms' answers to 1,000 questions with grades right, partly or wrong (1, 0.5, 0) of known means, the grades
of a judge, and people's labels of a random part. The judge gives a share of the answers the right grade; its errors are

- even: one of the two other grades by chance;
- for one arm: always "right" for the better arm and "wrong" for the other;
- for length: "right" for the longer of the two answers and "wrong" for the shorter; the better arm's is longer in 7 of 10;
- in one case nearly all answers are right, so that errors are rare.

First, for the mean of the better arm and for the difference of both: the share of nominal 95 % intervals that contain the
truth, with the correction, with the labels alone (Student's t), and with the judge's grades as if they were true; and the mean
widths.

Then the verdict (`decision.decide`), where the judge's errors favour the worse arm, or favour none: shares of draws in which
the worse arm is recommended (wrong), the better and dearer one (right), or none, with and without the correction.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from ragtune_ray import config
from ragtune_ray.evaluation import decision, prediction_powered
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.evaluation.verdict import Evidence

SETTINGS = config.Config().with_values({"compare.metric": "judge"})
Errors = Literal["even", "for one arm", "against it", "for length", "rare"]
GRADES = np.array([0.0, 0.5, 1.0])
SHARES = {
    "rare": (np.array([0.05, 0.03, 0.92]), np.array([0.02, 0.02, 0.96])),
    "other": (np.array([0.35, 0.2, 0.45]), np.array([0.25, 0.2, 0.55])),
}
"""Shares of the three grades of either arm, the better one second."""
CORRELATION = 0.5
CONFIDENCE = 0.95

Grades = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Draw:
    """Of the mean of one arm or the difference of two."""

    people: Grades
    judge: Grades
    truth: float


def draw(errors: Errors, accuracy: float, n: int, generator: np.random.Generator) -> tuple[Draw, Draw]:
    """The better arm, and its difference to the other, of one draw."""
    shares = SHARES["rare" if errors == "rare" else "other"]
    shared = generator.standard_normal(n)
    is_longer = generator.random(n) < 0.7
    people, judge = [], []
    for arm, share in enumerate(shares):
        own = generator.standard_normal(n)
        easy = ndtr(np.sqrt(CORRELATION) * shared + np.sqrt(1 - CORRELATION) * own)
        true = np.searchsorted(np.cumsum(share)[:2], easy)
        match errors:
            case "for one arm":
                other = np.full(n, 2 * arm)
            case "against it":
                other = np.full(n, 2 - 2 * arm)
            case "for length":
                other = 2 * (is_longer if arm else ~is_longer).astype(np.int64)
            case _:
                other = (true + generator.integers(1, 3, n)) % 3
        is_wrong = generator.random(n) >= accuracy
        people.append(GRADES[true])
        judge.append(GRADES[np.where(is_wrong, other, true)])
    means = [float(share @ GRADES) for share in shares]
    return Draw(people[1], judge[1], means[1]), Draw(people[1] - people[0], judge[1] - judge[0], means[1] - means[0])


def _student(values: Grades) -> tuple[float, float]:
    n = len(values)
    error = float(np.std(values, ddof=1)) / np.sqrt(n)
    return prediction_powered.t_ends(float(values.mean()), error, n - 1, CONFIDENCE)


def intervals(drawn: Draw, labelled: npt.NDArray[np.int64]) -> list[tuple[float, float]]:
    """The interval with the correction, from the labels alone, and from the judge alone."""
    names = [str(place) for place in range(len(drawn.judge))]
    graded = dict(zip(names, drawn.judge.tolist(), strict=True))
    found = prediction_powered.estimate(graded, {names[place]: float(drawn.people[place]) for place in labelled})
    return [found.ends(CONFIDENCE), _student(drawn.people[labelled]), _student(drawn.judge)]


def simulate(errors: Errors, accuracy: float, labels: int, draws: int, n: int, seed: int) -> npt.NDArray[np.float64]:
    """(2, 3, 2): mean and difference; corrected, labels alone, judge alone; coverage and mean width."""
    generator = np.random.default_rng(seed)
    found = np.empty((draws, 2, 3, 2))
    for number in range(draws):
        both = draw(errors, accuracy, n, generator)
        labelled = generator.permutation(n)[:labels]
        for place, each in enumerate(both):
            for way, (low, high) in enumerate(intervals(each, labelled)):
                found[number, place, way] = (low <= each.truth <= high, high - low)
    return np.asarray(found.mean(axis=0))


def verdict(drawn: tuple[Draw, Draw], labelled: npt.NDArray[np.int64] | None) -> str:
    """The arm that is recommended, corrected by labels or, without them, by the judge; "" if there are too few questions."""
    better, difference = drawn
    evidence, labels = {}, {}
    for place, (arm, judge, people) in enumerate(
        (
            ("base", better.judge - difference.judge, better.people - difference.people),
            ("rag", better.judge, better.people),
        )
    ):
        scores: PerQuery = {str(number): {"judge": float(value)} for number, value in enumerate(judge)}
        if labelled is not None:
            labels[arm] = {str(number): float(people[number]) for number in labelled}
        cost = Cost(0, 0, 0, 1.0 + place, 10_000, 10.0 + place, "USD")
        evidence[arm] = Evidence(scores, cost, 1.0, 1.0, 1.0, labels=labels.get(arm))
    found = decision.differences({arm: each.scores for arm, each in evidence.items()}, SETTINGS, labels or None)
    made = decision.decide(evidence, found, SETTINGS)
    return "" if made.outcome == "too_few_questions" else made.arm


def print_verdicts(draws: int, n: int, seed: int) -> None:
    """A line per judge and number of labels."""
    print(f"{'errors':<13}{'accuracy':>8}{'labels':>8}{'wrong':>8}{'right':>8}{'none':>8}")
    kinds: tuple[Errors, ...] = ("even", "against it")
    for errors, accuracy, labels in itertools.product(kinds, (0.7, 0.85, 0.95), (0, 20, 50, 100, 200)):
        generator = np.random.default_rng(zlib.crc32(f"{seed} verdict {errors} {accuracy} {labels}".encode()))
        found = []
        for _ in range(draws):
            drawn = draw(errors, accuracy, n, generator)
            found.append(verdict(drawn, generator.permutation(n)[:labels] if labels else None))
        shares = "".join(f"{found.count(arm) / draws:>8.3f}" for arm in ("base", "rag", ""))
        print(f"{errors:<13}{accuracy:>8}{labels or 'none':>8}{shares}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("coverage", "verdicts"))
    given = parser.parse_args()
    if given.only != "verdicts":
        print_coverage(given.draws, given.questions, given.seed)
    if given.only != "coverage":
        print_verdicts(given.draws, given.questions, given.seed)


def print_coverage(draws: int, n: int, seed: int) -> None:
    """A line per judge, number of labels and estimated quantity."""
    ways = ("corrected", "labels", "judge")
    heads = "".join(f"{way:>11}" for way in ways)
    print(f"{'':<39}{'coverage':^33}  {'width':^33}")
    print(f"{'errors':<13}{'accuracy':>8}{'labels':>8}  {'of':<8}{heads}  {heads}")
    kinds: tuple[Errors, ...] = ("even", "for one arm", "for length", "rare")
    for errors, labels, accuracy in itertools.product(kinds, (20, 30, 50, 100, 200), (0.7, 0.85, 0.95)):
        cell = zlib.crc32(f"{seed} {errors} {labels} {accuracy}".encode())  # other draws in every cell
        found = simulate(errors, accuracy, labels, draws, n, cell)
        for name, rows in zip(("mean", "difference"), found, strict=True):
            coverage = "".join(f"{value:>11.3f}" for value in rows[:, 0])
            width = "".join(f"{value:>11.3f}" for value in rows[:, 1])
            print(f"{errors:<13}{accuracy:>8}{labels:>8}  {name:<10}{coverage[2:]}  {width}", flush=True)


if __name__ == "__main__":
    main()
