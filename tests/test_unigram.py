"""common/unigram.py against the tokenizers library."""

import json
import string

import pytest

from common.unigram import Unigram
from conftest import ROOT

CONTEXT = 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A Unigram tokenizer as SigLIP's: its special ids, lower case, ASCII punctuation dropped."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    punctuation = Regex("[" + "".join("\\" + letter for letter in string.punctuation) + "]")
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Lowercase(),
        normalizers.Replace(punctuation, ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )
    text = "\n".join(path.read_text() for path in sorted((ROOT / "toyworld").glob("*.py")))
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, path


TEXTS = [
    "a red circle",
    "Two RED Circles, one (blue) square!",
    "it's snake_case & 50% of #7",
    "  tabs\tand\n\nlines ",
    "naïve café",
    "½ of µ",
    "日 本",
    "word 日本語 word",
    "a “quoted” word",
    "5€ or 5°",
    "?!",
    "a long caption of the red circle " * 9,
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_unigram_equals_the_tokenizers_library(text, trained):
    tokenizer, path = trained
    expected = tokenizer.encode(text).ids[: CONTEXT - 1]
    expected += [1] * (CONTEXT - len(expected))  # </s>, also the padding
    assert Unigram(path, CONTEXT)(text) == expected


def test_an_unknown_letter_costs_more_than_any_piece(tmp_path):
    """Where "a" is no piece, "ab" is one rare piece rather than an unknown and a frequent one."""
    vocab = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -2], ["ab", -25], ["b", -1]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram", "unk_id": 2, "vocab": vocab}}))
    assert Unigram(path, 5)("ab") == [3, 4, 1, 1, 1]
    assert Unigram(path, 5)("aab") == [3, 2, 4, 1, 1]
    assert Unigram(path, 5)("b b b b") == [3, 5, 3, 5, 1], "the end stands even where it is cut"


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(ValueError, match="tokenizer.json: a Unigram model was expected, not BPE"):
        Unigram(path, CONTEXT)
