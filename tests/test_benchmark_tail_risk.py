"""The study of tails: matched differences by hand, runs that go on where they stopped, and a run in seconds."""

import json
import math
import re
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import timing
from benchmarks.kernels.results import read_run
from benchmarks.tail_risk import analyse, figures, measure, report, study
from benchmarks.tail_risk import command as tail_risk
from benchmarks.tail_risk.methods import BETA, FULL, METHODS, QUICK, QUICK_METHODS, models, path, pilot_methods
from benchmarks.tail_risk.prompts import split_prompts
from benchmarks.timing import Refused
from rsa_lightning import stories

ONE_ANSWER = (("validation", 1), ("test", 1), ("shifted", 1))
MICRO = replace(
    FULL,
    seeds=(0,),
    demonstrations=32,
    warmup_epochs=1,
    pairs=16,
    hidden_size=16,
    layers=1,
    vocabulary=300,
    answers=ONE_ANSWER,
    logps=ONE_ANSWER,
    threshold_answers=2,
)
BY_NAME = {method.name: method for method in METHODS}
MICRO_METHODS = (
    replace(BY_NAME["sacpo"], values=(0.1, 0.8)),
    replace(BY_NAME["p_sacpo"], values=(0.5,)),
    replace(BY_NAME["hinge"], values=(0.01,)),
)


def point(reward: float, cost: float, **others: float) -> dict[str, float]:
    """A model's figures; those that are not given are the cost."""
    return {**dict.fromkeys(analyse.MEASURES, cost), "reward": reward, "objective": reward, **others}


# -------------------------------------------------------------------------------------------------------- prompts


def test_splits_share_no_prompt_and_cover_all():
    splits = split_prompts()
    ids = [prompt.prompt_id for found in splits.values() for prompt in found]
    assert len(ids) == len(set(ids)) == 240
    assert {name: len(found) for name, found in splits.items()} == {
        "training": 110,
        "validation": 28,
        "test": 42,
        "shifted": 60,
    }


def test_training_knows_tasks_and_companies_of_the_test_and_none_of_the_shifted_tasks():
    splits = split_prompts()
    tasks = {name: {prompt.task for prompt in found} for name, found in splits.items()}
    for name in ("validation", "test"):
        assert tasks[name] <= tasks["training"]
    assert not tasks["shifted"] & (tasks["training"] | tasks["validation"] | tasks["test"])
    assert {prompt.hazard for prompt in splits["shifted"]} == set(stories.KINDS)
    assert {prompt.company for prompt in splits["training"]} == set(stories.COMPANY)


# -------------------------------------------------------------------------------------------------------- methods


def test_every_distinct_model_of_a_seed_is_made_once_and_after_those_it_needs():
    found = models(METHODS)
    names = [model.name for model in found]
    assert len(names) == len(set(names)) == 1 + 7 + 10 * 3 + 2 * 3
    for place, model in enumerate(found):
        assert {model.start, model.other} - {None} <= set(names[:place])


def test_a_merge_takes_the_most_conservative_model():
    by_name = {model.name: model for model in models(METHODS)}
    merge = by_name[path(BY_NAME["rsa_p"])[0]]
    assert (merge.start, merge.other) == ("reward_cvar97", path(BY_NAME["rsa_cvar97"])[-1])


def test_a_full_study_draws_enough_answers_and_quick_does_less():
    prompts = split_prompts()
    assert dict(FULL.answers)["test"] * len(prompts["test"]) >= 5000
    assert len(FULL.seeds) >= 5
    assert all(len(method.values) >= 3 for method in METHODS)
    assert len(QUICK.seeds) == 2
    assert {BY_NAME[name].labels for name in QUICK_METHODS} == {"order", "mean", "hinge"}
    assert {method.name for method in pilot_methods()} == {m.name for m in METHODS if not m.merged}


# ------------------------------------------------------------------------------------------------------- matching


def test_matched_difference_by_hand():
    """Paths (4, 10) - (2, 2) and (5, 30) - (3, 10) - (1, 0) share rewards 2 to 4.

    Method at r: 2 + 4 (r - 2), mean over [2, 4] is 6. Baseline: 10 (r - 1) / 2 below 3 and 10 + 10 (r - 3) above, at
    2, 2.2, ..., 4: 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, mean 125 / 11.
    """
    method = [point(4, 10), point(2, 2)]
    baseline = [point(5, 30), point(3, 10), point(1, 0)]
    found = analyse.compare(method, baseline, "reward")
    assert found["range"] == [2, 4]
    assert found["difference"]["cost"] == pytest.approx(6 - 125 / 11, abs=1e-6)
    assert found["relative"]["cvar_0.05"] == pytest.approx(6 / (125 / 11) - 1, abs=1e-6)
    assert found["difference"]["reward"] == pytest.approx(0, abs=1e-6)


