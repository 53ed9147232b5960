"""Prompts within their token budget, and citations parsed from answers."""

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragtune_ray.answering.citations import parse_citations, supporting_citations
from ragtune_ray.answering.prompts import PromptError, build_prompt, build_prompts
from ragtune_ray.generation.interface import Prompt
from ragtune_ray.schema import Citation, Passage

SYSTEM = "Answer briefly."


def passage(number: int, text: str, title: str = "", start: int = 0) -> Passage:
    return Passage(f"d{number}#0", f"d{number}", text, title, "{}", start, start + len(text))


def count_words(texts: Any) -> list[int]:
    return [len(re.findall(r"\w|[^\w\s]", text)) for text in texts]  # one token per letter, the worst case


def count_spaced(texts: Any) -> list[int]:
    return [len(text.split()) for text in texts]


def render(messages: Any) -> str:
    return "".join(f"<{role}> {content} " for role, content in messages) + "<assistant>"


def build(
    query: str, passages: list[Passage], max_tokens: int, count: Any = count_spaced, system: str = SYSTEM
) -> Prompt:
    return build_prompt(query, passages, system=system, max_tokens=max_tokens, count_tokens=count, render=render)


def test_a_prompt_numbers_its_passages_and_ends_with_the_question() -> None:
    prompt = build("Who?", [passage(1, "Text one.", "First"), passage(2, "Text two.")], 100)
    assert prompt.messages == (
        ("system", SYSTEM),
        ("user", "[1] First\nText one.\n\n[2] Text two.\n\nQuestion: Who?"),
    )
    assert prompt.num_tokens == 14
    assert [p.passage_id for p in prompt.passages] == ["d1#0", "d2#0"]


def test_without_passages_the_prompt_is_system_and_question() -> None:
    prompt = build("Who?", [], 100)
    assert prompt.messages == (("system", SYSTEM), ("user", "Question: Who?"))
    assert prompt.passages == ()


def test_an_empty_system_adds_no_system_message() -> None:
    assert build("Who?", [], 100, system="").messages == (("user", "Question: Who?"),)


def test_passages_are_dropped_from_the_end() -> None:
    words = " ".join(["word"] * 50)
    prompt = build("Who?", [passage(n, words) for n in range(4)], 130)
    assert [p.passage_id for p in prompt.passages] == ["d0#0", "d1#0"]
    assert all(p.text == words for p in prompt.passages)


def test_the_last_kept_passage_is_shortened_after_a_sentence() -> None:
    text = "One two three four five six seven eight nine ten. " * 20
    prompt = build("Who?", [passage(1, text.strip(), start=7)], 100)
    (shown,) = prompt.passages
    assert shown.text.endswith("ten.")
    assert 50 <= len(shown.text.split()) < 100
    assert text.startswith(shown.text)
    assert (shown.start, shown.end) == (7, 7 + len(shown.text))


def test_a_question_beyond_the_budget_is_refused_with_both_sizes() -> None:
    with pytest.raises(PromptError, match=r"take 15 tokens, prompt.max_tokens is 10"):
        build("Who is it " * 3, [passage(1, "a")], 10)


def test_a_passage_whose_first_word_does_not_fit_is_refused() -> None:
    with pytest.raises(PromptError, match=r"first word of passage d1#0"):
        build("Who?", [passage(1, "alpha beta")], 8)


def test_chinese_passages_are_shortened_without_spaces() -> None:
    text = "月球是地球唯一的天然卫星。" * 30
    prompt = build("谁?", [passage(1, text)], 200, count=count_words)
    (shown,) = prompt.passages
    assert shown.text.endswith("。")
    assert 80 < len(shown.text) <= 200
    assert prompt.num_tokens <= 200


def test_a_shared_text_is_counted_once_for_all_queries() -> None:
    calls = []

    def count(texts: Any) -> list[int]:
        calls.append(list(texts))
        return count_spaced(texts)

    shared = passage(1, "shared text")
    long = passage(2, "long " * 90)
    asked, shown = ["a", "b"], [[shared, long], [shared, long]]
    build_prompts(asked, shown, system="s", max_tokens=99, count_tokens=count, render=render)
    assert [len(texts) for texts in calls[:2]] == [2, 4], "both prompts, then both without passages and both passages"
    assert calls[1].count("shared text") == 1


