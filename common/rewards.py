r"""What a response earns in reinforcement learning and alignment, by rules: the truth is known.

    reward(completion, meta, mode="think").total
    reward(..., question=text, judge=Judge(["http://localhost:8000/v1"], "name"))
    parse(completion, mode="auto_think").final         the answer; also .thinking, .errors, ..

completion: the assistant's turn as a string, or better as a content list, where whatever a tool
returned is no text or has "loss": false (`turn_of` makes one of a sampled response). Only a list
proves what the model wrote itself. meta: the true answer and its verifier, see verifiers.py.

No completion raises an error: what cannot be read is wrong. A wrong meta is a ValueError.
"""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from common.conversation import MODES
from common.verifiers import COORDINATES, named, normal, read, sequence, stated, verify

# All ours: Keye names outcome and consistency (2507.01949, 4.2.2) and repetition (4.2.3), but gives
# no number.
CONSISTENCY = 0.5  # what a right answer gains if it follows from the thinking (Thyme, 2508.11630)
REPEATED = 0.6  # twelve sentences of one pattern reach 0.58, a loop that counts up 0.69, a loop 0.9
TAIL = 500  # characters of the thinking that must lead to the answer (Thyme)
JUDGED = 1000  # characters: an answer this long is not judged (DeepEyes)


@dataclass
class Reward:
    """The parts of a response's reward, and their total. None: a judge was needed, and failed."""

    outcome: float | None  # 0..1, what the answer is worth
    right: float | None  # 0 or 1: whether the answer names the true value, also among other words
    format: float  # 1 where the form of the mode is kept, else 0
    consistency: float | None  # 0..1, whether the answer follows from the thinking
    repetition: float  # 0..1, share of the text that came before
    length: float  # -1..0, penalty of an overlong response
    parsed: "Parsed"
    total: float | None = None  # None: unscored, to be left out of its group


def reward(
    completion: str | list[dict],
    meta: dict,
    mode: str = "auto_think",
    question: str = "",
    judge=None,
    finished: bool = True,
    length: int = 0,
    max_tokens: int | None = None,
    buffer: int = 0,
) -> Reward:
    """The reward of one response. length, max_tokens, buffer: tokens, see overlong.

    The judge is asked where rules do not decide: for the outcome of an answer that names no
    readable value, or is text and not equal; for consistency where the rule finds none and the
    answer is worth something.
    """
    parsed = parse(completion, mode, finished)
    final = parsed.final or ""
    outcome, right = verify(final, meta)
    if judge and not right and 0 < len(final) < JUDGED and undecided(final, meta):
        outcome = judge("outcome", question=question, reference=meta["answer"], candidate=final)
        right = None if outcome is None else float(outcome >= 0.5)
    follows = float(consistent(parsed, meta))
    if judge and outcome and not follows and parsed.thinking:
        thinking = parsed.thinking[-TAIL:]
        follows = judge("consistency", question=question, thinking=thinking, answer=final[-TAIL:])
    penalty = overlong(length, max_tokens, buffer) if max_tokens else 0.0
    form = float(not parsed.errors)
    parts = Reward(outcome, right, form, follows, repetition(parsed.own), penalty, parsed)
    parts.total = total(parts)
    return parts


def undecided(final, meta):
    """Whether rules say nothing of a wrong answer: it is text, or names no readable value."""
    kind = meta["verifier"]
    return kind in ("exact", "text") or (kind not in COORDINATES and read(final, meta) is None)


def total(parts: Reward) -> float | None:
    """outcome * (1 + consistency / 2), or 0 out of form; less what is repeated or overlong.

    Thyme adds half a point for the form instead. But that is all a question nobody solves would
    pay, and lengths drift with it.
    """
    earned = 0.0
    if parts.format and parts.outcome != 0:
        # A wrong answer gains nothing by consistency: there it does not matter if a judge failed.
        if None in (parts.outcome, parts.consistency):
            return None
        earned = parts.outcome * (1 + CONSISTENCY * parts.consistency)
    if parts.repetition > REPEATED:
        earned -= parts.repetition
    return earned + parts.length


