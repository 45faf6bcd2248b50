"""The configuration of a fresh model: a `model_type` that transformers knows, and fields that fit it."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from rsa_lightning.parsing import first_line

# what transformers raises on a config.json that it cannot make anything of
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, StrictDataclassError)


def fresh_config(config: Mapping[str, Any], **defaults: Any) -> PreTrainedConfig:
    """The transformers configuration of a `model_type` and its fields.

    Args:
        defaults: fields that `config` wins over.

    Raises:
        ValueError: the model type is not known, and which are near; a field is one that transformers would silently
            keep; values do not fit each other, with the reason; or there is no layer.
    """
    fields = dict(config)
    model_type = str(fields.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        near = get_close_matches(model_type, CONFIG_MAPPING, n=3)
        raise ValueError(
            f"policy.config.model_type {model_type!r} is not known to transformers"
            + (f": is it {' or '.join(near)}?" if near else "; llama is, for example")
        )
    plain = AutoConfig.for_model(model_type)
    unknown = [name for name in fields if not hasattr(plain, name)]
    if unknown:
        raise ValueError(f"policy.config has fields that {model_type} does not know: {', '.join(unknown)}")
    try:
        made = AutoConfig.for_model(model_type, **{**defaults, **fields})
    except Exception as error:  # whatever transformers raises on an impossible configuration is about the configuration
        raise impossible(model_type, error) from error
    layers = getattr(made, "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ValueError(f"policy.config.num_hidden_layers is {layers}: a model has at least 1 layer")
    return made


def impossible(model_type: str, error: Exception) -> ValueError:
    return ValueError(f"policy.config: no causal {model_type} can be made of it ({first_line(error)[:200]})")
