"""The whole world: how many units of each kind there are, and a folder of all that they draw."""

import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common import sandbox
from toyworld.behaviour import behaviour_unit
from toyworld.clips import event_unit, match_unit, motion_unit, order_unit, reorder_unit
from toyworld.discover import DISCOVER, discover_unit
from toyworld.instructions import INSTRUCT, instruct_unit
from toyworld.pictures import (
    DETAIL,
    GROUNDING,
    VQA,
    caption_unit,
    detail_unit,
    interleaved_unit,
    ocr_unit,
    one_question_unit,
    scene_unit,
)
from toyworld.reasoning import REASONING, TEXT_TASKS, reasoning_unit, text_unit
from toyworld.thinking import conversations
from toyworld.unit import Unit


@dataclass
class Size:
    """How much there is of train, and how large."""

    sides: tuple[int, int]  # least and largest of a picture, in pixels
    pictures: int = 40_000
    clips: int = 5_000
    practice: int = 4  # times what KINDS says of post-training
    questions: int = 30_000  # at most, of the cold start


SIZES = {
    "toy": Size((84, 126), 16_000, 2_300, 1, 10_000),
    "tiny": Size((84, 168)),
    **dict.fromkeys(["small", "0.6b", "1.7b", "4b", "8b"], Size((84, 252))),
}


# ----------------------------------------------------------------------------- the plan


@dataclass
class Kind:
    """What draws a kind of unit, and how many there are."""

    draw: Callable
    share: float  # units of pre-training, as a share of the train pictures (or clips: see CLIPS)
    practice: int  # units of each task for post-training
    exam: float = 1  # units for each question of a held-out task
    tasks: list[str] = ("",)  # tasks with units of their own


KINDS = {
    "scene": Kind(scene_unit, 0.6, 0, exam=0),
    "caption": Kind(caption_unit, 0, 60, 0.2, list("12345")),
    "vqa": Kind(one_question_unit, 0, 250, tasks=VQA),
    "grounding": Kind(one_question_unit, 0, 80, tasks=GROUNDING),
    "ocr": Kind(ocr_unit, 0.12, 100),
    "interleaved": Kind(interleaved_unit, 0.06, 100),
    "motion": Kind(motion_unit, 0.4, 200),
    "order": Kind(order_unit, 0.22, 120),
    "event": Kind(event_unit, 0.23, 120),
    "match": Kind(match_unit, 0.05, 60),
    "reorder": Kind(reorder_unit, 0.25, 80),
    "reasoning": Kind(reasoning_unit, 0.08, 1500, len(REASONING)),
    "detail": Kind(detail_unit, 0.05, 1800, len(DETAIL)),
    "text": Kind(text_unit, 0.2, 600, len(TEXT_TASKS)),
    "instruct": Kind(instruct_unit, 0, 258, tasks=INSTRUCT),
    "discover": Kind(discover_unit, 0, 100, tasks=DISCOVER),
    "behaviour": Kind(behaviour_unit, 0, 500),
}
CLIPS = set("motion order event match reorder say_motion backwards".split())
OWN_FILES = {"instruct", "discover", "behaviour"}  # of train, beside questions.jsonl


def plan(pictures: int, clips: int, heldout: int, size: str | None = None) -> Iterator[tuple]:
    """(split, kind, units) of all kinds. heldout: questions of a held-out task.

    size: adds units for post-training, in proportion to that size's pictures and clips.
    """
    for name, kind in KINDS.items():
        total = clips if name in CLIPS else pictures
        yield "train", name, math.ceil(kind.share * total)
        for task in kind.tasks:
            full_name = f"{name}.{task}" if task else name
            yield "heldout", full_name, int(kind.exam * heldout)
            if size:
                practice = full_name if name in OWN_FILES else f"ask.{full_name}"
                full = SIZES[size]
                n = kind.practice * full.practice
                if CLIPS & {name, task}:
                    yield "train", practice, math.ceil(n * clips / full.clips)
                else:
                    yield "train", practice, math.ceil(n * pictures / full.pictures)


# ---------------------------------------------------------------------------- drawing

MEDIA = ["heldout/clips", "heldout/pictures", "train/clips", "train/pictures"]


def draw_unit(*which, dry=False) -> Unit:
    """which: folder, split, kind, index, seed and sides, as Unit has them."""
    unit = Unit(*which, dry)
    KINDS[unit.name].draw(unit)
    return unit


def unit_lines(folder, seed, sides, which):
    """which: (split, kind, index). -> [("train/vqa", line of that file), ...]"""
    unit = draw_unit(folder, *which, seed, sides)
    return [(f"{unit.split}/{name}", line) for name, line in unit.lines]


