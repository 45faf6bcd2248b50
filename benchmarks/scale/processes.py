"""Steps per second and memory of teams of processes that train the same pairs, and the bytes that they send.

A step has as many pairs whatever the number of processes (strong scaling), so every team has to come to the same
losses: those of one process without FSDP2. The providers of all teams take turns, step by step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale.cases import Provider, Size
from benchmarks.scale.crew import Crew, Joined, Team
from benchmarks.scale.turns import Times, largest_gap, named, take_turns
from benchmarks.timing import ratio

WARM_UP = 3
MEASURES = 2  # steps that are not timed: memory, traffic
TOLERANCE = {"32-true": 1e-4}  # nats of a step's mean loss: rounding, and what it grows to in a few dozen updates
TOLERANCE_LOW_PRECISION = 5e-2

Record = dict[str, Any]
Key = tuple[Team, Provider]


def steps_needed(samples: int) -> int:
    """Optimizer steps of every provider, and one to spare: the last step has to hand control back, too."""
    return WARM_UP + samples + MEASURES + 1


def run(
    teams: Sequence[Team], size: Size, providers: Sequence[Provider], samples: int, folder: Path, joined: bool = False
) -> tuple[list[str], list[Record]]:
    """(disagreements, records): a record for each team and provider; where any disagree there is none.

    Args:
        folder: holds what `size.write` puts there; all processes see it.
        joined: the processes are there already, this is one, and they are the only team.
    """
    crews = {team: (Joined if joined else Crew)(team, size, providers, folder) for team in teams}
    try:
        return _measure(crews, size, providers, samples)
    finally:
        for crew in crews.values():
            crew.close()


def _measure(
    crews: Mapping[Team, Crew | Joined], size: Size, providers: Sequence[Provider], samples: int
) -> tuple[list[str], list[Record]]:
    losses: dict[Key, list[float]] = {(team, provider): [] for team in crews for provider in providers}

    def stepping(team: Team, provider: Provider) -> Any:
        def step() -> tuple[float, float]:
            answers = crews[team].ask("step", str(provider))
            losses[team, provider].append(sum(loss for _, _, loss in answers) / len(answers))
            return max(wall for wall, _, _ in answers), max(cpu for _, cpu, _ in answers)

        return step

    # nothing is timed before all agree on the first steps
    methods = {str(i): stepping(*key) for i, key in enumerate(losses)}
    take_turns(methods, 0, WARM_UP)
    if bad := disagreements(losses, size.precision):
        return bad, []
    times = dict(zip(losses, take_turns(methods, samples, 0).values(), strict=True))
    if bad := disagreements(losses, size.precision):
        return bad, []
    return [], [_record(crews[team], team, provider, size, times) for team, provider in losses]


def disagreements(losses: Mapping[Key, list[float]], precision: str) -> list[str]:
    """A sentence for each provider of a team whose losses are not those of the first of its method and pairs."""
    tolerance = TOLERANCE.get(precision, TOLERANCE_LOW_PRECISION)
    first: dict[tuple[str, bool], tuple[Key, list[float]]] = {}
    found = []
    for key, mine in losses.items():
        team, provider = key
        # buckets change which pairs meet in a step
        (other, *_), theirs = first.setdefault((provider.method, provider.layout == "bucketed"), (key, mine))
        gap = largest_gap(torch.tensor(mine), torch.tensor(theirs))
        if gap > tolerance:
            whose = first[provider.method, provider.layout == "bucketed"][0][1]
            found.append(
                f"{team}: the losses of {provider} are {gap:.2g} nats from those of {whose} on {other} "
                f"(tolerance {tolerance:g})"
            )
    return found


def _record(crew: Crew | Joined, team: Team, provider: Provider, size: Size, times: Mapping[Key, Times]) -> Record:
    """Relative to one process without FSDP2, where there is one, and to the team's live reference on padded rows."""
    mine = times[team, provider]
    alone = next((found for key, found in times.items() if key[1] == provider and not key[0].sharded), None)
    plain = times.get((team, Provider(provider.method, "live", "padded")), mine)
    memory = crew.ask("memory", str(provider))
    figures = mine.figures(plain)
    if alone is not None:
        figures |= named("x_alone", ratio(alone.wall, mine.wall)) | named("x_alone_cpu", ratio(alone.cpu, mine.cpu))
    sent = crew.ask("traffic", str(provider)) if team.sharded else []
    return {
        "team": str(team),
        "processes": team.processes,
        "sharded": team.sharded,
        "replicas": team.replicas,
        **provider._asdict(),
        "parameters": size.parameters,
        "pairs_per_step": size.pairs,
        "steps_per_s": float(f"{1e3 / figures['ms']:.4g}"),
        **figures,
        "peak_mib": _mib(max(peak for peak, _ in memory)),
        "held_mib": _mib(max(held for _, held in memory)),
        "traffic": _traffic(sent) if team.processes > 1 else None,
    }


def _traffic(sent: Sequence[dict[str, Any]]) -> Record:
    """Of the process that sends most, and what the least is for each kind of collective."""
    most = max(sent, key=lambda found: sum(found["bytes"].values()))
    least = most["least"]
    wanted = {
        "all_gather": least["forward"] + least["backward"] + least["reference"],
        "reduce_scatter": least["gradients"],
        "all_reduce": least["replicas"],
    }
    total = sum(most["bytes"].values()) / sum(wanted.values())
    return {"bytes": most["bytes"], "calls": most["calls"], "least": least, "least_by_kind": wanted} | {
        "times_least": round(total, 4)
    }


def _mib(count: int) -> float:
    return round(count / 2**20, 2)
