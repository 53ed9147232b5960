"""The content of comparison.json: what is read, refused and replaced."""

import json
import math
import random
from typing import Any

import pytest

from ragtune_ray.evaluation import comparison as comparisons
from ragtune_ray.evaluation.comparison import ComparisonError
from tests.support.comparisons import comparison, half_failed, hostile, one_question


@pytest.mark.parametrize("make", [comparison, half_failed, hostile, one_question])
def test_written_content_is_read_back(make: Any) -> None:
    given = make()
    dumped = comparisons.read(given).model_dump(mode="json")
    assert dumped["questions"] == {"needed": None} | given["questions"]
    assert {name: arm["quality"] for name, arm in dumped["arms"].items()} == {
        name: arm["quality"] for name, arm in given["arms"].items()
    }
    assert json.dumps(dumped, allow_nan=False)


def test_arms_have_a_fixed_order() -> None:
    given = comparison()
    arms = [*given["arms"].items(), ("another", given["arms"]["base"])]
    random.Random(0).shuffle(arms)
    assert comparisons.read(given | {"arms": dict(arms)}).names() == ["base", "rag", "ft", "rag+ft", "another"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    given = comparison()
    given["arms"]["rag"]["quality"]["EM"]["low"] = bad
    with pytest.raises(ComparisonError, match=r"arms\.rag\.quality\.EM\.low: .*finite.*`ragtune compare`"):
        comparisons.read(given)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("format", 2, "format: .*1"), ("arms", {}, "arms: .*at least 1"), ("confidence", 95, "confidence: .*less than 1")],
)
def test_unsupported_values_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        comparisons.read(comparison() | {field: value})


def test_a_missing_field_is_named() -> None:
    given = comparison()
    del given["arms"]["ft"]["cost"]["total"]
    with pytest.raises(ComparisonError, match=r"arms\.ft\.cost\.total: Field required"):
        comparisons.read(given)


def test_only_control_characters_are_replaced() -> None:
    given = comparison()
    given["title"] = (
        "bell \x07, escape \x1b[31m, C1 \x9b, half a pair \ud83d, tab \t, line \n, 嫦娥, \N{HEBREW LETTER ALEF}"
    )
    given["versions"]["na\x00me"] = "1"
    facts = comparisons.read(given)
    assert facts.title == "bell �, escape �[31m, C1 �, half a pair �, tab \t, line \n, 嫦娥, א"
    assert "na�me" in facts.versions
    assert "\x07" in given["title"], "the input is not changed"
