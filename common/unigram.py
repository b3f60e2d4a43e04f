"""SigLIP's text tokenizer, for stage 0 from released weights: the likeliest split into pieces."""

import json
import math
import string
from pathlib import Path

END = 1  # </s>, also the padding
DROPPED = str.maketrans("", "", string.punctuation)


class Unigram:
    """Reads SigLIP's tokenizer.json. Call it with a caption; returns `context` ids."""

    def __init__(self, path: Path, context: int):
        model = json.loads(path.read_text())["model"]
        if model["type"] != "Unigram":
            raise ValueError(f"{path}: a Unigram model was expected, not {model['type']}")
        self.context = context
        self.unknown = model["unk_id"]
        self.scores = dict(model["vocab"])
        self.ids = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
        self.longest = max(map(len, self.ids))
        # sentencepiece's penalty for an unknown letter
        self.unknown_score = min(self.scores.values()) - 10

    def __call__(self, text: str) -> list[int]:
        """Lower case, no ASCII punctuation, as SigLIP was trained."""
        words = text.lower().translate(DROPPED).split()
        marked = ["▁" + word for word in words]
        ids = self.split("".join(marked))
        ids = ids[: self.context - 1]
        return ids + [END] * (self.context - len(ids))

    def split(self, text: str) -> list[int]:
        """Viterbi: the best way to each place, from the best ways to the places before it."""
        places = len(text) + 1
        best_score = [-math.inf] * places
        best_score[0] = 0.0
        best_start = [0] * places
        for end in range(1, places):
            for start in range(max(0, end - self.longest), end):
                piece = text[start:end]
                missing = self.unknown_score if len(piece) == 1 else -math.inf
                score = best_score[start] + self.scores.get(piece, missing)
                if score > best_score[end]:
                    best_score[end] = score
                    best_start[end] = start

        ids = []
        end = len(text)
        while end:
            start = best_start[end]
            piece = self.ids.get(text[start:end], self.unknown)
            # unknown letters in a row are one piece
            if piece != self.unknown or ids[-1:] != [self.unknown]:
                ids.append(piece)
            end = start
        return ids[::-1]
