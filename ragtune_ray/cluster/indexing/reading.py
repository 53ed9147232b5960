"""First stage of an index build: reads documents, cuts them into passages and finds duplicate documents.

Out: per unit, a Parquet file of passages (a *part*), a table of documents, and rejects.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ragtune_ray import RagtuneError, config, progress, schema
from ragtune_ray.cluster import stages
from ragtune_ray.index import contents, segments, versions
from ragtune_ray.ingest import input_units, inputs, readers, rows
from ragtune_ray.ingest.parquet import unread_line
from ragtune_ray.ingest.parsing import tally
from ragtune_ray.storage import checksums, filesystem

if TYPE_CHECKING:
    import ray.data

    from ragtune_ray.models.encoder import TokenCounter

Item: TypeAlias = schema.Document | schema.Reject
DOCUMENTS_AT_ONCE = 256
BYTES_AT_ONCE = 4 * 2**20

_FINGERPRINT = pa.field("fingerprint", pa.binary(segments.FINGERPRINT_BYTES), nullable=False)
_PART_SCHEMA = (
    schema.arrow_schema(schema.Passage)
    .append(pa.field("document_number", pa.int64(), nullable=False))
    .append(_FINGERPRINT)
)
_PASSAGE_NAMES = schema.arrow_schema(schema.Passage).names
_DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        _FINGERPRINT,
        pa.field("is_known", pa.bool_(), nullable=False),
        pa.field("text_sha256", pa.binary(32), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("document_number", pa.int64(), nullable=False),
    ]
)


class DuplicateError(RagtuneError, ValueError):
    """Two documents with different texts share an id; the message names both places."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The result of the reading stage."""

    summaries: list[dict[str, Any]]
    """Per unit, its number and the number of rows in each row group of its part."""
    dropped: dict[int, list[int]]
    """Unit -> numbers of its documents that are exact duplicates of an earlier document."""
    rejects: list[schema.Reject]
    documents: pa.Table
    """Columns document_id, fingerprint, is_known; one row per distinct document."""
    kinds: tally.Counts
    """What was read of each kind of file."""

    @property
    def digests(self) -> list[str]:
        """The sha256 of what each unit read, in order."""
        return [summary["sha256"] for summary in self.summaries]

    @property
    def num_passages(self) -> int:
        """Number of passages of new documents, including those of duplicates."""
        return sum(sum(summary["row_groups"]) for summary in self.summaries)


def read_stage(
    settings: config.Config, plan: input_units.Plan, build: str, base: str, *, in_process: bool = False
) -> Parts:
    """Read every unit of the plan, chunk the documents that index version `base` ("" for none) lacks, and drop duplicates.

    Raises:
        DuplicateError: two documents with different texts share an id.
    """
    directory = filesystem.join(build, "read")
    summaries = _read(settings, plan, directory, base, in_process=in_process)
    _warn_if_too_long(settings, summaries)
    before = input_units.lines_before(plan, [summary["num_lines"] for summary in summaries])
    tables = [_read_table(directory, summary, "documents.parquet") for summary in summaries]
    documents = pa.concat_tables(map(_resolved, tables, before))
    numbers = [np.full(summary["documents"], summary["unit"]) for summary in summaries]
    dropped, repeats, later = _find_duplicates(documents, np.concatenate(numbers))
    read_rejects = itertools.chain.from_iterable(map(_read_rejects, itertools.repeat(directory), summaries, before))
    rejects = [*plan.rejects, *read_rejects, *repeats]
    kept = np.ones(documents.num_rows, dtype=bool)
    kept[later] = False
    once = documents.select(["document_id", "fingerprint", "is_known"]).filter(pa.array(kept))
    kinds = _kinds(plan, summaries)
    if unread := unread_line(summary["unread"] for summary in summaries):
        progress.say(f"read: {unread}")
    return Parts(summaries, dropped, rejects, once, kinds)


