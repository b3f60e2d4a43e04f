"""Where a training run's memory goes, and how long it takes: arithmetic that needs no GPU.

    plan = choose(cfg, ("decoder",), 8192, 8, CARDS["H100"] * GIB)     how one card can hold it
    print(table(plan))                                  each quantity, with its formula
    print(dry_run(cfg, stages, 8192, "H100", 8))        all stages, and the time they take

State is there all the time: weights, gradients, AdamW's moments. Activations are kept block by
block through the forward pass, and the backward pass frees them. Work is what one part needs while
it computes. Only state is divided by the number of cards.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from common.optim import PIECE
from common.run import datasheet_peak
from model import MAX_LOGITS, Config, KeyeVL, training_flops
from vit import TextTower, ViTConfig

GIB = 2**30


# How weights and AdamW's moments are held: bytes of a weight (a gradient has as many), of a moment.
# Best first. Most of AdamW's steps are smaller than half of a bf16 weight's last bit: such weights
# need stochastic rounding. Computation is in bf16, and so are frozen weights of released sizes.
RECIPES = {"fp32": (4, 4), "fp32, bf16 moments": (4, 2), "bf16": (2, 2)}

BEST, *_ = RECIPES

# GiB of memory that CUDA reports. H100: measured; the others: as their drivers are known to.
CARDS = {
    "B200": 178.5,
    "H200": 139.8,
    "H100 NVL": 93.1,
    "H100 PCIe": 79.2,
    "H100": 79.2,
    "A100 40GB": 39.5,
    "A100": 79.2,
    "L40S": 44.4,
    "RTX 4090": 23.6,
    "RTX 3090": 23.6,
}
MOST_CARDS = 2**16  # that a dry run plans for. # ours: more than anyone has in one job
# What tensors cannot use of it
CONTEXT = 0.6 * GIB  # CUDA's, with the kernels' code: 0.52 measured on an H100
NCCL = GIB  # its buffers, where there are several cards. # ours
FRAGMENTS = 0.04  # of the card: gaps that no tensor fits into, cuBLAS's workspaces. # ours

# Activations that a compiled block keeps, as a share of the formulas below; 1: not compiled.
# Measured on an H100 with torch 2.11: silu(gate) is computed again; the ViT keeps all the same.
COMPILED = {"decoder": 0.85, "vit": 1.0}

CHUNK_COPIES = 2  # fp32 tensors of a chunk's logits: what a kernel reads, and what it writes

# Share of the data sheet's peak where all activations are kept, and where all blocks run again: the
# forward pass twice, a quarter less. Measured: 8b's text 46.5 % on one H200 with two fifths of the
# blocks again; with pictures 40 % there, 31 % on two H100s, 35 to 38 % on four; pairs 6 to 9 % on
# two and four H100s (docs/results.md).
MFU = {"text": (0.52, 0.39), "pictures": (0.44, 0.33), "pairs": (0.08, 0.06)}

# ours: samples to count with.
DOCUMENT = 2048  # tokens of a text
PICTURE = (1, 32, 32)  # 1,024 patches are 256 tokens; beside them stand 256 tokens of text
CAPTION = 64  # stage 0's, as SigLIP's text tower takes it
TOWER_WORDS = 32000  # SigLIP's vocabulary

# --------------------------------------------------------------------------------------------------
# parameters and activations


@dataclass
class Job:
    """What is trained on what."""

    cfg: Config
    learns: tuple[str, ...]  # of "vit", "projector", "decoder"; "text": stage 0's tower
    pack: int  # tokens
    world: int  # cards
    compiled: bool = True  # the blocks, by torch.compile
    gathered: bool = False  # the weights stay so, over the packs of a step

    @property
    def stage_0(self) -> bool:
        return "text" in self.learns

    @property
    def patches(self) -> int:
        """As many as a pack can have."""
        return 0 if self.learns == ("decoder",) else 4 * self.pack

    @property
    def layers(self) -> tuple[int, int]:
        """Blocks of decoder and ViT that the backward pass goes through."""
        decoder = 0 if self.stage_0 else self.cfg.num_hidden_layers
        return decoder, self.cfg.vision.num_hidden_layers if "vit" in self.learns else 0

    @cached_property
    def parameters(self) -> dict[str, dict[str, int]]:
        """{what learns together: {part: its parameters}}"""
        with torch.device("meta"):  # shapes without memory
            model = KeyeVL(self.cfg, pooling_head=self.stage_0)
            tower = TextTower(self.cfg.vision, TOWER_WORDS, CAPTION)
        vit, decoder = model.vit, model.decoder
        blocks = size(vit.layers), size(decoder.layers)
        parts = {
            "vit": {"ViT blocks": blocks[0], "ViT's ends": size(vit) - size(vit.head) - blocks[0]},
            "projector": {"projector": size(model.projector)},
            "decoder": {
                "embedding": size(decoder.embed_tokens),
                "decoder blocks": blocks[1],
                "last norm": size(decoder.norm),
                "head": size(model.lm_head),
            },
        }
        if self.stage_0:
            parts["text"] = {"pooling head": size(vit.head), "text tower": size(tower)}
        return parts

    @property
    def comes_and_goes(self) -> bool:
        """Whether FSDP gathers a block's weights for each use of it, and frees them."""
        return self.world > 1 and not self.gathered

    @property
    def all_gathered(self) -> dict[str, int]:
        """Bytes of the bf16 weights that stay gathered while a step lasts. Stage 0 uses its own."""
        trained, frozen = counted(self)
        used = trained if self.stage_0 else trained + frozen
        return {"weights, gathered": 2 * used} if self.gathered else {}

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Parameters of one block of decoder and ViT."""
        decoder = self.parameters["decoder"]["decoder blocks"] // self.cfg.num_hidden_layers
        return decoder, self.parameters["vit"]["ViT blocks"] // self.cfg.vision.num_hidden_layers

    def saves(self, stream: int) -> tuple[int, int]:
        """Bytes a token of a decoder block's activations, and a patch of a ViT block's.

        stream: bytes of a number of the decoder's residual stream.
        """
        decoder = decoder_saves(self.cfg, "decoder" in self.learns)
        if self.compiled:
            decoder *= COMPILED["decoder"]
        decoder += (stream - 2) * self.cfg.hidden_size
        return int(decoder), vit_saves(self.cfg.vision)


def size(part: torch.nn.Module | None) -> int:
    return sum(p.numel() for p in part.parameters()) if part else 0


def decoder_saves(cfg: Config, trained: bool = True) -> int:
    """Bytes a token that autograd keeps of one decoder block in bf16, nothing compiled.

    RoPE keeps nothing: it multiplies by what has no gradient. Frozen matrices need no inputs.
    """
    C = cfg.hidden_size
    H = cfg.num_attention_heads * cfg.head_dim
    KV = cfg.num_key_value_heads * cfg.head_dim
    F = cfg.intermediate_size
    numbers = 2 * C  # inputs of both norms
    numbers += H + KV  # q and k before their norms
    numbers += H + 2 * KV + H  # q, k, v and output of attention; the output enters o_proj too
    numbers += 3 * F  # gate, silu(gate), up
    if trained:
        numbers += 2 * C + F  # what else enters matrices: outputs of both norms, silu(gate) * up
    # fp32: 1 / rms of each row of the four norms, and each head's log of the sum of exp
    statistics = 2 + 2 * cfg.num_attention_heads + cfg.num_key_value_heads
    return 2 * numbers + 4 * statistics


def vit_saves(v: ViTConfig) -> int:
    """Bytes a patch that autograd keeps of one trained ViT block in bf16."""
    numbers = 4 * v.hidden_size  # inputs and outputs of both norms
    numbers += 4 * v.hidden_size  # q, k, v and output of attention
    numbers += 2 * v.intermediate_size  # before and after GELU
    statistics = 4 + v.num_attention_heads  # mean and 1 / deviation of two norms; as above
    return 2 * numbers + 4 * statistics


def kept(job: Job, stream: int, again: tuple[int, int], patches: int) -> dict[str, int]:
    """Bytes of activations when the forward pass ends.

    again: of the first so many blocks of decoder and ViT, only the input is kept.
    """
    C, c = job.cfg.hidden_size, job.cfg.vision.hidden_size
    decoder, vit = job.saves(stream)
    left = [n - again[i] for i, n in enumerate(job.layers)]
    captions = patches // (PICTURE[1] * PICTURE[2])
    ends = 0
    if job.stage_0:
        ends += patches * 10 * c  # pooling head: padded, keys, values, copies of these two
    else:
        ends += job.pack * 8 * C  # last norm's input and output, rows with labels, their gradient
    if "projector" in job.learns:
        ends += patches * 8 * c  # the norm's input, 2x2 side by side, before and after GELU
    if "vit" in job.learns:
        ends += patches * (3 * 588 + 2 * c + 288)  # pixels in uint8 and bf16, last norm, RoPE
    return {
        "decoder blocks": job.pack * (left[0] * decoder + again[0] * stream * C),
        "ViT blocks": patches * (left[1] * vit + again[1] * 2 * c),
        "text tower": captions * CAPTION * job.layers[1] * vit if job.stage_0 else 0,
        "ends": ends,
    }


# --------------------------------------------------------------------------------------------------
# a card


@dataclass
class Plan:
    """One card's memory at its fullest moment, in bytes by quantity."""

    job: Job
    recipe: str  # of RECIPES
    recompute_decoder: int  # the first so many blocks run again in the backward pass
    recompute_vit: int
    bytes: dict[str, int]
    moment: str
    capacity: float  # bytes of the card
    name: str = ""  # of the stage

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def allowance(self) -> float:
        return CONTEXT + FRAGMENTS * self.capacity + NCCL * (self.job.world > 1)

    @property
    def fits(self) -> bool:
        return self.total + self.allowance <= self.capacity


