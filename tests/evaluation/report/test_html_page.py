"""The HTML report: complete, self-contained, and safe with hostile text."""

import base64
import copy
import hashlib
import itertools
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selectolax.lexbor import LexborHTMLParser, LexborNode

from ragtune_ray.evaluation.comparison import ComparisonError
from ragtune_ray.evaluation.report import html_page
from tests.support.comparisons import (
    CHINESE,
    MARKUP,
    OVERRIDE,
    UNBROKEN,
    comparison,
    contested,
    half_failed,
    hostile,
    one_question,
    searched,
)

ALL = [comparison, half_failed, hostile, one_question, searched, contested]


def page_of(value: dict[str, Any]) -> LexborHTMLParser:
    return LexborHTMLParser(html_page.render(value))


def words(node: LexborNode) -> str:
    return " ".join(node.text().split())


def cells(page: LexborHTMLParser, table: str, label: str) -> list[str]:
    """The cells of the row of that name, without n."""
    rows = [row for row in page.css(f"{table} tbody tr") if words(row.css_first("th")).startswith(label)]
    assert len(rows) == 1, label
    return [words(cell) for cell in rows[0].css("td")]


def test_rounds_of_a_tuned_arm_are_drawn_and_listed() -> None:
    value = comparison()
    assert not page_of(value).css("#rounds")
    base = {"metric": "EM", "before": 0.1, "num_examples": 90}
    value["arms"]["staged"] = copy.deepcopy(value["arms"]["rag+ft"]) | {
        "rounds": [
            {
                "round": 1,
                "component": "generator",
                "accepted": True,
                "reason": "better",
                "after": 0.3,
                "low": 0.1,
                "high": 0.25,
            }
            | base,
            {"round": 1, "component": "retriever", "accepted": False, "reason": "<b>no</b> teacher", "num_examples": 4},
        ]
    }
    page = page_of(value)
    (figure,) = page.css("section[aria-labelledby=rounds] figure")
    assert "staged 1, generator accepted" in words(figure)
    assert "+0.200" in words(figure)
    listed = [words(item) for item in page.css("section[aria-labelledby=rounds] li")]
    assert listed == [
        "staged round 1, generator: accepted, better (90 examples; EM 0.100 → 0.300)",
        "staged round 1, retriever: refused, <b>no</b> teacher (4 examples)",
    ]


@pytest.mark.parametrize("make", ALL)
def test_page_contains_its_style_and_loads_nothing(make: Any) -> None:
    text = html_page.render(make())
    page = LexborHTMLParser(text)
    (style,) = page.css("style")
    digest = base64.b64encode(hashlib.sha256(style.text().encode()).digest()).decode()
    policy = page.css_first('meta[http-equiv="Content-Security-Policy"]').attributes["content"]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not page.css("script, link, img, iframe, object, embed, a, form, video, audio, base")
    allowed = {"href", "src", "srcset", "action", "style", "data", "xlink:href", "formaction", "poster", "ping"}
    names = {name for node in page.css("*") for name in node.attributes}
    assert not names & allowed
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in style.text()
    assert "@import" not in style.text()
    assert text.encode("utf-8")


def test_verdict_comes_first_with_its_reasons() -> None:
    page = page_of(comparison())
    (h1,) = page.css("h1")
    assert words(h1) == "Use rag+ft: retrieve, with the tuned generator."
    assert page.css_first("body > *").attributes["id"] == "verdict"
    assert words(page.css_first(".outcome")) == "Recommendation"
    assert [words(each) for each in page.css(".reasons li")] == comparison()["verdict"]["reason"]
    assert words(page.css_first("#verdict .warning")).endswith("6 unanswerable questions: its interval is wide.")
    assert "119 questions, 113 answerable and 6 not" in words(page.css_first("#verdict .about"))


@pytest.mark.parametrize(
    ("outcome", "said", "marked"),
    [
        ("recommended", "Recommendation", True),
        ("no_difference", "No difference seen", True),
        ("too_few_questions", "Too few questions", False),
        ("none_qualifies", "No arm qualifies", False),
    ],
)
def test_every_outcome_is_named_and_only_a_recommended_arm_marked(outcome: str, said: str, marked: bool) -> None:
    value = comparison()
    value["verdict"] |= {"outcome": outcome, "arm": "" if outcome == "none_qualifies" else "rag"}
    page = page_of(value)
    assert words(page.css_first(".outcome")) == said
    assert page.css_first("#verdict").attributes["class"] == outcome
    marks = [[words(each.css_first("bdi")) for each in found.css("thead .chosen")] for found in page.css(".measures")]
    assert marks == [["rag"] * marked] * 2, "in the table and in the folded one of other metrics"


