"""The command in a process of its own, which a test can kill, and ways to find its workers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

Found = TypeVar("Found")
ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 600  # against a hang, not for speed: a run of a minute takes two beside another on two slow cores
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
        try:
            code = self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {DEADLINE_SECONDS} s: {self.log.read_text()}")
        assert code == 0, self.log.read_text()
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


def serve(work: Callable[[dict[str, Any]], None]) -> None:
    """Fork for every line of stdin, do in the child what it asks for, and write its exit code: the warm process."""
    os.fsync = lambda _: None
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(asked["environment"])
                work(asked)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


@contextlib.contextmanager
def warm_process(module: str, log: Path, *imported: str) -> Iterator[Callable[[dict[str, Any], dict[str, str]], int]]:
    """A function that does what is asked, in an environment, in a child of a process that has imported everything.

    It gives the child's exit code, negative for a signal. `module.work` is what the child calls; `imported` are further modules.
    """
    imports = f"import {', '.join((module, *imported))}; from tests.support.processes import serve"
    command = [sys.executable, "-c", f"{imports}; serve({module}.work)"]
    with log.open("w") as sink:
        warm = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, cwd=ROOT
        )
        assert warm.stdin is not None
        assert warm.stdout is not None
        stdin, stdout = warm.stdin, warm.stdout

        def run(asked: dict[str, Any], environment: dict[str, str]) -> int:
            stdin.write(json.dumps({**asked, "environment": environment}) + "\n")
            stdin.flush()
            code = stdout.readline()
            assert code, log.read_text()
            return int(code)

        yield run
        stdin.close()
        stdout.close()
        assert warm.wait(DEADLINE_SECONDS) == 0


def end_remains(family: Sequence[psutil.Process]) -> None:
    """Wait until the Ray of a command that is gone has ended: its workers do at once, its agents would linger for a minute."""
    _, lingering = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for each in lingering:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    _, alive = psutil.wait_procs(lingering, timeout=DEADLINE_SECONDS)
    assert not alive


def eventually(condition: Callable[[], Found], command: Command) -> Found:
    """Wait until a condition holds, looking often, and return it; fail when the command ends or the deadline passes first."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert command.process.poll() is None, f"ended too early to be killed: {command.log.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found
