"""Fills splits so that they keep to their shares, and keeps the result in a file, so that no document changes its split.

A draw that treats each document alone, such as a hash, never moves a document when others are added, but is uneven where
documents have many questions. A draw that looks at all documents is even, but moves documents when others are added. Only a
record of earlier draws gives both: what was drawn before stays, and new documents go to the splits that lack questions.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.storage import checksums, filesystem

RECORD_FORMAT = 1
SPLITS = ("train", "validation", "test")
TOTAL = "questions"
"""The count that shares apply to first; the others of a group only decide between assignments that are equally good."""
TOLERANCE = 0.1
"""Relative distance of a split to its share up to which the other counts matter."""
_WEIGHTS = (16.0, 256.0, 4096.0)
"""Of the number of questions, relative to the other counts; the next is tried while a split is off by more than `TOLERANCE`."""
_MAX_PASSES = 10
_SWAPS = 10_000
"""Pairs that a pass may swap: all pairs of up to about 140 groups, and with more groups those near each other in size."""

Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SplitRecord:
    """A file that names the split of every group of documents drawn so far."""

    by: str
    seed: int
    identity: str
    """Digest of the first draw; it stays when groups are added."""
    groups: Mapping[str, str]
    """Group -> split."""

    @classmethod
    def of(cls, by: str, seed: int, groups: Mapping[str, str]) -> SplitRecord:
        """The record of a first draw."""
        return cls(by, seed, checksums.digest([by, seed, dict(sorted(groups.items()))]), groups)

    def text(self) -> str:
        """The content of the file: JSON with a list of groups per split, one group a line."""
        by_split: dict[str, list[str]] = {}
        for name, split in sorted(self.groups.items()):
            by_split.setdefault(split, []).append(name)
        facts = {"format": RECORD_FORMAT, "split_by": self.by, "split_seed": self.seed, "id": self.identity}
        return json.dumps({**facts, "groups": by_split}, ensure_ascii=False, indent=0) + "\n"


def read_record(url: str) -> SplitRecord | None:
    """The record at `url`; None if there is none.

    Raises:
        InputError: the file is not such a record, or names a group twice.
    """
    if not filesystem.exists(url):
        return None
    try:
        return _parsed(json.loads(filesystem.read_text(url)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{url}: is not a record of splits ({error}); restore it, or remove it with the models trained on its splits"
        ) from error


def _parsed(found: Any) -> SplitRecord:
    normalized = functools.partial(unicodedata.normalize, "NFC")  # as document ids are
    names = [(normalized(str(name)), str(split)) for split, members in found["groups"].items() for name in members]
    repeated = [name for name, times in Counter(name for name, _ in names).items() if times > 1]
    unknown = [split for split in found["groups"] if split not in SPLITS]
    if found["format"] != RECORD_FORMAT or repeated or unknown:
        raise ValueError(
            f"{repeated[0]!r} is in two splits"
            if repeated
            else f"{unknown[0]!r} is no split"
            if unknown
            else f"format {found['format']} is unknown"
        )
    return SplitRecord(str(found["split_by"]), int(found["split_seed"]), str(found["id"]), dict(names))


def fill(groups: Mapping[str, Counts], kept: Mapping[str, str], shares: Mapping[str, float]) -> dict[str, str]:
    """The split of every group: `kept` ones keep theirs, and the others bring the splits as near to their shares as possible.

    Groups are placed one at a time, large ones first, in the split that is the least full with them (as in scheduling: Graham
    1969); then single groups are moved and pairs swapped while that lowers the sum over counts of (actual - wanted)^2 / wanted
    (Pearson's chi-squared).

    Args:
        groups: name -> counts, of which `TOTAL` is the number of questions. Groups of similar size are placed in this order.
        kept: name -> split, of groups that are already placed.
        shares: split -> relative size. A split of share 0 stays empty.
    """
    open_splits = {split: share for split, share in shares.items() if share > 0}
    free = sorted((name for name in groups if name not in kept), key=lambda name: -groups[name][TOTAL].bit_length())
    tried = []
    for weight in _WEIGHTS if groups else ():
        filling = _Filling(groups, open_splits, weight)
        for name in groups.keys() & kept.keys():
            filling.place(name, kept[name])
        for name in free:
            filling.place(name, min(filling.splits, key=lambda split: filling.load(groups[name], split)))
        for _ in range(_MAX_PASSES):
            if not filling.improve(free):
                break
        tried.append(filling)
        if filling.distance() <= TOLERANCE:
            break
    return min(tried, key=_Filling.distance).found if tried else {}


class _Filling:
    """Splits while they are filled."""

    def __init__(self, groups: Mapping[str, Counts], shares: Mapping[str, float], weight: float) -> None:
        self.splits: Sequence[str] = list(shares)
        self.found: dict[str, str] = {}
        self._groups, self._weight = groups, weight
        totals: Counter[str] = Counter()
        for counts in groups.values():
            totals.update(counts)
        whole = sum(shares.values())
        self._wanted = {split: {k: share / whole * n for k, n in totals.items()} for split, share in shares.items()}
        self._actual = {split: dict.fromkeys(totals, 0) for split in shares}

    def place(self, name: str, split: str) -> None:
        """Put a group into a split, and take it out of the one that it was in."""
        for target, sign in ((self.found.get(name, ""), -1), (split, 1)):
            for kind, count in self._groups[name].items():
                if target in self._actual:  # a kept group may be in a split of share 0
                    self._actual[target][kind] += sign * count
        self.found[name] = split

    def load(self, counts: Counts, split: str) -> float:
        """How full a split is with these counts, relative to what is wanted: the weighted mean over the counts."""
        actual, wanted = self._actual[split], self._wanted[split]
        full = {kind: count * (actual[kind] + count) / wanted[kind] for kind, count in counts.items() if count}
        return sum(value * (self._weight if kind == TOTAL else 1.0) for kind, value in full.items())

    def change(self, counts: Counts, split: str, sign: int) -> float:
        """By how much the distance grows if these counts are added to a split (`sign` 1) or taken out of it (-1)."""
        actual, wanted, total = self._actual[split], self._wanted[split], 0.0
        for kind, count in counts.items():
            step = sign * count
            grown = step * (2 * (actual[kind] - wanted[kind]) + step) / wanted[kind] if count else 0.0
            total += grown * self._weight if kind == TOTAL else grown
        return total

    def distance(self) -> float:
        """The largest relative distance of a split to its share of the questions."""
        pairs = [(self._actual[split][TOTAL], self._wanted[split][TOTAL]) for split in self.splits]
        return max(abs(actual / wanted - 1) for actual, wanted in pairs)

    def improve(self, free: Sequence[str]) -> bool:
        """Move each group, and swap each pair of groups, where this lowers the distance; returns whether any was."""
        changed = False
        for name in free:
            counts, now = self._groups[name], self.found[name]
            left = self.change(counts, now, -1)
            others = [(self.change(counts, split, 1), split) for split in self.splits if split != now]
            if others and left + min(others)[0] < -1e-9:
                self.place(name, min(others)[1])
                changed = True
        reach = max(1, _SWAPS // max(1, len(free)))
        for place, one in enumerate(free):
            for other in free[place + 1 : place + 1 + reach]:
                changed = (self.found[one] != self.found[other] and self._swap(one, other)) or changed
        return changed

    def _swap(self, one: str, other: str) -> bool:
        first, second = self.found[one], self.found[other]
        more = Counter(self._groups[other])
        more.subtract(self._groups[one])
        if self.change(more, first, 1) + self.change(more, second, -1) >= -1e-9:
            return False
        self.place(one, second)
        self.place(other, first)
        return True
