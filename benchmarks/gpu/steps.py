"""Steps of a training stage with each implementation of the operators: the same losses, within rounding.

A GPU does not add up in the same order twice, so the definition itself says what rounding is: two implementations may
be twice as far apart as the second of them and the definition came at any step, and a little more.
"""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from rsa_kernels import CVaR, Impl
from torch.utils.data import DataLoader

from rsa_lightning.data.batch import EncodedPair, collate
from rsa_lightning.losses import RSA
from rsa_lightning.models import PolicySpec
from rsa_lightning.stages import RewardAlignment

STEPS, BATCH, PAIRS, PAD, EOS = 50, 4, 16, 0, 1
IMPLEMENTATIONS: tuple[Impl, ...] = ("triton", "chunked", "naive")
EPSILON = 1e-6  # nats, of a mean loss
MODEL = {
    "model_type": "llama",
    "vocab_size": 5003,  # no multiple of anything
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


def losses(impl: Impl, accelerator: str, steps: int = STEPS) -> list[float]:
    """Of every step of reward alignment with the CVaR of the papers, from the same weights on the same pairs."""
    optimizer = partial(torch.optim.AdamW, lr=1e-3)  # learns the pairs by heart: wrong gradients show in the losses
    stage = RewardAlignment(PolicySpec(config=MODEL), RSA(), CVaR(0.97), beta=0.1, optimizer=optimizer, impl=impl)
    make_batch = partial(collate, roles=stage.roles, pad_id=PAD)
    loader: DataLoader = DataLoader(_pairs(), batch_size=BATCH, collate_fn=make_batch)  # type: ignore[arg-type]
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_steps=steps,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(stage, loader)
    return recorder.losses


def disagreements(found: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for each step at which the first two are further apart than rounding explains."""
    one, other, definition = found
    allowed = 2 * max(_gaps(found[other], found[definition])) + EPSILON
    return [
        f"step {step}: the loss with {one} is {found[one][step]:.7f}, with {other} {found[other][step]:.7f}; "
        f"{allowed:.1e} apart would be rounding"
        for step, gap in enumerate(_gaps(found[one], found[other]))
        if not gap <= allowed
    ]


def largest_gaps(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Between the losses of the first two, and of the last two."""
    one, other, definition = found
    return {f"{a} - {b}": max(_gaps(found[a], found[b])) for a, b in ((one, other), (other, definition))}


def _gaps(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


class _Recorder(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


def _pairs() -> list[EncodedPair]:
    random = torch.Generator().manual_seed(0)

    def words(shortest: int, longest: int) -> list[int]:
        size = int(torch.randint(shortest, longest + 1, (), generator=random))
        return torch.randint(2, MODEL["vocab_size"], (size,), generator=random).tolist()  # type: ignore[call-overload]

    def pair(index: int) -> EncodedPair:
        return EncodedPair(words(4, 16), [*words(8, 40), EOS], [*words(8, 40), EOS], row_id=f"pair {index}")

    return [pair(index) for index in range(PAIRS)]
