"""common/tokenizer.py: the ids of the tokenizers library, and what text can never become."""

import json
import os
import pickle
import random
import unicodedata
from pathlib import Path

import pytest

from common.tokenizer import ADDED, CONTROL, PATTERN, Tokenizer, byte_of_char, vocab_file

OFFICIAL = os.environ.get("KEYE_OFFICIAL")
MIXED = [
    "Hello, world!",
    "你好，世界。今天天气很好",
    "naïve cafe\u0301 Å",
    "👩‍👩‍👧‍👦 🎉🇨🇳",
    "  leading and   inner   spaces  ",
    "def f(x):\n\treturn x**2  # 平方\n\n\n  y",
    "I'll we've DON'T it's",
    "12345 3.14 ١٢٣",
    "",
    "\r\n\r\n mixed \u3000\xa0 ends\n ",
    "\x00\x1b[0m",
    "ﬁ Ⅳ ½ \u0338>\u0338",
    "مرحبا بالعالم हिन्दी 한국어 ひらがな",
]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    """A small vocab.json: the 256 bytes, in an order that is not theirs, and some merges."""
    words = " circle|user|assistant|system|Hello|你好|   |\n\n| the|Picture|👩|12".split("|")
    tokens = [bytes([b]) for b in range(255, -1, -1)]
    for word in words:
        word = word.encode()
        tokens += [word[:end] for end in range(2, len(word) + 1)]
    chars = {b: char for char, b in byte_of_char().items()}
    table = {}
    for token in tokens:
        table.setdefault("".join(chars[b] for b in token), len(table))
    path = tmp_path_factory.mktemp("vocab") / "vocab.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocab):
    return Tokenizer(vocab)


def merge_of(token, rank, vocab):
    """The two parts that were merged into a token: what all merges of lower rank leave of it."""
    parts = list(token)
    while len(parts) > 2:
        pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        ranks = [vocab.get(pair, rank) for pair in pairs]
        at = ranks.index(min(ranks))
        if ranks[at] >= rank:
            return None
        parts[at : at + 2] = [pairs[at]]
    return tuple(parts) if len(parts) == 2 else None


