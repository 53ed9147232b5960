"""Reads rows of Parquet files in batches of a few megabytes, and checks their schema first.

A column whose type can contain code or raw bytes is refused before anything is read.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray.ingest import inputs, planned_file
from ragtune_ray.ingest.inputs import Row
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import reject

Columns = tuple[str, ...]
"""Names of columns."""
_BATCH_BYTES = 4 * 2**20
# Arrow reads this much from the end of a file, and of columns by old writers more than their length.
_FIRST_READ_BYTES, _COLUMN_PADDING_BYTES = 64 * 2**10, 128


@contextmanager
def parquet_errors() -> Iterator[None]:
    """Turn pyarrow's errors about a broken file into a `ParseError`; errors of the disk or network are not caught."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # UnicodeDecodeError: a column's name
        if isinstance(error, OSError) and error.errno is not None:  # the disk or the network failed
            raise
        raise ParseError(f"Parquet is broken: {error}") from None


def parquet_rows(
    path: str,
    ids: Columns,
    texts: Columns,
    nested: Columns,
    start: int = 0,
    stop: int = sys.maxsize,
    blocks: planned_file.Blocks = (),
) -> Iterator[Row]:
    """Read rows `start` to `stop`: all columns of scalars, and those in `nested`, which may contain lists and objects.

    The file needs one of the `ids` columns and one of the `texts` columns.

    Raises:
        ParseError: the file is broken, or `check_columns` refuses it.
        ChangedError: `blocks` is not empty, and something else was read.
    """
    with inputs.open_file(path) as raw, parquet_errors(), planned_file.opened(raw, path, blocks) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BATCH_BYTES)
        columns = check_columns(parquet.schema_arrow, ids, texts, nested)
        first = 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            row, first = first, first + group.num_rows
            if row >= stop or first <= start:
                continue
            batch_rows = max(1, min(1024, _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
            for batch in parquet.iter_batches(batch_rows, [number], columns):
                low, high = max(start - row, 0), min(stop - row, len(batch))
                if low < high:
                    yield from _batch_rows(path, batch.slice(low, high - low), row + low)
                row += len(batch)
                if row >= stop:
                    break


def _batch_rows(path: str, batch: Any, first: int) -> Iterator[Row]:
    try:
        yield from [(f"{path}#{row}", value) for row, value in enumerate(batch.to_pylist(), first)]
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            yield reject(f"{path}#{first}", f"not UTF-8: {error}", "row")
            return
        for offset in range(len(batch)):
            yield from _batch_rows(path, batch.slice(offset, 1), first + offset)


def blocks_of_group(group: Any, columns: Collection[str], num_blocks: int) -> set[int]:
    """Numbers of the blocks of a file (see `planned_file`) from which the columns of a row group are read."""
    found: set[int] = set()
    for number in range(group.num_columns):
        column = group.column(number)
        path = column.path_in_schema
        if not any(path == name or path.startswith(f"{name}.") for name in columns):
            continue
        starts = [column.data_page_offset]
        if column.has_dictionary_page and column.dictionary_page_offset:
            starts.append(column.dictionary_page_offset)
        stop = min(starts) + column.total_compressed_size + _COLUMN_PADDING_BYTES
        found.update(planned_file.blocks_of(min(starts), stop, num_blocks))
    return found


def blocks_of_footer(metadata: Any, size_bytes: int) -> set[int]:
    """Numbers of the blocks of a file of `size_bytes` from which its footer is read."""
    tail_bytes = max(metadata.serialized_size + 8, _FIRST_READ_BYTES)
    num_blocks = -(-size_bytes // planned_file.BLOCK_BYTES)
    return set(planned_file.blocks_of(size_bytes - tail_bytes, size_bytes, num_blocks))


def check_columns(schema: Any, ids: Columns, texts: Columns, nested: Columns = ()) -> list[str]:
    """The names of the columns to read, given a file's Arrow schema and the arguments of `parquet_rows`.

    Raises:
        ParseError: a required column is missing or not text, a name is used twice, or a type can contain code or bytes.
    """
    for field in schema:
        if _is_opaque(field):
            raise ParseError(f"column {field.name!r} is of type {field.type}, binary or extension; drop or cast it")
    found = ", ".join(schema.names)
    if len(set(schema.names)) < len(schema.names):
        raise ParseError(f"two columns have one name; found {found}")
    for names in (ids, texts):
        if not set(names) & set(schema.names):
            raise ParseError(f"no column {' or '.join(map(repr, names))}; found {found}")
    for field in schema:
        if field.name in texts and not _is_text(field.type):
            raise ParseError(f"column {field.name!r} must be text, found {field.type}")
    return [field.name for field in schema if _is_readable(field.type, is_nested=field.name in nested)]


def _is_opaque(field: Any) -> bool:
    kind = field.type
    is_extension = isinstance(kind, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {})
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    children = (kind.field(number) for number in range(kind.num_fields))
    return is_extension or any(test(kind) for test in tests) or any(map(_is_opaque, children))


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_readable(kind: Any, *, is_nested: bool) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_struct(kind):
        children = [kind.field(number).type for number in range(kind.num_fields)]
        return is_nested and all(_is_readable(child, is_nested=True) for child in children)
    tests = (_is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(test(kind) for test in tests)
