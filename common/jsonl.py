"""JSONL files, the form of all data sets here: one JSON object a line, read by the line.

    lines = Lines("data/train/vqa.jsonl", check_conversation)
    record = lines[3]                # a dict; only this line is read
    print(lines.where(3))            # data/train/vqa.jsonl:4
    write_lines("kept.jsonl", (record for record in lines if wanted(record)))
"""

import json
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("jsonl")


def _parse(line: bytes) -> dict:
    # Some editors put a byte order mark before the first line; "utf-8-sig" takes it off.
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, not {type(record).__name__}")
    return record


class Lines(Sequence):
    """The records of a JSONL file, as a sequence of dicts that stays on disk.

    The file is read once, here: every line that is not blank is parsed and given to `check`, which
    raises ValueError for a record that cannot be used. Of good lines only the place in the file is
    kept, 16 bytes each, so a file may be larger than the memory. A line ends at b"\\n" alone, as
    JSON strings may hold other line separators (U+2028).

    path: the file; root: its folder, links resolved; bad: [("path:12", reason), ...].
    ValueError naming file and line when more than the share `max_bad_share` of the lines is bad,
    or when no line is good.
    """

    def __init__(
        self,
        path: str | Path,
        check: Callable[[dict], None] | None = None,
        max_bad_share: float = 0.0,
    ):
        self.path = Path(path)
        self.root = self.path.resolve().parent
        self.bad = []
        self._offsets = array("q")
        self._numbers = array("q")
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        record = _parse(line)
                        if check:
                            check(record)
                        self._offsets.append(offset)
                        self._numbers.append(number)
                    except ValueError as e:
                        self.bad.append((f"{self.path}:{number}", str(e)))
                offset += len(line)
        self._refuse(max_bad_share)

    def _refuse(self, max_bad_share):
        good, bad = len(self), len(self.bad)
        if good == 0 or bad > max_bad_share * (good + bad):
            where, why = self.bad[0] if self.bad else (self.path, "no lines")
            raise ValueError(f"{where}: {why} ({bad} bad and {good} good lines in this file)")
        for where, why in self.bad[:3]:
            log.warning("skipped line %s: %s", where, why)
        if bad:
            log.warning("%s: %d bad lines skipped, %d good", self.path, bad, good)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> dict:
        # Opened for every line: that costs 10 us, and processes share no position in the file.
        with open(self.path, "rb") as file:
            file.seek(self._offsets[i])
            line = file.readline()
        try:
            return _parse(line)
        except ValueError as e:
            raise ValueError(f"{self.where(i)}: changed since it was first read: {e}") from e

    def where(self, i: int) -> str:
        """The place of record i for messages: "path:12", lines counted from 1."""
        return f"{self.path}:{self._numbers[i]}"


def write_lines(path: str | Path, records: Iterable[dict]):
    """Write dicts as JSONL, whole or not at all."""
    with replacing(Path(path)) as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write a file at, which then takes the place of `path`, whole or not at all.

    It lies in the same folder, made if need be, under a name of this process: several may write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.unlink(missing_ok=True)
    yield part
    os.replace(part, path)
    # Renaming a link over another link to the same file leaves both.
    part.unlink(missing_ok=True)
