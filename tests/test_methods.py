"""The family: every method is one YAML layer, and each runs here on a tiny story world, from data to report."""

import json
import re
from pathlib import Path

import pytest

from rsa_lightning.cli import main
from rsa_lightning.config import load_file, load_layers

ROOT = Path(__file__).parents[1]
METHODS = sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))
BETA, LAM, CONSERVATIVE = 0.1, 2.0, 10.0
SAFETY = BETA / LAM
SCALED = None  # s * beta / lam, with s of the data as the run notes it and lam as the layers say

# method -> its steps after the warm-up, with the temperature of those that train
SINGLE = {"reward": BETA}
STEPWISE = {"reward": BETA, "safety": SAFETY}
MERGED = {"reward": BETA, "safety": BETA / CONSERVATIVE, "merged": "merge"}
ON_COSTS = {"reward": BETA, "safety": SCALED}
STEPS: dict[str, dict[str, float | str | None]] = {
    "dpo_helpful": SINGLE,
    "kto": SINGLE,
    "ipo": SINGLE,
    "cdpo": SINGLE,
    "tdpo1": SINGLE,
    "tdpo2": SINGLE,
    "ra_dpo1": SINGLE,
    "ra_dpo2": SINGLE,
    "ra_dpo_published": SINGLE,
    "safe_dpo": SINGLE,
    "dpo_safety": {"safety": BETA},
    "sacpo": STEPWISE,
    "sacpo_dpo_kto": STEPWISE,
    "sacpo_kto_dpo": STEPWISE,
    "tdpo2_stepwise": STEPWISE,
    "rsa1_cvar": STEPWISE,
    "rsa2_cvar": STEPWISE,
    "rsa1_erm": STEPWISE,
    "rsa2_erm": STEPWISE,
    "sacpo_safety_first": {"safety": SAFETY, "helpful": BETA},
    "p_sacpo": MERGED,
    "rsa_p_merge": MERGED,
    "rsa_p_adapter": MERGED,
    "rsa_p_mix": {"reward": BETA, "safety": BETA / CONSERVATIVE, "mixed": "mix"},
    "naive_merge": {"reward": BETA, "safety": BETA, "merged": "merge"},
    "parallel": {"reward": BETA, "safety": SAFETY, "combined": "mix"},
    "mocan": {"labels": "label", "one_shot": BETA},
    "pecan": {"reward": BETA, "safety": BETA, "labels": "label", "one_shot": BETA},
    "mean_cost": ON_COSTS,
    "chance": ON_COSTS,
    "hinge": ON_COSTS,
    "entropic": ON_COSTS,
}
TINY = {
    "model.config.hidden_size": 32,
    "model.config.intermediate_size": 64,
    "model.config.num_hidden_layers": 1,
    "model.config.num_attention_heads": 2,
    "data.stories.demonstrations": 80,
    "data.stories.pairs": 80,
    "data.options.tokenizer_vocab_size": 300,
    "data.options.max_length": 160,
    "data.options.max_prompt_length": 64,
    "trainer.max_steps": 1,
    "evaluation.sampling.samples_per_prompt": 1,
    "evaluation.sampling.max_new_tokens": 4,
    "evaluation.pairs": 4,
    "evaluation.resamples": 10,
    "evaluation.figures": "false",
}


def layers(method: str) -> list[Path]:
    return [ROOT / "configs" / name for name in ("quickstart.yaml", f"methods/{method}.yaml", "debug.yaml")]


def run(method: str, output: Path) -> dict:
    options = [text for key, value in TINY.items() for text in (f"--{key}", str(value))]
    files = [text for layer in layers(method) for text in ("-c", str(layer))]
    assert main(["align", *files, "--output", str(output), *options]) == 0
    return json.loads((output / "manifest.json").read_text())


def test_every_method_is_expected():
    assert set(METHODS) == set(STEPS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_and_its_steps_have_the_temperatures_of_the_theory(method, tmp_path):
    manifest = run(method, tmp_path / "run")
    steps = {name: step for name, step in manifest["steps"].items() if name != "warmup"}
    assert list(steps) == list(STEPS[method])
    for name, expected in STEPS[method].items():
        if isinstance(expected, str):
            assert steps[name]["kind"] == expected
            continue
        if expected is SCALED:
            assert steps[name]["label_scale"] > 0
            expected = steps[name]["label_scale"] * BETA / load_layers(layers(method))["lam"]
        assert steps[name]["temperature"] == pytest.approx(expected)
    models = [model["name"] for model in json.loads((tmp_path / "run/results.json").read_text())["models"]]
    assert models == ["warmup", *(name for name, kind in STEPS[method].items() if kind != "label")]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_how_it_is_run_and_where_it_is_from(method):
    text = (ROOT / "configs/methods" / f"{method}.yaml").read_text()
    assert (
        f"# Run:  rsa align -c configs/quickstart.yaml -c configs/methods/{method}.yaml --output runs/{method}" in text
    )
    load_file(ROOT / "configs/methods" / f"{method}.yaml")


def test_the_readme_lists_every_method():
    table = (ROOT / "README.md").read_text()
    assert set(re.findall(r"`(\w+)`", table)) >= set(METHODS)
