"""The tail of a row without a sort: the threshold of CVaR, its fraction and its value, exact and deterministic.

The key is x = r − z with mass m = exp(r − m_r). F(t) = Σ_{x > t} m falls from the total mass F(−inf) to 0, in jumps at
values of x. The threshold is the value at which it passes A = tail · F(−inf): F(threshold) < A ≤ F(just below it).

A sweep over the row sums F at K thresholds in a bracket (lo, hi], F(hi) < A ≤ F(lo), and keeps the part that A falls
into, until that is a single float. Why it is done so:

- Sums of masses in a fixed order, rounded, still fall as t rises and still jump at values of x alone. So one value is
  the answer, and any search that ends on it returns the same bits, whatever K, the hint and the thresholds tried.
- The thresholds tried decide only how long it takes. The heaviest outcome of the bracket and the float below it are two
  of them: masses are uneven, and A mostly falls into such a jump, which then need not be parted from its neighbours.
  One halves the bracket in the order of floats: 33 sweeps end it whatever the range of x. The others part it evenly.
- Sums stay in their lanes to the end of a sweep: a reduction per tile and threshold would cost more than the sums. What
  a logit and threshold cost are a compare and a multiply-add by 0 or 1; all else is about 15 instructions per logit, so
  that more than 8 thresholds cost more than the sweeps they save.
- Lanes are summed in groups of tiles, then groups. In one chain of tiles the lane of a peaked outcome would round off
  what follows it: 3e-6 of the mass at a vocabulary of 150k, in groups at most 5e-7.
- The value takes one sweep of its own, over the excess beyond the threshold: errors of F then weigh the excess only,
  and no sweep has to sum it for K thresholds.
"""

# mypy: disable-error-code="assignment"
# tuples grow in loops that Triton unrolls

from statistics import NormalDist

import triton
import triton.language as tl

from rsa_kernels.fused.tiles import exp, load_logits

MOST_SWEEPS = tl.constexpr(40)  # never reached: after the first, 32 sweeps halve all floats to one


