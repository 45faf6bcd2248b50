"""`rsa dual` as users call it: the table in plain words, the layer that `rsa align` takes, and one line per mistake."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rsa_lightning import budget
from rsa_lightning.cli import main
from rsa_lightning.config import load_file, load_layers
from rsa_lightning.evaluation.samples import Sample, write_samples
from rsa_lightning.losses import DPO
from rsa_lightning.pipeline import Run
from rsa_lightning.plan import read_config

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS, ANSWERS = 20, 128


def samples_of(costs, rewards=None) -> list[Sample]:
    """Answers with these costs, [prompt][answer]."""
    return [
        Sample(f"p{i}", j, "prompt", "answer", reward=None if rewards is None else rewards[i][j], cost=cost)
        for i, row in enumerate(costs)
        for j, cost in enumerate(row)
    ]


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randn(PROMPTS, ANSWERS, generator=generator, dtype=torch.float64).mul(1.5).exp() - 1
    write_samples(tmp_path / "samples.jsonl", samples_of(costs.tolist()))
    return tmp_path / "samples.jsonl"


@pytest.fixture
def coins(tmp_path: Path) -> Path:
    """Two prompts with costs 0 and 1 each."""
    write_samples(tmp_path / "coins.jsonl", samples_of([[0.0, 1.0], [0.0, 1.0]]))
    return tmp_path / "coins.jsonl"


def dual(*arguments) -> tuple[int, str]:
    out = io.StringIO()
    status = budget.main([str(argument) for argument in arguments], Console(file=out, width=200))
    return status, out.getvalue()


def test_the_table_says_what_the_budget_asks_for(coins):
    """ln 3 at beta 1 (method 14.4); weights 3 : 1 are 1.6 effective answers."""
    status, printed = dual("--samples", coins, "--budget", 0.25, "--beta", 1)
    assert status == 0
    assert "4 to 2 prompts" in printed
    assert "1.099 [1.099, 1.099]" in printed
    assert f"{1 / math.log(3):.4g} (β = 1)" in printed
    assert "1.6 on average, at least 1.6" in printed
    assert "- only 1.6 effective answers per prompt carry the estimate" in printed


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (0.5, "the budget is already met: no further step is needed"),
        (-1, "not reachable on these samples: the cheapest answer to every prompt alone gives 0.000"),
    ],
)
def test_without_a_multiplier_nothing_is_written(limit, words, coins, tmp_path, capsys):
    status, printed = dual("--samples", coins, "--budget", limit)
    assert (status, words in printed) == (0, True)
    layer = tmp_path / "layer.yaml"
    assert main(["dual", "--samples", str(coins), "--budget", str(limit), "--write", str(layer)]) == 1
    assert f"rsa: error: {layer} is not written: {words}" in capsys.readouterr().err
    assert not layer.exists()


def test_the_layer_sets_the_temperature_of_its_step(coins, tmp_path):
    """β / λ in digits that give λ back, and a header that says how it was made."""
    path = tmp_path / "layer.yaml"
    dual("--samples", coins, "--budget", 0.25, "--beta", 0.5, "--write", path, "--step", "safe")
    step = {"loss": "DPO", "temperature": pytest.approx(1 / math.log(3), rel=1e-12)}
    assert load_file(path) == {"steps": {"safe": step}}
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[0] == budget.MARK
    assert head[1] == f"# Run:  rsa align -c YOUR.yaml -c {path}"
    assert head[2] == "# Budget: mean cost at most 0.25."
    assert f"{coins}: 4 answers to 2 prompts." in head[3]
    assert "beta = 0.5" in head[4]
    assert head[6].startswith("# Caution: only 1.6 effective answers")


def test_a_layer_of_a_tail_carries_its_cost(heavy, tmp_path):
    path = tmp_path / "layer.yaml"
    _, printed = dual("--samples", heavy, "--cvar-budget", 6, "--tail", 0.1, "--write", path, "--resamples", 50)
    step = load_file(path)["steps"]["safety"]
    assert step["cost_transform"]["class_path"] == "Hinge"
    arguments = step["cost_transform"]["init_args"]
    assert arguments["tail"] == 0.1
    costs = [json.loads(line)["cost"] for line in heavy.open()]
    assert arguments["eta"] in costs
    # the temperature and the threshold keep the budget on the half that they were fitted on
    fitted = torch.tensor(costs, dtype=torch.float64).reshape(PROMPTS, ANSWERS)[:, ::2]
    hinged = (fitted - arguments["eta"]).clamp(min=0) / 0.1
    weights = (-hinged / step["temperature"]).softmax(-1)
    assert (arguments["eta"] + (weights * hinged).sum(-1).mean()).item() == pytest.approx(6, abs=1e-9)
    assert "mean cost of the worst 10 % at most 6" in printed
    assert "the other half, reweighted" in printed


def test_a_layer_of_a_chance_carries_its_threshold(heavy, tmp_path):
    path = tmp_path / "layer.yaml"
    _, printed = dual("--samples", heavy, "--chance", 5, 0.02, "--write", path, "--resamples", 50)
    step = load_file(path)["steps"]["safety"]
    assert step["cost_transform"] == {"class_path": "Indicator", "init_args": {"threshold": 5.0}}
    costs = torch.tensor([json.loads(line)["cost"] for line in heavy.open()]).reshape(PROMPTS, ANSWERS)
    weights = (-(costs > 5).double() / step["temperature"]).softmax(-1)
    assert (weights * (costs > 5)).sum(-1).mean().item() == pytest.approx(0.02, abs=1e-9)
    assert "at most 2 % of answers cost more than 5" in printed


@pytest.mark.parametrize("asked", [("--cvar-budget", 6, "--tail", 0.1), ("--chance", 5, 0.02)], ids=["cvar", "chance"])
def test_a_run_takes_the_layer(asked, heavy, tmp_path):
    """Over SACPO on the story world: the safety step has the transform, the temperature times the scale of its labels."""
    path = tmp_path / "layer.yaml"
    assert dual("--samples", heavy, *asked, "--write", path, "--resamples", 20)[0] == 0
    layers = [CONFIGS / "quickstart.yaml", CONFIGS / "methods/sacpo.yaml", path]
    config = load_layers(layers, [("output", str(tmp_path / "run")), ("data.stories.pairs", "60")])
    step = load_file(path)["steps"]["safety"]
    stage = Run(read_config(config), config, Console(file=io.StringIO())).check()["safety"].model
    assert type(stage.labels.transform).__name__ == step["cost_transform"]["class_path"]
    assert stage.labels.base == DPO(beta=step["temperature"])


def test_a_layer_is_replaced_and_other_files_are_not(coins, tmp_path):
    path = tmp_path / "layer.yaml"
    for limit in (0.25, 0.3):
        dual("--samples", coins, "--budget", limit, "--write", path)
    assert "at most 0.3" in path.read_text()
    path.write_text("lam: 2\n")
    with pytest.raises(ValueError, match=r"layer.yaml exists and was not written by rsa dual: name another file"):
        dual("--samples", coins, "--budget", 0.25, "--write", path)
    assert path.read_text() == "lam: 2\n"
    with pytest.raises(ValueError, match="there is no folder"):
        dual("--samples", coins, "--budget", 0.25, "--write", tmp_path / "no/layer.yaml")


def test_rewards_stand_for_the_reward_step(tmp_path):
    """Rewards equal to β log(1, 3) make the dearer answer three times as likely: λ then undoes that and goes on."""
    rewards = [[0.0, 0.1 * math.log(3)]] * 2
    write_samples(tmp_path / "s.jsonl", samples_of([[0.0, 1.0]] * 2, rewards))
    _, printed = dual("--samples", tmp_path / "s.jsonl", "--budget", 0.5, "--beta", 0.1, "--rewards")
    assert f"{0.1 * math.log(3):.4g} [" in printed
    assert "as sampled" in printed


def run_of(folder: Path, kind: str, temperature: float | None) -> Path:
    """A run directory with one scored step."""
    (folder / "step").mkdir(parents=True)
    steps = {"step": {"kind": kind, "temperature": temperature}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "steps": steps}))
    write_samples(folder / "step/samples.jsonl", samples_of([[0.0, 1.0]] * 2, [[0.0, 1.0]] * 2))
    return folder / "step/samples.jsonl"


def test_the_temperature_is_that_of_the_run(tmp_path):
    path = run_of(tmp_path / "run", "reward", 2.0)
    assert f"{2 * math.log(3):.4g} [" in dual("--samples", path, "--budget", 0.25)[1]
    with pytest.raises(ValueError, match=r"--beta 0.1, but the step step that drew the answers was trained at 2"):
        dual("--samples", path, "--budget", 0.25, "--beta", 0.1)


def test_the_step_that_drew_the_answers_knows_its_temperature(tmp_path):
    """Two reward steps: the samples' own counts. Samples of neither: which one is the user's to say."""
    path = run_of(tmp_path / "run", "reward", 2.0)
    manifest = tmp_path / "run/manifest.json"
    steps = json.loads(manifest.read_text())["steps"] | {"other": {"kind": "reward", "temperature": 0.5}}
    manifest.write_text(json.dumps({"format": 1, "steps": steps}))
    assert f"{2 * math.log(3):.4g} [" in dual("--samples", path, "--budget", 0.25)[1]
    steps["step"] = {"kind": "warmup", "temperature": None}
    steps["third"] = {"kind": "reward", "temperature": 0.1}
    manifest.write_text(json.dumps({"format": 1, "steps": steps}))
    with pytest.raises(ValueError, match=r"reward steps at the temperatures \[0.1, 0.5\]: say which with --beta"):
        dual("--samples", path, "--budget", 0.25)


def test_answers_of_a_safety_step_are_noticed(tmp_path):
    path = run_of(tmp_path / "run", "safety", 0.1)
    assert "λ is what is needed on top of it" in dual("--samples", path, "--budget", 0.25)[1]


def test_answers_of_the_wrong_step_are_noticed(tmp_path):
    warmup, reward = run_of(tmp_path / "a", "warmup", None), run_of(tmp_path / "b", "reward", 0.1)
    assert "policy without reward alignment" in dual("--samples", warmup, "--budget", 0.25)[1]
    assert "policy without reward alignment" not in dual("--samples", warmup, "--budget", 0.25, "--rewards")[1]
    assert "has earned its rewards already" in dual("--samples", reward, "--budget", 0.25, "--rewards")[1]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([[None, None]] * 2, ["--budget", "1"], "no answer has a cost: set evaluation.scorer and run rsa align again"),
        ([[0.0, 1.0]], ["--budget", "1"], "scored answers to 1 prompt, and at least 2 are needed"),
        ([[0.0, 1.0]] * 2, ["--budget", "1", "--rewards"], "no answer has a reward and cost"),
        ([[0.0, 1.0]] * 2, ["--chance", "0", "5"], "--chance 0 5: the second number is a probability"),
        ([[0.0, 1.0]] * 2, ["--cvar-budget", "1", "--tail", "5"], "tail is a probability mass"),
        ([[0.0, 1.0]] * 2, ["--budget", "1", "--tail", "0.1"], "--tail is the share of the worst answers"),
        ([[0.0, 1.0]] * 2, ["--budget", "0.3", "--beta", "-1"], "beta: a temperature must be a positive number"),
        ([[0.0, 1.0]] * 2, ["--budget", "nan"], "budget: expected a number"),
    ],
)
def test_mistakes_are_one_line(rows, arguments, message, tmp_path, capsys):
    write_samples(tmp_path / "s.jsonl", samples_of(rows))
    assert main(["dual", "--samples", str(tmp_path / "s.jsonl"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_answers_without_a_score_are_left_out_and_counted(tmp_path):
    write_samples(tmp_path / "s.jsonl", samples_of([[0.0, 1.0, None], [0.0, 1.0, None]]))
    assert "4 to 2 prompts (2 without scores left out)" in dual("--samples", tmp_path / "s.jsonl", "--budget", 0.25)[1]


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["dual", "--samples", str(tmp_path / "none.jsonl"), "--budget", "1"]) == 1
    assert "none.jsonl" in capsys.readouterr().err
