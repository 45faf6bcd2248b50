"""Nested risk along packed sequences: the scan equals the recursion, which is the nested risk of a tree."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from rsa_kernels import ERM, CVaR, RiskMeasure, nested, nested_risk
from torch.autograd import forward_ad

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from rsa_kernels.fused import nested as fused  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL_BLOCK = fused.BLOCK
LENGTHS = [[], [0], [1], [5], [3, 0, 4, 1], [0, 0, 2, 0], [17, 1, 16, 31, 32, 33]]
every_packing = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
every_impl = pytest.mark.parametrize("impl", ["chunked", "triton"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A sequence of a few dozen tokens takes several blocks."""
    monkeypatch.setattr(fused, "BLOCK", 16)


def packed(lengths: list[int], dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(sum(lengths), dtype=dtype).to(DEVICE)
    return x, torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def with_gradient(x, cu_seqlens, discount, impl, upstream) -> dict[str, torch.Tensor]:
    """to_go, total, and the gradient of their sums weighted by `upstream`, where either weight may be None."""
    leaf = x.clone().requires_grad_()
    result = nested_risk(leaf, cu_seqlens, discount=discount, impl=impl)
    loss = sum(
        (weight.to(x.dtype) * part).sum() for weight, part in zip(upstream, result, strict=True) if weight is not None
    )
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True) if x.numel() else (None,)
    gradient = torch.zeros_like(x) if gradient is None else gradient
    return {"to_go": result.to_go.detach(), "total": result.total.detach(), "gradient": gradient}


def assert_as_accurate(ours, naive, exact, eps: float) -> None:
    """|ours − exact| ≤ 2 · |naive − exact| + eps in the largest entry, by name."""
    for name in exact:
        if exact[name].numel():
            error, allowed = ((part[name] - exact[name]).abs().max().item() for part in (ours, naive))
            assert error <= 2 * allowed + eps, f"{name} is off by {error}, the definition by {allowed}"


@every_impl
def test_hand_worked(impl):
    """1 + ½(2 + ½·4) = 3, 2 + ½·4 = 4, 4; an empty sequence; then 8."""
    x, cu_seqlens = torch.tensor([1.0, 2, 4, 8], device=DEVICE), torch.tensor([0, 3, 3, 4], device=DEVICE)
    result = nested_risk(x.requires_grad_(), cu_seqlens, discount=0.5, impl=impl)
    assert result.to_go.tolist() == [3, 4, 4, 8]
    assert result.total.tolist() == [3, 0, 8]
    (gradient,) = torch.autograd.grad(result.total.sum() + 10 * result.to_go[1], x)
    assert gradient.tolist() == [1, 10.5, 5.25, 1]


