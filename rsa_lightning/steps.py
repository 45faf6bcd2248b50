"""What a step of `rsa align` learns from, and its `rsa fit` configuration."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsa_lightning.config import merge
from rsa_lightning.kinds import LABELLED_ALONE, SOURCES, data_names
from rsa_lightning.plan import AlignConfig, AlignData, StepConfig, check_options

STAGES = {
    "warmup": "rsa_lightning.supervised.SupervisedWarmup",
    "reward": "rsa_lightning.stages.RewardAlignment",
    "safety": "rsa_lightning.stages.SafetyAlignment",
}
DEFAULT_SOURCES = {"warmup": ("demonstrations",), "reward": ("helpful",), "safety": ("safety",)}
PAIRS, VALIDATION = "pairs.jsonl", "validation.jsonl"  # in the folder of a step of kind label
CRITERIA = {"helpful": "helpful", "safety": "safe"}  # source -> criterion, where one data set carries both labels


def sources_of(
    step: StepConfig, data: AlignData, labels: Collection[str] = ()
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The sources a step learns from, and its own arguments of PreferenceData. A merge or a mixture has none.

    Args:
        labels: the names of steps that make data.

    Raises:
        ValueError: a source that is not given.
    """
    if step.kind in ("merge", "mix"):
        return (), {}
    given = given_sources(data)
    options = dict(step.data) if isinstance(step.data, dict) else {}
    wanted: Any = options.pop("source", None) if isinstance(step.data, dict) else step.data
    if wanted is None:
        wanted = DEFAULT_SOURCES[step.kind]
        if step.kind == "warmup" and "demonstrations" not in given:
            # the chosen responses of all pairs; one data set for both criteria is read once
            wanted = ("helpful",) if data.path is not None else given
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    check_options(options, "data")
    if names and set(names) <= set(labels):
        return names, options
    if "demonstrations" in names and len(names) > 1:
        raise ValueError("data: demonstrations have another format than pairs: give them a step of their own")
    if data.path is not None and len(names) > 1:
        raise ValueError("data: both criteria are in one data set, data.path: name one of them, helpful or safety")
    for name in names or SOURCES[1:]:
        if name not in SOURCES:
            raise ValueError(f"data: there is no source {name!r}; the sources are {', '.join((*SOURCES, *labels))}")
        if name not in given:
            also = f", or --data.path FILE for rows with both labels (format {data.format})" if name in CRITERIA else ""
            raise ValueError(f"data.{name} is not given: pass --data.{name} FILE{also}")
    return names, options


def given_sources(data: AlignData) -> list[str]:
    """The sources that the configuration provides for."""
    if data.stories is not None:
        return list(SOURCES)
    both = tuple(CRITERIA) if data.path is not None else ()
    return [name for name in SOURCES if name in both or getattr(data, name) is not None]


def label_steps(config: AlignConfig) -> list[str]:
    """The names of the steps whose pairs others learn from."""
    return [name for name, step in config.steps.items() if step.kind == "label"]


def is_late(step: StepConfig, config: AlignConfig) -> bool:
    """Whether a step reads what an earlier one writes; those are pairs that were read early, with other targets."""
    return not set(label_steps(config)).isdisjoint(data_names(step))


def early_steps(config: AlignConfig) -> dict[str, StepConfig]:
    """The steps that read data which is there before anything is trained."""
    reading = {name: step for name, step in config.steps.items() if step.trains or step.kind == "label"}
    return {name: step for name, step in reading.items() if not is_late(step, config)}


def check_late(name: str, stage: Any, data: Mapping[str, Any]) -> None:
    """What can be said early about a step whose data an earlier one makes: its stage, its arguments of PreferenceData.

    Raises:
        ValueError: the stage rates single responses, or its cost transform needs to know whether 0 means safe.
    """
    if not stage.needs_pairs:
        raise ValueError(f"steps.{name}: labels are of pairs, and {stage.loss!r} rates single responses")
    labels = getattr(stage, "labels", None)
    if labels is not None and labels.transform.needs_anchor and not data.get("anchored_costs"):
        raise ValueError(
            f"steps.{name}: {labels.transform} needs costs of which 0 means safe: if that is so of the scorer's, set "
            "data: {source: ..., anchored_costs: true}, else take MeanCost"
        )


