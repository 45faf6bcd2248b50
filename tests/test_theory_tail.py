"""The tail: chance constraints, Cantelli's bound, CVaR through a hinge, and which labels teach it."""

import math

import pytest
import torch

from benchmarks.theory.compare import cantelli_optimum, chance_optimum, cvar_dual, cvar_optimum, worth
from benchmarks.theory.fixtures import bandit, two_ways_out
from benchmarks.theory.tail import label_populations, label_world, local_maxima
from rsa_lightning.losses import DPO
from rsa_lightning.tabular import gradient, pair_objective, soft_labels, train
from rsa_lightning.transforms import Hinge, Indicator
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    cantelli,
    cvar,
    distance,
    exceedance,
    expectation,
    gibbs,
    hinge_optimum,
    hinge_worths,
    kl,
    stepwise,
    var,
)

BETA = 0.5
every_size = pytest.mark.parametrize("size", [(0, 4, 3, 3), (1, 6, 3, 2), (2, 8, 3, 1), (3, 4, 5, 1)], ids=str)


def random_policies(world: TokenWorld, count: int) -> list[Policy]:
    return [tuple((2 * torch.randn_like(level)).log_softmax(-1) for level in world.reference) for _ in range(count)]


# ----------------------------------------------------------------------------------------------- chance constraints


@every_size
@pytest.mark.parametrize("mass", [0.01, 0.05])
def test_a_chance_constraint_is_an_ordinary_cost_of_zero_and_one(size, mass):
    """P(c > d) ≤ p is linear in the policy: its multiplier meets it exactly, and two steps reach it."""
    world, threshold = TokenWorld.random(*size), 0.5
    found = chance_optimum(world, BETA, threshold, mass)
    assert found.lam > 0
    assert exceedance(found.policy, world.cost, threshold) == pytest.approx(mass, abs=1e-9)
    assert var(found.policy, world.cost, 1.001 * mass) <= threshold
    unsafe = Indicator(threshold)(world.cost)
    steps = stepwise(world.reference, [(world.reward, BETA), (-unsafe, BETA / found.lam)])
    assert distance(steps, found.policy) < 1e-12
    # the labels of the safety step say which answer is over the threshold, not by how much
    aligned = gibbs(world.reference, world.reward, BETA)
    objective = pair_objective(DPO(beta=BETA / found.lam), aligned, soft_labels(world.reference, -unsafe))
    assert gradient(objective, found.policy) < 1e-12


@every_size
@pytest.mark.parametrize("smoothing", [0.05, 0.2])
def test_hard_labels_with_smoothing_are_exact_for_a_cost_of_two_values(size, smoothing):
    """1 − ε = σ(s) at s = log((1 − ε)/ε): the temperature is s β/λ. Pairs on one side of the threshold have target ½."""
    world = TokenWorld.random(*size)
    found, unsafe = chance_optimum(world, BETA, 0.5, 0.02), Indicator(0.5)(world.cost)
    aligned = gibbs(world.reference, world.reward, BETA)
    scale = math.log((1 - smoothing) / smoothing)
    pairs = soft_labels(world.reference, -1e9 * unsafe)
    assert set(pairs.target.unique().tolist()) == {0.0, 0.5, 1.0}
    loss = DPO(beta=scale * BETA / found.lam, label_smoothing=smoothing)
    assert gradient(pair_objective(loss, aligned, pairs), found.policy) < 1e-12
    assert gradient(pair_objective(DPO(BETA / found.lam, smoothing), aligned, pairs), found.policy) > 1e-5


@every_size
@pytest.mark.parametrize("mass", [0.01, 0.05, 0.3])
def test_cantellis_bound_is_never_below_var(size, mass):
    world = TokenWorld.random(*size)
    for policy in [world.reference, *random_policies(world, 20)]:
        assert cantelli(policy, world.cost, mass) >= var(policy, world.cost, mass)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mass", [0.05, 0.2])
