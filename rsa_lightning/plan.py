"""The configuration of `rsa align`, checked, and the `rsa fit` configuration of each of its steps."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rsa_lightning.config import merge
from rsa_lightning.evaluation.generate import Sampling
from rsa_lightning.models import PolicySpec
from rsa_lightning.parsing import plain_message
from rsa_lightning.temperatures import Parametrization

BASE = "base"  # the model before the first step
STAGES = {
    "warmup": "rsa_lightning.supervised.SupervisedWarmup",
    "reward": "rsa_lightning.stages.RewardAlignment",
    "safety": "rsa_lightning.stages.SafetyAlignment",
}
SOURCES = ("demonstrations", "helpful", "safety")
# keys of a step that the parser of `rsa fit` judges: only their shape is checked here
LOOSE: dict[str, tuple[type, ...]] = {
    "loss": (str, dict),
    "risk": (str, dict),
    "optimizer": (str, dict),
    "schedule": (str, dict),
    "trainer": (dict,),
    "data": (str, list, dict),
}
SHAPES = {"str": "a name", "dict": "a mapping", "list": "a list"}
OWNED = ("path", "tokenizer", "seed")  # arguments of PreferenceData that a run sets itself
DEFAULT_SOURCES = {"warmup": ("demonstrations",), "reward": ("helpful",), "safety": ("safety",)}


@dataclass
class StoryWorld:
    """Sizes of the generated world of the quickstart.

    Args:
        demonstrations: answers for the warm-up.
        pairs: preference pairs for each criterion.
    """

    demonstrations: int = 3000
    pairs: int = 2000


@dataclass
class AlignData:
    """What the steps learn from: files, or the generated story world.

    Args:
        stories: generate everything; then no files are given.
        demonstrations: rows {prompt, completion} for the warm-up; without them it takes all chosen responses.
        helpful: preference pairs, `chosen` being the more helpful response.
        safety: preference pairs, `chosen` being the safer response.
        prompts: rows {prompt_id, prompt} to evaluate on; by default held-out prompts of the pairs.
        format: of the preference files, see rsa_lightning.data.formats.
        options: any other argument of PreferenceData, for all steps (max_length, batch_size, validation_fraction, ...).
    """

    stories: StoryWorld | None = None
    demonstrations: str | None = None
    helpful: str | None = None
    safety: str | None = None
    prompts: str | None = None
    format: str = "trl"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = [name for name in (*SOURCES, "prompts") if getattr(self, name) is not None]
        if self.stories is not None and files:
            raise ValueError(
                f"data: give either `stories` or files, got both (stories and {', '.join(files)}). "
                "To align on your own files take configs/hh.yaml, or set --data.stories null"
            )


@dataclass
class Evaluation:
    """How every step's model is judged.

    Args:
        scorer: dotted name of a function (prompt, answer) -> (reward, cost); null leaves both out.
        prompts: number of held-out prompts where no file of prompts is given.
        sampling: how answers are drawn; prompts are cut as in training, whatever max_prompt_length says here.
        pairs: preference pairs judged per criterion and split; 0 judges none.
        resamples: of the bootstrap over prompts.
        figures: draw them; needs matplotlib.
        show_examples: print a few answers in the report; leave off where answers may be harmful.
    """

    scorer: str | None = None
    prompts: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    pairs: int = 512
    resamples: int = 1000
    figures: bool = True
    show_examples: bool = False

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("pairs", 0), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass
class StepConfig:
    """One step: a stage of some kind, where it starts, what it stays near, what it learns from.

    Args:
        kind: warmup, reward or safety.
        start: an earlier step, `base`, or a model folder; default: the step before.
        reference: likewise; default: where the step starts. Its weights must equal those of the start, or the stage
            refuses to train: it would first undo the difference. A warm-up has none.
        data: a source (demonstrations, helpful, safety), a list of them, or a mapping {source: ..., and arguments of
            PreferenceData}; default by kind.
        loss, risk: class paths with init_args, as in `rsa fit`.
        temperature: of this step, instead of the one that beta and lam give.
        optimizer, schedule: as in `rsa fit`.
        trainer: arguments of the Lightning Trainer, over the shared ones.
    """

    kind: Literal["warmup", "reward", "safety"]
    start: str | None = None
    reference: str | None = None
    data: str | list[str] | dict[str, Any] | None = None
    loss: Any = None
    risk: Any = None
    temperature: float | None = None
    optimizer: Any = None
    schedule: Any = None
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class AlignConfig:
    """A whole run: `steps` in order, name -> step.

    Args:
        model: the base model.
        data: what the steps learn from.
        output: the run directory.
        seed: of data order, splits, fresh weights and sampling.
        beta: temperature of the whole problem; steps derive theirs from it.
        lam: multiplier of the cost.
        parametrization: how step temperatures follow from beta and lam.
        evaluation: how the models are judged.
        trainer: arguments of the Lightning Trainer, for all steps.
        steps: name -> step.
    """

    model: PolicySpec
    data: AlignData = field(default_factory=AlignData)
    output: str = "runs/align"
    seed: int = 0
    beta: float | None = None
    lam: float | None = None
    parametrization: Parametrization = "total"
    evaluation: Evaluation = field(default_factory=Evaluation)
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, StepConfig] = field(default_factory=dict)


def read_config(config: Mapping[str, Any]) -> AlignConfig:
    """Types and checks a merged configuration.

    Raises:
        ValueError: an unknown key, a value of the wrong type, an impossible order of steps; the key is named.
    """
    loose = {"steps": dict, "trainer": dict}
    values = {key: value for key, value in config.items() if key not in loose}
    parts = {key: _mapping(config.get(key) or {}, key) for key in loose}
    parsed = _parse(AlignConfig, values, skip=set(loose), where="")
    parsed.trainer = dict(parts["trainer"])
    # null removes a step that a lower layer has
    parsed.steps = {name: _step(name, value) for name, value in parts["steps"].items() if value is not None}
    for i, name in enumerate(parsed.steps):
        _check_name(name, [other.lower() for other in list(parsed.steps)[:i]])
    _check_options(parsed.data.options, "data.options")
    if not parsed.steps:
        raise ValueError("steps: give at least one, for example  steps: {warmup: {kind: warmup}}")
    _check_order(parsed)
    return parsed


def sources_of(step: StepConfig, data: AlignData) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The sources a step learns from, and its own arguments of PreferenceData.

    Raises:
        ValueError: a source that is not given.
    """
    given = [name for name in SOURCES if data.stories is not None or getattr(data, name) is not None]
    options = dict(step.data) if isinstance(step.data, dict) else {}
    wanted: Any = options.pop("source", None) if isinstance(step.data, dict) else step.data
    if wanted is None:
        wanted = DEFAULT_SOURCES[step.kind]
        if step.kind == "warmup" and "demonstrations" not in given:
            wanted = given  # the chosen responses of all pairs
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    _check_options(options, "data")
    if "demonstrations" in names and len(names) > 1:
        raise ValueError("data: demonstrations have another format than pairs: give them a step of their own")
    for name in names or SOURCES[1:]:
        if name not in SOURCES:
            raise ValueError(f"data: there is no source {name!r}; the sources are {', '.join(SOURCES)}")
        if name not in given:
            raise ValueError(f"data.{name} is not given: pass --data.{name} FILE")
    return names, options


