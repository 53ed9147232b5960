"""Ray sessions nest."""

import sys
import types
from unittest import mock

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import environment, session


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
    monkeypatch.setattr(session, "_open", [])  # other tests of this process may have one open
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


def test_workers_get_variables_that_are_set_and_those_that_the_config_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.FORWARDED, "A_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    settings = config.Cluster(worker_variables=("A_KEY",))
    with pytest.raises(config.ConfigError, match=r"cluster\.worker_variables: A_KEY is not set .*; export it"):
        environment.of_workers(settings)
    monkeypatch.setenv("A_KEY", "key")
    assert environment.of_workers(settings)["env_vars"] == {"AWS_REGION": "eu-north-1", "A_KEY": "key"}


def test_the_interface_of_an_address_is_found() -> None:
    loopback = environment.interface("127.0.0.1")
    assert loopback.startswith("lo")
    assert environment.interface("203.0.113.7") == "", "an address of documentation, which no machine has"


@pytest.mark.parametrize(
    ("configured", "num_nodes", "address", "expected"),
    [(0, 1, "", 4), (0, 2, "", 12), (0, 1, "10.0.0.1:6379", 12), (3, 2, "", 3), (0, 1, "local", 4)],
)
def test_on_a_cluster_some_actors_wait_for_nodes_that_may_join(
    monkeypatch: pytest.MonkeyPatch, configured: int, num_nodes: int, address: str, expected: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = types.ModuleType("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True, raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * num_nodes + [{"Alive": False}], raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0}, raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    pool = session.pool(object, {}, configured, config.Cluster(address=address))
    assert pool.num_actors == expected
    assert (pool.room is None) is bool(configured)
    assert pool.room is None or pool.room() == expected


@pytest.mark.parametrize(("gpus_per_worker", "expected"), [(0.0, 4), (0.5, 2)])
def test_nodes_that_are_left_out_have_no_workers(
    monkeypatch: pytest.MonkeyPatch, gpus_per_worker: float, expected: int
) -> None:
    ray = types.ModuleType("ray")
    nodes = [
        {"NodeID": name, "Alive": alive, "Resources": {"CPU": 4.0, "GPU": 1.0}}
        for name, alive in (("a", True), ("b", True), ("c", False))
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes, raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0}, raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(session.actors, "left_out", {"b", "c"})
    assert session.workers(0, gpus_per_worker) == expected
    assert session.workers(7, gpus_per_worker) == 7
    assert session.actors.elsewhere() == {"label_selector": {"ray.io/node-id": "!in(b,c)"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["cluster.gpus_per_worker=0.5"], 0.5),
        (["cluster.gpus_per_worker=1", "generator.engine=openai"], 0),
        (["cluster.gpus_per_worker=0.5", "generator.engine=vllm"], 1),
        (["cluster.gpus_per_worker=1", "generator.engine=vllm", "generator.tensor_parallel=4"], 4),
        (["generator.engine=vllm", "generator.tensor_parallel=4"], 0),
    ],
)
def test_workers_with_the_generator_reserve_the_gpus_that_its_engine_uses(given: list[str], expected: float) -> None:
    settings = config.Config().using(*given)
    assert session.for_generators(settings) == settings.cluster.model_copy(update={"gpus_per_worker": expected})
