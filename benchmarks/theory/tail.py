"""Aligning the tail: numbers and figure of docs/theory/4-aligning-the-tail.md."""

import functools
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.theory.compare import cantelli_optimum, chance_optimum, cvar_dual, cvar_optimum, worth
from benchmarks.theory.fixtures import BETA, shortcuts, tensor, two_ways_out
from benchmarks.theory.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, saved
from rsa_lightning.losses import DPO
from rsa_lightning.tabular import Population, gradient, pair_objective, soft_labels, train
from rsa_lightning.transforms import Hinge
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    cantelli,
    cvar,
    exceedance,
    expectation,
    gibbs,
    hinge_optimum,
    hinge_worths,
    kl,
    lagrangian_optimum,
    var,
)

THRESHOLD, CHANCE = 0.5, 0.05  # P(cost > threshold) ≤ chance
MASS, LAM = 0.05, 0.3  # of the CVaR, and its multiplier
LABEL_LAM, LABEL_MASS = 0.3, 0.2  # of the world that is trained
GAP_BUDGET, GAP_MASS = 0.5, 0.2  # of the world with a duality gap


def numbers() -> dict[str, float]:
    return {**_chance(), **_hinge(), **_gap(), **_labels()}


@functools.cache
def chance_pair(chance: float) -> tuple[Policy, Policy]:
    """The optimum under the chance constraint, and under Cantelli's condition for it."""
    world = shortcuts()
    exact = chance_optimum(world, BETA, THRESHOLD, chance)
    return exact.policy, cantelli_optimum(world, BETA, THRESHOLD, chance).policy


def _chance() -> dict[str, float]:
    world = shortcuts()
    exact, bound = chance_pair(CHANCE)
    found = {"chance: multiplier": chance_optimum(world, BETA, THRESHOLD, CHANCE).lam}
    aligned = gibbs(world.reference, world.reward, BETA)
    for name, policy in (("aligned", aligned), ("chance", exact), ("Cantelli", bound)):
        found[f"{name}: exceedance"] = exceedance(policy, world.cost, THRESHOLD)
        found[f"{name}: reward"] = expectation(policy, world.reward)
        found[f"{name}: worth"] = worth(world, policy, BETA)
        found[f"{name}: VaR"] = var(policy, world.cost, CHANCE)
        found[f"{name}: CVaR"] = cvar(policy, world.cost, CHANCE)
        found[f"{name}: bound"] = cantelli(policy, world.cost, CHANCE)
    return found


def local_maxima(etas: Tensor, worths: Tensor) -> list[int]:
    """Places in the list that are better than both neighbours."""
    inner = (worths[1:-1] > worths[:-2]) & (worths[1:-1] > worths[2:])
    return (inner.nonzero().flatten() + 1).tolist()


def _hinge() -> dict[str, float]:
    world = shortcuts()
    aligned = gibbs(world.reference, world.reward, BETA)
    etas, worths = hinge_worths(aligned, world.cost, LAM, MASS, BETA)
    policy, eta = hinge_optimum(aligned, world.cost, LAM, MASS, BETA)
    # the η that a look at the reward-aligned model gives
    naive_eta = var(aligned, world.cost, MASS)
    naive = gibbs(aligned, -Hinge(naive_eta, MASS)(world.cost), BETA / LAM)
    mean = matched(world, kl(policy, world.reference))
    found = {
        "hinge: local maxima": float(len(local_maxima(etas, worths))),
        "hinge: eta": eta,
        "hinge: VaR of the optimum": var(policy, world.cost, MASS),
        "hinge: VaR of aligned": naive_eta,
        "hinge: lost with that eta": tail_value(world, policy) - tail_value(world, naive),
    }
    for name, one in (("aligned", aligned), ("hinge", policy), ("naive eta", naive), ("mean cost", mean)):
        found[f"hinge, {name}: CVaR"] = cvar(one, world.cost, MASS)
        found[f"hinge, {name}: reward"] = expectation(one, world.reward)
        found[f"hinge, {name}: KL"] = kl(one, world.reference)
        found[f"hinge, {name}: mean cost"] = expectation(one, world.cost)
    return found


