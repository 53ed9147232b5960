"""Questions from a scripted server: every kind of bad question is thrown out for its reason, the good ones are kept."""

import dataclasses
import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.config.evaluation import QuestionKind, Questions
from ragtune_ray.evaluation.questions.writing import rows
from ragtune_ray.evaluation.questions.writing.drawing import Seed
from ragtune_ray.evaluation.questions.writing.making import Maker, Outcome
from ragtune_ray.evaluation.questions.writing.selection import select
from ragtune_ray.generation.openai_client import OpenAIGenerator
from ragtune_ray.models import weights
from ragtune_ray.schema import Passage
from tests.support.openai_server import Server, transformers_server


def passage(number: int) -> Passage:
    text = (
        f"The harbor code of vessel{number} is secret{number} since May.\nIt waits \u201cbelow the old crane\u201d for the tide. "
        f"Its captain likes tea, and the cargo of stones{number} is heavy, so the crew rests on Sundays."
    )
    return Passage(f"d{number}#0", f"d{number}", text, f"Vessel {number}", "{}", 100, 100 + len(text))


PASSAGES = {f"d{number}#0": passage(number) for number in range(30)}


def fact(number: int, **changes: Any) -> str:
    value = {
        "question": f"Which word must visitors of vessel{number} say?",
        "answer": f"secret{number}",
        "evidence": [f"The harbor code of vessel{number} is secret{number} since May."],
    }
    return json.dumps({**value, **changes})


def long_answer(number: int) -> str:
    answer = f"The cargo of stones{number} is heavy. The crew therefore rests on every Sunday."
    quoted = f"the cargo of stones{number} is heavy, so the crew rests on Sundays."
    return fact(number, question=f"Why does the crew of vessel{number} take breaks?", answer=answer, evidence=[quoted])


WRITTEN: dict[int, Any] = {
    0: fact(0),
    1: "Here is a question: which word?",
    2: "prose, and JSON when asked again",
    3: fact(3, question="Why must visitors of vessel3 say secret3 there?"),
    4: fact(4, question="The harbor code of vessel4 is which since May?"),
    5: fact(5, question="Does vessel5 have a word for visitors?", answer="Yes"),
    6: fact(6, question="What word for vessel6 does the passage mention?"),
    7: fact(7, evidence=["The harbor code of vessel7 is Secret7 since May."]),
    8: fact(8),
    9: fact(9),
    11: fact(11, answer="secret0"),
    12: (400, {}, '{"error": {"message": "the content is blocked"}}'),
    13: json.dumps({"question": "How many sailors work aboard vessel13 in winter?"}),
    14: json.dumps({"question": "What does the captain of vessel14 drink?"}),
    15: long_answer(15),
    16: json.dumps({
        "question": "Which word opens vessel16, and which vessel17?", "answer": "secret16 and secret17",
        "evidence": ["The harbor code of vessel16 is secret16 since May.", "The harbor code of vessel17 is secret17 since May."],
    }),
    18: json.dumps({
        "question": "Which word opens vessel18 but not vessel19?", "answer": "secret18",
        "evidence": ["The harbor code of vessel18 is secret18 since May."],
    }),
    20: json.dumps({
        "first_question": "What does the captain of vessel20 drink?", "first_answer": "Tea", "question": "And where does it wait?",
        "standalone": "Where does vessel20 wait for high water?", "answer": "below the old crane",
        "evidence": ['It waits "below the old crane" for the tide.'],
    }),
    21: fact(21, question="Visitors of vessel21 must say a word."),
    22: fact(22, question="The word?"),
    23: json.dumps({"question": "Which word must visitors of vessel23 say?", "answer": 23}),
}  # fmt: skip
ANSWERS = {
    13: "I don't know.",
    14: "Tea.",
    8: "secret8",
    9: "rum",
    15: "Its cargo of stones15 is heavy; the crew rests on Sundays.",
}


def reply(body: dict[str, Any]) -> Any:
    """The scripted model: writes, answers from its own knowledge, and answers from passages."""
    system, last = body["messages"][0]["content"], body["messages"][-1]["content"]
    if "your own knowledge" in system:
        return "It is secret8." if "vessel8 " in last else "I don't know."
    if "passages alone" in system:
        asked = [int(number) for number in re.findall(r"vessel(\d+)", last.rpartition("\n")[2])]
        if not asked:
            return "Below the old crane."
        return ANSWERS.get(asked[0], " and ".join(f"secret{number}" for number in asked))
    if last.startswith("That cannot be used"):
        number = int(re.findall(r"vessel(\d+)", body["messages"][3]["content"])[0])
        return fact(2) if number == 2 else WRITTEN[number]
    return WRITTEN[int(re.findall(r"vessel(\d+)", last)[0])]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.finish, server.reply = "stop", reply
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class Searcher:
    """Finds the passages of the vessels that a question names, after another one."""

    def retrieve_passages(self, texts: Sequence[str], top_k: int) -> list[tuple[list[Passage], list[float]]]:
        named = [[PASSAGES[f"d{number}#0"] for number in re.findall(r"vessel(\d+)", text)] for text in texts]
        return [([PASSAGES["d29#0"], *found][:top_k], [1.0] * min(top_k, 1 + len(found))) for found in named]


def seed(number: int) -> Seed:
    kinds: dict[int, QuestionKind] = {
        13: "unanswerable", 14: "unanswerable", 15: "sentences", 16: "comparison", 18: "comparison", 20: "follow_up",
    }  # fmt: skip
    kind = kinds.get(number, "fact")
    names = (f"d{number}#0", f"d{number + 1}#0") if kind == "comparison" else (f"d{number}#0",)
    return Seed(kind, names)