def test_the_condition_of_cantelli_costs_reward_that_the_constraint_does_not(seed, mass):
    """Its optimum keeps to P(c > d) ≤ p with most of p unused, and is worth less."""
    world, threshold = TokenWorld.random(seed, 4, 2, 2, catastrophic=0.15), 0.5
    exact = chance_optimum(world, BETA, threshold, mass)
    bound = cantelli_optimum(world, BETA, threshold, mass, points=20, rounds=3)
    assert cantelli(bound.policy, world.cost, mass) == pytest.approx(threshold, abs=1e-2)
    assert cantelli(bound.policy, world.cost, mass) <= threshold + 1e-9
    assert cantelli(exact.policy, world.cost, mass) > threshold + 0.1
    assert exceedance(bound.policy, world.cost, threshold) < mass / 10
    assert bound.worth < exact.worth - 0.02


def test_the_optimum_under_cantellis_condition_is_one():
    """No policy found at random near it meets the condition and is worth more."""
    world, threshold, mass = TokenWorld.random(0, 4, 2, 2, catastrophic=0.15), 0.5, 0.2
    found = cantelli_optimum(world, BETA, threshold, mass)
    allowed = 0
    for i in range(400):
        noise = 10 ** (-3 * i / 400)
        other = tuple((level + noise * torch.randn_like(level)).log_softmax(-1) for level in found.policy)
        if cantelli(other, world.cost, mass) <= threshold and expectation(other, world.cost) <= threshold:
            allowed += 1
            assert worth(world, other, BETA) < found.worth + 1e-6
    assert allowed > 40


# ------------------------------------------------------------------------------------------------------------- CVaR


@every_size
@pytest.mark.parametrize(("lam", "mass"), [(0.3, 0.05), (1.0, 0.1), (0.05, 0.3)])
def test_the_hinge_optimum_is_the_best_policy_for_cvar(size, lam, mass):
    """E[r] − λ CVaR_a(c) − β KL: better than the Gibbs policy of any other η, and than what is near it."""
    world = TokenWorld.random(*size)
    aligned = gibbs(world.reference, world.reward, BETA)

    def value(policy: Policy) -> float:
        return worth(world, policy, BETA) - lam * cvar(policy, world.cost, mass)

    optimum, eta = hinge_optimum(aligned, world.cost, lam, mass, BETA)
    best = value(optimum)
    # what is found in G is what the policy is worth
    _, worths = hinge_worths(aligned, world.cost, lam, mass, BETA)
    assert best == pytest.approx(worth(world, aligned, BETA) + worths.max().item(), abs=1e-9)
    low, high = world.cost.min().item(), world.cost.max().item()
    for other in torch.linspace(low - 1, high, 60, dtype=torch.float64).tolist():
        policy = gibbs(aligned, -Hinge(other, mass)(world.cost), BETA / lam)
        assert value(policy) <= best + 1e-12
    for i in range(60):
        noise = 10 ** (-3 * i / 60)
        other = tuple((level + noise * torch.randn_like(level)).log_softmax(-1) for level in optimum)
        assert value(other) < best
    # η is a VaR of the optimum: at most a of it is above, and not less than a of it at or above
    assert exceedance(optimum, world.cost, eta) <= mass + 1e-9
    assert exceedance(optimum, world.cost, eta - 1e-9) >= mass - 1e-9


@every_size
def test_the_hinge_bounds_cvar_from_above_and_touches_it_at_var(size):
    """η + E(c − η)₊/a ≥ CVaR_a(c), with equality at VaR_a (Rockafellar & Uryasev 2000)."""
    world = TokenWorld.random(*size)
    for policy in random_policies(world, 10):
        exact = cvar(policy, world.cost, 0.1)
        for eta in torch.linspace(-2, 10, 25, dtype=torch.float64).tolist():
            assert eta + expectation(policy, Hinge(eta, 0.1)(world.cost)) >= exact - 1e-12
        eta = var(policy, world.cost, 0.1)
        assert eta + expectation(policy, Hinge(eta, 0.1)(world.cost)) == pytest.approx(exact, abs=1e-10)


