"""The multiplier meets the budgets; merging a cautious model with the reward-aligned one is a smaller multiplier."""

import math

import pytest
import torch

from benchmarks.theory.fixtures import bandit, coin, four_answers
from benchmarks.theory.multiplier import geometric, merges
from rsa_lightning.dual import dual_lambda
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    distance,
    expectation,
    gibbs,
    kl,
    lagrangian_optimum,
    mixture,
    multipliers,
    policy_of,
    sequence_logps,
)

every_size = pytest.mark.parametrize("size", [(0, 4, 3, 3), (1, 6, 3, 2), (2, 8, 4, 1), (3, 4, 5, 1)], ids=str)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mean_costs(world: TokenWorld, policy: Policy) -> torch.Tensor:
    return tensor(*(expectation(policy, cost) for cost in world.costs))


def dual_root(costs: torch.Tensor, budget: float, beta: float, rewards: torch.Tensor | None = None) -> float:
    """What `rsa dual` estimates from samples: one row of costs per prompt."""
    prompts = torch.arange(len(costs)).repeat_interleave(costs.shape[1])
    worth = None if rewards is None else rewards.flatten()
    return dual_lambda(costs.flatten(), prompts, budget, beta, worth, resamples=1).lam


# ----------------------------------------------------------------------------------------------------- one or several


def test_the_coin_by_hand():
    """Costs 0 and 1 alike: E c = 1/(1 + e^λ) = 1/4 at λ = ln 3."""
    assert float(multipliers(coin(), 1.0, tensor(0.25))) == pytest.approx(math.log(3), abs=1e-12)


def test_the_law_of_four_answers():
    world, beta = four_answers(), 0.5
    aligned = gibbs(world.reference, world.reward, beta)
    assert expectation(aligned, world.cost) == pytest.approx(1.066357, abs=5e-7)
    assert float(multipliers(world, beta, tensor(0.4))) == pytest.approx(1.201117, abs=5e-7)


@every_size
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_budget_is_met_exactly_or_the_multiplier_is_zero(size, beta):
    world = TokenWorld.random(*size)
    unconstrained = expectation(gibbs(world.reference, world.reward, beta), world.cost)
    for budget in (unconstrained - 0.01, unconstrained - 0.5, -0.8):
        lams = multipliers(world, beta, tensor(budget))
        assert lams.item() > 0
        assert expectation(lagrangian_optimum(world, beta, lams), world.cost) == pytest.approx(budget, abs=1e-9)
    assert multipliers(world, beta, tensor(unconstrained + 0.01)).item() == 0


@every_size
@pytest.mark.parametrize("constraints", [2, 3])
def test_several_budgets_and_complementary_slackness(size, constraints):
    """Every cost is within its budget, and a positive multiplier means that it is at its budget."""
    world, beta = TokenWorld.random(*size, constraints=constraints), 0.5
    start = mean_costs(world, gibbs(world.reference, world.reward, beta))
    seen = set()
    for budgets in (torch.full_like(start, -0.5), start.clone().index_fill_(0, torch.tensor([0]), -0.5), start + 0.1):
        lams = multipliers(world, beta, budgets)
        excess = mean_costs(world, lagrangian_optimum(world, beta, lams)) - budgets
        assert lams.min() >= 0
        assert excess.max() < 1e-9
        assert (lams * excess).abs().max() < 1e-9
        seen.add(int((lams > 0).sum()))
    assert {0, constraints} <= seen


def test_two_costs_that_are_one_share_a_multiplier():
    """A singular curvature: only the sum of the two multipliers is determined."""
    world = TokenWorld.random(0, 4, 3, 2)
    twice = TokenWorld(world.reference, world.reward, world.costs.repeat(2, 1, 1))
    found = multipliers(twice, 0.5, tensor(-0.5, -0.5))
    assert found.sum().item() == pytest.approx(multipliers(world, 0.5, tensor(-0.5)).item(), abs=1e-6)


@every_size
def test_the_constrained_optimum_is_worth_most_of_all_that_meet_the_budget(size):
    """Strong duality: what is worth more than it has a larger cost."""
    world, beta, budget = TokenWorld.random(*size), 0.5, -0.4
    optimum = lagrangian_optimum(world, beta, multipliers(world, beta, tensor(budget)))

    def worth(policy: Policy) -> float:
        return expectation(policy, world.reward) - beta * kl(policy, world.reference)

    allowed = 0
    for i in range(200):
        noise = 10 ** (-4 * i / 200)
        other = tuple((level + noise * torch.randn_like(level)).log_softmax(-1) for level in optimum)
        if expectation(other, world.cost) <= budget:
            allowed += 1
            assert worth(other) < worth(optimum)
    assert allowed > 20


def test_budgets_that_no_policy_meets_are_refused():
    world = bandit((0.5, 0.3, 0.2), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0))
    for budget in (-1.0, -1e-3):
        with pytest.raises(ValueError, match="no policy has costs below"):
            multipliers(world, 0.5, tensor(budget))
    opposed = TokenWorld(world.reference, world.reward, torch.cat([world.costs, 2 - world.costs]))
    with pytest.raises(ValueError, match="no policy has costs below"):
        multipliers(opposed, 0.5, tensor(0.5, 0.5))  # each alone is possible, not both


# ------------------------------------------------------------------------------------------- estimated from samples


