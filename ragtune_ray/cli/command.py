"""The `ragtune` command, its exit codes, and all verbs except those of the index."""

from __future__ import annotations

import io
import json
import logging
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

import ragtune_ray as rt
from ragtune_ray.cli.common import (
    DONE,
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    AsJson,
    ConfigPath,
    OptionalConfigPath,
    Overrides,
    begin,
    finish,
    load,
    print_error,
    print_lines,
)
from ragtune_ray.cli.index_commands import index_app, upkeep_app
from ragtune_ray.cli.label_command import label_app
from ragtune_ray.cli.questions_commands import questions_app

VERBS = [
    *("init", "plan", "index", "questions", "retrieve", "answer", "evaluate", "label", "calibrate", "compare"),
    *("train", "tune", "ask", "serve", "mcp", "versions", "diff", "rollback", "gc", "verify"),
    *("doctor", "models", "settings"),
]
"""The verbs in the order in which they are used."""


class _Commands(typer.core.TyperGroup):
    """Lists the verbs in the order of `VERBS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        known = super().list_commands(ctx)
        return [name for name in VERBS if name in known] + [name for name in known if name not in VERBS]


app = typer.Typer(
    name="ragtune",
    cls=_Commands,
    help="Retrieve, fine-tune, or both? Measured on your own documents, then run at scale on Ray.",
    epilog="Start with: ragtune init FOLDER. With --debug, an error of any command shows its traceback.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.add_typer(index_app)
app.add_typer(upkeep_app)
app.add_typer(label_app)
app.add_typer(questions_app)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"ragtune {rt.__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code; None means the arguments of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know every character of a document
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
    except Exception as error:
        from ragtune_ray.config import ConfigError

        if isinstance(error, ConfigError):
            print_error(str(error))
            return WRONG_USAGE
        if debug:
            raise
        explained = isinstance(error, rt.RagtuneError | OSError) and str(error)
        print_error(str(error) if explained else f"{type(error).__name__}: {error}; --debug shows where")
        return FAILED
    if result == INTERRUPTED:  # typer returns this number, too, after a KeyboardInterrupt
        print_error("interrupted; run the same command again to continue where it stopped")
    return result if isinstance(result, int) else DONE


@app.command()
def init(
    folder: Annotated[str, typer.Argument(help="A folder or file of documents; formats as for corpus.path.")],
    questions: Annotated[
        str, typer.Option(help="A file of questions, formats as for queries.path; default: one in or next to FOLDER.")
    ] = "",
    output: Annotated[str, typer.Option(help="The YAML file to write.")] = "ragtune.yaml",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented config for a folder of documents."""
    from ragtune_ray.ingest.init import init as write_config

    result = write_config(folder, questions, output, force=force)
    print_lines(result.lines())
    typer.echo(json.dumps(result.facts(), ensure_ascii=False) if as_json else result.path)


@app.command()
def plan(
    path: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    train: Annotated[bool, typer.Option("--train", help="Plan the memory of `train` instead.")] = False,
) -> None:
    """Estimate passages, size, time and cost of `index`. Probes a sample of the corpus; builds nothing."""
    settings = load(path, overrides)
    if train:
        from ragtune_ray import terminal
        from ragtune_ray.training import memory

        planned = memory.plan_for(settings)
        lines = terminal.training_plan_lines(settings, planned)
        typer.echo(json.dumps(planned.facts()) if as_json else "\n".join(lines))
        return
    begin("plan", settings, settings.corpus.path)
    from ragtune_ray import terminal
    from ragtune_ray.index.plan import plan_index, read_plan

    url = plan_index(settings)
    found = read_plan(url)
    print_lines(terminal.plan_lines(found))
    typer.echo(json.dumps({"path": url, **found}, ensure_ascii=False) if as_json else url)


