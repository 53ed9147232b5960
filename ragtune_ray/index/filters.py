"""Which documents a retrieval may see: filters over their metadata, and the isolation of tenants, as one selector.

In: metadata of documents as JSON text, and conditions as a user writes them in YAML. Out: a table of typed attributes, and
masks over documents and passages. This module knows nothing of texts, vectors, scores, the files of an index or Ray.

Every condition asks for something that a document has, so one without the field is never seen: filters fail closed. Types
are strict: 1 is neither "1" nor true, while 1 is 1.0. Null, objects and lists of mixed types match nothing, and neither do
numbers that are neither an exact float64 nor an int64 (10**30 + 1), nor text with lone surrogates.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import operator
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ragtune_ray import RagtuneError

__all__ = [
    "MAX_FIELDS",
    "Condition",
    "Filter",
    "SelectionError",
    "attributes",
    "combine",
    "matches",
    "parse_filter",
    "spread",
    "tenant_filter",
]

Number = int | float
BoolArray = npt.NDArray[np.bool_]

MAX_FIELDS = 256
"""Columns of attributes that a table holds at most; hostile metadata may have thousands of keys."""

# Integers that float64 would round have columns of their own, so that no other number is taken for them. Text and lists
# have 64-bit offsets, since a single document may bring megabytes.
_SCALAR_TYPES = {"number": pa.float64(), "integer": pa.int64(), "text": pa.large_string(), "boolean": pa.bool_()}
_TYPES = _SCALAR_TYPES | {f"{kind}s": pa.large_list(scalar) for kind, scalar in _SCALAR_TYPES.items()}
# Without a colon, so no field's column bears this name.
_LEFT_OUT = "left_out"
_LOWER, _UPPER = ("gt", "gte"), ("lt", "lte")
_COMPARE = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_COMPARE_COLUMNS = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_SURROGATES = re.compile("[\ud800-\udfff]")


class SelectionError(RagtuneError, ValueError):
    """A filter is wrong, or what it is applied to; the message names the field or row, the value and the rule."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What one field must hold: any of some values, or a value within bounds. `parse_filter` makes and checks them.

    Values stand apart by type because Python takes 1 and True for equal.
    """

    field: str
    """Name of the metadata field."""
    numbers: tuple[Number, ...] = ()
    """Any of these, sorted; whole numbers within int64 as int."""
    texts: tuple[str, ...] = ()
    """Or any of these, sorted."""
    booleans: tuple[bool, ...] = ()
    """Or any of these, sorted."""
    bounds: tuple[tuple[str, Number | str], ...] = ()
    """Or, where no values are given, all of these: (gt, gte, lt or lte, bound), all numbers or all text."""

    def as_json(self) -> dict[str, Any]:
        """The condition as `parse_filter` reads it.

        >>> Condition("year", bounds=(("gte", 2020),)).as_json()
        {'year': {'gte': 2020}}
        """
        values = [*self.booleans, *self.numbers, *self.texts]
        return {self.field: dict(self.bounds) or (values if len(values) > 1 else values[0])}


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that must all hold; equal and hashed by content, false where there is none.

    >>> bool(Filter()), parse_filter({"a": [2, 1.0]}) == parse_filter({"a": [1, 2]})
    (False, True)
    """

    conditions: tuple[Condition, ...] = ()
    """In canonical order, each once, whatever order they were given in."""

    def __post_init__(self) -> None:
        ordered = sorted(set(self.conditions), key=lambda condition: json.dumps(condition.as_json()))
        object.__setattr__(self, "conditions", tuple(ordered))

    def __bool__(self) -> bool:
        return bool(self.conditions)

    def as_json(self) -> list[dict[str, Any]]:
        """The same for equal filters, ready for JSON; `combine(*map(parse_filter, facts))` gives the filter back.

        >>> parse_filter({"year": {"lt": 2024, "gte": 2020.0}, "product": ["pump"]}).as_json()
        [{'product': 'pump'}, {'year': {'gte': 2020, 'lt': 2024}}]
        """
        return [condition.as_json() for condition in self.conditions]


