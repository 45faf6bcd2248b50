"""A stage under `lightning.Trainer`, in one process or sharded over several, that takes a step when told to."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rsa_kernels import RiskMeasure
from torch.distributed.tensor import DTensor

from benchmarks.scale.cases import LAYOUTS, METHODS, Provider, Size
from benchmarks.step.loops import ADAMW, CLIP, Loop, Pause, PauseLightning
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.hidden_cache import HiddenCache
from rsa_lightning.losses import PreferenceLoss
from rsa_lightning.models import PolicySpec
from rsa_lightning.reference import FrozenCopy, Reference
from rsa_lightning.stages import RewardAlignment


class StageLoop(Loop):
    """A loop and the stage in it.

    Args:
        spec: of the model; its tokenizer is that of the data.
        folder: of `pairs.jsonl` and of caches.
        batch_size: pairs of one process.
        layout: arguments of the data module.
        trainer: arguments of the trainer.
    """

    def __init__(
        self,
        name: str,
        spec: PolicySpec,
        method: tuple[PreferenceLoss, RiskMeasure],
        reference: Reference,
        folder: Path,
        batch_size: int,
        layout: dict[str, Any],
        **trainer: Any,
    ) -> None:
        optimizer = partial(torch.optim.AdamW, lr=1e-4, **ADAMW)
        self.stage = RewardAlignment(spec, *method, reference=reference, optimizer=optimizer)
        data = PreferenceData(
            str(folder / "pairs.jsonl"),
            tokenizer=spec.tokenizer,
            batch_size=batch_size,
            validation_fraction=0.2,
            cache_dir=str(folder / "tokens"),
            **layout,
        )

        options: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "inference_mode": False,
            "limit_val_batches": 0,
            "gradient_clip_val": CLIP,
            "default_root_dir": folder,
        }

        def train(pause: Pause) -> None:
            with quietly():
                L.Trainer(**options | trainer, callbacks=[PauseLightning(pause)]).fit(self.stage, data)

        super().__init__(name, train)

    def held_bytes(self) -> int:
        """Weights of policy and reference and states of the optimizer: of this process, its shards alone."""
        kept = getattr(self.stage.reference, "_policy", None)
        models = [self.stage.policy, kept]
        found = [tensor for model in models if model is not None for tensor in model.parameters()]
        for optimizer in self.stage.trainer.optimizers:
            found += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return sum(local(tensor).nbytes for tensor in found)


def provider_loop(provider: Provider, size: Size, folder: Path, world: int, **trainer: Any) -> StageLoop:
    """The loop of a provider, whose steps are `size.pairs` over all processes."""
    caches = folder / "references" / provider.layout
    reference = FrozenCopy() if provider.reference == "live" else HiddenCache(str(caches), keep=provider.reference)
    layout = {"max_length": size.longest, **LAYOUTS[provider.layout]}
    method = METHODS[provider.method]
    options = {"precision": size.precision} | trainer
    return StageLoop(
        str(provider), size.spec(folder), method, reference, folder, size.pairs // world, layout, **options
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def quietly() -> Iterator[None]:
    """Without the notices of the trainer; errors stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("rsa_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
