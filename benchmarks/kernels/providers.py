"""Who is benchmarked: every way of computing a case, each with the reason where it cannot run here.

Names are `implementation-strategy` for the operators of this package; peers stand in `peers.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rsa_kernels import Impl, RiskMeasure, linear_token_risk, nested_risk, token_risk, why_not_triton

from benchmarks.kernels.cases import DISCOUNT, MODES, RISK_OVER_LOGP, Case, Mode, Spec
from benchmarks.kernels.exact import NESTED, TOKENS, Named, Objective, named

Kind = Literal["ours", "torch", "peer"]
COPIED = 2**27  # numbers at a time: more than a cache holds, less than a GPU would miss
LOOP_TOKENS = 10000  # nobody waits for a Python loop over more


@dataclass(frozen=True)
class Provider:
    """`call(case, inputs)` gives outputs by name, differentiable where the inputs are.

    `blocks` and `sums` say how it adds up the gradient of a weight: it may be as far from the truth as plain torch that
    does the same.
    """

    name: str
    kind: Kind
    call: Callable[[Case, Named], Named]
    objective: Objective = TOKENS
    no_forward: str = ""  # why forward alone is not timed, where it is not
    blocks: int = 1
    sums: torch.dtype | None = None

    @property
    def modes(self) -> tuple[Mode, ...]:
        return MODES[1:] if self.no_forward else MODES


@dataclass(frozen=True)
class Floor:
    """Work that cannot be avoided, `make(case)` -> what to time by mode. It computes no results to agree on."""

    name: str
    make: Callable[[Case], dict[Mode, Callable[[], Any]]]


@dataclass(frozen=True)
class Missing:
    """A provider that cannot run, or not in this mode."""

    name: str
    reason: str


Offer = Provider | Missing


def offers(spec: Spec, device: torch.device, dtype: torch.dtype, compiled: bool) -> Iterator[Offer]:
    """All providers of a call."""
    from benchmarks.kernels import peers

    if spec.op == "nested":
        yield from _nested(spec, device)
        return
    yield from _linear(spec, device, dtype) if spec.op == "linear" else _logits(spec, device, dtype)
    yield _plain(spec, compiled=False)
    yield _plain(spec, compiled=True) if compiled else Missing("compiled", "on a CPU it is asked for with --compile")
    yield peers.published(spec)
    if spec.op == "linear":
        yield from peers.linear_peers(spec, device, dtype)


def floors(spec: Spec) -> tuple[Floor, ...]:
    if spec.op != "linear":
        return (Floor("copy", _copies),)
    return (Floor("gemms", _gemms), *([Floor("gemms-frozen", _gemms_of_frozen)] if spec.head == "frozen" else []))


def chosen(offer: Offer | Floor, names: Sequence[str]) -> bool:
    """Whether it is one of the names or begins with one: `triton` means all of its strategies."""
    return not names or any(offer.name == name or offer.name.startswith(f"{name}-") for name in names)


# ---- ours ------------------------------------------------------------------------------------------------------------


def _linear(spec: Spec, device: torch.device, dtype: torch.dtype) -> Iterator[Offer]:
    options: dict[str, dict[str, Any]] = {name: {"strategy": name} for name in ("auto", "cache", "recompute")}
    if spec.head == "frozen":
        options |= {
            "frozen": {"strategy": "frozen"},
            "frozen-ratio": {"strategy": "frozen", "risk_over_logp": RISK_OVER_LOGP},
        }
    for impl in ("chunked", "triton"):
        for strategy, how in options.items():
            no_forward = "" if strategy == "auto" else f"alone it keeps nothing, so it is that of {impl}-auto"
            call = linear_call(spec.risk, impl=impl, **how)
            yield _ours(spec, f"{impl}-{strategy}", call, device, dtype, no_forward=no_forward)


def _logits(spec: Spec, device: torch.device, dtype: torch.dtype) -> Iterator[Offer]:
    for impl in ("chunked", "triton"):
        yield _ours(spec, impl, logits_call(spec.risk, impl), device, dtype)


def _nested(spec: Spec, device: torch.device) -> Iterator[Offer]:
    for impl in ("chunked", "triton"):
        yield _ours(spec, impl, nested_call(impl), device, torch.float32, NESTED)
    tokens = spec.shape[0] * spec.shape[1]
    if tokens > LOOP_TOKENS:
        yield Missing("naive", f"it is a Python loop, over {tokens} tokens here")
    else:
        yield Provider("naive", "torch", nested_call("naive"), NESTED)


def _ours(
    spec: Spec,
    name: str,
    call: Callable[[Case, Named], Named],
    device: torch.device,
    dtype: torch.dtype,
    objective: Objective = TOKENS,
    no_forward: str = "",
) -> Offer:
    if name.startswith("triton"):
        reason = why_not_triton(torch.empty(0, device=device, dtype=dtype), spec.risk)
        if reason is None and device.type == "cpu":
            reason = "the interpreter on a CPU says nothing about time"
        if reason is not None:
            return Missing(name, reason)
    return Provider(name, "ours", call, objective, no_forward)


def _plain(spec: Spec, compiled: bool) -> Provider:
    """The definition, eagerly or through the compiler."""
    make = linear_call if spec.op == "linear" else logits_call
    call = make(spec.risk, impl="naive")
    return Provider("compiled", "peer", torch_compiled(call)) if compiled else Provider("naive", "torch", call)


def torch_compiled(call: Callable[[Case, Named], Named]) -> Callable[[Case, Named], Named]:
    """Compiled for its shapes; a case is a constant to the compiler."""
    functions: dict[str, Callable[[Named], Named]] = {}

    def compiled(case: Case, t: Named) -> Named:
        if not functions:
            torch._dynamo.reset()  # programs of other cases count towards a limit
            functions["call"] = torch.compile(lambda inputs: call(case, inputs), dynamic=False)
        return functions["call"](t)

    return compiled


def linear_call(risk: RiskMeasure | None, impl: Impl | str, **options: Any) -> Callable[[Case, Named], Named]:
    def call(case: Case, t: Named) -> Named:
        states = (t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"], t["labels"])
        return named(linear_token_risk(*states, risk, impl=impl, **options))  # type: ignore[arg-type]

    return call


def logits_call(risk: RiskMeasure | None, impl: Impl | str) -> Callable[[Case, Named], Named]:
    def call(case: Case, t: Named) -> Named:
        return named(token_risk(t["policy_logits"], t["ref_logits"], t["labels"], risk, impl=impl))  # type: ignore[arg-type]

    return call


def nested_call(impl: Impl | str) -> Callable[[Case, Named], Named]:
    def call(case: Case, t: Named) -> Named:
        return named(nested_risk(t["step_risk"], t["cu_seqlens"], discount=DISCOUNT, impl=impl))  # type: ignore[arg-type]

    return call


# ---- floors ----------------------------------------------------------------------------------------------------------


def _gemms(case: Case) -> dict[Mode, Callable[[], Any]]:
    """The matrix products of a trainable head into buffers that are there: two, and two for the gradients."""
    forward, d_hidden, d_weight = _products(case)
    return {"forward": forward, "forward+backward": lambda: (forward(), d_hidden(), d_weight())}


def _gemms_of_frozen(case: Case) -> dict[Mode, Callable[[], Any]]:
    """Those of a frozen head: one less; forward is the same."""
    forward, d_hidden, _ = _products(case)
    return {"forward+backward": lambda: (forward(), d_hidden())}


def _products(case: Case) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    t = case.inputs
    z = t["hidden"].new_empty(case.spec.shape[0], case.spec.shape[2])  # of either model: room is short on a GPU
    d_hidden, d_weight = torch.empty_like(t["hidden"]), torch.empty_like(t["weight"])

    def forward() -> None:
        torch.mm(t["hidden"], t["weight"].t(), out=z)
        torch.mm(t["ref_hidden"], t["ref_weight"].t(), out=z)

    return (
        forward,
        lambda: torch.mm(z, t["weight"], out=d_hidden),
        lambda: torch.mm(z.t(), t["hidden"], out=d_weight),
    )


def _copies(case: Case) -> dict[Mode, Callable[[], Any]]:
    """A copy that reads and writes as many bytes in all as the call has to move, through buffers that are not huge."""

    def copy(moved: float) -> Callable[[], Any]:
        numbers = int(moved) // 8  # in fp32, read and written
        source = torch.rand(min(numbers, COPIED), device=case.device)
        target = torch.empty_like(source)
        whole, rest = divmod(numbers, source.numel())

        def run() -> None:
            for _ in range(whole):
                target.copy_(source)
            if rest:
                target[:rest].copy_(source[:rest])

        return run

    return {mode: copy(case.moved[mode]) for mode in MODES}
