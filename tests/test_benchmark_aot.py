"""The ahead-of-time gate: what the product launches passes, and what spills or does too much is named.

Run as a program, this file puts the kernels below through the gate: kernels are compiled only where Triton was imported
without its interpreter.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton needs Linux", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from benchmarks.aot import command  # noqa: E402
from benchmarks.aot.cases import BUDGETS, MEASURES, Budget, Case, cases  # noqa: E402
from benchmarks.aot.compile import Compiled, Launch, _amd, _width, load_bytes  # noqa: E402
from benchmarks.aot.count import Count, Work, count, scalar_loads  # noqa: E402
from benchmarks.aot.gate import check, granted  # noqa: E402

ROOT = Path(__file__).parents[1]
NVIDIA = ["sm_80", "sm_90", "sm_100"]
TARGETS = [*NVIDIA, "gfx942"]
ROWS = 16


@triton.jit
def two_models(z_ptr, r_ptr, stride, out_ptr, V: tl.constexpr, BLOCK_V: tl.constexpr, AGAIN: tl.constexpr, EXTRA: tl.constexpr):  # fmt: skip
    """Two reads and two exponentials per logit; AGAIN reads the first model once more, EXTRA is one exponential more."""
    row = tl.program_id(0).to(tl.int64) * stride
    offs = tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        z = tl.load(z_ptr + row + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
        total += tl.exp(z) * tl.exp2(r)
        if EXTRA:
            total += tl.exp(z * r)
    if AGAIN:
        for start in range(0, V, BLOCK_V):
            total += tl.load(z_ptr + row + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def sweeps(z_ptr, stride, out_ptr, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """One read and one exponential per logit in every turn of a loop that the data end; a write, or two, of every logit."""
    row = tl.program_id(0).to(tl.int64) * stride
    offs = tl.arange(0, BLOCK_V)
    level = 0.0
    while level < 8.0:
        for start in range(0, V, BLOCK_V):
            z = tl.load(z_ptr + row + start + offs, mask=start + offs < V, other=0.0).to(tl.float32)
            level += tl.sum(tl.exp(z - level))
    if level > 9.0:
        for start in range(0, V, BLOCK_V):
            tl.store(out_ptr + row + start + offs, level, mask=start + offs < V)
    else:
        for start in range(0, V, BLOCK_V):
            tl.store(out_ptr + row + start + offs, 0.0, mask=start + offs < V)
            tl.store(out_ptr + row + start + offs, level, mask=start + offs < V)


@triton.jit
def wide(z_ptr, stride, out_ptr, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """The whole row at once, used again after it was reduced: it has to stay in registers."""
    row = tl.program_id(0).to(tl.int64) * stride
    offs = tl.arange(0, BLOCK_V)
    z = tl.load(z_ptr + row + offs, mask=offs < V, other=-float("inf")).to(tl.float32)
    mass = tl.exp(z - tl.max(z))
    tl.store(out_ptr + row + offs, mass / tl.sum(mass), mask=offs < V)


def planted() -> dict:
    """What the gate says about the kernels above."""
    from benchmarks.aot.compile import _compiled
    from benchmarks.aot.gate import run, unlaunched

    def case(name, budget, vocabulary, launch):
        z, r = (torch.empty(ROWS, vocabulary, dtype=torch.bfloat16) for _ in range(2))
        return Case(name, budget, f"{vocabulary} bf16", ROWS, (2, 2), False, lambda: launch(z, r))

    def pair(z, r, again=False, extra=False):
        out = torch.empty(ROWS)
        constants = {"V": z.shape[1], "BLOCK_V": 2048, "AGAIN": again, "EXTRA": extra}
        two_models[(ROWS,)](z, r, z.stride(0), out, **constants, num_warps=4)

    def sweep(z, r):
        sweeps[(ROWS,)](z, z.stride(0), r, V=z.shape[1], BLOCK_V=2048, num_warps=4)

    def row_at_once(z, r):
        wide[(ROWS,)](z, z.stride(0), r, V=z.shape[1], BLOCK_V=65536, num_warps=4)

    two, turns = Budget(2, 0, 2), Budget(0, 2, 0, more_reads=1, more_exponentials=1)
    budgets = {"two": two, "turns": turns, "one": Budget(1, 1, 1)}
    cases = [
        case("right", "two", 32000, pair),
        case("odd rows", "two", 50257, pair),
        case("reads twice", "two", 32000, lambda z, r: pair(z, r, again=True)),
        case("one exponential more", "two", 32000, lambda z, r: pair(z, r, extra=True)),
        case("sweeps", "turns", 32000, sweep),
        case("nobody's", "forgotten", 32000, pair),
    ]
    rows, failures = run(cases, budgets)
    loops = []
    for kernel, _ in list(_compiled.values())[: len(TARGETS)]:  # the first case, whose loop is all of its work
        lines = kernel.asm["amdgcn" if "amdgcn" in kernel.asm else "ptx"].splitlines()
        loops.append((sum(map(_width, lines)), sum(bool(re.search(r"\bex2\.|\bv_exp_f32", line)) for line in lines)))
    # LLVM takes 15 seconds to find registers for it on gfx942
    wide_rows, wide_failures = run([case("wide", "one", 50257, row_at_once)], budgets, NVIDIA)
    return {
        "rows": rows + wide_rows,
        "failures": failures + wide_failures,
        "machine": loops,
        "unlaunched": unlaunched({"statistics.statistics_kernel"}),
    }


def run_python(*command: str, **variables: str) -> subprocess.CompletedProcess:
    """A process of its own with the benchmarks on its path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": path, **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def gate() -> dict:
    ended = run_python(__file__)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def rows_of(gate: dict, case: str) -> list[dict]:
    rows = [row for row in gate["rows"] if row["case"] == case]
    assert [row["target"] for row in rows] == (NVIDIA if case == "wide" else TARGETS)
    return rows