@every_size
def test_the_dual_needs_only_costs_of_reward_aligned_answers(size):
    """Where the samples are the whole law, weighted, its root is the multiplier: no reward is read."""
    world, beta, budget = TokenWorld.random(*size), 0.5, -0.4
    law = sequence_logps(gibbs(world.reference, world.reward, beta))

    def exact_slope(lam: float) -> float:
        return float(budget - ((law - lam * world.cost / beta).softmax(-1) * world.cost).sum(-1).mean())

    lam = float(multipliers(world, beta, tensor(budget)))
    assert exact_slope(lam) == pytest.approx(0, abs=1e-9)
    assert exact_slope(0.9 * lam) < 0 < exact_slope(1.1 * lam)


def test_equal_samples_that_repeat_as_the_law_says_give_the_exact_multiplier():
    """π_r = (.5, .3, .2) as ten samples, and two prompts by hand: costs {0, 1} and {0, 2}, budget ½, β 0.1: 0.041962."""
    probs, cost = (0.5, 0.3, 0.2), (-0.5, 0.5, 3.0)
    world = bandit(probs, (0.0, 0.0, 0.0), cost)  # reward-aligned from the start
    samples = tensor(*(c for c, p in zip(cost, probs, strict=True) for _ in range(round(10 * p))))[None]
    exact = float(multipliers(world, 0.3, tensor(0.1)))
    assert dual_root(samples, 0.1, 0.3) == pytest.approx(exact, abs=1e-12)
    two = torch.tensor([[0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    assert dual_root(two, 0.5, 0.1) == pytest.approx(0.041962, abs=5e-7)


@every_size
def test_the_estimate_of_a_whole_law_is_the_exact_multiplier(size):
    """A reference that the reward makes uniform: every response once is then the law of π_r, and its estimate exact."""
    drawn, beta, budget = TokenWorld.random(*size), 0.5, -0.4
    vocabulary = drawn.reference[0].shape[-1]
    world = TokenWorld(policy_of(-drawn.reward / beta, vocabulary), drawn.reward, drawn.costs)
    exact = float(multipliers(world, beta, tensor(budget)))
    assert dual_root(world.cost, budget, beta) == pytest.approx(exact, rel=1e-8)
    # and from the reference, with rewards (CAN, arXiv:2405.19544), where that is uniform
    even = TokenWorld(policy_of(torch.zeros_like(drawn.reward), vocabulary), drawn.reward, drawn.costs)
    from_reference = dual_root(even.cost, budget, beta, even.reward)
    assert from_reference == pytest.approx(float(multipliers(even, beta, tensor(budget))), rel=1e-8)


def test_the_estimate_approaches_the_multiplier_with_more_samples():
    world, beta, budget = TokenWorld.random(0, 4, 3, 3), 0.5, -0.4
    exact = float(multipliers(world, beta, tensor(budget)))
    law = sequence_logps(gibbs(world.reference, world.reward, beta)).exp()
    errors = []
    for count in (100, 10_000):
        found = [dual_root(world.cost.gather(1, torch.multinomial(law, count, True)), budget, beta) for _ in range(5)]
        errors.append(sum(abs(lam - exact) for lam in found) / 5)
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.05 * exact


# --------------------------------------------------------------------------------------------------------------- merges


@every_size
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_geometric_mean_per_response_is_the_optimum_at_a_share_of_the_multiplier(size, share):
    """π_r^(1−q) π_λ̄^q, normalised: λ = q λ̄ exactly, so one cautious model gives all smaller multipliers."""
    found = merges(TokenWorld.random(*size), 4.0, share)
    assert found["geometric"] < 1e-12
    assert found["per token"] > 0.05


@every_size
def test_mixing_logits_per_token_is_right_to_first_order(size):
    """A quarter of the distance, a sixteenth of the loss, where the multiplier is halved."""
    world = TokenWorld.random(*size)
    gaps = [merges(world, lam, 0.5) for lam in (4e-3, 2e-3, 1e-3)]
    for name, factor in (("per token", 4.0), ("loss per token", 16.0)):
        ratios = [gaps[i][name] / gaps[i + 1][name] for i in range(2)]
        assert ratios == pytest.approx([factor] * 2, rel=0.1)
    # the distance that the multiplier itself makes is of first order
    near, far = (lagrangian_optimum(world, 0.5, tensor(lam)) for lam in (1e-3, 2e-3))
    aligned = gibbs(world.reference, world.reward, 0.5)
    assert distance(far, aligned) / distance(near, aligned) == pytest.approx(2, rel=0.1)


def test_averaging_the_weights_of_a_table_of_logits_is_mixing_per_token():
    """Unnormalised logits differ from log-probabilities by a constant per prefix, which cancels."""
    world = TokenWorld.random(0, 4, 3, 2)
    first, second = world.reference, lagrangian_optimum(world, 0.5, tensor(2.0))
    shifted = tuple(level + 3 * torch.randn(*level.shape[:-1], 1, dtype=torch.float64) for level in second)
    averaged = tuple((0.5 * a + 0.5 * b).log_softmax(-1) for a, b in zip(first, shifted, strict=True))
    assert distance(averaged, mixture([first, second], [0.5, 0.5])) < 1e-12
    whole = policy_of(0.5 * sequence_logps(first) + 0.5 * sequence_logps(second), 4)
    assert distance(whole, geometric(first, second, 0.5)) < 1e-12
    assert distance(averaged, whole) > 0.05
