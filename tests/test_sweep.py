"""`rsa sweep` end to end on a tiny world: what is trained how often, what survives an interruption, and what is refused."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from test_pipeline import FAST, SMALL_EVALUATION, TINY

from rsa_lightning import sweep as sweeps
from rsa_lightning.checkpoint import folder_hashes
from rsa_lightning.cli import main
from rsa_lightning.config import dump, merge
from rsa_lightning.evaluation.comparison import PointRecord, write_comparison
from rsa_lightning.evaluation.report import ModelRecord, results
from rsa_lightning.evaluation.samples import Sample, write_samples
from rsa_lightning.evaluation.tail import cantelli_bound
from rsa_lightning.pipeline import align

SHARED = {
    "model": {"config": TINY},
    "data": {
        "stories": {"demonstrations": 40, "pairs": 40},
        "options": {"tokenizer_vocab_size": 400, "max_length": 96, "batch_size": 4},
    },
    "evaluation": {"scorer": "rsa_lightning.stories.score", "figures": False, **SMALL_EVALUATION, "resamples": 10},
    "trainer": FAST,
    "steps": {
        "reward": {"kind": "reward"},
        "safety": {"kind": "safety", "loss": "RSA", "risk": {"class_path": "CVaR"}},
    },
}
GRID = {"lam": [1, 4], "steps.safety.risk.init_args.tail": [0.9, 0.5]}
NAMES = [f"lam-{lam}_tail-{tail}" for lam in (1, 4) for tail in (0.9, 0.5)]


def sweep(output: Path, **changes) -> tuple[int, str]:
    """Exit status and what was printed."""
    out = io.StringIO()
    config = {"align": SHARED, "output": str(output), "grid": GRID} | changes
    return sweeps.run_sweep(sweeps.read_sweep(config), Console(file=out, width=250)), out.getvalue()


def manifest(output: Path, name: str) -> dict:
    return json.loads((output / "points" / name / "manifest.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of 2 x 2 points that was interrupted in the safety step of its third, and what was printed before and after."""
    output, before = tmp_path_factory.mktemp("sweeps") / "sweep", io.StringIO()
    trained = []
    with pytest.MonkeyPatch.context() as patch:

        def fit(cli, data):
            trained.append(cli.trainer.loggers[0].log_dir)
            if len(trained) == 4:  # reward, safety, safety, and this one
                raise KeyboardInterrupt
            cli.trainer.fit(cli.model, data)

        patch.setattr("rsa_lightning.pipeline._fit", fit)
        config = {"align": SHARED, "output": str(output), "grid": GRID}
        with pytest.raises(KeyboardInterrupt):
            sweeps.run_sweep(sweeps.read_sweep(config), Console(file=before, width=250))
        partial = json.loads((output / "results.json").read_text())
        status, after = sweep(output)
    return output, trained, partial, status, before.getvalue(), after


def test_equal_steps_are_trained_once(finished):
    """Four points: one reward step, four safety steps, and one more for the interrupted one."""
    output, trained, _, status, before, after = finished
    assert status == 0
    steps = [str(Path(folder).relative_to(output / "points")) for folder in trained]
    assert steps == [f"{NAMES[0]}/reward", *(f"{name}/safety" for name in (*NAMES[:3], *NAMES[2:]))]
    assert before.count("reward: taken over from") == 2
    assert f"reward: taken over from {output}/points/{NAMES[0]}/reward (same configuration, data and start)" in before
    assert after.count("reward: taken over from") == 1  # the fourth point; the third has it already
    assert after.count("reward: reused") == 3


def test_what_is_taken_over_is_the_same_model_and_the_same_answers(finished):
    output, *_ = finished
    first, *others = [output / "points" / name / "reward" for name in NAMES]
    for other in others:
        assert folder_hashes(other / "model") == folder_hashes(first / "model")
        assert os.stat(other / "model/model.safetensors").st_nlink == 4
        assert (other / "samples.jsonl").read_text() == (first / "samples.jsonl").read_text()
        assert os.stat(other / "samples.jsonl").st_nlink == 1
        assert not (other / "checkpoints").exists()
        # the configuration is its own: rsa fit writes where it says
        assert str(other / "model") in (other / "config.yaml").read_text()
        step = json.loads((other.parent / "manifest.json").read_text())["steps"]["reward"]
        assert (other / step["taken_from"]).resolve() == first.resolve()
    safety = {name: folder_hashes(output / "points" / name / "safety/model")["model.safetensors"] for name in NAMES}
    assert len(set(safety.values())) == 4


