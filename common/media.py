"""Pictures and clips from files that nobody has vetted.

    picture = load_picture("a.jpg", root="folder/of/the/data")     # a PIL picture, RGB, upright
    with Clip("b.mp4", root="folder/of/the/data") as clip:
        frames = list(clip.frames([0.0, 0.5, 1.0]))                # uint8 (H, W, 3), by seconds

Read is what viewers and players show, whatever the file is called. Paths must stay below root, only
the formats listed here are opened, and what is too large is refused before it is decoded. Whatever
goes wrong with a file is a MediaError that names it.

Not read, as they name other files: playlists (m3u8, mpd, concat, sdp). Not read either, for want of
a decoder that is safe or of time stamps: HEIC, SVG, EPS, PDF, RealMedia, MXF, raw H.264 and H.265.
"""

import base64
import binascii
import bisect
import io
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, dropwhile
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

PICTURES = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO"]
CLIPS = "mp4, mov, mkv, webm, avi, ts, mpg, flv, wmv, ogv, gif, apng, animated webp"
# Their names in FFmpeg. None can name other files: it follows playlists, even in a file object.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng"

PIXEL_LIMIT = 2**26  # ours: pixels of a picture or frame, 8192x8192; as RGB they take 201 MB
MAX_SOURCE_FRAMES = 864_000  # ours: frames of a clip, eight hours at 30 a second
MAX_PATH = 4096  # characters; Linux opens no longer path
SLACK = 0.002  # seconds: some containers round time stamps to milliseconds
NEAR = 16  # ours: frames; to decode so many more is about as much work as to seek

# PyAV 19 reads any bytes as tags; before, bytes that are no UTF-8 were an error unless ignored.
TAG_ERRORS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

# Exif orientation -> what turns the stored picture upright.
UPRIGHT = {
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}


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
        if self.detail:
            return f"{self.path}: {self.reason} ({self.detail})"
        return f"{self.path}: {self.reason}"


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


# Files


