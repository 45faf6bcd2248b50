"""What only a GPU can tell: real sizes, memory as allocated, no hidden synchronisation, and the strategies under autocast."""

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR, linear_token_risk, nested_risk, token_risk, why_not_triton
from rsa_kernels.workspace import padded
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RISKS = [KL(), CVaR(0.97), CVaR(0.05), ERM(5.0), ERM(1e-3)]
GIB = 2**30


def head(n: int, h: int, v: int, dtype=torch.bfloat16) -> dict[str, Tensor]:
    """A policy a few hundredths of a nat from its reference, logits with a spread of 3 nats."""
    hidden = torch.randn(n, h, device="cuda")
    weight = torch.randn(v, h, device="cuda") * 3 / h**0.5
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "ref_hidden": hidden + 0.05 * torch.randn_like(hidden),
        "ref_weight": weight + 0.05 * weight.std() * torch.randn_like(weight),
    }
    labels = torch.randint(0, v, (n,), device="cuda")
    return {name: t.to(dtype) for name, t in tensors.items()} | {"labels": labels}


def call(case: dict[str, Tensor], risk, **options):
    return linear_token_risk(
        *(case[k] for k in ("hidden", "weight", "ref_hidden", "ref_weight", "labels")), risk, **options
    )


def backward(case: dict[str, Tensor], risk, leaves=("hidden", "weight"), **options):
    """Values and gradients by name."""
    case = {k: t.detach().requires_grad_(k in leaves) for k, t in case.items()}
    stats = call(case, risk, **options)
    loss = (stats.logp - 0.5 * stats.risk).sum()
    grads = torch.autograd.grad(loss, [case[k] for k in leaves])
    return {"logp": stats.logp.detach(), "risk": stats.risk.detach()} | dict(zip(leaves, grads, strict=True))


def test_auto_is_triton():
    assert why_not_triton(torch.zeros(1, device="cuda"), KL()) is None


@pytest.mark.parametrize("risk", RISKS, ids=str)
@pytest.mark.parametrize("vocabulary", [32000, 50257, 128256, 151936])
def test_real_vocabularies(risk, vocabulary):
    """Logits in bf16 against fp64 of the same logits, and no further off than twice the definition in bf16."""
    z = (3 * torch.randn(16, vocabulary, device="cuda")).bfloat16()
    r = (z.float() + 0.1 * torch.randn_like(z, dtype=torch.float32)).bfloat16()
    labels = torch.randint(0, vocabulary, (16,), device="cuda")
    results = []
    for dtype, impl in ((torch.bfloat16, "triton"), (torch.bfloat16, "naive"), (torch.float64, "naive")):
        leaf = z.to(dtype).requires_grad_()
        stats = token_risk(leaf, r.to(dtype), labels, risk, entropy=True, impl=impl)
        (gradient,) = torch.autograd.grad((stats.logp + 0.7 * stats.risk - 0.3 * stats.kl).sum(), leaf)
        results.append({k: v.detach() for k, v in stats._asdict().items()} | {"d_logits": gradient})
    ours, naive, exact = results
    for name, truth in exact.items():
        error, allowed = ((x[name].double() - truth).abs().max().item() for x in (ours, naive))
        assert error <= 2 * allowed + 1e-6, f"{name}: off by {error:.2e}, naive by {allowed:.2e}"


@pytest.mark.parametrize("strategy", ["cache", "recompute"])
@pytest.mark.parametrize("risk", RISKS[:4], ids=str)
def test_the_strategies_are_the_definition(strategy, risk):
    case = head(512, 256, 32000)
    exact = backward({k: t if k == "labels" else t.double() for k, t in case.items()}, risk, impl="naive")
    naive = backward(case, risk, impl="naive")
    # several chunks, so that the weight gradient is summed in fp32
    ours = backward(case, risk, strategy=strategy, workspace_bytes=16 * 2**20, impl="triton")
    for name, truth in exact.items():
        error, allowed = ((x[name].double() - truth).abs().max().item() for x in (ours, naive))
        assert error <= 2 * allowed + 1e-4, f"{name}: off by {error:.2e}, naive by {allowed:.2e}"


