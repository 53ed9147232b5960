"""Draws plots as inline SVG: points with error bars, a curve, intervals in rows, stacked bars.

Only CSS classes style a plot, so it follows the page's dark mode and print style and needs no inline styles.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH = 380
_TOP, _RIGHT, _BOTTOM, _LEFT = 14, 14, 40, 50
_LETTER = 6.6  # width of a letter, generous because fonts differ
_LOGARITHMIC_FROM = 30  # ratio of the largest to the smallest value

_SHAPES = ["M-5,0a5,5 0 1 0 10,0a5,5 0 1 0 -10,0Z", "M-4.5,-4.5h9v9h-9Z", "M0,-6L6,4.5H-6Z", "M0,-6.5L6,0L0,6.5L-6,0Z"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A value and the ends of its interval."""

    label: str
    kind: int
    """Selects colour and shape: 0 to 3; all higher numbers look the same."""
    value: float
    low: float
    high: float
    text: str = ""
    """The value as printed next to the interval."""


@dataclass(frozen=True, slots=True)
class Point:
    """A mark in a plane: the vertical error bar of `mark` at `x`, and a horizontal line from `x` to `x_high`."""

    mark: Mark
    x: float
    x_high: float | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """One bar: a count per kind."""

    label: str
    counts: tuple[int, ...]


def scatter_plot(points: Sequence[Point], title: str, x_label: str, y_label: str, height: int = 270) -> str:
    """Points with error bars and names; y starts at 0, x is logarithmic if it spans more than a factor of 30."""
    xs = [x for point in points for x in (point.x, point.x_high) if x is not None]
    logarithmic = min(xs) > 0 and max(xs) > _LOGARITHMIC_FROM * min(xs)
    across = _scale(xs, _LEFT, WIDTH - _RIGHT - 6, logarithmic=logarithmic)
    up = _scale([0.0, *(point.mark.high for point in points)], height - _BOTTOM, _TOP)
    svg = _svg(title, "; ".join(_description(point.mark) for point in points), height)
    _axes(svg, across, up, height, x_label + (", logarithmic" if logarithmic else ""), y_label)
    taken: list[Box] = []
    for point in points:
        x, y = across.at(point.x), up.at(point.mark.value)
        right = across.at(point.x_high) if point.x_high is not None else x
        taken += [
            (x - 5, y - 5, x + 5, y + 5),
            (x - 2, up.at(point.mark.high), x + 2, up.at(point.mark.low)),
            (x, y - 2, right, y + 2),
        ]
    for point in points:
        x, y = across.at(point.x), up.at(point.mark.value)
        group = _mark(svg, point.mark, x, y, (up.at(point.mark.low), up.at(point.mark.high)))
        if point.x_high is not None:
            _bar(group, (x, y), (across.at(point.x_high), y))
        left, base = _free_place(point.mark.label, x, y, taken, (_LEFT, _TOP, WIDTH, height - _BOTTOM))
        _text(group, point.mark.label, left, base, "name")
    return ET.tostring(svg, encoding="unicode")


def curve_plot(points: Sequence[Point], title: str, x_label: str, y_label: str, height: int = 270) -> str:
    """Points with error bars, joined from left to right, at equal distances; y from 0 to 1."""
    left, right = _LEFT + 24, WIDTH - _RIGHT - 24
    places = [left + (right - left) * (n / (len(points) - 1) if len(points) > 1 else 0.5) for n in range(len(points))]
    up = _Scale(0, 1, height - _BOTTOM, _TOP)
    svg = _svg(title, "; ".join(_description(point.mark) for point in points), height)
    _axes(svg, None, up, height, x_label, y_label)
    path = " ".join(f"{x:.1f},{up.at(point.mark.value):.1f}" for x, point in zip(places, points, strict=True))
    ET.SubElement(svg, "polyline", {"points": path, "class": "curve"})
    below = any(up.at(point.mark.high) < _TOP + 12 for point in points)
    for x, point in zip(places, points, strict=True):
        mark = point.mark
        group = _mark(svg, mark, x, up.at(mark.value), (up.at(mark.low), up.at(mark.high)))
        _text(svg, f"{point.x:g}", x, height - _BOTTOM + 15, "tick middle")
        _text(group, mark.text, x, up.at(mark.low) + 13 if below else up.at(mark.high) - 5, "name middle")
    return ET.tostring(svg, encoding="unicode")


