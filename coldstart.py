r"""The cold start: fine-tuning that teaches five kinds of answer and the switches between them (arXiv 2507.01949, 4.2.1).

    python coldstart.py                                     toy, from runs/toy/mpo/model
    python coldstart.py --size tiny --data data/tiny
    torchrun --nproc_per_node=8 coldstart.py --size 8b --data mydata

    kind           after the question   the answer
    thinking       /think               <think>steps, the answer is X</think><answer>\boxed{X}</answer>
    non-thinking   /no_think            X
    auto-think     nothing, /auto_think <analysis>.. so /think.</analysis>, then that mode's
    with images    /agentic_think       <think>step <tool_call>crop(..)</tool_call><sandbox_output>picture</sandbox_output> step
                                        </think><answer>\boxed{X}</answer>; what the tool wrote has no loss
    video          /think, /no_think    each clip once with all its frames and once with half of them

--data's train/questions.jsonl, detail.jsonl and instruct.jsonl give single questions whose meta holds the answer and the true
"steps". As in the report, several chains are sampled for each, chains with a wrong step or result are dropped, and of the rest
the most travelled is kept. The chains come from `teacher`, a program that knows the steps and errs on purpose: at this size
no other model could give them.

Two passes. The first teaches all but auto-think. Then its model answers questions in each mode, and where thinking is right
more often than a plain answer, auto-think is taught to think, with tools where those are right most often: measured, not told
by the task's name. The second pass goes on with all five kinds.

The model is left in runs/<size>/coldstart/model, the conversations in runs/<size>/coldstart-modes/data, to be read.
"""
import json
import random
import time
from collections import Counter
from pathlib import Path

import sandbox
import trainer
from data import MediaError, Processor, adopt, media_of, pictures_of, switch, text_lines, write_lines
from evaluate import phase_score
from generate import Generator, longest_answer, rollout
from model import KeyeVL
from rewards import MODES, parse, verify
from sft import finetune, question_pool
from toyworld import look_box

# ours, every number. steps: of both passes; pool: questions that are turned into conversations; asked: of these, those whose
# difficulty is measured; kept: lines of each file of KEEP, times its share
PLAN = {
    "toy": dict(pack=4096, packs=1, steps=(600, 400), lr=1e-3, muon=2, pool=10_000, asked=3000, kept=3000),
    "tiny": dict(pack=16384, packs=1, steps=(400, 300), lr=5e-4, muon=2, pool=12_000, asked=2000, kept=6000),
    "small": dict(pack=16384, packs=4, steps=(1000, 500), lr=3e-4, muon=2, pool=30_000, asked=6000, kept=10_000),
    **{size: dict(pack=8192, packs=64, steps=(1500, 500), lr=1e-5, muon=0, pool=300_000, asked=20_000, kept=100_000)
       for size in ("0.6b", "1.7b", "4b", "8b")},
}
# Keye mixes 230k, 330k, 20k, 100k and 104k; ours: more auto-think, as the toy sees few samples of anything
MIX = {"think": 4, "no_think": 2, "agentic_think": 2.5, "video": 1, "turns": 0.5, "keep": 4}
MIX_AUTO = MIX | {"auto_think": 5}
# shares of pre-training's lines, asked with /no_think: without them a small model forgets to see (and to copy and sort)
KEEP = {"vqa": 1, "caption": 1, "video": 1, "grounding": 0.3, "text": 0.3}
GAIN = 0.08  # what thinking must add to the share of right answers to be worth its tokens
OWN = 0.25  # weight of a question's own one answer in that share, beside those to all questions of its kind
CHAINS, SLIP, SKIP, DETOUR = 8, 0.3, 0.2, 0.3  # chains per question; how often one has a wrong, a missing, a needless step
# Keye's analysis ends "Therefore, /no_think mode is more appropriate."; ours is a telegram, as the toy's thinking is short too
ANALYSIS = {"no_think": "Easy /no_think.", "think": "Several steps /think.", "agentic_think": "Too small /agentic_think."}

# ---------------------------------------------------------------------------------------------------------------------
# chains of thought


def teacher(steps: list[str], rng: random.Random) -> tuple[list[str], bool]:
    """One chain over the true steps, with a teacher's errors, and whether it came to the right result."""
    path, right = list(steps), True
    if rng.random() < SLIP:
        at = rng.randrange(len(path))
        words, other = path[at].split(" "), rng.choice(steps).split(" ")
        words[rng.randrange(len(words))] = str(rng.randint(0, 9)) if rng.random() < 0.5 else rng.choice(other)
        right = path[at] == " ".join(words) or rng.random() < 0.3  # a wrong step may lead to a right result by chance
        path[at] = " ".join(words)
    if rng.random() < SKIP and len(path) > 1:
        del path[rng.randrange(len(path))]
        right &= rng.random() < 0.5
    if rng.random() < DETOUR:
        at = rng.randrange(len(path))
        path.insert(at, path[at])
    return path, right


