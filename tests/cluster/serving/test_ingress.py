"""The queue between the ingress and the generator replicas, over fake handles."""

import asyncio
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.serving.ingress import ServeBackend
from ragtune_ray.serving.backend import Job

pytestmark = pytest.mark.cluster


class FakeHandle:
    """The handle of a deployment whose calls end when the test allows it."""

    def __init__(self) -> None:
        self.complete = self.stream = self
        self.may_end = asyncio.Event()
        self.begun: list[str] = []
        self.seconds: list[float] = []
        self.running = self.most = 0

    def options(self, *, stream: bool) -> "FakeHandle":
        assert stream
        return self

    def remote(self, job: Job, seconds: float) -> "Call":
        self.begun.append(job.question)
        self.seconds.append(seconds)
        return Call(self, job)


class Call:
    def __init__(self, handle: FakeHandle, job: Job) -> None:
        self.handle, self.job = handle, job

    def __await__(self) -> Any:
        return self._ended().__await__()

    async def __aiter__(self) -> Any:
        yield await self._ended()

    async def _ended(self) -> str:
        self.handle.running += 1
        self.handle.most = max(self.handle.most, self.handle.running)
        try:
            await self.handle.may_end.wait()
        finally:
            self.handle.running -= 1
        return self.job.question

    def cancel(self) -> None:
        pass


def job(number: int) -> Job:
    return Job(str(number), "rag", (), (), "", (), "", 1, 0.0, (), 0)


def test_requests_for_full_replicas_wait_in_the_ingress_in_order() -> None:
    handle = FakeHandle()
    settings = config.Config().using("serve.generator.max_ongoing_requests=4", "serve.generator.max_replicas=2")

    async def ask_all() -> list[Any]:
        backend = ServeBackend(settings, None, handle)

        async def ask(number: int) -> str:
            if number % 2:
                return "".join([event async for event in backend.stream(job(number), 60.0)])
            return await backend.complete(job(number), 60.0)

        tasks = [asyncio.create_task(ask(number)) for number in range(20)]
        for _ in range(100):
            await asyncio.sleep(0)
        assert handle.begun == [str(number) for number in range(10)], (
            "two replicas, each with a batch of 4 and one that is next"
        )
        tasks[12].cancel()
        handle.may_end.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask_all())
    assert isinstance(found.pop(12), asyncio.CancelledError)
    assert found == handle.begun == [str(number) for number in range(20) if number != 12]
    assert handle.most == 10
    assert all(0 < seconds <= 60 for seconds in handle.seconds)
