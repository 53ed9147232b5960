"""The checks of `ragtune doctor --security`: who can reach Ray and the endpoint, who can read keys, and who can change models.

They start nothing and read no secrets.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ragtune_ray import config
from ragtune_ray.cluster.doctor import Finding, Level, check_authentication, check_versions
from ragtune_ray.generation.openai_client import is_loopback
from ragtune_ray.serving import api_keys, middleware

RAY_PORTS = {6379: "the head node of Ray (GCS)", 8265: "the Ray dashboard", 10001: "the Ray client server"}
"""Whoever reaches one of these ports without a token can run code on the cluster."""


def _is_on(value: str) -> bool:
    return value.lower() in {"1", "true", "yes", "y", "on"}


UNSAFE: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (_is_on, "PyTorch unpickles checkpoints, which can run code"),
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA": (
        _is_on,
        "Ray unpickles metadata of Parquet files, which can run code",
    ),
    "SSLKEYLOGFILE": (bool, "the keys of encrypted connections are written to that file"),
    "HF_ENDPOINT": (lambda value: value.startswith("http://"), "models are downloaded without encryption"),
}
"""Environment variables that undo a protection: which values do, and what then happens."""


def examine_security(settings: config.Config) -> Iterator[Finding]:
    """Run every check of security, and nothing else."""
    yield from check_versions()
    yield check_authentication()
    yield from _reachable_ports()
    yield from _environment()
    yield from _endpoint(settings)
    yield from _hosted(settings)
    yield _workspace(settings)


def _reachable_ports() -> Iterator[Finding]:
    """Which ports of Ray other machines can reach."""
    import psutil

    try:
        sockets = psutil.net_connections(kind="inet")
    except psutil.AccessDenied:
        fix = "run this command as root, or look with: lsof -i"
        yield Finding("open ports", "note", "this system does not let you see which ports are open", fix)
        return
    listening = {(each.laddr.port, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN}
    for port, name in RAY_PORTS.items():
        public = sorted(ip for each, ip in listening if each == port and not is_loopback(ip))
        if not public:
            yield Finding(f"port {port}", "ok", f"{name} is not reachable from other machines", "")
            continue
        wall = "a firewall that admits only machines of the cluster"
        closing = f"ray start --dashboard-host=127.0.0.1, or {wall}" if port == 8265 else wall
        fix = f"{closing}; and export RAY_AUTH_MODE=token before it starts"
        level: Level = "note" if os.environ.get("RAY_AUTH_MODE") == "token" else "failed"
        yield Finding(f"port {port}", level, f"{name} listens on {', '.join(public)}", fix)


def _environment() -> Iterator[Finding]:
    found = [(name, why) for name, (undoes, why) in UNSAFE.items() if name in os.environ and undoes(os.environ[name])]
    for name, why in found:
        yield Finding("environment", "failed", f"{name}={os.environ[name]}: {why}", f"unset {name}")
    if not found:
        yield Finding("environment", "ok", "no variable undoes a protection", "")


def _endpoint(settings: config.Config) -> Iterator[Finding]:
    path = Path(settings.serve.keys_path)
    if settings.serve.keys_path and path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding("api keys", "failed", f"others can read {path}", f"chmod 600 {path}")
    try:
        keys = api_keys.load_keys(settings)
        middleware.check_exposure(settings, keys)
    except config.ConfigError as error:
        yield Finding("endpoint", "failed", str(error), "see docs/serving.md")
        return
    who = "needs an API key" if keys else "answers only this machine, without a key"
    yield Finding("endpoint", "ok", f"{settings.serve.host}: {who}", "")


def _hosted(settings: config.Config) -> Iterator[Finding]:
    """Whether questions and keys are sent to other machines without encryption."""
    urls = {"generator.base_url": settings.generator.base_url}
    urls |= {f"compare.hosted.{name}.base_url": each.base_url for name, each in settings.compare.hosted.items()}
    if settings.evaluate.judge.model and settings.evaluate.judge.engine == "openai":
        urls["evaluate.judge.base_url"] = settings.evaluate.judge.base_url
    for field, url in urls.items():
        host = urlsplit(url).hostname or ""  # the URL itself may contain a password
        if urlsplit(url).scheme == "http" and not is_loopback(host):
            text = f"the connection to {host} is not encrypted: others may read questions, passages and the key"
            yield Finding(field, "failed", text, "use https://")


def _workspace(settings: config.Config) -> Finding:
    if "://" in settings.workspace:
        return Finding("workspace", "note", f"{settings.workspace}: its access rules are those of the store", "")
    place = Path(settings.workspace).absolute()
    existing = next(path for path in [place, *place.parents] if path.exists())
    mode = existing.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return Finding("workspace", "failed", f"anyone can replace what is in {existing}", f"chmod o-w {existing}")
    return Finding("workspace", "ok", f"{existing} is writable only by its owner and group", "")
