"""Two pictures of the JSON file: every method's path of reward and tail, and its distance from SACPO's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.tail_risk.analyse import AXES, COMPARED
from benchmarks.tail_risk.methods import BASELINE, Method, path

DPI = 130
TITLES = {"test": "test prompts", "shifted": "tasks not in the training data"}
COLORS = {
    "sacpo": "black",
    "p_sacpo": "0.55",
    "tdpo": "tab:olive",
    "rsa_cvar97": "tab:blue",
    "rsa_cvar50": "tab:cyan",
    "rsa_cvar10": "navy",
    "rsa_erm1": "tab:pink",
    "rsa_erm5": "tab:purple",
    "rsa_p": "lightsteelblue",
    "mean": "tab:green",
    "indicator": "tab:orange",
    "hinge": "tab:red",
}
MARKERS = {"order": "o", "mean": "s", "indicator": "D", "hinge": "^"}
SHOWN = {"cvar_0.05": "CVaR 5 %", "cvar_0.01": "CVaR 1 %", "cost": "mean cost"}


def frontier(results: Mapping[str, Any], methods: Sequence[Method], file: Path) -> None:
    """CVaR 5 % over mean reward: means over seeds joined by λ, single models as faint points."""
    figure, axes = plt.subplots(1, len(COMPARED), figsize=(12.5, 5.2), sharey=True, constrained_layout=True)
    for axis, split in zip(axes, COMPARED, strict=True):
        for method in methods:
            _path(axis, results, method, split)
        for name, words in (("warmup", "warm-up"), ("reward_dpo", "reward step (DPO)")):
            point = results["averages"][name][split]
            axis.plot(point["reward"], point["cvar_0.05"], "*", color="black", markersize=11, zorder=5)
            axis.annotate(
                words, (point["reward"], point["cvar_0.05"]), xytext=(0, 7), textcoords="offset points", ha="center"
            )
        axis.set_yscale("symlog", linthresh=1)
        axis.set(xlabel="mean reward (right is better)", title=TITLES[split])
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("mean cost of the worst 5 % (down is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    seeds = len(results["seeds"])
    figure.suptitle(f"Paths by λ (or by the share of a merge): means over {seeds} seeds; faint: single models")
    figure.savefig(file, dpi=DPI)
    plt.close(figure)


def _path(axis: Axes, results: Mapping[str, Any], method: Method, split: str) -> None:
    style: dict[str, Any] = {"color": COLORS[method.name], "marker": MARKERS[method.labels]}
    line = "--" if method.merged else "-"
    points = [results["averages"][name][split] for name in path(method)]
    axis.plot(
        *([p[key] for p in points] for key in ("reward", "cvar_0.05")),
        line,
        **style,
        markersize=6,
        label=method.title,
        linewidth=2.4 if method.name == BASELINE else 1.5,
        zorder=4 if method.name == BASELINE else 3,
    )
    single = [
        models[name]["measured"]["splits"][split] for models in results["seeds"].values() for name in path(method)
    ]
    x, y = ([p[key] for p in single] for key in ("reward", "cvar_0.05"))
    axis.plot(x, y, linestyle="", alpha=0.22, markersize=3, **style)


def matched(results: Mapping[str, Any], methods: Sequence[Method], file: Path) -> None:
    """Relative differences from SACPO at the same reward and objective: seeds as points, mean and 95 % interval."""
    shown = [method for method in methods if method.name != BASELINE]
    figure, grid = plt.subplots(
        len(AXES),
        len(SHOWN),
        figsize=(12.5, 1.2 + 0.62 * len(shown) * len(AXES) / 1.4),
        sharey=True,
        sharex=True,
        constrained_layout=True,
        squeeze=False,
    )
    for row, (axis_name, words) in zip(grid, AXES.items(), strict=True):
        for axis, (measure, title) in zip(row, SHOWN.items(), strict=True):
            for place, method in enumerate(reversed(shown)):
                for split, offset in (("test", 0.17), ("shifted", -0.17)):
                    found = results["matched"][BASELINE][split][axis_name][method.name]
                    _row(axis, found, measure, place + offset, COLORS[method.name], split == "test")
            axis.axvline(0, color="black", linewidth=1)
            axis.grid(axis="x", alpha=0.25)
            axis.set_xlim(-105, 205)
            if axis_name == "reward":
                axis.set_title(title)
        row[0].set_yticks(range(len(shown)), [method.title for method in reversed(shown)])
        row[0].set_ylabel(f"at the same {words}")
    for axis in grid[-1]:
        axis.set_xlabel("% more than SACPO (left is better)")
    figure.suptitle(
        "Difference from SACPO of the same seed: seeds as points, mean and 95 % interval as bars.\n"
        "Filled: test prompts; open: tasks not in the training data. Arrows point at what lies outside."
    )
    figure.savefig(file, dpi=DPI)
    plt.close(figure)


def _row(axis: Axes, found: Mapping[str, Any], measure: str, height: float, color: str, filled: bool) -> None:
    values = [one["relative"][measure] for one in found["seeds"] if one and one["relative"][measure] is not None]
    if not values:
        axis.text(0, height, "no overlap", color=color, fontsize=7, va="center", ha="center", backgroundcolor="white")
        return
    face = color if filled else "white"
    for value in (100 * value for value in values):
        place, marker = (value, "o") if -105 < value < 205 else ((200, ">") if value > 0 else (-100, "<"))
        axis.plot(place, height, marker, color=color, markerfacecolor=face, markersize=4, alpha=0.8)
    summary = found["relative"][measure]
    if summary["low"] is not None:
        axis.plot([100 * summary["low"], 100 * summary["high"]], [height] * 2, color=color, linewidth=2, alpha=0.5)
        axis.plot(100 * summary["mean"], height, "|", color=color, markersize=11, markeredgewidth=2)


def draw(results: Mapping[str, Any], methods: Sequence[Method], folder: Path) -> None:
    frontier(results, methods, folder / "tail_risk_frontier.png")
    matched(results, methods, folder / "tail_risk_matched.png")
