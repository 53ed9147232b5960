"""Filters documents by their metadata, and isolates tenants with the same means.

Filters fail closed: a document without a condition's field never matches. Types are strict: 1 equals 1.0, but neither "1"
nor true. Null, objects, lists of mixed types, numbers that are neither an exact float64 nor an int64 (10**30 + 1), and
text with lone surrogates match nothing.
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

Number = int | float
BoolArray = npt.NDArray[np.bool_]

MAX_FIELDS = 256
"""Limit on the columns of attributes, because hostile metadata may have thousands of keys."""

# Integers that float64 would round have their own columns, so that they equal no other number. Text and lists have 64-bit
# offsets, because a single document may contain megabytes.
_SCALAR_TYPES = {"number": pa.float64(), "integer": pa.int64(), "text": pa.large_string(), "boolean": pa.bool_()}
_TYPES = _SCALAR_TYPES | {f"{kind}s": pa.large_list(scalar) for kind, scalar in _SCALAR_TYPES.items()}
# Contains no colon, so that no field's column has this name.
_LEFT_OUT = "left_out"
_LOWER, _UPPER = ("gt", "gte"), ("lt", "lte")
_COMPARE = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_COMPARE_COLUMNS = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_SURROGATES = re.compile("[\ud800-\udfff]")


class SelectionError(RagtuneError, ValueError):
    """A filter, or the data it is applied to, is invalid; the message names the field or row, the value and the rule."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One field's condition, made by `parse_filter`: it equals one of some values, or is within bounds.

    Attributes:
        field: name of the metadata field.
        numbers: allowed numbers, sorted; whole numbers within int64 are of type int.
        texts: allowed texts, sorted.
        booleans: allowed booleans, sorted; a tuple of their own because 1 == True in Python.
        bounds: without allowed values, one or two of (gt, gte, lt or lte; bound), all numbers or all text.
    """

    field: str
    numbers: tuple[Number, ...] = ()
    texts: tuple[str, ...] = ()
    booleans: tuple[bool, ...] = ()
    bounds: tuple[tuple[str, Number | str], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the condition as `parse_filter` reads it.

        >>> Condition("year", bounds=(("gte", 2020),)).as_json()
        {'year': {'gte': 2020}}
        """
        values = [*self.booleans, *self.numbers, *self.texts]
        return {self.field: dict(self.bounds) or (values if len(values) > 1 else values[0])}


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that a document must all meet; compared and hashed by content, false if empty.

    >>> bool(Filter()), parse_filter({"a": [2, 1.0]}) == parse_filter({"a": [1, 2]})
    (False, True)
    """

    conditions: tuple[Condition, ...] = ()
    """Sorted, without duplicates."""

    def __post_init__(self) -> None:
        ordered = sorted(set(self.conditions), key=lambda condition: json.dumps(condition.as_json()))
        object.__setattr__(self, "conditions", tuple(ordered))

    def __bool__(self) -> bool:
        return bool(self.conditions)

    def as_json(self) -> list[dict[str, Any]]:
        """Return the conditions as JSON; `combine(*map(parse_filter, conditions))` restores the filter.

        >>> parse_filter({"year": {"lt": 2024, "gte": 2020.0}, "product": ["pump"]}).as_json()
        [{'product': 'pump'}, {'year': {'gte': 2020, 'lt': 2024}}]
        """
        return [condition.as_json() for condition in self.conditions]


def parse_filter(conditions: Mapping[str, Any]) -> Filter:
    """Parse a filter as written in the config.

    Args:
        conditions: field -> a scalar (equals it), a list of scalars (equals any of them), or bounds: one or two of `gt`,
            `gte`, `lt` and `lte`, numbers or text (ISO dates sort as text; YAML dates become ISO text). If a document's
            field is a list, one element must meet the condition. An empty mapping allows every document.

    Raises:
        SelectionError: a condition is invalid; the message names the field, the value and the rule.

    >>> parse_filter({"language": ["en", "de"]}).conditions
    (Condition(field='language', numbers=(), texts=('de', 'en'), booleans=(), bounds=()),)
    """
    if not isinstance(conditions, Mapping):
        raise SelectionError(f"filter: {_shown(conditions)} must map fields to conditions, as {{year: {{gte: 2020}}}}")
    return Filter(tuple(_condition(field, value) for field, value in conditions.items()))


def tenant_filter(field: str, tenant: str) -> Filter:
    """Allow only the documents of one tenant: their `field` equals `tenant`, or is a list that contains it.

    Documents without the field belong to no tenant and never match.
    """
    for name, value in (("field", field), ("tenant", tenant)):
        if not isinstance(value, str) or not value.strip():
            raise SelectionError(f"tenant filter: {name} is {_shown(value)}; it must be non-empty text")
    return parse_filter({field: tenant})


def combine(*filters: Filter) -> Filter:
    """Combine filters: a document must meet the conditions of all of them, even for the same field.

    >>> combine(tenant_filter("tenant", "acme"), parse_filter({"tenant": "other"})).as_json()
    [{'tenant': 'acme'}, {'tenant': 'other'}]
    """
    return Filter(tuple(condition for each in filters for condition in each.conditions))


def attributes(metadata: Sequence[str]) -> pa.Table:
    """Turn metadata into typed columns that `matches` compares without reading JSON again.

    Args:
        metadata: one JSON object per document, as text; objects nested too deeply to parse count as empty.

    Returns:
        One row per document, in order. The first column, `left_out`, marks documents with fields that have no column.
        Then, sorted, `FIELD:KIND`, null if a document has no such value: number (float64), integer (int64, if float64
        would round it), text, boolean; and numbers, integers, texts, booleans for lists of one type. If there are more
        than MAX_FIELDS columns, the fields of the most documents are kept, each with all its columns.

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


