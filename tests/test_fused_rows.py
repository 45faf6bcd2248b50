"""The Triton row kernels are the definition within rounding, whatever is in the rows, and give a row the same bits always.

In the interpreter where there is no GPU, with tiles so small that every row has many.
"""

import math
from itertools import product

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR, RiskMeasure, dispatch, naive, token_risk
from rsa_kernels.fused import launch
from rsa_kernels.fused.launch import Block
from rsa_kernels.fused.rows import TRITON_ROWS
from rsa_kernels.pairs import RowGradients, RowOptions, RowStats
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    dispatch.why_not_triton(torch.zeros(1, device=DEVICE), None) is not None, reason="Triton cannot run here"
)

TILE = 128
RISKS = [KL(), CVaR(0.01), CVaR(0.1), CVaR(0.5), CVaR(0.97), ERM(-1), ERM(1e-4), ERM(0.1), ERM(1), ERM(5), ERM(9), None]
every_risk = pytest.mark.parametrize("risk", RISKS, ids=str)
every_kind = pytest.mark.parametrize("risk", [KL(), CVaR(0.5), ERM(0.05), ERM(5), None], ids=str)
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
SUBSETS = [given for given in product([True, False], repeat=3) if any(given)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for kind in launch.STATISTICS:
        monkeypatch.setitem(launch.STATISTICS, kind, Block(TILE, TILE // 2, 256, None, TILE))
        monkeypatch.setitem(launch.CAPPED, kind, Block(TILE, TILE, 256, None, TILE // 2))
    monkeypatch.setattr(launch, "GRADIENT", Block(TILE, TILE, 256, None))


def logits(n: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A policy near its reference."""
    z = 3 * torch.randn(n, v)
    return z.to(dtype), (z + 0.3 * torch.randn(n, v)).to(dtype)


def row_options(risk=None, entropy: bool = False, **options) -> RowOptions:
    plain = {"scale": 1.0, "ref_scale": 1.0, "softcap": None, "ref_softcap": None, "ignore_index": -100}
    return RowOptions(risk=risk, entropy=entropy, **(plain | options))


def forward(z: Tensor, r: Tensor | None, labels: Tensor, options: RowOptions) -> RowStats:
    """By the kernels, on their device; results on the CPU."""
    stats = TRITON_ROWS.forward(z.to(DEVICE), None if r is None else r.to(DEVICE), labels.to(DEVICE), options)
    return RowStats._make(None if t is None else t.cpu() for t in stats)


def backward(z: Tensor, r: Tensor | None, labels: Tensor, grads, saved: Tensor, options: RowOptions) -> Tensor:
    z, labels, saved = z.to(DEVICE), labels.to(DEVICE), saved.to(DEVICE)
    grads = RowGradients(*(None if g is None else g.to(DEVICE) for g in grads))
    out = torch.full_like(z, torch.nan)
    TRITON_ROWS.backward(z, None if r is None else r.to(DEVICE), labels, grads, saved, options, out)
    return out.cpu()


def both(z: Tensor, r: Tensor | None, labels: Tensor, risk, upstream: Tensor, **options) -> dict[str, Tensor]:
    """Everything the pair computes for gradients [3, N] of logp, risk and kl, by name."""
    row = row_options(risk, **options)
    stats = forward(z, r, labels, row)
    grads = RowGradients(upstream[0], *(upstream[1:] if risk is not None else (None, None)))
    dz = backward(z, r, labels, grads, stats.saved, row)
    return {name: t for name, t in stats._asdict().items() if t is not None} | {"dz": dz}


def evaluate(z: Tensor, r: Tensor, labels: Tensor, risk, upstream: Tensor, impl: str, **options) -> dict[str, Tensor]:
    """Values, and the gradient of Σ upstream · (logp, risk, kl), of the public operator."""
    device = DEVICE if impl == "triton" else "cpu"
    leaf = z.detach().to(device).requires_grad_()
    stats = token_risk(leaf, r.to(device), labels.to(device), risk, impl=impl, **options)
    outputs = [o for o in (stats.logp, stats.risk, stats.kl) if o is not None]
    loss = sum((u.to(o) * o).sum() for u, o in zip(upstream, outputs, strict=False))
    (dz,) = torch.autograd.grad(loss, leaf)
    values = {name: t.detach() for name, t in stats._asdict().items() if t is not None}
    return {name: t.cpu() for name, t in (values | {"dz": dz}).items()}


def assert_definition(z: Tensor, r: Tensor, labels: Tensor, risk, **options) -> None:
    """|ours − exact| ≤ 2 |naive in the same dtype − exact| + ε in the largest entry, for every value and the gradient."""
    upstream = torch.randn(3, labels.numel())
    exact = evaluate(z.double(), r.double(), labels, risk, upstream, "naive", **options)
    plain = evaluate(z, r, labels, risk, upstream, "naive", **options)
    ours = evaluate(z, r, labels, risk, upstream, "triton", **options)
    assert ours.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        assert ours[name].dtype == plain[name].dtype, name
        if not truth.numel():
            continue
        error, naive_error = ((x[name].double() - truth).abs().max().item() for x in (ours, plain))
        allowed = 2 * naive_error + (EPSILON[z.dtype] if name == "dz" else 1e-6)
        if name == "dz" and z.dtype == torch.bfloat16 and DEVICE == "cpu":
            allowed += 2**-7 * truth.abs().max().item()  # the interpreter truncates: by less than a bf16 ulp
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}, naive is by {naive_error:.2e}"


# ---- the definition --------------------------------------------------------------------------------------------------


@every_risk
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_the_definition(risk, dtype):
    assert_definition(*logits(4, 300, dtype), torch.tensor([0, 299, -100, 17]), risk, entropy=True)


@every_kind
@pytest.mark.parametrize("vocabulary", [1, 7, TILE - 1, TILE, TILE + 1, 4099])
def test_every_vocabulary(risk, vocabulary):
    assert_definition(*logits(2, vocabulary), torch.tensor([vocabulary - 1, 0]), risk)


@every_kind
@pytest.mark.parametrize("count", [0, 1])
def test_every_count(risk, count):
    assert_definition(*logits(count, 200), torch.arange(count), risk, entropy=True)


@every_kind
def test_tiles_of_a_real_launch(risk, monkeypatch):
    """A vocabulary that ends within a tile, and several tiles before."""
    monkeypatch.undo()
    assert_definition(*logits(2, 20011, torch.bfloat16), torch.tensor([0, 20010]), risk, entropy=True)


KINDS = {
    "saturated": lambda z, r: (30 * z.sign(), 30 * r.sign()),
    "huge": lambda z, r: (1e4 * z.sign() + z, 1e4 * z.sign() + r),
    "ties": lambda z, r: (z.round(), z.round() + torch.randint(0, 3, r.shape)),
    "peaked": lambda z, r: (z.index_fill(1, torch.tensor([3]), 25.0), r.index_fill(1, torch.tensor([3]), 25.0)),
    # x = r − z without rounding: for CVaR the order of x is the result
    "offset": lambda z, r: ((256 * z).round() / 256 + 1000, (256 * r).round() / 256 - 1000),
    "rising": lambda z, r: (z + torch.arange(z.shape[1]) / 10, r + torch.arange(z.shape[1]) / 9),
    "falling": lambda z, r: (z - torch.arange(z.shape[1]) / 10, r - torch.arange(z.shape[1]) / 9),
    "crossing": lambda z, r: (z + torch.arange(z.shape[1]) / 10, r - torch.arange(z.shape[1]) / 9),
    "dropped": lambda z, r: (torch.where(z > 2, z - 60, z), r),  # exp(μ d) overflows for all but the smallest μ
    "padded behind": lambda z, r: (torch.where(COLUMNS < 150, z, -torch.inf), torch.where(COLUMNS < 150, r, -torch.inf)),
    "padded in front": lambda z, r: (torch.where(COLUMNS > 140, z, -torch.inf), torch.where(COLUMNS > 140, r, -torch.inf)),
    "lowest in front": lambda z, r: (z.where(COLUMNS > 140, LOWEST), r.where(COLUMNS > 140, LOWEST)),
    "absent in the reference": lambda z, r: (z, torch.where(COLUMNS % 3 == 0, r, -torch.inf)),
    "equal": lambda z, r: (z, z),
}  # fmt: skip
COLUMNS, LOWEST = torch.arange(400), torch.tensor(torch.finfo(torch.float32).min)


@every_risk
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_rows(risk, kind):
    z, r = KINDS[kind](*logits(3, 400))
    assert_definition(z, r, torch.tensor([147, 141, 144]), risk, entropy=True)


@pytest.mark.parametrize("risk", [KL(), ERM(-1), ERM(0.1), ERM(1), ERM(5), ERM(9)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_rows_in_half_precision(risk, kind):
    """ERM takes one sweep here where its terms are not too large, and a second one otherwise; fp32 always takes two."""
    z, r = (t.bfloat16() for t in KINDS[kind](*logits(3, 400)))
    assert_definition(z, r, torch.tensor([147, 141, 144]), risk, entropy=True)


@every_risk
@pytest.mark.parametrize(
    "options",
    [{"scale": 0.5}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 8.0, "ref_scale": 0.7, "ref_softcap": 6.0}],
    ids=str,
)
def test_scale_and_softcap(risk, options):
    assert_definition(*logits(3, 300), torch.tensor([5, -100, 299]), risk, entropy=True, **options)


@every_kind
def test_padding_stays_absent_under_a_softcap(risk):
    z, r = (torch.cat([t, torch.full((3, 30), -torch.inf)], 1) for t in logits(3, 300))
    assert_definition(z, r, torch.tensor([5, 0, 299]), risk, softcap=5.0, ref_softcap=7.0)


@every_kind
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_models_may_differ_in_dtype(risk, dtypes):
    z, r = (t.to(dtype) for t, dtype in zip(logits(3, 300), dtypes, strict=True))
    assert_definition(z, r, torch.tensor([5, -100, 299]), risk)


@every_kind
@pytest.mark.parametrize("given", SUBSETS, ids=str)
def test_gradients_that_nothing_depends_on_are_left_out(risk, given):
    """With all three, a gradient that is left out counts as 0; the reference is read where one but the first exists."""
    if risk is None and (given[1] or given[2]):
        pytest.skip("there is no risk")
    (z, r), labels, upstream = logits(3, 200), torch.tensor([0, 199, 7]), torch.randn(3, 3)
    options = row_options(risk)
    saved = forward(z, r, labels, options).saved
    grads = RowGradients(*(u if has else None for u, has in zip(upstream, given, strict=True)))
    ours = backward(z, r if grads.needs_reference else None, labels, grads, saved, options)
    leaf = z.double().requires_grad_()
    stats = naive.token_risk(leaf, r.double(), labels, risk)
    outputs = zip((stats.logp, stats.risk, stats.kl), upstream.double(), given, strict=True)
    (exact,) = torch.autograd.grad(sum((o * u).sum() for o, u, has in outputs if has), leaf)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-6)


def test_reference_may_be_absent():
    (z, r), labels = logits(4, 300), torch.tensor([0, 299, -100, 7])
    alone, paired = (forward(z, other, labels, row_options(entropy=True)) for other in (None, r))
    assert alone.ref_logp is alone.risk is alone.kl is None
    for name in ("logp", "entropy"):
        assert torch.equal(getattr(alone, name), getattr(paired, name)), name
    grads = RowGradients(torch.randn(4) * (labels >= 0), None, None)
    ours = [backward(z, None, labels, grads, stats.saved, row_options()) for stats in (alone, paired)]
    assert torch.equal(*ours)


# ---- limits and exact values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("risk", [r for r in RISKS if r], ids=str)
def test_policy_equal_to_its_reference_has_no_risk_and_no_gradient(risk, dtype):
    z, labels = logits(6, 333, dtype)[0], torch.tensor([0, 1, 2, 200, 300, 332])
    result = both(z, z.clone(), labels, risk, torch.stack([torch.zeros(6), torch.ones(6), torch.randn(6)]))
    assert torch.equal(result["logp"], result["ref_logp"])
    for name in ("risk", "kl", "dz"):
        assert (result[name] == 0).all(), f"{name}: {result[name].abs().max():.1e}"


@pytest.mark.parametrize("limit", [CVaR(1.0), ERM(0)], ids=str)
def test_limits_are_the_kl_bit_by_bit(limit):
    (z, r), labels, upstream = logits(3, 300), torch.tensor([0, 299, 7]), torch.randn(3, 3)
    ours, kl = (both(z, r, labels, risk, upstream) for risk in (limit, KL()))
    assert ours.keys() == kl.keys()
    for name in kl:
        assert torch.equal(ours[name], kl[name]), name
    assert torch.equal(kl["risk"], kl["kl"])


@pytest.mark.parametrize("risk", [KL(), ERM(0.05), ERM(5), CVaR(0.5)], ids=str)
def test_risk_is_infinite_where_the_policy_has_lost_an_outcome(risk):
    (z, r), labels = logits(3, 300), torch.tensor([0, 299, 7])
    r[1:, 150] = 12.0  # with mass, and it is in every tail
    z[1, 150] = -torch.inf
    z[2, :] -= torch.where(COLUMNS[:300] < TILE, torch.inf, 0.0)
    stats = forward(z, r, labels, row_options(risk))
    assert stats.risk.isfinite().tolist() == [True, False, False]
    for value in (stats.risk, stats.kl):
        assert value[1:].tolist() == [torch.inf, torch.inf]


def test_outcomes_without_mass_count_for_nothing():
    """Neither −inf in the reference, nor what its mass is too small for, makes nan of an infinite log-ratio."""
    (z, r), labels = logits(2, 300), torch.tensor([0, 7])
    z[:, 100], r[:, 100] = -torch.inf, -torch.inf
    z[:, 200], r[:, 200] = -torch.inf, -500.0
    z[:, 201], r[:, 201] = 0.0, -torch.inf
    for risk in RISKS:
        result = both(z, r, labels, risk, torch.randn(3, 2), entropy=True)
        assert all(t.isfinite().all() for name, t in result.items() if name != "saved"), risk
        assert (result["dz"][:, [100, 200]] == 0).all(), risk


@every_kind
def test_rows_without_any_logit_are_nan_and_alone(risk):
    (z, r), labels, upstream = logits(3, 300), torch.tensor([0, 299, 7]), torch.randn(3, 3)
    clean = both(z, r, labels, risk, upstream)
    z[1], r[1] = -torch.inf, -torch.inf
    result = both(z, r, labels, risk, upstream)
    assert result["logp"].isnan().tolist() == [False, True, False]
    for name, truth in clean.items():
        assert torch.equal(result[name][[0, 2]], truth[[0, 2]]), name


@every_kind
def test_label_outside_the_vocabulary_is_nan(risk):
    z, r = logits(4, 300)
    stats = forward(z, r, torch.tensor([300, -1, 299, 2**40]), row_options(risk))
    for value in (stats.logp, stats.ref_logp):
        assert value.isnan().tolist() == [True, True, False, True]


# ---- rows that nothing asks for --------------------------------------------------------------------------------------


@every_kind
def test_ignored_rows_are_not_read(risk):
    (z, r), labels = logits(3, 300), torch.tensor([-100, 7, -100])
    z[0], r[2] = torch.nan, torch.nan
    result = evaluate(z, r, labels, risk, torch.full((3, 3), torch.nan).index_fill(1, torch.tensor([1]), 1.0), "triton")
    for name, value in result.items():
        assert (value[[0, 2]] == 0).all(), name
        assert value[1].isfinite().all(), name
    stats = forward(z, r, torch.full((3,), -100), row_options(risk, entropy=True))
    assert all((t == 0).all() for t in stats if t is not None)


@every_kind
def test_rows_without_gradient_get_exact_zeros(risk):
    (z, r), labels, upstream = logits(4, 300), torch.tensor([0, 7, 9, 299]), torch.randn(3, 4)
    clean = both(z, r, labels, risk, upstream)["dz"]
    z[0], r[2] = torch.nan, torch.inf
    upstream[:, [0, 2]] = 0.0
    dz = both(z, r, labels, risk, upstream)["dz"]
    assert (dz[[0, 2]] == 0).all()
    assert torch.equal(dz[[1, 3]], clean[[1, 3]])


@every_kind
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_upstream_reaches_its_row_only(risk, which):
    if risk is None and which:
        pytest.skip("there is no risk")
    (z, r), labels, upstream = logits(3, 300), torch.tensor([0, 7, 299]), torch.zeros(3, 3)
    upstream[which, 1] = torch.nan
    dz = both(z, r, labels, risk, upstream)["dz"]
    assert dz[1].isnan().all()
    assert (dz[[0, 2]] == 0).all()


# ---- the same bits ---------------------------------------------------------------------------------------------------


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor], name_of_case: str = "") -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].nan_to_num(), other[name].nan_to_num()), f"{name} {name_of_case}"


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_gets_the_same_bits_in_every_batch_and_every_time(risk, dtype):
    (z, r), labels, upstream = logits(4, 300, dtype), torch.tensor([0, 7, 150, 299]), torch.randn(3, 4)
    batch = both(z, r, labels, risk, upstream, entropy=True)
    assert_same_bits(batch, both(z, r, labels, risk, upstream, entropy=True), "the second time")
    for i in range(4):
        row = slice(i, i + 1)
        alone = both(z[row].clone(), r[row].clone(), labels[row], risk, upstream[:, row], entropy=True)
        assert_same_bits(alone, {name: t[row] for name, t in batch.items()}, f"of row {i}")


@every_kind
@pytest.mark.parametrize("front", [0, TILE, 3 * TILE])
@pytest.mark.parametrize("behind", [0, 5, TILE + 1])
def test_padding_changes_no_bit(risk, front, behind):
    """Columns of −inf: any number behind, whole tiles in front."""
    (z, r), labels, upstream = logits(2, 300), torch.tensor([0, 299]), torch.randn(3, 2)
    padded = [torch.nn.functional.pad(t, (front, behind), value=-torch.inf) for t in (z, r)]
    plain = both(z, r, labels, risk, upstream, entropy=True)
    result = both(*padded, labels + front, risk, upstream, entropy=True)
    padding = torch.cat([result["dz"][:, :front], result["dz"][:, front + 300 :]], 1)
    assert (padding == 0).all()
    assert_same_bits(result | {"dz": result["dz"][:, front : front + 300]}, plain)


@every_kind
def test_rows_may_lie_apart(risk):
    """Any row stride, another one for each model and for the gradient; what lies between rows is left alone."""
    (z, r), labels, upstream = logits(3, 300), torch.tensor([0, 7, 299]), torch.randn(3, 3)
    plain = both(z, r, labels, risk, upstream)
    wide_z, wide_r, wide_out = (torch.full((6, width), torch.nan, device=DEVICE) for width in (301, 450, 333))
    wide_z[::2, 1:], wide_r[1::2, 20:320] = z.to(DEVICE), r.to(DEVICE)
    wide_out.fill_(5.0)
    views = wide_z[::2, 1:], wide_r[1::2, 20:320], wide_out[::2, 3:303]
    options, grads = row_options(risk), RowGradients(upstream[0].to(DEVICE), None, None)
    if risk is not None:
        grads = RowGradients(*upstream.to(DEVICE))
    stats = TRITON_ROWS.forward(*views[:2], labels.to(DEVICE), options)
    TRITON_ROWS.backward(*views[:2], labels.to(DEVICE), grads, stats.saved, options, views[2])
    values = {name: t.cpu() for name, t in stats._asdict().items() if t is not None}
    # other strides are loaded in other widths when compiled, and summed in another order
    tolerance = 0.0 if DEVICE == "cpu" else 1e-6
    for name, value in (values | {"dz": views[2].cpu()}).items():
        if name != "saved":
            torch.testing.assert_close(value, plain[name], rtol=0, atol=tolerance, msg=name)
    assert (wide_out.sum() - views[2].sum() - 5.0 * (wide_out.numel() - views[2].numel())).abs() < 1e-2


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_may_overwrite_the_logits(risk, dtype):
    (z, r), labels, upstream = logits(3, 300, dtype), torch.tensor([0, 7, 299]), torch.randn(3, 3)
    apart = both(z, r, labels, risk, upstream)
    options, grads = row_options(risk), RowGradients(*upstream.to(DEVICE))
    if risk is None:
        grads = RowGradients(grads.logp, None, None)
    place = z.to(DEVICE, copy=True)
    saved = apart["saved"].to(DEVICE)
    TRITON_ROWS.backward(place, r.to(DEVICE), labels.to(DEVICE), grads, saved, options, place)
    assert torch.equal(place.cpu(), apart["dz"])


@every_kind
def test_order_of_the_vocabulary_does_not_matter(risk):
    (z, r), labels, upstream = logits(3, 300), torch.tensor([0, 7, 299]), torch.randn(3, 3)
    order = torch.randperm(300)
    plain = both(z, r, labels, risk, upstream, entropy=True)
    shuffled = both(z[:, order], r[:, order], order.argsort()[labels], risk, upstream, entropy=True)
    for name in plain.keys() - {"saved", "dz"}:
        torch.testing.assert_close(shuffled[name], plain[name], rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(shuffled["dz"], plain["dz"][:, order], rtol=0, atol=2e-6)


# ---- what is kept, and how kernels are launched ----------------------------------------------------------------------


@every_risk
def test_at_most_five_numbers_are_kept(risk):
    z, r = logits(3, 50)
    saved = forward(z, r, torch.tensor([0, 7, 49]), row_options(risk)).saved
    assert saved.shape == (3, TRITON_ROWS.saved_count(risk))
    assert saved.shape[1] <= 5
    assert saved.dtype == torch.float32


def test_nothing_is_held_beside_what_is_passed():
    assert TRITON_ROWS.price(151936, torch.bfloat16, torch.device(DEVICE)) == (0, 0)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 31, 33, 1000, 4096, 4097, 50257, 151936])
def test_tiles_cover_the_vocabulary_without_waste(vocabulary, monkeypatch):
    monkeypatch.undo()
    for risk in RISKS:
        constants, _ = launch.statistics_launch(row_options(risk), vocabulary, True)
        gradient, _ = launch.gradient_launch(row_options(risk), vocabulary, (True, risk is not None, False))
        for tile in (constants["BLOCK_V"], constants["LANES"], constants["TAIL_BLOCK_V"], gradient["BLOCK_V"]):
            assert tile & (tile - 1) == 0
            assert tile < max(2 * vocabulary, 5)
        assert constants["BLOCK_V"] % constants["LANES"] == 0
        assert math.ceil(vocabulary / gradient["BLOCK_V"]) <= 65535


def test_products_are_not_fused_where_differences_must_be_the_same_in_forward_and_backward():
    for changed, fused in (({}, True), ({"scale": 0.5}, False), ({"ref_scale": 2.0}, False), ({"softcap": 5.0}, False)):
        options = row_options(CVaR(0.5), **changed)
        for _, compiler in (
            launch.statistics_launch(options, 1000, True),
            launch.gradient_launch(options, 1000, (True, True, True)),
        ):
            assert compiler["enable_fp_fusion"] is fused


def test_what_is_absent_is_named():
    """Ahead of time, kernels are compiled from these constants alone."""
    constants, _ = launch.statistics_launch(row_options(None), 1000, False)
    absent = {name for name, value in constants.items() if value is None}
    assert absent == {"r_ptr", "ref_logp_ptr", "risk_ptr", "kl_ptr", "entropy_ptr"}
    constants, _ = launch.gradient_launch(row_options(KL()), 1000, (True, False, False))
    assert {name for name, value in constants.items() if value is None} == {"r_ptr", "g_risk_ptr", "g_kl_ptr"}


def test_measures_that_the_kernels_do_not_know_are_an_error():
    class Unknown(RiskMeasure):
        weights = value = None

    with pytest.raises(ValueError, match="no kernel knows the risk measure"):
        launch.kind(Unknown())
