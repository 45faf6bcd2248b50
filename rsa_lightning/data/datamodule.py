"""`PreferenceData`: a file of preferences -> validated, split, tokenised -> the loaders of every stage."""

import dataclasses
import hashlib
import logging
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rsa_lightning.checkpoint import file_hash
from rsa_lightning.data.formats import FormatError, PreferencePair, split_key
from rsa_lightning.data.readers import read_pairs
from rsa_lightning.data.sampler import PairBatches, even_batches
from rsa_lightning.data.tokenize import (
    EncodedPair,
    Lengths,
    PaddingSide,
    PreferenceBatch,
    collate,
    encode_pairs,
    load_tokenizer,
    pad_id,
    train_tokenizer,
)

log = logging.getLogger(__name__)


class PreferenceData(L.LightningDataModule):
    """Preference pairs from one file, split by prompt, tokenised once.

    After `setup`: `train_pairs` and `validation_pairs` (texts), `train_examples` and `validation_examples` (the same as
    token ids), `tokenizer`, `report` (a plain dict of what was read, skipped and kept) and `skipped_rows` (row ids by
    reason).

    Args:
        path: training file: .jsonl, .jsonl.gz or .parquet; or several of one format.
        format: how its rows are read: trl (prompt, chosen, rejected), hh (Anthropic HH transcripts) or
            demonstration (prompt, completion; for the warm-up only).
        validation_path: validation file of the same format; training rows that share a prompt with it are dropped.
        validation_fraction: share of the prompts set aside for validation where there is no validation_path.
        tokenizer: folder or hub name of a tokenizer. Default: the policy's own; if the policy has none, a byte-level
            BPE is trained on the training pairs.
        tokenizer_vocab_size: size of the tokenizer trained here.
        batch_size: pairs in a batch of one process.
        max_length: tokens of prompt and response together; longer responses are cut at the end.
        max_prompt_length: tokens of the prompt; longer prompts are cut at the start. Default: half of max_length.
        eos_when_truncated: whether a response that was cut still ends in the end token.
        padding_side: where shorter rows are filled, right or left; it changes no result.
        num_workers: processes that prepare batches.
        seed: of the split and of the order of the training pairs.
        limit: read at most this many rows of each file.
    """

    def __init__(
        self,
        path: str | list[str],
        format: str = "trl",
        validation_path: str | None = None,
        validation_fraction: float = 0.1,
        tokenizer: str | None = None,
        tokenizer_vocab_size: int = 2048,
        batch_size: int = 8,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        eos_when_truncated: bool = True,
        padding_side: PaddingSide = "right",
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
    ):
        super().__init__()
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction is a share of the prompts in (0, 1), got {validation_fraction}")
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        self.lengths = Lengths(max_length, prompt_length, eos_when_truncated)
        self.paths = [path] if isinstance(path, str) else list(path)
        if not self.paths or len(set(self.paths)) < len(self.paths):
            raise ValueError(f"path must be one training file, or several different ones, got {self.paths}")
        self.format, self.validation_path = format, validation_path
        self.validation_fraction, self.seed, self.limit = validation_fraction, seed, limit
        self.tokenizer_name, self.vocab_size = tokenizer, tokenizer_vocab_size
        self.batch_size, self.padding_side, self.num_workers = batch_size, padding_side, num_workers
        self.train_pairs: list[PreferencePair] = []
        self.validation_pairs: list[PreferencePair] = []
        self.train_examples: list[EncodedPair] = []
        self.validation_examples: list[EncodedPair] = []
        self.skipped_rows: dict[str, list[str]] = {}
        self.report: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, validate, split and tokenise, once. Works without a Trainer too.

        Raises:
            FormatError: a file cannot be read as asked, nothing is left of it, or the tokenizer cannot be used.
        """
        if not self.report:
            train, validation, rows = self._read()
            self.tokenizer = self._make_tokenizer(train)
            truncated = {"prompts": 0, "responses": 0}
            self.train_pairs, self.train_examples = self._encode(train, truncated)
            self.validation_pairs, self.validation_examples = self._encode(validation, truncated)
            self._check_sides()
            self.report = self._make_report(rows, truncated)
            # without a Trainer the caller reads `report`
            rank_zero_only(log.info if self._stage else log.debug)(summary(self.report))
        pairs = self.train_pairs + self.validation_pairs
        if self._stage and "rejected" in self._roles and not all(p.rejected for p in pairs):
            raise FormatError(
                f"{self._names}: format {self.format!r} has no rejected responses, and this stage compares them: "
                "give it preference pairs, or use this file for a warm-up"
            )

    def prepare_data(self) -> None:
        """Reads on the first process of a node before Lightning opens its log folders: bad data leaves none behind."""
        self.setup()

    def train_dataloader(self) -> DataLoader[PreferenceBatch]:
        """Batches in the order of `PairBatches`, which continues where the trainer stands."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        per_step = self.batch_size * self._world_size * accumulate
        if len(self.train_examples) < per_step:
            raise ValueError(
                f"{len(self.train_examples)} training pairs are fewer than one optimizer step takes: {per_step} "
                f"(batch_size {self.batch_size} x {self._world_size} processes x accumulate_grad_batches "
                f"{accumulate}); lower one of these, or give more data"
            )
        options: dict[str, Any] = {}
        if self.trainer:
            options = {"position": self._position, "limit": self.trainer.limit_train_batches}
        sampler = PairBatches(
            len(self.train_examples),
            self.batch_size,
            seed=self.seed,
            rank=self._rank,
            world_size=self._world_size,
            accumulate=accumulate,
            **options,
        )
        return self._loader(self.train_examples, sampler)

    def val_dataloader(self) -> DataLoader[PreferenceBatch]:
        """All validation pairs once, in order, shared evenly among the ranks."""
        smallest = 2 if "mismatched" in self._roles else 1
        examples = self.validation_examples
        batches = even_batches(
            len(examples), self.batch_size, rank=self._rank, world_size=self._world_size, smallest=smallest
        )
        return self._loader(examples, batches)

    def test_dataloader(self) -> DataLoader[PreferenceBatch]:
        """The validation pairs: `rsa test` measures on them what `rsa validate` does."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """What the order of batches depends on; a checkpoint carries it, so that a resumed run can be checked."""
        return {
            "sha256": list(self.report["sha256"].values()),
            "training pairs": len(self.train_examples),
            "seed": self.seed,
            "pairs per batch over all processes": self.batch_size * self._world_size,
            "lengths": dataclasses.asdict(self.lengths),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to continue training on other data or another batch size: the position would mean other pairs."""
        mine = self.state_dict()
        changed = [f"{key}: {state.get(key)} then, {mine[key]} now" for key in mine if state.get(key) != mine[key]]
        if changed and self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                f"the checkpoint was made with other data settings ({'; '.join(changed)}): "
                "restore them, or start a new run from the model instead of the checkpoint"
            )

    def _read(self) -> tuple[list[PreferencePair], list[PreferencePair], dict[str, int]]:
        """(training pairs, validation pairs, rows of each file); fills `skipped_rows`."""
        pairs: list[PreferencePair] = []
        rows: dict[str, int] = {}
        for path in self.paths:
            file = read_pairs(path, self.format, limit=self.limit)
            pairs += file.pairs
            rows[path] = file.rows
            merge(self.skipped_rows, file.skipped)
        if self.validation_path is None:
            train, validation = split_by_prompt(pairs, self.validation_fraction, self.seed)
            return train, validation, rows
        validation_file = read_pairs(self.validation_path, self.format, limit=self.limit)
        rows[self.validation_path] = validation_file.rows
        merge(self.skipped_rows, validation_file.skipped)
        held_out = {split_key(p.prompt) for p in validation_file.pairs}
        leaking = [p.row_id for p in pairs if split_key(p.prompt) in held_out]
        merge(self.skipped_rows, {"in_validation_file": leaking} if leaking else {})
        return [p for p in pairs if split_key(p.prompt) not in held_out], validation_file.pairs, rows

    def _make_tokenizer(self, train: list[PreferencePair]) -> PreTrainedTokenizerBase:
        """The tokenizer named here, or the policy's, or one trained on the training pairs: never on validation text."""
        spec = getattr(self._stage, "policy_spec", None)
        name = self.tokenizer_name or getattr(spec, "tokenizer", None) or getattr(spec, "model", None)
        if name:
            return load_tokenizer(name)
        return train_tokenizer((text for p in train for text in (p.prompt, p.chosen, p.rejected)), self.vocab_size)

    def _encode(
        self, pairs: list[PreferencePair], truncated: dict[str, int]
    ) -> tuple[list[PreferencePair], list[EncodedPair]]:
        """The pairs that can be tokenised, as texts and as ids; the others join `skipped_rows`."""
        encoded = encode_pairs(self.tokenizer, pairs, self.lengths)
        merge(self.skipped_rows, encoded.skipped)
        for name, number in encoded.truncated.items():
            truncated[name] += number
        return [pairs[i] for i in encoded.kept], encoded.examples

    def _check_sides(self) -> None:
        """Raise FormatError where nothing is left to train on, or to validate on."""
        counts = {reason: len(ids) for reason, ids in self.skipped_rows.items()}
        if not self.train_examples + self.validation_examples:
            raise FormatError(f"{self._names}: no usable pair is left (skipped: {counts}): correct these rows")
        if not self.validation_examples:
            raise FormatError(
                f"{self.validation_path or self._names}: no pair is left for validation (skipped: {counts}): "
                f"raise validation_fraction ({self.validation_fraction:g}), or give a larger file"
            )
        if not self.train_examples:
            raise FormatError(
                f"{self._names}: no pair is left for training (skipped: {counts}): "
                f"lower validation_fraction ({self.validation_fraction:g}), or give a larger file"
            )

    def _make_report(self, rows: dict[str, int], truncated: dict[str, int]) -> dict[str, Any]:
        """What was read and what became of it, in plain types: a run's manifest keeps it."""
        return {
            "format": self.format,
            "rows": sum(rows.values()),
            "kept": len(self.train_examples) + len(self.validation_examples),
            "skipped": {reason: len(ids) for reason, ids in self.skipped_rows.items()},
            "train_pairs": len(self.train_examples),
            "validation_pairs": len(self.validation_examples),
            "truncated": truncated,
            "tokens": token_statistics(self.train_examples + self.validation_examples),
            "sha256": {name: file_hash(name) for name in rows},
        }

    @property
    def _names(self) -> str:
        return " and ".join(self.paths)

    @property
    def _stage(self) -> L.LightningModule | None:
        return self.trainer.lightning_module if self.trainer else None

    @property
    def _roles(self) -> tuple[str, ...]:
        """The responses the attached stage compares, and both where there is none."""
        return tuple(getattr(self._stage, "roles", ("chosen", "rejected")))

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _position(self) -> tuple[int, int]:
        """(epoch, batches begun in it) of the trainer. `ready` and not `completed`: saving happens between the two."""
        loop: Any = self.trainer and self.trainer.fit_loop
        return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready

    def _loader(self, examples: list[EncodedPair], batches: Iterable[list[int]]) -> DataLoader[PreferenceBatch]:
        dataset: Any = examples  # a list will do: a loader with batch_sampler asks for items only
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=partial(
                collate, roles=self._roles, pad_id=pad_id(self.tokenizer), padding_side=self.padding_side
            ),
            num_workers=self.num_workers,
            # private: each new iterator draws a seed, and from the global generator that would shift dropout masks
            generator=torch.Generator().manual_seed(self.seed),
        )


