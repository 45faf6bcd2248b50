"""The members of a merge: what folders of models hold, looked at without loading them, and whether they fit."""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rsa_lightning.adapters import CONFIG
from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.parsing import first_line

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# fields of config.json that say nothing about what the weights mean
COSMETIC = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id")


class Member(NamedTuple):
    """A model to be merged.

    Attributes:
        config: of the architecture, with its defaults filled in.
        files: name of a weight -> the file that holds it.
    """

    folder: Path
    weight: float
    config: dict[str, Any]
    files: dict[str, Path]


class Stored(NamedTuple):
    """A weight in a file, as its header describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_member(folder: Path, weight: float = 1.0, trust_remote_code: bool = False) -> Member:
    """What a folder holds, without reading its weights. Raises FileNotFoundError, ValueError."""
    if (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is an adapter ({CONFIG}), no model, and averaging the factors of two adapters averages nothing: "
            "scale one with --adapter and --scale, or merge the full models"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no Hugging Face folder: it has no config.json")
    files = _weight_files(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/config.json cannot be read ({first_line(error)[:200]})") from error
    if hasattr(config, "quantization_config"):
        raise ValueError(f"{folder} is quantised, and its weights have no average: merge the models before quantising")
    own = {key: value for key, value in config.to_dict().items() if key not in COSMETIC}
    return Member(folder, weight, own, _without_tied(folder, files, config, trust_remote_code))


def check_alike(members: Sequence[Member]) -> None:
    """Raises ValueError, naming the folder, where a member is another architecture or has another vocabulary."""
    first = members[0]
    vocabulary = load_tokenizer(first.folder).get_vocab()
    seen: dict[Path, Path] = {}
    for member in members:
        if (earlier := seen.setdefault(member.folder.resolve(), member.folder)) is not member.folder:
            raise ValueError(f"{member.folder} and {earlier} are the same folder: give each model once")
    for member in members[1:]:
        differing = [
            key for key in {**first.config, **member.config} if first.config.get(key) != member.config.get(key)
        ]
        if differing:
            shown_values = "; ".join(
                f"{key} is {member.config.get(key)!r:.60} and {first.config.get(key)!r:.60}" for key in differing[:3]
            )
            raise ValueError(
                f"{member.folder} is another architecture than {first.folder} ({shown_values}): only models with the "
                "same configuration can be merged"
            )
        for name in sorted(first.files.keys() ^ member.files.keys()):
            without = first.folder if name in member.files else member.folder
            raise ValueError(f"{without} has no weight {name}, which the other has: only equal architectures merge")
        if load_tokenizer(member.folder).get_vocab() != vocabulary:
            raise ValueError(
                f"{member.folder} and {first.folder} have different vocabularies: the rows of their embeddings stand "
                "for different tokens, so nothing can be averaged"
            )


class Reader:
    """The weights of a member, read when asked for."""

    def __init__(self, member: Member, stack: ExitStack) -> None:
        self.member = member
        try:
            self._open = {
                path: stack.enter_context(safe_open(str(path), framework="pt")) for path in set(member.files.values())
            }
            self.stored = {name: self._describe(name) for name in sorted(member.files)}
        except SafetensorError as error:
            raise ValueError(f"{member.folder} has weights that cannot be read ({first_line(error)})") from error

    def _describe(self, name: str) -> Stored:
        part = self._open[self.member.files[name]].get_slice(name)
        return Stored(tuple(part.get_shape()), _DTYPES[part.get_dtype()])

    def read(self, name: str) -> Tensor:
        return self._open[self.member.files[name]].get_tensor(name)


_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Name of a weight -> its file, in the order that transformers looks for them."""
    if (folder / WHOLE).is_file():
        listed = {path.name: path for path in [folder / WHOLE]}
    elif (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        listed = {name: folder / name for name in sorted(set(named))}
    else:
        raise FileNotFoundError(
            f"{folder} holds no {WHOLE}. Pickled .bin or .pt weights are refused: load them once elsewhere and write "
            "them with save_pretrained"
        )
    found: dict[str, Path] = {}
    for name, path in listed.items():
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its {INDEX} names: copy the whole folder again")
        try:
            with safe_open(str(path), framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({first_line(error)}): copy it again") from error
    return found


def _without_tied(folder: Path, files: dict[str, Path], config: Any, trust_remote_code: bool) -> dict[str, Path]:
    """The files of the weights that are stored, a tied head not twice. Raises ValueError where it is another."""
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return files
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    twice = {a: b for a, b in model.all_tied_weights_keys.items() if a in files and b in files}
    for name, source in twice.items():
        with safe_open(str(files[name]), framework="pt") as one, safe_open(str(files[source]), framework="pt") as two:
            if not torch.equal(one.get_tensor(name), two.get_tensor(source)):
                raise ValueError(
                    f"{folder}/config.json ties {name} to {source} (tie_word_embeddings), and its weights differ: "
                    "correct config.json, or load and save the model once with transformers"
                )
    return {name: path for name, path in files.items() if name not in twice}
