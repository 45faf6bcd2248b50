"""Weighted means over uneven batches and several ranks."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import MeanMetric


class WeightedMeans:
    """Named running means: sum(weight * value) / sum(weight), summed over every batch and rank since the last read.

    A mean of batch means would be wrong as soon as one batch is smaller. Kept outside the module tree, so that it never
    enters a checkpoint.
    """

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}

    @torch.no_grad()
    def update(self, values: dict[str, Float[Tensor, "..."]], weight: float | Tensor = 1.0) -> None:
        """Adds values, one weight each; a name without values (no row of that role) adds nothing."""
        for name, value in values.items():
            if name not in self._means:
                self._means[name] = MeanMetric(nan_strategy="disable").to(value.device)
            if value.numel():
                self._means[name].update(value.float(), weight)

    def read(self) -> dict[str, Tensor]:
        """The means over all ranks, and a fresh start. Every rank must have seen the same names."""
        means = {name: metric.compute() for name, metric in self._means.items()}
        self._means = {}  # not reset(): state made in inference mode cannot be used outside it
        return means
