"""Plans of an index build: probe, estimates, intervals, the command."""

import contextlib
import functools
import itertools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ragtune_ray import cli, config, schema, terminal
from ragtune_ray.cluster.indexing import index as index_module
from ragtune_ray.cluster.indexing import pipeline
from ragtune_ray.index import faiss_index, probe, versions
from ragtune_ray.index import plan as planning
from ragtune_ray.ingest import input_units, inputs
from ragtune_ray.ingest.chunking import chunk_all, word_spans
from ragtune_ray.ingest.input_units import plan_units
from ragtune_ray.ingest.readers import read_documents
from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem
from tests.support.corpora import squad, write, write_parquet
from tests.support.texts import CHINESE, LONG, columns

WORDS = "the moon orbits earth while mars keeps two small dusty companions far away from warmer inner worlds".split()


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("ragtune_ray")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def text_of(num_words: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(WORDS), num_words))


def settings_of(tmp_path: Path, path: Any, *overrides: str) -> config.Config:
    base = config.Config(
        workspace=str(tmp_path / "workspace"), corpus={"path": str(path)}, encoder={"model": "hashing-64"}
    )
    return base.using("chunking.size_tokens=32", "chunking.overlap_tokens=4", *overrides)


def planned(settings: config.Config) -> dict[str, Any]:
    return planning.read_plan(planning.plan_index(settings))


def everything(settings: config.Config) -> tuple[int, int]:
    """Count documents and passages by reading and chunking the whole corpus."""
    plan = plan_units(settings.corpus.path, settings.corpus.unit_bytes)
    found = [item for unit in plan.units for item in read_documents(unit, settings.corpus)]
    documents = [item for item in found if isinstance(item, schema.Document)]
    cut = chunk_all(documents, word_spans, settings.chunking.size_tokens, settings.chunking.overlap_tokens)
    return len(documents), sum(map(len, cut))


def jsonl(path: Path, lengths: list[int]) -> Path:
    return write(path, *({"_id": f"{n:06}", "text": text_of(length)} for n, length in enumerate(lengths)))


def probe_of(**changes: Any) -> probe.Probe:
    """1,000 of 10,000 files, each a document of two passages of 500 characters."""
    values: dict[str, Any] = {
        "pieces": tuple(probe.Piece("files", 1.0, 1, 2.0, 1000) for _ in range(1000)),
        "sizes": {"files": 10_000.0},
        "num_passages": 500,
        "num_vectors": 500,
        "rejects": (),
        "dimension": 384,
        "device": "cpu",
        "passage_characters": 500.0,
        "text_bytes": 600.0,
        "postings_bytes": 300.0,
        "vocabulary_bytes": 1000.0,
        "load_seconds": 4.0,
        "read_seconds": 1e-6,
        "embed_seconds": 0.01,
        "lexical_seconds": 0.001,
        "kind": "flat",
        "add_seconds": 1e-5,
        "product_seconds": 1e-8,
    }
    return probe.Probe(**(values | changes))


def plan_of(num_units: int = 100) -> input_units.Plan:
    unit = input_units.Unit(0, "files", ("/c/a.md",), 0, 0, "/c")
    return input_units.Plan((unit,) * num_units, (input_units.InputFile("/c/a.md", 7, "0"),), ())


def estimated(tmp_path: Path, *overrides: str, **changes: Any) -> dict[str, Any]:
    return planning.estimate(settings_of(tmp_path, "/c", *overrides), plan_of(), probe_of(**changes), 0.5)


# --- estimates against reading everything ---


@pytest.mark.parametrize("unit_bytes", [2**14, 2**22])
def test_documents_of_one_length_are_estimated_within_a_few_percent(tmp_path: Path, unit_bytes: int) -> None:
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [100] * 1500), f"corpus.unit_bytes={unit_bytes}")
    found = planned(settings)
    documents, passages = everything(settings)
    assert found["documents"]["value"] == pytest.approx(documents, rel=0.02)
    assert found["passages"]["value"] == pytest.approx(passages, rel=0.02)
    assert 200 <= found["probe"]["documents"] < 300, "a small part was read"
    assert not found["probe"]["is_whole"]
    assert found["corpus"]["num_files"] == 1
    assert found["corpus"]["num_units"] == len(plan_units(settings.corpus.path, unit_bytes).units)
    assert found["corpus"]["bytes"] == (tmp_path / "c.jsonl").stat().st_size


