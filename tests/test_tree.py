"""Nested risk over trees: the recursion written out, hand-worked trees, and the laws that it inherits from a measure."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rsa_kernels import ERM, KL, CVaR, RiskMeasure, nested_risk, nested_risk_tree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class MeanSemideviation(RiskMeasure):
    """A measure from outside the package, E x + share · E(x − E x)₊; its gradient comes from autograd."""

    share: float = 0.5

    def value(self, x, log_probs):
        mean = (log_probs.exp() * x).sum(-1, keepdim=True)
        return mean.squeeze(-1) + self.share * (log_probs.exp() * (x - mean).relu()).sum(-1)

    def weights(self, x, log_probs):
        p = log_probs.exp()
        above = (x > (p * x).sum(-1, keepdim=True)).to(x.dtype)
        return p * (1 + self.share * (above - (p * above).sum(-1, keepdim=True)))


@dataclass(frozen=True)
class WorstOutcome(RiskMeasure):
    """max x over every outcome it is shown, with mass or without; counts what it is shown."""

    shown: list = field(default_factory=list, compare=False)

    def value(self, x, log_probs):
        self.shown.append(tuple(x.shape))
        return x.amax(-1)

    def weights(self, x, log_probs):
        return torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


PACKAGED = [KL(), CVaR(1.0), CVaR(0.97), CVaR(0.5), CVaR(0.1), ERM(0), ERM(0.05), ERM(2)]
AVERSE = [*PACKAGED, MeanSemideviation()]
packaged_risk = pytest.mark.parametrize("risk", PACKAGED, ids=str)
averse_risk = pytest.mark.parametrize("risk", AVERSE, ids=str)
every_risk = pytest.mark.parametrize("risk", [*AVERSE, ERM(-1)], ids=str)


def tensors(values, probs, parents, dtype=torch.float64):
    make = lambda x, kind: torch.as_tensor(x, dtype=kind, device=DEVICE)
    return make(values, dtype), make(probs, dtype), make(parents, torch.int64)


def children_of(parents: list[int], node: int) -> list[int]:
    return [j for j, parent in enumerate(parents) if parent == node]


def literal(values, probs, parents, risk, discount=1.0) -> torch.Tensor:
    """V_i = values_i + discount · ρ(V_j), node by node."""
    parents, found = parents.tolist(), {}

    def value(node):
        if node not in found:
            children = children_of(parents, node)
            found[node] = values[node]
            if children:
                nested = torch.stack([value(j) for j in children])
                found[node] = values[node] + discount * risk.value(nested, probs[children].log())
        return found[node]

    return torch.stack([value(node) for node in range(len(parents))])


def path_weights(values, probs, parents, risk, discount=1.0) -> torch.Tensor:
    """∂V_i/∂values_j: the product of discount · weights along the path from i down to j."""
    nested, parents = literal(values, probs, parents, risk, discount), parents.tolist()
    share = torch.zeros_like(values)
    for node in range(len(parents)):
        children = children_of(parents, node)
        if children:
            share[children] = risk.weights(nested[children], probs[children].log())
    jacobian = torch.eye(len(parents), dtype=values.dtype, device=values.device)
    for j in range(len(parents)):
        i, product = j, 1.0
        while parents[i] >= 0:
            product, i = product * discount * share[i].item(), parents[i]
            jacobian[i, j] = product
    return jacobian


@st.composite
def forests(draw, most: int = 14, leaf_costs_only: bool = False):
    """Values, probabilities and parents of up to `most` nodes in any order, with ties and outcomes without mass."""
    size = draw(st.integers(1, most))
    name = draw(st.permutations(range(size)))
    parents = [-1] * size
    for i in range(1, size):
        above = draw(st.integers(-1, i - 1))
        parents[name[i]] = -1 if above < 0 else name[above]
    costs = st.one_of(st.sampled_from([0.0, 1.0, -2.0]), st.floats(-20, 20))
    values = torch.tensor(draw(st.lists(costs, min_size=size, max_size=size)), dtype=torch.float64)
    mass = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 1))
    probs = torch.tensor(draw(st.lists(mass, min_size=size, max_size=size)), dtype=torch.float64)
    for node in range(size):
        children = children_of(parents, node)
        if children:
            probs[children[0]] += 0.1  # one outcome at least exists
            probs[children] /= probs[children].sum()
            values[node] *= not leaf_costs_only
        if parents[node] < 0:
            probs[node] = draw(st.sampled_from([math.nan, -1.0, 7.0]))  # nobody reads it
    return tensors(values, probs, parents)


discounts = st.sampled_from([1.0, 0.9, 0.5, 0.0])


def close(ours, expected, atol=1e-10) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


# ---- the recursion ---------------------------------------------------------------------------------------------------


@every_risk
@given(forest=forests(), discount=discounts)
def test_it_is_the_literal_recursion(risk, forest, discount):
    close(nested_risk_tree(*forest, risk, discount=discount), literal(*forest, risk, discount))


@every_risk
@given(forest=forests(most=9), discount=discounts)
def test_gradient_is_the_product_of_weights_along_the_path(risk, forest, discount):
    values, *shape = forest
    jacobian = torch.autograd.functional.jacobian(
        lambda v: nested_risk_tree(v, *shape, risk, discount=discount), values
    )
    close(jacobian, path_weights(*forest, risk, discount))


@every_risk
def test_gradient_is_finite_differences(risk):
    """Of every node by every value; costs without ties, where all measures are differentiable."""
    parents = torch.tensor([3, -1, 1, 1, 3, 2, 2, 3, 5, 5, -1])
    probs = torch.tensor([0.2, 0, 0.6, 0.4, 0.3, 0.7, 0.3, 0.5, 0.25, 0.75, 0])
    values, *shape = tensors(torch.randn(11), probs, parents)
    shape[0][parents >= 0] /= torch.zeros(11, dtype=torch.float64, device=DEVICE).index_add(
        0, shape[1][parents >= 0], shape[0][parents >= 0]
    )[shape[1][parents >= 0]]
    call = lambda v: nested_risk_tree(v, *shape, risk, discount=0.8)
    assert torch.autograd.gradcheck(call, values.requires_grad_())


def test_discounted_by_hand():
    """Root 1 with children 4 (a leaf, 3/4) and 2 + ½·8 = 6 (1/4); mean 4.5; 1 + ½·4.5 = 3.25."""
    values, probs, parents = tensors([8.0, 1, 4, 2], [1.0, 0, 0.75, 0.25], [3, -1, 1, 1], torch.float32)
    assert nested_risk_tree(values, probs, parents, KL(), discount=0.5).tolist() == [8, 3.25, 4, 6]


LEAF_PROBS, NODES = [0.9, 0.1, 0.9, 0.1, 0.5, 0.5, 0], [4, 4, 5, 5, 6, 6, -1]
RETURNS = {"A": [0.4, 0.3, 0.7, 0.6, 0, 0, 0], "B": [0.4, 0.6, 0.7, 0.3, 0, 0, 0]}


@pytest.mark.parametrize(
    ("risk", "a", "b"),
    [
        (CVaR(1.0), 0.54, 0.54),
        (CVaR(0.97), 0.535052, 0.532820),
        (CVaR(0.9), 0.522222, 0.513580),
        (CVaR(0.5), 0.38, 0.40),
        (ERM(5), 0.485776, 0.485776),
    ],
)
def test_trees_with_one_return_law_and_two_nested_risks(risk, a, b):
    """Returns ½/½ then .9/.1; both trees have the law .4, .7 with .45 each and .3, .6 with .05 each."""
    for returns, expected in ((RETURNS["A"], a), (RETURNS["B"], b)):
        values, probs, parents = tensors(returns, LEAF_PROBS, NODES)
        assert -nested_risk_tree(-values, probs, parents, risk)[-1].item() == pytest.approx(expected, abs=5e-7)


# ---- laws ------------------------------------------------------------------------------------------------------------


def leaf_law(values, probs, parents) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Costs and probabilities of the leaves below every root."""
    parents, laws = parents.tolist(), {}
    for leaf in set(range(len(parents))) - set(parents):
        node, mass = leaf, 1.0
        while parents[node] >= 0:
            mass, node = mass * probs[node].item(), parents[node]
        laws.setdefault(node, []).append((values[leaf].item(), mass))
    return {root: tuple(torch.tensor(law, dtype=torch.float64).unbind(-1)) for root, law in laws.items()}


