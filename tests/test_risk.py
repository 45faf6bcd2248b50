"""Risk measures: the five laws, their limits and orders, and numbers worked out in the papers' terms."""

import math
from dataclasses import InitVar, dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rsa_kernels import ERM, KL, CVaR, RiskMeasure, quantile, token_risk
from rsa_kernels.quantile import tail_threshold
from rsa_kernels.risk import Outcomes, decode, encode


@dataclass(frozen=True)
class MeanPlus(RiskMeasure):
    """A measure from outside the package: only `weights` and `value`, mixed of the mean and the worst half."""

    share: float = 0.25

    def weights(self, x, log_probs):
        return (1 - self.share) * KL().weights(x, log_probs) + self.share * CVaR(0.5).weights(x, log_probs)

    def value(self, x, log_probs):
        return (1 - self.share) * KL().value(x, log_probs) + self.share * CVaR(0.5).value(x, log_probs)


AVERSE = [KL(), CVaR(1.0), CVaR(0.97), CVaR(0.5), CVaR(0.1), CVaR(0.01), ERM(0), ERM(1e-4), ERM(0.1), ERM(1), ERM(5)]
AVERSE += [ERM(9), MeanPlus()]
ALL_RISKS = [*AVERSE, ERM(-1)]
NEUTRAL = [KL(), CVaR(1.0), ERM(0), MeanPlus(0.0)]
every_risk = pytest.mark.parametrize("risk", ALL_RISKS, ids=str)
averse_risk = pytest.mark.parametrize("risk", AVERSE, ids=str)


@st.composite
def outcomes(draw, size: int | None = None):
    """A cost and log-probabilities in float64, with ties, peaks and columns without mass."""
    size = size or draw(st.integers(1, 12))
    costs = st.one_of(st.sampled_from([0.0, 1.0, -2.0]), st.floats(-20, 20))
    x = torch.tensor(draw(st.lists(costs, min_size=size, max_size=size)), dtype=torch.float64)
    logits = st.one_of(st.just(-math.inf), st.sampled_from([0.0, 25.0]), st.floats(-8, 8))
    scores = torch.tensor(draw(st.lists(logits, min_size=size, max_size=size)), dtype=torch.float64)
    scores[draw(st.integers(0, size - 1))] = 1.0  # at least one outcome exists
    return x, scores.log_softmax(-1)


laws = settings(max_examples=40, deadline=None, derandomize=True)


# ---- the five laws ---------------------------------------------------------------------------------------------------


@every_risk
@laws
@given(case=outcomes())
def test_weights_form_a_distribution(risk, case):
    x, log_probs = case
    weights = risk.weights(x, log_probs)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (weights[log_probs == -math.inf] == 0).all()


@every_risk
@laws
@given(case=outcomes())
def test_gradient_of_value_is_weights(risk, case):
    x, log_probs = case
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(risk.value(x, log_probs), x)
    torch.testing.assert_close(gradient, risk.weights(x, log_probs), rtol=0, atol=1e-14)


@every_risk
@laws
@given(case=outcomes(), shift=st.floats(-50, 50))
def test_adding_a_constant_adds_it_to_the_risk(risk, case, shift):
    x, log_probs = case
    shifted, plain = risk.value(x + shift, log_probs), risk.value(x, log_probs)
    # (1/mu) log E exp(mu x) of float64 has an absolute error of about 1e-16 / mu
    assert (shifted - plain).item() == pytest.approx(shift, abs=1e-10)


@averse_risk
@laws
@given(case=outcomes())
def test_risk_is_at_least_the_mean_and_at_most_the_worst_case(risk, case):
    x, log_probs = case
    value, mean, worst = risk.value(x, log_probs), KL().value(x, log_probs), x[log_probs > -math.inf].max()
    assert mean - 1e-10 <= value <= worst + 1e-10


@pytest.mark.parametrize("risk", NEUTRAL, ids=str)
@laws
@given(case=outcomes())
def test_neutral_parameter_is_the_mean(risk, case):
    x, log_probs = case
    mean = (log_probs.exp() * x).sum()
    assert risk.value(x, log_probs).item() == pytest.approx(mean.item(), abs=1e-12)
    torch.testing.assert_close(risk.weights(x, log_probs), log_probs.exp(), rtol=0, atol=1e-15)


