"""Runs the units of a build, and starts to train and to build segments as soon as enough of them are finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ragtune_ray import config, progress
from ragtune_ray.cluster import stages
from ragtune_ray.cluster.indexing import documents, sampling, segmenting, streaming, structures, units
from ragtune_ray.cluster.indexing.structures import Structure
from ragtune_ray.index import faiss_index, versions
from ragtune_ray.ingest import input_units
from ragtune_ray.storage import checksums, failpoints, filesystem

PROBED_UNITS = 4
"""Units, evenly spread over the input, in which it is measured which scripts the encoder knows."""


@dataclass(frozen=True, slots=True)
class Build:
    """What a build is made of."""

    settings: config.Config
    plan: input_units.Plan
    folder: str
    """Where its finished units are."""
    build_id: str
    base: versions.Version | None
    """Version whose documents need no work."""
    words: str
    """Rules of BM25's words."""
    lexical_titles: bool
    """BM25 searches titles, too."""
    in_process: bool
    """Run without Ray."""

    @property
    def partitions(self) -> int:
        """Of documents, by the hash of their ids."""
        return units.num_partitions(self.plan.size_bytes)


def run(build: Build) -> Segments:
    """Read and embed all units that are not finished yet, in a stream, and build segments meanwhile.

    Raises:
        ChangedError: a file changed while it was read.
        StageError: a unit failed permanently.
    """
    made = Segments(build)
    for facts in units.finished(build.folder, made.keys):
        made.add(facts)
    order = dict.fromkeys([*made.training, *range(len(made.keys))])
    pending = [made.work(number) for number in order if made.keys[number] not in made.facts]
    size_bytes, num_units = build.plan.size_bytes, len(made.keys)
    base = build.base.name if build.base else ""
    job = streaming.Job(build.settings, build.folder, base, build.partitions)
    unit_bytes = size_bytes // max(1, num_units)
    results = streaming.in_process(job, pending) if build.in_process else streaming.on_ray(job, pending, unit_bytes)
    with progress.stage("embed", num_units, "units", len(made.facts)) as shown:
        for facts in results:
            made.add(facts)
            shown.advance(1)
            failpoints.reach("build.unit")
    missing = num_units - len(made.facts)
    if missing:
        raise stages.StageError(f"index: {missing} of {num_units} units were not committed; run the command again")
    return made


