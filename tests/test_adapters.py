"""Adapters: one trained on a frozen model, its reference the same model without it, in both steps."""

import copy
import json
import math
import shutil
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rsa_kernels import CVaR, linear
from rsa_kernels.workspace import plan
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rsa_lightning import adapters, policy_stage
from rsa_lightning.adapters import TRAINABLE, Lora, adapter_off, base_fingerprint
from rsa_lightning.callbacks import ModelExport
from rsa_lightning.data.batch import ROLES, collate
from rsa_lightning.data.records import PreferencePair
from rsa_lightning.data.tokenize import Lengths, encode_records, pad_id
from rsa_lightning.losses import RSA
from rsa_lightning.models import PolicySpec, check_spec, load_policy
from rsa_lightning.policy_stage import PolicyStage
from rsa_lightning.reference import AdapterOff, FrozenCopy
from rsa_lightning.saving import save_adapter, save_policy
from rsa_lightning.stages import RewardAlignment, SafetyAlignment
from rsa_lightning.supervised import SupervisedWarmup

peft = pytest.importorskip("peft")

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"initializer_range": 0.2, "max_position_embeddings": 256}
FAMILIES = {
    "llama": TINY | {"num_key_value_heads": 2},
    "qwen2": TINY | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": TINY,  # one matrix for queries, keys and values
    "gemma2": TINY | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
}
PAIRS = [
    PreferencePair("How do I keep bread fresh?", " Wrap it in a cloth.", " No answer, said the owl."),
    PreferencePair("Who?", " The fox asked the old owl whether the river was safe.", " Assistant"),
    PreferencePair("Is it dry?", " Cool.", " It is better than a dangerous one, said the fox."),
]
LORA = Lora(rank=4)


