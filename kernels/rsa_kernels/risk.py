"""One-step risk measures of a discrete cost: `KL` (the mean), `CVaR` and `ERM`.

Upper-tail, cost type: large x is bad. A measure is a frozen dataclass, so it travels in a YAML file, in a hash and
through a custom operator. To add one, write a frozen dataclass with `weights` and `value`; it then runs in every torch
implementation. `scalars`, `weights_at` and `value_at` are optional: they let the chunked path keep a few numbers per
row between forward and backward.
"""

import abc
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

# Products with smaller or larger parameters lose their digits in fp32, then vanish or overflow.
SMALLEST, LARGEST = 1e-30, 1e30

_defined: list[type["RiskMeasure"]] = []  # every subclass, oldest first


class Outcomes(NamedTuple):
    """Costs and their probabilities, cleaned: x is finite wherever the mass is 0."""

    x: Float[Tensor, "*n V"]
    log_probs: Float[Tensor, "*n V"]
    probs: Float[Tensor, "*n V"]

    @classmethod
    def of(cls, x: Float[Tensor, "*n V"], log_probs: Float[Tensor, "*n V"]) -> "Outcomes":
        """Outcomes without mass may carry any x, even nan: 0 · inf must not poison the sums."""
        probs = log_probs.exp()
        return cls(x.masked_fill((probs == 0) & ~x.isfinite(), 0.0), log_probs, probs)


def indicator(compare: Callable[..., Tensor], x: Tensor, threshold: Tensor) -> Tensor:
    """1 where `compare(x, threshold)`, else 0, in the dtype of x: a product with a bool takes four times as long."""
    return compare(x, threshold, out=torch.empty_like(x))


