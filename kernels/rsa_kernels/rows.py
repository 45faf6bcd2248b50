"""The arithmetic of one block of rows in torch: what the chunk loop of `chunked.py` calls, twice per chunk.

A row pair is two functions and a price. `forward` turns logits into per-row numbers, `backward` turns logits and
upstream gradients into the gradient of the policy logits; both may write over the logits they are given. With
π = softmax z (policy), p = softmax r (reference) and w = risk.weights(log p − log π, log p):

    dz_u = g_logp · (1[u = y] − π_u) + g_risk · (π_u − w_u) + g_kl · (π_u − p_u)
"""

from ast import literal_eval
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsa_kernels.naive import pick
from rsa_kernels.risk import CVaR, Outcomes, RiskMeasure, decode, encode


class RowOptions(NamedTuple):
    """What every row of a call shares."""

    risk: RiskMeasure | None
    scale: float
    ref_scale: float
    softcap: float | None
    ref_softcap: float | None
    ignore_index: int
    entropy: bool

    def encode(self) -> str:
        """As text, the only kind of constant of any shape that a custom operator can carry.

        Floats are written in hexadecimal: it is exact, and Dynamo turns a float that varies between calls into a
        symbol, of which it cannot take the repr, while hex() makes it a constant again.
        """
        name, fields = encode(self.risk)
        floats = [None if value is None else value.hex() for value in self[1:5]]
        return repr((name, [(field, value.hex()) for field, value in fields], floats, self.ignore_index, self.entropy))

    @staticmethod
    def decode(text: str) -> "RowOptions":
        """The options that `encode` wrote."""
        name, fields, floats, ignore_index, entropy = literal_eval(text)
        risk = decode(name, [(field, float.fromhex(value)) for field, value in fields])
        values: list[Any] = [None if value is None else float.fromhex(value) for value in floats]
        scale, ref_scale, softcap, ref_softcap = values
        return RowOptions(risk, scale, ref_scale, softcap, ref_softcap, ignore_index, entropy)

    @property
    def saved_count(self) -> int:
        """Numbers per row kept for backward: one log-normaliser per model, and the scalars of the measure."""
        return 1 if self.risk is None else 2 + self.risk.scalar_count


class RowStats(NamedTuple):
    """Per row; None where not asked for. Ignored rows hold anything, nan included: the loop zeroes them."""

    logp: Float[Tensor, " C"]
    ref_logp: Float[Tensor, " C"] | None
    risk: Float[Tensor, " C"] | None
    kl: Float[Tensor, " C"] | None
    entropy: Float[Tensor, " C"] | None
    saved: Float[Tensor, "C K"]


class RowGradients(NamedTuple):
    """Upstream gradients of `logp`, `risk` and `kl` per row; None where nothing depends on the output."""

    logp: Float[Tensor, " C"] | None
    risk: Float[Tensor, " C"] | None
    kl: Float[Tensor, " C"] | None

    @property
    def needs_reference(self) -> bool:
        """Whether backward reads the reference logits: `logp` alone does not depend on them."""
        return self.risk is not None or self.kl is not None


class RowPair(NamedTuple):
    """`forward(z, r, labels, options)`, `backward(z, r, labels, grads, saved, options)`; r is None where not needed."""

    forward: Callable[[Tensor, Tensor | None, Tensor, RowOptions], RowStats]
    backward: Callable[[Tensor, Tensor | None, Tensor, RowGradients, Tensor, RowOptions], Tensor]
    bytes_per_logit: int  # most workspace per (row, vocabulary entry) in fp32: logits of both models and temporaries


def rows_forward(
    z: Float[Tensor, "C V"], r: Float[Tensor, "C V"] | None, labels: Int[Tensor, " C"], options: RowOptions
) -> RowStats:
    risk = options.risk
    z = _centre(_transform(z, options.scale, options.softcap))
    z_norm, entropy = _normaliser(z, options.entropy)
    logp = _label(z, z_norm, labels)
    if r is None:
        return RowStats(logp, None, None, None, entropy, z_norm)
    r = _centre(_transform(r, options.ref_scale, options.ref_softcap))
    r_norm, _ = _normaliser(r, False)
    ref_logp = _label(r, r_norm, labels)
    if risk is None:
        return RowStats(logp, ref_logp, None, None, entropy, z_norm)
    outcomes = _outcomes(z, r, z_norm, r_norm)
    scalars = _scalars(risk, outcomes)
    value = risk.value_at(outcomes, scalars)
    kl = (outcomes.probs * outcomes.x).sum(-1)
    return RowStats(logp, ref_logp, value, kl, entropy, torch.cat([z_norm, r_norm, scalars], dim=-1))


