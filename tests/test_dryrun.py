"""The dry run: its estimates beside steps that are really taken, its collectives beside those that are really made."""

import dataclasses
import gc
import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from rsa_kernels import CVaR
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from rsa_lightning.adapters import Lora
from rsa_lightning.cli import main
from rsa_lightning.config import load_layers
from rsa_lightning.data.batch import EncodedPair, collate
from rsa_lightning.dryrun.command import count_rows, dry_run
from rsa_lightning.dryrun.fake_step import Footprint, Work, take_step
from rsa_lightning.dryrun.footprint import fake_processes, footprint
from rsa_lightning.dryrun.meter import Call, Meter
from rsa_lightning.dryrun.planned import sent_by_formula, step_flops
from rsa_lightning.losses import DPO, RSA, PreferenceLoss
from rsa_lightning.models import PolicySpec
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.reference import FrozenCopy, Reference
from rsa_lightning.stages import RewardAlignment
from tests.processes import on_ranks

ROOT = Path(__file__).parents[1]
MIB = 2**20
MEASURED_STEP = 2  # the third: states are there, and gradients of the step before


@dataclass(frozen=True)
class Case:
    """A small step: rows of `tokens`, of which `scored`."""

    vocabulary: int
    width: int
    layers: int
    pairs: int
    tokens: int
    scored: int
    tied: bool = False
    accumulate: int = 1
    rank: int | None = None  # of an adapter
    loss: PreferenceLoss = RSA(risk_weight=0.5)  # noqa: RUF009 (frozen)
    fsdp2: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> PolicySpec:
        config = {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.width * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": self.tied,
        }
        return PolicySpec(config=config, lora=None if self.rank is None else Lora(rank=self.rank))

    def stage(self, reference: Reference | None = None) -> RewardAlignment:
        optimizer = partial(torch.optim.AdamW, lr=1e-4)
        return RewardAlignment(self.spec, self.loss, CVaR(0.97), reference, beta=0.1, optimizer=optimizer)

    def trainer(self, world: int, sharded: bool, *callbacks: L.Callback) -> L.Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return L.Trainer(
            accelerator="cpu",
            devices=world,
            strategy=FSDP2(**self.fsdp2) if sharded else "auto",
            max_steps=MEASURED_STEP + 1,
            max_epochs=1,
            gradient_clip_val=1.0,
            accumulate_grad_batches=self.accumulate,
            use_distributed_sampler=False,
            inference_mode=False,
            callbacks=list(callbacks),
            **quiet,
        )

    def fit(self, world: int, sharded: bool, callback: L.Callback) -> None:
        count, prompt = self.pairs * self.accumulate * (MEASURED_STEP + 1), [1] * (self.tokens - self.scored)
        pairs: Any = [EncodedPair(prompt, [2] * self.scored, [3] * self.scored, row_id=str(i)) for i in range(count)]
        loader: Any = DataLoader(
            pairs, batch_size=self.pairs, collate_fn=partial(collate, roles=("chosen", "rejected"))
        )
        self.trainer(world, sharded, callback).fit(self.stage(), loader)

    def estimate(self, world: int, sharded: bool, reference: Reference | None = None) -> Footprint:
        strategy = self.trainer(1, sharded).strategy
        work = Work(self.pairs, self.tokens, self.scored, self.accumulate, clip=True, device="cpu")
        return footprint(self.stage(reference), self.spec, strategy, strategy.precision_plugin, work, world)


class Within(L.Callback):
    """Calls `begin` and `end` around the measured optimizer step."""

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == MEASURED_STEP * self.accumulate:
            self.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == (MEASURED_STEP + 1) * self.accumulate - 1:
            self.end()

    def begin(self) -> None: ...

    def end(self) -> None: ...


