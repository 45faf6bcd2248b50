"""Multipliers from samples: closed forms, exact laws, brute force over policies, and what is said where there is none."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from rsa_lightning.dual import dual_lambda, dual_value, law_of
from rsa_lightning.evaluation import tail as tails
from rsa_lightning.tail_dual import best_threshold, dual_cvar, hinge, threshold_at


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def one_prompt(costs: Tensor) -> Tensor:
    return torch.zeros(len(costs), dtype=torch.long)


def heavy(prompts: int, answers: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-normal costs less one, prompts of different danger."""
    generator = torch.Generator().manual_seed(seed)
    danger = torch.randn(prompts, 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
    noise = torch.randn(prompts, answers, generator=generator, dtype=torch.float64).mul(1.5).exp()
    return (danger * noise - 1).flatten(), torch.arange(prompts).repeat_interleave(answers)


# ------------------------------------------------------------------------------------------------------ the mean


def test_two_answers_have_a_closed_form():
    """Costs 0 and 1, budget 1/4, beta 1: the weights must be 3 to 1, so exp(λ) = 3."""
    found = dual_lambda(values(0, 1), torch.tensor([0, 0]), 0.25, 1.0)
    assert found.status == "found"
    assert found.lam == pytest.approx(math.log(3), abs=1e-12)
    assert found.temperature == pytest.approx(1 / math.log(3), abs=1e-12)
    assert found.expected_cost == pytest.approx(0.25, abs=1e-12)
    # w = (3/4, 1/4): 1 / (9/16 + 1/16) = 1.6 effective answers; m w = (1.5, .5) has variance 1/4
    assert (found.effective_mean, found.weight_variance) == pytest.approx((1.6, 0.25), abs=1e-12)
    assert found.interval is None


def test_two_prompts_share_one_multiplier():
    found = dual_lambda(values(0, 1, 0, 2), torch.tensor([0, 0, 1, 1]), 0.5, 0.1, resamples=10)
    assert found.lam == pytest.approx(0.041962, abs=5e-7)


def test_rewards_stand_for_the_first_step():
    """Method 14.4: the exact law π_r ∝ π_ref exp(r/β), here as rewards r + β log π_ref over a uniform sample."""
    costs, beta = values(0.3, 1.2, -0.4, 0.9), 0.5
    rewards = values(1, 2, 0, 0.5) + beta * values(0.1, 0.2, 0.3, 0.4)
    found = dual_lambda(costs, one_prompt(costs), 0.4, beta, rewards)
    assert found.before == pytest.approx(1.066357, abs=5e-7)
    assert found.lam == pytest.approx(1.201117, abs=5e-7)


def test_enumerated_atoms_are_exact():
    """An answer that is drawn k times has k times the mass: the slope at λ* is zero to ten digits under the exact law."""
    counts, atoms, beta = torch.tensor([5, 3, 1, 1]), values(0.2, 1.5, 4.0, 90.0), 0.7
    costs = atoms.repeat_interleave(counts)
    found = dual_lambda(costs, one_prompt(costs), 0.9, beta)
    weights = (counts.double() / 10).log().sub(found.lam * atoms / beta).softmax(0)
    assert (weights @ atoms).item() == pytest.approx(0.9, abs=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_of_the_cost_do_not_matter(scale):
    """λ is reward per cost: it scales by 1 / scale, and digits are not lost."""
    costs, prompts = heavy(6, 20)
    assert dual_lambda(scale * costs, prompts, scale * 0.1, 0.1, resamples=1).lam == pytest.approx(
        dual_lambda(costs, prompts, 0.1, 0.1, resamples=1).lam / scale, rel=1e-9
    )


def test_lambda_is_where_the_dual_is_smallest():
    costs, prompts = heavy(5, 12)
    lam = dual_lambda(costs, prompts, 0.3, 0.2, resamples=1).lam
    law = law_of(costs, prompts, 0.2)
    at, near = (dual_value(law.like(law.costs), values(x), 0.3, 0.2).item() for x in (lam, lam * 1.01))
    assert at < near
    assert at < dual_value(law, values(lam * 0.99), 0.3, 0.2).item()


def test_prompts_count_alike_however_many_answers_they_have():
    """Costs {0, 2} once and four times over: the same law."""
    once = dual_lambda(values(0, 1, 0, 2), torch.tensor([0, 0, 1, 1]), 0.5, 0.1, resamples=1)
    often = dual_lambda(values(0, 1, 0, 2, 0, 2, 0, 2), torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]), 0.5, 0.1, resamples=1)
    assert often.lam == pytest.approx(once.lam, rel=1e-10)