def rows_backward(
    z: Float[Tensor, "C V"],
    r: Float[Tensor, "C V"] | None,
    labels: Int[Tensor, " C"],
    grads: RowGradients,
    saved: Float[Tensor, "C K"],
    options: RowOptions,
) -> Float[Tensor, "C V"]:
    z = _transform(z, options.scale, options.softcap)
    slope = None if options.softcap is None else _softcap_slope(z, options.softcap)
    z = _centre(z)
    z_norm, r_norm, scalars = saved[:, :1], saved[:, 1:2], saved[:, 2:]
    targets = []
    if r is not None:
        assert options.risk is not None, "reference logits in backward serve the risk only"
        outcomes = _outcomes(z, _centre(_transform(r, options.ref_scale, options.ref_softcap)), z_norm, r_norm)
        if grads.risk is not None:
            targets.append((options.risk.weights_at(outcomes, scalars), grads.risk))
        if grads.kl is not None:
            targets.append((outcomes.probs, grads.kl))
    policy = z.sub_(z_norm).exp_()
    dz = torch.zeros_like(policy)
    for weights, grad in targets:
        dz.addcmul_(policy - weights, grad[:, None])  # differences first: exactly 0 where the policy is the target
    if grads.logp is not None:
        dz.addcmul_(policy, grads.logp[:, None], value=-1)
        dz.scatter_add_(1, labels.clamp(0, dz.shape[1] - 1)[:, None], grads.logp[:, None])
    if slope is not None:
        dz.mul_(slope)
    return dz if options.scale == 1.0 else dz.mul_(options.scale)


