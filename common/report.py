"""What a run has learnt so far, as one page: RUN/report.html, and its first figure, RUN/phases.svg.

    write_report(Path("runs/toy"))      after every phase, see Run.score; evaluate.py --report RUN

Read are each phase's score.json and predictions.jsonl, the metrics.jsonl of all stages, round.json
of the rounds of alignment, and for the gallery the pictures and clips that were asked about. What
is missing is named on the page. What a model or a data set says is shown as text, never as HTML.
docs/phases.svg is that figure of a whole toy: cp runs/toy/phases.svg docs/ after make toy.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatch
from html import escape
from pathlib import Path

from common.gallery import gallery_of, missing
from common.jsonl import replacing
from common.plots import COLOURS, MODES, chart, number, sheet

# The phases of a run in order: name for a figure, and what each is for.
PHASES = {
    "pretrain": ("pre", "sees: which words belong to which picture"),
    "sft": ("SFT", "answers what is asked, in the form that is asked for"),
    "mpo": ("MPO", "prefers the better one of two answers"),
    "coldstart": ("cold", "thinks, on demand or by its own choice, and looks closer with tools"),
    "grpo": ("GRPO", "finds out by itself which thoughts lead to the right answer"),
    "align": ("align", "stops repeating itself, breaking its form and thinking in vain"),
}
STAGES = "pretrain-text pretrain* sft mpo coldstart-modes coldstart grpo align* *".split()
# Categories that preferences and reinforcement are to teach: they are in none of the means.
APART = ("discover", "absent", "present")
# Of all answers of a phase: title of its chart, and the scale.
HABITS = {
    "repetitive": ("repetitive, %", 100), "tokens": ("tokens of an answer", 1),
    "format": ("out of form, %", 100), "obeyed": ("mode obeyed, %", 100),
}
# Charts of a stage: title, and the names in metrics.jsonl that it shows, as far as they are there;
# of a name the first chart, and of many names one chart each.
CURVES = {
    "reward": ["reward", "outcome"],
    "right": ["right", *(f"right_{mode}" for mode in MODES), "right_discover"],
    "right, kind": ["right_*"],
    "pass rate": ["pass_*", "passed_*"],
    "auto-think chooses": ["auto_chose_*"],
    "form": ["format", "consistency", "unfinished", "repetition"],
    "KL to the start": ["kl"],
    "entropy": ["entropy"],
    "tokens of an answer": ["answer_tokens"],
    "groups dropped": ["dropped_groups"],
    "margin of rewards": ["margin"],
    "loss of what is learnt on": ["replay_loss"],
}
PREFIXES = re.compile("^(right|auto_chose|passed|pass)_")  # the title says it
ANSWER = {"mode", "where", "task", "category", "question", "output", "answer", "right"}
LINES = 6  # of a chart, at most
SMOOTH = 8  # a point of a curve is the mean of so large a part of it


@dataclass
class Found:
    """What a run's folder holds. notes: what is missing, or cannot be read."""

    scores: dict = field(default_factory=dict)  # {phase: {mode: result}}, see evaluate.py
    answers: dict = field(default_factory=dict)  # {phase: {mode: {where: a line of predictions}}}
    metrics: dict = field(default_factory=dict)  # {stage: [records]}
    rounds: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def write_report(folder: Path) -> str:
    """Writes folder/report.html and folder/phases.svg -> a line that says so."""
    found = read_run(folder)
    count, gallery = gallery_of(found.answers)
    parts = {
        "title": escape(f"nanoKeye: {folder.resolve().name}"),
        "colours": COLOURS,
        "top": top(found),
        "changes": legend(found) + panels(board_charts(found)) + change_table(found),
        "scores": score_table(found),
        "auto": auto_tables(found),
        "habits": legend(found) + panels(habit_charts(found) + round_charts(found)),
        "curves": curves(found.metrics),
        "gallery": gallery,
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # in one pass: a model may have written "{scores}"
    page = re.sub(rf"\{{({'|'.join(parts)})\}}", lambda match: parts[match[1]], template)
    if found.scores:
        # as wide as a phone, so of the categories only those of which there is something to tell
        figure = board_charts(found, moved=7) + habit_charts(found, ["repetitive", "tokens"])
        write(folder / "phases.svg", sheet(figure, 2, modes_of(found)))
    write(folder / "report.html", page)
    size = (folder / "report.html").stat().st_size / 1e6
    return f"{folder / 'report.html'}: {len(found.scores)} phases, {count} questions, {size:.2f} MB"


def write(path, content):
    with replacing(path) as part:
        part.write_text(content, encoding="utf-8", errors="backslashreplace")


# --------------------------------------------------------------------------------------------------
# reading


def read_run(folder: Path) -> Found:
    found = Found()
    for phase in PHASES:
        found.scores[phase] = read_scores(folder / phase / "score.json", found.notes)
        if found.scores[phase]:
            found.answers[phase] = read_answers(folder / phase / "predictions.jsonl", found.notes)
        else:
            del found.scores[phase]
            found.notes.append(f"{phase} has no held-out score yet")
    for pattern in STAGES:
        for path in sorted(folder.glob(f"{pattern}/metrics.jsonl")):
            found.metrics.setdefault(path.parent.name, read_lines(path))
    rounds = sorted(folder.glob("align-*/round.json"), key=lambda path: (len(str(path)), path))
    found.rounds = [record for path in rounds for record in read_lines(path, whole=True)]
    return found


def read_scores(path, notes):
    """{mode: result}; {} where there is none that a board could show."""
    if not path.exists():
        return {}
    [scores] = read_lines(path, whole=True) or [{}]
    fit = {mode: r for mode, r in scores.items() if isinstance(r, dict) and r.get("categories")}
    if not fit:
        notes.append(f"{path.parent.name}/score.json holds no score by category")
    return fit


def read_lines(path, whole=False):
    """The file's records. A line that a kill has cut is passed over."""
    content = path.read_text(encoding="utf-8", errors="replace")
    records = []
    for line in [content] if whole else content.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def read_answers(path, notes):
    answers = defaultdict(dict)
    for row in read_lines(path) if path.exists() else []:
        if row.keys() >= ANSWER:
            answers[row["mode"]][row["where"]] = row
    if not answers:
        notes.append(f"{path.parent.name} has kept no answers for the gallery")
    return answers


# --------------------------------------------------------------------------------------------------
# numbers


def mixed(result: dict) -> tuple[float, float] | None:
    """Mean accuracy of the categories but APART, and half its 95 % interval; both in %.

    None where there is no other category.
    """
    known = [c for name, c in result["categories"].items() if name not in APART]
    if not known:
        return None
    half = math.sqrt(sum((c["high"] - c["low"]) ** 2 for c in known)) / 2
    return 100 * sum(c["accuracy"] for c in known) / len(known), 100 * half / len(known)


def best(scores: dict) -> tuple[float, str] | None:
    """(mixed accuracy in %, mode) of a phase's best mode."""
    means = {mode: mixed(result) for mode, result in scores.items()}
    return max(((mean[0], mode) for mode, mean in means.items() if mean), default=None)


def modes_of(found):
    there = {mode for scores in found.scores.values() for mode in scores}
    return [mode for mode in MODES if mode in there]


def category_names(found):
    names = {
        name
        for scores in found.scores.values() for r in scores.values() for name in r["categories"]
    }
    return sorted(names.difference(APART)) + [name for name in APART if name in names]


def before(found, phase, mode):
    """(phase, mode) that a score is compared with: the last in this mode, else the plain one."""
    earlier = list(found.scores)[: list(found.scores).index(phase)]
    for same in (mode, "plain"):
        for other in reversed(earlier):
            if same in found.scores[other]:
                return other, same
    return None


def change(found, old, new, category) -> tuple[float, float]:
    """By how many points a category's accuracy moved, and half the 95 % interval of that.

    old, new: (phase, mode). Of answers to the same questions only those count that differ (Agresti
    and Min's interval of paired shares); without answers the two shares' intervals are added.
    """
    a, b = (found.scores[phase][mode]["categories"][category] for phase, mode in (old, new))
    first, second = (
        {w: r["right"] for w, r in found.answers[phase][mode].items() if r["category"] == category}
        for phase, mode in (old, new)
    )
    difference = 100 * (b["accuracy"] - a["accuracy"])
    if first.keys() != second.keys() or not len(first) == a["n"] == b["n"]:
        return difference, 50 * math.hypot(a["high"] - a["low"], b["high"] - b["low"])
    n = len(first) + 2
    moved = [second[where] - first[where] for where in first]
    spread = sum(map(abs, moved)) + 1 - sum(moved) ** 2 / n
    return difference, 196 * math.sqrt(spread) / n


def changes(found, phase, mode) -> tuple[str, tuple | None, dict]:
    """What a score is compared with, the change of the mean, and {category: see change}."""
    old = before(found, phase, mode)
    if old is None:
        return "", None, {}
    earlier = found.scores[old[0]][old[1]]["categories"]
    both = [name for name in found.scores[phase][mode]["categories"] if name in earlier]
    by_category = {name: change(found, old, (phase, mode), name) for name in both}
    common = [by_category[name] for name in both if name not in APART]
    mean = None
    if common:
        half = math.sqrt(sum(half**2 for _, half in common))
        mean = sum(difference for difference, _ in common) / len(common), half / len(common)
    return " ".join(old), mean, by_category


# --------------------------------------------------------------------------------------------------
# figures


def by_phase(found, value) -> dict[str, list]:
    """{mode: points over the phases}. value(result) -> (y, ..), or None.

    A mode's line begins at the plain answers of the phase before its first.
    """
    lines = defaultdict(list)
    for x, (phase, scores) in enumerate(found.scores.items()):
        for mode in [mode for mode in MODES if mode in scores]:
            numbers = value(scores[mode])
            if numbers is None:
                continue
            if not lines[mode] and mode != "plain" and lines.get("plain"):
                lines[mode].append(lines["plain"][-1][:2])
            lines[mode].append((x, *numbers))
    return lines


def board_charts(found, moved=None):
    """The mean and the categories, of these only so many that moved most where `moved` is given."""
    ticks = [PHASES[phase][0] for phase in found.scores]

    def mean(result):
        found = mixed(result)
        return found and (found[0], found[0] - found[1], found[0] + found[1])

    def of(category):
        def numbers(result):
            c = result["categories"].get(category)
            return c and tuple(100 * c[name] for name in ("accuracy", "low", "high"))

        return numbers

    if not found.scores:
        return []
    means = by_phase(found, mean)
    ys = [y for line in means.values() for point in line for y in point[1:]] or [0, 100]
    limits = 10 * math.floor(min(ys) / 10), 10 * math.ceil(max(ys) / 10)
    categories = {name: by_phase(found, of(name)) for name in category_names(found)}
    shown = sorted(categories, key=lambda name: -spread(categories[name]))[:moved]
    return [chart("mixed: mean of all", means, ticks, limits)] + [
        chart(name, lines, ticks, (0, 100)) for name, lines in categories.items() if name in shown
    ]


def spread(lines):
    """From the lowest to the highest y of all lines."""
    ys = [point[1] for line in lines.values() for point in line]
    return max(ys) - min(ys)


def habit_charts(found, habits=tuple(HABITS)):
    """What is counted of all answers, by phase."""
    ticks = [PHASES[phase][0] for phase in found.scores]
    charts = []
    for habit in habits if found.scores else ():
        name, scale = HABITS[habit]

        def numbers(result):
            value = result.get("all", {}).get(habit)
            return None if value is None else (scale * value,)

        lines = by_phase(found, numbers)
        most = max([point[1] for line in lines.values() for point in line], default=1)
        charts.append(chart(name, lines, ticks, (0, max(1, math.ceil(most)))))
    return charts


def round_charts(found):
    """What alignment found of sampled answers before each of its rounds."""
    ticks = [str(i + 1) for i in range(len(found.rounds))]
    charts = []
    for key in ("repetition", "right", "format") if found.rounds else ():
        points = [(i, 100 * r[key]) for i, r in enumerate(found.rounds) if key in r]
        most = max([y for _, y in points], default=1)
        charts.append(chart(f"round: {key}, %", {key: points}, ticks, (0, max(1, math.ceil(most)))))
    return charts


def curves(metrics: dict) -> str:
    """The loss of all stages, then what else those logs hold that hold more."""
    losses, others = [], []
    for stage, records in metrics.items():
        steps = [record for record in records if "step" in record]
        losses += loss_chart(stage, steps)
        charts = stage_charts(steps)
        once = {k: v for record in records if "step" not in record for k, v in record.items()}
        said = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in once.items())
        said = f"<p class=note>{escape(said)}</p>" if once else ""
        if charts or said:
            others.append(f"<h3>{escape(stage)}</h3>{said}{panels(charts)}")
    return f"<h3>Loss</h3>{panels(losses)}{''.join(others)}"


