"""What was not measured yet, as a page: every goal and piece with the one command that measures it."""

from pathlib import Path

from benchmarks.gpu.pieces import PIECES
from benchmarks.gpu.queue import file_name
from benchmarks.kernels.goals import GPU, Verdict, verdicts
from benchmarks.kernels.results import read_run, read_runs
from benchmarks.scale import goals as scale

HEADER = """# Not measured yet

Written by `python -m benchmarks figures FOLDER` from the result files beside it; nothing here is estimated. Goals that
were measured stand in these files under "goals", with the verdict. A GPU run needs a machine of its own and no network;
packages that are missing there are named in its files (`liger-kernel` for two of the peers). Commands are run from the
root of the repository, in an environment that has the packages (`make install` makes one in `.venv`).
"""


def pending(folder: Path) -> str:
    """The page for the results in a folder."""
    runs = read_runs(folder)
    open_goals = [verdict for verdict in verdicts(runs) if verdict.measured is None]
    complete = {run["piece"] for run in runs if run.get("complete")}
    open_pieces = [piece for piece in PIECES if piece.name not in complete]
    lines = [HEADER]
    if open_pieces:
        lines += ["## Pieces of a GPU run", "", "| what | file | command |", "| --- | --- | --- |"]
        lines += [f"| {p.what} | `{file_name(p, PIECES)}` | `{_gpu(p.name)}` |" for p in open_pieces]
        lines += ["", "All of them: `python -m benchmarks gpu` (or `make gpu`).", ""]
    if open_goals:
        lines += ["## Goals", "", "| goal | command |", "| --- | --- |"]
        lines += [f"| {verdict.goal} | `{_command(verdict)}` |" for verdict in open_goals]
        lines.append("")
    at_scale = list(scale.open_work(folder, [read_run(file) for file in sorted(folder.glob("scale_*.json"))]))
    if at_scale:
        lines += ["## Training at scale", "", "| what | file | command |", "| --- | --- | --- |"]
        lines += [f"| {what} | `{file}` | `{command}` |" for what, file, command in at_scale]
        lines.append("")
    if not open_pieces and not open_goals and not at_scale:
        lines += ["Nothing.", ""]
    return "\n".join(lines)


def _gpu(piece: str) -> str:
    return f"python -m benchmarks gpu --piece {piece}"


def _command(verdict: Verdict) -> str:
    return _gpu(verdict.goal.piece) if verdict.goal.device == GPU else "make bench"
