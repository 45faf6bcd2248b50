"""Checkpoints of sharded stages: training goes on as if it had not been stopped, on any number of processes."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from short_pairs import write_pairs
from transformers import LlamaForCausalLM

from rsa_lightning.adapters import Lora
from rsa_lightning.cli import main
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.losses import DPO
from rsa_lightning.models import PolicySpec
from rsa_lightning.parallel import shards
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.stages import RewardAlignment, SafetyAlignment
from rsa_lightning.transforms import Hinge

GLOBAL_BATCH = 8
SAVED, LAST = 3, 6  # optimizer steps, of the 15 of an epoch
ROUNDING = 2e-6  # of float32 sums in another order, over six steps
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with costs, and a cache of their tokens."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), costs)


def costs(i: int) -> dict[str, Any]:
    return {"chosen_cost": 0.0, "rejected_cost": float(i % 6), "chosen_safe": True, "rejected_safe": i % 6 == 0}


class Watch(L.Callback):
    """The loss of every step, averaged over processes; a checkpoint after SAVED steps."""

    def __init__(self, save: Path | None) -> None:
        self.losses: list[float] = []
        self.save = save

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(module.all_gather(outputs["loss"].detach()).float().mean().item())
        if self.save is not None and trainer.global_step == SAVED:
            trainer.save_checkpoint(self.save)


def build(pairs: Path, *, safety: bool = False, freeze: str = "", **spec: Any) -> tuple[Any, PreferenceData]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    data = PreferenceData(
        str(pairs / "pairs.jsonl"),
        batch_size=GLOBAL_BATCH // world,
        max_length=64,
        tokenizer_vocab_size=300,
        defects={"duplicate": "keep"},  # type: ignore[arg-type]
        cache_dir=str(pairs / "cache"),
        validation_fraction=0.12,
    )
    data.prepare()
    options: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), "loss": DPO()}
    policy = PolicySpec(**{"config": LLAMA} | spec)
    if safety:
        return SafetyAlignment(policy, cost_transform=Hinge(1.0, 0.1), **options), data
    stage: Any = RewardAlignment(policy, beta=0.1, **options)
    if freeze:
        configure = stage.configure_model

        def freezing() -> None:
            configure()
            for name, parameter in stage.policy.named_parameters():
                parameter.requires_grad_(freeze not in name)

        stage.configure_model = freezing
    return stage, data


def fit(
    pairs: Path,
    strategy: Callable[[], Any] | None = None,
    *,
    save: Path | None = None,
    resume: Path | None = None,
    steps: int = LAST,
    **options: Any,
) -> dict[str, Any]:
    stage, data = build(pairs, **options)
    watch = Watch(save)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy=strategy() if strategy else "auto",
        max_steps=steps,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        limit_val_batches=0,
    )
    trainer.fit(stage, data, ckpt_path=resume, weights_only=True)
    return {"losses": watch.losses, "labels": getattr(stage, "labels", None)}


def on(count: int, pairs: Path, strategy: Callable[[], Any] = FSDP2, **options: Any) -> dict[str, Any]:
    """Trains under FSDP2 on so many processes, one of them in a group of its own."""
    return on_ranks(count, lambda rank: fit(pairs, strategy, **options))[0]


def refused(pairs: Path, path: Path, cases: list[tuple[dict[str, Any], str]]) -> None:
    """Every process of two raises the ValueError, so that none waits for another."""

    def resumed(rank: int) -> None:
        for options, said in cases:
            with pytest.raises(ValueError, match=said):
                fit(pairs, FSDP2, resume=path, **options)

    on_ranks(2, resumed)


@pytest.fixture(scope="module")
def two(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint of two processes, and the losses of the run that went on."""
    path = tmp_path_factory.mktemp("two") / "step.ckpt"
    return path, on(2, pairs, save=path)["losses"]


def test_a_resumed_run_is_bitwise_the_one_that_went_on(pairs, two):
    path, losses = two
    assert path.is_dir()
    assert losses[-1] < losses[0] - 0.05  # something is learnt
    assert on(2, pairs, resume=path)["losses"] == losses[SAVED:]


@pytest.mark.parametrize("count", [1, 4])
def test_shards_of_two_go_on_with_other_numbers_of_processes(pairs, two, count):
    path, losses = two
    assert on(count, pairs, resume=path)["losses"] == pytest.approx(losses[SAVED:], abs=ROUNDING)


def test_replicated_shards_go_on_with_two(pairs, two, tmp_path):
    losses = on(4, pairs, lambda: FSDP2(replicas=2), save=tmp_path / "hybrid.ckpt")["losses"]
    assert losses == pytest.approx(two[1], abs=ROUNDING)
    found = on(2, pairs, resume=tmp_path / "hybrid.ckpt")["losses"]
    assert found == pytest.approx(losses[SAVED:], abs=ROUNDING)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_a_plain_file_goes_on_with_two_and_theirs_with_one(pairs, tmp_path, lora):
    """Numbered optimizer states, with an adapter of the trained weights alone, find the right ones both ways."""
    plain, gathered = tmp_path / "plain.ckpt", tmp_path / "gathered.ckpt"
    losses = fit(pairs, save=plain, lora=lora)["losses"]
    whole = on(2, pairs, lambda: FSDP2(save_distributed_checkpoint=False), save=gathered, lora=lora)["losses"]
    assert whole == pytest.approx(losses, abs=ROUNDING)
    assert gathered.is_file()
    for path in (plain, gathered):
        assert on(2, pairs, resume=path, lora=lora)["losses"] == pytest.approx(losses[SAVED:], abs=ROUNDING)
        assert fit(pairs, resume=path, lora=lora)["losses"] == pytest.approx(losses[SAVED:], abs=ROUNDING)