def rewards(responses: list[dict]) -> list[Reward]:
    """reward(**response) of each, in order. With a judge in threads, so that one slow answer of it
    holds up no other; rules alone take longer in many threads than in one."""
    judged = any(response.get("judge") for response in responses)
    with ThreadPoolExecutor(16 if judged else 1) as pool:
        return list(pool.map(lambda response: reward(**response), responses))


# --------------------------------------------------------------------------------------------------
# the parts of a response

ANALYSIS = ["<analysis>", "</analysis>"]
THINK = ["<think>", "</think>", "<answer>", "</answer>"]
TAG = "|".join(ANALYSIS + THINK)
OUTPUT = "<sandbox_output>"
FENCE = "```python"
# What may hold other tags, and how it ends. Keye leaves the marks of code open.
CLOSING = {
    OUTPUT: "</sandbox_output>",
    "<code>": "</code>",
    "<tool_call>": "</tool_call>",
    FENCE: "```",
}
# While tags are looked for, TOOL stands for what a tool returned, and two more signs for the marks
# < and ` in code.
TOOL = "\0"
HIDE = str.maketrans("<`", "\1\2")
SHOW = str.maketrans("\1\2", "<`", TOOL)
HIDDEN = "[\0\1\2]"
SENTENCE = r"(?<=[.!?。！？])\s+|\n"  # between sentences: "Easy. Use /think"
MODE = r"(?<![\w/])/(no_think|agentic_think|think)(?!\w)"  # "/think", not "a/think"
ANSWER = r"(?s)<answer>((?:(?!<answer>).)*?)</answer>"  # the inner one of two
BRACES = r"(?s)(?P<open>(\\boxed\s*)?\{)|(?P<close>\})|\\."  # "\{" is neither


@dataclass
class Parsed:
    """A response's parts, of the model's own words only: a tool's output is in none of them."""

    chose: str | None  # the mode; after /auto_think the one its analysis names, None if it does not
    own: str  # all of them
    errors: list[str]  # what breaks the mode's form; empty: the mode is obeyed
    analysis: str = ""
    thinking: str = ""
    answer: str | None = None  # None: it never came to an answer
    final: str | None = None  # in the answer's last closed \boxed{}, else the answer
    calls: int = 0  # code or tool calls
    outputs: int = 0  # of tools


def parse(completion: str | list[dict], mode: str = "auto_think", finished: bool = True) -> Parsed:
    r"""The parts of a response, and what is wrong with its form. The forms (figures of the report):

    think: <think>..</think><answer>.. \boxed{X} ..</answer>; exactly one box is ours
    no_think: plain text
    agentic_think: think, with code and tool outputs inside <think>
    auto_think: <analysis>..</analysis>, whose last sentence names /think or /no_think; then that
    plain: a bare question, answered as in no_think; it asks for no form, and all is the answer

    finished: False where a limit cut it off, an error too. ValueError: unknown mode.
    """
    if mode not in (*MODES, "plain"):
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}, plain")
    parsed = Parsed(mode, "", [] if finished else ["not finished"])
    text, runs_tools = hide(completion, parsed)
    if mode == "plain":
        return Parsed("no_think", parsed.own, [], answer=parsed.own, final=parsed.own)

    if mode == "auto_think":
        parsed.analysis = show(text.partition("<analysis>")[2].rpartition("</analysis>")[0])
        parsed.chose = mode_named(parsed.analysis)
    form = parsed.chose or ("think" if "<think>" in text else "no_think")
    agentic = form == "agentic_think"
    thinking = find_thinking(text)
    parsed.thinking = show(thinking)
    parsed.answer = find_answer(text)
    boxes = boxed(parsed.answer or "")
    parsed.final = boxes[-1].strip() if boxes else parsed.answer
    unboxed = form != "no_think" and parsed.answer is not None and len(boxes) != 1
    errors = {
        "the analysis names no single mode": parsed.chose is None,
        **dict.fromkeys(tag_errors(text, form, mode), True),
        f"tool use in {form}": runs_tools and not agentic,
        "tool use outside <think>": agentic and re.search(HIDDEN, text.replace(thinking, "", 1)),
        "tool output without a call": agentic and parsed.outputs > parsed.calls,
        f"{len(boxes)} times \\boxed{{}}": unboxed,
        "no answer": not parsed.final,
    }
    parsed.errors += [error for error, found in errors.items() if found]
    return parsed


