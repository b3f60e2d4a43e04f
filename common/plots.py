"""Small line charts as SVG text, for a page or a file, in colours that follow dark and light.

    lines = {"think": [(0, 12.5, 9.0, 16.0), (1, 48.0, 44.1, 51.9)], "plain": [(0, 40.0)]}
    svg = chart("reasoning", lines, ["sft", "grpo"], limits=(0, 100))
    Path("figure.svg").write_text(sheet([svg], columns=1, key=["think", "plain"]))

A point is (x, y) or (x, y, low, high), drawn with a bar from low to high. Points whose numbers are
not finite are left out. A line has the colour of its name, or one of OTHERS in turn.
"""

import math
from html import escape

WIDTH, HEIGHT = 236, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 6, 24, 22  # margins of a chart
MODES = ("plain", "no_think", "think", "auto_think", "agentic_think")
OTHERS = ("no_think", "think", "auto_think", "agentic_think", "plain")  # colours of other lines
# Okabe and Ito's, which the colour-blind can tell apart, a little darker or lighter.
LIGHT = {
    "page": "#ffffff", "card": "#f7f8fa", "code": "#eceff4", "ink": "#1a202c", "faint": "#5a6577",
    "line": "#d8dde6", "right": "#16793b", "wrong": "#c0392b", "plain": "#5a6577",
    "no_think": "#0072b2", "think": "#c26a00", "auto_think": "#00805d", "agentic_think": "#b0478f",
}
DARK = {
    "page": "#12161d", "card": "#1b212b", "code": "#262e3a", "ink": "#e8ecf2", "faint": "#9aa7b8",
    "line": "#333d4b", "right": "#5fd38a", "wrong": "#ff8a7a", "plain": "#aab4c2",
    "no_think": "#62b5ee", "think": "#f0a94b", "auto_think": "#3fcfa4", "agentic_think": "#e593cb",
}


def variables(colours):
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


COLOURS = f"""\
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
svg text {{ fill: var(--faint); font: 11px system-ui, -apple-system, "Segoe UI", sans-serif; }}
svg .name {{ fill: var(--ink); font-size: 13px; font-weight: 600; }}
svg .axis {{ stroke: var(--line); }}
svg .curve {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }}
"""


