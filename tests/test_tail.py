"""Tail statistics of costs agree with sorting, and their intervals cover what they claim to cover."""

import math

import pytest
import torch
from torch import Tensor

from rsa_lightning.evaluation import tail

ONE_TO_TEN = torch.arange(1.0, 11.0)


def heavy(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).mul(1.5).exp() - 1


def sorted_cvar(costs: Tensor, level: float) -> float:
    """The worst (1 - level) n costs, the last of them counted by the fraction that is left."""
    wanted, total = (1 - level) * len(costs), 0.0
    for i, cost in enumerate(costs.sort(descending=True).values.tolist()):
        total += cost * min(max(wanted - i, 0.0), 1.0)
    return total / wanted


def test_cvar_of_one_to_ten():
    """Tail 0.25 is 2.5 costs: (10 + 9 + 8 / 2) / 2.5 = 9.2. Tail 0.1 is the largest."""
    assert tail.cvar(ONE_TO_TEN, 0.75).item() == pytest.approx(9.2, abs=1e-12)
    assert tail.cvar(ONE_TO_TEN, 0.9).item() == pytest.approx(10, abs=1e-12)
    assert tail.cvar(ONE_TO_TEN, 0.0).item() == pytest.approx(5.5, abs=1e-12)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99, 0.123])
@pytest.mark.parametrize("n", [1, 7, 100, 2000])
def test_cvar_and_var_agree_with_sorting(n: int, level: float):
    costs = heavy(n)
    costs[n // 2 :] = costs[n // 2 :].round()  # with ties
    assert tail.cvar(costs, level).item() == pytest.approx(sorted_cvar(costs, level), rel=1e-10)
    ordered = costs.sort().values
    assert tail.var(costs, level).item() == ordered[math.ceil(level * n - 1e-9) - 1].item()


def test_var_is_the_lower_quantile():
    """9 is the smallest cost that at least 90 % of 1..10 do not exceed; level 0 gives the smallest cost."""
    assert tail.var(ONE_TO_TEN, 0.9).item() == 9
    assert tail.var(ONE_TO_TEN, 0.95).item() == 10
    assert tail.var(ONE_TO_TEN, 0.0).item() == 1
    levels = torch.tensor([0.0, 0.1, 0.11, 0.9, 1.0], dtype=torch.float64)
    assert tail.quantile_curve(ONE_TO_TEN, levels).tolist() == [1, 1, 2, 9, 10]


def test_weights_are_repetitions():
    """Weights proportional to (3, 0, 1) give what the costs 2, 2, 2, 9 give, for every statistic."""
    costs, repeated = torch.tensor([2.0, 100.0, 9.0]), torch.tensor([2.0, 2.0, 2.0, 9.0])
    weights = torch.tensor([[0.75, 0.0, 0.25]], dtype=torch.float64)
    statistics = [tail.mean, tail.unsafe_rate, tail.expected_excess]
    statistics += [tail.at_level(f, 0.6) for f in (tail.var, tail.cvar, tail.cantelli_bound)]
    for statistic in statistics:
        expected = statistic(repeated, torch.full((1, 4), 0.25, dtype=torch.float64))
        torch.testing.assert_close(statistic(costs, weights), expected, rtol=0, atol=1e-12)


def test_means_rates_and_excess():
    costs = torch.tensor([-3.0, 0.0, 1.0, 6.0])
    assert tail.mean(costs).item() == 1
    assert tail.unsafe_rate(costs).item() == 0.5  # a cost of exactly 0 is safe
    assert tail.expected_excess(costs).item() == 1.75


def test_cantelli_bounds_var():
    """Costs (0, 0, 1, 3), tail 0.1: mean 1, variance 1.5, so 1 + sqrt(9) * sqrt(1.5) = 4.674235."""
    assert tail.cantelli_bound(torch.tensor([0.0, 0.0, 1.0, 3.0]), 0.9).item() == pytest.approx(4.674235, abs=1e-6)
    for level in (0.5, 0.9, 0.99):
        assert tail.cantelli_bound(heavy(500), level) >= tail.var(heavy(500), level)


def test_worst_of_n_is_per_prompt():
    worst = tail.worst_of_n(torch.tensor([1.0, 5.0, -2.0, 3.0, -1.0]), torch.tensor([7, 2, 7, 2, 9]))
    assert worst.tolist() == [5, 1, -1]


def test_clopper_pearson_solves_its_equation():
    """At the bound p, seeing `events` or fewer has probability 5 %; after none of n it is 1 - 0.05^(1/n)."""
    for events, trials in ((3, 50), (180, 2000), (1, 2)):
        p = tail.clopper_pearson_upper(events, trials)
        below = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(events + 1))
        assert below == pytest.approx(0.05, abs=1e-9)
    assert tail.clopper_pearson_upper(0, 2000) == pytest.approx(1 - 0.05 ** (1 / 2000), abs=1e-12)
    assert tail.clopper_pearson_upper(4, 4) == 1


