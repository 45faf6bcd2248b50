"""A whole training step beside TRL's: tokens per second and peak memory.

A step is one turn of the trainer's own loop: batch, forward of policy and reference, backward, clipping, optimizer,
metrics. All methods start from the same weights and see the same tokens in the same order, with the same AdamW, in
float32; TRL runs without gradient checkpointing, which is its default and would cost it time. Gradient checkpointing
apart, every trainer keeps the metrics it always keeps.

First the methods have to agree: the losses of our DPO with those of TRL's (log 2 at the first step), and the losses of
ours with those of the naive implementation. Then they take turns, step by step.
"""

import contextlib
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rsa_kernels import KL, CVaR, RiskMeasure

from benchmarks.step.cases import StepCase, step_cases
from benchmarks.step.loops import Loop, our_loop, trl_loop
from benchmarks.timing import environment, peak_extra_bytes, summary, version
from rsa_lightning.losses import DPO, RSA, TDPO, PreferenceLoss

AGREEING_STEPS = 6
TOLERANCE = 2e-5  # nats, of the mean loss of a step; rounding alone makes a few 1e-6

OURS: dict[str, tuple[PreferenceLoss, RiskMeasure]] = {
    "DPO": (DPO(), KL()),  # reads no risk, in training
    "TDPO (KL)": (TDPO(), KL()),
    "RSA (CVaR 0.97)": (RSA(), CVaR(0.97)),
}
TRL, TRL_PRECOMPUTED = "TRL DPO", "TRL DPO, precomputed"
COLUMNS = ("ms", "20 %", "80 %", "tokens/s", "x TRL DPO", "20 %", "80 %", "peak MiB")


def run(quick: bool, samples: int, with_trl: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """(disagreements, rows of the table); without timings of a case whose methods disagree."""
    disagreements, rows = [], []
    peak_extra_bytes(lambda: None, torch.device("cpu"))  # the profiler has to be used in the main thread first
    # one batch more than steps: the last step has to hand control back, too
    for case in step_cases(quick, steps=AGREEING_STEPS + samples + 2):
        with tempfile.TemporaryDirectory() as folder, quiet():
            case.save(Path(folder))
            loops = _loops(case, Path(folder), with_trl)
            found = disagreement(case, Path(folder), loops)
            disagreements += found
            rows += [] if found else measure(case, loops, samples)
            for loop in loops:
                loop.close()
    return disagreements, rows


def disagreement(case: StepCase, folder: Path, loops: list[Loop]) -> list[str]:
    """One sentence for each step of a method whose loss is not what it should be. Takes the first steps of `loops`."""
    twins = [our_loop(f"{name}, naive", case, folder, *ours, impl="naive") for name, ours in OURS.items()]
    for loop in (*loops, *twins):
        for _ in range(AGREEING_STEPS):
            loop.step()
    for twin in twins:
        twin.close()
    losses = {loop.name: loop.losses for loop in (*loops, *twins)}
    expected = {name: f"{name}, naive" for name in OURS} | dict.fromkeys((TRL, TRL_PRECOMPUTED), "DPO")
    sentences = [
        f"{case.title}: at step 0 {loop.name} has a loss of {loop.losses[0]:.6f} and not of log 2"
        for loop in loops
        if not abs(loop.losses[0] - math.log(2)) <= TOLERANCE
    ]
    return sentences + [
        f"{case.title}: at step {step} {loop.name} has a loss of {mine:.6f}, {expected[loop.name]} of {theirs:.6f}"
        for loop in loops
        for step, (mine, theirs) in enumerate(zip(loop.losses, losses[expected[loop.name]], strict=True))
        if not abs(mine - theirs) <= TOLERANCE
    ]


def measure(case: StepCase, loops: list[Loop], samples: int) -> list[dict[str, Any]]:
    """Milliseconds, throughput beside TRL's with a live reference, and peak memory, of loops that are warm."""
    elapsed_ms: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for _ in range(samples):
        for loop in loops:  # in turn, so that a busy moment of the machine hits all of them
            start = time.perf_counter()
            loop.step()
            elapsed_ms[loop.name].append(1e3 * (time.perf_counter() - start))
    tokens = [case.tokens(AGREEING_STEPS + sample) for sample in range(samples)]
    return [_row(case, loop, elapsed_ms[loop.name], tokens, elapsed_ms.get(TRL)) for loop in loops]


def _row(
    case: StepCase, loop: Loop, times_ms: list[float], tokens: list[int], trl_ms: list[float] | None
) -> dict[str, Any]:
    ms = summary(times_ms)
    rate = summary([1e3 * count / time_ms for count, time_ms in zip(tokens, times_ms, strict=True)])
    # of the same batch a moment apart, not of two medians
    ratio = None if trl_ms is None else summary([t / mine for t, mine in zip(trl_ms, times_ms, strict=True)])
    return {
        "case": case.title,
        "method": loop.name,
        "ms": round(ms.median, 1),
        "ms_q20": round(ms.low, 1),
        "ms_q80": round(ms.high, 1),
        "tokens_per_s": round(rate.median),
        "times_trl": None if ratio is None else round(ratio.median, 3),
        "times_trl_q20": None if ratio is None else round(ratio.low, 3),
        "times_trl_q80": None if ratio is None else round(ratio.high, 3),
        "peak_mib": round(loop.peak_bytes() / 2**20, 1),
    }


def table(rows: list[dict[str, Any]], with_trl: bool) -> Table:
    agreeing = "TRL's and with the definition" if with_trl else "the definition (TRL left out)"
    result = Table(
        title=f"training step: losses agree with {agreeing}; medians of interleaved steps",
        caption="peak: most bytes of tensors made in a step and alive at once; precomputed: reference pass untimed",
    )
    for name in ("case", "method"):
        result.add_column(name)
    shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for name, heading in zip(list(rows[0])[2:], COLUMNS, strict=True):
        if name in shown:
            result.add_column(heading, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=False):
        last = following is None or following["case"] != row["case"]
        result.add_row(*("–" if row[name] is None else str(row[name]) for name in shown), end_section=last)
    return result


def step_environment() -> dict[str, Any]:
    """What the figures need beside them: `environment`, and the trainers."""
    packages = ("lightning", "transformers", "trl")
    return environment(torch.device("cpu")) | {name: version(name) for name in packages}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notices of the trainers; warnings and errors stay."""
    import datasets
    import transformers

    os.environ["TQDM_DISABLE"] = "1"  # TRL reads it
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # few workers, no validation loader
        warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL about transformers 6
        yield


def _loops(case: StepCase, folder: Path, with_trl: bool) -> list[Loop]:
    peers = [trl_loop(TRL, case, folder, False), trl_loop(TRL_PRECOMPUTED, case, folder, True)] if with_trl else []
    return peers + [our_loop(name, case, folder, *ours) for name, ours in OURS.items()]
