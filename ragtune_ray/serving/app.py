"""The endpoint as an ASGI application: its routes, and what each requires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

import ragtune_ray
from ragtune_ray import config
from ragtune_ray.evaluation import adaptive
from ragtune_ray.serving import mcp, requests
from ragtune_ray.serving.answers import Answerer
from ragtune_ray.serving.api_keys import Key, Keys, Right
from ragtune_ray.serving.backend import Backend
from ragtune_ray.serving.documents import PARAMETERS, DeletedDocuments, DocumentHandlers, DocumentsRequest
from ragtune_ray.serving.handlers import Handlers
from ragtune_ray.serving.middleware import INTERNAL_ERROR, AccessMiddleware, Route
from ragtune_ray.serving.openai.chat import ChatRequest, answer_chat
from ragtune_ray.serving.openai.completions import CompletionRequest, answer_completion
from ragtune_ray.serving.openai.embeddings import EmbeddingsRequest
from ragtune_ray.serving.openai.responses import ResponseRequest, answer_response
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.telemetry import Telemetry

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/script.js": ("script.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}

BodyHandler = Callable[[bytes, Key], Awaitable[Response]]
Handler = Callable[[], Awaitable[Response]]
QueryHandler = Callable[[Request, Key], Awaitable[Response]]


class McpMessage(BaseModel):
    """A message of the Model Context Protocol, version 2025-03-26 or later (streamable HTTP)."""

    jsonrpc: Literal["2.0"]
    method: str
    id: int | str | None = None
    params: dict[str, Any] | None = None


def build_app(
    settings: config.Config,
    backend: Backend,
    keys: Keys,
    calibration: Callable[[], adaptive.RetrievalCalibration | None],
) -> AccessMiddleware:
    """Build the ASGI application of the endpoint. Without keys, it serves only localhost.

    `calibration` is called for each request; see `Answerer`.
    """
    telemetry = Telemetry()
    answerer = Answerer(settings, backend, telemetry, calibration)
    handlers = Handlers(settings, backend, telemetry)
    documents = DocumentHandlers(settings, backend, handlers.load)
    app = FastAPI(title="ragtune-ray", version=ragtune_ray.__version__, docs_url=None, redoc_url=None)
    hosts, origins = settings.serve.allowed_hosts, settings.serve.allowed_origins
    middleware = AccessMiddleware(app, {}, keys, telemetry, allowed_hosts=hosts, allowed_origins=origins)
    max_bytes, max_document_bytes = settings.serve.max_body_bytes, settings.serve.max_document_bytes
    answering = Route("key", max_bytes, answerer.load)
    embedding = Route("key", settings.serve.max_embeddings_bytes, handlers.load)
    changing = Route("admin", max_document_bytes)

    async def ready() -> Response:
        return await handlers.ready(draining=middleware.draining)

    with_body: list[tuple[str, str, type[BaseModel], BodyHandler, Route]] = [
        ("POST", "/v1/chat/completions", ChatRequest, partial(answer_chat, answerer), answering),
        ("POST", "/v1/responses", ResponseRequest, partial(answer_response, answerer), answering),
        ("POST", "/v1/completions", CompletionRequest, partial(answer_completion, answerer), answering),
        ("POST", "/v1/embeddings", EmbeddingsRequest, handlers.embed, embedding),
        ("POST", "/v1/retrieve", requests.RetrieveRequest, handlers.retrieve, Route("key", max_bytes, handlers.load)),
        ("POST", "/v1/documents", DocumentsRequest, documents.upsert, changing),
        ("DELETE", "/v1/documents", DeletedDocuments, documents.delete, changing),
        ("POST", "/v1/documents/delete", DeletedDocuments, documents.delete, changing),  # proxies drop bodies of DELETE
        ("POST", "/mcp", McpMessage, partial(_answer_mcp, answerer, handlers), Route("key", max_bytes)),
    ]
    with_query: list[tuple[str, QueryHandler, dict[str, str], Route]] = [
        ("/v1/documents", documents.list_documents, PARAMETERS, Route("key", load=handlers.load)),
    ]
    without_body: list[tuple[str, Right, Handler]] = [
        ("/v1/models", "key", handlers.models),
        *((f"/v1/models/{name}", "key", handlers.model_handler(name)) for name in handlers.served_models()),
        ("/healthz", "public", _alive),
        ("/readyz", "public", ready),
        ("/version", "public", _version),
        ("/metrics", "admin", handlers.metrics),
        *((path, "public", _file(*file)) for path, file in PAGE_FILES.items()),
    ]
    for method, path, body, body_handler, _ in with_body:
        _add_with_body(app, method, path, body, body_handler)
    for path, query_handler, parameters, _ in with_query:
        _add_with_query(app, path, query_handler, parameters)
    for path, _, handler in without_body:
        app.add_api_route(path, handler, methods=["GET"], name=path)
    middleware.routes = {
        ("GET", "/openapi.json"): Route("public"),
        **{(method, path): route for method, path, _, _, route in with_body},
        **{("GET", path): route for path, _, _, route in with_query},
        **{("GET", path): Route(right) for path, right, _ in without_body},
    }
    _send_errors(app, telemetry)
    _describe_bodies(app, [body for _, _, body, _, _ in with_body])
    return middleware


def _add_with_body(app: FastAPI, method: str, path: str, body: type[BaseModel], handler: BodyHandler) -> None:
    async def handle(request: Request) -> Response:
        return await handler(request.state.body, request.state.key)

    reference = {"$ref": f"#/components/schemas/{body.__name__}"}
    described = {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}
    app.add_api_route(
        path, handle, methods=[method], summary=f"{method} {path}", name=body.__name__, openapi_extra=described
    )


def _add_with_query(app: FastAPI, path: str, handler: QueryHandler, parameters: dict[str, str]) -> None:
    async def handle(request: Request) -> Response:
        return await handler(request, request.state.key)

    described = [
        {"name": name, "in": "query", "required": False, "description": meaning, "schema": {"type": "string"}}
        for name, meaning in parameters.items()
    ]
    extra = {"parameters": described}
    app.add_api_route(path, handle, methods=["GET"], summary=f"GET {path}", name=path, openapi_extra=extra)


async def _answer_mcp(answerer: Answerer, handlers: Handlers, body: bytes, key: Key) -> Response:
    try:
        endpoint = await asyncio.to_thread(mcp.load, "endpoint")  # the first import takes a second
    except mcp.McpMissingError:
        message = "this endpoint has no MCP; its operator can add it by installing ragtune-ray[mcp]"
        raise ApiError(501, message, code="mcp_missing") from None
    response: Response = endpoint.McpResponse(endpoint.EndpointTools(answerer, handlers, key), body)
    return response


def _send_errors(app: FastAPI, telemetry: Telemetry) -> None:
    """Register handlers that send errors as OpenAI error objects and count them."""

    async def send(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        telemetry.refused.labels(error.code).inc()
        return JSONResponse(error.body(), error.status, error.headers())

    async def fail(_: Request, __: Exception) -> Response:  # Starlette raises it again, and the middleware logs it
        return JSONResponse(INTERNAL_ERROR.body(), INTERNAL_ERROR.status)

    app.add_exception_handler(ApiError, send)
    app.add_exception_handler(Exception, fail)


def _describe_bodies(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Add the request bodies to the OpenAPI schema; FastAPI cannot, because handlers parse them after the key check."""
    schemas = app.openapi().setdefault("components", {}).setdefault("schemas", {})
    for body in bodies:
        described = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(described.pop("$defs", {}))
        schemas[body.__name__] = described


def _file(name: str, media_type: str) -> Handler:
    content = resources.files("ragtune_ray.serving").joinpath("page", name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return send


async def _alive() -> Response:
    return JSONResponse({"alive": True})


async def _version() -> Response:
    return JSONResponse({"version": ragtune_ray.__version__})
