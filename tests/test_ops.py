"""The operators: chunked equals the definition within rounding, gradients included, at every awkward shape and row."""

import logging
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from rsa_kernels import (
    ERM,
    KL,
    CVaR,
    RiskMeasure,
    TokenStats,
    dispatch,
    linear,
    linear_token_risk,
    logits,
    nested_risk,
    rows,
    token_risk,
)
from rsa_kernels.pairs import RowOptions
from rsa_kernels.quantile import tail_threshold
from torch import Tensor

RISKS = [KL(), CVaR(0.97), CVaR(0.5), CVaR(0.1), CVaR(0.01), CVaR(1.0), ERM(0), ERM(1e-4), ERM(0.1), ERM(1), ERM(5)]
RISKS += [ERM(9), ERM(-1), None]
every_risk = pytest.mark.parametrize("risk", RISKS, ids=str)
some_risks = pytest.mark.parametrize("risk", [KL(), CVaR(0.5), ERM(5), None], ids=str)
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float64: 1e-12}
TINY = 1  # bytes: one row per chunk


@dataclass(frozen=True)
class HalfMean(RiskMeasure):
    """A measure that defines no more than it must: mean and worst fifth in equal parts."""

    share: float = 0.5

    def weights(self, x, log_probs):
        return (1 - self.share) * log_probs.exp() + self.share * CVaR(0.2).weights(x, log_probs)

    def value(self, x, log_probs):
        return (self.weights(x, log_probs) * x).sum(-1)


def head(n: int, v: int, dtype: torch.dtype = torch.float32, h: int = 16, r: int = 24) -> dict[str, Tensor]:
    """Hidden states and heads of a policy near its reference; the second label is ignored."""
    base, weight = torch.randn(n, h), torch.randn(v, h)
    stretch = torch.randn(h, r) / h**0.5
    labels = torch.randint(0, v, (n,))
    labels[1:2] = -100
    tensors = {
        "hidden": base,
        "weight": weight,
        "ref_hidden": base @ stretch,
        "ref_weight": weight @ torch.linalg.pinv(stretch).T + 0.1 * torch.randn(v, r),
        "bias": torch.randn(v),
        "ref_bias": torch.randn(v),
    }
    return {name: t.to(dtype) for name, t in tensors.items()} | {"labels": labels}


LEAVES = ("hidden", "weight", "bias")


def evaluate(case: dict, risk, upstream: Tensor, leaves=LEAVES, **options) -> dict[str, Tensor]:
    """Values, and gradients of Σ upstream · (logp, risk, kl), by name."""
    case = {k: t.detach().clone().requires_grad_(k in leaves) for k, t in case.items()}
    names = ("hidden", "weight", "ref_hidden", "ref_weight", "labels")
    stats = linear_token_risk(*(case[k] for k in names), risk, bias=case["bias"], ref_bias=case["ref_bias"], **options)
    outputs = {k: v for k, v in stats._asdict().items() if v is not None}
    used = [outputs[k] for k in ("logp", "risk", "kl") if k in outputs]
    loss = sum((u.to(o.dtype) * o).sum() for u, o in zip(upstream, used, strict=False))
    grads = torch.autograd.grad(loss, [case[k] for k in leaves])
    return {k: v.detach() for k, v in outputs.items()} | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}


def assert_within_naive_error(ours: dict, naive: dict, exact: dict, epsilon: float) -> None:
    """|ours − exact| ≤ 2 |naive in the same dtype − exact| + ε in the largest entry, for every value and gradient."""
    assert ours.keys() == naive.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        if not truth.numel():
            continue
        error, allowed = ((x[name].double() - truth).abs().max().item() for x in (ours, naive))
        assert error <= 2 * allowed + epsilon, f"{name}: off by {error:.2e}, naive by {allowed:.2e}"


def compare(case: dict, risk, dtype: torch.dtype, workspace_bytes: int | None = None, **options) -> None:
    upstream = torch.randn(3, case["labels"].shape[0])
    exact_case = {k: t if k == "labels" else t.double() for k, t in case.items()}
    exact = evaluate(exact_case, risk, upstream, impl="naive", **options)
    naive = evaluate(case, risk, upstream, impl="naive", **options)
    ours = evaluate(case, risk, upstream, impl="chunked", workspace_bytes=workspace_bytes, **options)
    assert_within_naive_error(ours, naive, exact, EPSILON[dtype])


