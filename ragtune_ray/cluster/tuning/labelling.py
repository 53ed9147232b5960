"""Questions without answers -> questions to learn from: asked, answered and filtered with the verbs that users have.

In: questions, or nothing but the index. Out: training questions with pseudo-labels, and in the ledger how many were refused and
why. This module knows nothing of what is learnt from them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.tuning.judging import hits_of, queries_of
from ragtune_ray.cluster.tuning.rounds import Rounds, TuneError
from ragtune_ray.index import snapshot
from ragtune_ray.ingest import queries
from ragtune_ray.ingest.splits import positives
from ragtune_ray.tuning import pseudo_labels as checks

__all__ = ["answered", "made_questions", "pseudo_labels", "unlabelled", "write_mixed"]

ASK_FOR_QUESTION = "Write a quiz question about a fact in this passage."
"""What is asked about a passage, as if it were a question."""
QUESTION_SYSTEM = (
    "You are shown a passage. Write one short question, in its language, whose answer is a short phrase of it. Name whom or what "
    "the question is about. Write the question and nothing else. "
    'For example, of "The Eiffel Tower in Paris was completed in 1889 by Gustave Eiffel\'s company." one could ask: In which '
    'year was the Eiffel Tower completed? Of "An octopus has three hearts and blue blood." one could ask: How many hearts does '
    "an octopus have?"
)
"""The examples help small generators most: without them SmolLM2 asked what the answer to the question is."""
MIN_PASSAGE_CHARACTERS = 80


def unlabelled(rounds: Rounds) -> list[schema.Query]:
    """The questions to label: those of `tune.questions_path`, else the training questions without answers.

    Questions that the validation or test split asks too, or about their documents, are left out.
    """
    settings = rounds.settings
    path = settings.tune.questions_path
    found = (
        [row for row in queries.read_queries(path) if isinstance(row, schema.Query)]
        if path
        else [query for query in queries_of(settings, "train") if query.answers is None]
    )
    known = {query.text.casefold() for split in ("validation", "test") for query in queries_of(settings, split)}
    return [
        dataclasses.replace(query, query_id=f"asked-{query.query_id}", answers=None, split="train")
        for query in found
        if query.text.casefold() not in known and not rounds.forbidden & set(positives(query))
    ]


def pseudo_labels(rounds: Rounds, asked: Sequence[schema.Query]) -> list[schema.Query]:
    """The questions whose answers, given by the present pair, pass every filter; the answers are their labels."""
    rule, seed = rounds.settings.tune, rounds.settings.seed
    if not asked:
        return []
    trusted = rounds.step("trusted", lambda: _trusted(rounds))
    if trusted["confidence"] is None:
        progress.say(
            f"tune: round {rounds.number}, no answer can be trusted: of the surest answers to validation questions "
            f"{trusted['precision']:.2f} were right, tune.min_precision is {rule.min_precision}"
        )
        return []
    path = rounds.step("asked", lambda: {"path": rounds.write("asked", asked)})["path"]
    answered = rounds.step("labelled", lambda: {"path": str(answer.answer(rounds.asking(path)))})["path"]
    samples = [
        rounds.step(
            f"sampled {number}",
            lambda number=number: {  # type: ignore[misc]  # bound at once, on purpose
                "path": str(
                    answer.answer(
                        rounds.asking(path, {"generator.temperature": rule.sample_temperature, "seed": seed + number})
                    )
                )
            },
        )["path"]
        for number in range(1, rule.samples + 1)
    ]
    kept = rounds.step("filtered", lambda: _filtered(rounds, asked, answered, samples, trusted["confidence"]))
    if not kept["count"]:
        return []
    again = rounds.step(
        "regenerated", lambda: {"path": str(answer.answer(rounds.asking(kept["path"], {"answer.gold_passage": True})))}
    )["path"]
    passed = rounds.step("passed", lambda: _passed(rounds, kept["path"], again))
    return _read(passed["path"])


def _trusted(rounds: Rounds) -> dict[str, Any]:
    """How sure the generator must be of an answer, by what it made of the validation questions."""
    rule, language = rounds.settings.tune, rounds.settings.evaluate.language
    if not rule.min_precision:
        return {"confidence": 0.0, "precision": None, "num_answers": 0}
    settings = rounds.settings_with(rounds.pair, {"queries.split": "validation", "answer.arm": "rag"})
    gold = {row.query_id: row.answers for row in queries_of(settings, "validation") if row.answers is not None}
    rows = [row for row in evaluate.read_answers(str(answer.answer(settings))) if row.query_id in gold]
    index = snapshot.open_index(rounds.pair.workspace)
    texts = index.by_id(citation.passage_id for row in rows for citation in row.citations)
    rows = [row for row in rows if not checks.support_problem(row, texts)]
    known = [gold[row.query_id] for row in rows]
    is_right = [
        bool(right) and checks.says_the_same(row.answer, right, language)
        for row, right in zip(rows, known, strict=True)
    ]
    confidence, precision = checks.trusted_confidence(
        [row.confidence or 0.0 for row in rows], is_right, rule.min_precision
    )
    return {"confidence": confidence, "precision": precision, "num_answers": len(rows)}


def _filtered(
    rounds: Rounds, asked: Sequence[schema.Query], answered: str, samples: Sequence[str], trusted: float
) -> dict[str, Any]:
    """Support, likelihood and agreement."""
    rule, language = rounds.settings.tune, rounds.settings.evaluate.language
    rows = {row.query_id: row for row in evaluate.read_answers(answered)}
    sampled = [{row.query_id: row.answer for row in evaluate.read_answers(run)} for run in samples]
    index = snapshot.open_index(rounds.pair.workspace)
    texts = index.by_id(citation.passage_id for row in rows.values() for citation in row.citations)

    def judged(query: schema.Query) -> schema.Query | str:
        row = rows[query.query_id]
        label = _label(query, row, texts)
        if isinstance(label, str):
            return label
        said = [each[query.query_id] for each in sampled]
        problem = checks.confidence_problem(row, trusted) or checks.agreement_problem(
            row.answer, said, rule.min_agreement, language
        )
        if not problem and set(label.document_ids) & rounds.forbidden:
            problem = "rests on a document of another split"
        return problem or label

    return _sorted_out(rounds, "filtered", asked, judged)


def _passed(rounds: Rounds, path: str, again: str) -> dict[str, Any]:
    """The round trip through the cited passage."""
    rule, language = rounds.settings.tune, rounds.settings.evaluate.language
    rows = {row.query_id: row for row in evaluate.read_answers(again)}

    def judged(query: schema.Query) -> schema.Query | str:
        label = (query.answers or ("",))[0]
        return checks.regenerated_problem(label, rows.get(query.query_id), rule.round_trip_score, language) or query

    return _sorted_out(rounds, "passed", _read(path), judged)


def made_questions(rounds: Rounds) -> list[schema.Query]:
    """Questions that the generator makes of passages and that find their documents again; each passage stands as the answer."""
    chosen = rounds.step("chosen", lambda: {"path": rounds.write("chosen", _chosen(rounds))})["path"]
    asking = _of_the_passage(rounds, chosen, {"prompt.system": QUESTION_SYSTEM})
    made = rounds.step("made", lambda: {"path": str(answer.answer(asking))})["path"]
    asked = rounds.step("questions", lambda: _questions(rounds, chosen, made))
    if not asked["count"]:
        return []
    return _read(rounds.step("found", lambda: _found_again(rounds, asked["path"]))["path"])


def answered(rounds: Rounds, made: Sequence[schema.Query]) -> list[schema.Query]:
    """The made questions that their passage holds an answer to, by the generator that made them; that answer is the label."""
    if not made:
        return []
    path = rounds.step("asked", lambda: {"path": rounds.write("asked", made)})["path"]
    replied = rounds.step("replied", lambda: {"path": str(answer.answer(_of_the_passage(rounds, path, {})))})["path"]
    return _read(rounds.step("passed", lambda: _supported(rounds, path, replied))["path"])


def _of_the_passage(rounds: Rounds, path: str, values: Mapping[str, Any]) -> config.Config:
    """The config that asks the generator that makes questions, showing it the passage that each question is about."""
    model = rounds.settings.tune.question_model or rounds.pair.generator_model
    return rounds.asking(path, {"answer.gold_passage": True, "generator.model": model, **values})


def _chosen(rounds: Rounds) -> list[schema.Query]:
    """Passages to make questions of, drawn by the seed, one of a document before a second; each stands as its own answer."""
    index = snapshot.open_index(rounds.pair.workspace)
    usable = [
        each
        for each in schema.from_table(index.live_passages(), schema.Passage)
        if each.document_id not in rounds.forbidden and len(each.text.strip()) >= MIN_PASSAGE_CHARACTERS
    ]
    if not usable:
        raise TuneError(
            f"no passage of {MIN_PASSAGE_CHARACTERS} characters or more belongs to a document that no validation or test "
            "question is about; name questions of your own in tune.questions_path"
        )
    order = np.random.default_rng(rounds.settings.seed).permutation(len(usable))
    seen: Counter[str] = Counter()
    ranked = list[tuple[int, int, schema.Passage]]()
    for place in order.tolist():
        ranked.append((seen[usable[place].document_id], len(ranked), usable[place]))
        seen[usable[place].document_id] += 1
    ranked.sort(key=lambda each: each[:2])
    return [
        schema.Query(f"made-{each.passage_id}", ASK_FOR_QUESTION, (each.text,), (each.document_id,), (1.0,), "train")
        for _, _, each in ranked[: rounds.settings.tune.passages]
    ]


def _questions(rounds: Rounds, chosen: str, made: str) -> dict[str, Any]:
    """The texts that are questions, in place of the passages' own."""
    rows = {row.query_id: row for row in evaluate.read_answers(made)}
    seen = set[str]()

    def judged(query: schema.Query) -> schema.Query | str:
        text = checks.question_of(rows[query.query_id].answer)
        problem = checks.question_problem(text, (query.answers or ("",))[0])
        if not problem and text.casefold() in seen:
            problem = "was made twice"
        if problem:
            return problem
        seen.add(text.casefold())
        return dataclasses.replace(query, text=text)

    return _sorted_out(rounds, "questions", _read(chosen), judged)


