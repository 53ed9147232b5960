"""Record types shared by all rooms, and their Arrow schemas.

Records are frozen dataclasses inside a process and rows of Arrow tables between processes.

| record | key | from -> to |
|---|---|---|
| `Document` | document_id | readers -> chunking |
| `Passage` | passage_id | chunking -> encoder, lexical, index |
| `Query` | query_id | readers -> retriever, generator, metrics |
| `Searches` | query_id | generator -> retriever, `searches.parquet` |
| `Hit` | query_id, rank | retriever -> prompts, metrics |
| `Answer` | query_id | generator -> metrics, `answers.parquet` |
| `GeneratorExample`, `RetrieverExample`, `RerankerExample` | query_id | examples -> objectives |
| `Reject` | place | readers, encoder -> `rejects.jsonl` |
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pyarrow as pa

from ragtune_ray import RagtuneError

NEWER_COLUMNS = {"cut", "messages", "sentence_citations"}
"""Columns that older files lack; they are read as null, or as empty lists if they contain lists."""


class SchemaError(RagtuneError, ValueError):
    """A table lacks a column of its record type, or has it with another type; the message names both types."""


@dataclass(frozen=True, slots=True)
class Document:
    """Source text before chunking."""

    document_id: str
    """Unique in the corpus."""
    text: str
    """Never empty; valid Unicode without lone surrogates."""
    title: str
    """May be empty."""
    metadata: str
    """A JSON object as text; "{}" if there is none."""
    place: str
    """Source of the document: a path, with `:LINE` or `#ROW` if the file contains several."""
    page_starts: tuple[int, ...] = ()
    """For each page of a PDF or slide, its first character in the text; empty without pages."""
    modified: str = ""
    """When the file was modified, if `corpus.file_times` is set. Not part of the document's fingerprint."""


@dataclass(frozen=True, slots=True)
class Passage:
    """The unit that is embedded, indexed, retrieved and shown."""

    passage_id: str
    """`DOCUMENT_ID#NUMBER`, numbered from 0 within the document."""
    document_id: str
    text: str
    """Exactly `document.text[start:end]`."""
    title: str
    """Title of the document."""
    metadata: str
    """Metadata of the document; `PAGE` in it is the page on which the passage begins."""
    start: int
    """First character in the document."""
    end: int
    """One past the last character in the document."""


PAGE = "#page"
"""Key in a passage's metadata; no document's metadata have it."""


def document_id_of(passage_id: str) -> str:
    """The id of the document that a passage belongs to.

    >>> document_id_of("notes/a#b.md#12")
    'notes/a#b.md'
    """
    return passage_id.rpartition("#")[0]


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation before a question."""

    role: Literal["user", "assistant", "system"]
    """`system`: an instruction, which is added to the prompt's own."""
    content: str


@dataclass(frozen=True, slots=True)
class Query:
    """A question, with its gold answers and relevant documents if they are known."""

    query_id: str
    text: str
    answers: tuple[str, ...] | None
    """Gold answers, of which any one suffices. `()`: the question is unanswerable. None: unknown."""
    document_ids: tuple[str, ...]
    """Documents judged for this query (with `relevances`, its qrels). Empty: no qrels."""
    relevances: tuple[float, ...]
    """One per document of `document_ids`. Larger is more relevant; 0 is not relevant."""
    split: str
    """train, validation or test; "all" if the source names none."""
    messages: tuple[Message, ...] = ()
    """The conversation before the question, oldest first; empty: the question stands alone."""

    @property
    def history(self) -> tuple[tuple[str, str], ...]:
        """(role, content) of what user and assistant said before, oldest first."""
        return tuple((each.role, each.content) for each in self.messages if each.role != "system")

    @property
    def instruction(self) -> str:
        """The system messages, joined; empty if there are none."""
        return "\n".join(each.content for each in self.messages if each.role == "system")

    def identity(self) -> tuple[Any, ...]:
        """The values of the fields, for fingerprints; `messages` are left out if there are none, as in older fingerprints."""
        values = dataclasses.astuple(self)
        return values if self.messages else values[:-1]


