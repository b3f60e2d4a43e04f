"""Pre-training: from fresh or released weights to a merged Keye-VL (arXiv 2507.01949, 2.1 and 3.2).

    python pretrain.py                                      toy, all stages, on whatever there is
    python pretrain.py --size tiny --data data/tiny         one GPU
    torchrun --nproc_per_node=8 pretrain.py --size 8b --data mydata \\
        --init-llm Qwen3-8B --init-vit siglip-so400m-patch14-384
    python pretrain.py --stage 2,3 --init some/model        some of the stages, from any model
    python pretrain.py --size 8b --dry-run --gpus 8         what that would need, and how long

    stage  what learns        from what                           loss
    text   decoder            pure text, where no --init-llm is   next token
    0      ViT + text tower   picture-caption pairs               SigLIP's pairwise sigmoid
    1      projector          captions                            next token
    2      everything         all categories                      next token
    3      everything         three annealing mixtures, a run     next token, the learning rate
                              each                                falls towards zero
    merge  -                  the three annealed models           their weights are averaged

In: --data FOLDER with train/*.jsonl (conversations) and, optionally, heldout/*.jsonl (questions).
MIX below knows some names of files; any other counts with weight 1 from stage 2 on.
Without these, a toy world is drawn, and weights are fresh: anyone can try a machine.
Out: runs/SIZE/pretrain-STAGE/model after every stage, runs/SIZE/pretrain/model after the merge,
and a held-out score beside each. The same command goes on where a killed run stopped.
"""

import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.checkpoint import export, fingerprint, resume, save_if_due
from common.conversation import check_training, media_items
from common.facts import as_object
from common.failures import say_failures
from common.fit import EVERYTHING, compiling_pays, fit, packs_at_once
from common.loader import Loader
from common.memory import CARDS, dry_run
from common.optim import clip_gradients, make_optimizer, schedule, set_lr
from common.packing import first_packing, join, packing
from common.parallel import assign, pass_around, ring_pass, shard
from common.processes import Peers, join_processes
from common.questions import check_heldout, files_or_exit, needs_one, refuse_empty, say_files
from common.run import (
    Run,
    arguments,
    at_least,
    data_folder,
    pick_device,
    plan_of,
    previous_model,
    released,
    start,
)
from common.sources import renewed
from common.tokenizer import QWEN_VOCAB, vocab_file
from common.unigram import Unigram
from common.weights import (
    KEYE_NAMES,
    QWEN3_NAMES,
    SIGLIP_NAMES,
    add_weights,
    load_weights,
    read_config,
    weight_files,
)
from data import Processor
from evaluate import score_phase
from model import (
    PRESETS,
    SCALE,
    Config,
    KeyeVL,
    compile_blocks,
    init_weights,
    sample_flops,
    rest_of,
    step_work,
    tower_config,
    training_flops,
)
from toyworld.world import make_world
from vit import TextTower, ViT

# ----------------------------------------------------------------------------------------------
# Steps and peak learning rates. # ours, all of them: Keye states neither, nor batch or schedule.

STAGES = ["text", "0", "1", "2", "3"]
PLAN = {
    "toy": {
        "steps": {"text": 30, "0": 60, "1": 15, "2": 1800, "3": 60},
        "lr": {"text": 2e-3, "0": 2e-3, "1": 2e-3, "2": 2e-3},
    },
    "tiny": {
        "steps": {"text": 60, "0": 150, "1": 30, "2": 1200, "3": 80},
        "lr": {"text": 1e-3, "0": 1e-3, "1": 1e-3, "2": 1e-3},
    },
    "small": {
        "steps": {"text": 500, "0": 1000, "1": 200, "2": 5000, "3": 1000},
        "lr": {"text": 6e-4, "0": 6e-4, "1": 1e-3, "2": 6e-4},
    },
    # released weights are moved gently; only the projector is new
    "released": {
        "steps": {"text": 1000, "0": 10000, "1": 2000, "2": 20000, "3": 4000},
        "lr": {"text": 1e-5, "0": 1e-5, "1": 1e-3, "2": 2e-5},
    },
}
WARMUP = 0.05  # the share of a stage's steps in which the rate rises
FLOOR = 0.2  # the share of its peak that it falls to; stage 3 goes on from stage 2's there

