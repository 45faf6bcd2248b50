"""The report's figures, as PNG files. matplotlib is optional and imported here only, inside the calls."""

import csv
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsa_lightning.evaluation import tail
from rsa_lightning.evaluation.frontier import pareto_front

# Okabe & Ito (2008): told apart with every common form of colour blindness; without its yellow, too pale for lines
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.dpi": 150,
}
TAIL_SHARE = 0.1
LOG_RATIO = 20.0  # largest over typical cost from which the axis is logarithmic


class MatplotlibMissing(ImportError):
    """Figures were asked for and matplotlib is not installed."""


class Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]  # (column of metrics.csv without "train/" or "val/", label)


PANELS = (
    Panel("Negative log-likelihood", "nats per token", (("nll", "nll"),)),
    Panel("Loss", "nats per example", (("loss", "loss"),)),
    Panel("Reward margin", "chosen − rejected", (("rewards/margins", "margin"),)),
    Panel("Reward accuracy", "share of pairs", (("rewards/accuracies", "accuracy"),)),
    Panel("KL from the reference", "nats per response", (("kl/chosen", "chosen"), ("kl/rejected", "rejected"))),
    Panel("Sequential risk", "nats per response", (("risk/chosen", "chosen"), ("risk/rejected", "rejected"))),
)


def require_matplotlib() -> None:
    """Raises MatplotlibMissing, with the mend, before anything is written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MatplotlibMissing(
            "figures need matplotlib: pip install 'rsa_lightning[report]', or ask for a report without figures"
        )


def styled(draw: Callable[..., Path | None]) -> Callable[..., Path | None]:
    """Draw under STYLE: axes read the settings when they are made."""

    @functools.wraps(draw)
    def draw_styled(*args: Any) -> Path | None:
        require_matplotlib()
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args)

    return draw_styled


def draw_all(
    folder: Path, found: Mapping[str, Any], metrics: Mapping[str, Path], costs: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    """Draw what there are data for; (file name, caption) of each figure written."""
    drawn = (
        (
            reward_cost(found["models"], folder / "reward_cost.png"),
            "Mean reward against cost, models in step order; bars are 95 % intervals. Up and to the left is better.",
        ),
        (
            cost_quantiles(costs, folder / "cost_quantiles.png"),
            "Quantiles of the cost of sampled answers, and the same curves over the worst tenth.",
        ),
        (
            training_curves(metrics, folder / "training_curves.png"),
            "Training curves: light lines are training batches, dark lines their running mean, dots validation.",
        ),
    )
    return [(path.name, caption) for path, caption in drawn if path is not None]


@styled
def reward_cost(models: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Mean reward against mean cost, and against the mean cost of the worst 5 %, joined by arrows in step order."""
    known = [model for model in models if model["reward_mean"] is not None and model["cost_mean"] is not None]
    if not known:
        return None
    figure = _figure(10.5, 4.6)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (title, label, cost_of) in zip(axes, SIDES, strict=True):
        points = []
        for i, model in enumerate(known):
            (x, x_interval), (y, y_interval) = cost_of(model), (model["reward_mean"], model["ci95"]["reward_mean"])
            points.append((x, y))
            ax.errorbar(
                x, y, xerr=_bars(x, x_interval), yerr=_bars(y, y_interval), **_look(i), markersize=9, capsize=3,
                markeredgecolor="white", linestyle="none", label=f"{i + 1}. {model['name']}", zorder=3,
            )  # fmt: skip
        for start, end in itertools.pairwise(points):
            arrow = {
                "arrowstyle": "-|>",
                "color": "#777777",
                "shrinkA": 7,
                "shrinkB": 7,
                "linewidth": 1.2,
                "mutation_scale": 13,
            }
            ax.annotate("", end, start, arrowprops=arrow, zorder=2)
        ax.set(title=title, xlabel=label)
        ax.margins(0.12)
    axes[0].set_ylabel("mean reward per answer")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(known), 5))
    return _save(figure, path)