def _transform(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaled and capped logits in fp32 or fp64, in place if possible. −inf marks an absent column and stays −inf."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        z = z.mul_(scale)
    if softcap is None:
        return z
    absent = z == -torch.inf
    return z.div_(softcap).tanh_().mul_(softcap).masked_fill_(absent, -torch.inf)


def _softcap_slope(capped: Tensor, softcap: float) -> Tensor:
    """∂ capped / ∂ uncapped = 1 − (capped / softcap)², and 0 at absent columns."""
    return (1 - (capped / softcap).square_()).clamp_(min=0.0)


def _centre(z: Tensor) -> Tensor:
    """Subtract the row maximum: differences of two models keep their digits, exponentials stay below 1."""
    return z.sub_(z.amax(-1, keepdim=True))


def _normaliser(z: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """log Σ exp z of centred logits [C, 1], and the entropy of their softmax [C]."""
    mass = z.exp()
    total = mass.sum(-1, keepdim=True)
    norm = total.log()
    if not entropy:
        return norm, None
    mean = torch.where(mass > 0, mass * z, 0.0).sum(-1) / total.squeeze(-1)
    return norm, norm.squeeze(-1) - mean


def _label(z: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
    return pick(z, labels, torch.zeros_like(labels, dtype=torch.bool)) - norm.squeeze(-1)


def _outcomes(z: Tensor, r: Tensor, z_norm: Tensor, r_norm: Tensor) -> Outcomes:
    """x = log p − log π with mass p, from centred logits; `r` is overwritten.

    The difference of the logits comes first: equal differences stay equal, so the atoms of CVaR survive rounding.
    """
    x = (r - z).sub_(r_norm - z_norm)
    log_probs = r.sub_(r_norm)
    probs = log_probs.exp()
    # On a GPU the test would cost a sync; on a CPU it saves three passes whenever no column is masked.
    if x.is_cuda or not x.sum().isfinite():
        x.masked_fill_((probs == 0) & ~x.isfinite(), 0.0)
    return Outcomes(x, log_probs, probs)


def _scalars(risk: RiskMeasure, outcomes: Outcomes) -> Tensor:
    if not isinstance(risk, CVaR) or risk.tail == 1 or outcomes.x.device.type != "cpu":
        return risk.scalars(outcomes)
    # On a CPU the sort of CVaR would take longer than everything else in a small head, its matrix products included.
    # On blocks smaller than this the search spends more time starting operations than the sort takes.
    large = outcomes.x.numel() >= 2**16
    find = tail_threshold if large else _sorted_threshold
    return risk.split(outcomes, find(outcomes, risk.tail))


def tail_threshold(outcomes: Outcomes, tail: float, passes: int = 12) -> Float[Tensor, "C 1"]:
    """The upper `tail`-quantile of every row, an element of it, by a search that mostly does without a sort."""
    return _settle(outcomes, tail, _search(outcomes, tail, passes))


def _sorted_threshold(outcomes: Outcomes, tail: float) -> Tensor:
    """The same by a sort."""
    return _settle(outcomes, tail, CVaR(tail).threshold(outcomes))


def _settle(o: Outcomes, tail: float, threshold: Float[Tensor, "C 1"]) -> Float[Tensor, "C 1"]:
    """The largest element of each row with mass ≥ `tail` at or above it, given a guess that is mostly right.

    Masses are summed in the order of the vocabulary here. Sort and search sum in other orders, so that either may end a
    few outcomes away; once settled, a threshold depends on its row alone and not on the chunk that the row came in.
    """
    wanted = tail * o.probs.sum(-1, keepdim=True)
    above = (o.probs * (o.x > threshold)).sum(-1, keepdim=True)
    reached = (o.probs * (o.x >= threshold)).sum(-1, keepdim=True)
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
        enough = (mass * (x >= descending.gather(-1, middle))).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, low, (middle + 1).minimum(high)), torch.where(enough, middle, high)
    return descending.gather(-1, high)


def _search(outcomes: Outcomes, tail: float, passes: int = 12) -> Float[Tensor, "C 1"]:
    """The upper `tail`-quantile of every row by narrowing a bracket instead of sorting; nan where it was not found.

    A pass splits the mass inside the bracket at a pivot and keeps the side with the quantile. The pivot is the heaviest
    outcome if it holds much of the mass (few tokens carry most of it, so this often ends the search), otherwise the
    quantile of a uniform law with the bracket's mean and variance. Wrong if outcomes differ by less than 1e-30.
    """
    x, mass = outcomes.x, outcomes.probs
    wanted = tail * mass.sum(-1, keepdim=True)  # mass of the tail that is not yet known to lie above the bracket
    threshold, rows = torch.full_like(wanted, torch.nan), torch.arange(x.shape[0])
    if not x.sum().isfinite():
        return threshold
    for number in range(passes):
        pivot = _pivot(x, mass, wanted, at_outcome=number % 3 == 2)
        step = torch.sub(x, pivot).mul_(1e30)  # clamped to [0, 1] it is 1[x > pivot], at a fifth of a comparison's time
        above = step.clamp(0.0, 1.0).mul_(mass)
        below = step.neg_().clamp_(0.0, 1.0).mul_(mass)
        mass_above, mass_below = above.sum(-1, keepdim=True), below.sum(-1, keepdim=True)
        mass_at = mass.sub(above).sub_(below).sum(-1, keepdim=True)
        rises = mass_above >= wanted
        wanted_below = wanted - mass_above - mass_at
        found = (~rises & (mass_at > 0) & ((wanted_below <= 0) | (mass_below == 0))).squeeze(-1)
        threshold[rows[found]] = pivot[found]
        left = (~found).nonzero().squeeze(-1)
        if not left.numel():
            break
        mass = torch.where(rises, above, below)[left]
        wanted = torch.where(rises, wanted, wanted_below.minimum(mass_below))[left]  # rounding may ask for more
        x, rows = x[left], rows[left]
    return threshold


def _pivot(x: Tensor, mass: Tensor, wanted: Tensor, at_outcome: bool) -> Tensor:
    """Where to split the bracket; `at_outcome` guarantees progress."""
    total = mass.sum(-1, keepdim=True)
    heaviest, index = mass.max(-1, keepdim=True)
    weighted = mass * x
    mean = weighted.sum(-1, keepdim=True) / total
    variance = weighted.mul_(x).sum(-1, keepdim=True) / total - mean.square()
    uniform = mean + (3 * variance.clamp_(min=0.0)).sqrt_() * (1 - 2 * wanted / total)
    return torch.where((heaviest >= 0.15 * total) | at_outcome, x.gather(-1, index), uniform)


# At most 45 were measured on a CPU: the sort of CVaR, at bf16 weights.
TORCH_ROWS = RowPair(rows_forward, rows_backward, bytes_per_logit=48)
