"""`python -m benchmarks exact_tail`: runs what is missing, then writes the results, the tables and the figures."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.exact_tail.analyse import AT, by_interpolation, figures_of, spread, summary, table
from benchmarks.exact_tail.figures import differences, frontier, limited_control
from benchmarks.exact_tail.methods import BETA, Method, family
from benchmarks.exact_tail.regimes import CONTROLLED, REGIMES, seeds_of
from benchmarks.exact_tail.study import MATCHES, file_of, run
from rsa_lightning.checkpoint import write_json, write_text

REWARD_SHARES = (0.25, 0.5, 0.75)  # of the way between the two ends of the plain path
FIGURE_LAM, LIMITED_LAM = 1.0, 3.0


def study(work: Path, output: Path, worlds: int, quick: bool) -> list[Path]:
    """Everything, from what is in `work` already; returns the files written: JSON, tables, figures.

    Args:
        quick: two worlds, and neither what has to be trained nor the regimes.
    """
    chosen = [method for method in family().values() if not (quick and method.trained)]
    seeds = range(2 if quick else worlds)
    run(work, seeds, chosen)
    records = {method.name: {seed: _points(work, seed, method) for seed in seeds} for method in chosen}
    found: dict[str, Any] = {
        "op": "exact_tail",
        "command": "python -m benchmarks exact_tail",
        "versions": {name: version(name) for name in ("torch", "rsa_lightning")}
        | {"python": platform.python_version()},
        "worlds": len(seeds),
        "beta": BETA,
        "at": list(AT),
        "groups": {method.name: method.group for method in chosen},
        "methods": figures_of(records),
        "paths": {
            name: [{key: value for key, value in point.items() if key != "sacpo"} for point in by_world[0]]
            for name, by_world in records.items()
        },
    }
    if not quick:
        found["regimes"] = _regimes(work, seeds)
    found = _rounded(found)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "exact_tail.json", found)
    write_text(output / "exact_tail.md", report(found))
    return [output / "exact_tail.json", output / "exact_tail.md", *_draw(found, output)]


def _draw(found: dict[str, Any], output: Path) -> list[Path]:
    frontier(found, output / "exact_tail_frontier.png")
    differences(found, output / "exact_tail_matched.png", FIGURE_LAM)
    if "regimes" in found:
        limited_control(found, output / "exact_tail_limited.png", LIMITED_LAM)
    return sorted(output.glob("exact_tail_*.png"))


def _points(work: Path, seed: int, method: Method) -> list[dict[str, Any]]:
    return json.loads(file_of(work, seed, method.name).read_text())["points"]


def _regimes(work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, regime in REGIMES.items():
        by_world = {}
        for seed in seeds_of(name, seeds):
            path = file_of(work, seed, f"regime {name}")
            if not path.exists():
                write_json(path, regime(seed))
            by_world[seed] = json.loads(path.read_text())
        names = list(next(iter(by_world.values())))
        print(f"regime {name}: {len(by_world)} worlds", flush=True)
        if name == "limited control":
            found[name] = {one: summary({seed: points[one] for seed, points in by_world.items()}) for one in names}
        else:
            found[name] = {one: _beside_plain(by_world, one) for one in names if one != "SACPO"}
    return found


def _beside_plain(by_world: dict[int, Any], name: str) -> dict[str, Any]:
    """CVaR 5 % and mean cost less SACPO's at rewards along its path, over worlds."""
    found: dict[str, Any] = {}
    for share in REWARD_SHARES:
        values: dict[str, list[float]] = {"cvar5": [], "cost": [], "kl": []}
        for methods in by_world.values():
            rewards = [point["reward"] for point in methods["SACPO"]]
            wanted = min(rewards) + share * (max(rewards) - min(rewards))
            for measure, list_ in values.items():
                (value,) = by_interpolation(methods[name], methods["SACPO"], measure, [wanted])
                list_ += [] if value is None else [value]
        found[str(share)] = {measure: spread(list_) for measure, list_ in values.items()}
    return found


def _rounded(value: Any) -> Any:
    """Six digits: what is beyond them differs between machines."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def report(found: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = [
        "# Exact tails",
        f"Written by `{found['command']}`: {found['worlds']} random worlds, vocabulary 6, length 3, 2 prompts, "
        f"β = {found['beta']:g}. Every method beside the SACPO that is equal in the sense of the heading, where that "
        "SACPO's multiplier is as said: medians over worlds with a 95 % interval for the median (order statistics), "
        "from six worlds. "
        "Below zero is lighter; 100 % of a CVaR would make the tail as safe as the safest response (cost −1).",
    ]
    for how in MATCHES:
        for lam in found["at"]:
            parts += [f"## At equal {how}, λ = {lam:g}", table(found["methods"], how, lam)]
    if "regimes" in found:
        limited = found["regimes"]["limited control"]
        parts.append(f"# Limited control: {CONTROLLED} of 3 tokens is the policy's")
        for how in MATCHES:
            for lam in found["at"][2:]:  # of one token a weak multiplier moves nothing
                parts += [f"## At equal {how}, λ = {lam:g}", table(limited, how, lam)]
        parts += ["# Costs out of support", _support_table(found["regimes"]["out of support"])]
    return "\n\n".join(parts) + "\n"


def _support_table(found: dict[str, Any]) -> str:
    rows = [
        "At equal mean reward, by interpolation between the points of both paths; the share is of the way from SACPO's "
        "lowest to its highest reward.\n",
        "| method | share | CVaR 5 %, change | mean cost, change | worlds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, cells in found.items():
        for share, cell in cells.items():
            five = cell["cvar5"]
            if five["worlds"]:
                known = five["low"] is not None
                change = f"{five['median']:+.2f}" + (f" [{five['low']:+.2f}, {five['high']:+.2f}]" if known else "")
                rows.append(f"| {name} | {share} | {change} | {cell['cost']['median']:+.2f} | {five['worlds']} |")
            else:
                rows.append(f"| {name} | {share} | does not reach | | 0 |")
    return "\n".join(rows)
