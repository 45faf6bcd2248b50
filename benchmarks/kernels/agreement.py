"""Agree first: nothing is timed that does not compute what it should.

A provider may be twice as far from the float64 truth as plain torch in the same dtype that adds up in the same order,
plus a little: 1e-6 in fp32 and 1e-4 in bf16, gradients in units of the largest upstream gradient. From hidden states in
bf16 most of that is the rounding of logits, which everybody shares; what rows compute is held tightly where logits are
the inputs. Log-probabilities of whole responses are sums of thousands of nats, and the little is of their size.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.exact import BETA, OF_RESPONSES, Results, defined, differentiate, enough_blocks, truth
from benchmarks.kernels.providers import Missing, Provider

EPSILON = {torch.float32: 1e-6, torch.bfloat16: 1e-4}
PART = 2**26  # elements compared at a time: a difference in float64 should not need more room than the gradient


class Error(NamedTuple):
    """The largest error of one value or gradient of a provider, and what was allowed."""

    provider: str
    name: str
    size: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.size <= self.allowed  # nan does not


class Agreement(NamedTuple):
    """Which providers may be timed, what was found, what could not run, and a sentence for each disagreement."""

    providers: list[Provider]
    errors: list[Error]
    missing: list[Missing]
    disagreements: list[str]


def check(case: Case, providers: Sequence[Provider], dtype: torch.dtype) -> Agreement:
    """Runs every provider on the inputs of the benchmark and compares values and gradients by name."""
    found = Agreement([], [], [], [])
    order = sorted(providers, key=lambda p: p.objective.name)
    for _, group in groupby(order, key=lambda p: p.objective.name):
        members = list(group)
        exact = truth(case, members[0].objective)
        near: dict[tuple, dict[str, float]] = {}
        for provider in members:
            how = provider.blocks, provider.sums
            if how not in near:
                near[how] = distances(_plain(case, provider), exact)
            _check_one(case, provider, exact, near[how], EPSILON[dtype], found)
        del exact
    found.providers.sort(key=list(providers).index)
    return found


def _check_one(
    case: Case, provider: Provider, exact: Results, near: dict[str, float], epsilon: float, found: Agreement
) -> None:
    try:
        values, gradients = differentiate(provider.call, provider.objective, case)
    except torch.OutOfMemoryError:
        found.missing.append(Missing(provider.name, "out of memory"))
        if case.device.type == "cuda":
            torch.cuda.empty_cache()  # what it took in pieces should not be what the next one lacks
        return
    except Exception as error:
        # what another project raises here says that it cannot run; what ours raises is a fault
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
        if provider.kind == "peer":
            found.missing.append(Missing(provider.name, reason))
        else:
            found.disagreements.append(f"{case.spec}: {provider.name} failed: {reason}")
        return
    results = Results({k: t.detach() for k, t in values.items()}, gradients, 1.0)
    errors = [
        Error(provider.name, name, size, 2 * near[name] + epsilon * magnitude(name, exact))
        for name, size in distances(results, exact).items()
    ]
    found.errors.extend(errors)
    wrong = [error for error in errors if not error.agrees]
    if not wrong:
        found.providers.append(provider)
    found.disagreements.extend(
        f"{case.spec}: {e.provider} {e.name} is off by {e.size:.2e}, allowed are {e.allowed:.2e}" for e in wrong
    )


def magnitude(name: str, exact: Results) -> float:
    """What rounding is relative to: 1, but for sums over responses their size, and for the loss of these and its
    gradients, where such an error arrives times β, β times that."""
    sums = [exact.values[name].abs().max().item() for name in OF_RESPONSES if name in exact.values]
    return max([1.0, *sums] if name in OF_RESPONSES else [1.0, *(BETA * size for size in sums)])


def _plain(case: Case, provider: Provider) -> Results:
    """Plain torch in the dtype of the case, in blocks where whole tensors do not fit."""
    try:
        return defined(case, provider.objective, provider.blocks, provider.sums)
    except torch.OutOfMemoryError:
        blocks = max(provider.blocks, enough_blocks(case, 4))
        return defined(case, provider.objective, blocks, torch.float32)


def distances(results: Results, exact: Results) -> dict[str, float]:
    """Largest errors of what was computed, by name; gradients in the unit of the truth."""
    errors = {name: distance(tensor, exact.values[name]) for name, tensor in results.values.items()}
    for name, gradient in results.gradients.items():
        errors[f"gradient of {name}"] = distance(gradient, exact.gradients[name]) / exact.unit
    return errors


def distance(ours: Tensor, truth: Tensor) -> float:
    """max |ours − truth|; nan where there is one."""
    parts = zip(ours.detach().flatten().split(PART), truth.flatten().split(PART), strict=True)
    return torch.stack([(a.double() - b).abs().max() for a, b in parts]).max().item()
