"""Puts a model into the workspace, once, for the machines that do not have it.

The copy is named by the model's fingerprint. It keeps the facts of a tuned model's manifest, which say what it was trained for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ragtune_ray.models import weights
from ragtune_ray.storage import artifacts, filesystem

FOLDER = ".staged"
"""In the workspace's folder of models; hidden, since nobody trained these there."""
_OWN_FACTS = {"format", "kind", "package_version", "files", "manifest_sha256"}


def stage(model: weights.Model, workspace: str) -> str:
    """The URL from which other machines open the model; "" if it lies in the workspace already.

    The workspace of a round of tuning stands for the one that it is in.

    Raises:
        ModelError: the model's files change at this moment.
    """
    home = workspace.partition("/rounds/")[0]
    directory = weights.weights_of(model)
    if filesystem.is_local(home) and directory.is_relative_to(Path(home).resolve()):
        return ""
    url = filesystem.join(filesystem.absolute(home), "models", FOLDER, model.fingerprint)
    if artifacts.is_finished(url):
        return url
    names = weights.content_files(directory)
    num_bytes = sum((directory / name).stat().st_size for name in names)
    filesystem.require_space(url, num_bytes, f"a copy of the model {model.name}")
    staging = artifacts.stage(url)
    with filesystem.discarding(staging):
        for name in names:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            if filesystem.is_local(url):
                shutil.copyfile(directory / name, staging / name)
            else:
                (staging / name).symlink_to((directory / name).resolve())  # it is read once, by the upload
        if weights.fingerprint(staging) != model.fingerprint:
            raise weights.ModelError(f"model {model.name!r}: {directory} changed while it was copied; run again")
    artifacts.publish(staging, url, "model", **{**_facts(directory), "staged": model.name})
    return url


def _facts(directory: Path) -> dict[str, object]:
    """What the manifest of a tuned model says of it."""
    if not artifacts.is_finished(str(directory)):
        return {}
    manifest = artifacts.read_manifest(str(directory))
    return {name: value for name, value in manifest.items() if name not in _OWN_FACTS}
