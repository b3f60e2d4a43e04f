"""common/sources.py: an unfinished run starts over where what it was made from has changed."""

import json
import os
import shutil

import pytest

from common import checkpoint, sources
from common.sources import note_media, renewed
from phases import kept_process
from stage import begin

NUMBERS = {"asked": 7}


class Made:
    """A run in the middle, made from two files: it keeps data, and has a checkpoint."""

    def __init__(self, out):
        self.out = out
        self.a = out / "train" / "a.jsonl"
        self.b = out / "train" / "b.json"
        self.a.parent.mkdir()
        self.a.write_text('{"a": "red"}\n')
        self.b.write_text("[]")
        self.run = self.start()
        assert not self.look(), "there is nothing to be compared with"
        self.keep()

    def start(self, *flags):
        with kept_process():
            run, _, _ = begin(self.out, *flags)
        return run

    def keep(self):
        self.checkpoint = self.run.folder / "checkpoint" / "step-2"
        self.checkpoint.mkdir(parents=True)
        self.kept = self.run.folder / "data" / "a.jsonl"
        self.kept.write_text("kept")

    def look(self, numbers=NUMBERS, last=""):
        return renewed(self.run, [self.a, self.b], numbers, last)

    def is_whole(self):
        return self.kept.exists() and self.checkpoint.exists()


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


def test_the_same_content_is_the_same_whatever_its_time(made, capsys):
    copy = made.a.read_bytes()
    made.a.unlink()
    made.a.write_bytes(copy)
    os.utime(made.a, (1, 1))
    capsys.readouterr()
    assert not made.look() and made.is_whole()
    assert capsys.readouterr().err == ""


def test_a_file_that_the_disk_does_not_give_ends_the_run_in_one_line(made, monkeypatch):
    def broken(path):
        raise ValueError(f"{path}: cannot be read: Input/output error")

    made.a.write_text("changed")
    monkeypatch.setattr(sources, "sha256", broken)
    with pytest.raises(SystemExit) as ended:
        made.look()
    said = f"cannot compare data: rank 0: ValueError: {made.a}: cannot be read: Input/output error"
    assert str(ended.value) == said
    assert made.is_whole()


def test_what_earlier_runs_wrote_down_is_understood(made):
    """Hashes alone."""
    path = made.run.folder / "data" / "made_from.json"
    notes = json.loads(path.read_text())
    hashes = {name: notes[name][1] for name in ("a.jsonl", "b.json")}
    path.write_text(json.dumps(NUMBERS | hashes))
    assert not made.look()
    path.write_text(json.dumps(NUMBERS | hashes | {"b.json": hashes["a.jsonl"]}))
    assert made.look()


