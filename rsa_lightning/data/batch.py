"""Token ids -> `PreferenceBatch`: rows by role, padded on either side or packed, with the response tokens packed.

What counts as response is known by length and never by comparing ids, so a pad token equal to EOS hides nothing.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

ROLES = ("chosen", "rejected", "mismatched")
PaddingSide = Literal["left", "right"]
TokenIds = Sequence[int] | NDArray[np.integer]  # a memory-mapped cache gives int32 views


class PreferenceBatch(TypedDict):
    """P examples as B rows sorted by role, and the N response tokens to score, packed in row order.

    The rows are L lines of T tokens: a line for each (L = B), or all of them in one line (L = 1).
    """

    input_ids: Int64[Tensor, "L T"]
    attention_mask: Int64[Tensor, "L T"]  # 0 in padding
    left_padded: (
        bool  # whether shorter rows are filled in front: a mask is then needed, and positions do not start at 0
    )
    row_bounds: list[int] | None  # where the rows begin and end in their one line, 0 first and T last; None: padded
    positions: Int64[Tensor, " N"]  # flat index (line * T + t) of the hidden state that predicts each response token
    labels: Int64[Tensor, " N"]  # the response tokens, EOS included; prompts and padding never appear
    cu_seqlens: Int64[Tensor, " B+1"]  # boundaries of the rows within the N packed tokens
    roles: Int64[Tensor, " B"]  # index into ROLES
    pair_ids: Int64[Tensor, " B"]  # index of the example within the batch
    target: Float32[Tensor, " P"] | None  # None when every target is 1
    offset: Float32[Tensor, " P"] | None  # None when every offset is 0
    chosen_costs: Float32[Tensor, " P"] | None  # None when an example has none
    rejected_costs: Float32[Tensor, " P"] | None
    row_ids: list[str]  # one for each example, to name a batch in a message


class EncodedPair(NamedTuple):
    """A record as token ids: the prompt with its BOS, each response with its EOS.

    A rated response has one side only: `chosen` if it is desirable, else `rejected`; the other is empty. Costs are the
    records' harm, higher for worse; None where the data has none.
    """

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    target: float = 1.0
    offset: float = 0.0
    row_id: str = ""
    chosen_cost: float | None = None
    rejected_cost: float | None = None


class Row(NamedTuple):
    """One row of a batch: which example it came from, its prompt and its response."""

    example: int
    prompt: TokenIds
    response: TokenIds


def collate(
    examples: Sequence[EncodedPair],
    roles: Sequence[str] = ("chosen", "rejected"),
    pad_id: int = 0,
    padding_side: PaddingSide | None = "right",
) -> PreferenceBatch:
    """Lay out the rows of all `roles`, and list the response tokens, so the shift by one exists here only.

    A role holds the examples that have a response for it, so rated responses of one kind give rows of that kind
    alone; `roles` and `pair_ids` say which. Rows are padded to one length on `padding_side`, and without one they are
    packed: one line of all rows. A response token is predicted by the state before it, so only `positions` depends on
    the layout; labels, `cu_seqlens` and everything else are the same.

    Raises:
        ValueError: a role is unknown, no example has a response for any role, or "mismatched" is asked of one example.
    """
    arrays = [e._replace(prompt=int64(e.prompt), chosen=int64(e.chosen), rejected=int64(e.rejected)) for e in examples]
    by_role = [role_rows(arrays, role) for role in roles]
    rows = [row for group in by_role for row in group]
    if not rows:
        raise ValueError(f"none of {[e.row_id for e in examples]} has a response for the roles {', '.join(roles)}")
    before, scored = (np.array(sizes) for sizes in zip(*((len(r.prompt), len(r.response)) for r in rows), strict=True))
    lengths = before + scored
    bounds = np.concatenate([[0], lengths.cumsum()])
    lines, width = (1, bounds[-1]) if padding_side is None else (len(rows), lengths.max())
    first = {  # flat index of each row's first token
        None: bounds[:-1],
        "right": np.arange(len(rows)) * width,
        "left": np.arange(len(rows)) * width + width - lengths,
    }[padding_side]
    within = np.arange(bounds[-1]) - bounds[:-1].repeat(lengths)  # of each token, its index in its row
    at = first.repeat(lengths) + within
    input_ids, attention_mask = np.full(lines * width, pad_id), np.zeros(lines * width, dtype=np.int64)
    input_ids[at] = np.concatenate([ids for row in rows for ids in (row.prompt, row.response)])
    attention_mask[at] = 1
    responses = at[within >= before.repeat(lengths)]
    return PreferenceBatch(
        input_ids=torch.from_numpy(input_ids.reshape(lines, width)),
        attention_mask=torch.from_numpy(attention_mask.reshape(lines, width)),
        left_padded=padding_side == "left",
        row_bounds=bounds.tolist() if padding_side is None else None,
        positions=torch.from_numpy(responses - 1),
        labels=torch.from_numpy(input_ids[responses]),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], scored.cumsum()])),
        roles=torch.tensor([ROLES.index(r) for r, group in zip(roles, by_role, strict=True) for _ in group]),
        pair_ids=torch.tensor([row.example for row in rows]),
        target=optional([e.target for e in examples], neutral=1.0),
        offset=optional([e.offset for e in examples], neutral=0.0),
        chosen_costs=complete([e.chosen_cost for e in examples]),
        rejected_costs=complete([e.rejected_cost for e in examples]),
        row_ids=[e.row_id for e in examples],
    )


def role_rows(examples: Sequence[EncodedPair], role: str) -> list[Row]:
    """The rows of one role. Mismatched: each prompt with the response of the example before, cyclically.

    The example before lends its chosen response, or its rejected one for want of it. Raises ValueError.
    """
    if role in ("chosen", "rejected"):
        sides = [getattr(e, role) for e in examples]
        return [Row(i, e.prompt, side) for i, (e, side) in enumerate(zip(examples, sides, strict=True)) if len(side)]
    if role != "mismatched":
        raise ValueError(f"unknown role {role!r}; roles are {', '.join(ROLES)}")
    if len(examples) < 2:
        raise ValueError("mismatched responses need at least 2 pairs in a batch: raise batch_size to 2 or more")
    # cut to the longest row the examples have anyway: a foreign response must not push a row beyond max_length
    width = max(len(e.prompt) + max(len(e.chosen), len(e.rejected)) for e in examples)
    lent = [e.chosen if len(e.chosen) else e.rejected for e in examples]
    return [Row(i, e.prompt, lent[i - 1][: width - len(e.prompt)]) for i, e in enumerate(examples)]


def int64(ids: TokenIds) -> NDArray[np.int64]:
    """The ids as an array of the type that torch indexes with."""
    return np.asarray(ids, dtype=np.int64)


def optional(values: list[float], neutral: float) -> Float32[Tensor, " P"] | None:
    """The values as float32, or None where all are neutral and a loss may leave the term out."""
    return None if all(v == neutral for v in values) else torch.tensor(values, dtype=torch.float32)


def complete(values: list[float | None]) -> Float32[Tensor, " P"] | None:
    """The values as float32, or None where an example has none: a part of a batch cannot be learnt from."""
    return None if any(v is None for v in values) else torch.tensor(values, dtype=torch.float32)