def _found_again(rounds: Rounds, path: str) -> dict[str, Any]:
    """The round trip: a question must find the document of its passage."""
    depth = rounds.settings.tune.round_trip_hits
    hits = hits_of(rounds.asking(path), depth)

    def judged(query: schema.Query) -> schema.Query | str:
        near = {hit.document_id for hit in hits.get(query.query_id, [])[:depth]}
        return query if near & set(query.document_ids) else "does not find its document again"

    return _sorted_out(rounds, "found", _read(path), judged)


def _supported(rounds: Rounds, path: str, replied: str) -> dict[str, Any]:
    """Support: a passage must hold the answer that was given from it."""
    rows = {row.query_id: row for row in evaluate.read_answers(replied)}
    index = snapshot.open_index(rounds.pair.workspace)
    texts = index.by_id(name for row in rows.values() for name in row.passage_ids)
    return _sorted_out(rounds, "passed", _read(path), lambda query: _label(query, rows[query.query_id], texts))


def _label(query: schema.Query, row: schema.Answer, texts: Mapping[str, schema.Passage]) -> schema.Query | str:
    """The question with its answer as a pseudo-label, or why nothing supports that answer."""
    cited = checks.cited_passage(row, texts)
    problem = checks.support_problem(row, texts)
    return problem if problem or cited is None else checks.labelled(query, row.answer, cited)


