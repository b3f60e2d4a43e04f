"""Files too large to be parsed at every start: where their lines stand is found once, and kept.

    places = table(made_once(path, "lines", partial(write_places, path)))   # (n, 3) int64

What is kept lies in a cache folder: a folder for each file, and in it what was made of its present
version. All processes of a machine map the same bytes, so they are in memory once. Nothing of a
small set comes here.

The cache does not grow for ever: what was made of an earlier version goes when a later one is made,
and what no run has asked for in 30 days goes when the next run starts.
"""

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

log = logging.getLogger("index")

# ours: bytes of a set. At most so much is parsed at the start, which takes a few seconds.
LARGE = 64 * 2**20
PACKED = 8  # ours: gzip makes JSON so much smaller, about
BLOCK = 2**20  # bytes that are searched at once: they stay in the cache
DAY = 24 * 3600  # seconds
KEPT = 30 * DAY  # ours
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanokeye/index")


def is_large(paths: list[Path]) -> bool:
    """Whether the files of a set are too large, all together, to be parsed at every start."""
    total = 0
    for path in paths:
        total += path.stat().st_size * (PACKED if path.suffix.lower() == ".gz" else 1)
    return total > LARGE


@lru_cache
def cache_folder(folder: Path) -> Path:
    """The folder itself, or where it cannot be written one of this process, until its end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        forget_unused(folder)
        return folder
    except OSError as e:
        own = Path(tempfile.mkdtemp(prefix="nanokeye-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        log.warning("%s: %s; large files are indexed anew at every start", folder, e.strerror)
        return own


def forget_unused(cache: Path):
    """Removes what no run has asked for in so long. Who has it mapped still reads it."""
    for entry in cache.iterdir():
        with suppress(OSError):  # another process does the same
            if time.time() - entry.stat().st_mtime > KEPT:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def made_once(path: Path, what: str, make: Callable[[Path], None]) -> Path:
    """A file that make(target) writes of the file at `path`, unless it was already made.

    Several processes may make the same one: each puts a whole one in its place. ValueError where
    there is no room for it.
    """
    real, info = path.resolve(), path.stat()
    folder = cache_folder(CACHE) / digest(real)
    # ctime too: copies that keep size and mtime are other files
    made = folder / f"{digest(info.st_size, info.st_mtime_ns, info.st_ctime_ns)}.{what}"
    with suppress(OSError):  # not there, or another user's
        os.utime(folder)  # it is used
    if made.exists():
        return made
    part = None
    try:
        folder.mkdir(exist_ok=True)
        handle, part = tempfile.mkstemp(dir=folder, suffix=".tmp")
        os.close(handle)
        make(Path(part))
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # or a name may outlive a power cut without its bytes
        os.replace(part, made)
    except OSError as e:
        raise ValueError(f"{path}: its {what} in {folder}: {e.strerror or e}") from None
    finally:
        if part:
            Path(part).unlink(missing_ok=True)
    forget_earlier(made)
    return made


def forget_earlier(made: Path):
    """Removes what was made of earlier versions of a file, and what killed runs left half made."""
    for entry in made.parent.iterdir():
        with suppress(OSError):
            age = time.time() - entry.stat().st_mtime
            left = entry.suffix == ".tmp" and age > DAY
            # Who has places mapped still reads them; what was unpacked, is opened for each record.
            least = KEPT if entry.suffix == ".unpacked" else 0
            if left or (entry.suffix == made.suffix and entry != made and age > least):
                entry.unlink()


def unreadable(error: OSError, where: Path | str = "") -> Exception:
    """What to raise where the disk does not give what a file holds: python names no file then.

    An error that has a name stays: the whole file cannot be opened.
    """
    if error.filename is not None:
        return error
    place = f"{where}: " if where else ""
    return ValueError(f"{place}cannot be read: {error.strerror or error}")


@contextmanager
def naming(where: Path | str):
    """ValueError that says where for what the disk does not give."""
    try:
        yield
    except OSError as e:
        raise unreadable(e, where) from None


def digest(*facts) -> str:
    key = "\0".join(map(str, facts)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(key).hexdigest()[:24]


@lru_cache(None)
def table(path: Path) -> np.ndarray:
    """The rows (n, 3) int64 of a file of places: mapped, not read.

    By torch, which keeps no descriptor: numpy keeps one for each file, and with a thousand shards a
    process has no more.
    """
    size = path.stat().st_size // 8
    if size == 0:  # no empty file can be mapped
        return np.zeros((0, 3), np.int64)
    rows = torch.from_file(str(path), shared=False, size=size, dtype=torch.int64)
    return rows.numpy().reshape(-1, 3)


def write_places(source: Path, target: Path):
    """Writes (offset, length, number from 1) of all lines of source that are not blank.

    Nothing is parsed, so that a gigabyte takes a few seconds. ValueError, with the byte from 1, for
    what the disk does not give.
    """
    offset, number, data = 0, 1, bytearray()
    with open(source, "rb") as file, open(target, "wb") as out:
        while True:
            with naming(f"{source}: byte {offset + len(data) + 1}"):
                block = file.read(BLOCK)
            if not block:
                break
            data += block
            if b"\n" not in block:
                continue  # a line may be longer than many blocks
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
            out.write(_rows(data, ends, offset, number))
            done = int(ends[-1])
            data = data[done:]
            offset += done
            number += len(ends)
        if data:  # a last line without an end
            out.write(_rows(data, np.array([len(data)]), offset, number))


def _rows(data: bytearray, ends: np.ndarray, offset: int, number: int) -> np.ndarray:
    """Places of the lines in data that end there, (n, 3), without the blank ones."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    lengths = ends - starts
    rows = np.stack([offset + starts, lengths, number + np.arange(len(ends))], 1)
    first = np.frombuffer(data, np.uint8)[starts]
    full = first != ord("\n")
    # A line that begins with another blank may hold nothing else.
    for k in np.flatnonzero(np.isin(first, list(b" \t\r\v\f"))):
        full[k] = bool(data[starts[k] : ends[k]].strip())
    return rows[full]
