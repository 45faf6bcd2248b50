"""Weighted averages of models and scaled adapters: the numbers, what is written, and what is refused."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rsa_lightning.cli import main
from rsa_lightning.data.tokenize import train_tokenizer
from rsa_lightning.merge import merge_models, scale_adapter
from rsa_lightning.weights import check_weights, shown

IDS = torch.arange(3, 15)[None]


def moved(source: Path, folder: Path, seed: int, dtype=torch.float32) -> Path:
    """A copy of a model with other weights, its tokenizer beside it."""
    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("members")
    return [tiny_llama, moved(tiny_llama, root / "b", 1), moved(tiny_llama, root / "c", 2)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def logits(folder: Path, dtype=torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("weights", [(0.25, 0.75, 0.0), (1.0, 1.0, -1.0), (0.2, 0.3, 0.5)])
def test_every_weight_is_the_float64_average_rounded_once(models, weights, tmp_path):
    merge_models(dict(zip(models, weights, strict=True)), tmp_path / "out")
    parts, found = [tensors(folder) for folder in models], tensors(tmp_path / "out")
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        exact = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True))
        assert value.dtype == torch.float32
        assert (value.double() - exact).abs().max() <= 3 * torch.finfo(torch.float32).eps * 2


def test_the_merged_model_is_used_like_any_other(models, tiny_tokenizer, tmp_path):
    """One weight of one and one of nought is the first model, bit for bit, and the folder is complete."""
    merge_models({models[0]: 0.0, models[1]: 1.0}, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(models[1]))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer.get_vocab()
    record = json.loads((tmp_path / "out/merge.json").read_text())["members"]
    assert [(row["model"], row["weight"]) for row in record] == [(str(models[0]), 0.0), (str(models[1]), 1.0)]
    assert all(len(row["sha256"]["model.safetensors"]) == 64 for row in record)


def test_sums_of_bfloat16_are_rounded_once_and_mixed_dtypes_take_the_wider(models, tmp_path):
    low = [moved(models[0], tmp_path / f"low{i}", i, torch.bfloat16) for i in range(3)]
    weights = (0.3, 0.3, 0.4)
    merge_models(dict(zip(low, weights, strict=True)), tmp_path / "out")
    parts = [tensors(folder) for folder in low]
    for name, value in tensors(tmp_path / "out").items():
        exact = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True))
        assert value.dtype == torch.bfloat16
        # nearest: within half a unit in the last of 8 places; every term rounded would be further away
        half_unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
        assert ((value.double() - exact).abs() <= half_unit * 1.001 + 1e-7).all()
    merge_models({low[0]: 0.5, models[1]: 0.5}, tmp_path / "mixed")
    assert {value.dtype for value in tensors(tmp_path / "mixed").values()} == {torch.float32}
    assert json.loads((tmp_path / "mixed/config.json").read_text())["dtype"] == "float32"


def test_sharded_members_and_sharded_outputs_are_the_same_model(models, tmp_path):
    AutoModelForCausalLM.from_pretrained(models[1]).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(models[1]).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    merge_models({models[0]: 0.5, models[1]: 0.5}, tmp_path / "one")
    merge_models({models[0]: 0.5, tmp_path / "sharded": 0.5}, tmp_path / "many", shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))
    assert tensors(tmp_path / "many").keys() == tensors(tmp_path / "one").keys()


def tied(tiny_tokenizer, folder: Path, seed: int, stored_twice: bool = False) -> Path:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tiny_tokenizer), tie_word_embeddings=True, initializer_range=0.2, **shape)
    )
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    if stored_twice:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_heads_stay_tied(tiny_tokenizer, stored_twice, tmp_path):
    """Also where an older file holds the head a second time."""
    one = tied(tiny_tokenizer, tmp_path / "a", 0)
    two = tied(tiny_tokenizer, tmp_path / "b", 1, stored_twice)
    merge_models({one: 0.5, two: 0.5}, tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    halves = [AutoModelForCausalLM.from_pretrained(folder) for folder in (one, two)]
    with torch.no_grad():
        for mine, other in zip(*(half.parameters() for half in halves), strict=True):
            mine.lerp_(other, 0.5)
        expected = halves[0](input_ids=IDS).logits
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-6)


def test_a_head_that_only_claims_to_be_tied_is_refused(tiny_tokenizer, tmp_path):
    one, two = (tied(tiny_tokenizer, tmp_path / name, seed, True) for seed, name in enumerate("ab"))
    weights = load_file(two / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, two / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{two}/config.json ties lm_head.weight to .*, and its weights differ"):
        merge_models({one: 0.5, two: 0.5}, tmp_path / "out")


def test_negative_weights_are_named(models, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "rsa_lightning"):
        merge_models({models[0]: 1.5, models[1]: -0.5}, tmp_path / "out", names=["reward", "base"])
    assert "1.5 reward - 0.5 base: the weight of base is negative" in caplog.text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"a": 0.5, "b": 0.4},
            r"must sum to 1, got 0.5 a \+ 0.4 b, which sum to 0.9: .*example 0.555556 a \+ 0.444444 b",
        ),
        ({"a": 1.0}, "a combination needs two models or more, got a"),
        ({}, "two models or more, got none"),
        ({"a": float("nan"), "b": 1.0}, "the weight of a must be a finite number, got nan"),
        ({"a": True, "b": 0.0}, "the weight of a must be a finite number, got True"),
        ({"a": 1.0, "b": -1.0}, "which sum to 0: change one of them$"),
    ],
)
def test_weights_sum_to_one(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights)


def test_rounding_of_the_sum_is_forgiven():
    check_weights({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3 + 9e-7})
    assert shown({"a": 1, "b": -0.5, "c": 0.5}) == "1 a - 0.5 b + 0.5 c"


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_words(folder: Path) -> None:
    train_tokenizer(["qua quux quuz corge"] * 9, vocab_size=300).save_pretrained(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


BROKEN = {
    "another architecture": (
        lambda f: change_config(f, rope_parameters={"rope_theta": 5.0, "rope_type": "default"}),
        "{bad} is another architecture than",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda w: w.update({"model.norm.weight": torch.ones(31)})),
        r"{bad} has model.norm.weight as \[31\]",
    ),
    "a missing weight": (
        lambda f: rewrite(f, lambda w: w.pop("model.norm.weight")),
        "{bad} has no weight model.norm.weight",
    ),
    "another vocabulary": (other_words, "{bad} and .* have different vocabularies"),
    "pickled weights": (pickled, "{bad} holds no model.safetensors. Pickled .bin or .pt weights are refused"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "{bad} is an adapter"),
    "no model": (lambda f: (f / "config.json").unlink(), "{bad} is no Hugging Face folder"),
    "damaged weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 20),
        "{bad}/model.safetensors cannot be read",
    ),
    "infinite weights": (
        lambda f: rewrite(f, lambda w: w["model.norm.weight"].fill_(float("inf"))),
        "{bad}: the weight model.norm.weight is not finite",
    ),
    "quantised weights": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "{bad} is quantised",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_members_that_do_not_fit_are_named_and_nothing_is_written(what, models, tmp_path):
    bad = shutil.copytree(models[1], tmp_path / "bad")
    spoil, message = BROKEN[what]
    spoil(bad)
    with pytest.raises((ValueError, FileNotFoundError, FloatingPointError), match=message.format(bad=bad)):
        merge_models({models[0]: 0.5, bad: 0.5}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_result_that_is_too_large_names_the_members(models, tmp_path):
    with pytest.raises(FloatingPointError, match=r"1e\+39 .* - 1e\+39 .* is too large for torch.float32"):
        merge_models({models[0]: 1e39, models[1]: 1 - 1e39, models[2]: 0.0 + 1.0}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_never_eats_a_member_or_something_else(models, tmp_path):
    mine = shutil.copytree(models[1], tmp_path / "mine")
    for output in (mine, tmp_path, mine / "below"):
        with pytest.raises(ValueError, match=f"the output {output} is the member {mine}, or in it, or around it"):
            merge_models({models[0]: 0.5, mine: 0.5}, output)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/note.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no model folder"):
        merge_models({models[0]: 0.5, mine: 0.5}, tmp_path / "notes")
    with pytest.raises(ValueError, match="are the same folder: give each model once"):
        merge_models({mine: 0.5, tmp_path / "notes/../mine": 0.5}, tmp_path / "out")
    merge_models({models[0]: 0.5, mine: 0.5}, tmp_path / "out")
    merge_models({models[0]: 0.5, models[2]: 0.5}, tmp_path / "out")  # a model may be replaced
    assert not (tmp_path / "out.old").exists()


# ------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory) -> tuple[Path, Path]:
    """An adapter made by peft, and the full model with it merged in, in float64."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models[0]), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(root / "adapter")
    model.double().merge_and_unload().save_pretrained(root / "full")
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(root / "full")
    return root / "adapter", root / "full"


