"""The weights with which models are combined, in parameters (merge.py) or in log-probabilities (decoding.py)."""

import math
from collections.abc import Mapping

TOLERANCE = 1e-6  # of their sum


def check_weights(weights: Mapping[str, float], where: str = "weights") -> None:
    """Raises ValueError unless there are two or more members whose weights are finite and sum to one.

    Negative weights are fine: they extrapolate, or take a reference out of a product of experts.
    """
    if len(weights) < 2:
        raise ValueError(f"{where}: a combination needs two models or more, got {', '.join(weights) or 'none'}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"{where}: the weight of {name} must be a finite number, got {weight!r}")
    total = math.fsum(weights.values())
    if abs(total - 1) > TOLERANCE:
        given = shown(weights)
        mend = f", for example {shown({name: w / total for name, w in weights.items()})}" if total > TOLERANCE else ""
        raise ValueError(f"{where} must sum to 1, got {given}, which sum to {total:g}: change one of them{mend}")


def shown(weights: Mapping[str, float]) -> str:
    """`0.25 reward + 0.75 safety`"""
    return " + ".join(f"{weight:.6g} {name}" for name, weight in weights.items()).replace("+ -", "- ")
