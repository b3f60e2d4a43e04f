"""Parquet shards, the form of data on the Hub: rows that pyarrow reads where they stand.

    messages, conversations, image, images, ..     columns: the keys that a line of JSON would have

Bytes, bare or as {"bytes", "path"}, which is how the library `datasets` stores pictures and clips,
stay in the file. The record has their place instead, "shard.parquet@GROUP+ROW/K-name": the K-th
bytes of a row, whatever the name, see open_media. So a record is small, and names lead nowhere.

Rows are decoded a few at a time, in order within their row group: one that is asked for costs what
stands before it there, and memory holds no more than those few and the pages that they stand in.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

log = logging.getLogger("parquet")

ROWS = 16  # ours: rows that are decoded at once; with pictures some MB
BUFFER = 2**20  # ours: bytes of a column that are read at once
LARGE = 2**25  # ours: bytes of a row group. A sample of a larger one takes 0.1 s; that is said
SMALLER = "pyarrow.parquet.write_table(read_table(OLD), NEW, row_group_size=16)"


@dataclass
class Window:
    """The rows of a group that were decoded last. What follows them comes cheaply."""

    key: tuple = ()  # file and group
    batches: Iterator | None = None  # the rows behind them
    rows: object = None  # (ROWS, columns)
    begin: int = 0  # of rows, in the group


window = Window()  # of this process: a record and then its pictures are asked for


def opened(file):
    """pyarrow's ParquetFile of a Part (see common/media.py).

    ValueError where pyarrow is missing, or this is no parquet.
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        pa.json_  # without it, texts of datasets' Json columns would keep their quotes
    except (ImportError, AttributeError):
        raise ValueError("parquet is read by pyarrow 19 or newer: pip install pyarrow") from None
    try:
        return ParquetFile(file, pre_buffer=False, buffer_size=BUFFER)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"no parquet that can be read: {one_line(e)}") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def row_places(file, name: str) -> Iterator[tuple[int, int, int]]:
    """(row group, row in it, number from 1) of each row. ValueError as above.

    name: the file's, for messages.
    """
    meta = opened(file).metadata
    groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > LARGE:
        log.warning(
            "%s: row groups of up to %d MB: a sample costs half of one; smaller ones: %s",
            name, largest >> 20, SMALLER,
        )
    number = 0
    for g, group in enumerate(groups):
        for row in range(group.num_rows):
            number += 1
            yield g, row, number


def row_of(file, group: int, row: int):
    """A row as pyarrow's StructScalar. ValueError where it is not there or broken."""
    global window
    info = os.fstat(file.fd)
    key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, group)
    if window.key != key or row < window.begin:
        parquet = opened(file)
        if group >= parquet.num_row_groups:
            raise ValueError(f"it has no row group {group}")
        batches = parquet.iter_batches(ROWS, [group], use_threads=False)
        window = Window(key, batches)
    try:
        while window.rows is None or row >= window.begin + len(window.rows):
            window.begin += len(window.rows or ())
            window.rows = next(window.batches).to_struct_array()
        return window.rows[row - window.begin]
    except Exception as e:  # pyarrow's, OSError, StopIteration: what follows would be wrong
        window = Window()
        raise ValueError(f"row {row} of group {group}: {one_line(e) or 'not there'}") from None


def read_row(file, name: str, group: int, row: int) -> dict:
    """A row as a record, its bytes as places in `name`. ValueError where it is not readable."""
    found = []

    def placed(data, source):
        base = (source or "").rpartition("/")[2]
        found.append(data)
        return f"{name}@{group}+{row}/{len(found) - 1}" + (f"-{base}" if base else "")

    return plain(row_of(file, group, row), placed)


def bytes_of(file, group: int, row: int, k: int) -> bytes:
    """The k-th bytes of a row. ValueError or IndexError where they are not there."""
    found = []
    plain(row_of(file, group, row), lambda data, source: found.append(data))
    return found[k]


def plain(value, placed):
    """pyarrow's scalar -> what JSON would hold; placed(bytes, path or None) takes the bytes' place.

    Of a column of JSON texts (datasets writes contents so that are texts here, lists there) what
    they say. What JSON has no type for, as times, becomes its text.
    """
    import pyarrow as pa

    if not value.is_valid:
        return None
    if isinstance(value, pa.ExtensionScalar):
        stored = plain(value.value, placed)
        return json.loads(stored) if value.type.extension_name == "arrow.json" else stored
    if isinstance(value, (pa.ListScalar, pa.ListViewScalar, pa.LargeListViewScalar)):
        return [plain(item, placed) for item in value.values]
    if isinstance(value, pa.StructScalar):
        fields = dict(value.items())
        if fields.keys() == {"bytes", "path"}:
            data, path = fields["bytes"].as_py(), fields["path"].as_py()
            return path if data is None else placed(data, path)
        return {key: plain(field, placed) for key, field in fields.items()}
    value = value.as_py()
    if isinstance(value, bytes):
        return placed(value, None)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