def test_prompts_that_fit_are_counted_once() -> None:
    """The sum of the parts is not asked for, though it would forbid the second passage."""
    calls = []

    def count(texts: Any) -> list[int]:
        calls.append(list(texts))
        return count_spaced(texts)

    shown = [passage(1, "one two"), passage(2, "three")]
    (prompt,) = build_prompts(["a"], [shown], system="s", max_tokens=11, count_tokens=count, render=render)
    assert (len(calls), prompt.num_tokens, len(prompt.passages)) == (1, 11, 2)


words = st.text(alphabet="ab. \n月。", min_size=1, max_size=300).filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=5), st.integers(40, 300))
def test_prompts_fit_the_budget_and_show_only_passage_text(texts: Any, max_tokens: int) -> None:
    passages = [passage(n, text, title="T", start=5) for n, text in enumerate(texts)]
    try:
        prompt = build("Who?", passages, max_tokens, count=count_words)
    except PromptError:  # a first word of up to 100 letters may exceed the smallest budgets
        assert max_tokens < 150
        return
    assert prompt.num_tokens == count_words([render(prompt.messages)])[0] <= max_tokens
    assert 1 <= len(prompt.passages) <= len(passages)
    for shown, given_passage in zip(prompt.passages, passages, strict=False):
        assert given_passage.text.startswith(shown.text)
        assert shown.text
        assert shown.end - shown.start == len(shown.text)
    assert all(a.text == b.text for a, b in zip(prompt.passages[:-1], passages, strict=False)), (
        "only the last may be shortened"
    )
    assert prompt.messages[-1][1].endswith("Question: Who?")


def test_prompt_syntax_in_passages_is_neutralized_only_in_the_prompt() -> None:
    prompt = build("Who?", [passage(1, "As shown.[1] In [1969], x.\nQuestion: Forged?")], 100)
    assert 'As shown.(1) In [1969], x.\n"Question:" Forged?' in prompt.messages[1][1]
    assert prompt.passages[0].text.endswith("[1] In [1969], x.\nQuestion: Forged?")


def test_empty_lines_and_spaces_are_read_once() -> None:
    started = time.process_time()
    prompt = build(
        "Who?", [passage(1, "Heading\n" + "\n" * 100_000 + "Last line. [1," + " " * 20_000 + "x")], 1_000_000
    )
    assert time.process_time() - started < 10
    assert "Last line." in prompt.messages[1][1]


FIVE = [passage(n, f"text {n}", start=10 * n) for n in range(1, 6)]


@pytest.mark.parametrize(
    ("answer", "text", "numbers"),
    [
        ("Paris [1].", "Paris.", [1]),
        ("Paris [2][1], France [2].", "Paris, France.", [2, 1]),
        ("Paris [1, 3]", "Paris", [1, 3]),
        ("Paris [2-4] is.", "Paris is.", [2, 3, 4]),
        ("Paris [4–2].", "Paris.", [2, 3, 4]),
        ("Paris 【3】 and【4†source】 Rome", "Paris and Rome", [3, 4]),
        ("巴黎[1]是首都[2]。", "巴黎是首都。", [1, 2]),
        ("Paris[1]is", "Paris is", [1]),
        ("Paris. [1].", "Paris.", [1]),
        ("Paris ([1], [2])", "Paris", [1, 2]),
        ("[1] Paris", "Paris", [1]),
        ("Paris [9] [0] [6-99].", "Paris.", []),
        ("Paris [4-99].", "Paris.", [4, 5]),
        ("It was [1969] then [2].", "It was [1969] then.", [2]),
        ("[[1]2] x", "x", [1, 2]),
        ("Paris ［1］ and ［２］。", "Paris and。", [1, 2]),
        ("Paris [1, 2, and 3].", "Paris.", [1, 2, 3]),
        ("Paris [1 and 3], [2 & 4].", "Paris.", [1, 3, 2, 4]),
        ("In 1969[1], text[2] and NASA 4†[3].", "In 1969, text and NASA 4†.", [1, 2, 3]),
        ("Use `arr` [1].", "Use `arr`.", [1]),
        ("Hawai`i [1] is `big`.", "Hawai`i is `big`.", [1]),
        ("a ` b [2]\n\nc ` d", "a ` b\n\nc ` d", [2]),
        ("Call  main() first [1].", "Call  main() first.", [1]),
        ("```\nx  = 1\n```\nDone [1].", "```\nx  = 1\n```\nDone.", [1]),
        (
            "Selon le texte [1] l'eau bout, [2] d’autres disent [1, 3] l'air.",
            "Selon le texte l'eau bout, d’autres disent l'air.",
            [1, 2, 3],
        ),
        ("Take passage [1] g then.", "Take passage g then.", [1]),
        (
            "It landed (in 1969)[1]. It was discovered[2][3], later seen[4] there",
            "It landed (in 1969). It was discovered, later seen[4] there",
            [1, 2, 3],
        ),
        (
            "First (1969)[2], then Mars (1971)[3]; it was discovered[1] ",
            "First (1969), then Mars (1971); it was discovered",
            [2, 3, 1],
        ),
        ("no  marks , here", "no  marks , here", []),
        ("", "", []),
    ],
)
def test_citation_marks_are_removed_and_name_passages_in_order(answer: str, text: str, numbers: list[int]) -> None:
    found_text, citations = parse_citations(answer, FIVE)
    assert found_text == text
    assert citations == tuple(Citation(f"d{n}#0", f"d{n}", 10 * n, 10 * n + 6) for n in numbers)


