"""`rsa export` destroys nothing that is not its own, and what it refuses it names with the mend."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from test_export import RUN, export, refused
from transformers import AutoModelForCausalLM

from rsa_lightning.card import step_card
from rsa_lightning.checkpoint import folder_hashes
from rsa_lightning.pipeline import align


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    steps = {name: RUN["steps"][name] for name in ("warmup", "reward", "safety")}
    align({**RUN, "steps": steps, "output": str(folder)}, Console(file=io.StringIO()))
    return folder


def checkpoint_of(run: Path, step: str) -> Path:
    (checkpoint,) = (run / step / "checkpoints").iterdir()
    return checkpoint


# ---------------------------------------------------------------------- what stands at the output


def test_a_folder_with_anything_but_an_export_is_left_as_it_is(run, tmp_path, capsys):
    arguments = ("--run", run, "--step", "safety", "--output")
    mine = tmp_path / "mine"
    (mine / "src").mkdir(parents=True)
    for name in ("config.json", "optimizer.pt", "src/code.py"):
        (mine / name).write_text("{}")
    downloaded = shutil.copytree(run / "reward/model", tmp_path / "downloaded")
    before = folder_hashes(tmp_path)
    told = refused(capsys, *arguments, mine)
    assert "mine holds more than a model (optimizer.pt, src), which would be lost" in told
    assert "holds a model that rsa export did not write" in refused(capsys, *arguments, downloaded)
    assert folder_hashes(tmp_path) == before
    export(*arguments, tmp_path / "model")
    export("--run", run, "--step", "warmup", "--output", tmp_path / "model")  # an earlier export may go
    (tmp_path / "model/notes.txt").write_text("mine")
    assert "holds more than a model (notes.txt)" in refused(capsys, *arguments, tmp_path / "model")


def test_no_run_is_written_into(run, tmp_path, capsys):
    other, before = shutil.copytree(run, tmp_path / "other"), folder_hashes(run)
    checkpoint, config = checkpoint_of(run, "warmup"), run / "warmup/config.yaml"
    for place in (run / "reward/model", run / "exported", other / "reward/model", other):
        for arguments in (("--run", run, "--step", "warmup"), ("--checkpoint", checkpoint, "-c", config)):
            assert "whose files are its own" in refused(capsys, *arguments, "--output", place)
    assert folder_hashes(run) == folder_hashes(other) == before
    # a run is not every folder that holds a file of this name
    (tmp_path / "page").mkdir()
    (tmp_path / "page/manifest.json").write_text(json.dumps({"name": "a web page"}))
    export("--run", run, "--step", "warmup", "--output", tmp_path / "page/model")


def test_what_stands_beside_the_output_stays(run, tmp_path):
    for name in ("model", "model.old", "model.partial"):
        export("--run", run, "--step", "warmup", "--output", tmp_path / name)
    before = folder_hashes(tmp_path)
    export("--run", run, "--step", "warmup", "--output", tmp_path / "model")
    assert folder_hashes(tmp_path) == before
    (tmp_path / "link").symlink_to(tmp_path / "model")
    export("--run", run, "--step", "safety", "--output", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()  # what it points to was replaced
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.old", "model.partial", "link"}


# ---------------------------------------------------------------------- what a checkpoint says of itself


def test_a_checkpoint_is_not_exported_as_what_another_configuration_says(run, tmp_path, capsys):
    """The three stages have weights of the same shapes; the losses of two differ in their temperature alone."""
    output = ("--output", tmp_path / "model")
    warmup, reward = (checkpoint_of(run, step) for step in ("warmup", "reward"))
    told = refused(capsys, "--checkpoint", reward, "-c", run / "warmup/config.yaml", *output)
    assert "is of another configuration (stage RewardAlignment, here SupervisedWarmup; loss DPO(" in told
    told = refused(capsys, "--checkpoint", warmup, "-c", run / "reward/config.yaml", *output)
    assert "(stage SupervisedWarmup, here RewardAlignment; loss None, here DPO(" in told
    told = refused(
        capsys, "--checkpoint", reward, "-c", run / "reward/config.yaml", *output, "--model.init_args.beta", 0.2
    )
    assert "temperature 0.1, here 0.2)" in told
    lora = ("-c", run / "safety/config.yaml", *output, "--model.init_args.policy.lora.alpha", 64)
    told = refused(capsys, "--checkpoint", checkpoint_of(run, "safety"), *lora)  # no weight has another shape
    assert "(lora {'rank': 2, 'alpha': None" in told
    assert "give -c the config.yaml it was trained with" in told
    assert not (tmp_path / "model").exists()


def test_the_card_of_a_checkpoint_has_what_the_checkpoint_says(run, tmp_path):
    config = run / "safety/config.yaml"
    export("--checkpoint", checkpoint_of(run, "safety"), "-c", config, "--output", tmp_path / "new")
    text = (tmp_path / "new/README.md").read_text()
    assert "# SafetyAlignment" in text
    assert "| trained | LoRA of rank 2 |" in text
    assert "| temperature | 0.025 |" in text  # beta 0.1 over lam 4
    assert "| starts from | reward/model |" in text
    assert str(run) not in text  # of this machine alone
    for unknown in ("named above", "named here", "scorer", "rsa fit"):
        assert unknown not in text
    state = torch.load(checkpoint_of(run, "reward"), weights_only=True)
    del state["trained_as"]  # as an earlier version wrote it
    torch.save(state, tmp_path / "old.ckpt")
    export("--checkpoint", tmp_path / "old.ckpt", "-c", run / "reward/config.yaml", "--output", tmp_path / "old")
    text = (tmp_path / "old/README.md").read_text()
    for key in ("stage", "starts from", "trained", "loss", "risk", "temperature"):
        assert f"| {key} | not recorded |" in text


def test_a_part_of_a_checkpoint_or_the_folder_around_it_leads_to_the_whole(run, tmp_path, capsys):
    rest = ("-c", run / "warmup/config.yaml", "--output", tmp_path / "model")
    checkpoint = checkpoint_of(run, "warmup")
    told = refused(capsys, "--checkpoint", checkpoint.parent, *rest)
    assert f"Give one of those in it: {checkpoint.name}" in told
    shards = tmp_path / "checkpoints/step=1.ckpt"
    shards.mkdir(parents=True)
    (shards / "__0_0.distcp").write_bytes(b"weights")
    state = torch.load(checkpoint, weights_only=True)
    del state["state_dict"]
    torch.save(state, shards / "meta.pt")
    torch.save(state, tmp_path / "cut.ckpt")
    for part in shards.iterdir():
        told = refused(capsys, "--checkpoint", part, *rest)
        assert f"{part} is a part of a checkpoint in shards: give its folder, {shards}" in told
    assert "Give one of those in it: step=1.ckpt" in refused(capsys, "--checkpoint", shards.parent, *rest)
    assert "it has no state_dict" in refused(capsys, "--checkpoint", tmp_path / "cut.ckpt", *rest)


# ---------------------------------------------------------------------- what was meant


def test_each_refusal_names_the_option_that_is_wrong(run, tmp_path, capsys):
    output = ("--output", tmp_path / "model")
    told = refused(capsys, "--run", run / "safety", "--step", "safety", *output)
    assert f"--run {run / 'safety'} is no run of rsa align: it lies in one, --run {run}" in told
    told = refused(capsys, "--run", run, *output)
    assert f"--run needs --step NAME; finished steps of {run}: warmup, reward, safety" in told
    told = refused(capsys, "--run", run, "--step", "safety", *output, "-c", "x.yaml")
    assert "--run takes no configuration, and no other keys: drop ['x.yaml']" in told
    checkpoint = ("--checkpoint", checkpoint_of(run, "safety"), *output)
    (tmp_path / "align.yaml").write_text(json.dumps(RUN))
    told = refused(capsys, *checkpoint, "-c", tmp_path / "align.yaml")
    assert "-c is a file of rsa align: give the config.yaml of the step, RUN/STEP/config.yaml" in told
    (tmp_path / "half.yaml").write_text("data: {}")
    assert "-c names no stage (model.class_path)" in refused(capsys, *checkpoint, "-c", tmp_path / "half.yaml")


def test_what_was_taken_away_from_a_run_is_said_as_it_is(run, tmp_path, capsys):
    copy, output = shutil.copytree(run, tmp_path / "copy"), ("--output", tmp_path / "model")
    shutil.rmtree(copy / "safety/adapter")
    told = refused(capsys, "--run", copy, "--step", "safety", *output, "--adapter")
    assert f"the adapter that the step wrote is gone from {copy / 'safety/adapter'}: run rsa align again" in told
    shutil.rmtree(copy / "reward/model")
    assert "the model that the step wrote is gone" in refused(capsys, "--run", copy, "--step", "reward", *output)
    (copy / "manifest.json").write_text((run / "manifest.json").read_text()[:100])
    told = refused(capsys, "--run", copy, "--step", "safety", *output)
    assert "its manifest.json cannot be read" in told
    assert "stand in the folders model of: safety, warmup" in told
    assert "remove" not in told


def test_data_that_lies_elsewhere_now_is_asked_for(run, tmp_path, capsys):
    arguments = ("--checkpoint", checkpoint_of(run, "warmup"), "-c", run / "warmup/config.yaml")
    arguments += ("--output", tmp_path / "model")
    told = refused(capsys, *arguments, "--data.path", tmp_path / "gone.jsonl")
    assert "gone.jsonl" in told
    assert "for its tokenizer and template: if it lies elsewhere now, give --data.path" in told
    moved = shutil.copy(run / "inputs/demonstrations.jsonl", tmp_path / "moved.jsonl")
    export(*arguments, "--data.path", moved)


# ---------------------------------------------------------------------- cards of adapters


def test_the_card_of_an_adapter_names_the_model_it_lies_on(run, tmp_path):
    export("--run", run, "--step", "safety", "--output", tmp_path / "adapter", "--adapter")
    text = (tmp_path / "adapter/README.md").read_text()
    weights = folder_hashes(run / "reward/model")["model.safetensors"]
    told = f"the model of the step `reward` of this run (`model.safetensors` with SHA-256 `{weights}`)"
    assert f"Base of the adapter: {told}" in text
    assert "Base model:" not in text
    assert "The run began with: a fresh llama made by the run, not pretrained." in text
    assert "## Measured\n\nOf the base of the adapter with the adapter on it. " in text
    assert str(run) not in text


def test_a_base_from_the_hub_is_that_of_an_adapter_which_lies_on_it_alone(run):
    manifest = json.loads((run / "manifest.json").read_text())
    text = step_card("safety", manifest, None, adapter=True, base="owner/model", below=str(run / "reward/model"))
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    manifest["steps"]["safety"]["start"] = "base"
    text = step_card("safety", manifest, None, adapter=True, base="owner/model", below="/cache/snapshots/0a1b")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/model"
    assert "Base of the adapter: `owner/model`." in text
    assert "this model was not evaluated." in text
