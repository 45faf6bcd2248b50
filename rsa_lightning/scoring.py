"""What a stage may ask its reference: every row, what decides the answers, and where this process stands."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn

from rsa_lightning.adapters import CONFIG, WEIGHTS
from rsa_lightning.checkpoint import file_hash
from rsa_lightning.data.batch import ROLES, EncodedPair, PreferenceBatch, collate
from rsa_lightning.data.tokenize import pad_id
from rsa_lightning.hub import snapshot
from rsa_lightning.models import Policy, PolicySpec
from rsa_lightning.parallel.processes import gathered, position, sharing

PACKAGES = ("rsa_lightning", "torch", "transformers")


@dataclass(frozen=True)
class Scoring:
    """The rows of a stage, and the ways of the processes that train it together.

    Attributes:
        sides: train and validation, and their examples.
        collate: makes a batch of the chosen responses of examples, on the device that computes.
        batch_rows: rows of one forward pass, as many as a training batch has.
        decided_by: everything that decides the hidden states of these rows, as plain values; hashes of large files.
        about: the same for a reader: names of models and data.
        as_started: whether the policy is certainly the model that the stage starts from: it trains, and anew.
        rank, world_size: of the processes with rows of their own: those that share matrices (tensor parallelism) have
            one rank, since every forward pass is one of all of them.
        writes: whether it is this one of them that writes.
        gather: gives every process what each one hands in; all call it.
    """

    sides: Mapping[str, Sequence[EncodedPair]]
    collate: Callable[[Sequence[EncodedPair]], PreferenceBatch]
    batch_rows: int
    decided_by: Callable[[], dict[str, Any]] = dict
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    as_started: bool = True
    rank: int = 0
    world_size: int = 1
    writes: bool = True
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    @property
    def is_first(self) -> bool:
        """Whether this process decides for all."""
        return self.rank == 0 and self.writes


def scoring_of(trainer: Any, spec: PolicySpec, policy: Policy) -> Scoring:
    """What the data, strategy and precision of a Trainer make of it.

    Raises:
        ValueError: its data is no PreferenceData.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "train_examples"):
        raise ValueError(
            "a reference that is computed beforehand needs to know all rows: give the trainer a PreferenceData "
            "(datamodule=...) instead of loaders, or take FrozenCopy as reference"
        )
    device = trainer.strategy.root_device
    rank, writes = position(trainer)
    return Scoring(
        sides={"train": data.train_examples, "validation": data.validation_examples},
        collate=partial(chosen_batch, data.layout, pad_id(data.tokenizer), device),
        batch_rows=2 * data.batch_size,
        decided_by=lambda: {**decided_by(spec, policy, data, device), "precision": str(trainer.precision)},
        about={"model": spec.model or "fresh", "data": list(data.settings.paths), "template": data.settings.template},
        as_started=trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is None,
        rank=rank,
        world_size=sharing(trainer),
        writes=writes,
        gather=gathered,
    )


def chosen_batch(side: Any, pad: int, device: torch.device, examples: Sequence[EncodedPair]) -> PreferenceBatch:
    """The batch of the examples' chosen responses."""
    return move_data_to_device(collate(examples, ROLES[:1], pad, side), device)


def decided_by(spec: PolicySpec, policy: Policy, data: Any, device: torch.device) -> dict[str, Any]:
    """What decides the hidden states that a policy gives for data as it starts; a new adapter adds nothing yet.

    Tokenizer and template are in the hash of the examples, which is one of token ids.
    """
    return {
        "examples": data.report["examples_sha256"],
        "lengths": dataclasses.asdict(data.lengths),
        "model": model_hashes(spec, policy),
        "adapters": adapter_hashes(spec),
        "quantize": spec.quantize,
        "dtype": spec.dtype,
        "device": device.type,
        "versions": {name: version(name) for name in PACKAGES},
    }


def model_hashes(spec: PolicySpec, policy: Policy) -> dict[str, Any]:
    """Of the files of a model; of a fresh one its configuration, and the seed of its weights."""
    if spec.model is None:
        return {"seed": spec.seed, "config": json.loads(policy.model.config.to_json_string())}
    folder = Path(spec.model) if Path(spec.model).is_dir() else snapshot(spec.model, spec.revision)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".py")]
    return {path.name: file_hash(path) for path in [folder / "config.json", *files]}


def adapter_hashes(spec: PolicySpec) -> list[list[str]]:
    """Of the adapters that the policy starts with, oldest first, weights and configuration."""
    continued = [spec.lora.start] if spec.lora is not None and spec.lora.start is not None else []
    return [[file_hash(Path(folder) / name) for name in (WEIGHTS, CONFIG)] for folder in (*spec.adapters, *continued)]
