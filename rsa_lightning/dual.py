"""The multiplier of a cost budget, from sampled answers alone: the convex dual of the second alignment step, no RL.

The safety-aligned policy is the Gibbs policy π* ∝ π_r exp(−λ c / β) on top of the reward-aligned π_r. The λ at which
its expected cost is the budget b minimises

    D(λ) = β E_x log E_{y ~ π_r(·|x)} exp(−λ (c(x, y) − b) / β)      over λ >= 0,

with the inner mean over the answers sampled for each prompt. No reward is needed: it is in π_r already. From answers of
the model before alignment D tilts by (r − λ (c − b)) / β instead (CAN, arXiv:2405.19544). The step then runs at the
temperature β / λ. `rsa_lightning.tail_dual` does the same for the tail of the cost. All arithmetic is float64.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Status = Literal["met", "found", "unreachable"]

SLACK = 1e-12  # of the size of the costs: a mean of n equal costs misses them by a few n * 1e-16
STEPS = 300  # of the search; each halves the slope or the bracket
ELEMENTS = 4_000_000  # resamples (or thresholds) x answers held at once: 32 MB per buffer
FEW = 10.0  # effective answers per prompt below which the estimate is called uncertain


class Law(NamedTuple):
    """Costs of the sampled answers, one row per prompt, and the weights of the answers before any tilt.

    Rows are padded where prompts have fewer answers than others. The cost is `least` + `gaps`: exponents of differences
    to the cheapest answer neither overflow nor lose digits. A leading dimension k holds several costs of one sample.
    """

    least: Float[Tensor, "k p"]
    gaps: Float[Tensor, "k p m"]  # >= 0; 0 where there is no answer
    log_weights: Float[Tensor, "p m"]  # rows are distributions; −inf where there is no answer
    rows: Int[Tensor, " n"]  # answer i stands at [rows[i], columns[i]]
    columns: Int[Tensor, " n"]

    def like(self, costs: Float[Tensor, "k p m"]) -> "Law":
        """The same answers with other costs; what stands at places without an answer is ignored."""
        absent = self.log_weights.isinf()
        least = costs.masked_fill(absent, torch.inf).amin(-1)
        return self._replace(least=least, gaps=(costs - least[..., None]).masked_fill(absent, 0.0))

    @property
    def costs(self) -> Float[Tensor, "k p m"]:
        return self.least[..., None] + self.gaps

    @property
    def scale(self) -> float:
        return self.costs.abs().max().item()


@dataclass(frozen=True)
class DualEstimate:
    """A multiplier and what is known of it.

    Attributes:
        status: "met", the budget holds without a second step (lam is 0); "found"; "unreachable", even the cheapest
            answer to every prompt costs more on average, or exactly as much (lam is inf).
        lam, temperature: λ*, and beta / λ*, the temperature of the safety step.
        before, expected_cost, least_cost: the mean cost at λ = 0, at λ*, and of the cheapest answer to each prompt.
        effective_mean, effective_min: 1 / Σ w² of the tilted weights of a prompt's answers, over prompts.
        weight_variance: mean over prompts of the variance of m w, m answers each; 0 without a tilt.
        interval: 95 % percentile interval of λ*, prompts resampled; None with fewer than two prompts. A resample
            whose budget is met counts as 0, one that cannot reach it as inf.
        resamples_met, resamples_unreachable: how many of `resamples` were so.
    """

    status: Status
    lam: float
    beta: float
    budget: float
    before: float
    expected_cost: float
    least_cost: float
    effective_mean: float
    effective_min: float
    weight_variance: float
    interval: tuple[float, float] | None
    resamples: int
    resamples_met: int
    resamples_unreachable: int

    @property
    def temperature(self) -> float:
        return math.inf if self.lam == 0 else self.beta / self.lam

    @property
    def warnings(self) -> list[str]:
        """What stands against trusting the estimate, a sentence each."""
        found = []
        if self.status == "found" and self.effective_mean < FEW:
            found.append(
                f"only {self.effective_mean:.1f} effective answers per prompt carry the estimate: draw more answers "
                "per prompt, or choose a milder budget"
            )
        if self.status == "found" and self.resamples_met + self.resamples_unreachable:
            found.append(
                f"of {self.resamples} resamples of the prompts the budget was already met in {self.resamples_met} and "
                f"not reachable in {self.resamples_unreachable}: draw answers to more prompts"
            )
        return found


def dual_lambda(
    costs: Float[Tensor, " n"],
    prompts: Int[Tensor, " n"],
    budget: float,
    beta: float,
    rewards: Float[Tensor, " n"] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> DualEstimate:
    """λ* = argmin over λ >= 0 of D(λ), for the budget E c <= `budget`; prompts count alike, however many answers each.

    The budget of a chance, P(c > t) <= p, is that of the cost 1[c > t].

    Args:
        costs: of answers drawn from the reward-aligned policy; with `rewards`, from the model before alignment.
        prompts: the number of each answer's prompt.
        beta: temperature of the reward step, in units of reward per nat.
        resamples: of the bootstrap over prompts.

    Raises:
        ValueError: a temperature that is not positive, or values that are not finite or do not match.

    Sources: Safe RLHF arXiv:2310.12773 for the problem, CAN arXiv:2405.19544 for the dual with rewards.
    """
    return estimate(law_of(costs, prompts, beta, rewards), budget, beta, resamples, seed)


def law_of(
    costs: Float[Tensor, " n"], prompts: Int[Tensor, " n"], beta: float, rewards: Float[Tensor, " n"] | None = None
) -> Law:
    """The padded answers; `rewards` tilt them towards the reward-aligned policy, weights ∝ exp(r / β)."""
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta: a temperature must be a positive number, got {beta}")
    for name, values in (("costs", costs), ("prompts", prompts), ("rewards", rewards)):
        if values is not None and (values.ndim != 1 or len(values) != len(costs) or not values.isfinite().all()):
            raise ValueError(f"{name}: expected one finite number per answer, {len(costs)} in all")
    if not len(costs):
        raise ValueError("costs: there are none, so no multiplier can be estimated")
    names, rows = prompts.unique(return_inverse=True)
    order, counts = rows.argsort(stable=True), rows.bincount()
    columns = torch.empty_like(rows)
    columns[order] = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows[order]]
    shape = (len(names), int(counts.max()))
    log_weights = torch.full(shape, -torch.inf, dtype=torch.float64)
    log_weights[rows, columns] = 0.0 if rewards is None else rewards.double() / beta
    padded = torch.zeros(shape, dtype=torch.float64)
    padded[rows, columns] = costs.double()
    empty = torch.empty(0, dtype=torch.float64)
    return Law(empty, empty, log_weights.log_softmax(-1), rows, columns).like(padded[None])


def estimate(law: Law, budget: float, beta: float, resamples: int, seed: int) -> DualEstimate:
    """The multiplier of one cost (k = 1) with its interval."""
    if not math.isfinite(budget):
        raise ValueError(f"budget: expected a number in units of the cost, got {budget}")
    if resamples < 1:
        raise ValueError(f"a bootstrap needs at least one resample, got {resamples}")
    prompts = len(law.log_weights)
    uniform = torch.full((1, prompts), 1 / prompts, dtype=torch.float64)
    lam = solve(law, uniform, budget, beta).item()
    reached = lam if math.isfinite(lam) else 0.0
    means, weights = tilted(law, torch.tensor([reached], dtype=torch.float64), beta)
    effective, answers = 1 / weights.square().sum(-1)[0], (~law.log_weights.isinf()).sum(-1)
    drawn = _bootstrap(law, budget, beta, resamples, seed) if prompts > 1 else torch.tensor([lam])
    ordered = drawn.sort().values
    # lower and higher, not between: a mean with inf would be no figure
    places = math.floor(0.025 * (len(ordered) - 1)), math.ceil(0.975 * (len(ordered) - 1))
    least_cost = law.least.mean().item()
    return DualEstimate(
        status="met" if lam == 0 else "found" if math.isfinite(lam) else "unreachable",
        lam=lam,
        beta=beta,
        budget=budget,
        before=tilted(law, torch.zeros(1, dtype=torch.float64), beta)[0].mean().item(),
        expected_cost=means.mean().item() if math.isfinite(lam) else least_cost,
        least_cost=least_cost,
        effective_mean=effective.mean().item(),
        effective_min=effective.min().item(),
        weight_variance=(answers / effective - 1).mean().item(),
        interval=(ordered[places[0]].item(), ordered[places[1]].item()) if prompts > 1 else None,
        resamples=resamples if prompts > 1 else 0,
        resamples_met=int((drawn == 0).sum()) if prompts > 1 else 0,
        resamples_unreachable=int(drawn.isinf().sum()) if prompts > 1 else 0,
    )


def solve(law: Law, shares: Float[Tensor, "r p"], budget: float, beta: float) -> Float[Tensor, " k"]:
    """argmin of D for each cost of `law`, or each row of prompt shares: 0 where met, inf where unreachable.

    Newton's method on the slope D'(λ) = b − E_x E_tilted c, which rises with λ, kept inside a bracket and replaced by
    bisection wherever it does not halve the slope.
    """
    slack = SLACK * (law.scale + abs(budget))
    count = max(len(shares), len(law.least))
    zero = torch.zeros(count, dtype=torch.float64)
    met = slope(law, shares, zero, budget, beta)[0] >= -slack
    unreachable = ~met & ((shares * law.least).sum(-1) >= budget - slack)
    typical = law.gaps.mean().item()
    low, high, slope_before = zero, torch.full_like(zero, torch.inf), torch.full_like(zero, torch.inf)
    lam = torch.full_like(zero, beta / typical if typical > 0 else 1.0)
    done = met | unreachable
    for _ in range(STEPS):
        if done.all():
            break
        value, curvature = slope(law, shares, lam, budget, beta)
        low, high = torch.where(value < 0, lam, low), torch.where(value < 0, high, lam)
        newton = torch.where(curvature > 0, lam - value / curvature, torch.inf)
        newton = torch.where(high.isinf(), newton.clamp(max=10 * lam), newton)  # far out the slope is flat
        middle = torch.where(high.isinf(), 2 * lam, (low + high) / 2)
        trusted = (newton > low) & (newton < high) & (value.abs() <= 0.5 * slope_before)
        settled = ((newton - lam).abs() <= 1e-13 * lam) | (high - low <= 1e-14 * low)
        lam = torch.where(done | settled, lam, torch.where(trusted, newton, middle))
        done, slope_before = done | settled, value.abs()
    return torch.where(met, 0.0, torch.where(unreachable, torch.inf, lam))


def slope(law: Law, shares: Tensor, lam: Float[Tensor, " k"], budget: float, beta: float) -> tuple[Tensor, Tensor]:
    """D'(λ) and D''(λ), each [k]: budget less the tilted mean cost, and its variance within prompts over β."""
    means, weights = tilted(law, lam, beta)
    variances = (weights * (law.costs - means[..., None]).square()).sum(-1)
    return budget - (shares * means).sum(-1), (shares * variances).sum(-1) / beta


