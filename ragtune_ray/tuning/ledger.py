r"""Records the finished steps of a tune in a readable file, from which the same command resumes.

Out: `ledger.jsonl`, one line per step in order of completion, and a table of the verdicts. Lines are appended, never changed. A
step in the ledger is not repeated; its recorded facts are returned.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ragtune_ray import RagtuneError
from ragtune_ray.storage import failpoints, filesystem

Row = dict[str, Any]
"""A line of a ledger: `round`, `step`, `seconds`, and the facts that the step returned."""


class LedgerError(RagtuneError, RuntimeError):
    """A ledger is damaged; the message names the file and the line."""


class Ledger:
    """The steps of one tune, recorded in the file `url`, which need not exist yet."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.rows: list[Row] = _read(url)

    def step(self, number: int, name: str, work: Callable[[], Mapping[str, Any]]) -> Row:
        """Run a step of round `number`, unless it is recorded as finished; return its facts, from now or from an earlier run.

        `work` runs the step and returns facts for later steps, as JSON values. It may be killed and run again.
        """
        for row in self.rows:
            if (row["round"], row["step"]) == (number, name):
                return row
        started = time.monotonic()
        facts = dict(work())
        failpoints.reach("tune.worked")
        row = {"round": number, "step": name, **facts, "seconds": round(time.monotonic() - started, 3)}
        # Through JSON, so that a tuple becomes a list here as in a resumed run.
        self.rows.append(json.loads(json.dumps(row, allow_nan=False)))
        filesystem.replace_text(self.url, self.text())
        failpoints.reach("tune.noted")
        return self.rows[-1]

    def text(self) -> str:
        """The content of the file."""
        return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.rows)

    @property
    def seconds(self) -> float:
        """Total time of all steps."""
        return float(sum(row["seconds"] for row in self.rows))


def _read(url: str) -> list[Row]:
    if not filesystem.exists(url):
        return []
    rows = []
    # Not splitlines, which also splits at separators such as U+2028 that JSON strings may contain.
    for number, line in enumerate(filesystem.read_text(url).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["round"], row["step"], row["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{url}:{number}: not a step of a ledger; remove this line and all after it, then run the command again"
            ) from error
        rows.append(row)
    return rows


def judged_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with a verdict."""
    return [row for row in rows if "accepted" in row]


def ledger_lines(rows: Sequence[Row]) -> list[str]:
    """The verdicts as a table for a terminal.

    >>> facts = {"component": "generator", "num_examples": 9, "metric": "EM", "before": 0.1, "after": 0.3}
    >>> facts |= {"low": 0.1, "high": 0.3, "accepted": True, "reason": "better", "seconds": 5.0, "round": 1, "step": "gate"}
    >>> ledger_lines([facts])[1]
    '    1  generator        9  EM                  0.100 -> 0.300  +0.200 [+0.100, +0.300]  accepted         5  better'
    """
    head = f"{'round':>5}  {'component':<10}  {'rows':>6}  {'metric':<16}  {'before':>7} -> {'after':<5}"
    lines = [f"{head}  {'gain':<23}  {'verdict':<9}  {'seconds':>7}  why"]
    for row in judged_rows(rows):
        scored = "-".rjust(16) + " " * 25
        if row.get("after") is not None:
            gain = f"{row['after'] - row['before']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            scored = f"{row['before']:>7.3f} -> {row['after']:.3f}  {gain:<23}"
        spent = sum(each["seconds"] for each in rows if _contributes_to(each, row))
        lines.append(
            f"{row['round']:>5}  {row['component']:<10}  {row['num_examples']:>6,}  {row.get('metric', ''):<16}  {scored}  "
            f"{'accepted' if row['accepted'] else 'refused':<9}  {spent:>7,.0f}  {row['reason']}"
        )
    return lines


def _contributes_to(step: Row, verdict: Row) -> bool:
    """Whether a step contributed to a verdict; a step of both components contributes to both."""
    components = [step.get("component"), *step.get("components", ())]
    return bool(step["round"] == verdict["round"] and verdict["component"] in components)
