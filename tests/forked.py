"""Several gloo processes for one test: forked, joined through a file, each with what torchrun would tell it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def together(
    world: int, folder: Path, function: Callable[..., Any], *arguments: Any, local: int | None = None
) -> list[Any]:
    """What `function(*arguments)` returns in each of `world` processes; where one raises, so does this.

    Args:
        folder: for the file they meet at and for what they return (anything torch.save takes).
        local: processes of a node; by default all are on one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    start_processes(_one, args=(world, local or world, meeting, function, arguments), nprocs=world, start_method="fork")
    return [torch.load(folder / f"meeting.{rank}", weights_only=False) for rank in range(world)]


def _one(rank: int, world: int, local: int, meeting: Path, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "GROUP_RANK": str(rank // local),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # nobody listens there: the processes are joined already
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), f"{meeting}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