LEARNS = {
    "text": ("decoder",), "0": ("vit",), "1": ("projector",), "2": EVERYTHING, "3": EVERYTHING,
}

POST_TRAINING = {  # files that later phases read
    "questions", "instruct", "think", "no_think", "agentic", "clips", "preferences", "discover",
    "premise",
}
MIX = {  # weights of the files in --data's train folder, by samples drawn
    "text": {"text": 1},
    "0": {"pairs": 1},
    "1": {"caption": 1},
    "2": {
        "caption": 3, "vqa": 8, "video": 3, "grounding": 1, "interleaved": 0.5, "ocr": 0.5,
        "reasoning": 0.5, "text": 0.3, "detail": 0.1,
    },
    # Captions teach to see and questions to find, which takes longest. The toy cannot learn the
    # rest in minutes, and with more of it, long uncertain answers fill the gradient, and the
    # finding sets in hundreds of steps later.
    "2-toy": {
        "caption": 4, "vqa": 8, "video": 1.5, "grounding": 0.1, "interleaved": 0.1,
        "reasoning": 0.1, "ocr": 0.05, "text": 0.05, "detail": 0.02,
    },
    # Keye averages models annealed on different mixtures and does not name them (section 3.2)
    "3-even": {
        "caption": 2, "vqa": 8, "ocr": 0.5, "grounding": 1, "interleaved": 0.5, "video": 2,
        "text": 0.3, "reasoning": 0.3, "detail": 0.1,
    },
    "3-picture": {
        "caption": 3, "vqa": 10, "ocr": 0.5, "grounding": 0.5, "interleaved": 0.3, "video": 1,
        "text": 0.1, "reasoning": 0.3, "detail": 0.1,
    },
    "3-video": {
        "caption": 1, "vqa": 8, "ocr": 0.3, "grounding": 0.5, "interleaved": 0.5, "video": 3,
        "text": 0.3, "reasoning": 0.5, "detail": 0.1,
    },
}


def mixture(folder: Path, stage: str, size: str) -> list[tuple[Path, float]]:
    """Files of folder/train and their weights for a stage. SystemExit where there is none."""
    weights = MIX.get(f"{stage}-{size}", MIX[stage])
    known = POST_TRAINING.union(*MIX.values())
    files = files_or_exit(folder / "train")
    chosen = []
    for name, path in files.items():
        is_new = name not in known and stage[0] in "23"
        weight = 1 if is_new else weights.get(name, 0)
        if weight:
            chosen.append((path, weight))
    if not chosen:
        raise SystemExit(
            f"stage {stage} {needs_one(weights, folder, files)}. "
            f"`python -m toyworld --out {folder}` draws a toy world."
        )
    return chosen


# ----------------------------------------------------------------------------------------------
# text and stages 1, 2, 3: the next token


