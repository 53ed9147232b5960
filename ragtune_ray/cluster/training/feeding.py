"""Streams the examples of each step from Ray Data to the training workers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray import config, schema
from ragtune_ray.cluster.training import prepare
from ragtune_ray.storage import artifacts
from ragtune_ray.training import batching
from ragtune_ray.training.examples import example_type

if TYPE_CHECKING:
    import ray.data

STEPS_PER_BLOCK = 16


def in_order() -> Any:
    """Ray Data's options that preserve the order of rows."""
    import ray.data

    options = ray.data.ExecutionOptions()
    options.preserve_order = True
    return options


def plan(settings: config.Config, examples: str) -> list[np.ndarray]:
    """The row numbers of each step. `sft` keeps examples with the same passages together and computes their prefix once."""
    passage_ids = _table(examples, prepare.TRAIN)["passage_ids"]
    is_grouped = settings.training.objective == "sft"
    groups = batching.passage_groups(passage_ids) if is_grouped else np.arange(len(passage_ids))
    return list(batching.steps(groups, settings.training, settings.seed))


def steps_dataset(settings: config.Config, examples: str) -> ray.data.Dataset:
    """A dataset with one row per step, in order: its number and its examples."""
    import ray.data

    planned = [{"step": step, "rows": rows.tolist()} for step, rows in enumerate(plan(settings, examples))]
    dataset = ray.data.from_items(planned, override_num_blocks=-(-len(planned) // STEPS_PER_BLOCK))
    # num_cpus=0: the training workers may occupy all CPUs, and reading takes little time.
    return dataset.map_batches(
        functools.partial(_load_step, examples),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=1),
    )


def _load_step(examples: str, batch: pa.Table) -> pa.Table:
    """Replace the row numbers of a step by its examples as a list of structs."""
    rows = _table(examples, prepare.TRAIN).take(batch["rows"].combine_chunks().flatten()).combine_chunks()
    packed = pa.ListArray.from_arrays(pa.array([0, rows.num_rows], pa.int32()), rows.to_struct_array().combine_chunks())
    return pa.table({"step": batch["step"], "examples": packed})


@functools.lru_cache(maxsize=4)
def _table(examples: str, name: str) -> pa.Table:
    path = artifacts.open_artifact(examples, "examples").path / name
    return pq.read_table(path, memory_map=True, page_checksum_verification=True)


def steps_from(first: int, record: type) -> Iterator[tuple[int, list[Any]]]:
    """On a training worker: the number and the examples of each step, starting with step `first`."""
    import ray.train

    expected = first
    stream = ray.train.get_dataset_shard("train")
    for batch in stream.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        step = batch["step"][0].as_py()
        if step < first:
            continue
        assert step == expected, f"got step {step} instead of {expected}"
        expected += 1
        rows = batch["examples"].combine_chunks().flatten()
        yield step, list(schema.from_table(pa.Table.from_struct_array(rows), record))


def read_validation(settings: config.Config, examples: str) -> list[Any]:
    """The validation examples."""
    record = example_type(settings.training)
    return list(schema.from_table(_table(examples, prepare.VALIDATION), record))


def read_pool(settings: config.Config, examples: str) -> dict[str, np.ndarray]:
    """passage_id -> stored vector if the objective keeps the index, otherwise empty."""
    if not settings.training.keeps_index:
        return {}
    table = _table(examples, prepare.POOL)
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return dict(zip(table["passage_id"].to_pylist(), vectors, strict=True))
