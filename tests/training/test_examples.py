"""Training examples: answers are complete, gold places are right, prompts equal those of answering, negatives are wrong."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragtune_ray import config
from ragtune_ray.answering import pipeline
from ragtune_ray.generation.interface import Completion, Prompt
from ragtune_ray.schema import (
    ExampleKind,
    GeneratorExample,
    JointExample,
    Message,
    Passage,
    Query,
    Reject,
    RerankerExample,
    RetrieverExample,
)
from ragtune_ray.training.examples import (
    Candidates,
    ChatText,
    generator_example,
    holds_answer,
    joint_example,
    positive_passage,
    replay_count,
    reranker_example,
    retriever_example,
)

ANSWER = "Neil Armstrong"
WORDS = "orbit crater dust rover lander signal antenna engine".split()


def count_spaced(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def count_letters(texts: Sequence[str]) -> list[int]:
    return [len(re.findall(r"\S", text)) for text in texts]  # a token per letter: "[10]" is longer than "[9]"


def render(messages: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<{role}> {content} " for role, content in messages) + "<assistant>"


CHAT = ChatText(count_spaced, render)
SETTINGS = config.Config().using("training.gold_left_out_share=0", "retrieval.top_k=5")


def passage(name: str, text: str, title: str = "") -> Passage:
    return Passage(name, name.partition("#")[0], text, title, "{}", 0, len(text))


def question(
    name: str = "q", answers: tuple[str, ...] | None = (ANSWER,), relevant: tuple[str, ...] = ("gold",)
) -> Query:
    return Query(name, "Who set foot on it first?", answers, relevant, (1.0,) * len(relevant), "train")


def plain(name: str, num_words: int = 30) -> Passage:
    """A passage of five-word sentences without an answer."""
    words = [f"{WORDS[number % len(WORDS)]}{number}" for number in range(num_words)]
    sentences = [" ".join(words[first : first + 5]) + "." for first in range(0, num_words, 5)]
    return passage(name, " ".join(sentences), title=f"About {name.partition('#')[0]}")


GOLD = passage("gold#0", f"{plain('x').text} It was {ANSWER}. {plain('x', 10).text}", title="About gold")
OTHERS = tuple(plain(f"other{number}#0") for number in range(12))


def candidates(
    retrieved: Sequence[Passage] = (*OTHERS[:2], GOLD, *OTHERS[2:]), gold: Sequence[Passage] = (GOLD,), **more: Any
) -> Candidates:
    scores = tuple(float(len(retrieved) - place) for place in range(len(retrieved)))
    return Candidates(tuple(gold), tuple(retrieved), scores, **more)


def made(
    query: Query, found: Candidates | None = None, settings: config.Config = SETTINGS, **more: Any
) -> GeneratorExample:
    example = generator_example(query, found or candidates(), CHAT, settings, **more)
    assert isinstance(example, GeneratorExample)
    return example


def many(count: int, settings: config.Config = SETTINGS, found: Candidates | None = None) -> list[GeneratorExample]:
    return [made(question(f"question {number}"), found, settings) for number in range(count)]


def blocks(prompt: str) -> list[str]:
    """The numbered passages of a prompt."""
    numbered = prompt.partition("<user> ")[2].rpartition("\n\nQuestion: ")[0]
    found = re.split(r"(?:^|\n\n)\[\d+\] ", numbered)
    assert found[0] == ""
    return found[1:]


def is_fair(observed: Sequence[int], expected: Sequence[float]) -> bool:
    """Whether the counts fit the expectation: a chi-square test at the 0.1 % level."""
    limit = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}[len(observed) - 1]
    return sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True)) < limit


def is_share(count: int, total: int, share: float) -> bool:
    return abs(count - total * share) <= 3.5 * math.sqrt(total * share * (1 - share))


# --- holds_answer and positive_passage


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("It was Neil Armstrong.", ["Neil Armstrong"], True),
        ("It was NEIL\n  armstrong.", ["neil Armstrong "], True),
        ("Built in １８８９.", ["1889"], True),
        ("月球是地球的卫星。", ["地球的"], True),
        ("Aldrin came second.", ["Neil Armstrong", "Aldrin"], True),
        ("Straße", ["STRASSE"], True),
        ("Neil was there, and Armstrong.", ["Neil Armstrong"], False),
        ("Aldrin came second.", [], False),
        ("", ["x"], False),
    ],
)
def test_answers_match_regardless_of_case_width_and_spaces(text: str, answers: list[str], expected: bool) -> None:
    assert holds_answer(text, answers) is expected


A0, A1, B0, C0 = (
    passage(name, text) for name, text in (("a#0", "one"), ("a#1", "two"), ("b#0", "two"), ("c#0", "ten"))
)


@pytest.mark.parametrize(
    ("answers", "relevant", "gold", "retrieved", "expected"),
    [
        pytest.param(("two",), ("a", "b"), (A0, A1, B0), (B0, A0), A1, id="the first that holds the answer"),
        pytest.param(("no", "one"), ("a",), (A1, A0), (), A0, id="any of the answers"),
        pytest.param(("none",), ("a", "b"), (A0, A1, B0), (C0, B0, A1), B0, id="else the best retrieved"),
        pytest.param(None, ("a",), (A0, A1), (A1, A0), A1, id="the best retrieved, where answers are not known"),
        pytest.param(("none",), ("a",), (A0, A1), (C0,), A0, id="else the first"),
        pytest.param(("two",), ("gone",), (), (C0, B0), None, id="relevant, but not in the index"),
        pytest.param(("two",), (), (), (C0, B0, A1), B0, id="nothing judged: the best that holds the answer"),
        pytest.param(("none",), (), (), (C0, B0), None, id="nothing judged, no answer found"),
        pytest.param(None, (), (), (C0, B0), None, id="nothing known"),
    ],
)
def test_the_positive_is_the_passage_that_answers(
    answers: Any, relevant: Any, gold: Any, retrieved: Any, expected: Any
) -> None:
    assert positive_passage(question("q", answers, relevant), candidates(retrieved, gold)) == expected


def test_a_document_judged_irrelevant_is_not_a_positive() -> None:
    query = Query("q", "?", ("none",), ("a", "b"), (0.0, 1.0), "train")
    assert positive_passage(query, candidates((A0, B0), (B0,))) == B0


# --- Generator: complete answers


def assert_sound(example: GeneratorExample, max_tokens: int, chat: ChatText = CHAT, answer: str = ANSWER) -> None:
    """Check the properties of an example whose prompt shows the gold passage."""
    place = example.gold_place
    assert (example.kind, example.answer) == ("with_gold", f"{answer} [{place}]")
    assert example.passage_ids[place - 1] == GOLD.passage_id
    assert len(blocks(example.prompt)) == len(example.passage_ids)
    assert answer in blocks(example.prompt)[place - 1]
    assert [example.num_prompt_tokens, example.num_answer_tokens - 1] == chat.count_tokens(
        [example.prompt, example.answer]
    )
    assert example.num_prompt_tokens + example.num_answer_tokens <= max_tokens
    assert example.prompt.endswith("Question: Who set foot on it first? <assistant>")


@pytest.mark.parametrize("chat", [CHAT, ChatText(count_letters, render)], ids=["words", "letters"])
def test_the_full_answer_survives_at_every_length(chat: ChatText) -> None:
    longest = 12 * chat.count_tokens([GOLD.text])[0]
    kinds: Counter[str] = Counter()
    for max_tokens in range(32, longest, max(1, longest // 300)):
        settings = SETTINGS.using(f"training.max_tokens={max_tokens}", "prompt.max_tokens=100000", "retrieval.top_k=11")
        example = generator_example(question(f"q{max_tokens}"), candidates(), chat, settings)
        if isinstance(example, Reject):
            assert example.place == f"q{max_tokens}"
            assert f"training.max_tokens ({max_tokens})" in example.reason
            kinds[re.sub(r"\d+", "N", example.reason)[:19]] += 1
        else:
            assert_sound(example, max_tokens, chat)
            kinds[f"{len(example.passage_ids)} shown"] += 1
    assert set(kinds) == {
        "its answer takes N ",
        "the part of passage",
        *(f"{shown} shown" for shown in range(1, 12)),
    }


def test_a_follow_up_is_learnt_with_the_conversation_before_it() -> None:
    """The prompt of training is that of answering, so it shows the conversation, too."""
    said = (Message("system", "Be brief."), Message("user", "What is it?"), Message("assistant", "The Moon."))
    alone = generator_example(question(), candidates([GOLD]), CHAT, SETTINGS)
    example = generator_example(replace(question(), messages=said), candidates([GOLD]), CHAT, SETTINGS)
    assert isinstance(alone, GeneratorExample)
    assert isinstance(example, GeneratorExample)
    history = "<user> What is it? <assistant> The Moon. "
    shown = alone.prompt.replace(" <user>", f"\nBe brief. {history}<user>")
    assert example.prompt == shown
    assert (example.answer, example.passage_ids) == (alone.answer, alone.passage_ids)


SENTENCES = st.lists(st.sampled_from(["Dust.", "Far and wide.", "月球很大。", "A rover went there.\n\n"]), max_size=25)


@given(
    st.lists(SENTENCES, max_size=6),
    SENTENCES,
    SENTENCES,
    st.integers(32, 400),
    st.integers(64, 300),
    st.booleans(),
    st.integers(0, 99),
)
def test_an_example_is_sound_or_names_the_exceeded_limit(
    texts: Any, before: Any, after: Any, max_tokens: int, prompt_tokens: int, in_letters: bool, number: int
) -> None:
    chat = ChatText(count_letters if in_letters else count_spaced, render)
    gold = passage("gold#0", " ".join([*before, f"It was {ANSWER}.", *after]), title="About gold")
    shown = [passage(f"o{place}#0", " ".join(["Seen.", *text])) for place, text in enumerate(texts)]
    settings = SETTINGS.using(
        f"training.max_tokens={max_tokens}", f"prompt.max_tokens={prompt_tokens}", "prompt.system=Answer."
    )
    example = generator_example(question(f"q{number}"), candidates([*shown, gold], [gold]), chat, settings)
    if isinstance(example, Reject):
        assert f"training.max_tokens ({max_tokens})" in example.reason
        window = min(max_tokens - chat.count_tokens([f"{ANSWER} [1]"])[0] - 1, prompt_tokens)
        alone = render([("system", "Answer."), ("user", f"[1] About gold\n{gold.text}\n\nQuestion: {question().text}")])
        assert chat.count_tokens([alone])[0] + 6 > window, "the gold passage alone would have fit"
    else:
        assert_sound(example, max_tokens, chat)
        assert example.num_prompt_tokens <= prompt_tokens


def test_a_reject_names_the_exceeded_limit_and_the_remedy() -> None:
    settings = SETTINGS.using("training.max_tokens=90")
    example = generator_example(question(), candidates([GOLD]), CHAT, settings.using("training.max_tokens=70"))
    assert isinstance(example, Reject)
    assert example.kind == "row"
    assert "gold#0 that contains the answer does not fit the smaller of training.max_tokens (70)" in example.reason
    assert "prompt.max_tokens (1536)" in example.reason
    answer = " ".join(["long"] * 60)
    example = generator_example(question(answers=(answer,)), candidates([GOLD]), CHAT, settings)
    assert isinstance(example, Reject)
    assert example.reason.startswith(
        "its answer takes 62 of training.max_tokens (90): question and system prompt take "
    )


def test_answer_tokens_match_the_target_with_ten_or_more_passages() -> None:
    chat, settings = ChatText(count_letters, render), SETTINGS.using("retrieval.top_k=12", "training.max_tokens=8000")
    settings = settings.using("prompt.max_tokens=8000")
    lengths = {}
    for number in range(60):
        example = generator_example(question(f"q{number}"), candidates(), chat, settings)
        assert isinstance(example, GeneratorExample)
        assert_sound(example, 8000, chat)
        lengths[example.gold_place] = example.num_answer_tokens
    letters = len("NeilArmstrong")
    assert lengths == {place: letters + len(f"[{place}]") + 1 for place in range(1, 13)}


def test_the_answer_contained_in_the_prompt_becomes_the_target() -> None:
    answers = ("Neil Alden Armstrong", "Armstrong", ANSWER)
    example = made(question(answers=answers))
    assert example.answer == f"Armstrong [{example.gold_place}]"
    # The target wording must be in the prompt, not just any answer: here only the shorter one, at the start, fits.
    text = f"Armstrong went. {plain('x', 60).text} It was {ANSWER}."
    gold = passage("gold#0", text)
    settings = SETTINGS.using("training.max_tokens=90")
    assert made(question(answers=("Armstrong", ANSWER)), candidates([gold], [gold]), settings).answer == "Armstrong [1]"
    rejected = generator_example(question(answers=(ANSWER, "Armstrong")), candidates([gold], [gold]), CHAT, settings)
    assert isinstance(rejected, Reject)


def test_a_long_answer_leaves_its_prompt_less_room() -> None:
    short = made(question(), settings=SETTINGS.using("training.max_tokens=160"))
    longer = f"{ANSWER} {' '.join(['indeed'] * 40)}"
    gold = passage("gold#0", f"It was {longer}. {GOLD.text}")
    long = made(
        question(answers=(longer,)), candidates([*OTHERS, gold], [gold]), SETTINGS.using("training.max_tokens=160")
    )
    assert long.answer == f"{longer} [{long.gold_place}]"
    assert long.num_prompt_tokens + 44 <= 160
    assert longer in blocks(long.prompt)[long.gold_place - 1]
    assert len(long.passage_ids) < len(short.passage_ids)


# --- Generator: the mixture


def places_of(examples: list[GeneratorExample]) -> list[int]:
    counts = Counter(example.gold_place for example in examples)
    return [counts[place] for place in range(1, max(counts) + 1)]


@pytest.mark.parametrize("top_k", [2, 5])
def test_the_gold_passage_appears_at_every_place_equally_often(top_k: int) -> None:
    examples = many(1500, SETTINGS.using(f"retrieval.top_k={top_k}"))
    assert {len(example.passage_ids) for example in examples} == {top_k}
    places = places_of(examples)
    assert len(places) == top_k
    assert is_fair(places, [1500 / top_k] * top_k)


def test_gold_places_are_even_when_some_passages_do_not_fit() -> None:
    # All passages have the same size, so that exactly three fit; the answer is at the end of its passage.
    gold = passage("gold#0", f"{plain('x', 28).text} {ANSWER}", title="About gold")
    settings = SETTINGS.using("prompt.system=Answer.", "training.max_tokens=128", "training.passages=5")
    examples = many(1500, settings, candidates([*OTHERS, gold], [gold]))
    assert {len(example.passage_ids) for example in examples} == {3}
    assert is_fair(places_of(examples), [500] * 3)


def test_distractors_are_the_best_hits_that_do_not_answer() -> None:
    copy = passage("copy#0", f"As it is told, NEIL  ARMSTRONG was first. {OTHERS[0].text}")
    sibling = plain("gold#1")
    found = candidates([copy, OTHERS[3], sibling, OTHERS[1], GOLD, OTHERS[0], OTHERS[2], OTHERS[4]])
    for number in range(20):
        example = made(question(f"q{number}"), found, SETTINGS.using("training.passages=4"))
        assert set(example.passage_ids) == {"gold#0", "other3#0", "other1#0", "other0#0"}
    assert len(made(question(), found).passage_ids) == SETTINGS.retrieval.top_k == 5


def test_other_relevant_documents_are_not_distractors() -> None:
    second = plain("gold2#0")
    found = candidates([second, *OTHERS[:3], GOLD], [GOLD, second])
    assert set(made(question(relevant=("gold", "gold2")), found).passage_ids) == {
        "gold#0",
        *(row.passage_id for row in OTHERS[:3]),
    }


def test_a_gold_passage_is_shown_even_if_not_retrieved() -> None:
    example = made(question(), candidates(OTHERS))
    assert "gold#0" in example.passage_ids
    assert_sound(example, 1024)


@pytest.mark.parametrize(("left_out", "abstain"), [(0.1, 0.5), (0.4, 0.25), (0, 0.5), (1, 1), (1, 0), (0.6, 0.9)])
def test_shares_of_left_out_gold_and_abstentions_are_kept(left_out: float, abstain: float) -> None:
    settings = SETTINGS.using(f"training.gold_left_out_share={left_out}", f"training.abstain_share={abstain}")
    total = 1500
    kinds = Counter(example.kind for example in many(total, settings))
    without = kinds["without_gold"] + kinds["abstention"]
    assert kinds["with_gold"] + without == total
    assert is_share(without, total, left_out)
    assert is_share(kinds["abstention"], without, abstain)


def test_questions_sharing_a_gold_passage_show_the_same_distractors_in_order() -> None:
    settings = SETTINGS.using("training.distractors=passage")
    near = OTHERS[7:]
    shown: dict[str, set[tuple[str, ...]]] = {}
    for number in range(20):
        found = candidates(OTHERS[number % 5 : 7], neighbors=near)  # each question retrieves other passages
        for name, answers, left_out in (("gold", (ANSWER,), 0), ("none", (), 0), ("left out", (ANSWER,), 1)):
            chosen = settings.using(f"training.gold_left_out_share={left_out}")
            example = made(question(f"{name} {number}", answers), found, chosen)
            shown.setdefault(name, set()).add(example.passage_ids)
    (passages,) = shown["gold"]
    assert sorted(passages) == ["gold#0", *sorted(each.passage_id for each in near[:4])]
    assert shown["none"] == shown["gold"], "a question without an answer shows the same passages"
    (without,) = shown["left out"]
    assert sorted(without) == sorted(each.passage_id for each in near)


def test_the_shared_gold_place_is_drawn_per_passage() -> None:
    settings = SETTINGS.using("training.distractors=passage", "retrieval.top_k=2")
    places = Counter()
    for number in range(400):
        gold = passage(f"gold{number}#0", GOLD.text)
        found = candidates([gold], [gold], neighbors=OTHERS[:3])
        places[made(question("q", relevant=(f"gold{number}",)), found, settings).gold_place] += 1
    assert is_fair([places[1], places[2]], [200, 200])


def test_a_neighbor_with_the_answer_is_not_a_distractor() -> None:
    settings = SETTINGS.using("training.distractors=passage", "retrieval.top_k=2")
    found = candidates(neighbors=(passage("copy#0", GOLD.text), OTHERS[0]))
    assert set(made(question(), found, settings).passage_ids) == {"gold#0", OTHERS[0].passage_id}


def test_nothing_in_a_prompt_without_gold_answers() -> None:
    settings = SETTINGS.using("training.gold_left_out_share=1", "training.abstention=No idea.")
    copy = passage("copy#0", f"It was {ANSWER.upper()}.")
    found = candidates([copy, plain("gold#1"), GOLD, *OTHERS])
    answers = {"without_gold": ANSWER, "abstention": "No idea."}
    seen = Counter()
    orders = set()
    for example in many(60, settings, found):
        assert set(example.passage_ids) == {row.passage_id for row in OTHERS[:5]}
        assert ANSWER.lower() not in example.prompt.lower()
        assert (example.answer, example.gold_place) == (answers[example.kind], 0)
        assert example.num_answer_tokens == len(example.answer.split()) + 1
        seen[example.kind] += 1
        orders.add(example.passage_ids)
    assert seen.keys() == answers.keys()
    assert len(orders) > 20, "the order carries no information"


def test_an_example_without_a_positive_has_no_gold() -> None:
    kinds = Counter()
    for number in range(40):
        example = made(question(f"q{number}", relevant=()), candidates(OTHERS, ()))
        kinds[example.kind] += 1
        assert example.gold_place == 0
    assert kinds.keys() == {"without_gold", "abstention"}


def test_an_unanswerable_query_becomes_an_abstention_on_its_best_hits() -> None:
    orders = set()
    for number in range(40):
        example = made(question(f"q{number}", answers=()), settings=SETTINGS.using("training.abstention=No."))
        assert (example.kind, example.answer, example.gold_place) == ("abstention", "No.", 0)
        assert set(example.passage_ids) == {"other0#0", "other1#0", "gold#0", "other2#0", "other3#0"}
        orders.add(example.passage_ids)
    assert len(orders) > 20


def test_a_query_with_unknown_answers_is_rejected() -> None:
    for found in (candidates(), None):
        example = generator_example(question("q7", answers=None), found, CHAT, SETTINGS)
        assert example == Reject("q7", "has no answers to learn", "row")


def test_an_answer_without_citations_has_no_mark() -> None:
    example = made(question(), settings=SETTINGS.using("training.cite=false"))
    assert (example.answer, example.num_answer_tokens) == (ANSWER, 3)
    assert example.passage_ids[example.gold_place - 1] == "gold#0"


@pytest.mark.parametrize("kind", ["question_only", "replay", None])
@pytest.mark.parametrize(("answers", "expected"), [((ANSWER, "Armstrong"), ANSWER), ((), "I don't know.")])
def test_a_prompt_without_candidates_has_only_the_question(
    kind: ExampleKind | None, answers: Any, expected: str
) -> None:
    example = generator_example(question("q", answers), None, CHAT, SETTINGS, kind)
    system = SETTINGS.prompt.system_without_passages
    prompt = f"<system> {system} <user> Question: Who set foot on it first? <assistant>"
    assert example == GeneratorExample(
        query_id="q",
        kind=kind or "question_only",
        prompt=prompt,
        answer=expected,
        passage_ids=(),
        gold_place=0,
        num_prompt_tokens=len(prompt.split()),
        num_answer_tokens=len(expected.split()) + 1,
    )


def test_random_choices_depend_only_on_query_and_seed() -> None:
    settings = SETTINGS.using("training.gold_left_out_share=0.3")
    queries = [question(f"q{number}") for number in range(50)]
    forward = {query.query_id: made(query, settings=settings) for query in queries}
    backward = {query.query_id: made(query, settings=settings) for query in reversed(queries[::3])}
    assert {name: forward[name] for name in backward} == backward
    assert len({(example.kind, example.passage_ids) for example in forward.values()}) > 40
    reseeded = settings.using("seed=1")
    same = sum(made(query, settings=reseeded) == forward[query.query_id] for query in queries)
    assert same < 10


@given(st.integers(0, 10**5), st.floats(0, 0.95))
def test_replay_has_its_share_to_the_nearest_example(num_examples: int, share: float) -> None:
    count = replay_count(num_examples, share)
    assert abs(count - share * (num_examples + count)) <= 0.5 * (1 - share) + 1e-6


# --- Generator: same prompts as answering


class Asked:
    """A generator that only records its prompts."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return count_spaced(texts)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        return render(messages)

    def generate(self, given_prompts: Sequence[Prompt], **_: object) -> list[Completion]:
        self.prompts += given_prompts
        return [Completion("x", 0, 0, 0.0, "stop", "") for _ in given_prompts]


