"""Tensor parallelism: the decoder blocks of a policy, its embeddings and its head over the ranks of a mesh.

    q, k, v, gate, up     columns: each rank has some heads, some intermediate units
    o, down               rows: their sums over the ranks are the block's output
    embeddings, head      rows of the vocabulary, in one shard where they are tied
    norms                 replicated

Hidden states are whole on every rank, so that data, batches and losses do not know of it.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rsa_kernels import Impl, RiskMeasure, TokenStats
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from rsa_lightning.models import Policy, RiskHead
from rsa_lightning.parallel.vocab import vocab_parallel_token_risk

# model types whose blocks were compared with one process, in tests/test_tensor_parallel.py
KNOWN = ("llama", "mistral", "qwen2", "qwen3")


def parallelize(policy: Policy, mesh: DeviceMesh) -> None:
    """Splits the policy, in place, over a one-dimensional mesh; on every rank alike, before FSDP2 and the optimizer.

    Every rank must hold the same weights: each keeps its part, nothing is sent. Parameters then are DTensors on `mesh`
    or, where they are replicated, plain; names stay, and `full_tensor()` is the weight of before. Tied heads stay tied.
    A frozen reference is treated alike; so is what `copy.deepcopy` made of a policy before.

    Raises:
        ValueError: the mesh has several dimensions, the policy is sharded already, the architecture is none of KNOWN or
            its plan in transformers is another one than is known here, the policy has adapters, or heads, intermediate
            size or vocabulary are not divisible by the mesh. Nothing was changed then.
    """
    if mesh.ndim != 1:
        raise ValueError(f"tensor parallelism runs over one dimension of a mesh, got {mesh}: pass mesh['tensor']")
    if any(isinstance(parameter, DTensor) for parameter in policy.parameters()):
        raise ValueError("the policy is sharded already: parallelize it once, and before fully_shard")
    plan = _plan(policy)
    _check_sizes(policy.model.config, policy.head, mesh.size())
    learnt = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    # every rank has loaded the same weights, so that none has to send them
    parallelize_module(policy.model.base_model, mesh, plan, src_data_rank=None)
    _split_vocabulary(policy, mesh)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(learnt[name])  # styles of torch make parameters that are trained
        if isinstance(parameter, DTensor):
            parameter.data = parameter.detach().clone()  # a shard by rows was a view, which kept the whole weight alive
            if parameter.placements == (Replicate(),) and learnt[name]:
                parameter.register_hook(_whole)


class VocabParallelEmbedding(nn.Embedding):
    """Embeddings of which each rank holds the rows of some ids; every rank gets all of them."""

    @classmethod
    def wrap(cls, embedding: nn.Embedding, weight: nn.Parameter) -> "VocabParallelEmbedding":
        made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        made.weight = weight
        return made

    def forward(self, ids: Tensor) -> Tensor:
        mesh, shard, start = _shard("the embeddings", self.weight)
        here = ids - start
        outside = (here < 0) | (here >= shard.shape[0])
        padding = None if self.padding_idx is None else self.padding_idx - start
        inside = padding is not None and 0 <= padding < shard.shape[0]
        rows = F.embedding(here.masked_fill(outside, 0), shard, padding if inside else None)
        return _Sum.apply(rows.masked_fill(outside[..., None], 0.0), mesh.get_group())


class VocabParallelHead(RiskHead):
    """A RiskHead of which each rank holds the rows of some ids. No rank makes logits of the whole vocabulary.

    Its weight is a DTensor on the tensor mesh within its own forward, under FSDP2 too; the shard is taken there.
    """

    def _token_risk(
        self,
        hidden: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        labels: Tensor,
        risk: RiskMeasure | None,
        *,
        impl: Impl = "auto",
        risk_over_logp: Tensor | None = None,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
        **options: Any,
    ) -> TokenStats:
        """The head of the reference is sharded like this one, or whole on every rank.

        `risk_over_logp` saves nothing here, since a head that is frozen is split too, and is not looked at.

        Raises:
            RuntimeError: `impl` is not one that runs here.
        """
        if impl not in ("auto", "chunked"):
            raise RuntimeError(f"impl={impl!r} cannot run on a vocabulary-parallel head: use impl='auto'")
        mesh, weight, start = _shard("the head", self.weight)
        rows = partial(self._rows, start=start, count=weight.shape[0])
        return vocab_parallel_token_risk(
            hidden,
            weight,
            ref_hidden,
            rows(ref_weight),
            labels,
            risk,
            group=mesh.get_group(),
            vocab_start=start,
            vocab_size=self.out_features,
            bias=rows(bias),
            ref_bias=rows(ref_bias),
            **options,
        )

    def _rows(self, tensor: Tensor | None, start: int, count: int) -> Tensor | None:
        """The same rows of a bias, or of a reference."""
        if isinstance(tensor, DTensor):
            return _shard("a bias, or the head of the reference", tensor)[1]
        if tensor is None or tensor.shape[0] == count:
            return tensor
        if tensor.shape[0] != self.out_features:
            raise ValueError(
                f"the head of the reference has {tensor.shape[0]} rows, the policy's vocabulary {self.out_features}, "
                f"{count} of them here: parallelize the reference over the same mesh, or leave it whole"
            )
        return tensor[start : start + count]


class _Sum(torch.autograd.Function):
    """The sum over ranks. Backward is the identity: what follows is the same on every rank, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _plan(policy: Policy) -> dict[str, ParallelStyle]:
    """Torch's styles for the plan that transformers has for this architecture. Raises ValueError."""
    config: Any = policy.model.config
    if policy.adapted:
        raise ValueError(
            "tensor parallelism does not split adapters: train all weights (no policy.lora), or use FSDP2 with "
            "tensor_parallel 1"
        )
    if config.model_type not in KNOWN:
        raise ValueError(
            f"tensor parallelism knows {', '.join(KNOWN)}, not {config.model_type}: use FSDP2 with tensor_parallel 1"
        )
    plan: dict[str, ParallelStyle] = {}
    for name, word in (getattr(config, "base_model_tp_plan", None) or {}).items():
        plan[name] = _style(name, word, config.model_type)
    missing = [name for name in ("self_attn.q_proj", "mlp.down_proj") if f"layers.*.{name}" not in plan]
    if missing:
        raise ValueError(
            f"transformers has no plan for layers.*.{missing[0]} of this {config.model_type}: use FSDP2 with "
            "tensor_parallel 1"
        )
    # What q, k and v read, and gate and up, enters the mesh once, so that the gradients of the readers are summed
    # before they cross the ranks and not after.
    whole: dict[str, Any] = {"layouts": Replicate(), "desired": Replicate()}
    entering = {"hidden_states": whole["layouts"]}
    return {
        "layers.*.self_attn": PrepareModuleInput(
            input_kwarg_layouts=entering, desired_input_kwarg_layouts={"hidden_states": whole["desired"]}
        ),
        "layers.*.mlp": PrepareModuleInput(input_layouts=whole["layouts"], desired_input_layouts=whole["desired"]),
        **plan,
    }


