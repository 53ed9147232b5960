"""Turns an input into index segments: reads, embeds and commits its units in one stream, and builds segments meanwhile.

    units     read documents, cut them into passages, embed these, commit all of it (`streaming`)
    train     as soon as the units that train are finished: the structure that segments share (`structures`)
    segments  as soon as there are enough passages in the order of the input (`segmenting`)
    compare   find duplicates among all documents, partition by partition (`documents`)

If a worker or the driver is killed, only its unfinished units are repeated. `change` publishes the version.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import session
from ragtune_ray.cluster.indexing import building, documents, streaming, units
from ragtune_ray.index import contents, retention, versions, words
from ragtune_ray.ingest import input_units, inputs, parquet
from ragtune_ray.ingest.parsing import tally
from ragtune_ray.models import scripts, weights
from ragtune_ray.storage import checksums, failpoints, filesystem

IN_PROCESS_BYTES = 512 * 2**10
"""Inputs up to this size are indexed without Ray, because starting it would take longer."""


class CorpusError(RagtuneError, ValueError):
    """The corpus cannot be indexed in its current state; `rejects` has the inputs at fault, if any."""

    def __init__(self, message: str, rejects: Sequence[schema.Reject] = ()) -> None:
        super().__init__(message)
        self.rejects = tuple(rejects)


@dataclass(frozen=True, slots=True)
class Built:
    """The result of the pipeline."""

    entries: tuple[versions.Entry, ...]
    """Published segments of the new passages, without those of duplicates."""
    documents: documents.Documents
    num_documents: int
    """Distinct documents of the input."""
    num_known: int
    """Of these, how many the base version contains."""
    rejects: list[schema.Reject]
    num_passages: int
    """New passages."""
    kinds: tally.Counts
    """What was read of each kind of file."""
    digests: tuple[str, ...]
    """Per unit, the sha256 of the bytes that were read."""
    facts: versions.VersionFacts
    """For the version's manifest."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Per stage."""

    def reject_facts(self) -> versions.VersionFacts:
        """For the version's manifest, the numbers of rejects."""
        return {
            "num_rejects": dict(sorted(Counter(reject.kind for reject in self.rejects).items())),
            "num_transient_rejects": sum(reject.is_transient for reject in self.rejects),
        }


def segment_settings(settings: config.Config) -> list[Any]:
    """The settings, in addition to the recipe, that decide which passages a segment contains.

    They are part of a build's id: finished units are never rebuilt, so a build with other units needs another id.
    """
    return [settings.index.identity(), settings.encoder.unit_passages, settings.seed]


def runs_in_process(settings: config.Config, plan: input_units.Plan) -> bool:
    """Whether the input is at most `IN_PROCESS_BYTES` and no cluster is configured."""
    configured = settings.cluster.address or os.environ.get("RAY_ADDRESS")
    return not configured and plan.size_bytes <= IN_PROCESS_BYTES


@contextlib.contextmanager
def session_for(settings: config.Config, base: versions.Version | None, *, in_process: bool) -> Iterator[None]:
    """Protect the base version from garbage collection and, unless `in_process`, open a Ray session."""
    opened = session.one_thread() if in_process else session.ray_session(settings.cluster)
    with retention.held(settings.workspace, base.name if base else ""), opened:
        yield


def build(
    settings: config.Config,
    plan: input_units.Plan,
    encoder: weights.Model,
    base: versions.Version | None,
    build_id: str,
    *,
    in_process: bool = False,
) -> Built:
    """Read the input, and embed and index the documents that the base does not contain.

    Without a base, all documents are new, and the FAISS structure is trained. `build_id` names what the segments depend on
    besides the input; it is the same for the same settings and base.

    Raises:
        ChangedError: a file changed while it was read.
        DuplicateError: two documents share an id.
        CorpusError: `corpus.strict` is set, and there are rejects.
        SpaceError: the disk has too little space.
    """
    folder = directory(settings.workspace, build_id, plan.units[0].root)
    filesystem.require_space(settings.workspace, 2 * plan.size_bytes, "the passages")
    started = time.monotonic()
    titles = base.manifest.get("lexical_titles", False) if base else settings.index.lexical_titles
    rules = versions.words_of(base.manifest) if base else words.folded(settings.index.language)
    made = building.run(building.Build(settings, plan, folder, build_id, base, rules, titles, in_process))
    embedded = time.monotonic()
    failpoints.reach("build.embedded")
    read, compared = made.in_order, made.documents()
    repeated = compared.duplicates()
    lines = input_units.lines_before(plan, [facts["num_lines"] for facts in read])
    if repeated.clashes:
        raise _clash(repeated.clashes[0], lines)
    rejects = [*plan.rejects, *_unit_rejects(folder, read, lines), *_repeats(repeated.duplicates, lines)]
    _refuse(settings, folder, read, rejects)
    _report(settings, read)
    names, found = made.finish()
    doomed = _ordinals(read, repeated.duplicates)
    facts = _facts(settings, encoder, base, read, in_process=in_process)
    return Built(
        _without(settings.workspace, names, doomed),
        compared,
        compared.num_rows - len(repeated.duplicates),
        sum(each["known"] for each in read) - sum(each.is_known for each in repeated.duplicates),
        rejects,
        made.num_passages - len(doomed),
        _kinds(plan, read),
        tuple(each["sha256"] for each in read),
        {**facts, "lexical_titles": titles, "words": rules, **found},
        {"embed": round(embedded - started, 3), "segment": round(time.monotonic() - embedded, 3)},
    )


def directory(workspace: str, build_id: str, root: str = "") -> str:
    """Where a build of the corpus below `root` keeps its finished units until its version is published."""
    return filesystem.join(workspace, "index", "building", checksums.digest([build_id, root]))


