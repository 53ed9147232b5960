"""Turns rows of JSON, Parquet and SQuAD into checked documents and queries."""

from __future__ import annotations

import datetime as dt
import decimal
import itertools
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from ragtune_ray.ingest.exports.fields import query_fields
from ragtune_ray.ingest.parsing.text import ParseError, clean
from ragtune_ray.schema import Document, Message, Query, Reject

DOCUMENT_IDS = ("document_id", "_id", "id")
"""Columns for a document's id; the first that is not null is used."""
MAX_ID_CHARACTERS = 4096
"""Any path is shorter, and an id in a URL stays below the 64 KiB that HTTP servers accept, however it is encoded."""
MAX_LIST_VALUES = 100
"""A column with a longer list does not become metadata: it is probably an embedding."""
MAX_MESSAGES = 512
"""Messages before a question; like the defaults of `serve.max_messages` and `serve.max_conversation_characters`."""
MAX_CONVERSATION_CHARACTERS = 100_000
"""Length of all messages before a question together."""
_ROLES: tuple[Literal["user", "assistant", "system"], ...] = ("user", "assistant", "system")
_SPLITS = {"dev": "validation", "val": "validation", "valid": "validation"}


@dataclass(frozen=True, slots=True)
class Context:
    """An unchecked paragraph of a SQuAD file."""

    ordinal: int
    """Counted from 0 over the whole file."""
    document_id: str
    title: str
    text: Any
    questions: tuple[Any, ...]
    is_repeat: bool
    """Whether an earlier paragraph of the article has the same text, so that both are one document."""


def reject(place: str, reason: str, kind: Literal["file", "row"], *, is_transient: bool = False) -> Reject:
    """Record what was left out; place and reason may contain any text."""
    return Reject(clean(place), clean(reason), kind, is_transient)


def parse_json(data: str | bytes) -> Any:
    """Parse one strict JSON value from UTF-8.

    Raises:
        ParseError: it is not UTF-8 or not JSON, is nested too deeply, or contains NaN, Infinity or a too long number.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text.removeprefix("\ufeff"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ParseError(f"not UTF-8 (byte {error.start}: {error.reason}); convert the file to UTF-8") from None
    except RecursionError:
        raise ParseError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ParseError(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise ParseError(f"not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def document_from_row(row: Any, place: str, max_document_bytes: int) -> Document:
    """Make a document from a row with an id, `text`, and optionally `title` and `metadata`.

    Other columns are added to the metadata if they contain scalars, or short lists of them.

    >>> document_from_row({"_id": 7, "text": "Mars is red.", "year": 1877}, "a.jsonl:1", 100).metadata
    '{"year": 1877}'

    Raises:
        ParseError: a field is missing, of the wrong type, empty or too long.
    """
    row = _object(row)
    id_name, document_id = _identifier(row, DOCUMENT_IDS)
    if "text" not in row:
        raise ParseError(f"no column 'text'; found {_names(row)}")
    text = _text(row, "text")
    if not text.strip():
        raise ParseError("empty document")
    size_bytes = len(text.encode())
    if size_bytes > max_document_bytes:
        raise ParseError(f"document of {size_bytes:,} bytes is longer than max_document_bytes ({max_document_bytes:,})")
    return Document(document_id, text, " ".join(_text(row, "title").split()), _metadata(row, id_name), place)


def query_from_row(row: Any, notices: Counter[str] | None = None) -> Query:
    """Make a query from a row with a text, and optionally an id, answers, judged documents, a split and messages.

    `notices` counts what was read as meant, or not read (`exports.fields`).

    >>> query_from_row({"id": 1, "question": "Why?", "answer": "So.", "document_id": "d"}).answers
    ('So.',)

    Raises:
        ParseError: a field is missing, of the wrong type or empty, or relevances and document_ids differ in number.
    """
    row = _object(row)
    fields = query_fields(row, Counter() if notices is None else notices)
    if "text" not in fields:
        raise ParseError(f"no column 'text', 'query' or 'question'; found {_names(row)}")
    text = _text(fields, "text")
    if not text.strip():
        raise ParseError("empty query")
    _, query_id = _identifier(fields, ("query_id",))
    document_ids, relevances = _judgements(fields)
    split = split_name(_text(fields, "split").strip() or "all")
    messages = _messages(fields.get("messages"), text)
    return Query(query_id, text, _answers(fields.get("answers")), document_ids, relevances, split, messages)


def split_name(name: str) -> str:
    """The project's name for a split: `dev`, `val` and `valid` mean `validation`.

    >>> split_name("dev")
    'validation'
    """
    return _SPLITS.get(name, name)


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ParseError(f"a row must be a JSON object, found {type(row).__name__}")
    return row


def _names(row: dict[str, Any]) -> str:
    return ", ".join(sorted(row))[:300] or "none"


def _identifier(row: dict[str, Any], names: Sequence[str]) -> tuple[str, str]:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ParseError(f"no id: one of {', '.join(names)} must be set; found {_names(row)}")
    return name, checked_id(row[name], name)


def checked_id(value: Any, name: str) -> str:
    r"""The one spelling of an id of a document or query: text as `clean` makes it, in Unicode's form NFC.

    >>> checked_id("caf\u0065\u0301\r\n1", "id") == "caf\u00e9\n1"
    True

    Raises:
        ParseError: the value is not text or an integer, is blank or too long; the message calls it `name`.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ParseError(f"{name} must be text or an integer, found {type(value).__name__}")
    identifier = unicodedata.normalize("NFC", clean(str(value)))
    if not identifier.strip():
        raise ParseError(f"{name} is empty")
    if len(identifier) > MAX_ID_CHARACTERS:
        raise ParseError(f"{name} has {len(identifier):,} characters; the limit is {MAX_ID_CHARACTERS:,}")
    return identifier


