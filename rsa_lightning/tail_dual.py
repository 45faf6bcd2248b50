"""The multiplier of a budget on the tail of the cost: CVaR_a(c) <= d, again from sampled answers and without RL.

CVaR_a(c) = min over η of η + E(c − η)₊ / a (Rockafellar & Uryasev 2000; a is the `tail`, the mass that counts). So

    max over π of E r − β KL   subject to   CVaR_a(c) <= d
    = max over η of { max over π of E r − β KL   subject to   E[η + (c − η)₊ / a] <= d },

a maximum over both and not a saddle point. For each η the inner problem is the convex one of `dual_lambda` with the
cost h_η = η + (c − η)₊ / a: its value over π_r is min over λ >= 0 of D(λ, η), its solution the Gibbs policy
π_r exp(−λ (c − η)₊ / (a β)). The best η is a quantile of the cost under that policy, so one of the sampled costs, and
none above d, since h_η >= η. It has the LARGEST min over λ of D(λ, η). The minimum over λ of max over η of D is larger
in general (there is a duality gap), and its multiplier belongs to no policy that keeps the budget.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsa_lightning.dual import FEW, DualEstimate, Law, chunks, dual_value, estimate, law_of, solve, tilted
from rsa_lightning.evaluation import tail as tails

CANDIDATES = 200  # thresholds looked at together; where there are more, evenly by rank, then all around the best
ENOUGH = 64  # answers per prompt, below which half of them is little to fit a tail on


class Threshold(NamedTuple):
    """A threshold of the hinge (c − η)₊ / a and what is reached with it."""

    eta: float
    value: float
    lam: float


@dataclass(frozen=True)
class TailEstimate:
    """A threshold and multiplier for a CVaR budget, fitted on every other answer and checked on the rest.

    Attributes:
        dual: of the cost η + (c − η)₊ / a and the budget `limit`, on the fitted half; its status is that of the
            CVaR budget, its interval takes η as given.
        before: CVaR of the other half as sampled.
        checked, interval: CVaR of the other half, reweighted, and its 95 % interval with prompts resampled. Both
            None where nothing was found.
        tail_answers: effective number, (Σ w)² / Σ w², of the other half's answers above η.
        answers: fewest per prompt, both halves together.
    """

    tail: float
    limit: float
    eta: float
    dual: DualEstimate
    before: float
    checked: float | None
    interval: tuple[float, float] | None
    tail_answers: float
    answers: int

    @property
    def warnings(self) -> list[str]:
        found = self.dual.warnings
        if self.answers < ENOUGH:
            found.append(
                f"{self.answers} answers per prompt, half of them to fit and half to check: a tail needs at least "
                f"{ENOUGH} (evaluation.sampling.samples_per_prompt); rely on the upper end of the check's interval"
            )
        if self.checked is None:
            return found
        if self.tail_answers < FEW:
            found.append(
                f"only {self.tail_answers:.1f} effective answers of the other half lie above the threshold: what the "
                "tail costs is a handful of events"
            )
        if self.interval is not None and self.interval[1] > self.limit:
            found.append(
                f"on the other half the tail may cost {self.interval[1]:.4g}, above {self.limit:g}: the budget is not "
                "shown to be kept"
            )
        return found


def dual_cvar(
    costs: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"],
    limit: float,
    tail: float,
    beta: float,
    rewards: Float[Tensor, " n"] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> TailEstimate:
    """The threshold η and multiplier λ of the budget CVaR_tail(c) <= `limit`, over prompts and answers together.

    Fitted on the first, third, ... answer to each prompt, checked on the others. The safety step that follows has the
    cost (c − η)₊ / tail and the temperature beta / λ.

    Args: as `dual_lambda`; `tail` is the mass of the worst answers, in (0, 1].

    Raises:
        ValueError: also for a tail outside (0, 1], or a prompt with a single answer.
    """
    _check_tail(tail)
    first = _alternate(prompts)
    fit, other = (
        law_of(costs[half], prompts[half], beta, None if rewards is None else rewards[half]) for half in (first, ~first)
    )
    best = best_threshold(fit, limit, tail, beta)
    dual = estimate(fit.like(hinge(fit.costs, best.eta, tail)), limit, beta, resamples, seed)
    lam = dual.lam if dual.status == "found" else 0.0
    before, _ = _cvar(other, costs[~first], prompts[~first], 0.0, best.eta, tail, beta)
    checked, answers = _cvar(other, costs[~first], prompts[~first], lam, best.eta, tail, beta)
    return TailEstimate(
        tail=tail,
        limit=limit,
        eta=best.eta,
        dual=dual,
        before=before.statistic(),
        checked=checked.statistic() if dual.status == "found" else None,
        interval=checked.interval(resamples, seed) if dual.status == "found" and len(fit.log_weights) > 1 else None,
        tail_answers=answers,
        answers=int(prompts.unique(return_counts=True)[1].min()),
    )


def hinge(costs: Tensor, eta: Tensor | float, tail: float) -> Tensor:
    """η + (c − η)₊ / tail: its mean is at least the CVaR, and equals it where η is the quantile."""
    return eta + (costs - eta).clamp(min=0) / tail


def best_threshold(law: Law, limit: float, tail: float, beta: float) -> Threshold:
    """The sampled cost η with the largest min over λ >= 0 of D(λ, η), its value and that λ.

    All distinct costs up to `limit` where there are at most 200; else 200 of them evenly by rank, and then again
    between the neighbours of the best, down to every cost there. The function may have several local maxima: with
    that many costs a narrow one can be missed. Whether the budget is met (value 0) or out of reach (−inf) is never
    missed: the η that decide it, quantiles of all answers and of the cheapest per prompt, are always among them.
    """
    present = ~law.log_weights.isinf()
    atoms = law.costs[0][present].unique()
    decisive = _quantiles(law, tail)
    atoms = atoms[atoms <= max(limit, decisive.min().item())]
    best = Threshold(decisive.min().item(), -math.inf, math.inf)
    low, high = 0, len(atoms) - 1
    candidates = decisive
    while True:
        places = torch.linspace(low, high, min(CANDIDATES, high - low + 1), dtype=torch.float64).round().long()
        candidates = torch.cat((candidates, atoms[places]))
        values, lams = _values(law, candidates, limit, tail, beta)
        top = int(values.argmax())
        if values[top] > best.value:
            best = Threshold(candidates[top].item(), values[top].item(), lams[top].item())
        if len(places) == high - low + 1 or best.value in (0.0, -math.inf):
            return best
        above = int(torch.searchsorted(atoms[places], best.eta))  # the best may be none of these places
        low, high = int(places[max(above - 1, 0)]), int(places[min(above + 1, len(places) - 1)])
        candidates = candidates[:0]


def threshold_at(
    costs: Float[Tensor, " n"], prompts: Int[Tensor, " n"], lam: float, tail: float, beta: float
) -> Threshold:
    """The η that is best at a given multiplier, without a budget: the optimum of E r − λ CVaR(c) − β KL over π and η.

        G(η) = β E_x log E_{π_r} exp(−λ (c − η)₊ / (tail β)) − λ η

    Between two sampled costs G is convex, so it is largest at one of them; it may have several local maxima, and every
    cost is looked at.
    """
    _check_tail(tail)
    law = law_of(costs, prompts, beta)
    atoms = costs.double().unique()
    values = []
    for part in chunks(len(atoms), law.gaps.numel()):
        eta = atoms[part]
        hinged = law.like(hinge(law.costs, eta[:, None, None], tail))
        values.append(dual_value(hinged, torch.full_like(eta, lam), 0.0, beta))
    found = torch.cat(values)
    top = int(found.argmax())
    return Threshold(atoms[top].item(), found[top].item(), lam)


def _values(law: Law, etas: Float[Tensor, " k"], limit: float, tail: float, beta: float) -> tuple[Tensor, Tensor]:
    """min over λ of D(λ, η), and that λ, at each η; −inf and inf where the budget is out of reach with it."""
    values, lams = [], []
    shares = torch.full((1, len(law.log_weights)), 1 / len(law.log_weights), dtype=torch.float64)
    for part in chunks(len(etas), law.gaps.numel()):
        hinged = law.like(hinge(law.costs, etas[part][:, None, None], tail))
        lam = solve(hinged, shares, limit, beta)
        value = dual_value(hinged, lam.nan_to_num(posinf=0.0), limit, beta)
        # λ = 0 is worth exactly 0: rounding must not rank what is met below anything
        values.append(torch.where(lam.isinf(), -torch.inf, torch.where(lam == 0, 0.0, value)))
        lams.append(lam)
    return torch.cat(values), torch.cat(lams)


def _quantiles(law: Law, tail: float) -> Float[Tensor, " 2"]:
    """The η that minimise E h_η without a tilt, and under the strongest: quantiles at level 1 − tail."""
    present = ~law.log_weights.isinf()
    weights = (law.log_weights.exp() / len(law.log_weights))[present]
    return torch.stack([tails.var(law.costs[0][present], 1 - tail, weights), tails.var(law.least[0], 1 - tail)])


class _Weighted(NamedTuple):
    """Answers with tilted weights: CVaR as it is, and with prompts resampled."""

    costs: Tensor
    prompts: Tensor
    weights: Tensor
    tail: float

    def statistic(self) -> float:
        return tails.cvar(self.costs, 1 - self.tail, self.weights).item()

    def interval(self, resamples: int, seed: int) -> tuple[float, float]:
        counts = self.prompts.unique(return_inverse=True, return_counts=True)
        answers = counts[2][counts[1]].double()  # the bootstrap gives each answer, not each prompt, the same weight

        def reweighted(values: Tensor, drawn: Tensor) -> Tensor:
            weights = drawn * answers * self.weights
            return tails.cvar(values, 1 - self.tail, weights / weights.sum(-1, keepdim=True))

        return tails.clustered_bootstrap(self.costs, self.prompts, reweighted, resamples, seed)


def _cvar(
    law: Law, costs: Tensor, prompts: Tensor, lam: float, eta: float, tail: float, beta: float
) -> tuple[_Weighted, float]:
    """The answers of a law tilted by a hinge, and the effective number of those above its threshold."""
    _, padded = tilted(law.like(hinge(law.costs, eta, tail)), torch.tensor([lam], dtype=torch.float64), beta)
    weights = padded[0, law.rows, law.columns] / len(law.log_weights)
    above = weights[costs > eta]
    effective = (above.sum().square() / above.square().sum()).item() if above.sum() > 0 else 0.0
    return _Weighted(costs.double(), prompts, weights, tail), effective


def _alternate(prompts: Int[Tensor, " n"]) -> Tensor:
    """Every other answer to each prompt, beginning with the first."""
    rows, counts = prompts.unique(return_inverse=True, return_counts=True)[1:]
    if counts.min() < 2:
        raise ValueError("a CVaR budget is fitted on half of the answers and checked on the rest: give each prompt two")
    order = rows.argsort(stable=True)
    first = torch.empty_like(rows, dtype=torch.bool)
    first[order] = (torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows[order]]) % 2 == 0
    return first


def _check_tail(tail: float) -> None:
    if not 0 < tail <= 1:
        raise ValueError(f"tail is a probability mass in (0, 1], got {tail}; the worst 5 % is 0.05")
