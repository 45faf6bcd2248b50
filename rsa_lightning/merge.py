"""Models made of models without training: weighted averages of weights, and adapters scaled.

Averaging weights is the first-order surrogate of averaging log-probabilities (decoding.py does that exactly). With
theta_q = (1 - q) theta_reward + q theta_conservative one pair of models gives a whole curve between helpful and safe:
P-SACPO (arXiv:2404.11049), RSA(P) (arXiv:2512.24263).
"""

import argparse
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsa_lightning.adapters import CONFIG, WEIGHTS, Lora, adapter_config
from rsa_lightning.checkpoint import check_replaceable, folder_hashes, replaced_whole, write_json
from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.hub import WORDS
from rsa_lightning.members import INDEX, WHOLE, Member, Reader, Stored, check_alike, open_member
from rsa_lightning.models import PolicySpec, load_policy
from rsa_lightning.saving import save_policy
from rsa_lightning.weights import check_weights, shown

log = logging.getLogger(__name__)

RECORD = "merge.json"
SHARD_BYTES = 4 * 2**30  # of a file of the output, and about what is held in memory at once
# ------------------------------------------------------------------ full models


def merge_models(
    members: Mapping[str | Path, float],
    output: str | Path,
    *,
    names: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the model whose every weight is sum_k w_k theta_k, and returns what merge.json beside it records.

    Sums are float32 (float64 where a member is) and are rounded once, to the nearest number of the members' own dtype;
    where their dtypes differ, of the smallest that holds them all. In bfloat16 that rounding, up to 2^-8 of a weight,
    may be larger than what two members differ by: keep the weights of models to be merged in float32. Weights are read
    one after another, and a file of the output is held in memory at a time. Configuration, tokenizer and generation
    settings are the first member's. A head that is tied to the embeddings is stored once.

    Args:
        members: Hugging Face folder -> its weight. They sum to one; negative ones extrapolate.
        output: folder of the merged model; an earlier model there is replaced, whole or not at all.
        names: what merge.json calls the members; by default their folders.
        trust_remote_code: read configurations that bring code.
        shard_bytes: size from which the weights are split into several files.

    Raises:
        FileNotFoundError: a folder without model or weights, or with pickled weights only.
        ValueError: weights that do not sum to one; an adapter; members with other architectures, weights, shapes or
            vocabularies; an output that is a member, or something that is no model.
        FloatingPointError: a weight of the result is not finite; nothing is written.
    """
    output = Path(output)
    called = list(names or map(str, members))
    check_weights(dict(zip(called, members.values(), strict=True)))
    check_output(output, members)
    opened = [open_member(Path(folder), weight, trust_remote_code) for folder, weight in members.items()]
    check_alike(opened)
    with ExitStack() as stack:
        readers = [Reader(member, stack) for member in opened]
        plan = _plan(readers)
        weights = dict(zip(called, members.values(), strict=True))
        if min(weights.values()) < 0:
            below = ", ".join(name for name, weight in weights.items() if weight < 0)
            log.info("%s: the weight of %s is negative: the result lies outside the members", shown(weights), below)
        record = _record(opened, called)
        output.parent.mkdir(parents=True, exist_ok=True)
        with replaced_whole(output) as partial:
            partial.mkdir()
            _copy_words(opened[0].folder, partial, plan)
            _write_weights(readers, plan, partial, shard_bytes)
            write_json(partial / RECORD, record)
    log.info("%s: %s", output, shown(weights))
    return record


def check_output(output: Path, members: Mapping[str | Path, float] | Sequence[str | Path]) -> None:
    """Raises ValueError where writing to `output` would destroy a member or something that is no model."""
    place = output.resolve()
    for folder in members:
        theirs = Path(folder).resolve()
        if place == theirs or place in theirs.parents or theirs in place.parents:
            raise ValueError(f"the output {output} is the member {folder}, or in it, or around it: choose another")
    check_replaceable(output)


def _plan(readers: Sequence[Reader]) -> dict[str, Stored]:
    """What will be written for every weight. Raises ValueError where shapes differ or a dtype has no average."""
    first, plan = readers[0], {}
    for name, mine in first.stored.items():
        dtype = mine.dtype
        for reader in readers:
            theirs = reader.stored[name]
            if theirs.shape != mine.shape:
                raise ValueError(
                    f"{reader.member.folder} has {name} as {list(theirs.shape)}, {first.member.folder} as "
                    f"{list(mine.shape)}: only models of one shape can be merged"
                )
            if theirs.dtype.is_floating_point != mine.dtype.is_floating_point:
                raise ValueError(f"{reader.member.folder} has {name} in {theirs.dtype}, {mine.dtype} is wanted")
            dtype = torch.promote_types(dtype, theirs.dtype)
        plan[name] = Stored(mine.shape, dtype)
    return plan


def _combined(readers: Sequence[Reader], name: str, dtype: torch.dtype) -> Tensor:
    """sum_k w_k theta_k of one weight; a table of integers must be the same in all members."""
    if not dtype.is_floating_point:
        first, *others = (reader.read(name) for reader in readers)
        for reader, other in zip(readers[1:], others, strict=True):
            if not torch.equal(first, other):
                raise ValueError(f"{reader.member.folder} has other integers in {name}: they have no average")
        return first
    exact = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(readers[0].stored[name].shape, dtype=exact)
    for reader in readers:
        part = reader.read(name).to(exact)
        if not part.isfinite().all():
            raise FloatingPointError(f"{reader.member.folder}: the weight {name} is not finite, so nothing was merged")
        total.add_(part * torch.tensor(reader.member.weight, dtype=exact))  # a weight too large becomes inf, seen below
    rounded = total.to(dtype)
    if not rounded.isfinite().all():
        weights = {str(reader.member.folder): reader.member.weight for reader in readers}
        raise FloatingPointError(
            f"the weight {name} of {shown(weights)} is too large for {dtype}, so nothing was written: take weights "
            "nearer to 0 and 1"
        )
    return rounded


def _write_weights(readers: Sequence[Reader], plan: Mapping[str, Stored], folder: Path, shard_bytes: int) -> None:
    shards = list(_shards(plan, shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WHOLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _combined(readers, name, plan[name].dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(stored.nbytes for stored in plan.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _shards(plan: Mapping[str, Stored], shard_bytes: int) -> Iterator[list[str]]:
    """The names in order, as many to a file as fit; a weight that is larger has a file of its own."""
    names: list[str] = []
    room = shard_bytes
    for name, stored in plan.items():
        if names and stored.nbytes > room:
            yield names
            names, room = [], shard_bytes
        names.append(name)
        room -= stored.nbytes
    yield names


def _copy_words(source: Path, folder: Path, plan: Mapping[str, Stored]) -> None:
    """Everything of a member but its weights: configuration, tokenizer, templates, code it brings."""
    for pattern in (*WORDS, "*.py"):
        for path in source.glob(pattern):
            if path.name not in (INDEX, RECORD):
                shutil.copyfile(path, folder / path.name)
    # readers that take the dtype of the file from config.json must find the one that was written
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    floats = [stored.dtype for stored in plan.values() if stored.dtype.is_floating_point]
    usual = max(set(floats), key=floats.count)
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    write_json(folder / "config.json", {**config, "dtype": str(usual).removeprefix("torch.")})


def _record(members: Sequence[Member], called: Sequence[str]) -> dict[str, Any]:
    rows = [
        {"model": name, "weight": member.weight, "sha256": folder_hashes(member.folder)}
        for name, member in zip(called, members, strict=True)
    ]
    return {"members": rows, "rsa_lightning": version("rsa_lightning")}


def merge_grid(models: Sequence[str], ratios: Sequence[str], output: Path) -> list[Path]:
    """OUTPUT/<q> for every ratio: (1 - q) * the first model + q * the second. Raises like `merge_models`, and first."""
    if len(models) != 2:
        raise ValueError(f"--ratios are of the second of two models, got {len(models)}: give two, or --weights")
    values = {text: _number(text, "--ratios") for text in ratios}
    if len(set(values.values())) < len(ratios):
        raise ValueError(f"--ratios {' '.join(ratios)}: one of them occurs twice: give each once")
    places = {text: output / text for text in ratios}
    for place in places.values():
        check_output(place, models)
    check_alike([open_member(Path(folder)) for folder in models])
    for text, place in places.items():
        merge_models({models[0]: 1 - values[text], models[1]: values[text]}, place)
    return list(places.values())


# ------------------------------------------------------------------ adapters


def scale_adapter(folder: str | Path, factor: float, output: str | Path, name: str | None = None) -> dict[str, Any]:
    """Writes the adapter with every B multiplied by `factor`, in peft's format, and returns its record.

    W + q s B A is (1 - q) W + q (W + s B A): the scaled adapter on its base is exactly the weighted average of the base
    and the merged model. Averages of A and of B apart are no average of their product.

    Raises:
        FileNotFoundError, ValueError: no plain LoRA adapter there, a factor that is no finite number, or an output that
            is the adapter itself or something else.
        FloatingPointError: a weight of the result is not finite; nothing is written.
    """
    folder, output = Path(folder), Path(output)
    if isinstance(factor, bool) or not math.isfinite(factor):
        raise ValueError(f"scale must be a finite number, got {factor}: 0 is the base, 1 the adapter as it is")
    if output.resolve() == folder.resolve():
        raise ValueError(f"the output {output} is the adapter itself: choose another")
    check_replaceable(output, CONFIG, "adapter")
    adapter_config(str(folder))
    tensors = load_file(folder / WEIGHTS)
    strange = [key for key in tensors if not re.search(r"\.lora_(embedding_)?[AB](\.|$)", key)]
    if strange:
        raise ValueError(f"{folder} holds weights that are no factors of LoRA ({min(strange)}): it cannot be scaled")
    scaled = {key: _scaled(key, value, factor) for key, value in tensors.items()}
    for key, value in scaled.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"{folder}: {key} times {factor:g} is not finite, so nothing was written")
    row = {"adapter": name or str(folder), "scale": factor, "sha256": folder_hashes(folder)}
    record = {"members": [row], "rsa_lightning": version("rsa_lightning")}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(output) as partial:
        partial.mkdir()
        shutil.copyfile(folder / CONFIG, partial / CONFIG)
        save_file(scaled, partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / RECORD, record)
    log.info("%s: the adapter %s times %g", output, folder, factor)
    return record


def _scaled(key: str, value: Tensor, factor: float) -> Tensor:
    is_b = re.search(r"\.lora_(embedding_)?B(\.|$)", key) is not None
    return (value.float() * factor).to(value.dtype).contiguous() if is_b else value.contiguous()


def merge_adapter(spec: PolicySpec, tokenizer: str | Path, output: str | Path) -> None:
    """Writes the model of a policy with its adapters merged in, in float32."""
    save_policy(load_policy(spec), load_tokenizer(tokenizer), output)


# ------------------------------------------------------------------ the command


def main(arguments: list[str]) -> None:
    """`rsa merge`. Raises ValueError where options are missing or do not go together."""
    parser = argparse.ArgumentParser(
        prog="rsa merge",
        usage="rsa merge --models A B [C ...] (--weights W ... | --ratios Q ...) --output DIR\n"
        "       rsa merge --adapter FOLDER --scale Q [--base MODEL] --output DIR",
        allow_abbrev=False,
    )
    parser.add_argument("--models", nargs="+", metavar="FOLDER", help="Hugging Face folders of one architecture")
    parser.add_argument("--weights", nargs="+", metavar="W", help="one for each model; they sum to 1")
    parser.add_argument("--ratios", nargs="+", metavar="Q", help="of the second model: DIR/Q = (1 - Q) * A + Q * B")
    parser.add_argument("--adapter", metavar="FOLDER", help="an adapter in peft's format, instead of models")
    parser.add_argument("--scale", metavar="Q", help="what its product B A is multiplied by")
    parser.add_argument("--base", metavar="MODEL", help="the model it lies on: write that, adapter merged")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    given = parser.parse_args(arguments)
    if (given.models is None) == (given.adapter is None):
        raise ValueError("rsa merge combines --models, or scales one --adapter: give one of the two")
    if given.adapter is not None:
        _adapter_command(given)
    else:
        _models_command(given)


def _models_command(given: argparse.Namespace) -> None:
    if given.scale is not None or given.base is not None:
        raise ValueError("--scale and --base belong to --adapter: models take --weights or --ratios")
    if (given.weights is None) == (given.ratios is None):
        raise ValueError("--models needs --weights (one for each), or --ratios (of the second): give one of the two")
    if given.ratios is not None:
        merge_grid(given.models, given.ratios, given.output)
        return
    if len(given.weights) != len(given.models):
        raise ValueError(
            f"{len(given.models)} --models and {len(given.weights)} --weights were given: give one for each"
        )
    if len(set(given.models)) < len(given.models):
        raise ValueError(f"--models {' '.join(given.models)}: one occurs twice: add its weights up")
    weights = [_number(text, "--weights") for text in given.weights]
    merge_models(dict(zip(given.models, weights, strict=True)), given.output)


def _adapter_command(given: argparse.Namespace) -> None:
    if given.scale is None or given.weights is not None or given.ratios is not None:
        raise ValueError("--adapter needs --scale, and takes neither --weights nor --ratios")
    scale = _number(given.scale, "--scale")
    if given.base is None:
        scale_adapter(given.adapter, scale, given.output)
        return
    check_output(given.output, [given.base, given.adapter])
    with tempfile.TemporaryDirectory() as folder:
        record = scale_adapter(given.adapter, scale, Path(folder) / "adapter", name=given.adapter)
        spec = PolicySpec(model=given.base, lora=Lora(start=str(Path(folder) / "adapter")))
        merge_adapter(spec, given.base, given.output)
    base = {"model": given.base, "sha256": folder_hashes(given.base)}
    write_json(given.output / RECORD, {**record, "members": [base, *record["members"]]})


def _number(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no number") from None
    if not math.isfinite(value):
        raise ValueError(f"{option} must be finite, got {text}")
    return value
