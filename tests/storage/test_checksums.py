"""Canonical JSON and its digests."""

from ragtune_ray.storage import checksums


def test_canonical_json_is_pinned() -> None:
    """Manifests, run ids and index versions are named by these bytes: sorted keys, one space, UTF-8 as it is."""
    value = {"name": "Zürich – 東京", "top_k": 5, "arms": ["rag"], "empty": None}
    expected = '{\n "arms": [\n  "rag"\n ],\n "empty": null,\n "name": "Zürich – 東京",\n "top_k": 5\n}\n'
    assert checksums.canonical_json(value) == expected.encode()
