"""The picture of `cost`: a step and its parts, along three axes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale.cost import PARTS
from rsa_lightning.evaluation.figures import COLOURS, styled

AXES = {"tokens": "tokens of a row", "vocabulary": "vocabulary", "parameters": "parameters (tied)"}


@styled
def draw(cost: Sequence[dict[str, Any]], path: Path, where: str) -> Path:
    """Milliseconds against length, vocabulary and size, log axes; at each point the share of the head."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        points = sorted((point for point in cost if point["axis"] == axis), key=lambda point: point[axis])
        x = [point[axis] for point in points]
        panel.plot(x, [point["ms"] for point in points], color="black", marker="o", linewidth=2.5, label="step")
        panel.fill_between(x, [p["ms_q20"] for p in points], [p["ms_q80"] for p in points], color="black", alpha=0.15)
        for part, colour in zip(PARTS, COLOURS, strict=False):
            # a part that is lost in the noise of the others has no place on a log axis
            shown = [(p[axis], p[f"{part}_ms"]) for p in points if p[f"{part}_ms"] > 0]
            panel.plot(*zip(*shown, strict=True), color=colour, marker="o", markersize=3.5, label=part)
        for point in points:
            share = f"{100 * point['head_ms'] / point['ms']:.0f} %"
            panel.annotate(
                share, (point[axis], point["ms"]), (0, 7), textcoords="offset points", ha="center", fontsize=8
            )
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.margins(y=0.12)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend()
    figure.suptitle(f"A step of RSA, CVaR(0.97), and its parts; head in percent ({where})")
    figure.savefig(path)
    pyplot.close(figure)
    return path
