"""Metadata filters and tenants: types, bounds, columns, refusals."""

import datetime as dt
import json
import math
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray.index import filters

COMPARE = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}

FIELDS = st.sampled_from(["a", "a:number", "a:text", "", ":", "a.b", "left_out", "q\"'", "\\", "年", "a\x00"])
WHOLE = st.sampled_from([0, 1, -1, 2, 7, 2**53, 2**53 + 1, 2**53 + 2, -(2**53) - 1, 2**63 - 1, -(2**63), 2**63, 2**70])
FRACTIONS = st.sampled_from([0.0, -0.0, 1.0, 0.5, 1.5, -2.5, 5e-324, float(2**53), float(2**63), 1e300, -1e300])
TEXTS = st.sampled_from(
    ["", "1", "1.0", "true", "a", "b", "é", "谁", "\U0001f600", "\uffff", "a\x00", "2020-01-31", "2020-02"]
)
SCALARS = st.one_of(WHOLE, FRACTIONS, TEXTS, st.booleans())
# Values that no filter can contain, because they would be rounded or are not valid UTF-8.
STRANGE = st.sampled_from([2**63 + 1, 10**30 + 1, 10**400, -(10**400), math.nan, math.inf, "\ud800", "a\udfff", None])
VALUES = st.one_of(
    SCALARS,
    STRANGE,
    st.lists(st.one_of(WHOLE, FRACTIONS), max_size=3),
    st.lists(TEXTS, max_size=3),
    st.lists(st.booleans(), max_size=2),
    st.lists(st.one_of(SCALARS, STRANGE, st.just([1])), max_size=3),
    st.dictionaries(FIELDS, SCALARS, max_size=1),
)
DOCUMENTS = st.lists(st.dictionaries(FIELDS, VALUES, max_size=5), max_size=12)


def _bounds(kind: Any) -> Any:
    def build(low: Any, high: Any, lower: str | None, upper: str | None) -> dict[str, Any]:
        low, high = sorted([low, high])
        if lower and upper and low == high:
            return {"gte": low, "lte": high}
        return {name: bound for name, bound in ((lower, low), (upper, high)) if name} or {"gte": low}

    return st.builds(build, kind, kind, st.sampled_from(["gt", "gte", None]), st.sampled_from(["lt", "lte", None]))


CONDITIONS = st.dictionaries(
    FIELDS,
    st.one_of(SCALARS, st.lists(SCALARS, min_size=1, max_size=6), _bounds(st.one_of(WHOLE, FRACTIONS)), _bounds(TEXTS)),
    max_size=3,
)