def travelled(steps: list[str], rng: random.Random) -> list[str] | None:
    """Of several chains the most travelled whose steps and result hold; None where none does."""
    chains = [teacher(steps, rng) for _ in range(CHAINS)]
    sound = [tuple(path) for path, right in chains if right and set(path) <= set(steps)]
    paths, common = Counter(sound), Counter(step for path in sound for step in set(path))
    worth = lambda path: (paths[path], sum(common[step] for step in path) / len(path))
    return list(max(paths, key=worth)) if paths else None


def thinking(steps: list[str], reply: str) -> str:
    return "<think>" + "\n".join(steps) + f"\nthe answer is {reply}</think><answer>\\boxed{{{reply}}}</answer>"


def looking(steps: list[str], reply: str, meta: dict, pictures) -> list[dict] | None:
    """The thinking with one tool call in it, run in the sandbox; None where there is nothing to look at or to compute.
    pictures: a function that gives the question's."""
    if "place" in meta:
        code = f"crop{tuple(look_box(meta['place']))}\nzoom(2)"
        code += f"\nrotate({meta['rotate']})" if meta.get("rotate") else ""
        code += f"\ncontrast({meta['contrast']:g})" if meta.get("contrast", 1) != 1 else ""
        before, after = steps, [reply]
    elif meta["task"] == "arithmetic":
        code, before, after = f"print({steps[0].split(' = ')[0].split(' ')[0]} {meta['sign']} {meta['second']})", [], [reply]
    else:
        return None
    seen = sandbox.run(code, pictures())
    if not seen.ok:
        return None
    own = lambda text: {"type": "text", "text": text}
    return [own("<think>" + "".join(step + "\n" for step in before) + f"<tool_call>{code}</tool_call>"), *seen.content(),
            own("\n".join(after) + "</think><answer>\\boxed{" + reply + "}</answer>")]


# ---------------------------------------------------------------------------------------------------------------------
# the five kinds


def kinds(line: dict, root: Path, rng: random.Random) -> dict[str, list]:
    """A question -> {kind: conversations}, all but auto-think; with "mode", the switch behind the question."""
    *asked, last = line["messages"]
    reply, meta, out = last["content"], line["meta"], {}
    steps, clip = travelled(meta["steps"], rng), any(k == "video" for _, k in media_of(line))
    if steps is None:
        return out
    long, tool = thinking(steps, reply), None if clip else looking(steps, reply, meta, lambda: pictures_of({"messages": asked}, root))
    say = lambda mode, content, asked=asked: {
        "messages": [*switch(asked, mode), {"role": "assistant", "content": content}], "mode": mode}
    if clip:
        out["video"] = []
        for fps in (2.0, 1.0):  # Keye: 32 and 16 frames
            version = json.loads(json.dumps(asked))
            for item, kind in media_of({"messages": version}):
                if kind == "video" and isinstance(item["video"], list):  # frames: their own rate, or every other one
                    item |= {"video": item["video"][:: round(2 / fps)], "fps": item.get("fps", 2.0) * fps / 2}
                elif kind == "video":
                    item["fps"] = fps
            out["video"].append(say(*rng.choice([("think", long), ("no_think", reply)]), version))
        return out
    out["think"], out["no_think"] = [say("think", long)], [say("no_think", reply)]
    if tool:
        out["agentic_think"] = [say("agentic_think", tool)]
    elif rng.random() < 0.15:  # the switch allows tools, it does not ask for them
        out["agentic_think"] = [say("agentic_think", long)]
    return out


def analysed(line: dict, root: Path, rng: random.Random, mode: str) -> dict | None:
    """The question without a switch or with /auto_think, and the answer whose analysis names `mode`."""
    *asked, last = line["messages"]
    reply, steps = last["content"], travelled(line["meta"]["steps"], rng)
    then = reply if mode == "no_think" else steps and thinking(steps, reply)
    if mode == "agentic_think" and steps:
        then = looking(steps, reply, line["meta"], lambda: pictures_of({"messages": asked}, root)) or then
    if not then:
        return None
    said = f"<analysis>{ANALYSIS[mode]}</analysis>"
    said = said + then if isinstance(then, str) else [then[0] | {"text": said + then[0]["text"]}, *then[1:]]
    switched = rng.choice([None, "auto_think"])
    return {"messages": [*switch(asked, switched), {"role": "assistant", "content": said}], "mode": switched}


