"""The documents name what is there: links, anchors, files, flags, words of the code."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from conftest import ROOT
from tools.run_docs import commands_of

FOLDERS = "kernels common toyworld tools tests docs .github".split()
FILES = [
    *(path for path in ROOT.iterdir() if path.is_file()),
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()),
]
PAGES = [path for path in FILES if path.suffix == ".md"]

LINK = re.compile(r"""\]\(([^()\s]+)\)|\b(?:src|href)=["']([^"']+)""")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./-]+\.(?:py|md|cpp|cuh?|toml|svg|cff)|[\w./-]+/")
FLAG = re.compile(r"--[a-z][\w-]+")
TORCHRUNS = {"--nnodes"}
# Quoted code: where it stands, and below that its lines, of which "..." leaves some out.
QUOTE = re.compile(r"^\[[^]]+\]\(([^)]+)\), `([\w.]+)`:\n\n```\w+\n(.*?)^```$", re.M | re.S)
WORDS = re.compile(r"[A-Za-z_]\w{2,}(?:\.\w+)*")
MODULE = re.compile(r"python -m (\w+)((?:\.\w+)*)")
# Paths that runs, users and data sets have, or that hold a word to fill in, such as STAGE.
MADE = re.compile(r"(runs|data|heldout|train|checkpoint|model|samples\.md)\b|.*[A-Z]{3}")


@cache
def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def links(page: Path) -> list[str]:
    found = [a or b for a, b in LINK.findall(text_of(page))]
    return [link for link in found if not re.match(r"\w+:", link)]  # those of the web are not asked


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings; of equal ones the second has -1 behind it."""
    seen = Counter()
    found = set()
    for title in re.findall(r"(?m)^#+ +(.*\S)", text_of(page)):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_files(page: Path) -> list[str]:
    """Of the paths in backticks, seen from the root or the page's folder. A bare name, as one that
    follows its folder's in a sentence, may be that of any file."""
    names = {path.name for path in FILES}
    missing = []
    for word in " ".join(CODE.findall(text_of(page))).split():
        if not FILE.fullmatch(word) or (MADE.match(word) and not (ROOT / word).exists()):
            continue
        if not ((ROOT / word).exists() or (page.parent / word).exists() or word in names):
            missing.append(word)
    for package, module in MODULE.findall(text_of(page)):
        path = ROOT / package / module.replace(".", "/").strip("/")
        there = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        if (ROOT / package).is_dir() and not there:
            missing.append(package + module)
    return missing


@cache
def code() -> str:
    """All files of code but this one."""
    files = [path for path in FILES if path.suffix in (".py", ".cpp", ".cu", ".toml", "")]
    files.remove(Path(__file__))
    return " ".join(map(text_of, files))


@cache
def words_of_code() -> set[str]:
    return set(re.findall(r"\w+", code())) | {path.stem for path in FILES}


def unknown_words(page: Path) -> list[str]:
    """Names in backticks that the code does not have."""
    unknown = []
    for name in CODE.findall(text_of(page)):
        if WORDS.fullmatch(name) and not FILE.fullmatch(name):
            if not words_of_code().issuperset(name.split(".")):
                unknown.append(name)
    return unknown


def unknown_flags(page: Path) -> set[str]:
    known = {*FLAG.findall(code()), *TORCHRUNS}
    spans = CODE.findall(text_of(page)) + [command.script for command in commands_of(page, "")]
    return {flag for span in spans for flag in FLAG.findall(span)} - known


def source_of(path: Path, name: str) -> list[str]:
    """Lines of a function or class of a Python file; of other languages from it to the end."""
    lines = text_of(path).splitlines()
    if path.suffix != ".py":
        begins = re.compile(rf"(?!//)\S.*\b{name}\(")
        return lines[next(i for i, line in enumerate(lines) if begins.match(line)) :]
    node = ast.parse(text_of(path))
    for part in name.split("."):
        node = next(inner for inner in node.body if getattr(inner, "name", "") == part)
    return lines[node.lineno - 1 : node.end_lineno]


def bare(lines: list[str]) -> str:
    return "\n".join(["", *map(str.strip, lines), ""])


def false_quotes(page: Path) -> list[str]:
    """Quoted lines that do not stand so in their function; between ... they follow each other."""
    wrong = []
    for link, name, quoted in QUOTE.findall(text_of(page)):
        try:
            rest = bare(source_of((page.parent / link).resolve(), name))
        except (OSError, StopIteration):
            wrong.append(f"{link}, {name}")
            continue
        for part in re.split(r"(?m)^ *\.\.\.\n", quoted):
            part = bare(part.splitlines())
            if part not in rest:
                wrong.append(f"{name}: {part.strip()}")
            rest = rest[rest.find(part) + len(part) - 1 :]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_files_and_flags_exist(page):
    assert broken_links(page) == []
    assert missing_files(page) == []
    assert unknown_flags(page) == set()
    assert false_quotes(page) == []


@pytest.mark.parametrize("name", ["docs/design.md", "docs/faq.md"])
def test_recipes_name_what_is_in_the_code(name):
    assert unknown_words(ROOT / name) == []


def test_what_is_not_there_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One: `two`\n# One two\n[a](#one-two) [b](#one-two-1) [c](#three) [d](page.md#one-two)\n"
        '[e](lost.md) <img src="lost.png"> [f](https://example.org/lost)\n'
        "`sft.py` `common/run.py` `attention.cpp` `kernels/` `runs/toy/grpo/` `test_STAGE.py`\n"
        "`lost.py` `common/lost.py` `lost/` `python absent.py --faster`\n"
        "`Run.score` `Run.lostword`\n"
        "python -m toyworld, python -m tools.soak, python -m tools.walkthrough, "
        "python -m tools.lost, python -m pytest\n"
    )
    assert broken_links(page) == ["#three", "lost.md", "lost.png"]
    gone = ["lost.py", "common/lost.py", "lost/", "absent.py", "tools.lost"]
    assert missing_files(page) == gone
    assert unknown_words(page) == ["Run.lostword"]
    assert unknown_flags(page) == {"--faster"}


