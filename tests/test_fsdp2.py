"""FSDP2 through the stages: the losses of one process, whatever the processes, meshes and savings."""

import copy
import logging
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from rsa_kernels import ERM, KL, CVaR, RiskMeasure
from short_pairs import write_pairs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from rsa_lightning.adapters import Lora
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.hidden_cache import HiddenCache
from rsa_lightning.losses import DPO, KTO, RSA, TDPO, PreferenceLoss
from rsa_lightning.models import PolicySpec, load_policy
from rsa_lightning.parallel.sharding import Sharding, blocks, fill, gather, shard
from rsa_lightning.parallel.strategy import FSDP2, check_strategy, make_mesh
from rsa_lightning.reference import FrozenCopy, Reference
from rsa_lightning.stages import RewardAlignment

GLOBAL_BATCH = 8
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama, tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, **SMALL},
    "one block": {"model_type": "llama", **SMALL, "num_hidden_layers": 1},
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False, **SMALL},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, **SMALL},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 5.0, **SMALL},
}  # fmt: skip

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of unequal lengths, and a cache of their tokens."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


class EveryLoss(L.Callback):
    """The loss of every batch, averaged over the processes that train on other pairs."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.found.append(module.all_gather(loss).float().mean().item())


def fit(
    pairs: Path,
    strategy: Callable[[], Any] | None = None,
    *,
    architecture: str = "llama, tied",
    loss: PreferenceLoss = RSA(),  # noqa: B008
    risk: RiskMeasure = CVaR(0.1),  # noqa: B008
    reference: Callable[[], Reference | None] = lambda: None,
    lora: Lora | None = None,
    dtype: str = "float32",
    precision: str = "32-true",
    accumulate: int = 1,
    steps: int = 50,
    padding_free: bool = False,
    sharing: int = 1,
) -> dict[str, Any]:
    """Trains, and gives losses per optimizer step, validation figures and the whole weights."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    data = PreferenceData(
        str(pairs / "pairs.jsonl"),
        batch_size=GLOBAL_BATCH * sharing // (world * accumulate),
        max_length=64,
        tokenizer_vocab_size=300,
        defects={"duplicate": "keep"},  # type: ignore[arg-type]
        cache_dir=str(pairs / "cache"),
        padding_free=padding_free,
        validation_fraction=0.12,
    )
    data.prepare()
    stage = RewardAlignment(
        PolicySpec(config=ARCHITECTURES[architecture], lora=lora, dtype=dtype),  # type: ignore[arg-type]
        loss=loss,
        risk=risk,
        reference=reference(),
        beta=0.1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    every = EveryLoss()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy() if strategy else "auto",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[every],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )
    trainer.fit(stage, data)
    trainer.validate(stage, data, verbose=False)
    assert stage.policy is not None
    return {
        "losses": torch.tensor(every.found).view(-1, accumulate).mean(1),
        "validation": {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name},
        "weights": gather(stage.policy) if isinstance(stage.policy, FSDPModule) else stage.policy.state_dict(),
        "checkpoint": list(trainer.strategy.lightning_module_state_dict()),
        "optimised": sum(len(group["params"]) for group in trainer.optimizers[0].param_groups),
    }


def compare(one: dict[str, Any], found: dict[str, Any], tolerance: float) -> None:
    assert len(found["losses"]) == len(one["losses"])
    assert one["losses"][-1] < one["losses"][0] - 0.05  # something was learnt
    torch.testing.assert_close(found["losses"], one["losses"], rtol=0, atol=tolerance)
    assert found["validation"] == pytest.approx(one["validation"], rel=1e-3, abs=20 * tolerance)
    assert found["checkpoint"] == one["checkpoint"]
    assert found["optimised"] == one["optimised"]


