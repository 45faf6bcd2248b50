"""CVaR's tail of a row: exact, whatever is tried on the way to it.

The oracle is a sort in float64. Sums in fp32 round, so a threshold may differ from the oracle's where the mass above it
is within rounding of what is wanted. Then the masses decide: what lies above the threshold is less than the tail, what
lies at it and above is not, up to SLACK of the tail. Where masses are 0 and 1 sums are exact, and so is all else.
"""

from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rsa_kernels import CVaR
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from rsa_kernels.fused.cvar import guess, tail_of_row, upper_quantile  # noqa: E402

# the interpreter computes with NumPy, which warns of the −inf − −inf of columns that do not exist
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
TAILS = [0.001, 0.1, 0.5, 0.97, 1 - 1e-6]
SLACK = 1e-6
BLOCK = 128


@triton.jit
def tail_kernel(
    z_ptr, r_ptr, hint_ptr, out_ptr, z_stride, r_stride, V: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, REF_SCALE: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row_ptr, r_row_ptr, hint_row_ptr = z_ptr + row * z_stride, r_ptr + row * r_stride, hint_ptr + 4 * row
    m_z, m_r = tl.load(hint_row_ptr), tl.load(hint_row_ptr + 1)
    mean, deviation = tl.load(hint_row_ptr + 2), tl.load(hint_row_ptr + 3)
    if COUNT:
        _, _, _, sweeps = upper_quantile(
            z_row_ptr, r_row_ptr, m_r, mean, deviation, V, TAIL, SCALE, SOFTCAP, REF_SCALE, REF_SOFTCAP, BLOCK_V, K
        )
        tl.store(out_ptr + 3 * row, sweeps.to(tl.float32))
    else:
        threshold, fraction, value = tail_of_row(
            z_row_ptr, r_row_ptr, m_z, m_r, mean, deviation, V, TAIL, SCALE, SOFTCAP, REF_SCALE, REF_SOFTCAP, BLOCK_V, K
        )
        tl.store(out_ptr + 3 * row, threshold)
        tl.store(out_ptr + 3 * row + 1, fraction)
        tl.store(out_ptr + 3 * row + 2, value)


class Tails(NamedTuple):
    threshold: Tensor  # [N]
    fraction: Tensor
    value: Tensor  # E over the tail of (r − m_r) − (z − m_z)


def hints(z: Tensor, r: Tensor) -> Tensor:
    """Mean and standard deviation of x = r − z under softmax r: [N, 2]."""
    x, p = r.double() - z.double(), r.double().softmax(-1)
    x = x.masked_fill(p == 0, 0.0)
    mean = (p * x).sum(-1, keepdim=True)
    return torch.cat([mean, (p * (x - mean) ** 2).sum(-1, keepdim=True).sqrt()], -1).float()


def capped(z: Tensor, softcap: float) -> Tensor:
    return torch.where(z == -INF, z, softcap * (z / softcap).tanh()) if softcap else z


def launch(
    z: Tensor, r: Tensor, tail: float, block=BLOCK, k=8, hint=None, scales=(1.0, 1.0), caps=(0.0, 0.0), count=False
) -> Tensor:
    logits = [capped(scale * x.float(), cap) for x, scale, cap in zip((z, r), scales, caps, strict=True)]
    maxima = torch.stack([x.amax(-1) for x in logits], -1).clamp(min=-3.4e38)  # where a search for maxima starts
    numbers = torch.cat([maxima, hints(*logits) if hint is None else hint.expand(len(z), 2)], -1).to(DEVICE)
    out = torch.full((len(z), 3), 777.0, device=DEVICE)
    tail_kernel[(len(z),)](
        z.to(DEVICE), r.to(DEVICE), numbers, out, z.stride(0), r.stride(0), z.shape[1], tail, scales[0], caps[0], scales[1], caps[1],
        block, k, count, num_warps=4, enable_fp_fusion=scales == (1.0, 1.0) and caps == (0.0, 0.0),
    )  # fmt: skip
    return out.cpu()


def tails(z: Tensor, r: Tensor, tail: float, **options) -> Tails:
    return Tails(*launch(z, r, tail, **options).unbind(-1))


def same_bits(one: Tails, other: Tails) -> bool:
    assert not any(numbers.isnan().any() for numbers in one), "nan equals nan, whatever went wrong"
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


def norm(z: Tensor) -> Tensor:
    """log Σ exp relative to the maximum, in float64: [N]."""
    return (z.double() - z.double().amax(-1, keepdim=True)).logsumexp(-1)


def outcomes(z: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """log p − log π and log p, as the definition computes them, in the dtype of the logits."""
    z, r = z - z.amax(-1, keepdim=True), r - r.amax(-1, keepdim=True)
    z_norm, r_norm = z.logsumexp(-1, keepdim=True), r.logsumexp(-1, keepdim=True)
    return (r - z) - (r_norm - z_norm), r - r_norm


def assert_exact(z: Tensor, r: Tensor, tail: float, found: Tails) -> None:
    """Risk and weights are as close to the definition in float64 as twice the definition in fp32 is, and 1e-6."""
    assert_holds_the_tail(z, r, tail, found)
    risk, key = CVaR(tail), r.float() - z.float()
    x, log_p = outcomes(z.double(), r.double())
    naive = outcomes(z.float(), r.float())
    share = (key > found.threshold[:, None]) + (key == found.threshold[:, None]) * found.fraction[:, None].double()
    for name, ours, rounded, exact in [
        ("risk", found.value.double() - norm(r) + norm(z), risk.value(*naive), risk.value(x, log_p)),
        ("weights", log_p.exp() * share / tail, risk.weights(*naive), risk.weights(x, log_p)),
    ]:
        error, allowed = (ours - exact).abs().max().item(), 2 * (rounded - exact).abs().max().item() + 1e-6
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


def assert_holds_the_tail(z: Tensor, r: Tensor, tail: float, found: Tails) -> None:
    """The threshold is an outcome with mass, less than the tail lies above it, and the fraction at it makes the tail."""
    key, mass = r.float() - z.float(), (r.double() - r.double().amax(-1, keepdim=True)).exp()
    above, at = ((mass * compare(key, found.threshold[:, None])).sum(-1) for compare in (torch.gt, torch.eq))
    wanted = tail * mass.sum(-1)
    assert (at > 0).all(), "the threshold is an outcome"
    assert ((found.fraction > 0) & (found.fraction <= 1)).all()
    assert (above <= wanted * (1 + SLACK)).all()
    assert (above + at >= wanted * (1 - SLACK)).all()
    torch.testing.assert_close(above + found.fraction * at, wanted, rtol=SLACK, atol=0)


def gaussian(n: int, v: int, noise: float = 0.5, deviation: float = 3.0) -> tuple[Tensor, Tensor]:
    z = deviation * torch.randn(n, v)
    return z, z + noise * torch.randn(n, v)


def uniform(like: Tensor, width: float) -> Tensor:
    return 2 * width * torch.rand_like(like) - width


FRONT, BACK, THIRD = slice(0, 150), slice(150, 300), slice(0, 300, 3)
KINDS = {
    "gaussian": lambda z, r: (z, r),
    "near": lambda z, r: (z, z + (r - z) / 1e4),
    "bf16": lambda z, r: (z.bfloat16(), r.bfloat16()),
    "fp16 and bf16": lambda z, r: (z.half(), r.bfloat16()),
    "two values": lambda z, r: (z.round(), z.round() + (r > z)),
    "ties": lambda z, r: (torch.full_like(z, 0.3), torch.full_like(r, 1.7)),
    "same": lambda z, r: (z, z),
    "one outcome": lambda z, r: (z, r.index_fill(1, torch.arange(299), -INF)),
    "peaked": lambda z, r: (z, r.index_fill(1, torch.tensor([7]), 30.0)),
    "60": lambda z, r: (uniform(z, 60), uniform(r, 60)),
    "1e4": lambda z, r: (uniform(z, 1e4), uniform(r, 1e4)),
    "offset": lambda z, r: (z + 1e4, r + 1e4),
    "offsets apart": lambda z, r: (z + 100, r - 100),
    "-inf in front": lambda z, r: (absent(z, FRONT), absent(r, FRONT)),
    "-inf at the end": lambda z, r: (absent(z, BACK), absent(r, BACK)),
    "-inf in the reference": lambda z, r: (z, absent(r, THIRD)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def rows(kind: str) -> tuple[Tensor, Tensor]:
    return KINDS[kind](*gaussian(2, 300))


def absent(logits: Tensor, columns: slice) -> Tensor:
    logits = logits.clone()
    logits[:, columns] = -INF
    return logits


@every_kind
@pytest.mark.parametrize("tail", TAILS)
def test_risk_and_weights_are_those_of_a_sort(kind, tail):
    z, r = rows(kind)
    assert_exact(z, r, tail, tails(z, r, tail))


@pytest.mark.parametrize("v", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 4099])
@pytest.mark.parametrize("tail", [0.1, 0.97])
def test_any_vocabulary(v, tail):
    z, r = gaussian(2, v)
    assert_exact(z, r, tail, tails(z, r, tail))


@pytest.mark.parametrize("tail", [0.01, 0.97])
def test_a_large_vocabulary(tail):
    z, r = gaussian(1, 151936)
    assert_exact(z, r, tail, tails(z, r, tail, block=16384 if DEVICE == "cpu" else 1024))


def test_small_masses_are_not_rounded_off_by_a_large_one():
    """Next to a mass of 1, additions of 1.1e-6 round to 1.2e-6: a chain of 149 tiles is off by 3e-6."""
    r = torch.full((1, 151936), 1.1e-6).log()
    r[0, 5] = 0.0
    z = torch.zeros_like(r)
    z[0, 1::2] = 1.0
    for tail in (0.5, 0.9):
        assert_holds_the_tail(z, r, tail, tails(z, r, tail, block=1024))


@every_kind
def test_bits_do_not_depend_on_how_many_thresholds_are_tried(kind):
    z, r = (x[:1] for x in rows(kind))
    for tail in (0.01, 0.5, 0.97):
        results = [tails(z, r, tail, block=512, k=k) for k in (4, 5, 8, 16)]
        assert all(same_bits(results[0], result) for result in results[1:])


@every_kind
def test_bits_do_not_depend_on_the_hint(kind):
    z, r = (x[:1] for x in rows(kind))
    for tail in (0.01, 0.97):
        good = tails(z, r, tail, block=512)
        for hint in [(torch.nan, torch.nan), (0, 0), (1e3, 1e-3), (-1e3, 1e30), (INF, 1), (0, INF), (-0.0, -1)]:
            assert same_bits(good, tails(z, r, tail, block=512, hint=torch.tensor(hint)))


@pytest.mark.parametrize("tail", [0.01, 0.5, 0.97])
@pytest.mark.parametrize(("front", "back"), [(0, 1), (0, 24), (0, 25), (0, 500), (0, 8200), (512, 0), (1024, 3)])
def test_columns_of_minus_infinity_change_no_bit(tail, front, back):
    """At the end, however many: they add 0 to sums that keep their order. In front, whole tiles in a group of tiles."""
    z, r = gaussian(1, 1000)
    wide = [torch.nn.functional.pad(x, (front, back), value=-INF) for x in (z, r)]
    assert same_bits(tails(z, r, tail, block=512), tails(*wide, tail, block=512))


def test_a_row_depends_neither_on_its_batch_nor_on_strides():
    z, r = gaussian(3, 300)
    together = tails(z, r, 0.1)
    wide_z, wide_r = torch.full((3, 411), 50.0), torch.full((3, 333), 50.0)
    wide_z[:, :300], wide_r[:, :300] = z, r
    assert same_bits(together, tails(wide_z[:, :300], wide_r[:, :300], 0.1))
    for i in range(3):
        assert same_bits(Tails(*(numbers[i : i + 1] for numbers in together)), tails(z[i : i + 1], r[i : i + 1], 0.1))


@pytest.mark.parametrize("tail", [1e-30, 1e-7, 1 - 1e-6, 1 - 1e-12, 1 - 2**-53])
def test_tails_up_to_the_ends(tail):
    """A tiny tail is the largest outcome; what rounds to 1 in fp32 is the whole row."""
    z, r = gaussian(2, 300)
    found = tails(z, r, tail)
    assert_exact(z, r, tail, found)
    assert torch.equal(found.threshold, (r - z).amax(-1) if tail < 1e-6 else (r - z).amin(-1)) or tail == 1 - 1e-6


def test_one_atom_is_split_in_proportion():
    """A policy equal to its reference, as in the first step of training. One sweep finds it, one encloses it."""
    z, _ = gaussian(2, 300)
    assert launch(z, z, 0.1, count=True)[:, 0].tolist() == [2, 2]
    for tail in (0.01, 0.97):
        found = tails(z, z, tail)
        assert found.threshold.tolist() == [0.0, 0.0]
        assert found.value.tolist() == [0.0, 0.0]
        torch.testing.assert_close(found.fraction, torch.full((2,), tail), rtol=1e-7, atol=0)


def test_zero_has_one_sign():
    """−0 and 0 tie, and whichever is found first the threshold is 0."""
    for zeros in ([0.0, -0.0, -0.0], [-0.0, -0.0, -0.0], [-0.0, 0.0, 0.0]):
        found = tails(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[*zeros, 0.0]]), 0.5)
        assert found.threshold.view(torch.int32).item() == 0
        assert found.fraction.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("unit", [1e-40, 1e-33, 2.0**-149, 1.0, 1e33])
@pytest.mark.parametrize("tail", [0.01, 0.25, 0.5, 0.97])
def test_outcomes_of_any_size_are_told_apart(unit, tail):
    """All masses are 1, so that the threshold is the ⌈tail · V⌉-th largest of x, multiples of `unit`, subnormal ones too."""
    x = (torch.randperm(256) - 128).float()[None] * unit
    z, r = (-x, torch.zeros(1, 256)) if unit > 1e-30 else (-x / 2, x - x / 2)  # masses are 1 at tiny logits
    found = tails(z, r, tail)
    assert found.threshold.item() == (r - z)[0].sort(descending=True).values[int(tail * 256 + 0.999) - 1].item()
    # what is wanted is rounded to fp32
    assert found.fraction.item() == pytest.approx(tail * 256 - int(tail * 256 + 0.999) + 1, rel=0, abs=256 * 6e-8)


@pytest.mark.parametrize("tail", [0.25, 0.5, 0.75])
def test_a_huge_range_does_not_hide_what_is_near_zero(tail):
    """Even parts of ±1e38 never reach 1e-38; halves by rank do."""
    size = torch.logspace(-38, 38, 128)
    x = torch.cat([size, -size])[torch.randperm(256)]
    z, r = -x[None], torch.zeros(1, 256)
    found = tails(z, r, tail)
    assert found.threshold.item() == x.sort(descending=True).values[int(tail * 256) - 1].item()
    assert found.fraction.item() == 1.0
    assert launch(z, r, tail, count=True)[0, 0] <= 33


@pytest.mark.parametrize("tail", [0.01, 0.97])
def test_the_search_is_short(tail):
    """Sweeps of rows like those of training, which decide what the kernel costs; the bound is one above what is seen."""
    for noise, dtype, most in [(0.1, torch.float32, 7), (0.1, torch.bfloat16, 5), (3.0, torch.float32, 8)]:
        z, r = gaussian(2, 4000, noise)
        sweeps = launch(z.to(dtype), r.to(dtype), tail, block=4096 if DEVICE == "cpu" else 1024, count=True)[:, 0]
        assert sweeps.max() <= most, f"{sweeps.tolist()} sweeps at a noise of {noise} in {dtype}"


def test_the_search_ends_without_a_hint():
    z, r = gaussian(2, 300)
    for mean in (torch.nan, 1e30):
        assert launch(z, r, 0.1, hint=torch.tensor([mean, 1.0]), count=True)[:, 0].max() <= 14


@pytest.mark.parametrize(("model", "logit"), [("z", torch.nan), ("r", torch.nan), ("z", INF), ("r", INF), ("r", -INF)])
def test_rows_with_nan_or_without_mass_end_and_are_nan(model, logit):
    z, r = gaussian(2, 300)
    (z if model == "z" else r)[0, 17 if logit != -INF else slice(None)] = logit
    assert tails(z, r, 0.1).value.isnan().tolist() == [True, False]
    assert launch(z, r, 0.1, count=True)[:, 0].max() <= 8


@pytest.mark.parametrize("tail", [0.001, 0.5, 0.97])
@pytest.mark.parametrize("mass", [1e-4, 0.6])
def test_a_policy_without_mass_in_the_tail_is_inf(tail, mass):
    """z = −inf is x = +inf: above the threshold, or the threshold itself."""
    z, r = gaussian(2, 300)
    r[:, 0] = r[:, 1:].logsumexp(-1) + torch.tensor(mass / (1 - mass)).log()
    z[:, 0] = -INF
    found = tails(z, r, tail)
    assert (found.value == INF).all()
    assert (found.threshold == INF).all() == (mass > tail)
    assert_holds_the_tail(z, r, tail, found)


def test_what_has_no_mass_may_be_anything():
    """An underflow to 0 included: z is −inf, inf − r and nan where r is −inf or 200 nats below."""
    z, r = gaussian(2, 300)
    keep = torch.arange(300) % 3 == 0
    z[:, 0] = 20.0  # the value is relative to the maxima
    r[:, ~keep] = -INF
    clean = tails(z, r, 0.1)
    assert same_bits(clean, tails(z.masked_fill(~keep, -INF), r, 0.1))
    assert same_bits(clean, tails(z, r.masked_fill(~keep, r.amax().item() - 200), 0.1))


@pytest.mark.parametrize("scales", [(0.3, 0.3), (2.0, 1.0)])
@pytest.mark.parametrize("caps", [(0.0, 0.0), (0.0, 5.0), (3.0, 5.0)])
def test_logits_are_scaled_then_capped_then_compared(scales, caps):
    """−inf columns stay absent: capped, they would have mass."""
    z, r = (absent(x, BACK) for x in gaussian(2, 300))
    found = tails(z, r, 0.1, scales=scales, caps=caps)
    z, r = (capped(scale * x.double(), cap) for x, scale, cap in zip((z, r), scales, caps, strict=True))
    exact = CVaR(0.1).value(*outcomes(z, r)) + norm(r) - norm(z)
    torch.testing.assert_close(found.value.double(), exact, rtol=0, atol=2e-6)


LOGITS = st.sampled_from([-INF, -3.0, -0.25, -0.0, 0.0, 0.25, 1.0, 1e4])
UNIT_ROWS = st.lists(st.tuples(st.booleans(), LOGITS), min_size=1, max_size=40)


def row_of(logits: list[float]) -> Tensor:
    """One width for all examples, so that a GPU compiles few kernels; what is added has no mass."""
    return torch.tensor([logits + [-INF] * (64 - len(logits))])


@settings(max_examples=50)
@given(UNIT_ROWS, st.sampled_from([1, 5, 16, 32, 37, 63]), st.sampled_from([4, 8]), st.sampled_from([16, 64]))
@example([(True, 0.25)], 1, 8, 16)
def test_with_masses_of_one_threshold_and_fraction_are_exact(row, sixty_fourths, k, block):
    """Against rational arithmetic, ties and outcomes of x = ∞ included."""
    x = sorted((-z for has_mass, z in row if has_mass), reverse=True)
    assume(x)
    wanted = Fraction(sixty_fourths, 64) * len(x)
    threshold = x[-(-wanted // 1) - 1]
    fraction = (wanted - sum(value > threshold for value in x)) / x.count(threshold)
    z, r = row_of([z for _, z in row]), row_of([0.0 if has_mass else -INF for has_mass, _ in row])
    found = tails(z, r, sixty_fourths / 64, k=k, block=block)
    assert found.threshold.item() == threshold
    assert found.fraction.item() == torch.tensor(float(fraction)).item()
    if x[0] < INF:
        excess = sum(Fraction(value) - Fraction(threshold) for value in x if value > threshold)
        value = float(Fraction(threshold) + excess / wanted + Fraction(z.max().item()))
        assert found.value.item() == pytest.approx(value, rel=3e-7, abs=1e-6)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-40, 0), st.integers(-3, 3)), min_size=1, max_size=60), st.sampled_from(TAILS))
def test_with_any_masses_the_tail_holds_its_mass(row, tail):
    """Discrete rows, so that most outcomes tie."""
    z, r = row_of([level / 4 - x for level, x in row]), row_of([level / 4 for level, _ in row])
    assert_holds_the_tail(z, r, tail, tails(z, r, tail, block=16))


@pytest.mark.parametrize("tail", TAILS)
def test_first_guesses_surround_the_normal_quantile_up_to_the_bounds_of_cantelli(tail):
    """They only save sweeps, so that nothing else would notice if they went wrong."""
    places = [float(guess(tail, k, 7)) for k in range(7)]
    assert places == sorted(places)
    odds = tail / (1 - tail)
    assert places[::3] == pytest.approx((-(odds**0.5), NormalDist().inv_cdf(1 - tail), odds**-0.5))
