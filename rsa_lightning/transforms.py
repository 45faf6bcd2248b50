"""Transforms of a cost that turn a constraint on its tail into one on a mean, and soft labels of pairs made of them.

A stage that learns from pairs whose labels are sigmoid(s · Δh) at temperature s · β/λ has the population optimum
π_ref · exp(−(λ/β) h)/Z, for every s and every h of the cost c: that of max E[r − λ h] − β KL. The mean cost is one h of
several.

    h          a constraint on E h bounds
    MeanCost   the mean cost
    Indicator  P(c > threshold), a chance constraint
    Hinge      CVaR: min over eta of eta + E h is the mean of the worst `tail` of the costs
    Exponential  entropic risk, (1/mu) log E exp(mu c) = (1/mu) log(1 + mu E h)

Sources: Rockafellar and Uryasev (2000) for Hinge; SACPO arXiv:2404.11049 for the step of safety alignment.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor


class CostTransform(abc.ABC):
    """A non-decreasing h of the cost c of a response; the safety step then weighs λ E h instead of λ E c."""

    needs_anchor: ClassVar[bool] = True  # whether a constant added to all costs of a prompt changes differences of h

    @abc.abstractmethod
    def __call__(self, costs: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """h(c) of every cost, in its dtype."""


@final
@dataclass(frozen=True)
class MeanCost(CostTransform):
    """h = c. Only differences count, so costs may be known up to a constant for each prompt."""

    needs_anchor: ClassVar[bool] = False

    def __call__(self, costs: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return costs


@final
@dataclass(frozen=True)
class Indicator(CostTransform):
    """h = 1[c > threshold]: E h is the probability of a cost above the threshold, which is linear in the policy.

    Args:
        threshold: in units of cost; 0 makes h the unsafe rate.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        _check_finite("Indicator threshold", self.threshold)

    def __call__(self, costs: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return (costs > self.threshold).to(costs.dtype)


@final
@dataclass(frozen=True)
class Hinge(CostTransform):
    """h = max(c − eta, 0) / tail. For every eta, eta + E h is at least CVaR, the mean of the worst `tail` of the costs.

    It is CVaR where eta is the upper `tail`-quantile of the costs of the policy that is trained.

    Args:
        eta: in units of cost; costs below it weigh nothing.
        tail: probability mass in (0, 1].
    """

    eta: float = 0.0
    tail: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("Hinge eta", self.eta)
        if not 0 < self.tail <= 1:
            mend = f": {self.tail:g} % is {self.tail / 100:g}" if 1 < self.tail <= 100 else ""
            raise ValueError(f"Hinge tail is a probability mass in (0, 1], got {self.tail}{mend}")

    def __call__(self, costs: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return (costs - self.eta).clamp(min=0) / self.tail


@final
@dataclass(frozen=True)
class Exponential(CostTransform):
    """h = (exp(mu c) − 1) / mu: a bound on E h is one on the entropic risk of c; mu → 0 is the mean.

    Args:
        mu: risk aversion > 0, per unit of cost.

    Raises:
        ValueError: exp(mu c) overflows the dtype; the cost is named.
    """

    mu: float = 1.0

    def __post_init__(self) -> None:
        if not (self.mu > 0 and math.isfinite(self.mu)):
            raise ValueError(f"Exponential mu is a positive number per unit of cost, got {self.mu}")

    def __call__(self, costs: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        values = torch.expm1(self.mu * costs) / self.mu
        overflown = costs[values.isinf()]
        if len(overflown):
            raise ValueError(
                f"{self}: exp(mu * cost) overflows at the cost {overflown.max():g}: lower mu (below "
                f"{math.log(torch.finfo(costs.dtype).max) / overflown.max():.2g} there), or divide the costs by a unit"
            )
        return values


def label_scale(differences: Float[Tensor, " P"], share: float = 0.95, largest: float = 4.0) -> float:
    """The s with which |s · Δh| is at most `largest` on `share` of the pairs, as large as that allows.

    Any s gives the same optimum, but labels near 0 or 1 no longer say how far apart two costs are, and labels near ½
    let noise win. Where so many pairs tie that the quantile is 0, the largest difference takes its place.

    Args:
        differences: h(rejected) − h(chosen) of every pair.
        share: of the pairs, in (0, 1].
        largest: in nats of the label's logit.

    Raises:
        ValueError: there is no pair, or none differs.
    """
    if not len(differences):
        raise ValueError("label_scale needs at least one pair")
    sizes = differences.abs()
    quantile = sizes.kthvalue(math.ceil(share * len(sizes))).values.item() or sizes.max().item()
    if quantile == 0:
        raise ValueError("no pair differs under this transform: choose another threshold (eta), or MeanCost")
    return largest / quantile


def soft_targets(
    h_chosen: Float[Tensor, " P"],
    h_rejected: Float[Tensor, " P"],
    s: float,
    link: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> Float[Tensor, " P"]:
    """The label of every pair, link(s · (h_rejected − h_chosen)); with the sigmoid a probability, ½ where they tie.

    `link` is `PreferenceLoss.target_at`: what a loss must be told for its optimum to lie at that logit.
    """
    return link(s * (h_rejected - h_chosen))


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number in units of cost, got {value}")