# ---- orders, limits, invariances -------------------------------------------------------------------------------------


@every_risk
@laws
@given(case=outcomes(size=6), increase=st.lists(st.floats(0, 5), min_size=6, max_size=6))
def test_larger_costs_have_larger_risk(risk, case, increase):
    x, log_probs = case
    raised = x + torch.tensor(increase, dtype=x.dtype)
    assert risk.value(raised, log_probs) >= risk.value(x, log_probs) - 1e-10


@pytest.mark.parametrize("family", [[CVaR(t) for t in (1.0, 0.97, 0.5, 0.1, 0.01)], [ERM(m) for m in (0, 1, 5, 9)]])
@laws
@given(case=outcomes())
def test_risk_rises_with_aversion(family, case):
    values = [risk.value(*case).item() for risk in family]
    assert all(low <= high + 1e-10 for low, high in pairwise(values))


@laws
@given(case=outcomes())
def test_extreme_aversion_is_the_worst_case(case):
    x, log_probs = case
    worst = x[log_probs > -math.inf].max().item()
    smallest_mass = log_probs[x == worst].logsumexp(0).exp().item()
    assert CVaR(min(1.0, 0.5 * smallest_mass)).value(x, log_probs).item() == pytest.approx(worst, abs=1e-9)
    # ERM ≥ max x + log P(max x) / mu
    assert ERM(1e6).value(x, log_probs).item() == pytest.approx(worst, abs=1e-4)


@every_risk
@laws
@given(case=outcomes(size=7), order=st.permutations(range(7)))
def test_order_of_the_vocabulary_does_not_matter(risk, case, order):
    x, log_probs = case
    assert risk.value(x[order], log_probs[order]).item() == pytest.approx(risk.value(x, log_probs).item(), abs=1e-12)
    permuted = risk.weights(x[order], log_probs[order])
    torch.testing.assert_close(permuted, risk.weights(x, log_probs)[order], rtol=0, atol=1e-12)


@every_risk
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 0.0])
def test_columns_without_mass_do_not_count(risk, poison):
    x, log_probs = torch.randn(3, 5), torch.randn(3, 5).log_softmax(-1)
    padded = torch.cat([x, torch.full((3, 2), poison)], -1).requires_grad_()
    padded_log_probs = torch.cat([log_probs, torch.full((3, 2), -math.inf)], -1)
    value = risk.value(padded, padded_log_probs)
    torch.testing.assert_close(value, risk.value(x, log_probs), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), padded)
    assert (gradient[:, 5:] == 0).all()
    torch.testing.assert_close(gradient[:, :5], risk.weights(x, log_probs), rtol=0, atol=1e-6)


@every_risk
def test_lost_outcome_has_infinite_risk(risk):
    """The policy gives 0 to a token that the reference allows: x = inf where p > 0. Only the DPO identity disagrees."""
    x, log_probs = torch.tensor([math.inf, 0.0, -1.0]), torch.tensor([0.2, 0.5, 0.3]).log()
    assert math.isinf(risk.value(x, log_probs).item()) == (risk != ERM(-1))


# ---- hand-worked numbers ---------------------------------------------------------------------------------------------

