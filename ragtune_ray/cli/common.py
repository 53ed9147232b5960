"""Code that all verbs share: arguments, loading the config, and printing results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import typer
import typer.core

import ragtune_ray as rt
from ragtune_ray import progress

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""

ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file; `ragtune settings` lists its settings.")
]
OptionalConfigPath = Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.FIELD=VALUE", help="Settings that override those of the file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")]


class DefaultCommand(typer.core.TyperGroup):
    """A group of which one command is meant where none is named: `ragtune index CONFIG` is `ragtune index corpus CONFIG`."""

    default: ClassVar[str]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the name of the default command where the first argument is not that of a command."""
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else [self.default, *args])

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Show both forms."""
        formatter.write_usage(ctx.command_path, "CONFIG [SECTION.FIELD=VALUE]...")
        formatter.write_usage(ctx.command_path, "COMMAND CONFIG ...", prefix=" " * len("Usage: "))


def load(path: str, overrides: Sequence[str] | None) -> rt.Config:
    """The config of a verb: defaults < file < overrides."""
    from ragtune_ray import config

    return config.load(path, overrides or ())


def begin(verb: str, settings: rt.Config, path: str, *, generates: bool = False) -> None:
    """Say at once what a verb reads first, because its imports alone take seconds.

    Args:
        verb: of the command.
        settings: the whole config.
        path: what is read; nothing is said of an empty path, which the verb refuses.
        generates: the verb uses the generator; say so where that is the embedded one.
    """
    if path:
        progress.say(f"{verb}: reading {path}")
    model = settings.generator.model
    if generates and settings.generator.engine != "openai" and model == rt.Config().generator.model:
        progress.say(f"note: {model} is a demonstration model; set generator.model")


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into names and overrides; an override is NAME=VALUE with the name of a setting."""
    from ragtune_ray import config

    known = {name for name, _, _ in config.describe()}
    overrides = [argument for argument in arguments if argument.partition("=")[0] in known and "=" in argument]
    return [argument for argument in arguments if argument not in overrides], overrides


def finish(
    result: object, as_json: bool, more: Mapping[str, object] | None = None, without: Sequence[str] = ()
) -> None:
    """Print the path of an artifact as the last line of stdout, or with --json its path and facts.

    Args:
        result: the artifact, or its path.
        as_json: whether --json is set.
        more: facts in addition to those of the manifest.
        without: facts of the manifest to leave out.
    """
    path = str(result)
    if not as_json:
        typer.echo(path)
        return
    from ragtune_ray.storage import artifacts

    manifest = artifacts.read_manifest(path)
    hidden = {"files", "config", "manifest_sha256", *without}
    facts = {name: value for name, value in manifest.items() if name not in hidden}
    typer.echo(json.dumps({"path": path, **facts, **(more or {})}, ensure_ascii=False))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines for a person, on stderr."""
    for line in lines:
        typer.echo(line, err=True)


def print_error(text: str) -> None:
    """Print an error on stderr."""
    typer.echo(f"error: {text}", err=True)