@pytest.mark.parametrize("risk", [KL(), ERM(0), ERM(0.05), ERM(2), ERM(-1)], ids=str)
@given(forest=forests(leaf_costs_only=True))
def test_nested_expectation_and_entropic_risk_are_those_of_the_leaves(risk, forest):
    nested = nested_risk_tree(*forest, risk)
    for root, (costs, mass) in leaf_law(*forest).items():
        assert nested[root].item() == pytest.approx(risk.value(costs, mass.log()).item(), abs=1e-10)


def test_nested_tail_risk_is_not_that_of_the_leaves():
    """The worst half of returns is .39 in both trees, the worst halves one after the other .38 and .40."""
    for returns, nested in ((RETURNS["A"], 0.38), (RETURNS["B"], 0.40)):
        forest = tensors([-value for value in returns], LEAF_PROBS, NODES)
        costs, mass = leaf_law(*forest)[6]
        assert CVaR(0.5).value(costs, mass.log()).item() == pytest.approx(-0.39, abs=1e-12)
        assert nested_risk_tree(*forest, CVaR(0.5))[6].item() == pytest.approx(-nested, abs=1e-12)


@averse_risk
@given(forest=forests(), increase=st.lists(st.floats(0, 5), min_size=14, max_size=14), discount=discounts)
def test_larger_costs_have_larger_risk(risk, forest, increase, discount):
    values, *shape = forest
    raised = values + torch.tensor(increase, device=DEVICE)[: len(values)]
    change = nested_risk_tree(raised, *shape, risk, discount=discount) - nested_risk_tree(
        values, *shape, risk, discount=discount
    )
    assert (change >= -1e-10).all()


