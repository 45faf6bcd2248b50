"""The configuration of `rsa align`: defaults, and one clear sentence for each mistake."""

from pathlib import Path

import pytest

from rsa_lightning.plan import read_config
from rsa_lightning.steps import fit_config, sources_of

MODEL = {"config": {"model_type": "llama"}}


def config(steps, **more):
    return read_config({"model": MODEL, "data": {"stories": {}}, "steps": steps, **more})


def built(step, parsed, reference="runs/reward/model"):
    return fit_config(
        step,
        parsed,
        policy={"model": "m"},
        reference={"class_path": "FrozenCopy", "init_args": {"model": reference}},
        data={"path": "p"},
        folder=Path("runs/x"),
        progress_bar=False,
    )


def test_sources_follow_the_kind():
    parsed = config({"a": {"kind": "warmup"}, "b": {"kind": "reward"}, "c": {"kind": "safety"}})
    assert [sources_of(step, parsed.data)[0] for step in parsed.steps.values()] == [
        ("demonstrations",),
        ("helpful",),
        ("safety",),
    ]


def test_a_warm_up_without_demonstrations_learns_the_chosen_responses_of_all_pairs():
    parsed = read_config({"model": MODEL, "data": {"helpful": "h", "safety": "s"}, "steps": {"w": {"kind": "warmup"}}})
    assert sources_of(parsed.steps["w"], parsed.data) == (("helpful", "safety"), {})


def test_a_step_may_take_any_source_and_its_own_options():
    parsed = config(
        {
            "a": {"kind": "reward", "data": {"source": "safety", "batch_size": 4}},
            "b": {"kind": "safety", "data": "helpful"},
        }
    )
    assert sources_of(parsed.steps["a"], parsed.data) == (("safety",), {"batch_size": 4})
    assert sources_of(parsed.steps["b"], parsed.data) == (("helpful",), {})


def test_temperatures_reach_the_stage():
    parsed = config(
        {"a": {"kind": "reward"}, "b": {"kind": "safety", "temperature": 0.3, "loss": "DPO"}}, beta=0.2, lam=5.0
    )
    arguments = built(parsed.steps["a"], parsed)["model"]["init_args"]
    assert (arguments["beta"], arguments["lam"], arguments["parametrization"]) == (0.2, 5.0, "total")
    arguments = built(parsed.steps["b"], parsed)["model"]["init_args"]
    assert "beta" not in arguments
    assert arguments["loss"] == {"class_path": "DPO", "init_args": {"beta": 0.3}}


def test_costs_reach_a_safety_step():
    parsed = config({"a": {"kind": "safety", "cost_transform": "MeanCost", "label_scale": 2}})
    arguments = built(parsed.steps["a"], parsed)["model"]["init_args"]
    assert (arguments["cost_transform"], arguments["label_scale"]) == ("MeanCost", 2.0)
    plain = config({"a": {"kind": "safety"}, "b": {"kind": "reward"}})
    for step in plain.steps.values():
        assert not {"cost_transform", "label_scale"} & built(step, plain)["model"]["init_args"].keys()


def test_shared_trainer_arguments_lie_below_those_of_a_step():
    parsed = config(
        {"a": {"kind": "warmup", "trainer": {"max_epochs": 7}}}, trainer={"max_epochs": 2, "gradient_clip_val": 0.5}
    )
    trainer = built(parsed.steps["a"], parsed, reference=None)["trainer"]
    assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (7, 0.5)
    assert trainer["logger"][0]["class_path"].endswith("CSVLogger")


def test_loggers_and_callbacks_of_the_user_join_ours():
    tensorboard = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "tb"}}
    parsed = config({"a": {"kind": "warmup"}}, trainer={"logger": tensorboard, "callbacks": [{"class_path": "mine"}]})
    trainer = built(parsed.steps["a"], parsed, reference=None)["trainer"]
    assert [entry["class_path"].split(".")[-1] for entry in trainer["logger"]] == ["CSVLogger", "TensorBoardLogger"]
    assert trainer["callbacks"][0] == {"class_path": "mine"}
    assert any(entry["class_path"].endswith("ModelExport") for entry in trainer["callbacks"])


