"""Plots, read back: the position of a mark, measured against the ticks, must equal the value drawn."""

import itertools
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray.evaluation.report import plots

SHARE = st.floats(0, 1)
AMOUNT = st.floats(1e-6, 1e9)


def mark(label: str, value: float, low: float, high: float, kind: int = 0) -> plots.Mark:
    return plots.Mark(label, kind, value, low, high, f"{value:.2f}")


def svg_of(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 (our own text)


def texts(svg: ET.Element, name: str) -> list[ET.Element]:
    return [element for element in svg.iter("text") if name in element.get("class", "").split()]


def place(element: ET.Element) -> tuple[float, float]:
    found = re.fullmatch(r"translate\((\S+) (\S+)\)", element.get("transform", ""))
    assert found
    return float(found[1]), float(found[2])


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def ticks_of(svg: ET.Element, along: str) -> list[tuple[float, float]]:
    """(place, value) of the ticks of an axis: those of x are centred, those of y end at the axis."""
    name = {"x": "middle", "y": "end"}[along]
    return [(float(tick.get(along)), number(tick.text)) for tick in texts(svg, "tick") if name in tick.get("class")]


def slope(svg: ET.Element, along: str) -> tuple[float, float]:
    """Place and value of the first tick, and value per place: a text of y stands 4 below its line."""
    (p0, v0), *_, (p1, v1) = ticks_of(svg, along)
    return p0 - (4 if along == "y" else 0), v0, (v1 - v0) / (p1 - p0)


def read(svg: ET.Element, along: str, at: float) -> float:
    start, value, per = slope(svg, along)
    return value + (at - start) * per


def lines(svg: ET.Element, group: ET.Element) -> list[tuple[float, ...]]:
    return [tuple(float(line.get(name)) for name in ("x1", "y1", "x2", "y2")) for line in group.iter("line")]


def test_points_are_drawn_at_their_values() -> None:
    points = [
        plots.Point(mark("a", 0.2, 0.1, 0.4), 2.0, 5.0),
        plots.Point(mark("b", 0.7, 0.5, 0.75, kind=2), 9.0),
    ]
    svg = svg_of(plots.scatter_plot(points, "title", "USD", "EM"))
    for point, group in zip(points, svg.iter("g"), strict=True):
        x, y = place(group.find("path"))
        assert read(svg, "x", x) == pytest.approx(point.x, abs=0.01)
        assert read(svg, "y", y) == pytest.approx(point.mark.value, abs=0.001)
        _, top, _, bottom = lines(svg, group)[0]
        assert sorted((read(svg, "y", top), read(svg, "y", bottom))) == pytest.approx(
            [point.mark.low, point.mark.high], abs=0.001
        )
    (first, second) = svg.iter("g")
    assert read(svg, "x", lines(svg, first)[3][2]) == pytest.approx(5.0, abs=0.01), "x_high"
    assert len(lines(svg, second)) == 3, "an upright bar and two caps, and nothing to the right"
    assert first.find("path").get("d") != second.find("path").get("d"), "kinds differ by shape, not by colour alone"


def test_axis_over_several_powers_of_ten_is_logarithmic() -> None:
    points = [plots.Point(mark(str(x), 0.5, 0.4, 0.6), x) for x in (1.0, 10.0, 1000.0)]
    svg = svg_of(plots.scatter_plot(points, "title", "USD", "EM"))
    assert [value for _, value in ticks_of(svg, "x")] == [1, 10, 100, 1000]
    xs = [place(group.find("path"))[0] for group in svg.iter("g")]
    assert xs[2] - xs[1] == pytest.approx(2 * (xs[1] - xs[0]), abs=0.2)
    assert "logarithmic" in "".join(element.text for element in texts(svg, "axis"))


def test_axis_with_zero_is_linear() -> None:
    points = [plots.Point(mark("free", 0.1, 0, 0.2), 0.0), plots.Point(mark("dear", 0.5, 0.4, 0.6), 1000.0)]
    assert "logarithmic" not in plots.scatter_plot(points, "title", "USD", "EM")


@given(st.lists(st.tuples(AMOUNT | st.just(0.0), SHARE), min_size=1, max_size=6))
def test_everything_stays_inside_the_plot(places: list[tuple[float, float]]) -> None:
    points = [
        plots.Point(mark(f"arm {n}", y, y * 0.5, min(1, y * 1.5), kind=n), x, x * 2) for n, (x, y) in enumerate(places)
    ]
    svg = svg_of(plots.scatter_plot(points, "title", "USD", "EM"))
    width, height = map(float, svg.get("viewBox").split()[2:])
    for group in svg.iter("g"):
        x, y = place(group.find("path"))
        assert 0 <= x <= width
        assert 0 <= y <= height
        for x1, y1, x2, y2 in lines(svg, group):
            assert 0 <= min(x1, x2) <= max(x1, x2) <= width
            assert 0 <= min(y1, y2) <= max(y1, y2) <= height
    assert "nan" not in ET.tostring(svg, encoding="unicode")


def test_labels_of_neighbours_do_not_overlap() -> None:
    points = [plots.Point(mark(f"arm {n}", 0.5 + n * 0.01, 0.4, 0.6), 1.0 + n * 0.01) for n in range(4)]
    svg = svg_of(plots.scatter_plot([*points, plots.Point(mark("far", 0.1, 0, 0.2), 2)], "title", "USD", "EM"))
    names = texts(svg, "name")
    boxes = [(float(each.get("x")), float(each.get("y")), len(each.text) * 6.6) for each in names]
    for n, (x1, y1, w1) in enumerate(boxes):
        for x2, y2, w2 in boxes[n + 1 :]:
            assert abs(y1 - y2) >= 11 or x1 + w1 <= x2 or x2 + w2 <= x1


def test_intervals_share_one_axis() -> None:
    marks = [mark("rag - base", 0.12, 0.05, 0.3, kind=1), mark("ft - base", -0.04, -0.1, 0.02, kind=2)]
    svg = svg_of(plots.interval_plot(marks, "title", "difference", margin=0.02))
    for each, group in zip(marks, svg.iter("g"), strict=True):
        assert read(svg, "x", place(group.find("path"))[0]) == pytest.approx(each.value, abs=0.001)
        x1, _, x2, _ = lines(svg, group)[0]
        assert [read(svg, "x", x) for x in (x1, x2)] == pytest.approx([each.low, each.high], abs=0.001)
    (band,) = svg.iter("rect")
    start, width = float(band.get("x")), float(band.get("width"))
    assert [read(svg, "x", x) for x in (start, start + width)] == pytest.approx([-0.02, 0.02], abs=0.001)
    (zero,) = [line for line in svg.iter("line") if line.get("class") == "zero"]
    assert read(svg, "x", float(zero.get("x1"))) == pytest.approx(0, abs=0.001)


def test_intervals_without_a_margin_have_no_band() -> None:
    svg = svg_of(plots.interval_plot([mark("rag", 0.5, 0.4, 0.6)], "title", "EM"))
    assert not list(svg.iter("rect"))
    assert not [line for line in svg.iter("line") if line.get("class") == "zero"]


def test_curve_passes_through_its_points() -> None:
    points = [plots.Point(mark(f"recall@{k}", y, y - 0.1, y + 0.1), k) for k, y in ((1, 0.3), (5, 0.6), (10, 0.8))]
    svg = svg_of(plots.curve_plot(points, "title", "k", "recall@k"))
    (curve,) = svg.iter("polyline")
    joints = [tuple(map(float, pair.split(","))) for pair in curve.get("points").split()]
    assert joints == [place(group.find("path")) for group in svg.iter("g")]
    assert [read(svg, "y", y) for _, y in joints] == pytest.approx([0.3, 0.6, 0.8], abs=0.001)
    assert [tick.text for tick in texts(svg, "tick") if "middle" in tick.get("class")] == ["1", "5", "10"]


def test_pieces_are_proportional_to_counts() -> None:
    stacks = [plots.Stack("rag", (60, 0, 40)), plots.Stack("ft", (1, 49, 0))]
    svg = svg_of(plots.stacked_plot(stacks, {"correct": 0, "misread": 2, "failed": 5}, "title"))
    found = [(each.get("class"), float(each.get("width")) + 1) for each in svg.iter("rect")]
    assert [name for name, _ in found] == ["piece-0", "piece-5", "piece-0", "piece-2"], "0 is not drawn"
    assert max(float(each.get("x")) + float(each.get("width")) for each in svg.iter("rect")) == plots.WIDTH - 3
    unit = found[0][1] / 60
    assert [width for _, width in found] == pytest.approx([60 * unit, 40 * unit, max(unit, 1.5), 49 * unit], abs=0.1)
    assert [each.text for each in texts(svg, "count")] == ["60", "40", "49"], "1 is too narrow for its number"
    assert svg.find("desc").text == "rag: correct 60, misread 0, failed 40; ft: correct 1, misread 49, failed 0"


def test_strip_shows_an_interval_from_0_to_1() -> None:
    svg = svg_of(plots.strip(mark("", 0.5, 0.25, 0.75, kind=3)))
    rail, bar = (tuple(float(line.get(name)) for name in ("x1", "x2")) for line in svg.iter("line"))
    length = rail[1] - rail[0]
    assert [(x - rail[0]) / length for x in bar] == [0.25, 0.75]
    assert (float(svg.find("circle").get("cx")) - rail[0]) / length == 0.5
    assert "kind-3" in svg.get("class").split()


@pytest.mark.parametrize(
    "draw",
    [
        lambda label: plots.scatter_plot([plots.Point(mark(label, 0.5, 0.4, 0.6), 1.0)], label, label, label),
        lambda label: plots.curve_plot([plots.Point(mark(label, 0.5, 0.4, 0.6), 1)], label, label, label),
        lambda label: plots.interval_plot([mark(label, 0.5, 0.4, 0.6)], label, label),
        lambda label: plots.stacked_plot([plots.Stack(label, (1,))], {label: 0}, label),
    ],
)
def test_labels_are_escaped_and_plots_have_descriptions(draw: Any) -> None:
    label = "<script>alert('\"&')</script>"
    text = draw(label)
    assert "<script" not in text
    assert " style=" not in text
    svg = svg_of(text)
    assert svg.get("role") == "img"
    assert svg.find("title").text == label
    assert label in svg.find("desc").text


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_few(low: float, span: float) -> None:
    found = plots.ticks(low, low + span)
    assert 2 <= len(found) <= 6
    assert low - 1e-6 * span <= found[0]
    assert found[-1] <= low + span * (1 + 1e-6)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    assert re.match(r"[125]\.0{5}", f"{steps[0]:.5e}") or re.match(r"[0149]\.9{5}", f"{steps[0]:.5e}")
