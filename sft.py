"""Supervised fine-tuning: answers to instructions, and to questions the model does not find easy (arXiv 2507.01949, 4.1.1).

    python sft.py                                           toy, from runs/toy/pretrain/model
    python sft.py --size tiny --data data/tiny
    torchrun --nproc_per_node=8 sft.py --size 8b --data mydata --init Keye-VL-8B-Preview

1. Difficulty filter: the start answers lines of --data's train/instruct.jsonl and questions.jsonl several times, as many
   lines as PLAN says. What is right every time, and in no more tokens than the reference, is easy and dropped (Keye:
   correctness and length).
2. Training on the rest among pre-training's own lines; only what the assistant says counts, its end of turn included.
3. The learning rate stays at its peak, and the last part of the steps anneals it to zero (Keye: +1 % on benchmarks).

The model is left in runs/<size>/sft/model, the kept lines in data/ beside it. The same command goes on after a kill.
"""
import json
import time
from pathlib import Path

import trainer
from data import Loader, MediaError, Processor, adopt, check_conversation, text_lines, write_lines
from evaluate import phase_score
from generate import Generator
from model import KeyeVL, training_flops
from rewards import verify

# ours, every number: Keye states none. asked: lines per file that the filter looks at; samples: answers to each
PLAN = {
    "toy": dict(pack=4096, packs=1, steps=200, lr=6e-4, muon=2, asked=1200, samples=3),
    "tiny": dict(pack=16384, packs=1, steps=200, lr=3e-4, muon=2, asked=6000, samples=2),
    "small": dict(pack=16384, packs=4, steps=800, lr=2e-4, muon=2, asked=6000, samples=4),
    **{size: dict(pack=8192, packs=64, steps=2000, lr=1e-5, muon=0, asked=100_000, samples=4)
       for size in ("0.6b", "1.7b", "4b", "8b")},
}
ADAM = dict(weight_decay=0.05, betas=(0.9, 0.95))
WARMUP, COOLDOWN = 0.05, 0.3  # shares of the steps
# weights by samples drawn; pre-training's lines keep what instructions do not ask for
MIX = {"instruct": 4, "questions": 2, "vqa": 2, "caption": 0.5, "video": 0.5, "grounding": 0.1, "text": 0.1}