def matches(chosen: Filter, attributes: pa.Table, metadata: Callable[[], Sequence[str]]) -> BoolArray:
    """Return which documents meet every condition of a filter, bool (num_documents,).

    Args:
        chosen: the filter; every document matches an empty one.
        attributes: from the function `attributes`, for one segment (joined tables lose which fields were left out).
        metadata: returns the JSON of the same documents. It is called only if a condition's field has no column, and
            parsed only for documents that `left_out` marks and that meet the other conditions.

    >>> table = attributes(['{"year": 1877}', '{"year": "1877"}', "{}"])
    >>> matches(parse_filter({"year": {"lt": 1900}}), table, list).tolist()
    [True, False, False]
    """
    names = set(attributes.column_names)
    if _LEFT_OUT not in names:
        raise SelectionError(f"attributes: no column {_LEFT_OUT!r} in {sorted(names)}; run: ragtune index CONFIG")
    mask = np.ones(attributes.num_rows, dtype=bool)
    others = []
    for condition in chosen.conditions:
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
            raise SelectionError(f"{len(texts)} texts of metadata for {len(mask)} rows; both must be of one segment")
        for row in np.flatnonzero(mask).tolist():
            values = _read(texts[row], row)
            mask[row] = all(_meets(condition, values.get(condition.field)) for condition in others)
    return mask


def spread(mask: BoolArray, first: npt.NDArray[Any], count: npt.NDArray[Any], num_passages: int) -> BoolArray:
    """Turn a mask over documents into a mask over passages, bool (num_passages,).

    Args:
        mask: bool (num_documents,).
        first: (num_documents,), the ordinal of a document's first passage.
        count: (num_documents,), a document's number of passages; may be 0.
        num_passages: length of the result; passages without a document are False.

    >>> spread(np.array([False, True]), np.array([0, 2]), np.array([2, 1]), 4).tolist()
    [False, False, True, False]
    """
    first, count = np.asarray(first, dtype=np.int64), np.asarray(count, dtype=np.int64)
    if not mask.shape == first.shape == count.shape or mask.ndim != 1:
        shapes = f"mask {mask.shape}, first {first.shape}, count {count.shape}"
        raise SelectionError(f"{shapes}: each must have one entry per document")
    wrong = np.flatnonzero((first < 0) | (count < 0) | (first > num_passages - count))
    if wrong.size:
        start, length = first[wrong[0]], count[wrong[0]]
        raise SelectionError(f"document {wrong[0]}: {length} passages from {start} on exceed the {num_passages} in all")
    first, count = first[mask], count[mask]
    # Each passage's offset within its document, computed for all documents at once.
    offsets = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    matching = np.zeros(num_passages, dtype=bool)
    matching[np.repeat(first, count) + offsets] = True
    return matching


