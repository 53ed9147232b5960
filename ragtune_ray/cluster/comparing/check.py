"""Checks a comparison before it costs anything: splits, leaks, answers, missing documents, power, minutes and memory.

No generator is loaded, and the encoder only to plan an index that is still to be built. What would make the comparison fail is
an error; what would make its result weak is a warning.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ragtune_ray import RagtuneError, config, progress
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.cluster.comparing import forecast, summary, variants
from ragtune_ray.cluster.grading import forecast as grades
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.evaluation.grading.task import GradingError
from ragtune_ray.evaluation.metrics.normalization import WITHOUT_SPACES
from ragtune_ray.evaluation.questions import check as questions
from ragtune_ray.evaluation.questions import power
from ragtune_ray.evaluation.report.plain_text import wrapped
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS
from ragtune_ray.index import plan, versions
from ragtune_ray.ingest import splits
from ragtune_ray.ingest.balanced_splits import SPLITS
from ragtune_ray.ingest.chunking import word_spans
from ragtune_ray.ingest.survey import LONG_ANSWER_CHARACTERS, LONG_ANSWER_WORDS
from ragtune_ray.models import arms as arms_module
from ragtune_ray.models import weights
from ragtune_ray.schema import Query, Reject
from ragtune_ray.storage import artifacts

CUT_SHARE = 0.05
"""Share of the gold answers that may exceed `generator.max_new_tokens` without a warning."""
OFF_SHARE = 0.1
GIBIBYTE = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """What `ragtune compare --check` found."""

    facts: dict[str, Any]
    errors: tuple[str, ...]
    """What makes the comparison fail."""
    warnings: tuple[str, ...]

    def seconds(self) -> dict[str, float | None]:
        """Stage -> how long it will take; None if that is unknown."""
        return {step["name"]: step["seconds"] for step in self.facts["steps"]}

    def lines(self) -> Iterator[str]:
        """The facts, then the warnings and errors, for a person."""
        for name, text in self._rows():
            yield from wrapped(f"{name:<11}", text)
        for level, texts in (("warning", self.warnings), ("error", self.errors)):
            for text in texts:
                yield from wrapped(f"{level:<11}", text)

    def _rows(self) -> Iterator[tuple[str, str]]:
        facts = self.facts
        for split, kinds in facts["splits"].items():
            parts = [f"{count:,} {kind}" for kind, count in kinds.items() if kind != "questions" and count]
            yield split, f"{kinds['questions']:,} questions: {', '.join(parts) or 'none'}"
        answers = facts["answers"]
        if answers["n"]:
            lengths = f"median {answers['median']:g} {answers['unit']}, 95 of 100 at most {answers['p95']:g}"
            over = f"{answers['over_limit']:,} over generator.max_new_tokens={answers['max_new_tokens']}"
            yield "answers", f"{answers['short']:,} short, {answers['long']:,} long; {lengths}; {over}"
        if facts["proposal"]["advice"]:
            yield "metric", facts["proposal"]["advice"]
        shows = facts["power"]
        if shows["smallest_difference"] is not None:
            shown = (
                f"{shows['n']:,} {facts['compared']} questions show a difference of {shows['smallest_difference']:.3f}"
            )
            needed = shows["needed_for_margin"]
            margin = f"; compare.margin={shows['margin']:g} needs about {needed:,}" if needed else ""
            yield "power", f"{shown} with 80 % probability{margin}"
        index = facts["index"]
        yield "index", index["text"]
        if facts.get("grades"):
            yield "grades", facts["grades"]["text"]
        for number, step in enumerate(facts["steps"], start=1):
            shown = "unknown time" if step["seconds"] is None else f"about {progress.duration(step['seconds'])}"
            memory = f", {step['memory_bytes'] / GIBIBYTE:.1f} GiB" if step["memory_bytes"] else ""
            yield f"stage {number}", f"{step['name']}: {shown}{memory} ({step['source']})"
        known = [step["seconds"] for step in facts["steps"] if step["seconds"] is not None]
        unknown = len(facts["steps"]) - len(known)
        without = f", without the {unknown} of unknown time" if unknown else ""
        yield "in all", f"{len(facts['steps'])} stages, about {progress.duration(sum(known))}{without}"


class _Findings:
    """Facts, errors and warnings while they are collected."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.errors: list[str] = []
        self.warnings: list[str] = []


