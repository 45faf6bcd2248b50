"""Rows of unequal lengths as model inputs: padded on either side, or packed into one sequence without any padding.

A packed batch is one line of all rows. Position ids restart with every row, and `packed_attention`, registered with
transformers under the name `rsa_packed`, attends within rows only: neither a [T, T] mask of the pack nor a score
between two rows is ever made. Which attention a model runs is in its configuration's memory and not in config.json, so
a saved model knows nothing of it.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.parsing import first_line

PACKED = "rsa_packed"  # not a name that holds sdpa, flash or flex: transformers looks for these
# keywords that reach an attention function and change nothing of what it computes
IRRELEVANT = {"cache_position", "cu_seq_lens_k", "max_length_k", "position_ids"}
PROBE = (5, 1, 4)  # tokens of the rows that a model is tried on
# relative to the largest hidden state; norms of transformers round to float32 in models of float64, too
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
TOLERANCE_LOW_PRECISION = 3e-2


def model_inputs(batch: PreferenceBatch) -> dict[str, Any]:
    """What the model has to be given beside `input_ids`, so that every row is read as if it were alone.

    Nothing with padding on the right: causal attention never reads it, and is faster without a mask (a tenth of a step
    on a CPU).
    """
    if batch["row_bounds"] is not None:
        return packed_inputs(batch["row_bounds"], batch["input_ids"].device)
    if batch["left_padded"]:
        mask = batch["attention_mask"]
        return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {}


def packed_inputs(row_bounds: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Position ids and row boundaries of one line of rows, under the names that transformers gives them.

    `row_bounds` itself goes along for kernels that need the lengths on the host: reading them back from a GPU would
    make every layer wait.
    """
    lengths = [end - start for start, end in pairwise(row_bounds)]
    bounds = torch.tensor(row_bounds, dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {
        "position_ids": positions.to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "row_bounds": list(row_bounds),
    }


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 Hq T D"],
    key: Float[Tensor, "1 Hk T D"],
    value: Float[Tensor, "1 Hk T Dv"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " Hq"] | None = None,
    is_causal: bool | None = None,
    row_bounds: Sequence[int] | None = None,
    cu_seq_lens_q: Int32[Tensor, " B+1"] | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "1 T Hq Dv"], None]:
    """Causal attention within the rows of a pack, as an attention function of transformers.

    On a GPU in half precision one kernel takes all rows; elsewhere, and for what `why_not_varlen` names, every row is
    attended by itself, in memory of the longest row. `sliding_window` counts the keys a token sees, itself included;
    `s_aux` are the scores of attention sinks, one for each head.

    Raises:
        ValueError: it was given no rows, or something that it would have to leave out.
    """
    if row_bounds is None or cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise ValueError(
            "its attention was not told the rows of a pack: its forward does not hand them on, or it was not called by "
            "Policy.states (set it back with rsa_lightning.packing.attend(model, packed=False))"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = sorted(given - IRRELEVANT)
    unknown += ["attention_mask"] * (attention_mask is not None) + ["is_causal=False"] * (not causal)
    if unknown:
        raise ValueError(f"its attention uses {', '.join(unknown)}, which packed attention does not know")
    query, key, value = (_autocast(x) for x in (query, key, value))
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if why_not_varlen(query, key, value, dropout, softcap, s_aux) is None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        options["window_size"] = (-1 if window is None else window - 1, 0)  # keys before the query's own, and after it
        ends, longest = cu_seq_lens_q, max_length_q
        out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, **options)
        return out[None], None
    lengths = [end - start for start, end in pairwise(row_bounds)]
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outs = [_attend_row(q, k, v, dropout, scaling, window, softcap, s_aux) for q, k, v in rows]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)


def _autocast(x: Tensor) -> Tensor:
    """As scaled_dot_product_attention casts: rotary embeddings leave queries and keys in float32, values not."""
    kind = x.device.type
    wanted = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype(kind)) if wanted else x


def why_not_varlen(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, softcap: float | None, sinks: Tensor | None
) -> str | None:
    """Why the variable-length kernel cannot attend here, or None where it can."""
    if query.device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {query.device.type}, and it needs CUDA"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than the kernel, which needs compute capability 8.0"
    dtypes = {query.dtype, key.dtype, value.dtype}
    if dtypes not in ({torch.bfloat16}, {torch.float16}):
        return f"the tensors are in {', '.join(sorted(map(str, dtypes)))}, and it knows bfloat16 and float16"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"heads have {query.shape[-1]} and {value.shape[-1]} entries: it takes equal multiples of 8, up to 256"
    if query.shape[1] != key.shape[1] and "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return f"in torch {torch.__version__} it has no key heads that several query heads share"
    asked = {"dropout": dropout > 0, "soft-cap": softcap is not None, "attention sinks": sinks is not None}
    lacking = [name for name, wanted in asked.items() if wanted]
    return f"it has no {' or '.join(lacking)}" if lacking else None


