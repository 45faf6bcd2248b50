"""`linear_token_risk` where each rank of a process group holds some vocabulary rows of both heads.

No rank ever holds logits of the whole vocabulary: what crosses the group are a few numbers per token, and the gradient
of the hidden states. The arithmetic of rows is in `vocab_rows`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from rsa_kernels import checks
from rsa_kernels.loop import alive_only, chunks
from rsa_kernels.naive import TokenStats
from rsa_kernels.pairs import RowGradients, RowOptions, RowStats, accumulator
from rsa_kernels.risk import KL, RiskMeasure
from rsa_kernels.workspace import CHUNK_BYTES, WORKSPACE_BYTES, Strategy
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from rsa_lightning.parallel.vocab_rows import Across, rows_forward, rows_gradient, simplest

Maybe = Tensor | None
# of a chunk, fp32 or fp64, [C, v] each: two models, their difference, its mass and key, the CVaR search among the rows
# that are left, and room for what one line of a formula makes
TEMPORARIES = 12


class Call(NamedTuple):
    """What forward and backward share besides tensors."""

    options: RowOptions
    across: Across
    rows: int  # of a chunk
    keep: bool  # the logits


def vocab_parallel_token_risk(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "v H"],
    ref_hidden: Float[Tensor, "N R"] | None,
    ref_weight: Float[Tensor, "v R"] | None,
    labels: Int[Tensor, " N"],
    risk: RiskMeasure | None,
    *,
    group: dist.ProcessGroup,
    vocab_start: int,
    vocab_size: int,
    bias: Float[Tensor, " v"] | None = None,
    ref_bias: Float[Tensor, " v"] | None = None,
    scale: float = 1.0,
    ref_scale: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
) -> TokenStats:
    """`rsa_kernels.linear_token_risk` of heads whose rows [vocab_start, vocab_start + v) are this rank's.

    Equals it on the whole heads, up to the order of sums; every rank gets all N tokens' statistics. Per chunk of
    tokens KL takes two all-reduces of a few numbers per token (one MAX, one SUM), ERM one MAX more. CVaR takes two per
    sweep and two besides, and finds an exact threshold: an outcome of some rank, whose ties on all ranks share the mass
    that is left in proportion to it. Backward is in closed form; it communicates once, the gradient of `hidden`, in
    fp32 (fp64).

    Every rank of the group must make the same call: hidden states, reference states and labels are replicated, and so
    are the gradients that reach the result. Gradients of `weight` and `bias` are those of this rank's rows.

    Args:
        weight, ref_weight: local tensors, `DTensor.to_local()` of a sharded head. Ranks may hold different numbers of
            rows, none included. Both None for the reference, with risk=None, scores the policy alone.
        group: the ranks whose shards make up the vocabulary.
        vocab_start: the id of the first row of `weight`, and of `ref_weight`.
        vocab_size: ids below it exist; rows beyond are padding and get gradient 0.
        strategy: "cache" keeps the logits of the own rows for backward, "recompute" makes them again; "auto" keeps
            them where they fit `workspace_bytes`. There is no "frozen".
        workspace_bytes: bound on logits, kept or of one chunk, and their temporaries, for a shard of vocab_size / k
            rows of k ranks; a chunk has at least one token. By default as for `linear_token_risk`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of its range, the risk is none of KL, CVaR
            and ERM; on a CPU also: the shards do not tile the vocabulary, or a label is outside it. On a GPU such a
            label gives nan.
        TypeError: something is no tensor, or a DTensor.
    """
    options = checks.options(simplest(risk), scale, ref_scale, softcap, ref_softcap, ignore_index, entropy)
    optional = {"bias": bias, "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check_local(hidden=hidden, weight=weight, labels=labels, **given)
    checks.tensors(hidden=hidden, weight=weight, labels=labels, **given)
    checks.floats(hidden=hidden, weight=weight, **given)
    checks.model(hidden, weight, bias, labels, "")
    if (ref_hidden is None) != (ref_weight is None) or (ref_hidden is None and ref_bias is not None):
        raise ValueError("ref_hidden, ref_weight and ref_bias are of one reference: pass it whole, or none of it")
    if ref_hidden is None and risk is not None:
        raise ValueError(f"risk={risk} compares with a reference: pass ref_hidden and ref_weight, or risk=None")
    if ref_hidden is not None and ref_weight is not None:
        checks.model(ref_hidden, ref_weight, ref_bias, labels, "ref_")
    checks.labels_inside(vocab_size, labels, options)
    policy, reference = _autocast(hidden, weight, bias), _autocast(ref_hidden, ref_weight, ref_bias)
    checks.dtypes(policy, "")
    checks.dtypes(reference, "ref_")
    count = _columns_here(vocab_start, vocab_size, weight, ref_weight)
    if checks.readable(hidden):
        _check_tiles(group, vocab_start, count, vocab_size, labels.shape[0])
    local = [*policy[:1], *(_rows(t, count) for t in policy[1:])]
    frozen = [reference[0], *(_rows(t, count) for t in reference[1:])]
    share = -(-vocab_size // dist.get_world_size(group))  # the same number on every rank, so that chunks are
    itemsizes = [t.dtype.itemsize for t in (local[0], frozen[0]) if t is not None]
    rows, keep = plan(strategy, labels.shape[0], share, itemsizes, local[0], checks.budget(workspace_bytes))
    here = labels - vocab_start
    columns = torch.where((here >= 0) & (here < count) & (labels != ignore_index), here, -1)
    call = Call(options, Across(group), rows, keep)
    with torch.autocast(hidden.device.type, enabled=False):
        detached = [None if t is None else t.detach() for t in frozen]
        logp, ref_logp, value, kl, entropies = _TokenRisk.apply(*local, *detached, labels, columns, call)
    return TokenStats(logp, ref_logp, value, value if isinstance(options.risk, KL) else kl, entropies)


def plan(
    strategy: Strategy, tokens: int, share: int, itemsizes: list[int], like: Tensor, budget: int | None
) -> tuple[int, bool]:
    """Tokens of a chunk, and whether logits are kept: functions of what is the same on every rank.

    Args:
        share: columns of a rank.
        itemsizes: bytes of a logit of each model.

    Raises:
        ValueError: there is no such strategy.
    """
    if strategy not in ("auto", "cache", "recompute"):
        raise ValueError(
            f"strategy of a vocabulary-parallel head is one of auto, cache, recompute, got {strategy!r}: a head whose "
            "gradient nobody wants keeps logits or makes them again like any other"
        )
    device = like.device.type if like.device.type in CHUNK_BYTES else "cuda"
    logits = share * sum(itemsizes)
    row = logits + TEMPORARIES * share * accumulator(like.dtype).itemsize
    total = WORKSPACE_BYTES[device] if budget is None else budget
    keep = strategy == "cache" or (strategy == "auto" and tokens * logits + min(tokens, 64) * row <= total)
    left = total - (tokens * logits if keep else 0)
    if budget is None or left <= 0:
        left = CHUNK_BYTES[device]
    return max(1, left // max(1, row)), keep


class _TokenRisk(torch.autograd.Function):
    """Both loops over chunks; inputs are hidden, weight and bias of policy and reference, then labels and columns."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Maybe, ...]:
        *models, labels, columns, call = args
        logits: list[Maybe] = []
        parts = []
        for chunk in chunks(labels, call.rows):
            z, r = _project(models[:3], chunk), _project(models[3:], chunk) if models[3] is not None else None
            parts.append(rows_forward(z, r, columns[chunk], call.options, call.across))
            logits += [z, None if call.options.risk is None else r] if call.keep else []
        stats = _joined(parts, models[0], models[3] is not None, call.options)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*models, labels, columns, stats.saved, *logits)
        ignored = labels == call.options.ignore_index
        ref_logp = torch.zeros_like(stats.logp) if stats.ref_logp is None else stats.ref_logp
        outputs = [None if t is None else t.masked_fill(ignored, 0.0) for t in (stats.logp, ref_logp, *stats[2:5])]
        ctx.mark_non_differentiable(*(t for t in (outputs[1], outputs[4]) if t is not None))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Maybe, _: Maybe, grad_risk: Maybe, grad_kl: Maybe, *__: Maybe) -> tuple:
        *models, labels, columns, saved = ctx.saved_tensors[:9]
        kept, call = ctx.saved_tensors[9:], ctx.call
        given = RowGradients(grad_logp, grad_risk, grad_kl)
        grads, dead = alive_only(labels, given, call.options.ignore_index, saved.dtype)
        totals = _Totals(models, dead, ctx.needs_input_grad[:3])
        for number, chunk in enumerate(chunks(labels, call.rows)):
            if call.keep:
                z, r = kept[2 * number : 2 * number + 2]
            else:
                z, r = _project(models[:3], chunk), _project(models[3:], chunk) if grads.needs_reference else None
            totals.add(chunk, rows_gradient(z, r, columns[chunk], grads.rows(chunk), saved[chunk], call.options))
        return *totals.result(call.across), *[None] * 6


