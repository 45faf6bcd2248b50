"""Compile what the product launches for a device that is not there.

The product's own launch functions run on CPU tensors while Triton is told that its device is the target: arguments,
their types and alignments, constants and options are those of a real launch, which ends after the compiler.
"""

import contextlib
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

from rsa_kernels.fused import rows
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.aot.count import Count, count, scalar_loads

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Compiled(NamedTuple):
    """One kernel for one target."""

    kernel: str
    constants: dict[str, Any]
    threads: int
    registers: int  # per thread
    spills: int
    spill_unit: str
    scalar_spills: int  # AMD only: a scalar register goes to lanes of a vector register
    shared_bytes: int
    load_bytes: int  # width of most loads
    source: Count  # per entry of a row: what the kernel says
    expected: Count  # what its threads issue if every element is held by one of them, and every scalar by all
    issued: Count  # what they issue


class Launch(NamedTuple):
    compiled: Compiled
    programs: int


class _Device:
    """Of Triton's drivers only what a launch asks before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


_compiled: dict[int, tuple[Any, Compiled]] = {}  # by identity, and the object so that it stays: Triton reuses it, too


@contextlib.contextmanager
def launches(target: str) -> Iterator[list[Launch]]:
    """A list of the launches of its block, none of which runs."""
    recorded: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in _compiled:
            _compiled[id(kernel)] = kernel, _describe(kernel, log.getvalue())
        sizes = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs) if callable(grid) else grid
        recorded.append(Launch(_compiled[id(kernel)][1], prod(sizes)))
        return kernel

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # what a cache holds was compiled at another time, maybe with spills that nobody sees any more
        always = {"TRITON_CACHE_DIR": folder, "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
        stack.enter_context(patch.dict(os.environ, always))
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        stack.enter_context(patch.object(driver, "_active", _Device(TARGETS[target])))
        stack.enter_context(patch.object(rows, "WARP_SIZE", TARGETS[target].warp_size))  # known from torch otherwise
        yield recorded


def kernel_name(function: JITFunction) -> str:
    """With its module: several modules may have a gradient."""
    return f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"


def _describe(kernel: Any, log: str) -> Compiled:
    source = kernel.src
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    entries = constants.get("V") or constants["BLOCK"]  # of a row; of a block of the recursion
    threads = kernel.metadata.target.warp_size * kernel.metadata.num_warps
    machine = kernel.asm["amdgcn" if "amdgcn" in kernel.asm else "ptx"]
    registers, spills, scalar_spills = _amd(machine) if "amdgcn" in kernel.asm else _nvidia(log)
    return Compiled(
        kernel=kernel_name(source.fn),
        constants=constants,
        threads=threads,
        registers=registers,
        spills=spills,
        spill_unit="registers" if "amdgcn" in kernel.asm else "bytes",
        scalar_spills=scalar_spills,
        shared_bytes=kernel.metadata.shared,
        load_bytes=load_bytes(machine, scalar_loads(kernel.asm["ttir"])),
        source=count(kernel.asm["ttir"], entries),
        expected=count(kernel.asm["ttir"], entries, threads),
        issued=count(kernel.asm["ttgir"], entries, threads, held_once=False),
    )


def _nvidia(log: str) -> tuple[int, int, int]:
    """Registers and spilled bytes from what ptxas prints."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not (registers and spills):
        raise ValueError(f"ptxas does not say how many registers it used:\n{log}")
    return max(map(int, registers)), sum(map(int, spills)), 0


def _amd(machine: str) -> tuple[int, int, int]:
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    fields = {name: re.search(rf"\.{name}:\s+(\d+)", machine) for name in names}
    registers, spills, scalar_spills = (int(field[1]) for field in fields.values() if field)
    return registers, spills, scalar_spills


PTX_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d+))?\.[busf](\d+)\b")
PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\S* [^,]*, [^,]*, (0x[0-9a-f]+|\d+)")
AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_(?:lds_)?(?:s|u)?(dword|byte|short)(?:x(\d))?")
AMD_BYTES = {"dword": 4, "short": 2, "byte": 1}


def load_bytes(machine: str, scalars: Iterable[int] = ()) -> int:
    """Width of the loads that bring most bytes: those in loops, or, if there are none, all but the `scalars`."""
    loops: Counter[int] = Counter()
    others = Counter({width: -width * count for width, count in Counter(scalars).items()})
    depth = 0
    for line in machine.splitlines():
        if re.match(r"\$L__BB|\.LBB|// %bb|; %bb", line):
            depth = 0
        if comment := re.findall(r"Depth=(\d+)", line):  # LLVM writes the loops of a block beside and below its name
            depth = max(depth, *map(int, comment))
        if width := _width(line):
            (loops if depth else others)[width] += width
    widths = loops or others
    return max(widths, key=lambda width: widths[width], default=0)


def _width(line: str) -> int:
    if load := PTX_LOAD.search(line):
        return int(load[1] or 1) * int(load[2]) // 8
    if copy := PTX_COPY.search(line):
        return int(copy[1], 0)
    load = AMD_LOAD.search(line)
    return AMD_BYTES[load[1]] * int(load[2] or 1) if load else 0
