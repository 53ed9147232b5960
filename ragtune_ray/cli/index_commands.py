"""The verbs that build, change and maintain the index."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

import ragtune_ray as rt
from ragtune_ray.cli.common import (
    DONE,
    FAILED,
    AsJson,
    ConfigPath,
    DefaultCommand,
    Overrides,
    begin,
    divide,
    finish,
    load,
    print_error,
    print_lines,
)

if TYPE_CHECKING:
    from ragtune_ray.cluster.indexing.change import IndexVersion


class _CorpusByDefault(DefaultCommand):
    """`ragtune index CONFIG` is short for `ragtune index corpus CONFIG`."""

    default = "corpus"


index_app = typer.Typer(
    name="index",
    cls=_CorpusByDefault,
    help="Build the index, or change documents in it. CONFIG is a YAML file; `ragtune settings` lists its settings.",
    epilog="`ragtune index CONFIG` is short for `ragtune index corpus CONFIG`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
upkeep_app = typer.Typer(rich_markup_mode=None)


@index_app.command("corpus")
def index(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the index contain exactly the corpus. Only new and changed documents are embedded."""
    settings = load(path, overrides)
    begin("index", settings, settings.corpus.path)
    version = rt.build_index(settings)
    finish(version, as_json, version.changes.counts(), without=("change",))


@index_app.command()
def upsert(
    path: ConfigPath,
    documents: Annotated[str, typer.Argument(help="A file or folder of documents; formats as for corpus.path.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Add documents to the index. Documents with the same ids are replaced."""
    settings = load(path, overrides)
    begin("index", settings, documents)
    _finish_change(rt.upsert_documents(settings, documents), as_json)


@index_app.command()
def delete(
    path: ConfigPath,
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCUMENT... [SECTION.FIELD=VALUE]...",
            help="Document ids, files or folders of the corpus, or .jsonl files of ids.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Delete documents from the index."""
    from ragtune_ray.config import ConfigError

    named, overrides = divide(documents)
    settings = load(path, overrides)
    if not named:
        raise ConfigError("index delete: no document is named; pass ids, files of the corpus or a .jsonl file of ids")
    from ragtune_ray.cluster.indexing.update import document_ids

    _finish_change(rt.delete_documents(settings, document_ids(settings, named)), as_json)


def _finish_change(version: IndexVersion, as_json: bool) -> None:
    """Like `finish`; the JSON tells what this call changed, not what the version's manifest says about another one."""
    finish(version, as_json, version.changes.facts(), without=("change", "num_rejects"))


@index_app.command("compact")
def compact_segments(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Merge small and half-empty segments. Nothing is embedded again."""
    settings = load(path, overrides)
    from ragtune_ray.cluster.indexing.compact import compact
    from ragtune_ray.index import versions as published

    compact(settings, in_process=False)
    current = published.current_version(settings.workspace)
    finish(published.version_url(settings.workspace, current), as_json)


@upkeep_app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the directory of one artifact.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Check the files of a workspace against their checksums."""
    from ragtune_ray.index.verification import verify_artifact, verify_workspace

    is_config = path.endswith((".yaml", ".yml"))
    found, checked = verify_workspace(load(path, overrides).workspace) if is_config else verify_artifact(path)
    for problem in found:
        print_error(problem)
    if as_json:
        typer.echo(json.dumps({"path": path, "checked": checked, "problems": found}))
    else:
        typer.echo(f"{checked} artifacts checked, {len(found)} problems", err=True)
        typer.echo(path)
    return FAILED if found else DONE


@upkeep_app.command()
def versions(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List the versions of the index. * marks the current version."""
    settings = load(path, overrides)
    from ragtune_ray import terminal
    from ragtune_ray.index import versions as published

    current = published.current_version(settings.workspace)
    names = published.list_versions(settings.workspace)
    manifests = [published.read_version(settings.workspace, name).manifest for name in names]
    print_lines(terminal.version_lines(manifests, current))
    finish(published.version_url(settings.workspace, current), as_json)


@upkeep_app.command()
def rollback(
    path: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(help="Number of a version; default: the one before the current version.")] = "",
    repair: Annotated[bool, typer.Option(help="Only rewrite a damaged or missing CURRENT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish an earlier version of the index as the newest one."""
    settings = load(path, overrides)
    from ragtune_ray.index import versions as published

    if repair:
        published.advance_current(settings.workspace)
        name = published.current_version(settings.workspace)
    else:
        name = published.roll_back(settings.workspace, to.zfill(6) if to else None).name
    finish(published.version_url(settings.workspace, name), as_json)


@upkeep_app.command()
def diff(
    path: ConfigPath,
    old: Annotated[str, typer.Argument(help="Number of a version.")],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NEW] [SECTION.FIELD=VALUE]...", help="Another version; default: the current one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List documents that differ between two versions of the index."""
    from ragtune_ray.config import ConfigError

    later, overrides = divide(rest or [])
    if len(later) > 1:
        raise ConfigError(f"diff: {len(later) + 1} versions are named; name one or two")
    settings = load(path, overrides)
    from ragtune_ray import terminal
    from ragtune_ray.index import contents
    from ragtune_ray.index import versions as published

    names = [old.zfill(6), later[0].zfill(6) if later else published.current_version(settings.workspace)]
    before, after = (published.read_version(settings.workspace, name) for name in names)
    changes = contents.difference(settings.workspace, before, after)
    if as_json:
        typer.echo(json.dumps({"old": names[0], "new": names[1], **changes}, ensure_ascii=False))
        return
    for line in terminal.difference_lines(changes):
        typer.echo(line)


@upkeep_app.command()
def gc(
    path: ConfigPath,
    overrides: Overrides = None,
    keep: Annotated[int, typer.Option(help="Number of newest versions to keep.", min=1)] = 3,
    min_age_hours: Annotated[
        float, typer.Option(help="Keep unfinished work younger than this; it may still be running.", min=0)
    ] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Remove old index versions, unused files and abandoned work."""
    settings = load(path, overrides)
    from ragtune_ray.index import retention

    removed = retention.collect(settings.workspace, keep, min_age_hours * 3600)
    segments, other = removed.num_segments, removed.num_other
    if as_json:
        facts = {"versions": removed.versions, "segments": segments, "other": other}
        typer.echo(json.dumps({"path": settings.workspace, **facts}))
        return
    gone = f"{len(removed.versions)} versions, {segments} segments, {other} other leftovers"
    print_lines([f"gc: {gone} removed"])
    typer.echo(settings.workspace)
