"""From hidden states: every strategy is the definition, keeps what it says, and makes the matrix products it says."""

from collections import Counter

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR, checks, linear, linear_token_risk
from test_ops import LEAVES, assert_within_naive_error, evaluate, head
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EPSILON = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["chunked", "triton"]
LEARNED = ["cache", "recompute"]  # strategies for a head that learns
every_impl = pytest.mark.parametrize("impl", IMPLS)
some_risks = pytest.mark.parametrize("risk", [KL(), CVaR(0.1), ERM(5), None], ids=str)


def on_device(case: dict) -> dict:
    return {name: t.to(DEVICE) for name, t in case.items()}


def compare(case: dict, risk, dtype: torch.dtype, leaves=LEAVES, ratio=None, **options) -> None:
    """Values and gradients against the definition in fp64, and no further from it than twice the definition in dtype."""
    case = on_device(case)
    upstream = torch.randn(3, case["labels"].shape[0], device=DEVICE)
    if ratio is not None:
        upstream[1], upstream[2] = ratio * upstream[0], 0.0
    exact_case = {k: t if k == "labels" else t.double() for k, t in case.items()}
    shared = {k: v for k, v in options.items() if k not in ("strategy", "workspace_bytes", "impl", "risk_over_logp")}
    exact = evaluate(exact_case, risk, upstream, leaves, impl="naive", **shared)
    naive = evaluate(case, risk, upstream, leaves, impl="naive", **shared)
    ours = evaluate(case, risk, upstream, leaves, **options)
    assert_within_naive_error(ours, naive, exact, EPSILON[dtype])


# ---- every strategy is the definition --------------------------------------------------------------------------------


@every_impl
@some_risks
@pytest.mark.parametrize("strategy", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_learns(impl, risk, strategy, dtype):
    compare(head(9, 129, dtype), risk, dtype, strategy=strategy, impl=impl)


@every_impl
@some_risks
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_is_frozen(impl, risk, strategy, dtype):
    compare(head(9, 129, dtype), risk, dtype, ("hidden",), strategy=strategy, impl=impl)


@every_impl
@pytest.mark.parametrize("risk", [KL(), CVaR(0.1), ERM(5)], ids=str)
@pytest.mark.parametrize("strategy", ["auto", *LEARNED, "frozen"])
@pytest.mark.parametrize("ratio", [0.0, -0.5])
def test_a_ratio_that_is_known(impl, risk, strategy, ratio):
    if isinstance(risk, KL):
        pytest.skip("kl is the risk: the third gradient would be part of the second")
    options = {"strategy": strategy, "risk_over_logp": ratio, "impl": impl}
    compare(head(9, 129), risk, torch.float32, ("hidden",), ratio=ratio, **options)


@every_impl
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_chunks_of_few_rows(impl, strategy):
    leaves = ("hidden",) if strategy == "frozen" else LEAVES
    compare(head(9, 33), CVaR(0.5), torch.float32, leaves, strategy=strategy, workspace_bytes=7000, impl=impl)


@every_impl
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_scale_and_softcap_and_entropy(impl, strategy):
    options = {"scale": 2.0, "softcap": 8.0, "ref_scale": 0.7, "ref_softcap": 6.0, "entropy": True, "impl": impl}
    leaves = ("hidden",) if strategy == "frozen" else LEAVES
    compare(head(9, 129), CVaR(0.5), torch.float32, leaves, strategy=strategy, **options)


@pytest.mark.parametrize("used", ["logp", "risk", "kl"])
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
@every_impl
def test_one_output_alone(impl, strategy, used):
    """kl has no part of its own in what a frozen head keeps: its gradient is made from new logits."""
    case, gradients = on_device(head(6, 33)), []
    for options in ({"impl": "naive"}, {"strategy": strategy, "impl": impl}):
        hidden = case["hidden"].clone().requires_grad_()
        states = (hidden, case["weight"], case["ref_hidden"], case["ref_weight"], case["labels"])
        stats = linear_token_risk(*states, CVaR(0.3), **options)
        gradients += torch.autograd.grad(getattr(stats, used).sum(), hidden)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=2e-5)


