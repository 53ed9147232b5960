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
