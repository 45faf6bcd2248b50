"""`rsa align`: the steps of one configuration in order, then evaluation and report, all in one run directory.

RUN/manifest.json                  configuration, versions, data fingerprints, model hashes, lineage
RUN/inputs/                        what the run made for itself: generated data, tokenizer, base model
RUN/<step>/                        config.yaml, metrics.csv, samples.jsonl, preference.json, model/, checkpoints/; what
                                   steps leave that train nothing stands in derived.py
RUN/results.json, RUN/report.md    and the figures
"""

import dataclasses
import gc
import json
import shutil
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from rsa_lightning import stories
from rsa_lightning.assess import Assessment, Candidate
from rsa_lightning.checkpoint import key_of, write_text
from rsa_lightning.data.datamodule import PreferenceData, summary
from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.derived import Derived
from rsa_lightning.fit import FitCLI
from rsa_lightning.lineage import Lineage, local
from rsa_lightning.manifest import Manifest
from rsa_lightning.models import PolicySpec, check_spec, load_policy
from rsa_lightning.parallel import processes
from rsa_lightning.parallel.launch import is_first
from rsa_lightning.parsing import plain_message
from rsa_lightning.plan import BASE, AlignConfig, StepConfig, read_config
from rsa_lightning.policy_stage import PolicyStage
from rsa_lightning.run_data import RunData
from rsa_lightning.saving import save_policy
from rsa_lightning.sharing import take_over, trained_inputs
from rsa_lightning.stages import AlignmentStage
from rsa_lightning.steps import (
    check_adapters,
    check_late,
    early_steps,
    fit_config,
    is_late,
)

PACKAGES = ("rsa_lightning", "torch", "lightning", "transformers", "torchmetrics", "jsonargparse", "safetensors")


def align(config: Mapping[str, Any], console: Console | None = None, donors: Sequence[Path] = ()) -> dict[str, Any]:
    """Runs what a merged configuration asks for and returns the content of results.json.

    Finished steps whose configuration, data and start are unchanged are reused; every decision is printed. Equal steps
    of other runs, `donors`, are taken over.

    Raises:
        ValueError, FileNotFoundError: in the configuration, before anything is written; in the data, before anything is
            trained.
    """
    console = console or Console(quiet=not is_first())
    return Run(read_config(config), dict(config), console, donors).execute()


