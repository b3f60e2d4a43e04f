"""One model over many processes: FSDP2, and how to get whole tensors back from it."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, run) -> nn.Module:
    """The model on its device, and under torchrun in shards: each rank keeps 1/world of it.

    FSDP2 gathers a block's weights just before they are used: every block of a ModuleList named
    `layers` by itself, then the rest. Rank 0's weights count. Parameters and gradients stay fp32,
    computation is in run.dtype. Call it before the optimizer is made; afterwards only forward,
    loss, logits and logprobs may be called from outside: they gather what they need.
    """
    if not dist.is_initialized():
        return model.to(run.device)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.data, 0)
    # CUDA gathers weights in bf16. Inputs are not cast: rotary tables must stay fp32; autocast does
    # the rest. On a CPU autocast does it all: its norms refuse bf16 weights on fp32 inputs.
    policy = MixedPrecisionPolicy()
    if run.dtype == torch.bfloat16 and run.device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(run.device.type, (run.world,))
    blocks = []
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and name.split(".")[-1] == "layers":
            blocks += part
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # sums, no means: losses are divided by the global token count already
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot pre-multiply
        module.set_gradient_divide_factor(1.0)
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True)  # a part unused on one rank only
    for method in ("loss", "logits", "logprobs"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered (all ranks must call it); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(run, model: nn.Module) -> dict:
    """All ranks: every tensor of the model, whole, on rank 0's CPU; an empty dict elsewhere."""
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)  # one at a time on the device
        if run.main:
            state[name] = tensor.cpu()
    return state


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
