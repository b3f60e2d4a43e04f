"""Conversations in, packed batches out: tokenizer, chat format, pictures and clips, 3D positions, packing, loading.

    processor = Processor("vocab-toy.json", **BUDGETS["toy"])
    sample = processor({"messages": [{"role": "user", "content": [...]}, ...]}, root="folder/of/its/media")
    batch = pack([sample, ...])
    for batches, info in Loader([("train/vqa.jsonl", 1.0)], processor, pack_tokens=1024, packs_per_step=8): ...

Sizes: one patch is 14x14 pixels, one token of the language model 2x2 patches (28x28 pixels). Grids count patches.
"""
import copy
import hashlib
import heapq
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import unicodedata
from array import array
from collections import Counter
from contextlib import ExitStack
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import tiktoken
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

log = logging.getLogger("data")

# ----------------------------------------------------------------------------------------------------------------------
# 1. Tokenizer

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")  # Qwen's
ADDED = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
         "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
         "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
         "<tool_response> </tool_response> <think> </think> <|point_start|> <|point_end|> <|ocr_text_start|> "
         "<|ocr_text_end|> <|clip_time_start|> <|clip_time_end|>").split()  # ids n, n+1, ... in this order
CONTROL = {t for i, t in enumerate(ADDED) if i in (0, 1, 2, 9, 10, 11, 12, 13)}  # "special": true in the official file
LONGEST_SPACE = 65_536  # ours: longer runs are cut to this
SPLIT_ADDED = re.compile("(" + "|".join(re.escape(t) for t in ADDED if t not in CONTROL) + ")")


def _byte_of_char():
    """GPT-2's table: every byte as one printable character; vocab.json is written in these characters."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return {**{chr(b): b for b in keep}, **{chr(256 + i): b for i, b in enumerate(rest)}}


class Tokenizer:
    """Byte-level BPE of Qwen/Keye from vocab.json alone (ids are merge ranks), plus the 32 added tokens after it.

    special: {added token: id}; n_base: entries of vocab.json; vocab_rows: rows of the embedding table.
    Raises ValueError naming the file when ids are missing, doubled or not ranks.
    """

    def __init__(self, vocab_path):
        self.path = Path(vocab_path)
        ranks = self._read_ranks()
        self.n_base = len(ranks)
        self.special = {t: self.n_base + i for i, t in enumerate(ADDED)}
        # Keye's table has 151,936 rows for 151,675 ids; other vocabularies: ours, the next multiple of 128.
        self.vocab_rows = 151936 if self.n_base == 151643 else -(-(self.n_base + len(ADDED)) // 128) * 128
        self._control_ids = {self.special[t] for t in CONTROL}
        self._bpe = tiktoken.Encoding(self.path.name, pat_str=PATTERN, mergeable_ranks=ranks,
                                      special_tokens=self.special)
        self._short = lru_cache(maxsize=65536)(self._encode)  # toy questions repeat: a hit costs 0.1 us, a miss 10 us

    def __reduce__(self):  # to loader workers that are not forked
        return Tokenizer, (self.path,)

    def _read_ranks(self):
        try:
            vocab = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise ValueError(f"{self.path}: not a JSON vocabulary ({e})") from e
        if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
            raise ValueError(f"{self.path}: expected one object of token text -> integer id")
        if odd := sorted(set(vocab.values()) ^ set(range(len(vocab))))[:3]:
            raise ValueError(f"{self.path}: the {len(vocab)} ids must be 0..{len(vocab) - 1}, once; wrong: {odd}")
        table, ranks = _byte_of_char(), {}
        for text, i in vocab.items():
            if not text or any(c not in table for c in text):
                raise ValueError(f"{self.path}: token {i} ({text!r}) is not written in byte-level characters")
            ranks[bytes(table[c] for c in text)] = i
        if missing := [b for b in range(256) if bytes([b]) not in ranks]:
            raise ValueError(f"{self.path}: no token for byte {missing[0]}: such text could not be encoded")
        return ranks

    def _encode(self, text, added):
        if len(text) > LONGEST_SPACE:  # tiktoken dies of a stack overflow on a third of a million spaces in a row
            text = re.sub(rf"(\s{{{LONGEST_SPACE}}})\s+", r"\1", text)
        parts = SPLIT_ADDED.split(text) if added and "<" in text else [text]
        ids = []
        for i, part in enumerate(parts):  # odd parts are added tokens
            ids += [self.special[part]] if i % 2 else self._bpe.encode_ordinary(unicodedata.normalize("NFC", part))
        return tuple(ids)

    def encode(self, text, added=False):
        """str -> list of ids. No text becomes an added token, unless added=True: then the ones a model may write
        (boxes, points, <think>, ...), still never a control token (<|im_start|>, <|image_pad|>, ...)."""
        return list(self._short(text, added) if len(text) < 256 else self._encode(text, added))

    def decode(self, ids, skip_special=False):
        """ids -> str, bytes that are no UTF-8 as U+FFFD; skip_special drops control tokens. ValueError: unknown id."""
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.n_base + len(ADDED)]:
            raise ValueError(f"token id {wrong[0]} has no text: {self.path} ends at {self.n_base + len(ADDED) - 1}")
        return self._bpe.decode([i for i in ids if not (skip_special and i in self._control_ids)], errors="replace")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Conversations

SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant", "tool")


def check_conversation(line):
    """ValueError saying what is wrong when `line` is not {"messages": [{"role", "content"}, ...]}."""
    messages = line.get("messages") if isinstance(line, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected an object with a non-empty list "messages"')
    for m, message in enumerate(messages):
        where = f"messages[{m}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise ValueError(f"{where}: content must be a string or a list")
        for i, item in enumerate(content):
            where = f"messages[{m}].content[{i}]"
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in ("text", "image", "video") or kind not in item:
                raise ValueError(f'{where}: expected {{"type": "text"|"image"|"video", and that key}}')
            if kind == "text" and not isinstance(item["text"], str):
                raise ValueError(f"{where}: text must be a string")
            if item[kind] is None or isinstance(item[kind], (bool, int, float, dict)):
                raise ValueError(f"{where}: {kind} must be a path")
            for key in ("fps", "width", "height", "duration", "fps_source"):
                value = item.get(key, 1)
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
                    raise ValueError(f"{where}: {key} must be a positive number")


def text_lines(path):
    """[(number, text)] of a JSONL file's lines that are not blank. A line ends at "\n" alone: JSON may hold U+2028."""
    lines = enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1)
    return [(number, text) for number, text in lines if text.strip()]