class Run:
    """One run directory and the steps that fill it."""

    def __init__(
        self, config: AlignConfig, given: dict[str, Any], console: Console, donors: Sequence[Path] = ()
    ) -> None:
        self.config, self.given, self.console, self.donors = config, given, console, donors
        self.folder = Path(config.output)
        self.inputs = self.folder / "inputs"
        self.manifest = Manifest(self.folder)
        self.data = RunData(config, self.inputs)

    def execute(self) -> dict[str, Any]:
        # everything that can be wrong with the configuration is found before the run directory is touched ...
        built = self.check()
        stages = {name: cli.model for name, cli in built.items()}
        for cli in built.values():
            processes.join(cli.trainer)
        assessment = Assessment(self.config, self.folder, self.manifest, self.console)
        # ... and everything wrong with the data before anything is trained
        processes.first(self.make_inputs)
        for name, step in early_steps(self.config).items():
            self.data.read(name, step)
        alignments = {name: stage for name, stage in stages.items() if isinstance(stage, AlignmentStage)}
        assessment.prepare(self.data.criteria(), self.data.files.get("prompts"), self.lineage.model(BASE), alignments)
        betas = {name: self._temperature(name, stages[name]) for name in early_steps(self.config) if name in stages}
        del built, stages, alignments
        for name, step in self.config.steps.items():
            if step.trains:
                self._train(name, step, betas[name] if name in betas else self._temperature(name))
            else:
                processes.first(partial(self._derive, name, step))
        return processes.first(lambda: assessment.run(self._candidates()))

    def _derive(self, name: str, step: StepConfig) -> None:
        self.derived.run(name, self.data.of(step) if step.kind == "label" else None)

    def _candidates(self) -> dict[str, Candidate]:
        steps = self.config.steps.items()
        return {name: self._candidate(name, step) for name, step in steps if step.kind != "label"}

    def _temperature(self, name: str, stage: PolicyStage | None = None) -> float | None:
        """Of the step's loss, which may depend on its data."""
        stage = stage or self._build(name).model
        self.data.read(name, self.config.steps[name], stage)
        return stage.loss.beta if isinstance(stage, AlignmentStage) else None

    def _candidate(self, name: str, step: StepConfig) -> Candidate:
        members = self.lineage.members(name) if step.kind == "mix" else None
        return Candidate(self.lineage.start(name), self.lineage.origin(name), members)

    def check(self) -> dict[str, FitCLI]:
        """Trainer, stage and data of every step that trains; the model is fetched if it stands on the hub."""
        check_adapters(self.config)
        self.config = dataclasses.replace(self.config, model=local(self.config.model))
        self.lineage = Lineage(self.config)
        self.tokenizer = self.data.tokenizer = self._find_tokenizer()
        self.derived = Derived(self.config, self.lineage, self.manifest, self.console)
        built = {name: self._build(name) for name, step in self.config.steps.items() if step.trains}
        self._check_alike({name: cli.trainer.world_size for name, cli in built.items()})
        self.sharing = {name: processes.sharing(cli.trainer) for name, cli in built.items()}
        for name, cli in built.items():
            stage = cli.model
            self._check_policy(name, stage.policy_spec)
            if is_late(self.config.steps[name], self.config):
                check_late(name, stage, self.data.arguments(self.config.steps[name]))
        for name in self.config.steps:
            if name not in built:
                self.derived.check(name)
        return built

    def _check_alike(self, sizes: Mapping[str, int]) -> None:
        """Raises ValueError where steps ask for different numbers of processes."""
        if len(set(sizes.values())) > 1:
            asked = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            raise ValueError(
                f"trainer: the steps of a run share its processes, and ask for different numbers ({asked})"
            )

    def _check_policy(self, name: str, spec: PolicySpec) -> None:
        """The model a step starts from may not be there yet: what it goes back to stands for it."""
        root = self.lineage.root(name)
        try:
            check_spec(spec, like=self.config.model if root == BASE else PolicySpec(model=root))
        except (ValueError, OSError, ImportError) as error:
            kinds = (ImportError, FileNotFoundError, ValueError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
            raise kind(f"steps.{name}: {error}") from error

    # ------------------------------------------------------------------ inputs

    def _find_tokenizer(self) -> str:
        """The base model's, or that of a folder that a step starts from, or the one the run will train."""
        own = self.config.model.tokenizer or self.config.model.model
        return own or next(iter(self.lineage.foreign_models()), str(self.inputs / "tokenizer"))

    def make_inputs(self) -> None:
        """Makes the run directory and what the run makes for itself: a world, a tokenizer, tokens, a base model."""
        self._begin()
        if self._trains_tokenizer:
            self._keep_tokenizer(self._tokenizer_data())
        if self.config.model.model is None:
            tokenizer = load_tokenizer(self.tokenizer)
            spec = dataclasses.replace(self.config.model, seed=self.config.seed)
            save_policy(load_policy(spec, tokenizer), tokenizer, self.lineage.model(BASE))
        self._check_vocabularies()
        for name, step in early_steps(self.config).items():
            self.data.read(name, step)
        self.manifest.note(data=self.data.fingerprints())

    def data_sets(self) -> Iterator[tuple[str, PreferenceData]]:
        """(the steps' names, data) of every data set, not prepared yet; a caller prepares each before it asks for more.

        Where the run trains its tokenizer, the data of the first step comes once more, before all others.
        """
        self._begin()
        if self._trains_tokenizer:
            data = self._tokenizer_data()
            yield "tokenizer", data
            if not data.report:  # it could not be prepared, and nothing can without the tokenizer
                return
            self._keep_tokenizer(data)
        users: dict[str, list[str]] = {}
        for name, step in early_steps(self.config).items():
            users.setdefault(key_of(self.data.arguments(step)), []).append(name)
        for names in users.values():
            yield ", ".join(names), PreferenceData(**self.data.arguments(self.config.steps[names[0]]))

    def _begin(self) -> None:
        """Makes the run directory, and the story world where there is one."""
        self.inputs.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in PACKAGES}
        self.manifest.note(config=self.given, versions=versions, seed=self.config.seed)
        if self.config.data.stories is not None:
            world = stories.build(self.config.seed, **dataclasses.asdict(self.config.data.stories))
            for path, rows in zip(self.data.files.values(), world, strict=True):
                write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    @property
    def _trains_tokenizer(self) -> bool:
        return self.tokenizer == str(self.inputs / "tokenizer")

    def _tokenizer_data(self) -> PreferenceData:
        """The data whose training side the run's tokenizer is trained on: that of the first step."""
        first = next(iter(early_steps(self.config).values()))
        return PreferenceData(**self.data.arguments(first) | {"tokenizer": None})

    def _keep_tokenizer(self, data: PreferenceData) -> None:
        data.prepare()
        data.tokenizer.save_pretrained(self.tokenizer)

    def _check_vocabularies(self) -> None:
        """Ids must mean the same words in every model of a run."""
        mine = load_tokenizer(self.tokenizer).get_vocab()
        for folder in self.lineage.foreign_models():
            if load_tokenizer(folder).get_vocab() != mine:
                raise ValueError(
                    f"vocabulary mismatch: the model in {folder} has another tokenizer than this run, "
                    f"{self.tokenizer}: set model.tokenizer to {folder}, or start from models of one family"
                )

    # ------------------------------------------------------------------- steps

    def _build(self, name: str) -> FitCLI:
        """The trainer, stage and data of a step, checked; nothing is loaded yet."""
        step = self.config.steps[name]
        try:
            config = fit_config(
                step,
                self.config,
                policy=self.lineage.policy(name),
                reference=self.lineage.reference_class(name),
                data=self.data.arguments(step),
                folder=self.folder / name,
                progress_bar=sys.stdout.isatty(),
            )
            return FitCLI(config)
        except (ValueError, OSError, ArgumentError, MisconfigurationException) as error:
            raise ValueError(f"steps.{name}: {plain_message(error)}") from error

    def _train(self, name: str, step: StepConfig, beta: float | None) -> None:
        """Trains a step unless its model can be reused. Its stage and trainer are let go of afterwards."""
        data = self.data.of(step)
        inputs = processes.first(partial(self._begin_step, name, step, beta, data))
        if inputs is None:
            return
        cli = self._build(name)
        processes.first(partial(self._write_config, name, cli))
        L.seed_everything(self.config.seed, verbose=False)
        started = time.perf_counter()
        _fit(cli, data)
        seconds = time.perf_counter() - started
        processes.first(partial(self._finish_step, name, step, beta, data, inputs, cli, seconds))
        data.trainer = None  # it holds the policy, the reference and the optimizer
        del cli
        gc.collect()

    def _begin_step(
        self, name: str, step: StepConfig, beta: float | None, data: PreferenceData
    ) -> dict[str, Any] | None:
        """What decides the step's model, with its folder emptied; None where the model is there already."""
        folder, arguments = self.folder / name, self.data.arguments(step)
        pairs = data.batch_size * self.sharing[name]
        inputs = trained_inputs(name, beta, self.config, self.lineage, self.tokenizer, arguments, data.report, pairs)
        why = self.manifest.why_again(name, inputs, folder / "model")
        if why is None:
            self.console.print(f"[bold]{name}[/]: reused (same configuration, data and start)")
            return None
        if donor := take_over(self.manifest, name, inputs, self.donors, **self._origin(name, step)):
            self._write_config(name, self._build(name))
            told = f"[bold]{name}[/]: taken over from {donor} (same configuration, data and start)"
            self.console.print(told, soft_wrap=True)
            return None
        self.console.print(f"[bold]{name}[/]: {why}; {summary(data.report)}", soft_wrap=True)
        self.manifest.forget(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return inputs

    def _origin(self, name: str, step: StepConfig) -> dict[str, Any]:
        reference = None if step.kind == "warmup" else self.lineage.reference(name)
        return {"start": self.lineage.start(name), "reference": reference}

    def _finish_step(
        self,
        name: str,
        step: StepConfig,
        beta: float | None,
        data: PreferenceData,
        inputs: Mapping[str, Any],
        cli: FitCLI,
        seconds: float,
    ) -> None:
        """Records a step that has been trained. Raises ValueError where it was not."""
        model = self.folder / name / "model"
        if not model.is_dir():
            raise ValueError(
                f"steps.{name}: no optimizer step was made (max_epochs, max_steps or fast_dev_run); raise it"
            )
        self.manifest.finish(
            name,
            inputs,
            model,
            kind=step.kind,
            **self._origin(name, step),
            temperature=beta,
            label_scale=labels.scale if (labels := getattr(cli.model, "labels", None)) else None,
            optimizer_steps=cli.trainer.global_step,
            processes=cli.trainer.world_size,
            seconds=round(seconds, 1),
            data=data.report,
        )
        steps = f"{cli.trainer.global_step} steps in {seconds:.0f} s"
        self.console.print(f"  {steps}; {_validation(cli.trainer)}", soft_wrap=True)

    def _write_config(self, name: str, cli: FitCLI) -> None:
        path = self.folder / name / "config.yaml"
        write_text(path, f"# Run:  rsa fit -c {path}\n{cli.dump()}")


def _fit(cli: FitCLI, data: PreferenceData) -> None:
    try:
        cli.trainer.fit(cli.model, data)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stop


def _validation(trainer: L.Trainer) -> str:
    """The figures of the last validation that say how a stage went."""
    wanted = ("val/nll", "val/loss", "val/rewards/accuracies", "val/rewards/margins")
    found = {name: float(trainer.callback_metrics[name]) for name in wanted if name in trainer.callback_metrics}
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "no validation"
