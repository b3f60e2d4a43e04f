"""common/forms.py: the forms of other projects become ours, or one line says why they cannot."""

import copy
import json
import re
from itertools import islice

import pytest
import torch

from common.conversation import check_conversation, check_training
from common.forms import form_of, to_ours
from common.loader import Loader
from toyworld import make_world


def image(path="a.jpg"):
    return {"type": "image", "image": path}


def video(path="b.mp4", **keys):
    return {"type": "video", "video": path, **keys}


def text(words):
    return {"type": "text", "text": words}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def said(who, words):
    return {"from": who, "value": words}


ASKED = user([image(), text("What?")])
OURS = {"messages": [ASKED, assistant("A cat.")]}
PAIR = {"messages": [ASKED], "chosen": "red", "rejected": "blue"}
PNG = "data:image/png;base64,iVBORw0KGgo="


# One conversation, as each project writes it


@pytest.mark.parametrize("record", [
    # OpenAI, by both of its interfaces
    {"messages": [user([{"type": "image_url", "image_url": {"url": "a.jpg"}}, text("What?")]),
                  assistant("A cat.", tool_calls=None, refusal=None)]},
    {"messages": [user([{"type": "input_image", "image_url": "a.jpg", "detail": "auto"},
                        {"type": "input_text", "text": "What?"}]),
                  assistant([{"type": "output_text", "text": "A cat.", "annotations": []}])]},
    # transformers, and a table written as JSON, with every key in every row
    {"messages": [user([{"type": "image", "path": "a.jpg"}, text("What?")]), assistant("A cat.")]},
    {"messages": [user([{"type": "image", "image": "a.jpg", "text": None},
                        {"type": "text", "image": None, "text": "What?"}]), assistant("A cat.")],
     "images": None, "tools": []},
    # TRL
    {"messages": [user([{"type": "image"}, text("What?")]), assistant("A cat.")],
     "images": ["a.jpg"]},
    {"prompt": [user([{"type": "image"}, text("What?")])], "completion": [assistant("A cat.")],
     "images": [{"bytes": None, "path": "a.jpg"}]},
    # ms-swift and LLaMA-Factory
    {"messages": [user("<image>What?"), assistant("A cat.")], "images": ["a.jpg"]},
    {"query": "<image>What?", "response": "A cat.", "images": "a.jpg"},
    {"instruction": "<image>What?", "input": "", "output": "A cat.", "images": ["a.jpg"]},
    {"conversations": [said("human", "<image>What?"), said("gpt", "A cat.")],
     "images": ["a.jpg"], "system": "", "tools": ""},
    # The Cauldron and FineVision
    {"images": ["a.jpg"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "vqa"}],
     "image_correspondence_ratings": [5], "image_correspondence_min": 5, "relevance_min": 4},
    # LLaVA
    {"id": 7, "image": "a.jpg",
     "conversations": [said("human", "<image>\nWhat?"), said("gpt", "A cat.")]},
    {"image": ["a.jpg"],
     "conversations": [said("user", "<image>\nWhat?"), said("assistant", "A cat.")]},
])
def test_a_conversation_in_any_form(record):
    before = copy.deepcopy(record)
    ours = to_ours(record)
    check_training(ours)
    answer = ours["messages"][1]["content"]
    assert ours["messages"][0] == ASKED
    assert answer in ("A cat.", [text("A cat.")])
    assert record == before
    assert to_ours(ours) == ours and form_of(ours) == "ours" != form_of(record)


def test_ours_stays_as_it_is():
    clip = video(["0.jpg", "1.jpg"], fps=0.5, width=64, height=48, duration=2, fps_source=1)
    cut = video(video_start=0, video_end=2.5, nframes=4, max_pixels=5000, total_pixels=90000)
    thought = [text("<tool_call>"), {"type": "text", "text": "seen", "loss": False}, image()]
    record = {
        "messages": [
            {"role": "system", "content": "<image> is a tag"},
            user([clip, cut, text("The tag <image>?")]),
            assistant(thought, loss=False, ended=True),
            {"role": "tool", "content": "x"},
        ],
        "chosen": "a", "rejected": [text("b")], "rejected_ended": False, "reference": [-1, -2.5],
        "meta": {"task": "x", "images": [1], "label": None}, "task": "y", "image_id": 3,
        "data_source": "z", "score_chosen": 1,
    }
    assert to_ours(record) == record and form_of(record) == "ours"
    check_conversation(record)
    assert to_ours({"n": 1}) == {"n": 1}