def next_token(
    run: Run, stage: str, before: Path | None, processor: Processor, mix, steps: int, plan: dict
):
    """One stage of next-token training on packed conversations; leaves run.folder/model."""
    args = run.args
    scale = SCALE[args.size]
    learns = LEARNS[stage[0] if stage != "text" else "text"]
    rate = plan["lr"][stage] if stage in plan["lr"] else FLOOR * plan["lr"]["2"]
    shape = {"warmup": WARMUP, "floor": FLOOR}
    if stage.startswith("3"):  # annealing: on from where stage 2 ended, towards zero
        shape = {"warmup": 0.0, "floor": 0.0}

    # First the shapes alone: what a card can hold decides how they are held, and then each rank
    # reads or draws its own part of the weights.
    model = KeyeVL.shapes(before or PRESETS[args.size])
    cfg = model.config
    tokens, packs = packing(run)
    at_once = packs_at_once(run, cfg, learns)
    keep = fit(run, model, learns, tokens * at_once)
    fill(shard(model, run), args, before)
    opt = make_optimizer(model, dict.fromkeys(learns, rate), muon=scale.muon, **keep)
    progress = resume(run, model, opt)
    trained = {"vit": "vit" in learns, "decoder": "decoder" in learns}
    loader = Loader(
        mix, processor, tokens, packs, run.rank, run.world, args.seed,
        flops=partial(sample_flops, cfg, **trained), workers=args.workers, state=progress.loader,
    )

    for step, (batches, info) in zip(range(progress.step, steps), loader):
        lr = set_lr(opt, schedule(step, steps, **shape))
        batches = join(batches, at_once)

        # Every target token of the step weighs the same, on whichever rank and in whichever
        # micro-batch it stands: so sums are divided by the count of all of them.
        targets = run.sum(sum(int((batch["labels"] != -100).sum()) for batch in batches))
        loss = torch.zeros((), device=run.device)
        for batch in batches:
            with run.autocast():
                loss_sum, _ = model.loss(run.to(batch))
            micro_loss = loss_sum / max(1, targets)
            micro_loss.backward()  # under FSDP, gradients are summed over the ranks here
            loss += micro_loss.detach()

        loss = run.sum(loss)
        norm = clip_gradients(model)
        loader.prepare()  # the GPU is still at work
        if not run.should_skip(loss, norm):
            opt.step()
        opt.zero_grad(set_to_none=True)
        run.log(
            step, steps, loss=loss, norm=norm, lr=lr, targets=targets,
            skipped=run.sum(sum(info["skipped"].values())), **info["shares"],
            **step_work(cfg, batches, **trained),
        )
        save_if_due(run, step + 1, steps, model, opt, info["state"])
    say_failures(run, loader.failures, run.sum(loader.tried), "samples")
    export(run, model, processor)


# ----------------------------------------------------------------------------------------------
# stage 0: pictures and captions, SigLIP's loss


class SigLIP(nn.Module):
    """The ViT with its pooling head, a text tower, and the two numbers of the sigmoid loss."""

    def __init__(self, vit: ViT, text: TextTower):
        super().__init__()
        self.vit = vit
        self.text = text
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def init_weights(self, pooling_head: bool):
        """Fresh weights, as SigLIP starts, of all that a Keye-VL has no place for."""
        depth = self.vit.cfg.num_hidden_layers
        init_weights(self.text, depth)
        if pooling_head:
            init_weights(self.vit.head, depth)
        assign(self.logit_scale, torch.tensor([math.log(10.0)]))  # t = 10
        assign(self.logit_bias, torch.tensor([-10.0]))  # b = -10: most pairs do not match

    def forward(self, patches, grids, tokens):
        """Unit vectors of pictures and captions, (B, C) each; scale and bias of their products."""
        features = self.vit(patches, grids)  # (N, C)
        images = F.normalize(self.vit.pool(features, grids).float(), dim=-1)
        texts = F.normalize(self.text(tokens).float(), dim=-1)
        # exp and + 0: FSDP's parameters must not leave forward as they are
        return images, texts, self.logit_scale.exp(), self.logit_bias + 0


def sigmoid_loss(images, texts, scale, bias, largest: int, world: int = 1):
    """SigLIP's loss (arXiv 2303.15343, eq. 1), summed over this rank's pictures and all captions.

    -log sigmoid(z (t x.y + b)), z = 1 for a picture and its caption, -1 for any other caption.
    images, texts (B, C) unit vectors; largest: B of the rank that has most. Captions travel around
    the ring of ranks, so a rank holds B x largest logits at a time, never all pairs.
    Divide by the number of pictures on all ranks.
    """
    texts = F.pad(texts, (0, 0, 0, largest - len(texts)))  # ranks exchange equal shapes
    is_real = torch.arange(largest, device=texts.device) < len(images)  # (largest,)
    sign = 2 * torch.eye(len(images), largest, device=texts.device) - 1  # (B, largest)
    total = 0
    for hop in range(world):
        logits = scale * images @ texts.T + bias  # (B, largest)
        total = total - (F.logsigmoid(sign * logits) * is_real).sum()
        if hop < world - 1:
            texts = ring_pass(texts)  # its gradient comes back the other way
            is_real = pass_around(is_real.float())
            sign = -torch.ones_like(sign)  # another rank's captions belong to none of ours
    return total


