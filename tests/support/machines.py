"""A cluster whose nodes are machines of their own: each has an address, folders and processes that the others do not see.

Namespaces of Linux make them on this machine. What several of them need is in an S3 server beside them, and nowhere else.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import pytest

from tests.support.s3_server import S3Server

Found = TypeVar("Found")
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
DEADLINE_SECONDS = 600  # against a hang
_RAN = re.compile(r"^:(?:actor|task)_name:(.+)$", re.MULTILINE)
PORT, DASHBOARD = 6379, 8265
TOKEN = "0123456789abcdef0123456789abcdef"

# As if the models were large: a pause for each unit, which needs no core. Then the machine notes that it did the unit.
_SLOW = """
import os, pathlib, sys
if any(part.endswith("default_worker.py") for part in sys.orig_argv):
    import time
    from ragtune_ray.cluster import stages
    from ragtune_ray.cluster.indexing import embedding, reading

    def noted(owner, name, is_slow=True):
        real = getattr(owner, name)
        def call(*given, **named):
            if is_slow:
                time.sleep(float(pathlib.Path(os.environ["TEST_NOTES"], "pause").read_text()))
            result = real(*given, **named)
            pathlib.Path(os.environ["TEST_NOTES"], f"{name}-{time.time()}-{os.getpid()}").touch()
            return result
        setattr(owner, name, call)

    noted(reading, "read_unit", is_slow=False)
    noted(embedding.Embedder, "embed")
    noted(stages, "commit_unit")
"""

# Waits for the network, hides the folders of the other machines, and becomes Ray.
_BEGIN = """
set -e
read -r go
ip link set lo up
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
for folder in $HIDDEN; do mount -t tmpfs none "$folder"; done
mount --bind "$OWN" "$SHARED_PATH"
mount --bind "$SHARED_PATH/shm" /dev/shm
cd "$HOME"
exec "$@"
"""


def require() -> None:
    """Skip the test where namespaces cannot be made."""
    tried = ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "set", "lo", "up"]
    try:
        done = subprocess.run(tried, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"this machine has no {error.filename}")
    if done.returncode:
        pytest.skip(f"namespaces cannot be made here: {done.stderr.strip()}")


class Machine:
    """A node of Ray with a network interface, home, temporary folder, shared memory and processes of its own."""

    def __init__(
        self, cluster: "Machines", number: int, arguments: Sequence[str], variables: Mapping[str, str]
    ) -> None:
        self.address = f"{cluster.network}.{number + 2}"
        self.folder = cluster.folder / f"machine{number}"
        """What it sees as the cluster's folder."""
        for name in ("tmp", "home", "shm", "notes"):
            (self.folder / name).mkdir(parents=True)
        self.pause(0)
        seen = cluster.seen
        environment = {
            **cluster.environment,
            **variables,
            "HOME": f"{seen}/home",
            "TMPDIR": f"{seen}/tmp",
            "TEST_NOTES": f"{seen}/notes",
            "ADDRESS": self.address,
            "HIDDEN": " ".join(cluster.hidden),
            "OWN": str(self.folder),
            "SHARED_PATH": seen,
        }
        isolated = [
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            _BEGIN,
            "-",
        ]
        ray = [RAY, "start", *arguments, f"--node-ip-address={self.address}", "--disable-usage-stats", "--block"]
        self.log = cluster.folder / f"machine{number}.log"
        with self.log.open("w") as sink:
            self.process = subprocess.Popen(
                [*isolated, *ray], stdin=subprocess.PIPE, stdout=sink, stderr=sink, env=environment
            )
        eventually(lambda: psutil.Process(self.process.pid).children(), "namespaces")
        (self._first,) = psutil.Process(self.process.pid).children()
        self._interface = f"{cluster.bridge}m{number}"
        peer = ["peer", "name", "eth0", "netns", str(self._first.pid)]
        ip("link", "add", self._interface, "type", "veth", *peer)
        ip("link", "set", self._interface, "master", cluster.bridge, "up")
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.close()

    def pause(self, seconds: float) -> None:
        """Let each unit that it does take so much longer."""
        (self.folder / "notes" / "pause").write_text(str(seconds))

    def wait(self) -> None:
        """Wait until its Ray has started."""

        def is_up() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return "Ray runtime started" in self.log.read_text()

        eventually(is_up, f"Ray on {self.address}")

    def done(self, name: str = "") -> list[float]:
        """When it finished units: those that were read ("read_unit"), embedded ("embed"), committed ("commit_unit"), or all."""
        return sorted(float(path.name.split("-")[1]) for path in (self.folder / "notes").glob(f"{name}*-*"))

    def workers(self, name: str = "") -> list[psutil.Process]:
        """Its processes that run a Ray actor or task of this name."""
        found = []
        for each in self._first.children(recursive=True) if self._first.is_running() else []:
            try:
                title = " ".join(each.cmdline())
            except psutil.Error:
                continue
            if title.startswith("ray::") and name in title:
                found.append(each)
        return found

    def kill_driver(self, name: str) -> None:
        """Kill the driver that runs this file."""
        (driver,) = [each for each in self._first.children(recursive=True) if each.cmdline()[1:2] == [name]]
        driver.kill()

    def ran(self) -> set[str]:
        """Names of the actors and tasks that ever ran on it, from Ray's own logs."""
        logs = (self.folder / "tmp").glob("session_2*/logs/worker-*.[oe]*")
        return {name for log in logs for name in _RAN.findall(log.read_text(errors="replace"))}

    def kill(self) -> None:
        """Cut it off from the network and end all its processes at once: no connection is closed that others could notice."""
        if self.process.poll() is None:
            ip("link", "delete", self._interface)
            self._first.kill()  # the kernel ends the others of its namespace
            self.process.wait(60)


