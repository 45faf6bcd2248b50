"""`rsa align` with adapters: both handovers, what is reused, every family, and what is refused before it starts."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rsa_lightning.cli import main
from rsa_lightning.data.batch import collate
from rsa_lightning.data.records import PreferencePair
from rsa_lightning.data.tokenize import Lengths, encode_records
from rsa_lightning.models import PolicySpec, ReferenceStates, load_policy

pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 256, "initializer_range": 0.1}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
}
LAYER = """
trainer: {max_steps: 3, limit_val_batches: 1, log_every_n_steps: 1}
data: {options: {batch_size: 4, max_length: 96, max_prompt_length: 64, tokenizer_vocab_size: 300}}
evaluation: {prompts: 2, pairs: 4, resamples: 10, figures: false, sampling: {samples_per_prompt: 1, max_new_tokens: 4}}
steps:
  warmup: {trainer: {max_epochs: 1}}
  reward: {optimizer: {init_args: {lr: 1.0e-2}}}
  safety: {optimizer: {init_args: {lr: 1.0e-2}}}
"""
NO_WARMUP = ["--model.config", "null", "--steps.warmup", "null"]


def pku_row(i: int) -> dict:
    """The more helpful response is the unsafe one in two rows of three."""
    clash = i % 3 > 0
    return {
        "prompt": f"May I do {i}?",
        "response_0": f"Help yourself to {i}.",
        "response_1": f"Better not, said owl {i}.",
        "is_response_0_safe": not clash,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1 if clash else 0,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "pku.jsonl").write_text("".join(json.dumps(pku_row(i)) + "\n" for i in range(40)))
    (folder / "small.yaml").write_text(LAYER)
    return folder


@pytest.fixture
def align(files):
    """Runs `rsa align` on the PKU rows; the exit status."""
    return lambda output, *options: run(files, output, *options)


def run(files: Path, output: Path, *options: str) -> int:
    layers = ["-c", ROOT / "configs/pku.yaml", "-c", files / "small.yaml"]
    return main(["align", *map(str, [*layers, "--data.path", files / "pku.jsonl", "--output", output]), *options])


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """handover -> a finished run of rank 4. Tests that change one work on a copy."""
    folder = tmp_path_factory.mktemp("runs")
    for handover in ("merge", "stack"):
        assert run(files, folder / handover, "--lora.rank", "4", "--handover", handover) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    def make(handover: str) -> Path:
        shutil.copytree(finished / handover, tmp_path / handover)
        return tmp_path / handover

    return make


def logps(folder: Path, reference: Path | None = None) -> torch.Tensor:
    """log q of response tokens, or the log-ratios to a reference, computed from the folders alone."""
    policy = load_policy(PolicySpec(model=str(folder))).eval()
    pairs = [PreferencePair("May I do 7?", " Help yourself to 7.", " Better not.")]
    batch = collate(encode_records(AutoTokenizer.from_pretrained(folder), pairs, Lengths(96, 64)).examples)
    states = None
    if reference is not None:
        other = load_policy(PolicySpec(model=str(reference))).eval()
        states = ReferenceStates(other.states(batch), other.head.weight)
    with torch.no_grad():
        tokens = policy(batch, states, None)
    return tokens.logp if reference is None else tokens.logratio


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def first_loss(step: Path) -> float:
    header, *rows = (line.split(",") for line in (step / "metrics.csv").read_text().splitlines())
    column = header.index("train/loss")
    return next(float(row[column]) for row in rows if row[column])


def test_merged_and_stacked_runs_are_the_same_up_to_rounding(finished):
    for step in ("warmup", "reward"):
        one, other = weights(finished / "merge" / step), weights(finished / "stack" / step)
        assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = weights(finished / "merge/safety"), weights(finished / "stack/safety")
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4
    moved = logps(finished / "merge/safety/model", finished / "merge/reward/model").abs().max().item()
    assert moved > 1e-2  # nats: the step did something
    assert torch.allclose(logps(finished / "merge/safety/model"), logps(finished / "stack/safety/model"), atol=1e-3)


@pytest.mark.parametrize("handover", ["merge", "stack"])
def test_the_second_step_starts_as_the_reward_aligned_model(handover, finished):
    """At its first update the loss is log 2 and the log-ratio to the folder of the step before is nothing."""
    assert first_loss(finished / handover / "safety") == pytest.approx(0.6931, abs=1e-3)
    reward = AutoModelForCausalLM.from_pretrained(finished / handover / "reward/model").eval()
    base, adapter = finished / handover / "warmup/model", finished / handover / "reward/adapter"
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = torch.arange(20)[None]
    assert torch.allclose(model(ids).logits, reward(ids).logits, atol=1e-4)
    assert logps(finished / handover / "reward/model", base).abs().max() > 1e-2  # nats away from "adapter off"


@pytest.mark.parametrize("handover", ["merge", "stack"])
@pytest.mark.parametrize("step", ["reward", "safety"])
def test_an_adapter_names_the_model_that_it_lies_on(handover, step, finished):
    """So that plain peft, which reads that name, gives the step's model; of a stack, too."""
    from peft import PeftModel

    folder = finished / handover / step
    base = json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter").eval()
    ids = torch.arange(20)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder / "model").eval()(ids).logits
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    assert base == str(finished / handover / ("warmup" if step == "reward" else "reward") / "model")