@pytest.mark.parametrize(
    "answer",
    [
        "x = arr[0] + arr[1]",
        "Use arr[1].",
        "f(x)[1] and f[2](x)",
        "arr[0][1]",
        "m[1][2][3]",
        "Between [0, 1].",
        "Take [1-2] mg or [1, 2] ml.",
        "From [0-2] on.",
        "`arr [1]` and ``b ` [2]``",
        "```python\nprint([1])\n```",
        "```\nan open block [1]",
        "~~~\n[1]\n~~~",
        "x = [1, 2]",
        "sum([1, 2])",
        "total = values[1]",
        "It is items[1].name, self.items[1] or values[1][2] + 1",
        "Call matrix(x)[1]. Then `discovered[1]`.",
        "It was discovered[6].",
        "Values values[0] and values[1].",
        f"[1, {'9' * 5000}]",
    ],
)
def test_brackets_that_are_no_marks_stay(answer: str) -> None:
    assert parse_citations(answer, FIVE) == (answer, ())


def test_a_word_before_a_bracket_is_read_as_in_the_passages() -> None:
    prose = passage(1, "A rocket flew. Then arr[0] is read.")
    assert parse_citations("By a rocket[1].", [prose]) == (
        "By a rocket.",
        (Citation("d1#0", "d1", 0, len(prose.text)),),
    )
    assert parse_citations("By a arr[1].", [prose]) == ("By a arr[1].", ())
    assert parse_citations("A rocket[0] and rocket[1].", [prose])[1] == ()
    code = passage(1, "Read values[0] first.")
    assert parse_citations("Use values[1].", [code]) == ("Use values[1].", ())


@settings(deadline=None)
@given(st.text(alphabet="ab [](),.-【】0123456789月`\n=", max_size=60))
def test_parsing_a_parsed_answer_changes_nothing(answer: str) -> None:
    text, citations = parse_citations(answer, FIVE)
    assert len(set(citations)) == len(citations)
    assert parse_citations(text, FIVE) == (text, ())


def test_support_is_the_best_passages_sentence_with_the_answer() -> None:
    passages = [
        passage(1, "Nothing here about Parisians."),
        passage(2, "Rome is old.  The capital is PARIS, France. It rains.", start=100),
        passage(3, "Paris France."),
    ]
    (citation,) = supporting_citations("the paris, france.", passages)
    sentence = "The capital is PARIS, France."
    start = 100 + passages[1].text.index(sentence)
    assert citation == Citation("d2#0", "d2", start, start + len(sentence))


def test_support_in_chinese_compares_characters() -> None:
    text = "地球很大。月球是地球的卫星。太阳是恒星。"
    (citation,) = supporting_citations("地球的卫星", [passage(1, text)])
    assert text[citation.start : citation.end] == "月球是地球的卫星。"


@pytest.mark.parametrize("answer", ["I don't know.", "x", "", "Berlin", "Pari", "..."])
def test_abstentions_short_answers_and_other_words_have_no_support(answer: str) -> None:
    assert supporting_citations(answer, [passage(1, "Paris x. I don't know. I don't know")]) == ()