def split_by_prompt(
    pairs: Sequence[PreferencePair], validation_fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(training, validation): a prompt is for validation if the hash of seed and prompt, read in [0, 1), is small.

    Nothing but seed and prompt decides. So rows that share a prompt (`split_key`) stay together, adding rows moves no
    other, and a prompt that occurs in the files of two steps is on the same side in both.
    """
    sides: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
    for pair in pairs:
        digest = hashlib.sha256(f"{seed}\n{split_key(pair.prompt)}".encode()).digest()
        sides[int.from_bytes(digest[:8]) / 2**64 < validation_fraction].append(pair)
    return sides


def merge(skipped: dict[str, list[str]], more: dict[str, list[str]]) -> None:
    """Add the row ids of `more` to those of `skipped`, reason by reason."""
    for reason, row_ids in more.items():
        skipped.setdefault(reason, []).extend(row_ids)


def token_statistics(examples: Sequence[EncodedPair]) -> dict[str, dict[str, float]]:
    """Mean, median and largest length of prompts and responses, after truncation, BOS and EOS included."""
    lengths = {
        "prompt": [len(e.prompt) for e in examples],
        "chosen": [len(e.chosen) for e in examples],
        "rejected": [len(e.rejected) for e in examples if e.rejected],
    }
    return {
        name: {"mean": round(statistics.fmean(n), 1), "median": statistics.median(n), "max": max(n)}
        for name, n in lengths.items()
        if n
    }


def summary(report: dict[str, Any]) -> str:
    """The report in one line."""
    skipped = ", ".join(f"{reason} {n}" for reason, n in sorted(report["skipped"].items())) or "none"
    return (
        f"{' and '.join(report['sha256'])}: {report['rows']} rows; skipped: {skipped}; "
        f"{report['train_pairs']} training and {report['validation_pairs']} validation pairs; "
        f"cut: {report['truncated']['prompts']} prompts, {report['truncated']['responses']} responses"
    )
