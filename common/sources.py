"""What an unfinished run was made from, by content: where that has changed, it starts over.

    if renewed(run, [folder / "train/questions.jsonl"], {"asked": 700}):
        ...                             what it had made and learnt is gone, and that was said
"""

import filecmp
import json
from pathlib import Path

from common.checkpoint import sha256
from common.run import Run


def renewed(run: Run, files: list[Path], numbers: dict, last: str = "") -> bool:
    """All ranks: whether the run's files or numbers have changed; then it has forgotten all.

    files: the data that it learns, or makes its own from; numbers: of the plan, for that; last: the
    stage that ends the phase, where it is another.

    Whoever corrects data and gives the same command again wants them to be learnt, and has no use
    for what was made of the old ones. But a phase that has left its last model keeps it, and says
    so: that is not thrown away unasked.
    """
    def look():
        return run.main and note(run, files, numbers)

    changed = run.gather_objects(run.attempt("cannot compare data", look))[0]
    if not changed:
        return False
    what = f"{', '.join(changed)} changed since {run.folder} was made"
    ends = [run.folder, run.folder.with_name(last or run.folder.name)]
    if all((folder / "done.json").exists() for folder in ends):
        run.say(f"{what}; it stays as it is (--fresh trains it again)")
        return False
    if run.args.resume:
        raise SystemExit(f"--resume: {what}; without --resume it starts over")
    run.say(f"{what}: it starts over")
    run.attempt(f"cannot clean {run.folder}", run.forget)
    run.attempt(f"cannot write to {run.folder}", look)
    return True


def note(run: Run, files: list[Path], numbers: dict) -> list[str]:
    """Writes data/made_from.json where there is none, else names what is no longer as it says."""
    data = run.folder / "data"
    now = {path.name: sha256(path) for path in files if path.exists()} | numbers
    if not (data / "made_from.json").exists():
        run.write_json("data/made_from.json", now)
    before = json.loads((data / "made_from.json").read_text())
    changed = [key for key in sorted(now | before) if now.get(key) != before.get(key)]
    for folder in {path.parent for path in files}:
        changed += changed_media(data / "media", folder)
    return changed


def changed_media(kept: Path, folder: Path) -> list[str]:
    """The first file below `kept` that is another one in the folder that it was linked from.

    A link is its source; where that is a new file, its content decides.
    """
    for path in sorted(kept.rglob("*")):
        source = folder / path.relative_to(kept)
        if source.is_file() and not filecmp.cmp(path, source):
            return [str(source)]
    return []
