"""The models that answer: folders, checked and loaded, and several of them made one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.decoding import Mixture
from rsa_lightning.weights import check_weights

Folders = Path | str | Mapping[Path | str, float]
"""A model folder, or the members of a mixture with their weights, which sum to one."""


class GenerationError(ValueError):
    """A model folder, prompt or partial file that cannot be used; the message names it and the fix."""


def members_of(folders: Folders) -> dict[Path, float]:
    """Every folder that answers, with its weight; a model alone has the weight one."""
    if not isinstance(folders, Mapping):
        return {checked_folder(folders): 1.0}
    try:
        check_weights({str(folder): weight for folder, weight in folders.items()})
    except ValueError as error:
        raise GenerationError(str(error)) from error
    found = {checked_folder(folder): weight for folder, weight in folders.items()}
    if len(found) < len(folders):
        raise GenerationError(f"a folder occurs twice among {', '.join(map(str, folders))}: add its weights up")
    return found


def as_one(members: Mapping[Path, float], loaded: Mapping[Path, Any]) -> Any:
    """The model, or the mixture of several, which is called like one."""
    models = [loaded[folder] for folder in members]
    if len(models) == 1:
        return models[0]
    try:
        return Mixture(models, list(members.values()))
    except ValueError as error:
        raise GenerationError(f"{' and '.join(map(str, members))}: {error}") from error


def checked_folder(folder: Path | str) -> Path:
    folder = Path(folder).resolve()
    if not (folder / "config.json").is_file():
        raise GenerationError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        raise GenerationError(
            f"{folder} has no model.safetensors: save the model with save_pretrained(safe_serialization=True)"
        )
    return folder


def common_tokenizer(folders: Sequence[Path]) -> Any:
    """The tokenizer of the first folder. Raises GenerationError where another has other words."""
    tokenizer = load_tokenizer(folders[0])
    for other in folders[1:]:
        if other != folders[0] and load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
            raise GenerationError(
                f"{folders[0]} and {other} have different vocabularies: their log-probabilities cannot be compared"
            )
    return tokenizer


def load_model(folder: Path, device: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    return model.to(device).eval()


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """The training EOS first; chat models may name further ends of a turn in generation_config.json."""
    extra = getattr(model.generation_config, "eos_token_id", None)
    extra = [] if extra is None else extra if isinstance(extra, list) else [extra]
    return list(dict.fromkeys([tokenizer.eos_token_id, *extra]))