def _attend_row(
    query: Float[Tensor, "1 Hq L D"],
    key: Float[Tensor, "1 Hk L D"],
    value: Float[Tensor, "1 Hk L Dv"],
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " Hq"] | None,
) -> Float[Tensor, "1 Hq L Dv"]:
    """Causal attention of one row; each key head serves Hq / Hk query heads."""
    length = query.shape[2]
    if softcap is None and sinks is None:
        mask = None if window is None or window >= length else _visible(length, window, query.device)
        options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_visible(length, window, query.device), -math.inf)
    if sinks is not None:  # a key of no value that every query sees
        scores = torch.cat([scores, sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(1, -1, length, 1)], dim=-1)
    # in float32 at least, as the models do
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights[..., :length], dropout) @ value


def _visible(length: int, window: int | None, device: torch.device) -> Bool[Tensor, "L L"]:
    """Whether a query (row) sees a key (column): not a later one, and only the last `window` of the others."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def attend(model: PreTrainedModel, packed: bool, *, check: bool = True) -> None:
    """Has the model attend within the rows of packed batches, or as it did before. Doing it again costs nothing.

    At the switch a small forward compares rows packed with the same rows alone, so an architecture that ignores
    position ids, carries a state from row to row or masks by other means is refused. On the meta device nothing is
    done: the first batch asks again.

    Args:
        check: false for a sharded model, whose plain copy has been checked.

    Raises:
        ValueError: packed rows are not what the rows are alone, with the name of the architecture and the reason.
    """
    if is_packed(model) == packed or next(model.parameters()).is_meta:
        return
    if not packed:
        model.set_attn_implementation(cast(str, model.attention_of_padded_rows))
        return
    current = model.config._attn_implementation
    model.attention_of_padded_rows = cast(Any, current)  # an attribute: a copy of the model has it, too
    if not check:
        model.set_attn_implementation(PACKED)
        return
    try:
        _switch(model)
    except Exception as error:  # whatever a forward raises that knows no such inputs is about the architecture
        model.set_attn_implementation(current)
        raise ValueError(
            f"{type(model).__name__} cannot be trained without padding: {first_line(error)}. Set data.padding_free to "
            "false"
        ) from error


def is_packed(model: PreTrainedModel) -> bool:
    """Whether the model attends within the rows of packed batches."""
    return model.config._attn_implementation == PACKED


def _switch(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise ValueError("it has an attention of its own, which transformers cannot replace")
    # outside of what runs around it: the check needs gradients, and the precision of the weights
    with torch.inference_mode(False), torch.autocast(model.device.type, enabled=False), _evaluating(model):
        probe = torch.arange(sum(PROBE), device=model.device)[None] % model.config.get_text_config().vocab_size
        alone = torch.cat([_states(model, row)[1] for row in probe.split(PROBE, dim=1)], dim=1)
        model.set_attn_implementation(PACKED)
        with _windows_told() as told:
            embedded, together = _states(model, probe, **packed_inputs([0, *accumulate(PROBE)], model.device))
        _check_windows(model.config.get_text_config(), told)
        _check_same(alone, together)
        _check_apart(embedded, together)


def _states(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Embeddings, as leaves of the graph, and last hidden states."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = cast(nn.Module, model.get_input_embeddings()).register_forward_hook(cut)
    try:
        with torch.enable_grad():
            states = model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    finally:
        hook.remove()
    return leaves[0], states


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_same(alone: Tensor, together: Tensor) -> None:
    """Raises ValueError where packed rows are not what the rows are alone."""
    gap = ((together - alone).abs().max() / alone.abs().max()).item()
    tolerance = TOLERANCE.get(alone.dtype, TOLERANCE_LOW_PRECISION)
    if not gap <= tolerance:
        raise ValueError(
            f"hidden states of rows of {', '.join(map(str, PROBE))} tokens, packed, are {gap:.2g} of the largest away "
            f"from those of the rows alone (tolerance {tolerance:g}), so it ignores position ids or mixes rows"
        )


def _check_apart(embedded: Tensor, states: Tensor) -> None:
    """Raises ValueError where the last row depends on those before it, however faintly.

    Its gradient there is zero, exactly and in any precision, while bfloat16 rounds states by more than a leak of a
    fresh state-space layer.
    """
    last = states[:, -PROBE[-1] :]
    # not a plain sum, which a norm holds fixed
    weights = torch.arange(last.numel(), device=last.device).cos().reshape(last.shape)
    (gradient,) = torch.autograd.grad((last * weights).sum(), embedded)
    if gradient[:, : -PROBE[-1]].any():
        raise ValueError("the states of a packed row depend on the row before it")


@contextmanager
def _windows_told() -> Iterator[set[int | None]]:
    """The sliding windows that a model tells its attention function of."""
    told: set[int | None] = set()

    def listening(*tensors: Any, **options: Any) -> tuple[Tensor, None]:
        told.add(options.get("sliding_window"))
        return packed_attention(*tensors, **options)

    AttentionInterface.register(PACKED, listening)
    try:
        yield told
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def _check_windows(config: Any, told: set[int | None]) -> None:
    """Raises ValueError where a model limits what a token sees by a mask alone: short rows do not show it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds or getattr(config, "attention_chunk_size", None):
        raise ValueError("it attends in chunks, which packed attention does not know")
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds) and window not in told:
        raise ValueError(f"its sliding window of {window} tokens is in its mask alone, and a packed batch has no mask")