EIGHT_REFERENCE = torch.tensor([2, 1.5, 1, 0.5, 0, -0.5, -1, -2], dtype=torch.float64)
EIGHT_POLICY = EIGHT_REFERENCE + torch.tensor([0.5, -1, 0.25, 0.75, -0.5, 1, -1.5, 0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("risk", "expected"),
    [
        (KL(), 0.201036),
        (CVaR(0.99), 0.210761),
        (CVaR(0.97), 0.230812),
        (CVaR(0.95), 0.247248),
        (CVaR(0.5), 0.741763),
        (CVaR(0.1), 1.338551),
        (ERM(-1), 0.0),
        (ERM(1), 0.473642),
        (ERM(5), 1.097085),
        (ERM(9), 1.318046),
        (CVaR(1e-9), 1.738298),
    ],
)
@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_eight_tokens(risk, expected, impl):
    stats = token_risk(EIGHT_POLICY, EIGHT_REFERENCE, torch.tensor(0), risk, impl=impl)
    assert stats.risk.item() == pytest.approx(expected, abs=5e-7)


def test_eight_tokens_weights():
    x = EIGHT_REFERENCE.log_softmax(-1) - EIGHT_POLICY.log_softmax(-1)
    expected = [0.415184, 0.251822, 0.152738, 0.092640, 0.056189, 0.003153, 0.020671, 0.007604]
    np.testing.assert_allclose(CVaR(0.97).weights(x, EIGHT_REFERENCE.log_softmax(-1)), expected, rtol=0, atol=5e-7)


def test_atom_is_split_in_proportion_to_mass():
    """Tail .5 takes all of p = .1 at x = 2 and .4 of the .5 at x = 1: 1.2; weights .1/.5, .3·.8/.5, .2·.8/.5."""
    x = torch.tensor([2.0, 1, 1, 0], dtype=torch.float64)
    log_probs = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64).log()
    assert CVaR(0.5).value(x, log_probs).item() == pytest.approx(1.2, abs=1e-12)
    np.testing.assert_allclose(CVaR(0.5).weights(x, log_probs), [0.2, 0.48, 0.32, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("risk", "expected"),
    [
        (KL(), 0.036274),
        (ERM(5), 0.193640),
        (CVaR(0.97), 0.048187),
        (CVaR(0.95), 0.056494),
        (CVaR(0.5), 0.267313),
        (CVaR(1e-9), 0.450296),
    ],
)
@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_large_vocabulary(risk, expected, impl):
    z = torch.arange(32000, dtype=torch.float64)
    reference = -1.05 * torch.log1p(z)
    stats = token_risk(reference + 0.4 * torch.sin(1.7 * z), reference, torch.tensor(0), risk, impl=impl)
    assert stats.risk.item() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("mu", [1e-4, 1e-3, 1e-2, 0.05, 0.0999])
def test_small_mu_keeps_its_digits_in_fp32(mu):
    """Taken as a logarithm, ERM(1e-4) would be off by 5e-4."""
    x, log_probs = torch.randn(16, 4099), (3 * torch.randn(16, 4099)).log_softmax(-1)
    exact = ERM(mu).value(x.double(), log_probs.double())
    assert (ERM(mu).value(x, log_probs) - exact).abs().max() <= 1e-6


def test_small_mu_does_not_overflow():
    x, log_probs = torch.tensor([1e4, 0.0]), torch.tensor([0.5, 0.5]).log()
    assert ERM(0.05).value(x, log_probs).item() == pytest.approx(1e4 - 20 * math.log(2), rel=1e-6)


# ---- the search for the threshold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [0.97, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("passes", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["smooth", "peaked", "ties", "one value", "masked", "tiny", "tiny gaps", "outliers"])
def test_search_finds_the_quantile_of_a_sort(tail, passes, kind):
    """The same element, or a neighbour reached by less mass than a float32 sum can resolve."""
    scores = torch.randn(64, 515) * (6 if kind == "peaked" else 1)
    x = torch.randn(64, 515)
    x = {"ties": (2 * x).round() / 2, "one value": torch.zeros_like(x), "tiny": 1e-33 * x}.get(kind, x)
    if kind == "tiny gaps":
        x[:, ::2] *= 1e-33
    if kind == "outliers":
        x = x / torch.randn_like(x).square()
    if kind == "masked":
        scores[:, ::2] = -math.inf
    o = Outcomes.of(x, scores.log_softmax(-1))
    threshold = tail_threshold(o, tail, passes)
    assert (x == threshold).any(-1).all()
    assert torch.equal(threshold, tail_threshold(o, tail, passes=0))
    above = (o.probs.double() * (x > threshold)).sum(-1)
    reached = (o.probs.double() * (x >= threshold)).sum(-1)
    assert (above <= tail + 1e-6).all()
    assert (reached >= tail - 1e-6).all()


@pytest.mark.parametrize("tail", [0.97, 0.1])
@pytest.mark.parametrize("kind", ["smooth", "peaked", "one value", "outliers"])
def test_search_mostly_does_without_a_sort(tail, kind, monkeypatch):
    """Where a guess is wrong the row is sorted as a whole, so that a search that found nothing would show in time only."""
    sorted_rows = []
    bisect = quantile._bisect
    monkeypatch.setattr(quantile, "_bisect", lambda x, *rest: sorted_rows.append(len(x)) or bisect(x, *rest))
    x = torch.randn(100, 4099)
    x = {"one value": torch.zeros_like(x), "outliers": x / torch.randn_like(x).square()}.get(kind, x)
    o = Outcomes.of(x, (torch.randn(100, 4099) * (6 if kind == "peaked" else 1)).log_softmax(-1))
    tail_threshold(o, tail)
    assert sum(sorted_rows) <= 3
    tail_threshold(o, tail, passes=0)
    assert sum(sorted_rows) >= 100


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [97, 0, -0.1, 1.0001, math.nan])
def test_tail_outside_the_unit_interval_is_refused(tail):
    with pytest.raises(ValueError, match=r"CVaR tail is a probability mass in \(0, 1\], got"):
        CVaR(tail)