@dataclass(frozen=True, slots=True)
class Searches:
    """The texts with which the index is searched for a query, and what it cost to write them; a row of `searches.parquet`."""

    query_id: str
    query: str
    """The question as it was asked."""
    texts: tuple[str, ...]
    """The whole question first, as rewritten; then others whose hits are fused with its own, such as its sub-questions."""
    fallbacks: tuple[str, ...] = ()
    """For each text of the generator that was not usable, why; the question itself is then searched for."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """Wall-clock time of the batch divided by its rows."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved passage."""

    query_id: str
    passage_id: str
    document_id: str
    rank: int
    """1 is best."""
    score: float
    """Larger is better."""


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer cites, and its position in the document."""

    passage_id: str
    document_id: str
    start: int
    """First character in the document."""
    end: int
    """One past the last character in the document."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The generated answer to one query, with its evidence and cost; a row of `answers.parquet`."""

    query_id: str
    query: str
    answer: str
    """Without citation marks."""
    citations: tuple[Citation, ...]
    passage_ids: tuple[str, ...]
    """Passages in the prompt, in order."""
    scores: tuple[float, ...]
    """Retrieval scores of `passage_ids`."""
    abstained: bool
    """Whether the answer says that it does not know."""
    seconds: float
    """Wall-clock time of the batch divided by its rows."""
    prompt_tokens: int
    completion_tokens: int
    status: Literal["ok", "failed"]
    error: str
    """Why the row failed; empty if it is ok."""
    index_version: str
    """Index version that was searched; empty in arms without retrieval."""
    model: str
    """Fingerprint of the generator."""
    confidence: float | None = None
    """Geometric mean of the generated tokens' probabilities, 0 to 1. None if the row failed or the engine reports none."""
    cut: bool | None = None
    """Whether `generator.max_new_tokens`, or the model's context, ended the answer. None if the row failed, or in files that
    are older than this column."""
    sentence_citations: tuple[tuple[str, ...], ...] | None = None
    """For each sentence of `answer`, the passage_ids that its citation marks named. None if it had no marks, or they cannot be
    told apart by sentence, or in older files."""


ExampleKind = Literal["question_only", "with_gold", "without_gold", "abstention", "replay"]


@dataclass(frozen=True, slots=True)
class GeneratorExample:
    """A training row of the generator: a prompt and its target answer."""

    query_id: str
    kind: ExampleKind
    """`with_gold`: the prompt shows the passage that contains the answer. `without_gold`: that passage was left out.
    `abstention`: no passage of the prompt contains the answer, and the target abstains. `question_only`: no passages (arm
    ft). `replay`: other data, to reduce forgetting."""
    prompt: str
    """Rendered with the chat template of the model, up to the start of the answer."""
    answer: str
    passage_ids: tuple[str, ...]
    """Passages in the prompt, in order."""
    gold_place: int
    """Position of the gold passage in the prompt, from 1; 0 if it is not shown."""
    num_prompt_tokens: int
    num_answer_tokens: int
    """Tokens of the answer, its end token included. The loss is a mean over them."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return self.num_prompt_tokens + self.num_answer_tokens


@dataclass(frozen=True, slots=True)
class RetrieverExample:
    """A training row of the retriever: a query, a passage that answers it, and hard negatives (the same number in every row)."""

    query_id: str
    query: str
    passage_ids: tuple[str, ...]
    """The positive, then the hard negatives, hardest first."""
    passages: tuple[str, ...]
    """Texts of these passages."""
    teacher_scores: tuple[float, ...]
    """Score of each passage by the teacher; empty if there is no teacher."""
    num_tokens: int
    """Tokens of the query and all passages."""


@dataclass(frozen=True, slots=True)
class RerankerExample:
    """A training row of the reranker: a query, a passage that answers it, and hits that do not."""

    query_id: str
    query: str
    passage_ids: tuple[str, ...]
    """The positive, then the others, best first."""
    passages: tuple[str, ...]
    """Texts of these passages."""
    first_scores: tuple[float, ...]
    """Retrieval score of each passage divided by that of the query's best hit."""
    num_tokens: int
    """Tokens of all pairs of query and passage."""


@dataclass(frozen=True, slots=True)
class JointExample:
    """A training row of retriever and generator together: a query, its answer and candidate passages."""

    query_id: str
    query: str
    passage_ids: tuple[str, ...]
    """The candidates, best first by the current encoder."""
    prompts: tuple[str, ...]
    """For each candidate, the prompt that shows it alone, rendered with the chat template of the model."""
    answer: str
    num_tokens: int
    """Tokens of all prompts, each with the answer and its end token."""