def _sorted_out(
    rounds: Rounds, name: str, asked: Sequence[schema.Query], judged: Callable[[schema.Query], schema.Query | str]
) -> dict[str, Any]:
    """The questions that are kept, as `judged` gives them back, in a file; and how many were refused for which reason."""
    verdicts = [judged(query) for query in asked]
    kept = [verdict for verdict in verdicts if isinstance(verdict, schema.Query)]
    refused = Counter(verdict for verdict in verdicts if isinstance(verdict, str))
    return {"path": rounds.write(name, kept), "count": len(kept), "refused": dict(refused.most_common())}


def write_mixed(
    rounds: Rounds, gold: Sequence[schema.Query], pseudo: Sequence[schema.Query], name: str = "mixed"
) -> tuple[str, int]:
    """Gold and pseudo-labelled questions together, the latter no more than their share.

    Args:
        rounds: of this tune.
        gold: questions with gold answers.
        pseudo: questions with pseudo-labels.
        name: of the step.

    Returns:
        The file, and how many they are.
    """
    settings = rounds.settings
    kept = checks.capped(pseudo, len(gold), settings.tune.pseudo_share, settings.seed)
    file = name.replace(" ", "-")
    row = rounds.step(
        name, lambda: {"path": rounds.write(file, [*gold, *kept]), "gold": len(gold), "pseudo": len(kept)}
    )
    return row["path"], row["gold"] + row["pseudo"]


def _read(path: str) -> list[schema.Query]:
    """The training questions of a file of this tune."""
    return [row for row in queries.read_queries(path) if isinstance(row, schema.Query) and row.split == "train"]
