"""Files of a data set: JSON lines or one JSON array, plain or packed by gzip, read by the record.

    lines = Lines("data/train/vqa.jsonl", check_conversation)
    record = lines[3]                # a dict in our form; only this record is read
    print(lines.where(3))            # data/train/vqa.jsonl:4
    write_lines("kept.jsonl", (record for record in lines if wanted(record)))
    data_files(Path("data/train"))   # {"vqa": Path("data/train/vqa.jsonl"), ...}
"""

import gzip
import io
import itertools
import json
import logging
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.forms import to_ours

log = logging.getLogger("jsonl")

SUFFIX = re.compile(r"\.jsonl?(\.gz)?$", re.IGNORECASE)
UNREAD = re.compile(r"\.(parquet|arrow|jsonl?\.\w+)$", re.IGNORECASE)  # data all the same
BLANK = re.compile(r"[ \t\r\n]*")  # JSON's own

GZIP = b"\x1f\x8b"
PARQUET = (
    "parquet is not read: write it as JSON lines, pictures as files (with pandas: "
    "read_parquet(..).to_json(.., orient='records', lines=True))"
)
UTF_16 = "UTF-16, not utf-8: save it as UTF-8"
FOREIGN = {  # how files begin that hold no JSON in UTF-8
    b"PAR1": PARQUET,
    b"version https://git-lfs": "a pointer of Git LFS, not the data: run git lfs pull",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
}


def data_name(path: Path) -> str:
    """A data file's name without its suffixes: "vqa" of vqa.jsonl.gz."""
    return SUFFIX.sub("", path.name)


def data_files(folder: Path) -> dict[str, Path]:
    """{name without suffixes: file} of a folder's data sets, sorted; {} where there is no folder.

    ValueError for two files of one name, a form that is not read (parquet), a link to nothing.
    """
    files = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = data_name(path)
        if path.is_dir() or (name == path.name and not UNREAD.search(name)):
            continue
        if name == path.name:
            why = PARQUET if path.suffix.lower() == ".parquet" else "not read"
            raise ValueError(f"{path}: {why}; .jsonl, .json, .jsonl.gz and .json.gz are")
        if name in files:
            raise ValueError(f"{path} and {files[name].name} have one name: keep one of them")
        if not path.exists():
            raise ValueError(f"{path}: a link to nothing")
        files[name] = path
    return files


# Bytes -> records


