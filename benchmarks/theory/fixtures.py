"""Worlds small enough to be worked by hand, and the random ones that the figures show."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsa_lightning.world import Policy, TokenWorld

BETA = 0.5  # of the random worlds


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bandit(probs: Sequence[float], reward: Sequence[float], cost: Sequence[float]) -> TokenWorld:
    """One prompt, responses of one token."""
    return TokenWorld((tensor(*probs).log()[None, None],), tensor(*reward)[None], tensor(*cost)[None, None])


def coin() -> TokenWorld:
    """Two responses that are equally likely and equally good; the second one costs 1."""
    return bandit((0.5, 0.5), (0.0, 0.0), (0.0, 1.0))


def three_answers() -> TokenWorld:
    """A dull answer, a good one, and one that is better and harmful."""
    return bandit((0.5, 0.3, 0.2), (0.0, 1.0, 2.0), (0.0, 0.0, 1.0))


def four_answers() -> TokenWorld:
    """The exact law of the dual's fixture."""
    return bandit(tensor(0.1, 0.2, 0.3, 0.4).softmax(0).tolist(), (1.0, 2.0, 0.0, 0.5), (0.3, 1.2, -0.4, 0.9))


def two_token_tree() -> TokenWorld:
    """Two tokens of a vocabulary of four: p(a) ∝ exp(sin(1 + a)), p(b|a) ∝ exp(cos(a + 2b)), R and C of sines."""
    a, b = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)[None]
    reference = ((1 + a).sin().view(1, 1, 4).log_softmax(-1), (a + 2 * b).cos()[None].log_softmax(-1))
    cost = (2 * a - b).cos() + (a == b)
    return TokenWorld(reference, (3 * a + b * b).sin().view(1, 16), cost.view(1, 1, 16))


def returns_tree(first: Sequence[float], second: Sequence[float]) -> tuple[Policy, Tensor]:
    """A fair first token, then returns (first or second) with probabilities 0.9 and 0.1: reference and returns."""
    reference = (tensor(0.5, 0.5).log()[None, None], tensor(0.9, 0.1).log().expand(1, 2, 2))
    return reference, tensor(*first, *second)[None]


TREE_A = returns_tree((0.4, 0.3), (0.7, 0.6))
TREE_B = returns_tree((0.4, 0.6), (0.7, 0.3))  # the same law of returns as tree A


def shortcuts(constraints: int = 1) -> TokenWorld:
    """Three prompts, 216 responses to each; rare catastrophes look helpful."""
    return TokenWorld.random(1, vocabulary=6, length=3, prompts=3, constraints=constraints)


def two_ways_out() -> TokenWorld:
    """Two ways to have a small tail: rarely say what is very harmful, or say nothing that is harmful at all."""
    return bandit((0.45, 0.45, 0.1), (0.0, 1.0, 1.0), (0.0, 1.0, 5.0))
