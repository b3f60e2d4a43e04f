r"""Conversations for the cold start: train questions again, answered in the ways it teaches.

    think.jsonl      <think>the steps, the answer is X</think><answer>\boxed{X}</answer>
    no_think.jsonl   the same questions, X alone
    agentic.jsonl    <think>steps <tool_call>code</tool_call><sandbox_output>what it showed
                     </sandbox_output>X</think><answer>\boxed{X}</answer>
    clips.jsonl      questions about clips, each once with thinking and once without

The switches ("/think" and so on) are not in the texts: the reader adds them. "meta" stays, so that
answers can be judged. What the tool showed is the sandbox's, and has "loss": false.
"""

import json
import random

from common import sandbox
from common.conversation import pictures_of
from toyworld.pictures import look_box
from toyworld.unit import text_item

# ours: share of the questions without use for a tool that stand in agentic.jsonl all the same, as
# its switch allows tools and does not ask for them
WITHOUT_TOOL = 0.15


def boxed(reply):
    return f"</think><answer>\\boxed{{{reply}}}</answer>"


def tool_code(meta):
    """What to run for a question: a look at a detail, or a sum; None: a tool is of no use."""
    if meta["task"] == "arithmetic":
        first = meta["steps"][0].split()[0]
        return f"print({first} {meta['sign']} {meta['second']})"
    if meta["category"] != "detail":
        return None
    code = f"crop{look_box(meta['place'])}\nzoom(2)"
    if meta["rotate"]:
        code += f"\nrotate({meta['rotate']})"
    if meta["contrast"] != 1:
        code += f"\ncontrast({meta['contrast']:g})"
    return code


def looking(code, record, folder, name):
    """The content of an answer that runs code on a question's pictures, files in folder.

    A picture that the code shows is written to folder as `name`.
    """
    meta = record["meta"]
    # The pictures as any reader finds them in the files, not as they were drawn.
    pictures = pictures_of(record, folder)
    shown = sandbox.run(code, pictures).content()
    for item in shown:
        if item["type"] == "image":
            picture = item["image"]
            picture.save(folder / name, compress_level=1)
            item |= {"image": name, "width": picture.width, "height": picture.height}

    # One finds the place, then looks at it; a sum is given to the tool at once.
    steps = "".join(f"{step}\n" for step in meta["steps"] if pictures)
    call = text_item(f"<think>{steps}<tool_call>{code}</tool_call>")
    return [call, *shown, text_item(meta["answer"] + boxed(meta["answer"]))]


def conversations(folder, seed, numbered):
    """numbered: a number of its own, and a line with one question, from a file in folder.

    -> [("train/think", line of that file), ...]
    """
    number, line = numbered
    record = json.loads(line)
    meta = record["meta"]
    question, answer = record["messages"]
    reply = answer["content"]
    steps = "\n".join(meta["steps"])
    thought = f"<think>{steps}\nthe answer is {reply}{boxed(reply)}"
    rng = random.Random(f"{seed}/thinking/{number}")
    code = tool_code(meta)

    answers = [("think", thought), ("no_think", reply)]
    if '"type": "video"' in line:
        answers = [("clips", thought), ("clips", reply)]
    elif code:
        name = f"pictures/tool-{number:06d}.png"
        answers.append(("agentic", looking(code, record, folder, name)))
    elif rng.random() < WITHOUT_TOOL:
        answers.append(("agentic", thought))
    lines = []
    for name, content in answers:
        messages = [question, {"role": "assistant", "content": content}]
        lines.append((f"train/{name}", json.dumps({"messages": messages, "meta": meta})))
    return lines
