"""Gives the fields of an exported question the names that `ingest.rows` reads, and counts what a person should know of.

A field is read by the first of its names that is set. What is certain is read as meant: one text instead of a list, a number
instead of a text. What could mean two things is refused by `ingest.rows`, and what is not read is counted in the notices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ragtune_ray.ingest.parsing.text import ParseError

Notices: TypeAlias = Counter[str]
"""What was read as meant or not read -> number of rows."""
IDS = ("query_id", "_id", "id", "qid", "question_id")
"""Names of a question's id."""
TEXTS = ("text", "query", "question", "user_input", "input", "prompt")
"""Names of a question's text; `input` may also be a list of messages, as in OpenAI evals."""
ANSWERS = (
    *("answers", "ground_truth", "ground_truths", "reference", "reference_answer", "reference_answers"),
    *("expected_output", "expected_answer", "expected_response", "ideal", "answer", "output"),
)
"""Names of gold answers. `answer` and `output` come last: beside another of these they are what a model answered."""
CONTEXTS = ("context", "contexts", "reference_contexts", "retrieved_contexts", "retrieval_context", "expected_chunks")
"""Names of quoted passages, which no field of a question takes: documents are named by their ids."""
NESTED = ("inputs", "outputs", "reference_outputs", "item")
"""Objects whose fields belong to the row, as in LangSmith and in the evals of OpenAI's API."""
UNREAD = "not read: column"
"""How a notice begins that only `ragtune questions check` shows."""
_UNANSWERABLE = ("is_impossible", "unanswerable")
_KNOWN = {*IDS, *TEXTS, *ANSWERS, *CONTEXTS, *NESTED, *_UNANSWERABLE, "document_id", "document_ids", "relevances"}
_KNOWN |= {"split", "messages"}
_NESTED = frozenset(NESTED)
_TRUTH = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
_YES_NO = {True: ["yes", "true"], False: ["no", "false"]}


def query_fields(row: dict[str, Any], notices: Notices) -> dict[str, Any]:
    """The fields of a question by the names `query_id`, `text`, `answers`, `document_ids`, `relevances`, `split` and `messages`.

    Args:
        row: with any of the names that this module lists; upper case and spaces in names do not matter.
        notices: counts what was read as meant or not read.

    Raises:
        ParseError: `input` is a list of messages without a question at its end.

    >>> query_fields({"user_input": "Who?", "reference": "Ann", "id": 7}, Counter())
    {'query_id': 7, 'text': 'Who?', 'answers': ['Ann']}
    """
    row = _flat(row)
    found: dict[str, Any] = {}
    text, messages = _asked(row)
    query_id = _first(row, IDS)
    if query_id is None and isinstance(text, str) and text.strip():
        # One follow-up, such as "And when?", may be asked in many conversations.
        asked = json.dumps([text, messages], default=str) if messages else text
        query_id = f"q-{hashlib.sha256(asked.encode('utf-8', 'replace')).hexdigest()[:12]}"
        notices["no id: made from the text of the question"] += 1
    ids = _first(row, ("document_ids", "document_id"))
    if ids is not None and not isinstance(ids, list):
        ids = [ids]
    fields = {"query_id": query_id, "text": text, "answers": _gold(row, notices), "document_ids": ids}
    found |= {name: value for name, value in fields.items() if value is not None}
    found |= {name: row[name] for name in ("relevances", "split") if row.get(name) is not None}
    if messages is not None:
        found["messages"] = messages
    for name in CONTEXTS:
        if row.get(name) not in (None, "", []) and not ids:
            notices[f"`{name}` is not read; name the documents that answer a question in `document_ids`"] += 1
    for name in row.keys() - _KNOWN:
        notices[f"{UNREAD} `{name}`"] += 1
    return found


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the fields of its objects in `NESTED`, and with names that are known however they are written."""
    found = row if row.keys() <= _KNOWN else {_name(name): value for name, value in row.items()}
    if _NESTED.isdisjoint(found):
        return found
    for name in NESTED:
        inner = found.get(name)
        if isinstance(inner, dict):
            others = {key: value for key, value in found.items() if key != name}
            found = {**{_name(key): value for key, value in inner.items()}, **others}
    return found


def _name(name: str) -> str:
    if name in _KNOWN:
        return name
    plain = "_".join(name.strip().lower().replace("-", " ").split())
    return plain if plain in _KNOWN else name


def _first(row: dict[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if not _is_missing(row.get(name))), None)


def _is_missing(value: Any) -> bool:
    """Whether a cell has no value; pandas writes NaN there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _asked(row: dict[str, Any]) -> tuple[Any, Any]:
    """The text of the question, and the messages before it."""
    text, messages = _first(row, TEXTS), row.get("messages")
    if not isinstance(text, list) or not all(isinstance(each, dict) for each in text):
        return text, messages
    if not text or text[-1].get("role") != "user":
        raise ParseError("the question is a list of messages, and the last is not the user's; write it as `text`")
    return text[-1].get("content"), text[:-1] or None


def _gold(row: dict[str, Any], notices: Notices) -> Any:
    """The gold answers: a list of texts, [] if the question has none, None if they are unknown, or what cannot be read."""
    if any(_truth(row, name) for name in _UNANSWERABLE):
        return []
    named = [name for name in ANSWERS if not _is_missing(row.get(name))]
    if not named:
        return None
    value, name = row[named[0]], named[0]
    for other in named[1:]:
        if row[other] != value:
            notices[f"`{other}` is not read where `{name}` is given"] += 1
    if isinstance(value, dict):  # SQuAD as Parquet: {"text": [...], "answer_start": [...]}
        value = value.get("text")
    values = value if isinstance(value, list) else [value]
    texts = [each.get("text") if isinstance(each, dict) else each for each in values]
    return _texts(texts, notices)


def _truth(row: Mapping[str, Any], name: str) -> bool:
    """A truth value, also as a number or a word, as tables have them; an absent or empty one is false.

    Raises:
        ParseError: it is something else.
    """
    value = row.get(name)
    if _is_missing(value) or value == "":
        return False
    word = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
    if word not in _TRUTH:
        raise ParseError(f"`{name}` is {str(value)[:40]!r}; it must be true or false")
    return _TRUTH[word]


def _texts(values: Sequence[Any], notices: Notices) -> list[Any]:
    """Answers as texts; what is not text, number or truth value stays as it is, to be refused."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, bool):
            found += _YES_NO[value]
            notices["true and false are read as the answers yes and no"] += 1
        elif isinstance(value, int | float) and not _is_missing(value):
            whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
            found.append(str(int(value) if whole else value))
            notices["numbers are read as text"] += 1
        else:
            found.append("" if _is_missing(value) else value)
    if any(isinstance(each, str) and each.strip() for each in found) and not all(map(_is_filled, found)):
        notices["blank answers beside others are left out"] += 1
    return found


def _is_filled(value: Any) -> bool:
    return not isinstance(value, str) or bool(value.strip())


def lines(notices: Notices) -> Iterator[str]:
    """The notices for a person, most frequent first."""
    for text, count in notices.most_common():
        yield f"{text} ({count:,} {'row' if count == 1 else 'rows'})"
