"""What an unfinished run was made from, by content: where that has changed, it starts over.

    if renewed(run, [folder / "train/questions.jsonl"], {"asked": 700}):
        ...                             what it had made and learnt is gone, and that was said
    note_media(run.folder / "data")     when media have been linked below it
"""

import hashlib
import json
import time
from pathlib import Path

from common.checkpoint import checkpoints, pieces, sha256
from common.jsonl import replacing, shards_of
from common.run import Run, released

# ours, in ns: a file that has changed so lately may change again within one tick of its clock
SETTLED = 2 * 10**9
LARGE = 2**30  # bytes. ours: of larger sets pieces are compared, or a start would take hours
PIECES = 2**16  # ours: of such a set, 4 kB each, which take a second


def renewed(run: Run, files: list[Path], numbers: dict, last: str = "") -> bool:
    """All ranks: whether the run's files or numbers have changed; then it has forgotten all.

    files: the data that it learns, or makes its own from; numbers: of the plan, for that; last: the
    stage that ends the phase, where it is another.

    Whoever corrects data and gives the same command again wants them to be learnt, and has no use
    for what was made of the old ones. But a phase that has left its last model keeps it, and says
    so: that is not thrown away unasked. SystemExit, which names it, where a file cannot be read.
    """
    def look():
        return run.main and note(run, files, numbers)

    try:
        changed = run.gather_objects(run.attempt("cannot compare data", look))[0]
    except RuntimeError as e:
        raise SystemExit(str(e)) from None
    if not changed:
        return False
    what = f"{', '.join(changed)} changed since {run.folder} was made"
    ends = [run.folder, run.folder.with_name(last or run.folder.name)]
    if all((folder / "done.json").exists() for folder in ends):
        run.say(f"{what}; it stays as it is (--fresh trains it again)")
        return False
    if run.args.resume:
        raise SystemExit(f"--resume: {what}; without --resume it starts over")
    if released(run.args.size) and run.gather_objects(checkpoints(run))[0]:
        raise SystemExit(f"{what}, and it has checkpoints: undo that, or start over with --fresh")
    run.say(f"{what}: it starts over")
    run.attempt(f"cannot clean {run.folder}", run.forget)
    run.attempt(f"cannot write to {run.folder}", look)
    return True


def note(run: Run, files: list[Path], numbers: dict) -> list[str]:
    """Writes data/made_from.json where there is none, else names what is no longer as it says."""
    data = run.folder / "data"
    path = data / "made_from.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now = dict(numbers)
    for file in files:
        shards = shards_of(file) if file.exists() else []
        total = sum(shard.stat().st_size for shard in shards)
        for shard in shards:
            name = file.name if shard == file else f"{file.name}/{shard.name}"
            now[name] = look_at(shard, before.get(name, (0, "")), total)
    if not before:
        run.write_json("data/made_from.json", now)
        before = now
    changed = []
    for key in sorted(before.keys() | now):
        if content_of(before.get(key)) != content_of(now.get(key)):
            changed.append(key)
    roots = {file.resolve() if file.is_dir() else file.resolve().parent for file in files}
    return changed + note_media(data, roots)


def look_at(path: Path, before=(0, ""), total: int = 0) -> list:
    """[time of its last change or 0, hash]; a file is read only if touched since `before`.

    The change time (ctime) moves with every write, and nobody can set it back. total: see hash_of.
    """
    changed = path.stat().st_ctime_ns
    if changed == before[0]:
        return before
    settled = time.time_ns() - changed > SETTLED
    return [changed if settled else 0, hash_of(path, total)]


def hash_of(path: Path, total: int = 0) -> str:
    """sha256 of a file; of a large set's, of its size and evenly spread pieces.

    total: bytes of the set that it belongs to.
    """
    size = path.stat().st_size
    total = max(size, total)
    if total < LARGE:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    for piece in pieces(path, max(1, PIECES * size // total)):
        digest.update(piece)
    return digest.hexdigest()


def content_of(value):
    """What counts of a number, or of a file as it was looked at."""
    return value[1] if isinstance(value, list) else value


def note_media(data: Path, folders=()) -> list[str]:
    """Adds what is new below data/media to data/media.json.

    -> the first that is another file now in one of the folders, which it was linked from. A kept
    file may be the source itself, by its link: only the notes tell then that it was edited.
    """
    path = data / "media.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    notes = dict(before)
    for kept in sorted((data / "media").rglob("*")):
        name = kept.relative_to(data / "media").as_posix()
        if name not in notes and kept.is_file():
            notes[name] = look_at(kept)
        for source in (folder / name for folder in folders):
            if name in notes and source.is_file():
                now = look_at(source, notes[name])
                if now[1] != notes[name][1]:
                    return [str(source)]
                notes[name] = now
    if notes != before:
        with replacing(path) as part:
            part.write_text(json.dumps(notes, indent=0))
    return []
