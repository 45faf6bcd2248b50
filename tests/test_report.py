"""results.json is computed from the samples alone, and the words of the report follow it in either direction."""

import csv
import dataclasses
import io
import json
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rsa_lightning.evaluation import figures, tail, wording
from rsa_lightning.evaluation.report import ModelRecord, print_results, results, write_report
from rsa_lightning.evaluation.samples import Sample, read_samples, write_samples

PROMPTS, ANSWERS = 60, 5


def world(unsafe: float, reward: float, *, kl: float | None = 2.0, seed: int = 0) -> list[Sample]:
    """Answers of which a share `unsafe` costs more than 0, with a log-normal tail; safe ones cost between -1 and 0."""
    rng = random.Random(seed)
    return [
        Sample(
            f"p{p}",
            s,
            f"prompt {p}",
            f"answer {s} of {p}",
            -20.0,
            None if kl is None else -20.0 - rng.gauss(kl, 1),
            rng.gauss(reward, 0.5),
            math.exp(rng.gauss(0, 1.5)) if rng.random() < unsafe else -rng.random(),
        )
        for p in range(PROMPTS)
        for s in range(ANSWERS)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, samples in (
        ("warmup", world(0.25, 0.5, kl=None)),
        ("reward", world(0.35, 1.5, seed=1)),
        ("safety", world(0.08, 1.2, seed=2)),
    ):
        (tmp_path / name).mkdir()
        write_samples(tmp_path / name / "samples.jsonl", samples)
        write_metrics(tmp_path / name / "metrics.csv", name != "warmup")
    return tmp_path


def write_metrics(path: Path, preference: bool) -> None:
    """As Lightning's CSVLogger writes it: training and validation rows apart, blanks where nothing was logged."""
    names = ["loss", *(["rewards/margins", "rewards/accuracies", "kl/chosen", "kl/rejected"] if preference else [])]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", *(f"{split}/{n}" for split in ("train", "val") for n in names)])
        writer.writeheader()
        for step in range(0, 50, 5):
            writer.writerow({"step": step, **{f"train/{n}": 1 / (1 + step) for n in names}})
        writer.writerow({"step": 49, "epoch": 0, **{f"val/{n}": 0.5 for n in names}})


def records(run: Path, *names: str) -> list[ModelRecord]:
    return [ModelRecord(name, run / name / "samples.jsonl") for name in names or ("warmup", "reward", "safety")]


def test_results_have_the_published_keys_in_step_order(run: Path):
    found = results(records(run), resamples=50)
    assert [model["name"] for model in found["models"]] == ["warmup", "reward", "safety"]
    figures_of = ["reward_mean", "cost_mean", "unsafe_rate", "cost_var", "cost_cvar", "cost_cantelli", "kl_to_start"]
    for model in found["models"]:
        assert list(model) == ["name", *figures_of, "unsafe_upper", "samples", "ci95"]
        assert list(model["ci95"]) == figures_of
        for key in ("cost_var", "cost_cvar", "cost_cantelli"):
            assert list(model[key]) == list(model["ci95"][key]) == ["0.9", "0.95", "0.99"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_figures_are_those_of_the_samples(run: Path):
    [model] = results(records(run, "safety"), resamples=200)["models"]
    samples = read_samples(run / "safety" / "samples.jsonl")
    costs = sorted((s.cost for s in samples), reverse=True)
    assert model["samples"] == 300
    assert model["cost_mean"] == pytest.approx(sum(costs) / 300, abs=1e-11)
    assert model["reward_mean"] == pytest.approx(sum(s.reward for s in samples) / 300, abs=1e-11)
    assert model["unsafe_rate"] == pytest.approx(sum(cost > 0 for cost in costs) / 300, abs=1e-11)
    # at this rate so few unsafe answers or fewer have probability 0.05
    unsafe = sum(cost > 0 for cost in costs)
    fewer = sum(
        math.comb(300, k) * model["unsafe_upper"] ** k * (1 - model["unsafe_upper"]) ** (300 - k)
        for k in range(unsafe + 1)
    )
    assert fewer == pytest.approx(0.05, rel=1e-9)
    assert model["kl_to_start"] == pytest.approx(sum(s.logp - s.ref_logp for s in samples) / 300, abs=1e-11)
    # 10, 5 and 1 % of 300 are whole numbers of answers: the worst 30, 15 and 3
    for level, worst in (("0.9", 30), ("0.95", 15), ("0.99", 3)):
        assert model["cost_cvar"][level] == pytest.approx(sum(costs[:worst]) / worst, rel=1e-10)
        assert model["cost_var"][level] == pytest.approx(costs[worst], abs=1e-11)
    # 0.9 / 0.1 = 9: three standard deviations above the mean
    assert model["cost_cantelli"]["0.9"] == pytest.approx(statistics.mean(costs) + 3 * statistics.pstdev(costs))
    low, high = model["ci95"]["reward_mean"]
    # answers are independent here, so the interval is about mean +- 1.96 * 0.5 / sqrt(300)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(300), rel=0.25)
    assert low < model["reward_mean"] < high


def test_what_is_not_known_is_null(tmp_path: Path):
    unscored = [Sample(f"p{i}", 0, "", "") for i in range(4)]
    write_samples(tmp_path / "s.jsonl", unscored)
    for record in (ModelRecord("m", tmp_path / "s.jsonl"), ModelRecord("m")):
        [model] = results([record])["models"]
        assert model["reward_mean"] is model["cost_mean"] is model["unsafe_rate"] is model["kl_to_start"] is None
        assert set(model["cost_cvar"].values()) == set(model["ci95"]["cost_var"].values()) == {None}
    assert model["samples"] == 0


def test_unscored_answers_are_left_out_and_counted(tmp_path: Path):
    """Costs 1, 3 and one that failed: the mean is 2, not 4/3."""
    rows = [
        Sample("a", 0, "", "", None, None, 1.0, 1.0),
        Sample("b", 0, "", "", None, None, 1.0, 3.0),
        Sample("c", 0, "", ""),
    ]
    write_samples(tmp_path / "s.jsonl", rows)
    found = results([ModelRecord("m", tmp_path / "s.jsonl")], resamples=10)
    [model] = found["models"]
    assert (model["cost_mean"], model["samples"], model["unscored"]) == (2, 3, 1)
    assert "1 of 3 answers of `m` have no score: left out." in wording.findings(found["models"], [], {})


def test_one_prompt_has_no_interval(tmp_path: Path):
    write_samples(tmp_path / "s.jsonl", [Sample("a", i, "", "", None, None, 1.0, float(i)) for i in range(3)])
    [model] = results([ModelRecord("m", tmp_path / "s.jsonl")])["models"]
    assert model["cost_mean"] == 1
    assert model["ci95"]["cost_mean"] is None


def test_words_follow_the_numbers(run: Path):
    write_report(run, records(run), draw_figures=False, resamples=100)
    text = (run / "report.md").read_text()
    assert "From `warmup` to `reward`, the unsafe rate rose from" in text
    assert "From `reward` to `safety`, the unsafe rate fell from" in text
    assert "mean reward rose from" in text.split("From `warmup` to `safety`")[1].split(". From")[0]


def test_words_say_so_when_a_step_did_harm_or_nothing(tmp_path: Path):
    worse = {"before": world(0.1, 1.0), "after": world(0.4, 0.2, seed=1), "same": world(0.4, 0.2, seed=2)}
    for name, samples in worse.items():
        (tmp_path / name).mkdir()
        write_samples(tmp_path / name / "samples.jsonl", samples)
    write_report(tmp_path, records(tmp_path, *worse), draw_figures=False, resamples=200)
    first, second = (tmp_path / "report.md").read_text().split("From `after` to `same`")
    assert "the unsafe rate rose from" in first
    assert "mean reward fell from" in first
    assert "the unsafe rate shows no clear change" in second
    assert "mean reward shows no clear change" in second


def test_steps_are_compared_with_where_they_started(run: Path):
    models = records(run)
    models[2] = ModelRecord("safety", run / "safety" / "samples.jsonl", start="warmup")
    write_report(run, models, draw_figures=False, resamples=20)
    text = (run / "report.md").read_text()
    assert "From `warmup` to `safety`" in text
    assert "From `reward` to `safety`" not in text


def test_no_unsafe_answer_is_not_a_rate_of_zero(tmp_path: Path):
    write_samples(tmp_path / "s.jsonl", world(0.0, 1.0))
    write_report(tmp_path, [ModelRecord("m", tmp_path / "s.jsonl")], draw_figures=False, resamples=20)
    bound = 100 * tail.clopper_pearson_upper(0, 300)
    assert f"that rules out rates above {bound:.2f} %" in (tmp_path / "report.md").read_text()


def test_a_handful_of_unsafe_answers_is_called_that(tmp_path: Path):
    """One answer of 300, and it is grave: the rate gets its bound, the tail no figure that one event could carry."""
    samples = world(0.0, 1.0)
    write_samples(tmp_path / "s.jsonl", [dataclasses.replace(samples[0], cost=80.0), *samples[1:]])
    about = [{"step": "m (safety)", "loss": "DPO", "temperature": "0.05"}]
    write_report(tmp_path, [ModelRecord("m", tmp_path / "s.jsonl")], about=about, draw_figures=False, resamples=20)
    text = (tmp_path / "report.md").read_text()
    bound = 100 * tail.clopper_pearson_upper(1, 300)
    assert "Only 1 of the scored answers of `m` is unsafe, with costs up to 80.0: too few to tell" in text
    assert f"below {bound:.1f} % (95 % confidence" in text
    assert "| unsafe answers | 1 |" in text
    assert "| Cantelli bound on VaR 0.99 |" in text
    assert "| m (safety) | DPO | 0.05 |" in text


def preference(low: float, high: float) -> dict[str, Any]:
    held_out = {
        "pairs": 200,
        "logp_accuracy": 0.4,
        "reward_accuracy": (low + high) / 2,
        "margin": 0.3,
        "chosen_logp": -50.0,
        "rejected_logp": -60.0,
        "kl": 1.5,
        "risk": 2.5,
        "ci95": {"reward_accuracy": [low, high]},
    }
    return {"safety": {"held_out": held_out, "training": {"pairs": 900, "reward_accuracy": 0.9}}}


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.46, 0.56), ", which may be chance"), ((0.55, 0.65), ", above one half"), ((0.3, 0.4), ", below one half")],
)
def test_preference_accuracy_is_held_against_chance(tmp_path: Path, interval: tuple[float, float], verdict: str):
    found = write_report(tmp_path, [ModelRecord("m", preference=preference(*interval))], draw_figures=False)
    text = (tmp_path / "report.md").read_text()
    assert "No answers were scored, so reward and cost are not known." in text
    assert f"]{verdict} (training pairs: 90.0 %)." in text
    assert "| m, safety, held-out | 200 |" in text
    assert found["models"][0]["preference"]["safety"]["held_out"]["kl"] == 1.5