def interval_plot(marks: Sequence[Mark], title: str, x_label: str, margin: float | None = None) -> str:
    """One row per mark: name, interval on a common axis, value. The range from -margin to margin is shaded."""
    row, names = 24, max(len(mark.label) for mark in marks) * _LETTER
    left = min(names + 12, WIDTH * 0.45)
    right = WIDTH - max(len(mark.text) for mark in marks) * _LETTER - 12
    bottom = _TOP + row * len(marks)
    ends = [end for mark in marks for end in (mark.low, mark.high, mark.value)]
    across = _scale([0.0, *ends, *([-margin, margin] if margin is not None else [])], left + 6, right)
    svg = _svg(title, "; ".join(_description(mark) for mark in marks), bottom + 38)
    if margin:
        start, end = across.at(-margin), across.at(margin)
        box = {"x": f"{start:.1f}", "y": f"{_TOP - 4}", "width": f"{end - start:.1f}", "height": f"{bottom - _TOP + 4}"}
        ET.SubElement(svg, "rect", {**box, "class": "band"})
    for tick in across.ticks:
        x = across.at(tick)
        _line(svg, (x, _TOP - 4), (x, bottom), "zero" if tick == 0 and margin is not None else "grid")
        _text(svg, _number(tick), x, bottom + 14, "tick middle")
    _text(svg, x_label, (left + 6 + right) / 2, bottom + 31, "axis middle")
    for place, mark in enumerate(marks):
        y = _TOP + row * (place + 0.5) - 2
        group = _mark(svg, mark, across.at(mark.value), y, None)
        _bar(group, (across.at(mark.low), y), (across.at(mark.high), y), both=True)
        _text(group, mark.label, left - 6, y + 4, "name end")
        _text(group, mark.text, WIDTH - 2, y + 4, "number end")
    return ET.tostring(svg, encoding="unicode")


def stacked_plot(stacks: Sequence[Stack], pieces: Mapping[str, int], title: str) -> str:
    """One bar per stack, its length proportional to the sum of its counts, which are printed where they fit.

    `pieces` has the number of the CSS class, such as 0 for piece-0, by the name of the piece; a stack has a count for each.
    """
    row = 30
    left = min(max(len(stack.label) for stack in stacks) * _LETTER + 10, WIDTH * 0.45)
    longest = max(1, *(sum(stack.counts) for stack in stacks))
    words = "; ".join(
        f"{stack.label}: " + ", ".join(f"{kind} {count}" for kind, count in zip(pieces, stack.counts, strict=True))
        for stack in stacks
    )
    svg = _svg(title, words, 4 + row * len(stacks))
    for place, stack in enumerate(stacks):
        x, top = left, 4 + row * place
        _text(svg, stack.label, left - 6, top + 15, "name end")
        for piece, count in zip(pieces.values(), stack.counts, strict=True):
            width = (WIDTH - 2 - left) * count / longest
            if not count:
                continue
            box = {"x": f"{x:.1f}", "y": f"{top}", "width": f"{max(width - 1, 0.5):.1f}", "height": "22"}
            ET.SubElement(svg, "rect", {**box, "class": f"piece-{piece}"})
            if width > len(f"{count:,}") * _LETTER + 4:
                _text(svg, f"{count:,}", x + (width - 1) / 2, top + 15, "count middle")
            x += width
    return ET.tostring(svg, encoding="unicode")


def symbol(kind: int) -> str:
    """The shape of a kind, shown next to its name; hidden from screen readers."""
    svg = ET.Element("svg", {"viewBox": "-8 -8 16 16", "class": "symbol", "aria-hidden": "true"})
    ET.SubElement(svg, "path", {"d": _shape(kind), "class": "shape"})
    return ET.tostring(svg, encoding="unicode")


def strip(mark: Mark) -> str:
    """An interval on a line from 0 to 1, small enough for a table cell that also has the numbers."""
    svg = ET.Element("svg", {"viewBox": "0 0 104 8", "class": f"strip kind-{min(mark.kind, 4)}", "aria-hidden": "true"})
    _line(svg, (2, 4), (102, 4), "rail")
    value, low, high = (2 + 100 * min(max(each, 0.0), 1.0) for each in (mark.value, mark.low, mark.high))
    _line(svg, (low, 4), (high, 4), "bar")
    ET.SubElement(svg, "circle", {"cx": f"{value:.1f}", "cy": "4", "r": "2.2", "class": "shape"})
    return ET.tostring(svg, encoding="unicode")


def _shape(kind: int) -> str:
    return _SHAPES[kind if kind < len(_SHAPES) else 0]


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values to coordinates."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        return ticks(self.low, self.high, logarithmic=self.logarithmic)


