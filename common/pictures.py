"""Pictures from files that nobody has vetted; common/media.py stands before.

    picture = load_picture("a.jpg", root="folder/of/the/data")     # a PIL picture, RGB, upright

From top to bottom: a picture is opened and decoded, then turned to RGB; the rest mends files that
viewers show though Pillow refuses them.

Not read, for want of a decoder that is safe: HEIC, SVG, EPS, PDF.
"""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from common.media import PICTURES, PIXEL_LIMIT, MediaError, check_size, open_media, reading

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
    if array.dtype != np.uint8 or (array.ndim, *array.shape[2:]) not in ((2,), (3, 3), (3, 4)):
        detail = f"{array.dtype} array {array.shape}, not uint8 (H, W[, 3|4])"
        raise MediaError("", "unsupported", detail)
    check_size(*array.shape[:2], array.size + 1)  # Pillow makes no picture without pixels
    return Image.fromarray(array)


def _decode(image, pixel_limit, header_only):
    # Pillow has read the header alone.
    check_size(image.height, image.width, pixel_limit)
    if header_only:
        return image.height, image.width
    image.load()
    # Not by ImageOps.exif_transpose: that writes all tags anew, and fails at one that is odd.
    turn = UPRIGHT.get(_orientation(image))
    return to_rgb(image if turn is None else image.transpose(turn))


def _orientation(image):
    """The Exif orientation, of whatever type cameras wrote it in; None where it is not legible."""
    try:
        value = image.getexif().get(0x0112)
        return int(value[0] if isinstance(value, (tuple, bytes)) else value)
    except Exception:  # as many kinds as there are ways to break a tag; viewers show the picture
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Picture of any mode -> RGB. Pillow alone would clip 16 bits and bare hidden pixels."""
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
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


# Files that viewers show though Pillow refuses them


def _mended(file):
    """The file without the faults that viewers pass over; None: it has none of these."""
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
    ended, padded = (io.BytesIO(data + more + b"\xff\xd9") for more in (b"", b"\xaa" * 64))
    first, second = (np.asarray(Image.open(file, formats=["JPEG"])) for file in (ended, padded))
    return ended if np.array_equal(first, second) else None


def _has_all_scans(data):
    """Whether the scans of a progressive JPEG bring every coefficient down to its last bit."""
    frame = re.search(rb"\xff\xc2.{7}(.)", data, re.DOTALL)  # the head of a progressive frame
    if frame is None:
        return True
    missing = {}  # (component, coefficient) -> bits to come
    for scan in re.finditer(rb"\xff\xda\0.(.)(.{11})", data[frame.start() :], re.DOTALL):
        head = scan[2]  # for each component its name and tables; then first, last and bit
        names = 2 * scan[1][0]
        if names <= 8:
            first, last, bit = head[names : names + 3]
            for component in head[:names:2]:
                missing |= {(component, k): bit & 15 for k in range(first, last + 1)}
    return len(missing) == 64 * frame[1][0] and not any(missing.values())