@pytest.mark.parametrize("mu", [-0.5, -2, math.inf, math.nan])
def test_negative_mu_is_refused_except_minus_one(mu):
    with pytest.raises(ValueError, match=r"ERM mu is a risk aversion >= 0 .* or exactly -1"):
        ERM(mu)


@pytest.mark.parametrize("value", ["0.97", True, None, torch.tensor(0.97)], ids=str)
def test_only_numbers_are_parameters(value):
    with pytest.raises(ValueError, match="CVaR tail is a number, got"):
        CVaR(value)
    with pytest.raises(ValueError, match="ERM mu is a number, got"):
        ERM(value)


def test_numpy_numbers_become_floats():
    for risk, plain in ((CVaR(np.float32(0.5)), CVaR(0.5)), (ERM(np.int64(5)), ERM(5)), (ERM(5), ERM(5.0))):
        assert str(risk) == str(plain)
        assert encode(risk) == encode(plain)


def test_parameters_that_fp32_cannot_hold_are_refused():
    """In fp32 each of them divides 0 by 0, or multiplies 0 by inf."""
    for tail in (1e-46, 0.99e-30):
        with pytest.raises(ValueError, match=f"CVaR tail is at least 1e-30, which is max x already, got {tail}"):
            CVaR(tail)
    for mu in (1e-46, 1e39):
        with pytest.raises(ValueError, match=r"ERM mu lies in \[1e-30, 1e\+30\] unless it is 0 \(KL\) or -1, got"):
            ERM(mu)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize("size", [50, 70000])
def test_parameters_at_the_limit_are_exact_in_fp32(impl, size):
    z, r, labels = torch.randn(2, size), torch.randn(2, size), torch.zeros(2, dtype=torch.int64)

    def risk(measure):
        return token_risk(z, r, labels, measure, impl=impl).risk

    worst = (r.log_softmax(-1) - z.log_softmax(-1)).amax(-1)
    torch.testing.assert_close(risk(CVaR(1e-30)), worst, rtol=0, atol=2e-6)
    torch.testing.assert_close(risk(ERM(1e30)), worst, rtol=0, atol=2e-6)
    torch.testing.assert_close(risk(ERM(1e-30)), risk(KL()), rtol=0, atol=1e-6)


@every_risk
def test_measure_survives_encoding(risk):
    assert decode(*encode(risk)) == risk
    assert decode(*encode(None)) is None


# ---- from class to operator and back ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KeywordsOnly(RiskMeasure):
    """The mean scaled up: wrong as a measure, but its value tells its parameters."""

    factor: float = 1.0

    def weights(self, x, log_probs):
        return self.factor * log_probs.exp()

    def value(self, x, log_probs):
        return (self.weights(x, log_probs) * x).sum(-1)


def chunked_risk(risk: RiskMeasure) -> float:
    """On a row whose KL is log cosh(gap / 2) = 1: p = (½, ½) and policy logits (0, −gap)."""
    gap = 2 * math.acosh(math.e)
    logits = torch.tensor([0.0, -gap], dtype=torch.float64)
    return token_risk(logits, torch.zeros(2, dtype=torch.float64), torch.tensor(0), risk, impl="chunked").risk.item()


def test_keyword_parameters_reach_the_operator():
    assert chunked_risk(KeywordsOnly()) == pytest.approx(1, abs=1e-12)
    assert chunked_risk(KeywordsOnly(factor=3.0)) == pytest.approx(3, abs=1e-12)
    assert encode(KeywordsOnly(factor=3.0)) == ("KeywordsOnly", [("factor", 3.0)])