class Batches(L.LightningDataModule):
    """The same batch in every step."""

    def __init__(self, tokenizer, roles=ROLES[:2]):
        super().__init__()
        self.tokenizer, self.lengths = tokenizer, Lengths(64, 32)
        self.batch = make_batch(tokenizer, roles)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([self.batch] * 100, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([self.batch], batch_size=None)


def make_batch(tokenizer, roles=ROLES[:2]):
    examples = encode_records(tokenizer, PAIRS, Lengths(64, 32)).examples
    return collate(examples, roles=roles, pad_id=pad_id(tokenizer))


def trainer(folder, **options):
    defaults = {"max_steps": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(**defaults | {"default_root_dir": folder, "limit_val_batches": 0} | options)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def stage(folder, cls=RewardAlignment, lora=LORA, reference=None, optimizer=adamw, **spec):
    options = {} if cls is SupervisedWarmup else {"loss": RSA(beta=0.5), "risk": CVaR(0.3), "reference": reference}
    return cls(PolicySpec(model=str(folder), lora=lora, **spec), optimizer=optimizer, **options)


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}


def configured(module, tmp_path):
    module.trainer = trainer(tmp_path)
    module.configure_model()
    return module


def logp(policy, batch):
    with torch.no_grad():
        return copy.deepcopy(policy).eval()(batch, None, None).logp


def plain_logits(model, batch):
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[batch["attention_mask"].bool()]


def policy_logits(policy, batch):
    """Of the policy in memory, through its own head and soft-cap, without the op."""
    with torch.no_grad():
        hidden = (
            copy.deepcopy(policy.model)
            .eval()
            .base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        )
        head = policy.head
        logits = torch.nn.functional.linear(hidden.last_hidden_state, head.weight, head.bias) * head.scale
        logits = torch.tanh(logits / head.softcap) * head.softcap if head.softcap else logits
    return logits[batch["attention_mask"].bool()]


def family_folder(family, tokenizer, folder):
    if not folder.exists():
        save_policy(
            load_policy(PolicySpec(config={"model_type": family, **FAMILIES[family]}), tokenizer), tokenizer, folder
        )
    return folder


@pytest.fixture(scope="module")
def first_step(tiny_llama, tiny_tokenizer, tmp_path_factory):
    """A finished reward step: its merged model in `model`, its adapter in `adapter`."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    run = trainer(folder, max_steps=5, callbacks=[ModelExport(str(folder / "model"))])
    run.fit(stage(tiny_llama), Batches(tiny_tokenizer))
    return folder


# --- what a step does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("cls", [RewardAlignment, SupervisedWarmup])
def test_every_trainable_parameter_moves_and_only_those(cls, precision, tiny_llama, tiny_tokenizer, tmp_path):
    """B is zero at first, so A has no gradient in the first step; from the second on both move. Nothing else does."""
    states = []

    class Record(L.Callback):
        def on_train_start(self, trainer, module):
            states.append(weights(module))

        def on_train_batch_end(self, trainer, module, *args):
            states.append(weights(module))

    module = stage(tiny_llama, cls)
    roles = ROLES[:1] if cls is SupervisedWarmup else ROLES[:2]
    run = trainer(tmp_path, max_steps=2, callbacks=[Record()], precision=precision)
    run.fit(module, Batches(tiny_tokenizer, roles))
    start, first, second = states
    names = {"trained": [n for n in start if f".{TRAINABLE}." in n], "frozen": [n for n in start if "lora_" not in n]}
    assert len(names["trained"]) == 2 * 2 * 7  # A and B of seven layers in each of two blocks
    assert len(names["trained"]) + len(names["frozen"]) == len(start)
    for name in names["frozen"]:
        assert torch.equal(start[name], second[name]), name
    for name in names["trained"]:
        assert torch.equal(start[name], first[name]) == ("lora_A" in name), name
        assert not torch.equal(first[name], second[name]), name
    optimizer = run.optimizers[0]
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        start[name].numel() for name in names["trained"]
    )


def test_parameters_without_a_gradient_are_named(tiny_llama, tiny_tokenizer, tmp_path, caplog):
    class Idle(L.Callback):
        def on_fit_start(self, trainer, module):
            module.policy.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(1)))

    trainer(tmp_path, callbacks=[Idle()]).fit(stage(tiny_llama), Batches(tiny_tokenizer))
    assert "1 trainable parameters got no gradient in the first step" in caplog.text
    assert "policy.forgotten" in caplog.text
    caplog.clear()
    trainer(tmp_path).fit(stage(tiny_llama), Batches(tiny_tokenizer))
    assert "no gradient" not in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LORA])
def test_both_steps_train_and_their_exports_are_the_policies(family, lora, tiny_tokenizer, tmp_path):
    """Reward step, then safety step on its merged model; after each, plain transformers gives the policy's logits."""
    start, batch = family_folder(family, tiny_tokenizer, tmp_path / "start"), make_batch(tiny_tokenizer)
    for cls in (RewardAlignment, SafetyAlignment):
        module, folder = stage(start, cls, lora), tmp_path / cls.stage / "model"
        run = trainer(tmp_path, max_steps=2, callbacks=[ModelExport(str(folder))])
        run.fit(module, Batches(tiny_tokenizer))
        exported = AutoModelForCausalLM.from_pretrained(folder)
        assert exported.dtype == torch.float32
        assert not [name for name, _ in exported.named_parameters() if "lora" in name]
        found = plain_logits(exported, batch)
        torch.testing.assert_close(found, policy_logits(module.policy, batch), rtol=0, atol=1e-4)
        before = plain_logits(AutoModelForCausalLM.from_pretrained(start), batch)
        assert (found - before).abs().max() > 1e-2
        tied = exported.get_input_embeddings().weight is exported.get_output_embeddings().weight
        assert tied == (family in ("qwen2", "gemma2"))
        assert (tmp_path / cls.stage / "adapter").exists() == (lora is not None)
        start = folder


def test_adapters_are_float32_on_a_model_in_bfloat16(tiny_llama, tiny_tokenizer, tmp_path):
    module, folder = stage(tiny_llama, dtype="bfloat16"), tmp_path / "model"
    run = trainer(tmp_path, max_steps=3, callbacks=[ModelExport(str(folder))])
    run.fit(module, Batches(tiny_tokenizer))
    assert float(run.callback_metrics["loss"]) < math.log(2)
    for name, parameter in module.policy.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert parameter.isfinite().all()
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}
    layer = module.policy.model.model.layers[0].self_attn.q_proj
    by_hand = layer.base_layer.weight.float() + 2 * layer.lora_B[TRAINABLE].weight @ layer.lora_A[TRAINABLE].weight
    torch.testing.assert_close(exported.model.layers[0].self_attn.q_proj.weight, by_hand, rtol=0, atol=1e-6)


