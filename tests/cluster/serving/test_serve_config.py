"""The Serve config files in deploy/, and the options of the deployments."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import httpx2 as httpx
import psutil
import pytest
import ray.serve
import yaml

from ragtune_ray import config
from ragtune_ray.cluster import service, session
from ragtune_ray.cluster.serving import serve
from ragtune_ray.cluster.serving.serve import Arguments, bound
from tests.support.endpoints import CHAT, QUICK, question, wait_until_ready
from tests.support.processes import end_remains

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.cluster


def serve_configs() -> list[dict]:
    service = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())
    return [
        yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text()),
        yaml.safe_load(service["spec"]["serveConfigV2"]),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_serve_accepts_the_files_and_their_builder_and_config_exist(number: int) -> None:
    from ray.serve.schema import ServeDeploySchema

    values = serve_configs()[number]
    (application,) = ServeDeploySchema.model_validate(values).applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    with pytest.raises(ValueError, match="nonsense"):  # Serve calls the builder with a plain dictionary
        getattr(importlib.import_module(module), name)({**application.args, "nonsense": 1})
    arguments = Arguments.model_validate(application.args)
    settings = config.load(ROOT / arguments.config.removeprefix("/opt/ragtune-ray/"), arguments.overrides)
    exposed = values["http_options"]["host"] != "127.0.0.1"
    assert bool(settings.serve.keys_path) is exposed, "an endpoint open to other machines has keys"


def test_the_kubernetes_endpoint_can_grow_to_all_its_replicas_and_outlives_its_head() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())["spec"]
    cluster = service["rayClusterConfig"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    settings = config.load(ROOT / "configs" / "space.yaml", application["args"]["overrides"]).serve
    (group,) = cluster["workerGroupSpecs"]
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) * group["maxReplicas"]
    needed = sum(each.max_replicas * each.num_cpus for each in (settings.retriever, settings.generator))
    assert needed <= cores
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"]


def test_a_relative_config_that_the_node_does_not_have_is_explained() -> None:
    with pytest.raises(config.ConfigError, match=r"'my\.yaml' is relative.*every node has, by its absolute path"):
        service.application({"config": "my.yaml"})


def test_the_old_import_path_still_names_the_builder() -> None:
    assert service.application.__module__ == "ragtune_ray.cluster.serving.serve"


def test_an_application_that_cannot_serve_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="ragtune index"):
        bound(config.Config().using(f"workspace={tmp_path}"))
    with pytest.raises(Exception, match="ragtune train"):
        bound(config.Config().using(f"workspace={tmp_path}", "answer.arm=ft"))
    with pytest.raises(Exception, match="ragtune calibrate"):
        bound(config.Config().using(f"workspace={tmp_path}", "serve.retrieval=auto"))
    with pytest.raises(Exception, match="always retrieves"):
        bound(config.Config().using(f"workspace={tmp_path}", "serve.retrieval=auto", "answer.arm=joint"))


def test_haproxy_requires_keys_since_it_hides_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.Config().using(f"workspace={tmp_path}", "answer.arm=base")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(config.ConfigError, match="HAProxy"):
        bound(settings)
    monkeypatch.setenv("RAGTUNE_API_KEYS", "a-key-of-sixteen-characters")
    assert bound(settings)


def test_adapters_are_refused_if_the_model_is_remote(tmp_path: Path) -> None:
    elsewhere = ("generator.engine=openai", "generator.base_url=http://127.0.0.1:9/v1", "serve.adapter_arms=[rag+ft]")
    with pytest.raises(config.ConfigError, match=r"serve\.adapter_arms=\['rag\+ft'\].*generator\.engine"):
        bound(config.Config().using(f"workspace={tmp_path}", "answer.arm=base", *elsewhere))


def test_a_hosted_arm_is_served_as_its_plain_arm_with_its_own_generator(tmp_path: Path) -> None:
    hosted = {"gpt": {"model": "gpt-x", "base_url": "http://127.0.0.1:9/v1"}}
    given = {"workspace": str(tmp_path), "compare.hosted": hosted, "answer.arm": "base@gpt"}
    settings = bound(config.load_config(given))._bound_deployment.init_args[0]
    assert settings.answer.arm == "base"
    assert (settings.generator.engine, settings.generator.model) == ("openai", "gpt-x")
    with pytest.raises(config.ConfigError, match=r"serve\.adapter_arms"):
        bound(config.load_config(given, {"serve.adapter_arms": ["rag+ft"]}))


_REPLICA_FAILED = """The replica failed to start: \x1b[36mray::ServeReplica\x1b[39m
Traceback (most recent call last):
  File "serve.py", line 1, in <module>
ragtune_ray.models.weights.ModelError: model 'm': no such directory"""


@pytest.mark.parametrize(
    ("deployments", "said"),
    [
        (
            {"Generator": ("DEPLOY_FAILED", _REPLICA_FAILED), "Ingress": ("UPDATING", "")},
            "the endpoint does not start; Generator: ModelError: model 'm': no such directory",
        ),
        ({"Retriever": ("UNHEALTHY", "out of  memory\n")}, "the endpoint does not start; Retriever: out of memory"),
        (None, "the endpoint does not start; Serve says so"),
    ],
)
def test_an_endpoint_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, deployments: dict[str, tuple[str, str]] | None, said: str
) -> None:
    applications = {}
    if deployments is not None:
        found = {name: SimpleNamespace(status=each[0], message=each[1]) for name, each in deployments.items()}
        applications["ragtune"] = SimpleNamespace(deployments=found)
    monkeypatch.setattr(ray.serve, "run", mock.Mock(side_effect=RuntimeError("Serve says so")))
    monkeypatch.setattr(ray.serve, "status", lambda: SimpleNamespace(applications=applications))
    with pytest.raises(serve.ServeError) as raised:
        serve._deploy(object())
    assert str(raised.value) == said


def test_every_deployment_replaces_the_unsafe_defaults_of_serve(tmp_path: Path) -> None:
    application = bound(
        config.Config().using(f"workspace={tmp_path}", "answer.arm=base", "serve.generator.min_replicas=0")
    )
    found = {application._bound_deployment.name: application._bound_deployment}
    for node in application._bound_deployment.init_args:
        if hasattr(node, "_bound_deployment"):
            found[node._bound_deployment.name] = node._bound_deployment
    assert set(found) == {"Ingress", "Generator"}, "without an index there is no retriever"
    for deployment in found.values():
        settings = deployment._deployment_config
        assert settings.max_queued_requests >= 0
        assert settings.max_constructor_retry_count == 2
        assert settings.max_surge_percent == 100
        assert settings.backpressure_config.status_code == 429
    generator = found["Generator"]._deployment_config
    assert generator.autoscaling_config.min_replicas == 0
    assert generator.max_ongoing_requests == 16 + 4, "a batch, and a quarter as many that are next"
    assert generator.max_queued_requests == 16 + 64, "all that the ingress admits, since it refuses before it retrieves"


def test_a_replica_uses_the_cores_ray_has_on_its_machine(shared_ray: None) -> None:
    import ray

    assert session.cores_of_this_machine() == 4.0, "the cores that Ray was started with, not those of the machine"
    assert ray.get(ray.remote(session.cores_of_this_machine).remote()) == 4.0


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_serve_command_runs_the_file(tmp_path: Path, settings_for) -> None:
    settings = settings_for(tmp_path / "workspace", *QUICK, "answer.arm=base")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    values = serve_configs()[0]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        values["http_options"]["port"] = probe.getsockname()[1]
    values["applications"][0]["args"]["config"] = str(tmp_path / "c.yaml")
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(values))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "serve.yaml")]
    log = tmp_path / "log.txt"
    with log.open("w") as sink, subprocess.Popen(command, stdout=sink, stderr=sink, env=environment) as process:
        http = httpx.Client(base_url=f"http://127.0.0.1:{values['http_options']['port']}", timeout=300)
        wait_until_ready(http, process, log.read_text)
        family = psutil.Process(process.pid).children(recursive=True)
        assert http.post(CHAT, json=question()).json()["arm"] == "base"
        process.send_signal(signal.SIGINT)
        process.wait(600)
    end_remains(family)
