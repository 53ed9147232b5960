"""Something loaded under a name that changes, followed while it is used: an index version, a tuned model.

In: functions that say which name is meant now, load it beside what is held, and try it. Out: what to use, leased for the length
of one piece of work. A name that cannot be loaded or fails its trial is refused and reported, and the old one stays. The old
one is released when its last lease ends. This module knows nothing of indexes, models or Ray.
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

__all__ = ["FollowError", "Follower", "Lease", "Refusal"]

Held = TypeVar("Held")
RETRY_SECONDS = 30.0

logger = logging.getLogger(__name__)


class FollowError(RagtuneError):
    """The thread that looks for new versions has died."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A name that was not taken."""

    name: str
    reason: str
    """For the log: may hold paths."""
    since: float
    """Unix time."""


@dataclass(slots=True)
class Lease(Generic[Held]):
    """What is held under a name, and how many use it."""

    name: str
    held: Held
    users: int = 0
    is_current: bool = True


class Follower(Generic[Held]):
    """Holds what a name means, and changes to what it means next.

    Args:
        kind: what it is, for the log.
        latest: which name is meant now; cheap.
        load: loads a name, given what is held (None at first), and tries it; slow.
        release: frees what is no longer used; given exactly once for each that was loaded and taken.
        fallbacks: names to try, best first, where the latest cannot be loaded at the start.
    """

    def __init__(
        self,
        kind: str,
        latest: Callable[[], str],
        load: Callable[[str, Held | None], Held],
        release: Callable[[Held], None] = lambda _: None,
        fallbacks: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._kind, self._latest, self._load, self._release = kind, latest, load, release
        self.refused: Refusal | None = None
        """The name that was refused last, until another is taken."""
        self.num_swaps = 0
        self._changing, self._counting, self._stopped = threading.Lock(), threading.Lock(), threading.Event()
        self._current = self._first(fallbacks)
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """What is used now."""
        return self._current.name

    @property
    def held(self) -> Held:
        """What is used now, for a kind of which nothing is ever released."""
        return self._current.held

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease[Held]]:
        """What is current, for the length of the block: it is not released before, even if it is replaced."""
        with self._counting:
            lease = self._current
            lease.users += 1
        try:
            yield lease
        finally:
            with self._counting:
                lease.users -= 1
                ended = not lease.users and not lease.is_current
            if ended:
                self._release(lease.held)

    def refresh(self, *, again: bool = False) -> bool:
        """Look once; whether another is used now than before.

        Args:
            again: try a name that was refused anew, however short ago.
        """
        with self._changing:
            try:
                name = self._latest()
            except Exception as error:  # noqa: BLE001  # see _refuse
                self._refuse("", error)
                return False
            if name == self.name:
                self.refused = None
                return False
            refused = self.refused
            if refused and refused.name == name and not again and time.time() - refused.since < RETRY_SECONDS:
                return False
            return self._change(name)

    def follow(self, poll_seconds: float) -> None:
        """Look again and again in a thread of its own, until `stop`."""

        def run() -> None:
            while not self._stopped.wait(poll_seconds):
                self.refresh()

        self._thread = threading.Thread(target=run, name=f"follow-{self._kind}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Whether it still looks.

        Raises:
            FollowError: its thread has died.
        """
        if self._thread is not None and not self._thread.is_alive() and not self._stopped.is_set():
            raise FollowError(f"what follows the {self._kind} has died")

    def stop(self) -> None:
        """Look no more, and release what is held once its last lease ends."""
        self._stopped.set()
        with self._changing:
            self._retire(self._current)

    def _first(self, fallbacks: Callable[[], Sequence[str]]) -> Lease[Held]:
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

    def _change(self, name: str) -> bool:
        started = time.monotonic()
        try:
            held = self._load(name, self._current.held)
        except Exception as error:  # noqa: BLE001  # see _refuse
            self._refuse(name, error)
            return False
        old, self._current = self._current, Lease(name, held)
        self.refused = None
        self.num_swaps += 1
        logger.info("%s %s is used from now on, after %.1f s of loading", self._kind, name, time.monotonic() - started)
        self._retire(old)
        return True

    def _retire(self, lease: Lease[Held]) -> None:
        with self._counting:
            lease.is_current = False
            ended = not lease.users
        if ended:
            self._release(lease.held)

    def _refuse(self, name: str, error: Exception) -> None:
        """Whatever it is: stores, formats and templates have errors of their own, and for none is the old one given up."""
        if self.refused is None or (self.refused.name, self.refused.reason) != (name, str(error)):
            logger.error("%s %s is refused: %s: %s", self._kind, name, type(error).__name__, error)
        self.refused = Refusal(name, str(error), time.time())
