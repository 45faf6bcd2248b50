"""The published estimator of Ra-DPO: its numbers, its defects, and gradients of the logits through every operator."""

import math

import pytest
import torch
from rsa_kernels import CVaR, linear_token_risk, token_risk
from rsa_kernels.risk import decode, encode
from torch import Tensor

from rsa_lightning.legacy import LegacyCVaR
from rsa_lightning.losses import RSA, SequenceStats

REF = torch.tensor([2, 1.5, 1, 0.5, 0, -0.5, -1, -2], dtype=torch.float64)
POLICY = REF + torch.tensor([0.5, -1, 0.25, 0.75, -0.5, 1, -1.5, 0], dtype=torch.float64)


def of(risk: LegacyCVaR, policy: Tensor, ref: Tensor, shift: float = 0.0) -> float:
    log_p = ref.log_softmax(-1)
    return risk.value(log_p - policy.log_softmax(-1) + shift, log_p).item()


def definition(policy: Tensor, ref: Tensor, tail: float, parts: int) -> Tensor:
    """Σ_H Σ p x 1[x > v_H] in plain torch, v_H sorted and interpolated by hand and held constant."""
    log_p = ref.log_softmax(-1)
    x, size = log_p - policy.log_softmax(-1), policy.shape[-1]
    total = torch.zeros((), dtype=torch.float64)
    for part in range(parts):
        ids = slice(part * size // parts, (part + 1) * size // parts)
        ordered = x[ids].detach().sort().values
        place = (1 - tail) * (len(ordered) - 1)
        low, share = math.floor(place), place - math.floor(place)
        v = ordered[low] if share == 0 else (1 - share) * ordered[low] + share * ordered[low + 1]
        total = total + (log_p.exp() * x)[ids][x[ids].detach() > v].sum()
    return total


@pytest.mark.parametrize(
    ("tail", "parts", "expected"),
    [(0.97, 2, 0.272198), (0.97, 1, 0.226217), (0.5, 2, 0.375836), (0.5, 1, 0.379327)],
)
def test_eight_tokens(tail, parts, expected):
    """CVaR itself is 0.230812 at 0.97, between the two, and 0.741763 at 0.5, twice as much."""
    assert of(LegacyCVaR(tail, parts), POLICY, REF) == pytest.approx(expected, abs=1e-6)
    assert definition(POLICY, REF, tail, parts).item() == pytest.approx(expected, abs=1e-6)
    exact = CVaR(tail).value(REF.log_softmax(-1) - POLICY.log_softmax(-1), REF.log_softmax(-1)).item()
    assert exact == pytest.approx({0.97: 0.230812, 0.5: 0.741763}[tail], abs=1e-6)


def test_the_value_depends_on_the_order_of_token_ids():
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert of(LegacyCVaR(0.97), POLICY[order], REF[order]) == pytest.approx(0.331611, abs=1e-6)
    one = LegacyCVaR(0.97, parts=1)
    assert of(one, POLICY[order], REF[order]) == pytest.approx(of(one, POLICY, REF), abs=1e-12)


def test_it_is_not_translation_equivariant():
    """All x one higher: 0.877081 higher, the mass S above the quantiles."""
    gained = of(LegacyCVaR(0.97), POLICY, REF, shift=1.0) - of(LegacyCVaR(0.97), POLICY, REF)
    assert gained == pytest.approx(0.877081, abs=1e-6)


def test_an_atom_is_dropped():
    """p = (.1, .3, .2, .4), x = (2, 1, 1, 0), tail ½. Split: 2 · .1 + 1 · .2; at once: ties of the median 1 go."""
    x = torch.tensor([2.0, 1, 1, 0], dtype=torch.float64)
    log_p = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64).log()
    assert LegacyCVaR(0.5).value(x, log_p).item() == pytest.approx(0.4, abs=1e-12)
    assert LegacyCVaR(0.5, parts=1).value(x, log_p).item() == pytest.approx(0.2, abs=1e-12)
    assert CVaR(0.5).value(x, log_p).item() == pytest.approx(1.2, abs=1e-12)


@pytest.mark.parametrize(("tail", "expected"), [(0.97, 0.044618), (0.95, 0.067848), (0.5, 0.130502)])
def test_a_large_vocabulary(tail, expected):
    z = torch.arange(32000, dtype=torch.float64)
    ref = -1.05 * torch.log1p(z)
    assert of(LegacyCVaR(tail), ref + 0.4 * torch.sin(1.7 * z), ref) == pytest.approx(expected, abs=1e-6)


def test_weights_are_a_distribution_and_the_gradient_of_the_logits_is_s_q_minus_m():
    risk, log_p, policy = LegacyCVaR(0.5), REF.log_softmax(-1), POLICY.clone().requires_grad_()
    x = log_p - policy.log_softmax(-1)
    weights = risk.weights(x, log_p)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert (weights > 0).all()
    q, m = policy.detach().softmax(-1), log_p.exp() * (x.detach() > torch.cat(
        [x.detach()[h].quantile(0.5).expand(4) for h in (slice(0, 4), slice(4, 8))]))  # fmt: skip
    assert (q - weights).tolist() == pytest.approx((m.sum() * q - m).tolist(), abs=1e-12)
    [found] = torch.autograd.grad(risk.value(x, log_p), policy)
    assert found.tolist() == pytest.approx((m.sum() * q - m).tolist(), abs=1e-12)


