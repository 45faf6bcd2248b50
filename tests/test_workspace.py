"""What a call holds: the plan follows the budget, the budget is a bound, and nothing of N·V elements is made without need."""

from functools import wraps

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR, linear, linear_token_risk, logits, loop, rows, token_risk
from rsa_kernels.pairs import Price
from rsa_kernels.rows import TORCH_ROWS
from rsa_kernels.workspace import Plan, Sizes, padded, plan
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N, H, V = 96, 8, 257
ROW = 4 * padded(V)
CPU = torch.device("cpu")
MIB = 2**20
# what the operators call: a mode does not see inside custom operators
INNER = {
    linear: ("forward_loop", "backward_loop", "empty_outputs", "_projections", "_kept", "_hidden_gradients", "_Totals"),
    logits: ("forward_loop", "backward_loop", "empty_outputs"),
}


def sizes(tokens=N, vocabulary=V, dtype=torch.float32, risk=True, ratio=False, device=CPU) -> Sizes:
    return Sizes(tokens, vocabulary, dtype, dtype, device, has_risk=risk, knows_ratio=ratio)


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "budget", "head_learns", "strategy"),
    [
        (sizes(), None, True, "cache"),
        (sizes(), None, False, "cache"),  # one product less than frozen without a ratio
        (sizes(ratio=True), None, False, "frozen"),
        (sizes(risk=False), None, False, "frozen"),
        (sizes(risk=False), None, True, "cache"),
        (sizes(), 2 * N * ROW, True, "recompute"),
        (sizes(), 2 * N * ROW, False, "frozen"),
        (sizes(4096, 32000), None, True, "recompute"),
        (sizes(1024, 32000), None, True, "cache"),
    ],
)
def test_auto_takes_the_fewest_products_that_fit(what, budget, head_learns, strategy):
    assert plan("auto", what, budget, TORCH_ROWS, head_learns, learns=True).strategy == strategy


def test_nothing_is_kept_where_nothing_learns():
    for strategy in ("auto", "cache", "frozen"):
        assert plan(strategy, sizes(), None, TORCH_ROWS, head_learns=False, learns=False).strategy == "nothing"


@pytest.mark.parametrize("strategy", ["cache", "recompute"])
def test_a_name_is_binding(strategy):
    assert plan(strategy, sizes(ratio=True), 1, TORCH_ROWS, head_learns=False, learns=True) == Plan(
        strategy, _rows(strategy)
    )


def _rows(strategy: str) -> int:
    """A budget of one byte has room for one row; kept logits that exceed it leave a chunk the room of the default."""
    most = rows.BLOCK_BYTES["cpu"]
    return (64 * MIB - most) // (2 * ROW) // 64 * 64 if strategy == "cache" else 1


@pytest.mark.parametrize("count", [1, 10, 63])
def test_a_chunk_fills_the_budget(count):
    """Two models and the temporaries of every row, as long as these are fewer than a block."""
    budget = count * (2 * 4 * padded(1000) + 48 * 1000)
    what = sizes(4096, 1000)
    assert plan("recompute", what, budget, TORCH_ROWS, True, True).rows == count
    assert plan("recompute", what, budget - 1, TORCH_ROWS, True, True).rows == max(1, count - 1)


def test_large_chunks_are_multiples_of_64():
    left = 64 * MIB - rows.BLOCK_BYTES["cpu"]
    assert (
        plan("recompute", sizes(4096, 1000), None, TORCH_ROWS, True, True).rows == left // (8 * padded(1000)) // 64 * 64
    )


def test_the_chunk_of_a_gpu_keeps_the_weight_gradient_cheap():
    """2048 tokens at 128256 entries in bf16, in the Triton rows, which hold nothing else."""
    triton = TORCH_ROWS._replace(price=lambda *_: Price(0, 0))
    what = sizes(8192, 128256, torch.bfloat16, device=torch.device("cuda"))
    assert plan("auto", what, None, triton, True, True) == Plan("recompute", 2048)
    assert plan("auto", what, 5 * 2**30, triton, True, True).strategy == "cache"


