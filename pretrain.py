"""Pre-training: from pixels and fresh (or released) weights to a merged Keye-VL, stage by stage (arXiv 2507.01949, 2.1, 3.2).

    python pretrain.py                                      toy, all stages, on whatever device there is
    python pretrain.py --size tiny --data data/tiny
    torchrun --nproc_per_node=2 pretrain.py --size toy      the same code on N processes (FSDP2)
    torchrun --nproc_per_node=8 pretrain.py --size 8b --data mydata --init-llm Qwen3-8B --init-vit siglip-so400m-patch14-384
    python pretrain.py --stage 2,3 --init some/model        some of the stages, from any folder in the official layout

    stage  what learns        from what                                   loss
    text   decoder            pure text, only where no --init-llm is given   next token
    0      ViT + text tower   picture-caption pairs                       SigLIP's pairwise sigmoid
    1      projector          captions                                    next token
    2      everything         all categories                              next token
    3      everything         three annealing mixtures, one run each      next token, learning rate to zero
    merge  -                  the three annealed models                   their weights are averaged

--data FOLDER holds train/*.jsonl (conversations; caption, vqa, ocr, grounding, interleaved, video, text and pairs are the
names the mixtures below know, any other file counts with weight 1) and, optionally, heldout/*.jsonl with one question a
line. After every stage a held-out score is printed and kept in runs/<size>/pretrain-<stage>/score.json; the merged model
is runs/<size>/pretrain/model. The same command goes on where a killed run stopped; finished stages are passed over.
"""

import argparse
import json
import math
import shutil
import string
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

import model as keye
import trainer
from data import BUDGETS, Loader, Processor
from evaluate import at_once, evaluate, read_questions, scoreboard
from model import PRESETS, KeyeVL, training_flops
from vit import PoolingHead, TextTower

# ---------------------------------------------------------------------------------------------------------------------
# defaults by size. # ours, every number: Keye states no learning rate, batch, sequence length, schedule or step count.

STAGES = ["text", "0", "1", "2", "3"]
ADAM = dict(weight_decay=0.05, betas=(0.9, 0.95))
PLAN = {
    # pack: tokens of one micro-batch; packs: micro-batches of one step over all ranks; steps and peak lr by stage
    "toy": dict(pack=4096, packs=1, muon=2, steps={"text": 30, "0": 60, "1": 15, "2": 1800, "3": 60},
                lr={"text": 2e-3, "0": 2e-3, "1": 2e-3, "2": 2e-3, "3": 4e-4}),
    "tiny": dict(pack=16384, packs=1, muon=2, steps={"text": 60, "0": 150, "1": 30, "2": 1200, "3": 80},
                 lr={"text": 1e-3, "0": 1e-3, "1": 1e-3, "2": 1e-3, "3": 2e-4}),
    "small": dict(pack=16384, packs=4, muon=2, steps={"text": 500, "0": 1000, "1": 200, "2": 5000, "3": 1000},
                  lr={"text": 6e-4, "0": 6e-4, "1": 1e-3, "2": 6e-4, "3": 1.2e-4}),
    # released weights are moved gently; only the projector is new. 8,192 tokens is what Keye-VL 1.5 states for stages 1-2.
    **{size: dict(pack=8192, packs=64, muon=0, steps={"text": 1000, "0": 10000, "1": 2000, "2": 20000, "3": 4000},
                  lr={"text": 1e-5, "0": 1e-5, "1": 1e-3, "2": 2e-5, "3": 1e-5}) for size in ("0.6b", "1.7b", "4b", "8b")},
}
WARMUP, FLOOR = 0.05, 0.2  # shares of a stage's steps, and of its peak rate at its end; stage 3 goes on from there to 0

