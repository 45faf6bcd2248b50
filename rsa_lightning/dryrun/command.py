"""`rsa align --dry-run --world-size N`: what every step of a run would hold, send and do on N GPUs, without one.

Nothing is written; of models config.json alone is read, and of data how many rows there are.
"""

import gzip
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsa_lightning.dryrun.meter import KINDS, Call, Kind
from rsa_lightning.dryrun.planned import Planned, Planner, sent_by_formula, step_flops, step_tokens
from rsa_lightning.hub import is_hub_name
from rsa_lightning.lineage import Lineage
from rsa_lightning.plan import AlignConfig, StepConfig, read_config
from rsa_lightning.steps import CRITERIA, is_late, sources_of

GIB = 2**30
HELD: dict[Kind, str] = {
    "parameters": "parameters",
    "optimizer": "optimizer states",
    "reference": "reference",
    "gradients": "gradients",
    "gathered": "gathered weights",
    "unreduced": "unreduced gradients",
    "activations": "activations",
    "head": "head",
    "working": "backward, update",
}
ON_HOST: tuple[Kind, ...] = ("parameters", "optimizer", "reference", "gradients")  # with cpu_offload
MOMENTS = {
    "reference": "reference",
    "forward": "forward",
    "backward": "backward",
    "update": "optimizer step",
}


def dry_run(config: Mapping[str, Any], world_size: int, console: Console | None = None) -> list[Planned]:
    """Prints memory, communication and schedule of every step that trains; returns what it found.

    Raises:
        ValueError: in the configuration, replicas do not divide the processes, or something that a dry run cannot know.
        FileNotFoundError: there is no configuration of a model.
    """
    if world_size < 1:
        raise ValueError(f"--world-size is a number of processes, at least 1, got {world_size}")
    console, read = console or Console(), read_config(config)
    planner = Planner(read, world_size)
    found = [planner.plan(name, step) for name, step in read.steps.items() if step.trains]
    counted = [_pairs(read.steps[step.name], read) for step in found]
    for table in (_memory(found), _communication(found), _schedule(found, counted, Lineage(read))):
        console.print(table)
    for note in dict.fromkeys([*planner.notes, *_notes(found), *_data_notes(found, counted, read)]):
        console.print(f"- {note}", soft_wrap=True)
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(title: str, found: Sequence[Planned], caption: str = "") -> Table:
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for step in found:
        table.add_column(step.name, justify="right")
    return table


def _memory(found: Sequence[Planned]) -> Table:
    caption = "largest batch: every row of max_length; without what the driver, NCCL and the allocator take"
    table = _table(f"GiB per GPU of {found[0].world_size} at the fullest moment of a step", found, caption)
    offloaded = [step.sharded is not None and step.sharded.offloads for step in found]
    for kind in KINDS:
        here = [
            "–" if host and kind in ON_HOST else _gib(s.found.peak[kind])
            for s, host in zip(found, offloaded, strict=True)
        ]
        table.add_row(HELD[kind], *here)
    totals = [
        sum(size for kind, size in step.found.peak.items() if not (host and kind in ON_HOST))
        for step, host in zip(found, offloaded, strict=True)
    ]
    table.add_section()
    table.add_row("[bold]together[/]", *(f"[bold]{_gib(total)}[/]" for total in totals))
    for phase, name in MOMENTS.items():
        peaks = [
            step.found.most(phase, without=ON_HOST if host else ()) for step, host in zip(found, offloaded, strict=True)
        ]
        table.add_row(f"  at most in the {name}", *map(_gib, peaks))
    if any(offloaded):
        hosts = [sum(step.found.peak[kind] for kind in ON_HOST) for step in found]
        table.add_row(
            "on the host", *(_gib(size) if host else "–" for size, host in zip(hosts, offloaded, strict=True))
        )
    table.add_row("parameters, billions", *(f"{step.found.total / 1e9:.3g}" for step in found))
    table.add_row("of these trained", *(f"{100 * step.found.trained / step.found.total:.3g} %" for step in found))
    table.add_row("head keeps, rows at a time", *(_head(step) for step in found))
    return table


def _head(step: Planned) -> str:
    kept = {"cache": "logits", "recompute": "nothing", "frozen": "gradients", "nothing": "nothing"}
    return f"{kept[step.found.head.strategy]}, {min(step.found.head.rows, step.rows * step.work.scored)}"


def _communication(found: Sequence[Planned]) -> Table:
    caption = "sent, and received, by each GPU in a ring; by formula: (n - 1) / n of the bytes of each gather"
    table = _table("GiB sent per GPU and optimizer step", found, caption)
    sent = [_by_kind(step.found.calls) for step in found]
    for key in sorted(set().union(*sent), key=lambda key: (list(MOMENTS).index(key[0]), key[1:])):
        phase, operation, group = key
        label = f"{MOMENTS[phase]}: {operation} over {group}"
        table.add_row(label, *(_gib(part[key]) if key in part else "–" for part in sent))
    table.add_section()
    table.add_row("[bold]together[/]", *(f"[bold]{_gib(step.found.sent())}[/]" for step in found))
    table.add_row("by formula", *(_gib(sent_by_formula(step)) for step in found))
    return table


def _by_kind(calls: Mapping[Call, float]) -> dict[tuple[str, str, int], float]:
    """Bytes sent by phase, operation and group, but the norm of the gradients."""
    found: dict[tuple[str, str, int], float] = defaultdict(float)
    for call, count in calls.items():
        if call.bytes > 64:
            found[call.phase, call.operation, call.group] += count * call.sent
    return found


