"""`ragtune serve`: runs the endpoint as a Ray Serve application: ingress -> retriever (-> shards of a large index), generator.

`ragtune serve`, `serve deploy deploy/serve.yaml` and a KubeRay RayService run the same application. It overrides Serve's unsafe
defaults: an unbounded queue, rolling updates that stop the old replica first, twenty attempts at a failing constructor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict

from ragtune_ray import RagtuneError, config, progress
from ragtune_ray.cluster import session, stages
from ragtune_ray.evaluation import adaptive
from ragtune_ray.index import snapshot, versions
from ragtune_ray.models import arms, weights
from ragtune_ray.serving import api_keys, middleware
from ragtune_ray.serving.admission import capacity, slots_per_replica
from ragtune_ray.storage import artifacts

APPLICATION = "ragtune"
PROXY_SECONDS = 120.0
logger = logging.getLogger(__name__)


class ServeError(RagtuneError, RuntimeError):
    """The endpoint cannot start on this cluster."""


class Arguments(BaseModel):
    """The `args` in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    config: str
    """Absolute path of the YAML file, the same on every node."""
    overrides: list[str] = []
    """Settings as `section.field=value`."""


def application(arguments: dict[str, Any]) -> Any:
    """Build the application of a config file; the `import_path` of a Serve config names this function.

    Serve's `http_options` replace `serve.host` and `serve.port`. Without API keys, only requests from the proxy's own machine are
    served, even on a public host.

    Args:
        arguments: `args` of the Serve config, as a plain dictionary; see `Arguments`.

    Raises:
        pydantic.ValidationError: an argument is missing or unknown.
        config.ConfigError: the config or a file of keys is invalid.
        artifacts.ArtifactError: the arm retrieves, and there is no index.
        weights.ModelError: a model cannot be found.
    """
    parsed = Arguments.model_validate(arguments)
    path = Path(parsed.config)
    if not path.is_absolute() and not path.exists():
        raise config.ConfigError(
            f"args.config {parsed.config!r} is relative, and {Path.cwd()}, where Ray was started on this node, has no such "
            "file; name a file that every node has, by its absolute path"
        )
    return bound(config.load(path, parsed.overrides))


def bound(settings: config.Config, generator_kind: type | None = None) -> Any:
    """Check a config and build its application; benchmarks replace `GeneratorReplica` by `generator_kind`."""
    return _graph(*_checked(settings), generator_kind)


def _graph(settings: config.Config, num_shards: int, generator_kind: type | None) -> Any:
    """The application; the index is opened by the retriever (1 shard), by shards, or there is none (0)."""
    from ray import serve

    from ragtune_ray.cluster.serving.generator import GeneratorReplica
    from ragtune_ray.cluster.serving.ingress import Ingress
    from ragtune_ray.cluster.serving.retriever import RetrieverReplica
    from ragtune_ray.cluster.serving.shard import ShardReplica

    limits = settings.serve

    def deployment(kind: type, name: str, replicas: config.Replicas) -> Any:
        return serve.deployment(kind, **_options(name, replicas, limits))

    # Serve's limits are never reached: the ingress refuses requests earlier, before any work is done for them.
    of_retriever = {"max_queued_requests": capacity(limits.retriever)}
    of_generator = {
        "max_ongoing_requests": slots_per_replica(limits.generator),
        "max_queued_requests": capacity(limits.generator),
    }
    searching = limits.retriever.model_copy(update=of_retriever)
    shards = []
    if num_shards > 1:
        alone = searching.model_copy(update={"num_gpus": 0.0})
        shards = [
            deployment(ShardReplica, f"Shard{number + 1}", alone).bind(settings, number, num_shards)
            for number in range(num_shards)
        ]
        searching = searching.model_copy(update={"memory_bytes": 0})  # which is for the index
    retriever = deployment(RetrieverReplica, "Retriever", searching)
    generator = deployment(
        generator_kind or GeneratorReplica, "Generator", limits.generator.model_copy(update=of_generator)
    )
    models = _models(settings)
    return deployment(Ingress, "Ingress", limits.ingress).bind(
        settings,
        retriever.bind(settings, shards, models) if num_shards else None,
        generator.bind(settings, models) if models else generator.bind(settings),
    )


def _models(settings: config.Config) -> dict[str, str]:
    """Where replicas on other machines find the models that this process finds (`session.models`)."""
    if not session.spans_machines(settings.cluster):
        return {}
    generator = settings.generator.model if settings.generator.engine == "transformers" else ""
    for name in (settings.encoder.model, settings.encoder.query_model, settings.retrieval.reranker, generator):
        if name:
            weights.resolve(name)
    return session.models(settings)


