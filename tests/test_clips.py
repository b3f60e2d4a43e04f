"""common/clips.py: frames by time, from all containers, and what is refused and why."""

import base64
import random
import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image
from test_media import noise, pixels, reason
from test_pictures import exif_jpeg

from common import clips
from common.clips import Clip
from common.media import MediaError
from common.pictures import load_picture


def write_clip(
    path,
    n=48,
    fps=24,
    size=(64, 96),
    shade=lambda k: 4 * k,
    start=0,
    time=lambda k: k,
    rotation=0,
    container=None,
    tags=None,
):
    """Frame k, shown at start + time(k) / fps, is grey of level shade(k), its left half darker."""
    base = Fraction(1, 24000)
    with av.open(str(path), "w", options=container or {}) as out:
        out.metadata.update(tags or {})
        webm = str(path).endswith("webm")
        codec = "libvpx-vp9" if webm else "libx264"
        stream = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        stream.options = {"cpu-used": "8"} if webm else {"preset": "veryfast", "threads": "1"}
        if rotation:
            stream.set_display_rotation(rotation)
        for k in range(n):
            image = np.full((*size, 3), shade(k), np.uint8)
            image[:, : size[1] // 2] //= 2
            frame = av.VideoFrame.from_ndarray(image)
            frame.time_base = base  # the muxer may since have chosen another for its stream
            frame.pts = round((start + time(k) / fps) / base)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def shades(frames):
    """The grey levels of the frames' right sides."""
    return np.array([frame[:, -frame.shape[1] // 4 :].mean() for frame in frames])


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "a.mov"])
def test_frames_are_those_on_screen_at_their_times(tmp_path, name):
    write_clip(tmp_path / name)
    with Clip(name, tmp_path) as clip:
        assert (clip.height, clip.width, len(clip.times)) == (64, 96, 48)
        assert abs(clip.duration - 2) < 0.01
        frames = list(clip.frames([0, 0.5, 0.5, 1.0, 1.5, 9.0]))
    assert frames[0].shape == (64, 96, 3) and frames[0].dtype == np.uint8
    assert np.abs(shades(frames) - [0, 48, 48, 96, 144, 188]).max() <= 3


def test_a_last_frame_of_unknown_length_stays_as_long_as_most(tmp_path):
    write_clip(tmp_path / "a.webm", n=20, fps=10)
    with av.open(str(tmp_path / "b.webm"), "w") as out, av.open(str(tmp_path / "a.webm")) as whole:
        stream = out.add_stream_from_template(whole.streams[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.duration = 0
                out.mux(packet)
    with Clip("b.webm", tmp_path) as clip:
        assert clip.duration == pytest.approx(2.0)


def test_tags_that_are_no_text_do_not_matter(tmp_path):
    write_clip(tmp_path / "a.mp4", tags={"title": "caf\u00e9"})
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole.replace(b"caf\xc3\xa9", b"caf\xe9\xe9"))
    with Clip("a.mp4", tmp_path) as clip:
        assert len(clip.times) == 48


def test_a_clip_can_be_decoded_twice(tmp_path):
    write_clip(tmp_path / "a.mp4")
    with Clip("a.mp4", tmp_path) as clip:
        first, second = list(clip.frames([0, 1.0])), list(clip.frames([0, 1.0]))
    assert np.array_equal(first, second)


def test_a_variable_frame_rate_and_a_late_start(tmp_path):
    def time(k):  # 24 fast frames, then slow ones
        return k if k < 24 else 24 + 5 * (k - 24)

    write_clip(tmp_path / "v.mp4", n=30, time=time, shade=lambda k: 8 * k, start=5)
    times = np.array([time(k) / 24 for k in range(30)])
    wanted = [0, 0.5, 1.0, 1.5, 2.0]
    with Clip("v.mp4", tmp_path) as clip:
        assert np.abs(clip.times - times).max() < 1e-3
        frames = list(clip.frames(wanted))
    shown = [int(np.searchsorted(times, t + 0.002, side="right")) - 1 for t in wanted]
    assert shown == [0, 12, 24, 26, 28]
    assert np.abs(shades(frames) - [8 * k for k in shown]).max() <= 4


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_is_applied(tmp_path, rotation):
    write_clip(tmp_path / "r.mp4", n=24, rotation=rotation, shade=lambda k: 200)
    with Clip("r.mp4", tmp_path) as clip:
        assert (clip.height, clip.width) == (64, 96)  # as stored
        frame = next(clip.frames([0]))
    # Counter-clockwise by 90 degrees, the dark left half is below.
    dark = {90: frame[-10:], -90: frame[:10], 180: frame[:, -10:]}[rotation]
    assert frame.shape == ((64, 96, 3) if rotation == 180 else (96, 64, 3))
    assert abs(dark.mean() - 100) < 5


def test_files_that_are_no_clips(tmp_path):
    write_clip(tmp_path / "good.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\ngood.mp4\n#EXT-X-ENDLIST\n"
    session = "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (tmp_path / "note.txt").write_text("hello " * 200)
    (tmp_path / "sdp.mp4").write_text(session)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    for name in ("list.mp4", "list.m3u8", "concat.mp4", "note.txt", "sdp.mp4", "noise.mp4"):
        assert reason(Clip, name, tmp_path) in ("unsupported", "corrupt"), name
    (tmp_path / "empty.mp4").touch()
    assert reason(Clip, "empty.mp4", tmp_path) == "empty"


def test_containers_that_are_not_listed_are_refused(tmp_path):
    write_clip(tmp_path / "a.nut")
    assert reason(Clip, "a.nut", tmp_path) == "unsupported"
    (tmp_path / "a.nut").rename(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="no clip in mp4, mov, mkv, webm, avi, ts, mpg"):
        Clip("a.mp4", tmp_path)


def test_sound_alone_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "audio.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert reason(Clip, "audio.mp4", tmp_path) == "unsupported"


def test_a_codec_that_is_not_known_is_no_clip(tmp_path):
    write_clip(tmp_path / "a.mp4")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole.replace(b"avc1", b"zzzz"))
    assert reason(Clip, "a.mp4", tmp_path) == "unsupported"


def test_frames_are_limited_in_size_and_number(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4")
    assert reason(Clip, "a.mp4", tmp_path, pixel_limit=64 * 96 - 1) == "too_large"
    with Clip("a.mp4", tmp_path, pixel_limit=64 * 96) as clip:
        assert len(list(clip.frames([0, 1]))) == 2
    monkeypatch.setattr("common.clips.MAX_SOURCE_FRAMES", 47)
    assert reason(Clip, "a.mp4", tmp_path) == "too_large"


def test_frames_that_grow_beyond_the_limit_are_refused(tmp_path):
    write_clip(tmp_path / "small.webm", n=24)
    write_clip(tmp_path / "large.webm", n=24, size=(640, 960))
    with av.open(str(tmp_path / "a.webm"), "w") as out:
        stream = out.add_stream_from_template(av.open(str(tmp_path / "small.webm")).streams[0])
        for i, name in enumerate(("small.webm", "large.webm")):
            for packet in av.open(str(tmp_path / name)).demux(video=0):
                if packet.size:
                    packet.pts = packet.dts = packet.pts + 1000 * i
                    packet.stream = stream
                    out.mux(packet)
    with Clip("a.webm", tmp_path) as clip:
        sizes = [frame.shape[:2] for frame in clip.frames([0.0, 0.5, 1.0, 1.5])]
    assert (clip.height, clip.width) == (64, 96)
    assert sizes == [(64, 96)] * 2 + [(640, 960)] * 2
    assert reason(Clip, "a.webm", tmp_path, pixel_limit=100_000) == "corrupt"


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "fast.mp4"])
def test_cut_and_damaged_clips(tmp_path, name):
    rng = np.random.default_rng(0)
    container = {"movflags": "faststart"} if name == "fast.mp4" else None

    def shade(k):
        return rng.integers(0, 255, (64, 96, 3))

    write_clip(tmp_path / name, shade=shade, container=container)
    whole = (tmp_path / name).read_bytes()
    with Clip(name, tmp_path) as clip:
        assert len(list(clip.frames([0.0, 1.0]))) == 2
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert reason(Clip, name, tmp_path) in ("truncated", "corrupt")
    if name == "fast.mp4":
        assert reason(Clip, name, tmp_path) == "truncated"
        (tmp_path / name).write_bytes(whole[:2000] + rng.bytes(len(whole) - 2000))
        assert reason(Clip, name, tmp_path) == "corrupt"


# Encoders and containers

X264 = {"preset": "veryfast", "threads": "1"}
X265 = {"preset": "ultrafast", "x265-params": "keyint=9:bframes=3:pools=1:log-level=none"}
# (file, encoder, pixel format, options of the encoder or of a stream)
ENCODINGS = [
    ("x264.mp4", "libx264", "yuv420p", X264),
    ("x264.avi", "libx264", "yuv420p", X264),  # frames are reordered, but AVI does not say how
    ("x264.ts", "libx264", "yuv420p", X264),
    ("x264.flv", "libx264", "yuv420p", X264),
    ("x264.m2ts", "libx264", "yuv420p10le", X264),
    ("x265.mkv", "libx265", "yuv420p", X265),
    ("mpeg4.avi", "mpeg4", "yuv420p", {}),
    ("mpeg4.mov", "mpeg4", "yuv420p", {}),
    ("msmpeg4.avi", "msmpeg4", "yuv420p", {}),
    ("vp8.webm", "libvpx", "yuv420p", {"cpu-used": "8"}),
    ("vp9.webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8"}),
    ("mjpeg.avi", "mjpeg", "yuvj420p", {}),
    ("mpeg2.mpg", "mpeg2video", "yuv420p", {}),
    ("mpeg2.vob", "mpeg2video", "yuv420p", {}),
    ("mpeg2.ts", "mpeg2video", "yuv420p", {}),
    ("mpeg1.mpg", "mpeg1video", "yuv420p", {}),
    ("flv1.flv", "flv", "yuv420p", {}),
    ("wmv2.wmv", "wmv2", "yuv420p", {}),
    ("wmv1.asf", "wmv1", "yuv420p", {}),
    ("prores.mov", "prores_ks", "yuv422p10le", {}),
    ("ffv1.mkv", "ffv1", "yuv420p", {}),
    ("huffyuv.avi", "huffyuv", "yuv422p", {}),
    ("qtrle.mov", "qtrle", "rgb24", {}),
    ("h263.3gp", "h263", "yuv420p", {}),
    ("raw.avi", "rawvideo", "bgr24", {}),
    ("anim.gif", "gif", "gray", {}),
    ("anim.apng", "apng", "rgb24", {}),
]


def grey(k, size):
    return np.full((*size, 3), 20 + 5 * k, np.uint8)


def moving(k, size):
    """A picture that moves on: frames decoded from others than their own would show it."""
    image = noise(24, 12).resize((4 * size[1], 2 * size[0]), Image.Resampling.BICUBIC)
    x, y = 3 * k % (3 * size[1]), k % size[0]
    return np.ascontiguousarray(np.asarray(image)[y : y + size[0], x : x + size[1]])


def encode(
    path, codec, pix_fmt="yuv420p", options=None, draw=grey, n=40, gop=9, b=2, time=None, muxer=None
):
    """Frame k of draw(k, size), 25 a second or at time(k) / 25."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV has no {codec} here")
    size = (96, 128)
    with av.open(str(path), "w", options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        stream.codec_context.gop_size = gop
        if "vp" not in codec and "x26" not in codec:
            stream.codec_context.qmin, stream.codec_context.qmax = 2, 4
        if codec in ("libx264", "mpeg4", "mpeg2video") and not str(path).endswith("mpeg4.avi"):
            stream.codec_context.max_b_frames = b
        for k in range(n):
            frame = av.VideoFrame.from_ndarray(draw(k, size))
            frame.pts, frame.time_base = time(k) if time else k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


@pytest.mark.parametrize("name, codec, pix_fmt, options", ENCODINGS)
def test_frames_of_all_containers_are_the_right_ones(tmp_path, name, codec, pix_fmt, options):
    encode(tmp_path / name, codec, pix_fmt, options)
    (tmp_path / name).rename(tmp_path / "any.mp4")  # players look into the file
    with Clip("any.mp4", tmp_path) as clip:
        assert (clip.height, clip.width, len(clip.times)) == (96, 128, 40)
        assert np.abs(clip.times - np.arange(40) / 25).max() < 2e-3
        assert abs(clip.duration - 1.6) < 0.05
        for wanted in (range(0, 40, 3), [0, 39], [17]):
            levels = [frame.mean() for frame in clip.frames([k / 25 for k in wanted])]
            assert np.abs(np.array(levels) - [20 + 5 * k for k in wanted]).max() <= 2.4


def late(k):
    return k if k < 30 else 30 + 4 * (k - 30)


def x264(keyint, **keys):
    keys = {"keyint": keyint, "min-keyint": keyint, "scenecut": 0, "bframes": 3} | keys
    return X264 | {"x264-params": ":".join(f"{key}={value}" for key, value in keys.items())}


OPEN = {"open-gop": 1}
SOUGHT = [
    ("open5.mp4", "libx264", x264(5, **OPEN), {}),
    ("open20.mkv", "libx264", x264(20, **OPEN), {}),
    ("open20.ts", "libx264", x264(20, **OPEN), {}),
    ("closed20.mp4", "libx264", x264(20), {}),
    ("closed20.flv", "libx264", x264(20), {}),
    ("pyramid.mp4", "libx264", x264(30, bframes=8, ref=6), {}),
    ("intra.mp4", "libx264", x264(1), {}),
    ("refresh.mp4", "libx264", x264(15, **{"intra-refresh": 1, "bframes": 0}), {}),
    ("vfr.mp4", "libx264", x264(12), dict(time=late)),
    ("vfr.mkv", "libx264", x264(12), dict(time=late)),
    ("frag.mp4", "libx264", x264(12), dict(muxer={"movflags": "frag_keyframe+empty_moov"})),
    ("live.mkv", "libx264", x264(12), dict(muxer={"live": "1"})),
    ("open.hevc.mp4", "libx265", {"x265-params": X265["x265-params"] + ":open-gop=1"}, {}),
    ("open.hevc.ts", "libx265", {"x265-params": X265["x265-params"] + ":open-gop=1"}, {}),
    ("mpeg4.mp4", "mpeg4", {}, {}),
    ("mpeg4.avi", "mpeg4", {}, {}),
    ("mpeg2.ts", "mpeg2video", {}, {}),
    ("mpeg2.mpg", "mpeg2video", {}, {}),
    ("vp9.webm", "libvpx-vp9", {"cpu-used": "8", "lag-in-frames": "16"}, dict(gop=20)),
    ("vp8.webm", "libvpx", {"cpu-used": "8", "auto-alt-ref": "1"}, dict(gop=20)),
    ("wmv2.wmv", "wmv2", {}, {}),
    ("ffv1.mkv", "ffv1", {}, {}),
    ("anim.apng", "apng", {}, dict(pix_fmt="rgb24")),
    ("anim.gif", "gif", {}, dict(pix_fmt="rgb8")),
]


@pytest.mark.parametrize("name, codec, options, keys", SOUGHT)
def test_seeking_gives_the_frames_of_decoding_from_the_start(
    tmp_path, monkeypatch, name, codec, options, keys
):
    encode(tmp_path / name, codec, options=options, draw=moving, n=70, **keys)
    monkeypatch.setattr(clips, "NEAR", 0)  # so each key frame is sought
    with Clip(name, tmp_path) as clip:
        for step in (1, 4, 19):
            wanted = [float(time) for time in clip.times[::step]]
            sought = list(clip.frames(wanted))
            plain = [clip._upright_rgb(f, VideoReformatter()) for f in clip._from_start(wanted)]
            assert len(sought) == len(plain) == len(wanted)
            assert all(np.array_equal(a, b) for a, b in zip(sought, plain))
    assert all(not np.array_equal(a, b) for a, b in zip(plain, plain[1:]))


def test_few_frames_of_a_long_clip_cost_few(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", "libx264", options=x264(20), draw=moving, n=400)
    decoded = []
    time_of = Clip._time_of
    monkeypatch.setattr(
        Clip, "_time_of", lambda clip, frame, k: decoded.append(k) or time_of(clip, frame, k)
    )
    with Clip("a.mp4", tmp_path) as clip:
        list(clip.frames([0.0, 4.8, 12.0]))  # each is at a key frame
        assert len(decoded) < 20
        decoded.clear()
        list(clip.frames([k / 25 for k in range(400)]))
        assert 400 <= len(decoded) < 410  # once, without seeking in between


# Clips that players show though something about them is odd


def copied(tmp_path, source, target, start=0, earlier=0, muxer=None):
    """The packets from number `start` on, not encoded again, with time stamps moved ahead."""
    with av.open(str(tmp_path / source)) as whole:
        with av.open(str(tmp_path / target), "w", options=muxer or {}) as out:
            stream = out.add_stream_from_template(whole.streams.video[0])
            packets = [packet for packet in whole.demux(video=0) if packet.size]
            for packet in packets[start:]:
                packet.pts -= earlier
                packet.dts -= earlier
                packet.stream = stream
                out.mux(packet)


def levels(clip, first=0):
    """Frames by their grey levels, as numbers of what encode() drew, from `first` on."""
    return [round((frame.mean() - 20) / 5) - first for frame in clip.frames(list(clip.times))]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
def test_frames_before_the_first_key_frame_are_left_out(tmp_path, name):
    encode(tmp_path / "whole.mp4", "libx264", options=x264(12))
    copied(tmp_path, "whole.mp4", name, start=5)
    with Clip(name, tmp_path) as clip:
        assert clip.times[0] == 0 and len(clip.times) == 28
        assert levels(clip, first=12) == list(range(28))
        assert clip.duration == pytest.approx(28 / 25, abs=0.01)


def test_leading_frames_of_an_open_group_are_left_out(tmp_path):
    encode(tmp_path / "whole.mp4", "libx264", options=x264(12, **OPEN))
    with av.open(str(tmp_path / "whole.mp4")) as whole:
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        start = [k for k, packet in enumerate(packets) if packet.is_keyframe][2]
        assert packets[start + 1].pts < packets[start].pts  # it leads, and needs the group before
    copied(tmp_path, "whole.mp4", "a.mkv", start=start)
    with Clip("a.mkv", tmp_path) as clip:
        assert levels(clip, first=24) == list(range(16))


def test_edit_lists_and_late_starts(tmp_path):
    encode(tmp_path / "whole.mp4", "libx264", options=x264(12))
    with av.open(str(tmp_path / "whole.mp4")) as whole:
        frame = round(1 / 25 / whole.streams.video[0].time_base)
    copied(tmp_path, "whole.mp4", "edit.mp4", earlier=17 * frame)
    with Clip("edit.mp4", tmp_path) as clip:  # 12 to 16 are decoded, not shown
        assert levels(clip, first=17) == list(range(23))
    copied(tmp_path, "whole.mp4", "late.mp4", earlier=-50 * frame)
    with Clip("late.mp4", tmp_path) as clip:
        assert levels(clip) == list(range(40)) and clip.times[0] == 0


def test_recordings_begin_and_end_anywhere(tmp_path):
    encode(tmp_path / "whole.ts", "libx264", options=x264(12))
    whole = (tmp_path / "whole.ts").read_bytes()
    for skip in (188 * 30, 188 * 30 + 77):
        (tmp_path / "mid.ts").write_bytes(whole[skip:])
        with Clip("mid.ts", tmp_path) as clip:
            first = 40 - len(clip.times)
            assert first in (12, 24) and levels(clip, first) == list(range(len(clip.times)))
    (tmp_path / "cut.ts").write_bytes(whole[: len(whole) * 2 // 3])
    with Clip("cut.ts", tmp_path) as clip:
        assert levels(clip)[:20] == list(range(20))
    (tmp_path / "twice.ts").write_bytes(whole + whole)  # its time stamps jump back
    with Clip("twice.ts", tmp_path) as clip:
        assert clip.duration == pytest.approx(3.2, abs=0.05)
        assert levels(clip) == [*range(40), *range(40)]


def test_live_recordings_have_no_length(tmp_path):
    for name, codec, muxer in (
        ("live.webm", "libvpx-vp9", {"live": "1"}),
        ("frag.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("each.mp4", "libx264", {"movflags": "frag_every_frame+empty_moov"}),
    ):
        encode(tmp_path / name, codec, muxer=muxer)
        with Clip(name, tmp_path) as clip:
            assert levels(clip) == list(range(40)), name
    live = (tmp_path / "live.webm").read_bytes()
    (tmp_path / "live.webm").write_bytes(live[: len(live) // 2])
    with Clip("live.webm", tmp_path) as clip:
        assert levels(clip) == list(range(len(clip.times)))


def test_the_length_that_a_header_states_may_be_wrong(tmp_path):
    encode(tmp_path / "a.webm", "libvpx-vp9")
    whole = (tmp_path / "a.webm").read_bytes()
    at = whole.find(b"\x44\x89\x88") + 3  # duration, a double of milliseconds
    assert struct.unpack(">d", whole[at : at + 8]) == (1600,)
    for wrong in (16.0, 160_000.0):
        (tmp_path / "a.webm").write_bytes(whole[:at] + struct.pack(">d", wrong) + whole[at + 8 :])
        with Clip("a.webm", tmp_path) as clip:
            assert len(clip.times) == 40 and clip.duration == pytest.approx(1.6)


def test_a_file_that_ends_between_two_frames_is_truncated_too(tmp_path):
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.wmv", "wmv2")):
        muxer = {"movflags": "faststart"} if name == "a.mp4" else None
        encode(tmp_path / name, codec, muxer=muxer)
        whole = (tmp_path / name).read_bytes()
        with av.open(str(tmp_path / name)) as clip:
            ends = [p.pos + p.size for p in clip.demux(video=0) if p.size and p.pos is not None]
        for end in ends[2:-2:5]:
            (tmp_path / name).write_bytes(whole[:end])
            assert reason(Clip, name, tmp_path) == "truncated", (name, end)
    noise().save(tmp_path / "a.gif", save_all=True, append_images=[noise(seed=1)], duration=100)
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(whole[:-1])  # the mark of the end alone
    with Clip("a.gif", tmp_path) as clip:
        assert len(clip.times) == 2
    (tmp_path / "a.gif").write_bytes(whole[:-300])
    assert reason(Clip, "a.gif", tmp_path) == "truncated"


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif"])
def test_animations_are_clips(tmp_path, name):
    frames = []
    for k in range(6):
        rgba = np.zeros((40, 60, 4), np.uint8)
        rgba[..., 0] = 200  # red hidden under alpha 0
        rgba[:, 10 * k : 10 * k + 10] = (0, 0, 255, 255)
        frames.append(Image.fromarray(rgba))
    how = dict(lossless=True) if name == "a.webp" else {}
    stays = [50, 100, 200, 0, 30, 40]
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], duration=stays, disposal=2, **how
    )
    with Clip(name, tmp_path) as clip:
        times = [0, 0.05, 0.15, 0.35]
        assert clip.times[:4] == pytest.approx(times) and len(clip.times) == 6
        seen = list(clip.frames(list(clip.times)))
    for frame, given in zip(seen, frames):
        assert np.array_equal(frame, np.asarray(load_picture(given)))
    assert np.array_equal(seen[0], pixels(name, tmp_path))
    frames[0].save(tmp_path / "still.webp")
    assert reason(Clip, "still.webp", tmp_path) == "unsupported"
    assert reason(Clip, name, tmp_path, pixel_limit=40 * 60 - 1) == "too_large"


def test_a_clip_in_a_data_url(tmp_path):
    encode(tmp_path / "a.mp4", "libx264")
    text = base64.b64encode((tmp_path / "a.mp4").read_bytes()).decode()
    with Clip("data:video/mp4;base64," + text) as clip:
        assert levels(clip) == list(range(40))


# Whatever is in a file


def damaged(data, rng):
    data = bytearray(data)
    kind = rng.randrange(5)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[: at + 1]
    if kind == 1:
        for _ in range(rng.choice([1, 5, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at : at + 50] = bytes(50)
    elif kind == 3:
        for _ in range(rng.choice([1, 5, 20])):
            data[rng.randrange(min(1500, len(data)))] = rng.randrange(256)
    else:
        del data[at : at + rng.choice([1, 10, 200])]
    return data


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_by_name(tmp_path):
    rng = random.Random(0)
    for name, codec in (("a.mp4", "libx264"), ("a.ts", "libx264"), ("a.webm", "libvpx-vp9")):
        encode(tmp_path / name, codec, draw=moving, n=12, options=X264 if "x" in codec[:4] else {})
    for name, codec in (("a.avi", "mpeg4"), ("a.mpg", "mpeg2video"), ("a.wmv", "wmv2")):
        encode(tmp_path / name, codec, draw=moving, n=12)
    exif_jpeg(tmp_path / "a.jpg", (0x0112, 3, 1, b"\6"))
    for name in ("a.png", "a.webp", "a.gif", "a.tif", "a.jp2", "a.ico"):
        noise(40, 40).save(tmp_path / name)
    noise().save(tmp_path / "b.webp", save_all=True, append_images=[noise(seed=1)])
    read = refused = 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(25):
            path.write_bytes(damaged(whole, rng))
            try:
                if path.suffix in (".jpg", ".png", ".tif", ".jp2", ".ico"):
                    load_picture(path.name, tmp_path)
                else:
                    with Clip(path.name, tmp_path) as clip:
                        wanted = np.linspace(0, clip.duration, 5)
                        assert len(list(clip.frames(wanted))) == 5
                read += 1
            except MediaError as e:
                assert e.path == path.name
                refused += 1
    assert read > 50 and refused > 100


@pytest.mark.parametrize("error", [AttributeError, MemoryError, RecursionError, OverflowError])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error("inside\na decoder")

    encode(tmp_path / "a.mp4", "libx264")
    noise().save(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(MediaError, match=r"^a.png: (corrupt|too_large) .*inside.a decoder"):
            load_picture("a.png", tmp_path)
    for place in ("_upright_rgb", "_decode", "_index", "_open"):
        with monkeypatch.context() as patch:
            patch.setattr(Clip, place, fail)
            assert reason(Clip, "a.mp4", tmp_path) in ("corrupt", "too_large"), place


# Frames without time stamps, damaged frames


@pytest.fixture
def decoded_as(tmp_path):
    """Gives the frames (and their seconds) of a clip of 2 s whose decoder returns what is given."""

    def decoded(frames):
        write_clip(tmp_path / "a.mp4", start=5)
        with Clip("a.mp4", tmp_path) as clip:
            packet = SimpleNamespace(decode=lambda: frames)
            return list(clip._undamaged([packet]))

    return decoded


def test_damaged_frames_are_left_out(decoded_as):
    frames = [SimpleNamespace(pts=None, is_corrupt=k == 1) for k in range(49)]
    assert [frame for _, frame in decoded_as(frames)] == frames[:1] + frames[2:]
    with pytest.raises(MediaError, match="corrupt .no frame could be decoded"):
        decoded_as(frames[1:2])


def test_frames_without_a_time_are_evenly_spaced(decoded_as):
    frames = [SimpleNamespace(pts=None, is_corrupt=False) for _ in range(48)]
    seconds = [time for time, _ in decoded_as(frames)]
    assert seconds == pytest.approx([k / 24 for k in range(48)])
    with pytest.raises(MediaError, match="truncated .frames end at 0.8 of 2.0 s"):
        decoded_as(frames[:20])