@every_impl
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_ignored_rows_are_harmless(impl, strategy):
    """nan in an ignored row, and nan coming back into it, reach nothing; nor does nan where every upstream is 0."""
    leaves = ("hidden",) if strategy == "frozen" else LEAVES
    case, upstream = on_device(head(7, 33)), torch.randn(3, 7, device=DEVICE)
    upstream[:, 4] = 0.0
    expected = evaluate(case, ERM(5), upstream, leaves, strategy=strategy, impl=impl)
    for name in ("hidden", "ref_hidden"):
        case[name][1], case[name][4] = torch.nan, torch.nan
    upstream[:, 1] = torch.nan
    ours = evaluate(case, ERM(5), upstream, leaves, strategy=strategy, impl=impl)
    for name in (f"d_{leaf}" for leaf in leaves):
        assert ours[name].isfinite().all(), name
        assert torch.equal(ours[name], expected[name]), name
    assert all((ours[name][1] == 0).all() for name in ("logp", "ref_logp", "risk", "kl", "d_hidden"))


@every_impl
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(impl, strategy, count):
    case, leaves = head(2, 7), ("hidden",) if strategy == "frozen" else LEAVES
    case = {k: t[1 - count : 1] if k in ("hidden", "ref_hidden", "labels") else t for k, t in case.items()}
    compare(case, CVaR(0.5), torch.float32, leaves, strategy=strategy, impl=impl)


@every_impl
@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_all_ignored_stays_connected(impl, strategy, ratio):
    """A distributed step would hang if one rank had no graph."""
    leaves = ("hidden",) if strategy == "frozen" else LEAVES
    case = on_device(head(5, 33))
    case["labels"][:] = -100
    upstream = torch.full((3, 5), torch.nan, device=DEVICE)
    result = evaluate(case, CVaR(0.5), upstream, leaves, strategy=strategy, risk_over_logp=ratio, impl=impl)
    assert all((t == 0).all() for t in result.values())


@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_hidden_states_and_weights_of_any_layout(strategy):
    leaves, upstream, case = ("hidden",) if strategy == "frozen" else LEAVES, torch.randn(3, 9), head(9, 33)
    case["hidden"], case["ref_hidden"] = (case[k][:1].expand(9, -1) for k in ("hidden", "ref_hidden"))
    expected = evaluate(case, CVaR(0.5), upstream, leaves, strategy=strategy, impl="chunked")
    views = dict(case)
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        views[name] = case[name].t().contiguous().t() if "hidden" in name else torch.cat([case[name]] * 2, 1)[:, ::2]
        views[name] = torch.empty_strided(case[name].shape, views[name].stride()).copy_(case[name])
    hidden = views["hidden"].requires_grad_()
    leaf = [hidden, *(views[k].requires_grad_() for k in leaves[1:])]
    states = (views[k] for k in ("hidden", "weight", "ref_hidden", "ref_weight", "labels"))
    options = {"bias": views["bias"], "ref_bias": views["ref_bias"], "strategy": strategy, "impl": "chunked"}
    stats = linear_token_risk(*states, CVaR(0.5), **options)
    loss = sum((u * o).sum() for u, o in zip(upstream, (stats.logp, stats.risk, stats.kl), strict=True))
    for name, gradient in zip(leaves, torch.autograd.grad(loss, leaf), strict=True):
        torch.testing.assert_close(gradient, expected[f"d_{name}"], rtol=0, atol=2e-5)


# ---- padded vocabularies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [*IMPLS, "naive"])
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_padding_is_as_if_it_were_not_there(impl, strategy):
    """Two models padded to different sizes: what is in the padding, even nan, reaches nothing, and gets gradient 0."""
    leaves = ("hidden",) if strategy == "frozen" else LEAVES
    cut, upstream = on_device(head(9, 50)), torch.randn(3, 9, device=DEVICE)
    padded = dict(cut)
    for name, surplus in (("weight", 14), ("bias", 14), ("ref_weight", 3), ("ref_bias", 3)):
        rest = torch.full((surplus, *cut[name].shape[1:]), torch.nan, device=DEVICE)
        padded[name] = torch.cat([cut[name], rest])
    expected = evaluate(cut, CVaR(0.5), upstream, leaves, strategy=strategy, impl=impl)
    ours = evaluate(padded, CVaR(0.5), upstream, leaves, strategy=strategy, impl=impl, valid_vocab=50)
    for name, truth in expected.items():
        assert torch.equal(ours[name][:50], truth), name
        assert (ours[name][50:] == 0).all(), name


