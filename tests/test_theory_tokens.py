"""Token-level risk: order of the steps, products of experts, the two scales of ERM, nested against static risk."""

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR

from benchmarks.theory.fixtures import TREE_A, TREE_B, two_token_tree
from benchmarks.theory.tokens import nested, orders, static, streams
from rsa_lightning.losses import RSA
from rsa_lightning.tabular import bradley_terry, gradient, pair_objective, sequence_stats
from rsa_lightning.world import (
    TokenWorld,
    distance,
    gibbs,
    kl,
    mixture,
    nested_values,
    on_values,
    stepwise,
    token_optimum,
)

MEASURES = [KL(), CVaR(0.97), CVaR(0.5), CVaR(0.1), ERM(3.0)]
every_risk = pytest.mark.parametrize("risk", MEASURES, ids=str)
every_size = pytest.mark.parametrize("size", [(0, 4, 3, 2), (1, 8, 3, 1), (2, 4, 5, 1)], ids=str)

# first-token probabilities of the two-token tree: joint; reward, then safety; safety, then reward
FIRST_TOKEN = {
    KL(): [
        (0.328796, 0.297066, 0.185617, 0.188521),
        (0.387041, 0.225007, 0.191561, 0.196391),
        (0.311818, 0.269269, 0.215973, 0.202941),
    ],
    CVaR(0.97): [
        (0.320602, 0.300270, 0.182752, 0.196377),
        (0.379906, 0.225846, 0.189089, 0.205159),
        (0.305206, 0.270541, 0.213003, 0.211251),
    ],
}


@pytest.mark.parametrize("risk", FIRST_TOKEN, ids=str)
def test_the_two_token_tree(risk):
    found = orders(two_token_tree(), risk)
    for policy, expected in zip(found.values(), FIRST_TOKEN[risk], strict=True):
        assert policy[0][0, 0].exp().tolist() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("risk", "gap"), [(KL(), 0.075223), (CVaR(0.97), 0.074701), (CVaR(0.5), 0.113324)], ids=str)
def test_the_order_of_token_level_steps_matters_by_this_much(risk, gap):
    found = orders(two_token_tree(), risk)
    assert distance(found["reward, safety"], found["safety, reward"]) == pytest.approx(gap, abs=5e-7)