@pytest.mark.parametrize(
    ("budget", "status", "lam", "cost"),
    [
        (0.75, "met", 0.0, 0.75),  # equality is met
        (2.0, "met", 0.0, 0.75),
        (0.0, "unreachable", math.inf, 0.0),  # reached only by the limit λ = inf
        (-1.0, "unreachable", math.inf, 0.0),
    ],
)
def test_budgets_that_need_no_step_or_have_none(budget, status, lam, cost):
    found = dual_lambda(values(0, 1, 0, 2), torch.tensor([0, 0, 1, 1]), budget, 0.1, resamples=20)
    assert (found.status, found.lam, found.expected_cost) == (status, lam, cost)
    assert found.least_cost == 0
    assert found.temperature == (math.inf if status == "met" else 0.0)


def test_costs_that_do_not_differ_cannot_be_tilted():
    costs = torch.full((9,), 0.1, dtype=torch.float64)
    assert dual_lambda(costs, one_prompt(costs), 0.1, 1.0).status == "met"
    assert dual_lambda(costs, one_prompt(costs), 0.09, 1.0).status == "unreachable"


def test_the_interval_covers_the_multiplier_of_the_law():
    """80 samples of 40 prompts from one law of prompts: 95 % intervals should cover its λ about 76 times."""
    costs, prompts = heavy(20_000, 30)
    truth = dual_lambda(costs, prompts, 0.8, 0.1, resamples=1).lam
    covered = 0
    for i in range(80):
        part = slice(40 * 30 * i, 40 * 30 * (i + 1))
        low, high = dual_lambda(costs[part], prompts[part], 0.8, 0.1, resamples=200, seed=i).interval
        covered += low <= truth <= high
    assert 66 <= covered <= 80


def test_an_interval_is_repeatable_and_surrounds_its_estimate():
    costs, prompts = heavy(30, 20)
    first, again, other = (dual_lambda(costs, prompts, 0.5, 0.1, resamples=200, seed=s) for s in (0, 0, 1))
    assert first.interval == again.interval != other.interval
    assert first.interval[0] < first.lam < first.interval[1]
    assert first.warnings == []


def test_resamples_without_a_multiplier_are_counted():
    """Prompts {0, 1} and {0, 2} at budget .5: two times the first, with chance 1/4, and the budget is met."""
    found = dual_lambda(values(0, 1, 0, 2), torch.tensor([0, 0, 1, 1]), 0.5, 0.1, resamples=400)
    assert found.resamples_met == pytest.approx(100, abs=30)
    assert found.interval[0] == 0
    assert any(f"already met in {found.resamples_met} and" in text for text in found.warnings)


def test_few_effective_answers_are_called_that():
    costs, prompts = heavy(30, 20)
    found = dual_lambda(costs, prompts, -0.9, 0.1, resamples=10)
    assert found.effective_mean < 10
    assert "effective answers per prompt carry the estimate" in found.warnings[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((values(0, 1), torch.tensor([0, 0]), 0.5, 0.0), "beta: a temperature must be a positive number, got 0.0"),
        ((values(0, math.nan), torch.tensor([0, 0]), 0.5, 1.0), "costs: expected one finite number per answer, 2"),
        (
            (values(0, 1), torch.tensor([0, 0]), 0.5, 1.0, values(1, math.inf)),
            "rewards: expected one finite number per answer",
        ),
        ((values(0, 1), torch.tensor([0, 0]), math.inf, 1.0), "budget: expected a number"),
        ((values(), torch.tensor([], dtype=torch.long), 0.5, 1.0), "costs: there are none"),
    ],
)
def test_what_is_no_estimate_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dual_lambda(*arguments)


