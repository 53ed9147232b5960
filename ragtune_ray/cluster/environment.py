"""The environment variables with which Ray's processes run.

Processes that a session starts on this machine inherit its variables. Those of a cluster that is there already take theirs from
where it was started, and worker processes besides from the session's runtime environment, which carries the variables below.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from ragtune_ray import config

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
"""Variables that every process of Ray Serve reads when it starts."""

NOTICE_ENVIRONMENT = {
    # Milliseconds without an answer until the driver asks a machine whether it is there, and how long it waits. With the defaults
    # of 5 and 2 minutes, a task of a machine that vanished counts as running for so long. Ray's servers refuse to be asked more
    # often than once a minute.
    "RAY_grpc_client_keepalive_time_ms": "61000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
}
"""Variables that let Ray notice a lost machine sooner."""

FORWARDED = (
    *SERVE_ENVIRONMENT,
    *NOTICE_ENVIRONMENT,
    "MALLOC_ARENA_MAX",
    "RAGTUNE_CACHE_BYTES",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)
"""Variables of the driver that workers of a cluster get, if they are set. None of them is a secret: everyone who may see the
cluster's dashboard sees them. `cluster.worker_variables` names more."""


def set_here(*, for_training: bool = False) -> None:
    """Set what this process and those that it starts read; variables that the user has set stay.

    For training, workers run at normal priority and with one heap for all their threads. Ray's default, a lower priority,
    interrupts threads that wait for each other; one heap lets a thread reuse memory that another one freed
    (`hardware.keep_freed_memory`).
    """
    if for_training:
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Internal warnings of Ray's C++ core would interrupt the progress lines.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Without this, every Parquet read starts 32 actors for file footers. It must be set before Ray is imported.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    for name, value in (SERVE_ENVIRONMENT | NOTICE_ENVIRONMENT).items():
        os.environ.setdefault(name, value)


def of_workers(settings: config.Cluster) -> dict[str, Any]:
    """The runtime environment for workers of a cluster.

    Raises:
        ConfigError: `cluster.worker_variables` names a variable that is not set here.
    """
    for name in settings.worker_variables:
        if name not in os.environ:
            raise config.ConfigError(
                f"cluster.worker_variables: {name} is not set where this command runs; export it, or leave it out"
            )
    names = dict.fromkeys([*FORWARDED, *settings.worker_variables])
    return {
        "env_vars": {name: os.environ[name] for name in names if name in os.environ},
        "worker_process_setup_hook": f"{__name__}.set_up_worker",
    }


def set_up_worker() -> None:
    """Name the network interface of this node to gloo, which otherwise takes the one of the host's name: often loopback."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface(_address())):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface(address: str) -> str:
    """The network interface of this machine that has an address; "" if none has."""
    import psutil

    found = ((name, each) for name, addresses in psutil.net_if_addrs().items() for each in addresses)
    kinds = (socket.AF_INET, socket.AF_INET6)
    return next((str(name) for name, each in found if each.address == address and each.family in kinds), "")


def _address() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())
