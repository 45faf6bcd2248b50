"""Pieces of a GPU run go on where they stopped, and nothing that other kernels found is passed off as theirs."""

import json
import math
import time
from itertools import pairwise

import pytest
import torch
from rsa_kernels import KL

from benchmarks import timing
from benchmarks.gpu import pieces as gpu_pieces
from benchmarks.gpu import queue as gpu_queue
from benchmarks.gpu import steps as gpu_steps
from benchmarks.kernels import run
from benchmarks.kernels.cases import Spec
from benchmarks.kernels.results import TIME, Results

CPU = torch.device("cpu")


def piece(name: str, calls: list, content: dict) -> gpu_queue.Piece:
    def work(earlier, save, until):
        calls.append(earlier)
        assert until > time.monotonic()
        save(found | {"half": 1})
        return found

    found = {
        "environment": {"sources": timing.sources()},
        "records": [],
        "disagreements": [],
        "complete": True,
    } | content
    return gpu_queue.Piece(name, "for a test", work)


def test_a_piece_that_is_done_is_not_run_again(tmp_path):
    calls: list = []
    one = piece("one", calls, {})
    assert [gpu_queue.run_one(tmp_path, one, [one]) for _ in range(2)] == [0, 0]
    assert calls == [{}]
    assert json.loads((tmp_path / "gpu_0_one.json").read_text())["piece"] == "one"


def test_a_piece_that_was_cut_off_goes_on(tmp_path):
    """What was saved is handed to the next run, and the file is never half written."""

    def cut_off(earlier, save, until):
        save({"disagreements": [], "records": [1], "environment": {}})
        raise KeyboardInterrupt

    cut = gpu_queue.Piece("one", "", cut_off)
    with pytest.raises(KeyboardInterrupt):
        gpu_queue.run_one(tmp_path, cut, [cut])
    calls: list = []
    assert gpu_queue.run_one(tmp_path, piece("one", calls, {}), [cut]) == 0
    assert calls[0]["records"] == [1]
    assert calls[0]["complete"] is False


def test_a_piece_that_disagrees_or_is_left_fails(tmp_path, capsys):
    wrong, left = piece("wrong", [], {"disagreements": ["off by 1"]}), piece("left", [], {"complete": False})
    assert gpu_queue.run_one(tmp_path, wrong, [wrong, left]) == 1
    assert "off by 1" in capsys.readouterr().err
    assert gpu_queue.run_one(tmp_path, left, [wrong, left]) == 1
    assert "not done, run it again" in capsys.readouterr().out


def test_results_of_other_kernels_are_not_passed_off_as_these(tmp_path, capsys):
    old = piece("old", [], {"environment": {"sources": "0123"}})
    assert gpu_queue.run_one(tmp_path, old, [old]) == 0
    assert "done by other kernels than these" in capsys.readouterr().out


def test_pieces_are_found_by_number_and_name():
    for number, one in enumerate(gpu_pieces.PIECES):
        assert gpu_queue.find(str(number), gpu_pieces.PIECES) is gpu_queue.find(one.name, gpu_pieces.PIECES) is one
    with pytest.raises(ValueError, match=r"--piece is one of 0 \(agreement\).*, got nine"):
        gpu_queue.find("nine", gpu_pieces.PIECES)


def test_a_gpu_run_leaves_at_most_eight_files(tmp_path):
    """One for each piece, and the records of all of them as CSV."""
    pieces = [piece(one.name, [], {}) for one in gpu_pieces.PIECES]
    for one in pieces:
        gpu_queue.run_one(tmp_path, one, pieces)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert len(files) == len(gpu_pieces.PIECES) + 1 <= 8
    assert "gpu.csv" in files
    assert gpu_queue.LAST_START_S < gpu_queue.PIECE_S <= 540


def test_cases_are_left_where_time_is_short_and_measured_later():
    cases = [Spec("nested", (2, tokens)) for tokens in (3, 4, 5)]
    setting = run.Setting(CPU, torch.float32, 1, ("chunked",))
    results = run.empty_results(CPU)
    assert not run.run(cases, setting, results, until=time.monotonic() - 1)
    assert results.done == []
    saved: list[int] = []
    assert run.run(cases[:2], setting, results, after=lambda: saved.append(len(results.records)))
    assert saved[0] < saved[1]
    kept = list(results.records)
    assert run.run(cases, setting, results)
    assert results.records[: len(kept)] == kept
    assert results.done == [str(spec) for spec in cases]


