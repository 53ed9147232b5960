"""`ragtune label`: draws questions of a finished run of `evaluate`, whose answers a person then grades.

Starts neither Ray nor a model. Labels are of questions and answers, so they also hold in later runs that give the same answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ragtune_ray import config, progress, schema
from ragtune_ray.cluster import runs, staged_queries
from ragtune_ray.cluster.answering import evaluate
from ragtune_ray.evaluation.labelling import drawing, labels
from ragtune_ray.evaluation.labelling.desk import Desk
from ragtune_ray.evaluation.labelling.drawing import Source
from ragtune_ray.evaluation.labelling.labels import LabelError
from ragtune_ray.index import contents
from ragtune_ray.models import arms
from ragtune_ray.storage import artifacts, filesystem

Rows = Mapping[config.Arm, Mapping[str, schema.Answer]]


def open_desk(settings: config.Config, labeller: str, num_questions: int, run: str = "") -> Desk:
    """Draw questions, and continue where this person stopped.

    Args:
        settings: the config of the comparison; its `seed` orders the questions.
        labeller: who labels. Each person labels the same questions.
        num_questions: how many of the first questions of the random order are labelled, those labelled before included.
        run: directory of the run of `evaluate` with the answers; empty: the newest over these queries.

    Raises:
        LabelError: no run of `evaluate` is finished, or its arms share no scored question.
    """
    path = labels.local_path(labels.path_of(settings))
    if notice := labels.mend(path):
        progress.say(f"label: {notice}")
    if rejects := labels.read(str(path)).rejects:
        progress.say(f"label: {path}: {len(rejects)} lines are no labels and do not count; the first: {rejects[0]}")
    run = run or newest_run(settings)
    evaluated: Mapping[config.Arm, str] = runs.read_manifest(run)["runs"]
    rows = {arm: {row.query_id: row for row in evaluate.read_answers(url)} for arm, url in evaluated.items()}
    scored = set.intersection(*(set(evaluate.read_scores(run, arm)) & set(each) for arm, each in rows.items()))
    if not scored:
        raise LabelError(f"{run}: no question was answered and scored in every arm; run ragtune evaluate again")
    drawn = drawing.ordered(scored, settings.seed)[:num_questions]
    progress.say(f"label: {len(drawn):,} of {len(scored):,} questions, answered by {', '.join(evaluated)} in {run}")
    answers = {arm: {name: each[name].answer for name in drawn} for arm, each in rows.items()}
    items = drawing.items(_queries(settings, drawn, rows), answers, settings.seed)
    return Desk(items, _Sources(_workspace(settings, run), evaluated, rows, drawn), path, labeller)


def newest_run(settings: config.Config) -> str:
    """The run of `evaluate` over `queries.path` that finished last, in the workspace or the workspace of a variant.

    If any has all arms of `compare.arms`, the last of these: labels correct a comparison only if all its arms have them.

    Raises:
        LabelError: there is none.
    """
    variants = filesystem.join(settings.workspace, "variants")
    workspaces = [settings.workspace, *(filesystem.join(variants, name) for name in filesystem.list_names(variants))]
    found = []
    for workspace in workspaces:
        folder = filesystem.join(workspace, "runs")
        for name in filesystem.list_names(folder):
            url = filesystem.join(folder, name)
            if name.startswith("evaluate-") and artifacts.is_finished(url):
                manifest = runs.read_manifest(url)
                if manifest["config"]["queries"]["path"] == settings.queries.path:
                    lacking = set(settings.compare.arms) - set(manifest["runs"])
                    finished = filesystem.last_change(filesystem.join(url, artifacts.MANIFEST)) or 0.0
                    found.append((not lacking, finished, url, lacking))
    if not found:
        raise LabelError(
            f"{settings.workspace}: there are no answers of {settings.queries.path} to label; run ragtune evaluate or "
            "ragtune compare first"
        )
    _, _, newest, lacking = max(found, key=lambda each: each[:3])
    if lacking:
        progress.say(
            f"label: {newest} has no answers of {', '.join(sorted(lacking))}, which compare.arms names: compare will ask for "
            "their labels; run it first to label all arms at once"
        )
    return newest


def _queries(settings: config.Config, drawn: Sequence[str], rows: Rows) -> list[schema.Query]:
    """The drawn questions with their gold answers; one that the file no longer has with this text, as it was answered."""
    everything = staged_queries.with_all_queries_of(settings, settings.queries.path)
    known = {query.query_id: query for query in staged_queries.selected_queries(everything)}
    asked = next(iter(rows.values()))
    answered = [schema.Query(name, asked[name].query, None, (), (), settings.queries.split) for name in drawn]
    return [
        now if (now := known.get(query.query_id)) is not None and now.text == query.text else query
        for query in answered
    ]


def _workspace(settings: config.Config, run: str) -> config.Config:
    """The config with the workspace of the run: a variant's has an index of its own."""
    return settings.with_values({"workspace": runs.read_manifest(run)["config"]["workspace"]})


class _Sources:
    """The passages that any arm's answer to a drawn question was shown, so that they do not tell which arm it was."""

    def __init__(
        self, settings: config.Config, evaluated: Mapping[config.Arm, str], rows: Rows, drawn: Sequence[str]
    ) -> None:
        self._rows = rows
        self._passages: dict[config.Arm, dict[str, schema.Passage]] = {}
        """Arm -> the passages that its answers were shown, by id."""
        for arm in filter(config.retrieves, evaluated):
            workspace = arms.with_tuned_models(settings.with_values({"answer.arm": arm})).workspace
            version = runs.living_version(workspace, runs.read_manifest(evaluated[arm]))
            shown = (passage_id for name in drawn for passage_id in rows[arm][name].passage_ids)
            try:
                self._passages[arm] = contents.passages_by_id(workspace, shown, version)
            except artifacts.ArtifactError as error:
                progress.say(f"label: the sources of {arm} cannot be shown: {error}")

    def __call__(self, query_id: str) -> list[Source]:
        """The passages, each once."""
        shown = []
        for arm, found in self._passages.items():
            ids = self._rows[arm][query_id].passage_ids
            shown.append([found[name] for name in ids if name in found])
        return drawing.sources_of(shown)
