"""Compile cases for every target, hold each to its budget, and tabulate what they take."""

import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import rsa_kernels.fused
from rich.table import Table
from triton.runtime.jit import JITFunction

from benchmarks.aot.cases import CAPPED, SLACK, Budget, Case
from benchmarks.aot.compile import TARGETS, Compiled, Launch, kernel_name, launches
from benchmarks.aot.count import Count

REPLICATION = 1.25  # issued by the threads, over what they would issue if each element were held by one of them


class Figures(NamedTuple):
    """Per logit, or per token of the recursion; `more_` is what the data decide on."""

    bytes: float
    exponentials: float
    more_bytes: float
    more_exponentials: float


class Failure(NamedTuple):
    case: str
    sentence: str
    place: str


def run(
    cases: list[Case], budgets: dict[str, Budget], targets: Iterable[str] = tuple(TARGETS)
) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row per launch, a sentence per failure)."""
    rows, failures = [], []
    for case in cases:
        for target in targets:
            with launches(target) as recorded:
                case.launch()
            rows += [_row(case, target, launch) for launch in recorded]
            place = f"{case.shape} for {target}"
            failures += [Failure(case.name, sentence, place) for sentence in check(case, recorded, budgets)]
    return rows, _sentences(failures)


def check(case: Case, recorded: list[Launch], budgets: dict[str, Budget]) -> Iterator[str]:
    """What is wrong with the kernels of a case for one target."""
    if not recorded:
        yield "launches no kernel"
    for kernel in (launch.compiled for launch in recorded):
        if kernel.spills:
            yield (
                f"{kernel.kernel} spills {kernel.spills} {kernel.spill_unit} with {kernel.threads} threads and "
                f"{_sizes(kernel)}: smaller tiles or more warps leave more registers"
            )
    if case.budget not in budgets:
        yield f"has no budget: add a row {case.budget!r} to BUDGETS in benchmarks/aot/cases.py"
    else:
        yield from _over_budget(case, recorded, granted(case, budgets[case.budget]))
    yield from _replicated(case, recorded)


def granted(case: Case, budget: Budget) -> Figures:
    """What a row of the budget is for the dtypes of a case."""
    policy, reference = case.sizes

    def read(elements: int) -> int:  # of the policy, or of both in turn
        return elements // 2 * (policy + reference) + elements % 2 * policy

    def exponentials(own: int, elements: int) -> int:
        return own + CAPPED * case.capped * elements

    return Figures(
        read(budget.reads) + policy * budget.writes,
        exponentials(budget.exponentials, budget.reads),
        read(budget.more_reads) + policy * budget.more_writes,
        exponentials(budget.more_exponentials, budget.more_reads),
    )


def _over_budget(case: Case, recorded: list[Launch], most: Figures) -> Iterator[str]:
    parts = [figures(case, launch, launch.compiled.source) for launch in recorded]
    total = Figures(*map(sum, zip(*parts, strict=True))) if parts else most
    names = " and ".join(launch.compiled.kernel for launch in recorded)
    for unit, has, may in zip(Figures._fields, total, most, strict=True):
        if has > may + SLACK:
            yield f"{names} takes {has:.3f} {_words(unit)} per logit, its budget {case.budget!r} is {may}"


def _replicated(case: Case, recorded: list[Launch]) -> Iterator[str]:
    for launch in recorded:
        kernel = launch.compiled
        both = (figures(case, launch, count) for count in (kernel.issued, kernel.expected))
        for unit, issued, expected in zip(Figures._fields, *both, strict=True):
            if issued > REPLICATION * expected + SLACK:
                yield (
                    f"the {kernel.threads} threads of {kernel.kernel} issue {issued:.2f} {_words(unit)} per logit, "
                    f"{expected:.2f} would do: with {_sizes(kernel)} some elements are held several times"
                )


def figures(case: Case, launch: Launch, count: Count) -> Figures:
    """Work per logit, or per token of a block of the recursion."""
    always, more = count.times(launch.programs / case.rows if case.rows else 1)
    return Figures(always.read + always.written, always.exponentials, more.read + more.written, more.exponentials)


def _sizes(kernel: Compiled) -> str:
    """Constants of a launch that are numbers of something: tiles first of all."""
    sizes = {k: v for k, v in kernel.constants.items() if type(v) is int and k not in ("V", "IGNORE_INDEX", "SAVED")}
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def _words(unit: str) -> str:
    return f"more {unit.removeprefix('more_')} where the data ask for it" if unit.startswith("more_") else unit


def _sentences(failures: list[Failure]) -> list[str]:
    """One sentence for what fails alike in several places."""
    alike: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        alike.setdefault(failure[:2], []).append(failure.place)
    return [f"{case}: {sentence} ({'; '.join(places)})" for (case, sentence), places in alike.items()]


def unlaunched(kernels: set[str]) -> list[str]:
    """A sentence for every kernel of rsa_kernels.fused that no case launches."""
    names = [f"rsa_kernels.fused.{module.name}" for module in pkgutil.iter_modules(rsa_kernels.fused.__path__)]
    members = [member for name in names for member in vars(importlib.import_module(name)).values()]
    entries = {kernel_name(f) for f in members if isinstance(f, JITFunction) and "tl.program_id" in f.src}
    return [f"{name} is launched by no case" for name in sorted(entries - kernels)]


def _row(case: Case, target: str, launch: Launch) -> dict[str, Any]:
    kernel = launch.compiled
    per_logit = figures(case, launch, kernel.source)
    issued = figures(case, launch, kernel.issued)
    return {
        "case": case.name,
        "shape": case.shape,
        "dtype": re.sub(r"^\d+ | of .*", "", case.shape),
        "target": target,
        "kernel": kernel.kernel,
        "sizes": _sizes(kernel),
        "threads": kernel.threads,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "scalar_spills": kernel.scalar_spills,
        "shared_bytes": kernel.shared_bytes,
        "load_bytes": kernel.load_bytes,
        **{f"{name}_per_logit": round(value, 4) for name, value in per_logit._asdict().items()},
        **{f"issued_{name}_per_logit": round(value, 4) for name, value in issued._asdict().items()},
    }


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """A line per case and dtype: the most of all vocabularies, per target where targets differ."""
    table = Table(
        title=f"{title}: {' / '.join(TARGETS)}",
        caption="Bytes and exponentials per logit are those of every row, + those that the data ask some rows for: "
        "one sweep of a search, one block of a recursion. Issued are the exponentials of all threads.",
    )
    for name in ("case", "dtype"):
        table.add_column(name)
    for name in ("registers", "spills", "shared bytes", "load bytes", "B per logit", "exp per logit", "issued"):
        table.add_column(name, justify="right")
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["case"], row["dtype"], row["kernel"]), []).append(row)
    for (case, dtype, _), same in lines.items():
        table.add_row(case, dtype, *_cells(same))
    return table


def _cells(rows: list[dict[str, Any]]) -> Iterator[str]:
    def most(figure: str) -> str:
        values = [max(row[figure] for row in rows if row["target"] == target) for target in TARGETS]
        return " / ".join(map(str, values)) if len(set(values)) > 1 else str(values[0])

    def per_logit(figure: str) -> str:
        once, more = (max(row[f"{prefix}_per_logit"] for row in rows) for prefix in (figure, _more(figure)))
        return f"{once:.2f}" + (f" + {more:.2f}" if more > SLACK else "")

    scalar = max(row["scalar_spills"] for row in rows)
    yield most("registers")
    yield most("spills") + (f" (scalar: {scalar})" if scalar else "")
    yield most("shared_bytes")
    yield ", ".join(map(str, sorted({row["load_bytes"] for row in rows}, reverse=True)))
    yield from map(per_logit, ("bytes", "exponentials", "issued_exponentials"))


def _more(figure: str) -> str:
    return f"issued_more_{figure.removeprefix('issued_')}" if figure.startswith("issued_") else f"more_{figure}"
