"""The byte-level BPE tokenizer of Qwen and Keye, from its vocabulary alone.

    tokenizer = Tokenizer("vocab.json")
    ids = tokenizer.encode("What is this?")     # a list of ints
    text = tokenizer.decode(ids)

The ids of a byte-level vocabulary are the ranks of its merges, so no file of merges is needed.
"""

import json
import lzma
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import tiktoken

# Qwen's: how text is cut into pieces before merging. Digits stand alone; one space, or another
# mark, joins the word behind it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Keye's tokens with ids right after those of vocab.json, in this order.
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> "
    "<|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> "
    "<|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> "
    "</tool_response> <think> </think> <|point_start|> <|point_end|> <|ocr_text_start|> "
    "<|ocr_text_end|> <|clip_time_start|> <|clip_time_end|>"
).split()

# Those that only the chat template may write ("special": true in the official file).
CONTROL = set(
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>".split()
)
WRITABLE = re.compile(f"({'|'.join(re.escape(t) for t in ADDED if t not in CONTROL)})")

# ours: longer runs of blanks are cut to this, as tiktoken's stack overflows at about 300,000
LONG_BLANK = re.compile(r"(\s{65536})\s+")


# Qwen's vocabulary, 151,643 tokens in the order of their ids, one a line; of Qwen3 (Apache 2.0,
# huggingface.co/Qwen/Qwen3-8B). Keye-VL has it too.
QWEN_VOCAB = Path(__file__).parent / "qwen.vocab.xz"


def byte_of_char() -> dict[str, int]:
    """GPT-2's table {character: byte}: vocab.json writes each byte as one printable character.

    Printable bytes stand for themselves, the others are U+0100, U+0101, ... in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    codes = printable + list(range(256, 256 + len(others)))
    return dict(zip(map(chr, codes), printable + others))


def vocab_file(folder: str | Path) -> Path:
    """vocab.json of a model's folder, else its tokenizer.json. FileNotFoundError names both."""
    for name in ("vocab.json", "tokenizer.json"):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise FileNotFoundError(f"{folder}: neither vocab.json nor tokenizer.json")


def read_vocab(path: Path) -> dict[str, int]:
    """vocab.json, or what a tokenizer.json holds of it: {token in byte-level characters: id}.

    Or QWEN_VOCAB. ValueError naming the file when it is no vocabulary, or one of another kind of
    tokenizer.
    """
    if path == QWEN_VOCAB:
        tokens = lzma.decompress(path.read_bytes()).decode().splitlines()
        return {token: i for i, token in enumerate(tokens)}
    try:
        vocab = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a JSON vocabulary ({e})") from e
    if isinstance(vocab, dict) and isinstance(vocab.get("model"), dict):
        why = _unlike_qwens(vocab)
        if why:
            raise ValueError(f"{path}: {why}: not Qwen's tokenizer, the only one that is read")
        return vocab["model"]["vocab"]
    return vocab


def _unlike_qwens(facts: dict) -> str | None:
    """Whether a tokenizer.json cuts, merges or counts otherwise than Tokenizer, and in what."""
    model = facts["model"]
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        return "no BPE model with its vocab and merges"
    ids = [vocab.get("".join(pair).replace(" ", ""), -1) for pair in merges]  # ["a", "b"] or "a b"
    if -1 in ids or ids != sorted(ids):
        return "its ids are not the ranks of its merges"
    if json.dumps(PATTERN) not in json.dumps(facts.get("pre_tokenizer")):
        return "its pre_tokenizer splits text by another pattern"
    if facts.get("normalizer") != {"type": "NFC"}:
        return "its normalizer is not NFC"
    keyes = {token: i for i, token in enumerate(ADDED, len(vocab))}
    for token in facts.get("added_tokens") or []:
        if keyes.get(token["content"]) != token["id"]:
            return f"its added token {token['content']} has the id {token['id']}"
    return None


def read_ranks(path: Path) -> dict[bytes, int]:
    """A file of a vocabulary -> {token: rank}. ValueError names it when that is not whole."""
    vocab = read_vocab(path)
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError(f"{path}: expected one object of token text -> integer id")
    wrong = set(vocab.values()) ^ set(range(len(vocab)))
    if wrong:
        first = sorted(wrong)[:3]
        raise ValueError(f"{path}: the ids must be 0..{len(vocab) - 1}, each once; wrong: {first}")
    table = byte_of_char()
    ranks = {}
    for text, i in vocab.items():
        if not text or set(text) - table.keys():
            raise ValueError(f"{path}: token {i}, {text!r}, is not in byte-level characters")
        ranks[bytes(table[char] for char in text)] = i
    for b in range(256):
        if bytes([b]) not in ranks:
            raise ValueError(f"{path}: no token for byte {b}: such text could not be encoded")
    return ranks


class Tokenizer:
    """Text to ids and back.

    special: {added token: id}; n_base: tokens of vocab.json; n_tokens: those and the added ones;
    vocab_rows: rows of the embedding table. ValueError naming the file when it is no vocabulary.
    """

    def __init__(self, vocab_path: str | Path):
        self.path = Path(vocab_path)
        ranks = read_ranks(self.path)
        self.n_base = len(ranks)
        self.n_tokens = self.n_base + len(ADDED)
        self.special = {token: self.n_base + i for i, token in enumerate(ADDED)}
        self._control_ids = {self.special[token] for token in CONTROL}
        if self.n_base == 151_643:
            self.vocab_rows = 151_936  # Keye's table is larger than its 151,675 ids
        else:
            self.vocab_rows = -(-self.n_tokens // 128) * 128  # ours: the next multiple of 128
        self._bpe = tiktoken.Encoding(
            self.path.name,
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special,
        )
        # Short questions repeat in training: an answer from the cache takes 0.1 us instead of 10.
        self._encode_cached = lru_cache(maxsize=65_536)(self._encode)

    def __reduce__(self):
        # To a worker process that is not forked goes the path, as tables and cache cannot be sent.
        return Tokenizer, (self.path,)

    def _encode(self, text, added):
        text = LONG_BLANK.sub(r"\1", text)
        parts = WRITABLE.split(text) if added else [text]
        ids = []
        for i, part in enumerate(parts):
            if i % 2:  # what the pattern has split at: an added token
                ids.append(self.special[part])
            else:
                ids += self._bpe.encode_ordinary(unicodedata.normalize("NFC", part))
        return tuple(ids)

    def encode(self, text: str, added: bool = False) -> list[int]:
        """Text -> ids.

        No text becomes an added token, unless added=True: then those that a model may write (boxes,
        points, <think>, ...), but never a control token (<|im_start|>, <|image_pad|>, ...).
        """
        encode = self._encode_cached if len(text) < 256 else self._encode
        return list(encode(text, added))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Ids -> text, bytes that are no UTF-8 as U+FFFD. skip_special leaves control tokens out.

        ValueError for an id without a token.
        """
        kept = []
        for i in map(int, ids):
            if not 0 <= i < self.n_tokens:
                raise ValueError(
                    f"token id {i} has no text: {self.path} ends at {self.n_tokens - 1}"
                )
            if not skip_special or i not in self._control_ids:
                kept.append(i)
        return self._bpe.decode(kept, errors="replace")
