"""What nobody has vetted: the error that names a file, and how files are opened.

Read this first, then common/pictures.py (files, data URLs and arrays -> RGB pictures) and
common/clips.py (files -> frames by seconds).

Read is what viewers and players show, whatever the file is called. Paths must stay below root, only
listed formats are opened, and what is too large is refused before it is decoded. Whatever goes
wrong with a file is a MediaError that names it.
"""

import base64
import io
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from common.parquet import bytes_of

PICTURES = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO"]
PIXEL_LIMIT = 2**26  # ours: pixels of a picture or frame, 8192x8192; as RGB they take 201 MB
MAX_PATH = 4096  # characters; Linux opens no longer path
PLACE = r"(.+\.(tar|parquet))@(\d{1,18})\+(\d{1,18})/([^/]*\w[^/]*)"
MEMBER = re.compile(PLACE, re.DOTALL | re.IGNORECASE)


# Errors


class MediaError(Exception):
    """A picture or clip that cannot be used. Its message is one line of at most 200 characters.

    reason: one of missing, outside, empty, unsupported, corrupt, truncated, too_large, aspect,
    bad_keys; detail: more about it, or "".
    """

    def __init__(self, path, reason: str, detail=""):
        # A path may be a whole picture in base64 by mistake.
        self.path = shortened(path, 100)
        self.reason = reason
        self.detail = shortened(detail, 195 - len(self.path) - len(reason))
        # What __init__ takes: so the error survives the way out of a worker process.
        super().__init__(self.path, reason, self.detail)

    def __str__(self):
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.path}: {self.reason}{detail}"


def shortened(text, most: int) -> str:
    """Text on one line that can be printed, cut out in the middle beyond `most` characters."""
    text = str(text)
    if len(text) > most:
        half = most // 2 - 1
        text = f"{text[:half]}..{text[-half:]}"
    return "".join(c if c.isprintable() else "?" for c in text)


@contextmanager
def reading(path, reason="corrupt"):
    """Turns what is raised inside, also MediaErrors without a path, into one that names it."""
    try:
        yield
    except MediaError as e:
        raise MediaError(e.path or path, e.reason, e.detail) from None
    except (Image.DecompressionBombError, MemoryError) as e:
        raise MediaError(path, "too_large", e) from e
    except Image.UnidentifiedImageError as e:
        raise MediaError(path, "unsupported", f"no picture in {', '.join(PICTURES)}") from e
    except Exception as e:
        # Decoders fed with broken bytes raise OSError, SyntaxError, struct.error, KeyError, ...
        reason = "truncated" if "truncated" in str(e) else reason
        raise MediaError(path, reason, f"{type(e).__name__}: {e}") from e


def check_size(height: int, width: int, pixel_limit: int):
    """MediaError, without a path, where a header says that there is too much, or nothing."""
    if height * width > pixel_limit:
        raise MediaError("", "too_large", f"{width}x{height} pixels, limit {pixel_limit}")
    if height * width == 0:
        raise MediaError("", "empty", "no pixels")


# Files


def open_media(path: str | Path, root: str | Path | None, allow_outside: bool = False):
    """Open a data set's file, or a data URL, or "shard.tar@OFFSET+SIZE/name", to read bytes.

    The last is a member of a tar, see common/tars.py: so many bytes from there, whatever the name.
    In "shard.parquet@GROUP+ROW/K-name" it is bytes of a row, see common/parquet.py.
    MediaError for other URLs, for anything whose real place (links followed) is not below root,
    unless allow_outside, and for whatever is not a regular file.
    """
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise MediaError(path, "unsupported", f"a path was expected, not {type(path).__name__}")
    if name[:5].lower() == "data:":
        return io.BytesIO(_data_of_url(name))
    if len(name) > MAX_PATH:
        detail = f"a path of {len(name):,} characters; base64 stands behind data:image/png;base64,"
        raise MediaError(name, "missing", detail)
    if not name:
        raise MediaError("''", "missing", "an empty path")
    if re.match(r"concat:|[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise MediaError(name, "outside", "URLs and protocols are not followed")
    member = MEMBER.fullmatch(name)
    try:
        path = member[1] if member else name
        fd = _open_inside(path, os.path.realpath(root or "."), allow_outside)
        info = os.fstat(fd)
    except (OSError, ValueError) as e:
        raise MediaError(name, "missing", getattr(e, "strerror", e)) from e
    regular = stat.S_ISREG(info.st_mode)
    if regular and member:
        begin, size = int(member[3]), int(member[4])
        if member[2].lower() == "parquet":
            return io.BytesIO(_bytes_of_row(fd, name, begin, size, member[5]))
        if 0 < size <= info.st_size - begin:
            return io.BufferedReader(Part(fd, begin, size))
        os.close(fd)
        raise MediaError(name, "truncated" if size else "empty")
    if regular and info.st_size > 0:
        # Without a name, by which FFmpeg would guess what is in it.
        return os.fdopen(fd, "rb")
    os.close(fd)
    if regular:
        raise MediaError(name, "empty")
    raise MediaError(name, "unsupported", "not a regular file")


class Part(io.RawIOBase):
    """Bytes of an open file as a file of their own, which ends where they do. Closes it.

    size None: all there are. Processes that share it share no position.
    """

    def __init__(self, fd: int, begin: int = 0, size: int | None = None):
        size = os.fstat(fd).st_size if size is None else size
        self.fd, self.begin, self.size, self.at = fd, begin, size, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        most = max(0, min(len(buffer), self.size - self.at))
        data = os.pread(self.fd, most, self.begin + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def seek(self, offset, whence=os.SEEK_SET):
        at = offset + (0, self.at, self.size)[whence]
        if at < 0:
            raise OSError(f"seek to {at}")
        self.at = at
        return at

    def close(self):
        if not self.closed:
            os.close(self.fd)
        super().close()


def _bytes_of_row(fd, name, group, row, member):
    with reading(name):
        data = bytes_of(Part(fd), group, row, int(member.partition("-")[0]))
    if not data:
        raise MediaError(name, "empty")
    return data


def _open_inside(name, base, allow_outside):
    real = os.path.realpath(os.path.join(base, name))
    inside = not os.path.isabs(name) and os.path.commonpath([base, real]) == base
    if not inside and not allow_outside:
        raise MediaError(name, "outside", f"leads out of {base}")
    return _open_below(base if inside else "/", real)


def _open_below(base, real):
    """Descriptor of the file `real`, a path without links below the folder base.

    Folder by folder: so one that is swapped for a link just now is refused, not followed.
    """
    # Folders need not be listed: PATH, where the system has it.
    folder = os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_PATH", os.O_RDONLY)
    *folders, name = os.path.relpath(real, base).split(os.sep)
    fd = os.open(base, folder)
    try:
        for part in folders:
            outer, fd = fd, os.open(part, folder, dir_fd=fd)
            os.close(outer)
        # Opening a pipe must not wait for somebody to write into it: NONBLOCK.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
    finally:
        os.close(fd)


def _data_of_url(url):
    """data:image/png;base64,iVBORw... -> bytes. Blanks are skipped, padding may be missing."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise MediaError(url, "unsupported", "only data URLs with ;base64, are read")
    text = "".join(text.split()).rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as e:
        raise MediaError(url, "corrupt", f"no base64: {e}") from e
    if not data:
        raise MediaError(url, "empty")
    return data
