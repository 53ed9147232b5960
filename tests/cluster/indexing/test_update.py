"""Upserts and deletions in this process, without Ray: what is built again, what others publish meanwhile, and ids in files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing import building, change, compact, index, pipeline, units, update
from ragtune_ray.index import retention, snapshot, versions
from ragtune_ray.ingest import inputs, readers, rows
from ragtune_ray.ingest.parsing.text import ParsedFile
from ragtune_ray.storage import artifacts


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    return config.Config().using(
        f"workspace={tmp_path / 'workspace'}",
        "encoder.model=hashing-32",
        "chunking.size_tokens=8",
        "chunking.overlap_tokens=2",
    )


def lines_file(path: Path, documents: dict[str, str]) -> str:
    rows = [json.dumps({"document_id": name, "text": text}) + "\n" for name, text in documents.items()]
    path.write_text("".join(rows))
    return str(path)


def numbered(count: int) -> dict[str, str]:
    return {f"d{number}": f"vessel {number} is amber" for number in range(count)}


def living(settings: config.Config) -> set[str]:
    return set(snapshot.open_index(settings.workspace).live_passages()["document_id"].to_pylist())


def killed_at_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but the second call of it fails, as if the process had been killed then."""
    calls = []

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return function(*arguments, **named)

    return call


def test_ids_of_upserted_files_are_relative_to_the_corpus_folder(settings: config.Config, tmp_path: Path) -> None:
    file = tmp_path / "docs" / "sub" / "a.md"
    file.parent.mkdir(parents=True)
    file.write_text("The moon has no air.")
    update.upsert_documents(settings, lines_file(tmp_path / "base.jsonl", numbered(2)))
    update.upsert_documents(settings, str(file))
    update.delete_documents(settings, ["a.md"])
    update.upsert_documents(settings.using(f"corpus.path={tmp_path / 'docs'}"), str(file))
    assert living(settings) == {"d0", "d1", "sub/a.md"}


@pytest.mark.parametrize("changed", ["index.segment_passages=100", "encoder.unit_passages=100"])
def test_an_upsert_repeated_after_rollback_with_larger_units_loses_nothing(
    settings: config.Config, tmp_path: Path, changed: str
) -> None:
    small = settings.using("index.segment_passages=2", "encoder.unit_passages=1", "index.compact_segments=100")
    update.upsert_documents(small, lines_file(tmp_path / "base.jsonl", {"base": "the comet"}))
    path = lines_file(tmp_path / "more.jsonl", numbered(6))
    update.upsert_documents(small, path)
    assert len(versions.read_version(small.workspace, "000002").entries) == 4
    versions.roll_back(small.workspace)
    update.upsert_documents(small.using(changed), path)
    assert living(small) == {"base", *numbered(6)}


