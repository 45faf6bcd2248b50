"""From file to loaders: nothing is lost silently, no prompt is on both sides, interrupted runs continue in order."""

import copy
import json
import logging
import os
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from rsa_lightning.checkpoint import file_hash
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.prepare import split_by_prompt
from rsa_lightning.data.records import ASSISTANT, FormatError, PreferencePair, split_key

pytestmark = [
    # about every loader that Lightning cannot rewind itself; test_an_interrupted_run_continues_in_order shows ours can
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
SHORT = {"max_length": 48, "tokenizer_vocab_size": 280}


def write_pairs(path: Path, n: int, prompts: int | None = None, **columns: object) -> Path:
    """n rows in TRL's format over `prompts` different prompts (default: all different)."""
    rows = [
        {"prompt": f"Question {i % (prompts or n)}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(n)
    ]
    path.write_text("".join(json.dumps({**row, **columns}) + "\n" for row in rows))
    return path


class Recorder(L.LightningModule):
    """Trains one number, and remembers which rows it saw in which epoch."""

    def __init__(self, roles: tuple[str, ...] | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[str]]] = []
        if roles:
            self.roles = roles

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["row_ids"]))
        return self.weight * batch["labels"].numel()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options) -> L.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "use_distributed_sampler": False}
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": "callbacks" in options,
    }
    return L.Trainer(default_root_dir=folder, **(defaults | quiet | options))


def attached(data: PreferenceData, module: object = None, **trainer_state) -> PreferenceData:
    """The data as a trainer with this state would hold it."""
    state = {"world_size": 1, "global_rank": 0, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}
    progress = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)),
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0))),
    )
    data.trainer = SimpleNamespace(lightning_module=module, fit_loop=progress, **(state | trainer_state))
    return data


# --- what is read, and what is reported


def test_report_accounts_for_every_row(tmp_path, caplog):
    path = write_pairs(tmp_path / "a.jsonl", 60)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "", "rejected": "no"}) + "\n")
        file.write(json.dumps({"prompt": "p", "chosen": "no", "rejected": "no"}) + "\n")
    data = PreferenceData(str(path), **SHORT)
    with caplog.at_level(logging.DEBUG, logger="rsa_lightning"):
        data.setup()
        data.setup()
    report = data.report
    assert (report["rows"], report["kept"], report["skipped"]) == (62, 60, {"empty": 1, "identical": 1})
    assert report["train_pairs"] == len(data.train_examples) == 60 - report["validation_pairs"]
    assert report["sha256"] == {str(path): file_hash(path)}
    assert report["tokens"]["prompt"]["max"] <= 24
    assert data.skipped_rows == {"empty": ["a.jsonl:61"], "identical": ["a.jsonl:62"]}
    assert json.loads(json.dumps(report)) == report
    [line] = [record.message for record in caplog.records if record.name.startswith("rsa_lightning.data")]
    assert "62 rows; skipped: empty 1, identical 1; " in line


def test_tokenizer_is_trained_on_the_training_side_only(tmp_path):
    """A word that only validation text repeats is no token: it stays in pieces."""
    train, validation = write_pairs(tmp_path / "a.jsonl", 20), tmp_path / "b.jsonl"
    rows = [{"prompt": f"xylophone {i}", "chosen": "xylophone", "rejected": "no"} for i in range(20)]
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(train), validation_path=str(validation), **SHORT)
    data.setup()
    assert len(data.tokenizer.tokenize("xylophone")) == len("xylophone")
    assert len(data.tokenizer.tokenize("Question")) < len("Question")


def test_the_policy_brings_its_tokenizer(tmp_path, tiny_llama, tiny_tokenizer):
    path = str(write_pairs(tmp_path / "a.jsonl", 30))
    for spec in ({"model": str(tiny_llama), "tokenizer": None}, {"model": None, "tokenizer": str(tiny_llama)}):
        data = attached(PreferenceData(path), SimpleNamespace(policy_spec=SimpleNamespace(**spec)))
        data.setup()
        assert data.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    named = PreferenceData(path, tokenizer=str(tiny_llama))
    named.setup()
    assert named.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()