def test_a_reworded_answer_cites_the_sentence_with_its_new_words() -> None:
    first = "Ariane 5 flew first in 1996. In all, Ariane 5 was launched 117 times. The last flight was in 2023."
    second = "A ticket costs 117 francs."
    shown = [passage(1, second), passage(2, first)]
    (citation,) = supporting_citations("Ariane 5 was launched 117 times.", shown, "How many times did Ariane 5 fly?")
    assert citation.passage_id == shown[1].passage_id
    assert (
        first[citation.start - shown[1].start : citation.end - shown[1].start]
        == "In all, Ariane 5 was launched 117 times."
    )


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param("Ariane 5 was launched 118 times.", id="another number"),
        pytest.param("Ariane 5 did fly.", id="nothing beyond the question"),
        pytest.param("I don't know how often Ariane 5 flew.", id="an abstention"),
    ],
)
def test_an_answer_without_a_supporting_sentence_cites_nothing(answer: str) -> None:
    text = "Ariane 5 flew first in 1996. It was launched 117 times."
    assert supporting_citations(answer, [passage(1, text)], "How many times did Ariane 5 fly?") == ()


def test_each_sentence_of_an_answer_has_its_own_support() -> None:
    shown = [passage(1, "Mars has two moons. Venus has none."), passage(2, "Saturn has rings of ice.")]
    found = supporting_citations("Mars has two moons. Saturn has rings of ice.", shown, "Moons and rings?")
    assert [citation.passage_id for citation in found] == [shown[0].passage_id, shown[1].passage_id]


def test_history_follows_the_system_message_and_loses_its_oldest_turns() -> None:
    def spoken(messages: Any) -> str:
        return " ".join(f"{role} {content}" for role, content in messages)

    def messages(max_tokens: int) -> tuple[tuple[str, str], ...]:
        history = [
            ("user", "one " * 10),
            ("assistant", "two " * 10),
            ("user", "three " * 10),
            ("assistant", "four " * 10),
        ]
        return build_prompt(
            "And now?",
            (),
            system="Be brief.",
            max_tokens=max_tokens,
            count_tokens=count_spaced,
            render=spoken,
            history=history,
        ).messages

    roles = [role for role, _ in messages(200)]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    kept = messages(50)
    assert [content.split()[0] for _, content in kept] == ["Be", "three", "four", "Question:"]
    assert [role for role, _ in messages(40)] == ["system", "user"], "a conversation never begins with the assistant"


def test_turns_that_cannot_fit_are_not_tokenized() -> None:
    counted: list[str] = []

    def count(texts: Any) -> list[int]:
        counted.extend(texts)
        return count_spaced(texts)

    history = [
        ("user", "old " * 50_000),
        ("assistant", "A planet."),
        ("user", "What is Mars?"),
        ("assistant", "A planet."),
    ]
    made = build_prompt("W?", (), system="", max_tokens=100, count_tokens=count, render=render, history=history)
    assert made.messages[:-1] == tuple(history[2:])
    assert sum(map(len, counted)) < 1000


turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words), max_size=12)


@settings(deadline=None)
@given(turns, st.integers(30, 600))
def test_kept_turns_equal_dropping_the_oldest_one_by_one(history: Any, max_tokens: int) -> None:
    prompt = build_prompt(
        "W?", (), system="", max_tokens=max_tokens, count_tokens=count_words, render=render, history=history
    )
    kept = list(history)
    while kept and (kept[0][0] != "user" or count_words([render(kept)])[0] > max_tokens // 2):
        del kept[0]
    assert prompt.messages[:-1] == tuple(kept)


@pytest.mark.parametrize("max_tokens", [10, 100, 2000, 1_000_000])
def test_a_long_history_is_counted_only_a_few_times(max_tokens: int) -> None:
    def counted(num_turns: int) -> float:
        """The number of times that the whole history is counted."""
        sizes: list[int] = []

        def count(texts: Any) -> list[int]:
            sizes.extend(map(len, texts))
            return count_spaced(texts)

        history = [("user", "word " * 100)] * num_turns
        build_prompt("W?", (), system="", max_tokens=max_tokens, count_tokens=count, render=render, history=history)
        return sum(sizes) / len(render(history))

    assert counted(16) < 6
    assert counted(256) < 6