def check(settings: config.Config, stages: forecast.Stages = forecast.comparison) -> Check:
    """Check the comparison of `compare.arms`; nothing is trained, answered or drawn.

    Args:
        settings: of the comparison.
        stages: forecasts what will run.

    Raises:
        ConfigError: `queries.path` is empty.
        InputError: the questions cannot be read.
    """
    if not settings.queries.path:
        raise config.ConfigError("queries.path is empty; name a file of queries")
    given = variants.held_out(evaluate.held_out(settings.with_compared_metric(), settings.compare.arms))
    rows = list(splits.selected_queries(given.queries.model_copy(update={"split": "all"}), write=False))
    queries = [row for row in rows if isinstance(row, Query)]
    found = _Findings()
    rejects = [row for row in rows if isinstance(row, Reject)]
    if rejects:
        found.warnings.append(
            f"{len(rejects):,} rows cannot be used; the first: {rejects[0].place}: {rejects[0].reason}"
        )
    kept = _indexed(given, queries, found)
    asked = [row for row in kept if given.queries.split in ("all", row.split)][: given.queries.limit or None]
    judged = [row for row in asked if given.evaluate.can_score(row.answers)]
    untrained = [arm for arm in given.compare.arms if config.is_tuned(arm) and not _is_trained(given, arm)]
    _check_splits(given, kept, judged, untrained, found)
    _check_questions(given, kept, found)
    sizes = _check_answers(given, kept, judged, found)
    _check_power(given, _num_compared(given, judged, found), found)
    _check_index(given, found)
    _check_grades(given, judged, found)
    _forecast(given, stages(given, untrained, sizes), found)
    return Check(found.facts, tuple(found.errors), tuple(found.warnings))


def say(settings: config.Config, stages: forecast.Stages = forecast.comparison) -> Check:
    """Print what `check` finds as progress, before a comparison or a tune starts."""
    found = check(settings, stages)
    for line in found.lines():
        progress.say(line)
    return found


def _is_trained(settings: config.Config, arm: config.Arm) -> bool:
    try:
        return bool(arms_module.tuned_model(settings.workspace, arm))
    except weights.ModelError:
        return False


def _indexed(settings: config.Config, queries: Sequence[Query], found: _Findings) -> list[Query]:
    """The queries that will be asked; says which documents are missing."""
    lenient = settings.with_values({"corpus.strict": False})
    rows = list(staged_queries.indexed_queries(lenient, queries))
    left_out = [row for row in rows if isinstance(row, Reject)]
    kept = [row for row in rows if isinstance(row, Query)]
    before = {query.query_id: query.document_ids for query in queries}
    partly = [row.query_id for row in kept if row.document_ids != before[row.query_id]]
    found.facts["unindexed"] = {"left_out": len(left_out), "partly": len(partly)}
    if left_out or partly:
        first = left_out[0].reason if left_out else f"query {partly[0]!r}"
        text = (
            f"{len(left_out):,} questions are left out because none of their documents is in the index, and {len(partly):,} lose "
            f"some; the first: {first}"
        )
        (found.errors if settings.corpus.strict else found.warnings).append(text)
    return kept


def _check_splits(
    settings: config.Config, kept: Sequence[Query], judged: Sequence[Query], untrained: Sequence[str], found: _Findings
) -> None:
    by_split: dict[str, list[Query]] = {split: [] for split in SPLITS}
    for row in kept:
        by_split.setdefault("no split" if row.split == "all" else row.split, []).append(row)
    found.facts["compared"] = "selected" if settings.queries.split == "all" else settings.queries.split
    found.facts["splits"] = {
        split: {"questions": len(rows), **Counter(map(splits.answer_kind, rows))} for split, rows in by_split.items()
    }
    if not judged:
        found.errors.append(
            f"{settings.queries.path}: no {found.facts['compared']} question has `answers`: nothing to compare; "
            "add gold answers, or set compare.metric to judge or groundedness, which need none"
        )
    for split in ("train", "validation") if untrained else ():
        if not by_split[split]:
            found.errors.append(
                f"{', '.join(untrained)}: must be trained, but no question has split {split}; set queries.split_by=document"
            )
    found.facts["leak"] = ""
    try:
        splits.check_leaks({split: by_split[split] for split in SPLITS})
    except splits.LeakError as error:
        found.facts["leak"] = str(error)
        (found.errors if any(map(config.is_tuned, settings.compare.arms)) else found.warnings).append(str(error))
    if settings.queries.split_by == "given" or settings.queries.split_record or not kept:
        return
    whole = sum(settings.queries.split_shares)
    for split, share in zip(SPLITS, settings.queries.split_shares, strict=True):
        off = len(by_split[split]) / (len(kept) * share / whole) - 1 if share else 0.0
        if abs(off) > OFF_SHARE:
            found.warnings.append(
                f"split {split} has {off:+.0%} of its share of the questions; queries.split_record draws even splits"
            )