def parse_filter(conditions: Mapping[str, Any]) -> Filter:
    """A filter from its form in the config.

    Args:
        conditions: field -> a scalar (equal to it), a list of scalars (any of them), or bounds, some of `gt`, `gte`, `lt`
            and `lte`, over numbers or over text (ISO dates are ordered as text). YAML's dates are taken as ISO text. Of a
            field that holds a list, one element must meet the condition. An empty mapping filters nothing.

    Raises:
        SelectionError: names the field, the value and the rule it breaks.

    >>> parse_filter({"language": ["en", "de"]}).conditions
    (Condition(field='language', numbers=(), texts=('de', 'en'), booleans=(), bounds=()),)
    """
    if not isinstance(conditions, Mapping):
        raise SelectionError(
            f"filter: {_shown(conditions)} must map fields to conditions, as in {{year: {{gte: 2020}}}}"
        )
    return Filter(tuple(_condition(field, value) for field, value in conditions.items()))


def tenant_filter(field: str, tenant: str) -> Filter:
    """Only the documents of one tenant: those whose `field` is, or is a list that holds, the text `tenant`.

    Documents without the field belong to nobody and are never seen.

    Raises:
        SelectionError: the field or the tenant is empty or not text.

    >>> tenant_filter("tenant", "acme").as_json()
    [{'tenant': 'acme'}]
    """
    for name, value in (("field", field), ("tenant", tenant)):
        if not isinstance(value, str) or not value.strip():
            raise SelectionError(
                f"tenant filter: {name} is {_shown(value)}; it must be text that is not empty: name one"
            )
    return parse_filter({field: tenant})


def combine(*filters: Filter) -> Filter:
    """All conditions of all filters must hold, so no filter widens another, even where both name the same field.

    >>> combine(tenant_filter("tenant", "acme"), parse_filter({"tenant": "other"})).as_json()
    [{'tenant': 'acme'}, {'tenant': 'other'}]
    """
    return Filter(tuple(condition for each in filters for condition in each.conditions))


def attributes(metadata: Sequence[str]) -> pa.Table:
    """The fields of metadata as typed columns, which `matches` compares without reading JSON again.

    Args:
        metadata: a JSON object as text per document. Objects nested too deep to be read count as empty.

    Returns:
        One row per document, in order. The first column, `left_out`, marks documents with fields that are not columns;
        then, sorted, `FIELD:KIND`, null where a document has none: number (float64), integer (int64: those that float64
        would round), text, boolean, and numbers, integers, texts, booleans for lists of one type. Of more than
        MAX_FIELDS columns, those of the fields that most documents have are kept, a field's always together.

    Raises:
        SelectionError: a text is not a JSON object; its number is named.

    >>> attributes(['{"year": 1877, "tags": ["a", "b"]}', "{}"]).column_names
    ['left_out', 'tags:texts', 'year:number']
    """
    found: dict[str, dict[str, tuple[array[int], list[Any]]]] = {}
    num_documents: Counter[str] = Counter()
    for row, text in enumerate(metadata):
        for field, value in _read(text, row).items():
            cells = _cells(value) if _is_unicode(field) else ()
            num_documents[field] += bool(cells)
            for kind, cell in cells:
                rows, values = found.setdefault(field, {}).setdefault(kind, (array("q"), []))
                rows.append(row)
                values.append(cell)
    room = MAX_FIELDS
    left_out = np.zeros(len(metadata), dtype=bool)
    columns: dict[str, pa.Array] = {}
    for field in sorted(found, key=lambda name: (-num_documents[name], name)):
        if len(found[field]) <= room:
            room -= len(found[field])
            columns |= {f"{field}:{kind}": _column(kind, *part, len(metadata)) for kind, part in found[field].items()}
        else:
            for rows, _ in found[field].values():
                left_out[rows] = True
    return pa.table({_LEFT_OUT: pa.array(left_out)} | {name: columns[name] for name in sorted(columns)})