class _Totals:
    """Gradients of hidden, weight and bias, chunk by chunk, in fp32 or fp64; None where none is wanted."""

    def __init__(self, models: Iterable[Maybe], dead: Tensor, needs: tuple[bool, ...]) -> None:
        self.policy = list(models)[:3]
        self.dead = dead
        self.sums = [
            t.new_zeros(t.shape, dtype=accumulator(t.dtype)) if t is not None and need else None
            for t, need in zip(self.policy, needs, strict=True)
        ]

    def add(self, chunk: slice, dz: Tensor) -> None:
        hidden, weight, _ = self.policy
        d_hidden, d_weight, d_bias = self.sums
        assert hidden is not None, "a policy has hidden states"
        assert weight is not None, "a policy has a head"
        if d_hidden is not None:
            d_hidden[chunk] = dz.to(weight.dtype) @ weight
        if d_weight is not None:
            # 0 · nan is nan: a hidden state that nobody reads must not reach the weight
            _add_outer(d_weight, dz, hidden[chunk].masked_fill(self.dead[chunk, None], 0.0))
        if d_bias is not None:
            d_bias += dz.sum(0)

    def result(self, across: Across) -> list[Maybe]:
        """The gradient of hidden is summed over the ranks, those of weight and bias are of this rank's rows."""
        if self.sums[0] is not None and self.sums[0].numel():
            across.add_up(self.sums[0])
        return [
            None if total is None or like is None else total.to(like.dtype)
            for total, like in zip(self.sums, self.policy, strict=True)
        ]