def test_a_checkpoint_of_an_adapter_holds_what_is_trained(pairs, tmp_path, tiny_llama):
    path, lora = tmp_path / "adapter.ckpt", Lora(rank=4)
    spec = {"config": None, "model": str(tiny_llama), "lora": lora}
    losses = on(2, pairs, save=path, **spec)["losses"]
    names = list(shards.stored_weights(path, shards.read_rest(path)))
    assert names
    assert all(".lora_" in name for name in names)
    assert on(2, pairs, resume=path, **spec)["losses"] == losses[SAVED:]
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    model = LlamaForCausalLM.from_pretrained(other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    refused(
        pairs,
        path,
        [
            ({**spec, "lora": Lora(rank=2)}, r"lora_A.default.weight is \(4, 64\) in the checkpoint, \(2, 64\) here"),
            (
                {**spec, "lora": Lora(rank=4, target_modules=["q_proj"])},
                "down_proj.lora_A.* is no trained parameter here",
            ),
            ({**spec, "model": str(other)}, "holds an adapter of another model: the frozen weights differ"),
        ],
    )


def test_the_reference_is_in_no_checkpoint(two):
    """Every weight occurs once, and with two moments and a count in the optimizer: nothing else is as large."""
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(two[0]).read_metadata().state_dict_metadata
    weights = {name for name in entries if name.startswith("state_dict.")}
    assert {name.split(".")[1] for name in weights} == {"policy"}
    moments = {name for name in entries if name.endswith((".exp_avg", ".exp_avg_sq"))}
    assert len(moments) == 2 * len(weights)
    assert not [name for name in entries if "reference" in name]


def test_another_model_is_refused_by_the_first_weight_that_differs(pairs, two):
    changes = [
        ({"num_hidden_layers": 1}, r"policy.model.model.layers.1.*is no trained parameter here"),
        ({"num_hidden_layers": 3}, r"policy.model.model.layers.2.*is missing in the checkpoint"),
        ({"intermediate_size": 48}, r"layers.0.mlp.down_proj.weight is \(32, 64\) in the checkpoint, \(32, 48\) here"),
    ]
    refused(pairs, two[0], [({"config": LLAMA | change}, said) for change, said in changes])


def test_a_frozen_parameter_has_no_optimizer_state_and_goes_on(pairs, tmp_path):
    path = tmp_path / "frozen.ckpt"
    losses = on(2, pairs, save=path, freeze="layers.0.")["losses"]
    assert on(2, pairs, resume=path, freeze="layers.0.")["losses"] == losses[SAVED:]


def test_the_scale_of_labels_survives(pairs, tmp_path):
    path = tmp_path / "labels.ckpt"
    before = on(2, pairs, save=path, safety=True)
    after = on(2, pairs, resume=path, safety=True)
    assert after["losses"] == before["losses"][SAVED:]
    assert after["labels"].scale == before["labels"].scale


def test_a_kill_between_shards_leaves_the_earlier_checkpoint(pairs, two, tmp_path, monkeypatch):
    """The second save of a name dies after one process has written; what is left is neither taken nor in the way."""
    path = shutil.copytree(two[0], tmp_path / "last.ckpt")

    def killed(rank: int) -> None:
        from torch.distributed.checkpoint import FileSystemWriter

        write = FileSystemWriter.write_data

        def dies(self: Any, *arguments: Any) -> Any:
            if rank == 1:
                raise OSError("killed")
            return write(self, *arguments)

        FileSystemWriter.write_data = dies  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="could not be written .*last.ckpt: killed"):
            fit(pairs, FSDP2, save=path)

    on_ranks(2, killed)
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", ".partial"}
    assert list((tmp_path / ".partial").iterdir())  # the shard of the first process
    monkeypatch.chdir(tmp_path)
    callback = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    assert callback._find_last_checkpoints(L.Trainer(logger=False, callbacks=[callback])) == {str(path)}
    assert on(2, pairs, resume=path)["losses"] == two[1][SAVED:]
    on(2, pairs, save=path, steps=SAVED)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("lost", "said"),
    [("__1_0.distcp", "cannot be read .*__1_0.distcp"), (".metadata", "cannot be read"), ("meta.pt", "has no meta.pt")],
)
def test_what_is_lost_is_said_as_a_value_error(pairs, two, tmp_path, lost, said):
    path = shutil.copytree(two[0], tmp_path / "damaged.ckpt")
    os.remove(path / lost)
    refused(pairs, path, [({}, said)])


def test_without_fsdp2_a_folder_of_shards_is_refused_with_the_mend(pairs, two, capsys):
    policy = [f"--model.policy.config={json.dumps(LLAMA)}"]
    config = ["fit", "-c", "configs/reward.yaml", "--data.path", str(pairs / "pairs.jsonl")]
    assert main([*config, *policy, "--model.policy.model", "null", "--ckpt_path", str(two[0])]) == 1
    assert "a folder of shards, which FSDP2 alone reads: add --trainer.strategy fsdp2" in capsys.readouterr().err
