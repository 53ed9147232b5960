"""Ray Serve: the copy that takes HTTP requests, and its way to the copies that retrieve and generate.

In: requests from Serve's proxy. Out: the gateway's answers. Calls to a copy that died are made again as long as the client has
seen no text of theirs; what is over a deployment's limits becomes 429. This module knows nothing of prompts or indexes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragtune_ray import config
from ragtune_ray.cluster import session
from ragtune_ray.evaluation import adaptive
from ragtune_ray.index import filters
from ragtune_ray.serving import api_keys
from ragtune_ray.serving.admission import places
from ragtune_ray.serving.app import build_app
from ragtune_ray.serving.backend import Change, Embedded, Failed, Finished, Found, Job, Shown, Status
from ragtune_ray.serving.following import Follower
from ragtune_ray.serving.requests import ApiError
from ragtune_ray.serving.telemetry import Telemetry

__all__ = ["Ingress", "ServeBackend"]

ATTEMPTS = 4
BACKOFF_SECONDS = 0.1
STATUS_SECONDS = 1.0
"""So long a status counts as the present one: probes are many, and public."""
BROADCAST_SECONDS = 3.0
NO_CALIBRATION = "none"
# A copy died with the call in it, or could not be reached: nothing is known of the call, and all calls only read.
_DIED = (RayActorError, ReplicaUnavailableError, AioRpcError)

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class ServeBackend:
    """`backend.Backend` over the handles of two deployments.

    Args:
        settings: the whole tree.
        retriever: its handle; None where there is no index to serve.
        generator: its handle.
    """

    def __init__(self, settings: config.Config, retriever: Any | None, generator: Any) -> None:
        self._settings, self._retriever, self._generator = settings, retriever, generator
        self._streaming = generator.options(stream=True)
        # Who waits for a place waits here: Serve would send each waiting request to a full copy, again and again, and look for a
        # free place every half second only.
        held = settings.serve.generator
        self._places = asyncio.Semaphore(held.max_replicas * places(held))
        self._status: tuple[float, Status] = (0.0, Status(problems=("no copy has been asked yet",)))
        self._asking, self._publishing = asyncio.Lock(), asyncio.Lock()
        self.telemetry: Telemetry | None = None

    async def retrieve(self, text: str, top_k: int, chosen: filters.Filter, seconds: float) -> Found:
        """The hits of one query."""
        deadline = time.monotonic() + seconds
        retriever = self._needed_retriever()
        result: Found | Failed = await self._again_if_died(
            "retriever", lambda: retriever.retrieve.remote(text, top_k, chosen, deadline - time.monotonic())
        )
        return _sound(result)

    async def embed(self, texts: Sequence[str], input_type: str, seconds: float) -> Embedded:
        """Vectors of texts."""
        retriever = self._needed_retriever()
        call = self._again_if_died("retriever", lambda: retriever.embed.remote(list(texts), input_type))
        result: Embedded | Failed = await asyncio.wait_for(call, seconds)
        return _sound(result)

    async def complete(self, job: Job, seconds: float) -> tuple[Shown, Finished] | Failed:
        """An answer at once."""
        deadline = time.monotonic() + seconds
        async with self._places:
            result: tuple[Shown, Finished] | Failed = await self._again_if_died(
                "generator", lambda: self._generator.complete.remote(job, deadline - time.monotonic())
            )
        return result

    async def stream(self, job: Job, seconds: float) -> AsyncGenerator[Shown | str | Finished | Failed, None]:
        """An answer as it is generated; begun anew where its copy dies before the client has seen text."""
        deadline = time.monotonic() + seconds
        shown: Shown | None = None
        for attempt in range(ATTEMPTS):
            has_text = False
            try:
                async with contextlib.aclosing(self._events(job, deadline)) as events:
                    async for event in events:
                        if isinstance(event, Shown) and shown is not None:
                            if event != shown:
                                break  # another model, which sees other passages than the client was told
                            continue
                        shown = event if isinstance(event, Shown) else shown
                        has_text = has_text or isinstance(event, str)
                        yield event
                    else:
                        return
            except _DIED:
                pass
            if has_text:
                break
            await self._before_again("generator", attempt)
        yield Failed(502, "the copy that was answering died; ask again", "replica_died")

    async def _events(self, job: Job, deadline: float) -> AsyncGenerator[Shown | str | Finished | Failed, None]:
        """What one copy sends. Left early, the copy stops."""
        async with self._places:
            response = self._streaming.stream.remote(job, deadline - time.monotonic())
            try:
                async for event in response:
                    yield event
            except _DIED:
                raise
            except (RayError, RayServeException) as error:
                raise _refusal_of(error) from None
            finally:
                response.cancel()

    async def change_documents(self, change: Change, seconds: float) -> Mapping[str, Any]:
        """Publish a version in a task of its own, then tell the retrievers of it."""
        async with self._publishing:
            call = _publish.options(num_cpus=0, max_retries=2).remote(self._settings, change)
            try:
                name, facts = await asyncio.wait_for(call, seconds)
            except RayError as error:
                logger.error("documents could not be published: %s", type(error).__name__)  # noqa: TRY400  # no content
                raise ApiError(
                    422, "the documents could not be published; the log of the task says why", code="not_published"
                ) from None
        serving = await self._broadcast(self._retriever, "refresh", seconds) if self._retriever else []
        return {"index_version": name, **facts, "copies_that_serve_it": sum(each == name for each in serving)}

    async def status(self) -> Status:
        """How the copies stand, at most a second ago."""
        async with self._asking:
            since, status = self._status
            if time.monotonic() - since > STATUS_SECONDS:
                status = await self._asked_status()
                self._status = (time.monotonic(), status)
            return status

    async def counted_elsewhere(self) -> list[bytes]:
        """What the other copies of the ingress have counted."""
        if self._settings.serve.ingress.max_replicas == 1:
            return []
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        counted = await self._broadcast(handle, "counted", BROADCAST_SECONDS)
        return [text for name, text in counted if name != context.replica_tag]

    async def _asked_status(self) -> Status:
        retrievers, generators = await asyncio.gather(
            self._broadcast(self._retriever, "status", BROADCAST_SECONDS) if self._retriever else _nothing(),
            self._broadcast(self._generator, "status", BROADCAST_SECONDS),
        )
        problems = []
        if not retrievers and config.retrieves(self._settings.answer.arm):
            problems.append("no retriever has its index loaded")
        if not generators and self._settings.serve.generator.min_replicas:
            problems.append("no generator has its model loaded")
        return Status(tuple(retrievers), tuple(generators), tuple(problems))

    async def _broadcast(self, handle: Any, method: str, seconds: float) -> list[Any]:
        """What every copy answers; one that cannot be asked is left out."""
        try:
            call = handle.broadcast(method).results_async(timeout_s=seconds, return_exceptions=True)
            results = await call
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("the copies could not be asked for %s: %s", method, type(error).__name__)
            return []
        return [result for result in results if not isinstance(result, BaseException)]

    async def _again_if_died(self, deployment: str, call: Callable[[], Any]) -> Any:
        for attempt in range(ATTEMPTS):
            response = call()
            try:
                return await response
            except _DIED:
                if attempt == ATTEMPTS - 1:
                    raise ApiError(
                        503, f"no {deployment} can be reached", code="unavailable", retry_after_seconds=2
                    ) from None
                await self._before_again(deployment, attempt)
            except (RayError, RayServeException) as error:
                raise _refusal_of(error) from None
            except BaseException:
                response.cancel()
                raise
        raise AssertionError("unreachable")

    async def _before_again(self, deployment: str, attempt: int) -> None:
        if self.telemetry is not None:
            self.telemetry.retries.labels(deployment).inc()
        logger.warning("a %s died with a call in it; the call is made again", deployment)
        await asyncio.sleep(BACKOFF_SECONDS * 2**attempt)

    def _needed_retriever(self) -> Any:
        if self._retriever is None:
            raise ApiError(409, "this endpoint serves no index", code="no_index")
        return self._retriever


def _sound(result: Result | Failed) -> Result:
    if isinstance(result, Failed):
        raise ApiError(result.status, result.message, code=result.code, retry_after_seconds=result.retry_after_seconds)
    return result


def _refusal_of(error: Exception) -> Exception:
    """What the client gets for what Ray or Serve raised."""
    if isinstance(error, BackPressureError):
        return ApiError(429, "more requests wait than may; try again later", code="overloaded", retry_after_seconds=1)
    if isinstance(error, DeploymentUnavailableError):
        return ApiError(503, "a deployment is not there", code="unavailable", retry_after_seconds=2)
    if isinstance(error, RequestCancelledError | TaskCancelledError):
        return ApiError(499, "the request was cancelled", code="cancelled")
    return error


async def _nothing() -> list[Any]:
    return []


@ray.remote  # type: ignore[untyped-decorator]
def _publish(settings: config.Config, change: Change) -> tuple[str, dict[str, Any]]:
    """Upsert or delete, in a process that ends; a version's name and what changed."""
    from ragtune_ray.cluster.indexing.update import delete_documents, upsert_documents
    from ragtune_ray.index import versions

    if change.deleted:
        url = delete_documents(settings, change.deleted)
    else:
        with tempfile.TemporaryDirectory(prefix="ragtune-documents-") as folder:
            path = Path(folder) / "documents.jsonl"
            path.write_text("".join(json.dumps(dict(row)) + "\n" for row in change.upserted), encoding="utf-8")
            # The copies of the endpoint may hold all cores, and then a task of Ray Data would never get one.
            url = upsert_documents(settings.with_values({"corpus.path": ""}), str(path), in_process=True)
    name = str(url).rstrip("/").rsplit("/", 1)[-1]
    manifest = versions.read_version(settings.workspace, name).manifest
    return name, {"change": manifest.get("change", {}), "num_rejects": manifest.get("num_rejects", 0)}