def contrast(batches: list[dict], embed, loss_of) -> torch.Tensor:
    """The loss over all pairs of a step, with its gradients: a picture meets the captions of all
    micro-batches, however many there are.

    embed(batch) -> pictures (B, C), captions (B, C), scale, bias; loss_of takes those of all
    batches together. One batch that holds the step is the plain case. Several are embedded without
    gradients first; the loss tells each vector its gradient, and with that each batch goes
    through again (arXiv 2101.06983).
    """
    if len(batches) == 1:
        loss = loss_of(*embed(batches[0]))
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        parts = [embed(batch) for batch in batches]
    images, texts, scales, biases = zip(*parts)
    vectors = [torch.cat(images), torch.cat(texts), scales[0], biases[0]]
    vectors = [vector.detach().clone().requires_grad_() for vector in vectors]
    loss = loss_of(*vectors)
    loss.backward()

    *pushes, scale, bias = (vector.grad for vector in vectors)
    sizes = [len(part) for part in images]
    for i, pushed in enumerate(zip(*(push.split(sizes) for push in pushes))):
        share = float(i == 0)  # scale and bias are the step's, and learn once
        torch.autograd.backward(embed(batches[i]), [*pushed, scale * share, bias * share])
    return loss.detach()


POOLING_PROBE = "visual.vision_model.head.probe"


def check_pair(record: dict):
    """ValueError unless a line is one picture and its caption."""
    check_training(record)
    kinds = [kind for _, kind in media_items(record)]
    answers = [m for m in record["messages"] if m["role"] == "assistant"]
    if kinds != ["image"] or len(answers) != 1:
        raise ValueError(
            f"stage 0 needs one picture and one caption, not {kinds} and {len(answers)} answers"
        )


def captions_of(batch: dict, context: int, encode) -> torch.Tensor:
    """Caption ids (B, context) of a pack of pairs: the supervised tokens of each sample."""
    starts = batch["segments"].tolist()
    rows = []
    for start_, end in zip(starts, starts[1:]):
        labels = batch["labels"][start_:end]
        ids = labels[labels != -100].tolist()
        if ids:  # none in the blank sample of a pack whose samples all failed
            rows.append(encode(ids))
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), context)


def text_tower(args, cfg: Config, processor: Processor):
    """A text tower as deep and wide as the ViT, as SigLIP's is, and how captions become its ids."""
    if args.init_vit:
        text = released_tower(args, "text_config", cfg)
        context = text["max_position_embeddings"]
        vocab_size = text["vocab_size"]
        unigram = Unigram(Path(args.init_vit) / "tokenizer.json", context)

        def encode(ids):  # without the end of turn
            return unigram(processor.tokenizer.decode(ids[:-1]))

    else:
        context = 64  # SigLIP's own
        vocab_size = cfg.vocab_size

        def encode(ids):
            return (ids + [cfg.bos_token_id] * context)[:context]

    with torch.device("meta"):
        return TextTower(cfg.vision, vocab_size, context), encode


