"""Which of several models to take: the Pareto front of reward against cost, and rules on the tail of the cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from rsa_lightning.evaluation import tail

RuleName = Literal["cantelli", "cvar", "mean", "chance"]


class Trial(NamedTuple):
    """One trained model of a candidate: its mean reward and the costs of its answers."""

    reward: float
    costs: Tensor


@dataclass(frozen=True)
class Rule:
    """When a model's costs are admissible: `figure` <= `bound`.

        mean      E c <= limit
        cvar      CVaR_level(c) <= limit, the mean cost of the worst 1 − level
        chance    P(c > limit) <= 1 − level
        cantelli  E c + sqrt(level / (1 − level)) Std c <= limit, which suffices for `chance` whatever the law: the
                  conservative rule of VaR-CPO (arXiv:2601.22993)

    Figures are those of the sampled answers; none has a margin for their number.

    Args:
        level: 1 − tail, in (0, 1); `mean` has none.
    """

    rule: RuleName
    limit: float
    level: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            raise ValueError(f"select.rule must be {', '.join(get_args(RuleName))}, got {self.rule!r}")
        if isinstance(self.limit, bool) or not isinstance(self.limit, int | float) or self.limit != self.limit:
            raise ValueError(f"select.limit is a number in units of the cost, got {self.limit!r}")
        if (self.rule == "mean") != (self.level is None):
            what = "the mean has no level, remove it" if self.rule == "mean" else f"{self.rule} needs one, such as 0.99"
            raise ValueError(f"select.level: {what}")
        if self.level is not None and not (isinstance(self.level, float) and 0 < self.level < 1):
            raise ValueError(f"select.level is 1 − tail and lies in (0, 1), got {self.level!r}; the worst 1 % is 0.99")

    @property
    def bound(self) -> float:
        return 1 - self.level if self.rule == "chance" and self.level is not None else self.limit

    def figure(self, costs: Tensor) -> float:
        if self.level is None:
            return tail.mean(costs).item()
        if self.rule == "chance":
            return (costs.double() > self.limit).double().mean().item()
        measure = tail.cvar if self.rule == "cvar" else tail.cantelli_bound
        return measure(costs, self.level).item()

    def admits(self, figure: float) -> bool:
        return figure <= self.bound + tail.CUMULATIVE_SLACK

    def __str__(self) -> str:
        if self.level is None:
            return f"mean cost <= {self.limit:g}"
        if self.rule == "chance":
            return f"P(cost > {self.limit:g}) <= {1 - self.level:.4g}"
        if self.rule == "cvar":
            return f"mean cost of the worst {100 * (1 - self.level):.4g} % <= {self.limit:g}"
        return f"mean + sqrt({self.level:g} / {1 - self.level:.4g}) × standard deviation of the cost <= {self.limit:g}"


class Selection(NamedTuple):
    """The candidate chosen, None where none is admissible, and every candidate's figure under the rule."""

    chosen: str | None
    figures: dict[str, float]
    rewards: dict[str, float]

    @property
    def closest(self) -> str:
        return min(self.figures, key=self.figures.__getitem__)


def pareto_front(rewards: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Places of the points that none beats: no other has a higher reward at no higher cost, or a lower cost at no lower
    reward. In order of rising cost; points that are equal are all on it or none is.
    """
    order = sorted(range(len(rewards)), key=lambda i: (costs[i], -rewards[i]))
    front: list[int] = []
    for i in order:
        best = rewards[front[-1]] if front else float("-inf")
        equal = bool(front) and rewards[i] == best and costs[i] == costs[front[-1]]
        if rewards[i] > best or equal:
            front.append(i)
    return front


def select(candidates: Mapping[str, Sequence[Trial]], rule: Rule) -> Selection:
    """The admissible candidate with the highest mean reward.

    A candidate that was trained several times (seeds) is admissible if every one of its models is; its reward is the
    mean over them, its figure the largest.

    Raises:
        ValueError: there are no candidates, or one without a model.
    """
    if not candidates or not all(candidates.values()):
        raise ValueError("select: there is no candidate to choose from")
    figures = {name: max(rule.figure(trial.costs) for trial in trials) for name, trials in candidates.items()}
    rewards = {name: sum(trial.reward for trial in trials) / len(trials) for name, trials in candidates.items()}
    admissible = [name for name in candidates if rule.admits(figures[name])]
    return Selection(max(admissible, key=rewards.__getitem__) if admissible else None, figures, rewards)