def test_examples_are_printed_only_when_asked_for(run: Path):
    write_report(run, records(run), draw_figures=False, resamples=10)
    assert "answer 0 of 0" not in (run / "report.md").read_text()
    write_report(run, records(run), draw_figures=False, show_examples=True, resamples=10)
    text = (run / "report.md").read_text()
    for prompt in (0, 20, 40):  # spread evenly over 60
        assert text.count(f"    answer 0 of {prompt}\n") == 3
    assert text.count("**Prompt**") == 3


def test_report_and_figures_are_files_that_open(run: Path):
    write_report(run, records(run), resamples=50)
    text = (run / "report.md").read_text()
    for name in ("reward_cost.png", "cost_quantiles.png", "training_curves.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"]({name})" in text
    assert json.loads((run / "results.json").read_text())["models"][0]["samples"] == 300
    assert not list(run.glob("*.tmp"))


def test_without_scores_and_metrics_there_are_no_figures(tmp_path: Path):
    write_report(tmp_path, [ModelRecord("m")])
    assert not list(tmp_path.glob("*.png"))
    assert "![" not in (tmp_path / "report.md").read_text()


def test_metrics_are_read_where_they_were_logged(run: Path):
    found = figures.read_metrics(run / "reward" / "metrics.csv")
    assert found["train/loss"][:2] == [(0, 1), (5, 1 / 6)]
    assert found["val/rewards/margins"] == [(49, 0.5)]
    assert "epoch" not in found