def in_a_notebook(factor: float, name: str = "Celled", module: str = "notebook", base: str = "KL") -> RiskMeasure:
    """What running a cell with a class statement does; running it again gives the same module and qualified name."""
    cell = f"""
@dataclass(frozen=True)
class {name}({base}):
    def weights(self, x, log_probs): return {factor} * log_probs.exp()
    def value(self, x, log_probs): return {factor} * (log_probs.exp() * x).sum(-1)
    def weights_at(self, o, scalars): return {factor} * o.probs
    def value_at(self, o, scalars): return {factor} * (o.probs * o.x).sum(-1)
"""
    namespace = {"__name__": module, "dataclass": dataclass, "KL": KL, "RiskMeasure": RiskMeasure}
    exec(cell, namespace)
    return namespace[name]()


def in_a_function(factor: float) -> RiskMeasure:
    @dataclass(frozen=True)
    class Local(KL):
        def value_at(self, o, scalars):
            return factor * super().value_at(o, scalars)

    return Local()


def with_slots(factor: float) -> RiskMeasure:
    @dataclass(frozen=True, slots=True)  # which makes the class twice
    class Slotted(KL):
        def value_at(self, o, scalars):
            return factor * KL.value_at(self, o, scalars)

    return Slotted()


@pytest.mark.parametrize("define", [in_a_notebook, in_a_function, with_slots])
def test_class_defined_again_replaces_the_old_one(define):
    old = define(2.0)
    assert chunked_risk(old) == pytest.approx(2, abs=1e-12)
    new = define(3.0)
    assert chunked_risk(new) == pytest.approx(3, abs=1e-12)
    with pytest.raises(ValueError, match="was made before .* was defined again: make it again"):
        chunked_risk(old)


def test_newest_class_wins_whatever_it_derives_from():
    for factor, base in ((2.0, "RiskMeasure"), (3.0, "KL"), (4.0, "RiskMeasure")):
        assert chunked_risk(in_a_notebook(factor, "Rebased", base=base)) == pytest.approx(factor, abs=1e-12)


def test_two_measures_of_one_name_are_refused():
    first = in_a_notebook(2.0, "Doubled", "first_module")
    assert chunked_risk(first) == pytest.approx(2, abs=1e-12)
    second = in_a_notebook(3.0, "Doubled", "second_module")
    for risk in (first, second):
        with pytest.raises(
            ValueError,
            match=r"2 risk measures are called Doubled \(first_module.Doubled, second_module.Doubled\): rename one",
        ):
            chunked_risk(risk)


def test_one_name_in_two_functions_is_refused():
    def one():
        @dataclass(frozen=True)
        class Twin(KL):
            pass

        return Twin()

    def other():
        @dataclass(frozen=True)
        class Twin(KL):
            pass

        return Twin()

    first = one()
    assert chunked_risk(first) == pytest.approx(1, abs=1e-12)
    other()
    with pytest.raises(ValueError, match=r"2 risk measures are called Twin .*one.<locals>.Twin.*other.<locals>.Twin"):
        chunked_risk(first)


def test_parameter_that_is_not_kept_is_refused():
    @dataclass(frozen=True)
    class Forgetful(KL):
        share: InitVar[float] = 0.0

    with pytest.raises(ValueError, match="Forgetful is made with share, which is not a field: keep it as one"):
        chunked_risk(Forgetful(1.0))


def test_field_that_is_no_number_is_refused():
    @dataclass(frozen=True)
    class Worded(KL):
        word: str = "half"

    with pytest.raises(ValueError, match="Worded word is a number, got 'half'"):
        chunked_risk(Worded())


def test_measure_without_fields_is_refused():
    class Plain(RiskMeasure):
        weights = KL.weights
        value = KL.value

    with pytest.raises(ValueError, match="Plain is not a dataclass"):
        encode(Plain())


def test_a_second_derivative_is_refused():
    """The value of ERM is curved, and its weights hold a normaliser that no graph reaches."""
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(ERM(2.0).value(x, torch.full((5,), -math.log(5.0))), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(slope.square().sum(), x)


def test_a_percentage_is_told_from_a_mass():
    with pytest.raises(ValueError, match=r"got 97: 97 % is 0.97"):
        CVaR(97)
