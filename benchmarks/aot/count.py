"""What a kernel moves and computes, counted in Triton's own intermediate representation (MLIR, as text).

The first stage ("ttir") says what the program is: operations on whole tiles, loops with bounds that are known, since
the vocabulary is a constant. The last one ("ttgir") says also how a tile lies on the threads; there an element that
several threads hold is counted for each of them. Machine code would say the same in a form that cannot be summed: LLVM
unrolls some loops and not others.

    work of an operation per entry of the row = turns of the loops around it / tiles of its size in a row

What only the data decide on is counted apart: one turn of a loop that they end (`while`), and a branch that some rows
leave out. Of branches that exclude each other the dearer one counts.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import NamedTuple

BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
# One unit of a GPU computes all of these, at a quarter of the rate of sums or less.
EXPONENTIALS = {
    *("math.exp", "math.exp2", "math.expm1", "math.log", "math.log2", "math.log1p"),
    *("math.sin", "math.cos", "math.tanh", "math.erf", "math.sqrt", "math.rsqrt"),
}
LOADS = {"tt.load", "ttg.async_copy_global_to_local", "amdg.buffer_load", "amdgpu.buffer_load"}
STORES = {"tt.store", "amdg.buffer_store", "amdgpu.buffer_store"}
COUNTED = LOADS | STORES | EXPONENTIALS
# What would move or compute without being counted.
UNKNOWN = re.compile(
    r"^(tt\.(call|dot|dot_scaled|atomic\w*|descriptor\w*|extern_elementwise|elementwise_inline_asm|gather|histogram)"
    r"|ttng?\.\w*tma\w*|ttg\.warp_specialize|amdg(pu)?\.buffer_(load_to_local|atomic\w*)|scf\.(parallel|index_switch))$"
)

LOCATION = re.compile(r'\s*loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*")*\))*\)')
OPERATION = re.compile(r'^(?:%[\w$.:-]+(?:, %[\w$.:-]+)* = )?"?([a-z_]\w*\.[\w.]+)"?')
CONSTANT = re.compile(r"^(%[\w.-]+) = arith\.constant (-?\d+) : (?:i\d+|index)$")
SUM = re.compile(r"^(%[\w.-]+) = arith\.(addi|subi|muli|divsi|remsi) (%[\w.-]+), (%[\w.-]+)\b")
ARITHMETIC = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": operator.floordiv,
    "remsi": operator.mod,
}
FOR = re.compile(r"scf\.for (?:unsigned )?%\S+ = (%[\w.-]+) to (%[\w.-]+) step (%[\w.-]+)")


class Work(NamedTuple):
    """Per entry of a row: bytes read and written, and exponentials."""

    read: float = 0.0
    written: float = 0.0
    exponentials: float = 0.0

    def times(self, factor: float) -> "Work":
        return Work(*(factor * x for x in self))


class Count(NamedTuple):
    """What every row takes, and what the data decide on: one turn of every loop that they end, and branches that a row
    may leave out."""

    always: Work = Work()
    more: Work = Work()

    def times(self, factor: float) -> "Count":
        return Count(*(work.times(factor) for work in self))

    def optional(self) -> "Count":
        return Count(Work(), Work(*map(sum, zip(*self, strict=True))))


def add(*counts: Count) -> Count:
    return _merge(math.fsum, counts)


def dearer(*counts: Count) -> Count:
    """Figure by figure: of two branches one may read more and the other compute more."""
    return _merge(max, counts)


def _merge(together: Callable, counts: tuple[Count, ...]) -> Count:
    parts = zip(*(counts or (Count(),)), strict=True)
    return Count(*(Work(*(together(figures) for figures in zip(*works, strict=True))) for works in parts))


class Shape(NamedTuple):
    """Shape, element type and layout of a value; no shape is a scalar."""

    sizes: tuple[int, ...]
    element: str
    layout: str


class Tree(NamedTuple):
    """A line of the representation, and the lines of its regions."""

    line: str
    regions: list[list["Tree"]]
    end: str  # the line that closes the last region

    @property
    def name(self) -> str:
        match = OPERATION.match(self.line)
        return match[1] if match else ""


@lru_cache(maxsize=16)  # targets share the first representation
def count(ir: str, entries: int, threads: int = 1, held_once: bool = True) -> Count:
    """Work of one program per entry of its row.

    With its number of threads: what they issue if every element is held by one of them and every scalar by all; or, not
    `held_once`, as the layouts have it.

    Raises:
        ValueError: an operation or a layout that is not known here.
    """
    lines = [LOCATION.sub("", line).strip() for line in ir.splitlines()]
    layouts = dict(line.split(" = ", 1) for line in lines if re.match(r"#\w+ = #ttg\.", line))

    def issued(shape: Shape) -> float:
        lanes = size = math.prod(shape.sizes)
        if shape.sizes and not held_once:
            lanes = threads * math.prod(_held(shape.layout, layouts, shape.sizes))
        # a tile is ⌈entries / size⌉ times as often there as a row, the last time in part
        return max(lanes, threads) / (size * -(-entries // size))

    functions = [tree for tree in _walk(_trees(iter(lines))[0]) if tree.line.startswith("tt.func public")]
    if len(functions) != 1:
        raise ValueError(f"a kernel is one public function, found {len(functions)}")
    return _Counter({}, issued).blocks(functions[0].regions[0])


class _Counter(NamedTuple):
    constants: dict[str, int]  # as far as they were met: names may come again in another region
    issued: Callable[[Shape], float]  # elements per entry of the row

    def blocks(self, region: list[Tree]) -> Count:
        """The dearest way through the blocks of a function: an early return makes several."""
        names, bodies = ["^bb0"], [list[Tree]()]
        for tree in region:
            if tree.line.startswith("^bb"):
                names.append(re.split(r"[(:]", tree.line)[0])
                bodies.append([])
            else:
                bodies[-1].append(tree)
        own = dict(zip(names, map(self.region, bodies), strict=True))
        following = {n: re.findall(r"\^bb\d+", body[-1].line) for n, body in zip(names, bodies, strict=True) if body}

        @cache
        def onwards(name: str) -> Count:
            return add(own[name], dearer(*map(onwards, following.get(name, []))))

        return onwards("^bb0")

    def region(self, trees: list[Tree]) -> Count:
        """A branch with a loop, beside another loop and without an alternative, is one that a row may leave out. Where
        there is no loop beside it, it is what the kernel does, and the rows without it are those to skip."""
        counts = list(map(self.tree, trees))
        loops = [_has_loop(tree) for tree in trees]
        for i, tree in enumerate(trees):
            if tree.name == "scf.if" and loops[i] and sum(loops) > 1 and not self.alternative(tree):
                counts[i] = counts[i].optional()
        return add(*counts)

    def alternative(self, tree: Tree) -> bool:
        return len(tree.regions) == 2 and all(self.region(region) != Count() for region in tree.regions)

    def tree(self, tree: Tree) -> Count:
        if UNKNOWN.match(tree.name):
            raise ValueError(f"the work of {tree.name} is not known: count it in benchmarks/aot/count.py or drop it")
        self.learn(tree.line)
        turns = self.turns(tree.line) if tree.name == "scf.for" else 1
        inner = [self.region(region) for region in tree.regions]
        if tree.name == "scf.for":
            return inner[0].times(turns)
        if tree.name == "scf.while":
            return add(*inner).optional()
        if tree.name == "scf.if":
            return dearer(Count(), *inner)
        if inner:  # a reduction or a scan: its region combines two elements
            return add(*inner).times(math.prod(shape_of(tree.end.split("->")[0]).sizes))
        return Count(self.work(tree))

    def learn(self, line: str) -> None:
        """Integers that are known: bounds of loops are constants, or sums and products of them."""
        if constant := CONSTANT.match(line):
            self.constants[constant[1]] = int(constant[2])
        elif (found := SUM.match(line)) and found[3] in self.constants and found[4] in self.constants:
            self.constants[found[1]] = ARITHMETIC[found[2]](self.constants[found[3]], self.constants[found[4]])
        elif name := re.match(r"%[\w.-]+", line):
            self.constants.pop(name[0], None)

    def turns(self, line: str) -> int:
        bounds = FOR.search(line)
        if bounds is None or not all(name in self.constants for name in bounds.groups()):
            raise ValueError(
                f"the turns of a loop are not known: make its bounds tl.constexpr, or count it here: {line}"
            )
        first, end, step = (self.constants[name] for name in bounds.groups())
        return max(0, -(-(end - first) // step))

    def work(self, tree: Tree) -> Work:
        if tree.name not in COUNTED:
            return Work()
        shape = shape_of(tree.line)
        elements = self.issued(shape)
        moved = elements * BYTES[shape.element]
        return Work(moved * (tree.name in LOADS), moved * (tree.name in STORES), elements * (tree.name in EXPONENTIALS))


def _has_loop(tree: Tree) -> bool:
    return any(inner.name in ("scf.for", "scf.while") for inner in _walk([tree]))


def _walk(trees: list[Tree]) -> Iterator[Tree]:
    for tree in trees:
        yield tree
        for region in tree.regions:
            yield from _walk(region)


def _trees(lines: Iterator[str]) -> tuple[list[Tree], str]:
    """The operations up to the end of a region, and the line that ends it."""
    trees: list[Tree] = []
    for line in lines:
        if line.startswith("}"):
            return trees, line
        regions, end = [], line
        while end.endswith("{"):
            region, end = _trees(lines)
            regions.append(region)
        if line and not line.startswith(("//", "#")):
            trees.append(Tree(line, regions, end))
    return trees, ""


TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<(\w+)(?:, \d+)?>|(\w+))(?:, (#.*))?>")
SCALAR = re.compile(r"^\(?(?:!tt\.ptr<)?(\w+)")


def shape_of(line: str) -> Shape:
    """The first tensor among the types at the end of a line, or else the first scalar."""
    types = line.rsplit(" : ", 1)[-1]
    tensor = TENSOR.search(types)
    if tensor:
        return Shape(tuple(map(int, tensor[1].split("x")[:-1])), tensor[2] or tensor[3], tensor[4] or "")
    scalar = SCALAR.match(types)
    if scalar is None or scalar[1] not in BYTES:
        raise ValueError(f"no type at the end of: {line}")
    return Shape((), scalar[1], "")


def _held(layout: str, layouts: dict[str, str], sizes: tuple[int, ...]) -> list[int]:
    """Elements per dimension that one thread holds."""
    sliced = re.match(r"#ttg\.slice<\{dim = (\d+), parent = (.*)", layout)
    if sliced:
        dim = int(sliced[1])
        held = _held(sliced[2], layouts, (*sizes[:dim], 1, *sizes[dim:]))
        return held[:dim] + held[dim + 1 :]
    name = re.match(r"#\w+(?!\.)\b", layout)
    text = layouts.get(name[0], layout) if name else layout
    if text.startswith("#ttg.linear"):
        bases = re.search(r"register = \[(.*?)\], lane", text)
        assert bases, f"a linear layout without registers: {text}"
        held = [2 ** len(re.findall(r"\[[^\]]*[1-9][^\]]*\]", bases[1]))]
        return held + [1] * (len(sizes) - 1)
    parts = [re.search(rf"{key} = \[([\d, ]+)\]", text) for key in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")]
    if not all(parts):
        raise ValueError(f"how many elements a thread holds in this layout is not known: {text}")
    each, *spread = ([int(x) for x in part[1].split(",")] for part in parts if part)
    repeats = (-(-size // math.prod(tile)) for size, *tile in zip(sizes, each, *spread, strict=True))
    return [min(own, size) * again for own, size, again in zip(each, sizes, repeats, strict=True)]


def scalar_loads(ir: str) -> list[int]:
    """Bytes of every load of a single element, once each."""
    lines = (LOCATION.sub("", line).strip() for line in ir.splitlines())
    shapes = (shape_of(line) for line in lines if (match := OPERATION.match(line)) and match[1] in LOADS)
    return [BYTES[shape.element] for shape in shapes if not shape.sizes]
