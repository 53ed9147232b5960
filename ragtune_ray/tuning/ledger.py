r"""What a run in steps has done so far: a file that anyone can read, and from which the same command goes on.

In: the facts of a finished step. Out: `ledger.jsonl`, one line per step in the order in which they ended, and a table of the
rounds that were judged. Lines are added, never changed. A step that stands in the ledger is not done again: its facts are taken
from there. This module knows nothing of what steps do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ragtune_ray import RagtuneError
from ragtune_ray.storage import failpoints, filesystem

__all__ = ["Ledger", "LedgerError", "Row", "judged_rows", "ledger_lines"]

Row = dict[str, Any]
"""A line of a ledger: `round`, `step`, `seconds`, and what the step gave."""


class LedgerError(RagtuneError, RuntimeError):
    """A ledger is damaged; the message names file and line."""


class Ledger:
    """The steps of one run.

    Args:
        url: the file; it need not exist yet.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.rows: list[Row] = _read(url)

    def step(self, number: int, name: str, work: Callable[[], Mapping[str, Any]]) -> Row:
        """Do a step, unless it is done.

        Args:
            number: of the round.
            name: of the step; unique in its round.
            work: does it, and gives what later steps need, as JSON values. It may be killed and done again.

        Returns:
            What `work` gave, in this run or an earlier one.
        """
        for row in self.rows:
            if (row["round"], row["step"]) == (number, name):
                return row
        started = time.monotonic()
        facts = dict(work())
        failpoints.reach("tune.worked")
        row = {"round": number, "step": name, **facts, "seconds": round(time.monotonic() - started, 3)}
        # As it will be read: a resumed run must not see tuples where this one does.
        self.rows.append(json.loads(json.dumps(row, allow_nan=False)))
        filesystem.replace_text(self.url, self.text())
        failpoints.reach("tune.noted")
        return self.rows[-1]

    def text(self) -> str:
        """The content of the file."""
        return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.rows)

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return float(sum(row["seconds"] for row in self.rows))


def _read(url: str) -> list[Row]:
    if not filesystem.exists(url):
        return []
    rows = []
    # Not splitlines: it also splits at separators such as U+2028, which JSON text may hold as they are.
    for number, line in enumerate(filesystem.read_text(url).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["round"], row["step"], row["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{url}:{number}: is no step of a ledger; remove this line and those after it, and run the command again"
            ) from error
        rows.append(row)
    return rows


def judged_rows(rows: Sequence[Row]) -> list[Row]:
    """The steps that ended in a verdict."""
    return [row for row in rows if "accepted" in row]


def ledger_lines(rows: Sequence[Row]) -> list[str]:
    """The verdicts as a table, for a terminal.

    >>> facts = {"component": "generator", "num_examples": 9, "metric": "EM", "before": 0.1, "after": 0.3}
    >>> facts |= {"low": 0.1, "high": 0.3, "accepted": True, "reason": "better", "seconds": 5.0, "round": 1, "step": "gate"}
    >>> ledger_lines([facts])[1]
    '    1  generator        9  EM                  0.100 -> 0.300  +0.200 [+0.100, +0.300]  accepted         5  better'
    """
    head = f"{'round':>5}  {'component':<10}  {'learnt':>6}  {'metric':<16}  {'before':>7} -> {'after':<5}"
    lines = [f"{head}  {'gain':<23}  {'verdict':<9}  {'seconds':>7}  why"]
    for row in judged_rows(rows):
        scored = "-".rjust(16) + " " * 25
        if row.get("after") is not None:
            gain = f"{row['after'] - row['before']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            scored = f"{row['before']:>7.3f} -> {row['after']:.3f}  {gain:<23}"
        spent = sum(each["seconds"] for each in rows if _led_to(each, row))
        lines.append(
            f"{row['round']:>5}  {row['component']:<10}  {row['num_examples']:>6,}  {row.get('metric', ''):<16}  {scored}  "
            f"{'accepted' if row['accepted'] else 'refused':<9}  {spent:>7,.0f}  {row['reason']}"
        )
    return lines


def _led_to(step: Row, verdict: Row) -> bool:
    """Whether a step belongs to what the verdict is about; one that both components share belongs to both."""
    components = [step.get("component"), *step.get("components", ())]
    return bool(step["round"] == verdict["round"] and verdict["component"] in components)
