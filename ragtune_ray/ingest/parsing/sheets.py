"""Tables of spreadsheets (.xlsx) and of delimited text (.csv)."""

from __future__ import annotations

import csv
import datetime as dt
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ragtune_ray.ingest.parsing import marks
from ragtune_ray.ingest.parsing.archives import Package, open_package
from ragtune_ray.ingest.parsing.docx import stated
from ragtune_ray.ingest.parsing.text import ParsedFile, ParseError, Scalar, clean, count_characters

_IDS = ("document_id", "_id", "id")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_DELIMITERS = ",;\t|"
_SAMPLE = 64 * 2**10
_MAX_CELLS = 5_000_000
"""calamine takes memory for the whole rectangle that the cells of a sheet span, and a broken file may claim any place."""
_PLACE = re.compile(rb"""r=["']([A-Za-z]{1,3})([0-9]{1,7})["']""")
_LOOSE_PLACE = re.compile(rb"""r\s*=\s*["']\s*([A-Za-z]{1,3})([0-9]{1,7})""")


@dataclass(frozen=True, slots=True)
class Workbook:
    """The sheets of a file, and what it says about itself."""

    sheets: list[tuple[str, list[list[str]]]]
    """Name (empty for a .csv file) and rows of cells, the header first; rows without any text are left out."""
    title: str = ""
    metadata: dict[str, Scalar | list[Scalar]] | None = None


def parse(book: Workbook) -> ParsedFile:
    """The sheets of a file as Markdown tables, each below its name."""
    blocks = []
    plain = 0
    for name, rows in book.sheets:
        table = marks.table(rows)
        if table:
            blocks.append(f"{name}\n\n{table}" if name else table)
        plain += count_characters("".join("".join(row) for row in rows)) + (count_characters(name) if table else 0)
    return ParsedFile(book.title, clean("\n\n".join(blocks)), book.metadata or {}, plain_characters=plain)


def parse_rows(book: Workbook) -> ParsedFile:
    r"""The rows below the first of every sheet, by the names in the first.

    >>> parse_rows(Workbook([("", [["name", "year"], ["Phobos", "1877"]])])).rows
    [('2', {'name': 'Phobos', 'year': 1877, 'text': 'name: Phobos\nyear: 1877'})]
    """
    found = [row for name, rows in book.sheets for row in _as_documents(f"{name}!" if name else "", rows)]
    plain = sum(count_characters("".join(map("".join, rows[1:]))) for _, rows in book.sheets)
    return ParsedFile(book.title, "", book.metadata or {}, rows=found, plain_characters=plain)


def _as_documents(prefix: str, rows: list[list[str]]) -> Iterator[tuple[str, dict[str, Scalar]]]:
    header = _distinct(
        [" ".join(cell.split()) or f"column {place}" for place, cell in enumerate(rows[0], 1)] if rows else []
    )
    for number, row in enumerate(rows[1:], 2):
        cells = {name: clean(cell) for name, cell in zip(header, row, strict=False) if cell.strip()}
        texts = {"text", "title", *_IDS}
        values: dict[str, Scalar] = {name: cell if name in texts else _number(cell) for name, cell in cells.items()}
        if "text" not in cells:
            values["text"] = "\n".join(f"{name}: {cell}" for name, cell in cells.items() if name not in _IDS)
        yield f"{prefix}{number}", values


def _distinct(names: list[str]) -> list[str]:
    """The names of columns; one that an earlier column has gets the number of its column.

    >>> _distinct(["name", "name", "year"])
    ['name', 'name (column 2)', 'year']
    """
    return [f"{name} (column {place})" if name in names[: place - 1] else name for place, name in enumerate(names, 1)]


def _number(cell: str) -> Scalar:
    """The number that a cell contains, or its text; leading zeros belong to codes."""
    if not _NUMBER.fullmatch(cell) or len(cell) > 18:
        return cell
    return float(cell) if "." in cell else int(cell)


def read_xlsx(data: bytes, max_document_bytes: int) -> Workbook:
    """The sheets of a workbook, with the values that its formulas had when it was saved.

    Raises:
        ParseError: the file is broken, encrypted, too sparse, or unpacks to far more than `max_document_bytes`.
    """
    import python_calamine

    with open_package("XLSX", data, max_document_bytes) as package:
        _refuse_sparse(package)
        properties = package.properties()
        try:
            with python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(data)) as book:
                sheets = [(name, _texts(book.get_sheet_by_name(name).to_python())) for name in _names(book)]
        except python_calamine.CalamineError as error:
            raise ParseError(f"XLSX is broken: {error}") from None
        return Workbook(sheets, properties.get("title", ""), stated(properties))


def read_csv(text: str) -> Workbook:
    r"""The rows of delimited text; comma, semicolon, tab or bar, whichever divides most rows alike.

    >>> read_csv("a;b\n1,5;2\n").sheets
    [('', [['a', 'b'], ['1,5', '2']])]

    Raises:
        ParseError: a cell is longer than Python's csv module reads.
    """
    sample = text[:_SAMPLE].rpartition("\n")[0] or text[:_SAMPLE]
    delimiter = max(_DELIMITERS, key=lambda each: _agreement(sample, each))
    try:
        return Workbook([("", [row for row in _rows(text, delimiter) if any(row)])])
    except csv.Error as error:
        raise ParseError(f"CSV is broken: {error}") from None


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=False)


def _agreement(sample: str, delimiter: str) -> int:
    """The number of cells in rows of the most frequent width; 0 if the delimiter divides nothing."""
    try:
        widths = Counter(len(row) for row in _rows(sample, delimiter) if row)
    except csv.Error:
        return 0
    return max((width * count for width, count in widths.items() if width > 1), default=0)


def _names(book: Any) -> list[str]:
    from python_calamine import SheetTypeEnum

    return [sheet.name for sheet in book.sheets_metadata if sheet.typ == SheetTypeEnum.WorkSheet]


def _refuse_sparse(package: Package) -> None:
    for name in package.names:
        if not (name.startswith("xl/worksheets/") and name.endswith(".xml")):
            continue
        data = package.read(name)
        pattern = _LOOSE_PLACE if b" r =" in data or b'="\n' in data else _PLACE
        places = set(pattern.findall(data))
        rows = max((int(row) for _, row in places), default=0)
        columns = max((_column(letters) for letters in {letters.upper() for letters, _ in places}), default=0)
        if rows * columns > _MAX_CELLS and rows * columns > 10 * len(places):
            raise ParseError(
                f"XLSX: {name} has {len(places):,} cells in {rows:,} rows and {columns:,} columns; at most {_MAX_CELLS:,} places "
                "are read if so many are empty; delete the cells far from the others"
            )


def _column(letters: bytes) -> int:
    """The number of a column, from 1: `Z` is 26 and `AA` 27."""
    number = 0
    for letter in letters:
        number = number * 26 + letter - ord("A") + 1
    return number


def _texts(rows: Iterable[list[Any]]) -> list[list[str]]:
    texts = ([value if type(value) is str else _text(value) for value in row] for row in rows)
    return [row for row in texts if any(row)]


def _text(value: Any) -> str:
    """A cell as text: whole numbers without a fraction, dates in ISO format."""
    if type(value) is float:
        return f"{value:.15g}"
    if isinstance(value, bool):
        return str(value).upper()
    return value.isoformat() if isinstance(value, dt.date | dt.time) else str(value)
