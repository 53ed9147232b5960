"""Reads rows of Parquet files in batches of a few megabytes, and checks their schema first.

Columns whose types can contain code or raw bytes are not read.
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
    """Read rows `start` to `stop`: all columns of scalars or lists of them, and those in `nested`, which may contain objects.

    The file needs one of the `ids` columns, unless none is named, and one of the `texts` columns.

    Raises:
        ParseError: the file is broken, or `check_columns` refuses it.
        ChangedError: `blocks` is not empty, and something else was read.
    """
    with inputs.open_file(path) as raw, parquet_errors(), planned_file.opened(raw, path, blocks) as file:
        parquet = pq.ParquetFile(
            file,
            pre_buffer=False,
            buffer_size=_BATCH_BYTES,
            coerce_int96_timestamp_unit="us",
            page_checksum_verification=True,
        )
        columns, _ = check_columns(parquet.schema_arrow, ids, texts, nested)
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
        values = _in_microseconds(batch).to_pylist(maps_as_pydicts="strict")
        yield from [(f"{path}#{row}", value) for row, value in enumerate(values, first)]
    except (
        ValueError,
        KeyError,
        OverflowError,
    ) as error:  # not UTF-8, a repeated key of a map, a date of the year 99999
        if len(batch) == 1:
            yield reject(f"{path}#{first}", f"a value cannot be read: {error}", "row")
            return
        for offset in range(len(batch)):
            yield from _batch_rows(path, batch.slice(offset, 1), first + offset)


def _in_microseconds(batch: Any) -> Any:
    """The batch with times of nanoseconds, which Python has not, cut to microseconds."""
    casts = {pa.time64("ns"): pa.time64("us")}
    for number, field in enumerate(batch.schema):
        kind = field.type
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            casts[kind] = pa.timestamp("us", kind.tz)
        if kind in casts:
            cut = batch.column(number).cast(casts[kind], safe=False)
            batch = batch.set_column(number, field.with_type(casts[kind]), cut)
    return batch


def blocks_of_group(group: Any, columns: Collection[str], num_blocks: int) -> set[int]:
    """Numbers of the blocks of a file (see `planned_file`) from which the columns of a row group are read."""
    found: set[int] = set()
    for number in range(group.num_columns):
        column = group.column(number)
        path = column.path_in_schema
        if not any(f"{path}.".startswith(f"{name}.") for name in columns):
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


def check_columns(schema: Any, ids: Columns, texts: Columns, nested: Columns = ()) -> tuple[list[str], list[str]]:
    """The paths of the columns to read, given a file's Arrow schema and the arguments of `parquet_rows`; and what is left unread.

    Returns:
        Paths, `COLUMN.FIELD` for a part of an object; and a description of each column that is not read, or of its part.

    Raises:
        ParseError: a required column is missing, not text or an id, or a name is used twice.
    """
    found = ", ".join(schema.names)
    if len(set(schema.names)) < len(schema.names):
        raise ParseError(f"two columns have one name; found {found}")
    for names in (ids, texts):
        if names and not set(names) & set(schema.names):
            raise ParseError(f"no column {' or '.join(map(repr, names))}; found {found}")
    read: list[str] = []
    unread: list[str] = []
    for field in schema:
        if field.name in texts and not _is_text(field):
            raise ParseError(f"column {field.name!r} must be text, found {field.type}")
        paths, others = _paths(field, field.name, is_nested=field.name in nested)
        read += paths
        unread += others
    if ids and not set(ids) & set(read):
        name = next(name for name in ids if name in schema.names)
        raise ParseError(f"column {name!r} must be text or integers, found {schema.field(name).type}")
    return read, unread


def _paths(field: Any, path: str, *, is_nested: bool) -> tuple[list[str], list[str]]:
    """The paths to read of a column or a part of it, and descriptions of what cannot be read."""
    if _is_readable(field, is_nested=is_nested):
        return [path], []
    if not is_nested or not pa.types.is_struct(field.type) or _is_extension(field):
        return [], [f"{path} ({field.type})"]
    read: list[str] = []
    unread: list[str] = []
    for child in _children(field.type):
        paths, others = _paths(child, f"{path}.{child.name}", is_nested=True)
        read += paths
        unread += others
    return read, unread


def _children(kind: Any) -> list[Any]:
    return [kind.field(number) for number in range(kind.num_fields)]


def _is_extension(field: Any) -> bool:
    return isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {})


def _is_text(field: Any) -> bool:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return not _is_extension(field) and any(test(kind) for test in tests)


def _is_readable(field: Any, *, is_nested: bool) -> bool:
    """Whether a column contains scalars or lists of scalars or, if `is_nested`, any lists and objects of such values."""
    kind = field.type
    if _is_extension(field):
        return False
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_readable(kind.value_field, is_nested=True) and (is_nested or not pa.types.is_nested(kind.value_type))
    if pa.types.is_map(kind):
        return is_nested and _is_text(kind.key_field) and _is_readable(kind.item_field, is_nested=True)
    if pa.types.is_struct(kind):
        return is_nested and all(_is_readable(child, is_nested=True) for child in _children(kind))
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal, pa.types.is_decimal)
    return _is_text(field) or (any(test(kind) for test in tests) and not _is_duration(kind))


def _is_duration(kind: Any) -> bool:
    return bool(pa.types.is_duration(kind) or pa.types.is_interval(kind))