def write_lines(path, lines):
    """Writes dicts as JSONL, whole or not at all: beside the path, then renamed."""
    tmp = Path(path).with_suffix(".tmp")
    tmp.parent.mkdir(parents=True, exist_ok=True)
    with open(tmp, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    tmp.rename(path)


def versions(line):
    """A line's conversations: of a preference, messages followed by the "chosen" and by the "rejected" answer; else one."""
    if "chosen" not in line and "rejected" not in line:
        return [line]
    before = [m | {"loss": False} for m in line["messages"]]  # an earlier answer is no part of either
    answer = lambda key: {"role": "assistant", "content": line.get(key), "ended": line.get(f"{key}_ended", True)}
    return [{"messages": [*before, answer(key)]} for key in ("chosen", "rejected")]


def switch(messages, mode):
    """A copy of the messages with Keye's switch, "/think" and so on, right behind the last user text; None: as they are.
    Of several switches in a conversation the last one counts."""
    if mode is None:
        return messages
    at = max(i for i, m in enumerate(messages) if m["role"] == "user")
    content = messages[at]["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    last = max((i for i, item in enumerate(content) if item["type"] == "text"), default=None)
    if last is None:
        content.append({"type": "text", "text": f"/{mode}"})
    else:
        content[last] = content[last] | {"text": f"{content[last]['text']}/{mode}"}
    return [*messages[:at], messages[at] | {"content": content}, *messages[at + 1 :]]


def asked(line, mode):
    """The messages of a line before its answer, asked in a mode; auto_think is what no switch means."""
    return switch(line["messages"][:-1], None if mode == "auto_think" else mode)


def media_of(conversation):
    """All pictures and clips of a conversation, or of a preference with its answers, in order: [(item, kind)]."""
    contents = [m["content"] for m in conversation["messages"]] + [conversation.get(k) for k in ("chosen", "rejected")]
    return [(item, item["type"]) for c in contents if isinstance(c, list) for item in c if item["type"] != "text"]


def adopt(conversation, root, folder):
    """A copy of the conversation for a JSONL file in `folder`: its media are hard-linked (or copied) below folder/media
    from root, unless that is where they are; pictures in memory are written there as PNG. MediaError as the reader's."""
    here = os.path.realpath(root) == os.path.realpath(folder)

    def home(source):
        if here and not isinstance(source, Image.Image):
            return source
        target = Path(folder) / "media"
        if isinstance(source, Image.Image):
            target /= f"{hashlib.sha1(source.tobytes() + repr(source.size).encode()).hexdigest()[:20]}.png"
            new = not target.exists()
        else:
            open_media(source, root).close()  # refuses what the reader would refuse
            old, target = Path(root) / source, target / source
            new = not target.exists() or (old.stat().st_size, old.stat().st_mtime_ns) != (
                target.stat().st_size, target.stat().st_mtime_ns)  # a new file of the old name
        if new:
            target.parent.mkdir(parents=True, exist_ok=True)
            tmp = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            tmp.unlink(missing_ok=True)
            if isinstance(source, Image.Image):
                source.save(tmp, "PNG", compress_level=1)
            else:
                try:
                    os.link(os.path.realpath(old), tmp)
                except OSError:  # another file system
                    shutil.copy2(old, tmp)
            os.replace(tmp, target)
        return target.relative_to(folder).as_posix()

    conversation = copy.deepcopy(conversation)
    for item, kind in media_of(conversation):
        source = item[kind]
        item[kind] = [home(frame) for frame in source] if isinstance(source, list) else home(source)
    return conversation


def text_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(c.get("text", f"[{c['type']}]") for c in content)


def pictures_of(conversation, root=None, **limits):
    """The conversation's pictures at full size, for the sandbox. MediaError."""
    return [load_picture(item["image"], root, **limits) for item, kind in media_of(conversation) if kind == "image"]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Pictures and clips

PATCH, TOKEN = 14, 28  # pixels
PICTURES = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
CLIPS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"  # containers that cannot name other files
TAGS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}  # 19 reads any bytes as tags
MAX_SOURCE_FRAMES = 216_000  # ours: two hours at 30 fps


class MediaError(Exception):
    """A picture or clip that cannot be used. reason, one of: missing outside empty unsupported corrupt truncated
    too_large aspect."""

    def __init__(self, path, reason, detail=""):
        super().__init__(path, reason, detail)  # args as given, so that it survives the way out of a worker process
        self.path, self.reason, self.detail = str(path), reason, str(detail)

    def __str__(self):
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def open_media(path, root, allow_outside=False):
    """Open a data set's file for reading, in binary. Refuses URLs, anything whose real place (links followed) is not
    below root unless allow_outside, and whatever is not a regular file."""
    if not isinstance(path, (str, os.PathLike)):
        raise MediaError(path, "unsupported", f"a path was expected, not {type(path).__name__}")
    name = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):  # http://, file://, concat:, data:
        raise MediaError(name, "outside", "URLs and protocols are not followed")
    try:
        base = os.path.realpath(root or ".")
        real = os.path.realpath(os.path.join(base, name))
        if not allow_outside and (os.path.isabs(name) or os.path.commonpath([base, real]) != base):
            raise MediaError(name, "outside", f"leads out of {base}")
        # Links were resolved above, so a new one is an attack; NONBLOCK: opening a pipe must not wait for a writer.
        fd = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as e:
        raise MediaError(name, "missing", e) from e
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size == 0:
        os.close(fd)
        raise MediaError(name, *(["empty"] if stat.S_ISREG(info.st_mode) else ["unsupported", "not a regular file"]))
    return os.fdopen(fd, "rb")


