"""The arithmetic of rows in Triton: outputs made, kernels launched. `pairs.py` says what the functions promise."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsa_kernels.fused.gradient import gradient_kernel
from rsa_kernels.fused.launch import gradient_launch, saved_count, statistics_launch
from rsa_kernels.fused.statistics import statistics_kernel
from rsa_kernels.pairs import Price, RowGradients, RowOptions, RowPair, RowStats

WARP_SIZE = 64 if torch.version.hip else 32


def rows_forward(
    z: Float[Tensor, "C V"], r: Float[Tensor, "C V"] | None, labels: Int[Tensor, " C"], options: RowOptions
) -> RowStats:
    """Statistics of every row; see `RowPair`."""
    count, vocabulary = z.shape
    constants, compiler = statistics_launch(options, vocabulary, r is not None, WARP_SIZE)
    # zeros, since the kernel leaves ignored rows alone
    saved = z.new_zeros((count, saved_count(options.risk)), dtype=torch.float32)
    outputs = {
        name: None if name in constants else z.new_zeros(count, dtype=torch.float32)
        for name in ("logp_ptr", "ref_logp_ptr", "risk_ptr", "kl_ptr", "entropy_ptr")
    }
    arguments = _logits("z", z) | _logits("r", r) | {"labels_ptr": labels.contiguous(), "saved_ptr": saved} | outputs
    if count:
        with torch.cuda.device_of(z):  # Triton launches on the current device, wherever the tensors are
            statistics_kernel[(count,)](**(arguments | constants), **compiler)
    logp, ref_logp, risk, kl, entropy = outputs.values()
    assert logp is not None, "every launch makes it"
    return RowStats(logp, ref_logp, risk, risk if kl is None else kl, entropy, saved)


def rows_backward(
    z: Float[Tensor, "C V"],
    r: Float[Tensor, "C V"] | None,
    labels: Int[Tensor, " C"],
    grads: RowGradients,
    saved: Float[Tensor, "C K"],
    options: RowOptions,
    out: Float[Tensor, "C V"],
) -> None:
    """The gradient of the policy logits; see `RowPair`."""
    count, vocabulary = z.shape
    given = grads.logp is not None, grads.risk is not None, grads.kl is not None
    constants, compiler = gradient_launch(options, vocabulary, given, WARP_SIZE)
    upstream = {f"g_{name}_ptr": None if g is None else g.contiguous() for name, g in grads._asdict().items()}
    arguments = _logits("z", z) | _logits("r", r) | _logits("out", out) | upstream
    arguments |= {"labels_ptr": labels.contiguous(), "saved_ptr": saved.contiguous()}
    if count:
        grid = (count, -(-vocabulary // constants["BLOCK_V"]))
        with torch.cuda.device_of(z):
            gradient_kernel[grid](**(arguments | constants), **compiler)


def price(vocabulary: int, dtype: torch.dtype, device: torch.device) -> Price:
    """Nothing beside what is passed in and out."""
    return Price(0, 0)


def _logits(name: str, logits: Tensor | None) -> dict[str, Any]:
    """Pointer and row stride."""
    return {f"{name}_ptr": logits, f"{name}_stride": 0 if logits is None else logits.stride(0)}


TRITON_ROWS = RowPair(rows_forward, rows_backward, saved_count, price)