class RiskMeasure(abc.ABC):
    """One-step risk ρ of a discrete cost x whose outcomes have the given log-probabilities.

    ρ is monotone and translation-equivariant, ρ(x + c) = ρ(x) + c. Fields of a subclass are floats.
    """

    scalar_count: ClassVar[int] = 0  # width of `scalars`; at most 3

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _defined.append(cls)

    @abc.abstractmethod
    def weights(self, x: Float[Tensor, "*n V"], log_probs: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        """Risk-adjusted probabilities: non-negative, sum to one, equal to ∂ρ/∂x."""

    @abc.abstractmethod
    def value(self, x: Float[Tensor, "*n V"], log_probs: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
        """ρ(x), differentiable in x with gradient `weights`; `log_probs` is a constant."""

    def scalars(self, o: Outcomes) -> Float[Tensor, "*n k"]:
        """The few numbers per row that turn `weights` into an elementwise formula."""
        return o.x.new_empty(*o.x.shape[:-1], 0)

    def weights_at(self, o: Outcomes, scalars: Float[Tensor, "*n k"]) -> Float[Tensor, "*n V"]:
        """`weights`, given this measure's `scalars` of the same outcomes."""
        return self.weights(o.x, o.log_probs)

    def value_at(self, o: Outcomes, scalars: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
        """`value` without its gradient, given this measure's `scalars` of the same outcomes."""
        return self.value(o.x, o.log_probs)


class _Value(torch.autograd.Function):
    """ρ(x) with the envelope gradient ∂ρ/∂x = weights.

    Autograd through η + E[(x − η)₊] / tail has the right value and wrong gradients wherever outcomes tie.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_probs: Tensor, risk: "_ClosedForm") -> Tensor:
        outcomes = Outcomes.of(x, log_probs)
        scalars = risk.scalars(outcomes)
        ctx.risk = risk
        ctx.save_for_backward(x, log_probs, scalars)
        return risk.value_at(outcomes, scalars)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[..., None] * _Weights.apply(*ctx.saved_tensors, ctx.risk), None, None


class _Weights(torch.autograd.Function):
    """The envelope gradient. It has none itself: the scalars hold no graph, so theirs would be missing from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_probs: Tensor, scalars: Tensor, risk: "_ClosedForm") -> Tensor:
        return risk.weights_at(Outcomes.of(x, log_probs), scalars)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError(
            "risk measures have first derivatives only, and a gradient of their gradient was asked for: leave out "
            "create_graph=True, or detach the gradient"
        )


class _ClosedForm(RiskMeasure):
    """A measure written as `scalars`, `weights_at` and `value_at`; `weights` and `value` follow."""

    def weights(self, x: Float[Tensor, "*n V"], log_probs: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        outcomes = Outcomes.of(x.detach(), log_probs.detach())
        return self.weights_at(outcomes, self.scalars(outcomes))

    def value(self, x: Float[Tensor, "*n V"], log_probs: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
        return _Value.apply(x, log_probs.detach(), self)


@dataclass(frozen=True)
class KL(_ClosedForm):
    """The mean, ρ(x) = E x. As step risk it is the forward KL(reference ‖ policy) of TDPO (arXiv:2404.11999)."""

    def weights_at(self, o: Outcomes, scalars: Float[Tensor, "*n k"]) -> Float[Tensor, "*n V"]:
        return o.probs

    def value_at(self, o: Outcomes, scalars: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
        return (o.probs * o.x).sum(-1)


@dataclass(frozen=True)
class CVaR(_ClosedForm):
    """Mean of x over its upper tail of probability mass `tail`; `tail=1` is KL, `tail → 0` is max x.

        weights = p / tail above the threshold, p · fraction / tail at it, 0 below

    The threshold is the upper `tail`-quantile. Outcomes that tie with it share the mass that is left in proportion to
    p, never by index: a policy equal to its reference is one single tie and must get weights p, hence gradient 0.

    Args:
        tail: probability mass in (0, 1], at least 1e-30; the papers' μ. The usual CVaR level is 1 − tail.

    Sources: Rockafellar and Uryasev (2000); Ra-DPO (arXiv:2505.20359), RSA (arXiv:2512.24263).
    """

    tail: float = 0.97
    scalar_count: ClassVar[int] = 2  # threshold, fraction

    def __post_init__(self) -> None:
        tail = number("CVaR tail", self.tail)
        if not 0 < tail <= 1:
            mend = f": {tail:g} % is {tail / 100:g}" if 1 < tail <= 100 else ""
            raise ValueError(f"CVaR tail is a probability mass in (0, 1], got {self.tail}{mend}")
        if tail < SMALLEST:
            raise ValueError(f"CVaR tail is at least {SMALLEST}, which is max x already, got {self.tail}")
        object.__setattr__(self, "tail", tail)

    def scalars(self, o: Outcomes) -> Float[Tensor, "*n 2"]:
        """The threshold and the fraction of the mass at it that belongs to the tail."""
        if self.tail == 1:
            return o.x.new_zeros(*o.x.shape[:-1], 2)
        return self.split(o, self.threshold(o))

    def threshold(self, o: Outcomes) -> Float[Tensor, "*n 1"]:
        """The upper `tail`-quantile, an element of x."""
        descending, order = o.x.sort(dim=-1, descending=True)
        mass = o.probs.gather(-1, order).cumsum(-1)
        crossing = (mass < self.tail * mass[..., -1:]).sum(-1, keepdim=True)  # rounding may leave the sum just below 1
        return descending.gather(-1, crossing)

    def split(self, o: Outcomes, threshold: Float[Tensor, "*n 1"]) -> Float[Tensor, "*n 2"]:
        """`scalars` for a threshold that is known."""
        wanted = self.tail * o.probs.sum(-1, keepdim=True)
        above = indicator(torch.gt, o.x, threshold).mul_(o.probs).sum(-1, keepdim=True)
        at = indicator(torch.eq, o.x, threshold).mul_(o.probs).sum(-1, keepdim=True)
        return torch.cat([threshold, ((wanted - above) / at).clamp(0.0, 1.0)], dim=-1)

    def weights_at(self, o: Outcomes, scalars: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n V"]:
        if self.tail == 1:
            return o.probs
        threshold, fraction = scalars.split(1, dim=-1)
        share = indicator(torch.gt, o.x, threshold)
        share.addcmul_(indicator(torch.eq, o.x, threshold), fraction)
        return share.div_(self.tail).mul_(o.probs)

    def value_at(self, o: Outcomes, scalars: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n"]:
        return (self.weights_at(o, scalars) * o.x).sum(-1)


@dataclass(frozen=True)
class ERM(_ClosedForm):
    """Entropic risk ρ(x) = (1/μ) log E exp(μx), x in nats; `mu=0` is KL, `mu → ∞` is max x.

        weights ∝ p exp(μx)

    As step risk it is the Rényi divergence of order 1 + μ. `mu=-1` gives weights = policy and risk 0, so that a
    risk-aware loss becomes DPO. A risk aversion on the scale of values becomes `mu = mu_value * beta` here.

    Args:
        mu: per nat of log-ratio; 0, between 1e-30 and 1e30, or exactly −1.

    Sources: Ra-DPO (arXiv:2505.20359), RSA (arXiv:2512.24263).
    """

    mu: float = 5.0
    scalar_count: ClassVar[int] = 1  # log E exp(μx)

    def __post_init__(self) -> None:
        mu = number("ERM mu", self.mu)
        if not (0 <= mu < math.inf or mu == -1):
            raise ValueError(f"ERM mu is a risk aversion >= 0 per nat of log-ratio, or exactly -1 (DPO), got {self.mu}")
        if mu not in (0, -1) and not SMALLEST <= mu <= LARGEST:
            raise ValueError(f"ERM mu lies in [{SMALLEST}, {LARGEST}] unless it is 0 (KL) or -1, got {self.mu}")
        object.__setattr__(self, "mu", mu)

    def scalars(self, o: Outcomes) -> Float[Tensor, "*n 1"]:
        log_mean = (o.log_probs + self.mu * o.x).logsumexp(-1, keepdim=True)
        if abs(self.mu) >= 0.1:
            return log_mean
        # Small μ: the logarithm of a number near 1 is off by about 2e-7 / μ in fp32. The mean of expm1 is not, but
        # overflows; there the logarithm is of a number far from 1.
        excess = (o.probs * torch.expm1(self.mu * o.x)).sum(-1, keepdim=True)
        return torch.where(excess < 1, excess.log1p(), log_mean)

    def weights_at(self, o: Outcomes, scalars: Float[Tensor, "*n 1"]) -> Float[Tensor, "*n V"]:
        if self.mu == 0:
            return o.probs
        return (o.log_probs + self.mu * o.x).sub_(scalars).exp_()

    def value_at(self, o: Outcomes, scalars: Float[Tensor, "*n 1"]) -> Float[Tensor, "*n"]:
        return (o.probs * o.x).sum(-1) if self.mu == 0 else scalars.squeeze(-1) / self.mu


def encode(risk: RiskMeasure | None) -> tuple[str, list[tuple[str, float]]]:
    """A measure as class name and fields, which a custom operator can carry; None is ("", []).

    Raises:
        ValueError: the measure is no dataclass of numbers, or its name leads to another class.
    """
    if risk is None:
        return "", []
    cls = type(risk)
    if not is_dataclass(risk):
        raise ValueError(f"{cls.__name__} is not a dataclass: a risk measure is a frozen one whose fields are floats")
    if _newest(cls.__name__) is not cls:
        raise ValueError(f"{risk} was made before {cls.__name__} was defined again: make it again")
    names = [field.name for field in fields(risk) if field.init]
    return cls.__name__, [(name, number(f"{cls.__name__} {name}", getattr(risk, name))) for name in names]


def decode(name: str, parameters: Sequence[tuple[str, float]]) -> RiskMeasure | None:
    """The measure that `encode` wrote.

    Raises:
        ValueError: no class or several have that name, or its constructor takes more than its fields.
    """
    if not name:
        return None
    cls = _newest(name)
    surplus = inspect.signature(cls).parameters.keys() - dict(parameters).keys()
    if surplus:
        raise ValueError(f"{name} is made with {', '.join(sorted(surplus))}, which is not a field: keep it as one")
    return cls(**dict(parameters))


def _newest(name: str) -> type[RiskMeasure]:
    """The class of that name. One defined again at the same place, as by running a notebook cell twice, replaces it."""
    found = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _defined if cls.__name__ == name}
    if len(found) > 1:
        raise ValueError(f"{len(found)} risk measures are called {name} ({', '.join(found)}): rename one")
    if not found:
        raise ValueError(f"no risk measure is called {name}: derive it from RiskMeasure before the operator runs")
    return next(iter(found.values()))


def number(what: str, value: object) -> float:
    """A plain float of any real number, NumPy's included. Not of a tensor: a gradient to it would be lost.

    Raises:
        ValueError: it is none; `what` names it.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{what} is a number, got {value!r}")
    return float(value)
