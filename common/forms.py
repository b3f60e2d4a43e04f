"""Records in the forms of other projects become ours, see common/conversation.py.

    to_ours({"image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]})

    what is said   "messages" (ours, OpenAI, TRL, ms-swift), "conversations" (LLaVA, ShareGPT);
                   "texts", pairs of "user" and "assistant" (The Cauldron, FineVision), with all
                   pictures before the first; "query" and "response", "instruction", "input" and
                   "output", with "history";
                   "prompt" and "completion" (TRL), texts or messages; "system" before these
    what is shown  items with a path or data URL (ours, OpenAI, transformers); or top-level "images"
                   and "videos" for "<image>" and "<video>" in the texts and for items without a
                   path, in order (ms-swift, LLaMA-Factory, TRL); "image" and "video" (LLaVA)
    two answers    "chosen" and "rejected", texts, messages or whole conversations (TRL,
                   LLaMA-Factory, MMPR); "rejected_response", "rejected_messages" (ms-swift)

The line feed that LLaVA writes between "<image>" and the text is no part of the text. A key that
would change what is learnt, and that nothing here honours, is an error that names it.
"""

import re
from collections import Counter

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "developer": "system"}
TYPES = {
    "input_text": "text", "output_text": "text",
    "input_image": "image", "image_url": "image", "video_url": "video",
}
# Keys of a content item beside its type and source. Those of pictures hold for clips as well.
PICTURE_KEYS = {
    "width", "height", "min_pixels", "max_pixels", "resized_height", "resized_width",
}
CLIP_KEYS = PICTURE_KEYS | {
    "duration", "fps", "fps_source", "video_start", "video_end", "nframes", "min_frames",
    "max_frames", "total_pixels",
}
KEYS = {"text": {"loss"}, "image": PICTURE_KEYS, "video": CLIP_KEYS}

QUESTIONS = ("instruction", "query", "question", "prompt")
ANSWERS = ("response", "output", "completion")
FORMS = ("messages", "conversations", "texts", *QUESTIONS, *ANSWERS, "chosen", "rejected")
EMPTY = (None, "", [], {})

# Words in a name at the top level that say: this is more than a note about the record ...
MEANING = set(
    "image images img imgs picture pictures photo photos pixel pixels video videos clip clips "
    "frame frames audio audios sound speech voice file files path paths width height wh size sizes "
    "resolution fps duration crop region regions bbox bboxes box boxes point points mask masks "
    "object objects ref refs tool tools function functions history system prompt instruction input "
    "choices options context hint documents kwargs label labels loss weight weights margin "
    "chosen rejected".split()
)
# ... unless one of these stands beside it: "image_id" is harmless, and so is "num_images".
NOTE = set(
    "id ids source num count hash license score rating ratings correspondence model type length "
    "ended".split()
)

PLACE = re.compile("<(image|video|audio)>")
LLAVA_PLACE = re.compile(rf"\n?{PLACE.pattern}\n?")  # there a line feed parts it from the text
PATH_MAX = 4096  # bytes, of Linux: what is longer is no path


def to_ours(record: dict) -> dict:
    """A record in our form, with "messages" and perhaps "chosen" and "rejected"; a new dict.

    ValueError saying what is wrong where that cannot be. Whether its messages are a conversation
    is for check_conversation, which also refuses a record that has no key of any form: that is
    returned as it is. Half of a surrogate pair (a cut emoji) becomes U+FFFD.
    """
    rest = {key: value for key, value in _clean(record).items() if value is not None}
    if not rest.keys() & FORMS:
        return rest
    media = _Media(rest)
    name = "conversations" if "conversations" in rest else "messages"
    turns = _turns(rest, media)
    answers = _answers(rest, turns)
    messages = [_message(turn, media, f"{name}[{i}]") for i, turn in enumerate(turns)]
    ours = {"messages": messages}
    for key, answer in answers.items():
        ours[key] = _answer(answer, turns, media, key)
    media.check()
    return ours | _notes(rest, ours)


def form_of(record: dict) -> str:
    """The name of a record's form, by its keys: "ours", "image + conversations", ..."""
    if to_ours(record) == record:
        return "ours"
    names = ("image", "images", "video", "videos", *FORMS)
    return " + ".join(key for key in names if record.get(key) not in EMPTY)


def _clean(value):
    """A copy without halves of surrogate pairs: no tokenizer, file or screen takes them."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _refuse(keys, where):
    if keys:
        raise ValueError(f'{where}: "{min(keys)}" would change what is learnt, and is not honoured')


def _present(item, where):
    """A copy of an object without empty keys: tables written as JSON have every key everywhere."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: expected an object, not {type(item).__name__}")
    kept = ("content", "value", "text")  # an empty text is a text
    return {k: v for k, v in item.items() if v not in EMPTY or (k in kept and v is not None)}


def _pop(item, *names):
    """Takes the first of these keys that is there out of an object; None where none is."""
    return next((item.pop(name) for name in names if name in item), None)


