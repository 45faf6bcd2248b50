"""Which model each step of a run starts from and stays near, and where it stands."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsa_lightning.adapters import WEIGHTS
from rsa_lightning.checkpoint import file_hash
from rsa_lightning.hub import FILES, WORDS, is_hub_name, snapshot
from rsa_lightning.models import PolicySpec, check_spec
from rsa_lightning.plan import BASE, AlignConfig
from rsa_lightning.steps import adapter_of


class Lineage:
    """The models of a run by name: `base`, every step's, and folders that stand for themselves."""

    def __init__(self, config: AlignConfig) -> None:
        self.config, self.folder = config, Path(config.output)

    def start(self, name: str) -> str:
        """The name of what a step starts from: the last model before it, unless it says otherwise.

        A merge and a mixture are compared with their first member, a scaled adapter with the model it lies on.
        """
        step = self.config.steps[name]
        if step.adapter is not None:
            return self.start(step.adapter)
        if not step.trains and step.models:
            return next(iter(step.models))
        names = list(self.config.steps)
        before = [other for other in names[: names.index(name)] if self.config.steps[other].has_model]
        return step.start or (before[-1] if before else BASE)

    def reference(self, name: str) -> str:
        return self.config.steps[name].reference or self.start(name)

    def model(self, name: str) -> str:
        """The model folder of a step, of the base model, or the folder itself."""
        if name == BASE:
            return self.config.model.model or str(self.folder / "inputs" / BASE)
        return str(self.folder / name / "model") if name in self.config.steps else name

    def origin(self, name: str) -> str:
        """The folder of the model that alignment started from: back along `start` to what no alignment step made."""
        if name in self.config.steps and not self.config.steps[name].trains and not self._aligned(name):
            return self.model(
                self.start(name)
            )  # of models as they came: compared with the first of them, not with itself
        while self._aligned(name):
            name = self.start(name)
        return self.model(name)

    def members(self, name: str) -> dict[str, float]:
        """Model folder -> weight, of a step that combines models. Raises ValueError where two names are one folder."""
        given = self.config.steps[name].models
        found = {self.model(member): weight for member, weight in given.items()}
        if len(found) < len(given):
            raise ValueError(f"steps.{name}.models: two of {', '.join(map(str, given))} are one folder: name it once")
        return found

    def _aligned(self, name: str) -> bool:
        """Whether a step, or one of the models it combines, was aligned."""
        if name not in self.config.steps or self.config.steps[name].kind == "warmup":
            return False
        step = self.config.steps[name]
        return step.trains or step.adapter is not None or any(map(self._aligned, step.models or ()))

    def root(self, name: str) -> str:
        """`base` or a folder: what a model goes back to along `start`. All between them are of its architecture."""
        while name in self.config.steps:
            name = self.start(name)
        return name

    def foreign_models(self) -> list[str]:
        """Folders that some step starts from, stays near or combines, without those of this run."""
        steps = self.config.steps.values()
        named = [target for step in steps for target in (step.start, step.reference, *(step.models or ())) if target]
        return [target for target in dict.fromkeys(named) if target != BASE and target not in self.config.steps]

    def policy(self, name: str) -> dict[str, Any]:
        """The PolicySpec of a step, as plain values."""
        start, lora = self.start(name), adapter_of(self.config.steps[name], self.config)
        own = {"config": None, "tokenizer": None, "seed": self.config.seed, "model": "-"}
        spec = dataclasses.asdict(dataclasses.replace(self.config.model, **own))  # type: ignore[arg-type]
        stacked = lora is not None and self.config.handover == "stack"
        model, adapters = self._stack(start) if stacked else (self.model(start), [])
        quantize = self.config.quantize if lora is not None else None  # what is trained cannot be quantised
        return {**spec, "model": model, "adapters": adapters, "lora": lora, "quantize": quantize}

    def reference_class(self, name: str) -> dict[str, Any]:
        """The reference of a step, as a class with its arguments.

        A step with an adapter needs no second copy of what it starts from: that is the policy, its new adapter off.
        """
        cache = self.config.steps[name].reference_cache
        if cache is not None:
            if self.reference(name) != self.start(name):
                raise ValueError(
                    f"reference_cache is of the model that the step starts from, {self.start(name)}, and reference "
                    f"names {self.reference(name)}: remove one of the two"
                )
            arguments = {"folder": cache} if isinstance(cache, str) else dict(cache)
            return {"class_path": "rsa_lightning.hidden_cache.HiddenCache", "init_args": arguments}
        adapted = adapter_of(self.config.steps[name], self.config) is not None
        if adapted and self.reference(name) == self.start(name):
            return {"class_path": "rsa_lightning.reference.AdapterOff"}
        model = self.model(self.reference(name))
        return {"class_path": "rsa_lightning.reference.FrozenCopy", "init_args": {"model": model}}

    def _stack(self, name: str) -> tuple[str, list[str]]:
        """What a step's model is made of: the full model at the bottom, and the adapters on it, oldest first."""
        if name not in self.config.steps or adapter_of(self.config.steps[name], self.config) is None:
            return self.model(name), []
        model, below = self._stack(self.start(name))
        return model, [*below, str(self.folder / name / "adapter")]


def adapter_inputs(policy: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the adapter of a step, given its policy; folders are replaced by the hashes of what they hold."""
    lora = policy["lora"]
    continued = [lora["start"]] if lora.get("start") else []
    return {
        **lora,
        "start": None,  # resolved below, like the frozen ones
        "quantize": policy["quantize"],
        "handover": "stack" if policy["adapters"] else "merge",
        "weights": [file_hash(Path(folder) / WEIGHTS) for folder in (*policy["adapters"], *continued)],
    }


def local(model: PolicySpec) -> PolicySpec:
    """The base model with folders for names of the hub, checked. Raises like `check_spec` and `snapshot`."""
    if model.tokenizer and is_hub_name(model.tokenizer):
        model = dataclasses.replace(model, tokenizer=str(snapshot(model.tokenizer, files=WORDS)))
    if model.model and is_hub_name(model.model):
        files = (*FILES, "*.py") if model.trust_remote_code else FILES
        model = dataclasses.replace(model, model=str(snapshot(model.model, model.revision, files)), revision=None)
    if model.model and not Path(model.model).is_dir():
        raise FileNotFoundError(
            f"model.model: there is no folder {model.model}, and names of the hub are owner/name: give either"
        )
    check_spec(model)
    return model
