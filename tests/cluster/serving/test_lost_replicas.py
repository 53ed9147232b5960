"""What the ingress does when a replica dies during a call, over scripted handles: it asks another, or says that it cannot."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from ragtune_ray import config
from ragtune_ray.cluster.serving import ingress
from ragtune_ray.index import filters
from ragtune_ray.serving.backend import Event, Failed, Found, Job, Shown
from ragtune_ray.serving.requests import ApiError
from tests.support import clocks

pytestmark = pytest.mark.cluster

FOUND = Found("000001", (), (), 0.0)
SHOWN = Shown((), (), 9)
OTHER = Shown((), (), 8)
DEAD = RayActorError()
JOB = Job("?", "rag", (), (), "", (), "", 1, 0.0, (), 0)


class ScriptedHandle:
    """The handle of a deployment. Its n-th call gives the n-th of `scripts`: events or a result, an error among them raised."""

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = iter(scripts)
        self.num_calls = self.num_cancelled = 0
        self.seconds: list[float] = []
        self.retrieve = self.complete = self.stream = self

    def options(self, *, stream: bool) -> "ScriptedHandle":
        assert stream
        return self

    def remote(self, *arguments: Any) -> "Response":
        self.num_calls += 1
        self.seconds.append(arguments[-1])
        return Response(self, next(self._scripts))


class Response:
    def __init__(self, handle: ScriptedHandle, script: list[Any]) -> None:
        self._handle, self._script = handle, script

    def __await__(self) -> Iterator[Any]:
        yield from ()
        (result,) = self._script
        if isinstance(result, Exception):
            raise result
        return result

    async def __aiter__(self) -> AsyncIterator[Any]:
        for event in self._script:
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        self._handle.num_cancelled += 1


def asked(handle: ScriptedHandle, ask: Callable[[ingress.ServeBackend], Any]) -> Any:
    """What the backend answers over this handle, or the ApiError that it raises."""

    async def scenario() -> Any:
        try:
            return await ask(ingress.ServeBackend(config.Config(), handle, handle))
        except ApiError as error:
            return error

    return clocks.run(scenario)


def retrieved(handle: ScriptedHandle) -> Any:
    return asked(handle, lambda backend: backend.retrieve("?", 5, filters.Filter(), 60.0))


def completed(handle: ScriptedHandle) -> Any:
    return asked(handle, lambda backend: backend.complete(JOB, 60.0))


def streamed(handle: ScriptedHandle) -> list[Event]:
    async def collect(backend: ingress.ServeBackend) -> list[Event]:
        return [event async for event in backend.stream(JOB, 60.0)]

    found: list[Event] = asked(handle, collect)
    return found


@pytest.mark.parametrize("error", [DEAD, ReplicaUnavailableError("gone")])
@pytest.mark.parametrize("num_dead", [0, 1, 3])
def test_a_call_is_repeated_until_a_replica_lives(num_dead: int, error: Exception) -> None:
    for ask, result in ((retrieved, FOUND), (completed, (SHOWN, "finished"))):
        handle = ScriptedHandle(*[[error]] * num_dead, [result])
        assert ask(handle) == result
        assert handle.num_calls == num_dead + 1
        assert all(0 < seconds <= 60 for seconds in handle.seconds)


def test_a_call_is_not_repeated_for_ever() -> None:
    for ask in (retrieved, completed):
        handle = ScriptedHandle(*[[DEAD]] * 9)
        refused = ask(handle)
        assert (refused.status, refused.code, refused.retry_after_seconds) == (503, "unavailable", 2)
        assert handle.num_calls == 4, "a storm of retries would keep a cluster down"


@pytest.mark.parametrize(
    ("error", "status"),
    [(BackPressureError(1, 1), 429), (DeploymentUnavailableError("x"), 503)],  # type: ignore[arg-type]
)
def test_what_another_replica_would_answer_too_is_not_repeated(error: Exception, status: int) -> None:
    handle = ScriptedHandle([error])
    assert retrieved(handle).status == status
    assert handle.num_calls == 1


def test_a_stream_starts_again_if_no_text_was_sent_and_shows_its_sources_once() -> None:
    handle = ScriptedHandle([DEAD], [SHOWN, DEAD], [SHOWN, "a", "b"])
    assert streamed(handle) == [SHOWN, "a", "b"]
    assert handle.num_cancelled == 3, "what a lost call still does is cancelled"


def test_a_stream_that_has_sent_text_ends_with_an_error_and_never_repeats_text() -> None:
    handle = ScriptedHandle([SHOWN, "a", DEAD], [SHOWN, "a", "b"])
    *sent, last = streamed(handle)
    assert sent == [SHOWN, "a"]
    assert isinstance(last, Failed)
    assert (last.status, last.code) == (502, "replica_died")
    assert handle.num_calls == 1


def test_a_stream_is_not_continued_by_a_model_that_was_shown_other_passages() -> None:
    handle = ScriptedHandle([SHOWN, DEAD], [OTHER, "a"], [SHOWN, "b"])
    assert streamed(handle) == [SHOWN, "b"], "a third replica has the first one's model"
    handle = ScriptedHandle([SHOWN, DEAD], *[[OTHER, "a"]] * 9)
    *sent, last = streamed(handle)
    assert sent == [SHOWN]
    assert isinstance(last, Failed)
    assert handle.num_calls == 4