def _num_compared(settings: config.Config, judged: Sequence[Query], found: _Findings) -> int:
    """How many questions `compare.metric` is defined for."""
    try:
        return len(evaluate.compared(settings, judged)) if judged else 0
    except evaluate.EvaluationError as error:
        found.errors.append(str(error))
        return 0


def _check_questions(settings: config.Config, kept: Sequence[Query], found: _Findings) -> None:
    """What the questions themselves are like, as `ragtune questions check` says it."""
    try:
        looked = questions.look(kept, (), {}, settings)
    except artifacts.ArtifactError:  # _check_index names what is wrong with the index
        looked = questions.look(kept, (), {}, settings, with_index=False)
    repeated, proposal = looked.repeats, looked.proposal
    found.facts["duplicates"] = {
        name: getattr(repeated, name) for name in ("texts", "in_two_splits", "contradicting", "nearly_in_two_splits")
    }
    found.facts["kinds"], found.facts["languages"] = looked.kinds, looked.languages
    advice = proposal.advice(settings.compare.metric)
    found.facts["proposal"] = {"metric": proposal.metric, "reason": proposal.reason, "advice": advice}
    found.warnings += questions.repeat_warnings(repeated)
    found.warnings += questions.answer_warnings(looked, kept, settings)


def _check_answers(
    settings: config.Config, kept: Sequence[Query], judged: Sequence[Query], found: _Findings
) -> forecast.Sizes:
    """Lengths of the gold answers, and whether answers and prompts fit."""
    count = _token_counter(settings.generator)
    answered = [row for row in judged if row.answers]
    # Any gold answer is right, so the shortest decides whether a question can be answered.
    shortest = [min(row.answers or (), key=len) for row in answered]
    by_character = settings.evaluate.language in WITHOUT_SPACES
    lengths = np.array([len(spans) for spans in word_spans(shortest)]) if shortest else np.zeros(0)
    limit = LONG_ANSWER_CHARACTERS if by_character else LONG_ANSWER_WORDS
    tokens, longest = np.array(count(shortest)), settings.generator.max_new_tokens
    over = int((tokens > longest).sum())
    found.facts["answers"] = {
        "n": len(answered),
        "short": int((lengths <= limit).sum()),
        "long": int((lengths > limit).sum()),
        "unit": "characters" if by_character else "words",
        "median": float(np.median(lengths)) if answered else 0.0,
        "p95": float(np.percentile(lengths, 95)) if answered else 0.0,
        "over_limit": over,
        "max_new_tokens": longest,
    }
    if answered and over / len(answered) > CUT_SHARE:
        found.warnings.append(
            f"{over:,} of {len(answered):,} gold answers are longer than generator.max_new_tokens={longest}, so no answer can "
            f"equal them; 95 of 100 have at most {math.ceil(np.percentile(tokens, 95))} tokens"
        )
    asked = np.array(count([row.text for row in judged]))
    _check_prompts(settings, judged, asked, count, found)
    train = [row for row in kept if row.split == "train" and row.answers is not None]
    return forecast.Sizes(
        num_questions=len(judged),
        num_train=len(train),
        question_tokens=float(asked.mean()) if len(asked) else 0.0,
        answer_tokens=float(tokens.mean()) if len(tokens) else 0.0,
        reads_gold=summary.reads_gold(settings, judged),
    )


def _check_prompts(
    settings: config.Config,
    judged: Sequence[Query],
    asked: np.ndarray,
    count: Callable[[Sequence[str]], list[int]],
    found: _Findings,
) -> None:
    prompt, generator = settings.prompt, settings.generator
    system = max(count([prompt.system, prompt.system_without_passages]))
    too_long = np.flatnonzero(asked + system > prompt.max_tokens)
    found.facts["prompts"] = {"system_tokens": system, "too_long": len(too_long), "max_tokens": prompt.max_tokens}
    if len(too_long):
        found.warnings.append(
            f"{len(too_long):,} questions do not fit prompt.max_tokens={prompt.max_tokens} with the system prompt and will fail, "
            f"such as {judged[too_long[0]].query_id!r}"
        )
    directory = _directory(generator)
    context = forecast.read_geometry(directory).context_tokens if directory else None
    found.facts["prompts"]["context_tokens"] = context
    if context and prompt.max_tokens + generator.max_new_tokens > context:
        found.warnings.append(
            f"prompt.max_tokens={prompt.max_tokens} and generator.max_new_tokens={generator.max_new_tokens} are more than the "
            f"{context:,} tokens that {generator.model} reads; lower one of them"
        )