def test_a_sorted_corpus_is_probed_evenly_and_its_interval_is_right(tmp_path: Path) -> None:
    hits = 0
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [5 + n // 10 for n in range(2000)]))
    documents, passages = everything(settings)
    for seed in range(5):
        found = planned(settings.using(f"seed={seed}"))
        assert found["documents"]["value"] == pytest.approx(documents, rel=0.25)
        assert found["passages"]["value"] == pytest.approx(passages, rel=0.1)
        hits += found["passages"]["low"] <= passages <= found["passages"]["high"]
        assert found["passages"]["low"] < found["passages"]["value"] < found["passages"]["high"]
    assert hits >= 4


def test_a_small_corpus_is_read_whole_and_its_numbers_are_exact(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [20, 90, 200] * 20))
    documents, passages = everything(settings)
    found = planned(settings)
    assert found["probe"]["is_whole"]
    assert found["documents"] == {"value": documents, "low": documents, "high": documents}
    assert found["passages"] == {"value": passages, "low": passages, "high": passages}


def test_files_rows_and_contexts_are_counted_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    for number in range(400):
        write(folder / f"{number}.txt", text_of(40))
    rows = {"_id": [str(n) for n in range(2000)], "text": [text_of(40)] * 2000}
    table = write_parquet(tmp_path / "c.parquet", rows, row_group_size=1000)
    contexts = write(tmp_path / "c.json", squad())
    for path, count in ((folder, 400), (table, 2000), (contexts, 2)):
        found = planned(settings_of(tmp_path, path))
        assert found["documents"]["value"] == count
        assert found["passages"]["value"] == everything(settings_of(tmp_path, path))[1]
        assert found["probe"]["documents"] <= 250


def test_totals_of_several_formats_are_added(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    for number in range(300):
        write(folder / f"{number}.txt", text_of(30))
    jsonl(folder / "rows.jsonl", [100] * 1000)
    settings = settings_of(tmp_path, folder)
    documents, passages = everything(settings)
    found = planned(settings)
    assert (documents, found["probe"]["is_whole"]) == (1300, False)
    assert found["documents"]["value"] == pytest.approx(documents, rel=0.03)
    assert found["passages"]["value"] == pytest.approx(passages, rel=0.03)


def test_no_part_of_a_file_is_probed_twice(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", [3, 500, 1, 40] * 100)
    units = plan_units(str(path), 2**13).units
    parts = list(probe._parts(units, 0, 200))
    ranges = sorted((part.unit.start, part.unit.stop) for part in parts)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ranges))
    content = path.read_bytes()
    for start, stop in ranges:
        assert start == 0 or content[start - 1 : start] == b"\n"
        assert content[stop - 1 : stop] == b"\n"


# --- numbers against hand computation ---


def test_kinds_bytes_and_intervals_equal_hand_computed_ones(tmp_path: Path) -> None:
    found = estimated(tmp_path)
    assert found["documents"] == {"value": 10_000, "low": 10_000, "high": 10_000}
    assert found["passages"] == {"value": 20_000, "low": 20_000, "high": 20_000}
    graph = 4 * 32 * 2 * (1 + 1 / 32) + 16
    assert found["kinds"] == {
        "flat": {"memory_bytes": 20_000 * 1536, "disk_bytes": 20_000 * 1536},
        "ivf": {"memory_bytes": 20_000 * 1544, "disk_bytes": 20_000 * 1544},
        "ivf_sq": {"memory_bytes": 20_000 * 392, "disk_bytes": 20_000 * (392 + 1536)},
        "ivf_pq": {"memory_bytes": 20_000 * 104, "disk_bytes": 20_000 * (104 + 1536)},
        "hnsw": {"memory_bytes": 20_000 * (1536 + graph), "disk_bytes": 20_000 * (1536 + graph)},
    }
    postings = round(300 * 20_000 + 1000 * (20_000 / 500) ** 0.5)
    assert found["bytes"] == {"text": 12_000_000, "postings": postings, "vectors": 30_720_000}
    stored = 30_720_000 + 12_000_000 + postings
    assert found["disk"]["index"] == stored
    assert found["disk"]["needed"] == stored + 12_000_000 + 30_720_000 + 8 * 20_000


