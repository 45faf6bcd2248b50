"""The recursion along packed sequences: one program per sequence, block by block, carrying the running value.

    to_go_t = x_t + discount · to_go_{t+1}    from the last token of the sequence to the first
    h_t     = g_t + discount · h_{t−1}        from the first to the last: the gradient of x, where g is that of to_go

fp32 inside, rounded once to the dtype of x. What a sequence gets depends on nothing but its own tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens; the same for all lengths, since a sum must not depend on the batch that its sequence is in
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal fp32 number above 0


def scan_launch(discount: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and compiler options of both kernels."""
    return {"DISCOUNT": discount, "BLOCK": BLOCK}, {"num_warps": 4, "enable_fp_fusion": True}


def scan_forward(step_risk: Tensor, cu_seqlens: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """to_go [N], and total [S] = to_go at the first token of each sequence, 0 where there is none.

    A sequence whose bounds fall or leave [0, N] has the total nan, and a token in no sequence nan: an error would cost
    a sync.
    """
    step_risk, cu_seqlens = step_risk.contiguous(), cu_seqlens.contiguous()
    count, sequences = step_risk.shape[0], cu_seqlens.shape[0] - 1
    to_go, total = torch.full_like(step_risk, torch.nan), step_risk.new_empty(sequences)
    constants, options = scan_launch(discount)
    if sequences:
        with torch.cuda.device_of(step_risk):  # Triton launches on the current device, wherever the tensors are
            to_go_kernel[(sequences,)](step_risk, cu_seqlens, to_go, total, count, **constants, **options)
    return to_go, total


def scan_backward(
    grad_to_go: Tensor | None, grad_total: Tensor | None, cu_seqlens: Tensor, count: int, discount: float
) -> Tensor:
    """The gradient of step_risk [count]. An upstream gradient that is None is 0; one of the two is given."""
    cu_seqlens, sequences = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
    upstream = [None if g is None else g.contiguous() for g in (grad_to_go, grad_total)]
    grad = next(g for g in upstream if g is not None).new_full((count,), torch.nan)
    constants, options = scan_launch(discount)
    if sequences:
        with torch.cuda.device_of(grad):
            gradient_kernel[(sequences,)](*upstream, cu_seqlens, grad, count, **constants, **options)
    return grad


# The alignment of a tensor and the divisibility of its size would choose other layouts, and so other sums.
_one_layout = {"do_not_specialize": ["count"], "do_not_specialize_on_alignment": [0, 1, 2, 3]}


@triton.jit(**_one_layout)
def to_go_kernel(
    step_risk_ptr, cu_seqlens_ptr, to_go_ptr, total_ptr, count, DISCOUNT: tl.constexpr, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    first, end, valid = _bounds(cu_seqlens_ptr + sequence, count)
    running = tl.where(valid, 0.0, float("nan"))
    while end > first:
        offs = end - 1 - tl.arange(0, BLOCK)
        mask = offs >= first
        x = tl.load(step_risk_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        to_go = _recursion(x, running, DISCOUNT, BLOCK)
        tl.store(to_go_ptr + offs, to_go, mask=mask)
        end -= BLOCK
        running = tl.sum(tl.where(offs == tl.maximum(end, first), to_go, 0.0))
    tl.store(total_ptr + sequence, running)


@triton.jit(**_one_layout)
def gradient_kernel(
    grad_to_go_ptr, grad_total_ptr, cu_seqlens_ptr, grad_ptr, count, DISCOUNT: tl.constexpr, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    first, end, _ = _bounds(cu_seqlens_ptr + sequence, count)
    start = first
    running = 0.0
    while start < end:
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        upstream = tl.zeros([BLOCK], tl.float32)
        if grad_to_go_ptr is not None:
            upstream += tl.load(grad_to_go_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if grad_total_ptr is not None:
            upstream += tl.where(offs == first, tl.load(grad_total_ptr + sequence).to(tl.float32), 0.0)
        grad = _recursion(upstream, running, DISCOUNT, BLOCK)
        tl.store(grad_ptr + offs, grad, mask=mask)
        start += BLOCK
        running = tl.sum(tl.where(offs == start - 1, grad, 0.0))


@triton.jit
def _bounds(cu_seqlens_ptr, count):
    """First token and end of a sequence, which is empty where they are no bounds within [0, count]."""
    first, end = tl.load(cu_seqlens_ptr), tl.load(cu_seqlens_ptr + 1)
    valid = (first >= 0) & (first <= end) & (end <= count)
    return first, tl.where(valid, end, first), valid


@triton.jit
def _recursion(x, running, DISCOUNT: tl.constexpr, BLOCK: tl.constexpr):
    """y_i = x_i + DISCOUNT · y_{i−1} along a block, with y_{−1} = running."""
    factors, sums = tl.associative_scan((tl.full([BLOCK], DISCOUNT, tl.float32), x), 0, _compose)
    return sums + factors * running


@triton.jit
def _compose(a0, b0, a1, b1):
    """First y ↦ a0·y + b0, then y ↦ a1·y + b1. A product of positive factors stays positive: 0 · inf would be nan."""
    return tl.maximum(a0 * a1, tl.minimum(tl.minimum(a0, a1), SMALLEST)), a1 * b0 + b1
