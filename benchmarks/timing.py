"""Measuring: interleaved samples, peak memory, and what it ran on."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler's C++ side reports its own start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

ROOT = Path(__file__).parents[1]
LARGER_THAN_A_CACHE = 256 * 2**20  # bytes; the second-level cache of a GPU holds up to about 126 MiB
GPU_WARM_UP = 3  # rounds
ENOUGH_SAMPLES, ENOUGH_S = 3, 60.0  # where all of them would take longer
VARIABLES = ("TRITON_", "RSA_KERNELS_", "OMP_NUM_THREADS", "PYTORCH_", "NVIDIA_TF32", "TORCH_ALLOW_TF32")


class Quantiles(NamedTuple):
    """Median and the 20 % and 80 % quantiles of the samples of one method."""

    median: float
    low: float
    high: float


class Refused(ValueError):
    """What was asked for cannot be run: the message is for the user, who gets no traceback."""


def interleave(methods: dict[str, Callable[[], Any]], samples: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of the methods in turn, sample by sample, so that a busy moment of the machine hits all of them."""
    measure = _gpu_clock(device) if device.type == "cuda" else _cpu_clock
    for _ in range(GPU_WARM_UP if device.type == "cuda" else 1):
        for method in methods.values():
            measure(method)
    elapsed_ms: dict[str, list[float]] = {name: [] for name in methods}
    start = time.monotonic()
    for sample in range(samples):
        if sample >= ENOUGH_SAMPLES and time.monotonic() - start > ENOUGH_S:
            break
        for name, method in methods.items():
            elapsed_ms[name].append(measure(method))
    return elapsed_ms


def _cpu_clock(method: Callable[[], Any]) -> float:
    start = time.perf_counter()
    method()
    return 1e3 * (time.perf_counter() - start)


def _gpu_clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Time between two events. Before the first the cache is emptied, or small inputs would be read from it."""
    cache = torch.empty(LARGER_THAN_A_CACHE, dtype=torch.uint8, device=device)

    def measure(method: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cache.zero_()
        start.record()
        method()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    return measure


def graphed(method: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The same kernels without the time that Python takes to start them, captured once and replayed."""
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(GPU_WARM_UP):
            method()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        method()
    return graph.replay


def summary(samples: list[float]) -> Quantiles:
    if len(samples) < 2:
        return Quantiles(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Quantiles(statistics.median(samples), fifths[0], fifths[3])


def ratio(mine: list[float], theirs: list[float]) -> Quantiles:
    """Of samples a moment apart, not of two medians."""
    return summary([a / b for a, b in zip(mine, theirs, strict=True)])


def peak_extra_bytes(method: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors alive during the call beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        method()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    peaks: list[int] = []
    with peak_extra_bytes_within(peaks):
        method()
    return peaks[0]


@contextlib.contextmanager
def peak_extra_bytes_within(peaks: list[int]) -> Iterator[None]:
    """Appends the same for a block of code on a CPU; only what this thread allocates is seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield
    # The profiler records every allocation as a positive and every release as a negative number of bytes.
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    peaks.append(peak)


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it to mean something."""
    packages = {name: version(name) for name in ("torch", "triton", "liger-kernel")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        **(_gpu(device) if device.type == "cuda" else {}),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **packages,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "commit": _commit(),
        "sources": sources(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": [properties.major, properties.minor],
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources() -> str:
    """Of the kernels that ran, also where no repository says the commit."""
    files = sorted((ROOT / "kernels").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """The short commit, with + where tracked files differ from it; None outside of a repository."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return None if commit is None else commit + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