def test_pictures_and_clips_take_their_places_in_order():
    record = {
        "messages": [
            user("<video>Then <image><image>, which?"), assistant("This: <image>"), user("Why?"),
        ],
        "images": ["0.jpg", PNG, {"url": "2.jpg"}],
        "videos": [["f0.jpg", "f1.jpg"]],
    }
    first, second, third = to_ours(record)["messages"]
    assert first["content"] == [
        video(["f0.jpg", "f1.jpg"]), text("Then "), image("0.jpg"), image(PNG), text(", which?"),
    ]
    assert second["content"] == [text("This: "), image("2.jpg")] and third == user("Why?")


def test_pictures_of_pairs_stand_before_the_first_question():
    pairs = [{"user": "Which?", "assistant": "Both."}, {"user": "Why?", "assistant": "So."}]
    messages = to_ours({"images": ["0.jpg", "1.jpg"], "texts": pairs})["messages"]
    assert messages[0] == user([image("0.jpg"), image("1.jpg"), text("Which?")])
    assert messages[1:] == [assistant("Both."), user("Why?"), assistant("So.")]
    assert to_ours({"texts": pairs, "images": None})["messages"][0] == user("Which?")


def test_a_line_feed_beside_a_place_is_llavas_own():
    turns = [said("human", "Look:\n<image>\n<image>\n\nWhat?"), said("gpt", "x")]
    llava = to_ours({"image": ["a.jpg", "b.jpg"], "conversations": turns})["messages"][0]
    assert llava["content"] == [text("Look:"), image(), image("b.jpg"), text("\nWhat?")]
    factory = to_ours({"images": ["a.jpg", "b.jpg"], "conversations": turns})["messages"][0]
    assert factory["content"] == [
        text("Look:\n"), image(), text("\n"), image("b.jpg"), text("\n\nWhat?"),
    ]
    clip = to_ours({"video": "b.mp4", "conversations": [said("human", "<video>\nQ")]})
    assert clip["messages"] == [user([video(), text("Q")])]


def test_roles_history_and_systems():
    turns = [said("system", "S"), said("human", "Q"), said("gpt", "A"), said("observation", "O")]
    roles = [message["role"] for message in to_ours({"conversations": turns})["messages"]]
    assert roles == ["system", "user", "assistant", "tool"]
    asked = {"system": "S", "history": [["q", "a"]], "instruction": "Do", "input": "it"}
    assert to_ours(asked | {"output": "Done"})["messages"] == [
        {"role": "system", "content": "S"}, user("q"), assistant("a"), user("Do\nit"),
        assistant("Done"),
    ]
    developer = to_ours({"messages": [{"role": "developer", "content": "S"}, user("Q")]})
    assert developer["messages"][0]["role"] == "system"


def test_what_is_not_learnt():
    record = {"messages": [user("Q"), assistant("A", weight=0), user("R"), assistant("B", weight=1),
                           assistant("C", loss=False)]}
    messages = to_ours(record)["messages"]
    assert [m.get("loss") for m in messages] == [None, False, None, True, False]


# Preferences


@pytest.mark.parametrize("record", [
    PAIR,
    {"prompt": [ASKED], "chosen": [assistant("red")], "rejected": [assistant("blue")]},
    {"chosen": [ASKED, assistant("red")], "rejected": [ASKED, assistant("blue")]},
    {"messages": [ASKED], "chosen": assistant("red"), "rejected": assistant("blue")},
    {"messages": [ASKED, assistant("red")], "chosen": "red", "rejected": "blue"},
    {"messages": [ASKED, assistant("red")], "rejected_response": "blue"},
    {"messages": [user("<image>What?"), assistant("red")], "images": ["a.jpg"],
     "rejected_messages": [user("<image>What?"), assistant("blue")], "rejected_images": ["a.jpg"]},
    {"query": "<image>What?", "response": "red", "rejected_response": "blue", "images": ["a.jpg"]},
    {"conversations": [said("human", "<image>What?")], "images": ["a.jpg"],
     "chosen": said("gpt", "red"), "rejected": said("gpt", "blue")},
    {"image": "a.jpg", "question": "What?", "chosen": "red", "rejected": "blue"},
    {"image": "a.jpg", "question": "<image>\nWhat?", "chosen": "red", "rejected": "blue"},
])
def test_a_preference_in_any_form(record):
    ours = to_ours(record)
    check_training(ours)
    assert ours == PAIR


def test_texts_and_tables_of_preferences():
    texts = {"prompt": "Q", "chosen": "red", "rejected": "", "prompt_id": "x", "score_chosen": 4}
    assert to_ours(texts)["messages"] == [user("Q")] and to_ours(texts)["rejected"] == ""
    # a table that says the question and the chosen answer several times
    whole = [[user("Q"), assistant("red")], [user("Q"), assistant("blue")]]
    table = {"prompt": "Q", "messages": whole[0], "chosen": whole[0], "rejected": whole[1]}
    assert to_ours(table) == {"messages": [user("Q")], "chosen": "red", "rejected": "blue"}


