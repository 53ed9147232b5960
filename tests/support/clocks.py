"""An event loop whose clock jumps to the next timer when nothing else can happen, so that waiting costs no time."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")
HANG_SECONDS = 30


class _Jumping(selectors.DefaultSelector):
    """Instead of waiting for a timer, it sets the clock forward to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # no timer is set: only a thread or a socket can go on
            found = super().select(HANG_SECONDS)
            assert found, "every task waits for another one"
            return found
        found = super().select(0)
        if not found:
            self.now += max(0.0, timeout)
        return found


class JumpingLoop(asyncio.SelectorEventLoop):
    """The loop; `time()` is the seconds that would have passed."""

    def __init__(self) -> None:
        self._clock = _Jumping()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """The result of a coroutine in a `JumpingLoop`; inside, `asyncio.get_running_loop().time()` is the time."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work())