def test_other_content_of_the_same_size_and_time_is_another(made, capsys):
    before = made.a.stat()
    made.a.write_text('{"a": "tan"}\n')
    os.utime(made.a, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert made.look() and not made.kept.exists() and not made.checkpoint.exists()
    said = capsys.readouterr().err
    assert f"a.jsonl changed since {made.run.folder} was made: it starts over" in said
    made.keep()
    assert not made.look() and made.is_whole(), "what it is made from now is noted"


@pytest.mark.parametrize("numbers", [{"asked": 8}, {}, {"asked": 7, "seed": 1}])
def test_other_numbers_count_too(made, numbers, capsys):
    assert made.look(numbers) and not made.kept.exists()
    assert ("seed" if numbers.get("seed") else "asked") in capsys.readouterr().err
    assert not made.look(numbers)


def test_a_file_that_is_gone_or_new_counts_too(made, capsys):
    made.b.unlink()
    assert made.look()
    made.b.write_text("[]")
    assert made.look()
    assert capsys.readouterr().err.count("b.json changed") == 2


def test_a_finished_run_stays_and_says_so(made, capsys):
    made.run.write_json("done.json", {})
    made.a.write_text("other")
    for _ in range(2):  # each time
        assert not made.look() and made.is_whole()
        said = capsys.readouterr().err
        assert "a.jsonl changed" in said
        assert "it stays as it is (--fresh trains it again)" in said

    # a phase of several stages is finished when its last one is
    assert made.look(last="end") and not made.kept.exists()


def test_a_phase_that_is_finished_stays_as_a_whole(made):
    made.run.write_json("done.json", {})
    end = made.run.folder.with_name("end")
    end.mkdir()
    (end / "done.json").write_text("{}")
    made.a.write_text("other")
    assert not made.look(last="end") and made.is_whole()


def test_resume_insists_on_what_there_is(made):
    made.a.write_text("other")
    made.run = made.start("--resume")
    with pytest.raises(SystemExit, match="--resume: a.jsonl changed .* without --resume it starts"):
        made.look()
    assert made.is_whole()


@pytest.mark.parametrize("linked", [True, False])
def test_a_picture_that_was_replaced_is_noticed(made, linked, capsys):
    source = made.a.parent / "pictures" / "1.png"
    source.parent.mkdir()
    source.write_bytes(b"red")
    kept = made.run.folder / "data" / "media" / "pictures" / "1.png"
    kept.parent.mkdir(parents=True)
    if linked:
        os.link(source, kept)
    else:
        shutil.copy2(source, kept)
    (kept.parent / "drawn.png").write_bytes(b"of no file")
    assert not made.look()

    source.unlink()
    source.write_bytes(b"red")
    assert not made.look(), "it is the same"
    source.unlink()
    assert not made.look(), "there is nothing to make it from again"
    source.write_bytes(b"tan")
    assert made.look() and not kept.exists()
    assert f"{source} changed" in capsys.readouterr().err


def keep_linked(made, content: bytes):
    """A picture of the data, and the run's own link to it."""
    source = made.a.parent / "pictures" / "1.png"
    source.parent.mkdir()
    source.write_bytes(content)
    kept = made.run.folder / "data" / "media" / "pictures" / "1.png"
    kept.parent.mkdir(parents=True)
    os.link(source, kept)
    return source, kept


@pytest.mark.parametrize("length", [3, 5 * 2**20])
@pytest.mark.parametrize("settled", [False, True])
def test_a_picture_that_was_edited_in_place_is_noticed(made, length, settled, monkeypatch, capsys):
    """The kept link is the edited file itself: only what was noted tells."""
    if settled:
        monkeypatch.setattr(sources, "SETTLED", -1)
    source, kept = keep_linked(made, b"r" * length)
    note_media(made.run.folder / "data")
    assert not made.look() and not made.look(), "nothing has changed"
    before = source.stat()
    with open(source, "r+b") as f:
        f.seek(length // 2)
        f.write(b"t")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.path.samefile(source, kept) and source.stat().st_size == before.st_size
    assert made.look() and not kept.exists()
    assert f"{source} changed" in capsys.readouterr().err


def test_a_picture_that_was_only_touched_is_the_same(made):
    source, _ = keep_linked(made, b"red")
    note_media(made.run.folder / "data")
    os.utime(source, (1, 1))
    source.chmod(0o600)
    os.link(source, source.with_name("2.png"))  # as a later phase does
    assert not made.look() and made.is_whole()


def test_files_are_read_again_only_where_they_were_touched(made, monkeypatch):
    source, _ = keep_linked(made, b"red")
    monkeypatch.setattr(sources, "SETTLED", -1)
    (made.run.folder / "data" / "made_from.json").unlink()
    made.look()
    read = []

    def sha256(path):
        read.append(path.name)
        return checkpoint.sha256(path)

    monkeypatch.setattr(sources, "sha256", sha256)
    for touched in ([source], [], [source], []):
        for path in touched:
            path.chmod(0o600)
        assert not made.look()
        assert read == [path.name for path in touched]
        read.clear()


def test_of_a_large_set_pieces_are_compared(made, monkeypatch):
    """However small its files are: thousands of shards are not read at every start."""
    made.a.unlink()
    made.a.mkdir()
    for k in range(3):
        made.a.joinpath(f"{k}.jsonl").write_bytes(b"%d" % k * 40_000)
    monkeypatch.setattr(sources, "LARGE", 100_000)
    monkeypatch.setattr(sources, "PIECES", 12)
    whole = []
    monkeypatch.setattr(sources, "sha256", lambda path: whole.append(path) or "")
    assert made.look() and not made.look()
    assert set(whole) == {made.b}
    path = made.a / "1.jsonl"
    path.write_bytes(b"2" * 40_000)
    assert made.look()
    path.write_bytes(b"2" * 40_001)
    assert made.look()


def test_media_of_a_linked_file_stand_beside_what_it_links_to(made):
    source, kept = keep_linked(made, b"red")
    made.a.rename(made.a.parent / "real.jsonl")
    elsewhere = made.out / "elsewhere"
    elsewhere.mkdir()
    made.b.unlink()
    os.symlink(made.a.parent / "real.jsonl", elsewhere / "a.jsonl")
    made.a = made.b = elsewhere / "a.jsonl"
    made.look()  # the files are others than before
    made.keep()
    kept.parent.mkdir(parents=True)
    os.link(source, kept)
    assert not made.look()
    source.write_bytes(b"tan")
    assert made.look()
