"""common/tars.py: samples in tar shards, their media read where they stand, and what is refused."""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_clips import write_clip
from test_data import assistant, image, talk, user
from test_media import noise

from common import index
from common.clips import Clip
from common.conversation import check_training, link_media, media_items
from common.jsonl import Lines, data_files, shards_of
from common.loader import Loader
from common.media import MediaError, open_media
from common.pictures import load_picture

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def png(k: int) -> bytes:
    file = io.BytesIO()
    noise(40 + k, 50, k).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def sample(k: int, name: str = "") -> list[tuple[str, bytes]]:
    name = name or f"{k:06d}"
    record = talk(user(image(f"{name}.png"), f"P{k:03d}"), assistant("yes"))
    return [(f"{name}.json", json.dumps(record).encode()), (f"{name}.png", png(k))]


def shards(folder: Path, counts=(3, 4), form=tarfile.PAX_FORMAT) -> Path:
    k = 0
    for n, count in enumerate(counts):
        write_tar(folder / f"{n:05d}.tar", sum((sample(k + i) for i in range(count)), []), form)
        k += count
    return folder


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LARGE", 0)
    monkeypatch.setattr(index, "CACHE", tmp_path / "cache")


def picture_of(lines: Lines, i: int) -> np.ndarray:
    ((item, kind),) = media_items(lines[i])
    return np.asarray(load_picture(item[kind], lines.root))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_samples_and_pictures_are_what_was_put_in(tmp_path, large, form, lazy):
    folder = shards(tmp_path / "web", form=form)
    lines = Lines(folder, check_training, lazy=lazy)
    assert len(lines) == 7 and lines.large == lazy
    for i in range(7):
        assert lines[i]["messages"][0]["content"][1]["text"] == f"P{i:03d}"
        assert np.array_equal(picture_of(lines, i), np.asarray(noise(40 + i, 50, i)))
    assert lines.where(4) == f"{folder}/00001.tar: sample 2"
    again = pickle.loads(pickle.dumps(lines))
    assert list(again) == list(lines)
    assert data_files(tmp_path) == {"web": folder}


def test_names_of_any_length_and_folder_are_read_as_tar_writes_them(tmp_path):
    """By the program tar, which also writes entries for folders, and names that begin with ./"""
    if not shutil.which("tar"):
        pytest.skip("no tar")
    long = "deep/" * 30 + "x" * 90
    for k, name in enumerate(["a.b/000", long]):
        for member, data in sample(k, name):
            file = tmp_path / "files" / member
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    for form in ("gnu", "pax"):
        path = tmp_path / form / "0.tar"
        path.parent.mkdir()
        command = ["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", tmp_path / "files"]
        subprocess.run([*command, "."], check=True)
        lines = Lines(path.parent)
        assert len(lines) == 2
        for i in range(2):
            assert np.array_equal(picture_of(lines, i), np.asarray(noise(40 + i, 50, i)))


def test_clips_are_decoded_from_the_tar(tmp_path):
    write_clip(tmp_path / "a.mp4", 8)
    record = {"messages": [
        {"role": "user", "content": [{"type": "video", "video": "1.mp4"}]}, assistant("grey"),
    ]}
    data = (tmp_path / "a.mp4").read_bytes()
    write_tar(tmp_path / "web/0.tar", [("1.mp4", data), ("1.json", json.dumps(record).encode())])
    lines = Lines(tmp_path / "web", check_training)
    ((item, _),) = media_items(lines[0])
    with Clip(item["video"], lines.root) as clip, Clip("a.mp4", tmp_path) as same:
        assert clip.times.tolist() == same.times.tolist() and len(clip.times) == 8
        assert clip.duration == same.duration


