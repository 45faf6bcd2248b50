"""Results as files and as a table: one row for each metric of a provider in a mode of a case, one environment."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.kernels.agreement import Error
from benchmarks.kernels.cases import AXES, Case, Mode, Spec, title
from benchmarks.kernels.providers import Missing
from benchmarks.timing import Quantiles, Refused

Record = dict[str, Any]

COLUMNS = (
    *("op", "risk", "head", "shape", "N", "H", "V", "S", "T", "dtype", "threads", "provider", "mode"),
    *("metric", "unit", "relative_to", "q50", "q20", "q80", "samples", "allowed", "expected_bytes", "expected_flops"),
)
TIME, PEAK, EXTRA = "time", "peak_memory", "extra_memory"
REFERENCES = ("gemms", "copy", "naive", "research", "liger-dpo")  # what others are measured in


class Results(NamedTuple):
    """What a run found so far. `done` names the cases that need not run again."""

    environment: dict[str, Any]
    records: list[Record]
    missing: list[Record]
    disagreements: list[str]
    done: list[str]


def case_columns(spec: Spec, dtype: str, threads: int) -> Record:
    sizes = dict(zip(AXES[spec.op], spec.shape, strict=True))
    risk = "" if spec.op == "nested" else str(spec.risk)
    return {"op": spec.op, "risk": risk, "head": spec.head, "shape": spec.size, **sizes} | {
        "dtype": dtype,
        "threads": threads,
    }


def case_name(record: Record) -> str:
    """The case that a record is about, as `str` of its `Spec`."""
    return title(record["op"], record["shape"], record["risk"], record["head"])


def time_record(
    case: Case, columns: Record, provider: str, mode: str, times: Quantiles, samples: int, relative_to: str = ""
) -> Record:
    plain: Mode = "forward+backward" if mode.startswith("forward+backward") else "forward"
    return columns | {
        "provider": provider,
        "mode": mode,
        "metric": TIME,
        "unit": "x" if relative_to else "ms",
        "relative_to": relative_to,
        **{name: round(value, 5) for name, value in zip(("q50", "q20", "q80"), times, strict=True)},
        "samples": samples,
        "expected_bytes": int(case.moved[plain]),
        "expected_flops": int(case.flops[plain]),
    }


def memory_record(columns: Record, provider: str, mode: str, metric: str, size: int) -> Record:
    return columns | {"provider": provider, "mode": mode, "metric": metric, "unit": "B", "q50": size}


def error_record(columns: Record, error: Error) -> Record:
    found = {"metric": f"error of {error.name}", "unit": "", "q50": error.size, "allowed": error.allowed}
    return columns | {"provider": error.provider, "mode": "forward+backward"} | found


def missing_record(columns: Record, missing: Missing, mode: str = "") -> Record:
    return columns | {"provider": missing.name, "mode": mode, "reason": missing.reason}


# ---- files -----------------------------------------------------------------------------------------------------------


def write_json(file: Path, content: dict[str, Any]) -> None:
    """It appears whole or not at all: a killed run leaves what was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    partial.write_text(as_lines(content) + "\n")
    os.replace(partial, file)


def as_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each entry of a list, so that a difference between two files can be read."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            entries = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            parts.append(f" {json.dumps(key)}: [\n{entries}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def write_csv(file: Path, runs: Iterable[dict[str, Any]]) -> None:
    """The records of one or several runs; the environment stands in lines that begin with #."""
    runs = list(runs)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        for run in runs:
            stream.write(f"# {json.dumps(run['environment'])}\n")
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for run in runs:
            writer.writerows(run["records"])


def read_run(file: Path) -> dict[str, Any]:
    """One file of results.

    Raises:
        Refused: it holds something else.
    """
    try:
        run = json.loads(file.read_text())
    except ValueError as error:
        raise Refused(f"{file} is no JSON ({error}): remove it, or restore it") from error
    if not isinstance(run, dict) or not run.keys() & {"environment", "op"}:
        raise Refused(f"{file} holds no results of these benchmarks: move it elsewhere")
    return run


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Every file with records in a folder, in the order of their names.

    Raises:
        Refused: a file cannot be read, or is not one of results.
    """
    runs = [read_run(file) | {"file": file.name} for file in sorted(folder.glob("*.json"))]
    return [run for run in runs if "records" in run]


# ---- table -----------------------------------------------------------------------------------------------------------


def tables(records: Sequence[Record], shares: dict[tuple, float]) -> list[Table]:
    """One for each operator, shape and head. `shares`: errors as a share of what was allowed, by case and provider."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record["metric"] == TIME and not record["relative_to"]:
            groups.setdefault((record["op"], record["shape"], record["head"]), []).append(record)
    return [_table(key, group, records, shares) for key, group in groups.items()]


def _table(key: tuple, group: list[Record], records: Sequence[Record], shares: dict[tuple, float]) -> Table:
    op, shape, head = key
    floor = "gemms" if op == "linear" else "copy"
    table = Table(title=title(op, shape, "", head))
    for name in ("risk", "mode", "provider"):
        table.add_column(name)
    for name in ("ms", "20 %", "80 %", f"% of {floor}", "x naive", "extra MiB", "error / allowed"):
        table.add_column(name, justify="right")
    found = index(records)
    for record, following in zip(group, [*group[1:], None], strict=False):
        same = following is not None and all(record[k] == following[k] for k in ("risk", "mode"))
        extra = lookup(found, record, metric=EXTRA)
        cells = [f"{record[name]:.3f}" for name in ("q50", "q20", "q80")]
        share, naive = (lookup(found, record, relative_to=name) for name in (floor, "naive"))
        cells += [
            "–" if share is None else f"{100 / share['q50']:.1f}",
            "–" if naive is None else f"{naive['q50']:.2f}",
        ]
        cells.append("–" if extra is None else f"{extra['q50'] / 2**20:.1f}")
        error = shares.get((record["op"], record["shape"], record["head"], record["risk"], record["provider"]))
        cells.append("–" if error is None else f"{error:.2f}")
        table.add_row(record["risk"], record["mode"], record["provider"], *cells, end_section=not same)
    return table


IDENTITY = ("op", "risk", "head", "shape", "provider", "mode", "metric", "relative_to")


def index(records: Iterable[Record]) -> dict[tuple, Record]:
    return {tuple(record.get(name, "") for name in IDENTITY): record for record in records}


def lookup(found: dict[tuple, Record], like: Record, **other: Any) -> Record | None:
    """The record that differs from `like` in this only; its time where nothing else is said."""
    wanted = like | {"metric": TIME, "relative_to": ""} | other
    return found.get(tuple(wanted.get(name, "") for name in IDENTITY))
