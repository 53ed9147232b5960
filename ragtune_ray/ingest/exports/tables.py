"""Rows of questions in files that are no list of JSON lines: delimited text, and JSON with one list."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from ragtune_ray.ingest.parsing import sheets
from ragtune_ray.ingest.parsing.text import clean, decode

_LISTS = ("examples", "questions", "queries", "rows", "test_cases", "goldens")
"""Names of the list in a JSON object, such as LlamaIndex' `examples`."""
_MAX_LITERAL_CHARACTERS = 100_000


def csv_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""The rows below the header, with their numbers. An empty cell is no value, and a cell like `["a", "b"]` is a list.

    >>> list(csv_rows(b"Question;Answer\nWho?;['Ann', 'Anna']\nWhy?;\n"))
    [(2, {'Question': 'Who?', 'Answer': ['Ann', 'Anna']}), (3, {'Question': 'Why?'})]

    Raises:
        ParseError: the text is in no known encoding, or is no delimited text.
    """
    ((_, rows),) = sheets.read_csv(clean(decode(data))).sheets
    header = [" ".join(cell.split()) for cell in rows[0]] if rows else []
    for number, row in enumerate(rows[1:], 2):
        yield number, {name: _cell(cell) for name, cell in zip(header, row, strict=False) if name and cell.strip()}


def listed(data: Any) -> list[Any] | None:
    """The rows of parsed JSON that is a list, or an object with one list of rows; None if it is neither.

    >>> listed({"examples": [{"query": "Who?"}]}), listed({"data": []})
    ([{'query': 'Who?'}], None)
    """
    if isinstance(data, list):
        return data
    if isinstance(data, dict):
        return next((data[name] for name in _LISTS if isinstance(data.get(name), list)), None)
    return None


def _cell(text: str) -> Any:
    """A list that JSON or Python wrote, or the text of the cell."""
    plain = text.strip()
    if not (plain.startswith("[") and plain.endswith("]")) or len(plain) > _MAX_LITERAL_CHARACTERS:
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(plain)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else text
    return text
