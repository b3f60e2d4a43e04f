"""Conversations: their form, their check, the switches of Keye's modes, and their media.

A conversation is a dict, in files one JSON object a line. Paths are relative to the file's folder:

    {"messages": [
        {"role": "user", "content": [
            {"type": "image", "image": "a.jpg"},
            {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."}]}

A preference has two answers to compare beside its messages, "chosen" and "rejected": each is what
the content of an assistant's message would be.

Files may hold other forms: common/jsonl.py brings all of them into this one, see common/forms.py.
"""

import filecmp
import hashlib
import io
import os
import shutil
from pathlib import Path

from PIL import Image

from common.clips import Clip
from common.forms import CLIP_KEYS
from common.jsonl import replacing
from common.media import MEMBER, MediaError, open_media
from common.pictures import load_picture

ROLES = ("system", "user", "assistant", "tool")

# How a question can be asked (Keye-VL report, section 4.2.1). Mode "plain" is none of these: the
# question stands as it is, and all of the response is its answer.
MODES = ("think", "no_think", "auto_think", "agentic_think")
TOOL_MODES = ("auto_think", "agentic_think")  # the modes whose answers may call tools


# Checks


def check_conversation(record: dict):
    """ValueError saying what is wrong, and where, if this is no conversation."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected an object with a non-empty list "messages"')
    for m, message in enumerate(messages):
        where = f"messages[{m}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}")
        _check_content(message.get("content"), where)


def _check_content(content, where):
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be a string or a list")
    for i, item in enumerate(content):
        _check_item(item, f"{where}.content[{i}]")


def _check_item(item, where):
    kind = item.get("type") if isinstance(item, dict) else None
    if kind not in ("text", "image", "video") or kind not in item:
        raise ValueError(f'{where}: expected {{"type": "text"|"image"|"video", and that key}}')
    value = item[kind]
    if kind == "text" and not isinstance(value, str):
        raise ValueError(f"{where}: text must be a string")
    # Pictures in memory and lists of frames are allowed: the reader of media says what it refuses.
    if value is None or isinstance(value, (int, float, dict)):
        raise ValueError(f"{where}: {kind} must be a path")
    for key, number in item.items():
        if key not in CLIP_KEYS or (key == "video_start" and number == 0):
            continue
        if number is True or not isinstance(number, (int, float)) or not 0 < number < 1e9:
            raise ValueError(f"{where}: {key} must be a positive number")


def check_training(record: dict):
    """ValueError unless there is something to learn: an assistant's message, or two answers."""
    check_conversation(record)
    if _is_preference(record):
        for key in ("chosen", "rejected"):
            _check_content(record.get(key), key)
        if record["messages"][-1]["role"] == "assistant":
            raise ValueError('the messages of "chosen" and "rejected" end with another answer')
    elif all(message["role"] != "assistant" for message in record["messages"]):
        raise ValueError("no assistant message: nothing to learn")


def _is_preference(record):
    return "chosen" in record or "rejected" in record


# Views


def copied(value):
    """A copy of what JSON can hold, with all its parts. Two of them that are one object, as an item
    that two messages share, become two: who changes one of them leaves the other.
    """
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value


def conversations_of(record: dict) -> list[dict]:
    """The conversation itself, or the two of a preference: [chosen, rejected].

    A preference's "chosen_ended" or "rejected_ended" is false when that answer was cut off; the
    message then has "ended": false, and its end is not learnt.
    """
    if not _is_preference(record):
        return [record]
    # Earlier answers of the conversation are part of the question, so they are not learnt.
    before = [message | {"loss": False} for message in record["messages"]]
    conversations = []
    for key in ("chosen", "rejected"):
        ended = record.get(f"{key}_ended", True)
        answer = {"role": "assistant", "content": record[key], "ended": ended}
        conversations.append({"messages": [*before, answer]})
    return conversations


def with_switch(messages: list[dict], mode: str) -> list[dict]:
    """A copy of the messages with a mode's switch ("/think") right behind the last user text.

    Of several switches the last one counts; the same one is not added twice. Mode "plain" adds
    none. ValueError for an unknown mode, or when no user speaks.
    """
    if mode == "plain":
        return messages
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}, expected plain or one of {', '.join(MODES)}")
    return behind_question(messages, f"/{mode}")