MISTAKES = {
    "unknown top key": ({"steps": {"a": {"kind": "reward"}}, "betta": 1}, "betta"),
    "unknown step key": (
        {"steps": {"a": {"kind": "reward", "trainr": {}}}},
        r"steps.a.trainr: unknown key; known are kind, start",
    ),
    "a top key misspelt": (
        {"steps": {"a": {"kind": "reward"}}, "ouput": "runs"},
        r"^ouput: unknown key; known are model, data, output.*\. Did you mean output\?$",
    ),
    "a step key misspelt": (
        {"steps": {"a": {"kind": "reward", "temprature": 0.1}}},
        r"^steps.a.temprature: unknown key; known are kind, start.*\. Did you mean temperature\?$",
    ),
    "a key near no other": (
        {"steps": {"a": {"kind": "reward", "epochs": 2}}},
        r"^steps.a.epochs: unknown key; known are kind, start.*, targets$",
    ),
    "a number as key": ({"steps": {"a": {"kind": "reward", 1: 2}}}, "^steps.a.1: unknown key"),
    "unknown kind": ({"steps": {"a": {"kind": "rewards"}}}, r"steps.a: .*kind.*rewards"),
    "no kind": ({"steps": {"a": {}}}, r"steps.a: .*required: kind"),
    "no steps": ({"steps": {}}, "steps: give at least one"),
    "steps of the wrong type": ({"steps": [1]}, "steps must be a mapping"),
    "empty name": ({"steps": {"": {"kind": "warmup"}}}, "steps: '' is no name for a step"),
    "name with a path": (
        {"steps": {"../x": {"kind": "warmup"}}},
        "is no name for a step: use letters, digits, _ and -",
    ),
    "number as name": ({"steps": {1: {"kind": "warmup"}}}, "steps: 1 is no name for a step"),
    "names alike": ({"steps": {"a": {"kind": "warmup"}, "A": {"kind": "reward"}}}, "steps.A: this name is taken"),
    "trainer of the wrong type": (
        {"steps": {"a": {"kind": "reward", "trainer": "x"}}},
        "steps.a.trainer must be a mapping, got 'x'",
    ),
    "data of the wrong type": (
        {"steps": {"a": {"kind": "reward", "data": 5}}},
        "steps.a.data must be a name or a list or a mapping, got 5",
    ),
    "loss of the wrong type": (
        {"steps": {"a": {"kind": "reward", "loss": 5}}},
        "steps.a.loss must be a name or a mapping, got 5",
    ),
    "tokenizer in options": (
        {"data": {"stories": {}, "options": {"tokenizer": "x"}}, "steps": {"a": {"kind": "reward"}}},
        "data.options.tokenizer is set by the run: use model.tokenizer",
    ),
    "no samples": (
        {"evaluation": {"sampling": {"samples_per_prompt": 0}}, "steps": {"a": {"kind": "reward"}}},
        "sampling.samples_per_prompt must be at least 1, got 0",
    ),
    "no resamples": (
        {"evaluation": {"resamples": 0}, "steps": {"a": {"kind": "reward"}}},
        "evaluation.resamples must be at least 1, got 0",
    ),
    "no prompts": (
        {"evaluation": {"prompts": 0}, "steps": {"a": {"kind": "reward"}}},
        "evaluation.prompts must be at least 2, got 0",
    ),
    "costs of a reward step": (
        {"steps": {"a": {"kind": "reward", "cost_transform": "MeanCost"}}},
        "steps.a.cost_transform: only a step of kind safety learns from costs; remove it",
    ),
    "label scale of a warm-up": (
        {"steps": {"a": {"kind": "warmup", "label_scale": 1.0}}},
        "steps.a.label_scale: only a step of kind safety learns from costs; remove it",
    ),
    "cost transform of the wrong type": (
        {"steps": {"a": {"kind": "safety", "cost_transform": 3}}},
        "steps.a.cost_transform must be a name or a mapping, got 3",
    ),
    "later start": (
        {"steps": {"a": {"kind": "reward", "start": "b"}, "b": {"kind": "safety"}}},
        r"steps.a.start is 'b': it comes later",
    ),
    "unknown reference": (
        {"steps": {"a": {"kind": "reward", "reference": "zz"}}},
        r"steps.a.reference is 'zz': it is neither an earlier step",
    ),
    "reserved name": ({"steps": {"base": {"kind": "reward"}}}, "steps.base: this name is taken"),
    "loss of a warm-up": ({"steps": {"a": {"kind": "warmup", "loss": "DPO"}}}, "steps.a.loss: a warm-up has none"),
    "files beside stories": (
        {"data": {"stories": {}, "helpful": "x"}, "steps": {"a": {"kind": "reward"}}},
        "give either `stories` or files",
    ),
    "both kinds of data": (
        {"data": {"path": "x", "helpful": "y"}, "steps": {"a": {"kind": "reward"}}},
        "data: path is for rows with both labels, helpful for rows with one",
    ),
    "criterion in options": (
        {"data": {"path": "x", "options": {"criterion": "safe"}}, "steps": {"a": {"kind": "reward"}}},
        "data.options.criterion is set by the run: use data.path",
    ),
    "adapter of the wrong type": (
        {"steps": {"a": {"kind": "reward", "lora": 8}}},
        "steps.a.lora must be a mapping or false, got 8",
    ),
    "adapter without settings": (
        {"steps": {"a": {"kind": "reward", "lora": True}}},
        "steps.a.lora must be a mapping or false, got True",
    ),
    "shared adapter of the wrong type": (
        {"lora": 8, "steps": {"a": {"kind": "reward"}}},
        "lora must be a mapping, got 8",
    ),
    "adapter of the model": (
        {"model": {**MODEL, "lora": {"rank": 2}}, "steps": {"a": {"kind": "reward"}}},
        "belong to rsa fit: here the key lora gives steps their adapters",
    ),
    "unknown handover": ({"handover": "sum", "steps": {"a": {"kind": "reward"}}}, "handover"),
    "wrong type": ({"lam": "much", "steps": {"a": {"kind": "reward"}}}, "lam"),
    "no model": ({"model": {}, "steps": {"a": {"kind": "reward"}}}, "policy: give `model`"),
    "typo in data": ({"data": {"helpfull": "x"}, "steps": {"a": {"kind": "reward"}}}, "helpfull"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    given, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        read_config({"model": MODEL, "data": {"stories": {}}} | given)


def test_null_removes_a_step_of_a_lower_layer():
    assert list(config({"a": {"kind": "warmup"}, "b": None, "c": {"kind": "safety"}}).steps) == ["a", "c"]


def test_demonstrations_are_not_mixed_with_pairs():
    parsed = config({"a": {"kind": "warmup", "data": ["demonstrations", "helpful"]}})
    with pytest.raises(ValueError, match="give them a step of their own"):
        sources_of(parsed.steps["a"], parsed.data)


def test_a_missing_source_names_the_option():
    parsed = read_config({"model": MODEL, "steps": {"a": {"kind": "reward"}}})
    with pytest.raises(ValueError, match=r"data.helpful is not given: pass --data.helpful FILE"):
        sources_of(parsed.steps["a"], parsed.data)


def test_a_temperature_given_twice_is_refused():
    loss = {"class_path": "RSA", "init_args": {"beta": 0.2}}
    parsed = config({"a": {"kind": "reward", "temperature": 0.1, "loss": loss}})
    with pytest.raises(ValueError, match=r"given twice: temperature=0.1 and loss.beta=0.2"):
        built(parsed.steps["a"], parsed)


def test_one_data_set_with_both_labels_serves_both_steps():
    parsed = read_config(
        {
            "model": MODEL,
            "data": {"path": "pku"},
            "steps": {"w": {"kind": "warmup"}, "r": {"kind": "reward"}, "s": {"kind": "safety"}},
        }
    )
    assert [sources_of(step, parsed.data)[0] for step in parsed.steps.values()] == [
        ("helpful",),
        ("helpful",),
        ("safety",),
    ]
    both = read_config(
        {"model": MODEL, "data": {"path": "pku"}, "steps": {"w": {"kind": "warmup", "data": ["helpful", "safety"]}}}
    )
    with pytest.raises(ValueError, match="name one of them, helpful or safety"):
        sources_of(both.steps["w"], both.data)


def test_a_scorer_is_a_name_or_a_class_with_arguments():
    setting = {"class_path": "a.B", "init_args": {"cost_sign": -1}}
    for scorer in ("a.b", setting, None):
        assert config({"a": {"kind": "reward"}}, evaluation={"scorer": scorer}).evaluation.scorer == scorer