@every_packing
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("upstream", ["both", "to_go", "total"])
@pytest.mark.parametrize(
    ("impl", "dtype"), [("chunked", torch.float64), ("chunked", torch.float32), ("triton", torch.float32)]
)
def test_scan_is_the_recursion(lengths, discount, upstream, impl, dtype):
    """Values, and the gradient from both outputs or from one, the other gradient being None."""
    x, cu_seqlens = packed(lengths, dtype)
    weights = [
        torch.randn(size, device=DEVICE) if upstream in ("both", name) else None
        for name, size in (("to_go", x.numel()), ("total", len(lengths)))
    ]
    exact = with_gradient(x.double(), cu_seqlens, discount, "naive", weights)
    naive = with_gradient(x, cu_seqlens, discount, "naive", weights)
    ours = with_gradient(x, cu_seqlens, discount, impl, weights)
    assert_as_accurate(ours, naive, exact, 1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("block", [REAL_BLOCK, 16])
@every_impl
def test_long_sequences_keep_fp32_accuracy(discount, block, impl, monkeypatch):
    """Dividing a cumulative sum by discount^t would be nan here: 0.9^1000 underflows."""
    monkeypatch.setattr(fused, "BLOCK", block)
    x, cu_seqlens = torch.rand(4000, device=DEVICE), torch.tensor([0, 1000, 4000], device=DEVICE)
    upstream = torch.rand(4000, device=DEVICE), torch.rand(2, device=DEVICE)
    exact = with_gradient(x.double(), cu_seqlens, discount, "naive", upstream)
    ours = with_gradient(x, cu_seqlens, discount, impl, upstream)
    for name in exact:
        assert ((ours[name] - exact[name]).abs() <= 1e-6 * exact[name]).all(), name


@every_packing
@every_impl
def test_undiscounted_total_is_the_sum(lengths, impl):
    """Of integers, whose sums are exact in fp32."""
    x, cu_seqlens = packed(lengths, torch.float32)
    x = (10 * x).round()
    sums = [part.sum().item() for part in x.split(lengths)] if lengths else []
    assert nested_risk(x, cu_seqlens, impl=impl).total.tolist() == sums


@every_impl
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_sequences_do_not_touch(impl, poison):
    """inf and nan in one sequence stay there, on the way back too; within it they reach what they should."""
    lengths = [2, 40, 1, 0, 35]
    x, cu_seqlens = packed(lengths, torch.float32)
    upstream = torch.randn(sum(lengths), device=DEVICE), torch.randn(len(lengths), device=DEVICE)
    clean = with_gradient(x, cu_seqlens, 0.9, impl, upstream)
    poisoned_x, poisoned_upstream = x.clone(), upstream[0].clone()
    poisoned_x[41] = poisoned_upstream[2] = poison  # the last token of the second sequence, the first one
    ours = with_gradient(poisoned_x, cu_seqlens, 0.9, impl, (poisoned_upstream, upstream[1]))
    for name, inside in (("to_go", slice(2, 42)), ("total", slice(1, 2)), ("gradient", slice(2, 42))):
        assert not ours[name][inside].isfinite().any()
        changed = torch.ones_like(ours[name], dtype=torch.bool)
        changed[inside] = False
        assert torch.equal(ours[name][changed], clean[name][changed])


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.0])
@every_impl
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
def test_an_infinite_step_is_infinite_from_afar(discount, impl, monkeypatch):
    """0.5^256 is 0 in fp32, and 0 · inf nan: the recursion never forms that product. With discount 0 it does."""
    monkeypatch.setattr(fused, "BLOCK", 256)
    x, cu_seqlens = torch.ones(700, device=DEVICE), torch.tensor([0, 700], device=DEVICE)
    x[-1] = torch.inf
    expected = nested_risk(x, cu_seqlens, discount=discount, impl="naive").to_go
    torch.testing.assert_close(nested_risk(x, cu_seqlens, discount=discount, impl=impl).to_go, expected, equal_nan=True)


@every_impl
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_a_sequence_alone_gets_what_it_gets_in_a_batch(impl, discount):
    """Bitwise, wherever it lies in memory."""
    lengths = [3, 40, 0, 17, 33, 1]
    x, cu_seqlens = packed(lengths, torch.float32)
    upstream = torch.randn(sum(lengths), device=DEVICE), torch.randn(len(lengths), device=DEVICE)
    batch = with_gradient(x, cu_seqlens, discount, impl, upstream)
    bounds = cu_seqlens.tolist()
    for s, (first, end) in enumerate(pairwise(bounds)):
        one = torch.tensor([0, end - first], device=DEVICE)
        alone = with_gradient(x[first:end], one, discount, impl, (upstream[0][first:end], upstream[1][s : s + 1]))
        assert torch.equal(alone["to_go"], batch["to_go"][first:end])
        assert torch.equal(alone["total"], batch["total"][s : s + 1])
        assert torch.equal(alone["gradient"], batch["gradient"][first:end])


