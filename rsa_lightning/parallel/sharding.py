"""FSDP2 for a policy and its frozen reference: what is a unit, how weights get in, and how they come out again.

Every function here is called by all processes of the mesh together.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from rsa_lightning import packing
from rsa_lightning.models import Policy

PROBE = 16  # tokens of the forward that compares a sharded model with a plain copy
# largest difference of its hidden states, relative to their norm; a wrong buffer or an untied head is far beyond
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
TOLERANCE_LOW_PRECISION = 3e-2


@dataclass(frozen=True)
class Sharding:
    """How a model is cut up. The attributes are arguments of `rsa_lightning.parallel.strategy.FSDP2`.

    Args:
        mesh: processes that share a model; two dimensions replicate it over the first and shard it over the second.
        compute_dtype: of gathered weights and activations; None keeps that of the weights. Gradients are then reduced
            in float32, onto weights that stay as they are.
    """

    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    compile: bool = False
    reshard_after_forward: bool = True

    @property
    def precision(self) -> MixedPrecisionPolicy:
        reduce = None if self.compute_dtype is None else torch.float32
        return MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=reduce)

    @property
    def offload(self) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()


def shard(policy: Policy, how: Sharding) -> None:
    """Makes units of a policy, in place: each block; a head of its own; the rest, with a head that is tied to it.

    A unit is gathered for its own forward alone, so the head's weight is whole inside `RiskHead.forward`, where the
    operator reads it, and nowhere else. It stays gathered until the backward, which reads it again.

    Raises:
        ValueError: the model does not say what its blocks are.
    """
    options: dict[str, Any] = {"mesh": how.mesh, "offload_policy": how.offload}
    # the step's numbers (risk weights, offsets, costs) stay in float32 whatever the weights are in
    uncast = dataclasses.replace(how.precision, cast_forward_inputs=False)
    if how.activation_checkpointing and any(parameter.requires_grad for parameter in policy.parameters()):
        # its name until transformers 6 was another one
        enable = getattr(policy.model, "activation_checkpointing_enable", policy.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    for block in blocks(policy):
        fully_shard(block, mp_policy=how.precision, reshard_after_forward=how.reshard_after_forward, **options)
        if how.compile:
            block.compile()
    if policy.head.weight is not policy.model.get_input_embeddings().weight:
        fully_shard(policy.head, mp_policy=uncast, reshard_after_forward=False, **options)
    fully_shard(policy, mp_policy=uncast, reshard_after_forward=False, **options)  # a tied head is read in backward
    register_fsdp_forward_method(policy, "states")


def blocks(policy: Policy) -> list[nn.Module]:
    """The layers of a transformer, in order. Raises ValueError where transformers names none for this architecture."""
    names = set(getattr(policy.model, "_no_split_modules", None) or ())
    found = [module for module in policy.model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]
    if not found:
        raise ValueError(
            f"{type(policy.model).__name__} does not name its blocks (_no_split_modules), so it cannot be sharded: "
            "train it on one device, or with trainer.strategy ddp"
        )
    return found


def fill(policy: Policy, source: Policy | None, device: torch.device, how: Sharding, packed: bool = False) -> None:
    """Gives a sharded policy on the meta device its weights: those of `source`, which the first process has.

    Materialising unties what was tied and leaves buffers that no state dict holds (rotary frequencies) as garbage:
    both are put right, and one forward is compared with the plain copy's.

    Raises:
        RuntimeError: the sharded model does not compute what the plain one does.
    """
    materialise(policy, torch.device("cpu") if how.cpu_offload else device)
    state = {} if source is None else source.state_dict()
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, state, options=whole)
    plain = {} if source is None else dict(source.named_buffers())
    for name, buffer in policy.named_buffers():
        buffer.data = buffer.data.to(device)
        if source is not None:
            buffer.data.copy_(plain[name])
        dist.broadcast(buffer.data, src=0)
    packing.attend(policy.model, packed, check=False)  # the plain copy has been checked
    _verify(policy, source, device, how)


def materialise(policy: Policy, device: torch.device) -> None:
    """Memory for a policy on the meta device, in place, without contents; what is tied stays tied."""
    tied = list(_tied(policy))
    policy.to_empty(device=device)
    for first, *others in tied:
        for module, name in others:
            setattr(module, name, getattr(*first))


def gather(policy: Policy) -> dict[str, Tensor]:
    """The whole state dict on the CPU, on the first process; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(policy, options=options))


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 manages a module, whatever is gathered at the moment."""
    return isinstance(module, FSDPModule)


def _tied(policy: Policy) -> Iterator[list[tuple[nn.Module, str]]]:
    """Places that hold one and the same parameter."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    return (found for found in places.values() if len(found) > 1)


@torch.no_grad()
def _verify(policy: Policy, source: Policy | None, device: torch.device, how: Sharding) -> None:
    """One forward of the sharded policy against one of the plain copy; all processes stop, or none."""
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (policy, source or policy)]
    ids = (torch.arange(PROBE) * 7 + 1)[None] % policy.head.weight.shape[0]
    was_training = policy.training
    policy.eval()
    mine = _hidden(policy, ids.to(device)).float().cpu()
    policy.train(was_training)
    verdict = torch.zeros(1, device=device)
    if source is not None:
        source.eval()
        theirs = _hidden(source, ids).float()
        verdict += ((mine - theirs).norm() / theirs.norm()).item()
        verdict += float("inf") if sizes[0] != sizes[1] else 0.0
    dist.broadcast(verdict, src=0)
    dtype = how.compute_dtype or policy.head.weight.dtype
    if not verdict.item() <= TOLERANCE.get(dtype, TOLERANCE_LOW_PRECISION):
        raise RuntimeError(
            f"sharded, {type(policy.model).__name__} of {sizes[0]} parameters does not compute what it did (of "
            f"{sizes[1]}): the hidden states of {PROBE} tokens differ by {verdict.item():.2g} of their norm. Buffers "
            "or tied weights of this architecture are not restored: train it on one device or with trainer.strategy ddp"
        )


def _hidden(policy: Policy, ids: Tensor) -> Tensor:
    """Hidden states of one row of tokens, through the forward that gathers weights."""
    at = torch.arange(ids.shape[1], device=ids.device)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "left_padded": False,
        "row_bounds": [0, PROBE // 2, PROBE] if packing.is_packed(policy.model) else None,
        "positions": at,
    }
    found = policy.states(batch)  # type: ignore[arg-type]
    if isinstance(policy, FSDPModule):
        # what is still gathered would be taken for the parameter itself, by an optimizer for example
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return found
