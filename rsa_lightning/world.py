"""Exact worlds: token trees small enough to enumerate, where every claim about the methods has a closed form.

A world has X prompts; a response is T tokens of a vocabulary of V, so a prompt has S = V^T responses. Everything is
float64 and exact: no sampling, no training. What the methods make of such a world by training is `tabular.py`.

**Conventions.** A *policy* is a tuple of T tensors, `policy[t]` [X, V^t, V] holding the log-probability of every next
token after every prefix of t tokens. Responses are numbered by their tokens, the first one most significant, so values
of responses are [X, S] tensors. Prompts are equally likely. *Returns* are better when higher (a reward, or a safety
score −cost); a cost is better when lower.

**Two kinds of optimum** of a return R at temperature β, near a reference p:

    sequence   π(y|x) ∝ p(y|x) exp(R(x, y) / β)                              `gibbs`
    token      π(z|s) ∝ p(z|s) exp(Ṽ(s∘z) / β),   Ṽ(s) = Φ_{z~p}(Ṽ(s∘z))     `token_optimum`

where Φ(Z) = −ρ(−Z) is the lower-tail version of a risk measure ρ and Ṽ = R at the end of a response. The first is what
DPO learns from unlimited preferences; the second what the risk-aware losses with risk weight 1 learn (Ra-DPO,
arXiv:2505.20359; RSA, arXiv:2512.24263). They agree for `ERM(mu=-1)`, whose risk of a log-ratio is 0, and
for no risk-averse measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from rsa_kernels import ERM, RiskMeasure, nested_risk_tree
from torch import Tensor

from rsa_lightning.evaluation import tail
from rsa_lightning.transforms import Hinge, Indicator

Policy = tuple[Float[Tensor, "X _ V"], ...]
"""Log-probabilities of the next token, one tensor per position."""

LARGEST_TREE = 2_000_000  # responses of all prompts


@dataclass(frozen=True)
class TokenWorld:
    """Prompts, a reference policy, and what every response is worth.

    Args:
        reference: the policy that everything stays near.
        reward: of every response.
        costs: of every response, one row per constraint; at most 0 where a response is safe.

    Raises:
        ValueError: shapes that do not belong together, another dtype than float64, or a reference that is no policy.
    """

    reference: Policy
    reward: Float[Tensor, "X S"]
    costs: Float[Tensor, "K X S"]

    def __post_init__(self) -> None:
        if not self.reference:
            raise ValueError("reference has no positions: a response is at least one token long")
        dtypes = {str(part.dtype) for part in (*self.reference, self.reward, self.costs)}
        if dtypes != {"torch.float64"}:
            raise ValueError(f"a world is float64, got {', '.join(sorted(dtypes))}: call .double() on its parts")
        prompts, responses = self.reward.shape
        sizes = [tuple(level.shape) for level in self.reference]
        vocabulary = sizes[0][-1]
        if sizes != [(prompts, vocabulary**t, vocabulary) for t in range(len(sizes))]:
            raise ValueError(f"reference[t] must be [{prompts}, {vocabulary}^t, {vocabulary}], got shapes {sizes}")
        if responses != vocabulary ** len(sizes) or self.costs.shape[1:] != self.reward.shape:
            raise ValueError(
                f"reward [X, S] and costs [K, X, S] must cover the {vocabulary}^{len(sizes)} responses to each prompt, "
                f"got {tuple(self.reward.shape)} and {tuple(self.costs.shape)}"
            )
        off = max(float(level.logsumexp(-1).abs().max()) for level in self.reference)
        if not off < 1e-9:
            raise ValueError(f"reference[t] must be log-probabilities, but one sums to exp({off:.2g}): use log_softmax")

    @property
    def cost(self) -> Float[Tensor, "X S"]:
        """The first cost."""
        return self.costs[0]

    @classmethod
    def random(
        cls,
        seed: int,
        vocabulary: int = 6,
        length: int = 3,
        prompts: int = 3,
        constraints: int = 1,
        catastrophic: float = 0.04,
        temptation: float = 1.0,
        conflict: float = 0.0,
        spread: float = 1.0,
    ) -> "TokenWorld":
        """A world whose catastrophes look helpful.

        Every token has a worth of its own at its position, pairs of neighbours a smaller one, and every response a
        little more: rewards of standard deviation one or so. Responses are safe or mildly unsafe (cost −1 to ½), except
        for a share `catastrophic`: costs exp(1 + N(0, 1)), heavy-tailed, and rewards higher by `temptation`.

        Args:
            conflict: how much helpful responses tend to be mildly unsafe: logits of the mild cost per unit of reward.
            spread: standard deviation of the reference's logits.

        Raises:
            ValueError: too many responses to enumerate.
        """
        if prompts * vocabulary**length > LARGEST_TREE:
            raise ValueError(f"{prompts} x {vocabulary}^{length} responses are over {LARGEST_TREE}: take fewer tokens")
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=draw)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, dtype=torch.float64, generator=draw)

        reference = tuple((spread * normal(prompts, vocabulary**t, vocabulary)).log_softmax(-1) for t in range(length))
        tokens = responses(vocabulary, length)
        count = len(tokens)
        own = 0.5 * normal(length, vocabulary)
        neighbours = 0.3 * normal(vocabulary, vocabulary)
        worth = own[torch.arange(length), tokens].sum(-1) + neighbours[tokens[:, :-1], tokens[:, 1:]].sum(-1)
        costs, tempting = [], torch.zeros(prompts, count, dtype=torch.float64)
        for _ in range(constraints):
            grave = uniform(prompts, count) < catastrophic
            mild = 1.5 * (uniform(prompts, count).logit() + conflict * worth).sigmoid() - 1.0
            costs.append(torch.where(grave, (1 + normal(prompts, count)).exp(), mild))
            tempting = tempting + temptation * grave
        return cls(reference, worth + 0.3 * normal(prompts, count) + tempting, torch.stack(costs))


def responses(vocabulary: int, length: int) -> Int[Tensor, "S T"]:
    """The tokens of all responses, in the order of their numbers."""
    return torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)


# ------------------------------------------------------------------------------------------------------ policies


def prefix_logps(policy: Policy) -> tuple[Float[Tensor, "X _ V"], ...]:
    """log-probabilities of the prefixes of 1, 2, ..., T tokens, in nats, shaped like the policy."""
    found: list[Tensor] = []
    for level in policy:
        found.append(level if not found else found[-1].flatten(1)[..., None] + level)
    return tuple(found)


def sequence_logps(policy: Policy) -> Float[Tensor, "X S"]:
    """log π(y|x) of every response, in nats."""
    return prefix_logps(policy)[-1].flatten(1)


def path_sums(values: Sequence[Float[Tensor, "X _"]], vocabulary: int) -> Float[Tensor, "X S"]:
    """Σ_t values[t](s_t) along every response, of one number per prefix."""
    total = torch.zeros_like(values[0])
    for t, level in enumerate(values):
        total = total + level if t == 0 else total.repeat_interleave(vocabulary, 1) + level
    return total.repeat_interleave(vocabulary, 1)


def policy_of(log_law: Float[Tensor, "X S"], vocabulary: int) -> Policy:
    """The policy whose responses have the law ∝ exp(log_law)."""
    levels, mass = [], log_law
    while mass.shape[-1] > 1:
        level = mass.unflatten(-1, (-1, vocabulary))
        levels.append(level.log_softmax(-1))
        mass = level.logsumexp(-1)
    return tuple(reversed(levels))


def mixture(policies: Sequence[Policy], weights: Sequence[float]) -> Policy:
    """Per-token geometric mixture: logits Σ_k w_k log π_k, renormalised after every prefix."""
    return tuple(
        sum(w * level for w, level in zip(weights, levels, strict=True)).log_softmax(-1)
        for levels in zip(*policies, strict=True)
    )


# -------------------------------------------------------------------------------------------------------- optima


def gibbs(reference: Policy, returns: Float[Tensor, "X S"], beta: float) -> Policy:
    """argmax_π E_π R − β KL(π‖p) over all policies: p exp(R/β), normalised per prompt."""
    return policy_of(sequence_logps(reference) + returns / beta, reference[0].shape[-1])


def nested_values(
    reference: Policy, returns: Float[Tensor, "X S"], risk: RiskMeasure
) -> tuple[Float[Tensor, "X _"], ...]:
    """Ṽ after every prefix of 0, 1, ..., T tokens: `Ṽ(s) = −ρ_{z~p}(−Ṽ(s∘z))`, and the return at the end.

    `risk` is on the scale of returns (`on_values`). Made by `rsa_kernels.nested_risk_tree`.
    """
    prompts, vocabulary = reference[0].shape[0], reference[0].shape[-1]
    sizes = [prompts * vocabulary**t for t in range(len(reference) + 1)]
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    parents = [torch.full((prompts,), -1)]
    parents += [starts[t - 1] + torch.arange(sizes[t]) // vocabulary for t in range(1, len(sizes))]
    probs = torch.cat([reference[0].new_ones(prompts), *(level.exp().flatten() for level in reference)])
    values = torch.cat([returns.new_zeros(starts[-1]), -returns.flatten()])
    found = -nested_risk_tree(values, probs, torch.cat(parents), risk)
    return tuple(part.view(prompts, -1) for part in found.split(sizes))


def on_values(risk: RiskMeasure, beta: float) -> RiskMeasure:
    """The measure of values that a measure of log-ratios means at temperature beta.

    β ρ(X) = ρ'(βX): CVaR and the mean are positively homogeneous and stay, `ERM(mu)` becomes `ERM(mu / beta)`.
    """
    return ERM(risk.mu / beta) if isinstance(risk, ERM) else risk


def token_optimum(
    reference: Policy, streams: Sequence[tuple[Float[Tensor, "X S"], float]], risk: RiskMeasure
) -> Policy:
    """The nested-advantage policy of one or several returns, each with its temperature and its own risk.

        π(z|s) ∝ p(z|s) exp(Σ_k Ṽ_k(s∘z) / β_k)

    Args:
        streams: (returns, temperature) pairs; for RSA's joint problem (reward, β) and (−cost, β/λ).
        risk: on the scale of log-ratios, as the losses take it.
    """
    logits = list(reference)
    for returns, beta in streams:
        values = nested_values(reference, returns / beta, risk)
        logits = [level + after.view(level.shape) for level, after in zip(logits, values[1:], strict=True)]
    return tuple(level.log_softmax(-1) for level in logits)


def lagrangian_optimum(world: TokenWorld, beta: float, lams: Float[Tensor, " K"]) -> Policy:
    """argmax_π E[r − Σ_k λ_k c_k] − β KL(π‖p). With KL on both streams (Safe RLHF) pass `beta = (1 + λ) β`."""
    return gibbs(world.reference, world.reward - torch.einsum("k,kxs->xs", lams, world.costs), beta)


def multipliers(
    world: TokenWorld, beta: float, budgets: Float[Tensor, " K"], reference: Policy | None = None
) -> Float[Tensor, " K"]:
    """λ* of max E[r] − β KL(π‖p) subject to E[c_k] ≤ budget_k, by projected Newton on the convex dual.

        D(λ) = β E_x log E_{y~p} exp((r − Σ_k λ_k (c_k − b_k)) / β),   λ ≥ 0

    Raises:
        ValueError: no policy meets the budgets with slack, so that the dual has no minimum.
    """
    base = sequence_logps(reference or world.reference) + world.reward / beta
    slack = world.costs - budgets[:, None, None]
    # KL(π‖p) is at most −log of the rarest response: a dual below this has no feasible policy to bound
    floor = float(beta * base.min(-1).values.mean())
    accuracy = 1e-13 * float(1 + slack.abs().max())

    def logits(lams: Tensor) -> Tensor:
        return base - torch.einsum("k,kxs->xs", lams, slack) / beta

    def dual(lams: Tensor) -> float:
        return float(beta * logits(lams).logsumexp(-1).mean())

    lams = torch.zeros_like(budgets)
    for _ in range(500):
        slope, curvature = _dual_derivatives(logits(lams).softmax(-1), slack, beta)
        reach = (lams - (lams - slope).clamp(min=0)).abs().max()  # 0 at the minimum, and only there
        if reach < accuracy:
            return lams
        if dual(lams) < floor:
            break
        # Bertsekas (1982): multipliers near 0 that would fall move by themselves, the others by Newton's step
        held = (lams <= reach.clamp(max=1e-3)) & (slope > 0)
        coupled = curvature.masked_fill(held[:, None] | held[None], 0.0)
        coupled = coupled + torch.diag(held * curvature.diagonal() + 1e-14)
        step, size = -torch.linalg.solve(coupled, slope), 1.0
        most = dual(lams) + 1e-14 * beta * float(1 + logits(lams).abs().max())  # near the minimum all is rounding
        while size > 1e-12 and dual((lams + size * step).clamp(min=0)) > most:
            size /= 2
        lams = (lams + size * step).clamp(min=0)
    raise ValueError(f"no multiplier meets the budgets {budgets.tolist()}: no policy has costs below all of them")


def _dual_derivatives(
    law: Float[Tensor, "X S"], slack: Float[Tensor, "K X S"], beta: float
) -> tuple[Float[Tensor, " K"], Float[Tensor, "K K"]]:
    """Slope and curvature of the dual: minus the mean slack, and its covariance within prompts over β."""
    means = torch.einsum("xs,kxs->kx", law, slack)
    second = torch.einsum("xs,kxs,lxs->kl", law, slack, slack)
    return -means.mean(-1), (second - means @ means.T) / (len(law) * beta)


def hinge_worths(
    reference: Policy, cost: Float[Tensor, "X S"], lam: float, tail_mass: float, beta: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """All η that may be best, which are the costs that occur, ascending, and what each is worth:

        G(η) = β E_x log E_{y~π_r} exp(−λ (c − η)₊ / (aβ)) − λη

    Between two costs G is convex; its local maxima, of which there may be several, are at costs.
    """
    scale = lam / (tail_mass * beta)
    costs, order = cost.sort(-1)
    logps = sequence_logps(reference).gather(-1, order)
    nothing = logps.new_full((len(logps), 1), -torch.inf)
    below = torch.cat([nothing, logps.logcumsumexp(-1)], -1)
    above = torch.cat([(logps - scale * costs).flip(-1).logcumsumexp(-1).flip(-1), nothing], -1)
    etas = cost.flatten().unique()
    rank = torch.searchsorted(costs, etas.expand(len(costs), -1).contiguous(), right=True)
    found = torch.logaddexp(below.gather(-1, rank), above.gather(-1, rank) + scale * etas)
    return etas, beta * found.mean(0) - lam * etas


def hinge_optimum(
    reference: Policy, cost: Float[Tensor, "X S"], lam: float, tail_mass: float, beta: float
) -> tuple[Policy, float]:
    """argmax over π of E[r] − λ CVaR_a(c) − β KL(π‖p), seen from `reference` = π_r, the reward-aligned policy; and η.

    By CVaR_a(c) = min_η η + E(c − η)₊/a (Rockafellar & Uryasev 2000) the problem is a maximum over π *and* η. For one η
    the best policy is the Gibbs policy of the cost (c − η)₊/a on top of π_r; the best η is found by trying all
    (`hinge_worths`). It is a VaR_a of the policy that is returned, not of π_r.
    """
    etas, worths = hinge_worths(reference, cost, lam, tail_mass, beta)
    eta = float(etas[worths.argmax()])
    return gibbs(reference, -Hinge(eta, tail_mass)(cost), beta / lam), eta


# -------------------------------------------------------------------------------------------------------- figures


def law_of(policy: Policy) -> Float[Tensor, " n"]:
    """The probability of every (prompt, response), prompts equally likely; n = X·S, the order of `flatten()`."""
    return sequence_logps(policy).exp().flatten() / policy[0].shape[0]


def expectation(policy: Policy, values: Float[Tensor, "X S"]) -> float:
    return float(law_of(policy) @ values.flatten())


def kl(policy: Policy, reference: Policy) -> float:
    """E_x KL(π‖p), in nats per response."""
    return expectation(policy, sequence_logps(policy) - sequence_logps(reference))


def cvar(policy: Policy, cost: Float[Tensor, "X S"], tail_mass: float) -> float:
    """Mean cost of the worst `tail_mass` of all responses to all prompts."""
    return float(tail.cvar(cost.flatten(), 1 - tail_mass, law_of(policy)[None])[0])


def var(policy: Policy, cost: Float[Tensor, "X S"], tail_mass: float) -> float:
    """The cost that is exceeded with probability at most `tail_mass`: the upper end of the better 1 − tail_mass."""
    return float(tail.var(cost.flatten(), 1 - tail_mass, law_of(policy)[None])[0])


def cantelli(policy: Policy, cost: Float[Tensor, "X S"], tail_mass: float) -> float:
    """VaR-CPO's bound on `var`: mean + sqrt((1 − a)/a) std (arXiv:2601.22993)."""
    return float(tail.cantelli_bound(cost.flatten(), 1 - tail_mass, law_of(policy)[None])[0])