@app.command()
def retrieve(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find the hits of every query. Scores them if the queries have qrels."""
    settings = load(path, overrides)
    begin("retrieve", settings, settings.queries.path)
    finish(rt.retrieve(settings), as_json)


@app.command()
def answer(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Answer every query, with citations."""
    settings = load(path, overrides)
    begin("answer", settings, settings.queries.path, generates=True)
    finish(rt.answer(settings), as_json)


@app.command()
def evaluate(
    path: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    show: Annotated[int, typer.Option(help="Print this many answers per arm.")] = 0,
) -> None:
    """Answer every query in each arm of evaluate.arms, and score it."""
    settings = load(path, overrides)
    begin("evaluate", settings, settings.queries.path, generates=True)
    run = rt.evaluate(settings)
    from ragtune_ray.terminal import evaluation_lines, label_lines

    print_lines([*evaluation_lines(str(run), show), *label_lines(str(run), settings)])
    finish(run, as_json)


@app.command()
def calibrate(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find how confident the generator must be to skip retrieval. Uses answer.arm and the validation questions."""
    settings = load(path, overrides)
    begin("calibrate", settings, settings.queries.path, generates=True)
    finish(rt.calibrate(settings), as_json)


@app.command()
def compare(
    path: ConfigPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check splits, answers, power, time and memory; run nothing.")
    ] = False,
) -> int:
    """Compare base, rag, ft and rag+ft, and recommend one. Trains missing models first, and writes a report."""
    settings = load(path, overrides)
    begin("compare", settings, settings.queries.path, generates=True)
    if check:
        from ragtune_ray.cluster.comparing import check as checking

        found = checking.check(settings)
        print_lines(found.lines())
        if as_json:
            typer.echo(checking.report(found))
        return FAILED if found.errors else DONE
    from ragtune_ray.cluster.comparing.compare import read_comparison
    from ragtune_ray.evaluation.report import plain_text

    run = str(rt.compare(settings, shlex.join(["ragtune", "compare", path, *(overrides or ())])))
    print_lines([*plain_text.comparison_lines(read_comparison(run)), f"report: {run}/report.html"])
    finish(run, as_json)
    return DONE


@app.command()
def train(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Fine-tune the generator or the retriever on the training split."""
    settings = load(path, overrides)
    begin("train", settings, settings.queries.path, generates=settings.training.objective in ("sft", "joint"))
    finish(rt.train(settings), as_json)


@app.command()
def tune(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tune retriever and generator in rounds. The method is tune.mode; models are kept only if they score higher."""
    settings = load(path, overrides)
    begin("tune", settings, settings.queries.path, generates=True)
    url = str(rt.tune(settings))
    from ragtune_ray.cluster.tuning.tune import report_lines

    print_lines(report_lines(url))
    finish(url, as_json)


@app.command()
def ask(
    path: ConfigPath,
    question: Annotated[str, typer.Argument(help="One question, quoted.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question, and show its sources."""
    settings = load(path, overrides)
    begin("ask", settings, settings.workspace, generates=True)
    if as_json:
        typer.echo(json.dumps(rt.ask(settings, question).facts(), ensure_ascii=False))
        return
    from ragtune_ray import terminal
    from ragtune_ray.asking import ask_streaming

    for piece in ask_streaming(settings, question):
        if isinstance(piece, str):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        else:
            sources = terminal.source_lines(piece.passages, piece.answer.scores)
            typer.echo("\n".join(["\n", *sources, *terminal.citation_lines(piece.answer)]))


@app.command("serve")
def serve_endpoint(path: ConfigPath, overrides: Overrides = None) -> None:
    """Serve answers over HTTP, with a web page, until Ctrl-C. The API is OpenAI's; SIGTERM also stops it."""
    rt.serve(load(path, overrides))


@app.command("mcp")
def serve_mcp(path: ConfigPath, overrides: Overrides = None) -> None:
    """Let an assistant search and ask over MCP on stdin and stdout, in this process. Needs the extra `mcp`."""
    from ragtune_ray.serving import mcp

    mcp.load("local").serve_stdio(load(path, overrides))


@app.command()
def doctor(
    path: OptionalConfigPath = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    security: Annotated[
        bool, typer.Option("--security", help="Only check who can reach or read what; takes a second.")
    ] = False,
) -> int:
    """Check this machine, Ray and the models. Indexes ten documents and asks a question; a failed check names its fix."""
    from ragtune_ray.cluster.doctor import examine
    from ragtune_ray.cluster.security import examine_security

    findings = []
    for finding in (examine_security if security else examine)(load(path, overrides) if path else rt.Config()):
        findings.append(finding)
        typer.echo(finding.line(), err=True)
    if as_json:
        typer.echo(json.dumps({"findings": [finding.facts() for finding in findings]}))
    return FAILED if any(finding.failed for finding in findings) else DONE


@app.command()
def models(path: OptionalConfigPath = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Fetch models, so that other commands work offline. Without CONFIG: the two embedded models."""
    from ragtune_ray.models import weights as sources

    names = list(sources.EMBEDDED)
    if path:
        settings = load(path, overrides)
        generators = [settings.generator.model] if settings.generator.engine != "openai" else []
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
    section: Annotated[str, typer.Argument(help="Only this section, or this setting; default: all.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown page of tables.")] = False,
) -> None:
    """List every setting, or those of one section, with default and meaning."""
    from ragtune_ray import config

    listed = config.describe_section(section) if section else list(config.describe())
    if markdown:
        typer.echo(config.settings_page(), nl=False)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for name, default, meaning in listed:
        typer.echo(f"{name} = {default}")
        lines = textwrap.wrap(meaning, width - 4, break_on_hyphens=False) if width else [meaning]
        typer.echo("    " + "\n    ".join(lines))
