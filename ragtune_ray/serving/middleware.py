"""ASGI middleware that checks keys, limits and headers before a body is parsed.

Handlers find the key and the body in `request.state`. Without API keys, a request must come from localhost and be addressed to
localhost, which keeps out web pages that use DNS rebinding.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragtune_ray import config
from ragtune_ray.generation.openai_client import is_loopback
from ragtune_ray.serving.admission import Load
from ragtune_ray.serving.api_keys import ANYONE, Key, Keys, Right, Usage
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.telemetry import Telemetry

INTERNAL_ERROR = ApiError(500, "internal error; see the log of the endpoint", code="internal_error")
POLICY_VIOLATION = 1008
PROBES = ("/healthz", "/readyz")
"""Routes that, with keys, may be addressed to any name, since probes use the address of the machine."""
BODY_SECONDS = 10.0
"""Time limit for receiving a body."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """What a route requires."""

    right: Right
    max_body_bytes: int = 0
    """0: the route takes no body."""
    load: Load | None = None
    """When this is full, requests are refused before their body is read. None: never refused for load."""

    @property
    def is_work(self) -> bool:
        """Whether its requests count towards the limits of their key, and are refused while the endpoint shuts down."""
        return bool(self.max_body_bytes) or self.load is not None


@dataclass(slots=True)
class AccessMiddleware:
    """Admits requests to an application. While `draining` is set, new requests are refused; running ones may finish."""

    app: ASGIApp
    routes: Mapping[tuple[str, str], Route]
    """By (method, path); any other path is answered with 404."""
    keys: Keys
    telemetry: Telemetry
    usage: Usage = field(default_factory=Usage)
    draining: bool = False
    in_flight: int = 0
    allowed_hosts: Sequence[str] = ()
    """Names that a request may be addressed to, besides localhost; empty: any with keys, none without."""
    allowed_origins: Sequence[str] = ()
    """Origins of other sites whose web pages may use the endpoint."""
    cors: ASGIApp | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.allowed_origins:
            self.cors = CORSMiddleware(
                self._serve,
                allow_origins=self.allowed_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["Retry-After", "Mcp-Session-Id"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._refuse_websocket(receive, send)
        elif self.cors is not None:
            await self.cors(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _refuse_websocket(self, receive: Receive, send: Send) -> None:
        """Close a WebSocket before it is accepted, which the client sees as 403; there are no WebSocket routes."""
        await receive()
        self.telemetry.refused.labels("no_websockets").inc()
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": "this endpoint has no WebSockets"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["path"] = scope["path"].rstrip("/") or "/"  # a client that joins URLs may add a slash
        reply = _Reply(send)
        started = time.monotonic()
        path = scope["path"] if any(path == scope["path"] for _, path in self.routes) else "other"
        try:
            await self._admit(scope, receive, reply)
        except ApiError as error:
            self.telemetry.refused.labels(error.code).inc()
            await reply.error(error, scope, receive)
        except asyncio.CancelledError:
            reply.status = reply.status or 499
            raise
        except Exception as error:  # noqa: BLE001  # at the outer boundary, any exception becomes an error object
            logger.error(  # noqa: TRY400  # the exception's message may quote a question
                "%s %s failed: %s", scope["method"], path, traceback_without_message(error)
            )
            await reply.error(INTERNAL_ERROR, scope, receive)
        finally:
            if not reply.is_complete:
                self.telemetry.cancelled.inc()
            self.telemetry.requests.labels(path, str(reply.status)).inc()
            self.telemetry.seconds.labels(path).observe(time.monotonic() - started)

    async def _admit(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        headers = Headers(scope=scope)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = scope["path"]
        route = self.routes.get((method, path))
        if route is None:
            allowed = sorted(known for known, known_path in self.routes if known_path == path)
            if allowed:
                raise ApiError(405, f"this path supports only {' and '.join(allowed)}", code="method_not_allowed")
            raise ApiError(404, "this path does not exist; GET /openapi.json lists those that do", code="not_found")
        scope = {**scope, "method": method}  # a copy: servers leave the body of a HEAD request out by theirs
        if not self.keys or path not in PROBES:
            self._check_host(headers)
        key = self._authenticated_key(scope, headers, route.right)
        if self.draining and route.is_work:
            raise ApiError(503, "this endpoint is shutting down", code="draining", retry_after_seconds=5)
        scope.setdefault("state", {})["key"] = key
        if not route.is_work:
            await self.app(scope, receive, reply)
            return
        self.usage.enter(key)
        self.in_flight += 1
        try:
            with self.telemetry.running.track_inprogress():
                if route.load is not None:
                    route.load.refuse_if_full()
                if route.max_body_bytes:
                    scope["state"]["body"] = await _read_body(receive, headers, route.max_body_bytes)
                await self.app(scope, receive, reply)
        finally:
            self.in_flight -= 1
            self.usage.leave(key)

    def _check_host(self, headers: Headers) -> None:
        """Refuse a request that is addressed to another name than the allowed ones."""
        host = headers.get("host", "")
        if (self.allowed_hosts or not self.keys) and not (is_loopback(host) or _is_allowed(host, self.allowed_hosts)):
            if self.keys:
                raise ApiError(400, "this host name is not served; see serve.allowed_hosts", code="unknown_host")
            raise _keys_required()

    def _authenticated_key(self, scope: Scope, headers: Headers, right: Right) -> Key:
        if not self.keys:
            _require_localhost(scope, headers)
            return ANYONE
        if right == "public":
            return ANYONE
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        found = self.keys.find(presented.strip()) if scheme.casefold() == "bearer" else None
        if found is None:
            raise ApiError(
                401, "no valid API key; send one in the header Authorization: Bearer KEY", code="invalid_api_key"
            )
        if right == "admin" and not found.admin:
            raise ApiError(403, "admin key required", code="admin_only")
        return found


def _require_localhost(scope: Scope, headers: Headers) -> None:
    client = (scope.get("client") or ("", 0))[0]
    forwarded = {"forwarded", "x-forwarded-for", "x-real-ip"} & set(headers.keys())
    if not is_loopback(client) or forwarded:
        raise _keys_required()


def _keys_required() -> ApiError:
    message = "without API keys, only requests from localhost are served; set serve.keys_path"
    return ApiError(403, message, code="keys_required")


def _is_allowed(host: str, allowed: Sequence[str]) -> bool:
    """Whether the value of a Host header is one of these names; `*.example.com` means all names below example.com.

    >>> _is_allowed("a.example.com:8000", ["*.example.com"]), _is_allowed("example.com", ["*.example.com"])
    (True, False)
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    name = name.strip("[]").rstrip(".").casefold()
    return any(name == each or (each.startswith("*.") and name.endswith(each[1:])) for each in allowed)


