"""The rows and cells of the comparison table."""

from ragtune_ray.evaluation import comparison as comparisons
from ragtune_ray.evaluation.comparison import Comparison
from ragtune_ray.evaluation.intervals import Interval
from ragtune_ray.evaluation.reasons import three_digits
from ragtune_ray.evaluation.report import html_page, plain_text, table
from ragtune_ray.evaluation.verdict import Difference
from tests.support.comparisons import comparison, half_failed, interval, one_question


def rows(facts: Comparison) -> dict[tuple[str, str], table.Row]:
    found = [*table.groups(facts), table.other_metrics(facts)]
    return {(group.name, row.label): row for group in found for row in group.rows}


def texts(row: table.Row) -> list[str]:
    return [f"{cell.text} {cell.detail}".strip() if cell else "-" for cell in row.cells]


def test_every_measure_has_one_cell_per_arm() -> None:
    found = rows(comparisons.read(comparison()))
    assert all(len(row.cells) == 4 for row in found.values())
    assert texts(found["Quality", "token F1"]) == [
        "0.058 [0.04, 0.08]",
        "0.181 [0.15, 0.21]",
        "0.107 [0.07, 0.14]",
        "0.591 [0.51, 0.67]",
    ]
    assert [row.label for row in found.values() if row.decides] == ["token F1"]
    assert next(iter(found)) == ("Quality", "token F1"), "the metric that decides comes first"
    others = [label for group, label in found if group == "Other metrics"]
    assert others == ["EM", "contains answer"]
    assert found["Quality", "token F1"].n == "113"
    assert texts(found["Explainability", "citation precision"]) == [
        "-",
        "0.784 [0.71, 0.85]",
        "-",
        "0.784 [0.71, 0.85]",
    ]
    assert texts(found["Latency", "total p50"])[1:3] == ["641 ms (p95 1.03 s)", "120 ms (p95 192 ms)"]
    assert texts(found["Cost", "all in all"]) == ["0.810", "1.69", "0.384", "1.20"]
    assert texts(found["Freshness", "visible after"]) == ["-", "3.42 s", "-", "3.42 s"]
    assert texts(found["Forgetting", "difference"])[2:] == ["−0.063 [−0.09, −0.03]"] * 2


def test_failed_arm_shows_only_its_counts() -> None:
    facts = comparisons.read(half_failed())
    found = rows(facts)
    assert texts(found["Answers", "ok"]) == ["119", "59", "119", "0"]
    assert texts(found["Answers", "failed"]) == ["0", "60", "0", "119"]
    assert texts(found["Other metrics", "EM"])[3] == "-"
    assert texts(found["Latency", "total p50"])[3] == "-"
    assert texts(table.losses(facts)["failed"]) == ["0 (0 %)", "57 (50 %)", "0 (0 %)", "113 (100 %)"]


def test_differing_counts_are_shown_as_a_range() -> None:
    given = comparison()
    given["arms"]["ft"]["quality"]["EM"]["n"] = 90
    assert rows(comparisons.read(given))["Other metrics", "EM"].n == "90–113"


def test_measures_that_no_arm_has_are_left_out() -> None:
    facts = comparisons.read(one_question())
    assert [group.name for group in table.groups(facts)] == ["Quality", "Latency", "Cost", "Answers"]
    assert [group.note for group in table.groups(facts) if group.name == "Cost"] == [
        "in core-seconds, since no prices are set"
    ]
    assert list(table.losses(facts)) == ["wrong"]


def test_unknown_metrics_and_outcomes_are_shown() -> None:
    given = comparison()
    given["arms"]["rag"]["quality"]["new_metric"] = given["arms"]["rag"]["quality"]["EM"]
    given["arms"]["rag"]["losses"]["new_loss"] = 3
    facts = comparisons.read(given)
    assert texts(rows(facts)["Other metrics", "new metric"]) == ["-", "0.009 [0.00, 0.03]", "-", "-"]
    assert list(table.losses(facts)) == ["correct", "not_retrieved", "misread", "abstained", "wrong", "new_loss"]


def test_old_differences_count_only_if_the_interval_excludes_zero() -> None:
    def direction(low: float, high: float) -> str:
        return table.conclusion(
            Difference(arm="a", against="b", metric="EM", value=(low + high) / 2, low=low, high=high, n=9)
        )

    assert [direction(0.01, 0.2), direction(-0.2, -0.01), direction(-0.1, 0.2)] == ["better", "worse", "open"]
    assert [direction(0, 0.2), direction(-0.2, 0), direction(0, 0)] == ["open"] * 3


def test_numbers_are_short_at_any_magnitude() -> None:
    numbers = (0, 0.00012, 0.0642, 0.1, 1.2, 12, 99.94, 99.96, 1234.5, 12345678.9, 1.2e15, -0.5)
    shown = "0 0.00012 0.0642 0.100 1.20 12.0 99.9 100 1,234 12,345,679 1.2e+15 -0.500".split()
    assert [three_digits(number) for number in numbers] == shown
    assert [table.duration(seconds) for seconds in (0, 0.0004, 0.9994, 0.9996, 59.96, 86400)] == [
        "0 s", "0.400 ms", "999 ms", "1.00 s", "60.0 s", "86,400 s",
    ]  # fmt: skip
    assert table.interval_text(Interval(value=0, low=-0.05, high=0.05, n=1), signed=True) == "[−0.05, +0.05]"


def test_cut_answers_are_counted_with_the_setting_to_raise() -> None:
    content = comparison()
    assert ("Answers", "cut") not in rows(comparisons.read(content))
    content["arms"]["rag"]["cut"] = 7
    row = rows(comparisons.read(content))["Answers", "cut"]
    assert texts(row) == ["0", "7", "0", "0"]
    assert "generator.max_new_tokens" in row.note


def test_labels_are_a_group_of_their_own() -> None:
    value = comparison()
    agreement = {"n": 51, "alike": 40, "kappa": 0.71}
    arm = {"agreement": agreement, "alone": interval(0.8, 0.7, 0.9), "people": None}
    value["checked"] = {
        "metric": "judge", "path": "labels.jsonl", "answers": 102, "questions": 51, "corrected": True, "overall": agreement,
        "arms": {"base": arm, "rag": {**arm, "agreement": {"n": 51, "alike": 30, "kappa": None}}},
    }  # fmt: skip
    group = next(group for group in table.groups(comparisons.read(value)) if group.name == "Labels")
    assert group.note == "grades by people; they correct judge"
    alike, kappa, alone = group.rows
    assert [cell.text if cell else "" for cell in alike.cells] == ["40 of 51", "30 of 51", "", ""]
    assert [cell.text if cell else "" for cell in kappa.cells] == ["0.71", "", "", ""]
    assert (alone.label, alone.cells[0].text if alone.cells[0] else "") == ("judge uncorrected", "0.800")
    assert "judge uncorrected" in html_page.render(value)
    assert "the rest. These scores are those of token F1 itself, not corrected by labels." in html_page.render(value)
    assert any("graded alike" in line for line in plain_text.comparison_lines(value))
