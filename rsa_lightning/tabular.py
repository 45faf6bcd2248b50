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


class _Coordinates:
    """Moves of all logits from a start, in units where the curvatures of a loss are of one size.

    Logits after prefixes that are rarely reached have small gradients and small curvatures, both like the probability m
    of prefix and token; logits · √m have not.
    """

    def __init__(self, objective: Objective, start: Policy) -> None:
        self.objective, self.policy = objective, TabularPolicy(start)
        self.start = torch.cat([level.flatten() for level in start])
        self.scale = torch.cat([(0.5 * level).exp().flatten() for level in prefix_logps(start)])
        self.sizes = [level.numel() for level in start]

    def place(self, moves: Tensor) -> Policy:
        """The policy at these moves."""
        parts = (self.start + moves / self.scale).split(self.sizes)
        with torch.no_grad():
            for logits, part in zip(self.policy.logits, parts, strict=True):
                logits.copy_(part.view(logits.shape))
        return tuple(level.detach() for level in self.policy())

    def gradient(self, moves: Tensor) -> Tensor:
        self.place(moves)
        found = torch.autograd.grad(self.objective(self.policy), list(self.policy.parameters()))
        return torch.cat([part.flatten() for part in found]) / self.scale


def train(objective: Objective, start: Policy, beta: float, steps: int = 1000, tolerance: float = 1e-9) -> Policy:
    """The policy near `start` where the gradient of a loss at temperature beta is zero: accelerated gradient descent.

    Anderson's acceleration looks at gradients only, never at the value of the loss: with a detached risk (v2) or a
    detached baseline (KTO) the gradient is not that of the value, and a line search would stop anywhere.

    Args:
        beta: temperature of the loss, whose curvatures are about beta² / 4.
        tolerance: stop where no element of the gradient, in scaled coordinates, is larger.

    Raises:
        RuntimeError: the gradient is still larger after that many steps. Where a risk measure has kinks there may be no
            point with a zero gradient: see `settle`.
    """
    rate, memory = 2.5 / beta**2, 20
    where = _Coordinates(objective, start)
    moves = torch.zeros_like(where.start)
    visited: list[Tensor] = []
    slopes: list[Tensor] = []
    for _ in range(steps):
        slope = where.gradient(moves)
        if not slope.isfinite().all():
            raise RuntimeError("descent diverged: raise beta, which shortens its steps, or take settle")
        if slope.abs().max() < tolerance:
            return where.place(moves)
        visited, slopes = [*visited[-memory:], moves], [*slopes[-memory:], slope]
        moves = moves - rate * slope
        if len(slopes) > 1:
            changes, turns = torch.stack(visited, 1).diff(dim=1), torch.stack(slopes, 1).diff(dim=1)
            share = torch.linalg.lstsq(turns, slope[:, None]).solution
            moves = moves - ((changes - rate * turns) @ share)[:, 0]
    raise RuntimeError(
        f"no zero gradient was found in {steps} steps (left: {slope.abs().max():.1e}): raise steps or tolerance"
    )


def settle(objective: Objective, start: Policy, steps: int = 200) -> Policy:
    """Where Adam ends up with a rate that shrinks to zero, from `start`.

    For losses whose gradient jumps, as that of a detached nested CVaR does where outcomes tie: there is no zero to
    find, and descent slides along the kink. Coarser than `train`: figures good to about three digits.
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