@every_impl
def test_two_runs_are_bitwise_equal(impl):
    x, cu_seqlens = packed([17, 0, 50], torch.float32)
    upstream = torch.randn(67, device=DEVICE), torch.randn(3, device=DEVICE)
    first, second = (with_gradient(x, cu_seqlens, 0.9, impl, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_impl
def test_results_keep_the_dtype_and_are_rounded_once(impl):
    x, cu_seqlens = packed([70, 3], torch.bfloat16)
    upstream = torch.randn(73, device=DEVICE).bfloat16(), torch.randn(2, device=DEVICE).bfloat16()
    half = with_gradient(x, cu_seqlens, 0.9, impl, upstream)
    full = with_gradient(x.float(), cu_seqlens, 0.9, impl, upstream)
    # the interpreter truncates where a GPU rounds: one unit in the last place instead of half of one
    units = 1.0 if impl == "triton" and DEVICE == "cpu" else 0.5
    for name in full:
        assert half[name].dtype == torch.bfloat16
        assert ((half[name].float() - full[name]).abs() <= units * 2**-7 * full[name].abs()).all()


@every_impl
def test_strided_inputs_are_read_as_they_are(impl):
    x, cu_seqlens = packed([6, 4], torch.float32)
    columns = torch.stack([x, torch.full_like(x, torch.nan)], 1)
    weights = torch.ones(1, device=DEVICE).expand(10), torch.ones(1, device=DEVICE).expand(2)
    plain = with_gradient(x, cu_seqlens, 0.9, impl, weights)
    strided = nested_risk(columns.requires_grad_()[:, 0], cu_seqlens, discount=0.9, impl=impl)
    assert torch.equal(strided.to_go, plain["to_go"])
    assert torch.equal(strided.total, plain["total"])
    (gradient,) = torch.autograd.grad(strided.to_go.sum() + strided.total.sum(), columns)
    assert torch.equal(gradient[:, 0], plain["gradient"])


@every_impl
def test_boundaries_may_be_int32(impl):
    x, cu_seqlens = packed([6, 0, 4], torch.float32)
    results = [nested_risk(x, bounds, discount=0.9, impl=impl) for bounds in (cu_seqlens, cu_seqlens.int())]
    assert torch.equal(results[0].to_go, results[1].to_go)
    assert torch.equal(results[0].total, results[1].total)


@every_impl
def test_the_named_implementation_runs_and_an_unused_output_is_none_to_it(impl, monkeypatch):
    seen, (forward, backward) = [], nested._scans(impl)

    def note(grad_to_go, grad_total, *args):
        seen.append((grad_to_go is None, grad_total is None))
        return backward(grad_to_go, grad_total, *args)

    monkeypatch.setattr(nested, "_scans", {impl: (forward, note)}.__getitem__)
    x, cu_seqlens = packed([3, 4], torch.float32)
    with_gradient(x, cu_seqlens, 0.9, impl, (torch.ones(7, device=DEVICE), None))
    with_gradient(x, cu_seqlens, 0.9, impl, (None, torch.ones(2, device=DEVICE)))
    assert seen == [(False, True), (True, False)]


def test_gradients_are_finite_differences():
    x, cu_seqlens = packed([3, 0, 4])
    call = lambda t: tuple(nested_risk(t, cu_seqlens, discount=0.7, impl="chunked"))
    assert torch.autograd.gradcheck(call, x.requires_grad_())
    assert torch.autograd.gradgradcheck(call, x)


@every_impl
@pytest.mark.parametrize("output", ["to_go", "total"])
def test_second_derivatives_are_those_of_the_recursion(impl, output):
    """Of a loss that is not linear: the Hessian of Σ exp(output)."""
    x, cu_seqlens = packed([3, 0, 4], torch.float32)

    def hessian(name):
        loss = lambda t: getattr(nested_risk(t, cu_seqlens, discount=0.7, impl=name), output).exp().sum()
        return torch.autograd.functional.hessian(loss, x)

    torch.testing.assert_close(hessian(impl), hessian("naive"), rtol=1e-6, atol=1e-6)


@every_impl
def test_forward_mode_is_refused(impl):
    x, cu_seqlens = packed([3], torch.float32)
    with (
        pytest.raises(RuntimeError, match=r"forward-mode derivative .* with impl='naive' only"),
        forward_ad.dual_level(),
    ):
        nested_risk(forward_ad.make_dual(x, torch.ones_like(x)), cu_seqlens, impl=impl)


@every_impl
def test_operator_keeps_its_contract(impl):
    x, cu_seqlens = packed([3, 0, 4], torch.float32)
    torch.library.opcheck(nested._nested_forward, (x.requires_grad_(), cu_seqlens, 0.7, impl))
    grads = torch.randn(7, device=DEVICE, requires_grad=True), torch.randn(3, device=DEVICE, requires_grad=True)
    for pair in (grads, (None, grads[1]), (grads[0], None)):
        torch.library.opcheck(nested._nested_backward, (*pair, cu_seqlens, 7, 0.7, impl))


@every_impl
def test_compiled_in_one_graph_it_is_the_same(impl):
    """At two lengths, of which the second makes the sizes symbols."""

    def total(x, cu_seqlens):
        result = nested_risk(x, cu_seqlens, discount=0.9, impl=impl)
        return (result.total.square().sum() + result.to_go.sum()) * 2

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 0, 17], [5, 20], [9, 1, 1, 30]):
        x, cu_seqlens = packed(lengths, torch.float32)
        values, gradients = [], []
        for call in (total, compiled):
            leaf = x.clone().requires_grad_()
            values.append(call(leaf, cu_seqlens))
            gradients.append(torch.autograd.grad(values[-1], leaf)[0])
        assert torch.equal(*values)
        assert torch.equal(*gradients)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def compose_three(pairs_ptr, out_ptr):
    """(f ∘ g) ∘ h and f ∘ (g ∘ h)."""
    a0, b0, a1, b1 = tl.load(pairs_ptr), tl.load(pairs_ptr + 1), tl.load(pairs_ptr + 2), tl.load(pairs_ptr + 3)
    a2, b2 = tl.load(pairs_ptr + 4), tl.load(pairs_ptr + 5)
    a01, b01 = fused._compose(a0, b0, a1, b1)
    left_a, left_b = fused._compose(a01, b01, a2, b2)
    a12, b12 = fused._compose(a1, b1, a2, b2)
    right_a, right_b = fused._compose(a0, b0, a12, b12)
    tl.store(out_ptr, left_a)
    tl.store(out_ptr + 1, left_b)
    tl.store(out_ptr + 2, right_a)
    tl.store(out_ptr + 3, right_b)