@pytest.mark.parametrize(
    ("valid", "message"), [(7, "from 1 to 5, the columns there are, got 7"), (0, "got 0"), (True, "got True")]
)
def test_a_vocabulary_that_is_not_there_is_refused(valid, message):
    case = head(3, 5)
    with pytest.raises(ValueError, match=f"valid_vocab is an integer .*{message}"):
        linear_token_risk(case["hidden"], case["weight"], None, None, case["labels"], None, valid_vocab=valid)


def test_a_label_in_the_padding_is_refused():
    case = head(3, 9)
    case["labels"][0] = 6
    with pytest.raises(ValueError, match=r"label 6 at position 0 is outside the vocabulary \[0, 6\)"):
        linear_token_risk(case["hidden"], case["weight"], None, None, case["labels"], None, valid_vocab=6)


# ---- what a strategy keeps and costs ---------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch) -> Counter:
    """Matrix products by the rows that went in, counted where the operators make them."""
    made: Counter = Counter()

    def counted(function, at):
        def call(*args, **kwargs):
            made["all"] += 1
            return function(*args, **kwargs)

        return call

    for name in ("mm", "addmm"):
        monkeypatch.setattr(linear.torch, name, counted(getattr(torch, name), 0))
    monkeypatch.setattr(linear, "_add_outer", counted(linear._add_outer, 1))
    return made


@pytest.mark.parametrize(
    ("strategy", "ratio", "learned", "count"),
    [
        ("cache", None, True, 4),
        ("cache", None, False, 3),
        ("recompute", None, True, 6),
        ("recompute", None, False, 5),
        ("frozen", None, False, 4),
        ("frozen", 0.5, False, 3),
    ],
)
def test_matrix_products_of_a_strategy(strategy, ratio, learned, count, products, monkeypatch):
    monkeypatch.setattr(linear, "_add_outer", lambda *a, **k: products.update(all=1))
    case, leaves = head(9, 33), ("hidden", "weight") if learned else ("hidden",)
    states = {k: t.requires_grad_(k in leaves) for k, t in case.items()}
    names = ("hidden", "weight", "ref_hidden", "ref_weight", "labels")
    stats = linear_token_risk(*(states[k] for k in names), CVaR(0.5), strategy=strategy, risk_over_logp=ratio)
    (stats.logp.sum() + 0.5 * stats.risk.sum()).backward()
    assert products["all"] == count


@pytest.mark.parametrize("strategy", LEARNED)
@every_impl
def test_backward_twice(impl, strategy):
    """Kept logits become their own gradient; a second run makes them again, bitwise the same."""
    case = on_device(head(9, 65))
    leaves = [case[k].requires_grad_() for k in ("hidden", "weight")]
    states = (*leaves, case["ref_hidden"], case["ref_weight"], case["labels"])
    stats = linear_token_risk(*states, CVaR(0.3), strategy=strategy, impl=impl)
    loss = (stats.logp - 0.5 * stats.risk).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for again in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_second_derivatives_are_refused(strategy, ratio):
    """What is kept is a constant to autograd, so that its derivatives would be wrong or 0; the first ones are right."""
    case = head(9, 65)
    leaves = [case[k].requires_grad_() for k in (("hidden",) if strategy == "frozen" else ("hidden", "weight"))]
    states = (case[k] for k in ("hidden", "weight", "ref_hidden", "ref_weight", "labels"))
    stats = linear_token_risk(*states, CVaR(0.3), strategy=strategy, risk_over_logp=ratio)
    loss = (stats.logp + 0.5 * stats.risk).square().sum() if ratio is None else (stats.logp + 0.5 * stats.risk).sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    with pytest.raises(RuntimeError, match="first derivatives only, .* leave out create_graph=True, or detach"):
        torch.autograd.grad(gradients[0].sum(), leaves)