def failures_of(gate: dict, case: str) -> list[str]:
    return [failure for failure in gate["failures"] if failure.startswith(f"{case}: ")]


def test_counts_are_those_of_a_kernel_written_for_it(gate):
    for row in rows_of(gate, "right"):
        assert row["bytes_per_logit"] == pytest.approx(4 + 4 / 32000, abs=1e-4)  # the result of a row is 4 bytes
        assert row["exponentials_per_logit"] == 2
        assert row["more_bytes_per_logit"] == row["more_exponentials_per_logit"] == 0
    assert failures_of(gate, "right") == []


def test_entries_beyond_the_vocabulary_count_for_nothing(gate):
    for row in rows_of(gate, "odd rows"):
        assert row["bytes_per_logit"] == pytest.approx(4, abs=1e-3)
        assert row["exponentials_per_logit"] == 2


def test_machine_code_has_the_exponentials_per_byte_that_are_counted(gate):
    """And as many of both as are issued, or a whole multiple where LLVM has unrolled the loop."""
    for row, (loaded, exponentials) in zip(rows_of(gate, "right"), gate["machine"], strict=True):
        turns = loaded * row["threads"] / 2048 / 4
        assert turns == int(turns) >= 1
        assert exponentials * row["threads"] / 2048 / turns == row["issued_exponentials_per_logit"] == 2


def test_the_width_of_loads_is_that_of_the_machine_code(gate):
    assert [row["load_bytes"] for row in rows_of(gate, "right")] == [16, 16, 16, 16]
    assert [row["load_bytes"] for row in rows_of(gate, "odd rows")] == [2, 2, 2, 2]


def test_a_turn_of_a_loop_that_the_data_end_is_a_figure_of_its_own(gate):
    for row in rows_of(gate, "sweeps"):
        assert row["bytes_per_logit"] == 4  # the branch that writes twice, not both
        assert row["exponentials_per_logit"] == 0
        assert row["more_bytes_per_logit"] == 2
        assert row["more_exponentials_per_logit"] == 1
    assert failures_of(gate, "sweeps") == []


def test_a_second_read_is_over_budget(gate):
    [failure] = failures_of(gate, "reads twice")
    assert "two_models takes 6.000 bytes per logit, its budget 'two' is 4" in failure
    assert all(f"32000 bf16 for {target}" in failure for target in TARGETS)