def hide(completion, parsed):
    """(the text with code and tool outputs hidden, whether tools are used).

    Notes own words, calls, outputs and errors in `parsed`. Code in ```python counts as a call, but
    is no sure use of tools: it may be what a question about code is answered with.
    """
    proven = not isinstance(completion, str)
    given = joined(completion if proven else [{"type": "text", "text": completion}])
    last = {tag: given.rfind(closing) for tag, closing in CLOSING.items()}
    text = ""
    at = 0
    runs_tools = False
    for opening in re.finditer("|".join(CLOSING), given):
        tag, start, inner = opening[0], opening.start(), opening.end()
        closed = inner <= last[tag]
        if start < at or not (closed or tag == OUTPUT):
            continue  # in something hidden, or code without an end
        end = given.find(CLOSING[tag], inner) if closed else len(given)
        text += given[at:start]
        at = end + len(CLOSING[tag])
        if tag == OUTPUT:
            text += TOOL
            if not closed:
                parsed.errors.append(f"open {OUTPUT}")
            if proven and given[inner:end].strip(TOOL + " \n"):
                parsed.errors.append("forged tool output")
        else:
            text += given[start:at].translate(HIDE)
            parsed.calls += 1
            runs_tools |= tag != FENCE
    text += given[at:]
    parsed.own = show(text)
    # In a list every output is marked as such; in a string its tags are all there is.
    parsed.outputs = (given if proven else text).count(TOOL)
    return text, runs_tools or parsed.outputs > 0


def joined(content):
    """The text of a content list, with one TOOL for neighbours that the model did not write."""
    text = ""
    for item in content:
        if item["type"] == "text" and item.get("loss", True):
            text += re.sub(HIDDEN, "", item["text"])
        elif not text.endswith(TOOL):
            text += TOOL
    return text


def show(text):
    return text.translate(SHOW).strip()


def mode_named(analysis):
    """The mode that the last sentence names, if it is one alone."""
    modes = set(re.findall(MODE, re.split(SENTENCE, analysis)[-1]))
    return modes.pop() if len(modes) == 1 else None


def tag_errors(text, form, mode):
    """Tags that are missing, too many or out of order, and text in the wrong place."""
    want = ANALYSIS if mode == "auto_think" else []
    if form != "no_think":
        want = want + THINK
    pieces = re.split(f"({TAG})", text)
    outside, seen, inside = pieces[::4], pieces[1::2], pieces[2::4]
    errors = []
    for tag in ANALYSIS + THINK:
        n = seen.count(tag)
        if n and tag not in want:
            errors.append(f"{tag} in {form}")
        elif n > 1:
            errors.append(f"{n} times {tag}")
        elif n < want.count(tag):
            errors.append(f"no {tag}")
    if seen == want:
        if form == "no_think":
            outside.pop()  # the answer
        if "".join(outside).strip():
            errors.append("text outside the tags")
        for tag, part in zip(want[::2], inside):
            if not part.strip().strip(TOOL + " \n"):
                errors.append(f"empty {tag}")
    elif not errors:
        errors.append("tags out of order")
    if CLOSING[OUTPUT] in text:
        errors.append(f"stray {CLOSING[OUTPUT]}")
    return errors


def find_thinking(text):
    """From the first <think>, or the start, to the last </think>.

    Without </think> it goes on to the end, without both there is none.
    """
    rest = text.split("<think>", 1)[-1]
    if "<think>" in text and "</think>" not in rest:
        return rest
    return rest.rpartition("</think>")[0]


