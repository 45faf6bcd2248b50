"""What a call from hidden states may hold, and so what it keeps between forward and backward. Numbers only.

| strategy  | kept for backward                                | matrix products, forward and backward            |
| --------- | ------------------------------------------------ | ------------------------------------------------ |
| cache     | the logits of both models                        | 4 with a weight gradient, 3 without              |
| recompute | nothing                                          | 6 with a weight gradient, 5 without              |
| frozen    | the gradient of hidden, one tensor per output    | 4, or 3 where the ratio of the outputs is known  |
"""

from typing import Literal, NamedTuple, get_args

import torch

from rsa_kernels.pairs import RowPair

Strategy = Literal["auto", "cache", "recompute", "frozen"]

MIB = 2**20
# Logits of one chunk: on a CPU enough for the matrix products to be efficient; on a GPU enough for the weight gradient,
# which is read and written once per chunk, to cost little beside them.
CHUNK_BYTES = {"cpu": 64 * MIB, "cuda": 1024 * MIB}
# In all, kept logits included.
WORKSPACE_BYTES = {"cpu": 512 * MIB, "cuda": 1024 * MIB}
ALIGNED = 16  # elements: rows of a workspace begin where the widest loads of a GPU may begin


class Sizes(NamedTuple):
    """What the plan of a call depends on."""

    tokens: int
    vocabulary: int
    dtype: torch.dtype
    ref_dtype: torch.dtype | None  # None without a reference
    device: torch.device
    has_risk: bool
    knows_ratio: bool


class Plan(NamedTuple):
    """How a call runs: what it keeps ("nothing" where no gradient is wanted) and how many rows are a chunk."""

    strategy: Literal["nothing", "cache", "recompute", "frozen"]
    rows: int


def padded(vocabulary: int) -> int:
    """Elements from one row of a workspace to the next."""
    return -(-vocabulary // ALIGNED) * ALIGNED


def check_strategy(strategy: str, head_learns: bool) -> None:
    """Whether there is such a strategy, and it gives every gradient that is wanted.

    Raises:
        ValueError: it does not.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy is one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if strategy == "frozen" and head_learns:
        raise ValueError(
            "strategy='frozen' gives no gradient to the head, but its weight or bias requires one: freeze them with "
            "requires_grad_(False), or use strategy='auto', 'cache' or 'recompute'"
        )


def plan(strategy: Strategy, sizes: Sizes, budget: int | None, pair: RowPair, head_learns: bool, learns: bool) -> Plan:
    """The strategy that fits the budget, or the one that is named, which may exceed it.

    Args:
        budget: bytes, kept logits included; None is the default of the device.
        head_learns: the weight or the bias wants a gradient. `learns`: anything does.

    Raises:
        ValueError: there is no such strategy, or "frozen" was named for a head that wants a gradient.
    """
    check_strategy(strategy, head_learns)
    if not learns:
        return Plan("nothing", _rows("nothing", sizes, budget, pair))
    chosen = _fitting(sizes, budget, pair, head_learns) if strategy == "auto" else strategy
    return Plan(chosen, _rows(chosen, sizes, budget, pair))


def _fitting(
    sizes: Sizes, budget: int | None, pair: RowPair, head_learns: bool
) -> Literal["cache", "recompute", "frozen"]:
    if not head_learns and (sizes.knows_ratio or not sizes.has_risk):
        return "frozen"
    least = min(sizes.tokens, 64)
    price = pair.price(sizes.vocabulary, sizes.dtype, sizes.device)
    needed = _kept(sizes) + least * _row(sizes) + min(least * price.per_row, price.most)
    if needed <= _default(WORKSPACE_BYTES, sizes, budget):
        return "cache"
    return "recompute" if head_learns else "frozen"


def _rows(strategy: str, sizes: Sizes, budget: int | None, pair: RowPair) -> int:
    """Rows per chunk: as many as the budget has room for, at least one, a multiple of 64 where there are that many."""
    left = _default(WORKSPACE_BYTES, sizes, budget) - (_kept(sizes) if strategy == "cache" else 0)
    chunk = _default(CHUNK_BYTES, sizes, None)
    if left <= 0:
        left = chunk  # the strategy was named, and exceeds the budget
    elif budget is None:
        left = min(left, chunk)
    row = max(1, _row(sizes))
    if strategy == "frozen" and sizes.has_risk and not sizes.knows_ratio:
        row += _logits(sizes.dtype, sizes)  # gradients of two outputs, the first of which must not overwrite the logits
    per_row, most = pair.price(sizes.vocabulary, sizes.dtype, sizes.device)
    rows = max(1, left // (row + per_row), (left - most) // row)
    return rows if rows < 64 else rows // 64 * 64


def _logits(dtype: torch.dtype | None, sizes: Sizes) -> int:
    return 0 if dtype is None else padded(sizes.vocabulary) * dtype.itemsize


def _row(sizes: Sizes) -> int:
    """Bytes of a row of both models. A cache that is spent takes them too, when backward runs again."""
    return _logits(sizes.dtype, sizes) + _logits(sizes.ref_dtype, sizes)


def _kept(sizes: Sizes) -> int:
    """Bytes of the logits that backward reads: without a risk, those of the policy."""
    return sizes.tokens * (_row(sizes) if sizes.has_risk else _logits(sizes.dtype, sizes))


def _default(table: dict[str, int], sizes: Sizes, budget: int | None) -> int:
    return table.get(sizes.device.type, table["cuda"]) if budget is None else budget