def test_an_exponential_too_many_is_over_budget(gate):
    [failure] = failures_of(gate, "one exponential more")
    assert "two_models takes 3.000 exponentials per logit, its budget 'two' is 2" in failure


def test_spills_are_named_with_tile_and_threads(gate):
    failures = " ".join(failures_of(gate, "wide"))
    for target in NVIDIA:
        sentence = rf"wide spills \d+ bytes with 128 threads and BLOCK_V=65536: [^()]*\([^()]*for {target}"
        assert re.search(sentence, failures), (target, failures)
    assert all(row["spills"] > 0 for row in rows_of(gate, "wide"))
    assert all(row["spills"] == 0 for row in rows_of(gate, "right"))


def test_a_kernel_without_a_budget_fails(gate):
    [failure] = failures_of(gate, "nobody's")
    assert "add a row 'forgotten' to BUDGETS" in failure


def test_what_amd_spills_is_read_from_its_assembly():
    machine = "    .sgpr_spill_count: 7\n    .vgpr_count:     128\n    .vgpr_spill_count: 3\n"
    assert _amd(machine) == (128, 3, 7)


MODULE = """
#blocked = #ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}}>
#linear = #ttg.linear<{{register = [[1], [2], [0]], lane = [[4], [8], [16], [32], [64]], warp = [[128], [256]], block = []}}>
module {{
  tt.func public @kernel(%arg0: !tt.ptr<f32> {{tt.divisibility = 16 : i32}} loc("here"(#loc1))) attributes {{noinline = false}} {{
    %c0 = arith.constant 0 : i32
    %c64 = arith.constant 64 : i32
    %c8 = arith.constant 8 : i32
    {body}
    tt.return loc(#loc2)
  }} loc(#loc)
}} loc(#loc)
"""


def exponentials(body: str, entries: int, threads: int = 1, held_once: bool = True) -> tuple[float, float]:
    always, more = count(MODULE.format(body=body), entries, threads, held_once)
    return always.exponentials, more.exponentials


@pytest.mark.parametrize(
    ("kind", "elements", "copies"),
    [
        ("tensor<16x32xf32, #blocked>", 512, 1),
        ("tensor<16x64xf32, #blocked>", 1024, 1),
        ("tensor<2x32xf32, #blocked>", 64, 8),  # 16 rows of threads share 2
        ("tensor<32xf32, #ttg.slice<{dim = 0, parent = #blocked}>>", 32, 16),  # once for every row of threads
        ("tensor<16xf32, #ttg.slice<{dim = 1, parent = #blocked}>>", 16, 8),
        ("tensor<512xf32, #linear>", 512, 1),  # four registers of 128 threads; the third basis repeats
        ("f32", 1, 128),
    ],
)
def test_an_element_that_several_threads_hold_is_issued_by_each(kind, elements, copies):
    body = f"%0 = math.exp %x : {kind} loc(#loc3)"
    assert exponentials(body, elements) == (1, 0)
    assert exponentials(body, elements, 128, held_once=False) == (copies, 0)
    assert exponentials(body, elements, 128) == (max(1, 128 / elements), 0)


LOOP = "scf.for %i = %c0 to %c64 step %c8 : i32 {{\n %1 = math.exp2 %x : tensor<8xf32>\n {inside} }}"


def loop(inside: str = "") -> str:
    return LOOP.format(inside=inside) + "\n"


def test_a_branch_that_some_rows_leave_out_is_counted_apart():
    """A sweep of its own beside one that all rows take; but the only loop is what the kernel does."""
    branch = f"scf.if %b {{\n {loop()} }}\n"
    assert exponentials(loop(), 64) == (1, 0)
    assert exponentials(branch, 64) == (1, 0)
    assert exponentials(loop() + branch, 64) == (1, 1)
    assert exponentials(loop() + f"scf.if %b -> (f32) {{\n {loop()} }} else {{\n scf.yield %y : f32\n }}\n", 64) == (
        1,
        1,
    )