def missing_tenant(document: Document, tenant_field: str) -> str:
    """Why the metadata of a document do not name its tenant in this field, as text or a list of texts; "" if they do.

    >>> missing_tenant(Document("d", "Mars is red.", "", '{"owner": ["a", "b"]}', ""), "owner")
    ''
    """
    tenants = json.loads(document.metadata).get(tenant_field)
    tenants = tenants if isinstance(tenants, list) else [tenants]
    if tenants and all(isinstance(name, str) and name.strip() for name in tenants):
        return ""
    return f"no tenant: metadata must name it as text in {tenant_field!r} (index.tenant_field)"


def spellings_of_ids(identifiers: Iterable[str]) -> list[str]:
    """The ids, and their spellings in NFD, with which an index may contain them that is older than `checked_id`."""
    return list(dict.fromkeys(form for name in identifiers for form in (name, unicodedata.normalize("NFD", name))))


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ParseError(f"{name} must be text, found {type(value).__name__}")
    return clean(value or "")


def _metadata(row: dict[str, Any], id_name: str) -> str:
    given = row.get("metadata")
    if isinstance(given, str):  # in a table of documents written by this project it is JSON text
        given = parse_json(given)
    if given is not None and not isinstance(given, dict):
        raise ParseError(f"metadata must be an object, found {type(given).__name__}")
    try:
        others = {
            name: plain
            for name, value in row.items()
            if name not in (id_name, "text", "title", "metadata") and _is_kept(plain := _plain(value))
        }
        values = others | _plain(given or {})
        return clean(json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise ParseError("metadata nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ParseError(f"metadata cannot be written as JSON: {error}") from None


def _is_kept(value: Any) -> bool:
    """Whether a column of a row becomes metadata: a scalar, or a list of scalars too short for an embedding."""
    if isinstance(value, list):
        return 0 < len(value) <= MAX_LIST_VALUES and all(isinstance(item, str | int | float) for item in value)
    return isinstance(value, str | int | float)


def _plain(value: Any) -> Any:
    """A value of JSON or Arrow as JSON: dates as ISO text, decimals as numbers, and None for the NaN of pandas."""
    match value:
        case float() if math.isnan(value):
            return None
        case dt.date() | dt.time():  # a datetime is a date
            return value.isoformat()
        case decimal.Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {name: _plain(item) for name, item in value.items()}
    return value


def _answers(texts: list[Any] | None) -> tuple[str, ...] | None:
    if texts is None:
        return None
    for text in texts:
        if not isinstance(text, str):
            raise ParseError(f"answers must be a list of texts; an element is not text but {type(text).__name__}")
    found = tuple(dict.fromkeys(clean(text) for text in texts if text.strip()))
    if texts and not found:
        raise ParseError("every answer is blank; write [] if the question has no answer, and null if it is unknown")
    return found


def _messages(value: Any, question: str) -> tuple[Message, ...]:
    """The conversation before a question; a last message that only repeats the question is left out.

    >>> _messages([{"role": "user", "content": "Who built it?"}], "When?")
    (Message(role='user', content='Who built it?'),)

    Raises:
        ParseError: it is not a list of messages, has an unknown role, an empty text, or is too long.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ParseError(f'messages must be a list of {{"role", "content"}}, found {type(value).__name__}')
    if len(value) > MAX_MESSAGES:
        raise ParseError(f"{len(value):,} messages; the limit is {MAX_MESSAGES}; leave out the oldest")
    found = [_message(each, number) for number, each in enumerate(value, start=1)]
    num_characters = sum(len(each.content) for each in found)
    if num_characters > MAX_CONVERSATION_CHARACTERS:
        raise ParseError(
            f"messages have {num_characters:,} characters; the limit is {MAX_CONVERSATION_CHARACTERS:,}; leave out the oldest"
        )
    if found and found[-1].role == "user" and found[-1].content.strip() == question.strip():
        found.pop()
    return tuple(found)


def _message(value: Any, number: int) -> Message:
    if not isinstance(value, dict):
        raise ParseError(f'message {number} must be an object {{"role", "content"}}, found {type(value).__name__}')
    given = value.get("role")
    role = next((role for role in _ROLES if role == given), None)
    if role is None:
        raise ParseError(f"message {number}: role must be one of {', '.join(_ROLES)}, found {str(given)[:40]!r}")
    content = value.get("content")
    if not isinstance(content, str):
        raise ParseError(f"message {number}: content must be text, found {type(content).__name__}")
    if not content.strip():
        raise ParseError(f"message {number}: content is empty; leave the message out")
    return Message(role, clean(content))


def _judgements(row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    ids = row.get("document_ids", [])
    relevances = row.get("relevances")
    if relevances is None:
        relevances = [1.0] * len(ids)
    if not isinstance(relevances, list) or len(relevances) != len(ids):
        raise ParseError(f"relevances must be a list with one number per document id ({len(ids)})")
    try:
        are_finite = all(isinstance(value, int | float) and math.isfinite(value) for value in relevances)
    except OverflowError:  # an integer of hundreds of digits
        are_finite = False
    if not are_finite:
        raise ParseError("relevances must be finite numbers")
    judged = {
        checked_id(value, "document_ids"): float(relevance) for value, relevance in zip(ids, relevances, strict=True)
    }
    return tuple(judged), tuple(judged.values())


def squad_contexts(data: Any) -> Iterator[Context]:
    """The paragraphs of SQuAD v1.1, v2.0 or CMRC 2018 JSON (Rajpurkar et al. 2016, 2018; Cui et al. 2019), in order.

    Document ids are `TITLE/NUMBER`, numbered within each article; a second article with the same title is `TITLE (2)`.
    The text of malformed articles and paragraphs is None.

    Raises:
        ParseError: the JSON is not SQuAD.
    """
    articles = data.get("data") if isinstance(data, dict) else None
    if not isinstance(articles, list):
        raise ParseError('not SQuAD JSON, which must be {"data": [{"title": ..., "paragraphs": [...]}]}')
    ordinals = itertools.count()
    used: set[str] = set()
    for article in articles:
        title, paragraphs = _article(article)
        name = _unused(title or "untitled", used)
        seen: dict[Any, str] = {}
        for paragraph, ordinal in zip(paragraphs, ordinals, strict=False):  # paragraphs first, so no ordinal is skipped
            entry = paragraph if isinstance(paragraph, dict) else {}
            text, questions = entry.get("context"), entry.get("qas")
            key = clean(text) if isinstance(text, str) else ordinal
            is_repeat = key in seen
            document_id = seen.setdefault(key, f"{name}/{len(seen)}")
            rows = tuple(questions) if isinstance(questions, list) else ()
            yield Context(ordinal, document_id, title.replace("_", " "), text, rows, is_repeat)


def _article(article: Any) -> tuple[str, list[Any]]:
    entry = article if isinstance(article, dict) else {}
    title, paragraphs = entry.get("title"), entry.get("paragraphs")
    return clean(title) if isinstance(title, str) else "", paragraphs if isinstance(paragraphs, list) else [None]


def _unused(title: str, used: set[str]) -> str:
    names = itertools.chain([title], (f"{title} ({number})" for number in itertools.count(2)))
    name = next(name for name in names if name not in used)
    used.add(name)
    return name
