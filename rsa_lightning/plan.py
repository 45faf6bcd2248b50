"""The configuration of `rsa align`: its types, and what can be said against it before anything runs."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rsa_lightning.evaluation.generate import Sampling
from rsa_lightning.kinds import SOURCES, TRAINED, check_derived, check_keys, check_labelled, data_names
from rsa_lightning.models import PolicySpec
from rsa_lightning.parsing import plain_message
from rsa_lightning.temperatures import Parametrization

BASE = "base"  # the model before the first step
# keys of a step that the parser of `rsa fit` judges: only their shape is checked here
LOOSE: dict[str, tuple[type, ...]] = {
    "loss": (str, dict),
    "risk": (str, dict),
    "cost_transform": (str, dict),
    "optimizer": (str, dict),
    "schedule": (str, dict),
    "trainer": (dict,),
    "data": (str, list, dict),
    "lora": (dict, bool),
    "models": (dict,),
    "scorer": (str, dict),
    "reference_cache": (str, dict),
}
# what `rsa align --help` says of the keys; each is explained in the classes below
KEYS = """keys of a configuration, each also an option (--lam 4, --steps.safety.loss DPO):
  output, seed, beta, lam, parametrization      the run directory; temperatures of the whole problem
  model.model FOLDER|owner/name, model.config   the base model, or the configuration of a fresh one
  data.helpful, data.safety, data.path, data.demonstrations, data.prompts, data.format
  data.options.KEY                              arguments of PreferenceData, `rsa fit --help` lists them under data
  lora.rank, lora.alpha, ..., handover merge|stack, quantize 4bit|8bit
  steps.NAME.{kind, start, reference, data, loss, risk, temperature, lora, optimizer, schedule, trainer}; null: no step
  steps.NAME.reference_cache FOLDER             the reference on disk in place of a second model; .folder .keep .build
  steps.NAME.{cost_transform, label_scale}      of a step of kind safety: MeanCost, Indicator, Hinge, Exponential
  steps.NAME.{models, adapter, scale, scorer, lam, targets}  of steps that train nothing: kind merge, mix or label
  evaluation.{scorer, prompts, sampling.KEY, pairs, resamples, figures, show_examples}
  trainer.KEY                                   arguments of the Lightning Trainer, for all steps
"""
SHAPES = {"str": "a name", "dict": "a mapping", "list": "a list", "bool": "false"}
# arguments of PreferenceData that a run sets itself, and where to set them instead
OWNED = {
    "path": "data.helpful, data.safety or data.path",
    "tokenizer": "model.tokenizer",
    "seed": "seed",
    "criterion": "data.path: each step then takes its own criterion",
    "evaluation_prompts": "data.prompts: training rows with these prompts are dropped",
}


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
        path: one data set whose rows carry both labels (format pku): helpful and safety pairs are read from it.
        helpful: preference pairs, `chosen` being the more helpful response.
        safety: preference pairs, `chosen` being the safer response.
        prompts: rows {prompt} or {prompt_id, prompt} to evaluate on, which are then kept out of training; by default
            held-out prompts of the pairs.
        format: of the preference data, see rsa_lightning.data.formats.
        options: any other argument of PreferenceData, for all steps (max_length, batch_size, template, defects, ...).
    """

    stories: StoryWorld | None = None
    demonstrations: str | None = None
    path: str | None = None
    helpful: str | None = None
    safety: str | None = None
    prompts: str | None = None
    format: str = "trl"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = [name for name in (*SOURCES, "path", "prompts") if getattr(self, name) is not None]
        pairs = [name for name in files if name in SOURCES[1:]]
        if self.path is not None and pairs:
            raise ValueError(
                f"data: path is for rows with both labels, {' and '.join(pairs)} for rows with one: give either"
            )
        if self.stories is not None and files:
            raise ValueError(
                f"data: give either `stories` or files, got both (stories and {', '.join(files)}). "
                "To align on your own files take configs/hh.yaml or configs/pku.yaml, or set --data.stories null"
            )


