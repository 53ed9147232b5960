"""Shows a comparison in a terminal: verdict, table and differences, in lines of at most 80 columns."""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ragtune_ray.evaluation import comparison
from ragtune_ray.evaluation.comparison import Comparison
from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.report import table
from ragtune_ray.evaluation.verdict import Difference

WIDTH = 80
"""Columns of text for a terminal."""

_LABEL, _CELL, _CELLS = 20, 15, 4  # columns: a label and four cells fill a line
_QUOTED = 160  # characters of a question or an answer
# Characters that change the writing direction of the text after them.
_DIRECTIONS = re.compile(r"[\u202a-\u202e\u2066-\u2069]")


def comparison_lines(content: Mapping[str, Any]) -> list[str]:
    """Format the content of `comparison.json`: the verdict, a table of measures by arm, and the differences between arms.

    Raises:
        ComparisonError: a field is missing or has the wrong type, or a number is not finite.
    """
    facts = comparison.read(content)
    names = facts.names()
    lines = [*_verdict_lines(facts), *_contested_lines(facts)]
    losses = table.Group("Where the points are lost", tuple(table.losses(facts).values()))
    measured = [*table.groups(facts), losses, table.other_metrics(facts)]
    for start in range(0, len(names), _CELLS):
        lines += ["", *_table_lines(facts, measured, start)]
    if facts.differences:
        lines += ["", f"{'difference':<24}{'metric':<16}{'value and interval':>21}{'n':>7}"]
        lines += [line for each in facts.differences for line in _difference_lines(each)]
    lines += _variant_lines(facts)
    for name in names:
        lines += [line for text in facts.arms[name].violations for line in _paragraph(f"{_cut(name, 10):<11}", text)]
    return lines


def _verdict_lines(facts: Comparison) -> list[str]:
    count = facts.questions
    verdict = [("verdict", facts.verdict.headline), *(("", reason) for reason in facts.verdict.reason)]
    warnings = [("warning", text) for text in facts.verdict.warnings]
    questions = (
        f"{count.total:,} ({count.kinds()}) of {facts.title}; brackets are {100 * facts.confidence:g} % intervals"
    )
    rows = [*verdict, *warnings, ("questions", questions)]
    return [line for name, text in rows for line in _paragraph(f"{name:<11}", text)]


def _contested_lines(facts: Comparison) -> list[str]:
    """The metrics that see another arm ahead, each with the question on which it and the deciding metric differ most."""
    lines = []
    for each in facts.contested:
        lines += _paragraph("metrics    ", table.contested_sentence(each))
        for question in each.questions[:1]:
            gold = f" (gold: {' or '.join(question.gold)})" if question.gold else ""
            lines += _paragraph("           ", _cut(f"{question.query}{gold}", _QUOTED))
            for name in (each.against, each.arm):
                if answer := question.answers.get(name):
                    scores = (
                        f"{table.metric_label(facts.metric)} {answer.score:.2f}, "
                        f"{table.metric_label(each.metric)} {answer.other:.2f}"
                    )
                    lines += _paragraph("             ", f"{_cut(name, 20)} ({scores}): {_cut(answer.text, _QUOTED)}")
    return lines


def _table_lines(facts: Comparison, groups: Sequence[table.Group], start: int) -> list[str]:
    """The measures of the arms from number `start` that fit into a line."""
    lines = _heading_lines(facts, facts.names()[start : start + _CELLS])
    for group in groups:
        rows = [dataclasses.replace(row, cells=row.cells[start : start + _CELLS]) for row in group.rows]
        if any(cell for row in rows for cell in row.cells):
            lines += _paragraph("", f"{group.name}, {group.note}" if group.note else group.name)
            lines += [line for row in rows for line in _row_lines(row)]
    return lines


