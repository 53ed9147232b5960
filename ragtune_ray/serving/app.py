"""The endpoint as a FastAPI application: which path leads to what, who may take it, and what each is described as.

In: a backend, and who may ask. Out: an ASGI application. This module knows nothing of what a route does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

import ragtune_ray
from ragtune_ray import config
from ragtune_ray.evaluation import adaptive
from ragtune_ray.serving import requests
from ragtune_ray.serving.admission import Load
from ragtune_ray.serving.api_keys import Key, Keys, Right
from ragtune_ray.serving.backend import Backend
from ragtune_ray.serving.handlers import Gateway
from ragtune_ray.serving.middleware import INTERNAL_ERROR, Gatekeeper, Route
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.telemetry import Telemetry

__all__ = ["PAGE_FILES", "build_app"]

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/script.js": ("script.js", "text/javascript; charset=utf-8"),
}

Act = Callable[[bytes, Key], Awaitable[Response]]


def build_app(
    settings: config.Config,
    backend: Backend,
    keys: Keys,
    calibration: Callable[[], adaptive.Calibration | None],
) -> tuple[Gatekeeper, Gateway]:
    """The ASGI application of the endpoint.

    Args:
        settings: the whole tree.
        backend: retrieves and generates.
        keys: who may ask.
        calibration: when an answer needs no retrieval, asked for each request; see `Gateway`.

    Returns:
        The application, whose attribute `draining` may be set; and what its routes do.
    """
    telemetry = Telemetry()
    gateway = Gateway(settings, backend, telemetry, calibration)
    limits = settings.serve
    app = FastAPI(title="ragtune-ray", version=ragtune_ray.__version__, docs_url=None, redoc_url=None)
    keeper = Gatekeeper(app, {}, keys, telemetry)

    _answer_errors(app, telemetry)
    routes: dict[tuple[str, str], Route] = {("GET", "/openapi.json"): Route("public")}

    def post(
        path: str,
        kind: type[BaseModel],
        act: Act,
        *,
        method: str = "POST",
        admin: bool = False,
        load: Load | None = None,
    ) -> None:
        size = limits.max_document_bytes if admin else limits.max_body_bytes
        routes[method, path] = Route("admin" if admin else "key", size, load)

        async def handle(request: Request) -> Response:
            return await act(request.state.body, request.state.key)

        app.add_api_route(
            path, handle, methods=[method], summary=act.__doc__, name=kind.__name__, openapi_extra=_taking(kind)
        )

    def get(path: str, right: Right, act: Callable[[], Awaitable[Response]]) -> None:
        routes["GET", path] = Route(right)

        async def handle() -> Response:
            return await act()

        app.add_api_route(path, handle, methods=["GET"], name=path)

    post("/v1/chat/completions", requests.ChatRequest, gateway.chat, load=gateway.generating)
    post("/v1/retrieve", requests.RetrieveRequest, gateway.retrieve, load=gateway.retrieving)
    post("/v1/embeddings", requests.EmbeddingsRequest, gateway.embed, load=gateway.retrieving)
    post("/v1/documents", requests.DocumentsRequest, gateway.upsert, admin=True)
    post("/v1/documents", requests.DeletedDocuments, gateway.delete, method="DELETE", admin=True)
    get("/v1/models", "key", gateway.models)
    get("/healthz", "public", _alive)
    get("/readyz", "public", lambda: gateway.ready(draining=keeper.draining))
    get("/version", "public", _version)
    get("/metrics", "admin", gateway.metrics)
    for path, (name, media_type) in PAGE_FILES.items():
        get(path, "public", _file(name, media_type))
    keeper.routes = routes
    _describe_bodies(app)
    return keeper, gateway


def _answer_errors(app: FastAPI, telemetry: Telemetry) -> None:
    """Errors as OpenAI's objects, counted."""

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        telemetry.refused.labels(error.code).inc()
        return JSONResponse(error.body(), error.status, error.headers())

    async def fail(_: Request, __: Exception) -> Response:  # the exception goes on to the gatekeeper, which logs it
        return JSONResponse(INTERNAL_ERROR.body(), INTERNAL_ERROR.status)

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(Exception, fail)


def _taking(kind: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _describe_bodies(app: FastAPI) -> None:
    """Bodies are parsed by hand, after the key was checked; the schema must still say what they are."""
    made = app.openapi()
    parts = made.setdefault("components", {}).setdefault("schemas", {})
    for kind in (
        requests.ChatRequest,
        requests.RetrieveRequest,
        requests.EmbeddingsRequest,
        requests.DocumentsRequest,
        requests.DeletedDocuments,
    ):
        described = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        parts.update(described.pop("$defs", {}))
        parts[kind.__name__] = described


def _file(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    content = resources.files("ragtune_ray.serving").joinpath("page", name).read_bytes()

    async def give() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return give


async def _alive() -> Response:
    return JSONResponse({"alive": True})


async def _version() -> Response:
    return JSONResponse({"version": ragtune_ray.__version__})
