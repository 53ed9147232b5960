"""A file that is not what it was when it was listed is never read as if it were."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ragtune_ray.config import Corpus
from ragtune_ray.ingest import inputs, listing
from ragtune_ray.ingest.input_units import Plan, Unit, content_fingerprint, input_fingerprint, plan_units
from ragtune_ray.ingest.inputs import ChangedError
from ragtune_ray.ingest.readers import UnitRead, read_documents
from ragtune_ray.schema import Document
from tests.support.corpora import LIMIT, doc, only_reject, read, rewrite, squad, write, write_parquet

CORPUS = Corpus(max_document_bytes=LIMIT)


def text_file(folder: Path, text: str) -> Path:
    return write(folder / "a.txt", text)


def lines(folder: Path, text: str) -> Path:
    return write(folder / "a.jsonl", *(doc(number, f"{text} {number}") for number in range(40)))


def rows(folder: Path, text: str) -> Path:
    texts = [f"{text} {number}" for number in range(40)]
    return write_parquet(folder / "a.parquet", {"id": range(40), "text": texts}, row_group_size=10)


def contexts(folder: Path, text: str) -> Path:
    data = squad()
    data["data"][0]["paragraphs"] = [{"context": f"{text} {number}", "qas": []} for number in range(40)]
    return write(folder / "a.json", data)


FORMATS = [text_file, lines, rows, contexts]
Make = Callable[[Path, str], Path]


def basal(make: Make, path: Path) -> bytes:
    """Content as long as that of the file, and other texts."""
    (path.parent / "other").mkdir(exist_ok=True)
    data = make(path.parent / "other", "Basal").read_bytes()
    assert len(data) == path.stat().st_size
    return data


def texts(unit: Unit) -> list[str]:
    return [item.text for item in read_documents(unit, CORPUS) if isinstance(item, Document)]


def digests(plan: Plan) -> list[str]:
    """The sha256 that each unit of a plan reports."""
    found = [UnitRead() for _ in plan.units]
    for unit, part in zip(plan.units, found, strict=True):
        list(read_documents(unit, CORPUS, part))
    return [part.sha256 for part in found]


@pytest.mark.parametrize("make", FORMATS)
def test_a_replaced_file_is_an_error_in_every_unit(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path, "Amber")
    plan = plan_units(str(path), 600)
    rewrite(path, basal(make, path))
    for unit in plan.units:
        with pytest.raises(ChangedError, match=rf"^{path} changed while it was indexed; run again$"):
            texts(unit)


@pytest.mark.parametrize("make", [lines, rows, contexts])
def test_a_file_replaced_between_two_units_is_no_mixture(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path, "Amber")
    plan = plan_units(str(path), 600)
    assert len(plan.units) > 2
    assert all(text.startswith("Amber") for text in texts(plan.units[0]))
    other = basal(make, path)
    path.unlink()
    path.write_bytes(other)
    for unit in plan.units[1:]:
        with pytest.raises(ChangedError):
            texts(unit)


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_replaced_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, in_place: bool
) -> None:
    path = make(tmp_path, "Amber")
    (unit,) = plan_units(str(path), LIMIT).units
    other = basal(make, path)
    opened = inputs.open_file

    def meanwhile(name: str) -> Any:
        file = opened(name)
        if in_place:
            rewrite(path, other)
        else:
            replacement = tmp_path / "new"
            replacement.write_bytes(other)
            replacement.replace(path)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "open_file", meanwhile)
        with pytest.raises(ChangedError):
            texts(unit)
    again = plan_units(str(path), LIMIT)
    assert all(text.startswith("Basal") for text in texts(again.units[0]))


@pytest.mark.parametrize("is_other", [(True, False), (False, True)])
def test_the_stamp_is_compared_before_and_after_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_other: tuple[bool, bool]
) -> None:
    path = lines(tmp_path, "Amber")
    (unit,) = plan_units(str(path), LIMIT).units
    found = iter(["other" if differs else unit.stamps[0] for differs in is_other])
    monkeypatch.setattr(listing, "stamp_of", lambda _: next(found))
    with pytest.raises(ChangedError):
        texts(unit)


def test_an_error_of_a_file_that_changed_is_its_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of two states may look like a broken file, or end in an error of a store."""
    path = rows(tmp_path, "Amber")
    (unit,) = plan_units(str(path), LIMIT).units

    def expired(_: str) -> Any:
        rewrite(path, path.read_bytes())
        raise OSError(16, "the file has expired")

    monkeypatch.setattr(inputs, "open_file", expired)
    with pytest.raises(ChangedError):
        texts(unit)


@pytest.mark.parametrize("make", FORMATS)
def test_a_deleted_or_shortened_file_is_an_error(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path, "Amber")
    unit = plan_units(str(path), 600).units[-1]
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(ChangedError):
        texts(unit)
    path.unlink()
    with pytest.raises(ChangedError):
        texts(unit)


