"""The numbers that Word computes for list items and numbered headings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ragtune_ray.ingest.parsing import marks
from ragtune_ray.ingest.parsing.archives import integer

W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_LEVELS = 9


@dataclass(frozen=True, slots=True)
class _Level:
    form: str
    text: str
    start: int
    restarts: bool
    is_legal: bool
    """Numbers of upper levels are shown as digits."""


@dataclass(slots=True)
class _List:
    abstract: str
    starts: dict[int, int] = field(default_factory=dict)
    levels: dict[int, _Level] = field(default_factory=dict)
    """Levels that differ from those of `abstract`."""


@dataclass(frozen=True, slots=True)
class Style:
    """What a paragraph style says about names and numbers."""

    name: str
    parent: str
    list_id: str
    level: int | None


def read_styles(root: Any) -> dict[str, Style]:
    """Style id -> style, from `styles.xml`."""
    styles = {}
    for each in root.iterfind(f"{W}style") if root is not None else ():
        given = each.find(f"{W}pPr/{W}numPr")
        list_id, level = _number_of(given)
        styles[each.get(f"{W}styleId", "")] = Style(
            _value(each, "name").lower(), _value(each, "basedOn"), list_id, level
        )
    return styles


class Numbers:
    """Counts list items in the order of the document, as Word does."""

    def __init__(self, root: Any, styles: dict[str, Style]) -> None:
        self._styles = styles
        self._lists: dict[str, _List] = {}
        self._levels: dict[str, dict[int, _Level]] = {}
        self._by_style: dict[tuple[str, str], int] = {}
        self._counts: dict[str, dict[int, int]] = {}
        self._started: set[tuple[str, int]] = set()
        if root is not None:
            self._read(root)

    def _read(self, root: Any) -> None:
        links = {}
        for each in root.iterfind(f"{W}abstractNum"):
            name = each.get(f"{W}abstractNumId", "")
            self._levels[name] = {_level(level): _read_level(level) for level in each.iterfind(f"{W}lvl")}
            for level in each.iterfind(f"{W}lvl"):
                self._by_style[name, _value(level, "pStyle")] = _level(level)
            links[name] = _value(each, "numStyleLink")
        for each in root.iterfind(f"{W}num"):
            found = _List(_value(each, "abstractNumId"))
            for override in each.iterfind(f"{W}lvlOverride"):
                level = _level(override)
                start, whole = override.find(f"{W}startOverride"), override.find(f"{W}lvl")
                if whole is not None:
                    found.levels[level] = _read_level(whole)
                if start is not None:
                    found.starts[level] = integer(start.get(f"{W}val"), 1)
            self._lists[each.get(f"{W}numId", "")] = found
        for name, style in links.items():  # an abstract list may be that of a style
            target = self._lists.get(self._styles[style].list_id) if style in self._styles else None
            if target and not self._levels[name]:
                self._levels[name] = self._levels.get(target.abstract, {})

    def label(self, properties: Any, style_id: str) -> str:
        """The number or bullet before a paragraph, with a space; empty if it is in no list. Counts the paragraph."""
        list_id, level = _number_of(properties.find(f"{W}numPr") if properties is not None else None)
        if not list_id or level is None:
            style_list, style_level = self._of_style(style_id)
            list_id = list_id or style_list
            level = level if level is not None else style_level
        found = self._lists.get(list_id)
        if found is None:
            return ""
        level = 0 if level is None else level
        levels = self._levels.get(found.abstract, {}) | found.levels
        shown = levels.get(level)
        if shown is None:
            return ""
        counts = self._counted(list_id, found, levels, level)
        text = "-" if shown.form == "bullet" else _filled(shown, levels, counts)
        return f"{text} " if text else ""

    def _of_style(self, style_id: str) -> tuple[str, int | None]:
        seen = set()
        name = style_id
        while name in self._styles and name not in seen:
            seen.add(name)
            style = self._styles[name]
            if style.list_id:
                listed = self._lists.get(style.list_id)
                linked = self._by_style.get((listed.abstract, name)) if listed else None
                return style.list_id, linked if linked is not None else style.level
            name = style.parent
        return "", None

    def _counted(self, list_id: str, found: _List, levels: dict[int, _Level], level: int) -> dict[int, int]:
        counts = self._counts.setdefault(found.abstract, {})
        if level in found.starts and (list_id, level) not in self._started:
            counts[level] = found.starts[level] - 1
        self._started.add((list_id, level))
        counts[level] = counts.get(level, levels[level].start - 1) + 1
        for other in range(_LEVELS):
            if other > level and (other not in levels or levels[other].restarts):
                counts.pop(other, None)
            elif other < level and other not in counts and other in levels:
                counts[other] = levels[other].start
        return dict(counts)


def _filled(shown: _Level, levels: dict[int, _Level], counts: dict[int, int]) -> str:
    def count(match: re.Match[str]) -> str:
        place = int(match[1]) - 1
        form = "decimal" if shown.is_legal or place not in levels else levels[place].form
        return marks.number(counts.get(place, 1), form)

    return re.sub(r"%([1-9])", count, shown.text).strip()


def _read_level(element: Any) -> _Level:
    return _Level(
        form=_value(element, "numFmt") or "decimal",
        text=_value(element, "lvlText"),
        start=integer(_value(element, "start"), 1),
        restarts=_value(element, "lvlRestart") != "0",
        is_legal=element.find(f"{W}isLgl") is not None,
    )


def _number_of(element: Any) -> tuple[str, int | None]:
    if element is None:
        return "", None
    level = element.find(f"{W}ilvl")
    return _value(element, "numId"), None if level is None else integer(level.get(f"{W}val"), 0)


def _value(element: Any, name: str) -> str:
    found = element.find(f"{W}{name}")
    return "" if found is None else str(found.get(f"{W}val", ""))


def _level(element: Any) -> int:
    return integer(element.get(f"{W}ilvl"), 0)
