"""Policies: equal to plain transformers, saved as plain transformers, and refused with one clear sentence."""

import json
import shutil

import pytest
import torch
from rsa_kernels import CVaR
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsa_lightning.data.batch import collate
from rsa_lightning.data.records import PreferencePair
from rsa_lightning.data.tokenize import Lengths, encode_records, pad_id
from rsa_lightning.models import Policy, PolicySpec, ReferenceStates, load_policy
from rsa_lightning.reference import FrozenCopy
from rsa_lightning.saving import save_policy

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": TINY | {"num_key_value_heads": 2},
    "qwen2": TINY | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": TINY,
    "gemma2": TINY | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": TINY | {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": TINY | {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "phi": TINY,  # its head has a bias
    "mistral": TINY | {"num_key_value_heads": 2, "sliding_window": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # positions by ALiBi
}
PAIRS = [
    PreferencePair("How do I keep bread fresh?", " Wrap it in a cloth.", " No answer is better, said the owl."),
    PreferencePair("Who?", " The fox asked the old owl whether the river was safe to cross.", " Assistant"),
]


@pytest.fixture
def batch(tiny_tokenizer):
    return make_batch(tiny_tokenizer)


def make_batch(tokenizer, padding_side="right"):
    examples = encode_records(tokenizer, PAIRS, Lengths(64, 32)).examples
    return collate(examples, roles=("chosen", "rejected"), pad_id=pad_id(tokenizer), padding_side=padding_side)


def fresh_policy(family, tokenizer):
    """Large weights, and none of them zero: fresh biases are, and a zero bias could be dropped unseen."""
    policy = load_policy(PolicySpec(config={"model_type": family, **FAMILIES[family]}, seed=3), tokenizer).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def log_probs_of_transformers(folder, batch):
    """Every row alone, without padding, through the model's own logits."""
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    packed = []
    for row, mask, n in zip(batch["input_ids"], batch["attention_mask"], batch["cu_seqlens"].diff(), strict=True):
        ids = row[mask.bool()][None]
        log_probs = plain(ids).logits.detach().log_softmax(-1)[0, :-1]
        packed.append(log_probs.gather(1, ids[0, 1:, None])[-n:, 0])
    return torch.cat(packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_label_log_probs_are_those_of_transformers(family, tiny_tokenizer, tmp_path, batch):
    policy = fresh_policy(family, tiny_tokenizer)
    save_policy(policy, tiny_tokenizer, tmp_path / "model")
    expected = log_probs_of_transformers(tmp_path / "model", batch)
    torch.testing.assert_close(policy(batch, None, None).logp, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_a_reference_keeps_the_soft_cap_the_scale_and_the_bias_of_its_head(family, tiny_tokenizer, tmp_path, batch):
    """A copy, a folder, or the policy's own head: all are at distance zero, and give the log-probs of transformers."""
    policy = fresh_policy(family, tiny_tokenizer)
    head = policy.head
    assert head.softcap is not None or head.scale != 1 or head.bias.abs().max() > 0.1
    save_policy(policy, tiny_tokenizer, tmp_path / "model")
    expected = log_probs_of_transformers(tmp_path / "model", batch)
    copied, loaded = FrozenCopy(), FrozenCopy(str(tmp_path / "model"))
    for reference in (copied, loaded):
        reference.prepare(policy)
    own = ReferenceStates(policy.states(batch).detach(), weight=None)
    for states in (copied.states(batch), loaded.states(batch), own):
        stats = policy(batch, states, CVaR(0.3))
        assert stats.logratio.abs().max() < 1e-6
        assert stats.risk.abs().max() < 1e-5
        torch.testing.assert_close(stats.ref_logp, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_policy_and_reference_each_read_their_own_head(family, tiny_tokenizer, tmp_path, batch):
    """A plain Llama near each of the others as reference, and the other way round."""
    plain, other = fresh_policy("llama", tiny_tokenizer), fresh_policy(family, tiny_tokenizer)
    expected = []
    for policy in (plain, other):
        save_policy(policy, tiny_tokenizer, tmp_path / "model")
        expected.append(log_probs_of_transformers(tmp_path / "model", batch))
    assert (expected[0] - expected[1]).abs().max() > 1
    for policy, frozen, logp, ref_logp in ((plain, other, *expected), (other, plain, *reversed(expected))):
        reference = FrozenCopy()
        reference.prepare(frozen)
        stats = policy(batch, reference.states(batch), CVaR(0.3))
        torch.testing.assert_close(stats.logp, logp, rtol=0, atol=2e-5)
        torch.testing.assert_close(stats.ref_logp, ref_logp, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_needs_no_mask(family, tiny_tokenizer, batch, monkeypatch):
    """Every state is what it is with the mask, to rounding; padding on the left is said to the model."""
    policy = fresh_policy(family, tiny_tokenizer)
    assert (batch["attention_mask"] == 0).any()
    plain, given = type(policy.model.base_model).forward, []

    def forward(model, **kwargs):
        given.append(set(kwargs))
        return plain(model, **kwargs)

    monkeypatch.setattr(type(policy.model.base_model), "forward", forward)
    found = policy.states(batch)
    policy.states(make_batch(tiny_tokenizer, "left"))
    assert ["attention_mask" in names for names in given] == [False, True]
    told = policy.model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(found, told.flatten(0, 1)[batch["positions"]], rtol=0, atol=1e-5)


def test_padding_side_changes_no_statistic(tiny_llama, tiny_tokenizer):
    policy, other = load_policy(PolicySpec(model=str(tiny_llama))), load_policy(PolicySpec(model=str(tiny_llama)))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    reference = FrozenCopy()
    reference.prepare(other)
    stats = []
    for side in ("right", "left"):
        batch = make_batch(tiny_tokenizer, side)
        stats.append(policy(batch, reference.states(batch), CVaR(0.5)))
    for right, left in zip(stats[0][:4], stats[1][:4], strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-4)
    assert stats[0].risk.min() > 0


def test_a_saved_policy_is_a_plain_transformers_folder(tiny_llama, tiny_tokenizer, tmp_path):
    policy = load_policy(PolicySpec(model=str(tiny_llama)))
    save_policy(policy, tiny_tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not (tmp_path / "out.partial").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, before), after in zip(policy.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == tiny_tokenizer.eos_token


def test_tied_embeddings_stay_tied(tiny_tokenizer):
    policy = load_policy(PolicySpec(config={"model_type": "qwen2", **FAMILIES["qwen2"]}), tiny_tokenizer)
    assert policy.head.weight is policy.model.get_input_embeddings().weight


def test_fresh_weights_depend_on_the_seed_only(tiny_tokenizer):
    def draw(seed, before):
        torch.manual_seed(before)
        spec = PolicySpec(config={"model_type": "llama", **FAMILIES["llama"]}, seed=seed)
        return load_policy(spec, tiny_tokenizer).head.weight

    assert torch.equal(draw(1, before=10), draw(1, before=20))
    assert not torch.equal(draw(1, before=10), draw(2, before=10))


def test_an_architecture_with_other_logits_is_refused(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    forward = model.forward
    model.forward = lambda **inputs: (lambda out: out.__setitem__("logits", out.logits * 1.1) or out)(forward(**inputs))
    with pytest.raises(ValueError, match="does more to its logits than a linear head, a scale and a soft-cap"):
        Policy(model)


def test_missing_folder_and_missing_weights_are_named(tmp_path, tiny_llama):
    with pytest.raises(FileNotFoundError, match="there is no folder ./nowhere/model"):
        load_policy(PolicySpec(model="./nowhere/model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a Hugging Face folder: it has no config.json"):
        load_policy(PolicySpec(model=str(tmp_path / "empty")))
    shutil.copytree(tiny_llama, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"holds no \*.safetensors weights. Pickled .bin or .pt weights are refused"
    ):
        load_policy(PolicySpec(model=str(tmp_path / "pickled")))


def test_damaged_and_incomplete_weights_are_refused(tmp_path, tiny_llama):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no causal language model can be read from"):
        load_policy(PolicySpec(model=str(tmp_path / "cut")))
    shutil.copytree(tiny_llama, tmp_path / "headless")
    weights = tmp_path / "headless/model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"headless lacks .*weights \(.*first: lm_head.weight\)"):
        load_policy(PolicySpec(model=str(tmp_path / "headless")))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tiny_llama, tiny_tokenizer):
    shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(
        ValueError, match=r"vocabulary mismatch: the tokenizer has \d+ ids, the model's embeddings only"
    ):
        load_policy(PolicySpec(model=str(tmp_path / "model")), tokenizer)


def test_a_policy_needs_a_model_or_a_configuration(tiny_llama):
    with pytest.raises(ValueError, match="give `model`"):
        PolicySpec()
    with pytest.raises(ValueError, match=r"policy.config needs `model_type`"):
        PolicySpec(config={"hidden_size": 3})
    both = PolicySpec(model=str(tiny_llama), config={"model_type": "llama", "hidden_size": 8})
    assert load_policy(both).head.in_features == 32  # the configuration is for where there is no model


def test_configuration_fields_are_checked(tiny_tokenizer):
    with pytest.raises(ValueError, match="fields that llama does not know: hiden_size"):
        load_policy(PolicySpec(config={"model_type": "llama", "hiden_size": 32}), tiny_tokenizer)
    with pytest.raises(ValueError, match=r"model_type 'llamma' is not known to transformers: is it llama( or \w+)*\?$"):
        load_policy(PolicySpec(config={"model_type": "llamma"}), tiny_tokenizer)


def test_generation_settings_name_the_end_token(tiny_tokenizer, tmp_path):
    policy = load_policy(PolicySpec(config={"model_type": "llama", **FAMILIES["llama"]}), tiny_tokenizer)
    save_policy(policy, tiny_tokenizer, tmp_path / "model")
    assert (
        json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"]
        == tiny_tokenizer.eos_token_id
    )


def test_a_folder_that_is_no_model_is_not_replaced(tiny_llama, tiny_tokenizer, tmp_path):
    """An earlier model is replaced, whole; somebody's folder is not."""
    policy = load_policy(PolicySpec(model=str(tiny_llama)))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis exists and is no model folder"):
        save_policy(policy, tiny_tokenizer, tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "mine"
    for _ in range(2):
        save_policy(policy, tiny_tokenizer, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis"]


def test_weights_that_are_not_finite_are_neither_saved_nor_taken(tiny_llama, tiny_tokenizer, tmp_path):
    policy = load_policy(PolicySpec(model=str(tiny_llama)))
    with torch.no_grad():
        policy.head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="is not finite, so nothing was saved"):
        save_policy(policy, tiny_tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    policy.model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ValueError, match="logits that are not finite: its training diverged"):
        load_policy(PolicySpec(model=str(tmp_path / "diverged")))


def test_weights_that_no_layer_takes_are_announced(tiny_llama, tmp_path, caplog):
    shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    load_policy(PolicySpec(model=str(tmp_path / "model")))
    assert "has weights that no layer of its config.json takes" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            r"policy.config: no causal llama can be made of it .*hidden size \(30\) is not a multiple of .* heads \(4\)",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: a model has at least 1 layer"),
        ({"model_type": "t5"}, "policy.config: no causal t5 can be made of it"),
    ],
)
def test_impossible_configurations_are_one_sentence(change, message, tiny_tokenizer):
    config = {"model_type": "llama"} | ({} if "model_type" in change else FAMILIES["llama"]) | change
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(PolicySpec(config=config), tiny_tokenizer)
    assert "\n" not in str(caught.value)


def test_a_folder_whose_configuration_is_impossible_is_one_sentence(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 3}))
    with pytest.raises(
        ValueError, match=r"no causal language model can be read from .*attention heads \(3\)"
    ) as caught:
        load_policy(PolicySpec(model=str(tmp_path / "model")))
    assert "\n" not in str(caught.value)


def test_a_fresh_model_has_no_revision():
    with pytest.raises(ValueError, match="belong to `model`: a fresh one has neither"):
        PolicySpec(config={"model_type": "llama"}, revision="abc")


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder runs/rewrad"):
        load_policy(PolicySpec(model="runs/rewrad"))
