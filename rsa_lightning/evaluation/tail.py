"""The upper tail of a cost: VaR, CVaR, bounds, and intervals that respect prompts.

Every statistic takes the costs and, optionally, weights over them; the plain figure is the uniform case and a
bootstrap resample is another weighting. One definition therefore serves the estimate and its interval. `level` is 1 −
tail: CVaR at level 0.99 is the mean of the worst 1 % of the mass. All arithmetic is float64.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from rsa_kernels.risk import CVaR
from torch import Tensor

Statistic = Callable[[Tensor, Tensor], Tensor]
"""(values [n], weights [r n]) -> [r]; each row of weights sums to one."""

BOOTSTRAP_ELEMENTS = 4_000_000  # resamples x samples held at once: 32 MB per float64 buffer
CUMULATIVE_SLACK = 1e-12  # a cumulative sum of n weights misses its exact value by a few n * 1e-16


def mean(costs: Float[Tensor, " n"], weights: Float[Tensor, "*b n"] | None = None) -> Float[Tensor, "*b"]:
    costs, weights = _prepare(costs, weights)
    return weights @ costs


def unsafe_rate(costs: Float[Tensor, " n"], weights: Float[Tensor, "*b n"] | None = None) -> Float[Tensor, "*b"]:
    """P(C > 0)."""
    costs, weights = _prepare(costs, weights)
    return weights @ (costs > 0).double()


def expected_excess(costs: Float[Tensor, " n"], weights: Float[Tensor, "*b n"] | None = None) -> Float[Tensor, "*b"]:
    """E[max(C, 0)]: what unsafe answers cost, with no credit for the safe ones."""
    costs, weights = _prepare(costs, weights)
    return weights @ costs.clamp(min=0)


def var(costs: Float[Tensor, " n"], level: float, weights: Float[Tensor, "*b n"] | None = None) -> Float[Tensor, "*b"]:
    """Value at risk, the lower quantile inf{c : P(C <= c) >= level}: always a cost that occurred."""
    costs, weights = _prepare(costs, weights)
    levels = torch.full((*weights.shape[:-1], 1), _checked_level(level), dtype=torch.float64)
    return _lower_quantile(costs, weights, levels)[..., 0]


def cvar(costs: Float[Tensor, " n"], level: float, weights: Float[Tensor, "*b n"] | None = None) -> Float[Tensor, "*b"]:
    """Mean of the worst `1 - level` of the mass; the atom at the quantile counts as far as it reaches into the tail.

    The value of `rsa_kernels.risk.CVaR(tail=1 - level)` over the empirical law (Rockafellar & Uryasev 2002).
    """
    costs, weights = _prepare(costs, weights)
    return CVaR(tail=1 - _checked_level(level)).value(costs.expand_as(weights), weights.log())


def cantelli_bound(
    costs: Float[Tensor, " n"], level: float, weights: Float[Tensor, "*b n"] | None = None
) -> Float[Tensor, "*b"]:
    """mean + sqrt(level / (1 - level)) std: VaR at `level` is no larger, whatever the law (arXiv:2601.22993).

    The standard deviation is that of the empirical law (divided by n).
    """
    costs, weights = _prepare(costs, weights)
    factor = (_checked_level(level) / (1 - level)) ** 0.5
    centre = weights @ costs
    variance = (weights * (costs - centre[..., None]).square()).sum(-1)
    return centre + factor * variance.sqrt()


def at_level(measure: Callable[..., Tensor], level: float) -> Statistic:
    """`var`, `cvar` or `cantelli_bound` at one level, as a statistic for the bootstrap."""
    return lambda values, weights: measure(values, level, weights)


def worst_of_n(costs: Float[Tensor, " n"], clusters: Int[Tensor, " n"]) -> Float[Tensor, " k"]:
    """The largest cost among the answers to each prompt, prompts in increasing order of their number."""
    costs, _ = _prepare(costs, None)
    names, members = clusters.unique(return_inverse=True)
    return torch.full((len(names),), -torch.inf, dtype=torch.float64).scatter_reduce(0, members, costs, "amax")


def quantile_curve(costs: Float[Tensor, " n"], levels: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """VaR at every level of [0, 1]: the inverse of the empirical distribution function."""
    costs, weights = _prepare(costs, None)
    if levels.numel() and not (levels.min() >= 0 and levels.max() <= 1):
        raise ValueError(f"quantile levels must lie in [0, 1], got {levels.min().item()} to {levels.max().item()}")
    return _lower_quantile(costs, weights, levels.double())


def clopper_pearson_upper(events: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided upper confidence bound on a rate after `events` of `trials`.

    The p with P(Binomial(trials, p) <= events) = 1 - confidence. Exact for independent trials (Clopper & Pearson
    1934), and above zero after zero events, where a bootstrap sees nothing. Several answers to one prompt are not
    independent: then it is optimistic.
    """
    if not 0 <= events <= trials or trials == 0:
        raise ValueError(
            f"Clopper-Pearson needs 0 <= events <= trials and at least one trial, got {events} of {trials}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a probability in (0, 1), got {confidence}")
    if events == trials:
        return 1.0
    low, high = events / trials, 1.0
    for _ in range(60):  # halves the bracket each time: 2^-60 is below float64 resolution
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial_cdf(events, trials, middle) > 1 - confidence else (low, middle)
    return high


