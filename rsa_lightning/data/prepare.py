"""Files of preferences -> validated, split and tokenised examples on disk, and a report of what became of every row.

The work is done once for every combination of data, tokenizer and settings, before any trainer exists: no process waits
in a process group while another one tokenises.
"""

import atexit
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rsa_lightning.checkpoint import write_json
from rsa_lightning.data.cache import load_or_make
from rsa_lightning.data.formats import check_format
from rsa_lightning.data.ledger import Ledger, evaluation_keys, listed, read_records, sift
from rsa_lightning.data.quality import defects_of
from rsa_lightning.data.readers import Source, places
from rsa_lightning.data.records import FormatError, Prompt, Record, split_key
from rsa_lightning.data.settings import PrepareSettings, entry_key, fingerprints
from rsa_lightning.data.statistics import label_counts, token_statistics
from rsa_lightning.data.table import EncodedTable, TableWriter
from rsa_lightning.data.template import resolve_template
from rsa_lightning.data.tokenize import (
    EncodedRecords,
    count_boundary_merges,
    encode_records,
    load_encoder,
    load_tokenizer,
    renders,
    responses,
    train_tokenizer,
)

log = logging.getLogger(__name__)

BLOCK = 2048  # records tokenised at a time, which bounds the memory their ids take
BOUNDARIES = 256  # prompts and responses whose joint tokenisation is looked at


class Prepared(NamedTuple):
    """What `prepare` returns: the same whether it was there or had to be made.

    Attributes:
        template: what renders the prompts, to be handed to `encode_prompt`; None where texts are taken as they are.
        report: what was read, dropped and kept, in plain types.
        skipped_rows: ids of the rows that were left out, by reason.
        folder: holds all of it.
    """

    train: EncodedTable
    validation: EncodedTable
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    report: dict[str, Any]
    skipped_rows: dict[str, list[str]]
    folder: Path


class PreparationError(FormatError):
    """Data that was read to its end and cannot be used as the settings ask; `report` says what was found."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class Sides(NamedTuple):
    """Records, or what became of them, for training and for validation."""

    train: list[Record]
    validation: list[Record]


def prepare(settings: PrepareSettings, tokenizer_name: str | None) -> Prepared:
    """The examples of a data set, from the cache or made now.

    Args:
        tokenizer_name: folder or hub name of the tokenizer; None trains one on the training side.

    Raises:
        FormatError: a file, the format, the tokenizer, the template or the cache cannot be used as asked.
        PreparationError: a defect with the policy fail, too much dropped, or nothing left. The report is on disk too,
            beside the place of the entry, and the message ends with its path.
    """
    check_format(settings.format, settings.criterion)  # before any file is read
    prints = fingerprints(settings)
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else None
    key = entry_key(settings, prints, tokenizer)
    cache = cache_folder(settings.cache_dir)
    failed = cache / f"{key}.report.json"

    def fill(folder: Path) -> None:
        try:
            make(settings, tokenizer, prints, folder)
        except PreparationError as error:
            if settings.cache_dir is None:  # what would be written goes with this process
                raise
            write_json(failed, error.report)
            raise PreparationError(f"{error}; report: {failed}", error.report) from None
        failed.unlink(missing_ok=True)

    return load(load_or_make(cache, key, fill), tokenizer)


def load(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Prepared:
    """What an entry holds. The tokenizer is the one given, with the template of the data, or the one trained for it."""
    account = json.loads((folder / "account.json").read_text(encoding="utf-8"))
    tokenizer = tokenizer or load_tokenizer(folder / "tokenizer")
    if account["chat_template"] is not None:  # as it was rendered here: the tokenizer's own, too, may have had a clock
        if tokenizer.chat_template and account["template"] not in (None, tokenizer.chat_template):
            log.info("data.template replaces the tokenizer's own chat template, also in the saved model")
        tokenizer.chat_template = account["chat_template"]
    return Prepared(
        EncodedTable(folder / "train.arrow"),
        EncodedTable(folder / "validation.arrow"),
        tokenizer,
        account["template"],
        json.loads((folder / "report.json").read_text(encoding="utf-8")),
        account["skipped_rows"],
        folder,
    )


def cache_folder(cache_dir: str | None) -> Path:
    """The folder of the cache; without one a folder that goes when this process ends."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    temporary = tempfile.mkdtemp(prefix="rsa_lightning-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


# --- the work