def draw_all(folder, counts, size, seed, workers, progress):
    """Draws what a plan counts, then what the cold start reads. -> {"train/vqa": lines of it}"""
    for media in MEDIA:
        (folder / media).mkdir(parents=True)
    units = [(split, kind, i) for split, kind, n in counts for i in range(n)]
    texts = defaultdict(list)

    def collect(results):
        for lines in results:
            for name, line in lines:
                texts[name].append(line)

    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers) if workers > 1 else nullcontext() as pool:
        # Results come in the order of the units: files are the same for any number of workers.
        imap = partial(pool.imap, chunksize=25) if pool else map
        drawn = imap(partial(unit_lines, folder, seed, SIZES[size].sides), units)
        collect(tqdm(drawn, "drawing", len(units), unit="unit", disable=not progress))

        questions = texts["train/questions"] + texts["train/detail"] + texts["train/instruct"]
        n = min(len(questions), SIZES[size].questions)
        chosen = random.Random(f"{seed}/thinking").sample(list(enumerate(questions)), n)
        chosen += enumerate(texts["train/premise"], len(questions))
        collect(imap(partial(conversations, folder / "train", seed), sorted(chosen)))
    return texts


def code_hash() -> str:
    """Of all files that decide what a world's bytes are."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(sandbox.__file__)]
    code = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(code).hexdigest()[:16]


def finished(out, settings):
    """world.json's content where `out` holds this very world. FileExistsError where it is none."""
    path = out / "world.json"
    if path.is_file():
        world = json.loads(path.read_text())
        return world if world["settings"] == settings else None
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(
            f"{out}: exists and is no toy world (no world.json); remove it or choose another --out"
        )


def lost(out, world) -> list[str]:
    """Which folders have fewer pictures or clips than were drawn: what cleans a disk takes some."""
    there = files_of(out)
    return [name for name, n in world["files"].items() if there.get(name, 0) < n]


def files_of(out):
    """How many pictures and clips are there."""
    return {media: len(os.listdir(out / media)) for media in MEDIA if (out / media).is_dir()}


def write_world(part, settings, texts):
    """Writes the JSONL files and world.json into a folder that has the media. -> its content"""
    counts = {}
    for name, lines in sorted(texts.items()):
        counts[f"{name}.jsonl"] = len(lines)
        (part / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = files_of(part)
    world = {"settings": settings, "files": files, "lines": counts}
    (part / "world.json").write_text(json.dumps(world, indent=1) + "\n")
    return world


def put_in_place(part, out, gone):
    """A world that was drawn aside takes its place, or gives what is gone from `out` back."""
    if gone:  # somebody may have changed lines, or put files of their own beside
        for media in gone:
            shutil.copytree(part / media, out / media, dirs_exist_ok=True)
        shutil.rmtree(part)
        return
    if out.exists():  # an empty folder, or a world of other settings
        shutil.rmtree(out)
    os.replace(part, out)


def make_world(
    out: str | Path,
    size: str = "toy",
    pictures: int | None = None,
    clips: int | None = None,
    seed: int = 0,
    workers: int = 2,
    heldout: int = 120,
    progress: bool = True,
) -> dict:
    """Draws the world into folder `out`, unless it is there already. -> world.json's content

    pictures, clips: how many of train (None: the size's). heldout: questions of a held-out task.
    workers: processes (1: none besides this one). A world of the same settings and code is kept,
    and the result has "reused"; files that it has lost are put back. Raises FileExistsError where
    `out` holds something that is no world, ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r}: one of {', '.join(SIZES)}")
    pictures = SIZES[size].pictures if pictures is None else pictures
    clips = SIZES[size].clips if clips is None else clips
    settings = {"size": size, "pictures": pictures, "clips": clips, "seed": seed}
    settings |= {"heldout": heldout, "code": code_hash()}
    out = Path(out)
    old = finished(out, settings)
    gone = lost(out, old) if old else []
    if old and not gone:
        return old | {"reused": True}
    if gone:
        print(f"{out}: files are gone from {', '.join(gone)}; they are drawn again")

    # Drawn beside `out` and renamed when it is complete: never half a world.
    began = time.time()
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    counts = plan(pictures, clips, heldout, size)
    texts = draw_all(part, counts, size, seed, workers, progress)
    world = write_world(part, settings, texts)
    put_in_place(part, out, gone)
    return world | {"seconds": round(time.time() - began, 1)}
