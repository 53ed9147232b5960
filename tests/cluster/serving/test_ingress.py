"""The way from the ingress to the copies that generate, with handles that are not Serve's."""

import asyncio
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.serving.ingress import ServeBackend
from ragtune_ray.serving.backend import Job

pytestmark = pytest.mark.cluster


class Copies:
    """A handle of a deployment whose calls end when they are told to."""

    def __init__(self) -> None:
        self.complete = self.stream = self
        self.may_end = asyncio.Event()
        self.begun: list[str] = []
        self.seconds: list[float] = []
        self.running = self.most = 0

    def options(self, *, stream: bool) -> "Copies":
        assert stream
        return self

    def remote(self, job: Job, seconds: float) -> "Call":
        self.begun.append(job.question)
        self.seconds.append(seconds)
        return Call(self, job)


class Call:
    def __init__(self, copies: Copies, job: Job) -> None:
        self.copies, self.job = copies, job

    def __await__(self) -> Any:
        return self._ended().__await__()

    async def __aiter__(self) -> Any:
        yield await self._ended()

    async def _ended(self) -> str:
        self.copies.running += 1
        self.copies.most = max(self.copies.most, self.copies.running)
        try:
            await self.copies.may_end.wait()
        finally:
            self.copies.running -= 1
        return self.job.question

    def cancel(self) -> None:
        pass


def job(number: int) -> Job:
    return Job(str(number), "rag", (), (), "", (), "", 1, 0.0, (), 0)


def test_what_waits_for_a_full_copy_waits_in_the_ingress_in_its_order_and_what_leaves_takes_no_place() -> None:
    copies = Copies()
    settings = config.Config().using("serve.generator.max_ongoing_requests=4", "serve.generator.max_replicas=2")

    async def ask_all() -> list[Any]:
        backend = ServeBackend(settings, None, copies)

        async def ask(number: int) -> str:
            if number % 2:
                return "".join([event async for event in backend.stream(job(number), 60.0)])
            return await backend.complete(job(number), 60.0)

        tasks = [asyncio.create_task(ask(number)) for number in range(20)]
        for _ in range(100):
            await asyncio.sleep(0)
        assert copies.begun == [str(number) for number in range(10)], (
            "two copies; a batch of 4 and one that is next in each"
        )
        tasks[12].cancel()
        copies.may_end.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask_all())
    assert isinstance(found.pop(12), asyncio.CancelledError)
    assert found == copies.begun == [str(number) for number in range(20) if number != 12]
    assert copies.most == 10
    assert all(0 < seconds <= 60 for seconds in copies.seconds)