def test_outputs_one_after_the_other():
    """Each output's own backward, while the graph is retained, gives parts that sum to the whole."""
    case = head(9, 65)
    hidden = case["hidden"].requires_grad_()
    stats = linear_token_risk(
        hidden, case["weight"], case["ref_hidden"], case["ref_weight"], case["labels"], ERM(5), strategy="cache"
    )
    parts = [torch.autograd.grad(o.sum(), hidden, retain_graph=True)[0] for o in (stats.logp, stats.risk, stats.kl)]
    (whole,) = torch.autograd.grad(stats.logp.sum() + stats.risk.sum() + stats.kl.sum(), hidden)
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-5)


def test_a_frozen_strategy_for_a_head_that_learns_is_refused():
    case = head(3, 5)
    weight = case["weight"].requires_grad_()
    with pytest.raises(ValueError, match="strategy='frozen' gives no gradient to the head, but its weight or bias"):
        linear_token_risk(case["hidden"], weight, None, None, case["labels"], None, strategy="frozen")
    with pytest.raises(ValueError, match="strategy is one of auto, cache, recompute, frozen, got 'fast'"):
        linear_token_risk(case["hidden"], weight, None, None, case["labels"], None, strategy="fast")


@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_a_broken_promise_is_named(strategy):
    case = head(4, 9)
    hidden = case["hidden"].requires_grad_()
    states = (hidden, case["weight"], case["ref_hidden"], case["ref_weight"], case["labels"])
    stats = linear_token_risk(*states, CVaR(0.5), strategy=strategy, risk_over_logp=torch.full((4,), 0.5))
    kept = (stats.logp + 0.5 * stats.risk).sum()
    broken = (stats.logp + torch.tensor([0.5, 9.0, 0.7, 0.5]) * stats.risk).sum()  # the second label is ignored
    torch.autograd.grad(kept, hidden, retain_graph=True)
    with pytest.raises(
        ValueError, match=r"risk_over_logp is 0.5 at position 2, but the gradients .* are 0.7 and 1: pass"
    ):
        torch.autograd.grad(broken, hidden)


@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_a_gradient_that_is_not_finite_breaks_no_promise(strategy):
    """nan in one of the two gradients, as of a loss that overflowed, is nan in the result, and not lost."""
    case = head(6, 9)
    hidden = case["hidden"].requires_grad_()
    states = (hidden, case["weight"], case["ref_hidden"], case["ref_weight"], case["labels"])
    stats = linear_token_risk(*states, CVaR(0.5), strategy=strategy, risk_over_logp=0.5)
    given = torch.ones(6), torch.full((6,), 0.5)
    given[1][2], given[0][3] = torch.nan, torch.nan
    given[0][4], given[1][4] = torch.inf, torch.inf
    (gradient,) = torch.autograd.grad((stats.logp, stats.risk), hidden, given)
    assert gradient[2:5].isnan().all()
    assert gradient[[0, 1, 5]].isfinite().all()


def test_a_ratio_is_fp32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        assert checks.ratio(0.5, torch.tensor([1, 2]), KL()).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("0.5", "risk_over_logp is a number, got '0.5'"),
        (torch.ones(3), r"floats \[N\] = \[4\] on cpu, got torch.float32 \[3\] on cpu"),
        (torch.ones(4, dtype=torch.int64), r"got torch.int64 \[4\]"),
        (torch.ones(4, device="meta"), r"on cpu, got torch.float32 \[4\] on meta"),
    ],
    ids=str,
)
def test_a_ratio_that_is_none_is_named(ratio, message):
    case = head(4, 9)
    states = (case["hidden"], case["weight"], case["ref_hidden"], case["ref_weight"], case["labels"])
    with pytest.raises(ValueError, match=message):
        linear_token_risk(*states, KL(), risk_over_logp=ratio)
    with pytest.raises(ValueError, match="risk=None: leave it out"):
        linear_token_risk(*states, None, risk_over_logp=1.0)


