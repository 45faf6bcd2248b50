"""`rsa align` end to end on small runs: the run directory, what is reused, and what is refused."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rsa_lightning.assess import read_prompts
from rsa_lightning.cli import main
from rsa_lightning.config import merge
from rsa_lightning.pipeline import Run, align
from rsa_lightning.plan import read_config

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SMALL_EVALUATION = {
    "sampling": {"samples_per_prompt": 2, "max_new_tokens": 8},
    "prompts": 4,
    "pairs": 8,
    "resamples": 20,
}
FAST = {"limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
STORIES = {
    "model": {"config": TINY},
    "data": {
        "stories": {"demonstrations": 40, "pairs": 40},
        "options": {"tokenizer_vocab_size": 400, "max_length": 96, "batch_size": 4},
    },
    "evaluation": {"scorer": "rsa_lightning.stories.score", **SMALL_EVALUATION},
    "trainer": FAST,
    "steps": {
        "warmup": {"kind": "warmup"},
        "reward": {"kind": "reward"},
        "safety": {"kind": "safety", "loss": "RSA", "risk": "CVaR"},
    },
}


def run(config, output, **changes) -> tuple[dict, str]:
    """The results and what was printed."""
    out = io.StringIO()
    found = align(merge(merge(config, {"output": str(output)}), changes), Console(file=out, width=200))
    return found, out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three steps. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    found, printed = run(STORIES, folder)
    return folder, found, printed


@pytest.fixture
def copy(finished, tmp_path):
    """A copy in which the paths of the first run are as good as new: nothing in a run may depend on where it lies."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_the_run_directory(finished):
    folder, found, _ = finished
    for step in STORIES["steps"]:
        names = {path.name for path in (folder / step).iterdir()}
        assert {"config.yaml", "metrics.csv", "samples.jsonl", "model", "checkpoints"} <= names
        AutoModelForCausalLM.from_pretrained(folder / step / "model")
    names = {path.name for path in folder.iterdir()}
    assert {
        "manifest.json",
        "results.json",
        "report.md",
        "training_curves.png",
        "reward_cost.png",
        "cost_quantiles.png",
    } <= names
    assert not list(folder.rglob("*.partial"))
    assert json.loads((folder / "results.json").read_text()) == found


def test_results_are_those_of_the_samples(finished):
    folder, found, _ = finished
    assert [model["name"] for model in found["models"]] == ["warmup", "reward", "safety"]
    for model in found["models"]:
        samples = [json.loads(line) for line in (folder / model["name"] / "samples.jsonl").open()]
        assert model["samples"] == len(samples) == 2 * 60
        assert model["reward_mean"] == pytest.approx(sum(s["reward"] for s in samples) / len(samples))
        assert model["unsafe_rate"] == pytest.approx(sum(s["cost"] > 0 for s in samples) / len(samples))
        assert model["kl_to_start"] == pytest.approx(
            sum(s["logp"] - s["ref_logp"] for s in samples) / len(samples), abs=1e-9
        )
        assert set(model["cost_var"]) == set(model["cost_cvar"]) == {"0.9", "0.95", "0.99"}
    assert found["models"][0]["kl_to_start"] == 0
    assert set(found["models"][2]["preference"]) == {"helpful", "safety"}


def test_the_manifest_holds_the_lineage(finished):
    manifest = json.loads((finished[0] / "manifest.json").read_text())
    steps = manifest["steps"]
    assert [(s["start"], s["reference"]) for s in steps.values()] == [
        ("base", None),
        ("warmup", "warmup"),
        ("reward", "reward"),
    ]
    assert steps["reward"]["temperature"] == pytest.approx(0.1)
    assert "model.safetensors" in steps["safety"]["model"]
    assert set(manifest["data"]) == {"demonstrations", "helpful", "safety", "prompts"}
    assert {"torch", "lightning", "transformers"} <= set(manifest["versions"])


