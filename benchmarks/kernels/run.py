"""Run providers on cases: they agree, then they take turns, then their memory is measured."""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.agreement import check
from benchmarks.kernels.cases import MODES, Case, Mode, Spec, make
from benchmarks.kernels.exact import differentiate
from benchmarks.kernels.providers import Missing, Provider, chosen, floors, offers
from benchmarks.kernels.results import (
    EXTRA,
    PEAK,
    REFERENCES,
    Record,
    Results,
    case_columns,
    error_record,
    memory_record,
    missing_record,
    time_record,
)
from benchmarks.timing import environment, graphed, interleave, peak_extra_bytes, ratio, summary

Method = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    device: torch.device
    dtype: torch.dtype
    samples: int
    providers: tuple[str, ...] = ()  # names or their beginnings; all where there are none
    compiled: bool = False  # whether the compiler is a provider


def empty_results(device: torch.device) -> Results:
    return Results(environment(device), [], [], [], [])


def run(
    specs: Iterable[Spec],
    setting: Setting,
    results: Results,
    after: Callable[[], None] = lambda: None,
    until: float = float("inf"),
) -> bool:
    """Adds to the results, case by case, calling `after` each; True if all are done.

    `until` is on the clock of `time.monotonic`: a case that would probably end later is left for another run.
    """
    longest = 0.0
    for spec in specs:
        if str(spec) in results.done:
            continue
        start = time.monotonic()
        if start + longest > until:
            return False
        _run_case(spec, setting, results)
        results.done.append(str(spec))
        after()
        longest = max(longest, time.monotonic() - start)
    return True


def _run_case(spec: Spec, setting: Setting, results: Results) -> None:
    device, dtype = setting.device, torch.float32 if spec.op == "nested" else setting.dtype
    columns = case_columns(spec, str(dtype).removeprefix("torch."), torch.get_num_threads())
    wanted = [o for o in offers(spec, device, dtype, setting.compiled) if chosen(o, setting.providers)]
    case = make(spec, device, dtype)
    ways = {floor.name: floor.make(case) for floor in floors(spec)}  # their buffers are there when others are checked
    agreement = check(case, [offer for offer in wanted if isinstance(offer, Provider)], dtype)
    missing = [offer for offer in wanted if isinstance(offer, Missing)] + agreement.missing
    results.missing.extend(missing_record(columns, one) for one in missing)
    results.disagreements.extend(agreement.disagreements)
    results.records.extend(error_record(columns, error) for error in agreement.errors)
    for mode in MODES:
        for provider in agreement.providers:
            if mode not in provider.modes:
                results.missing.append(missing_record(columns, Missing(provider.name, provider.no_forward), mode))
        methods = methods_of(case, agreement.providers, mode)
        timed = {name: way[mode] for name, way in ways.items() if mode in way} | methods
        results.records.extend(_times(case, columns, timed, mode, setting))
        if device.type == "cuda" and spec.op == "nested":
            _add_graphs(case, columns, timed, mode, setting, results)
        results.records.extend(_memory(case, columns, methods, mode, device))
    del ways, case
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def methods_of(case: Case, providers: Sequence[Provider], mode: Mode) -> dict[str, Method]:
    """What is timed of each provider."""

    def forward(provider: Provider) -> Any:
        with torch.no_grad():
            return provider.call(case, case.inputs)

    def both(provider: Provider) -> Any:
        return differentiate(provider.call, provider.objective, case)

    return {p.name: partial(forward if mode == "forward" else both, p) for p in providers if mode in p.modes}


def _times(case: Case, columns: Record, methods: dict[str, Method], mode: str, setting: Setting) -> list[Record]:
    """Milliseconds, and shares of the references' samples a moment apart."""
    times = interleave(methods, setting.samples, setting.device)
    records = []
    for name, mine in times.items():
        records.append(time_record(case, columns, name, mode, summary(mine), len(mine)))
        for other in REFERENCES:
            if other in times and other != name:
                shares = ratio(mine, times[other])
                records.append(time_record(case, columns, name, mode, shares, len(mine), relative_to=other))
    return records


def _add_graphs(
    case: Case, columns: Record, methods: dict[str, Method], mode: str, setting: Setting, results: Results
) -> None:
    """The same as a graph that is replayed: of short calls the time of Python would hide that of the device."""
    replays, name = {}, f"{mode}, graph"
    for provider, method in methods.items():
        try:
            replays[provider] = graphed(method, setting.device)
        except RuntimeError as error:  # a synchronisation inside cannot be captured
            reason = f"cannot be captured: {str(error).strip().splitlines()[0][:200]}"
            results.missing.append(missing_record(columns, Missing(provider, reason), name))
    results.records.extend(_times(case, columns, replays, name, setting))


def _memory(case: Case, columns: Record, methods: dict[str, Method], mode: Mode, device: torch.device) -> list[Record]:
    records = []
    for name, method in methods.items():
        peak = peak_extra_bytes(method, device)
        extra = extra_bytes(case, mode, peak)
        records += [memory_record(columns, name, mode, PEAK, peak), memory_record(columns, name, mode, EXTRA, extra)]
    return records


def extra_bytes(case: Case, mode: Mode, peak: int) -> int:
    """Peak memory beyond the inputs, less returned gradients and, with a gradient of the head, one fp32 buffer of its
    shape: what a provider adds to what any of them has to hold.
    """
    if mode == "forward":
        return peak
    returned = sum(case.inputs[name].nbytes for name in case.leaves)
    buffer = 4 * case.inputs["weight"].numel() if "weight" in case.leaves else 0
    return max(0, peak - returned - buffer)
