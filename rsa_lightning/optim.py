"""Learning-rate schedules over the steps the Trainer will take."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


@dataclass(frozen=True)
class Schedule:
    """Warm-up over a share of all optimizer steps, then the named decay (transformers' schedules).

    Args:
        kind: shape after the warm-up.
        warmup: share of the steps in [0, 1) over which the rate rises linearly from zero.
    """

    kind: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup: float = 0.03

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"schedule.warmup is a share of the steps in [0, 1), got {self.warmup}")

    def build(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        return get_scheduler(self.kind, optimizer, round(self.warmup * total_steps), total_steps)