def test_several_files_are_read_as_one(tmp_path):
    paths = [
        str(write_pairs(tmp_path / f"{name}.jsonl", n, chosen=f"Yes, {name}.")) for name, n in (("a", 20), ("b", 30))
    ]
    data = PreferenceData(paths, **SHORT)
    data.setup()
    assert data.report["rows"] == len([*data.train_prompts, *data.validation_prompts]) == 50
    assert list(data.report["sha256"]) == paths
    assert not set(data.train_prompts) & set(data.validation_prompts)
    with pytest.raises(ValueError, match="several different ones"):
        PreferenceData([paths[0], paths[0]])


# --- the split


def test_no_prompt_is_on_both_sides(tmp_path):
    data = PreferenceData(str(write_pairs(tmp_path / "a.jsonl", 400, prompts=100)), validation_fraction=0.3, **SHORT)
    data.setup()
    train, validation = set(data.train_prompts), set(data.validation_prompts)
    assert not train & validation
    assert len(train | validation) == 100
    assert 15 <= len(validation) <= 45  # 30 expected; 3.3 standard deviations of a binomial each way


def test_longer_versions_of_a_dialogue_stay_with_the_shorter():
    start = [f"\n\nHuman: question {i}{ASSISTANT}" for i in range(50)]
    pairs = [PreferencePair(p, " a", " b") for p in start]
    pairs += [PreferencePair(f"{p} a\n\nHuman: and?{ASSISTANT}", " c", " d") for p in start]
    train, validation = split_by_prompt(pairs, 0.4, seed=0)
    assert not {split_key(p.prompt) for p in train} & {split_key(p.prompt) for p in validation}
    assert len(train) % 2 == len(validation) % 2 == 0
    assert len(validation) > 0


def test_more_rows_move_no_prompt_and_another_seed_does():
    pairs = [PreferencePair(f"q{i}", "a", "b") for i in range(200)]
    few, many = split_by_prompt(pairs[:50], 0.2, seed=1), split_by_prompt(pairs[::-1], 0.2, seed=1)
    assert set(few[0]) <= set(many[0])
    assert set(few[1]) <= set(many[1])
    assert set(split_by_prompt(pairs, 0.2, seed=2)[1]) != set(many[1])


def test_training_rows_that_share_a_prompt_with_the_validation_file_are_dropped(tmp_path):
    train, validation = write_pairs(tmp_path / "a.jsonl", 20), write_pairs(tmp_path / "b.jsonl", 5)
    data = PreferenceData(str(train), validation_path=str(validation), **SHORT)
    data.setup()
    assert data.report["skipped"] == {"in_validation_file": 5}
    # the prompts are Question 0 to 19 and 0 to 4
    assert list(data.train_prompts) == [f"Question {i}?" for i in range(5, 20)]
    assert len(data.validation_examples) == 5


# --- mistakes


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 30])
def test_validation_fraction_outside_0_1_is_an_error(fraction):
    with pytest.raises(ValueError, match=rf"validation_fraction is a share of the prompts in \(0, 1\), got {fraction}"):
        PreferenceData("a.jsonl", validation_fraction=fraction)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"limit": 0}])
def test_sizes_below_one_are_errors(option):
    [name] = option
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PreferenceData("a.jsonl", **option)