def two_towers(run: Run, before: Path | None, processor: Processor):
    """The model, and its ViT beside a text tower, sharded and with weights.

    -> model, SigLIP, how captions become ids, packs at once, the optimizer's options
    """
    args = run.args
    # The pooling head matters in this stage only: of all models that it may start from, just the
    # official one still has it.
    has_head = before is not None and POOLING_PROBE in weight_files(before)
    model = KeyeVL.shapes(before or PRESETS[args.size], pooling_head=True)
    tower, encode = text_tower(args, model.config, processor)
    siglip = SigLIP(model.vit, tower)

    # what fits is known from shapes alone; then each rank makes and fills its own shards
    tokens, _ = packing(run)
    at_once = packs_at_once(run, model.config, ("vit",))
    keep = fit(run, model, ("vit",), tokens * at_once)
    if keep.get("compiled"):
        compile_blocks(tower)
    siglip.to(next(model.vit.parameters()).dtype)  # all of it as its ViT is held
    siglip.stays_gathered = model.stays_gathered
    shard(siglip, run)
    for part in rest_of(model):
        shard(part, run)  # it only waits to be written out again
    fill(model, args, before, pooling_head=has_head)
    if args.init_vit:
        load_weights(siglip, args.init_vit, SIGLIP_NAMES)
    else:
        siglip.init_weights(pooling_head=not has_head)
    return model, siglip, encode, at_once, keep


def contrastive(
    run: Run, before: Path | None, processor: Processor, folder: Path, steps: int, plan: dict
):
    """Stage 0: pictures and captions that belong together get like vectors."""
    args = run.args
    model, siglip, encode, at_once, keep = two_towers(run, before, processor)
    context = siglip.text.context
    # Whether Keye trains the text tower is not stated. # ours: with the ViT's rate
    parts = ("vit", "text", "logit_scale", "logit_bias")
    rates = dict.fromkeys(parts, plan["lr"]["0"])
    opt = make_optimizer(siglip, rates, muon=SCALE[args.size].muon, **keep)
    progress = resume(run, siglip, opt)
    loader = Loader(
        mixture(folder, "0", args.size), processor, *packing(run), run.rank, run.world, args.seed,
        workers=args.workers, state=progress.loader, check=check_pair,
    )

    def embed(batch):
        tokens = captions_of(batch, context, encode).to(run.device)
        batch = run.to(batch)
        with run.autocast():
            return siglip(batch["patches"], batch["grids"], tokens)

    for step, (batches, info) in zip(range(progress.step, steps), loader):
        lr = set_lr(opt, schedule(step, steps, WARMUP, floor=FLOOR))
        batches = join(batches, at_once)
        # pictures of each rank: the ring needs the largest number, the mean all
        counts = [row[0] for row in run.gather([sum(len(b["grids"]) for b in batches)])]
        pairs = sum(counts)

        def loss_of(*vectors):
            return sigmoid_loss(*vectors, int(max(counts)), run.world) / max(1, pairs)

        loss = contrast(batches, embed, loss_of)
        loss = run.sum(loss)
        norm = clip_gradients(siglip)
        loader.prepare()  # the GPU is still at work
        if not run.should_skip(loss, norm):
            opt.step()
        opt.zero_grad(set_to_none=True)

        grids = [grid for batch in batches for grid in batch["grids"].tolist()]
        run.log(
            step, steps, loss=loss, norm=norm, lr=lr, pairs=pairs,
            skipped=run.sum(sum(info["skipped"].values())),
            tokens=len(grids) * context,
            visual_tokens=sum(len(batch["patches"]) for batch in batches) // 4,
            # the text tower is as deep and wide as the ViT
            flops=training_flops(model.config, [], grids + [[1, 1, context]] * len(grids)),
        )
        save_if_due(run, step + 1, steps, siglip, opt, info["state"])
    say_failures(run, loader.failures, run.sum(loader.tried), "samples")

    # The pooling head and the text tower have done their work: they are not kept.
    head, model.vit.head = model.vit.head, None
    export(run, model, processor)
    model.vit.head = head
    run.mark_trained()  # should the score end the job, the stage is done
    # here, not after the stage: the text tower ends with it
    heldout = folder / "heldout" / "caption.jsonl"
    run.score(
        lambda: retrieval(run, embed, processor, heldout),
        later="it stays without a score, the same command goes on",
    )


