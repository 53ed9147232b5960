"""What Ray Serve's proxy runs before it starts its server: `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `install`.

`environment.SERVE_ENVIRONMENT` sets that variable.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragtune_ray.cluster.serving import header_timeout
from ragtune_ray.serving.requests import ApiError

_NO_ROUTE = b"Path '"
"""Begins the text that Serve's proxy sends with 404; the endpoint's own errors are JSON."""


def install() -> list[Middleware]:
    """Limit the time for headers in servers that start later in this process; returns the middleware for the proxy."""
    header_timeout.install()
    return [Middleware(UnreadyProxy)]


class UnreadyProxy:
    """Replies 503 with Retry-After where a proxy that was restarted does not know the application yet.

    The proxy replies 404 to every path until it has received its routes, and clients do not repeat a request after a 404. The
    application is mounted at `/`, so its routes never lack a path afterwards.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on but that reply."""
        held: Message | None = None
        is_replaced = False

        async def checked(message: Message) -> None:
            nonlocal held, is_replaced
            if is_replaced:
                return
            if message["type"] == "http.response.start" and message["status"] == 404:
                held = message  # its body tells whose 404 this is
                return
            if held is not None:
                start, held = held, None
                if message.get("body", b"").startswith(_NO_ROUTE):
                    is_replaced = True
                    await _not_ready(scope, receive, send)
                    return
                await send(start)
            await send(message)

        await self._app(scope, receive, checked if scope["type"] == "http" else send)


async def _not_ready(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        503, "the endpoint is starting on this machine; try again in a second", code="starting", retry_after_seconds=1
    )
    await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
