"""`ragtune tune`: combines retrieval and fine-tuning in four modes, as rounds of the project's own verbs.

In: a config with an index and queries that have splits. Out: `models/MODE/ID/` with `tuned.yaml` (a config with the accepted pair
of retriever and generator) and `ledger.jsonl` (its history); and `models/MODE/CURRENT`, which names the latest. From then on, the
mode is an arm of `answer`, `ask`, `evaluate` and `compare`. A killed tune skips the steps that its ledger records as finished.
"""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import yaml

from ragtune_ray import config, progress
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.comparing import check
from ragtune_ray.cluster.tuning import forecast, labelling
from ragtune_ray.cluster.tuning.judging import hits_of, queries_of
from ragtune_ray.cluster.tuning.rounds import Rounds, TuneError
from ragtune_ray.evaluation.grading import graders
from ragtune_ray.evaluation.scoring import is_defined
from ragtune_ray.evaluation.verdict import MIN_QUESTIONS
from ragtune_ray.index import contents
from ragtune_ray.ingest import splits
from ragtune_ray.models import weights
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts, checksums, failpoints, filesystem
from ragtune_ray.storage.results import Result
from ragtune_ray.tuning import routing
from ragtune_ray.tuning.ledger import Ledger, judged_rows, ledger_lines
from ragtune_ray.tuning.manifest import TuneManifest, read_tune_manifest

FORMAT = 2
"""Part of a tune's identity: raise it when a code change makes the same input lead to other rounds."""
LEDGER, TUNED = "ledger.jsonl", "tuned.yaml"
SHOWN = ("round", "component", "accepted", "reason", "num_examples", "metric", "before", "after", "low", "high")
"""The fields of a verdict that a comparison shows."""


class TuneResult(Result):
    """A finished tune: a directory with `tuned.yaml` and `ledger.jsonl`."""

    @property
    def manifest(self) -> TuneManifest:
        """The facts in manifest.json, such as the accepted `pair`."""
        return read_tune_manifest(self.path)

    def to_arrow(self) -> pa.Table:
        """The verdicts, one row per round and component."""
        rows = [{name: row[name] for name in SHOWN} for row in judged_rows(_ledger(self.path).rows)]
        return pa.table({name: [row[name] for row in rows] for name in SHOWN})


def tune(settings: config.Config) -> TuneResult:
    """Tune retriever and generator in the mode of `tune.mode`; `answer.arm` and `queries.split` are ignored.

    Raises:
        TuneError: there are too few questions to judge by, or a model cannot be tuned.
        LeakError: a document is relevant to queries of two splits.
        ArtifactError: there is no sound index.
        LedgerError: the ledger of an earlier run is damaged.
    """
    settings = settings.with_compared_metric().with_values({"queries.split": "all", "answer.arm": "rag"})
    _check(settings)
    identity = checksums.digest(_identity(settings))
    mode = settings.tune.mode
    folder = filesystem.join(settings.workspace, "models", mode)
    url, root = filesystem.join(folder, identity), filesystem.join(settings.workspace, "rounds", f"{mode}-{identity}")
    if not runs.say_if_finished(url, "tune"):
        # The gates judge by the validation questions.
        judged = {"queries.split": "validation", "compare.arms": ["rag", mode], "compare.variants": {}}
        found = check.say(settings.with_values(judged), forecast.tuning)
        # One Ray session for all verbs of all rounds.
        with session.ray_session(settings.cluster, for_training=True):
            stages = progress.Stages("tune", found.seconds())
            rounds = Rounds(settings, root, Ledger(filesystem.join(root, LEDGER)), Pair.of(settings), stages)
            match mode:
                case "staged":
                    _staged(rounds)
                case "joint":
                    _joint(rounds)
                case "iterative":
                    _iterative(rounds)
                case "domain":
                    _domain(rounds)
            _publish(rounds, url, session.workers(0, 0.0))
    failpoints.reach("tune.published")
    artifacts.make_current(folder, identity)
    result = TuneResult(url)
    _remove_unused(root, Pair(**result.manifest["pair"]))
    return result


