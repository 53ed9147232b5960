"""Checks whether this machine is ready: versions, hardware, disk, ports, authentication, models, and a ten-document run.

The checks write only to a temporary directory and the model cache.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ragtune_ray import RagtuneError, config
from ragtune_ray.config import extras
from ragtune_ray.ingest import init, survey
from ragtune_ray.ingest.inputs import InputError
from ragtune_ray.models import weights
from ragtune_ray.storage import filesystem

logger = logging.getLogger(__name__)

FLOORS = {"ray": (2, 60), "torch": (2, 10), "transformers": (5, 3), "pyarrow": (14, 0, 1)}
"""Minimum versions. Earlier ones of Ray lack options that the endpoint needs; in earlier ones of the others, a data or model
file can run code (a known vulnerability)."""
MIN_FREE_MEMORY_BYTES = 2 * 2**30
MIN_FREE_DISK_BYTES = 5 * 2**30
MIN_SHARED_MEMORY_BYTES = 256 * 2**20
PORTS = {6379: "ray start --head", 8265: "the Ray dashboard", 8000: "the endpoint"}

Level = Literal["ok", "note", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    level: Level
    text: str
    fix: str
    """What to do; empty if nothing is wrong."""

    @property
    def failed(self) -> bool:
        """Whether ragtune cannot work on this machine."""
        return self.level == "failed"

    def line(self) -> str:
        """One line for the terminal, such as `ok      memory: 23.0 GiB free`."""
        return f"{self.level:<7} {self.name}: {self.text}" + (f" -> {self.fix}" if self.fix else "")

    def facts(self) -> dict[str, str]:
        """The finding as JSON values."""
        return {"name": self.name, "level": self.level, "text": self.text, "fix": self.fix}


def examine(settings: config.Config) -> Iterator[Finding]:
    """Run every check, cheap ones first. The end-to-end run is skipped if a model is missing.

    The corpus and the questions are read as `ragtune init` does: every file is listed, a sample of the documents is read.
    """
    yield from check_versions()
    yield _processor()
    yield _memory()
    yield from _disk(settings)
    yield _shared_memory()
    yield from _ports()
    yield check_authentication()
    yield from _inputs(settings)
    resolved = []
    for name in _model_names(settings):
        finding = _model(name)
        resolved.append(not finding.failed)
        yield finding
    if all(resolved):
        yield _probe(settings)
    else:
        yield Finding("end to end", "note", "skipped, because a model is missing", "")


def check_versions() -> Iterator[Finding]:
    """Whether the installed libraries have the minimum versions."""
    for package, floor in FLOORS.items():
        version = importlib.metadata.version(package)
        parts = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
        if parts < floor:
            fix = f"pip install '{package}>={'.'.join(map(str, floor))}'"
            problem = "lacks what the endpoint needs" if package == "ray" else "has a known vulnerability"
            yield Finding(package, "failed", f"{version} {problem}", fix)
        else:
            yield Finding(package, "ok", version, "")


def _processor() -> Finding:
    import torch

    from ragtune_ray.models.hardware import supports_bfloat16

    if torch.cuda.is_available():
        return Finding("processor", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}", "")
    kind = "bfloat16 in hardware" if supports_bfloat16("cpu") else "no bfloat16: encoding and answering run in float32"
    return Finding("processor", "ok", f"{os.cpu_count()} cores ({platform.machine()}), no GPU, {kind}", "")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    if free < MIN_FREE_MEMORY_BYTES:
        return Finding("memory", "failed", f"{_gib(free)} free", f"free at least {_gib(MIN_FREE_MEMORY_BYTES)}")
    return Finding("memory", "ok", f"{_gib(free)} free", "")


def _disk(settings: config.Config) -> Iterator[Finding]:
    places = {"disk (model cache)": filesystem.cache_directory(), "disk (temporary)": Path(tempfile.gettempdir())}
    if "://" not in settings.workspace:
        places["disk (workspace)"] = Path(settings.workspace)
    for name, place in places.items():
        existing = next(path for path in [place.absolute(), *place.absolute().parents] if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            fix = "set RAGTUNE_CACHE, TMPDIR or the workspace to a folder that you can write"
            yield Finding(name, "failed", f"{place} cannot be written", fix)
            continue
        usage = shutil.disk_usage(existing)
        text = f"{_gib(usage.free)} free at {existing}"
        if usage.free < MIN_FREE_DISK_BYTES:
            yield Finding(name, "failed", text, f"free at least {_gib(MIN_FREE_DISK_BYTES)}")
        elif usage.used / usage.total > 0.9:
            yield Finding(name, "note", f"{text}; more than 90 % used", "Ray stops spilling objects at 95 %")
        else:
            yield Finding(name, "ok", text, "")


def _shared_memory() -> Finding:
    shared = Path("/dev", "shm")
    if not shared.exists():
        return Finding("shared memory", "note", "no /dev/shm: Ray keeps its objects on disk", "slower, but works")
    size = shutil.disk_usage(shared).total
    if size < MIN_SHARED_MEMORY_BYTES:
        return Finding("shared memory", "failed", f"{shared} has {_gib(size)}", "docker run --shm-size=2g")
    return Finding("shared memory", "ok", f"{shared} has {_gib(size)}", "")


def _ports() -> Iterator[Finding]:
    for port, user in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(0.5)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            yield Finding(f"port {port}", "note", f"in use; {user} needs it", f"harmless if {user} is what uses it")
        else:
            yield Finding(f"port {port}", "ok", "free", "")


def check_authentication() -> Finding:
    """Whether clients of Ray must present a token, and whether others can read it."""
    mode = os.environ.get("RAY_AUTH_MODE")
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if mode == "disabled":
        fix = "export RAY_AUTH_MODE=token before a cluster starts"
        return Finding("ray auth", "note", "RAY_AUTH_MODE=disabled", fix)
    if token.exists() and token.stat().st_mode & 0o077:
        return Finding("ray auth", "note", f"{token} is readable by others", f"chmod 600 {token}")
    if mode == "token":
        return Finding("ray auth", "ok", "token", "")
    text = "RAY_AUTH_MODE is unset: local sessions use a token, but clients of a cluster do not send one"
    return Finding("ray auth", "note", text, "export RAY_AUTH_MODE=token wherever you use a cluster")


def _inputs(settings: config.Config) -> Iterator[Finding]:
    """Look at the corpus and the questions, and name every missing library at once."""
    missing = extras.missing(settings)
    if settings.corpus.path:
        try:
            corpus = survey.survey_corpus(settings.corpus.path)
        except InputError as error:
            yield Finding("corpus", "failed", str(error), "see corpus.path")
        else:
            missing += corpus.extras
            unread = "; ".join(f"not read: {each.num_files} {each.suffix} ({each.reason})" for each in corpus.unread)
            text = f"{corpus.path}: {init.describe_corpus(corpus)}" + (f"; {unread}" if unread else "")
            yield Finding("corpus", "note" if unread else "ok", text, "")
    if settings.queries.path:
        try:
            questions = survey.survey_questions(settings.queries.path)
        except InputError as error:
            yield Finding("questions", "failed", str(error), "see queries.path")
        else:
            rejects = f"; {questions.num_rejects:,} rows are not usable, the first: {questions.first_reject}"
            text = f"{questions.path}: {init.describe_questions(questions)}" + (
                rejects if questions.num_rejects else ""
            )
            yield Finding("questions", "note" if questions.num_rejects else "ok", text, "")
    if missing:
        text = f"missing for these inputs and settings: {', '.join(missing)}"
        yield Finding("libraries", "failed", text, extras.install_command(*missing))


def _model_names(settings: config.Config) -> list[str]:
    names = [settings.encoder.model, settings.retrieval.reranker]
    if settings.generator.engine != "openai":
        names.append(settings.generator.model)
    return [name for name in names if name]


def _model(name: str) -> Finding:
    try:
        model = weights.resolve(name)
    except weights.ModelError as error:
        return Finding("model", "failed", str(error), "ragtune models")
    return Finding("model", "ok", f"{name} ({model.fingerprint})", "")


def _probe(settings: config.Config) -> Finding:
    """Index ten documents, then retrieve and answer one question."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ragtune-doctor-") as folder:
        try:
            answer = _end_to_end(settings, Path(folder))
        except (RagtuneError, ValueError, RuntimeError, OSError) as error:
            logger.debug("the probe failed", exc_info=True)
            return Finding("end to end", "failed", str(error), "run again with --debug for the traceback")
    text = f"10 documents indexed and one question answered ({answer!r}) in {time.monotonic() - started:.1f} s"
    return Finding("end to end", "ok", text, "")