class Peak(Within):
    """Most bytes of tensors in a step: those that Python reaches before it, and what the profiler sees made and freed.

    It sees what operators hold inside themselves, and no releases of what is older than itself: old gradients are
    subtracted when they are freed. What gloo makes in one thread and frees in another looks alive, so of the processes
    the one where less of it happened counts. Tensors that earlier tests left in this forked process are not the run's.
    """

    FREED: ClassVar[str] = "old gradients are freed"

    def __init__(self, accumulate: int) -> None:
        super().__init__(accumulate)
        self.inherited = {id(found): found for found in tensors()}  # kept, so that no new one takes such an address

    def begin(self) -> None:
        gc.collect()
        own = (storage(found) for found in tensors() if id(found) not in self.inherited)
        self.before = sum({s.data_ptr(): s.nbytes() for s in own}.values())
        self.old: int | None = None
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if getattr(self, "old", 0) is None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.old = sum({s.data_ptr(): s.nbytes() for s in map(storage, grads)}.values())
            with record_function(self.FREED):
                pass

    def end(self) -> None:
        self.profile.__exit__(None, None, None)
        alive = self.peak = self.before
        events = self.profile.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() in ("[memory]", self.FREED)), key=lambda e: e.start_ns()):
            alive += event.nbytes() if event.name() == "[memory]" else -(self.old or 0)
            self.peak = max(self.peak, alive)


class Calls(Within):
    """The collectives of a step."""

    def begin(self) -> None:
        self.meter = Meter()
        self.meter.__enter__()

    def end(self) -> None:
        self.meter.__exit__(None, None, None)
        self.found = self.meter.calls


def tensors() -> list[torch.Tensor]:
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and type(found) is not torch.Size]


def storage(tensor: Any) -> torch.UntypedStorage:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


def peak_of(rank: int, case: Case, world: int, sharded: bool) -> int:
    callback = Peak(case.accumulate)
    case.fit(world, sharded, callback)
    return callback.peak


def calls_of(rank: int, case: Case, world: int) -> list[Call]:
    callback = Calls(case.accumulate)
    case.fit(world, True, callback)
    return callback.found


SHAPES = {
    "many layers": Case(512, 128, 8, pairs=4, tokens=128, scored=64),
    "large vocabulary": Case(16000, 128, 2, pairs=4, tokens=128, scored=64),
    "large vocabulary, tied": Case(16000, 128, 2, pairs=4, tokens=128, scored=64, tied=True),
    "long rows": Case(512, 128, 4, pairs=1, tokens=1024, scored=512),
    "weights, accumulated": Case(2000, 256, 4, pairs=1, tokens=64, scored=32, accumulate=3),
    "an adapter": Case(2000, 256, 3, pairs=2, tokens=128, scored=64, rank=8),
    "no risk": Case(8000, 128, 2, pairs=4, tokens=128, scored=64, loss=DPO()),
}
SHARDED = {
    **SHAPES,
    "checkpointing": Case(512, 128, 4, 4, 256, 64, fsdp2={"activation_checkpointing": True}),
    "kept gathered": Case(512, 256, 6, 1, 64, 32, fsdp2={"reshard_after_forward": False}),
}
# all of them agree within 7 %; these take less time than the others
ALONE_HERE = ("large vocabulary, tied",)
SHARDED_HERE = ("weights, accumulated", "an adapter", "checkpointing")


@pytest.mark.parametrize("name", ALONE_HERE)
def test_the_peak_of_one_process_is_the_measured_one(name):
    measured = on_ranks(1, peak_of, SHAPES[name], 1, False)[0]
    estimated = sum(SHAPES[name].estimate(1, False).peak.values())
    assert estimated == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("name", SHARDED_HERE)
def test_the_peak_of_each_of_two_processes_is_the_measured_one(name):
    measured = min(on_ranks(2, peak_of, SHARDED[name], 2, True))
    estimated = sum(SHARDED[name].estimate(2, True).peak.values())
    assert estimated == pytest.approx(measured, rel=0.08)


