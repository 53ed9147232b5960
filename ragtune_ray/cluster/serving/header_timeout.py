"""Closes connections to Ray Serve's proxy whose request headers do not arrive in time, or are too long.

The proxy is a uvicorn server, which waits for headers forever and keeps any number of them. Ray Serve has no setting for that.
"""

from __future__ import annotations

import asyncio

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
"""Time limit from a connection, or from the first byte of a further request on it, to the end of the request's headers."""
HEADER_BYTES = 65_536
"""Most bytes of a request before its headers are complete."""
_REPLY = b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def install() -> None:
    """Make uvicorn servers that start later in this process use `HeaderTimeoutProtocol`."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HeaderTimeoutProtocol.__name__}"


class HeaderTimeoutProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits for the time and the size of headers."""

    _timer: asyncio.TimerHandle | None = None
    _in_headers = False
    _num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def data_received(self, data: bytes) -> None:
        """Start the limits of a further request, or stop them if the headers are complete."""
        super().data_received(data)
        self._num_header_bytes = self._num_header_bytes + len(data) if self._in_headers else 0
        if self._num_header_bytes > HEADER_BYTES:
            self._close(b"431 Request Header Fields Too Large")
        elif not (self.cycle is None or self.cycle.response_complete):
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def on_message_begin(self) -> None:
        """Begin to count the bytes of a request's headers."""
        self._in_headers = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, but none after a body in chunks, of which there may be any number."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers have arrived."""
        self._in_headers = False
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self, status: bytes = b"408 Request Timeout") -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # it has become a WebSocket
            return
        if self.cycle is None:
            self.transport.write(_REPLY % status)
        self.transport.close()
