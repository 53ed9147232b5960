"""Documents of a build compared partition by partition, against sets and dictionaries."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ragtune_ray import config
from ragtune_ray.cluster.indexing import building, documents, streaming, units
from ragtune_ray.cluster.indexing.documents import Documents, DuplicateError
from ragtune_ray.cluster.indexing.index import build_index
from ragtune_ray.index import contents, segments, versions
from ragtune_ray.ingest.input_units import plan_units
from tests.support.indexes import living


def lines(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"document_id": name, "text": text}) + "\n" for name, text in rows))
    return str(path)


def settings_of(tmp_path: Path, path: str, *overrides: str) -> config.Config:
    return config.Config().using(
        f"workspace={tmp_path / 'workspace'}", f"corpus.path={path}", "encoder.model=hashing-16", *overrides
    )


def committed(settings: config.Config, partitions: int, unit_bytes: int, base: str = "") -> Documents:
    build = f"{settings.workspace}/build-{partitions}"
    plan = plan_units(settings.corpus.path, unit_bytes)
    works = [streaming.Work(f"{unit.number:016x}", unit, False, 0.0) for unit in plan.units]
    facts = list(streaming.in_process(streaming.Job(settings, build, base, partitions), works))
    count = sum(each["documents"] for each in facts)
    return Documents(build, tuple(work.key for work in works), partitions, count, in_process=True)


@pytest.fixture
def repeated(tmp_path: Path) -> tuple[config.Config, list[tuple[str, str]]]:
    """A corpus in which a third of the ids comes again, in random places."""
    source = random.Random(5)
    rows = [(f"d{number}", f"vessel {number} is amber") for number in range(60)]
    rows += source.sample(rows, 20)
    source.shuffle(rows)
    return settings_of(tmp_path, lines(tmp_path / "corpus.jsonl", rows)), rows


@pytest.mark.parametrize("partitions", [1, 4, 32])
@pytest.mark.parametrize("unit_bytes", [10**6, 300])
def test_each_repeated_id_is_a_duplicate_of_its_first_place(
    repeated: tuple[config.Config, list[tuple[str, str]]], partitions: int, unit_bytes: int
) -> None:
    settings, rows = repeated
    compared = committed(settings, partitions, unit_bytes)
    found = compared.duplicates()
    plan = plan_units(settings.corpus.path, unit_bytes)
    before = np.cumsum([0, *(facts["num_lines"] for facts in units.finished(compared.build, compared.keys))])
    assert len(plan.units) == len(compared.keys)

    def line(place: documents.Place) -> int:
        return int(before[place.unit]) + int(place.text.rpartition(":")[2])

    seen: dict[str, int] = {}
    expected = []
    for number, (name, _) in enumerate(rows, start=1):
        if name in seen:
            expected.append((number, seen[name]))
        seen.setdefault(name, number)
    assert [(line(each.place), line(each.earlier)) for each in found.duplicates] == expected
    assert found.clashes == []


@pytest.mark.parametrize("unit_bytes", ["0", "300"])
def test_duplicates_are_indexed_once(repeated: tuple[config.Config, list[tuple[str, str]]], unit_bytes: str) -> None:
    settings, rows = repeated
    version = build_index(settings.using(f"corpus.unit_bytes={unit_bytes}"))
    manifest = versions.read_version(settings.workspace, version.name).manifest
    assert (manifest["num_documents"], manifest["num_passages"], manifest["num_rejects"]) == (60, 60, {"row": 20})
    assert living(settings.workspace) == {name for name, _ in rows}
    assert contents.index_problems(settings.workspace) == []


def test_the_first_of_several_clashes_is_named(tmp_path: Path) -> None:
    rows = [(f"d{number}", f"vessel {number}") for number in range(40)]
    rows += [("d30", "other"), ("d2", "other"), ("d30", "third")]
    settings = settings_of(tmp_path, lines(tmp_path / "corpus.jsonl", rows), "corpus.unit_bytes=200")
    with pytest.raises(DuplicateError, match=r"'d30'.*corpus\.jsonl:31 and at .*corpus\.jsonl:41;"):
        build_index(settings)


@pytest.mark.parametrize("partitions", [1, 8])
def test_a_build_is_compared_with_a_version(tmp_path: Path, partitions: int) -> None:
    old = [(f"d{number}", f"vessel {number}") for number in range(50)]
    settings = settings_of(tmp_path, lines(tmp_path / "old.jsonl", old), "index.segment_passages=7")
    base = build_index(settings)
    new = [*old[:20], *[(name, text + " is basalt") for name, text in old[20:30]], ("new", "a comet"), ("newer", "ash")]
    settings = settings.using(f"corpus.path={lines(tmp_path / 'new.jsonl', new)}")
    version = versions.read_version(settings.workspace, base.name)
    found = committed(settings, partitions, 500, base.name).difference(settings.workspace, version)
    assert (found.num_new, found.num_known, found.num_seen) == (12, 20, 20)
    assert (found.num_changed, found.num_gone) == (10, 30)
    doomed = {
        name
        for entry, rows, _ in contents.live_documents(settings.workspace, version)
        for name in rows.table["document_id"].to_pylist()
        if rows.passages(rows.find([name]))[0] in found.doomed.get(entry.segment_id, [])
    }
    assert doomed == {f"d{number}" for number in range(20, 50)}


def test_a_partition_is_a_range_of_hashes() -> None:
    keys = segments.document_keys([f"d{number}" for number in range(1000)])
    edges = units.partition_edges(16)
    assert np.array_equal(np.searchsorted(edges, keys, side="right"), keys >> np.uint64(60))


def ranges(partitions: int) -> Iterator[tuple[int, int]]:
    for number in range(partitions):
        low, high = documents._range(number, partitions)
        yield int(low), 2**64 if high is None else int(high)


@pytest.mark.parametrize("partitions", [1, 2, 64])
def test_partitions_cover_all_hashes_once(partitions: int) -> None:
    bounds = list(ranges(partitions))
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 2**64
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))


def test_a_build_after_a_clash_was_mended_keeps_the_other_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        lines(folder / f"{number}.jsonl", [(f"d{number}", f"vessel {number}")])
    lines(folder / "5.jsonl", [("d0", "another text")])
    settings = settings_of(tmp_path, str(folder))
    with pytest.raises(DuplicateError):
        build_index(settings)
    lines(folder / "5.jsonl", [("d5", "another text")])
    capsys.readouterr()
    build_index(settings)
    assert "embed: 5 of 6 units were finished by an earlier run and are skipped" in capsys.readouterr().err
    assert living(settings.workspace) == {f"d{number}" for number in range(6)}


def test_segments_hold_the_passages_in_the_order_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which units are finished."""
    rows = [(f"d{number:02}", f"vessel {number} is amber") for number in range(60)]
    found = []
    in_order = streaming.in_process
    for name in ("ascending", "descending"):
        settings = settings_of(
            tmp_path / name,
            lines(tmp_path / "corpus.jsonl", rows),
            "corpus.unit_bytes=200",
            "index.segment_passages=11",
        )
        if name == "descending":
            monkeypatch.setattr(streaming, "in_process", lambda job, pending: in_order(job, list(reversed(pending))))
        version = versions.read_version(settings.workspace, build_index(settings).name)
        found.append([entry.manifest_sha256 for entry in version.entries])
        assert [entry.num_passages for entry in version.entries] == [11, 11, 11, 11, 11, 5]
        ids = [
            name
            for entry in version.entries
            for name in segments.open_passages(settings.workspace, entry.segment_id, entry.manifest_sha256)[
                "document_id"
            ].to_pylist()
        ]
        assert ids == [name for name, _ in rows]
    assert found[0] == found[1]


def test_a_build_trains_before_all_units_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"d{number}", f"vessel {number}") for number in range(300)]
    settings = settings_of(tmp_path, lines(tmp_path / "corpus.jsonl", rows), "index.kind=ivf")
    plan = plan_units(settings.corpus.path, 100)
    build = building.Build(settings, plan, str(tmp_path / "build"), "id", None, "en", False, True)
    made = building.Segments(build)
    assert 64 == len(made.training) < len(made.keys)
    expected = sum(plan.units[number].stop - plan.units[number].start for number in made.training) / plan.size_bytes
    assert expected == pytest.approx(64 / len(made.keys), rel=0.1)
