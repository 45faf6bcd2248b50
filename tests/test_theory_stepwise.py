"""Two steps are one: temperatures, order, signs, several constraints; and which losses learn the steps exactly."""

import math

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR

from benchmarks.theory.compare import descend
from benchmarks.theory.fixtures import coin, three_answers
from rsa_lightning.losses import DPO, IPO, KTO, RSA, TDPO
from rsa_lightning.tabular import (
    TabularPolicy,
    bradley_terry,
    gradient,
    pair_objective,
    rated_objective,
    soft_labels,
    train,
    win_rates,
)
from rsa_lightning.temperatures import stage_betas
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    distance,
    expectation,
    gibbs,
    kl,
    lagrangian_optimum,
    sequence_logps,
    stepwise,
    suboptimality,
    token_optimum,
)

SIZES = [(0, 4, 3, 3), (1, 6, 3, 2), (2, 8, 4, 1), (3, 4, 5, 1)]  # seed, vocabulary, length, prompts
SMALL = [(0, 4, 3, 2), (1, 6, 2, 2), (2, 3, 4, 1)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
small = pytest.mark.parametrize("size", SMALL, ids=str)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nearby(policy: Policy, count: int = 50) -> list[Policy]:
    """Policies with noise on every logit, from hardly any to much."""
    return [
        tuple((level + 10 ** (-4 * i / count) * torch.randn_like(level)).log_softmax(-1) for level in policy)
        for i in range(count)
    ]


# --------------------------------------------------------------------------------------- the steps, as closed forms


@every_size
@pytest.mark.parametrize(("beta", "lam"), [(0.1, 0.5), (0.5, 2.0), (1.0, 10.0)])
def test_two_steps_at_beta_and_beta_over_lam_are_the_one_step_optimum(size, beta, lam):
    world, betas = TokenWorld.random(*size), stage_betas(beta, lam)
    steps = [(world.reward, betas.reward), (-world.cost, betas.safety)]
    optimum = lagrangian_optimum(world, beta, tensor(lam))
    for order in (steps, steps[::-1]):
        policy = stepwise(world.reference, order)
        assert distance(policy, optimum) < 1e-12
        assert abs(suboptimality(world, policy, beta, tensor(lam))) < 1e-12


@every_size
def test_constraints_come_in_any_order(size):
    world, beta, lams = TokenWorld.random(*size, constraints=2), 0.5, tensor(0.5, 2.0)
    reward = (world.reward, beta)
    first, second = [(-cost, stage_betas(beta, float(lam)).safety) for cost, lam in zip(world.costs, lams, strict=True)]
    optimum = lagrangian_optimum(world, beta, lams)
    for steps in ([reward, first, second], [second, reward, first], [first, second, reward]):
        assert distance(stepwise(world.reference, steps), optimum) < 1e-12


@every_size
@pytest.mark.parametrize(("beta", "lam"), [(0.1, 0.5), (0.5, 2.0)])
def test_kl_on_cost_is_the_optimum_with_kl_on_both_streams(size, beta, lam):
    """Safe RLHF: E[r] − β KL − λ (E[c] + β KL). Nothing near the end of the two steps is better."""
    world, betas = TokenWorld.random(*size), stage_betas(beta, lam, "kl_on_cost")

    def value(policy: Policy) -> float:
        drift = beta * kl(policy, world.reference)
        return expectation(policy, world.reward) - drift - lam * (expectation(policy, world.cost) + drift)

    policy = stepwise(world.reference, [(world.reward, betas.reward), (-world.cost, betas.safety)])
    best = value(policy)
    assert all(value(other) < best for other in nearby(policy))
    assert value(world.reference) < best
    # the temperatures of the problem with KL on the reward alone solve another one
    assert best - value(lagrangian_optimum(world, beta, tensor(lam))) > 0.01


@every_size
def test_no_policy_near_the_optimum_is_better(size):
    """`gibbs` itself, which the other tests take for granted."""
    world, beta = TokenWorld.random(*size), 0.3
    optimum = gibbs(world.reference, world.reward, beta)
    best = expectation(optimum, world.reward) - beta * kl(optimum, world.reference)
    for other in nearby(optimum):
        assert expectation(other, world.reward) - beta * kl(other, world.reference) < best


def test_two_steps_by_hand():
    """p = (.5, .3, .2), r = (0, 1, 2), c = (0, 0, 1), β = 1, λ = 2: ∝ (.5, .3e, .2e²), then ∝ (.5, .3e, .2)."""
    world = three_answers()
    first = gibbs(world.reference, world.reward, 1.0)
    second = gibbs(first, -world.cost, 0.5)
    for policy, mass in ((first, (0.5, 0.3 * math.e, 0.2 * math.e**2)), (second, (0.5, 0.3 * math.e, 0.2))):
        expected = torch.tensor(mass, dtype=torch.float64) / sum(mass)
        torch.testing.assert_close(policy[0][0, 0].exp(), expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------- what RSA's version 1 prints


def test_the_printed_sign_prefers_the_costly_answer():
    """Equal rewards, costs 0 and 1, λ = β = 1: 1/(1 + √e) and, with the printed sign, 1 minus that."""
    world, betas = coin(), stage_betas(1.0, 1.0, "kl_on_cost")
    right = stepwise(world.reference, [(world.reward, betas.reward), (-world.cost, betas.safety)])
    wrong = stepwise(world.reference, [(world.reward, betas.reward), (world.cost, betas.safety)])
    assert right[0][0, 0, 1].exp().item() == pytest.approx(0.377541, abs=5e-7)
    assert wrong[0][0, 0, 1].exp().item() == pytest.approx(0.622459, abs=5e-7)
    # β_total KL(wrong‖right) = 2 (σ(½) − σ(−½)) · ½
    lost = suboptimality(world, wrong, 2.0, tensor(1.0))
    assert lost == pytest.approx(0.622459 - 0.377541, abs=1e-6)


@every_size
@pytest.mark.parametrize("lam", [0.5, 2.0, 10.0])
def test_the_printed_temperatures_solve_a_problem_with_a_multiplier_below_one(size, lam):
    world, beta = TokenWorld.random(*size), 0.5
    betas = stage_betas(beta, lam, "rsa_paper")
    policy = stepwise(world.reference, [(world.reward, betas.reward), (-world.cost, betas.safety)])
    assert distance(policy, lagrangian_optimum(world, beta, tensor(lam / (1 + lam)))) < 1e-12
    # neither the problem that the paper states, KL on both streams, nor the one with KL on the reward
    assert suboptimality(world, policy, (1 + lam) * beta, tensor(lam)) > 0.05
    assert suboptimality(world, policy, beta, tensor(lam)) > 0.003
    # however large λ is, the cost stays above that of the optimum at λ = 1
    limit = lagrangian_optimum(world, beta, tensor(1.0))
    assert expectation(policy, world.cost) > expectation(limit, world.cost)


# ------------------------------------------------------------------------------------------ losses and their optima

V1 = {"risk_weight": 1.0, "detach_chosen_risk": False}
EXACT = [
    (DPO(beta=0.5), None),
    (RSA(beta=0.5, risk_weight=0.0), CVaR(0.5)),
    (TDPO(beta=0.5, **V1), KL()),
    (RSA(beta=0.5, **V1), KL()),
    (RSA(beta=0.5, **V1), CVaR(0.97)),
    (RSA(beta=0.5, **V1), CVaR(0.5)),
    (RSA(beta=0.5, **V1), CVaR(0.05)),
    (RSA(beta=0.5, **V1), ERM(2.0)),
    (RSA(beta=0.5, **V1), ERM(-1)),
]
exact_losses = pytest.mark.parametrize(("loss", "risk"), EXACT, ids=lambda part: str(part))


def closed_form(world: TokenWorld, loss: DPO | TDPO | RSA, risk) -> Policy:
    if not loss.reads_risk:
        return gibbs(world.reference, world.reward, 0.5)
    return token_optimum(world.reference, [(world.reward, 0.5)], risk)


@small
@exact_losses
def test_the_gradient_is_zero_at_the_closed_form_and_beside_it_it_is_not(size, loss, risk):
    """Risk weight 0 at the sequence optimum, risk weight 1 with both risks differentiated at the token optimum."""
    world = TokenWorld.random(*size)
    optimum = closed_form(world, loss, risk)
    beside = tuple((level + 0.1 * torch.randn_like(level)).log_softmax(-1) for level in optimum)
    for population in (bradley_terry(world.reference, world.reward), soft_labels(world.reference, world.reward)):
        objective = pair_objective(loss, world.reference, population, risk)
        assert gradient(objective, optimum) < 1e-12
        assert gradient(objective, beside) > 1e-4
        assert gradient(objective, world.reference) > 1e-3


@exact_losses
def test_training_from_the_reference_ends_at_the_closed_form(loss, risk):
    world = TokenWorld.random(0, 4, 2, 2)
    objective = pair_objective(loss, world.reference, bradley_terry(world.reference, world.reward), risk)
    assert distance(train(objective, world.reference), closed_form(world, loss, risk)) < 1e-6


def test_training_in_two_steps_ends_at_the_one_step_optimum():
    """Reward step, then a safety step whose reference is the policy the first one ended at: as `rsa align` does."""
    world, beta, lam = TokenWorld.random(2, 4, 3, 1), 0.5, 2.0
    betas, policy = stage_betas(beta, lam), world.reference
    for returns, temperature in ((world.reward, betas.reward), (-world.cost, betas.safety)):
        pairs = bradley_terry(world.reference, returns.clamp(-4, 4))  # heavier costs are label noise of e^-50
        policy = train(pair_objective(DPO(beta=temperature), policy, pairs), policy)
    bounded = TokenWorld(world.reference, world.reward.clamp(-4, 4), world.costs.clamp(-4, 4))
    assert distance(policy, lagrangian_optimum(bounded, beta, tensor(lam))) < 1e-5


@small
def test_the_behaviour_that_answers_are_drawn_from_does_not_matter(size):
    """Preferences of answers of any policy with full support have the same optimum."""
    world = TokenWorld.random(*size)
    behaviour = tuple(torch.randn_like(level).log_softmax(-1) for level in world.reference)
    for loss, risk in ((DPO(beta=0.5), None), (RSA(beta=0.5, **V1), CVaR(0.5))):
        objective = pair_objective(loss, world.reference, bradley_terry(behaviour, world.reward), risk)
        assert gradient(objective, closed_form(world, loss, risk)) < 1e-12


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("risk", [KL(), CVaR(0.5), ERM(2.0)], ids=str)
def test_v2_has_its_fixed_point_elsewhere(weight, risk):
    """A stopped gradient on the chosen risk: no gradient is zero at either closed form."""
    world, loss = TokenWorld.random(0, 4, 2, 1), RSA(beta=0.5, risk_weight=weight)
    objective = pair_objective(loss, world.reference, bradley_terry(world.reference, world.reward), risk)
    assert gradient(objective, token_optimum(world.reference, [(world.reward, 0.5)], risk)) > 0.03
    assert gradient(objective, gibbs(world.reference, world.reward, 0.5)) > 0.03


@pytest.mark.parametrize(("weight", "gap", "drift"), [(0.5, 0.274277, 0.207503), (1.0, 0.348357, 0.097301)])
def test_v2_stays_nearer_to_its_reference(weight, gap, drift):
    """Where descent ends with the mean as risk: KL 0.695202 at the optimum, a third or a seventh of it under v2."""
    world, loss = TokenWorld.random(0, 4, 2, 1), RSA(beta=0.5, risk_weight=weight)
    optimum = token_optimum(world.reference, [(world.reward, 0.5)], KL())
    objective = pair_objective(loss, world.reference, bradley_terry(world.reference, world.reward), KL())
    policy, left = descend(objective, world.reference)
    assert left < 1e-10
    assert kl(optimum, world.reference) == pytest.approx(0.695202, abs=1e-6)
    assert distance(policy, optimum) == pytest.approx(gap, abs=1e-6)
    assert kl(policy, world.reference) == pytest.approx(drift, abs=1e-6)


@pytest.mark.parametrize(("beta", "weight"), [(0.1, 0.5), (0.1, 1.0), (0.5, 0.5)])
def test_for_weak_preferences_v2_is_dpo_at_a_temperature_higher_by_the_risk_weight(beta, weight):
    """The mean as risk: its stopped half no longer cancels, and is a KL penalty of `risk_weight`, whatever β is.

    Rewards r/n, n large, and a uniform reference over S responses: the Gibbs policy at β + a (1 − 1/S), up to terms of
    order 1/n. The share 1/S of two draws is one response twice, which is no pair.
    """
    errors = []
    for shrink in (50, 200):
        base = TokenWorld.random(0, 3, 2, 1, spread=0.0)
        world = TokenWorld(base.reference, base.reward / shrink, base.costs)
        pairs = bradley_terry(world.reference, world.reward)
        loss = RSA(beta=beta, risk_weight=weight)
        objective = pair_objective(loss, world.reference, pairs, KL())
        policy, left = descend(objective, world.reference, 60, rate=1 / (beta * (beta + weight)))
        assert left < 1e-9
        expected = gibbs(world.reference, world.reward, beta + weight * 8 / 9)
        errors.append(distance(policy, expected) / distance(expected, world.reference))
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 3


# ------------------------------------------------------------------------------------------------------ IPO and KTO


@small
def test_ipo_maximises_the_win_rate(size):
    """Its minimiser is the Gibbs policy of P(y beats an answer of the behaviour), at β (IPO, Theorem 2 of 2310.12036)."""
    world = TokenWorld.random(*size)
    behaviour = tuple(torch.randn_like(level).log_softmax(-1) for level in world.reference)
    optimum = gibbs(world.reference, win_rates(behaviour, world.reward), 0.2)
    objective = pair_objective(IPO(beta=0.2), world.reference, bradley_terry(behaviour, world.reward))
    assert gradient(objective, optimum) < 1e-10
    assert gradient(objective, gibbs(world.reference, world.reward, 0.2)) > 1e-2


def test_training_with_ipo_ends_there():
    world = TokenWorld.random(0, 4, 2, 2)
    objective = pair_objective(IPO(beta=0.2), world.reference, bradley_terry(world.reference, world.reward))
    optimum = gibbs(world.reference, win_rates(world.reference, world.reward), 0.2)
    assert distance(train(objective, world.reference), optimum) < 1e-6


def test_two_steps_of_ipo_are_one_in_win_rates():
    world = TokenWorld.random(0, 4, 3, 2)
    wins, safer = (win_rates(world.reference, scores) for scores in (world.reward, -world.cost))
    betas, policy = stage_betas(0.2, 2.0), gibbs(world.reference, wins, 0.2)
    optimum = gibbs(world.reference, wins + 2 * safer, 0.2)
    objective = pair_objective(IPO(beta=betas.safety), policy, bradley_terry(world.reference, -world.cost))
    assert gradient(objective, optimum) < 1e-10


@small
def test_ktos_first_step_is_a_policy_gradient_on_the_share_that_is_liked(size):
    """At the reference its gradient is −(β/4) ∇ E_π[2 P(desirable) − 1]; it has no Gibbs policy to end at."""
    world, beta = TokenWorld.random(*size), 0.5
    liked = torch.sigmoid(world.reward)
    policy = TabularPolicy(world.reference)
    objective = rated_objective(KTO(beta=beta), world.reference, world.reference, liked)
    found = torch.autograd.grad(objective(policy), list(policy.parameters()))
    mean = (sequence_logps(policy()).exp() * (2 * liked - 1)).sum(-1).mean()
    expected = torch.autograd.grad(-beta / 4 * mean, list(policy.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-14, rtol=0)
    assert gradient(objective, gibbs(world.reference, world.reward, beta)) > 1e-3
