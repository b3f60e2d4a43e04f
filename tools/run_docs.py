"""Runs the commands of README.md, docs/walkthrough.md and docs/lessons as they stand there.

    python -m tools.run_docs                all, one after the other, in a fresh copy of the files
    python -m tools.run_docs --folder .     here, where `make toy` may have been already
    python -m tools.run_docs --list
    python -m tools.run_docs --folder . --only docs/lessons/1-attention.md --show

A command is a block that opens with ```sh; bash runs it up to its first error. Words behind the sh
say why it is not run: "```sh eight GPUs". The lines of a ```text block right behind it are printed
by it, in this order, perhaps among others: there ... stands for anything, such as a time, and a
number with a point may be 3 % or 0.03 off, as machines round differently. Where a command ends with
an error or prints something else, that is said, and the exit code is 1.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/walkthrough.md", "docs/lessons/*.md"]
BLOCK = re.compile(r"^```sh *([^\n]*)\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.M | re.S)
PIECE = re.compile(r"(\.\.\.|\d+\.\d+|\s+)")


@dataclass
class Command:
    where: str  # page:line
    reason: str  # why it is not run; "": it is
    script: str
    expected: list[str]  # lines that it prints


def commands_of(page: Path, name: str) -> list[Command]:
    text = page.read_text("utf-8")
    found = []
    for block in BLOCK.finditer(text):
        reason, script, expected = block.groups("")
        line = text.count("\n", 0, block.start(2)) + 1
        found.append(Command(f"{name}:{line}", reason, script, expected.splitlines()))
    return found


def all_commands(root: Path, only: str | None = None) -> list[Command]:
    """Of the pages below root, or of one. SystemExit where it has none."""
    paths = sorted(path for form in ([only] if only else PAGES) for path in root.glob(form))
    paths.sort(key=lambda path: path.parent != root)  # README.md first: it trains what others use
    found = [c for path in paths for c in commands_of(path, path.relative_to(root).as_posix())]
    if not found:
        raise SystemExit(f"{root}: no command in {only or ', '.join(PAGES)}")
    return found


def agrees(wanted: str, printed: str) -> bool:
    """One line: whole numbers and words alike, numbers with a point nearly, ... anything."""
    decimals = []
    pattern = ""
    for piece in PIECE.split(wanted.strip()):
        if piece == "...":
            pattern += ".*"
        elif re.fullmatch(r"\d+\.\d+", piece):
            decimals.append(float(piece))
            pattern += r"(\d+\.\d+)"
        else:
            pattern += r"\s+" if piece.isspace() else re.escape(piece)
    found = re.fullmatch(pattern, printed.strip())
    return bool(found) and all(
        math.isclose(a, float(b), rel_tol=0.03, abs_tol=0.03)
        for a, b in zip(decimals, found.groups())
    )


def missing_line(expected: list[str], printed: str) -> str | None:
    """The first expected line that is not printed behind those before it."""
    rest = iter(printed.splitlines())
    for wanted in expected:
        if not any(agrees(wanted, line) for line in rest):
            return wanted
    return None


def run(command: Command, folder: Path, show: bool = False) -> str:
    """Runs it -> what is wrong, or "". show: also prints what it printed."""
    path = [folder / ".venv" / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        ["bash", "-e", "-c", command.script], cwd=folder, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )
    if show:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-10:])
        return f"exit code {done.returncode}, at the end:\n{last}"
    lost = missing_line(command.expected, done.stdout)
    return "" if lost is None else f"does not print {lost!r}, but:\n{done.stdout}"


def copy_to(folder: Path):
    """The files of the repository, as they are now, without what runs have left."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run_all(commands: list[Command], folder: Path, show: bool = False) -> int:
    """Runs and reports them one by one -> how many are wrong."""
    wrong = skipped = 0
    for command in commands:
        first = command.script.split("\n")[0]
        print(f"{command.where}: {first}", flush=True)
        if command.reason:
            print(f"    not run: {command.reason}", flush=True)
            skipped += 1
            continue
        begin = time.time()
        fault = run(command, folder, show)
        wrong += bool(fault)
        said = "as written" if command.expected else "ended well"
        print(f"    {time.time() - begin:.0f} s, {fault.rstrip() or said}", flush=True)
    ran = len(commands) - skipped
    print(f"{ran} commands run, {wrong} of them wrong; {skipped} not run")
    return wrong


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, help="where to run (default: a fresh copy, removed at the end)")
    add("--only", metavar="FILE", help="the commands of this page")
    add("--show", action="store_true", help="print what the commands print")
    add("--list", action="store_true", help="print the commands, and run none")
    args = parser.parse_args(argv)
    commands = all_commands(args.folder or ROOT, args.only)
    if args.list:
        for command in commands:
            reason = f"  (not run: {command.reason})" * bool(command.reason)
            print(f"{command.where}{reason}\n{command.script}")
        return
    if args.folder:
        raise SystemExit(run_all(commands, args.folder.resolve(), args.show) > 0)
    with tempfile.TemporaryDirectory() as folder:
        copy_to(Path(folder))
        raise SystemExit(run_all(commands, Path(folder), args.show) > 0)


if __name__ == "__main__":
    main()
