"""A policy that is one logit per next token of a `TokenWorld`, trained by the library's own losses.

Its objective is the loss over the whole population of preferences, so its gradient is exact: what is left between a
trained policy and a closed form is the method, not sampling.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from rsa_kernels import RiskMeasure, token_risk
from torch import Tensor, nn

from rsa_lightning.losses import PreferenceLoss, SequenceStats
from rsa_lightning.world import Policy, path_sums, prefix_logps, sequence_logps

Objective = Callable[["TabularPolicy"], Tensor]


class TabularPolicy(nn.Module):
    """Free logits after every prefix, in float64; starts as the given policy."""

    def __init__(self, start: Policy) -> None:
        super().__init__()
        self.logits = nn.ParameterList(level.detach().clone().double() for level in start)

    def forward(self) -> Policy:
        return tuple(level.log_softmax(-1) for level in self.logits)


class Population(NamedTuple):
    """All comparisons that preference data can hold: entry (x, i, j) chooses response i over response j to prompt x.

    Fields:
        weights: probability of drawing it; sums to one. A response is not compared with itself.
        target: probability that i is preferred, where it is given as a target instead of by the order.
        offset: nats taken off the logit.
    """

    weights: Float[Tensor, "X S S"]
    target: Float[Tensor, "X S S"] | None = None
    offset: Float[Tensor, "X S S"] | None = None


def bradley_terry(behaviour: Policy, scores: Float[Tensor, "X S"]) -> Population:
    """Two different responses of `behaviour` to one prompt, of which i is chosen over j with probability σ(s_i − s_j).

    Both orders of a pair are there, each with its probability: no label noise is left to average.
    """
    drawn = _drawn(behaviour) * torch.sigmoid(differences(scores))
    return Population(drawn / drawn.sum())


def soft_labels(behaviour: Policy, scores: Float[Tensor, "X S"]) -> Population:
    """The same pairs in both orders alike, with the target σ(s_i − s_j) instead of a drawn order."""
    drawn = _drawn(behaviour)
    return Population(drawn / drawn.sum(), target=torch.sigmoid(differences(scores)))


def differences(scores: Float[Tensor, "X S"]) -> Float[Tensor, "X S S"]:
    """s_i − s_j of all pairs of responses to one prompt."""
    return scores[:, :, None] - scores[:, None, :]


def win_rates(behaviour: Policy, scores: Float[Tensor, "X S"]) -> Float[Tensor, "X S"]:
    """P(y is preferred to a response of `behaviour`): what IPO makes the return, π ∝ p exp(win rate / β)."""
    return torch.einsum("xj,xij->xi", sequence_logps(behaviour).exp(), torch.sigmoid(differences(scores)))


def _drawn(behaviour: Policy) -> Float[Tensor, "X S S"]:
    law = sequence_logps(behaviour).exp()
    return law[:, :, None] * law[:, None, :] * (1 - torch.eye(law.shape[-1], dtype=law.dtype))


def sequence_stats(
    policy: Policy, reference: Policy, risk: RiskMeasure | None = None, behaviour: Policy | None = None
) -> SequenceStats:
    """What the losses see, of every response to every prompt: [X · S].

    `risk` is taken by `rsa_kernels.token_risk` after every prefix and summed along the response. With `behaviour` the
    baseline of KTO is there too: the mean log-ratio of its responses to the prompt before, cyclically.
    """
    logratio = sequence_logps(policy) - sequence_logps(reference)
    total, baseline = None, None
    if risk is not None:
        steps = [_risk_after_prefixes(mine, theirs, risk) for mine, theirs in zip(policy, reference, strict=True)]
        total = path_sums(steps, policy[0].shape[-1]).flatten()
    if behaviour is not None:
        foreign = sequence_logps(behaviour).exp().roll(1, 0)
        baseline = (foreign * logratio.detach()).sum(-1).mean()
    return SequenceStats(logratio.flatten(), total, baseline)


def _risk_after_prefixes(mine: Tensor, theirs: Tensor, risk: RiskMeasure) -> Float[Tensor, "X n"]:
    labels = torch.zeros(mine.shape[:-1], dtype=torch.long)  # their log-probabilities are not used
    found = token_risk(mine, theirs, labels, risk, impl="naive").risk
    assert found is not None
    return found


def pair_objective(
    loss: PreferenceLoss, reference: Policy, population: Population, risk: RiskMeasure | None = None
) -> Objective:
    """The mean of a pairwise loss over the population."""

    weights = population.weights.flatten()
    target, offset = (None if part is None else part.flatten() for part in population[1:])
    prompts, count, _ = population.weights.shape

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        by_prompt = values.view(prompts, count)
        i, j = by_prompt[:, :, None], by_prompt[:, None, :]
        return i.expand(-1, -1, count).flatten(), j.expand(-1, count, -1).flatten()

    def objective(policy: TabularPolicy) -> Tensor:
        stats = sequence_stats(policy(), reference, risk if loss.reads_risk else None)
        risks = (None, None) if stats.risk is None else sides(stats.risk)
        chosen, rejected = (SequenceStats(*both) for both in zip(sides(stats.logratio), risks, strict=True))
        return weights @ loss(chosen, rejected, target=target, offset=offset).losses

    return objective


def rated_objective(
    loss: PreferenceLoss, reference: Policy, behaviour: Policy, desirable: Float[Tensor, "X S"]
) -> Objective:
    """The mean of KTO's loss where a response of `behaviour` is called desirable with the given probability."""
    mass = sequence_logps(behaviour).exp().flatten()
    liked = desirable.flatten()
    weights = torch.cat([mass * liked, mass * (1 - liked)]) / len(sequence_logps(behaviour))

    def objective(policy: TabularPolicy) -> Tensor:
        stats = sequence_stats(policy(), reference, behaviour=behaviour)
        return weights @ loss(stats, stats).losses

    return objective


