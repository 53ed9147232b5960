"""Shows progress on stderr: a live display on a terminal, one line per 30 seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Self, TextIO

LINE_EVERY_SECONDS = 30.0


def say(text: str) -> None:
    """Write one line of progress to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def stage(name: str, total: int, unit: str, skipped: int = 0) -> Iterator[Stage]:
    """Show the progress of a stage of a job while the block runs.

    Args:
        name: of the stage, such as "embed".
        total: number of rows, including those of an earlier run.
        unit: what is counted, such as "passages".
        skipped: rows that an earlier run finished.
    """
    if skipped:
        say(f"{name}: {skipped:,} of {total:,} {unit} were finished by an earlier run and are skipped")
    display = _Live(name, total, unit, skipped) if sys.stderr.isatty() else Stage(name, total, unit, skipped)
    with display:
        yield display


class Stage:
    """Counts rows, and writes a line every 30 seconds and at the end."""

    def __init__(self, name: str, total: int, unit: str, skipped: int = 0, stream: TextIO | None = None) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, skipped
        self._skipped = skipped
        self._stream = stream
        self._started = self._last_line = time.monotonic()

    def begin(self, now: float | None = None) -> None:
        """Restart the clock, so that earlier work such as loading a model does not lower the rate."""
        self._started = time.monotonic() if now is None else now

    def advance(self, rows: int, now: float | None = None) -> None:
        """Count more rows as finished. `now` is in monotonic seconds; None reads the clock."""
        self.done += rows
        now = time.monotonic() if now is None else now
        if now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            self._write(self.line(now))

    def line(self, now: float) -> str:
        """One line such as `embed 12,000/50,000 passages · 410/s · 1m33s left`."""
        rate = (self.done - self._skipped) / max(now - self._started, 1e-9)
        left = f" · {duration((self.total - self.done) / rate)} left" if rate > 0 and self.done < self.total else ""
        return f"{self.name} {self.done:,}/{self.total:,} {self.unit} · {_pace(rate)}{left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None and self.done > self._skipped:
            now = time.monotonic()
            self._write(f"{self.line(now)} · {duration(now - self._started)}")

    def _write(self, text: str) -> None:
        if self._stream is None:
            say(text)
        else:
            self._stream.write(text + "\n")


class _Live(Stage):
    """A `Stage` on a terminal: one line, updated in place, that stays visible at the end."""

    def __init__(self, name: str, total: int, unit: str, skipped: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(name, total, unit, skipped)
        self._bar = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]} · {task.fields[pace]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(name, total=total, completed=skipped, unit=unit, pace=_pace(0.0))

    def advance(self, rows: int, now: float | None = None) -> None:
        self.done += rows
        now = time.monotonic() if now is None else now
        rate = (self.done - self._skipped) / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=self.done, pace=_pace(rate))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._bar.stop()


class Stages:
    """Announces the stages of a long job, such as `compare: stage 3 of 8: train rag+ft, about 1m30s`.

    Args:
        verb: of the job.
        seconds: stage -> how long it will take, None if that is unknown; in the order in which they run.
    """

    def __init__(self, verb: str, seconds: Mapping[str, float | None]) -> None:
        self._verb, self._seconds = verb, dict(seconds)

    def begin(self, name: str) -> None:
        """Say that a stage begins, and how long it will take; a stage that was not foreseen has no number."""
        if name not in self._seconds:
            say(f"{self._verb}: {name}")
            return
        number, seconds = list(self._seconds).index(name) + 1, self._seconds[name]
        about = "" if seconds is None else f", about {duration(seconds)}"
        say(f"{self._verb}: stage {number} of {len(self._seconds)}: {name}{about}")


def _pace(rate: float) -> str:
    """Format a rate as rows per second, or as seconds per row if it is slow.

    >>> _pace(410.26), _pace(0.04), _pace(0.0)
    ('410.3/s', '25.0s each', '0.0/s')
    """
    return f"{1 / rate:,.1f}s each" if 0 < rate < 0.1 else f"{rate:,.1f}/s"


def duration(seconds: float) -> str:
    """Format seconds for people.

    >>> duration(7.25), duration(93), duration(7260)
    ('7.2s', '1m33s', '2h01m')
    """
    if seconds < 10:
        return f"{seconds:.1f}s"
    if round(seconds) < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
