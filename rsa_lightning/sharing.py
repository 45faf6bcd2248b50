"""What decides a step's model, and equal steps trained once: a run takes over a finished step of another one."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rsa_lightning.checkpoint import folder_hashes, key_of
from rsa_lightning.config import merge
from rsa_lightning.lineage import Lineage, adapter_inputs
from rsa_lightning.manifest import NAME, Manifest
from rsa_lightning.plan import AlignConfig

FOLDERS = ("model", "adapter")  # linked: nothing changes their files in place
FILES = ("metrics.csv", "samples.jsonl", "preference.json")  # copied: a logger may append to what it finds


# arguments of a Trainer that show what happens and change nothing
DISPLAY = ("log_every_n_steps", "logger", "enable_progress_bar", "enable_model_summary", "profiler")
# arguments of a Trainer that say where it computes and how: the same to rounding, if all have as many pairs together
LAYOUT = ("accelerator", "devices", "num_nodes", "strategy")
# arguments of PreferenceData that the hashes of what they hold stand for
PLACES = ("path", "validation_path", "evaluation_prompts", "tokenizer", "cache_dir")


def trained_inputs(
    name: str,
    beta: float | None,
    config: AlignConfig,
    lineage: Lineage,
    tokenizer: str,
    data: Mapping[str, Any],
    report: Mapping[str, Any],
    pairs_per_batch: int,
) -> dict[str, Any]:
    """Everything that decides the model of a step that trains; paths are replaced by the hashes of what they hold.

    Args:
        beta: the temperature of its loss.
        tokenizer: its folder.
        data: arguments of its PreferenceData, whose report says what was read.
        pairs_per_batch: over all processes.
    """
    step, policy = config.steps[name], lineage.policy(name)
    settings = dataclasses.asdict(step)
    trainer = merge(config.trainer, settings.pop("trainer"))
    for key in ("start", "reference", "data", "temperature", "lora"):  # resolved below
        settings.pop(key)
    settings.pop("reference_cache")  # where the reference's states lie, not what they are
    near = [lineage.start(name)] if step.kind == "warmup" else [lineage.start(name), lineage.reference(name)]
    return {
        "step": settings,
        "temperature": beta,
        "trainer": {key: value for key, value in trainer.items() if key not in DISPLAY + LAYOUT},
        "model": {"dtype": config.model.dtype, "trust_remote_code": config.model.trust_remote_code},
        "seed": config.seed,
        "pairs_per_batch": pairs_per_batch,
        "data": {
            **{key: value for key, value in data.items() if key not in PLACES and key != "batch_size"},
            "sha256": list(report["sha256"].values()),
            "examples": report["examples_sha256"],  # what a template file or a reader made of them
        },
        "tokenizer": key_of(folder_hashes(tokenizer)),
        "adapter": None if policy["lora"] is None else adapter_inputs(policy),
        "lineage": [key_of(folder_hashes(lineage.model(target))) for target in near],
        "version": version("rsa_lightning"),
    }


def take_over(
    manifest: Manifest, name: str, inputs: Mapping[str, Any], donors: Sequence[Path], **facts: Any
) -> Path | None:
    """Makes step `name` of a run from a step of another run that was trained on the very same inputs.

    Its model and adapter are hard links where the file system allows, else copies; what was sampled, scored and judged
    comes along, and is used as far as it is still what is asked for. Checkpoints stay where they are.

    Args:
        manifest: of the run that takes the step over.
        inputs: everything that decides the step's model.
        donors: run directories; those that do not exist yet, or are no runs, have nothing to give.
        facts: what the manifest shall say of the step instead of what the donor's says.

    Returns:
        The folder of the step that was taken over; None where there is none.
    """
    found = _find(inputs, [run for run in donors if run.resolve() != manifest.folder.resolve()])
    if found is None:
        return None
    donor, theirs = found
    folder, entry = manifest.folder / name, theirs.section("steps")[donor.name]
    manifest.forget(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in FOLDERS:
        if (donor / part).is_dir():
            shutil.copytree(donor / part, folder / part, copy_function=_link)
    for file in FILES:
        if (donor / file).is_file():
            shutil.copy2(donor / file, folder / file)
    known = {key: value for key, value in entry.items() if key not in ("key", "inputs", *FOLDERS)}
    manifest.finish(name, inputs, folder / "model", **{**known, **facts, "taken_from": os.path.relpath(donor, folder)})
    manifest.put("evaluations", name, theirs.section("evaluations").get(donor.name))
    return donor


def _find(inputs: Mapping[str, Any], donors: Sequence[Path]) -> tuple[Path, Manifest] | None:
    """A finished step with these inputs whose files are those it wrote."""
    key = key_of(json.loads(json.dumps(inputs, default=str)))
    for run in donors:
        if not (run / NAME).is_file():
            continue
        try:
            manifest = Manifest(run)
        except ValueError:  # damaged: for that run to report
            continue
        for name, entry in manifest.section("steps").items():
            if entry["key"] == key and manifest.why_again(name, inputs, run / name / "model") is None:
                return run / name, manifest
    return None


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target