@every_risk
@given(forest=forests(), shift=st.floats(-50, 50))
def test_a_constant_at_all_leaves_is_added_to_every_node(risk, forest, shift):
    values, probs, parents = forest
    leaf = torch.ones_like(values).index_fill(0, parents[parents >= 0], 0.0)
    shifted = nested_risk_tree(values + shift * leaf, probs, parents, risk)
    close(shifted, nested_risk_tree(*forest, risk) + shift)


@averse_risk
@given(forest=forests(), discount=discounts)
def test_risk_is_at_least_the_expectation(risk, forest, discount):
    excess = nested_risk_tree(*forest, risk, discount=discount) - nested_risk_tree(*forest, KL(), discount=discount)
    assert (excess >= -1e-10).all()


@every_risk
@given(forest=forests(), data=st.data())
def test_order_of_the_nodes_does_not_matter(risk, forest, data):
    values, probs, parents = forest
    order = torch.tensor(data.draw(st.permutations(range(len(values)))), device=DEVICE)  # new node i is old order[i]
    moved = order.argsort()[parents.clamp(min=0)].where(parents >= 0, -1)
    permuted = nested_risk_tree(values[order], probs[order], moved[order], risk)
    close(permuted, nested_risk_tree(*forest, risk)[order])


@every_risk
@given(trees=st.lists(forests(most=6), min_size=2, max_size=3))
def test_a_forest_is_its_trees(risk, trees):
    starts = [0, *torch.tensor([len(values) for values, _, _ in trees]).cumsum(0).tolist()]
    moved = [torch.where(p >= 0, p + start, p) for (_, _, p), start in zip(trees, starts, strict=False)]
    values, probs = (torch.cat([tree[i] for tree in trees]) for i in range(2))
    apart = torch.cat([nested_risk_tree(*tree, risk) for tree in trees])
    close(nested_risk_tree(values, probs, torch.cat(moved), risk), apart)


# ---- along a path ----------------------------------------------------------------------------------------------------


@every_risk
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_a_chain_is_nested_risk_along_it(risk, discount):
    """A single outcome has no risk: ρ(x) = x."""
    values, probs, parents = tensors(torch.randn(30), torch.ones(30), torch.arange(-1, 29))
    path = nested_risk(values, torch.tensor([0, 30], device=DEVICE), discount=discount)
    close(nested_risk_tree(values, probs, parents, risk, discount=discount), path.to_go)


@every_risk
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_where_all_outcomes_share_what_follows_it_is_nested_risk_of_the_steps(risk, discount):
    """Three tokens of vocabulary 3, every prefix continued in the same way: V_root = discount · total."""
    costs, probs = torch.randn(3, 3).double(), torch.randn(3, 3).double().softmax(-1)
    values, mass, parents, frontier = [0.0], [0.0], [-1], [0]
    for t in range(3):
        above, frontier = frontier, []
        for parent in above:
            frontier += range(len(values), len(values) + 3)
            values += costs[t].tolist()
            mass += probs[t].tolist()
            parents += [parent] * 3
    root = nested_risk_tree(*tensors(values, mass, parents), risk, discount=discount)[0]
    steps = nested_risk(risk.value(costs, probs.log()), torch.tensor([0, 3]), discount=discount)
    assert root.item() == pytest.approx(discount * steps.total.item(), abs=1e-12)


# ---- without mass, without end, deep, wide ---------------------------------------------------------------------------