def reference_tokenizer(path):
    """The tokenizers library on the same vocabulary."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Reference

    vocab = json.loads(Path(path).read_text(encoding="utf-8"))
    in_order = sorted(vocab.items(), key=lambda entry: entry[1])
    merges = [merge_of(token, rank, vocab) for token, rank in in_order]
    reference = Reference(models.BPE(vocab=vocab, merges=[m for m in merges if m]))
    reference.normalizer = normalizers.NFC()
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    reference.decoder = decoders.ByteLevel()
    added = [AddedToken(t, normalized=False, special=t in CONTROL) for t in ADDED]
    reference.add_tokens(added)
    return reference


def random_texts(n, seed=0):
    rng = random.Random(seed)
    alphabet = "".join(MIXED) + " \n\t'<>|_-" * 3
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(n)]
    return [text.replace("<|", "< |") for text in texts]


def compare_with_reference(path, texts):
    ours, reference = Tokenizer(path), reference_tokenizer(path)
    for text in texts:
        assert ours.encode(text) == reference.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)
    marked = (
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>[[1, 2, 3, 4]]<|box_end|>\u0338"
        "<think>\n1</think>"
    )
    assert ours.encode(marked, added=True) == reference.encode(marked).ids
    assert ours.special == {token: reference.token_to_id(token) for token in ADDED}


def test_ids_equal_those_of_the_tokenizers_library(vocab):
    compare_with_reference(vocab, MIXED + random_texts(500))


@pytest.mark.skipif(not OFFICIAL, reason="KEYE_OFFICIAL is not set")
def test_the_official_vocabulary():
    folder = Path(OFFICIAL)
    compare_with_reference(folder / "vocab.json", MIXED + random_texts(300))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    official = config["added_tokens_decoder"]
    tokenizer = Tokenizer(folder / "vocab.json")
    assert tokenizer.special == {v["content"]: int(i) for i, v in official.items()}
    assert CONTROL == {v["content"] for v in official.values() if v["special"]}
    assert (tokenizer.n_base, tokenizer.n_tokens) == (151_643, 151_675)
    assert tokenizer.vocab_rows == 151_936


def test_the_embedding_has_a_multiple_of_128_rows(tokenizer):
    assert tokenizer.n_tokens == tokenizer.n_base + 32
    assert tokenizer.n_tokens <= tokenizer.vocab_rows < tokenizer.n_tokens + 128
    assert tokenizer.vocab_rows % 128 == 0


def test_text_never_becomes_a_control_token(tokenizer):
    everything = "".join(ADDED)
    assert max(tokenizer.encode(everything)) < tokenizer.n_base
    ids = tokenizer.encode(everything, added=True)
    writable = [tokenizer.special[token] for token in ADDED if token not in CONTROL]
    assert [i for i in ids if i >= tokenizer.n_base] == writable
    assert tokenizer.decode(ids) == everything


def test_the_cache_keeps_plain_and_added_text_apart(tokenizer):
    plain, added = tokenizer.encode("<think>"), tokenizer.encode("<think>", added=True)
    assert added == [tokenizer.special["<think>"]] != plain
    plain.append(0)
    assert tokenizer.encode("<think>") == plain[:-1]


def test_decode(tokenizer):
    ids = [tokenizer.special["<|im_start|>"], *tokenizer.encode("Hello <think>", added=True)]
    assert tokenizer.decode(ids) == "<|im_start|>Hello <think>"
    assert tokenizer.decode(ids, skip_special=True) == "Hello <think>"
    assert tokenizer.decode(tokenizer.encode("界")[:1]) == "\ufffd"
    for wrong in (-1, tokenizer.n_base + 32):
        with pytest.raises(ValueError, match=f"token id {wrong} has no text"):
            tokenizer.decode([5, wrong])


BLANKS = [" ", "\t", "\n", "\r\n", " \n", "\t ", "\u3000", "\xa0\n ", "\x1c ", "\x85\u2028"]


def test_runs_of_blanks_have_the_ids_of_the_tokenizers_library(vocab):
    ours, reference = Tokenizer(vocab), reference_tokenizer(vocab)
    rng = random.Random(0)
    texts = ["".join(rng.choices(BLANKS, k=rng.randint(1, 60))) for _ in range(200)]
    texts += [blank * 7 + end for blank in BLANKS for end in ("", "a", "1", ".", "\n", " a")]
    texts += [(blank * 60_000)[:60_000] + end for blank in BLANKS for end in ("", "a")]
    texts.append("".join(rng.choices(BLANKS, k=30_000)))
    for text in texts:
        assert ours.encode(text) == reference.encode(text).ids, repr(text[-10:])


@pytest.mark.parametrize("text, kept", [
    ("\ud800", "\ufffd"),
    ("a\udfff b", "a\ufffd b"),
    ("\udc00\ud800\ud800x", "\ufffd\ufffd\ufffdx"),
    ("\ud83d\ude00", "\U0001f600"),  # two halves of one character
    ("\0\x1b[2J\x7f\x85", "\0\x1b[2J\x7f\x85"),
])
def test_any_text_becomes_ids(tokenizer, text, kept):
    for added in (False, True):
        ids = tokenizer.encode(text, added)
        assert tokenizer.decode(ids) == kept and ids == tokenizer.encode(kept, added)


def test_a_million_spaces_do_not_kill_the_process(tokenizer):
    ids = tokenizer.encode("a" + " " * 1_000_000 + "b")
    assert 0 < len(ids) < 100_000
    assert tokenizer.decode(ids) == "a" + " " * 65_536 + "b"


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("Hello circle") == tokenizer.encode("Hello circle")


def missing(table):
    table["yy"] = table.pop("Ġcircle") + 7


def doubled(table):
    table["zz"] = 3


def text_id(table):
    table["zz"] = "3"


def odd_character(table):
    table["a b"] = len(table)


def no_byte(table):
    table["zz"] = table.pop("A")


@pytest.mark.parametrize(
    "change, message",
    [
        (missing, "once; wrong: "),
        (doubled, "once; wrong: "),
        (text_id, "integer"),
        (odd_character, "byte-level"),
        (no_byte, "no token for byte 65"),
    ],
)
def test_a_wrong_vocabulary_is_named(vocab, tmp_path, change, message):
    table = json.loads(vocab.read_text(encoding="utf-8"))
    change(table)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"broken.json: .*{message}"):
        Tokenizer(path)


@pytest.mark.parametrize("text", ['{"a": 0', "[1]", ""])
def test_a_file_that_is_no_vocabulary_is_named(tmp_path, text):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ValueError, match="v.json: "):
        Tokenizer(tmp_path / "v.json")


# -- tokenizer.json of Hugging Face ----------------------------------------------------------------


def as_tokenizer_json(vocab, folder, change=None):
    facts = json.loads(reference_tokenizer(vocab).to_str())
    if change:
        change(facts)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(facts), encoding="utf-8")
    return path


def older_merges(facts):  # "a b" for ["a", "b"]
    facts["model"]["merges"] = [" ".join(pair) for pair in facts["model"]["merges"]]


def fewer_added(facts):  # Qwen3 has the first 26 of Keye's
    del facts["added_tokens"][26:]


@pytest.mark.parametrize("change", [None, older_merges, fewer_added])
def test_a_tokenizer_json_gives_the_same_ids(vocab, tmp_path, change):
    path = as_tokenizer_json(vocab, tmp_path, change)
    assert vocab_file(tmp_path) == path
    ours, theirs = Tokenizer(path), Tokenizer(vocab)
    assert ours.special == theirs.special
    for text in MIXED:
        assert ours.encode(text) == theirs.encode(text)


def swap_merges(facts):
    merges = facts["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def unigram(facts):
    facts["model"]["type"] = "Unigram"


def by_three_digits(facts):
    split = facts["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"\p{N}", r"\p{N}{1,3}", 1)


def no_normalizer(facts):
    facts["normalizer"] = None


def another_added(facts):
    facts["added_tokens"][24]["content"] = "<reason>"


@pytest.mark.parametrize("change, said", [
    (unigram, "no BPE model"), (swap_merges, "ids are not the ranks of its merges"),
    (by_three_digits, "pre_tokenizer"), (no_normalizer, "normalizer is not NFC"),
    (another_added, "added token <reason>"),
])
def test_another_kind_of_tokenizer_json_is_refused(vocab, tmp_path, change, said):
    path = as_tokenizer_json(vocab, tmp_path, change)
    with pytest.raises(ValueError, match=f"{path}: .*{said}.*: not Qwen's tokenizer"):
        Tokenizer(path)


def test_a_byte_order_mark_is_no_part_of_the_vocabulary(vocab, tmp_path):
    path = tmp_path / "vocab.json"
    path.write_bytes(b"\xef\xbb\xbf" + vocab.read_bytes())
    assert Tokenizer(path).encode("Hello") == Tokenizer(vocab).encode("Hello")
