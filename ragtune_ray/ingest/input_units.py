"""Divides an input into units that tasks read in parallel.

In: a folder, a .jsonl or .parquet file, a BEIR folder or SQuAD JSON. Out: a `Plan` with the units, the files, and a reject
for each file that is left out. Planning only lists files: a large file is cut by its size, and the task that reads a unit
finds where its first line begins.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from ragtune_ray.ingest import inputs, listing, sidecars
from ragtune_ray.ingest.inputs import Format
from ragtune_ray.ingest.listing import Files, InputFile
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import reject
from ragtune_ray.schema import Reject
from ragtune_ray.storage import filesystem

MAX_FILES = 256
"""Document files in one unit, so that a folder of tiny files is more than one unit."""
SMALLEST_UNIT_BYTES, LARGEST_UNIT_BYTES, USUAL_UNITS = 2**18, 2**26, 256
"""How `corpus.unit_bytes=0` chooses: about this many units, of a size between these."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the input that one task reads; it depends only on the input and `unit_bytes`."""

    number: int
    format: Format
    paths: tuple[str, ...]
    """One file, or several document files."""
    start: int
    """First byte of the part of the file; 0 for files. See `readers` for what belongs to a part."""
    stop: int
    """One past the last byte; 0 for files."""
    root: str
    """The corpus folder; the ids of document files are relative to it."""
    stamps: tuple[str, ...] = ()
    """What is read must be what was planned: the stamp of each path (`listing.stamp_of`)."""
    sidecars: tuple[str, ...] = ()
    """For each of several document files, the stamp of its sidecar (`sidecars.path_of`); "" if it has none."""
    sha256s: tuple[str, ...] = ()
    """With `corpus.fingerprint: sha256`, the sha256 of each path and of its sidecar."""

    @property
    def is_planned(self) -> bool:
        """Whether this unit comes from a plan, so that it can be compared; a part of one for a survey does not."""
        return bool(self.stamps)

    @property
    def key(self) -> str:
        """Names the work of reading this unit, whatever its number: what is read, and below which folder."""
        return _digest([[self.root, *self.content()]])

    def content(self) -> list[Any]:
        """What is read, as JSON values: the paths below the root, the part, and the identity of each file."""
        root = f"{self.root.rstrip('/')}/"
        identities = self.sha256s or (self.stamps, self.sidecars)
        return [self.format, [path.removeprefix(root) for path in self.paths], self.start, self.stop, identities]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Unit:
        """A unit from the JSON of its `dataclasses.asdict`."""
        lists = {name: tuple(values[name]) for name in ("paths", "stamps", "sidecars", "sha256s")}
        return cls(**{**values, **lists})

    def part(self, **changes: Any) -> Unit:
        """A part of this unit, which is not compared with the plan; `changes` are attributes."""
        return replace(self, **changes, stamps=(), sidecars=(), sha256s=())


@dataclass(frozen=True, slots=True)
class Plan:
    """All units of an input, sorted by path, with their files and the files that were left out."""

    units: Sequence[Unit]
    files: Sequence[InputFile]
    rejects: tuple[Reject, ...]

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return (
            sum(file.size_bytes for file in self.files) if not isinstance(self.files, Files) else self.files.size_bytes
        )


class _Cut(NamedTuple):
    """A unit, as places of its files in the rows of `_Units`."""

    format: Format
    first: int
    num_files: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class _Units(Sequence[Unit]):
    """Units that are made when they are asked for, because together their paths would fill the memory."""

    files: Files
    root: str
    sidecars: np.ndarray
    """Per file, the place of its sidecar among all files; -1 if it has none."""
    cuts: list[_Cut] = field(default_factory=list)
    rows: array[int] = field(default_factory=lambda: array("q"))
    """Places of the files of the units among all files."""

    def __len__(self) -> int:
        return len(self.cuts)

    @overload
    def __getitem__(self, number: int) -> Unit: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Unit]: ...
    def __getitem__(self, number: int | slice) -> Unit | Sequence[Unit]:
        numbers = range(len(self))[number]
        return self._unit(numbers) if isinstance(numbers, int) else tuple(map(self._unit, numbers))

    def add(self, form: Format, rows: list[int], start: int = 0, stop: int = 0) -> None:
        """Append a unit of the files at these places."""
        self.cuts.append(_Cut(form, len(self.rows), len(rows), start, stop))
        self.rows.extend(rows)

    def _unit(self, number: int) -> Unit:
        form, first, num_files, start, stop = self.cuts[number]
        rows = np.asarray(self.rows[first : first + num_files])
        files, beside = self.files.take(rows), self.sidecars[rows]
        found = iter(self.files.take(beside[beside >= 0]))
        described = [next(found) if row >= 0 else None for row in beside]
        pairs = list(zip(files, described, strict=True))
        sha256s = tuple(f"{a.identity} {b.identity}" if b else a.identity for a, b in pairs)
        return Unit(
            number,
            form,
            tuple(file.path for file in files),
            start,
            stop,
            self.root,
            tuple(file.stamp for file in files),
            tuple(sidecar.stamp if sidecar else "" for sidecar in described) if any(described) else (),
            sha256s if any(file.sha256 for file in files) else (),
        )