@pytest.mark.parametrize("record, why", [
    ({"chosen": "a", "rejected": "b"}, "or a question"),
    ({"chosen": [user("Q"), assistant("a")], "rejected": [user("R"), assistant("b")]},
     "rejected: begins otherwise"),
    ({"messages": [user("Q")], "chosen": user("a"), "rejected": "b"}, "chosen: .*assistant"),
    ({"messages": [user("Q")], "chosen": assistant("a", weight=0), "rejected": "b"}, "alone"),
    ({"messages": [user("Q")], "rejected_response": "b"}, "chosen: .*assistant"),
    ({"messages": [user("Q"), assistant("a")], "rejected_response": "b", "rejected_images": ["c"]},
     '"rejected_images"'),
    ({"messages": [user("Q"), assistant("a")], "chosen": "c", "rejected": "b"}, "another answer"),
    ({"messages": [user("Q")], "chosen": "c"}, "rejected: content"),
    ({"prompt": "Q", "completion": "a", "label": True}, '"label"'),
])
def test_no_preference(record, why):
    with pytest.raises(ValueError, match=why):
        check_training(to_ours(record))


# Refusals


@pytest.mark.parametrize("record, why", [
    ({"messages": "hello"}, 'non-empty list "messages"'),
    ({"messages": []}, 'non-empty list "messages"'),
    ({"messages": [3]}, r"messages\[0\]: expected an object, not int"),
    ({"texts": "What?"}, "texts: expected a list"),
    ({"texts": [{"user": "What?"}]}, r"texts\[0\]: expected .*assistant"),
    ({"texts": ["What?"]}, r"texts\[0\]: expected .*assistant"),
    ({"texts": [{"user": "a", "assistant": "b", "system": "c"}]}, r'texts\[0\]: "system"'),
    ({"messages": [{"role": ["user"], "content": ""}]}, r"messages\[0\]: role"),
    ({"conversations": [said("human", "x"), said(None, "y")]}, r"conversations\[1\]: role"),
    ({"messages": [user("<image>")], "images": ["a", "b"]}, '1 places for images .* 2 of them'),
    ({"messages": [user("x")], "images": ["a.jpg"]}, '0 places for images .* 1 of them'),
    ({"messages": [user("<image> x")]}, '1 places for images .* 0 of them in "images"'),
    ({"messages": [user([{"type": "image"}, text("x")])]}, "1 places for images"),
    ({"messages": [user("<image><video>")], "images": ["a.jpg"]}, "1 places for videos"),
    ({"messages": [user("<audio>")], "images": ["a.jpg"]}, "0 places for images"),
    ({"messages": [user("<audio>?")]}, "1 places for audios"),
    ({"messages": [ASKED], "images": ["a.jpg"]}, "0 places for images"),
    ({"image": "a", "images": ["a"], "messages": [user("<image>")]}, 'both "image" and "images"'),
    ({"messages": [user("<image>")], "images": [None]}, r"images\[0\]: image must be a path"),
    ({"messages": [user("<image>")], "images": [{"bytes": "x", "path": "a"}]}, '"bytes"'),
    ({"messages": [user([image(["a", "b"])])]}, "image must be a path"),
    ({"messages": [user([image("A" * 5000)])]}, "5000 characters are no path"),
    ({"messages": [user([image("data:video/mp4;base64,AA")])]}, "of data URLs only data:image"),
    ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "expected .*text"),
    ({"messages": [user([{"type": "text"}])]}, "text must be a string"),
    ({"query": {"a": 1}, "response": "x"}, "query: expected a text"),
    ({"query": "x", "response": "y", "history": ["q", "a"]}, "history: expected pairs"),
    ({"query": "x", "response": "y", "history": 1}, "history: expected pairs"),
    ({"messages": [user("x"), assistant("y", weight=0.5)]}, "weight must be true or false"),
    ({"messages": [user("x"), assistant("y", loss="no")]}, "loss must be true or false"),
    ({"messages": [user("x") | {"loss": True}]}, "only what the assistant says"),
    ({"messages": [assistant([text("y") | {"loss": "no"}])]}, "loss must be true or false"),
])
def test_what_is_wrong_is_said(record, why):
    with pytest.raises(ValueError, match=why):
        to_ours(record)


