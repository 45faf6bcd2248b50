"""Parts of kernels: reading logits, and functions that Triton has in libdevice only, which its interpreter lacks."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_logits(row_ptr, offs, mask, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits of a row in fp32, scaled and then capped (SOFTCAP 0 is none); −inf outside of `mask`, and −inf stays −inf.
    Without a mask, None, all are inside.

    Forward and backward of CVaR compare differences of these bitwise: where they are scaled or capped, kernels must be
    compiled without fused multiply-add.
    """
    if mask is None:
        z = tl.load(row_ptr + offs).to(tl.float32)
    else:
        z = tl.load(row_ptr + offs, mask=mask, other=-float("inf")).to(tl.float32)
    if SCALE != 1.0:
        z = z * SCALE
    if SOFTCAP > 0.0:
        # after the cap −inf would be the finite −SOFTCAP: a column that does not exist would get mass
        z = tl.where(z == -float("inf"), z, SOFTCAP * tanh(z / SOFTCAP))
    return z


@triton.jit
def exp(x):
    """exp(x), 0 where it is below the smallest normal number: tl.exp would spend three more instructions on those."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def expm1(x):
    """exp(x) − 1, relative error about 3e-7: a polynomial near 0, where the difference has lost its digits."""
    near = x * (
        1.0 + x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))))))
    )
    return tl.where(tl.abs(x) < 0.5, near, exp(x) - 1.0)


@triton.jit
def expm1_excess(x):
    """exp(x) − 1 − x ≥ 0, relative error about 3e-7."""
    near = (x * x) * (
        0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))))
    )
    return tl.where(tl.abs(x) < 0.5, near, exp(x) - 1.0 - x)


@triton.jit
def log1p_deficit(x):
    """x − log(1 + x) ≥ 0 for x > −1, relative error about 3e-7: near 0 by the series of artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    t = s * s
    series = 1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13)))))
    return tl.where(tl.abs(x) < 0.5, s * (x - 2.0 * t * series), x - tl.log(1.0 + x))


@triton.jit
def tanh(x):
    t = expm1(-2.0 * tl.abs(x))
    magnitude = -t / (2.0 + t)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def tilted(z_c, r_c, rest_z, rest_r, MU: tl.constexpr):
    """log p + μ x with x = log p − log π: the logarithm of ERM's weights but for their norm.

    Logits come less their log-normaliser in fp32, of which `rest_*` is what was rounded away. What has mass 0 counts
    where x is finite, since μ x may outweigh log p.
    """
    log_probs = r_c - rest_r
    x = (r_c - z_c) - (rest_r - rest_z)
    x = tl.where((exp(log_probs) > 0.0) | (tl.abs(x) < float("inf")), x, 0.0)
    return log_probs + MU * x


@triton.jit
def two_sum(a, b):
    """a + b, and what rounding took from it, exactly (Knuth)."""
    total = a + b
    b_seen = total - a
    return total, (a - (total - b_seen)) + (b - b_seen)


@triton.jit
def pack_rests(norm_z, rest_z, norm_r, rest_r):
    """What rounding took from two sums, at most 2⁻²⁴ of them, as 16-bit fractions in the bits of one fp32."""
    return ((fraction(norm_z, rest_z) << 16) | (fraction(norm_r, rest_r) & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def fraction(norm, rest):
    scaled = tl.where(tl.abs(rest) > 0.0, rest / norm * 2.0**39, 0.0)
    return tl.minimum(tl.floor(scaled + 0.5), 32767.0).to(tl.int32)


@triton.jit
def unpack_rests(word, norm_z, norm_r):
    """The two rests that `pack_rests` packed, in fp32."""
    bits = word.to(tl.int32, bitcast=True)
    return (bits >> 16).to(tl.float32) * (norm_z * 2.0**-39), ((bits << 16) >> 16).to(tl.float32) * (norm_r * 2.0**-39)