def _kinds(plan: input_units.Plan, summaries: list[dict[str, Any]]) -> tally.Counts:
    """What was read of each kind of file; says so if files of several kinds, or rejects, are among them."""
    planned = tally.Tally()
    for reject in plan.rejects:
        planned.of(reject)
    # Units finished by an earlier release lack the counts.
    counts = tally.added([planned.counts(), *(summary.get("kinds", {}) for summary in summaries)])
    if any("plain_characters" in found or "rejected" in found for found in counts.values()):
        for line in tally.table(counts):
            progress.say(f"read: {line}")
    return counts


def _read(
    settings: config.Config, plan: input_units.Plan, directory: str, base: str, *, in_process: bool
) -> list[stages.Summary]:
    units = [{"unit": unit.number, "input": dataclasses.asdict(unit)} for unit in plan.units]
    arguments: dict[str, Any] = {
        "directory": directory,
        "workspace": settings.workspace,
        "base": base,
        "encoder": settings.encoder,
        "chunking": settings.chunking,
        "corpus": settings.corpus,
        "tenant_field": settings.index.tenant_field,
    }

    def transform(dataset: ray.data.Dataset) -> ray.data.Dataset:
        import ray.data

        return dataset.map_batches(
            _read_units, batch_size=1, compute=ray.data.TaskPoolStrategy(), num_cpus=1, fn_kwargs=arguments
        )

    here = stages.in_process(lambda: functools.partial(_read_units, **arguments))
    return stages.run_stage("read", directory, units, here if in_process else stages.on_ray_data(transform))


def _warn_if_too_long(settings: config.Config, summaries: list[dict[str, Any]]) -> None:
    """Warn about passages longer than the encoder's input; this is no error, because BM25 finds their ends."""
    # Units finished by an earlier release lack the count.
    num_too_long = sum(summary.get("too_long", 0) for summary in summaries)
    if not num_too_long:
        return
    max_tokens = max(summary.get("max_tokens", 0) for summary in summaries)
    progress.say(
        f"read: {num_too_long:,} of {sum(sum(summary['row_groups']) for summary in summaries):,} passages are longer than the "
        f"{max_tokens:,} tokens that {settings.encoder.model} reads: the vectors leave out their ends, which only BM25 finds. "
        f"chunking.size_tokens is {settings.chunking.size_tokens:,}; set it to {max_tokens:,} or lower"
    )


def read_row_group(build: str, part: int, row_group: int) -> pa.Table:
    """One row group of a part: `Passage` rows with the number of their document in the part and its fingerprint."""
    directory = filesystem.join(build, "read")
    name = Path(stages.unit_file(directory, part, "passages.parquet")).name
    folder = filesystem.local_copy(directory, [name], checksums.digest(directory))
    with pq.ParquetFile(folder / name, page_checksum_verification=True) as file:
        return file.read_row_group(row_group)


def _read_units(
    batch: dict[str, np.ndarray],
    directory: str,
    workspace: str,
    base: str,
    encoder: config.Encoder,
    chunking: config.Chunking,
    corpus: config.Corpus,
    tenant_field: str,
) -> dict[str, list[str]]:
    from ragtune_ray.models.encoder import load_token_counter

    counter = load_token_counter(encoder)
    known = contents.KnownDocuments(workspace, versions.read_version(workspace, base) if base else None)
    summaries = []
    for text in batch["unit"]:
        unit = json.loads(text)
        source = input_units.Unit.from_json(unit["input"])
        found = readers.UnitRead()
        items = with_tenant(readers.read_documents(source, corpus, found), tenant_field)
        summaries.append(
            _read_unit(source.number, items, directory, known, counter, chunking, encoder.unit_passages, found)
        )
    return {"summary": summaries}


