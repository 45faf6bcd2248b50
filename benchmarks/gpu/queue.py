"""Pieces of work on a GPU that each end within ten minutes and leave one file.

    python -m benchmarks gpu --output DIR               # all, one after the other, each in a process of its own
    python -m benchmarks gpu --piece linear --output DIR

A piece whose file is complete is not run again; one that was cut off goes on where it stopped. No network is needed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernels.results import read_runs, write_csv, write_json
from benchmarks.timing import ROOT, Refused, sources

PIECE_S = 9 * 60  # of a process: a lease of a GPU may end after ten minutes
LAST_START_S = 8 * 60  # nothing is begun that would end later
CSV = "gpu.csv"

Content = dict[str, Any]  # with "environment", "records", "disagreements" and "complete"
Save = Callable[[Content], None]
Work = Callable[[Content, Save, float], Content]


class Piece(NamedTuple):
    """`work(earlier, save, until)` -> what it found; `earlier` is what an unfinished file holds, or empty."""

    name: str
    what: str
    work: Work


def find(name: str, pieces: Sequence[Piece]) -> Piece:
    """A piece by its number or name.

    Raises:
        Refused: there is none of that name.
    """
    for number, piece in enumerate(pieces):
        if name in (str(number), piece.name):
            return piece
    raise Refused(f"--piece is one of {', '.join(f'{i} ({p.name})' for i, p in enumerate(pieces))}, got {name}")


def run_all(output: Path, pieces: Sequence[Piece]) -> int:
    """Each piece in a process of its own: a kernel that breaks the device breaks its own piece only."""
    return max([_launch(output, piece) for piece in pieces], default=0)


def _launch(output: Path, piece: Piece) -> int:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--piece", piece.name, "--output", str(output.resolve())]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=PIECE_S).returncode
    except subprocess.TimeoutExpired:
        print(f"{piece.name}: not done after {PIECE_S} s; run it again, it goes on where it stopped", file=sys.stderr)
        return 1


def run_one(output: Path, piece: Piece, pieces: Sequence[Piece]) -> int:
    """Runs a piece in this process unless its file is complete; 1 where something disagrees, failed or is left."""
    file = output / file_name(piece, pieces)
    earlier = json.loads(file.read_text()) if file.exists() else {}
    if not earlier.get("complete"):
        _work(file, piece, earlier)
        write_csv(output / CSV, [run for run in read_runs(output) if "piece" in run])
    content = json.loads(file.read_text())
    print(f"{piece.name}: {_state(content)}, {file}")
    for sentence in content["disagreements"]:
        print(sentence, file=sys.stderr)
    return 1 if content["disagreements"] or not content["complete"] else 0


def _work(file: Path, piece: Piece, earlier: Content) -> None:
    head = {"piece": piece.name, "what": piece.what}

    def save(content: Content) -> None:
        write_json(file, head | {"complete": False} | content)

    save(piece.work(earlier, save, time.monotonic() + LAST_START_S))


def _state(content: Content) -> str:
    if not content["complete"]:
        return "not done, run it again"
    stale = content["environment"]["sources"] != sources()
    return "done by other kernels than these (delete the file to run it again)" if stale else "done"


def file_name(piece: Piece, pieces: Sequence[Piece]) -> str:
    return f"gpu_{[p.name for p in pieces].index(piece.name)}_{piece.name}.json"
