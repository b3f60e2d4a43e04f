"""What stands in a folder of data, and what of it training would drop: before hours of training.

    well = survey(Path("mydata"), processor, pack_tokens=8192)     prints tables; False: not usable

Every line is read and laid out, of pictures and clips the headers: no pixels are decoded.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

from common.conversation import check_training, conversations_of, media_items, read_header
from common.failures import MAX_BAD_SHARE, too_many
from common.forms import form_of
from common.jsonl import Lines, data_files
from common.media import MediaError
from common.questions import DISCOVER, PAIRS, POOL, check_question

COLUMNS = ("file", "lines", "forms", "pictures", "clips", "tokens", "longest", "dropped")
EXAMPLES = 3  # lines that are shown of each problem


def survey(folder: Path, processor, pack_tokens: int) -> bool:
    """Prints a table of the files in folder/train and folder/heldout, or of the folder itself.

    -> whether all of them can be used. processor: see data.py. pack_tokens: the most that a
    sample may have.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    parts = [part for part in (folder / "train", folder / "heldout") if part.is_dir()] or [folder]
    reports = []
    for part in parts:
        for name, path in data_files(part).items():
            reports.append(FileReport(path, *check_of(part.name, name), processor, pack_tokens))
    if not reports:
        raise ValueError(f"{folder}: no .jsonl or .json file in it, nor in its train and heldout")
    print_table([COLUMNS, *[report.row() for report in reports]])
    for report in reports:
        report.print_problems()
    return not any(report.refusal for report in reports)


def check_of(part: str, name: str) -> tuple:
    """How scripts check a record of a file, and whether they refuse a file for one bad line."""
    if name != PAIRS and (part == "heldout" or name in (*POOL, DISCOVER)):
        return check_question, True
    return check_training, False


def print_table(rows: list[tuple]):
    """Columns side by side; the first and the third hold words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths)):
            cells.append(cell.ljust(width) if i in (0, 2) else cell.rjust(width))
        print("  ".join(cells))


class FileReport:
    """One file: what is in it, and what is wrong with it.

    lines: good and bad; forms: how many of each; tokens, longest: of the lines that can be used;
    media: {(kind, source): whether it can be read}; dropped: {reason: ["path:12: why", ...]};
    refusal: why the file cannot be used at all, or "".
    """

    def __init__(self, path: Path, check, strict: bool, processor, pack_tokens: int):
        self.path = path
        self.processor = processor
        self.pack_tokens = pack_tokens
        self.lines = self.tokens = self.longest = 0
        self.forms = Counter()
        self.media = {}
        self.dropped = defaultdict(list)
        try:
            lines = Lines(path, check, max_bad_share=None)
        except (OSError, ValueError) as e:
            self.refusal = str(e)
            return
        self.lines = len(lines) + len(lines.bad)
        for where, why in lines.bad:
            self.dropped[re.sub(r"\d+", "N", why)].append(f"{where}: {why}")
        for i in tqdm(range(len(lines)), path.name, leave=False, disable=None):
            self.forms[form_of(lines.as_written(i))] += 1
            try:
                self.measure(lines[i], lines.root)
            except (MediaError, ValueError) as e:
                reason = getattr(e, "reason", "cannot be laid out")
                self.dropped[reason].append(f"{lines.where(i)}: {e}")
        self.refusal = self.refuse(len(lines.bad), strict)

    def measure(self, record: dict, root: Path):
        """Counts a record. MediaError or ValueError where training would drop it."""
        for item, kind in media_items(record):
            key = (kind, str(item[kind]))
            if not self.media.get(key):
                self.media[key] = False
                read_header(item[kind], kind, root, pixel_limit=self.processor.pixel_limit)
                self.media[key] = True
        layouts = [self.processor.layout(c, root) for c in conversations_of(record)]
        self.processor.fit(layouts, self.pack_tokens)
        tokens = sum(layout.tokens for layout in layouts)
        self.tokens += tokens
        self.longest = max(self.longest, tokens)

    def refuse(self, bad: int, strict: bool) -> str:
        """bad: lines that are so in themselves, whatever their media are."""
        dropped = self.count_dropped()
        if dropped == self.lines:
            return "no line of it can be used"
        if bad and strict:
            return "every line must be a question that can be judged"
        if bad > MAX_BAD_SHARE * self.lines or too_many(dropped - bad, self.lines - bad):
            return f"{dropped} of {self.lines} lines would be dropped, more than a run allows"
        return ""

    def count_dropped(self) -> int:
        return sum(map(len, self.dropped.values()))

    def row(self) -> tuple:
        found = []
        for kind in ("image", "video"):
            readable = Counter(ok for (of, _), ok in self.media.items() if of == kind)
            lost = f" ({readable[False]} unreadable)" if readable[False] else ""
            found.append(f"{readable[True]}{lost}")
        forms = ", ".join(f"{n} {form}" for form, n in self.forms.most_common()) or "none"
        numbers = [f"{n:,}" for n in (self.tokens, self.longest, self.count_dropped())]
        name = f"{self.path.parent.name}/{self.path.name}"
        return (name, f"{self.lines:,}", forms, *found, *numbers)

    def print_problems(self):
        if self.refusal:
            print(f"\n{self.path} cannot be used: {self.refusal:.300}")
        elif self.dropped:
            print(f"\n{self.path}: {self.count_dropped()} of {self.lines} lines would be dropped")
        for reason, places in self.dropped.items():
            print(f"  {len(places)} x {reason:.200}")
            for place in places[:EXAMPLES]:
                print(f"    {place:.300}")
