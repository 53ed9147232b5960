"""Opens a quiet Ray session for the duration of a verb, and counts the workers that fit into the cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragtune_ray import RagtuneError, config, progress
from ragtune_ray.cluster import actors, environment
from ragtune_ray.models import staging, weights

logger = logging.getLogger(__name__)

START_ATTEMPTS = 2
AHEAD = 8
"""How many actors of a pool may wait for room on a cluster."""
RESERVED_SHARE = 0.1
"""Of a cluster's cores and object store, what Ray Data keeps for each operator whether it needs them or not, in all.

With its default of a half, the operators beside the encoders would keep cores that they never use, and encoders would get too few
of those of nodes that join.
"""
LOCAL = "local"
"""The value of `cluster.address` that starts Ray on this machine, even for inputs small enough to process without it."""


@contextlib.contextmanager
def ray_session(settings: config.Cluster, *, for_training: bool = False) -> Iterator[None]:
    """Use the open Ray session if there is one; otherwise connect to `cluster.address` or RAY_ADDRESS, or start Ray here.

    Sessions nest: an inner session leaves the outer one open, and the actors of `actors` live until the outermost one ends.

    Args:
        settings: the section `cluster`.
        for_training: run workers with one heap for all their threads and, if Ray is started here, at normal priority: see
            `environment`.
    """
    environment.set_here(for_training=for_training)
    address = cluster_address(settings)
    if not address:
        # The default for local sessions differs between Ray versions, so set it explicitly.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        _configure_ray_data()
        with _releasing_actors(settings):
            yield
        return
    _start(address, environment.of_workers(settings))
    _configure_ray_data()
    try:
        with _releasing_actors(settings):
            yield
    finally:
        ray.shutdown()


class StartError(RagtuneError, RuntimeError):
    """Ray did not start on this machine."""


def _start(address: str, runtime_env: dict[str, Any] | None = None) -> None:
    """Connect to a cluster, or start Ray here; a start that takes too long is tried once more.

    Raises:
        StartError: it took too long again.
    """
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        # In a submitted job, Ray would refuse to add to the variables of the job.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        with _silent_core():
            ray.init(address=address, runtime_env=runtime_env, **quiet)
        return
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _silent_core():
                # Without an address, Ray would look for the cluster that was started last, even if it is gone.
                ray.init(address=LOCAL, include_dashboard=False, **quiet)
            return
        except Exception as error:
            # Ray raises a plain Exception when its own processes do not answer in 30 seconds.
            if not _took_too_long(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise StartError(
                    f"Ray did not start on this machine in {START_ATTEMPTS} attempts ({_first_line(error)}); usually "
                    "other work keeps its cores or its disk busy: wait or stop that work, then run the command again; "
                    "`ragtune doctor` checks memory, disk and ports; the logs are in /tmp/ray/session_latest/logs"
                ) from error
            progress.say("Ray took too long to start; trying once more")


def _took_too_long(error: Exception) -> bool:
    """Whether Ray gave up waiting for its own processes."""
    return isinstance(error, TimeoutError) or "timed out" in str(error).lower()


def _first_line(error: Exception) -> str:
    """The first sentence of a message, without its full stop."""
    return str(error).strip().partition(". ")[0].rstrip(".")


_open: list[config.Cluster] = []
"""The settings of the open sessions, each within the one before."""


@contextlib.contextmanager
def _releasing_actors(settings: config.Cluster) -> Iterator[None]:
    """Release the actors at the end of the block, if this session is the outermost one."""
    _open.append(settings)
    try:
        yield
    finally:
        _open.pop()
        if not _open:
            actors.release()
            actors.left_out.clear()


def cluster_address(settings: config.Cluster) -> str:
    """Address of the cluster to connect to; "" if Ray starts on this machine."""
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == LOCAL else address


def workers(configured: int, gpus_per_worker: float) -> int:
    """The configured number of workers; if that is 0, one per core (or share of a GPU) of the nodes that may get work now."""
    if configured:
        return configured
    import ray

    kind = "GPU" if gpus_per_worker else "CPU"
    available = ray.cluster_resources().get(kind, 0)
    if actors.left_out:
        nodes = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] in actors.left_out)
        available -= sum(node["Resources"].get(kind, 0) for node in nodes)
    return max(1, int(available / (gpus_per_worker or 1)))


def pool(worker: type, arguments: dict[str, Any], configured: int, settings: config.Cluster) -> actors.Pool:
    """A pool of the configured number of actors; if that is 0, as many as `workers`, and more when nodes join.

    On a cluster some more actors than have room are started, so that an autoscaler adds nodes for them. If the worker's arguments
    contain the config as `settings`, the workers find the models of `models`.
    """
    ahead = AHEAD if spans_machines(settings) else 0

    def room() -> int:
        return workers(configured, settings.gpus_per_worker) + ahead

    given = arguments.get("settings")
    staged = models(given) if isinstance(given, config.Config) else {}
    if configured:
        return actors.Pool(worker, arguments, configured, worker_options(settings), models=staged)
    return actors.Pool(worker, arguments, room(), worker_options(settings), room, staged)


def models(settings: config.Config) -> dict[str, str]:
    """Where workers find the models that this process has resolved: name -> URL; nothing if all work is on this machine.

    A model that is not in the workspace yet is put there. Call it in a Ray session, after the models of a stage were resolved.
    """
    if not spans_machines(settings.cluster):
        return {}
    urls = {name: staging.stage(model, settings.workspace) for name, model in weights.found().items()}
    return {name: url for name, url in urls.items() if url}


def leave_out_nodes_without(models: dict[str, str]) -> None:
    """Give no work to nodes that cannot open one of `models` (name -> URL), and say why; the others have them when this returns.

    Nodes that are left out already are not asked again.

    Raises:
        RayTaskError: no node can open them.
    """
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not models:
        return
    task = ray.remote(num_cpus=0, max_retries=0)(_open_models)
    nodes = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] not in actors.left_out
    ]
    # A label selector would wait forever for a node that is lost now.
    opened = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(models)
        for name in nodes
    ]
    reasons: dict[str, ray.exceptions.RayTaskError] = {}
    for name, reference in zip(nodes, opened, strict=True):
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            reasons[name] = error
        except ray.exceptions.RayError:
            logger.info("node %s was lost while it opened models", name)
    if reasons and len(reasons) == len(nodes):
        raise next(iter(reasons.values()))
    for name, failure in reasons.items():
        said = " ".join(str(failure.cause).split())
        progress.say(f"node {name[:12]} cannot open the models and gets no work: {said}")
    actors.left_out.update(reasons)


def _open_models(models: dict[str, str]) -> None:
    weights.use_staged(models)
    for name in models:
        weights.resolve(name)


def spans_machines(settings: config.Cluster) -> bool:
    """Whether workers may run on other machines than this one: Ray is a cluster, which may also grow."""
    import ray

    if cluster_address(settings):
        return True
    return bool(ray.is_initialized()) and sum(node["Alive"] for node in ray.nodes()) > 1


def max_workers(configured: int, gpus_per_worker: float, num_units: int) -> int:
    """The largest number of workers of a stage: the configured one or, on a cluster that may grow, one per unit."""
    if not configured and spans_machines(_open[-1]):
        return num_units
    return min(workers(configured, gpus_per_worker), num_units)


def worker_options(settings: config.Cluster) -> dict[str, Any]:
    """The resources that an actor with a model reserves, as options of Ray."""
    options: dict[str, Any] = {"num_cpus": 1}
    if settings.gpus_per_worker:
        options["num_gpus"] = settings.gpus_per_worker
    if settings.memory_per_worker_bytes:
        options["memory"] = settings.memory_per_worker_bytes
    return options


def for_generators(settings: config.Config) -> config.Cluster:
    """The section `cluster` for workers with the generator: no GPU if a server computes, and all that vLLM uses."""
    gpus = settings.cluster.gpus_per_worker
    match settings.generator.engine:
        case "openai":
            gpus = 0.0
        case "vllm" if gpus:
            gpus = max(gpus, float(settings.generator.tensor_parallel))
    return settings.cluster.model_copy(update={"gpus_per_worker": gpus})


def cores_of_this_machine() -> float:
    """The cores that Ray uses on this machine (in a container, its share)."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (found,) = (node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == here)
    return float(found)