def test_an_unchanged_run_is_reused_wherever_it_lies(copy, finished):
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*/model/model.safetensors")}
    found, printed = run(STORIES, copy)
    assert printed.count("reused") == 3
    assert "sampled" not in printed
    assert found == finished[1]
    assert before == {path: path.stat().st_mtime_ns for path in copy.glob("*/model/model.safetensors")}


def test_a_changed_step_reruns_itself_only_when_it_is_the_last(copy):
    _, printed = run(STORIES, copy, steps={"safety": {"loss": "DPO"}})
    assert printed.count("reused") == 2
    assert "safety: runs again, changed: step.loss" in printed


def test_the_report_shows_a_risk_where_the_loss_reads_one(copy):
    """RSA with the weight 0 is DPO whatever its risk; what is said of a step does not depend on when it was trained."""

    def cells() -> list[str]:
        rows = [line.split(" | ") for line in (copy / "report.md").read_text().splitlines()]
        return next(row[2:4] for row in rows if row[0] == "| safety (safety)")

    assert cells() == ["RSA", "CVaR"]
    for _ in range(2):  # trained, then reused
        run(STORIES, copy, steps={"safety": {"loss": {"class_path": "RSA", "init_args": {"risk_weight": 0.0}}}})
        assert cells() == ["RSA(risk_weight=0.0)", ""]


def test_a_changed_step_reruns_what_starts_from_it(copy):
    _, printed = run(STORIES, copy, steps={"reward": {"temperature": 0.5}})
    assert "warmup: reused" in printed
    assert "reward: runs again, changed: temperature" in printed
    assert "safety: runs again, changed: lineage" in printed


def test_a_changed_lambda_names_the_temperatures(copy):
    _, printed = run(STORIES, copy, lam=4.0)
    assert "reward: reused" in printed  # its temperature is beta, whatever lambda is
    assert "safety: runs again, changed: temperature" in printed
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["steps"]["safety"]["temperature"] == pytest.approx(0.025)


def test_a_safety_step_learns_from_the_true_costs_of_the_world(copy):
    """The manifest and the report name the temperature that was used, s beta / lam; a scale of one's own is another."""
    hinge = {"class_path": "Hinge", "init_args": {"eta": 0.5, "tail": 0.1}}
    changes = {"steps": {"safety": {"loss": "DPO", "cost_transform": hinge}}, "beta": 0.1, "lam": 4.0}
    _, printed = run(STORIES, copy, **changes)
    assert "safety: runs again, changed: step.loss, step.cost_transform, temperature" in printed
    entry = json.loads((copy / "manifest.json").read_text())["steps"]["safety"]
    scale = entry["label_scale"]
    assert 0 < scale < 4  # the costs of the unsafe answers are 1 and more, h of them 5 and more
    assert entry["temperature"] == pytest.approx(scale * 0.1 / 4.0)
    row = next(line for line in (copy / "report.md").read_text().splitlines() if line.startswith("| safety (safety)"))
    assert f"| Hinge(eta=0.5, tail=0.1), scale {scale:.3g} | {entry['temperature']:g} |" in row
    _, printed = run(STORIES, copy, **changes)
    assert printed.count("reused") == 3
    _, printed = run(STORIES, copy, **merge(changes, {"steps": {"safety": {"label_scale": 1.0}}}))
    assert "safety: runs again, changed: step.label_scale, temperature" in printed
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["steps"]["safety"]["temperature"] == pytest.approx(0.025)


def test_what_costs_cannot_say_is_said_before_training(tmp_path):
    changes = {"safety": {"cost_transform": {"class_path": "Indicator", "init_args": {"threshold": 1e6}}}}
    with pytest.raises(ValueError, match="steps.safety: no pair differs under this transform"):
        run(STORIES, tmp_path / "run", steps=changes)
    assert not (tmp_path / "run/warmup").exists()


