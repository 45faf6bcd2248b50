"""The memory-bounded path: one loop over tokens, logits of one chunk at a time, computed again in backward.

The loop takes a row pair (`rows.py`), so that other row functions run in the same loop. Forward and backward of each
operator are opaque custom operators, one node each for `torch.compile`.

Unless one chunk covers all N tokens, `linear_token_risk` makes no tensor of N·V elements, forward or backward. The
caller of `token_risk` holds such tensors already; its backward makes one more, the gradient of the policy logits.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rsa_kernels.naive import NestedRisk, TokenStats
from rsa_kernels.risk import KL
from rsa_kernels.rows import TORCH_ROWS, RowGradients, RowOptions, RowPair

ROW_PAIRS: dict[str, RowPair] = {"chunked": TORCH_ROWS}

MIB = 2**20
# On a CPU small enough for the temporaries of a chunk to stay in its caches; on a GPU large enough for the weight
# gradient, which is read and written once per chunk, to cost little beside the matrix products.
WORKSPACE_BYTES = {"cpu": 64 * MIB, "cuda": 512 * MIB}

Project = Callable[[slice], tuple[Tensor, Tensor | None]]  # rows -> logits of policy and reference, to be overwritten
Sink = Callable[[slice, Tensor], None]  # rows and the gradient of their policy logits
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # logp, ref_logp, risk, kl, entropy [N], saved [N, K]
Maybe = Tensor | None


def chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device, budget: int | None, pair: RowPair) -> int:
    """Rows per chunk within a workspace of `budget` bytes; one row where not even that fits."""
    budget = WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"]) if budget is None else budget
    width = 2 if dtype == torch.float64 else 1
    rows = budget // (width * pair.bytes_per_logit * max(vocabulary, 1))
    return max(1, rows if rows < 64 else rows // 64 * 64)


# ---- the loop --------------------------------------------------------------------------------------------------------


def forward_loop(
    project: Project, labels: Tensor, dtype: torch.dtype, options: RowOptions, pair: RowPair, rows: int
) -> Outputs:
    """What was asked for, per row, exactly 0 where the label is ignored; and the numbers that backward needs."""
    outputs = _empty_outputs(labels, dtype, options)
    for chunk in _chunks(labels, rows):
        stats = pair.forward(*project(chunk), labels[chunk], options)
        for output, part in zip(outputs, stats, strict=True):
            if part is not None and output.shape[0]:
                output[chunk] = part
    for output in outputs[:5]:
        if output.shape[0]:
            output.masked_fill_(labels == options.ignore_index, 0.0)
    return outputs


def backward_loop(
    project: Project,
    sink: Sink,
    labels: Tensor,
    grads: RowGradients,
    dead: Tensor,
    saved: Tensor,
    options: RowOptions,
    pair: RowPair,
    rows: int,
) -> None:
    """Hand the gradient of the policy logits to `sink`; dead rows get exact zeros, whatever is nan there."""
    grads = RowGradients(*(None if g is None else g.to(saved.dtype).masked_fill(dead, 0.0) for g in grads))
    for chunk in _chunks(labels, rows):
        part = RowGradients(*(None if g is None else g[chunk] for g in grads))
        dz = pair.backward(*project(chunk), labels[chunk], part, saved[chunk], options)
        sink(chunk, dz.masked_fill_(dead[chunk, None], 0.0))


def _dead_rows(labels: Tensor, grads: RowGradients, ignore_index: int) -> Tensor:
    """Rows without a gradient: the label is ignored, or every upstream is 0."""
    alive = torch.zeros_like(labels, dtype=torch.bool)
    for grad in grads:
        if grad is not None:
            alive |= grad != 0
    return ~alive | (labels == ignore_index)


def _chunks(labels: Tensor, rows: int) -> Iterator[slice]:
    """Chunks of at most `rows` rows and of nearly equal size: a short last one would waste its matrix products."""
    count = labels.shape[0]
    chunks = -(-count // rows)
    return (slice(i * count // chunks, (i + 1) * count // chunks) for i in range(chunks))


def _empty_outputs(labels: Tensor, dtype: torch.dtype, options: RowOptions) -> Outputs:
    """An output that nobody asked for has no elements, since an operator cannot return None.

    So has `kl` where the risk is the KL: outputs of an operator may not alias, the caller repeats it.
    """
    count, risk = labels.shape[0], options.risk
    wanted = (True, True, risk is not None, risk is not None and not isinstance(risk, KL), options.entropy)
    logp, ref_logp, value, kl, entropy = (labels.new_zeros(count if want else 0, dtype=dtype) for want in wanted)
    return logp, ref_logp, value, kl, entropy, labels.new_zeros(count, options.saved_count, dtype=dtype)


def _save_inputs(ctx: Any, inputs: tuple, output: Outputs) -> None:
    *tensors, options, impl, rows = inputs
    ctx.constants = options, impl, rows
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[-1])


def _upstream(options: str, grad_logp: Maybe, grad_risk: Maybe, grad_kl: Maybe) -> RowGradients:
    """Gradients of the outputs that exist; those without elements are left out."""
    risk = RowOptions.decode(options).risk
    return RowGradients(
        grad_logp, None if risk is None else grad_risk, None if isinstance(risk, KL | None) else grad_kl
    )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _stats(outputs: Outputs, options: RowOptions) -> TokenStats:
    """The outputs as the public type; what is constant to autograd is detached."""
    logp, ref_logp, risk, kl, entropy, _ = outputs
    logged = entropy.detach() if options.entropy else None
    if options.risk is None:
        return TokenStats(logp, ref_logp.detach(), None, None, logged)
    return TokenStats(logp, ref_logp.detach(), risk, risk if isinstance(options.risk, KL) else kl, logged)


# ---- from logits -----------------------------------------------------------------------------------------------------


def token_risk(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, options: RowOptions) -> TokenStats:
    """`naive.token_risk` of logits [N, V]; the only tensor of that size is the gradient, in the dtype of the logits."""
    pair = ROW_PAIRS["chunked"]
    rows = chunk_rows(policy_logits.shape[1], _accumulator(policy_logits.dtype), policy_logits.device, None, pair)
    outputs = _token_forward(policy_logits, ref_logits.detach(), labels, options.encode(), "chunked", rows)
    return _stats(outputs, options)


@torch.library.custom_op("rsa_kernels::token_risk", mutates_args=())
def _token_forward(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, options: str, impl: str, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    project = _copies(policy_logits, ref_logits)
    dtype = _accumulator(policy_logits.dtype)
    return forward_loop(project, labels, dtype, RowOptions.decode(options), ROW_PAIRS[impl], rows)


@_token_forward.register_fake
def _(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, options: str, impl: str, rows: int) -> Outputs:
    return _empty_outputs(labels, _accumulator(policy_logits.dtype), RowOptions.decode(options))


@torch.library.custom_op("rsa_kernels::token_risk_backward", mutates_args=())
def _token_backward(
    grad_logp: Tensor | None,
    grad_risk: Tensor | None,
    grad_kl: Tensor | None,
    policy_logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    saved: Tensor,
    options: str,
    impl: str,
    rows: int,
) -> Tensor:
    row_options, grads = RowOptions.decode(options), RowGradients(grad_logp, grad_risk, grad_kl)
    d_logits = policy_logits.new_empty(policy_logits.shape)
    dead = _dead_rows(labels, grads, row_options.ignore_index)
    project = _copies(policy_logits, ref_logits if grads.needs_reference else None)
    backward_loop(project, d_logits.__setitem__, labels, grads, dead, saved, row_options, ROW_PAIRS[impl], rows)
    return d_logits


@_token_backward.register_fake
def _(grad_logp: Maybe, grad_risk: Maybe, grad_kl: Maybe, policy_logits: Tensor, *_: Any) -> Tensor:
    return policy_logits.new_empty(policy_logits.shape)


def _token_vjp(ctx: Any, grad_logp: Maybe, _ref: Maybe, grad_risk: Maybe, grad_kl: Maybe, *_: Any) -> tuple:
    upstream = _upstream(ctx.constants[0], grad_logp, grad_risk, grad_kl)
    d_logits = _token_backward(*upstream, *ctx.saved_tensors, *ctx.constants)
    return d_logits, None, None, None, None, None


_token_forward.register_autograd(_token_vjp, setup_context=_save_inputs)


def _copies(policy_logits: Tensor, ref_logits: Tensor | None) -> Project:
    """Chunks of the caller's logits, copied because the rows overwrite them."""

    def copy(logits: Tensor, chunk: slice) -> Tensor:
        return logits[chunk].to(_accumulator(logits.dtype), copy=True)

    return lambda chunk: (copy(policy_logits, chunk), None if ref_logits is None else copy(ref_logits, chunk))


