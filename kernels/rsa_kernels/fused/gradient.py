"""The gradient of the policy logits, elementwise over rows and tiles, one formula for every risk.

With π = softmax z, p = softmax r and q the weights of the risk,

    dz_u = [g_logp (1[u = y] − π_u) + g_risk (π_u − q_u) + g_kl (π_u − p_u)] · slope of the softcap · scale

    q = p (KL), p exp(μ x) / E exp(μ x) (ERM), p / tail · (1 where x > threshold, share where x = threshold) (CVaR).
"""

import triton
import triton.language as tl

from rsa_kernels.fused.tiles import exp_of_difference, load_logits, tilted, unpack_rests


@triton.jit
def gradient_kernel(
    z_ptr, z_stride, r_ptr, r_stride, labels_ptr, g_logp_ptr, g_risk_ptr, g_kl_ptr, saved_ptr, out_ptr, out_stride,
    V: tl.constexpr, SAVED: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    RISK: tl.constexpr, MU: tl.constexpr, TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row · stride exceeds 2³¹
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = None if V % BLOCK_V == 0 else offs < V
    g_logp, g_risk, g_kl = upstream(g_logp_ptr, row), upstream(g_risk_ptr, row), upstream(g_kl_ptr, row)
    dz = tl.zeros((BLOCK_V,), tl.float32)
    if (g_logp != 0.0) | (g_risk != 0.0) | (g_kl != 0.0):  # else 0, whatever is in the row; nan is not 0
        saved_row = saved_ptr + row * SAVED
        norm_z, norm_r = tl.load(saved_row), 0.0
        if r_ptr is not None:
            norm_r = tl.load(saved_row + 2)
        rest_z, rest_r = unpack_rests(tl.load(saved_row + 1), norm_z, norm_r)
        z = load_logits(z_ptr + row * z_stride, offs, mask, SCALE, SOFTCAP)
        z_c = z - norm_z
        policy = exp_of_difference(z_c, rest_z)
        if r_ptr is not None:
            r = load_logits(r_ptr + row * r_stride, offs, mask, REF_SCALE, REF_SOFTCAP)
            r_c = r - norm_r
            probs = exp_of_difference(r_c, rest_r)
            # differences first: exactly 0 where the policy is the reference
            if g_risk_ptr is not None:
                q = probs
                if RISK == "erm" or RISK == "small_erm":
                    q = exp_of_difference(tilted(z_c, r_c, probs, MU) - tl.load(saved_row + 3), tl.load(saved_row + 4))
                if RISK == "cvar":
                    q *= tail_weight(r - z, tl.load(saved_row + 3), tl.load(saved_row + 4), TAIL)
                dz += g_risk * (policy - q)
            if g_kl_ptr is not None:
                dz += g_kl * (policy - probs)
        if g_logp_ptr is not None:
            label = tl.load(labels_ptr + row)
            label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)  # 64 bits would compare half as fast
            dz += g_logp * (tl.where(offs == label, 1.0, 0.0) - policy)
        if SOFTCAP > 0.0:  # 0 at columns that do not exist, where −inf would make it −inf
            dz *= tl.maximum(1.0 - (z / SOFTCAP) * (z / SOFTCAP), 0.0)
        if SCALE != 1.0:
            dz *= SCALE
    tl.store(out_ptr + row * out_stride + offs, dz.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def upstream(grad_ptr, row):
    """The gradient that reaches an output of a row, 0 where nothing depends on it."""
    grad = tl.full((), 0.0, tl.float32)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + row)
    return grad


@triton.jit
def tail_weight(x, threshold, share, TAIL: tl.constexpr):
    """1 / tail above the threshold, `share` where outcomes tie with it, 0 below."""
    return tl.where(x > threshold, 1.0 / TAIL, tl.where(x == threshold, share, 0.0))