def labelled_data(step: StepConfig, config: AlignConfig) -> dict[str, Any]:
    """Arguments of PreferenceData about pairs that steps of the run have labelled; they are split as their sources.

    Raises:
        ValueError: several steps, and a validation file: each has its own.
    """
    names, options = sources_of(step, config.data, label_steps(config))
    shared = {key: value for key, value in config.data.options.items() if key not in LABELLED_ALONE}
    if config.data.options.get("validation_path") is not None:
        if len(names) > 1:
            raise ValueError(f"data: {', '.join(names)} have a validation file each, and a step reads one: name one")
        shared["validation_path"] = str(Path(config.output) / names[0] / VALIDATION)
    if "template" in options:
        raise ValueError("data.template: labelled pairs are rendered as their source: set it in the step that labels")
    paths = [str(Path(config.output) / name / PAIRS) for name in names]
    return {
        "path": paths[0] if len(paths) == 1 else paths,
        "format": "trl",
        **shared,
        **_inherited(names, config),
        **options,
    }


def _inherited(names: Sequence[str], config: AlignConfig) -> dict[str, Any]:
    """What the steps that label say of their data: the labels are of the tokens that these make."""
    found: dict[str, Any] = {}
    for name in names:
        sources, options = sources_of(config.steps[name], config.data)
        if len(sources) > 1:  # two criteria may judge one pair, alike or not
            found["defects"] = {"duplicate": "keep", "contradictory": "keep", **(options.get("defects") or {})}
        found |= {key: value for key, value in options.items() if key not in (*LABELLED_ALONE, "defects")}
    return found


def adapter_of(step: StepConfig, config: AlignConfig) -> dict[str, Any] | None:
    """The LoRA settings of a step; None where it trains all weights."""
    if not step.trains:
        return None
    shared = None if step.kind == "warmup" else config.lora
    if step.lora is False or (step.lora is None and shared is None):
        return None
    return merge(shared or {}, step.lora or {})


def check_adapters(config: AlignConfig) -> None:
    """Raises ValueError at settings of adapters where no step trains one: they would do nothing."""
    if any(adapter_of(step, config) is not None for step in config.steps.values()):
        return
    for key, value, default in (("quantize", config.quantize, None), ("handover", config.handover, "merge")):
        if value != default:
            raise ValueError(
                f"{key}: {value} is about adapters, and no step trains one: set lora (--lora.rank 16), or drop {key}"
            )


def fit_config(
    step: StepConfig,
    config: AlignConfig,
    *,
    policy: Mapping[str, Any],
    reference: Mapping[str, Any],
    data: Mapping[str, Any],
    folder: Path,
    progress_bar: bool,
) -> dict[str, Any]:
    """The `rsa fit` configuration of a step whose model ends in `folder`/model."""
    arguments: dict[str, Any] = {"policy": dict(policy), "optimizer": step.optimizer, "schedule": step.schedule}
    if step.kind != "warmup":
        arguments |= {
            "reference": dict(reference),
            "loss": step.loss,
            "risk": step.risk,
            "cost_transform": step.cost_transform,
            "label_scale": step.label_scale,
        }
        if step.temperature is None:
            arguments |= {"beta": config.beta, "lam": config.lam, "parametrization": config.parametrization}
        else:
            arguments["loss"] = _at_temperature(step)
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return {
        "seed_everything": config.seed,
        "model": {"class_path": STAGES[step.kind], "init_args": arguments},
        "data": dict(data),
        "trainer": _trainer(merge(config.trainer, step.trainer), folder, progress_bar),
    }


def _at_temperature(step: StepConfig) -> dict[str, Any]:
    """The loss with this step's own temperature."""
    loss: dict[str, Any] = {"class_path": step.loss} if isinstance(step.loss, str) else dict(step.loss or {})
    given = (loss.get("init_args") or {}).get("beta")
    if given is not None:
        raise ValueError(
            f"the temperature is given twice: temperature={step.temperature} and loss.beta={given}. Keep one"
        )
    loss.setdefault("class_path", "RSA")
    return merge(loss, {"init_args": {"beta": step.temperature}})


def _trainer(given: Mapping[str, Any], folder: Path, progress_bar: bool) -> dict[str, Any]:
    """The Trainer's arguments: those given, and what a run directory needs."""
    csv = {"save_dir": str(folder.parent), "name": folder.name, "version": "", "flush_logs_every_n_steps": 10}
    checkpoints = {"dirpath": str(folder / "checkpoints"), "filename": "{epoch}-{step}", "save_weights_only": False}
    ours = [
        {"class_path": "rsa_lightning.callbacks.ModelExport", "init_args": {"folder": str(folder / "model")}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor", "init_args": {"logging_interval": "step"}},
    ]
    if progress_bar:
        ours.append({"class_path": "lightning.pytorch.callbacks.RichProgressBar", "init_args": {"leave": False}})
    trainer = {
        "max_epochs": 1,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": progress_bar,
        # where Lightning looks for a checkpoint of a requeued job: that of another step must not be found
        "default_root_dir": str(folder),
        **given,
    }
    trainer["logger"] = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv},
        *_as_list(given.get("logger")),
    ]
    trainer["callbacks"] = [*_as_list(given.get("callbacks")), *ours]
    return trainer


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
