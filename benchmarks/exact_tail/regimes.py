"""Two regimes in which nested risk might help the tail where it does not elsewhere.

**Limited control.** The policy chooses the first CONTROLLED tokens; what follows is drawn from the reference, whatever
the policy (an environment, another speaker, a tool). A nested measure then knows how badly an early token can end,
where the mean does not.

**Costs out of support.** Half of the catastrophic responses are never compared in the preference data, so no method
is told of them; a method that holds on to the reference where it knows nothing might do less harm there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from rsa_kernels import ERM, CVaR, RiskMeasure
from torch import Tensor

from benchmarks.exact_tail.methods import BETA, GRAVE, LAMS, as_far, log_spaced, trained, v2
from benchmarks.exact_tail.study import measure, record, world_of
from rsa_lightning.losses import DPO, RSA
from rsa_lightning.tabular import Population, bradley_terry
from rsa_lightning.transforms import Hinge
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    gibbs,
    nested_values,
    on_values,
    prefix_logps,
    token_optimum,
)

CONTROLLED = 1  # tokens of three
UNSEEN = 0.5  # share of the catastrophic responses that no pair holds
TRAINED_LAMS = log_spaced(0.05, 1.0, 5)
NESTED: dict[str, RiskMeasure] = {
    "RSA v1 CVaR(0.97)": CVaR(0.97),
    "RSA v1 CVaR(0.5)": CVaR(0.5),
    "RSA v1 CVaR(0.1)": CVaR(0.1),
    "RSA v1 ERM(1)": ERM(1.0),
}


# --------------------------------------------------------------------------------------------- limited control


def given_prefix(reference: Policy, values: Tensor, tokens: int) -> Tensor:
    """E[value | the first `tokens` tokens] where the rest follows the reference: [X, V^tokens]."""
    found = values
    for level in reversed(reference[tokens:]):
        found = (level.exp() * found.view(level.shape)).sum(-1)
    return found


def what_is_controlled(world: TokenWorld) -> TokenWorld:
    """The world of the first tokens, worth what follows them on average."""
    return TokenWorld(
        world.reference[:CONTROLLED],
        given_prefix(world.reference, world.reward, CONTROLLED),
        torch.stack([given_prefix(world.reference, cost, CONTROLLED) for cost in world.costs]),
    )


def limited_control(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Method -> records, each beside the plain policy of equal reward, value, and reward and KL."""
    world = world_of(seed)
    known = what_is_controlled(world)

    def figures(policy: Policy) -> dict[str, float]:
        """Of whole responses."""
        return measure(world, (*policy, *world.reference[CONTROLLED:]))

    found = {}
    for name, risk in NESTED.items():

        def first_tokens(reference: Policy, returns: Tensor, beta: float, risk: RiskMeasure = risk) -> Policy:
            values = nested_values(world.reference, returns, on_values(risk, beta))[CONTROLLED]
            return token_optimum(reference, [(values, beta)], risk)

        beta, start = as_far(known, BETA, lambda b: first_tokens(known.reference, world.reward, b))
        found[name] = [record(known, first_tokens(start, -world.cost, beta / lam), BETA, lam, figures) for lam in LAMS]
    start = gibbs(known.reference, known.reward, BETA)
    found["hinge, worst 5 %"] = [
        record(known, limited_hinge(world, start, lam), BETA, lam, figures) for lam in log_spaced(0.003, 2.0, len(LAMS))
    ]
    return found


def limited_hinge(world: TokenWorld, start: Policy, lam: float) -> Policy:
    """The hinge's optimum over policies of the first tokens: the cost (c − η)₊/a is averaged over what follows."""
    tail_mass, law = 0.05, prefix_logps(start)[-1].flatten(1)

    def tilt(eta: float) -> Tensor:
        return given_prefix(world.reference, Hinge(eta, tail_mass)(world.cost), CONTROLLED)

    def worth(eta: float) -> float:
        return float(BETA * (law - lam * tilt(eta) / BETA).logsumexp(-1).mean()) - lam * eta

    eta = max(world.cost.flatten().unique().tolist(), key=worth)
    return gibbs(start, -tilt(eta), BETA / lam)


# --------------------------------------------------------------------------------------- costs out of support


def compared(world: TokenWorld, seed: int) -> Tensor:
    """1 for responses that preference data may hold, 0 for the catastrophes that they never do: [X, S]."""
    draw = torch.Generator().manual_seed(seed)
    lost = torch.rand(world.cost.shape, dtype=torch.float64, generator=draw) < UNSEEN
    return 1 - (lost & (world.cost > GRAVE)).double()


def among(population: Population, seen: Tensor) -> Population:
    weights = population.weights * seen[:, :, None] * seen[:, None, :]
    return population._replace(weights=weights / weights.sum())


def out_of_support(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Method -> records of policies trained without half of the catastrophes, and measured with them."""
    world = world_of(seed)
    seen = compared(world, seed)

    def population(reference: Policy, scores: Tensor) -> Population:
        return among(bradley_terry(reference, scores), seen)

    paths = {
        "SACPO": trained(lambda beta: DPO(beta=beta), None, population),
        "RSA v1 CVaR(0.97)": trained(v1, CVaR(0.97), population),
        "RSA v1 CVaR(0.1)": trained(v1, CVaR(0.1), population),
        "RSA v2 CVaR(0.97)": trained(v2, CVaR(0.97), population),
        "RSA v2 CVaR(0.1)": trained(v2, CVaR(0.1), population),
    }
    found = {}
    for name, path in paths.items():
        policy = path(world, BETA)
        found[name] = [{"beta": BETA, "strength": lam, **measure(world, policy(lam))} for lam in TRAINED_LAMS]
    return found


def v1(beta: float) -> RSA:
    return RSA(beta=beta, risk_weight=1.0, detach_chosen_risk=False)


REGIMES = {"limited control": limited_control, "out of support": out_of_support}


def seeds_of(name: str, seeds: Sequence[int]) -> Sequence[int]:
    """Training is slow: half of the worlds for the regime that needs it."""
    return seeds if name == "limited control" else seeds[: len(seeds) // 2]
