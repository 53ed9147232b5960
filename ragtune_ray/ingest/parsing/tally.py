"""Counts per kind of file what was read, so that text that is lost shows.

In: parsed files and rejects of a unit. Out: counts as JSON values, which add up over units, and a table of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from ragtune_ray.ingest.parsing.text import ParsedFile, count_characters
from ragtune_ray.schema import Document, Reject

_ROW_PLACE = re.compile(r".*?(\.(?:jsonl|json|parquet|csv|xlsx))[:#][^/]*\Z", re.IGNORECASE | re.DOTALL)
Counts = dict[str, dict[str, int]]
"""Suffix -> `read`, `rejected` (files, or rows of .jsonl, .parquet and .json); and for files `kept_characters` of
`plain_characters`: letters and digits of the text, and of a plain extraction of everything visible."""


class Tally:
    """The counts of one unit."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def of(self, item: Document | Reject) -> None:
        """Count a document or reject."""
        if isinstance(item, Reject) and item.kind == "passage":
            return
        self._kind(item.place)["rejected" if isinstance(item, Reject) else "read"] += 1

    def characters(self, path: str, parsed: ParsedFile) -> None:
        """Count what was kept of a file. More than there is cannot be kept: numbers of lists are not in the plain text."""
        kind = self._kind(path)
        kind["plain_characters"] += parsed.plain_characters
        kept = parsed.text or "".join(str(value) for _, row in parsed.rows for value in row.values())
        kind["kept_characters"] += min(count_characters(kept), parsed.plain_characters)

    def counts(self) -> Counts:
        """The counts as JSON values."""
        return {kind: dict(counts) for kind, counts in self._counts.items()}

    def _kind(self, place: str) -> Counter[str]:
        return self._counts.setdefault(kind_of(place), Counter())


def kind_of(place: str) -> str:
    """The suffix of the file at a place.

    >>> [kind_of("a/b.JSONL:12"), kind_of("a/b.xlsx#A v1.2!3"), kind_of("a/b")]
    ['.jsonl', '.xlsx', '(none)']
    """
    in_rows = _ROW_PLACE.match(place)
    return in_rows[1].lower() if in_rows else PurePosixPath(place).suffix.lower() or "(none)"


def added(all_counts: Iterable[Counts]) -> Counts:
    """The sums of counts, by kind.

    >>> added([{".md": {"read": 1}}, {".md": {"read": 2, "rejected": 1}}])
    {'.md': {'read': 3, 'rejected': 1}}
    """
    sums: dict[str, Counter[str]] = {}
    for counts in all_counts:
        for kind, found in counts.items():
            sums.setdefault(kind, Counter()).update(found)
    return {kind: dict(sums[kind]) for kind in sorted(sums)}


def table(counts: Counts) -> Iterator[str]:
    """A line per kind, below a header.

    >>> for line in table({".md": {"read": 3, "plain_characters": 1000, "kept_characters": 999}}):
    ...     print(line)
    kind           read  rejected  kept of the letters and digits of a plain extraction
    .md               3         0  99.9 % of 1,000
    """
    yield f"{'kind':10}{'read':>9}{'rejected':>10}  kept of the letters and digits of a plain extraction"
    for kind, found in counts.items():
        plain = found.get("plain_characters", 0)
        kept = f"{found.get('kept_characters', 0) / plain:.1%} of {plain:,}".replace("%", " %") if plain else "-"
        yield f"{kind:10}{found.get('read', 0):>9,}{found.get('rejected', 0):>10,}  {kept}"
