"""Several models decoded as one: at every token a geometric mixture of their distributions.

    log q(y_t | x, y_<t) = sum_k w_k log p_k(y_t | x, y_<t) - log Z_t,    sum_k w_k = 1

The weights sum to one and may be negative. (1 - q, q) of a reward-aligned and a safer model interpolates between them,
of which an average of weights is the first-order surrogate. {reward: 1, safety: 1, warmup: -1} is the product of two
experts trained in parallel from one reference; with DPO it is the joint optimum per token where each was optimal.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast

from rsa_lightning.weights import check_weights


def mixed_logits(logits: Sequence[Float[Tensor, "*n V"]], weights: Sequence[float]) -> Float[Tensor, "*n V"]:
    """sum_k w_k log softmax(l_k), float32 (float64 of such): logits of the mixture, not normalised.

    A token that a member rules out (-inf) is ruled out, whatever the others say. A member of weight zero says nothing.
    """
    total: Tensor | None = None
    banned: Tensor | None = None
    for values, weight in zip(logits, weights, strict=True):
        if weight == 0:
            continue
        logp = values.to(torch.promote_types(values.dtype, torch.float32)).log_softmax(-1)
        total = weight * logp if total is None else total + weight * logp
        never = logp == -torch.inf
        banned = never if banned is None else banned | never
    if total is None or banned is None or not any(weight > 0 for weight in weights):
        raise ValueError(f"weights {list(weights)}: a mixture needs a member of positive weight")
    return total.masked_fill(banned, -torch.inf)


def check_widths(widths: Sequence[int], names: Sequence[str]) -> None:
    """Raises ValueError where models give different numbers of logits: their ids cannot mean the same tokens."""
    for name, width in zip(names, widths, strict=True):
        if width != widths[0]:
            raise ValueError(
                f"vocabulary mismatch: {names[0]} gives {widths[0]} logits and {name} {width}: only models of one "
                "vocabulary can be mixed"
            )


class Mixture:
    """Causal language models called as one: the logits are those of the mixture, every model keeps its own cache.

    Takes what a transformers model takes, and gives logits and past_key_values; so whatever samples or scores by
    calling a model does so of the mixture.

    Raises:
        ValueError: weights that do not sum to one, or models of different vocabularies.
    """

    def __init__(self, models: Sequence[Any], weights: Sequence[float]) -> None:
        names = [f"member {i}" for i in range(len(models))]
        check_weights(dict(zip(names, weights, strict=True)))
        check_widths([width(model) for model in models], names)
        self.models, self.weights = list(models), list(weights)
        self.config, self.generation_config = models[0].config, getattr(models[0], "generation_config", None)

    @property
    def device(self) -> torch.device:
        return self.models[0].device

    def __call__(self, past_key_values: "Caches | None" = None, **inputs: Any) -> CausalLMOutputWithPast:
        caches = past_key_values.caches if past_key_values is not None else [None] * len(self.models)
        outputs = [model(**inputs, past_key_values=cache) for model, cache in zip(self.models, caches, strict=True)]
        logits: Any = mixed_logits([output.logits for output in outputs], self.weights)
        kept: Any = Caches([output.past_key_values for output in outputs])
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)


class Caches:
    """The caches of the members; rows are selected in all of them."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.caches = list(caches)

    def batch_select_indices(self, indices: Tensor) -> None:
        for cache in self.caches:
            cache.batch_select_indices(indices)


class MixedLogits(LogitsProcessor):
    """Makes `main.generate(..., logits_processor=[MixedLogits(...)])` decode the mixture of `main` and other models.

    Every other model has its own cache, which grows with the tokens generated; where the rows are not those of the last
    call with a token each (a new call of generate, beams that changed places) it reads all of them again.

    Args:
        models: the further members; `main` is the model whose generate is called.
        weights: of `main` first, then of `models`; they sum to one.
        attention_mask: of the prompts, as given to generate, where they are padded (on the left). None: none is padded.

    Raises:
        ValueError: weights that do not sum to one; when called, other numbers of logits, or a mask of other prompts.
    """

    def __init__(self, models: Sequence[Any], weights: Sequence[float], attention_mask: Tensor | None = None) -> None:
        names = ["the main model", *(f"model {i}" for i in range(1, len(models) + 1))]
        if len(weights) != len(names):
            raise ValueError(
                f"{len(models)} further models need {len(names)} weights, the first of them for the model that "
                f"generates; got {len(weights)}"
            )
        check_weights(dict(zip(names, weights, strict=True)))
        self.models, self.weights, self.names = list(models), list(weights), names
        self.mask = attention_mask
        self._seen: Tensor | None = None
        self._caches: list[Any] = []

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_widths([scores.shape[-1], *map(width, self.models)], self.names)
        continued = (
            self._seen is not None
            and self._seen.shape == input_ids[:, :-1].shape
            and torch.equal(self._seen, input_ids[:, :-1])
        )
        fresh = input_ids[:, -1:] if continued else input_ids
        mask = self._mask(input_ids)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        caches = self._caches if continued else [None] * len(self.models)
        outputs = [
            model(
                input_ids=fresh,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            for model, cache in zip(self.models, caches, strict=True)
        ]
        self._caches, self._seen = [output.past_key_values for output in outputs], input_ids.clone()
        others = [output.logits[:, -1].to(scores.device) for output in outputs]
        # normalised: beam search compares the sums of what it gets here
        return mixed_logits([scores, *others], self.weights).log_softmax(-1)

    def _mask(self, input_ids: Tensor) -> Tensor:
        """The mask of the prompts, repeated where each has several rows, and ones for what was generated."""
        rows, length = input_ids.shape
        if self.mask is None:
            return torch.ones_like(input_ids)
        prompts, width_of_prompts = self.mask.shape
        if rows % prompts or length < width_of_prompts:
            raise ValueError(
                f"attention_mask is of {prompts} prompts of {width_of_prompts} tokens, and generate has {rows} rows of "
                f"{length}: make a MixedLogits with the mask of these prompts"
            )
        mask = self.mask.to(input_ids).repeat_interleave(rows // prompts, 0)
        return torch.cat((mask, mask.new_ones(rows, length - width_of_prompts)), 1)


def width(model: Any) -> int:
    """How many logits a model gives."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return int(head.weight.shape[0]) if head is not None else int(model.config.get_text_config().vocab_size)
