"""The parts of Ray Serve killed one after another: what is lost is what was in flight in that part, and all comes back by itself."""

import concurrent.futures
import os
import signal
import threading
from collections.abc import Iterator
from typing import Self

import httpx2 as httpx
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.serving.serve import running
from tests.support.endpoints import CHAT, QUICK, eventually, question, replica_processes

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.serve,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.usefixtures("shared_ray"),
]

CLIENTS = 4


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, settings_for, shared_ray: None) -> Iterator[str]:
    settings: config.Config = settings_for(tmp_path_factory.mktemp("workspace"), *QUICK, "answer.arm=base")
    with running(settings) as found:
        yield found


class Load:
    """Clients that each ask one question after another, over a new connection each, until the block ends."""

    def __init__(self, address: str) -> None:
        self._address, self._stopped = address, threading.Event()
        self.outcomes: list[str] = []
        """The status of each answer, or the name of the error of the connection."""

    def _ask(self) -> None:
        while not self._stopped.is_set():
            try:
                with httpx.Client(base_url=self._address, timeout=300) as http:
                    self.outcomes.append(str(http.post(CHAT, json=question(max_tokens=4)).status_code))
            except httpx.TransportError as error:
                self.outcomes.append(type(error).__name__)
                self._stopped.wait(0.1)  # a proxy that restarts refuses connections at once

    def __enter__(self) -> Self:
        self._pool = concurrent.futures.ThreadPoolExecutor(CLIENTS)
        self._clients = [self._pool.submit(self._ask) for _ in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def answer_more(self, count: int) -> None:
        """Wait until that many more questions were answered."""
        wanted = self.outcomes.count("200") + count
        eventually(lambda: self.outcomes.count("200") >= wanted, "questions are answered again")


def serve_details() -> dict:
    import ray
    from ray.serve.context import _get_global_client

    return ray.get(_get_global_client()._controller.get_serve_instance_details.remote())


def restart(actor_name: str) -> None:
    """Kill the process of an actor of Serve, as a crash would."""
    import ray

    ray.kill(ray.get_actor(actor_name, namespace="serve"), no_restart=False)


def test_without_its_controller_serve_loses_no_request(address: str) -> None:
    with Load(address) as load:
        load.answer_more(4)
        restart("SERVE_CONTROLLER_ACTOR")
        load.answer_more(12)
    assert set(load.outcomes) == {"200"}
    eventually(lambda: len(replica_processes("Ingress")) == 1, "the controller is back")


def test_a_killed_ingress_replica_loses_only_the_requests_in_it(address: str) -> None:
    (process,) = replica_processes("Ingress")
    with Load(address) as load:
        load.answer_more(4)
        os.kill(process, signal.SIGKILL)
        load.answer_more(12)
    lost = [outcome for outcome in load.outcomes if outcome != "200"]
    assert set(lost) <= {"500", "503"}, "errors that a client may retry"
    assert len(lost) <= CLIENTS
    assert replica_processes("Ingress") != [process]


def test_a_killed_proxy_comes_back_and_gives_no_wrong_answer(address: str) -> None:
    (proxy,) = serve_details()["proxies"].values()
    with Load(address) as load:
        load.answer_more(4)
        restart(proxy["actor_name"])
        load.answer_more(12)
    broken = {"ConnectError", "ReadError", "RemoteProtocolError", "WriteError"}
    assert set(load.outcomes) <= {"200", "503", *broken}, "what a client may try again; 503 before the proxy has routes"