def asked(query: Query, shown: Sequence[Passage], settings: config.Config) -> str:
    """The prompt that answering builds for a query and its hits."""
    generator: Any = Asked()
    task = pipeline.Task(query, tuple(shown), (0.0,) * len(shown), "000001")
    (row,) = pipeline.answer_tasks([task], generator, settings, "")
    assert row.status == "ok", row.error
    (prompt,) = generator.prompts
    return render(prompt.messages)


@pytest.mark.parametrize("prompt_tokens", [1536, 120])
def test_training_prompts_equal_those_of_answering(prompt_tokens: int) -> None:
    settings = SETTINGS.using(
        "training.gold_left_out_share=0.5", "answer.arm=rag+ft", f"prompt.max_tokens={prompt_tokens}"
    )
    by_id = {row.passage_id: row for row in (GOLD, *OTHERS)}
    unanswerable = [question(f"u{number}", answers=()) for number in range(5)]
    kinds = Counter()
    for query in [*(question(f"q{number}") for number in range(40)), *unanswerable]:
        example = made(query, settings=settings)
        shown = [by_id[name] for name in example.passage_ids]
        assert example.prompt == asked(query, shown, settings)
        kinds[example.kind] += 1
    assert kinds.keys() == {"with_gold", "without_gold", "abstention"}


