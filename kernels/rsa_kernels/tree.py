"""Nested risk over trees: level by level from the deepest, families of one size as the rows of a matrix."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsa_kernels.risk import RiskMeasure

SLACK = 1e-4  # by which siblings may miss 1: more than an fp32 softmax does, be it cast to fp64 or not


class Level(NamedTuple):
    """The nodes of one depth: siblings side by side, and families of one size side by side. Roots have no family."""

    nodes: Int[Tensor, " c"]
    families: list[tuple[int, int]]  # (how many, children in each), in the order of the nodes
    owners: Int[Tensor, " f"]  # the parent of every family, as a place in the level above


def nested_risk_tree(
    values: Float[Tensor, " n"],
    probs: Float[Tensor, " n"],
    parents: Int[Tensor, " n"],
    risk: RiskMeasure,
    discount: float,
) -> Float[Tensor, " n"]:
    """See `rsa_kernels.nested_risk_tree`, which checks shapes, dtypes and the discount."""
    if not values.numel():
        return values.clone()
    levels = _levels(parents.cpu())
    _check_probs(probs.detach().cpu(), parents.cpu())
    order = torch.cat([level.nodes for level in levels]).to(values.device)
    sizes = [level.nodes.numel() for level in levels]
    # fp64: over thousands of levels the rounding of fp32 would add up
    costs = list(values.double()[order].split(sizes))
    masses = probs.detach().to(values.device, torch.float64)[order].split(sizes)
    for depth in reversed(range(1, len(levels))):
        risks = _risks(costs[depth], masses[depth], levels[depth].families, risk)
        costs[depth - 1] = costs[depth - 1].index_add(0, levels[depth].owners.to(values.device), discount * risks)
    return torch.cat(costs)[order.argsort()].to(values.dtype)


def _risks(
    costs: Float[Tensor, " c"], probs: Float[Tensor, " c"], families: list[tuple[int, int]], risk: RiskMeasure
) -> Float[Tensor, " f"]:
    """ρ of every family. Without padding a wide family costs the others nothing, and a measure sees real outcomes."""
    sizes, risks = [count * children for count, children in families], []
    for (_, children), x, p in zip(families, costs.split(sizes), probs.split(sizes), strict=True):
        mass = p.view(-1, children)
        risks.append(risk.value(x.view(-1, children), (mass / mass.sum(-1, keepdim=True)).log()))
    return torch.cat(risks)


def _levels(parents: Int[Tensor, " n"]) -> list[Level]:
    """The nodes by depth, roots first."""
    depth = _depths(parents)
    is_child = parents >= 0
    children = parents[is_child].bincount(minlength=parents.numel())
    siblings = torch.where(is_child, children[parents.clamp(min=0)], 0)
    order = torch.arange(parents.numel())
    for key in (parents, siblings, depth):
        order = order[key[order].argsort(stable=True)]
    roots, *below = order.split(depth.bincount().tolist())
    levels, place = [Level(roots, [], roots[:0])], torch.empty_like(parents)
    for nodes in below:
        above = levels[-1].nodes
        place[above] = torch.arange(above.numel())
        sizes, members = siblings[nodes].unique_consecutive(return_counts=True)
        families = list(zip((members // sizes).tolist(), sizes.tolist(), strict=True))
        levels.append(Level(nodes, families, place[parents[nodes].unique_consecutive()]))
    return levels


def _depths(parents: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Steps from each node to its root. After k rounds an ancestor is 2^k steps away: no loop over a deep tree.

    Raises:
        ValueError: a parent is no node, or there is no root on the way.
    """
    count = parents.numel()
    outside = (parents < -1) | (parents >= count)
    if outside.any():
        node = int(outside.nonzero()[0])
        raise ValueError(f"parents lie in [0, {count}), or are -1 at roots; got {int(parents[node])} at node {node}")
    steps, ancestor = (parents >= 0).long(), parents
    for _ in range(count.bit_length() + 1):
        found = ancestor >= 0
        if not found.any():
            return steps
        steps = steps + torch.where(found, steps[ancestor], 0)
        ancestor = torch.where(found, ancestor[ancestor], -1)
    # more steps than there are nodes end on a cycle
    node = int(ancestor[ancestor >= 0].min())
    raise ValueError(f"parents lead from node {node} back to it, but every node has a root, of parent -1, above it")


def _check_probs(probs: Float[Tensor, " n"], parents: Int[Tensor, " n"]) -> None:
    is_child = parents >= 0
    wrong = is_child & ~(probs >= 0)  # nan as well
    if wrong.any():
        node = int(wrong.nonzero()[0])
        raise ValueError(f"probs are probabilities given the parent, got {probs[node].item():g} at node {node}")
    owners = parents[is_child]
    sums = torch.ones(parents.numel(), dtype=torch.float64)
    sums[owners] = 0.0
    sums.index_add_(0, owners, probs[is_child].double())
    off = ~((sums - 1).abs() <= SLACK)
    if off.any():
        node = int(off.nonzero()[0])
        raise ValueError(
            f"probs of the children of node {node} sum to {sums[node].item():.7g}, not 1: divide each by that sum, or "
            "add the outcomes that are missing"
        )