class Machines:
    """A head without CPUs, an S3 server, and the machines that are added. They end with the block."""

    def __init__(self, hidden: Sequence[Path] = (), faults: Any = None) -> None:
        self.hidden = [str(path) for path in hidden]
        self._faults = faults
        self._running: list[Machine] = []
        self._followers: list[subprocess.Popen[bytes]] = []
        self._number = 0

    def __enter__(self) -> Self:
        # Ray's sockets live below this directory and their paths must stay under 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
        self.seen = str(self.folder / "own")
        Path(self.seen).mkdir()
        self.bridge = f"rt{os.getpid() % 100000}"
        self.network = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        ip("link", "add", self.bridge, "type", "bridge")
        ip("address", "add", f"{self.network}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        self.store = S3Server(f"{self.network}.1", self._faults)
        (self.folder / "site").mkdir()
        (self.folder / "site" / "sitecustomize.py").write_text(_SLOW)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAGTUNE"))
        }
        self.environment |= {
            **self.store.environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "180",  # a node starts slowly beside others on a busy machine
            # A lost machine is noticed in about 20 seconds instead of 65.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "PYTHONPATH": f"{self.folder}/site:{ROOT}",
            "TEST_NOTES": f"{self.folder}/unused",
        }
        self.dashboard = f"http://{self.network}.2:{DASHBOARD}"
        arguments = ["--head", f"--port={PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD}"]
        self.head = self._add([*arguments, f"--temp-dir={self.seen}/tmp", "--num-cpus=0"], {})
        return self

    def add(self, num_cpus: int = 2, **variables: str) -> Machine:
        """Start a machine; it has joined when this returns."""
        return self._add([f"--address={self.network}.2:{PORT}", f"--num-cpus={num_cpus}"], variables)

    @property
    def workers(self) -> list[Machine]:
        """The machines that run, without the head."""
        return [each for each in self._running if each is not self.head and each.process.poll() is None]

    def _add(self, arguments: Sequence[str], variables: Mapping[str, str]) -> Machine:
        machine = Machine(self, self._number, arguments, variables)
        self._number += 1
        self._running.append(machine)
        machine.wait()
        return machine

    def submit(self, name: str, *command: str, **variables: str) -> "Submitted":
        """Submit a job."""
        given = {
            "env_vars": {"HF_HUB_OFFLINE": "1", **variables},
            "excludes": [".git", ".ruff_cache", ".mypy_cache", ".pytest_cache", "data", "docs"],
        }
        submit = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--submission-id", name]
        log = self.folder / f"{name}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                [*submit, "--runtime-env-json", json.dumps(given), "--", sys.executable, *command],
                env=self.environment,
                cwd=ROOT,
                stdout=sink,
                stderr=sink,
            )
        self._followers.append(process)
        return Submitted(name, process, log)

    def stop(self, name: str) -> None:
        """Stop a job, and wait until it has ended."""
        command = [RAY, "job", "stop", "--address", self.dashboard, name]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=DEADLINE_SECONDS)

    def __exit__(self, *_: object) -> None:
        for process in self._followers:
            process.kill()
            process.wait(60)
        for machine in reversed(self._running):
            machine.kill()
        self.store.stop()
        ip("link", "delete", self.bridge)
        shutil.rmtree(self.folder)


class Submitted:
    """A submitted job, whose log is followed."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    def wait(self) -> str:
        """Its log, once it has ended well."""
        try:
            code = self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"still running after {DEADLINE_SECONDS} s: {self.log.read_text()[-3000:]}")
        assert code == 0, self.log.read_text()[-3000:]
        return self.log.read_text()

    def until(self, condition: Callable[[], Found]) -> Found:
        """What a condition returns as soon as it holds; the job may not end before."""

        def holds() -> Found:
            found = condition()
            assert found or self.process.poll() is None, f"ended too early: {self.log.read_text()[-3000:]}"
            return found

        return eventually(holds, f"{self.name}: {self.log}")


def eventually(condition: Callable[[], Found], what: str) -> Found:
    """Wait until a condition holds, and return it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def ip(*arguments: str) -> None:
    """Change the network."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