def test_the_planned_kind_is_the_one_index_chooses(tmp_path: Path) -> None:
    for sizes, budget, kind in ((10_000.0, 2**33, "flat"), (10**6, 2**33, "ivf_sq"), (10**6, 2**20, "ivf_pq")):
        found = estimated(tmp_path, f"index.memory_bytes={budget}", sizes={"files": sizes})
        assert found["auto_kind"] == kind == faiss_index.choose_kind("auto", int(2 * sizes), 384, budget)


def test_intervals_cover_unequal_documents_and_need_two_pieces(tmp_path: Path) -> None:
    uneven = tuple(probe.Piece("files", 1.0, 1, float(n % 5), 1000) for n in range(100))
    found = estimated(tmp_path, pieces=uneven)
    # The standard error of the mean of 0, 1, 2, 3, 4 over 100 files, with 99 % of the files unseen.
    error = 10_000 * (2 / 100) ** 0.5 * 0.99**0.5
    assert found["passages"]["value"] == 20_000
    assert found["passages"]["low"] == pytest.approx(20_000 - 1.96 * error, rel=0.02)
    assert found["passages"]["high"] == pytest.approx(20_000 + 1.96 * error, rel=0.02)
    found = estimated(tmp_path, pieces=uneven[2:3])
    assert found["passages"] == {"value": 20_000, "low": None, "high": None}
    assert "too little was probed" in "\n".join(terminal.plan_lines(found))


def test_segments_and_shards_follow_their_limits(tmp_path: Path) -> None:
    found = estimated(tmp_path, "index.segment_passages=3000")
    assert found["num_segments"] == 7
    shard = int(found["disk"]["index"] / 7 * 2.5)
    assert estimated(tmp_path, "index.segment_passages=3000", f"cluster.shard_bytes={shard}")["num_shards"] == 4
    assert estimated(tmp_path, "index.segment_passages=3000", "cluster.shard_bytes=1")["num_shards"] == 7
    assert found["num_shards"] == 1


def test_seconds_are_work_divided_by_usable_workers(tmp_path: Path) -> None:
    found = estimated(tmp_path, "cluster.encoder_workers=4", "index.segment_passages=10000")
    assert found["workers"] == {"count": 4, "from": "cluster.encoder_workers", "gpus_each": 0.0}
    segment = 20_000 * (0.001 + 1e-5) / 2  # two segments, so two workers
    expected = {
        "plan": 0.5,
        "start": planning.RAY_START_SECONDS + 4,
        "read": 10_000_000 * 1e-6 / 4,
        "embed": 50.0,
        "segment": segment,
    }
    assert found["seconds"] == pytest.approx({**expected, "total": sum(expected.values())})
    alone = estimated(tmp_path)
    assert alone["workers"]["from"] == "the cores of this machine"
    assert alone["workers"]["count"] == planning._cores()


def test_the_rates_of_the_probe_are_per_second(tmp_path: Path) -> None:
    found = estimated(tmp_path)["probe"]
    rates = ("characters_per_second", "embedded_per_second", "lexical_per_second", "added_per_second")
    assert [found[name] for name in rates] == [1_000_000, 100.0, 1000.0, 100_000.0]


def test_a_format_of_which_nothing_was_read_adds_nothing() -> None:
    pieces = [probe.Piece("files", 1.0, 1, 2.0, 1000)] * 10
    found = probe.totals(pieces, {"files": 100.0, "jsonl": 5.0}, 0)
    assert [found[name]["value"] for name in ("documents", "passages", "characters")] == [100, 200, 100_000]


