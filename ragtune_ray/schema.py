"""The records that flow through the house, and their Arrow schemas, derived from the same annotations.

In and out: frozen dataclasses inside a process, Arrow tables between processes. This module knows nothing of files,
torch or FAISS.

| record | key | flows |
|---|---|---|
| `Document` | document_id | readers -> chunking |
| `Passage` | passage_id | chunking -> encoder, lexical, index |
| `Query` | query_id | readers -> retriever, generator, metrics |
| `Hit` | query_id, rank | retriever -> prompts, metrics |
| `Answer` | query_id | generator -> metrics, `answers.parquet` |
| `GeneratorExample`, `RetrieverExample` | query_id | examples -> objectives |
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

__all__ = [
    "Answer",
    "Citation",
    "Document",
    "GeneratorExample",
    "Hit",
    "Passage",
    "Query",
    "Reject",
    "RetrieverExample",
    "SchemaError",
    "arrow_schema",
    "check",
    "document_id_of",
    "from_table",
    "reject_lines",
    "to_table",
]


class SchemaError(RagtuneError, ValueError):
    """A table does not hold the records it should; the message names the record, the column and both types."""


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
    """A JSON object as text, "{}" when there is none."""
    place: str
    """Where it was read: a path, with `:LINE` or `#ROW` where the file holds many."""


@dataclass(frozen=True, slots=True)
class Passage:
    """The unit embedded, indexed, retrieved and shown."""

    passage_id: str
    """`DOCUMENT_ID#NUMBER`, numbered from 0 within the document."""
    document_id: str
    text: str
    """Exactly `document.text[start:end]`."""
    title: str
    """Its document's title."""
    metadata: str
    """Its document's metadata."""
    start: int
    """First character in the document."""
    end: int
    """One past its last character in the document."""


def document_id_of(passage_id: str) -> str:
    """The document of a passage, whose id is the document's id, `#` and a number.

    >>> document_id_of("notes/a#b.md#12")
    'notes/a#b.md'
    """
    return passage_id.rpartition("#")[0]


@dataclass(frozen=True, slots=True)
class Query:
    """A question with what is known of its answer."""

    query_id: str
    text: str
    answers: tuple[str, ...] | None
    """Gold answers, any one suffices; `()`: known to have none (unanswerable); None: not known."""
    document_ids: tuple[str, ...]
    """Documents judged for this query: the qrels, with `relevances`. Empty when there are none."""
    relevances: tuple[float, ...]
    """One per document of `document_ids`; larger is more relevant, 0 is not."""
    split: str
    """train, validation or test; "all" when the source does not say."""


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
    """A passage an answer rests on, and where it stands in its document."""

    passage_id: str
    document_id: str
    start: int
    """First character in the document."""
    end: int
    """One past the last character in the document."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The generated text for one query, with its evidence and its cost; a row of `answers.parquet`."""

    query_id: str
    query: str
    answer: str
    """Citation marks removed."""
    citations: tuple[Citation, ...]
    passage_ids: tuple[str, ...]
    """The passages that stood in the prompt, in order."""
    scores: tuple[float, ...]
    """Retrieval scores of `passage_ids`."""
    abstained: bool
    """The answer says that it does not know."""
    seconds: float
    """Wall time of its batch divided by the rows in it."""
    prompt_tokens: int
    completion_tokens: int
    status: Literal["ok", "failed"]
    error: str
    """Why the row failed; empty when ok."""
    index_version: str
    """The index version used; empty in arms without retrieval."""
    model: str
    """Fingerprint of the generator."""
    confidence: float | None = None
    """The geometric mean of the probabilities of the generated tokens, 0 to 1; None where the row failed or the engine does
    not tell."""


ExampleKind = Literal["question_only", "with_gold", "without_gold", "abstention", "replay"]


@dataclass(frozen=True, slots=True)
class GeneratorExample:
    """A training row of the generator: a prompt as it will be asked, and the answer it should give."""

    query_id: str
    kind: ExampleKind
    """`with_gold`: the passage that holds the answer stands in the prompt; `without_gold`: it was left out; `abstention`: nothing
    in the prompt answers it, and the answer says so; `question_only`: the arm ft; `replay`: other data, against forgetting."""
    prompt: str
    """Rendered in the model's chat template, up to where the answer begins."""
    answer: str
    passage_ids: tuple[str, ...]
    """Those in the prompt, in order."""
    gold_place: int
    """Which of them is the gold passage, from 1; 0: none."""
    num_prompt_tokens: int
    num_answer_tokens: int
    """The token that ends the answer included; what the loss is a mean over."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer together."""
        return self.num_prompt_tokens + self.num_answer_tokens


@dataclass(frozen=True, slots=True)
class RetrieverExample:
    """A training row of the retriever: a query, a passage that answers it, and as many that do not as every row has."""

    query_id: str
    query: str
    passage_ids: tuple[str, ...]
    """The positive, then the hard negatives, hardest first."""
    passages: tuple[str, ...]
    """Their texts."""
    teacher_scores: tuple[float, ...]
    """Of each passage, what distillation teaches; empty when nothing was asked to score them."""
    num_tokens: int
    """Of all texts that are encoded when it is learnt from."""


@dataclass(frozen=True, slots=True)
class JointExample:
    """A training row of retriever and generator together: a query, its answer, and the passages that may have told it."""

    query_id: str
    query: str
    passage_ids: tuple[str, ...]
    """Of the candidates, the present encoder's best first."""
    prompts: tuple[str, ...]
    """For each of them the prompt that shows it alone, rendered in the model's chat template."""
    answer: str
    num_tokens: int
    """Of all prompts, each with the answer and the token that ends it."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row or file that was left out, and why; a line of `rejects.jsonl`."""

    place: str
    """A path, with `:LINE` or `#ROW` where the file holds many; or a passage_id."""
    reason: str
    """One sentence."""
    kind: Literal["file", "row", "passage"]


Record = TypeVar("Record")

_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


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
    """Records as an Arrow table with exactly the record's schema.

    >>> to_table([Hit("q", "d#0", "d", 1, 0.5)], Hit).num_rows
    1
    """
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in records], schema=arrow_schema(record))


def from_table(table: pa.Table, record: type[Record]) -> Iterator[Record]:
    """The rows of a table as records; the table is checked first.

    Raises:
        SchemaError: a column is missing or of another type.
    """
    check(table.schema, record)
    hints = typing.get_type_hints(record)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, record))]
    for row in table.select(names).to_pylist():
        yield record(**{name: _restore(row[name], hints[name]) for name in names})


def reject_lines(rejects: Iterable[Reject]) -> str:
    r"""Rejects as JSON lines, the content of `rejects.jsonl`.

    >>> reject_lines([Reject("a.jsonl:3", "empty document", "row")])
    '{"place": "a.jsonl:3", "reason": "empty document", "kind": "row"}\n'
    """
    return "".join(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)


def check(schema: pa.Schema, record: type) -> None:
    """Refuse a schema that lacks a column of the record or holds it in another type.

    Raises:
        SchemaError: names the record, the column, and what was found.
    """
    for field in arrow_schema(record):
        found = schema.get_field_index(field.name)
        if found < 0:
            raise SchemaError(
                f"{record.__name__}.{field.name} should be {field.type}, found no such column; "
                f"the table has {schema.names}"
            )
        if not schema.field(found).type.equals(field.type):
            raise SchemaError(
                f"{record.__name__}.{field.name} should be {field.type}, found {schema.field(found).type}"
            )


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
