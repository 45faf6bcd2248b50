"""The definition of every operator, as literally as it is written, and the types they return.

Runs in float64 on float64 inputs, which makes it the oracle of the tests. Holds several fp32 tensors of N·V elements.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from rsa_kernels.risk import RiskMeasure


class TokenStats(NamedTuple):
    """Per position, fp32 (fp64 for fp64 inputs), nats; exactly 0 at ignored labels.

    `risk` and `kl` are None without a risk measure.
    """

    logp: Float[Tensor, "*n"]
    ref_logp: Float[Tensor, "*n"]
    risk: Float[Tensor, "*n"] | None
    kl: Float[Tensor, "*n"] | None
    entropy: Float[Tensor, "*n"] | None = None

    @property
    def logratio(self) -> Float[Tensor, "*n"]:
        """log π(y) − log π_ref(y)."""
        return self.logp - self.ref_logp


class NestedRisk(NamedTuple):
    """Discounted risk from each token to the end of its sequence, and from each sequence's first token."""

    to_go: Float[Tensor, " N"]
    total: Float[Tensor, " S"]


def token_risk(
    policy_logits: Float[Tensor, "*n V"],
    ref_logits: Float[Tensor, "*n V"] | None,
    labels: Int[Tensor, "*n"],
    risk: RiskMeasure | None,
    *,
    scale: float = 1.0,
    ref_scale: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
) -> TokenStats:
    """See `rsa_kernels.token_risk`. Without `ref_logits` (and without `risk`) `ref_logp` is 0."""
    ignored = labels == ignore_index
    z = _prepare(policy_logits, ignored, scale, softcap)
    z_norm = z.logsumexp(-1, keepdim=True)
    logp = pick(z - z_norm, labels, ignored)
    entropies = None
    if entropy:
        log_q = (z - z_norm).detach()
        entropies = -(log_q.exp() * log_q.masked_fill(log_q == -torch.inf, 0.0)).sum(-1).masked_fill(ignored, 0.0)
    if ref_logits is None:
        return TokenStats(logp, torch.zeros_like(logp), None, None, entropies)
    r = _prepare(ref_logits.detach(), ignored, ref_scale, ref_softcap).to(z.dtype)
    r_norm = r.logsumexp(-1, keepdim=True)
    log_p = r - r_norm
    ref_logp = pick(log_p, labels, ignored)
    if risk is None:
        return TokenStats(logp, ref_logp, None, None, entropies)
    x = (r - z) - (r_norm - z_norm)  # in this order equal differences stay equal: the atoms of CVaR survive rounding
    value = risk.value(x, log_p).masked_fill(ignored, 0.0)
    mean = (log_p.exp() * x.masked_fill((log_p.exp() == 0) & ~x.isfinite(), 0.0)).sum(-1).masked_fill(ignored, 0.0)
    return TokenStats(logp, ref_logp, value, mean, entropies)


def linear_token_risk(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "N R"] | None,
    ref_weight: Float[Tensor, "V R"] | None,
    labels: Int[Tensor, " N"],
    risk: RiskMeasure | None,
    *,
    bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " V"] | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> TokenStats:
    """`token_risk` of hidden @ weight.T + bias against ref_hidden @ ref_weight.T + ref_bias."""
    ignored = (labels == ignore_index)[:, None]
    logits = F.linear(hidden.masked_fill(ignored, 0.0), weight, bias)
    ref_logits = None
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_logits = F.linear(ref_hidden, ref_weight, ref_bias)
    return token_risk(logits, ref_logits, labels, risk, ignore_index=ignore_index, **options)


def nested_risk(
    step_risk: Float[Tensor, " N"], cu_seqlens: Int[Tensor, " S+1"], *, discount: float = 1.0
) -> NestedRisk:
    """R_t = step_risk_t + discount · R_{t+1}, from the last token of each sequence to its first."""
    bounds = cu_seqlens.tolist()
    to_go, total = [step_risk.new_zeros(())] * step_risk.numel(), []
    for first, end in pairwise(bounds):
        running = step_risk.new_zeros(())
        for t in reversed(range(first, end)):
            running = to_go[t] = step_risk[t] + discount * running
        total.append(running)
    return NestedRisk(*(torch.stack(parts) if parts else step_risk[:0] for parts in (to_go, total)))


def _prepare(
    logits: Float[Tensor, "*n V"], ignored: Tensor, scale: float, softcap: float | None
) -> Float[Tensor, "*n V"]:
    """Scaled, capped and centred logits in fp32 or fp64; −inf, which marks a column that does not exist, stays −inf."""
    # fp32: a bf16 sum over 128k exponentials drops the small ones
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored[..., None], 0.0) * scale
    if softcap is not None:
        absent = z == -torch.inf
        z = (softcap * torch.tanh(z.masked_fill(absent, 0.0) / softcap)).masked_fill(absent, -torch.inf)
    # Softmax does not depend on the maximum, so it is a constant to autograd. Without it differences lose digits.
    return z - z.detach().amax(-1, keepdim=True)


def pick(log_probs: Float[Tensor, "*n V"], labels: Int[Tensor, "*n"], ignored: Tensor) -> Float[Tensor, "*n"]:
    """The label's entry; 0 where ignored, nan outside the vocabulary (on a GPU an error would cost a sync)."""
    inside = labels.clamp(0, log_probs.shape[-1] - 1)
    picked = log_probs.gather(-1, inside[..., None]).squeeze(-1)
    return picked.masked_fill(inside != labels, torch.nan).masked_fill(ignored, 0.0)
