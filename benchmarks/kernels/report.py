"""What a run of kernels says: tables, goals, disagreements; and its files."""

import sys
from pathlib import Path

from rich.console import Console

from benchmarks.kernels.goals import as_records, goals_table, verdicts
from benchmarks.kernels.results import Record, Results, tables, write_csv, write_json

CONSOLE_WIDTH = 150


def show(results: Results) -> None:
    """Tables, what could not run, goals that were measured; disagreements on the standard error."""
    console = Console(width=CONSOLE_WIDTH)
    for table in tables(results.records, _shares(results.records)):
        console.print(table)
    for line in dict.fromkeys(map(_not_run, results.missing)):
        console.print(line, markup=False, highlight=False)
    measured = [verdict for verdict in verdicts([_content(results)]) if verdict.measured is not None]
    if measured:
        console.print(goals_table(measured))
    if results.disagreements:
        print("\n".join(["disagree with the definition and were not timed:", *results.disagreements]), file=sys.stderr)


def write(results: Results, folder: Path) -> None:
    """`kernels_cuda`, or `kernels_cpu_` with the threads; as JSON and as CSV."""
    threads = results.environment["threads"]
    name = "kernels_cuda" if "capability" in results.environment else f"kernels_cpu_{threads}_threads"
    content = _content(results)
    write_json(folder / f"{name}.json", content)
    write_csv(folder / f"{name}.csv", [content])


def _content(results: Results) -> dict:
    content = results._asdict()
    found = [verdict for verdict in verdicts([content]) if verdict.measured is not None]
    return content | {"goals": as_records(found)}


def _shares(records: list[Record]) -> dict[tuple, float]:
    """The largest error of each provider as a share of what was allowed."""
    shares: dict[tuple, float] = {}
    for record in records:
        if record.get("allowed"):
            key = tuple(record[name] for name in ("op", "shape", "head", "risk", "provider"))
            shares[key] = max(shares.get(key, 0.0), record["q50"] / record["allowed"])
    return shares


def _not_run(record: Record) -> str:
    mode = f", {record['mode']}" if record["mode"] else ""
    return f"not run: {record['provider']}{mode} ({record['op']}): {record['reason']}"