@pytest.fixture
def settings(server: Server) -> config.Config:
    return config.Config().using(
        "generator.engine=openai", f"generator.base_url={server.base_url}", "generator.model=scripted", "retrieval.top_k=2",
        "questions.max_attempts=3",
    )  # fmt: skip


def made(settings: config.Config) -> dict[int, Outcome]:
    generator = OpenAIGenerator(settings.generator.base_url, "scripted", api_key_env="RAGTUNE_NO_KEY", concurrency=4)
    outcomes = Maker(settings, generator, Searcher()).make([seed(number) for number in WRITTEN], PASSAGES)
    return dict(zip(WRITTEN, outcomes, strict=True))


def test_every_bad_question_is_thrown_out_for_its_reason(settings: config.Config, server: Server) -> None:
    found = made(settings)
    assert {number: outcome.reason for number, outcome in found.items() if outcome.reason} == {
        1: "malformed reply",
        3: "gives its answer away",
        4: "copies the passage",
        5: "yes or no",
        6: "points at the passage",
        7: "evidence is not in the passage",
        8: "answered without the passage",
        9: "not answered from the passage",
        11: "answer is not in the passage",
        12: "request failed",
        14: "answered by other documents",
        18: "evidence is from one passage",
        21: "not a question",
        22: "too short",
        23: "malformed reply",
    }
    assert (found[1].malformed, found[1].requests) == (3, 3)
    assert (found[2].malformed, found[2].requests) == (1, 4), "two to write it, and one for each check"
    assert '"evidence" must be a list' in found[23].detail
    assert "the content is blocked" in found[12].detail
    assert (found[9].detail, found[14].detail) == ("rum", "Tea.")
    assert found[0].rank == 2
    assert sum(outcome.requests for outcome in found.values()) == len(server.requests)


def test_evidence_has_its_place_in_the_document(settings: config.Config) -> None:
    found = made(settings)
    for number in (0, 15, 16, 20):
        kept = rows.row_of(found[number], "q", "train", PASSAGES, "scripted")
        for span in kept["evidence"]:
            assert span["text"] == PASSAGES[span["passage_id"]].text[span["start"] - 100 : span["end"] - 100]
    follow_up = rows.row_of(found[20], "q", "train", PASSAGES, "scripted")
    assert follow_up["evidence"][0]["text"] == "It waits \u201cbelow the old crane\u201d for the tide."
    assert [each["role"] for each in follow_up["messages"]] == ["user", "assistant"]
    assert rows.row_of(found[13], "q", "train", PASSAGES, "scripted")["answers"] == []
    assert rows.row_of(found[16], "q", "train", PASSAGES, "scripted")["document_ids"] == ["d16", "d17"]


def test_repeats_and_too_many_about_a_document_are_left_out(settings: config.Config) -> None:
    outcomes = made(settings)
    alike = rows.loaded(rows.dumped(outcomes[0]))
    assert alike == outcomes[0], "an outcome survives its file"
    assert alike.draft is not None
    other_words = dataclasses.replace(
        alike, draft=dataclasses.replace(alike.draft, question="Which word must the visitors of vessel0 say there?")
    )
    other_answer = dataclasses.replace(other_words, draft=dataclasses.replace(other_words.draft, answer="tea"))

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.stack([np.eye(3, dtype=np.float32)[0 if "vessel0" in text else 1] for text in texts])

    rule = Questions(per_document=2)
    wanted: dict[QuestionKind, int] = {"fact": 3, "sentences": 1}
    given = [outcomes[0], alike, other_words, other_answer, outcomes[2], outcomes[15], outcomes[15], outcomes[13]]
    chosen = select(given, wanted, rule, "en", "strict", encode)
    assert [outcome.draft.answer for outcome in chosen.kept if outcome.draft] == [
        "secret0", "tea", "secret2", outcomes[15].draft.answer if outcomes[15].draft else "",
    ]  # fmt: skip
    assert chosen.counts() == {"duplicate": 2, "near duplicate": 1, "not needed": 1}
    few = select(given, wanted, Questions(per_document=1), "en", "strict", encode)
    assert few.counts()["enough about its document"] == 1


@pytest.mark.slow
def test_a_real_server_with_the_embedded_model_writes_or_is_counted(settings: config.Config, tmp_path: Path) -> None:
    """The model of 135 million parameters mostly fails: every failure has its reason, and none stops the others."""
    directory = weights.resolve("SmolLM2-135M-Instruct").directory
    assert directory is not None
    limits = ["questions.max_new_tokens=48", "questions.max_attempts=2"]
    with transformers_server(directory, tmp_path / "server.log") as base_url:
        generator = OpenAIGenerator(base_url, str(directory), api_key_env="RAGTUNE_NO_KEY", timeout_seconds=120)
        kinds: tuple[QuestionKind, ...] = ("fact", "unanswerable")
        seeds = [Seed(kind, ("d0#0",)) for kind in kinds]
        outcomes = Maker(settings.using(*limits), generator, Searcher()).make(seeds, PASSAGES)
    assert [outcome.seed for outcome in outcomes] == seeds
    for outcome in outcomes:
        assert outcome.reason not in ("request failed", "check failed"), outcome.detail
        assert outcome.prompt_tokens > 0
        assert outcome.requests >= 1
        assert (outcome.draft is None) == (outcome.reason == "malformed reply")
        assert outcome.malformed == (2 if outcome.draft is None else outcome.malformed) <= 2
