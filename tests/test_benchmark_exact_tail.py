"""The exact study: what equal means, how worlds are summed up, that it goes on where it was, and what its page quotes."""

import json
import re
from pathlib import Path

import pytest
from rsa_kernels import KL

from benchmarks.exact_tail import command, regimes
from benchmarks.exact_tail.analyse import at_multiplier, by_interpolation, difference, median_interval, spread
from benchmarks.exact_tail.match import at_reward, at_reward_and_kl, at_value
from benchmarks.exact_tail.methods import BETA, FEW_LAMS, Method, family, hinge, sacpo, trained, v2
from benchmarks.exact_tail.study import file_of, measure, records, run, world_of
from benchmarks.kernels.results import read_run
from rsa_lightning.world import distance, expectation, gibbs, kl, sequence_logps, token_optimum

ROOT = Path(__file__).parents[1]
SHORT = (0.1, 1.0)


# ------------------------------------------------------------------------------------------------------ what equal is


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_sacpo_is_its_own_equal(lam):
    world = world_of(0)
    policy = sacpo(world, BETA)(lam)
    reward, nats = expectation(policy, world.reward), kl(policy, world.reference)
    for found in (
        at_reward(world, BETA, reward),
        at_value(world, BETA, reward - BETA * nats),
        at_reward_and_kl(world, reward, nats),
    ):
        assert found is not None
        assert found[0] == pytest.approx(lam, rel=1e-4)
        assert distance(found[1], policy) < 1e-5


def test_an_equal_has_the_reward_and_the_kl():
    world = world_of(3)
    policy = token_optimum(world.reference, [(world.reward, 0.4), (-world.cost, 0.4)], KL())
    found = at_reward_and_kl(world, expectation(policy, world.reward), kl(policy, world.reference))
    assert found is not None
    assert expectation(found[1], world.reward) == pytest.approx(expectation(policy, world.reward), abs=1e-6)
    assert kl(found[1], world.reference) == pytest.approx(kl(policy, world.reference), abs=1e-6)


def test_a_reward_beyond_the_path_has_no_equal():
    world = world_of(0)
    assert at_reward(world, BETA, 1e3) is None
    assert at_reward_and_kl(world, 1e3, 0.5) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_the_hinge_is_lighter_and_the_indicator_of_any_harm_heavier(seed):
    """At an equal reward and KL, at one multiplier each."""
    world = world_of(seed)
    changes = {}
    for name, strength in (("hinge, worst 5 %", 0.1), ("indicator, cost > 0", 0.6)):
        policy = family()[name].path(world, BETA)(strength)
        other = at_reward_and_kl(world, expectation(policy, world.reward), kl(policy, world.reference))
        assert other is not None
        changes[name] = measure(world, policy)["cvar5"] - measure(world, other[1])["cvar5"]
    assert changes["hinge, worst 5 %"] < -0.1
    assert changes["indicator, cost > 0"] > 0.1


# ---------------------------------------------------------------------------------------------------------- summing up


def record(lam: float, ours: float, theirs: float) -> dict:
    return {"cvar5": ours, "beta": 0.5, "sacpo": {"reward": {"lam": lam, "cvar5": theirs}, "value": None}}


def test_differences_by_hand():
    """CVaR 1 against 3: 2 less, of 4 above the safest (−1) a half, of 3 two thirds."""
    point = record(1.0, 1.0, 3.0)
    assert difference(point, "reward", "cvar5") == pytest.approx(-0.5)
    assert difference(point, "reward", "cvar5, plain") == pytest.approx(-2 / 3)
    assert difference(record(1.0, 1.0, 0.2), "reward", "cvar5, plain") is None  # of next to nothing
    assert difference(point, "value", "cvar5") is None


def test_between_two_multipliers_the_difference_is_linear_in_the_logarithm():
    """−0.5 at λ = 0.1 and +0.1 at λ = 10: −0.2 at λ = 1; nothing beyond."""
    points = [record(10.0, 3.4, 3.0), record(0.1, 1.0, 3.0)]
    assert at_multiplier(points, "reward", "cvar5", 1.0) == pytest.approx(-0.2)
    assert at_multiplier(points, "reward", "cvar5", 20.0) is None


def test_the_interval_of_the_median():
    """Twenty values: the 6th and the 15th, with probability 0.9586 (tables of the sign test). Six: the extremes."""
    assert median_interval(20) == (5, 14)
    assert median_interval(6) == (0, 5)  # 1 − 2 / 64
    assert median_interval(5) is None  # 1 − 2 / 32 is too little
    assert spread([3.0, -1.0, 2.0]) == {
        "median": 2.0, "low": None, "high": None, "worlds": 3, "lighter": 1, "values": [3.0, -1.0, 2.0],
    }  # fmt: skip


def test_paths_are_compared_at_equal_rewards_within_both():
    plain = [{"reward": 0.0, "cost": 1.0}, {"reward": 2.0, "cost": 5.0}]
    method = [{"reward": 0.5, "cost": 1.0}, {"reward": 1.5, "cost": 3.0}]
    assert by_interpolation(method, plain, "cost", [1.0, 0.25]) == [pytest.approx(-1.0), None]


# ------------------------------------------------------------------------------------------------------------- regimes