# ---- agreement with the definition -----------------------------------------------------------------------------------


@every_risk
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_chunked_is_the_definition(risk, dtype):
    compare(head(19, 129, dtype), risk, dtype)


@some_risks
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_every_shape(risk, vocabulary, count):
    compare(head(count, vocabulary), risk, torch.float32, workspace_bytes=TINY if count == 33 else None)


@pytest.mark.parametrize("tail", [0.97, 0.5, 0.1, 0.01])
def test_block_large_enough_for_the_threshold_search(tail, monkeypatch):
    searched = []
    monkeypatch.setattr(rows, "tail_threshold", lambda *a: searched.append(a) or tail_threshold(*a))
    compare(head(67, 1000), CVaR(tail), torch.float32)
    assert len(searched) == 1


@some_risks
@pytest.mark.parametrize(
    "options",
    [{"scale": 0.5}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 8.0, "ref_scale": 0.7, "ref_softcap": 6.0}],
    ids=str,
)
def test_scale_and_softcap(risk, options):
    compare(head(9, 129), risk, torch.float32, entropy=True, **options)


def rows_of_logits(kind: str) -> tuple[Tensor, Tensor]:
    z = torch.randn(6, 200)
    r = z + 0.3 * torch.randn(6, 200)
    if kind == "saturated":
        z, r = 30 * z.sign(), 30 * r.sign()
    elif kind == "huge":
        z, r = 1e4 * z.sign() + z, 1e4 * z.sign() + r
    elif kind == "ties":
        z, r = z.round(), z.round() + torch.randint(0, 3, r.shape)
    elif kind == "peaked":
        z[:, 3], r[:, 3] = 25, 25
    elif kind == "offset":
        z, r = z + 1000, r - 1000
    elif kind == "masked":
        z[:, 150:], r[:, 150:] = -torch.inf, -torch.inf
    elif kind == "equal":
        r = z.clone()
    return z, r


ROW_KINDS = ["plain", "saturated", "huge", "ties", "peaked", "offset", "masked", "equal"]