def test_table_shows_the_numbers_of_the_comparison() -> None:
    page = page_of(comparison())
    # The recommended arm comes first: on a phone, only the first column is visible without scrolling.
    heads = page.css_first(".measures").css("thead th")[2:]
    assert [words(head.css_first("bdi")) for head in heads] == ["rag+ft", "base", "rag", "ft"]
    assert cells(page, ".measures", "token F1 decides") == [
        "113",
        "0.591 [0.51, 0.67]",
        "0.058 [0.04, 0.08]",
        "0.181 [0.15, 0.21]",
        "0.107 [0.07, 0.14]",
    ]
    assert cells(page, ".measures", "total p50")[3] == "641 ms (p95 1.03 s)"
    assert cells(page, ".measures", "visible after")[1:] == ["3.42 s", "–", "3.42 s", "–"]
    chosen = {
        tuple(place for place, cell in enumerate(row.css("td")) if "chosen" in (cell.attributes.get("class") or ""))
        for row in page.css(".measures tbody tr:not(.group)")
    }
    assert chosen == {(1,)}, "the first column after n is marked in every row"
    assert cells(page, "#losses ~ .beside table", "misread") == ["–", "49 (43 %)", "–", "38 (34 %)"]
    assert len(page.css(".measures svg.strip")) == sum(
        bool(re.fullmatch(r"[\d.]+ \[[\d., ]+\]", words(cell))) for cell in page.css(".measures td")
    )


def test_differences_are_marked_by_words_and_signs() -> None:
    page = page_of(comparison())
    marks = [words(each) for each in page.css(".way")]
    assert marks == ["▼ worse"] * 3 + ["○ openabout 980 questions would tell"]
    assert words(page.css_first("#differences ~ .beside tbody tr")) == (
        "base − rag+fttoken F1−0.533 [−0.61, −0.45]▼ worse113"
    )


def test_every_conclusion_has_a_sign() -> None:
    words_of = ["better", "worse", "no better", "as good", "open", "dropped"]
    value = comparison()
    value["differences"] = [value["differences"][0] | {"conclusion": word} for word in words_of]
    assert [words(each)[2:] for each in page_of(value).css(".way")] == words_of


def test_tables_have_scopes_labels_and_heading_levels() -> None:
    page = page_of(comparison())
    headings = page.css("th")
    assert headings
    assert {heading.attributes.get("scope") for heading in headings} == {"col", "row", "rowgroup"}
    for box in page.css(".scroll"):
        assert box.attributes["tabindex"] == "0", "can be scrolled with the keyboard"
        named = box.attributes.get("aria-labelledby")
        assert box.attributes.get("aria-label") or page.css_first(f"#{named}")
    levels = [int(node.tag[1]) for node in page.css("h1, h2, h3, h4")]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), "no level is skipped"
    ids = [node.attributes["id"] for node in page.css("[id]")]
    assert len(ids) == len(set(ids))


def test_every_plot_has_a_title_and_description() -> None:
    plots = page_of(comparison()).css("svg.plot")
    assert [svg.css_first("title").text() for svg in plots] == [
        "token F1 of each arm",
        "Differences of token F1 between arms",
        "token F1 against cost",
        "token F1 against latency",
        "recall@k of the retriever",
        "What became of the answerable questions",
    ]
    assert all(svg.attributes["role"] == "img" for svg in plots)
    recall = plots[4].css_first("desc").text()
    assert re.findall(r"recall@(\d+)", recall) == ["1", "3", "5", "10"], "sorted by k as a number"


def test_command_config_and_machine_are_shown_verbatim() -> None:
    page = page_of(comparison())
    assert page.css_first(".command").text() == comparison()["command"]
    facts = {words(each.css_first("dt")): words(each.css_first("dd")) for each in page.css("dl div")}
    assert facts["cpu"] == "Intel Xeon Platinum 8481C"
    assert facts["memory"] == "7.8 GiB"
    assert facts["gpus"] == "none"
    assert facts["torch"] == "2.10.0"
    assert facts["when"] == "2026-11-26T12:00:00Z, in 200 s"
    assert "9f86d081884c7d65" in facts["rag"]
    assert "index 000003" in facts["rag"]
    import yaml

    assert yaml.safe_load(page.css("pre")[-1].text()) == comparison()["config"]


