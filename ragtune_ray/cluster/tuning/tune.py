"""`ragtune tune`: the four ways to combine retrieval and fine-tuning, as rounds of the project's own verbs.

In: a config with an index and queries that have splits. Out: `models/MODE/ID/`: which pair of retriever and generator was best
on the validation split (`tuned.yaml`, a config that every verb takes), and how it came about (`ledger.jsonl`); and
`models/MODE/CURRENT`, which names the last one and is the only thing that readers of the workspace see change. A mode is an arm
of `answer`, `ask`, `evaluate` and `compare` from then on.

The ledger names every finished step. Whoever starts goes through the mode from its beginning and takes what the ledger holds: so
a tune that was killed anywhere goes on from its last step, by the same road as one that was not.
"""

from __future__ import annotations

import time
from typing import Any

import yaml

from ragtune_ray import config, progress
from ragtune_ray.cluster import runs, session, staged_queries
from ragtune_ray.cluster.answering import answer, evaluate
from ragtune_ray.cluster.training import train as train_module
from ragtune_ray.cluster.tuning import labelling
from ragtune_ray.cluster.tuning.judging import hits_of, queries_of
from ragtune_ray.cluster.tuning.rounds import Rounds, TuneError
from ragtune_ray.evaluation.decision import MIN_QUESTIONS
from ragtune_ray.index import snapshot
from ragtune_ray.ingest import splits
from ragtune_ray.models import weights
from ragtune_ray.models.arms import Pair
from ragtune_ray.storage import artifacts, checksums, failpoints, filesystem
from ragtune_ray.tuning import routing
from ragtune_ray.tuning.ledger import Ledger, judged_rows, ledger_lines

__all__ = ["TuneError", "report_lines", "tune"]

FORMAT = 2
"""Part of a tune's identity: raise it when the same input would give other rounds."""
LEDGER, TUNED = "ledger.jsonl", "tuned.yaml"
SHOWN = ("round", "component", "accepted", "reason", "num_examples", "metric", "before", "after", "low", "high")
"""What a comparison shows of a verdict."""


def tune(settings: config.Config) -> str:
    """Tune retriever and generator in the mode of `tune.mode`.

    Args:
        settings: everything but `answer.arm` and `queries.split` is used.

    Returns:
        The directory with `tuned.yaml` and `ledger.jsonl`.

    Raises:
        TuneError: there is too little to judge by, or what is to be tuned cannot be.
        splitting.LeakError: splits share a relevant document.
        storage.ArtifactError: there is no sound index.
        ledger.LedgerError: the ledger of an earlier run is damaged.
    """
    settings = settings.with_values({"queries.split": "all", "answer.arm": "rag"})
    _refuse_hopeless(settings)
    identity = checksums.digest(_identity(settings))
    mode = settings.tune.mode
    folder = filesystem.join(settings.workspace, "models", mode)
    url, root = filesystem.join(folder, identity), filesystem.join(settings.workspace, "rounds", f"{mode}-{identity}")
    if not runs.already(url, "tune"):
        with session.ray_session(settings.cluster, for_training=True):
            rounds = Rounds(settings, root, Ledger(filesystem.join(root, LEDGER)), Pair.of(settings))
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
    _remove_unused(root, Pair(**artifacts.read_manifest(url)["pair"]))
    return url


def report_lines(url: str) -> list[str]:
    """The table of a finished tune, for a terminal."""
    artifact = artifacts.open_artifact(url, "tuned")
    rows = Ledger(filesystem.join(str(artifact.path), LEDGER)).rows
    routes = next((row["routes"] for row in rows if "routes" in row), None)
    return [*(routing.route_lines(routes) if routes else []), *ledger_lines(rows)]


def _refuse_hopeless(settings: config.Config) -> None:
    """What would end hours later without a verdict ends now."""
    rule = settings.tune
    if not settings.queries.path:
        raise config.ConfigError("queries.path is empty; name a file of queries")
    split = {name: queries_of(settings, name) for name in ("train", "validation")}
    judged = sum(query.answers is not None for query in split["validation"])
    if judged < MIN_QUESTIONS:
        raise TuneError(
            f"{settings.queries.path}: {judged} validation questions have `answers`, and no round can be judged by fewer than "
            f"{MIN_QUESTIONS}; add some, or give validation a larger part (queries.split_shares)"
        )
    splits.check_leaks({**split, "test": queries_of(settings, "test")})
    needs_generator = "generator" in rule.components or rule.mode in ("joint", "iterative")
    if needs_generator and settings.generator.engine != "transformers":
        raise TuneError(
            f"generator.engine={settings.generator.engine}: a served model can neither be tuned nor teach; "
            "set generator.engine=transformers, or tune.components=[retriever] in mode staged or domain"
        )
    if "retriever" in rule.components:
        weights.weights_of(weights.resolve(settings.encoder.model))
    if rule.reindex and not settings.corpus.path:
        raise config.ConfigError("tune.reindex indexes the corpus anew, and corpus.path is empty; name the corpus")