def _checked(settings: config.Config) -> tuple[config.Config, int]:
    """The config with its models resolved, and the number of shards, 0 without an index; fails early, not in every replica."""
    if config.is_mode(settings.answer.arm):
        if settings.serve.retrieval == "auto":
            raise config.ConfigError(
                f"serve.retrieval=auto: answer.arm={settings.answer.arm} is a mode, which always retrieves; use always"
            )
        # A mode's models and index belong together, so fix them here: hot-swapping one alone would break the pair.
        settings = arms.with_tuned_models(settings).with_values({"answer.arm": "rag"})
    if config.hosted_name(settings.answer.arm):
        plain = config.without_name(settings.answer.arm)
        settings = arms.with_tuned_models(settings).with_values({"answer.arm": plain})
    keys = api_keys.load_keys(settings)
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and not keys:
        raise config.ConfigError(
            "RAY_SERVE_ENABLE_HA_PROXY=1 needs API keys: HAProxy listens on all interfaces, and behind it every request seems "
            "to come from localhost; set serve.keys_path or RAGTUNE_API_KEYS"
        )
    arms.current_generator(settings)
    is_served_elsewhere = settings.generator.engine == "openai" and not config.is_tuned(settings.answer.arm)
    if settings.serve.adapter_arms and is_served_elsewhere:
        raise config.ConfigError(
            f"serve.adapter_arms={list(settings.serve.adapter_arms)}: adapters need a model in this process, and with "
            "generator.engine=openai there is none; remove them, or set generator.engine=transformers"
        )
    for arm in settings.serve.adapter_arms:
        arms.tuned_model(settings.workspace, arm)
    if settings.serve.retrieval == "auto" and adaptive.read_calibration(settings) is None:
        raise config.ConfigError(
            f"serve.retrieval=auto: the arm {settings.answer.arm} has no calibration; run: ragtune calibrate CONFIG"
        )
    try:
        return settings, _num_shards(settings)
    except artifacts.ArtifactError:
        if config.retrieves(settings.answer.arm):
            raise
        return settings, 0


def _num_shards(settings: config.Config) -> int:
    current = versions.current_version(settings.workspace)
    if settings.serve.retriever.shards:
        return settings.serve.retriever.shards
    version = versions.read_version(settings.workspace, current)
    return max(1, len(snapshot.shards(settings.workspace, version, settings.cluster.shard_bytes)))


def _options(name: str, replicas: config.Replicas, limits: config.Serve) -> dict[str, Any]:
    actor: dict[str, Any] = {"num_cpus": replicas.num_cpus}
    if replicas.num_gpus:
        actor["num_gpus"] = replicas.num_gpus
    if replicas.memory_bytes:
        actor["memory"] = replicas.memory_bytes
    return {
        "name": name,
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "max_queued_requests": replicas.max_queued_requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": 2},
        "autoscaling_config": _autoscaling(replicas),
        "ray_actor_options": actor,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": limits.grace_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 2,
        "max_replicas_per_node": replicas.max_replicas_per_node or None,
        "max_surge_percent": 100,
        # At INFO, Serve logs every call, which costs more than refusing a request.
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }


def _autoscaling(replicas: config.Replicas) -> Any:
    from ray.serve.config import AutoscalingConfig

    look_back = min(30.0, max(2.0, replicas.upscale_delay_seconds, replicas.downscale_delay_seconds / 4))
    with warnings.catch_warnings():
        # Serve plans to read the interval from the environment instead, and warns until then.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_delay_seconds,
            downscale_delay_s=replicas.downscale_delay_seconds,
            metrics_interval_s=min(10.0, look_back / 4),
            look_back_period_s=look_back,
        )


@contextlib.contextmanager
def running(settings: config.Config, generator_kind: type | None = None) -> Iterator[str]:
    """Run the endpoint during the block and yield its address; at the end, requests in flight may finish.

    Raises:
        config.ConfigError: the host needs keys, the port is taken, or there are too few cores.
        ServeError: a deployment does not start.
    """
    keys = api_keys.load_keys(settings)
    middleware.check_exposure(settings, keys)
    checked = _checked(settings)
    host = settings.serve.host
    port = _available_port(host, settings.serve.port)
    with session.ray_session(settings.cluster), _sigterm_as_interrupt():
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # `serve` says what a person needs
        _refuse_other_serve()
        _check_cores(settings, checked[1])
        app = _graph(*checked, generator_kind)  # not earlier: this imports Ray, which reads its environment on import
        options = {"host": host, "port": port}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config={"enable_access_log": False})
        try:
            _deploy(app)
            _wait_for_proxy(host, port)
            try:
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                _drain(settings.serve.grace_seconds)
        finally:
            serve.shutdown()


