"""Statistics of every row, one program each: one sweep over its tiles, then, for CVaR, the selection of its tail.

With the maxima m of the row, z' = z − m_z, r' = r − m_r and d' = r' − z', the sums are

    s_z = Σ exp z'    s_r = Σ exp r'    drift = Σ exp(r') d'    cold = Σ exp(z') z'
    tilt = Σ exp(r' + μ d') for ERM, with small μ Σ exp(r') (exp(μ d') − 1 − μ d'), for CVaR Σ exp(r') d'²

    logp = (z_y − m_z) − log s_z    kl = drift / s_r − c, c = log s_r − log s_z    entropy = log s_z − cold / s_z

The maxima grow from tile to tile; what was summed relative to smaller ones is then moved. Sums are kept lane by lane to
the end of the row: reducing every one of them in every tile would cost more than all else.
"""

import triton
import triton.language as tl

from rsa_kernels.fused.cvar import tail_of_row
from rsa_kernels.fused.tiles import (
    add_in_parts,
    exp,
    exp_of_difference,
    expm1,
    expm1_excess,
    load_logits,
    log1p_deficit,
    pack_rests,
    tilted,
    unpack_rests,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of the finite numbers: a tile of −inf must not make inf − inf


@triton.jit
def statistics_kernel(
    z_ptr, z_stride, r_ptr, r_stride, labels_ptr, logp_ptr, ref_logp_ptr, risk_ptr, kl_ptr, entropy_ptr, saved_ptr,
    V: tl.constexpr, IGNORE_INDEX: tl.constexpr, SAVED: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    RISK: tl.constexpr, MU: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr, TAIL_BLOCK_V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row · stride exceeds 2³¹
    label = tl.load(labels_ptr + row)
    HAS_REF: tl.constexpr = r_ptr is not None
    ENTROPY: tl.constexpr = entropy_ptr is not None
    z_row = z_ptr + row * z_stride
    r_row = r_ptr + row * r_stride if HAS_REF else z_row
    if label != IGNORE_INDEX:
        z_y = label_logit(z_row, label, V, SCALE, SOFTCAP)
        # μ times what fp32 logits lose when maxima are subtracted would be too much: there ERM sums in a second sweep
        FP32: tl.constexpr = z_row.dtype.element_ty == tl.float32 or r_row.dtype.element_ty == tl.float32
        SUMS: tl.constexpr = "cvar" if RISK == "erm" and FP32 else RISK
        m_z, m_r, s_z, s_r, drift, tilt, cold = sweep(
            z_row, r_row, V, SCALE, SOFTCAP, REF_SCALE, REF_SOFTCAP, SUMS, MU, HAS_REF, ENTROPY, BLOCK_V, LANES
        )
        log_z, log_r = tl.log(s_z), tl.log(s_r)
        tl.store(logp_ptr + row, (z_y - m_z) - log_z)
        if ENTROPY:
            tl.store(entropy_ptr + row, log_z - tl.div_rn(cold, s_z))
        if HAS_REF:
            r_y = label_logit(r_row, label, V, REF_SCALE, REF_SOFTCAP)
            tl.store(ref_logp_ptr + row, (r_y - m_r) - log_r)
        # in two parts: logits of 1e4 would leave one fp32 three digits
        norm_z, rest_z = add_in_parts(m_z, log_z)
        norm_r, rest_r = add_in_parts(m_r, log_r)
        saved_row = saved_ptr + row * SAVED
        tl.store(saved_row, norm_z)
        rests = pack_rests(norm_z, rest_z, norm_r, rest_r)
        tl.store(saved_row + 1, rests)
        if RISK != "none":
            tl.store(saved_row + 2, norm_r)
        c = log_r - log_z
        kl = tl.div_rn(drift, s_r) - c
        if kl_ptr is not None:
            tl.store(kl_ptr + row, kl)
        if RISK == "kl":
            tl.store(risk_ptr + row, kl)
        if RISK == "erm" or RISK == "small_erm":
            value, top, log_norm = entropic(
                z_row, r_row, norm_z, norm_r, rests, s_r, c, drift, tilt,
                V, SCALE, SOFTCAP, REF_SCALE, REF_SOFTCAP, SUMS, MU, LANES,
            )  # fmt: skip
            tl.store(risk_ptr + row, value)
            tl.store(saved_row + 3, top)
            tl.store(saved_row + 4, log_norm)
        if RISK == "cvar":
            mean, deviation = moments(drift, tilt, s_r, m_r - m_z)
            threshold, fraction, value = tail_of_row(
                z_row, r_row, m_z, m_r, mean, deviation,
                V, TAIL, SCALE, SOFTCAP, REF_SCALE, REF_SOFTCAP, TAIL_BLOCK_V, K,
            )  # fmt: skip
            tl.store(risk_ptr + row, value - c)
            tl.store(saved_row + 3, threshold)
            tl.store(saved_row + 4, share_of_tie(fraction, TAIL))


@triton.jit
def sweep(
    z_row, r_row, V: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    RISK: tl.constexpr, MU: tl.constexpr, HAS_REF: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The two maxima and the five sums of a row. Those that nobody asked for are 0."""
    # Two dimensions, of which threads share the second only: sums over the first take no exchange between threads.
    offs = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    lowest, zeros = tl.full((), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
    state = lowest, lowest, zeros, zeros, zeros, zeros, zeros
    # The last tile apart: a mask in all of them would keep rows whose vocabulary is odd from loading 16 bytes at once.
    FULL: tl.constexpr = V // BLOCK_V * BLOCK_V
    for start in range(0, FULL, BLOCK_V):
        z = load_logits(z_row + start, offs, None, SCALE, SOFTCAP)
        r = load_logits(r_row + start, offs, None, REF_SCALE, REF_SOFTCAP) if HAS_REF else z
        state = add_tile(state, z, r, RISK, MU, HAS_REF, ENTROPY)
    if FULL < V:
        z = load_logits(z_row, FULL + offs, FULL + offs < V, SCALE, SOFTCAP)
        r = load_logits(r_row, FULL + offs, FULL + offs < V, REF_SCALE, REF_SOFTCAP) if HAS_REF else z
        state = add_tile(state, z, r, RISK, MU, HAS_REF, ENTROPY)
    m_z, m_r, s_z, s_r, drift, tilt, cold = state
    return m_z, m_r, tl.sum(s_z, 0), tl.sum(s_r, 0), tl.sum(drift, 0), tl.sum(tilt, 0), tl.sum(cold, 0)


@triton.jit
def add_tile(state, z, r, RISK: tl.constexpr, MU: tl.constexpr, HAS_REF: tl.constexpr, ENTROPY: tl.constexpr):
    """`state` with one more tile of logits, −inf where there are none."""
    n_z, n_r = maxima(z, r, HAS_REF)
    if (n_z > state[0]) | (n_r > state[1]):  # rare after the first tiles
        state = move(state, tl.maximum(n_z, state[0]), tl.maximum(n_r, state[1]), RISK, MU, ENTROPY)
    m_z, m_r, s_z, s_r, drift, tilt, cold = state
    z -= m_z
    z_mass = exp(z)
    s_z += tl.sum(z_mass, 0)
    if ENTROPY:
        cold += tl.sum(tl.where(z_mass > 0.0, z_mass * z, 0.0), 0)
    if HAS_REF:
        r -= m_r
        mass = exp(r)
        s_r += tl.sum(mass, 0)
        d = r - z
        if RISK == "erm" or RISK == "small_erm":  # what has mass 0 counts where it is finite: μ d' may outweigh r'
            d = tl.where((mass > 0.0) | (tl.abs(d) < float("inf")), d, 0.0)
        else:
            d = tl.where(mass > 0.0, d, 0.0)
        if RISK == "erm":
            tilt += tl.sum(exp(r + MU * d), 0)
        if RISK == "small_erm":
            tilt += tl.sum(mass * expm1_excess(MU * d), 0)
        if RISK == "cvar":
            tilt += tl.sum(mass * d * d, 0)
        if RISK != "none":
            drift += tl.sum(mass * d, 0)
    return m_z, m_r, s_z, s_r, drift, tilt, cold


@triton.jit
def move(state, n_z, n_r, RISK: tl.constexpr, MU: tl.constexpr, ENTROPY: tl.constexpr):
    """`state` relative to larger maxima. A sum that has become inf stays so, unless its masses have become 0."""
    m_z, m_r, s_z, s_r, drift, tilt, cold = state
    shift = (n_r - m_r) - (n_z - m_z)  # by which every d' falls
    f_z, f_r = exp(m_z - n_z), exp(m_r - n_r)
    if RISK == "erm":
        tilt *= exp(m_r - n_r - MU * shift)
    if RISK == "small_erm":
        k = -MU * shift
        tilt = f_r * (exp(k) * tilt + expm1(k) * MU * drift + expm1_excess(k) * s_r)
    if RISK == "cvar":
        tilt = f_r * (tilt - shift * (2.0 * drift - shift * s_r))
    if RISK != "none":
        drift = tl.where(f_r > 0.0, f_r * (drift - s_r * shift), 0.0)
    if ENTROPY:
        cold = tl.where(f_z > 0.0, f_z * (cold - s_z * (n_z - m_z)), 0.0)
    return n_z, n_r, f_z * s_z, f_r * s_r, drift, tilt, cold


@triton.jit
def maxima(z, r, HAS_REF: tl.constexpr):
    """Of both tiles by one exchange between threads, which waits once where two would wait twice."""
    n_z, n_r = tl.max(z, 0), tl.max(r, 0)
    if HAS_REF:
        n_z, n_r = tl.split(tl.max(tl.join(n_z, n_r), 0))
    else:
        n_z, n_r = tl.max(n_z, 0), tl.max(n_r, 0)
    return n_z, n_r


@triton.jit
def entropic(
    z_row, r_row, norm_z, norm_r, rests, s_r, c, drift, tilt, V: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr, MU: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The risk log E exp(μ x) / μ, and the logarithm of Σ exp `tilted`, the norm of the weights, in two parts.

    From the sum `tilt`, or by one more sweep where its terms are so large that they have lost digits, or are inf.
    """
    mean = tl.div_rn(drift, s_r)
    beyond = tl.div_rn(tilt, s_r)
    if SUMS == "small_erm":  # the KL and what is beyond it keep their digits, which the logarithm near 1 would not
        useful = MU * mean + beyond < 1.0
        value = (mean - c) + tl.div_rn(beyond - log1p_deficit(MU * mean + beyond), MU)
    elif SUMS == "erm":
        useful = beyond < 1e6
        value = tl.div_rn(tl.log(beyond), MU) - c
    else:  # where x has no spread the risk is its mean, exactly: that of a policy equal to its reference is 0
        useful = beyond == 0.0
        value = mean - c
    rest_z, rest_r = unpack_rests(rests, norm_z, norm_r)
    constant = rest_r + MU * (rest_r - rest_z)  # which `tilted` leaves out
    top, log_norm = tl.full((), 0.0, tl.float32), constant + MU * value
    if not useful:  # nan is not
        highest, total = tl.full((LANES,), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
        for start in range(0, V, LANES):
            offs = start + tl.arange(0, LANES)
            z = load_logits(z_row, offs, offs < V, SCALE, SOFTCAP)
            r = load_logits(r_row, offs, offs < V, REF_SCALE, REF_SOFTCAP)
            log_weight = tilted(z - norm_z, r - norm_r, exp_of_difference(r - norm_r, rest_r), MU)
            higher = tl.maximum(highest, log_weight)
            total = total * exp(highest - higher) + exp(log_weight - higher)
            highest = higher
        top = tl.max(highest, 0)
        log_norm = tl.log(tl.sum(total * exp(highest - top), 0))
        value = tl.where(top == float("inf"), top, tl.div_rn(top, MU) + tl.div_rn(log_norm - constant, MU))
    return value, top, log_norm


@triton.jit
def moments(drift, squares, s_r, centre):
    """Mean and standard deviation of x = d' + centre under the reference; finite, as they are but a hint."""
    mean = drift / s_r
    deviation = tl.sqrt(tl.maximum(squares / s_r - mean * mean, 0.0))
    finite = (tl.abs(mean) < float("inf")) & (deviation < float("inf"))
    return tl.where(finite, mean + centre, 0.0), tl.where(finite, deviation, 1.0)


@triton.jit
def share_of_tie(fraction, TAIL: tl.constexpr):
    """The weight of an outcome at the threshold over its probability. It is 1 where the whole row is one tie, rounding
    apart, and then exactly 1: a policy equal to its reference gets no gradient."""
    share = fraction / TAIL
    return tl.where(tl.abs(share - 1.0) < 4e-7, 1.0, share)


@triton.jit
def label_logit(row_ptr, label, V: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """nan where the label is outside of the vocabulary: an error would cost a sync."""
    inside = (label >= 0) & (label < V)
    logit = load_logits(row_ptr, tl.where(inside, label, 0), inside, SCALE, SOFTCAP)
    return tl.where(inside, logit, float("nan"))
