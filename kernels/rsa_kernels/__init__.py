"""Per-token log-probabilities and whole-vocabulary risk measures, without materialising fp32 logits."""

from rsa_kernels.naive import NestedRisk, TokenStats
from rsa_kernels.ops import Impl, linear_token_risk, nested_risk, token_risk
from rsa_kernels.risk import ERM, KL, CVaR, RiskMeasure

__all__ = [
    "ERM",
    "KL",
    "CVaR",
    "Impl",
    "NestedRisk",
    "RiskMeasure",
    "TokenStats",
    "linear_token_risk",
    "nested_risk",
    "token_risk",
]