CASES: dict[str, dict[str, Any]] = {
    "RSA": {},
    "DPO, head of its own": {"loss": DPO(), "architecture": "llama"},
    "TDPO": {"loss": TDPO(), "risk": KL(), "steps": 20},
    "ERM": {"risk": ERM(1.0), "steps": 20},
    "KTO": {"loss": KTO(), "steps": 20},  # prompts meet responses of the same process's batch, so other ones
    "adapter": {"lora": Lora(rank=4), "steps": 30},
    "adapter beside a copy": {"lora": Lora(rank=4), "reference": FrozenCopy, "steps": 20},
    "packed": {"padding_free": True, "steps": 20},
    "qwen3": {"architecture": "qwen3", "steps": 20},
    "gpt_neox": {"architecture": "gpt_neox", "steps": 20},
    "gemma2": {"architecture": "gemma2", "steps": 20},
}


@pytest.fixture(scope="module")
def alone(pairs: Path) -> dict[str, dict[str, Any]]:
    """Every case by one process without FSDP2."""
    return {name: fit(pairs, **settings) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def of_two(pairs: Path) -> dict[str, dict[str, Any]]:
    return on_ranks(2, lambda rank: {name: fit(pairs, FSDP2, **settings) for name, settings in CASES.items()})[0]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, alone, of_two):
    """Policy and reference sharded, the same pairs in every optimizer step: the same losses, to rounding."""
    compare(alone[case], of_two[case], 5e-3 if case == "KTO" else 1e-5)
    for name, weight in alone[case]["weights"].items():
        torch.testing.assert_close(of_two[case]["weights"][name], weight, rtol=0, atol=2e-3 if case == "KTO" else 2e-4)


@pytest.mark.parametrize("replicas", [1, 2])
def test_four_processes_train_as_one(replicas, pairs, alone):
    """Sharded over four, and two replicas of two shards."""
    found = on_ranks(4, lambda rank: fit(pairs, lambda: FSDP2(replicas=replicas)))[0]
    compare(alone["RSA"], found, 1e-5)


def test_one_process_is_a_world_of_one(pairs, alone):
    found = on_ranks(1, lambda rank: fit(pairs, FSDP2))[0]
    compare(alone["RSA"], found, 1e-6)


SAVINGS: dict[str, dict[str, Any]] = {
    "activation checkpointing": {"strategy": lambda: FSDP2(activation_checkpointing=True)},
    "cpu offload": {"strategy": lambda: FSDP2(cpu_offload=True)},
    "weights kept after forward": {"strategy": lambda: FSDP2(reshard_after_forward=False)},
    "accumulation": {"strategy": FSDP2, "accumulate": 2},
    "accumulation, reduced every time": {"strategy": lambda: FSDP2(reduce_every_microbatch=True), "accumulate": 2},
    "tensor parallel": {"strategy": lambda: FSDP2(tensor_parallel=2), "sharing": 2},
}


@pytest.fixture(scope="module")
def with_savings(pairs: Path) -> dict[str, dict[str, Any]]:
    return on_ranks(2, lambda rank: {name: fit(pairs, **settings, steps=20) for name, settings in SAVINGS.items()})[0]


@pytest.mark.parametrize("saving", SAVINGS)
def test_what_saves_memory_or_time_changes_no_result(saving, with_savings, alone):
    expected = alone["RSA"]["losses"][:20]
    torch.testing.assert_close(with_savings[saving]["losses"], expected, rtol=0, atol=1e-5)


def test_tensor_and_data_parallel_at_once(pairs, alone):
    """Four processes: two that share matrices, twice."""
    found = on_ranks(4, lambda rank: fit(pairs, lambda: FSDP2(tensor_parallel=2), sharing=2, steps=20))[0]
    torch.testing.assert_close(found["losses"], alone["RSA"]["losses"][:20], rtol=0, atol=1e-5)


