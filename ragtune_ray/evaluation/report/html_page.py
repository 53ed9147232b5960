"""Renders a comparison as one HTML file that needs nothing else: no network, no script, no font, no image.

Equal input gives an equal page. Texts from documents, questions and models are shown as text, never as markup, and a content
security policy forbids everything but the page's own style.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import yaml

from ragtune_ray.config import ARMS
from ragtune_ray.evaluation.comparison import BreakEven, Comparison, Latency, Round, VariantSearch, read
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.report import plots, table
from ragtune_ray.evaluation.verdict import Difference

OTHER_ARM = 4
"""Colour and shape that all other arms share."""

_OUTCOMES = {
    "recommended": "Recommendation",
    "no_difference": "No difference seen",
    "too_few_questions": "Too few questions",
    "none_qualifies": "No arm qualifies",
}
_SIGNS = {"better": "▲", "worse": "▼", "no better": "▽", "as good": "=", "open": "○", "dropped": "–"}


def render(content: Mapping[str, Any]) -> str:
    """Render the content of `comparison.json` as an HTML document, to be written in UTF-8.

    Raises:
        ComparisonError: a field is missing or has the wrong type, or a number is not finite.
    """
    facts = read(content)
    names = facts.names()
    chosen = facts.verdict.arm if facts.verdict.outcome in ("recommended", "no_difference") else ""
    style = _packaged("report.css")
    return _template().render(
        facts=facts,
        names=names,
        chosen=chosen,
        # On a phone only the first column of the table is visible without scrolling.
        columns=sorted(range(len(names)), key=lambda number: names[number] != chosen),
        kinds={name: _kind(name) for name in names},
        symbols={name: plots.symbol(_kind(name)) for name in names},
        outcome=_OUTCOMES[facts.verdict.outcome],
        confidence=f"{100 * facts.confidence:g} %",
        metric=table.metric_label(facts.metric),
        unmeasured=[name for name in names if not facts.arms[name].quality.get(facts.metric)],
        groups=[(group, _strips(group, names)) for group in table.groups(facts)],
        others=[(group, _strips(group, names)) for group in [table.other_metrics(facts)] if group.rows],
        losses=[(_piece(kind), row) for kind, row in table.losses(facts).items()],
        plots=_plots(facts),
        variants=_variants(facts.variants) if facts.variants else None,
        break_even=[_break_even(each) for each in facts.break_even],
        config=yaml.safe_dump(facts.config, allow_unicode=True, width=100).strip(),
        hardware=_hardware(facts.hardware),
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    )


def _packaged(name: str) -> str:
    return resources.files("ragtune_ray.evaluation.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "label": table.metric_label,
        "duration": table.duration,
        "conclusion": table.conclusion,
        "contested": table.contested_sentence,
        "ends": table.interval_text,
        "signed": _signed,
        "sign": _SIGNS.__getitem__,
    }
    return environment.from_string(_packaged("report.html"))


def _kind(name: str) -> int:
    """Colour and shape of an arm, the same in every report; all modes of `tune` share one."""
    return min(ARMS.index(name), OTHER_ARM) if name in ARMS else OTHER_ARM


def _variants(found: VariantSearch) -> dict[str, Any]:
    """A sentence about the search among variants of retrieval, and a row for each."""
    return {
        "sentence": table.variants_sentence(found),
        "rows": [
            (name, found.variants[name].score, table.variant_settings(found.variants[name]), _fate(found, name))
            for name in found.names()
        ],
    }


def _fate(found: VariantSearch, name: str) -> str:
    if name == found.winner:
        return "used by the arms"
    last = max((each.questions for each in found.rounds if name in each.scores), default=0)
    return f"dropped after {last:,} questions"


def _piece(kind: str) -> int:
    """Colour of an outcome of a question."""
    return list(table.LOSSES).index(kind) if kind in table.LOSSES else len(table.LOSSES)


def _plots(facts: Comparison) -> dict[str, str]:
    """Name of the plot -> SVG; empty if there is nothing to draw."""
    metric, names = table.metric_label(facts.metric), facts.names()
    quality = {name: value for name in names if (value := facts.arms[name].quality.get(facts.metric)) is not None}
    found = dict.fromkeys(("quality", "cost", "latency", "recall", "differences", "losses", "rounds"), "")
    if quality:
        marks = [_mark(name, _kind(name), value) for name, value in quality.items()]
        found["quality"] = plots.interval_plot(marks, f"{metric} of each arm", metric)
    costs = {name: cost for name in quality if (cost := facts.arms[name].cost) is not None}
    if costs:
        found["cost"] = _cost_plot(costs, quality, metric)
    latencies = {name: latency for name in quality if (latency := facts.arms[name].latency) is not None}
    if latencies:
        found["latency"] = _latency_plot(latencies, quality, metric)
    recalls = _recalls(facts.retrieval or {})
    if recalls:
        points = [plots.Point(_mark(f"recall@{k}", 1, value, plain=True), k) for k, value in recalls]
        found["recall"] = plots.curve_plot(points, "recall@k of the retriever", "k, passages shown", "recall@k")
    deciding = [each for each in facts.differences if each.metric == facts.metric]
    if deciding:
        marks = [
            _mark(f"{each.arm} − {each.against}: {table.conclusion(each)}", _kind(each.arm), each) for each in deciding
        ]
        title = f"Differences of {metric} between arms"
        found["differences"] = plots.interval_plot(marks, title, f"difference of {metric}", facts.margin)
    if table.losses(facts):
        found["losses"] = _losses_plot(facts)
    marks = [_round_mark(name, each) for name in names for each in facts.arms[name].rounds if each.after is not None]
    if marks:
        found["rounds"] = plots.interval_plot(marks, "Gain of each round of tuning", "gain on validation questions")
    return found


def _round_mark(arm: str, each: Round) -> plots.Mark:
    gain = (each.after or 0.0) - (each.before or 0.0)
    label = f"{arm} {each.round}, {each.component} {'accepted' if each.accepted else 'refused'}"
    kind = _kind("rag+ft") if each.accepted else _kind("base")
    low, high = (gain if end is None else end for end in (each.low, each.high))
    return plots.Mark(label, kind, gain, low, high, _signed(gain))


def _cost_plot(costs: Mapping[str, Cost], quality: Mapping[str, Interval], metric: str) -> str:
    points = [plots.Point(_mark(name, _kind(name), quality[name]), cost.total) for name, cost in costs.items()]
    cost = next(iter(costs.values()))
    label = f"{cost.unit} for {cost.answers:,} answers"
    return plots.scatter_plot(points, f"{metric} against cost", label, metric)


def _latency_plot(latencies: Mapping[str, Latency], quality: Mapping[str, Interval], metric: str) -> str:
    points = [
        plots.Point(_mark(name, _kind(name), quality[name]), latency.total.p50_seconds, latency.total.p95_seconds)
        for name, latency in latencies.items()
    ]
    return plots.scatter_plot(points, f"{metric} against latency", "seconds for one question, p50 to p95", metric)


def _losses_plot(facts: Comparison) -> str:
    losses = table.losses(facts)
    stacks = [
        plots.Stack(name, tuple(facts.arms[name].losses.get(kind, 0) for kind in losses)) for name in facts.names()
    ]
    pieces = {row.label: _piece(kind) for kind, row in losses.items()}
    return plots.stacked_plot(stacks, pieces, "What became of the answerable questions")


def _mark(label: str, kind: int, value: Interval | Difference, *, plain: bool = False) -> plots.Mark:
    signed = isinstance(value, Difference)
    text = _signed(value.value) if signed else f"{value.value:.2f}" if plain else f"{value.value:.3f}"
    return plots.Mark(label, kind, value.value, value.low, value.high, text)


def _recalls(retrieval: Mapping[str, Interval | None]) -> list[tuple[int, Interval]]:
    found = [
        (int(name.removeprefix("recall@")), value)
        for name, value in retrieval.items()
        if re.fullmatch(r"recall@\d{1,9}", name, re.ASCII) and value is not None
    ]
    return sorted(found, key=lambda each: each[0])


def _strips(group: table.Group, names: list[str]) -> list[list[str]]:
    """For each row and arm a small plot of the interval; empty if the value is not a share."""
    return [
        [
            plots.strip(_mark(name, _kind(name), cell.interval)) if cell is not None and cell.interval else ""
            for name, cell in zip(names, row.cells, strict=True)
        ]
        for row in group.rows
    ]


def _break_even(each: BreakEven) -> str:
    if each.answers is None:
        return f"{each.arm} never becomes cheaper than {each.against}."
    if each.answers <= 0:
        return f"{each.arm} is cheaper than {each.against} from the first answer on."
    return f"{each.arm} becomes cheaper than {each.against} after {each.answers:,.0f} answers."


def _hardware(hardware: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name, value in hardware.items():
        if name == "memory_bytes" and isinstance(value, int | float):
            found.append(("memory", f"{value / 2**30:.1f} GiB"))
        elif isinstance(value, list | tuple):
            found.append((table.metric_label(name), ", ".join(map(str, value)) or "none"))
        else:
            found.append((table.metric_label(name), str(value)))
    return found


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
