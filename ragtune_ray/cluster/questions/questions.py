"""`ragtune questions`: questions with answers, evidence and splits, written by a generator about the documents of the index.

Out: `questions.jsonl`, which `queries.path` reads; `refused.jsonl`, what was thrown out and why; `passages.jsonl`, the passages
of the kept questions. A killed job repeats only unfinished units.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import runs, session, stages
from ragtune_ray.cluster.questions.drawn import drawn
from ragtune_ray.cluster.questions.worker import QuestionUnit, unit_of
from ragtune_ray.config.evaluation import QuestionKind
from ragtune_ray.evaluation.questions.writing import prompts, rows
from ragtune_ray.evaluation.questions.writing.drawing import Seed, counts_of
from ragtune_ray.evaluation.questions.writing.filters import Reason
from ragtune_ray.evaluation.questions.writing.making import Outcome
from ragtune_ray.evaluation.questions.writing.selection import Selection, select
from ragtune_ray.index import contents, snapshot, versions
from ragtune_ray.ingest import splits
from ragtune_ray.models.encoder import load_encoder
from ragtune_ray.storage import artifacts, checksums, filesystem
from ragtune_ray.storage.results import Result

FORMAT = 1
"""Part of a run's identity: raise it when a code change makes the same input produce other questions."""
LEAST_RATE = 0.05
"""The share of drawn passages that yields a question is taken to be at least this when more passages are drawn."""
QUESTIONS, REFUSED, PASSAGES = "questions.jsonl", "refused.jsonl", "passages.jsonl"
WEAK = (
    "these questions are weak: the embedded model of 135 million parameters wrote and checked them. Review them with "
    "`ragtune questions review`, or name a capable model in questions.model"
)

Seeds = Mapping[QuestionKind, Sequence[Seed]]


class QuestionsError(RagtuneError, RuntimeError):
    """No usable questions were written."""


@dataclass(frozen=True)
class WrittenQuestions(Result):
    """A run of `questions`."""

    @property
    def questions(self) -> str:
        """The file of questions, for `queries.path`."""
        return filesystem.join(self.path, QUESTIONS)

    def rows(self) -> list[rows.QuestionRow]:
        """The questions with their provenance, checked against the manifest."""
        path = artifacts.open_artifact(self.path, "questions", [QUESTIONS]).path / QUESTIONS
        return [json.loads(line) for line in filesystem.json_lines(path.read_text(encoding="utf-8"))]


def write_questions(settings: config.Config, forbidden: Collection[str] = ()) -> WrittenQuestions:
    """Write questions about the documents of the index, and keep those that pass every filter.

    Args:
        settings: the whole config; the section `questions` says what is wanted, and who writes it.
        forbidden: ids of documents that must not be asked about.

    Raises:
        ArtifactError: there is no sound index.
        DrawingError: it has no passage to ask about.
        QuestionsError: too many requests failed, or no question passed the filters.
    """
    settings = settings.with_values(settings.questions.generator_values())
    version, manifest = runs.index_version(settings)
    generator = runs.generator_fingerprint(settings.generator)
    run = runs.Run.of(settings, "questions", _identity(settings, manifest, generator, forbidden))
    if not run.is_finished():
        seeds = drawn(settings, _open_part(settings, version), forbidden)
        is_weak = settings.generator.engine == "transformers" and settings.generator.model == config.Generator().model
        if is_weak:
            progress.say(f"questions: {WEAK}")
        with run.session(version), _shards(settings, version) as shards:
            outcomes, selection = _in_rounds(run, version, seeds, shards)
        _publish(run, version, outcomes, selection, WEAK if is_weak else "")
    return WrittenQuestions(run.url)


def _open_part(settings: config.Config, version: str) -> snapshot.Index:
    """What to draw passages from: the index, or the part of it that this process may open."""
    opened = snapshot.open_part(settings.workspace, settings.cluster.shard_bytes, settings.seed, version)
    num_segments = len(versions.read_version(settings.workspace, version).entries)
    if len(opened.segments) < num_segments:
        progress.say(
            f"questions: the index is larger than cluster.shard_bytes ({settings.cluster.shard_bytes:,}), so passages are "
            f"drawn from {len(opened.segments)} of its {num_segments} segments, chosen at random"
        )
    return opened


@contextlib.contextmanager
def _shards(settings: config.Config, version: str) -> Iterator[list[Any]]:
    """Actors that search an index which no process may open as a whole; none if a process may."""
    opened = versions.read_version(settings.workspace, version)
    num_shards = len(snapshot.shards(settings.workspace, opened, settings.cluster.shard_bytes))
    if num_shards <= 1:
        yield []
        return
    from ragtune_ray.cluster.serving import shard_actors

    with shard_actors.started(settings, num_shards) as shards:
        yield shards