def test_of_two_branches_the_dearer_one_counts():
    twice = loop("%2 = math.log %1 : tensor<8xf32>\n")
    assert exponentials(f"scf.if %b {{\n {loop()} }} else {{\n {twice} }}\n", 64) == (2, 0)
    early = f"cf.cond_br %b, ^bb1, ^bb2\n ^bb1:  // pred: ^bb0\n {twice} tt.return\n ^bb2:  // pred: ^bb0\n {loop()}"
    assert exponentials(early, 64) == (2, 0)


def test_bounds_of_a_loop_may_be_sums_and_products():
    """As Triton writes them where it unrolls a loop by two."""
    unrolled = "%s = arith.muli %c8, %c8 : i32\n" + loop().replace("step %c8", "step %s")
    assert exponentials(unrolled, 64) == (1 / 8, 0)
    again = "%s = arith.subi %x, %c8 : i32\n" + loop().replace(
        "step %c8", "step %s"
    )  # the name stands for another number
    with pytest.raises(ValueError, match="the turns of a loop are not known"):
        exponentials(unrolled + again, 64)


def test_loads_of_single_elements_do_not_hide_those_of_tiles():
    machine = "ld.global.b64 x\n ld.global.v4.b32 x\n" + "ld.global.b32 x\n" * 5
    ir = (
        "%1 = tt.load %a : !tt.ptr<i64> loc(#loc1)\n%2 = tt.load %b : tensor<8x!tt.ptr<bf16>>\n"
        + "%3 = tt.load %c : !tt.ptr<f32>\n" * 5
    )
    assert scalar_loads(ir) == [8, 4, 4, 4, 4, 4]
    assert load_bytes(machine) == 4
    assert load_bytes(machine, scalar_loads(ir)) == 16
    loop = "$L__BB0_3:   // =>This Inner Loop Header: Depth=1\n ld.global.v2.b32 x\n$L__BB0_4:\n"
    assert load_bytes(loop + machine) == 8  # in a loop, though others bring more bytes


