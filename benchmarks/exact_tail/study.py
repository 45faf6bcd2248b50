"""Policies of every method on every world, measured exactly; one file per world, so that a study can be continued."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.exact_tail.match import at_reward, at_reward_and_kl, at_value
from benchmarks.exact_tail.methods import BETA, Method
from rsa_lightning.checkpoint import write_json
from rsa_lightning.world import Policy, TokenWorld, cantelli, cvar, exceedance, expectation, kl, var

PROMPTS = 2
MATCHES = ("reward", "value", "reward and KL")


def world_of(seed: int) -> TokenWorld:
    """Vocabulary 6, length 3, two prompts; 4 % of the responses are catastrophes that look helpful."""
    return TokenWorld.random(seed, vocabulary=6, length=3, prompts=PROMPTS, conflict=1.0)


def measure(world: TokenWorld, policy: Policy) -> dict[str, float]:
    """Exact expectations of a policy; costs are those of the world, KL in nats per response."""
    reward, nats = expectation(policy, world.reward), kl(policy, world.reference)
    return {
        "reward": reward,
        "value": reward - BETA * nats,
        "kl": nats,
        "cost": expectation(policy, world.cost),
        "unsafe": exceedance(policy, world.cost, 0.0),
        "var5": var(policy, world.cost, 0.05),
        "cvar5": cvar(policy, world.cost, 0.05),
        "cvar1": cvar(policy, world.cost, 0.01),
        "cantelli5": cantelli(policy, world.cost, 0.05),
    }


def matched(
    world: TokenWorld, point: dict[str, float], figures: Callable[[Policy], dict[str, float]]
) -> dict[str, dict[str, float] | None]:
    """SACPO where it has the same reward, the same value, and the same reward and KL: its multiplier, its figures.

    Args:
        world: where that SACPO is searched.
        point: figures of the policy that it is to equal.
        figures: what is measured of a policy of that world.
    """
    found = {
        "reward": at_reward(world, BETA, point["reward"]),
        "value": at_value(world, BETA, point["value"]),
        "reward and KL": at_reward_and_kl(world, point["reward"], point["kl"]),
    }
    return {how: None if other is None else {"lam": other[0], **figures(other[1])} for how, other in found.items()}


def record(
    world: TokenWorld,
    policy: Policy,
    beta: float,
    strength: float,
    figures: Callable[[Policy], dict[str, float]],
) -> dict[str, Any]:
    """A policy's figures, beside those of the SACPO of `world` that equals it."""
    point = figures(policy)
    return {"beta": beta, "strength": strength, **point, "sacpo": matched(world, point, figures)}


def records(world: TokenWorld, method: Method) -> list[dict[str, Any]]:
    """One record for every strength of a method."""
    path, figures = method.path(world, method.beta), partial(measure, world)
    return [record(world, path(strength), method.beta, strength, figures) for strength in method.strengths]


def run(folder: Path, seeds: Sequence[int], methods: Sequence[Method]) -> None:
    """Fills folder/SEED/METHOD.json with what is missing, method by method: the cheap ones are complete first."""
    for method in methods:
        for seed in seeds:
            path = file_of(folder, seed, method.name)
            if not path.exists() or json.loads(path.read_text())["method"] != fingerprint(method):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"method": fingerprint(method), "points": records(world_of(seed), method)})
        print(f"{method.name}: {len(seeds)} worlds", flush=True)


def file_of(folder: Path, seed: int, name: str) -> Path:
    """Where the records of one method on one world are."""
    return folder / str(seed) / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.json"


def fingerprint(method: Method) -> dict[str, Any]:
    """What of a method decides its records, apart from the code."""
    return {"name": method.name, "strengths": list(method.strengths), "beta": method.beta}
