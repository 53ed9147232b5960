"""How often the decision rule recommends wrongly, rightly or not at all, by simulation.

    python -m bench.decision_rule [--draws 1000] [--cells quick|all]

Each draw invents the scores of every arm on n questions from distributions with known means, and asks `decision.decide`. A
recommendation is wrong if the arm is worse than the best by more than the margin (.02), and right otherwise. Arms share a part of
each question's difficulty, so their scores correlate as those of real arms do. The best arm is the dearest, the cheapest, or as
dear as all others (within `compare.cost_margin`); the other arms are all `gap` below it.

The last columns are about the intervals: the share of 95 % intervals of a pair that contain the true difference; and, with
`compare.until: decided`, the questions asked when decisions are tried on 50 questions, then after every batch.
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
from ragtune_ray.evaluation import decision
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.scoring import PerQuery
from ragtune_ray.evaluation.verdict import Evidence

Kind = Literal["EM", "F1", "skewed"]
Price = Literal["dearest", "cheapest", "equal"]
SETTINGS = config.Config().with_values({"compare.metric": "EM"})
NAMES = ("base", "ft", "rag", "rag+ft", "staged", "joint", "iterative", "domain")
"""Arms, from cheap to dear."""
BEST_MEAN = {"EM": 0.6, "F1": 0.6, "skewed": 0.95}


@dataclass(frozen=True, slots=True)
class Cell:
    """One situation of the simulation."""

    kind: Kind
    n: int
    arms: int
    gap: float
    """How far every other arm is below the best."""
    correlation: float
    """Of the arms' difficulty of a question."""
    best_is: Price
    """What the best arm costs, compared with the others."""

    def means(self) -> npt.NDArray[np.float64]:
        """The true mean of each arm."""
        means = np.full(self.arms, BEST_MEAN[self.kind] - self.gap)
        means[0 if self.best_is == "cheapest" else -1] = BEST_MEAN[self.kind]
        return means


