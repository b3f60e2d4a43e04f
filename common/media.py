"""Pictures and clips from files that nobody has vetted.

    picture = load_picture("a.jpg", root="folder/of/the/data")     # a PIL picture, RGB, upright
    with Clip("b.mp4", root="folder/of/the/data") as clip:
        frames = list(clip.frames([0.0, 0.5, 1.0]))                # uint8 (H, W, 3), by seconds

Paths must stay below root, only the formats listed here are opened, and what is too large is
refused before it is decoded. Whatever goes wrong with a file is a MediaError that names it.
"""

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

PICTURES = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
# Containers that cannot name other files: FFmpeg follows playlists, even through a file object.
CLIPS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"

PIXEL_LIMIT = 64_000_000  # ours: pixels of a picture or frame; as RGB they take 192 MB
MAX_SOURCE_FRAMES = 216_000  # ours: frames of a clip, two hours at 30 a second

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


class MediaError(Exception):
    """A picture or clip that cannot be used.

    reason: one of missing, outside, empty, unsupported, corrupt, truncated, too_large, aspect;
    detail: more about it, or "".
    """

    def __init__(self, path, reason: str, detail=""):
        # The arguments as they came: so the error survives the way out of a worker process.
        super().__init__(path, reason, detail)
        self.path = str(path)
        self.reason = reason
        self.detail = str(detail)

    def __str__(self):
        if self.detail:
            return f"{self.path}: {self.reason} ({self.detail})"
        return f"{self.path}: {self.reason}"


def open_media(path: str | Path, root: str | Path | None, allow_outside: bool = False):
    """Open a data set's file to read bytes.

    MediaError for URLs, for anything whose real place (links followed) is not below root, unless
    allow_outside, and for whatever is not a regular file.
    """
    if not isinstance(path, (str, os.PathLike)):
        kind = type(path).__name__
        raise MediaError(path, "unsupported", f"a path was expected, not {kind}")
    name = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):  # http://, file://, concat:, data:
        raise MediaError(name, "outside", "URLs and protocols are not followed")
    try:
        base = os.path.realpath(root or ".")
        real = os.path.realpath(os.path.join(base, name))
        inside = not os.path.isabs(name) and os.path.commonpath([base, real]) == base
        if not inside and not allow_outside:
            raise MediaError(name, "outside", f"leads out of {base}")
        # All links were resolved, so one that is met now was put there since: NOFOLLOW refuses it.
        # Opening a pipe must not wait for somebody to write into it: NONBLOCK.
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as e:
        raise MediaError(name, "missing", e) from e
    info = os.fstat(fd)
    regular = stat.S_ISREG(info.st_mode)
    if regular and info.st_size > 0:
        return os.fdopen(fd, "rb")
    os.close(fd)
    if regular:
        raise MediaError(name, "empty")
    raise MediaError(name, "unsupported", "not a regular file")


# Pictures


def load_picture(
    source: str | Path | Image.Image | np.ndarray,
    root: str | Path | None = None,
    allow_outside: bool = False,
    pixel_limit: int = PIXEL_LIMIT,
    header_only: bool = False,
) -> Image.Image | tuple[int, int]:
    """Path, PIL picture or uint8 array (H, W) or (H, W, 3 or 4) -> RGB picture, upright.

    Of an animation the first frame. header_only: -> (height, width) as stored, nothing decoded.
    MediaError when it cannot be used.
    """
    if isinstance(source, np.ndarray):
        fits = source.ndim == 2 or source.shape[2:] in ((3,), (4,))
        if source.dtype != np.uint8 or not fits:
            detail = f"{source.dtype} array {source.shape}, not uint8 (H, W[, 3|4])"
            raise MediaError("<memory>", "unsupported", detail)
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        with _picture_errors("<memory>"):
            return _decode(source, pixel_limit, header_only)
    with open_media(source, root, allow_outside) as file, _picture_errors(source):
        return _decode(Image.open(file, formats=PICTURES), pixel_limit, header_only)


@contextmanager
def _picture_errors(name):
    """Turns what is raised inside, also MediaErrors without a path, into one that names it."""
    try:
        yield
    except MediaError as e:
        raise MediaError(name, e.reason, e.detail) from None
    except Image.DecompressionBombError as e:
        raise MediaError(name, "too_large", e) from e
    except Image.UnidentifiedImageError as e:
        raise MediaError(name, "unsupported", f"no picture in {', '.join(PICTURES)}") from e
    except Exception as e:
        # Decoders fed with broken bytes raise OSError, SyntaxError, struct.error, ValueError, ...
        reason = "truncated" if "truncated" in str(e) else "corrupt"
        raise MediaError(name, reason, f"{type(e).__name__}: {e}") from e


def _decode(image, pixel_limit, header_only):
    # Pillow has read the header alone.
    _check_size("", image.height, image.width, pixel_limit)
    if header_only:
        return image.height, image.width
    image.load()
    # Not by ImageOps.exif_transpose: that writes all tags anew, and fails at one that is odd.
    turn = UPRIGHT.get(image.getexif().get(0x0112))
    if turn is not None:
        image = image.transpose(turn)
    return _to_rgb(image)


def _check_size(path, height, width, pixel_limit):
    if height * width > pixel_limit:
        raise MediaError(path, "too_large", f"{width}x{height} pixels, limit {pixel_limit}")
    if height * width == 0:
        raise MediaError(path, "empty", "no pixels")