def ticks(low: float, high: float, *, logarithmic: bool = False) -> list[float]:
    """About five round numbers from low to high; powers of ten if logarithmic.

    >>> ticks(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    >>> ticks(0.5, 2000, logarithmic=True)
    [1.0, 10.0, 100.0, 1000.0]
    """
    if logarithmic:
        return [10.0**n for n in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]
    step = _step(high - low)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _step(span: float) -> float:
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(step * power for step in (1, 2, 5, 10) if span / (step * power) <= 5.0001)


def _scale(values: Sequence[float], start: float, end: float, *, logarithmic: bool = False) -> _Scale:
    """A scale from the smallest to the largest value, widened to round numbers; contains 0 unless logarithmic."""
    low, high = min(values), max(values)
    if logarithmic:
        return _Scale(
            10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), start, end, logarithmic=True
        )
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12:
        high = low + 1
    step = _step(high - low)
    return _Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end)


def _svg(title: str, description: str, height: float) -> ET.Element:
    svg = ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "class": "plot"})
    ET.SubElement(svg, "title").text = title
    ET.SubElement(svg, "desc").text = description
    return svg


def _axes(svg: ET.Element, across: _Scale | None, up: _Scale, height: float, x_label: str, y_label: str) -> None:
    bottom = height - _BOTTOM
    for tick in up.ticks:
        _line(svg, (_LEFT, up.at(tick)), (WIDTH - _RIGHT, up.at(tick)), "grid")
        _text(svg, _number(tick), _LEFT - 6, up.at(tick) + 4, "tick end")
    if across is not None:
        for tick in across.ticks:
            _line(svg, (across.at(tick), bottom), (across.at(tick), bottom + 4), "axis-line")
            _text(svg, _number(tick), across.at(tick), bottom + 16, "tick middle")
    _line(svg, (_LEFT, bottom), (WIDTH - _RIGHT, bottom), "axis-line")
    _text(svg, x_label, (_LEFT + WIDTH - _RIGHT) / 2, height - 6, "axis middle")
    middle = (_TOP + bottom) / 2
    _text(svg, y_label, 11, middle, "axis middle").set("transform", f"rotate(-90 11 {middle:g})")


def _mark(svg: ET.Element, mark: Mark, x: float, y: float, ends: tuple[float, float] | None) -> ET.Element:
    """A shape over a vertical error bar, in a group with the class of its kind."""
    group = ET.SubElement(svg, "g", {"class": f"kind-{min(mark.kind, 4)}"})
    if ends is not None:
        _bar(group, (x, ends[0]), (x, ends[1]), both=True)
    ET.SubElement(group, "path", {"d": _shape(mark.kind), "transform": f"translate({x:.1f} {y:.1f})", "class": "shape"})
    return group


def _bar(group: ET.Element, start: tuple[float, float], end: tuple[float, float], *, both: bool = False) -> None:
    """A line with a cap at its end, or at both."""
    _line(group, start, end, "bar")
    flat = start[1] == end[1] and start[0] != end[0]
    for x, y in (start, end) if both else (end,):
        cap = ((x, y - 4), (x, y + 4)) if flat else ((x - 4, y), (x + 4, y))
        _line(group, *cap, "bar")


def _free_place(label: str, x: float, y: float, taken: list[Box], frame: Box) -> tuple[float, float]:
    """Find a free place for a label near its point, and mark it as taken."""
    width = len(label) * _LETTER
    places = [
        (x + side if side > 0 else x + side - width, y + 4 + rise)
        for rise in (-10, 12, -24, 26, -38, 40)
        for side in (8, -8)
    ]
    boxes = [(left, base - 10, left + width, base + 2) for left, base in places]
    inside = [
        box for box in boxes if box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
    ]
    free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
    box = (free or inside or boxes)[0]
    taken.append(box)
    return box[0], box[3] - 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _line(parent: ET.Element, start: tuple[float, float], end: tuple[float, float], name: str) -> None:
    (x1, y1), (x2, y2) = start, end
    places = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    ET.SubElement(parent, "line", {**places, "class": name})


def _text(parent: ET.Element, text: str, x: float, y: float, name: str) -> ET.Element:
    element = ET.SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": name})
    element.text = text
    return element


def _number(tick: float) -> str:
    return (f"{tick:,.0f}" if abs(tick) >= 1000 else f"{tick:.6g}").replace("-", "−")


def _description(mark: Mark) -> str:
    return f"{mark.label}: {mark.value:.3f}, from {mark.low:.3f} to {mark.high:.3f}"