def test_a_cache_made_by_two_processes_is_that_of_one(pairs, alone, tmp_path):
    """Hidden states written by a sharded policy, and read in place of a reference."""
    cached = {"reference": lambda: HiddenCache(str(tmp_path)), "steps": 20}
    found = on_ranks(2, lambda rank: fit(pairs, FSDP2, **cached))[0]
    torch.testing.assert_close(found["losses"], alone["RSA"]["losses"][:20], rtol=0, atol=1e-5)
    chunks = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = fit(pairs, **cached)  # one process, the same cache
    torch.testing.assert_close(again["losses"], alone["RSA"]["losses"][:20], rtol=0, atol=1e-5)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == chunks


@pytest.mark.parametrize(
    ("precision", "options"),
    [("bf16-mixed", {}), ("bf16-true", {}), ("32-true", {"lora": Lora(rank=4), "dtype": "bfloat16"})],
)
def test_low_precision_stays_near_one_process(precision, options, pairs):
    """Not to rounding: FSDP2 holds gathered weights and residuals in bfloat16, where autocast keeps some in float32."""
    settings = {"precision": precision, "steps": 20, **options}
    one = fit(pairs, **settings)
    found = on_ranks(2, lambda rank: fit(pairs, FSDP2, **settings))[0]
    torch.testing.assert_close(found["losses"], one["losses"], rtol=0, atol=2e-3)
    held = {name: weight.dtype for name, weight in one["weights"].items()}
    assert {name: weight.dtype for name, weight in found["weights"].items()} == held  # master weights in float32


# ---------------------------------------------------------------------- sharding alone


def sharded(architecture: str, spoil: Callable[[Any], None] = lambda source: None, **options: Any) -> tuple[Any, Any]:
    """A sharded policy on two processes, and the plain copy it was made of."""
    spec = PolicySpec(config={**ARCHITECTURES[architecture], "vocab_size": 64})
    source, policy = load_policy(spec), load_policy(spec, weights=False)
    how = Sharding(make_mesh("cpu", dist.get_world_size(), 1, 1)["shard"], **options)
    shard(policy, how)
    spoil(source)
    fill(policy, source if dist.get_rank() == 0 else None, torch.device("cpu"), how)
    return policy, source


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_meta_device_leaves_nothing_behind(architecture):
    """Weights, tied ones still tied, and buffers that no state dict holds, are those of the plain copy on every rank."""

    def check(rank: int) -> None:
        policy, source = sharded(architecture)
        tied = source.head.weight is source.model.get_input_embeddings().weight
        assert (policy.head.weight is policy.model.get_input_embeddings().weight) == tied
        assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in source.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
        for name, parameter in source.named_parameters():
            assert torch.equal(dict(policy.named_parameters())[name].full_tensor(), parameter)
        buffers = dict(policy.named_buffers())
        assert buffers
        assert all(torch.equal(buffers[name], buffer) for name, buffer in source.named_buffers())

    on_ranks(2, check)


def test_each_process_holds_its_share():
    """No process holds more than half of the weights of any block, and none a whole copy."""

    def share(rank: int) -> tuple[int, int]:
        policy, source = sharded("llama")
        local = sum(parameter.to_local().numel() for parameter in policy.parameters())  # type: ignore[attr-defined]
        return local, sum(parameter.numel() for parameter in source.parameters())

    (first, whole), (second, _) = on_ranks(2, share)
    assert first + second == whole
    assert max(first, second) < 0.52 * whole


@pytest.mark.parametrize("planted", ["garbage in a buffer", "an untied head"])
def test_a_sharded_model_that_computes_something_else_is_refused(planted):
    """The verification bites: without the restored buffers, or with weights that belong to another place."""

    def broken(rank: int) -> str:
        def spoil(source: Any) -> None:
            if planted == "an untied head":
                weight = source.model.get_input_embeddings().weight
                source.model.get_input_embeddings().weight = torch.nn.Parameter(weight.detach() + 0.1)
            else:
                frequencies = source.model.model.rotary_emb.inv_freq
                original = copy.deepcopy(frequencies)
                source.model.model.rotary_emb.register_forward_pre_hook(
                    lambda module, args: module.inv_freq.copy_(original * 1.5)
                )

        try:
            sharded("llama, tied", spoil)
        except RuntimeError as error:
            return str(error)
        return "accepted"

    assert all("does not compute what it did" in told for told in on_ranks(2, broken))


