"""`rsa export`: a finished step of a run, or a checkpoint of training, as a folder that transformers or peft loads.

Checkpoints are read here by name, shards by torch's own reader: Lightning's tool does not know sharded ones.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rsa_lightning.adapters import CONFIG
from rsa_lightning.callbacks import base_of
from rsa_lightning.card import checkpoint_card, is_ours, short, step_card
from rsa_lightning.checkpoint import check_replaceable, folder_hashes, replaced_whole, write_text
from rsa_lightning.config import load_file, load_layers, overrides
from rsa_lightning.data.datamodule import tokenizer_of
from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.fit import FitCLI
from rsa_lightning.hub import is_hub_name
from rsa_lightning.manifest import Manifest, recorded, run_around
from rsa_lightning.models import load_policy
from rsa_lightning.parallel import shards
from rsa_lightning.policy_stage import TRAINED_AS, PolicyStage
from rsa_lightning.saving import save_adapter, save_policy

log = logging.getLogger(__name__)

CARD = "README.md"
PLACES = ("starts from", "frozen adapters below")  # of what a checkpoint says: where it lay when it was trained
# a policy is read in this process, wherever it was trained
HERE = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "logger": False, "enable_checkpointing": False}

# ------------------------------------------------------------------ a step of a run


def export_step(run: Path, name: str, output: Path, *, adapter: bool = False) -> None:
    """Copies the model (or the adapter) of a finished step of `rsa align`, with a card of what the run recorded.

    Raises:
        ValueError: no run, no such step, one that has not finished or has no model, files that are not those the step
            wrote, or an output that is something else.
    """
    if not run.is_dir():
        raise ValueError(f"--run: there is no folder {run}")
    manifest = recorded(run)
    entry, product = _finished(manifest, name), "adapter" if adapter else "model"
    source = run / name / product
    if not entry.get(product):
        why = "trained no adapter: drop --adapter" if adapter else f"is of kind {entry['kind']}, which makes no model"
        raise ValueError(f"--step {name}: the step {why}")
    if not source.is_dir():
        raise ValueError(f"--step {name}: the {product} that the step wrote is gone from {source}: run rsa align again")
    if folder_hashes(source) != entry[product]:
        raise ValueError(f"--step {name}: the files in {source} are not those that the step wrote: run rsa align again")
    _check_output(output, adapter, source)
    text = step_card(
        name,
        manifest.entries,
        _results(run),
        adapter=adapter,
        base=_hub_base(manifest),
        datasets=_hub_data(manifest),
        below=_json(source / CONFIG).get("base_model_name_or_path") if adapter else None,
        settings=_settings(run, manifest),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(output) as partial:
        shutil.copytree(source, partial)
        if adapter and (run / name / "model").is_dir():
            load_tokenizer(run / name / "model").save_pretrained(partial)
        write_text(partial / CARD, text)
    log.info("%s: the %s of the step %s", output, product, name)


def _finished(manifest: Manifest, name: str) -> dict[str, Any]:
    """What the manifest holds of a step. Raises ValueError where that is nothing."""
    steps = manifest.section("steps")
    if name in steps:
        return dict(steps[name])
    asked = (manifest.section("config").get("steps") or {}).get(name)
    known = f"finished are: {', '.join(steps) or 'none'}"
    if asked is not None:
        raise ValueError(f"--step {name} has not finished: the same rsa align goes on where it stopped ({known})")
    raise ValueError(f"--step {name}: the run {manifest.folder} has no such step; {known}")


def _results(run: Path) -> dict[str, Any] | None:
    path = run / "results.json"
    return _json(path) if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run rsa align again, which writes it anew") from error


def _settings(run: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Step -> its config.yaml."""
    paths = {name: run / name / "config.yaml" for name in manifest.section("steps")}
    return {name: load_file(path) for name, path in paths.items() if path.is_file()}


def _hub_base(manifest: Manifest) -> str | None:
    name = manifest.section("config").get("model", {}).get("model")
    return name if name and is_hub_name(name) else None