def plan_units(
    path: str, unit_bytes: int = 0, root: str | None = None, fingerprint: Literal["listing", "sha256"] = "listing"
) -> Plan:
    """Divide an input into units of about `unit_bytes`, judging by names and sizes alone.

    Args:
        path: a folder or a file, local or any fsspec URL; a folder with a corpus.jsonl is BEIR.
        unit_bytes: input bytes per unit; 0: chosen from the size of the input.
        root: the folder to which ids of document files are relative; None means the path, or the folder of a single file.
        fingerprint: `sha256` also reads each file, so that the identity of its content is known.

    Raises:
        InputError: the path is missing, contains nothing readable, or needs an extra that is not installed.
    """
    listed, rejects = listing.list_files(path)
    inputs.require_libraries(path, listed.names())
    files, forms = _readable(listed, rejects)
    if fingerprint == "sha256":
        files = files.hashed()
    units = _Units(files, root or files.folder, sidecars.places(files.name_column))
    _cut(units, forms, unit_bytes or usual_unit_bytes(files.size_bytes))
    if not units:
        reasons = "; ".join(f"{item.place}: {item.reason}" for item in rejects[:3]) or "it is empty"
        raise inputs.InputError(f"{path}: nothing readable ({reasons}); accepted: {inputs.ACCEPTED}")
    return Plan(units, files, tuple(sorted(rejects, key=lambda item: item.place)))


def usual_unit_bytes(size_bytes: int) -> int:
    """The size of a unit for an input of this size: a power of two that makes at most `USUAL_UNITS` units, within limits.

    >>> [usual_unit_bytes(size) for size in (0, 2**30, 2**30 + 1, 10**12)]
    [262144, 4194304, 8388608, 67108864]
    """
    wanted = 1 << (max(0, size_bytes - 1) // USUAL_UNITS).bit_length()
    return min(max(wanted, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


def _readable(listed: Files, rejects: list[Reject]) -> tuple[Files, list[Format | None]]:
    """The files that tasks will read, with their formats (None for a sidecar); the others are added to the rejects."""
    form_of = functools.cache(lambda suffix: inputs.format_of(f"a{suffix}"))
    beside = sidecars.places(listed.name_column)
    is_sidecar = np.zeros(len(listed), dtype=bool)
    is_sidecar[beside[beside >= 0]] = True
    is_kept = np.ones(len(listed), dtype=bool)
    forms: list[Format | None] = []
    for row, (name, size) in enumerate(zip(listed.names(), listed.sizes.tolist(), strict=True)):
        try:
            form = None if is_sidecar[row] else _format(name, size, form_of)
        except ParseError as error:
            rejects.append(reject(filesystem.join(listed.folder, name), str(error), "file"))
            is_kept[row] = False
            if beside[row] >= 0:
                is_kept[beside[row]] = False
            form = None
        forms.append(form)
    if is_kept.all():
        return listed, forms
    return listed.subset(np.flatnonzero(is_kept)), list(itertools.compress(forms, is_kept))


def _format(name: str, size_bytes: int, form_of: Callable[[str], Format]) -> Format:
    sidecars.refuse_lone(name)
    form = form_of(inputs.suffix_of(name))
    if not size_bytes:
        raise ParseError("the file is empty (0 bytes)")
    return form


def _cut(units: _Units, forms: Sequence[Format | None], unit_bytes: int) -> None:
    """Fill in the units: ranges of the files that hold many documents, and groups of the files that are one each."""
    group: list[int] = []
    group_bytes = 0
    for row, (form, size) in enumerate(zip(forms, units.files.sizes.tolist(), strict=True)):
        if form == "files":
            group.append(row)
            group_bytes += size
            if group_bytes >= unit_bytes or len(group) == MAX_FILES:
                units.add("files", group)
                group, group_bytes = [], 0
        elif form is not None:
            num_ranges = math.ceil(size / unit_bytes)
            edges = (size * number // num_ranges for number in range(num_ranges + 1))
            for start, stop in itertools.pairwise(edges):
                units.add(form, [row], start, stop)
    if group:
        units.add("files", group)


def input_fingerprint(plan: Plan) -> str:
    """A fingerprint of what was listed: the files' paths below the corpus folder, their parts and their identities."""
    return _digest(unit.content() for unit in plan.units)


def content_fingerprint(plan: Plan, digests: Sequence[str]) -> str:
    """A fingerprint of what was read, wherever and whenever: of the parts of files, and of the sha256 of each unit's bytes."""
    return _digest([*unit.content()[:-1], read] for unit, read in zip(plan.units, digests, strict=True))


def lines_before(plan: Plan, num_lines: Sequence[int]) -> list[int]:
    """For each unit, how many lines the earlier units of its file own, given how many each unit owns."""
    before: list[int] = []
    total = 0
    for unit, owned in zip(plan.units, num_lines, strict=True):
        total = total if unit.start else 0
        before.append(total)
        total += owned
    return before


def _digest(values: Iterable[list[Any]]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()[:16]