# ---- from hidden states ----------------------------------------------------------------------------------------------


def linear_token_risk(
    policy: tuple[Tensor, Tensor, Tensor | None],
    reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor,
    options: RowOptions,
    workspace_bytes: int | None = None,
) -> TokenStats:
    """`naive.linear_token_risk`, chunk by chunk. `policy` and `reference` are hidden, weight and bias."""
    weight, pair = policy[1], ROW_PAIRS["chunked"]
    rows = chunk_rows(weight.shape[0], _accumulator(weight.dtype), weight.device, workspace_bytes, pair)
    frozen = [None if t is None else t.detach() for t in reference]
    return _stats(_linear_forward(*policy, *frozen, labels, options.encode(), "chunked", rows), options)


@torch.library.custom_op("rsa_kernels::linear_token_risk", mutates_args=())
def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor,
    options: str,
    impl: str,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    project = _projections(rows, (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias))
    return forward_loop(project, labels, _accumulator(hidden.dtype), RowOptions.decode(options), ROW_PAIRS[impl], rows)


@_linear_forward.register_fake
def _(hidden: Tensor, *args: Any) -> Outputs:
    labels, options = args[-4:-2]
    return _empty_outputs(labels, _accumulator(hidden.dtype), RowOptions.decode(options))


@torch.library.custom_op("rsa_kernels::linear_token_risk_backward", mutates_args=())
def _linear_backward(
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
    options: str,
    impl: str,
    rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    row_options, grads = RowOptions.decode(options), RowGradients(grad_logp, grad_risk, grad_kl)
    dead = _dead_rows(labels, grads, row_options.ignore_index)
    d_hidden, d_weight, d_bias = _gradient_buffers(hidden, weight, needs, _accumulator(weight.dtype))

    def sink(chunk: slice, dz: Tensor) -> None:
        if needs[0]:
            torch.mm(dz.to(weight.dtype), weight, out=d_hidden[chunk])
        if needs[1]:
            # 0 · nan is nan: a hidden state that nobody reads must not reach the weight
            _add_outer(d_weight, dz, hidden[chunk].masked_fill(dead[chunk, None], 0.0))
        if needs[2]:
            d_bias.add_(dz.sum(0))

    reference = (ref_hidden, ref_weight, ref_bias) if grads.needs_reference else (None, None, None)
    project = _projections(rows, (hidden, weight, bias), reference)
    backward_loop(project, sink, labels, grads, dead, saved, row_options, ROW_PAIRS[impl], rows)
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@_linear_backward.register_fake
def _(grad_logp: Maybe, grad_risk: Maybe, grad_kl: Maybe, hidden: Tensor, weight: Tensor, *args: Any) -> tuple:
    return _gradient_buffers(hidden, weight, args[-1], weight.dtype)


def _linear_vjp(ctx: Any, grad_logp: Maybe, _ref: Maybe, grad_risk: Maybe, grad_kl: Maybe, *_: Any) -> tuple:
    needs = list(ctx.needs_input_grad[:3])
    upstream = _upstream(ctx.constants[0], grad_logp, grad_risk, grad_kl)
    grads = _linear_backward(*upstream, *ctx.saved_tensors, *ctx.constants, needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 7


_linear_forward.register_autograd(_linear_vjp, setup_context=_save_inputs)


def _gradient_buffers(hidden: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype) -> tuple:
    """Gradients of hidden, weight and bias; empty where none is wanted. The last two are sums, kept in `dtype`.

    fp32 for bf16 weights: summed in bf16 over many chunks the weight gradient drifts.
    """
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_zeros(weight.shape if needs[1] else 0, dtype=dtype),
        weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=dtype),
    )


