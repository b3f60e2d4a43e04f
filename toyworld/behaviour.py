"""Preferences about behaviour: pairs of answers to one picture, and questions that show the effect.

    absent    a question whose premise is false: better say so than name what is not there
    present   its partner, whose premise is true: better answer than deny it
    invented  captions: better what is there than one thing less, more or another
    form      the same answer: better in the form that was asked for
    stops     better an answer that ends than one that comes again and again

preferences.jsonl holds the pairs: of train to learn from, of heldout to measure. Of the first two
premise.jsonl asks the answer itself, in two categories: who denies everything is right on all of
one and on none of the other. SFT does not read it: preferences are the first to teach denial. The
cold start thinks about such questions, and reinforcement asks them: a model that learns to think,
or is rewarded, only about what is there would never deny again.
"""

from dataclasses import replace

from toyworld.drawing import COLOUR_NAMES, PLACES, SHAPES
from toyworld.instructions import in_sentence
from toyworld.pictures import attribute_question, look_at_all
from toyworld.unit import CHOICES, Unit, ask, sentence

# What a false premise is about -> the attribute that is asked for
PREMISES = {"shape": "colour", "colour": "shape", "name": "place", "place": "colour"}
QUESTIONS = {
    "shape": "What colour is the {}?",
    "colour": "What shape is the {}?",
    "name": "Where is the {}?",
    "place": "What colour is the {}?",
}


def called(t, premise):
    """The thing as a question calls it that knows its shape, colour, name or place alone."""
    forms = {
        "shape": t.shape,
        "colour": f"{t.colour} object",
        "name": t.name,
        "place": f"object at the {t.where}",
    }
    return forms[premise]


def attribute(t, asked):
    return t.where if asked == "place" else getattr(t, asked)


def stranger(rng, scene):
    """A thing like one of the scene's, but for one attribute; so it may still be one of them."""
    values = {"colour": COLOUR_NAMES, "shape": SHAPES, "place": range(len(PLACES))}
    what = rng.choice(list(values))
    return replace(rng.choice(scene.things), **{what: rng.choice(values[what])})


def absent_and_present(rng, scene, premise):
    """A thing that the scene has none like, as the premise goes, and one that it has one such of.

    None where one of them is not to be found.
    """
    names = [called(t, premise) for t in scene.things]
    known = [t for t in scene.things if names.count(called(t, premise)) == 1]
    strangers = [stranger(rng, scene) for _ in range(20)]
    unknown = [t for t in strangers if called(t, premise) not in names]
    return (unknown[0], rng.choice(known)) if known and unknown else None


def denial(what):
    return f"There is no {what}."


def premise_pairs(u, item, scene, premise, things, asks):
    """A pair about each of some things, {"absent": .., "present": ..}. asks: and its question."""
    asked = PREMISES[premise]
    for kind, t in things.items():
        name = called(t, premise)
        task = f"{kind}_{premise}"
        text = QUESTIONS[premise].format(name)
        guess = attribute(u.rng.choice(scene.things), asked)  # of something that is there
        answers = [denial(name), guess] if kind == "absent" else [attribute(t, asked), denial(name)]
        u.pair(item, kind, text, *answers)
        if asks:
            choices = CHOICES["position" if asked == "place" else asked]
            choices = choices if kind == "present" else None
            steps = look_at_all(scene, t.seen if kind == "present" else f"no {name}")
            how = {"choices": choices, "category": kind, "steps": steps}
            u.line("premise", [item], [ask(task, text, answers[0], **how)])


def wrong_caption(rng, scene):
    """The scene's caption with one thing less, one more, or another in its place."""
    truth = caption = sentence(scene.things)
    while caption == truth:
        t = stranger(rng, scene)
        things = [thing for thing in scene.things if thing.place != t.place]
        if rng.random() < 2 / 3:
            things = sorted([*things, t], key=lambda thing: thing.place)
        caption = sentence(things)
    return caption


def form_pair(u, item, scene):
    q = attribute_question(u.rng, scene, u.rng.choice(["colour", "shape"]))
    forms = {
        "": q.reply,
        " Answer in a sentence.": in_sentence(q),
        " Answer in capitals.": q.reply.upper(),
    }
    asked, other = u.rng.sample(list(forms), 2)
    u.pair(item, "form", q.text + asked, forms[asked], forms[other])


def stop_pair(u, item, scene):
    """An answer, and the same in a loop that a limit has cut off."""
    if u.rng.random() < 0.5:
        text, reply = "Describe the picture.", sentence(scene.things)
    else:
        q = attribute_question(u.rng, scene, u.rng.choice(["colour", "shape"]))
        text, reply = q.text, q.reply
    loop = " ".join([reply] * u.rng.randint(2, 4))
    u.pair(item, "stops", text, reply, loop, rejected_ended=False)


def invented_pair(u, item, scene):
    truth = sentence(scene.things)
    u.pair(item, "invented", "Describe the picture.", truth, wrong_caption(u.rng, scene))


OTHERS = [invented_pair, form_pair, stop_pair]


def behaviour_unit(u: Unit):
    """A picture with a pair of each kind.

    In train two false premises, a true one, and one of the last three kinds: SFT leaves a model
    that does those right, and takes every premise for true.
    """
    premises = list(PREMISES)
    asked = [premises[(u.index + k) % len(premises)] for k in range(1 if u.heldout else 2)]
    found = [None]
    while None in found:
        scene = u.scene(u.rng.randint(2, 5))
        found = [absent_and_present(u.rng, scene, premise) for premise in asked]
    item = u.scene_picture(scene)
    absent, present = found[0]
    both = {"absent": absent, "present": present}
    # Asked are as many false premises as true ones, a tenth of what the cold start thinks about.
    # After a third of it a model that thinks denied half as often (docs/results.md, one seed).
    premise_pairs(u, item, scene, asked[0], both, asks=True)
    if not u.heldout:
        premise_pairs(u, item, scene, asked[1], {"absent": found[1][0]}, asks=False)
    for pair in OTHERS if u.heldout else [OTHERS[u.index % len(OTHERS)]]:
        pair(u, item, scene)
