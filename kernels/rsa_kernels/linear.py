"""`linear_token_risk`: logits of hidden states, made by the vendor's matrix products into a bounded workspace.

What is kept between forward and backward is a strategy of `workspace.py`; the rows are those of a pair. Unless logits
are kept or one chunk covers all N tokens, no tensor of N·V elements is made. Forward and backward are opaque custom
operators, one node each for `torch.compile`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsa_kernels.loop import (
    Maybe,
    Project,
    alive_only,
    backward_loop,
    chunks,
    empty_outputs,
    forward_loop,
    no_second_derivative,
    no_tangents,
    row_pair,
    token_stats,
    upstream,
)
from rsa_kernels.naive import TokenStats
from rsa_kernels.pairs import RowGradients, RowOptions, RowPair, accumulator
from rsa_kernels.workspace import MIB, Sizes, Strategy, padded, plan

Model = tuple[Maybe, Maybe, Maybe]  # hidden, weight, bias
CAST_BYTES = 4 * MIB  # of a gradient of logits, on a CPU, at a time
SCALED_ROWS = 2048  # of the gradient of hidden, in fp32, at a time


def linear_token_risk(
    policy: tuple[Tensor, Tensor, Tensor | None],
    reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor,
    vocabulary: int,
    options: RowOptions,
    impl: str,
    *,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    risk_over_logp: Tensor | None = None,
) -> TokenStats:
    """`naive.linear_token_risk`, chunk by chunk. `policy` and `reference` are hidden, weight and bias."""
    no_tangents(*policy)
    hidden, weight, bias = policy
    learns = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in policy]
    ref_dtype = None if reference[0] is None else reference[0].dtype
    asked = options.risk is not None, risk_over_logp is not None
    sizes = Sizes(labels.shape[0], vocabulary, hidden.dtype, ref_dtype, hidden.device, *asked)
    chosen = plan(strategy, sizes, workspace_bytes, row_pair(impl), any(learns[1:]), any(learns))
    frozen = [None if t is None else t.detach() for t in reference]
    constants = (options.encode(), impl, chosen.strategy, chosen.rows, vocabulary)
    return token_stats(_forward(hidden, weight, bias, *frozen, labels, risk_over_logp, *constants), options)


# ---- forward ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rsa_kernels::linear_token_risk", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    risk_over_logp: Tensor | None,
    options: str,
    impl: str,
    strategy: str,
    rows: int,
    vocabulary: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_options, pair = RowOptions.decode(options), row_pair(impl)
    outputs = empty_outputs(labels, accumulator(hidden.dtype), row_options, pair)
    kept = _kept(hidden, ref_hidden, strategy, vocabulary, row_options, risk_over_logp)
    cache = [t if strategy == "cache" and t.shape[0] == labels.shape[0] else None for t in kept]
    models = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    project = _projections(*models, rows, vocabulary, (cache[0], cache[1]))
    after = None
    if strategy == "frozen":
        after = _hidden_gradients(kept, weight[:vocabulary], labels, risk_over_logp, row_options, pair, rows)
    forward_loop(project, outputs, labels, row_options, pair, rows, after)
    return *outputs, *kept


@_forward.register_fake
def _(hidden: Tensor, *args: Any) -> tuple:
    ref_hidden, (labels, risk_over_logp, options, impl, strategy, _, vocabulary) = args[2], args[-7:]
    row_options = RowOptions.decode(options)
    outputs = empty_outputs(labels, accumulator(hidden.dtype), row_options, row_pair(impl))
    return *outputs, *_kept(hidden, ref_hidden, strategy, vocabulary, row_options, risk_over_logp)


def _kept(
    hidden: Tensor, ref_hidden: Maybe, strategy: str, vocabulary: int, options: RowOptions, ratio: Maybe
) -> tuple[Tensor, Tensor]:
    """Logits of policy and reference, or gradients of `hidden` by output; without elements where nothing is kept."""
    if strategy == "cache":
        shape = hidden.shape[0], padded(vocabulary)
        models = (hidden, None if options.risk is None else ref_hidden)
        kept = [hidden.new_empty(0) if like is None else like.new_empty(shape) for like in models]
        for logits in kept:
            logits[..., vocabulary:] = 0.0  # nobody reads the padding, but it leaves the operator
        return kept[0], kept[1]
    if strategy == "frozen":
        two = options.risk is not None and ratio is None
        return torch.empty_like(hidden), hidden.new_empty(hidden.shape if two else 0)
    return hidden.new_empty(0), hidden.new_empty(0)


def _projections(policy: Model, reference: Model, rows: int, vocabulary: int, kept: tuple[Maybe, Maybe]) -> Project:
    policy_logits = _projection(policy, rows, vocabulary, kept[0])
    ref_logits = _projection(reference, rows, vocabulary, kept[1])
    return lambda chunk: (policy_logits(chunk), ref_logits(chunk))


def _projection(model: Model, rows: int, vocabulary: int, kept: Maybe) -> Callable[[slice], Any]:
    """Matrix products into logits that are kept, or into one workspace, which every chunk overwrites."""
    hidden, weight, bias = model
    if hidden is None or weight is None:
        return lambda chunk: None
    matrix, offset = weight[:vocabulary].t(), None if bias is None else bias[:vocabulary]
    workspace = hidden.new_empty(min(rows, hidden.shape[0]), padded(vocabulary)) if kept is None else kept

    def project(chunk: slice) -> Tensor:
        logits = workspace[slice(chunk.stop - chunk.start) if kept is None else chunk, :vocabulary]
        if offset is None:
            return torch.mm(hidden[chunk], matrix, out=logits)
        return torch.addmm(offset, hidden[chunk], matrix, out=logits)

    return project


def _hidden_gradients(
    kept: tuple[Tensor, Tensor],
    weight: Tensor,
    labels: Tensor,
    ratio: Maybe,
    options: RowOptions,
    pair: RowPair,
    rows: int,
) -> Callable[[slice, Tensor, Maybe, Tensor], None]:
    """What a frozen head does after the rows of a chunk: ∂logp/∂hidden and ∂risk/∂hidden, or their sum in the ratio."""
    # the logits of a chunk are still needed while the first of two gradients is made
    scratch = weight.new_empty(min(rows, labels.shape[0]) if kept[1].shape[0] else 0, padded(weight.shape[0]))

    def after(chunk: slice, z: Tensor, r: Maybe, saved: Tensor) -> None:
        ones = (labels[chunk] != options.ignore_index).to(saved.dtype)
        parts = [RowGradients(ones, None, None)]
        if options.risk is not None and ratio is not None:
            parts = [RowGradients(ones, ones * ratio[chunk], None)]
        elif options.risk is not None:
            parts.append(RowGradients(None, ones, None))
        for part, total in zip(parts, kept, strict=False):
            out = z if part is parts[-1] else scratch[: z.shape[0], : z.shape[1]]
            pair.backward(z, r if part.needs_reference else None, labels[chunk], part, saved, options, out)
            torch.mm(out, weight, out=total[chunk])

    return after


# ---- backward --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rsa_kernels::linear_token_risk_backward", mutates_args=())
def _backward(
    grad_logp: Tensor | None,
    grad_risk: Tensor | None,
    grad_kl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    saved: Tensor,
    policy_logits: Tensor | None,
    ref_logits: Tensor | None,
    options: str,
    impl: str,
    rows: int,
    vocabulary: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where none is wanted, from kept logits or from new ones."""
    models = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    kept = policy_logits, ref_logits
    grads = RowGradients(grad_logp, grad_risk, grad_kl)
    return _gradients(grads, models, labels, saved, kept, options, impl, rows, vocabulary, needs, spend=False)