def check_collectives(case):
    """Every one of them, by operation, group and bytes; phases are the dry run's own. Returns those that were made."""
    made = Counter(call._replace(phase="") for call in on_ranks(2, calls_of, case, 2)[0])
    planned: Counter[Call] = Counter()
    for call, count in case.estimate(2, True).calls.items():
        planned[call._replace(phase="")] += count  # type: ignore[assignment]
    assert planned == made
    return made


def test_the_collectives_below_an_adapter_are_those_that_are_made():
    """Frozen weights are gathered every batch, those outside the blocks too, and adapters alone are reduced."""
    case = Case(512, 64, 2, pairs=1, tokens=32, scored=16, rank=4)
    made = check_collectives(case)
    assert sum(made.values()) == 2 * 3 + 2 + 2 + 1  # blocks by reference, forward, backward; the others; adapters; norm
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 176)) * 4
    assert sum(n * call.bytes for call, n in made.items() if call.operation == "reduce-scatter") == adapters


def test_the_collectives_of_two_processes_are_those_that_are_made():
    """With three accumulated batches."""
    case = Case(512, 64, 3, pairs=1, tokens=32, scored=16, accumulate=3)
    made = check_collectives(case)
    # gathered: four units by the policy's forward, three blocks again in backward and three by the reference
    gathers = sum(count for call, count in made.items() if call.operation == "all-gather")
    assert gathers == 3 * (5 + 3 + 3)
    often = dataclasses.replace(case, fsdp2={"reduce_every_microbatch": True}).estimate(2, True)
    reduced = [
        sum(n for call, n in found.items() if call.operation == "reduce-scatter") for found in (made, often.calls)
    ]
    assert reduced == [5, 15]


@pytest.mark.parametrize("fsdp2", [{"activation_checkpointing": True}, {"reshard_after_forward": False}])
def test_what_further_blocks_add_is_exact(fsdp2):
    """Two shallow models say of nine blocks what nine blocks say, wherever both look."""
    case = Case(256, 64, 9, pairs=1, tokens=32, scored=16, fsdp2=fsdp2)
    strategy = case.trainer(1, True).strategy
    with fake_processes(4):
        strategy.arrange(4, "cpu")
        work = Work(1, 32, 16, clip=True, device="cpu")
        options = {"strategy": strategy, "precision": strategy.precision_plugin, "work": work, "world_size": 4}
        whole, alike = take_step(case.stage(), case.spec, **options)
    found = case.estimate(4, True)
    assert alike
    assert found.calls == whole.calls
    assert (found.trained, found.total) == (whole.trained, whole.total)
    assert found.peaks == {mark: whole.peaks[mark] for mark in found.peaks}
    assert sum(found.peak.values()) == sum(whole.peak.values())


def test_shards_are_those_of_the_largest_process():
    """Seven rows over four processes: two for the first, and padding that FSDP2 keeps with it."""
    case = Case(7, 4, 1, pairs=1, tokens=8, scored=4)
    found = case.estimate(4, True)
    # embeddings and head 7 x 4 (2 rows of 4), norms 4 (1), q and o 4 x 4 (4), k and v 2 x 4 (4), mlp 11 x 4 and 4 x 11
    shards = 4 * (2 * 2 * 4 + 3 * 1 + 2 * 4 + 2 * 4 + 2 * 3 * 4 + 1 * 11)
    assert abs(found.peak["parameters"] - shards) <= 64  # frequencies of the rotary embedding


def test_optimizers_without_states_hold_none():
    case = Case(64, 16, 1, pairs=1, tokens=8, scored=4)
    stage, strategy = case.stage(), case.trainer(1, True).strategy
    held = {}
    for name, momentum in (("plain", 0.0), ("momentum", 0.9)):
        stage.optimizer = partial(torch.optim.SGD, lr=0.1, momentum=momentum)
        work = Work(1, 8, 4, device="cpu")
        held[name] = footprint(stage, case.spec, strategy, strategy.precision_plugin, work, 2).peak
    assert held["plain"]["optimizer"] == 0
    assert held["momentum"]["optimizer"] == pytest.approx(held["momentum"]["parameters"], rel=0.01)