def clustered_bootstrap(
    values: Float[Tensor, " n"],
    clusters: Int[Tensor, " n"],
    statistic: Statistic,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic: prompts (clusters) are drawn with replacement, their answers together.

    Answers to one prompt resemble each other; resampling answers one by one would count each as fresh evidence and
    give intervals that are too narrow (Davison & Hinkley 1997, section 3.8). A resample is a row of weights, so
    nothing is copied or re-sorted.

    Raises:
        ValueError: fewer than two clusters (there is nothing to resample), or a value that is not finite.
    """
    if resamples < 1:
        raise ValueError(f"a bootstrap needs at least one resample, got {resamples}")
    values, _ = _prepare(values, None)
    names, members = clusters.unique(return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a clustered bootstrap needs at least 2 prompts, got {len(names)}")
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, BOOTSTRAP_ELEMENTS // len(values))
    replicates = [
        statistic(values, _resampled_weights(members, len(names), min(rows, resamples - first), generator))
        for first in range(0, resamples, rows)
    ]
    low, high = torch.cat(replicates).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_difference(
    before: Float[Tensor, " n"],
    before_clusters: Int[Tensor, " n"],
    after: Float[Tensor, " m"],
    after_clusters: Int[Tensor, " m"],
    statistic: Statistic,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """statistic(after) - statistic(before) with its 95 % interval (estimate, low, high).

    Each resample draws the same prompts for both models, so that hard prompts cancel. A resample may miss every
    prompt of one side only if the two sides share few prompts.
    """
    n = len(before)

    def difference(values: Tensor, weights: Tensor) -> Tensor:
        sides = (values[n:], weights[:, n:]), (values[:n], weights[:, :n])
        later, earlier = (statistic(v, w / w.sum(-1, keepdim=True)) for v, w in sides)
        return later - earlier

    values, clusters = torch.cat((before.double(), after.double())), torch.cat((before_clusters, after_clusters))
    low, high = clustered_bootstrap(values, clusters, difference, resamples, seed)
    estimate = difference(values, torch.ones(1, len(values), dtype=torch.float64)).item()
    return estimate, low, high


def _prepare(costs: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if costs.ndim != 1 or costs.numel() == 0:
        raise ValueError(f"expected a non-empty one-dimensional tensor of costs, got shape {tuple(costs.shape)}")
    costs = costs.double()
    if not costs.isfinite().all():
        row = int((~costs.isfinite()).nonzero()[0])
        raise ValueError(f"value {row} is {costs[row].item()}: leave unscored answers out, and count them")
    if weights is None:
        weights = torch.full_like(costs, 1 / len(costs))
    return costs, weights


def _checked_level(level: float) -> float:
    if not 0 <= level < 1:
        raise ValueError(f"level is 1 - tail and lies in [0, 1), got {level}; the worst 1 % is level 0.99")
    return level


def _lower_quantile(costs: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    order = costs.argsort()
    cumulative = weights[..., order].cumsum(-1)
    # at least tiny: level 0 means the smallest cost that has any weight
    wanted = (levels - CUMULATIVE_SLACK).clamp(min=torch.finfo(torch.float64).tiny)
    index = torch.searchsorted(cumulative, wanted.contiguous()).clamp(max=len(costs) - 1)
    return costs[order][index]


def _resampled_weights(members: Tensor, clusters: int, resamples: int, generator: torch.Generator) -> Tensor:
    """[resamples, n]: how often each answer's prompt was drawn, divided by the number of answers drawn."""
    drawn = torch.randint(clusters, (resamples, clusters), generator=generator)
    counts = torch.zeros(resamples, clusters, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    weights = counts[:, members]
    return weights / weights.sum(-1, keepdim=True)


def _binomial_cdf(events: int, trials: int, p: float) -> float:
    k = torch.arange(events + 1, dtype=torch.float64)
    n, chance = torch.tensor(float(trials), dtype=torch.float64), torch.tensor(p, dtype=torch.float64)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_mass = log_choose + torch.xlogy(k, chance) + (n - k) * torch.log1p(-chance)
    return log_mass.logsumexp(0).exp().item()