def test_an_upsert_killed_and_resumed_with_larger_units_loses_nothing(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines_file(tmp_path / "documents.jsonl", numbered(6))
    with monkeypatch.context() as patched:
        patched.setattr(units, "commit", killed_at_first(units.commit))
        with pytest.raises(RuntimeError, match="killed"):
            update.upsert_documents(settings.using("corpus.unit_bytes=100"), path)
    update.upsert_documents(settings, path)
    assert living(settings) == set(numbered(6))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_reject_with_a_line_separator_is_read_back(settings: config.Config, tmp_path: Path, separator: str) -> None:
    path = tmp_path / "documents.jsonl"
    bad = json.dumps({f"a{separator}b": 1}, ensure_ascii=False)
    path.write_text(bad + "\n" + json.dumps({"document_id": "d0", "text": "amber"}) + "\n", encoding="utf-8")
    url = update.upsert_documents(settings, str(path))
    assert artifacts.read_manifest(str(url))["num_rejects"] == {"row": 1}
    (line,) = (Path(url) / "rejects.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert f"found a{separator}b" in json.loads(line)["reason"]
    assert living(settings) == {"d0"}


def test_a_file_of_ids_may_contain_a_bom_and_line_separators(settings: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    ids = ["a\u2028b", "c\u0085d", 7, {"document_id": "e"}]
    lines = [json.dumps(each, ensure_ascii=False) for each in ids]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", *lines[1:], ""]).encode())
    assert update.document_ids(settings, [str(path)]) == ["a\u2028b", "c\u0085d", "7", "e"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{broken", "gone.jsonl:2: not JSON"),
        (b'"caf\xe9"', "gone.jsonl:2: not UTF-8"),
        (b'{"text": "a"}', "gone.jsonl:2: names no document"),
    ],
)
def test_a_line_without_an_id_is_refused_with_its_place(
    settings: config.Config, tmp_path: Path, line: bytes, words: str
) -> None:
    path = tmp_path / "gone.jsonl"
    path.write_bytes(b'"d0"\n' + line + b"\n")
    with pytest.raises(update.UpdateError, match=words):
        update.document_ids(settings, [str(path)])


def test_passages_beyond_the_encoders_limit_are_counted(
    settings: config.Config, tmp_path: Path, encoder_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny encoder reads 64 tokens, and a letter is one."""
    path = lines_file(tmp_path / "documents.jsonl", {"long": "abc def " * 12, "short": "abc"})
    encoder = (f"encoder.model={encoder_directory}", "encoder.precision=float32")
    update.upsert_documents(settings.using(*encoder, "chunking.size_tokens=100"), path)
    said = capsys.readouterr().err
    assert "1 of 2 passages are longer than the 64 tokens that" in said
    assert "chunking.size_tokens is 100; set it to 64 or lower" in said
    others = settings.using(*encoder, "chunking.size_tokens=64", f"workspace={tmp_path / 'others'}")
    update.upsert_documents(others, path)
    assert "are longer than" not in capsys.readouterr().err


def test_garbage_collection_spares_the_base_of_a_running_upsert(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update.upsert_documents(settings, lines_file(tmp_path / "base.jsonl", numbered(2)))
    run = building.run

    def overtaken(build: building.Build) -> building.Segments:
        monkeypatch.setattr(building, "run", run)
        update.upsert_documents(settings, lines_file(tmp_path / "other.jsonl", {"other": "the comet"}))
        retention.collect(settings.workspace, keep=1, min_age_seconds=3600)
        return run(build)

    monkeypatch.setattr(building, "run", overtaken)
    update.upsert_documents(settings, lines_file(tmp_path / "more.jsonl", numbered(3)))
    assert living(settings) == {"other", *numbered(3)}
    retention.collect(settings.workspace, keep=1, min_age_seconds=3600)
    assert versions.list_versions(settings.workspace) == ["000003"], "nothing is held any more"


def overtake(
    monkeypatch: pytest.MonkeyPatch, settings: config.Config, path: str, meanwhile: Callable[[], Any], times: int = 1
) -> list[int]:
    """An upsert, during which something else is published each of the first so many times that it builds."""
    built: list[int] = []
    build = pipeline.build

    def overtaken(*arguments: Any, **named: Any) -> pipeline.Built:
        result = build(*arguments, **named)
        built.append(result.num_passages)
        if len(built) <= times:
            with monkeypatch.context() as patched:
                patched.setattr(pipeline, "build", build)
                meanwhile()
        return result

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "build", overtaken)
        update.upsert_documents(settings, path)
    return built


def test_known_documents_removed_by_another_publisher_are_indexed_again(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update.upsert_documents(settings, lines_file(tmp_path / "base.jsonl", numbered(2)))
    path = lines_file(tmp_path / "more.jsonl", numbered(3))
    built = overtake(monkeypatch, settings, path, lambda: update.delete_documents(settings, ["d1"]))
    assert (
        "upsert: version 000002 meanwhile changed documents that this build took as known; comparing with that version again"
        in (capsys.readouterr().err)
    )
    assert built == [1, 2], "d2, and then d1 too"
    assert living(settings) == set(numbered(3))


def test_a_publisher_that_keeps_known_documents_causes_no_second_build(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update.upsert_documents(settings, lines_file(tmp_path / "base.jsonl", numbered(2)))
    other = lines_file(tmp_path / "other.jsonl", {"other": "the comet"})
    path = lines_file(tmp_path / "more.jsonl", numbered(3))

    def meanwhile() -> None:
        update.upsert_documents(settings, other)
        compact.compact(settings, in_process=True)

    assert overtake(monkeypatch, settings, path, meanwhile) == [1]
    assert living(settings) == {"other", *numbered(3)}


def test_an_upsert_overtaken_every_time_fails_with_the_next_step(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines_file(tmp_path / "documents.jsonl", numbered(4))
    update.upsert_documents(settings, path)
    doomed = iter(numbered(3))
    with pytest.raises(change.OvertakenError, match=r"meanwhile changed documents .*; run the command again"):
        overtake(monkeypatch, settings, path, lambda: update.delete_documents(settings, [next(doomed)]), times=3)
    assert living(settings) == {"d3"}


def test_a_corpus_file_named_by_another_path_keeps_its_id(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "docs" / "sub" / "a.md").write_text("The moon has no air.")
    monkeypatch.chdir(tmp_path / "work")
    settings = settings.using(f"corpus.path={tmp_path / 'docs'}")
    update.upsert_documents(settings, "../docs/sub/a.md")
    assert living(settings) == {"sub/a.md"}
    assert update.document_ids(settings, ["../docs/sub"]) == ["sub/a.md"]


def changed(settings: config.Config, tmp_path: Path, *rows: Any) -> change.Changes:
    path = tmp_path / "changes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return update.upsert_documents(settings, str(path)).changes


def test_a_change_reports_what_this_call_did(settings: config.Config, tmp_path: Path) -> None:
    """Also if it publishes nothing, or if a compaction publishes the last version; `change` of that manifest is another's."""
    settings = settings.using("index.compact_segments=2")
    update.upsert_documents(settings, lines_file(tmp_path / "base.jsonl", numbered(3)))
    update.upsert_documents(settings, lines_file(tmp_path / "more.jsonl", {"more": "the comet"}))
    good, bad = {"id": "d1", "text": "renewed"}, {"id": "d2", "text": "refused", "metadata": {"x": float("nan")}}
    made = changed(
        settings, tmp_path, {"id": "new", "text": "amber"}, good, bad, {"id": "d0", "text": numbered(1)["d0"]}
    )
    assert made.counts() == {"added": 1, "replaced": 1, "deleted": 0, "unchanged": 1}
    assert [(reject.place, reject.kind) for reject in made.rejects] == [(f"{tmp_path}/changes.jsonl:3", "row")]
    assert "NaN is not allowed" in made.facts()["rejected"][0]["reason"]
    last = versions.read_version(settings.workspace, versions.current_version(settings.workspace))
    assert last.manifest["operation"] == "compact", "the change also caused a compaction"
    again = changed(settings, tmp_path, good, bad)
    assert (again.counts(), len(again.rejects)) == ({"added": 0, "replaced": 0, "deleted": 0, "unchanged": 1}, 1)
    with pytest.raises(update.UpdateError, match=r"no document that could be indexed; the first reject: .*:1: .*NaN"):
        changed(settings, tmp_path, bad)
    gone = update.delete_documents(settings, ["d0", "nobody"]).changes
    assert gone == change.Changes(deleted=1, missing=("nobody",))
    assert update.delete_documents(settings, ["d0"]).changes == change.Changes(missing=("d0",))


@pytest.mark.parametrize("verb", ["index", "upsert"])
def test_a_file_replaced_after_planning_is_not_published(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("a", "b", "c"):
        (corpus / f"{name}.txt").write_text(f"vessel {name} is amber")
    settings = settings.using(f"corpus.path={corpus}", "corpus.unit_bytes=1")

    def run() -> str:
        if verb == "index":
            return index.build_index(settings).name
        return update.upsert_documents(settings, str(corpus)).name

    first, replaced = building.run, corpus / "b.txt"

    def meanwhile(build: building.Build) -> building.Segments:
        replaced.write_text("vessel b is basalt")
        return first(build)

    with monkeypatch.context() as patch:
        patch.setattr(building, "run", meanwhile)
        with pytest.raises(inputs.ChangedError, match=r"b\.txt changed while it was indexed; run again$"):
            run()
    assert versions.list_versions(settings.workspace) == []
    replaced.write_text("vessel b is amber")  # the unfinished build of this content is taken up again
    assert run() == "000001"
    assert texts(settings) == {f"vessel {name} is amber" for name in "abc"}
    replaced.write_text("vessel b is basalt")
    assert run() == "000002"
    assert texts(settings) == {"vessel a is amber", "vessel b is basalt", "vessel c is amber"}


def texts(settings: config.Config) -> set[str]:
    return set(snapshot.open_index(settings.workspace).live_passages()["text"].to_pylist())


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("given", ["a\r\nb", "\ufeffa\nb", "a\nb", "a\rb"])
def test_an_id_is_cleaned_alike_for_upsert_and_delete(settings: config.Config, tmp_path: Path, given: str) -> None:
    path = lines_file(tmp_path / "more.jsonl", {"a\r\nb": "the comet", COMPOSED: "the moon"})
    update.upsert_documents(settings, path)
    assert update.delete_documents(settings, [given, DECOMPOSED]).changes == change.Changes(deleted=2)
    assert living(settings) == set()


def test_an_index_with_decomposed_ids_is_changed_by_either_spelling(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines_file(tmp_path / "old.jsonl", {DECOMPOSED: "the comet", f"{DECOMPOSED}2": "the moon", "a": "amber"})
    with monkeypatch.context() as before:
        before.setattr(rows.unicodedata, "normalize", lambda _, text: text)
        before.setattr(versions, "READING_FORMAT", 1)
        index.build_index(settings.using(f"corpus.path={path}"))
    assert living(settings) == {DECOMPOSED, f"{DECOMPOSED}2", "a"}
    replaced = lines_file(tmp_path / "new.jsonl", {COMPOSED: "a new comet"})
    assert update.upsert_documents(settings, replaced).changes.counts()["replaced"] == 1
    assert living(settings) == {COMPOSED, f"{DECOMPOSED}2", "a"}
    assert update.delete_documents(settings, [f"{COMPOSED}2"]).changes == change.Changes(deleted=1)
    index.build_index(settings.using(f"corpus.path={path}"))
    assert living(settings) == {COMPOSED, f"{COMPOSED}2", "a"}
    manifest = versions.read_version(settings.workspace, versions.current_version(settings.workspace)).manifest
    assert manifest["num_documents"] == 3
    assert manifest["change"]["unchanged"] == 1


@pytest.mark.parametrize("verb", ["index", "upsert"])
def test_a_document_without_its_tenant_is_a_reject(settings: config.Config, tmp_path: Path, verb: str) -> None:
    documents = [
        {"id": "good", "text": "amber", "metadata": {"owner": "acme"}},
        {"id": "both", "text": "amber too", "owner": ["acme", "other"]},
        *(
            {"id": f"bad{number}", "text": "x", "owner": each}
            for number, each in enumerate([None, "", 7, [], ["a", 1]])
        ),
        {"id": "none", "text": "basalt"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)))
    run = {
        "index": lambda given: index.build_index(given.using(f"corpus.path={path}")),
        "upsert": lambda given: update.upsert_documents(given, str(path)),
    }[verb]
    run(settings)
    assert len(living(settings)) == 8
    settings = settings.using("index.tenant_field=owner")
    if verb == "upsert":
        settings = settings.using(f"workspace={tmp_path / 'other'}")
    published = run(settings)
    rejects = [json.loads(line) for line in (Path(published.path) / "rejects.jsonl").read_text().splitlines()]
    assert [each["place"].rpartition(":")[2] for each in rejects] == list("345678")
    assert {each["reason"] for each in rejects} == {
        "no tenant: metadata must name it as text in 'owner' (index.tenant_field)"
    }
    assert living(settings) == {"good", "both"}


def test_pages_and_times_are_kept_and_touching_a_file_changes_nothing(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = ["amber basalt cedar delta ember fjord garnet", "harbor island jasper kelp lagoon meadow nectar"]
    parsed = ParsedFile("Two", "\n\n".join(pages), {"author": "Ann"}, (0, len(pages[0]) + 2))
    monkeypatch.setattr(readers, "parse_file", lambda *_: parsed)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "two.md").write_text("x")
    os.utime(corpus / "two.md", (1_700_000_000, 1_700_000_000))
    settings = settings.using(f"corpus.path={corpus}", "corpus.file_times=true")
    index.build_index(settings)
    opened = snapshot.open_index(settings.workspace)
    rows = opened.live_passages().to_pylist()
    found = {(row["start"] >= parsed.page_starts[1]) + 1: json.loads(row["metadata"]) for row in rows}
    expected = {"path": "two.md", "author": "Ann", "modified": "2023-11-14T22:13:20+00:00"}
    assert found == {page: expected | {"#page": page} for page in (1, 2)}
    columns = opened.segments[0].attributes.column_names
    assert columns == ["left_out", "author:text", "modified:text", "path:text"]
    os.utime(corpus / "two.md")
    assert index.build_index(settings).name == "000001", "nothing to do"
    (corpus / "three.md").write_text("y")
    index.build_index(settings)
    manifest = versions.read_version(settings.workspace, "000002").manifest
    assert manifest["change"] == {"added": 1, "changed": 0, "removed": 0, "unchanged": 1}


def test_a_repeated_upsert_of_a_repeated_id_changes_nothing(settings: config.Config, tmp_path: Path) -> None:
    """Equal texts with other metadata under one id: the first counts, today and tomorrow."""
    path = tmp_path / "twice.jsonl"
    rows = [{"id": "d", "text": "Mars is red.", "year": 1}, {"id": "d", "text": "Mars is red.", "year": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "e", "text": "Venus is hot."}]))
    first = update.upsert_documents(settings, str(path))
    again = update.upsert_documents(settings, str(path))
    assert (again.name, living(settings)) == (first.name, {"d", "e"})
    assert versions.read_version(settings.workspace, again.name).manifest["num_documents"] == 2


def test_a_copy_that_comes_first_replaces_the_one_in_the_index(settings: config.Config, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    later = {"id": "d", "text": "Mars is red.", "year": 2024}
    (folder / "2024.jsonl").write_text(json.dumps(later) + '\n{"id": "e", "text": "Venus is hot."}\n')
    given = settings.using(f"corpus.path={folder}")
    index.build_index(given)
    (folder / "2023.jsonl").write_text(json.dumps({**later, "year": 2023}) + "\n")
    index.build_index(given)
    live = snapshot.open_index(settings.workspace).live_passages()
    found = dict(zip(live["document_id"].to_pylist(), live["metadata"].to_pylist(), strict=True))
    assert live.num_rows == len(found) == 2
    assert json.loads(found["d"]) == {"year": 2023}


@pytest.mark.parametrize("is_there_first", [False, True])
def test_strict_heeds_files_that_became_unreadable_and_forgets_those_that_are_gone(
    settings: config.Config, tmp_path: Path, *, is_there_first: bool
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Mars is red.")
    given = settings.using(f"corpus.path={folder}")
    strict = given.using("corpus.strict=true")
    if is_there_first:
        (folder / "b.md").write_text("")
        assert sum(index.build_index(given).manifest["num_rejects"].values()) == 1
    else:
        index.build_index(strict)
        (folder / "b.md").write_text("")
    with pytest.raises(index.CorpusError, match=r"corpus\.strict: 1 inputs were rejected; the first: .*b\.md"):
        index.build_index(strict)
    (folder / "b.md").unlink()
    assert not index.build_index(strict).manifest["num_rejects"]


def test_a_rollback_keeps_the_list_of_rejects(settings: config.Config, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Mars is red.")
    (folder / "b.md").write_text("")
    given = settings.using(f"corpus.path={folder}")
    first = index.build_index(given)
    update.upsert_documents(given, lines_file(tmp_path / "more.jsonl", numbered(1)))
    rolled = versions.roll_back(settings.workspace, first.name)
    assert "b.md" in versions.rejects_of(settings.workspace, rolled)["rejects.jsonl"]


def test_a_build_that_another_process_finished_is_compared_again(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings.using(f"corpus.path={lines_file(tmp_path / 'base.jsonl', numbered(3))}")
    publish = versions.publish_rebasing
    other: list[str] = []

    def overtaken(*arguments: Any) -> Any:
        if not other:
            other.append("running")
            other.append(index.build_index(given).name)
            raise FileNotFoundError("units/abc.documents.arrow")
        return publish(*arguments)

    monkeypatch.setattr(versions, "publish_rebasing", overtaken)
    assert index.build_index(given).name == other[1]
    assert "another process has finished this build" in capsys.readouterr().err
    assert len(living(settings)) == 3


def test_a_folder_is_deleted_with_all_documents_of_its_files(settings: config.Config, tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "faq"
    folder.mkdir(parents=True)
    (folder / "a.md").write_text("The moon has no air.")
    (folder / "a.md.meta.json").write_text('{"year": 1}')
    (folder / "q.jsonl").write_text('{"id": "q1", "text": "Mars is red."}\n')
    (folder / "t.csv").write_text("name,year\nPhobos,1877\n")
    (folder.parent / "top.md").write_text("Venus is hot.")
    given = settings.using(f"corpus.path={folder.parent}", "corpus.sheets=rows")
    index.build_index(given)
    assert living(settings) == {"faq/a.md", "q1", "faq/t.csv#2", "top.md"}
    named = update.document_ids(given, [str(folder)])
    assert sorted(named) == ["faq/a.md", "faq/t.csv#2", "q1"]
    update.delete_documents(given, named)
    assert living(settings) == {"top.md"}
