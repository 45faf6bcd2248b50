"""The loop over tokens: logits of one chunk at a time, whatever arithmetic its rows are done in.

It writes what was asked for into outputs made once, and knows which rows no gradient reaches.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rsa_kernels.naive import TokenStats
from rsa_kernels.pairs import RowGradients, RowOptions, RowPair
from rsa_kernels.risk import KL
from rsa_kernels.rows import TORCH_ROWS

Maybe = Tensor | None
Project = Callable[[slice], tuple[Tensor, Tensor | None]]  # rows -> logits of policy and reference
Place = Callable[[slice, Tensor], Tensor]  # rows and their policy logits -> where the gradient of these is written
Sink = Callable[[slice, Tensor], None]  # rows and the gradient of their policy logits
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # logp, ref_logp, risk, kl, entropy [N], saved [N, K]


def row_pair(impl: str) -> RowPair:
    """The row arithmetic of an implementation: torch for "chunked", Triton for "triton"."""
    if impl == "triton":
        from rsa_kernels.fused.rows import TRITON_ROWS  # the import of Triton takes a second

        return TRITON_ROWS
    assert impl == "chunked", f"no row arithmetic is called {impl}"
    return TORCH_ROWS


def forward_loop(
    project: Project,
    outputs: Outputs,
    labels: Tensor,
    options: RowOptions,
    pair: RowPair,
    rows: int,
    after: Callable[[slice, Tensor, Maybe, Tensor], None] | None = None,
) -> None:
    """Fill what was asked for, per row, exactly 0 where the label is ignored; and the numbers that backward needs.

    `after(chunk, z, r, saved)` may use up the logits of a chunk whose statistics are known.
    """
    for chunk in chunks(labels, rows):
        z, r = project(chunk)
        stats = pair.forward(z, r, labels[chunk], options)
        for output, part in zip(outputs, stats, strict=True):
            if part is not None and output.shape[0]:
                output[chunk] = part
        if after is not None:
            after(chunk, z, r, stats.saved)
    for output in outputs[:5]:
        if output.shape[0]:
            output.masked_fill_(labels == options.ignore_index, 0.0)


def backward_loop(
    project: Project,
    place: Place,
    sink: Sink,
    labels: Tensor,
    grads: RowGradients,
    saved: Tensor,
    options: RowOptions,
    pair: RowPair,
    rows: int,
) -> None:
    """Hand the gradient of the policy logits to `sink`, chunk by chunk. `grads` are those of `alive_only`."""
    for chunk in chunks(labels, rows):
        z, r = project(chunk)
        out = place(chunk, z)
        pair.backward(z, r, labels[chunk], grads.rows(chunk), saved[chunk], options, out)
        sink(chunk, out)


def alive_only(
    labels: Tensor, grads: RowGradients, ignore_index: int, dtype: torch.dtype
) -> tuple[RowGradients, Tensor]:
    """The gradients, exactly 0 at ignored labels even where they are nan; and the rows that none reaches."""
    ignored = labels == ignore_index
    if all(grad is None for grad in grads):  # autograd may ask all the same
        grads = RowGradients(torch.zeros_like(labels, dtype=dtype), None, None)
    alive = RowGradients(*(None if g is None else g.to(dtype).masked_fill(ignored, 0.0) for g in grads))
    return alive, alive.all_zero()


def chunks(labels: Tensor, rows: int) -> Iterator[slice]:
    """Chunks of at most `rows` rows and of nearly equal size: a short last one would waste its matrix products."""
    count = labels.shape[0]
    parts = -(-count // rows)
    return (slice(i * count // parts, (i + 1) * count // parts) for i in range(parts))


def empty_outputs(labels: Tensor, dtype: torch.dtype, options: RowOptions, pair: RowPair) -> Outputs:
    """An output that nobody asked for has no elements, since an operator cannot return None.

    So has `kl` where the risk is the KL: outputs of an operator may not alias, the caller repeats it.
    """
    count, risk = labels.shape[0], options.risk
    wanted = (True, True, risk is not None, risk is not None and not isinstance(risk, KL), options.entropy)
    logp, ref_logp, value, kl, entropy = (labels.new_zeros(count if want else 0, dtype=dtype) for want in wanted)
    return logp, ref_logp, value, kl, entropy, labels.new_zeros(count, pair.saved_count(risk), dtype=dtype)


def upstream(options: RowOptions, grad_logp: Maybe, grad_risk: Maybe, grad_kl: Maybe) -> RowGradients:
    """Gradients of the outputs that exist; those without elements are left out."""
    risk = options.risk
    return RowGradients(
        grad_logp, None if risk is None else grad_risk, None if isinstance(risk, KL | None) else grad_kl
    )


def no_tangents(*tensors: Tensor | None) -> None:
    """Custom operators drop the tangents of forward-mode differentiation without a word."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "the operators have no forward-mode derivative (jvp, forward_ad): differentiate backward, or use "
            "impl='naive', where risk=None has one"
        )


def no_second_derivative(ctx: Any, *_: Maybe) -> None:
    """The autograd formula of operators that are gradients themselves: there is none, and zeros would be wrong."""
    raise RuntimeError(
        "the operators of rsa_kernels have first derivatives only, and a gradient of their gradient was asked for: "
        "leave out create_graph=True, or detach the gradient"
    )


def token_stats(outputs: Any, options: RowOptions) -> TokenStats:
    """The outputs as the public type; what is constant to autograd is detached."""
    logp, ref_logp, risk, kl, entropy = outputs[:5]
    logged = entropy.detach() if options.entropy else None
    if options.risk is None:
        return TokenStats(logp, ref_logp.detach(), None, None, logged)
    return TokenStats(logp, ref_logp.detach(), risk, risk if isinstance(options.risk, KL) else kl, logged)
