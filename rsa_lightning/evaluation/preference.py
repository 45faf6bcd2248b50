"""How a model judges preference pairs, relative to the model that alignment started from."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rsa_kernels import RiskMeasure, nested_risk
from torch import Tensor

from rsa_lightning.data.tokenize import ROLES, EncodedPair, PreferenceBatch, collate
from rsa_lightning.evaluation.tail import clustered_bootstrap, mean
from rsa_lightning.models import Policy, ReferenceStates

BATCH_PAIRS = 32


class PairStats(NamedTuple):
    """One value per pair, in nats per response: label log-probabilities, log-ratios to the start model, KL and nested risk.

    `kl` and `risk` are means over the two responses.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    kl: Tensor
    risk: Tensor


@torch.no_grad()
def pair_stats(
    policy: Policy, start: Policy, examples: Sequence[EncodedPair], pad_id: int, risk: RiskMeasure
) -> PairStats:
    """Statistics of every pair under `policy`, with `start` as reference. Both models are put in evaluation mode."""
    policy.eval()
    start.eval()
    parts = [_batch_stats(policy, start, batch, risk) for batch in _batches(policy, examples, pad_id)]
    return PairStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def summarise(stats: PairStats, prompts: Sequence[int], resamples: int, seed: int) -> dict[str, Any]:
    """The figures of results.json with 95 % intervals, resampling prompts.

    logp_accuracy: share of pairs whose chosen response the model itself finds more probable. reward_accuracy: share whose
    chosen response gained more log-probability since the start model (a tie is half). margin: that gain's difference, nats.
    """
    margin = stats.chosen_logratio - stats.rejected_logratio
    columns = {
        "logp_accuracy": _wins(stats.chosen_logp - stats.rejected_logp),
        "reward_accuracy": _wins(margin),
        "margin": margin,
        "chosen_logp": stats.chosen_logp,
        "rejected_logp": stats.rejected_logp,
        "kl": stats.kl,
        "risk": stats.risk,
    }
    clusters = torch.tensor(prompts)
    intervals = {
        name: clustered_bootstrap(column.double(), clusters, mean, resamples=resamples, seed=seed)
        for name, column in columns.items()
    }
    figures = {name: column.double().mean().item() for name, column in columns.items()}
    return {"pairs": len(margin), **figures, "ci95": {name: list(interval) for name, interval in intervals.items()}}


def _wins(difference: Tensor) -> Tensor:
    return (difference > 0).float() + 0.5 * (difference == 0).float()


def _batches(policy: Policy, examples: Sequence[EncodedPair], pad_id: int) -> Iterator[PreferenceBatch]:
    device = policy.head.weight.device
    for first in range(0, len(examples), BATCH_PAIRS):
        batch: Any = collate(examples[first : first + BATCH_PAIRS], roles=ROLES[:2], pad_id=pad_id)
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}  # type: ignore[misc]


def _batch_stats(policy: Policy, start: Policy, batch: PreferenceBatch, risk: RiskMeasure) -> PairStats:
    head = start.head
    reference = ReferenceStates(start.states(batch), head.weight, head.bias, head.scale, head.softcap)
    tokens = policy(batch, reference, risk)
    rows = batch["cu_seqlens"]
    total = {
        name: nested_risk(values.float(), rows).total.cpu()
        for name, values in (
            ("logp", tokens.logp),
            ("ratio", tokens.logratio),
            ("kl", tokens.kl),
            ("risk", tokens.risk),
        )
    }
    sides = {
        name: values.chunk(2) for name, values in total.items()
    }  # chosen rows come first, as many as rejected ones
    return PairStats(*sides["logp"], *sides["ratio"], sum(sides["kl"]) / 2, sum(sides["risk"]) / 2)
