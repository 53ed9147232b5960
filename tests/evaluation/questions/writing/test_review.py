"""Accepting, mending and rejecting questions: what is written, and that a review goes on where it stopped."""

import json
from pathlib import Path

import pytest

from ragtune_ray import schema
from ragtune_ray.cli.reviewing import review
from ragtune_ray.evaluation.questions.writing.review import Desk, ReviewError, open_desk
from ragtune_ray.evaluation.questions.writing.rows import QuestionRow, jsonl
from ragtune_ray.ingest.queries import read_queries
from ragtune_ray.storage import artifacts


def row(number: int, answers: tuple[str, ...] = ("secret",)) -> QuestionRow:
    return {
        "query_id": f"made-{number}", "text": f"Which word opens gate {number}?", "answers": list(answers),
        "document_ids": [f"d{number}"], "split": "test", "kind": "fact", "passage_ids": [f"d{number}#0"], "evidence": [],
        "rank": 1, "generator": "m", "prompt_version": 1,
    }  # fmt: skip


ROWS = [row(number) for number in range(5)]
PASSAGES = {
    f"d{number}#0": {"title": f"Gate {number}", "document_id": "d", "text": "It is secret."} for number in range(5)
}


def desk(path: Path, reviewer: str = "Ada") -> Desk:
    return Desk(ROWS, PASSAGES, path / "reviewed.jsonl", reviewer)


def queries(path: Path) -> list[schema.Query]:
    return [each for each in read_queries(str(path / "reviewed.jsonl")) if isinstance(each, schema.Query)]


def test_accepted_and_mended_questions_are_a_valid_file_of_queries(tmp_path: Path) -> None:
    given = desk(tmp_path)
    given.decide(0, "accepted")
    given.decide(1, "rejected")
    given.decide(2, "mended", "Which word opens the second gate?", ["secret", " open ", ""])
    assert given.counts() == {"accepted": 1, "mended": 1, "rejected": 1}
    assert [(each.query_id, each.text, each.answers) for each in queries(tmp_path)] == [
        ("made-0", "Which word opens gate 0?", ("secret",)),
        ("made-2", "Which word opens the second gate?", ("secret", "open")),
    ]
    lines = [json.loads(line) for line in (tmp_path / "reviewed.jsonl").read_text().splitlines()]
    assert [line["review"]["reviewer"] for line in lines] == ["Ada", "Ada"]
    assert lines[1]["review"]["time"].endswith("Z")


def test_a_review_goes_on_where_it_stopped_and_a_later_decision_counts(tmp_path: Path) -> None:
    desk(tmp_path).decide(0, "accepted")
    with (tmp_path / "reviewed.decisions.jsonl").open("a") as file:
        file.write('{"query_id": "made-1", "verd')  # killed while it wrote
    again = desk(tmp_path, "Bob")
    assert (again.num_done(), again.next_place(), again.next_place({1})) == (1, 1, 2)
    again.decide(0, "rejected")
    again.decide(1, "accepted")
    assert [each.query_id for each in queries(tmp_path)] == ["made-1"]
    assert desk(tmp_path).counts() == {"accepted": 1, "mended": 0, "rejected": 1}
    for place in (2, 3, 4):
        again.decide(place, "rejected")
    assert again.next_place() is None


def test_a_line_that_was_cut_in_a_letter_is_asked_for_again(tmp_path: Path) -> None:
    given = desk(tmp_path)
    given.decide(0, "accepted")
    given.decide(1, "mended", "哪个词打开第二扇门？", ["秘密"])
    log = tmp_path / "reviewed.decisions.jsonl"
    content = log.read_bytes()
    cut = content.index("秘".encode()) + 1
    log.write_bytes(content[:cut])
    again = desk(tmp_path)
    assert (again.num_done(), again.next_place()) == (1, 1)
    torn = tmp_path / "reviewed.decisions.jsonl.torn"
    assert torn.read_bytes() == content[content.index(b"\n") + 1 : cut] + b"\n", "byte for byte"
    again.decide(1, "rejected")
    assert desk(tmp_path).counts() == {"accepted": 1, "mended": 0, "rejected": 1}