@_backward.register_fake
def _(grad_logp: Maybe, grad_risk: Maybe, grad_kl: Maybe, hidden: Tensor, weight: Tensor, *args: Any) -> tuple:
    needs = args[-1]
    d_bias = weight.new_empty(weight.shape[0] if needs[2] else 0)
    return hidden.new_empty(hidden.shape if needs[0] else 0), weight.new_empty(weight.shape if needs[1] else 0), d_bias


_backward.register_autograd(no_second_derivative)


def _gradients(
    given: RowGradients,
    models: tuple[tuple[Tensor, Tensor, Maybe], Model],
    labels: Tensor,
    saved: Tensor,
    kept: tuple[Maybe, Maybe],
    options: str,
    impl: str,
    rows: int,
    vocabulary: int,
    needs: list[bool],
    spend: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`spend` writes the gradient of the logits over the kept logits of the policy: all rows are one chunk then."""
    (hidden, weight, _), row_options = models[0], RowOptions.decode(options)
    grads, dead = alive_only(labels, given, row_options.ignore_index, saved.dtype)
    z, r = kept
    if z is None:
        nobody: Model = (None, None, None)
        reference = models[1] if grads.needs_reference else nobody
        project = _projections(models[0], reference, rows, vocabulary, (None, None))
    else:
        project = _slices(z, r if grads.needs_reference else None, vocabulary)
    count = labels.shape[0]
    rows = max(1, count) if spend else rows
    scratch = hidden.new_empty(0 if z is None or spend else min(rows, count), padded(vocabulary))

    def place(chunk: slice, logits: Tensor) -> Tensor:
        return scratch[: logits.shape[0], :vocabulary] if scratch.shape[0] else logits

    totals = _Totals(hidden, weight, vocabulary, needs, dead, chunks=-(-count // rows))
    backward_loop(project, place, totals.add, labels, grads, saved, row_options, row_pair(impl), rows)
    return totals.result()


def _slices(z: Tensor, r: Maybe, vocabulary: int) -> Project:
    return lambda chunk: (z[chunk, :vocabulary], None if r is None else r[chunk, :vocabulary])


class _Totals:
    """The gradients of hidden, weight and bias, chunk by chunk.

    Over several chunks those of bf16 weights are summed in fp32: in bf16 they drift.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, vocabulary: int, needs: list[bool], dead: Tensor, chunks: int
    ) -> None:
        self.hidden, self.dead, self.needs, self.dtype = hidden, dead, needs, weight.dtype
        self.weight, self.vocabulary = weight[:vocabulary], vocabulary
        dtype = weight.dtype if chunks == 1 else accumulator(weight.dtype)
        self.d_hidden = hidden.new_empty(hidden.shape if needs[0] else 0)
        self.d_weight = weight.new_empty(weight.shape if needs[1] else 0, dtype=dtype)
        self.d_bias = weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=accumulator(weight.dtype))
        self.d_weight[vocabulary if chunks else 0 :] = 0.0

    def add(self, chunk: slice, dz: Tensor) -> None:
        if self.needs[0]:
            torch.mm(dz, self.weight, out=self.d_hidden[chunk])
        if self.needs[1]:
            # 0 · nan is nan: a hidden state that nobody reads must not reach the weight
            hidden = self.hidden[chunk].masked_fill(self.dead[chunk, None], 0.0)
            _add_outer(self.d_weight[: self.vocabulary], dz, hidden, first=chunk.start == 0)
        if self.needs[2]:
            self.d_bias[: self.vocabulary] += dz.sum(0, dtype=self.d_bias.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.d_hidden, self.d_weight.to(self.dtype), self.d_bias.to(self.dtype)


def _add_outer(total: Tensor, dz: Tensor, hidden: Tensor, first: bool) -> None:
    """total = or += dzᵀ hidden, summed in the dtype of `total`."""
    if total.dtype == dz.dtype:
        torch.mm(dz.t(), hidden, out=total) if first else total.addmm_(dz.t(), hidden)
    elif dz.is_cuda:
        torch.addmm(total, dz.t(), hidden, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        hidden = hidden.to(total.dtype)
        width = max(1, CAST_BYTES // (total.dtype.itemsize * max(1, dz.shape[0])))
        for part, columns in zip(total.split(width), dz.split(width, dim=1), strict=True):
            part.addmm_(columns.t().to(total.dtype), hidden, beta=0 if first else 1)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, options, impl, strategy, rows, vocabulary = inputs
    ctx.constants, ctx.strategy, ctx.spent = (options, impl, rows, vocabulary), strategy, False
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[5:])


def _vjp(ctx: Any, grad_logp: Maybe, _ref: Maybe, grad_risk: Maybe, grad_kl: Maybe, *_: Any) -> tuple:
    options, impl, rows, vocabulary = ctx.constants
    row_options = RowOptions.decode(options)
    grads = upstream(row_options, grad_logp, grad_risk, grad_kl)
    hidden, weight, bias, *reference, labels, ratio, saved, first, second = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if ratio is not None:
        checked = _keep_ratio(grads.logp, grads.risk, ratio, labels, row_options.ignore_index)
        grads = RowGradients(checked, grads.risk, grads.kl)
    if ctx.strategy == "frozen" and grads.kl is None:
        return _scaled(grads.logp, grads.risk, labels, row_options.ignore_index, first, second), *[None] * 12
    spendable = type(first) is Tensor and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if ctx.strategy == "cache" and not ctx.spent and spendable:
        # The logits become their own gradient. Should backward run again, it makes them again: `spent` remembers.
        # `.data`: the version counter would refuse to hand them out to a second run. With create_graph=True autograd
        # records what happens here, which only an operator survives.
        ctx.spent = True
        models = (hidden, weight, bias), tuple(reference)
        logits = first.data, second
        found = _gradients(grads, models, labels, saved, logits, options, impl, rows, vocabulary, needs, spend=True)
    else:
        kept = (first, second) if ctx.strategy == "cache" and not ctx.spent else (None, None)
        states = (hidden, weight, bias, *reference, labels, saved, *kept)
        found = _backward(*grads, *states, options, impl, rows, vocabulary, needs)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 10


@torch.library.custom_op("rsa_kernels::linear_token_risk_scaled", mutates_args=())
def _scaled(
    grad_logp: Tensor | None,
    grad_risk: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    by_logp: Tensor,
    by_risk: Tensor,
) -> Tensor:
    """The gradient of hidden from those of the outputs: Σ upstream · part, exactly 0 where the upstream is."""
    total, ignored = torch.empty_like(by_logp), labels == ignore_index
    given = [(g, part) for g, part in ((grad_logp, by_logp), (grad_risk, by_risk)) if g is not None and part.shape[0]]
    terms = [(grad.masked_fill(ignored, 0.0)[:, None], part) for grad, part in given]
    for chunk in chunks(labels, SCALED_ROWS):
        total[chunk] = sum(torch.where(g[chunk] == 0, 0.0, g[chunk] * part[chunk]) for g, part in terms)
    return total


@_scaled.register_fake
def _(
    grad_logp: Maybe, grad_risk: Maybe, labels: Tensor, ignore_index: int, by_logp: Tensor, by_risk: Tensor
) -> Tensor:
    return torch.empty_like(by_logp)


_scaled.register_autograd(no_second_derivative)


@torch.library.custom_op("rsa_kernels::keep_ratio", mutates_args=())
def _keep_ratio(
    grad_logp: Tensor | None, grad_risk: Tensor | None, ratio: Tensor, labels: Tensor, ignore_index: int
) -> Tensor:
    """The gradient of logp, nan (on a CPU an error) where that of the risk is not `ratio` times it.

    A gradient that is not finite breaks no promise, and gives nan.
    """
    logp, risk = (torch.zeros_like(ratio) if g is None else g for g in (grad_logp, grad_risk))
    expected = ratio * logp
    # 1e-3: both come through a loss and a scan in fp32, and the promise is about a formula. Subnormals have no digits.
    allowed = 1e-3 * torch.maximum(risk.abs(), expected.abs()) + 1e-30
    other = ~((risk - expected).abs() <= allowed) & (labels != ignore_index)  # nan is another
    broken = other & risk.isfinite() & logp.isfinite()
    if broken.device.type == "cpu" and broken.any():
        row = int(broken.nonzero()[0])
        raise ValueError(
            f"risk_over_logp is {ratio[row].item():g} at position {row}, but the gradients of risk and logp there are "
            f"{risk[row].item():g} and {logp[row].item():g}: pass the ratio that the loss has, or leave it out"
        )
    return torch.where(other, torch.nan, logp)


@_keep_ratio.register_fake
def _(grad_logp: Maybe, grad_risk: Maybe, ratio: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return torch.empty_like(ratio)


_keep_ratio.register_autograd(no_second_derivative)
_forward.register_autograd(_vjp, setup_context=_setup)