def scores(cell: Cell, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """(arms, n): the scores of one draw. EM: 0 or 1; F1: 0, 1 or between; skewed: mostly 1, seldom far below."""
    shared = generator.standard_normal((1, cell.n))
    own = generator.standard_normal((cell.arms, cell.n))
    easy = ndtr(np.sqrt(cell.correlation) * shared + np.sqrt(1 - cell.correlation) * own)
    means = cell.means()[:, np.newaxis]
    match cell.kind:
        case "EM":
            found = easy > 1 - means
        case "F1":  # a quarter of the mass between 0 and 1, with mean 1/2
            ends = means - 0.125
            found = np.where(easy > 1 - ends, 1.0, np.where(easy > 0.75 - ends, 4 * (easy - (0.75 - ends)), 0.0))
        case "skewed":  # a share of 2 (1 - mean) of the questions has a score between 0 and 1
            lost = 2 * (1 - means)
            found = np.where(easy < lost, easy / lost, 1.0)
    return np.asarray(found, dtype=np.float64)


def decide(drawn: npt.NDArray[np.float64], *, equal: bool = False, any_time: bool = False) -> str:
    """The recommended arm; "" if there are too few questions. `equal`: the arms cost about as much, the last one least."""
    evidence = {}
    for name, column in zip(NAMES, drawn, strict=False):
        values: PerQuery = {str(place): {"EM": value} for place, value in enumerate(column.tolist())}
        place = NAMES.index(name)
        total = 100.0 - place if equal else 10.0 * (place + 1)
        evidence[name] = Evidence(values, Cost(0, 0, 0, total / 10, 10_000, total, "USD"), 1.0, 1.0, 1.0)
    found = decision.differences({name: each.scores for name, each in evidence.items()}, SETTINGS)
    verdict = decision.decide(evidence, found, SETTINGS, any_time=any_time)
    return "" if verdict.outcome == "too_few_questions" else verdict.arm


def simulate(cell: Cell, draws: int, seed: int) -> tuple[float, float, float, float]:
    """Shares of wrong, right and no recommendations, and of the intervals that contain the true difference."""
    generator = np.random.default_rng(seed)
    means, counts, covered = cell.means(), {"wrong": 0, "right": 0, "none": 0}, list[bool]()
    for _ in range(draws):
        drawn = scores(cell, generator)
        arm = decide(drawn, equal=cell.best_is == "equal")
        if not arm:
            counts["none"] += 1
        elif means[NAMES.index(arm)] < means.max() - SETTINGS.compare.margin - 1e-9:
            counts["wrong"] += 1
        else:
            counts["right"] += 1
        named: dict[str, PerQuery] = {
            name: {str(place): {"EM": value} for place, value in enumerate(column.tolist())}
            for name, column in zip(("base", "ft"), drawn[[0, -1]], strict=True)
        }
        (pair,) = decision.differences(named, SETTINGS)
        covered.append(pair.low <= means[-1] - means[0] <= pair.high)
    wrong, right, none = (counts[name] / draws for name in ("wrong", "right", "none"))
    return wrong, right, none, float(np.mean(covered))


def simulate_looks(cell: Cell, draws: int, batch: int, seed: int) -> tuple[float, float, float]:
    """Decisions after every batch until one stands: shares of wrong and right ones, and the mean share of n that was asked."""
    generator = np.random.default_rng(seed)
    means, wrong, right, asked = cell.means(), 0, 0, list[int]()
    for _ in range(draws):
        drawn = scores(cell, generator)
        looks = [*range(batch, cell.n, batch), cell.n]
        for look in looks:
            arm = decide(drawn[:, :look], any_time=True)
            if arm:
                break
        asked.append(look)
        if arm:
            is_wrong = means[NAMES.index(arm)] < means.max() - SETTINGS.compare.margin - 1e-9
            wrong, right = wrong + is_wrong, right + (not is_wrong)
    return wrong / draws, right / draws, float(np.mean(asked)) / cell.n


def main() -> None:
    """Print one line per cell and the extremes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--cells", choices=("quick", "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = (40, 300) if given.cells == "quick" else (20, 40, 100, 300, 2000)
    kinds: tuple[Kind, ...] = ("EM", "F1", "skewed")
    heads = "".join(f"{name:>7}" for name in ("wrong", "right", "none", "cover"))
    print(f"{'scores':<8}{'n':>6}{'arms':>6}{'gap':>6}{'corr.':>7}  {'best is':<10}{heads}")
    worst, least = 0.0, 1.0
    prices: tuple[Price, ...] = ("dearest", "cheapest", "equal")
    for kind, n, arms, gap, correlation, best_is in itertools.product(
        kinds, sizes, (2, 4, 8), (0.0, 0.01, 0.02, 0.05, 0.1), (0.5, 0.9), prices
    ):
        if kind == "skewed" and gap > 0.05:
            continue
        cell = Cell(kind, n, arms, gap, correlation, best_is)
        # No recommendation can be wrong where all arms are within the margin; and many scores take long.
        draws = given.draws // (1 if gap > SETTINGS.compare.margin else 5) // (5 if n > 300 else 1)
        seed = zlib.crc32(f"{given.seed} {cell}".encode())  # other draws in every cell
        wrong, right, none, cover = simulate(cell, draws, seed)
        worst, least = max(worst, wrong), min(least, cover)
        print(
            f"{kind:<8}{n:>6}{arms:>6}{gap:>6}{correlation:>7}  {best_is:<10}{wrong:>7.3f}{right:>7.3f}{none:>7.3f}{cover:>7.3f}",
            flush=True,
        )
    print(f"most wrong recommendations {worst:.3f}, least coverage {least:.3f}")
    print(f"\n{'until decided':<14}{'n':>6}{'arms':>6}{'gap':>6}  {'wrong':>7}{'right':>7}{'asked':>7}")
    for kind, arms, gap in itertools.product(kinds[:2], (2, 4), (0.0, 0.05, 0.1, 0.2)):
        cell = Cell(kind, 2000, arms, gap, 0.5, "dearest")
        wrong, right, asked = simulate_looks(cell, given.draws // 5, 100, given.seed)
        print(f"{kind:<14}{2000:>6}{arms:>6}{gap:>6}  {wrong:>7.3f}{right:>7.3f}{asked:>7.1%}", flush=True)


if __name__ == "__main__":
    main()
