"""What the operators hold: never N·V elements (`linear_token_risk`) and no more than the workspace, or one gradient
(`token_risk`). The detectors that say so can fail.
"""

from functools import wraps

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR, chunked, linear_token_risk, token_risk
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N, H, V = 96, 8, 257
BYTES_PER_LOGIT = chunked.ROW_PAIRS["chunked"].bytes_per_logit
INNER_FUNCTIONS = ("forward_loop", "backward_loop", "_projections", "_gradient_buffers", "_dead_rows", "_empty_outputs")


class NoTensorOf(TorchDispatchMode):
    """Fails on every tensor of `elements` or more, and remembers the largest one seen."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.largest = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                assert tensor.numel() < self.elements, f"{func} made {list(tensor.shape)}"
        return out


@pytest.fixture
def detector(monkeypatch) -> NoTensorOf:
    """A mode does not see inside custom operators, so it is entered again around everything they call."""
    mode = NoTensorOf(N * V)

    def watched(function):
        @wraps(function)
        def call(*args, **kwargs):
            with mode:
                return function(*args, **kwargs)

        return call

    for name in INNER_FUNCTIONS:
        monkeypatch.setattr(chunked, name, watched(getattr(chunked, name)))
    return mode


def run(mode: NoTensorOf, risk, **options) -> None:
    # the reference differs in width, so that nothing is N·V by accident
    leaves = [torch.randn(s, requires_grad=True) for s in ((N, H), (V, H), (V,))]
    reference = torch.randn(N, 5), torch.randn(V, 5)
    hidden, weight, bias = leaves
    with mode:
        stats = linear_token_risk(
            hidden, weight, *reference, torch.randint(0, V, (N,)), risk, bias=bias, entropy=True, softcap=9.0, **options
        )
        loss = stats.logp.sum() if risk is None else (stats.logp + stats.risk + stats.kl).sum()
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("risk", [KL(), CVaR(0.5), ERM(5), None], ids=str)
@pytest.mark.parametrize("rows", [1, 10, 64])
def test_no_tensor_of_n_times_v_elements(risk, rows, detector):
    run(detector, risk, workspace_bytes=rows * V * BYTES_PER_LOGIT)
    assert detector.largest == max(rows * V, V * H)


def test_detector_trips_on_the_definition(detector):
    with pytest.raises(AssertionError, match=rf"made \[{N}, {V}\]"):
        run(detector, KL(), impl="naive")


def test_detector_trips_on_a_chunk_of_all_tokens(detector):
    """It does see inside the operator."""
    with pytest.raises(AssertionError, match=rf"made \[{N}, {V}\]"):
        run(detector, KL(), workspace_bytes=2**30)


@pytest.mark.parametrize(("budget", "rows"), [(1, 1), (48 * 1000 * 10, 10), (48 * 1000 * 200, 192), (None, 1344)])
def test_chunk_follows_the_budget(budget, rows):
    pair = chunked.TORCH_ROWS
    assert pair.bytes_per_logit == 48
    assert chunked.chunk_rows(1000, torch.float32, torch.device("cpu"), budget, pair) == rows


def test_backward_saves_no_more_than_five_numbers_per_token():
    for risk in (KL(), CVaR(0.5), ERM(5), None):
        assert chunked.RowOptions(risk, 1.0, 1.0, None, None, -100, False).saved_count <= 5


def peak_bytes(call) -> int:
    """Most bytes of tensors alive during the call beyond those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("risk", [KL(), CVaR(0.97), ERM(5), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("vocabulary", "count", "mib"), [(1000, 384, 8), (8000, 104, 8), (8000, 16, 1.25)])
def test_workspace_is_a_bound(risk, dtype, vocabulary, count, mib):
    """Several chunks; the last case has few rows in each, whose thresholds are found by sorting."""
    budget, width = int(mib * 2**20), 4
    accumulator = torch.promote_types(dtype, torch.float32)
    leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((count, width), (vocabulary, width))]
    reference = torch.randn(count, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    labels = torch.randint(0, vocabulary, (count,))

    def forward():
        options = {"softcap": 9.0, "ref_softcap": 9.0, "scale": 0.5, "entropy": True, "workspace_bytes": budget}
        return linear_token_risk(*leaves, *reference, labels, risk, **options)

    stats = forward()
    loss = stats.logp.sum() if risk is None else (stats.logp + stats.risk + stats.kl).sum()
    gradients = sum(t.numel() * t.element_size() for t in leaves)
    if dtype == torch.bfloat16:
        gradients += leaves[1].numel() * accumulator.itemsize  # the sum that is rounded to it
    per_token = 256 * count
    with torch.no_grad():
        assert peak_bytes(forward) <= budget + per_token
    assert peak_bytes(lambda: torch.autograd.grad(loss, leaves, retain_graph=True)) <= budget + gradients + per_token


def test_gradient_is_the_only_tensor_of_that_size_from_logits(monkeypatch):
    count, vocabulary = 512, 1000
    z, r = (torch.randn(count, vocabulary, dtype=torch.bfloat16) for _ in range(2))
    labels, size = torch.randint(0, vocabulary, (count,)), count * vocabulary * 2
    monkeypatch.setitem(chunked.WORKSPACE_BYTES, "cpu", size // 4)
    with torch.no_grad():
        assert peak_bytes(lambda: token_risk(z, r, labels, CVaR(0.97))) <= size // 2
    loss = token_risk(z.requires_grad_(), r, labels, CVaR(0.97)).risk.sum()
    assert size < peak_bytes(lambda: torch.autograd.grad(loss, z)) <= size + size // 2
