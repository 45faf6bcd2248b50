"""Lightning's door to FSDP2: data parallel over every process, checkpoints in shards."""

import logging
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.strategies.fsdp import FSDPStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedTokenizerBase

from rsa_lightning import packing
from rsa_lightning.models import Policy, PolicySpec, load_policy
from rsa_lightning.parallel import shards
from rsa_lightning.parallel.processes import backend_of
from rsa_lightning.parallel.sharding import Sharding, fill, shard
from rsa_lightning.parallel.tensor import parallelize
from rsa_lightning.parsing import first_line

log = logging.getLogger(__name__)

PARTIAL = ".partial"  # a checkpoint that is being written
T = TypeVar("T")
LOADING, SAVING = "the policy could not be loaded", "the checkpoint could not be written"


class FSDP2(ModelParallelStrategy):
    """Weights, gradients and optimizer states sharded over all processes; each process trains on pairs of its own.

    The first process reads a model and hands each its shard; no other holds all of it. The frozen reference is sharded
    like the policy, with `trainer.precision` bf16-mixed in bfloat16; the policy then computes in bfloat16, reduces
    gradients in float32 and keeps float32 weights.

    Args:
        replicas: copies of the sharded model (HSDP): 1 shards over all processes; the number of nodes shards within a
            node and reduces gradients between nodes.
        tensor_parallel: processes that share every matrix, and train on the same pairs; 1 for none. Llama, Mistral and
            Qwen only; keep it within a node.
        activation_checkpointing: compute the activations of a block again in backward instead of keeping them.
        cpu_offload: keep weights, gradients and optimizer states in the memory of the host.
        compile: torch.compile each block.
        reshard_after_forward: free a block's weights after its forward and gather them again in backward; false keeps
            them, which costs the memory of the model and saves a third of the communication.
        reduce_every_microbatch: with accumulate_grad_batches, reduce gradients after each batch of a step instead of
            the last alone: the unreduced ones take the memory of the whole model.
        save_distributed_checkpoint: write checkpoints as folders of shards, which resume on any number of processes;
            false gathers them into one file.
        timeout_minutes: how long processes wait for one another.
    """

    def __init__(
        self,
        replicas: int = 1,
        tensor_parallel: int = 1,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        compile: bool = False,
        reshard_after_forward: bool = True,
        reduce_every_microbatch: bool = False,
        save_distributed_checkpoint: bool = True,
        timeout_minutes: float = 30.0,
    ) -> None:
        for name, value in (("replicas", replicas), ("tensor_parallel", tensor_parallel)):
            if value < 1:
                raise ValueError(f"strategy.{name} is a number of processes, at least 1, got {value}")
        super().__init__(
            data_parallel_size=1,  # set from the world once it is known, never automatically
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.replicas, self.tensor_parallel = replicas, tensor_parallel
        self.reduce_every_microbatch = reduce_every_microbatch
        self._options = {
            "activation_checkpointing": activation_checkpointing,
            "cpu_offload": cpu_offload,
            "compile": compile,
            "reshard_after_forward": reshard_after_forward,
        }

    # ---------------------------------------------------------------- processes

    def setup_environment(self) -> None:
        # not super(): it would set up a mesh of sizes that do not fit
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        self.arrange(self.world_size, self.root_device.type)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def arrange(self, world_size: int, device_type: str) -> None:
        """Makes the mesh of processes that are joined. Raises ValueError where they cannot be arranged as asked."""
        self._device_mesh = make_mesh(device_type, world_size, self.replicas, self.tensor_parallel)
        self._data_parallel_size = world_size // self.tensor_parallel
        self._tensor_parallel_size = self.tensor_parallel

    @property
    def offloads(self) -> bool:
        return self._options["cpu_offload"]

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in backward."""
        return self._options["activation_checkpointing"]

    @property
    def reshards(self) -> bool:
        return self._options["reshard_after_forward"]

    def _get_process_group_backend(self) -> str:
        return backend_of(self.root_device)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Processes that share matrices are neighbours, and train on the same pairs."""
        return {
            "num_replicas": self.world_size // self.tensor_parallel,
            "rank": self.global_rank // self.tensor_parallel,
        }

    @property
    def sharding(self) -> Sharding:
        """How models are sharded, now that the processes are joined."""
        mesh = self.device_mesh["shard"] if self.replicas == 1 else self.device_mesh["replicate", "shard"]
        mixed = isinstance(self.precision_plugin, MixedPrecision)
        if mixed and self.precision_plugin.precision != "bf16-mixed":
            raise ValueError(
                f"trainer.precision {self.precision_plugin.precision} is not available under FSDP2: take bf16-mixed, "
                "bf16-true or 32-true"
            )
        return Sharding(mesh, torch.bfloat16 if mixed else None, **self._options)

    # ------------------------------------------------------------------- models

    def load(
        self,
        spec: PolicySpec,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        frozen: bool = False,
        packed: bool = False,
    ) -> Policy:
        """The policy of a specification, sharded over all processes; each of them calls this.

        Args:
            frozen: it is not trained, and held in the precision that it is computed in.
            packed: it attends within the rows of packed batches.

        Raises:
            ValueError: quantised weights cannot be sharded; otherwise as `load_policy`.
            RuntimeError: the first process failed to load it, or sharding changed what it computes.
        """
        if spec.quantize is not None:
            raise ValueError("policy.quantize: weights in 4 or 8 bits cannot be sharded; drop it, or take strategy ddp")
        source = self._first(lambda: _plain(spec, tokenizer, packed), LOADING)
        policy = self.outline(spec, tokenizer, frozen=frozen)
        if source is not None:
            _cast_weights(source, self._held(self.sharding, frozen))
        fill(policy, source, self.root_device, self.sharding, packed)
        return policy

    def outline(self, spec: PolicySpec, tokenizer: PreTrainedTokenizerBase | None, *, frozen: bool = False) -> Policy:
        """The policy of a specification on the meta device, sharded: places for weights that come later."""
        policy = load_policy(spec, tokenizer, weights=False)
        if frozen:
            policy.requires_grad_(False).eval()
        _cast_weights(policy, self._held(self.sharding, frozen))
        if self.tensor_parallel > 1:
            parallelize(policy, self.device_mesh["tensor"])
        shard(policy, self.sharding)
        return policy

    def _held(self, how: Sharding, frozen: bool) -> torch.dtype | None:
        """The precision that weights are kept in; None for that of the model."""
        if isinstance(self.precision_plugin, HalfPrecision):  # Lightning would cast what has been gathered already
            return self.precision_plugin._desired_input_dtype
        return how.compute_dtype if frozen else None

    def _first(self, call: Callable[[], T], failed: str) -> T | None:
        """What a call returns in the first process, None in the others, who wait; where it fails, all fail."""
        found, error = None, None
        if self.is_global_zero:
            try:
                found = call()
            except Exception as problem:
                error = problem
        told = self.broadcast(None if error is None else first_line(error))
        if error is not None:
            raise error
        if told is not None:
            raise RuntimeError(f"{failed} by the first process: {told}")
        return found

    def model_to_device(self) -> None:
        if not self._options["cpu_offload"]:
            super().model_to_device()

    # ----------------------------------------------------------------- gradients

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Gradients of a step's earlier batches are only added up, on each process; the last batch reduces the sum."""
        super().pre_backward(closure_loss)
        stage: Any = self.lightning_module
        last = not stage.trainer.fit_loop.epoch_loop._should_accumulate()
        stage.policy.set_requires_gradient_sync(last or self.reduce_every_microbatch)

    # --------------------------------------------------------------- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Shards by all processes, then the rest by the first; the folder appears whole or not at all.

        Raises:
            RuntimeError: it could not be written; an earlier checkpoint of this name stays.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        # one name for all: the next save clears what a killed one left, and nothing that looks for checkpoints takes it
        partial = path.with_name(PARTIAL)
        self._first(lambda: _emptied(partial), SAVING)
        state = {shards.WEIGHTS: checkpoint.pop("state_dict")}
        state |= {f"optimizer_{i}": part for i, part in enumerate(checkpoint.pop("optimizer_states", []))}
        try:
            dcp.save(state, checkpoint_id=partial)
        except shards.FAILURES as error:
            raise RuntimeError(f"{SAVING} {path}: {shards.cause(error)}. An earlier one is kept") from error
        self._first(lambda: _finished(partial, path, checkpoint), SAVING)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a folder of shards, written by any number of processes, or one file.

        Of a policy with an adapter a checkpoint holds what is trained, and only that is read.

        Raises:
            ValueError: it is of another model, or damaged.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        partly = not cast(Any, self.lightning_module).strict_loading
        options = StateDictOptions(ignore_frozen_params=partly, strict=not partly)
        rest = shards.read_rest(path)
        weights: Any = get_model_state_dict(self.model, options=options)
        shards.check_fit(path, shards.stored_weights(path, rest), weights)
        if self.optimizers and "lr_schedulers" not in rest:
            raise ValueError(
                f"the checkpoint {path} holds weights alone (save_weights_only), so training cannot go on from it: "
                "make a model of it with rsa export, and start from that"
            )
        if not shards.is_sharded(path):
            self._load_file(rest, partly)
            return rest
        shards.read_into(path, {shards.WEIGHTS: weights})
        set_model_state_dict(self.model, weights, options=options)
        for i, optimizer in enumerate(self.optimizers):
            state = get_optimizer_state_dict(self.model, optimizer, options=options)
            shards.read_into(path, {f"optimizer_{i}": state})
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return rest

    def _load_file(self, checkpoint: dict[str, Any], partly: bool) -> None:
        """The weights and optimizer states of one file; the first process hands each its shards."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=not partly)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        states = checkpoint.pop("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=False):  # no optimizers where a policy is validated
            named = _renamed(state, list(range(len(self._names(optimizer)))), self._names(optimizer))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        checkpoint |= {"state_dict": {}, "optimizer_states": [{} for _ in states]}  # they are read

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Of one file, with parameters numbered as an optimizer does, so that any strategy resumes from it."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        plain = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, plain, options=options)
        names = self._names(plain)
        return _renamed(state, names, list(range(len(names)))) if state else state

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """The names of an optimizer's parameters, in its order."""
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finished(partial: Path, path: Path, rest: dict[str, Any]) -> None:
    """Completes a folder of shards and puts it in its place; what stood there goes only once it stands."""
    with (partial / shards.META).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    old = path.with_name(PARTIAL + ".old")
    _removed(old)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    _removed(old)


def _removed(path: Path) -> None:
    """No folder, nor a file, where there may be one."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _renamed(state: Any, before: list[Any], after: list[Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters."""
    key = dict(zip(before, after, strict=True))
    groups = [{**group, "params": [key[one] for one in group["params"]]} for group in state["param_groups"]]
    return {"state": {key[one]: value for one, value in state["state"].items()}, "param_groups": groups}


def make_mesh(device: str, world: int, replicas: int, tensor: int) -> DeviceMesh:
    """Replicas x shards x tensor, over all processes. Raises ValueError where the sizes do not divide the world."""
    if world % (replicas * tensor):
        raise ValueError(
            f"strategy.replicas {replicas} x tensor_parallel {tensor} does not divide the run's {world} processes"
        )
    sizes = (replicas, world // (replicas * tensor), tensor)
    return init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard", "tensor"))


def check_strategy(strategy: Strategy | str) -> None:
    """Raises ValueError at strategies of Lightning, or names of theirs, that would train something else than asked."""
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        raise ValueError(
            "trainer.strategy ModelParallelStrategy: its automatic sizes let all devices of a node train on the same "
            "pairs, and it shards nothing by itself. Set trainer.strategy to FSDP2"
        )
    named = isinstance(strategy, str) and strategy.lower().startswith("fsdp") and strategy.lower() != "fsdp2"
    if named or isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy fsdp (FSDP1) gathers the head outside the operator that reads it, and cannot be tested "
            "without GPUs. Set trainer.strategy to FSDP2"
        )


def _plain(spec: PolicySpec, tokenizer: PreTrainedTokenizerBase | None, packed: bool) -> Policy:
    policy = load_policy(spec, tokenizer)
    packing.attend(policy.model, packed)
    return policy


def _cast_weights(policy: Policy, dtype: torch.dtype | None) -> None:
    """Parameters alone: buffers such as rotary frequencies keep their precision."""
    for parameter in policy.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype)


for name in ("fsdp2", "FSDP2"):
    if name not in StrategyRegistry.available_strategies():
        StrategyRegistry.register(name, FSDP2, description="FSDP2 over all processes")
