"""Headers that never end, over raw sockets: such connections are closed, others are not."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from ragtune_ray.cluster.serving import header_timeout

SECONDS = 0.3
HEAD = b"GET / HTTP/1.1\r\nhost: localhost\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after the whole body; WebSockets are accepted and echo."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        message = await receive()
        await send({"type": "websocket.send", "bytes": message["bytes"]})
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server of the default protocol, as Ray Serve's proxy starts it after `install`."""
    monkeypatch.setattr(header_timeout, "HEADER_SECONDS", SECONDS)
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    header_timeout.install()
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def received_until_closed(connection: socket.socket) -> tuple[bytes, float]:
    """What the server sends until it closes the connection, and after how many seconds it does."""
    started, parts = time.monotonic(), []
    connection.settimeout(10)
    while part := connection.recv(4096):
        parts.append(part)
    return b"".join(parts), time.monotonic() - started


def received_to(connection: socket.socket, end: bytes) -> bytes:
    """What the server sends until this end."""
    received = b""
    while not received.endswith(end):
        part = connection.recv(4096)
        assert part, received
        received += part
    return received


@pytest.mark.parametrize("sent", [b"", b"GET", HEAD, HEAD + b"x: " + b"y" * 1000])
def test_a_connection_without_complete_headers_is_closed(port: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        reply, seconds = received_until_closed(connection)
        assert reply.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert SECONDS / 2 < seconds < 10 * SECONDS


@pytest.mark.parametrize("field", [b"x: y\r\n" * 100_000, b"x: " + b"y" * 500_000])
def test_headers_without_end_are_refused(port: int, field: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        try:
            connection.sendall(HEAD + field)
            reply, _ = received_until_closed(connection)
        except (BrokenPipeError, ConnectionResetError):  # the server stopped reading, and its reply is lost
            return
        assert reply == b"" or reply.startswith(b"HTTP/1.1 431 ")


def test_long_bodies_and_long_connections_are_no_long_headers(port: int) -> None:
    body = b"z" * (2 * header_timeout.HEADER_BYTES)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(3):
            connection.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            received_to(connection, b"ok")
        for _ in range(3):
            connection.sendall(HEAD + b"x: " + b"y" * (header_timeout.HEADER_BYTES // 2) + b"\r\n\r\n")
            received_to(connection, b"ok")


def test_headers_that_trickle_do_not_prolong_the_limit(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(SECONDS / 10)
        connection.sendall(HEAD)
        for _ in range(100):
            try:
                assert connection.recv(100).startswith(b"HTTP/1.1 408")
                return
            except TimeoutError:
                connection.sendall(b"x: y\r\n")
        raise AssertionError("the connection is still open")


def test_a_later_request_on_a_connection_has_the_limit_too(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(HEAD + b"\r\n")
        received_to(connection, b"ok")
        connection.sendall(b"GET / HT")
        reply, seconds = received_until_closed(connection)
        assert (reply, SECONDS / 2 < seconds < 10 * SECONDS) == (b"", True)


def test_a_body_or_a_websocket_may_take_longer_than_headers(port: int) -> None:
    with (
        socket.create_connection(("127.0.0.1", port)) as slow,
        socket.create_connection(("127.0.0.1", port)) as upgraded,
        socket.create_connection(("127.0.0.1", port)) as never,
    ):
        slow.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\na")
        key = b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        upgraded.sendall(HEAD + b"connection: upgrade\r\nupgrade: websocket\r\n" + key + b"\r\n")
        assert received_to(upgraded, b"\r\n\r\n").startswith(b"HTTP/1.1 101")
        received_until_closed(never)
        slow.sendall(b"bc")
        received_to(slow, b"ok")
        upgraded.sendall(b"\x82\x81\x00\x00\x00\x00x")
        received_to(upgraded, b"\x82\x01x")
