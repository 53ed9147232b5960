"""The driver puts a model into the workspace; other machines take it from there, each once, unless they have it."""

import json
import multiprocessing
import os
import shutil
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray.models import staging, weights
from ragtune_ray.storage import artifacts
from tests.support import stores


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has resolved no model, and none was staged for it."""
    monkeypatch.setattr(weights, "_found", {})
    monkeypatch.setattr(weights, "_staged", {})


def workspace_of(tmp_path: Path) -> str:
    return f"folder://{tmp_path}/store"


def staged_folder(tmp_path: Path, model: weights.Model) -> Path:
    return tmp_path / "store" / "models" / ".staged" / model.fingerprint


def test_staged_model_has_the_same_fingerprint_and_no_other_files(tmp_path: Path, encoder_directory: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(encoder_directory, own)
    (own / "notes.bin").write_text("not a part of the model")
    model = weights.resolve(str(own))
    url = staging.stage(model, workspace_of(tmp_path))
    assert url == f"{workspace_of(tmp_path)}/models/.staged/{model.fingerprint}"
    shutil.rmtree(own)  # a machine that never had it
    weights.use_staged({str(own): url})
    found = weights.resolve(str(own))
    assert (found.name, found.fingerprint) == (model.name, model.fingerprint)
    assert found.directory is not None
    assert weights.fingerprint(found.directory) == model.fingerprint
    assert sorted(artifacts.read_manifest(url)["files"]) == weights.content_files(encoder_directory)


def test_model_is_staged_once_and_not_if_it_lies_in_the_workspace(
    tmp_path: Path, encoder_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = weights.resolve(str(encoder_directory))
    url = staging.stage(model, workspace_of(tmp_path))
    monkeypatch.setattr(artifacts, "publish", None)
    assert staging.stage(model, f"{workspace_of(tmp_path)}/rounds/staged-1/02") == url
    home = encoder_directory.parent
    assert staging.stage(model, str(home)) == ""
    assert staging.stage(model, f"{home}/rounds/staged-1/02") == ""


def test_what_a_tuned_model_was_trained_for_is_kept(tmp_path: Path, encoder_directory: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(encoder_directory, made := artifacts.stage(str(tuned)), dirs_exist_ok=True)
    artifacts.publish(made, str(tuned), "model", passage_encoder="of these passages")
    model = weights.resolve(str(tuned))
    url = staging.stage(model, workspace_of(tmp_path))
    shutil.rmtree(tuned)
    weights.use_staged({str(tuned): url})
    assert weights.passage_encoder(weights.resolve(str(tuned))) == "of these passages"


def test_changing_model_is_not_staged(tmp_path: Path, encoder_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = weights.Model("m", encoder_directory, "another fingerprint")
    with pytest.raises(weights.ModelError, match=r"'m': .* changed while it was copied; run again"):
        staging.stage(model, workspace_of(tmp_path))
    assert not (tmp_path / "store" / "models").exists()


def test_machine_with_the_same_model_uses_its_own(tmp_path: Path, encoder_directory: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(encoder_directory, own)
    model = weights.resolve(str(own))
    url = staging.stage(model, workspace_of(tmp_path))
    weights.use_staged({str(own): url})
    assert weights.resolve(str(own)).directory == own
    assert stores.downloads(staged_folder(tmp_path, model)) == []
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"changed": 1}))
    found = weights.resolve(str(own))
    assert found.directory != own, "another model under the same name"
    assert found.fingerprint == model.fingerprint


def open_on(cache: str, models: dict[str, str], barrier: Barrier, found: Any) -> None:
    """Resolve the models as a worker on a machine with this cache."""
    os.environ["RAGTUNE_CACHE"] = cache
    weights.use_staged(models)
    barrier.wait(60)
    for name in models:
        model = weights.resolve(name)
        assert model.directory is not None
        assert model.directory.is_relative_to(cache)
        found.put(model.fingerprint)


def test_each_machine_downloads_once(tmp_path: Path, encoder_directory: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(encoder_directory, own)
    model = weights.resolve(str(own))
    models = {str(own): staging.stage(model, workspace_of(tmp_path))}
    shutil.rmtree(own)
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(6), context.Queue()
    caches = [str(tmp_path / f"machine-{number % 2}") for number in range(6)]
    started = [context.Process(target=open_on, args=(cache, models, barrier, found)) for cache in caches]
    for process in started:
        process.start()
    assert [found.get(timeout=60) for _ in started] == [model.fingerprint] * 6
    for process in started:
        process.join(60)
    names = weights.content_files(encoder_directory)
    top = [name for name in names if "/" not in name]
    assert sorted(stores.downloads(staged_folder(tmp_path, model))) == sorted(top * 2), "six processes, two machines"