def test_an_example_shows_every_arm_with_its_sources() -> None:
    page = page_of(comparison())
    first, second = page.css(".example")
    assert [words(each.css_first("h4 bdi")) for each in first.css("article")] == ["base", "rag", "ft", "rag+ft"]
    assert [words(each.css_first(".prose")) for each in first.css("article")][3] == "Messier 13 [1]"
    cited, uncited = first.css("article")[1].css(".source")
    assert words(cited) == (
        "[1] Arecibo Observatory cited" + "arecibo-observatory.md, characters 1126–1324"
        "To celebrate an upgrade of the equipment, a radio greeting of 1,679 bits was beamed on 16 November 1974 towards "
        "Messier 13, a cluster of stars in the constellation Hercules."
    )
    assert "cited" not in uncited.attributes["class"].split()
    assert "The documents contain no answer." in words(second)
    assert words(second.css("article")[1].css_first("h4")).endswith("abstained")
    assert words(second.css("article")[3].css_first(".failed")) == (
        "failed: prompt of 1,630 tokens is over prompt.max_tokens=1536"
    )


def test_hostile_text_is_shown_as_text() -> None:
    page, plain = page_of(hostile()), page_of(comparison())
    tags = {node.tag for node in page.css("*")} - {node.tag for node in plain.css("*")}
    assert not tags
    assert page.css_first("title").text().endswith(f"({MARKUP})")
    assert page.css_first("html").text().count(MARKUP) > 10
    assert page.css("pre")[-1].text().count(CHINESE) == 1
    prose = [each.text() for each in page.css(".answers > article > .prose, .answers > article > .long > .prose")]
    for text in (MARKUP, OVERRIDE, CHINESE * 250, UNBROKEN):
        assert text in prose
        assert f"{{{{ {text} }}}}" in prose, "text is not rendered as a template"
    assert "{{ 7 * 7 }}" in [words(each) for each in page.css("dd")]
    assert all(each.attributes.get("dir") == "auto" for each in page.css(".prose")), "its writing direction is isolated"


def test_long_answers_are_folded_but_complete() -> None:
    page = page_of(hostile())
    folded = [each for each in page.css("details.long") if each.css_first(".prose").text() == UNBROKEN]
    assert folded
    assert all("open" not in each.attributes for each in folded)
    assert words(folded[0].css_first(".more")) == "5,000 characters"
    assert len(folded[0].css_first(".preview").text()) < 300


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=120))
def test_any_text_is_shown_unchanged(text: str) -> None:
    value = one_question()
    example = comparison()["examples"][0]
    example["query"] = example["answers"]["base"]["text"] = text
    value["title"] = text
    page = page_of(value | {"examples": [example]})
    assert page.css_first(".example h3").text() == text
    assert page.css_first(".example .prose").text() == text
    assert page.css_first("#verdict .about bdi").text() == text


def test_variants_of_retrieval_are_a_table_with_scores_settings_and_fate() -> None:
    assert not page_of(comparison()).css("#variants")
    page = page_of(searched())
    (section,) = [each for each in page.css("section") if each.attributes.get("aria-labelledby") == "variants"]
    assert "chosen by 6 looks at these scores, so its own is optimistic" in words(section)
    rows = [" ".join(words(cell) for cell in row.css("th, td")) for row in section.css("tbody tr")]
    assert rows == [
        "long 0.250 [0.15, 0.35] 80 chunking.size_tokens=400, retrieval.top_k=10 used by the arms",
        "config 0.200 [0.10, 0.30] 80 as configured dropped after 80 questions",
        "few 0.150 [0.10, 0.20] 40 retrieval.top_k=1 dropped after 40 questions",
        "dense 0.100 [0.05, 0.15] 40 retrieval.mode=dense dropped after 40 questions",
    ]


def test_missing_measurements_are_left_out() -> None:
    page = page_of(one_question())
    assert not page.css("#differences, #examples, #ceilings, #weighed")
    assert [svg.css_first("title").text() for svg in page.css("svg.plot")] == [
        "token F1 of each arm",
        "token F1 against cost",
        "token F1 against latency",
        "What became of the answerable questions",
    ]
    assert "Freshness" not in page.css_first(".measures").text()
    assert "core-seconds, since no prices are set" in page.css_first(".measures").text()
    assert "1 question, 1 answerable and 0 not. About 340 would probably decide." in words(
        page.css_first("#verdict .about")
    )


