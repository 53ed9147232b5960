"""Progress lines: rates, estimates, and when a line is written."""

import io
import re
import sys

import pytest

from ragtune_ray import progress
from ragtune_ray.progress import Stage


def started_at(zero: float, *arguments: object, stream: io.StringIO | None = None, skipped: int = 0) -> Stage:
    """A stage whose clock began at `zero`."""
    stage = Stage(*arguments, skipped=skipped, stream=stream)
    stage._started = stage._last_line = zero
    return stage


def test_a_line_shows_count_rate_and_time_left() -> None:
    stage = started_at(100.0, "embed", 50_000, "passages")
    stage.advance(12_000, now=110.0)
    # 12,000 in 10 s are 1,200/s; 38,000 more take 31.67 s.
    assert stage.line(110.0) == "embed 12,000/50,000 passages · 1,200.0/s · 32s left"
    assert stage.line(160.0) == "embed 12,000/50,000 passages · 200.0/s · 3m10s left"


def test_rows_of_an_earlier_run_do_not_raise_the_rate() -> None:
    stage = started_at(0.0, "answer", 100, "queries", skipped=60)
    stage.advance(10, now=20.0)
    assert stage.line(20.0) == "answer 70/100 queries · 0.5/s · 1m00s left"


def test_no_time_left_is_shown_without_a_rate_or_rows() -> None:
    stage = started_at(0.0, "embed", 10, "passages")
    assert stage.line(5.0) == "embed 0/10 passages · 0.0/s"
    assert stage.line(0.0) == "embed 0/10 passages · 0.0/s", "no time has passed"
    stage.advance(10, now=5.0)
    assert stage.line(5.0) == "embed 10/10 passages · 2.0/s"


def test_a_line_is_written_every_30_seconds_and_not_more_often() -> None:
    stream = io.StringIO()
    stage = started_at(0.0, "embed", 1000, "passages", stream=stream)
    for second in range(1, 96):
        stage.advance(1, now=float(second))
    lines = stream.getvalue().splitlines()
    assert [line.split(" ")[1] for line in lines] == ["30/1,000", "60/1,000", "90/1,000"]


def test_the_end_is_written_once() -> None:
    stream = io.StringIO()
    with Stage("embed", 10, "passages", stream=stream) as stage:
        stage.advance(10)
    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(r"embed 10/10 passages · [\d,.]+/s · 0\.\ds", line)


def test_a_stage_without_work_writes_nothing() -> None:
    stream = io.StringIO()
    with Stage("embed", 10, "passages", skipped=10, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_a_failed_stage_writes_no_final_line() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Stage("embed", 10, "passages", stream=stream) as stage:
            stage.advance(5)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert stream.getvalue() == ""


def test_skipped_rows_are_reported_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.stage("embed", 2000, "passages", skipped=1500) as stage:
        pass
    assert isinstance(stage, Stage)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "embed: 1,500 of 2,000 passages were finished by an earlier run and are skipped\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_line_with_final_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.stage("embed", 3000, "passages", skipped=1000) as stage:
        assert type(stage) is not Stage
        stage.advance(500)
        stage.advance(1500)
    text = terminal.getvalue()
    assert "1,000 of 3,000 passages were finished by an earlier run" in text
    frames = re.findall(r"embed .*? ([\d,]+/3,000 passages)", text)
    assert frames[-1] == "3,000/3,000 passages"
    assert stage.done == 3000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (9.94, "9.9s"), (10, "10s"), (59.4, "59s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m")],
)
def test_a_duration_is_formatted_for_people(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_begin_excludes_earlier_time_from_the_rate() -> None:
    stage = started_at(0.0, "train", 50, "steps")
    stage.begin(now=80.0)
    stage.advance(2, now=120.0)
    assert stage.line(120.0) == "train 2/50 steps · 20.0s each · 16m00s left"


def test_stages_are_numbered_with_what_they_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    stages = progress.Stages("compare", {"train ft": 93.0, "answer ft": None})
    for name in ("train ft", "answer ft", "train another"):
        stages.begin(name)
    assert capsys.readouterr().err.splitlines() == [
        "compare: stage 1 of 2: train ft, about 1m33s",
        "compare: stage 2 of 2: answer ft",
        "compare: train another",
    ]
