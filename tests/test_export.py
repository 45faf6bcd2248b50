"""`rsa export`: what plain transformers and peft load computes what the policy computed in training; the card is true."""

import io
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from processes import on_ranks
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsa_lightning import card
from rsa_lightning.adapters import Lora
from rsa_lightning.checkpoint import write_json
from rsa_lightning.cli import main
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.losses import DPO
from rsa_lightning.models import Policy, PolicySpec
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.pipeline import align
from rsa_lightning.stages import RewardAlignment

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
IDS = (torch.arange(24) * 7 + 1)[None] % 250
MESSAGES = [{"role": "user", "content": "hello"}]

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": f"Question {i}?", "chosen": f" yes {i % 5} {'good ' * (i % 4 + 1)}", "rejected": f" no {i % 3} bad"}
        for i in range(80)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def configuration(pairs: Path, policy: dict[str, Any]) -> dict[str, Any]:
    """As `rsa fit` leaves it, with the trainer of a machine that is not this one."""
    data = {"path": str(pairs / "pairs.jsonl"), "batch_size": 4, "max_length": 64, "tokenizer_vocab_size": 300}
    data |= {"template": "chatml", "cache_dir": str(pairs / "cache"), "defects": {"duplicate": "keep"}}
    options = {"policy": policy, "loss": "DPO", "beta": 0.1}
    trainer = {"accelerator": "gpu", "devices": 8, "strategy": "fsdp2", "max_steps": 3}
    return {
        "seed_everything": 7,
        "trainer": trainer,
        "model": {"class_path": "RewardAlignment", "init_args": options},
    } | {
        "data": data,
        "ckpt_path": None,
    }


@torch.no_grad()
def assert_computes(model: Any, expected: Tensor, *, merged: bool = False) -> None:
    """To 1e-6; W + B A, added up once in float32, rounds otherwise than two products: a few ulps of the largest logit."""
    tolerance = 3e-6 * expected.abs().max().item() if merged else 1e-6
    torch.testing.assert_close(model.eval()(IDS).logits[0], expected, rtol=0, atol=tolerance)


@torch.no_grad()
def policy_logits(policy: Policy) -> Tensor:
    """Those of the policy in training, sharded or not: its hidden states, times its head."""
    at = torch.arange(IDS.shape[1])
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "left_padded": False, "row_bounds": None}
    weight = policy.head.weight
    hidden = policy.eval().states(batch | {"positions": at})  # type: ignore[arg-type]
    return hidden @ (weight.full_tensor() if isinstance(weight, DTensor) else weight).T