@torch.no_grad()
def retrieval(run: Run, embed, processor: Processor, path: Path, packs: int = 4) -> dict | None:
    """How many held-out pictures have their own caption nearest, among those of the same pack.

    RuntimeError on all ranks where one cannot load its packs, as `embed` waits for all of them.
    """
    if not all(run.gather_objects(path.exists())):
        return None

    def load():
        loader = Loader(
            [(path, 1)], processor, SCALE[run.args.size].pack, run.world, run.rank, run.world,
            run.args.seed, check=check_pair, alone=True,
        )
        return [batches[0] for _, (batches, _) in zip(range(packs), loader)]

    right = pictures = counted = 0
    for batch in run.attempt(f"loading {path}", load):
        images, texts, _, _ = embed(batch)
        likeness = images @ texts.T  # (B, B), B is 0 where all pictures of a pack are lost
        own = likeness.diagonal()[:, None]  # (B, 1)
        # equal captions are equally right
        right += int((likeness <= own + 1e-5).all(dim=1).sum())
        pictures += len(images)
        counted += 1
    right, pictures, counted = (run.sum(x) for x in (right, pictures, counted))
    among = pictures / counted
    run.say(
        f"stage 0: the right caption among {among:.0f} for {right / pictures:.1%} of "
        f"{pictures:.0f} held-out pictures (chance {1 / among:.1%})"
    )
    return {"accuracy": right / pictures, "n": pictures, "among": among}


# ----------------------------------------------------------------------------------------------
# merging


@torch.no_grad()
def merge(run: Run, parents: list[Path]):
    """Leaves run.folder/model: the plain average of the parents' weights (section 3.2).

    ValueError where they do not all have the same tensors.
    """
    model = shard(KeyeVL.shapes(parents[0]), run).load(parents[0])
    for parent in parents[1:]:
        add_weights(model, parent, KEYE_NAMES)
    for p in model.parameters():
        p /= len(parents)
    export(run, model, Processor.from_pretrained(parents[0]))


# ----------------------------------------------------------------------------------------------
# all stages


def fill(model: KeyeVL, args, before: Path | None, pooling_head: bool = False):
    """The weights that a stage starts with, each rank its own part of them.

    before: the model folder they come from; None: fresh ones, with Qwen3's and SigLIP's in their
    places where given. pooling_head: whether those of the ViT's head are there too.
    """
    head = model.vit.head
    if not pooling_head:
        model.vit.head = None
    if before:
        model.load(before)
    else:
        fill_fresh(model, args)
    model.vit.head = head


def fill_fresh(model: KeyeVL, args):
    cfg = model.config
    torch.manual_seed(args.seed)
    model.init_weights()
    if args.init_llm:
        where = Path(args.init_llm) / "config.json"
        theirs = Config.from_json(read_config(args.init_llm), where)
        names = (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings", "rope_theta",
            "rms_norm_eps",
        )
        must_agree(f"--init-llm {args.init_llm}", theirs, args, cfg, names)
        tied = ("lm_head.",) if cfg.tie_word_embeddings else ()
        load_weights(model, args.init_llm, QWEN3_NAMES, tied)
    if args.init_vit:
        released_tower(args, "vision_config", cfg)
        # its pooling head, text tower and scale are read again in stage 0
        unused = ("vision_model.head.", "text_model.", "logit_")
        load_weights(model, args.init_vit, SIGLIP_NAMES, unused)


# what SiglipConfig takes for a key that the file leaves out
SIGLIP = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=64, vocab_size=32000,
)


def released_tower(args, entry: str, cfg: Config) -> dict:
    """An entry of SigLIP's config.json, after it was found to mean the layers that --size has."""
    where = f"{Path(args.init_vit) / 'config.json'}, {entry}"
    facts = SIGLIP | as_object(read_config(args.init_vit).get(entry, {}), where)
    theirs = tower_config(facts, where)
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "layer_norm_eps",
    )
    must_agree(f"--init-vit {args.init_vit}: {entry}", theirs, args, cfg.vision, names)
    return facts


def must_agree(what: str, theirs, args, ours, names: tuple[str, ...]):
    """SystemExit where released weights are of another model, even if their shapes would fit."""
    for name in names:
        if getattr(theirs, name) != getattr(ours, name):
            raise SystemExit(
                f"{what}: {name} is {getattr(theirs, name)}, but --size {args.size} has "
                f"{getattr(ours, name)}"
            )