def test_nothing_left_is_an_error(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl", 8, chosen="same", rejected="same")
    with pytest.raises(FormatError, match=r"no usable pair is left \(skipped: identical 8\)"):
        PreferenceData(str(path), **SHORT).setup()


def test_an_empty_side_is_an_error_with_the_fix(tmp_path):
    path = str(write_pairs(tmp_path / "a.jsonl", 20, prompts=1))
    with pytest.raises(FormatError, match=r"no pair is left for validation .*raise validation_fraction \(0.001\)"):
        PreferenceData(path, validation_fraction=0.001, **SHORT).setup()
    with pytest.raises(FormatError, match=r"no pair is left for training .*lower validation_fraction \(0.999\)"):
        PreferenceData(path, validation_fraction=0.999, **SHORT).setup()


def test_fewer_pairs_than_one_step_takes_is_an_error(tmp_path):
    data = PreferenceData(str(write_pairs(tmp_path / "a.jsonl", 30)), batch_size=4, **SHORT)
    data.setup()
    assert len(data.train_dataloader()) >= 5
    attached(data, world_size=2, accumulate_grad_batches=4)
    with pytest.raises(ValueError, match=r"one optimizer step takes: 32 \(batch_size 4 x 2 processes x .* 4\)"):
        data.train_dataloader()


def test_demonstrations_do_for_a_warm_up_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(40)))
    warm_up = attached(PreferenceData(str(path), format="demonstration", **SHORT), SimpleNamespace(roles=("chosen",)))
    warm_up.setup()
    batch = next(iter(warm_up.train_dataloader()))
    assert batch["roles"].tolist() == [0] * 8
    comparing = attached(PreferenceData(str(path), format="demonstration", **SHORT), SimpleNamespace())
    with pytest.raises(FormatError, match=r"40 of 40 examples .* have one response, and this stage compares two"):
        comparing.setup()


