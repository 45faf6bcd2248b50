"""What a preference stage measures, and weighted means of it over uneven batches and several ranks."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from rsa_kernels import TokenStats
from torch import Tensor
from torchmetrics import SumMetric

from rsa_lightning.data.batch import ROLES, PreferenceBatch
from rsa_lightning.losses import PreferenceTerms, SequenceStats


class _Sums(NamedTuple):
    """Not a MeanMetric: torchmetrics 1.9 either drops NaN or (nan_strategy="disable") ignores the weights."""

    values: SumMetric
    weights: SumMetric

    @classmethod
    def on(cls, device: torch.device) -> "_Sums":
        return cls(*(SumMetric(nan_strategy="disable").to(device) for _ in range(2)))


class WeightedMeans:
    """Named running means: sum(weight * value) / sum(weight), summed over every batch and rank since the last read.

    A mean of batch means would be wrong as soon as one batch is smaller. Kept outside the module tree, so that it never
    enters a checkpoint.
    """

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    @torch.no_grad()
    def update(self, values: dict[str, Float[Tensor, "..."]], weight: float = 1.0) -> None:
        """Adds values of one weight each; a name without values (no row of that role) adds nothing."""
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = _Sums.on(value.device)
            sums = self._sums[name]
            sums.values.update(weight * value.float().sum())
            sums.weights.update(weight * value.numel())

    def read(self) -> dict[str, Tensor]:
        """The means over all ranks, and a fresh start. A name without a value on any rank has no mean, and is left out.

        Every rank must have seen the same names.
        """
        sums = {name: (parts.values.compute(), parts.weights.compute()) for name, parts in self._sums.items()}
        self._sums = {}  # not reset(): state made in inference mode cannot be used outside it
        return {name: value / weight for name, (value, weight) in sums.items() if weight > 0}


def preference_metrics(
    batch: PreferenceBatch,
    tokens: TokenStats,
    chosen: SequenceStats,
    rejected: SequenceStats,
    terms: PreferenceTerms,
    target: Float[Tensor, " P"] | None = None,
) -> dict[str, Tensor]:
    """TRL's names. rewards: beta-scaled nats; logps, kl, risk: nats per response.

    Accuracies are about the chosen response, or, with a `target`, about the one that it prefers; ½ prefers none.
    """
    values = {
        "loss": terms.losses,
        "rewards/chosen": terms.chosen_rewards,
        "rewards/rejected": terms.rejected_rewards,
        **_by_side("logps", per_row(tokens.logp, batch), batch),
    }
    # of the pairs only: a batch of single responses has none, whatever their numbers
    ids = [batch["pair_ids"][batch["roles"] == role] for role in range(2)]
    margins = terms.chosen_rewards[torch.isin(*ids)] - terms.rejected_rewards[torch.isin(*reversed(ids))]
    values["rewards/margins"] = margins  # TRL's name; right where chosen is the preferred response
    ahead = margins if target is None else (margins * (target - 0.5).sign())[target != 0.5]
    values["rewards/accuracies"] = (ahead > 0).float() + 0.5 * (ahead == 0).float()  # a tie is half right
    if tokens.kl is not None and chosen.risk is not None and rejected.risk is not None:
        values |= _by_side("kl", per_row(tokens.kl, batch), batch)
        values |= {"risk/chosen": chosen.risk, "risk/rejected": rejected.risk}
    return values


def per_row(token_values: Float[Tensor, " N"], batch: PreferenceBatch) -> Float[Tensor, " B"]:
    """Sums over the response tokens of every row."""
    return torch.segment_reduce(token_values, "sum", offsets=batch["cu_seqlens"], initial=0)


def _by_side(name: str, row_values: Float[Tensor, " B"], batch: PreferenceBatch) -> dict[str, Tensor]:
    return {f"{name}/{role}": row_values[batch["roles"] == code] for code, role in enumerate(ROLES[:2])}
