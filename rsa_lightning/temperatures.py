"""From the temperature and multiplier of the constrained problem to one temperature per stage."""

import math
from typing import Literal, NamedTuple, get_args

Parametrization = Literal["total", "kl_on_cost", "rsa_paper"]

DEFAULT_BETA = 0.1
DEFAULT_LAM = 1.0


class StageBetas(NamedTuple):
    """Temperatures of the two KL-regularised stages, in units of reward (or cost) per nat of log-ratio."""

    reward: float
    safety: float


def stage_betas(beta: float, lam: float, parametrization: Parametrization = "total") -> StageBetas:
    """Stage temperatures whose two steps reach the optimum of E[r - lam c] - beta_total KL, in either order.

        total       beta_total = beta                 (beta, beta / lam)                          SACPO
        kl_on_cost  beta_total = (1 + lam) beta       ((1 + lam) beta, (1 + lam) beta / lam)      KL on both streams
        rsa_paper   as printed in RSA, with its sign repaired; equals `total` at lam / (1 + lam). Replication only.

    The equality holds per sequence, that is for losses with risk weight 0; with token-level risk the second stage works
    from its own reference and the order matters.

    Raises:
        ValueError: beta or lam is not a positive number, or the parametrization is unknown.

    Sources: SACPO arXiv:2404.11049 (Theorem 1), Safe RLHF arXiv:2310.12773, RSA arXiv:2512.24263.
    """
    _check_name(parametrization)
    _check("beta", beta, "a temperature must be a positive number")
    _check("lam", lam, "the multiplier must be a positive number (drop the safety step to train without one)")
    if parametrization == "rsa_paper":
        return StageBetas(beta, (1 + lam) * beta / lam)
    if parametrization == "kl_on_cost":
        return StageBetas((1 + lam) * beta, (1 + lam) * beta / lam)
    return StageBetas(beta, beta / lam)


def resolve_temperature(
    stage: Literal["reward", "safety"],
    direct: float | None,
    beta: float | None,
    lam: float | None,
    parametrization: Parametrization,
) -> float:
    """The temperature of one stage: either given directly, or derived from beta and lam, never both.

    Raises:
        ValueError: given twice, or not positive.
    """
    _check_name(parametrization)
    if direct is not None:
        if beta is not None or lam is not None or parametrization != "total":
            raise ValueError(
                f"the temperature of the {stage} stage is given twice: loss.beta={direct} and beta={beta}, lam={lam}, "
                f"parametrization={parametrization}. Keep either loss.beta or the others"
            )
        _check("loss.beta", direct, "a temperature must be a positive number")
        return direct
    betas = stage_betas(DEFAULT_BETA if beta is None else beta, DEFAULT_LAM if lam is None else lam, parametrization)
    return betas.reward if stage == "reward" else betas.safety


def _check_name(parametrization: str) -> None:
    if parametrization not in get_args(Parametrization):
        raise ValueError(f"parametrization must be {', '.join(get_args(Parametrization))}, got {parametrization!r}")


def _check(name: str, value: float, why: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: {why}, got {value}")