@triton.jit
def tail_of_row(
    z_row_ptr, r_row_ptr, m_z, m_r, mean, deviation, V: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Threshold, fraction of the mass at it that is in the tail, and E over the tail of d' = (r − m_r) − (z − m_z).

    `mean` and `deviation` of x under m tell where to look first; the result does not depend on them. The value of a row
    with nan is nan, and inf where the policy has no mass at an outcome of the tail.
    """
    threshold, fraction, wanted, _ = upper_quantile(
        z_row_ptr, r_row_ptr, m_r, mean, deviation, V, TAIL, SCALE, SOFTCAP, REF_SCALE, REF_SOFTCAP, BLOCK_V, K
    )
    # d' at the threshold; where that is inf, any finite number: inf − inf would be nan
    centre = tl.where(tl.abs(threshold) < float("inf"), threshold - (m_r - m_z), 0.0)
    total = tl.zeros([BLOCK_V], tl.float32)
    GROUP: tl.constexpr = group(BLOCK_V)
    FULL: tl.constexpr = V // GROUP * GROUP
    for first in range(0, FULL, GROUP):
        lanes = tl.zeros([BLOCK_V], tl.float32)
        for start in tl.range(0, GROUP, BLOCK_V, loop_unroll_factor=2):
            offs = first + start + tl.arange(0, BLOCK_V)
            z = load_logits(z_row_ptr, offs, None, SCALE, SOFTCAP)
            r = load_logits(r_row_ptr, offs, None, REF_SCALE, REF_SOFTCAP)
            lanes = add_excess(lanes, z, r, m_z, m_r, threshold, fraction, centre)
        total += lanes
    lanes = tl.zeros([BLOCK_V], tl.float32)
    for start in range(FULL, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        z = load_logits(z_row_ptr, offs, offs < V, SCALE, SOFTCAP)
        r = load_logits(r_row_ptr, offs, offs < V, REF_SCALE, REF_SOFTCAP)
        lanes = add_excess(lanes, z, r, m_z, m_r, threshold, fraction, centre)
    return threshold, fraction, centre + tl.div_rn(tl.sum(total + lanes), wanted)


@triton.jit
def add_excess(lanes, z, r, m_z, m_r, threshold, fraction, centre):
    """`lanes` + what is in the tail of the masses · (d' − centre)."""
    x = r - z
    mass = exp(r - m_r)
    share = tl.where(x > threshold, 1.0, tl.where(x == threshold, fraction, 0.0))
    # an outcome without mass may have any d', nan included
    return tl.fma(share * mass, tl.where(mass == 0.0, 0.0, (r - m_r) - (z - m_z) - centre), lanes)


@triton.jit
def upper_quantile(
    z_row_ptr, r_row_ptr, m_r, mean, deviation, V: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Threshold, fraction, mass of the tail, and how many sweeps that took."""
    tl.static_assert(K >= 4, "two thresholds enclose the heaviest outcome, one halves the bracket, one parts the rest")
    lo, hi = tl.full([], -float("inf"), tl.float32), tl.full([], float("inf"), tl.float32)
    at_lo, at_hi, wanted = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    thresholds = first_thresholds(lo, mean, deviation, TAIL, K)
    sweeps = 0
    searching = True
    while searching:
        masses, heaviest = sweep(
            z_row_ptr, r_row_ptr, m_r, thresholds, lo, hi, V, SCALE, SOFTCAP, REF_SCALE, REF_SOFTCAP, BLOCK_V, K
        )
        wanted = tl.where(sweeps == 0, TAIL * masses[0], wanted)  # the first threshold of all is −inf
        for k in tl.static_range(K):
            reached = (masses[k] >= wanted) & (thresholds[k] > lo)
            at_lo, lo = tl.where(reached, masses[k], at_lo), tl.where(reached, thresholds[k], lo)
            passed = (masses[k] < wanted) & (thresholds[k] < hi)
            at_hi, hi = tl.where(passed, masses[k], at_hi), tl.where(passed, thresholds[k], hi)
        sweeps += 1
        # one float is left; or the mass is 0 or nan, with which no comparison would ever end the search
        searching = (rank(lo) + 1 < rank(hi)) & (wanted > 0.0) & (sweeps < MOST_SWEEPS)
        thresholds = next_thresholds(lo, hi, heaviest, K)
    threshold = tl.where(wanted > 0.0, from_rank(rank(hi)), float("nan"))  # by way of the rank: −0 becomes 0
    return threshold, tl.div_rn(wanted - at_hi, at_lo - at_hi), wanted, sweeps


@triton.jit
def sweep(
    z_row_ptr, r_row_ptr, m_r, thresholds, lo, hi, V: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The mass above each of K thresholds, and the x of the largest mass in (lo, hi]."""
    zeros = tl.zeros([BLOCK_V], tl.float32)
    totals = (tl.zeros([BLOCK_V // 4], tl.float32),) * K
    most, heaviest = zeros, zeros
    GROUP: tl.constexpr = group(BLOCK_V)
    # no mask up to here: with one, rows whose vocabulary is odd would not load 8 bytes at once
    FULL: tl.constexpr = V // GROUP * GROUP
    for first in range(0, FULL, GROUP):
        lanes = (zeros,) * K
        for start in tl.range(0, GROUP, BLOCK_V, loop_unroll_factor=2):
            offs = first + start + tl.arange(0, BLOCK_V)
            z = load_logits(z_row_ptr, offs, None, SCALE, SOFTCAP)
            r = load_logits(r_row_ptr, offs, None, REF_SCALE, REF_SOFTCAP)
            lanes, most, heaviest = add_tile(lanes, most, heaviest, r - z, exp(r - m_r), thresholds, lo, hi, K)
        totals = add_lanes(totals, lanes, BLOCK_V, K)
    lanes = (zeros,) * K
    for start in range(FULL, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        z = load_logits(z_row_ptr, offs, offs < V, SCALE, SOFTCAP)
        r = load_logits(r_row_ptr, offs, offs < V, REF_SCALE, REF_SOFTCAP)
        lanes, most, heaviest = add_tile(lanes, most, heaviest, r - z, exp(r - m_r), thresholds, lo, hi, K)
    totals = add_lanes(totals, lanes, BLOCK_V, K)
    masses = ()
    for k in tl.static_range(K):
        masses += (tl.sum(totals[k]),)
    return masses, tl.max(tl.where(most == tl.max(most), heaviest, -float("inf")))


@triton.jit
def add_tile(lanes, most, heaviest, x, mass, thresholds, lo, hi, K: tl.constexpr):
    sums = ()
    for k in tl.static_range(K):
        sums += (tl.fma((x > thresholds[k]).to(tl.float32), mass, lanes[k]),)
    better = (mass > most) & (x > lo) & (x <= hi)
    return sums, tl.where(better, mass, most), tl.where(better, x, heaviest)


@triton.jit
def add_lanes(totals, lanes, BLOCK_V: tl.constexpr, K: tl.constexpr):
    """Four lanes to a total: as a rule the four of a thread, and 3K registers less."""
    sums = ()
    for k in tl.static_range(K):
        sums += (totals[k] + tl.sum(tl.reshape(lanes[k], [BLOCK_V // 4, 4]), 1),)
    return sums


@triton.jit
def first_thresholds(least, mean, deviation, TAIL: tl.constexpr, K: tl.constexpr):
    """−inf, for the total mass, and K − 1 guesses. Guesses that are nan or equal tell less, never anything wrong."""
    thresholds = (least,)
    for k in tl.static_range(K - 1):
        thresholds += (mean + deviation * guess(TAIL, k, K - 1),)
    return thresholds


@triton.jit
def next_thresholds(lo, hi, heaviest, K: tl.constexpr):
    """The middle of (lo, hi] by rank, even parts, and both ends of the heaviest outcome if that is inside."""
    bottom, top = rank(lo), rank(hi)
    inside = (heaviest > lo) & (heaviest <= hi)
    part = (hi - lo) * tl.where(inside, 1.0 / (K - 2), 1.0 / K)
    thresholds = (from_rank((bottom + top) // 2),)
    for k in tl.static_range(1, K):
        even = lo + k * part
        # even by rank where the bracket is infinite, or so wide or narrow that its parts are not within
        even = tl.where((even > lo) & (even < hi), even, from_rank(bottom + (top - bottom) * k // K))
        if k == K - 2:
            even = tl.where(inside, from_rank(rank(heaviest) - 1), even)
        if k == K - 1:
            even = tl.where(inside, heaviest, even)
        thresholds += (even,)
    return thresholds


@triton.jit
def rank(x):
    """The place of a float among all floats, int64: neighbours differ by 1, and both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


@triton.jit
def from_rank(place):
    magnitude = tl.abs(place).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(place >= 0, magnitude, -magnitude)


@triton.constexpr_function
def group(block):
    """Logits to a group of tiles: with tiles of 1024 and a vocabulary of 150k, 8 and then 19 terms make a sum."""
    return max(8192, block)


@triton.constexpr_function
def guess(tail, k, count):
    """Where the upper quantile may lie, in deviations from the mean: by the normal distribution and around it.

    The first guess and the last are Cantelli's bounds, which the quantile of no distribution exceeds.
    """
    least, most = -((tail / (1 - tail)) ** 0.5), ((1 - tail) / tail) ** 0.5
    if k in (0, count - 1):
        return least if k == 0 else most
    step = k - (count - 1) / 2
    distance = 0.1 * 4.0 ** (abs(step) - 1) if step else 0.0
    return min(max((distance if step > 0 else -distance) - NormalDist().inv_cdf(tail), least), most)
