"""The ingress replica of Ray Serve: accepts HTTP requests and calls the retriever and generator replicas.

If a replica dies during a call, the call is retried, unless the client has already received text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragtune_ray import config, schema
from ragtune_ray.cluster import session
from ragtune_ray.cluster.serving.replicas import ATTEMPTS, BACKOFF_SECONDS, DIED
from ragtune_ray.evaluation import adaptive
from ragtune_ray.index import filters
from ragtune_ray.serving import api_keys
from ragtune_ray.serving.admission import slots_per_replica
from ragtune_ray.serving.app import build_app
from ragtune_ray.serving.backend import (
    Change,
    Embedded,
    Event,
    Failed,
    Finished,
    Found,
    Job,
    Listed,
    Shown,
    Status,
)
from ragtune_ray.serving.hot_swap import HotSwap
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.telemetry import Telemetry

STATUS_SECONDS = 1.0
"""How long a status is cached, because anyone may send probes."""
BROADCAST_SECONDS = 3.0
NO_CALIBRATION = "none"

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class ServeBackend:
    """`backend.Backend` over the Serve handles of the retriever (None without an index) and the generator."""

    def __init__(self, settings: config.Config, retriever: Any | None, generator: Any) -> None:
        self._settings, self._retriever, self._generator = settings, retriever, generator
        self._streaming = generator.options(stream=True)
        # Requests for the generator wait here. Serve would offer each to full replicas every half second.
        limits = settings.serve.generator
        self._slots = asyncio.Semaphore(limits.max_replicas * slots_per_replica(limits))
        self._status: tuple[float, Status] = (0.0, Status(problems=("the state of the replicas is not known yet",)))
        self._status_lock, self._publish_lock = asyncio.Lock(), asyncio.Lock()
        self.telemetry: Telemetry | None = None

    async def retrieve(
        self, text: str, top_k: int, visible: filters.Filter, seconds: float, parts: Sequence[str] = ()
    ) -> Found:
        """The hits of one query."""
        deadline = time.monotonic() + seconds
        retriever = self._require_retriever()
        texts = (text, *parts)
        result: Found | Failed = await self._retry_if_died(
            "retriever", lambda: retriever.retrieve.remote(texts, top_k, visible, deadline - time.monotonic())
        )
        return _checked(result)

    async def write_searches(self, job: Job, seconds: float) -> schema.Searches:
        """The texts with which to search for the question of a job."""
        deadline = time.monotonic() + seconds
        async with self._slots:
            found: schema.Searches = await self._retry_if_died(
                "generator", lambda: self._generator.write_searches.remote(job, deadline - time.monotonic())
            )
        return found

    async def embed(self, texts: Sequence[str], input_type: str, seconds: float) -> Embedded:
        """The embeddings of texts."""
        retriever = self._require_retriever()
        call = self._retry_if_died("retriever", lambda: retriever.embed.remote(list(texts), input_type))
        async with asyncio.timeout(seconds):
            result: Embedded | Failed = await call
        return _checked(result)

    async def complete(self, job: Job, seconds: float) -> tuple[Shown, Finished] | Failed:
        """A complete answer."""
        deadline = time.monotonic() + seconds
        async with self._slots:
            result: tuple[Shown, Finished] | Failed = await self._retry_if_died(
                "generator", lambda: self._generator.complete.remote(job, deadline - time.monotonic())
            )
        return result

    async def stream(self, job: Job, seconds: float) -> AsyncGenerator[Event, None]:
        """The events of an answer; generation restarts if the replica dies before the client has received text."""
        deadline = time.monotonic() + seconds
        shown: Shown | None = None
        for attempt in range(ATTEMPTS):
            has_text = False
            try:
                async with contextlib.aclosing(self._events(job, deadline)) as events:
                    async for event in events:
                        if isinstance(event, Shown) and shown is not None:
                            if event != shown:
                                break  # another model, whose prompt has other passages than the client has received
                            continue
                        shown = event if isinstance(event, Shown) else shown
                        has_text = has_text or isinstance(event, str)
                        yield event
                    else:
                        return
            except DIED:
                pass
            if has_text:
                break
            await self._before_retry("generator", attempt)
        yield Failed(502, "the replica that was answering died; ask again", "replica_died")

    async def _events(self, job: Job, deadline: float) -> AsyncGenerator[Event, None]:
        """The events from one replica; closing this generator cancels the replica's work."""
        async with self._slots:
            response = self._streaming.stream.remote(job, deadline - time.monotonic())
            try:
                async for event in response:
                    yield event
            except DIED:
                raise
            except (RayError, RayServeException) as error:
                raise _client_error(error) from None
            finally:
                response.cancel()

    async def change_documents(self, change: Change, seconds: float) -> Mapping[str, Any]:
        """Publish an index version in a Ray task, then make the retrievers swap to it."""
        async with self._publish_lock:
            call = _publish.options(num_cpus=0, max_retries=2).remote(self._settings, change)
            try:
                async with asyncio.timeout(seconds):
                    result: dict[str, Any] | Failed = await call
            except RayError as error:
                logger.error("publishing documents failed: %s", type(error).__name__)  # noqa: TRY400  # the message may quote them
                message = "the documents could not be published; see the log of the task"
                raise ApiError(500, message, code="not_published") from None
        facts = _checked(result)
        serving = await self._broadcast(self._retriever, "refresh", seconds)
        return {**facts, "copies_that_serve_it": sum(each == facts["index_version"] for each in serving)}

    async def list_documents(self, visible: filters.Filter, after: str, limit: int, seconds: float) -> Listed:
        """A page of documents."""
        retriever = self._require_retriever()
        call = self._retry_if_died("retriever", lambda: retriever.list_documents.remote(visible, after, limit))
        async with asyncio.timeout(seconds):
            result: Listed | Failed = await call
        return _checked(result)

    async def status(self) -> Status:
        """The state of the replicas, at most `STATUS_SECONDS` old."""
        async with self._status_lock:
            updated, status = self._status
            if time.monotonic() - updated > STATUS_SECONDS:
                status = await self._fetch_status()
                self._status = (time.monotonic(), status)
            return status

    async def metrics_of_other_processes(self) -> list[bytes]:
        """The metrics that the other ingress replicas have counted."""
        if self._settings.serve.ingress.max_replicas == 1:
            return []
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        counted = await self._broadcast(handle, "counted", BROADCAST_SECONDS)
        return [text for name, text in counted if name != context.replica_tag]

    async def _fetch_status(self) -> Status:
        retrievers, generators = await asyncio.gather(
            self._broadcast(self._retriever, "status", BROADCAST_SECONDS),
            self._broadcast(self._generator, "status", BROADCAST_SECONDS),
        )
        problems = []
        if not retrievers and config.retrieves(self._settings.answer.arm):
            problems.append("no retriever replica has loaded its index")
        silent = sorted({number for each in retrievers for number in each.get("silent_shards", ())})
        problems.extend(f"shard {number} of the index does not answer" for number in silent)
        if not generators and self._settings.serve.generator.min_replicas:
            problems.append("no generator replica has loaded its model")
        return Status(tuple(retrievers), tuple(generators), tuple(problems))

    async def _broadcast(self, handle: Any, method: str, seconds: float) -> list[Any]:
        """The result of every replica that responds; empty if there is no deployment."""
        if handle is None:
            return []
        try:
            results = await handle.broadcast(method).results_async(timeout_s=seconds, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("calling %s on all replicas failed: %s", method, type(error).__name__)
            return []
        return [result for result in results if not isinstance(result, BaseException)]

    async def _retry_if_died(self, deployment: str, call: Callable[[], Any]) -> Any:
        for attempt in range(ATTEMPTS):
            response = call()
            try:
                return await response
            except DIED:
                if attempt == ATTEMPTS - 1:
                    raise _unavailable(f"no {deployment} replica can be reached; try again later") from None
                await self._before_retry(deployment, attempt)
            except (RayError, RayServeException) as error:
                raise _client_error(error) from None
            except BaseException:
                response.cancel()
                raise
        raise AssertionError("unreachable")

    async def _before_retry(self, deployment: str, attempt: int) -> None:
        if self.telemetry is not None:
            self.telemetry.retries.labels(deployment).inc()
        logger.warning("a %s replica died during a call; retrying", deployment)
        await asyncio.sleep(BACKOFF_SECONDS * 2**attempt)

    def _require_retriever(self) -> Any:
        if self._retriever is None:
            raise ApiError(409, "this endpoint has no index; run `ragtune index` and restart it", code="no_index")
        return self._retriever


def _checked(result: Result | Failed) -> Result:
    if isinstance(result, Failed):
        raise result.error()
    return result


def _client_error(error: Exception) -> Exception:
    if isinstance(error, BackPressureError):
        return ApiError(429, "too many requests are waiting; try again later", code="overloaded", retry_after_seconds=1)
    if isinstance(error, DeploymentUnavailableError):
        return _unavailable("a part of this endpoint is not available; try again later")
    if isinstance(error, RequestCancelledError | TaskCancelledError):
        return ApiError(499, "the request was cancelled", code="cancelled")
    return error


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", retry_after_seconds=2)


@ray.remote  # type: ignore[untyped-decorator]
def _publish(settings: config.Config, change: Change) -> dict[str, Any] | Failed:
    from ragtune_ray.cluster.serving.publishing import publish

    return publish(settings, change)


class _DisconnectMiddleware:
    """Turns Serve's exceptions for a disconnected client into ASGI's disconnect message."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except (TaskCancelledError, RequestCancelledError):
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_disconnect, send)


@serve.ingress()
class Ingress:
    """An ingress replica: API keys, limits and streams."""

    def __init__(self, settings: config.Config, retriever: Any | None, generator: Any) -> None:
        session.log_with_serve()
        self._backend = ServeBackend(settings, retriever, generator)
        self._calibration = HotSwap[adaptive.RetrievalCalibration | None](
            "calibration",
            latest=lambda: adaptive.current_calibration(settings) or NO_CALIBRATION,
            load=lambda url, _: None if url == NO_CALIBRATION else adaptive.load_calibration(url),
            fallbacks=lambda: [NO_CALIBRATION],
        )
        self._calibration.poll(settings.serve.poll_seconds)
        keys = api_keys.load_keys(settings)
        self._middleware = build_app(settings, self._backend, keys, lambda: self._calibration.resource)
        self._telemetry = self._backend.telemetry = self._middleware.telemetry

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Serve runs behind its proxy."""
        return _DisconnectMiddleware(self._middleware)

    async def drain(self) -> int:
        """Refuse new requests from now on; returns the number of requests in flight."""
        self._middleware.draining = True
        return self._middleware.in_flight

    def check_health(self) -> None:
        """Raise if the replica cannot continue; Serve then replaces it."""
        self._calibration.check_health()

    async def counted(self) -> tuple[str, bytes]:
        """The name of this replica, and the metrics that it has counted."""
        return serve.get_replica_context().replica_tag, self._telemetry.counted()
