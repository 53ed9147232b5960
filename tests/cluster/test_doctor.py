"""The checks of `ragtune doctor`."""

from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import doctor
from ragtune_ray.config import extras
from ragtune_ray.ingest import parsers
from ragtune_ray.models import weights
from tests.support.corpora import write


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_sound_machine_passes_and_answers_the_probe(tmp_path: Path, generator_directory: Path) -> None:
    # What a config says of its own documents and models is not asked of made-up ones.
    own = ("answer.arm=ft", "retrieval.filter={product: pump}", "index.tenant_field=tenant", "retrieval.tenant=acme")
    settings = config.Config().using(
        "encoder.model=hashing-384", f"generator.model={generator_directory}", f"workspace={tmp_path}", *own
    )
    findings = {finding.name: finding for finding in doctor.examine(settings)}
    assert [finding.line() for finding in findings.values() if finding.failed] == []
    assert findings["end to end"].level == "ok"
    assert {"ray", "torch", "processor", "memory", "shared memory", "ray auth", "port 8265"} <= set(findings)


def test_every_failing_line_names_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FLOORS", {"ray": (999, 0)})
    monkeypatch.setattr(doctor, "MIN_FREE_MEMORY_BYTES", 2**60)
    monkeypatch.setattr(doctor, "MIN_FREE_DISK_BYTES", 2**60)
    monkeypatch.setattr(doctor, "MIN_SHARED_MEMORY_BYTES", 2**60)

    def missing(name: str) -> weights.Model:
        raise weights.ModelError(f"model {name!r}: not at hand")

    monkeypatch.setattr(weights, "resolve", missing)
    findings = list(doctor.examine(config.Config().using(f"workspace={tmp_path}")))
    failed = [finding for finding in findings if finding.failed]
    assert {finding.name for finding in failed} >= {"ray", "memory", "disk (workspace)", "shared memory", "model"}
    assert all(finding.fix for finding in failed)
    assert all("->" in finding.line() for finding in failed)
    assert findings[-1].text == "skipped, because a model is missing"


def test_corpus_questions_and_missing_libraries_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers, "missing_extra", {".pdf": "pdf", ".docx": "docx"}.get)
    monkeypatch.setattr(extras, "missing", lambda _: ["s3"])
    write(tmp_path / "docs" / "a.md", "# A\n\nThe pump is red.")
    for name in ("b.pdf", "c.docx"):
        write(tmp_path / "docs" / name, "x")
    write(
        tmp_path / "q.jsonl",
        {"query_id": "1", "text": "Which colour?", "answers": ["red"]},
        {"query_id": "2", "text": ""},
    )
    given = config.Config().using(f"corpus.path={tmp_path / 'docs'}", f"queries.path={tmp_path / 'q.jsonl'}")
    findings = {finding.name: finding for finding in doctor._inputs(given)}
    assert findings["corpus"].level == findings["questions"].level == "note"
    assert "1 file, 22 bytes: 1 .md; not read: 1 .docx" in findings["corpus"].text
    assert "1 question, 1 with short answers" in findings["questions"].text
    assert "1 rows are not usable" in findings["questions"].text
    assert findings["libraries"].fix == extras.install_command("s3", "docx", "pdf")
    nowhere = config.Config().using(f"corpus.path={tmp_path / 'nowhere'}", f"queries.path={tmp_path / 'nowhere.jsonl'}")
    failed = {finding.name: finding for finding in doctor._inputs(nowhere) if finding.failed}
    assert failed.keys() == {"corpus", "questions", "libraries"}
    assert list(doctor._inputs(config.Config()))[:-1] == []


def test_a_home_that_cannot_be_written_and_a_missing_dev_shm_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGTUNE_CACHE", "/dev/null/cache")
    found = {finding.name: finding for finding in doctor._disk(config.Config().using(f"workspace={tmp_path}"))}
    assert found["disk (model cache)"].text == "/dev/null/cache cannot be written"
    assert "RAGTUNE_CACHE" in found["disk (model cache)"].fix
    assert found["disk (workspace)"].level != "failed"
    monkeypatch.setattr(doctor, "Path", lambda *_: tmp_path / "missing")
    assert (doctor._shared_memory().level, "no /dev/shm" in doctor._shared_memory().text) == ("note", True)
