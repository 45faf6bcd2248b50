"""Pictures of result files, and of nothing else: time, memory, share of the floor, growth with N and V."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console

from benchmarks.kernels.goals import goals_table, verdicts
from benchmarks.kernels.results import EXTRA, TIME, Record, index, lookup, read_runs
from benchmarks.pending import pending
from benchmarks.timing import Quantiles, sources

BOTH_WAYS = "forward+backward"
DPI = 120
PANEL = (9.0, 4.2)  # inches
COLORS = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
PROVIDERS = (
    *(
        "gemms",
        "gemms-frozen",
        "triton-cache",
        "triton-recompute",
        "chunked-cache",
        "chunked-recompute",
        "naive",
        "compiled",
    ),
    *(
        "research",
        "torch-lce",
        "liger-dpo",
        "liger-jsd",
        "triton-auto",
        "triton-frozen",
        "chunked-auto",
        "chunked-frozen",
    ),
    *("triton-frozen-ratio", "chunked-frozen-ratio", "triton", "chunked", "copy"),
)

Device = tuple[str, int | str]
Value = Callable[[dict[tuple, Record], Record], Quantiles | None]


def draw(folder: Path) -> None:
    """Writes the figures and PENDING.md beside the files, and prints how the goals stand."""
    runs = read_runs(folder)
    devices = by_device(runs)
    panels = {device: (records, largest_case(records)) for device, records in devices.items() if largest_case(records)}
    bars = {
        "time": ("milliseconds", _time),
        "memory": ("extra peak memory, MiB", _memory),
        "share_of_floor": ("% of the speed of bare matrix products", _share("gemms")),
    }
    for name, (label, value) in bars.items():
        _bars(folder / f"kernels_{name}.png", panels, label, value)
    _bars(folder / "kernels_share_of_copy.png", _rows(devices), "% of the speed of a copy", _share("copy"))
    _growth(folder / "kernels_growth.png", devices)
    (folder / "PENDING.md").write_text(pending(folder))
    _say(folder, runs)


def _say(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Goals that were measured, how many were not, what of it other kernels measured, and what was written."""
    console = Console(width=160)
    found = verdicts(runs)
    measured = [verdict for verdict in found if verdict.measured is not None]
    console.print(goals_table(measured))
    console.print(f"not measured: {len(found) - len(measured)} more goals, {folder / 'PENDING.md'} says how")
    for run in runs:
        if run["environment"].get("sources") != sources():
            console.print(f"{run['file']} was measured with other kernels than those here")
    console.print(f"written: PENDING.md and {', '.join(sorted(file.name for file in folder.glob('kernels_*.png')))}")


def by_device(runs: Iterable[dict[str, Any]]) -> dict[Device, list[Record]]:
    """Records of the same device, and on a CPU of as many threads."""
    found: dict[Device, list[Record]] = {}
    for run in runs:
        environment = run["environment"]
        key = environment["device"], "" if "capability" in environment else environment["threads"]
        found.setdefault(key, []).extend(run["records"])
    return {key: records for key, records in found.items() if records}


def largest_case(records: Sequence[Record]) -> dict[str, Any]:
    """Shape and head of the most work that was measured from hidden states with a trainable head."""
    cases = [r for r in records if r["op"] == "linear" and r["head"] == "trainable" and r["metric"] == TIME]
    if not cases:
        return {}
    most = max(cases, key=lambda r: r["N"] * r["H"] * r["V"])
    return {"op": "linear", "shape": most["shape"], "head": "trainable"}


def _rows(devices: dict[Device, list[Record]]) -> dict[Device, tuple[list[Record], dict[str, Any]]]:
    found = {}
    for device, records in devices.items():
        cases = [r for r in records if r["op"] == "logits" and r["metric"] == TIME]
        if cases:
            most = max(cases, key=lambda r: r["N"] * r["V"])
            found[device] = records, {"op": "logits", "shape": most["shape"], "head": ""}
    return found


def _title(device: Device, shape: str) -> str:
    threads = f", {device[1]} thread{'s' * (device[1] != 1)}" if device[1] else ""
    return f"{device[0]}{threads}: {shape}"


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _time(found: dict[tuple, Record], record: Record) -> Quantiles | None:
    return Quantiles(record["q50"], record["q20"], record["q80"])


def _memory(found: dict[tuple, Record], record: Record) -> Quantiles | None:
    extra = lookup(found, record, metric=EXTRA)
    return None if extra is None else Quantiles(*[extra["q50"] / 2**20] * 3)  # the same every time