def read_pool(path: Path, limit: int | None = None) -> list[dict]:
    """Lines of single questions with "meta" (answer and verifier; its task is by default the file's name): an even choice
    of at most `limit`. SystemExit names a line that is none."""
    lines = []
    for number, text in text_lines(path):
        try:
            line = json.loads(text)
            check_conversation(line)
            verify("", line["meta"])  # a truth that cannot be read is an error now
            roles = [m["role"] for m in line["messages"]]
            if roles[-1] != "assistant" or "user" not in roles:
                raise ValueError("a user's question and, last, the assistant's answer are expected")
            line["meta"].setdefault("task", path.stem)
            lines.append(line)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SystemExit(f"{path}:{number}: not a question with a known answer: {type(e).__name__}: {e}") from None
    return lines if not limit or len(lines) <= limit else [lines[i * len(lines) // limit] for i in range(limit)]


def question_pool(folder: Path) -> list[tuple[dict, Path]]:
    """Every question of folder/train/ questions.jsonl, detail.jsonl and instruct.jsonl, as far as these are there, with the
    folder of its media."""
    names = ["questions.jsonl", "detail.jsonl", "instruct.jsonl"]
    sources = [p for p in (folder / "train" / name for name in names) if p.exists()]
    if not sources:
        raise SystemExit(f"{folder / 'train'} has none of {', '.join(names)}: no question to ask")
    return [(line, path.parent) for path in sources for line in read_pool(path)]


def attempts(run, folder: Path, lines: list[dict], root: Path, samples: int, seed: int):
    """The model in `folder` answers each line `samples` times at temperature 1: [[(text, outcome, right, tokens, ended), ..]
    or None where its media cannot be read], in order, on all ranks; each rank asks a share of the lines."""
    generator, mine, told = Generator.from_pretrained(folder, run.device), {}, {}
    processor = generator.processor
    ready, patches = [], 0
    for i in range(run.rank, len(lines), run.world):
        line = lines[i]
        try:
            prompt = processor({"messages": line["messages"][:-1]}, root, generate=True)
            ready.append((i, prompt, 2 * len(processor.tokenizer.encode(str(line["messages"][-1]["content"]), True)) + 4))
            patches += len(prompt["patches"])
        except (MediaError, ValueError) as e:
            run.say(f"skipped: {e}")
        # many at once, as the last answers of each batch are written alone; few enough to hold their pixels
        if ready and (len(ready) == 2048 or patches > 1 << 20 or i + run.world >= len(lines)):
            jobs = [(i, p, room, f"{seed}/{i}/{k}") for i, p, room in ready for k in range(samples)]
            rows = generator.sample([j[1] for j in jobs], [j[2] for j in jobs], 1.0, 0, 1.0, [j[3] for j in jobs])
            for (i, *_), row in zip(jobs, rows):
                text = processor.tokenizer.decode(row["ids"], skip_special=True)
                mine.setdefault(i, []).append((text, *verify(text, lines[i]["meta"]), len(row["ids"]), row["finished"]))
            ready, patches = [], 0
    for part in run.gather_objects(mine):
        told |= part
    return [told.get(i) for i in range(len(lines))]


def keep_hard(run, init: Path, processor, source: Path, target: Path, plan: dict, seed: int):
    """Writes the lines of `source` that are not easy for the model in `init` to `target`, their media linked beside it."""
    lines = read_pool(source, plan["asked"])
    told = attempts(run, init, lines, source.parent, plan["samples"], seed)
    mean = lambda answers, k: sum(a[k] for a in answers) / len(answers)
    told = [got and (mean(got, 2), mean(got, 3)) for got in told]  # share right, tokens
    length = lambda line: len(processor.tokenizer.encode(str(line["messages"][-1]["content"]), True)) + 1  # and its end
    kept = [(line, got) for line, got in zip(lines, told) if got and not (got[0] == 1 and got[1] <= length(line))]
    run.say(f"{source.name}: {sum(g[0] for g in told if g) / max(1, sum(g is not None for g in told)):.0%} of the answers "
            f"are right; {len(kept)} of {len(lines)} lines are not easy and stay")
    run.attempt(f"cannot write {target}", lambda: run.main and write_lines(
        target, (adopt(line, source.parent, target.parent) | {"right": got[0]} for line, got in kept)))
    return len(kept)


def finetune(run, model, processor, mixture, plan: dict, steps: int, seed: int):
    """Next-token training on the assistant's turns of packed conversations; leaves run.folder/model."""
    cfg = model.config
    model.decoder.activation_checkpointing = cfg.hidden_size >= 2048
    model = trainer.shard(model, run)
    opt = trainer.adamw(model, dict.fromkeys(("vit", "projector", "decoder"), plan["lr"]), muon=plan["muon"], **ADAM)
    begin = trainer.resume(run, model, opt)

    def flops(text, grids):  # of one sample, so that ranks get equal work
        return training_flops(cfg, [text + sum(t * h * w for t, h, w in grids) // 4], grids)

    loader = Loader(mixture, processor, *trainer.share(plan, run.world), run.rank, run.world, seed, flops=flops,
                    workers=run.args.workers, state=begin["loader"])
    for step, (batches, info) in zip(range(begin["step"], steps), loader):
        trainer.set_lr(opt, trainer.schedule(step, steps, int(WARMUP * steps), "wsd", 0.0, COOLDOWN))
        loss, n = trainer.accumulate(run, model, batches)  # mean over all target tokens of all ranks and micro-batches
        norm = trainer.clip(model, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        work = [(b["segments"].diff().tolist(), b["grids"].tolist()) for b in batches]
        run.log(step, steps, loss=loss, norm=norm, lr=trainer.lr(opt), targets=n,
                tokens=sum(sum(lengths) for lengths, _ in work), visual_tokens=sum(len(b["patches"]) for b in batches) // 4,
                flops=sum(training_flops(cfg, *w) for w in work), skipped=run.sum(sum(info["skipped"].values())))
        trainer.save_if_due(run, step + 1, steps, model, opt, info["state"])
    trainer.export(run, trainer.full_state(run, model), cfg, processor, run.folder / "model")


def main(args):
    init, folder, began = trainer.before(args, "pretrain"), Path(args.data or f"data/{args.size}"), time.time()
    run, plan = trainer.start(args, "sft"), PLAN[args.size]
    if trainer.finished(run):
        return
    processor, mixture = Processor.from_pretrained(init), []
    for path in sorted((folder / "train").glob("*.jsonl")):
        weight = MIX.get(path.stem, 0)
        if path.stem in ("instruct", "questions"):
            kept = run.folder / "data" / path.name
            if args.fresh or not kept.exists():
                keep_hard(run, init, processor, path, kept, plan, args.seed)
            path, weight = kept, weight * (kept.stat().st_size > 0)
        if weight:
            mixture.append((path, weight))
    if not mixture:
        raise SystemExit(f"sft needs one of {', '.join(MIX)}.jsonl in {folder / 'train'}")
    finetune(run, KeyeVL.from_pretrained(init), processor, mixture, plan, args.steps or plan["steps"], args.seed)
    trainer.finish(run, phase_score(run, folder, args, [None]))
    run.main and print(f"SFT took {time.time() - began:.0f} s; the model is in {run.folder / 'model'}", flush=True)


if __name__ == "__main__":
    main(trainer.phase_arguments(__doc__).parse_args())
