"""The verbs about sets of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

import ragtune_ray as rt
from ragtune_ray import progress
from ragtune_ray.cli.common import AsJson, divide, load, print_lines

_YAML = (".yaml", ".yml")
questions_app = typer.Typer(
    name="questions",
    help="Look at a set of questions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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
