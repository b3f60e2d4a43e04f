"""SigLIP's text tokenizer, for stage 0 from released weights: the likeliest split into pieces."""

import string
from pathlib import Path

from common.weights import read_json

END = 1  # </s>, also the padding
DROPPED = str.maketrans("", "", string.punctuation)


class Unigram:
    """Reads SigLIP's tokenizer.json. Call it with a caption; returns `context` ids."""

    def __init__(self, path: Path, context: int):
        model = read_json(path).get("model") or {}
        if model.get("type") != "Unigram":
            raise ValueError(f"{path}: a Unigram model was expected, not {model.get('type')}")
        self.context = context
        self.pieces = {piece: (score, i) for i, (piece, score) in enumerate(model["vocab"])}
        self.longest = max(map(len, self.pieces))
        lowest = min(self.pieces.values())[0]
        # sentencepiece's penalty for an unknown letter
        self.unknown = (lowest - 10, model["unk_id"])

    def __call__(self, text: str) -> list[int]:
        """Lower case, no ASCII punctuation, as SigLIP was trained."""
        words = text.lower().translate(DROPPED).split()
        marked = ["▁" + word for word in words]
        ids = self.split("".join(marked))[: self.context - 1]
        return ids + [END] * (self.context - len(ids))

    def split(self, text: str) -> list[int]:
        """Viterbi: the best way to each place, from the best ways to the places before it."""
        best = [(0.0, [])]  # of each place: the score and the ids of the best way there
        for end in range(1, len(text) + 1):
            ways = []
            for start in range(max(0, end - self.longest), end):
                piece = text[start:end]
                if len(piece) == 1 or piece in self.pieces:
                    gain, i = self.pieces.get(piece, self.unknown)
                    score, ids = best[start]
                    ways.append((score + gain, ids, i))
            score, ids, i = max(ways, key=lambda way: way[0])
            # unknown letters in a row are one piece
            if i != self.unknown[1] or ids[-1:] != [i]:
                ids = [*ids, i]
            best.append((score, ids))
        return best[-1][1]