def test_prompts_equal_those_of_answering_when_nothing_is_retrieved() -> None:
    settings = SETTINGS.using("answer.arm=rag+ft")
    for query in (question(answers=()), question(relevant=())):
        example = made(query, candidates((), ()), settings)
        assert example.passage_ids == ()
        assert example.prompt == asked(query, [], settings)


def test_closed_book_training_prompts_equal_those_of_answering() -> None:
    example = generator_example(question(), None, CHAT, SETTINGS)
    assert isinstance(example, GeneratorExample)
    assert example.prompt == asked(question(), [], SETTINGS.using("answer.arm=ft"))


# --- Retriever

MARGIN = SETTINGS.using("training.negative_margin=0.05", "training.hard_negatives=4", "training.objective=contrastive")


# --- Joint examples


def test_a_joint_example_has_one_prompt_per_passage() -> None:
    shown = (OTHERS[0], GOLD)
    example = joint_example(question(answers=("N. Armstrong", ANSWER)), shown, CHAT, SETTINGS)
    assert isinstance(example, JointExample)
    assert example.answer == ANSWER
    assert example.passage_ids == ("other0#0", "gold#0")
    for prompt, shown_alone in zip(example.prompts, shown, strict=True):
        (block,) = blocks(prompt)
        assert shown_alone.text in block
    ends = 2 * (count_spaced([ANSWER])[0] + 1)
    assert example.num_tokens == sum(count_spaced(list(example.prompts))) + ends