def matches(wanted: Filter, attributes: pa.Table, metadata: Callable[[], Sequence[str]]) -> BoolArray:
    """Which documents meet every condition of a filter.

    Args:
        wanted: the filter; an empty one is met by every document.
        attributes: as the function `attributes` gives it, for one segment: joined tables forget whose fields were left out.
        metadata: gives the same documents' JSON. It is called only if a condition names a field that is not a column, and
            then read only of documents marked as having such fields which meet the other conditions.

    Returns:
        bool (num_documents,).

    Raises:
        SelectionError: the table is not one of attributes, or differs from the metadata in length.

    >>> table = attributes(['{"year": 1877}', '{"year": "1877"}', "{}"])
    >>> matches(parse_filter({"year": {"lt": 1900}}), table, list).tolist()
    [True, False, False]
    """
    if _LEFT_OUT not in attributes.column_names:
        raise SelectionError(f"attributes: no column {_LEFT_OUT!r} in {attributes.column_names}; build them again")
    names = set(attributes.column_names)
    mask = np.ones(attributes.num_rows, dtype=bool)
    others = []
    for condition in wanted.conditions:
        kinds = [kind for kind in _TYPES if f"{condition.field}:{kind}" in names]
        if kinds:
            mask &= _column_mask(condition, {kind: attributes[f"{condition.field}:{kind}"] for kind in kinds})
        else:
            others.append(condition)
    if others:
        mask &= np.asarray(attributes[_LEFT_OUT])
    if others and mask.any():
        texts = metadata()
        if len(texts) != len(mask):
            raise SelectionError(f"metadata: {len(texts)} texts for {len(mask)} rows of attributes; give one segment's")
        for row in np.flatnonzero(mask).tolist():
            values = _read(texts[row], row)
            mask[row] = all(_met(condition, values.get(condition.field)) for condition in others)
    return mask


def spread(mask: BoolArray, first: npt.NDArray[Any], count: npt.NDArray[Any], num_passages: int) -> BoolArray:
    """From a mask over documents to one over passages.

    Args:
        mask: bool (num_documents,).
        first: integers (num_documents,), a document's first passage.
        count: integers (num_documents,), how many passages it owns from there on; may be 0.
        num_passages: of all documents; passages that no document owns are False.

    Raises:
        SelectionError: the arrays differ in length, or a document's passages are not among them (the first such is named).

    >>> spread(np.array([False, True]), np.array([0, 2]), np.array([2, 1]), 4).tolist()
    [False, False, True, False]
    """
    first, count = np.asarray(first, dtype=np.int64), np.asarray(count, dtype=np.int64)
    if not mask.shape == first.shape == count.shape or mask.ndim != 1:
        raise SelectionError(
            f"mask {mask.shape}, first {first.shape}, count {count.shape}: one entry per document in each"
        )
    wrong = np.flatnonzero((first < 0) | (count < 0) | (first > num_passages - count))
    if wrong.size:
        start, length = first[wrong[0]], count[wrong[0]]
        raise SelectionError(f"document {wrong[0]}: {length} passages from {start} on are not all below {num_passages}")
    first, count = first[mask], count[mask]
    # Every passage's place within its document, counted over all documents at once.
    places = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    seen = np.zeros(num_passages, dtype=bool)
    seen[np.repeat(first, count) + places] = True
    return seen


def _condition(field: Any, value: Any) -> Condition:
    if not isinstance(field, str) or not _is_unicode(field):
        raise SelectionError(f"filter: field {_shown(field)} must be valid text; quote it")
    if isinstance(value, Mapping):
        return Condition(field, bounds=_bounds(field, value))
    if isinstance(value, list | tuple) and not value:
        raise SelectionError(f"filter field {field!r}: {value!r} allows no value; name one, or leave the field out")
    values = [_checked(field, item) for item in (value if isinstance(value, list | tuple) else [value])]
    return Condition(
        field,
        numbers=tuple(sorted({item for item in values if not isinstance(item, str | bool)})),
        texts=tuple(sorted({item for item in values if isinstance(item, str)})),
        booleans=tuple(sorted({item for item in values if isinstance(item, bool)})),
    )