def find_answer(text):
    """The text in the last <answer>, or all after the thinking; None: it came to no answer.

    Found in a broken form too, in the order of Keye's evaluation.
    """
    rest = re.split("</think>|</analysis>", text)[-1]
    if re.search("<think>|<analysis>", rest):
        return None  # it still thinks
    answers = re.findall(ANSWER, rest)
    if answers:
        return show(answers[-1])
    return None if "<answer>" in rest else show(rest)  # None: cut off in its answer


def boxed(text):
    r"""What all closed \boxed{} hold, in the order of their beginnings: the last is innermost."""
    found = []
    openings = []
    for brace in re.finditer(BRACES, text):
        if brace["close"] and openings:
            opening = openings.pop()
            if opening[0] != "{":
                found.append((opening.end(), brace.start()))
        elif brace["open"]:
            openings.append(brace)
    return [text[start:end] for start, end in sorted(found)[-100:]]  # 100 (ours) bounds the time


def turn_of(response, tokenizer) -> list[dict]:
    """A rollout's Response -> the assistant's content list.

    Ids that were not sampled are a tool's; where the response has its observations, they stand
    there with their pictures.
    """
    observations = iter(response.observations)
    ids = iter(response.ids)
    content = []
    for own, run in itertools.groupby(response.sampled):
        tokens = [next(ids) for _ in run]
        observation = None if own else next(observations, None)
        if observation:
            content += observation.content()
        else:
            text = tokenizer.decode(tokens, skip_special=True)
            content.append({"type": "text", "text": text, "loss": own})
    return content


# --------------------------------------------------------------------------------------------------
# consistency, repetition, length


def consistent(parsed: Parsed, meta: dict) -> bool:
    """Whether the thinking leads to the answer, by rule.

    The last number, option or yes/no that the thinking names must be the answer's; a text, an order
    or coordinates must stand in its end. Without thinking: yes, as nothing contradicts, and no mode
    earns more than another for the same answer (ours).
    """
    if not parsed.final or not parsed.thinking:
        return bool(parsed.final) and "<think>" not in parsed.own
    kind = meta["verifier"]
    tail = parsed.thinking[-TAIL:]
    answer = read(parsed.final, meta)
    if answer in (None, "", []):
        return False
    words = kind == "choice" and len(answer) > 1 and not meta.get("choices")
    if words or kind in ("exact", "text"):
        return answer.casefold() in normal(tail).casefold()
    if kind in ("number", "choice", "yesno"):
        for part in filter(None, [stated(tail), *reversed(re.split(SENTENCE, tail))]):
            values = named(part, meta)
            if values:
                return values[-1] == answer
            if read(part, meta) == answer:  # 0, as "no circles" names it
                return True
        return False
    if kind == "order":
        said = sequence(tail, meta)
    else:
        said = [float(digits) for digits in re.findall(r"-?\d{1,9}(?:\.\d{1,9})?", tail)]
        answer = sum(answer, [])  # the numbers of all rows
    n = len(answer)
    return any(said[start : start + n] == answer for start in range(len(said)))


def repetition(text: str) -> float:
    """Share (0..1) of 20-grams that came before, in the whole text or its worst window of 1,000.

    Of characters, as words between white space find no loop in Chinese (sizes ours). A row of
    JSON, as of a list of boxes, counts only where it comes again.
    """
    seen = set()

    def drop_if_new(row):
        known = row[0] in seen or len(row[0]) > 200
        seen.add(row[0])
        return row[0] if known else ""

    text = re.sub(r"\{[^{}]*\},?\s*", drop_if_new, text)  # {"box": [1, 2, 3, 4]},
    window = 1000
    starts = range(0, len(text) - window, window // 2)
    windows = [text[start : start + window] for start in starts]
    return max(map(known_share, [text, text[-window:], *windows]))


def known_share(text, n=20):
    count = len(text) - n + 1
    if count <= n:
        return 0.0
    return 1 - len({text[start : start + n] for start in range(count)}) / count


def overlong(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft penalty (2503.14476): 0, then falling to -1 over the last `buffer` tokens."""
    return max(-1.0, min(0.0, (max_tokens - buffer - length) / buffer))