def rows(count: int = 5, size: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    ref = torch.randn(count, size, dtype=torch.float64) * 1.5
    return ref + torch.randn(count, size, dtype=torch.float64), ref, torch.randint(size, (count,))


@pytest.mark.parametrize("impl", ["naive", "chunked"])
@pytest.mark.parametrize(("tail", "parts"), [(0.95, 2), (0.5, 2), (0.5, 1), (0.8, 3)])
def test_gradients_of_the_logits_are_those_of_the_definition(impl, tail, parts):
    """Against autograd of the definition, and finite differences of the value, where no entry crosses a quantile."""
    policy, ref, labels = rows()
    upstream = torch.randn(5, dtype=torch.float64)
    leaf, plain = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    risk = LegacyCVaR(tail, parts)
    stats = token_risk(leaf, ref, labels, risk, impl=impl)
    (stats.risk @ upstream).backward()
    wanted = torch.stack([definition(q, p, tail, parts) for q, p in zip(plain, ref, strict=True)])
    (wanted @ upstream).backward()
    assert stats.risk.tolist() == pytest.approx(wanted.tolist(), abs=1e-10)
    assert (leaf.grad - plain.grad).abs().max() < 1e-10
    assert leaf.grad.abs().max() > 0.05
    step = torch.randn_like(policy)
    ends = [token_risk(policy + e * step, ref, labels, risk, impl=impl).risk for e in (1e-6, -1e-6)]
    slope = (ends[0] - ends[1]) @ upstream / 2e-6
    assert slope.item() == pytest.approx((leaf.grad * step).sum().item(), abs=1e-6)


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_gradients_of_hidden_states_and_head(impl):
    hidden, ref_hidden = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    weight, ref_weight = (torch.randn(17, 4, dtype=torch.float64) for _ in range(2))
    labels, upstream = torch.randint(17, (6,)), torch.randn(6, dtype=torch.float64)
    found = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    stats = linear_token_risk(*found, ref_hidden, ref_weight, labels, LegacyCVaR(0.6), impl=impl)
    (stats.risk @ upstream - stats.logp.sum()).backward()
    logits, ref = exact[0] @ exact[1].T, ref_hidden @ ref_weight.T
    wanted = torch.stack([definition(q, p, 0.6, 2) for q, p in zip(logits, ref, strict=True)])
    (wanted @ upstream - logits.log_softmax(-1).gather(1, labels[:, None]).sum()).backward()
    assert stats.risk.tolist() == pytest.approx(wanted.tolist(), abs=1e-10)
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine.grad - theirs.grad).abs().max() < 1e-9


@pytest.mark.parametrize("impl", ["naive", "chunked"])
def test_where_policy_and_reference_are_equal_everything_is_dropped(impl):
    _, ref, labels = rows()
    leaf = ref.clone().requires_grad_()
    risk = token_risk(leaf, ref, labels, LegacyCVaR(), impl=impl).risk
    risk.sum().backward()
    assert risk.tolist() == [0] * 5
    assert leaf.grad.abs().max() < 1e-15


def test_absent_columns_do_not_poison_it():
    """The definition over the 20 columns that exist differs: the 3 absent ones count in the quantile, with x = 0."""
    policy, ref, labels = rows()
    labels = labels.clamp(max=19)
    for logits in (policy, ref):
        logits[:, 20:] = -torch.inf
    for impl in ("naive", "chunked"):
        leaf = policy.clone().requires_grad_()
        stats = token_risk(leaf, ref, labels, LegacyCVaR(0.5), impl=impl)
        stats.risk.sum().backward()
        assert stats.risk.isfinite().all()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:, 20:].abs().max() == 0


def test_it_travels_as_numbers_and_impossible_ones_are_errors():
    risk = LegacyCVaR(0.9, 3)
    assert decode(*encode(risk)) == risk
    assert LegacyCVaR() == LegacyCVaR(0.95, 2)
    for wrong in ({"tail": 0}, {"tail": 95}, {"parts": 0}, {"parts": 1.5}):
        with pytest.raises(ValueError, match="LegacyCVaR (tail lies in|parts is a whole number)"):
            LegacyCVaR(**wrong)
    with pytest.raises(ValueError, match="cuts 8 tokens into 9 parts: lower parts"):
        of(LegacyCVaR(parts=9), POLICY, REF)


def test_the_rsa_loss_takes_it():
    RSA(beta=0.1).check_risk(LegacyCVaR())
    stats = SequenceStats(torch.zeros(1), torch.ones(1))
    assert RSA(beta=0.1)(stats, stats).losses.item() == pytest.approx(math.log(2))
