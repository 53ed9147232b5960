"""The file of labels: what counts, what is refused by line, and what a crash leaves."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.evaluation.labelling import labels
from ragtune_ray.evaluation.labelling.labels import Label, LabelError

TIME = "2026-11-30T12:00:00Z"


def label(answer: str = "Yes.", grade: float = 1.0, labeller: str = "ann", query_id: str = "q1") -> Label:
    return Label(query_id, "Is it?", answer, grade, labeller, TIME)


def test_labels_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "versioned" / "labels.jsonl"
    given = [label(), label('嫦娥 \N{SNOWMAN}\n"quoted" \ud800', 0.5)]
    labels.append(path, given[:1])
    labels.append(path, given[1:])
    assert labels.read(str(path)) == labels.Labels(tuple(given), path=str(path))
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == dataclasses.asdict(given[0])
    assert "嫦娥" in second, "a person can read the file"
    assert labels.read(str(tmp_path / "none.jsonl")).rows == ()


def test_the_last_label_of_a_person_counts_and_people_are_averaged() -> None:
    given = labels.Labels((label(grade=0.0), label(grade=1.0, labeller="bob"), label(grade=0.5), label("No.", 0.0)))
    assert given.grades() == {("q1", "Is it?", "Yes."): 0.75, ("q1", "Is it?", "No."): 0.0}
    changed = labels.Labels((*given.rows, label(grade=0.5)))
    assert changed.identity() == given.identity(), "the same grade again changes nothing"
    assert labels.Labels(given.rows[::-1]).identity() != given.identity(), "another label is the last one"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "this is no JSON object"),
        (b"[1]", "this is no JSON object"),
        (b"\xff\xfe\xfd", "this is no JSON object"),
        (b'{"query_id": 1, "answer": "a", "grade": 1}', "query_id must be a text"),
        (b'{"query_id": "q", "grade": 1}', "answer must be a text"),
        (b'{"query_id": "q", "answer": "a", "grade": true}', "grade True is none of 0, 0.5 and 1"),
        (b'{"query_id": "q", "answer": "a", "grade": "right"}', "grade right is none of 0, 0.5 and 1"),
        (b'{"query_id": "q", "answer": "a", "grade": [1]}', "grade [1] is none of 0, 0.5 and 1"),
        (b'{"query_id": "q", "answer": "a", "grade": NaN}', "grade nan is none of 0, 0.5 and 1"),
    ],
)
def test_a_line_that_is_no_label_is_named(line: bytes, reason: str) -> None:
    good = json.dumps(dataclasses.asdict(label())).encode()
    found = labels.parse(b"\n".join([good, line, good, b""]))
    assert found == labels.Labels((label(), label()), (f"line 2: {reason}",))


def test_a_torn_last_line_is_kept_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    labels.append(path, [label(), label("No.", 0.0)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert labels.read(str(path)).rejects == ("line 2: this is no JSON object",)
    assert "labels.jsonl.torn; give this label again" in labels.mend(path)
    assert labels.read(str(path)) == labels.Labels((label(),), path=str(path))
    first = len(whole.splitlines(keepends=True)[0])
    assert (tmp_path / "labels.jsonl.torn").read_bytes() == whole[first:-9] + b"\n"
    assert labels.mend(path) == "", "once is enough"
    path.write_bytes(whole[:-1])
    assert labels.mend(path) == ""
    assert path.read_bytes() == whole, "a line that lacks only its end is a label"
    assert labels.mend(tmp_path / "none.jsonl") == ""


def test_two_labellers_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"

    def work(name: str) -> None:
        for number in range(50):
            labels.append(path, [label(f"{number} " * 500, 1.0, name), label(str(number), 0.0, name)])

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = labels.read(str(path))
    assert (len(found.rows), found.rejects) == (200, ())


def test_labels_are_found_by_question_and_text() -> None:
    texts = {"base": {"q1": "No.", "q2": "No."}, "rag": {"q1": "Yes.", "q2": "Maybe."}}
    answers = {arm: {name: (name, "Is it?", text) for name, text in each.items()} for arm, each in texts.items()}
    given = labels.Labels((label(), label("No.", 0.0), label("No.", 1.0, query_id="q2"), label("Other run.", 1.0)))
    found = labels.of_arms(answers, given)
    assert found == {"base": {"q1": 0.0, "q2": 1.0}, "rag": {"q1": 1.0}}
    assert labels.shared(found) == ["q1"]
    assert labels.num_others(answers, given) == 1
    assert labels.shared({}) == []


def test_a_label_of_another_question_with_the_same_id_does_not_count() -> None:
    answers = {"base": {"q1": ("q1", "Is it not?", "Yes.")}}
    given = labels.Labels((label(), label(grade=0.5, labeller="bob")))
    assert labels.of_arms(answers, given) == {"base": {}}
    assert labels.num_others(answers, given) == 1
    both = labels.Labels((dataclasses.replace(label(grade=0.0), query="Is it not?"), *given.rows))
    assert labels.of_arms(answers, both) == {"base": {"q1": 0.0}}, "the later label is of another question"
    assert both.identity() != given.identity()
    written_by_hand = labels.Labels((dataclasses.replace(label(), query=""),)).with_questions({"q1": "Is it not?"})
    assert labels.of_arms(answers, written_by_hand) == {"base": {"q1": 1.0}}, (
        "a label without its question counts by the id"
    )


def test_the_file_is_in_the_workspace_unless_the_config_names_one() -> None:
    assert labels.path_of(config.Config(workspace="s3://bucket/w")) == "s3://bucket/w/labels.jsonl"
    with pytest.raises(LabelError, match="appended to a local file"):
        labels.local_path("s3://bucket/w/labels.jsonl")
    settings = config.Config().with_values({"evaluate.labels_path": "graded/labels.jsonl"})
    assert labels.path_of(settings) == "graded/labels.jsonl"
    assert "labels_path" not in settings.evaluate.identity(), "labels change no run of evaluate"
