"""Which models the steps of a run start from and stay near, with adapters and without."""

import pytest

from rsa_lightning.lineage import Lineage
from rsa_lightning.plan import read_config

ADAPTER_OFF = {"class_path": "rsa_lightning.reference.AdapterOff"}
STEPS = {"warmup": {"kind": "warmup"}, "reward": {"kind": "reward"}, "safety": {"kind": "safety"}}


def lineage(steps=STEPS, **more) -> Lineage:
    fields = {"model": {"config": {"model_type": "llama"}}, "data": {"stories": {}}, "output": "run", "steps": steps}
    return Lineage(read_config(fields | more))


def copy_of(folder):
    return {"class_path": "rsa_lightning.reference.FrozenCopy", "init_args": {"model": folder}}


def test_every_step_starts_from_the_one_before_and_stays_near_it():
    steps = lineage()
    assert [steps.start(name) for name in STEPS] == ["base", "warmup", "reward"]
    assert [steps.policy(name)["model"] for name in STEPS] == [
        "run/inputs/base",
        "run/warmup/model",
        "run/reward/model",
    ]
    assert steps.reference_class("safety") == copy_of("run/reward/model")
    assert [steps.policy(name)["lora"] for name in STEPS] == [None, None, None]
    assert steps.origin("safety") == "run/warmup/model"


def test_shared_adapters_are_those_of_the_alignment_steps():
    """A warm-up from fresh weights has nothing an adapter could adapt."""
    steps = lineage(lora={"rank": 4})
    assert [steps.policy(name)["lora"] for name in STEPS] == [None, {"rank": 4}, {"rank": 4}]


def test_merged_handover_starts_from_the_merged_model_and_needs_no_second_copy():
    steps = lineage(lora={"rank": 4})
    assert steps.policy("safety")["model"] == "run/reward/model"
    assert steps.policy("safety")["adapters"] == []
    assert steps.reference_class("safety") == ADAPTER_OFF


def test_stacked_handover_keeps_the_adapters_on_the_full_model_below():
    chain = STEPS | {"again": {"kind": "safety"}}
    steps = lineage(chain, lora={"rank": 4}, handover="stack")
    assert steps.policy("reward")["adapters"] == []
    assert (steps.policy("safety")["model"], steps.policy("safety")["adapters"]) == (
        "run/warmup/model",
        ["run/reward/adapter"],
    )
    assert steps.policy("again")["adapters"] == ["run/reward/adapter", "run/safety/adapter"]
    assert steps.policy("again")["model"] == "run/warmup/model"


def test_a_step_without_an_adapter_starts_from_the_merged_model():
    chain = STEPS | {"safety": {"kind": "safety", "lora": False}}
    steps = lineage(chain, lora={"rank": 4}, handover="stack")
    assert steps.policy("safety")["lora"] is None
    assert (steps.policy("safety")["model"], steps.policy("safety")["adapters"]) == ("run/reward/model", [])
    assert steps.reference_class("safety") == copy_of("run/reward/model")


def test_a_step_may_change_single_settings_of_the_shared_adapter():
    chain = STEPS | {"safety": {"kind": "safety", "lora": {"dropout": 0.1}}}
    assert lineage(chain, lora={"rank": 4}).policy("safety")["lora"] == {"rank": 4, "dropout": 0.1}


def test_another_reference_than_the_start_is_a_copy_even_with_an_adapter():
    chain = STEPS | {"safety": {"kind": "safety", "reference": "warmup"}}
    assert lineage(chain, lora={"rank": 4}).reference_class("safety") == copy_of("run/warmup/model")


@pytest.mark.parametrize(("lora", "expected"), [(None, None), ({"rank": 4}, "4bit")])
def test_only_a_step_with_an_adapter_quantises_its_weights(lora, expected):
    steps = lineage(quantize="4bit", lora=lora)
    assert steps.policy("warmup")["quantize"] is None
    assert steps.policy("reward")["quantize"] == expected


def test_a_mixture_of_models_that_no_step_aligned_is_compared_with_its_first_start():
    """It has no folder itself, and a merge of folders compared with itself would show a KL of 0 by construction."""
    mixed = lineage({**STEPS, "m": {"kind": "mix", "models": {"warmup": 0.5, "base": 0.5}}})
    assert mixed.origin("m") == mixed.model(mixed.start("m")) == "run/warmup/model"


def test_one_folder_under_two_names_is_refused(tmp_path):
    steps = {"m": {"kind": "merge", "models": {"base": 2.0, str(tmp_path): -1.0}}}
    with pytest.raises(ValueError, match=r"steps\.m\.models: two of base, .* are one folder"):
        lineage(steps, model={"model": str(tmp_path)}).members("m")