def _deploy(app: Any) -> None:
    """Start the application, and wait until it is ready; the error says why a replica could not start."""
    from ray import serve

    try:
        serve.run(app, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications.get(APPLICATION)
        reasons = [
            f"{name}: {stages.last_error(each.message)}"
            for name, each in (found.deployments.items() if found else ())
            if each.status in ("DEPLOY_FAILED", "UNHEALTHY")
        ]
        raise ServeError(f"the endpoint does not start; {'; '.join(reasons) or error}") from error


def serve(settings: config.Config, stopped: threading.Event | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then let requests in flight finish; raises what `running` raises."""
    stop = stopped or threading.Event()
    progress.say("serve: loading")
    with contextlib.ExitStack() as ending, running(settings) as address, _stopping(stop):
        progress.say(f"serve: web page at {address}/, API at {address}/v1; press Ctrl-C to stop")
        _wait(stop)
        progress.say("serve: stopping; requests in flight may finish")
        # Ray prints on stdout that calls to Serve's controller fail, which it has just ended.
        ending.enter_context(
            contextlib.redirect_stdout(ending.enter_context(Path(os.devnull).open("w", encoding="utf-8")))
        )


def _sigterm_as_interrupt() -> contextlib.AbstractContextManager[None]:
    """Treat SIGTERM like Ctrl-C in the block, so that a half-started endpoint shuts down; Ray's own handler aborts.

    Python delivers signals only to the main thread, so this does nothing in other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    return _handling(signal.default_int_handler, signal.SIGTERM)


def _stopping(stop: threading.Event) -> contextlib.AbstractContextManager[None]:
    """Set the event on SIGTERM and Ctrl-C in the block. Enter it after Ray has installed its own handler."""
    return _handling(lambda *_: stop.set(), signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _wait(stop: threading.Event) -> None:
    while not stop.wait(1.0):  # a timeout, because Python handles signals only between two waits
        pass


def _check_cores(settings: config.Config, num_shards: int) -> None:
    """Refuse to start on a single machine with too few cores, where Serve would wait forever."""
    import ray

    limits = settings.serve
    shards = [limits.retriever] * num_shards if num_shards > 1 else []
    deployments = (limits.ingress, limits.retriever, *shards, limits.generator)
    required = sum(replicas.min_replicas * replicas.num_cpus for replicas in deployments)
    available = ray.cluster_resources().get("CPU", 0.0)
    if required > available and len(ray.nodes()) == 1:
        raise config.ConfigError(
            f"serve: the replicas reserve at least {required:g} cores and Ray has {available:g}; lower "
            f"serve.generator.num_cpus or serve.retriever.num_cpus{', or set serve.retriever.shards=1' if shards else ''}"
        )


def _refuse_other_serve() -> None:
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise ServeError(
        "Ray Serve already runs on this cluster, with its own host and port; add this endpoint to it with: "
        "serve deploy deploy/serve.yaml"
    )


def _drain(grace_seconds: float) -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    deadline = time.monotonic() + grace_seconds
    try:
        handle = serve.get_app_handle(APPLICATION)
        while sum(handle.broadcast("drain").results(timeout_s=5)) and time.monotonic() < deadline:
            time.sleep(0.2)
    except (RayError, RayServeException, TimeoutError, RuntimeError) as error:
        logger.warning("stopped without waiting for requests in flight: %s", error)


def _wait_for_proxy(host: str, port: int) -> None:
    """Wait until the proxy listens, which can be later than Serve reports the application as ready."""
    deadline = time.monotonic() + PROXY_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServeError(
                    f"{host} port {port} does not accept connections {PROXY_SECONDS:.0f} seconds after the endpoint became "
                    "ready; see the log of Ray Serve's proxy"
                ) from error
            time.sleep(0.1)


def _available_port(host: str, port: int) -> int:
    """The port if it is free; 0 finds a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise config.ConfigError(
                f"serve.port {port}: cannot listen on {host} ({error.strerror}); stop the other program, or choose another port"
            ) from error
        return int(probe.getsockname()[1])
