"""What a provider should have computed: values and gradients by definition, block of rows by block of rows.

In float64 this is the truth at any shape: rows do not depend on each other, and the gradient of a weight is a sum over
them. In the dtype of the benchmark it says how far plain torch is from the truth.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rsa_kernels import RiskMeasure, naive
from torch import Tensor

from benchmarks.kernels.cases import DISCOUNT, RISK_OVER_LOGP, Case

Named = dict[str, Tensor]

BLOCK_BYTES = {"cpu": 1e9, "cuda": 4e9}
TENSORS = 14  # of a block's logits in the dtype of the sums, held at once by the definition and its gradient
BETA = 0.1  # of DPO
OF_RESPONSES = ("chosen_logps", "rejected_logps")  # sums over their tokens
TOKENS_OF_A_RESPONSE = 512


@dataclass(frozen=True)
class Objective:
    """What is differentiated: `rows` makes numbers per row out of logits, `finish` outputs out of these."""

    name: str
    rows: Callable[[Tensor, Tensor, Tensor, RiskMeasure | None], Named]
    finish: Callable[[Named], Named]
    loss: Callable[[Named, Case], Tensor]


class Results(NamedTuple):
    """Outputs and gradients by name, and the largest upstream gradient of a row, in which gradients are measured."""

    values: Named
    gradients: Named
    unit: float


# ---- objectives ------------------------------------------------------------------------------------------------------


def named(stats: Any) -> Named:
    return {name: tensor for name, tensor in stats._asdict().items() if tensor is not None}


def sequences(rows: int) -> int:
    """How many equal responses the rows are for a loss that wants pairs: chosen ones first, as many rejected."""
    return 2 * max(1, rows // (2 * TOKENS_OF_A_RESPONSE))


def preference_terms(rows: Named) -> Named:
    """DPO of the responses: mean over pairs of −log σ(β (lr_chosen − lr_rejected)), and their log-probabilities."""
    count = sequences(rows["logp"].shape[0])
    logp, ref_logp = (rows[name].reshape(count, -1).sum(-1) for name in ("logp", "ref_logp"))
    chosen, rejected = (logp - ref_logp).chunk(2)
    loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
    return {"loss": loss, **dict(zip(OF_RESPONSES, logp.chunk(2), strict=True))}


def jensen_shannon(z: Tensor, r: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), in the dtype of the logits as distillation losses do it."""
    log_q, log_p = z.log_softmax(-1), r.log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1))


def _tokens_loss(outputs: Named, case: Case) -> Tensor:
    logp = outputs["logp"]
    weighted = logp + RISK_OVER_LOGP * outputs["risk"] if "risk" in outputs else logp
    return (case.inputs["upstream"].to(logp.dtype) * weighted).sum()


def _nested_loss(outputs: Named, case: Case) -> Tensor:
    upstream, upstream_total = (case.inputs[name].to(outputs["total"].dtype) for name in ("upstream", "upstream_total"))
    return (upstream * outputs["to_go"]).sum() + (upstream_total * outputs["total"]).sum()


TOKENS = Objective(
    "tokens", lambda z, r, labels, risk: named(naive.token_risk(z, r, labels, risk)), lambda rows: rows, _tokens_loss
)
LABELS = Objective(  # of the policy alone, in the dtype of the logits as cross-entropies do it
    "labels",
    lambda z, r, labels, risk: {"logp": -F.cross_entropy(z, labels, reduction="none")},
    lambda rows: rows,
    _tokens_loss,
)
DPO = Objective(
    "dpo",
    lambda z, r, labels, risk: named(naive.token_risk(z, r, labels, None)),
    preference_terms,
    lambda outputs, case: outputs["loss"],
)
JSD = Objective(
    "jsd",
    lambda z, r, labels, risk: {"jsd": jensen_shannon(z, r)},
    lambda rows: {"loss": rows["jsd"].to(torch.promote_types(rows["jsd"].dtype, torch.float32)).mean()},
    lambda outputs, case: outputs["loss"],
)
NESTED = Objective("nested", lambda *_: {}, lambda rows: rows, _nested_loss)


# ---- results ---------------------------------------------------------------------------------------------------------


