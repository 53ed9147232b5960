"""Ray sessions nest."""

import sys
import types
from unittest import mock

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import session


@pytest.mark.parametrize("started_by", ["the session", "the caller"])
def test_an_inner_session_reuses_the_outer_one_and_leaves_it_open(
    monkeypatch: pytest.MonkeyPatch, started_by: str
) -> None:
    calls: list[str] = [] if started_by == "the session" else ["init"]
    ray = types.ModuleType("ray")
    monkeypatch.setattr(ray, "init", lambda **_: calls.append("init"), raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"), raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: calls.count("init") > calls.count("shutdown"), raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(session, "_configure_ray_data", lambda: None)
    monkeypatch.setattr(session.actors, "release", lambda: calls.append("release"))
    with mock.patch.dict("os.environ"):  # a session sets variables for the processes of Ray
        with session.ray_session(config.Cluster()):
            with session.ray_session(config.Cluster()):
                assert calls == ["init"]
            assert calls == ["init"]
        assert calls == ["init", "release", *(["shutdown"] if started_by == "the session" else [])]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_start_that_takes_too_long_is_tried_once_more_and_then_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failures: int
) -> None:
    started: list[str] = []
    ray = types.ModuleType("ray")

    def init(**_: object) -> None:
        started.append("init")
        if len(started) <= failures:
            raise Exception("The current node timed out during startup. This could happen because of a raylet.")  # noqa: TRY002

    monkeypatch.setattr(ray, "init", init, raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: None, raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    if failures < session.START_ATTEMPTS:
        session._start("")
    else:
        with pytest.raises(session.StartError, match=r"2 attempts \(The current node timed out .*ragtune doctor"):
            session._start("")
    assert len(started) == min(failures + 1, session.START_ATTEMPTS)
    assert ("once more" in capsys.readouterr().err) is (failures > 0)


def test_another_failure_of_ray_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = types.ModuleType("ray")
    init = mock.Mock(side_effect=ValueError("no such address"))
    monkeypatch.setattr(ray, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    for address in ("", "10.0.0.1:6379"):
        with pytest.raises(ValueError, match="no such address"):
            session._start(address)
    assert init.call_count == 2