def _bounds(field: str, value: Mapping[Any, Any]) -> tuple[tuple[str, Number | str], ...]:
    where = f"filter field {field!r}: {_shown(dict(value))}"
    if not value or not value.keys() <= _COMPARE.keys():
        raise SelectionError(f"{where} must be one or two bounds, named {', '.join(_COMPARE)}; correct their names")
    if set(_LOWER) <= value.keys() or set(_UPPER) <= value.keys():
        raise SelectionError(f"{where} has two bounds on one side; keep one of {', '.join(sorted(value))}")
    bounds: dict[str, Any] = {name: _checked(field, value[name]) for name in sorted(value)}
    if any(isinstance(bound, bool) for bound in bounds.values()):
        raise SelectionError(f"{where}: a boolean is no bound; write {field}: true or {field}: false")
    if len({isinstance(bound, str) for bound in bounds.values()}) > 1:
        raise SelectionError(f"{where} mixes text and a number; both bounds must be of one type: quote both or neither")
    if len(bounds) == 2:
        (lower, low), (upper, high) = sorted(bounds.items())
        if low > high or (low == high and (lower, upper) != ("gte", "lte")):
            raise SelectionError(f"{where}: no value lies between these bounds; exchange or widen them")
    return tuple(bounds.items())


def _checked(field: str, value: Any) -> Number | str | bool:
    """A value of a condition in the one form that equal values share."""
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return value.isoformat()
    kind, cell = _scalar(value)
    if not kind:
        raise SelectionError(
            f"filter field {field!r}: {_shown(value)} is not a value to compare with; it must be text, a boolean or a finite "
            "number that is an exact float64 or an int64: correct it, or quote it if the metadata holds it as text"
        )
    is_whole = kind == "number" and cell.is_integer() and _INT64_MIN <= cell <= _INT64_MAX
    checked: Number | str | bool = int(cell) if is_whole else cell
    return checked


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _read(text: str, row: int) -> dict[str, Any]:
    message = f"document {row}: metadata must be a JSON object, found"
    try:
        values = json.loads(text)
    except RecursionError:
        return {}
    except ValueError as error:
        raise SelectionError(f"{message} {_shown(text)} ({error}); correct it") from error
    if not isinstance(values, dict):
        raise SelectionError(f"{message} {_shown(text)}; correct it")
    return values


def _cells(value: Any) -> Sequence[tuple[str, Any]]:
    """Kinds of columns and the cells that a field's value puts there; none for what matches nothing."""
    if not isinstance(value, list):
        kind, cell = _scalar(value)
        return ((kind, cell),) if kind else ()
    parts: dict[str, list[Any]] = {}
    for kind, cell in map(_scalar, value):
        parts.setdefault(kind, []).append(cell)
    if "" in parts or (len(parts) > 1 and not parts.keys() <= {"number", "integer"}):
        return ()
    return [(f"{kind}s", cells) for kind, cells in parts.items()]


def _scalar(value: Any) -> tuple[str, Any]:
    """A scalar's kind and cell; the kind is empty for what matches nothing."""
    if isinstance(value, str):
        return ("text", value) if _is_unicode(value) else ("", None)
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, float):
        # Plus 0.0, since Arrow tells -0.0 from 0.0.
        return ("number", value + 0.0) if math.isfinite(value) else ("", None)
    if isinstance(value, int):
        rounded = float(value) if abs(value) <= sys.float_info.max else math.inf
        if rounded == value:
            return "number", rounded
        return ("integer", value) if _INT64_MIN <= value <= _INT64_MAX else ("", None)
    return "", None


