"""A conversation becomes a sample, and samples become a packed batch.

    processor = Processor("toyworld/vocab.json", **SCALE["toy"].budget)
    sample = processor({"messages": [
        {"role": "user", "content": [
            {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."}]}, root="folder/of/its/media")
    batch = pack([sample, sample])

One patch is 14x14 pixels, one visual token of the language model 2x2 patches. A sample of T tokens
with M pictures and clips of N patches in all is a dict of tensors:

    tokens     (T,)      int64   text, and a placeholder for each visual token
    labels     (T,)      int64   what to predict at each token; -100: nothing is learnt there
    positions  (3, T)    int64   time, row and column, for the 3D rotary embedding
    patches    (N, 588)  uint8   pixels, each patch as (channel, y, x)
    grids      (M, 3)    int64   patches of each picture or clip along time, height and width

A batch is its samples end to end, and segments (S+1,) int32, where each of the S samples starts.
"""

import argparse
import bisect
import json
import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from common.clips import Clip
from common.conversation import check_conversation
from common.jsonl import replacing
from common.media import PIXEL_LIMIT, MediaError, reading
from common.pictures import load_picture
from common.tokenizer import QWEN_VOCAB, Tokenizer, read_vocab, vocab_file
from common.weights import read_json

PATCH = 14  # pixels, the side of a patch
TOKEN = 28  # pixels, the side of a visual token
SYSTEM = "You are a helpful assistant."  # what Keye's template says where no system message does


# Pixels and positions