def test_units_are_blocks_and_the_head():
    """An untied head is gathered for itself; a tied one with the root, whose forward the head's is a part of."""

    def units(rank: int) -> list[list[str]]:
        found = []
        for architecture in ("llama", "llama, tied"):
            policy, _ = sharded(architecture)
            assert all(isinstance(block, FSDPModule) for block in blocks(policy))
            found.append([name for name, module in policy.named_modules() if isinstance(module, FSDPModule)])
        return found

    own, tied = on_ranks(1, units)[0]
    assert own == ["", "model.model.layers.0", "model.model.layers.1", "model.lm_head"]
    assert tied == own[:-1]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": 0}, r"strategy.replicas is a number of processes, at least 1, got 0"),
        ({"tensor_parallel": -1}, r"strategy.tensor_parallel is a number of processes, at least 1, got -1"),
    ],
)
def test_sizes_are_checked_when_they_are_read(settings, message):
    with pytest.raises(ValueError, match=message):
        FSDP2(**settings)


def test_a_mesh_that_does_not_divide_the_world_is_refused():
    with pytest.raises(ValueError, match=r"replicas 3 x tensor_parallel 1 does not divide the run's 4 processes"):
        make_mesh("cpu", 4, 3, 1)


@pytest.mark.parametrize("name", ["ModelParallelStrategy", "FSDPStrategy"])
def test_strategies_that_train_something_else_are_refused(name):
    """Automatic sizes let all devices of a node train on the same pairs; FSDP1 gathers the head elsewhere."""
    with pytest.raises(ValueError, match=r"Set trainer.strategy to FSDP2"):
        check_strategy(getattr(L.pytorch.strategies, name)())


def test_quantised_weights_are_not_sharded():
    spec = PolicySpec(model="x", lora=Lora(), quantize="4bit")
    with pytest.raises(ValueError, match="weights in 4 or 8 bits cannot be sharded"):
        FSDP2().load(spec, None)


def test_tensor_parallelism_names_what_it_knows(pairs):
    def told(rank: int) -> str:
        try:
            fit(pairs, lambda: FSDP2(tensor_parallel=2), architecture="gpt_neox", sharing=2, steps=1)
        except ValueError as error:
            return str(error)
        return "accepted"

    assert all("llama, mistral, qwen2" in text for text in on_ranks(2, told))


def test_blocks_are_compiled(pairs):
    """torch.compile of each block: the same losses. Traced and differentiated ahead of time, without code generation."""
    small = {"architecture": "one block", "loss": DPO(), "steps": 3}

    def compiled(rank: int) -> dict[str, Any]:
        count = CompileCounterWithBackend("aot_eager")
        torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=count)  # type: ignore[assignment]
        found = fit(pairs, lambda: FSDP2(compile=True), **small)
        assert count.frame_count > 0
        return found

    found = on_ranks(1, compiled)[0]
    torch.testing.assert_close(found["losses"], fit(pairs, **small)["losses"], rtol=0, atol=1e-5)


def test_gradients_are_reduced_once_per_step(pairs):
    """Of two micro-batches the first only adds up: half the reductions."""

    def count(every: bool) -> Callable[[int], int]:
        def counted(rank: int) -> int:
            calls, reduce = [0], _fsdp_param_group.foreach_reduce

            def counting(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                return reduce(*args, **kwargs)

            _fsdp_param_group.foreach_reduce = counting  # in a process of its own
            fit(pairs, lambda: FSDP2(reduce_every_microbatch=every), accumulate=2, steps=3)
            return calls[0]

        return counted

    once, twice = (on_ranks(2, count(every))[0] for every in (False, True))
    assert twice == 2 * once > 0
