"""What the methods are compared with: optima under other constraints on the tail, and ends of inexact losses."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rsa_lightning.tabular import Objective, TabularPolicy
from rsa_lightning.transforms import Hinge, Indicator
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    expectation,
    gibbs,
    hinge_worths,
    kl,
    lagrangian_optimum,
    multipliers,
    prefix_logps,
)


class Constrained(NamedTuple):
    """A policy, what it is worth without the cost, E r − β KL, and the multiplier it was found at."""

    policy: Policy
    worth: float
    lam: float


def worth(world: TokenWorld, policy: Policy, beta: float) -> float:
    """E r − β KL(π‖p): what every constrained problem here maximises."""
    return expectation(policy, world.reward) - beta * kl(policy, world.reference)


def budgeted(world: TokenWorld, beta: float, cost: Tensor, budget: float) -> Constrained:
    """max E r − β KL subject to E cost ≤ budget.

    Raises:
        ValueError: the budget cannot be met.
    """
    single = replace(world, costs=cost[None])
    lams = multipliers(single, beta, torch.tensor([budget], dtype=cost.dtype))
    policy = lagrangian_optimum(single, beta, lams)
    return Constrained(policy, worth(world, policy, beta), float(lams))


def chance_optimum(world: TokenWorld, beta: float, threshold: float, mass: float) -> Constrained:
    """max E r − β KL subject to P(c > threshold) ≤ mass: linear in the policy, so an ordinary cost of 0 and 1."""
    return budgeted(world, beta, Indicator(threshold)(world.cost), mass)


def cantelli_optimum(
    world: TokenWorld, beta: float, threshold: float, mass: float, points: int = 20, rounds: int = 4
) -> Constrained:
    """max E r − β KL subject to VaR-CPO's sufficient condition, mean + sqrt((1 − a)/a) std ≤ threshold, a = mass.

    With b = 1/a − 1 the condition is E[b c² + 2 d c] ≤ d² + (E c)²/a, E c ≤ d. The square of the mean is convex: its
    tangent at any m bounds it from below, so E[b c² + 2 (d − m/a) c] ≤ d² − m²/a is sufficient for the condition, and
    the same at E c = m. The optimum is the best of these linear problems over m, by nested grids.

    Raises:
        ValueError: no policy meets the condition.
    """
    d, odds = threshold, 1 / mass - 1
    low, high, best = float(world.cost.min(-1).values.mean()), d, None
    for _ in range(rounds):
        step = (high - low) / points
        for m in [low + (i + 0.5) * step for i in range(points)]:
            cost = odds * world.cost.square() + 2 * (d - m / mass) * world.cost
            try:
                found = budgeted(world, beta, cost, d * d - m * m / mass)
            except ValueError:  # not with this mean
                continue
            # the square of (d − E c) is as large for a mean above d
            if expectation(found.policy, world.cost) <= d and (best is None or found.worth > best[0].worth):
                best = found, m
        if best is None:
            raise ValueError(f"no policy has mean + sqrt({odds:g}) std of its cost at or below {d:g}")
        low, high = best[1] - step, min(d, best[1] + step)
    assert best is not None
    return best[0]


def cvar_optimum(world: TokenWorld, beta: float, budget: float, mass: float) -> Constrained:
    """max E r − β KL subject to CVaR_a(c) ≤ budget: for every η one linear problem, of which the best one counts.

    Raises:
        ValueError: no policy meets the budget.
    """
    found = []
    for eta in world.cost.flatten().unique().tolist():
        try:
            found.append(budgeted(world, beta, Hinge(eta, mass)(world.cost), budget - eta))
        except ValueError:  # not with this η
            continue
    if not found:
        raise ValueError(f"no policy has a CVaR({mass:g}) of its cost below {budget:g}")
    return max(found, key=lambda one: one.worth)


def cvar_dual(world: TokenWorld, beta: float, budget: float, mass: float, most: float = 1e3) -> tuple[float, float]:
    """min over λ of max over policies *and* η of the Lagrangian, and where: an upper bound on `cvar_optimum`.

    The maximum is convex in λ: golden section over [0, most].
    """
    start = gibbs(world.reference, world.reward, beta)
    constant = worth(world, start, beta)

    def value(lam: float) -> float:
        return constant + lam * budget + float(hinge_worths(start, world.cost, lam, mass, beta)[1].max())

    low, high, ratio = 0.0, most, (5**0.5 - 1) / 2
    for _ in range(100):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if value(left) < value(right) else (left, high)
    return value((low + high) / 2), (low + high) / 2


def descend(objective: Objective, start: Policy, steps: int = 300, rate: float = 2.0) -> tuple[Policy, float]:
    """Where gradient descent ends, and the largest element of the gradient there.

    For losses with a stopped gradient, which is the gradient of no function: a line search could not use it. Logits
    move by `rate` times the gradient over the probability, under the start, of the response up to that token.
    """
    policy = TabularPolicy(start)
    scales = [level.exp() for level in prefix_logps(start)]
    for _ in range(steps):
        found = torch.autograd.grad(objective(policy), list(policy.parameters()))
        with torch.no_grad():
            for logits, part, scale in zip(policy.logits, found, scales, strict=True):
                logits -= rate * part / scale
    return tuple(level.detach() for level in policy()), max(float(part.abs().max()) for part in found)