def test_answers_of_shared_steps_are_drawn_once(finished):
    _, _, _, _, before, after = finished
    assert (before + after).count("reward: 120 answers are sampled") == 1
    assert (before + after).count("safety: 120 answers are sampled") == 4


def test_an_interrupted_sweep_compares_what_is_finished(finished):
    _, _, partial, *_ = finished
    assert [point["name"] for point in partial["points"]] == NAMES[:2]
    assert partial["planned"] == 4


def test_temperatures_are_those_of_the_points(finished):
    output, *_ = finished
    assert [manifest(output, name)["steps"]["safety"]["temperature"] for name in NAMES] == [0.1, 0.1, 0.025, 0.025]


def test_results_are_those_of_the_runs(finished):
    output, *_ = finished
    found = json.loads((output / "results.json").read_text())
    with (output / "results.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["point"], row["step"]) for row in rows] == [(n, s) for n in NAMES for s in ("reward", "safety")]
    assert [row["steps.safety.risk.init_args.tail"] for row in rows[::2]] == ["0.9", "0.5", "0.9", "0.5"]
    for row, plain in zip(rows, found["rows"], strict=True):
        run = json.loads((output / "points" / row["point"] / "results.json").read_text())
        [model] = [model for model in run["models"] if model["name"] == row["step"]]
        assert float(row["cost_cvar_0.99"]) == plain["cost_cvar_0.99"] == model["cost_cvar"]["0.99"]
        low, high = model["ci95"]["cost_cantelli"]["0.95"]
        assert (plain["cost_cantelli_0.95_low"], plain["cost_cantelli_0.95_high"]) == (low, high)
        assert int(row["answers"]) == 120
    assert not (output / "points" / NAMES[0] / "reward_cost.png").exists()


def test_a_finished_sweep_is_reused_wherever_it_lies(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("rsa_lightning.pipeline._fit", lambda cli, data: pytest.fail("nothing is to be trained"))
    shutil.copytree(finished[0], tmp_path / "sweep")
    status, printed = sweep(tmp_path / "sweep")
    assert status == 0
    assert printed.count(": reused") == 8
    assert "sampled" not in printed


def test_a_step_whose_files_changed_is_no_donor(finished, tmp_path):
    """Both the third and the fourth point lose their reward step; the first one's has other weights than it wrote."""
    output = tmp_path / "sweep"
    shutil.copytree(finished[0], output)
    weights = output / "points" / NAMES[0] / "reward/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    shutil.rmtree(output / "points" / NAMES[1])
    shared = merge(SHARED, {"output": str(output / "points" / NAMES[1]), "lam": 1})
    config = merge(shared, {"steps": {"safety": {"risk": {"init_args": {"tail": 0.5}}}}})
    out = io.StringIO()
    align(config, Console(file=out, width=250), donors=[output / "points" / name for name in NAMES])
    assert f"reward: taken over from {output}/points/{NAMES[2]}/reward" in out.getvalue()
    assert "safety: runs;" in out.getvalue()  # its donor would have been itself


def test_another_seed_shares_nothing_and_a_failing_point_does_not_stop_the_others(tmp_path):
    """A learning rate that makes weights infinite: reported, exit status 1, the other points are compared."""
    broken = {"class_path": "torch.optim.SGD", "init_args": {"lr": 3e38, "weight_decay": 1000.0}}
    points = {"broken": {"steps.reward.optimizer": broken}, "plain": {}}
    align_config = merge(SHARED, {"steps": {"safety": None}})
    out = io.StringIO()
    config = {"align": align_config, "output": str(tmp_path / "sweep"), "points": points, "seeds": [0, 1]}
    status = sweeps.run_sweep(sweeps.read_sweep(config), Console(file=out, width=250))
    printed = out.getvalue()
    assert status == 1
    assert "taken over" not in printed
    found = json.loads((tmp_path / "sweep/results.json").read_text())
    errors = {point["name"]: point["error"] for point in found["points"]}
    assert list(errors) == ["broken_seed-0", "plain_seed-0", "broken_seed-1", "plain_seed-1"]
    assert "FloatingPointError" in errors["broken_seed-0"]
    assert errors["plain_seed-1"] is None
    report = (tmp_path / "sweep/report.md").read_text()
    assert "2 of 4 points are finished." in report
    assert "`broken_seed-1` failed: FloatingPointError" in report
    assert "| plain (2 runs) |" in report


# ------------------------------------------------------------------------------------------------ without any run


def record(folder: Path, name: str, reward: float, costs: list[float], setting: str = "", seed=None) -> PointRecord:
    """A finished point whose last model has this reward and these costs."""
    path = folder / name / "safety/samples.jsonl"
    path.parent.mkdir(parents=True)
    write_samples(path, [Sample(f"p{i}", 0, "", "", -1.0, -2.0, reward, cost) for i, cost in enumerate(costs)])
    found = results([ModelRecord("safety", path)], resamples=10)
    return PointRecord(name, setting or name, seed, {"lam": 1}, folder / name, found)


def test_the_report_names_front_and_selection(tmp_path):
    points = [
        record(tmp_path, "bold", 3.0, [0.0] * 19 + [9.0]),
        record(tmp_path, "middle", 2.0, [0.0] * 10 + [1.0] * 10),
        record(tmp_path, "dominated", 1.5, [0.5] * 10 + [1.0] * 10),
        record(tmp_path, "safe", 1.0, [-1.0] * 20),
    ]
    rule = sweeps._rule({"rule": "cantelli", "limit": 3.0, "level": 0.95})
    out = io.StringIO()
    found = write_comparison(tmp_path, points, rule, planned=5, console=Console(file=out, width=200))
    text = (tmp_path / "report.md").read_text()
    assert found["selection"]["chosen"] == "middle"
    cantelli = {name: cantelli_bound(*[tensor(costs)], 0.95).item() for name, costs in costs_of(tmp_path).items()}
    assert found["selection"]["figures"] == pytest.approx(cantelli)
    assert cantelli["bold"] > 3 > cantelli["middle"]  # 0.45 + sqrt(19) 1.96 = 9.0; 0.5 + sqrt(19) / 2 = 2.68
    assert "4 of 5 points are finished." in text
    # on average bold (0.45) is cheaper than middle (0.5) and better, too; in the tail it is not
    assert "front of reward against mean cost: `safe`, `bold`; against the mean cost of the worst 5 %: `safe`, " in text
    assert (
        "Admissible under the rule mean + sqrt(0.95 / 0.05) × standard deviation of the cost <= 3: 3 of 4 set" in text
    )
    assert "Of these `middle` has the highest mean reward, 2.00; its figure under the rule is 2.68." in text
    assert (tmp_path / "reward_cost.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "Over seeds" not in text
    assert "`middle` has the highest mean reward" in out.getvalue()


def costs_of(folder: Path) -> dict[str, list[float]]:
    return {
        path.parent.parent.name: [json.loads(line)["cost"] for line in path.open()]
        for path in folder.glob("*/safety/samples.jsonl")
    }


def tensor(costs: list[float]):
    import torch

    return torch.tensor(costs, dtype=torch.float64)


def test_a_setting_counts_with_all_its_seeds(tmp_path):
    """Figures of the report's table over seeds by hand; the bold setting is not safe with its second seed."""
    points = [
        record(tmp_path, "bold_seed-0", 3.0, [0.0, 0.0], "bold", 0),
        record(tmp_path, "bold_seed-1", 4.0, [0.0, 4.0], "bold", 1),
        record(tmp_path, "safe_seed-0", 1.0, [0.0, 0.0], "safe", 0),
        record(tmp_path, "safe_seed-1", 2.0, [0.0, 1.0], "safe", 1),
    ]
    found = write_comparison(
        tmp_path, points, sweeps._rule({"rule": "mean", "limit": 1.0}), planned=4, draw_figure=False
    )
    assert found["selection"]["chosen"] == "safe"
    text = (tmp_path / "report.md").read_text()
    assert "| bold (2 runs) | 3.50 [3.00, 4.00] | 1.00 [0.00, 2.00] |" in text
    assert (
        "Admissible under the rule mean cost <= 1: 1 of 2 settings. Of these `safe` has the highest mean reward, 1.50"
        in text
    )
    # one seed of a setting is missing: the setting is no candidate
    found = write_comparison(
        tmp_path,
        [*points[:3], PointRecord("safe_seed-1", "safe", 1, {}, tmp_path, error="ValueError: no")],
        sweeps._rule({"rule": "mean", "limit": 1.0}),
        planned=4,
        draw_figure=False,
    )
    assert found["selection"]["chosen"] is None
    assert (
        "No setting is admissible under the rule mean cost <= 1; `bold` comes closest with 2.00."
        in (tmp_path / "report.md").read_text()
    )


def read(**changes) -> sweeps.Sweep:
    return sweeps.read_sweep({"align": SHARED, "output": "out", "grid": {"lam": [1]}} | changes)


def test_points_are_named_by_what_they_set():
    grid = {
        "steps.reward.risk.init_args.tail": [0.9],
        "steps.safety.risk.init_args.tail": [0.9, 0.5],
        "steps.safety.loss": ["DPO", {"class_path": "RSA", "init_args": {"risk_weight": 0.25}}],
        "lora": [None],
    }
    # CVaR has to be named in the reward step, too
    shared = merge(SHARED, {"steps": {"reward": {"risk": {"class_path": "CVaR"}}}})
    names = [point.name for point in read(align=shared, grid=grid, points={"plain": {"lam": 2}}).points]
    assert names[0] == "reward.risk.tail-0.9_safety.risk.tail-0.9_loss-DPO_lora-null"
    assert names[3] == "reward.risk.tail-0.9_safety.risk.tail-0.5_loss-RSA-risk-weight-0.25_lora-null"
    assert names[4] == "plain"
    assert len(names) == 5


def test_names_that_would_be_equal_are_told_apart():
    names = [point.name for point in read(grid={"data.prompts": ["a/x.jsonl", "b/x.jsonl"]}, align=files()).points]
    assert len(set(names)) == 2
    assert all(name.startswith("prompts-x.jsonl_") for name in names)


def files() -> dict:
    return merge(SHARED, {"data": {"stories": None, "path": "pairs.jsonl", "format": "pku"}})


def test_options_of_rsa_align_are_for_all_points(tmp_path):
    (tmp_path / "align.yaml").write_text(dump(SHARED))
    config = {"align": str(tmp_path / "align.yaml"), "output": "out", "grid": {"lam": [1, 2]}, "seeds": [3]}
    found = sweeps.read_sweep(config, {"beta": 0.5, "steps.safety.loss": "DPO"})
    assert [(p.config["lam"], p.config["beta"], p.config["seed"]) for p in found.points] == [(1, 0.5, 3), (2, 0.5, 3)]
    assert found.points[0].config["steps"]["safety"]["loss"] == "DPO"
    assert {p.config["data"]["options"]["cache_dir"] for p in found.points} == {"out/cache"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": [1]}, "lam: unknown key of a sweep; known are align, output"),
        ({"output": None}, "output: name the folder of the sweep"),
        ({"align": None}, r"align: give layers of rsa align, such as  align: \[configs/quickstart.yaml\]"),
        ({"grid": {}}, "grid: give keys of rsa align with their values"),
        ({"grid": {"lam": 1}}, "grid.lam must be a list of values, got 1"),
        ({"grid": {"lamm": [1]}}, r"point lamm-1: .*lamm"),
        ({"grid": {"steps.safety.riks": [1]}}, r"point riks-1: steps.safety.riks: unknown key"),
        ({"grid": {"output": ["a"]}}, "grid.output: use output of the sweep"),
        ({"points": {"x": {"seed": 1}}}, "points.x.seed: use seeds, a list"),
        ({"points": {"lam-1": {}}}, "points: a name is also the name of a point of the grid"),
        ({"points": {"a b": {}}}, "points: 'a b' is no name for a point"),
        ({"seeds": [0, 0]}, r"seeds: \[0, 0\] names one twice"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, got 3"),
        ({"select": {"rule": "mean"}}, "select has the keys rule, limit, level"),
        ({"select": {"rule": "cvar", "limit": 1}}, "select.level: cvar needs one"),
        (
            {"align": merge(SHARED, {"evaluation": {"scorer": None}}), "select": {"rule": "mean", "limit": 1}},
            "select needs rewards and costs: set evaluation.scorer",
        ),
    ],
)
def test_a_sweep_is_checked_before_anything_is_run(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(**changes)
    assert not list(tmp_path.iterdir())


def test_what_the_grid_sets_is_no_option(tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(dump({"align": SHARED, "output": str(tmp_path / "out"), "grid": {"lam": [1]}}))
    assert main(["sweep", "-c", str(tmp_path / "sweep.yaml"), "--lam", "3"]) == 1
    assert "--lam is set by the grid or by a point of the sweep: change it there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_one_process(tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="rsa sweep is one process, and 4 were started: run it by itself, or each point"
    ):
        sweep(tmp_path / "sweep")
    assert not list(tmp_path.iterdir())


def test_a_run_of_rsa_align_is_no_place_for_a_sweep(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is the run directory of one rsa align: choose another --output"):
        sweep(tmp_path)
