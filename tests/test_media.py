"""common/media.py: pictures of all kinds, frames by time, and what is refused and why."""

import os
import pickle
import struct
import zlib
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from common.media import Clip, MediaError, load_picture, open_media


def noise(width=56, height=56, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reason(call, *args, **keys):
    """Why a call fails; a clip is also decoded."""
    with pytest.raises(MediaError) as caught:
        result = call(*args, **keys)
        if isinstance(result, Clip):
            with result:
                list(result.frames([0.0, 0.5, 1.0, 1.5]))
    assert str(caught.value) and caught.value.path
    return caught.value.reason


def pixels(*args, **keys):
    return np.asarray(load_picture(*args, **keys))


def test_an_error_survives_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(MediaError("a.png", "truncated", "here")))
    assert str(error) == "a.png: truncated (here)" and error.reason == "truncated"
    assert str(MediaError("a.png", "empty")) == "a.png: empty"


# Pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = noise(40, 60)
    stored_of = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turn = stored_of[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels("a.png", tmp_path), np.asarray(upright))
    size = load_picture("a.png", tmp_path, header_only=True)
    assert size == (stored.height, stored.width)


def test_a_photograph_with_an_odd_tag_is_still_turned(tmp_path):
    entries = [
        struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0),
        struct.pack("<HHIi", 0x010F, 9, 1, -7),  # a signed number where a name is expected
        struct.pack("<HHIhh", 0x0101, 8, 1, -5, 0),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(sorted(entries)) + struct.pack("<I", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory
    noise(40, 60).save(tmp_path / "a.jpg", exif=exif)
    assert load_picture("a.jpg", tmp_path).size == (60, 40)


def test_alpha_is_laid_on_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200  # red hidden under alpha 0
    rgba[:, 4:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    seen = pixels("a.png", tmp_path)
    assert (seen[:, :4] == 255).all() and (seen[:, 4:] == (200, 0, 0)).all()
    assert (pixels("la.png", tmp_path)[:, :4] == 255).all()
    assert np.array_equal(pixels(rgba), seen)


def test_palettes_and_their_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "t.png", transparency=0)
    assert pixels("p.png", tmp_path)[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert pixels("t.png", tmp_path)[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_cmyk_and_bilevel_pictures(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert (np.abs(pixels("c.jpg", tmp_path).astype(int) - (254, 0, 0)) < 12).all()
    Image.new("1", (4, 4), 1).save(tmp_path / "b.png")
    assert (pixels("b.png", tmp_path) == 255).all()


def test_16_bit_grey_is_scaled_and_wider_values_are_refused(tmp_path):
    ramp = np.array([[0, 257, 400, 32896, 65535]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / "g.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "i.tif")
    for name in ("g.png", "i.tif"):
        assert pixels(name, tmp_path)[0, :, 0].tolist() == [0, 1, 2, 128, 255]
    for value in (-5, 65536):
        Image.fromarray(np.full((4, 4), value, np.int32)).save(tmp_path / "w.tif")
        assert reason(load_picture, "w.tif", tmp_path) == "unsupported"
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    assert reason(load_picture, "f.tif", tmp_path) == "unsupported"


def test_pictures_in_memory():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(pixels(grey), np.stack([grey] * 3, 2))
    assert np.array_equal(pixels(noise()), np.asarray(noise()))
    assert load_picture(grey, header_only=True) == (3, 4)
    assert reason(load_picture, np.ones((4, 4, 3), np.float32)) == "unsupported"
    assert reason(load_picture, np.ones((3, 30, 40), np.uint8)) == "unsupported"
    assert reason(load_picture, np.ones(4, np.uint8)) == "unsupported"
    assert reason(load_picture, np.ones((0, 4, 3), np.uint8)) == "empty"
    assert reason(load_picture, noise(), pixel_limit=100) == "too_large"
    assert reason(load_picture, 3) == "unsupported"


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels("a.gif", tmp_path) == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_half_a_picture_is_refused(tmp_path, name):
    noise(200, 200).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert reason(load_picture, name, tmp_path) in ("truncated", "corrupt")


def test_files_that_are_no_pictures_have_reasons(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "noise.jpg").write_bytes(bytes(range(256)))
    (tmp_path / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {
        "empty.jpg": "empty",
        "noise.jpg": "unsupported",
        "svg.png": "unsupported",
        "eps.jpg": "unsupported",
        "folder.jpg": "unsupported",
        "pipe.jpg": "unsupported",
        "gone.jpg": "missing",
        "a\0b": "missing",
        "x" * 5000: "missing",
    }
    for name, why in reasons.items():
        assert reason(load_picture, name, tmp_path) == why, name


def test_size_is_limited_by_the_header(tmp_path):
    Image.new("L", (300, 300)).save(tmp_path / "big.png")
    assert reason(load_picture, "big.png", tmp_path, pixel_limit=89_999) == "too_large"
    assert load_picture("big.png", tmp_path, pixel_limit=90_000, header_only=True) == (300, 300)
    bomb = bytearray((tmp_path / "big.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # claims 3.6 gigapixels
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert reason(load_picture, "bomb.png", tmp_path) == "too_large"


def test_paths_stay_in_their_folder(tmp_path):
    root = tmp_path / "set"
    (root / "deep").mkdir(parents=True)
    noise().save(tmp_path / "secret.png")
    noise().save(root / "deep/ok.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "deep/ok.png")
    refused = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        str(root / "deep/ok.png"),
        "link.png",
        "up/secret.png",
        "deep/../../secret.png",
        "http://localhost/x.png",
        "file:///etc/passwd",
        "concat:deep/ok.png",
        "data:image/png;base64,xx",
    ]
    for path in refused:
        assert reason(load_picture, path, root) == "outside", path
        assert reason(Clip, path, root) == "outside", path
    for path in ("deep/ok.png", "inner.png", "up/set/deep/ok.png"):
        assert load_picture(path, root).size == (56, 56)
    outside = str(tmp_path / "secret.png")
    assert load_picture(outside, root, allow_outside=True).size == (56, 56)
    with open_media("deep/ok.png", root) as file:
        assert file.read(4) == b"\x89PNG"


# Clips


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
    write_clip(tmp_path / "a.avi")
    assert reason(Clip, "a.avi", tmp_path) == "unsupported"


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
    monkeypatch.setattr("common.media.MAX_SOURCE_FRAMES", 47)
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


@pytest.fixture
def decoded_as(tmp_path):
    """Gives the frames (and their seconds) of a clip of 2 s whose decoder returns what is given."""

    def decoded(frames):
        write_clip(tmp_path / "a.mp4", start=5)
        with Clip("a.mp4", tmp_path) as clip:
            clip._container = SimpleNamespace(seek=lambda *_, **__: None, decode=lambda _: frames)
            return list(clip._decode())

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