def _identity(settings: config.Config) -> dict[str, Any]:
    _, opened = runs.index_version(settings)
    rule = settings.tune
    with staged_queries.staged_queries(settings) as staged:
        asked = staged.fingerprint
    other = [
        staged_queries.fingerprint(staged_queries.asking(settings, path))
        for path in (rule.questions_path, rule.probe_path, rule.retriever_probe_path)
        if path
    ]
    return {
        "format": FORMAT,
        "tune": rule.model_dump(mode="json"),
        "queries": [asked, settings.queries.model_dump(mode="json", exclude={"path"}), other],
        "index": opened["content_id"],
        "models": [
            weights.resolve(settings.encoder.model).fingerprint,
            runs.query_model_fingerprint(settings),
            answer.generator_fingerprint(settings.generator),
        ],
        "training": settings.training.model_dump(mode="json", exclude=train_module.UNRELATED),
        "metric": settings.compare.metric,
        "settings": settings.model_dump(mode="json", include={"retrieval", "prompt", "generator", "evaluate", "seed"}),
        "reading": settings.answer.model_dump(mode="json", include={"reading", "rank_weight"}),
        "indexing": settings.model_dump(mode="json", include={"chunking", "index"}) if rule.reindex else None,
    }


def _staged(rounds: Rounds) -> None:
    """Answer the training questions, sort the failures, and tune each component on those that are its own."""
    answered = rounds.step("answered", lambda: _answered(rounds))
    routed = rounds.step("routed", lambda: _routed(rounds, answered["path"]))
    rounds.tune_generator(**routed["generator"])
    rounds.tune_retriever(**routed["retriever"], taught=False)


def _answered(rounds: Rounds) -> dict[str, Any]:
    settings = rounds.settings_with(
        rounds.pair, {"queries.split": "train", "answer.arm": "rag", "answer.max_failed_share": 1}
    )
    return {"path": str(answer.answer(settings))}


def _routed(rounds: Rounds, path: str) -> dict[str, Any]:
    """Which question teaches whom; the questions of each component as a file."""
    settings, rule = rounds.settings, rounds.settings.tune
    rows = {row.query_id: row for row in evaluate.read_answers(path)}
    asked = [query for query in queries_of(settings, "train") if query.answers is not None]
    scores = evaluate.scores_of(asked, list(rows.values()), settings)
    values = {name: each.get(settings.compare.metric) for name, each in scores.items()}
    deep = hits_of(rounds.settings_with(rounds.pair, {"queries.split": "train"}), rule.deep_hits)
    index = snapshot.open_index(rounds.pair.workspace, None)
    failed = [
        query.query_id for query in asked if query.answers and (values[query.query_id] or 0.0) < rule.success_score
    ]
    found = {
        name: list(dict.fromkeys([*rows[name].passage_ids, *(hit.passage_id for hit in deep.get(name, []))]))
        for name in failed
    }
    texts = index.by_id(passage for passages in found.values() for passage in passages)
    routed = [
        routing.route(
            query,
            rows[query.query_id],
            values[query.query_id],
            [texts[name] for name in found.get(query.query_id, []) if name in texts],
            rule.success_score,
            rounds.forbidden,
        )
        for query in asked
    ]
    learnt = {
        "generator": routing.generator_queries(routed, rule.success_share, settings.seed),
        "retriever": routing.retriever_queries(routed, rule.success_share, settings.seed),
    }
    return {
        "routes": routing.routing_table(routed),
        **{name: {"path": rounds.write(name, each), "num_questions": len(each)} for name, each in learnt.items()},
    }


