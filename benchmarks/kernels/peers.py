"""Other ways to the same numbers: the published formulation of the methods, and libraries that compute part of it."""

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rsa_kernels import ERM, KL, CVaR, RiskMeasure
from torch import Tensor

from benchmarks.kernels.cases import Case, Spec
from benchmarks.kernels.exact import BETA, DPO, JSD, LABELS, Named, sequences
from benchmarks.kernels.providers import Missing, Offer, Provider

CHUNK_ROWS = 1024  # of Liger's distillation by default
NOT_INSTALLED = "liger_kernel is not installed: pip install -c constraints.txt liger-kernel"


# ---- the published formulation ---------------------------------------------------------------------------------------


def published(spec: Spec) -> Provider:
    """Logits of every row materialised, softmax and logarithm of both models, CVaR through a sort of every row, and
    gradients by autograd: what the research code of these methods does, with the risk measure as the papers define it.
    """

    def call(case: Case, t: Named) -> Named:
        if spec.op == "logits":
            return published_rows(t["policy_logits"], t["ref_logits"], t["labels"], spec.risk)
        with torch.no_grad():
            r = F.linear(t["ref_hidden"], t["ref_weight"])
        return published_rows(F.linear(t["hidden"], t["weight"]), r, t["labels"], spec.risk)

    return Provider("research", "torch", call)


def published_rows(z: Tensor, r: Tensor, labels: Tensor, risk: RiskMeasure | None) -> Named:
    """logp, ref_logp, ρ_{v∼p}(log p_v − log q_v) and its mean, of logits [N, V]."""
    z, r = (_centred(t) for t in (z, r.detach()))
    # log-softmax written out: torch's own adds up with twice the error of the definition on a CPU
    z_norm, r_norm = (t.logsumexp(-1, keepdim=True) for t in (z, r))
    log_q, log_p = z - z_norm, r - r_norm
    logp, ref_logp = (t.gather(-1, labels[:, None]).squeeze(-1) for t in (log_q, log_p))
    if risk is None:
        return {"logp": logp, "ref_logp": ref_logp}
    p = log_p.exp()
    # The logits first: outcomes that tie in them must stay tied, or rounding would decide which of them are the tail.
    x = (r - z) - (r_norm - z_norm)
    kl = (p * x).sum(-1)
    return {"logp": logp, "ref_logp": ref_logp, "risk": _published_risk(risk, x, p, log_p, kl), "kl": kl}


def _centred(logits: Tensor) -> Tensor:
    """In fp32 or fp64, the largest of each row 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - logits.detach().amax(-1, keepdim=True)


def _published_risk(risk: RiskMeasure, x: Tensor, p: Tensor, log_p: Tensor, kl: Tensor) -> Tensor:
    if isinstance(risk, KL):
        return kl
    if isinstance(risk, ERM):
        return torch.logsumexp(log_p + risk.mu * x, dim=-1) / risk.mu
    assert isinstance(risk, CVaR), f"no formulation of {risk} was published"
    return (sorted_tail(x.detach(), p, risk.tail) * x).sum(-1)


def sorted_tail(x: Tensor, p: Tensor, tail: float) -> Tensor:
    """Risk-adjusted probabilities: p / tail above the upper quantile, what is left of the mass at it, 0 below."""
    descending, order = x.sort(dim=-1, descending=True)
    reached = p.gather(-1, order).cumsum(-1)
    wanted = tail * p.sum(-1, keepdim=True)
    place = (reached < tail * reached[:, -1:]).sum(-1, keepdim=True)
    threshold = descending.gather(-1, place)
    above, at = torch.where(x > threshold, p, 0.0), torch.where(x == threshold, p, 0.0)
    share = (wanted - above.sum(-1, keepdim=True)) / at.sum(-1, keepdim=True)
    return (above + share.clamp(0, 1) * at) / tail


# ---- libraries -------------------------------------------------------------------------------------------------------


def linear_peers(spec: Spec, device: torch.device, dtype: torch.dtype) -> Iterator[Offer]:
    """Libraries that compute less: DPO of the labels, the Jensen-Shannon divergence, or the label log-probability of
    the policy. They stand beside the KL, which is what they come closest to, and where there is no risk.
    """
    if spec.risk is not None and not isinstance(spec.risk, KL):
        return
    yield _liger_dpo(spec, device, dtype)
    yield _liger_jsd(spec, device, dtype)
    if spec.risk is None:
        yield _torch_cross_entropy(spec, dtype)


def _liger_dpo(spec: Spec, device: torch.device, dtype: torch.dtype) -> Offer:
    if importlib.util.find_spec("liger_kernel") is None:
        return Missing("liger-dpo", NOT_INSTALLED)
    count = sequences(spec.shape[0])
    if spec.shape[0] % count:
        return Missing("liger-dpo", f"{spec.shape[0]} rows are no {count} responses of equal length")
    loss = _chunked_loss("LigerFusedLinearDPOLoss", beta=BETA, compiled=device.type == "cuda")

    def call(case: Case, t: Named) -> Named:
        def folded(name: str) -> Tensor:
            return t[name].reshape(count, case.spec.shape[0] // count, *t[name].shape[1:])

        states = (t["weight"], folded("hidden"), folded("labels"))
        value, more = loss(*states, ref_input=folded("ref_hidden"), ref_weight=t["ref_weight"])
        return {"loss": value, "chosen_logps": more[0], "rejected_logps": more[1]}

    return Provider("liger-dpo", "peer", call, DPO, blocks=count // 2, sums=dtype)


def _liger_jsd(spec: Spec, device: torch.device, dtype: torch.dtype) -> Offer:
    if importlib.util.find_spec("liger_kernel") is None:
        return Missing("liger-jsd", NOT_INSTALLED)
    if spec.head == "frozen":
        return Missing("liger-jsd", "it always computes the gradient of the head")
    how = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "chunk_size": CHUNK_ROWS}
    loss = _chunked_loss("LigerFusedLinearJSDLoss", **how, compiled=device.type == "cuda")

    def call(case: Case, t: Named) -> Named:
        return {"loss": loss(t["hidden"], t["weight"], t["ref_hidden"], t["ref_weight"], t["labels"])}

    blocks = max(1, spec.shape[0] // CHUNK_ROWS)
    return Provider("liger-jsd", "peer", call, JSD, "it makes the gradients, wanted or not", blocks, dtype)


def _chunked_loss(name: str, **options: Any) -> Any:
    return getattr(importlib.import_module("liger_kernel.chunked_loss"), name)(**options)


def _torch_cross_entropy(spec: Spec, dtype: torch.dtype) -> Offer:
    if not hasattr(F, "linear_cross_entropy"):
        return Missing("torch-lce", f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def call(case: Case, t: Named) -> Named:
        return {
            "logp": -F.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], reduction="none", options=options)
        }

    # it adds up chunks, of a size of its own, in the dtype of the weight
    return Provider("torch-lce", "peer", call, LABELS, blocks=max(1, spec.shape[0] // CHUNK_ROWS), sums=dtype)