# ---- with the rest of torch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
@pytest.mark.parametrize("reentrant", [True, False])
@every_impl
def test_activation_checkpointing(impl, strategy, reentrant):
    case = on_device(head(9, 65))
    hidden = case["hidden"].requires_grad_()
    leaves = [hidden] if strategy == "frozen" else [hidden, case["weight"].requires_grad_()]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        states = (2 * hidden, weight, case["ref_hidden"], case["ref_weight"], case["labels"])
        stats = linear_token_risk(*states, CVaR(0.3), strategy=strategy, impl=impl)
        return (stats.logp - stats.risk).sum()

    expected = torch.autograd.grad(loss(hidden, case["weight"]), leaves)
    checkpoint(loss, hidden, case["weight"], use_reentrant=reentrant).backward()
    assert all(torch.equal(leaf.grad, truth) for leaf, truth in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
@every_impl
def test_compiles_without_a_graph_break(impl, strategy):
    case = on_device(head(9, 33))
    hidden = case["hidden"].requires_grad_()
    leaves = [hidden] if strategy == "frozen" else [hidden, case["weight"].requires_grad_()]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        states = (hidden, weight, case["ref_hidden"], case["ref_weight"], case["labels"])
        stats = linear_token_risk(*states, CVaR(0.5), strategy=strategy, risk_over_logp=-0.5, impl=impl)
        return (stats.logp - 0.5 * stats.risk).sum()

    expected = torch.autograd.grad(loss(hidden, case["weight"]), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        gradients = torch.autograd.grad(compiled(hidden, case["weight"]), leaves)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_compiled_code_uses_what_it_kept(strategy, monkeypatch):
    """Only "recompute" makes logits in backward again."""
    made, projections = [], linear._projections
    monkeypatch.setattr(linear, "_projections", lambda *a: made.append(1) or projections(*a))
    case = head(9, 33)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_(strategy != "frozen")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = linear_token_risk(
            hidden, weight, case["ref_hidden"], case["ref_weight"], case["labels"], CVaR(0.5), strategy=strategy
        )
        return (stats.logp - 0.5 * stats.risk).sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight).backward()
    assert len(made) == (2 if strategy == "recompute" else 1)


@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_autocast_is_the_cast_by_hand(strategy):
    case, upstream = head(9, 65), torch.randn(3, 9)
    leaves = ("hidden",) if strategy == "frozen" else LEAVES
    by_hand = {k: t if k == "labels" else t.bfloat16() for k, t in case.items()}
    expected = evaluate(by_hand, KL(), upstream, leaves, strategy=strategy, impl="chunked")
    with torch.autocast("cpu", torch.bfloat16):
        automatic = evaluate(case, KL(), upstream, leaves, strategy=strategy, impl="chunked")
    for name, truth in expected.items():
        assert torch.equal(automatic[name], truth.float()), name


@every_impl
@pytest.mark.parametrize("strategy", [*LEARNED, "frozen"])
def test_two_runs_are_bitwise_equal(impl, strategy):
    leaves = ("hidden",) if strategy == "frozen" else LEAVES
    case, upstream = on_device(head(9, 129)), torch.randn(3, 9, device=DEVICE)
    first, second = (evaluate(case, CVaR(0.3), upstream, leaves, strategy=strategy, impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_of_two_dtypes():
    """A reference in half the memory: the policy's dtype is its own."""
    case = head(9, 65)
    case |= {k: case[k].bfloat16() for k in ("ref_hidden", "ref_weight", "ref_bias")}
    rounded = {k: t.float() if t.is_floating_point() else t for k, t in case.items()}
    upstream = torch.randn(3, 9)
    for strategy in LEARNED:
        ours, expected = (evaluate(c, KL(), upstream, strategy=strategy, impl="chunked") for c in (case, rounded))
        assert ours["d_weight"].dtype == torch.float32
        # the products of the reference are rounded to bf16
        assert (ours["ref_logp"] - expected["ref_logp"]).abs().max() < 0.1