def _hub_data(manifest: Manifest) -> list[str]:
    paths = {entry.get("path") for entry in manifest.section("data").values() if isinstance(entry, Mapping)}
    return sorted(path for path in paths if isinstance(path, str) and is_hub_name(path))


# ------------------------------------------------------------------ a checkpoint


def export_checkpoint(checkpoint: Path, config: Mapping[str, Any], output: Path, *, adapter: bool = False) -> None:
    """Writes the policy of a checkpoint, with its tokenizer and a card; its adapter is merged in, or stands alone.

    Args:
        checkpoint: a folder of shards, of any number of processes, or one file.
        config: of the training that it is of: model and data; where it was trained does not matter. The data has to be
            there: a tokenizer may have been trained on it, and its prompts decide which template the tokenizer keeps.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a checkpoint of another configuration, or damaged; data that cannot be read; an adapter where none
            was trained; an output that is something else.
    """
    _check_output(output, adapter, checkpoint)
    rest = shards.read_rest(checkpoint)
    _check_config(config)
    wanted = {key: config[key] for key in ("seed_everything", "model", "data") if key in config}
    built = FitCLI({**wanted, "trainer": HERE})
    stage, data = built.model, built.datamodule
    if adapter and stage.policy_spec.lora is None:
        raise ValueError("--adapter: this configuration trains all weights (no policy.lora): drop it")
    try:
        data.prepare(tokenizer_of(stage))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error}. rsa export reads the data that the checkpoint was trained on, for its tokenizer and template: "
            "if it lies elsewhere now, give --data.path (and --data.validation_path, --data.evaluation_prompts)"
        ) from error
    stage.read_data(data)
    fill_policy(stage, checkpoint, rest, data.tokenizer)
    policy, spec = stage.policy, stage.policy_spec
    started = (rest.get(TRAINED_AS) or {}).get("starts from")
    base = spec.model if spec.model and spec.model == started and is_hub_name(spec.model) else None
    text = checkpoint_card(_facts(rest, wanted), adapter=adapter, base=base)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(output) as partial:
        if adapter:
            save_adapter(policy, partial, base_of(spec))
            data.tokenizer.save_pretrained(partial)
        else:
            save_policy(policy, data.tokenizer, partial)
        write_text(partial / CARD, text)
    log.info("%s: step %d of %s", output, rest["global_step"], checkpoint)


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError where a configuration is of no single stage."""
    if "steps" in config:
        raise ValueError("-c is a file of rsa align: give the config.yaml of the step, RUN/STEP/config.yaml")
    if not isinstance(model := config.get("model"), Mapping) or "class_path" not in model:
        raise ValueError("-c names no stage (model.class_path): give the config.yaml beside the logs of the training")


def fill_policy(stage: PolicyStage, checkpoint: Path, rest: Mapping[str, Any], tokenizer: Any) -> None:
    """Gives a stage the policy of a checkpoint, on the CPU, in the precision that its weights were kept in.

    Args:
        rest: `shards.read_rest` of it.

    Raises:
        ValueError: as `shards.check_fit`, other training, or what the stage itself has against the checkpoint.
    """
    _check_training(stage, checkpoint, rest)
    stage.policy = load_policy(stage.policy_spec, tokenizer)
    found, trained = shards.stored_weights(checkpoint, rest), stage.policy_spec.lora is not None
    if not trained:
        for name, parameter in stage.named_parameters():
            if name in found:
                parameter.data = parameter.data.to(found[name].dtype)
    state: dict[str, Tensor] = {
        name: value for name, value in stage.state_dict(keep_vars=True).items() if value.requires_grad or not trained
    }
    shards.check_fit(checkpoint, found, state)
    stage.on_load_checkpoint(dict(rest))
    state = {name: value.detach() for name, value in state.items()}
    if shards.is_sharded(checkpoint):
        shards.read_into(checkpoint, {shards.WEIGHTS: state})
    else:
        for name, value in state.items():
            value.copy_(rest[shards.WEIGHTS][name])


def _check_training(stage: PolicyStage, checkpoint: Path, rest: Mapping[str, Any]) -> None:
    """Raises ValueError where a checkpoint is of another stage, loss, risk, temperature or adapter.

    Where its start lies may differ: it was trained elsewhere, perhaps.
    """
    then, now = rest.get(TRAINED_AS), stage.trained_as()
    if then is None:
        log.warning("%s does not say how it was trained (an earlier version wrote it), nor will the card", checkpoint)
        return
    keys = [key for key in (*then, *(key for key in now if key not in then)) if key not in PLACES]
    other = [f"{key} {then.get(key)}, here {now.get(key)}" for key in keys if then.get(key) != now.get(key)]
    if other:
        raise ValueError(
            f"the checkpoint {checkpoint} is of another configuration ({'; '.join(other)}): give -c the config.yaml it "
            "was trained with"
        )


def _facts(rest: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself; the seed is that of the configuration."""
    then, data = rest.get(TRAINED_AS) or {}, rest.get("PreferenceData") or {}
    lora = then.get("lora")
    trained = "all weights" if lora is None else f"LoRA of rank {lora['rank']}"
    return {
        "stage": then.get("stage"),
        "starts from": then.get("starts from"),
        "frozen adapters below": ", ".join(map(short, then["frozen adapters below"])) or "none" if then else None,
        "trained": trained if then else None,
        **{key: then.get(key) for key in ("loss", "risk", "temperature")},
        "optimizer steps": rest["global_step"],
        "epochs before this one": rest.get("epoch"),
        "seed": config.get("seed_everything"),
        "training pairs": data.get("training pairs"),
        "pairs per batch over all processes": data.get("pairs per batch over all processes"),
        "SHA-256 of the data": ", ".join(data.get("sha256", ())) or None,
        "lightning": rest.get("pytorch-lightning_version"),
        "processes": None,
    }


