"""Makes training questions with pseudo-labels: generates questions and answers with the current pair, and filters them.

In: questions without answers, or only the index. Out: training questions; the ledger counts refused ones by reason.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.questions.drawn import spread_passages
from ragtune_ray.cluster.tuning.judging import hits_of, queries_of
from ragtune_ray.cluster.tuning.rounds import Rounds, TuneError
from ragtune_ray.evaluation.questions.writing import drawing, filters, prompts
from ragtune_ray.evaluation.questions.writing.agreement import says_the_same
from ragtune_ray.evaluation.questions.writing.drafts import question_in
from ragtune_ray.index import contents, snapshot
from ragtune_ray.ingest import queries
from ragtune_ray.ingest.splits import positives
from ragtune_ray.tuning import pseudo_labels as checks


def unlabelled(rounds: Rounds) -> list[schema.Query]:
    """The questions to label: those of `tune.questions_path`, or else the training questions without answers.

    Questions that also occur in the validation or test split, or whose documents do, are left out.
    """
    settings = rounds.settings
    path = settings.tune.questions_path
    found = (
        [row for row in queries.read_queries(path) if isinstance(row, schema.Query)]
        if path
        else [query for query in queries_of(settings, "train") if query.answers is None]
    )
    known = {
        (query.messages, query.text.casefold())
        for split in ("validation", "test")
        for query in queries_of(settings, split)
    }
    return [
        dataclasses.replace(query, query_id=f"asked-{query.query_id}", answers=None, split="train")
        for query in found
        if (query.messages, query.text.casefold()) not in known and not rounds.forbidden & set(positives(query))
    ]


def pseudo_labels(rounds: Rounds, questions: Sequence[schema.Query]) -> list[schema.Query]:
    """Answer questions with the current pair; return those whose answers pass every filter, labelled with the answers."""
    rule, seed = rounds.settings.tune, rounds.settings.seed
    if not questions:
        return []
    trusted = rounds.step("trusted", lambda: _trusted(rounds))
    if trusted["confidence"] is None:
        progress.say(
            f"tune: round {rounds.number}, no answer can be trusted: {trusted['precision']:.2f} of the most confident answers "
            f"to validation questions were correct, and tune.min_precision is {rule.min_precision}"
        )
        return []
    path = rounds.path_step("asked", lambda: rounds.write_questions("asked", questions))
    answered = rounds.path_step("labelled", lambda: answer.answer(rounds.settings_for(path)))
    samples = [_sampled(rounds, path, number, seed + number) for number in range(1, rule.samples + 1)]
    kept = rounds.step("filtered", lambda: _filtered(rounds, questions, answered, samples, trusted["confidence"]))
    if not kept["count"]:
        return []
    closed = rounds.settings_for(kept["path"], {"answer.gold_passage": True})
    regenerated = rounds.path_step("regenerated", lambda: answer.answer(closed))
    passed = rounds.step("passed", lambda: _passed(rounds, kept["path"], regenerated))
    return _read(passed["path"])


def _sampled(rounds: Rounds, path: str, number: int, seed: int) -> str:
    """Answer the questions again with sampling; returns the run."""
    values = {"generator.temperature": rounds.settings.tune.sample_temperature, "seed": seed}
    return rounds.path_step(f"sampled {number}", lambda: answer.answer(rounds.settings_for(path, values)))


def _trusted(rounds: Rounds) -> dict[str, Any]:
    """The minimum confidence for a label, from the answers to the validation questions."""
    rule, scored = rounds.settings.tune, rounds.settings.evaluate
    if not rule.min_precision:
        return {"confidence": 0.0, "precision": None, "num_answers": 0}
    settings = rounds.settings_with(rounds.pair, {"queries.split": "validation", "answer.arm": "rag"})
    gold = {row.query_id: row.answers for row in queries_of(settings, "validation") if row.answers is not None}
    rows = [row for row in evaluate.read_answers(str(answer.answer(settings))) if row.query_id in gold]
    cited = (citation.passage_id for row in rows for citation in row.citations)
    texts = contents.passages_by_id(rounds.pair.workspace, cited)
    rows = [row for row in rows if not checks.support_problem(row, texts)]
    known = [gold[row.query_id] for row in rows]
    pairs = zip(rows, known, strict=True)
    is_right = [
        bool(right) and says_the_same(row.answer, right, scored.language, scored.normalization) for row, right in pairs
    ]
    confidences = [row.confidence or 0.0 for row in rows]
    confidence, precision = checks.trusted_confidence(confidences, is_right, rule.min_precision)
    return {"confidence": confidence, "precision": precision, "num_answers": len(rows)}


def _filtered(
    rounds: Rounds, questions: Sequence[schema.Query], answered: str, samples: Sequence[str], trusted: float
) -> dict[str, Any]:
    """Apply the checks of support, likelihood and agreement."""
    rule, scored = rounds.settings.tune, rounds.settings.evaluate
    rows = {row.query_id: row for row in evaluate.read_answers(answered)}
    sampled = [{row.query_id: row.answer for row in evaluate.read_answers(run)} for run in samples]
    cited = (citation.passage_id for row in rows.values() for citation in row.citations)
    texts = contents.passages_by_id(rounds.pair.workspace, cited)

    def judged(query: schema.Query) -> schema.Query | str:
        row = rows[query.query_id]
        label = _label(query, row, texts)
        if isinstance(label, str):
            return label
        said = [each[query.query_id] for each in sampled]
        problem = checks.confidence_problem(row, trusted) or checks.agreement_problem(
            row.answer, said, rule.min_agreement, scored.language, scored.normalization
        )
        if not problem and set(label.document_ids) & rounds.forbidden:
            problem = "is based on a document of another split"
        return problem or label

    return _keep(rounds, "filtered", questions, judged)


def _passed(rounds: Rounds, path: str, regenerated: str) -> dict[str, Any]:
    """Apply the check that the cited passage alone leads to the same answer."""
    rule, scored = rounds.settings.tune, rounds.settings.evaluate
    rows = {row.query_id: row for row in evaluate.read_answers(regenerated)}

    def judged(query: schema.Query) -> schema.Query | str:
        label = (query.answers or ("",))[0]
        problem = checks.regenerated_problem(
            label, rows.get(query.query_id), rule.round_trip_score, scored.language, scored.normalization
        )
        return problem or query

    return _keep(rounds, "passed", _read(path), judged)


def made_questions(rounds: Rounds) -> list[schema.Query]:
    """Generate questions from passages; keep those that retrieve their document. The passage serves as the gold answer."""
    chosen = rounds.path_step("chosen", lambda: rounds.write_questions("chosen", _chosen(rounds)))
    settings = _passage_settings(rounds, chosen, {"prompt.system": prompts.plain_instruction()})
    made = rounds.path_step("made", lambda: answer.answer(settings))
    kept = rounds.step("questions", lambda: _questions(rounds, chosen, made))
    if not kept["count"]:
        return []
    return _read(rounds.step("found", lambda: _retrievable(rounds, kept["path"]))["path"])


def answered(rounds: Rounds, made: Sequence[schema.Query]) -> list[schema.Query]:
    """Answer generated questions from their passages and keep the supported answers as labels."""
    if not made:
        return []
    path = rounds.path_step("asked", lambda: rounds.write_questions("asked", made))
    replied = rounds.path_step("replied", lambda: answer.answer(_passage_settings(rounds, path, {})))
    return _read(rounds.step("passed", lambda: _supported(rounds, path, replied))["path"])


def _passage_settings(rounds: Rounds, path: str, values: Mapping[str, Any]) -> config.Config:
    """The config that shows the question generator the passage of each question."""
    model = rounds.settings.tune.question_model or rounds.pair.generator_model
    return rounds.settings_for(path, {"answer.gold_passage": True, "generator.model": model, **values})


def _chosen(rounds: Rounds) -> list[schema.Query]:
    """Draw passages, spread over the corpus, to generate questions from: each as the answer to a placeholder question."""
    settings = rounds.settings
    index = snapshot.open_part(rounds.pair.workspace, settings.cluster.shard_bytes, settings.seed)
    usable = spread_passages(settings, index, rounds.forbidden).passages
    if not usable:
        raise TuneError(
            f"no passage of {drawing.MIN_CHARACTERS} characters or more is outside the documents of validation and test "
            "questions; name a file of questions in tune.questions_path"
        )
    return [
        schema.Query(f"made-{each.passage_id}", prompts.ASK, (each.text,), (each.document_id,), (1.0,), "train")
        for each in usable[: settings.tune.passages]
    ]


def _questions(rounds: Rounds, chosen: str, made: str) -> dict[str, Any]:
    rows = {row.query_id: row for row in evaluate.read_answers(made)}
    scored = rounds.settings.evaluate
    seen = set[str]()

    def judged(query: schema.Query) -> schema.Query | str:
        text = question_in(rows[query.query_id].answer)
        shown = "".join(query.answers or ())
        passage = schema.Passage("", "", shown, "", "{}", 0, len(shown))
        problem = filters.plain_problem(text, passage, scored.language, scored.normalization)
        if not problem and text.casefold() in seen:
            problem = "duplicate"
        if problem:
            return problem
        seen.add(text.casefold())
        return dataclasses.replace(query, text=text)

    return _keep(rounds, "questions", _read(chosen), judged)


def _retrievable(rounds: Rounds, path: str) -> dict[str, Any]:
    depth = rounds.settings.tune.round_trip_hits
    hits = hits_of(rounds.settings_for(path), depth)

    def judged(query: schema.Query) -> schema.Query | str:
        near = {hit.document_id for hit in hits.get(query.query_id, [])[:depth]}
        return query if near & set(query.document_ids) else "does not retrieve its document"

    return _keep(rounds, "found", _read(path), judged)


def _supported(rounds: Rounds, path: str, replied: str) -> dict[str, Any]:
    rows = {row.query_id: row for row in evaluate.read_answers(replied)}
    texts = contents.passages_by_id(rounds.pair.workspace, (name for row in rows.values() for name in row.passage_ids))
    return _keep(rounds, "passed", _read(path), lambda query: _label(query, rows[query.query_id], texts))


def _label(query: schema.Query, row: schema.Answer, texts: Mapping[str, schema.Passage]) -> schema.Query | str:
    """The question with its answer as a pseudo-label, or the reason why no passage supports the answer."""
    cited = checks.cited_passage(row, texts)
    problem = checks.support_problem(row, texts)
    return problem if problem or cited is None else checks.labelled(query, row.answer, cited)


def _keep(
    rounds: Rounds, name: str, questions: Sequence[schema.Query], judged: Callable[[schema.Query], schema.Query | str]
) -> dict[str, Any]:
    """Write the questions that `judged` accepts to a file, and count its reasons for refusing the others."""
    verdicts = [judged(query) for query in questions]
    kept = [verdict for verdict in verdicts if isinstance(verdict, schema.Query)]
    refused = Counter(verdict for verdict in verdicts if isinstance(verdict, str))
    return {"path": rounds.write_questions(name, kept), "count": len(kept), "refused": dict(refused.most_common())}


def write_mixed(
    rounds: Rounds, gold: Sequence[schema.Query], pseudo: Sequence[schema.Query], name: str = "mixed"
) -> tuple[str, int]:
    """Write gold questions and, up to `tune.pseudo_share`, pseudo-labelled questions to one file, in the step `name`.

    Returns:
        The file, and the number of its training questions.
    """
    settings = rounds.settings
    kept = checks.capped(pseudo, len(gold), settings.tune.pseudo_share, settings.seed)
    file = name.replace(" ", "-")
    row = rounds.step(
        name, lambda: {"path": rounds.write_questions(file, [*gold, *kept]), "gold": len(gold), "pseudo": len(kept)}
    )
    return row["path"], row["gold"] + row["pseudo"]


def _read(path: str) -> list[schema.Query]:
    """The training questions of a file from `write_questions`."""
    return [row for row in queries.read_queries(path) if isinstance(row, schema.Query) and row.split == "train"]