@pytest.mark.parametrize(("answers", "passages"), [((), (GOLD,)), (None, (GOLD,)), ((ANSWER,), ())])
def test_joint_examples_need_an_answer_and_a_passage(answers: Any, passages: Sequence[Passage]) -> None:
    assert isinstance(joint_example(question(answers=answers), passages, CHAT, SETTINGS), Reject)


def learnt(query: Query, found: Candidates, settings: config.Config = MARGIN, **more: Any) -> RetrieverExample:
    example = retriever_example(query, found, settings, count_spaced, **more)
    assert isinstance(example, RetrieverExample)
    return example


def hits(*cosines: float) -> tuple[Passage, ...]:
    return tuple(plain(f"hit{number}#0", 5) for number in range(len(cosines)))


def test_hits_scoring_close_to_the_positive_are_not_negatives() -> None:
    cosines = (0.9, 0.8, 0.761, 0.759, 0.5, 0.4)  # the positive's is 0.8: 0.76 is 95% of it
    found = candidates(hits(*cosines), gold_cosines=(0.8,), retrieved_cosines=cosines)
    assert learnt(question(), found).passage_ids == ("gold#0", "hit3#0", "hit4#0", "hit5#0")
    wider = MARGIN.using("training.negative_margin=0.45")  # 0.44
    assert learnt(question(), found, wider).passage_ids == ("gold#0", "hit5#0")
    off = MARGIN.using("training.negative_margin=0")
    assert learnt(question(), found, off).passage_ids == ("gold#0", "hit0#0", "hit1#0", "hit2#0", "hit3#0")
    assert learnt(question(), found, off.using("training.hard_negatives=0")).passage_ids == ("gold#0",)


