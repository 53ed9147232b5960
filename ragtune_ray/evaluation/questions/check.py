"""Looks at a set of questions: lengths, kinds, languages, repeats, gold answers that metrics cannot use, the metric that fits.

No model is loaded and nothing is written. What makes a result weak is a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ragtune_ray import config
from ragtune_ray.evaluation.metrics import languages
from ragtune_ray.evaluation.metrics.normalization import normalize_answer
from ragtune_ray.evaluation.questions import answer_kinds, gold_answers, power, repeats
from ragtune_ray.evaluation.questions.proposal import Proposal, propose
from ragtune_ray.evaluation.report.plain_text import wrapped
from ragtune_ray.evaluation.scoring import is_defined
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS
from ragtune_ray.index import contents, versions
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.ingest.exports import fields
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.schema import Query, Reject
from ragtune_ray.storage import artifacts

SHOWN = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of the shortest gold answer of each question."""

    median: float
    p95: float
    longest: int
    median_characters: float
    p95_characters: float


@dataclasses.dataclass(frozen=True, slots=True)
class Documents:
    """Questions and the documents that they name."""

    named: int
    """Questions that name a relevant document."""
    missing: int | None = None
    """Of them, those of which no document is in the index; None without an index."""
    grounding: gold_answers.Grounding | None = None
    """None without an index."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuestionsCheck:
    """What a set of questions is like."""

    path: str
    num_questions: int
    num_rejects: int
    splits: dict[str, int]
    kinds: dict[answer_kinds.AnswerKind, int]
    """Kind of the gold answers -> questions."""
    lengths: Lengths | None
    """None without gold answers."""
    languages: dict[str, float]
    """Language of questions -> share of their words; "": it cannot be told."""
    answer_languages: dict[str, float]
    repeats: repeats.Repeats
    alike: tuple[tuple[str, ...], ...]
    """Groups of gold answers that no metric tells apart."""
    blank: tuple[str, ...]
    """Ids of the questions with a gold answer of which normalization leaves nothing."""
    documents: Documents
    notices: dict[str, int]
    """What was read as meant or not read -> rows."""
    num_compared: int
    """Questions that a comparison would score, of the test split if there is one: those for which `compare.metric` is defined, or
    if there are none, the proposed metric."""
    smallest_difference: float | None
    needed_for_margin: int | None
    proposal: Proposal
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """JSON values for `--json`."""
        values = dataclasses.asdict(self)
        values["proposal"] = {"metric": self.proposal.metric, "reason": self.proposal.reason}
        return values

    def lines(self) -> Iterator[str]:
        """The facts, then the warnings, for a person."""
        for name, text in self._rows():
            yield from wrapped(f"{name:<11}", text)
        for text in self.warnings:
            yield from wrapped(f"{'warning':<11}", text)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "questions", f"{self.num_questions:,}" + (f"; {counted(self.splits)}" if len(self.splits) > 1 else "")
        yield "answers", counted(self.kinds)
        if self.lengths:
            each = self.lengths
            words = f"median {each.median:g} words, 95 of 100 at most {each.p95:g}, longest {each.longest:,}"
            yield "lengths", f"{words}; median {each.median_characters:g} characters"
        if self.languages.keys() - {""}:
            answers = f"; answers: {shown_shares(self.answer_languages)}" if self.answer_languages else ""
            yield "languages", f"questions: {shown_shares(self.languages)}{answers}"
        yield "documents", self._documents()
        if self.smallest_difference is not None:
            asked = f"{self.num_compared:,} questions to compare arms on"
            yield "power", f"{asked}; they show a difference of {self.smallest_difference:.3f} with 80 % probability"
        yield "metric", f"{self.proposal.metric}: {self.proposal.reason}"
        for text in fields.lines(Counter(self.notices)):
            yield "read as", text

    def _documents(self) -> str:
        found = self.documents
        if not found.named:
            return "no question names its documents (document_ids)"
        text = f"{found.named:,} questions name some"
        if found.grounding is None:
            return f"{text}; not looked up without an index (name a config)"
        absent, checked = len(found.grounding.absent), found.grounding.checked
        return f"{text}; {checked - absent:,} of {checked:,} short gold answers that were looked up stand in them"


def check(settings: config.Config, *, with_index: bool = True) -> QuestionsCheck:
    """Look at the questions of `queries.path`, in the splits that the config draws; `with_index` as for `look`.

    Raises:
        InputError: the questions cannot be read, or there are none.
        ArtifactError: the index is damaged.
    """
    path, notices = settings.queries.path, fields.Notices()
    rows = list(read_queries(path, notices=notices))
    if settings.queries.split_by != "given":
        rows = list(splits.selected_queries(settings.queries.model_copy(update={"split": "all"}), write=False))
    queries = [row for row in rows if isinstance(row, Query)]
    rejects = [row for row in rows if isinstance(row, Reject)]
    if not queries:
        first = f"; the first reject: {rejects[0].place}: {rejects[0].reason}" if rejects else ""
        raise inputs.InputError(f"{path}: contains no usable question{first}; see docs/data-formats.md for the columns")
    return look(queries, rejects, notices, settings, with_index=with_index)


def look(
    queries: Sequence[Query],
    rejects: Sequence[Reject],
    notices: Mapping[str, int],
    settings: config.Config,
    *,
    with_index: bool = True,
) -> QuestionsCheck:
    """What these questions are like.

    Args:
        queries: all of them, with their splits.
        rejects: of reading them.
        notices: of reading them.
        settings: what counts as equal, the margin, and the workspace.
        with_index: look for documents in the workspace's index, if there is one.

    Raises:
        ArtifactError: the index is damaged.
    """
    rule = settings.evaluate

    @functools.cache
    def normalize(text: str) -> str:
        return normalize_answer(text, rule.language, rule.normalization)

    kinds = Counter(answer_kinds.kind_of(query, rule.language) for query in queries)
    proposal = propose(kinds, has_judge=has_judge(settings))
    compared = _compared(queries, settings, proposal)
    tested = [query for query in compared if query.split == "test"]
    n = len(tested or compared)
    found = QuestionsCheck(
        path=settings.queries.path,
        num_questions=len(queries),
        num_rejects=len(rejects),
        splits=dict(Counter(row.split for row in queries).most_common()),
        kinds={kind: kinds[kind] for kind in answer_kinds.KINDS if kinds[kind]},
        lengths=lengths_of(queries),
        languages=languages.shares([row.text for row in queries]),
        answer_languages=languages.shares(_shortest(queries)),
        repeats=repeats.find_repeats(queries, normalize),
        alike=tuple(gold_answers.alike(queries, rule.language, normalize)),
        blank=tuple(gold_answers.without_words(queries, normalize)),
        documents=_documents(queries, settings if with_index else None, normalize),
        notices=dict(notices),
        num_compared=n,
        smallest_difference=power.smallest_difference(n, rule.confidence) if n else None,
        needed_for_margin=power.needed_questions(settings.compare.margin, rule.confidence)
        if settings.compare.margin
        else None,
        proposal=proposal,
        warnings=(),
    )
    return dataclasses.replace(found, warnings=tuple(_warnings(found, rejects, queries, settings)))


def _compared(queries: Sequence[Query], settings: config.Config, proposal: Proposal) -> list[Query]:
    """The questions for which `compare.metric` is defined, or if there are none, those for which the proposed metric is."""
    metrics = [settings.compare.metric, *([] if proposal.is_makeshift else [proposal.metric])]
    found = ([query for query in queries if is_defined(metric, query, settings.evaluate)] for metric in metrics)
    return next(filter(None, found), [])


def has_judge(settings: config.Config) -> bool:
    """Whether a judge is set."""
    return bool(settings.evaluate.judge.model)


def lengths_of(queries: Sequence[Query]) -> Lengths | None:
    """Lengths of the shortest gold answers, since any suffices; None if there are none."""
    shortest = _shortest(queries)
    if not shortest:
        return None
    words, characters = np.array(answer_kinds.num_words(shortest)), np.array([len(text) for text in shortest])
    return Lengths(
        float(np.median(words)),
        math.ceil(np.percentile(words, 95)),
        int(words.max()),
        float(np.median(characters)),
        math.ceil(np.percentile(characters, 95)),
    )


def counted(counts: Mapping[Any, int]) -> str:
    """Counts in one line, such as `3 train, 1 test`."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def shown_shares(found: Mapping[str, float]) -> str:
    """Shares as percentages in one line.

    >>> shown_shares({"en": 0.995, "": 0.005})
    'en 99.5 %, unclear 0.5 %'
    """
    return ", ".join(f"{name or 'unclear'} {100 * share:.3g} %" for name, share in found.items())


