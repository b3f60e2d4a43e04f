r"""Trains the vocabulary of the toy sizes: byte-level BPE over the toy world's texts.

    python -m tools.train_vocab           writes toyworld/vocab.json

In: texts of some units of every kind of pre-training (nothing is drawn), and words that later
prompts and chains of thought need. Out: 992 tokens with their ranks, the 256 bytes first, written
as Qwen's vocab.json is. The same texts give the same file.
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken

from common.tokenizer import PATTERN, byte_of_char
from toyworld import SIZES, draw_unit, plan
from toyworld.unit import text_item

VOCAB = Path("toyworld/vocab.json")
TOKENS = 992  # ours: with the 32 added tokens a table of 1,024 rows

# What pre-training's texts lack: the chat template's own words and the forms of answers, which are
# frequent later.
CHAT = [
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    "\n",
    "<analysis>Easy, so /no_think.</analysis>",
    "<analysis>Several steps, so /think.</analysis>",
    "<analysis>Too small, so /agentic_think.</analysis>",
    "/auto_think",
    "<answer>\\boxed{red}</answer>",
    "</answer>",
    "so red",
    "crop(78, 78)\nzoom(2)\nrotate(90)\ncontrast(4)",
    "print(1 + 2)",
    "<sandbox_output>1\n</sandbox_output>",
    "<sandbox_output>error: </sandbox_output>",
]
# And words of prompts that people write. A backslash joins two lines.
EXTRA = """\
/think /no_think /auto_think /agentic_think \\boxed{5} \\boxed{ } So the answer is: The answer \
is yes.
Therefore, step
1: first count, then add.
Let me look. Let me think. Let me zoom in. I need to see it larger. I can see the digit now. \
zoom crop rotate contrast
brightness image code result output error
crop(100, 200, 300, 400) zoom(2) rotate(90) contrast(4.0) brightness(1.5) print() {"name": \
"crop", "arguments":
{"box": [1, 2, 3, 4]}} ```python ```
This question is easy, so no thinking is needed. This question needs several steps, so thinking \
is needed. easy hard
simple analysis mode direct
left of it above it below it right of it is a there are objects in all total together more than \
less than equal larger
smaller before after next last same different
What is this? How many are there? Which one? Where is it? When does it happen? Who? Why? Can you \
tell me? Please
answer with one word. Answer in a sentence. Answer shortly.
clip frame frames video picture pictures text words letters number numbers colour color shape \
position object objects
place size box point order time second seconds
yes no none not and or but if then because with without from to by for of on at in out up down \
over under near between
only also again
I you he she we they it my your our their his her me him us them was were be been has have had \
do does did will would
can could should may must
one two three four five six seven eight nine ten zero black white grey brown small large big \
little long short high
low good new old
look find show give make take put name read write count sort copy compare check move moves \
moving appear appears
describe explain turn turned"""


def corpus():
    """{text: how often it occurs}."""
    texts = Counter(dict.fromkeys(CHAT, 1000)) + Counter(EXTRA.splitlines())
    for split, kind, n in plan(4000, 1500, 0):
        for i in range(n):
            unit = draw_unit("", split, kind, i, 0, SIZES["toy"].sides, dry=True)
            for _, line in unit.lines:
                texts.update(texts_of(json.loads(line)))
    return texts


def texts_of(record):
    """What is said in a line, and the steps towards it."""
    texts = record["meta"]["steps"] if "meta" in record else []
    for message in record["messages"]:
        content = message["content"]
        if isinstance(content, str):
            content = [text_item(content)]
        texts += [item["text"] for item in content if item["type"] == "text"]
    return texts


def pieces_of(texts):
    """{piece as a tuple of single bytes: how often it occurs}; special tokens are left out."""
    pattern = regex.compile(PATTERN)
    pieces = Counter()
    for text, count in texts.items():
        for part in re.split(r"<\|\w+\|>", text):
            for piece in pattern.findall(part):
                pieces[tuple(bytes([b]) for b in piece.encode())] += count
    return pieces


def merge(piece, pair):
    """The piece with every occurrence of the pair made one token, from the left."""
    merged = [b""]  # which is in no pair
    for token in piece:
        if (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged[1:])


def train_vocab(texts: Counter, n: int) -> dict[str, int]:
    """{token in the GPT-2 byte alphabet: rank}, n of them. ValueError: the texts give fewer."""
    char_of = {byte: char for char, byte in byte_of_char().items()}
    tokens = [bytes([byte]) for byte in char_of]
    pieces = pieces_of(texts)
    while len(tokens) < n:
        pairs = Counter()
        for piece, count in pieces.items():
            for pair in pairwise(piece):
                pairs[pair] += count
        if not pairs:
            raise ValueError(f"the texts give only {len(tokens)} of {n} tokens: add words to EXTRA")
        # The most frequent pair; of equals the last in order, so that the result is certain.
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(b"".join(best))
        pieces = {merge(piece, best): count for piece, count in pieces.items()}
    return {"".join(char_of[byte] for byte in token): i for i, token in enumerate(tokens)}


if __name__ == "__main__":
    vocab = train_vocab(corpus(), TOKENS)
    text = json.dumps(vocab, ensure_ascii=False, indent=0) + "\n"
    VOCAB.write_text(text, encoding="utf-8")
    print(f"{VOCAB}: {len(vocab)} tokens, the longest {max(vocab, key=len)!r}")