@pytest.mark.parametrize("record, expected", [
    ({"conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]},
     [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]),
    ({"query": "What?", "response": "A"},
     [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]),
    ({"messages": [user({"type": "image"}, "What?"), assistant("A")], "url": "http://x/1.png"},
     [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]),
    ({"image": "elsewhere/1.png", "query": "What?", "response": "A"},
     [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]),
])
def test_a_record_names_its_picture_or_has_a_place_for_it(tmp_path, record, expected):
    write_tar(tmp_path / "0.tar", [("1.json", json.dumps(record).encode()), ("1.png", png(1))])
    lines = Lines(tmp_path, check_training)
    content = lines[0]["messages"][0]["content"]
    for item in content:
        if item["type"] == "image":
            assert np.array_equal(picture_of(lines, 0), np.asarray(noise(41, 50, 1)))
            item["image"] = item["image"].rpartition("/")[2]
    assert content == expected
    assert lines.as_written(0).get("url") == record.get("url")


@pytest.mark.parametrize("note", [None, {"url": "http://x/1.png", "width": 64, "caption": "A"}])
def test_pictures_with_captions_as_the_web_has_them(tmp_path, note):
    """img2dataset's shards: a picture, its caption, and a JSON that says where it was found."""
    members = [("7.png", png(1)), ("7.txt", "Ein Käse.\n".encode())]
    if note:
        members.append(("7.json", json.dumps(note).encode()))
    write_tar(tmp_path / "0.tar", [*members, *sample(2, "8")])
    lines = Lines(tmp_path, check_training)
    asked, answer = lines[0]["messages"]
    assert [item["type"] for item in asked["content"]] == ["image"]
    assert answer == assistant("Ein Käse.")
    assert np.array_equal(picture_of(lines, 0), np.asarray(noise(41, 50, 1)))
    assert lines[1]["messages"][1] == assistant("yes")


def link(name: str, to: str, kind=tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


BAD_SAMPLES = {
    "2.json is missing beside 2.png": [("2.png", png(1))],
    "2.json is there 2 times": [*sample(2, "2"), ("2.json", b"{}")],
    "1: another sample of this shard has the same name": [*sample(2, "2"), *sample(1, "1")],
    "2.cls is neither JSON, a caption": [*sample(2, "2"), ("2.cls", b"7")],
    "README is neither JSON, a caption": [("README", b"how it was made")],
    "2.txt stands beside a JSON that is more than a note": [*sample(2, "2"), ("2.txt", b"a caption")],
    "2.txt: a caption without words": [("2.png", png(1)), ("2.txt", b" \n")],
    "2.txt: a caption without a picture": [("2.txt", b"a caption")],
    "2.1.png is there, but its JSON does not name it": [*sample(2, "2"), ("2.1.png", png(1))],
    "Expecting value at column 1": [("2.json", b"?"), ("2.png", png(1))],
    "expected a JSON object, not list": [("2.json", b"[]")],
    "no utf-8 text": [("2.json", b'{"\xff": 1}')],
    "2.png is no regular file: links": [sample(2, "2")[0], link("2.png", "/etc/passwd")],
    "2.json is no regular file": [link("2.json", "1.json", tarfile.LNKTYPE)],
}


@pytest.mark.parametrize("why", BAD_SAMPLES)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_bad_sample_is_one_line_that_says_what_and_where(tmp_path, large, why, lazy):
    path = tmp_path / "web" / "0.tar"
    write_tar(path, sample(1, "1"))
    with tarfile.open(path, "a") as tar:
        for member in BAD_SAMPLES[why]:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))
    lines = Lines(path.parent, check_training, max_bad_share=None, lazy=lazy)
    if lazy:
        with pytest.raises(ValueError) as e:
            lines[len(lines) - 1]
        bad = [(lines.where(len(lines) - 1), str(e.value))]
    else:
        bad = lines.bad
    assert len(bad) == 1 and bad[0][0] in (f"{path}: sample {n}" for n in (2, 3))
    assert why in bad[0][1] and "\n" not in bad[0][1]
    assert np.array_equal(picture_of(lines, 0), np.asarray(noise(41, 50, 1)))


def test_a_cut_or_broken_tar_is_refused_wherever_that_is(tmp_path, large):
    whole = shards(tmp_path / "web", (3,)) / "00000.tar"
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in (*range(0, end, 300), end):
        whole.write_bytes(data[:length])
        for lazy in (False, True):
            with pytest.raises(ValueError, match="00000.tar: the tar (breaks|is cut off)") as e:
                Lines(whole.parent, lazy=lazy)
            assert "byte" in str(e.value) and "\n" not in str(e.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        starts = [member.offset for member in tar]
    for start in starts:
        whole.write_bytes(data[:start] + b"x" * 512 + data[start + 512 :])
        with pytest.raises(ValueError, match="the tar breaks"):
            Lines(whole.parent)
    whole.write_bytes(data[:end] + b"\0" * 512 + data)  # two tars, one behind the other
    with pytest.raises(ValueError, match="the tar breaks"):
        Lines(whole.parent)


def test_a_member_of_negative_size_does_not_loop(tmp_path):
    """tarfile.py before 3.11.14 goes back and forth for ever."""
    entry = tarfile.TarInfo("1.json")
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "0.tar").write_bytes(bytes(header) * 2 + b"\0" * 1024)
    with pytest.raises(ValueError, match="0.tar: the tar breaks behind byte 0: .*negative size"):
        Lines(tmp_path)


@pytest.mark.parametrize("name, reason", [
    ("web/00000.tar@99999999+10/a.png", "truncated"),
    ("web/00000.tar@0+99999999/a.png", "truncated"),
    ("web/00000.tar@0+0/a.png", "empty"),
    ("../out.tar@0+10/a.png", "outside"),
    ("link.tar@0+10/a.png", "outside"),
    ("none.tar@0+10/a.png", "missing"),
    ("folder.tar@0+10/a.png", "unsupported"),
])
def test_a_place_in_a_tar_is_as_safe_as_a_path(tmp_path, name, reason):
    root = tmp_path / "root"
    shards(root / "web", (1,))
    (tmp_path / "out.tar").write_bytes(b"secret" * 10)
    (root / "link.tar").symlink_to(tmp_path / "out.tar")
    (root / "folder.tar").mkdir()
    with pytest.raises(MediaError) as e:
        open_media(name, root)
    assert e.value.reason == reason


