"""Formats score tables, answers with their sources, versions and plans as lines of at most 80 columns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ragtune_ray import config, progress, schema
from ragtune_ray.evaluation.report.plain_text import WIDTH, wrapped
from ragtune_ray.storage import artifacts

if TYPE_CHECKING:
    from ragtune_ray.evaluation.intervals import Interval
    from ragtune_ray.evaluation.verdict import Difference
    from ragtune_ray.index.versions import IndexManifest
    from ragtune_ray.training.memory import MemoryPlan

Summary = Mapping[str, Mapping[str, float]]


def score_lines(summaries: Mapping[str, Summary], differences: Mapping[str, Summary]) -> list[str]:
    r"""A table with one line per metric and one column per arm and difference; each value has its interval.

    >>> print("\n".join(score_lines({"rag": {"EM": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}}}, {})))
    metric                  n              rag
    EM                      8  0.500 [.25,.75]
    """
    columns = [*summaries.items(), *differences.items()]
    widths = [17 if name in summaries else 20 for name, _ in columns]
    names = list(dict.fromkeys(metric for summary in summaries.values() for metric in summary))
    lines = [
        f"{'metric':<21}{'n':>4}"
        + "".join(f"{name:>{width}}" for (name, _), width in zip(columns, widths, strict=True))
    ]
    for metric in names:
        cells = [_cell(summary.get(metric), signed=name in differences) for name, summary in columns]
        count = max(int(summary[metric]["n"]) for summary in summaries.values() if metric in summary)
        lines.append(f"{metric:<21}{count:>4}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return lines


def answer_lines(answer: schema.Answer, titles: Mapping[str, str]) -> list[str]:
    """A question, its answer and the passages that it cites; `titles` are by document id."""
    text = answer.answer if answer.status == "ok" else f"(failed: {answer.error})"
    lines = wrapped("Q  ", answer.query) + wrapped("A  ", text.strip() or "(empty)")
    for citation in answer.citations:
        lines += wrapped("   cites ", _place(citation.document_id, citation.start, citation.end, titles))
    if not answer.citations and answer.passage_ids:
        lines += wrapped("   cites nothing; was shown ", ", ".join(answer.passage_ids))
    return lines


def source_lines(passages: Sequence[schema.Passage], scores: Sequence[float]) -> list[str]:
    """The passages in the prompt of an answer, numbered as in its citations."""
    lines = []
    for number, (passage, score) in enumerate(zip(passages, scores, strict=False), start=1):
        place = f"{passage.document_id}, characters {passage.start}-{passage.end}, score {score:.3f}"
        lines += wrapped(f"[{number}] ", f"{passage.title or passage.document_id} ({place})")
    return lines


def citation_lines(answer: schema.Answer) -> list[str]:
    """The documents and character ranges that an answer cites, and whether the answer was cut."""
    places = [_place(each.document_id, each.start, each.end, {}) for each in answer.citations]
    lines = [line for place in places for line in wrapped("cites ", place)]
    if answer.cut:
        lines += wrapped(
            "", "The answer was cut at its length limit; raise generator.max_new_tokens for longer answers."
        )
    return lines


def _place(document_id: str, start: int, end: int, titles: Mapping[str, str]) -> str:
    """A character range of a document, with the title of the document if it is known."""
    if document_id in titles:
        return f"{titles[document_id]} ({document_id}, characters {start}-{end})"
    return f"{document_id}, characters {start}-{end}"


def version_lines(manifests: Sequence[IndexManifest], current: str) -> list[str]:
    """One line per index version, oldest first; `*` marks the current one."""
    lines = [f"  {'number':<7}{'created':<17}{'documents':>9}{'passages':>10}  {'kind':<7}{'made by':<10}encoder"]
    for manifest in manifests:
        mark = "*" if manifest["version"] == current else " "
        made_by = f"to {manifest['restores']}" if "restores" in manifest else manifest.get("operation", "index")
        line = (
            f"{mark} {manifest['version']:<7}{manifest['created'][:16].replace('T', ' '):<17}"
            f"{manifest['num_documents']:>9,}{manifest['num_passages']:>10,}  {manifest['index_kind']:<7}{made_by:<10}"
        )
        name = str(manifest["encoder"]["model"])
        width = WIDTH - len(line)
        lines.append(line + (name if len(name) <= width else f"…{name[1 - width :]}"))
    return lines


def difference_lines(changes: Mapping[str, Sequence[str]], shown: int = 20) -> list[str]:
    """How many documents were added, removed and changed, and the first ids of each."""
    lines = []
    for kind, ids in changes.items():
        lines.append(f"{kind:<8} {len(ids):,}")
        lines += [line for name in ids[:shown] for line in wrapped("  ", name)]
        if len(ids) > shown:
            lines.append(f"  ... and {len(ids) - shown:,} more (--json lists all)")
    return lines


def training_plan_lines(settings: config.Config, plan: MemoryPlan) -> list[str]:
    """The memory of a worker that trains the generator, part by part."""
    training = settings.training
    if training.lora_rank:
        how = f"adapters of rank {training.lora_rank}"
    else:
        how = "all weights, divided" if training.strategy == "fsdp" else "all weights"
    trains = f"{settings.generator.model}: {how}, {plan.num_trained:,} numbers, {plan.precision}, one worker on {plan.device}"
    passes = f"{plan.pass_tokens:,} tokens per pass, up to {plan.answer_tokens:,} of an answer"
    rows = [
        ("weights", plan.weights, ""),
        ("gradients", plan.gradients, ""),
        ("optimizer", plan.optimizer, ""),
        ("activations", plan.activations, passes),
        ("together", plan.device_bytes, "while the whole model is loaded" if plan.device_bytes == plan.loading else ""),
        ("on the host", plan.best_weights, "a copy of the best weights so far"),
    ]
    return [
        *wrapped(f"{'trains':<12}", trains),
        *(f"{name:<12}{_size(count):>10}  {note}".rstrip() for name, count, note in rows),
    ]


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The plan of an index from `plan.read_plan`: counts, bytes of each kind of index, seconds, disk, cost, warnings."""
    corpus, probe, sizes, disk = plan["corpus"], plan["probe"], plan["bytes"], plan["disk"]
    files = f"{_with_noun(corpus['num_files'], 'file')}, {_size(corpus['bytes'])}, {_with_noun(corpus['num_units'], 'unit')}"
    part = "all" if probe["is_whole"] else "a part"
    shards = f"{_with_noun(plan['num_segments'], 'segment')}; searched in {_with_noun(plan['num_shards'], 'shard')}"
    free = "" if disk["free"] is None else f", free: {_size(disk['free'])}"
    rows = [
        ("corpus", f"{corpus['path']}: {files}"),
        (
            "probe",
            f"{_with_noun(probe['documents'], 'document')} ({part} of the corpus), one thread, device {probe['device']}",
        ),
        ("documents", _estimate(plan["documents"])),
        ("passages", f"{_estimate(plan['passages'])}, {plan['characters_per_passage']:,.0f} characters each"),
        ("bytes", ", ".join(f"{name} {_size(sizes[name])}" for name in ("text", "postings", "vectors"))),
        ("segments", shards),
    ]
    lines = [line for name, text in rows for line in wrapped(f"{name:<11}", text)]
    lines += ["", f"{'kind':<11}{'memory':>12}{'disk':>12}"]
    for kind, each in plan["kinds"].items():
        marks = [" auto"] * (kind == plan["auto_kind"]) + [" chosen"] * (kind == plan["kind"])
        lines.append(
            f"{kind:<11}{_size(each['memory_bytes']):>12}{_size(each['disk_bytes']):>12} {','.join(marks)}".rstrip()
        )
    lines += ["", f"{'stage':<11}{'time':>12}"]
    lines += [f"{stage:<11}{_duration(seconds):>12}" for stage, seconds in plan["seconds"].items()]
    workers = plan["workers"]
    lines += wrapped(f"{'workers':<11}", f"{_count(workers['count'])}, from {workers['from']}")
    lines += wrapped(
        f"{'disk':<11}", f"{_size(disk['needed'])} during the build, {_size(disk['index'])} afterwards{free}"
    )
    lines += wrapped(f"{'cost':<11}", _cost(plan["cost"]))
    return lines + [line for text in plan["warnings"] for line in wrapped(f"{'warning':<11}", text)]