def use_one_thread() -> None:
    """Limit this process to one core: one such worker per core is faster than one worker on all cores."""
    use_threads(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core during the block, as workers do, so that results are the same to the last bit."""
    variables = {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")}
    if "torch" in sys.modules:
        before = int(sys.modules["torch"].get_num_threads())
    else:
        before = int(variables["OMP_NUM_THREADS"] or len(os.sched_getaffinity(0)))
    use_threads(1)
    try:
        yield
    finally:
        use_threads(before)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def use_threads(num_threads: int) -> None:
    """Limit this process to this many cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Libraries read this when they are imported. Importing them here would cost seconds in workers that do not need them.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(num_threads)


def log_with_serve() -> None:
    """Send this replica's log lines to Serve's log; otherwise they are lost."""
    own = logging.getLogger("ragtune_ray")
    own.setLevel(logging.INFO)
    own.handlers = list(logging.getLogger("ray.serve").handlers)
    own.propagate = False


@contextlib.contextmanager
def _silent_core() -> Iterator[None]:
    """Discard what Ray's C++ core prints to stderr during the block; failures still raise exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _configure_ray_data() -> None:
    """Turn off Ray Data's progress bars (`progress` shows one line per stage) and keep the actors of a pool.

    By default, Ray Data removes an actor of a pool below a utilization of 0.5 and adds one only above 1.75: an actor that idled
    during a slow start would rarely be replaced.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.0
    context.op_resource_reservation_ratio = RESERVED_SHARE
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_operator_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