# What is said


def _turns(rest, media):
    """Takes the turns out of a record, as they are written there."""
    system = rest.pop("system", None)
    turns = _pop(rest, "messages", "conversations")
    if turns is None and "texts" in rest:
        turns = _pairs(rest.pop("texts"), media)
    elif turns is None and rest.keys() & QUESTIONS:
        turns = _asked(rest, media)
    elif turns is None and _are_turns(rest.get("chosen")):
        turns = rest["chosen"][:-1]  # each of the two answers is a whole conversation
    if not isinstance(turns, list) or not turns:
        raise ValueError('expected an object with a non-empty list "messages", or a question')
    return [{"role": "system", "content": system}, *turns] if system else turns


def _pairs(texts, media):
    """The turns of pairs of a question and its answer; the pictures belong to the first."""
    if not isinstance(texts, list):
        raise ValueError('texts: expected a list of {"user": a text, "assistant": a text}')
    turns = []
    for i, pair in enumerate(texts):
        where = f"texts[{i}]"
        asked, answer = _question_and_answer(pair, where)
        if not turns:
            asked = media.before(asked, first=True)
        turns += [_turn("user", asked), _turn("assistant", answer)]
    return turns


def _question_and_answer(pair, where):
    if not isinstance(pair, dict):
        pair = {}
    said = [pair.get(role) for role in ("user", "assistant")]
    if not all(isinstance(text, str) for text in said):
        raise ValueError(f'{where}: expected {{"user": a text, "assistant": a text}}')
    _refuse(pair.keys() - {"user", "assistant", "source"}, where)
    return said


def _asked(rest, media):
    """The turns of a question and its answer that have a key each."""
    key = next(key for key in QUESTIONS if key in rest)
    asked = rest.pop(key)
    turns = []
    if _are_turns(asked):
        turns += asked
    else:
        texts = [asked, rest.pop("input", None) or ""] if key == "instruction" else [asked]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key}: expected a text")
        history = rest.pop("history", None) or []
        for pair in history if isinstance(history, list) else [history]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError("history: expected pairs of a question and its answer")
            turns += map(_turn, ("user", "assistant"), pair)
        turns.append(_turn("user", media.before("\n".join(filter(None, texts)))))
    answer = _pop(rest, *ANSWERS)
    if answer is not None:
        turns += answer if _are_turns(answer) else [_turn("assistant", answer)]
    return turns


def _turn(role, content):
    return {"role": role, "content": content}


def _text(text):
    return {"type": "text", "text": text}


