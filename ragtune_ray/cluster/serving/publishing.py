"""Publishes the changes of documents that clients send, in a process apart from the replicas."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ragtune_ray import config
from ragtune_ray.cluster.indexing.change import IndexVersion, OvertakenError
from ragtune_ray.cluster.indexing.pipeline import CorpusError
from ragtune_ray.cluster.indexing.update import UpdateError, delete_documents, upsert_documents
from ragtune_ray.index import versions
from ragtune_ray.serving.backend import Change, Failed
from ragtune_ray.storage import artifacts, filesystem


def publish(settings: config.Config, change: Change) -> dict[str, Any] | Failed:
    """Add, replace or delete documents.

    Returns:
        The name of the version and what this change did to it, or why nothing was changed, in words for the client.
    """
    with tempfile.TemporaryDirectory(prefix="ragtune-documents-") as folder:
        path = str(Path(folder) / "documents.jsonl")
        try:
            version = delete_documents(settings, change.deleted) if change.deleted else _upsert(settings, change, path)
        except CorpusError as error:
            reasons = "; ".join(f"{reject.place}: {reject.reason}" for reject in error.rejects[:10])
            return Failed(422, f"nothing was changed: {_without_path(reasons, path)}", "documents_rejected")
        except UpdateError as error:
            return Failed(409, f"nothing was changed: {_without_path(str(error), path)}", "index_mismatch")
        except (OvertakenError, versions.ConflictError):
            message = "nothing was changed: other processes changed the index meanwhile; send the request again"
            return Failed(409, message, "conflict", retry_after_seconds=1)
        except filesystem.SpaceError:
            return Failed(507, "nothing was changed: the disk of the index is full", "no_space")
        except artifacts.ArtifactError as error:
            return _no_index(settings, error)
    return {"index_version": version.name, **version.changes.facts()}


def _upsert(settings: config.Config, change: Change, path: str) -> IndexVersion:
    # Strict: a client that sees success must find all of its documents. Without a corpus, ids stay as they are.
    settings = settings.with_values({"corpus.path": "", "corpus.strict": True})
    Path(path).write_text("".join(json.dumps(dict(row)) + "\n" for row in change.upserted), encoding="utf-8")
    # In process: the replicas may occupy all cores, and then a task of Ray Data would wait forever.
    return upsert_documents(settings, path, in_process=True)


def _without_path(message: str, path: str) -> str:
    """A message for the client: a line of the file of its documents is the number of one."""
    return message.replace(f"{path}:", "document ").replace(path, "the request")


def _no_index(settings: config.Config, error: artifacts.ArtifactError) -> Failed:
    try:
        versions.current_version(settings.workspace)
    except artifacts.ArtifactError:
        return Failed(409, "this endpoint has no index; add documents first", "no_index")
    raise error
