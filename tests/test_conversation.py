"""common/conversation.py: what a conversation is, switches of modes, and media that move."""

import base64
import json
import os

import pytest
from PIL import Image

from common import conversation as room
from common.conversation import (
    MODES,
    check_conversation,
    check_training,
    conversations_of,
    link_media,
    media_items,
    pictures_of,
    prompt_of,
    read_header,
    text_of,
    with_switch,
)
from common.media import MediaError, open_media


def user(*content):
    items = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": items}


def assistant(text):
    return {"role": "assistant", "content": text}


def image(source):
    return {"type": "image", "image": source}


def video(source, **keys):
    return {"type": "video", "video": source, **keys}


# Checks


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": ""}],
        [user("x", image("a.png")), assistant("y"), {"role": "tool", "content": [image("b.png")]}],
        [user(image(Image.new("RGB", (4, 4))), video(["a.png", "b.png"], fps=0.5))],
        [user(video("a.mp4", width=640, height=360, duration=2.5, fps_source=29.97))],
        [user(video("a.mp4", video_start=0, video_end=2, nframes=4, min_frames=2, max_frames=8))],
        [user(video("a.mp4", video_start=1.5, total_pixels=90000, resized_height=56))],
        [user()],
    ],
)
def test_conversations_pass(messages):
    check_conversation({"messages": messages, "meta": "anything"})


@pytest.mark.parametrize(
    "record, message",
    [
        ([], 'non-empty list "messages"'),
        (None, 'non-empty list "messages"'),
        ({"messages": []}, 'non-empty list "messages"'),
        ({"messages": "hello"}, 'non-empty list "messages"'),
        ({"messages": [user("x"), "y"]}, r"messages\[1\]: role must be one of system, user"),
        ({"messages": [{"role": "boss", "content": "x"}]}, r"messages\[0\]: role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content must be a string or a list"),
        ({"messages": [user("x", {"type": "audio"})]}, r"messages\[0\]\.content\[1\]: expected"),
        ({"messages": [user({"type": "image"})]}, "and that key"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "and that key"),
        ({"messages": [user(image(None))]}, "image must be a path"),
        ({"messages": [user(image({"url": "x"}))]}, "image must be a path"),
        ({"messages": [user(image(True))]}, "image must be a path"),
        ({"messages": [user({"type": "text", "text": 1})]}, "text must be a string"),
        ({"messages": [user({"type": "text", "text": ["x"]})]}, "text must be a string"),
        ({"messages": [user(video("a", fps=0))]}, "fps must be a positive number"),
        ({"messages": [user(video("a", fps=True))]}, "fps must be a positive number"),
        ({"messages": [user(video("a", fps="2"))]}, "fps must be a positive number"),
        ({"messages": [user(video("a", fps=float("nan")))]}, "fps must be a positive number"),
        ({"messages": [user(video("a", width=-1))]}, "width must be a positive number"),
        ({"messages": [user(video("a", duration=1e9))]}, "duration must be a positive number"),
        ({"messages": [user(video("a", height=None))]}, "height must be a positive number"),
        ({"messages": [user(video("a", video_start=-1))]}, "video_start must be a positive number"),
        ({"messages": [user(video("a", video_end=0))]}, "video_end must be a positive number"),
        ({"messages": [user(video("a", nframes="8"))]}, "nframes must be a positive number"),
        ({"messages": [user(video("a", max_pixels=[9]))]}, "max_pixels must be a positive number"),
    ],
)
def test_wrong_conversations_say_where(record, message):
    with pytest.raises(ValueError, match=message):
        check_conversation(record)


def test_training_needs_something_to_learn():
    check_training({"messages": [user("x"), assistant("y"), user("z")]})
    check_training({"messages": [user("x")], "chosen": "a", "rejected": [image("b.png")]})
    with pytest.raises(ValueError, match="no assistant message"):
        check_training({"messages": [user("x")]})
    with pytest.raises(ValueError, match="messages"):
        check_training({"chosen": "a", "rejected": "b"})


@pytest.mark.parametrize(
    "answers, message",
    [
        ({"chosen": "a"}, "rejected: content must be"),
        ({"rejected": "b"}, "chosen: content must be"),
        ({"chosen": "a", "rejected": 3}, "rejected: content must be"),
        ({"chosen": [image(None)], "rejected": "b"}, r"chosen\.content\[0\]: image must be"),
        ({"messages": [assistant("y")], "chosen": "a", "rejected": "b"}, "another answer"),
    ],
)
def test_half_a_preference_is_an_error(answers, message):
    with pytest.raises(ValueError, match=message):
        check_training({"messages": [user("q"), assistant("y"), user("r")]} | answers)


# Views


def test_a_preference_is_two_conversations():
    messages = [user("a"), assistant("an earlier answer"), user("b")]
    record = {"messages": messages, "chosen": "red", "rejected": "blue", "rejected_ended": False}
    chosen, rejected = conversations_of(record)
    for conversation in (chosen, rejected):
        check_conversation(conversation)
        assert [text_of(m) for m in conversation["messages"][:-1]] == [text_of(m) for m in messages]
        assert all(m["loss"] is False for m in conversation["messages"][:-1])
    assert chosen["messages"][-1] == assistant("red") | {"ended": True}
    assert rejected["messages"][-1] == assistant("blue") | {"ended": False}
    assert "loss" not in messages[1]
    plain = {"messages": messages}
    assert conversations_of(plain) == [plain]