def test_what_follows_uncontrolled_tokens_is_the_mean_under_the_reference():
    world = world_of(2)
    law = sequence_logps(world.reference).exp()
    first = world.reference[0].exp()[:, 0]
    by_hand = (law * world.cost).view(*first.shape, -1).sum(-1) / first
    assert regimes.given_prefix(world.reference, world.cost, 1) == pytest.approx(by_hand, abs=1e-12)
    known = regimes.what_is_controlled(world)
    whole = (*known.reference, *world.reference[1:])
    assert expectation(whole, world.reward) == pytest.approx(expectation(known.reference, known.reward))


def test_the_hinge_of_the_first_token_is_the_best_of_its_kind():
    """No other threshold and no perturbation is worth more in E r − λ CVaR − β KL over the first token."""
    world = world_of(1)
    known = regimes.what_is_controlled(world)
    start = gibbs(known.reference, known.reward, BETA)
    lam = 0.3

    def worth(policy) -> float:
        whole = (*policy, *world.reference[1:])
        point = measure(world, whole)
        return point["reward"] - lam * point["cvar5"] - BETA * point["kl"]

    best = regimes.limited_hinge(world, start, lam)
    assert worth(best) >= worth(start)
    for step in (0.3, 0.03):
        for sign in (1, -1):
            bent = ((best[0] + sign * step * known.reward[:, None, :]).log_softmax(-1),)
            assert worth(bent) <= worth(best) + 1e-12


def test_half_of_the_catastrophes_are_never_compared():
    world = world_of(0)
    seen = regimes.compared(world, 0)
    grave = world.cost > regimes.GRAVE
    assert seen[~grave].all()
    assert 0 < (1 - seen)[grave].sum() < grave.sum()


# ------------------------------------------------------------------------------------------------------------ the study


def tiny() -> dict[str, Method]:
    chosen = [
        Method("SACPO", "mean cost", sacpo, SHORT),
        Method("hinge, worst 5 %", "transformed cost", hinge(0.05), SHORT),
    ]
    return {method.name: method for method in chosen}


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch):
    methods = list(tiny().values())
    run(tmp_path, [0], methods)
    paths = [file_of(tmp_path, 0, method.name) for method in methods]
    before = [path.read_text() for path in paths]
    paths[1].unlink()
    made = []
    monkeypatch.setattr(
        "benchmarks.exact_tail.study.records", lambda *given: made.append(given[1].name) or records(*given)
    )
    run(tmp_path, [0], methods)
    assert made == ["hinge, worst 5 %"]
    assert [path.read_text() for path in paths] == before
    run(tmp_path, [0], [Method("SACPO", "mean cost", sacpo, (0.2,))])  # another path is another record
    assert made[1:] == ["SACPO"]


def test_the_command_writes_tables_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "family", tiny)
    written = command.study(tmp_path / "work", tmp_path / "out", 2, quick=True)
    assert {path.name for path in written} == {
        "exact_tail.json", "exact_tail.md", "exact_tail_frontier.png", "exact_tail_matched.png",
    }  # fmt: skip
    found = json.loads((tmp_path / "out/exact_tail.json").read_text())
    assert found["worlds"] == 2
    assert "| hinge, worst 5 % |" in (tmp_path / "out/exact_tail.md").read_text()


def test_v2_holds_back():
    """TDPO2 at a fifth of SACPO's temperature goes half as far: what the study's choice of its temperature rests on."""
    world = world_of(0)
    start = trained(v2, KL())(world, BETA / 5)(1e-6)
    assert 0.3 < kl(start, world.reference) / kl(gibbs(world.reference, world.reward, BETA), world.reference) < 0.7
    assert family()["TDPO2"].strengths is FEW_LAMS
    assert family()["TDPO2"].beta == BETA / 5


# ------------------------------------------------------------------------------------------------------------- the page

QUOTED = re.compile(r"([−+]?\d+(?:\.\d+)?)<!--(.+?)-->")


def test_the_page_quotes_the_results():
    """A number is followed by its name, method;equality;λ;measure;kind: the median over worlds, in percent but for two kinds."""
    found = json.loads((ROOT / "benchmarks/results/exact_tail.json").read_text())
    text = (ROOT / "docs/theory/5-exact-tails.md").read_text()
    quoted = QUOTED.findall(text)
    assert len(quoted) > 60
    assert text.count("<!--") == len(quoted)
    wrong = []
    for shown, name in quoted:
        method, how, lam, what, kind = name.split(";")
        group = found["regimes"]["limited control"] if method.startswith("limited ") else found["methods"]
        value = group[method.removeprefix("limited ")][how][lam][what]["median"]
        value = value if kind in ("plain", "change") else 100 * (-value if kind == "less" else value)
        digits = len(shown.partition(".")[2])
        if abs(float(shown.replace("−", "-")) - value) > 0.5 * 10**-digits + 1e-6:
            wrong.append(f"{name}: the page says {shown}, it is {value:.4g}")
    assert not wrong
    # GitHub splits cells at a bar within a comment, and shows a comment that ends in a dash
    assert not [line for line in text.splitlines() if line.startswith("|") and re.search(r"<!--[^>]*\|[^>]*-->", line)]
    assert "--->" not in text


def test_the_committed_study_is_of_the_whole_family_on_twenty_worlds():
    found = read_run(ROOT / "benchmarks/results/exact_tail.json")  # as `benchmarks figures` reads that folder
    assert found["worlds"] == 20
    assert list(found["methods"]) == list(family())
    assert set(found["regimes"]) == set(regimes.REGIMES)
    assert (ROOT / "benchmarks/results/exact_tail.md").read_text() == command.report(found)