@dataclass(frozen=True, slots=True)
class Reject:
    """An input row or file that was skipped, and why; a line of `rejects.jsonl`."""

    place: str
    """A path, with `:LINE` or `#ROW` if the file contains several; or a passage_id."""
    reason: str
    """One sentence."""
    kind: Literal["file", "row", "passage"]
    is_transient: bool = False
    """Whether the file may be read another time: its parser crashed, reached a limit or lacked a library."""


Record = TypeVar("Record")

_SCALARS: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def arrow_schema(record: type) -> pa.Schema:
    """The Arrow schema of a record, derived from its annotations.

    >>> arrow_schema(Hit).names
    ['query_id', 'passage_id', 'document_id', 'rank', 'score']
    """
    hints = typing.get_type_hints(record)
    return pa.schema(
        [
            pa.field(field.name, _arrow_type(hints[field.name]), nullable=_is_optional(hints[field.name]))
            for field in dataclasses.fields(record)
        ]
    )


def to_table(records: Iterable[Any], record: type) -> pa.Table:
    """Convert records to an Arrow table with the schema of the record type.

    >>> to_table([Hit("q", "d#0", "d", 1, 0.5)], Hit).num_rows
    1
    """
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in records], schema=arrow_schema(record))


def from_table(table: pa.Table, record: type[Record]) -> Iterator[Record]:
    """Check a table, and convert its rows to records.

    Raises:
        SchemaError: a column is missing or has another type.
    """
    table = conformed(table, record)
    hints = typing.get_type_hints(record)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, record))]
    for row in table.select(names).to_pylist():
        yield record(**{name: _restore(row[name], hints[name]) for name in names})


def conformed(table: pa.Table, record: type) -> pa.Table:
    """The columns of a record, in order; those that an older file lacks are null or, if they contain lists, empty lists.

    Raises:
        SchemaError: another column is missing, or a column has another type.
    """
    check(table.schema, record)
    columns = arrow_schema(record)
    for name in NEWER_COLUMNS.intersection(columns.names).difference(table.schema.names):
        kind = columns.field(name).type
        missing = pa.array([[]] * table.num_rows, kind) if pa.types.is_list(kind) else pa.nulls(table.num_rows, kind)
        table = table.append_column(columns.field(name), missing)
    return table.select(columns.names).cast(columns)


def reject_lines(rejects: Iterable[Reject]) -> str:
    r"""Format rejects as JSON lines, the content of `rejects.jsonl`.

    >>> reject_lines([Reject("a.jsonl:3", "empty document", "row")])
    '{"place": "a.jsonl:3", "reason": "empty document", "kind": "row", "is_transient": false}\n'
    """
    return "".join(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)


def check(schema: pa.Schema, record: type) -> None:
    """Check that a schema has every column of a record, except `NEWER_COLUMNS`, with its type.

    Raises:
        SchemaError: a column is missing or has another type.
    """
    for field in arrow_schema(record):
        place = schema.get_field_index(field.name)
        if place < 0 and field.name in NEWER_COLUMNS:
            continue
        if place < 0 or not schema.field(place).type.equals(field.type):
            found = schema.field(place).type if place >= 0 else f"no such column; the table has {schema.names}"
            raise SchemaError(f"{record.__name__}.{field.name} should be {field.type}, found {found}")


def _is_optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _arrow_type(hint: Any) -> pa.DataType:
    if _is_optional(hint):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return pa.string()
    if typing.get_origin(hint) is tuple:
        return pa.list_(_arrow_type(typing.get_args(hint)[0]))
    if dataclasses.is_dataclass(hint):
        return pa.struct(list(arrow_schema(typing.cast(type, hint))))
    return _SCALARS[hint]


def _restore(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    if _is_optional(hint):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return tuple(_restore(item, typing.get_args(hint)[0]) for item in value)
    if dataclasses.is_dataclass(hint):
        names = typing.get_type_hints(hint)
        return typing.cast(type, hint)(**{name: _restore(value[name], names[name]) for name in names})
    return value