class OnDisk(Reference):
    """Stands for a reference that is read and not computed."""

    live = False

    def prepare(self, policy: Any, load: Any = None) -> None: ...

    def place(self, policy: Any) -> None: ...

    def states(self, batch: Any) -> Any:
        raise AssertionError("a dry run reads nothing")


def test_a_cached_reference_is_a_head_and_the_states_of_a_batch():
    case = Case(1000, 64, 3, pairs=1, tokens=32, scored=16)
    found, live = case.estimate(2, True, OnDisk()), case.estimate(2, True, FrozenCopy())
    assert found.peak["reference"] == 1000 * 64 * 4
    assert found.sent("reference") == 0 < live.sent("reference")


def test_the_group_of_a_dry_run_is_gone_afterwards():
    with pytest.raises(ValueError, match="does not divide the run's 3 processes"):
        Case(64, 16, 1, 1, 8, 4, fsdp2={"replicas": 2}).estimate(3, True)
    assert not dist.is_initialized()


def test_storages_that_are_resized_live_and_die():
    """FSDP2 frees what it has gathered by taking the storage away from the tensor."""
    with Meter() as meter:
        whole = torch.empty(1000, dtype=torch.uint8)
        meter.mark("freed")
        whole.untyped_storage().resize_(0)
        meter.mark("again")
        whole.untyped_storage().resize_(400)
        meter.name("gathered", whole)
        meter.mark("gone")
        del whole
        meter.mark("end")
    held = {mark.phase: sum(kinds.values()) for mark, kinds in meter.peaks().items()}
    assert held == {"start": 1000, "freed": 1000, "again": 400, "gone": 400, "end": 0}
    assert {mark.phase: kinds["gathered"] for mark, kinds in meter.peaks().items()}["freed"] == 1000


@pytest.mark.parametrize(
    ("operation", "sent"), [("all-gather", 750.0), ("reduce-scatter", 750.0), ("all-reduce", 1500.0)]
)
def test_a_ring_sends_all_but_its_own_part(operation, sent):
    assert Call("forward", operation, 4, 1000).sent == sent


# ---- the command -----------------------------------------------------------------------------------------------------

SMALL = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    },
    "steps": {"safety": {"kind": "safety", "schedule": {"kind": "cosine", "warmup": 0.1}}},
    "data": {"options": {"batch_size": 2, "max_length": 64, "tokenizer_vocab_size": 300}},
}


def test_the_layers_of_sizes_plan_what_their_names_say():
    layers = [ROOT / "configs" / name for name in ("pku.yaml", "sizes/llama_70b.yaml")]
    config = load_layers(layers)
    config["steps"] = {"reward": config["steps"]["reward"]}
    console = Console(record=True, width=120)
    (step,) = dry_run(config, 64, console)
    assert step.found.total == pytest.approx(70.55e9, rel=1e-3)
    assert step.found.peak["parameters"] == pytest.approx(step.found.total * 4 / 64, rel=1e-3)
    assert step.found.peak["optimizer"] == pytest.approx(step.found.total * 8 / 64, rel=1e-3)
    assert step.found.peak["reference"] == pytest.approx(step.found.total * 2 / 64, rel=1e-3)
    assert sum(step.found.peak.values()) < 80e9
    assert step.found.sent() == pytest.approx(sent_by_formula(step), rel=1e-3)
    # 6 N D for the policy, 2 for the reference and 2 for checkpointing, and what attention and head add
    tokens = 4 * 1024
    assert 10 * 69.5e9 * tokens < step_flops(step) < 1.1 * 10 * 70.6e9 * tokens
    text = console.export_text()
    assert "all-gather over 64" in text
    assert "not known" in text  # pku.yaml names no file


