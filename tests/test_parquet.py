"""common/parquet.py: rows of parquet files as pyarrow and the library datasets write them."""

import datetime
import decimal
import json
import multiprocessing
import pickle
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from test_clips import write_clip
from test_data import assistant, image, talk, user
from test_media import noise
from test_tars import assert_goes_on, picture_of, png

from common import index, parquet
from common.clips import Clip
from common.conversation import check_training, link_media, media_items
from common.jsonl import Lines, data_files
from common.loader import Loader
from common.media import MediaError, open_media

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MEDIUM = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # datasets' Image and Video
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LARGE", 0)
    monkeypatch.setattr(index, "CACHE", tmp_path / "cache")


def turns(question: str, answer: str = "yes") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows_of(first: int, count: int) -> list[dict]:
    rows = []
    for k in range(first, first + count):
        shown = [{"bytes": png(k), "path": f"{k:03d}.png"}]
        rows.append({"id": k, "messages": turns(f"<image>P{k:03d}"), "images": shown})
    return rows


def write(path: Path, rows: list[dict], schema=None, group: int = 2, **options) -> Path:
    schema = schema or pa.schema([
        ("id", pa.int64()), ("messages", TURNS), ("images", pa.list_(MEDIUM))])
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, path, row_group_size=group, **options)
    return path


def shards(folder: Path, counts=(3, 4), **options) -> Path:
    k = 0
    for n, count in enumerate(counts):
        write(folder / f"train-{n:05d}-of-{len(counts):05d}.parquet", rows_of(k, count), **options)
        k += count
    return folder


# What is read


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"group": 100}, {"compression": "zstd", "use_dictionary": False},
    {"compression": "none", "data_page_version": "2.0", "write_page_index": True},
])
def test_rows_and_pictures_are_what_was_put_in(tmp_path, large, lazy, options):
    folder = shards(tmp_path / "web", **options)
    lines = Lines(folder, check_training, lazy=lazy)
    assert len(lines) == 7 and lines.large == lazy
    for i in (*range(7), 6, 0, 3, 5, 2):
        record = lines[i]
        assert record["messages"][0]["content"][1]["text"] == f"P{i:03d}" and record["id"] == i
        assert np.array_equal(picture_of(lines, i), np.asarray(noise(40 + i, 50, i)))
    assert lines.where(4) == f"{folder}/train-00001-of-00002.parquet: row 2"
    again = pickle.loads(pickle.dumps(lines))
    assert list(again) == list(lines)
    assert data_files(tmp_path) == {"web": folder}


def test_a_lone_file_is_a_set_and_may_be_a_link(tmp_path):
    path = write(tmp_path / "real" / "0000.parquet", rows_of(0, 3))
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / "vqa.parquet"
    link.symlink_to(path)
    assert data_files(tmp_path / "data") == {"vqa": link}
    lines = Lines(link, check_training)
    assert lines.where(1) == f"{link}: row 2"
    assert np.array_equal(picture_of(lines, 2), np.asarray(noise(42, 50, 2)))


def test_what_datasets_writes_is_read(tmp_path):
    """Image columns, lists of them, pictures in contents, and contents that are texts or lists."""
    datasets = pytest.importorskip("datasets")
    pictures = [noise(40 + k, 50, k) for k in range(3)]
    talks = [turns("<image>Q")] * 3
    content = [{"type": "image"}, {"type": "text", "text": "Q"}]
    mixed = [[{"role": "user", "content": content}, assistant("yes")]] * 3
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    in_place = []
    for picture in pictures:
        in_place.append([user({"type": "image", "image": picture}, "Q"), answer])
    sets = {
        "one": {"messages": talks, "image": pictures},
        "several": {"messages": talks, "images": [[picture] for picture in pictures]},
        "mixed": {"messages": mixed, "images": [[picture] for picture in pictures]},
        "in_place": {"messages": in_place},
    }
    for name, columns in sets.items():
        options = {"on_mixed_types": "use_json"} if name == "mixed" else {}
        made = datasets.Dataset.from_dict(columns, **options)
        made.to_parquet(tmp_path / f"{name}.parquet")
        lines = Lines(tmp_path / f"{name}.parquet", check_training)
        for i, picture in enumerate(pictures):
            assert np.array_equal(picture_of(lines, i), np.asarray(picture)), name
            assert lines[i]["messages"][0]["content"][1] == {"type": "text", "text": "Q"}
            assert lines[i]["messages"][1]["content"] in ("yes", answer["content"])