@styled
def frontier(models: Sequence[Mapping[str, Any]], chosen: Sequence[str], path: Path) -> Path | None:
    """Mean reward against mean cost, and against the mean cost of the worst 5 %, one number per model.

    Models on the Pareto front are dark and joined by the staircase of what they reach; those `chosen` are ringed.
    """
    known = [model for model in models if model["reward_mean"] is not None and model["cost_mean"] is not None]
    if not known:
        return None
    columns = 3
    figure = _figure(10.5, 4.6 + 0.21 * math.ceil(len(known) / columns))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (title, label, cost_of) in zip(axes, SIDES, strict=True):
        points = [(cost_of(model)[0], model["reward_mean"]) for model in known]
        front = pareto_front([y for _, y in points], [x for x, _ in points])
        stairs = {"color": "#777777", "linewidth": 1.2, "linestyle": "--", "drawstyle": "steps-post"}
        ax.plot(*zip(*(points[i] for i in front), strict=True), **stairs, zorder=2)
        for i, (model, (x, y)) in enumerate(zip(known, points, strict=True)):
            ax.errorbar(
                x, y, xerr=_bars(x, cost_of(model)[1]), yerr=_bars(y, model["ci95"]["reward_mean"]), marker="o",
                color=COLOURS[0] if i in front else "#AAAAAA", markersize=8, capsize=2, elinewidth=1,
                markeredgecolor="white", linestyle="none", label=f"{i + 1}. {model['name']}", zorder=3 + (i in front),
            )  # fmt: skip
            ax.annotate(str(i + 1), (x, y), xytext=(6, 6), textcoords="offset points", fontsize=10, zorder=5)
        ringed = [point for model, point in zip(known, points, strict=True) if model["name"] in chosen]
        ring = {"s": 220, "facecolors": "none", "edgecolors": COLOURS[4], "linewidths": 2, "zorder": 5}
        if ringed:
            ax.scatter(*zip(*ringed, strict=True), **ring)
        ax.set(title=title, xlabel=label)
        ax.margins(0.12)
    axes[0].set_ylabel("mean reward per answer")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(known), columns))
    return _save(figure, path)


@styled
def cost_quantiles(costs: Mapping[str, Tensor], path: Path) -> Path | None:
    """Cost at every quantile; on the right the worst tenth against the share of answers that cost more, rarest last."""
    if not costs:
        return None
    figure = _figure(10.5, 4.6)
    whole, worst = figure.subplots(1, 2)
    tails = []
    for i, (name, values) in enumerate(costs.items()):
        line = {"color": _look(i)["color"], "linewidth": 2, "label": name}
        levels = torch.linspace(0, 1, 501, dtype=torch.float64)
        whole.plot(levels, tail.quantile_curve(values, levels), **line)
        share = _tail_shares(len(values))
        tails.append(tail.quantile_curve(values, 1 - share))
        worst.plot(share, tails[-1], drawstyle="steps-pre", **line)
    whole.axvspan(1 - TAIL_SHARE, 1, color="#EEEEEE", zorder=0)
    whole.axhline(0, color="#777777", linewidth=1, linestyle=":")
    whole.set(title="All answers", xlabel="quantile", ylabel="cost (above 0: unsafe)", xlim=(0, 1))
    _scale_costs(whole, torch.cat(list(costs.values())))
    worst.set_xscale("log")
    worst.set_xlim(TAIL_SHARE, 0.5 / max(map(len, costs.values())))
    worst.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    worst.xaxis.set_minor_formatter(lambda *_: "")  # over one decade alone they are drawn, and overlap
    worst.set(title="The worst tenth (shaded on the left)", xlabel="share of answers that cost more", ylabel="cost")
    _scale_costs(worst, torch.cat(tails))
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(costs), 5))
    return _save(figure, path)


