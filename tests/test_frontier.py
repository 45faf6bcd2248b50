"""The Pareto front and the rules of selection, against every pair of points and hand-worked figures."""

import math

import pytest
import torch

from rsa_lightning.evaluation import tail
from rsa_lightning.evaluation.frontier import Rule, Trial, pareto_front, select

COSTS = torch.tensor([0.0, 0.0, 1.0, 3.0])


def test_the_front_is_what_nothing_dominates():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        # few values, so that ties and equal points occur
        rewards, costs = torch.randint(0, 6, (2, 15), generator=generator).tolist()
        beaten = {
            i
            for i in range(15)
            for j in range(15)
            if rewards[j] >= rewards[i] and costs[j] <= costs[i] and (rewards[j], costs[j]) != (rewards[i], costs[i])
        }
        front = pareto_front(rewards, costs)
        assert sorted(front) == [i for i in range(15) if i not in beaten]
        assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_a_front_of_nothing_is_empty():
    assert pareto_front([], []) == []


@pytest.mark.parametrize(
    ("rule", "figure", "bound"),
    [
        (Rule("mean", 2.0), 1.0, 2.0),
        # method 14.4: mean 1, standard deviation sqrt(1.5), times sqrt(.9 / .1) = 3
        (Rule("cantelli", 4.7, 0.9), 1 + 3 * math.sqrt(1.5), 4.7),
        # the worst half: (3 + 1) / 2
        (Rule("cvar", 2.5, 0.5), 2.0, 2.5),
        (Rule("chance", 0.5, 0.6), 0.5, 0.4),
    ],
)
def test_figures_of_the_rules(rule, figure, bound):
    assert rule.figure(COSTS) == pytest.approx(figure, abs=1e-12)
    assert rule.bound == pytest.approx(bound, abs=1e-12)
    assert rule.admits(rule.figure(COSTS)) == (figure <= bound)


def test_cantelli_suffices_for_the_chance():
    """Whatever it admits, `chance` at the same level and limit admits; not the other way round."""
    generator, both, chance_only = torch.Generator().manual_seed(0), 0, 0
    for _ in range(200):
        costs = torch.randn(50, generator=generator, dtype=torch.float64).mul(1.5).exp()
        strict, loose = (Rule(name, 12.0, 0.9) for name in ("cantelli", "chance"))
        if strict.admits(strict.figure(costs)):
            assert loose.admits(loose.figure(costs))
            both += 1
        elif loose.admits(loose.figure(costs)):
            chance_only += 1
    assert both > 10
    assert chance_only > 10


def trial(reward: float, *costs: float) -> Trial:
    return Trial(reward, torch.tensor(costs))


def test_the_highest_reward_among_the_admissible_is_chosen():
    found = select(
        {"safe": [trial(1.0, 0.0, 0.0)], "middle": [trial(2.0, 0.0, 1.0)], "bold": [trial(3.0, 0.0, 9.0)]},
        Rule("mean", 0.5),
    )
    assert found.chosen == "middle"
    assert found.figures == {"safe": 0.0, "middle": 0.5, "bold": 4.5}


def test_every_seed_has_to_be_admissible():
    """The bold setting keeps the budget with one seed of two."""
    candidates = {
        "bold": [trial(3.0, 0.0), trial(3.5, 1.0)],
        "steady": [trial(2.0, 0.2), trial(2.5, 0.4)],
    }
    found = select(candidates, Rule("mean", 0.5))
    assert (found.chosen, found.rewards["steady"], found.figures["bold"]) == ("steady", 2.25, 1.0)


def test_none_is_admissible():
    found = select({"a": [trial(1.0, 5.0)], "b": [trial(2.0, 4.0)]}, Rule("mean", 1.0))
    assert (found.chosen, found.closest) == (None, "b")
    with pytest.raises(ValueError, match="no candidate to choose from"):
        select({}, Rule("mean", 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("median", 1.0), "select.rule must be cantelli, cvar, mean, chance, got 'median'"),
        (("mean", 1.0, 0.9), "the mean has no level, remove it"),
        (("cvar", 1.0), "select.level: cvar needs one, such as 0.99"),
        (("cvar", 1.0, 99), r"lies in \(0, 1\), got 99"),
        (("mean", "much"), "select.limit is a number in units of the cost, got 'much'"),
    ],
)
def test_a_rule_is_checked_when_it_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(*arguments)


def test_rules_use_the_definitions_of_the_report():
    costs = torch.arange(100.0)
    assert Rule("cvar", 0.0, 0.95).figure(costs) == tail.cvar(costs, 0.95).item()
    assert Rule("cantelli", 0.0, 0.95).figure(costs) == tail.cantelli_bound(costs, 0.95).item()
