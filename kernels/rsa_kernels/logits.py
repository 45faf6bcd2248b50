"""`token_risk` of logits that the caller holds: the only other tensor of their size is their gradient.

Forward and backward are opaque custom operators, one node each for `torch.compile`.
"""

from typing import Any

import torch
from torch import Tensor

from rsa_kernels.loop import (
    Maybe,
    Outputs,
    alive_only,
    backward_loop,
    empty_outputs,
    forward_loop,
    no_second_derivative,
    no_tangents,
    row_pair,
    token_stats,
    upstream,
)
from rsa_kernels.naive import TokenStats
from rsa_kernels.pairs import RowGradients, RowOptions, accumulator


def token_risk(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, vocabulary: int, options: RowOptions, impl: str
) -> TokenStats:
    """`naive.token_risk` of the first `vocabulary` columns of logits [N, V] and [N, V']."""
    no_tangents(policy_logits)
    outputs = _forward(_rows(policy_logits), _rows(ref_logits.detach()), labels, vocabulary, options.encode(), impl)
    return token_stats(outputs, options)


def _rows(logits: Tensor) -> Tensor:
    """Unit stride along the vocabulary, which is what the rows are written for."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@torch.library.custom_op("rsa_kernels::token_risk", mutates_args=())
def _forward(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, vocabulary: int, options: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row_options, pair = RowOptions.decode(options), row_pair(impl)
    z, r = policy_logits[:, :vocabulary], ref_logits[:, :vocabulary]
    outputs = empty_outputs(labels, accumulator(z.dtype), row_options, pair)
    forward_loop(lambda chunk: (z[chunk], r[chunk]), outputs, labels, row_options, pair, max(1, labels.shape[0]))
    return outputs


@_forward.register_fake
def _(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, vocabulary: int, options: str, impl: str) -> Outputs:
    return empty_outputs(labels, accumulator(policy_logits.dtype), RowOptions.decode(options), row_pair(impl))


@torch.library.custom_op("rsa_kernels::token_risk_backward", mutates_args=())
def _backward(
    grad_logp: Tensor | None,
    grad_risk: Tensor | None,
    grad_kl: Tensor | None,
    policy_logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    saved: Tensor,
    vocabulary: int,
    options: str,
    impl: str,
) -> Tensor:
    row_options = RowOptions.decode(options)
    given = RowGradients(grad_logp, grad_risk, grad_kl)
    grads, _ = alive_only(labels, given, row_options.ignore_index, saved.dtype)
    z, r = policy_logits[:, :vocabulary], ref_logits[:, :vocabulary]
    d_logits = policy_logits.new_empty(policy_logits.shape)
    d_logits[:, vocabulary:] = 0.0
    backward_loop(
        lambda chunk: (z[chunk], r[chunk] if grads.needs_reference else None),
        lambda chunk, _: d_logits[chunk, :vocabulary],
        lambda chunk, _: None,
        labels,
        grads,
        saved,
        row_options,
        row_pair(impl),
        max(1, labels.shape[0]),
    )
    return d_logits


@_backward.register_fake
def _(grad_logp: Maybe, grad_risk: Maybe, grad_kl: Maybe, policy_logits: Tensor, *_: Any) -> Tensor:
    return policy_logits.new_empty(policy_logits.shape)


_backward.register_autograd(no_second_derivative)


def _setup(ctx: Any, inputs: tuple, output: Outputs) -> None:
    policy_logits, ref_logits, labels, *ctx.constants = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(policy_logits, ref_logits, labels, output[5])


def _vjp(ctx: Any, grad_logp: Maybe, _ref: Maybe, grad_risk: Maybe, grad_kl: Maybe, *_: Any) -> tuple:
    grads = upstream(RowOptions.decode(ctx.constants[1]), grad_logp, grad_risk, grad_kl)
    return _backward(*grads, *ctx.saved_tensors, *ctx.constants), None, None, None, None, None


_forward.register_autograd(_vjp, setup_context=_setup)