def correlated(prompts: int, answers: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers to one prompt share half their variance; the mean of the law is 0."""
    shared = torch.randn(prompts, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(prompts, answers, generator=generator, dtype=torch.float64)
    return (shared + own).flatten(), torch.arange(prompts).repeat_interleave(answers)


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


def test_clustered_interval_covers_and_plain_one_does_not():
    """300 data sets of 40 prompts with 8 answers: three standard errors of a coverage of 95 % are 3.8 points.

    A percentile interval of 40 clusters is a little short. One by one, answers would count eight times over.
    """
    generator = torch.Generator().manual_seed(1)
    by_prompt, one_by_one = [], []
    for seed in range(300):
        values, prompts = correlated(40, 8, generator)
        by_prompt.append(tail.clustered_bootstrap(values, prompts, tail.mean, 300, seed))
        one_by_one.append(tail.clustered_bootstrap(values, torch.arange(len(values)), tail.mean, 300, seed))
    assert 0.90 <= covered(by_prompt, 0.0) <= 0.985
    assert covered(one_by_one, 0.0) < 0.75


def test_interval_of_cvar_covers():
    """Normal costs, CVaR at 0.9: density(z) / 0.1 with z = 1.2816, 1.7550 for standard deviation 1."""
    generator = torch.Generator().manual_seed(2)
    statistic, intervals = tail.at_level(tail.cvar, 0.9), []
    for seed in range(200):
        values, prompts = correlated(100, 4, generator)
        intervals.append(tail.clustered_bootstrap(values / math.sqrt(2), prompts, statistic, 200, seed))
    assert 0.86 <= covered(intervals, 1.7550) <= 0.99


def test_bootstrap_in_slices_is_the_same_bootstrap(monkeypatch: pytest.MonkeyPatch):
    costs, prompts = heavy(400), torch.arange(400) // 8
    whole = tail.clustered_bootstrap(costs, prompts, tail.mean, 100, 3)
    monkeypatch.setattr(tail, "BOOTSTRAP_ELEMENTS", 400 * 7)
    assert tail.clustered_bootstrap(costs, prompts, tail.mean, 100, 3) == pytest.approx(whole, abs=1e-12)
    assert tail.clustered_bootstrap(costs, prompts, tail.mean, 100, 4) != pytest.approx(whole, abs=1e-6)


def test_paired_difference_cancels_what_prompts_share():
    """The same prompts with 0.1 added: the difference is known exactly, though each mean is uncertain by far more."""
    generator = torch.Generator().manual_seed(0)
    values, prompts = correlated(50, 4, generator)
    estimate, low, high = tail.paired_difference(values, prompts, values + 0.1, prompts, tail.mean, 200)
    assert (estimate, low, high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)
    alone = tail.clustered_bootstrap(values, prompts, tail.mean, 200)
    assert alone[1] - alone[0] > 0.3


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="value 1 is nan: leave unscored answers out"):
        tail.mean(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"level is 1 - tail and lies in \[0, 1\), got 99"):
        tail.cvar(ONE_TO_TEN, 99)
    with pytest.raises(ValueError, match="non-empty"):
        tail.var(torch.tensor([]), 0.9)
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        tail.clustered_bootstrap(ONE_TO_TEN, torch.zeros(10, dtype=torch.long), tail.mean)
    with pytest.raises(ValueError, match="got 5 of 4"):
        tail.clopper_pearson_upper(5, 4)
    with pytest.raises(ValueError, match="quantile levels"):
        tail.quantile_curve(ONE_TO_TEN, torch.tensor([1.5]))