def _ours(data: bytes) -> dict:
    try:
        return to_ours(_parse(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse(data: bytes) -> dict:
    try:
        # Some editors put a byte order mark before the first line; "utf-8-sig" takes it off.
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ValueError(f"no utf-8 text at byte {e.start + 1}: save the file as UTF-8") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{e.msg} at column {e.colno}: a line must be one JSON object") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, not {type(record).__name__}")
    return record


def _lines(file) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of all lines that are not blank."""
    offset = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, offset, line
        offset += len(line)


def _elements(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of all elements of a JSON array. JSONDecodeError where it breaks."""
    text = data.decode("utf-8-sig")
    scan = json.JSONDecoder().raw_decode
    offset = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    done = 0  # characters before offset
    at = BLANK.match(text, text.index("[") + 1).end()
    for number in itertools.count(1):
        if number == 1 and text[at : at + 1] == "]":
            break
        _, end = scan(text, at)
        offset += len(text[done:at].encode())
        element = text[at:end].encode()
        yield number, offset, element
        offset += len(element)
        done = end
        at = BLANK.match(text, end).end()
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at = BLANK.match(text, at + 1).end()
    rest = BLANK.match(text, at + 1).end()
    if rest < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


class Lines(Sequence):
    """The records of a file, as a sequence of dicts in our form (see to_ours) that stays on disk.

    A file is an array where it begins with "[", else each line is an object; what its name says
    does not matter. It is read once, here: every record is parsed, brought into our form and given
    to `check`, which raises ValueError for one that cannot be used. Of good ones only the place in
    the file is kept, 24 bytes each, so a file may be larger than the memory; one that gzip has
    packed is unpacked into memory. A line ends at b"\\n" alone, as JSON strings may hold other line
    separators (U+2028).

    path: the file; root: its folder, links resolved; bad: [("path:12", reason), ...].
    ValueError naming file and line when more than the share `max_bad_share` of the records is bad
    (None: never), when no record is good, or when the file cannot be read at all.
    """

    def __init__(
        self,
        path: str | Path,
        check: Callable[[dict], None] | None = None,
        max_bad_share: float | None = 0.0,
    ):
        self.path = Path(path)
        self.root = self.path.resolve().parent
        self.bad = []
        self._offsets, self._lengths, self._numbers = array("q"), array("q"), array("q")
        self._unpacked = self._unpack()
        with self._open() as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            for begin, why in FOREIGN.items():
                if start.startswith(begin):
                    raise ValueError(f"{self.path}:1: {why}")
            if b"\0" in start:
                raise ValueError(f"{self.path}:1: NUL bytes, as of {UTF_16}")
            self._is_array = start.startswith(b"[")
            for number, offset, data in self._array(file) if self._is_array else _lines(file):
                try:
                    record = _ours(data)
                    if check:
                        check(record)
                    self._offsets.append(offset)
                    self._lengths.append(len(data))
                    self._numbers.append(number)
                except ValueError as e:
                    self.bad.append((self._place(number), str(e)))
        if max_bad_share is not None:
            self._refuse(max_bad_share)

    def _unpack(self):
        """What gzip has packed; None where the file is plain."""
        with open(self.path, "rb") as file:
            if file.read(2) != GZIP:
                return None
        try:
            return gzip.decompress(self.path.read_bytes())
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{self.path}: gzip cannot unpack it: {e}") from None

    def _open(self):
        # Opened for every record: that costs 10 us, and processes share no position in the file.
        return open(self.path, "rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def _array(self, file):
        data = file.read()
        try:
            yield from _elements(data)
        except UnicodeDecodeError as e:
            line = data.count(b"\n", 0, e.start) + 1
            raise ValueError(f"{self.path}:{line}: no utf-8 text: save it as UTF-8") from None
        except json.JSONDecodeError as e:
            raise ValueError(f"{self.path}:{e.lineno}: {e.msg}: the array breaks here") from None
        except RecursionError:
            raise ValueError(f"{self.path}: nested too deeply") from None

    def _refuse(self, max_bad_share):
        good, bad = len(self), len(self.bad)
        if good == 0 or bad > max_bad_share * (good + bad):
            where, why = self.bad[0] if self.bad else (self.path, "no lines")
            raise ValueError(f"{where}: {why} ({bad} bad and {good} good lines in this file)")
        for where, why in self.bad[:3]:
            log.warning("skipped line %s: %s", where, why)
        if bad:
            log.warning("%s: %d bad lines skipped, %d good", self.path, bad, good)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> dict:
        try:
            return _ours(self._data(i))
        except ValueError as e:
            raise ValueError(f"{self.where(i)}: changed since it was first read: {e}") from e

    def as_written(self, i: int) -> dict:
        """Record i in the form that it has in the file."""
        return _parse(self._data(i))

    def _data(self, i):
        with self._open() as file:
            file.seek(self._offsets[i])
            return file.read(self._lengths[i])

    def _place(self, number):
        return f"{self.path}: record {number}" if self._is_array else f"{self.path}:{number}"

    def where(self, i: int) -> str:
        """The place of record i for messages: "path:12", of an array "path: record 12", from 1."""
        return self._place(self._numbers[i])


def write_lines(path: str | Path, records: Iterable[dict]):
    """Write dicts as JSONL, whole or not at all."""
    with replacing(Path(path)) as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write a file at, which then takes the place of `path`, whole or not at all.

    It lies in the same folder, made if need be, under a name of this process: several may write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.unlink(missing_ok=True)
    yield part
    os.replace(part, path)
    # Renaming a link over another link to the same file leaves both.
    part.unlink(missing_ok=True)
