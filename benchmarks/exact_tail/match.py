"""The SACPO policy that a policy is fairly compared with: of equal reward, equal value, or equal reward and KL."""

from collections.abc import Callable

from rsa_lightning.world import Policy, TokenWorld, expectation, gibbs, kl, sequence_logps

WEAKEST, STRONGEST = 1e-4, 1e3  # multipliers searched
STEPS, POINTS = 45, 70


def at_reward(world: TokenWorld, beta: float, reward: float) -> tuple[float, Policy] | None:
    """The weakest λ at which SACPO at temperature beta has this mean reward, and its policy; None where none has it."""
    return _on_path(world, beta, lambda policy: expectation(policy, world.reward), reward)


def at_value(world: TokenWorld, beta: float, value: float) -> tuple[float, Policy] | None:
    """Likewise for E[r] − β KL."""
    return _on_path(
        world, beta, lambda policy: expectation(policy, world.reward) - beta * kl(policy, world.reference), value
    )


def _on_path(
    world: TokenWorld, beta: float, measure: Callable[[Policy], float], wanted: float
) -> tuple[float, Policy] | None:
    """The weakest λ with this figure, by bisection in log λ between the first two points of a grid that enclose it.

    E[r] − β KL falls with λ. E[r] alone falls at first and may rise again, once costs and rewards are at odds no more.
    """
    start = gibbs(world.reference, world.reward, beta)

    def at(lam: float) -> Policy:
        return gibbs(start, -world.cost, beta / lam)

    grid = [WEAKEST * (STRONGEST / WEAKEST) ** (i / POINTS) for i in range(POINTS + 1)]
    if measure(at(WEAKEST)) < wanted:
        return None
    below = next((i for i, lam in enumerate(grid) if measure(at(lam)) <= wanted), 0)
    if below == 0:
        return None
    low, high = grid[below - 1], grid[below]
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if measure(at(middle)) > wanted else (low, middle)
    lam = (low * high) ** 0.5
    return lam, at(lam)


def at_reward_and_kl(world: TokenWorld, reward: float, nats: float) -> tuple[float, Policy] | None:
    """The policy p exp((r − λc) / β') of this mean reward and KL: of all policies with both, that of least mean cost.

    For every λ ≥ 0 one temperature β' gives the KL; its reward is largest without a cost and falls with λ. None where
    even the strongest λ leaves more reward.
    """
    law = sequence_logps(world.reference)

    def at(lam: float) -> tuple[float, float]:
        """Mean reward and 1 / β' for a multiplier."""
        returns, low, high = world.reward - lam * world.cost, 1e-6, 1e4
        for _ in range(STEPS):
            middle = (low * high) ** 0.5
            log_policy = (law + middle * returns).log_softmax(-1)
            found = (log_policy.exp() * (log_policy - law)).sum(-1).mean()
            low, high = (middle, high) if found < nats else (low, middle)
        return float((log_policy.exp() * world.reward).sum(-1).mean()), middle

    low, high = WEAKEST, STRONGEST
    if not at(high)[0] <= reward <= at(low)[0]:
        return None
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if at(middle)[0] > reward else (low, middle)
    return middle, gibbs(world.reference, world.reward - middle * world.cost, 1 / at(middle)[1])
