"""What a row pair is: the arithmetic of logits, row by row, behind one face in torch (`rows.py`) and Triton (`fused`).

`forward` turns logits into per-row numbers, `backward` turns logits and upstream gradients into the gradient of the
policy logits. With π = softmax z (policy), p = softmax r (reference) and w = risk.weights(log p − log π, log p):

    dz_u = g_logp · (1[u = y] − π_u) + g_risk · (π_u − w_u) + g_kl · (π_u − p_u)
"""

from ast import literal_eval
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rsa_kernels.risk import RiskMeasure, decode, encode


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

    def rows(self, chunk: slice) -> "RowGradients":
        """Those of some rows."""
        return RowGradients(*(None if grad is None else grad[chunk] for grad in self))

    def all_zero(self) -> Bool[Tensor, " C"]:
        """Rows that no gradient reaches; nan is one."""
        given = [grad == 0 for grad in self if grad is not None]
        assert given, "backward is about at least one output"
        return torch.stack(given).all(0)


class Price(NamedTuple):
    """Bytes that the functions of a pair hold beside what is passed in and out: min(rows · per_row, most)."""

    per_row: int
    most: int


class RowPair(NamedTuple):
    """`forward(z, r, labels, options)` and `backward(z, r, labels, grads, saved, options, out)`.

    Logits are [C, V] with unit stride along the vocabulary, r is None where it is not needed; both functions leave them
    as they are, but `out`, in the dtype of z, may be z itself. A row whose gradients are all 0 gets exact zeros,
    whatever is in its logits. `saved_count(risk)` numbers per row travel from forward to backward;
    `price(V, dtype, device)` is what either function takes.
    """

    forward: Callable[[Tensor, Tensor | None, Tensor, RowOptions], RowStats]
    backward: Callable[[Tensor, Tensor | None, Tensor, RowGradients, Tensor, RowOptions, Tensor], None]
    saved_count: Callable[[RiskMeasure | None], int]
    price: Callable[[int, torch.dtype, torch.device], Price]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: what sums are kept in."""
    return torch.promote_types(dtype, torch.float32)