@pytest.mark.parametrize("q", [0.3, 1.0, -0.5, 2.0])
def test_a_scaled_adapter_is_the_average_of_the_models(models, adapted, q, tmp_path):
    """On its base, as peft loads it: (1 - q) W + q (W + s B A), against the averaged weights in float64."""
    from peft import PeftModel

    adapter, full = adapted
    scale_adapter(adapter, q, tmp_path / "scaled")
    base = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float64)
    mine = PeftModel.from_pretrained(base, str(tmp_path / "scaled"), autocast_adapter_dtype=False)
    mine = mine.double().merge_and_unload().state_dict()
    before, after = tensors(models[0]), tensors(full)
    for name, value in after.items():
        expected = (1 - q) * before[name].double() + q * value
        assert torch.allclose(mine[name], expected, rtol=0, atol=1e-6), name  # B q is rounded to float32


def test_averaging_the_factors_would_be_another_model(adapted, tmp_path):
    """Half of A and half of B is a quarter of the product: what scaling B alone avoids."""
    scale_adapter(adapted[0], 0.5, tmp_path / "scaled")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapted[0], tmp_path / "scaled"))
    for name, value in after.items():
        assert torch.equal(value, before[name] * (0.5 if "lora_B" in name else 1.0))


@pytest.mark.parametrize(
    ("factor", "output", "message"),
    [
        (float("inf"), "out", "scale must be a finite number, got inf"),
        (0.5, "adapter", "is the adapter itself: choose another"),
        (1e39, "out", r"times 1e\+39 is not finite, so nothing was written"),
    ],
)
def test_adapters_that_cannot_be_scaled(adapted, factor, output, message, tmp_path):
    adapter = shutil.copytree(adapted[0], tmp_path / "adapter")
    with pytest.raises((ValueError, FloatingPointError), match=message):
        scale_adapter(adapter, factor, tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_only_adapters_are_scaled(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{models[0]} is no adapter folder"):
        scale_adapter(models[0], 0.5, tmp_path / "out")


# ------------------------------------------------------------------ the command


def rsa(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


def test_the_command_with_weights_and_with_ratios(models, tmp_path):
    """Ratio q is the weight of the second model."""
    assert rsa("--models", *models, "--weights", 1, 1, -1, "--output", tmp_path / "w") == 0
    merge_models(dict(zip(models, (1.0, 1.0, -1.0), strict=True)), tmp_path / "same")
    assert torch.equal(logits(tmp_path / "w"), logits(tmp_path / "same"))
    assert rsa("--models", *models[:2], "--ratios", "0", "0.25", "1", "--output", tmp_path / "grid") == 0
    assert {path.name for path in (tmp_path / "grid").iterdir()} == {"0", "0.25", "1"}
    assert torch.equal(logits(tmp_path / "grid/0"), logits(models[0]))
    assert torch.equal(logits(tmp_path / "grid/1"), logits(models[1]))
    merge_models({models[0]: 0.75, models[1]: 0.25}, tmp_path / "quarter")
    assert torch.equal(logits(tmp_path / "grid/0.25"), logits(tmp_path / "quarter"))


def test_the_command_scales_adapters_and_makes_the_model(models, adapted, tmp_path):
    adapter, full = adapted
    assert rsa("--adapter", adapter, "--scale", 0.5, "--output", tmp_path / "a") == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge.json",
    }
    assert rsa("--adapter", adapter, "--scale", 0.5, "--base", models[0], "--output", tmp_path / "m") == 0
    before, after = tensors(models[0]), tensors(full)
    for name, value in tensors(tmp_path / "m").items():
        assert torch.allclose(value.double(), (before[name].double() + after[name]) / 2, rtol=0, atol=1e-6)
    record = json.loads((tmp_path / "m/merge.json").read_text())["members"]
    assert (record[0]["model"], record[1]["adapter"], record[1]["scale"]) == (str(models[0]), str(adapter), 0.5)


COMMANDS = {
    "neither": ("", "combines --models, or scales one --adapter"),
    "both": ("--models a b --adapter c", "combines --models, or scales one --adapter"),
    "no weights": ("--models a b", "needs --weights .*, or --ratios"),
    "weights and ratios": ("--models a b --weights 1 0 --ratios 1", "give one of the two"),
    "too few weights": ("--models a b --weights 1", "2 --models and 1 --weights were given"),
    "a word": ("--models a b --weights 1 x", "--weights: 'x' is no number"),
    "no finite number": ("--models a b --ratios nan", "--ratios must be finite, got nan"),
    "a ratio twice": ("--models a b --ratios 0.5 .5", "one of them occurs twice"),
    "a model twice": ("--models a a --weights 1 0", "one occurs twice: add its weights up"),
    "ratios of three": ("--models a b c --ratios 0.5", "--ratios are of the second of two models, got 3"),
    "no scale": ("--adapter a", "--adapter needs --scale"),
    "scale of models": ("--models a b --weights 1 0 --scale 2", "--scale and --base belong to --adapter"),
    "no such folder": ("--models a b --weights 1 0", "a is no Hugging Face folder"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_on_the_command_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = COMMANDS[name]
    assert rsa(*options.split(), "--output", tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_grid_is_checked_before_its_first_model_is_written(models, tmp_path, capsys):
    (tmp_path / "grid/0.75").mkdir(parents=True)
    (tmp_path / "grid/0.75/notes.txt").write_text("mine")
    assert rsa("--models", *models[:2], "--ratios", "0.25", "0.75", "--output", tmp_path / "grid") == 1
    assert "0.75 exists and is no model folder" in capsys.readouterr().err
    assert not (tmp_path / "grid/0.25").exists()