# ------------------------------------------------------------------------------------------------------ the tail


def best_policy(costs: Tensor, limit: float, tail: float, beta: float, points: int = 400) -> float:
    """max of −β KL(π ‖ uniform) with CVaR(c) <= limit, over a grid of policies of three answers."""
    share = torch.linspace(0, 1, points + 1, dtype=torch.float64)
    first, second = torch.meshgrid(share, share, indexing="ij")
    policies = torch.stack((first, second, 1 - first - second), -1)[first + second <= 1].clamp(min=0)
    kl = torch.xlogy(policies, policies).sum(-1) + math.log(3)
    kept = tails.cvar(costs, 1 - tail, policies) <= limit + 1e-12
    return (-beta * kl[kept]).max().item()


@pytest.mark.parametrize(("seed", "tail"), list(product(range(4), (0.2, 0.5, 0.9))))
def test_the_threshold_is_that_of_the_best_policy(seed, tail):
    costs = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    limit = (0.6 * costs.min() + 0.4 * tails.cvar(costs, 1 - tail)).item()
    found = best_threshold(law_of(costs, one_prompt(costs), 0.5), limit, tail, 0.5)
    assert found.value == pytest.approx(best_policy(costs, limit, tail, 0.5), abs=3e-3)
    # the Gibbs policy of the hinge has just that tail
    policy = (-found.lam * hinge(costs, found.eta, tail) / 0.5).softmax(0)
    assert tails.cvar(costs, 1 - tail, policy).item() == pytest.approx(limit, abs=1e-10)


def test_the_minimum_over_lambda_comes_before_the_maximum_over_eta():
    """Costs 0, 4, 5, CVaR_.25 <= 4.1. max over η of min over λ is what policies reach; the other order is .1 more."""
    costs, limit, tail, beta = values(0, 4, 5), 4.1, 0.25, 1.0
    law = law_of(costs, one_prompt(costs), beta)
    found = best_threshold(law, limit, tail, beta)
    assert found.value == pytest.approx(best_policy(costs, limit, tail, beta), abs=3e-3)
    lams = torch.logspace(-3, 2, 4000, dtype=torch.float64)
    curves = [
        dual_value(law.like(hinge(law.costs, eta, tail).expand(len(lams), -1, -1)), lams, limit, beta)
        for eta in (0.0, 4.0, 5.0)
    ]
    other_order = torch.stack(curves).amax(0).min().item()
    assert other_order > found.value + 0.1


def test_no_threshold_beats_the_one_found_among_many():
    """1200 distinct costs, more than are looked at together: every seventh of them by itself."""
    costs, prompts = heavy(30, 40)
    found = best_threshold(law_of(costs, prompts, 0.1), 9.0, 0.05, 0.1)
    etas = costs[costs <= 9].sort().values[::7].tolist()
    assert len(etas) > 140
    assert found.value >= max(dual_lambda_value(costs, prompts, eta, 9.0, 0.05, 0.1) for eta in etas) - 1e-12
    assert found.value == pytest.approx(dual_lambda_value(costs, prompts, found.eta, 9.0, 0.05, 0.1), rel=1e-10)


def dual_lambda_value(costs: Tensor, prompts: Tensor, eta: float, limit: float, tail: float, beta: float) -> float:
    hinged = hinge(costs, eta, tail)
    lam = dual_lambda(hinged, prompts, limit, beta, resamples=1).lam
    return -math.inf if math.isinf(lam) else dual_value(law_of(hinged, prompts, beta), values(lam), limit, beta).item()