def open_media(path: str | Path, root: str | Path | None, allow_outside: bool = False):
    """Open a data set's file, or a data URL, to read bytes.

    MediaError for other URLs, for anything whose real place (links followed) is not below root,
    unless allow_outside, and for whatever is not a regular file.
    """
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        kind = type(path).__name__
        raise MediaError(path, "unsupported", f"a path was expected, not {kind}")
    if name[:5].lower() == "data:":
        return io.BytesIO(_data_of_url(name))
    if len(name) > MAX_PATH:
        detail = f"a path of {len(name):,} characters; base64 stands behind data:image/png;base64,"
        raise MediaError(name, "missing", detail)
    if re.match(r"concat:|[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise MediaError(name, "outside", "URLs and protocols are not followed")
    try:
        base = os.path.realpath(root or ".")
        real = os.path.realpath(os.path.join(base, name))
        inside = not os.path.isabs(name) and os.path.commonpath([base, real]) == base
        if not inside and not allow_outside:
            raise MediaError(name, "outside", f"leads out of {base}")
        fd = _open_below(base if inside else "/", real)
    except OSError as e:
        raise MediaError(name, "missing", e.strerror) from e
    except ValueError as e:
        raise MediaError(name, "missing", e) from e
    info = os.fstat(fd)
    regular = stat.S_ISREG(info.st_mode)
    if regular and info.st_size > 0:
        return os.fdopen(fd, "rb")
    os.close(fd)
    if regular:
        raise MediaError(name, "empty")
    raise MediaError(name, "unsupported", "not a regular file")


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
    except (binascii.Error, ValueError) as e:
        raise MediaError(url, "corrupt", f"no base64: {e}") from e
    if not data:
        raise MediaError(url, "empty")
    return data


# Pictures


def load_picture(
    source: str | Path | Image.Image | np.ndarray,
    root: str | Path | None = None,
    allow_outside: bool = False,
    pixel_limit: int = PIXEL_LIMIT,
    header_only: bool = False,
) -> Image.Image | tuple[int, int]:
    """Path, data URL, PIL picture or uint8 array (H, W) or (H, W, 3 or 4) -> RGB picture, upright.

    Of an animation the first frame. header_only: -> (height, width) as stored, nothing decoded.
    MediaError when it cannot be used.
    """
    if Image.MAX_IMAGE_PIXELS is not None:
        # Pillow has a limit of its own, at twice this number.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, pixel_limit)
    if isinstance(source, (Image.Image, np.ndarray)):
        with reading("<memory>"):
            image = _of_array(source) if isinstance(source, np.ndarray) else source
            return _decode(image, pixel_limit, header_only)
    with open_media(source, root, allow_outside) as file, reading(source):
        try:
            return _decode(Image.open(file, formats=PICTURES), pixel_limit, header_only)
        except (OSError, SyntaxError, ValueError):
            mended = _mended(file)
            if mended is None:
                raise
        return _decode(Image.open(mended, formats=PICTURES), pixel_limit, header_only)


def _of_array(array):
    fits = array.ndim == 2 or array.shape[2:] in ((3,), (4,))
    if array.dtype != np.uint8 or not fits:
        detail = f"{array.dtype} array {array.shape}, not uint8 (H, W[, 3|4])"
        raise MediaError("", "unsupported", detail)
    _check_size("", *array.shape[:2], array.size + 1)  # Pillow makes no picture without pixels
    return Image.fromarray(array)


def _decode(image, pixel_limit, header_only):
    # Pillow has read the header alone.
    _check_size("", image.height, image.width, pixel_limit)
    if header_only:
        return image.height, image.width
    image.load()
    # Not by ImageOps.exif_transpose: that writes all tags anew, and fails at one that is odd.
    turn = UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    return _to_rgb(image)


def _check_size(path, height, width, pixel_limit):
    if height * width > pixel_limit:
        raise MediaError(path, "too_large", f"{width}x{height} pixels, limit {pixel_limit}")
    if height * width == 0:
        raise MediaError(path, "empty", "no pixels")


def _orientation(image):
    """The Exif orientation, of whatever type cameras wrote it in; None where it is not legible."""
    try:
        value = image.getexif().get(0x0112)
        return int(value[0] if isinstance(value, (tuple, bytes)) else value)
    except Exception:  # as many kinds as there are ways to break a tag; viewers show the picture
        return None


def _to_rgb(image):
    """PIL picture of any mode -> RGB. PIL alone would clip 16 bits and bare hidden pixels."""
    if image.mode.startswith("I"):  # 16-bit grey, or 32-bit with values of 16 bits
        grey = np.asarray(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise MediaError("", "unsupported", "32-bit grey values")
        if isinstance(image.info.get("transparency"), int):
            grey[grey == image.info["transparency"]] = 65535
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        # Its range is anybody's guess, and a wrong guess would feed black pictures in silence.
        raise MediaError("", "unsupported", "floating-point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        image = paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _mended(file):
    """A picture that Pillow refuses, without the faults that viewers pass over; None: not such."""
    file.seek(0)
    data = file.read()
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return io.BytesIO(_bare_png(data))
    if data.startswith(b"\xff\xd8"):
        return _ended_jpeg(data)
    return None


def _bare_png(data):
    """The chunks that make the pixels: no text or colour profile, be they broken or huge."""
    parts = [data[:8]]
    at = 8
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + size]  # size, kind, content, checksum
        at += len(chunk)
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        critical = not kind[0] & 32  # a capital letter
        if critical or (kind in (b"tRNS", b"eXIf") and whole):
            parts.append(chunk)
    return b"".join(parts)


def _ended_jpeg(data):
    """A JPEG that lacks its end marker alone; None if pixels are missing too.

    Where all pixels are there, none can depend on what is written behind them.
    """
    data = data.removesuffix(b"\xff")
    if not _has_all_scans(data):
        return None
    ended = [io.BytesIO(data + more + b"\xff\xd9") for more in (b"", b"\xaa" * 64)]
    first, second = (np.asarray(Image.open(file, formats=["JPEG"])) for file in ended)
    return ended[0] if np.array_equal(first, second) else None


def _has_all_scans(data):
    """Whether the scans of a progressive JPEG bring every coefficient down to its last bit."""
    at = data.find(b"\xff\xc2")  # the head of a progressive frame
    if at < 0 or len(data) < at + 10:
        return at < 0
    missing = {}  # (component, coefficient) -> bits to come
    for scan in re.finditer(rb"\xff\xda\0.(.)(.{11})", data[at:], re.DOTALL):
        head = scan[2]  # for each component its name and tables; then first, last and bit
        names = 2 * scan[1][0]
        if names <= 8:
            first, last, bit = head[names : names + 3]
            for component in head[:names:2]:
                missing |= {(component, k): bit & 15 for k in range(first, last + 1)}
    components = data[at + 9]
    return len(missing) == 64 * components and not any(missing.values())


# Clips


class Stamp(NamedTuple):
    """A packet of a clip, which as a rule holds one frame. Times are in units of the time base."""

    time: int  # when its frame is shown
    dts: int | None  # when it is decoded
    duration: int  # 0: not known
    size: int  # bytes
    key: bool  # its frame needs no other one
    shown: bool  # else it is decoded for those after it alone


class Inexact(Exception):
    """Seeking may give other frames than decoding from the start would."""


class Clip:
    """A video file: opened, indexed by the times of its frames, and decoded only by frames().

    height, width: pixels as stored, before any rotation.
    times: (F,) float64, the seconds at which its frames appear, counted from the first one that can
    be shown: a clip that was cut out of another, or recorded, may begin with frames that cannot.
    duration: seconds, with that of the last frame.
    MediaError when it cannot be used. A context manager: leaving it closes the file.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        allow_outside: bool = False,
        pixel_limit: int = PIXEL_LIMIT,
    ):
        self.path = path
        self._pixel_limit = pixel_limit
        self._container = self._webp = None  # which of them there is
        # The stack closes what is open when a later step fails.
        with ExitStack() as stack, reading(path):
            self._file = stack.enter_context(open_media(path, root, allow_outside))
            if re.match(rb"RIFF....WEBP", self._file.read(12), re.DOTALL):
                self._open_webp()
            else:
                stack.callback(self._close_container)
                self._open()
                self._index(self._read_stamps())
                self._check_whole()
            self._opened = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._opened.close()

    # -- the index

    def _close_container(self):
        if self._container is not None:
            self._container.close()

    def _open(self):
        """Opens the container, at its beginning."""
        self._close_container()
        self._file.seek(0)
        # A file object together with both lists: playlists, concat scripts, subtitles as "video"
        # and URLs are refused.
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        try:
            # Not "options", for streams too: PyAV 17 crashes where these come later, as in FLV.
            self._container = av.open(self._file, container_options=options, **TAG_ERRORS)
        except av.error.FFmpegError as e:
            reason = "unsupported" if isinstance(e, av.error.ArgumentError) else "corrupt"
            raise MediaError(self.path, reason, f"no clip in {CLIPS}") from e
        stream = self._container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise MediaError(self.path, "unsupported", "no video stream that can be decoded")
        self.height, self.width = stream.height, stream.width
        _check_size(self.path, self.height, self.width, self._pixel_limit)
        context = stream.codec_context
        # The loader's workers are the parallelism: more threads would only fight for the cores.
        context.thread_count = 1
        # The frames may be larger than the header says. Twice the limit: FFmpeg counts its padding.
        context.options |= {"max_pixels": str(2 * self._pixel_limit)}
        self._stream = stream
        # Recordings of broadcasts begin and end anywhere. Other files that do were cut.
        self._recorded = self._container.format.name in ("mpegts", "mpeg")

    def _read_stamps(self):
        """Reads the file through, without decoding -> [Stamp, ...] in its order."""
        stamps = []
        self._by_rank = False  # frames are told by their order, not by their time stamps
        with reading(self.path, "truncated"):
            for packet in self._container.demux(self._stream):
                # So a cut mp4 ends. Decoding its first frames alone would not notice.
                if packet.is_corrupt and not self._recorded:
                    raise MediaError(self.path, "truncated", "the file ends inside a frame")
                # Old codecs in AVI and Matroska have only the time of decoding.
                time = packet.dts if packet.pts is None else packet.pts
                self._by_rank |= packet.size > 0 and packet.pts is None
                if packet.size and time is not None:
                    stamps.append(
                        Stamp(
                            time,
                            packet.dts,
                            packet.duration or 0,
                            packet.size,
                            packet.is_keyframe,
                            not packet.is_discard,
                        )
                    )
                if len(stamps) > MAX_SOURCE_FRAMES:
                    raise MediaError(self.path, "too_large", f"over {MAX_SOURCE_FRAMES} frames")
        return stamps

    def _index(self, stamps):
        """Sets times and duration. The first time need not be 0, nor the frame rate constant."""
        if not stamps:
            raise MediaError(self.path, "corrupt", "no video packets")
        rate = self._stream.average_rate or self._stream.guessed_rate or 25
        self._base = float(self._stream.time_base)
        stamps, joined = self._rebased(stamps, gap=round(1 / float(rate) / self._base))
        # Without the frames before the first key frame, in the file or on screen: they need others
        # that are not there.
        first = next((k for k, stamp in enumerate(stamps) if stamp.key), 0)
        start = stamps[first].time
        self._keys = [stamp for stamp in stamps[first:] if stamp.key]
        shown = [stamp for stamp in stamps[first:] if stamp.shown and stamp.time >= start]
        if not shown:
            raise MediaError(self.path, "corrupt", "no video packets that are shown")
        shown.sort()
        self._stamps = [stamp.time for stamp in shown]  # ascending, one for each frame
        self._known = set(self._stamps)
        name = self._container.format.name
        if name == "mpeg" and len(self._known) < len(self._stamps):
            # Not all frames of such a file have a time, and FFmpeg guesses wrong: spread evenly.
            ends = self._stamps[0], self._stamps[-1]
            self._stamps = np.linspace(*ends, len(shown)).round().astype(int).tolist()
            self._by_rank = True
        self.times = np.array([time - self._stamps[0] for time in self._stamps]) * self._base
        # WebM does not say how long the last frame stays: then as long as most.
        gaps = np.diff(self.times)
        gap = np.median(gaps) if len(gaps) else 0
        self.duration = float(self.times[-1] + (shown[-1].duration * self._base or gap or 1 / rate))
        # AVI has no times of presentation: where frames are reordered, FFmpeg's guess is wrong.
        reordered = bool(self._stream.codec_context.has_b_frames)
        self._by_rank |= joined or (name == "avi" and reordered)
        # APNG calls each frame a key frame.
        in_order = all(a.time < b.time for a, b in zip(self._keys, self._keys[1:]))
        self._seekable = in_order and not self._by_rank and name != "apng" and len(self._keys) > 1

    def _rebased(self, stamps, gap):
        """Recordings that were put together: time goes on where it jumps back, or ahead by hours.

        -> (stamps, whether there was such a place)
        """
        second, hour = round(1 / self._base), round(3600 / self._base)
        rebased, shift, last = [], 0, None
        for stamp in stamps:
            if stamp.dts is not None:
                if last is not None and not -second <= stamp.dts - last <= hour:
                    shift += last + gap - stamp.dts
                last = stamp.dts
            rebased.append(stamp._replace(time=stamp.time + shift) if shift else stamp)
        return rebased, shift != 0

    def _check_whole(self):
        # A file that is cut between two packets ends without an error, but before it should.
        name = self._container.format.name.split(",")[0]
        at = self._file.tell()  # FFmpeg reads on from here
        size = self._file.seek(0, os.SEEK_END)
        end = ENDS[name](self._file) if name in ENDS else None
        self._file.seek(at)
        if end is not None and size < end:
            raise MediaError(self.path, "truncated", f"{size:,} bytes are not all of it")

    def _open_webp(self):
        """Animated WebP is Pillow's: FFmpeg does not decode it."""
        webp = Image.open(self._file, formats=["WEBP"])
        self.width, self.height = webp.size
        _check_size(self.path, self.height, self.width, self._pixel_limit)
        # Like browsers: a frame that is to stay for no time stays for a tenth of a second.
        stays = [ms / 1000 if ms > 10 else 0.1 for ms in _webp_milliseconds(self._file)]
        if len(stays) != webp.n_frames or len(stays) < 2:
            raise MediaError(self.path, "unsupported", "a picture, no animation")
        ends = np.cumsum(stays)
        self.times, self.duration = ends - stays, float(ends[-1])
        self._webp = webp

    # -- frames

    def frames(self, wanted: list[float]) -> Iterator[np.ndarray]:
        """Ascending seconds -> the frame on screen at each, upright: uint8 (H, W, 3).

        Decoded is from the key frame before each. Where that might give other frames than decoding
        from the start does, all before it is decoded.
        """
        wanted = list(wanted)
        done = 0
        # One for all frames, with one thread: ten times cheaper than each frame's own conversion.
        to_rgb = VideoReformatter()
        with reading(self.path):
            for source in (self._by_seeking, self._from_start):
                for shown in source(wanted[done:]):
                    yield self._upright_rgb(shown, to_rgb)
                    done += 1

    def _by_seeking(self, wanted):
        """The frames at as many of the wanted seconds as it is sure of."""
        if self._container is not None and self._seekable:
            try:
                for key, seconds in self._by_key_frame(wanted):
                    yield from on_screen(self._from_key(key), seconds)
            except (Inexact, av.error.FFmpegError, OverflowError):
                return

    def _by_key_frame(self, wanted):
        """[(key frame, the seconds to decode from it on), ...]"""
        times = [key.time for key in self._keys]
        runs, last = [], -math.inf
        for second in wanted:
            rank = max(0, np.searchsorted(self.times, second + SLACK, side="right") - 1)
            key = self._keys[bisect.bisect_right(times, self._stamps[rank]) - 1]
            if bisect.bisect_left(self._stamps, key.time) <= last + NEAR:
                runs[-1][1].append(second)
            else:
                runs.append((key, [second]))
            last = rank
        return runs

    def _from_key(self, key):
        """Yields (seconds, frame) from a key frame on, the first of them the one it is."""
        rank = bisect.bisect_left(self._stamps, key.time)
        target = key.time if key.dts is None else key.dts
        if self._recorded:
            # FFmpeg may land inside a frame, and give its time to the next one: a second earlier.
            target -= round(1 / self._base)
        self._container.seek(target, stream=self._stream)
        packets = dropwhile(lambda packet: not self._is(packet, key), self._demux())
        decoded = self._decode(packets, self.times[rank], exact=True)
        first = next(decoded, None)
        if first is None or first[0] != self.times[rank]:
            raise Inexact
        return chain([first], decoded)

    def _is(self, packet, key):
        """Whether a packet is this key frame, which is to come. Seeking may stop long before it."""
        if packet.size == 0 or packet.pts is None or (packet.is_keyframe and packet.pts > key.time):
            raise Inexact
        return packet.pts == key.time and packet.size == key.size

    def _from_start(self, wanted):
        if not wanted:
            return
        if self._webp is not None:
            yield from on_screen(self._webp_frames(), wanted)
            return
        self._open()  # anew: not every container finds back to its beginning
        packets = self._demux()
        if self._keys:
            packets = dropwhile(lambda packet: not packet.is_keyframe, packets)
        yield from on_screen(self._decode(packets), wanted)

    def _demux(self):
        return self._container.demux(self._stream)

    def _decode(self, packets, start=0.0, exact=False):
        """Packets from a key frame on -> yields (seconds, frame), in order of presentation.

        Frames before start are left out, and damaged ones. exact: Inexact at whatever is odd.
        """
        time, count, good, lost = -1, 0, 0, 0
        for packet in packets:
            try:
                frames = packet.decode()
            except av.error.FFmpegError as e:
                if exact:
                    raise Inexact from e
                # ours: players pass over what is damaged; more than a fifth is too much.
                lost += 1
                if lost > 5 + 0.2 * count:
                    raise MediaError(self.path, "corrupt", e) from e
                continue
            for frame in frames:
                before, time = time, self._time_of(frame, count + lost)
                count += 1
                good += not frame.is_corrupt
                if time < start:
                    continue
                odd = frame.is_corrupt or time <= before or frame.pts not in self._known
                if exact and odd:
                    raise Inexact
                if not frame.is_corrupt:
                    yield time, frame
        if exact and time < self.times[-1]:
            raise Inexact
        if good == 0:
            raise MediaError(self.path, "corrupt", "no frame could be decoded")
        if time < 0.8 * self.times[-1]:
            detail = f"frames end at {time:.1f} of {self.times[-1]:.1f} s"
            raise MediaError(self.path, "truncated", detail)

    def _time_of(self, frame, rank):
        """The seconds at which a frame is shown, which is the rank-th that was decoded."""
        if self._by_rank or frame.pts is None:
            return self.times[min(rank, len(self.times) - 1)]
        return (frame.pts - self._stamps[0]) * self._base

    def _webp_frames(self):
        for k, time in enumerate(self.times):
            self._webp.seek(k)
            yield time, np.asarray(_to_rgb(self._webp))

    def _upright_rgb(self, frame, to_rgb):
        if isinstance(frame, np.ndarray):
            return frame
        if self._container.format.name in ("gif", "apng"):
            rgba = to_rgb.reformat(frame, format="rgba", threads=1).to_ndarray()
            return np.asarray(_to_rgb(Image.fromarray(rgba)))
        rgb = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
        # PyAV reads the rotation, counter-clockwise, but does not apply it.
        return np.rot90(rgb, k=round(frame.rotation / 90) % 4)


def on_screen(decoded, seconds):
    """(time, frame) in order, ascending seconds -> yields the frame that is shown at each."""
    never = (math.inf, None)
    _, shown = next(decoded, never)
    time, following = next(decoded, never)
    for second in seconds:
        # A frame stays until the next one comes.
        while time <= second + SLACK:
            shown = following
            time, following = next(decoded, never)
        yield shown


# Where files end by what they say themselves, in bytes; None where a recorder left that open.


def _matroska_end(file):
    """The size of the segment stands behind its mark."""
    head = _read_at(file, 0, 4096)
    at = head.find(b"\x18\x53\x80\x67") + 4
    if at < 4 or at == len(head) or head[at] == 0:
        return None
    # As many bytes as the first one has leading zeros, and one more. All ones: not known.
    length = 9 - head[at].bit_length()
    most = (1 << 7 * length) - 1
    size = int.from_bytes(head[at : at + length], "big") & most
    return None if size == most else at + length + size


def _mov_end(file):
    """The end of the last "mdat" box: boxes of a size and a name follow each other."""
    at, end = 0, None
    while len(head := _read_at(file, at, 16)) >= 8:
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: to the end of the file
            break
        at += size
        if head[4:8] == b"mdat":
            end = at
    return end


def _asf_end(file):
    """The size of the file stands in its header's file properties."""
    head = _read_at(file, 0, 4096)
    at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    return None if at < 0 else int.from_bytes(head[at + 40 : at + 48], "little")


def _gif_end(file):
    """Whole are those that end in the mark for that, or in that of a frame's end."""
    size = file.seek(0, os.SEEK_END)
    tail = _read_at(file, max(0, size - 64), 64).rstrip(b"\r\n")
    return None if tail.endswith((b";", b"\0")) else size + 1


ENDS = {"matroska": _matroska_end, "mov": _mov_end, "asf": _asf_end, "gif": _gif_end}


def _read_at(file, at, size):
    file.seek(at)
    return file.read(size)


def _webp_milliseconds(file):
    """How long each frame of an animated WebP stays, by the heads of its ANMF chunks."""
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        body = file.read(size + size % 2)
        if head[:4] == b"ANMF":
            yield int.from_bytes(body[12:15], "little")