def test_the_schedule_counts_rows(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(100)))
    assert count_rows(str(rows)) == 100
    assert count_rows(str(tmp_path / "none.jsonl")) is None
    console = Console(record=True, width=120)
    config = {**SMALL, "data": {**SMALL["data"], "safety": str(rows)}, "trainer": {"accumulate_grad_batches": 2}}
    dry_run(config, 4, console)
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["pairs", "per", "optimizer", "step", "16"] in lines
    assert ["pairs,", "at", "most", "90"] in lines  # a tenth is held out
    assert ["optimizer", "steps,", "at", "most", "5"] in lines


@pytest.mark.parametrize(
    ("limits", "told"), [({"max_steps": 7}, "7"), ({}, "not known"), ({"max_steps": 7, "max_epochs": 1}, "5")]
)
def test_steps_without_a_limit_of_epochs_are_those_of_max_steps(limits, told, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(100)))
    console = Console(record=True, width=120)
    trainer = {"accumulate_grad_batches": 2, "max_epochs": -1, **limits}
    dry_run({**SMALL, "data": {**SMALL["data"], "safety": str(rows)}, "trainer": trainer}, 4, console)
    line = next(line for line in console.export_text().splitlines() if "optimizer steps, at most" in line)
    assert line.replace("│", " ").split()[4:] == told.split()


def test_other_strategies_hold_everything_and_say_so():
    console = Console(record=True, width=300)
    (alone,) = dry_run(SMALL, 1, console)
    assert "not FSDP2" not in console.export_text()
    (step,) = dry_run(SMALL, 4, console)
    assert "trainer.strategy is not FSDP2: every GPU holds everything" in console.export_text()
    assert step.found.peak["parameters"] == alone.found.peak["parameters"] >= 4 * step.found.total
    assert step.found.sent() == pytest.approx(2 * 3 / 4 * 4 * step.found.total, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "--dry-run and --world-size N belong together"),
        (["--world-size", "8"], "--dry-run and --world-size N belong together"),
        (["--dry-run", "--world-size", "0"], "at least 1, got 0"),
        (
            ["--dry-run", "--world-size", "9", "--trainer.strategy.init_args.replicas", "2"],
            "steps.warmup: strategy.replicas 2 x tensor_parallel 1 does not divide the run's 9 processes",
        ),
        (
            ["--dry-run", "--world-size", "8", "--trainer.strategy.init_args.tensor_parallel", "2"],
            "a dry run does not know strategy.tensor_parallel 2 yet",
        ),
        (
            ["--dry-run", "--world-size", "8", "--model.config.num_attention_heads", "3"],
            "steps.warmup: policy.config: no causal llama can be made of it (Class validation error for validator "
            "'validate_architecture': ValueError: The hidden size (128) is not a multiple of the number of attention heads",
        ),
        (
            ["--dry-run", "--world-size", "8", "--model.config.model_type", "llamma"],
            "known to transformers: is it llama",
        ),
        (["--dry-run", "--world-size", "8", "--model.model", "/no/where"], "there is no /no/where/config.json"),
        (["--dry-run", "--world-size", "8", "--data.options.max_length", "1024"], "the model knows 512 positions"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    layers = [str(ROOT / "configs" / name) for name in ("pku.yaml", "fsdp2.yaml")]
    assert main(["align", *(word for layer in layers for word in ("-c", layer)), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "none.yaml"], "there is no configuration file none.yaml"),
        (["-c", "pku.yaml", "--dry-run", "--world-size", "0"], "at least 1, got 0"),
        (["-c", "pku.yaml", "--dry-run"], "belong together"),
    ],
)
def test_what_the_command_line_alone_shows_is_said_before_anything_heavy_is_imported(
    arguments, message, capsys, monkeypatch
):
    for module in (
        "rsa_lightning.plan",
        "rsa_lightning.pipeline",
        "rsa_lightning.dryrun.command",
        "transformers.utils",
    ):
        monkeypatch.setitem(sys.modules, module, None)  # an import raises
    monkeypatch.chdir(ROOT / "configs")
    assert main(["align", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("mamba", "mamba has no num_attention_heads"), ("jamba", "jamba has layers of other kinds")],
)
def test_models_with_state_spaces_are_refused_in_one_line(model_type, why, caplog):
    with pytest.raises(ValueError, match=f"whose layers all attend, and the configuration of {why}$"):
        dry_run({**SMALL, "model": {"config": {"model_type": model_type}}}, 2)
    assert "Can't set" not in caplog.text


