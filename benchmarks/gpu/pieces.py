"""What is run on a GPU: the tests of the kernels compiled, steps of a stage, and the benchmarks."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from rsa_kernels import KL, CVaR

from benchmarks.gpu.queue import Content, Piece, Save
from benchmarks.kernels.cases import GPU_MAIN, LINEAR, RISKS, Spec, specs
from benchmarks.kernels.goals import as_records, verdicts
from benchmarks.kernels.results import Record, Results
from benchmarks.kernels.run import Setting, empty_results, run
from benchmarks.timing import ROOT, environment

SAMPLES = 20
TESTS = ("test_fused*.py", "test_nested*.py", "test_tree.py", "test_linear.py", "test_ops.py")
GPU_TEST = "pytest.mark.gpu"  # in a file


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable(earlier: Content) -> Content:
    """What was found before, unless another device, torch or kernels found it."""
    now, before = environment(_device()), earlier.get("environment", {})
    return earlier if all(now.get(name) == before.get(name) for name in ("device", "sources", "torch")) else {}


# ---- agreement -------------------------------------------------------------------------------------------------------


def _agreement(earlier: Content, save: Save, until: float) -> Content:
    """Tests that know of devices: with a GPU they run there, compiled."""
    folder = ROOT / "tests"
    named = {file.name for pattern in TESTS for file in folder.glob(pattern)}
    marked = {file.name for file in folder.glob("test_*.py") if f"{GPU_TEST}," in file.read_text()}
    return run_tests(sorted(named | marked), earlier, save, until)


def run_tests(files: Sequence[str], earlier: Content, save: Save, until: float) -> Content:
    """What pytest says of each file, and a sentence for each test that failed."""
    before = usable(earlier)
    content: Content = {"environment": environment(_device()), "records": [], "complete": False}
    content |= {"tests": before.get("tests", []), "disagreements": before.get("disagreements", [])}
    for name in files:
        if any(test["file"] == name for test in content["tests"]):
            continue
        left = until - time.monotonic()
        if left <= 0:
            return content
        test, failed = run_test(name, left)
        content["tests"].append(test)
        content["disagreements"] += failed
        save(content)
    return content | {"complete": True}


def run_test(name: str, seconds: float) -> tuple[Record, list[str]]:
    """The last line of pytest and the reasons of skipped tests; a sentence for each that failed."""
    command = [sys.executable, "-m", "pytest", f"tests/{name}", "-rfEs", "--tb=line", "-p", "no:cacheprovider"]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=variables)
    except subprocess.TimeoutExpired:
        sentence = f"tests/{name}: not done after {seconds:.0f} s"
        return {"file": name, "summary": sentence, "seconds": round(seconds), "skipped": []}, [sentence]
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:
        failed = [f"tests/{name}: pytest ended with {done.returncode}: {lines[-1]}"]
    test = {"file": name, "summary": lines[-1].strip("= "), "seconds": round(time.monotonic() - start, 1)}
    return test | {"skipped": [line for line in lines if line.startswith("SKIPPED")]}, failed


# ---- steps -----------------------------------------------------------------------------------------------------------


def _steps(earlier: Content, save: Save, until: float) -> Content:
    from benchmarks.gpu import steps  # it brings the trainer

    found: dict[str, list[float]] = {impl: steps.losses(impl, "gpu") for impl in steps.IMPLEMENTATIONS}
    return {
        "environment": environment(_device()),
        "records": [],
        "disagreements": steps.disagreements(found),
        "largest_gaps": steps.largest_gaps(found),
        "losses": found,
        "complete": True,
    }


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def _benchmark(
    cases: Sequence[Spec], providers: tuple[str, ...], earlier: Content, save: Save, until: float
) -> Content:
    """Cases that were measured before are kept."""
    device, before = _device(), usable(earlier)
    setting = Setting(device, torch.bfloat16, SAMPLES, providers, compiled=True)
    results = empty_results(device)
    results = results._replace(**{name: before[name] for name in Results._fields[1:] if name in before})
    complete = run(cases, setting, results, after=lambda: save(_content(results)), until=until)
    return _content(results) | {"complete": complete}


def _content(results: Results) -> Content:
    content = results._asdict()
    return content | {"goals": as_records(v for v in verdicts([content]) if v.measured is not None)}


FEW = (KL(), CVaR(0.97))
TRAINABLE = [Spec("linear", GPU_MAIN, risk, "trainable") for risk in RISKS]
HEADS = [
    Spec("linear", GPU_MAIN, None, "trainable"),
    *(Spec("linear", GPU_MAIN, risk, "frozen") for risk in FEW),
    *(Spec("linear", shape, risk, "trainable") for shape in LINEAR["cuda"][1:] for risk in FEW),
]
ROWS = [*specs("logits", "cuda", quick=False), *specs("nested", "cuda", quick=False)]
GROWTH = list(specs("growth", "cuda", quick=False))


def _bench(name: str, what: str, cases: Sequence[Spec], *providers: str) -> Piece:
    return Piece(name, what, partial(_benchmark, cases, providers))


PIECES = (
    Piece("agreement", "the tests of kernels and operators, compiled: does everything agree", _agreement),
    Piece("steps", "50 steps of reward alignment: the losses with triton are those with chunked", _steps),
    _bench(
        *("linear", "trainable head: time and memory of every risk", TRAINABLE),
        *("triton-cache", "triton-recompute", "chunked-auto", "naive", "compiled", "research", "liger"),
    ),
    _bench(
        *("heads", "no risk, frozen head, other shapes: time and memory", HEADS),
        *("triton", "naive", "compiled", "research", "liger", "torch"),
    ),
    _bench("rows", "row kernels alone and the recursion along sequences, beside a copy", ROWS),
    _bench(
        *("growth", "time and memory against N and V", GROWTH),
        *("triton-cache", "triton-recompute", "naive", "liger-dpo"),
    ),
)