def _check_output(output: Path, adapter: bool, source: Path) -> None:
    """Raises ValueError where writing to `output` would destroy anything but an earlier export."""
    place, origin = output.resolve(), source.resolve()
    if place == origin or place in origin.parents or origin in place.parents:
        raise ValueError(f"--output {output} is {source}, or in it, or around it: choose another")
    if (around := run_around(place)) is not None:
        raise ValueError(f"--output {output} lies in the run {around}, whose files are its own: choose another")
    check_replaceable(output, *((CONFIG, "adapter") if adapter else ()))
    if not output.exists() or not any(output.iterdir()):
        return
    card = output / CARD
    if not card.is_file() or not is_ours(card.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            f"--output {output} holds a model that rsa export did not write (no {CARD} of ours in it): choose another"
        )


# ------------------------------------------------------------------ the command


def main(arguments: list[str]) -> None:
    """`rsa export`. Raises ValueError where options are missing or do not go together."""
    parser = argparse.ArgumentParser(
        prog="rsa export",
        usage="rsa export --run RUN --step NAME --output DIR [--adapter]\n"
        "       rsa export --checkpoint CKPT -c FILE [-c LAYER ...] --output DIR [--adapter] [--KEY.SUBKEY VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run directory of rsa align")
    parser.add_argument("--step", metavar="NAME", help="one of its finished steps")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="a folder of shards, or a file")
    parser.add_argument("-c", "--config", action="append", metavar="FILE", help="the config.yaml it was trained with")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, in peft's format; else merged")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    given, rest = parser.parse_known_args(arguments)
    if (given.run is None) == (given.checkpoint is None):
        raise ValueError("rsa export takes a step of a --run, or a --checkpoint: give one of the two")
    if given.run is not None:
        if given.step is None:
            known = ", ".join(recorded(given.run).section("steps")) if given.run.is_dir() else ""
            raise ValueError(f"--run needs --step NAME; finished steps of {given.run}: {known or 'none'}")
        if given.config or rest:
            raise ValueError(f"--run takes no configuration, and no other keys: drop {given.config or rest}")
        export_step(given.run, given.step, given.output, adapter=given.adapter)
        return
    if not given.config or given.step is not None:
        raise ValueError("--checkpoint needs -c FILE, the config.yaml beside the logs of its run, and takes no --step")
    export_checkpoint(given.checkpoint, load_layers(given.config, overrides(rest)), given.output, adapter=given.adapter)
