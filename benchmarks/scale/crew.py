"""Processes that train the same stages together, and take their steps when told to.

    crew = Crew(Team(processes=2, sharded=True), size, providers, folder)
    crew.ask("step", "RSA live padded")       # an answer of each process

A crew is started here (forked; on a GPU spawned, where a fork could not use the device). Where torchrun has started the
processes, on one node or several, `Joined` asks them the same.
"""

import os
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.scale.cases import Provider, Size
from benchmarks.scale.loops import provider_loop
from benchmarks.scale.traffic import Traffic
from benchmarks.scale.turns import timed
from benchmarks.timing import peak_extra_bytes
from rsa_lightning.parallel.processes import backend_of
from rsa_lightning.parallel.strategy import FSDP2


@dataclass(frozen=True)
class Team:
    """How many processes train together, and how the model lies on them.

    Args:
        sharded: by FSDP2; a single process can do without.
        replicas: of the sharded model.
    """

    processes: int
    sharded: bool
    device: str = "cpu"
    replicas: int = 1
    cpu_offload: bool = False

    def __str__(self) -> str:
        how = ["" if self.sharded else "no FSDP2", f"{self.replicas} replicas" if self.replicas > 1 else ""]
        how.append("CPU offload" if self.cpu_offload else "")
        count = f"{self.processes} process{'es' * (self.processes > 1)}"
        return ", ".join([count, *filter(None, how)])

    def trainer(self) -> dict[str, Any]:
        """Arguments of `lightning.Trainer`."""
        strategy = FSDP2(replicas=self.replicas, cpu_offload=self.cpu_offload) if self.sharded else "auto"
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        accelerator = "gpu" if self.device == "cuda" else "cpu"
        here = {"accelerator": accelerator, "devices": self.processes // nodes, "num_nodes": nodes}
        return here | {"strategy": strategy}


class Worker:
    """What one process does: all loops of a team, one after the other begun and in any order stepped."""

    def __init__(self, team: Team, size: Size, providers: Sequence[Provider], folder: Path) -> None:
        peak_extra_bytes(lambda: None, torch.device("cpu"))  # the profiler has to be used in the main thread first
        self._cuda = team.device == "cuda"
        self._loops = {
            str(provider): provider_loop(provider, size, folder, team.processes, **team.trainer())
            for provider in providers
        }

    def answer(self, what: str, name: str) -> Any:
        return getattr(self, f"_{what}")(name)

    def _step(self, name: str) -> tuple[float, float, float]:
        """Milliseconds by the wall and of this process, and the loss of this process's pairs."""
        loop = self._loops[name]
        clocks = timed(loop.step)  # on a GPU the loss, which is read after the step, waits for it
        return (*clocks, loop.losses[-1])

    def _memory(self, name: str) -> tuple[int, int]:
        """Most bytes of tensors that one more step makes, and bytes that lie between steps."""
        loop = self._loops[name]
        if not self._cuda:
            return loop.peak_bytes(), loop.held_bytes()
        return peak_extra_bytes(loop.step, torch.device("cuda")), loop.held_bytes()

    def _traffic(self, name: str) -> dict[str, Any]:
        """What one more step sends, and the least it could."""
        traffic = Traffic()
        self._loops[name].observed(traffic.entered)
        return traffic.figures(self._loops[name].stage)

    def close(self) -> None:
        for loop in self._loops.values():
            loop.close()


class Crew:
    """Processes of a team, started here and asked together.

    Raises:
        RuntimeError: a process failed, with its traceback.
    """

    def __init__(self, team: Team, size: Size, providers: Sequence[Provider], folder: Path) -> None:
        self._stack = ExitStack()
        meeting = self._stack.enter_context(TemporaryDirectory())
        context: Any = mp.get_context("spawn" if team.device == "cuda" else "fork")
        pipes = [context.Pipe() for _ in range(team.processes)]
        work = (team, size, tuple(providers), folder)
        self._processes = [
            context.Process(target=_serve, args=(rank, theirs, meeting, *work), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        self._pipes = [ours for ours, _ in pipes]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # or the end of a process would not be noticed
        self._answers()

    def ask(self, what: str, name: str) -> list[Any]:
        """The answer of each process."""
        for pipe in self._pipes:
            pipe.send((what, name))
        return self._answers()

    def close(self) -> None:
        """Lets the trainers finish; processes that do not are ended."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(30)
            process.kill()
        self._stack.close()

    def _answers(self) -> list[Any]:
        found = []
        for rank, pipe in enumerate(self._pipes):
            try:
                error, answer = pipe.recv()
            except EOFError:
                error, answer = "it ended without a word", None
            if error is not None:
                for process in self._processes:  # the others may wait for it in a collective
                    process.kill()
                raise RuntimeError(f"process {rank} of {len(self._pipes)}: {error}")
            found.append(answer)
        return found


class Joined:
    """The same of processes that torchrun has started, of which this is one: all ask alike, and all are told."""

    def __init__(self, team: Team, size: Size, providers: Sequence[Provider], folder: Path) -> None:
        self._worker = Worker(team, size, providers, folder)

    def ask(self, what: str, name: str) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._worker.answer(what, name))
        return found

    def close(self) -> None:
        self._worker.close()


def launched() -> int:
    """The number of processes that torchrun has started; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _serve(
    rank: int, pipe: Any, meeting: str, team: Team, size: Size, providers: Sequence[Provider], folder: Path
) -> None:
    """A process of a crew: joins the others, then answers until it is told to stop."""
    torch.set_num_threads(1)
    try:
        if team.sharded:
            _join(rank, meeting, team)
        worker = Worker(team, size, providers, folder)
        pipe.send((None, None))
        while (order := pipe.recv()) is not None:
            pipe.send((None, worker.answer(*order)))
        worker.close()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    finally:
        os._exit(0)  # without what a forked copy would do at its end


def _join(rank: int, meeting: str, team: Team) -> None:
    # what torchrun would say, for a Trainer; nobody listens at the port, because the processes are joined already
    os.environ |= {"TORCHELASTIC_RUN_ID": "scale", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(team.processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    if team.device == "cuda":
        torch.cuda.set_device(rank)
    backend = backend_of(torch.device(team.device))
    dist.init_process_group(backend, init_method=f"file://{meeting}/store", rank=rank, world_size=team.processes)