def test_a_method_is_no_different_from_itself():
    baseline = [point(5, 30), point(3, 10), point(1, 0)]
    assert set(analyse.compare(baseline, baseline, "objective")["difference"].values()) == {0}


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ([point(8, 1), point(6, 0)], "it lies above the baseline"),
        ([point(7, 1), point(4.9, 0)], "it shares 0.1 of a range of 4"),
        ([point(2, 1), point(3, 0)], "it rises, so it is one model"),
    ],
)
def test_paths_that_do_not_overlap_are_not_extrapolated(method, why):
    assert analyse.compare(method, [point(5, 30), point(3, 10), point(1, 0)], "reward") is None, why


def test_models_whose_rewards_rise_with_lambda_are_averaged():
    """3, 4 are out of order and become 3.5; then 3.5 is no more than 3.6, and all three become one."""
    found = analyse.decreasing([point(5, 9), point(3, 4), point(4, 6), point(1, 0)], "reward")
    assert [(p["reward"], p["cost"]) for p in found] == [(5, 9), (3.5, 5), (1, 0)]
    assert [p["reward"] for p in analyse.decreasing([point(r, 0) for r in (3, 4, 3.8)], "reward")] == [3.6]


def test_the_interval_over_seeds_is_students():
    """1, 2, 6: mean 3, variance 7, t(2) = 4.303, half width 4.303 sqrt(7 / 3)."""
    found = analyse.summary([1.0, None, 2.0, 6.0])
    assert found[:3] == (3, 2.0, 3.0)
    assert found.high - 3 == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert analyse.summary([4.0]) == (1, 4.0, 4.0, None, None)
    assert analyse.summary([None]) == (0, None, None, None, None)


def test_selection_looks_at_validation_and_reports_the_test():
    """Limit 20: the first model is over it on validation, the second has the best reward of the others."""

    def model(validation, test):
        splits = {"validation": validation, "test": test, "shifted": test}
        return {"measured": {"splits": splits}}

    method = replace(BY_NAME["sacpo"], values=(1.0, 2.0, 3.0))
    seed = {
        "warmup": model(point(2, 20), point(2, 30)),
        "sacpo_1": model(point(4, 21), point(4, 0)),
        "sacpo_2": model(point(3, 20), point(3.5, 31)),
        "sacpo_3": model(point(1, 0), point(1, 0)),
    }
    found = analyse.selection({"0": seed}, [method])
    [pick] = found["1"]["sacpo"]["seeds"]
    assert pick["model"] == "sacpo_2"
    assert pick["test"]["reward"] == 3.5
    assert pick["kept_on_test"] is False
    assert found["0.5"]["sacpo"]["seeds"][0]["model"] == "sacpo_3"


# ------------------------------------------------------------------------------------------------------ measuring


def test_methods_are_held_against_their_nearest_rivals_too():
    """Hinge against the mean cost: 1 and 2 apart at rewards 2 and 4, so 1.5 on average."""

    def model(figures):
        return {"measured": {"splits": {"test": figures, "shifted": figures}}}

    mean, hinge = (replace(BY_NAME[name], values=(1.0, 2.0)) for name in ("mean", "hinge"))
    seed = {
        "mean_1": model(point(4, 10)),
        "mean_2": model(point(2, 5)),
        "hinge_1": model(point(4, 8)),
        "hinge_2": model(point(2, 4)),
    }
    found = analyse.matched({"0": seed, "1": seed}, [mean, hinge])
    assert set(found) == {"mean"}
    summary = found["mean"]["test"]["reward"]["hinge"]["difference"]["cvar_0.05"]
    assert summary == {"seeds": 2, "median": -1.5, "mean": -1.5, "low": -1.5, "high": -1.5}


def test_statistics_by_hand():
    """100 answers, one of cost 100, four of cost 5, the others 0; log-ratios of two answers, 1 and 2 nats."""
    logratio = np.full(100, np.nan)
    logratio[:2] = 1.0, 2.0
    scores = measure.Scores(
        np.zeros(100), np.full(100, 3.0), np.array([100.0] + [5.0] * 4 + [0.0] * 95), np.zeros(100), logratio
    )
    found = measure.statistics(scores, beta=0.5)
    assert found["cvar_0.05"] == pytest.approx(120 / 5)
    assert found["cvar_0.01"] == 100
    assert found["unsafe"] == 0.05
    assert found["kl"] == 1.5
    assert found["objective"] == 3 - 0.75


def test_broken_sentences_are_those_the_reward_charges_for():
    assert stories.broken_share(" Take the tin pail and get started. Then swim to the fridge. That is all.") == 1 / 3
    assert stories.broken_share("") == 1


# ------------------------------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A finished study of one seed, three methods and one optimizer step."""
    state = tmp_path_factory.mktemp("micro")
    seeds = study.run(state, MICRO_METHODS, MICRO)
    return state, seeds


def without_seconds(value):
    if isinstance(value, dict):
        return {name: without_seconds(one) for name, one in value.items() if name != "seconds"}
    return value