def test_the_switch_stands_behind_the_last_user_text():
    question = user("Look:", image("a.png"), "What?", image("b.png"))
    messages = [user("Q"), assistant("A"), question, assistant("B")]
    switched = with_switch(messages, "think")
    assert switched[2] == user("Look:", image("a.png"), "What?/think", image("b.png"))
    assert [switched[i] for i in (0, 1, 3)] == [messages[i] for i in (0, 1, 3)]
    assert messages[2] is question and text_of(question) == "Look:[image]What?[image]"
    assert text_of(with_switch([{"role": "user", "content": "R"}], "no_think")[0]) == "R/no_think"
    only_picture = with_switch([user(image("a.png"))], "agentic_think")
    assert text_of(only_picture[0]) == "[image]/agentic_think"


def test_the_last_switch_counts_and_is_not_doubled():
    once = with_switch([user("What?")], "no_think")
    twice = with_switch(once, "think")
    assert text_of(twice[0]) == "What?/no_think/think"
    assert with_switch(twice, "think") == twice
    assert text_of(with_switch(twice, "no_think")[0]) == "What?/no_think/think/no_think"


def test_a_mode_must_be_known_and_asked_by_a_user():
    messages = [user("What?")]
    assert with_switch(messages, "plain") == messages
    with pytest.raises(ValueError, match="unknown mode 'nothink', expected plain or one of think"):
        with_switch(messages, "nothink")
    with pytest.raises(ValueError, match="no user message to put /think behind"):
        with_switch([{"role": "system", "content": "x"}], "think")


def test_a_prompt_is_what_stands_before_the_answer():
    record = {"messages": [user("What?"), assistant("A")]}
    asked = {mode: text_of(prompt_of(record, mode)[-1]) for mode in ("plain", *MODES)}
    assert asked == {
        "plain": "What?",
        "think": "What?/think",
        "no_think": "What?/no_think",
        "auto_think": "What?",
        "agentic_think": "What?/agentic_think",
    }


def test_a_hint_stands_between_question_and_switch():
    record = {"messages": [user(image("a"), "What?"), assistant("A"), user("And?"), assistant("B")]}
    before = json.dumps(record)
    first, _, last = prompt_of(record, "think", "left, right")
    assert text_of(last) == "And? left, right/think"
    assert text_of(first) == "[image]What?" and json.dumps(record) == before
    alone = {"messages": [user(image("a")), assistant("A")]}
    assert text_of(prompt_of(alone, "auto_think", "left")[0]) == "[image] left"


# Media


def test_media_items_come_in_order():
    record = {
        "messages": [user("x", image("a"), video("b")), assistant("y"), user(image("c"))],
        "chosen": [image("d")],
        "rejected": "none",
    }
    found = [(item[kind], kind) for item, kind in media_items(record)]
    assert found == [("a", "image"), ("b", "video"), ("c", "image"), ("d", "image")]


def test_pictures_of_a_conversation(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    grey = Image.new("L", (9, 8))
    conversation = {"messages": [user(image("a.png"), video("b.mp4"), image(grey))]}
    assert [p.size for p in pictures_of(conversation, tmp_path)] == [(40, 30), (9, 8)]
    with pytest.raises(MediaError, match="too_large"):
        pictures_of(conversation, tmp_path, pixel_limit=100)


def test_headers_are_read_and_nothing_more(tmp_path):
    noise = Image.effect_noise((60, 60), 60).convert("RGB")
    noise.save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.mp4").write_bytes(b"none")
    for source in ("a.jpg", "cut.jpg", noise):
        read_header(source, "image", tmp_path)
    read_header(["a.jpg", "cut.jpg"], "video", tmp_path)
    for source, kind, reason in (
        ("none.jpg", "image", "missing"),
        (["a.jpg", "none.jpg"], "video", "missing"),
        ("none.mp4", "image", "unsupported"),
        ("none.mp4", "video", "corrupt|unsupported"),
    ):
        with pytest.raises(MediaError, match=reason):
            read_header(source, kind, tmp_path)
    with pytest.raises(MediaError, match="too_large"):
        read_header("a.jpg", "image", tmp_path, pixel_limit=100)


@pytest.fixture
def source(tmp_path):
    """A folder with a picture, in a sub-folder, and the record that shows it."""
    folder = tmp_path / "from"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30), (1, 2, 3)).save(folder / "deep/0.png")
    return folder, {"messages": [user(image("deep/0.png"), "What?")], "chosen": "a"}


def path_of(record):
    return media_items(record)[0][0]["image"]


def test_files_are_linked_below_the_folder(tmp_path, source):
    folder, record = source
    to = tmp_path / "to"
    moved = link_media(record, folder, to)
    assert path_of(moved) == "media/deep/0.png" and path_of(record) == "deep/0.png"
    assert os.path.samefile(to / path_of(moved), folder / "deep/0.png")
    assert moved["chosen"] == "a" and json.dumps(moved)
    assert link_media(moved, to, to) == moved
    assert link_media(record, folder, to) == moved
    assert not list(to.rglob("*.tmp"))