@lru_cache(4096)  # a data set has few sizes, and each is asked for several times
def smart_resize(height: float, width: float, min_tokens: float, max_tokens: float) -> tuple:
    """The size in pixels, (height, width), at which a picture is shown to the model.

    Keye's released rule: sides are multiples of 28 pixels, the area is min_tokens to max_tokens,
    the shape is kept. ValueError when one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width}x{height}: sides differ by more than 200 times")
    rows, columns = (max(1, round(side / TOKEN)) for side in (height, width))
    if rows * columns > max_tokens:
        shrink = math.sqrt(height * width / (max_tokens * TOKEN**2))
        # ours: at most max_tokens; the released rule lets a strip of one row be longer
        rows, columns = (
            min(max(1, math.floor(side / shrink / TOKEN)), math.floor(max_tokens))
            for side in (height, width)
        )
    elif rows * columns < min_tokens:
        grow = math.sqrt(min_tokens * TOKEN**2 / (height * width))
        rows, columns = (math.ceil(side * grow / TOKEN) for side in (height, width))
    return rows * TOKEN, columns * TOKEN


def patchify(frames: np.ndarray) -> np.ndarray:
    """frames (t, H, W, 3) uint8 -> patches (t * H/14 * W/14, 588), in raster order."""
    form = "t (row y) (column x) channel -> (t row column) (channel y x)"
    return rearrange(frames, form, y=PATCH, x=PATCH)


def text_positions(n: int, start: int) -> np.ndarray:
    """Positions (3, n) of text: it moves on along all axes at once."""
    return np.tile(np.arange(start, start + n), (3, 1))


def vision_positions(grid: tuple, fps: float | None, start: int) -> np.ndarray:
    """Positions (3, t * h/2 * w/2) int64 of a picture (fps None) or clip, all counted from `start`.

    Time advances by one in half a second (Keye-VL report, section 2.2), whatever the clip's fps.
    """
    t, h, w = grid
    time, row, column = np.indices((t, h // 2, w // 2)).reshape(3, -1)
    if fps:
        # To the nearest step: at 0.9999 or 29.97 fps, cutting off would make steps of 0 and of 2.
        time = np.floor(time * 2 / fps + 0.5).astype(np.int64)
    return np.stack([time, row, column]) + start


# What a conversation is laid out in


class TooLong(ValueError):
    """A sample that has more tokens than it may."""

    reason = "too_long"  # as in MediaError


@dataclass
class Text:
    """Text tokens in a row, and what of them is learnt: the token itself, else -100."""

    ids: list[int]
    targets: list[int]

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass
class Medium:
    """A picture or clip, as the keys of its item in the conversation or its header describe it.

    Besides their size the item's keys say, with the meaning of keye-vl-utils and instead of the
    processor's budgets, what is taken of it:

    min_pixels, max_pixels           of the picture, or of each frame
    resized_height, resized_width    its size, in pixels, rounded to multiples of 28
    video_start, video_end           seconds of the clip: the cut that is shown
    fps, or nframes                  of the cut; nframes are spread evenly over it
    min_frames, max_frames           how many an fps may lead to
    total_pixels                     of all frames; then there are smaller ones, and then fewer

    A clip never takes more than its total, nor more frames than there are. Keys that contradict
    each other are a MediaError.
    """

    kind: str  # "image" or "video"
    source: object  # a path, a picture, or a list of these: the frames of a clip
    limits: dict  # how files may be opened, see load_picture
    low: int  # tokens of the picture or of each frame: low to high
    high: int
    cap: int  # most tokens in all
    height: float | None  # pixels
    width: float | None
    seconds: float | None
    frames: int  # of a clip's source; 0: not known
    fps: float  # wanted of a clip, or that of a list of frames; 0: as the cap allows
    keys: dict  # of the item
    start: float = 0.0  # seconds of the clip that the cut leaves out

    @property
    def name(self) -> str:
        return str(self.source) if isinstance(self.source, (str, Path)) else "<memory>"

    def read_header(self):
        """Fills in what is not known."""
        self._check_keys()
        self._take_budgets()
        known = self.height and self.width
        if self.kind == "image":
            if not known:
                self._measure(self.source)
        elif isinstance(self.source, (list, tuple)):
            if not self.source:
                raise MediaError("<frames>", "empty")
            self.fps = self.fps or 2.0
            self._cut(len(self.source) / self.fps, len(self.source))
            self._measure(self.source[0])
        elif known and self.seconds:
            self._cut(self.seconds, self.frames)
        else:
            with Clip(self.source, **self.limits) as clip:
                self._describe(clip)

    def _refuse(self, detail):
        raise MediaError(self.name, "bad_keys", detail)

    def _check_keys(self):
        keys = self.keys
        for key in OF_CLIPS & set(keys):
            if self.kind == "image":
                self._refuse(f"{key} is of clips, this is a picture")
            if key.endswith("frames") and keys[key] != int(keys[key]):
                self._refuse(f"{key} is {keys[key]}, not a whole number")
        if ("resized_height" in keys) != ("resized_width" in keys):
            self._refuse("resized_height and resized_width stand together")
        if "nframes" in keys and self.fps and not isinstance(self.source, (list, tuple)):
            self._refuse("nframes and fps: either of them")
        for low, high in ORDERED:
            if low in keys and high in keys and keys[low] > keys[high]:
                self._refuse(f"{low} is {keys[low]}, above {high}, {keys[high]}")

    def _take_budgets(self):
        """Of the item's keys those in pixels, as tokens, which need not be whole."""
        keys = self.keys
        if "resized_height" in keys:
            sides = keys["resized_height"], keys["resized_width"]
            self.high = math.prod(max(1, round(side / TOKEN)) for side in sides)
            # A clip has fewer frames instead where these take too much.
            self.low = self.high if self.kind == "video" else min(self.low, self.high)
        else:
            low, high = (keys.get(key, 0) / TOKEN**2 for key in ("min_pixels", "max_pixels"))
            self.high = max(1, high) if high else max(self.high, low)
            self.low = low or min(self.low, self.high)
        if self.kind == "image":
            self.cap = math.ceil(self.high)
        elif "total_pixels" in keys:
            self.cap = int(keys["total_pixels"] / TOKEN**2)

    def _cut(self, seconds, frames):
        """Sets seconds and frames to what video_start and video_end leave of a clip."""
        self.start = self.keys.get("video_start", 0.0)
        end = min(self.keys.get("video_end", seconds), seconds)
        if self.start >= end:
            self._refuse(f"video_start is {self.start}, not before the end at {end:.3f} s")
        self.seconds = end - self.start
        self.frames = max(1, round(frames * self.seconds / seconds)) if frames else 0
        if frames and self.keys.get("nframes", 0) > self.frames:
            self._refuse(f"nframes is {self.keys['nframes']}, of {self.frames} frames")

    def _resized(self, low, high):
        height = self.keys.get("resized_height", self.height)
        width = self.keys.get("resized_width", self.width)
        return smart_resize(height, width, low, high)

    def _measure(self, picture):
        self.height, self.width = load_picture(picture, **self.limits, header_only=True)

    def _describe(self, clip):
        self.height, self.width = clip.height, clip.width
        self._cut(clip.duration, len(clip.times))

    def plan(self) -> tuple[tuple, float | None]:
        """Its form under the cap: (grid (t, h, w) in patches, fps or for a picture None).

        All frames together stay below the cap. But the smallest form there is, one frame of the
        least size, is taken under any cap.
        """
        try:
            n, fps = self._pace() if self.kind == "video" else (1, None)
            high = max(self.low, min(self.high, self.cap // n))
            height, width = self._resized(self.low, high)
        except (ValueError, ArithmeticError) as e:
            raise MediaError(self.name, "aspect", e) from e
        return (n, height // PATCH, width // PATCH), fps

    def _pace(self):
        """-> (frames to take, their fps)."""
        # The least that a frame takes: a small one is enlarged to `low` tokens, and rounded up.
        height, width = self._resized(self.low, self.low)
        most = max(1, int(self.cap // max(self.low, height * width // TOKEN**2)))
        if self.frames:
            most = min(most, self.frames)
        most = min(most, int(self.keys.get("max_frames", most)))
        least = min(most, int(self.keys.get("min_frames", 1)))
        n = int(self.keys.get("nframes", 0))
        if not n:
            # ours: the highest of 2, 1 and 0.5 fps at which every frame gets its least tokens.
            for fps in (self.fps,) if self.fps else (2.0, 1.0, 0.5):
                n = max(1, round(self.seconds * fps))
                if least <= n <= most:
                    return n, float(fps)
        # Else as many frames as there may be, evenly spread, with their true fps: positions count
        # seconds, whatever frames were taken.
        n = min(max(n, least), most)
        return n, n / self.seconds

    @property
    def tokens(self) -> int:
        grid, _ = self.plan()
        return math.prod(grid) // 4

    def load(self) -> tuple[np.ndarray, tuple, float | None]:
        """Decodes it -> (patches (N, 588) uint8, grid, fps).

        Its size is corrected to what the file really has, and planned anew.
        """
        with ExitStack() as stack, reading(self.name):
            if self.kind == "image":
                fps = None
                frames = [load_picture(self.source, **self.limits)]
            elif isinstance(self.source, (list, tuple)):
                (n, _, _), fps = self.plan()
                first = round(self.start * self.fps)
                chosen = [self.source[first + k * self.frames // n] for k in range(n)]
                frames = (load_picture(frame, **self.limits) for frame in chosen)
            else:
                clip = stack.enter_context(Clip(self.source, **self.limits))
                self._describe(clip)
                (n, _, _), fps = self.plan()
                seconds = [self.start + k / fps for k in range(n)]
                frames = map(Image.fromarray, clip.frames(seconds))
            # Each frame is resized before the next one is decoded: at full size they would fill
            # the memory. All take the size of the first, which unlike its header is upright.
            pixels = []
            for frame in frames:
                if not pixels:
                    self.height, self.width = frame.height, frame.width
                    (_, h, w), _ = self.plan()
                if frame.size != (w * PATCH, h * PATCH):
                    frame = frame.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC)
                pixels.append(np.asarray(frame))
            return patchify(np.stack(pixels)), (len(pixels), h, w), fps


# Keys of a clip's item alone, and pairs of keys of which the first may not be the larger.
OF_CLIPS = {"video_start", "video_end", "nframes", "min_frames", "max_frames", "total_pixels"}
ORDERED = [
    ("min_frames", "max_frames"),
    ("min_frames", "nframes"),
    ("nframes", "max_frames"),
    ("min_pixels", "max_pixels"),
    ("min_pixels", "total_pixels"),
    ("video_start", "video_end"),
]


@dataclass
class Layout:
    """A sample before its media are decoded: what stands where, and how large all of it will be."""

    pieces: list[Text | Medium]
    start: int  # position of the first token
    generate: bool  # the model writes on behind it; nothing in it is learnt

    @property
    def media(self) -> list[Medium]:
        return [piece for piece in self.pieces if isinstance(piece, Medium)]

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


class Chat:
    """Collects pieces. Neighbouring texts are joined before they are encoded, as in the rendered
    template: a token may reach over the seam."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pieces = [Text([], [])]
        self.counts = Counter()  # of pictures and clips
        self.text = ""  # not yet encoded
        self.learnt = False
        self.by_model = False

    def write(self, text, by_model=False, learnt=False):
        """by_model: only in such a text "<think>" or "<|box_start|>" becomes one added token."""
        if by_model != self.by_model:
            self.flush()
        self.by_model = by_model
        self.learnt = learnt
        self.text += text

    def flush(self):
        if self.text:
            self._add(self.tokenizer.encode(self.text, added=self.by_model), self.learnt)
            self.text = ""

    def control(self, token, learnt=False):
        self.flush()
        self._add([self.tokenizer.special[token]], learnt)

    def _add(self, ids, learnt):
        self.pieces[-1].ids += ids
        self.pieces[-1].targets += ids if learnt else [-100] * len(ids)


# Conversation -> layout -> sample


@dataclass
class Processor:
    """Conversation -> sample. Budgets are tokens; the defaults are Keye's (report, section 2.2)."""

    vocab_path: str | Path
    image_min: int = 4  # of a picture
    image_max: int = 16384
    frame_min: int = 128  # of one frame of a clip
    frame_max: int = 768
    video_max: int = 24576  # of a clip
    pixel_limit: int = PIXEL_LIMIT  # larger pictures and frames are refused undecoded
    add_vision_id: bool = False  # "Picture 1: " before each picture, as Keye's template can
    allow_outside: bool = False  # media may lie outside their root: the caller's right, never saved

    def __post_init__(self):
        pictures = 0 < self.image_min <= self.image_max
        if not pictures or not 0 < self.frame_min <= self.frame_max <= self.video_max:
            raise ValueError(
                "want 0 < image_min <= image_max and 0 < frame_min <= frame_max <= video_max"
            )
        self.tokenizer = Tokenizer(self.vocab_path)
        special = self.tokenizer.special
        self.pads = {"image": special["<|image_pad|>"], "video": special["<|video_pad|>"]}

    def __call__(self, conversation: dict, root=None, **how) -> dict:
        """Checks, lays out and loads a conversation; how: see layout.

        ValueError for a wrong form, MediaError for a file that cannot be used.
        """
        check_conversation(conversation)
        return self.load(self.layout(conversation, root, **how), how.get("max_tokens"))

    def extension(self, content: str | list, start: int, root=None) -> dict:
        """Text and pictures that a tool returns inside an open assistant turn -> sample.

        It has no labels, positions from `start`, and next_position, as with generate=True.
        """
        check_conversation({"messages": [{"role": "tool", "content": content}]})
        chat = Chat(self.tokenizer)
        self._content(chat, content, root)
        chat.flush()
        layout = Layout(chat.pieces, start, generate=True)
        if not layout.tokens:
            raise ValueError("extension: the content is empty")
        return self.load(layout)

    # -- the chat template

    def layout(
        self,
        conversation: dict,
        root: str | Path | None = None,
        generate: bool = False,
        start: int = 0,
        continuing: bool = False,
        max_tokens: int | None = None,
    ) -> Layout:
        """A conversation that was checked, in Keye's chat format. No pixels are decoded.

        root: what the paths of its media are relative to.
        generate: end with the open assistant turn, without labels; the sample then has
            next_position (int), that of the token to come.
        continuing: these are more turns of a conversation in a cache, which ends with <|im_end|>;
            start: its next_position.
        max_tokens: most tokens of the sample; see fit.
        """
        messages = conversation["messages"]
        if generate and messages[-1]["role"] == "assistant":
            raise ValueError("generate=True needs a prompt: remove the last, assistant's message")
        chat = Chat(self.tokenizer)
        if continuing:
            chat.write("\n")
        elif messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SYSTEM}, *messages]
        for message in messages:
            self._message(chat, message, root, learnt=not generate)
        if generate:
            chat.control("<|im_start|>")
            chat.write("assistant\n")
        chat.flush()
        layout = Layout(chat.pieces, start, generate)
        if max_tokens is not None:
            self.fit([layout], max_tokens)
        return layout

    def _message(self, chat, message, root, learnt):
        own = message["role"] == "assistant"
        learnt = learnt and own and message.get("loss", True)
        chat.control("<|im_start|>")
        chat.write(f"{message['role']}\n")
        if own:
            # Encoded apart from the answer, as generation starts behind this header: training must
            # not show the model a token that reaches from one into the other.
            chat.flush()
        self._content(chat, message["content"], root, own, learnt)
        # An answer that was cut off ("ended": false) has no end to learn.
        chat.control("<|im_end|>", learnt and message.get("ended", True))
        chat.write("\n")

    def _content(self, chat, content, root, own=False, learnt=False):
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for item in content:
            kind = item["type"]
            if kind == "text":
                # A text with "loss": false in an assistant's turn is a tool's reply: not learnt,
                # and as little trusted with added tokens as a user's.
                by_model = own and item.get("loss", True)
                chat.write(item["text"], by_model, by_model and learnt)
                continue
            chat.counts[kind] += 1
            if self.add_vision_id:
                title = "Picture" if kind == "image" else "Video"
                chat.write(f"{title} {chat.counts[kind]}: ")
            chat.control("<|vision_start|>")
            chat.pieces += [self._medium(item, root), Text([], [])]
            chat.control("<|vision_end|>")

    def _medium(self, item, root):
        kind = item["type"]
        medium = Medium(
            kind=kind,
            source=item[kind],
            limits=dict(root=root, allow_outside=self.allow_outside, pixel_limit=self.pixel_limit),
            low=self.image_min,
            high=self.image_max,
            cap=self.image_max,
            height=item.get("height"),
            width=item.get("width"),
            seconds=item.get("duration"),
            frames=round(item.get("duration", 0) * item.get("fps_source", 0)),
            fps=item.get("fps", 0),
            keys=item,
        )
        if kind == "video":
            medium.low, medium.high = self.frame_min, self.frame_max
            medium.cap = self.video_max
        medium.read_header()
        return medium

    # -- budgets and pixels

    def fit(self, layouts: list[Layout], max_tokens: int):
        """Makes media smaller, where it must be, until all layouts together hold max_tokens.

        Media that take more than their share get one cap for all, the largest that is possible: a
        picture shrinks, a clip first takes smaller frames and then fewer. TooLong when that cannot
        do: pictures and frames never fall below image_min and frame_min.
        """
        media = sum([layout.media for layout in layouts], [])
        wanted = [medium.tokens for medium in media]
        room = max_tokens - sum(layout.tokens for layout in layouts) + sum(wanted)
        if sum(wanted) <= room:
            return
        least = [replace(medium, cap=0).tokens for medium in media]

        def tokens_under(cap):
            return sum(max(few, min(many, cap)) for few, many in zip(least, wanted))

        # The caps 0, 1, ..., room need more and more tokens; taken is the last one that needs no
        # more than there is room for.
        cap = bisect.bisect_right(range(room + 1), room, key=tokens_under) - 1
        if cap < 0:
            needed = max_tokens - room + sum(least)
            raise TooLong(f"at least {needed} tokens, where {max_tokens} fit")
        for medium, tokens in zip(media, wanted):
            if tokens > cap:
                medium.cap = cap

    def load(self, layout: Layout, max_tokens: int | None = None) -> dict:
        """Decodes a layout's media -> sample.

        Sizes are planned anew, under the same caps, from what the files really are. MediaError for
        a file that cannot be used, TooLong when the sample then has more than max_tokens.
        """
        empty = np.zeros((0, 3 * PATCH**2), np.uint8)
        tokens, targets, positions, patches, grids = [], [], [], [empty], []
        next_position = layout.start
        for piece in layout.pieces:
            if isinstance(piece, Text):
                tokens += piece.ids
                targets += piece.targets
                span = text_positions(piece.tokens, next_position)
            else:
                pixels, grid, fps = replace(piece).load()  # a copy: the layout stays as planned
                tokens += [self.pads[piece.kind]] * (len(pixels) // 4)
                targets += [-100] * (len(pixels) // 4)
                span = vision_positions(grid, fps, next_position)
                patches.append(pixels)
                grids.append(grid)
            positions.append(span)
            # What follows a picture starts behind its largest position on any axis: so no place is
            # taken twice, and the time of a long clip is over before the text goes on.
            next_position = int(span.max()) + 1
        if max_tokens is not None and len(tokens) > max_tokens:
            why = f"{layout.tokens} were planned, by a width, height or duration that is wrong"
            raise TooLong(f"{len(tokens)} tokens, where {max_tokens} fit; {why}")
        sample = {
            "tokens": torch.tensor(tokens),
            # The model predicts the next token, so label i is token i + 1, where that is learnt.
            "labels": torch.tensor(targets[1:] + [-100]),
            "positions": torch.from_numpy(np.concatenate(positions, 1)),
            "patches": torch.from_numpy(np.concatenate(patches)),
            "grids": torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        }
        if layout.generate:
            sample["next_position"] = next_position
        return sample

    # -- files

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes) -> "Processor":
        """From a folder with vocab.json or tokenizer.json, and preprocessor_config.json, ours or
        Keye's, or the processor_config.json of transformers 5.

        Keye's file caps pictures at 1,280 tokens: pass image_max=16384 for the report's budget,
        which also holds where a file has none. FileNotFoundError or ValueError name the file.
        """
        budget = saved_budget(Path(folder))
        try:
            return cls(vocab_file(folder), **budget | changes)
        except ValueError as e:
            raise ValueError(f"{folder}: {e}") from None

    def save_pretrained(self, folder: str | Path):
        """Writes vocab.json and preprocessor_config.json: Keye's keys, and "budget" with ours."""
        folder = Path(folder)
        vocab = json.dumps(read_vocab(Path(self.vocab_path)), ensure_ascii=False)
        with replacing(folder / "vocab.json") as part:
            part.write_text(vocab, "utf-8")
        config = FIXED | {
            "min_pixels": self.image_min * TOKEN**2,
            "max_pixels": self.image_max * TOKEN**2,
            "processor_class": "KeyeProcessor",
            "budget": {name: getattr(self, name) for name in SAVED},
        }
        with replacing(folder / "preprocessor_config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n")


# Keys of preprocessor_config.json that are not ours to choose.
FIXED = {
    "patch_size": PATCH,
    "temporal_patch_size": 1,
    "merge_size": 2,
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # Pillow's bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


SAVED = [f.name for f in fields(Processor) if f.name not in ("vocab_path", "allow_outside")]


def saved_budget(folder: Path) -> dict:
    """What the files of a folder say for Processor. ValueError names the file and the key.

    preprocessor_config.json has the pixels of a picture, and our own "budget". transformers 5 puts
    pictures and frames into one processor_config.json; before it, frames had a file of their own.
    How frames are chosen is Keye's rule here, whatever transformers writes for others.
    """
    both = folder / "processor_config.json"
    main, video = folder / "preprocessor_config.json", folder / "video_preprocessor_config.json"
    stated = {}  # name -> (its value, where it stands)
    nested = read_json(both) if both.exists() else {}
    for key, kind in (("image_processor", "image"), ("video_processor", "frame")):
        part = _object(nested, key, both)
        _state(stated, _by_pixels(part, kind, f"{both}: {key}"), both, f"in {both.name}")
    if main.exists() or "image_processor" not in nested:
        config = read_json(main)
        _state(stated, _by_pixels(config, "image", main), main, "by its pixels")
        _state(stated, _own_budget(config, main), main, "in budget")
    if video.exists():
        _state(stated, _by_pixels(read_json(video), "frame", video), video, f"in {video.name}")
    return {name: value for name, (value, _) in stated.items()}


def _object(config, key, where):
    nested = config.get(key) or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{where}: {key} is {nested!r}, where an object was expected")
    return nested


def _state(stated, budget, path, place):
    for name, value in budget.items():
        known, other = stated.setdefault(name, (value, place))
        if known != value:
            raise ValueError(f"{path}: {name} is {value} {place}, but {known} {other}")


def _by_pixels(config, kind, where):
    """Tokens of a picture or a frame, by Keye's pixels or transformers' "size" in their place."""
    for key, value in FIXED.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"{where}: {key} is {config[key]}, only {value} is implemented")
    size = config.get("size")
    edges = size if isinstance(size, dict) else {}
    budget = {}
    for name, key, edge, whole in (
        (f"{kind}_min", "min_pixels", "shortest_edge", math.ceil),
        (f"{kind}_max", "max_pixels", "longest_edge", math.floor),
    ):
        pixels = edges.get(edge) if config.get(key) is None else config[key]
        if pixels is not None:
            if type(pixels) is not int or pixels <= 0:
                raise ValueError(f"{where}: {key} is {pixels!r}; want a number of pixels")
            budget[name] = whole(pixels / TOKEN**2)
    return budget


def _own_budget(config, where):
    ours = _object(config, "budget", where)
    for key, value in ours.items():
        if key not in SAVED or type(value) is not type(getattr(Processor, key)):
            raise ValueError(f"{where}: budget: {key} is {value!r}; known are {', '.join(SAVED)}")
    return ours


# Samples -> batch


def pack(samples: list[dict]) -> dict:
    """Samples end to end -> a packed batch. ValueError where patches and grids do not agree."""
    if not samples:
        raise ValueError("pack: no samples")
    batch = {}
    for key in ("tokens", "labels", "patches", "grids"):
        batch[key] = torch.cat([sample[key] for sample in samples])
    expected = int(batch["grids"].prod(1).sum())
    if len(batch["patches"]) != expected:
        raise ValueError(f"pack: {len(batch['patches'])} patches, but grids of {expected}")
    # Positions begin anew in every sample, so it is the same wherever it stands in a pack.
    batch["positions"] = torch.cat([sample["positions"] for sample in samples], 1)  # (3, T)
    ends = np.cumsum([len(sample["tokens"]) for sample in samples])
    batch["segments"] = torch.tensor([0, *ends], dtype=torch.int32)  # (S+1,)
    # The last token of a sample predicts nothing: what follows it belongs to the next one.
    batch["labels"][ends - 1] = -100
    return batch


Processor.pack = staticmethod(pack)  # the loader knows data.py by its processor alone


# The command: python data.py --check FOLDER


def main():
    # here, as these stand above this file, and only the command needs them
    from common.survey import survey
    from common.weights import read_config
    from model import PRESETS, SCALE, Config, scale_like

    parser = argparse.ArgumentParser(description="What a folder of data holds, and its faults.")
    add = parser.add_argument
    add("--check", required=True, metavar="FOLDER", help="with train and heldout, or of one part")
    add("--size", choices=list(SCALE), help="whose packs count (default: toy, or --init's like)")
    add("--init", metavar="MODEL", help="folder whose vocabulary and budgets count")
    args = parser.parse_args()
    try:
        if args.init:
            processor = Processor.from_pretrained(args.init)
            where = Path(args.init) / "config.json"
            scale = scale_like(Config.from_json(read_config(args.init), where))
        else:
            size = args.size or "toy"
            # as pretrain.py takes them, where none is named
            own = Path(__file__).parent / "toyworld" / "vocab.json"
            vocab = own if PRESETS[size].vocab_size == 1024 else QWEN_VOCAB
            scale = SCALE[size]
            processor = Processor(vocab, **scale.budget)
        pack = SCALE[args.size].pack if args.size else scale.pack
        well = survey(Path(args.check), processor, pack)
    except (OSError, ValueError) as e:
        raise SystemExit(str(e)) from None
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    main()
