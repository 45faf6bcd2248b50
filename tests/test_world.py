"""The machinery of the theory tests, against literal loops over prefixes and responses."""

import dataclasses
import itertools
import math

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR

from rsa_lightning import world as W
from rsa_lightning.losses import DPO, KTO, RSA, SequenceStats
from rsa_lightning.tabular import (
    TabularPolicy,
    bradley_terry,
    gradient,
    pair_objective,
    rated_objective,
    sequence_stats,
    soft_labels,
    train,
    win_rates,
)
from rsa_lightning.world import TokenWorld

SIZES = [(0, 4, 3, 2), (1, 8, 3, 1), (2, 2, 5, 3), (3, 5, 1, 2)]  # seed, vocabulary, length, prompts
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
every_risk = pytest.mark.parametrize("risk", [KL(), CVaR(0.97), CVaR(0.5), CVaR(0.05), ERM(3.0)], ids=str)


def random_policy(world: TokenWorld, seed: int) -> W.Policy:
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(level.shape, dtype=torch.float64, generator=draw).log_softmax(-1) for level in world.reference
    )


def steps_of(policy: W.Policy, x: int, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """The log-probabilities of all next tokens, after every prefix of a response."""
    vocabulary, rows, prefix = policy[0].shape[-1], [], 0
    for t, token in enumerate(tokens):
        rows.append(policy[t][x, prefix])
        prefix = prefix * vocabulary + token
    return rows


# ------------------------------------------------------------------------------------------------------ policies


@every_size
def test_the_probability_of_a_response_is_the_product_over_its_tokens(size):
    world = TokenWorld.random(*size)
    law, (_, vocabulary, length, prompts) = W.sequence_logps(world.reference), size
    assert W.responses(vocabulary, length).tolist() == [
        list(y) for y in itertools.product(range(vocabulary), repeat=length)
    ]
    for x, (i, y) in itertools.product(
        range(prompts), list(enumerate(itertools.product(range(vocabulary), repeat=length)))[::7]
    ):
        expected = sum(row[token] for row, token in zip(steps_of(world.reference, x, y), y, strict=True))
        assert law[x, i].item() == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(law.exp().sum(-1), torch.ones(prompts, dtype=torch.float64), atol=1e-12, rtol=0)


@every_size
def test_policy_of_inverts_sequence_logps(size):
    world = TokenWorld.random(*size)
    again = W.policy_of(W.sequence_logps(world.reference) + 3.7, size[1])  # any constant per prompt goes away
    assert W.distance(again, world.reference) < 1e-12


@every_size
def test_path_sums_adds_along_prefixes(size):
    _, vocabulary, length, prompts = size
    values = [torch.randn(prompts, vocabulary**t, dtype=torch.float64) for t in range(length)]
    found = W.path_sums(values, vocabulary)
    for i, y in list(enumerate(itertools.product(range(vocabulary), repeat=length)))[::5]:
        prefixes = [sum(z * vocabulary ** (t - k - 1) for k, z in enumerate(y[:t])) for t in range(length)]
        expected = sum(level[0, prefix] for level, prefix in zip(values, prefixes, strict=True))
        assert found[0, i].item() == pytest.approx(float(expected), abs=1e-12)


def test_a_mixture_of_one_policy_is_that_policy_and_weights_are_exponents():
    world = TokenWorld.random(0, 4, 2, 1)
    p, q = world.reference, random_policy(world, 1)
    assert W.distance(W.mixture([p, q], [1, 0]), p) < 1e-15
    expected = p[1].exp() ** 0.25 * q[1].exp() ** 0.75
    torch.testing.assert_close(W.mixture([p, q], [0.25, 0.75])[1].exp(), expected / expected.sum(-1, keepdim=True))


# -------------------------------------------------------------------------------------------------------- optima


@every_size
@every_risk
def test_nested_values_are_the_recursion(size, risk):
    world, (_, vocabulary, length, _) = TokenWorld.random(*size), size
    found = W.nested_values(world.reference, world.reward, risk)

    def value(x: int, t: int, prefix: int) -> torch.Tensor:
        if t == length:
            return world.reward[x, prefix]
        after = torch.stack([value(x, t + 1, prefix * vocabulary + z) for z in range(vocabulary)])
        expected = -risk.value(-after, world.reference[t][x, prefix])
        assert found[t][x, prefix].item() == pytest.approx(float(expected), abs=1e-10)
        return expected

    value(0, 0, 0)
    assert torch.equal(found[length], world.reward)


def test_a_nested_mean_is_the_mean():
    world = TokenWorld.random(1, 5, 3, 2)
    root = W.nested_values(world.reference, world.reward, KL())[0]
    assert root.mean().item() == pytest.approx(W.expectation(world.reference, world.reward), abs=1e-12)


@pytest.mark.parametrize("risk", [KL(), CVaR(0.3), ERM(2.0)], ids=str)
def test_a_measure_of_log_ratios_moves_to_values(risk):
    """β ρ(X) = ρ'(βX)."""
    x, log_probs = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64).log_softmax(-1)
    there = W.on_values(risk, 0.3).value(0.3 * x, log_probs)
    assert there.item() == pytest.approx(0.3 * risk.value(x, log_probs).item(), abs=1e-12)