def test_questions_of_other_runs_and_other_people_stay(tmp_path: Path) -> None:
    desk(tmp_path).decide(0, "accepted")
    other = Desk([{**row(9), "query_id": "other-9"}], {}, tmp_path / "reviewed.jsonl", "Bob")
    other.write()
    assert [each.query_id for each in queries(tmp_path)] == ["made-0"]
    other.decide(0, "accepted")
    ada, bob = desk(tmp_path), desk(tmp_path, "Bob")  # at the same time
    ada.decide(1, "accepted")
    bob.decide(2, "accepted")
    ada.decide(0, "rejected")
    assert [each.query_id for each in queries(tmp_path)] == ["other-9", "made-1", "made-2"]


def test_a_file_that_no_review_wrote_is_not_replaced(tmp_path: Path) -> None:
    own = tmp_path / "reviewed.jsonl"
    own.write_text('{"query_id": "own", "text": "Who?", "answers": ["me"]}\n')
    with pytest.raises(ReviewError, match=r"was not written by a review.*--output"):
        desk(tmp_path)
    assert "own" in own.read_text()


def test_line_separators_of_other_kinds_are_text(tmp_path: Path) -> None:
    mark = "begin \u2028 \u2029 \x85 end"
    folder = artifacts.stage(str(tmp_path / "run"))
    (folder / "questions.jsonl").write_text(jsonl([{**row(0), "text": f"What{mark}?"}]), encoding="utf-8")
    passage = {**PASSAGES["d0#0"], "passage_id": "d0#0", "text": mark}
    (folder / "passages.jsonl").write_text(json.dumps(passage, ensure_ascii=False) + "\n", encoding="utf-8")
    artifacts.publish(folder, str(tmp_path / "run"), "questions")
    given = open_desk(str(tmp_path / "run"), tmp_path / "reviewed.jsonl", "Ada")
    assert (given.questions[0]["text"], given.passages["d0#0"]["text"]) == (f"What{mark}?", mark)
    given.decide(0, "mended", f"Which{mark}?", [mark])
    again = open_desk(str(tmp_path / "run"), tmp_path / "reviewed.jsonl", "Ada")
    assert again.words_at(0) == (f"Which{mark}?", (mark,))
    assert queries(tmp_path)[0].text == f"Which{mark}?"


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    given = desk(tmp_path)
    with pytest.raises(ReviewError, match="empty query"):
        given.decide(0, "mended", "  ", ["x"])
    with pytest.raises(ReviewError, match="there are 5 questions"):
        given.decide(5, "accepted")
    with pytest.raises(ReviewError, match=r"written as \.jsonl"):
        Desk(ROWS, PASSAGES, tmp_path / "reviewed.txt", "Ada")
    (tmp_path / "reviewed.decisions.jsonl").write_text('{"query_id": 1}\n{"query_id": 2}\n')
    with pytest.raises(ReviewError, match=r"decisions\.jsonl:1: is damaged"):
        desk(tmp_path)


def test_the_terminal_accepts_mends_rejects_skips_and_goes_back(tmp_path: Path) -> None:
    keys = iter(["x", "a", "s", "m", "Which word opens the third gate?", "", "b", "r", "r", "a", "q"])
    shown: list[str] = []
    given = desk(tmp_path)
    review(given, lambda _: next(keys), shown.append)
    # 0 accepted, 1 skipped, 2 mended and then, after going back, rejected, 3 rejected, 4 accepted; then 1 comes last.
    assert [each.verdict if (each := given.decision_at(place)) else None for place in range(5)] == [
        "accepted", None, "rejected", "rejected", "accepted",
    ]  # fmt: skip
    assert any("press one of" in line for line in shown)
    assert "Evidence" not in "".join(shown)
    assert shown.count("It is secret.") >= 5


def test_the_terminal_mends_what_was_mended_before(tmp_path: Path) -> None:
    keys = iter(["m", "Which word opens the gate?", "", "b", "m", "", "open sesame", "q"])
    asked: list[str] = []
    given = desk(tmp_path)

    def read(prompt: str) -> str:
        asked.append(prompt)
        return next(keys)

    review(given, read, lambda _: None)
    assert given.words_at(0) == ("Which word opens the gate?", ("open sesame",))
    assert "Question [Which word opens the gate?]: " in asked
