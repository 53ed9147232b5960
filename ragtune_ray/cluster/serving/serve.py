"""Ray Serve: the endpoint as an application of three deployments, each scaling on its own: ingress -> retriever, generator.

In: a config. Out: a running endpoint, from `ragtune serve`, `serve deploy deploy/serve.yaml` or a KubeRay RayService, all of the
same application. Serve's defaults are not safe here (an unbounded queue, a rolling update that stops the old copy first, twenty
tries of a constructor that cannot succeed), so each is set. This module knows nothing of HTTP or models.
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
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict

from ragtune_ray import RagtuneError, config, progress
from ragtune_ray.cluster import session
from ragtune_ray.evaluation import adaptive
from ragtune_ray.index import versions
from ragtune_ray.models import arms
from ragtune_ray.serving import api_keys, middleware
from ragtune_ray.serving.admission import capacity, places
from ragtune_ray.storage import artifacts

__all__ = ["APPLICATION", "Arguments", "ServeError", "application", "bound", "running", "serve"]

APPLICATION = "ragtune"
PROXY_SECONDS = 120.0
logger = logging.getLogger(__name__)


class ServeError(RagtuneError, RuntimeError):
    """The endpoint cannot start on this cluster; the message says why."""


class Arguments(BaseModel):
    """What `args` of a Serve config file may hold."""

    model_config = ConfigDict(extra="forbid")

    config: str
    """Path of the YAML file, on every node."""
    overrides: list[str] = []
    """`section.field=value`."""


def application(arguments: dict[str, Any]) -> Any:
    """The application of a config file; what `import_path` of a Serve config names.

    The host and port of the config do not count there: Serve's own `http_options` do. Without API keys the endpoint answers the
    machine of its proxy alone, whatever those say.

    Args:
        arguments: `args` of the Serve config, a plain dictionary as Serve gives it; see `Arguments`.

    Raises:
        pydantic.ValidationError: an argument is missing or unknown.
        config.ConfigError: the config or a file of keys is wrong.
        storage.ArtifactError: the arm retrieves, and there is no index.
        models.ModelError: a model cannot be had.
    """
    given = Arguments.model_validate(arguments)
    return bound(config.load(given.config, given.overrides))


def bound(settings: config.Config, generator_kind: type | None = None) -> Any:
    """The application of a config, everything that can be known of its failing checked.

    Args:
        settings: the whole tree.
        generator_kind: a class with the face of `GeneratorReplica`, in its place: for benchmarks.
    """
    return _graph(*_checked(settings), generator_kind)


def _graph(settings: config.Config, has_index: bool, generator_kind: type | None) -> Any:
    from ray import serve

    from ragtune_ray.cluster.serving.generator import GeneratorReplica
    from ragtune_ray.cluster.serving.ingress import Ingress
    from ragtune_ray.cluster.serving.retriever import RetrieverReplica

    limits = settings.serve

    def deployment(kind: type, name: str, replicas: config.Replicas) -> Any:
        return serve.deployment(kind, **_options(name, replicas, limits))

    # Serve's own limits never come first: the gateway refuses before anything was done for a request.
    of_retriever = limits.retriever.model_copy(update={"max_queued_requests": capacity(limits.retriever)})
    most = {"max_ongoing_requests": places(limits.generator), "max_queued_requests": capacity(limits.generator)}
    of_generator = limits.generator.model_copy(update=most)
    retriever = deployment(RetrieverReplica, "Retriever", of_retriever).bind(settings) if has_index else None
    generator = deployment(generator_kind or GeneratorReplica, "Generator", of_generator).bind(settings)
    return deployment(Ingress, "Ingress", limits.ingress).bind(settings, retriever, generator)


def _checked(settings: config.Config) -> tuple[config.Config, bool]:
    """The config with its models named, and whether there is an index; what would fail in every copy fails here instead."""
    if config.is_mode(settings.answer.arm):
        if settings.serve.retrieval == "auto":
            raise config.ConfigError(
                f"serve.retrieval=auto: a tuned pair (answer.arm={settings.answer.arm}) always retrieves; use always"
            )
        # The pair of a mode is that of this moment: its models and its index belong together.
        settings = arms.with_tuned_models(settings).with_values({"answer.arm": "rag"})
    keys = api_keys.load_keys(settings)
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and not keys:
        raise config.ConfigError(
            "RAY_SERVE_ENABLE_HA_PROXY=1: HAProxy listens on all interfaces and every request seems to come from this machine, "
            "which is all that an endpoint without API keys goes by; name some in serve.keys_path or RAGTUNE_API_KEYS"
        )
    arms.current_generator(settings)
    if (
        settings.serve.adapter_arms
        and settings.generator.engine == "openai"
        and not config.is_tuned(settings.answer.arm)
    ):
        raise config.ConfigError(
            f"serve.adapter_arms={list(settings.serve.adapter_arms)}: adapters are applied to a model in this process, and "
            "generator.engine=openai has none; leave them out, or set generator.engine=transformers"
        )
    for arm in settings.serve.adapter_arms:
        arms.tuned_model(settings.workspace, arm)
    if settings.serve.retrieval == "auto" and adaptive.read_calibration(settings) is None:
        raise config.ConfigError(
            f"serve.retrieval=auto: nothing says when the arm {settings.answer.arm} may answer without retrieval; run: "
            "ragtune calibrate CONFIG"
        )
    try:
        versions.current_version(settings.workspace)
    except artifacts.ArtifactError:
        if config.retrieves(settings.answer.arm):
            raise
        return settings, False
    return settings, True


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
        "max_surge_percent": 100,
        # At INFO Serve makes a line of each call, which costs more than the gateway does for a refusal.
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }


def _autoscaling(replicas: config.Replicas) -> Any:
    from ray.serve.config import AutoscalingConfig

    look_back = min(30.0, max(2.0, replicas.upscale_delay_seconds, replicas.downscale_delay_seconds / 4))
    with warnings.catch_warnings():
        # The interval is to become an environment variable of each process; until then it belongs here.
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
    """The endpoint, for the length of the block; gives its address. At the end what is under way may finish.

    Raises:
        config.ConfigError: the host needs keys, the port is taken, or there are too few cores.
        RuntimeError: a deployment does not start; the message says which and why.
    """
    keys = api_keys.load_keys(settings)
    middleware.check_exposure(settings, keys)
    checked = _checked(settings)
    host = settings.serve.host
    port = settings.serve.port or _free_port(host)
    _check_port(host, port)
    with session.ray_session(settings.cluster), _sigterm_as_interrupt():
        from ray import serve

        _refuse_other_serve()
        _check_room(settings)
        app = _graph(*checked, generator_kind)  # not before: it imports Ray, which reads its environment then
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"enable_access_log": False},
        )
        try:
            serve.run(app, name=APPLICATION, route_prefix="/")
            _wait_for_proxy(host, port)
            try:
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                _drain(settings.serve.grace_seconds)
        finally:
            serve.shutdown()


def serve(settings: config.Config, stopped: threading.Event | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then let what is under way finish.

    Raises:
        config.ConfigError: the host needs keys, or the port is taken.
        RuntimeError: a deployment does not start.
    """
    stop = stopped or threading.Event()
    progress.say("serve: loading")
    with running(settings) as address, _stopping(stop):
        progress.say(f"serve: {address}/ is the page, {address}/v1 the API; Ctrl-C stops it")
        _wait(stop)
        progress.say("serve: stopping; what is under way may finish")