def make(
    settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase | None, prints: dict[str, str], folder: Path
) -> None:
    """Fills the folder of an entry. Nothing fails before all rows are read. Raises PreparationError."""
    ledger = Ledger(settings.defects)
    report: dict[str, Any] = {
        "format": settings.format,
        "criterion": settings.criterion,
        "template": settings.template,
        "paths": [*settings.paths, *([settings.validation_path] if settings.validation_path else [])],
        "sha256": prints,
    }
    try:
        sides = split(settings, ledger)
        own = tokenizer is None
        if own and sides.train:
            tokenizer = train_tokenizer(texts(sides.train), settings.tokenizer_vocab_size)
        report |= {"train_pairs": len(sides.train), "validation_pairs": len(sides.validation)}
        if tokenizer is not None and (sides.train or sides.validation):
            prompts = (record.prompt for side in sides for record in side)
            rendered = renders(settings.template, prompts)
            chat_template = resolve_template(settings.template, tokenizer) if rendered else None
            template = None if settings.template is None else chat_template
            report |= encode(sides, tokenizer, template, settings, ledger, folder)
            kept = {"template": template, "chat_template": chat_template, "skipped_rows": ledger.dropped}
            write_json(folder / "account.json", kept)
            if own:
                tokenizer.save_pretrained(folder / "tokenizer")
        report |= account(ledger)
        check(settings, ledger, report)
    except FormatError as error:
        raise PreparationError(str(error), {**report, **account(ledger), "error": str(error)}) from None
    write_json(folder / "report.json", report)


def split(settings: PrepareSettings, ledger: Ledger) -> Sides:
    """The records of both sides, without those that a policy drops."""
    keys = evaluation_keys(settings.evaluation_prompts)
    every = settings.every_source
    place = dict(zip(every, places(every), strict=True))

    def read(sources: Sequence[Source]) -> list[Record]:
        options = settings.format, settings.criterion, settings.limit, ledger
        return [
            record for source in sources for record in read_records(source, *options, place[source], settings.relabel)
        ]

    anchored = settings.anchored_costs is not False
    records = sift(read(settings.sources), keys, ledger, anchored)
    if settings.validation_source is None:
        return Sides(*split_by_prompt(records, settings.validation_fraction, settings.seed))
    validation = sift(read([settings.validation_source]), keys, ledger, anchored)
    held_out = {split_key(record.prompt) for record in validation}
    leaking = [record.row_id for record in records if split_key(record.prompt) in held_out]
    if leaking:
        ledger.drop("in_validation_file", leaking)
    return Sides([record for record in records if split_key(record.prompt) not in held_out], validation)