POOL = [
    passage(f"{document}#{number}", text)
    for document in "abcdef"
    for number, text in enumerate(
        ["Dust and more.", f"It was {ANSWER.upper()}, they say.", "A crater.", "Armstrong, Neil"]
    )
]


@given(st.data())
def test_negatives_are_all_provably_wrong_hits_hardest_first(data: Any) -> None:
    retrieved = data.draw(st.lists(st.sampled_from(POOL), max_size=16, unique=True))
    relevant = tuple(data.draw(st.lists(st.sampled_from("abcdef"), max_size=3, unique=True)))
    answers = data.draw(st.sampled_from([(ANSWER,), None, ("nobody", "armstrong, neil")]))
    gold = [row for name in relevant for row in POOL if row.document_id == name]
    cosine = {row.passage_id: data.draw(st.integers(-10, 100)) / 100 for row in {*retrieved, *gold}}
    margin, count = data.draw(st.sampled_from([0, 0.05, 0.5])), data.draw(st.integers(0, 6))
    settings = MARGIN.using(f"training.negative_margin={margin}", f"training.hard_negatives={count}")
    found = candidates(
        retrieved,
        gold,
        gold_cosines=tuple(cosine[row.passage_id] for row in gold),
        retrieved_cosines=tuple(cosine[row.passage_id] for row in retrieved),
    )
    query = question("q", answers, relevant)
    example = retriever_example(query, found, settings, count_spaced)
    if isinstance(example, Reject):
        assert not relevant
        assert not any(answer.lower() in row.text.lower() for answer in answers or () for row in retrieved)
        return
    positive = next(row for row in POOL if row.passage_id == example.passage_ids[0])
    assert positive.document_id in relevant or not relevant
    wrong = [
        row.passage_id
        for row in retrieved
        if row.document_id not in {*relevant, positive.document_id}
        and not any(answer.lower() in row.text.lower() for answer in answers or ())
        and (margin == 0 or cosine[row.passage_id] <= cosine[positive.passage_id] * (1 - margin))
    ]
    assert list(example.passage_ids[1:]) == wrong[:count]
    by_id = {row.passage_id: row.text for row in POOL}
    assert [by_id[name] for name in example.passage_ids] == list(example.passages)
    assert (example.query_id, example.query) == ("q", query.text)


