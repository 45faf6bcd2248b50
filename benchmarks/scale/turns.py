"""Methods in turn, by two clocks: what a user waits for, and what the processor works for it."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.timing import Quantiles, ratio, summary


class Times(NamedTuple):
    """Milliseconds of the samples of one method. On a busy machine CPU time alone means something."""

    wall: list[float]
    cpu: list[float]

    def figures(self, than: "Times") -> dict[str, float]:
        """Medians and quantiles by both clocks, and times the speed of another method, sample by sample."""
        found = {"ms": summary(self.wall), "cpu_ms": summary(self.cpu)}
        found |= {"x": ratio(than.wall, self.wall), "x_cpu": ratio(than.cpu, self.cpu)}
        return {key: value for name, figure in found.items() for key, value in named(name, figure).items()}


def named(name: str, figure: Quantiles) -> dict[str, float]:
    """`name`, `name_q20` and `name_q80`, in four digits."""
    values = zip((name, f"{name}_q20", f"{name}_q80"), figure, strict=True)
    return {key: float(f"{value:.4g}") for key, value in values}


def timed(method: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of one call, by the wall and of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    method()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def take_turns(
    methods: Mapping[str, Callable[[], tuple[float, float]]], samples: int, warm_up: int
) -> dict[str, Times]:
    """Samples of methods that time themselves, one of each after the other: a busy moment hits all of them."""
    found = {name: Times([], []) for name in methods}
    for sample in range(warm_up + samples):
        for name, method in methods.items():
            for clock, value in zip(found[name], method(), strict=True):
                if sample >= warm_up:
                    clock.append(value)
    return found


def largest_gap(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where there is none to be had."""
    gap = (one - other).abs().max().item()
    return gap if math.isfinite(gap) else math.inf