def split_by_prompt(
    records: Sequence[Record], validation_fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """(training, validation): a prompt is for validation if the hash of seed and prompt, read in [0, 1), is small.

    Nothing but seed and prompt decides. So rows that share a prompt (`split_key`) stay together, adding rows moves no
    other, and a prompt that occurs in the files of two steps is on the same side in both.
    """
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        digest = hashlib.sha256(f"{seed}\n{split_key(record.prompt)}".encode()).digest()
        sides[int.from_bytes(digest[:8]) / 2**64 < validation_fraction].append(record)
    return sides


def texts(records: Sequence[Record]) -> Iterator[str]:
    """What a tokenizer is trained on: prompts and responses."""
    for record in records:
        prompt = record.prompt
        yield from [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        yield from responses(record)


def encode(
    sides: Sides,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    settings: PrepareSettings,
    ledger: Ledger,
    folder: Path,
) -> dict[str, Any]:
    """Tokenises both sides into files of the folder; what the report says about the examples."""
    kept: list[Record] = []
    truncated = {"prompts": 0, "responses": 0}
    tables, digests = {}, {}
    for name, records in zip(Sides._fields, sides, strict=True):
        path = folder / f"{name}.arrow"
        with TableWriter(path) as table:
            for low in range(0, len(records), BLOCK):
                block = records[low : low + BLOCK]
                kept += encode_block(block, tokenizer, template, settings, ledger, table, truncated)
        tables[name], digests[name] = EncodedTable(path), table.digest
    return {
        "train_pairs": len(tables["train"]),
        "validation_pairs": len(tables["validation"]),
        "truncated": truncated,
        "tokens": token_statistics(tables.values()) if kept else {},
        "labels": label_counts(kept),
        "boundary_merges": boundary_merges(kept, tokenizer, template),
        "examples_sha256": digests,
    }


def encode_block(
    records: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    settings: PrepareSettings,
    ledger: Ledger,
    table: TableWriter,
    truncated: dict[str, int],
) -> list[Record]:
    """Tokenises records into the table and returns those that are in it; adds to the ledger and to `truncated`."""
    keep_empty = not ledger.drops("empty")
    encoded = encode_records(tokenizer, records, settings.lengths, template, keep_empty=keep_empty)
    for reason, row_ids in encoded.skipped.items():
        ledger.lose(reason, row_ids)
    left_out = judge(records, encoded, ledger)
    if not (encoded.overlong and ledger.drops("overlong")):
        for what, number in encoded.truncated.items():
            truncated[what] += number
    pairs = [(e, records[i]) for e, i in zip(encoded.examples, encoded.kept, strict=True) if i not in left_out]
    prompts: list[Prompt] = [record.prompt for _, record in pairs]
    table.append([example for example, _ in pairs], prompts)
    return [record for _, record in pairs]


def judge(records: Sequence[Record], encoded: EncodedRecords, ledger: Ledger) -> set[int]:
    """The indices of the records whose tokens have a defect that is not kept; all are entered into the ledger.

    Responses that differ behind the cut only are identical to training: such a pair has no gradient.
    """
    cut_alike = [
        i
        for i, example in zip(encoded.kept, encoded.examples, strict=True)
        if example.chosen == example.rejected and "identical" not in defects_of(records[i])
    ]
    left_out: set[int] = set()
    for reason, indices in (("overlong", encoded.overlong), ("identical", cut_alike)):
        if indices:
            ledger.find(reason, [records[i].row_id for i in indices])
        if ledger.drops(reason) and (new := [i for i in indices if i not in left_out]):
            ledger.drop(reason, [records[i].row_id for i in new])
            left_out.update(new)
    return left_out


def boundary_merges(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> dict[str, int]:
    """Of some records, spread evenly, how many a joint tokenisation of prompt and response would tokenise otherwise."""
    count = min(BOUNDARIES, len(records))
    sample = [records[i * len(records) // count] for i in range(count)]
    encoder = load_encoder(tokenizer, template, (record.prompt for record in sample))
    pairs = []
    for record in sample:
        used = encoder.template_for(record.prompt)
        rendered = used.render(record.prompt) if used else str(record.prompt)
        pairs.append((rendered, responses(record)[0]))
    return {"checked": count, "merged": count_boundary_merges(tokenizer, pairs)}


# --- the account


def account(ledger: Ledger) -> dict[str, Any]:
    """What the report says about rows: how many there were, and what is wrong with which."""
    return {
        "rows": ledger.rows,
        "skipped": {reason: len(row_ids) for reason, row_ids in ledger.dropped.items() if row_ids},
        "defects": {
            reason: {"policy": ledger.policies.policy(reason), "count": len(row_ids), "rows": list(row_ids)}
            for reason, row_ids in sorted(ledger.found.items())
        },
        "first_messages": dict(ledger.messages),
    }


def check(settings: PrepareSettings, ledger: Ledger, report: dict[str, Any]) -> None:
    """Raise FormatError where a policy says fail, nothing is left, or more was dropped than is allowed."""
    names = " and ".join(settings.paths)
    train, validation = report["train_pairs"], report["validation_pairs"]
    report["kept"] = train + validation
    if failures := ledger.failures():
        reasons = " or ".join(dict.fromkeys(f"data.defects.{failure.partition(':')[0]}" for failure in failures))
        raise FormatError(
            f"{names}: {'; '.join(failures)}; correct these rows, or leave them out by setting {reasons} to drop"
        )
    skipped = listed(report["skipped"])
    if not train + validation:
        most = ledger.most({reason: n for reason, n in report["skipped"].items() if reason in ledger.found})
        raise FormatError(f"{names}: no usable pair is left (skipped: {skipped}): correct these rows. {most}")
    if too_many := ledger.too_many():
        raise FormatError(f"{names}: {too_many}")
    for side, number in (("training", train), ("validation", validation)):
        if not number:
            raise FormatError(f"{names}: no pair is left for {side} (skipped: {skipped}): {more_of(side, settings)}")


def more_of(side: str, settings: PrepareSettings) -> str:
    """The mend where nothing is left for training, or for validation."""
    if settings.validation_path is not None:
        file = settings.validation_path
        return f"correct the rows of {file}" if side == "validation" else f"use rows whose prompts are not in {file}"
    turn = {"training": "lower", "validation": "raise"}[side]
    return f"{turn} validation_fraction ({settings.validation_fraction:g}), or give a larger file"