def _clash(clash: documents.Clash, lines: Sequence[int]) -> documents.DuplicateError:
    return documents.DuplicateError(
        f"document_id {clash.document_id!r} is used for two different texts, at {_place(clash.earlier, lines)} and at "
        f"{_place(clash.place, lines)}; give one of them another id"
    )


def _place(place: documents.Place, lines: Sequence[int]) -> str:
    return inputs.resolve_place(place.text, lines[place.unit])


def _unit_rejects(folder: str, read: Sequence[units.UnitFacts], lines: Sequence[int]) -> Iterator[schema.Reject]:
    for facts, before in zip(read, lines, strict=True):
        if facts["rejected"]:
            for reject in units.read_rejects(folder, facts["key"]):
                yield replace(reject, place=inputs.resolve_place(reject.place, before))


def _repeats(duplicates: Sequence[documents.Duplicate], lines: Sequence[int]) -> Iterator[schema.Reject]:
    for each in duplicates:
        reason = f"the same document is at {_place(each.earlier, lines)}; this copy is dropped"
        yield schema.Reject(_place(each.place, lines), reason, "row")


def _refuse(
    settings: config.Config, folder: str, read: Sequence[units.UnitFacts], rejects: Sequence[schema.Reject]
) -> None:
    """Raise CorpusError if `corpus.strict` forbids rejects. Inputs that may be readable later are then read again."""
    is_refused = bool(rejects) and settings.corpus.strict
    if is_refused or not any(facts["rows"] for facts in read):
        for facts in read:
            if facts["transient"]:
                units.forget(folder, facts["key"])
    if is_refused:
        raise CorpusError(
            f"corpus.strict: {len(rejects)} inputs were rejected; the first: {rejects[0].place}: {rejects[0].reason}",
            rejects,
        )


def _ordinals(read: Sequence[units.UnitFacts], duplicates: Sequence[documents.Duplicate]) -> np.ndarray:
    """The passages of duplicates, as ordinals among all passages of the build, ascending."""
    first = np.cumsum([0, *(facts["rows"] for facts in read)])
    parts = [first[each.place.unit] + each.first + np.arange(each.count) for each in duplicates]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def _without(workspace: str, names: Sequence[str], doomed: np.ndarray) -> tuple[versions.Entry, ...]:
    """The entries of consecutive segments, without the passages with these ordinals."""
    entries = [versions.entry_of(workspace, name) for name in names]
    edges = np.cumsum([0, *(entry.num_passages for entry in entries)])
    places = np.searchsorted(doomed, edges)
    return tuple(
        contents.delete_passages(workspace, entry, doomed[low:high] - first)
        for entry, first, low, high in zip(entries, edges[:-1], places[:-1], places[1:], strict=True)
    )


def _kinds(plan: input_units.Plan, read: Sequence[units.UnitFacts]) -> tally.Counts:
    """What was read of each kind of file; says so if files of several kinds, or rejects, are among them."""
    planned = tally.Tally()
    for reject in plan.rejects:
        planned.of(reject)
    counts = tally.added([planned.counts(), *(facts["kinds"] for facts in read)])
    if any("plain_characters" in found or "rejected" in found for found in counts.values()):
        for line in tally.table(counts):
            progress.say(f"read: {line}")
    return counts


def _report(settings: config.Config, read: Sequence[units.UnitFacts]) -> None:
    """Say which columns were left unread, and which passages are longer than the encoder's input; BM25 finds their ends."""
    if unread := parquet.unread_line(facts["unread"] for facts in read):
        progress.say(f"read: {unread}")
    num_too_long = sum(facts["too_long"] for facts in read)
    if num_too_long:
        max_tokens = max(facts["max_tokens"] for facts in read)
        progress.say(
            f"read: {num_too_long:,} of {sum(facts['rows'] for facts in read):,} passages are longer than the "
            f"{max_tokens:,} tokens that {settings.encoder.model} reads: the vectors leave out their ends, which only BM25 "
            f"finds. chunking.size_tokens is {settings.chunking.size_tokens:,}; set it to {max_tokens:,} or lower"
        )


def _facts(
    settings: config.Config,
    encoder: weights.Model,
    base: versions.Version | None,
    read: Sequence[units.UnitFacts],
    *,
    in_process: bool,
) -> versions.VersionFacts:
    facts: versions.VersionFacts = {"recipe": versions.recipe(settings, encoder), "language": settings.index.language}
    if read:
        facts["encoder"] = {
            "model": settings.encoder.model,
            "fingerprint": read[0]["encoder"],
            "dimension": read[0]["dimension"],
        }
        facts["encoding"] = {
            "workers": 1 if in_process else streaming.num_encoders(settings.cluster, len(read)),
            "busy_seconds": round(sum(each["seconds"] for each in read), 3),
        }
    facts["scripts"] = _scripts(settings, base, read)
    return facts


def _scripts(
    settings: config.Config, base: versions.Version | None, read: Sequence[units.UnitFacts]
) -> dict[str, scripts.ScriptFacts]:
    """What the probes of this build and of its base found; says which scripts the encoder does not know."""
    before = base.manifest.get("scripts", {}) if base else {}
    found = scripts.add_facts([before, *(facts["scripts"] for facts in read)])
    for name in sorted(scripts.unknown_scripts(found) - scripts.unknown_scripts(before)):
        progress.say(
            f"index: {settings.encoder.model} does not know the script {name}: given one sentence, it finds the passage in "
            f"{found[name]['found']} of {found[name]['passages']} cases; for questions in this script, hybrid retrieval gives "
            f"BM25 the weight {settings.retrieval.unknown_script_weight} (retrieval.unknown_script_weight)"
        )
    return found
