"""common/index.py: where the lines of large files stand, and that it is found once."""

import gzip
import json
import os
import pickle
import random
import sys
from pathlib import Path

import pytest

from common import index
from common.index import made_once, table, write_places
from common.jsonl import Lines, index_some


@pytest.fixture(autouse=True)
def everything_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LARGE", 0)
    monkeypatch.setattr(index, "CACHE", tmp_path / "cache")


def places(path, target):
    write_places(path, target)
    return table(target).tolist()


def test_more_shards_than_a_process_may_have_open_files(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    for i in range(150):
        (tmp_path / f"{i:03d}.jsonl").write_text(f'{{"n": {i}}}\n')
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 50, limits[1]))
    try:
        lines = Lines(tmp_path)
        assert [record["n"] for record in lines] == list(range(150))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("block", [1, 2, 7, 100, 4096])
def test_places_are_those_of_all_lines_that_are_not_blank(tmp_path, monkeypatch, block):
    monkeypatch.setattr(index, "BLOCK", block)
    rng = random.Random(block)
    path = tmp_path / "a"
    blank = [b"\n", b"\r\n", b" \t\n", b"\f\n"]
    pieces = [*blank, b" x\n", b"x\n", b"3", b'{"a": 1}\n', b"\xe2\x80\xa8\n"]
    for k in range(40):
        data = b"".join(rng.choices(pieces, k=rng.randint(0, 9)))
        path.write_bytes(data)
        expected, offset = [], 0
        for number, line in enumerate(data.split(b"\n"), 1):
            length = min(len(line) + 1, len(data) - offset)
            if line.strip():
                expected.append([offset, length, number])
            offset += length
        assert places(path, tmp_path / f"{block}-{k}") == expected, data


RECORDS = [{"n": n, "text": "\u2028\u00e9" * (n % 5)} for n in range(50)]


def numbered(record):
    if "n" not in record:
        raise ValueError("no n")


def plain(records):
    return b"\n\n".join(json.dumps(r, ensure_ascii=False).encode() for r in records)


@pytest.mark.parametrize("data", [
    plain(RECORDS),
    b"\xef\xbb\xbf" + plain(RECORDS).replace(b"\n", b"\r\n"),
    gzip.compress(plain(RECORDS), mtime=0),
    json.dumps(RECORDS, indent=1).encode(),
])
def test_large_files_hold_what_small_ones_do(tmp_path, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    large, small = Lines(path, numbered, lazy=True), Lines(path, numbered)
    assert large.large and not small.large
    assert list(large) == list(small) == RECORDS
    assert [large.where(i) for i in range(50)] == [small.where(i) for i in range(50)]
    assert large.as_written(7) == RECORDS[7] and large.root == small.root == tmp_path
    again = pickle.loads(pickle.dumps(large))
    assert len(pickle.dumps(large)) < 1000 and list(again) == RECORDS


def kept(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_large_file_is_read_through_once(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(plain(RECORDS))
    made = []
    monkeypatch.setattr(
        "common.jsonl.write_places", lambda *args: made.append(args) or write_places(*args)
    )
    for _ in range(3):
        assert len(Lines(path, numbered, lazy=True)) == 50
    assert len(made) == 1 and len(kept(tmp_path)) == 1
    path.write_bytes(plain(RECORDS[:20]))
    assert list(Lines(path, lazy=True)) == RECORDS[:20] and len(made) == 2
    os.utime(path, ns=(0, 5))  # as large, but touched
    assert len(Lines(path, lazy=True)) == 20 and len(made) == 3
    assert len(kept(tmp_path)) == 1, "what was made of earlier versions is gone"


def test_ranks_share_the_work(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    for k in range(5):
        (folder / f"{k}.jsonl").write_bytes(plain(RECORDS[10 * k : 10 * k + 10]))
    for rank, count in ((0, 3), (1, 5)):
        index_some([folder], rank, 2)
        assert len(kept(tmp_path)) == count
    lines = Lines(folder, lazy=True)
    assert list(lines) == RECORDS and lines.where(31) == f"{folder}/3.jsonl:3"


def test_a_bad_line_of_a_large_file_is_said_when_it_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": \n{"m": 1}\n[1]\n')
    lines = Lines(path, numbered, lazy=True)
    assert len(lines) == 4 and lines[0] == {"n": 1} and lines.bad == []
    for i, why in ((1, "Expecting"), (2, "no n"), (3, "not list")):
        with pytest.raises(ValueError, match=why):
            lines[i]
        assert lines.where(i) == f"{path}:{i + 1}"


@pytest.mark.parametrize("data, why", [
    (b"\n \n", "a.jsonl: no lines"),
    (b"", "a.jsonl: no lines"),
    (b"PAR1", "a.jsonl:1: parquet: its name must end"),
    (gzip.compress(plain(RECORDS), mtime=0)[:-30], "a.jsonl: gzip cannot unpack it"),
    (b'[{"n": 1},\n{"n"', "a.jsonl:2: .*the array breaks here"),
])
def test_a_large_file_that_cannot_be_read_is_one_line(tmp_path, data, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=why):
        Lines(path, numbered, lazy=True)
    assert not [path for path in kept(tmp_path) if path.suffix == ".tmp"]


def test_without_a_place_for_the_index_there_is_one_for_this_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(index, "CACHE", tmp_path / "file" / "cache")
    path = tmp_path / "a.jsonl"
    path.write_bytes(plain(RECORDS))
    assert list(Lines(path, lazy=True)) == RECORDS
    assert "indexed anew at every start" in caplog.text


def test_no_room_for_the_index_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}")

    def fail(target):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="a.jsonl: its lines in .*cache.*: No space left on"):
        made_once(path, "lines", fail)
    assert kept(tmp_path) == []


def test_what_nobody_uses_any_more_is_forgotten(tmp_path):
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    for path in paths:
        path.write_bytes(gzip.compress(plain(RECORDS)) if path.suffix == ".gz" else plain(RECORDS))
        Lines(path, lazy=True)
    assert len(kept(tmp_path)) == 4  # of the first also what gzip had packed
    long_ago = index.time.time() - index.KEPT - 10
    for folder in (tmp_path / "cache").iterdir():
        (folder / "left.tmp").write_text("by a run that was killed")
        for path in (folder / "left.tmp", *folder.iterdir(), folder):
            os.utime(path, (long_ago, long_ago))
    Lines(paths[0], lazy=True)  # used again, before the next process starts
    mapped = Lines(paths[1], lazy=True)
    os.utime(next(f for f in (tmp_path / "cache").iterdir() if mapped._files[0]._kept.parent == f),
        (long_ago, long_ago))
    index.cache_folder.cache_clear()
    paths[0].write_bytes(gzip.compress(plain(RECORDS[:9])))
    assert len(Lines(paths[0], lazy=True)) == 9
    left = kept(tmp_path)
    assert sorted(path.suffix for path in left) == [".places", ".unpacked"]
    assert list(mapped) == RECORDS, "it still has its own"


def test_what_is_large_counts_all_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LARGE", 100)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"]
    for path, size in zip(paths, (60, 41, 12)):
        path.write_bytes(b"x" * size)
    assert not index.is_large(paths[:1]) and index.is_large(paths[:2])
    assert not index.is_large(paths[2:]) and index.is_large([paths[1], paths[2]])


def test_a_table_is_mapped(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"{}\n" * 1000)
    write_places(path, tmp_path / "places")
    rows = table(tmp_path / "places")
    assert rows.shape == (1000, 3) and rows[7].tolist() == [21, 3, 8]
    if sys.platform == "linux":
        assert str(tmp_path / "places") in Path("/proc/self/maps").read_text()