def _add_outer(total: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """total += dzᵀ hidden in the dtype of `total`: in bf16 it would drift over chunks."""
    if dz.is_cuda and hidden.dtype != total.dtype:
        torch.addmm(total, dz.to(hidden.dtype).t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(dz.t(), hidden.to(total.dtype))


def _project(model: list[Any], chunk: slice) -> Tensor:
    """Logits of the own columns: the same product in forward and backward, so that no outcome crosses a threshold."""
    hidden, weight, bias = model
    return torch.nn.functional.linear(hidden[chunk], weight, bias)


def _joined(parts: list[RowStats], hidden: Tensor, reference: bool, options: RowOptions) -> RowStats:
    """The statistics of all chunks."""
    if parts:
        columns = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        return RowStats._make(columns)
    empty = hidden.new_zeros(0, dtype=accumulator(hidden.dtype))
    risk, entropy = None if options.risk is None else empty, empty if options.entropy else None
    return RowStats(empty, empty if reference else None, risk, risk, entropy, empty)


def _columns_here(vocab_start: int, vocab_size: int, weight: Tensor, ref_weight: Maybe) -> int:
    """How many rows of the shards exist; raises ValueError where policy and reference hold different ones."""
    counts = [
        min(max(vocab_size - vocab_start, 0), t.shape[0]) for t in (weight, ref_weight) if t is not None
    ]  # what follows is padding
    if len(set(counts)) > 1:
        raise ValueError(
            f"weight has {counts[0]} rows of the vocabulary from {vocab_start} on and ref_weight {counts[1]}: policy "
            "and reference are sharded alike"
        )
    return counts[0]


def _rows(tensor: Maybe, count: int) -> Maybe:
    return tensor if tensor is None or tensor.shape[0] == count else tensor[:count]


def _check_local(**named: Any) -> None:
    for name, tensor in named.items():
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} is a DTensor: pass {name}.to_local(), inside the forward of the module that owns it, with "
                "the group of its mesh and the first row of its shard"
            )


def _check_tiles(group: dist.ProcessGroup, start: int, count: int, vocab_size: int, tokens: int) -> None:
    """On a CPU, where a look at the numbers costs no sync. Raises ValueError on every rank, not on one."""
    mine = torch.tensor([start, start + count, tokens])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    shards = [tuple(shard.tolist()) for shard in gathered]
    if len({shard[2] for shard in shards}) > 1:
        raise ValueError(f"ranks score {[shard[2] for shard in shards]} tokens: hidden states are replicated")
    spans = sorted(shard[:2] for shard in shards if shard[0] < shard[1])
    ends = [0, *(stop for _, stop in spans)]
    if [first for first, _ in spans] != ends[:-1] or ends[-1] != vocab_size:
        raise ValueError(
            f"the shards of the ranks are rows {[shard[:2] for shard in shards]}: together they must be all of "
            f"[0, {vocab_size}), each row once; check vocab_start and the group"
        )


def _autocast(*tensors: Maybe) -> tuple:
    """autograd.Function is not cast by autocast, so the cast of a linear layer happens here."""
    device = next((t.device.type for t in tensors if t is not None), "cpu")
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
