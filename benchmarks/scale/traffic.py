"""Bytes that a step sends, counted where the collectives are called, beside the least that its sharding has to send.

Of N processes each has to receive (N-1)/N of what is gathered, and to send (N-1)/N of what is reduced and scattered; a
sum that all of them get takes twice that. Weights are gathered for forward and, those of the blocks, again for
backward; gradients are reduced; the blocks of a live reference are gathered for its forward. What of it lies outside of
them (embedding and head) is never put back into shards, so it costs memory and no traffic.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsa_lightning.models import Policy

# what a collective of c10d moves: the larger of its two sides, times the share of it that a process sends or receives
KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
}
PER_SHARE = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1}


class Traffic(TorchDispatchMode):
    """Counts bytes by kind of collective, of one process, from the arguments of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            if name in KINDS:
                self._count(KINDS[name], args)
            elif name not in ("barrier", "monitored_barrier_"):
                raise ValueError(f"c10d::{name} is not counted: add it to KINDS of {__name__}")
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: Any) -> None:
        [group] = [found for found in map(_group, tree_leaves(args)) if found is not None]
        sides = [sum(t.nbytes for t in tree_leaves(side) if isinstance(t, Tensor)) for side in args[:2]]
        self.bytes[kind] += PER_SHARE[kind] * (group.size() - 1) * max(sides) // group.size()
        self.calls[kind] += 1

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self:
            yield

    def figures(self, stage: Any) -> dict[str, Any]:
        """Bytes and calls by kind, and the least bytes for what the stage trains near its reference."""
        compute = stage.trainer.strategy.sharding.compute_dtype
        least = least_bytes(stage.policy, getattr(stage.reference, "_policy", None), compute)
        return {"bytes": dict(self.bytes), "calls": dict(self.calls), "least": least}


def least_bytes(policy: Policy, reference: Policy | None, compute: torch.dtype | None = None) -> dict[str, int]:
    """By purpose, of one process and step; as in the module's docstring.

    Weights are gathered in the precision that is computed in, where it is another than their own; gradients are reduced
    in that of the weights. What lies outside of the blocks is gathered once, and kept until backward.
    """
    mesh = next(p for p in policy.parameters() if isinstance(p, DTensor)).device_mesh
    shards, replicas = mesh.size(-1), mesh.size(0) if mesh.ndim > 1 else 1
    whole, again = _bytes(policy, compute), _bytes_of_blocks(policy, compute)
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    share = (shards - 1) / shards
    found = {
        "forward": share * whole,
        "backward": share * again,
        "gradients": share * trained,
        "replicas": 2 * (replicas - 1) / replicas * trained / shards,
        "reference": 0.0 if reference is None else share * _bytes_of_blocks(reference, compute),
    }
    return {name: round(value) for name, value in found.items()}


def _bytes_of_blocks(policy: Policy, compute: torch.dtype | None) -> int:
    """Of the units that are put back into shards after each forward."""
    units = (unit for unit in policy.modules() if isinstance(unit, FSDPModule))
    return sum(_bytes(unit, compute) for unit in units if unit not in (policy, policy.head))


def _bytes(module: nn.Module, compute: torch.dtype | None) -> int:
    """Of the whole parameters."""
    return sum(p.numel() * (compute or p.dtype).itemsize for p in module.parameters())


def _group(argument: Any) -> dist.ProcessGroup | None:
    """The process group behind an argument of an operator."""
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except RuntimeError:  # the operation of a reduction
        return None