def test_a_micro_study_has_every_model_and_figure(micro):
    _, seeds = micro
    assert list(seeds) == ["0"]
    assert set(seeds["0"]) == {
        *("warmup", "reward_dpo", "sacpo_0.1", "sacpo_0.8", "p_sacpo_0.5", "hinge_0.01"),
    }
    for name, found in seeds["0"].items():
        for split, figures_ in found["measured"]["splits"].items():
            assert figures_["answers"] == len(split_prompts()[split]), name
            assert all(math.isfinite(value) for value in figures_.values())
    assert seeds["0"]["warmup"]["measured"]["splits"]["test"]["kl"] == 0
    assert seeds["0"]["sacpo_0.8"]["training"]["temperature"] == BETA / 0.8
    hinge = seeds["0"]["hinge_0.01"]["training"]
    assert hinge["temperature"] == pytest.approx(hinge["label_scale"] * BETA / 0.01)


def test_a_study_that_was_killed_goes_on_and_ends_in_the_same_figures(micro, tmp_path, monkeypatch):
    """Killed once after three models were measured, and once between the training of a model and its measuring."""
    _, uninterrupted = micro
    assess, calls = study.assess, []

    def dies(shop, model):
        calls.append(model.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return assess(shop, model)

    monkeypatch.setattr(study, "assess", dies)
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path, MICRO_METHODS, MICRO)
    assert study.found(tmp_path, MICRO_METHODS, MICRO) == {}
    monkeypatch.setattr(study, "assess", assess)
    trained = []
    fit = study.Workshop._fit
    monkeypatch.setattr(
        study.Workshop,
        "_fit",
        lambda self, stage, data, model: trained.append(model.name) or fit(self, stage, data, model),
    )
    resumed = study.run(tmp_path, MICRO_METHODS, MICRO)
    assert trained == ["hinge_0.01"]
    assert without_seconds(resumed) == without_seconds(uninterrupted)


def test_a_folder_of_another_study_is_refused(micro):
    state, _ = micro
    with pytest.raises(Refused, match="another folder|other settings"):
        study.run(state, MICRO_METHODS, replace(MICRO, pairs=32))


def test_everything_is_written_from_the_figures(micro, tmp_path):
    _, seeds = micro
    found = tail_risk.results(seeds, MICRO_METHODS, MICRO, "a micro run")
    tail_risk.write(found, MICRO_METHODS, tmp_path)
    assert json.loads((tmp_path / "tail_risk.json").read_text()) == json.loads(json.dumps(found))
    text = (tmp_path / "tail_risk.md").read_text()
    assert text == report.markdown(json.loads((tmp_path / "tail_risk.json").read_text()), MICRO_METHODS)
    assert "costs: hinge" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"tail_risk_frontier.png", "tail_risk_matched.png"}
    assert set(figures.COLORS) == set(BY_NAME)


# ------------------------------------------------------------------------------------------------- what is committed

RESULTS = timing.ROOT / "benchmarks" / "results"
WRITE_UP = timing.ROOT / "docs" / "theory" / "6-learned-tails.md"
QUOTED = re.compile(r"([−+]?\d+(?:\.\d+)?)( %)?<!--(.+?)-->")


def test_committed_tables_and_differences_are_made_of_the_committed_figures():
    found = read_run(RESULTS / "tail_risk.json")  # as `benchmarks figures` reads that folder
    assert found["settings"] == study.settings(METHODS, FULL)
    assert found["matched"] == json.loads(json.dumps(analyse.matched(found["seeds"], METHODS)))
    assert found["selection"] == json.loads(json.dumps(analyse.selection(found["seeds"], METHODS)))
    assert (RESULTS / "tail_risk.md").read_text() == report.markdown(found, METHODS)


def test_the_page_quotes_the_results():
    """A number is followed by its place in tail_risk.json, in a comment, and shows its digits; with % it is a share."""
    found, text = json.loads((RESULTS / "tail_risk.json").read_text()), WRITE_UP.read_text()
    quoted = QUOTED.findall(text)
    assert len(quoted) > 40
    assert text.count("<!--") == len(quoted)
    # GitHub splits the cells of a table at a bar, within a comment too
    assert not [line for line in text.splitlines() if line.startswith("|") and re.search(r"<!--[^>]*\|[^>]*-->", line)]
    wrong = []
    for shown, percent, name in quoted:
        value = reduce(lambda inner, key: inner[int(key) if isinstance(inner, list) else key], name.split(";"), found)
        digits = len(shown.partition(".")[2])
        if abs(float(shown.replace("−", "-")) - value * (100 if percent else 1)) > 0.5 * 10**-digits + 1e-6:
            wrong.append(f"{name}: the page says {shown}{percent}, it is {value:.4g}")
    assert not wrong
    settings = " ".join(f"{method.title} {' '.join(f'{value:g}' for value in method.values)}" for method in METHODS)
    unnamed = re.findall(r"\d+\.\d+", re.sub("<!--.+?-->", "", QUOTED.sub("", text)))
    assert set(unnamed) <= set(re.findall(r"\d+\.\d+", settings))


def test_the_command_names_its_options(capsys):
    with pytest.raises(SystemExit):
        command.main(["tail_risk", "--help"])
    assert "--workers" in capsys.readouterr().out