def first_processor(args) -> Processor:
    """--init's, or one with the vocabulary of --vocab, of --init-llm, or the size's own."""
    if args.init:
        return Processor.from_pretrained(args.init)
    vocab = args.vocab
    if vocab is None and not released(args.size):
        vocab = Path(__file__).parent / "toyworld" / "vocab.json"
    if vocab is None:
        vocab = vocab_file(args.init_llm) if args.init_llm else QWEN_VOCAB
    return Processor(vocab, **SCALE[args.size].budget)


def chosen_stages(args) -> list[str]:
    """The stages to run, stage 3 as its three runs. With a released decoder, text is not needed."""
    chosen = args.stage.split(",") if args.stage else STAGES[bool(args.init_llm) :]
    names = []
    for stage in chosen:
        if stage not in STAGES:
            raise SystemExit(f"--stage {args.stage}: {stage!r} is none of {', '.join(STAGES)}")
        names += ["3-even", "3-picture", "3-video"] if stage == "3" else [stage]
    return names


def refuse_beside_init(args, names: list[str]):
    """SystemExit for flags that would go unread, since --init brings weights and words of its own.

    Stage 0 reads --init-vit even then: its ViT and text tower are SigLIP's.
    """
    unread = {"--init-llm": args.init_llm, "--vocab": args.vocab}
    if "0" not in names:
        unread["--init-vit"] = args.init_vit
    given = [f"{flag} {value}" for flag, value in unread.items() if value]
    if args.init and given:
        raise SystemExit(
            f"--init {args.init} brings its own weights and vocabulary: beside it no stage reads "
            f"{', '.join(given)}"
        )


def model_before(args, first: str) -> Path | None:
    """Where the first stage starts: --init, what the last stage before it left, or None: fresh."""
    if args.init:
        return Path(args.init)
    return None if args.init_llm or args.init_vit else left_before(args, first)


def left_before(args, first: str) -> Path | None:
    """The model of the last stage before the first one, if an earlier run has left one."""
    root = Path(args.out) / args.size
    earlier = STAGES[: STAGES.index(first.split("-")[0])]
    left = [root / f"pretrain-{stage}" / "model" for stage in earlier]
    return next((folder for folder in reversed(left) if folder.exists()), None)


def train_stage(run: Run, name: str, before: Path | None, processor: Processor, plan: dict):
    stage = name.split("-")[0]
    folder = data_folder(run.args)
    steps = run.args.steps or plan["steps"][stage]
    given = [path for path in (run.args.init_llm, run.args.init_vit) if path]
    run.say(f"starting from {before or ', '.join(['fresh weights', *given])}")
    if stage == "0":
        contrastive(run, before, processor, folder, steps, plan)
    else:
        mix = mixture(folder, name, run.args.size)
        next_token(run, name, before, processor, mix, steps, plan)


def merge_annealed(args, annealed: list[Path], outdated: bool) -> Run:
    """The last stage: one model of all annealed ones. outdated: they have changed since it ran."""
    run = start(args, "pretrain")
    if outdated:
        run.attempt("cannot clean the old merge", run.forget)
    run.made_from(parents=[fingerprint(parent) for parent in annealed])
    if not run.trained():
        merge(run, annealed)
        run.mark_trained()
    heldout = data_folder(args) / "heldout"
    run.score(lambda: score_phase(run, heldout, ["plain"], args.eval_limit, blind=True))
    run.close()
    return run


def draw_world(args, folder: Path):
    """Without any data: a toy world to try the machine on, drawn by rank 0 while others wait."""
    join_processes(pick_device(args))
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"no {folder}, and no --data: a toy world is drawn there", file=sys.stderr)
        make_world(folder, size=args.size, workers=min(16, os.cpu_count()))
    Peers("words").barrier()  # by gloo, whose patience is long


