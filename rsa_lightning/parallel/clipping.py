"""Gradient clipping by the global norm, wherever the parameters live."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

Sharding = tuple[DeviceMesh, tuple[int, ...]] | None  # a mesh and its dimensions that split a gradient; None: whole


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), norm = sqrt(Σ g²) over whole gradients; returns norm.

    `torch.nn.utils.clip_grad_norm_` with parameters on several device meshes, which it refuses: plain tensors, and
    DTensors of FSDP2, HSDP, tensor parallelism and their combinations. Squares are summed in fp32 (fp64 for fp64) on
    each rank, then over the mesh dimensions that shard them, so that what is replicated counts once. All ranks get the
    same norm where plain gradients are the same on all ranks. Parameters without gradient are left out on every rank
    alike. A norm that is not finite makes all gradients nan or 0, as in torch.

    Raises:
        ValueError: max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is a positive number, got {max_norm}: leave clipping out instead")
    by_sharding: dict[Sharding, list[Tensor]] = defaultdict(list)
    for parameter in {id(parameter): parameter for parameter in parameters}.values():
        grad = _reduced(parameter)
        if grad is None:
            continue
        by_sharding[_sharding(grad)].append(grad.to_local() if isinstance(grad, DTensor) else grad)
    if not by_sharding:
        return torch.zeros(())
    # in the order of the parameters, which is that of every rank
    squares = [_square(locals_, sharding) for sharding, locals_ in by_sharding.items()]
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # without a look at it, which would cost a sync
    for locals_ in by_sharding.values():
        for local in locals_:
            local.mul_(factor.to(local.device))  # in its own precision, which bf16 would round before the product
    return norm


def _reduced(parameter: nn.Parameter) -> Tensor | None:
    """The gradient; one that is a sum still to be taken (`Partial`) is taken: the norm of its parts is not its norm."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and any(isinstance(placement, Partial) for placement in grad.placements):
        whole = [Replicate() if isinstance(placement, Partial) else placement for placement in grad.placements]
        parameter.grad = grad = grad.redistribute(placements=whole)
    return grad


def _sharding(grad: Tensor) -> Sharding:
    if not isinstance(grad, DTensor):
        return None
    split = tuple(dim for dim, placement in enumerate(grad.placements) if not isinstance(placement, Replicate))
    return (grad.device_mesh, split) if split else None


def _square(locals_: list[Tensor], sharding: Sharding) -> Float[Tensor, ""]:
    """Σ g² over gradients that are sharded alike."""
    dtype = torch.promote_types(max((t.dtype for t in locals_), key=lambda d: d.itemsize), torch.float32)
    total = torch.stack([torch.linalg.vector_norm(t, dtype=dtype) for t in locals_]).square().sum()
    if sharding is not None:
        mesh, split = sharding
        for dim in split:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=mesh.get_group(dim))
    return total