def loss_chart(stage, steps):
    line = smooth([(record["step"], record.get("loss")) for record in steps])
    ys = [y for _, y in line]
    log = bool(ys) and min(ys) > 0 and max(ys) > 20 * min(ys)
    return [chart(stage, {"loss": line}, log=log)] if line else []


def stage_charts(steps):
    names = dict.fromkeys(name for record in steps for name in record)
    charts = []
    for title, patterns in CURVES.items():
        keys = [name for pattern in patterns for name in names if fnmatch(name, pattern)]
        lines = {}
        for key in keys:
            names.pop(key)
            line = smooth([(record["step"], record.get(key)) for record in steps])
            if line:
                lines[PREFIXES.sub("", key)] = line
        if len(lines) > LINES:
            charts += [chart(f"{title}: {name}", {name: line}) for name, line in lines.items()]
        elif lines:
            charts.append(chart(title, lines, key=len(lines) > 1))
    return charts


def smooth(points):
    """At most a hundred points, each the mean of its neighbours; what is not finite is left out."""
    points = [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
    reach = len(points) // SMOOTH // 2
    line = []
    for i in range(0, len(points), -(-len(points) // 100) or 1):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        line.append((points[i][0], sum(near) / len(near)))
    return line


def panels(charts):
    if not charts:
        return missing("nothing to draw yet")
    return f"<div class=panels>{''.join(charts)}</div>"


def legend(found):
    return "<div class=key>" + "".join(
        f'<span><i style="background:var(--{mode})"></i>{mode}</span>' for mode in modes_of(found)
    ) + "</div>"


# --------------------------------------------------------------------------------------------------
# tables


def top(found):
    parts = []
    means = [(phase, *mean) for phase, scores in found.scores.items() if (mean := best(scores))]
    if means:
        ends = (means[0], means[-1])
        said = " to ".join(f"{mean:.1f} % ({phase}, {mode})" for phase, mean, mode in ends)
        parts.append(f"<p>Right on held-out questions, best mode, mean of categories: {said}.</p>")
    if found.notes:
        notes = "; ".join(found.notes)
        parts.append(missing(f"Not all is here: {notes}."))
    return "".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML: whole <td> elements, or what stands in one. A row of one cell is as wide."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead><tbody>"]
    for row in rows:
        wide = f" class=head colspan={len(head)}" if len(row) == 1 else ""
        cells = [cell if cell.startswith("<td") else f"<td{wide}>{cell}</td>" for cell in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table><thead>{''.join(lines)}</tbody></table></div>"


def moved(difference, half):
    """A change in points; coloured where its interval is on one side of 0."""
    kind = "" if abs(difference) <= half else "up" if difference > 0 else "down"
    return f"<span class='{kind}'>{difference:+.1f}</span> <small>± {half:.1f}</small>"


def change_table(found):
    rows = []
    for phase, scores in found.scores.items():
        rows.append([f"<div><b>{phase}</b>: {PHASES[phase][1]}</div>"])
        for mode in [mode for mode in MODES if mode in scores]:
            old, mean, by_category = changes(found, phase, mode)
            sure = [n for n, (d, half) in by_category.items() if abs(d) > half]
            sure.sort(key=lambda name: -abs(by_category[name][0]))
            most = ", ".join(f"{escape(n)} {moved(*by_category[n])}" for n in sure)
            alone = mixed(scores[mode])
            rows.append([
                mode, old or "the first",
                moved(*mean) if mean else f"{alone[0]:.1f}" if alone else "",
                f"<td class=words>{most or ('none for sure' if old else '')}</td>",
            ])
    sure = "<span class=words>categories that moved by more than their interval</span>"
    head = ["mode", "compared with", "mixed", sure]
    note = ("<p class=note>Points of accuracy ± half the 95 % interval: of the questions whose "
            "answer changed where all answers were kept, else of the two shares. With many "
            "categories one in twenty moves by chance alone.</p>")
    return table(head, rows) + note if rows else ""


def share(c: dict, beside: str = "") -> str:
    """A cell: the accuracy of a category, half its interval, and more words."""
    half = 50 * (c["high"] - c["low"])
    value = 100 * c["accuracy"]
    words = f"{value:.1f} <small>± {half:.1f}{beside}</small>"
    return f'<td class=cell style="--v:{value:.0f}%">{words}</td>'


def beside_chance(c):
    blind = "" if c.get("blind") is None else f", blind {100 * c['blind']:.1f}"
    return f"{blind}, chance {100 * (c.get('chance') or 0):.1f}"


def score_table(found):
    names = category_names(found)
    common = [name for name in names if name not in APART]
    apart = [name for name in names if name in APART]
    rows = []
    for phase, scores in found.scores.items():
        for mode in [mode for mode in MODES if mode in scores]:
            categories = scores[mode]["categories"]
            cells = {
                name: share(c, beside_chance(c) if name in APART else "")
                for name, c in categories.items()
            }
            mean = mixed(scores[mode])
            rows.append([
                f"<b>{phase}</b> {mode}", *(cells.get(name, "") for name in common),
                "<b>{:.1f}</b> <small>± {:.1f}</small>".format(*mean) if mean else "",
                *(cells.get(name, "") for name in apart),
            ])
    head = ["phase and mode", *map(escape, common), "mixed", *apart]
    return table(head, rows) if rows else missing("no phase has a held-out score")


def auto_tables(found):
    """How often auto-think thinks: by difficulty in all phases, by category in the last one."""
    autos = {phase: s["auto_think"] for phase, s in found.scores.items() if "auto_think" in s}
    if not autos:
        return missing("no phase was asked in auto_think yet: the cold start teaches it")
    levels = sorted(set().union(*(result.get("thinking", {}) for result in autos.values())))
    rows = [
        [f"difficulty {escape(level)}", *(bar(r["thinking"].get(level)) for r in autos.values())]
        for level in levels
    ]
    first = table(["thinks, % of questions", *autos], rows)
    phase = list(autos)[-1]
    scores = found.scores[phase]
    fixed = [mode for mode in ("no_think", "think", "agentic_think") if mode in scores]
    rows = []
    for name, c in sorted(autos[phase]["categories"].items(), key=lambda item: item[1]["thought"]):
        others = [scores[mode]["categories"].get(name) for mode in fixed]
        cells = [share(other) if other else "" for other in others]
        rows.append([escape(name), bar(c["thought"]), share(c), *cells, f"{c['tokens']:.0f}"])
    head = [phase, "thinks, %", "right: auto_think", *fixed, "auto's tokens"]
    return f"{first}<p>Beside the modes that are asked for, by category:</p>{table(head, rows)}"


def bar(value):
    if value is None:
        return ""
    return f'<td class=cell style="--v:{100 * value:.0f}%">{100 * value:.0f}</td>'