LATER = {"questions", "instruct"}  # files of post-training
MIX = {  # weights of the files in --data's train folder, by samples drawn
    "text": {"text": 1},
    "0": {"pairs": 1},
    "1": {"caption": 1},
    "2": {"caption": 3, "vqa": 8, "video": 3, "grounding": 1, "interleaved": 0.5, "ocr": 0.5, "reasoning": 0.5, "text": 0.3, "detail": 0.1},
    # Captions teach to see and questions to find, which takes longest. The toy cannot learn the rest in minutes, and with
    # more of it, long uncertain answers fill the gradient, and the finding sets in hundreds of steps later.
    "2-toy": {"caption": 4, "vqa": 8, "video": 1.5, "grounding": 0.1, "interleaved": 0.1, "reasoning": 0.1, "ocr": 0.05, "text": 0.05, "detail": 0.02},
    # Keye averages models annealed on different mixtures and does not name them (section 3.2)
    "3-even": {"caption": 2, "vqa": 8, "ocr": 0.5, "grounding": 1, "interleaved": 0.5, "video": 2, "text": 0.3, "reasoning": 0.3, "detail": 0.1},
    "3-picture": {"caption": 3, "vqa": 10, "ocr": 0.5, "grounding": 0.5, "interleaved": 0.3, "video": 1, "text": 0.1, "reasoning": 0.3, "detail": 0.1},
    "3-video": {"caption": 1, "vqa": 8, "ocr": 0.3, "grounding": 0.5, "interleaved": 0.5, "video": 3, "text": 0.3, "reasoning": 0.5, "detail": 0.1},
}


def mixture(folder: Path, stage: str, size: str = "") -> list[tuple[Path, float]]:
    """Files of folder/train and their weights for a stage; names that no mixture knows count 1 from stage 2 on."""
    files = {p.stem: p for p in sorted((folder / "train").glob("*.jsonl"))}
    known, weights = set().union(LATER, *MIX.values()), MIX.get(f"{stage}-{size}", MIX[stage])
    mix = [(p, weights.get(name, 1 if stage[0] in "23" and name not in known else 0)) for name, p in files.items()]
    mix = [(p, w) for p, w in mix if w]
    if not mix:
        raise SystemExit(f"stage {stage} needs one of {', '.join(MIX[stage])}.jsonl in {folder / 'train'}, which has "
                         f"{', '.join(files) or 'no .jsonl file'}. `python toyworld.py --out {folder}` draws a toy world.")
    return mix


# ---------------------------------------------------------------------------------------------------------------------
# stage 0: pictures and captions, SigLIP's loss


class SigLIP(nn.Module):
    """The ViT with its pooling head, a text tower, and the two numbers of the sigmoid loss."""

    def __init__(self, vit, text):
        super().__init__()
        self.vit, self.text = vit, text
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))  # SigLIP's starts: t = 10, b = -10
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, patches, grids, tokens):
        """-> unit vectors of the pictures (B, C) and of the captions (B, C), scale and bias of their products."""
        images = F.normalize(self.vit.pool(self.vit(patches, grids), grids).float(), dim=-1)
        texts = F.normalize(self.text(tokens).float(), dim=-1)
        return images, texts, self.logit_scale.exp(), self.logit_bias + 0


class Pass(torch.autograd.Function):
    """Hand a tensor to the next rank of the ring; its gradient comes back the other way."""

    @staticmethod
    def forward(ctx, x):
        return _shift(x, 1)

    @staticmethod
    def backward(ctx, grad):
        return _shift(grad, -1)


