"""The arithmetic of rows in torch: the definition's, block by block, so that its temporaries stay in a cache.

Nothing but one block of rows exists in fp32; `pairs.py` says what the two functions promise.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsa_kernels.naive import pick
from rsa_kernels.pairs import Price, RowGradients, RowOptions, RowPair, RowStats, accumulator
from rsa_kernels.quantile import sorted_threshold, tail_threshold
from rsa_kernels.risk import CVaR, Outcomes, RiskMeasure

MIB = 2**20
# What the temporaries of a block may take: on a CPU they should stay in its caches, on a GPU they should fill it.
BLOCK_BYTES = {"cpu": 8 * MIB, "cuda": 256 * MIB}
BYTES_PER_LOGIT = 48  # of a block in fp32, both models; at most 45 were measured on a CPU: the sort of CVaR


def saved_count(risk: RiskMeasure | None) -> int:
    """One log-normaliser per model, and the scalars of the measure."""
    return 1 if risk is None else 2 + risk.scalar_count


def rows_forward(
    z: Float[Tensor, "C V"], r: Float[Tensor, "C V"] | None, labels: Int[Tensor, " C"], options: RowOptions
) -> RowStats:
    """Statistics of every row; see `RowPair`."""
    parts = [_block_forward(z[block], None if r is None else r[block], labels[block], options) for block in _blocks(z)]
    if len(parts) == 1:
        return parts[0]
    columns = ([column for column in columns if column is not None] for columns in zip(*parts, strict=True))
    return RowStats._make(torch.cat(column) if column else None for column in columns)


def rows_backward(
    z: Float[Tensor, "C V"],
    r: Float[Tensor, "C V"] | None,
    labels: Int[Tensor, " C"],
    grads: RowGradients,
    saved: Float[Tensor, "C K"],
    options: RowOptions,
    out: Float[Tensor, "C V"],
) -> None:
    """The gradient of the policy logits; see `RowPair`."""
    for block in _blocks(z):
        part = grads.rows(block)
        dz = _block_backward(z[block], None if r is None else r[block], labels[block], part, saved[block], options)
        out[block] = dz.masked_fill_(part.all_zero()[:, None], 0.0)


def price(vocabulary: int, dtype: torch.dtype, device: torch.device) -> Price:
    """Bytes of one block; see `RowPair`."""
    row = _row_bytes(vocabulary, dtype)
    return Price(row, max(row, BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])))


def _row_bytes(vocabulary: int, dtype: torch.dtype) -> int:
    return BYTES_PER_LOGIT * (2 if dtype == torch.float64 else 1) * max(vocabulary, 1)


def _blocks(z: Tensor) -> Iterator[slice]:
    """Blocks of nearly equal size."""
    count = z.shape[0]
    row, most = price(z.shape[1], z.dtype, z.device)
    blocks = -(-count // (most // row))
    return (slice(i * count // blocks, (i + 1) * count // blocks) for i in range(blocks))


def _block_forward(
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


def _block_backward(
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
    """Scaled and capped logits in fp32 or fp64, a copy. −inf marks an absent column and stays −inf."""
    z = logits.to(accumulator(logits.dtype), copy=True)
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
    find = tail_threshold if large else sorted_threshold
    return risk.split(outcomes, find(outcomes, risk.tail))


TORCH_ROWS = RowPair(rows_forward, rows_backward, saved_count, price)
