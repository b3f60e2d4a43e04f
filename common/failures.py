"""How much of what a run reads may be unusable, be it lines, samples, prompts or pairs.

    leave_out(run, failures, tried, "questions of vqa.jsonl")     few are said, many end the run

A few broken files among many are passed over by name. A run that lost more is not the run that its
folder says it is: it ends, and leaves no model.

One share for all, MAX_BAD_SHARE, counted in two ways. Of the lines of a file no more than that may
be bad: this is found before anything is trained, in a file that can be corrected. What only fails
when it is used, as a picture that is missing, is met later and often in a small set, of which a
share says little: there FEW may fail whatever their share, see too_many.
"""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from common.jsonl import Lines

MAX_BAD_SHARE = 0.05  # ours: a larger share ends the run
FEW = 5  # ours: so many samples, prompts or pairs may fail, but no more than a quarter of them


def too_many(failed: int, tried: int, share: float = MAX_BAD_SHARE) -> bool:
    """Of samples, prompts or pairs; lines of a file are counted by the share alone, in Lines."""
    return failed > max(share * tried, min(FEW, tried / 4))


def counted(failures: list[str], tried: int, what: str) -> str:
    """The line that says how many failed. failures: where and why; the first is named."""
    return f"{len(failures)} of {tried} {what} cannot be used, the first: {failures[0]}"


def refusal(failures: list[str], tried: int, what: str, share: float = MAX_BAD_SHARE) -> str | None:
    """Why a run ends, where too many failed."""
    if too_many(len(failures), tried, share):
        return f"{counted(failures, tried, what)}; more than {share:.0%} end a run"
    return None


def refuse_many(failures: list[str], tried: int, what: str, share: float = MAX_BAD_SHARE):
    """SystemExit where too many failed."""
    why = refusal(failures, tried, what, share)
    if why:
        raise SystemExit(why)


@contextmanager
def or_exit():
    """SystemExit, with the line that says why, where data cannot be read."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise SystemExit(str(e)) from None


def lines_or_exit(path: Path, check: Callable, held: bool = False) -> Lines:
    """The good lines of a file. SystemExit where many are bad, or it cannot be read."""
    with or_exit():
        return Lines(path, check, MAX_BAD_SHARE, held=held)


def say_failures(run, failures: list[str], tried: int, what: str):
    """All ranks: says how many failed, if any did. failures: of this rank; tried: of all ranks."""
    failures = sum(run.gather_objects(failures), [])
    if failures:
        run.say(f"skipped: {counted(failures, tried, what)}")


def leave_out(run, failures: list[str], tried: int, what: str):
    """All ranks: the same, but SystemExit where it is too much."""
    refuse_many(sum(run.gather_objects(failures), []), tried, what)
    say_failures(run, failures, tried, what)