def _check_power(settings: config.Config, n: int, found: _Findings) -> None:
    margin, pairs = settings.compare.margin, math.comb(len(settings.compare.arms), 2)
    confidence = settings.evaluate.confidence  # of each pair, as in `decision`
    needed = power.needed_questions(margin, confidence) if margin and pairs else None
    found.facts["power"] = {
        "n": n,
        "pairs": pairs,
        "confidence": confidence,
        "assumed_deviation": power.ASSUMED_DEVIATION,
        "smallest_difference": power.smallest_difference(n, confidence) if n and pairs else None,
        "margin": margin,
        "needed_for_margin": needed,
    }
    if n and pairs and n < MIN_QUESTIONS:
        found.warnings.append(
            f"{n} questions are fewer than {MIN_QUESTIONS}: no arm will be recommended; add questions"
        )
    if needed and n < needed:
        found.warnings.append(
            f"{n:,} questions are too few to tell arms apart to within compare.margin={margin:g}: about {needed:,} are "
            "needed if a quarter of all questions is won or lost between two arms, fewer if arms differ on fewer; add "
            "questions or raise the margin"
        )


def _check_grades(settings: config.Config, judged: Sequence[Query], found: _Findings) -> None:
    """Whether a model is named for each metric that needs one, and what its grades will take."""
    try:
        graders.require_models(settings)
    except (GradingError, weights.ModelError) as error:
        found.errors.append(str(error))
        return
    retrieving = sum(map(config.retrieves, settings.compare.arms))
    runs = len(settings.compare.arms) + (retrieving if summary.reads_gold(settings, judged) else 0)
    grading = grades.forecast(settings, judged, _token_counter(settings.generator), runs)
    found.facts["grades"] = grading.facts() if grading else None
    if grading:
        found.facts["grades"]["text"] = grading.text()


def _check_index(settings: config.Config, found: _Findings) -> None:
    try:
        version = versions.read_version(settings.workspace, versions.current_version(settings.workspace))
    except artifacts.ArtifactError as error:
        found.facts["index"] = _planned(settings)
        if any(config.retrieves(arm) and not config.is_mode(arm) for arm in settings.compare.arms):
            found.errors.append(str(error))
        return
    manifest = version.manifest
    size = round(manifest["num_passages"] * manifest.get("bytes_per_vector", {}).get("searched", 0))
    found.facts["index"] = {
        "version": version.name,
        "num_passages": manifest["num_passages"],
        "seconds": 0.0,
        "memory_bytes": size,
        "text": f"version {version.name}, {manifest['num_passages']:,} passages, {size / GIBIBYTE:.1f} GiB of vectors",
    }


def _planned(settings: config.Config) -> dict[str, Any]:
    """What `ragtune plan` says about the index that is still to be built; the plan is kept."""
    try:
        planned: Mapping[str, Any] = plan.read_plan(plan.plan_index(settings))
    except RagtuneError as error:
        return {"version": "", "text": f"to be built, and cannot be planned: {error}"}
    seconds, memory = planned["seconds"]["total"], planned["kinds"][planned["kind"]]["memory_bytes"]
    return {
        "version": "",
        "num_passages": planned["passages"]["value"],
        "seconds": seconds,
        "memory_bytes": memory,
        "text": f"to be built: about {progress.duration(seconds)}, {planned['passages']['value']:,} passages, "
        f"{memory / GIBIBYTE:.1f} GiB (ragtune plan)",
    }


def _forecast(settings: config.Config, steps: Sequence[forecast.Step], found: _Findings) -> None:
    import psutil

    found.facts["steps"] = [step.facts() for step in steps]
    available = psutil.virtual_memory().available
    for step in steps:
        if step.memory_bytes and step.memory_bytes > available and not settings.cluster.gpus_per_worker:
            found.warnings.append(
                f"{step.name} takes up to {step.memory_bytes / GIBIBYTE:.1f} GiB, but {available / GIBIBYTE:.1f} GiB of memory "
                "are available; lower generator.batch_tokens or training.micro_batch_tokens, or set training.lora_rank"
            )


def _directory(generator: config.Generator) -> Path | None:
    try:
        directory = weights.resolve(generator.model).directory if generator.engine != "openai" else None
    except RagtuneError:
        return None
    return directory if directory and (directory / "config.json").is_file() else None


def _token_counter(generator: config.Generator) -> Callable[[Sequence[str]], list[int]]:
    """Counts tokens with the generator's tokenizer, or, without one, as UTF-8 bytes / 3, which is usually too high."""
    directory = _directory(generator)
    if directory is None or not (directory / "tokenizer.json").is_file():
        return lambda texts: [-(-len(text.encode()) // 3) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda texts: [len(each.ids) for each in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def report(found: Check) -> str:
    """The facts, errors and warnings as one JSON object."""
    return json.dumps({**found.facts, "errors": found.errors, "warnings": found.warnings}, ensure_ascii=False)
