"""The findings as a page of tables."""

from collections.abc import Sequence
from typing import Any

Found = dict[str, Any]


def page(found: Found) -> str:
    """Markdown, of what the result file holds."""
    environment = found["environment"]
    load, end = (" / ".join(map(str, found_load)) for found_load in (environment["load"], found["load_at_the_end"]))
    lines = [
        "# Training at scale, measured",
        "",
        f"Written by `python -m benchmarks scale`, {environment['date']}, on {environment['device']}, "
        f"{environment['cores']} cores, one thread a process. Load (1, 5, 15 min) {load} at the start, {end} at the "
        "end. Medians, 20 to 80 % of the samples in brackets; `x` compares samples a moment apart. On a machine that "
        "others use wall times say little: CPU times, of the process itself, stand beside them.",
        "",
    ]
    for title, make in SECTIONS.items():
        rows = make(found)
        if rows:
            lines += [f"## {title}", "", *NOTES.get(title, ()), *_table(rows), ""]
    return "\n".join(lines)


def _processes(found: Found) -> list[Found]:
    return [
        {
            "processes": row["team"],
            "method": row["method"],
            "reference": row["reference"],
            "batches": row["layout"],
            "parameters": row["parameters"],
            "steps/s": f"{row['steps_per_s']:.3g}",
            "x live, padded": _ranged(row, "x"),
            "x live, padded, CPU time": _ranged(row, "x_cpu"),
            "x one process": _ranged(row, "x_alone"),
            "x one process, CPU time": _ranged(row, "x_alone_cpu"),
            "peak MiB": f"{row['peak_mib']:.1f}",
            "held MiB": f"{row['held_mib']:.1f}",
        }
        for row in found["processes"]
    ]


def _traffic(found: Found) -> list[Found]:
    rows = []
    for row in (*found["processes"], *found["traffic"]):
        sent = row["traffic"]
        if sent is None:
            continue
        cells = {
            kind: f"{sent['bytes'].get(kind, 0) / 1e6:.3f}" + (f" ({least / 1e6:.3f})" if least else "")
            for kind, least in sent["least_by_kind"].items()
        }
        rest = sum(count for kind, count in sent["bytes"].items() if kind not in cells)
        rows.append(
            {"processes": row["team"], "method": row["method"], "reference": row["reference"]}
            | {"batches": row["layout"], **cells, "other": f"{rest / 1e6:.6f}", "x least": sent["times_least"]}
        )
    return rows


def _references(found: Found) -> list[Found]:
    return [
        {
            "method": row["method"],
            "reference": row["reference"],
            "ms": _ranged(row, "ms"),
            "CPU ms": _ranged(row, "cpu_ms"),
            "x live": _ranged(row, "x"),
            "x live, CPU time": _ranged(row, "x_cpu"),
            "ceiling": row["ceiling"],
        }
        for row in found["references"]
    ]


def _layouts(found: Found) -> list[Found]:
    return [
        {
            "lengths": row["mix"],
            "batches": row["layout"],
            "padding": f"{100 * row['padding']:.0f} %",
            "steps/s": f"{row['steps_per_s']:.3g}",
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "x padded": f"{row['x_padded']:.2f}",
            "x padded, CPU time": f"{row['x_padded_cpu']:.2f}",
        }
        for row in found["layouts"]
    ]


def _cost(found: Found) -> list[Found]:
    return [
        {name: row[name] for name in ("tokens", "vocabulary", "parameters")}
        | {"ms": _ranged(row, "ms")}
        | {part: f"{100 * row[f'{part}_ms'] / row['ms']:.0f} %" for part in ("transformer", "reference", "head")}
        for row in found["cost"]
    ]


def _goals(found: Found) -> list[Found]:
    keys = ("goal", "measured", "ceiling", "verdict")
    return [{key: row[key] for key in keys} for row in found["goals"] if row["verdict"] != "not measured"]


SECTIONS = {
    "Goals": _goals,
    "Processes": _processes,
    "Bytes sent": _traffic,
    "Reference on disk": _references,
    "Layouts of batches": _layouts,
    "Cost of a step": _cost,
}
NOTES = {
    "Processes": (
        "All take the same pairs in a step, those with buckets others, and came to the same losses. `held`: weights of",
        "policy and reference and states of the optimizer of one process; `peak`: most bytes of tensors that one step",
        "makes beside them, of the same pairs too: between buckets and others that says nothing.",
        "",
    ),
    "Bytes sent": (
        "MB of one process and step, in brackets the least that the sharding has to send: (N-1)/N of the weights for",
        "forward, of the blocks' again for backward, of the gradients, of a live reference's blocks (its embedding",
        "stays gathered from step to step); between replicas twice that of the gradients' shards.",
        "",
    ),
    "Reference on disk": ("The ceiling is that of the count of products, `benchmarks/scale/cached.py`.", ""),
    "Cost of a step": (
        "RSA with CVaR(0.97); by CPU time on a CPU. The parts are medians of differences between steps a moment apart:",
        "where they are small they are noise. In the picture `scale_cost.png`.",
        "",
    ),
}


def _ranged(row: Found, name: str) -> str:
    if name not in row:
        return "–"
    return f"{row[name]:.3g} ({row[f'{name}_q20']:.3g}–{row[f'{name}_q80']:.3g})"


def _table(rows: Sequence[Found]) -> list[str]:
    head = list(rows[0])
    cells = [head, ["---"] * len(head), *([str(value) for value in row.values()] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]
