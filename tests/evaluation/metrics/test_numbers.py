"""Numbers in answers, against grades by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config, schema
from ragtune_ray.evaluation import scoring
from ragtune_ray.evaluation.metrics.errors import MetricError
from ragtune_ray.evaluation.metrics.numbers import as_number, is_numeric, numbers, numeric_match

EXACT = config.Evaluate()
SAME = [
    ("about 4.5 million", "4,500,000"), ("4.5M", "4,500,000"), ("$4.5m", "$4.5 million"), ("$4.5m", "4.5 million dollars"),
    ("4.5 million US dollars", "$4.5 million"), ("US$5 million", "$5 million"), ("$5", "US$5"), ("A$5", "5 AUD"),
    ("10 pounds", "£10"), ("10 pounds", "10 lbs"), ("¥100", "100 yen"), ("¥100", "100 yuan"), ("USD 5 million", "$5,000,000"), ("€5", "5 euros"), ("5 EUR", "€5"),
    ("-$5", "-5 dollars"), ("$-5", "-$5"), ("-3", "-3"), ("minus three", "-3"), ("\u22123 °C", "-3 °C"), ("5%", "5 percent"),
    ("0.5", "50%"), ("5‰", "0.5%"), ("1.5 billion", "1500 million"), ("300K users", "300,000"), ("300 K", "300 K"),
    ("10 GB", "10,000 MB"), ("It is 5 km long", "5000 m"), ("5 kilometres", "5 km"), ("5 km", "5"), ("72 km/h", "20 m/s"),
    ("30 m²", "30 square metres"), ("2 hours", "120 minutes"), ("24-hour", "24 hours"), ("12-fold", "12"),
    ("twenty-five", "25"), ("twenty five", "25"), ("a hundred", "100"), ("two hundred and fifty", "250"), ("Eighty seconds", "80 s"),
    ("fifteen hundred", "1500"), ("five hundred thousand", "500,000"), ("zero", "0"), ("twelve apostles", "12"), ("12 apostles", "twelve"), ("ten million", "10,000,000"), ("a million", "1,000,000"),
    ("1.5 × 10^6", "1,500,000"), ("6.02×10²³", "6.02e23"), ("1/2", "0.5"), ("2.50", "2.5"), ("1,234.5", "1234.5"),
    ("The answer is 42.", "42"), ("(42)", "42"), ("3, 4 and 5", "4"), ("In 1990 there were 1,200 people.", "1200"),
    ("On 20 July 1969", "1969"), ("2024-03-05", "2024"), ("5 may be", "5"), ("1\u202f000\u202f000", "1000000"),
    ("- 12 players", "12"), ("Total \u2013 12", "12"), ("It needs:\n- 12 players\n- 3 coaches", "12"), ("* 12", "12"),
    ("2 × 10⁻³ m", "0.002 m"),
]  # fmt: skip
DIFFERENT = [
    ("3", "-3"), ("-3", "3"), ("1970", "1969"), ("3.14", "3.14159"), ("43", "42"), ("4.5 m", "4,500,000"), ("5", "5 km"),
    ("50", "50%"), ("half", "50%"), ("100 mph", "100 km/h"), ("5 kg", "5 km"), ("$5", "€5"), ("5 m", "5 m²"),
    ("5 million euros", "US$5 million"), ("A$5", "US$5"), ("10 lbs", "£10"), ("100 yen", "100 yuan"), ("5", "US$5"),
    ("between 3 and 5", "3"), ("from 10 to 20 people", "10"), ("3 or 4", "3"), ("3-5", "5"), ("12 March 1969", "12"),
    ("May 5", "5"), ("2024-03-05", "5"), ("10:30", "10"), ("5 pm", "5"), ("one of the best", "1"), ("no one", "1"),
    ("twenty-five", "20"), ("twenty five", "5"), ("two hundred and fifty", "200"), ("seventeen", "7"), ("B-52", "52"), ("COVID-19", "19"), ("version 1.2.3", "1.2"), ("the 3rd", "3"), ("42nd", "42"), ("4x4", "4"),
    ("1e999999", "42"), ("", "42"), ("It is 6.6 × 10⁻", "42"), ("1 × 10²⁻³", "0.1"), ("12 players", "-12"), ("9" * 400, "42"), ("1,000,5", "1000"),
]  # fmt: skip
ELSEWHERE = [
    ("de", "etwa 4,5 Mio. Einwohner", "4.500.000", 1), ("de", "3,5", "3.5", 1), ("de", "1 Billion", "1.000.000.000.000", 1),
    ("en", "1 billion", "1,000,000,000", 1), ("de", "am 5. Mai 1945", "5", 0), ("fr", "4 500 000", "4,5 millions", 1),
    ("fr", "12,5 %", "12.5%", 1), ("es", "4.500", "4500", 1), ("it", "1.234,5 km", "1234,5 km", 1), ("ru", "4,5 млн", "4 500 000", 1),
    ("zh", "约450万人", "4500000", 1), ("zh", "333米高", "333米", 1), ("zh", "3.5公里", "3500米", 1), ("zh", "1969年7月20日", "20", 0),
    ("zh", "1969年7月20日", "1969年", 1), ("ja", "約１，２００人", "1200", 1), ("ar", "٤٥٠٠", "4500", 1), ("hi", "१२", "12", 1),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_the_same_number_in_other_words_is_right(answer: str, gold: str) -> None:
    assert numeric_match(answer, [gold], "en") == 1
    assert numeric_match(answer, ["7", gold], "en") == 1


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_another_number_or_no_number_is_wrong(answer: str, gold: str) -> None:
    assert numeric_match(answer, [gold], "en") == 0


@pytest.mark.parametrize(("language", "answer", "gold", "expected"), ELSEWHERE)
def test_numbers_are_read_as_the_language_writes_them(language: Any, answer: str, gold: str, expected: int) -> None:
    assert numeric_match(answer, [gold], language) == expected


def test_the_tolerance_is_a_share_of_the_gold_number_and_leaves_years_exact() -> None:
    assert numeric_match("4.46 million", ["4.5 million"], "en", tolerance=0.01) == 1
    assert numeric_match("4.44 million", ["4.5 million"], "en", tolerance=0.01) == 0
    assert numeric_match("-99", ["-100"], "en", tolerance=0.01) == 1
    assert numeric_match("1970", ["1969"], "en", tolerance=0.01) == 0
    assert numeric_match("1,970", ["1,969"], "en", tolerance=0.01) == 1, "a separator: no year"
    assert numeric_match("1970", ["1969 soldiers"], "en", tolerance=0.01) == 1
    assert numeric_match("0.001", ["0"], "en", tolerance=0.5) == 0


GOLDS = "1945|12 players|about 4.5 million|twelve|-40 °C|4.5%|$1.2 billion|1,000|12 km/h|a hundred|twenty-one|≈ 3"
NO_GOLDS = (
    "50 Cent|Three Mile Island|7 May 1945|July 1969|1969-07-20|10:30|more than 5|>5|3-1|3 to 5|five or six|B-52|One Direction|3rd|"
    "1970s|555-1234|192.168.0.1|5 ft 10 in|Apollo 11|2 of 3|the number 5|COVID-19||x"
)


def test_a_gold_answer_is_a_number_as_a_whole_or_not_at_all() -> None:
    assert [gold for gold in GOLDS.split("|") if not is_numeric([gold], "en")] == []
    assert [gold for gold in NO_GOLDS.split("|") if is_numeric([gold], "en")] == []
    with pytest.raises(MetricError, match="Paris"):
        numeric_match("Paris", ["Paris"], "en")


def test_an_answer_that_equals_another_gold_answer_is_right() -> None:
    assert numeric_match("A dozen!", ["12", "a dozen"], "en") == 1


@given(st.text(max_size=60), st.sampled_from(("en", "de", "zh", "other")))
def test_any_text_has_a_list_of_numbers(text: str, language: Any) -> None:
    assert all(each.start < each.end for each in numbers(text, language))
    as_number(text, language)


@given(st.floats(-1e12, 1e12).map(lambda value: round(value, 3)), st.sampled_from(("", "km", "%", "€", "million")))
def test_a_number_equals_itself_with_and_without_separators(value: float, unit: str) -> None:
    for language, plain, grouped in (
        ("en", f"{value:.3f}", f"{value:,.3f}"),
        ("de", f"{value:.3f}".replace(".", ","), f"{value:,.3f}".translate(str.maketrans(",.", ".,"))),
    ):
        assert numeric_match(f"{plain} {unit}", [f"{grouped} {unit}"], language) == 1  # type: ignore[arg-type]


def test_scores_have_it_for_questions_with_a_number_as_gold_answer() -> None:
    def scored(text: str, *golds: str, rule: config.Evaluate = EXACT, **changed: Any) -> dict[str, float]:
        query = schema.Query("q", "?", golds, (), (), "all")
        facts: dict[str, Any] = {"abstained": False, "status": "ok", "error": ""} | changed
        answer = schema.Answer(
            "q",
            "?",
            text,
            (),
            (),
            (),
            seconds=0.0,
            prompt_tokens=0,
            completion_tokens=0,
            index_version="",
            model="",
            **facts,
        )
        return scoring.score_answers([query], [answer], rule)["q"]

    assert scored("about 4.5 million", "4,500,000")["numeric_match"] == 1
    assert scored("4.4 million", "4,500,000")["numeric_match"] == 0
    loose = config.Evaluate(numeric_tolerance=0.05)
    assert scored("4.4 million", "4,500,000", rule=loose)["numeric_match"] == 1
    assert scored("42", "42", abstained=True)["numeric_match"] == 0
    assert scored("42", "42", status="failed")["numeric_match"] == 0
    assert "numeric_match" not in scored("42", "the Moon")
    assert "numeric_match" not in scored("42")