def _schedule(found: Sequence[Planned], counted: Sequence[int | None], lineage: Lineage) -> Table:
    table = _table("schedule", found)
    table.add_row("starts from", *(lineage.start(step.name) for step in found))
    near = [
        lineage.reference(step.name) if getattr(step.stage, "reference", None) is not None else "–" for step in found
    ]
    table.add_row("stays near", *near)
    table.add_row("pairs per optimizer step", *(str(step.pairs) for step in found))
    shape = [f"{s.work.pairs} x {s.world_size} x {s.work.accumulate}" for s in found]
    table.add_row("  batch x GPUs x accumulated", *shape)
    table.add_row("tokens per optimizer step", *(f"{step_tokens(step):,}" for step in found))
    table.add_row("PFLOP per optimizer step", *(f"{step_flops(step) * step.world_size / 1e15:.3g}" for step in found))
    table.add_row("TFLOP per GPU", *(f"{step_flops(step) / 1e12:.4g}" for step in found))
    table.add_row("pairs, at most", *("not known" if count is None else str(count) for count in counted))
    steps = [_optimizer_steps(step, count) for step, count in zip(found, counted, strict=True)]
    table.add_row("optimizer steps, at most", *("not known" if count is None else str(count) for count in steps))
    table.add_row("  of these warm-up", *(_warm_up(step, count) for step, count in zip(found, steps, strict=True)))
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}" if size >= GIB / 1e5 else "0"


def _notes(found: Sequence[Planned]) -> list[str]:
    notes = []
    for step in found:
        if step.sharded is None and step.world_size > 1:
            notes.append(
                "trainer.strategy is not FSDP2: every GPU holds everything, and gradients are reduced as by ddp (whose "
                "buckets, as large as the gradients, are not counted)"
            )
        unreduced = step.found.peak["unreduced"]
        if step.work.accumulate > 1 and unreduced > sum(step.found.peak.values()) / 4:
            notes.append(
                f"steps.{step.name}: {_gib(unreduced)} GiB are unreduced gradients of accumulated batches: "
                "strategy.reduce_every_microbatch true sends more and holds less"
            )
    return notes


def _data_notes(found: Sequence[Planned], counted: Sequence[int | None], config: AlignConfig) -> list[str]:
    notes = []
    for step, pairs in zip(found, counted, strict=True):
        for key, file in _files(config.steps[step.name], config).items():
            if not Path(file).exists() and not is_hub_name(file):
                notes.append(f"{key}: there is no {file} here, so its rows are not counted; training would refuse it")
        if pairs is not None and pairs < step.pairs:
            notes.append(
                f"[bold]steps.{step.name}: training would be refused[/]: {pairs} pairs are fewer than one optimizer "
                f"step takes, {step.pairs} (batch_size {step.work.pairs} x {step.world_size} processes x "
                f"accumulate_grad_batches {step.work.accumulate}); lower one of these, or give more data"
            )
    return notes


# ---- data ---------------------------------------------------------------------------------------------------------


def _optimizer_steps(step: Planned, pairs: int | None) -> int | None:
    trainer = step.trainer
    if pairs is None or trainer.max_epochs == -1:  # as many epochs as it takes
        return trainer.max_steps if trainer.max_steps > 0 else None
    batches = pairs // step.pairs * step.work.accumulate
    limit = trainer.limit_train_batches
    batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    steps = -(-batches // step.work.accumulate) * (trainer.max_epochs or 1)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


def _warm_up(step: Planned, steps: int | None) -> str:
    schedule = step.stage.schedule
    if schedule is None:
        return "0"
    return f"{100 * schedule.warmup:.3g} %" if steps is None else str(round(schedule.warmup * steps))


def _pairs(step: StepConfig, config: AlignConfig) -> int | None:
    """Training rows of a step before any is dropped, by the rows of its files; None where that is not known."""
    data = config.data
    try:
        names, options = sources_of(step, data)
    except ValueError:
        return None
    if data.stories is not None:
        counts: list[int | None] = [getattr(data.stories, n if n == "demonstrations" else "pairs") for n in names]
    else:
        counts = [count_rows(file) for file in _files(step, config).values()]
    options = {**data.options, **options}
    if any(count is None for count in counts):
        return None
    limits = [min(count, options.get("limit") or count) for count in counts if count is not None]
    share = 0.0 if options.get("validation_path") else options.get("validation_fraction", 0.1)
    return int(sum(limits) * (1 - share))


def _files(step: StepConfig, config: AlignConfig) -> dict[str, str]:
    """The files of a step by their keys; none where its data is generated, not given, or made by an earlier step."""
    data = config.data
    if data.stories is not None or is_late(step, config):
        return {}
    try:
        names, _ = sources_of(step, data)
    except ValueError:
        return {}
    keys = ["path" if data.path and name in CRITERIA else name for name in names]
    return {f"data.{key}": getattr(data, key) for key in keys}


def count_rows(path: str | None) -> int | None:
    """Rows of a file, counted and not parsed; None where there is none, or it is of a kind whose rows must be read."""
    if path is None or not Path(path).is_file():
        return None
    if path.endswith(".parquet"):
        from pyarrow import parquet

        return int(parquet.ParquetFile(path).metadata.num_rows)
    if path.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    return None