def counted(job: Job) -> tuple[int, int]:
    """Parameters that learn, and those that do not."""
    counts = {part: sum(sizes.values()) for part, sizes in job.parameters.items()}
    trained = sum(counts[part] for part in job.learns)
    return trained, sum(counts.values()) - trained


def state(job: Job, recipe: str) -> dict[str, int]:
    """Bytes that each card holds all the time: its share of everything."""
    trained, frozen = counted(job)
    weight, moment = RECIPES[recipe]
    asleep = 2 if job.cfg.hidden_size >= 1024 else weight
    return {
        "weights, trained": weight * trained // job.world,
        "weights, frozen": asleep * frozen // job.world,
        "gradients": weight * trained // job.world,
        "moments": 2 * moment * trained // job.world,
    }


def moments(job: Job, recipe: str, again: tuple[int, int], patches: int) -> dict[str, dict]:
    """{moment: bytes by quantity, beyond the state}, for a pack with so many patches.

    In use: bf16 weights, gathered by FSDP for this block and the next, or copied from fp32 by
    autocast and kept for the backward pass. On the way: gradients in bf16, and the fp32 form in
    which they are added, or summed over the cards.
    """
    many = job.world > 1
    learns = "decoder" in job.learns, "vit" in job.learns
    is_fp32 = RECIPES[recipe][0] == 4
    cast = [is_fp32 and not many and trained for trained in learns]
    stream = 4 if cast[0] else 2  # autocast leaves embeddings, and so all sums with them, in fp32
    held = job.all_gathered | kept(job, stream, again, patches)
    sizes = job.block_sizes
    copies = [cast[i] * 2 * sizes[i] * (n - again[i]) for i, n in enumerate(job.layers)]
    head = job.cfg.vocab_size * job.cfg.hidden_size
    way = 6 if many or is_fp32 else 2
    found = {}
    if recipe != "fp32":  # the step itself: pieces of tensors in fp32
        found["step"] = {"on the way": 6 * 4 * min(PIECE, head // job.world)}

    if not job.stage_0:
        found |= loss_moments(job, held, patches, sum(copies), cast[0], way)
    # the head's gradient is still being summed; a tied one stays gathered for its other use
    head_left = 4 * head * many * learns[0]
    rows = job.pack, patches
    widths = job.cfg.intermediate_size, job.cfg.vision.intermediate_size
    for i, part in enumerate(("decoder", "vit")):
        if not job.layers[i]:
            continue
        none_left = again[i] == job.layers[i]
        # FSDP reduces a block's gradients together; one card adds matrix by matrix
        gradient = way * (sizes[i] if many else sizes[i] // (4, 2)[i]) * learns[i]
        found[f"{part} backward"] = held | {
            "block run again": rows[i] * job.saves(stream)[i] * none_left,
            "in use": sum(copies) + sizes[i] * (4 * job.comes_and_goes + 2 * cast[i] * none_left),
            "on the way": rows[i] * 4 * widths[i] + gradient + head_left,
        }
        held, copies[i] = held | {"decoder blocks": 0}, 0  # the ViT's turn comes after these
    return found


def loss_moments(job: Job, held, patches: int, copies: int, cast: bool, way: int) -> dict:
    """The loss, chunk by chunk; its backward pass; and, last of all, the embedding's."""
    many = job.world > 1
    head = job.cfg.vocab_size * job.cfg.hidden_size
    labels = job.pack - patches // 4
    chunk = 4 * CHUNK_COPIES * min(labels * job.cfg.vocab_size, MAX_LOGITS)
    # what the backward pass needs of each label: a number a word, or a frozen head's gradient
    push = 2 * labels * (job.cfg.vocab_size if "decoder" in job.learns else job.cfg.hidden_size)
    way *= head * ("decoder" in job.learns)
    in_use = copies + 2 * head * (job.comes_and_goes or cast)
    # FSDP's buffer stays until the next gather, and there is none. It sums the head's gradient
    # over the cards only when the logits are gone.
    buffer = 2 * head * many
    before = 0 if many else push
    return {
        "loss": held | {"logits": push + chunk, "in use": in_use + buffer},
        "head backward": held | {"logits": before, "in use": in_use, "on the way": way},
        "embedding backward": job.all_gathered | {"in use": buffer, "on the way": way},
    }


def plan_of(
    job: Job, recipe: str, again, capacity: float, name: str = "", patches: tuple = ()
) -> Plan:
    """At the fullest moment of packs with so many patches each; else all text, and all pictures."""
    found = []
    for number in patches or {0, job.patches}:
        found += moments(job, recipe, again, number).items()
    moment, more = max(found, key=lambda pair: sum(pair[1].values()))
    return Plan(job, recipe, *again, state(job, recipe) | more, moment, capacity, name)


def job_of(cfg: Config, learns: tuple[str, ...], pack: int, world: int, compiled: bool) -> Job:
    """The ViT alone is stage 0, where a text tower learns with it."""
    return Job(cfg, learns + ("text",) * (learns == ("vit",)), pack, world, compiled)


def choose(
    cfg: Config, trained, pack: int, world: int, capacity: float, name: str = "",
    compiled: bool = True,
) -> Plan:
    """The first recipe that fits with all blocks run again; then as few of them as possible.

    Over several cards weights stay gathered over the packs of a step where there still is room:
    that spares less than a block that does not run again.

    trained: of "vit", "projector", "decoder"; the ViT alone is stage 0. capacity: bytes of a
    card. Where nothing fits, the last recipe's plan, whose `fits` is False.
    """
    job = job_of(cfg, tuple(trained), pack, world, compiled)
    for recipe in RECIPES:
        plan = plan_of(job, recipe, job.layers, capacity, name)
        if plan.fits:
            break
    plan = least_again(plan)
    if world > 1:
        again = plan.recompute_decoder, plan.recompute_vit
        gathered = plan_of(replace(job, gathered=True), plan.recipe, again, capacity, name)
        if gathered.fits:
            return gathered
    return plan


def least_again(plan: Plan, patches: tuple = ()) -> Plan:
    """The plan with as few blocks run again as packs with so many patches allow; or as it is.

    patches: numbers of them, as in plan_of.
    """
    decoder, vit = plan.job.layers
    # The decoder's blocks first: there a byte that is kept saves more work.
    fewest = [(0, k) for k in range(vit)] + [(k, vit) for k in range(decoder)]
    for again in fewest:
        better = plan_of(plan.job, plan.recipe, again, plan.capacity, plan.name, patches)
        if better.fits:
            return better
    return plan


def again_by_patches(plan: Plan) -> list[tuple[int, int, int]]:
    """[(most patches, decoder, ViT)], ascending: a pack with at most so many patches runs so many
    blocks of each again.

    The plan is made for the fullest pack there can be. Most have fewer patches, and what these
    leave of the memory spares them work. In eighths (ours) of what a pack can have.
    """
    rows = []
    before = 0
    for eighth in range(1, 9):
        most = plan.job.patches * eighth // 8
        best = least_again(plan, (before, most))
        again = best.recompute_decoder, best.recompute_vit
        if rows and rows[-1][1:] == again:
            rows.pop()
        rows.append((most, *again))
        before = most
    return rows


def most_packs(
    cfg: Config, trained, pack: int, packs: int, world: int, capacity: float, compiled: bool
) -> int:
    """How many of a card's packs of a step go through the model as one: a divisor of them.

    As many as leave the best recipe its memory, with no block run again: on a GPU small models
    wait for the host, and sharded ones gather their weights for each pack. Others as for choose.
    """
    for n in range(packs, 1, -1):
        if packs % n == 0:
            job = job_of(cfg, tuple(trained), n * pack, world, compiled)
            if plan_of(job, BEST, (0, 0), capacity).fits:
                return n
    return 1


# --------------------------------------------------------------------------------------------------
# time


def flops_per_token(job: Job) -> float:
    """Of training; causal attention counts once, and blocks that run again do not."""
    if job.stage_0:  # a visual token's; the text tower is as deep and wide as the ViT
        return training_flops(job.cfg, [], [PICTURE, (1, 1, CAPTION)]) / 256
    if not job.patches:
        return training_flops(job.cfg, [DOCUMENT], []) / DOCUMENT
    learns = "vit" in job.learns, "decoder" in job.learns
    return training_flops(job.cfg, [512], [PICTURE], *learns) / 512


def estimate(plan: Plan, gpu: str, tokens: float = 600e9) -> tuple[float, float]:
    """Tokens/s of all cards, and days for so many tokens. gpu: one of CARDS."""
    job = plan.job
    kind = "pictures" if job.patches else "text"
    if job.stage_0:
        kind = "pairs"
    all_kept, all_again = MFU[kind]
    again = (plan.recompute_decoder + plan.recompute_vit) / sum(job.layers)
    mfu = all_kept + (all_again - all_kept) * again
    speed = job.world * datasheet_peak(gpu) * mfu / flops_per_token(job)
    return speed, tokens / speed / 86400


# --------------------------------------------------------------------------------------------------
# what is printed

FORMULAS = {
    "weights, trained": "w P / cards",
    "weights, frozen": "2 (all - P) / cards",
    "gradients": "w P / cards",
    "moments": "2 m P / cards",
    "weights, gathered": "2 all, while a step lasts",
    "decoder blocks": "T ((L - R) a + R 2C)",
    "ViT blocks": "N ((L - R) b + R 2c)",
    "text tower": "64 L b a caption",
    "ends": "T 8C + N (10c + 3 x 588)",
    "block run again": "T a or N b, where R = L",
    "logits": "T V 2, and 12 in a chunk",
    "in use": "bf16 weights: 4 a block, 2 V C",
    "on the way": "gradients: 4 T F; 6 a block, 6 V C",
}
LEGEND = """\
w, m: bytes of a weight and of a moment, by recipe: {recipes}.
P: trained parameters. T tokens, N patches of a pack; L blocks, R of them run again. C, F: width and
MLP width of the decoder, H, KV: of its queries and keys; c, f: of the ViT; V: words.
a = {decoder} x 2 (4C + 3H + 3KV + 4F), b = {vit} x 2 (8c + 2f): what autograd keeps of a block in
bf16, and what torch.compile leaves of it.""".format(
    recipes="; ".join(f"{name}: {w}, {m}" for name, (w, m) in RECIPES.items()), **COMPILED
)
ASSUMED = """\
Assumed: AdamW; gradients stay while a step's packs are added up; FSDP2 block by block, or all
weights gathered while a step lasts; the worse of two packs, all text or all pictures. MFU {text} of
the data sheet for text, {pictures} with pictures, {pairs} for pairs of stage 0, where all
activations are kept and where all blocks run again, after what one to four cards measured of 1.7b
to 8b; smaller models wait for the host: small makes half of that, tiny a twentieth. Texts of 2,048
tokens; samples of 512, half of them a picture; stage 0 counts the pictures' tokens, 64 words to
256. Loading, saving and scoring take no time here.""".format(**MFU)


def line(name: str, cells: list, formula: str = "") -> str:
    return f"{name:<19}" + "".join(f"{cell:>9}" for cell in cells) + f"   {formula}".rstrip()


def gib(n: float) -> str:
    return f"{n / GIB:.2f}" if n else "-"


def summary(plan: Plan) -> dict[str, str]:
    """What a plan's column says below its quantities."""
    decoder, vit = plan.job.layers
    return {
        "  all tensors": gib(plan.total),
        "  allowance": gib(plan.allowance),
        "  card": gib(plan.capacity),
        "fits": "yes" if plan.fits else "NO",
        "fullest at": plan.moment.split()[0],
        "run again: decoder": f"{plan.recompute_decoder}/{decoder}",
        "run again: ViT": f"{plan.recompute_vit}/{vit}",
        "bytes a parameter": str(2 * sum(RECIPES[plan.recipe])),
    }


NOTES = {
    "  all tensors": "max_memory_allocated",
    "  allowance": f"CUDA {CONTEXT / GIB}, NCCL {NCCL / GIB}, gaps {FRAGMENTS:.0%} of the card",
    "fullest at": "its backward pass, or loss, step",
    "run again: decoder": "R/L",
    "bytes a parameter": "2 w + 2 m",
}


def table(*plans: Plan) -> str:
    """The memory of one card, a column a plan."""
    lines = [line("GiB on each card", [plan.name for plan in plans], "bytes")]
    for name, formula in FORMULAS.items():
        cells = [gib(plan.bytes.get(name, 0)) for plan in plans]
        if set(cells) != {"-"}:
            lines.append(line(f"  {name}", cells, formula))
    columns = [summary(plan) for plan in plans]
    for name in columns[0]:
        cells = [column[name] for column in columns]
        lines.append(line(name, cells, NOTES.get(name, "")))
    return "\n".join(lines)


def rounded(n: float) -> str:
    if n >= 1e6:
        return f"{n / 1e6:,.1f} M"
    return f"{n:,.1f}" if n < 100 else f"{n:,.0f}"


def dry_run(
    cfg: Config, stages: dict[str, tuple], pack: int, packs: int, gpu: str, world: int,
    limit: float = float("inf"), compiled: bool = True,
) -> str:
    """What each stage would need on so many cards. stages: {name: what learns}, as for choose.

    pack, packs: tokens of a pack, and a card's packs of a step; gpu: one of CARDS; limit: bytes
    that a run may have of it. SystemExit where there are too many cards for any plan.
    """
    if world > MOST_CARDS:
        raise SystemExit(f"--gpus {world}: a dry run plans for at most {MOST_CARDS:,} cards")
    if pack < 1:
        raise SystemExit(f"--gpus {world}: a step has too few tokens for so many cards")
    card = min(CARDS[gpu] * GIB, limit)
    plans = []
    for name, learns in stages.items():
        at_once = most_packs(cfg, learns, pack, packs, world, card, compiled)
        plans.append(choose(cfg, learns, at_once * pack, world, card, name, compiled))
    lines = [
        f"{world} x {gpu}, {packs} packs of {pack:,} tokens a card and step",
        "", line("millions", ["weights"]),
    ]
    most = max((plan.job.parameters for plan in plans), key=len)  # stage 0 has a text tower too
    for sizes in most.values():
        for part, n in sizes.items():
            lines.append(line(f"  {part}", [f"{n / 1e6:,.1f}"]))
    joined = [plan.job.pack // pack for plan in plans]
    lines += ["", table(*plans), line("packs as one", joined, "T, N: of all of them"), ""]

    flops = [flops_per_token(plan.job) / 1e9 for plan in plans]
    speeds, days = zip(*(estimate(plan, gpu) for plan in plans))
    for name, numbers, note in (
        ("GFLOP a token", flops, "nothing counted twice"),
        ("tokens/s", speeds, "of all cards"),
        ("days", days, "for 600 billion, as Keye trains on"),
    ):
        lines.append(line(name, [rounded(n) for n in numbers], note))
    return "\n".join([*lines, "", LEGEND, ASSUMED])