def test_bytes_stand_bare_in_structs_in_contents_and_paths_beside_them(tmp_path):
    noise(41, 50, 1).save(tmp_path / "1.png")
    item = pa.struct([("type", pa.string()), ("image", MEDIUM), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(item))])
    question = [
        {"type": "image", "image": {"bytes": png(0), "path": None}},
        {"type": "image", "image": {"bytes": None, "path": "1.png"}},
        {"type": "image", "image": {"bytes": png(2), "path": "a/b@c.png"}},
        {"type": "text", "text": "Q"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    asked = {"messages": [{"role": "user", "content": question}, answer]}
    write(tmp_path / "a.parquet", [asked], pa.schema([("messages", pa.list_(message))]))
    lines = Lines(tmp_path / "a.parquet", check_training)
    names = [item["image"] for item, _ in media_items(lines[0])]
    assert names == ["a.parquet@0+0/0", "1.png", "a.parquet@0+0/1-b@c.png"]
    for column, kind, value in (
        ("image", pa.binary(), png(0)), ("image", pa.large_binary(), png(0)),
        ("image", pa.string(), "1.png"), ("image", MEDIUM, {"bytes": png(0), "path": ""}),
        ("images", pa.list_(pa.binary()), [png(0)]), ("images", pa.list_(MEDIUM, 1), [
            {"bytes": None, "path": "1.png"}]),
    ):
        schema = pa.schema([("messages", TURNS), (column, kind)])
        row = {"messages": turns("<image>Q"), column: value}
        write(tmp_path / "b.parquet", [row, {"messages": turns("Q"), column: None}], schema)
        lines = Lines(tmp_path / "b.parquet", check_training)
        k = 1 if "1.png" in str(value) else 0
        assert np.array_equal(picture_of(lines, 0), np.asarray(noise(40 + k, 50, k)))
        assert media_items(lines[1]) == []


def test_columns_of_json_are_what_they_say(tmp_path):
    """datasets stores contents that are texts in one message and lists in another as JSON."""
    contents = ['[{"type": "text", "text": "\\u00e9"}]', '"say \\"yes\\""']
    storage = pa.array(contents)
    column = pa.ExtensionArray.from_storage(pa.json_(), storage)
    roles = pa.array(["user", "assistant"])
    messages = pa.StructArray.from_arrays([roles, column], ["role", "content"])
    column = pa.ListArray.from_arrays([0, 2], messages)
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    record = Lines(tmp_path / "a.parquet", check_training)[0]
    assert record["messages"][0]["content"] == [{"type": "text", "text": "\u00e9"}]
    assert record["messages"][1]["content"] == 'say "yes"'


def test_notes_of_all_types_are_kept_as_json_can(tmp_path):
    table = pa.table({
        "messages": pa.array([turns("Q")], TURNS),
        "seen": [datetime.date(2026, 1, 2)],
        "price": [decimal.Decimal("1.50")],
        "source": pa.array(["web"]).dictionary_encode(),
        "license": pa.array([None], pa.string()),
        "score": pa.array([0.5], pa.float16()),
        "tags": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())),
        "hash": [b"\0\1"],
    })
    pq.write_table(table, tmp_path / "a.parquet")
    record = Lines(tmp_path / "a.parquet", check_training)[0]
    assert json.loads(json.dumps(record)) == {
        "messages": turns("Q"), "seen": "2026-01-02", "price": "1.50", "source": "web",
        "score": 0.5, "tags": [{"key": "a", "value": 1}], "hash": "a.parquet@0+0/0",
    }