def test_queries_without_an_answering_passage_are_rejected() -> None:
    for query in (question("q", ()), question("q", None, ()), question("q", ("nobody",), ())):
        found = candidates(OTHERS, (), retrieved_cosines=(0.1,) * len(OTHERS))
        assert retriever_example(query, found, MARGIN, count_spaced) == Reject(
            "q", "has no passage that answers it", "row"
        )
    unanswerable = candidates([GOLD], gold_cosines=(0.5,), retrieved_cosines=(0.5,))
    assert isinstance(retriever_example(question("q", ()), unanswerable, MARGIN, count_spaced), Reject)


@pytest.mark.parametrize("objective", ["contrastive", "distillation", "query_side"])
def test_num_tokens_counts_the_texts_to_encode(objective: str) -> None:
    found = candidates(hits(0.1, 0.2), gold_cosines=(0.8,), retrieved_cosines=(0.1, 0.2))
    example = learnt(question(), found, MARGIN.using(f"training.objective={objective}"))
    assert len(example.passages) == 3
    texts = [] if objective == "query_side" else list(example.passages)
    assert example.num_tokens == sum(len(text.split()) for text in [example.query, *texts])
    assert bool(example.teacher_scores) is (objective == "distillation")


DISTILLATION = MARGIN.using("training.objective=distillation", "training.negative_margin=0")


