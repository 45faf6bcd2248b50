"""Policies and adapters as folders that transformers and peft load."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rsa_lightning.adapters import CONFIG, merged, write_adapter
from rsa_lightning.checkpoint import check_replaceable, replaced_whole
from rsa_lightning.models import Policy, load_policy
from rsa_lightning.parallel.sharding import gather


def whole(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """A sharded policy as a plain one on the CPU of the first process; all processes call this.

    On the others it is a model without weights.
    """
    assert policy.spec is not None
    state, plain = gather(policy), load_policy(policy.spec, tokenizer, weights=False)
    return filled(plain, state, dict(policy.named_buffers())) if state else plain


def filled(plain: Policy, state: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Policy:
    """Gives a policy on the meta device its weights, and the buffers that no state dict holds."""
    plain.load_state_dict(state, assign=True)
    plain.model.tie_weights()
    for name, buffer in plain.named_buffers():
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            plain.get_submodule(path)._buffers[leaf] = buffers[name].cpu()
    return plain


def save_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a Hugging Face folder that plain transformers loads; it appears whole or not at all.

    Adapters are merged in, in float32, and in memory nothing changes. An earlier model in `folder` is replaced.

    Raises:
        ValueError: the folder holds something that is no model.
        FloatingPointError: a weight is not finite; nothing is written.
    """
    check_replaceable(Path(folder))
    _check_finite(policy)
    model, weights = merged(policy.model) if policy.adapted else (policy.model, None)
    config = model.generation_config
    if config is not None:
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    with replaced_whole(Path(folder)) as partial:
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)


def save_adapter(policy: Policy, folder: str | Path, base: str | None = None) -> None:
    """Writes the trained adapter as a folder that peft loads onto `base`; it appears whole or not at all.

    Of a stack only the trained adapter is written: it is relative to the base with the frozen adapters on.

    Raises:
        ValueError: the policy has no adapter, or the folder holds something else.
        FloatingPointError: a weight is not finite; nothing is written.
    """
    check_replaceable(Path(folder), CONFIG, "adapter")
    if not policy.adapted:
        raise ValueError("the policy was trained without policy.lora, so there is no adapter to save")
    _check_finite(policy)
    with replaced_whole(Path(folder)) as partial:
        write_adapter(policy.model, partial, base)


def _check_finite(policy: Policy) -> None:
    for name, parameter in policy.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"the weight {name} is not finite, so nothing was saved: lower the learning rate")