async def _read_body(receive: Receive, headers: Headers, max_bytes: int) -> bytes:
    if headers.get("content-type", "").partition(";")[0].strip().casefold() != "application/json":
        # A browser sends other types to other origins without a preflight request.
        raise ApiError(415, "Content-Type must be application/json", code="unsupported_media_type")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "compressed bodies are not supported; send plain JSON", code="unsupported_encoding")
    too_long = ApiError(413, f"the body is larger than {max_bytes:,} bytes", code="body_too_long")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 20 or int(length) > max_bytes:
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the body ended early", code="incomplete_body")
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                if size > max_bytes:
                    raise too_long
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", code="body_timeout") from None


def traceback_without_message(error: BaseException) -> str:
    """An exception's type and call stack for the log, without its message, which may quote a question or document."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return " < ".join([type(error).__name__, *(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(frames))])


@dataclass(slots=True)
class _Reply:
    """Sends the response and adds the security headers."""

    send: Send
    status: int = 0
    is_complete: bool = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body")
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self.send(message)

    async def error(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Send an error object, unless a response has already begun."""
        if self.status:
            return
        challenge = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        await JSONResponse(error.body(), error.status, {**error.headers(), **challenge})(scope, receive, self)


def check_exposure(settings: config.Config, keys: Keys) -> None:
    """Raise ConfigError if without keys `serve.host` is a public address, or web pages of any site are allowed."""
    if not keys and "*" in settings.serve.allowed_origins:
        raise config.ConfigError(
            "serve.allowed_origins '*' lets every web page use this endpoint, but no API keys are configured; set "
            f"serve.keys_path or the environment variable {settings.serve.keys_env}, or name the origins"
        )
    if not keys and not is_loopback(settings.serve.host):
        raise config.ConfigError(
            f"serve.host {settings.serve.host!r} is open to other machines, but no API keys are configured; set "
            f"serve.keys_path or the environment variable {settings.serve.keys_env}"
        )