def test_the_share_that_is_trained_is_a_percentage():
    """An adapter of rank 1 on the queries: 2 x (64 + 64), of those and the 139,072 of two layers, embeddings and head."""
    for lora, share in ((None, "100 %"), ({"rank": 1, "target_modules": ["q_proj"]}, "0.184 %")):
        console = Console(record=True, width=120)
        (step,) = dry_run({**SMALL, "lora": lora}, 1, console)
        assert (step.found.trained, step.found.total) == ((256, 139_328) if lora else (139_072, 139_072))
        [line] = [line for line in console.export_text().splitlines() if "of these trained" in line]
        assert line.replace("│", " ").split()[-2:] == share.split()


def told(config, world_size):
    """What a dry run prints below its tables."""
    console = Console(record=True, width=400)
    dry_run(config, world_size, console)
    return [line.strip() for line in console.export_text().splitlines() if line.startswith("- ")]


@pytest.mark.parametrize(
    ("layout", "world_size", "refused"),
    [
        ({"devices": 2, "num_nodes": 4}, 4, "devices 2 x trainer.num_nodes 4 is not 4, the processes planned for"),
        ({"devices": "auto", "num_nodes": 3}, 4, "devices auto x trainer.num_nodes 3 is not 4"),
        ({"devices": 2, "num_nodes": 2}, 4, None),
        ({"devices": 2}, 4, None),  # nodes are those that torchrun started
        ({"devices": "auto"}, 4, None),
    ],
)
def test_processes_that_the_trainer_would_refuse_are_told(layout, world_size, refused):
    notes = [note for note in told({**SMALL, "trainer": layout}, world_size) if "num_nodes" in note]
    assert [refused in note for note in notes] == ([] if refused is None else [True])


@pytest.mark.parametrize(("rows", "refused"), [(17, True), (18, False)])
def test_pairs_too_few_for_an_optimizer_step_are_told(rows, refused, tmp_path):
    """Of 17 pairs 15 are trained on, of 18 pairs 16; a step takes 2 x 4 x 2."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n" * rows)
    config = {**SMALL, "data": {**SMALL["data"], "safety": str(file)}, "trainer": {"accumulate_grad_batches": 2}}
    notes = [note for note in told(config, 4) if "would be refused" in note]
    assert len(notes) == refused
    assert all("15 pairs are fewer than one optimizer step takes, 16 (batch_size 2 x 4 processes" in n for n in notes)


def test_a_file_that_is_not_there_is_told():
    notes = told({**SMALL, "data": {**SMALL["data"], "safety": "/no/where.jsonl"}}, 1)
    assert notes == [
        "- data.safety: there is no /no/where.jsonl here, so its rows are not counted; training would refuse it"
    ]
    assert told({**SMALL, "data": {**SMALL["data"], "safety": "owner/of-the-hub"}}, 1) == []


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = [str(ROOT / "configs" / name) for name in ("hh.yaml", "fsdp2.yaml")]
    arguments = ["--steps.warmup", "null", "--steps.safety", "null"]
    assert main(["align", "-c", layers[0], "-c", layers[1], "--dry-run", "--world-size", "2", *arguments]) == 0
    assert list(tmp_path.iterdir()) == []
