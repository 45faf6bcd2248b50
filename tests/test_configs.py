"""Every shipped configuration parses and survives a one-step run; README and Makefile say the same commands."""

import inspect
import json
import re
from pathlib import Path

import pytest

from rsa_lightning.cli import main
from rsa_lightning.config import load_file, load_layers, overrides
from rsa_lightning.fit import FitCLI
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.plan import read_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
SIZES = sorted(path.name for path in (ROOT / "configs/sizes").glob("*.yaml"))
DEBUG = ROOT / "configs/debug.yaml"
ALIGN = {"quickstart.yaml", "hh.yaml", "pku.yaml"}
FIT = {"reward.yaml", "safety.yaml"}
SMALL = [
    "--evaluation.sampling.samples_per_prompt",
    "1",
    "--evaluation.sampling.max_new_tokens",
    "4",
    "--evaluation.pairs",
    "4",
    "--evaluation.resamples",
    "10",
]


def one_step(kind: str, config: str, *arguments) -> int:
    return main([kind, "-c", str(ROOT / "configs" / config), "-c", str(DEBUG), *map(str, arguments)])


def test_every_configuration_is_tested():
    assert set(CONFIGS) == ALIGN | FIT | {"debug.yaml", "fsdp2.yaml", "sweep.yaml"}
    assert SIZES == ["llama_70b.yaml", "llama_7b.yaml"]