@every_size
@every_risk
def test_only_last_tokens_are_independent_of_the_order(size, risk):
    """There the value is the return itself, whatever the reference; before it is a value under the stage's reference."""
    world = TokenWorld.random(*size)
    found = list(orders(world, risk).values())
    last = [policy[-1].exp() for policy in found]
    assert max((one - last[0]).abs().max().item() for one in last) < 1e-12
    gaps = [distance(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(gaps) > 0.005
    # at the sequence level there is no order
    steps = streams(world)
    assert distance(stepwise(world.reference, steps), stepwise(world.reference, steps[::-1])) < 1e-12


@every_size
@every_risk
def test_the_product_of_experts_is_the_joint_token_optimum(size, risk):
    """Two models trained from the reference, decoded with logits l_r + l_c − l_ref."""
    world = TokenWorld.random(*size)
    experts = [token_optimum(world.reference, [stream], risk) for stream in streams(world)]
    product = mixture([*experts, world.reference], [1, 1, -1])
    assert distance(product, token_optimum(world.reference, streams(world), risk)) < 1e-12


@every_size
def test_of_sequence_optima_the_product_per_token_is_another_policy(size):
    """Normalising after every prefix loses what the next tokens would weigh; per response the product is exact."""
    world = TokenWorld.random(*size)
    experts = [gibbs(world.reference, *stream) for stream in streams(world)]
    product = mixture([*experts, world.reference], [1, 1, -1])
    joint = stepwise(world.reference, streams(world))
    assert kl(product, joint) > 0.003
    assert (product[-1].exp() - joint[-1].exp()).abs().max() < 1e-12


def test_by_how_much_on_the_two_token_tree():
    world = two_token_tree()
    experts = [gibbs(world.reference, *stream) for stream in streams(world)]
    product = mixture([*experts, world.reference], [1, 1, -1])
    assert distance(product, stepwise(world.reference, streams(world))) == pytest.approx(0.025165, abs=5e-7)


@every_risk
def test_training_the_second_token_level_step_recovers_values_under_its_own_reference(risk):
    """Its loss has gradient zero at the stepwise optimum, not at the joint one."""
    world, lam, beta = TokenWorld.random(0, 4, 3, 1), 2.0, 1.0
    steps = streams(world)
    first = token_optimum(world.reference, steps[:1], risk)
    loss = RSA(beta=beta / lam, risk_weight=1.0, detach_chosen_risk=False)
    objective = pair_objective(loss, first, bradley_terry(world.reference, -world.cost), risk)
    assert gradient(objective, stepwise(world.reference, steps, risk)) < 1e-12
    assert gradient(objective, token_optimum(world.reference, steps, risk)) > 1e-4


# -------------------------------------------------------------------------------------------------- implicit returns


@every_size
@every_risk
def test_log_ratio_plus_risk_is_the_return_up_to_the_value_of_the_prompt(size, risk):
    """β (lr + SRR) = R − Ṽ(x) at the token optimum: the implicit reward of the losses with risk weight 1."""
    world, beta = TokenWorld.random(*size), 0.3
    policy = token_optimum(world.reference, [(world.reward, beta)], risk)
    stats = sequence_stats(policy, world.reference, risk)
    root = nested_values(world.reference, world.reward, on_values(risk, beta))[0]
    expected = world.reward - root
    torch.testing.assert_close(beta * (stats.logratio + stats.risk).view_as(expected), expected, atol=1e-10, rtol=0)


def spread(policy, reference, returns, beta: float, mu: float) -> float:
    stats = sequence_stats(policy, reference, ERM(mu))
    shift = beta * (stats.logratio + stats.risk) - returns.flatten()
    return (shift.max() - shift.min()).item()


def test_erm_has_two_scales():
    """mu_value = 2 per unit of return is mu = 0.6 per nat at β = 0.3; taking 2 for both misses by 0.276771."""
    world, beta = two_token_tree(), 0.3
    values = nested_values(world.reference, world.reward, ERM(2.0))
    policy = tuple(
        (level + after.view(level.shape) / beta).log_softmax(-1)
        for level, after in zip(world.reference, values[1:], strict=True)
    )
    assert distance(policy, token_optimum(world.reference, [(world.reward, beta)], ERM(0.6))) < 1e-12
    assert spread(policy, world.reference, world.reward, beta, 0.6) < 1e-12
    assert spread(policy, world.reference, world.reward, beta, 2.0) == pytest.approx(0.276771, abs=5e-7)


# ------------------------------------------------------------------------------------------------ nested and static

NESTED = [  # measure, nested of trees A and B, static of both
    (KL(), 0.54, 0.54, 0.54),
    (CVaR(0.97), 0.535052, 0.532820, 0.535052),
    (CVaR(0.9), 0.522222, 0.513580, 0.522222),
    (CVaR(0.5), 0.38, 0.40, 0.39),
    (ERM(5.0), 0.485776, 0.485776, 0.485776),
]


@pytest.mark.parametrize(("risk", "a", "b", "both"), NESTED, ids=str)
def test_nested_risk_tells_trees_apart_that_static_risk_cannot(risk, a, b, both):
    """Returns .4, .7, .3, .6 with probabilities .45, .45, .05, .05 in both; what differs is when they become known."""
    assert nested(TREE_A, risk) == pytest.approx(a, abs=5e-7)
    assert nested(TREE_B, risk) == pytest.approx(b, abs=5e-7)
    assert static(TREE_A, risk) == pytest.approx(both, abs=5e-7)
    assert static(TREE_B, risk) == pytest.approx(both, abs=5e-7)


@every_size
def test_nested_erm_is_static_erm_and_nested_cvar_is_not_static_cvar(size):
    world = TokenWorld.random(*size)
    for x in range(len(world.reward)):
        tree = (tuple(level[x : x + 1] for level in world.reference), world.reward[x : x + 1])
        assert nested(tree, ERM(2.0)) == pytest.approx(static(tree, ERM(2.0)), abs=1e-12)
        assert nested(tree, CVaR(0.3)) < static(tree, CVaR(0.3)) - 0.1