@dataclass
class Evaluation:
    """How every step's model is judged.

    Args:
        scorer: dotted name of a function (prompt, answer) -> (reward, cost), or a class with its arguments, for example
            {class_path: rsa_lightning.evaluation.reward_models.RewardModels, init_args: {...}}; null leaves both out.
        prompts: number of held-out prompts where no file of prompts is given.
        sampling: how answers are drawn; prompts are cut as in training, whatever max_prompt_length says here.
        pairs: preference pairs judged per criterion and split; 0 judges none.
        resamples: of the bootstrap over prompts.
        figures: draw them; needs matplotlib.
        show_examples: print a few answers in the report; leave off where answers may be harmful.
    """

    scorer: str | dict[str, Any] | None = None
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

    Three kinds train nothing. merge averages the weights of models, or scales the adapter of a step. mix decodes
    several models as one and has no weights of its own. label writes preference pairs whose targets come from scores
    or from models (MoCAN, PeCAN: arXiv:2405.19544), which a later step names as its data.

    Args:
        kind: warmup, reward or safety; merge, mix or label.
        start: an earlier step, `base`, or a model folder; default: the step before.
        reference: likewise; default: where the step starts. Its weights must equal those of the start, or the stage
            refuses to train: it would first undo the difference. A warm-up has none.
        reference_cache: a folder, or a mapping {folder, keep, build}, arguments of HiddenCache: the reference is
            computed once and kept there, of any number of runs, and no second model is held.
        data: a source (demonstrations, helpful, safety), a list of them, or a mapping {source: ..., and arguments of
            PreferenceData}; default by kind.
        loss, risk: class paths with init_args, as in `rsa fit`.
        temperature: of this step, instead of the one that beta and lam give.
        cost_transform, label_scale: as in `rsa fit`, of a safety step that learns from costs; the temperature is then
            the one above times the label scale.
        lora: settings of this step's adapter over the shared ones; false trains all weights.
        optimizer, schedule: as in `rsa fit`.
        trainer: arguments of the Lightning Trainer, over the shared ones.
        models: of merge and mix: earlier steps, `base` or folders, with weights that sum to one. Of label: with the
            multipliers m_k of w = sum_k m_k log(pi_k / pi_ref), whose reference is `reference`.
        adapter: of merge: a step that trained an adapter. The result is the model it lies on with the adapter times
            `scale`, exactly the weighted average of the models before and after that step.
        scale: see adapter.
        scorer: of label: as evaluation.scorer, which is the default. Scores give w = reward - lam * cost.
        lam: of label: multiplier of the cost; default the run's.
        targets: of label: false keeps the order of the pairs and adds the scorer's rewards and costs only, for a safety
            step with a cost_transform.
    """

    kind: Literal["warmup", "reward", "safety", "merge", "mix", "label"]
    start: str | None = None
    reference: str | None = None
    reference_cache: Any = None
    data: str | list[str] | dict[str, Any] | None = None
    loss: Any = None
    risk: Any = None
    temperature: float | None = None
    cost_transform: Any = None
    label_scale: float | None = None
    lora: Any = None
    optimizer: Any = None
    schedule: Any = None
    trainer: dict[str, Any] = field(default_factory=dict)
    models: Any = None
    adapter: str | None = None
    scale: float | None = None
    scorer: Any = None
    lam: float | None = None
    targets: bool = True

    @property
    def trains(self) -> bool:
        return self.kind in TRAINED

    @property
    def has_model(self) -> bool:
        """Whether it leaves a model folder, which later steps may start from or stay near."""
        return self.trains or self.kind == "merge"


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
        lora: settings of the adapters that the alignment steps train (rank, alpha, target_modules, ...); null or
            false trains all weights. A warm-up trains all weights unless its own `lora` says otherwise.
        handover: what a step that trained an adapter hands to the next: `merge`, the model with the adapter merged in
            float32; `stack`, the model it started from and the adapter, which stays on and is frozen.
        quantize: hold the frozen weights below adapters in 4 or 8 bits (QLoRA); needs bitsandbytes.
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
    lora: dict[str, Any] | None = None
    handover: Literal["merge", "stack"] = "merge"
    quantize: Literal["4bit", "8bit"] | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, StepConfig] = field(default_factory=dict)


def read_config(config: Mapping[str, Any]) -> AlignConfig:
    """Types and checks a merged configuration.

    Raises:
        ValueError: an unknown key, a value of the wrong type, an impossible order of steps; the key is named.
    """
    _check_known(config, AlignConfig)
    loose = ("steps", "trainer", "lora")
    values = {key: value for key, value in config.items() if key not in loose}
    parts = {key: {} if config.get(key) in (None, False) else _mapping(config[key], key) for key in loose}
    parsed = _parse(AlignConfig, values, skip=set(loose), where="")
    parsed.trainer = dict(parts["trainer"])
    parsed.lora = None if config.get("lora") in (None, False) else parts["lora"]
    # null removes a step that a lower layer has
    parsed.steps = {name: _step(name, value) for name, value in parts["steps"].items() if value is not None}
    for i, name in enumerate(parsed.steps):
        _check_name(name, [other.lower() for other in list(parsed.steps)[:i]])
    check_options(parsed.data.options, "data.options")
    if parsed.model.lora or parsed.model.adapters:
        raise ValueError(
            "model.lora and model.adapters belong to rsa fit: here the key lora gives steps their adapters"
        )
    if not parsed.steps:
        raise ValueError("steps: give at least one, for example  steps: {warmup: {kind: warmup}}")
    _check_order(parsed)
    return parsed


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Raises ValueError at an argument of PreferenceData that a run sets itself."""
    for key in OWNED:
        if key in options:
            raise ValueError(f"{where}.{key} is set by the run: use {OWNED[key]}")