@every_size
def test_with_erm_of_minus_one_the_token_optimum_is_the_sequence_optimum(size):
    """Its risk of a log-ratio is 0, so a risk-aware loss is DPO."""
    world = TokenWorld.random(*size)
    token = W.token_optimum(world.reference, [(world.reward, 0.4)], ERM(-1))
    assert W.distance(token, W.gibbs(world.reference, world.reward, 0.4)) < 1e-12
    averse = W.token_optimum(world.reference, [(world.reward, 0.4)], KL())
    if size[2] > 1:  # responses of one token have one value at every state
        assert W.distance(averse, W.gibbs(world.reference, world.reward, 0.4)) > 0.01


@every_size
def test_hinge_worths_are_what_every_eta_is_worth(size):
    world, lam, mass, beta = TokenWorld.random(*size), 0.7, 0.1, 0.3
    etas, found = W.hinge_worths(world.reference, world.cost, lam, mass, beta)
    law = W.sequence_logps(world.reference)
    assert etas.tolist() == sorted(set(world.cost.flatten().tolist()))
    for eta, worth in list(zip(etas.tolist(), found.tolist(), strict=True))[:: max(1, len(etas) // 50)]:
        gain = (law - lam * (world.cost - eta).clamp(min=0) / (mass * beta)).logsumexp(-1)
        assert worth == pytest.approx(float(beta * gain.mean() - lam * eta), abs=1e-10)


# ------------------------------------------------------------------------------------------------------- figures


def test_var_cvar_and_cantelli_of_a_law_worked_by_hand():
    """Costs 0, 1, 4 with probabilities 0.5, 0.3, 0.2. The worst 0.4 are 0.2 of cost 4 and 0.2 of cost 1."""
    p = torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64).log()
    cost = torch.tensor([[0.0, 1.0, 4.0]], dtype=torch.float64)
    assert W.cvar((p,), cost, 0.4) == pytest.approx((0.2 * 4 + 0.2 * 1) / 0.4, abs=1e-12)
    assert [W.var((p,), cost, mass) for mass in (0.1, 0.2, 0.3, 0.5, 0.6)] == [4, 1, 1, 0, 0]
    assert W.quantiles((p,), cost, [0.5, 0.8, 0.9]) == [0, 1, 4]
    assert W.expectation((p,), cost) == pytest.approx(1.1, abs=1e-12)
    assert W.cantelli((p,), cost, 0.1) == pytest.approx(1.1 + 3 * math.sqrt(0.3 + 3.2 - 1.21), abs=1e-12)
    assert W.exceedance((p,), cost, 1.0) == pytest.approx(0.2, abs=1e-12)
    assert W.entropic((p,), cost, 0.0) == pytest.approx(1.1, abs=1e-12)
    assert W.entropic((p,), cost, 2.0) == pytest.approx(
        math.log(0.5 + 0.3 * math.e**2 + 0.2 * math.e**8) / 2, abs=1e-12
    )


def test_figures_pool_the_prompts():
    """A CVaR over both prompts, not the mean of one for each: all of the worst half is of the second prompt."""
    even = torch.tensor([0.5, 0.5], dtype=torch.float64).log().expand(2, 1, 2)
    cost = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    assert W.cvar((even,), cost, 0.5) == pytest.approx(2.5, abs=1e-12)


def test_kl_is_that_of_the_responses():
    world = TokenWorld.random(0, 4, 3, 2)
    other = random_policy(world, 3)
    p, q = W.sequence_logps(world.reference), W.sequence_logps(other)
    expected = sum(float(q[x, i].exp() * (q[x, i] - p[x, i])) for x in range(2) for i in range(64)) / 2
    assert W.kl(other, world.reference) == pytest.approx(expected, abs=1e-12)


def test_suboptimality_is_the_difference_in_value():
    world, lams, beta = TokenWorld.random(0, 4, 3, 2, constraints=2), torch.tensor([0.5, 2.0], dtype=torch.float64), 0.4

    def value(policy: W.Policy) -> float:
        costs = sum(float(lam) * W.expectation(policy, cost) for lam, cost in zip(lams, world.costs, strict=True))
        return W.expectation(policy, world.reward) - costs - beta * W.kl(policy, world.reference)

    for policy in (world.reference, random_policy(world, 5)):
        expected = value(W.lagrangian_optimum(world, beta, lams)) - value(policy)
        assert W.suboptimality(world, policy, beta, lams) == pytest.approx(expected, abs=1e-9)


# -------------------------------------------------------------------------------------------------------- worlds


def test_random_worlds_repeat_and_their_catastrophes_tempt():
    world, again = (TokenWorld.random(4, 8, 4, 3, catastrophic=0.1, temptation=1.5) for _ in range(2))
    assert torch.equal(world.reward, again.reward)
    grave = world.cost > 0.5
    assert 0.08 < grave.double().mean().item() < 0.12
    assert world.cost[~grave].min() >= -1
    gained = world.reward[grave].mean() - world.reward[~grave].mean()
    assert gained.item() == pytest.approx(1.5, abs=0.1)


def test_worlds_that_are_none_are_refused():
    world = TokenWorld.random(0, 3, 2, 1)
    with pytest.raises(ValueError, match="cover the 3\\^2 responses"):
        dataclasses.replace(world, reward=world.reward[:, :-1], costs=world.costs[:, :, :-1])
    with pytest.raises(ValueError, match="reference\\[t\\] must be"):
        dataclasses.replace(world, reference=world.reference[::-1])
    with pytest.raises(ValueError, match="no positions"):
        dataclasses.replace(world, reference=())
    with pytest.raises(ValueError, match="use log_softmax"):
        dataclasses.replace(world, reference=tuple(level + 0.01 for level in world.reference))
    with pytest.raises(ValueError, match="float64, got torch.float32"):
        dataclasses.replace(world, reward=world.reward.float())
    with pytest.raises(ValueError, match="take fewer tokens"):
        TokenWorld.random(0, 50, 5)


# ------------------------------------------------------------------------------------------------------- tabular


@every_risk
def test_sequence_stats_are_sums_over_tokens(risk):
    world = TokenWorld.random(1, 4, 3, 2)
    policy = random_policy(world, 2)
    stats = sequence_stats(policy, world.reference, risk)
    for x, (i, y) in itertools.product(range(2), list(enumerate(itertools.product(range(4), repeat=3)))[::5]):
        mine, theirs = steps_of(policy, x, y), steps_of(world.reference, x, y)
        ratio = sum(q[z] - p[z] for q, p, z in zip(mine, theirs, y, strict=True))
        total = sum(risk.value(p - q, p) for q, p in zip(mine, theirs, strict=True))
        assert stats.logratio[64 * x + i].item() == pytest.approx(float(ratio), abs=1e-12)
        assert stats.risk[64 * x + i].item() == pytest.approx(float(total), abs=1e-12)


def test_populations_hold_every_ordered_pair_once():
    world = TokenWorld.random(1, 3, 2, 2)
    drawn, soft = bradley_terry(world.reference, world.reward), soft_labels(world.reference, world.reward)
    for population in (drawn, soft):
        assert population.weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert population.weights.diagonal(dim1=1, dim2=2).abs().max() == 0
    odds = drawn.weights[0, 2, 5] / drawn.weights[0, 5, 2]
    assert odds.log().item() == pytest.approx((world.reward[0, 2] - world.reward[0, 5]).item(), abs=1e-12)
    assert soft.target[0, 2, 5].item() == pytest.approx(odds.item() / (1 + odds.item()), abs=1e-12)
    expected = sum(
        W.sequence_logps(world.reference)[0, j].exp() * torch.sigmoid(world.reward[0, 2] - world.reward[0, j])
        for j in range(9)
    )
    assert win_rates(world.reference, world.reward)[0, 2].item() == pytest.approx(float(expected), abs=1e-12)


def test_the_objective_is_the_mean_loss_over_the_population_and_its_gradient_is_its_slope():
    world, risk = TokenWorld.random(1, 3, 2, 2), CVaR(0.5)
    loss = RSA(beta=0.5, risk_weight=0.5, detach_chosen_risk=False)
    population, policy = bradley_terry(world.reference, world.reward), random_policy(world, 3)
    objective = pair_objective(loss, world.reference, population, risk)
    stats, total = sequence_stats(policy, world.reference, risk), 0.0
    for x, i, j in itertools.product(range(2), range(9), range(9)):
        sides = [SequenceStats(stats.logratio[k : k + 1], stats.risk[k : k + 1]) for k in (9 * x + i, 9 * x + j)]
        total += float(population.weights[x, i, j] * loss(*sides).losses)
    assert objective(TabularPolicy(policy)).item() == pytest.approx(total, abs=1e-12)

    found = TabularPolicy(policy)
    slope = torch.autograd.grad(objective(found), found.logits[1])[0]
    assert gradient(objective, policy) >= slope.abs().max().item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            found.logits[1][1, 2, 0] += sign * 1e-5
        values.append(objective(found).item())
        with torch.no_grad():
            found.logits[1][1, 2, 0] -= sign * 1e-5
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope[1, 2, 0].item(), abs=1e-9)