@packaged_risk
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_an_outcome_without_mass_does_not_count(risk, poison):
    """Nor do those below it."""
    values, probs, parents = tensors([0.0, 1, 2, 0, poison], [0, 0.5, 0.5, 0, 1], [-1, 0, 0, 0, 3])
    nested = nested_risk_tree(values.requires_grad_(), probs, parents, risk)
    alone = nested_risk_tree(*tensors([0.0, 1, 2], [0, 0.5, 0.5], [-1, 0, 0]), risk)
    close(nested[0], alone[0])
    assert not nested[3].isfinite()
    (gradient,) = torch.autograd.grad(nested[0], values)
    assert gradient[0] == 1
    assert gradient[3] == 0


@packaged_risk
def test_an_infinite_cost_with_mass_is_infinite_above_and_nowhere_else(risk):
    values, probs, parents = tensors(
        [0.0, 1, 0, math.inf, 3, 0, 4], [0, 0.5, 0.5, 0.1, 0.9, 0, 1], [-1, 0, 0, 2, 2, -1, 5]
    )
    assert nested_risk_tree(values, probs, parents, risk).tolist() == [math.inf, 1, math.inf, math.inf, 3, 4, 4]


@pytest.mark.parametrize("discount", [1.0, 0.999])
@pytest.mark.parametrize("risk", [CVaR(0.97), ERM(0.05)], ids=str)
def test_a_deep_chain_keeps_its_digits(risk, discount):
    """5000 nodes in fp32: the nearest fp32 number to the exact one, and a gradient as exact."""
    exact = torch.randn(5000, device=DEVICE).double()
    path = nested_risk(exact, torch.tensor([0, 5000], device=DEVICE), discount=discount).to_go
    values = exact.float().requires_grad_()
    chain = torch.arange(-1, 4999, device=DEVICE)
    nested = nested_risk_tree(values, torch.ones(5000, device=DEVICE), chain, risk, discount=discount)
    assert nested.dtype == torch.float32
    torch.testing.assert_close(nested, path.float(), rtol=2**-23, atol=1e-9)
    (gradient,) = torch.autograd.grad(nested[0], values)
    expected = discount ** torch.arange(5000, device=DEVICE).double()
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-6, atol=0)


@every_risk
def test_a_wide_root_is_the_measure_itself(risk):
    """50 000 leaves."""
    x, log_probs = torch.randn(50_000).double(), torch.randn(50_000).double().log_softmax(-1)
    parents = torch.full((50_001,), 50_000).index_fill(0, torch.tensor(50_000), -1)
    values, probs, parents = tensors(torch.cat([x, x[:1]]), torch.cat([log_probs.exp(), x[:1]]), parents)
    nested = nested_risk_tree(values.requires_grad_(), probs, parents, risk)
    assert nested[-1].item() == pytest.approx((x[0] + risk.value(x, log_probs)).item(), abs=1e-9)
    (gradient,) = torch.autograd.grad(nested[-1], values)
    close(gradient[:-1].cpu(), risk.weights(x, log_probs), atol=1e-12)


def test_a_measure_is_shown_every_outcome_once_and_no_other():
    """One family of 20 000 beside 20 000 families of one and two: padded to one matrix they would be 4·10⁸ outcomes."""
    parents = torch.cat([torch.tensor([-1]), torch.zeros(20_001), torch.arange(1, 20_001), torch.arange(2, 20_001, 2)])
    parents = torch.cat([parents, torch.full((20_000,), 20_001)]).long()
    sizes = parents[1:].bincount(minlength=len(parents))
    probs = torch.cat([torch.zeros(1), 1 / sizes[parents[1:]].double()])
    worst, costs = WorstOutcome(), -1 - torch.rand(len(parents))  # below 0, which padding would hold
    nested = nested_risk_tree(*tensors(costs, probs, parents), worst)
    assert sorted(worst.shown) == [(1, 20_000), (1, 20_001), (10_000, 1), (10_000, 2)]
    assert nested[2].item() == pytest.approx((costs[2] + torch.maximum(costs[20_003], costs[40_002])).item(), abs=1e-6)
    assert nested.max() < -1


def test_rounding_in_probabilities_is_divided_out():
    """Thirds in fp32 do not sum to 1; a constant stays one over 40 levels all the same."""
    parents = [-1]
    for level in range(40):
        parents += [3 * level] * 3
    probs = torch.full((121,), 1 / 3)
    nested = nested_risk_tree(*tensors([7.0 * (i % 3 != 0 or i == 120) for i in range(121)], probs, parents), KL())
    assert nested[0].item() == pytest.approx(7, abs=1e-14)


# ---- shapes and refusals ---------------------------------------------------------------------------------------------