@pytest.mark.parametrize(
    ("raw", "scaled"),
    [
        ([2.0, 4.0, 3.0], (1.0, 1.0, 0.5)),
        ([9.0, -1.0, 4.0], (1.0, 0.0, 0.5)),
        ([-3.0, -2.0, -1.0], (1.0, 0.5, 1.0)),
        ([5.0, 5.0, 5.0], (1.0, 1.0, 1.0)),
    ],
)
def test_a_teacher_scores_all_passages_and_scores_are_scaled(raw: list[float], scaled: tuple[float, ...]) -> None:
    calls = []

    def teacher(query: str, texts: Sequence[str]) -> list[float]:
        calls.append((query, list(texts)))
        return raw

    found = candidates(hits(0.1, 0.2), gold_cosines=(0.8,), retrieved_cosines=(0.1, 0.2))
    example = learnt(question(), found, DISTILLATION, teacher=teacher)
    assert calls == [(question().text, list(example.passages))]
    assert example.teacher_scores == scaled


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_scaled_scores_keep_the_order_and_put_the_positive_on_top(raw: list[float]) -> None:
    cosines = (0.1,) * (len(raw) - 1)
    found = candidates(hits(*cosines), gold_cosines=(0.8,), retrieved_cosines=cosines)
    settings = DISTILLATION.using("training.hard_negatives=9")
    scores = learnt(question(), found, settings, teacher=lambda *_: raw).teacher_scores
    assert len(scores) == len(raw)
    assert scores[0] == max(scores) == 1
    assert min(scores) >= 0
    spread = max(raw) - min(raw)
    for given_score, score in zip(raw[1:], scores[1:], strict=True):
        assert score == pytest.approx((given_score - min(raw)) / spread if spread else 1)


