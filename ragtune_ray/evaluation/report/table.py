"""Turns a comparison into a table: one row per measure, one cell per arm. The web page and the terminal both show it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ragtune_ray.config import AS_CONFIGURED
from ragtune_ray.evaluation import failures
from ragtune_ray.evaluation.comparison import ArmResult, Comparison, Contested, Metrics, Variant, VariantSearch
from ragtune_ray.evaluation.costs import Cost
from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.reasons import three_digits
from ragtune_ray.evaluation.verdict import Difference

LOSSES: dict[str, str] = {str(outcome): meaning for outcome, meaning in failures.MEANINGS.items()}
"""Outcome of an answerable question -> its meaning, from best to worst."""

_NOTES = {
    "EM": "equals a gold answer",
    "token_F1": "words shared with a gold answer",
    "contains_answer": "contains a gold answer",
    "ROUGE_L": "words shared with a gold answer in the same order",
    "numeric_match": "has the number of a gold answer; only where that is a number",
    "semantic": "cosine with a gold answer, by the encoder",
    "groundedness": "sentences that the passages support",
    "judge": "right by the judge",
    "relevance": "answers the question, by the judge",
    "citation_support_precision": "citations that support their sentence",
    "citation_support_recall": "sentences that their citations support",
    "abstention_recall": "unanswerable questions left unanswered",
    "abstention_precision": "unanswered questions that are unanswerable",
    "false_abstention_rate": "answerable questions left unanswered; lower is better",
    "cited_share": "answers that cite a passage",
    "citation_precision": "cited documents that are relevant",
    "citation_recall": "relevant documents that are cited",
}


_ABSTENTION = ("abstention_recall", "abstention_precision", "false_abstention_rate")


@dataclass(frozen=True, slots=True)
class Cell:
    """One measure of one arm."""

    text: str
    """The value with its unit."""
    detail: str = ""
    """Shown after the value, such as an interval."""
    interval: Interval | None = None
    """The value and its interval as numbers, if the value is a share."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measure."""

    label: str
    cells: tuple[Cell | None, ...]
    """One per arm; None: not measured."""
    note: str = ""
    """Meaning of the measure."""
    n: str = ""
    """Number of questions; "110-113" if the arms differ."""
    decides: bool = False
    """Whether the decision is based on it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Measures of one dimension."""

    name: str
    rows: tuple[Row, ...]
    note: str = ""


def groups(comparison: Comparison) -> list[Group]:
    """All measures that any arm has, in the order in which they are shown."""
    arms = [comparison.arms[name] for name in comparison.names()]
    found = [
        Group(
            "Quality", _metric_rows(_chosen(comparison, {comparison.metric, *_ABSTENTION}), decides=comparison.metric)
        ),
        Group("Labels", _label_rows(comparison), _label_note(comparison)),
        Group("Explainability", _metric_rows([arm.explainability for arm in arms])),
        Group("Latency", _latency_rows(arms), "of one question"),
        Group("Adaptive retrieval", _adaptive_rows(arms), "skipped where the generator is confident; against always"),
        Group("Cost", _cost_rows(arms), _cost_note(arms)),
        Group("Freshness", _freshness_rows(arms), "after a document has changed"),
        Group("Forgetting", _forgetting_rows(arms), "questions from outside the corpus, before and after tuning"),
        Group("Answers", (*_count_rows([arm.statuses for arm in arms]), *_cut_rows(arms))),
    ]
    return [group for group in found if group.rows]


def other_metrics(comparison: Comparison) -> Group:
    """The metrics of quality that do not decide; without rows if there are none."""
    others = {name for arm in comparison.arms.values() for name in arm.quality} - {comparison.metric, *_ABSTENTION}
    return Group("Other metrics", _metric_rows(_chosen(comparison, others)), "they do not decide")


def contested_sentence(each: Contested) -> str:
    """Which metric sees which other arm ahead, with its numbers."""
    interval = _minus(f"{each.score - each.against_score:+.3f}")
    ends = f"[{_minus(f'{each.low:+.3f}')}, {_minus(f'{each.high:+.3f}')}]"
    return (
        f"By {metric_label(each.metric)}, {each.arm} is ahead of {each.against}: {each.score:.3f} against "
        f"{each.against_score:.3f}, {interval} {ends} over {each.n:,} questions."
    )


def losses(comparison: Comparison) -> dict[str, Row]:
    """Outcome of the answerable questions -> a row of counts with their share of the arm's questions."""
    counts = [comparison.arms[name].losses for name in comparison.names()]
    totals = [sum(count.values()) for count in counts]
    return {
        kind: Row(
            metric_label(kind),
            tuple(
                Cell(f"{count[kind]:,}", f"({100 * count[kind] / total:.0f} %)" if total else "")
                if kind in count
                else None
                for count, total in zip(counts, totals, strict=True)
            ),
            LOSSES.get(kind, ""),
        )
        for kind in _keys(counts, LOSSES)
        if any(count.get(kind) for count in counts)
    }