def test_failed_arm_shows_counts_and_missing_values() -> None:
    page = page_of(half_failed())
    assert cells(page, ".measures", "failed")[1:] == ["0", "60", "0", "119"]
    assert cells(page, ".measures", "EM")[4] == "–"
    assert words(page.css_first("#verdict figcaption")).endswith("Not measured: rag+ft.")
    (violations, _) = page.css("main .warning")
    assert "60 of 119 answers failed; p95 latency 1.03 s is over compare.max_p95_seconds=1." in words(violations)


def test_break_even_is_written_in_words() -> None:
    value = comparison()
    value["break_even"].append({"arm": "ft", "against": "rag+ft", "answers": 0})
    assert [words(each) for each in page_of(value).css(".plain li")] == [
        "ft becomes cheaper than rag after 4,620 answers.",
        "rag+ft becomes cheaper than rag after 11,464 answers.",
        "rag+ft never becomes cheaper than base.",
        "ft is cheaper than rag+ft from the first answer on.",
    ]


def _shuffled(value: Any, source: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, _shuffled(each, source)) for key, each in value.items()]
        source.shuffle(items)
        return dict(items)
    return [_shuffled(each, source) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("make", ALL)
def test_equal_input_gives_an_equal_page(make: Any) -> None:
    value = make()
    before = copy.deepcopy(value)
    page = html_page.render(value)
    assert value == before
    assert html_page.render(_shuffled(value, random.Random(0))) == page
    assert html_page.render(json.loads(json.dumps(value, sort_keys=True))) == page


def test_content_that_is_no_comparison_is_refused() -> None:
    with pytest.raises(ComparisonError, match="verdict: Field required"):
        html_page.render({"format": 1})


def test_a_question_whose_gold_answer_is_not_known_is_not_called_unanswerable() -> None:
    content = contested()
    content["questions"]["total"] = 121
    for kind, questions in (("examples", content["examples"]), ("contested", content["contested"][0]["questions"])):
        assert len(questions) > 1, kind
        questions[0]["gold"], questions[1]["gold"] = None, []
    page = page_of(content)
    assert "121 questions, 113 answerable and 6 not, 2 without gold answers." in words(
        page.css_first("#verdict .about")
    )
    for section in (page.css_first("section[aria-labelledby=examples]"), page.css_first("main > section")):
        shown = [words(gold).rpartition(" ")[0] for gold in section.css(".gold")]
        assert shown[:2] == ["No gold answer is known.", "The documents contain no answer."]


def test_a_metric_that_sees_another_arm_ahead_is_shown_above_the_table_with_questions() -> None:
    page = page_of(contested())
    section = page.css_first("main > section")
    assert words(section.css_first("h2")) == "The metrics disagree"
    assert words(section.css_first("p.contested")) == (
        "By contains answer, rag is ahead of rag+ft: 0.637 against 0.487, +0.150 [+0.062, +0.238] over 113 questions."
    )
    first, second = section.css(".question")
    assert words(first.css_first(".gold")) == "Gold: Titan, or the moon Titan huygens-3"
    answers = [words(each.css_first("h4")) for each in first.css("article")]
    assert answers == [
        "rag+ft token F1 0.67 · contains answer 0.00",
        "rag token F1 0.02 · contains answer 1.00",
    ]
    assert "on the moon Titania" in words(first.css("article")[0])
    assert words(second.css_first("article .none")) == "(empty)"
    assert not page_of(comparison()).css("#contested")


def test_other_metrics_are_folded_below_the_table() -> None:
    page = page_of(contested())
    folded = page.css_first("details.folded")
    assert "open" not in folded.attributes
    assert words(folded.css_first("summary")) == "Other metrics: EM, contains answer, ROUGE-L"
    assert cells(page, ".folded .measures", "ROUGE-L")[1:] == [
        "0.570 [0.54, 0.60]",
        "0.040 [0.01, 0.07]",
        "0.150 [0.12, 0.18]",
        "0.100 [0.07, 0.13]",
    ]
    assert next(words(row) for row in page.css_first(".measures").css("tbody th[scope=row]")).startswith(
        "token F1 decides"
    )
    alone = comparison()
    for arm in alone["arms"].values():
        arm["quality"] = {"token_F1": arm["quality"]["token_F1"]}
    assert not page_of(alone).css(".folded")