@pytest.mark.parametrize("config", sorted(FIT))
def test_a_stage_survives_one_step(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Q{i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert one_step("fit", config, "--data.path", "pairs.jsonl", "--trainer.max_steps", 1) == 0
    assert list(tmp_path.glob("runs/*/version_0/model/model.safetensors"))


def test_the_quickstart_survives_one_step(tmp_path):
    size = ["--data.stories.demonstrations", 80, "--data.stories.pairs", 80, "--trainer.max_steps", 1]
    assert one_step("align", "quickstart.yaml", "--output", tmp_path / "run", *size, *SMALL) == 0
    assert len(json.loads((tmp_path / "run/results.json").read_text())["models"]) == 3


@pytest.mark.parametrize("config", [*sorted(FIT), *sorted(ALIGN)])
def test_the_layer_for_many_gpus_fits_over_every_configuration(config, tmp_path, monkeypatch):
    """Its keys are known to `rsa fit` and `rsa align`; on this machine it runs as one process."""
    monkeypatch.chdir(tmp_path)
    layers = [str(ROOT / "configs" / name) for name in (config, "fsdp2.yaml")]
    if config in FIT:
        values = load_layers(layers)
        values["data"]["path"], values["trainer"]["accelerator"] = "pairs.jsonl", "cpu"
        values["trainer"] |= {"logger": False, "callbacks": None}
        strategy = FitCLI(values).trainer.strategy
        assert isinstance(strategy, FSDP2)
        given = set(load_file(layers[1])["trainer"]["strategy"]["init_args"])
        assert given == set(inspect.signature(FSDP2).parameters) - {"timeout_minutes"}
        return
    assert main(["align", "-c", layers[0], "-c", layers[1], "--dry-run", "--world-size", "2"]) == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_layers_of_sizes_are_of_configurations(size):
    """Planned in tests/test_dryrun.py."""
    values = load_layers([ROOT / "configs/pku.yaml", ROOT / "configs/sizes" / size])
    read_config(values)
    assert re.search(rf"# Run:  rsa align .*-c configs/sizes/{size}", (ROOT / "configs/sizes" / size).read_text())


def test_the_sweep_survives_one_step_a_point(tmp_path, monkeypatch):
    """Two points of the shipped grid: the steps before safety are those of the first."""
    monkeypatch.chdir(ROOT)  # its layers are named from here
    size = ["--data.stories.demonstrations", 80, "--data.stories.pairs", 80, "--trainer.max_steps", 1]
    size += ["--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1, "--evaluation.figures", "false"]
    grid = ["--grid", "{lam: [0.5, 4]}", "--output", tmp_path / "sweep"]
    assert main(["sweep", "-c", "configs/sweep.yaml", *map(str, [*grid, *size, *SMALL])]) == 0
    found = json.loads((tmp_path / "sweep/results.json").read_text())
    assert found["selection"]["rule"] == "cantelli"
    points = sorted((tmp_path / "sweep/points").glob("*_tail-0.5"))
    assert [(point.name, len(found["rows"])) for point in points] == [("lam-0.5_tail-0.5", 12), ("lam-4_tail-0.5", 12)]
    steps = json.loads((points[1] / "manifest.json").read_text())["steps"]
    assert ["taken_from" in step for step in steps.values()] == [True, True, False]


def test_human_preferences_survive_one_step(tmp_path):
    """Transcripts made here: multi-turn, with a defect of each kind."""
    turn = "\n\nHuman: question {i}\n\nAssistant: well\n\nHuman: and?\n\nAssistant:"
    rows = [{"chosen": turn.format(i=i) + f" yes {i}", "rejected": turn.format(i=i) + f" no {i}"} for i in range(80)]
    rows[3]["rejected"] = turn.format(i=4) + " other prompt"
    rows[5]["chosen"] = turn.format(i=5)
    rows[7]["rejected"] = rows[7]["chosen"]
    for name in ("helpful", "safety"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data.helpful", tmp_path / "helpful.jsonl", "--data.safety", tmp_path / "safety.jsonl"]
    assert one_step("align", "hh.yaml", "--output", tmp_path / "run", *files, "--trainer.max_steps", 1, *SMALL) == 0
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["steps"]["reward"]["data"]["skipped"] == {"prompt_mismatch": 1, "empty": 1, "identical": 1}
    last = json.loads((tmp_path / "run/results.json").read_text())["models"][-1]
    assert last["reward_mean"] is None
    assert set(last["preference"]["helpful"]["held_out"]) >= {
        "pairs",
        "reward_accuracy",
        "logp_accuracy",
        "margin",
        "kl",
        "risk",
        "ci95",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_in_a_configuration_names_it(name):
    """The second line of each file is the command that runs it."""
    text = (ROOT / "configs" / name).read_text()
    assert re.search(rf"# Run:  rsa (align|fit|sweep) .*-c configs/{name}", text)
    load_file(ROOT / "configs" / name)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_of_the_documents_exist(document):
    text = (ROOT / document).read_text()
    made = set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE)) | set(re.findall(r"`make ([a-z]+)`", text))
    assert made <= targets()
    assert set(re.findall(r"configs/([\w.]+\.yaml)", text)) <= set(CONFIGS)
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (ROOT / path).exists(), path


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    names: dict = {}
    exec(blocks[0], names)
    assert names["total"].shape == (2,)
    assert names["weight"].grad.abs().sum() > 0


def test_the_two_commands_of_the_readme_are_those_of_ci():
    text = (ROOT / "README.md").read_text()
    assert "make quickstart" in text
    assert "make test" in text
    ci = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in ci if line.startswith("make ")] == [
        "make test",
        "make lint",
        "make aot",
        "make quickstart",
    ]


def test_the_quickstart_target_runs_the_quickstart():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"quickstart: install\n\t.*\$\(BIN\)/rsa align -c configs/quickstart.yaml\n", makefile)
    assert load_file(ROOT / "configs/quickstart.yaml")["output"] == "runs/quickstart"


def test_the_strategy_of_the_readmes_two_nodes_is_understood():
    command = re.search(
        r"--trainer\.strategy FSDP2 --trainer\.strategy\.replicas (\d+)", (ROOT / "README.md").read_text()
    )
    assert command is not None
    options = overrides(command[0].split())
    for layers in (["pku.yaml"], ["pku.yaml", "fsdp2.yaml"]):
        strategy = load_layers([ROOT / "configs" / name for name in layers], options)["trainer"]["strategy"]
        assert strategy["class_path"] == "FSDP2"
        assert strategy["init_args"]["replicas"] == int(command[1]) == 2
    sbatch = re.findall(r"--trainer\.strategy \w+", (ROOT / "configs/slurm/align.sbatch").read_text())
    large = ROOT / "configs/sizes/llama_7b.yaml"
    assert load_layers([large], overrides(sbatch[0].split()))["trainer"] == load_file(large)["trainer"] | {
        "strategy": {"class_path": "FSDP2", "init_args": load_file(large)["trainer"]["strategy"]["init_args"]}
    }
