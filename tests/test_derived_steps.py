"""Steps of `rsa align` that train nothing: merges, mixtures and labels, their numbers, what is reused and refused."""

import dataclasses
import io
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rsa_lightning import stories
from rsa_lightning.assess import held_out_prompts
from rsa_lightning.config import merge
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.labels import labelled_rows, read_pairs, score_responses, sigmoid, weigh_by_scores
from rsa_lightning.lineage import Lineage
from rsa_lightning.pipeline import align
from rsa_lightning.plan import read_config
from rsa_lightning.steps import labelled_data

SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SGD = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}}
RUN = {
    "model": {"config": {**SHAPE, "num_attention_heads": 2}},
    "lam": 4.0,
    "data": {
        "stories": {"demonstrations": 40, "pairs": 60},
        "options": {"tokenizer_vocab_size": 400, "max_length": 96, "batch_size": 4},
    },
    "evaluation": {
        "scorer": "rsa_lightning.stories.score",
        "sampling": {"samples_per_prompt": 2, "max_new_tokens": 6},
        "prompts": 4,
        "pairs": 8,
        "resamples": 10,
        "figures": False,
    },
    "trainer": {"limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1},
    "steps": {
        "warmup": {"kind": "warmup", **SGD},
        "reward": {"kind": "reward", "loss": "DPO", **SGD},
        "conservative": {"kind": "safety", "loss": "DPO", **SGD},
        "soup": {"kind": "merge", "models": {"reward": 0.5, "conservative": 0.5}},
        "duet": {"kind": "mix", "models": {"reward": 1.0, "conservative": 1.0, "warmup": -1.0}},
        "labels": {"kind": "label", "data": "helpful"},
        "pecan": {
            "kind": "label",
            "data": "helpful",
            "models": {"reward": 1.0, "conservative": 2.0},
            "reference": "warmup",
        },
        "mocan": {"kind": "reward", "start": "warmup", "data": "labels", "loss": "DPO", **SGD},
        "further": {"kind": "reward", "start": "soup", "data": "pecan", "loss": "DPO", **SGD},
    },
}


def run(config, output, **changes) -> tuple[dict, str]:
    """The results and what was printed."""
    out = io.StringIO()
    found = align(merge(merge(config, {"output": str(output)}), changes), Console(file=out, width=250))
    return found, out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    found, printed = run(RUN, folder)
    return folder, found, printed


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


# ------------------------------------------------------------------ merges


def test_a_merge_is_a_model_like_any_other(finished):
    """The average of its members, evaluated, and the start of a later step."""
    folder, found, _ = finished
    one, two, mine = (weights(folder / name / "model") for name in ("reward", "conservative", "soup"))
    for name, value in mine.items():
        assert torch.equal(value, 0.5 * one[name] + 0.5 * two[name])
    record = json.loads((folder / "soup/model/merge.json").read_text())["members"]
    assert [(row["model"], row["weight"]) for row in record] == [("reward", 0.5), ("conservative", 0.5)]
    results = {model["name"]: model for model in found["models"]}
    assert list(results) == ["warmup", "reward", "conservative", "soup", "duet", "mocan", "further"]
    assert results["soup"]["samples"] == len(rows(folder / "soup/samples.jsonl"))
    assert results["soup"]["kl_to_start"] != 0
    assert set(results["soup"]["preference"]) == {"helpful", "safety"}
    steps = json.loads((folder / "manifest.json").read_text())["steps"]
    assert (steps["further"]["start"], steps["soup"]["start"]) == ("soup", "reward")


def test_the_report_says_what_was_made_of_what(finished):
    text = (finished[0] / "report.md").read_text()
    assert "soup (merge) | reward" in text
    assert "nothing: weights 0.5 reward + 0.5 conservative" in text
    assert "nothing: log-probabilities 1 reward + 1 conservative - 1 warmup, at every token" in text
    assert re.search(r"nothing: \d+ pairs labelled, \d+ of them changed order \(target < 1/2\)", text)


# ------------------------------------------------------------------ mixtures


def test_a_mixture_is_decoded_and_has_no_folder(finished):
    """The recorded log-probabilities are the mixture's, against full forwards in float64; KL is their difference."""
    folder, found, _ = finished
    assert not (folder / "duet/model").exists()
    members = json.loads((folder / "duet/mixture.json").read_text())["members"]
    assert [(row["model"], row["weight"]) for row in members] == [
        ("reward", 1.0),
        ("conservative", 1.0),
        ("warmup", -1.0),
    ]
    samples = rows(folder / "duet/samples.jsonl")
    result = next(model for model in found["models"] if model["name"] == "duet")
    mean = sum(row["logp"] - row["ref_logp"] for row in samples) / len(samples)
    assert result["kl_to_start"] == pytest.approx(mean, rel=1e-9)
    assert result["reward_mean"] is not None
    assert result["preference"]["helpful"]["held_out"]["kl"] > 0


def test_pairs_are_judged_by_the_mixture(finished):
    """margin = that of reward + that of conservative - that of the warm-up, which is the origin: 0. Z_t does not cancel."""
    folder, found, _ = finished
    data = PreferenceData(
        str(folder / "inputs/helpful.jsonl"), tokenizer=str(folder / "inputs/tokenizer"), max_length=96, cache_dir=None
    )
    data.setup()
    examples = [data.train_examples[i] for i in range(8)]
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name / "model").eval()
        for name in ("reward", "conservative", "warmup")
    ]
    margins = []
    for example in examples:
        gains = []
        for side in (example.chosen, example.rejected):
            ids = torch.tensor([[*example.prompt, *side]])
            with torch.no_grad():
                logp = [model(input_ids=ids).logits[0].double().log_softmax(-1) for model in models]
            mixed = (logp[0] + logp[1] - logp[2]).log_softmax(-1)
            steps = (mixed - logp[2])[len(example.prompt) - 1 : -1]
            gains.append(steps.gather(1, torch.tensor(side)[:, None].long()).sum().item())
        margins.append(gains[0] - gains[1])
    judged = next(model for model in found["models"] if model["name"] == "duet")["preference"]["helpful"]["training"]
    assert judged["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


# ------------------------------------------------------------------ labels


def test_targets_are_those_of_the_scores(finished):
    """MoCAN: sigmoid of the difference of r - lam c, lam that of the run, scores those of the scorer."""
    from rsa_lightning.stories import score

    folder = finished[0]
    found = rows(folder / "labels/pairs.jsonl")
    assert len(found) > 30
    for row in found:
        (r1, c1), (r0, c0) = (score(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        assert (row["chosen_reward"], row["rejected_cost"]) == (r1, c0)
        assert row["target"] == pytest.approx(1 / (1 + math.exp(-((r1 - 4 * c1) - (r0 - 4 * c0)))), abs=1e-12)
    changed = sum(row["target"] < 0.5 for row in found)
    assert 0 < changed < len(found)
    assert f"{len(found)} pairs labelled, {changed} of them changed order" in finished[2]


def test_targets_are_those_of_the_models(finished):
    """PeCAN: w = log-ratio of the one model + 2 times that of the other, sums over tokens, no beta."""
    folder = finished[0]
    data = PreferenceData(
        str(folder / "pecan/pairs.jsonl"), tokenizer=str(folder / "inputs/tokenizer"), max_length=96, cache_dir=None
    )
    data.setup()
    names = ("reward", "conservative", "warmup")
    models = [AutoModelForCausalLM.from_pretrained(folder / name / "model").eval() for name in names]
    for example in [data.train_examples[i] for i in range(5)]:
        worth = []
        for side in (example.chosen, example.rejected):
            ids = torch.tensor([[*example.prompt, *side]])
            index = torch.tensor([*example.prompt, *side])[1:, None].long()
            with torch.no_grad():
                logp = [model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in models]
            one, two, base = (part.gather(1, index)[len(example.prompt) - 1 :].sum().item() for part in logp)
            worth.append((one - base) + 2 * (two - base))
        assert example.target == pytest.approx(sigmoid(worth[0] - worth[1]), abs=1e-4)
    assert min(row["target"] for row in rows(folder / "pecan/pairs.jsonl")) != 0.5


def test_labelled_pairs_fall_on_the_sides_of_their_source(finished):
    """Same prompts, same split: nothing that is judged as held out was trained on."""
    folder = finished[0]
    steps = json.loads((folder / "manifest.json").read_text())["steps"]
    assert steps["mocan"]["data"]["train_pairs"] == steps["reward"]["data"]["train_pairs"]
    assert steps["mocan"]["data"]["validation_pairs"] == steps["reward"]["data"]["validation_pairs"]
    assert steps["mocan"]["data"]["paths"] == [str(folder / "labels/pairs.jsonl")]
    assert steps["labels"]["labels"]["pairs"] == steps["reward"]["data"]["kept"]


def test_an_unchanged_run_is_reused(copy):
    _, printed = run(RUN, copy)
    assert printed.count("reused") == len(RUN["steps"])
    assert "sampled" not in printed


def test_another_multiplier_labels_again_without_asking_the_scorer(copy, monkeypatch):
    """And what learns from the labels runs again; the others do not."""

    def never(*_):
        raise AssertionError("the scorer was asked")

    monkeypatch.setattr("rsa_lightning.labels.score", never)
    _, printed = run(RUN, copy, steps={"labels": {"lam": 0.0}})
    assert "labels: runs again, changed: step.lam" in printed
    assert "mocan: runs again, changed: data" in printed
    assert printed.count("reused") == len(RUN["steps"]) - 2
    for row in rows(copy / "labels/pairs.jsonl"):
        assert row["target"] == pytest.approx(sigmoid(row["chosen_reward"] - row["rejected_reward"]), abs=1e-12)


def test_other_weights_make_another_merge_and_what_starts_from_it(copy):
    _, printed = run(RUN, copy, steps={"soup": {"models": {"reward": 0.75, "conservative": 0.25}}})
    assert "soup: runs again, changed: step.weights" in printed
    assert "further: runs again, changed: lineage" in printed
    assert "duet: reused" in printed


def test_products_that_changed_on_disk_are_made_again(copy):
    (copy / "duet/mixture.json").write_text("{}")
    (copy / "labels/pairs.jsonl").write_text("")
    _, printed = run(RUN, copy)
    assert "duet: runs again, the files of its mixture.json are not those it wrote" in printed
    assert "labels: runs again, the files of its pairs.jsonl are not those it wrote" in printed
    assert printed.count("reused") == len(RUN["steps"]) - 2  # the same pairs again: what learnt from them is kept


# ------------------------------------------------------------------ labels, by hand

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ends \n\nAssistant: here?"}]


def one_pair(tmp_path: Path, tiny_tokenizer, **columns) -> PreferenceData:
    """A file of conversations, set up; the pairs are told apart by their prompts."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = lambda i: {
        "prompt": [*CHAT[:1], {"role": "user", "content": f"{CHAT[1]['content']} {i}"}],
        "chosen": [{"role": "assistant", "content": f" yes, {i}"}],
        "rejected": [{"role": "assistant", "content": "no  "}],
        **columns,
    }
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(20)))
    data = PreferenceData(
        str(tmp_path / "chats.jsonl"),
        template="chatml",
        tokenizer=str(tmp_path / "tokenizer"),
        max_length=192,
        cache_dir=None,
    )
    data.setup()
    return data


def by_length(prompt: str, answer: str) -> tuple[float, float]:
    return float(len(answer)), 1.0 if "no" in answer else 0.0


def test_messages_and_offsets_survive_the_round_trip(tmp_path, tiny_tokenizer):
    """What is written is read again as the same tokens, with the target worked by hand: (7 - 0) - (4 - 3 * 1) = 6."""
    data = one_pair(tmp_path, tiny_tokenizer, offset=0.25)
    pairs = read_pairs(data)
    score_responses(pairs.records, by_length, tmp_path / "scores.jsonl", begun=False)
    found = labelled_rows(pairs.records, weigh_by_scores(tmp_path / "scores.jsonl", 3.0))
    row = next(row for row in found if row["chosen"] == " yes, 3")
    assert row["target"] == pytest.approx(1 / (1 + math.exp(-6)), abs=1e-12)
    assert row["prompt"] == [*CHAT[:1], {"role": "user", "content": "Ends \n\nAssistant: here? 3"}]
    assert (row["offset"], row["rejected"], row["rejected_cost"], row["chosen_reward"]) == (0.25, "no  ", 1.0, 7.0)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    again = PreferenceData(
        str(tmp_path / "pairs.jsonl"),
        template="chatml",
        tokenizer=str(tmp_path / "tokenizer"),
        max_length=192,
        cache_dir=None,
    )
    again.setup()
    for before, after in (
        (data.train_examples, again.train_examples),
        (data.validation_examples, again.validation_examples),
    ):
        one = {(tuple(e.prompt), tuple(e.chosen), tuple(e.rejected), e.offset) for e in before}
        assert one == {(tuple(e.prompt), tuple(e.chosen), tuple(e.rejected), e.offset) for e in after}
        assert {round(e.target, 6) for e in after} <= {round(row["target"], 6) for row in found}


def test_a_response_without_score_leaves_its_pair_out(tmp_path, tiny_tokenizer):
    """And is asked about again where scoring goes on, alone."""
    pairs, path = read_pairs(one_pair(tmp_path, tiny_tokenizer)), tmp_path / "scores.jsonl"
    asked, refused = [], [" yes, 3"]

    def moody(prompt, answer):
        asked.append(answer)
        return (None if answer in refused else 1.0), 0.0

    score_responses(pairs.records, moody, path, begun=False)
    found = labelled_rows(pairs.records, weigh_by_scores(path, 1.0))
    assert [record.chosen for record, row in zip(pairs.records, found, strict=True) if row is None] == [" yes, 3"]
    assert len(asked) == 40
    refused.clear()
    score_responses(pairs.records, moody, path, begun=True)
    assert asked[40:] == [" yes, 3"]
    assert None not in labelled_rows(pairs.records, weigh_by_scores(path, 1.0))


def test_sigmoid_has_no_overflow():
    assert (sigmoid(1e4), sigmoid(-1e4), sigmoid(0.0)) == (1.0, 0.0, 0.5)


# ------------------------------------------------------------------ adapters


QUICK = {"samples_per_prompt": 1, "max_new_tokens": 1}


def test_a_scaled_adapter_is_the_average_of_the_models_around_its_step(tmp_path):
    """In a whole run, with both handovers: base + q s B A = (1 - q) before + q after."""
    pytest.importorskip("peft")
    for handover in ("merge", "stack"):
        config = {
            **RUN,
            "steps": {"warmup": RUN["steps"]["warmup"], "reward": {"kind": "reward", "loss": "DPO", **SGD}},
        }
        config["steps"] |= {
            "safety": {"kind": "safety", "loss": "DPO", **SGD},
            "half": {"kind": "merge", "adapter": "safety", "scale": 0.5},
        }
        options = {
            "lora": {"rank": 2},
            "handover": handover,
            "evaluation": {"pairs": 0, "scorer": None, "sampling": QUICK},
        }
        run(config, tmp_path / handover, **options)
        before, after, half = (weights(tmp_path / handover / name / "model") for name in ("reward", "safety", "half"))
        assert max((after[name] - before[name]).abs().max() for name in before) > 1e-4
        for name, value in half.items():
            assert torch.allclose(value, (before[name] + after[name]) / 2, rtol=0, atol=1e-6)
        assert (tmp_path / handover / "half/adapter/adapter_config.json").is_file()
        _, printed = run(config, tmp_path / handover, **options)
        assert printed.count("reused") == 4


# ------------------------------------------------------------------ the plan

STEPS = {"w": {"kind": "warmup"}, "r": {"kind": "reward"}, "s": {"kind": "safety"}}
MERGE = {"kind": "merge", "models": {"r": 0.5, "s": 0.5}}
MIX = {"kind": "mix", "models": {"r": 0.5, "s": 0.5}}
LABEL = {"kind": "label", "data": "helpful"}
SCORED = {"evaluation": {"scorer": "rsa_lightning.stories.score"}}


def plan(steps: dict, **more):
    fields = {"model": {"config": SHAPE}, "data": {"stories": {}}, "output": "run", **SCORED, **more}
    return read_config({**fields, "steps": {**STEPS, **steps}})


MISTAKES = {
    "loss of a merge": (
        {"m": {**MERGE, "loss": "DPO"}},
        "steps.m.loss: a step of kind merge has none; its keys are models",
    ),
    "trainer of a mixture": (
        {"m": {**MIX, "trainer": {"max_epochs": 1}}},
        "steps.m.trainer: a step of kind mix has none",
    ),
    "start of a label": ({"l": {**LABEL, "start": "r"}}, "steps.l.start: a step of kind label has none"),
    "models of a stage": (
        {"x": {"kind": "reward", "models": {"r": 1}}},
        "steps.x.models belongs to steps of kind merge and mix and label",
    ),
    "lam of a stage": ({"x": {"kind": "reward", "lam": 1.0}}, "steps.x.lam belongs to steps of kind label"),
    "weights": (
        {"m": {"kind": "merge", "models": {"r": 0.5, "s": 0.6}}},
        "steps.m.models must sum to 1, got 0.5 r . 0.6 s",
    ),
    "one model": (
        {"m": {"kind": "mix", "models": {"r": 1.0}}},
        "steps.m.models: a combination needs two models or more",
    ),
    "no models": ({"m": {"kind": "merge"}}, "steps.m: a merge needs models: .* or adapter: NAME with scale"),
    "both": ({"m": {**MERGE, "adapter": "s", "scale": 1.0}}, "steps.m: a merge needs models: .*, and one of them"),
    "a word for a weight": (
        {"m": {"kind": "merge", "models": {"r": "half", "s": 0.5}}},
        "the weight of r must be a finite number, got 'half'",
    ),
    "models as a list": ({"m": {"kind": "merge", "models": ["r", "s"]}}, "steps.m.models must be a mapping"),
    "later member": (
        {"m": {"kind": "merge", "models": {"r": 0.5, "z": 0.5}}, "z": {"kind": "safety"}},
        "steps.m.models.z is 'z': it comes later",
    ),
    "unknown member": (
        {"m": {"kind": "merge", "models": {"r": 0.5, "zz": 0.5}}},
        "steps.m.models.zz is 'zz': it is neither an earlier step nor a folder",
    ),
    "start at a mixture": (
        {"m": MIX, "x": {"kind": "safety", "start": "m"}},
        "steps.x.start is 'm', a step of kind mix, which has no model folder: it exists at decoding only",
    ),
    "reference to a mixture": (
        {"m": MIX, "x": {"kind": "safety", "start": "s", "reference": "m"}},
        "steps.x.reference is 'm', a step of kind mix",
    ),
    "merge of a mixture": (
        {"m": MIX, "x": {"kind": "merge", "models": {"m": 0.5, "s": 0.5}}},
        "steps.x.models.m is 'm', a step of kind mix",
    ),
    "start at labels": (
        {"l": LABEL, "x": {"kind": "safety", "start": "l"}},
        "steps.x.start is 'l', a step of kind label, which has no model folder: it is data",
    ),
    "no scale": ({"m": {"kind": "merge", "adapter": "s"}}, "steps.m.scale must be a finite number, got None"),
    "scale of models": ({"m": {**MERGE, "scale": 0.5}}, "steps.m.scale belongs to adapter"),
    "adapter of nothing": (
        {"m": {"kind": "merge", "adapter": "zz", "scale": 0.5}},
        "steps.m.adapter is 'zz': name an earlier step that trains an adapter",
    ),
    "labels of nothing": ({"l": {"kind": "label"}}, "steps.l.data: name the pairs to label, helpful or safety"),
    "labels of demonstrations": (
        {"l": {"kind": "label", "data": "demonstrations"}},
        "steps.l.data: demonstrations are no pairs",
    ),
    "labels without reference": (
        {"l": {**LABEL, "models": {"r": 1.0}}},
        "steps.l.reference: log-ratios of models need one",
    ),
    "labels with an idle reference": ({"l": {**LABEL, "reference": "w"}}, "steps.l.reference belongs to models"),
    "labels both ways": (
        {"l": {**LABEL, "models": {"r": 1.0}, "reference": "w", "lam": 2.0}},
        "steps.l.lam is for labels by scores, and models are given",
    ),
    "labels of no models": ({"l": {**LABEL, "models": {}, "reference": "w"}}, "steps.l.models is empty"),
    "an infinite multiplier": (
        {"l": {**LABEL, "models": {"r": math.inf}, "reference": "w"}},
        "steps.l.models.r must be a finite number, got inf",
    ),
    "a negative lam": ({"l": {**LABEL, "lam": -1.0}}, "steps.l.lam multiplies the cost and must be at least 0, got -1"),
    "a name that is a source": (
        {"helpful": LABEL},
        "steps.helpful: a step of kind label is a source of data, and there is one of this name",
    ),
    "labels of labels": (
        {"l": LABEL, "k": {"kind": "label", "data": "l"}},
        "steps.k.data is 'l', a step of kind label: it has its labels already",
    ),
    "a warm-up on labels": (
        {"l": LABEL, "x": {"kind": "warmup", "data": "l"}},
        "steps.x.data is 'l', .*a warm-up would ignore its targets",
    ),
    "labels that come later": (
        {"x": {"kind": "reward", "data": "l"}, "l": LABEL},
        "steps.x.data is 'l': it comes later",
    ),
    "data from a model": (
        {"x": {"kind": "reward", "data": "r"}},
        "steps.x.data is 'r', a step of kind reward: only a step of kind label is data",
    ),
    "labels and files": (
        {"l": LABEL, "x": {"kind": "reward", "data": ["l", "safety"]}},
        "steps.x.data mixes l, which a step makes, with given data",
    ),
    "a format of labels": (
        {"l": LABEL, "x": {"kind": "reward", "data": {"source": "l", "format": "hh"}}},
        "steps.x.data.format: the pairs of l are a file of this run",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    steps, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        plan(steps)


def test_null_removes_a_member_of_a_lower_layer():
    found = plan({"m": {"kind": "merge", "models": {"r": 0.5, "s": None, "w": 0.5}}})
    assert found.steps["m"].models == {"r": 0.5, "w": 0.5}


def test_labels_need_a_scorer_or_models():
    with pytest.raises(ValueError, match="steps.l: give scorer .or evaluation.scorer., or models with a reference"):
        plan({"l": LABEL}, evaluation={})


def test_a_step_starts_from_the_last_model_before_it():
    """Labels and mixtures leave none; a merge does. A merge of what was never aligned is where alignment starts."""
    found = Lineage(plan({"m": MERGE, "l": LABEL, "d": MIX, "x": {"kind": "safety"}}))
    assert found.start("x") == "m"
    assert found.origin("x") == found.origin("m") == found.origin("d") == "run/w/model"
    assert found.members("m") == {"run/r/model": 0.5, "run/s/model": 0.5}
    steps = {"v": {"kind": "warmup"}, "m": {"kind": "merge", "models": {"w": 0.5, "v": 0.5}}, "x": {"kind": "reward"}}
    found = Lineage(plan(steps))
    assert found.origin("x") == "run/m/model"
    assert found.origin("m") == "run/w/model"  # itself would be as far away as 0, by construction


REFUSED = {
    "no adapter": (
        {"half": {"kind": "merge", "adapter": "reward", "scale": 0.5}},
        "steps.half.adapter: the step reward trains all weights",
    ),
    "no such scorer": (
        {"labels": {"scorer": "rsa_lightning.stories.nothing"}},
        "steps.labels: .*has no function nothing",
    ),
    "single responses": (
        {"mocan": {"loss": "KTO"}},
        "steps.mocan: labels are of pairs, and KTO.* rates single responses",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_do_is_said_before_anything_is_written(name, tmp_path):
    steps, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        run(RUN, tmp_path / "run", steps=steps)
    assert not (tmp_path / "run").exists()


def test_members_of_another_architecture_are_found_before_anything_is_trained(tiny_llama, tmp_path):
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    files = {"helpful": str(tmp_path / "h.jsonl")}
    lines = [{"prompt": f"Question {i}?", "chosen": f" yes {i}", "rejected": " no"} for i in range(20)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = {"reward": {"kind": "reward"}, "soup": {"kind": "merge", "models": {"reward": 0.5, str(other): 0.5}}}
    config = {"model": {"model": str(tiny_llama)}, "data": files, "steps": steps}
    with pytest.raises(ValueError, match=f"steps.soup: {other} is another architecture than {tiny_llama}"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rated_responses_cannot_be_labelled(tmp_path, tiny_llama):
    lines = [{"prompt": f"Question {i}?", "completion": " yes", "label": True} for i in range(20)]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"model": str(tiny_llama)},
        "data": {"helpful": str(tmp_path / "k.jsonl"), "format": "kto"},
        "steps": {"labels": {**LABEL, "scorer": "rsa_lightning.stories.score"}},
        "evaluation": {"figures": False},
    }
    with pytest.raises(
        ValueError, match="steps.labels: .*format 'kto' holds single responses, and labels are of pairs"
    ):
        run(config, tmp_path / "run")


def test_a_validation_file_stays_one(tmp_path, tiny_llama):
    """Both files are labelled, each for its side; evaluation prompts are held-out ones of the source."""
    for name, first, count in (("train", 0, 24), ("held", 100, 8)):
        lines = [
            {"prompt": f"Question {i}?", "chosen": f" yes {i}", "rejected": " no"} for i in range(first, first + count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"model": str(tiny_llama)},
        "data": {
            "helpful": str(tmp_path / "train.jsonl"),
            "options": {"validation_path": str(tmp_path / "held.jsonl"), "batch_size": 4, "max_length": 64},
        },
        "evaluation": {**RUN["evaluation"], "scorer": f"{__name__}.by_length"},
        "trainer": RUN["trainer"],
        "steps": {"labels": LABEL, "mocan": {"kind": "reward", "data": "labels", "loss": "DPO"}},
    }
    run(config, tmp_path / "run")
    assert len(rows(tmp_path / "run/labels/pairs.jsonl")) == 24
    assert len(rows(tmp_path / "run/labels/validation.jsonl")) == 8
    mocan = json.loads((tmp_path / "run/manifest.json").read_text())["steps"]["mocan"]
    assert (mocan["start"], mocan["data"]["train_pairs"], mocan["data"]["validation_pairs"]) == ("base", 24, 8)
    asked = {row["prompt"] for row in rows(tmp_path / "run/mocan/samples.jsonl")}
    assert asked <= {f"Question {i}?" for i in range(100, 108)}
    assert held_out_prompts({}, 3) == {}


# ------------------------------------------------------------------ costs of a scorer, for a cost transform


def test_a_scorer_brings_costs_to_a_cost_transform(tmp_path, tiny_llama):
    """Pairs without costs: a label step adds the scorer's, and the safety step reads them at s · β/λ."""
    prompts = [prompt for split in stories.prompts() for prompt in split][:30]
    lines = []
    for i, prompt in enumerate(prompts):
        first, second = stories.write(prompt, random.Random(i)), stories.write(prompt, random.Random(i + 100))
        lines.append({"prompt": prompt.text, "chosen": first, "rejected": second})
    (tmp_path / "safety.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"model": str(tiny_llama)},
        "data": {"safety": str(tmp_path / "safety.jsonl"), "options": {"max_length": 200, "anchored_costs": True}},
        "output": str(tmp_path / "run"),
        "beta": 0.1,
        "lam": 2.0,
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
        "evaluation": {"prompts": 2, "pairs": 0, "figures": False, "sampling": {"samples_per_prompt": 1, "max_new_tokens": 2}},
        "steps": {
            "costs": {**LABEL, "data": "safety", "scorer": "rsa_lightning.stories.score", "targets": False},
            "safe": {"kind": "safety", "data": "costs", "loss": "DPO", "cost_transform": {"class_path": "MeanCost"}},
        },
    }  # fmt: skip
    align(config)
    found = rows(tmp_path / "run/costs/pairs.jsonl")
    assert all("target" not in row for row in found)
    assert [row["chosen_cost"] for row in found] == [stories.score(row["prompt"], row["chosen"])[1] for row in found]
    step = json.loads((tmp_path / "run/manifest.json").read_text())["steps"]["safe"]
    assert step["label_scale"] > 0
    assert step["temperature"] == pytest.approx(step["label_scale"] * 0.1 / 2.0)


def test_targets_of_labels_and_of_a_cost_transform_exclude_each_other():
    steps = {
        "l": LABEL,
        "s": {"kind": "safety", "data": "l", "loss": "DPO", "cost_transform": {"class_path": "MeanCost"}},
    }
    with pytest.raises(ValueError, match=r"steps\.s\.cost_transform makes targets, .*set steps\.l\.targets to false"):
        read_config({"model": {"model": "x"}, "evaluation": {"scorer": "rsa_lightning.stories.score"}, "steps": steps})
    off = {"l": {**LABEL, "targets": False, "lam": 2.0}}
    with pytest.raises(ValueError, match=r"steps\.l\.targets false adds a scorer's rewards and costs: remove"):
        read_config({"model": {"model": "x"}, "evaluation": {"scorer": "rsa_lightning.stories.score"}, "steps": off})


def test_a_safety_step_may_name_the_source_safety():
    """Its own name is not a step that labels."""
    step = {"kind": "safety", "data": {"source": "safety"}, "loss": "DPO", "cost_transform": {"class_path": "MeanCost"}}
    steps = {"safety": step, "tail": {**step, "data": "safety"}}
    read_config({"model": {"model": "x"}, "data": {"stories": {}}, "steps": steps})


def test_labelled_pairs_are_read_as_their_source_was():
    """Two criteria may rank one pair oppositely; without targets such pairs must not be dropped as contradictory."""
    label = {**LABEL, "data": {"source": ["helpful", "safety"], "max_length": 90}, "targets": False}
    steps = {"l": label, "s": {"kind": "safety", "data": "l", "loss": "DPO", "cost_transform": "MeanCost"}}
    fields = {"evaluation": {"scorer": "rsa_lightning.stories.score"}, "data": {"stories": {}}, "steps": steps}
    config = read_config({"model": {"model": "x"}, **fields})
    found = labelled_data(config.steps["s"], config)
    assert found["defects"] == {"duplicate": "keep", "contradictory": "keep"}
    assert found["max_length"] == 90
    with pytest.raises(ValueError, match="labelled pairs are rendered as their source"):
        labelled_data(dataclasses.replace(config.steps["s"], data={"source": "l", "template": "hh"}), config)


def test_an_anchored_transform_needs_a_word_about_the_scorer_before_anything_is_trained(tmp_path):
    transform = {"class_path": "Indicator", "init_args": {"threshold": 0.0}}
    steps = {
        "l": {**LABEL, "targets": False},
        "s": {"kind": "safety", "data": "l", "loss": "DPO", "cost_transform": transform},
    }
    config = merge(RUN, {"output": str(tmp_path / "run"), "steps": dict.fromkeys(RUN["steps"])})
    with pytest.raises(ValueError, match=r"steps\.s: Indicator.* if that is so of the scorer's, set data"):
        align(merge(config, {"steps": steps}))
    assert not (tmp_path / "run").exists()
