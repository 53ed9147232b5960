"""The verbs about sets of questions: writing, reviewing and checking them."""

from __future__ import annotations

import contextlib
import getpass
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import ragtune_ray as rt
from ragtune_ray import progress
from ragtune_ray.cli.common import (
    AsJson,
    ConfigPath,
    DefaultCommand,
    Overrides,
    begin,
    divide,
    finish,
    load,
    print_lines,
)


class _WriteByDefault(DefaultCommand):
    """`ragtune questions CONFIG` is short for `ragtune questions write CONFIG`."""

    default = "write"


_YAML = (".yaml", ".yml")
questions_app = typer.Typer(
    name="questions",
    cls=_WriteByDefault,
    help="Write questions about the documents of the index, review them, and look at a set of questions.",
    epilog="`ragtune questions CONFIG` is short for `ragtune questions write CONFIG`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@questions_app.command()
def write(path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write questions with answers and evidence. Reports what each filter threw out; see the section `questions`."""
    settings = load(path, overrides)
    begin("questions", settings, settings.workspace)
    written = rt.write_questions(settings)
    from ragtune_ray.cluster.questions.questions import report_lines

    print_lines(report_lines(written))
    finish(written, as_json)


@questions_app.command()
def review(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run of `ragtune questions`.")],
    output: Annotated[
        Path, typer.Option(help="Where accepted and mended questions go; an existing review goes on.")
    ] = Path("reviewed.jsonl"),
    by: Annotated[str, typer.Option(help="Who reviews; default: the name of this account.")] = "",
    in_terminal: Annotated[bool, typer.Option("--terminal", help="Review here, not in a browser.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page on this machine; 0 takes a free one.")] = 0,
) -> None:
    """Accept, mend or reject written questions, one by one. The result is a file for queries.path."""
    from ragtune_ray.evaluation.questions.writing.review import open_desk

    desk = open_desk(run, output, by or getpass.getuser())
    if in_terminal:
        from ragtune_ray.cli.reviewing import review as review_here

        review_here(desk, input, lambda line: typer.echo(line, err=True))
    else:
        from ragtune_ray.serving.local.review import app

        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            app.serve(
                desk, port, lambda address: progress.say(f"questions: open {address} and press Ctrl-C at the end")
            )
    if desk.num_done():
        desk.write()  # again, in case the file was removed
    counts = ", ".join(f"{count} {verdict}" for verdict, count in desk.counts().items())
    print_lines([f"{desk.num_done()} of {len(desk.questions)} decided: {counts}"])
    typer.echo(str(output))


def _settings(path: str, given: str, overrides: Sequence[str]) -> rt.Config:
    """The config whose questions are looked at; a YAML file in the place of FILE names its own."""
    from ragtune_ray import config

    if path.endswith(_YAML) and not given:
        settings = load(path, overrides)
        if not settings.queries.path:
            raise config.ConfigError(f"{path}: queries.path is empty; name a file of questions")
        return settings
    settings = load(given, overrides) if given else config.Config().using(*overrides)
    return settings.with_values({"queries.path": path})


@questions_app.command("check")
def check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Questions, formats as for queries.path; or a YAML file, for the questions that it names.",
        ),
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [SECTION.FIELD=VALUE]...",
            help="A YAML file: its index is searched for the answers, and its splits and metric are used.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at questions before anything is spent on them: lengths, kinds, repeats, leaks, and the metric that fits."""
    from ragtune_ray.config import ConfigError

    named, overrides = divide(rest or [])
    if len(named) > 1:
        raise ConfigError(
            f"questions check: {', '.join(named)}: name one config at most; settings are SECTION.FIELD=VALUE"
        )
    settings = _settings(path, named[0] if named else "", overrides)
    progress.say(f"questions: reading {settings.queries.path}")
    from ragtune_ray.evaluation.questions.check import check as look_at

    # Without a config the workspace of this directory may be about other documents.
    is_named = path.endswith(_YAML) or bool(named) or any(each.startswith("workspace=") for each in overrides)
    found = look_at(settings, with_index=is_named)
    print_lines(found.lines())
    typer.echo(json.dumps(found.facts(), ensure_ascii=False) if as_json else found.path)
