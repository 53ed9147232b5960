"""Reads a YAML file of settings, and tells where each of its values was given: file and line, or the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ragtune_ray import RagtuneError

Location = tuple[str, ...]
"""The names on the way to a value, such as `("retrieval", "top_k")`."""


class ConfigError(RagtuneError, ValueError):
    """A setting is wrong; the message names the field, the value and the rule."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of a config come from."""

    name: str
    """A file, or a word for values from Python."""
    lines: Mapping[Location, int] = field(default_factory=dict)
    """The line of each value in the file."""
    overrides: tuple[str, ...] = ()
    """`section.field=value` arguments, which win over the file."""

    def place(self, location: Sequence[str | int]) -> str:
        """Where the value at a location was given; for a section also the overrides in it, which may have broken its rule.

        >>> source = Source("a.yaml", {("seed",): 3, ("index",): 4}, ("index.kind=tree",))
        >>> source.place(["seed"]), source.place(["index", "kind"]), source.place(["index"])
        ('a.yaml:3', 'command line', 'a.yaml:4 with index.kind=tree')
        """
        names = tuple(map(str, location))
        inside = []
        for override in self.overrides:
            given = tuple(override.partition("=")[0].strip().split("."))
            if names[: len(given)] == given:
                return "command line"
            if given[: len(names)] == names:
                inside.append(override)
        if inside and names and names not in self.lines:
            return "command line"
        known = next((names[:size] for size in range(len(names), 0, -1) if names[:size] in self.lines), None)
        place = f"{self.name}:{self.lines[known]}" if known else self.name
        return f"{place} with {' '.join(inside)}" if inside else place


def read(path: str | Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """The values of a YAML file, and the line of each.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or gives a setting twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror}); name a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        values: Any = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date such as 2024-02-30
        raise ConfigError(f"config {path}: is not YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: must be a mapping of sections, is {type(values).__name__}")
    lines: dict[Location, int] = {}
    for location, line in _lines(root, (), set()):
        if location in lines:
            raise ConfigError(
                f"{path}:{line}: {'.'.join(location)} is given a second time, after line {lines[location]}; YAML would use "
                "only the last one; write both as one"
            )
        lines[location] = line
    return values, lines


def _lines(node: yaml.Node | None, prefix: Location, seen: set[int]) -> Iterator[tuple[Location, int]]:
    """The location and line of every value in a node; what an alias repeats is visited once, so that nothing is endless."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    pairs: list[tuple[str, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        pairs = [
            (str(key.value), key.start_mark.line, value)
            for key, value in node.value
            if key.tag != "tag:yaml.org,2002:merge"
        ]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(number), value.start_mark.line, value) for number, value in enumerate(node.value)]
    for name, line, value in pairs:
        yield (*prefix, name), line + 1
        yield from _lines(value, (*prefix, name), seen)