def _to_rgb(image):
    """PIL picture of any mode -> RGB, upright, alpha on white, 16-bit grey scaled (a plain convert would clip it)."""
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; also 32-bit when its values are 16-bit ones
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise MediaError("", "unsupported", "32-bit grey values")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # no field-wide scale: guessing one would feed black pictures silently
        raise MediaError("", "unsupported", "floating-point pixels")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        paper.alpha_composite(image)
        image = paper
    return image if image.mode == "RGB" else image.convert("RGB")


def load_picture(source, root=None, allow_outside=False, pixel_limit=64_000_000, header_only=False):
    """Path, PIL picture or uint8 array (H, W[, 3 or 4]) -> RGB PIL picture (first frame of an animation).
    header_only: -> (height, width) as stored, pixels not decoded. Raises MediaError."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or source.ndim == 3 and source.shape[2] in (3, 4)):
            raise MediaError("<memory>", "unsupported", f"{source.dtype} array {source.shape}, not uint8 (H, W[, 3|4])")
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        name, file, image = "<memory>", None, source
    else:
        name, file = source, open_media(source, root, allow_outside)
    try:
        if file:
            image = Image.open(file, formats=PICTURES)
        if image.width * image.height > pixel_limit:  # known from the header: nothing was decoded yet
            raise MediaError(name, "too_large", f"{image.width}x{image.height} pixels, limit {pixel_limit}")
        if image.width * image.height == 0:
            raise MediaError(name, "empty", "no pixels")
        if header_only:
            return image.height, image.width
        image.load()
        return _to_rgb(image)
    except MediaError as e:
        raise MediaError(name, e.reason, e.detail) from None
    except Image.DecompressionBombError as e:
        raise MediaError(name, "too_large", e) from e
    except Image.UnidentifiedImageError as e:
        raise MediaError(name, "unsupported", f"no picture in {', '.join(PICTURES)}") from e
    except Exception as e:  # decoders fed with broken bytes raise OSError, SyntaxError, struct.error, ValueError, ...
        raise MediaError(name, "truncated" if "truncated" in str(e) else "corrupt", f"{type(e).__name__}: {e}") from e
    finally:
        if file:
            file.close()


class Clip:
    """One video file. times (F,) float64 seconds of every frame from the first one, in order of presentation;
    duration in seconds; height, width as stored (rotation not applied). Nothing is decoded before frames()."""

    def __init__(self, path, root=None, allow_outside=False, pixel_limit=64_000_000):
        self.path = path
        self.file = open_media(path, root, allow_outside)
        try:
            # A file object and both lists: playlists, concat scripts, subtitles as "video" and URLs are refused.
            self.container = av.open(self.file, **TAGS,
                                     options={"format_whitelist": CLIPS, "protocol_whitelist": "none"})
        except av.error.FFmpegError as e:
            self.file.close()
            refused = isinstance(e, av.error.ArgumentError)
            raise MediaError(path, "unsupported" if refused else "corrupt", f"no clip in {CLIPS}: {e}") from e
        try:
            self._index(pixel_limit)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()
        self.file.close()

    def _index(self, pixel_limit):
        container = self.container
        self.stream = stream = container.streams.best("video")
        if stream is None:
            raise MediaError(self.path, "unsupported", "no video stream")
        self.height, self.width = stream.height, stream.width
        if self.height * self.width > pixel_limit:
            raise MediaError(self.path, "too_large", f"{self.width}x{self.height} pixels, limit {pixel_limit}")
        context = stream.codec_context
        context.thread_count = 1  # loader workers are the parallelism; more threads would oversubscribe the cores
        context.options = {**context.options, "max_pixels": str(2 * pixel_limit)}  # 2: FFmpeg counts its padding
        stamps = []  # (presentation, or decoding, time; duration) in time_base units
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:  # how a cut mp4 ends; decoding only its first frames would not notice
                    raise MediaError(self.path, "truncated", "the file ends inside a frame")
                if packet.size and not packet.is_discard:
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    stamps.append((stamp, packet.duration or 0))
                if len(stamps) > MAX_SOURCE_FRAMES:
                    raise MediaError(self.path, "too_large", f"more than {MAX_SOURCE_FRAMES} frames")
        except av.error.FFmpegError as e:
            raise MediaError(self.path, "truncated", e) from e
        if not stamps:
            raise MediaError(self.path, "corrupt", "no video packets")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self.base, self.rate = float(stream.time_base), float(rate)
        if any(s is None for s, _ in stamps):
            self.first, self.start, self.times, last = None, 0, np.arange(len(stamps)) / self.rate, 1 / self.rate
        else:
            stamps.sort()
            self.first = self.start = stamps[0][0]
            self.times = np.array([s - self.first for s, _ in stamps]) * self.base
            gap = float(np.median(np.diff(self.times))) if len(stamps) > 1 else 1 / self.rate
            last = stamps[-1][1] * self.base or gap
        self.duration = float(self.times[-1]) + last
        # A cut webm ends without any error; its header still tells the length (other streams could explain a gap).
        told = (container.duration or 0) / av.time_base
        if "matroska" in container.format.name and len(container.streams) == 1 and self.duration < 0.8 * told:
            raise MediaError(self.path, "truncated", f"{self.duration:.1f} of {told:.1f} s")

    def frames(self, wanted):
        """wanted: ascending seconds -> yields uint8 (H, W, 3), the frame on screen at each, rotated upright."""
        done, shown, seen = 0, 0, None  # seen: last frame whose time has come
        to_rgb = VideoReformatter()  # one for all frames, one thread: 10 times cheaper than the default

        def upright(frame):  # PyAV tells the rotation but does not apply it
            pixels = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
            return np.rot90(pixels, k=round(frame.rotation / 90) % 4)

        try:
            self.container.seek(self.start, stream=self.stream)  # back to where the demuxer began
            for frame in self.container.decode(self.stream):
                if frame.is_corrupt:
                    continue
                known = self.first is not None and frame.pts is not None
                time = (frame.pts - self.first) * self.base if known else shown / self.rate
                shown += 1
                while seen is not None and done < len(wanted) and time > wanted[done] + 0.002:
                    yield upright(seen)  # 0.002: containers that round to milliseconds
                    done += 1
                if done == len(wanted):
                    return
                seen, when = frame, time
        except av.error.FFmpegError as e:
            raise MediaError(self.path, "corrupt", e) from e
        if seen is None:
            raise MediaError(self.path, "corrupt", "no frame could be decoded")
        if when < 0.8 * self.times[-1]:
            raise MediaError(self.path, "truncated", f"frames end at {when:.1f} of {self.times[-1]:.1f} s")
        for _ in wanted[done:]:
            yield upright(seen)


def smart_resize(height, width, min_tokens, max_tokens):
    """Released rule: sides to multiples of 28 px, area within min..max tokens, shape kept. -> (height, width) px.
    ValueError when one side is more than 200 times the other."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width}x{height}: sides differ by more than 200 times")
    h, w = (max(TOKEN, round(side / TOKEN) * TOKEN) for side in (height, width))
    low, high = min_tokens * TOKEN**2, max_tokens * TOKEN**2
    if h * w > high:
        scale = math.sqrt(height * width / high)
        h, w = (max(TOKEN, math.floor(side / scale / TOKEN) * TOKEN) for side in (height, width))
        # ours: a strip held at 28 px by the clamp would pass the budget (the released rule lets it)
        h, w = min(h, max_tokens * TOKEN), min(w, max_tokens * TOKEN)
    elif h * w < low:
        scale = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * scale / TOKEN) * TOKEN for side in (height, width))
    return h, w


