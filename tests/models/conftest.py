"""A model directory and an empty cache, for the tests of models."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network access."""
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    files = {
        "model.safetensors": b"weights",
        "config.json": b'{"hidden_size": 8}',
        "tokenizer.json": b"{}",
        "vocab.txt": b"a\nb\n",
        "chat_template.jinja": b"{{ x }}",
        "spiece.model": b"pieces",
        "1_Pooling/config.json": b'{"mean": true}',
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path