def exceedance(policy: Policy, cost: Float[Tensor, "X S"], threshold: float) -> float:
    """P(cost > threshold)."""
    return expectation(policy, Indicator(threshold)(cost))


def entropic(policy: Policy, cost: Float[Tensor, "X S"], mu: float) -> float:
    """(1/μ) log E exp(μ c), over all responses to all prompts; μ per unit of cost."""
    return float((law_of(policy).log() + mu * cost.flatten()).logsumexp(0) / mu) if mu else expectation(policy, cost)


def quantiles(policy: Policy, cost: Float[Tensor, "X S"], levels: Sequence[float]) -> list[float]:
    """The lower quantiles of the cost."""
    return [var(policy, cost, 1 - level) for level in levels]


def distance(policy: Policy, other: Policy) -> float:
    """The largest difference of two probabilities of a next token, over all prefixes, however rarely reached."""
    return max(float((a.exp() - b.exp()).abs().max()) for a, b in zip(policy, other, strict=True))


def stepwise(
    reference: Policy, steps: Sequence[tuple[Float[Tensor, "X S"], float]], risk: RiskMeasure | None = None
) -> Policy:
    """Optima taken one after another, each with the one before as its reference: what stepwise alignment converges to.

    Args:
        steps: (returns, temperature), first step first.
        risk: None for sequence-level optima, else that of the token-level ones.
    """
    policy = reference
    for returns, beta in steps:
        policy = gibbs(policy, returns, beta) if risk is None else token_optimum(policy, [(returns, beta)], risk)
    return policy


def suboptimality(world: TokenWorld, policy: Policy, beta: float, lams: Float[Tensor, " K"]) -> float:
    """How much less a policy is worth than the optimum of E[r − Σ λ_k c_k] − β KL; equals β KL(π‖π*)."""
    return beta * kl(policy, lagrangian_optimum(world, beta, lams))
