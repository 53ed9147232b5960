"""A request to a generator; threads and asyncio tasks can read its text while it is generated."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal

from ragtune_ray import RagtuneError
from ragtune_ray.generation.interface import Completion
from ragtune_ray.generation.row import Row

Reason = Literal["deadline", "cancelled", "failed"]


class Overloaded(RagtuneError, RuntimeError):  # noqa: N818 - a state, not an error
    """The queue is full or the generator is closing; retry later or at another replica."""


class RequestFailed(RagtuneError, RuntimeError):  # noqa: N818 - an outcome, not an error
    """A request ended without a completion: its time ran out, its client left, or it failed as the message says."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both, so that it survives pickling
        self.reason: Reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


class Request:
    """One prompt that is being answered; every method may be called from any thread.

    Readers call `pieces`, `apieces`, `completion` and `cancel`; the generator calls `expire`, `advance` and `fail`.

    Args:
        row: the prompt and the text generated so far.
        deadline_seconds: limit from now until the answer ends; 0: none.
        adapter: the name of the LoRA adapter that answers; "": the base model.
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
        """Whether it has ended, with or without a completion."""
        return self._end is not None

    @property
    def failure(self) -> Reason | None:
        """Why it has no completion; None if it has one or is still running."""
        end = self._end
        return end[0] if isinstance(end, tuple) else None

    def expire(self) -> bool:
        """End it if its deadline has passed; return whether it is over."""
        if 0 < self._deadline_seconds <= time.monotonic() - self._started:
            self.fail("deadline", f"no answer within {self._deadline_seconds:g} seconds")
        return self.is_over

    def pieces(self) -> Iterator[str]:
        """Yield the text while it is generated; the pieces concatenate to the completion's text.

        Closing the iterator early cancels the request.

        Raises:
            RequestFailed: the request ended without a completion.
        """
        shown = 0
        try:
            while piece := self._wait_for_text(shown):
                shown += len(piece)
                yield piece
        finally:
            self.cancel()
        self._result()

    async def apieces(self) -> AsyncIterator[str]:
        """`pieces` for asyncio, without blocking the event loop."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            try:
                loop.call_soon_threadsafe(changed.set)
            except RuntimeError:  # the loop is closed, so nobody reads any more
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
        """Wait for the end; raises RequestFailed if the request ended without a completion."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_over)
        return self._result()

    def cancel(self) -> None:
        """Stop computing it; no effect if it is over."""
        self.fail("cancelled", "the request was cancelled")

    def advance(self) -> None:
        """Publish the row's new text, and its completion if it has finished."""
        row = self.row
        self._change(row.text, row.completion(time.monotonic() - self._started) if row.finish is not None else None)

    def fail(self, reason: Reason, message: str) -> None:
        """End it without a completion; no effect if it is over."""
        self._change(self._text, (reason, message))

    def _wait_for_text(self, shown: int) -> str:
        """Wait for text after the first `shown` characters and return it; "" if the request ends without any."""
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
        assert end is not None, "the result was read before the end"
        raise RequestFailed(*end)