def tail_value(world: TokenWorld, policy: Policy) -> float:
    """E r − λ CVaR_a(c) − β KL."""
    return worth(world, policy, BETA) - LAM * cvar(policy, world.cost, MASS)


def matched(world: TokenWorld, wanted: float) -> Policy:
    """The optimum for the mean cost whose KL to the reference is `wanted`, by bisection over λ."""
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        found = lagrangian_optimum(world, BETA, tensor(middle))
        low, high = (middle, high) if kl(found, world.reference) < wanted else (low, middle)
    return found


def _gap() -> dict[str, float]:
    world = two_ways_out()
    best = cvar_optimum(world, BETA, GAP_BUDGET, GAP_MASS)
    bound, lam = cvar_dual(world, BETA, GAP_BUDGET, GAP_MASS)
    found = {"gap: primal": best.worth, "gap: dual": bound, "gap: multiplier of the dual": lam}
    found |= {f"gap: optimum, {i}": float(best.policy[0][0, 0, i].exp()) for i in range(3)}
    aligned = gibbs(world.reference, world.reward, BETA)
    for name, factor in (("below", 0.99), ("above", 1.01)):
        policy, _ = hinge_optimum(aligned, world.cost, factor * lam, GAP_MASS, BETA)
        found[f"gap: CVaR {name} the multiplier"] = cvar(policy, world.cost, GAP_MASS)
    return found


def label_world() -> tuple[TokenWorld, Policy, Policy, Tensor]:
    """A small world, its reward-aligned policy, its optimum for the tail, and the hinge costs of that."""
    world = TokenWorld.random(0, vocabulary=3, length=3, prompts=1, catastrophic=0.15)
    aligned = gibbs(world.reference, world.reward, BETA)
    optimum, eta = hinge_optimum(aligned, world.cost, LABEL_LAM, LABEL_MASS, BETA)
    return world, aligned, optimum, Hinge(eta, LABEL_MASS)(world.cost)


def label_populations() -> dict[str, tuple[DPO, Population]]:
    """What the safety step may be trained on: the losses and their pairs. `soft s` are the exact ones."""
    world, _, _, costs = label_world()

    def soft(scale: float) -> tuple[DPO, Population]:
        return DPO(scale * BETA / LABEL_LAM), soft_labels(world.reference, -scale * costs)

    def clipped(most: float) -> tuple[DPO, Population]:
        loss, pairs = soft(1.0)
        assert pairs.target is not None
        return loss, pairs._replace(target=pairs.target.clamp(1 - most, most))

    hard = soft_labels(world.reference, -1e9 * costs)  # 0, 1, and 1/2 where both costs are alike
    return {
        **{f"soft {scale:g}": soft(scale) for scale in (0.05, 0.2, 1.0)},
        "clipped 0.99": clipped(0.99),
        "clipped 0.95": clipped(0.95),
        "hard, smoothing 0.05": (DPO(BETA / LABEL_LAM, label_smoothing=0.05), hard),
    }


def _labels() -> dict[str, float]:
    world, aligned, optimum, _ = label_world()
    found = {
        "labels, aligned: CVaR": cvar(aligned, world.cost, LABEL_MASS),
        "labels, aligned: loss": BETA * kl(aligned, optimum),
        "labels, optimum: CVaR": cvar(optimum, world.cost, LABEL_MASS),
    }
    for name, (loss, pairs) in label_populations().items():
        objective = pair_objective(loss, aligned, pairs)
        policy = train(objective, aligned, tolerance=1e-8)
        found[f"labels, {name}: gradient at the optimum"] = gradient(objective, optimum)
        found[f"labels, {name}: CVaR"] = cvar(policy, world.cost, LABEL_MASS)
        # with η fixed the problem is β KL(π‖π*) from its optimum
        found[f"labels, {name}: loss"] = BETA * kl(policy, optimum)
    return found