def _is_unicode(text: str) -> bool:
    return text.isascii() or not _SURROGATES.search(text)


def _column(kind: str, rows: array[int], cells: list[Any], num_rows: int) -> pa.Array:
    places = np.full(num_rows, -1, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    return pa.array(cells, type=_TYPES[kind]).take(pa.array(places, mask=places < 0))


def _column_mask(condition: Condition, columns: Mapping[str, pa.ChunkedArray]) -> BoolArray:
    """Which rows have, in any column of the condition's field, a value or an element that meets it."""
    masks: list[BoolArray] = []
    for kind, column in columns.items():
        parts: list[BoolArray] = [np.zeros(0, dtype=bool)]
        for chunk in column.chunks:
            if kind in _SCALAR_TYPES:
                part = _values_mask(condition, kind, chunk)
            else:
                met = _values_mask(condition, kind.removesuffix("s"), pc.list_flatten(chunk))
                part = np.zeros(len(chunk), dtype=bool)
                part[np.asarray(pc.list_parent_indices(chunk))[met]] = True
            parts.append(part)
        masks.append(np.concatenate(parts))
    mask: BoolArray = np.any(masks, axis=0)
    return mask


def _values_mask(condition: Condition, kind: str, values: pa.Array) -> BoolArray:
    if condition.bounds:
        bounds = [_fitted(name, bound, kind) for name, bound in condition.bounds if _comparable(bound, kind)]
        parts = [_COMPARE_COLUMNS[name](values, pa.scalar(bound, values.type)) for name, bound in bounds]
    else:
        wanted = [cell for of_kind, cell in map(_scalar, _members(condition, kind)) if of_kind == kind]
        if len(wanted) == 1:
            parts = [pc.equal(values, pa.scalar(wanted[0], values.type))]  # twice as fast as hashing
        else:
            parts = [pc.is_in(values, value_set=pa.array(wanted, values.type))] if wanted else []
    if not parts:
        return np.zeros(len(values), dtype=bool)
    both = pc.and_(*parts) if len(parts) == 2 else parts[0]
    return np.asarray(pc.fill_null(both, False), dtype=bool)


def _members(condition: Condition, kind: str) -> tuple[Number | str | bool, ...]:
    if kind in ("number", "integer"):
        return condition.numbers
    return condition.texts if kind == "text" else condition.booleans


def _comparable(bound: Number | str, kind: str) -> bool:
    return kind == "text" if isinstance(bound, str) else kind in ("number", "integer")


def _fitted(name: str, bound: Any, kind: str) -> tuple[str, Any]:
    """The bound in a column's own type, letting the same of its values pass: Arrow would round one side or the other."""
    is_lower = name in _LOWER
    if kind == "text":
        return name, bound
    if kind == "number":
        rounded = float(bound)
        # No float64 lies between an integer and its rounded self, which is inside the bound or just outside it.
        is_inside = (rounded > bound) == is_lower
        return name if rounded == bound else (_LOWER if is_lower else _UPPER)[is_inside], rounded
    if is_lower:
        least = math.ceil(bound) if name == "gte" else math.floor(bound) + 1
        return ("gte", max(least, _INT64_MIN)) if least <= _INT64_MAX else ("gt", _INT64_MAX)
    largest = math.floor(bound) if name == "lte" else math.ceil(bound) - 1
    return ("lte", min(largest, _INT64_MAX)) if largest >= _INT64_MIN else ("lt", _INT64_MIN)


def _met(condition: Condition, value: Any) -> bool:
    """What a column would answer, for one value of JSON."""
    for kind, cell in _cells(value):
        single = kind.removesuffix("s")
        for item in cell if kind not in _SCALAR_TYPES else [cell]:
            bounds = [_comparable(bound, single) and _COMPARE[name](item, bound) for name, bound in condition.bounds]
            if all(bounds) if bounds else item in _members(condition, single):
                return True
    return False
