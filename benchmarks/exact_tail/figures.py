"""Pictures of exact_tail.json: frontiers of one world, and differences over all of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsa_lightning.evaluation.figures import COLOURS, styled

FRONTIER = (
    "SACPO",
    "RSA v1 CVaR(0.97)",
    "RSA v1 CVaR(0.1)",
    "RSA v2 CVaR(0.97)",
    "hinge, worst 5 %",
    "indicator, cost > 1",
    "SafeDPO",
)


@styled
def frontier(found: Mapping[str, Any], path: Path) -> Path:
    """Mean reward against mean cost and CVaR 5 %, every method a line along its multipliers, in the first world."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for ax, measure, label in zip(
        axes, ("cost", "cvar5"), ("mean cost", "mean cost of the worst 5 % (CVaR)"), strict=True
    ):
        for name, colour in zip(FRONTIER, COLOURS, strict=True):
            points = [point for point in found["paths"].get(name, ()) if point["beta"] == found["beta"]]
            points.sort(key=lambda point: point["strength"])
            ax.plot(
                [point[measure] for point in points], [point["reward"] for point in points],
                color=colour, marker="o", markersize=3.5, linewidth=1.5 if name != "SACPO" else 2.5, label=name,
            )  # fmt: skip
        ax.set_xlabel(label)
    axes[0].set(title="Average", ylabel="mean reward")
    axes[1].set_title("In the tail")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    figure.savefig(path)
    pyplot.close(figure)
    return path


@styled
def differences(found: Mapping[str, Any], path: Path, lam: float) -> Path:
    """The change of CVaR 5 % against SACPO under three kinds of equality: worlds as points, median and interval."""
    from matplotlib import pyplot

    names = [name for name in found["methods"] if name != "SACPO"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.27 * len(names) + 1.6), sharey=True, layout="constrained")
    groups = list(dict.fromkeys(found["groups"].values()))
    for ax, how in zip(axes, ("reward", "value", "reward and KL"), strict=True):
        for place, name in enumerate(names):
            cell = found["methods"][name][how][str(lam)]["cvar5"]
            if cell["worlds"]:
                colour = COLOURS[groups.index(found["groups"][name]) % len(COLOURS)]
                _spread(ax, place, cell, colour)
        ax.axvline(0, color="#444444", linewidth=1)
        ax.set(
            title={"reward": "equal reward", "value": "equal E[r] − β KL", "reward and KL": "equal reward and KL"}[how],
            xlabel="change of CVaR 5 %, percent of SACPO's above the safest",
            xlim=(-105, 105),
        )
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(path)
    pyplot.close(figure)
    return path


@styled
def limited_control(found: Mapping[str, Any], path: Path, lam: float) -> Path:
    """The same where the policy chooses the first token only."""
    from matplotlib import pyplot

    cells = found["regimes"]["limited control"]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.4 * len(cells) + 1.6), sharey=True, layout="constrained")
    for ax, how in zip(axes, ("reward", "value", "reward and KL"), strict=True):
        for place, name in enumerate(cells):
            cell = cells[name][how][str(lam)]["cvar5"]
            if cell["worlds"]:
                _spread(ax, place, cell, COLOURS[place % len(COLOURS)])
        ax.axvline(0, color="#444444", linewidth=1)
        ax.set(
            title={"reward": "equal reward", "value": "equal E[r] − β KL", "reward and KL": "equal reward and KL"}[how],
            xlabel="change of CVaR 5 %, percent",
        )
    axes[0].set_yticks(range(len(cells)), list(cells))
    axes[0].invert_yaxis()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _spread(ax: Any, place: int, cell: Mapping[str, Any], colour: str) -> None:
    values = [100 * value for value in cell["values"]]
    ax.plot(values, [place] * len(values), "o", color=colour, markersize=3, alpha=0.35)
    low, middle, high = (100 * cell[key] for key in ("low", "median", "high"))
    ax.plot([low, high], [place, place], color=colour, linewidth=2)
    ax.plot([middle], [place], "D", color=colour, markersize=5)
