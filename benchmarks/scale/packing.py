"""Optimizer steps on padded, length-bucketed and packed batches of the same pairs.

A step is what a stage does between two batches of its loader: reference, policy, nested risk, backward, clipping and
AdamW. Every method sees all pairs once, in as many steps; padded and packed batches hold the same pairs in the same
order, and have to give the same log-probabilities, then the same losses. The methods take turns, step by step.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from rsa_kernels import CVaR
from torch import Tensor, nn

from benchmarks.scale.mixes import Mix, length_mixes
from benchmarks.timing import ratio
from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.losses import RSA
from rsa_lightning.models import Policy, PolicySpec, load_policy
from rsa_lightning.packing import attend
from rsa_lightning.reference import FrozenCopy
from rsa_lightning.stages import RewardAlignment

LAYOUTS: dict[str, dict[str, bool]] = {
    "padded": {},
    "bucketed": {"length_bucketing": True},
    "packed": {"padding_free": True},
}
TOLERANCE = {"float32": 1e-4}  # nats of a step's mean loss: rounding, and what it grows to in a few dozen updates
TOLERANCE_LOW_PRECISION = 5e-2
VOCABULARY, BATCH_SIZE, MAX_LENGTH = 1024, 8, 256


def run(
    quick: bool, device: str = "cpu", dtype: str = "float32", human: Path | None = None
) -> tuple[list[str], list[dict[str, Any]]]:
    """(disagreements, records): of the story world, of a long tail of lengths and, where given, of HH transcripts.

    A record has the times of one layout on one mix; of a mix whose layouts disagree there is none.
    """
    disagreements: list[str] = []
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for mix in length_mixes(Path(folder), pairs=4 * BATCH_SIZE if quick else 32 * BATCH_SIZE, human=human):
            bad, found = _measure(mix, quick, device, dtype, Path(folder))
            disagreements += bad
            records += found
    return disagreements, records


def _measure(mix: Mix, quick: bool, device: str, dtype: str, cache: Path) -> tuple[list[str], list[dict[str, Any]]]:
    runs = {name: _Run(mix, quick, device, dtype, cache, **options) for name, options in LAYOUTS.items()}
    tolerance = TOLERANCE.get(dtype, TOLERANCE_LOW_PRECISION)
    batches = zip(*(run.loader for run in runs.values()), strict=True)
    for step, found in enumerate(batches):
        turns = dict(zip(runs, found, strict=True))
        if step == 0:
            logp = {name: runs[name].warm_up(batch) for name, batch in turns.items()}
            if (bad := _gap(logp["padded"], logp["packed"])) > tolerance:
                return [f"{mix.name}: packed tokens are {bad:.2g} nats from padded ones (tolerance {tolerance:g})"], []
        if step == (4 if quick else 32):
            break
        for name, batch in turns.items():
            runs[name].step(batch)
    losses = {name: torch.tensor(run.losses) for name, run in runs.items()}
    if (bad := _gap(losses["padded"], losses["packed"])) > tolerance:
        return [f"{mix.name}: packed losses are {bad:.2g} nats from padded ones (tolerance {tolerance:g})"], []
    return [], [
        {"op": "packing", "mix": mix.name, "layout": name, "dtype": dtype, "device": device, **method.figures()}
        # of all steps, and its quantiles over single ones, which hold the same pairs unless they are bucketed
        | {"x_padded": sum(runs["padded"].elapsed_ms) / sum(method.elapsed_ms)}
        | {"x_padded_steps": ratio(runs["padded"].elapsed_ms, method.elapsed_ms)._asdict()}
        for name, method in runs.items()
    ]


def _gap(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where there is none to be had."""
    gap = (one - other).abs().max().item()
    return gap if math.isfinite(gap) else math.inf


class _Run:
    """One layout's model, data and times."""

    def __init__(self, mix: Mix, quick: bool, device: str, dtype: str, cache: Path, **layout: bool) -> None:
        data = PreferenceData(
            str(mix.path),
            mix.format,
            tokenizer_vocab_size=300 if quick else VOCABULARY,
            batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            cache_dir=str(cache / "cache"),
            **layout,  # type: ignore[arg-type]
        )
        data.setup()
        self.device, self.loader = torch.device(device), iter(data.train_dataloader())
        self.stage = _stage(quick, dtype, len(data.tokenizer), self.device, data.padding_free)
        self.optimizer = torch.optim.AdamW(self.stage.parameters(), lr=1e-4, foreach=True)
        self.losses: list[float] = []
        self.elapsed_ms: list[float] = []
        self.tokens = self.places = 0

    def warm_up(self, batch: PreferenceBatch) -> Tensor:
        """A step without an update; returns the log-probability of every scored token."""
        batch = self._there(batch)
        self.stage.shared_step(batch, "train").backward()
        self.optimizer.zero_grad()
        with torch.no_grad():
            return cast(Policy, self.stage.policy)(batch, None, None).logp

    def step(self, batch: PreferenceBatch) -> None:
        self.tokens += int(batch["attention_mask"].sum())
        self.places += batch["attention_mask"].numel()
        batch = self._there(batch)
        self._wait()
        start = time.perf_counter()
        loss = self.stage.shared_step(batch, "train")
        loss.backward()
        nn.utils.clip_grad_norm_(self.stage.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        self.elapsed_ms.append(1e3 * (time.perf_counter() - start))
        self.losses.append(loss.item())

    def figures(self) -> dict[str, Any]:
        seconds = sum(self.elapsed_ms) / 1e3
        return {
            "padding": 1 - self.tokens / self.places,
            "steps": len(self.elapsed_ms),
            "pairs_per_step": BATCH_SIZE,
            "steps_per_s": len(self.elapsed_ms) / seconds,
            "tokens_per_s": self.tokens / seconds,
        }

    def _there(self, batch: PreferenceBatch) -> PreferenceBatch:
        moved: Any = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return cast(PreferenceBatch, moved)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _stage(quick: bool, dtype: Any, vocabulary: int, device: torch.device, packed: bool) -> RewardAlignment:
    """A stage whose reference is a copy, on its device: 256 wide and 4 layers deep."""
    width = 16 if quick else 256
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": 1 if quick else 4,
        "num_attention_heads": width // 8 if quick else 4,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.1,  # fresh weights of the usual size hardly attend: nothing to agree on
        "tie_word_embeddings": True,
    }
    spec = PolicySpec(config=config, dtype=dtype)
    reference = FrozenCopy()
    stage = RewardAlignment(spec, RSA(), CVaR(0.97), reference=reference, beta=0.1)
    stage.policy = load_policy(spec).train().to(device)
    attend(stage.policy.model, packed)
    reference.prepare(stage.policy)
    reference.place(stage.policy)
    return stage
