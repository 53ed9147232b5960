"""What a person reads in a terminal: score tables, answers with their sources, versions.

In: summaries, answers, manifests. Out: plain lines of at most 80 columns. This module knows nothing of where they go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ragtune_ray import schema

__all__ = ["answer_lines", "citation_lines", "difference_lines", "score_lines", "source_lines", "version_lines"]

WIDTH = 80

Summary = Mapping[str, Mapping[str, float]]


def score_lines(summaries: Mapping[str, Summary], differences: Mapping[str, Summary]) -> list[str]:
    r"""One line per metric, one column per arm and per difference, each value with its interval.

    >>> print("\n".join(score_lines({"rag": {"EM": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}}}, {})))
    metric                  n              rag
    EM                      8  0.500 [.25,.75]
    """
    columns = [*summaries.items(), *differences.items()]
    widths = [17 if name in summaries else 20 for name, _ in columns]
    names = list(dict.fromkeys(metric for summary in summaries.values() for metric in summary))
    lines = [
        f"{'metric':<21}{'n':>4}"
        + "".join(f"{name:>{width}}" for (name, _), width in zip(columns, widths, strict=True))
    ]
    for metric in names:
        cells = [_cell(summary.get(metric), signed=name in differences) for name, summary in columns]
        count = max(int(summary[metric]["n"]) for summary in summaries.values() if metric in summary)
        lines.append(f"{metric:<21}{count:>4}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return lines


def answer_lines(answer: schema.Answer, titles: Mapping[str, str]) -> list[str]:
    """A question, its answer and the passages it cites.

    Args:
        answer: a row of `answers.parquet`.
        titles: document_id -> title.
    """
    text = answer.answer if answer.status == "ok" else f"(failed: {answer.error})"
    lines = _wrapped("Q  ", answer.query) + _wrapped("A  ", text.strip() or "(empty)")
    for citation in answer.citations:
        lines += _wrapped("   cites ", _place(citation.document_id, citation.start, citation.end, titles))
    if not answer.citations and answer.passage_ids:
        lines += _wrapped("   cites nothing; was shown ", ", ".join(answer.passage_ids))
    return lines


def source_lines(passages: Sequence[schema.Passage], scores: Sequence[float]) -> list[str]:
    """The passages that an answer was shown, numbered as the answer cites them."""
    lines = []
    for number, (passage, score) in enumerate(zip(passages, scores, strict=False), start=1):
        place = f"{passage.document_id}, characters {passage.start}-{passage.end}, score {score:.3f}"
        lines += _wrapped(f"[{number}] ", f"{passage.title or passage.document_id} ({place})")
    return lines


def citation_lines(answer: schema.Answer) -> list[str]:
    """Which stretches of which documents the answer rests on."""
    places = [_place(each.document_id, each.start, each.end, {}) for each in answer.citations]
    return [line for place in places for line in _wrapped("cites ", place)]


def _place(document_id: str, start: int, end: int, titles: Mapping[str, str]) -> str:
    """A stretch of a document, by its title where that is known."""
    if document_id in titles:
        return f"{titles[document_id]} ({document_id}, characters {start}-{end})"
    return f"{document_id}, characters {start}-{end}"


def version_lines(manifests: Sequence[Mapping[str, Any]], current: str) -> list[str]:
    """One line per index version, oldest first; `*` marks the current one."""
    lines = [f"  {'number':<7}{'created':<17}{'documents':>9}{'passages':>10}  {'kind':<7}{'made by':<10}encoder"]
    for manifest in manifests:
        mark = "*" if manifest["version"] == current else " "
        made_by = f"to {manifest['restores']}" if "restores" in manifest else manifest.get("operation", "index")
        line = (
            f"{mark} {manifest['version']:<7}{manifest['created'][:16].replace('T', ' '):<17}"
            f"{manifest['num_documents']:>9,}{manifest['num_passages']:>10,}  {manifest['index_kind']:<7}{made_by:<10}"
        )
        name = str(manifest["encoder"]["model"])
        width = WIDTH - len(line)
        lines.append(line + (name if len(name) <= width else f"…{name[1 - width :]}"))
    return lines


def difference_lines(changes: Mapping[str, Sequence[str]], shown: int = 20) -> list[str]:
    """How many documents were added, removed and changed, and the first of each."""
    lines = []
    for kind, ids in changes.items():
        lines.append(f"{kind:<8} {len(ids):,}")
        lines += [line for name in ids[:shown] for line in _wrapped("  ", name)]
        if len(ids) > shown:
            lines.append(f"  ... and {len(ids) - shown:,} more (--json lists all)")
    return lines


def _cell(interval: Mapping[str, float] | None, *, signed: bool) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    # ".25" and "1.0" are as wide, so that a full score does not touch the column beside it.
    low, high = (
        re.sub(r"\b0\.", ".", f"{interval[name]:{sign}.2f}").replace("1.00", "1.0") for name in ("low", "high")
    )
    return f"{interval['value']:{sign}.3f} [{low},{high}]"


def _wrapped(start: str, text: str) -> list[str]:
    """Lines that fill a terminal, in which a Chinese character is two columns wide."""
    from rich.console import Console
    from rich.text import Text

    width = WIDTH - len(start)
    lines = Text(" ".join(text.split())).wrap(Console(width=width), width)
    indents = [start, *[" " * len(start)] * (len(lines) - 1)]
    return [(indent + line.plain).rstrip() for indent, line in zip(indents, lines, strict=True)] or [start.rstrip()]
