"""The embedded data set: pictures, clips and texts with known truth, drawn from a seed.

    python -m toyworld --out data/toy --size toy            draw a world, or keep a finished one
    make_world("data/toy", size="toy")                      the same from code

A world is a folder: train/ and heldout/, each with JSONL files of conversations, pictures/ and
clips/, and world.json. A tenth of all contents, by hash, is held out and never occurs in train.

    caption vqa ocr grounding interleaved video text        the report's categories (section 3.1)
    reasoning                                               several steps
    detail                                                  unreadable until one zooms in
    instruct                                                a form of answer is asked for
    pairs                                                   pictures with captions, for the ViT
    questions                                               as held-out files ask, of train contents
    think no_think agentic clips                            answers for the cold start
    discover                                                reinforcement alone asks this
    preferences                                             pairs of answers, for behaviour
    premise                                                 is there what a question asks about

A single question's "meta" holds its answer, the verifier that judges it, and true "steps" towards
it. Every number here is ours; the formats of boxes, points, texts and times are Keye's (table 1).
"""

from toyworld.drawing import PLACES
from toyworld.world import SIZES, draw_unit, make_world, plan
