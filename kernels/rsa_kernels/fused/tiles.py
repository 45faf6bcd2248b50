"""Parts of kernels: reading logits, and functions that Triton has in libdevice only, which its interpreter lacks."""

import triton
import triton.language as tl


@triton.jit
def load_logits(row_ptr, offs, mask, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits of a row in fp32, scaled and then capped (SOFTCAP 0 is none); −inf outside of `mask`, and −inf stays −inf.

    Forward and backward of CVaR compare differences of these bitwise: where they are scaled or capped, kernels must be
    compiled without fused multiply-add.
    """
    z = tl.load(row_ptr + offs, mask=mask, other=-float("inf")).to(tl.float32)
    if SCALE != 1.0:
        z = z * SCALE
    if SOFTCAP > 0.0:
        # after the cap −inf would be the finite −SOFTCAP: a column that does not exist would get mass
        z = tl.where(z == -float("inf"), z, SOFTCAP * tanh(z / SOFTCAP))
    return z


@triton.jit
def expm1(x):
    """exp(x) − 1, relative error about 3e-7: a polynomial near 0, where the difference has lost its digits."""
    near = x * (
        1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))))))
    )
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1, relative error about 3e-7: the rounding of 1 + x is divided out."""
    u = 1.0 + x
    rounded = u - 1.0
    return tl.where(rounded == 0.0, x, tl.log(u) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def tanh(x):
    t = expm1(-2.0 * tl.abs(x))
    magnitude = -t / (2.0 + t)
    return tl.where(x < 0.0, -magnitude, magnitude)