def _shift(x, by):
    rank, world, got = dist.get_rank(), dist.get_world_size(), torch.empty_like(x)
    ops = [dist.P2POp(dist.isend, x.contiguous(), (rank + by) % world), dist.P2POp(dist.irecv, got, (rank - by) % world)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return got


def sigmoid_loss(images, texts, scale, bias, room: int, world: int = 1):
    """SigLIP's loss (arXiv 2303.15343, eq. 1), summed over this rank's pictures against the captions of all ranks.

    -log sigmoid(z (t x.y + b)) with z = 1 for a pair and -1 for any other combination. images, texts (B, C) unit vectors.
    Captions travel around the ring, so a rank holds B x room logits at a time, never all pairs; `room` is the largest B
    of any rank. Divide by the number of pairs on all ranks.
    """
    texts = F.pad(texts, (0, 0, 0, room - len(texts)))
    real = torch.arange(room, device=texts.device)[None] < len(images)  # (1, room): padding has no part in the loss
    pair = torch.eye(len(images), room, device=texts.device) * 2 - 1
    total = 0
    for hop in range(world):
        logits = scale * images @ texts.T + bias  # (B, room)
        total = total - (F.logsigmoid(pair * logits) * real).sum()
        if hop < world - 1:
            texts, real, pair = Pass.apply(texts), _shift(real.float(), 1), -torch.ones_like(pair)
    return total


class Unigram:
    """SigLIP's own text tokenizer, read from its tokenizer.json: the likeliest split into pieces, by Viterbi."""

    def __init__(self, path: Path, context: int):
        spec = json.loads(path.read_text())
        if spec["model"]["type"] != "Unigram":
            raise ValueError(f"{path}: a Unigram model was expected, not {spec['model']['type']}")
        self.pieces = {piece: (i, score) for i, (piece, score) in enumerate(spec["model"]["vocab"])}
        self.unknown, self.context = spec["model"]["unk_id"], context
        self.longest = max(map(len, self.pieces))
        self.worst = min(score for _, score in self.pieces.values()) - 10  # sentencepiece's penalty for an unknown letter

    def __call__(self, text: str) -> list[int]:
        """Lower case, no ASCII punctuation, as SigLIP was trained; </s> (1) at the end and as padding."""
        text = "".join("▁" + word for word in text.lower().translate(str.maketrans("", "", string.punctuation)).split())
        best = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(text)  # score, where the last piece begins, its id
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - self.longest), end):
                i, score = self.pieces.get(text[start:end], (self.unknown, self.worst) if start == end - 1 else (0, -math.inf))
                if best[start][0] + score > best[end][0]:
                    best[end] = (best[start][0] + score, start, i)
        ids, end = [], len(text)
        while end:
            if best[end][2] != self.unknown or ids[:1] != [self.unknown]:  # a run of unknown letters is one
                ids.insert(0, best[end][2])
            end = best[end][1]
        return (ids[: self.context - 1] + [1] * self.context)[: self.context]


def captions(batch, context: int, pad: int, retokenize=None, decode=None):
    """Caption ids (S, context) of a pack whose samples are one picture and its caption: the supervised tokens."""
    rows, ends = [], batch["segments"].tolist()
    if len(batch["grids"]) != len(ends) - 1 or batch["grids"][:, 0].gt(1).any():
        raise ValueError(f"stage 0 needs one picture in every sample, but a pack of {len(ends) - 1} has "
                         f"{len(batch['grids'])} pictures and clips; look at the files of the stage's mixture")
    for a, b in zip(ends, ends[1:]):
        ids = batch["labels"][a:b]
        ids = ids[ids != -100].tolist()
        rows.append(retokenize(decode(ids[:-1])) if retokenize else (ids[:context] + [pad] * context)[:context])
    return torch.tensor(rows)


