"""common/jsonl.py: which lines are good, where they stand, and what is said of the others."""

import errno
import gzip
import io
import json
import logging
import os
import pickle

import pytest

from common import checkpoint, index, jsonl, tars
from common.jsonl import Lines, data_files, data_name, write_lines


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the names of tests hold it: no time in them


def numbered(record):
    if "n" not in record:
        raise ValueError("no n")


def fill(path, *lines):
    path.write_bytes(b"\n".join(line.encode() for line in lines))
    return path


def test_records_come_back_with_their_places(tmp_path):
    second = '{"n": 2, "text": "a\u2028b\x85"}\r'
    path = fill(tmp_path / "a.jsonl", '{"n": 1}', "", second, "  ", '{"n": 3}')
    lines = Lines(path)
    assert len(lines) == 3 and [record["n"] for record in lines] == [1, 2, 3]
    assert lines[1]["text"] == "a\u2028b\x85"
    assert [lines.where(i) for i in range(3)] == [f"{path}:1", f"{path}:3", f"{path}:5"]
    assert lines.path == path and lines.root == tmp_path and lines.bad == []
    with pytest.raises(IndexError):
        lines[3]


def test_root_is_the_real_folder(tmp_path):
    (tmp_path / "real").mkdir()
    fill(tmp_path / "real/a.jsonl", "{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real/a.jsonl")
    assert Lines(tmp_path / "link.jsonl").root == tmp_path / "real"


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\n{"n": 2}\n')
    assert [record["n"] for record in Lines(tmp_path / "a.jsonl", numbered)] == [1, 2]


def test_every_line_is_checked_once(tmp_path):
    seen = []
    lines = Lines(fill(tmp_path / "a.jsonl", '{"n": 1}', '{"n": 2}'), seen.append)
    assert lines[1] == {"n": 2} and list(lines) == [{"n": 1}, {"n": 2}]
    assert seen == [{"n": 1}, {"n": 2}]


def test_records_that_are_held_are_parsed_once(tmp_path, monkeypatch):
    """Also those of a folder, and with bad ones among them."""
    (tmp_path / "set").mkdir()
    fill(tmp_path / "set/a.jsonl", '{"n": 1}', "{}", '{"n": 2}')
    fill(tmp_path / "set/b.jsonl", '{"n": 3}')
    parsed = []
    parse = jsonl._parse
    monkeypatch.setattr(jsonl, "_parse", lambda data: parsed.append(data) or parse(data))
    lines = Lines(tmp_path / "set", numbered, max_bad_share=None, held=True)
    assert list(lines) == [{"n": 1}, {"n": 2}, {"n": 3}] and lines[2] == {"n": 3}
    assert len(parsed) == 4 and [where[-9:] for where, _ in lines.bad] == ["a.jsonl:2"]
    with pytest.raises(IndexError):
        lines[3]


@pytest.mark.parametrize(
    "wrong, why",
    [
        (b'{"n": ', "Expecting"),
        (b'{"n": "\xff\xfe"}', "utf-8"),
        (b'{"n": "\xed\xa0\xbd"}', "utf-8"),
        (b"[" * 100_000, "deep"),
        (b"[1]", "object, not list"),
        (b"3", "object, not int"),
        (b"{}", "no n"),
        (b'{"n": 1},', "Extra data"),
    ],
)
def test_a_bad_line_is_an_error_with_its_place(tmp_path, wrong, why):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n' + wrong + b'\n{"n": 3}\n')
    with pytest.raises(ValueError, match=rf"d.jsonl:3: .*{why}.*\(1 bad and 3 good"):
        Lines(path, numbered)