def chart(
    name: str, lines: dict[str, list], ticks: list[str] | None = None,
    limits: tuple[float, float] | None = None, log: bool = False, key: bool = False,
) -> str:
    """A chart of WIDTH x HEIGHT as an <svg> element.

    ticks: the name of x = 0, 1, ..; None: x is a number. limits: of y; default: of the points.
    log: y has a logarithmic axis; points below or at 0 are left out. key: name the lines below.
    """
    lines = {line: drawable(points, log) for line, points in lines.items()}
    points = [point for line in lines.values() for point in line]
    rows = key * -(-len(lines) // 2)  # two names a row
    height = HEIGHT + 13 * rows
    parts = [text(6, 14, name + " (log)" * log, "name")]
    if points:
        parts += axes(points, ticks, limits, log)
        for i, (line, drawn) in enumerate(lines.items()):
            place = places(points, ticks, limits, log, shift=2.5 * (i - len(lines) // 2))
            parts += curve(drawn, place, colour_of(line, lines))
    else:
        parts.append(text(LEFT, HEIGHT / 2, "no number to draw"))
    for i, line in enumerate(lines if key else []):
        x, y = 8 + 114 * (i % 2), HEIGHT + 13 * (i // 2) + 6
        fill = colour_of(line, lines)
        parts.append(f'<rect x="{x}" y="{y - 6}" width="10" height="4" fill="{fill}"/>')
        parts.append(text(x + 14, y, line[:17]))
    box = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg {box} role="img"><title>{escape(name)}</title>{"".join(parts)}</svg>'


def drawable(points, log):
    """Those with finite numbers, which on a logarithmic axis are positive."""
    return [
        point for point in points
        if all(v is not None and math.isfinite(v) for v in point) and (point[1] > 0 or not log)
    ]


def colour_of(line, lines):
    """A mode's own, or one that no line of the chart has as its own."""
    free = [colour for colour in OTHERS if colour not in lines]
    others = [other for other in lines if other not in MODES]
    return f"var(--{line if line in MODES else free[others.index(line) % len(free)]})"


def text(x, y, words, kind="", anchor="start"):
    how = f'x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"'
    return f"<text {how}>{escape(words)}</text>"


def bounds(points, limits, log):
    """Least and largest x and y; the y as they are drawn, so logarithms on such an axis."""
    xs = [point[0] for point in points]
    low, high = limits or (min(p[1] for p in points), max(p[1] for p in points))
    if log:
        low, high = math.log10(low), math.log10(high)
    return min(xs), max(xs), low, high


def places(points, ticks, limits, log, shift):
    """A function of a point's x and y: where it stands in the picture."""
    first, last, low, high = bounds(points, limits, log)
    if ticks:
        first, last = -0.3, len(ticks) - 0.7
    else:
        shift = 0  # of bars that would hide one another

    def place(x, y):
        y = math.log10(y) if log else y
        right = (x - first) / ((last - first) or 1)
        up = (y - low) / ((high - low) or 1)
        up = min(max(up, 0), 1)
        return (
            LEFT + shift + right * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    return place


def axes(points, ticks, limits, log):
    first, last, low, high = bounds(points, limits, log)
    place = places(points, ticks, limits, False, shift=0)
    bottom, top = HEIGHT - BOTTOM, TOP
    parts = []
    middle = [(low + high) / 2] if limits else []
    for y in [low, *middle, high] if high > low else [low]:
        at = bottom - (y - low) / ((high - low) or 1) * (bottom - top)
        parts.append(f'<path class="axis" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 4, at + 4, number(10**y if log else y), anchor="end"))
    for x, tick in enumerate(ticks or []):
        parts.append(text(place(x, low)[0], HEIGHT - 8, tick, anchor="middle"))
    if not ticks:
        parts.append(text(LEFT, HEIGHT - 8, f"{first:.0f}"))
        parts.append(text(WIDTH - RIGHT, HEIGHT - 8, f"step {last:.0f}", anchor="end"))
    return parts


def curve(points, place, colour):
    """The line through the points; bars and dots where they have an interval."""
    at = [place(*point[:2]) for point in points]
    if not at:
        return []
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
    parts = [f'<path class="curve" style="stroke:{colour}" d="{path}"/>']
    for point, (x, y) in zip(points, at):
        if len(point) == 4:
            low, high = (place(point[0], bound)[1] for bound in point[2:])
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" style="stroke:{colour}"/>')
        if len(point) == 4 or len(points) == 1:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" style="fill:{colour}"/>')
    return parts


def sheet(charts: list[str], columns: int, key: list[str]) -> str:
    """Charts of one size as one SVG file, with the colours of the lines named on top."""
    parts = []
    for i, svg in enumerate(charts):
        x, y = i % columns * (WIDTH + 10), 30 + i // columns * (HEIGHT + 10)
        parts.append(svg.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1))
    x = 8
    for line in key:
        parts.append(f'<rect x="{x:g}" y="8" width="16" height="5" fill="var(--{line})"/>')
        parts.append(text(x + 20, 15, line, "name"))
        x += 32 + 7.6 * len(line)
    width, height = columns * (WIDTH + 10), 30 + -(-len(charts) // columns) * (HEIGHT + 10)
    # with a page of its own colour: a README may be shown in another one than the system's
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">'
    back = '<rect width="100%" height="100%" rx="8" fill="var(--page)"/>'
    return f"{head}<style>{COLOURS}</style>{back}{''.join(parts)}</svg>\n"


def number(y):
    """As many digits as the margin has room for; what is no number as it is."""
    if not isinstance(y, (int, float)):
        return str(y)
    return f"{y:.0f}" if abs(y) >= 100 else f"{y:.3g}" if abs(y) >= 0.01 else f"{y:.1g}"
