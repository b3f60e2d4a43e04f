"""The optimizer (AdamW, Muon for matrices), its schedule, and gradient clipping."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from common.parallel import own_part, reshard, whole
from kernels import to_device

BETAS = (0.9, 0.95)  # of AdamW
EPS = 1e-8
PIECE = 2**26  # numbers of a tensor that are stepped at a time: its fp32 copies take a few 256 MiB
MOMENTUM = 0.9  # of Muon. # ours: the usual 0.95 learns a little later in runs this short


def make_optimizer(
    model: nn.Module,
    rates: dict[str, float],
    weight_decay: float = 0.05,
    muon: float = 0.0,
    moments: torch.dtype = torch.float32,
    compiled: bool = False,
) -> "Muon":
    """AdamW, and with muon > 0 Muon for matrices. Call after shard, before the first forward.

    rates: name prefix -> peak learning rate. A parameter takes the longest prefix that fits it;
    lm_head goes with decoder; one without a prefix is frozen. muon: the matrices' rate as a
    multiple of their prefix's. Weight decay on matrices only: not on norms, biases, or
    embeddings (# ours: the row of a rare word would only shrink). moments: dtype in which AdamW
    keeps its own; compiled: by torch.compile, where that is not fp32. ValueError: a prefix fits
    none.
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
    return Muon(groups.values(), moments, compiled, betas=BETAS, eps=EPS, fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, but groups with muon=True step by Muon (kellerjordan.github.io/posts/muon).

    Nesterov momentum, then all singular values of the step become about one: directions with
    small gradients learn as fast as the strong ones. Scaled by 0.2 sqrt(longer side), the step
    is as large as AdamW's (arXiv 2502.16982, 2.2).

    AdamW steps in fp32 whatever its tensors are: weights or moments in bf16 are read, stepped and
    rounded again (see step_in_fp32).
    """

    def __init__(self, groups, moments=torch.float32, compiled=False, **options):
        super().__init__(groups, **options)
        self.moments = moments
        self.update = torch.compile(step_in_fp32, dynamic=True) if compiled else step_in_fp32
        # state from the start: a checkpoint always holds the same keys
        for group in self.param_groups:
            steps = torch.zeros((), device=group["params"][0].device)
            for p in group["params"]:
                if group["muon"]:
                    self.state[p] = {"momentum": torch.zeros_like(p)}
                else:
                    # lean_step counts for the whole group, torch's own step for each parameter
                    self.state[p] = {
                        "step": steps if self.lean else steps.clone(),
                        "exp_avg": torch.zeros_like(p, dtype=self.moments),
                        "exp_avg_sq": torch.zeros_like(p, dtype=self.moments),
                    }

    @property
    def lean(self) -> bool:
        return self.moments != torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.muon_step(group)
            elif self.lean:
                self.lean_step(group)
        super().step()  # of all that have a gradient still

    def lean_step(self, group: dict):
        """AdamW's step of parameters whose weights or moments are not in fp32."""
        steps = self.state[group["params"][0]]["step"]
        steps += 1
        # on the device: numbers of Python would be compiled in, anew at each learning rate
        rate, decay = to_device(torch.tensor([group["lr"], group["weight_decay"]]), steps.device)
        shares = [1 - beta**steps for beta in BETAS]  # what the means have seen so far
        for p in group["params"]:
            if p.grad is None:
                continue
            tensors = (p, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])
            own = [own_part(x)[0].view(-1) for x in tensors]
            for pieces in zip(*(x.split(PIECE) for x in own)):
                self.update(*pieces, *shares, rate, decay)
            p.grad = None  # used up

    def muon_step(self, group: dict):
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        # all parameters in one call: on a GPU a small model's step is the launching of its kernels
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        torch._foreach_lerp_(grads, momenta, MOMENTUM)  # Nesterov's look ahead
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

        # equal shapes in one batched product: a small model's step is many small matrices
        by_shape = {}
        for p, direction in zip(params, grads):
            by_shape.setdefault(p.shape, []).append((p, whole(direction)))
            p.grad = None  # used up: AdamW passes by what has none
        del grads, direction
        for shape, pairs in by_shape.items():
            same, directions = zip(*pairs)
            updates = orthogonal(torch.stack(directions)).to(same[0].dtype)
            updates *= 0.2 * max(shape) ** 0.5
            own = [own_rows(update, p) for p, update in zip(same, updates)]
            torch._foreach_add_(list(same), own, alpha=-group["lr"])


def own_rows(update: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The part of an update that this rank keeps: all have computed the same."""
    if not isinstance(p, DTensor):
        return update
    return distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)


def step_in_fp32(weight, grad, exp_avg, exp_avg_sq, fast_share, slow_share, rate, decay):
    """AdamW (arXiv 1711.05101, algorithm 2) on tensors of any floating dtypes, in place."""
    fast, slow = BETAS
    grad = grad.float()
    mean = exp_avg.float().lerp(grad, 1 - fast)
    square = exp_avg_sq.float().lerp(grad * grad, 1 - slow)
    direction = mean / fast_share / ((square / slow_share).sqrt() + EPS)
    stepped = weight.float() * (1 - rate * decay) - rate * direction
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    weight.copy_(stochastic_round(stepped) if weight.dtype == torch.bfloat16 else stepped)


def stochastic_round(x: torch.Tensor) -> torch.Tensor:
    """fp32 -> fp32 numbers that bf16 has: up or down by chance, so that on average x stays x.

    A step below 1/256 of its weight would else be lost at every step. bf16 is the upper half of
    fp32: noise in the lower half carries over as often as that half is large.
    """
    noise = torch.randint_like(x, 2**16, dtype=torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)  # noise would carry a NaN over into a zero


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """x (B, M, N) -> the nearest matrices whose singular values all lie near 1 (0.7 to 1.2).

    Five Newton-Schulz steps, with the coefficients of the post named above.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()  # exact enough for a direction, and ten times as fast
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.775 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b x
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

    Returns the norm before that, 0-d. Call it when a step's gradients are complete, and before its
    optimizer: both have only this rank's part of the weights, and those that stayed gathered go.
    """
    reshard(model)
    return whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
