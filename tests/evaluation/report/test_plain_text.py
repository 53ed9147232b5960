"""A comparison as terminal text: 80 columns, aligned, harmless."""

import re
import unicodedata
from typing import Any

import pytest

from ragtune_ray.evaluation.report.plain_text import comparison_lines
from tests.support.comparisons import OVERRIDE, comparison, contested, half_failed, hostile, one_question, searched


def columns(line: str) -> int:
    """Terminal cells: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


@pytest.mark.parametrize("make", [comparison, half_failed, hostile, one_question, searched, contested])
def test_lines_fit_a_terminal_and_contain_no_control_characters(make: Any) -> None:
    lines = comparison_lines(make())
    assert max(map(columns, lines)) <= 80
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "".join(lines))


def test_verdict_comes_first_and_recommended_arm_is_marked() -> None:
    lines = comparison_lines(comparison())
    assert lines[0] == "verdict    Use rag+ft: retrieve, with the tuned generator."
    (heading,) = [line for line in lines if line.startswith("*")]
    assert heading.split() == ["*", "recommended", "base", "rag", "ft", "rag+ft*"]
    assert not [line for line in comparison_lines(half_failed()) if "*" in line], "base is named, not recommended"


def test_cells_are_aligned_under_their_arms() -> None:
    lines = comparison_lines(comparison())
    heading = next(line for line in lines if line.startswith("*")).replace("*", " ").rstrip()
    row = next(line for line in lines if line.startswith(" token F1"))
    assert row == " token F1            0.06 [.04,.08] 0.18 [.15,.21] 0.11 [.07,.14] 0.59 [.51,.67]"
    assert [heading[:35].split()[-1], heading[:50].split()[-1]] == ["base", "rag"]
    at = next(place for place, line in enumerate(lines) if line.startswith(" generation p50"))
    assert [line.split("  ")[-1].strip() for line in lines[at : at + 2]] == ["410 ms", "(p95 656 ms)"]
    assert columns(lines[at + 1]) == columns(row), "the second line is aligned with its value"


def test_long_label_is_wrapped() -> None:
    lines = comparison_lines(comparison())
    at = next(place for place, line in enumerate(lines) if line.startswith(" false abstention"))
    assert lines[at].split() == ["false", "abstention", *["0.04", "[.01,.09]"] * 4]
    assert lines[at + 1] == " rate"


def test_differences_are_labelled_in_words() -> None:
    lines = comparison_lines(comparison())
    assert "rag - rag+ft            token F1           -0.410 [-.48,-.33]    113 worse" in lines
    assert "rag - rag+ft            contains answer    -0.018 [-.07,+.04]    113 open" in lines
    assert not [line for line in comparison_lines(one_question()) if line.startswith("difference")]


def test_failures_and_violations_are_shown() -> None:
    lines = comparison_lines(half_failed())
    assert ["failed", "0", "60", "0", "119"] in [line.split() for line in lines]
    assert "rag        p95 latency 1.03 s is over compare.max_p95_seconds=1" in lines
    assert "warning    rag failed on 60 of 119 questions." in lines


def test_direction_overrides_are_removed() -> None:
    text = "\n".join(comparison_lines(hostile()))
    assert OVERRIDE[1:8] in text
    assert OVERRIDE not in text


def test_long_arm_names_are_cut() -> None:
    given = comparison()
    name = "an-arm-of-a-later-version"
    given["arms"] = {"base": given["arms"]["base"], name: given["arms"]["rag"]}
    given["differences"] = [given["differences"][0] | {"arm": name}]
    lines = comparison_lines(given)
    assert max(map(columns, lines)) <= 80
    assert "base  an-arm-of-a-…" in next(line for line in lines if "base  an" in line)


def test_extreme_numbers_fit_the_table() -> None:
    given = comparison()
    for arm in given["arms"].values():
        arm["cost"] |= {"total": 1.2e15, "index": 123456789.0}
        arm["latency"]["total"] = {"p50_seconds": 1e8, "p95_seconds": 123456789.0}
        arm["quality"]["EM"] = {"value": -1.0, "low": -1.0, "high": -0.123, "n": 10**6}
    lines = comparison_lines(given)
    assert max(map(columns, lines)) <= 80
    assert [line.split()[3:] for line in lines if line.startswith(" all in all")] == [["1.2e+15"] * 4]


def test_variants_of_retrieval_are_listed_best_first_with_the_number_of_looks() -> None:
    lines = comparison_lines(searched())
    at = next(place for place, line in enumerate(lines) if line.startswith("variants"))
    said = " ".join(" ".join(lines[at : at + 4]).split())
    assert "use long, the best of 4 settings of retrieval on validation questions. It was chosen by 6 looks" in said
    rows = [line.split() for line in lines if line.startswith("  ") and "[." in line and line.split()[0].isalpha()]
    assert rows == [
        ["long", "0.250", "[.15,.35]", "80", "chunking.size_tokens=400,"],
        ["config", "0.200", "[.10,.30]", "80", "as", "configured"],
        ["few", "0.150", "[.10,.20]", "40", "retrieval.top_k=1"],
        ["dense", "0.100", "[.05,.15]", "40", "retrieval.mode=dense"],
    ]
    assert lines[lines.index(next(line for line in lines if "size_tokens=400," in line)) + 1].split() == [
        "retrieval.top_k=10"
    ]
    assert not [line for line in comparison_lines(comparison()) if line.startswith("variants")]


def test_more_arms_than_fit_a_line_are_shown_in_several_tables() -> None:
    value = comparison()
    value["arms"] |= {"base@gpt": value["arms"]["base"], "rag@gpt": value["arms"]["rag"]}
    value["differences"].append(value["differences"][0] | {"arm": "rag@gpt-of-the-team", "against": "base@gpt"})
    lines = comparison_lines(value)
    assert max(map(columns, lines)) <= 80
    (heading,) = [line.split() for line in lines if line.startswith("*")]
    assert heading == ["*", "recommended", "base", "rag", "ft", "rag+ft*"]
    assert ["base@gpt", "rag@gpt"] in [line.split() for line in lines]
    rows = [line.split() for line in lines if line.startswith(" token F1")]
    assert rows[1] == rows[0][:6], "the same numbers as base and rag"
    at = lines.index("rag@gpt-of-the-team - base@gpt")
    assert lines[at + 1].startswith(" " * 24 + value["differences"][0]["metric"].replace("_", " "))


def test_a_metric_that_sees_another_arm_ahead_stands_under_the_verdict_and_other_metrics_last() -> None:
    text = "\n".join(comparison_lines(contested()))
    at = text.index("metrics    By contains answer, rag is ahead of rag+ft:")
    assert text.index("questions  119") < at < text.index("* recommended")
    joined = " ".join(text[at : text.index("* recommended")].split())
    assert "January 2005, after seven years in space? (gold: Titan or the moon Titan)" in joined
    assert (
        "rag+ft (token F1 0.67, contains answer 0.00): on the moon Titania rag (token F1 0.02, contains answer 1.00): After"
        in joined
    )
    assert "Ceres" not in joined, "one question is enough here"
    assert text.index("Where the points are lost") < text.index("Other metrics") < text.index(" ROUGE-L ")