def trained(pairs: Path, policy: dict[str, Any], path: Path, strategy: Any = "auto", processes: int = 1) -> Tensor:
    """Three large steps and a checkpoint; the logits of what was trained."""
    lora = {"lora": Lora(**policy["lora"])} if policy.get("lora") else {}
    configured = configuration(pairs, policy)["data"]
    data = PreferenceData(**configured | {"batch_size": 8 // processes})
    data.prepare(policy.get("model"))
    stage = RewardAlignment(
        PolicySpec(**policy | lora),
        loss=DPO(),
        beta=0.1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        max_steps=3,
        use_distributed_sampler=False,
        inference_mode=False,
        limit_val_batches=0,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(stage, data)
    trainer.save_checkpoint(path)
    assert stage.policy is not None
    return policy_logits(stage.policy)


def export(*arguments: Any) -> None:
    assert main(["export", *map(str, arguments)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["export", *map(str, arguments)]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def shards_of_two(pairs, tmp_path_factory, tiny_llama):
    """kind -> (policy, a checkpoint of two processes, the logits they trained to)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds: dict[str, dict[str, Any]] = {
        "tied": {"config": {**LLAMA, "tie_word_embeddings": True}},
        "untied": {"config": {**LLAMA, "tie_word_embeddings": False}},
        "lora": {"model": str(tiny_llama), "lora": {"rank": 4}},
    }

    def train(rank: int) -> list[Tensor]:
        return [trained(pairs, policy, folder / f"{kind}.ckpt", FSDP2(), 2) for kind, policy in kinds.items()]

    logits = on_ranks(2, train)[0]
    found = {}
    for (kind, policy), values in zip(kinds.items(), logits, strict=True):
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(configuration(pairs, policy)))
        found[kind] = (folder / f"{kind}.yaml", folder / f"{kind}.ckpt", values)
    return found


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_shards_of_two_processes_become_a_model_of_the_same_logits(shards_of_two, tmp_path, kind):
    config, checkpoint, expected = shards_of_two[kind]
    assert checkpoint.is_dir()
    export("--checkpoint", checkpoint, "-c", config, "--output", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_computes(model, expected, merged=kind == "lora")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "tied")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert "<|im_start|>user" in tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_an_adapter_goes_onto_its_base_with_peft(shards_of_two, tmp_path, tiny_llama):
    peft = pytest.importorskip("peft")
    config, checkpoint, expected = shards_of_two["lora"]
    export("--checkpoint", checkpoint, "-c", config, "--output", tmp_path / "adapter", "--adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        assert (base(IDS).logits[0] - expected).abs().max() > 0.01  # it was trained
    assert_computes(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), expected)
    assert "library_name: peft" in (tmp_path / "adapter/README.md").read_text()
    AutoTokenizer.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_file_of_one_process_becomes_the_same(pairs, tmp_path, tiny_llama, lora):
    policy = {"model": str(tiny_llama), "lora": lora}
    expected = trained(pairs, policy, tmp_path / "one.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration(pairs, policy)))
    arguments = ("--checkpoint", tmp_path / "one.ckpt", "-c", tmp_path / "config.yaml", "--output", tmp_path / "model")
    export(*arguments)
    export(*arguments)  # an earlier model is replaced
    assert_computes(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), expected, merged=lora is not None)


def test_an_adapter_on_weights_in_four_bits_is_exported_without_them(pairs, tmp_path, tiny_llama):
    pytest.importorskip("bitsandbytes")
    policy = {"model": str(tiny_llama), "lora": {"rank": 4}, "quantize": "4bit"}
    expected = trained(pairs, policy, tmp_path / "four.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration(pairs, policy)))
    export("--checkpoint", tmp_path / "four.ckpt", "-c", tmp_path / "config.yaml", "--output", tmp_path / "model")
    assert_computes(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), expected, merged=True)


def test_the_card_of_a_checkpoint_says_what_is_known_and_no_more(shards_of_two, tmp_path, pairs):
    config, checkpoint, _ = shards_of_two["untied"]
    export("--checkpoint", checkpoint, "-c", config, "--output", tmp_path / "model")
    text = (tmp_path / "model/README.md").read_text()
    assert "| optimizer steps | 3 |" in text
    assert "| seed | 7 |" in text
    data = PreferenceData(**configuration(pairs, {})["data"])
    data.prepare()
    assert f"| training pairs | {len(data.train_examples)} |" in text
    assert "| starts from | a fresh llama, seed 0 |" in text
    assert "| processes | not recorded |" in text
    assert "no figure is known" in text


def test_a_checkpoint_of_another_configuration_is_refused_by_its_first_weight(
    shards_of_two, tmp_path, capsys, tiny_llama
):
    config, checkpoint, _ = shards_of_two["untied"]
    arguments = ("--checkpoint", checkpoint, "-c", config, "--output", tmp_path / "model")
    wider = "--model.init_args.policy.config.intermediate_size"
    told = refused(capsys, *arguments, wider, 48)
    assert "layers.0.mlp.down_proj.weight is (32, 64) in the checkpoint, (32, 48) here" in told
    assert "no policy.lora" in refused(capsys, *arguments, "--adapter")
    other, lora = shutil.copytree(tiny_llama, tmp_path / "other"), shards_of_two["lora"]
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    told = refused(capsys, "--checkpoint", lora[1], "-c", lora[0], "--output", tmp_path / "model",
                   "--model.init_args.policy.model", other)  # fmt: skip
    assert "an adapter of another model" in told
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_exported_is_said(shards_of_two, tmp_path, capsys):
    config, checkpoint, _ = shards_of_two["untied"]
    assert "there is no checkpoint" in refused(
        capsys, "--checkpoint", tmp_path / "x", "-c", config, "--output", tmp_path / "m"
    )
    assert "needs -c FILE" in refused(capsys, "--checkpoint", checkpoint, "--output", tmp_path / "m")
    assert "give one of the two" in refused(capsys, "--output", tmp_path / "m")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("mine")
    told = refused(capsys, "--checkpoint", checkpoint, "-c", config, "--output", tmp_path / "notes")
    assert "exists and is no model folder" in told
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / "__1_0.distcp").unlink()
    told = refused(capsys, "--checkpoint", damaged, "-c", config, "--output", tmp_path / "m")
    assert "__1_0.distcp" in told
    assert "it is damaged or not whole" in told


# ---------------------------------------------------------------------- steps of a run

RUN: dict[str, Any] = {
    "model": {"config": LLAMA},
    "data": {
        "stories": {"demonstrations": 40, "pairs": 40},
        "options": {"tokenizer_vocab_size": 400, "max_length": 96, "batch_size": 4},
    },
    "evaluation": {
        "scorer": "rsa_lightning.stories.score",
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": 8},
        "prompts": 4,
        "pairs": 8,
        "resamples": 20,
        "figures": False,
    },
    "trainer": {"limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1},
    "steps": {
        "warmup": {"kind": "warmup"},
        "reward": {"kind": "reward", "loss": "DPO"},
        "safety": {"kind": "safety", "loss": "RSA", "risk": "CVaR", "lora": {"rank": 2}},
        "unrelated": {"kind": "reward", "loss": "IPO", "start": "warmup"},
    },
    "lam": 4.0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    align({**RUN, "output": str(folder)}, Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def exported(run):
    export("--run", run, "--step", "safety", "--output", run.parent / "safety")
    return run.parent / "safety"


def test_a_step_is_exported_as_it_was_written(run, exported):
    found = {path.name for path in exported.iterdir()} - {"README.md"}
    assert found == {path.name for path in (run / "safety/model").iterdir()}
    for name in found:
        assert (exported / name).read_bytes() == (run / "safety/model" / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(exported)


@pytest.mark.parametrize("step", ["warmup", "safety"])
def test_the_checkpoint_of_a_step_with_its_own_configuration_is_the_same_model(run, tmp_path, step):
    (checkpoint,) = (run / step / "checkpoints").iterdir()
    export("--checkpoint", checkpoint, "-c", run / step / "config.yaml", "--output", tmp_path / "model")
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run / step / "model"))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in weights)
    assert json.loads((tmp_path / "model/config.json").read_text()) == json.loads(
        (run / step / "model/config.json").read_text()
    )


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_measured_number_of_the_card_is_that_of_results_json(run, exported):
    """Row by row: value and interval, in the order of the labels; nothing else in the tables is a number."""
    measured = section((exported / "README.md").read_text(), "Measured")
    results = json.loads((run / "results.json").read_text())
    model = next(model for model in results["models"] if model["name"] == "safety")
    figures, judged = (cells(part) for part in measured.split("Implicit rewards and KL"))
    said = {row[0]: row[1:3] for row in figures}
    wanted = {
        "mean reward": ("reward_mean", None),
        "unsafe rate, P(cost > 0)": ("unsafe_rate", None),
        "mean cost of the worst 5 %": ("cost_cvar", "0.95"),
        "Cantelli bound on VaR 0.99": ("cost_cantelli", "0.99"),
        "KL to start, nats per answer": ("kl_to_start", None),
    }
    for label, (key, level) in wanted.items():
        value, interval = model[key], model["ci95"][key]
        value, interval = (value[level], interval[level]) if level else (value, interval)
        assert float(said[label][0]) == float(f"{value:.4g}")
        assert json.loads(said[label][1]) == [float(f"{bound:.4g}") for bound in interval]
    assert said["unsafe rate, upper bound"] == [f"{model['unsafe_upper']:.4g}", "–"]
    pairs = {(row[0], row[2]): row for row in judged[2:]}
    assert len(pairs) == 2 * 3
    for (criterion, label), row in pairs.items():
        held_out = model["preference"][criterion]["held_out"]
        key = next(key for key, name in card.HELD_OUT.items() if name == label)
        assert int(row[1]) == held_out["pairs"]
        assert float(row[3]) == float(f"{held_out[key]:.4g}")
        assert json.loads(row[4]) == [float(f"{bound:.4g}") for bound in held_out["ci95"][key]]
    assert f"{model['samples']} sampled answers; scorer: rsa_lightning.stories.score." in measured


def test_beside_the_figures_stand_those_of_the_model_that_alignment_started_from(run, exported):
    """That is the warm-up, two steps back; of itself it has none to stand beside."""
    header, _, *rows = cells(section((exported / "README.md").read_text(), "Measured").split("Implicit rewards")[0])
    assert header[3:] == ["before alignment (`warmup`)", "its 95 % interval"]
    results = json.loads((run / "results.json").read_text())
    warmup = next(model for model in results["models"] if model["name"] == "warmup")
    said = {row[0]: row[3:] for row in rows}
    assert float(said["mean reward"][0]) == float(f"{warmup['reward_mean']:.4g}")
    assert json.loads(said["mean reward"][1]) == [float(f"{bound:.4g}") for bound in warmup["ci95"]["reward_mean"]]
    assert said["unsafe rate, upper bound"][0] == f"{warmup['unsafe_upper']:.4g}"
    text = card.step_card("warmup", json.loads((run / "manifest.json").read_text()), results)
    assert "before alignment" not in text


def test_the_card_says_how_it_was_trained_sampled_and_is_loaded(run, exported):
    text = (exported / "README.md").read_text()
    rows = {row[0]: row[1:] for row in cells(section(text, "Training"))}
    assert rows["safety"][0].startswith("AdamW(lr=0.001, ")
    assert rows["safety"][1:] == [
        *("constant rate", "4 x 1", "1 epochs, -1 steps (-1: no limit)"),
        *("not recorded", "auto"),
    ]
    scheduled = {"safety": {"model": {"init_args": {"schedule": {"kind": "cosine", "warmup": 0.05}}}}}
    manifest = json.loads((run / "manifest.json").read_text())
    again = section(card.step_card("safety", manifest, None, settings=scheduled), "Training")
    assert "| kind cosine, warmup 0.05 |" in again
    assert "Sampled with samples_per_prompt 2, max_new_tokens 8; others are the defaults" in text
    assert "How many answers were cut at max_new_tokens: the records do not say." in section(text, "Not measured")
    loading = section(text, "Loading")
    assert "Prompts were given as they are in the data" in loading
    found: dict[str, Any] = {}
    exec(loading.split("```python\n")[1].split("```")[0].replace("FOLDER", str(exported)), found)
    assert_computes(found["model"], AutoModelForCausalLM.from_pretrained(run / "safety/model")(IDS).logits[0].detach())
    assert len(found["tokenizer"]) == found["model"].config.vocab_size


def test_the_card_tells_files_of_training_from_those_of_validation_and_those_kept_out(run):
    manifest = json.loads((run / "manifest.json").read_text())
    report = manifest["steps"]["safety"]["data"]
    pairs, prompts = report["sha256"]
    report["sha256"]["/data/held.jsonl"] = "0a1b"
    report["paths"] = [pairs, "/data/held.jsonl"]
    given = {"safety": {"data": {"path": pairs, "validation_path": "/data/held.jsonl"}}}
    text = section(card.step_card("safety", manifest, None, settings=given), "Data")
    assert "| `held.jsonl` | validated on |  |  |  | `0a1b` |" in text
    uses = {row[1]: row[2] for row in cells(text) if row[0] == "safety"}
    assert uses == {
        "`safety.jsonl`": "trained on",
        "`held.jsonl`": "validated on",
        f"`{Path(prompts).name}`": "kept out of training",
    }
    text = section(card.step_card("safety", manifest, None), "Data")  # the report alone cannot tell the two
    assert "| `held.jsonl` | trained or validated on |" in text


def test_no_number_of_the_card_is_of_its_own_making(run, exported):
    """Each number in lineage, data and figures stands in manifest.json or results.json, to four digits."""
    text = (exported / "README.md").read_text()
    records = (run / "manifest.json").read_text() + (run / "results.json").read_text()
    numbers = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])"
    known = {f"{float(found):.4g}" for found in re.findall(numbers, records)}
    labels = {"95", "10", "5", "1", "0.9", "0.95", "0.99", "0"}  # of the labels of figures
    for title in ("Lineage", "Data", "Measured"):
        for found in re.findall(numbers, re.sub(r"`[^`]*`|SHA-256", "", section(text, title))):
            assert f"{float(found):.4g}" in known | labels, (title, found)


def test_the_card_holds_the_lineage_the_data_and_what_is_not_known(run, exported):
    text = (exported / "README.md").read_text()
    manifest = json.loads((run / "manifest.json").read_text())
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"library_name": "transformers", "tags": ["rsa_lightning", "preference-alignment", "safety"]}
    assert "| warmup | warmup | base |  |  |  |  | all weights | 2 |" in text
    assert "| reward | reward | warmup | warmup | DPO | the stage's default | 0.1 | all weights | 2 |" in text
    assert "| safety | safety | reward | reward | RSA | CVaR | 0.025 | LoRA of rank 2 | 2 |" in text
    assert "unrelated" not in text  # a step that it does not go back to
    report = manifest["steps"]["safety"]["data"]
    digest = report["sha256"][report["paths"][0]]
    counts = f"{report['rows']} | {report['train_pairs']} | {report['validation_pairs']}"
    assert f"| safety | `safety.jsonl` | trained on | {counts} | `{digest}` |" in text
    assert "warmup in 1, reward in 1, safety in 1" in text
    assert "a fresh llama made by the run, not pretrained" in text
    assert manifest["versions"]["torch"] in text
    assert "one training run" in section(text, "Not measured")


def test_the_card_names_what_came_from_the_hub_and_what_was_not_measured(run):
    manifest = json.loads((run / "manifest.json").read_text())
    text = card.step_card("safety", manifest, None, base="owner/model", datasets=["owner/pairs"])
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["datasets"]) == ("owner/model", ["owner/pairs"])
    assert "Nothing: this model was not evaluated." in text
    unscored = {"models": [{"name": "safety", "kl_to_start": 0.5, "samples": 8, "reward_mean": None}]}
    text = card.step_card("safety", manifest | {"config": {}}, unscored)
    assert "| KL to start, nats per answer | 0.5 | – |" in text
    assert "mean reward, mean cost, unsafe rate, P(cost > 0) (no scorer was given)." in section(text, "Not measured")
    assert "How it judges held-out pairs." in section(text, "Not measured")


def test_the_adapter_of_a_step_is_exported_with_its_words(run, tmp_path):
    export("--run", run, "--step", "safety", "--output", tmp_path / "adapter", "--adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    assert "lora" in yaml.safe_load((tmp_path / "adapter/README.md").read_text().split("---\n")[1])["tags"]
    AutoTokenizer.from_pretrained(tmp_path / "adapter")


def test_what_a_run_does_not_have_is_said(run, tmp_path, capsys):
    output = ("--output", tmp_path / "model")
    assert "has no such step; finished are: warmup, reward, safety, unrelated" in refused(
        capsys, "--run", run, "--step", "saftey", *output
    )
    assert "trained no adapter: drop --adapter" in refused(
        capsys, "--run", run, "--step", "reward", *output, "--adapter"
    )
    assert "there is no folder" in refused(capsys, "--run", tmp_path / "nowhere", "--step", "safety", *output)
    (tmp_path / "empty").mkdir()
    assert "is no run of rsa align" in refused(capsys, "--run", tmp_path / "empty", "--step", "safety", *output)
    assert "or around it" in refused(capsys, "--run", run, "--step", "safety", "--output", run / "safety/model")
    copy = shutil.copytree(run, tmp_path / "copy")
    weights = copy / "safety/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "are not those that the step wrote" in refused(capsys, "--run", copy, "--step", "safety", *output)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["steps"]["safety"]
    write_json(copy / "manifest.json", manifest)
    assert "has not finished: the same rsa align goes on" in refused(capsys, "--run", copy, "--step", "safety", *output)
    assert not (tmp_path / "model").exists()
