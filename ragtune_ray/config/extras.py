"""The optional libraries: which of them a config needs, and the command that installs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragtune_ray.config.tree import Config

DISTRIBUTION = "ragtune-ray"


def missing(settings: Config) -> list[str]:
    """The extras that must be installed before these settings work; files of a corpus may need others."""
    engines = {settings.generator.engine, *(hosted.engine for hosted in settings.compare.hosted.values())}
    engines |= {settings.evaluate.judge.engine} if settings.evaluate.judge.model else set()
    engines |= {settings.questions.engine} if settings.questions.model else set()
    needed = {
        "openai": "openai" in engines,
        "vllm": "vllm" in engines,
        "quantization": settings.training.quantization != "none",
        "s3": any(text.startswith("s3://") for text in _texts(settings.model_dump())),
    }
    libraries = {"openai": "openai", "vllm": "vllm", "quantization": "bitsandbytes", "s3": "s3fs"}
    return [name for name in needed if needed[name] and importlib.util.find_spec(libraries[name]) is None]


def install_command(*extras: str) -> str:
    """The shell command that installs the libraries of these extras into the environment of this process.

    It names the libraries, so that it works wherever ragtune-ray itself came from: an index, a wheel or a clone.
    """
    found = dict.fromkeys(requirement for extra in extras for requirement in _requirements(extra))
    named = list(found) or [f"{DISTRIBUTION}[{','.join(extras)}]"]
    return f"{_pip()} install {' '.join(map(shlex.quote, named))}"


def _requirements(extra: str) -> Iterator[str]:
    """What the extra installs, such as `pypdfium2>=5`, from the metadata of this package; nothing if it is not installed."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for each in declared:
        requirement, _, marker = each.partition(";")
        if re.search(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""", marker):
            yield requirement.strip()


def _pip() -> str:
    """`pip` if that is the one of this process, otherwise a command that is, such as `.venv/bin/python -m pip`."""
    python, found = Path(sys.executable), shutil.which("pip")
    if found and Path(found).parent == python.parent:
        return "pip"
    here = Path.cwd()
    return f"{shlex.quote(str(python.relative_to(here) if python.is_relative_to(here) else python))} -m pip"


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