def test_no_nodes_and_roots_only():
    empty = nested_risk_tree(*tensors([], [], []), KL())
    assert empty.shape == (0,)
    values, probs, parents = tensors([3.0, 1], [math.nan, 0], [-1, -1])
    assert nested_risk_tree(values, probs, parents, CVaR(0.5)).tolist() == [3, 1]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_the_result_has_the_dtype_of_the_values(dtypes):
    values, probs, parents = tensors([0.0, 0.1, 0.2], [0, 0.25, 0.75], [-1, 0, 0])
    nested = nested_risk_tree(values.to(dtypes[0]), probs.to(dtypes[1]), parents, KL())
    assert nested.dtype == dtypes[0]
    assert nested[0].item() == pytest.approx(0.175, abs=1e-8)


@pytest.mark.parametrize(
    ("values", "probs", "parents", "message"),
    [
        ([0, 1.0], [0, 1.0], [-1, 2], r"parents lie in \[0, 2\), or are -1 at roots; got 2 at node 1"),
        ([0, 1.0], [0, 1.0], [-1, -2], r"parents lie in \[0, 2\), or are -1 at roots; got -2 at node 1"),
        ([0, 1.0], [0, 1.0], [-1, 1], r"parents lead from node 1 back to it, but every node has a root, of parent -1"),
        ([0.0] * 5, [1.0] * 5, [4, 3, 1, 2, 0], r"parents lead from node 0 back to it"),
        ([0.0] * 5, [1.0] * 5, [-1, 3, 1, 2, 1], r"parents lead from node 1 back to it"),
        ([0, 1.0, 2], [0, 0.5, 0.25], [-1, 0, 0], r"probs of the children of node 0 sum to 0\.75, not 1: divide each"),
        ([0, 1.0, 2], [0, 1, 0.5], [-1, 0, 1], r"probs of the children of node 1 sum to 0\.5, not 1"),
        ([0, 1.0, 2], [0, 0, 0], [-1, 0, 0], r"probs of the children of node 0 sum to 0, not 1"),
        ([0, 1.0], [0, math.inf], [-1, 0], r"probs of the children of node 0 sum to inf, not 1"),
        ([0, 1.0, 2], [0, 1.5, -0.5], [-1, 0, 0], r"probs are probabilities given the parent, got -0\.5 at node 2"),
        ([0, 1.0], [0, math.nan], [-1, 0], r"probs are probabilities given the parent, got nan at node 1"),
        ([0, 1.0], [0, 1.0], [-1], r"wants values, probs and parents \[n\], got \[2\], \[2\] and \[1\]"),
        ([0, 1.0], [1.0], [-1, 0], r"wants values, probs and parents \[n\], got \[2\], \[1\] and \[2\]"),
        ([[0.0]], [[1.0]], [[-1]], r"wants values, probs and parents \[n\], got \[1, 1\], \[1, 1\] and \[1, 1\]"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_forest_is_named(values, probs, parents, message, dtype):
    with pytest.raises(ValueError, match=message):
        nested_risk_tree(*tensors(values, probs, parents, dtype), KL())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_siblings_may_miss_one_by_rounding_only(dtype):
    for excess in (9e-5, -9e-5):
        nested_risk_tree(*tensors([0.0, 1, 2], [0, 0.5, 0.5 + excess], [-1, 0, 0], dtype), KL())
    for excess, total in ((1.1e-4, r"1\.00011"), (-1.1e-4, r"0\.99989")):
        with pytest.raises(ValueError, match=f"children of node 0 sum to {total}"):
            nested_risk_tree(*tensors([0.0, 1, 2], [0, 0.5, 0.5 + excess], [-1, 0, 0], dtype), KL())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, dtype=torch.bfloat16)}, "values are float32 or float64, got torch.bfloat16"),
        ({"probs": torch.ones(2, dtype=torch.int64)}, "probs are float32 or float64, got torch.int64"),
        (
            {"parents": torch.tensor([-1, 0], dtype=torch.int32)},
            "parents are int64 node numbers, -1 at a root, got torch.int32",
        ),
        ({"risk": None}, r"risk is a RiskMeasure such as CVaR\(tail=0.97\), got None"),
        ({"discount": 1.1}, r"discount lies in \[0, 1\], got 1.1"),
        ({"discount": -0.1}, r"discount lies in \[0, 1\], got -0.1"),
        ({"discount": math.nan}, r"discount lies in \[0, 1\], got nan"),
        ({"discount": "0.9"}, "discount is a number, got '0.9'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    fine = {"values": torch.zeros(2), "probs": torch.ones(2), "parents": torch.tensor([-1, 0]), "risk": KL()}
    with pytest.raises(ValueError, match=message):
        nested_risk_tree(**(fine | change))