def with_tenant(items: Iterable[Item], tenant_field: str) -> Iterator[Item]:
    """The items, with a reject for each document whose metadata does not name its tenant in this field ("" for any)."""
    for item in items:
        if tenant_field and isinstance(item, schema.Document):
            reason = rows.missing_tenant(item, tenant_field)
            if reason:
                yield rows.reject(item.place, reason, "row")
                continue
        yield item


def _read_unit(
    number: int,
    items: Iterator[Item],
    directory: str,
    known: contents.KnownDocuments,
    counter: TokenCounter,
    chunking: config.Chunking,
    unit_passages: int,
    read: readers.UnitRead,
) -> str:
    from ragtune_ray.ingest.chunking import chunk_all

    rejects: list[schema.Reject] = []
    documents: list[dict[str, Any]] = []
    row_groups: list[int] = []
    too_long = 0
    size = chunking.size_tokens - counter.num_added_tokens
    with tempfile.TemporaryDirectory(prefix="ragtune-read-") as temporary:
        paths = {name: Path(temporary) / name for name in ("passages.parquet", "documents.parquet", "rejects.jsonl")}
        with pq.ParquetWriter(paths["passages.parquet"], _PART_SCHEMA, write_page_checksum=True) as writer:
            waiting: list[dict[str, Any]] = []
            for group in _groups(items):
                for item in group:
                    read.tally.of(item)
                rejects += [item for item in group if isinstance(item, schema.Reject)]
                members = [item for item in group if isinstance(item, schema.Document)]
                found = _document_rows(members, len(documents), known)
                documents += found
                new = [(document, row) for document, row in zip(members, found, strict=True) if not row["is_known"]]
                cut = chunk_all([each for each, _ in new], counter.token_spans, size, chunking.overlap_tokens)
                too_long += _num_too_long(counter, chunking, [passage.text for each in cut for passage in each])
                for (document, row), passages in zip(new, cut, strict=True):
                    waiting += [_passage_row(passage, row) for passage in with_place(document, passages)]
                whole = len(waiting) - len(waiting) % unit_passages
                row_groups += _write(writer, waiting[:whole], unit_passages)
                waiting = waiting[whole:]
            row_groups += _write(writer, waiting, unit_passages)
        pq.write_table(pa.Table.from_pylist(documents, schema=_DOCUMENTS_SCHEMA), paths["documents.parquet"])
        paths["rejects.jsonl"].write_text(schema.reject_lines(rejects), encoding="utf-8")
        return stages.commit_unit(
            directory,
            number,
            paths,
            row_groups=row_groups,
            documents=len(documents),
            rejected=len(rejects),
            too_long=too_long,
            max_tokens=counter.max_tokens,
            kinds=read.tally.counts(),
            num_lines=read.num_lines,
            sha256=read.sha256,
            unread=read.unread,
        )


def _num_too_long(counter: TokenCounter, chunking: config.Chunking, texts: list[str]) -> int:
    if not texts or chunking.size_tokens <= counter.max_tokens:
        return 0  # chunking keeps passages within the limit
    return sum(len(spans) + counter.num_added_tokens > counter.max_tokens for spans in counter.token_spans(texts))


def _groups(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Groups of a few hundred documents or a few megabytes: large enough to tokenize fast, smaller than a unit."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += len(item.text) if isinstance(item, schema.Document) else 0
        if len(group) >= DOCUMENTS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def with_place(document: schema.Document, passages: Iterable[schema.Passage]) -> Iterator[schema.Passage]:
    """The passages of a document, with their pages and the document's `modified` in their metadata."""
    if not document.page_starts and not document.modified:
        yield from passages
        return
    values = json.loads(document.metadata)
    values |= {"modified": document.modified} if document.modified else {}
    for passage in passages:
        page = bisect.bisect_right(document.page_starts, passage.start)
        placed = values | ({schema.PAGE: page} if page else {})
        yield dataclasses.replace(passage, metadata=json.dumps(placed, sort_keys=True, ensure_ascii=False))


def _passage_row(passage: schema.Passage, document: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: getattr(passage, name) for name in _PASSAGE_NAMES},
        "document_number": document["document_number"],
        "fingerprint": document["fingerprint"],
    }


