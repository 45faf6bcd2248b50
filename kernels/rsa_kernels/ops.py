"""The public face of the operators: signatures, checks and the choice of an implementation. No arithmetic."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rsa_kernels import checks, linear, logits, naive, nested, tree
from rsa_kernels.dispatch import Impl, resolve
from rsa_kernels.naive import NestedRisk, TokenStats
from rsa_kernels.risk import RiskMeasure
from rsa_kernels.workspace import Strategy, check_strategy


def token_risk(
    policy_logits: Float[Tensor, "*n V"],
    ref_logits: Float[Tensor, "*n W"],
    labels: Int[Tensor, "*n"],
    risk: RiskMeasure | None,
    *,
    scale: float = 1.0,
    ref_scale: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    entropy: bool = False,
    impl: Impl = "auto",
) -> TokenStats:
    """Log-probabilities of the labels, and the risk of having left the reference, at every position.

        x_v  = log p_v − log q_v        p = softmax(ref_logits), q = softmax(policy_logits)
        risk = ρ_{v∼p}(x_v)             large where the policy has removed mass
        kl   = E_{v∼p} x_v              KL(p ‖ q); the same tensor as risk when risk is KL()

    Equals `naive.token_risk`, a page of torch, row by row: the only tensor [*n, V] it makes is the gradient, in the
    dtype of `policy_logits` (and a copy of logits that cannot be viewed as [N, V], such as a slice of positions).

    Args:
        labels: int64; at `ignore_index` all outputs are exactly 0 and no gradient flows, even where logits or upstream
            gradients are nan.
        risk: None leaves `risk` and `kl` out, for losses that need log-probabilities only.
        scale, softcap: logits become softcap · tanh(scale · logits / softcap) first; −inf marks a column that does not
            exist and stays −inf.
        valid_vocab: the vocabulary is the first `valid_vocab` columns; what follows is padding, of any width in either
            model, and gets gradient 0. By default all columns, which then must be as many in both.
        entropy: also return H(q) in nats, detached, for logging.
        impl: "auto" is "triton" on a GPU where it can run and "chunked" elsewhere, and logs which and why, once; any
            other name is binding.

    Returns:
        fp32 (fp64 for fp64 logits), nats. All but `ref_logp` and `entropy` carry gradients, to `policy_logits` only,
        and not twice: ∂risk/∂policy_logits = q − w with w = risk.weights(x, log p). `risk` and `kl` are inf where
        q_v = 0 < p_v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of its range, or (CPU only) a label is
            outside [0, V); on a GPU such a position becomes nan.
        TypeError: something is no tensor, or a DTensor, i.e. a shard.
        RuntimeError: `impl` names something that cannot run here; the message says why and what to use instead.

    Sources: KL, TDPO (arXiv:2404.11999); CVaR and ERM, Ra-DPO (arXiv:2505.20359) and RSA (arXiv:2512.24263).
    """
    checks.tensors(policy_logits=policy_logits, ref_logits=ref_logits, labels=labels)
    checks.floats(policy_logits=policy_logits, ref_logits=ref_logits)
    if not policy_logits.shape[:-1] == ref_logits.shape[:-1] == labels.shape:
        raise ValueError(
            "token_risk wants policy_logits and ref_logits [*n, V] and labels [*n], got "
            f"{checks.shape(policy_logits)}, {checks.shape(ref_logits)} and {checks.shape(labels)}"
        )
    widths = policy_logits.shape[-1], ref_logits.shape[-1]
    vocabulary = checks.vocabulary(
        valid_vocab, widths, f"policy_logits have {widths[0]} columns and ref_logits {widths[1]}"
    )
    options = checks.options(risk, scale, ref_scale, softcap, ref_softcap, ignore_index, entropy)
    checks.labels_inside(vocabulary, labels, options)
    implementation = resolve(impl, policy_logits, risk)
    if implementation == "naive":
        real = policy_logits[..., :vocabulary], ref_logits[..., :vocabulary]
        return naive.token_risk(*real, labels, **options._asdict())
    z, r = (t.reshape(labels.numel(), t.shape[-1]) for t in (policy_logits, ref_logits))
    stats = logits.token_risk(z, r, labels.flatten(), vocabulary, options, implementation)
    return TokenStats._make(None if s is None else s.reshape(labels.shape) for s in stats)


def linear_token_risk(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "N R"] | None,
    ref_weight: Float[Tensor, "W R"] | None,
    labels: Int[Tensor, " N"],
    risk: RiskMeasure | None,
    *,
    bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " W"] | None = None,
    scale: float = 1.0,
    ref_scale: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    entropy: bool = False,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    risk_over_logp: float | Float[Tensor, " N"] | None = None,
    impl: Impl = "auto",
) -> TokenStats:
    """`token_risk` of hidden @ weight.T + bias and ref_hidden @ ref_weight.T + ref_bias, never holding all N rows.

    Arguments and returns as in `token_risk`. Gradients flow to `hidden`, `weight` and `bias` where they are wanted.
    Pass scored rows only: prompts and padding would cost as much as responses.

    Args:
        ref_hidden, ref_weight: of the frozen reference; another hidden size is fine. Both None, with risk=None, scores
            the policy alone: `ref_logp` is then exactly 0.
        strategy: what is kept for backward. "cache": the logits of both models, in their dtypes; "recompute": nothing,
            backward makes the logits again; "frozen", where neither weight nor bias wants a gradient: the gradient of
            `hidden`, made in forward, one tensor [N, H] for each of logp and risk. "auto" takes what costs the fewest
            matrix products within `workspace_bytes`. The definition (`impl="naive"`) checks the name only.
        workspace_bytes: bound on what a call holds beside inputs, outputs and gradients: logits, kept or of one chunk
            of rows, and their temporaries; by default 512 MiB on a CPU, of which a chunk takes 64 MiB, and 1 GiB on a
            GPU. A strategy that is named may exceed it, and a chunk has at least one row, which takes 56 bytes per
            vocabulary entry in fp32 torch. It holds on a CPU for the measures of this package; the sort of `CVaR` in
            torch on a GPU, and a measure of your own, may take more. Not counted: what "frozen" keeps, copies of the
            rows of `hidden` in a chunk, and the fp32 sum of the gradient of bf16 weights.
        risk_over_logp: a promise that the loss's gradients have this ratio, ∂loss/∂risk = risk_over_logp · ∂loss/∂logp,
            at every position, and none by kl unless that is the risk. It saves "frozen" one matrix product and one
            tensor [N, H]. A broken promise is an error in backward on a CPU, and nan at its positions on a GPU; the
            definition does not look at it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an option is out of its range, strategy="frozen" is named
            though the head wants a gradient, or (CPU only) a label is outside [0, V).
        TypeError: something is no tensor, or a DTensor, i.e. a shard.
        RuntimeError: `impl` names something that cannot run here.
    """
    options = checks.options(risk, scale, ref_scale, softcap, ref_softcap, ignore_index, entropy)
    optional = {"bias": bias, "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    checks.tensors(hidden=hidden, weight=weight, labels=labels, **given)
    checks.floats(hidden=hidden, weight=weight, **given)
    checks.model(hidden, weight, bias, labels, "")
    if (ref_hidden is None) != (ref_weight is None):
        raise ValueError("ref_hidden and ref_weight come together: pass both, or neither to score the policy alone")
    if ref_hidden is None and ref_bias is not None:
        raise ValueError("ref_bias is part of a reference: pass ref_hidden and ref_weight too, or leave it out")
    if ref_hidden is None and risk is not None:
        raise ValueError(f"risk={risk} compares with a reference: pass ref_hidden and ref_weight, or risk=None")
    if ref_hidden is not None and ref_weight is not None:
        checks.model(ref_hidden, ref_weight, ref_bias, labels, "ref_")
    widths = (weight.shape[0],) if ref_weight is None else (weight.shape[0], ref_weight.shape[0])
    vocabulary = checks.vocabulary(valid_vocab, widths, f"weight has {widths[0]} rows and ref_weight {widths[-1]}")
    checks.labels_inside(vocabulary, labels, options)
    ratio = checks.ratio(risk_over_logp, labels, risk)
    budget = checks.budget(workspace_bytes)
    implementation = resolve(impl, hidden, risk)
    policy, reference = _autocast(hidden, weight, bias), _autocast(ref_hidden, ref_weight, ref_bias)
    checks.dtypes(policy, "")
    checks.dtypes(reference, "ref_")
    with torch.autocast(hidden.device.type, enabled=False):
        if implementation != "naive":
            kept: dict[str, Any] = {"strategy": strategy, "workspace_bytes": budget, "risk_over_logp": ratio}
            return linear.linear_token_risk(policy, reference, labels, vocabulary, options, implementation, **kept)
        check_strategy(strategy, torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in policy[1:]))
        hidden, weight, bias = _columns(policy, vocabulary)
        ref_hidden, ref_weight, ref_bias = _columns(reference, vocabulary)
        others: dict[str, Any] = {"bias": bias, "ref_bias": ref_bias, **options._asdict()}
        return naive.linear_token_risk(hidden, weight, ref_hidden, ref_weight, labels, **others)


def nested_risk(
    step_risk: Float[Tensor, " N"], cu_seqlens: Int[Tensor, " S+1"], *, discount: float = 1.0, impl: Impl = "auto"
) -> NestedRisk:
    """R_t = step_risk_t + discount · R_{t+1} within each sequence; total[s] is R at its first token, 0 if it has none.

    `cu_seqlens` holds the sequence boundaries in the packed tokens, 0 first and N last, as in variable-length
    attention. By translation equivariance this is the nested form ρ(cost + discount · R) along the observed sequence.

    Results have the dtype of `step_risk`; sums are kept in fp32, or fp64 for fp64.

    Raises:
        ValueError: shapes or dtypes do not fit, the discount is outside [0, 1], or (CPU only) the boundaries do not
            rise from 0 to N; on a GPU the kernels give nan to sequences outside of [0, N] and to tokens in none.
        RuntimeError: `impl` names something that cannot run here.
    """
    checks.tensors(step_risk=step_risk, cu_seqlens=cu_seqlens)
    checks.boundaries(step_risk, cu_seqlens)
    discount = checks.discount(discount)
    implementation = resolve(impl, step_risk, None)
    if implementation == "naive":
        return naive.nested_risk(step_risk, cu_seqlens, discount=discount)
    return nested.nested_risk(step_risk, cu_seqlens, discount=discount, impl=implementation)


def nested_risk_tree(
    values: Float[Tensor, " n"],
    probs: Float[Tensor, " n"],
    parents: Int[Tensor, " n"],
    risk: RiskMeasure,
    *,
    discount: float = 1.0,
) -> Float[Tensor, " n"]:
    """Nested risk at every node of a forest of continuations, where `nested_risk` follows one observed path.

        V_i = values_i                                      at a leaf
        V_i = values_i + discount · ρ_{j∼probs}(V_j)        over the children j of an inner node

    Nodes are prefixes, children their continuations; a batch of trees is one forest. Costs: large is bad. With returns,
    pass their negatives and negate the result.

    On a tree in which all children j of a node share what follows, V_j = x_j + discount · R, translation equivariance
    gives ρ(V) = ρ(x) + discount · R: the recursion of `nested_risk` with step_risk = ρ(x). That is what `nested_risk`
    assumes of the tokens beside the observed path; here every continuation has costs of its own.

    Args:
        values: float32 or float64; the cost at a leaf, and at an inner node a cost that is added, 0 for costs at the
            leaves only. +inf and nan reach the ancestors, but not through outcomes without mass.
        probs: float32 or float64; of a node given its parent. Siblings sum to 1 within 1e-4, and the difference is
            divided out; 0 is allowed. Constants: no gradient flows to them. Not read at roots.
        parents: int64, -1 at a root; in any order of nodes.
        risk: any measure, also one of your own.

    Returns:
        V in the dtype of `values`, computed in fp64. ∂V_i/∂values_j is the product of discount · w along the path from
        i down to j, with w = risk.weights among siblings. The number of operations grows with the depth and not with
        the width; the shape of the forest is read on the host, which costs a GPU a sync.

    Raises:
        ValueError: shapes or dtypes do not fit, discount is outside [0, 1], a parent is out of range, nodes form a
            cycle, or probabilities are negative, nan, or of siblings that do not sum to 1.

    Sources: Ruszczynski (2010), Risk-averse dynamic programming; Ra-DPO (arXiv:2505.20359), RSA (arXiv:2512.24263).
    """
    if not isinstance(risk, RiskMeasure):
        raise ValueError(f"risk is a RiskMeasure such as CVaR(tail=0.97), got {risk!r}")
    checks.tensors(values=values, probs=probs, parents=parents)
    checks.forest(values, probs, parents)
    return tree.nested_risk_tree(values, probs, parents, risk, checks.discount(discount))


def _columns(model: tuple, vocabulary: int) -> list[Any]:
    """hidden, weight and bias of a model without its padding."""
    hidden, weight, bias = model
    return [hidden, *(None if t is None else t[:vocabulary] for t in (weight, bias))]


def _autocast(*tensors: Any) -> tuple:
    """Custom operators bypass autocast, so the cast of a linear layer happens here."""
    device = next((t.device.type for t in tensors if t is not None), "cpu")
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
