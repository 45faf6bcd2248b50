"""The upper quantile of every row by a search that mostly does without a sort: the CVaR threshold on a CPU."""

import torch
from jaxtyping import Float
from torch import Tensor

from rsa_kernels.risk import CVaR, Outcomes, indicator


def tail_threshold(outcomes: Outcomes, tail: float, passes: int = 3) -> Float[Tensor, "C 1"]:
    """The upper `tail`-quantile of every row, an element of it, by a search that mostly does without a sort."""
    return _settle(outcomes, tail, _search(outcomes, tail, passes))


def sorted_threshold(outcomes: Outcomes, tail: float) -> Tensor:
    """The same by a sort."""
    return _settle(outcomes, tail, CVaR(tail).threshold(outcomes))


def _settle(o: Outcomes, tail: float, threshold: Float[Tensor, "C 1"]) -> Float[Tensor, "C 1"]:
    """The largest element of each row with mass ≥ `tail` at or above it, given a guess that is mostly right.

    Masses are summed in the order of the vocabulary here. Sort and search sum in other orders, so that either may end a
    few outcomes away; once settled, a threshold depends on its row alone and not on the chunk that the row came in.
    """
    wanted = tail * o.probs.sum(-1, keepdim=True)
    above = indicator(torch.gt, o.x, threshold).mul_(o.probs).sum(-1, keepdim=True)
    reached = indicator(torch.ge, o.x, threshold).mul_(o.probs).sum(-1, keepdim=True)
    right = ((above < wanted) & (reached >= wanted)).squeeze(-1)
    if not right.all():
        wrong = (~right).nonzero().squeeze(-1)
        threshold[wrong] = _bisect(o.x[wrong], o.probs[wrong], wanted[wrong])
    return threshold


def _bisect(x: Tensor, mass: Tensor, wanted: Tensor) -> Tensor:
    """The same by bisection of the sorted row: sums of non-negative numbers in a fixed order rise with their terms."""
    descending = x.sort(dim=-1, descending=True).values
    low, high = torch.zeros_like(wanted, dtype=torch.int64), torch.full_like(wanted, x.shape[-1] - 1, dtype=torch.int64)
    for _ in range(x.shape[-1].bit_length()):
        middle = (low + high) // 2
        found = indicator(torch.ge, x, descending.gather(-1, middle)).mul_(mass)
        enough = found.sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, low, (middle + 1).minimum(high)), torch.where(enough, middle, high)
    return descending.gather(-1, high)


def _search(outcomes: Outcomes, tail: float, passes: int) -> Float[Tensor, "C 1"]:
    """The upper `tail`-quantile of every row by histograms instead of a sort; nan or -inf where it was not found.

    A pass spreads the mass that is left over bins of equal width, within four standard deviations of its mean, and
    keeps the bin with the quantile. Once a bin holds few outcomes they are sorted; once it holds only equal ones, any
    of them is the quantile.
    """
    x, mass = outcomes.x, outcomes.probs
    wanted = tail * mass.sum(-1, keepdim=True)  # of the tail, the mass not yet known to lie above the bin
    threshold, rows = torch.full_like(wanted, torch.nan), torch.arange(x.shape[0])
    if not x.sum().isfinite():
        return threshold
    few = max(32, x.shape[1] // 8)
    for _ in range(passes):
        inside, wanted = _quantile_bin(x, mass, wanted)
        many = inside.sum(-1, dtype=torch.int32) > few
        threshold[rows] = _sorted_bin(x, mass, inside.logical_and(~many[:, None]), wanted)
        left = many.nonzero().squeeze(-1)
        low, high = _extremes(x[left], inside[left])
        threshold[rows[left]] = torch.where(low == high, low, torch.nan)
        left = left[(low != high).squeeze(-1)]
        if not left.numel():
            break
        mass = mass[left].mul_(inside[left])
        x, wanted, rows = x[left], wanted[left], rows[left]
    return threshold


def _quantile_bin(x: Tensor, mass: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which outcomes with mass lie in the bin of the quantile [C, V], and how much is wanted of them [C, 1]."""
    total, bins = mass.sum(-1, keepdim=True), min(max(x.shape[1] // 16, 32), 1024)
    mean = (mass * x).sum(-1, keepdim=True) / total
    variance = x.sub(mean).square_().mul_(mass).sum(-1, keepdim=True) / total
    deviation = variance.sqrt_().clamp_(min=1e-30)  # a division by less overflows
    # subtraction, product and rounding keep the order: no outcome of a later bin is larger than one of an earlier
    place = torch.sub(mean + 4 * deviation, x).mul_(bins / (8 * deviation)).clamp_(0, bins - 1).long()
    reached = torch.zeros(x.shape[0], bins, dtype=x.dtype).scatter_add_(1, place, mass).cumsum(-1)
    number = (reached < wanted).sum(-1, keepdim=True).clamp_(max=bins - 1)
    above = torch.where(number > 0, reached.gather(-1, (number - 1).clamp_(min=0)), 0.0)
    return (place == number).logical_and_(mass > 0), wanted - above


def _sorted_bin(x: Tensor, mass: Tensor, inside: Tensor, wanted: Tensor) -> Tensor:
    """The quantile of every row among the outcomes inside, packed and sorted: [C, 1]. -inf for a row without any."""
    row, column = inside.nonzero(as_tuple=True)
    counts = inside.sum(-1)
    slot = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]
    packed = x.new_full((x.shape[0], int(counts.amax()) + 1), -torch.inf)
    packed_mass = torch.zeros_like(packed)
    packed[row, slot], packed_mass[row, slot] = x[row, column], mass[row, column]
    descending, order = packed.sort(dim=-1, descending=True)
    reached = packed_mass.gather(-1, order).cumsum(-1)
    last = (counts[:, None] - 1).clamp(min=0)
    return descending.gather(-1, (reached < wanted).sum(-1, keepdim=True).minimum(last))


def _extremes(x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest outcome inside, per row."""
    smallest = torch.where(inside, x, torch.inf).amin(-1, keepdim=True)
    return smallest, torch.where(inside, x, -torch.inf).amax(-1, keepdim=True)
