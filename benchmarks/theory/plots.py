"""Figures in the style of the evaluation reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from rsa_lightning.evaluation.figures import COLOURS, STYLE

BLUE, ORANGE, GREEN, PINK, RED, SKY, BLACK = COLOURS
GREY = "#777777"


def saved(file: Path, shape: tuple[int, int], draw: Callable[..., None]) -> Path:
    """A picture of rows × columns panels, which `draw` gets one by one. No date in it: the same run, the same bytes."""
    rows, columns = shape
    with rc_context(STYLE):
        figure = Figure(figsize=(4.9 * columns, 3.9 * rows), layout="constrained")
        draw(*figure.subplots(rows, columns).flat)
        figure.savefig(file, metadata={"Software": None})
    return file


def bars(axis: Any, groups: list[str], series: dict[str, list[float]], colours: list[str]) -> None:
    """Groups of bars side by side, named in the legend."""
    width = 0.8 / len(series)
    for i, ((name, values), colour) in enumerate(zip(series.items(), colours, strict=True)):
        places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axis.bar(places, values, 0.92 * width, label=name, color=colour)
    axis.set_xticks(range(len(groups)), groups)
    axis.grid(visible=False, axis="x")