def differentiate(call: Callable[[Case, Named], Named], objective: Objective, case: Case) -> tuple[Named, Named]:
    """Outputs of a call, and the gradients of the objective's loss."""
    inputs = {k: t.detach().requires_grad_(k in case.leaves) for k, t in case.inputs.items()}
    outputs = call(case, inputs)
    gradients = torch.autograd.grad(objective.loss(outputs, case), [inputs[k] for k in case.leaves])
    return outputs, dict(zip(case.leaves, gradients, strict=True))


def truth(case: Case, objective: Objective) -> Results:
    """In float64."""
    return defined(case.cast(torch.float64), objective, enough_blocks(case, 8))


def enough_blocks(case: Case, itemsize: int) -> int:
    n, v = case.spec.shape[0], case.spec.shape[-1]
    return max(1, min(n, -int(-n * v * itemsize * TENSORS // BLOCK_BYTES[case.device.type])))


def defined(case: Case, objective: Objective, blocks: int = 1, sums: torch.dtype | None = None) -> Results:
    """By definition in the dtype of the case; gradients of a weight are summed over blocks in `sums`, or in its own."""
    if case.spec.op == "nested":
        return _nested(case)
    with torch.no_grad():
        parts = [_rows(case, objective, case.inputs, block) for block in _slices(case, blocks)]
    rows = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
    outputs = objective.finish(rows)
    found = torch.autograd.grad(
        objective.loss(outputs, case), list(rows.values()), allow_unused=True, materialize_grads=True
    )
    upstream = dict(zip(rows, found, strict=True))
    values = {name: tensor.detach() for name, tensor in outputs.items()}
    unit = max(u.abs().max().item() for u in upstream.values())
    return Results(values, _gradients(case, objective, upstream, blocks, sums), min(1.0, unit))


def _gradients(case: Case, objective: Objective, upstream: Named, blocks: int, sums: torch.dtype | None) -> Named:
    totals = {}
    for name in case.leaves:
        like = case.inputs[name]
        totals[name] = torch.zeros_like(like, dtype=like.dtype if _by_row(name) else sums or like.dtype)
    for block in _slices(case, blocks):
        leaves = {k: (case.inputs[k][block] if _by_row(k) else case.inputs[k]).detach() for k in case.leaves}
        inputs = case.inputs | {k: t.requires_grad_() for k, t in leaves.items()}
        rows = _rows(case, objective, inputs, block)
        reached = [name for name, tensor in rows.items() if tensor.requires_grad]
        gradients = torch.autograd.grad(
            [rows[name] for name in reached], list(leaves.values()), [upstream[name][block] for name in reached]
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            if _by_row(name):
                totals[name][block] = gradient
            else:
                totals[name] += gradient.to(totals[name].dtype)
    return {name: total.to(case.inputs[name].dtype) for name, total in totals.items()}


def _by_row(leaf: str) -> bool:
    return leaf != "weight"


def _slices(case: Case, blocks: int) -> Iterator[slice]:
    n = case.spec.shape[0]
    return (slice(i * n // blocks, (i + 1) * n // blocks) for i in range(blocks))


def _rows(case: Case, objective: Objective, inputs: Named, block: slice) -> Named:
    """Of the rows of a block. A leaf that is cut by rows already is not cut again."""

    def of_block(name: str) -> Tensor:
        tensor = inputs[name]
        return tensor if tensor.requires_grad else tensor[block]

    if case.spec.op == "logits":
        z, r = of_block("policy_logits"), of_block("ref_logits")
    else:
        z = F.linear(of_block("hidden"), inputs["weight"])
        r = F.linear(inputs["ref_hidden"][block], inputs["ref_weight"])
    return objective.rows(z, r, inputs["labels"][block], case.spec.risk)


def _nested(case: Case) -> Results:
    """Position by position from the last, all sequences at once: they have the same length."""
    leaf = case.inputs["step_risk"].detach().requires_grad_()
    columns, to_go = leaf.reshape(case.spec.shape).unbind(1), list[Tensor]()
    for column in reversed(columns):
        to_go.append(column + DISCOUNT * to_go[-1] if to_go else column)
    outputs = {"to_go": torch.stack(to_go[::-1], dim=1).flatten(), "total": to_go[-1]}
    (gradient,) = torch.autograd.grad(_nested_loss(outputs, case), leaf)
    return Results({name: tensor.detach() for name, tensor in outputs.items()}, {"step_risk": gradient}, 1.0)