def test_a_step_of_safedpo_relabels_its_own_pairs_and_leaves_those_that_are_judged(tmp_path):
    """40 pairs of answers of which a fifth is unsafe: some are swapped, the pairs of two unsafe answers are left out."""
    relabel = {"class_path": "SafeDPO", "init_args": {"margin": 4.0}}
    config = merge(STORIES, {"output": str(tmp_path / "run"), "data": {"stories": {"pairs": 200}}})
    config["steps"] = {"safedpo": {"kind": "reward", "loss": "DPO", "data": {"source": "helpful", "relabel": relabel}}}
    made = Run(read_config(config), config, Console(file=io.StringIO()))
    made.execute()
    entry = json.loads((tmp_path / "run/manifest.json").read_text())["steps"]["safedpo"]
    rows = [json.loads(line) for line in (tmp_path / "run/inputs/helpful.jsonl").open()]
    unsafe = sum(not (row["chosen_safe"] or row["rejected_safe"]) for row in rows)
    assert entry["data"]["skipped"]["both_unsafe"] == unsafe > 0
    assert entry["inputs"]["data"]["relabel"] == relabel
    trained = {e.row_id: e for e in made.data.of(made.config.steps["safedpo"]).train_examples}
    assert {e.offset for e in trained.values()} == {0.0, 4.0}
    judged = made.data.criteria()["helpful"]
    assert judged.settings.relabel is None
    swapped = [e for e in judged.train_examples if e.row_id in trained and trained[e.row_id].chosen_cost == e.rejected_cost
               and e.chosen_cost > 0 >= e.rejected_cost]  # fmt: skip
    assert swapped


def test_a_model_changed_on_disk_is_not_reused(copy):
    weights = copy / "safety/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    _, printed = run(STORIES, copy)
    assert "safety: runs again, the files of its model are not those it wrote" in printed


def test_an_interrupted_step_runs_again(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["steps"]["safety"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(copy / "safety/model")
    _, printed = run(STORIES, copy)
    assert "reward: reused" in printed
    assert "safety: runs;" in printed


def test_only_what_changed_is_done_again_in_evaluation(copy):
    """Another presentation changes nothing; another scorer scores the same answers; other sampling draws new ones."""
    answers = (copy / "safety/samples.jsonl").read_text()
    _, printed = run(STORIES, copy, evaluation={"show_examples": True, "resamples": 10})
    assert "sampled" not in printed
    found, printed = run(
        STORIES, copy, evaluation={"scorer": None}, steps={"safety": {"trainer": {"log_every_n_steps": 5}}}
    )
    assert "sampled" not in printed
    assert printed.count("reused") == 3
    assert found["models"][2]["reward_mean"] is None
    run(STORIES, copy)
    assert (copy / "safety/samples.jsonl").read_text() == answers
    _, printed = run(STORIES, copy, evaluation={"sampling": {"seed": 1}})
    assert printed.count("sampled") == 3


def test_an_interrupted_scoring_goes_on_with_the_same_answers(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    key = manifest["evaluations"]["safety"].pop("scores")
    manifest["evaluations"]["safety"]["scoring"] = key
    (copy / "manifest.json").write_text(json.dumps(manifest))
    path = copy / "safety/samples.jsonl"
    before = [json.loads(line) for line in path.open()]
    half = [row | ({"reward": None, "cost": None} if i % 2 else {}) for i, row in enumerate(before)]
    path.write_text("".join(json.dumps(row) + "\n" for row in half))
    _, printed = run(STORIES, copy)
    assert "sampled" not in printed
    assert [json.loads(line) for line in path.open()] == before


def test_stale_results_do_not_stand_beside_a_new_model(copy, monkeypatch):
    monkeypatch.setattr("rsa_lightning.pipeline._fit", lambda cli, data: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(STORIES, copy, steps={"safety": {"loss": "DPO"}})
    assert not (copy / "results.json").exists()
    assert not list(copy.glob("*.png"))
    assert "safety" not in json.loads((copy / "manifest.json").read_text())["steps"]


def test_a_fresh_base_model_is_the_origin_when_alignment_comes_first(tmp_path):
    fast = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}}
    found, _ = run(STORIES, tmp_path / "run", steps={"warmup": None, "safety": None, "reward": fast})
    [reward] = found["models"]
    assert reward["kl_to_start"] > 0
    assert reward["preference"]["helpful"]["training"]["margin"] != 0


def test_base_is_a_reference_of_its_own(copy):
    """Started from the reward model, near the base: the agreement check must see two different models."""
    with pytest.raises(ValueError, match="policy and reference differ before the first update"):
        run(
            STORIES,
            copy,
            steps={
                "safety": {"reference": "base"},
                "reward": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 3.0}}},
            },
        )


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    steps = {
        "reward": {
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 3e38, "weight_decay": 1000.0}},
            "trainer": {"max_steps": 1},
        }
    }
    with pytest.raises(FloatingPointError, match="is not finite"):
        run(STORIES, tmp_path / "run", steps=steps)
    assert "reward" not in json.loads((tmp_path / "run/manifest.json").read_text())["steps"]


