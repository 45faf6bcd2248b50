"""The arithmetic of one block of rows in torch: what the chunk loop of `chunked.py` calls, twice per chunk.

A row pair is two functions and a price. `forward` turns logits into per-row numbers, `backward` turns logits and upstream gradients into
the gradient of the policy logits; both may write over the logits they are given. With π = softmax z (policy) and p = softmax r:

    dz_u = g_logp · 1[u = y] + (g_risk + g_kl − g_logp) · π_u − g_risk · w_u − g_kl · p_u        w = risk.weights(log p − log π, log p)
"""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsa_kernels.naive import pick
from rsa_kernels.risk import Outcomes, RiskMeasure, decode, encode


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
        """As text, the only kind of constant of any shape that a custom operator can carry."""
        return json.dumps([encode(self.risk), *self[1:]])

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> "RowOptions":
        """The options that `encode` wrote; floats come back bit for bit."""
        (name, parameters), *rest = json.loads(text)
        return RowOptions(decode(name, parameters), *rest)

    @property
    def saved_count(self) -> int:
        """Numbers per row kept for backward: one log-normaliser per model, and the scalars of the measure."""
        return 1 if self.risk is None else 2 + self.risk.scalar_count


class RowStats(NamedTuple):
    """Per row; those that were not asked for are None. Ignored rows hold anything finite or not: the loop zeroes them."""

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
    """`forward(z, r, labels, options)` and `backward(z, r, labels, grads, saved, options)`; r is None where it is not needed."""

    forward: Callable[[Tensor, Tensor | None, Tensor, RowOptions], RowStats]
    backward: Callable[[Tensor, Tensor | None, Tensor, RowGradients, Tensor, RowOptions], Tensor]
    bytes_per_logit: int  # workspace per (row, vocabulary entry), logits of both models and temporaries together


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
    scalars = risk.scalars(outcomes)
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
    policy_share = sum(g if sign > 0 else -g for g, sign in zip(grads, (-1, 1, 1), strict=True) if g is not None)[
        :, None
    ]
    if r is None:
        dz = z.sub_(z_norm).exp_().mul_(policy_share)
    else:
        assert options.risk is not None, "reference logits in backward serve the risk only"
        r = _centre(_transform(r, options.ref_scale, options.ref_softcap))
        outcomes = _outcomes(z, r, z_norm, r_norm)
        dz = z.sub_(z_norm).exp_().mul_(policy_share)
        if grads.risk is not None:
            dz.addcmul_(options.risk.weights_at(outcomes, scalars), grads.risk[:, None], value=-1)
        if grads.kl is not None:
            dz.addcmul_(outcomes.probs, grads.kl[:, None], value=-1)
    if grads.logp is not None:
        dz.scatter_add_(1, labels.clamp(0, dz.shape[1] - 1)[:, None], grads.logp[:, None])
    if slope is not None:
        dz.mul_(slope)
    return dz if options.scale == 1.0 else dz.mul_(options.scale)


def _transform(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaled and capped logits in fp32 or fp64; in place where the dtype allows it. −inf marks an absent column and stays."""
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


TORCH_ROWS = RowPair(rows_forward, rows_backward, bytes_per_logit=40)
