"""The launches that the ahead-of-time gate looks at, and what each of them may cost.

A case calls a launch function of the product; tiles, warps and options are what that function says.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product, starmap
from typing import NamedTuple

import torch
from rsa_kernels.dispatch import FUSED
from rsa_kernels.fused.nested import scan_backward, scan_forward
from rsa_kernels.fused.rows import TRITON_ROWS
from rsa_kernels.loop import upstream
from rsa_kernels.pairs import RowGradients, RowOptions
from rsa_kernels.risk import ERM, KL, CVaR, RiskMeasure
from rsa_kernels.workspace import padded
from torch import Tensor


class Budget(NamedTuple):
    """What the maths needs per logit: elements read and written, and exponentials.

    `more_` is what the data decide on: one sweep of CVaR's selection, one block of the recursion, one more sweep where
    a sum was of no use.
    """

    reads: int
    writes: int
    exponentials: int
    more_reads: int = 0
    more_writes: int = 0
    more_exponentials: int = 0


# π and p are the softmax of the policy and of the reference, w are the weights of the risk measure, x = log p − log π.
# ERM takes one more sweep where its sum overflowed: p again, and a sum of p exp(μx) relative to maxima of their own.
BUDGETS = {
    "statistics logp": Budget(1, 0, 1),  # π
    "statistics logp of both": Budget(2, 0, 2),  # π, p
    "statistics KL": Budget(2, 0, 2),
    "statistics ERM": Budget(2, 0, 3, more_reads=2, more_exponentials=3),  # π, p, p exp(μx)
    "statistics ERM, small mu": Budget(2, 0, 3, more_reads=2, more_exponentials=3),  # π, p, expm1(μx)
    "statistics CVaR": Budget(
        4, 0, 3, more_reads=2, more_exponentials=1
    ),  # π, p, and p again for the value; in a sweep p
    "gradient logp": Budget(1, 1, 1),
    "gradient KL": Budget(2, 1, 2),
    "gradient ERM": Budget(2, 1, 3),  # π, w, and p, which says where there is mass
    "gradient CVaR": Budget(2, 1, 2),  # π, p: w is a share of p
    "nested forward": Budget(0, 0, 0, more_reads=1, more_writes=1),
    "nested backward": Budget(0, 0, 0, more_reads=1, more_writes=1),
}
CAPPED = 1  # exponentials of a softcap, per logit read
# Bytes and exponentials per logit that a row or a tile may add. Labels, upstream gradients and saved numbers take up to
# 40 bytes in every tile of 4096; moving sums to other maxima 8 exponentials in every tile of 1024, merging running sums
# one for each of 2048 lanes in a row of 32000. A kernel that does too much does 1 exponential or 2 bytes too much.
SLACK = 0.1

# A measure, and what its rows are called in BUDGETS. Limits of a family run as KL.
MEASURES: tuple[tuple[RiskMeasure | None, str], ...] = (
    (None, "logp"),
    (KL(), "KL"),
    (ERM(5.0), "ERM"),
    (ERM(0.05), "ERM, small mu"),
    (CVaR(0.97), "CVaR"),
    (CVaR(0.1), "CVaR"),
    (ERM(-1.0), "ERM"),
    (ERM(0.0), "KL"),
    (CVaR(1.0), "KL"),
)
MAIN = (None, KL(), ERM(5.0), ERM(0.05), CVaR(0.97))  # with every option
EVERY_CHOICE = (KL(), ERM(5.0), CVaR(0.97))  # of upstream gradients; others differ from these in numbers only
MOST_USED = ("logp", "risk")
TRANSFORMS: dict[str, tuple[float, float | None]] = {"": (1.0, None), ", scale and softcap": (0.5, 30.0)}
UPSTREAMS = [
    tuple(name for name, given in zip(RowGradients._fields, choice, strict=True) if given)
    for choice in product((True, False), repeat=3)
    if any(choice)
]


class Shape(NamedTuple):
    """Of logits; `dtype` is a key of DTYPES."""

    vocabulary: int
    dtype: str
    rows: int = 16  # a multiple of 16, as those of chunks are
    padded: bool = False  # rows as those that the linear head computes

    def __str__(self) -> str:
        kind = " of padded rows" if self.padded else f" of {self.rows} rows" if self.rows > 16 else ""
        return f"{self.vocabulary} {self.dtype}{kind}"

    def empty(self, dtype: torch.dtype) -> Tensor:
        stride = padded(self.vocabulary) if self.padded else self.vocabulary
        return torch.empty(self.rows, stride, dtype=dtype)[:, : self.vocabulary]


DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "fp32 and bf16": (torch.float32, torch.bfloat16),  # policy and reference
}
VOCABULARIES = (128256, 32000, 151936, 50257)  # rows of the last are not aligned
LARGE = Shape(128256, "bf16", 8400)  # over 2 GiB, where AMD kernels address memory in another way; it is never touched
ODD = Shape(50257, "bf16")
PADDED = Shape(50257, "bf16", padded=True)
SHAPES = (*starmap(Shape, product(VOCABULARIES, ("bf16", "fp32"))), Shape(128256, "fp32 and bf16"), LARGE, PADDED)
MAIN_SHAPES = tuple(
    shape for shape in SHAPES if shape.dtype == "bf16" or shape[:2] in {(128256, "fp32"), (50257, "fp32")}
)


class Case(NamedTuple):
    name: str
    budget: str  # row of BUDGETS
    shape: str
    rows: int  # 0 where figures are per token
    sizes: tuple[int, int]  # bytes of an element of the policy and of the reference
    capped: bool
    launch: Callable[[], object]


class Variant(NamedTuple):
    """A launch of rows before its shape is known."""

    name: str
    budget: str
    options: RowOptions
    reference: bool
    upstream: tuple[str, ...]  # of a gradient, nothing for statistics
    main: bool  # compiled for all of MAIN_SHAPES, see `cases`


def cases(quick: bool) -> list[Case]:
    """Every variant of every kernel: the main ones at MAIN_SHAPES, the others at one shape each, in turn.

    Statistics are short of registers: they are compiled where rows are odd, too. Quick is the first of each budget.
    """
    missing = set(FUSED) - {type(risk) for risk, _ in MEASURES}
    assert not missing, f"no case in benchmarks/aot/cases.py is about {missing}, which dispatch.FUSED names"
    if not quick:
        return [row_case(v, shape) for i, v in enumerate(variants()) for shape in _shapes(v, i)] + nested_cases()
    first: dict[str, Case] = {}
    for case in [row_case(variant, SHAPES[0]) for variant in variants()] + nested_cases():
        first.setdefault(case.budget, case)
    return list(first.values())


def _shapes(variant: Variant, i: int) -> Sequence[Shape]:
    if variant.main:
        return MAIN_SHAPES
    turn = SHAPES[i % len(SHAPES)]
    return [turn] if variant.upstream or turn == ODD else [turn, ODD]


def variants() -> Iterator[Variant]:
    for (ending, transform), entropy in product(TRANSFORMS.items(), (False, True)):
        plain = not ending and not entropy
        for risk, kind in MEASURES:
            if not plain and risk not in MAIN:
                continue
            options, main = _options(risk, transform, entropy), plain and risk in MAIN
            suffix = ", entropy" * entropy + ending
            if risk is None:
                yield Variant(f"statistics logp{suffix}", "statistics logp", options, False, (), main)
                yield Variant(f"statistics logp of both{suffix}", "statistics logp of both", options, True, (), False)
            else:
                yield Variant(f"statistics {risk}{suffix}", f"statistics {kind}", options, True, (), main)
            if not entropy:  # it has no gradient
                yield from _gradients(options, kind, suffix, main)


def _gradients(options: RowOptions, kind: str, suffix: str, main: bool) -> Iterator[Variant]:
    """Choices of outputs that a loss depends on, as far as `upstream` tells them apart."""
    seen = set()
    for wanted in UPSTREAMS:
        given = upstream(options, *(torch.zeros(1) if name in wanted else None for name in RowGradients._fields))
        names = tuple(name for name, grad in zip(RowGradients._fields, given, strict=True) if grad is not None)
        every = options.risk is None or (options.risk in EVERY_CHOICE and not suffix)
        if not names or names in seen or not (every or names in (MOST_USED, RowGradients._fields)):
            continue
        seen.add(names)
        name = f"gradient {options.risk or ''} of {' and '.join(names)}{suffix}".replace("  ", " ")
        weights = kind.removesuffix(", small mu") if "risk" in names else "KL"  # kl alone takes those of the KL
        row = "gradient logp" if names == ("logp",) else f"gradient {weights}"
        yield Variant(name, row, options, given.needs_reference, names, main and names in (MOST_USED, ("logp",)))


def _options(risk: RiskMeasure | None, transform: tuple[float, float | None], entropy: bool) -> RowOptions:
    scale, softcap = transform
    return RowOptions(risk, scale, scale, softcap, softcap, -100, entropy)


def row_case(variant: Variant, shape: Shape) -> Case:
    policy, reference = (kind.itemsize for kind in DTYPES[shape.dtype])
    capped = variant.options.softcap is not None
    launch = partial(_launch_rows, variant, shape)
    return Case(variant.name, variant.budget, str(shape), shape.rows, (policy, reference), capped, launch)


def _launch_rows(variant: Variant, shape: Shape) -> None:
    policy, reference = DTYPES[shape.dtype]
    options = variant.options
    z, out = shape.empty(policy), shape.empty(policy)
    r = shape.empty(reference) if variant.reference else None
    labels = torch.zeros(shape.rows, dtype=torch.int64)
    if not variant.upstream:
        TRITON_ROWS.forward(z, r, labels, options)
        return
    saved = torch.zeros(shape.rows, TRITON_ROWS.saved_count(options.risk))
    grads = RowGradients(
        *(torch.zeros(shape.rows) if name in variant.upstream else None for name in RowGradients._fields)
    )
    TRITON_ROWS.backward(z, r, labels, grads, saved, options, out)


def nested_cases() -> list[Case]:
    values, totals, bounds = torch.zeros(4096), torch.zeros(2), torch.tensor([0, 1024, 4096])
    forward = partial(scan_forward, values, bounds, 0.9)
    cases = [Case("nested forward", "nested forward", "fp32", 0, (4, 4), False, forward)]
    for ending, to_go, total in (("", values, totals), (" of to_go", values, None), (" of total", None, totals)):
        backward = partial(scan_backward, to_go, total, bounds, len(values), 0.9)
        cases.append(Case(f"nested backward{ending}", "nested backward", "fp32", 0, (4, 4), False, backward))
    return cases
