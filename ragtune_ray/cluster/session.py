"""A connection to Ray that is quiet and safe by default.

In: the `cluster` section of the config. Out: a Ray session for the duration of a verb, and how many workers fit. This module
knows nothing of what runs on the cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragtune_ray import config

__all__ = [
    "SERVE_ENVIRONMENT",
    "cores_of_this_machine",
    "log_with_serve",
    "ray_session",
    "use_one_thread",
    "worker_options",
    "workers",
]

SERVE_ENVIRONMENT = {
    # Calls between copies go over gRPC instead of Ray's object store. With the next one, a request costs 20 ms of CPU and not 36
    # (docs/measurements.md).
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # A copy's code runs in the loop that takes its requests, not in a thread beside it that each must be handed to: nothing of
    # ours blocks a loop, and late answers come sooner.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Seconds after which its controller looks at each copy again: of 0.1 it took 5 % of a core, with nothing to do.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # What copies log stands in files; nobody reads their stderr as well.
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""What Ray Serve reads from the environment of each of its processes, so what must be set where Ray is started."""


@contextlib.contextmanager
def ray_session(settings: config.Cluster, *, for_training: bool = False) -> Iterator[None]:
    """Use the Ray that is already connected, else the cluster of the config or RAY_ADDRESS, else one on this machine.

    A session opened here is closed at the end; one that the caller opened is left alone.

    Args:
        settings: the section `cluster`.
        for_training: workers of a Ray that is started here are not put behind Ray's own processes, as Ray does by default, since
            threads that wait for each other all stop where one is interrupted; and all their threads share one heap, so that
            what one frees another finds (`hardware.keep_freed_memory`).
    """
    if for_training:
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Warnings of the C++ core about its own internals would break into the progress lines.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Set before Ray is imported: each Parquet read would otherwise start 32 actors for its footers.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        # On by default for local sessions of this Ray version only; never rely on an unset default.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        _settle_ray_data()
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _silent_core():
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(include_dashboard=False, **quiet)
    _settle_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def workers(wanted: int, gpus_per_worker: float) -> int:
    """How many single-core (or GPU) actors to use: the config's number, else one per core or GPU of the cluster."""
    if wanted:
        return wanted
    import ray

    resources = ray.cluster_resources()
    if gpus_per_worker:
        return max(1, int(resources.get("GPU", 0) / gpus_per_worker))
    return max(1, int(resources.get("CPU", 1)))


def worker_options(settings: config.Cluster) -> dict[str, Any]:
    """What each model-holding actor reserves; the `map_batches` arguments for it."""
    options: dict[str, Any] = {"num_cpus": 1}
    if settings.gpus_per_worker:
        options["num_gpus"] = settings.gpus_per_worker
    if settings.memory_per_worker_bytes:
        options["memory"] = settings.memory_per_worker_bytes
    return options


def cores_of_this_machine() -> float:
    """The cores that Ray has on the machine where this process runs: of a container its share, not all that it sees."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (found,) = (node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == here)
    return float(found)


def use_one_thread() -> None:
    """Let this worker process compute on one core: one such worker per core beats one worker on all of them."""
    use_threads(1)


def use_threads(num_threads: int) -> None:
    """Let this worker process compute on so many cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # What is not imported yet reads this when it is; importing it here would cost seconds where it is not needed.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(num_threads)


def log_with_serve() -> None:
    """Let this replica's own log lines stand in Serve's log of it; they would be seen nowhere."""
    own = logging.getLogger("ragtune_ray")
    own.setLevel(logging.INFO)
    own.handlers = list(logging.getLogger("ray.serve").handlers)
    own.propagate = False


@contextlib.contextmanager
def _silent_core() -> Iterator[None]:
    """Ray's C++ core writes notes about itself to the process's stderr while it starts; failures are exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _settle_ray_data() -> None:
    """Ray Data's own bars and banners off: `progress` shows one line per stage instead. And pools that keep their actors.

    Our actors take one unit at a time (`runs.pool`), so a pool is used to 1.0 at most. Ray Data adds an actor from 1.75 on and
    takes one away at 0.5: an actor that a slow start left idle never came back, and half the cores stood still.
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
