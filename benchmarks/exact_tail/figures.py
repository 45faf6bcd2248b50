"""Pictures of exact_tail.json: frontiers of one world, and differences over all of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsa_lightning.evaluation.figures import COLOURS, styled

FRONTIER = (
    "SACPO",
    "TDPO1",
    "RSA v1 CVaR(0.1)",
    "RSA v2 CVaR(0.97)",
    "hinge, worst 5 %",
    "indicator, cost > 1",
    "exponential, mu 0.5",
)
TITLES = {"reward": "equal reward", "value": "equal E[r] − β KL", "reward and KL": "equal reward and KL"}


@styled
def frontier(found: Mapping[str, Any], path: Path) -> Path:
    """What a method keeps against CVaR 5 %, along its multipliers, in the first world: mean reward, and less β KL."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for ax, measure in zip(axes, ("reward", "value"), strict=True):
        for name, colour in zip(FRONTIER, COLOURS, strict=True):
            points = sorted(found["paths"].get(name, ()), key=lambda point: point["strength"])
            ax.plot(
                [point["cvar5"] for point in points], [point[measure] for point in points],
                color=colour, marker="o", markersize=3.5, linewidth=1.5 if name != "SACPO" else 2.5, label=name,
            )  # fmt: skip
        ax.set_xlabel("mean cost of the worst 5 % (CVaR)")
    axes[0].set(title="Mean reward", ylabel="E[r]")
    axes[1].set(title="Mean reward less the price of moving", ylabel="E[r] − β KL")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    figure.savefig(path)
    pyplot.close(figure)
    return path


@styled
def differences(found: Mapping[str, Any], path: Path, lam: float) -> Path:
    """The change of CVaR 5 % against SACPO under three kinds of equality: worlds as points, median and interval."""
    names = [name for name in found["methods"] if name != "SACPO"]
    groups = list(dict.fromkeys(found["groups"].values()))
    colours = {name: COLOURS[groups.index(found["groups"][name]) % len(COLOURS)] for name in names}
    return _three_panels({name: found["methods"][name] for name in names}, colours, path, lam, widest=105)


@styled
def limited_control(found: Mapping[str, Any], path: Path, lam: float) -> Path:
    """The same where the policy chooses the first token only, against the plain policy of that token."""
    cells = found["regimes"]["limited control"]
    return _three_panels(cells, dict(zip(cells, COLOURS, strict=False)), path, lam, widest=55)


def _three_panels(cells: Mapping[str, Any], colours: Mapping[str, str], path: Path, lam: float, widest: int) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.27 * len(cells) + 2), sharey=True, layout="constrained")
    for ax, (how, title) in zip(axes, TITLES.items(), strict=True):
        for place, name in enumerate(cells):
            cell = cells[name][how][str(lam)]["cvar5"]
            if cell["worlds"]:
                _spread(ax, place, cell, colours[name], widest)
        ax.axvline(0, color="#444444", linewidth=1)
        ax.set(title=title, xlim=(-widest, widest))
    axes[0].set_yticks(range(len(cells)), list(cells))
    axes[0].invert_yaxis()
    figure.supxlabel(
        f"lighter ←  CVaR 5 % against SACPO at λ = {lam:g}, in percent of SACPO's above the safest cost  → heavier\n"
        "diamonds: medians, with a 95 % interval from six worlds; triangles: beyond the axis; empty rows: not reached",
        fontsize=10,
    )
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _spread(ax: Any, place: int, cell: Mapping[str, Any], colour: str, widest: int) -> None:
    values = [100 * value for value in cell["values"]]
    ax.plot(values, [place] * len(values), "o", color=colour, markersize=3, alpha=0.35)
    if cell["low"] is not None:
        ax.plot([100 * cell["low"], 100 * cell["high"]], [place, place], color=colour, linewidth=2)
    middle = 100 * cell["median"]
    if abs(middle) > widest:
        ax.plot([math.copysign(0.97 * widest, middle)], [place], ">" if middle > 0 else "<", color=colour, markersize=6)
        return
    filled = colour if cell["low"] is not None else "white"
    ax.plot([middle], [place], "D", color=colour, markerfacecolor=filled, markersize=5)