def tilted(law: Law, lam: Float[Tensor, " k"], beta: float) -> tuple[Float[Tensor, "k p"], Float[Tensor, "k p m"]]:
    """The mean cost of each prompt under weights ∝ w exp(−λ c / β), and these weights."""
    weights = (law.log_weights - (lam / beta)[:, None, None] * law.gaps).softmax(-1)
    return law.least + (weights * law.gaps).sum(-1), weights


def dual_value(law: Law, lam: Float[Tensor, " k"], budget: float, beta: float) -> Float[Tensor, " k"]:
    """D(λ) at finite λ, prompts counting alike, up to the constant β E log E exp(r / β) where rewards tilt."""
    log_means = (law.log_weights - (lam / beta)[:, None, None] * law.gaps).logsumexp(-1)
    return beta * log_means.mean(-1) + lam * (budget - law.least.mean(-1))


def chunks(count: int, elements: int) -> Iterator[slice]:
    """Parts of `count` problems of `elements` answers each that fit into memory together."""
    rows = max(1, ELEMENTS // elements)
    return (slice(first, first + rows) for first in range(0, count, rows))


def _bootstrap(law: Law, budget: float, beta: float, resamples: int, seed: int) -> Float[Tensor, " r"]:
    """λ* of resampled prompts, all answers to a prompt together."""
    prompts = len(law.log_weights)
    drawn = torch.randint(prompts, (resamples, prompts), generator=torch.Generator().manual_seed(seed))
    shares = torch.zeros(resamples, prompts, dtype=torch.float64)
    shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / prompts, dtype=torch.float64))
    return torch.cat([solve(law, shares[part], budget, beta) for part in chunks(resamples, law.gaps.numel())])