@every_risk
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_awkward_rows(risk, kind):
    z, r = rows_of_logits(kind)
    labels = torch.tensor([0, 3, 100, -100, 149, 7])
    results = []
    for dtype, impl in ((torch.float32, "chunked"), (torch.float32, "naive"), (torch.float64, "naive")):
        leaf = z.to(dtype).requires_grad_()
        stats = token_risk(leaf, r.to(dtype), labels, risk, entropy=True, impl=impl)
        loss = sum(
            (w * o).sum()
            for w, o in zip((1.0, 0.7, -0.3), (stats.logp, stats.risk, stats.kl), strict=True)
            if o is not None
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        values = {k: v.detach() for k, v in stats._asdict().items() if v is not None}
        results.append(values | {"d_policy_logits": gradient})
    assert all(t.isfinite().all() for t in results[0].values())
    assert_within_naive_error(*results, epsilon=1e-6)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_risk
def test_policy_at_reference_has_no_risk_and_no_gradient(risk, dtype, impl):
    case = head(12, 1000, dtype)
    case |= {"ref_hidden": case["hidden"], "ref_weight": case["weight"], "ref_bias": case["bias"]}
    upstream = torch.stack([torch.zeros(12), torch.ones(12), torch.ones(12)])
    result = evaluate(case, risk, upstream, impl=impl)
    torch.testing.assert_close(result["logp"], result["ref_logp"], rtol=0, atol=0)
    if risk is not None:
        assert result["risk"].abs().max() <= 1e-7
        assert result["kl"].abs().max() <= 1e-7
    z = (case["hidden"] @ case["weight"].T).float().requires_grad_()
    stats = token_risk(z, z.detach(), case["labels"], risk, impl=impl)
    if risk is not None:
        for output in (stats.risk, stats.kl):
            (gradient,) = torch.autograd.grad(output.sum(), z, retain_graph=True)
            # autograd of the definition multiplies the softmax by a rounded sum of the weights
            assert gradient.abs().max() <= (1e-7 if impl == "chunked" else 2.4e-7)


@pytest.mark.parametrize("risk", [r for r in RISKS if r], ids=str)
def test_gradient_is_softmax_minus_weights(risk):
    z = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    r = torch.randn(5, 40, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(token_risk(z, r, torch.zeros(5, dtype=torch.int64), risk).risk.sum(), z)
    weights = risk.weights(r.log_softmax(-1) - z.detach().log_softmax(-1), r.log_softmax(-1))
    torch.testing.assert_close(gradient, z.detach().softmax(-1) - weights, rtol=0, atol=1e-12)


@every_risk
@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_gradients_are_finite_differences(risk, impl):
    case = {k: t if k == "labels" else t.double() for k, t in head(4, 9, h=3, r=3).items()}
    leaves = [case[k].requires_grad_() for k in LEAVES]

    def outputs(hidden, weight, bias):
        reference = (case["ref_hidden"], case["ref_weight"], case["labels"])
        options = {"bias": bias, "ref_bias": case["ref_bias"], "scale": 0.8, "softcap": 6.0, "impl": impl}
        stats = linear_token_risk(hidden, weight, *reference, risk, workspace_bytes=TINY, **options)
        return [s for s in stats if s is not None and s.requires_grad]

    assert torch.autograd.gradcheck(outputs, leaves)


def test_entropy_is_that_of_the_policy():
    z = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    stats = token_risk(z, torch.randn(4, 50).double(), torch.tensor([1, 2, -100, 3]), KL(), entropy=True)
    expected = torch.distributions.Categorical(logits=z.detach()).entropy()
    expected[2] = 0
    torch.testing.assert_close(stats.entropy, expected, rtol=0, atol=1e-12)
    assert not stats.entropy.requires_grad


def test_measure_of_a_user_runs_chunked():
    compare(head(19, 129), HalfMean(), torch.float32, workspace_bytes=TINY)


def test_kl_risk_is_kl():
    stats = token_risk(*rows_of_logits("plain"), torch.zeros(6, dtype=torch.int64), KL())
    assert torch.equal(stats.risk, stats.kl)


def test_leading_shape_is_kept():
    z, r, labels = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    stats, flat = token_risk(z, r, labels, KL()), token_risk(z.view(6, 7), r.view(6, 7), labels.view(6), KL())
    assert torch.equal(stats.risk, flat.risk.view(2, 3))
    assert torch.equal(stats.logratio, (flat.logp - flat.ref_logp).view(2, 3))


# ---- the policy alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_policy_alone_is_log_softmax(impl):
    case = head(6, 50)
    hidden = case["hidden"].requires_grad_()
    stats = linear_token_risk(hidden, case["weight"], None, None, case["labels"], None, impl=impl)
    logits = hidden.detach().double() @ case["weight"].double().T
    expected = logits.log_softmax(-1).gather(1, case["labels"].clamp(min=0)[:, None])[:, 0]
    expected[1] = 0
    torch.testing.assert_close(stats.logp.detach().double(), expected, rtol=0, atol=2e-6)
    assert stats.risk is None
    assert stats.kl is None
    assert (stats.ref_logp == 0).all()
    assert stats.logp.requires_grad


def test_risk_without_reference_is_refused():
    case = head(3, 5)
    with pytest.raises(ValueError, match=r"risk=KL\(\) compares with a reference"):
        linear_token_risk(case["hidden"], case["weight"], None, None, case["labels"], KL())
    with pytest.raises(ValueError, match="ref_bias is part of a reference"):
        linear_token_risk(case["hidden"], case["weight"], None, None, case["labels"], None, ref_bias=case["ref_bias"])
    with pytest.raises(ValueError, match="come together"):
        linear_token_risk(case["hidden"], case["weight"], case["ref_hidden"], None, case["labels"], None)


# ---- ignored rows, partial gradients, chunks -------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@some_risks
def test_ignored_rows_are_zero_and_harmless(risk, impl):
    """nan in the inputs of an ignored row, and nan coming back into it, reach nothing."""
    case = head(7, 33)
    clean = {k: t.clone() for k, t in case.items()}
    case["hidden"][1], case["ref_hidden"][1] = torch.nan, torch.nan
    upstream = torch.randn(3, 7)
    poisoned = upstream.clone()
    poisoned[:, 1] = torch.nan
    ours, expected = evaluate(case, risk, poisoned, impl=impl), evaluate(clean, risk, upstream, impl=impl)
    for name, truth in expected.items():
        assert torch.equal(ours[name], truth), name
    assert all(ours[name][1] == 0 for name in ("logp", "ref_logp", "risk", "kl") if name in ours)
    assert (ours["d_hidden"][1] == 0).all()


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_logits_of_ignored_rows_may_be_nan(impl):
    z, r = torch.randn(3, 9), torch.randn(3, 9)
    z[1], r[1] = torch.nan, torch.inf
    z.requires_grad_()
    stats = token_risk(z, r, torch.tensor([0, -100, 4]), CVaR(0.5), entropy=True, impl=impl)
    (gradient,) = torch.autograd.grad((stats.risk + stats.logp + stats.kl).sum(), z)
    assert all(s[1] == 0 for s in stats)
    assert (gradient[1] == 0).all()
    assert gradient[[0, 2]].isfinite().all()


@some_risks
@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_all_ignored_stays_connected(risk, impl):
    """A distributed step would hang if one rank had no graph."""
    case = head(5, 33)
    case["labels"][:] = -100
    result = evaluate(case, risk, torch.ones(3, 5), impl=impl)
    assert all((t == 0).all() for t in result.values())


@some_risks
def test_rows_without_upstream_get_exact_zeros(risk):
    """0 · nan is nan: only a row that is left out lets nan there reach nothing."""
    case, upstream = head(6, 33), torch.randn(3, 6)
    upstream[:, 3] = 0
    expected = evaluate(case, risk, upstream)
    case["hidden"][3], case["ref_hidden"][3] = torch.nan, torch.nan
    ours = evaluate(case, risk, upstream)
    assert (ours["d_hidden"][3] == 0).all()
    for name in ("d_hidden", "d_weight", "d_bias"):
        assert ours[name].isfinite().all(), name
        assert torch.equal(ours[name], expected[name]), name


@some_risks
@pytest.mark.parametrize("leaves", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_partial_gradients_are_the_full_ones(risk, leaves):
    """A frozen head wants no weight gradient, a frozen backbone no hidden gradient."""
    case, upstream = head(8, 65), torch.randn(3, 8)
    full, partial = (evaluate(case, risk, upstream, wanted, strategy="recompute") for wanted in (LEAVES, leaves))
    for name in leaves:
        assert torch.equal(partial[f"d_{name}"], full[f"d_{name}"]), name


@some_risks
@pytest.mark.parametrize("used", ["logp", "risk", "kl"])
def test_one_output_alone_can_be_differentiated(risk, used):
    if risk is None and used != "logp":
        pytest.skip("risk=None has no such output")
    case, gradients = head(6, 33), []
    for impl in ("naive", "chunked"):
        hidden = case["hidden"].clone().requires_grad_()
        stats = linear_token_risk(
            hidden, case["weight"], case["ref_hidden"], case["ref_weight"], case["labels"], risk, impl=impl
        )
        gradients.append(torch.autograd.grad(getattr(stats, used).sum(), hidden)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=2e-5)


@some_risks
def test_chunk_size_does_not_matter(risk):
    case, upstream = head(150, 129, torch.float64), torch.randn(3, 150)
    whole = evaluate(case, risk, upstream, workspace_bytes=2**30)
    for count in (1, 7, 64, 128):
        budget = count * 129 * 2 * (8 + rows.BYTES_PER_LOGIT)
        parts = evaluate(case, risk, upstream, workspace_bytes=budget)
        for name, truth in whole.items():
            assert (parts[name] - truth).abs().max() <= 1e-11, (name, count)


@pytest.mark.parametrize("tail", [0.97, 0.5, 0.1, 0.01])
def test_logits_in_chunks_are_bitwise_the_same(tail, monkeypatch):
    """Rows are independent: without matrix products not a bit may change, though whole blocks are searched for the
    threshold and single rows sorted. At tail .97, sums in another order lead one of these rows to a neighbour."""
    searched = []
    monkeypatch.setattr(rows, "tail_threshold", lambda *a: searched.append(a[0].x.shape) or tail_threshold(*a))
    torch.manual_seed(9)
    z, r, labels = 4 * torch.randn(64, 4099), 4 * torch.randn(64, 4099), torch.randint(0, 4099, (64,))
    results = []
    for budget in (2**30, TINY):
        monkeypatch.setitem(rows.BLOCK_BYTES, "cpu", budget)
        leaf = z.clone().requires_grad_()
        stats = token_risk(leaf, r, labels, CVaR(tail))
        results.append((*stats[:4], *torch.autograd.grad((stats.logp + stats.risk - stats.kl).sum(), leaf)))
    assert searched == [(64, 4099)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_outcomes_closer_than_any_number_the_search_divides_by():
    """Log-ratios of 1e-33: the search for the threshold cannot tell them apart, a sort can."""
    z, r, labels = 1e-33 * torch.randn(80, 1000), 1e-33 * torch.randn(80, 1000), torch.zeros(80, dtype=torch.int64)
    gradients = []
    for impl in ("naive", "chunked"):
        leaf = z.clone().requires_grad_()
        stats = token_risk(leaf, r, labels, CVaR(0.5), impl=impl)
        assert stats.risk.abs().max() <= 1e-7
        gradients += torch.autograd.grad(stats.risk.sum(), leaf)
    assert (gradients[0] != 0).all()  # weights 2p or 0 against q = p
    torch.testing.assert_close(*gradients, rtol=0, atol=5e-7)


@pytest.mark.parametrize(("count", "vocabulary", "workspace_bytes"), [(70, 129, TINY), (67, 1000, None)])
def test_every_element_is_written(count, vocabulary, workspace_bytes):
    """Fresh memory filled with nan: what nobody writes shows. The second block is large enough for the search."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.zeros(()).new_empty(3).isnan().all()
        compare(head(count, vocabulary), CVaR(0.5), torch.float32, workspace_bytes=workspace_bytes)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_are_left_alone():
    case = head(9, 33)
    before = {k: t.clone() for k, t in case.items()}
    z, r = torch.randn(9, 33), torch.randn(9, 33)
    z_before, r_before = z.clone(), r.clone()
    evaluate(case, CVaR(0.5), torch.randn(3, 9), scale=0.5, softcap=4.0)
    leaf = z.requires_grad_()
    token_risk(leaf, r, case["labels"], ERM(5), scale=0.5, softcap=4.0).risk.sum().backward()
    assert all(torch.equal(case[k], before[k]) for k in case)
    assert torch.equal(z.detach(), z_before)
    assert torch.equal(r, r_before)


# ---- autocast, operators, compiler -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_autocast_is_the_cast_by_hand(impl):
    case, upstream = head(9, 65), torch.randn(3, 9)
    by_hand = evaluate({k: t if k == "labels" else t.bfloat16() for k, t in case.items()}, KL(), upstream, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = evaluate(case, KL(), upstream, impl=impl)
    assert torch.equal(automatic["risk"], by_hand["risk"])
    assert automatic["d_weight"].dtype == torch.float32
    torch.testing.assert_close(automatic["d_weight"], by_hand["d_weight"].float(), rtol=0, atol=0)


@some_risks
def test_operators_keep_their_contract(risk):
    """Schema, fakes and autograd registration, by torch's own checker."""
    case = head(5, 9)
    options = RowOptions(risk, 1.0, 1.0, None, None, -100, True).encode()
    tensors = [case[k].requires_grad_(k in LEAVES) for k in ("hidden", "weight", "bias", "ref_hidden", "ref_weight")]
    arguments = (*tensors, case["ref_bias"], case["labels"], None, options, "chunked", "recompute", 2, 9)
    torch.library.opcheck(linear._forward, arguments)
    z, r = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    torch.library.opcheck(logits._forward, (z, r, case["labels"], 9, options, "chunked"))


def test_compiles_without_a_graph_break():
    case = head(9, 33)

    def loss(hidden, weight):
        stats = linear_token_risk(hidden, weight, case["ref_hidden"], case["ref_weight"], case["labels"], CVaR(0.5))
        return (stats.logp - stats.risk).sum()

    leaves = [case[k].requires_grad_() for k in ("hidden", "weight")]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_second_derivatives_are_refused():
    z, labels = torch.randn(4, 9, requires_grad=True), torch.randint(0, 9, (4,))
    loss = token_risk(z, torch.randn(4, 9), labels, KL()).risk.square().sum()
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(loss, z, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="first derivatives only, .* leave out create_graph=True"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    """A custom operator drops tangents without a word: the derivative would be 0."""
    z, r, labels = torch.randn(4, 9), torch.randn(4, 9), torch.randint(0, 9, (4,))

    def logp(impl):
        return torch.func.jvp(lambda z: token_risk(z, r, labels, None, impl=impl).logp, (z,), (z,))[1]

    assert (logp("naive") != 0).all()
    with pytest.raises(RuntimeError, match="no forward-mode derivative .* use impl='naive'"):
        logp("chunked")
    hidden, weight = torch.randn(4, 3), torch.randn(9, 3)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda w: linear_token_risk(hidden, w, None, None, labels, None).logp, (weight,), (weight,))


def test_compiles_again_for_other_numbers():
    """Dynamo makes a symbol of a number that changes between calls; the operators take constants."""
    z, r, labels = torch.randn(4, 9), torch.randn(4, 9), torch.randint(0, 9, (4,))

    def risk(measure, scale):
        return token_risk(z, r, labels, measure, scale=scale, softcap=9 * scale).risk

    compiled = torch.compile(risk, fullgraph=True, backend="aot_eager")
    for tail, scale in ((0.5, 1.0), (0.25, 0.7), (0.1, 0.3)):
        assert torch.equal(compiled(CVaR(tail), scale), risk(CVaR(tail), scale))
        assert torch.equal(compiled(HalfMean(tail), scale), risk(HalfMean(tail), scale))


# ---- the choice of an implementation ---------------------------------------------------------------------------------


def call(**options) -> TokenStats:
    return token_risk(torch.randn(2, 5), torch.randn(2, 5), torch.tensor([0, 1]), KL(), **options)


@pytest.mark.parametrize(
    ("tensor", "risk", "reason"),
    [
        (torch.zeros(1), KL(), "the tensors are on cpu, where the kernels run in Triton's interpreter only"),
        (torch.zeros(1, device="meta"), KL(), "the tensors are on meta, for which there are no kernels"),
    ],
    ids=str,
)
def test_explicit_triton_says_why_it_cannot_run(tensor, risk, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert reason in dispatch.why_not_triton(tensor, risk)
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot run here: {re.escape(reason)}.*Use impl='auto' or"):
        dispatch.resolve("triton", tensor, risk)
    assert dispatch.resolve("auto", tensor, risk) == "chunked"


@pytest.mark.parametrize(
    ("tensor", "risk", "reason"),
    [
        (torch.zeros(1, dtype=torch.float64), KL(), "the kernels take float32, bfloat16, float16, not float64"),
        (torch.zeros(1), HalfMean(), "no kernel knows the risk measure HalfMean"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_know_is_named(tensor, risk, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match=reason):
        dispatch.resolve("triton", tensor, risk)


def test_without_triton_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(dispatch, "_INSTALLED", False)
    assert dispatch.why_not_triton(torch.zeros(1), KL()) == "Triton is not installed (pip install 'triton>=3.6')"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert dispatch.why_not_triton(torch.zeros(1), KL()) == "Triton runs on Linux, this is darwin"


def test_auto_on_a_cpu_is_never_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert dispatch.resolve("auto", torch.zeros(1), KL()) == "chunked"
    assert dispatch.resolve("triton", torch.zeros(1), KL()) == "triton"


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl is one of auto, naive, chunked, triton, got 'fast'"):
        call(impl="fast")


def test_environment_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("RSA_KERNELS_IMPL", "naive")
    x = torch.zeros(1)
    assert dispatch.resolve("auto", x, KL()) == "naive"
    assert dispatch.resolve("chunked", x, KL()) == "chunked"
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setenv("RSA_KERNELS_IMPL", "triton")
    with pytest.raises(RuntimeError, match="RSA_KERNELS_IMPL='triton' cannot run here"):
        call()
    monkeypatch.setenv("RSA_KERNELS_IMPL", "quick")
    with pytest.raises(ValueError, match="RSA_KERNELS_IMPL is one of"):
        call()


def test_environment_counts_in_compiled_code(monkeypatch):
    z, r, labels = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([0, 1])
    graphs: list[str] = []
    compiled = torch.compile(
        lambda z: token_risk(z, r, labels, KL()).risk, backend=lambda graph, _: graphs.append(graph.code) or graph
    )
    for impl, operator in (("chunked", True), ("naive", False)):
        monkeypatch.setenv("RSA_KERNELS_IMPL", impl)
        compiled(z)
        assert ("rsa_kernels" in graphs[-1]) is operator


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with caplog.at_level(logging.INFO, logger="rsa_kernels"):
        call()
        call()
    assert [r.message for r in caplog.records] == [
        "impl='auto' is 'chunked' for KL on cpu: the tensors are on cpu, where the kernels run in Triton's interpreter only "
        "(TRITON_INTERPRET=1)"
    ]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("label", [5, -1, -99])
def test_label_outside_the_vocabulary_is_named(label, impl):
    with pytest.raises(ValueError, match=rf"label {label} at position 1 is outside the vocabulary \[0, 5\)"):
        token_risk(torch.randn(2, 5), torch.randn(2, 5), torch.tensor([0, label]), KL(), impl=impl)


def test_shapes_that_do_not_fit_are_named():
    case = head(4, 6)
    with pytest.raises(ValueError, match=r"got \[2, 5\], \[3, 5\] and \[2\]"):
        token_risk(torch.randn(2, 5), torch.randn(3, 5), torch.tensor([0, 1]), KL())
    with pytest.raises(
        ValueError, match=r"policy_logits have 5 columns and ref_logits 6: .* pass the size .* valid_vocab"
    ):
        token_risk(torch.randn(2, 5), torch.randn(2, 6), torch.tensor([0, 1]), KL())
    with pytest.raises(ValueError, match=r"hidden \[4, 16\], weight \[6, 24\]"):
        linear_token_risk(case["hidden"], case["ref_weight"], None, None, case["labels"], None)
    with pytest.raises(ValueError, match="weight has 6 rows and ref_weight 5"):
        linear_token_risk(
            case["hidden"], case["weight"], case["ref_hidden"], case["ref_weight"][:5], case["labels"], KL()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap is a positive number, got 0.0"),
        ({"scale": -1.0}, "scale is a positive number, got -1.0"),
        ({"scale": "0.5"}, "scale is a number, got '0.5'"),
        ({"ref_scale": None}, "ref_scale is a number, got None"),
        ({"ref_softcap": torch.tensor(5.0)}, r"ref_softcap is a number, got tensor\(5.\)"),
        ({"ignore_index": -100.0}, "ignore_index is an integer, got -100.0"),
        ({"risk": "CVaR"}, "risk is a RiskMeasure such as"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, "labels are int64 token ids, got torch.int32"),
    ],
)
def test_bad_options_are_named(options, message):
    arguments = {"labels": torch.tensor([0, 1]), "risk": KL()} | options
    with pytest.raises(ValueError, match=message):
        token_risk(torch.randn(2, 5), torch.randn(2, 5), **arguments)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_numpy_numbers_are_numbers(impl):
    z, r, labels = torch.randn(3, 9), torch.randn(3, 9), torch.tensor([1, -7, 2])
    plain = {"scale": 0.5, "ref_scale": 2, "softcap": 8.0, "ref_softcap": 4.0, "ignore_index": -7}
    types = (np.float64, np.int64, np.float32, np.float64, np.int32)
    numpy = {k: kind(v) for kind, (k, v) in zip(types, plain.items(), strict=True)}
    stats, expected = (token_risk(z, r, labels, CVaR(0.5), impl=impl, **options) for options in (numpy, plain))
    assert torch.equal(stats.risk, expected.risk)
    assert stats.risk.dtype == torch.float32


HEAD_ERRORS = [
    ({"weight": torch.nn.Linear(4, 6)}, TypeError, "weight is a torch.Tensor, got Linear: pass its weight"),
    ({"ref_weight": torch.nn.Linear(4, 6)}, TypeError, "ref_weight is a torch.Tensor, got Linear: pass its weight"),
    ({"hidden": np.zeros((2, 4))}, TypeError, "hidden is a torch.Tensor, got ndarray"),
    ({"labels": [0, 1]}, TypeError, "labels is a torch.Tensor, got list"),
    ({"ref_weight": torch.zeros(6, 4, device="meta")}, ValueError, "one device, got hidden on cpu.*ref_weight on meta"),
    ({"hidden": torch.zeros(2, 4).long()}, ValueError, "dtype of hidden is one of float16, .*, got torch.int64"),
    ({"ref_hidden": torch.zeros(2, 4).cfloat()}, ValueError, "dtype of ref_hidden is one of .*, got torch.complex64"),
    ({"weight": torch.zeros(4, 6)}, ValueError, "weight is transposed, nn.Linear keeps it as"),
    (
        {"hidden": torch.zeros(1, 2, 4), "labels": torch.zeros(1, 2).long()},
        ValueError,
        r"hidden\[mask\] and labels\[mask\]",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), HEAD_ERRORS, ids=[m for _, _, m in HEAD_ERRORS])
@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_what_is_not_a_head_is_named_with_its_mend(changed, kind, message, impl):
    states = {name: torch.zeros(2, 4) for name in ("hidden", "ref_hidden")}
    states |= {name: torch.zeros(6, 4) for name in ("weight", "ref_weight")} | {"labels": torch.tensor([0, 1])}
    with pytest.raises(kind, match=message):
        linear_token_risk(**(states | changed), risk=KL(), impl=impl)


def test_what_are_not_logits_is_named():
    z, labels = torch.zeros(2, 5), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="ref_logits is a torch.Tensor, got NoneType"):
        token_risk(z, None, labels, None)
    with pytest.raises(ValueError, match="policy_logits on cpu, ref_logits on meta"):
        token_risk(z, z.to("meta"), labels, KL())
    with pytest.raises(ValueError, match="dtype of policy_logits is one of .*, got torch.int64"):
        token_risk(z.long(), z, labels, KL())
    with pytest.raises(TypeError, match="cu_seqlens is a torch.Tensor, got list"):
        nested_risk(z[0], [0, 5])
    with pytest.raises(ValueError, match=r"lengths become such boundaries with .*pad\(lengths.cumsum"):
        nested_risk(z[0], torch.tensor([2, 3]))


def test_the_definition_knows_the_strategies():
    """Where it stands in for an operator to find a mistake, it must not hide one."""
    case = head(4, 6)
    states = case["hidden"], case["weight"].requires_grad_(), None, None, case["labels"], None
    with pytest.raises(ValueError, match="strategy is one of"):
        linear_token_risk(*states, strategy="cached", impl="naive")
    with pytest.raises(ValueError, match="strategy='frozen' gives no gradient to the head"):
        linear_token_risk(*states, strategy="frozen", impl="naive")
    with torch.no_grad():
        assert linear_token_risk(*states, strategy="frozen", impl="naive").logp.shape == case["labels"].shape


def test_mixed_dtypes_are_refused():
    case = head(4, 6)
    with pytest.raises(ValueError, match="share one dtype, got bfloat16, float32"):
        linear_token_risk(case["hidden"].bfloat16(), case["weight"], None, None, case["labels"], None)


def test_workspace_must_be_positive():
    case = head(4, 6)
    for given in (0, -1, 2.5, 1e9, True, "64"):
        with pytest.raises(ValueError, match=f"workspace_bytes is a positive integer, .* got {given!r}; None"):
            linear_token_risk(case["hidden"], case["weight"], None, None, case["labels"], None, workspace_bytes=given)
    states = case["hidden"], case["weight"], None, None, case["labels"]
    one, other = (linear_token_risk(*states, None, workspace_bytes=kind(500)) for kind in (int, np.int64))
    assert torch.equal(one.logp, other.logp)


def test_sharded_weight_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        case = head(4, 6)
        weight = distribute_tensor(case["weight"], init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match="weight is a DTensor, a shard of the head: call the operator inside"):
            linear_token_risk(case["hidden"], weight, None, None, case["labels"], None)
    finally:
        dist.destroy_process_group()
