"""The methods, the models each needs, and the size of a study. All numbers that were chosen stand here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rsa_kernels import ERM, KL, CVaR, RiskMeasure

from benchmarks.tail_risk.prompts import Split
from rsa_lightning.losses import DPO, RSA, TDPO, PreferenceLoss

Labels = Literal["order", "mean", "hinge", "indicator"]

BETA = 0.5  # temperature of the whole problem, in units of reward per nat
TAIL = 0.05  # mass of the answers whose cost the hinge looks at
THRESHOLD = 10.0  # cost above which the indicator counts an answer; the writer exceeds it with 6 % of his answers
SHARES = (0.25, 0.5, 0.75)  # of the safe model in a merge


@dataclass(frozen=True)
class Method:
    """A path of three models by one parameter.

    Attributes:
        learner: loss and risk of both steps, a name in LEARNERS; methods with one learner share their reward step.
        values: multipliers λ of the cost; shares of the safe model where `merged`.
        labels: what the safety step learns from: the order of the pairs, or the true costs of both answers.
        merged: average the weights of the reward model and of the most conservative model of this other method.
    """

    name: str
    title: str
    learner: str
    values: tuple[float, ...]
    labels: Labels = "order"
    merged: str | None = None


LEARNERS: dict[str, tuple[PreferenceLoss, RiskMeasure]] = {
    "dpo": (DPO(), KL()),
    "tdpo": (TDPO(), KL()),
    "cvar97": (RSA(), CVaR(tail=0.97)),
    "cvar50": (RSA(), CVaR(tail=0.5)),
    "cvar10": (RSA(), CVaR(tail=0.1)),
    "erm1": (RSA(), ERM(mu=1.0)),
    "erm5": (RSA(), ERM(mu=5.0)),
}

# Chosen once, by `--pilot` on validation prompts of seed 100, which is none of the study's, by mean reward alone: the
# three points of a method span the range from about 3.7 down to 2.7, or as much of it as the method reaches. Those with
# token-level risk hold their reward up at any λ (3.2 at λ = 3), and with the worst tenth (CVaR 0.1) they hardly move.
ORDER_LAMS = (0.1, 0.3, 0.8)
RISK_LAMS = (0.1, 0.5, 3.0)
METHODS: tuple[Method, ...] = (
    Method("sacpo", "SACPO (DPO, DPO)", "dpo", ORDER_LAMS),
    Method("p_sacpo", "P-SACPO (merge)", "dpo", SHARES, merged="sacpo"),
    Method("tdpo", "stepwise TDPO2", "tdpo", RISK_LAMS),
    Method("rsa_cvar97", "RSA, CVaR 0.97", "cvar97", RISK_LAMS),
    Method("rsa_cvar50", "RSA, CVaR 0.5", "cvar50", RISK_LAMS),
    Method("rsa_cvar10", "RSA, CVaR 0.1", "cvar10", RISK_LAMS),
    Method("rsa_erm1", "RSA, ERM 1", "erm1", RISK_LAMS),
    Method("rsa_erm5", "RSA, ERM 5", "erm5", RISK_LAMS),
    Method("rsa_p", "RSA(P) (merge)", "cvar97", SHARES, merged="rsa_cvar97"),
    Method("mean", "costs: mean", "dpo", (0.05, 0.2, 0.6), labels="mean"),
    Method("indicator", "costs: indicator", "dpo", (2.0, 6.0, 15.0), labels="indicator"),
    Method("hinge", "costs: hinge", "dpo", (0.005, 0.02, 0.05), labels="hinge"),
)
BASELINE = "sacpo"
# what else a method is held against: cost transforms against the mean cost, which has the same labels and no tail;
# token risks against the KL, which is one of them
RIVALS: dict[str, tuple[str, ...]] = {
    "mean": ("indicator", "hinge"),
    "tdpo": ("rsa_cvar97", "rsa_cvar50", "rsa_cvar10", "rsa_erm1", "rsa_erm5"),
}
QUICK_METHODS = ("sacpo", "rsa_cvar97", "mean", "hinge")
PILOT = {  # multipliers that a pilot tries
    "order": (0.1, 0.2, 0.3, 0.4, 0.8, 3.0),
    "mean": (0.02, 0.05, 0.2, 0.8),
    "indicator": (0.5, 2.0, 6.0, 20.0),
    "hinge": (0.001, 0.005, 0.02, 0.08),
}


@dataclass(frozen=True)
class Model:
    """One trained or merged model of a seed.

    Attributes:
        start: the model it is trained from, and stays near; of a merge the reward model.
        other: of a merge, the safe model.
        value: λ, or the share of the safe model.
    """

    name: str
    kind: Literal["warmup", "reward", "safety", "merge"]
    start: str | None = None
    other: str | None = None
    learner: str = "dpo"
    labels: Labels = "order"
    value: float | None = None


@dataclass(frozen=True)
class Scale:
    """How much of everything. `answers` is per prompt; of `logps` of them log-probabilities are taken, for the KL."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    demonstrations: int = 3000
    warmup_epochs: int = 5
    pairs: int = 1600
    batch_size: int = 16  # pairs of an optimizer step
    hidden_size: int = 64
    layers: int = 2
    vocabulary: int = 1024
    answers: tuple[tuple[Split, int], ...] = (("validation", 24), ("test", 120), ("shifted", 30))
    logps: tuple[tuple[Split, int], ...] = (("validation", 8), ("test", 12), ("shifted", 6))
    threshold_answers: int = 24  # per training prompt, of the reward model, for the hinge's eta
    learning_rate: float = 5e-4
    warmup_learning_rate: float = 4e-3


FULL = Scale()
QUICK = replace(
    FULL,
    seeds=(0, 1),
    demonstrations=1500,
    warmup_epochs=4,
    pairs=480,
    answers=(("validation", 10), ("test", 24), ("shifted", 10)),
    logps=(("validation", 4), ("test", 6), ("shifted", 4)),
    threshold_answers=8,
)
PILOT_SCALE = replace(FULL, seeds=(100,), answers=(("validation", 40),), logps=(("validation", 12),))


def reward_model(method: Method) -> str:
    return f"reward_{method.learner}"


def path(method: Method) -> list[str]:
    """The names of the method's models, by rising λ or share."""
    return [f"{method.name}_{value:g}" for value in method.values]


def models(methods: Sequence[Method]) -> list[Model]:
    """All models of a seed in an order in which each comes after those it needs; none twice."""
    found = {"warmup": Model("warmup", "warmup")}
    for method in methods:
        first = Model(reward_model(method), "reward", "warmup", learner=method.learner)
        found[first.name] = first
        for name, value in zip(path(method), method.values, strict=True):
            if method.merged:
                safe = path(next(other for other in methods if other.name == method.merged))[-1]
                found[name] = Model(name, "merge", first.name, safe, method.learner, value=value)
            else:
                found[name] = Model(name, "safety", first.name, None, method.learner, method.labels, value)
    return list(found.values())


def pilot_methods() -> tuple[Method, ...]:
    """Every trained method with all the multipliers that a pilot tries."""
    return tuple(replace(method, values=PILOT[method.labels]) for method in METHODS if not method.merged)
