"""Grades are kept by content: what was written is read back, by any number of runs, and nothing damaged is believed."""

import json
import threading
from pathlib import Path

import pytest

from ragtune_ray.evaluation.grading import cache
from ragtune_ray.evaluation.grading.cache import Grades
from ragtune_ray.evaluation.grading.task import Grade, Task

IDENTITY = {"metric": "judge", "model": "m"}


def test_grades_are_read_back_and_failed_ones_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Grade({"judge": 0.5}, "half: “\u2028” of it\x85", "", 10, 3, 1)
    Grades(str(tmp_path), IDENTITY).write({"a": kept, "b": Grade(error="no answer in time")})
    assert Grades(str(tmp_path), IDENTITY).read() == {"a": kept}
    assert capsys.readouterr().err == ""
    assert Grades(str(tmp_path), {**IDENTITY, "model": "n"}).read() == {}
    assert json.loads((Path(Grades(str(tmp_path), IDENTITY).folder) / "identity.json").read_text()) == IDENTITY


def test_the_key_is_the_content() -> None:
    task = Task("Who?", ("me",), "you", ("text",), ("you",), ((0,),))
    assert task.key() == Task("Who?", ("me",), "you", ("text",), ("you",), ((0,),)).key()
    others = [
        Task("Who", ("me",), "you", ("text",), ("you",), ((0,),)),
        Task("Who?", ("me", ""), "you", ("text",), ("you",), ((0,),)),
        Task("Who?", ("me",), "me", ("text",), ("you",), ((0,),)),
        Task("Who?", ("me",), "you", ("texts",), ("you",), ((0,),)),
        Task("Who?", ("me",), "you", ("text",), ("y", "ou"), ((0,),)),
        Task("Who?", ("me",), "you", ("text",), ("you",), ((),)),
    ]
    assert len({task.key(), *(other.key() for other in others)}) == 7


def test_runs_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    def write(run: int) -> None:
        grades = Grades(str(tmp_path), IDENTITY)
        for number in range(20):
            grades.write({f"{run}-{number}": Grade({"judge": 1.0}, f"{run}"), "shared": Grade({"judge": 0.5})})

    threads = [threading.Thread(target=write, args=(run,)) for run in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Grades(str(tmp_path), IDENTITY).read()
    assert set(found) == {f"{run}-{number}" for run in range(4) for number in range(20)} | {"shared"}
    assert found["3-19"] == Grade({"judge": 1.0}, "3")


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": "b", "values": {"judge": 1.5}}',
        b'{"key": "b", "values": {"judge": NaN}}',
        b'{"key": "b", "values": {"judge": true}}',
        b'{"key": "b", "values": {}}',
        b'{"key": "b", "values": {"judge": 0.5}, "colour": 1}',
        b'{"key": "b", "valu',
        b"\xff\xfe",
        b"[]",
    ],
)
def test_a_damaged_line_is_counted_and_graded_again(
    tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    grades = Grades(str(tmp_path), IDENTITY)
    grades.write({"a": Grade({"judge": 1.0})})
    (file,) = Path(grades.folder).glob("*.jsonl")
    file.write_bytes(line + b"\n" + file.read_bytes())
    assert set(grades.read()) == {"a"}
    assert (
        f"1 lines in {grades.folder} are damaged and graded again; the first: {file.name}:1" in capsys.readouterr().err
    )


def test_the_folder_is_listed_once_however_many_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    list_names = cache.filesystem.list_names
    monkeypatch.setattr(cache.filesystem, "list_names", lambda folder: listed.append(folder) or list_names(folder))
    grades = Grades(str(tmp_path), IDENTITY)
    for number in range(5):
        grades.write({f"{number}": Grade({"judge": 1.0})})
    assert len(listed) == 1
    assert len(grades.read()) == 5
