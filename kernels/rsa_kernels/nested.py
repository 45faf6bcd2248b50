"""`nested_risk` along packed sequences, as vector operations; forward and backward are opaque custom operators."""

from typing import Any

import torch
from torch import Tensor

from rsa_kernels.naive import NestedRisk


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
