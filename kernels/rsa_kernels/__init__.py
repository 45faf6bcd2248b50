"""Per-token log-probabilities and whole-vocabulary risk measures, without materialising fp32 logits."""

from rsa_kernels.dispatch import Impl, why_not_triton
from rsa_kernels.naive import NestedRisk, TokenStats
from rsa_kernels.ops import linear_token_risk, nested_risk, nested_risk_tree, token_risk
from rsa_kernels.risk import ERM, KL, CVaR, RiskMeasure
from rsa_kernels.workspace import Strategy

__all__ = [
    "ERM",
    "KL",
    "CVaR",
    "Impl",
    "NestedRisk",
    "RiskMeasure",
    "Strategy",
    "TokenStats",
    "linear_token_risk",
    "nested_risk",
    "nested_risk_tree",
    "token_risk",
    "why_not_triton",
]