@styled
def training_curves(metrics: Mapping[str, Path], path: Path) -> Path | None:
    """One row of panels per step, with the panels its metrics.csv has columns for."""
    logged = {name: read_metrics(file) for name, file in metrics.items()}
    panels = {name: [p for p in PANELS if _drawn(p, found)] for name, found in logged.items()}
    panels = {name: shown for name, shown in panels.items() if shown}
    if not panels:
        return None
    figure = _figure(17.0, 3.3 * len(panels))
    rows = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for row, (name, shown) in zip(rows, panels.items(), strict=True):
        row.suptitle(f"Step: {name}", x=0.008, ha="left", fontsize=13)
        for ax, panel in zip(row.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            _draw_panel(ax, panel, logged[name])
    return _save(figure, path)


def read_metrics(file: Path) -> dict[str, list[tuple[float, float]]]:
    """metrics.csv of Lightning's CSVLogger: column -> (step, value) where logged; blanks and texts are skipped."""
    found: dict[str, list[tuple[float, float]]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for i, row in enumerate(csv.DictReader(lines)):
            step = _number(row.get("step"))
            for name, text in row.items():
                value = _number(text)
                if name and name not in ("step", "epoch") and value is not None:
                    found.setdefault(name, []).append((i if step is None else step, value))
    return found


def _draw_panel(ax: Any, panel: Panel, found: Mapping[str, list[tuple[float, float]]]) -> None:
    for i, (column, label) in enumerate(panel.curves):
        colour, several = COLOURS[i], len(panel.curves) > 1
        if train := _series(found, "train", column):
            steps, values = zip(*train, strict=True)
            ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            ax.plot(steps, _running_mean(values), color=colour, linewidth=2, label=label if several else "training")
        if val := _series(found, "val", column):
            dots = {"color": colour if several else "black", "marker": "o", "markersize": 5, "label": "validation"}
            if several:  # coloured like its curve: one more entry a curve would cover the data
                dots["label"] = None if train else label
            ax.plot(*zip(*val, strict=True), linestyle="--", linewidth=1, **dots)
    if panel.title == "Reward accuracy":
        ax.axhline(0.5, color="#777777", linewidth=1, linestyle=":")
    ax.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.22 * (high - low))  # room for the legend
    ax.legend(loc="upper center", ncols=2, columnspacing=1.0, handlelength=1.5, borderaxespad=0.2)


def _drawn(panel: Panel, found: Mapping[str, Any]) -> bool:
    return any(_series(found, split, column) for column, _ in panel.curves for split in ("train", "val"))


def _series(found: Mapping[str, list[tuple[float, float]]], split: str, column: str) -> list[tuple[float, float]]:
    # Lightning appends _step and _epoch when a value is logged at both paces
    names = (f"{split}/{column}", f"{split}/{column}_step", f"{split}/{column}_epoch")
    return next((found[name] for name in names if name in found), [])


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the curve, shorter at the ends."""
    half = max(1, len(values) // 20)
    sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
    at = torch.arange(len(values))
    low, high = (at - half).clamp(min=0), (at + half + 1).clamp(max=len(values))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def _tail_shares(answers: int) -> Tensor:
    """Where the tail of an empirical law steps: k answers of n cost more; half an answer stands for the very worst."""
    most = max(1, int(TAIL_SHARE * answers))
    return torch.tensor([*range(most, 0, -1), 0.5], dtype=torch.float64) / answers


def _scale_costs(ax: Any, values: Tensor) -> None:
    """Logarithmic where costs span orders of magnitude, linear between the typical sizes if some are not positive."""
    sizes = values[values != 0].abs()  # a world may give most of its safe answers a cost of exactly 0
    if len(sizes) == 0 or sizes.max() < LOG_RATIO * sizes.median():
        return
    if values.min() > 0:
        ax.set_yscale("log")
    else:
        linear, lowest = 10.0 ** math.ceil(math.log10(sizes.median())), values.min().item()
        ax.set_yscale("symlog", linthresh=linear)
        # the default margin is as wide below 0 as the decades above it are
        ax.set_ylim(min(1.5 * lowest, lowest - 0.3 * linear), 1.5 * values.max().item())
    ax.yaxis.set_minor_formatter(lambda *_: "")
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", "−"))


def _mean_cost(model: Mapping[str, Any]) -> tuple[float, Sequence[float] | None]:
    return model["cost_mean"], model["ci95"]["cost_mean"]


def _tail_cost(model: Mapping[str, Any]) -> tuple[float, Sequence[float] | None]:
    return model["cost_cvar"]["0.95"], model["ci95"]["cost_cvar"]["0.95"]


# the two panels of reward against cost: title, label, and what is drawn
SIDES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("Average", "mean cost per answer", _mean_cost),
    ("In the tail", "mean cost of the worst 5 % of answers", _tail_cost),
)


def _bars(value: float, interval: Sequence[float] | None) -> list[list[float]] | None:
    # a percentile interval need not contain its estimate, and matplotlib refuses negative lengths
    return None if interval is None else [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def _look(i: int) -> dict[str, str]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except (TypeError, ValueError):
        return None


def _figure(width: float, height: float) -> Any:
    # a figure without pyplot: no global state, no window system, nothing to close
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