def _type(value: Any) -> str:
    """Return the type of a value; empty if nothing may match it."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "" if any("\ud800" <= character <= "\udfff" for character in value) else "text"
    if isinstance(value, int):
        try:
            exact = float(value) == value
        except OverflowError:
            exact = False
        return "number" if exact or -(2**63) <= value < 2**63 else ""
    return "number" if isinstance(value, float) and math.isfinite(value) else ""


def _element_meets(element: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return all(_type(bound) == _type(element) and COMPARE[name](element, bound) for name, bound in wanted.items())
    values = wanted if isinstance(wanted, list) else [wanted]
    return any(_type(value) == _type(element) and value == element for value in values)


def _document_meets(document: dict[str, Any], conditions: dict[str, Any]) -> bool:
    for field, wanted in conditions.items():
        value = document.get(field)
        elements = value if isinstance(value, list) else [value]
        types = {_type(element) for element in elements}
        if "" in types or len(types) != 1 or not any(_element_meets(element, wanted) for element in elements):
            return False
    return True


def _json(documents: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(document) for document in documents]


def _never() -> list[str]:
    raise AssertionError("JSON was read although all fields are columns")


def _mask(conditions: dict[str, Any], documents: list[dict[str, Any]]) -> list[bool]:
    metadata = _json(documents)
    found: list[bool] = filters.matches(
        filters.parse_filter(conditions), filters.attributes(metadata), lambda: metadata
    ).tolist()
    return found


@settings(max_examples=500, deadline=None)
@given(documents=DOCUMENTS, conditions=CONDITIONS, data=st.data())
def test_columns_and_json_match_like_a_naive_implementation(documents: list[Any], conditions: Any, data: Any) -> None:
    expected = [_document_meets(document, conditions) for document in documents]
    metadata = _json(documents)
    chosen = filters.parse_filter(conditions)
    table = filters.attributes(metadata)
    assert filters.matches(chosen, table, _never).tolist() == expected
    # A table that begins within a chunk, and a table of several chunks.
    start = data.draw(st.integers(0, len(documents)))
    assert filters.matches(chosen, table.slice(start), _never).tolist() == expected[start:]
    pieces = pa.concat_tables([table.slice(0, start), table.slice(start)])
    assert filters.matches(chosen, pieces, _never).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "MAX_FIELDS", data.draw(st.integers(0, 4)))
        fewer = filters.attributes(metadata)
        assert fewer.num_columns <= 1 + filters.MAX_FIELDS
        assert filters.matches(chosen, fewer, lambda: metadata).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, conditions=CONDITIONS)
def test_json_of_a_filter_restores_it(documents: list[Any], conditions: Any) -> None:
    chosen = filters.parse_filter(conditions)
    facts = json.loads(json.dumps(chosen.as_json()))
    again = filters.combine(*map(filters.parse_filter, facts))
    assert again == chosen
    assert hash(again) == hash(chosen)
    assert again.as_json() == chosen.as_json()
    assert bool(chosen) == bool(conditions)


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(
        st.fixed_dictionaries(
            {"a": VALUES}, optional={"tenant": st.one_of(VALUES, st.sampled_from(["x", "y"]), st.just(["x", "y"]))}
        ),
        max_size=10,
    ),
    conditions=st.one_of(CONDITIONS, st.just({"tenant": "y"}), st.just({"tenant": ["x", "y"]})),
    max_fields=st.sampled_from([0, 256]),
)
def test_a_tenant_finds_only_its_own_documents(documents: list[Any], conditions: Any, max_fields: int) -> None:
    metadata = _json(documents)
    user = filters.parse_filter(conditions)
    owned = [
        value == "x" or (isinstance(value, list) and "x" in value and all(isinstance(item, str) for item in value))
        for value in (document.get("tenant") for document in documents)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "MAX_FIELDS", max_fields)
        table = filters.attributes(metadata)
    tenant = filters.tenant_filter("tenant", "x")
    seen = filters.matches(filters.combine(user, tenant), table, lambda: metadata)
    assert not (seen & ~np.array(owned, dtype=bool)).any()
    assert seen.tolist() == (np.array(owned, dtype=bool) & filters.matches(user, table, lambda: metadata)).tolist()


def test_the_example_in_the_settings_matches_as_documented() -> None:
    conditions = {"product": "pump", "year": {"gte": 2020, "lt": 2024}, "language": ["de", "en"], "archived": False}
    good = {"product": "pump", "year": 2020, "language": "de", "archived": False}
    others = [
        {"year": 2024},
        {"year": "2021"},
        {"product": "Pump"},
        {"language": "fr"},
        {"archived": 0},
        {"archived": None},
    ]
    assert (
        _mask(conditions, [good, good | {"year": 2023.9}, *[good | other for other in others], {}])
        == [True] * 2 + [False] * 7
    )


def test_types_are_strict() -> None:
    documents = [{"a": value} for value in (1, 1.0, "1", True, [1], ["1"], [True], [1, "1"], [1, None])]
    assert np.flatnonzero(_mask({"a": 1}, documents)).tolist() == [0, 1, 4]
    assert np.flatnonzero(_mask({"a": "1"}, documents)).tolist() == [2, 5]
    assert np.flatnonzero(_mask({"a": True}, documents)).tolist() == [3, 6]
    assert filters.parse_filter({"a": 1}) != filters.parse_filter({"a": True})


def test_integers_that_float64_rounds_stay_distinct() -> None:
    documents = [{"a": value} for value in (2**53, 2**53 + 1, float(2**53), 10**30, 10**30 + 1)]
    assert _mask({"a": 2**53}, documents) == [True, False, True, False, False]
    assert _mask({"a": 2**53 + 1}, documents) == [False, True, False, False, False]
    assert _mask({"a": {"gt": 2**53, "lt": 2**53 + 2}}, documents) == [False, True, False, False, False]


def test_edge_case_numbers_compare_exactly() -> None:
    near = [sign * (2**power) + step for power in (53, 60, 62, 63) for sign in (1, -1) for step in (-2, -1, 0, 1, 2)]
    whole = [number for number in [*near, 0, 2**53 + 3, 2**70, 10**30] if _type(number)]
    numbers = [*whole, *(float(number) for number in whole), -0.0, 0.5, -0.5, 1e300, -1e300, 5e-324]
    documents = [{"a": number} for number in numbers]
    table = filters.attributes(_json(documents))
    for bound in numbers:
        for name, compare in COMPARE.items():
            found = filters.matches(filters.parse_filter({"a": {name: bound}}), table, _never).tolist()
            assert found == [compare(number, bound) for number in numbers], (name, bound)
        for wanted in (bound, [bound, 0.25, 0]):
            found = filters.matches(filters.parse_filter({"a": wanted}), table, _never).tolist()
            assert found == [number == bound or (wanted != bound and number == 0) for number in numbers], wanted


def test_text_bounds_and_yaml_dates() -> None:
    documents = [{"day": day} for day in ("2019-12-31", "2020-01-01", "2020-06-30T12:00", 2020)]
    assert _mask({"day": {"gte": dt.date(2020, 1, 1)}}, documents) == [False, True, True, False]
    assert _mask({"day": dt.date(2020, 1, 1)}, documents) == [False, True, False, False]


def test_one_list_element_must_be_within_both_bounds() -> None:
    assert _mask({"a": {"gt": 1, "lt": 3}}, [{"a": [0, 9]}, {"a": [0, 2]}, {"a": []}]) == [False, True, False]


@pytest.mark.parametrize("metadata", [[], ["{}"], ["{}", "{}", "{}"]])
def test_documents_without_any_field(metadata: list[str]) -> None:
    table = filters.attributes(metadata)
    assert table.num_rows == len(metadata)
    assert filters.matches(filters.Filter(), table, _never).tolist() == [True] * len(metadata)
    assert filters.matches(filters.parse_filter({"a": 1}), table, _never).tolist() == [False] * len(metadata)


def test_columns_are_typed_and_sorted_for_any_input_order() -> None:
    documents = [{"b": "x", "a": 1}, {"a": [True]}, {"c": {"d": 1}, "a": 2**53 + 1}, {"b": ["x"], "a": None}]
    table = filters.attributes(_json(documents))
    assert table.column_names == ["left_out", "a:booleans", "a:integer", "a:number", "b:text", "b:texts"]
    assert table["a:number"].to_pylist() == [1.0, None, None, None]
    assert table["a:integer"].to_pylist() == [None, None, 2**53 + 1, None]
    assert table["b:texts"].to_pylist() == [None, None, None, ["x"]]
    assert table["left_out"].to_pylist() == [False] * 4
    assert filters.attributes(_json(documents[::-1])).schema == table.schema


def test_the_most_frequent_fields_become_columns_and_the_others_are_still_found() -> None:
    documents = [{"most common": number} | {f"{number}-{key}": key for key in range(300)} for number in range(3)]
    metadata = _json([*documents, {"most common": 3}])
    table = filters.attributes(metadata)
    assert table.num_columns == 1 + filters.MAX_FIELDS
    assert "most common:number" in table.column_names
    assert table["left_out"].to_pylist() == [True] * 3 + [False]
    assert "2-299:number" not in table.column_names
    assert filters.matches(filters.parse_filter({"2-299": 299}), table, lambda: metadata).tolist() == [
        False, False, True, False,
    ]  # fmt: skip


def test_only_marked_documents_that_may_match_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "MAX_FIELDS", 1)
    metadata = _json([{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1}])
    table = filters.attributes(metadata)
    assert table.column_names == ["left_out", "a:number"]
    texts = [metadata[0], "never read", "never read"]
    assert filters.matches(filters.parse_filter({"a": 1, "b": 1}), table, lambda: texts).tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("max_fields", [1, 256])
def test_attributes_survive_a_memory_mapped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_fields: int
) -> None:
    monkeypatch.setattr(filters, "MAX_FIELDS", max_fields)
    documents = [{"a": 1, "年": ["x", "y"]}, {"a": "z"}, {}, {"a": 2**60 + 1, "b": True}]
    metadata = _json(documents)
    table = filters.attributes(metadata)
    with pa.OSFile(str(tmp_path / "attributes.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    read = pa.ipc.open_file(pa.memory_map(str(tmp_path / "attributes.arrow"))).read_all()
    assert read.equals(table)
    assert any(read["left_out"].to_pylist()) == (max_fields == 1)
    for conditions in ({"a": 1}, {"a": 2**60 + 1}, {"年": "y"}, {"b": True}, {"a": ["z", 1]}):
        expected = [_document_meets(document, conditions) for document in documents]
        assert any(expected)
        assert filters.matches(filters.parse_filter(conditions), read, lambda: metadata).tolist() == expected


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ("product: pump", r"'product: pump' must map fields"),
        ({2020: "x"}, r"field 2020 must be valid text"),
        ({"\ud800": 1}, r"field '\\ud800' must be valid text"),
        ({"a": []}, r"'a': \[\] allows no value"),
        ({"a": None}, r"'a': None cannot be compared"),
        ({"a": math.nan}, r"'a': nan cannot be compared"),
        ({"a": [1, math.inf]}, r"'a': inf cannot be compared"),
        ({"a": 10**30 + 1}, r"'a': 1000000000000000000000000000001 cannot be compared"),
        ({"a": 10**400}, r"'a': 1000.*\.\.\. cannot be compared"),
        ({"a": "\ud800"}, r"'a': '\\ud800' cannot be compared"),
        ({"a": [[1]]}, r"'a': \[1\] cannot be compared"),
        ({"a": [{"gte": 1}]}, r"'a': {'gte': 1} cannot be compared"),
        ({"a": {"gte": [1]}}, r"'a': \[1\] cannot be compared"),
        ({"a": {"gte": None}}, r"'a': None cannot be compared"),
        ({"a": {"gte": math.nan}}, r"'a': nan cannot be compared"),
        ({"a": dt.datetime(2020, 1, 1, tzinfo=dt.UTC)}, r"'a': datetime.* cannot be compared.*Quote it"),
        ({"a": b"x"}, r"'a': b'x' cannot be compared"),
        ({"a": {}}, r"'a': {} must be one or two bounds named gt, gte, lt, lte"),
        ({"a": {"eq": 1}}, r"'a': {'eq': 1} must be one or two bounds"),
        ({"a": {1: 1}}, r"'a': {1: 1} must be one or two bounds"),
        ({"a": {"gt": 1, "gte": 1}}, r"'a': .* has two bounds on one side"),
        ({"a": {"lt": 1, "lte": 1, "gt": 0}}, r"'a': .* has two bounds on one side"),
        ({"a": {"gte": 1, "lt": "2"}}, r"'a': .* mixes text and a number"),
        ({"a": {"gte": True}}, r"'a': .* a boolean cannot be a bound"),
        ({"a": {"gte": 2, "lt": 2}}, r"'a': .* no value is within"),
        ({"a": {"gt": "b", "lte": "a"}}, r"'a': .* no value is within"),
    ],
)
def test_a_wrong_filter_is_refused_by_field_and_value(conditions: Any, message: str) -> None:
    with pytest.raises(filters.SelectionError, match=message):
        filters.parse_filter(conditions)


@pytest.mark.parametrize(
    ("field", "tenant", "message"),
    [
        ("tenant", "", r"tenant is ''"),
        ("tenant", " \n", r"tenant is ' \\n'"),
        ("tenant", None, r"tenant is None"),
        ("tenant", 7, r"tenant is 7"),
        ("", "acme", r"field is ''"),
        ("tenant", "\ud800", r"'tenant': '\\ud800'"),
    ],
)
def test_a_tenant_must_be_named(field: Any, tenant: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filters.tenant_filter(field, tenant)


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "x" * 500])
def test_metadata_that_is_not_an_object_is_refused(text: str) -> None:
    with pytest.raises(filters.SelectionError, match=r"document 1: metadata must be a JSON object, found "):
        filters.attributes(["{}", text])


def test_metadata_nested_too_deeply_counts_as_empty() -> None:
    deep = '{"a": 1, "b": ' + "[" * 200_000 + "]" * 200_000 + "}"
    table = filters.attributes([deep, '{"a": 1}'])
    assert filters.matches(filters.parse_filter({"a": 1}), table, _never).tolist() == [False, True]


def test_matches_refuses_other_tables_and_other_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(filters.SelectionError, match=r"no column 'left_out' in \['a:number'\]"):
        filters.matches(filters.Filter(), pa.table({"a:number": [1.0]}), _never)
    monkeypatch.setattr(filters, "MAX_FIELDS", 0)
    table = filters.attributes(['{"a": 1}', "{}"])
    with pytest.raises(filters.SelectionError, match=r"1 texts of metadata for 2 rows"):
        filters.matches(filters.parse_filter({"a": 1}), table, lambda: ["{}"])


@given(
    documents=st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 2)), max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_spread_equals_a_loop_over_documents(documents: list[tuple[bool, int, int]], order: Any) -> None:
    rows, end = [], 0
    for is_seen, count, gap in documents:
        rows.append((is_seen, end + gap, count))
        end += gap + count
    order.shuffle(rows)
    expected = [False] * end
    for is_seen, first, count in rows:
        expected[first : first + count] = [is_seen] * count
    mask, first, count = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    found = filters.spread(mask.astype(bool), first.astype(np.int32), count.astype(np.int32), end)
    assert found.dtype == bool
    assert found.tolist() == expected


@pytest.mark.parametrize(("first", "count"), [([0, 3], [2, 2]), ([-1, 0], [1, 1]), ([0, 2], [1, -1]), ([0, 5], [1, 0])])
def test_spread_refuses_passages_out_of_range(first: list[int], count: list[int]) -> None:
    with pytest.raises(filters.SelectionError, match=r"document [01]: -?\d passages from -?\d on exceed the 4 in all"):
        filters.spread(np.ones(2, dtype=bool), np.array(first), np.array(count), 4)


def test_spread_refuses_arrays_of_different_lengths() -> None:
    with pytest.raises(filters.SelectionError, match=r"mask \(2,\), first \(1,\), count \(2,\)"):
        filters.spread(np.ones(2, dtype=bool), np.zeros(1, dtype=int), np.zeros(2, dtype=int), 4)