def test_a_chunk_beside_kept_logits_stays_in_the_default():
    """Logits that nearly fill the default leave the chunk what is left, and not another whole chunk."""
    what = sizes(1024, 59000)
    chosen = plan("auto", what, None, TORCH_ROWS, True, True)
    row = 2 * 4 * padded(59000)
    assert chosen.strategy == "cache"
    assert chosen.rows * row + rows.BLOCK_BYTES["cpu"] <= 512 * MIB - 1024 * row < 64 * MIB


# ---- tensors of N·V elements -----------------------------------------------------------------------------------------


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
    """The mode is entered again around everything that the custom operators call."""
    mode = NoTensorOf(N * V)

    def watched(function):
        @wraps(function, updated=())
        def call(*args, **kwargs):
            with mode:
                return function(*args, **kwargs)

        return call

    for module, names in INNER.items():
        for name in names:
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return mode


def run(mode: NoTensorOf, risk, learned=True, **options) -> None:
    # the reference differs in width, so that nothing is N·V by accident
    leaves = [torch.randn(s, requires_grad=learned or i == 0) for i, s in enumerate(((N, H), (V, H), (V,)))]
    reference = torch.randn(N, 5), torch.randn(V, 5)
    hidden, weight, bias = leaves
    with mode:
        stats = linear_token_risk(
            hidden, weight, *reference, torch.randint(0, V, (N,)), risk, bias=bias, entropy=True, softcap=9.0, **options
        )
        loss = stats.logp.sum() if risk is None else (stats.logp + stats.risk).sum()
        torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])


@pytest.mark.parametrize("risk", [KL(), CVaR(0.5), ERM(5), None], ids=str)
@pytest.mark.parametrize("count", [1, 10, 60])
@pytest.mark.parametrize("learned", [True, False])
def test_no_tensor_of_n_times_v_elements(risk, count, learned, detector):
    strategy = "recompute" if learned else "frozen"
    buffers = 3 if strategy == "frozen" and risk is not None else 2
    budget = count * (buffers * ROW + rows.BYTES_PER_LOGIT * V)
    run(detector, risk, learned, strategy=strategy, workspace_bytes=budget)
    assert detector.largest == max(count * padded(V), V * H)


@pytest.mark.parametrize("options", [{"impl": "naive"}, {"strategy": "cache"}, {"workspace_bytes": 2**30}], ids=str)
def test_detector_trips_on(options, detector):
    """The definition; logits that are kept; a chunk of all tokens. It does see inside the operators."""
    with pytest.raises(AssertionError, match=rf"made \[{N}, "):
        run(detector, KL(), **options)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_backward_saves_no_more_than_five_numbers_per_token(impl):
    for risk in (KL(), CVaR(0.5), ERM(5), None):
        assert loop.row_pair(impl).saved_count(risk) <= 5


