"""The processes of one run: the first one reads, decides and writes, all of them train.

A process by itself is the first of one. Others are started by torchrun or SLURM, never by us.
"""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist

from rsa_lightning.parsing import first_line

T = TypeVar("T")
# the first process may tokenise, sample or score for hours while the others wait
PATIENCE = timedelta(days=7)


def sharing(trainer: L.Trainer) -> int:
    """Processes of a trainer with pairs of their own: those that share matrices count as one."""
    return int((getattr(trainer, "distributed_sampler_kwargs", None) or {}).get("num_replicas", trainer.world_size))


def position(trainer: L.Trainer) -> tuple[int, bool]:
    """Which of `sharing` this process is one of, and whether it is the first of those that are this one together."""
    together = trainer.world_size // sharing(trainer)  # neighbours
    return trainer.global_rank // together, trainer.global_rank % together == 0


def gathered(value: T) -> list[T]:
    """What each process hands in, on every process; all call it. A process by itself has its own."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=_waiting_group())
    return found


def join(trainer: L.Trainer) -> None:
    """Waits for all processes that `trainer` expects.

    Raises:
        ValueError: it expects several, and nothing has started them.
    """
    if trainer.world_size == 1 or dist.is_initialized():
        return
    environment: Any = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or not environment.creates_processes_externally:
        raise ValueError(
            f"trainer.devices and trainer.num_nodes ask for {trainer.world_size} processes, and rsa align starts "
            f"none: torchrun --nproc-per-node {trainer.num_devices} -m rsa_lightning align ..., or srun"
        )
    device: torch.device = trainer.strategy.root_device
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    dist.init_process_group(
        backend_of(device),
        timeout=getattr(trainer.strategy, "_timeout", None),
        rank=environment.global_rank(),
        world_size=trainer.world_size,
        device_id=device if device.type == "cuda" else None,
    )


@atexit.register  # whoever joined: we, or Lightning, which leaves groups of NCCL only
def _leave() -> None:
    """Ends the threads of gloo: one that frees the tensor of a last collective when Python has ended aborts us."""
    _waiting.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def first(call: Callable[[], T], failed: str = "the first process stopped") -> T:
    """What `call` returns in the first process, in all of them; the others wait. All call it.

    Raises:
        RuntimeError: in the others, where it raises in the first: what failed, and the first line of the error.
    """
    if not dist.is_initialized():
        return call()
    told: list[Any] = [None, None]
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            told = [call(), None]
        except BaseException as problem:
            error, told = problem, [None, first_line(problem)]
    dist.broadcast_object_list(told, src=0, group=_waiting_group())
    if error is not None:
        raise error
    if told[1] is not None:
        raise RuntimeError(f"{failed}: {told[1]}")
    return told[0]


_waiting: dict[Any, Any] = {}  # the group of all processes -> the one they wait in


def _waiting_group() -> Any:
    """All processes, on the CPU: waiting there keeps no GPU busy, and hits no time limit of NCCL or a strategy."""
    everyone = dist.group.WORLD
    if everyone not in _waiting:
        _waiting.clear()
        _waiting[everyone] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _waiting[everyone]


def backend_of(device: torch.device) -> str:
    """Collectives of tensors on the device and, for offloaded weights and their norms, of tensors on the CPU."""
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