@pytest.mark.parametrize("key, value", [
    ("tool_calls", [{"id": 1}]), ("function_call", {"name": "f"}), ("reasoning_content", "hm"),
    ("name", "Bob"), ("tool_call_id", "1"), ("weights", 0), ("prefix", True),
])
def test_keys_of_messages_are_never_ignored(key, value):
    messages = [user("x"), assistant("y", **{key: value})]
    with pytest.raises(ValueError, match=rf'messages\[1\]: "{key}"'):
        to_ours({"messages": messages})


@pytest.mark.parametrize("item", [
    image() | {"detail": "low"}, image() | {"fps": 2}, image() | {"crop": [0, 0, 1, 1]},
    {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "high"}},
    video() | {"video_strat": 1}, text("x") | {"cache_control": {"type": "ephemeral"}},
    image() | {"url": "b.jpg"},
])
def test_keys_of_items_are_never_ignored(item):
    with pytest.raises(ValueError, match=r'content\[0\]: "\w+" would change'):
        to_ours({"messages": [user([item])]})


@pytest.mark.parametrize("key, value", [
    ("audios", ["a.wav"]), ("objects", {"bbox": [[1, 2, 3, 4]]}), ("tools", [{"name": "f"}]),
    ("history", [["q", "a"]]), ("label", False), ("labels", [1]), ("width", 640), ("image_wh", [1]),
    ("imageUrls", ["a"]), ("bbox", [1]), ("margin", 0.5), ("choices", ["A"]), ("weight", 2),
    ("prompt", "another"), ("functions", "[]"), ("frames", 8), ("conversations", ["x"]),
])
def test_keys_of_records_are_never_ignored(key, value):
    with pytest.raises(ValueError, match=f'"{key}" would change'):
        to_ours(OURS | {key: value})


@pytest.mark.parametrize("key, value", [
    ("id", "x"), ("source", "coco"), ("meta", {}), ("dataset", "d"), ("score", 2.5), ("url", "u"),
    ("image_id", 3), ("num_images", 1), ("question_type", "vqa"), ("language", "en"), ("tools", []),
    ("label", None), ("audios", None), ("objects", {}), ("prompt_id", "p"), ("video_source", "y"),
])
def test_notes_pass(key, value):
    assert to_ours(OURS | {key: value})["messages"] == OURS["messages"]


def test_a_cut_emoji_can_be_encoded():
    record = json.loads(r'{"messages": [{"role": "user", "content": "\ud83d \ud83d\ude00 \ude00"}],'
                        r' "meta": {"a\ud83d": ["\udfff"]}}')
    ours = to_ours(record)
    assert ours["messages"][0]["content"] == "\ufffd \U0001f600 \ufffd"
    assert ours["meta"] == {"a\ufffd": ["\ufffd"]}
    json.dumps(ours, ensure_ascii=False).encode()


# Through the loader


def as_llava(record):
    (picture, asked), answer = record["messages"][0]["content"], record["messages"][1]["content"]
    turns = [said("human", "<image>\n" + asked["text"]), said("gpt", answer)]
    return {"id": answer, "image": picture["image"], "conversations": turns}


def as_swift(record):
    (picture, asked), answer = record["messages"][0]["content"], record["messages"][1]
    messages = [user("<image>" + asked["text"]), answer]
    return {"messages": messages, "images": [picture["image"]]}


def as_openai(record):
    (picture, asked), answer = record["messages"][0]["content"], record["messages"][1]
    shown = {"type": "image_url", "image_url": {"url": picture["image"]}}
    return {"messages": [user([shown, asked]), answer]}


def test_copies_of_captions_in_other_forms_give_the_same_packs(tmp_path, processor):
    make_world(tmp_path / "w", pictures=30, clips=0, heldout=0, workers=1, progress=False)
    train = tmp_path / "w" / "train"
    lines = (train / "caption.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    copies = {form.__name__: [form(r) for r in records] for form in (as_llava, as_swift, as_openai)}
    for name, changed in copies.items():
        (train / f"{name}.json").write_text(json.dumps(changed, indent=1))

    def packs(path):
        loader = Loader([(path, 1)], processor, pack_tokens=300, packs_per_step=2)
        return [batch for batches, _ in islice(loader, 5) for batch in batches]

    ours = packs(train / "caption.jsonl")
    assert sum(len(batch["grids"]) for batch in ours) > len(records) > 5
    for name in copies:
        for batch, same in zip(ours, packs(train / f"{name}.json"), strict=True):
            assert batch.keys() == same.keys()
            assert all(torch.equal(batch[key], same[key]) for key in batch)


def test_every_message_is_one_line():
    with pytest.raises(ValueError) as error:
        to_ours({"messages": [user([{"type": "image\n"}])]})
    assert not re.search(r"\n", str(error.value))
