"""Reads rows of Parquet files in batches of a few megabytes, and checks their schema first.

Columns whose types can contain code or raw bytes are not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ragtune_ray.ingest import inputs
from ragtune_ray.ingest.inputs import Row
from ragtune_ray.ingest.parsing.text import ParseError
from ragtune_ray.ingest.rows import reject

Columns = tuple[str, ...]
"""Names of columns."""
_BATCH_BYTES = 4 * 2**20
_SHOWN_COLUMNS = 10
ALL_ROWS = range(sys.maxsize)
"""Every row of a part of a file."""


@dataclasses.dataclass(slots=True)
class RowsRead:
    """What `parquet_rows` has read so far."""

    unread: tuple[str, ...] = ()
    """Columns that cannot become text or metadata, with their types."""
    num_rows: int | None = None
    """Of the whole file; None until its footer and columns are found to be sound."""
    blocks: dict[int, bytes] = dataclasses.field(default_factory=dict)
    """Place in the file -> the sha256 of what was read from there."""

    @property
    def sha256(self) -> str:
        """A digest of all that was read, in whatever order."""
        places = [f"{place} {digest.hex()}" for place, digest in sorted(self.blocks.items())]
        return hashlib.sha256("\n".join(places).encode()).hexdigest()


@contextlib.contextmanager
def parquet_errors() -> Iterator[None]:
    """Turn pyarrow's errors about a broken file into a `ParseError`; errors of the disk or network are not caught."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # UnicodeDecodeError: a column's name
        if isinstance(error, OSError) and error.errno is not None:  # the disk or the network failed
            raise
        raise ParseError(f"Parquet is broken: {error}") from None


class _Recorded(io.RawIOBase):
    """A file that records what is read from it."""

    def __init__(self, raw: Any, blocks: dict[int, bytes]) -> None:
        super().__init__()
        self._raw, self._blocks = raw, blocks

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._raw.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def read(self, size: int = -1) -> bytes:
        place = self._raw.tell()
        data: bytes = self._raw.read(size)
        self._blocks[place] = hashlib.sha256(data).digest()
        return data


def parquet_rows(
    path: str,
    ids: Columns,
    texts: Columns,
    nested: Columns,
    start: int = 0,
    stop: int = sys.maxsize,
    found: RowsRead | None = None,
    rows: range = ALL_ROWS,
) -> Iterator[Row]:
    """Read the rows of the row groups that begin in bytes `start` to `stop`, numbered from 0 over the file.

    All columns of scalars or lists of them are read, and those in `nested`, which may contain objects. The file needs one of
    the `ids` columns, unless none is named, and one of the `texts` columns. `rows` are those to return, counted from the first
    of these row groups.

    Raises:
        ParseError: the file is broken, or `check_columns` refuses it.
    """
    found = found or RowsRead()
    with inputs.open_file(path) as raw, parquet_errors():
        size_bytes = raw.seek(0, os.SEEK_END)
        parquet = pq.ParquetFile(
            _Recorded(raw, found.blocks),
            pre_buffer=False,
            buffer_size=_BATCH_BYTES,
            coerce_int96_timestamp_unit="us",
            page_checksum_verification=True,
        )
        columns, unread = check_columns(parquet.schema_arrow, ids, texts, nested)
        found.unread, found.num_rows = tuple(unread), parquet.metadata.num_rows
        row = passed = 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            is_own = start <= _first_byte(group, size_bytes) < stop
            if not is_own or passed + group.num_rows <= rows.start:
                row += group.num_rows
                passed += group.num_rows if is_own else 0
                continue
            if passed >= rows.stop:
                return
            batch_rows = max(1, min(1024, _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
            for batch in parquet.iter_batches(batch_rows, [number], columns, use_threads=False):
                low, high = max(rows.start - passed, 0), min(rows.stop - passed, len(batch))
                if low < high:
                    yield from _batch_rows(path, batch.slice(low, high - low), row + low)
                row += len(batch)
                passed += len(batch)
                if passed >= rows.stop:
                    return


def count_rows(path: str, start: int = 0, stop: int = sys.maxsize) -> int:
    """The rows of the row groups that begin in bytes `start` to `stop`; 0 for a broken file."""
    with inputs.open_file(path) as raw, contextlib.suppress(ParseError), parquet_errors():
        size_bytes = raw.seek(0, os.SEEK_END)
        footer = pq.read_metadata(raw)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        return sum(group.num_rows for group in groups if start <= _first_byte(group, size_bytes) < stop)
    return 0


def _first_byte(group: Any, size_bytes: int) -> int:
    """Where a row group begins; inside the file, whatever a broken footer says, so that one part of the file has it."""
    column = group.column(0)
    starts = [column.data_page_offset, column.dictionary_page_offset or column.data_page_offset]
    return int(min(max(min(starts), 0), size_bytes - 1))


def unread_line(unreads: Iterable[Sequence[str]]) -> str:
    """One line about the columns that are left unread, given those of each Parquet file; "" if there are none.

    >>> unread_line([("image (binary)",), ()])
    'left unread in 1 Parquet file: image (binary)'
    """
    files = [columns for columns in unreads if columns]
    names = list(dict.fromkeys(itertools.chain.from_iterable(files)))
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    many = "" if len(files) == 1 else "s"
    return (
        f"left unread in {len(files):,} Parquet file{many}: {', '.join(names[:_SHOWN_COLUMNS])}{more}" if files else ""
    )


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