def test_retrieval_scores_teach_when_there_is_no_teacher() -> None:
    shown = (*hits(0.1, 0.2), GOLD)
    found = Candidates((GOLD,), shown, (9.0, 5.0, 7.0), (0.8,), (0.1, 0.2, 0.8))
    example = learnt(question(), found, DISTILLATION)
    assert example.passage_ids == ("gold#0", "hit0#0", "hit1#0")
    assert example.teacher_scores == (1.0, 1.0, 0.0)
    # A positive that was not retrieved gets the lowest retrieval score, and is then raised to the top.
    found = Candidates((GOLD,), (*shown[:2], plain("hit2#0", 5)), (9.0, 5.0, 1.0), (0.8,), (0.1, 0.2, 0.3))
    example = learnt(question(), found, DISTILLATION)
    assert example.teacher_scores == (1.0, 1.0, 0.5, 0.0)


# --- reranker_example

HITS = (plain("hit1#0", 5), GOLD, plain("hit2#0", 10), passage("hit3#0", f"Also {ANSWER}."), plain("gold#1", 5))
RERANKED = Candidates((GOLD,), HITS, (8.0, 6.0, 4.0, 3.0, 2.0), (0.8,), (0.9, 0.8, 0.5, 0.5, 0.4))


def reranked(settings: config.Config = SETTINGS, **more: Any) -> RerankerExample | Reject:
    return reranker_example(question(), more.pop("found", RERANKED), settings, count_spaced, **more)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # hit1's cosine of .9 exceeds .95 * .8; hit3 contains the answer; gold#1 is of the positive's document.
        ("negative_margin=0.05", ("gold#0", "hit2#0")),
        ("negative_margin=0", ("gold#0", "hit1#0", "hit2#0")),
    ],
)
def test_a_reranker_learns_from_the_negatives_of_the_retriever(override: str, expected: tuple[str, ...]) -> None:
    settings = config.Config().using("training.objective=reranker", f"training.{override}")
    example = reranked(settings)
    contrasted = retriever_example(question(), RERANKED, settings, count_spaced)
    assert isinstance(example, RerankerExample)
    assert isinstance(contrasted, RetrieverExample)
    assert example.passage_ids == contrasted.passage_ids == expected
    score = dict(zip(("hit1#0", "gold#0", "hit2#0"), (1.0, 0.75, 0.5), strict=True))
    assert example.first_scores == tuple(score[name] for name in expected)
    words = dict(zip((hit.passage_id for hit in HITS), count_spaced([hit.text for hit in HITS]), strict=True))
    assert example.num_tokens == sum(6 + words[name] for name in expected)  # six words in the question


def test_validation_of_a_reranker_orders_all_hits_of_other_documents() -> None:
    example = reranked(ranks_hits=True)
    assert isinstance(example, RerankerExample)
    assert example.passage_ids == ("gold#0", "hit1#0", "hit2#0", "hit3#0")
    assert example.first_scores == (0.75, 1.0, 0.5, 0.375)


def test_a_positive_that_was_not_found_scores_as_the_last_hit() -> None:
    unfound = Candidates((GOLD,), (HITS[0], HITS[2]), (8.0, 4.0), (0.8,), (0.5, 0.5))
    example = reranked(found=unfound)
    assert isinstance(example, RerankerExample)
    assert example.first_scores == (0.5, 1.0, 0.5)
    rejected = reranked(found=unfound, ranks_hits=True)
    assert isinstance(rejected, Reject)
    assert rejected.reason == "its passage is not among the first 2 hits"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Candidates((GOLD,), (GOLD,), (8.0,), (0.8,), (0.8,)), "has no hit that does not answer it"),
        (Candidates((GOLD,), (), (), (0.8,), ()), "has no hit that does not answer it"),
        (Candidates((), (plain("hit1#0"),), (8.0,), (), (0.8,)), "has no passage that answers it"),
    ],
)
def test_a_query_without_two_sorts_of_passages_trains_no_reranker(found: Candidates, reason: str) -> None:
    rejected = reranked(found=found)
    assert isinstance(rejected, Reject)
    assert rejected.reason == reason
