"""What training at scale should reach, and what of it only machines with several GPUs can tell."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CACHED_GAIN = 1.15  # times the speed of a live reference
COMMAND = "make bench-scale"
METHODS = (("DPO", "hidden"), ("DPO", "logps"), ("TDPO (KL)", "hidden"), ("RSA (CVaR 0.97)", "hidden"))


class Goal(NamedTuple):
    """A step near a cached reference is at least so many times as fast as one near a live one, in CPU time."""

    method: str
    reference: str
    limit: float = CACHED_GAIN

    def __str__(self) -> str:
        which = f"{self.method}, reference on disk ({self.reference})"
        return f"CPU, 1 thread: {which}: speed of a step >= {self.limit:g} x live"


def goals() -> list[Goal]:
    return [Goal(*names) for names in METHODS]


def verdicts(references: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Every goal beside what was measured, and the ceiling that the count of products sets."""
    found = {(row["method"], row["reference"]): row for row in references}
    return [_verdict(goal, found.get((goal.method, goal.reference)), device) for goal in goals()]


def _verdict(goal: Goal, row: dict[str, Any] | None, device: str) -> dict[str, Any]:
    measured = None if row is None else row["x_cpu"]
    word = "not measured" if measured is None else "met" if measured >= goal.limit else "missed"
    ceiling = None if row is None else row["ceiling"]
    return {"goal": str(goal), "limit": goal.limit, "measured": measured, "ceiling": ceiling} | {
        "verdict": word,
        "device": device,
    }


# ---- what needs GPUs -------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Something to be measured on GPUs, and the options of `python -m benchmarks scale` that do it."""

    what: str
    processes: int
    replicas: int = 1
    cpu_offload: bool = False
    nodes: int = 1

    @property
    def file(self) -> str:
        return f"{name('cuda', self.processes, self.replicas, self.cpu_offload)}.json"

    @property
    def command(self) -> str:
        options = ["--device cuda", "--output benchmarks/results"]
        options += [f"--replicas {self.replicas}"] if self.replicas > 1 else []
        options += ["--cpu-offload"] if self.cpu_offload else []
        if self.nodes == 1:
            return " ".join(["python -m benchmarks scale", f"--processes {self.processes}", *options])
        each = f"--nproc-per-node {self.processes // self.nodes}"
        start = f"torchrun --nnodes {self.nodes} {each} --rdzv-backend c10d --rdzv-endpoint HOST:29400"
        return " ".join([start, "-m benchmarks scale", *options, "--work SHARED_FOLDER"])


PIECES = (
    Piece("one GPU, with and without FSDP2: live and cached reference, packed rows by varlen_attn; cost of a step", 1),
    Piece("throughput, memory and traffic on 2 GPUs (NCCL)", 2),
    Piece("throughput, memory and traffic on 4 GPUs (NCCL)", 4),
    Piece("throughput, memory and traffic on 8 GPUs (NCCL)", 8),
    Piece("HSDP in one node: 2 copies on 2 GPUs each", 4, replicas=2),
    Piece("CPU offload on 2 GPUs", 2, cpu_offload=True),
    Piece("HSDP across 2 nodes of 8 GPUs, a copy on each (on every node)", 16, replicas=2, nodes=2),
)


def name(device: str, processes: int, replicas: int = 1, cpu_offload: bool = False) -> str:
    """Of the files of a run."""
    how = (f"_{replicas}_replicas" if replicas > 1 else "") + ("_offload" if cpu_offload else "")
    return f"scale_cpu{how}" if device == "cpu" else f"scale_cuda_{processes}{how}"


def open_work(folder: Path, runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(what, file, command) of the pieces that have left no file, and of goals that no run measured."""
    for piece in PIECES:
        if not (folder / piece.file).exists():
            yield piece.what, piece.file, piece.command
    known = {found["goal"] for run in runs for found in run.get("goals", []) if found["verdict"] != "not measured"}
    for goal in goals():
        if str(goal) not in known:
            yield str(goal), f"{name('cpu', 2)}.json", COMMAND
