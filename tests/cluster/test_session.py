"""Ray sessions nest."""

import sys
import types
from unittest import mock

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import session


def test_an_inner_session_reuses_the_outer_one_and_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    ray = types.ModuleType("ray")
    monkeypatch.setattr(ray, "init", lambda **_: calls.append("init"), raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"), raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: calls.count("init") > calls.count("shutdown"), raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(session, "_configure_ray_data", lambda: None)
    with mock.patch.dict("os.environ"):  # a session sets variables for the processes of Ray
        with session.ray_session(config.Cluster()):
            with session.ray_session(config.Cluster()):
                assert calls == ["init"]
            assert calls == ["init"]
        assert calls == ["init", "shutdown"]
