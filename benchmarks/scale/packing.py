"""Optimizer steps on padded, length-bucketed and packed batches of the same pairs.

A step is what a stage does between two batches of its loader: reference, policy, nested risk, backward, clipping and
AdamW. Every method sees all pairs once, in as many steps; padded and packed batches hold the same pairs in the same
order, and have to give the same log-probabilities, then the same losses. The methods take turns, step by step.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.scale.bare import BareStage
from benchmarks.scale.cases import LAYOUTS
from benchmarks.scale.mixes import Mix, length_mixes
from benchmarks.scale.turns import Times, largest_gap, named, timed
from benchmarks.timing import ratio
from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.models import PolicySpec

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
            if (bad := largest_gap(logp["padded"], logp["packed"])) > tolerance:
                return [f"{mix.name}: packed tokens are {bad:.2g} nats from padded ones (tolerance {tolerance:g})"], []
        if step == (4 if quick else 32):
            break
        for name, batch in turns.items():
            runs[name].step(batch)
    losses = {name: torch.tensor(run.losses) for name, run in runs.items()}
    if (bad := largest_gap(losses["padded"], losses["packed"])) > tolerance:
        return [f"{mix.name}: packed losses are {bad:.2g} nats from padded ones (tolerance {tolerance:g})"], []
    return [], [
        {"op": "packing", "mix": mix.name, "layout": name, "dtype": dtype, "device": device, **method.figures()}
        # of all steps, and its quantiles over single ones, which hold the same pairs unless they are bucketed
        | {"x_padded": sum(runs["padded"].times.wall) / sum(method.times.wall)}
        | {"x_padded_cpu": sum(runs["padded"].times.cpu) / sum(method.times.cpu)}
        | named("x_padded_step", ratio(runs["padded"].times.wall, method.times.wall))
        for name, method in runs.items()
    ]


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
        self.loader = iter(data.train_dataloader())
        spec = PolicySpec(config=_config(quick, len(data.tokenizer)), dtype=dtype)  # type: ignore[arg-type]
        self.stage = BareStage(spec, torch.device(device), data.padding_free)
        self.times, self.losses = Times([], []), list[float]()
        self.tokens = self.places = 0

    def warm_up(self, batch: PreferenceBatch) -> Tensor:
        """A step without an update; returns the log-probability of every scored token."""
        batch = self.stage.there(batch)
        self.stage.loss(batch).backward()
        self.stage.optimizer.zero_grad()
        with torch.no_grad():
            return self.stage.policy(batch, None, None).logp

    def step(self, batch: PreferenceBatch) -> None:
        self.tokens += int(batch["attention_mask"].sum())
        self.places += batch["attention_mask"].numel()
        batch = self.stage.there(batch)
        self.stage.wait()
        for clock, value in zip(
            self.times, timed(lambda: self.losses.append(self.stage.step(batch).item())), strict=True
        ):
            clock.append(value)

    def figures(self) -> dict[str, Any]:
        seconds = sum(self.times.wall) / 1e3
        return {
            "padding": 1 - self.tokens / self.places,
            "steps": len(self.losses),
            "pairs_per_step": BATCH_SIZE,
            "steps_per_s": len(self.losses) / seconds,
            "tokens_per_s": self.tokens / seconds,
        }


def _config(quick: bool, vocabulary: int) -> dict[str, Any]:
    """256 wide and 4 layers deep."""
    width = 16 if quick else 256
    return {
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
