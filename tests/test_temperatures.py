"""Stage temperatures against the one-step optimum they must reproduce."""

import math

import pytest
import torch

from rsa_lightning.temperatures import resolve_temperature, stage_betas

PRIOR = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
REWARD = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
COST = torch.tensor([0.3, 1.2, -0.4, 0.9], dtype=torch.float64)


def tilt(log_probs, score, beta):
    """argmax E[score] - beta KL(. || exp(log_probs)), as log-probabilities."""
    return (log_probs + score / beta).log_softmax(-1)


@pytest.mark.parametrize("order", ["reward first", "safety first"])
@pytest.mark.parametrize(("parametrization", "total"), [("total", 0.7), ("kl_on_cost", (1 + 2.5) * 0.7)])
def test_two_steps_reach_the_one_step_optimum(parametrization, total, order):
    betas = stage_betas(0.7, 2.5, parametrization)
    steps = [(REWARD, betas.reward), (-COST, betas.safety)]
    policy = PRIOR
    for score, beta in steps if order == "reward first" else reversed(steps):
        policy = tilt(policy, score, beta)
    torch.testing.assert_close(policy, tilt(PRIOR, REWARD - 2.5 * COST, total), rtol=0, atol=1e-14)


def test_the_printed_temperatures_solve_a_problem_with_a_smaller_multiplier():
    """rsa_paper at lam is `total` at lam / (1 + lam), so it can never weigh safety above reward."""
    betas = stage_betas(0.7, 2.5, "rsa_paper")
    assert betas == pytest.approx(stage_betas(0.7, 2.5 / 3.5, "total"))
    policy = tilt(tilt(PRIOR, REWARD, betas.reward), -COST, betas.safety)
    wanted = tilt(PRIOR, REWARD - 2.5 * COST, 0.7)
    assert (policy.exp() - wanted.exp()).abs().max() > 0.05


def test_sacpo_temperatures():
    assert stage_betas(0.1, 4.0) == pytest.approx((0.1, 0.025))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_temperature_and_multiplier_must_be_positive(bad):
    with pytest.raises(ValueError, match="beta: a temperature must be a positive number"):
        stage_betas(bad, 1.0)
    with pytest.raises(ValueError, match="lam: the multiplier must be a positive number"):
        stage_betas(1.0, bad)


def test_a_temperature_is_given_once():
    assert resolve_temperature("safety", None, 0.1, 4.0, "total") == pytest.approx(0.025)
    assert resolve_temperature("reward", None, 0.1, 4.0, "total") == pytest.approx(0.1)
    assert resolve_temperature("safety", 0.3, None, None, "total") == 0.3
    with pytest.raises(ValueError, match=r"given twice: loss.beta=0.3 and beta=0.1, lam=None"):
        resolve_temperature("safety", 0.3, 0.1, None, "total")
    with pytest.raises(ValueError, match=r"given twice: .*parametrization=rsa_paper"):
        resolve_temperature("safety", 0.3, None, None, "rsa_paper")
    with pytest.raises(ValueError, match=r"loss.beta: a temperature must be a positive number, got -1"):
        resolve_temperature("safety", -1, None, None, "total")


def test_unknown_parametrization_is_named():
    with pytest.raises(ValueError, match="must be total, kl_on_cost, rsa_paper, got 'other'"):
        stage_betas(0.1, 1.0, "other")