def test_clips_are_decoded_from_their_bytes(tmp_path):
    write_clip(tmp_path / "a.mp4", 8)
    row = {"messages": turns("<video>Q", "grey"), "video": {
        "bytes": (tmp_path / "a.mp4").read_bytes(), "path": "a.mp4"}}
    schema = pa.schema([("messages", TURNS), ("video", MEDIUM)])
    write(tmp_path / "web/0.parquet", [row], schema)
    lines = Lines(tmp_path / "web", check_training)
    ((item, _),) = media_items(lines[0])
    with Clip(item["video"], lines.root) as clip, Clip("a.mp4", tmp_path) as same:
        assert clip.times.tolist() == same.times.tolist() and len(clip.times) == 8


# What is refused


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", rows_of(0, 1))
    lines = Lines(path)
    monkeypatch.setattr(parquet, "window", parquet.Window())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert data_files(tmp_path) == {"a": path}
    with pytest.raises(ValueError, match=r"a\.parquet: .*: pip install pyarrow$") as e:
        Lines(path)
    assert "\n" not in str(e.value)
    with pytest.raises(MediaError, match="pip install pyarrow"):
        open_media("a.parquet@0+0/0", lines.root)


def test_a_pyarrow_without_json_columns_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", rows_of(0, 1))
    monkeypatch.delattr(pa, "json_")
    with pytest.raises(ValueError, match="a.parquet: .*pyarrow 19 or newer"):
        Lines(path)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_odd_row_is_one_line_and_others_stay(tmp_path, large, lazy):
    rows = rows_of(0, 5)
    rows[1]["messages"] = None
    rows[2]["images"] = []
    rows[3]["messages"] = turns("<image>Q")[:1]
    path = write(tmp_path / "web" / "0.parquet", rows)
    lines = Lines(path.parent, check_training, max_bad_share=None, lazy=lazy)
    whys = ["non-empty list", "1 places for images", "nothing to learn"]
    if lazy:
        assert len(lines) == 5
        bad = []
        for i in (1, 2, 3):
            with pytest.raises(ValueError) as e:
                lines[i]
            bad.append((lines.where(i), str(e.value)))
    else:
        assert [record["id"] for record in lines] == [0, 4]
        bad = lines.bad
    assert [where for where, _ in bad] == [f"{path}: row {n}" for n in (2, 3, 4)]
    for (_, said), why in zip(bad, whys, strict=True):
        assert why in said and "\n" not in said


@pytest.mark.parametrize("data, why", [
    (b"", "a.parquet: no parquet that can be read"),
    (b"PAR1", "a.parquet: no parquet that can be read"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    (b'{"n": 1}\n' * 9, "a.parquet: no parquet that can be read"),
    (bytes(range(256)), "a.parquet: no parquet that can be read"),
])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_that_is_no_parquet_is_one_line(tmp_path, large, data, why, lazy):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=why) as e:
        Lines(tmp_path / "a.parquet", lazy=lazy)
    assert "\n" not in str(e.value)