def _to_rgb(image):
    """PIL picture of any mode -> RGB. PIL alone would clip 16 bits and bare hidden pixels."""
    if image.mode.startswith("I"):  # 16-bit grey, or 32-bit with values of 16 bits
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise MediaError("", "unsupported", "32-bit grey values")
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


# Clips


@contextmanager
def _clip_errors(path, reason):
    try:
        yield
    except av.error.FFmpegError as e:
        raise MediaError(path, reason, e) from e


class Clip:
    """A video file: opened, indexed by the times of its frames, and decoded only by frames().

    height, width: pixels as stored, before any rotation.
    times: (F,) float64, the seconds at which its frames appear, counted from the first one.
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
        # The stack closes what is open when a later step fails.
        with ExitStack() as stack:
            file = stack.enter_context(open_media(path, root, allow_outside))
            self._container = stack.enter_context(self._open(file))
            self._stream = self._choose_stream(pixel_limit)
            self._index(self._read_stamps())
            self._check_length()
            self._opened = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._opened.close()

    def _open(self, file):
        # A file object together with both lists: playlists, concat scripts, subtitles as "video"
        # and URLs are refused.
        options = {"format_whitelist": CLIPS, "protocol_whitelist": "none"}
        try:
            return av.open(file, options=options, **TAG_ERRORS)
        except av.error.FFmpegError as e:
            reason = "unsupported" if isinstance(e, av.error.ArgumentError) else "corrupt"
            raise MediaError(self.path, reason, f"no clip in {CLIPS}: {e}") from e

    def _choose_stream(self, pixel_limit):
        stream = self._container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise MediaError(self.path, "unsupported", "no video stream that can be decoded")
        self.height, self.width = stream.height, stream.width
        _check_size(self.path, self.height, self.width, pixel_limit)
        context = stream.codec_context
        # The loader's workers are the parallelism: more threads would only fight for the cores.
        context.thread_count = 1
        # The frames may be larger than the header says. Twice the limit: FFmpeg counts its padding.
        context.options |= {"max_pixels": str(2 * pixel_limit)}
        return stream

    def _read_stamps(self):
        """[(time, duration), ...] of all packets, in units of the time base, sorted by time."""
        stamps = []
        with _clip_errors(self.path, "truncated"):
            for packet in self._container.demux(self._stream):
                # So a cut mp4 ends. Decoding its first frames alone would not notice.
                if packet.is_corrupt:
                    raise MediaError(self.path, "truncated", "the file ends inside a frame")
                # Old codecs in Matroska have only the time of decoding.
                time = packet.dts if packet.pts is None else packet.pts
                if packet.size and not packet.is_discard and time is not None:
                    stamps.append((time, packet.duration or 0))
                if len(stamps) > MAX_SOURCE_FRAMES:
                    raise MediaError(self.path, "too_large", f"over {MAX_SOURCE_FRAMES} frames")
        if not stamps:
            raise MediaError(self.path, "corrupt", "no video packets")
        return sorted(stamps)

    def _index(self, stamps):
        """Sets times and duration. The first time need not be 0, nor the frame rate constant."""
        self._base = float(self._stream.time_base)
        self._first, _ = stamps[0]
        self.times = np.array([time - self._first for time, _ in stamps]) * self._base
        # WebM does not say how long the last frame stays: then as long as most.
        _, last = stamps[-1]
        rate = self._stream.average_rate or self._stream.guessed_rate or 25
        self._gap = 1 / float(rate)
        gap = np.median(np.diff(self.times)) if len(stamps) > 1 else self._gap
        self.duration = float(self.times[-1] + (last * self._base or gap))

    def _check_length(self):
        # A cut webm ends without an error, but its header still has the length of the whole. Of a
        # file with other streams that may be the sound's.
        container = self._container
        if "matroska" not in container.format.name or len(container.streams) > 1:
            return
        length = (container.duration or 0) / av.time_base
        if self.duration < 0.8 * length:
            detail = f"{self.duration:.1f} of {length:.1f} s"
            raise MediaError(self.path, "truncated", detail)

    def frames(self, wanted: list[float]) -> Iterator[np.ndarray]:
        """Ascending seconds -> the frame on screen at each, upright: uint8 (H, W, 3)."""
        # One for all frames, with one thread: ten times cheaper than each frame's own conversion.
        to_rgb = VideoReformatter()
        never = (math.inf, None)
        with _clip_errors(self.path, "corrupt"):
            decoded = self._decode()
            _, shown = next(decoded)
            time, following = next(decoded, never)
            for second in wanted:
                # A frame stays until the next one comes. Some containers round to milliseconds.
                while time <= second + 0.002:
                    shown = following
                    time, following = next(decoded, never)
                rgb = to_rgb.reformat(shown, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
                # PyAV reads the rotation, counter-clockwise, but does not apply it.
                yield np.rot90(rgb, k=round(shown.rotation / 90) % 4)

    def _decode(self):
        """Yields (seconds, frame) of all frames that are not damaged, in order of presentation."""
        # Indexing has read to the end: back to the beginning.
        self._container.seek(self._first, stream=self._stream)
        count = 0
        for frame in self._container.decode(self._stream):
            if frame.is_corrupt:
                continue
            if frame.pts is None:
                time = count * self._gap
            else:
                time = (frame.pts - self._first) * self._base
            count += 1
            yield time, frame
        if count == 0:
            raise MediaError(self.path, "corrupt", "no frame could be decoded")
        if time < 0.8 * self.times[-1]:
            detail = f"frames end at {time:.1f} of {self.times[-1]:.1f} s"
            raise MediaError(self.path, "truncated", detail)