def test_training_and_lists_are_counted_in_inner_products(tmp_path: Path) -> None:
    found = estimated(tmp_path, "cluster.encoder_workers=1", kind="ivf_sq")
    lists = 20_000 // 39  # 512, fewer than 4 times the square root: k-means in two levels, 22 clusters above
    sample = 32 * lists
    products = min(sample, 22 * 256) * 22 * 8 + sample * 22 + sample * lists / 22 * 8 + 20_000 * lists
    assert found["seconds"]["segment"] == pytest.approx(20_000 * 0.00101 + products * 1e-8, abs=0.001)


def test_costs_equal_hand_computed_ones(tmp_path: Path) -> None:
    prices = ["prices.core_hour=0.04", "prices.gpu_hour=2.5", "prices.gibibyte_month=0.1", "prices.currency=EUR"]
    settings = settings_of(tmp_path, "/c", *prices, "cluster.gpus_per_worker=0.5")
    assert planning.costs(settings, 8, 1800.0, 3 * 2**30) == pytest.approx(
        {"core_hours": 4.0, "gpu_hours": 2.0, "compute": 5.16, "storage_month": 0.3, "currency": "EUR"}
    )


def test_without_prices_only_hours_are_reported(tmp_path: Path) -> None:
    found = planning.costs(settings_of(tmp_path, "/c"), 8, 1800.0, 2**30)
    assert (found["core_hours"], found["compute"], found["storage_month"]) == (4.0, None, None)
    gpus = settings_of(tmp_path, "/c", "prices.core_hour=1", "cluster.gpus_per_worker=1")
    assert planning.costs(gpus, 8, 1800.0, 1)["compute"] is None, "a total needs all prices"
    shown = " ".join("\n".join(terminal.plan_lines(estimated(tmp_path))).split())
    assert "core-hours; their price is not known (prices.core_hour" in shown


def test_a_disk_that_is_too_small_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "free_bytes", lambda _: 1000)
    (warning,) = estimated(tmp_path)["warnings"]
    assert "1,000 bytes free" in warning
    assert "free some" in warning
    monkeypatch.setattr(filesystem, "free_bytes", lambda _: None)
    assert estimated(tmp_path)["warnings"] == []


def test_a_kind_beyond_the_budget_and_missing_gpus_are_warnings(tmp_path: Path) -> None:
    found = estimated(tmp_path, "index.memory_bytes=1000", "cluster.gpus_per_worker=1", kind="hnsw")
    memory, gpus = found["warnings"]
    assert "index.kind hnsw" in memory
    assert "1,000" in memory
    assert "asks for GPUs" in gpus


# --- the artifact ---


def test_a_plan_writes_no_index_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [50] * 30))
    url = planning.plan_index(settings)
    files = sorted(path.relative_to(tmp_path / "workspace") for path in (tmp_path / "workspace").rglob("*"))
    name = Path(url).name
    assert [str(path) for path in files] == [
        "runs",
        f"runs/{name}",
        f"runs/{name}/manifest.json",
        f"runs/{name}/plan.json",
    ]
    manifest = artifacts.read_manifest(url)
    found = planning.read_plan(url)
    assert (manifest["kind"], manifest["planned"]["passages"]) == ("plan", found["passages"]["value"])
    monkeypatch.setattr(planning, "probe", lambda *_: pytest.fail("probed again"))
    assert planning.plan_index(settings) == url


def test_other_settings_lead_to_another_plan(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [50] * 30))
    names = [
        Path(planning.plan_index(settings.using(*overrides))).name
        for overrides in ([], ["prices.core_hour=1"], ["chunking.size_tokens=64"])
    ]
    assert len(set(names)) == 3
    same, priced, other = (name.split("-")[1] for name in names)
    assert same == priced != other