def _ledger(url: str) -> Ledger:
    return Ledger(filesystem.join(str(artifacts.open_artifact(url, "tuned").path), LEDGER))


def report_lines(url: str) -> list[str]:
    """The routes and the verdicts of a finished tune, for the terminal."""
    rows = _ledger(url).rows
    routes = next((row["routes"] for row in rows if "routes" in row), None)
    return [*(routing.route_lines(routes) if routes else []), *ledger_lines(rows)]


def _check(settings: config.Config) -> None:
    """Refuse a config that cannot lead to a verdict, before hours of work."""
    rule = settings.tune
    if not settings.queries.path:
        raise config.ConfigError("queries.path is empty; name a file of queries")
    split = {name: queries_of(settings, name) for name in ("train", "validation")}
    metric = settings.compare.metric
    judged = sum(
        query.answers is not None and is_defined(metric, query, settings.evaluate) for query in split["validation"]
    )
    if judged < MIN_QUESTIONS:
        raise TuneError(
            f"{settings.queries.path}: {judged} validation questions have `answers` for {metric}, but judging a round needs at "
            f"least {MIN_QUESTIONS}; add some, or raise the share of validation (queries.split_shares)"
        )
    if rule.probe_path and "generator" in rule.components:
        _check_probe(settings)
    splits.check_leaks({**split, "test": queries_of(settings, "test")})
    needs_generator = "generator" in rule.components or rule.mode in ("joint", "iterative")
    if needs_generator and settings.generator.engine == "openai":
        raise TuneError(
            "generator.engine=openai: a served model can neither be tuned nor teach; "
            "set generator.engine=transformers or vllm, or tune.components=[retriever] in mode staged or domain"
        )
    if "retriever" in rule.components:
        weights.weights_of(weights.resolve(settings.encoder.model))
    if rule.reindex and not settings.corpus.path:
        raise config.ConfigError("tune.reindex indexes the corpus again, but corpus.path is empty; name the corpus")


def _check_probe(settings: config.Config) -> None:
    """Refuse probe questions that could not show that the generator forgets; it answers them without passages."""
    probe = staged_queries.with_all_queries_of(settings, settings.tune.probe_path)
    metric, known = settings.compare.metric, staged_queries.judged_queries(probe)
    if metric == "groundedness":
        reason = "groundedness of answers without passages is always 0"
    elif not any(query.answers is not None and is_defined(metric, query, settings.evaluate) for query in known):
        reason = f"no question has gold answers for {metric}"
    else:
        return
    raise TuneError(
        f"tune.probe_path={settings.tune.probe_path}: {reason}, so nothing would show what the generator forgets; set another "
        "compare.metric, or leave tune.probe_path empty"
    )


def _identity(settings: config.Config) -> dict[str, Any]:
    _, index_manifest = runs.index_version(settings)
    rule = settings.tune
    with staged_queries.staged_queries(settings) as staged:
        fingerprint = staged.fingerprint
    not_identifying = {"path", "split_record", "unindexed", "order"}
    if settings.queries.own_documents == "auto":
        not_identifying.add("own_documents")
    other = [
        staged_queries.fingerprint(staged_queries.with_all_queries_of(settings, path))
        for path in (rule.questions_path, rule.probe_path, rule.retriever_probe_path)
        if path
    ]
    return {
        "format": FORMAT,
        "tune": rule.model_dump(mode="json"),
        "queries": [
            fingerprint,
            settings.queries.model_dump(mode="json", exclude=not_identifying),
            other,
            *([settings.queries.order] if settings.queries.order != "given" else []),
        ],
        "index": index_manifest["content_id"],
        "models": [
            weights.resolve(settings.encoder.model).fingerprint,
            runs.query_model_fingerprint(settings),
            runs.generator_fingerprint(settings.generator),
        ],
        "training": settings.training.identity(),
        "metric": settings.compare.metric,
        "settings": {
            **settings.model_dump(mode="json", include={"prompt", "generator", "seed"}),
            "evaluate": settings.evaluate.identity(),
            **graders.identities(settings),
            "retrieval": settings.retrieval.identity(),
        },
        "reading": settings.answer.model_dump(mode="json", include={"reading", "rank_weight"}),
        "indexing": {"chunking": settings.chunking.model_dump(mode="json"), "index": settings.index.identity()}
        if rule.reindex
        else None,
    }


