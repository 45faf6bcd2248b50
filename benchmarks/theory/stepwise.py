"""Two steps are one: numbers and figure of docs/theory/1-two-steps-are-one.md."""

from pathlib import Path
from typing import Any

from benchmarks.theory.fixtures import BETA, coin, shortcuts, tensor, three_answers
from benchmarks.theory.plots import BLACK, BLUE, GREEN, GREY, ORANGE, RED, saved
from rsa_lightning.temperatures import StageBetas, stage_betas
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    distance,
    expectation,
    gibbs,
    kl,
    lagrangian_optimum,
    stepwise,
    suboptimality,
)

LAM = 2.0
LAMS = (0.1, 0.2, 0.35, 0.6, 1.0, 2.0, 4.0, 10.0)


def two_steps(world: TokenWorld, betas: StageBetas, sign: float = 1.0) -> Policy:
    """The reward step, then the safety step; `sign=-1` adds the cost where it has to be taken off."""
    return stepwise(world.reference, [(world.reward, betas.reward), (-sign * world.cost, betas.safety)])


def numbers() -> dict[str, float]:
    return {**_three_answers(), **_coin(), **_shortcuts()}


def _three_answers() -> dict[str, float]:
    """β = 1, λ = 2: worked by hand on the page."""
    world = three_answers()
    first = gibbs(world.reference, world.reward, 1.0)
    second = two_steps(world, stage_betas(1.0, LAM))
    other = stepwise(world.reference, [(-world.cost, 1 / LAM), (world.reward, 1.0)])
    found = {"three answers: order gap": distance(second, other)}
    for i in range(3):
        found[f"three answers: step 1, {i}"] = float(first[0][0, 0, i].exp())
        found[f"three answers: step 2, {i}"] = float(second[0][0, 0, i].exp())
    return found


def _coin() -> dict[str, float]:
    """λ = β = 1: the sign as printed."""
    world, betas = coin(), stage_betas(1.0, 1.0, "kl_on_cost")
    right, wrong = two_steps(world, betas), two_steps(world, betas, sign=-1.0)
    return {
        "coin: optimum": float(right[0][0, 0, 1].exp()),
        "coin: printed sign": float(wrong[0][0, 0, 1].exp()),
        "coin: loss of printed sign": suboptimality(world, wrong, 2.0, tensor(1.0)),
    }


def _shortcuts() -> dict[str, float]:
    world, lams = shortcuts(), tensor(LAM)
    total = lagrangian_optimum(world, BETA, lams)
    both = lagrangian_optimum(world, (1 + LAM) * BETA, lams)
    pairs = {name: stage_betas(BETA, LAM, name) for name in ("total", "kl_on_cost", "rsa_paper")}
    ends = {name: two_steps(world, betas) for name, betas in pairs.items()}
    flipped = two_steps(world, pairs["rsa_paper"], sign=-1.0)
    aligned = gibbs(world.reference, world.reward, BETA)
    found = {
        "total: distance": distance(ends["total"], total),
        "total: suboptimality": suboptimality(world, ends["total"], BETA, lams),
        "kl_on_cost: distance": distance(ends["kl_on_cost"], both),
        "kl_on_cost: suboptimality": suboptimality(world, ends["kl_on_cost"], (1 + LAM) * BETA, lams),
        # against the objective RSA states, with KL on both streams
        "rsa_paper: distance": distance(ends["rsa_paper"], both),
        "rsa_paper: suboptimality": suboptimality(world, ends["rsa_paper"], (1 + LAM) * BETA, lams),
        "rsa_paper: distance at its own multiplier": distance(
            ends["rsa_paper"], lagrangian_optimum(world, BETA, tensor(LAM / (1 + LAM)))
        ),
        "printed sign: distance": distance(flipped, both),
        "printed sign: suboptimality": suboptimality(world, flipped, (1 + LAM) * BETA, lams),
        "total in the other problem: suboptimality": suboptimality(world, ends["total"], (1 + LAM) * BETA, lams),
    }
    shown = {"reference": world.reference, "reward": aligned, "two": ends["total"], "flipped": flipped}
    for name, policy in shown.items():
        found[f"{name}: reward"] = expectation(policy, world.reward)
        found[f"{name}: cost"] = expectation(policy, world.cost)
        found[f"{name}: KL"] = kl(policy, world.reference)
    # the largest multiplier that the printed temperatures can reach
    found["rsa_paper: cost at most"] = expectation(lagrangian_optimum(world, BETA, tensor(1.0)), world.cost)
    return found


def draw(folder: Path) -> Path:
    return saved(folder / "two_steps.png", (1, 2), _panels)


def _panels(plane: Any, losses: Any) -> None:
    world = shortcuts()

    def point(policy: Policy) -> tuple[float, float]:
        return expectation(policy, world.cost), expectation(policy, world.reward)

    line = [point(lagrangian_optimum(world, BETA, tensor(0.02 * 1.12**i))) for i in range(70)]
    plane.plot(*zip(*line, strict=True), color=GREY, linewidth=1.5, label="one-step optima, every λ")
    ends = [point(two_steps(world, stage_betas(BETA, lam))) for lam in LAMS]
    plane.plot(*zip(*ends, strict=True), "o", color=BLUE, markersize=8, label="two steps at (β, β/λ)")
    paper = [point(two_steps(world, stage_betas(BETA, lam, "rsa_paper"))) for lam in LAMS]
    plane.plot(*zip(*paper, strict=True), "s", color=ORANGE, markersize=5, label="printed temperatures, sign repaired")
    for name, policy, offset in (
        ("reference", world.reference, (8, -4)),
        ("reward-aligned", gibbs(world.reference, world.reward, BETA), (-92, -14)),
    ):
        plane.plot(*point(policy), "D", color=BLACK, markersize=7)
        plane.annotate(name, point(policy), xytext=offset, textcoords="offset points")
    plane.set(title="Where the steps end", xlabel="mean cost", ylabel="mean reward", ylim=(-1.45, 0.75))
    plane.legend(loc="lower right")

    lams = [0.05 * 1.12**i for i in range(54)]
    recipes = {
        "(β, (1+λ)β/λ), sign repaired": (1.0, ORANGE, "-"),
        "(β, (1+λ)β/λ), sign as printed": (-1.0, RED, "--"),
    }
    for label, (sign, colour, style) in recipes.items():
        lost = [_lost(world, lam, "rsa_paper", sign) for lam in lams]
        losses.plot(lams, lost, color=colour, linestyle=style, linewidth=2, label=label)
    exact = [_lost(world, lam, "kl_on_cost", 1.0) for lam in lams]
    losses.plot(lams, exact, color=GREEN, linewidth=2, label="((1+λ)β, (1+λ)β/λ): zero")
    losses.set_xscale("log")
    losses.set_yscale("symlog", linthresh=0.01)
    losses.set_ylim(-0.002, 3e3)
    losses.set(title="Lost value of E r − λ E c − (1+λ)β KL", xlabel="λ", ylabel="reward units")
    losses.legend(loc="upper left")


def _lost(world: TokenWorld, lam: float, parametrization: Any, sign: float) -> float:
    policy = two_steps(world, stage_betas(BETA, lam, parametrization), sign)
    return max(0.0, suboptimality(world, policy, (1 + lam) * BETA, tensor(lam)))