def retold(line: dict, modes: list) -> dict:
    """The line with other switches behind its question."""
    *asked, last = json.loads(json.dumps(line["messages"]))
    if line["mode"]:  # `switch` has put it behind the last text of the last question
        item = next(item for item in reversed(asked[-1]["content"]) if item["type"] == "text")
        item["text"] = item["text"].removesuffix(f"/{line['mode']}")
    for mode in modes:
        asked = switch(asked, mode)
    return {"messages": [*asked, last]}


def several_turns(single: list[dict], rng: random.Random) -> list[dict]:
    """Conversations of two questions, and questions with two switches: the last switch wins."""
    out = []
    for a, b in (rng.sample(single, 2) for _ in range(len(single) // 8)):
        if rng.random() < 0.5:
            out.append(retold(b, [a["mode"] or "think", b["mode"] or "auto_think"]))
        else:  # a second question with its own switch, or with none where the first one's holds for it too
            mode = None if a["mode"] == b["mode"] else b["mode"] or "auto_think"
            out.append({"messages": a["messages"] + retold(b, [mode])["messages"]})
    return out


def write(run, out: Path, lines: dict[str, list]):
    def each():
        for kind, content in lines.items() if run.main else ():
            write_lines(out / f"{kind}.jsonl", content)
    run.attempt(f"cannot write {out}", each)
    run.say("conversations: " + ", ".join(f"{kind} {len(content)}" for kind, content in lines.items()))


def build(run, pool, keep: list[Path], out: Path, plan: dict, seed: int):
    """Writes out/<kind>.jsonl of the first pass, with their media beside them. pool: (line, root of its media)."""
    lines = {kind: [] for kind in MIX}
    for i, (line, root) in enumerate(pool if run.main else ()):
        try:
            made = kinds(line, root, random.Random(f"{seed}/{i}")).items()
            made = {kind: [adopt(c, root, out) for c in conversations] for kind, conversations in made}
        except (MediaError, ValueError) as e:
            run.say(f"skipped: {e}")
            continue
        for kind, conversations in made.items():
            lines[kind] += conversations
    for path in keep if run.main else ():  # the switch in the first turn holds for all of them
        content, kept = text_lines(path), max(1, round(KEEP[path.stem] * plan["kept"]))
        for number, text in content[:: max(1, len(content) // kept)]:
            try:
                messages = json.loads(text)["messages"]
                first = next(i for i, m in enumerate(messages) if m["role"] == "user") + 1
                messages = [*switch(messages[:first], "no_think"), *messages[first:]]
                lines["keep"].append(adopt({"messages": messages}, path.parent, out))
            except (MediaError, ValueError, KeyError, TypeError, StopIteration) as e:
                run.say(f"skipped {path}:{number}: {e!r}")
    lines["turns"] = several_turns(lines["think"] + lines["no_think"], random.Random(f"{seed}/turns"))
    write(run, out, lines)


def kind_of(line: dict) -> tuple:
    """Questions of one task and level of difficulty are of one kind."""
    return line["meta"]["task"], str(line["meta"].get("difficulty", 1))


def measure(run, folder: Path, pool, plan: dict, seed: int) -> list[str | None]:
    """The mode in which the model in `folder` answers each question of the pool best, on all ranks, by `best_modes`."""
    generator, mine, kinds = Generator.from_pretrained(folder, run.device), {}, [kind_of(line) for line, _ in pool]
    seen, turns = Counter(), []
    for i, kind in enumerate(kinds):  # plan["asked"] questions, equally many of each kind as far as there are
        turns.append((seen[kind], i))
        seen[kind] += 1
    own = [i for _, i in sorted(turns)[: plan["asked"]]][run.rank :: run.world]
    for at in range(0, len(own), 256):
        jobs = [(i, *pool[i], mode) for i in own[at : at + 256] for mode in ANALYSIS
                if mode != "agentic_think" or "place" in pool[i][0]["meta"] or pool[i][0]["meta"]["task"] == "arithmetic"]
        # greedy, as answers are given later: sampling errs once a step, and would count against long answers
        rows = rollout(generator, [job[1:] for job in jobs], 1, longest_answer(generator.model.config), [str(seed)] * len(jobs), 0.0)
        for (i, line, _, mode), group in zip(jobs, rows):
            mine[i, mode] = [verify(parse(row["content"], mode, row["finished"]).final, line["meta"])[1] for row in group]
    right = {}
    for part in run.gather_objects(mine):
        right |= {key: answers for key, answers in part.items() if answers}
    return best_modes(right, kinds)


def best_modes(right: dict, kinds: list) -> list[str | None]:
    """right: {(question, mode): [0 or 1, ..]}, kinds of all questions -> each question's mode that is right most often, a
    plain answer unless another gains GAIN. One answer says little of a question: OWN of the share is its own, the rest, and
    all where it was not asked, is that of its kind. None: nothing of its kind was asked."""
    pooled, best = {}, []
    for (i, mode), answers in right.items():
        pooled.setdefault((kinds[i], mode), []).extend(answers)
    share = lambda answers: sum(answers) / len(answers)
    for i, kind in enumerate(kinds):
        known = {mode: share(pooled[kind, mode]) for mode in ANALYSIS if (kind, mode) in pooled}
        worth = {mode: (OWN * share(right[i, mode]) + (1 - OWN) * value if (i, mode) in right else value) - GAIN * (mode != "no_think")
                 for mode, value in known.items()}
        best.append(max(worth, key=worth.get, default=None))
    return best


def build_auto(run, folder: Path, pool, out: Path, plan: dict, seed: int):
    """Writes out/auto_think.jsonl, and the several turns again with auto-think among them."""
    best, lines, chosen = measure(run, folder, pool, plan, seed), {"auto_think": []}, Counter()
    for i, ((line, root), mode) in enumerate(zip(pool, best)) if run.main else ():
        try:
            if mode and (conversation := analysed(line, root, random.Random(f"{seed}/auto/{i}"), mode)):
                lines["auto_think"].append(adopt(conversation, root, out))
                chosen[line["meta"]["task"], mode != "no_think"] += 1
        except (MediaError, ValueError) as e:
            run.say(f"skipped: {e}")
    single = [json.loads(text) for kind in ("think", "no_think") for _, text in text_lines(out / f"{kind}.jsonl")]
    if run.main:
        lines["turns"] = several_turns(single + lines["auto_think"], random.Random(f"{seed}/turns"))
    write(run, out, lines)
    run.say("auto-think thinks on: " + ", ".join(f"{task} {chosen[task, True] / (chosen[task, True] + chosen[task, False]):.0%}"
                                                 for task in sorted({task for task, _ in chosen})))


def main(args):
    init, folder, began, plan = trainer.before(args, "mpo"), Path(args.data or f"data/{args.size}"), time.time(), PLAN[args.size]
    out = Path(args.out) / args.size / "coldstart-modes" / "data"
    pool = [(line, root) for line, root in question_pool(folder) if line["meta"].get("steps")]
    if not pool:
        raise SystemExit(f"no question in {folder / 'train'} has \"steps\" in its meta: nothing to think with")
    pool = random.Random(f"{args.seed}/pool").sample(pool, min(plan["pool"], len(pool)))
    if args.fresh:  # the second pass is nothing without the first
        (Path(args.out) / args.size / "coldstart" / "score.json").unlink(missing_ok=True)
    for number, stage in enumerate(("coldstart-modes", "coldstart")):
        run = trainer.start(args, stage)
        if not trainer.finished(run):
            marker, mix = run.folder / "data.done", MIX_AUTO if number else MIX
            if args.fresh or not marker.exists():
                out.mkdir(parents=True, exist_ok=True)
                if number == 0:
                    build(run, pool, [p for p in (folder / "train" / f"{name}.jsonl" for name in KEEP) if p.exists()], out, plan, args.seed)
                else:
                    build_auto(run, init, pool, out, plan, args.seed)
                run.attempt(f"cannot write {marker}", lambda: run.main and marker.touch())
            mixture = [(out / f"{kind}.jsonl", weight) for kind, weight in mix.items() if (out / f"{kind}.jsonl").stat().st_size]
            finetune(run, KeyeVL.from_pretrained(init), Processor.from_pretrained(init), mixture, plan,
                     args.steps or plan["steps"][number], args.seed)
            trainer.finish(run, phase_score(run, folder, args, MODES) if number else {})
            args.resume = False  # it was for the pass that had been interrupted
        init = run.folder / "model"
    run.main and print(f"the cold start took {time.time() - began:.0f} s; the model is in {init}", flush=True)


if __name__ == "__main__":
    main(trainer.phase_arguments(__doc__).parse_args())