def composed(*pairs: float) -> list[float]:
    out = torch.empty(4, device=DEVICE)
    compose_three[(1,)](torch.tensor(pairs, device=DEVICE), out)
    return out.tolist()


def test_what_is_scanned_is_associative():
    """A GPU composes in a tree; the interpreter from left to right, where nothing else would show."""
    # y ↦ .5y + 1, then ·.25 + 2, then ·.75 + 3
    assert composed(0.5, 1.0, 0.25, 2.0, 0.75, 3.0) == [0.09375, 4.6875] * 2


def test_factors_do_not_underflow_and_zero_stays_zero():
    smallest = torch.finfo(torch.float32).tiny
    assert composed(1e-30, 1.0, 1e-30, 1.0, 1e-30, 1.0)[::2] == [smallest] * 2
    assert composed(0.0, 1.0, 0.0, 2.0, 0.0, 3.0) == [0.0, 3.0] * 2


@pytest.mark.parametrize(
    ("bounds", "empty_or_nan", "uncovered"),
    [
        ([0, 4, 9], [1], [4, 5, 6]),  # ends beyond the tokens
        ([-2, 4, 7], [0], [0, 1, 2, 3]),
        ([0, 2**40, 7], [0, 1], [0, 1, 2, 3, 4, 5, 6]),
        ([0, 5, 3, 7], [1], []),  # falls
        ([2, 4, 6], [], [0, 1, 6]),
        ([3], [], [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_wrong_bounds_are_nan_and_read_nothing_else(bounds, empty_or_nan, uncovered):
    """On a GPU they cannot be checked without a sync. Only sequences within [0, N] are read."""
    memory = torch.full((40,), 1e9, device=DEVICE)
    x = memory[16:23].fill_(1.0)
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    to_go, total = fused.scan_forward(x, cu_seqlens, 1.0)
    assert total.isnan().nonzero().flatten().tolist() == empty_or_nan
    assert to_go.isnan().nonzero().flatten().tolist() == uncovered
    assert (to_go[~to_go.isnan()] <= 7).all()
    gradient = fused.scan_backward(x, torch.ones_like(total), cu_seqlens, 7, 1.0)
    assert gradient.isnan().nonzero().flatten().tolist() == uncovered
    assert (gradient[~gradient.isnan()] <= 8).all()


def test_triton_refuses_fp64_by_name():
    with pytest.raises(RuntimeError, match=r"the kernels take float32, bfloat16, float16, not float64"):
        nested_risk(*packed([3]), impl="triton")


# ---- why a sum along one path is a nested risk -----------------------------------------------------------------------

TREE_A = ((0.4, 0.3), (0.7, 0.6))  # returns; first token ½/½, second token .9/.1
TREE_B = ((0.4, 0.6), (0.7, 0.3))
FIRST, SECOND = (0.5, 0.5), (0.9, 0.1)


def lower_tail(risk: RiskMeasure, values, probs) -> torch.Tensor:
    """Risk-averse value of a return, −ρ(−return)."""
    return -risk.value(-torch.as_tensor(values, dtype=torch.float64), torch.tensor(probs, dtype=torch.float64).log())


def nested_value(risk: RiskMeasure, tree) -> float:
    return lower_tail(risk, [lower_tail(risk, leaves, SECOND).item() for leaves in tree], FIRST).item()


@pytest.mark.parametrize(
    ("risk", "a", "b"),
    [
        (CVaR(1.0), 0.54, 0.54),
        (CVaR(0.97), 0.535052, 0.532820),
        (CVaR(0.9), 0.522222, 0.513580),
        (CVaR(0.5), 0.38, 0.40),
        (ERM(5), 0.485776, 0.485776),
    ],
)
def test_trees_with_one_return_law_and_two_nested_risks(risk, a, b):
    assert nested_value(risk, TREE_A) == pytest.approx(a, abs=5e-7)
    assert nested_value(risk, TREE_B) == pytest.approx(b, abs=5e-7)


def test_nested_entropic_risk_is_the_static_one():
    returns, probs = [0.4, 0.3, 0.7, 0.6], [0.45, 0.05, 0.45, 0.05]
    assert nested_value(ERM(5), TREE_A) == pytest.approx(lower_tail(ERM(5), returns, probs).item(), abs=1e-12)


@pytest.mark.parametrize("risk", [CVaR(0.5), ERM(2)], ids=str)
def test_path_sum_is_the_literal_nested_form(risk):
    """Along the observed sequence R_{t+1} is a number, so ρ(cost + γ R_{t+1}) = ρ(cost) + γ R_{t+1}."""
    costs, log_probs, gamma = torch.randn(6, 9).double(), torch.randn(6, 9).double().log_softmax(-1), 0.8
    literal = torch.zeros((), dtype=torch.float64)
    for t in reversed(range(6)):
        literal = risk.value(costs[t] + gamma * literal, log_probs[t])
    ours = nested_risk(risk.value(costs, log_probs), torch.tensor([0, 6]), discount=gamma)
    torch.testing.assert_close(ours.total[0], literal, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["naive", "chunked", "triton"])
def test_discount_may_be_a_numpy_number(impl):
    x, cu_seqlens = packed([3, 2], torch.float32)
    results = [nested_risk(x, cu_seqlens, discount=d, impl=impl) for d in (np.float64(0.5), 0.5)]
    assert torch.equal(results[0].total, results[1].total)
    assert results[0].total.dtype == torch.float32


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [[0, 2], [1, 3], [0, 2, 1, 3], []])
def test_bounds_that_do_not_cover_the_tokens_are_named(bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens"):
        nested_risk(torch.ones(3), torch.tensor(bounds, dtype=torch.int64))


@pytest.mark.parametrize("discount", [-0.1, 1.1, float("nan")])
def test_discount_outside_the_unit_interval_is_refused(discount):
    with pytest.raises(ValueError, match=r"discount lies in \[0, 1\], got"):
        nested_risk(torch.ones(3), torch.tensor([0, 3]), discount=discount)


@pytest.mark.parametrize(
    ("step_risk", "bounds"), [(torch.ones(3, dtype=torch.int64), [0, 3]), (torch.ones(3), [0.0, 3.0])]
)
def test_dtypes_that_do_not_fit_are_named(step_risk, bounds):
    with pytest.raises(
        ValueError, match=r"step_risk are floats and cu_seqlens integers, got torch\.(int64|float32) and"
    ):
        nested_risk(step_risk, torch.tensor(bounds))


def test_discount_is_a_number():
    with pytest.raises(ValueError, match="discount is a number, got '0.9'"):
        nested_risk(torch.ones(3), torch.tensor([0, 3]), discount="0.9")
