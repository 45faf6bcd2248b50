"""Nested risk along packed sequences: the scan equals the recursion, which is the nested risk of a tree."""

import numpy as np
import pytest
import torch
from rsa_kernels import ERM, CVaR, RiskMeasure, nested_risk
from rsa_kernels.nested import _nested_forward

LENGTHS = [[], [0], [1], [5], [3, 0, 4, 1], [0, 0, 2, 0], [17, 1, 16, 31, 32, 33]]
every_packing = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def packed(lengths: list[int], dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(sum(lengths), dtype=dtype), torch.tensor([0, *lengths]).cumsum(0)


def test_hand_worked():
    """1 + ½(2 + ½·4) = 3, 2 + ½·4 = 4, 4; an empty sequence; then 8."""
    result = nested_risk(torch.tensor([1.0, 2, 4, 8]), torch.tensor([0, 3, 3, 4]), discount=0.5)
    assert result.to_go.tolist() == [3, 4, 4, 8]
    assert result.total.tolist() == [3, 0, 8]


@every_packing
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.5, 0.0])
def test_scan_is_the_recursion(lengths, discount):
    """Values, and both upstream gradients at once."""
    x, cu_seqlens = packed(lengths)
    weights = torch.randn_like(x), torch.randn(len(lengths), dtype=x.dtype)
    results = []
    for impl in ("naive", "chunked"):
        leaf = x.clone().requires_grad_()
        result = nested_risk(leaf, cu_seqlens, discount=discount, impl=impl)
        loss = (weights[0] * result.to_go).sum() + (weights[1] * result.total).sum()
        (gradient,) = torch.autograd.grad(loss, leaf) if x.numel() else (torch.zeros_like(x),)
        results.append((result.to_go, result.total, gradient))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@every_packing
def test_undiscounted_total_is_the_sum(lengths):
    x, cu_seqlens = packed(lengths)
    sums = torch.stack([part.sum() for part in x.split(lengths)]) if lengths else x.new_empty(0)
    torch.testing.assert_close(nested_risk(x, cu_seqlens).total, sums, rtol=0, atol=1e-12)


def test_sequences_do_not_touch():
    """inf and nan in one sequence stay there."""
    x = torch.tensor([1.0, torch.nan, 2.0, 3.0, torch.inf])
    result = nested_risk(x, torch.tensor([0, 2, 4, 5]), discount=0.9)
    assert result.total[1].item() == pytest.approx(2 + 0.9 * 3)
    assert result.to_go[2:4].isfinite().all()


def test_long_sequences_keep_fp32_accuracy():
    """Dividing a cumulative sum by discount^t would be nan here: 0.9^1000 underflows."""
    x = torch.rand(4000)
    cu_seqlens = torch.tensor([0, 1000, 4000])
    for discount in (0.9, 1.0):
        exact = nested_risk(x.double(), cu_seqlens, discount=discount, impl="naive")
        ours = nested_risk(x, cu_seqlens, discount=discount)
        assert ((ours.to_go - exact.to_go).abs() <= 1e-6 * exact.to_go).all()


def test_gradients_are_finite_differences():
    x, cu_seqlens = packed([3, 0, 4])
    assert torch.autograd.gradcheck(lambda t: tuple(nested_risk(t, cu_seqlens, discount=0.7)), x.requires_grad_())


def test_operator_keeps_its_contract():
    x, cu_seqlens = packed([3, 0, 4])
    torch.library.opcheck(_nested_forward, (x.requires_grad_(), cu_seqlens, 0.7))


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


@pytest.mark.parametrize("impl", ["naive", "chunked"])
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


def test_discount_is_a_number():
    with pytest.raises(ValueError, match="discount is a number, got '0.9'"):
        nested_risk(torch.ones(3), torch.tensor([0, 3]), discount="0.9")
