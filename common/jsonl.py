"""Files of a data set: JSON lines or a JSON array, plain or packed by gzip; tars; parquet.

    lines = Lines("data/train/vqa.jsonl", check_conversation)
    record = lines[3]                # a dict in our form; only this record is read
    print(lines.where(3))            # data/train/vqa.jsonl:4
    lines = Lines("data/train/web")  # a folder of shards: one set, end to end
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
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from common.forms import FORMS, to_ours
from common.index import is_large, made_once, naming, table, unreadable, write_places
from common.media import Part
from common.parquet import read_row, row_places
from common.tars import read_sample, spans, with_places

log = logging.getLogger("jsonl")

SUFFIX = re.compile(r"\.(jsonl?(\.gz)?|parquet)$", re.IGNORECASE)
LINES = re.compile(r"\.(jsonl(\.gz)?|parquet)$", re.IGNORECASE)
UNREAD = re.compile(r"\.(arrow|jsonl?\.(?!gz$)\w+)$", re.IGNORECASE)  # data all the same
SHARD = re.compile(r"\.(jsonl(\.\w+)?|parquet|arrow)$", re.IGNORECASE)  # makes a folder a set
TAR = re.compile(r"\.(tar(\.\w+)?|tgz)$", re.IGNORECASE)  # so do many of these
BLANK = re.compile(r"[ \t\r\n]*")  # JSON's own

GZIP = b"\x1f\x8b"
SETTINGS = 2**26  # ours: bytes; no settings are longer
PACKED = "packed: samples are read from their places in a .tar, so unpack it (gunzip, unzstd)"
UTF_16 = "UTF-16, not utf-8: save it as UTF-8"
FOREIGN = {  # how files begin that hold no JSON in UTF-8
    b"PAR1": "parquet: its name must end with .parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the data: run git lfs pull",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it",
}


# Folders


def data_name(path: Path) -> str:
    """A set's name, without suffixes: "vqa" of vqa.jsonl.gz."""
    return SUFFIX.sub("", path.name)


def data_files(folder: Path) -> dict[str, Path]:
    """{name: file, or folder of shards} of a folder's data sets, sorted; {} where there is none.

    A folder NAME with .jsonl files, parquet or tar shards in it is one set NAME. A .json file that
    holds no records (a config.json) is passed over, and that is said. ValueError for two sets of
    one name, a form that is not read (arrow), a link to nothing.
    """
    files = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir():
            is_set = _is_sharded(path, path.stat().st_mtime_ns) and bool(shards_of(path))
        else:
            is_set = _is_data(path)
        if not is_set:
            if TAR.search(path.name) and not path.is_dir():
                log.warning("%s: passed over: tars are read in a folder of their own", path)
            continue
        name = data_name(path)
        if name in files:
            raise ValueError(f"{path} and {files[name].name} have one name: keep one of them")
        files[name] = path
    return files


def shards_of(path: Path) -> list[Path]:
    """The files of a set: the file itself, or those of a folder, sorted. ValueError: see above."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if not file.is_dir()]
    shards = [file for file in files if _is_data(file)]
    tars = [file for file in files if TAR.search(file.name)]
    if shards and tars:
        log.warning("%s: %d tars are passed over beside %s", path, len(tars), shards[0].name)
    for file in () if shards else tars:
        if not file.name.lower().endswith(".tar"):
            raise ValueError(f"{file}: {PACKED}")
    return shards or tars


@lru_cache
def _is_sharded(folder: Path, changed: int) -> bool:
    """Whether a folder holds shards. changed: when; a million pictures are looked at once."""
    names = os.listdir(folder)
    tars = sum(bool(TAR.search(name)) for name in names)
    # beside each shard may stand a note about it; beside a thousand pictures, a tar of them
    return any(SHARD.search(name) for name in names) or 2 * tars >= max(1, len(names))


def _is_data(path: Path) -> bool:
    """Whether a file holds records, by its name; .json may be anything, so by what is in it."""
    if UNREAD.search(path.name):
        raise ValueError(f"{path}: not read; .jsonl, .json, .jsonl.gz, .json.gz and .parquet are")
    if not SUFFIX.search(path.name):
        return False
    if not path.exists():
        raise ValueError(f"{path}: a link to nothing")
    return bool(LINES.search(path.name)) or _holds_records(path, path.stat().st_mtime_ns)


@lru_cache
def _holds_records(path: Path, changed: int) -> bool:
    """Whether a .json file is an array or begins with a record, and is no settings or scores.

    Whatever is broken is taken for data: who reads it says what is wrong.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == GZIP
        with (gzip.open if packed else open)(path, "rb") as file:
            begin = file.read(4096).decode("utf-8-sig", "ignore").lstrip()
            if not begin or begin.startswith("["):
                return True
            file.seek(0)
            text = file.readline() + file.read(SETTINGS)
        first, _ = json.JSONDecoder().raw_decode(text.decode("utf-8-sig").lstrip())
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return True
    holds = isinstance(first, dict) and any(key in first for key in FORMS)
    if not holds:
        log.warning("%s: passed over: neither an array nor records with %s", path, FORMS[0])
    return holds


