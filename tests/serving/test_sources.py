"""Sources and citations as clients see them."""

from ragtune_ray import schema
from ragtune_ray.serving import sources
from ragtune_ray.serving.backend import without_metadata


def test_a_source_has_a_url_only_if_it_is_http() -> None:
    def url(metadata: str) -> object:
        return sources.source(1, schema.Passage("d#0", "d", "x", "", metadata, 0, 1), 0.5)["url"]

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
    shown = sources.sources(passages, [0.1, 0.1])
    cited = [
        schema.Citation("c#1", "c", 5, 6),
        schema.Citation("a b#0", "a b", 0, 1),
        schema.Citation("c#1", "c", 5, 6),
    ]
    marks = sources.url_citations("Yes.", cited, shown)
    assert [mark["url_citation"]["url"] for mark in marks] == ["https://c.example/", "urn:ragtune:a%20b"]
    assert {(m["url_citation"]["start_index"], m["url_citation"]["end_index"]) for m in marks} == {(0, 4)}


def test_a_source_shows_the_page_on_which_its_passage_begins() -> None:
    def page(metadata: str) -> object:
        passage = without_metadata(schema.Passage("d#0", "d", "x", "", metadata, 0, 1))
        assert "raw" not in passage.metadata
        return sources.source(1, passage, 0.5)["page"]

    assert page('{"#page": 12, "raw": "..."}') == 12
    for none in ("{}", "[]", "{", '{"#page": "x", "page": 3}'):
        assert page(none) is None