def _sigterm_as_interrupt() -> contextlib.AbstractContextManager[None]:
    """Within the block SIGTERM is as Ctrl-C, so that what is half loaded is taken down: Ray's own handler aborts the process.

    Python hands signals to the main thread alone; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    return _handling(signal.default_int_handler, signal.SIGTERM)


def _stopping(stop: threading.Event) -> contextlib.AbstractContextManager[None]:
    """Within the block SIGTERM and Ctrl-C set the event. Not to be entered before Ray runs: it takes SIGTERM for itself."""
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
    while not stop.wait(1.0):  # not for ever at once: a signal is seen between two waits
        pass


def _check_room(settings: config.Config) -> None:
    """What would otherwise wait for ever for cores that a single machine does not have."""
    import ray

    limits = settings.serve
    wanted = sum(
        copies.min_replicas * copies.num_cpus for copies in (limits.ingress, limits.retriever, limits.generator)
    )
    there = ray.cluster_resources().get("CPU", 0.0)
    if wanted > there and len(ray.nodes()) == 1:
        raise config.ConfigError(
            f"serve: the fewest copies reserve {wanted:g} cores and Ray has {there:g}; lower serve.generator.num_cpus or "
            "serve.retriever.num_cpus"
        )


def _refuse_other_serve() -> None:
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise ServeError(
        "Serve runs on this cluster already, with a host and port of its own; add this endpoint to it with: serve deploy "
        "deploy/serve.yaml"
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
        logger.warning("what was under way could not be waited for: %s", error)


def _wait_for_proxy(host: str, port: int) -> None:
    """Serve calls an application ready before its proxy listens, which takes long on a busy machine."""
    deadline = time.monotonic() + PROXY_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServeError(
                    f"nothing listens at {host} port {port} {PROXY_SECONDS:.0f} seconds after Serve called the endpoint ready; "
                    "see the logs of Ray Serve's proxy"
                ) from error
            time.sleep(0.1)


def _free_port(host: str) -> int:
    with _listening(host, 0) as probe:
        return int(probe.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    try:
        _listening(host, port).close()
    except OSError as error:
        raise config.ConfigError(
            f"serve.port {port}: {host} cannot be listened to there ({error.strerror}); stop what does, or name another port"
        ) from error


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_STREAM)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
    except OSError:
        probe.close()
        raise
    return probe
