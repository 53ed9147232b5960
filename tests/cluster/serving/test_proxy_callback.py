"""What the middleware of Serve's proxy changes: the 404 of a proxy without routes, and nothing else."""

import anyio
import httpx2 as httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ragtune_ray.cluster.serving import header_timeout, proxy_callback

NO_ROUTE = "Path '/v1/models' not found. Ping http://.../-/routes for available routes."


def reply_through(response: Response) -> httpx.Response:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await response(scope, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=proxy_callback.UnreadyProxy(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get("/v1/models")

    return anyio.run(ask)


def test_a_proxy_without_routes_asks_the_client_to_come_back() -> None:
    reply = reply_through(PlainTextResponse(NO_ROUTE, 404))
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["code"] == "starting"


@pytest.mark.parametrize(
    "response",
    [
        JSONResponse({"error": {"message": "no such model"}}, 404),
        PlainTextResponse(NO_ROUTE, 200),
        StreamingResponse(iter(["a", "b"]), 404),
        Response(status_code=404),
    ],
)
def test_every_other_reply_passes_unchanged(response: Response) -> None:
    reply = reply_through(response)
    assert reply.status_code == response.status_code
    assert "retry-after" not in reply.headers


def test_serve_words_its_404_as_we_expect() -> None:
    from ray.serve._private.proxy import HTTPProxy

    constants = HTTPProxy.not_found_response.__code__.co_consts
    assert any(isinstance(constant, str) and constant.startswith("Path '") for constant in constants)


def test_install_sets_the_time_limit_and_returns_the_middleware(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(header_timeout, "install", lambda: called.append(True))
    (middleware,) = proxy_callback.install()
    assert called == [True]
    assert middleware.cls is proxy_callback.UnreadyProxy