def _projections(rows: int, policy: tuple, reference: tuple) -> Project:
    policy_logits, ref_logits = _projection(rows, *policy), _projection(rows, *reference)
    return lambda chunk: (policy_logits(chunk), ref_logits(chunk))


def _projection(rows: int, hidden: Maybe, weight: Maybe, bias: Maybe) -> Callable[[slice], Any]:
    """Matrix products into one workspace, which every chunk overwrites."""
    if hidden is None or weight is None:
        return lambda chunk: None
    workspace = hidden.new_empty(min(rows, hidden.shape[0]), weight.shape[0])

    def project(chunk: slice) -> Tensor:
        logits = workspace[: chunk.stop - chunk.start]
        if bias is None:
            return torch.mm(hidden[chunk], weight.t(), out=logits)
        return torch.addmm(bias, hidden[chunk], weight.t(), out=logits)

    return project


def _add_outer(total: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """total += dzᵀ hidden, summed in fp32 or wider."""
    if dz.is_cuda and hidden.dtype != total.dtype:
        total.add_(torch.mm(dz.to(hidden.dtype).t(), hidden, out_dtype=total.dtype))
    else:
        total.addmm_(dz.t(), hidden.to(total.dtype))


# ---- along sequences -------------------------------------------------------------------------------------------------


def nested_risk(step_risk: Tensor, cu_seqlens: Tensor, *, discount: float = 1.0) -> NestedRisk:
    """`naive.nested_risk` in log2(N) vector operations instead of a loop over tokens."""
    return NestedRisk(*_nested_forward(step_risk, cu_seqlens.to(torch.int64), float(discount)))


@torch.library.custom_op("rsa_kernels::nested_risk", mutates_args=())
def _nested_forward(step_risk: Tensor, cu_seqlens: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    position = torch.arange(step_risk.shape[0], device=step_risk.device)
    end = cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True)]
    to_go = _discounted_sums(step_risk, end - position, discount)
    return to_go, torch.cat([to_go, to_go.new_zeros(1)])[_first_tokens(cu_seqlens, step_risk.shape[0])]