def test_a_member_ends_where_it_ends(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(range(256)))
    with open_media("a.tar@10+20/x.png", tmp_path) as file:
        assert file.read() == bytes(range(10, 30))
        assert file.seek(-3, 2) == 17 and file.read(9) == bytes([27, 28, 29])
        assert file.seek(5) == 5 and file.read(1) == bytes([15]) and file.tell() == 6
        assert file.seek(99) == 99 and file.read() == b""
    with pytest.raises(OSError):
        file.fileno()


def test_a_broken_picture_names_the_shard_and_the_member(tmp_path):
    data = png(1)
    (record, _) = sample(1, "1")
    write_tar(tmp_path / "0.tar", [record, ("1.png", data[: len(data) // 2])])
    lines = Lines(tmp_path)
    with pytest.raises(MediaError, match=r"0\.tar@\d+\+\d+/1\.png: (truncated|corrupt)"):
        picture_of(lines, 0)


def test_media_of_a_tar_can_be_kept_by_a_run(tmp_path):
    lines = Lines(shards(tmp_path / "web", (2,)))
    for _ in range(2):
        kept = link_media(lines[1], lines.root, tmp_path / "data")
    ((item, _),) = media_items(kept)
    file = tmp_path / "data" / item["image"]
    assert file.read_bytes() == png(1)
    same = load_picture(item["image"], tmp_path / "data")
    assert np.array_equal(np.asarray(same), np.asarray(noise(41, 50, 1)))


def assert_goes_on(plain, packed, processor, workers):
    """Training on packed samples, left and gone on with, has the batches of those in files."""

    def steps(path, n, state=None):
        loader = Loader([(path, 1.0)], processor, 300, 2, workers=workers, state=state)
        return list(islice(loader, n))

    in_files = steps(plain, 6)
    seen = steps(packed, 2)
    seen += steps(packed, 4, json.loads(json.dumps(seen[-1][1]["state"])))
    for (batches, info), (same, of_packed) in zip(in_files, seen, strict=True):
        assert info["state"]["deferred"] == of_packed["state"]["deferred"]
        for batch, other in zip(batches, same, strict=True):
            assert all(torch.equal(batch[key], other[key]) for key in batch)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_sample_that_the_disk_does_not_give_is_one_bad_line(
    tmp_path, processor, monkeypatch, request, lazy
):
    if lazy:
        request.getfixturevalue("large")
    shard = shards(tmp_path / "web", (24,)) / "00000.tar"
    loader = Loader([(shard.parent, 1)], processor, 400, 2)
    begin = int(loader.files[0]._files[0].places[5, 0])  # of the sixth sample
    read = os.pread

    def pread(fd, size, at):
        if size and at == begin:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, size, at)

    monkeypatch.setattr(os, "pread", pread)
    for _ in islice(loader, 12):
        pass
    assert {why.split(": ")[1] for why in loader.failures} == {"sample 6"}
    assert all(why.endswith("cannot be read: Input/output error") for why in loader.failures)
    shard.unlink()  # and now no sample could be read
    with pytest.raises(SystemExit, match="cannot be opened any more: .*00000.tar"):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_shards_goes_on_with_exactly_the_next_sample(
    tmp_path, processor, large, workers
):
    """And sees what it would of the same samples in files."""
    folder = shards(tmp_path / "web", (12, 12))
    lines = []
    for k in range(24):
        (_, record), (name, data) = sample(k)
        (tmp_path / name).write_bytes(data)
        lines.append(record.decode())
    (tmp_path / "web.jsonl").write_text("\n".join(lines))

    assert_goes_on(tmp_path / "web.jsonl", folder, processor, workers)


def test_which_folders_are_sets(tmp_path, caplog):
    shards(tmp_path / "web", (1, 1))
    (tmp_path / "web" / "notes.txt").write_text("")
    write_tar(tmp_path / "pictures" / "all.tar", [("1.png", png(1))])
    for k in range(3):
        (tmp_path / "pictures" / f"{k}.png").write_bytes(png(k))
    write_tar(tmp_path / "lone.tar", sample(1))
    mixed = shards(tmp_path / "mixed", (1,))
    (mixed / "a.jsonl").write_text("{}")
    assert set(data_files(tmp_path)) == {"web", "mixed"}
    assert shards_of(mixed) == [mixed / "a.jsonl"]
    assert "1 tars are passed over beside a.jsonl" in caplog.text
    assert len(Lines(tmp_path / "lone.tar")) == 1
