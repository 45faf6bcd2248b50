"""The family as functions from a world and a multiplier to the policy that unlimited preferences lead to.

SACPO takes the temperature BETA; the token-level closed forms that at which their helpful step goes as far from the
reference as SACPO's. Methods without a closed form (v2, KTO, IPO, cDPO, the published estimator) are trained on the
whole population of preferences by `rsa_lightning.tabular`; v2 at a lower temperature.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rsa_kernels import ERM, KL, CVaR, RiskMeasure
from torch import Tensor

from rsa_lightning.legacy import LegacyCVaR
from rsa_lightning.losses import DPO, IPO, KTO, RSA, PreferenceLoss
from rsa_lightning.tabular import Population, bradley_terry, pair_objective, rated_objective, settle, win_rates
from rsa_lightning.temperatures import stage_betas
from rsa_lightning.transforms import CostTransform, Exponential, Indicator
from rsa_lightning.world import (
    Policy,
    TokenWorld,
    gibbs,
    hinge_optimum,
    kl,
    mixture,
    stepwise,
    token_optimum,
)

BETA = 0.5
LOW_BETA = BETA / 5  # of v2, which holds back so much that at BETA it hardly moves
STRONGEST, NO_SAFETY = 5.0, 1e-9  # the conservative multiplier of the merges, and that of their other end
STEPS = 120  # of training
GRAVE = 1.0  # costs above are catastrophic: mild ones end at 0.5
MERGE_RATIOS = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(low * (high / low) ** (i / (count - 1)) for i in range(count))


LAMS = log_spaced(0.02, STRONGEST, 10)
FEW_LAMS = log_spaced(0.05, 1.0, 3)  # of the methods that are trained


Path = Callable[[float], Policy]
"""From a strength, which is a multiplier or a merge ratio, to a policy."""


@dataclass(frozen=True)
class Method:
    """`path(world, beta)` at every strength; `trained`: its policies have no closed form, and take time."""

    name: str
    group: str
    path: Callable[[TokenWorld, float], Path]
    strengths: Sequence[float] = LAMS
    beta: float = BETA
    trained: bool = False


# ------------------------------------------------------------------------------------------------- closed forms


def sacpo(world: TokenWorld, beta: float) -> Path:
    start = gibbs(world.reference, world.reward, beta)
    return lambda lam: gibbs(start, -world.cost, beta / lam)


def on_cost(transform: CostTransform) -> Callable[[TokenWorld, float], Path]:
    """SACPO with a transform of the cost in its place."""

    def path(world: TokenWorld, beta: float) -> Path:
        start = gibbs(world.reference, world.reward, beta)
        return lambda lam: gibbs(start, -transform(world.cost), beta / lam)

    return path


def hinge(tail_mass: float) -> Callable[[TokenWorld, float], Path]:
    def path(world: TokenWorld, beta: float) -> Path:
        start = gibbs(world.reference, world.reward, beta)
        return lambda lam: hinge_optimum(start, world.cost, lam, tail_mass, beta)[0]

    return path


def printed(world: TokenWorld, beta: float) -> Path:
    """RSA's printed temperatures, the sign of the cost repaired."""

    def at(lam: float) -> Policy:
        betas = stage_betas(beta, lam, "rsa_paper")
        return stepwise(world.reference, [(world.reward, betas.reward), (-world.cost, betas.safety)])

    return at


def as_far(world: TokenWorld, beta: float, first_step: Callable[[float], Policy]) -> tuple[float, Policy]:
    """The temperature at which a method's helpful step goes as far from the reference, in KL, as SACPO's at beta.

    Methods that hold back more at equal temperature would else be compared with a SACPO of far larger multipliers.
    """
    wanted = kl(gibbs(world.reference, world.reward, beta), world.reference)
    low, high = beta / 64, beta * 4
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if kl(first_step(middle), world.reference) < wanted else (middle, high)
    return middle, first_step(middle)


def nested(risk: RiskMeasure) -> Callable[[TokenWorld, float], Path]:
    """Stepwise token-level optima: RSA v1 (with KL: TDPO1)."""

    def path(world: TokenWorld, beta: float) -> Path:
        beta, start = as_far(world, beta, lambda b: token_optimum(world.reference, [(world.reward, b)], risk))
        return lambda lam: token_optimum(start, [(-world.cost, beta / lam)], risk)

    return path


def parallel(risk: RiskMeasure) -> Callable[[TokenWorld, float], Path]:
    """Both steps from the reference, logits combined: l_r + l_c − l_ref."""

    def path(world: TokenWorld, beta: float) -> Path:
        beta, _ = as_far(world, beta, lambda b: token_optimum(world.reference, [(world.reward, b)], risk))
        return lambda lam: token_optimum(world.reference, [(world.reward, beta), (-world.cost, beta / lam)], risk)

    return path


def merged(
    conservative: Callable[[TokenWorld, float], Path],
) -> Callable[[TokenWorld, float], Path]:
    """Logits averaged between the reward-aligned policy and a conservatively safe one: P-SACPO, RSA(P)."""

    def path(world: TokenWorld, beta: float) -> Path:
        policy = conservative(world, beta)
        helpful, safe = policy(NO_SAFETY), policy(STRONGEST)
        return lambda ratio: mixture([helpful, safe], [1 - ratio, ratio])

    return path