def behind_question(messages: list[dict], words: str) -> list[dict]:
    """A copy of the messages with these words right behind the last user text, unless they are.

    ValueError where no user speaks.
    """
    messages = copied(messages)  # what two of them share changes in the last one alone
    asked = [message for message in messages if message["role"] == "user"]
    if not asked:
        raise ValueError(f"no user message to put {words} behind")
    content = asked[-1]["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    texts = [item for item in content if item["type"] == "text"]
    if texts:
        texts[-1]["text"] = texts[-1]["text"].removesuffix(words) + words
    else:
        content.append({"type": "text", "text": words})
    asked[-1]["content"] = content
    return messages


def prompt_of(record: dict, mode: str, hint: str = "") -> list[dict]:
    """The messages before the answer, which is the last one, as they are asked in a mode.

    "auto_think" needs no switch: it is what the model does when none is given. A hint stands
    between the question and the switch.
    """
    messages = record["messages"][:-1]
    if hint:
        messages = behind_question(messages, f" {hint}")
    return with_switch(messages, "plain" if mode == "auto_think" else mode)


def text_of(message: dict) -> str:
    """A message's text; pictures and clips as [image] and [video]."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(item.get("text", f"[{item['type']}]") for item in content)


# Media


def media_items(conversation: dict) -> list[tuple[dict, str]]:
    """All pictures and clips in order, also those of a preference's answers: [(item, kind), ...].

    kind is "image" or "video"; item[kind] is the path, the picture or the list of frames.
    """
    contents = [message["content"] for message in conversation["messages"]]
    contents += [conversation.get("chosen"), conversation.get("rejected")]
    found = []
    for content in contents:
        if isinstance(content, list):
            found += [(item, item["type"]) for item in content if item["type"] != "text"]
    return found


def read_header(source, kind: str, root=None, **limits):
    """MediaError where a picture, a clip or a clip's frames cannot be used, as far as headers say.

    limits: see load_picture.
    """
    if kind == "video" and not isinstance(source, (list, tuple)):
        with Clip(source, root, **limits):
            return
    for picture in source if kind == "video" else [source]:
        load_picture(picture, root, header_only=True, **limits)


def pictures_of(conversation: dict, root=None, **limits) -> list[Image.Image]:
    """The conversation's pictures at full size. MediaError as load_picture, which takes limits."""
    return [
        load_picture(item["image"], root, **limits)
        for item, kind in media_items(conversation)
        if kind == "image"
    ]


def link_media(
    conversation: dict, root: str | Path, folder: str | Path, places: dict | None = None
) -> dict:
    """A copy of a conversation from `root` for a JSONL file in `folder`.

    Its files are hard-linked below folder/media (else copied: from another file system, or off
    Linux), unless they are in the folder already; pictures in memory are written there as PNG. A
    file that has changed since it was linked is linked anew. MediaError for whatever the reader of
    media would refuse.

    places: {(root, path): its place in the folder} of what the caller has linked just now: many
    conversations show the same file, and each call adds what is new.
    """
    root, folder = Path(root).resolve(), Path(folder).resolve()
    places = {} if places is None else places

    def place(source):
        if not isinstance(source, str) or source.startswith("data:"):
            return _linked(source, root, folder)
        if (root, source) not in places:
            places[root, source] = _linked(source, root, folder)
        return places[root, source]

    conversation = copied(conversation)
    for item, kind in media_items(conversation):
        if isinstance(item[kind], list):
            item[kind] = [place(frame) for frame in item[kind]]
        else:
            item[kind] = place(item[kind])
    return conversation


def _linked(source, root, folder):
    """Path or picture -> path relative to folder, of a file that is there."""
    if isinstance(source, Image.Image):
        png = io.BytesIO()
        source.save(png, "PNG", compress_level=1)
        # Named by its content: equal pictures are stored once.
        target = folder / f"media/{hashlib.sha1(png.getvalue()).hexdigest()[:20]}.png"
        if not target.exists():
            with replacing(target) as part:
                part.write_bytes(png.getvalue())
    elif str(source).startswith("data:"):
        load_picture(source, root, header_only=True)
        return source  # its bytes are in the line
    elif root == folder:
        return source
    else:
        with open_media(source, root) as file:
            if MEMBER.fullmatch(str(source)):
                return _copy_member(file, source, root, folder)
            # Linked is what was opened, whatever its path leads to by now.
            target = _link_opened(f"/dev/fd/{file.fileno()}", source, root, folder)
    return target.relative_to(folder).as_posix()


def _copy_member(file, source, root, folder) -> str:
    """Writes a member of a tar as a file of its own -> its path relative to folder."""
    name = _place(source, root).as_posix().replace("@", "-")  # it is no place in a tar any more
    target = folder / "media" / name
    data = file.read()
    if not target.exists() or target.read_bytes() != data:
        with replacing(target) as part:
            part.write_bytes(data)
    return target.relative_to(folder).as_posix()


def _place(source, root) -> Path:
    """The source's real place, without "..", relative to root."""
    place = (root / source).resolve()
    if not place.is_relative_to(root):  # just now: it was below root when it was opened
        raise MediaError(source, "outside", f"leads out of {root}")
    return place.relative_to(root)


def _link_opened(opened, source, root, folder):
    """Links the opened file to where its source's real place is below root."""
    target = folder / "media" / _place(source, root)
    if not target.exists() or not filecmp.cmp(opened, target):
        with replacing(target) as part:
            try:
                # With a folder given, os.link follows the link that `opened` is.
                os.link(opened, part, src_dir_fd=0)
            except OSError:  # another file system
                shutil.copy2(opened, part)
    return target