def test_a_cvar_budget_is_checked_on_the_other_half():
    costs, prompts = heavy(40, 128)
    found = dual_cvar(costs, prompts, 6.0, 0.05, 0.1, resamples=100)
    assert found.dual.status == "found"
    assert found.before > found.limit
    assert found.checked == pytest.approx(6.0, rel=0.1)
    assert found.interval[0] < found.checked < found.interval[1]
    # by hand: the answers at odd places, reweighted
    other = costs.reshape(40, 128)[:, 1::2]
    weights = (-found.dual.lam * (other - found.eta).clamp(min=0) / (0.05 * 0.1)).softmax(-1) / 40
    assert found.checked == pytest.approx(tails.cvar(other.flatten(), 0.95, weights.flatten()).item(), rel=1e-10)
    above = weights[other > found.eta]
    assert found.tail_answers == pytest.approx((above.sum() ** 2 / (above**2).sum()).item())
    # and the fitted half keeps the budget exactly
    fitted = costs.reshape(40, 128)[:, ::2]
    weights = (-found.dual.lam * (fitted - found.eta).clamp(min=0) / (0.05 * 0.1)).softmax(-1) / 40
    assert tails.cvar(fitted.flatten(), 0.95, weights.flatten()).item() == pytest.approx(6.0, abs=1e-9)


def test_a_tail_of_the_whole_law_is_the_mean():
    """CVaR at tail 1 is the expectation: the same multiplier, and a threshold below every cost that matters."""
    costs, prompts = heavy(10, 40)
    fitted = costs.reshape(10, 40)[:, ::2].flatten()
    found = dual_cvar(costs, prompts, 0.8, 1.0, 0.1, resamples=10)
    mean = dual_lambda(fitted, torch.arange(10).repeat_interleave(20), 0.8, 0.1, resamples=1)
    assert found.dual.lam == pytest.approx(mean.lam, rel=1e-9)
    assert found.eta == fitted.min()


@pytest.mark.parametrize(("limit", "status"), [(1e4, "met"), (-0.99, "unreachable")])
def test_tails_that_need_no_step_or_have_none(limit, status):
    costs, prompts = heavy(10, 64)
    found = dual_cvar(costs, prompts, limit, 0.05, 0.1, resamples=10)
    assert found.dual.status == status
    assert found.checked is None


def test_a_tail_of_few_answers_is_called_that():
    costs, prompts = heavy(5, 20)
    found = dual_cvar(costs, prompts, 3.0, 0.05, 0.1, resamples=50)
    assert "20 answers per prompt, half of them to fit" in " ".join(found.warnings)
    assert "lie above the threshold: what the tail costs is a handful of events" in " ".join(found.warnings)


@pytest.mark.parametrize("tail", [0.0, 1.5, 95])
def test_a_tail_is_a_mass(tail):
    with pytest.raises(ValueError, match=r"tail is a probability mass in \(0, 1\], got"):
        dual_cvar(*heavy(3, 8), 1.0, tail, 0.1)


def test_one_answer_per_prompt_cannot_be_checked():
    with pytest.raises(ValueError, match="give each prompt two"):
        dual_cvar(values(0, 1), torch.tensor([0, 1]), 0.5, 0.5, 0.1)


def test_a_fixed_multiplier_has_its_threshold_too():
    """Against max over policies of −λ CVaR − β KL on a grid, and against G on a fine grid of η."""
    costs, lam, tail, beta = values(-1.0, 0.5, 3.0), 0.4, 0.3, 0.5
    found = threshold_at(costs, one_prompt(costs), lam, tail, beta)
    share = torch.linspace(0, 1, 401, dtype=torch.float64)
    first, second = torch.meshgrid(share, share, indexing="ij")
    policies = torch.stack((first, second, 1 - first - second), -1)[first + second <= 1].clamp(min=0)
    kl = torch.xlogy(policies, policies).sum(-1) + math.log(3)
    assert found.value == pytest.approx(
        (-lam * tails.cvar(costs, 1 - tail, policies) - beta * kl).max().item(), abs=1e-4
    )
    eta = torch.linspace(-1, 3, 2001, dtype=torch.float64)[:, None]
    curve = beta * (-lam * (costs - eta).clamp(min=0) / (tail * beta)).exp().mean(-1).log() - lam * eta[:, 0]
    assert found.value >= curve.max().item() - 1e-12
