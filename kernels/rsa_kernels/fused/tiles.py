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
def exp_of_difference(x, shift):
    """exp(x − shift), with one multiply-add before the exponential; nothing is lost as long as `shift` is small."""
    return tl.exp2(x * LOG2_E - shift * LOG2_E)


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
def add_in_parts(a, b):
    """a + b as a number of 18 bits and the rest of it.

    Of logits in half precision, and of many others, a number that short can be subtracted without rounding.
    """
    total = a + b
    b_seen = total - a
    lost = (a - (total - b_seen)) + (b - b_seen)  # by rounding, exactly (Knuth)
    short = ((total.to(tl.int32, bitcast=True) + 32) & -64).to(tl.float32, bitcast=True)
    return short, (total - short) + lost


@triton.jit
def pack_rests(norm_z, rest_z, norm_r, rest_r):
    """The rests of two sums, at most 2⁻¹⁸ of them, as 16-bit fractions in the bits of one fp32."""
    return ((fraction(norm_z, rest_z) << 16) | (fraction(norm_r, rest_r) & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def fraction(norm, rest):
    scaled = tl.where(tl.abs(rest) > 0.0, rest / norm * 2.0**33, 0.0)
    return tl.minimum(tl.floor(scaled + 0.5), 32767.0).to(tl.int32)


@triton.jit
def unpack_rests(word, norm_z, norm_r):
    """The two rests that `pack_rests` packed, in fp32."""
    bits = word.to(tl.int32, bitcast=True)
    return (bits >> 16).to(tl.float32) * (norm_z * 2.0**-33), ((bits << 16) >> 16).to(tl.float32) * (norm_r * 2.0**-33)


@triton.jit
def tilted(z_c, r_c, probs, MU: tl.constexpr):
    """log p + μ (log p − log π), but for a constant, of logits less the log-normalisers.

    Outcomes of mass 0 count where the difference is finite, since μ times it may outweigh log p.
    """
    d = r_c - z_c
    return r_c + MU * tl.where((probs > 0.0) | (tl.abs(d) < float("inf")), d, 0.0)
