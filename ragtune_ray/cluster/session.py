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
from ragtune_ray.cluster import actors

SERVE_ENVIRONMENT = {
    # Calls between replicas use gRPC instead of Ray's object store. This and the next setting cut the CPU time of a request
    # from 36 to 20 ms (docs/measurements.md).
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # User code runs in the event loop that receives the requests, not in a second thread, which shortens the slowest answers.
    # This is safe because our code never blocks the loop.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Seconds between the controller's checks of each replica. The default of 0.1 takes 5 % of a core even without requests.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Serve's HTTP server waits for the headers of a request forever, and replies 404 until it knows its routes.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ragtune_ray.cluster.serving.proxy_callback:install",
    # Replicas log to files; nobody reads their stderr.
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""Environment variables that every Ray Serve process reads, so they must be set before Ray starts."""

START_ATTEMPTS = 2
LOCAL = "local"
"""The value of `cluster.address` that starts Ray on this machine, even for inputs small enough to process without it."""


@contextlib.contextmanager
def ray_session(settings: config.Cluster, *, for_training: bool = False) -> Iterator[None]:
    """Use the open Ray session if there is one; otherwise connect to `cluster.address` or RAY_ADDRESS, or start Ray here.

    Sessions nest: an inner session leaves the outer one open, and the actors of `actors` live until the outermost one ends.

    Args:
        settings: the section `cluster`.
        for_training: if Ray is started here, run workers at normal priority and with one heap for all their threads. Ray's
            default, a lower priority, interrupts threads that wait for each other; one heap lets a thread reuse memory that
            another one freed (`hardware.keep_freed_memory`).
    """
    if for_training:
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Internal warnings of Ray's C++ core would interrupt the progress lines.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Without this, every Parquet read starts 32 actors for file footers. It must be set before Ray is imported.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
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
    _start(address)
    _configure_ray_data()
    try:
        with _releasing_actors(settings):
            yield
    finally:
        ray.shutdown()


class StartError(RagtuneError, RuntimeError):
    """Ray did not start on this machine."""


def _start(address: str) -> None:
    """Connect to a cluster, or start Ray here; a start that takes too long is tried once more.

    Raises:
        StartError: it took too long again.
    """
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        with _silent_core():
            ray.init(address=address, **quiet)
        return
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _silent_core():
                ray.init(include_dashboard=False, **quiet)
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


def cluster_address(settings: config.Cluster) -> str:
    """Address of the cluster to connect to; "" if Ray starts on this machine."""
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == LOCAL else address


def workers(configured: int, gpus_per_worker: float) -> int:
    """The configured number of workers; if that is 0, one per core (or share of a GPU) of the cluster."""
    if configured:
        return configured
    import ray

    resources = ray.cluster_resources()
    if gpus_per_worker:
        return max(1, int(resources.get("GPU", 0) / gpus_per_worker))
    return max(1, int(resources.get("CPU", 1)))


def pool(worker: type, arguments: dict[str, Any], configured: int, settings: config.Cluster) -> actors.Pool:
    """A pool of the configured number of actors; if that is 0, as many as `workers`, and more when nodes join."""

    def room() -> int:
        return workers(configured, settings.gpus_per_worker)

    return actors.Pool(worker, arguments, room(), worker_options(settings), None if configured else room)


def worker_options(settings: config.Cluster) -> dict[str, Any]:
    """The resources that an actor with a model reserves, as options of Ray."""
    options: dict[str, Any] = {"num_cpus": 1}
    if settings.gpus_per_worker:
        options["num_gpus"] = settings.gpus_per_worker
    if settings.memory_per_worker_bytes:
        options["memory"] = settings.memory_per_worker_bytes
    return options


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
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_operator_progress_bars = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