def test_a_start_with_another_vocabulary_is_refused(finished, tiny_llama, tmp_path):
    config = {**STORIES, "model": {"config": TINY, "tokenizer": str(finished[0] / "inputs/tokenizer")}}
    with pytest.raises(ValueError, match="vocabulary mismatch: the model in .* has another tokenizer than this run"):
        run(config, tmp_path / "run", steps={"warmup": {"start": str(tiny_llama)}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"sampling": {"max_new_tokens": 5000}}}, "exceed the model's 2048 positions"),
        (
            {"data": {"options": {"batch_size": 4, "max_length": 96, "validation_fraction": 1e-9}}},
            "no pair is left for validation",
        ),
    ],
)
def test_what_evaluation_and_data_cannot_do_is_said_before_training(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(STORIES, tmp_path / "run", **changes)
    assert "steps" not in json.loads((tmp_path / "run/manifest.json").read_text())


def test_prompt_ids_tell_the_files_apart(tmp_path):
    """Both files are called pairs.jsonl; no prompt gets lost."""
    for name in ("h", "s"):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name} {i}?", "chosen": f" yes {i}", "rejected": f" no {i} no"} for i in range(60)]
        (tmp_path / name / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "helpful": str(tmp_path / "h/pairs.jsonl"),
        "safety": str(tmp_path / "s/pairs.jsonl"),
        "options": {"tokenizer_vocab_size": 300, "max_length": 64, "batch_size": 4, "validation_fraction": 0.4},
    }
    config = {
        "model": {"config": TINY},
        "data": data,
        "trainer": FAST,
        "evaluation": {**SMALL_EVALUATION, "prompts": 30},
        "steps": {"reward": {"kind": "reward"}, "safety": {"kind": "safety"}},
    }
    run(config, tmp_path / "run")
    ids = {json.loads(line)["prompt_id"] for line in (tmp_path / "run/safety/samples.jsonl").open()}
    assert len(ids) == 30
    assert {name.split("/")[0] for name in ids} == {"helpful", "safety"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1}], "prompts.jsonl:1: column 'prompt' must be text"),
        ([{"prompt_id": 7, "prompt": "x"}], "prompts.jsonl:1: column 'prompt_id' must be text"),
        ([7], "prompts.jsonl:1: .*not an object"),
        (
            [{"prompt_id": "a", "prompt": "x"}, {"prompt_id": "a", "prompt": "y"}],
            "prompts.jsonl:2: the prompt_id 'a' occurs twice",
        ),
    ],
)
def test_bad_prompt_files_are_named_by_row(rows, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_prompts_without_ids_are_named_by_their_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x", "category": "c"}\n{"prompt": "y"}\n')
    assert read_prompts(path) == {"prompts.jsonl:1": "x", "prompts.jsonl:2": "y"}


def test_safety_first_and_a_reference_of_ones_own(finished, tmp_path):
    """Order is free, and `start` may be a folder."""
    base = str(finished[0] / "warmup/model")
    steps = {"safe": {"kind": "safety", "loss": "DPO"}, "helpful": {"kind": "reward", "loss": "DPO"}}
    config = {**STORIES, "model": {"model": base}, "steps": steps, "lam": 4.0}
    found, _ = run(config, tmp_path / "run")
    temperatures = [
        s["temperature"] for s in json.loads((tmp_path / "run/manifest.json").read_text())["steps"].values()
    ]
    assert temperatures == pytest.approx([0.025, 0.1])
    assert found["models"][0]["kl_to_start"] != 0  # relative to the folder it started from


def test_a_step_config_runs_by_itself_and_makes_the_same_model(copy):
    """The file says where it writes: the run it belongs to. Another setting in the same place is refused."""
    step = copy / "safety"
    text = (step / "config.yaml").read_text()
    (step / "config.yaml").write_text(text.replace(str(text_folder(text)), str(copy)))
    before = (step / "model/model.safetensors").read_bytes()
    (step / "model/model.safetensors").unlink()
    assert main(["fit", "-c", str(step / "config.yaml")]) == 0
    assert (step / "model/model.safetensors").read_bytes() == before
    assert main(["fit", "-c", str(step / "config.yaml"), "--model.loss.risk_weight", "0.1"]) == 1


def text_folder(text: str) -> Path:
    """The run directory that a step's config.yaml was written for."""
    return Path(re.search(r"# Run:  rsa fit -c (.*)/safety/config.yaml", text)[1])


def trl_file(path: Path, count: int) -> Path:
    rows = [{"prompt": f"Question {i}?", "chosen": f" yes {i}", "rejected": f" no {i} no"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_local_model_replaces_the_fresh_one(family, tiny_llama, tiny_tokenizer, tmp_path):
    folder = tiny_llama
    if family == "qwen2":
        folder = tmp_path / "qwen2"
        shape = {key: value for key, value in TINY.items() if key != "model_type"}
        Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tiny_tokenizer), num_key_value_heads=2, **shape)).save_pretrained(
            folder
        )
        tiny_tokenizer.save_pretrained(folder)
    data = {
        "helpful": str(trl_file(tmp_path / "h.jsonl", 40)),
        "safety": str(trl_file(tmp_path / "s.jsonl", 40)),
        "options": {"max_length": 64, "batch_size": 4},
    }
    config = {
        "model": {"model": str(folder)},
        "data": data,
        "trainer": FAST,
        "evaluation": SMALL_EVALUATION,
        "steps": {"reward": {"kind": "reward"}, "safety": {"kind": "safety"}},
    }
    found, _ = run(config, tmp_path / "run")
    last = found["models"][-1]
    assert last["reward_mean"] is None
    assert last["cost_cvar"] == {"0.9": None, "0.95": None, "0.99": None}
    assert last["kl_to_start"] is not None
    assert set(last["preference"]) == {"helpful", "safety"}
    assert set(last["preference"]["safety"]) == {"held_out", "training"}


def test_the_whole_configuration_is_checked_before_anything_is_written(tmp_path):
    """The mistake is in the last step; nothing exists afterwards."""
    with pytest.raises(ValueError, match=r"steps.safety: .*CVaR tail is a probability mass in \(0, 1\], got 97"):
        run(STORIES, tmp_path / "run", steps={"safety": {"risk": {"class_path": "CVaR", "init_args": {"tail": 97}}}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"model": "somebody/some-model"}}, "is no folder here, .*download it elsewhere and give its folder"),
        (
            {"trainer": {"devices": 2, "accelerator": "cpu"}},
            "trainer.num_nodes ask for 2 processes, and rsa align starts none: torchrun --nproc-per-node 2",
        ),
    ],
)
def test_what_a_run_cannot_do_is_said_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(STORIES, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"exists and is no run directory \(no manifest.json in it\): choose another --output"
    ):
        run(STORIES, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
