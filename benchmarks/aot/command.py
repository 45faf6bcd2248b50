"""Compile every kernel of rsa_kernels.fused ahead of time, without a GPU, and hold it to a budget.

    python -m benchmarks aot                                     # a table, and one line of JSON
    python -m benchmarks aot --quick                             # one launch per row of the budget
    python -m benchmarks aot --triton 3.6.0 --triton 3.9.0       # the same with other compilers

It fails where a kernel spills vector registers, or moves more bytes or computes more exponentials per logit than
`cases.BUDGETS` grants. A sentence per failure goes to stderr and the exit status is 1. Scalar registers that spill
on AMD go to other registers, and are only reported.

What is counted, where:

- Registers, spills and shared memory are those that ptxas and LLVM report for the machine code, which was compiled with
  the options of the launch; the width of loads is read in its text.
- Bytes and exponentials per logit are counted in Triton's first representation ("ttir"), where an operation is on a
  tile and the turns of a loop are known: what the kernel says, the same for all targets. Entries of the last tile that
  lie beyond the vocabulary count for nothing. One turn of a loop that the data end, such as a sweep of CVaR's
  selection, is a figure of its own: "4 + 4 B" are 4 bytes, and 4 in every sweep.
- What the threads issue is counted in the last one ("ttgir"), where the layout says how many threads hold the same
  element. It may be 1.25 times what they issued if each element were held by one and each scalar by all of them.
  `count.py` says why not in the machine code.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.timing import ROOT, environment

VERSIONS = Path("~/.cache/rsa_kernels").expanduser()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the gate."""
    parser.add_argument("--quick", action="store_true", help="one launch per row of the budget, at one shape")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the line of JSON there, too")
    parser.add_argument(
        "--triton", action="append", default=[], metavar="VERSION", help="compile with that version; may be repeated"
    )
    parser.add_argument(
        "--venvs", type=Path, default=VERSIONS, metavar="DIR", help="folder that these versions are installed in, 1 GB "
        "each (default %(default)s)"
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Run the gate; 1 means that a kernel fails it."""
    if sys.platform != "linux" or find_spec("triton") is None:
        print("the gate compiles with Triton, which needs Linux and pip install 'triton>=3.6'", file=sys.stderr)
        return 1
    if options.triton:
        runs = {version: _with_version(version, options) for version in options.triton}
        failures = [f"triton {version}: {failure}" for version, run in runs.items() for failure in run["failures"]]
        results = {"op": "aot", "failures": failures, "runs": list(runs.values())}
    elif os.environ.get("TRITON_INTERPRET"):  # kernels are interpreted or compiled from their import on
        results = _apart(options)
    else:
        results = _here(options.quick)
    line = json.dumps(results)
    if options.output is not None:
        options.output.write_text(line + "\n")
    print(line)
    return int(bool(results["failures"]))


def _here(quick: bool) -> dict[str, Any]:
    """The gate in this process: a table on stdout, failures on stderr."""
    from benchmarks.aot import cases, gate  # with Triton, which nothing else of this module needs

    start = time.perf_counter()
    rows, failures = gate.run(cases.cases(quick), cases.BUDGETS)
    failures += [] if quick else gate.unlaunched({row["kernel"] for row in rows})
    surroundings = environment(torch.device("cpu"))
    Console(width=180).print(gate.table(rows, f"triton {surroundings['triton']}"))
    print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr)
    seconds = round(time.perf_counter() - start, 1)
    return {"op": "aot", "quick": quick, "seconds": seconds, "failures": failures, "results": rows, **surroundings}


def _with_version(version: str, options: argparse.Namespace) -> dict[str, Any]:
    """The gate with a version of Triton that lies in a folder of its own, in front of the one installed here.

    Everything else is this interpreter's: the gate asks Triton for nothing but its compiler, whichever torch there is.
    """
    folder = options.venvs / f"aot-{version}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        if subprocess.run([*command, "--target", str(unfinished), f"triton=={version}"]).returncode:
            raise SystemExit(f"pip did not install triton=={version}; what it said is above")
        unfinished.rename(folder)
    found = [package.version for package in distributions(name="triton", path=[str(folder)])]
    if found != [version]:
        raise SystemExit(f"{folder} holds triton {found}, not {version}: remove that folder")
    return _apart(options, folder)


def _apart(options: argparse.Namespace, *folders: Path) -> dict[str, Any]:
    """The gate in a process of its own, which compiles kernels, with `folders` in front of the import path."""
    paths = [*map(str, folders), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "benchmarks.aot.command", *(["--quick"] if options.quick else [])]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    *printed, line = ended.stdout.splitlines() or [""]
    if ended.returncode not in (0, 1) or not line.startswith("{"):
        raise SystemExit(f"{' '.join(command)} ended with status {ended.returncode} and without a result")
    print("\n".join(printed))
    return json.loads(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__.splitlines()[0])
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
