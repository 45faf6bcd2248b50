"""Losses against numbers worked by hand, and the identities that tie the family together."""

import math

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR

from rsa_lightning.losses import DPO, IPO, KTO, RSA, TDPO, SequenceStats


def stats(logratio, risk=None, baseline=None):
    as_tensor = lambda v: None if v is None else torch.tensor(v, dtype=torch.float64, requires_grad=True)
    return SequenceStats(as_tensor(logratio), as_tensor(risk), None if baseline is None else torch.tensor(baseline))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


CHOSEN, REJECTED = stats([2.0, -1.0], [0.5, 0.3]), stats([-1.0, 1.0], [1.5, 0.2])


def test_dpo_by_hand():
    """beta h = 0.5 (2 - -1) = 1.5 and 0.5 (-1 - 1) = -1; the loss is softplus of its negative."""
    terms = DPO(beta=0.5)(CHOSEN, REJECTED)
    assert terms.losses.tolist() == pytest.approx([softplus(-1.5), softplus(1.0)])
    assert (terms.chosen_rewards - terms.rejected_rewards).tolist() == pytest.approx([1.5, -1.0])


def test_rsa_by_hand():
    """h = 3 - 0.5 (1.5 - 0.5) = 2.5 and -2 - 0.5 (0.2 - 0.3) = -1.95, at beta 0.2."""
    terms = RSA(beta=0.2, risk_weight=0.5)(CHOSEN, REJECTED)
    assert terms.losses.tolist() == pytest.approx([softplus(-0.5), softplus(0.39)])