def test_eta_is_var_of_the_optimum_and_not_of_the_reward_aligned_policy():
    """And that of the reward-aligned one is a costly guess."""
    world, lam, mass = TokenWorld.random(1, 6, 3, 3), 0.3, 0.05
    aligned = gibbs(world.reference, world.reward, BETA)
    optimum, eta = hinge_optimum(aligned, world.cost, lam, mass, BETA)
    assert eta == pytest.approx(0.164613, abs=5e-7)
    assert var(optimum, world.cost, mass) == pytest.approx(eta, abs=1e-12)
    guess = var(aligned, world.cost, mass)
    assert guess == pytest.approx(4.138833, abs=5e-7)
    other = gibbs(aligned, -Hinge(guess, mass)(world.cost), BETA / lam)
    values = [worth(world, policy, BETA) - lam * cvar(policy, world.cost, mass) for policy in (optimum, other)]
    assert values[0] - values[1] == pytest.approx(0.964913, abs=5e-7)


def test_there_are_several_local_maxima():
    """A search that climbs from VaR of the reward-aligned policy, or from below, may end at another one."""
    world, lam, mass = TokenWorld.random(1, 6, 3, 3), 0.3, 0.05
    aligned = gibbs(world.reference, world.reward, BETA)
    etas, worths = hinge_worths(aligned, world.cost, lam, mass, BETA)
    tops = local_maxima(etas, worths)
    assert len(tops) == 5
    assert worths[tops].max() == worths.max()
    # between two costs it is convex: no maximum is missed
    inner = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    for left, right in zip(etas[:-1:20].tolist(), etas[1::20].tolist(), strict=False):
        ends = [eta_worth(aligned, world, lam, mass, eta) for eta in (left, right)]
        for t in inner.tolist():
            middle = eta_worth(aligned, world, lam, mass, left + t * (right - left))
            assert middle <= ends[0] + t * (ends[1] - ends[0]) + 1e-12


def eta_worth(aligned: Policy, world: TokenWorld, lam: float, mass: float, eta: float) -> float:
    policy = gibbs(aligned, -Hinge(eta, mass)(world.cost), BETA / lam)
    return -lam * (eta + expectation(policy, Hinge(eta, mass)(world.cost))) - BETA * kl(policy, aligned)


def test_no_multiplier_reaches_some_budgets_of_cvar():
    """CVaR is concave in the policy, so a budget on it is not convex: the dual is 0.27 too good, and its policies jump."""
    world, mass, budget = two_ways_out(), 0.2, 0.5
    best = cvar_optimum(world, BETA, budget, mass)
    bound, lam = cvar_dual(world, BETA, budget, mass)
    assert cvar(best.policy, world.cost, mass) == pytest.approx(budget, abs=1e-9)
    assert best.worth == pytest.approx(-0.136712, abs=5e-7)
    assert bound == pytest.approx(0.132523, abs=5e-7)
    aligned = gibbs(world.reference, world.reward, BETA)
    around = [
        cvar(hinge_optimum(aligned, world.cost, k * lam, mass, BETA)[0], world.cost, mass) for k in (0.999, 1.001)
    ]
    assert around[0] > 0.99 > 0.01 > around[1]
    # no other multiplier does better: the costs that they give leave out what is between
    found = [
        cvar(hinge_optimum(aligned, world.cost, 1.05**i, mass, BETA)[0], world.cost, mass) for i in range(-120, 60)
    ]
    assert not any(0.01 < cost < 0.99 for cost in found)
    # nothing worth more meets the budget
    for one in torch.linspace(0, 1, 101, dtype=torch.float64).tolist():
        for two in torch.linspace(0, 1 - one, 51, dtype=torch.float64).tolist():
            policy = (torch.tensor([[[one, two, 1 - one - two]]], dtype=torch.float64).clamp(min=1e-300).log(),)
            if cvar(policy, world.cost, mass) <= budget:
                assert worth(world, policy, BETA) <= best.worth + 1e-9


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_dual_of_cvar_is_never_below_its_optimum(seed):
    world = TokenWorld.random(seed, 4, 2, 2)
    for budget in (-0.3, 0.2, 1.0):
        best = cvar_optimum(world, BETA, budget, 0.1)
        assert cvar(best.policy, world.cost, 0.1) <= budget + 1e-9
        assert cvar_dual(world, BETA, budget, 0.1)[0] >= best.worth - 1e-9


