"""How a model judges preference pairs, relative to the model that alignment started from."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rsa_kernels import RiskMeasure, TokenStats, nested_risk, token_risk
from torch import Tensor

from rsa_lightning.data.tokenize import ROLES, EncodedPair, PreferenceBatch, collate
from rsa_lightning.decoding import check_widths, mixed_logits
from rsa_lightning.evaluation.folders import Folders, members_of
from rsa_lightning.evaluation.tail import clustered_bootstrap, mean
from rsa_lightning.models import Policy, PolicySpec, ReferenceStates, RiskHead, load_policy

BATCH_PAIRS = 32
LOGITS_BYTES = 256 * 2**20  # float32 logits of a mixture held at once


class PairStats(NamedTuple):
    """One value per pair, in nats per response: log-probabilities, log-ratios to the start model, KL and nested risk.

    `kl` and `risk` are means over the two responses.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    kl: Tensor
    risk: Tensor


class Split(NamedTuple):
    """Pairs to judge: their prompts (the clusters of the bootstrap) and their tokens."""

    prompts: Sequence[Hashable]
    examples: Sequence[EncodedPair]


class MixedPolicy:
    """Several policies judged as one: at every token the mixture of their distributions, see decoding.py.

    Its logits are no linear function of one hidden state, so some tokens' logits of every member are held at a time.
    """

    def __init__(self, members: Sequence[Policy], weights: Sequence[float]) -> None:
        check_widths([member.head.out_features for member in members], [f"member {i}" for i in range(len(members))])
        self.members, self.weights = list(members), list(weights)

    @property
    def head(self) -> RiskHead:
        return self.members[0].head

    def eval(self) -> None:
        for member in self.members:
            member.eval()

    def __call__(self, batch: PreferenceBatch, reference: ReferenceStates, risk: RiskMeasure) -> TokenStats:
        """Token statistics as a `Policy` gives them, without gradients."""
        assert reference.weight is not None
        assert reference.hidden is not None
        states = [(member.states(batch), member.head) for member in self.members]
        rows = max(1, LOGITS_BYTES // (4 * self.head.out_features * (len(states) + 2)))
        parts: list[TokenStats] = []
        for first in range(0, len(batch["labels"]), rows):
            some = slice(first, first + rows)
            logits = mixed_logits([_logits(hidden[some], own) for hidden, own in states], self.weights)
            ref_logits = _logits(reference.hidden[some], reference).to(logits.dtype)
            parts.append(token_risk(logits, ref_logits, batch["labels"][some], risk))
        columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        return TokenStats(*columns)


def judge(
    model: Folders,
    start: str | Path,
    criteria: Mapping[str, Mapping[str, Split]],
    *,
    pad_id: int,
    risk: RiskMeasure,
    resamples: int,
    seed: int,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """criterion -> split -> the figures of `summarise`, for a model, or a mixture, relative to the start model."""
    members = members_of(model)
    loaded = [load_policy(PolicySpec(model=str(folder))).to(device) for folder in members]
    policy = loaded[0] if len(loaded) == 1 else MixedPolicy(loaded, list(members.values()))
    reference = load_policy(PolicySpec(model=str(start))).to(device)
    return {
        criterion: {
            name: summarise(pair_stats(policy, reference, split.examples, pad_id, risk), split.prompts, resamples, seed)
            for name, split in splits.items()
            if split.examples
        }
        for criterion, splits in criteria.items()
    }


@torch.no_grad()
def pair_stats(
    policy: Policy | MixedPolicy, start: Policy, examples: Sequence[EncodedPair], pad_id: int, risk: RiskMeasure
) -> PairStats:
    """Statistics of every pair under `policy`, with `start` as reference. Both models are put in evaluation mode."""
    policy.eval()
    start.eval()
    parts = [_batch_stats(policy, start, batch, risk) for batch in _batches(policy, examples, pad_id)]
    return PairStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def response_logps(
    policy: Policy, examples: Sequence[EncodedPair], pad_id: int
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """log q(y | x) in nats of the chosen and of the rejected responses: float64 sums over their tokens."""
    policy.eval()
    sides: list[tuple[Tensor, ...]] = []
    for batch in _batches(policy, examples, pad_id):
        logp = policy(batch, None, None).logp.double()
        sides.append(torch.segment_reduce(logp, "sum", offsets=batch["cu_seqlens"], initial=0).cpu().chunk(2))
    chosen, rejected = (torch.cat(side) for side in zip(*sides, strict=True))
    return chosen, rejected


def summarise(stats: PairStats, prompts: Sequence[Hashable], resamples: int, seed: int) -> dict[str, Any]:
    """The figures of results.json with 95 % intervals that resample prompts (null where there is only one prompt).

    logp_accuracy: share of pairs whose chosen response the model itself finds more probable. reward_accuracy: share
    whose chosen response gained more log-probability since the start model (a tie is half). margin: the difference of
    these gains, in nats.
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
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    clusters = torch.tensor([numbers[prompt] for prompt in prompts])
    intervals: dict[str, list[float] | None] = {
        name: [round(end, 12) for end in clustered_bootstrap(column.double(), clusters, mean, resamples, seed)]
        if len(numbers) > 1
        else None
        for name, column in columns.items()
    }
    figures = {name: column.double().mean().item() for name, column in columns.items()}
    return {"pairs": len(margin), **figures, "ci95": intervals}


def _wins(difference: Tensor) -> Tensor:
    return (difference > 0).float() + 0.5 * (difference == 0).float()


def _batches(policy: Policy | MixedPolicy, examples: Sequence[EncodedPair], pad_id: int) -> Iterator[PreferenceBatch]:
    device = policy.head.weight.device
    for first in range(0, len(examples), BATCH_PAIRS):
        batch: Any = collate(examples[first : first + BATCH_PAIRS], roles=ROLES[:2], pad_id=pad_id)
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}  # type: ignore[misc]


def _batch_stats(policy: Policy | MixedPolicy, start: Policy, batch: PreferenceBatch, risk: RiskMeasure) -> PairStats:
    head = start.head
    reference = ReferenceStates(start.states(batch), head.weight, head.bias, head.scale, head.softcap)
    tokens: Any = policy(batch, reference, risk)

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of the chosen rows, which come first, and of as many rejected rows."""
        chosen, rejected = nested_risk(values, batch["cu_seqlens"]).total.cpu().chunk(2)
        return chosen, rejected

    kl, total_risk = sides(tokens.kl), sides(tokens.risk)
    return PairStats(
        *sides(tokens.logp), *sides(tokens.logratio), (kl[0] + kl[1]) / 2, (total_risk[0] + total_risk[1]) / 2
    )


def _logits(hidden: Float[Tensor, "N H"], head: RiskHead | ReferenceStates) -> Float[Tensor, "N V"]:
    """What a head makes of hidden states: linear, then a scale and a soft-cap where the model has them."""
    assert head.weight is not None
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