def _end_to_end(settings: config.Config, folder: Path) -> str:
    from ragtune_ray.asking import ask
    from ragtune_ray.cluster import session
    from ragtune_ray.cluster.indexing.index import build_index

    documents = folder / "documents"
    documents.mkdir()
    for number in range(10):
        text = f"Probe number {number} weighs {number + 10} kilograms and was painted in colour {number}.\n"
        (documents / f"probe-{number}.txt").write_text(text, encoding="utf-8")
    # Use Ray, which must be checked too; ten documents would be indexed without it.
    address = session.cluster_address(settings.cluster) or session.LOCAL
    overrides = {"corpus.path": documents, "workspace": folder / "workspace", "cluster.address": address}
    probe = settings.with_values({**overrides, **PROBED})
    build_index(probe)
    answered = ask(probe, "How much does probe number 7 weigh?")
    expected = "probe-7.txt"
    found = [passage.document_id for passage in answered.passages]
    if expected not in found:
        raise RagtuneError(f"retrieval found {found}, expected {expected} among them")
    return answered.text


# Overrides of settings that fit the user's own documents but not the ten documents of the probe.
PROBED: dict[str, object] = {
    "generator.max_new_tokens": 16,
    "answer.arm": "rag",
    "answer.closed_book": False,
    "answer.gold_passage": False,
    "retrieval.filter": {},
    "retrieval.tenant": "",
    "index.tenant_field": "",
}


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
