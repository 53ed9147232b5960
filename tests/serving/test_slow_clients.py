"""Clients and replicas that hang: each is ended in time, and nobody else waits for them."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest

from ragtune_ray.serving import middleware
from tests.support import clocks
from tests.support.gateways import FakeBackend, Served, client, keys, question

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


async def stalled() -> AsyncIterator[bytes]:
    """A body that stops after the first byte."""
    yield b"{"
    await asyncio.Event().wait()


async def trickling() -> AsyncIterator[bytes]:
    """A body that sends one byte a second, for ever."""
    while True:
        yield b" "
        await asyncio.sleep(1)


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("body", [stalled, trickling])
def test_a_body_that_does_not_arrive_is_refused_within_half_a_minute_and_nobody_waits_for_it(body: Any) -> None:
    async def scenario() -> None:
        async with client() as http:
            slow = [asyncio.ensure_future(http.post(CHAT, content=body(), headers=JSON)) for _ in range(50)]
            while http.middleware.in_flight < 50:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert (await http.post(CHAT, json=question())).status_code == 200
            assert now() == 0, "the others are answered at once"
            replies = await asyncio.gather(*slow)
            assert {(reply.status_code, reply.json()["error"]["code"]) for reply in replies} == {(408, "body_timeout")}
            assert 1 <= now() <= 30
            assert http.middleware.in_flight == 0

    clocks.run(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_hangs_ends_in_504_or_an_event_after_the_time_limit_of_the_config(stream: bool) -> None:
    async def scenario() -> None:
        backend = FakeBackend()
        backend.gate = asyncio.Event()  # nobody sets it
        async with client("serve.timeout_seconds=20", backend=backend) as http:
            reply = await http.post(CHAT, json=question(stream=stream))
            assert "deadline_exceeded" in reply.text
            assert reply.status_code == (200 if stream else 504)
            assert 19 <= now() <= 21
            assert http.middleware.in_flight == 0

    clocks.run(scenario)


def test_probes_are_answered_while_the_replicas_hang() -> None:
    class Hanging(FakeBackend):
        async def status(self) -> Any:
            await asyncio.Event().wait()

    async def scenario() -> None:
        async with client(backend=Hanging()) as http:
            assert (await http.get("/healthz")).status_code == 200
            reply = await http.get("/readyz")
            assert (reply.status_code, reply.json()["problems"]) == (503, ["the replicas do not respond"])
            assert (await http.get("/metrics")).status_code == 200
            assert now() <= 30

    clocks.run(scenario)


def test_over_a_real_socket_a_half_sent_request_is_ended_while_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)
    served = Served(FakeBackend(), keys())
    try:
        host, _, port = served.address.removeprefix("http://").partition(":")
        head = (
            "POST /v1/retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            slow.sendall(f"{head}Authorization: Bearer user-key-0123456789\r\n\r\n{{".encode())
            assert httpx.get(f"{served.address}/healthz").status_code == 200
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    finally:
        served.stop()
