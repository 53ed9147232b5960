"""Lines for people: scores, answers, sources and versions, at most 80 columns wide."""

import re

import pytest

from ragtune_ray import schema, terminal
from tests.support.texts import CHINESE, LONG, columns


def interval(value: float, low: float, high: float, n: int = 100) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n}


def answer_of(**changes: object) -> schema.Answer:
    values = {
        "query_id": "q",
        "query": "Which moons?",
        "answer": "Phobos and Deimos",
        "citations": (schema.Citation("mars#1", "mars", 25, 62),),
        "passage_ids": ("moon#0", "mars#1"),
        "scores": (0.5, 0.25),
        "abstained": False,
        "seconds": 0.1,
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "status": "ok",
        "error": "",
        "index_version": "000001",
        "model": "m",
    }
    return schema.Answer(**(values | changes))


def test_scores_are_listed_per_arm_with_their_intervals() -> None:
    lines = terminal.score_lines(
        {"base": {"EM": interval(0.05, 0, 0.1)}, "rag": {"EM": interval(0.5, 0.25, 1), "recall@5": interval(1, 1, 1)}},
        {"rag - base": {"EM": interval(0.45, -0.05, 0.5)}},
    )
    assert [line.split() for line in lines] == [
        ["metric", "n", "base", "rag", "rag", "-", "base"],
        ["EM", "100", "0.050", "[.00,.10]", "0.500", "[.25,1.0]", "+0.450", "[-.05,+.50]"],
        ["recall@5", "100", "-", "1.000", "[1.0,1.0]", "-"],
    ]
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert max(map(columns, lines)) <= 80


@pytest.mark.parametrize(
    "value",
    [interval(0.0, -0.003, 0.003), interval(-1.0, -1.0, -1.0), interval(0.999, 0.99, 1), interval(0.5, -0.25, 1.0)],
)
def test_every_printed_bound_can_be_parsed(value: dict[str, float]) -> None:
    (_, line) = terminal.score_lines({"base": {"EM": interval(0, 0, 0)}}, {"difference": {"EM": value}})
    shown, low, high = re.fullmatch(r"EM +100  0\.000 \[\.00,\.00\] +(\S+) \[(\S+),(\S+)\]", line).groups()
    assert [float(shown), float(low), float(high)] == pytest.approx(
        [value["value"], value["low"], value["high"]], abs=0.0051
    )


def test_an_answer_is_shown_with_its_citations() -> None:
    assert terminal.answer_lines(answer_of(), {"mars": "Mars"}) == [
        "Q  Which moons?",
        "A  Phobos and Deimos",
        "   cites Mars (mars, characters 25-62)",
    ]
    assert terminal.answer_lines(answer_of(), {})[2] == "   cites mars, characters 25-62"


def test_an_answer_without_citations_lists_the_passages_shown() -> None:
    assert terminal.answer_lines(answer_of(citations=()), {})[2:] == ["   cites nothing; was shown moon#0, mars#1"]
    assert terminal.answer_lines(answer_of(citations=(), passage_ids=(), answer=" "), {})[1:] == ["A  (empty)"]


def test_a_failed_answer_shows_its_error() -> None:
    lines = terminal.answer_lines(answer_of(status="failed", error="out of memory", citations=(), passage_ids=()), {})
    assert lines[1:] == ["A  (failed: out of memory)"]


def test_sources_are_numbered_as_in_citations() -> None:
    passages = [
        schema.Passage("moon#0", "moon", "x", "The Moon", "{}", 0, 26),
        schema.Passage("notes#4", "notes", "y", "", "{}", 100, 140),
    ]
    assert terminal.source_lines(passages, [0.75, 0.12345]) == [
        "[1] The Moon (moon, characters 0-26, score 0.750)",
        "[2] notes (notes, characters 100-140, score 0.123)",
    ]
    assert terminal.citation_lines(answer_of()) == ["cites mars, characters 25-62"]


@pytest.mark.parametrize("name", [LONG, CHINESE, "many short words " * 20])
def test_no_line_is_wider_than_80_columns(name: str) -> None:
    citation = schema.Citation(f"{name}#1", name, 10**6, 10**6 + 99)
    passage = schema.Passage(f"{name}#1", name, "x", name, "{}", 0, 9)
    answer = answer_of(query=name, answer=name * 3, citations=(citation,))
    uncited = answer_of(query=name, answer="a", citations=(), passage_ids=tuple(f"{name}#{n}" for n in range(5)))
    lines = [
        *terminal.answer_lines(answer, {name: name}),
        *terminal.answer_lines(uncited, {}),
        *terminal.answer_lines(answer_of(query="q", status="failed", error=name), {}),
        *terminal.source_lines([passage], [0.5]),
        *terminal.citation_lines(answer),
    ]
    assert max(map(columns, lines)) <= 80
    shown = re.sub(r"\s", "", "".join(lines))
    assert shown.count(re.sub(r"\s", "", name)) >= 3, "wrapped, not cut off"


def test_versions_are_listed_and_the_current_one_is_marked() -> None:
    manifests = [
        {
            "version": f"00000{number}",
            "created": "2025-01-01T00:00:00Z",
            "num_documents": number * 1000,
            "num_passages": number * 10_000,
            "index_kind": "flat",
            "encoder": {"model": "all-MiniLM-L6-v2"},
            **({"operation": "rollback", "restores": "000001"} if number == 2 else {}),
        }
        for number in (1, 2)
    ]
    lines = terminal.version_lines(manifests, "000002")
    assert [line.split() for line in lines[1:]] == [
        ["000001", "2025-01-01", "00:00", "1,000", "10,000", "flat", "index", "all-MiniLM-L6-v2"],
        ["*", "000002", "2025-01-01", "00:00", "2,000", "20,000", "flat", "to", "000001", "all-MiniLM-L6-v2"],
    ]
    assert max(map(columns, lines)) <= 80


def test_a_cut_answer_names_the_setting_to_raise() -> None:
    assert "generator.max_new_tokens" in " ".join(terminal.citation_lines(answer_of(cut=True)))
    assert "generator" not in " ".join(terminal.citation_lines(answer_of(cut=False)))
