"""What is benchmarked, as data: a call at a shape, its inputs like those of training, and the work it cannot avoid."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from rsa_kernels import ERM, KL, CVaR, RiskMeasure
from torch import Tensor

Op = Literal["linear", "logits", "nested"]
Suite = Literal["linear", "logits", "nested", "growth"]
Mode = Literal["forward", "forward+backward"]
Head = Literal["trainable", "frozen", ""]  # "" where there is none

SUITES: tuple[Suite, ...] = ("linear", "logits", "nested", "growth")
MODES: tuple[Mode, ...] = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

RISKS: tuple[RiskMeasure, ...] = (KL(), ERM(5.0), CVaR(0.97), CVaR(0.05))
FROZEN_RISKS: tuple[RiskMeasure, ...] = (KL(), CVaR(0.97))
GROWTH_RISKS: dict[str, tuple[RiskMeasure, ...]] = {"cpu": (KL(),), "cuda": (KL(), CVaR(0.97))}
RISK_OVER_LOGP = -0.5  # of the loss that is differentiated, as in a preference loss with risk weight one half
DISCOUNT = 0.97

# (tokens, hidden, vocabulary). On a CPU after the first: a story model, a small BPE model, a Llama-2 vocabulary.
CPU_MAIN = (1024, 512, 32000)
GPU_MAIN = (8192, 4096, 128256)
LINEAR = {
    "cpu": (CPU_MAIN, (2048, 128, 512), (256, 256, 4096), (48, 256, 32000)),
    "cuda": (GPU_MAIN, (8192, 2048, 151936), (4096, 2048, 32000)),
}
LOGITS = {"cpu": ((1024, 32000), (2048, 512), (256, 4096)), "cuda": ((8192, 128256), (4096, 32000))}
# (sequences, tokens of each)
NESTED = {"cpu": ((16, 64), (64, 64), (512, 512)), "cuda": ((64, 64), (8192, 512))}
GROWTH = {
    "cpu": tuple((n, 512, 32000) for n in (128, 256, 512)) + tuple((512, 512, v) for v in (4000, 8000, 16000)),
    "cuda": ((4096, 4096, 128256), (16384, 4096, 128256), (8192, 4096, 32000), (8192, 4096, 151936)),
}
QUICK: dict[Op, tuple[tuple[int, ...], ...]] = {"linear": ((64, 32, 129),), "logits": ((64, 129),), "nested": ((3, 5),)}


class Spec(NamedTuple):
    """One call at one shape."""

    op: Op
    shape: tuple[int, ...]
    risk: RiskMeasure | None = None
    head: Head = ""

    @property
    def size(self) -> str:
        return " ".join(f"{name}={count}" for name, count in zip(AXES[self.op], self.shape, strict=True))

    def __str__(self) -> str:
        return title(self.op, self.size, "" if self.op == "nested" else str(self.risk), self.head)


def title(op: str, size: str, risk: str, head: str) -> str:
    """What a case is called, wherever one is; words that are empty are left out."""
    return " ".join(word for word in (op, size, risk, head and f"{head} head") if word)


AXES: dict[Op, str] = {"linear": "NHV", "logits": "NV", "nested": "ST"}


@dataclass(frozen=True)
class Case:
    """A call with its inputs. `flops` are those of matrix products; `moved` counts bytes.

    Of matrix products their operands, once each; of row kernels both logits in forward and again in backward, when the
    upstream gradients are known, and the gradient.
    """

    spec: Spec
    inputs: dict[str, Tensor]  # among them upstream gradients
    leaves: tuple[str, ...]  # inputs that get gradients
    flops: dict[Mode, float]
    moved: dict[Mode, float]

    @property
    def device(self) -> torch.device:
        return self.inputs["upstream"].device

    def cast(self, dtype: torch.dtype) -> "Case":
        """The same case with floating-point inputs in another dtype."""
        return replace(self, inputs={k: t.to(dtype) if t.is_floating_point() else t for k, t in self.inputs.items()})


def specs(suite: Suite, device: str, quick: bool) -> Iterator[Spec]:
    """The calls of a suite; those of `growth` complete the shapes of `linear` to rows of N and V."""
    if suite == "nested":
        yield from (Spec("nested", shape) for shape in (QUICK["nested"] if quick else NESTED[device]))
    elif suite == "logits":
        shapes = QUICK["logits"] if quick else LOGITS[device]
        yield from (Spec("logits", shape, risk) for shape in shapes for risk in RISKS)
    elif suite == "growth":
        shapes = ((32, 32, 129), (64, 32, 65)) if quick else GROWTH[device]
        yield from (Spec("linear", shape, risk, "trainable") for shape in shapes for risk in GROWTH_RISKS[device])
    else:
        for shape in QUICK["linear"] if quick else LINEAR[device]:
            yield from (Spec("linear", shape, risk, "trainable") for risk in (*RISKS, None))
            yield from (Spec("linear", shape, risk, "frozen") for risk in FROZEN_RISKS)


def make(spec: Spec, device: torch.device, dtype: torch.dtype) -> Case:
    """The same inputs whenever it is asked for: two cases need not fit in memory together."""
    random = torch.Generator(device).manual_seed(0)
    maker = {"linear": _linear, "logits": _logits, "nested": _nested}[spec.op]
    return maker(spec, dtype, random)


def _head(n: int, h: int, v: int, dtype: torch.dtype, random: torch.Generator) -> dict[str, Tensor]:
    """Logits with a spread of about 3 nats, and a reference a few hundredths of a nat away."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=random.device)

    spread = 3 / h**0.5
    hidden, weight = normal(n, h), normal(v, h).mul_(spread)
    ref_hidden, ref_weight = hidden + 0.05 * normal(n, h), normal(v, h).mul_(0.05 * spread).add_(weight)
    named = {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
    return {name: tensor.to(dtype) for name, tensor in named.items()} | {
        "labels": torch.randint(0, v, (n,), generator=random, device=random.device),
        "upstream": _signs(n, random),
    }


def _signs(n: int, random: torch.Generator) -> Tensor:
    """Upstream gradients of either sign and of magnitude about one."""
    uniform = torch.rand(2, n, generator=random, device=random.device)
    return (0.5 + uniform[0]) * torch.where(uniform[1] < 0.5, -1.0, 1.0)


def _linear(spec: Spec, dtype: torch.dtype, random: torch.Generator) -> Case:
    n, h, v = spec.shape
    product, operands = 2.0 * n * h * v, float(dtype.itemsize * (n * h + v * h))
    learns = spec.head == "trainable"
    return Case(
        spec,
        inputs=_head(n, h, v, dtype, random),
        leaves=("hidden", "weight") if learns else ("hidden",),
        flops={"forward": 2 * product, "forward+backward": (4 if learns else 3) * product},
        moved={"forward": 2 * operands, "forward+backward": (4 if learns else 3) * operands},
    )


def _logits(spec: Spec, dtype: torch.dtype, random: torch.Generator) -> Case:
    n, v = spec.shape
    head = _head(n, 64, v, dtype, random)
    inputs = {
        "policy_logits": head["hidden"] @ head["weight"].T,
        "ref_logits": head["ref_hidden"] @ head["ref_weight"].T,
        "labels": head["labels"],
        "upstream": head["upstream"],
    }
    one = float(dtype.itemsize * n * v)
    none: dict[Mode, float] = dict.fromkeys(MODES, 0.0)
    return Case(spec, inputs, ("policy_logits",), none, {"forward": 2 * one, "forward+backward": 5 * one})


def _nested(spec: Spec, dtype: torch.dtype, random: torch.Generator) -> Case:
    sequences, length = spec.shape
    n = sequences * length
    inputs = {
        "step_risk": torch.rand(n, generator=random, device=random.device),
        "cu_seqlens": torch.arange(0, n + 1, length, device=random.device),
        "upstream": _signs(n, random),
        "upstream_total": _signs(sequences, random),
    }
    none: dict[Mode, float] = dict.fromkeys(MODES, 0.0)
    return Case(spec, inputs, ("step_risk",), none, {"forward": 8.0 * n, "forward+backward": 16.0 * n})