def contrastive(args, stage, start: KeyeVL, processor, folder: Path, steps: int, plan: dict):
    """Stage 0: pictures and captions that belong together get like vectors. Returns the run's folder."""
    run = trainer.start(args, f"pretrain-{stage}")
    cfg = start.config
    context, pad, retokenize, vocab = 64, cfg.bos_token_id, None, cfg.vocab_size  # 64 is SigLIP's own
    if args.init_vit:
        spec = keye.read_config(args.init_vit)["text_config"]
        context, vocab = spec.get("max_position_embeddings", 64), spec.get("vocab_size", 32000)
        retokenize = Unigram(Path(args.init_vit) / "tokenizer.json", context)
    siglip = SigLIP(start.vit, TextTower(cfg.vision, vocab, context))  # as deep and wide as the ViT, as SigLIP's is
    keye.init_weights(siglip.text, cfg.vision.num_hidden_layers)
    if siglip.vit.head is None:
        siglip.vit.head = PoolingHead(cfg.vision)
        keye.init_weights(siglip.vit.head, cfg.vision.num_hidden_layers)
    if args.init_vit:
        keye.load(siglip, args.init_vit, keye.SIGLIP_NAMES)
    siglip = trainer.shard(siglip, run)
    rate = plan["lr"]["0"]
    # Whether Keye trains the text tower is not stated; ours: with the ViT's rate
    opt = trainer.adamw(siglip, {"vit": rate, "text": rate, "logit_scale": rate, "logit_bias": rate}, muon=plan["muon"], **ADAM)
    begin = trainer.resume(run, siglip, opt)
    loader = Loader(mixture(folder, "0", args.size), processor, *trainer.share(plan, run.world), run.rank, run.world, args.seed,
                    workers=args.workers, state=begin["loader"])

    def encode(batch):
        ids = captions(batch, context, pad, retokenize, processor.tokenizer.decode).to(run.device)
        batch = run.to(batch)
        with run.autocast():
            return siglip(batch["patches"], batch["grids"], ids)

    for step, (batches, info) in zip(range(begin["step"], steps), loader):
        trainer.set_lr(opt, trainer.schedule(step, steps, int(WARMUP * steps), "linear", FLOOR))
        sizes = run.gather([len(b["grids"]) for b in batches])  # pictures of each micro-batch of each rank
        pairs, total = sum(map(sum, sizes)), 0.0
        for i, batch in enumerate(batches):
            loss = sigmoid_loss(*encode(batch), int(max(s[i] for s in sizes)), run.world) / pairs
            trainer.backward(siglip, loss, last=i == len(batches) - 1)
            total += loss.detach()
        norm = trainer.clip(siglip, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        grids = [g for b in batches for g in b["grids"].tolist()]
        seen = sum(len(b["patches"]) for b in batches) // 4
        run.log(step, steps, loss=run.sum(total), norm=norm, lr=trainer.lr(opt), pairs=pairs, tokens=len(grids) * context,
                visual_tokens=seen, flops=2 * training_flops(cfg, [], grids), skipped=run.sum(sum(info["skipped"].values())))
        trainer.save_if_due(run, step + 1, steps, siglip, opt, info["state"])

    held, score = folder / "heldout" / "caption.jsonl", None
    if held.exists():
        score = retrieval(encode, Loader([(held, 1)], processor, plan["pack"], run.world, run.rank, run.world, args.seed), run)
        run.say(f"stage 0: the right caption among {score['among']:.0f} for {score['accuracy']:.1%} of {score['n']:.0f} "
                f"held-out pictures (chance {1 / score['among']:.1%})")
    state = {k: v for k, v in start.state_dict().items() if not k.startswith("vit.")}  # untouched
    state |= {k: v for k, v in trainer.full_state(run, siglip).items() if k.startswith("vit.") and "vit.head." not in k}
    trainer.export(run, state, cfg, processor, run.folder / "model")  # the pooling head has done its work
    trainer.finish(run, score)


@torch.no_grad()
def retrieval(encode, loader, run, packs: int = 4):
    """Share of held-out pictures whose own caption is the nearest among those of the same pack."""
    right = n = among = 0
    for _, (batches, _) in zip(range(packs), loader):
        images, texts, _, _ = encode(batches[0])
        like = images @ texts.T
        right += int((like.diagonal() >= like.max(1).values - 1e-5).sum())  # equal captions are equally right
        n, among = n + len(images), among + 1
    rows = run.gather([right, n, among])
    right, n, among = (sum(r[i] for r in rows) for i in range(3))
    return {"accuracy": right / n, "n": n, "among": n / among}


# ---------------------------------------------------------------------------------------------------------------------
# text and stages 1, 2, 3: the next token


def next_token(args, stage, model: KeyeVL, processor, folder: Path, steps: int, plan: dict):
    """One stage of next-token training on packed conversations. Leaves runs/<size>/pretrain-<stage>/model."""
    run = trainer.start(args, f"pretrain-{stage}")
    cfg, kind = model.config, stage.split("-")[0]
    model.decoder.activation_checkpointing = cfg.hidden_size >= 2048  # below, memory is not what limits
    model = trainer.shard(model, run)
    rate = plan["lr"][kind]
    learns = {"text": ("decoder",), "1": ("projector",)}.get(kind, ("vit", "projector", "decoder"))
    opt = trainer.adamw(model, dict.fromkeys(learns, rate), muon=plan["muon"], **ADAM)
    begin = trainer.resume(run, model, opt)

    def flops(text, grids):  # of one sample, so that ranks get equal work (section 5)
        return training_flops(cfg, [text + sum(t * h * w for t, h, w in grids) // 4], grids)

    loader = Loader(mixture(folder, stage, args.size), processor, *trainer.share(plan, run.world), run.rank, run.world, args.seed,
                    flops=flops, workers=args.workers, state=begin["loader"])
    warmup = 0 if kind == "3" else int(WARMUP * steps)
    for step, (batches, info) in zip(range(begin["step"], steps), loader):
        trainer.set_lr(opt, trainer.schedule(step, steps, warmup, "linear", 0.0 if kind == "3" else FLOOR))
        loss, n = trainer.accumulate(run, model, batches)  # mean over all target tokens of all ranks and micro-batches
        norm = trainer.clip(model, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        work = [(b["segments"].diff().tolist(), b["grids"].tolist()) for b in batches]
        run.log(step, steps, loss=loss, norm=norm, lr=trainer.lr(opt), targets=n,
                tokens=sum(sum(lengths) for lengths, _ in work), visual_tokens=sum(len(b["patches"]) for b in batches) // 4,
                flops=sum(training_flops(cfg, *w, vit="vit" in learns, decoder="decoder" in learns) for w in work),
                skipped=run.sum(sum(info["skipped"].values())))
        trainer.save_if_due(run, step + 1, steps, model, opt, info["state"])
    trainer.export(run, trainer.full_state(run, model), cfg, processor, run.folder / "model")
    trainer.finish(run, benchmark(run, run.folder / "model", folder, args) if run.main and kind != "text" else None)


def benchmark(run, model_folder: Path, folder: Path, args, blind=False):
    """Held-out score of a saved model, and a page of its answers beside it (rank 0). blind: also without its pictures."""
    if not (folder / "heldout").is_dir():
        return run.say(f"{folder}/heldout does not exist: no held-out score")
    model = KeyeVL.from_pretrained(model_folder, device=run.device)
    with run.autocast():
        score = evaluate(model, Processor.from_pretrained(model_folder), folder / "heldout", args.eval_limit, blind, at_once(run))
    if not blind:  # the merged model stands in a table with its parents
        run.say(scoreboard([(run.stage, score)], short=True))
    (run.folder / "samples.md").write_text(f"# {run.stage}: answers to held-out questions\n\n" + "".join(
        f"- [{e['task']}] {e['question']} **{e['output']}** (truth: {e['answer']})\n" for e in score.pop("examples")))
    return score


# ---------------------------------------------------------------------------------------------------------------------
# merging


@torch.no_grad()
def merge(parents: list[Path], out: Path) -> None:
    """Plain average of the parents' weights, tensor by tensor in fp32 (section 3.2). All must have the same tensors."""
    where = [keye.weight_files(p) for p in parents]
    if any(w.keys() != where[0].keys() for w in where):
        odd = set.union(*(set(w) for w in where)) - set.intersection(*(set(w) for w in where))
        raise ValueError(f"{[str(p) for p in parents]} cannot be averaged: not all of them have {sorted(odd)[0]}")
    model = KeyeVL.from_pretrained(parents[0])
    for name, target in model.state_dict().items():
        key, total = keye.renamed(name, keye.KEYE_NAMES), 0
        for files in where:
            with safe_open(files[key], "pt") as f:
                total = total + f.get_tensor(key).float()
        target.copy_((total / len(parents)).reshape(target.shape))
    tmp = out.with_name(out.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    model.save_pretrained(tmp)
    Processor.from_pretrained(parents[0]).save_pretrained(tmp)
    shutil.rmtree(out, ignore_errors=True)
    tmp.rename(out)


def merge_and_score(args, parents: list[Path], folder: Path):
    """The merged model and each of its parents on the held-out benchmark."""
    run = trainer.start(args, "pretrain")
    score = None
    if run.main:
        merge([p / "model" for p in parents], run.folder / "model")
        score = benchmark(run, run.folder / "model", folder, args, blind=True)
        rows = [(p.name, json.loads((p / "score.json").read_text())) for p in parents] + [("merged", score)]
        if score:
            run.say(scoreboard(rows))
    trainer.finish(run, score)


# ---------------------------------------------------------------------------------------------------------------------


def starting_point(args) -> KeyeVL:
    """Fresh weights, with Qwen3's and SigLIP's in their places where given."""
    cfg = PRESETS[args.size]
    torch.manual_seed(args.seed)
    model = KeyeVL.empty(cfg).init_weights()
    if args.init_llm:
        theirs = keye.Config.from_json(keye.read_config(args.init_llm))
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                      "intermediate_size", "vocab_size", "tie_word_embeddings"):
            if getattr(theirs, field) != getattr(cfg, field):
                raise SystemExit(f"--init-llm {args.init_llm}: {field} is {getattr(theirs, field)}, but --size {args.size} "
                                 f"has {getattr(cfg, field)}")
        keye.load(model, args.init_llm, keye.QWEN3_NAMES, ("lm_head.",) if cfg.tie_word_embeddings else ())
    if args.init_vit:  # its pooling head, text tower and scale are read again in stage 0
        heads = keye.read_config(args.init_vit).get("vision_config", {}).get("num_attention_heads", 12)  # SiglipConfig's default
        if heads != cfg.vision.num_attention_heads:  # the shapes would fit all the same
            raise SystemExit(f"--init-vit {args.init_vit}: num_attention_heads is {heads}, but --size {args.size} has "
                             f"{cfg.vision.num_attention_heads}")
        keye.load(model, args.init_vit, keye.SIGLIP_NAMES, ("vision_model.head.", "text_model.", "logit_"))
    return model


def main(args):
    plan, root = PLAN[args.size], Path(args.out) / args.size
    folder = Path(args.data or f"data/{args.size}")
    if args.init:
        processor = Processor.from_pretrained(args.init)
    else:
        vocab = args.vocab or (Path(__file__).with_name("vocab-toy.json") if PRESETS[args.size].vocab_size == 1024 else None)
        if vocab is None and args.init_llm:
            vocab = Path(args.init_llm) / "vocab.json"
        if vocab is None:
            raise SystemExit(f"--size {args.size} needs a vocabulary: --init-llm with Qwen3's folder, or --vocab vocab.json")
        processor = Processor(vocab, **BUDGETS[args.size])
    stages = args.stage.split(",") if args.stage else STAGES[bool(args.init_llm):]
    if odd := [s for s in stages if s not in STAGES]:
        raise SystemExit(f"--stage {args.stage}: {odd[0]!r} is none of text, 0, 1, 2, 3")
    names = [n for s in stages for n in (["3-even", "3-picture", "3-video"] if s == "3" else [s])]
    # where the next stage starts: --init, what the last stage before it left, or (None) starting_point
    left = [root / f"pretrain-{s}" / "model" for s in STAGES[: STAGES.index(stages[0])]]
    left = [p for p in left if p.exists() and not (args.init_llm or args.init_vit)]
    before = Path(args.init) if args.init else left[-1] if left else None
    print(f"starting from {before or 'fresh weights' + ''.join(f', {p}' for p in (args.init_llm, args.init_vit) if p)}", flush=True)
    for name in names:
        mixture(folder, name, args.size)  # a missing file is an error now, not in an hour
    if (folder / "heldout").is_dir():
        try:
            read_questions(folder / "heldout")
        except ValueError as e:
            raise SystemExit(str(e)) from None
    began = time.time()
    annealed, trained = [], False
    for name in names:
        kind, done = name.split("-")[0], root / f"pretrain-{name}"
        steps = args.steps or plan["steps"][kind]
        if (done / "score.json").exists() and not args.fresh:
            print(f"stage {name} is done: {done} (--fresh trains it again)", flush=True)
        else:
            (done / "score.json").unlink(missing_ok=True)
            if before:  # the pooling head matters in stage 0 only, and only the official weights still have one
                head = kind == "0" and "visual.vision_model.head.probe" in keye.weight_files(before)
                model = KeyeVL.from_pretrained(before, pooling_head=head)
            else:
                model = starting_point(args)
            (contrastive if kind == "0" else next_token)(args, name, model, processor, folder, steps, plan)
            trained, args.resume = True, False  # --resume was for the stage that had been interrupted
        if kind == "3":
            annealed.append(done)
        else:
            before = done / "model"
    if annealed and (trained or not (root / "pretrain" / "score.json").exists()):
        merge_and_score(args, annealed, folder)
    print(f"pre-training took {time.time() - began:.0f} s; the model is in "
          f"{root / 'pretrain' / 'model' if annealed else before}", flush=True)


if __name__ == "__main__":
    parser = trainer.arguments(argparse.ArgumentParser(description=__doc__.split("\n")[0]))
    parser.add_argument("--data", help="folder with train/*.jsonl and heldout/*.jsonl (default: data/SIZE)")
    parser.add_argument("--stage", help="which stages, e.g. 2 or 0,1 (default: all)")
    parser.add_argument("--vocab", help="vocab.json, where neither --init nor --init-llm brings one")
    parser.add_argument("--eval-limit", type=int, default=100, help="held-out questions per task after each stage")
    main(parser.parse_args())
