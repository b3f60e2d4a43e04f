"""Sections 1 to 6: from a line of a file to a packed batch."""

import json
import textwrap
from itertools import groupby

from einops import rearrange

from data import Chat, Medium, Processor, pack, patchify, smart_resize, vision_positions
from kernels.attention import attention_reference
from model import rope_3d
from tools.walkthrough.drawings import attention_map, patch_grid, position_map
from tools.walkthrough.page import CFG, Walk, num, nums
from vit import ViT, rope_2d, rotate


def lines_of_data(w: Walk):
    w.picture = w.record("detail", 6, "detail")
    w.clip = w.record("motion", 2, "video", 1)
    w.say("""
        # A picture and a clip, step by step

        What happens to one picture and one clip on their way through nanoKeye, with real shapes and
        values of the toy size. [tools/walkthrough](../tools/walkthrough) writes this page
        (`python -m tools.walkthrough --write`) from a freshly drawn toy world and a model with
        fresh weights, by a seed. What such a model says means nothing; how it comes to say it is
        what is shown here. Values have three digits, as machines round differently. Code is quoted
        as it stands in the file and function named above it.

        ## 1. Two lines

        A data set is a file with a conversation a line; media are files beside it. The toy world
        ([toyworld/](../toyworld)) has drawn these two. The first is about small dots on a large
        picture: `meta` says how an answer is judged, and what a careful look would find.
    """)
    for record in (w.picture, w.clip):
        w.show(*textwrap.wrap(json.dumps(record), 96, break_on_hyphens=False))


def resize(w: Walk):
    w.layouts = [w.processor.layout(record, w.folder) for record in (w.picture, w.clip)]
    w.media = [layout.media[0] for layout in w.layouts]
    w.say("""
        ## 2. How large, and how many frames

        One *patch* is 14x14 pixels; 2x2 patches become one *visual token* of 28x28 pixels. So
        sides are rounded to multiples of 28, and a budget says how many tokens there may be. What
        is beyond it shrinks to it, and is then cut down to whole tokens:
    """)
    w.quote(
        smart_resize, "rows, columns = (max(1", "if rows * columns > max", "shrink =",
        "rows, columns = (",
    )
    w.say("A clip takes the highest of three rates at which its frames fit into the clip's budget:")
    w.quote(Medium._pace, "for fps in", "n = max(1, round(", "if least <= n", "return n")
    plans = [medium.plan() for medium in w.media]
    w.table(
        ["", "picture", "clip"],
        ["in the file, pixels", *[f"{m.width} x {m.height}" for m in w.media]],
        ["seconds, frames", "", f"{w.media[1].seconds}, {w.media[1].frames}"],
        ["budget of a picture or frame, tokens", *[f"{m.low} to {m.high}" for m in w.media]],
        ["budget in all, tokens", *[m.cap for m in w.media]],
        ["frames taken a second", "", plans[1][1]],
        ["grid: frames, rows, columns of patches", *[grid for grid, _ in plans]],
        ["shown, pixels", *[f"{14 * columns} x {14 * rows}" for (_, rows, columns), _ in plans]],
        ["visual tokens", *[m.tokens for m in w.media]],
    )
    w.say("Cut down to whole tokens, a picture that is nearly square in its file is shown flat.")


def patches(w: Walk):
    w.samples = [w.processor.load(layout) for layout in w.layouts]
    w.say("""
        ## 3. Pixels become patches

        The picture, or the frame that a player would show at each moment, is decoded and resized,
        and cut into patches in raster order: a row of 3 x 14 x 14 = 588 numbers each.
    """)
    w.quote(
        Medium.load, "else:", "seconds = [", "frames = map", "for frame", "if frame.size",
        "frame =",
    )
    w.quote(patchify, "form =", "return")
    form = "(t row column) (channel y x) -> t (row y) (column x) channel"
    for name, sample, scale in (("picture", w.samples[0], 4), ("clip", w.samples[1], 1.5)):
        (t, h, width), shape = sample["grids"][0].tolist(), tuple(sample["patches"].shape)
        frames = rearrange(sample["patches"].numpy(), form, t=t, row=h, y=14, x=14)
        title = f"The {name} as the model sees it: {t} x {h} x {width} patches, as {shape} numbers"
        w.draw(f"{name}.svg", title, patch_grid(frames, scale, title))
    shrunk = 14 * int(w.samples[0]["grids"][0, 2]) / w.media[0].width
    w.say(f"""
        White lines part patches, yellow ones visual tokens. A dot is 15 pixels wide in the
        file and {15 * shrunk:.1f} here, too few to tell its shape: in
        section 13 a tool will look closer. The ViT takes pixels from -1 to 1:
    """)
    w.quote(ViT.forward, "pixels = patches.float()")
    w.dot = int(w.samples[0]["patches"].float().std(1).argmax())
    values = w.samples[0]["patches"][w.dot].float() / 127.5 - 1
    w.say(f"""
        Patch {w.dot} of the picture differs most within itself: it holds a piece of a dot. Its
        values reach from {num(values.min())} to {num(values.max())}, their mean is
        {num(values.mean())}.
    """)


def tokens(w: Walk):
    w.say("""
        ## 4. Tokens and labels

        The conversation is written in Keye's chat format; a placeholder stands for each visual
        token. Learnt is what the assistant says, its end of turn included; all other labels are
        -100. Token, text and, marked by `*`, what is learnt:
    """)
    for layout in w.layouts:
        w.show(*runs(w, layout))
    w.say("The model predicts the next token, so label i is token i + 1, where that is learnt:")
    w.quote(Chat._add, "self.pieces[-1].targets")
    w.quote(Processor.load, '"labels": torch.tensor')


