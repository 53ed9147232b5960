"""Several nodes of Ray on this machine, each started as an operator would, with an environment of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

RAY = str(Path(sys.executable).parent / "ray")
ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 200  # against a hang


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Nodes:
    """A head without CPUs and with a dashboard, and the nodes that are added. They end with the block, by their own ids."""

    def __enter__(self) -> Self:
        """Start the head."""
        # Ray's sockets live below this directory and their paths must stay under 108 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp")
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = Path(self._folder.name) / "token"
        token.write_text("0123456789abcdef0123456789abcdef")
        token.chmod(0o600)
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "180",  # a node starts slowly beside others on a busy machine
            "PYTHONPATH": str(ROOT),
        }
        port, dashboard, client = free_ports(3)
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        arguments = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        self._start([*arguments, "--dashboard-host=127.0.0.1", f"--temp-dir={self._folder.name}", "--num-cpus=0"], {})
        return self

    def add(self, num_cpus: int, environment: Mapping[str, str]) -> None:
        """Start a node with these variables."""
        self._start([f"--address={self.address}", f"--num-cpus={num_cpus}"], environment)

    def _start(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        common = ["--disable-usage-stats", "--dashboard-agent-listen-port=0", "--block"]
        log = Path(self._folder.name) / f"node-{len(self._processes)}.log"
        with log.open("w") as sink:
            command = [RAY, "start", *arguments, *common]
            process = subprocess.Popen(command, env={**self.environment, **environment}, stdout=sink, stderr=sink)
        self._processes.append(process)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while "Ray runtime started" not in log.read_text():  # several that start at once may take the same port
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        """End all nodes, the head last."""
        for process in reversed(self._processes):
            family = [
                psutil.Process(process.pid)
            ]  # a process that has ended is still there, since nobody waited for it
            family = [*family[0].children(recursive=True), *family]
            for each in family:
                if each.is_running():
                    each.terminate()
            _, alive = psutil.wait_procs(family, timeout=5)
            for each in alive:
                each.kill()
            process.wait(60)
        self._folder.cleanup()


DRIVER = [sys.executable, "-c", "from tests.support import nodes_jobs; nodes_jobs.main()"]
"""The command of a driver of `nodes_jobs`; its arguments follow."""
