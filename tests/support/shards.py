"""Handles of replicas in this process, and an index of several segments with deleted passages and metadata."""

import asyncio
import concurrent.futures
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.cluster.indexing.update import delete_documents, upsert_documents


def changed_index(settings: config.Config, corpus: Path, folder: Path) -> config.Config:
    """Index a corpus with metadata and copies of one text in several segments; then delete, replace and add documents."""
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows = [{**row, "metadata": {"parity": number % 2}} for number, row in enumerate(rows)]
    copies = [{**rows[5], "document_id": f"copy{number}"} for number in range(3)]
    base, changes = folder / "base.jsonl", folder / "changes.jsonl"
    base.write_text("".join(json.dumps(row) + "\n" for row in [*copies[:1], *rows, *copies[1:]]))
    new = [{**rows[number], "text": f"{rows[number]['text']} It was repainted."} for number in (1, 20, 33)]
    changes.write_text("".join(json.dumps(row) + "\n" for row in new))
    made = settings.using(f"corpus.path={base}", "index.segment_passages=16")
    build_index(made)
    delete_documents(made, ["d2", "d30"])
    upsert_documents(made, str(changes))
    return made


class LocalHandle:
    """Stands in for the Serve handle of a deployment with one replica, which lives in this process.

    `before_call` may raise what Serve would raise, or return nothing.
    """

    def __init__(self, replica: Any) -> None:
        self.replica = replica
        self.before_call: Callable[[str], None] = lambda _: None
        self.calls: list[str] = []
        self.num_cancelled = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop of the replica."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __getattr__(self, method: str) -> Any:
        return _Method(self, method)

    def broadcast(self, method: str, *arguments: Any) -> Any:
        """Call the one replica."""
        return _Broadcast(_Method(self, method).remote(*arguments))

    def begin(self, method: str, arguments: tuple[Any, ...]) -> concurrent.futures.Future[Any]:
        """Run a method in the loop of the replica."""
        self.calls.append(method)

        async def run() -> Any:
            self.before_call(method)
            return await getattr(self.replica, method)(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)


class _Method:
    def __init__(self, handle: LocalHandle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *arguments: Any) -> "_Response":
        return _Response(self._handle, self._handle.begin(self._name, arguments))


class _Response:
    def __init__(self, handle: LocalHandle, future: concurrent.futures.Future[Any]) -> None:
        self._handle, self._future = handle, future

    def result(self, *, timeout_s: float) -> Any:
        return self._future.result(timeout_s)

    def __await__(self) -> Any:
        return asyncio.wrap_future(self._future).__await__()

    def cancel(self) -> None:
        self._handle.num_cancelled += 1


class _Broadcast:
    def __init__(self, response: _Response) -> None:
        self._response = response

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        return [self._response.result(timeout_s=timeout_s)]