def listed(ids: Sequence[str]) -> str:
    """The first of some ids."""
    return ", ".join(map(repr, ids[:SHOWN]))


def _shortest(queries: Sequence[Query]) -> list[str]:
    return [min(row.answers, key=len) for row in queries if row.answers]


def _documents(
    queries: Sequence[Query], settings: config.Config | None, normalize: gold_answers.Normalize
) -> Documents:
    named = [query for query in queries if splits.positives(query)]
    if settings is None:
        return Documents(len(named))
    try:
        name = versions.current_version(settings.workspace)
    except artifacts.ArtifactError:  # there is no index yet
        return Documents(len(named))
    version = versions.read_version(settings.workspace, name)
    names = {name for query in named for name in splits.positives(query)}
    there = contents.present(settings.workspace, version, sorted(names)) if names else set()
    missing = sum(there.isdisjoint(splits.positives(query)) for query in named)
    return Documents(
        len(named),
        missing,
        gold_answers.look_up(named, settings.workspace, settings.evaluate.language, normalize),
    )


def _warnings(
    found: QuestionsCheck,
    rejects: Sequence[Reject],
    queries: Sequence[Query],
    settings: config.Config,
) -> Iterator[str]:
    if rejects:
        yield f"{len(rejects):,} rows cannot be used; the first: {rejects[0].place}: {rejects[0].reason}"
    yield from repeat_warnings(found.repeats)
    if leak := _leak(queries):
        yield leak
    yield from answer_warnings(found, queries, settings)
    if found.documents.missing:
        yield f"{found.documents.missing:,} questions name only documents that are not in the index; they will be left out"
    if found.num_compared < MIN_QUESTIONS:
        yield f"{found.num_compared} questions are fewer than {MIN_QUESTIONS}: no arm will be recommended; add questions"
    elif found.needed_for_margin and found.num_compared < found.needed_for_margin:
        yield (
            f"{found.num_compared:,} questions are too few to tell arms apart to within "
            f"compare.margin={settings.compare.margin:g}: about {found.needed_for_margin:,} are needed if a quarter of all "
            "questions is won or lost between two arms, fewer if arms differ on fewer; add questions or raise the margin"
        )