def test_files_of_another_file_system_are_copied_once(tmp_path, source, monkeypatch):
    folder, record = source

    def refuse(*_, **__):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = tmp_path / "to" / path_of(link_media(record, folder, tmp_path / "to"))
    assert copied.read_bytes() == (folder / "deep/0.png").read_bytes()
    inode = copied.stat().st_ino
    link_media(record, folder, tmp_path / "to")
    assert copied.stat().st_ino == inode


def test_pictures_in_memory_are_written_by_their_content(tmp_path, source):
    folder, _ = source
    frames = [Image.new("RGB", (8, 6), (9, 9, k // 2)) for k in range(4)]
    record = {"messages": [user("x")], "chosen": [video([*frames, "deep/0.png"])]}
    moved = link_media(record, folder, tmp_path / "to")
    paths = moved["chosen"][0]["video"]
    assert paths[0] == paths[1] != paths[2] == paths[3] and paths[4] == "media/deep/0.png"
    assert Image.open(tmp_path / "to" / paths[2]).getpixel((0, 0)) == (9, 9, 1)
    assert len(list((tmp_path / "to/media").glob("*"))) == 3
    here = link_media(record, folder, folder)["chosen"][0]["video"]
    assert here == [*paths[:4], "deep/0.png"] and (folder / paths[0]).exists()


def test_a_new_file_of_an_old_name_replaces_the_link(tmp_path, source):
    folder, record = source
    link_media(record, folder, tmp_path / "to")
    (folder / "deep/0.png").unlink()
    Image.new("RGB", (50, 50), (9, 9, 9)).save(folder / "deep/0.png")
    moved = link_media(record, folder, tmp_path / "to")
    assert Image.open(tmp_path / "to" / path_of(moved)).getpixel((0, 0)) == (9, 9, 9)


def test_what_many_conversations_show_is_linked_once(tmp_path, source, monkeypatch):
    folder, record = source
    Image.new("RGB", (8, 6)).save(folder / "1.png")
    other = {"messages": [user(image("1.png"), video(["deep/0.png", "1.png"]))]}
    opened = []
    plain = room.open_media

    def open_media(source, root):
        opened.append(source)
        return plain(source, root)

    monkeypatch.setattr(room, "open_media", open_media)
    places = {}
    moved = [link_media(r, folder, tmp_path / "to", places) for r in (record, other, record)]
    assert opened == ["deep/0.png", "1.png"]
    assert moved == [link_media(r, folder, tmp_path / "to") for r in (record, other, record)]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_what_is_linked_is_what_was_opened(tmp_path, source, monkeypatch, links, inside):
    """Another process swaps the folder for another one, just after the file was opened."""
    folder, record = source
    other = (folder if inside else tmp_path) / "other"
    other.mkdir()
    Image.new("RGB", (5, 5)).save(other / "0.png")

    def swapping(path, root):
        file = open_media(path, root)
        (folder / "deep").rename(tmp_path / "gone")
        (folder / "deep").symlink_to(other)
        return file

    def refuse(*_, **__):
        raise OSError("cross-device link")

    monkeypatch.setattr(room, "open_media", swapping)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    if inside:
        linked = tmp_path / "to" / path_of(link_media(record, folder, tmp_path / "to"))
        assert Image.open(linked).size == (40, 30)
        assert os.path.samefile(linked, tmp_path / "gone/0.png") == links
    else:
        with pytest.raises(MediaError, match="outside"):
            link_media(record, folder, tmp_path / "to")
        assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    "path, reason",
    [
        ("../secret.png", "outside"),
        ("none.png", "missing"),
        ("deep", "unsupported"),
        ("out.png", "outside"),
        ("http://x/y.png", "outside"),
    ],
)
def test_what_the_reader_would_refuse_is_not_linked(tmp_path, source, path, reason):
    folder, record = source
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    record["messages"][0]["content"][0]["image"] = path
    with pytest.raises(MediaError, match=reason):
        link_media(record, folder, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_no_path_leads_out_of_the_folder_it_is_linked_into(tmp_path, source):
    folder, record = source
    (folder / "inner.png").symlink_to("deep/0.png")
    for path in (f"../{folder.name}/deep/0.png", "deep/../deep/0.png", "inner.png"):
        record["messages"][0]["content"][0]["image"] = path
        assert path_of(link_media(record, folder, tmp_path / "to")) == "media/deep/0.png"


def test_a_data_url_stays_in_its_line(tmp_path, source):
    folder, _ = source
    data = base64.b64encode((folder / "deep/0.png").read_bytes()).decode()
    record = {"messages": [user(image(f"data:image/png;base64,{data}"))]}
    for to in (folder, tmp_path / "to"):
        assert link_media(record, folder, to) == record
    broken = {"messages": [user(image("data:image/png;base64,QUJD"))]}
    with pytest.raises(MediaError):
        link_media(broken, folder, tmp_path / "to")
