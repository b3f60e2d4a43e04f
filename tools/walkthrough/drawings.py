"""The walkthrough's small pictures, as SVG that reads on light and on dark pages."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

STYLE = """
  .page { fill: #ffffff; }
  text { font: 14px system-ui, sans-serif; fill: #1a202c; }
  .axis { stroke: #4a5568; stroke-width: 1; fill: none; }
  .time { stroke: #b7791f; fill: none; stroke-width: 3; }
  .row { stroke: #2f7d43; fill: none; stroke-width: 2; }
  .column { stroke: #3457c0; fill: none; stroke-width: 1.3; }
  .words { fill: #cdd9f7; } .seen { fill: #bfe0c7; } .learnt { fill: #f2b8a0; }
  .more { fill: #6fbf84; } .less { fill: #e08e79; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #12161d; }
    text { fill: #edf2f7; } .axis { stroke: #a0aec0; }
    .time { stroke: #e0b25a; } .row { stroke: #6fbf84; } .column { stroke: #8ea6f2; }
    .words { fill: #31437a; } .seen { fill: #2f5a3b; } .learnt { fill: #8f4a35; }
  }"""


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    lines = [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}\n</style>"]
    # with a page of its own colour: a README may be shown in another one than the system's
    lines.append('<rect width="100%" height="100%" rx="6" class="page"/>')
    return "\n".join([*lines, *parts, "</svg>"]) + "\n"


def text(x, y, words, anchor="start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(str(words))}</text>'


def box(x, y, width, height, kind) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'


def pixels(picture: Image.Image, x, y, width, height) -> str:
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    style = "image-rendering: pixelated"
    return f'<image {place} style="{style}" href="data:image/png;base64,{data}"/>'


def lines(x, y, width, height, step, stroke) -> str:
    """A raster of lines over a rectangle, `step` apart."""
    down = [f"M{x + k:g} {y:g}v{height:g}" for k in np.arange(0, width + 1, step)]
    across = [f"M{x:g} {y + k:g}h{width:g}" for k in np.arange(0, height + 1, step)]
    return f'<path d="{"".join(down + across)}" fill="none" {stroke}/>'


def patch_grid(frames: np.ndarray, scale: float, title: str) -> str:
    """frames (t, H, W, 3) side by side, with the borders of patches and, thicker, of tokens."""
    t, height, width, _ = frames.shape
    wide, high = scale * width, scale * height
    parts = []
    for k, frame in enumerate(frames):
        x = 4 + k * (wide + 8)
        parts += [
            pixels(Image.fromarray(frame), x, 4, wide, high),
            lines(x, 4, wide, high, 14 * scale, 'stroke="#fff" stroke-opacity=".6"'),
            lines(x, 4, wide, high, 28 * scale, 'stroke="#f2c230" stroke-width="1.6"'),
        ]
    return svg(t * (wide + 8), high + 8, title, parts)


def position_map(samples: dict[str, np.ndarray], title: str) -> str:
    """For each name positions (3, T): three curves over the tokens."""
    parts = []
    top = 0
    for name, positions in samples.items():
        across, up = 410 / positions.shape[1], 140 / positions.max()
        base = top + 165
        parts += [text(40, top + 16, name), f'<path class="axis" d="M40 {top + 20}V{base}H460"/>']
        parts += [text(34, base, 0, "end"), text(34, base - 130, positions.max(), "end")]
        parts.append(text(460, base + 17, f"token {positions.shape[1] - 1}", "end"))
        for kind, values in zip(("time", "row", "column"), positions.tolist()):
            points = [f"{40 + across * i:.1f},{base - up * v:.1f}" for i, v in enumerate(values)]
            parts.append(f'<polyline class="{kind}" points="{" ".join(points)}"/>')
        top += 190
    for k, kind in enumerate(("time", "row", "column")):
        y = 40 + 18 * k
        parts += [f'<path class="{kind}" d="M60 {y}h24"/>', text(90, y + 4, kind)]
    return svg(470, top, title, parts)


def attention_map(segments: list[int], kinds: list[str], title: str) -> str:
    """The mask of a pack: a row is a token, and coloured is what it may look at.

    kinds: for each token "words", "seen" or "learnt", drawn as a band above and at the left.
    """
    total = segments[-1]
    scale = 400 / total
    parts = []
    runs = [0] + [i for i in range(1, total) if kinds[i] != kinds[i - 1]] + [total]
    for start, end in zip(runs, runs[1:]):
        at, length = 24 + scale * start, scale * (end - start)
        parts += [box(at, 4, length, 14, kinds[start]), box(4, at, 14, length, kinds[start])]
    for start, end in zip(segments, segments[1:]):
        a, b = 24 + scale * start, 24 + scale * end
        parts.append(f'<path class="words" d="M{a:.1f} {a:.1f}V{b:.1f}H{b:.1f}Z"/>')
        # in the block's empty corner, or beside it where that is too small
        x, anchor = (b - 4, "end") if b - a > 160 else (b + 8, "start")
        parts.append(text(x, a + 16, f"tokens {start} to {end - 1}", anchor))
    parts.append(lines(24, 24, 400, 400, 400, 'class="axis"'))
    for k, (kind, what) in enumerate((("words", "text"), ("seen", "visual"), ("learnt", "learnt"))):
        parts += [box(332, 40 + 22 * k, 14, 14, kind), text(352, 52 + 22 * k, what)]
    return svg(430, 430, title, parts)


def crop_drawing(picture: Image.Image, corners: list[int], crop: Image.Image, title: str) -> str:
    """A picture with the box (x1, y1, x2, y2, thousandths) that a tool cut out, and the result."""
    width, height = 260, 260 * picture.height / picture.width
    x1, x2 = (4 + v * width / 1000 for v in corners[::2])
    y1, y2 = (4 + v * height / 1000 for v in corners[1::2])
    small = picture.resize((width, round(height)), Image.Resampling.BICUBIC)
    parts = [
        pixels(small, 4, 4, width, height),
        f'<rect x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}" '
        'fill="none" stroke="#c0392b" stroke-width="2"/>',
        f'<path class="axis" d="M{width + 14} {height / 2:g}h30m-7 -5l7 5l-7 5"/>',
        pixels(crop, width + 56, height / 2 - 75, 150 * crop.width / crop.height, 150),
    ]
    return svg(width + 230, height + 8, title, parts)


def halves(name: str) -> list[str]:
    """A name on one line, or on two, cut at the space nearest to its middle."""
    cuts = [i for i, letter in enumerate(name) if letter == " "]
    if not cuts:
        return [name]
    cut = min(cuts, key=lambda i: abs(i - len(name) / 2))
    return [name[:cut], name[cut + 1 :]]


def bars(values: list[float], names: list[str], title: str) -> str:
    """A bar for each value, up or down from zero."""
    parts = []
    unit = 90 / max(map(abs, values))
    for k, (value, name) in enumerate(zip(values, names)):
        x, length = 24 + 90 * k, unit * abs(value)
        up = value > 0
        parts.append(box(x, 120 - up * length, 44, length, "more" if up else "less"))
        parts.append(text(x + 22, 114 - length if up else 135 + length, f"{value:.2f}", "middle"))
        for j, words in enumerate(halves(name)):
            parts.append(text(x + 22, 232 + 17 * j, words, "middle"))
    parts.append(f'<path class="axis" d="M10 120H{90 * len(values)}"/>')
    return svg(90 * len(values) + 10, 258, title, parts)