# ---- the budget is a bound -------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize(
    ("vocabulary", "count", "mib", "strategy"),
    [
        (1000, 384, 16, "cache"),
        (1000, 384, 1.5, "recompute"),
        (8000, 104, 32, "cache"),
        (8000, 104, 10, "recompute"),
        (8000, 16, 1.25, "recompute"),  # few rows in each chunk, whose thresholds are found by sorting
    ],
)
def test_workspace_is_a_bound(risk, dtype, vocabulary, count, mib, strategy):
    """Forward with what it keeps, and backward with what it makes beside that."""
    budget, width = int(mib * MIB), 4
    if dtype == torch.float64:
        budget *= 2
    leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((count, width), (vocabulary, width))]
    reference = torch.randn(count, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    labels = torch.randint(0, vocabulary, (count,))

    def forward():
        options = {"softcap": 9.0, "ref_softcap": 9.0, "scale": 0.5, "entropy": True, "workspace_bytes": budget}
        return linear_token_risk(*leaves, *reference, labels, risk, **options)

    pair_sizes = sizes(count, vocabulary, dtype, risk is not None)
    if strategy == "cache" or risk is not None:
        assert plan("auto", pair_sizes, budget, TORCH_ROWS, True, True).strategy == strategy
    stats = forward()
    loss = stats.logp.sum() if risk is None else (stats.logp + stats.risk + stats.kl).sum()
    gradients = sum(t.numel() * t.element_size() for t in leaves)
    if dtype == torch.bfloat16:
        gradients += leaves[1].numel() * 4  # the sum that is rounded to it
    per_token = 256 * count
    assert peak_bytes(lambda: forward()) <= budget + per_token
    with torch.no_grad():
        assert peak_bytes(forward) <= budget + per_token
    assert peak_bytes(lambda: torch.autograd.grad(loss, leaves)) <= budget + gradients + per_token


@pytest.mark.parametrize("ref_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [40 * MIB, 60 * MIB])
def test_workspace_is_a_bound_in_two_dtypes(ref_dtype, budget):
    """Large chunks, whose gradients of logits are in bf16 and summed in fp32, beside a reference of its own dtype."""
    count, vocabulary, width = 1024, 8000, 4
    leaves = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((count, width), (vocabulary, width))]
    reference = torch.randn(count, width, dtype=ref_dtype), torch.randn(vocabulary, width, dtype=ref_dtype)
    labels = torch.randint(0, vocabulary, (count,))
    gradients = sum(t.nbytes for t in leaves) + leaves[1].numel() * 4

    def forward():
        return linear_token_risk(*leaves, *reference, labels, KL(), workspace_bytes=budget)

    risk = forward().risk.sum()
    kept = 2 * count * padded(vocabulary) * (2 if ref_dtype == torch.bfloat16 else 3) if budget == 60 * MIB else 0
    assert kept < peak_bytes(forward) <= budget + 256 * count
    for again in (False, True):  # the second run makes again what the first has used up
        run = peak_bytes(lambda: torch.autograd.grad(risk, leaves, retain_graph=True))
        assert run <= budget - (kept if again else 0) + gradients + 256 * count


def test_a_frozen_head_scales_what_it_keeps_in_parts():
    """Beside the gradient there are no fp32 tensors of its shape."""
    count, width = 8192, 256
    hidden = torch.randn(count, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, width, dtype=torch.bfloat16)
    states = hidden, weight, hidden.detach(), weight, torch.randint(0, 50, (count,))
    stats = linear_token_risk(*states, CVaR(0.5), strategy="frozen")
    loss = (stats.logp + stats.risk).sum()
    part = linear.SCALED_ROWS * width * 4
    assert peak_bytes(lambda: torch.autograd.grad(loss, hidden)) <= hidden.nbytes + 4 * part + 64 * count


def test_kept_logits_are_the_only_tensors_of_that_size():
    """From hidden states: two models forward, nothing more backward, where the gradient takes the place of the logits."""
    count, vocabulary, width = 512, 4000, 4
    leaves = [torch.randn(s, requires_grad=True) for s in ((count, width), (vocabulary, width))]
    reference = torch.randn(count, width), torch.randn(vocabulary, width)
    states = (*leaves, *reference, torch.randint(0, vocabulary, (count,)))
    kept, block = 2 * 4 * count * padded(vocabulary), rows.BLOCK_BYTES["cpu"]
    results = []
    assert kept < peak_bytes(lambda: results.append(linear_token_risk(*states, KL()))) <= kept + block + MIB
    loss = (results[0].logp + results[0].risk).sum()
    assert peak_bytes(lambda: torch.autograd.grad(loss, leaves)) <= block + MIB


def test_gradient_is_the_only_tensor_of_that_size_from_logits():
    count, vocabulary = 4096, 2000
    z, r = (torch.randn(count, vocabulary, dtype=torch.bfloat16) for _ in range(2))
    labels, size, block = torch.randint(0, vocabulary, (count,)), count * vocabulary * 2, rows.BLOCK_BYTES["cpu"]
    assert block < size
    with torch.no_grad():
        assert peak_bytes(lambda: token_risk(z, r, labels, CVaR(0.97))) <= block + MIB
    loss = token_risk(z.requires_grad_(), r, labels, CVaR(0.97)).risk.sum()
    assert size < peak_bytes(lambda: torch.autograd.grad(loss, z)) <= size + block + MIB