def _staged(rounds: Rounds) -> None:
    """Answer the training questions, attribute each failure to a component, and tune the component on its failures."""
    values = {"queries.split": "train", "answer.arm": "rag", "answer.max_failed_share": 1}
    rounds.stages.begin(forecast.ANSWER)
    answered = rounds.path_step("answered", lambda: answer.answer(rounds.settings_with(rounds.pair, values)))
    routed = rounds.step("routed", lambda: _routed(rounds, answered))
    rounds.tune_generator(**routed["generator"])
    rounds.tune_retriever(**routed["retriever"], taught=False)


def _routed(rounds: Rounds, path: str) -> dict[str, Any]:
    """Choose the questions that each component learns from, and write them to a file per component."""
    settings, rule = rounds.settings, rounds.settings.tune
    rows = {row.query_id: row for row in evaluate.read_answers(path)}
    known = [query for query in queries_of(settings, "train") if query.answers is not None]
    scores = evaluate.scores_of(known, path, settings)
    values = {name: each.get(settings.compare.metric) for name, each in scores.items()}
    # A question whose grade failed teaches nothing.
    judged = [query for query in known if query.answers == () or values[query.query_id] is not None]
    deep = hits_of(rounds.settings_with(rounds.pair, {"queries.split": "train"}), rule.deep_hits)
    gold_ids = [query.query_id for query in judged if query.answers]
    failed = [query_id for query_id in gold_ids if (values[query_id] or 0.0) < rule.success_score]
    found = {
        name: list(dict.fromkeys([*rows[name].passage_ids, *(hit.passage_id for hit in deep.get(name, []))]))
        for name in failed
    }
    shown = (passage for passages in found.values() for passage in passages)
    texts = contents.passages_by_id(rounds.pair.workspace, shown)
    routed = [
        routing.route(
            query,
            rows[query.query_id],
            values[query.query_id],
            [texts[name] for name in found.get(query.query_id, []) if name in texts],
            rule.success_score,
            rounds.forbidden,
        )
        for query in judged
    ]
    questions = {
        "generator": routing.generator_queries(routed, rule.success_share, settings.seed),
        "retriever": routing.retriever_queries(routed, rule.success_share, settings.seed),
    }
    return {
        "routes": routing.routing_table(routed),
        **{
            name: {"path": rounds.write_questions(name, each), "num_questions": len(each)}
            for name, each in questions.items()
        },
    }


def _joint(rounds: Rounds) -> None:
    """Train the generator on the retrieved passages, then let it teach the retriever, as in expectation-maximization.

    The generator trains first, because an untrained one would teach noise. With tune.in_loop, both train under one loss.
    """
    questions = [query for query in queries_of(rounds.settings, "train") if query.answers]
    for number in range(1, rounds.settings.tune.rounds + 1):
        rounds.number = number
        path = rounds.path_step("written", lambda: rounds.write_questions("questions", questions))
        if rounds.settings.tune.in_loop:
            accepted = [rounds.tune_both(path, len(questions))]
        else:
            accepted = [
                rounds.tune_generator(path, len(questions)),
                rounds.tune_retriever(path, len(questions), taught=True),
            ]
        if not any(accepted):
            return