def test_appended_lines_are_a_change(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", doc("a"), doc("b"))
    plan = plan_units(str(path), 1000)
    with path.open("a") as file:
        file.write(json.dumps(doc("c")))
    with pytest.raises(ChangedError):
        texts(plan.units[0])


def test_a_file_beyond_the_size_limit_is_compared_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x" * 100)
    (unit,) = plan_units(str(path), 1000).units
    assert "longer than max_document_bytes" in only_reject(read_documents(unit, Corpus(max_document_bytes=50))).reason
    rewrite(path, b"x" * 99 + b"y\n")
    with pytest.raises(ChangedError):
        list(read_documents(unit, Corpus(max_document_bytes=50)))


@pytest.mark.parametrize("make", FORMATS)
def test_a_file_without_permission_is_one_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    path = make(tmp_path, "Amber")

    def refused(_: str) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inputs, "open_file", refused)
    (item,) = read(path, 300)
    assert only_reject([item]).kind == "file"
    assert only_reject([item]).is_transient, "rights may change while the file does not"
    assert (item.place, only_reject([item]).reason) == (str(path), "cannot be read: Permission denied")


# --- what counts as the same corpus ---


@pytest.mark.parametrize("make", FORMATS)
def test_a_touched_file_is_listed_anew_and_its_content_is_the_same(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path, "Amber")
    plans = {mode: plan_units(str(path), 600, fingerprint=mode) for mode in ("listing", "sha256")}
    before = digests(plans["listing"])
    rewrite(path, path.read_bytes())
    again = {mode: plan_units(str(path), 600, fingerprint=mode) for mode in ("listing", "sha256")}
    assert input_fingerprint(again["listing"]) != input_fingerprint(plans["listing"])
    assert input_fingerprint(again["sha256"]) == input_fingerprint(plans["sha256"])
    assert [unit.key for unit in again["sha256"].units] == [unit.key for unit in plans["sha256"].units]
    assert not {unit.key for unit in again["listing"].units} & {unit.key for unit in plans["listing"].units}
    assert content_fingerprint(again["listing"], digests(again["listing"])) == content_fingerprint(
        plans["listing"], before
    )
    with pytest.raises(ChangedError):  # the stamp of the first plan is verified in both modes
        texts(plans["sha256"].units[0])


@pytest.mark.parametrize("make", FORMATS)
def test_a_moved_corpus_has_the_same_content(tmp_path: Path, make: Make) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    path = make(tmp_path / "a", "Amber")
    plan = plan_units(str(tmp_path / "a"), 600, fingerprint="sha256")
    content = content_fingerprint(plan, digests(plan))
    path.rename(tmp_path / "b" / path.name)
    moved = plan_units(str(tmp_path / "b"), 600, fingerprint="sha256")
    assert input_fingerprint(moved) == input_fingerprint(plan)
    assert content_fingerprint(moved, digests(moved)) == content
    assert moved.units[0].key != plan.units[0].key, "ids of documents depend on the folder, so that the work is another"


@pytest.fixture
def frozen() -> Iterator[Callable[[bytes], str]]:
    """Writes a file into a store that tells the same time whatever is written."""
    store = fsspec.filesystem("memory")

    def written(data: bytes) -> str:
        store.pipe_file("/frozen/a.jsonl", data)
        store.store["/frozen/a.jsonl"].created = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        return "memory://frozen/a.jsonl"

    yield written
    store.rm("/frozen", recursive=True)


def test_an_edit_that_keeps_size_and_time_is_noticed_by_sha256_alone(frozen: Callable[[bytes], str]) -> None:
    found = {}
    for text in ("Amber", "Basal"):
        url = frozen(json.dumps(doc(1, text)).encode())
        for mode in ("listing", "sha256"):
            found[text, mode] = input_fingerprint(plan_units(url, 600, fingerprint=mode))
    assert found["Amber", "listing"] == found["Basal", "listing"]
    assert found["Amber", "sha256"] != found["Basal", "sha256"]


def test_a_store_that_tells_no_version_is_compared_by_content(
    frozen: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = type(fsspec.filesystem("memory"))
    info = store.info
    monkeypatch.setattr(store, "info", lambda *given, **named: info(*given, **named) | {"created": None})
    url = frozen(json.dumps(doc(1, "Amber")).encode())
    plan = plan_units(url, 600)
    assert texts(plan.units[0]) == ["Amber"]
    frozen(json.dumps(doc(1, "Basal")).encode())
    assert input_fingerprint(plan_units(url, 600)) != input_fingerprint(plan)
    with pytest.raises(ChangedError):
        texts(plan.units[0])


@pytest.mark.parametrize("make", FORMATS)
def test_the_digest_of_a_unit_is_of_what_it_reads(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path, "Amber")
    before = digests(plan_units(str(path), 600))
    assert before == digests(plan_units(str(path), 600))
    data = bytearray(path.read_bytes())
    data[data.index(b"Amber 7" if b"Amber 7" in data else b"Amber") + 1] ^= 1
    rewrite(path, bytes(data))
    after = digests(plan_units(str(path), 600))
    assert after != before
    if make is lines:
        assert sum(first != second for first, second in zip(before, after, strict=True)) == 1