def _identity(
    settings: config.Config, index_manifest: Mapping[str, Any], generator: str, forbidden: Collection[str]
) -> dict[str, Any]:
    scored = settings.evaluate
    split = settings.queries.model_dump(include={"split_by", "split_shares", "split_seed", "split_record"})
    return {
        "format": FORMAT,
        "prompts": prompts.VERSION,
        "index": index_manifest["content_id"],
        "tenant": [settings.index.tenant_field, settings.retrieval.tenant],
        "encoder": runs.encoder_identity(settings),
        "query_model": runs.query_model_fingerprint(settings),
        "retrieval": runs.retrieval_identity(settings, index_manifest),
        "questions": settings.questions.model_dump(mode="json", exclude={"model", "engine", "base_url", "api_key_env"}),
        "generator": settings.generator.model_dump(mode="json", include={"engine", "precision", "temperature"}),
        "model": generator,
        "max_tokens": settings.prompt.max_tokens,
        "scoring": [scored.language, scored.normalization],
        "split": split,
        "seed": settings.seed,
        **({"forbidden": sorted(forbidden)} if forbidden else {}),
    }


def _in_rounds(run: runs.Run, version: str, seeds: Seeds, shards: Sequence[Any]) -> tuple[list[Outcome], Selection]:
    """Ask about as many passages as it takes to keep the questions that are wanted, or about all that were drawn."""
    rule = run.settings.questions
    wanted = counts_of(rule.count, rule.shares)
    encoder = load_encoder(run.settings.encoder)
    scored = run.settings.evaluate
    sizes = {kind: min(count, len(seeds[kind])) for kind, count in wanted.items()}
    while True:
        outcomes = _asked(run, version, seeds, sizes, shards)
        selection = select(outcomes, wanted, rule, scored.language, scored.normalization, encoder.encode_queries)
        kept = Counter(outcome.seed.kind for outcome in selection.kept)
        grown = {
            kind: min(len(seeds[kind]), more_seeds(size, kept[kind], wanted[kind])) for kind, size in sizes.items()
        }
        if grown == sizes:
            return outcomes, selection
        progress.say(f"questions: {len(selection.kept):,} of {rule.count:,} kept so far; more passages are drawn")
        sizes = grown


def more_seeds(asked: int, kept: int, wanted: int) -> int:
    """How many passages to ask about in all, if so many of those asked so far gave a question that is kept.

    >>> more_seeds(20, 10, 15), more_seeds(20, 20, 20), more_seeds(10, 0, 10)
    (30, 20, 210)
    """
    rate = max(LEAST_RATE, kept / asked if asked else 1.0)
    return asked + max(0, math.ceil((wanted - kept) / rate))