# ----------------------------------------------------------------------------------------------------------- labels


@every_size
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_soft_labels_of_the_hinge_have_the_optimum_at_every_scale(size, scale):
    """σ(s (h_l − h_w)) at temperature s β/λ: s moves label noise, not the optimum."""
    world, lam, mass = TokenWorld.random(*size), 0.3, 0.2
    aligned = gibbs(world.reference, world.reward, BETA)
    optimum, eta = hinge_optimum(aligned, world.cost, lam, mass, BETA)
    pairs = soft_labels(world.reference, -scale * Hinge(eta, mass)(world.cost))
    objective = pair_objective(DPO(beta=scale * BETA / lam), aligned, pairs)
    assert gradient(objective, optimum) < 1e-12
    assert gradient(objective, aligned) > 1e-4
    # a temperature that forgets the scale is another multiplier
    if scale != 1.0:
        assert gradient(pair_objective(DPO(beta=BETA / lam), aligned, pairs), optimum) > 1e-4


@pytest.mark.parametrize("name", ["soft 0.05", "soft 0.2", "soft 1"])
def test_training_on_soft_labels_ends_at_the_optimum(name):
    _, aligned, optimum, _ = label_world()
    loss, pairs = label_populations()[name]
    assert distance(train(pair_objective(loss, aligned, pairs), aligned), optimum) < 1e-5


@pytest.mark.parametrize(
    ("name", "loss_of_value", "tail_cost"),
    [
        ("clipped 0.99", 0.032431, 0.276189),
        ("clipped 0.95", 0.123556, 0.677549),
        ("hard, smoothing 0.05", 0.107887, 0.503055),
    ],
)
def test_saturated_labels_miss_the_optimum_by_this_much(name, loss_of_value, tail_cost):
    """They know that an answer is worse, not by how much; the optimum has a CVaR of 0.082246, the start 3.574691."""
    world, aligned, optimum, _ = label_world()
    loss, pairs = label_populations()[name]
    policy = train(pair_objective(loss, aligned, pairs), aligned, tolerance=1e-8)
    assert cvar(optimum, world.cost, 0.2) == pytest.approx(0.082246, abs=5e-7)
    assert cvar(aligned, world.cost, 0.2) == pytest.approx(3.574691, abs=5e-7)
    assert BETA * kl(policy, optimum) == pytest.approx(loss_of_value, abs=1e-6)
    assert cvar(policy, world.cost, 0.2) == pytest.approx(tail_cost, abs=1e-5)


def test_hard_labels_have_no_optimum():
    """Costs 0, 1, 10: the order alone drives the log-ratio as far as it is trained."""
    world = bandit((0.4, 0.3, 0.3), (0.0, 0.0, 0.0), (0.0, 1.0, 10.0))
    hard = soft_labels(world.reference, -1e9 * world.cost)
    objective = pair_objective(DPO(beta=0.5), world.reference, hard)
    short, long = (train(objective, world.reference, tolerance=tolerance) for tolerance in (1e-4, 1e-8))
    drift = [kl(policy, world.reference) for policy in (short, long)]
    worst = [policy[0][0, 0, 2].item() for policy in (short, long)]
    assert drift[0] < drift[1] < -world.reference[0][0, 0, 0].item()
    assert worst[1] < worst[0] - 10