def _iterative(rounds: Rounds) -> None:
    """Train on gold answers, then on the generator's own answers that pass the filters, while gains are significant.

    In each round, the generator trains from its base on all collected answers, so that mistakes do not accumulate.
    """
    settings, base = rounds.settings, rounds.pair.generator_model
    train = queries_of(settings, "train")
    gold = [query for query in train if query.answers is not None]
    unlabelled = labelling.unlabelled(rounds)
    if not unlabelled:
        raise TuneError(
            f"{settings.queries.path}: every training question has `answers`, so none is left to label; name a file of "
            "questions without answers in tune.questions_path, or use another mode"
        )
    if gold:
        rounds.number = 0
        path = rounds.path_step("written", lambda: rounds.write_questions("questions", gold))
        rounds.tune_generator(path, len(gold))
    collected: dict[str, Any] = {}
    for number in range(1, settings.tune.rounds + 1):
        rounds.number = number
        rounds.stages.begin(forecast.label_stage(number))
        before = len(collected)
        collected |= {query.query_id: query for query in labelling.pseudo_labels(rounds, unlabelled)}
        if len(collected) == before:
            progress.say("tune: no further answer passes the filters; stopping")
            return
        path, count = labelling.write_mixed(rounds, gold, list(collected.values()))
        rounds.tune_generator(path, count, start=base)
        rounds.tune_retriever(path, count, taught=True)
        if not _is_significant(rounds):
            return


def _is_significant(rounds: Rounds) -> bool:
    """Whether this round accepted a gain whose interval excludes 0."""
    return any(
        row["accepted"] and row["low"] > 0
        for row in rounds.ledger.rows
        if row["round"] == rounds.number and "accepted" in row
    )


def _domain(rounds: Rounds) -> None:
    """Train on questions generated from the corpus, or on the user's: the retriever on passages, the generator on answers.

    The retriever learns even from generated questions that are answered badly, as long as they retrieve their passage.
    """
    rounds.stages.begin(forecast.label_stage(rounds.number))
    if rounds.settings.tune.questions_path:
        made = answered = labelling.pseudo_labels(rounds, labelling.unlabelled(rounds))
    else:
        made = labelling.made_questions(rounds)
        answered = labelling.answered(rounds, made) if "generator" in rounds.settings.tune.components else []
    gold = [query for query in queries_of(rounds.settings, "train") if query.answers]
    rounds.tune_retriever(*labelling.write_mixed(rounds, gold, made, "retriever mixed"), taught=False)
    rounds.tune_generator(*labelling.write_mixed(rounds, gold, answered, "generator mixed"))


def _publish(rounds: Rounds, url: str, cores: int) -> None:
    settings = rounds.settings
    staging = artifacts.stage(url)
    text = yaml.safe_dump(rounds.pair.used_in(settings).model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    (staging / TUNED).write_text(text, encoding="utf-8")
    (staging / LEDGER).write_text(rounds.ledger.text(), encoding="utf-8")
    start = Pair.of(settings)
    facts: TuneManifest = {
        "config": settings.model_dump(mode="json"),
        "mode": settings.tune.mode,
        "pair": rounds.pair.facts(),
        "start": start.facts(),
        "rounds": [{name: row[name] for name in SHOWN} for row in judged_rows(rounds.ledger.rows)],
        "seconds": {"steps": round(rounds.ledger.seconds, 3)},
        "num_workers": 1,
        "cores_per_worker": cores,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if drawn := splits.record_id(settings.queries):
        facts["split_record_id"] = drawn
    artifacts.publish(staging, url, "tuned", **facts)
    if rounds.pair == start:
        progress.say("tune: no round was accepted; models and index are unchanged")


def _remove_unused(root: str, pair: Pair) -> None:
    """Remove the rounds' indexes that the accepted pair does not use; each is as large as the index itself."""
    kept = pair.workspace.rstrip("/").split("/")[-2:]  # not the full path, which may be relative or absolute
    for name in filesystem.list_names(root):
        workspace = filesystem.join(root, name)
        if workspace.split("/")[-2:] != kept and filesystem.exists(filesystem.join(workspace, "index")):
            filesystem.remove(filesystem.join(workspace, "index"))
