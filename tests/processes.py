"""Forked gloo processes on one machine, for tests of what several ranks compute together."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, *args)` on every rank of a group; what each returned. A rank's exception is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        # forked: closures and imported modules come along, and a group takes a second
        mp.start_processes(_run, (count, folder, function, args), nprocs=count, start_method="fork")
        results = [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(count)]
    errors = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(results) if error is not None]
    assert not errors, "\n".join(errors)
    return [result for _, result in results]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    # what torchrun would say, for a Trainer; nobody listens at the port, because the processes are joined already
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    error, result = None, None
    try:
        result = function(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    torch.save((error, result), Path(folder, str(rank)))
    if error is not None:
        os._exit(0)  # the others may wait for this rank in a collective, which its end breaks
    dist.destroy_process_group()
