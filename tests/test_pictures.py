"""common/pictures.py: pictures of all kinds, and what is refused and why."""

import base64
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_media import noise, pixels, reason

from common.clips import Clip
from common.pictures import load_picture


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


def exif_jpeg(path, *entries, extra=b""):
    """A picture 40 wide and 60 high with these Exif entries: (tag, type, count, 4 bytes)."""
    directory = struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    tiff = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + extra
    noise(40, 60).save(path, "JPEG", exif=b"Exif\0\0" + tiff)


def test_orientation_is_read_in_whatever_type_it_is_written(tmp_path):
    entries = {
        "byte": (1, 1, b"\6"),
        "text": (2, 2, b"6\0"),
        "short": (3, 1, b"\6"),
        "two": (3, 2, b"\6\0\6\0"),
        "long": (4, 1, b"\6"),
    }
    for name, entry in entries.items():
        exif_jpeg(tmp_path / "a.jpg", (0x0112, *entry))
        assert load_picture("a.jpg", tmp_path).size == (60, 40), name
    at = struct.pack("<I", 8 + 2 + 12 + 4)
    exif_jpeg(tmp_path / "a.jpg", (0x0112, 5, 1, at), extra=struct.pack("<II", 6, 1))
    assert load_picture("a.jpg", tmp_path).size == (60, 40)
    exif_jpeg(tmp_path / "a.jpg", (0x0112, 5, 1, at), extra=struct.pack("<II", 6, 0))  # 6 / 0
    assert load_picture("a.jpg", tmp_path).size == (40, 60)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_that_is_not_legible_does_not_matter(tmp_path, name):
    outside, short = b"II*\0\xff\xff\0\0", b"II*\0\x08\0\0\0\5"
    for exif in (b"", b"Exif\0\0", b"garbage", outside, short):
        noise(40, 60).save(tmp_path / name, exif=b"Exif\0\0" + exif, dpi=(72, 72))
        assert load_picture(name, tmp_path).size == (40, 60)


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


def test_a_jpeg_may_lack_its_end_marker_and_nothing_else(tmp_path):
    for progressive in (False, True):
        noise(90, 70).save(tmp_path / "a.jpg", progressive=progressive)
        whole = (tmp_path / "a.jpg").read_bytes()
        seen = pixels("a.jpg", tmp_path)
        for cut in (1, 2):
            (tmp_path / "a.jpg").write_bytes(whole[:-cut])
            assert np.array_equal(pixels("a.jpg", tmp_path), seen)
        scans = [k for k in range(700, len(whole)) if whole[k : k + 2] == b"\xff\xda"]
        assert len(scans) == (7 if progressive else 0)  # and more before these
        for end in (-4, -10, -40, -400, *scans):
            (tmp_path / "a.jpg").write_bytes(whole[:end])
            assert reason(load_picture, "a.jpg", tmp_path) == "truncated"


def chunk(kind, data, checksum=None):
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def test_what_stands_beside_the_pixels_of_a_png_does_not_matter(tmp_path):
    noise(40, 60).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    seen = pixels("a.png", tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    beside = [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(20_000_000))),
        chunk(b"iCCP", b"x\0\0no zlib"),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 900_000)) * 80,
        chunk(b"iTXt", b"k" * 2_000_000),
        chunk(b"tEXt", b"a\0bc", checksum=0),
        chunk(b"pHYs", b"\1"),
    ]
    for data in beside:
        (tmp_path / "a.png").write_bytes(whole[:33] + data + whole[33:])
        assert np.array_equal(pixels("a.png", tmp_path), seen)
        # behind the pixels too, and with an orientation
        turn = chunk(b"eXIf", exif.tobytes()[6:])
        (tmp_path / "a.png").write_bytes(whole[:33] + turn + whole[33:-12] + data + whole[-12:])
        assert np.array_equal(pixels("a.png", tmp_path), np.rot90(seen, -1))
        (tmp_path / "a.png").write_bytes(whole[:33] + data + whole[33 : len(whole) // 2])
        assert reason(load_picture, "a.png", tmp_path) in ("truncated", "corrupt")


def test_profiles_of_a_jpeg_may_be_large_or_broken(tmp_path):
    for profile in (bytes(300_000), b"no profile"):
        noise(40, 60).save(tmp_path / "a.jpg", icc_profile=profile)
        assert load_picture("a.jpg", tmp_path).size == (40, 60)


def test_more_kinds_of_pictures(tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (32, 0, 64, 64))
    for name in ("a.jp2", "a.ppm", "a.ico", "a.bmp", "a.tif", "a.gif", "a.webp"):
        image.save(tmp_path / name)
        assert np.abs(pixels(name, tmp_path).astype(int) - np.asarray(image)).mean() < 4
    image.save(tmp_path / "m.jpg", "MPO", save_all=True, append_images=[noise(64, 64, seed=1)])
    assert load_picture("m.jpg", tmp_path).size == (64, 64)
    (tmp_path / "a.ppm").rename(tmp_path / "wrong.jpg")
    assert np.array_equal(pixels("wrong.jpg", tmp_path), np.asarray(image))


def test_a_grey_level_that_is_transparent_becomes_white(tmp_path):
    ramp = np.array([[0, 400, 65535]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / "g.png", transparency=400)
    assert pixels("g.png", tmp_path)[0, :, 0].tolist() == [0, 255, 255]


def test_data_urls_are_pictures(tmp_path):
    noise().save(tmp_path / "a.png")
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    lines = "\n".join(text[k : k + 76] for k in range(0, len(text), 76))
    for head in ("data:image/png;base64,", "data:image;base64,", "DATA:image/jpeg;BASE64,"):
        for body in (text, lines, text.rstrip("=")):
            assert np.array_equal(pixels(head + body, tmp_path), np.asarray(noise()))
    url = "data:image/png;base64," + text
    assert load_picture(url, header_only=True) == (56, 56)
    assert reason(load_picture, url, pixel_limit=56 * 56 - 1) == "too_large"
    wrong = {
        "data:image/png;base64,": "empty",
        "data:image/png;base64,a?b": "corrupt",
        "data:image/png;base64,abcde": "corrupt",
        "data:image/png;base64,QUJDRA==": "unsupported",
        "data:image/png;base64": "unsupported",
        "data:image/svg+xml,<svg/>": "unsupported",
    }
    for source, why in wrong.items():
        assert reason(load_picture, source, tmp_path) == why, source
    assert reason(load_picture, url[: len(url) // 2]) in ("truncated", "corrupt")
    assert reason(Clip, url, tmp_path) == "unsupported"


def test_a_colon_does_not_make_a_name_a_url(tmp_path):
    for name in ("IMG:2024.png", "c:a.png", "file:a.png", "12:30.png"):
        noise().save(tmp_path / name, "PNG")
        assert load_picture(name, tmp_path).size == (56, 56)


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


def test_phone_photos_are_within_the_limit_and_it_can_be_raised(tmp_path):
    Image.new("1", (9248, 6936)).save(tmp_path / "phone.png")
    assert load_picture("phone.png", tmp_path, header_only=True) == (6936, 9248)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "big.png")  # Pillow's own limit is 179 million
    assert reason(load_picture, "big.png", tmp_path, header_only=True) == "too_large"
    limits = dict(pixel_limit=200_000_000, header_only=True)
    assert load_picture("big.png", tmp_path, **limits) == (10_000, 20_000)