def _share(floor: str) -> Value:
    def value(found: dict[tuple, Record], record: Record) -> Quantiles | None:
        relative = lookup(found, record, relative_to=floor)
        return None if relative is None else Quantiles(*(100 / relative[name] for name in ("q50", "q80", "q20")))

    return value


# ---- bars ------------------------------------------------------------------------------------------------------------


def _bars(
    file: Path,
    panels: dict[Device, tuple[list[Record], dict[str, Any]]],
    label: str,
    value: Value,
) -> None:
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 1, figsize=(PANEL[0], PANEL[1] * len(panels)), squeeze=False)
    for axis, (device, (records, case)) in zip(axes[:, 0], panels.items(), strict=True):
        _bar_panel(axis, records, case, value)
        dtype = next(record["dtype"] for record in records if record.items() >= case.items())
        axis.set(title=f"{_title(device, case['shape'])}, {dtype}, forward and backward", ylabel=label)
    figure.tight_layout()
    figure.savefig(file, dpi=DPI)
    plt.close(figure)


def _bar_panel(axis: Axes, records: list[Record], case: dict[str, Any], value: Value) -> None:
    """Groups of bars by risk, a line through each from the 20 to the 80 % quantile."""
    chosen = [r for r in records if r.items() >= case.items() and r["mode"] == BOTH_WAYS and r["metric"] == TIME]
    chosen = [record for record in chosen if not record["relative_to"]]
    found = index(records)
    risks, providers = (list(dict.fromkeys(r[name] for r in chosen)) for name in ("risk", "provider"))
    width = 0.85 / max(1, len(providers))
    for place, provider in enumerate(providers):
        bars = [(risks.index(r["risk"]), value(found, r)) for r in chosen if r["provider"] == provider]
        known = [(group + (place - len(providers) / 2 + 0.5) * width, q) for group, q in bars if q is not None]
        if not known:
            continue
        at = [x for x, _ in known]
        drawn = axis.bar(at, [q.median for _, q in known], width, label=provider, color=_color(provider))
        axis.bar_label(drawn, fmt=_digits, fontsize=6, rotation=90, padding=4)
        axis.vlines(at, [q.low for _, q in known], [q.high for _, q in known], color="black", linewidth=0.8)
    axis.margins(y=0.15)
    axis.set_xticks(range(len(risks)), risks)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.grid(axis="y", alpha=0.3)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _color(provider: str) -> Any:
    """The same in every picture."""
    place = PROVIDERS.index(provider) if provider in PROVIDERS else len(PROVIDERS)
    return COLORS[place % len(COLORS)]


# ---- growth ----------------------------------------------------------------------------------------------------------


def series(records: Sequence[Record], along: str, metric: str) -> dict[str, list[tuple[int, float]]]:
    """Of every provider the points along N or V, where most of the other sizes are the same; KL, trainable head."""
    chosen = [
        r
        for r in records
        if (r["op"], r["risk"], r["head"], r["mode"], r["metric"]) == ("linear", "KL()", "trainable", BOTH_WAYS, metric)
        and not r.get("relative_to")
    ]
    fixed = [name for name in "NHV" if name != along]
    groups: dict[tuple, dict[str, dict[int, float]]] = {}
    for record in chosen:
        of_provider = groups.setdefault(tuple(record[name] for name in fixed), {})
        of_provider.setdefault(record["provider"], {})[record[along]] = record["q50"]
    longest = max(groups.values(), key=lambda found: max(map(len, found.values())), default={})
    return {provider: sorted(points.items()) for provider, points in longest.items() if len(points) > 1}


def _growth(file: Path, devices: dict[Device, list[Record]]) -> None:
    kinds = (("N", TIME, 1.0, "ms"), ("V", TIME, 1.0, "ms"), ("N", EXTRA, 2**20, "MiB"), ("V", EXTRA, 2**20, "MiB"))
    shown = {device: records for device, records in devices.items() if series(records, "N", TIME)}
    if not shown:
        return
    figure, axes = plt.subplots(2 * len(shown), 2, figsize=(11, 7 * len(shown)), squeeze=False)
    for row, (device, records) in enumerate(shown.items()):
        for axis, (along, metric, unit, label) in zip(axes[2 * row : 2 * row + 2].flat, kinds, strict=True):
            for provider, points in series(records, along, metric).items():
                x, y = [size for size, _ in points], [value / unit for _, value in points]
                axis.plot(x, y, marker="o", label=provider, color=_color(provider))
                axis.set_xticks(x, map(str, x))
            axis.set(xlabel=along, ylabel=f"{metric.replace('_', ' ')}, {label}", title=_title(device, "KL"))
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
