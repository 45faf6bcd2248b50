"""The memory of the token-risk head, without its arithmetic: what `rsa_kernels.linear` holds, when, and until when.

Its operators are opaque: a fake tensor goes in and comes out, and what is held between is known to `workspace.py`.
"""

from typing import Any, NamedTuple

import torch
from rsa_kernels import RiskMeasure, TokenStats
from rsa_kernels.pairs import Price, RowPair
from rsa_kernels.rows import TORCH_ROWS
from rsa_kernels.workspace import Plan, Sizes, Strategy, padded, plan
from torch import Tensor

from rsa_lightning.dryrun.meter import Meter
from rsa_lightning.models import ReferenceStates, RiskHead

# the kernels for GPUs take nothing beside logits (`rsa_kernels.fused.rows.price`; importing it needs Triton)
FUSED_ROWS = TORCH_ROWS._replace(price=lambda vocabulary, dtype, device: Price(0, 0))


class _Call(NamedTuple):
    plan: Plan
    sizes: Sizes
    pair: RowPair
    reads_reference: bool  # in backward
    two: bool  # gradients of hidden are kept apart for two outputs
    saved: int
    meter: Meter


class HeadMemory:
    """Stands for `RiskHead.forward`, with the budget of a device that need not be there."""

    def __init__(self, head: RiskHead, meter: Meter, device: str, strategy: Strategy, fused: bool, ratio: bool) -> None:
        self.head, self.meter, self.device, self.strategy, self.ratio = head, meter, device, strategy, ratio
        self.pair = FUSED_ROWS if fused else TORCH_ROWS
        self.plan: Plan | None = None  # of the last call

    def __call__(
        self, hidden: Tensor, labels: Tensor, reference: ReferenceStates | None, risk: RiskMeasure | None
    ) -> TokenStats:
        weight, bias = self.head.weight, self.head.bias
        theirs: tuple[Tensor | None, Tensor | None] = (None, None)
        if reference is not None and reference.hidden is not None:
            theirs = (reference.hidden, weight.detach() if reference.weight is None else reference.weight)
        cast = [None if t is None else _autocast(t) for t in (hidden, weight, bias, *theirs)]
        with torch.autocast("cpu", enabled=False):
            return self._run(cast, labels, risk)

    def _run(self, given: list[Any], labels: Tensor, risk: RiskMeasure | None) -> TokenStats:
        hidden, weight, bias, ref_hidden, ref_weight = given
        learns = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        ratio = self.ratio and risk is not None
        device = torch.device(self.device)
        ref_dtype = None if ref_hidden is None else ref_hidden.dtype
        sizes = Sizes(len(labels), weight.shape[0], hidden.dtype, ref_dtype, device, risk is not None, ratio)
        chosen = plan(self.strategy, sizes, None, self.pair, any(learns[1:]), any(learns))
        self.plan = chosen
        two, saved = risk is not None and not ratio, self.pair.saved_count(risk)
        call = _Call(chosen, sizes, self.pair, risk is not None, two, saved, self.meter)
        logp, ref_logp, value = _Head.apply(hidden, weight, bias, ref_hidden, ref_weight, labels, call)
        return TokenStats(logp, ref_logp, None if risk is None else value, None, None)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        labels: Tensor,
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs and what is kept; and, until it returns, the workspace."""
        count, sizes, before = len(labels), call.sizes, call.meter.kind
        call.meter.kind = "head"
        outputs = [hidden.new_empty(count, dtype=torch.float32) for _ in range(3)]
        saved = hidden.new_empty(count, call.saved, dtype=torch.float32)
        models = [hidden] if ref_hidden is None else [hidden, ref_hidden]
        kept: list[Tensor] = []
        if call.plan.strategy == "cache":
            kept = [_logits(like, count, sizes) for like in (models if sizes.has_risk else [hidden])]
        elif call.plan.strategy == "frozen":
            kept = [torch.empty_like(hidden) for _ in range(2 if call.two else 1)]
        held = kept if call.plan.strategy == "cache" else []
        workspace = [_logits(like, min(call.plan.rows, count), sizes) for like in models[len(held) :]]
        if call.plan.strategy == "frozen" and call.two:
            workspace.append(_logits(hidden, min(call.plan.rows, count), sizes))
        workspace.append(_price(call, hidden))
        del workspace
        call.meter.kind = before
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, labels, saved, *kept)
        ctx.call = call
        return outputs[0], outputs[1], outputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients, and until it returns the workspace; kept logits are spent on their own gradient."""
        hidden, weight, bias, ref_hidden, *_ = ctx.saved_tensors
        call: _Call = ctx.call
        count, sizes, before, needs = hidden.shape[0], call.sizes, call.meter.kind, ctx.needs_input_grad
        call.meter.kind = "head"
        rows = min(call.plan.rows, count)
        workspace: list[Tensor] = []
        d_weight = None
        if call.plan.strategy == "recompute":
            models = [hidden, ref_hidden] if call.reads_reference and ref_hidden is not None else [hidden]
            workspace = [_logits(like, rows, sizes) for like in (*models, hidden)]  # the last for the gradient
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        if call.plan.strategy != "frozen":
            workspace.append(_price(call, hidden))
            chunks = 1 if call.plan.strategy == "cache" else -(-count // max(1, rows))
            if needs[1]:
                total = torch.empty_like(weight, dtype=weight.dtype if chunks == 1 else torch.float32)
                d_weight = total.to(weight.dtype)
        d_bias = torch.empty_like(bias) if needs[2] else None
        del workspace
        call.meter.kind = before
        return d_hidden, d_weight, d_bias, None, None, None, None


def _logits(like: Tensor, rows: int, sizes: Sizes) -> Tensor:
    return like.new_empty(rows, padded(sizes.vocabulary))


def _price(call: _Call, like: Tensor) -> Tensor:
    price = call.pair.price(call.sizes.vocabulary, call.sizes.dtype, call.sizes.device)
    rows = max(1, min(call.plan.rows, call.sizes.tokens))
    return like.new_empty(min(rows * price.per_row, price.most), dtype=torch.uint8)


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast makes of an argument of a matrix product."""
    if torch.is_autocast_enabled("cpu") and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor
