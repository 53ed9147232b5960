"""Ten times as many requests as fit: the surplus is refused at once and costs nothing, and the endpoint recovers by itself."""

import asyncio
import contextlib
import gc
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray.serving import admission
from ragtune_ray.serving.requests import ApiError
from tests.support.gateways import FakeBackend, client, question

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
FITS = 5
LIMITS = ("serve.generator.max_ongoing_requests=3", "serve.generator.max_queued_requests=2")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("stream", [False, True])
async def test_of_ten_times_too_many_requests_exactly_those_that_fit_are_answered_again_and_again(stream: bool) -> None:
    backend = FakeBackend()
    async with client(*LIMITS, backend=backend) as http:
        for _ in range(5):
            backend.gate = asyncio.Event()
            backend.asked.clear()
            burst = [asyncio.ensure_future(http.post(CHAT, json=question(stream=stream))) for _ in range(10 * FITS)]
            while sum(request.done() for request in burst) < 9 * FITS or len(backend.asked) < 2 * FITS:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert len(backend.asked) == 2 * FITS, "a refused request is neither retrieved for nor generated"
            backend.gate.set()
            replies = await asyncio.gather(*burst)
            assert sorted(reply.status_code for reply in replies) == [200] * FITS + [429] * 9 * FITS
            refused = [reply for reply in replies if reply.status_code == 429]
            assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in refused)
            assert {reply.json()["error"]["code"] for reply in refused} == {"overloaded"}
            assert http.middleware.in_flight == 0
        text = (await http.get("/metrics")).text
        assert f'ragtune_refused_total{{reason="overloaded"}} {5 * 9 * FITS}.0' in text


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, question(n=6), "n"),
        ("/v1/completions", {"prompt": "a", "n": 6}, "n"),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, "prompt"),
    ],
)
async def test_more_answers_than_ever_fit_are_refused_for_good(path: str, body: dict[str, Any], field: str) -> None:
    async with client(*LIMITS) as http:
        reply = await http.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
        assert f"6 answers at once; this endpoint has room for {FITS}" in reply.json()["error"]["message"]
        assert http.backend.asked == []
        load = http.middleware.routes["POST", path].load
        assert (await http.post(path, json=body | {"n": 1})).status_code == 200
        with load.admit(60):  # four more fit, five do not
            five = {"prompt": ["a"] * FITS} if field == "prompt" else {"n": FITS}
            assert (await http.post(path, json=body | {"n": 1} | five)).status_code == 429
        assert load.current == 0


def test_several_answers_of_one_request_are_one_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    load = admission.Load(capacity=100)
    requests = [contextlib.ExitStack() for _ in range(9)]
    for number, each in enumerate(requests):
        each.enter_context(load.admit(60, count=4 if number % 2 else 8))
    for each in requests[:5]:
        now[0] += 12
        each.close()
    # Four intervals of 12 seconds, in which 4 + 8 + 4 + 8 answers were complete.
    assert load.seconds_per_request == pytest.approx(2)
    assert load.current == 24
    with pytest.raises(ApiError) as raised, load.admit(47):
        pass
    assert (raised.value.status, raised.value.retry_after_seconds) == (429, 48)
    with load.admit(49, count=8):
        assert load.current == 32


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
async def test_requests_of_every_outcome_leave_nothing_behind() -> None:
    """The memory of a server that runs for months: 400 requests more add no task, thread, file or object."""
    backend = FakeBackend()

    async def abandoned(http) -> None:
        """A stream whose client leaves while it waits for the generator."""
        backend.gate = asyncio.Event()
        task = asyncio.ensure_future(http.post(CHAT, json=question(stream=True)))
        while http.middleware.in_flight == 0:  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        backend.gate = None

    async def some(http, count: int) -> None:
        for _ in range(count):
            assert (await http.post(CHAT, json=question())).status_code == 200
            assert (await http.post(CHAT, json=question(stream=True))).status_code == 200
            assert (
                await http.post(CHAT, content=b"{", headers={"content-type": "application/json"})
            ).status_code == 400
            await abandoned(http)
            backend.asked.clear()

    def counts() -> tuple[int, int, int]:
        return len(asyncio.all_tasks()), threading.active_count(), open_files()

    async with client(backend=backend) as http:
        await some(http, 20)
        gc.collect()
        before = counts()
        tracemalloc.start()
        try:
            await some(http, 10)
            gc.collect()
            start, _ = tracemalloc.get_traced_memory()
            await some(http, 100)
            gc.collect()
            end, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # A leak would add one per request; a library may open a file once, whenever it is first needed.
        assert all(now <= then + 3 for now, then in zip(counts(), before, strict=True))
        assert http.middleware.in_flight == 0
        assert end - start < 400 * 250, "less than 250 bytes per request: an object that stays takes more"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_at_any_moment_ends_its_request(stream: bool) -> None:
    backend = FakeBackend()
    async with client(backend=backend) as http:
        for num_steps in range(60):
            backend.gate = asyncio.Event()  # nobody sets it
            task = asyncio.ensure_future(http.post(CHAT, json=question(stream=stream)))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=10)
            assert done, f"left after {num_steps} steps, and the answer goes on"
            assert task.cancelled()
            assert http.middleware.in_flight == 0