class _LeavingClients:
    """ASGI middleware: what Serve raises where a client has left becomes the message that ASGI has for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            try:
                return await receive()
            except (TaskCancelledError, RequestCancelledError):
                return {"type": "http.disconnect"}

        await self._app(scope, received, send)


@serve.ingress()
class Ingress:
    """One copy of the ingress: keys, limits and streams."""

    def __init__(self, settings: config.Config, retriever: Any | None, generator: Any) -> None:
        session.log_with_serve()
        self._backend = ServeBackend(settings, retriever, generator)
        self._calibrations = Follower[adaptive.Calibration | None](
            "calibration",
            latest=lambda: adaptive.current_calibration(settings) or NO_CALIBRATION,
            load=lambda url, _: None if url == NO_CALIBRATION else adaptive.load_calibration(url),
            fallbacks=lambda: [NO_CALIBRATION],
        )
        self._calibrations.follow(settings.serve.poll_seconds)
        self._keeper, gateway = build_app(
            settings, self._backend, api_keys.load_keys(settings), lambda: self._calibrations.held
        )
        self._telemetry = self._backend.telemetry = gateway.telemetry

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Serve puts behind its proxy."""
        return _LeavingClients(self._keeper)

    async def drain(self) -> int:
        """Refuse what is new from now on; how many requests are still under way."""
        self._keeper.draining = True
        return self._keeper.in_flight

    def check_health(self) -> None:
        """Whether the copy can go on; Serve replaces it where this raises."""
        self._calibrations.check()

    async def counted(self) -> tuple[str, bytes]:
        """This copy's name, and what it has counted."""
        return serve.get_replica_context().replica_tag, self._telemetry.counted()
