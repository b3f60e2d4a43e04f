"""The optimizer (AdamW, Muon for matrices), its schedule, and gradient clipping."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common.parallel import whole

MOMENTUM = 0.9  # of Muon. # ours: the usual 0.95 learns a little later in runs this short


def make_optimizer(
    model: nn.Module,
    rates: dict[str, float],
    weight_decay: float = 0.05,
    muon: float = 0.0,
) -> "Muon":
    """AdamW, and with muon > 0 Muon for matrices. Call after shard, before the first forward.

    rates: name prefix -> peak learning rate. A parameter takes the longest prefix that fits it;
    lm_head goes with decoder; one without a prefix is frozen. muon: the matrices' rate as a
    multiple of their prefix's. Weight decay on matrices only: not on norms, biases, or
    embeddings (# ours: the row of a rare word would only shrink). ValueError: a prefix fits none.
    """
    if "decoder" in rates:
        rates = {"lm_head": rates["decoder"], **rates}
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {}  # by prefix, and whether it is of matrices
    for name, p in model.named_parameters():
        fits = [prefix for prefix in rates if name == prefix or name.startswith(prefix + ".")]
        p.requires_grad_(bool(fits))
        if fits:
            prefix = max(fits, key=len)
            is_matrix = p.ndim == 2 and p not in tables
            by_muon = muon > 0 and is_matrix and prefix != "lm_head"
            rate = rates[prefix] * (muon if by_muon else 1.0)
            group = {
                "params": [],
                "lr": rate,
                "peak_lr": rate,
                "weight_decay": weight_decay if is_matrix else 0.0,
                "muon": by_muon,
            }
            groups.setdefault((prefix, is_matrix), group)["params"].append(p)
    unused = set(rates) - {prefix for prefix, _ in groups} - {"lm_head"}
    if unused:
        parts = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        raise ValueError(f"no parameter named {sorted(unused)}; the model has {parts}")
    return Muon(groups.values(), betas=(0.9, 0.95), fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, but groups with muon=True step by Muon (kellerjordan.github.io/posts/muon).

    Nesterov momentum, then all singular values of the step become about one: directions with
    small gradients learn as fast as the strong ones. Scaled by 0.2 sqrt(longer side), the step
    is as large as AdamW's (arXiv 2502.16982, 2.2).
    """

    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        # state from the start: a checkpoint always holds the same keys
        for group in self.param_groups:
            for p in group["params"]:
                if group["muon"]:
                    self.state[p] = {"momentum": torch.zeros_like(p)}
                else:
                    self.state[p] = {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.muon_step(group)
        super().step()  # of all that have a gradient still

    def muon_step(self, group: dict):
        # equal shapes in one batched product: a small model's step is many small matrices
        by_shape = {}
        for p in group["params"]:
            if p.grad is not None:
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                nesterov = p.grad.lerp(momentum, MOMENTUM)
                by_shape.setdefault(p.shape, []).append((p, whole(nesterov)))
                p.grad = None  # used up: AdamW passes by what has none
        for shape, pairs in by_shape.items():
            updates = orthogonal(torch.stack([direction for _, direction in pairs]))
            updates *= 0.2 * max(shape) ** 0.5
            for (p, _), update in zip(pairs, updates):
                if isinstance(p, DTensor):  # all ranks computed the same; each keeps its own rows
                    update = distribute_tensor(
                        update, p.device_mesh, p.placements, src_data_rank=None
                    )
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """x (B, M, N) -> the nearest matrices whose singular values all lie near 1 (0.7 to 1.2).

    Five Newton-Schulz steps, with the coefficients of the post named above.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def schedule(step: int, steps: int, warmup=0.0, decay=1.0, floor=0.0) -> float:
    """The factor on the peak learning rate at a step (0-based): up, level, down, all in lines.

    warmup, decay: the shares of all steps that rise to 1, and that fall towards floor. Every step
    moves something: the last one is still a step above the floor.
    """
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    falls_from = max(rising, int(steps * (1 - decay)))
    if step < falls_from:
        return 1.0
    left = (steps - step) / (steps - falls_from)
    return floor + (1 - floor) * left


def set_lr(opt, factor: float) -> float:
    """Sets every group's learning rate to factor times its peak; returns the highest."""
    for group in opt.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in opt.param_groups)


def clip_gradients(model: nn.Module, max_norm: float = 1.0) -> torch.Tensor:
    """Scales all gradients so that their global norm is at most max_norm.

    Returns the norm before that, 0-d.
    """
    return whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
