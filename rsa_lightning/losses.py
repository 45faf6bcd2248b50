"""Preference losses: pure functions of per-sequence statistics, one loss per pair (KTO: per response), never reduced.

Every pairwise loss is a link applied to one margin (in nats),

    h = lr_w - lr_l - a * (SRR_l - SRR_w*)        lr = sum_t log q(y_t)/p(y_t),   SRR = sum_t rho(log p - log q)

with policy q, frozen reference p, risk weight a, and SRR_w* = stop-gradient(SRR_w) in the "v2" losses. The logit of
"chosen is preferred" is beta * h - offset.

Sources: DPO arXiv:2305.18290, IPO 2310.12036, TDPO 2404.11999, Ra-DPO 2505.20359, RSA 2512.24263, KTO 2402.01306,
offset: SafeDPO 2505.20065.
"""

import abc
import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from rsa_kernels.risk import KL, RiskMeasure
from torch import Tensor


class SequenceStats(NamedTuple):
    """What a loss may know about each of S responses, in nats."""

    logratio: Float[Tensor, " S"]  # sum over response tokens of log policy - log reference
    risk: Float[Tensor, " S"] | None = None  # nested_risk(...).total; None when the loss reads no risk
    baseline: Float[Tensor, ""] | None = None  # KTO's reference point (before its clamp), the same on every rank


class PreferenceTerms(NamedTuple):
    """Unreduced losses, and the implicit rewards of both sides (detached, in nats times beta)."""

    losses: Float[Tensor, " P"]
    chosen_rewards: Float[Tensor, " C"]
    rejected_rewards: Float[Tensor, " R"]