@pytest.mark.parametrize("loss", [DPO(beta=0.2), RSA(beta=0.2), RSA(beta=0.2, risk_weight=1, detach_chosen_risk=False)])
def test_margins_of_rewards_are_beta_h(loss):
    """-log sigmoid(margin) is the loss, whatever the risk weight."""
    terms = loss(CHOSEN, REJECTED)
    margins = terms.chosen_rewards - terms.rejected_rewards
    torch.testing.assert_close(torch.nn.functional.softplus(-margins), terms.losses.detach())
    assert not terms.chosen_rewards.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        DPO(beta=0.2),
        TDPO(beta=0.2),
        RSA(beta=0.2, risk_weight=0.3, label_smoothing=0.1),
        RSA(beta=0.2, risk_weight=0.7, detach_chosen_risk=False),
    ],
)
def test_the_ratio_of_gradients_is_the_one_that_is_said(loss):
    chosen, rejected = stats([2.0, -1.0], [0.5, 0.3]), stats([-1.0, 1.0], [1.5, 0.2])
    total = loss(chosen, rejected, offset=torch.tensor([0.1, 0.0])).losses.sum()
    for side, ratio in zip((chosen, rejected), loss.risk_over_logratio, strict=True):
        of_logratio, of_risk = torch.autograd.grad(total, side[:2], retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(of_risk, ratio * of_logratio)


def test_weight_zero_is_dpo():
    for a, b in zip(RSA(beta=0.3, risk_weight=0)(CHOSEN, REJECTED), DPO(beta=0.3)(CHOSEN, REJECTED), strict=True):
        assert torch.equal(a, b)


def test_kl_risk_is_tdpo():
    """RSA reads the risk it is given; on KL it is TDPO to the bit, and TDPO refuses anything else."""
    for version in (
        {"risk_weight": 1.0, "detach_chosen_risk": False},
        {"risk_weight": 0.5, "detach_chosen_risk": True},
    ):
        mine, theirs = RSA(beta=0.3, **version), TDPO(beta=0.3, **version)
        assert torch.equal(mine(CHOSEN, REJECTED).losses, theirs(CHOSEN, REJECTED).losses)
    TDPO(beta=0.3).check_risk(KL())
    with pytest.raises(ValueError, match="TDPO needs risk KL, got CVaR"):
        TDPO(beta=0.3).check_risk(CVaR(0.9))
    RSA(beta=0.3).check_risk(ERM(5.0))


@pytest.mark.parametrize(("detach", "expected"), [(True, None), (False, -1.0)])
def test_v2_gives_the_chosen_risk_no_gradient(detach, expected):
    """d loss / d SRR_w = -beta a sigmoid(-beta h) in v1, nothing in v2."""
    chosen, rejected = stats([0.0], [0.0]), stats([0.0], [0.0])
    RSA(beta=2.0, risk_weight=1.0, detach_chosen_risk=detach)(chosen, rejected).losses.sum().backward()
    assert chosen.risk.grad is None if expected is None else chosen.risk.grad.tolist() == [expected]
    assert rejected.risk.grad.tolist() == [1.0]


@pytest.mark.parametrize("loss", [DPO(beta=0.1), RSA(beta=0.1), TDPO(beta=0.1), RSA(beta=0.1, label_smoothing=0.2)])
def test_loss_is_log_two_where_policy_is_reference(loss):
    zero = stats([0.0, 0.0], [0.0, 0.0])
    assert loss(zero, zero).losses.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("loss", [DPO(beta=0.7), RSA(beta=0.7), RSA(beta=0.7, risk_weight=1, detach_chosen_risk=False)])
def test_swapping_the_responses_flips_the_margin(loss):
    there, back = loss(CHOSEN, REJECTED), loss(REJECTED, CHOSEN)
    torch.testing.assert_close(
        there.chosen_rewards - there.rejected_rewards, -(back.chosen_rewards - back.rejected_rewards)
    )
    # -log s(m) - -log s(-m) = -m
    torch.testing.assert_close((there.losses - back.losses).detach(), -(there.chosen_rewards - there.rejected_rewards))


def test_label_smoothing_is_a_mixture_of_both_orders():
    """cDPO: (1 - e) L(h) + e L(-h), e = 0.1."""
    smoothed = DPO(beta=0.5, label_smoothing=0.1)(CHOSEN, REJECTED).losses
    mixed = 0.9 * DPO(beta=0.5)(CHOSEN, REJECTED).losses + 0.1 * DPO(beta=0.5)(REJECTED, CHOSEN).losses
    torch.testing.assert_close(smoothed, mixed)


def test_target_is_the_probability_that_chosen_is_preferred():
    """Target 0 is the swapped pair; target 1/2 has its minimum at margin 0."""
    loss = RSA(beta=0.5)
    swapped = loss(CHOSEN, REJECTED, target=torch.zeros(2)).losses
    margins = (lambda t: t.chosen_rewards - t.rejected_rewards)(loss(CHOSEN, REJECTED))
    torch.testing.assert_close(swapped.detach(), torch.nn.functional.softplus(margins))
    even = DPO(beta=1.0)(x := stats([0.0]), stats([0.0]), target=torch.tensor([0.5])).losses
    even.sum().backward()
    assert x.logratio.grad.tolist() == [0.0]


def test_offset_asks_for_a_larger_margin():
    """SafeDPO: the logit is beta h - offset; 0.5 * 3 - 10 = -8.5."""
    terms = DPO(beta=0.5)(CHOSEN, REJECTED, offset=torch.tensor([10.0, 0.0]))
    assert terms.losses.tolist() == pytest.approx([softplus(8.5), softplus(1.0)])


def test_ipo_by_hand():
    """(h - 1/(2 beta))^2 with beta 0.25: (3 - 2)^2 and (-2 - 2)^2; an offset of 0.5 moves h by 2. Rewards are beta lr."""
    terms = IPO(beta=0.25)(CHOSEN, REJECTED)
    assert terms.losses.tolist() == [1.0, 16.0]
    assert terms.chosen_rewards.tolist() == [0.5, -0.25]
    assert terms.rejected_rewards.tolist() == [-0.25, 0.25]
    assert IPO(beta=0.25)(CHOSEN, REJECTED, offset=torch.full((2,), 0.5)).losses.tolist() == [1.0, 36.0]
    assert IPO(beta=0.25)(CHOSEN, REJECTED, target=torch.tensor([0.0, 0.5])).losses.tolist() == [25.0, 8.0]


def test_kto_by_hand():
    """z0 = 0.5: desirable 1.5 (1 - s(0.4 (2 - 0.5))), undesirable 2 (1 - s(0.4 (0.5 - -1))); counts may differ.

    Rewards are beta lr, without weight and without z0.
    """
    chosen, rejected = stats([2.0, -1.0], baseline=0.5), stats([-1.0])
    terms = KTO(beta=0.4, desirable_weight=1.5, undesirable_weight=2.0)(chosen, rejected)
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    assert terms.losses.tolist() == pytest.approx(
        [1.5 * (1 - sigmoid(0.6)), 1.5 * (1 - sigmoid(-0.6)), 2 * (1 - sigmoid(0.6))]
    )
    assert terms.chosen_rewards.tolist() == pytest.approx([0.8, -0.4])
    assert terms.rejected_rewards.tolist() == pytest.approx([-0.4])


def test_kto_baseline_is_clamped_at_zero_and_carries_no_gradient():
    baseline = torch.tensor(-3.0, requires_grad=True)
    chosen = SequenceStats(torch.zeros(1, requires_grad=True), None, baseline)
    losses = KTO(beta=1.0)(chosen, SequenceStats(torch.zeros(0))).losses
    losses.sum().backward()
    assert losses.tolist() == [0.5]
    assert baseline.grad is None


def test_kto_refuses_pairwise_columns():
    with pytest.raises(ValueError, match="drop the `target` and `offset` columns"):
        KTO(beta=1.0)(stats([0.0], baseline=0.0), stats([0.0]), target=torch.ones(1))


@pytest.mark.parametrize("bad", [0, -0.1, math.inf, math.nan])
def test_a_temperature_must_be_positive(bad):
    for loss in (DPO, RSA, TDPO, IPO, KTO):
        with pytest.raises(ValueError, match=f"{loss.__name__} beta must be a positive number, got"):
            loss(beta=bad)


def test_a_loss_without_temperature_says_so():
    with pytest.raises(ValueError, match=r"RSA.beta is not set"):
        RSA()(CHOSEN, REJECTED)
    assert RSA().with_beta(0.2) == RSA(beta=0.2)


def test_parameters_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"risk_weight must be in \[0, 1\], got 1.5"):
        RSA(beta=1, risk_weight=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\], got 0.6"):
        DPO(beta=1, label_smoothing=0.6)
