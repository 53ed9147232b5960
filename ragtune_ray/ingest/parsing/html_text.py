"""Writes the tree of a page as text, in one pass: a line per block, Markdown tables, list numbers, raised digits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ragtune_ray.ingest.parsing import marks

BREAK, SPACE, LABEL = "\x1e", "\x1f", "\x1d"
"""A line break, a space that stays, and the beginning of a list item's number, since white space means nothing in HTML."""
CONTROLS = re.compile(f"[{BREAK}{SPACE}{LABEL}]")
"""These characters must not be in the page."""
_BLOCK_NAMES = (
    "address article aside blockquote br caption dd details dialog div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 "
    "h5 h6 header hr legend li main ol p pre section summary table tbody tfoot thead tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_ARRANGING = frozenset(["h1", "h2", "h3", "h4", "h5", "h6", "article", "section", "form"])
"""A table that contains one of these arranges the page."""
_LISTS = {"1": "decimal", "a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman"}


@dataclass(slots=True)
class _Table:
    rows: list[list[str]] = field(default_factory=list)
    pending: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Column -> rows below, and columns, that a cell above covers."""
    cell_start: int = -1
    """Where the text of the current cell begins; -1 outside cells."""
    first_cell: int = 0
    begin: int = 0
    is_data: bool = True


def write(body: Any) -> str:
    """The text of an element; script, style and furniture have been removed from it."""
    writer = _Writer()
    node, last = body, body.mem_id
    while True:
        if node.tag == "-text":
            writer.text(CONTROLS.sub(" ", node.text_content or ""))  # again: references such as &#29; are resolved now
        elif not node.tag.startswith(("-", "!")):
            writer.enter(node.tag, node)
            child = node.first_child
            if child is not None:
                node = child
                continue
            writer.leave(node.tag, node)
        while node.next is None or node.mem_id == last:
            if node.mem_id == last:
                return _lines("".join(writer.out))
            node = node.parent
            writer.leave(node.tag, node)
        node = node.next


def _lines(text: str) -> str:
    text = re.sub(r"[ \t\n\r\f]+", " ", text)
    text = re.sub(rf"({LABEL}[^ ]+ )[ {BREAK}]+(?!{LABEL})", r"\1", text)  # a number stands on the line of its item
    text = re.sub(rf"(?:{LABEL}[^ {LABEL}]* ?)+(?={BREAK}|$)", "", text)  # unless the item is empty
    text = re.sub(rf" ?{BREAK}[ {BREAK}]*", "\n", text).strip(" \n")
    return text.replace(SPACE, " ").replace(LABEL, "")


class _Writer:
    """Collects pieces of text; `out` is joined once at the end."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self._tables: list[_Table] = []
        self._lists: list[tuple[str, int]] = []
        self._padding = marks.Padding()
        self._num_pre = 0
        self._scripts: list[tuple[str, int]] = []
        """Open `sup` and `sub`, and where their text begins."""

    def text(self, text: str) -> None:
        if self._num_pre:
            text = text.replace("\r\n", "\n").replace("\n", BREAK).replace("\t", SPACE * 4).replace(" ", SPACE)
        self.out.append(text)

    def enter(self, tag: str, node: Any) -> None:
        """Begin an element."""
        if tag in _BLOCKS:
            self.out.append(BREAK)
        match tag:
            case "sup" | "sub":
                self._scripts.append((tag, len(self.out)))
            case "pre":
                self._num_pre += 1
            case "ol" | "ul" | "menu":
                form = "bullet" if tag != "ol" else _LISTS.get(node.attributes.get("type") or "1", "decimal")
                self._lists.append((form, _integer(node.attributes, "start", 1)))
            case "li":
                self._item(node)
            case "table":
                self._begin_table(node)
            case "tr" if self._tables:
                self._tables[-1].rows.append([])
            case "td" | "th" if self._tables:
                self._begin_cell()
            case _ if tag in _ARRANGING and self._tables:
                self._tables[-1].is_data = False

    def leave(self, tag: str, node: Any) -> None:
        """End an element."""
        match tag:
            case "sup" | "sub":
                self._end_script(node)
            case "pre":
                self._num_pre -= 1
            case "ol" | "ul" | "menu":
                self._lists.pop()
            case "td" | "th" if self._tables:
                self._end_cell(node)
            case "table":
                self._end_table()
        if tag in _BLOCKS:
            self.out.append(BREAK)

    def _item(self, node: Any) -> None:
        if not self._lists:
            return
        form, count = self._lists[-1]
        if form == "bullet":
            self.out.append(f"{LABEL}- ")
            return
        count = _integer(node.attributes, "value", count)
        self._lists[-1] = (form, count + 1)
        self.out.append(f"{LABEL}{marks.number(count, form)}. ")

    def _end_script(self, node: Any) -> None:
        tag, start = self._scripts.pop()
        if self._scripts:  # only the outermost one is marked
            return
        text = "".join(self.out[start:])
        before = self.out[start - 1] if start else ""
        del self.out[start:]
        if tag == "sub":
            self.out.append(marks.lowered(text))
        elif node.css_first("a") is not None:  # a reference to a footnote
            self.out.append(f"[{text.strip()}]" if text.strip().isalnum() else text)
        else:
            self.out.append(marks.raised(text, before))

    def _begin_table(self, node: Any) -> None:
        if self._tables:  # the table around this one arranges it
            self._tables[-1].is_data = False
        is_data = (node.attributes.get("role") or "") not in {"presentation", "none"}
        self._tables.append(_Table(begin=len(self.out), is_data=is_data))

    def _begin_cell(self) -> None:
        table = self._tables[-1]
        if not table.rows:
            table.rows.append([])
        if not table.first_cell:
            table.first_cell = len(self.out)
        table.cell_start = len(self.out)

    def _end_cell(self, node: Any) -> None:
        table = self._tables[-1]
        if table.is_data and table.cell_start >= 0:
            row = table.rows[-1]
            self._skip_covered(table, row)
            attributes = node.attributes
            covered = self._padding.take(_integer(attributes, "colspan", 1) - 1)
            num_rows = _integer(attributes, "rowspan", 1)
            if num_rows > 1:
                table.pending[len(row)] = (num_rows - 1, 1 + len(covered))
            row.append("".join(self.out[table.cell_start :]).replace(BREAK, " ").replace(LABEL, ""))
            row += covered
        table.cell_start = -1
        self.out.append(" ")

    def _skip_covered(self, table: _Table, row: list[str]) -> None:
        """Leave cells empty that a cell of an earlier row covers."""
        while len(row) in table.pending:
            rows, columns = table.pending.pop(len(row))
            if rows > 1:
                table.pending[len(row)] = (rows - 1, columns)
            if not (covered := self._padding.take(columns)):
                return
            row += covered

    def _end_table(self) -> None:
        table = self._tables.pop()
        if table.is_data and len(table.rows) > 1 and max(map(len, table.rows)) > 1:
            caption = self.out[table.begin : table.first_cell]
            del self.out[table.begin :]
            self.out += [*caption, BREAK, marks.table(table.rows).replace("\n", BREAK)]


def _integer(attributes: dict[str, str | None], name: str, default: int) -> int:
    value = attributes.get(name)
    return int(value) if value and re.fullmatch(r"\s*-?[0-9]{1,6}\s*", value) else default