def test_a_share_of_bad_lines_is_skipped_with_warnings(tmp_path, caplog):
    path = fill(tmp_path / "d.jsonl", *['{"n": 1}'] * 30, *"{" * 5, *['{"n": 2}'] * 30)
    with caplog.at_level(logging.WARNING):
        lines = Lines(path, numbered, max_bad_share=5 / 65)
    assert len(lines) == 60
    assert [where for where, _ in lines.bad] == [f"{path}:{number}" for number in range(31, 36)]
    assert lines.where(30) == f"{path}:36" and lines[30] == {"n": 2}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4 and "d.jsonl:31" in said[0] and "5 bad lines skipped, 60 good" in said[3]
    with pytest.raises(ValueError, match=r"d.jsonl:31: Expecting.*\(5 bad and 60 good"):
        Lines(path, numbered, max_bad_share=0.07)


def test_a_file_without_a_good_line_is_an_error_at_any_share(tmp_path):
    with pytest.raises(ValueError, match="d.jsonl: no lines"):
        Lines(fill(tmp_path / "d.jsonl"))
    with pytest.raises(ValueError, match="d.jsonl: no lines"):
        Lines(fill(tmp_path / "d.jsonl", "", " ", ""), max_bad_share=1)
    with pytest.raises(ValueError, match="d.jsonl:2: .*1 bad and 0 good"):
        Lines(fill(tmp_path / "d.jsonl", "", "{"), max_bad_share=1)
    with pytest.raises(FileNotFoundError):
        Lines(tmp_path / "none.jsonl")


def test_a_line_that_was_edited_later_is_named(tmp_path):
    lines = Lines(fill(tmp_path / "d.jsonl", '{"n": 1}', '{"n": 2}'))
    fill(tmp_path / "d.jsonl", '{"n": 1000}', '{"n": 2}')
    with pytest.raises(ValueError, match=r"d.jsonl:2: changed since it was first read"):
        lines[1]


def test_an_index_can_be_sent_to_another_process(tmp_path):
    lines = Lines(fill(tmp_path / "d.jsonl", '{"n": 1}', '{"n": 2}'), numbered)
    again = pickle.loads(pickle.dumps(lines))
    assert list(again) == list(lines) and again.where(1) == lines.where(1)


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    records = [{"text": "a\nb\u2028c\ud83d"}, {"n": 2}]
    write_lines(path, iter(records))
    # half of a surrogate pair, a cut emoji, is no text
    assert list(Lines(path)) == [{"text": "a\nb\u2028c\ufffd"}, {"n": 2}]
    assert path.read_text().endswith("\n")
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"n": 1}])
    with pytest.raises(TypeError):
        write_lines(path, [{"n": 2}, {"n": object()}])
    assert json.loads(path.read_text()) == {"n": 1}


# Other forms of files


RECORDS = [
    {"n": 1, "text": "a\u2028\u00e9[,]"},
    {"n": 2, "deep": {"list": [1, {"x": "]"}]}},
    {"n": 3},
]


def array_of(records, **how):
    return json.dumps(records, ensure_ascii=False, **how).encode()


