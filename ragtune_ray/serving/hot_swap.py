"""Hot-swaps a resource (index version, model) while requests use it.

If a new version fails to load, it is refused and the old one stays in use. A replaced version is released after its last request.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ragtune_ray import RagtuneError

Resource = TypeVar("Resource")
RETRY_SECONDS = 30.0

logger = logging.getLogger(__name__)


class HotSwapError(RagtuneError):
    """The thread that polls for new versions has died."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A version that failed to load."""

    name: str
    reason: str
    """For the log; may contain paths."""
    since: float
    """In monotonic time, which no change of the clock affects."""


@dataclass(slots=True)
class Lease(Generic[Resource]):
    """A loaded resource, its name, and the number of its users."""

    name: str
    resource: Resource
    users: int = 0
    is_current: bool = True


class HotSwap(Generic[Resource]):
    """Keeps the latest version of a resource loaded.

    Args:
        kind: what the resource is, for the log.
        latest: returns the name of the latest version; called often, so it must be cheap.
        load: loads and tests the version with this name, given the one in use (None at the start); may be slow.
        release: frees a version; called exactly once for each that was in use.
        fallbacks: names to try, best first, if the latest fails to load at the start.
    """

    def __init__(
        self,
        kind: str,
        latest: Callable[[], str],
        load: Callable[[str, Resource | None], Resource],
        release: Callable[[Resource], None] = lambda _: None,
        fallbacks: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._kind, self._latest, self._load, self._release = kind, latest, load, release
        self.refused: Refusal | None = None
        """The last version that failed to load; None once another has been swapped in."""
        self._swapping, self._counting, self._stopped = threading.Lock(), threading.Lock(), threading.Event()
        self._current = self._load_first(fallbacks)
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """The name of the resource in use."""
        return self._current.name

    @property
    def resource(self) -> Resource:
        """The resource in use, without a lease; only for kinds that are never released."""
        return self._current.resource

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease[Resource]]:
        """The resource in use; even if it is replaced, it is released only after the block ends."""
        with self._counting:
            lease = self._current
            lease.users += 1
        try:
            yield lease
        finally:
            with self._counting:
                lease.users -= 1
                unused = not lease.users and not lease.is_current
            if unused:
                self._release(lease.resource)

    def refresh(self, *, retry: bool = False) -> bool:
        """Swap to the latest version if it is not in use; returns whether it swapped.

        A refused version is tried again after `RETRY_SECONDS`, or at once if `retry` is set.
        """
        with self._swapping:
            try:
                name = self._latest()
            except Exception as error:  # noqa: BLE001  # see _refuse
                self._refuse("", error)
                return False
            if name == self.name:
                self.refused = None
                return False
            refused = self.refused
            if refused and refused.name == name and not retry and time.monotonic() - refused.since < RETRY_SECONDS:
                return False
            return self._swap(name)

    def poll(self, interval_seconds: float) -> None:
        """Refresh at this interval, in a separate thread, until `stop`."""

        def run() -> None:
            while not self._stopped.wait(interval_seconds):
                self.refresh()

        self._thread = threading.Thread(target=run, name=f"poll-{self._kind}", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Raise HotSwapError if the polling thread has died."""
        if self._thread is not None and not self._thread.is_alive() and not self._stopped.is_set():
            raise HotSwapError(f"the thread that polls for a new {self._kind} has died")

    def stop(self) -> None:
        """Stop polling, and release the resource when its last lease ends; no effect if it was stopped before."""
        with self._swapping:
            if not self._stopped.is_set():
                self._stopped.set()
                self._retire(self._current)

    def _load_first(self, fallbacks: Callable[[], Sequence[str]]) -> Lease[Resource]:
        name = ""
        try:
            name = self._latest()
            return Lease(name, self._load(name, None))
        except Exception as error:
            self._refuse(name, error)
            for other in fallbacks():
                if other != name:
                    with contextlib.suppress(Exception):
                        return Lease(other, self._load(other, None))
            raise

    def _swap(self, name: str) -> bool:
        started = time.monotonic()
        try:
            resource = self._load(name, self._current.resource)
        except Exception as error:  # noqa: BLE001  # see _refuse
            self._refuse(name, error)
            return False
        old, self._current = self._current, Lease(name, resource)
        self.refused = None
        logger.info("now using %s %s, loaded in %.1f s", self._kind, name, time.monotonic() - started)
        self._retire(old)
        return True

    def _retire(self, lease: Lease[Resource]) -> None:
        with self._counting:
            lease.is_current = False
            unused = not lease.users
        if unused:
            self._release(lease.resource)

    def _refuse(self, name: str, error: Exception) -> None:
        """Log an error of any class: stores, file formats and templates raise their own, and none may end the service."""
        if self.refused is None or (self.refused.name, self.refused.reason) != (name, str(error)):
            logger.error("%s %s is refused: %s: %s", self._kind, name, type(error).__name__, error)
        self.refused = Refusal(name, str(error), time.monotonic())
