"""The published estimator of Ra-DPO's risk ratio, for comparison with `CVaR` only."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from jaxtyping import Float
from rsa_kernels.risk import Outcomes, RiskMeasure, number
from torch import Tensor


@final
@dataclass(frozen=True)
class LegacyCVaR(RiskMeasure):
    """What the released code of Ra-DPO (arXiv:2505.20359) computes in the place of CVaR. For comparison only.

    **Not a coherent risk measure.** With H over `parts` consecutive blocks of the vocabulary (by token id) and v_H the
    quantile of {x_z : z in H} at 1 − tail, counted over entries and interpolated between them,

        value = Σ_H Σ_{z in H} m_z x_z,        m_z = p_z 1[x_z > v_H],        S = Σ m_z

    Entries weigh the same in the quantile, whatever their probability; nothing is divided by the tail mass, so that
    value(x + c) = value(x) + S c; ties with v_H are dropped, at policy = reference every entry; and with two parts the
    value depends on the order of token ids. Near tail 1 it lies on either side of `CVaR(tail)`, at 0.5 at about half.

    **The gradient.** v_H is held constant, as published, so d value = Σ m_z dx_z. Here x_z = log p_z − log q_z of a
    policy q, whose entries sum to one: Σ q_z dx_z = −Σ dq_z = 0. Any multiple of q may thus be added to m without a
    change along the directions in which x can move, and of these subgradients

        weights = m + (1 − S) q,        q = p exp(−x)

    is the one that sums to one, as the operators assume: with it the gradient of the logits, q − weights, is S q − m.

    Args:
        tail: 1 − tail is the level of the quantile, in (0, 1]; the code's `confidence_level`.
        parts: blocks of the vocabulary, at least 1; 2 as published (`is_split_risk_ratio`), 1 without the split.
    """

    tail: float = 0.95
    parts: int = 2

    def __post_init__(self) -> None:
        tail, parts = number("LegacyCVaR tail", self.tail), number("LegacyCVaR parts", self.parts)
        if not 0 < tail <= 1:
            raise ValueError(f"LegacyCVaR tail lies in (0, 1], got {self.tail}")
        if parts < 1 or parts != int(parts):
            raise ValueError(f"LegacyCVaR parts is a whole number of blocks, at least 1, got {self.parts}")
        object.__setattr__(self, "tail", tail)
        object.__setattr__(self, "parts", int(parts))  # the operators carry it as a float

    def weights(self, x: Float[Tensor, "*n V"], log_probs: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        outcomes = Outcomes.of(x.detach(), log_probs.detach())
        masked = self.masked(outcomes)
        policy = (outcomes.log_probs - outcomes.x).exp()
        return masked + (1 - masked.sum(-1, keepdim=True)) * policy

    def value(self, x: Float[Tensor, "*n V"], log_probs: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
        return _Value.apply(x, log_probs.detach(), self)

    def masked(self, o: Outcomes) -> Float[Tensor, "*n V"]:
        """m: p where x is above the quantile of its block, else 0."""
        size = o.x.shape[-1]
        if size < self.parts:
            raise ValueError(f"LegacyCVaR cuts {size} tokens into {self.parts} parts: lower parts")
        above = []
        for low, high in pairwise(i * size // self.parts for i in range(self.parts + 1)):
            block = o.x[..., low:high]
            above.append(block > block.quantile(1 - self.tail, dim=-1, keepdim=True))
        return o.probs.masked_fill(~torch.cat(above, dim=-1), 0.0)


class _Value(torch.autograd.Function):
    """Σ m x with the gradient `weights`; autograd's own would be m, which does not sum to one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_probs: Tensor, risk: LegacyCVaR) -> Tensor:
        ctx.risk = risk
        ctx.save_for_backward(x, log_probs)
        outcomes = Outcomes.of(x, log_probs)
        masked = risk.masked(outcomes)
        return (masked * outcomes.x.masked_fill(masked == 0, 0.0)).sum(-1)  # 0 where x is infinite and dropped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[..., None] * ctx.risk.weights(*ctx.saved_tensors), None, None