def test_another_place_for_the_logs_alone_does_not_overwrite_the_models_of_a_run(copy, finished, tmp_path, capsys):
    step = copy("merge") / "reward"
    (step / "config.yaml").write_text(
        (step / "config.yaml").read_text().replace(str(finished / "merge"), str(step.parent))
    )
    before = (step / "model/model.safetensors").read_bytes()
    words = ["--trainer.max_steps", "1", "--trainer.logger.init_args.save_dir", str(tmp_path / "other")]
    assert main(["fit", "-c", str(step / "config.yaml"), *words]) == 1
    assert "give the folder of ModelExport (and the dirpath of ModelCheckpoint) a new place" in capsys.readouterr().err
    assert (step / "model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("handover", ["merge", "stack"])
def test_an_unchanged_run_is_reused_and_a_step_runs_alone(handover, copy, align, capsys, finished):
    """rsa fit of a step's own config.yaml writes the same files, the adapter's settings included."""
    run_folder = copy(handover)
    step = run_folder / "safety"
    files = ["model/model.safetensors", "adapter/adapter_model.safetensors"]
    before = {name: (step / name).read_bytes() for name in files}
    text = (step / "config.yaml").read_text()
    (step / "config.yaml").write_text(text.replace(str(finished / handover), str(run_folder)))
    shutil.rmtree(step / "model")
    assert main(["fit", "-c", str(step / "config.yaml")]) == 0
    assert {name: (step / name).read_bytes() for name in files} == before
    config = json.loads((step / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])  # not as the hash seed of a process has them
    shutil.rmtree(step)
    shutil.copytree(finished / handover / "safety", step)
    capsys.readouterr()
    assert align(run_folder, "--lora.rank", "4", "--handover", handover) == 0
    assert capsys.readouterr().out.count("reused") == 3


def test_another_handover_reruns_the_step_it_hands_over_to_and_another_rank_both(copy, align, capsys):
    folder = copy("merge")
    assert align(folder, "--lora.rank", "4", "--handover", "stack") == 0
    out = capsys.readouterr().out
    assert out.count("reused") == 2
    assert "safety: runs again, changed: adapter.handover, adapter.weights" in out
    assert align(folder, "--lora.rank", "2", "--handover", "stack") == 0
    out = capsys.readouterr().out
    assert "reward: runs again, changed: adapter.rank;" in out
    assert "safety: runs again, changed: adapter.rank, adapter.weights, lineage;" in out


@pytest.mark.parametrize("damage", ["changed", "deleted"])
def test_an_adapter_that_is_not_as_it_was_written_is_trained_again(damage, copy, align, capsys):
    """A stack reads it, and the step that wrote it would otherwise be reused."""
    folder = copy("stack")
    path = folder / "reward/adapter/adapter_model.safetensors"
    before = path.read_bytes()
    if damage == "changed":
        path.write_bytes(before[:-4] + b"\x00\x00\x80\x3f")
    else:
        shutil.rmtree(path.parent)
    assert align(folder, "--lora.rank", "4", "--handover", "stack", "--steps.safety.loss", "DPO") == 0
    out = capsys.readouterr().out
    assert "reward: runs again, the files of its adapter are not those it wrote" in out
    assert path.read_bytes() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_both_steps_run_on_any_family_and_evaluate_the_merged_model(family, align, tiny_tokenizer, tmp_path):
    model = make_model(family, tiny_tokenizer, tmp_path / "model")
    options = ["--lora.rank", "2", "--lora.dropout", "0.1", "--trainer.max_steps", "1"]
    assert align(tmp_path / "run", "--model.model", str(model), *NO_WARMUP, *options) == 0
    base, last = load_file(model / "model.safetensors"), weights(tmp_path / "run/safety")
    moved = {name for name in base if not torch.equal(base[name], last[name])}
    assert moved == {name for name in base if re.search(r"(proj|dense|dense_.*|query_key_value)\.weight$", name)}
    found = json.loads((tmp_path / "run/results.json").read_text())["models"][-1]
    assert found["kl_to_start"] != 0  # relative to the model given, of answers of the merged one


def make_model(family: str, tokenizer, folder: Path) -> Path:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **SHAPE, **FAMILIES[family], **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_name_of_the_hub_becomes_the_folder_of_its_snapshot(align, tiny_tokenizer, tmp_path, monkeypatch):
    model, asked = make_model("llama", tiny_tokenizer, tmp_path / "snapshot"), []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **o: asked.append((name, o)) or str(model))
    options = ["--model.model", "owner/name", "--model.revision", "c" * 40, "--steps.safety", "null"]
    assert align(tmp_path / "run", *NO_WARMUP, *options, "--lora.rank", "2") == 0
    [(name, options)] = asked
    assert (name, options["revision"]) == ("owner/name", "c" * 40)
    config = json.loads((tmp_path / "run/reward/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)


def test_ratings_of_the_same_file_train_a_step_on_kto(align, tmp_path):
    """The safety step reads both responses of a row as rated ones; the steps before read its pairs."""
    options = ["--steps.safety.loss", "KTO", "--steps.safety.data", "{source: safety, format: pku_labels}"]
    assert align(tmp_path / "run", "--lora.rank", "2", *options) == 0
    steps = json.loads((tmp_path / "run/manifest.json").read_text())["steps"]
    assert steps["safety"]["data"]["train_pairs"] == 2 * steps["reward"]["data"]["train_pairs"]


MISTAKES = {
    "head": (["--lora.target_modules", "lm_head"], "steps.reward: lora.target_modules puts an adapter on lm_head"),
    "embeddings": (["--lora.target_modules", "[embed_tokens]"], "puts an adapter on model.embed_tokens"),
    "unknown": (["--lora.target_modules", "[q_prj]"], "(q_prj) does not fit LlamaForCausalLM: .* k_proj, o_proj"),
    "pattern": (["--lora.target_modules", "("], "lora.target_modules (() does not fit LlamaForCausalLM"),
    "rank": (["--lora.rank", "0"], "steps.reward: lora.rank must be at least 1, got 0"),
    "true": (["--lora", "true"], "lora must be a mapping, got True"),
    "no layers": (["--lora.rank", "2", "--model.config.num_hidden_layers", "0"], "0: a model has at least 1 layer"),
    "8bit": (["--lora.rank", "2", "--quantize", "8bit"], "steps.reward: quantize .*(bitsandbytes|GPU)"),
    "quantize alone": (["--quantize", "4bit"], "quantize: 4bit is about adapters, and no step trains one: set lora"),
    "stack alone": (["--handover", "stack"], "handover: stack is about adapters, and no step trains one: set lora"),
    "precision": (["--lora.rank", "2", "--trainer.precision", "bf16-true"], "trainer.precision bf16-true would cast"),
    "templates": (
        ["--steps.safety.data", "{source: safety, template: chatml}"],
        "template: the steps render prompts differently (beaver, chatml)",
    ),
    "no folder": (["--model.model", "gpt2", *NO_WARMUP], "model.model: there is no folder gpt2, and names of the hub"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_trained(name, align, tmp_path, capsys):
    options, expected = MISTAKES[name]
    assert align(tmp_path / "run", *options) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rsa: error: ")]
    assert re.search(as_pattern(expected), line)
    assert not (tmp_path / "run/warmup").exists()
    assert name == "templates" or not (tmp_path / "run").exists()


def as_pattern(expected: str) -> str:
    """Text with `.*` for anything and (a|b) for either."""
    return re.escape(expected).replace(r"\.\*", ".*").replace(r"\(bitsandbytes\|GPU\)", "(bitsandbytes|GPU)")


@pytest.mark.parametrize(("package", "options"), [("peft", []), ("bitsandbytes", ["--quantize", "4bit"])])
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    package, options, align, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    assert align(tmp_path / "run", "--lora.rank", "2", *options) == 1
    assert re.search(rf"rsa: error: steps.reward: .* needs {package}: pip install", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_continuing_the_first_adapter_with_it_off_as_reference_is_refused(finished, align, tmp_path, capsys):
    adapter = str(finished / "merge/reward/adapter")
    assert align(tmp_path / "run", "--steps.safety.lora", f"{{start: {adapter}}}") == 1
    err = capsys.readouterr().err
    assert f"rsa: error: steps.safety: policy.lora.start continues the adapter {adapter}, and with that" in err
    assert "not the reward-aligned one" in err
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(finished, align, tmp_path, capsys):
    adapter = str(finished / "merge/reward/adapter")
    options = ["--steps.reward.lora", f"{{start: {adapter}}}", "--steps.reward.reference", "base"]
    assert align(tmp_path / "run", *options, "--steps.safety", "null", "--model.config.hidden_size", "64") == 1
    assert "is an adapter of another model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("adapter", [[], ["--model.policy.lora.rank", "2"]])
def test_a_run_resumed_within_an_epoch_makes_the_same_model(adapter, tiny_llama, tmp_path):
    """With a schedule, which asks for the number of steps, and so for the batches, before a checkpoint is read."""
    rows = [
        {"prompt": f"May I {i}?", "chosen": f" Better not {i}.", "rejected": f" Yes, owl {i * 7}."} for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save = {"dirpath": str(tmp_path / "ck"), "filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1}
    callbacks = [{"class_path": "ModelExport"}, {"class_path": "ModelCheckpoint", "init_args": save}]

    def fit(name: str, *options: str) -> bytes:
        words = ["fit", "-c", ROOT / "configs/reward.yaml", "--data.path", tmp_path / "pairs.jsonl"]
        words += ["--model.policy.model", tiny_llama, *adapter, "--data.max_length", "64", "--data.batch_size", "4"]
        words += ["--trainer.max_steps", "4", "--trainer.limit_val_batches", "0", "--trainer.callbacks"]
        words += [json.dumps(callbacks), "--trainer.logger.init_args.save_dir", tmp_path / name, *options]
        assert main([str(word) for word in words]) == 0
        return (tmp_path / name / "reward/version_0/model/model.safetensors").read_bytes()

    whole = fit("whole")
    assert fit("resumed", "--ckpt_path", str(tmp_path / "ck/step=2.ckpt")) == whole


def test_false_switches_adapters_off(align, tmp_path):
    """A layer with adapters below, and the switch above it."""
    assert align(tmp_path / "run", "--lora.rank", "2", "--lora", "false", "--trainer.max_steps", "1") == 0
    assert not list((tmp_path / "run").glob("*/adapter"))
