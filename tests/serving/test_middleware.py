"""Names and origins that may use the endpoint, and WebSockets."""

import base64
import contextlib
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.serving.api_keys import Keys
from ragtune_ray.serving.middleware import check_exposure
from tests.support.gateways import FakeBackend, Served, bearer, client, keys

pytestmark = pytest.mark.anyio

PAGE = "https://chat.example.com"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_only_allowed_names_are_served() -> None:
    async with client("serve.allowed_hosts=[rag.example.com, '*.internal']", keys=keys()) as http:

        async def status(host: str, path: str = "/v1/models") -> int:
            return (await http.get(path, headers={"host": host, **bearer("user")})).status_code

        for host in (
            "rag.example.com",
            "RAG.example.com:8000",
            "a.b.internal",
            "localhost:8000",
            "127.0.0.1",
            "[::1]:8000",
        ):
            assert await status(host) == 200, host
        for host in (
            "example.com",
            "internal",
            "x.rag.example.com",
            "rag.example.com.evil.org",
            "evil.org",
            "",
            "10.0.0.7",
        ):
            assert await status(host) == 400, host
            assert await status(host, "/") == 400, "the page too"
            assert await status(host, "/readyz") == 200, "probes use addresses"


async def test_without_keys_a_name_must_be_allowed_and_the_client_local() -> None:
    async with client("serve.allowed_hosts=[rag.test]") as http:
        for path in ("/v1/models", "/readyz"):
            assert (await http.get(path, headers={"host": "rag.test"})).status_code == 200
            assert (await http.get(path, headers={"host": "evil.test"})).status_code == 403
    async with client("serve.allowed_hosts=[rag.test]", address="10.0.0.7") as http:
        assert (await http.get("/v1/models", headers={"host": "rag.test"})).status_code == 403


async def test_pages_of_allowed_origins_may_use_the_endpoint_with_a_key() -> None:
    async with client(f"serve.allowed_origins=[{PAGE}]", keys=keys()) as http:
        preflight = await http.options("/v1/chat/completions", headers={"origin": PAGE, **PREFLIGHT})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in preflight.headers
        for headers, status in ((bearer("user"), 200), ({}, 401)):
            reply = await http.get("/v1/models", headers={"origin": PAGE, **headers})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, PAGE)
        other = await http.options("/v1/chat/completions", headers={"origin": "https://evil.example", **PREFLIGHT})
        assert other.status_code == 400
        reply = await http.get("/v1/models", headers={"origin": "https://evil.example", **bearer("user")})
        assert "access-control-allow-origin" not in reply.headers
    async with client(keys=keys()) as http:
        preflight = await http.options("/v1/chat/completions", headers={"origin": PAGE, **PREFLIGHT})
        assert (preflight.status_code, "access-control-allow-origin" in preflight.headers) == (405, False)


def test_pages_of_all_sites_require_keys() -> None:
    settings = config.Config().using("serve.allowed_origins=['*']")
    with pytest.raises(config.ConfigError, match=r"allowed_origins '\*'.*keys_path"):
        check_exposure(settings, Keys([]))
    check_exposure(settings, keys())
    check_exposure(config.Config().using(f"serve.allowed_origins=[{PAGE}]"), Keys([]))


@pytest.mark.parametrize(
    "wrong",
    [
        "allowed_origins=[chat.example.com]",
        f"allowed_origins=['{PAGE}/']",
        "allowed_hosts=['https://x']",
        "allowed_hosts=[a/b]",
    ],
)
def test_a_malformed_host_or_origin_is_refused(wrong: str) -> None:
    with pytest.raises(config.ConfigError, match=re.escape(f"serve.{wrong.partition('=')[0]}")):
        config.Config().using(f"serve.{wrong}")


@pytest.fixture
def served() -> Iterator[Served]:
    running = Served(FakeBackend(), keys())
    yield running
    running.stop()


@pytest.mark.parametrize("headers", [{}, bearer("user")])
def test_a_websocket_is_refused_with_a_policy_code(served: Served, headers: dict[str, str]) -> None:
    """Closed before it is accepted, so that a client sees 403; never a 500."""
    host, port = served.address.removeprefix("http://").split(":")
    fields = {"host": host, "connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13", **headers}
    fields["sec-websocket-key"] = base64.b64encode(b"0123456789abcdef").decode()
    for path in ("/v1/chat/completions", "/nothing"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
            connection.sendall("\r\n".join(lines).encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 403 ")


def test_a_reply_to_head_has_no_body(served: Served) -> None:
    host, port = served.address.removeprefix("http://").split(":")
    lines = [f"{{}} /openapi.json HTTP/1.1\r\nhost: {host}\r\n", *(f"{n}: {v}\r\n" for n, v in bearer("user").items())]
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        request = "".join([*lines, "\r\n"])
        connection.sendall(request.format("HEAD").encode() + request.format("HEAD").encode())
        received = b""
        while received.count(b"\r\n\r\n") < 2:
            received += connection.recv(65536)
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            received += connection.recv(65536)
    first, second, rest = received.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200")
    assert second.startswith(b"HTTP/1.1 200")
    assert rest == b""


async def test_the_close_code_of_a_websocket_is_that_of_a_policy_violation() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with client() as http:
        await http.middleware({"type": "websocket", "path": "/", "headers": []}, receive, send)
        assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]
        assert 'ragtune_refused_total{reason="no_websockets"} 1.0' in (await http.get("/metrics")).text
