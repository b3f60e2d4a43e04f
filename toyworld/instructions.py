"""Instructions: what is known is to be said in a form that pre-training never used."""

import json

from toyworld.clips import MOTION_STEPS, motion_clip
from toyworld.drawing import COLOUR_NAMES, SHAPES
from toyworld.pictures import answered_scene
from toyworld.unit import CHOICES, Unit, article, ask, in_turn, says

# Task -> the scene questions that it asks in another form.
BASES = {
    "in_sentence": ["colour", "shape", "position", "count"],
    "in_capitals": ["colour", "shape", "position"],
    "option": ["colour", "shape"],
}
INSTRUCT = (
    "in_sentence in_capitals as_json colour_and_shape option twice_asked say_motion".split()
)


def in_sentence(q):
    """The reply to a scene question as a whole sentence."""
    if q.task == "count":
        return "There is 1 object." if q.reply == "1" else f"There are {q.reply} objects."
    subject = q.text.split(" is ", 1)[1][:-1]  # "the circle" of "What colour is the circle?"
    said = {"colour": q.reply, "shape": article(q.reply), "position": f"at the {q.reply}"}
    return says(f"{subject} is {said[q.task]}")


def in_other_words(u, q, turn):
    """The scene's question q, to be answered in a sentence, in capitals, or with a letter."""
    if u.task == "in_sentence":
        text = "Answer in a sentence."
        reply = in_sentence(q)
    elif u.task == "in_capitals":
        text = "Answer in capitals."
        reply = q.reply.upper()
    else:
        options = u.rng.sample([c for c in CHOICES[q.task] if c != q.reply], 2)
        options.insert(turn % 3, q.reply)
        text = "A. {} B. {} C. {} Answer with the letter.".format(*options)
        reply = "ABC"[turn % 3]
    chance = q.meta["chance"]
    return ask(u.task, f"{q.text} {text}", reply, chance=chance, steps=q.meta["steps"])


def both_attributes(task, t):
    """Asks for colour and shape of the thing at its place."""
    what = f"the object at the {t.where}"
    if task == "as_json":
        text = f"Give colour and shape of {what} as JSON."
        reply = json.dumps({"colour": t.colour, "shape": t.shape})
    elif task == "colour_and_shape":
        text = f"Which colour and which shape has {what}?"
        reply = t.name
    else:
        text = f"What colour and what shape is {what}? Name the shape first."
        reply = f"{t.shape}, {t.colour}"
    chance = round(1 / len(COLOUR_NAMES) / len(SHAPES), 4)
    return ask(task, text, reply, chance=chance, steps=[t.seen])


def instruct_unit(u: Unit):
    if u.task == "say_motion":
        move = in_turn("motion", u.index)
        name, item = motion_clip(u, move)
        question = ask(
            "say_motion",
            f"Which way does the {name} move? Answer in a sentence.",
            f"The {name} moves {move}.",
            chance=0.25,
            steps=MOTION_STEPS[move],
        )
        u.line("instruct", [item], [question])
        return
    if u.task in BASES:  # the scene's questions take turns, and so do their answers
        turn, k = divmod(u.index, len(BASES[u.task]))
        scene, base = answered_scene(u, BASES[u.task][k], turn)
        question = in_other_words(u, base, turn)
    else:
        scene = u.scene(u.rng.choice(range(1, 6)))
        question = both_attributes(u.task, u.rng.choice(scene.things))
    u.line("instruct", [u.scene_picture(scene)], [question])
