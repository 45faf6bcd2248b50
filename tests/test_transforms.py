"""Transforms of the cost by hand, and the claim they rest on: soft labels have one optimum, whatever their scale."""

import math

import pytest
import torch
from rsa_kernels import CVaR
from torch import Tensor

from rsa_lightning.losses import DPO, IPO, TDPO, PreferenceLoss, SequenceStats
from rsa_lightning.transforms import (
    CostTransform,
    Exponential,
    Hinge,
    Indicator,
    MeanCost,
    label_scale,
    soft_targets,
)

COSTS = torch.tensor([-0.5, 0.0, 1.0, 3.0, 40.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (MeanCost(), [-0.5, 0, 1, 3, 40]),
        (Indicator(0.0), [0, 0, 1, 1, 1]),  # at the threshold is not above it
        (Indicator(3), [0, 0, 0, 0, 1]),
        (Hinge(eta=1.0, tail=0.1), [0, 0, 0, 20, 390]),
        (Exponential(0.5), [2 * math.expm1(0.5 * c) for c in COSTS.tolist()]),
    ],
    ids=str,
)
def test_values_by_hand(transform: CostTransform, expected: list[float]) -> None:
    assert transform(COSTS).tolist() == pytest.approx(expected, rel=1e-12)
    assert transform(COSTS.float()).dtype == torch.float32
    assert transform.needs_anchor == (transform != MeanCost())


def test_the_mean_of_the_hinge_bounds_cvar_and_reaches_it_at_the_quantile() -> None:
    """min over eta of eta + E (c − eta)₊ / tail is CVaR (Rockafellar and Uryasev)."""
    probs = torch.tensor([0.3, 0.4, 0.15, 0.1, 0.05], dtype=torch.float64)
    for tail in (0.05, 0.1, 0.5, 1.0):
        cvar = CVaR(tail).value(COSTS, probs.log()).item()
        bounds = [eta + (probs @ Hinge(eta, tail)(COSTS)).item() for eta in [*COSTS.tolist(), 2.0, -3.0]]
        assert min(bounds) == pytest.approx(cvar, abs=1e-12)
        assert all(bound >= cvar - 1e-12 for bound in bounds)


def test_the_exponential_is_the_entropic_risk_and_at_small_mu_the_mean() -> None:
    probs = torch.tensor([0.3, 0.4, 0.15, 0.1, 0.05], dtype=torch.float64)
    mean = (probs @ Exponential(0.2)(COSTS)).item()
    entropic = torch.logsumexp(probs.log() + 0.2 * COSTS, -1).item() / 0.2
    assert math.log1p(0.2 * mean) / 0.2 == pytest.approx(entropic, rel=1e-12)
    assert (probs @ Exponential(1e-9)(COSTS)).item() == pytest.approx((probs @ COSTS).item(), rel=1e-7)


