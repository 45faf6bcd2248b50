"""Pairs labelled by the costs of their responses: what a safety stage with a cost transform learns from."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.data.table import EncodedTable
from rsa_lightning.losses import PreferenceLoss
from rsa_lightning.transforms import CostTransform, label_scale, soft_targets

SHOWN_ROWS = 3  # row ids in a message
KEY = "cost_labels"  # in checkpoints


@dataclass(frozen=True)
class CostLabels:
    """The label of a pair is target_at(s · (h(c_rejected) − h(c_chosen))), and the temperature of the stage s · β/λ.

    Args:
        transform: h.
        base: the loss at β/λ.
        scale: s, in nats per unit of h; None until `fitted` has found one.

    Raises:
        ValueError: the scale is not positive, or the loss takes no labels or bends them.
    """

    transform: CostTransform
    base: PreferenceLoss
    scale: float | None = None

    def __post_init__(self) -> None:
        name = type(self.base).__name__
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"label_scale is a positive number of nats per unit of h, got {self.scale}")
        if not self.base.needs_pairs:
            raise ValueError(
                f"cost_transform labels pairs, and {name} judges single responses: take DPO, IPO, TDPO or RSA"
            )
        if getattr(self.base, "label_smoothing", 0.0) != 0:
            raise ValueError(
                f"cost_transform makes soft labels, and {name}.label_smoothing would bend them: set it to 0"
            )

    def __str__(self) -> str:
        return f"{self.transform}, scale {self.scale:.4g}" if self.scale else str(self.transform)

    @property
    def loss(self) -> PreferenceLoss:
        """The loss at s · β/λ; while s is not known, at β/λ."""
        return self.base if self.scale is None else self.base.with_beta(self.scale * self.base.temperature)

    def fitted(self, data: Any) -> "CostLabels":
        """With the s of the training pairs where none is given; all pairs are checked.

        Args:
            data: a `PreferenceData` that is prepared.

        Raises:
            ValueError: there are pairs without costs or with labels of their own, the costs are not anchored where the
                transform needs it, or no pair differs.
        """
        if data is None:
            raise ValueError("cost_transform reads the costs of PreferenceData: attach one as the data module")
        differences = self.differences(data.train_examples)
        self.differences(data.validation_examples)
        if self.transform.needs_anchor and not data.anchored_costs:
            raise ValueError(
                f"{self.transform} needs costs of which 0 means safe, and those of this data may be known up to a "
                "constant per prompt only: set data.anchored_costs to true if 0 means safe, give chosen_safe and "
                "rejected_safe in every row, or take MeanCost"
            )
        if self.scale is not None:
            return self
        return replace(self, scale=label_scale(differences, largest=self.base.largest_logit))

    def differences(self, table: EncodedTable) -> Float[Tensor, " P"]:
        """h(rejected) − h(chosen) of every pair, from costs as a batch holds them. Raises ValueError."""
        costs = [table.numbers(name) for name in ("chosen_cost", "rejected_cost")]
        missing = np.isnan(costs[0]) | np.isnan(costs[1])
        if missing.any():
            raise ValueError(_without_costs(_shown(table, missing), f"{int(missing.sum())} of {len(table)}"))
        own = (table.numbers("target") != 1) | (table.numbers("offset") != 0)
        if own.any():
            raise ValueError(_with_own_labels(_shown(table, own), f"{int(own.sum())} of {len(table)}"))
        chosen, rejected = (self.transform(torch.from_numpy(values).float()) for values in costs)
        return rejected - chosen

    def targets(self, batch: PreferenceBatch) -> Float[Tensor, " P"]:
        """The labels of a batch. Raises ValueError where it has no costs, or labels of its own."""
        chosen, rejected = batch["chosen_costs"], batch["rejected_costs"]
        if chosen is None or rejected is None:
            raise ValueError(_without_costs(", ".join(batch["row_ids"]), "some"))
        if batch["target"] is not None or batch["offset"] is not None:
            raise ValueError(_with_own_labels(", ".join(batch["row_ids"]), "some"))
        assert self.scale is not None, "the label scale is found in `fitted`, before any batch"
        return soft_targets(self.transform(chosen), self.transform(rejected), self.scale, self.base.target_at)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it: another label scale would be another loss."""
        return {"cost_transform": repr(self.transform), "label_scale": self.scale}


def check_state(now: CostLabels | None, then: dict[str, Any] | None) -> None:
    """Raises ValueError where a checkpoint was trained on other labels than these."""
    mine = None if now is None else now.state()
    if then != mine:
        raise ValueError(
            f"the checkpoint was trained on {_worded(then)}, this stage on {_worded(mine)}: restore cost_transform, "
            "and the data or its label_scale"
        )


def _worded(state: dict[str, Any] | None) -> str:
    if state is None:
        return "the order of the pairs"
    return f"labels of {state['cost_transform']} with label_scale {state['label_scale']}"


def _shown(table: EncodedTable, where: NDArray[np.bool_]) -> str:
    found = np.flatnonzero(where)
    ids = ", ".join(table[int(i)].row_id for i in found[:SHOWN_ROWS])
    return ids + (", ..." if len(found) > SHOWN_ROWS else "")


def _without_costs(rows: str, count: str) -> str:
    return (
        f"cost_transform needs the costs of both responses, and {count} pairs lack one ({rows}): give columns "
        "chosen_cost and rejected_cost (format trl), severity levels (format pku), or remove cost_transform"
    )


def _with_own_labels(rows: str, count: str) -> str:
    return (
        f"cost_transform makes the labels, and {count} pairs have a target or an offset of their own ({rows}): remove "
        "these columns (or relabel), or cost_transform"
    )