def _style(name: str, word: str, model_type: str) -> ParallelStyle:
    """What a word of transformers' plans means in torch. Raises ValueError."""
    if word == "colwise":
        return ColwiseParallel()
    if word == "rowwise":
        return RowwiseParallel()
    if word == "replicated_with_grad_allreduce":
        # a norm of each head, [B, T, heads, head_dim]: split over heads, its weight gets a part of its gradient
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    raise ValueError(
        f"transformers' plan for {model_type} has {name}: {word!r}, and tensor parallelism knows colwise, rowwise and "
        "replicated_with_grad_allreduce: use FSDP2 with tensor_parallel 1"
    )


def _check_sizes(config: Any, head: RiskHead, ranks: int) -> None:
    """Raises ValueError where a dimension cannot be split evenly."""
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": head.out_features,
    }
    for name, size in sizes.items():
        if size % ranks:
            fitting = [k for k in range(2, ranks) if not any(value % k for value in sizes.values())]
            mend = f"tensor_parallel {fitting[-1]}" if fitting else "tensor_parallel 1 with FSDP2"
            padded = " (or pad the embeddings, resize_token_embeddings)" if name == "vocab_size" else ""
            raise ValueError(f"{name} is {size}, not a multiple of {ranks} tensor-parallel ranks: use {mend}{padded}")


def _split_vocabulary(policy: Policy, mesh: DeviceMesh) -> None:
    """Embeddings and head over the ranks by rows."""
    embedding, head = policy.model.get_input_embeddings(), policy.head
    assert isinstance(embedding, nn.Embedding), "the known architectures have plain embeddings"
    rows, tied = _split(embedding.weight, mesh), head.weight is embedding.weight
    made = VocabParallelHead(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    made.weight = rows if tied else _split(head.weight, mesh)
    if head.bias is not None:
        made.bias = _split(head.bias, mesh)
    made.scale, made.softcap = head.scale, head.softcap
    policy.model.set_input_embeddings(VocabParallelEmbedding.wrap(embedding, rows))
    policy.model.set_output_embeddings(made)


def _split(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None), parameter.requires_grad)


def _whole(grad: DTensor) -> DTensor:
    """A gradient to which each rank's heads contribute a part, summed. FSDP2 sums it itself, and does not call this."""
    return grad.redistribute(placements=[Replicate()])


def _shard(what: str, weight: Tensor) -> tuple[DeviceMesh, Tensor, int]:
    """Mesh, own rows and the first of them; autograd gives the weight the gradient of its shard.

    Raises:
        ValueError: the weight is not split by rows over one mesh dimension: read outside of its module's forward, a
            weight is split by FSDP2, too.
    """
    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        found = f"{weight.placements} on {weight.device_mesh}" if isinstance(weight, DTensor) else "a plain tensor"
        raise ValueError(
            f"{what}: a shard by rows of the tensor mesh is wanted, got {found}. Under FSDP2 a weight is that within "
            "the forward of its own module only"
        )
    mesh, local = weight.device_mesh, weight.to_local()
    return mesh, local, mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())