def _asked(
    run: runs.Run, version: str, seeds: Seeds, sizes: Mapping[QuestionKind, int], shards: Sequence[Any]
) -> list[Outcome]:
    """Ask about the first so many seeds of each kind, in whole units, and return what became of them, in order."""
    settings = run.settings
    directory = filesystem.join(run.work, "questions")
    units, first = [], 0
    for kind, all_seeds in seeds.items():
        chunks = _chunks(all_seeds, settings.questions.unit_questions)
        num_units = -(-sizes[kind] // settings.questions.unit_questions)
        units += [unit_of(first + number, chunk) for number, chunk in enumerate(chunks[:num_units])]
        first += len(chunks)
    cluster = session.for_generators(settings)
    arguments = {"settings": settings, "version": version, "directory": directory, "shards": shards}
    pool = session.pool(QuestionUnit, arguments, cluster.generator_workers, cluster)
    summaries = stages.run_stage(
        "questions",
        directory,
        units,
        stages.on_actors(pool),
        counted="passages",
        rows_of=lambda unit: len(unit["seeds"]),
    )
    outcomes = [_read(directory, summary) for summary in summaries]
    _refuse_failures(settings, directory, summaries, outcomes)
    return [outcome for of_unit in outcomes for outcome in of_unit]


def _chunks(seeds: Sequence[Seed], size: int) -> list[list[Seed]]:
    return [list(seeds[start : start + size]) for start in range(0, len(seeds), size)]


def _read(directory: str, summary: stages.Summary) -> list[Outcome]:
    text = filesystem.read_text(stages.unit_file(directory, summary["unit"], "jsonl"))
    return [rows.loaded(line) for line in filesystem.json_lines(text)]


def _refuse_failures(
    settings: config.Config,
    directory: str,
    summaries: Sequence[stages.Summary],
    outcomes: Sequence[Sequence[Outcome]],
) -> None:
    """Raise a QuestionsError if too many requests failed; the next run then repeats their units."""
    failed = [[each for each in of_unit if each.reason in ("request failed", "check failed")] for of_unit in outcomes]
    count, total = sum(map(len, failed)), sum(map(len, outcomes))
    if count <= settings.answer.max_failed_share * total:
        return
    for summary, of_unit in zip(summaries, failed, strict=True):
        if of_unit:
            stages.forget_unit(directory, summary["unit"])
    reason = next(each.detail for of_unit in failed for each in of_unit)
    raise QuestionsError(
        f"{count} of {total} requests failed, more than answer.max_failed_share ({settings.answer.max_failed_share}) allows; "
        f"the first: {reason}; fix this and rerun: only failed units are repeated"
    )


def _publish(run: runs.Run, version: str, outcomes: Sequence[Outcome], selection: Selection, notice: str) -> None:
    named = {_query_id(outcome): outcome for outcome in selection.kept}
    split_of = _splits(run.settings, named)
    homeless: list[tuple[Outcome, Reason]] = [
        (outcome, "documents are in different splits") for name, outcome in named.items() if not split_of[name]
    ]
    selection = dataclasses.replace(selection, refused=(*selection.refused, *homeless))
    names = (name for outcome in named.values() for name in outcome.seed.passage_ids)
    passages = contents.passages_by_id(run.settings.workspace, names, version)
    kept = [
        rows.row_of(outcome, name, split_of[name], passages, run.settings.generator.model)
        for name, outcome in named.items()
        if split_of[name]
    ]
    refused = [rows.refused_row(outcome, reason) for outcome, reason in selection.refused]
    if not kept:
        url = filesystem.join(run.work, REFUSED)
        filesystem.replace_text(url, rows.jsonl(refused))
        counts = ", ".join(f"{reason}: {count}" for reason, count in selection.counts().items())
        raise QuestionsError(
            f"no question of {len(outcomes)} passed the filters ({counts}); {url} has them; name a capable model in "
            "questions.model"
        )
    staging = artifacts.stage(run.url)
    _write(staging / QUESTIONS, rows.jsonl(kept))
    _write(staging / REFUSED, rows.jsonl(refused))
    _write(staging / PASSAGES, rows.jsonl([_passage_row(passages[name]) for name in sorted(passages)]))
    run.publish(staging, _facts(run.settings, version, kept, outcomes, selection, notice))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _passage_row(passage: schema.Passage) -> dict[str, object]:
    row: dict[str, object] = dataclasses.asdict(passage)
    return {name: row[name] for name in ("passage_id", "document_id", "title", "text", "start", "end")}


def _query_id(outcome: Outcome) -> str:
    """An id that depends only on the question and what it is about."""
    assert outcome.draft is not None
    return f"made-{checksums.digest([outcome.draft.full_question, *outcome.seed.passage_ids])}"


def _splits(settings: config.Config, named: Mapping[str, Outcome]) -> dict[str, str]:
    """The split of each question, by the documents that it was written from."""
    asked = [rows.query_of(outcome, name) for name, outcome in named.items()]
    given = settings.queries
    by: Any = "document" if given.split_by == "given" else given.split_by
    if given.split_record:
        return splits.record_splits(asked, given.model_copy(update={"split_by": by}))
    return splits.assign_splits(asked, by, given.split_shares, given.split_seed)


def _facts(
    settings: config.Config,
    version: str,
    kept: Sequence[rows.QuestionRow],
    outcomes: Sequence[Outcome],
    selection: Selection,
    notice: str,
) -> runs.RunFacts:
    content = versions.read_version(settings.workspace, version).content_id
    with_document = [row for row in kept if row["document_ids"]]
    return {
        "index_version": version,
        "index_content": content,
        "num_questions": len(kept),
        "num_drawn": len(outcomes),
        "kinds": dict(Counter(row["kind"] for row in kept)),
        "splits": dict(Counter(row["split"] for row in kept)),
        "refused": selection.counts(),
        "malformed_replies": sum(outcome.malformed for outcome in outcomes),
        "found": {"documents": sum(row["rank"] > 0 for row in with_document), "questions": len(with_document)},
        "usage": {
            "requests": sum(outcome.requests for outcome in outcomes),
            "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
            "completion_tokens": sum(outcome.completion_tokens for outcome in outcomes),
        },
        "generator": settings.generator.model,
        "notice": notice,
    }


def report_lines(result: WrittenQuestions) -> list[str]:
    """What was kept and thrown out, as lines for the terminal."""
    facts = result.manifest
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["kinds"].items())
    asked, found = facts["num_drawn"], facts["found"]
    lines = [f"kept {facts['num_questions']} of {asked} questions ({facts['num_questions'] / asked:.0%}): {kinds}"]
    if facts["refused"]:
        width = max(map(len, facts["refused"]))
        lines.append("thrown out:")
        lines += [f"  {reason:<{width}}  {count:>5}" for reason, count in facts["refused"].items()]
    top_k = facts["config"]["retrieval"]["top_k"]
    lines.append(
        f"replies of another form: {facts['malformed_replies']}; questions that find their document among {top_k} hits: "
        f"{found['documents']} of {found['questions']}"
    )
    return [*lines, *filter(None, [facts["notice"]])]