def metric_label(name: str) -> str:
    """A metric's name for people.

    >>> metric_label("token_F1")
    'token F1'
    """
    return name.replace("ROUGE_L", "ROUGE-L").replace("_", " ")


def variants_sentence(found: VariantSearch) -> str:
    """Which settings of retrieval all arms use, and how far the scores that chose them can be trusted."""
    chosen = "The arms use the config as it is" if found.winner == AS_CONFIGURED else f"The arms use {found.winner}"
    return (
        f"{chosen}, the best of {len(found.variants)} settings of retrieval on validation questions. It was chosen by "
        f"{found.looks:,} looks at these scores, so its own is optimistic; scores on the test questions are not."
    )


def variant_settings(variant: Variant) -> str:
    """What differs from the config.

    >>> variant_settings(Variant(settings={"retrieval.top_k": 10}, score=Interval(value=0, low=0, high=0, n=1)))
    'retrieval.top_k=10'
    """
    return ", ".join(f"{name}={value}" for name, value in variant.settings.items()) or "as configured"


def interval_text(interval: Interval | Difference, *, signed: bool = False) -> str:
    """The ends of an interval with two decimals.

    >>> interval_text(Interval(value=0.5, low=0.25, high=1, n=8))
    '[0.25, 1.00]'
    """
    sign = "+" if signed else ""
    return f"[{_minus(f'{interval.low:{sign}.2f}')}, {_minus(f'{interval.high:{sign}.2f}')}]"


def duration(seconds: float) -> str:
    """A time with three digits, in ms or s.

    >>> duration(0.0851), duration(1.2), duration(5025)
    ('85.1 ms', '1.20 s', '5,025 s')
    """
    return f"{three_digits(seconds * 1000)} ms" if 0 < abs(seconds) < 0.9995 else f"{three_digits(seconds)} s"


def conclusion(difference: Difference) -> str:
    """What the interval shows about the first arm; in a comparison by an old version, only whether it contains 0."""
    if difference.conclusion:
        return difference.conclusion
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "open"


def _chosen(comparison: Comparison, names: Collection[str]) -> list[Metrics]:
    """The metrics of quality of each arm that are among these names."""
    arms = (comparison.arms[name] for name in comparison.names())
    return [{name: value for name, value in arm.quality.items() if name in names} for arm in arms]


def _metric_rows(metrics: Sequence[Mapping[str, Interval | None]], decides: str = "") -> tuple[Row, ...]:
    return tuple(
        _interval_row(
            metric_label(name), [metric.get(name) for metric in metrics], _NOTES.get(name, ""), decides=name == decides
        )
        for name in _keys(metrics, _NOTES)
        if any(metric.get(name) for metric in metrics)
    )


def _interval_row(
    label: str, intervals: Sequence[Interval | None], note: str = "", *, decides: bool = False, signed: bool = False
) -> Row:
    counts = [interval.n for interval in intervals if interval is not None]
    n = f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts):,}–{max(counts):,}"
    sign = "+" if signed else ""
    cells = tuple(
        Cell(
            _minus(f"{interval.value:{sign}.3f}"), interval_text(interval, signed=signed), None if signed else interval
        )
        if interval is not None
        else None
        for interval in intervals
    )
    return Row(label, cells, note, n, decides)


def _label_rows(comparison: Comparison) -> tuple[Row, ...]:
    """What people's labels say of the metric that they check, and its means without them."""
    checked = comparison.checked
    if checked is None:
        return ()
    name = metric_label(checked.metric)
    found = [checked.arms.get(arm) for arm in comparison.names()]
    alike = tuple(
        Cell(f"{each.agreement.alike:,} of {each.agreement.n:,}") if each and each.agreement.n else None
        for each in found
    )
    kappas = [each.agreement.kappa if each else None for each in found]
    rows = [Row("graded alike", alike, f"answers to which people and {name} give the same grade")]
    if any(kappa is not None for kappa in kappas):
        cells = tuple(Cell(_minus(f"{kappa:.2f}")) if kappa is not None else None for kappa in kappas)
        rows.append(Row("kappa", cells, "agreement beyond chance, linear weights; 1 is full"))
    if any(each and each.people for each in found):
        rows.append(
            _interval_row("people", [each.people if each else None for each in found], "labelled answers alone")
        )
    if checked.corrected:
        alone = [each.alone if each else None for each in found]
        rows.append(_interval_row(f"{name} uncorrected", alone, f"the mean of {name} as it is"))
    return tuple(rows)


def _label_note(comparison: Comparison) -> str:
    checked = comparison.checked
    if checked is None or not checked.corrected:
        return "grades by people"
    return f"grades by people; they correct {metric_label(checked.metric)}"


