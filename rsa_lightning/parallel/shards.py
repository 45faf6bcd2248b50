"""Checkpoints of training, folders of shards or single files: what they hold, and whether it is of this policy."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rsa_lightning.parsing import first_line

META = "meta.pt"  # the part of a folder that is not sharded; the name is Lightning's
WEIGHTS = "state_dict"
# CheckpointException derives from BaseException: `except Exception` does not see a missing shard
FAILURES = (CheckpointException, OSError, ValueError, RuntimeError, KeyError, EOFError)


class Stored(NamedTuple):
    """A weight as it stands in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return Path(path).is_dir()


def read_rest(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside the weights, and of one file the weights: progress, data, settings.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no checkpoint of training, or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if is_sharded(path) and not (path / META).is_file():
        inside = ", ".join(sorted(entry.name for entry in path.iterdir() if _is_checkpoint(entry)))
        mend = f"Give one of those in it: {inside}" if inside else "Take an earlier one"
        raise ValueError(f"{path} is no whole checkpoint: it has no {META}. {mend}")
    if not is_sharded(path) and (path.parent / META).is_file():
        raise ValueError(f"{path} is a part of a checkpoint in shards: give its folder, {path.parent}")
    try:
        # a file is mapped, so that each process reads only what it asks for
        file, mapped = (path / META, False) if is_sharded(path) else (path, True)
        found = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # whatever unpickling raises on bytes that are no checkpoint
        raise _damaged(path, error) from error
    if not isinstance(found, dict) or "global_step" not in found:
        raise ValueError(f"{path} is no checkpoint of training: it has no global_step")
    if not is_sharded(path) and not isinstance(found.get(WEIGHTS), Mapping):
        raise ValueError(f"{path} is no whole checkpoint: it has no {WEIGHTS}. Take an earlier one")
    return found


def _is_checkpoint(path: Path) -> bool:
    """Whether something reads as a checkpoint from outside."""
    return (path / META).is_file() if path.is_dir() else path.suffix == ".ckpt"


def stored_weights(path: Path, rest: Mapping[str, Any]) -> dict[str, Stored]:
    """Every weight that a checkpoint holds, without reading those of a folder. Raises ValueError where it is damaged.

    Args:
        rest: `read_rest` of it.
    """
    if not is_sharded(path):
        return {name: Stored(tuple(value.shape), value.dtype) for name, value in rest[WEIGHTS].items()}
    try:
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except FAILURES as error:
        raise _damaged(path, error) from error
    prefix = WEIGHTS + "."
    return {
        name.removeprefix(prefix): Stored(tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def check_fit(path: Path, found: Mapping[str, Stored], wanted: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a checkpoint is of another policy, naming the first weight that differs."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            problem = "is missing in the checkpoint"
        elif name not in wanted:
            problem = "is no trained parameter here"
        elif found[name].shape != tuple(wanted[name].shape):
            problem = f"is {found[name].shape} in the checkpoint, {tuple(wanted[name].shape)} here"
        else:
            continue
        raise ValueError(
            f"the checkpoint {path} is of another policy or adapter: {name} {problem}. Give the policy it was trained "
            "with"
        )


def read_into(path: Path, state: dict[str, Any]) -> None:
    """Fills tensors in place from a folder of shards; all processes of a group call this.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as is meant
            dcp.load(state, checkpoint_id=path)
    except FAILURES as error:
        raise _damaged(path, error) from error


def cause(error: BaseException) -> str:
    """What went wrong, in one line; of a collective failure, in the first process where it did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    return first_line(error)[:300]


def _damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"the checkpoint {path} cannot be read ({cause(error)}): it is damaged or not whole, take an earlier one"
    )