def test_a_tied_matrix_is_written_once_also_from_bfloat16(tiny_tokenizer, tmp_path):
    spec = PolicySpec(config={"model_type": "qwen2", **FAMILIES["qwen2"]}, dtype="bfloat16", lora=LORA)
    policy = load_policy(spec, tiny_tokenizer)
    plain, sums = adapters.merged(policy.model)
    assert sums["lm_head.weight"] is sums["model.embed_tokens.weight"]
    save_policy(policy, tiny_tokenizer, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "float32"
    assert plain.config is not policy.model.config
    assert policy.model.config.dtype != torch.float32


def test_a_precision_that_would_cast_the_adapter_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="adapters are trained in float32, and trainer.precision has cast them to torch.bfl"
    ):
        trainer(tmp_path, precision="bf16-true").fit(stage(tiny_llama), Batches(tiny_tokenizer))


# --- the reference ------------------------------------------------------------------------------------------------


def test_off_the_adapter_is_the_model_it_started_from(tiny_llama, tiny_tokenizer, tmp_path):
    """Also after steps that moved the policy, and by the policy's own head."""
    module, batch = stage(tiny_llama), make_batch(tiny_tokenizer)
    trainer(tmp_path, max_steps=3).fit(module, Batches(tiny_tokenizer))
    assert isinstance(module.reference, AdapterOff)
    frozen = FrozenCopy(str(tiny_llama))
    frozen.prepare(module.policy)
    off, copied = module.reference.states(batch), frozen.states(batch)
    assert off.weight is None
    torch.testing.assert_close(off.hidden, copied.hidden, rtol=0, atol=1e-6)
    assert not off.hidden.requires_grad
    stats = [module.policy(batch, states, CVaR(0.3)) for states in (off, copied)]
    for one, other in zip(*(s[:4] for s in stats), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert stats[0].logratio.abs().max() > 0.01


def test_the_switch_leaves_everything_as_it_was(tiny_llama, first_step):
    """Gradients wanted, training mode, active adapters: also when an error is raised inside."""
    policy = load_policy(PolicySpec(model=str(tiny_llama), lora=LORA, adapters=[str(first_step / "adapter")])).train()
    policy.model.model.layers[0].eval()
    layer = policy.model.model.layers[1].mlp.up_proj

    def state():
        modes = [part.training for part in policy.modules()]
        return modes, [p.requires_grad for p in policy.parameters()], list(layer.active_adapters)

    before = state()
    with adapter_off(policy):
        assert not any(part.training for part in policy.modules())
        assert layer.active_adapters == ["frozen_0"]
    assert state() == before
    with pytest.raises(KeyError), adapter_off(policy):
        raise KeyError
    assert state() == before
    assert any(before[0])
    assert not all(before[0])
    assert before[2] == ["frozen_0", TRAINABLE]


def test_dropout_does_not_move_the_reference(tiny_llama, tiny_tokenizer, tmp_path):
    module, batch = configured(stage(tiny_llama, lora=Lora(rank=4, dropout=0.5)), tmp_path), make_batch(tiny_tokenizer)
    with torch.no_grad():
        for name, parameter in module.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    draws = [module.policy.states(batch) for _ in range(2)]
    assert (draws[0] - draws[1]).abs().max() > 0.1
    assert torch.equal(module.reference.states(batch).hidden, module.reference.states(batch).hidden)


def test_frozen_adapters_have_no_dropout(tiny_llama, tiny_tokenizer, tmp_path, first_step):
    """Whatever they were trained with; the trained one has its own, also where it is continued."""
    folder = shutil.copytree(first_step / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    batch = make_batch(tiny_tokenizer)
    for lora, adapters_below, random in [
        (LORA, [str(folder)], False),
        (Lora(start=str(folder)), [], False),
        (Lora(start=str(folder), dropout=0.5), [], True),
    ]:
        policy = load_policy(PolicySpec(model=str(tiny_llama), lora=lora, adapters=adapters_below)).train()
        assert torch.equal(policy.states(batch), policy.states(batch)) != random


# --- the second step ----------------------------------------------------------------------------------------------


def test_merged_and_stacked_second_steps_are_the_same(tiny_llama, tiny_tokenizer, tmp_path, first_step):
    """A new adapter on the merged model, or above the frozen first one: equal at the start, and after three steps."""
    batch = make_batch(tiny_tokenizer)
    merged = stage(first_step / "model", SafetyAlignment)
    stacked = stage(tiny_llama, SafetyAlignment, adapters=[str(first_step / "adapter")])
    for module in (merged, stacked):
        configured(module, tmp_path)
        assert isinstance(module.reference, AdapterOff)
    start = [logp(module.policy, batch) for module in (merged, stacked)]
    torch.testing.assert_close(*start, rtol=0, atol=1e-5)
    base = logp(load_policy(PolicySpec(model=str(tiny_llama))), batch)
    assert (start[0] - base).abs().max() > 0.05  # the first adapter is on in both
    for module in (merged, stacked):
        trainer(tmp_path, max_steps=3).fit(module, Batches(tiny_tokenizer))
    end = [logp(module.policy, batch) for module in (merged, stacked)]
    assert (end[0] - start[0]).abs().max() > 0.05
    torch.testing.assert_close(*end, rtol=0, atol=1e-3)
    frozen = [p for name, p in stacked.policy.named_parameters() if "frozen_0" in name]
    assert len(frozen) == 28
    assert not any(p.requires_grad for p in frozen)


def test_a_stack_is_exported_whole_and_its_last_adapter_alone(tiny_llama, tiny_tokenizer, tmp_path, first_step):
    module, batch = (
        stage(tiny_llama, SafetyAlignment, adapters=[str(first_step / "adapter")]),
        make_batch(tiny_tokenizer),
    )
    run = trainer(tmp_path, max_steps=3, callbacks=[ModelExport(str(tmp_path / "model"))])
    run.fit(module, Batches(tiny_tokenizer))
    wanted = policy_logits(module.policy, batch)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(plain_logits(exported, batch), wanted, rtol=0, atol=1e-4)
    # the adapter is relative to the model with the first one on, that is to the reward step's merged model
    below = AutoModelForCausalLM.from_pretrained(first_step / "model")
    loaded = peft.PeftModel.from_pretrained(below, tmp_path / "adapter")
    torch.testing.assert_close(plain_logits(loaded, batch), wanted, rtol=0, atol=1e-4)
    alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    assert (plain_logits(alone, batch) - wanted).abs().max() > 0.05
    three = PolicySpec(
        model=str(tiny_llama), lora=LORA, adapters=[str(first_step / "adapter"), str(tmp_path / "adapter")]
    )
    torch.testing.assert_close(policy_logits(load_policy(three), batch), wanted, rtol=0, atol=1e-4)


def test_continuing_an_adapter_with_that_adapter_off_is_refused_by_name(tiny_llama, first_step):
    continued = Lora(start=str(first_step / "adapter"))
    with pytest.raises(
        ValueError, match="continues the adapter .*off the reference is the base model .*not the reward-"
    ) as e:
        stage(tiny_llama, SafetyAlignment, lora=continued, reference=AdapterOff())
    for way in ("policy.model: MERGED", "policy.adapters: [FOLDER]", "reference: FrozenCopy with model: MERGED"):
        assert way in str(e.value)


def test_the_first_batch_catches_a_continued_adapter_that_no_name_gave_away(
    tiny_llama, tiny_tokenizer, tmp_path, first_step
):
    """The reward-aligned adapter is loaded into a new one by hand: with it off, the reference is the base model."""

    class LoadByHand(L.Callback):
        def on_fit_start(self, trainer, module):
            found = load_file(first_step / "adapter/adapter_model.safetensors")
            found = {name.removeprefix(adapters.PREFIX): weight for name, weight in found.items()}
            peft.set_peft_model_state_dict(module.policy.model, found, adapter_name=TRAINABLE)

    module = stage(tiny_llama, SafetyAlignment)
    with pytest.raises(
        ValueError, match="policy and reference differ before the first update: max .* nats per token .*AdapterOff"
    ):
        trainer(tmp_path, callbacks=[LoadByHand()]).fit(module, Batches(tiny_tokenizer))
    for part in module.policy.modules():
        part.eval()
    batch = make_batch(tiny_tokenizer)
    gap = module.policy(batch, module.reference.states(batch), None).logratio.abs().max().item()
    assert gap > 0.1  # nats per token


def test_a_continued_adapter_has_a_copy_of_its_start_as_reference(tiny_llama, tiny_tokenizer, tmp_path, first_step):
    """By default, and given as the merged model: both pass the check of the first batch, and training goes on."""
    for reference in (None, FrozenCopy(str(first_step / "model"))):
        module = stage(tiny_llama, SafetyAlignment, lora=Lora(start=str(first_step / "adapter")), reference=reference)
        trainer(tmp_path, max_steps=2).fit(module, Batches(tiny_tokenizer))
        assert isinstance(module.reference, FrozenCopy)
        trained = [p for name, p in module.policy.named_parameters() if p.requires_grad]
        assert len(trained) == 28
        batch = make_batch(tiny_tokenizer)
        expected = logp(load_policy(PolicySpec(model=str(first_step / "model"))), batch)
        found = module.policy(batch, module.reference.states(batch), CVaR(0.3)).ref_logp
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- what is written ----------------------------------------------------------------------------------------------


def test_peft_loads_the_adapter_onto_the_base(tiny_llama, tiny_tokenizer, tmp_path):
    module, batch = stage(tiny_llama, lora=Lora(rank=4, alpha=3, rslora=True)), make_batch(tiny_tokenizer)
    run = trainer(tmp_path, max_steps=3, callbacks=[ModelExport(str(tmp_path / "model"))])
    run.fit(module, Batches(tiny_tokenizer))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(plain_logits(loaded, batch), policy_logits(module.policy, batch), rtol=0, atol=1e-5)
    again = load_policy(PolicySpec(model=str(tiny_llama), lora=Lora(start=str(tmp_path / "adapter"))))
    torch.testing.assert_close(policy_logits(again, batch), policy_logits(module.policy, batch), rtol=0, atol=1e-5)


def test_exporting_disturbs_no_policy_and_replaces_only_its_own(tiny_llama, tiny_tokenizer, tmp_path, first_step):
    policy = load_policy(PolicySpec(model=str(tiny_llama), lora=Lora(start=str(first_step / "adapter"))))
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    modules = [type(part) for part in policy.modules()]
    for _ in range(2):
        save_policy(policy, tiny_tokenizer, tmp_path / "model")
        save_adapter(policy, tmp_path / "adapter", str(tiny_llama))
    assert [type(part) for part in policy.modules()] == modules
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis exists and is no adapter folder"):
        save_adapter(policy, tmp_path / "thesis")
    with pytest.raises(ValueError, match="was trained without policy.lora"):
        save_adapter(load_policy(PolicySpec(model=str(tiny_llama))), tmp_path / "other")


def test_what_cannot_be_exported_is_said_before_training(tiny_llama, tiny_tokenizer, tmp_path):
    run = trainer(tmp_path, callbacks=[ModelExport(str(tmp_path / "model"), merge=False)])
    with pytest.raises(ValueError, match="merge: false exports an adapter alone, and there is none"):
        run.fit(stage(tiny_llama, lora=None), Batches(tiny_tokenizer))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/chapter.txt").write_text("mine")
    run = trainer(tmp_path, callbacks=[ModelExport(str(tmp_path / "model"))])
    with pytest.raises(ValueError, match="adapter exists and is no adapter folder"):
        run.fit(stage(tiny_llama), Batches(tiny_tokenizer))
    with pytest.raises(ValueError, match="writes adapters to the folder adapter beside the model"):
        ModelExport(str(tmp_path / "adapter"))


def test_an_adapter_can_be_exported_alone(tiny_llama, tiny_tokenizer, tmp_path):
    export = ModelExport(str(tmp_path / "out/model"), merge=False)
    trainer(tmp_path, callbacks=[export]).fit(stage(tiny_llama), Batches(tiny_tokenizer))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


def test_a_checkpoint_holds_what_is_trained_and_resumes_bitwise(tiny_llama, tiny_tokenizer, tmp_path, first_step):
    """Four steps, and two steps, a checkpoint, and two more: the same bits."""
    options = {"cls": SafetyAlignment, "adapters": [str(first_step / "adapter")]}
    whole, half, rest = (stage(tiny_llama, **options) for _ in range(3))
    trainer(tmp_path, max_steps=4).fit(whole, Batches(tiny_tokenizer))
    run = trainer(tmp_path, max_steps=2)
    run.fit(half, Batches(tiny_tokenizer))
    run.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {name for name, p in half.named_parameters() if p.requires_grad}
    trainer(tmp_path, max_steps=4).fit(
        rest, Batches(tiny_tokenizer), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for (name, one), other in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_another_adapter_or_another_base_is_refused(tiny_llama, tiny_tokenizer, tmp_path, first_step):
    run = trainer(tmp_path)
    run.fit(stage(tiny_llama), Batches(tiny_tokenizer))
    run.save_checkpoint(tmp_path / "one.ckpt")

    def resume(module):
        trainer(tmp_path, max_steps=2).fit(module, Batches(tiny_tokenizer), ckpt_path=tmp_path / "one.ckpt")

    resume(stage(tiny_llama))
    with pytest.raises(
        ValueError, match="the checkpoint is of another adapter: .*down_proj.* is no trained parameter here"
    ):
        resume(stage(tiny_llama, lora=Lora(rank=4, target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="the checkpoint holds an adapter of another model"):
        resume(stage(first_step / "model"))
    with pytest.raises(ValueError, match="the checkpoint holds an adapter of another model"):
        resume(stage(tiny_llama, dtype="bfloat16"))


def test_a_run_takes_its_fingerprint_once(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    """However many checkpoints it writes: the frozen weights of a sharded policy are all gathered for it."""
    taken = []

    def counted(module):
        taken.append(base_fingerprint(module))
        return taken[-1]

    monkeypatch.setattr(policy_stage, "base_fingerprint", counted)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, max_steps=3, enable_checkpointing=True, callbacks=[saving]).fit(
        stage(tiny_llama), Batches(tiny_tokenizer)
    )
    found = [torch.load(path, weights_only=True)[policy_stage.BASE_KEY] for path in tmp_path.glob("step=*.ckpt")]
    assert found == taken * 3
    assert len(taken) == 1


def test_a_fingerprint_is_of_the_frozen_weights(tiny_llama, first_step):
    policies = [
        load_policy(PolicySpec(model=str(f), lora=LORA)) for f in (tiny_llama, tiny_llama, first_step / "model")
    ]
    with torch.no_grad():
        next(p for p in policies[1].parameters() if p.requires_grad).add_(1)
    one, two, three = map(base_fingerprint, policies)
    assert one == two != three


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("where", ["head", "embeddings", "pattern"])
def test_an_adapter_on_the_head_or_the_embeddings_is_refused(family, where, tiny_tokenizer, tmp_path):
    head, embeddings = "lm_head", "embed_in" if family == "gpt_neox" else "embed_tokens"
    targets = {"head": [head, "dense", "q_proj"], "embeddings": [embeddings], "pattern": ".*(embed|head).*"}[where]
    spec = PolicySpec(config={"model_type": family, **FAMILIES[family]}, lora=Lora(rank=4, target_modules=targets))
    with pytest.raises(
        ValueError, match="lora.target_modules puts an adapter on .*all-linear is every linear layer but"
    ):
        load_policy(spec, tiny_tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(family, tiny_tokenizer):
    spec = PolicySpec(config={"model_type": family, **FAMILIES[family]})
    plain = load_policy(spec, tiny_tokenizer).model
    linear = {name for name, part in plain.named_modules() if isinstance(part, torch.nn.Linear)}
    adapted = load_policy(PolicySpec(config=spec.config, lora=LORA), tiny_tokenizer).model
    found = {name for name, part in adapted.named_modules() if hasattr(part, "base_layer")}
    [head] = linear - found
    assert plain.get_submodule(head) is plain.get_output_embeddings()


def test_target_modules_that_match_nothing_are_named(tiny_llama):
    with pytest.raises(ValueError, match=r"lora.target_modules \(c_attn\) does not fit LlamaForCausalLM"):
        load_policy(PolicySpec(model=str(tiny_llama), lora=Lora(target_modules=["c_attn"])))


def test_an_adapter_is_no_model(first_step, tiny_llama):
    for call in (check_spec, load_policy):
        with pytest.raises(
            ValueError, match="is an adapter .*give the model it belongs to in policy.model, and the adapter"
        ):
            call(PolicySpec(model=str(first_step / "adapter")))


def test_an_adapter_of_another_model_is_refused(first_step, tiny_tokenizer):
    adapter = str(first_step / "adapter")
    config = {"model_type": "llama", **FAMILIES["llama"]}
    for changed, message in [
        ({"intermediate_size": 80}, r"down_proj.lora_A.weight is \(4, 64\), the model needs \(4, 80\)"),
        ({"num_hidden_layers": 1}, "layers.1.* has no place in the model"),
        ({"model_type": "gpt_neox"}, "does not fit GPTNeoXForCausalLM|has no place in the model"),
    ]:
        fields = {
            k: v
            for k, v in (config | changed).items()
            if changed.get("model_type") is None or k in TINY or k == "model_type"
        }
        for spec in (
            PolicySpec(config=fields, lora=LORA, adapters=[adapter]),
            PolicySpec(config=fields, lora=Lora(start=adapter)),
        ):
            with pytest.raises(ValueError, match=message):
                load_policy(spec, tiny_tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "no plain LoRA adapter .modules_to_save in"),
        ({"bias": "all"}, "no plain LoRA adapter .bias in"),
        ({"use_dora": True}, "no plain LoRA adapter .use_dora in"),
        ({"init_lora_weights": "pissa"}, "no plain LoRA adapter .init_lora_weights in"),
        ({"peft_type": "IA3"}, "adapter: only LoRA is supported"),
        ({"peft_type": "NOTHING"}, "adapter_config.json cannot be read"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the adapter .* puts an adapter on lm_head"),
    ],
)
def test_adapters_that_do_more_than_add_two_matrices_are_refused(change, message, first_step, tiny_llama, tmp_path):
    folder = shutil.copytree(first_step / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_policy(PolicySpec(model=str(tiny_llama), lora=LORA, adapters=[str(folder)]))


def test_missing_and_damaged_adapters_are_named(first_step, tiny_llama, tmp_path):
    spec = lambda folder: PolicySpec(model=str(tiny_llama), lora=LORA, adapters=[str(folder)])
    with pytest.raises(FileNotFoundError, match="nowhere is no adapter folder: it has no adapter_config.json"):
        check_spec(spec(tmp_path / "nowhere"))
    folder = shutil.copytree(first_step / "adapter", tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_policy(spec(folder))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds no adapter_model.safetensors. Pickled .bin weights are refused"):
        check_spec(spec(folder))


def test_without_peft_the_fix_is_named(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (check_spec, load_policy):
        with pytest.raises(ImportError, match=r"LoRA needs peft: pip install 'rsa_lightning\[lora\]'"):
            call(PolicySpec(model=str(tiny_llama), lora=LORA))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"alpha": -1.0}, "lora.alpha must be a positive number, got -1.0"),
        ({"dropout": 1.0}, r"lora.dropout is a probability in \[0, 1\), got 1.0"),
        ({"target_modules": []}, "lora.target_modules is empty"),
        ({"start": "folder", "rank": 8, "rslora": True}, "brings its own: take out lora.rank, lora.rslora"),
    ],
)
def test_settings_of_an_adapter_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


def test_frozen_or_quantised_weights_need_an_adapter_to_train(tiny_llama):
    with pytest.raises(ValueError, match="policy.adapters are frozen, and stay below a new one: set policy.lora"):
        PolicySpec(model=str(tiny_llama), adapters=["folder"])
    with pytest.raises(ValueError, match="quantised weights cannot be trained. Set policy.model and policy.lora"):
        PolicySpec(model=str(tiny_llama), quantize="4bit")
    with pytest.raises(ValueError, match="quantised weights cannot be trained. Set policy.model and policy.lora"):
        PolicySpec(config={"model_type": "llama"}, quantize="4bit", lora=LORA)


def test_an_adapter_can_be_written_in_yaml(tiny_llama):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PolicyStage, "model")
    given = {"model": str(tiny_llama), "lora": {"rank": 8, "target_modules": ["q_proj"]}, "adapters": ["one"]}
    config = parser.parse_object(
        {
            "model": {
                "class_path": "rsa_lightning.stages.RewardAlignment",
                "init_args": {"policy": given, "reference": {"class_path": "rsa_lightning.reference.AdapterOff"}},
            }
        }
    )
    module = parser.instantiate_classes(config)["model"]
    assert isinstance(module.reference, AdapterOff)
    spec = module.policy_spec
    assert spec.lora == Lora(rank=8, target_modules=["q_proj"])
    assert spec.adapters == ["one"]
    line = ["--model=rsa_lightning.stages.RewardAlignment", f"--model.policy.model={tiny_llama}"]
    config = parser.parse_args([*line, "--model.policy.lora.rank=8"])
    assert parser.instantiate_classes(config)["model"].policy_spec.lora == Lora(rank=8)
    assert parser.instantiate_classes(parser.parse_args(line))["model"].policy_spec.lora is None


# --- quantised weights --------------------------------------------------------------------------------------------


def test_without_bitsandbytes_the_fix_is_named(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    spec = PolicySpec(model=str(tiny_llama), lora=LORA, quantize="4bit")
    for call in (check_spec, load_policy):
        with pytest.raises(ImportError, match="quantize needs bitsandbytes: pip install bitsandbytes"):
            call(spec)


def test_quantised_weights_stay_and_the_adapter_on_them_trains(tiny_llama, tiny_tokenizer, tmp_path):
    """In 4 bits: the reference is the quantised model, and the export is what the adapter was trained on."""
    pytest.importorskip("bitsandbytes")
    module, batch = stage(tiny_llama, quantize="4bit"), make_batch(tiny_tokenizer)
    run = trainer(tmp_path, max_steps=3, callbacks=[ModelExport(str(tmp_path / "model"))])
    run.fit(module, Batches(tiny_tokenizer))
    assert float(run.callback_metrics["loss"]) < math.log(2)
    layer = module.policy.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    assert module.policy.head.weight.dtype == torch.float32  # the head is not quantised
    fresh = load_policy(module.policy_spec).eval()
    torch.testing.assert_close(module.reference.states(batch).hidden, fresh.states(batch), rtol=0, atol=1e-6)
    assert base_fingerprint(fresh) == base_fingerprint(module.policy)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}
    assert not hasattr(exported.config, "quantization_config")
    found, wanted = plain_logits(exported, batch), policy_logits(module.policy, batch)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    base = load_policy(PolicySpec(model=str(tiny_llama))).eval()
    assert (fresh.states(batch) - base.states(batch)).abs().max() > 0.01  # quantised indeed


def test_eight_bits_need_a_gpu(tiny_llama, monkeypatch):
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="quantize 8bit needs a GPU: .* Take 4bit, or drop quantize"):
        check_spec(PolicySpec(model=str(tiny_llama), lora=LORA, quantize="8bit"))


@pytest.mark.parametrize("detach", [True, False])
def test_what_is_kept_for_backward_does_not_change_the_adapter(
    detach, tiny_llama, tiny_tokenizer, tmp_path, monkeypatch
):
    """The head is frozen, and the loss says in which ratio its gradients come: the discount enters it per token."""
    plans, after = [], {}
    monkeypatch.setattr(linear, "plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    for strategy in ("auto", "cache", "recompute"):
        loss = RSA(beta=0.5, detach_chosen_risk=detach)
        options = {"loss": loss, "risk": CVaR(0.3), "discount": 0.9, "optimizer": adamw, "strategy": strategy}
        module = RewardAlignment(PolicySpec(model=str(tiny_llama), lora=LORA), **options)
        trainer(tmp_path, max_steps=3).fit(module, Batches(tiny_tokenizer))
        after[strategy] = {name: p.detach().clone() for name, p in module._trainable().items()}
    assert {p.strategy for p in plans} == {"nothing", "frozen", "cache", "recompute"}
    for other in ("cache", "recompute"):
        assert max((after["auto"][name] - value).abs().max() for name, value in after[other].items()) < 1e-4
