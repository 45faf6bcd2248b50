"""The steps of a run that train nothing: models merged or mixed, adapters scaled, pairs labelled.

RUN/<step>/model/, adapter/           a merge: a model like any other
RUN/<step>/mixture.json               a mixture: its members and their weights; it is decoded, and has no folder
RUN/<step>/pairs.jsonl, scores.jsonl  labelled pairs in format trl, data of later steps
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rsa_lightning.adapters import WEIGHTS, Lora
from rsa_lightning.checkpoint import file_hash, folder_hashes, key_of, write_json
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.records import FormatError
from rsa_lightning.evaluation.score import fingerprint, load_scorer
from rsa_lightning.labels import (
    SCORES,
    Pairs,
    Weighed,
    labelled_rows,
    read_pairs,
    score_responses,
    weigh_by_models,
    weigh_by_scores,
    write_rows,
)
from rsa_lightning.lineage import Lineage
from rsa_lightning.manifest import Manifest
from rsa_lightning.members import check_alike, open_member
from rsa_lightning.merge import merge_adapter, merge_models, scale_adapter
from rsa_lightning.models import PolicySpec
from rsa_lightning.plan import BASE, AlignConfig, StepConfig
from rsa_lightning.steps import PAIRS, VALIDATION, adapter_of
from rsa_lightning.weights import shown


class Derived:
    """Makes what a step that trains nothing leaves, unless what an earlier run left can be reused."""

    def __init__(self, config: AlignConfig, lineage: Lineage, manifest: Manifest, console: Console) -> None:
        self.config, self.lineage, self.manifest, self.console = config, lineage, manifest, console
        self.folder = Path(config.output)

    def check(self, name: str) -> None:
        """What can be said against a step before anything is made. Raises ValueError, FileNotFoundError."""
        step = self.config.steps[name]
        if step.adapter is not None and adapter_of(self.config.steps[step.adapter], self.config) is None:
            raise ValueError(
                f"steps.{name}.adapter: the step {step.adapter} trains all weights, and there is no adapter to scale: "
                f"set lora, or merge models: {{{self.lineage.start(step.adapter)}: ..., {step.adapter}: ...}}"
            )
        if step.models is not None:
            self.lineage.members(name)
        try:
            if step.kind == "label" and step.models is None:
                load_scorer(self._scorer(step))
            # what the members go back to stands for them; a fresh base model is not there yet
            members = step.models if step.kind == "merge" and step.models else ()
            roots = dict.fromkeys(self.lineage.root(member) for member in members)
            folders = [self.lineage.model(root) for root in roots if root != BASE or self.config.model.model]
            there = list({Path(folder).resolve(): folder for folder in folders}.values())
            if len(there) > 1:
                check_alike([open_member(Path(folder), 1.0, self._trusted) for folder in there])
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"steps.{name}: {error}") from error

    def run(self, name: str, data: PreferenceData | None) -> None:
        """Makes one step; `data` is that of a step of kind label, set up."""
        step, folder = self.config.steps[name], self.folder / name
        inputs = self._inputs(step, data)
        why = self.manifest.why_again(name, inputs, folder / "model")
        if why is None:
            self.console.print(f"[bold]{name}[/]: reused (same configuration, data and models)")
            return
        self.console.print(f"[bold]{name}[/]: {why}", soft_wrap=True)
        self.manifest.forget(name)
        self._clear(folder)
        started = time.perf_counter()
        made = self._label(name, step, data) if data is not None else self._combine(name, step)
        self.manifest.finish(
            name,
            inputs,
            folder / "model",
            kind=step.kind,
            start=self.lineage.start(name) if step.kind != "label" else None,
            reference=step.reference,
            temperature=None,
            seconds=round(time.perf_counter() - started, 1),
            **made,
        )
        self.console.print(f"  {made['made']}", soft_wrap=True)

    # ------------------------------------------------------------------ models

    def _combine(self, name: str, step: StepConfig) -> dict[str, Any]:
        """A merged model, a scaled adapter and its model, or the record of a mixture."""
        folder = self.folder / name
        if step.adapter is not None:
            assert step.scale is not None
            scale_adapter(self.folder / step.adapter / "adapter", step.scale, folder / "adapter", name=step.adapter)
            # the same weights below it as in training: other adapters, precision, quantisation
            spec = {**self.lineage.policy(step.adapter), "lora": Lora(start=str(folder / "adapter"))}
            merge_adapter(PolicySpec(**spec), self.lineage.model(step.adapter), folder / "model")
            return {"made": f"the adapter of {step.adapter} times {step.scale:g}"}
        members: Mapping[Any, float] = self.lineage.members(name)
        called = list(step.models)
        if step.kind == "merge":
            merge_models(members, folder / "model", names=called, trust_remote_code=self._trusted)
            return {"made": f"weights {shown(step.models)}"}
        rows = [
            {"model": model, "weight": weight, "sha256": folder_hashes(place)}
            for model, (place, weight) in zip(called, members.items(), strict=True)
        ]
        write_json(folder / "mixture.json", {"members": rows})
        return {"made": f"log-probabilities {shown(step.models)}, at every token"}

    @property
    def _trusted(self) -> bool:
        return self.config.model.trust_remote_code

    # ------------------------------------------------------------------ labels

    def _label(self, name: str, step: StepConfig, data: PreferenceData) -> dict[str, Any]:
        """Writes the pairs and says how many of them changed order."""
        folder, pairs = self.folder / name, read_pairs(data)
        weigh = self._weigh_by_models if step.models else self._weigh_by_scores
        weighed = weigh(name, step, pairs, data)
        rows = labelled_rows(pairs.records, weighed, step.targets)
        cut = len(rows) - pairs.validation
        found = [[row for row in part if row is not None] for part in (rows[:cut], rows[cut:])]
        if not found[0]:
            raise FormatError(f"steps.{name}: no pair could be labelled, both of its responses need a score")
        write_rows(folder / PAIRS, found[0])
        if pairs.validation:
            write_rows(folder / VALIDATION, found[1])
        targets = [row.get("target", 1.0) for part in found for row in part]
        counts = {"pairs": len(targets), "changed": sum(t < 0.5 for t in targets), "unlabelled": rows.count(None)}
        missing = f", {counts['unlabelled']} had no score and are left out" if counts["unlabelled"] else ""
        made = f"{counts['pairs']} pairs labelled, {counts['changed']} of them changed order (target < 1/2){missing}"
        if not step.targets:
            made = f"{counts['pairs']} pairs have the scorer's rewards and costs{missing}"
        return {"made": made, "labels": counts}

    def _weigh_by_scores(self, name: str, step: StepConfig, pairs: Pairs, data: PreferenceData) -> Weighed:
        """By scores; another multiplier of the cost asks no scorer again, and an interrupted scoring goes on."""
        path, scorer = self.folder / name / SCORES, self._scorer(step)
        key = key_of({"scorer": fingerprint(scorer), "data": self._data(data)})
        state = self.manifest.section("scores").get(name, {})
        known = state.get("key") == key and path.is_file()
        if not (known and state["complete"]):
            self.manifest.put("scores", name, {"key": key, "complete": False})
            score_responses(pairs.records, scorer, path, begun=known)
            self.manifest.put("scores", name, {"key": key, "complete": True})
        return weigh_by_scores(path, self._lam(step))

    def _weigh_by_models(self, name: str, step: StepConfig, pairs: Pairs, data: PreferenceData) -> Weighed:
        reference = self.lineage.model(str(step.reference))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base = {"dtype": self.config.model.dtype, "trust_remote_code": self._trusted}
        return weigh_by_models(pairs.examples, self.lineage.members(name), reference, data.tokenizer, device, base)

    def _scorer(self, step: StepConfig) -> Any:
        return step.scorer or self.config.evaluation.scorer

    def _lam(self, step: StepConfig) -> float:
        """The step's own, else the run's, else 1, as for a temperature."""
        if step.lam is not None:
            return step.lam
        return 1.0 if self.config.lam is None else self.config.lam

    # ------------------------------------------------------------------ reuse

    def _inputs(self, step: StepConfig, data: PreferenceData | None) -> dict[str, Any]:
        """Everything that decides what a step makes; models and data by the hashes of what they hold."""
        settings: dict[str, Any] = {"kind": step.kind}
        models = list(step.models or ())
        if step.models:
            settings["weights"] = list(step.models.values())
        if step.adapter is not None:
            settings["scale"] = step.scale
            models = [self.lineage.start(step.adapter), step.adapter]
        if step.reference is not None:
            models.append(step.reference)
        found: dict[str, Any] = {
            "step": settings,
            "lineage": [key_of(folder_hashes(self.lineage.model(model))) for model in models],
            "version": version("rsa_lightning"),
        }
        if step.adapter is not None:
            below = self.lineage.policy(step.adapter)
            folders = [*below["adapters"], str(self.folder / step.adapter / "adapter")]
            found["adapter"] = {
                "quantize": below["quantize"],
                "handover": "stack" if below["adapters"] else "merge",
                "weights": [file_hash(Path(folder) / WEIGHTS) for folder in folders],
            }
        if data is not None:
            found["data"] = self._data(data)
            if step.models is None:
                settings |= {"scorer": fingerprint(self._scorer(step)), "lam": self._lam(step), "targets": step.targets}
        return found

    def _data(self, data: PreferenceData) -> dict[str, Any]:
        """The rows that are labelled: the files, and which of their pairs survive as examples."""
        kept = data.report["examples_sha256"]
        policies = dataclasses.asdict(data.settings.defects)
        return {"sha256": list(data.report["sha256"].values()), "examples": kept, "defects": policies}

    def _clear(self, folder: Path) -> None:
        """An empty folder, but for scores: the manifest says what they are of."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != SCORES:
                path.unlink()
