"""Hints install what is missing, wherever this package came from."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.config import extras

DECLARED = [
    "torch>=2.10",
    'pypdfium2>=5; extra == "pdf"',
    "python-docx>=1.2 ; (python_version >= '3') and extra == 'docx'",
    'selectolax>=0.4; extra == "html"',
    'selectolax>=0.4; extra == "epub"',
]


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: DECLARED)
    monkeypatch.setattr(extras.shutil, "which", lambda _: str(Path(sys.executable).with_name("pip")))


def test_the_command_names_the_libraries_of_all_extras_at_once() -> None:
    assert extras.install_command("pdf", "docx") == "pip install 'pypdfium2>=5' 'python-docx>=1.2'"
    assert extras.install_command("html", "epub") == "pip install 'selectolax>=0.4'"


def test_another_pip_on_the_path_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras.shutil, "which", lambda _: "/usr/bin/pip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert extras.install_command("html") == ".venv/bin/python -m pip install 'selectolax>=0.4'"


def test_without_metadata_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert extras.install_command("pdf", "s3") == "pip install 'ragtune-ray[pdf,s3]'"


def test_settings_need_the_libraries_of_their_urls_and_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert extras.missing(config.Config()) == []
    assert extras.missing(config.Config().using("queries.path=s3://b/q.jsonl", "generator.engine=openai")) == [
        "openai",
        "s3",
    ]
    hosted = config.Config().using("compare.hosted={a: {model: m}}", "compare.variants={b: {encoder.model: s3://b/m}}")
    assert extras.missing(hosted) == ["openai", "s3"]
    quantized = config.Config().using("training.lora_rank=8", "training.quantization=nf4")
    assert extras.missing(quantized) == ["quantization"]