def test_a_cut_file_and_a_cut_page_are_said(tmp_path, large):
    path = write(tmp_path / "a.parquet", rows_of(0, 6), compression="none")
    data = path.read_bytes()
    for length in range(0, len(data) - 1, 997):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="a.parquet: no parquet that can be read"):
            Lines(path, lazy=True)
    for at in range(4, len(data) // 2, 1499):
        path.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        lines = Lines(path, lazy=True)
        for i in range(6):  # an error that names the row, or a picture; never another's
            try:
                picture = picture_of(lines, i)
                assert picture.shape == (50, 40 + i, 3)
            except MediaError as e:
                assert str(e).startswith(f"a.parquet@{i // 2}+{i % 2}/0-{i:03d}")
            except ValueError as e:
                assert "\n" not in str(e)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    write(tmp_path / "out.parquet", rows_of(0, 1))
    root = tmp_path / "root"
    root.mkdir()
    (root / "in.parquet").symlink_to(tmp_path / "out.parquet")
    for name in ("in.parquet@0+0/0", "../out.parquet@0+0/0"):
        with pytest.raises(MediaError) as e:
            open_media(name, root)
        assert e.value.reason == "outside"


@pytest.mark.parametrize("name, reason", [
    ("a.parquet@9+0/0", "corrupt"), ("a.parquet@0+9/0", "corrupt"), ("a.parquet@0+0/7", "corrupt"),
    ("a.parquet@0+0/x", "corrupt"), ("b.parquet@0+0/0", "missing"), ("a.parquet@0+1/0", "empty"),
    ("folder.parquet@0+0/0", "unsupported"), ("a.parquet@0+0", "missing"),
])
def test_a_place_that_is_not_there_is_named(tmp_path, name, reason):
    rows = rows_of(0, 2)
    rows[1]["images"][0]["bytes"] = b""
    write(tmp_path / "a.parquet", rows)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(MediaError) as e:
        open_media(name, tmp_path)
    assert e.value.reason == reason and name in str(e.value)


def test_large_row_groups_are_said(tmp_path, caplog, monkeypatch):
    path = write(tmp_path / "a.parquet", rows_of(0, 4))
    Lines(path)
    assert not caplog.text
    monkeypatch.setattr(parquet, "LARGE", 1000)
    Lines(path)
    assert f"{path}: row groups of up to 0 MB: a sample costs half of one" in caplog.text


# Memory, processes, runs


def test_no_more_than_a_few_rows_are_held(tmp_path, large):
    """However large the row group: read in order, and read at random."""
    count, size = 200, 100_000
    rows = []
    for k in range(count):
        data = np.random.default_rng(k).bytes(size)
        rows.append({"messages": turns("<image>Q"), "image": {"bytes": data, "path": None}})
    schema = pa.schema([("messages", TURNS), ("image", MEDIUM)])
    pages = {"write_batch_size": 4, "data_page_size": 4 * size}
    path = write(tmp_path / "a.parquet", rows, schema, group=count, **pages)
    del rows
    lines = Lines(path, check_training, lazy=True)
    before = pa.total_allocated_bytes()
    most = 0
    for i in (*range(count), *np.random.default_rng(0).permutation(count)[:20].tolist()):
        ((item, _),) = media_items(lines[i])
        with open_media(item["image"], lines.root) as file:
            assert file.read() == np.random.default_rng(i).bytes(size)
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 3 * parquet.ROWS * size + 4 * parquet.BUFFER < count * size / 2


def read_some(lines, order, told):
    told.put([lines[i]["id"] for i in order])


def test_forked_processes_do_not_disturb_each_other(tmp_path, large):
    lines = Lines(write(tmp_path / "a.parquet", rows_of(0, 40), group=40), lazy=True)
    assert lines[2]["id"] == 2  # the window that all go on with
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()
    order = list(range(3, 40))
    processes = [fork.Process(target=read_some, args=(lines, order, told)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [lines[i]["id"] for i in order] == order
    assert [told.get() for _ in processes] == [order, order]
    for process in processes:
        process.join()


def test_media_of_a_row_can_be_kept_by_a_run(tmp_path):
    lines = Lines(shards(tmp_path / "web", (2,)))
    for _ in range(2):
        kept = link_media(lines[1], lines.root, tmp_path / "data")
    ((item, _),) = media_items(kept)
    assert (tmp_path / "data" / item["image"]).read_bytes() == png(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_rows_goes_on_with_exactly_the_next_sample(
    tmp_path, processor, large, workers
):
    """And sees what it would of the same samples in files."""
    folder = shards(tmp_path / "web", (12, 12), group=5)
    lines = []
    for k in range(24):
        (tmp_path / f"{k:06d}.png").write_bytes(png(k))
        record = talk(user(image(f"{k:06d}.png"), f"P{k:03d}"), assistant("yes"))
        lines.append(json.dumps(record))
    (tmp_path / "web.jsonl").write_text("\n".join(lines))

    assert_goes_on(tmp_path / "web.jsonl", folder, processor, workers)


def test_broken_pictures_of_rows_are_left_out_by_name(tmp_path, processor, caplog):
    rows = rows_of(0, 30)
    rows[7]["images"][0]["bytes"] = rows[7]["images"][0]["bytes"][:60]
    folder = write(tmp_path / "web" / "0.parquet", rows).parent
    loader = Loader([(folder, 1.0)], processor, 300, 2)
    for _, info in islice(loader, 8):
        pass
    assert len(set(loader.failures)) == 1
    assert "row 8" in loader.failures[0] and "0.parquet@3+1/0-007.png" in loader.failures[0]
