"""What the replicas share: hot-swapping, health checks, process setup, and how calls to lost replicas are repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError

from ragtune_ray.cluster import devices, session
from ragtune_ray.models import weights
from ragtune_ray.serving.hot_swap import HotSwap

TRIAL_QUESTION = "Is this a trial?"
"""Asked of a new index version or model before it is used."""

ATTEMPTS = 4
BACKOFF_SECONDS = 0.1
DIED = (RayActorError, ReplicaUnavailableError, AioRpcError)
"""The replica died during the call or could not be reached. Calls change nothing in a replica, so they can be retried."""


class SwappingReplica:
    """A replica that hot-swaps its index version or its models."""

    _current: HotSwap[Any]

    async def refresh(self) -> str:
        """Swap to the latest version now, even if it was refused before; returns the name of the version in use."""
        await asyncio.to_thread(self._current.refresh, retry=True)
        return self._current.name

    def check_health(self) -> None:
        """Raise if the replica cannot continue; Serve then replaces it."""
        self._current.check_health()

    def _refused(self) -> dict[str, str] | None:
        """The published version that failed to load, or None."""
        refused = self._current.refused
        return {"version": refused.name.strip('"[]').rstrip("/").rsplit("/", 1)[-1]} if refused else None

    def __del__(self) -> None:
        if hasattr(self, "_current"):
            self._current.stop()


def prepare_process(num_threads: int, models: Mapping[str, str] | None = None) -> None:
    """Set up the log, the devices, the number of threads and where models are; call it before loading a model."""
    session.log_with_serve()
    devices.use_reserved_devices()
    session.use_threads(max(1, num_threads))
    weights.use_staged(models or {})