@pytest.mark.parametrize("risk", [KL(), CVaR(0.05)], ids=str)
def test_rows_beyond_the_reach_of_32_bits(risk):
    """17000 rows of 151936: the last rows begin past 2^31 elements, and are what they are alone."""
    n, v = 17000, 151936
    assert n * v > 2**31
    z = torch.randn(64, v, device="cuda", dtype=torch.bfloat16).repeat(n // 64 + 1, 1)[:n]
    r = torch.randn(64, v, device="cuda", dtype=torch.bfloat16).repeat(n // 64 + 1, 1)[:n]
    labels = torch.randint(0, v, (n,), device="cuda")
    stats = token_risk(z, r, labels, risk, impl="triton")
    alone = token_risk(z[-3:].clone(), r[-3:].clone(), labels[-3:], risk, impl="triton")
    assert torch.equal(stats.risk[-3:], alone.risk)
    assert torch.equal(stats.logp[-3:], alone.logp)


def test_runs_are_bitwise_equal():
    case = head(1024, 512, 32000)
    for options in ({"strategy": "cache"}, {"strategy": "recompute", "workspace_bytes": 64 * 2**20}):
        first, second = (backward(case, CVaR(0.05), impl="triton", **options) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def extra_bytes(function) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_recompute_is_flat_in_tokens(tokens):
    """Beside the returned gradients and one fp32 sum of the head's shape there is the workspace."""
    case = head(tokens, 512, 32000)
    gradients = sum(case[k].nbytes for k in ("hidden", "weight")) + case["weight"].numel() * 4
    extra = extra_bytes(lambda: backward(case, KL(), strategy="recompute", impl="triton"))
    assert extra <= gradients + GIB + 64 * tokens + 32 * 2**20


def test_cache_is_two_models_of_logits():
    n, v = 4096, 32000
    case = head(n, 512, v)
    gradients = sum(case[k].nbytes for k in ("hidden", "weight"))
    extra = extra_bytes(lambda: backward(case, KL(), strategy="cache", impl="triton"))
    assert extra <= gradients + 4 * n * padded(v) + 64 * n + 32 * 2**20


@pytest.mark.parametrize("strategy", ["cache", "recompute", "frozen"])
def test_nothing_waits_for_the_gpu(strategy):
    leaves = ("hidden",) if strategy == "frozen" else ("hidden", "weight")
    case = head(256, 128, 32000)
    backward(case, CVaR(0.05), leaves, strategy=strategy, impl="triton")  # compiled before, which may wait
    boundaries = torch.tensor([0, 100, 256], device="cuda")
    nested_risk(torch.rand(256, device="cuda"), boundaries)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = backward(case, CVaR(0.05), leaves, strategy=strategy, impl="triton")
        nested_risk(stats["risk"], boundaries)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_broken_promise_is_nan_at_its_positions():
    case = head(8, 64, 1000)
    hidden = case["hidden"].requires_grad_()
    stats = call(case, CVaR(0.5), risk_over_logp=0.5, strategy="frozen", impl="triton")
    ratio = torch.full((8,), 0.5, device="cuda")
    ratio[3] = 0.9
    (gradient,) = torch.autograd.grad((stats.logp + ratio * stats.risk).sum(), hidden)
    assert gradient[3].isnan().all()
    assert gradient[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_a_label_outside_the_vocabulary_is_nan_and_alone():
    case = head(8, 64, 1000)
    case["labels"][2] = 1000
    stats = call(case, CVaR(0.5), impl="triton")
    assert stats.logp[2].isnan()
    assert stats.logp[[0, 1, 3, 4, 5, 6, 7]].isfinite().all()


def test_autocast_is_the_cast_by_hand():
    case = head(256, 128, 32000, torch.float32)
    by_hand = backward({k: t if k == "labels" else t.bfloat16() for k, t in case.items()}, KL(), impl="triton")
    with torch.autocast("cuda", torch.bfloat16):
        automatic = backward(case, KL(), impl="triton")
    for name, truth in by_hand.items():
        assert torch.equal(automatic[name], truth.float()), name


def test_float16_and_float32():
    for dtype in (torch.float16, torch.float32):
        case = head(128, 128, 32000, dtype)
        exact = backward({k: t if k == "labels" else t.double() for k, t in case.items()}, CVaR(0.05), impl="naive")
        naive, ours = (backward(case, CVaR(0.05), impl=impl) for impl in ("naive", "triton"))
        for name, truth in exact.items():
            error, allowed = ((x[name].double() - truth).abs().max().item() for x in (ours, naive))
            assert error <= 2 * allowed + 1e-5, f"{dtype} {name}: off by {error:.2e}, naive by {allowed:.2e}"


def test_compiled_by_inductor():
    case = head(128, 128, 32000)
    expected = backward(case, CVaR(0.05))
    compiled = torch.compile(lambda hidden, weight: _loss(case | {"hidden": hidden, "weight": weight}), fullgraph=True)
    leaves = [case[k].detach().requires_grad_() for k in ("hidden", "weight")]
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    for name, gradient in zip(("hidden", "weight"), gradients, strict=True):
        assert torch.equal(gradient, expected[name]), name


def _loss(case: dict[str, Tensor]) -> Tensor:
    stats = call(case, CVaR(0.05))
    return (stats.logp - 0.5 * stats.risk).sum()