def _are_turns(value):
    """Whether this is a list of messages. Items of one message's content have no role."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def _message(turn, media, where):
    turn = _present(turn, where)
    names = ("from", "value") if "from" in turn else ("role", "content")
    role, content = [turn.pop(name, None) for name in names]
    if not isinstance(role, str):
        raise ValueError(f"{where}: role must be a text")
    role = ROLES.get(role, role)
    message = {"role": role, "content": _content(content, role, media, where)}
    for name, ours in (("loss", "loss"), ("weight", "loss"), ("ended", "ended")):
        if name in turn and ours not in message:  # OpenAI's weight is 0 or 1
            value = turn.pop(name)
            if value not in (0, 1):  # equal to False and True
                raise ValueError(f"{where}: {name} must be true or false")
            if value and role != "assistant":
                raise ValueError(f"{where}: {name}: only what the assistant says can be learnt")
            message[ours] = bool(value)
    _refuse(turn, where)
    return message


def _content(content, role, media, where):
    if isinstance(content, str):
        items = media.place(content, role)
        return content if items == [_text(content)] else items
    if not isinstance(content, list):
        return content
    items = []
    for i, item in enumerate(content):
        items += _items(item, role, media, f"{where}.content[{i}]")
    return items


def _items(item, role, media, where):
    """A content item -> items of ours; a text with places for pictures becomes several."""
    item = _present(item, where)
    kind = item.pop("type", None)
    kind = TYPES.get(kind, kind) if isinstance(kind, str) else None
    if kind not in KEYS:
        raise ValueError(f'{where}: expected {{"type": "text"|"image"|"video", and that key}}')
    value = _pop(item, kind, f"{kind}_url", "url", "path")
    if item.get("detail") == "auto":  # OpenAI's default
        del item["detail"]
    _refuse(item.keys() - KEYS[kind], where)
    if kind == "text":
        if not isinstance(value, str):
            raise ValueError(f"{where}: text must be a string")
        if item.get("loss", 1) not in (0, 1):
            raise ValueError(f"{where}: loss must be true or false")
        parts = media.place(value, role)
        return [part | item if part["type"] == "text" else part for part in parts]
    if value is None:
        return [media.next(kind) | item]
    media.shown += 1
    return [{"type": kind, kind: _source(value, kind, where)} | item]


# Preferences


def _answers(rest, turns):
    """Takes the two answers of a preference out of a record: {"chosen": .., "rejected": ..} or {}.

    Where the turns end with the chosen one, it is taken from them.
    """
    for name in ("rejected_response", "rejected_messages"):
        if name in rest:
            return {"chosen": [turns.pop()], "rejected": rest.pop(name)}
    answers = {key: rest.pop(key) for key in ("chosen", "rejected") if key in rest}
    last = turns[-1]
    if _are_turns([last]) and last.get("role", last.get("from")) in ("assistant", "gpt"):
        text = last.get("content", last.get("value"))
        if "chosen" in answers and answers["chosen"] in (turns, [last], last, text):
            turns.pop()
    return answers


def _answer(answer, turns, media, where):
    """An answer as the content of a message. turns: the question, where that is repeated here."""
    if isinstance(answer, dict):
        answer = [answer]
    if not _are_turns(answer):
        return _content(answer, "assistant", media, where)
    *before, last = answer
    if before and before != turns:
        raise ValueError(f"{where}: begins otherwise than the question")
    message = _message(last, media, where)
    if message.pop("role") != "assistant" or list(message) != ["content"]:
        raise ValueError(f"{where}: expected the assistant's message, with its content alone")
    return message["content"]


# What is shown


def _source(value, kind, where):
    """A path or data URL; of a clip also a list of these, its frames."""
    if isinstance(value, dict):  # OpenAI's {"url": ..}, or an Image column's {"path": ..}
        keys = _present(value, where)
        value = _pop(keys, "url", "path")
        if keys.get("detail") == "auto":
            del keys["detail"]
        _refuse(keys, where)
    if isinstance(value, list) and kind == "video":
        return [_source(frame, "image", where) for frame in value]
    if value in EMPTY or isinstance(value, list):
        raise ValueError(f"{where}: {kind} must be a path or a data URL")
    if isinstance(value, str) and not re.match(r"data:image/[^;,]+;base64,", value):
        if value.startswith("data:"):
            raise ValueError(f"{where}: of data URLs only data:image/..;base64,.. are read")
        if len(value) > PATH_MAX:
            count = f"{len(value)} characters"
            raise ValueError(f"{where}: {count} are no path; bytes go into a data: URL")
    return value


class _Media:
    """Pictures and clips at the top level of a record, and the places that its messages have."""

    def __init__(self, rest):
        self.given = {"image": [], "video": [], "audio": []}
        self.places = Counter()
        self.shown = 0  # items that have their own picture or clip
        self.unfilled = Counter()  # places in questions of a record that gives no media
        self.llava = False
        for name in ("image", "images", "video", "videos"):
            kind = name.removesuffix("s")
            value = rest.pop(name, None)
            if rest.get(f"rejected_{name}") == value:  # ms-swift repeats them
                rest.pop(f"rejected_{name}", None)
            if value in EMPTY:
                continue
            if self.given[kind]:
                raise ValueError(f'both "{kind}" and "{kind}s"')
            self.llava |= name == kind
            for i, source in enumerate(value if isinstance(value, list) else [value]):
                self.given[kind].append(_source(source, kind, f"{name}[{i}]"))

    def before(self, text, first=False):
        """Before a question without places stands LLaVA's single picture or clip; and before the
        first of a conversation that never has any, all of them."""
        for kind, values in self.given.items():
            if (self.llava or first) and f"<{kind}>" not in text:
                text = f"<{kind}>" * len(values) + text
        return text

    def next(self, kind):
        """An item for the next place of this kind; it shows None where too few are given."""
        i = self.places[kind]
        self.places[kind] += 1
        given = self.given[kind]
        return {"type": kind, kind: given[i] if i < len(given) else None}

    def place(self, text, role):
        """A text -> items: one, or where "<image>" stands in it, several."""
        if not any(self.given.values()):
            if role == "user":
                self.unfilled.update(PLACE.findall(text))
            return [_text(text)]
        parts = (LLAVA_PLACE if self.llava else PLACE).split(text)  # text, kind, text, .., text
        items = []
        for i, part in enumerate(parts):
            if i % 2:
                items.append(self.next(part))
            elif part or len(parts) == 1:
                items.append(_text(part))
        return items

    def check(self):
        # Beside items that show something "<image>" is a text like any other.
        places = self.places + (Counter() if self.shown else self.unfilled)
        for kind, given in self.given.items():
            if places[kind] != len(given):
                count = f"{places[kind]} places for {kind}s in the messages"
                raise ValueError(f'{count}, but {len(given)} of them in "{kind}s"')


# All else


def _notes(rest, ours):
    """What else a record says of itself. Keys that repeat a message are left out."""
    said = [message["content"] for message in ours["messages"]]
    notes = {key: value for key, value in rest.items() if key not in FORMS or value not in said}
    for key, value in notes.items():
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", key)}
        means = key in FORMS or (words & MEANING and not words & NOTE)
        if means and value not in EMPTY:
            _refuse([key], "top level")
    return notes
