"""The checks of `ragtune doctor`."""

from pathlib import Path

import pytest

from ragtune_ray import config
from ragtune_ray.cluster import doctor
from ragtune_ray.models import weights


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