@dataclass(slots=True)
class Segments:
    """Finished units, and the segments that are built from them."""

    build: Build
    keys: list[str] = field(init=False)
    """Of all units, in the order of the input."""
    facts: dict[str, units.UnitFacts] = field(default_factory=dict)
    """Of the finished units, by key."""
    training: list[int] = field(init=False)
    """Numbers of the units that train; none if the base has a structure."""
    _trains: frozenset[int] = field(init=False)
    _share: float = field(init=False)
    """Of the vectors of a unit that trains, how many it samples."""
    _probed: set[int] = field(init=False)
    _structure: Structure | None = None
    _trained: Any = None
    """Reference to the result of the task that trains."""
    _builder: segmenting.Builder | None = None
    _next: int = 0
    """Number of the first unit that the builder has not taken."""

    def __post_init__(self) -> None:
        plan, count = self.build.plan, len(self.build.plan.units)
        is_new = self.build.base is None
        names = [checksums.digest(_part(unit)) for unit in plan.units] if is_new else []
        self.training = sampling.training_units(names, self.build.settings.seed)
        self._trains = frozenset(self.training)
        self._share = sampling.sample_share(len(self.training), count, plan.size_bytes) if is_new else 0.0
        last = max(1, PROBED_UNITS - 1)
        self._probed = {round(place * (count - 1) / last) for place in range(PROBED_UNITS)}
        partitions = self.build.partitions
        self.keys = [checksums.digest([unit.key, *self._part_in(unit.number), partitions]) for unit in plan.units]

    def _part_in(self, number: int) -> tuple[bool, float]:
        """Whether the unit with this number is probed, and the share of its vectors to sample."""
        return number in self._probed, self._share if number in self._trains else 0.0

    def work(self, number: int) -> streaming.Work:
        """The unit with this number, to be done."""
        return streaming.Work(self.keys[number], self.build.plan.units[number], *self._part_in(number))

    @property
    def in_order(self) -> list[units.UnitFacts]:
        """The facts of all units, in the order of the input."""
        return [self.facts[key] for key in self.keys]

    @property
    def num_passages(self) -> int:
        """Passages of all units, those of duplicates included."""
        return sum(facts["rows"] for facts in self.facts.values())

    def documents(self) -> documents.Documents:
        """The documents of all units."""
        return documents.Documents(
            self.build.folder,
            tuple(self.keys),
            self.build.partitions,
            sum(facts["documents"] for facts in self.facts.values()),
            self.build.in_process,
        )

    def add(self, facts: units.UnitFacts) -> None:
        """Take a finished unit, and start whatever can be started now."""
        self.facts[facts["key"]] = facts
        if self.build.in_process:
            return  # nothing would run at the same time
        if self._builder is None:
            self._begin()
        if self._builder is not None:
            self._builder.collect()
            self._feed(self._builder)

    def finish(self) -> tuple[list[str], versions.VersionFacts]:
        """Build all segments and calibrate; returns their ids, in order, and facts for the version's manifest."""
        if not self.num_passages:
            return [], {}
        if self._builder is None:
            self._begin(wait=True)
        assert self._builder is not None, "all units are finished"
        self._feed(self._builder)
        structure, job = self._builder.structure, self._builder.job
        names = self._builder.finish()
        found: versions.VersionFacts = {}
        if structure.held_out:
            found = self._call(
                structures.calibrate,
                *(job.workspace, job.build, names, job.settings.index.target_recall),
            )
            found |= {"index_kind": structure.kind, "trained_id": structure.trained_id}
        failpoints.reach("build.calibrated")
        return names, found

    def _begin(self, *, wait: bool = False) -> None:
        """Choose and train the structure as soon as the units that train are finished; then make the builder."""
        if self._structure is None:
            trained = [self.keys[number] for number in self.training]
            if not self.facts or not all(key in self.facts for key in trained):
                return
            if not self.num_passages and not wait:
                return
            self._structure = self._chosen()
        structure = self._structure
        if structure.held_out and self._trained is None:
            self._trained = self._start_training(structure)
        if not self._is_trained(wait=wait):
            return
        failpoints.reach("build.trained")
        build = self.build
        job = segmenting.Job(
            build.settings, build.folder, build.build_id, build.words, build.lexical_titles, build.in_process
        )
        self._builder = segmenting.Builder(job, structure)

    def _chosen(self) -> Structure:
        """The structure of the base or, without one, that for the number of vectors which the units that train suggest."""
        dimension = next(iter(self.facts.values()))["dimension"]
        if self.build.base is not None:
            manifest = self.build.base.manifest
            return Structure(manifest["index_kind"], dimension, manifest.get("trained_id", ""))
        chosen, num_vectors = self.build.settings.index, self._expected()
        kind = faiss_index.choose_kind(chosen.kind, num_vectors, dimension, chosen.memory_bytes)
        contents = [self._content(number) for number in self.training]
        name = checksums.digest([self.build.build_id, kind, num_vectors, contents])
        needs_training = faiss_index.training_sample_size(kind, 1) > 0
        stored_bytes = num_vectors * faiss_index.footprint(kind, dimension).disk_bytes + 2 * self.build.plan.size_bytes
        filesystem.require_space(self.build.settings.workspace, int(stored_bytes), "the segments")
        return Structure(kind, dimension, name if needs_training else "", name)

    def _content(self, number: int) -> str:
        """What a finished unit was read from; equal for equal files, wherever they are."""
        return checksums.digest([*_part(self.build.plan.units[number]), self.facts[self.keys[number]]["sha256"]])

    def _expected(self) -> int:
        """The number of vectors of the whole build; exact if all units train."""
        if len(self.training) == len(self.keys):
            return self.num_passages
        num_rows = sum(self.facts[self.keys[number]]["rows"] for number in self.training)
        plan = self.build.plan
        read_bytes = sum(_size_bytes(plan, number) for number in self.training)
        return sampling.expected_rows(num_rows, read_bytes, plan.size_bytes)

    def _start_training(self, structure: Structure) -> Any:
        facts = [self.facts[self.keys[number]] for number in self.training]
        training = [(each["key"], each["sampled"]) for each in facts]
        settings = self.build.settings
        arguments = (
            *(settings.workspace, self.build.folder, structure.held_out, training, structure),
            *(self._expected(), settings.seed),
        )
        if self.build.in_process:
            structures.train(*arguments)
            return True
        memory = 8 * structure.dimension * sum(rows for _, rows in training)
        return stages.remote(structures.train, memory_bytes=memory).remote(*arguments)

    def _is_trained(self, *, wait: bool) -> bool:
        if self._trained is None or self.build.in_process:
            return True
        import ray

        done, _ = ray.wait([self._trained], timeout=None if wait else 0)
        with stages.root_cause_raised("train"):
            ray.get(done)
        return bool(done)

    def _feed(self, builder: segmenting.Builder) -> None:
        """Give the builder the finished units that follow those it has."""
        while self._next < len(self.keys) and self.keys[self._next] in self.facts:
            facts = self.facts[self.keys[self._next]]
            if facts["rows"]:
                builder.add(segmenting.unit_source(facts, self._content(self._next)))
            self._next += 1

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call a function as a Ray task, or in this process."""
        if self.build.in_process:
            return function(*arguments)
        import ray

        with stages.root_cause_raised("calibrate"):
            return ray.get(stages.remote(function).remote(*arguments))


def _part(unit: input_units.Unit) -> list[Any]:
    """Which part of the input a unit is, wherever the input is and whatever it contains."""
    *part, _ = unit.content()
    return part


def _size_bytes(plan: input_units.Plan, number: int) -> int:
    """The input bytes of a unit; for several document files, as if all were of the same size."""
    unit = plan.units[number]
    return unit.stop - unit.start or plan.size_bytes * len(unit.paths) // len(plan.files)