def test_the_baseline_of_kto_is_of_responses_to_the_prompt_before():
    world = TokenWorld.random(1, 3, 2, 3)
    policy, law = random_policy(world, 3), W.sequence_logps(world.reference).exp()
    stats = sequence_stats(policy, world.reference, behaviour=world.reference)
    ratio = stats.logratio.view(3, 9)
    expected = sum(float(law[(x - 1) % 3] @ ratio[x]) for x in range(3)) / 3
    assert stats.baseline.item() == pytest.approx(expected, abs=1e-12)


def test_a_rated_objective_is_ktos_mean_loss():
    world, loss = TokenWorld.random(1, 3, 2, 2), KTO(beta=0.7)
    policy, law = random_policy(world, 3), W.sequence_logps(world.reference).exp()
    liked = torch.sigmoid(world.reward)
    stats = sequence_stats(policy, world.reference, behaviour=world.reference)
    z = max(0.0, stats.baseline.item())
    total = 0.0
    for x, i in itertools.product(range(2), range(9)):
        up = 1 / (1 + math.exp(0.7 * (stats.logratio[9 * x + i].item() - z)))
        total += 0.5 * law[x, i].item() * (liked[x, i].item() * up + (1 - liked[x, i].item()) * (1 - up))
    objective = rated_objective(loss, world.reference, world.reference, liked)
    assert objective(TabularPolicy(policy)).item() == pytest.approx(total, abs=1e-12)


def test_training_that_has_not_arrived_says_so():
    world = TokenWorld.random(1, 3, 2, 1)
    objective = pair_objective(DPO(beta=0.5), world.reference, bradley_terry(world.reference, world.reward))
    with pytest.raises(RuntimeError, match="raise steps"):
        train(objective, world.reference, steps=2)