def _estimate(each: Mapping[str, Any]) -> str:
    if each["low"] is None:
        return f"{_count(each['value'])} (too little was probed for an interval)"
    interval = "" if each["low"] == each["high"] else f" ({_count(each['low'])} to {_count(each['high'])})"
    return f"{_count(each['value'])}{interval}"


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**12 else f"{number:.3g}"


def _with_noun(number: int, noun: str) -> str:
    return f"{_count(number)} {noun}{'' if number == 1 else 's'}"


def _size(num_bytes: float) -> str:
    """Format bytes for people, in at most 10 characters."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = 0
    while num_bytes >= 1024 and power < len(units) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    if power == 0:
        return f"{num_bytes:.0f} bytes"
    return f"{num_bytes:.1f} {units[power]}" if num_bytes < 10**4 else f"{num_bytes:.2g} {units[power]}"


def _duration(seconds: float) -> str:
    days = seconds / 86_400
    return progress.duration(seconds) if days < 5 else f"{days:,.0f} days" if days < 10**5 else f"{days:.2g} days"


def _cost(cost: Mapping[str, Any]) -> str:
    """Hours of hardware, and their price if it is known."""
    gpu_hours = f" and {cost['gpu_hours']:,.4g} GPU-hours" if cost["gpu_hours"] > 0 else ""
    parts = [f"{cost['core_hours']:,.4g} core-hours{gpu_hours}"]
    if cost["compute"] is None:
        parts.append("their price is not known (prices.core_hour, prices.gpu_hour)")
    else:
        parts.append(f"{cost['compute']:,.4g} {cost['currency']}")
    if cost["storage_month"] is not None:
        parts.append(f"storage of the index {cost['storage_month']:,.4g} {cost['currency']} per month")
    return "; ".join(parts)


def _cell(interval: Mapping[str, float] | None, *, signed: bool) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    # "1.0" is as wide as ".25", so that the columns stay aligned.
    ends = re.sub(r"\b0\.", ".", f"[{interval['low']:{sign}.2f},{interval['high']:{sign}.2f}]").replace("1.00", "1.0")
    return f"{interval['value']:{sign}.3f} {ends}"


def evaluation_lines(run: str, num_examples: int) -> list[str]:
    """The score table of a finished `evaluate`, after the answers of every arm to the first `num_examples` queries."""
    from ragtune_ray.cluster import runs
    from ragtune_ray.cluster.answering.evaluate import read_answers

    artifact = artifacts.open_artifact(run, "evaluate")
    arms = list(artifact.manifest["runs"])
    summaries = {arm: json.loads((artifact.path / arm / "metrics.json").read_text(encoding="utf-8")) for arm in arms}
    differences = json.loads((artifact.path / "differences.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    if num_examples:
        for answers in zip(
            *(read_answers(artifact.manifest["runs"][arm])[:num_examples] for arm in arms), strict=False
        ):
            for arm, answer in zip(arms, answers, strict=True):
                lines += [f"-- {arm}", *answer_lines(answer, {})]
            lines.append("")
    lines += score_lines(summaries, differences)
    for arm in arms:
        manifest = runs.read_manifest(artifact.manifest["runs"][arm])
        if notice := runs.cut_notice(manifest, manifest["config"]["generator"]["max_new_tokens"]):
            lines += wrapped(f"{arm}: ", notice)
    return lines


def label_lines(run: str, settings: config.Config) -> list[str]:
    """What people's labels say about the scores of a finished `evaluate`, and the judge's scores corrected by them."""
    from ragtune_ray.cluster.answering.evaluate import read_answers, read_scores
    from ragtune_ray.evaluation import decision
    from ragtune_ray.evaluation.labelling import checking, labels

    runs: Mapping[str, str] = artifacts.read_manifest(run)["runs"]
    scores = {arm: read_scores(run, arm) for arm in runs}
    is_judged = any(checking.JUDGE in row for each in scores.values() for row in each.values())
    given = labels.read(labels.path_of(settings))
    if not given.rows and not given.rejects:
        unchecked = "nobody has checked this judge: label some answers (ragtune label CONFIG)"
        return wrapped("judge: ", unchecked) if is_judged else []
    if is_judged:
        settings = settings.with_values({"compare.metric": checking.JUDGE, "compare.until": "all"})
    answers = {arm: labels.keys(read_answers(url)) for arm, url in runs.items()}
    checked, labelled = checking.check(scores, answers, given, settings)
    assert checked is not None
    found = [*checking.agreements(checked), *checking.not_counted(checked)]
    if checked.needed:
        found.append(f"{checked.needed:,} more questions must be labelled to correct the judge.")
    lines = [line for text in found for line in wrapped("labels: ", text)]
    if labelled is None:
        return lines
    corrected = {arm: checking.corrected_mean(scores[arm], labelled[arm], settings) for arm in scores}
    lines += [
        f"judge, corrected by labels: {arm:<24} {_cell(_ends(each), signed=False)}" for arm, each in corrected.items()
    ]
    for row in decision.differences(scores, settings, labelled):
        lines.append(f"judge, corrected by labels: {f'{row.arm} - {row.against}':<24} {_cell(_ends(row), signed=True)}")
    return lines


def _ends(each: Interval | Difference) -> dict[str, float]:
    return {"value": each.value, "low": each.low, "high": each.high}