@pytest.mark.parametrize(
    ("line", "width"),
    [
        ("@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.nc.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("global_load_dwordx4 v[0:3], v1, s[2:3]", 16),
        ("buffer_load_ushort v1, v2, s[0:3], 0 offen", 2),
        ("global_load_short_d16_hi v1, v2, s[2:3]", 2),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", 0),
        ("ld.shared.b32 %r1, [ %r2 ];", 0),
    ],
)
def test_widths_of_instructions(line, width):
    assert _width(line) == width


def test_an_exponential_in_a_reduction_is_one_per_element():
    body = """%1 = "tt.reduce"(%x) <{axis = 0 : i32}> ({
      ^bb0(%a: f32 loc("a"(#loc4)), %b: f32 loc("b"(#loc4))):
        %2 = math.exp %a : f32
        tt.reduce.return %2 : f32
      }) : (tensor<64xf32>) -> f32"""
    assert exponentials(body, 64) == (1, 0)


@pytest.mark.parametrize("name", ["tt.call @other", "tt.atomic_rmw fadd", "tt.dot"])
def test_what_is_not_counted_is_refused(name):
    with pytest.raises(ValueError, match=f"the work of {name.split()[0]} is not known"):
        exponentials(f"%0 = {name} %x : tensor<8xf32>", 64)


def sentences(**changes) -> list[str]:
    """What the gate says about a kernel that is right but for `changes`."""
    kernel = Compiled(
        kernel="kernel", constants={"V": 32000, "BLOCK_V": 1024}, threads=128, registers=40, spills=0, spill_unit="bytes",
        scalar_spills=0, shared_bytes=0, load_bytes=16, source=TWO, expected=TWO, issued=TWO,
    )  # fmt: skip
    case = Case("case", "two", "32000 bf16", ROWS, (2, 2), False, lambda: None)
    return list(check(case, [Launch(kernel._replace(**changes), ROWS)], {"two": Budget(2, 0, 2)}))


TWO = Count(Work(4, 0, 2))


def test_what_is_issued_more_than_once_fails():
    assert sentences() == []
    assert sentences(issued=Count(Work(4, 0, 2.5))) == []
    [sentence] = sentences(issued=Count(Work(4, 0, 4)))
    assert "the 128 threads of kernel issue 4.00 exponentials per logit, 2.00 would do: with BLOCK_V=1024" in sentence
    [sentence] = sentences(issued=Count(Work(8, 0, 2)))
    assert "issue 8.00 bytes per logit" in sentence


def test_scalar_registers_may_spill_and_others_may_not():
    assert sentences(scalar_spills=10) == []
    assert "kernel spills 1 registers" in sentences(spills=1, spill_unit="registers")[0]


def test_work_that_the_data_ask_for_has_a_budget_too():
    [sentence] = sentences(source=Count(TWO.always, Work(2, 0, 0)))
    assert "kernel takes 2.000 more bytes where the data ask for it per logit, its budget 'two' is 0" in sentence


def test_a_softcap_costs_an_exponential_per_logit_read():
    case = Case("case", "two", "32000 bf16", ROWS, (4, 2), True, lambda: None)
    assert granted(case, Budget(4, 1, 3, more_reads=1)) == (2 * 6 + 4, 3 + 4, 4, 1)


def test_every_budget_is_about_some_case_and_every_case_has_one():
    assert {case.budget for case in cases(quick=False)} == {case.budget for case in cases(quick=True)} == set(BUDGETS)


def test_a_measure_without_a_case_is_noticed(monkeypatch):
    monkeypatch.setattr("benchmarks.aot.cases.MEASURES", MEASURES[:4])
    with pytest.raises(AssertionError, match="CVaR"):
        cases(quick=True)


def test_the_kernels_that_ship_pass(tmp_path):
    """Told to interpret kernels, as tests are, the gate compiles them all the same."""
    ended = run_python(
        "-m", "benchmarks.aot.command", "--quick", "--output", str(tmp_path / "gate.json"), TRITON_INTERPRET="1"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    results = json.loads(ended.stdout.splitlines()[-1])
    assert results == json.loads((tmp_path / "gate.json").read_text())
    assert results["failures"] == []
    assert {row["target"] for row in results["results"]} == set(TARGETS)
    assert {row["kernel"] for row in results["results"]} == {
        *("statistics.statistics_kernel", "gradient.gradient_kernel"),
        *("nested.to_go_kernel", "nested.gradient_kernel"),
    }
    assert results["triton"] == triton.__version__


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_failure_is_an_exit_status_and_says_which_compiler(monkeypatch, tmp_path, capsys):
    for version in ("3.6.0", "3.9.0"):
        (tmp_path / f"aot-{version}" / f"triton-{version}.dist-info").mkdir(parents=True)
        (tmp_path / f"aot-{version}" / f"triton-{version}.dist-info" / "METADATA").write_text(
            f"Name: triton\nVersion: {version}\n"
        )
    results = {"3.6.0": {"failures": []}, "3.9.0": {"failures": ["it spills"]}}
    monkeypatch.setattr(command, "_apart", lambda options, folder: results[folder.name.removeprefix("aot-")])
    arguments = ["--venvs", str(tmp_path), "--triton", "3.6.0"]
    assert command.main(options(*arguments)) == 0
    assert command.main(options(*arguments, "--triton", "3.9.0")) == 1
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == {"op": "aot", "failures": ["triton 3.9.0: it spills"], "runs": list(results.values())}


def test_a_folder_with_another_version_is_refused(tmp_path):
    (tmp_path / "aot-3.6.0" / "triton-3.9.0.dist-info").mkdir(parents=True)
    (tmp_path / "aot-3.6.0" / "triton-3.9.0.dist-info" / "METADATA").write_text("Name: triton\nVersion: 3.9.0\n")
    with pytest.raises(SystemExit, match=r"aot-3.6.0 holds triton \['3.9.0'\], not 3.6.0"):
        command.main(options("--venvs", str(tmp_path), "--triton", "3.6.0"))


def test_a_kernel_that_no_case_launches_is_named(gate):
    others = ["gradient.gradient_kernel", "nested.gradient_kernel", "nested.to_go_kernel"]
    assert gate["unlaunched"] == [f"{name} is launched by no case" for name in others]


if __name__ == "__main__":
    print(json.dumps(planted()))