def test_an_overflow_names_the_cost_and_the_mend() -> None:
    costs = torch.tensor([1.0, 100.0, 200.0])
    with pytest.raises(
        ValueError, match=r"Exponential\(mu=1\): exp\(mu \* cost\) overflows at the cost 200: lower mu .*0.44"
    ):
        Exponential(1)(costs)
    assert Exponential(0.43)(costs).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hinge(tail=0), "Hinge tail is a probability mass in \\(0, 1\\], got 0"),
        (lambda: Hinge(tail=5), "Hinge tail is a probability mass"),
        (lambda: Hinge(eta=math.nan), "Hinge eta must be a finite number in units of cost, got nan"),
        (lambda: Indicator(math.inf), "Indicator threshold must be a finite number"),
        (lambda: Exponential(0), "Exponential mu is a positive number per unit of cost, got 0"),
    ],
)
def test_impossible_parameters_are_errors(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_scale_leaves_95_percent_of_the_labels_within_four_nats() -> None:
    """Of |Δ| = 1..100 the 95th is the quantile: s = 4/95, and 95 of the 100 logits are at most 4."""
    differences = torch.arange(1, 101).double() * torch.tensor([1.0, -1.0]).repeat(50)
    assert label_scale(differences) == pytest.approx(4 / 95)
    assert ((label_scale(differences) * differences).abs() <= 4 + 1e-12).sum() == 95
    assert label_scale(differences, share=0.5, largest=1.0) == pytest.approx(1 / 50)


def test_where_nearly_all_tie_the_largest_difference_sets_the_scale() -> None:
    assert label_scale(torch.tensor([0.0] * 99 + [-8.0])) == 0.5
    with pytest.raises(ValueError, match="no pair differs under this transform: choose another threshold"):
        label_scale(torch.zeros(7))
    with pytest.raises(ValueError, match="at least one pair"):
        label_scale(torch.zeros(0))


def test_labels_by_hand() -> None:
    """s = 2: ties ½; chosen cheaper by ½ σ(1); dearer by ½ σ(−1). IPO's labels are ½ + logit."""
    chosen, rejected = torch.tensor([1.0, 1.0, 1.5]), torch.tensor([1.0, 1.5, 1.0])
    sigma = 1 / (1 + math.exp(-1))
    assert soft_targets(chosen, rejected, 2.0).tolist() == pytest.approx([0.5, sigma, 1 - sigma])
    assert soft_targets(chosen, rejected, 0.25, IPO(0.1).target_at).tolist() == [0.5, 0.625, 0.375]


# ------------------------------------------------------------------------------- one prompt, five responses

REFERENCE = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
BETA, LAM = 0.5, 2.0


def optimum(loss: PreferenceLoss, targets: Tensor, steps: int = 200) -> Tensor:
    """The policy of free logits that minimises the loss over all pairs of responses, drawn by the reference."""
    logits = REFERENCE.log().clone().requires_grad_()
    i, j = torch.triu_indices(5, 5, 1)
    weights = REFERENCE[i] * REFERENCE[j]
    minimiser = torch.optim.LBFGS([logits], lr=1, max_iter=steps, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        minimiser.zero_grad()
        logratio = logits.log_softmax(-1) - REFERENCE.log()
        zero = torch.zeros_like(i, dtype=torch.float64)  # without risk TDPO is DPO
        sides = SequenceStats(logratio[i], zero), SequenceStats(logratio[j], zero)
        value = (weights * loss(*sides, target=targets).losses).sum()
        value.backward()
        return value

    minimiser.step(closure)
    return logits.detach().softmax(-1)


def gibbs(transform: CostTransform) -> Tensor:
    return (REFERENCE.log() - LAM / BETA * transform(COSTS)).softmax(-1)


def labelled(transform: CostTransform, s: float, loss: PreferenceLoss) -> Tensor:
    h = transform(COSTS)
    i, j = torch.triu_indices(5, 5, 1)
    return soft_targets(h[i], h[j], s, loss.target_at)


@pytest.mark.parametrize("s", [0.1, 1.3])
@pytest.mark.parametrize("loss", [DPO, IPO, TDPO])
@pytest.mark.parametrize("transform", [Hinge(1.0, 0.5), Indicator(0.5), Exponential(0.02)], ids=str)
def test_the_optimum_under_soft_labels_does_not_depend_on_their_scale(transform, loss, s) -> None:
    """π ∝ π_ref exp(−(λ/β) h) at temperature s β/λ. With costs to 40, h differs by up to 78: labels stay in doubles."""
    s = s / 10 if isinstance(transform, Hinge) else s
    made = loss(beta=s * BETA / LAM)
    found = optimum(made, labelled(transform, s, made), steps=2000)
    assert (found - gibbs(transform)).abs().max() < 1e-6


def test_hard_labels_have_another_optimum() -> None:
    """The cheaper response always preferred: unsafe mass goes to 0, where the optimum at λ/β = 4 has 1 %."""
    transform = Indicator(0.5)
    soft = labelled(transform, 1.0, DPO(1.0))
    exact = gibbs(transform)
    assert exact[:2].sum().item() == pytest.approx(0.65 / (0.65 + 0.35 * math.exp(-4)), abs=1e-12)
    hard = optimum(DPO(beta=BETA / LAM), (soft > 0.5).double() + 0.5 * (soft == 0.5).double())
    assert hard[2:].sum() < 1e-6
    assert exact[2:].sum().item() == pytest.approx(0.00977, abs=1e-5)


def test_saturated_labels_have_another_optimum() -> None:
    """Labels cut to [0.05, 0.95] at s = 4 act as if h differed by ln(19)/4 = 0.74 instead of 1.

    Unsafe mass 0.0276 instead of 0.0098; at s = 1 the cut reaches no label.
    """
    transform, unsafe = Indicator(0.5), {}
    for s in (1.0, 4.0):
        cut = labelled(transform, s, DPO(1.0)).clamp(0.05, 0.95)
        unsafe[s] = optimum(DPO(beta=s * BETA / LAM), cut)[2:].sum().item()
    assert unsafe[1.0] == pytest.approx(gibbs(transform)[2:].sum().item(), abs=1e-7)
    exact = 0.35 * 19**-1 / (0.65 + 0.35 * 19**-1)  # exp(−(λ/β) ln(19)/4) with λ/β = 4
    assert unsafe[4.0] == pytest.approx(exact, abs=1e-7)
    assert exact == pytest.approx(0.0276, abs=1e-4)


def test_a_share_in_percent_is_told_how_to_write_it():
    with pytest.raises(ValueError, match=r"Hinge tail is a probability mass in \(0, 1\], got 5: 5 % is 0\.05"):
        Hinge(eta=3.0, tail=5)