def repeat_warnings(found: repeats.Repeats) -> Iterator[str]:
    """What repeated questions mean."""
    if found.texts:
        yield (
            f"{found.texts:,} questions are asked more than once, {found.in_two_splits:,} of them in two splits; such as "
            + listed(found.examples[0])
        )
    if found.contradicting:
        yield (
            f"{found.contradicting:,} of them have other gold answers each time, such as "
            f"{listed(found.contradicting_examples[0])}: at most one is right, or the question needs more words"
        )
    if found.nearly_in_two_splits:
        yield (
            f"{found.nearly_in_two_splits:,} questions nearly repeat one of another split, such as "
            f"{listed(found.near_examples[0])}: a model may have been trained on the answer that it is asked for"
        )


def answer_warnings(found: QuestionsCheck, queries: Sequence[Query], settings: config.Config) -> Iterator[str]:
    """What is wrong with gold answers."""
    if found.alike:
        groups = "; ".join(" = ".join(map(repr, group[:SHOWN])) for group in found.alike[:SHOWN])
        how = "evaluate.normalization=strict tells more apart" if settings.evaluate.normalization == "squad" else ""
        yield f"{len(found.alike):,} groups of gold answers are the same to every metric: {groups}" + (
            f"; {how}" if how else ""
        )
    if found.blank:
        yield f"{len(found.blank):,} questions have a gold answer without a word or number, such as {listed(found.blank)}"
    if other := languages.warning("the gold answers", _shortest(queries), settings.evaluate.language):
        yield other
    grounding = found.documents.grounding
    if grounding and grounding.absent:
        yield (
            f"{len(grounding.absent):,} of {grounding.checked:,} short gold answers stand in none of their documents, such as "
            f"those of {listed(grounding.absent)}: correct the answers or document_ids. Only exact words were looked for, so "
            "answers in other words count as absent"
        )


def _leak(queries: Sequence[Query]) -> str:
    by_split: dict[str, list[Query]] = {}
    for row in queries:
        by_split.setdefault(row.split, []).append(row)
    try:
        splits.check_leaks({name: rows for name, rows in by_split.items() if name != "all"})
    except splits.LeakError as error:
        return str(error)
    return ""