def test_the_newest_sound_plan_of_a_corpus_is_found(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [50] * 30))
    identity = versions.planned_corpus_id(
        settings, plan_units(settings.corpus.path, 2**22), weights.resolve("hashing-64")
    )
    assert planning.planned_for(settings.workspace, identity) is None
    first = planning.plan_index(settings.using("cluster.encoder_workers=1"))
    second = planning.plan_index(settings.using("cluster.encoder_workers=2"))
    newest = artifacts.read_manifest(second)["planned"]
    assert set(newest) == {"documents", "passages", "seconds", "disk_bytes"}
    assert planning.planned_for(settings.workspace, identity) == newest
    (Path(second) / "manifest.json").write_text("{}")
    assert planning.planned_for(settings.workspace, identity) == artifacts.read_manifest(first)["planned"]
    assert planning.planned_for(settings.workspace, "0" * 16) is None


def test_a_build_reports_planned_and_actual_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "session_for", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(pipeline, "build", functools.partial(pipeline.build, in_process=True))
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [50] * 30))
    url = planning.plan_index(settings)
    manifest = artifacts.read_manifest(str(index_module.build_index(settings)))
    assert manifest["planned"] == artifacts.read_manifest(url)["planned"]
    assert manifest["planned"]["passages"] == manifest["num_passages"] == 60
    assert re.search(
        r"^index: planned 60 passages in [\d.]+s, actual 60 in [\d.]+s$", capsys.readouterr().err, re.MULTILINE
    )
    jsonl(tmp_path / "c.jsonl", [50] * 31)
    manifest = artifacts.read_manifest(str(index_module.build_index(settings)))
    assert manifest["planned"] is None, "there is no plan of the changed corpus"
    assert "planned" not in capsys.readouterr().err
    assert versions.list_versions(settings.workspace) == ["000001", "000002"]


def test_the_report_of_a_build_names_new_passages() -> None:
    line = planning.outcome_line(
        {"passages": 1040, "seconds": 12.0}, {"num_passages": 1095, "seconds": {"total": 14.2}}, 1095
    )
    assert line == "index: planned 1,040 passages in 12s, actual 1,095 in 14s"
    line = planning.outcome_line({"passages": 9, "seconds": 2.0}, {"num_passages": 8, "seconds": {"total": 1.0}}, 3)
    assert line == "index: planned 9 passages in 2.0s, actual 8 (3 of them new) in 1.0s"


# --- bad input ---


def test_bad_inputs_name_the_rule_and_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rejects = write(tmp_path / "bad.jsonl", "{", '{"text": "no id"}', *['{"_id": 1, "text": " "}'] * 500)
    for path, error, message in (
        (tmp_path / "empty", inputs.InputError, "nothing readable"),
        (tmp_path / "nowhere", inputs.InputError, "no such file or folder"),
        ("", config.ConfigError, "corpus.path is empty"),
        (rejects, probe.PlanError, r"none of the \d+ inputs .* is a document \(the first: .*bad.jsonl.*repair"),
    ):
        with pytest.raises(error, match=message):
            planning.plan_index(settings_of(tmp_path, path))
    assert not (tmp_path / "workspace").exists(), "without documents there is no plan"


def test_rejects_are_a_warning_and_lower_the_estimate(tmp_path: Path) -> None:
    rows = [{"_id": str(n), "text": text_of(50)} if n % 2 else {"text": text_of(50), "x": str(n)} for n in range(4000)]
    found = planned(settings_of(tmp_path, write(tmp_path / "c.jsonl", *rows)))
    assert found["documents"]["value"] == pytest.approx(2000, rel=0.15)
    assert "no id" in found["warnings"][0]
    for number in range(100):
        write(tmp_path / "files" / f"{number}.txt", "\n" if number % 4 == 0 else text_of(30))
    found = planned(settings_of(tmp_path, tmp_path / "files"))
    assert found["documents"] == {"value": 75, "low": 75, "high": 75}


def test_refused_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "files" / "a.txt", text_of(30))
    write(tmp_path / "files" / "b.exe", "x")
    found = planned(settings_of(tmp_path, tmp_path / "files"))
    assert found["documents"]["value"] == found["corpus"]["num_files"] == 1
    assert found["warnings"] == ["1 files cannot be read and are left out"]


