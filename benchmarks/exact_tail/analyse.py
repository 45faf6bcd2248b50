"""What the records say: each method beside the SACPO of equal reward, value, or reward and KL, over worlds."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.exact_tail.study import MATCHES

Record = Mapping[str, Any]
AT = (0.1, 0.3, 1.0, 3.0)  # SACPO's multiplier where methods are compared, from mild to strong
SAFEST = -1.0  # no response of these worlds costs less
HARM = 0.5  # a CVaR from which plain percentages of it mean something
MEASURES = ("cvar5", "cvar1", "cvar5, plain", "cvar1, plain", "cost", "kl")
EQUAL = 1e-4  # a difference that is rounding


def difference(point: Record, how: str, measure: str) -> float | None:
    """Method less SACPO; of a CVaR as a share of what SACPO's lies above the safest cost, or plainly of SACPO's."""
    other = point["sacpo"][how]
    if other is None:
        return None
    name, _, plainly = measure.partition(", ")
    change = float(point[name] - other[name])
    if plainly:
        return change / other[name] if other[name] > HARM else None
    return change / (other[name] - SAFEST) if name.startswith("cvar") else change


def at_multiplier(points: Sequence[Record], how: str, measure: str, lam: float) -> float | None:
    """The difference where the equal SACPO has this multiplier: linear in log λ between two points of a path.

    None where the path does not reach it: nothing is extrapolated.
    """
    known = [
        (math.log(point["sacpo"][how]["lam"]), found)
        for point in points
        if (found := difference(point, how, measure)) is not None
    ]
    known.sort()
    wanted = math.log(lam)
    for (low, before), (high, after) in itertools.pairwise(known):
        if low <= wanted <= high:
            share = 0.0 if high == low else (wanted - low) / (high - low)
            return before + share * (after - before)
    return None


def summary(by_world: Mapping[int, Sequence[Record]]) -> dict[str, Any]:
    """how -> λ -> measure -> {median, low, high, worlds, lighter, values} of one method.

    `low` and `high` are an interval for the median that holds with at least 95 % probability, from order statistics;
    `lighter` is the number of worlds with a negative difference.
    """
    found: dict[str, Any] = {}
    for how in MATCHES:
        for lam in AT:
            cells = {}
            for measure in MEASURES:
                values = [
                    value
                    for points in by_world.values()
                    if (value := at_multiplier(points, how, measure, lam)) is not None
                ]
                cells[measure] = spread(values)
                if measure != "cvar5":  # the only ones that are drawn world by world
                    cells[measure].pop("values", None)
            found.setdefault(how, {})[str(lam)] = cells
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"worlds": 0}
    ordered = sorted(values)
    interval = median_interval(len(ordered))
    return {
        "median": statistics.median(ordered),
        "low": None if interval is None else ordered[interval[0]],
        "high": None if interval is None else ordered[interval[1]],
        "worlds": len(ordered),
        "lighter": sum(value < -EQUAL for value in ordered),
        "values": [round(value, 4) for value in values],
    }


def median_interval(count: int) -> tuple[int, int] | None:
    """Places of the sorted values between which the median of the law lies with probability ≥ 0.95; None below six.

    P(fewer than k of n values are below the median) is binomial with ½ (David & Nagaraja 2003, section 7.1).
    """
    if count < 6:
        return None
    low = 0
    while 2 * sum(math.comb(count, k) for k in range(low + 2)) / 2**count <= 0.05:
        low += 1
    return low, count - 1 - low


def figures_of(records: Mapping[str, Mapping[int, Sequence[Record]]]) -> dict[str, Any]:
    """method -> summary."""
    return {name: summary(by_world) for name, by_world in records.items()}


def by_interpolation(
    method: Iterable[Record], plain: Sequence[Record], measure: str, rewards: Sequence[float]
) -> list[float | None]:
    """Method less plain at given mean rewards, both paths linear between their points; None outside of either."""

    def at(points: Iterable[Record], reward: float) -> float | None:
        known = sorted((point["reward"], point[measure]) for point in points)
        for (low, before), (high, after) in itertools.pairwise(known):
            if low <= reward <= high:
                return before + (after - before) * ((reward - low) / (high - low) if high > low else 0.0)
        return None

    points = list(method)
    pairs = [(at(points, reward), at(plain, reward)) for reward in rewards]
    return [None if ours is None or theirs is None else ours - theirs for ours, theirs in pairs]


def table(found: Mapping[str, Any], how: str, lam: float) -> str:
    """Markdown: one row per method at one operating point."""
    rows = [
        "| method | CVaR 5 %, change | CVaR 1 %, change | mean cost, change | KL, change | worlds with less CVaR 5 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, cells in found.items():
        if name == "SACPO":
            continue
        cell = cells[how][str(lam)]
        if not cell["cvar5"]["worlds"]:
            rows.append(f"| {name} | does not reach | | | | |")
            continue
        five = cell["cvar5"]
        rows.append(
            f"| {name} | {_percent(five)} | {_percent(cell['cvar1'])} | {_plain(cell['cost'])} | {_plain(cell['kl'])} "
            f"| {five['lighter']} of {five['worlds']} |"
        )
    return "\n".join(rows)


def _percent(cell: Mapping[str, Any]) -> str:
    if not cell["worlds"]:
        return ""
    interval = "" if cell["low"] is None else f" [{100 * cell['low']:+.0f}, {100 * cell['high']:+.0f}]"
    return f"{100 * cell['median']:+.0f} %{interval}"


def _plain(cell: Mapping[str, Any]) -> str:
    return f"{cell['median']:+.2f}" if cell["worlds"] else ""