def _latency_rows(arms: Sequence[ArmResult]) -> tuple[Row, ...]:
    rows = []
    counts = {arm.latency.n for arm in arms if arm.latency is not None}
    n = "–".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else ""
    for stage in ("retrieval", "generation", "total"):
        times = [getattr(arm.latency, stage, None) for arm in arms]
        if any(time is not None for time in times):
            cells = tuple(
                Cell(duration(time.p50_seconds), f"(p95 {duration(time.p95_seconds)})") if time is not None else None
                for time in times
            )
            rows.append(Row(f"{stage} p50", cells, n=n))
    throughputs = [arm.throughput for arm in arms]
    if any(throughputs):
        cells = tuple(Cell(three_digits(each.answers_per_second)) if each else None for each in throughputs)
        rows.append(Row("answers per second", cells, "in bulk"))
    return tuple(rows)


def _adaptive_rows(arms: Sequence[ArmResult]) -> tuple[Row, ...]:
    facts = [arm.adaptive for arm in arms]
    if not any(facts):
        return ()
    saved = tuple(
        Cell(("" if each.saved_seconds >= 0 else "\N{MINUS SIGN}") + duration(abs(each.saved_seconds)))
        if each
        else None
        for each in facts
    )
    return (
        _interval_row("without retrieval", [each.share if each else None for each in facts], "share of questions"),
        _interval_row("quality gained", [each.difference if each else None for each in facts], signed=True),
        Row("time saved", saved, "on the median answer"),
    )


def _cost_rows(arms: Sequence[ArmResult]) -> tuple[Row, ...]:
    costs = [arm.cost for arm in arms]
    if not any(costs):
        return ()
    fields: list[tuple[str, Callable[[Cost], float], str]] = [
        ("indexing", lambda cost: cost.index, "once"),
        ("training", lambda cost: cost.training, "once"),
        ("1,000 answers", lambda cost: cost.per_1000, ""),
        ("all in all", lambda cost: cost.total, _total_note(costs)),
    ]
    return tuple(
        Row(label, tuple(Cell(three_digits(take(cost))) if cost is not None else None for cost in costs), note)
        for label, take, note in fields
    )


def _total_note(costs: Iterable[Cost | None]) -> str:
    counts = sorted({cost.answers for cost in costs if cost is not None})
    answers = " or ".join(f"{count:,}" for count in counts)
    return f"once, and {answers} answer{'' if counts == [1] else 's'}"


def _cost_note(arms: Sequence[ArmResult]) -> str:
    units = " or ".join(sorted({arm.cost.unit for arm in arms if arm.cost is not None}))
    return f"in {units}" + (", since no prices are set" if units == "core-seconds" else "")


def _freshness_rows(arms: Sequence[ArmResult]) -> tuple[Row, ...]:
    rows = []
    visible, changed, stale = (
        [getattr(arm.freshness, field, None) for arm in arms] for field in ("visible_seconds", "changed", "stale_share")
    )
    if any(seconds is not None for seconds in visible):
        cells = tuple(Cell(duration(seconds)) if seconds is not None else None for seconds in visible)
        rows.append(Row("visible after", cells, "indexed or trained"))
    if any(changed):
        rows.append(_interval_row("new fact stated", changed, "answers that state the new fact"))
    if any(stale):
        note = "answers that still state the old one; lower is better"
        rows.append(_interval_row("old fact stated", stale, note))
    return tuple(rows)


def _forgetting_rows(arms: Sequence[ArmResult]) -> tuple[Row, ...]:
    names = ("before", "after", "difference")
    measured = {name: [getattr(arm.forgetting, name, None) for arm in arms] for name in names}
    return tuple(
        _interval_row(name, values, signed=name == "difference") for name, values in measured.items() if any(values)
    )


def _count_rows(counts: Sequence[Mapping[str, int]]) -> tuple[Row, ...]:
    return tuple(
        Row(name, tuple(Cell(f"{count.get(name, 0):,}") for count in counts))
        for name in _keys(counts, ("ok", "failed"))
    )


def _cut_rows(arms: Sequence[ArmResult]) -> tuple[Row, ...]:
    if not any(arm.cut for arm in arms):
        return ()
    note = "ended at generator.max_new_tokens; raise it for longer answers"
    return (Row("cut", tuple(Cell(f"{arm.cut:,}") for arm in arms), note),)


def _keys(mappings: Iterable[Mapping[str, object]], order: Iterable[str]) -> list[str]:
    """All keys, first in the given order, then by name."""
    found = {key for mapping in mappings for key in mapping}
    known = [key for key in order if key in found]
    return known + sorted(found - set(known))


def _minus(number: str) -> str:
    return number.replace("-", "−")