def _document_rows(
    documents: list[schema.Document], first_number: int, known: contents.KnownDocuments
) -> list[dict[str, Any]]:
    fingerprints = [segments.document_fingerprint(document) for document in documents]
    are_known = known.contain([document.document_id for document in documents], fingerprints)
    return [
        {
            "document_id": document.document_id,
            "fingerprint": fingerprint,
            "is_known": is_known,
            "text_sha256": hashlib.sha256(document.text.encode()).digest(),
            "place": document.place,
            "document_number": first_number + place,
        }
        for place, (document, fingerprint, is_known) in enumerate(zip(documents, fingerprints, are_known, strict=True))
    ]


def _write(writer: pq.ParquetWriter, rows: list[dict[str, Any]], unit_passages: int) -> list[int]:
    """Write passages in row groups of one embedding unit each; returns the number of rows in each."""
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=_PART_SCHEMA), row_group_size=unit_passages)
    return [min(unit_passages, len(rows) - first) for first in range(0, len(rows), unit_passages)]


def _read_table(directory: str, summary: dict[str, Any], suffix: str) -> pa.Table:
    name = Path(stages.unit_file(directory, summary["unit"], suffix)).name
    return pq.read_table(filesystem.local_copy(directory, [name], checksums.digest(directory)) / name)


def _resolved(documents: pa.Table, lines_before: int) -> pa.Table:
    """The documents of a unit with their places in the whole file."""
    if not lines_before:
        return documents
    column = documents.schema.get_field_index("place")
    places = [inputs.resolve_place(place, lines_before) for place in documents["place"].to_pylist()]
    return documents.set_column(column, _DOCUMENTS_SCHEMA.field("place"), pa.array(places, pa.string()))


def _read_rejects(directory: str, summary: dict[str, Any], lines_before: int) -> Iterator[schema.Reject]:
    if summary["rejected"]:
        text = filesystem.read_text(stages.unit_file(directory, summary["unit"], "rejects.jsonl"))
        # Not splitlines, which also splits at separators such as U+2028 that JSON strings may contain.
        for line in filter(None, text.split("\n")):
            reject = schema.Reject(**json.loads(line))
            yield dataclasses.replace(reject, place=inputs.resolve_place(reject.place, lines_before))


def _find_duplicates(
    documents: pa.Table, units: np.ndarray
) -> tuple[dict[int, list[int]], list[schema.Reject], np.ndarray]:
    """Exact duplicates of earlier documents: their numbers per unit, a reject for each, and their rows.

    `units` has the unit of each document, (num_documents,).
    """
    encoded = pc.dictionary_encode(documents["document_id"].combine_chunks())
    codes = encoded.indices.to_numpy()
    first_of_code = np.full(len(encoded.dictionary), -1, dtype=np.int64)
    # Assign backwards, so that the first occurrence is assigned last.
    first_of_code[codes[::-1]] = np.arange(len(codes))[::-1]
    later = np.flatnonzero(first_of_code[codes] != np.arange(len(codes)))
    dropped: dict[int, list[int]] = {}
    rejects = []
    for row in later:
        earlier = documents.slice(int(first_of_code[codes[row]]), 1).to_pylist()[0]
        document = documents.slice(int(row), 1).to_pylist()[0]
        if document["text_sha256"] != earlier["text_sha256"]:
            raise DuplicateError(
                f"document_id {document['document_id']!r} is used for two different texts, at {earlier['place']} and at "
                f"{document['place']}; give one of them another id"
            )
        dropped.setdefault(int(units[row]), []).append(document["document_number"])
        reason = f"the same document is at {earlier['place']}; this copy is dropped"
        rejects.append(schema.Reject(document["place"], reason, "row"))
    return dropped, rejects, later
