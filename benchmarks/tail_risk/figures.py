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
from benchmarks.tail_risk.prompts import Split

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
OFFSETS = {"test": 0.18, "shifted": -0.18}
MARKERS = {"order": "o", "mean": "s", "indicator": "D", "hinge": "^"}
SHOWN = {"cvar_0.05": "CVaR 5 %", "cvar_0.01": "CVaR 1 %", "cost": "mean cost"}


def frontier(results: Mapping[str, Any], methods: Sequence[Method], file: Path) -> None:
    """CVaR 5 % on both splits over mean reward on test prompts: means joined by λ, single models as faint points."""
    figure, axes = plt.subplots(1, len(COMPARED), figsize=(12.5, 5.2), sharey=True, constrained_layout=True)
    for axis, split in zip(axes, COMPARED, strict=True):
        for method in methods:
            _path(axis, results, method, split)
        for name, words in (("warmup", "warm-up"), ("reward_dpo", "reward step (DPO)")):
            reward, tail = (results["averages"][name][part][key] for part, key in _place(split))
            axis.plot(reward, tail, "*", color="black", markersize=11, zorder=5)
            axis.annotate(words, (reward, tail), xytext=(0, 8), textcoords="offset points", ha="center")
        axis.set_yscale("symlog", linthresh=1)
        axis.set(xlabel="mean reward on test prompts (right is better)", title=TITLES[split])
        axis.margins(0.1)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("CVaR 5 %: mean cost of the worst answers (down is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    count = len(results["seeds"])
    figure.suptitle(f"Paths by λ, or by the share of a merge: means over {count} seeds; faint: single models")
    figure.savefig(file, dpi=DPI)
    plt.close(figure)


def _place(split: Split) -> tuple[tuple[Split, str], tuple[Split, str]]:
    """Where a model stands: its reward on test prompts, as no model earns much on tasks it has never seen."""
    return ("test", "reward"), (split, "cvar_0.05")


def _path(axis: Axes, results: Mapping[str, Any], method: Method, split: Split) -> None:
    style: dict[str, Any] = {"color": COLORS[method.name], "marker": MARKERS[method.labels]}
    means = [results["averages"][name] for name in path(method)]
    single = [models[name]["measured"]["splits"] for models in results["seeds"].values() for name in path(method)]
    x, y = ([figures[part][key] for figures in means] for part, key in _place(split))
    first = method.name == BASELINE
    line: dict[str, Any] = {"linestyle": "--" if method.merged else "-", "linewidth": 2.4 if first else 1.5}
    axis.plot(x, y, **style, **line, markersize=6, label=method.title, zorder=4 if first else 3)
    x, y = ([figures[part][key] for figures in single] for part, key in _place(split))
    axis.plot(x, y, linestyle="", alpha=0.22, markersize=3, **style)


def matched(results: Mapping[str, Any], methods: Sequence[Method], file: Path) -> None:
    """Differences from SACPO where both stand at the same place on test prompts: seeds, mean and 95 % interval."""
    shown = [method for method in methods if method.name != BASELINE]
    size = (12.5, 1.6 + 0.42 * len(shown) * len(AXES))
    figure, grid = plt.subplots(
        len(AXES), len(SHOWN), figsize=size, sharey=True, sharex="col", constrained_layout=True, squeeze=False
    )
    for row, (axis_name, words) in zip(grid, AXES.items(), strict=True):
        found = {split: results["matched"][BASELINE][split][name] for split, name in _axes(axis_name).items()}
        for axis, measure in zip(row, SHOWN, strict=True):
            for place, method in enumerate(reversed(shown)):
                for split, offset in OFFSETS.items():
                    one = found[split][method.name]
                    _row(axis, one, measure, place + offset, COLORS[method.name], filled=split == "test")
            axis.axvline(0, color="black", linewidth=1)
            axis.grid(axis="x", alpha=0.25)
            axis.set_xlim(*_limits(results, measure))
        _counts(row[-1], found, shown)
        row[0].set_yticks(range(len(shown)), [method.title for method in reversed(shown)])
        row[0].set_ylabel(f"at the same {words}")
    for axis, title in zip(grid[-1], SHOWN.values(), strict=True):
        axis.set_xlabel(f"{title}, difference from SACPO")
    figure.suptitle(
        "Method − SACPO of the same seed, left is lighter: seeds as points, mean and 95 % interval over seeds.\n"
        "Filled: test prompts; open: tasks not in the training data, at the same place on test prompts. "
        "Right: seeds whose paths overlap."
    )
    figure.savefig(file, dpi=DPI)
    plt.close(figure)


def _axes(name: str) -> dict[str, str]:
    """Both splits are compared where the two paths meet on test prompts."""
    return {"test": name, "shifted": f"test_{name}"}


def _limits(results: Mapping[str, Any], measure: str) -> tuple[float, float]:
    """Wide enough for all seeds, on both axes and splits; intervals of few seeds may be cut."""
    values = [0.0]
    for axis_name in AXES:
        for split, name in _axes(axis_name).items():
            for found in results["matched"][BASELINE][split][name].values():
                values += [one["difference"][measure] for one in found["seeds"] if one]
    margin = 0.06 * (max(values) - min(values)) + 0.1
    return min(values) - margin, max(values) + margin


def _row(axis: Axes, found: Mapping[str, Any], measure: str, height: float, color: str, filled: bool) -> None:
    values = [one["difference"][measure] for one in found["seeds"] if one]
    face = color if filled else "white"
    axis.plot(values, [height] * len(values), "o", color=color, markerfacecolor=face, markersize=4, alpha=0.85)
    summary = found["difference"][measure]
    if summary["low"] is not None:
        axis.plot([summary["low"], summary["high"]], [height] * 2, color=color, linewidth=2, alpha=0.45)
        axis.plot(summary["mean"], height, "|", color=color, markersize=11, markeredgewidth=2)


def _counts(axis: Axes, found: Mapping[str, Any], shown: Sequence[Method]) -> None:
    """Beside the last column: how many seeds each row of points has."""
    for place, method in enumerate(reversed(shown)):
        for split, offset in OFFSETS.items():
            seeds = found[split][method.name]["seeds"]
            words = f"{sum(one is not None for one in seeds)}/{len(seeds)}"
            axis.annotate(
                words, (1.01, place + offset), xycoords=("axes fraction", "data"), va="center", fontsize=7, color="0.35"
            )


def draw(results: Mapping[str, Any], methods: Sequence[Method], folder: Path) -> None:
    frontier(results, methods, folder / "tail_risk_frontier.png")
    matched(results, methods, folder / "tail_risk_matched.png")
