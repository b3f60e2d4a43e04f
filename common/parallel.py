"""One model over many processes: FSDP2, and how to get whole tensors back from it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, run) -> nn.Module:
    """The model on its device, and under torchrun in shards: each rank keeps 1/world of it.

    A model on "meta" gets its memory here, with nothing in it yet: `assign` fills it, each rank's
    part by that rank alone. One that has weights already has the same ones on every rank.

    FSDP2 gathers a part's weights just before they are used: every block of a ModuleList named
    `layers` by itself, the model's own `units`, then the rest. They go when the part has been
    computed; where the model `stays_gathered`, which spares the host half of that work, not before
    `reshard`. Gradients have the weights' dtype, computation is in run.dtype. Call it before the
    optimizer is made; afterwards only forward, loss, logits and logprobs may be called from
    outside: they gather what they need.
    """
    sharded = dist.is_initialized()
    if sharded:
        shard_parts(model, run)
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=run.device)
    model.to(run.device)
    # FSDP on CUDA hands out weights in the computation's dtype. Where they come in another one,
    # autocast must cast them.
    cast_by_fsdp = sharded and run.device.type == "cuda"
    dtypes = {p.dtype for p in model.parameters()}
    run.needs_autocast |= not cast_by_fsdp and dtypes != {run.dtype}
    return model


def shard_parts(model: nn.Module, run):
    policy = MixedPrecisionPolicy()
    if run.dtype == torch.bfloat16 and run.device.type == "cuda":
        # Inputs are not cast: rotary tables must stay fp32. Gradients are summed in fp32.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(run.device.type, (run.world,))
    parts = []
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and name.split(".")[-1] == "layers":
            parts += part
    if hasattr(model, "units"):
        parts += model.units()
    stays = getattr(model, "stays_gathered", False)
    for module in [*parts, model]:
        # what is in no part stays until the backward pass in any case: None is FSDP2's choice
        after_forward = None if module is model else not stays
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=after_forward)
        module.set_reshard_after_backward(not stays)
        # sums, no means: losses are divided by the global token count already
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot pre-multiply
        module.set_gradient_divide_factor(1.0)
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True)  # a part unused on one rank only
    for method in ("loss", "logits", "logprobs"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def reshard(model: nn.Module):
    """Gives back all weights but this rank's: those that stayed gathered for a step's packs."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(tensor: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """What this rank holds of a tensor, and which of its rows these are. Not sharded: all."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    local = tensor.to_local()
    mesh = tensor.device_mesh
    share = -(-len(tensor) // mesh.size())  # FSDP gives the last ranks less
    begin = min(mesh.get_local_rank() * share, len(tensor))
    return local, slice(begin, begin + len(local))


@torch.no_grad()
def assign(target: torch.Tensor, source: torch.Tensor):
    """target takes source's numbers; of a sharded one, each rank its own rows."""
    local, rows = own_part(target)
    local.copy_(source[rows])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered (all ranks must call it); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ----------------------------------------------------------------------------------------------
# a ring of ranks


class RingPass(torch.autograd.Function):
    """Hands a tensor to the next rank of the ring; its gradient comes back the other way."""

    @staticmethod
    def forward(ctx, x):
        return pass_around(x, 1)

    @staticmethod
    def backward(ctx, grad):
        return pass_around(grad, -1)


ring_pass = RingPass.apply


def pass_around(x: torch.Tensor, by: int = 1) -> torch.Tensor:
    """The tensor of the rank `by` places before this one; all ranks' have one shape."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    received = torch.empty_like(x)
    exchange = [
        dist.P2POp(dist.isend, x.contiguous(), (rank + by) % world),
        dist.P2POp(dist.irecv, received, (rank - by) % world),
    ]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    return received