def _check_order(config: AlignConfig) -> None:
    """`start`, `reference` and members name an earlier step, the base model, or a folder."""
    earlier: list[str] = []
    for name, step in config.steps.items():
        targets = {"start": step.start, "reference": step.reference}
        targets |= {f"models.{model}": model for model in step.models or ()}
        for key, target in targets.items():
            if target is not None:
                _check_target(config, f"steps.{name}.{key}", target, earlier)
        if step.kind == "warmup":
            for key in ("reference", "reference_cache", "loss", "risk", "temperature"):
                if getattr(step, key) is not None:
                    raise ValueError(f"steps.{name}.{key}: a warm-up has none; remove it")
        for key in ("cost_transform", "label_scale"):
            if step.kind != "safety" and getattr(step, key) is not None:
                raise ValueError(f"steps.{name}.{key}: only a step of kind safety learns from costs; remove it")
        if not step.trains:
            trained = [other for other in earlier if config.steps[other].trains]
            check_derived(f"steps.{name}", step, config.evaluation.scorer, trained)
        check_labelled(name, step, {other: config.steps[other].kind for other in config.steps}, earlier)
        _check_cost_labels(name, step, config)
        earlier.append(name)


def _check_target(config: AlignConfig, where: str, target: str, earlier: list[str]) -> None:
    if target in earlier and not config.steps[target].has_model:
        kind = config.steps[target].kind
        why = {"mix": "exists at decoding only: merge its members instead", "label": "is data: name it under data"}
        raise ValueError(f"{where} is {target!r}, a step of kind {kind}, which has no model folder: it {why[kind]}")
    if target in (*earlier, BASE) or Path(target).is_dir():
        return
    later = "it comes later" if target in config.steps else "it is neither an earlier step nor a folder"
    raise ValueError(
        f"{where} is {target!r}: {later}. Earlier steps: {', '.join(earlier) or 'none'} "
        "(layers keep the order of the first file)"
    )


def _check_cost_labels(name: str, step: StepConfig, config: AlignConfig) -> None:
    """A cost transform makes targets itself: labelled pairs may bring it costs, not targets."""
    if step.cost_transform is None:
        return
    for source in data_names(step):
        made = config.steps.get(source)
        if made is not None and made.kind == "label" and made.targets:
            raise ValueError(
                f"steps.{name}.cost_transform makes targets, and the pairs of {source} have theirs: set "
                f"steps.{source}.targets to false, or remove cost_transform"
            )


def _check_name(name: Any, taken: list[str]) -> None:
    """A step's name is the name of its folder in the run directory, on any file system."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"steps: {name!r} is no name for a step: use letters, digits, _ and -")
    if name.lower() in (BASE, "inputs", *taken):
        raise ValueError(f"steps.{name}: this name is taken; choose another")


def _step(name: str, value: Any) -> StepConfig:
    where = f"steps.{name}"
    values = _mapping(value, where)
    _check_known(values, StepConfig, f"{where}.")
    check_keys(where, values)
    for key, kinds in LOOSE.items():
        if values.get(key) is not None and (not isinstance(values[key], kinds) or values[key] is True):
            wanted = " or ".join(SHAPES[kind.__name__] for kind in kinds)
            raise ValueError(f"{where}.{key} must be {wanted}, got {values[key]!r}")
    loose = {key: values[key] for key in LOOSE if values.get(key) is not None}
    if "models" in loose:  # null removes a member of a lower layer
        loose["models"] = {model: weight for model, weight in loose["models"].items() if weight is not None}
    typed = {key: item for key, item in values.items() if key not in LOOSE}
    return dataclasses.replace(_parse(StepConfig, typed, skip=set(loose), where=where), **loose)


def _check_known(values: Mapping[str, Any], kind: type, where: str = "") -> None:
    """Raises ValueError at a key that is no field of the dataclass; the nearest field is named where one is near."""
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f". Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}{key}: unknown key; known are {', '.join(known)}{hint}")


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
