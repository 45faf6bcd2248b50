"""Benchmark cases as data: inputs like those of training, the call, and the work it cannot avoid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rsa_kernels import ERM, KL, CVaR, Impl, RiskMeasure, linear_token_risk, nested_risk, token_risk
from torch import Tensor

OPS = ("token_risk", "linear_token_risk", "nested_risk")
RISKS: tuple[RiskMeasure, ...] = (KL(), CVaR(0.97), CVaR(0.1), ERM(5.0))

# (tokens, hidden, vocabulary): a story model, a small BPE model, a Llama-2 vocabulary
CPU_SHAPES = ((2048, 128, 512), (256, 256, 4096), (48, 256, 32000))
QUICK_SHAPES = ((64, 32, 129),)
GPU_SHAPES = ((4096, 2048, 32000), (8192, 4096, 128256))


@dataclass(frozen=True)
class Case:
    """One call at one shape. `flops` and `bytes` count matrix products, and inputs read and outputs written once."""

    title: str
    inputs: dict[str, Tensor]
    leaves: tuple[str, ...]  # inputs that get gradients
    call: Callable[[dict[str, Tensor], Impl], dict[str, Tensor]]  # inputs, impl -> outputs by name
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float

    def cast(self, dtype: torch.dtype) -> "Case":
        """The same case with floating-point inputs in another dtype."""
        cast = {k: t.to(dtype) if t.is_floating_point() else t for k, t in self.inputs.items()}
        return Case(**{**self.__dict__, "inputs": cast})


def cases(op: str, quick: bool, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of one operator, made when they are asked for: two of them need not fit in memory together."""
    torch.manual_seed(0)
    if op == "nested_risk":
        yield from (_nested(count, device) for count in ((3, 5) if quick else (16, 64)))
        return
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        for risk in RISKS:
            make = _linear if op == "linear_token_risk" else _logits
            yield make(*shape, risk, device, dtype)


def _head(n: int, h: int, v: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits with a spread of about 3 nats, and a reference a few hundredths of a nat away."""
    hidden, weight = torch.randn(n, h), torch.randn(v, h) * 3 / h**0.5
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "ref_hidden": hidden + 0.05 * torch.randn(n, h),
        "ref_weight": weight + 0.05 * weight.std() * torch.randn(v, h),
    }
    labels = torch.randint(0, v, (n,), device=device)
    return {k: t.to(device, dtype) for k, t in tensors.items()} | {"labels": labels}


def _named(stats: Any) -> dict[str, Tensor]:
    return {k: v for k, v in stats._asdict().items() if v is not None}


def _linear(n: int, h: int, v: int, risk: RiskMeasure, device: torch.device, dtype: torch.dtype) -> Case:
    def call(t: dict[str, Tensor], impl: Impl) -> dict[str, Tensor]:
        states = (t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"], t["labels"])
        return _named(linear_token_risk(*states, risk, impl=impl))

    inputs = _head(n, h, v, device, dtype)
    size, product = inputs["hidden"].element_size(), 2.0 * n * h * v
    return Case(
        title=f"{risk} N={n} H={h} V={v}",
        inputs=inputs,
        leaves=("hidden", "weight"),
        call=call,
        forward_flops=2 * product,
        backward_flops=2 * product,
        forward_bytes=2.0 * size * (n * h + v * h),
        backward_bytes=3.0 * size * (n * h + v * h),
    )


def _logits(n: int, h: int, v: int, risk: RiskMeasure, device: torch.device, dtype: torch.dtype) -> Case:
    def call(t: dict[str, Tensor], impl: Impl) -> dict[str, Tensor]:
        return _named(token_risk(t["policy_logits"], t["ref_logits"], t["labels"], risk, impl=impl))

    head = _head(n, h, v, device, dtype)
    logits = {
        "policy_logits": head["hidden"] @ head["weight"].T,
        "ref_logits": head["ref_hidden"] @ head["ref_weight"].T,
        "labels": head["labels"],
    }
    size = logits["policy_logits"].element_size()
    return Case(
        title=f"{risk} N={n} V={v}",
        inputs=logits,
        leaves=("policy_logits",),
        call=call,
        forward_flops=0.0,
        backward_flops=0.0,
        forward_bytes=2.0 * size * n * v,
        backward_bytes=3.0 * size * n * v,
    )


def _nested(sequences: int, device: torch.device) -> Case:
    lengths = torch.randint(0, 129, (sequences,))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    n = int(lengths.sum())

    def call(t: dict[str, Tensor], impl: Impl) -> dict[str, Tensor]:
        return _named(nested_risk(t["step_risk"], t["cu_seqlens"], discount=0.97, impl=impl))

    return Case(
        title=f"S={sequences} N={n}",
        inputs={"step_risk": torch.rand(n, device=device), "cu_seqlens": cu_seqlens},
        leaves=("step_risk",),
        call=call,
        forward_flops=0.0,
        backward_flops=0.0,
        forward_bytes=8.0 * n,
        backward_bytes=8.0 * n,
    )