# Bytes -> records


def _ours(read: Callable[[], dict]) -> dict:
    try:
        return to_ours(read())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except OSError as e:
        raise unreadable(e) from None


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


def _lines(file, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of all lines that are not blank. ValueError: the disk gives none."""
    number = offset = 0
    try:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)
    except OSError as e:
        raise unreadable(e, f"{path}:{number + 1}") from None


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


class File:
    """One file of records: how its bytes are read, and where its records stand.

    A .tar holds samples, see common/tars.py, and a .parquet rows, see common/parquet.py. Any other
    is an array where it begins with "[", else each line is an object; what its name says does not
    matter. What gzip has packed is unpacked into memory, if large into the cache. A line ends at
    b"\\n" alone, as JSON strings may hold other line separators (U+2028).

    name: of a shard below the root of its media, where path is a link to it.
    places: (n, 3) int64, offset, length (of a row its group, its place there) and number from 1 of
    each record. Of a large file those of all records, found once and kept; else whoever has read it
    sets them.
    """

    def __init__(self, path: Path, large: bool = False, name: str = ""):
        self.path = path
        self.name = name or path.name
        self._plain, self._unpacked = path, None
        self._is_tar = path.suffix.lower() == ".tar"
        self._is_parquet = path.suffix.lower() == ".parquet"
        self._is_shard = self._is_tar or self._is_parquet
        with naming(path):
            with open(path, "rb") as file:
                packed = file.read(2) == GZIP and not self._is_shard
            if packed and large:
                self._plain = made_once(path, "unpacked", self._unpack)
            elif packed:
                self._unpacked = self._unpack()
            self._is_array = not self._is_tar and self._begins_array()
        self._kept = made_once(path, "places", self._write_places) if large else None
        self._places = np.zeros((0, 3), np.int64)

    @property
    def places(self) -> np.ndarray:
        return self._places if self._kept is None else table(self._kept)

    @places.setter
    def places(self, rows):
        self._places = np.array(rows, np.int64).reshape(-1, 3)

    def _unpack(self, target: Path | None = None) -> bytes | None:
        """What gzip has packed, or into target. ValueError where it cannot."""
        try:
            if target is None:
                return gzip.decompress(self.path.read_bytes())
            with gzip.open(self.path) as packed, open(target, "wb") as out:
                shutil.copyfileobj(packed, out)
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise ValueError(f"{self.path}: gzip cannot unpack it: {e}") from None

    def open(self):
        # Opened for every record: that costs 10 us, and processes share no position in the file.
        return open(self._plain, "rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def _begins_array(self) -> bool:
        with self.open() as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        for begin, why in FOREIGN.items():
            if start.startswith(begin) and not (self._is_parquet and begin == b"PAR1"):
                raise ValueError(f"{self.path}:1: {why}")
        if b"\0" in start and not self._is_parquet:
            raise ValueError(f"{self.path}:1: NUL bytes, as of {UTF_16}")
        return start.startswith(b"[")

    def records(self) -> Iterator[tuple[tuple, Callable[[], dict]]]:
        """(place, what reads it) of all records. ValueError where a file, array or tar breaks."""
        if self._is_shard:
            for place in spans(self.path) if self._is_tar else self._rows():
                yield place, partial(self._sample, *place)
            return
        with self.open() as file:
            found = self._array(file) if self._is_array else _lines(file, self.path)
            for number, offset, data in found:
                yield (offset, len(data), number), partial(_parse, data)

    def _rows(self):
        try:
            yield from row_places(self._part(), str(self.path))
        except ValueError as e:
            raise ValueError(f"{self.path}: {e}") from None

    def _part(self):
        return Part(os.open(self.path, os.O_RDONLY))

    def _array(self, file):
        with naming(self.path):
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

    def _write_places(self, target: Path):
        if not self._is_array and not self._is_shard:
            write_places(self._plain, target)
            return
        rows = array("q")
        for place, _ in self.records():
            rows.extend(place)
        target.write_bytes(rows.tobytes())

    def read(self, i: int) -> dict:
        """Record i, as it is written. ValueError where it is not readable."""
        offset, length, number = self.places[i].tolist()
        if self._is_shard:
            return self._sample(offset, length, number)
        with self.open() as file:
            file.seek(offset)
            return _parse(file.read(length))

    def _sample(self, *place) -> dict:
        if self._is_parquet:
            return read_row(self._part(), self.name, *place[:2])
        data, media = read_sample(self.path, self.name, *place)
        return with_places(_parse(data), media)

    def place(self, number: int) -> str:
        if self._is_tar:
            return f"{self.path}: sample {abs(number)}"
        if self._is_parquet:
            return f"{self.path}: row {number}"
        return f"{self.path}: record {number}" if self._is_array else f"{self.path}:{number}"

    def where(self, i: int) -> str:
        return self.place(int(self.places[i, 2]))


class Lines(Sequence):
    """The records of a set, as a sequence of dicts in our form (see to_ours) that stays on disk.

    A set is a file, or a folder of them. It is read once, here: every record is parsed, brought
    into our form and given to `check`, which raises ValueError for one that cannot be used. Of good
    ones only the place in the file is kept, 24 bytes each.

    lazy: records of a large set (see is_large) are parsed and checked when they are asked for, all
    of them count, and lines[i] raises ValueError for a bad one. Nothing is read at the start then
    but, once for all runs, where its lines stand.

    held: the records stay in memory, for somebody who asks for all of them: none is parsed again
    then. Not of a set that is lazy.

    path: the file or folder; root: the folder of its media, links resolved; bad: [("path:12",
    reason), ...]. ValueError naming file and line when more than the share `max_bad_share` of the
    records is bad (None: never), when no record is good, or when a file cannot be read at all.
    """

    def __init__(
        self,
        path: str | Path,
        check: Callable[[dict], None] | None = None,
        max_bad_share: float | None = 0.0,
        lazy: bool = False,
        held: bool = False,
    ):
        self.path = Path(path)
        real = self.path.resolve()
        self.root = real if real.is_dir() else real.parent
        self.bad = []
        self._held = [] if held else None
        shards = shards_of(self.path)
        self.large = lazy and is_large(shards)
        self._check = check if self.large else None  # of what is asked for
        self._files = []
        for shard in shards:
            file = File(shard, self.large, "" if real.is_dir() else real.name)
            if not self.large:
                file.places = self._read_all(file, check)
            self._files.append(file)
        self._ends = np.cumsum([len(file.places) for file in self._files], dtype=np.int64)
        if max_bad_share is not None:
            self._refuse(max_bad_share)

    def _read_all(self, file, check):
        """The places of a file's good records; the others become bad."""
        places = array("q")
        for place, read in file.records():
            try:
                record = _ours(read)
                if check:
                    check(record)
                places.extend(place)
                if self._held is not None:
                    self._held.append(record)
            except ValueError as e:
                self.bad.append((file.place(place[2]), str(e)))
        return places

    def _refuse(self, max_bad_share):
        good, bad = len(self), len(self.bad)
        if good == 0 or bad > max_bad_share * (good + bad):
            where, why = self.bad[0] if self.bad else (self.path, "no lines")
            what = "folder" if self.path.is_dir() else "file"
            raise ValueError(f"{where}: {why} ({bad} bad and {good} good lines in this {what})")
        for where, why in self.bad[:3]:
            log.warning("skipped line %s: %s", where, why)
        if bad:
            log.warning("%s: %d bad lines skipped, %d good", self.path, bad, good)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> dict:
        file, k = self._find(i)
        if self._held is not None:
            return self._held[i]
        try:
            record = _ours(partial(file.read, k))
        except ValueError as e:
            if self.large:
                raise
            raise ValueError(f"{file.where(k)}: changed since it was first read: {e}") from e
        if self._check:
            self._check(record)
        return record

    def _find(self, i):
        """-> (the file that holds record i, its index there)."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self._files[k], i - (int(self._ends[k - 1]) if k else 0)

    def as_written(self, i: int) -> dict:
        """Record i in the form that it has in the file."""
        file, k = self._find(i)
        return file.read(k)

    def where(self, i: int) -> str:
        """The place of record i for messages: "path:12", of an array "path: record 12", from 1."""
        file, k = self._find(i)
        return file.where(k)


def index_some(paths: list[Path], rank: int, world: int):
    """Finds the places of each world-th file of the large sets: all ranks together those of all.

    What is wrong with a file is not said here: whoever opens its set meets it again.
    """
    shards = [shards_of(path) for path in paths]
    for shard in sum(filter(is_large, shards), [])[rank::world]:
        try:
            File(shard, large=True)
        except (OSError, ValueError):
            pass


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
    try:
        yield part
        os.replace(part, path)
    finally:
        # It failed; or a link was renamed over another link to the same file, which leaves both.
        part.unlink(missing_ok=True)
