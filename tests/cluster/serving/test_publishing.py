"""Changes of documents that clients send: the answer is about this change alone, and a failure changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.serving.publishing import publish
from ragtune_ray.index import versions
from ragtune_ray.models.encoder import HashingEncoder
from ragtune_ray.serving.backend import Change, Failed
from ragtune_ray.storage import filesystem
from tests.support.index_changes import settings_of, texts_of


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    return settings_of(tmp_path).using("index.compact_segments=2")


def row(document_id: str, text: str = "amber") -> dict[str, Any]:
    return {"document_id": document_id, "text": text, "title": "", "metadata": {}}


def upserted(settings: config.Config, *rows: dict[str, Any]) -> Any:
    return publish(settings, Change(upserted=rows))


def facts(version: int, missing: tuple[str, ...] = (), **counts: int) -> dict[str, Any]:
    none = {"added": 0, "replaced": 0, "deleted": 0, "unchanged": 0, "rejected": []}
    return {"index_version": f"{version:06d}", **none, **counts, "missing": list(missing)}


def test_the_answer_is_about_this_change_alone(settings: config.Config) -> None:
    assert upserted(settings, row("a"), row("b")) == facts(1, added=2)
    assert upserted(settings, row("a"), row("b", "red"), row("c")) == facts(2, added=1, replaced=1, unchanged=1)
    assert upserted(settings, row("a")) == facts(2, unchanged=1)
    assert upserted(settings, row("d")) == facts(4, added=1), "the third segment causes a compaction"
    assert versions.read_version(settings.workspace, "000004").manifest["operation"] == "compact"
    assert publish(settings, Change(deleted=("a", "x"))) == facts(5, deleted=1, missing=("x",))
    assert publish(settings, Change(deleted=("a", "y"))) == facts(5, missing=("a", "y"))
    assert texts_of(settings.workspace) == {"b": "red", "c": "amber", "d": "amber"}


def test_a_passage_without_a_vector_fails_the_whole_change(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    upserted(settings, row("a"))
    encode = HashingEncoder.encode_passages

    def broken(self: HashingEncoder, texts: Any) -> np.ndarray:
        vectors = encode(self, texts)
        vectors[["burns" in text for text in texts]] = np.nan
        return vectors

    monkeypatch.setattr(HashingEncoder, "encode_passages", broken)
    failed = upserted(settings, row("a", "it burns"), row("new"))
    assert failed == Failed(
        422, "nothing was changed: a#0: the encoder returned no finite vector", "documents_rejected"
    )
    assert texts_of(settings.workspace) == {"a": "amber"}


def test_a_reject_of_a_row_is_told_by_its_number_and_without_a_path(settings: config.Config) -> None:
    failed = upserted(settings.using("index.tenant_field=owner"), row("a"), row("b") | {"text": " "})
    reason = "no tenant: metadata must name it as text in 'owner' (index.tenant_field)"
    assert failed == Failed(
        422, f"nothing was changed: document 1: {reason}; document 2: empty document", "documents_rejected"
    )


def test_failures_are_told_in_words_for_clients(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert publish(settings, Change(deleted=("a",))) == Failed(
        409, "this endpoint has no index; add documents first", "no_index"
    )
    upserted(settings, row("a"))
    other = upserted(settings.using("chunking.size_tokens=9"), row("b"))
    assert (other.status, other.code) == (409, "index_mismatch")

    def full(*_: Any) -> None:
        raise filesystem.SpaceError("/home/x: 3 bytes are free")

    monkeypatch.setattr(filesystem, "require_space", full)
    assert upserted(settings, row("b")).status == 507
    assert "/home" not in upserted(settings, row("b")).message
    assert texts_of(settings.workspace) == {"a": "amber"}