def write_rated(path: Path, desirable: int, undesirable: int) -> Path:
    """Rated responses to different prompts."""
    labels = [True] * desirable + [False] * undesirable
    rows = [{"prompt": f"Question {i}?", "completion": f"Yes {i}.", "label": label} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rated_responses_do_for_a_loss_without_pairs_and_half_of_them_for_a_warm_up(tmp_path):
    path = str(write_rated(tmp_path / "a.jsonl", 40, 20))
    data = PreferenceData(path, format="kto", batch_size=20, **SHORT)
    attached(data, SimpleNamespace(roles=("chosen", "rejected"), needs_pairs=False)).setup()
    assert data.report["kept"] == len(data.train_examples) + len(data.validation_examples) == 60
    assert "undesirable" not in data.report["skipped"]
    assert set(next(iter(data.train_dataloader()))["roles"].tolist()) == {0, 1}
    attached(data, SimpleNamespace(roles=("chosen",), needs_pairs=False)).setup()
    assert data.report["skipped"] == {"undesirable": 20}
    assert data.report["kept"] == len(data.train_examples) + len(data.validation_examples) == 40
    assert len(data.train_prompts) == len(data.train_examples) == data.report["train_pairs"]
    assert sorted(data.skipped_rows["undesirable"]) == sorted(f"a.jsonl:{i}" for i in range(41, 61))
    assert {role for batch in data.train_dataloader() for role in batch["roles"].tolist()} == {0}
    # the next stage sees all of them again
    attached(data, SimpleNamespace(roles=("chosen", "rejected"), needs_pairs=False)).setup()
    assert data.report["kept"] == 60
    attached(data, SimpleNamespace(roles=("chosen", "rejected"), needs_pairs=True))
    with pytest.raises(FormatError, match=r"60 of 60 examples of format 'kto' have one response"):
        data.setup()


def test_a_warm_up_without_demonstrations_is_an_error(tmp_path):
    path = str(write_rated(tmp_path / "a.jsonl", 0, 40))
    data = attached(PreferenceData(path, format="kto", **SHORT), SimpleNamespace(roles=("chosen",)))
    with pytest.raises(FormatError, match="all train responses are undesirable ones"):
        data.setup()


# --- the loaders


def test_the_stage_chooses_the_roles(tmp_path):
    path = str(write_pairs(tmp_path / "a.jsonl", 40))
    for roles, rows in [(("chosen",), 8), (("chosen", "rejected"), 16), (("chosen", "rejected", "mismatched"), 24)]:
        data = attached(PreferenceData(path, **SHORT), SimpleNamespace(roles=roles))
        data.setup()
        assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == rows
        assert all(len(batch["row_ids"]) >= min(2, len(roles)) for batch in data.val_dataloader())


def test_ranks_share_one_global_batch_and_all_validation_pairs(tmp_path):
    path = str(write_pairs(tmp_path / "a.jsonl", 101))

    def batches(kind: str, world_size: int, batch_size: int, rank: int) -> list[list[str]]:
        data = PreferenceData(path, batch_size=batch_size, validation_fraction=0.3, **SHORT)
        attached(data, world_size=world_size, global_rank=rank).setup()
        return [batch["row_ids"] for batch in getattr(data, kind)()]

    one = batches("train_dataloader", 1, 8, 0)
    for world_size in (2, 4):
        ranks = [batches("train_dataloader", world_size, 8 // world_size, rank) for rank in range(world_size)]
        assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == one
        ranks = [batches("val_dataloader", world_size, 3, rank) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1
        everything = [row for rank in ranks for batch in rank for row in batch]
        alone = [row for batch in batches("val_dataloader", 1, 3, 0) for row in batch]
        assert sorted(everything) == sorted(alone)
        assert len(set(everything)) == len(everything)


def test_loaders_leave_the_global_generator_alone(tmp_path):
    data = PreferenceData(str(write_pairs(tmp_path / "a.jsonl", 40)), **SHORT)
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_no_batch(tmp_path):
    path = str(write_pairs(tmp_path / "a.jsonl", 40))
    seen = []
    for num_workers in (0, 2):
        data = PreferenceData(path, num_workers=num_workers, **SHORT)
        data.setup()
        seen.append([batch["labels"].tolist() for batch in data.train_dataloader()])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("stop", [3, 5, 7])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_continues_in_order(tmp_path, stop, accumulate):
    """Two epochs in one go, and the same stopped at an optimizer step (mid-epoch or at its end) and resumed."""
    path = str(write_pairs(tmp_path / "a.jsonl", 50))

    def run(max_steps: int, checkpoint: str | None = None, **options) -> list[tuple[int, list[str]]]:
        module = Recorder()
        data = PreferenceData(path, batch_size=8 // accumulate, **SHORT)
        run = trainer(tmp_path, max_epochs=3, max_steps=max_steps, accumulate_grad_batches=accumulate, **options)
        run.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return module.seen

    whole = run(-1)
    per_epoch = len(whole) // 3
    assert per_epoch == 5 * accumulate
    assert len({tuple(row for _, ids in whole[e * per_epoch :][:per_epoch] for row in ids) for e in range(3)}) == 3
    save = ModelCheckpoint(tmp_path / "ckpt", filename="stopped", every_n_train_steps=stop)
    first = run(stop, callbacks=[save])
    assert first == whole[: stop * accumulate]
    assert run(-1, str(tmp_path / "ckpt" / "stopped.ckpt")) == whole[stop * accumulate :]


def test_resuming_on_other_data_is_refused(tmp_path):
    path, other = write_pairs(tmp_path / "a.jsonl", 50), write_pairs(tmp_path / "b.jsonl", 60)
    save = ModelCheckpoint(tmp_path / "ckpt", filename="stopped", every_n_train_steps=2)
    trainer(tmp_path, max_steps=2, callbacks=[save]).fit(Recorder(), PreferenceData(str(path), **SHORT))
    checkpoint = str(tmp_path / "ckpt" / "stopped.ckpt")
    with pytest.raises(ValueError, match=r"other data settings \(sha256: .*training pairs: "):
        trainer(tmp_path, max_steps=4).fit(Recorder(), PreferenceData(str(other), **SHORT), ckpt_path=checkpoint)
    changed = PreferenceData(str(path), batch_size=4, **SHORT)
    with pytest.raises(ValueError, match="pairs per batch over all processes: 8 then, 4 now"):
        trainer(tmp_path, max_steps=4).fit(Recorder(), changed, ckpt_path=checkpoint)
    # measuring on other data is no resumed run
    trainer(tmp_path).validate(Recorder(), PreferenceData(str(other), **SHORT), ckpt_path=checkpoint, verbose=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"template": "hh", "max_length": 64}, "training examples"),
        ({"length_bucketing": True}, "length_bucketing: False then, True now"),
        ({"defects": {"duplicate": "keep"}}, None),
        ({"num_workers": 2}, None),
    ],
)
def test_a_resumed_run_may_change_what_changes_no_batch(change, named, tmp_path):
    path = str(write_pairs(tmp_path / "a.jsonl", 50))
    save = ModelCheckpoint(tmp_path / "ckpt", filename="stopped", every_n_train_steps=2)
    options = SHORT | {"max_length": 64}
    trainer(tmp_path, max_steps=2, callbacks=[save]).fit(Recorder(), PreferenceData(path, **options))
    again = trainer(tmp_path, max_steps=4)
    resume = partial(again.fit, Recorder(), ckpt_path=str(tmp_path / "ckpt" / "stopped.ckpt"))
    if named is None:
        resume(PreferenceData(path, **(options | change)))
        assert again.global_step == 4
    else:
        with pytest.raises(ValueError, match=named):
            resume(PreferenceData(path, **(options | change)))


def test_bucketed_steps_of_another_size_are_refused_on_resume(tmp_path):
    """They are other pairs; without bucketing, the batches of a position are the same whatever is accumulated."""
    path = str(write_pairs(tmp_path / "a.jsonl", 50))
    for bucketing in (True, False):
        once, twice = (
            attached(PreferenceData(path, length_bucketing=bucketing, **SHORT), accumulate_grad_batches=n)
            for n in (1, 2)
        )
        for data in (once, twice):
            data.prepare()
            data.trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
        if bucketing:
            with pytest.raises(ValueError, match="pairs per bucketed step: 8 then, 16 now"):
                twice.load_state_dict(once.state_dict())
        else:
            twice.load_state_dict(once.state_dict())


def test_length_bucketing_pads_less_and_resumes_in_order(tmp_path):
    rows = [
        {"prompt": f"Question {i}?", "chosen": "yes " * (1 + i * i % 23), "rejected": "no " * (1 + i % 7)}
        for i in range(200)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def padding(**options) -> float:
        data = PreferenceData(str(tmp_path / "a.jsonl"), max_length=128, tokenizer_vocab_size=280, **options)
        data.setup()
        masks = [batch["attention_mask"] for batch in data.train_dataloader()]
        return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)

    plain, bucketed = padding(), padding(length_bucketing=True)
    assert bucketed < 0.75 * plain

    def run(max_steps: int, checkpoint: str | None = None, **options) -> list[tuple[int, list[str]]]:
        module = Recorder()
        data = PreferenceData(
            str(tmp_path / "a.jsonl"), length_bucketing=True, max_length=128, tokenizer_vocab_size=280
        )
        trainer(tmp_path, max_epochs=2, max_steps=max_steps, **options).fit(
            module, data, ckpt_path=checkpoint, weights_only=True
        )
        return module.seen

    whole = run(-1)
    save = ModelCheckpoint(tmp_path / "ckpt", filename="stopped", every_n_train_steps=7)
    assert run(7, callbacks=[save]) == whole[:7]
    assert run(-1, str(tmp_path / "ckpt" / "stopped.ckpt")) == whole[7:]


def test_settings_parse_from_the_command_line():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(PreferenceData, "data")
    one = parser.parse_args(["--data.path=a.jsonl", "--data.format=hh", "--data.max_prompt_length=100"])
    assert (one.data.path, one.data.format, one.data.max_prompt_length) == ("a.jsonl", "hh", 100)
    assert parser.parse_args(['--data.path=["a.jsonl", "b.jsonl"]']).data.path == ["a.jsonl", "b.jsonl"]


@pytest.mark.skipif("RSA_TEST_DATA" not in os.environ, reason="RSA_TEST_DATA names no folder with the HH files")
@pytest.mark.parametrize("name", ["hh_helpful_base_test", "hh_harmless_base_test"])
def test_hh_files_become_batches(name):
    path = Path(os.environ["RSA_TEST_DATA"]) / f"{name}.jsonl.gz"
    data = PreferenceData(str(path), format="hh", max_length=256)
    data.setup()
    report = data.report
    assert report["rows"] == report["kept"] + sum(report["skipped"].values())
    assert set(report["skipped"]) <= {"empty", "identical", "prompt_mismatch"}  # tokenising loses none
    keys = [{split_key(prompt) for prompt in prompts} for prompts in (data.train_prompts, data.validation_prompts)]
    assert not keys[0] & keys[1]
    eos = data.tokenizer.eos_token_id
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape[1] <= 256
        ends = batch["cu_seqlens"][1:] - 1
        assert (batch["labels"][ends] == eos).all()
        assert (batch["labels"] == eos).sum() == len(ends)


@pytest.mark.parametrize(("template", "said"), [("chatml", True), ("tokenizer", False), (None, False)])
def test_a_template_that_replaces_the_tokenizers_own_says_so(
    template, said, tiny_tokenizer, tmp_path, caplog, monkeypatch
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(tmp_path / "p.jsonl"), tokenizer=str(tmp_path / "tokenizer"), template=template)
    monkeypatch.setattr(logging.getLogger("rsa_lightning"), "propagate", True)
    with caplog.at_level("INFO"):
        data.prepare()
    assert ("replaces the tokenizer's own chat template" in caplog.text) == said


# --- costs


def costly(n: int = 40, **columns: object) -> list[dict[str, object]]:
    """Rows of which every second chosen response costs 1, every rejected one 2."""
    return [
        {"prompt": f"Q{i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}.", "chosen_cost": i % 2, "rejected_cost": 2}
        | columns
        for i in range(n)
    ]


def flagged(n: int = 40) -> list[dict[str, object]]:
    return [{**row, "chosen_safe": row["chosen_cost"] <= 0, "rejected_safe": False} for row in costly(n)]


def ready(path: Path, rows: list[dict], **options) -> PreferenceData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(path), **SHORT | options)
    data.setup()
    return data


def test_costs_reach_every_batch(tmp_path):
    data = attached(ready(tmp_path / "a.jsonl", costly(), batch_size=4))
    expected = {f"a.jsonl:{i + 1}": i % 2 for i in range(40)}
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    for batch in batches:
        assert batch["chosen_costs"].tolist() == [expected[name] for name in batch["row_ids"]]
        assert set(batch["rejected_costs"].tolist()) == {2.0}
    table = data.train_examples
    assert table.numbers("chosen_cost").tolist() == [example.chosen_cost for example in table]
    assert table.select([3, 1]).numbers("chosen_cost").tolist() == [table[3].chosen_cost, table[1].chosen_cost]


def test_a_missing_cost_is_nan_in_the_column(tmp_path):
    rows = costly()
    rows[7]["rejected_cost"] = None
    data = ready(tmp_path / "a.jsonl", rows)
    nan = [e.row_id for t in (data.train_examples, data.validation_examples) for e, c in
           zip(t, t.numbers("rejected_cost"), strict=True) if c != c]  # fmt: skip
    assert nan == ["a.jsonl:8"]


def test_safety_labels_in_every_row_anchor_costs_and_nothing_else_does(tmp_path):
    assert ready(tmp_path / "flags.jsonl", flagged()).anchored_costs
    assert not ready(tmp_path / "bare.jsonl", costly()).anchored_costs
    assert not ready(tmp_path / "some.jsonl", [*flagged()[:-1], costly()[-1]]).anchored_costs
    assert not ready(tmp_path / "none.jsonl", [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(30)]
                     ).anchored_costs  # fmt: skip
    assert ready(tmp_path / "bare.jsonl", costly(), anchored_costs=True).anchored_costs
    assert not ready(tmp_path / "flags.jsonl", flagged(), anchored_costs=False).anchored_costs


def test_labels_that_disagree_with_costs_are_counted_unless_costs_are_not_anchored(tmp_path):
    rows = flagged()
    rows[4]["chosen_safe"] = False  # it costs 0
    for anchored in (None, True):
        data = ready(tmp_path / "a.jsonl", rows, anchored_costs=anchored)
        assert data.skipped_rows == {"contradictory": ["a.jsonl:5"]}
        assert data.anchored_costs
    assert ready(tmp_path / "a.jsonl", rows, anchored_costs=False).report["kept"] == 40
    kept = ready(tmp_path / "a.jsonl", rows, defects={"contradictory": "keep"})
    assert (kept.report["kept"], kept.anchored_costs) == (40, False)
