"""Clients whose dependencies conflict with ours, in an environment of their own, against one endpoint over HTTP."""

import os
import subprocess
from pathlib import Path

import pytest

from ragtune_ray.serving.api_keys import Keys
from tests.support.gateways import FakeBackend, Served

HERE = Path(__file__).parent
PYTHON = HERE.parent.parent / ".venv-clients" / "bin" / "python"
SECONDS = 300
CLIENTS = ["langchain", "llama_index", "litellm"]


@pytest.mark.skipif(not PYTHON.is_file(), reason="no environment of the clients; run: make clients")
def test_each_client_can_ask_stream_continue_and_embed() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or LiteLLM fetches it
    served = Served(FakeBackend(), Keys([]))
    try:
        running = {
            client: subprocess.Popen(
                [PYTHON, HERE / f"{client}_client.py", served.address],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for client in CLIENTS
        }
        try:
            said = {client: process.communicate(timeout=SECONDS)[0] for client, process in running.items()}
        finally:
            for process in running.values():
                process.kill()
        failed = {client: said[client][-3000:] for client, process in running.items() if process.returncode}
    finally:
        served.stop()
    assert failed == {}
