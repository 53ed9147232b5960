"""Response bodies in OpenAI's format."""

import base64
import struct

import numpy as np

from ragtune_ray import schema
from ragtune_ray.serving import responses


def test_a_source_has_a_url_only_if_it_is_http() -> None:
    def url(metadata: str) -> object:
        return responses.source(1, schema.Passage("d#0", "d", "x", "", metadata, 0, 1), 0.5)["url"]

    assert url('{"url": "https://nasa.gov/a"}') == "https://nasa.gov/a"
    for bad in (
        '{"url": "javascript:alert(1)"}',
        '{"url": 3}',
        "{}",
        '{"url": "http://["}',
        '{"url": "file:///etc/passwd"}',
    ):
        assert url(bad) is None


def test_annotations_name_each_cited_source_once_by_url_or_urn() -> None:
    passages = [
        schema.Passage("a b#0", "a b", "x", "A", "{}", 0, 1),
        schema.Passage("c#1", "c", "y", "C", '{"url": "https://c.example/"}', 5, 6),
    ]
    sources = [responses.source(n, passage, 0.1) for n, passage in enumerate(passages, 1)]
    cited = [
        schema.Citation("c#1", "c", 5, 6),
        schema.Citation("a b#0", "a b", 0, 1),
        schema.Citation("c#1", "c", 5, 6),
    ]
    marks = responses.url_citations("Yes.", cited, sources)
    assert [mark["url_citation"]["url"] for mark in marks] == ["https://c.example/", "urn:ragtune:a%20b"]
    assert {(m["url_citation"]["start_index"], m["url_citation"]["end_index"]) for m in marks} == {(0, 4)}


def test_embeddings_in_base64_are_little_endian_float32() -> None:
    vectors = np.array([[1.0, -2.5]])
    row = responses.embeddings_body(vectors, "m", "base64", 3)["data"][0]
    assert struct.unpack("<2f", base64.b64decode(row["embedding"])) == (1.0, -2.5)
    assert responses.embeddings_body(vectors, "m", "float", 3)["data"][0]["embedding"] == [1.0, -2.5]
