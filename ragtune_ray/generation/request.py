"""A request on its way: text as it comes, its end, and ways to wait for both from threads and from asyncio.

In: a row to be decoded. Out: pieces of text, then a completion or the reason why there is none. This module knows nothing of
models, queues or HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal

from ragtune_ray import RagtuneError
from ragtune_ray.generation.interface import Completion
from ragtune_ray.generation.sampling import Row

__all__ = ["Overloaded", "Reason", "Request", "RequestFailed"]

Reason = Literal["deadline", "cancelled", "failed"]


class Overloaded(RagtuneError, RuntimeError):  # noqa: N818 - a state of the generator, no mistake
    """A request is not taken now: the queue is full, or the generator closes; another time or replica may take it."""


class RequestFailed(RagtuneError, RuntimeError):  # noqa: N818 - an end of a request, no mistake
    """A request has no completion.

    Args:
        reason: `deadline`: its time ran out; `cancelled`: whoever asked has left; `failed`: the message says what happened.
        message: for a person.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both, so that it survives pickling on its way between processes
        self.reason: Reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


class Request:
    """One prompt that is being answered; every method may be called from any thread.

    Args:
        row: the prompt, and what is generated for it.
        deadline_seconds: from now; 0: none.
        adapter: the name of the LoRA adapter that answers; "" is the model as it is.
    """

    def __init__(self, row: Row, *, deadline_seconds: float = 0.0, adapter: str = "") -> None:
        self.row = row
        self.adapter = adapter
        self._deadline_seconds = deadline_seconds
        self._started = time.monotonic()
        self._changed = threading.Condition()
        self._text = ""
        self._end: Completion | tuple[Reason, str] | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_over(self) -> bool:
        """Whether it has its end, a good one or not."""
        return self._end is not None

    @property
    def failure(self) -> Reason | None:
        """Why it has no completion; None when it has one or still goes on."""
        end = self._end
        return end[0] if isinstance(end, tuple) else None

    def expire(self) -> bool:
        """For the one who decodes: end it if its deadline has passed, and say whether it is over."""
        if 0 < self._deadline_seconds <= time.monotonic() - self._started:
            self.fail("deadline", f"no answer within {self._deadline_seconds:g} seconds")
        return self.is_over

    def pieces(self) -> Iterator[str]:
        """Settled text as it comes; the pieces add up to the completion's text. Left early, the request is cancelled.

        Raises:
            RequestFailed: in place of an end.
        """
        shown = 0
        try:
            while True:
                piece = self._wait(shown)
                if not piece:
                    break
                shown += len(piece)
                yield piece
        finally:
            self.cancel()
        self._result()

    async def apieces(self) -> AsyncIterator[str]:
        """The same for asyncio, whose loop is never blocked."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            try:
                loop.call_soon_threadsafe(changed.set)
            except RuntimeError:  # the loop was closed: nobody reads any more
                self.cancel()

        with self._changed:
            self._listeners.append(listener)
        shown = 0
        try:
            while True:
                changed.clear()
                over, piece = self.is_over, self._text[shown:]
                if piece:
                    shown += len(piece)
                    yield piece
                elif over:
                    break
                else:
                    await changed.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)
            self.cancel()
        self._result()

    def completion(self) -> Completion:
        """Wait for the end.

        Raises:
            RequestFailed: there is no completion.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.is_over)
        return self._result()

    def cancel(self) -> None:
        """Whoever asked has left: nothing more is computed. Without effect on a request that is over."""
        self.fail("cancelled", "the request was cancelled")

    def advance(self) -> None:
        """For the one who decodes: the row has changed; its text is shown, and its end where it has come to it."""
        row = self.row
        end = None
        if row.finish is not None:
            end = row.completion(time.monotonic() - self._started)
        self._change(row.text, end)

    def fail(self, reason: Reason, message: str) -> None:
        """For the one who decodes: it ends here; without effect on a request that is over."""
        self._change(self._text, (reason, message))

    def _wait(self, shown: int) -> str:
        """The text behind its first `shown` characters, as soon as there is some; "" when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._text) > shown or self.is_over)
            return self._text[shown:]

    def _change(self, text: str, end: Completion | tuple[Reason, str] | None) -> None:
        with self._changed:
            if self.is_over:
                return
            self._text, self._end = text, end
            self._changed.notify_all()
            for listener in self._listeners:
                listener()

    def _result(self) -> Completion:
        end = self._end
        if isinstance(end, Completion):
            return end
        assert end is not None, "asked for the result before the end"
        raise RequestFailed(*end)
