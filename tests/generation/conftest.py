"""A scripted server and a client for it."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ragtune_ray.generation.openai_client import OpenAIGenerator
from tests.support.openai_server import SECRET, Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def connect(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenAIGenerator]:
    monkeypatch.setenv("RAGTUNE_TEST_KEY", SECRET)

    def connected(**changes: Any) -> OpenAIGenerator:
        settings = {"api_key_env": "RAGTUNE_TEST_KEY", "max_attempts": 3, "timeout_seconds": 10.0} | changes
        return OpenAIGenerator(server.base_url, "a-model", **settings)

    return connected