def gradient(objective: Objective, at: Policy) -> float:
    """The largest element of the objective's gradient in the logits of a policy."""
    policy = TabularPolicy(at)
    found = torch.autograd.grad(objective(policy), list(policy.parameters()))
    return max(float(part.abs().max()) for part in found)


def train(objective: Objective, start: Policy, steps: int = 2000, tolerance: float = 1e-9) -> Policy:
    """The policy that L-BFGS ends at, from `start`, of a loss whose gradient is that of its value; for others `settle`.

    Logits after prefixes that are rarely reached have small gradients and small curvatures, both like the probability m
    of the prefix and the token; L-BFGS therefore moves logits · √m, where all curvatures are of one size.

    Args:
        tolerance: stop where no element of the gradient in these is larger.

    Raises:
        RuntimeError: the gradient is still above 100 times `tolerance` when it stops.
    """
    policy = TabularPolicy(start)
    scales = [(0.5 * level).exp() for level in prefix_logps(start)]
    moves = [torch.zeros_like(scale, requires_grad=True) for scale in scales]
    options = {"tolerance_grad": tolerance, "tolerance_change": 0.0, "history_size": 50}
    optimizer = torch.optim.LBFGS(moves, max_iter=steps, line_search_fn="strong_wolfe", **options)  # type: ignore[arg-type]

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            for logits, level, move, scale in zip(policy.logits, start, moves, scales, strict=True):
                logits.copy_(level + move / scale)
        value = objective(policy)
        found = torch.autograd.grad(value, list(policy.parameters()))
        for move, part, scale in zip(moves, found, scales, strict=True):
            move.grad = part / scale
        return value

    optimizer.step(closure)
    closure()
    left = max(float(move.grad.abs().max()) for move in moves if move.grad is not None)
    if left > 100 * tolerance:
        raise RuntimeError(f"L-BFGS stopped at a gradient of {left:.1e}: raise steps or tolerance, or start nearer")
    return tuple(level.detach() for level in policy())


def settle(objective: Objective, start: Policy, steps: int = 200) -> Policy:
    """Where Adam ends up with a rate that shrinks to zero, from `start`.

    For what a line search cannot do: with a detached risk (v2) or baseline (KTO) the gradient is not that of the value,
    and that of a nested CVaR jumps where outcomes tie, so that descent slides along the kink. Coarser than `train`:
    figures good to about three digits.
    """
    policy = TabularPolicy(start)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.15, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(policy).backward()
        optimizer.step()
        schedule.step()
    return tuple(level.detach() for level in policy())
