"""`PreferenceData`: prepared examples -> the loaders of every stage."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rsa_lightning.data.batch import PaddingSide, PreferenceBatch, collate
from rsa_lightning.data.prepare import Prepared, prepare
from rsa_lightning.data.quality import Defects
from rsa_lightning.data.records import FormatError, Prompt
from rsa_lightning.data.relabel import Relabel, as_relabel
from rsa_lightning.data.sampler import PairBatches, even_batches
from rsa_lightning.data.settings import PrepareSettings
from rsa_lightning.data.statistics import summary
from rsa_lightning.data.table import EncodedTable, Prompts
from rsa_lightning.data.tokenize import Lengths, pad_id

log = logging.getLogger(__name__)

CACHE = "~/.cache/rsa_lightning"


class PreferenceData(L.LightningDataModule):
    """Preference data, split by prompt and tokenised once: what `prepare` made of it, for one stage at a time.

    After `setup`: `train_examples` and `validation_examples` (token ids, read from disk when looked at),
    `train_prompts` and `validation_prompts` (the same examples' prompts as they were), `tokenizer`, `template` (what
    `encode_prompt` takes), `report` (a plain dict of what was read, skipped and kept) and `skipped_rows` (row
    ids by reason).

    Args:
        path: training rows: .jsonl, .json, .jsonl.gz, .json.gz or .parquet, a folder of such files, a folder written by
            `datasets`, or a dataset of the hub; or several of one format.
        format: how its rows are read, a name in rsa_lightning.data.formats: trl, hh, pku, sharegpt, kto, ...
        criterion: which label of a row with two is learnt: helpful or safe, for pku.
        validation_path: validation rows of the same format; training rows that share a prompt with it are dropped.
        validation_fraction: share of the prompts set aside for validation where there is no validation_path.
        evaluation_prompts: file or files with a column `prompt`; rows that ask one of them are `contaminated`.
        defects: what is done about rows with a defect.
        template: how prompts are rendered: hh, beaver, chatml, a Jinja text or a .jinja file; tokenizer for its own
            chat template. Default: texts as they are, messages by the tokenizer's chat template.
        tokenizer: folder or hub name of a tokenizer. Default: the policy's own; if the policy has none, a byte-level
            BPE is trained on the training side.
        tokenizer_vocab_size: size of the tokenizer trained here.
        batch_size: pairs in a batch of one process.
        max_length: tokens of prompt and response together; longer responses are cut at the end.
        max_prompt_length: tokens of the prompt; longer prompts are cut at the start. Default: half of max_length.
        eos_when_truncated: whether a response that was cut still ends in the end token.
        padding_side: where shorter rows are filled, right or left; it changes no result.
        padding_free: rows are not filled but put one after the other into one line, and attend within themselves; it
            changes no result. Architectures that cannot do this are refused.
        length_bucketing: make the pairs of an optimizer step similar in length: less padding, but no longer a random
            sample of the data. Refused with padding_free, where it would save nothing.
        num_workers: processes that prepare batches.
        seed: of the split and of the order of the training pairs.
        limit: read at most this many rows of each path.
        revision: of a dataset of the hub: its commit, 40 digits.
        split: of a dataset of the hub (default train), or of a folder with several.
        validation_split: likewise, of validation_path.
        streaming: read a dataset of the hub without downloading it.
        anchored_costs: whether a cost of 0 means safe, as it does for ground truth, severity levels and a cost model
            trained to tell safe from unsafe by its sign, and not for one that is known up to a constant per prompt
            (Bradley-Terry). Default: yes for pku; for other formats, where every pair with costs has both safety
            labels and they agree. A pair whose labels disagree is contradictory, unless this is false.
        relabel: pairs are swapped, given offsets or left out before they are judged: SafeDPO; null takes them as they
            are.
        cache_dir: where examples are kept, for any run with the same data and settings; null keeps none.
    """

    def __init__(
        self,
        path: str | list[str],
        format: str = "trl",
        criterion: str | None = None,
        validation_path: str | None = None,
        validation_fraction: float = 0.1,
        evaluation_prompts: str | list[str] | None = None,
        defects: Defects = Defects(),  # noqa: B008 (frozen)
        template: str | None = None,
        tokenizer: str | None = None,
        tokenizer_vocab_size: int = 2048,
        batch_size: int = 8,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        eos_when_truncated: bool = True,
        padding_side: PaddingSide = "right",
        padding_free: bool = False,
        length_bucketing: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        revision: str | None = None,
        split: str | None = None,
        validation_split: str | None = None,
        streaming: bool = False,
        anchored_costs: bool | None = None,
        relabel: Relabel | None = None,
        cache_dir: str | None = CACHE,
    ):
        super().__init__()
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction is a share of the prompts in (0, 1), got {validation_fraction}")
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if padding_free and padding_side != "right":
            raise ValueError(
                f"padding_free batches have no padding to be on the {padding_side}: drop padding_side, or padding_free"
            )
        if padding_free and length_bucketing:
            raise ValueError(
                "padding_free batches have no padding for length_bucketing to save, and the steps that it makes are no "
                "random samples: drop length_bucketing, or padding_free"
            )
        prompt_length = max_length // 2 if max_prompt_length is None else max_prompt_length
        self.lengths = Lengths(max_length, prompt_length, eos_when_truncated)
        paths = as_tuple(path)
        if not paths or len(set(paths)) < len(paths):
            raise ValueError(f"path must be one training file, or several different ones, got {list(paths)}")
        self.settings = PrepareSettings(
            paths=paths,
            lengths=self.lengths,
            format=format,
            criterion=criterion,
            template=template,
            validation_path=validation_path,
            validation_split=validation_split,
            validation_fraction=validation_fraction,
            evaluation_prompts=as_tuple(evaluation_prompts),
            # a configuration that is not parsed as one of a class brings plain mappings
            defects=Defects(**defects) if isinstance(defects, Mapping) else defects,
            tokenizer_vocab_size=tokenizer_vocab_size,
            revision=revision,
            split=split,
            streaming=streaming,
            seed=seed,
            limit=limit,
            anchored_costs=anchored_costs,
            relabel=as_relabel(relabel),
            cache_dir=cache_dir,
        )
        self.tokenizer_name, self.seed, self.length_bucketing = tokenizer, seed, length_bucketing
        self.batch_size, self.num_workers = batch_size, num_workers
        self.padding_side, self.padding_free = padding_side, padding_free
        self.report: dict[str, Any] = {}
        self.skipped_rows: dict[str, list[str]] = {}
        self._prepared: Prepared | None = None
        self._summarised = False

    def prepare(self, tokenizer_name: str | None = None) -> None:
        """Read, validate, split and tokenise, or find that done; once. Needs no Trainer, and should precede any.

        Args:
            tokenizer_name: the policy's tokenizer, for data that names none of its own.

        Raises:
            FormatError: a file cannot be read as asked, a defect has the policy fail, nothing is left, or the tokenizer
                or the cache cannot be used.
        """
        if self._prepared is None:
            self._prepared = prepare(self.settings, self.tokenizer_name or tokenizer_name)
            self._select(paired=False, roles=("chosen", "rejected"))

    def setup(self, stage: str | None = None) -> None:
        """`prepare`, and what the attached stage can use of it. Works without a Trainer too.

        Raises:
            FormatError: as `prepare`; or the stage compares two responses, and there are examples with one.
        """
        self.prepare(tokenizer_of(self._stage))
        paired = self._stage is not None and bool(getattr(self._stage, "needs_pairs", True))
        self._select(paired, self._roles)
        if not self._summarised:
            # without a Trainer the caller reads `report`
            rank_zero_only(log.info if self._stage else log.debug)(summary(self.report))
            self._summarised = True

    @property
    def anchored_costs(self) -> bool:
        """Whether a cost of 0 means safe: as the argument says, or as the safety labels of the data show."""
        if self.settings.anchored_costs is not None:
            return self.settings.anchored_costs
        if self.settings.format == "pku":
            return True
        labels = self.report["labels"]
        return labels.get("costs_of_both", 0) == labels.get("costs_confirmed", 0) > 0

    @property
    def layout(self) -> PaddingSide | None:
        """Where rows are filled; None where they are packed."""
        return None if self.padding_free else self.padding_side

    @property
    def folder(self) -> Path | None:
        """Where the prepared examples lie; None before they are, or where there is no cache."""
        return self._prepared.folder if self._prepared and self.settings.cache_dir is not None else None

    def prepare_data(self) -> None:
        """Reads on the first process of a node before Lightning opens its log folders: bad data leaves none behind."""
        self.setup()

    def train_dataloader(self) -> DataLoader[PreferenceBatch]:
        """Batches in the order of `PairBatches`, which continues where the trainer stands."""
        accumulate, per_step = self._accumulate, self._per_step
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
            lengths=self.train_examples.lengths.tolist() if self.length_bucketing else None,
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
            "training examples": self.report["examples_sha256"]["train"],
            "seed": self.seed,
            "pairs per batch over all processes": self.batch_size * self._world_size,
            "lengths": dataclasses.asdict(self.lengths),
            "length_bucketing": self.length_bucketing,
            # pairs are sorted within optimizer steps: their number decides which pairs meet
            "pairs per bucketed step": self._per_step if self.length_bucketing else None,
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

    def _select(self, paired: bool, roles: Sequence[str]) -> None:
        """Sets what a stage with these roles sees: all examples, or for a warm-up those with a chosen response."""
        assert self._prepared is not None
        prepared = self._prepared
        self.tokenizer: PreTrainedTokenizerBase = prepared.tokenizer
        self.template, self.skipped_rows = prepared.template, dict(prepared.skipped_rows)
        sides = {"train": prepared.train, "validation": prepared.validation}
        if "rejected" not in roles:
            sides = {name: self._chosen_only(name, table) for name, table in sides.items()}
        elif paired:
            self._check_pairs(sides.values())
        self.train_examples, self.validation_examples = sides["train"], sides["validation"]
        self.train_prompts: Sequence[Prompt] = Prompts(self.train_examples)
        self.validation_prompts: Sequence[Prompt] = Prompts(self.validation_examples)
        self.report = {
            **prepared.report,
            "kept": len(self.train_examples) + len(self.validation_examples),
            "train_pairs": len(self.train_examples),
            "validation_pairs": len(self.validation_examples),
            "skipped": {reason: len(row_ids) for reason, row_ids in self.skipped_rows.items()},
        }

    def _chosen_only(self, name: str, table: EncodedTable) -> EncodedTable:
        """The examples with a chosen response; the others are counted as undesirable. Raises FormatError."""
        has_chosen = table.tokens("chosen") > 0
        if has_chosen.all():
            return table
        if not has_chosen.any():
            raise FormatError(f"{self._names}: all {name} responses are undesirable ones: a warm-up has none to learn")
        others = [table[int(i)].row_id for i in np.flatnonzero(~has_chosen)]
        self.skipped_rows = {
            **self.skipped_rows,
            "undesirable": [*self.skipped_rows.get("undesirable", []), *others],
        }
        return table.select(np.flatnonzero(has_chosen))

    def _check_pairs(self, tables: Iterable[EncodedTable]) -> None:
        """Raise FormatError where an example has one response only."""
        counts = [np.minimum(table.tokens("chosen"), table.tokens("rejected")) for table in tables]
        both = np.concatenate(counts) > 0
        if not both.all():
            raise FormatError(
                f"{self._names}: {int((~both).sum())} of {len(both)} examples of format {self.settings.format!r} have "
                "one response, and this stage compares two: give it preference pairs, use the loss KTO, which needs "
                "none, or use this file for a warm-up"
            )

    @property
    def _names(self) -> str:
        return " and ".join(self.settings.paths)

    @property
    def _stage(self) -> L.LightningModule | None:
        return self.trainer.lightning_module if self.trainer else None

    @property
    def _roles(self) -> tuple[str, ...]:
        """The responses the attached stage compares, and both where there is none."""
        return tuple(getattr(self._stage, "roles", ("chosen", "rejected")))

    @property
    def _world_size(self) -> int:
        """Processes with pairs of their own: those that share matrices count as one."""
        return (self._sharing or {}).get("num_replicas", self.trainer.world_size if self.trainer else 1)

    @property
    def _accumulate(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def _per_step(self) -> int:
        """Pairs of an optimizer step, over all ranks and accumulated batches."""
        return self.batch_size * self._world_size * self._accumulate

    @property
    def _rank(self) -> int:
        return (self._sharing or {}).get("rank", self.trainer.global_rank if self.trainer else 0)

    @property
    def _sharing(self) -> dict[str, Any] | None:
        """How the strategy deals out data; None on a single device."""
        return getattr(self.trainer, "distributed_sampler_kwargs", None)

    def _position(self) -> tuple[int, int]:
        """(epoch, batches begun in it) of the trainer. `ready` and not `completed`: saving happens between the two."""
        loop: Any = self.trainer and self.trainer.fit_loop
        return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready

    def _loader(self, examples: EncodedTable, batches: Iterable[list[int]]) -> DataLoader[PreferenceBatch]:
        dataset: Any = examples  # a sequence will do: a loader with batch_sampler asks for items only
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=partial(
                collate,
                roles=self._roles,
                pad_id=pad_id(self.tokenizer),
                padding_side=self.layout,
            ),
            num_workers=self.num_workers,
            # private: each new iterator draws a seed, and from the global generator that would shift dropout masks
            generator=torch.Generator().manual_seed(self.seed),
        )


def as_tuple(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """One name or several as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def tokenizer_of(stage: L.LightningModule | None) -> str | None:
    """The folder or name of the tokenizer of a stage's policy; None where it has none yet."""
    spec = getattr(stage, "policy_spec", None)
    return getattr(spec, "tokenizer", None) or getattr(spec, "model", None)
