"""Clips from files that nobody has vetted; common/media.py stands before.

    with Clip("b.mp4", root="folder/of/the/data") as clip:
        frames = list(clip.frames([0.0, 0.5, 1.0]))                # uint8 (H, W, 3), by seconds

In the order in which they are needed: a clip is opened, its packets are read without decoding, and
their time stamps become the index; the file must not end before it says; frames are decoded from
the key frame before each, or from the start where seeking is not sure to give the same ones. Last
come animated WebPs, which are Pillow's, and the marks by which files state their length.

Not read, as they name other files: playlists (m3u8, mpd, concat, sdp). Not read either, for want of
time stamps or of a safe decoder: RealMedia, MXF, raw H.264 and H.265.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from PIL import Image

from common.media import PIXEL_LIMIT, MediaError, check_size, open_media, reading
from common.pictures import to_rgb

CLIPS = "mp4, mov, mkv, webm, avi, ts, mpg, flv, wmv, ogv, gif, apng, animated webp"
# Their names in FFmpeg. None can name other files: it follows playlists, even in a file object.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng"

MAX_SOURCE_FRAMES = 864_000  # ours: frames of a clip, eight hours at 30 a second
SLACK = 0.002  # seconds: some containers round time stamps to milliseconds
NEAR = 16  # ours: frames; to decode so many more is about as much work as to seek

# PyAV 19 reads any bytes as tags; before, bytes that are no UTF-8 were an error unless ignored.
TAG_ERRORS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class Stamp(NamedTuple):
    """A packet of a clip, which as a rule holds one frame. Times are in units of the time base."""

    time: int  # when its frame is shown
    dts: int | None  # when it is decoded
    duration: int  # 0: not known
    size: int  # bytes
    key: bool  # its frame needs no other one
    shown: bool  # else it is decoded for those after it alone


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
        self._seekable = False
        # The stack closes what is open when a later step fails.
        with ExitStack() as stack, reading(path):
            self._file = stack.enter_context(open_media(path, root, allow_outside))
            head, tail, size = _ends(self._file)
            if re.match(rb"RIFF....WEBP", head, re.DOTALL):
                self._open_webp()
            else:
                stack.callback(self._close_container)
                self._open()
                self._index(self._read_stamps())
                # One that is cut between two packets ends without an error, but too early.
                if size < self._stated_size(head, tail):
                    raise MediaError("", "truncated", f"{size:,} bytes are not all of it")
            self._opened = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._opened.close()

    # -- the container

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
        except FFmpegError as e:
            reason = "unsupported" if isinstance(e, av.error.ArgumentError) else "corrupt"
            raise MediaError("", reason, f"no clip in {CLIPS}") from e
        self._form = self._container.format.name.split(",")[0]  # "mov" is mp4 too
        # Recordings of broadcasts begin and end anywhere. Other files that do were cut.
        self._recorded = self._form in ("mpegts", "mpeg")
        self._stream = self._container.streams.best("video")
        context = self._stream and self._stream.codec_context
        if context is None:
            raise MediaError("", "unsupported", "no video stream that can be decoded")
        self.height, self.width = context.height, context.width
        check_size(self.height, self.width, self._pixel_limit)
        # The loader's workers are the parallelism: more threads would only fight for the cores.
        context.thread_count = 1
        # The frames may be larger than the header says. Twice the limit: FFmpeg counts its padding.
        context.options |= {"max_pixels": str(2 * self._pixel_limit)}

    def _packets(self):
        return self._container.demux(self._stream)

    def _stated_size(self, head, tail):
        """How many bytes the file should have; 0: it does not say."""
        if self._form == "mov":
            return max(entry.pos + entry.size for entry in self._stream.index_entries)
        if self._form == "matroska":
            return _matroska_size(head)
        if self._form == "asf":  # it stands in the header's file properties
            rest = head.partition(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))[2]
            return int.from_bytes(rest[24:32], "little")
        # A GIF ends in the mark for that, or at least in that of a frame's end.
        cut = self._form == "gif" and not tail.rstrip(b"\r\n").endswith((b";", b"\0"))
        return math.inf if cut else 0

    # -- the index

    def _read_stamps(self):
        """Reads the file through, without decoding -> [Stamp, ...] in its order."""
        stamps = []
        self._by_rank = False  # frames are told by their order, not by their time stamps
        with reading(self.path, "truncated"):
            for packet in self._packets():
                # So a cut mp4 ends. Decoding its first frames alone would not notice.
                if packet.is_corrupt and not self._recorded:
                    raise MediaError("", "truncated", "the file ends inside a frame")
                if packet.size == 0:
                    continue
                # Old codecs in AVI and Matroska have only the time of decoding.
                self._by_rank |= packet.pts is None
                time = packet.dts if packet.pts is None else packet.pts
                if time is not None:
                    length, key = packet.duration or 0, packet.is_keyframe
                    shown = not packet.is_discard
                    stamps.append(Stamp(time, packet.dts, length, packet.size, key, shown))
                if len(stamps) > MAX_SOURCE_FRAMES:
                    raise MediaError("", "too_large", f"over {MAX_SOURCE_FRAMES} frames")
        return stamps

    def _index(self, stamps):
        """Sets times and duration. The first time need not be 0, nor the frame rate constant."""
        rate = self._stream.average_rate or self._stream.guessed_rate or 25
        self._base = float(self._stream.time_base)
        stamps = self._rebased(stamps, round(1 / float(rate) / self._base))
        # Without the frames before the first key frame, in the file or on screen: they need others
        # that are not there.
        stamps = list(dropwhile(lambda stamp: not stamp.key, stamps)) or stamps
        shown = sorted(s for s in stamps if s.shown and s.time >= stamps[0].time)
        if not shown:
            raise MediaError("", "corrupt", "no video packets that are shown")
        self._stamps = [stamp.time for stamp in shown]  # ascending, one for each frame
        self._known = set(self._stamps)
        if self._form == "mpeg" and len(self._known) < len(shown):
            # Not all frames of such a file have a time, and FFmpeg guesses wrong: spread evenly.
            ends = self._stamps[0], self._stamps[-1]
            self._stamps = np.linspace(*ends, len(shown)).round().astype(int).tolist()
            self._by_rank = True
        # AVI has no times of presentation: where frames are reordered, FFmpeg's guess is wrong.
        self._by_rank |= self._form == "avi" and self._stream.codec_context.has_b_frames
        self.times = np.subtract(self._stamps, self._stamps[0]) * self._base
        # WebM does not say how long the last frame stays: then as long as most.
        gaps = np.diff(self.times)
        last = shown[-1].duration * self._base or (len(gaps) and np.median(gaps)) or 1 / rate
        self.duration = float(self.times[-1] + last)
        self._keys = [stamp for stamp in stamps if stamp.key]
        times = [key.time for key in self._keys]
        self._key_ranks = np.searchsorted(self._stamps, times)
        # APNG calls each frame a key frame.
        in_order = times == sorted(set(times)) and self._form != "apng"
        self._seekable = in_order and not self._by_rank and len(times) > 1

    def _rebased(self, stamps, gap):
        """Recordings put together: time goes on where it jumps back, or ahead by hours."""
        rebased, shift, last = [], 0, None
        for stamp in stamps:
            if stamp.dts is not None:
                if last is not None and not -1 <= (stamp.dts - last) * self._base <= 3600:
                    shift += last + gap - stamp.dts
                    self._by_rank = True
                last = stamp.dts
            rebased.append(stamp._replace(time=stamp.time + shift))
        return rebased

    # -- frames

    def frames(self, wanted: list[float]) -> Iterator[np.ndarray]:
        """Ascending seconds -> the frame on screen at each, upright: uint8 (H, W, 3).

        Decoded is from the key frame before each. Where that might give other frames than decoding
        from the start does, all before it is decoded.
        """
        wanted = list(wanted)
        done = 0
        # One for all frames, with one thread: ten times cheaper than each frame's own conversion.
        converter = VideoReformatter()
        with reading(self.path):
            for source in (self._by_seeking, self._from_start):
                for shown in source(wanted[done:]):
                    yield self._upright_rgb(shown, converter)
                    done += 1

    def _upright_rgb(self, frame, converter):
        if self._webp is not None:
            return np.asarray(to_rgb(frame))
        form = "rgba" if self._form in ("gif", "apng") else "rgb24"
        pixels = converter.reformat(frame, format=form, threads=1).to_ndarray()  # (H, W, 3 or 4)
        if form == "rgba":
            pixels = np.asarray(to_rgb(Image.fromarray(pixels)))
        # PyAV reads the rotation, counter-clockwise, but does not apply it.
        return np.rot90(pixels, k=round(frame.rotation / 90) % 4)

    def _from_start(self, wanted):
        if not wanted:
            return
        if self._webp is not None:
            yield from on_screen(self._webp_frames(), wanted)
            return
        self._open()  # anew: not every container finds back to its beginning
        packets = self._packets()
        if self._keys:
            packets = dropwhile(lambda packet: not packet.is_keyframe, packets)
        yield from on_screen(self._undamaged(packets), wanted)

    def _undamaged(self, packets):
        """Packets from a key frame on -> yields (seconds, frame), none of them damaged."""
        time = good = 0
        for time, frame in self._decode(packets):
            if not frame.is_corrupt:
                good += 1
                yield time, frame
        if good == 0:
            raise MediaError("", "corrupt", "no frame could be decoded")
        if time < 0.8 * self.times[-1]:
            detail = f"frames end at {time:.1f} of {self.times[-1]:.1f} s"
            raise MediaError("", "truncated", detail)

    def _decode(self, packets, strict=False):
        """Packets from a key frame on -> yields (seconds, frame), in order of presentation."""
        count = lost = 0
        for packet in packets:
            try:
                frames = packet.decode()
            except FFmpegError as e:
                # ours: players pass over what is damaged; more than a fifth is too much.
                lost += 1
                if strict or lost > 5 + 0.2 * count:
                    raise MediaError("", "corrupt", e) from e
                continue
            for frame in frames:
                yield self._time_of(frame, count + lost), frame
                count += 1

    def _time_of(self, frame, rank):
        """The seconds at which a frame is shown, which is the rank-th that was decoded."""
        if self._by_rank or frame.pts is None:
            return self.times[min(rank, len(self.times) - 1)]
        return (frame.pts - self._stamps[0]) * self._base

    # -- seeking

    def _by_seeking(self, wanted):
        """The frames at as many of the wanted seconds as it is sure of."""
        if self._seekable and wanted:
            try:
                for k, seconds in self._runs(wanted):
                    yield from on_screen(self._from_key(k), seconds)
            except (MediaError, FFmpegError, OverflowError):
                return

    def _runs(self, wanted):
        """(number of a key frame, the seconds to decode from it on), ..."""
        ranks = np.searchsorted(self.times, np.add(wanted, SLACK), side="right") - 1
        keys = np.searchsorted(self._key_ranks, ranks.clip(0), side="right") - 1
        # To seek pays where the key frame is far ahead of the frame that was wanted before.
        far = self._key_ranks[keys[1:]] > ranks[:-1] + NEAR
        cuts = np.flatnonzero(far) + 1
        return zip(keys[[0, *cuts]], np.split(wanted, cuts))

    def _from_key(self, k):
        """Yields (seconds, frame) from the k-th key frame on, the first of them the one it is.

        MediaError at whatever is odd: it may be another frame than decoding from the start gives.
        """
        key, start = self._keys[k], self.times[self._key_ranks[k]]
        target = key.time if key.dts is None else key.dts
        if self._recorded:
            # FFmpeg may land inside a frame, and give its time to the next one: a second earlier.
            target -= round(1 / self._base)
        self._container.seek(target, stream=self._stream)
        sought = (key.time, key.size)
        packets = dropwhile(lambda packet: (packet.pts, packet.size) != sought, self._packets())
        last = None
        for time, frame in self._decode(packets, strict=True):
            if time < start:
                continue  # it leads in the file, and may need frames before the key frame
            follows = time == start if last is None else time > last
            if frame.is_corrupt or not follows or frame.pts not in self._known:
                raise MediaError("", "corrupt", "not the frames that were indexed")
            last = time
            yield time, frame
        if last != self.times[-1]:
            raise MediaError("", "corrupt", "not all the frames that were indexed")

    # -- animated WebP is Pillow's: FFmpeg does not decode it

    def _open_webp(self):
        self._webp = Image.open(self._file, formats=["WEBP"])
        self.width, self.height = self._webp.size
        check_size(self.height, self.width, self._pixel_limit)
        # Like browsers: a frame that is to stay for no time stays for a tenth of a second.
        stays = [ms / 1000 if ms > 10 else 0.1 for ms in _webp_milliseconds(self._file)]
        if len(stays) != self._webp.n_frames or len(stays) < 2:
            raise MediaError("", "unsupported", "a picture, no animation")
        ends = np.cumsum(stays)
        self.times, self.duration = ends - stays, float(ends[-1])

    def _webp_frames(self):
        for k, time in enumerate(self.times):
            self._webp.seek(k)
            yield time, self._webp.copy()


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


# What files say of themselves


def _ends(file):
    """-> its first bytes, its last ones, and how many it has."""
    head = file.read(4096)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    return head, file.read(), size


def _matroska_size(head):
    """The size of the segment stands behind its mark; 0 where a recorder left it open."""
    rest = head.partition(b"\x18\x53\x80\x67")[2] or b"\xff"
    # As many bytes as the first one has leading zeros, and one more. All ones: not known.
    length = 9 - rest[0].bit_length()
    most = (1 << 7 * length) - 1
    size = int.from_bytes(rest[:length], "big") & most
    return 0 if size == most else len(head) - len(rest) + length + size


def _webp_milliseconds(file):
    """How long each frame of an animated WebP stays, by the heads of its ANMF chunks."""
    file.seek(12)
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[4:], "little")
        body = file.read(size + size % 2)
        if head[:4] == b"ANMF":
            yield int.from_bytes(body[12:15], "little")
