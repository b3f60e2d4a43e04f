"""common/jsonl.py: which lines are good, where they stand, and what is said of the others."""

import json
import logging
import pickle

import pytest

from common.jsonl import Lines, write_lines


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
    assert list(Lines(path)) == records and path.read_text().endswith("\n")
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"n": 1}])
    with pytest.raises(TypeError):
        write_lines(path, [{"n": 2}, {"n": object()}])
    assert json.loads(path.read_text()) == {"n": 1}
