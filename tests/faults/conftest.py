"""What the fault tests share: the command in a process of its own, which can be killed, and how to find its workers."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import yaml

DEADLINE_SECONDS = 120
GRACE_SECONDS = 5


class Command:
    """`ragtune` running as a child process with a Ray of its own."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
        self.log = log
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ragtune_ray.cli", *arguments], stdout=sink, stderr=sink, env=environment
            )

    def wait(self) -> str:
        """Its output, once it has ended well."""
        assert self.process.wait(DEADLINE_SECONDS) == 0, self.log.read_text()
        return self.log.read_text()

    def kill(self) -> None:
        """SIGKILL the driver; its Ray ends with it, and this waits until it has."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_SECONDS)
        end_remains(children)

    def workers(self, name: str) -> list[psutil.Process]:
        """Its worker processes that run a Ray actor or task of this name."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found


def end_remains(family: Sequence[psutil.Process]) -> None:
    """Wait until the Ray of a command that is gone has ended: its workers do at once, its agents would linger for a minute."""
    _, lingering = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for each in lingering:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    _, alive = psutil.wait_procs(lingering, timeout=DEADLINE_SECONDS)
    assert not alive


def eventually(condition: Callable[[], object], command: Command) -> None:
    """Wait until a condition holds, looking often; fail when the command ends or the deadline passes first."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert command.process.poll() is None, f"ended too early to be killed: {command.log.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """A function that starts `ragtune VERB` with a config; whatever still runs at the end of the test is ended."""
    started: list[Command] = []

    def start(verb: str, settings: dict[str, object], *overrides: str) -> Command:
        path = tmp_path / f"config-{len(started)}.yaml"
        path.write_text(yaml.safe_dump(settings))
        command = Command([verb, str(path), *overrides], tmp_path / f"log-{len(started)}.txt")
        started.append(command)
        return command

    yield start
    for command in started:
        if command.process.poll() is None:
            command.kill()