def _joint(rounds: Rounds) -> None:
    """Expectation and maximisation: the generator learns from what is retrieved, then teaches the retriever what it could use.

    The generator goes first: one that cannot read yet would teach noise. With tune.in_loop both learn at once, from one loss.
    """
    learnt = [query for query in queries_of(rounds.settings, "train") if query.answers]
    for number in range(1, rounds.settings.tune.rounds + 1):
        rounds.number = number
        path = rounds.step("written", lambda: {"path": rounds.write("questions", learnt)})["path"]
        if rounds.settings.tune.in_loop:
            took = [rounds.tune_both(path, len(learnt))]
        else:
            took = [rounds.tune_generator(path, len(learnt)), rounds.tune_retriever(path, len(learnt), taught=True)]
        if not any(took):
            return


def _iterative(rounds: Rounds) -> None:
    """Learn from gold answers, then from own answers that pass the filters, as long as that helps for sure.

    The generator starts from its base each time, on everything that was collected: mistakes are not learnt on top of mistakes.
    """
    settings, base = rounds.settings, rounds.pair.generator_model
    train = queries_of(settings, "train")
    gold = [query for query in train if query.answers is not None]
    asked = labelling.unlabelled(rounds)
    if not asked:
        raise TuneError(
            f"{settings.queries.path}: every training question has `answers`, so there is none to label; name further ones in "
            "tune.questions_path, or use another mode"
        )
    if gold:
        rounds.number = 0
        path = rounds.step("written", lambda: {"path": rounds.write("questions", gold)})["path"]
        rounds.tune_generator(path, len(gold))
    collected: dict[str, Any] = {}
    for number in range(1, settings.tune.rounds + 1):
        rounds.number = number
        before = len(collected)
        collected |= {query.query_id: query for query in labelling.pseudo_labels(rounds, asked)}
        if len(collected) == before:
            progress.say("tune: no answer passes the filters that did not before; nothing more can be learnt")
            return
        path, count = labelling.write_mixed(rounds, gold, list(collected.values()))
        rounds.tune_generator(path, count, start=base)
        rounds.tune_retriever(path, count, taught=True)
        if not _helped_for_sure(rounds):
            return


def _helped_for_sure(rounds: Rounds) -> bool:
    """Whether a gain of this round leaves out 0."""
    return any(
        row["accepted"] and row["low"] > 0
        for row in rounds.ledger.rows
        if row["round"] == rounds.number and "accepted" in row
    )


def _domain(rounds: Rounds) -> None:
    """Questions made of the corpus's passages, or the user's: the retriever learns where they lead, the generator their answers.

    A made question need not be answered well to teach the retriever: that it finds its passage again is enough.
    """
    if rounds.settings.tune.questions_path:
        made = answered = labelling.pseudo_labels(rounds, labelling.unlabelled(rounds))
    else:
        made = labelling.made_questions(rounds)
        answered = labelling.answered(rounds, made) if "generator" in rounds.settings.tune.components else []
    gold = [query for query in queries_of(rounds.settings, "train") if query.answers]
    rounds.tune_retriever(*labelling.write_mixed(rounds, gold, made, "retriever mixed"), taught=False)
    rounds.tune_generator(*labelling.write_mixed(rounds, gold, answered, "generator mixed"))


def _publish(rounds: Rounds, url: str, cores: int) -> None:
    """The accepted pair as a config for every verb, and the road to it."""
    settings = rounds.settings
    staging = artifacts.stage(url)
    text = yaml.safe_dump(rounds.pair.used_in(settings).model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    (staging / TUNED).write_text(text, encoding="utf-8")
    (staging / LEDGER).write_text(rounds.ledger.text(), encoding="utf-8")
    start = Pair.of(settings)
    artifacts.publish(
        staging,
        url,
        "tuned",
        config=settings.model_dump(mode="json"),
        mode=settings.tune.mode,
        pair=rounds.pair.facts(),
        start=start.facts(),
        rounds=[{name: row[name] for name in SHOWN} for row in judged_rows(rounds.ledger.rows)],
        # As a tuned model's manifest has them, for what training cost.
        seconds={"steps": round(rounds.ledger.seconds, 3)},
        num_workers=1,
        cores_per_worker=cores,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if rounds.pair == start:
        progress.say("tune: no round was accepted; models and index are those it started from")


def _remove_unused(root: str, pair: Pair) -> None:
    """Indexes of rounds that are not the best: as large as the index itself, and read by nobody."""
    kept = pair.workspace.rstrip("/").split("/")[-2:]  # not the whole path: the workspace may be spelt in many ways
    for name in filesystem.list_names(root):
        workspace = filesystem.join(root, name)
        if workspace.split("/")[-2:] != kept and filesystem.exists(filesystem.join(workspace, "index")):
            filesystem.remove(filesystem.join(workspace, "index"))