def _heading_lines(facts: Comparison, shown: Sequence[str]) -> list[str]:
    """The names of arms; `*` marks the recommended one."""
    chosen = facts.verdict.arm if facts.verdict.outcome == "recommended" else ""
    names = [f"{_cut(name, _CELL - 2)}{'*' if name == chosen else ''}" for name in shown]
    mark = "* recommended" if chosen in shown else ""
    return [(f"{mark:<{_LABEL}}" + "".join(f"{name:>{_CELL}}" for name in names)).rstrip()]


def _row_lines(row: table.Row) -> list[str]:
    """A label and its cells; if a cell is too narrow for value and interval, the interval is below the value."""
    cells = [_cell_texts(cell) for cell in row.cells]
    joined = [" ".join(filter(None, cell)) for cell in cells]
    columns = [textwrap.wrap(row.label, _LABEL - 2)] + (
        [[text] for text in joined] if max(map(len, joined)) < _CELL else [list(cell) for cell in cells]
    )
    lines = (
        (f" {label:<{_LABEL - 1}}" + "".join(f"{_cut(text, _CELL - 1):>{_CELL}}" for text in texts)).rstrip()
        for label, *texts in itertools.zip_longest(*columns, fillvalue="")
    )
    return [line for line in lines if line]


def _cell_texts(cell: table.Cell | None) -> tuple[str, str]:
    """A value and its detail; shares with two decimals, so that their interval fits."""
    if cell is None:
        return "-", ""
    if cell.interval is None:
        return cell.text.replace("−", "-"), cell.detail.replace("−", "-")
    return f"{cell.interval.value:.2f}", _ends(cell.interval)


def _difference_lines(each: Difference) -> list[str]:
    """One difference; long names of arms are in a line of their own."""
    names = f"{each.arm} - {each.against}"
    above = [f"{_cut(each.arm, 38)} - {_cut(each.against, 38)}"] if len(names) > 23 else []
    names = "" if above else names
    value = f"{each.value:+.3f} {_ends(each, '+')}"
    metric = _cut(table.metric_label(each.metric), 15)
    return [*above, f"{names:<24}{metric:<16}{value:>21}{each.n:>7} {table.conclusion(each)}"]


def _variant_lines(facts: Comparison) -> list[str]:
    """The settings of retrieval that were tried, best first, with their scores on validation questions."""
    found = facts.variants
    if found is None:
        return []
    lines = ["", *_paragraph("variants   ", table.variants_sentence(found))]
    lines.append(f"{'variant':<19}{table.metric_label(facts.metric):<17}{'n':>5}  settings")
    for name in found.names():
        score = found.variants[name].score
        start = f"  {_cut(name, 16):<17}{score.value:.3f} {_ends(score):<10} {score.n:>5,}  "
        lines += _paragraph(start, table.variant_settings(found.variants[name]))
    return lines


def _ends(interval: Interval | Difference, sign: str = "") -> str:
    """Both ends with two decimals, without the 0 before the point.

    >>> _ends(Interval(value=0.5, low=0.25, high=1, n=8))
    '[.25,1.0]'
    """
    low, high = (f"{end:{sign}.2f}".replace("1.00", "1.0") for end in (interval.low, interval.high))
    return re.sub(r"\b0\.", ".", f"[{low},{high}]")


def _paragraph(start: str, text: str) -> list[str]:
    return wrapped(start, _DIRECTIONS.sub("\N{REPLACEMENT CHARACTER}", text))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def wrapped(start: str, text: str) -> list[str]:
    """`start` and `text` in lines as wide as a terminal; a Chinese character counts as two columns.

    >>> wrapped("A  ", "word " * 20)[1]
    '   word word word word word'
    """
    from rich.console import Console
    from rich.text import Text

    width = WIDTH - len(start)
    lines = Text(" ".join(text.split())).wrap(Console(width=width), width)
    indents = [start, *[" " * len(start)] * (len(lines) - 1)]
    return [(indent + line.plain).rstrip() for indent, line in zip(indents, lines, strict=True)] or [start.rstrip()]