def say_what_is_missing(run: Run, args, before: Path | None):
    """One line for each thing that a run could start from, and does not."""
    unused = None if args.init else left_before(args, chosen_stages(args)[0])
    if unused and not before:
        run.say(f"{unused} is not gone on from: --init-llm and --init-vit start anew")
    if before or not released(args.size):
        return
    if not args.init_llm:
        run.say("no --init-llm: the decoder starts from fresh weights, not from Qwen3's")
    if not args.init_vit:
        run.say("no --init-vit: the ViT starts from fresh weights, not from SigLIP's")
    if not args.init_llm and not args.vocab:
        run.say(f"no --vocab: Qwen's, {QWEN_VOCAB.name}")


def say_needs(args):
    """--dry-run: what the stages need of each card. Nothing is read, and nothing trained."""
    stages = {}
    for name in chosen_stages(args):
        stage = name.split("-")[0]
        stages[stage] = LEARNS[stage]
    pack, packs = first_packing(args.size, args.packs, args.gpus)
    print(dry_run(
        PRESETS[args.size], stages, pack, packs // args.gpus, args.gpu, args.gpus,
        limit=args.gpu_memory * 1e9 if args.gpu_memory else float("inf"),
        compiled=compiling_pays(args),
    ))


def main(args):
    begin = time.time()
    folder = data_folder(args)
    plan = plan_of(args, PLAN)
    names = chosen_stages(args)
    refuse_beside_init(args, names)
    if args.init:
        previous_model(args, "an earlier stage")
    if not args.data and not folder.exists():
        draw_world(args, folder)
    processor = first_processor(args)
    before = model_before(args, names[0])

    # a missing or an empty file or an unreadable question is an error now, not in an hour
    for name in names:
        for path, _ in mixture(folder, name, args.size):
            refuse_empty(path)
    check_heldout(folder, args.eval_limit)
    heldout = folder / "heldout"

    annealed = []
    trained_now = []  # models of stages; what an earlier run has made of such a one is outdated
    later = ["pretrain", *[f"pretrain-{name}" for name in names]]
    for name in names:
        run = start(args, f"pretrain-{name}", later)
        if before in trained_now:
            run.attempt("cannot clean an outdated stage", run.forget)
        if name == names[0]:
            say_what_is_missing(run, args, before)
        facts = {"init": before, "llm": args.init_llm, "vit": args.init_vit}
        facts["weights"] = before and fingerprint(before)
        run.made_from(**facts)
        files = [path for path, _ in mixture(folder, name, args.size)]
        if renewed(run, files, {}):
            run.made_from(**facts)
        if not run.trained():
            say_files(run, folder, files)
            train_stage(run, name, before, processor, plan)
            run.mark_trained()
            trained_now.append(run.folder / "model")
            args.resume = False  # it was for the stage that had been interrupted
        if name not in ("text", "0"):
            run.score(lambda: score_phase(run, heldout, ["plain"], args.eval_limit))
        run.close()
        if name.startswith("3"):
            annealed.append(run.folder / "model")
        else:
            before = run.folder / "model"
    if annealed:
        run = merge_annealed(args, annealed, outdated=bool(trained_now))
    took = time.time() - begin
    run.say(f"pre-training took {took:.0f} s; the model is in {run.folder / 'model'}")


if __name__ == "__main__":
    parser = arguments(__doc__, eval_limit=100, asks=False)
    parser.add_argument("--stage", help="which stages, e.g. 2 or 0,1 (default: all)")
    parser.add_argument("--init-llm", metavar="FOLDER", help="Qwen3 folder for the decoder")
    parser.add_argument("--init-vit", metavar="FOLDER", help="SigLIP folder for the ViT")
    parser.add_argument("--vocab", help="vocab.json, where no model brings one")
    parser.add_argument("--dry-run", action="store_true",
        help="print what the stages need of each card, and how long they would take; train nothing")
    parser.add_argument("--gpus", type=at_least(1), default=8, help="of --dry-run: how many cards")
    parser.add_argument("--gpu", default="H100", choices=CARDS, help="of --dry-run: which")
    args = parser.parse_args()
    if args.dry_run:
        say_needs(args)
    else:
        main(args)
