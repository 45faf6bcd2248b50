"""Token risk of rows whose columns, the vocabulary, are spread over a process group. Used by `vocab_parallel`.

The formulas are those of `rsa_kernels.pairs`; every maximum and sum over the vocabulary is one over the own columns,
followed by an all-reduce. What a rank decides, it decides from reduced values alone, so that all ranks decide alike.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from rsa_kernels.pairs import RowGradients, RowOptions, RowStats, accumulator
from rsa_kernels.risk import ERM, KL, CVaR, RiskMeasure, indicator
from torch import Tensor

PIVOTS = 8  # thresholds per sweep of the CVaR search: each costs a pass, and a sweep leaves 1/8 of the range
SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX
SMALL_MU = 0.1  # below it log E exp(μx) / μ in fp32 loses what the mean of expm1 keeps; as in `ERM.scalars`


class Across:
    """Reductions over the ranks that share a vocabulary: one collective for all tensors of a call."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def total(self, *parts: Tensor) -> list[Tensor]:
        # fp64: the order in which a collective adds depends on the place in its buffer, and equal parts of policy and
        # reference must have equal sums, or a policy at its reference would have a risk
        return [
            total.to(part.dtype) for total, part in zip(self._reduced(parts, SUM, torch.float64), parts, strict=True)
        ]

    def largest(self, *parts: Tensor) -> list[Tensor]:
        return list(self._reduced(parts, MAX, parts[0].dtype))

    def add_up(self, tensor: Tensor) -> None:
        """In place, in its own dtype."""
        dist.all_reduce(tensor, op=SUM, group=self.group)

    def _reduced(self, parts: tuple[Tensor, ...], op: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> Tensor:
        stacked = torch.stack(parts).to(dtype)
        dist.all_reduce(stacked, op=op, group=self.group)
        return stacked


class Saved(NamedTuple):
    """Per row, what turns logits into softmaxes and weights again: `saved` of `RowStats` as names.

    `scalars`: of ERM the logarithm of Σ e^{r'} e^{μ(r' − z')}; of CVaR threshold and fraction.
    """

    z_max: Float[Tensor, "C 1"]
    z_norm: Float[Tensor, "C 1"]
    r_max: Float[Tensor, "C _"]
    r_norm: Float[Tensor, "C _"]
    scalars: Float[Tensor, "C k"]

    @classmethod
    def of(cls, saved: Float[Tensor, "C K"]) -> "Saved":
        z_max, z_norm, r_max, r_norm = (saved[:, i : i + 1] for i in range(4))
        return cls(z_max, z_norm, r_max, r_norm, saved[:, 4:])


def simplest(risk: RiskMeasure | None) -> RiskMeasure | None:
    """The measure, or KL where it is that.

    Raises:
        ValueError: there is no formula for it over a sharded vocabulary.
    """
    if risk is None or type(risk) in (KL, CVaR, ERM):
        return KL() if risk in (CVaR(1.0), ERM(0.0)) else risk
    raise ValueError(
        f"a vocabulary-parallel head knows the risks KL, CVaR and ERM, got {risk!r}: take one of them, or a head that "
        "is whole (tensor_parallel 1)"
    )


def rows_forward(
    logits: Float[Tensor, "C v"],
    ref_logits: Float[Tensor, "C v"] | None,
    columns: Int[Tensor, " C"],
    options: RowOptions,
    across: Across,
) -> RowStats:
    """Statistics of every row, equal on all ranks. `columns` is the label's own column, −1 where it is elsewhere."""
    risk = options.risk
    z = _transformed(logits, options.scale, options.softcap)
    r = None if ref_logits is None else _transformed(ref_logits, options.ref_scale, options.ref_softcap)
    maxima = [t[:, None] for t in across.largest(*(_amax(t) for t in (z, r) if t is not None))]
    sums = {"z": z.sub_(maxima[0]).exp().sum(-1), "z_label": _picked(z, columns), "owners": _owned(columns, z)}
    if r is not None:
        sums |= {"r": r.sub_(maxima[1]).exp().sum(-1), "r_label": _picked(r, columns)}
    if options.entropy:
        sums["entropy"] = _mass_times(z.exp(), z).sum(-1)
    outcomes = None if risk is None or r is None else _log_ratios(z, r)
    shift = None
    if outcomes is not None:
        sums["kl"] = (outcomes[1] * outcomes[0]).sum(-1)
    if isinstance(risk, ERM) and r is not None and outcomes is not None:
        shift = _add_tilted(sums, r, *outcomes, risk.mu, across)
    del z, r  # the search for a threshold wants their room
    total = dict(zip(sums, across.total(*sums.values()), strict=True))
    norms = {model: total[model].log() for model in ("z", "r") if model in total}
    labelled = {
        model: torch.where(total["owners"] == 1, total[f"{model}_label"] - norms[model], torch.nan) for model in norms
    }
    entropy = norms["z"] - total["entropy"] / total["z"] if options.entropy else None
    saved = [column for pair in zip(maxima, (norm[:, None] for norm in norms.values()), strict=True) for column in pair]
    if outcomes is None:
        return RowStats(labelled["z"], labelled.get("r"), None, None, entropy, torch.cat(saved, dim=-1))
    value = mean = total["kl"] / total["r"]
    if shift is not None and isinstance(risk, ERM):
        value, scalars = _entropic(risk.mu, total, shift)
        saved.append(scalars)
    if isinstance(risk, CVaR):
        value, scalars = _cvar(*outcomes, risk.tail, total["r"], across)
        saved.append(scalars)
    c = norms["r"] - norms["z"]
    return RowStats(labelled["z"], labelled["r"], value - c, mean - c, entropy, torch.cat(saved, dim=-1))


def rows_gradient(
    logits: Float[Tensor, "C v"],
    ref_logits: Float[Tensor, "C v"] | None,
    columns: Int[Tensor, " C"],
    grads: RowGradients,
    saved: Float[Tensor, "C K"],
    options: RowOptions,
) -> Float[Tensor, "C v"]:
    """The gradient of the own columns' logits, without communication; exactly 0 in rows that no gradient reaches.

    dz_u = g_logp · (1[u = y] − π_u) + g_risk · (π_u − w_u) + g_kl · (π_u − p_u)
    """
    kept = Saved.of(saved)
    z = _transformed(logits, options.scale, options.softcap)
    slope = None if options.softcap is None else (1 - (z / options.softcap).square_()).clamp_(min=0.0)
    z.sub_(kept.z_max)
    policy, dz = (z - kept.z_norm).exp_(), torch.zeros_like(z)
    if ref_logits is not None:
        r = _transformed(ref_logits, options.ref_scale, options.ref_softcap).sub_(kept.r_max)
        # differences first: exactly 0 where the policy is the target
        if grads.risk is not None:
            dz.addcmul_(policy - _weights(z, r, kept, options.risk), grads.risk[:, None])
        if grads.kl is not None:
            dz.addcmul_(policy - (r - kept.r_norm).exp_(), grads.kl[:, None])
    if grads.logp is not None:
        dz.addcmul_(policy, grads.logp[:, None], value=-1)
        if dz.shape[1]:
            mine = torch.where(columns >= 0, grads.logp, 0.0)
            dz.scatter_add_(1, columns.clamp(min=0)[:, None], mine[:, None])
    if slope is not None:
        dz.mul_(slope)
    return dz.mul_(options.scale).masked_fill_(grads.all_zero()[:, None], 0.0)


def _weights(z: Tensor, r: Tensor, kept: Saved, risk: RiskMeasure | None) -> Tensor:
    """Risk-adjusted probabilities of the own columns, from centred logits."""
    if isinstance(risk, KL):
        return (r - kept.r_norm).exp_()
    d, m = _log_ratios(z, r)
    if isinstance(risk, ERM):
        return r.add(d, alpha=risk.mu).sub_(kept.scalars).exp_()
    assert isinstance(risk, CVaR), f"no weights are known of {risk}"
    threshold, fraction = kept.scalars.split(1, dim=-1)
    key = _keys(d, m)
    share = indicator(torch.gt, key, threshold).addcmul_(indicator(torch.eq, key, threshold), fraction)
    return share.mul_(m).div_(risk.tail * kept.r_norm.exp())


def _add_tilted(
    sums: dict[str, Tensor], r: Tensor, d: Tensor, m: Tensor, mu: float, across: Across
) -> Float[Tensor, " C"]:
    """Adds what the entropic risk needs to the sums; the maximum of r' + μd, which the first of them is relative to."""
    tilt = torch.add(r, d, alpha=mu)
    shift = torch.nan_to_num(across.largest(_amax(tilt))[0], nan=0.0, posinf=0.0, neginf=0.0)
    sums["tilted"] = tilt.sub_(shift[:, None]).exp_().sum(-1)
    if 0 < mu < SMALL_MU:
        sums["excess"] = (m * torch.expm1(mu * d)).sum(-1)
    return shift


def _entropic(mu: float, total: dict[str, Tensor], shift: Tensor) -> tuple[Tensor, Float[Tensor, "C 1"]]:
    """(1/μ) log E_p exp(μd), and log Σ m exp(μd), where p = m / Σ m.

    Small μ: the logarithm of a number near 1 is off by 2e-7 / μ in fp32. The mean of expm1 is not, but overflows;
    there the logarithm is of a number far from 1.
    """
    log_sum = total["tilted"].log() + shift
    log_mean = log_sum - total["r"].log()
    if "excess" in total:
        ratio = total["excess"] / total["r"]
        log_mean = torch.where(ratio < 1, ratio.log1p(), log_mean)
    return log_mean / mu, log_sum[:, None]


# ---- CVaR ------------------------------------------------------------------------------------------------------------


def _cvar(d: Tensor, m: Tensor, tail: float, r_sum: Tensor, across: Across) -> tuple[Tensor, Tensor]:
    """Mean of d over the upper tail of the mass, [C]; threshold and the fraction of the mass at it, [C, 2].

    Outcomes that tie with the threshold share what is left of the tail in proportion to their mass.
    """
    key, wanted = _keys(d, m), tail * r_sum
    threshold = _threshold(key, m, wanted[:, None], across)
    above, at = (indicator(compare, key, threshold).mul_(m) for compare in (torch.gt, torch.eq))
    sums = [above.sum(-1), at.sum(-1), _mass_times(above, d).sum(-1), _mass_times(at, d).sum(-1)]
    above_mass, at_mass, above_cost, at_cost = across.total(*sums)
    fraction = ((wanted - above_mass) / at_mass).clamp(0.0, 1.0)
    value = (above_cost + torch.where(fraction > 0, fraction * at_cost, 0.0)) / wanted
    return value, torch.stack([threshold[:, 0], fraction], dim=-1)


def _keys(d: Tensor, m: Tensor) -> Tensor:
    """What the threshold is searched among: d, −inf without mass, and finite where d is +inf."""
    return d.clamp(max=torch.finfo(d.dtype).max / 8).masked_fill_(m == 0, -torch.inf)


def _threshold(key: Tensor, m: Tensor, wanted: Float[Tensor, "C 1"], across: Across) -> Float[Tensor, "C 1"]:
    """The largest key with mass ≥ `wanted` at or above it: an element of the row, exact.

    It lies in (low, high] all the time; a sweep sums the mass above PIVOTS thresholds between the smallest and the
    largest key in there, and goes on in the one gap where the mass crosses. The smallest key is a threshold itself, so
    every sweep removes a key, and the range of what is left is an eighth of what it was.
    """
    low, high = torch.full_like(wanted, -torch.inf), torch.full_like(wanted, torch.inf)
    first, last = _span(key, low, high, across)
    steps = torch.arange(PIVOTS, device=key.device, dtype=key.dtype) / PIVOTS
    threshold, rows = last.clone(), torch.arange(len(key), device=key.device)
    while (open_ := (first < last).squeeze(-1)).any():  # of reduced values: all ranks go on, or none
        if not open_.all():
            rows, key, m, wanted = rows[open_], key[open_], m[open_], wanted[open_]
            low, high, first, last = low[open_], high[open_], first[open_], last[open_]
        pivots = first + (last - first) * steps
        masses = [indicator(torch.gt, key, pivot[:, None]).mul_(m).sum(-1) for pivot in pivots.unbind(-1)]
        reached = torch.stack(across.total(*masses), dim=-1) >= wanted
        gap = reached.sum(-1, keepdim=True)
        edges = torch.cat([low, pivots, high], dim=-1)
        low, high = edges.gather(-1, gap), edges.gather(-1, gap + 1)
        first, last = _span(key, low, high, across)
        threshold[rows] = last
    return threshold


def _span(key: Tensor, low: Tensor, high: Tensor, across: Across) -> tuple[Tensor, Tensor]:
    """Smallest key above `low` and largest at most `high`, over all ranks."""
    least = _amax(torch.where(key > low, -key, -torch.inf))
    most = _amax(torch.where(key <= high, key, -torch.inf))
    negative, last = across.largest(least, most)
    return -negative[:, None], last[:, None]


# ---- the own columns -------------------------------------------------------------------------------------------------


def _transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaled and capped logits in fp32 or fp64, a copy. −inf marks an absent column and stays −inf."""
    z = logits.to(accumulator(logits.dtype), copy=True)
    if scale != 1.0:
        z.mul_(scale)
    if softcap is None:
        return z
    absent = z == -torch.inf
    return z.div_(softcap).tanh_().mul_(softcap).masked_fill_(absent, -torch.inf)


def _log_ratios(z: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """d = r − z, and the mass e^r of the reference, of centred logits. Without mass d is finite: 0 · inf is nan."""
    d, m = r - z, r.exp()
    return d.masked_fill_((m == 0) & ~d.isfinite(), 0.0), m


def _mass_times(mass: Tensor, x: Tensor) -> Tensor:
    return torch.where(mass > 0, mass * x, 0.0)


def _amax(x: Float[Tensor, "C v"]) -> Float[Tensor, " C"]:
    """−inf for a rank without columns."""
    return x.amax(-1) if x.shape[1] else x.new_full(x.shape[:1], -torch.inf)


def _owned(columns: Tensor, like: Tensor) -> Tensor:
    return (columns >= 0).to(like.dtype)


def _picked(x: Float[Tensor, "C v"], columns: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
    """The entry of the own column, 0 where it is elsewhere."""
    if not x.shape[1]:
        return x.new_zeros(x.shape[0])
    return x.gather(-1, columns.clamp(min=0)[:, None]).squeeze(-1).masked_fill(columns < 0, 0.0)
