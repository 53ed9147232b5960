"""The `ragtune` command: `ragtune VERB CONFIG.yaml [section.field=value ...]`.

In: arguments. Out: progress on stderr; on stdout, as its last line, the path of the artifact (or, with --json, one JSON object).
Exit codes: 0 done, 1 failed, 2 wrong usage or config. Nothing heavier than `config` is imported before a verb runs.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ragtune_ray import RagtuneError, config

__all__ = ["app", "main"]

INDENTED: dict[str, Any] = {"initial_indent": "    ", "subsequent_indent": "    ", "break_on_hyphens": False}
DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="ragtune",
    help="Retrieve, fine-tune, or both? Measured on your own documents, then run at scale on Ray.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file; see `ragtune settings`.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Settings that replace the file's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code; None takes the process's own arguments."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ragtune_ray").setLevel(logging.DEBUG if debug else logging.INFO)
    sys.exit(_exit_code(arguments, debug))


def _exit_code(arguments: list[str], debug: bool) -> int:
    try:
        result = app(args=arguments, prog_name="ragtune", standalone_mode=False)
    except typer.TyperException as error:
        # Without arguments the message is the help.
        text = error.format_message()
        typer.echo(f"error: {text.rstrip('.')}; see: ragtune --help" if arguments else text, err=True)
        return WRONG_USAGE
    except (typer.Abort, KeyboardInterrupt):
        result = INTERRUPTED
    except config.ConfigError as error:
        _complain(str(error))
        return WRONG_USAGE
    except Exception as error:
        if debug:
            raise
        explained = isinstance(error, RagtuneError | OSError) and str(error)
        _complain(str(error) if explained else f"{type(error).__name__}: {error}; --debug shows where")
        return FAILED
    if result == INTERRUPTED:  # typer makes this number of a KeyboardInterrupt
        _complain("interrupted; the same command goes on where this one stopped")
    return result if isinstance(result, int) else DONE


class _CorpusByDefault(typer.core.TyperGroup):
    """`ragtune index CONFIG` is short for `ragtune index corpus CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else ["corpus", *args])


index_app = typer.Typer(cls=_CorpusByDefault, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(
    index_app, name="index", help="Index the corpus (ragtune index CONFIG), or change single documents of the index."
)


@app.command()
def init(
    folder: Annotated[str, typer.Argument(help="A folder or file of documents, as corpus.path may be.")],
    questions: Annotated[
        str, typer.Option(help="A file of questions, as queries.path may be; default: one in or next to FOLDER.")
    ] = "",
    output: Annotated[str, typer.Option(help="The YAML file to write.")] = "ragtune.yaml",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a folder of documents, and write a commented config that runs."""
    from ragtune_ray.ingest.init import init as write_config

    result = write_config(folder, questions, output, force=force)
    for line in result.lines():
        typer.echo(line, err=True)
    typer.echo(json.dumps(result.facts(), ensure_ascii=False) if as_json else result.path)


@app.command()
def plan(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what `index` would take, from a probe of the corpus: passages, bytes, time, money. Builds nothing."""
    settings = config.load(path, overrides or ())
    from ragtune_ray import terminal
    from ragtune_ray.index.plan import plan_index, read_plan

    url = plan_index(settings)
    found = read_plan(url)
    for line in terminal.plan_lines(found):
        typer.echo(line, err=True)
    typer.echo(json.dumps({"path": url, **found}, ensure_ascii=False) if as_json else url)


@index_app.command("corpus")
def index(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the index hold exactly the corpus: only what is new or changed is embedded. May be left out: `index CONFIG`."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.indexing.index import build_index

    _finish(build_index(settings), as_json)


@index_app.command()
def upsert(
    path: ConfigPath,
    documents: Annotated[str, typer.Argument(help="A file or folder, as corpus.path may be.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Add documents to the index, replacing those of the same ids."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.indexing.update import upsert_documents

    _finish(upsert_documents(settings, documents), as_json)


@index_app.command()
def delete(
    path: ConfigPath,
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCUMENT... [SECTION.FIELD=VALUE]...",
            help="Ids; files or folders of the corpus; .jsonl files of ids.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Take documents out of the index."""
    named, overrides = _divided(documents)
    settings = config.load(path, overrides)
    from ragtune_ray.cluster.indexing.update import delete_documents, document_ids

    if not named:
        raise config.ConfigError("index delete: names no document; give ids, files of the corpus or a .jsonl of ids")
    _finish(delete_documents(settings, document_ids(settings, named)), as_json)


@index_app.command("compact")
def compact_segments(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Merge small and half-empty segments; nothing is embedded again."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.indexing.compact import compact
    from ragtune_ray.index import versions as published

    compact(settings, in_process=False)
    current = published.current_version(settings.workspace)
    _finish(published.version_url(settings.workspace, current), as_json)


@app.command()
def retrieve(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find the hits of every query, and score them where the queries have qrels."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.answering.retrieve import retrieve as retrieve_hits

    _finish(retrieve_hits(settings), as_json)


@app.command()
def answer(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Answer every query, in bulk, with citations."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.answering.answer import answer as answer_queries

    _finish(answer_queries(settings), as_json)


@app.command()
def evaluate(
    path: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    show: Annotated[int, typer.Option(help="Print so many answers of each arm.")] = 0,
) -> None:
    """Answer the queries in every arm of evaluate.arms, and score and compare the arms."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.answering.evaluate import evaluate as evaluate_arms
    from ragtune_ray.terminal import evaluation_lines

    run = evaluate_arms(settings)
    for line in evaluation_lines(str(run), show):
        typer.echo(line, err=True)
    _finish(run, as_json)


@app.command()
def calibrate(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find, on the validation questions, when the arm of answer.arm may answer without retrieval."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.comparing.calibrate import calibrate as calibrate_arm

    _finish(calibrate_arm(settings), as_json)


@app.command()
def compare(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare base, rag, ft and rag+ft on held-out queries (training what is missing) and recommend one; writes a report."""
    settings = config.load(path, overrides or ())
    import shlex

    from ragtune_ray.cluster.comparing.compare import compare as compare_arms
    from ragtune_ray.cluster.comparing.compare import read_comparison
    from ragtune_ray.evaluation.report import plain_text

    run = compare_arms(settings, shlex.join(["ragtune", "compare", path, *(overrides or ())]))
    for line in plain_text.comparison_lines(read_comparison(run)):
        typer.echo(line, err=True)
    typer.echo(f"report: {run}/report.html", err=True)
    _finish(run, as_json)


@app.command()
def train(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Fine-tune the generator or the retriever on the queries' training split; see `ragtune settings`, training."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.training.train import train as train_model

    _finish(train_model(settings).path, as_json)


@app.command()
def tune(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tune retriever and generator together, in rounds that are judged: tune.mode is staged, joint, iterative or domain."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.tuning.tune import report_lines
    from ragtune_ray.cluster.tuning.tune import tune as tune_pair

    url = tune_pair(settings)
    for line in report_lines(url):
        typer.echo(line, err=True)
    _finish(url, as_json)


@app.command()
def ask(path: ConfigPath, question: str, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Answer one question in this process, streaming, and show its sources."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.asking import ask_streaming

    _write_answer(ask_streaming(settings, question), as_json)


@app.command("serve")
def serve_endpoint(path: ConfigPath, overrides: Overrides = None) -> None:
    """Serve retrieval and answers over HTTP (OpenAI's format), with a page to ask on, until Ctrl-C or SIGTERM."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.cluster.serving.serve import serve

    serve(settings)


@app.command()
def verify(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> int:
    """Check every file of the workspace's index, runs and models (or of one artifact directory) against its sha256."""
    from ragtune_ray.index.verification import verify_artifact, verify_workspace

    found, checked = (
        verify_artifact(path)
        if not path.endswith((".yaml", ".yml"))
        else verify_workspace(config.load(path, overrides or ()).workspace)
    )
    for problem in found:
        _complain(problem)
    if as_json:
        typer.echo(json.dumps({"path": path, "checked": checked, "problems": found}))
    else:
        typer.echo(f"{checked} artifacts checked, {len(found)} problems", err=True)
        typer.echo(path)
    return FAILED if found else DONE


@app.command()
def versions(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List the versions of the index; * marks the one that readers take."""
    settings = config.load(path, overrides or ())
    from ragtune_ray import terminal
    from ragtune_ray.index import versions as published

    current = published.current_version(settings.workspace)
    names = published.list_versions(settings.workspace)
    manifests = [published.read_version(settings.workspace, name).manifest for name in names]
    for line in terminal.version_lines(manifests, current):
        typer.echo(line, err=True)
    _finish(published.version_url(settings.workspace, current), as_json)


@app.command()
def rollback(
    path: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(help="A version's number; default: the one before the current.")] = "",
    repair: Annotated[bool, typer.Option(help="Only write a damaged or missing CURRENT anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish the content of an earlier version again, as the newest version."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.index import versions as published

    if repair:
        published.advance_current(settings.workspace)
        name = published.current_version(settings.workspace)
    else:
        name = published.roll_back(settings.workspace, to.zfill(6) if to else None).name
    _finish(published.version_url(settings.workspace, name), as_json)


@app.command()
def diff(
    path: ConfigPath,
    old: str,
    rest: Annotated[list[str] | None, typer.Argument(metavar="[NEW] [SECTION.FIELD=VALUE]...")] = None,
    as_json: AsJson = False,
) -> None:
    """List the documents that were added, removed and changed between two versions (default: up to the current one)."""
    later, overrides = _divided(rest or [])
    if len(later) > 1:
        raise config.ConfigError(f"diff: {len(later) + 1} versions are named; name one or two")
    settings = config.load(path, overrides)
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


@app.command()
def gc(
    path: ConfigPath,
    overrides: Overrides = None,
    keep: Annotated[int, typer.Option(help="So many of the newest versions stay.", min=1)] = 3,
    min_age_hours: Annotated[
        float, typer.Option(help="Younger unfinished work may still go on and stays.", min=0)
    ] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Remove old versions of the index, files that nothing needs any more, and work left half-way long ago."""
    settings = config.load(path, overrides or ())
    from ragtune_ray.index import retention

    removed = retention.collect(settings.workspace, keep, min_age_hours * 3600)
    if as_json:
        facts = {"versions": removed.versions, "segments": removed.num_segments, "other": removed.num_other}
        typer.echo(json.dumps({"path": settings.workspace, **facts}))
        return
    gone = f"{len(removed.versions)} versions, {removed.num_segments} segments, {removed.num_other} other leftovers"
    typer.echo(f"gc: {gone} removed", err=True)
    typer.echo(settings.workspace)


@app.command()
def doctor(
    path: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Also check this config's models.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Check this machine, Ray and the models, and run ten documents end to end; each failing line names its fix."""
    settings = config.load(path, overrides or ()) if path else config.Config()
    from ragtune_ray.cluster.doctor import examine

    findings = []
    for finding in examine(settings):
        findings.append(finding)
        typer.echo(finding.line(), err=True)
    if as_json:
        typer.echo(json.dumps({"findings": [finding.facts() for finding in findings]}))
    return FAILED if any(finding.failed for finding in findings) else DONE


@app.command()
def models(
    path: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="None: the two embedded models.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the models of a config (or the embedded ones) so that everything else works offline."""
    from ragtune_ray.models import weights as sources

    names = list(sources.EMBEDDED)
    if path:
        settings = config.load(path, overrides or ())
        generators = [settings.generator.model] if settings.generator.engine == "transformers" else []
        names = [settings.encoder.model, *generators, *filter(None, [settings.retrieval.reranker])]
    found = [sources.resolve(name) for name in names]
    if as_json:
        facts = [{"name": m.name, "path": str(m.directory), "fingerprint": m.fingerprint} for m in found]
        typer.echo(json.dumps({"models": facts}))
        return
    for model in found:
        typer.echo(f"{model.name} {model.fingerprint}", err=True)
        typer.echo(str(model.directory or model.name))


@app.command()
def settings(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md instead.")] = False,
) -> None:
    """List every setting with its default and meaning."""
    if markdown:
        typer.echo(config.settings_page(), nl=False)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, default, meaning in config.describe():
        typer.echo(f"{name} = {default}")
        typer.echo(f"    {meaning}" if width is None else textwrap.fill(meaning, width, **INDENTED))


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments that are names, and those that are overrides: what stands before their `=` is a setting."""
    known = {name for name, _, _ in config.describe()}
    overrides = [argument for argument in arguments if argument.partition("=")[0] in known and "=" in argument]
    return [argument for argument in arguments if argument not in overrides], overrides


def _finish(path: Path | str, as_json: bool) -> None:
    """The last line of stdout: where the artifact stands, or that and its facts."""
    if not as_json:
        typer.echo(str(path))
        return
    from ragtune_ray.storage import artifacts

    manifest = artifacts.read_manifest(str(path))
    facts = {name: value for name, value in manifest.items() if name not in {"files", "config", "manifest_sha256"}}
    typer.echo(json.dumps({"path": str(path), **facts}, ensure_ascii=False))


def _write_answer(pieces: Any, as_json: bool) -> None:
    from ragtune_ray import terminal
    from ragtune_ray.asking import SourcedAnswer

    for piece in pieces:
        if isinstance(piece, SourcedAnswer):
            if as_json:
                typer.echo(json.dumps(piece.facts(), ensure_ascii=False))
                return
            typer.echo("\n")
            for line in terminal.source_lines(piece.passages, piece.answer.scores):
                typer.echo(line)
            for line in terminal.citation_lines(piece.answer):
                typer.echo(line)
        elif not as_json:
            typer.echo(piece, nl=False)
            sys.stdout.flush()


def _complain(text: str) -> None:
    typer.echo(f"error: {text}", err=True)


if __name__ == "__main__":
    main()