def runs(w: Walk, layout) -> list[str]:
    """What stands in a layout, a line for text that is learnt, text that is not, and a medium."""
    rows = []
    at = 0
    for piece in layout.pieces:
        end = at + piece.tokens
        if isinstance(piece, Medium):
            pad = w.tokenizer.decode([w.processor.pads[piece.kind]])
            rows.append(f"{at:4} to {end - 1:3}    {pad} x {piece.tokens}")
        else:
            places = range(piece.tokens)
            for learnt, same in groupby(places, lambda i: piece.targets[i] != -100):
                a, *_, b = [*same] * 2
                words = w.text(piece.ids[a : b + 1])
                rows.append(f"{at + a:4} to {at + b:3}  {'*' if learnt else ' '} {words}")
        at = end
    return rows


def positions(w: Walk):
    w.say("""
        ## 5. Positions, 3D in the decoder and 2D in the ViT

        Every token of the decoder has a time, a row and a column. Text moves on along all three at
        once; a picture or clip spreads out from where it starts, and time advances by one in half a
        second.
    """)
    w.quote(vision_positions, "time, row, column =", "if fps", "time = np.floor", "return")
    w.say("What follows starts behind the largest position on any axis:")
    w.quote(Processor.load, "next_position = int(")
    picture, clip = (sample["positions"] for sample in w.samples)
    seen = (w.samples[0]["tokens"] == CFG.image_token_id).nonzero()[:, 0].tolist()
    first, last = seen[0], seen[-1]
    places = {
        first - 1: "last before the picture", first: "first visual", first + 1: "second visual",
        last: "last visual", last + 1: "first behind it",
    }
    rows = [[f"{i}, {name}", *picture[:, i].tolist()] for i, name in places.items()]
    w.table(["token of the picture's sample", "time", "row", "column"], *rows)
    times = clip[0, w.samples[1]["tokens"] == CFG.video_token_id]
    w.say(f"The clip's frames stand at the times {times.unique().tolist()}.")
    title = "Positions of both samples: one line in text, three in a picture or clip"
    both = {"picture": picture.numpy(), "clip": clip.numpy()}
    w.draw("positions.svg", title, position_map(both, title))


def rotations(w: Walk):
    seen = w.samples[0]["tokens"] == CFG.image_token_id
    place = w.samples[0]["positions"][:, seen][:, 1:2]  # (3, 1) of the second visual token
    w.say(f"""
        A head of {CFG.head_dim} channels has {CFG.head_dim // 2} frequencies, here
        {CFG.mrope_section} for time, row and column (Keye: 16, 24, 24 of 64). Each pair of channels
        turns by its frequency times the position on its axis, so that the product of a query and a
        key depends on their distance along each axis.
    """)
    w.quote(rope_3d, "axis =", "angles = positions")
    w.quote(rotate, "a, b =", "return")
    cos, _ = rope_3d(place, CFG)
    time, row, _ = CFG.mrope_section
    w.say(f"""
        The second visual token, at {place[:, 0].tolist()}: cosines of the first
        frequency of time, row and column are {nums(cos[0, 0, [0, time, time + row]])}.

        In the ViT half of a head's pairs turns with the patch's row, half with its column; they
        start again in every frame.
    """)
    w.quote(rope_2d, "cells =", "freqs =", "angles =")
    grid = w.samples[0]["grids"].tolist()
    cos, _ = rope_2d(grid, CFG.vision.hidden_size // CFG.vision.num_attention_heads, "cpu")
    w.say(f"""
        Patch {w.dot} of the picture is in row {w.dot // grid[0][2]}, column {w.dot % grid[0][2]};
        its cosines are {nums(cos[w.dot, 0])}.
    """)


def packed(w: Walk):
    w.batch = pack(w.samples)
    w.say("""
        ## 6. A packed batch

        Samples lie end to end, without padding, and `segments` says where each starts. What follows
        the last token of a sample belongs to the next one, so it has no label.
    """)
    w.quote(pack, "ends =", 'batch["segments"] =', 'batch["labels"][ends')
    shapes = [[f"`{key}`", tuple(x.shape), str(x.dtype)[6:]] for key, x in w.batch.items()]
    w.table(["", "shape", "numbers"], *shapes)
    w.say(f"""
        `segments` is {w.batch["segments"].tolist()}, `grids` {w.batch["grids"].tolist()}. A token
        looks at itself and at what comes before it in its own sample, and never at the other one:
    """)
    tokens, learnt = w.batch["tokens"], w.batch["labels"].roll(1) != -100
    visual = (tokens == CFG.image_token_id) | (tokens == CFG.video_token_id)
    kinds = [
        "seen" if v else "learnt" if label else "words"
        for v, label in zip(visual.tolist(), learnt.tolist())
    ]
    title = "The pack's attention mask: a triangle for each sample, nothing between them"
    segments = w.batch["segments"].tolist()
    w.draw("attention.svg", title, attention_map(segments, kinds, title))
    w.say("No mask is ever made: attention is computed for each segment. What it computes:")
    w.quote(
        attention_reference, "for qs, ks, vs", "scores =", "if causal", "later =", "scores =",
        "weights =", "out.append",
    )
