"""Helpers for tests of the endpoint on Ray: quick settings, questions, waiting, and its processes."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx

CHAT = "/v1/chat/completions"
WAIT_SECONDS = 600  # only against a hang: a busy machine takes most of a minute to start a replica
QUICK = (
    "serve.port=0",
    "serve.poll_seconds=0.1",
    "serve.grace_seconds=5",
    "serve.timeout_seconds=300",
    "serve.retriever.num_cpus=0.1",
    "serve.generator.num_cpus=0.1",
    "serve.generator.num_threads=1",
)


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_until_ready(http: httpx.Client, process: subprocess.Popen[Any], said: Callable[[], str]) -> None:
    """Wait until the endpoint that a process starts is ready; if the process ends instead, fail with what it `said`."""

    def ready() -> bool:
        assert process.poll() is None, said()
        try:
            return http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    eventually(ready, "the endpoint is ready")


def question(number: int = 7, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"What is the code of vessel{number}?"}], **fields}


def replica_processes(deployment: str) -> list[int]:
    """Process ids of the running replicas of a deployment."""
    import ray
    from ray.serve.context import _get_global_client

    details = ray.get(_get_global_client()._controller.get_serve_instance_details.remote())
    replicas = details["applications"]["ragtune"]["deployments"][deployment]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING"]