@pytest.mark.parametrize("data", [
    array_of(RECORDS),
    array_of(RECORDS, indent=2),
    b"\xef\xbb\xbf \r\n" + array_of(RECORDS, indent="\t").replace(b"\n", b"\r\n") + b"\n\n",
    zipped(array_of(RECORDS)),
])
def test_an_array_is_read_as_lines_are(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    lines = Lines(path, numbered)
    assert list(lines) == RECORDS and lines[1] == RECORDS[1]
    assert [lines.where(i) for i in range(3)] == [f"{path}: record {n}" for n in (1, 2, 3)]
    assert list(pickle.loads(pickle.dumps(lines))) == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.jsonl"])
@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_what_a_file_is_shows_in_its_bytes(tmp_path, name, pack):
    plain = b"".join(json.dumps(record).encode() + b"\r\n\r\n" for record in RECORDS)
    (tmp_path / name).write_bytes(pack(plain))
    lines = Lines(tmp_path / name)
    assert list(lines) == RECORDS and lines.where(2) == f"{tmp_path / name}:5"


def test_records_of_an_array_can_be_bad_by_themselves(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(array_of([{"n": 1}, 3, {"m": 1}, {"n": 4}]))
    lines = Lines(path, numbered, max_bad_share=0.5)
    assert [record["n"] for record in lines] == [1, 4] and lines.where(1) == f"{path}: record 4"
    assert [where for where, _ in lines.bad] == [f"{path}: record {n}" for n in (2, 3)]
    with pytest.raises(ValueError, match=r"a.json: record 2: .*object, not int \(2 bad and 2 good"):
        Lines(path, numbered)


@pytest.mark.parametrize("data, why", [
    (b'[{"n": 1},\n{"n": 2},]', ":2: Expecting value"),
    (b'[{"n": 1}\n{"n": 2}]', ":2: Expecting ','"),
    (b'[{"n": 1},\n\n{"n": ', ":3: Expecting value"),
    (b'[{"n": 1}]\n[]', ":2: Extra data"),
    (b'[{"n": 1},\n{"n": "\xe9"}]', ":2: no utf-8 text"),
    (b"[" * 100_000, ": nested too deeply"),
    (b"[]", ": no lines"),
    ('{"n": 1}\n{"n": 2}\n'.encode("utf-16"), ":1: UTF-16"),
    ('{"n": 1}\n{"n": 2}\n'.encode("utf-16-le"), ":1: NUL bytes, as of UTF-16"),
    (array_of(RECORDS).decode().encode("utf-16-le"), ":1: NUL bytes"),
    (array_of(RECORDS).decode().encode("utf-16-be"), ":1: NUL bytes"),
    ('{"n": "\u989c"}\n'.encode("gbk"), ":1: no utf-8 text at byte 8"),
    (b"PAR1\x15\x04", ":1: parquet: its name must end with .parquet"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ":1: a pointer of Git LFS"),
    (zipped(b'{"n": 1}\n' * 99)[:-20], ": gzip cannot unpack it"),
    (zipped('{"n": 1}'.encode("utf-16")), ":1: UTF-16"),
    (b'{\n  "n": 1\n}\n', ":1: Expecting .* must be one JSON object"),
])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, data, why):
    (tmp_path / "d.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=rf"d\.jsonl{why}") as error:
        Lines(tmp_path / "d.jsonl", numbered, max_bad_share=0.5)
    assert "\n" not in str(error.value)


def test_bad_lines_can_be_asked_for_without_refusal(tmp_path):
    lines = Lines(fill(tmp_path / "d.jsonl", "{", "{}"), numbered, max_bad_share=None)
    assert len(lines) == 0 and len(lines.bad) == 2


def test_records_of_other_forms_are_ours(tmp_path):
    asked = {"query": "<image>Q", "response": "A", "images": ["a.jpg"]}
    path = fill(tmp_path / "d.jsonl", json.dumps(asked), json.dumps(asked | {"images": []}))
    lines = Lines(path, max_bad_share=0.5)
    picture = {"type": "image", "image": "a.jpg"}
    assert lines[0]["messages"][0]["content"] == [picture, {"type": "text", "text": "Q"}]
    assert lines.as_written(0) == asked
    assert lines.bad[0][0] == f"{path}:2" and "1 places for images" in lines.bad[0][1]


# Folders


def test_the_files_of_a_folder_have_names(tmp_path):
    for name in ("b.jsonl", "a.json", "v1.2.jsonl.gz", "C.JSON.GZ", "notes.txt", "a.jpg"):
        (tmp_path / name).write_text("")
    (tmp_path / "d.jsonl").mkdir()
    (tmp_path / "e.jsonl").symlink_to("b.jsonl")
    files = {name: path.name for name, path in data_files(tmp_path).items()}
    assert files == {"C": "C.JSON.GZ", "a": "a.json", "b": "b.jsonl", "e": "e.jsonl",
                     "v1.2": "v1.2.jsonl.gz"}
    assert list(files) == sorted(files) and data_name(tmp_path / "v1.2.jsonl.gz") == "v1.2"
    assert data_files(tmp_path / "none") == {}


@pytest.mark.parametrize("names, why", [
    (["a.jsonl", "a.json.gz"], "a.json.gz have one name|a.jsonl and a.json.gz have one name"),
    (["a.jsonl", "a.parquet"], "a.parquet and a.jsonl have one name|a.jsonl and a.parquet have"),
    (["a.jsonl", "b.arrow"], r"b\.arrow: not read; \.jsonl, .* and \.parquet are"),
    (["a.jsonl.zst"], r"a\.jsonl\.zst: not read; \.jsonl, \.json"),
])
def test_a_folder_with_a_file_that_is_not_read(tmp_path, names, why):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=why):
        data_files(tmp_path)


def test_a_link_to_nothing_is_said(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("none.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: a link to nothing"):
        data_files(tmp_path)


def test_a_folder_of_shards_is_one_set(tmp_path):
    web = tmp_path / "web"
    web.mkdir()
    fill(web / "b.jsonl", '{"n": 3}', "", '{"n": 4}')
    (web / "a.jsonl.gz").write_bytes(zipped(b'{"n": 1}\n{"n": 2}\n'))
    fill(web / "empty.jsonl")
    fill(web / "config.json", '{"shards": 2}')
    fill(web / "notes.txt", "x")
    (tmp_path / "media").mkdir()
    fill(tmp_path / "media" / "a.jpg", "x")
    fill(tmp_path / "c.jsonl", '{"n": 5}')
    assert data_files(tmp_path) == {"c": tmp_path / "c.jsonl", "web": web}
    lines = Lines(web, numbered)
    assert [record["n"] for record in lines] == [1, 2, 3, 4] and lines.root == web
    assert [lines.where(i) for i in (1, 3)] == [f"{web}/a.jsonl.gz:2", f"{web}/b.jsonl:3"]
    assert list(pickle.loads(pickle.dumps(lines))) == list(lines)
    fill(web / "b.jsonl", '{"n": 3}', "{")
    with pytest.raises(ValueError, match=r"b.jsonl:2: .*\(1 bad and 3 good lines in this folder\)"):
        Lines(web, numbered)
    fill(tmp_path / "web.jsonl", "{}")
    with pytest.raises(ValueError, match="web.jsonl and web have one name"):
        data_files(tmp_path)


@pytest.mark.parametrize("names, why", [
    (["0.arrow", "1.arrow"], "0.arrow: not read"),
    (["0.jsonl", "1.jsonl.zst"], "1.jsonl.zst: not read"),
    (["0.tar.gz", "1.tar.gz"], "0.tar.gz: packed: samples are read from their places in a .tar"),
])
def test_a_folder_of_shards_that_are_not_read(tmp_path, names, why):
    (tmp_path / "web").mkdir()
    for name in names:
        fill(tmp_path / "web" / name, "{}")
    with pytest.raises(ValueError, match=why):
        data_files(tmp_path)


RECORD = {"id": 1, "conversations": [{"from": "human", "value": "x" * 5000}]}


@pytest.mark.parametrize("data, is_data", [
    (b'{"hidden_size": 64}', False),
    (json.dumps({"accuracy": {"vqa": 0.5}, "messages_per_s": 3}, indent=2).encode(), False),
    (zipped(b'\xef\xbb\xbf{"size": 1}\n{"size": 2}'), False),
    (json.dumps({"vocab": {"x" * 99: n for n in range(9)}, "n": ["y" * 9000]}).encode(), False),
    (b"3", False),
    (b'"text"', False),
    (b"[1, 2]", True),  # an array says itself what is wrong with it
    (b"", True),
    (b'{"broken": ', True),
    (json.dumps(RECORD).encode() * 2, True),
    (json.dumps(RECORD, indent=2).encode(), True),
    (b"\xef\xbb\xbf\n\n" + json.dumps(RECORD).encode() + b"\n{", True),
    (zipped(json.dumps(RECORD).encode()), True),
    (zipped(json.dumps(RECORD).encode())[:-9], True),
    (json.dumps(RECORD).encode("utf-16"), True),
])
def test_a_json_file_counts_where_it_holds_records(tmp_path, caplog, data, is_data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    for _ in range(2):
        assert data_files(tmp_path) == ({"config": path} if is_data else {})
    said = [record.getMessage() for record in caplog.records]
    passed = f"{path}: passed over: neither an array nor records with messages"
    assert said == ([] if is_data else [passed])  # once


# A disk that does not give all


class BadDisk(io.FileIO):
    """A file of which the disk gives no byte from `end` on."""

    end = 0

    def readinto(self, buffer):
        most = min(len(buffer), self.end - self.tell())
        if most <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(memoryview(buffer)[:most])

    def readall(self):
        while self.readinto(bytearray(1000)):
            pass


@pytest.fixture
def bad_disk(monkeypatch):
    """bad_disk(end): from now on our modules read so many bytes of a file."""

    def opened(path, mode="r", *more, **how):
        if mode == "rb":
            return io.BufferedReader(BadDisk(path), 16)
        return open(path, mode, *more, **how)

    def spoil(end):
        monkeypatch.setattr(BadDisk, "end", end)
        for module in (jsonl, index, tars, checkpoint):
            monkeypatch.setattr(module, "open", opened, raising=False)

    return spoil


def long_lines(path):
    """Of 5,000 bytes each: the start of a file, 4,096, is read by itself."""
    return fill(path, *[json.dumps({"n": 1, "text": "x" * 4981})] * 9)


def test_the_line_that_the_disk_does_not_give_is_named(tmp_path, bad_disk):
    path = long_lines(tmp_path / "a.jsonl")
    bad_disk(2 * 5000 + 40)
    with pytest.raises(ValueError) as caught:
        Lines(path)
    assert str(caught.value) == f"{path}:3: cannot be read: Input/output error"


def test_the_byte_of_a_large_file_that_the_disk_does_not_give_is_named(
    tmp_path, bad_disk, monkeypatch
):
    monkeypatch.setattr(index, "LARGE", 0)
    monkeypatch.setattr(index, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(index, "BLOCK", 1000)
    path = long_lines(tmp_path / "a.jsonl")
    bad_disk(12000)
    with pytest.raises(ValueError) as caught:
        Lines(path, lazy=True)
    assert str(caught.value) == f"{path}: byte 12001: cannot be read: Input/output error"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.tar"])
def test_any_file_that_the_disk_does_not_give_is_named(tmp_path, bad_disk, name):
    path = fill(tmp_path / name, '{"n": 1}')
    bad_disk(0)
    with pytest.raises(ValueError) as caught:
        Lines(path)
    assert str(caught.value) == f"{path}: cannot be read: Input/output error"


def test_a_line_that_the_disk_gives_no_more_is_a_bad_line(tmp_path, bad_disk):
    """It was there when the file was indexed."""
    lines = Lines(long_lines(tmp_path / "a.jsonl"))
    bad_disk(2 * 5000 + 40)
    assert lines[0]["n"] == 1
    with pytest.raises(ValueError, match=f"{lines.where(2)}: .*cannot be read: Input/output error"):
        lines[2]


def test_an_array_that_the_disk_does_not_give_is_named(tmp_path, bad_disk):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"n": 1, "text": "x" * 5000}] * 2))
    bad_disk(7000)
    with pytest.raises(ValueError) as caught:
        Lines(path)
    assert str(caught.value) == f"{path}: cannot be read: Input/output error"


def test_a_file_to_be_hashed_that_the_disk_does_not_give_is_named(tmp_path, bad_disk):
    path = fill(tmp_path / "a.jsonl", '{"n": 1}')
    bad_disk(4)
    for read in (checkpoint.sha256, lambda path: list(checkpoint.pieces(path))):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read: Input/output error$"):
            read(path)


def test_a_file_that_is_not_there_is_said_as_ever(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory: .*a.jsonl"):
        Lines(tmp_path / "a.jsonl")
