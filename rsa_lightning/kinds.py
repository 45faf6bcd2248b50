"""The kinds of steps of `rsa align`, the keys each takes, and what is said against one that trains nothing."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from rsa_lightning.weights import check_weights

SOURCES = ("demonstrations", "helpful", "safety")
TRAINED = ("warmup", "reward", "safety")
# kinds of steps that train nothing, and the keys that each takes
DERIVED = {
    "merge": ("models", "adapter", "scale"),
    "mix": ("models",),
    "label": ("data", "scorer", "lam", "models", "reference", "targets"),
}
# arguments of PreferenceData about where and how data stand, which pairs that a step has labelled do not need
LABELLED_ALONE = (
    *("format", "criterion", "relabel", "revision", "split", "streaming", "limit"),
    *("validation_path", "validation_split"),
)


def check_keys(where: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError at a key that steps of this kind do not have."""
    kind = values.get("kind")
    given = [key for key, value in values.items() if value not in (None, {}) and key != "kind"]
    own = {key for keys in DERIVED.values() for key in keys} - {"data", "reference"}
    for key in given:
        if kind in DERIVED and key not in DERIVED[kind]:
            raise ValueError(f"{where}.{key}: a step of kind {kind} has none; its keys are {', '.join(DERIVED[kind])}")
        if kind in TRAINED and key in own:
            owners = " and ".join(name for name, keys in DERIVED.items() if key in keys)
            raise ValueError(f"{where}.{key} belongs to steps of kind {owners}: remove it, or change kind")


def check_derived(where: str, step: Any, scorer: Any, trained: Collection[str]) -> None:
    """Raises ValueError where a step that trains nothing lacks what its kind needs, or has too much.

    Args:
        where: steps.NAME, for messages.
        step: its StepConfig.
        scorer: evaluation.scorer.
        trained: the names of earlier steps that train.
    """
    if step.kind == "label":
        _check_label(where, step, scorer)
    elif (step.models is None) == (step.adapter is None):
        either = " or adapter: NAME with scale" if step.kind == "merge" else ""
        raise ValueError(f"{where}: a {step.kind} needs models: {{NAME: WEIGHT, ...}}{either}, and one of them")
    elif step.models is not None:
        check_weights(step.models, f"{where}.models")
        if step.scale is not None:
            raise ValueError(f"{where}.scale belongs to adapter: the models have their weights")
    elif step.scale is None or not math.isfinite(step.scale):
        raise ValueError(f"{where}.scale must be a finite number, got {step.scale}: 0 is no adapter, 1 all of it")
    elif step.adapter not in trained:
        raise ValueError(
            f"{where}.adapter is {step.adapter!r}: name an earlier step that trains an adapter (for one in a folder "
            "there is rsa merge --adapter)"
        )


def _check_label(where: str, step: Any, scorer: Any) -> None:
    if where.removeprefix("steps.") in SOURCES:
        raise ValueError(f"{where}: a step of kind label is a source of data, and there is one of this name: rename it")
    if not data_names(step):
        raise ValueError(f"{where}.data: name the pairs to label, {' or '.join(SOURCES[1:])}")
    if SOURCES[0] in data_names(step):
        raise ValueError(f"{where}.data: {SOURCES[0]} are no pairs: name {' or '.join(SOURCES[1:])}")
    if step.lam is not None and not (step.lam >= 0 and math.isfinite(step.lam)):
        raise ValueError(f"{where}.lam multiplies the cost and must be at least 0, got {step.lam}")
    if not step.targets and (step.models is not None or step.lam is not None):
        raise ValueError(f"{where}.targets false adds a scorer's rewards and costs: remove models and lam")
    if step.models is None:
        if step.reference is not None:
            raise ValueError(f"{where}.reference belongs to models, and this step labels by a scorer: remove it")
        if step.scorer is None and scorer is None:
            raise ValueError(f"{where}: give scorer (or evaluation.scorer), or models with a reference")
        return
    for key in ("scorer", "lam"):
        if getattr(step, key) is not None:
            raise ValueError(f"{where}.{key} is for labels by scores, and models are given: keep one of the two")
    if step.reference is None:
        raise ValueError(f"{where}.reference: log-ratios of models need one, for example the warm-up")
    if not step.models:
        raise ValueError(f"{where}.models is empty: name a model with its multiplier, for example {{helpful: 1.0}}")
    for model, factor in step.models.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
            raise ValueError(f"{where}.models.{model} must be a finite number, got {factor!r}")


def check_labelled(name: str, step: Any, kinds: Mapping[str, str], earlier: Collection[str]) -> None:
    """Data that a step of kind label makes are made by an earlier one, and read by steps that compare two responses.

    Args:
        kinds: step -> kind, of all steps.

    Raises:
        ValueError: they are not.
    """
    labels = [source for source in data_names(step) if source in kinds and source not in SOURCES]
    for source in labels:
        where = f"steps.{name}.data is {source!r}"
        if kinds[source] != "label":
            raise ValueError(f"{where}, a step of kind {kinds[source]}: only a step of kind label is data")
        if source not in earlier:
            raise ValueError(f"{where}: it comes later (layers keep the order of the first file)")
        if step.kind in ("warmup", "label"):
            wrong = {"warmup": "a warm-up would ignore its targets", "label": "it has its labels already"}
            raise ValueError(f"{where}, a step of kind label: {wrong[step.kind]}; name one of {', '.join(SOURCES)}")
    if labels and len(labels) < len(data_names(step)):
        raise ValueError(f"steps.{name}.data mixes {labels[0]}, which a step makes, with given data: name one kind")
    if labels and isinstance(step.data, dict):
        for key in LABELLED_ALONE:
            if key in step.data:
                raise ValueError(f"steps.{name}.data.{key}: the pairs of {labels[0]} are a file of this run; remove it")


def data_names(step: Any) -> tuple[str, ...]:
    """The sources that a step names; none where it leaves them to its kind."""
    named = step.data.get("source") if isinstance(step.data, dict) else step.data
    return () if named is None else (named,) if isinstance(named, str) else tuple(named)