def fit_config(
    step: StepConfig,
    config: AlignConfig,
    *,
    policy: Mapping[str, Any],
    reference: str,
    data: Mapping[str, Any],
    folder: Path,
    progress_bar: bool,
) -> dict[str, Any]:
    """The `rsa fit` configuration of a step whose model ends in `folder`/model."""
    arguments: dict[str, Any] = {"policy": dict(policy), "optimizer": step.optimizer, "schedule": step.schedule}
    if step.kind != "warmup":
        arguments |= {
            "reference": {"class_path": "rsa_lightning.reference.FrozenCopy", "init_args": {"model": reference}},
            "loss": step.loss,
            "risk": step.risk,
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


def _check_options(options: Mapping[str, Any], where: str) -> None:
    for key in OWNED:
        if key in options:
            place = {"path": "data.helpful, data.safety", "tokenizer": "model.tokenizer", "seed": "seed"}[key]
            raise ValueError(f"{where}.{key} is set by the run: use {place}")


def _check_order(config: AlignConfig) -> None:
    """`start` and `reference` name an earlier step, the base model, or a folder."""
    earlier: list[str] = []
    for name, step in config.steps.items():
        for key in ("start", "reference"):
            target = getattr(step, key)
            if target is None or target in (*earlier, BASE) or Path(target).is_dir():
                continue
            later = "it comes later" if target in config.steps else "it is neither an earlier step nor a folder"
            raise ValueError(
                f"steps.{name}.{key} is {target!r}: {later}. Earlier steps: {', '.join(earlier) or 'none'} "
                "(layers keep the order of the first file)"
            )
        if step.kind == "warmup":
            for key in ("reference", "loss", "risk", "temperature"):
                if getattr(step, key) is not None:
                    raise ValueError(f"steps.{name}.{key}: a warm-up has none; remove it")
        earlier.append(name)


def _check_name(name: Any, taken: list[str]) -> None:
    """A step's name is the name of its folder in the run directory, on any file system."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"steps: {name!r} is no name for a step: use letters, digits, _ and -")
    if name.lower() in (BASE, "inputs", *taken):
        raise ValueError(f"steps.{name}: this name is taken; choose another")


def _step(name: str, value: Any) -> StepConfig:
    where = f"steps.{name}"
    values = _mapping(value, where)
    known = [f.name for f in dataclasses.fields(StepConfig)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}.{key}: unknown key; known are {', '.join(known)}")
    for key, kinds in LOOSE.items():
        if values.get(key) is not None and not isinstance(values[key], kinds):
            wanted = " or ".join(SHAPES[kind.__name__] for kind in kinds)
            raise ValueError(f"{where}.{key} must be {wanted}, got {values[key]!r}")
    loose = {key: values[key] for key in LOOSE if values.get(key) is not None}
    typed = {key: item for key, item in values.items() if key not in LOOSE}
    return dataclasses.replace(_parse(StepConfig, typed, skip=set(loose), where=where), **loose)


def _parse(kind: type, values: Mapping[str, Any], skip: set[str], where: str) -> Any:
    """An instance of a dataclass from plain values, by jsonargparse."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False, skip=skip)
    try:
        found = parser.instantiate(parser.parse_object(dict(values)))
    except ArgumentError as error:
        raise ValueError(f"{where + ': ' if where else ''}{plain_message(error)}") from error
    return kind(**vars(found))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    return dict(value)