@_nested_forward.register_fake
def _(step_risk: Tensor, cu_seqlens: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(step_risk), step_risk.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.custom_op("rsa_kernels::nested_risk_backward", mutates_args=())
def _nested_backward(grad_to_go: Tensor, grad_total: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    """h_t = g_t + discount · h_{t−1} within each sequence: the same sums, read backwards."""
    count = grad_to_go.shape[0]
    position = torch.arange(count, device=grad_to_go.device)
    start = cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]
    upstream = torch.cat([grad_to_go, grad_to_go.new_zeros(1)])
    upstream = upstream.scatter_add(0, _first_tokens(cu_seqlens, count), grad_total)[:count]
    return _discounted_sums(upstream.flip(0), (position - start + 1).flip(0), discount).flip(0)


@_nested_backward.register_fake
def _(grad_to_go: Tensor, grad_total: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    return torch.empty_like(grad_to_go)


def _nested_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, cu_seqlens, ctx.discount = inputs
    ctx.save_for_backward(cu_seqlens)


def _nested_vjp(ctx: Any, grad_to_go: Tensor, grad_total: Tensor) -> tuple[Tensor, None, None]:
    return _nested_backward(grad_to_go, grad_total, *ctx.saved_tensors, ctx.discount), None, None


_nested_forward.register_autograd(_nested_vjp, setup_context=_nested_setup)


def _first_tokens(cu_seqlens: Tensor, count: int) -> Tensor:
    """First token of each sequence; `count`, one past the last token, for an empty one."""
    return torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[:-1], count)


def _discounted_sums(values: Tensor, remaining: Tensor, discount: float) -> Tensor:
    """out_t = Σ_j discount^j · values_{t+j} over the `remaining_t` entries of the sequence from t on.

    Doubling: after k rounds every entry holds a window of 2^k. Dividing a cumulative sum by discount^t would underflow.
    """
    out, width = values.clone(), 1
    while width < values.shape[0]:
        out[:-width] += torch.where(remaining[:-width] > width, discount**width * out[width:], 0.0)
        width *= 2
    return out