def test_the_longest_case_so_far_says_whether_another_fits(monkeypatch):
    """Clocks: each case takes 10, so a third does not fit before 25."""
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "_run_case", lambda *_: now.__setitem__(0, now[0] + 10))
    results = Results({}, [], [], [], [])
    assert not run.run(
        [Spec("nested", (2, t)) for t in (3, 4, 5)], run.Setting(CPU, torch.float32, 1), results, until=25
    )
    assert len(results.done) == 2


@pytest.fixture
def same_kernels(monkeypatch) -> None:
    """Whatever an editor does to them while the tests run."""
    monkeypatch.setattr(timing, "sources", lambda: "4567")


@pytest.mark.usefixtures("same_kernels")
def test_what_another_device_found_is_measured_again():
    here = timing.environment(gpu_pieces._device())
    assert gpu_pieces.usable({"environment": here, "records": [1]})["records"] == [1]
    assert gpu_pieces.usable({"environment": here | {"device": "NVIDIA H100"}, "records": [1]}) == {}
    assert gpu_pieces.usable({"environment": here | {"sources": "0123"}, "records": [1]}) == {}


@pytest.mark.usefixtures("same_kernels")
def test_a_piece_of_benchmarks_keeps_what_it_measured():
    """The second run finds one of two cases done; the compiler is a provider, as on a GPU, where it can run."""
    cases = [Spec("linear", (6, 4, 9), risk, "trainable") for risk in (KL(), None)]
    saved: list[dict] = []
    first = gpu_pieces._benchmark(cases[:1], ("naive", "compiled"), {}, saved.append, math.inf)
    assert first["complete"]
    assert saved[-1]["records"] == first["records"]
    timed = {r["provider"] for r in first["records"] if r["metric"] == TIME}
    assert timed | {r["provider"] for r in first["missing"]} == {"gemms", "naive", "compiled"}
    assert "naive" in timed
    again = gpu_pieces._benchmark(cases, ("naive",), json.loads(json.dumps(first)), saved.append, math.inf)
    assert again["done"] == [str(spec) for spec in cases]
    assert again["records"][: len(first["records"])] == first["records"]


@pytest.fixture
def two_test_files(monkeypatch, tmp_path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_good.py").write_text("def test_a():\n    pass\n")
    (tmp_path / "tests/test_bad.py").write_text("def test_b():\n    assert 1 == 2\n")
    monkeypatch.setattr(gpu_pieces, "ROOT", tmp_path)


@pytest.mark.usefixtures("two_test_files", "same_kernels")
def test_tests_are_run_file_by_file_and_failures_named():
    saved: list[dict] = []
    names = ["test_bad.py", "test_good.py"]
    content = gpu_pieces.run_tests(names, {}, saved.append, time.monotonic() + 500)
    assert content["complete"]
    assert [test["file"] for test in content["tests"]] == names
    assert "1 passed" in content["tests"][1]["summary"]
    [failure] = content["disagreements"]
    assert failure.startswith("FAILED tests/test_bad.py::test_b")
    again = gpu_pieces.run_tests(names, content, lambda _: pytest.fail("it was run again"), time.monotonic() + 500)
    assert again["disagreements"] == content["disagreements"]


@pytest.mark.usefixtures("two_test_files")
def test_a_file_of_tests_that_does_not_end_is_named():
    [test, failed] = gpu_pieces.run_test("test_good.py", 0.01)
    assert failed == ["tests/test_good.py: not done after 0 s"] == [test["summary"]]


def test_steps_agree_on_a_cpu_and_a_difference_is_named():
    """Three steps with chunked and with the definition; then one step off by ten times what rounding explains."""
    found = {name: gpu_steps.losses(name, "cpu", steps=3) for name in ("chunked", "naive")}
    assert found["naive"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(before != after for before, after in pairwise(found["naive"]))
    trio = {"triton": found["chunked"], **found}
    assert gpu_steps.disagreements(trio) == []
    gap = gpu_steps.largest_gaps(trio)["chunked - naive"]
    assert gap < 1e-6
    off = [*found["chunked"][:2], found["chunked"][2] + 10 * (2 * gap + gpu_steps.EPSILON)]
    [sentence] = gpu_steps.disagreements(trio | {"triton": off})
    assert sentence.startswith("step 2: the loss with triton is")
