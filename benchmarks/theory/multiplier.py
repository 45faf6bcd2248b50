"""The multiplier and the merges: numbers and figure of docs/theory/3-the-multiplier.md."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.theory.fixtures import BETA, coin, four_answers, shortcuts, tensor
from benchmarks.theory.plots import BLUE, GREEN, GREY, ORANGE, RED, saved
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    distance,
    expectation,
    gibbs,
    lagrangian_optimum,
    mixture,
    multipliers,
    policy_of,
    sequence_logps,
    suboptimality,
)

BUDGET = -0.5  # of the random world's mean cost
SHARE = 0.5  # q of the merges
CAUTIOUS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)  # multipliers of the conservative model that is merged


def numbers() -> dict[str, float]:
    return {**_by_hand(), **_several(), **_merges()}


def _by_hand() -> dict[str, float]:
    world, beta, budget = four_answers(), 0.5, 0.4
    lams = multipliers(world, beta, tensor(budget))
    return {
        "coin: multiplier": float(multipliers(coin(), 1.0, tensor(0.25))),
        "four answers: cost of reward-aligned": expectation(gibbs(world.reference, world.reward, beta), world.cost),
        "four answers: multiplier": float(lams),
        "four answers: cost": expectation(lagrangian_optimum(world, beta, lams), world.cost),
    }


def _several() -> dict[str, float]:
    """Two budgets that bind, and then one so large that only the other one does."""
    world, found = shortcuts(constraints=2), dict[str, float]()
    aligned = gibbs(world.reference, world.reward, BETA)
    for name, budgets in (("both", tensor(-0.4, -0.4)), ("one", tensor(-0.4, 2.0))):
        lams = multipliers(world, BETA, budgets)
        policy = lagrangian_optimum(world, BETA, lams)
        for k in range(2):
            found[f"{name} binding: multiplier {k}"] = float(lams[k])
            found[f"{name} binding: cost {k}"] = expectation(policy, world.costs[k])
            found[f"reward-aligned: cost {k}"] = expectation(aligned, world.costs[k])
    return found


def geometric(first: Policy, second: Policy, share: float) -> Policy:
    """first^(1−q) second^q, normalised per response."""
    law = (1 - share) * sequence_logps(first) + share * sequence_logps(second)
    return policy_of(law, first[0].shape[-1])


def merges(world: TokenWorld, cautious: float, share: float) -> dict[str, float]:
    """How far the geometric mean per response, and per token, are from the optimum at λ = qλ̄."""
    lams = tensor(cautious)
    aligned = gibbs(world.reference, world.reward, BETA)
    safe = lagrangian_optimum(world, BETA, lams)
    optimum = lagrangian_optimum(world, BETA, share * lams)
    per_token = mixture([aligned, safe], [1 - share, share])
    return {
        "geometric": distance(geometric(aligned, safe, share), optimum),
        "per token": distance(per_token, optimum),
        "loss per token": suboptimality(world, per_token, BETA, share * lams),
        "cost per token": expectation(per_token, world.cost),
        "cost": expectation(optimum, world.cost),
    }


def _merges() -> dict[str, float]:
    world, found = shortcuts(), dict[str, float]()
    for cautious in CAUTIOUS:
        found |= {f"merge {cautious:g}: {name}": value for name, value in merges(world, cautious, SHARE).items()}
    return found


def draw(folder: Path) -> Path:
    return saved(folder / "multiplier.png", (1, 3), _panels)


def _panels(costs: Any, dual: Any, merge: Any) -> None:
    world = shortcuts()
    best = float(multipliers(world, BETA, tensor(BUDGET)))
    lams = [0.02 * i for i in range(76)]
    found = [expectation(lagrangian_optimum(world, BETA, tensor(lam)), world.cost) for lam in lams]
    costs.plot(lams, found, color=BLUE, linewidth=2)
    costs.axhline(BUDGET, color=RED, linestyle="--", linewidth=1.2, label=f"budget {BUDGET:g}".replace("-", "−"))
    costs.plot(best, BUDGET, "o", color=RED, markersize=8, label=f"λ* = {best:.3f}")
    costs.set(title="Mean cost of the optimum at λ", xlabel="λ", ylabel="mean cost")
    costs.legend()

    values = [dual_value(world, lam) for lam in lams]
    dual.plot(lams, values, color=BLUE, linewidth=2)
    dual.plot(best, dual_value(world, best), "o", color=RED, markersize=8, label="minimum: λ*")
    dual.set(title="The dual is convex", xlabel="λ", ylabel="D(λ), reward units")
    dual.legend()

    rows = [merges(world, cautious, SHARE) for cautious in CAUTIOUS]
    gaps = [row["per token"] for row in rows]
    merge.plot(CAUTIOUS, gaps, "o-", color=ORANGE, linewidth=2, label="mixing logits per token")
    slope = [gaps[-1] * (lam / CAUTIOUS[-1]) ** 2 for lam in CAUTIOUS[3:]]
    merge.plot(CAUTIOUS[3:], slope, ":", color=GREY, linewidth=1.5, label="slope 2")
    merge.plot([], [], color=GREEN, linewidth=2, label="geometric per response: 0, not drawn")
    merge.set(xscale="log", yscale="log", ylim=(8e-4, 9), title="Merging at q = ½: distance to λ = λ̄/2")
    merge.set(xlabel="λ̄ of the cautious model", ylabel="largest difference in probability")
    merge.legend(loc="upper left")


def dual_value(world: TokenWorld, lam: float) -> float:
    """D(λ) = β E_x log E_{y~p} exp((r − λ (c − budget)) / β)."""
    logits = sequence_logps(world.reference) + (world.reward - lam * (world.cost - BUDGET)) / BETA
    return float(BETA * torch.logsumexp(logits, -1).mean())
