"""Token-level risk: numbers and figure of docs/theory/2-token-level-risk.md."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsa_kernels import ERM, KL, CVaR, RiskMeasure
from torch import Tensor

from benchmarks.theory.compare import descend
from benchmarks.theory.fixtures import TREE_A, TREE_B, two_token_tree
from benchmarks.theory.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, bars, saved
from rsa_lightning.losses import RSA
from rsa_lightning.tabular import bradley_terry, gradient, pair_objective, sequence_stats
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    distance,
    expectation,
    gibbs,
    kl,
    law_of,
    mixture,
    nested_values,
    on_values,
    stepwise,
    token_optimum,
)

LAM = 2.0
TAILS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 1.0)
V2_BETA = 0.5


def numbers() -> dict[str, float]:
    return {**_orders(), **_parallel(), **_scales(), **_nested(), **_fixed_points()}


def streams(world: TokenWorld) -> list[tuple[Tensor, float]]:
    """Reward at β = 1 and safety score at β/λ."""
    return [(world.reward, 1.0), (-world.cost, 1 / LAM)]


def orders(world: TokenWorld, risk: RiskMeasure) -> dict[str, Policy]:
    """The joint token-level optimum and both orders of two steps."""
    both = streams(world)
    return {
        "joint": token_optimum(world.reference, both, risk),
        "reward, safety": stepwise(world.reference, both, risk),
        "safety, reward": stepwise(world.reference, both[::-1], risk),
    }


def _orders() -> dict[str, float]:
    world, found = two_token_tree(), dict[str, float]()
    for risk, name in ((KL(), "KL"), (CVaR(0.97), "0.97"), (CVaR(0.5), "0.5")):
        ends = orders(world, risk)
        for order, policy in ends.items():
            found |= {f"{name}, {order}: {a}": float(policy[0][0, 0, a].exp()) for a in range(4)}
        found[f"{name}: order gap"] = distance(ends["reward, safety"], ends["safety, reward"])
        found[f"{name}: gap to joint"] = max(distance(ends["joint"], policy) for policy in list(ends.values())[1:])
    first, second = (stepwise(world.reference, steps) for steps in (streams(world), streams(world)[::-1]))
    return {**found, "sequence: order gap": distance(first, second)}


def _parallel() -> dict[str, float]:
    """l_r + l_c − l_ref of two models that were both trained from the reference."""
    world, found = two_token_tree(), dict[str, float]()
    reward, cost = streams(world)
    for name, risk in (("0.97", CVaR(0.97)), ("ERM", ERM(2.0))):
        experts = [token_optimum(world.reference, [stream], risk) for stream in (reward, cost)]
        product = mixture([*experts, world.reference], [1, 1, -1])
        found[f"product, {name}: gap"] = distance(product, token_optimum(world.reference, [reward, cost], risk))
    experts = [gibbs(world.reference, *stream) for stream in (reward, cost)]
    product = mixture([*experts, world.reference], [1, 1, -1])
    joint = gibbs(world.reference, world.reward - LAM * world.cost, 1.0)
    return {**found, "product, sequence: gap": distance(product, joint), "product, sequence: KL": kl(product, joint)}


def _scales() -> dict[str, float]:
    """β (lr + SRR) − R of the token-level optimum at β = 0.3, mu_value = 2: one number for all responses, or not."""
    world, beta, value_scale = two_token_tree(), 0.3, 2.0
    right = value_scale * beta
    assert on_values(ERM(right), beta) == ERM(value_scale)
    policy = token_optimum(world.reference, [(world.reward, beta)], ERM(right))
    found = {}
    for name, mu in (("right", right), ("same", value_scale)):
        stats = sequence_stats(policy, world.reference, ERM(mu))
        assert stats.risk is not None
        shift = beta * (stats.logratio + stats.risk) - world.reward.flatten()
        found[f"ERM, {name} mu: spread"] = float(shift.max() - shift.min())
    return found


def nested(tree: tuple[Policy, Tensor], risk: RiskMeasure) -> float:
    """The nested value at the root."""
    return float(nested_values(*tree, risk)[0])


def static(tree: tuple[Policy, Tensor], risk: RiskMeasure) -> float:
    """−ρ of the law of minus the return, which forgets when what became known."""
    return -float(risk.value(-tree[1].flatten(), law_of(tree[0]).log()))


def _nested() -> dict[str, float]:
    found = {}
    for name, risk in (("mean", KL()), ("0.97", CVaR(0.97)), ("0.9", CVaR(0.9)), ("0.5", CVaR(0.5)), ("ERM", ERM(5.0))):
        found[f"tree A, {name}"] = nested(TREE_A, risk)
        found[f"tree B, {name}"] = nested(TREE_B, risk)
        found[f"trees, static {name}"] = static(TREE_A, risk)
    return found


def losses() -> dict[str, RSA]:
    return {
        "v1": RSA(V2_BETA, risk_weight=1.0, detach_chosen_risk=False),
        "no detach, 1/2": RSA(V2_BETA, risk_weight=0.5, detach_chosen_risk=False),
        "v2, 1": RSA(V2_BETA, risk_weight=1.0),
        "v2, 1/2": RSA(V2_BETA, risk_weight=0.5),
    }


def v2_world() -> TokenWorld:
    return TokenWorld.random(0, vocabulary=4, length=2, prompts=1)


@functools.cache
def fixed_points(risk: RiskMeasure) -> dict[str, tuple[Policy, float]]:
    """Where descent from the reference ends under each loss, with its gradient; and the two closed forms."""
    world = v2_world()
    population = bradley_terry(world.reference, world.reward)
    return {
        name: descend(pair_objective(loss, world.reference, population, risk), world.reference)
        for name, loss in losses().items()
    }


def _fixed_points() -> dict[str, float]:
    world, risk = v2_world(), KL()
    optimum = token_optimum(world.reference, [(world.reward, V2_BETA)], risk)
    sequence = gibbs(world.reference, world.reward, V2_BETA)
    population = bradley_terry(world.reference, world.reward)
    found = {}
    for name, loss in losses().items():
        objective = pair_objective(loss, world.reference, population, risk)
        found[f"{name}: gradient at the optimum"] = gradient(objective, optimum)
        found[f"{name}: gap"] = distance(fixed_points(risk)[name][0], optimum)
    ends = {name: policy for name, (policy, _) in fixed_points(risk).items()}
    for name, policy in {"reference": world.reference, "token": optimum, "sequence": sequence, **ends}.items():
        found[f"{name}: reward"] = expectation(policy, world.reward)
        found[f"{name}: KL"] = kl(policy, world.reference)
    # the temperature and the risk weight that TDPO2 and Ra-DPO2 ship
    usual = pair_objective(RSA(0.1, risk_weight=0.5), world.reference, population, risk)
    drift = kl(descend(usual, world.reference, rate=15.0)[0], world.reference)
    found["v2 at 0.1 and 1/2: beta of the sequence optimum with that KL"] = matching_beta(world, drift)
    for name in ends:
        beta = matching_beta(world, found[f"{name}: KL"])
        found[f"{name}: beta of the sequence optimum with that KL"] = beta
        found[f"{name}: its reward"] = expectation(gibbs(world.reference, world.reward, beta), world.reward)
    return found


def matching_beta(world: TokenWorld, wanted: float) -> float:
    """The temperature at which the sequence optimum has a given KL to the reference, by bisection of its logarithm."""
    low, high = 1e-2, 1e2
    for _ in range(60):
        middle = (low * high) ** 0.5
        drift = kl(gibbs(world.reference, world.reward, middle), world.reference)
        low, high = (middle, high) if drift > wanted else (low, middle)
    return low


def draw(folder: Path) -> Path:
    return saved(folder / "token_risk.png", (1, 3), _panels)


def _panels(first_token: Any, order: Any, fixed: Any) -> None:
    world = two_token_tree()
    ends = orders(world, CVaR(0.97))
    series = {name: policy[0][0, 0].exp().tolist() for name, policy in ends.items()}
    bars(first_token, [str(a) for a in range(4)], series, [BLACK, BLUE, ORANGE])
    first_token.set(title="Order matters, CVaR(0.97)", xlabel="first token", ylabel="probability")
    first_token.legend(title="two-token tree")

    gaps = [distance(*list(orders(world, CVaR(mass)).values())[1:]) for mass in TAILS]
    order.plot(TAILS, gaps, "o-", color=BLUE, label="token level (risk weight 1)")
    order.plot(TAILS, [0.0] * len(TAILS), color=GREEN, linewidth=2, label="sequence level (DPO)")
    order.set(title="Difference between the orders", xlabel="tail (1: mean)", ylabel="largest difference")
    order.set_ylim(bottom=-0.005)
    order.legend(loc="center right")
    _draw_fixed_points(fixed)


def _draw_fixed_points(axis: Any) -> None:
    world, risk = v2_world(), KL()

    def line(returns: Sequence[Policy]) -> list[tuple[float, float]]:
        return [(kl(policy, world.reference), expectation(policy, world.reward)) for policy in returns]

    betas = [V2_BETA * 1.1**i for i in range(-4, 45)]
    axis.plot(
        *zip(*line([gibbs(world.reference, world.reward, beta) for beta in betas]), strict=True),
        color=GREY, linewidth=1.5, label="sequence optima, every β",
    )  # fmt: skip
    shown = {
        "DPO": (gibbs(world.reference, world.reward, V2_BETA), GREEN, "o"),
        "v1": (fixed_points(risk)["v1"][0], BLUE, "s"),
        "v2, risk weight 1/2": (fixed_points(risk)["v2, 1/2"][0], ORANGE, "^"),
        "v2, risk weight 1": (fixed_points(risk)["v2, 1"][0], PINK, "v"),
    }
    for name, (policy, colour, marker) in shown.items():
        axis.plot(*line([policy])[0], marker, color=colour, markersize=9, label=name)
    axis.plot(0, expectation(world.reference, world.reward), "D", color=BLACK, label="reference")
    axis.set(title="Where the losses end, β = 0.5", xlabel="KL to the reference, nats", ylabel="mean reward")
    axis.legend(loc="lower right")
