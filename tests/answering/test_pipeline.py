"""Answering tasks with a scripted generator: rows, citations, failures, streams."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import pytest

from ragtune_ray import config, schema
from ragtune_ray.answering import prompts
from ragtune_ray.answering.pipeline import Task, answer_tasks, failed_answer, likeliest, task_prompt
from ragtune_ray.asking import stream_answer
from ragtune_ray.evaluation import scoring
from ragtune_ray.generation.interface import Completion, GeneratorError, Prompt


class Scripted:
    """Answers each question with its text in the script; a text that starts with "!" is an error. A token is a word."""

    def __init__(self, script: dict[str, str]) -> None:
        self.script = script
        self.seen: list[Prompt] = []
        self.arguments: dict[str, object] = {}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        return "\n".join(content for _, content in messages)

    def generate(self, given: Sequence[Prompt], **arguments: object) -> list[Completion]:
        self.seen += given
        self.arguments = arguments
        return [self._complete(prompt) for prompt in given]

    def stream(self, prompt: Prompt, **arguments: object) -> Iterator[str]:
        self.arguments = arguments
        yield from self._complete(prompt).text.partition(" ")

    def log_likelihood(self, given: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, int]]:
        raise NotImplementedError

    def _complete(self, prompt: Prompt) -> Completion:
        text = self.script[prompt.messages[-1][1].rpartition("Question: ")[2]]
        if text.startswith("!"):
            return Completion("", 3, 0, 0.0, "stop", text[1:])
        return Completion(text, 11, len(text.split()), 0.25, "stop", "")


SETTINGS = config.Config()


@pytest.fixture
def task_of(passages: list[schema.Passage]) -> Callable[..., Task]:
    def make(question: str, shown: Sequence[int] = (1, 3), error: str = "") -> Task:
        query = schema.Query(f"id of {question[:20]}", question, None, (), (), "all")
        chosen = tuple(passages[number] for number in shown)
        return Task(query, chosen, tuple(0.9 - 0.1 * n for n in range(len(chosen))), "000007", error)

    return make


def test_an_answer_has_its_citations_and_cost(task_of: Callable[..., Task], passages: list[schema.Passage]) -> None:
    generator = Scripted({"Who landed?": " Apollo 11 [1]. "})
    (row,) = answer_tasks([task_of("Who landed?")], generator, SETTINGS, "f1")
    moon = passages[1]
    assert row == schema.Answer(
        query_id="id of Who landed?",
        query="Who landed?",
        answer="Apollo 11.",
        citations=(schema.Citation("moon#1", "moon", moon.start, moon.end),),
        passage_ids=("moon#1", "mars#1"),
        scores=(0.9, 0.8),
        abstained=False,
        seconds=0.25,
        prompt_tokens=11,
        completion_tokens=3,
        status="ok",
        error="",
        index_version="000007",
        model="f1",
        cut=False,
        sentence_citations=(("moon#1",),),
    )
    assert passages[1].text in generator.seen[0].messages[1][1]
    assert generator.seen[0].messages[0] == ("system", SETTINGS.prompt.system)


def test_the_generator_gets_the_settings_of_the_config(task_of: Callable[..., Task]) -> None:
    settings = SETTINGS.using(
        "seed=5", "generator.max_new_tokens=7", "generator.temperature=0.5", "generator.stop=[END]", "answer.arm=base"
    )
    generator = Scripted({"q": "a"})
    answer_tasks([task_of("q", ())], generator, settings, "f1")
    expected = {"max_new_tokens": 7, "temperature": 0.5, "stop": ("END",), "seed": 5}
    assert generator.arguments == expected
    assert generator.seen[0].messages[0] == ("system", SETTINGS.prompt.system_without_passages)
    list(stream_answer(task_of("q", ()), generator, settings, "f1"))
    assert generator.arguments == expected


def test_the_prompt_shows_the_conversation_before_the_question(task_of: Callable[..., Task]) -> None:
    said = (schema.Message("system", "Be brief."), schema.Message("user", "Who?"), schema.Message("assistant", "Ada."))
    alone, broken, follow_up = task_of("q"), task_of("q", error="no index"), task_of("r")
    follow_up = dataclasses.replace(follow_up, query=dataclasses.replace(follow_up.query, messages=said))
    generator = Scripted({"q": "a", "r": "b"})
    rows = answer_tasks([alone, broken, follow_up], generator, SETTINGS, "f1")
    assert [row.answer for row in rows] == ["a", "", "b"]
    first, last = generator.seen
    assert [role for role, _ in first.messages] == ["system", "user"]
    assert last.messages[0] == ("system", f"{SETTINGS.prompt.system}\nBe brief.")
    assert last.messages[1:3] == (("user", "Who?"), ("assistant", "Ada."))
    assert last.messages[3][1].endswith("Question: r")
    assert last == task_prompt(follow_up, generator, SETTINGS), "as when it is asked alone"


def test_an_answer_without_marks_cites_the_sentence_that_contains_it(
    task_of: Callable[..., Task], passages: list[schema.Passage]
) -> None:
    generator = Scripted({"q": "Phobos and Deimos", "r": "Io and Europa"})
    held, not_held = answer_tasks([task_of("q"), task_of("r")], generator, SETTINGS, "f1")
    mars = passages[3]
    assert held.citations == (schema.Citation("mars#1", "mars", mars.start, mars.end),)
    assert not_held.citations == ()


class Cut(Scripted):
    """Ends every answer at the length limit."""

    def _complete(self, prompt: Prompt) -> Completion:
        return dataclasses.replace(super()._complete(prompt), finish="length")

    def stream(self, prompt: Prompt, **arguments: object) -> Iterator[str]:
        yield from super().stream(prompt, **arguments)
        return "length"


def test_the_unfinished_end_of_a_cut_answer_supports_nothing(task_of: Callable[..., Task]) -> None:
    whole = "Phobos and Deimos."
    script = {
        "a": "Phobos and",
        "b": f"{whole} Apollo 11 landed",
        "c": "Apollo 11 [1]. Mars [2",
        "d": "Apollo 11 [1][2",
    }
    tasks = [task_of(question) for question in script]
    rows = answer_tasks(tasks, Cut(script), SETTINGS, "f1")
    cited = [[citation.passage_id for citation in row.citations] for row in rows]
    assert cited == [[], ["mars#1"], ["moon#1"], ["moon#1"]]
    assert [row.answer for row in rows] == ["Phobos and", script["b"], "Apollo 11. Mars", "Apollo 11"]
    assert [row.cut for row in rows] == [True] * 4
    (uncut,) = answer_tasks(tasks[:1], Scripted(script), SETTINGS, "f1")
    assert (uncut.cut, [citation.passage_id for citation in uncut.citations]) == (False, ["mars#1"])
    *_, streamed = stream_answer(tasks[2], Cut(script), SETTINGS, "f1")
    assert isinstance(streamed, schema.Answer)
    assert (streamed.answer, streamed.cut) == ("Apollo 11. Mars", True)


def test_marks_take_precedence_over_matching_text(task_of: Callable[..., Task]) -> None:
    (row,) = answer_tasks([task_of("q")], Scripted({"q": "Phobos and Deimos [1][9]"}), SETTINGS, "f1")
    assert [citation.passage_id for citation in row.citations] == ["moon#1"]


@pytest.mark.parametrize(("text", "abstained"), [("I don't know.", True), ("In 1969.", False), ("", True)])
def test_abstentions_are_marked(task_of: Callable[..., Task], text: str, abstained: bool) -> None:
    (row,) = answer_tasks([task_of("q")], Scripted({"q": text}), SETTINGS, "f1")
    assert (row.abstained, row.status, row.answer) == (abstained, "ok", text)


def test_every_kind_of_failure_becomes_a_failed_row_in_place(task_of: Callable[..., Task]) -> None:
    too_long = "word " * 2000 + "?"
    tasks = [
        task_of("first"),
        task_of("lost", error="the index is gone"),
        task_of(too_long),
        task_of("second"),
        task_of("broken"),
        task_of("third", ()),
    ]
    generator = Scripted({"first": "1", "second": "2", "third": "3", "broken": "!CUDA is on fire"})
    rows = answer_tasks(tasks, generator, SETTINGS, "f1")
    assert [row.query_id for row in rows] == [task.query.query_id for task in tasks]
    assert [row.answer for row in rows] == ["1", "", "", "2", "", "3"]
    assert [row.status for row in rows] == ["ok", "failed", "failed", "ok", "failed", "ok"]
    assert rows[1].error == "the index is gone"
    assert "prompt.max_tokens is 1536" in rows[2].error
    assert rows[4].error == "CUDA is on fire"
    assert [row.passage_ids for row in rows][:2] == [("moon#1", "mars#1"), ()]
    assert rows[2] == failed_answer(tasks[2], rows[2].error, "f1")
    assert len(generator.seen) == 4, "tasks without a prompt are not generated"
    # A failure does not affect other rows.
    alone = answer_tasks([tasks[0], tasks[3], tasks[5]], generator, SETTINGS, "f1")
    assert [rows[0], rows[3], rows[5]] == alone


def test_answers_match_their_questions_if_some_retrievals_failed(task_of: Callable[..., Task]) -> None:
    tasks = [task_of("lost", error="gone"), task_of("first"), task_of("lost too", error="gone"), task_of("second")]
    generator = Scripted({"first": "1", "second": "2"})
    rows = answer_tasks(tasks, generator, SETTINGS, "f1")
    assert [(row.answer, row.error) for row in rows] == [("", "gone"), ("1", ""), ("", "gone"), ("2", "")]
    assert len(generator.seen) == 2


def test_if_all_tasks_failed_nothing_is_generated(task_of: Callable[..., Task]) -> None:
    generator = Scripted({})
    assert [row.error for row in answer_tasks([task_of("q", error="x")] * 2, generator, SETTINGS, "f1")] == ["x", "x"]
    assert answer_tasks([], generator, SETTINGS, "f1") == []
    assert generator.seen == []


def test_answers_name_only_passages_in_the_prompt(task_of: Callable[..., Task]) -> None:
    tight = SETTINGS.using("prompt.max_tokens=64", "prompt.system=Answer.")
    generator = Scripted({"q": "a [3]"})
    (row,) = answer_tasks([task_of("q", range(8))], generator, tight, "f1")
    assert 0 < len(row.passage_ids) < 8
    assert row.passage_ids == tuple(passage.passage_id for passage in generator.seen[0].passages)
    assert row.scores == tuple(0.9 - 0.1 * n for n in range(len(row.passage_ids)))


def read(text: str, log_probability: float, name: str, **changes: object) -> tuple[schema.Answer, float]:
    row = schema.Answer(
        "q", "?", text, (), (name,), (0.5,), False, 0.25, 10, 3, "ok", "", "1", "m", math.exp(log_probability / 3)
    )
    return dataclasses.replace(row, **changes), log_probability  # type: ignore[arg-type]  # changes of a test


def test_reading_apart_returns_the_likeliest_answer_with_all_costs() -> None:
    # By hand: "Mars" .49 / 1; "moon" .6 / 2 + .6 / 3 = .5, because "Moon." counts as the same answer as "moon".
    answers = [read("Mars", math.log(0.49), "a"), read("Moon.", math.log(0.6), "b"), read("moon", math.log(0.6), "c")]
    place, row = likeliest(answers, 1.0)
    assert (place, row.answer, row.confidence) == (1, "Moon.", pytest.approx(0.6 ** (1 / 3)))
    assert (row.passage_ids, row.scores) == (("a", "b", "c"), (0.5, 0.5, 0.5))
    assert (row.seconds, row.prompt_tokens, row.completion_tokens) == (0.75, 30, 9)
    assert likeliest([read("Mars", math.log(0.51), "a"), *answers[1:]], 1.0)[0] == 0
    assert likeliest(answers[:2], 1.0)[0] == 0, "a passage counts by the reciprocal of its rank"
    assert likeliest(answers[:2], 0.0)[0] == 1, "with weight 0 the rank does not count"
    # .6 / 2 ** w + .6 / 3 ** w falls below .2 between w = 2 (.217) and w = 3 (.097).
    low = [read("Mars", math.log(0.2), "a"), *answers[1:]]
    assert [likeliest(low, weight)[0] for weight in (2.0, 3.0)] == [1, 0]


def test_abstentions_and_failures_count_only_if_there_is_no_answer() -> None:
    silent = read("I don't know.", math.log(0.9), "a", abstained=True)
    failed = read("", -math.inf, "b", status="failed", error="too long", passage_ids=(), scores=())
    knows = read("Mars", math.log(0.01), "c")
    place, row = likeliest([silent, failed, knows], 1.0)
    assert (place, row.answer, row.passage_ids) == (2, "Mars", ("a", "c"))
    assert likeliest([silent, failed], 1.0)[1].abstained
    assert likeliest([failed, failed], 1.0)[1] == failed[0]
    assert likeliest([failed], 1.0) == (0, failed[0])
    assert likeliest([read("x", -2000.0, "a"), read("y", -1000.0, "b")], 1.0)[0] == 1, (
        "probabilities that underflow are still compared"
    )


def test_a_taught_abstention_counts_in_every_way_of_answering(task_of: Callable[..., Task]) -> None:
    class Reader(Scripted):
        def _complete(self, prompt: Prompt) -> Completion:
            made = super()._complete(prompt)
            knows = "1969" in prompt.passages[-1].text
            text, chance = ("1969", 0.1) if knows and len(prompt.passages) == 1 else (made.text, 0.9)
            return dataclasses.replace(made, text=text, log_probability=math.log(chance))

    generator = Reader({"When?": "non lo so [1]"})
    task = task_of("When?", shown=(3, 1))
    settings = SETTINGS.using("training.abstention=Non lo so.")
    (row,) = answer_tasks([task], generator, settings, "f1")
    *_, streamed = stream_answer(task, generator, settings, "f1")
    assert (row.answer, row.abstained) == ("non lo so", True)
    assert isinstance(streamed, schema.Answer)
    assert streamed.abstained
    unanswerable = dataclasses.replace(task.query, answers=())
    assert scoring.score_answers([unanswerable], [row], config.Evaluate())[row.query_id]["EM"] == 1
    assert scoring.score_abstention([unanswerable], [row])[row.query_id]["abstention_recall"] == 1
    (apart,) = answer_tasks([task], generator, settings.using("answer.reading=apart"), "f1")
    assert (apart.answer, apart.abstained) == ("1969", False), "an abstention does not outweigh an answer"
    (untaught,) = answer_tasks([task], generator, SETTINGS, "f1")
    assert not untaught.abstained


def test_a_taught_abstention_contained_in_a_passage_cites_nothing(task_of: Callable[..., Task]) -> None:
    generator = Scripted({"Who landed?": "Apollo 11"})
    for taught, cited in (("Apollo 11.", 0), ("Non lo so.", 1)):
        settings = SETTINGS.using(f"training.abstention={taught}")
        (row,) = answer_tasks([task_of("Who landed?")], generator, settings, "f1")
        assert len(row.citations) == cited


def test_reading_apart_prompts_each_passage_and_keeps_the_order(
    task_of: Callable[..., Task],
) -> None:
    class Reader(Scripted):
        def _complete(self, prompt: Prompt) -> Completion:
            (passage,) = prompt.passages
            made = super()._complete(prompt)
            return dataclasses.replace(
                made, text=f"{passage.passage_id} {made.text}", log_probability=odds[passage.passage_id]
            )

    tasks = [
        task_of("One?", (1, 3)),
        task_of("Two?", (3, 2, 1)),
        task_of("Lost?", error="gone"),
        task_of("Three?", (2,)),
    ]
    names = [[passage.passage_id for passage in task.passages] for task in tasks]
    odds = {names[0][0]: -3.0, names[0][1]: -1.0, names[1][1]: -9.0}
    generator = Reader({"One?": "1", "Two?": "2", "Three?": "3"})
    rows = answer_tasks(tasks, generator, SETTINGS.using("answer.reading=apart"), "m")
    assert [row.answer for row in rows] == [f"{names[0][1]} 1", f"{names[1][0]} 2", "", f"{names[3][0]} 3"]
    assert [row.status for row in rows] == ["ok", "ok", "failed", "ok"]
    assert [list(row.passage_ids) for row in rows] == [names[0], names[1], [], names[3]]
    assert [row.prompt_tokens for row in rows] == [22, 33, 0, 11]
    assert len(generator.seen) == 6


def test_streamed_pieces_concatenate_to_the_answer(task_of: Callable[..., Task]) -> None:
    generator = Scripted({"q": "Phobos and Deimos"})
    *pieces, row = stream_answer(task_of("q"), generator, SETTINGS, "f1")
    assert pieces == ["Phobos", " ", "and Deimos"]
    assert isinstance(row, schema.Answer)
    assert row.answer == "".join(str(piece) for piece in pieces)
    (bulk,) = answer_tasks([task_of("q")], generator, SETTINGS, "f1")
    measured = {"seconds": 0.0, "prompt_tokens": 0, "completion_tokens": 0}
    assert dataclasses.replace(row, **measured) == dataclasses.replace(bulk, **measured)
    assert row.completion_tokens == 3


def test_turns_that_the_template_refuses_fail_only_their_row(
    task_of: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Scripted({"fine": "yes"})

    def strict(messages: Sequence[tuple[str, str]]) -> str:
        if any("odd" in content for _, content in messages):
            raise GeneratorError("roles must alternate")
        return "\n".join(content for _, content in messages)

    monkeypatch.setattr(generator, "render", strict)
    odd, fine = answer_tasks([task_of("odd"), task_of("fine")], generator, SETTINGS, "f1")
    assert (odd.status, odd.error, fine.answer) == ("failed", "roles must alternate", "yes")


def test_a_question_too_long_to_stream_is_refused(task_of: Callable[..., Task]) -> None:
    with pytest.raises(prompts.PromptError, match=r"prompt\.max_tokens is 1536"):
        next(stream_answer(task_of("word " * 2000), Scripted({}), SETTINGS, "f1"))