def test_a_false_quote_is_found(tmp_path):
    python = ["class A:", "    def f(x):", "        a = 1", "        b = 2", "        c = 3", ""]
    cpp = ["// says f(x)", "int g() {}", "void f(int x) {", "    x = 1;", "    x = 2;", "}", ""]
    (tmp_path / "code.py").write_text("\n".join(python))
    (tmp_path / "code.cpp").write_text("\n".join(cpp))
    page = tmp_path / "page.md"

    def wrong(link, name, *lines):
        quoted = "\n".join(lines)
        page.write_text(f"[{link}]({link}), `{name}`:\n\n```python\n{quoted}\n```\n")
        text_of.cache_clear()
        return false_quotes(page)

    assert wrong("code.py", "A.f", "a = 1", "b = 2", "...", "c = 3") == []
    assert wrong("code.py", "A.f", "a = 1", "...", "c = 3") == []
    assert wrong("code.py", "A.f", "...", "c = 3") == []
    assert wrong("code.py", "A.f", "a = 1", "c = 3") == ["A.f: a = 1\nc = 3"]
    assert wrong("code.py", "A.f", "c = 3", "...", "a = 1") == ["A.f: a = 1"]
    assert wrong("code.py", "A.f", "a = 12") == ["A.f: a = 12"]
    assert wrong("code.py", "A.g", "a = 1") == ["code.py, A.g"]
    assert wrong("gone.py", "A.f", "a = 1") == ["gone.py, A.f"]
    assert wrong("code.cpp", "f", "x = 1;", "...", "}") == []
    assert wrong("code.cpp", "f", "int g() {}") == ["f: int g() {}"]