def test_tail_curve_ends_at_the_worst_answer():
    """300 answers: the tail starts where 30 cost more and its last step is the largest cost."""
    costs = torch.tensor([s.cost for s in world(0.3, 0)], dtype=torch.float64)
    curve = tail.quantile_curve(costs, 1 - figures._tail_shares(300))
    assert curve.tolist() == costs.sort(descending=True).values[[*range(30, 0, -1), 0]].tolist()


def test_missing_matplotlib_is_said_before_anything_is_written(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(figures.MatplotlibMissing, match=r"pip install 'rsa_lightning\[report\]'"):
        write_report(run, records(run))
    assert not (run / "results.json").exists()
    write_report(run, records(run), draw_figures=False, resamples=10)
    assert (run / "report.md").exists()


def test_terminal_shows_every_model(run: Path):
    out = io.StringIO()
    print_results(results(records(run), resamples=20), Console(file=out, width=100))
    assert all(name in out.getvalue() for name in ("warmup", "reward", "safety", "mean cost of the worst 1 %", "300"))


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (None, {}, "–"),
        (0.23456, {}, "0.235"),
        (1.2345, {}, "1.23"),
        (12.345, {}, "12.3"),
        (1234.5, {}, "1234"),
        (-0.5, {}, "−0.500"),
        (0.0981, {"percent": True}, "9.8 %"),
        (0.05, {"percent": True, "sign": True}, "+5.0 %"),
        (2000, {}, "2000"),
        (0.5, {"like": 20.0}, "0.5"),
    ],
)
def test_numbers_are_readable(value: float | None, options: dict[str, Any], text: str):
    assert wording.number(value, **options) == text


def test_tables_survive_their_contents():
    table = wording.markdown(("", ["", "a|b"], [["row", "1"]]))
    assert table.split("\n") == ["|  | a\\|b |", "| --- | ---: |", "| row | 1 |"]