def naive_merge(world: TokenWorld, beta: float) -> Path:
    """Logits averaged between DPO(H) and DPO(S), each from the reference."""
    helpful = gibbs(world.reference, world.reward, beta)
    safe = gibbs(world.reference, -world.cost, beta / STRONGEST)
    return lambda ratio: mixture([helpful, safe], [1 - ratio, ratio])


def safe_dpo(world: TokenWorld, beta: float) -> Path:
    """What SafeDPO's loss tends to: the reward's optimum among safe responses. The path is that of its temperature."""
    unsafe = Indicator(0.0)(world.cost)
    return lambda strength: gibbs(world.reference, world.reward - 1e3 * unsafe, beta / strength)


# ------------------------------------------------------------------------------------------------------ trained


def trained(
    loss: Callable[[float], PreferenceLoss],
    risk: RiskMeasure | None,
    population: Callable[[Policy, Tensor], Population] = bradley_terry,
) -> Callable[[TokenWorld, float], Path]:
    """Two steps of a pairwise loss, each from the policy before, on the pairs that `population` makes of the scores."""

    def step(reference: Policy, scores: Tensor, beta: float) -> Policy:
        return settle(pair_objective(loss(beta), reference, population(reference, scores), risk), reference, STEPS)

    def path(world: TokenWorld, beta: float) -> Path:
        start = step(world.reference, world.reward, beta)
        return lambda lam: step(start, -world.cost, beta / lam)

    return path


def with_kto(first: str, second: str) -> Callable[[TokenWorld, float], Path]:
    def step(kind: str, reference: Policy, scores: Tensor, beta: float) -> Policy:
        if kind == "dpo":
            return gibbs(reference, scores, beta)
        objective = rated_objective(KTO(beta=beta), reference, reference, win_rates(reference, scores))
        return settle(objective, reference, STEPS)

    def path(world: TokenWorld, beta: float) -> Path:
        start = step(first, world.reference, world.reward, beta)
        return lambda lam: step(second, start, -world.cost, beta / lam)

    return path


def cdpo(beta: float) -> DPO:
    return DPO(beta=beta, label_smoothing=0.1)


def v2(beta: float) -> RSA:
    return RSA(beta=beta, risk_weight=0.5, detach_chosen_risk=True)


def by_training(name: str, group: str, path: Callable[[TokenWorld, float], Path], beta: float = BETA) -> Method:
    return Method(name, group, path, FEW_LAMS, beta, trained=True)


@functools.cache
def family() -> dict[str, Method]:
    risks: dict[str, RiskMeasure] = {
        "CVaR(0.97)": CVaR(0.97),
        "CVaR(0.5)": CVaR(0.5),
        "CVaR(0.1)": CVaR(0.1),
        "ERM(1)": ERM(1.0),
        "ERM(5)": ERM(5.0),
    }
    found = [
        Method("SACPO", "mean cost", sacpo),
        Method("RSA, temperatures as printed", "mean cost", printed),
        Method("P-SACPO", "merges", merged(sacpo), MERGE_RATIOS),
        Method("naive merge", "merges", naive_merge, MERGE_RATIOS),
        Method("RSA(P), v1 CVaR(0.97)", "merges", merged(nested(CVaR(0.97))), MERGE_RATIOS),
        Method("TDPO1", "nested risk", nested(KL())),
        *(Method(f"RSA v1 {name}", "nested risk", nested(risk)) for name, risk in risks.items()),
        Method("parallel, KL", "nested risk", parallel(KL())),
        Method("parallel, CVaR(0.1)", "nested risk", parallel(CVaR(0.1))),
        Method("hinge, worst 5 %", "transformed cost", hinge(0.05), log_spaced(0.003, 2.0, 10)),
        Method("hinge, worst 1 %", "transformed cost", hinge(0.01), log_spaced(0.001, 1.0, 10)),
        Method("indicator, cost > 0", "transformed cost", on_cost(Indicator(0.0)), log_spaced(0.02, 10.0, 10)),
        Method("indicator, cost > 1", "transformed cost", on_cost(Indicator(GRAVE)), log_spaced(0.02, 10.0, 10)),
        Method("exponential, mu 0.5", "transformed cost", on_cost(Exponential(0.5)), log_spaced(0.003, 2.0, 10)),
        Method("SafeDPO", "one shot", safe_dpo, log_spaced(0.05, 2.0, 10)),
        *(
            by_training(name, "nested risk, v2", trained(v2, risk), LOW_BETA)
            for name, risk in {
                "TDPO2": KL(),
                **{f"RSA v2 {name}": risk for name, risk in risks.items()},
                "Ra-DPO v2, published estimator": LegacyCVaR(0.95),
            }.items()
        ),
        by_training("DPO, then KTO", "other losses", with_kto("dpo", "kto")),
        by_training("KTO, then DPO", "other losses", with_kto("kto", "dpo")),
        by_training("IPO", "other losses", trained(lambda beta: IPO(beta=beta), None)),
        by_training("cDPO, 10 % flips", "other losses", trained(cdpo, None)),
    ]
    return {method.name: method for method in found}
