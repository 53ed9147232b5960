"""The ledger: finished steps are not repeated, lines are only appended, damage is located."""

import json
from pathlib import Path

import pytest

from ragtune_ray.tuning.ledger import Ledger, LedgerError, ledger_lines


def test_a_step_runs_once_and_later_runs_reuse_its_facts(tmp_path: Path) -> None:
    url = str(tmp_path / "rounds" / "ledger.jsonl")
    done: list[str] = []

    def work(name: str) -> dict[str, object]:
        done.append(name)
        return {"path": name, "pair": ("a", "b")}

    first = Ledger(url)
    given = first.step(1, "answered", lambda: work("one"))
    assert first.step(1, "answered", lambda: work("again")) == given
    before = Path(url).read_text()
    second = Ledger(url)
    assert second.step(1, "answered", lambda: work("again")) == given
    assert given["pair"] == ["a", "b"], "a list, as after reading JSON, even in the run that wrote it"
    second.step(2, "answered", lambda: work("two"))
    assert done == ["one", "two"]
    assert Path(url).read_text().startswith(before)
    assert [json.loads(line)["path"] for line in Path(url).read_text().splitlines()] == ["one", "two"]


def test_a_step_that_fails_leaves_no_line(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.jsonl"))

    def fails() -> dict[str, object]:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        ledger.step(1, "trained", fails)
    assert not (tmp_path / "ledger.jsonl").exists()
    assert ledger.step(1, "trained", lambda: {"model": "m"})["model"] == "m"


@pytest.mark.parametrize("line", ['{"round": 1, "st', "[]", '{"round": 1, "seconds": 2}', "null"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"round": 1, "step": "answered", "seconds": 1}\n' + line + "\n")
    with pytest.raises(LedgerError, match=r"ledger.jsonl:2: not a step"):
        Ledger(str(path))


def test_a_verdict_counts_the_seconds_of_its_steps() -> None:
    facts = {"component": "retriever", "num_examples": 7, "metric": "MRR@10", "before": 0.5, "after": 0.25}
    facts |= {"low": -0.5, "high": -0.1, "accepted": False, "reason": "a loss"}
    rows = [
        {"round": 1, "step": "answered", "seconds": 100.0},
        {"round": 1, "step": "retriever trained", "components": ["retriever"], "seconds": 10.0},
        {
            "round": 1,
            "step": "retriever and generator trained",
            "components": ["retriever", "generator"],
            "seconds": 20.0,
        },
        {"round": 1, "step": "generator trained", "component": "generator", "seconds": 500.0},
        {"round": 1, "step": "retriever judged", "seconds": 4.0, **facts},
    ]
    _, line = ledger_lines(rows)
    assert line.split() == "1 retriever 7 MRR@10 0.500 -> 0.250 -0.250 [-0.500, -0.100] refused 34 a loss".split()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_facts_with_line_separators_are_read_back_unchanged(tmp_path: Path, separator: str) -> None:
    url = str(tmp_path / "ledger.jsonl")
    given = Ledger(url).step(1, "answered", lambda: {"reason": f"a{separator}b"})
    assert Ledger(url).rows == [given]
