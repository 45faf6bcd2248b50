"""What a run of kernels says: tables, goals, disagreements; and its files."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.kernels.goals import as_records, goals_table, verdicts
from benchmarks.kernels.results import Record, Results, case_name, read_run, tables, write_csv, write_json
from benchmarks.timing import Refused

CONSOLE_WIDTH = 150
SAME = ("device", "threads", "sources", "torch", "triton")  # of results that stand in one file


def show(results: Results) -> None:
    """Tables, what could not run, goals that were measured; disagreements on the standard error."""
    console = Console(width=CONSOLE_WIDTH)
    for table in tables(results.records, _shares(results.records)):
        console.print(table)
    for reason, names in _reasons(results.missing).items():
        console.print(f"not run: {', '.join(names)}: {reason}", markup=False, highlight=False)
    measured = [verdict for verdict in verdicts([_content(results)]) if verdict.measured is not None]
    if measured:
        console.print(goals_table(measured))
    if results.disagreements:
        print("\n".join(["disagree with the definition and were not timed:", *results.disagreements]), file=sys.stderr)


def earlier(folder: Path, environment: dict[str, Any]) -> Results:
    """What the file of these results holds: a run of other cases adds to it. Without a file, nothing.

    Raises:
        Refused: it was measured by other kernels, by another torch or on another device, or it cannot be read.
    """
    file = folder / f"{_name(environment)}.json"
    if not file.exists():
        return Results(environment, [], [], [], [])
    found = read_run(file)
    differing = [name for name in SAME if found["environment"].get(name) != environment.get(name)]
    if differing:
        raise Refused(
            f"{file} was measured with other {' and other '.join(differing)}, and one file is one environment: remove "
            "it to measure again, or choose another --output"
        )
    return Results(environment, *(found.get(name, []) for name in Results._fields[1:]))


def write(results: Results, folder: Path, before: Results) -> None:
    """`kernels_cuda`, or `kernels_cpu_` with the threads, as JSON and CSV; what is measured again replaces what was."""
    again = set(results.done)

    def merged(name: str, of_case: Callable[[Any], bool]) -> list[Any]:
        return [entry for entry in getattr(before, name) if not of_case(entry)] + getattr(results, name)

    whole = results._replace(
        records=merged("records", lambda record: case_name(record) in again),
        missing=merged("missing", lambda record: case_name(record) in again),
        disagreements=merged("disagreements", lambda sentence: sentence.split(":")[0] in again),
        done=merged("done", again.__contains__),
    )
    name, content = _name(results.environment), _content(whole)
    write_json(folder / f"{name}.json", content)
    write_csv(folder / f"{name}.csv", [content])


def _name(environment: dict[str, Any]) -> str:
    return "kernels_cuda" if "capability" in environment else f"kernels_cpu_{environment['threads']}_threads"


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


def _reasons(missing: Iterable[Record]) -> dict[str, list[str]]:
    """Reason -> who did not run because of it."""
    found: dict[str, dict[str, None]] = {}
    for record in missing:
        mode = f", {record['mode']}" if record["mode"] else ""
        found.setdefault(record["reason"], {})[f"{record['provider']}{mode} ({record['op']})"] = None
    return {reason: list(names) for reason, names in found.items()}
