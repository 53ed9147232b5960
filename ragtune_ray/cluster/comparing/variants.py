"""Searches for the best settings of retrieval, so that fine-tuning is compared with a good `rag`.

In: `compare.variants`. The config itself and its variants answer validation questions in the arm `rag`, with the generator as it
is. Out: the config of the best. A variant that needs its own index has a workspace of its own, `variants/NAME` in the
workspace, with its index, its answers and, if it wins, the models tuned on it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import staged_queries
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.indexing import index
from ragtune_ray.evaluation import halving, intervals, scoring
from ragtune_ray.evaluation.comparison import Variant, VariantRound, VariantSearch
from ragtune_ray.index import contents, versions
from ragtune_ray.ingest import inputs, splits
from ragtune_ray.storage import checksums, filesystem

QUERY_SIDE = {"query_model", "query_prefix"}
"""Settings of the encoder that do not change the index."""


def held_out(settings: config.Config) -> config.Config:
    """The config restricted to the test split if there are variants, since these are chosen on the validation split.

    Raises:
        ConfigError: `queries.split` is the validation split.
    """
    if not are_searched(settings) or settings.queries.split == "test":
        return settings
    if settings.queries.split != "all":
        raise config.ConfigError(
            f"queries.split={settings.queries.split}: compare.variants are chosen on the validation split, so the arms must be "
            "compared on others; set queries.split=test"
        )
    progress.say("queries: variants are chosen on the validation split, so only the test split is used for the arms")
    return settings.with_values({"queries.split": "test"})


def settle(settings: config.Config) -> tuple[config.Config, VariantSearch | None]:
    """The config of the best variant (the config as it is, if it scores the same) and the search; None without variants.

    Raises:
        EvaluationError: there are no validation questions, or a variant's index contains other documents.
        AnswerError: too many rows of a variant failed.
    """
    if not are_searched(settings):
        return settings, None
    questions = _questions(settings)
    candidates = {config.AS_CONFIGURED: settings}
    candidates |= {name: _varied(settings, name) for name in settings.compare.variants}
    for name, varied in candidates.items():
        if varied.workspace != settings.workspace:
            _build(settings, varied, name)
    rounds, scores = halving.halve(
        list(candidates),
        len(questions),
        lambda name, start, stop: _scores(settings, candidates[name], questions[start:stop]),
    )
    found = _search(settings, candidates, rounds, scores, len(questions))
    progress.say(_summary(found))
    return candidates[found.winner], found


def are_searched(settings: config.Config) -> bool:
    """Whether there are variants, and an arm to choose them for."""
    return bool(settings.compare.variants) and any(map(config.retrieves, settings.compare.arms))


def _questions(settings: config.Config) -> list[schema.Query]:
    """The answerable validation questions, in an order that depends only on the seed and their ids."""
    try:
        found = staged_queries.judged_queries(settings.with_values({"queries.split": "validation"}))
    except inputs.InputError:
        found = []
    answerable = [
        query
        for query in found
        if query.answers != () and scoring.is_defined(settings.compare.metric, query, settings.evaluate)
    ]
    if not answerable:
        raise evaluate.EvaluationError(
            f"{settings.queries.path}: no validation question has gold answers for {settings.compare.metric}, and "
            "compare.variants are chosen on these; set queries.split_by=document, or add questions with split=validation"
        )
    return sorted(answerable, key=lambda query: (splits.draw(query.query_id, settings.seed), query.query_id))


def _varied(settings: config.Config, name: str) -> config.Config:
    """The config with the settings of a variant, in its own workspace if it needs its own index."""
    varied = settings.with_values(settings.compare.variants[name])
    if _index_settings(varied) == _index_settings(settings):
        return varied
    return varied.with_values({"workspace": filesystem.join(settings.workspace, "variants", name)})


def _index_settings(settings: config.Config) -> list[object]:
    return [settings.chunking, settings.index, settings.encoder.model_dump(exclude=QUERY_SIDE)]


def _build(settings: config.Config, varied: config.Config, name: str) -> None:
    """Build a variant's index if it is missing, and require the documents of the config's own index."""
    progress.say(f"compare: variant {name} has its own index, in {varied.workspace}")
    index.build_index(varied)
    own, other = (
        contents.fingerprints(
            each.workspace, versions.read_version(each.workspace, versions.current_version(each.workspace))
        )
        for each in (settings, varied)
    )
    if own != other:
        differing = sum(own.get(document) != other.get(document) for document in own.keys() | other.keys())
        raise evaluate.EvaluationError(
            f"{varied.workspace}: {differing:,} documents of {settings.corpus.path} are not as in the index of "
            f"{settings.workspace}, so its answers would rest on other documents; run: ragtune index CONFIG"
        )


def _scores(settings: config.Config, varied: config.Config, questions: Sequence[schema.Query]) -> list[float | None]:
    """The score of each question, answered by a variant in the arm `rag`; None if its grade failed."""
    lines = [json.dumps(dataclasses.asdict(query), ensure_ascii=False) + "\n" for query in questions]
    path = filesystem.join(settings.workspace, "variants", f"questions-{checksums.digest(lines)}.jsonl")
    filesystem.replace_text(path, "".join(lines))
    copied = {"answer.arm": "rag", **staged_queries.own_documents_setting(settings)}
    asked = staged_queries.with_all_queries_of(varied, path).with_values(copied)
    scores = evaluate.scores_of(questions, str(answer.answer(asked)), settings)
    return [scores[query.query_id].get(settings.compare.metric) for query in questions]


def _known(scores: Sequence[float | None]) -> np.ndarray:
    return np.array([score for score in scores if score is not None])


def _search(
    settings: config.Config,
    candidates: dict[str, config.Config],
    rounds: Sequence[halving.Round],
    scores: dict[str, list[float | None]],
    num_questions: int,
) -> VariantSearch:
    rule, own = settings.evaluate, settings.workspace
    return VariantSearch(
        winner=rounds[-1].kept[0],
        questions=num_questions,
        looks=sum(len(each.means) for each in rounds),
        variants={
            name: Variant(
                settings=settings.compare.variants.get(name, {}),
                score=intervals.bootstrap(_known(scores[name]), rule.resamples, rule.confidence, settings.seed),
                workspace="" if varied.workspace == own else varied.workspace,
            )
            for name, varied in candidates.items()
        },
        rounds=tuple(VariantRound(questions=each.num_questions, scores=each.means, kept=each.kept) for each in rounds),
    )


def _summary(found: VariantSearch) -> str:
    best = found.variants[found.winner].score
    return (
        f"compare: {found.winner} is the best of {len(found.variants)} settings of retrieval: {best.value:.3f} "
        f"[{best.low:.3f}, {best.high:.3f}] on {best.n:,} validation questions"
    )