class PreferenceLoss(abc.ABC):
    """Maps the statistics of chosen and rejected responses to one loss per example.

    `beta` is the temperature of the stage. It may stay None in a configuration: the stage then derives it from `beta`
    and `lam` of the whole problem (see `temperatures`). Calling a loss whose beta is None is an error.
    """

    risks: ClassVar[tuple[type[RiskMeasure], ...]] = ()  # the measures the loss is defined for; () means it reads none
    largest_logit: ClassVar[float] = 4.0  # of a soft target: beyond, it hardly says more than its sign
    needs_baseline: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = True  # False: judges single responses, of either kind
    beta: float | None

    @abc.abstractmethod
    def __call__(
        self,
        chosen: SequenceStats,
        rejected: SequenceStats,
        *,
        target: Float[Tensor, " P"] | None = None,
        offset: Float[Tensor, " P"] | None = None,
    ) -> PreferenceTerms:
        """`target`: probability that chosen is preferred (None: 1). `offset`: nats taken off the logit (None: 0)."""

    def target_at(self, logit: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The target with which the expected loss of a pair is least where beta * h is this logit."""
        return torch.sigmoid(logit)

    @property
    def reads_risk(self) -> bool:
        return bool(self.risks) and getattr(self, "risk_weight", 1.0) != 0

    @property
    def risk_over_logratio(self) -> tuple[float, float] | None:
        """∂loss/∂risk over ∂loss/∂logratio of the chosen and of the rejected response; None where they vary."""
        return None

    @property
    def temperature(self) -> float:
        if self.beta is None:
            name = type(self).__name__
            raise ValueError(
                f"{name}.beta is not set: pass {name}(beta=0.1), or let a stage derive it from beta and lam"
            )
        return self.beta

    def with_beta(self, beta: float) -> "PreferenceLoss":
        """The same loss at another temperature."""
        return dataclasses.replace(self, beta=beta)  # type: ignore[type-var]

    def check_risk(self, risk: RiskMeasure | None) -> None:
        """Raises ValueError where the loss is not defined for this risk measure."""
        if self.reads_risk and not isinstance(risk, self.risks):
            wanted = "KL, CVaR or ERM" if RiskMeasure in self.risks else " or ".join(r.__name__ for r in self.risks)
            raise ValueError(
                f"{type(self).__name__} needs risk {wanted}, got {risk}: change `risk`, or take another loss"
            )


def margin(
    chosen: SequenceStats, rejected: SequenceStats, risk_weight: float, detach_chosen_risk: bool
) -> Float[Tensor, " P"]:
    """h of the module docstring, in nats. With risk_weight 0 the risks are not read."""
    h = chosen.logratio - rejected.logratio
    if risk_weight == 0:
        return h
    chosen_risk, rejected_risk = _risk(chosen), _risk(rejected)
    return h - risk_weight * (rejected_risk - (chosen_risk.detach() if detach_chosen_risk else chosen_risk))


def logistic(logit: Float[Tensor, " P"], target: Float[Tensor, " P"] | float = 1.0) -> Float[Tensor, " P"]:
    """Cross-entropy of sigmoid(logit) against `target`: -t log sigmoid(logit) - (1 - t) log sigmoid(-logit)."""
    return -target * F.logsigmoid(logit) - (1 - target) * F.logsigmoid(-logit)


def smooth(target: Float[Tensor, " P"] | None, label_smoothing: float) -> Float[Tensor, " P"] | float:
    """The target after flipping a label with probability `label_smoothing` (cDPO)."""
    return label_smoothing + (1 - 2 * label_smoothing) * (1.0 if target is None else target)


def _risk(stats: SequenceStats) -> Float[Tensor, " S"]:
    assert stats.risk is not None, "this loss reads the sequence risk: compute the statistics with a risk measure"
    return stats.risk


def _rewards(loss_beta: float, risk_weight: float, *sides: SequenceStats) -> list[Float[Tensor, " S"]]:
    """beta * (lr + a * SRR): with these, chosen - rejected = beta * h."""
    return [(loss_beta * (s.logratio + (risk_weight * _risk(s) if risk_weight else 0.0))).detach() for s in sides]


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value}")


def _check_range(name: str, value: float, upper: float) -> None:
    if not 0 <= value <= upper:
        raise ValueError(f"{name} must be in [0, {upper:g}], got {value}")


class LogisticLoss(PreferenceLoss, abc.ABC):
    """-log sigmoid(beta h - offset), h as above; `label_smoothing` is the flip probability of cDPO."""

    risk_weight: float
    detach_chosen_risk: bool
    label_smoothing: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check_positive(f"{name} beta", self.beta)
        _check_range(f"{name} risk_weight", self.risk_weight, 1.0)
        _check_range(f"{name} label_smoothing", self.label_smoothing, 0.5)

    @property
    def risk_over_logratio(self) -> tuple[float, float]:
        return 0.0 if self.detach_chosen_risk else self.risk_weight, self.risk_weight

    def __call__(self, chosen, rejected, *, target=None, offset=None) -> PreferenceTerms:
        logit = self.temperature * margin(chosen, rejected, self.risk_weight, self.detach_chosen_risk)
        losses = logistic(logit if offset is None else logit - offset, smooth(target, self.label_smoothing))
        return PreferenceTerms(losses, *_rewards(self.temperature, self.risk_weight, chosen, rejected))


@final
@dataclass(frozen=True)
class DPO(LogisticLoss):
    """The margin without risk, h = lr_w - lr_l. SACPO is DPO in both steps."""

    beta: float | None = None
    label_smoothing: float = 0.0
    risk_weight: float = field(default=0.0, init=False, repr=False)
    detach_chosen_risk: bool = field(default=False, init=False, repr=False)


@final
@dataclass(frozen=True)
class TDPO(LogisticLoss):
    """The sequential forward KL as risk. TDPO2 by default; TDPO1 is risk_weight=1, detach_chosen_risk=False."""

    risks: ClassVar[tuple[type[RiskMeasure], ...]] = (KL,)
    beta: float | None = None
    risk_weight: float = 0.5
    detach_chosen_risk: bool = True
    label_smoothing: float = 0.0


@final
@dataclass(frozen=True)
class RSA(LogisticLoss):
    """Any nested risk: the loss of both RSA steps, and Ra-DPO when used on a single one.

    v2 (default): the risk difference is weighted by `risk_weight` and the chosen risk carries no gradient, so that only
    the rejected side's drift is suppressed. v1: risk_weight=1, detach_chosen_risk=False, the exact Bradley-Terry
    likelihood of the token-level problem. risk_weight=0 is DPO.
    """

    risks: ClassVar[tuple[type[RiskMeasure], ...]] = (RiskMeasure,)
    beta: float | None = None
    risk_weight: float = 0.5
    detach_chosen_risk: bool = True
    label_smoothing: float = 0.0


@final
@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """(h - 1/(2 beta))^2, where an offset moves h by offset / beta.

    With a target t the two orders are averaged, t (h - m)^2 + (1 - t)(h + m)^2, m = 1/(2 beta). This is least at
    beta h = t - 1/2, which is why its target at a logit is not the sigmoid. Beyond [0, 1] it is no probability, the
    terms above no average, and the gradient as it should be.
    """

    largest_logit: ClassVar[float] = 0.5
    beta: float | None = None

    def __post_init__(self) -> None:
        _check_positive("IPO beta", self.beta)

    def target_at(self, logit: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return 0.5 + logit

    def __call__(self, chosen, rejected, *, target=None, offset=None) -> PreferenceTerms:
        h = margin(chosen, rejected, 0.0, False)
        h = h if offset is None else h - offset / self.temperature
        t, wanted = smooth(target, 0.0), 1 / (2 * self.temperature)
        losses = t * (h - wanted).square() + (1 - t) * (h + wanted).square()
        return PreferenceTerms(losses, *_rewards(self.temperature, 0.0, chosen, rejected))


@final
@dataclass(frozen=True)
class KTO(PreferenceLoss):
    """Kahneman-Tversky loss: one term per response, any numbers of desirable (chosen) and undesirable (rejected) ones.

    Responses weigh the same, whatever their kind; a pair is one of each. Data that has many more of one kind is
    balanced by the weights w_d and w_u.

        desirable:    w_d (1 - sigmoid(beta (lr - z0)))        undesirable:  w_u (1 - sigmoid(beta (z0 - lr)))
        z0 = max(0, mean lr of mismatched prompt-response pairs over the global batch), without gradient

    The baseline is a statistic of the batch: accumulating micro-batches estimates it per micro-batch.
    """

    needs_baseline: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False
    beta: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("KTO beta", self.beta)
        _check_positive("KTO desirable_weight", self.desirable_weight)
        _check_positive("KTO undesirable_weight", self.undesirable_weight)

    def __call__(self, chosen, rejected, *, target=None, offset=None) -> PreferenceTerms:
        if target is not None or offset is not None:
            raise ValueError("KTO judges single responses: drop the `target` and `offset` columns, or use DPO or RSA")
        baseline = chosen.baseline if chosen.baseline is not None else rejected.baseline
        assert baseline is not None, "KTO needs the mean log-ratio of mismatched pairs in SequenceStats.baseline"
        z0 = baseline.detach().clamp(min=0)
        desirable = self.desirable_weight * torch.sigmoid(-self.temperature * (chosen.logratio - z0))
        undesirable = self.undesirable_weight * torch.sigmoid(-self.temperature * (z0 - rejected.logratio))
        return PreferenceTerms(torch.cat([desirable, undesirable]), *_rewards(self.temperature, 0.0, chosen, rejected))