def test_only_the_head_of_a_huge_document_is_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path, write(tmp_path / "huge.txt", text_of(30_000)))
    documents, passages = everything(settings)
    monkeypatch.setattr(probe, "HEAD_CHARACTERS", 10_000)
    found = planned(settings)
    assert (documents, found["documents"]["value"]) == (1, 1)
    assert found["passages"]["value"] == pytest.approx(passages, rel=0.02)
    assert found["probe"]["passages"] < passages / 10


def test_a_huge_document_in_one_line_is_found_by_the_probe(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, jsonl(tmp_path / "c.jsonl", [60_000, 10, 60_000]), "seed=3")
    assert planned(settings)["documents"]["value"] == 3
    with pytest.raises(probe.PlanError, match="longer than max_document_bytes"):
        planned(settings.using("corpus.max_document_bytes=20"))


# --- the command ---


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(leaving.value.code or 0), captured.out, captured.err


def test_the_command_shows_a_table_and_ends_with_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "c.jsonl", [50] * 30)
    path = tmp_path / "c.yaml"
    path.write_text(f"workspace: {tmp_path / 'w'}\nencoder: {{model: hashing-64}}\ncorpus: {{path: {source}}}\n")
    code, out, err = command(capsys, "plan", str(path))
    assert code == 0
    assert artifacts.read_manifest(out.splitlines()[-1])["kind"] == "plan"
    assert re.search(r"^documents +30$", err, re.MULTILINE)
    assert re.search(r"^flat +\S+ KiB +\S+ KiB  auto, chosen$", err, re.MULTILINE)
    code, again, err = command(capsys, "plan", str(path), "--json")
    facts = json.loads(again)
    assert (code, facts["path"], facts["documents"]["value"]) == (0, out.strip(), 30)
    assert "already finished" in err
    assert re.search(r"^documents +30$", err, re.MULTILINE), "its numbers are shown again"
    code, out, err = command(capsys, "plan", str(path), f"corpus.path={tmp_path / 'nowhere'}")
    assert (code, out) == (1, "")
    assert "no such file or folder" in err
    assert command(capsys, "plan", str(path), "corpus.path=")[0] == 2


@pytest.mark.parametrize("scale", [1, 10**6, 10**15])
@pytest.mark.parametrize("name", [LONG, CHINESE])
def test_no_line_of_the_table_is_wider_than_a_terminal(tmp_path: Path, scale: int, name: str) -> None:
    reject = schema.Reject(name, "why", "file")
    prices = [
        "prices.core_hour=123.456",
        "prices.gpu_hour=9",
        "prices.gibibyte_month=1234.5",
        f"prices.currency={name}",
    ]
    found = estimated(
        tmp_path,
        *prices,
        "cluster.gpus_per_worker=1",
        sizes={"files": 10_000.0 * scale},
        rejects=(reject,),
        kind="hnsw",
    )
    found["corpus"] = {
        "path": name,
        "num_files": scale**2,
        "bytes": scale**2,
        "num_units": scale,
        "num_rejected_files": 0,
    }
    lines = terminal.plan_lines(found)
    assert max(map(columns, lines)) <= 80
    assert len([line for line in lines if line.startswith(("flat", "ivf", "hnsw"))]) == 5


class _SlowEncoder:
    """Takes `seconds` a text, by the clock of the test."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        self.clock[0] += self.seconds * len(texts)
        return np.ones((len(texts), 2), dtype=np.float32)


@pytest.mark.parametrize(("seconds", "count"), [(0.001, 500), (0.02, 167), (1.0, 63)])
def test_a_slow_encoder_embeds_fewer_passages(monkeypatch: pytest.MonkeyPatch, seconds: float, count: int) -> None:
    clock = [0.0]
    monkeypatch.setattr(probe.time, "perf_counter", lambda: clock[0])
    texts = [str(number) for number in range(500)]
    chosen = probe._embeddable(_SlowEncoder(clock, seconds), texts)
    assert len(chosen) == count
    assert chosen == texts[:: 500 // count + (500 % count > 0)], "spread over the corpus"
