"""`nested_risk` along packed sequences; forward and backward are opaque custom operators.

"chunked" is a handful of vector operations, "triton" a kernel each way (`fused/nested.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rsa_kernels.naive import NestedRisk

Maybe = Tensor | None


def nested_risk(step_risk: Tensor, cu_seqlens: Tensor, *, discount: float = 1.0, impl: str = "chunked") -> NestedRisk:
    """`naive.nested_risk` without a loop over tokens."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(step_risk).tangent is not None:
        # a custom operator would drop the tangent without a word
        raise RuntimeError("nested_risk has a forward-mode derivative (jvp, forward_ad) with impl='naive' only")
    return NestedRisk(*_nested_forward(step_risk, cu_seqlens.to(torch.int64), float(discount), impl))


@torch.library.custom_op("rsa_kernels::nested_risk", mutates_args=())
def _nested_forward(step_risk: Tensor, cu_seqlens: Tensor, discount: float, impl: str) -> tuple[Tensor, Tensor]:
    return _scans(impl)[0](step_risk, cu_seqlens, discount)


@_nested_forward.register_fake
def _(step_risk: Tensor, cu_seqlens: Tensor, discount: float, impl: str) -> tuple[Tensor, Tensor]:
    return step_risk.new_empty(step_risk.shape), step_risk.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.custom_op("rsa_kernels::nested_risk_backward", mutates_args=())
def _nested_backward(
    grad_to_go: Tensor | None, grad_total: Tensor | None, cu_seqlens: Tensor, count: int, discount: float, impl: str
) -> Tensor:
    """h_t = g_t + discount · h_{t−1} within each sequence, where the first g_t includes the gradient of the total."""
    return _scans(impl)[1](grad_to_go, grad_total, cu_seqlens, count, discount)


@_nested_backward.register_fake
def _(grad_to_go: Maybe, grad_total: Maybe, cu_seqlens: Tensor, count: int, discount: float, impl: str) -> Tensor:
    return _given(grad_to_go, grad_total).new_empty(count)


def _nested_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    step_risk, cu_seqlens, *constants = inputs
    ctx.constants = step_risk.shape[0], *constants
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens)


def _nested_vjp(ctx: Any, grad_to_go: Maybe, grad_total: Maybe) -> tuple[Maybe, None, None, None]:
    if grad_to_go is None and grad_total is None:  # autograd may ask all the same
        return None, None, None, None
    return _nested_backward(grad_to_go, grad_total, *ctx.saved_tensors, *ctx.constants), None, None, None


def _second_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, cu_seqlens, _, *ctx.constants = inputs
    ctx.save_for_backward(cu_seqlens)


def _second_vjp(ctx: Any, grad: Tensor) -> tuple[Maybe, Maybe, None, None, None, None]:
    """Backward is linear, and forward its transpose."""
    to_go, total = _nested_forward(grad, *ctx.saved_tensors, *ctx.constants)
    wanted = ctx.needs_input_grad
    return to_go if wanted[0] else None, total if wanted[1] else None, None, None, None, None


_nested_forward.register_autograd(_nested_vjp, setup_context=_nested_setup)
_nested_backward.register_autograd(_second_vjp, setup_context=_second_setup)


def _scans(impl: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Forward and backward of an implementation."""
    if impl == "triton":
        from rsa_kernels.fused.nested import scan_backward, scan_forward  # the import of Triton takes a second

        return scan_forward, scan_backward
    assert impl == "chunked", f"no scan is called {impl}"
    return _forward, _backward


def _given(*tensors: Maybe) -> Tensor:
    return next(t for t in tensors if t is not None)


# ---- in torch --------------------------------------------------------------------------------------------------------


def _forward(step_risk: Tensor, cu_seqlens: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    position = torch.arange(step_risk.shape[0], device=step_risk.device)
    end = cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True)]
    to_go = _discounted_sums(step_risk, end - position, discount)
    return to_go, torch.cat([to_go, to_go.new_zeros(1)])[_first_tokens(cu_seqlens, step_risk.shape[0])]


def _backward(grad_to_go: Maybe, grad_total: Maybe, cu_seqlens: Tensor, count: int, discount: float) -> Tensor:
    """The same sums, read backwards."""
    position = torch.arange(count, device=cu_seqlens.device)
    start = cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]
    upstream = _given(grad_to_go, grad_total).new_zeros(count + 1)  # one more for the empty sequences
    if grad_to_go is not None:
        upstream[:count] = grad_to_go
    if grad_total is not None:
        upstream.scatter_add_(0, _first_tokens(cu_seqlens, count), grad_total)
    return _discounted_sums(upstream[:count].flip(0), (position - start + 1).flip(0), discount).flip(0)


def _first_tokens(cu_seqlens: Tensor, count: int) -> Tensor:
    """First token of each sequence; `count`, one past the last token, for an empty one."""
    return torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[:-1], count)


def _discounted_sums(values: Tensor, remaining: Tensor, discount: float) -> Tensor:
    """out_t = Σ_j discount^j · values_{t+j} over the `remaining_t` entries of the sequence from t on.

    Doubling: after k rounds every entry holds a window of 2^k. Dividing a cumulative sum by discount^t would underflow.
    """
    # fp32, rounded once at the end: in bf16 every round would round
    out, width = values.to(torch.promote_types(values.dtype, torch.float32), copy=True), 1
    while width < values.shape[0]:
        # a positive factor stays positive: 0 · inf would be nan
        factor = max(discount**width, torch.finfo(out.dtype).tiny) if discount > 0 else 0.0
        out[:-width] += torch.where(remaining[:-width] > width, factor * out[width:], 0.0)
        width *= 2
    return out.to(values.dtype)