def patchify(frames):
    """frames (t, H, W, 3) uint8 -> (t * H/14 * W/14, 588) uint8, patches in raster order, pixels as (channel, y, x)."""
    t, h, w, _ = frames.shape
    patches = frames.reshape(t, h // PATCH, PATCH, w // PATCH, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(-1, 3 * PATCH * PATCH)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Budgets, 5. positions, and the processor that joins all of the above

KEYE_BUDGET = dict(image_min=4, image_max=16384, frame_min=128, frame_max=768, video_max=24576)  # report, section 2.2
BUDGETS = {  # tokens; the small ones are ours: a picture of the toy world must cost a few tokens
    "toy": dict(image_min=4, image_max=16, frame_min=4, frame_max=9, video_max=96),
    "tiny": dict(image_min=4, image_max=36, frame_min=4, frame_max=16, video_max=192),
    "small": dict(image_min=4, image_max=256, frame_min=4, frame_max=64, video_max=1024),
    **{size: KEYE_BUDGET for size in ("0.6b", "1.7b", "4b", "8b")},
}


def vision_positions(grid, fps, start):
    """3D positions (3, t*h/2*w/2) int64 of one picture (fps None) or clip: time, row, column, all from `start`.
    Time advances by one per 0.5 s (report, section 2.2), rounded so that 29.97 or 0.9999 fps lose no step."""
    t, h, w = grid
    time = np.floor(np.arange(t) * 2 / (fps or 2) + 0.5).astype(np.int64)
    return np.stack(np.meshgrid(time, np.arange(h // 2), np.arange(w // 2), indexing="ij")).reshape(3, -1) + start


class Processor:
    """Conversation -> sample. Budgets in tokens: image_min..image_max per picture, frame_min..frame_max per frame,
    video_max per clip. pixel_limit: largest picture or frame decoded. allow_outside: media paths may leave the root.
    add_vision_id: "Picture 1: " before each picture, as Keye's template can."""

    def __init__(self, vocab_path, image_min=4, image_max=16384, frame_min=128, frame_max=768, video_max=24576,
                 pixel_limit=64_000_000, add_vision_id=False, allow_outside=False):
        if not (0 < image_min <= image_max and 0 < frame_min <= frame_max <= video_max):
            raise ValueError("budgets: want 0 < image_min <= image_max and 0 < frame_min <= frame_max <= video_max")
        self.tokenizer = Tokenizer(vocab_path)
        self.budget = dict(image_min=image_min, image_max=image_max, frame_min=frame_min, frame_max=frame_max,
                           video_max=video_max, pixel_limit=pixel_limit, add_vision_id=add_vision_id)
        self.__dict__.update(self.budget)
        self.allow_outside = allow_outside  # a right of the caller, never stored with a model
        special = self.tokenizer.special
        self.pads = {"image": special["<|image_pad|>"], "video": special["<|video_pad|>"]}

    @classmethod
    def from_pretrained(cls, folder, **changes):
        """Folder with vocab.json and preprocessor_config.json, ours or Keye's (whose file caps pictures at 1,280
        tokens: pass image_max=16384 for the report's budget)."""
        path = Path(folder) / "preprocessor_config.json"
        config = json.loads(path.read_text())
        for key, want in (("patch_size", 14), ("temporal_patch_size", 1), ("merge_size", 2),
                          ("image_mean", [0.5] * 3), ("image_std", [0.5] * 3)):
            if config.get(key, want) != want:
                raise ValueError(f"{path}: {key} is {config[key]}, only {want} is implemented")
        pixels = {k: config[f"{m}_pixels"] // TOKEN**2 for k, m in (("image_min", "min"), ("image_max", "max"))}
        return cls(Path(folder) / "vocab.json", **{**pixels, **config.get("budget", {}), **changes})

    def save_pretrained(self, folder):
        """Write vocab.json and preprocessor_config.json (official keys, and "budget" with ours)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_bytes(self.tokenizer.path.read_bytes())
        config = dict(min_pixels=self.image_min * TOKEN**2, max_pixels=self.image_max * TOKEN**2, patch_size=PATCH,
                      temporal_patch_size=1, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
                      processor_class="KeyeProcessor", budget=self.budget)
        (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")

    # -- chat format

    def _content(self, content, own, loss, head="", seen=None):
        """One message's content as pieces: (ids, has loss) or (kind, item). Neighbouring texts are encoded as one
        string, as the rendered template would be; only the model's own text may hold added tokens."""
        encode, special, pieces = self.tokenizer.encode, self.tokenizer.special, []
        seen = Counter() if seen is None else seen
        text, mine = head, own

        def flush():
            if text:
                pieces.append((encode(text, added=mine), mine and loss))
            return ""

        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = item["type"]
            # {"type": "text", "loss": false} in an assistant turn: a tool wrote it, so neither trained nor trusted
            now = own and kind == "text" and item.get("loss", True)
            if now != mine:
                text, mine = flush(), now
            if kind == "text":
                text += item["text"]
                continue
            seen[kind] += 1
            if self.add_vision_id:
                text += f"{'Picture' if kind == 'image' else 'Video'} {seen[kind]}: "
            text = flush()
            pieces += [([special["<|vision_start|>"]], False), (kind, item), ([special["<|vision_end|>"]], False)]
        flush()
        return pieces

    def _layout(self, messages, generate, continuing):
        """Keye's chat template as pieces. The header of an assistant turn is encoded apart from its text, since that
        is where generation starts."""
        encode = self.tokenizer.encode
        start, end = [self.tokenizer.special["<|im_start|>"]], [self.tokenizer.special["<|im_end|>"]]
        pieces, seen = [], Counter()
        if continuing:
            pieces.append((encode("\n"), False))
        elif messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        for message in messages:
            own, head = message["role"] == "assistant", message["role"] + "\n"
            loss = own and message.get("loss", True)
            pieces.append((start, False))
            if own:
                pieces.append((encode(head), False))
            pieces += self._content(message["content"], own, loss, "" if own else head, seen)
            pieces += [(end, loss and message.get("ended", True)), (encode("\n"), False)]  # "ended": false: it was cut off
        if generate:
            pieces += [(start, False), (encode("assistant\n"), False)]
        return pieces

    # -- media

    def clip_plan(self, duration, n_source=None, fps=None):
        """Seconds of a clip, its frame count, a wished fps -> (frames to take, their fps)."""
        # ours: the highest of 2 / 1 / 0.5 fps at which every frame still gets its minimum of tokens; when none does,
        # as many frames as the budget allows, evenly spread, with their true fps so that positions stay absolute time.
        most = min(self.video_max // self.frame_min, n_source or 1 << 30)
        for rate in (fps,) if fps else (2.0, 1.0, 0.5):
            n = max(1, round(duration * rate))
            if n <= most:
                return n, float(rate)
        return most, most / duration

    def _grid(self, path, kind, height, width, n=1):
        """Patch grid (t, h, w) of a picture or of n frames."""
        low, high = self.image_min, self.image_max
        if kind == "video":
            low, high = self.frame_min, max(self.frame_min, min(self.frame_max, self.video_max // n))
        try:
            h, w = smart_resize(height, width, low, high)
        except ValueError as e:
            raise MediaError(path, "aspect", e) from e
        return n, h // PATCH, w // PATCH

    def _thin(self, item):
        """Frames given as a list -> (those the budget allows, their fps)."""
        frames, fps = item["video"], float(item.get("fps", 2.0))
        if not frames:
            raise MediaError("<frames>", "empty")
        n, rate = self.clip_plan(len(frames) / fps, len(frames), fps)
        return [frames[int(k * len(frames) / n)] for k in range(n)], rate

    def _measure(self, kind, item, root):
        """Grid of a media item without decoding it: from its width, height, duration keys, else the file's header."""
        source, size = item[kind], (item.get("height"), item.get("width"))
        limits = dict(root=root, allow_outside=self.allow_outside, pixel_limit=self.pixel_limit)
        if kind == "image":
            return self._grid(source, kind, *(size if all(size) else load_picture(source, **limits, header_only=True)))
        if isinstance(source, (list, tuple)):
            frames, _ = self._thin(item)
            return self._grid("<frames>", kind, *load_picture(frames[0], **limits, header_only=True), len(frames))
        if all(size) and item.get("duration"):
            duration, n_source = item["duration"], round(item["duration"] * item.get("fps_source", 0)) or None
        else:
            with Clip(source, **limits) as clip:
                size, duration, n_source = (clip.height, clip.width), clip.duration, len(clip.times)
        return self._grid(source, kind, *size, self.clip_plan(duration, n_source, item.get("fps"))[0])

    def _load(self, kind, item, root):
        """Media item -> (patches (N, 588) uint8, grid, fps or None)."""
        source, fps, n = item[kind], None, 1
        name = source if isinstance(source, str) else "<memory>"
        limits = dict(root=root, allow_outside=self.allow_outside, pixel_limit=self.pixel_limit)
        with ExitStack() as stack:
            if kind == "image":
                frames = [load_picture(source, **limits)]
            elif isinstance(source, (list, tuple)):
                frames, fps = self._thin(item)
                frames, n = (load_picture(f, **limits) for f in frames), len(frames)
            else:
                clip = stack.enter_context(Clip(source, **limits))
                n, fps = self.clip_plan(clip.duration, len(clip.times), item.get("fps"))
                frames = (Image.fromarray(f) for f in clip.frames([k / fps for k in range(n)]))
            pixels = []
            for frame in frames:  # one at a time: a clip's full-size frames would fill the memory
                if not pixels:  # all frames take the first one's size
                    grid = self._grid(name, kind, frame.height, frame.width, n)
                    size = grid[2] * PATCH, grid[1] * PATCH
                pixels.append(np.asarray(frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC)))
        return patchify(np.stack(pixels)), grid, fps

    # -- samples

    def measure(self, conversation, root=None):
        """-> (text tokens, [(t, h, w), ...]) of the sample, nothing decoded. Placeholders are not text tokens."""
        text, grids = 0, []
        for first, second in self._layout(conversation["messages"], False, False):
            if isinstance(first, str):
                grids.append(self._measure(first, second, root))
            else:
                text += len(first)
        return text, grids

    def _sample(self, pieces, root, start):
        """Pieces -> (sample, next position)."""
        tokens, own, patches, media = [], [], [], []  # media: (first token, grid, fps)
        for first, second in pieces:
            ids, loss = first, second
            if isinstance(first, str):
                pixels, grid, fps = self._load(first, second, root)
                media.append((len(tokens), grid, fps))
                patches.append(pixels)
                ids, loss = [self.pads[first]] * (math.prod(grid) // 4), False
            tokens += ids
            own += [loss] * len(ids)
        tokens = np.array(tokens, dtype=np.int64)  # (T,)
        positions, at = np.empty((3, len(tokens)), np.int64), 0
        for i, grid, fps in media + [(len(tokens), None, None)]:  # text counts up; a picture's box begins at its end,
            positions[:, at:i] = np.arange(start, start + i - at)
            at, start = i, start + i - at
            if grid:
                span = vision_positions(grid, fps, start)
                at += span.shape[1]
                positions[:, i:at] = span
                start = int(span.max()) + 1  # and text goes on after its largest position on any axis
        labels = np.full_like(tokens, -100)
        labels[:-1] = np.where(own[1:], tokens[1:], -100)  # label i: the token after i
        patches = np.concatenate(patches) if patches else np.zeros((0, 3 * PATCH * PATCH), np.uint8)
        sample = dict(tokens=tokens, labels=labels, positions=positions, patches=patches,
                      grids=np.array([grid for _, grid, _ in media], dtype=np.int64).reshape(-1, 3))
        return {k: torch.from_numpy(v) for k, v in sample.items()} | {"pads": tuple(self.pads.values())}, start

    def __call__(self, conversation, root=None, generate=False, start=0, continuing=False):
        """Conversation -> sample: tokens (T,), labels (T,), positions (3, T) int64, patches (N, 588) uint8,
        grids (M, 3) int64. Media paths are relative to root. ValueError for a wrong form, MediaError for a bad file.

        generate: end with the open assistant turn, no labels, and add next_position (int) for the next token.
        continuing: more turns of a conversation already in a cache that ends with <|im_end|>; start: its next_position.
        """
        check_conversation(conversation)
        if generate and conversation["messages"][-1]["role"] == "assistant":
            raise ValueError("generate=True needs a prompt, but the last message is the assistant's: remove it first")
        sample, end = self._sample(self._layout(conversation["messages"], generate, continuing), root, start)
        if generate:
            sample["labels"].fill_(-100)
            sample["next_position"] = end
        return sample

    def extension(self, content, start, root=None):
        """Content (text and pictures that a tool returns) inside an open assistant turn -> sample without labels,
        positions from `start`, next_position included."""
        check_conversation({"messages": [{"role": "tool", "content": content}]})
        pieces = self._content(content, False, False)
        if not pieces:
            raise ValueError("extension: the content is empty")
        sample, end = self._sample(pieces, root, start)
        return sample | {"next_position": end}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Packing


def pack(samples):
    """Samples -> one packed batch: all end to end, segments (S+1,) int32 the starts of the samples. Positions
    restart in every sample, and no label reaches over its end. ValueError when placeholders and grids disagree."""
    if not samples:
        raise ValueError("pack: no samples")
    for i, s in enumerate(samples):
        places = sum(int((s["tokens"] == pad).sum()) for pad in s["pads"])
        patches = int(s["grids"].prod(1).sum())
        if 4 * places != patches or patches != len(s["patches"]):
            raise ValueError(f"pack: sample {i} has {places} picture placeholders, {patches} patches in its grids "
                             f"(4 per placeholder expected), and {len(s['patches'])} patches")
    batch = {k: torch.cat([s[k] for s in samples]) for k in ("tokens", "labels", "patches", "grids")}
    batch["positions"] = torch.cat([s["positions"] for s in samples], 1)  # (3, T)
    ends = np.cumsum([len(s["tokens"]) for s in samples])
    batch["segments"] = torch.tensor([0, *ends], dtype=torch.int32)
    batch["labels"][ends - 1] = -100
    return batch


# ----------------------------------------------------------------------------------------------------------------------
# 7. Loading


class Lines:
    """A JSONL file by the byte offsets of its good lines; every line is parsed once, here. ValueError with file:line
    when more than max_bad_share of the lines are bad, or all."""

    def __init__(self, path, max_bad_share):
        self.path, self.root = Path(path), Path(path).resolve().parent
        starts, sizes, numbers, offset, self.bad = array("q"), array("q"), array("q"), 0, []
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        self.parse(line)
                        starts.append(offset), sizes.append(len(line)), numbers.append(number)
                    except (ValueError, RecursionError) as e:
                        self.bad.append((f"{self.path}:{number}", str(e)))
                offset += len(line)
        self.starts, self.sizes, self.numbers = (np.array(a) for a in (starts, sizes, numbers))
        if not len(starts) or len(self.bad) > max_bad_share * (len(starts) + len(self.bad)):
            where, why = self.bad[0] if self.bad else (self.path, "no lines")
            raise ValueError(f"{where}: {why} ({len(self.bad)} bad and {len(starts)} good lines in this file)")
        for where, why in self.bad[:3]:
            log.warning("skipped line %s: %s", where, why)
        if self.bad:
            log.warning("%s: %d bad lines skipped, %d good", self.path, len(self.bad), len(starts))
        # sizes of samples, filled when first met: text tokens, visual tokens, FLOPs
        self.text, self.visual = np.full(len(starts), -1, np.int32), np.zeros(len(starts), np.int32)
        self.cost = np.zeros(len(starts))

    def __len__(self):
        return len(self.starts)

    @staticmethod
    def parse(line):
        line = json.loads(line)
        check_conversation(line)
        for conversation in versions(line):
            check_conversation(conversation)
            if all(m["role"] != "assistant" for m in conversation["messages"]):
                raise ValueError("no assistant message: nothing to learn")
        return line

    def __getitem__(self, i):
        with open(self.path, "rb") as file:  # opened each time: 10 us, and nothing is shared between processes
            file.seek(self.starts[i])
            return self.parse(file.read(self.sizes[i]))


class Loader:
    """Endless iterator of (batches, info), one item per optimizer step: this rank's packed batches, and
    info = {"state", "step_tokens", "visual_tokens", "flops", "skipped", "bad", "epoch"}.

    mixture: [(JSONL path, weight), ...]. pack_tokens: most tokens in a batch. packs_per_step: batches of a step on all
    ranks together. flops(text_tokens, grids) -> float: cost of one sample, to balance packs (report, section 5).
    The plan of a step is a function of the seed and the state alone, never of rank, world, workers or timing; so
    Loader(state=info["state"]) goes on with exactly the next sample, on any number of ranks dividing packs_per_step.

    step_tokens, visual_tokens, flops: estimates over all ranks. skipped {reason: count} and bad [(path, reason)]: this
    rank's; they add up over ranks. epoch: passes over each data set, as floats. Each batch has its own "skipped".
    RuntimeError when more than max_bad_share of at least 100 samples fail.
    """

    def __init__(self, mixture, processor, pack_tokens, packs_per_step, rank=0, world=1, seed=0, flops=None, workers=0,
                 max_bad_share=0.05, state=None):
        if packs_per_step % world:
            raise ValueError(f"packs_per_step {packs_per_step} must be a multiple of the {world} ranks")
        if not mixture or any(not 0 < w < math.inf for _, w in mixture):
            raise ValueError("mixture: at least one data set, and every weight positive")
        self.processor, self.pack_tokens, self.packs_per_step = processor, pack_tokens, packs_per_step
        self.rank, self.world, self.seed, self.workers = rank, world, seed, workers
        self.flops = flops or (lambda text, grids: text + 1.25 * sum(map(math.prod, grids)))  # ours: linear
        self.max_bad_share = max_bad_share
        self.data = [Lines(path, max_bad_share) for path, _ in mixture]
        self.edges = np.cumsum([w for _, w in mixture]) / sum(w for _, w in mixture)
        self.identity = [seed, pack_tokens, packs_per_step,
                         *([d.path.name, len(d), w] for d, (_, w) in zip(self.data, mixture))]
        fresh = dict(step=0, drawn=0, taken=[0] * len(self.data), deferred=[], identity=self.identity)
        self.state = json.loads(json.dumps(state or fresh))
        if self.state["identity"] != json.loads(json.dumps(self.identity)):
            raise ValueError(f"the loader state belongs to seed, pack_tokens, packs_per_step, data sets "
                             f"{self.state['identity']}, not to {self.identity}")
        self.seen = self.failed = 0  # of this rank, in this process
        self._draws = lru_cache(maxsize=2)(lambda block: self._rng(0, block).random(4096))
        self._orders = lru_cache(maxsize=2 * len(self.data))(
            lambda d, epoch: self._rng(1, d, epoch).permutation(len(self.data[d])))

    def _rng(self, *key):  # counter-based: any draw of any epoch without the ones before it
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *key])))

    def _draw(self, state):
        """Next (data set, line) of the mixture; each data set walks through its own permutation of every epoch."""
        block, k = divmod(state["drawn"], 4096)
        d = min(int(np.searchsorted(self.edges, self._draws(block)[k], side="right")), len(self.data) - 1)
        epoch, k = divmod(state["taken"][d], len(self.data[d]))
        state["drawn"] += 1
        state["taken"][d] += 1
        return d, int(self._orders(d, epoch)[k])

    def _size(self, d, i):
        """Tokens of line i of data set d, estimated without decoding; fills its FLOPs."""
        data = self.data[d]
        if data.text[i] < 0:
            sizes = [self.processor.measure(c, data.root) for c in versions(data[i])]
            text, grids = sum(t for t, _ in sizes), [g for _, grids in sizes for g in grids]
            data.visual[i], data.cost[i] = sum(map(math.prod, grids)) // 4, self.flops(text, grids)
            data.text[i] = text
        return int(data.text[i] + data.visual[i])

    def _check(self, seen, failed, last):
        if seen >= 100 and failed > self.max_bad_share * seen:
            raise RuntimeError(f"{failed} of {seen} samples failed, more than the allowed share {self.max_bad_share}; "
                               f"the last: {last[0]}: {last[1]}")

    def _plan(self, state):
        """The packs of the step after `state` (which is advanced): samples are drawn until they fill the step's token
        room, sorted by FLOPs, and each goes to the least loaded pack with room; the rest waits for the next step."""
        chosen, skipped, bad, draws = [tuple(x) for x in state["deferred"]], Counter(), [], 0
        total = sum(self._size(*x) for x in chosen)
        while total < self.packs_per_step * self.pack_tokens:
            d, i = self._draw(state)
            draws += 1
            try:
                size = self._size(d, i)
            except (MediaError, ValueError) as e:
                bad.append(self._failure(d, i, e))
                skipped[bad[-1][1]] += 1
                self._check(draws, len(bad), bad[-1])
                continue
            if size > self.pack_tokens:
                skipped["too_long"] += 1
                if not chosen and skipped["too_long"] > 100 + 2 * sum(map(len, self.data)):
                    raise ValueError(f"no sample fits into pack_tokens={self.pack_tokens}")
                continue
            chosen.append((d, i))
            total += size
        packs, used = [[] for _ in range(self.packs_per_step)], [0] * self.packs_per_step
        loads = [(0.0, p) for p in range(self.packs_per_step)]  # a heap: least loaded first
        deferred = []
        for k in sorted(range(len(chosen)), key=lambda k: (-self.data[chosen[k][0]].cost[chosen[k][1]], k)):
            d, i = chosen[k]
            full = []
            while loads and used[loads[0][1]] + self._size(d, i) > self.pack_tokens:
                full.append(heapq.heappop(loads))
            if loads:
                load, p = heapq.heappop(loads)
                packs[p].append((d, i))
                used[p] += self._size(d, i)
                heapq.heappush(loads, (load + self.data[d].cost[i], p))
            else:
                deferred.append(k)
            for x in full:
                heapq.heappush(loads, x)
        state["deferred"] = [chosen[k] for k in sorted(deferred)]
        state["step"] += 1
        inside = [x for members in packs for x in members]
        info = dict(state=json.loads(json.dumps(state)), step_tokens=sum(used),
                    visual_tokens=sum(int(self.data[d].visual[i]) for d, i in inside),
                    flops=float(sum(self.data[d].cost[i] for d, i in inside)),
                    skipped=dict(skipped) if self.rank == 0 else {}, bad=bad if self.rank == 0 else [],
                    epoch=[taken / len(data) for taken, data in zip(state["taken"], self.data)])
        return packs[self.rank::self.world], info

    def _failure(self, d, i, error):
        where = f"{self.data[d].path}:{self.data[d].numbers[i]}"
        if isinstance(error, MediaError):
            return f"{where}: {error.path}", error.reason
        return f"{where}: {error}", "bad_line"

    def _plans(self):
        state = json.loads(json.dumps(self.state))
        while True:
            yield self._plan(state)

    def __iter__(self):
        """Goes on after the last step that was yielded, also when an earlier iteration was left."""
        decode = _Decode(self.processor, self.data, self.pack_tokens)
        if self.workers:
            # fork: workers start at once and share the index. This process decodes nothing that could hold locks.
            how = "fork" if sys.platform == "linux" else None
            steps = iter(torch.utils.data.DataLoader(
                decode, batch_size=None, sampler=self._plans(), num_workers=self.workers, worker_init_fn=_one_thread,
                multiprocessing_context=how, collate_fn=_as_is))
        else:
            steps = map(decode.__getitem__, self._plans())
        for batches, info, seen, failed in steps:
            self.seen, self.failed = self.seen + seen, self.failed + failed
            for path, reason in info["bad"][:3]:
                log.warning("skipped %s: %s", path, reason)
            if info["bad"]:
                self._check(self.seen, self.failed, info["bad"][-1])
            self.state = info["state"]
            yield batches, info


def _one_thread(_):
    torch.set_num_threads(1)


def _as_is(step):
    return step


class _Decode(torch.utils.data.Dataset):
    """What a worker process holds: plan of one step -> its packed batches."""

    def __init__(self, processor, data, pack_tokens):
        self.processor, self.data, self.pack_tokens = processor, data, pack_tokens

    _failure = Loader._failure

    def __getitem__(self, plan):
        packs, info = plan
        batches, skipped, bad, seen = [], Counter(info["skipped"]), list(info["bad"]), len(info["bad"])
        for members in packs:
            samples, lost, room, reference = [], Counter(), self.pack_tokens, []
            for d, i in members:
                seen += 1
                try:
                    line = self.data[d][i]
                    read = [self.processor(c, self.data[d].root) for c in versions(line)]
                    tokens = sum(len(sample["tokens"]) for sample in read)
                    if tokens > room:  # width, height or duration in the line were wrong
                        raise MediaError("sample", "larger_than_told", f"{tokens} tokens")
                except (MediaError, ValueError) as e:
                    bad.append(self._failure(d, i, e))
                    lost[bad[-1][1]] += 1
                    continue
                samples += read
                room -= tokens
                reference.append(line.get("reference"))
            if not samples:  # ranks must run equally many batches: a short one without labels takes the place
                samples = [self.processor({"messages": [{"role": "system", "content": SYSTEM}]})]
            batches.append(pack(samples) | {"skipped": dict(lost)})
            if reference and None not in reference:  # of preferences: what the reference model says of both answers
                batches[-1]["reference"] = torch.tensor(reference, dtype=torch.float32)  # (pairs, 2)
            skipped += lost
        return batches, info | {"skipped": dict(skipped), "bad": bad}, seen, len(bad)