def _condition(field: Any, value: Any) -> Condition:
    if not isinstance(field, str) or not _is_unicode(field):
        raise SelectionError(f"filter: field {_shown(field)} must be valid text; quote it")
    if isinstance(value, Mapping):
        return Condition(field, bounds=_bounds(field, value))
    if isinstance(value, list | tuple) and not value:
        raise SelectionError(f"filter field {field!r}: {value!r} allows no value; list one, or remove the field")
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
        raise SelectionError(f"{where} must be one or two bounds named {', '.join(_COMPARE)}")
    if set(_LOWER) <= value.keys() or set(_UPPER) <= value.keys():
        raise SelectionError(f"{where} has two bounds on one side; keep one of {', '.join(sorted(value))}")
    bounds: dict[str, Any] = {name: _checked(field, value[name]) for name in sorted(value)}
    if any(isinstance(bound, bool) for bound in bounds.values()):
        raise SelectionError(f"{where}: a boolean cannot be a bound; write {field}: true or {field}: false")
    if len({isinstance(bound, str) for bound in bounds.values()}) > 1:
        raise SelectionError(f"{where} mixes text and a number; quote both bounds or neither")
    if len(bounds) == 2:
        (lower, low), (upper, high) = sorted(bounds.items())
        if low > high or (low == high and (lower, upper) != ("gte", "lte")):
            raise SelectionError(f"{where}: no value is within these bounds; swap or widen them")
    return tuple(bounds.items())


def _checked(field: str, value: Any) -> Number | str | bool:
    """Convert a condition's value to the form that all equal values share."""
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        return value.isoformat()
    kind, cell = _scalar(value)
    if not kind:
        raise SelectionError(
            f"filter field {field!r}: {_shown(value)} cannot be compared; it must be text, a boolean or a finite number "
            "that is an exact float64 or an int64. Quote it if it is text in the metadata"
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
    """Return the column kinds and cells of a field's value; empty if it matches nothing."""
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
    """Return a scalar's kind and cell; the kind is "" if it matches nothing."""
    if isinstance(value, str):
        return ("text", value) if _is_unicode(value) else ("", None)
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, float):
        # Adding 0.0 turns -0.0 into 0.0; Arrow treats them as different.
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
    """Return which rows have a value, or an element of a list, that meets the condition in any of its field's columns."""
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
        cells = [cell for of_kind, cell in map(_scalar, _allowed(condition, kind)) if of_kind == kind]
        allowed = pa.array(cells, values.type)
        # For one value `equal` is twice as fast as `is_in`, which hashes.
        parts = [pc.equal(values, allowed[0]) if len(cells) == 1 else pc.is_in(values, allowed)] if cells else []
    if not parts:
        return np.zeros(len(values), dtype=bool)
    both = pc.and_(*parts) if len(parts) == 2 else parts[0]
    return np.asarray(pc.fill_null(both, False), dtype=bool)


def _allowed(condition: Condition, kind: str) -> tuple[Number | str | bool, ...]:
    if kind in ("number", "integer"):
        return condition.numbers
    return condition.texts if kind == "text" else condition.booleans


def _comparable(bound: Number | str, kind: str) -> bool:
    return kind == "text" if isinstance(bound, str) else kind in ("number", "integer")


def _fitted(name: str, bound: Any, kind: str) -> tuple[str, Any]:
    """Convert a bound to a column's type so that the same values pass; Arrow would round one of the two."""
    is_lower = name in _LOWER
    if kind == "text":
        return name, bound
    if kind == "number":
        rounded = float(bound)
        # No float64 is between an integer and its rounded value, which is just inside or just outside the bound.
        is_inside = (rounded > bound) == is_lower
        return name if rounded == bound else (_LOWER if is_lower else _UPPER)[is_inside], rounded
    if is_lower:
        least = math.ceil(bound) if name == "gte" else math.floor(bound) + 1
        return ("gte", max(least, _INT64_MIN)) if least <= _INT64_MAX else ("gt", _INT64_MAX)
    largest = math.floor(bound) if name == "lte" else math.ceil(bound) - 1
    return ("lte", min(largest, _INT64_MAX)) if largest >= _INT64_MIN else ("lt", _INT64_MIN)


def _meets(condition: Condition, value: Any) -> bool:
    """Check one JSON value, with the same result as `_column_mask`."""
    for kind, cell in _cells(value):
        single = kind.removesuffix("s")
        for item in cell if kind not in _SCALAR_TYPES else [cell]:
            bounds = [_comparable(bound, single) and _COMPARE[name](item, bound) for name, bound in condition.bounds]
            if all(bounds) if bounds else item in _allowed(condition, single):
                return True
    return False