def draw(folder: Path) -> Path:
    return saved(folder / "tail.png", (2, 2), _panels)


def _panels(worths: Any, chance: Any, frontier: Any, gap: Any) -> None:
    _draw_worths(worths)
    _draw_chance(chance)
    _draw_frontier(frontier)
    _draw_gap(gap)


def _draw_worths(axis: Any) -> None:
    world = shortcuts()
    aligned = gibbs(world.reference, world.reward, BETA)
    etas, found = hinge_worths(aligned, world.cost, LAM, MASS, BETA)
    tops, best = local_maxima(etas, found), int(found.argmax())
    axis.plot(etas, found, color=BLUE, linewidth=1.5)
    axis.plot(etas[tops], found[tops], "o", color=ORANGE, markersize=6, label="local maxima")
    axis.plot(etas[best], found[best], "*", color=RED, markersize=14, label="maximum: VaR of the optimum")
    start = var(aligned, world.cost, MASS)
    text = f"VaR of the reward-aligned\npolicy: far right, η = {start:.2f}"
    axis.text(0.715, -0.2125, text, color=GREY, ha="right", va="top")
    axis.set(title="What each η is worth", xlabel="η", ylabel="G(η), reward units")
    axis.set(xlim=(-0.25, 0.72), ylim=(-0.3, -0.212))
    axis.legend(loc="lower right")


def _draw_chance(axis: Any) -> None:
    world = shortcuts()
    chances = (0.02, 0.05, 0.1, 0.2)
    for i, (name, colour) in enumerate((("exact: cost 1[c > d]", GREEN), ("Cantelli's condition", PINK))):
        values = [worth(world, chance_pair(chance)[i], BETA) for chance in chances]
        axis.plot(chances, values, "o-", color=colour, linewidth=2, label=name)
    axis.set_xscale("log")
    axis.set_xticks(chances, [f"{100 * chance:g} %" for chance in chances])
    axis.xaxis.set_minor_formatter(lambda *_: "")
    axis.set(title=f"P(cost > {THRESHOLD:g}) ≤ p", xlabel="p", ylabel="E r − β KL at the optimum")
    axis.legend(loc="lower right")


def _draw_frontier(axis: Any) -> None:
    world = shortcuts()
    aligned = gibbs(world.reference, world.reward, BETA)
    lams = [0.002 * 1.15**i for i in range(50)]
    families = {
        "for the mean cost": ([lagrangian_optimum(world, BETA, tensor(lam)) for lam in lams], ORANGE),
        "for CVaR(5 %)": ([hinge_optimum(aligned, world.cost, lam, MASS, BETA)[0] for lam in lams], BLUE),
    }
    for name, (policies, colour) in families.items():
        points = [(cvar(policy, world.cost, MASS), worth(world, policy, BETA)) for policy in policies]
        axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.2, label=name)
    axis.set(title="Optima of two problems", xlabel="mean cost of the worst 5 %", ylabel="E r − β KL")
    axis.legend(loc="lower right")


def _draw_gap(axis: Any) -> None:
    world = two_ways_out()
    jump = 1.0  # from here on the second answer need not be rare
    below, above = [0.05 + 0.035 * i for i in range(28)], [jump + 0.03 * i for i in range(11)]
    axis.plot(
        below + above, [cvar_dual(world, BETA, b, GAP_MASS)[0] for b in below + above], color=RED, linestyle="--",
        linewidth=2, label="min over λ of the Lagrangian",
    )  # fmt: skip
    for budgets, label in ((below, "the constrained optimum"), (above, None)):
        best = [cvar_optimum(world, BETA, b, GAP_MASS).worth for b in budgets]
        axis.plot(budgets, best, color=GREEN, linewidth=2, label=label)
    axis.set(title="One multiplier is not enough", xlabel="budget of CVaR(20 %)", ylabel="E r − β KL")
    axis.legend(loc="lower right")
