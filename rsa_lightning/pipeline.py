"""`rsa align`: the steps of one configuration in order, then evaluation and report, all in one run directory.

RUN/manifest.json                  configuration, versions, data fingerprints, model hashes, lineage
RUN/inputs/                        what the run made for itself: generated data, tokenizer, base model
RUN/<step>/                        config.yaml, metrics.csv, samples.jsonl, preference.json, model/, checkpoints/
RUN/results.json, RUN/report.md    and the figures
"""

import dataclasses
import gc
import json
import shutil
import sys
import time
from argparse import ArgumentError
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from rsa_lightning import stories
from rsa_lightning.assess import Assessment
from rsa_lightning.checkpoint import file_hash, folder_hashes, key_of, write_text
from rsa_lightning.data.datamodule import PreferenceData, summary
from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.fit import FitCLI
from rsa_lightning.manifest import Manifest
from rsa_lightning.models import check_spec, load_policy, save_policy
from rsa_lightning.parsing import plain_message
from rsa_lightning.plan import BASE, SOURCES, AlignConfig, StepConfig, fit_config, read_config, sources_of
from rsa_lightning.stages import AlignmentStage

PACKAGES = ("rsa_lightning", "torch", "lightning", "transformers", "torchmetrics", "jsonargparse", "safetensors")
# arguments of a Trainer that show what happens and change nothing
DISPLAY = ("log_every_n_steps", "logger", "enable_progress_bar", "enable_model_summary", "profiler")


def align(config: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Runs what a merged configuration asks for and returns the content of results.json.

    Finished steps whose configuration, data and start are unchanged are reused; every decision is printed.

    Raises:
        ValueError, FileNotFoundError: in the configuration, before anything is written; in the data, before anything is
            trained.
    """
    return Run(read_config(config), dict(config), console or Console()).execute()


class Run:
    """One run directory and the steps that fill it."""

    def __init__(self, config: AlignConfig, given: dict[str, Any], console: Console) -> None:
        self.config, self.given, self.console = config, given, console
        self.folder = Path(config.output)
        self.inputs = self.folder / "inputs"
        self.manifest = Manifest(self.folder)
        self.files = self._find_files()
        self.tokenizer = self._find_tokenizer()
        self._data_modules: dict[str, PreferenceData] = {}

    def execute(self) -> dict[str, Any]:
        # everything that can be wrong with the configuration is found before the run directory is touched ...
        check_spec(self.config.model)
        if self.config.model.model and not Path(self.config.model.model).is_dir():
            raise FileNotFoundError(
                f"model.model is {self.config.model.model!r}, which is no folder here: rsa align hashes its models, so "
                "download it first and name the folder"
            )
        assessment = Assessment(self.config, self.folder, self.manifest, self.console)
        stages = {name: self._build(name).model for name in self.config.steps}
        self.folder.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in PACKAGES}
        self.manifest.note(config=self.given, versions=versions, seed=self.config.seed)
        # ... and everything wrong with the data before anything is trained
        self._make_inputs()
        self._check_vocabularies()
        for name, step in self.config.steps.items():
            self._read(name, step)
        alignments = [stage for stage in stages.values() if isinstance(stage, AlignmentStage)]
        assessment.prepare(self._criteria(), self.files.get("prompts"), self._model(BASE), alignments)
        betas = {name: stage.loss.beta for name, stage in stages.items() if isinstance(stage, AlignmentStage)}
        del stages, alignments
        for name, step in self.config.steps.items():
            self._train(name, step, betas.get(name))
        return assessment.run({name: (self._start(name), self._origin(name)) for name in self.config.steps})

    # ------------------------------------------------------------------ inputs

    def _find_files(self) -> dict[str, Path]:
        """The file of every source that a step learns from, and of the prompts where one is given."""
        data = self.config.data
        files: dict[str, Path] = {}
        for name, step in self.config.steps.items():
            try:
                names, _ = sources_of(step, data)
            except ValueError as error:
                raise ValueError(f"steps.{name}: {error}") from error
            if data.stories is None:
                files |= {source: _existing(getattr(data, source), f"data.{source}") for source in names}
        if data.stories is not None:
            return {name: self.inputs / f"{name}.jsonl" for name in (*SOURCES, "prompts")}
        return files | ({"prompts": _existing(data.prompts, "data.prompts")} if data.prompts else {})

    def _find_tokenizer(self) -> str:
        """The base model's, or that of a folder that a step starts from, or the one the run will train."""
        own = self.config.model.tokenizer or self.config.model.model
        return own or next(iter(self._foreign_models()), str(self.inputs / "tokenizer"))

    def _foreign_models(self) -> list[str]:
        """Folders that some step starts from or stays near, without those of this run."""
        named = [target for step in self.config.steps.values() for target in (step.start, step.reference) if target]
        return [target for target in dict.fromkeys(named) if target != BASE and target not in self.config.steps]

    def _make_inputs(self) -> None:
        """Writes what the run makes for itself: a generated world, a tokenizer of the first step's data, a base."""
        self.inputs.mkdir(exist_ok=True)
        if self.config.data.stories is not None:
            world = stories.build(self.config.seed, **dataclasses.asdict(self.config.data.stories))
            for path, rows in zip(self.files.values(), world, strict=True):
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if self.tokenizer == str(self.inputs / "tokenizer"):
            data = PreferenceData(**self._data_arguments(next(iter(self.config.steps.values()))) | {"tokenizer": None})
            data.setup()
            data.tokenizer.save_pretrained(self.tokenizer)
        if self.config.model.model is None:
            tokenizer = load_tokenizer(self.tokenizer)
            spec = dataclasses.replace(self.config.model, seed=self.config.seed)
            save_policy(load_policy(spec, tokenizer), tokenizer, self._model(BASE))
        prints = {name: {"path": str(path), "sha256": file_hash(path)} for name, path in self.files.items()}
        self.manifest.note(data=prints)

    def _check_vocabularies(self) -> None:
        """Ids must mean the same words in every model of a run."""
        mine = load_tokenizer(self.tokenizer).get_vocab()
        for folder in self._foreign_models():
            if load_tokenizer(folder).get_vocab() != mine:
                raise ValueError(
                    f"vocabulary mismatch: the model in {folder} has another tokenizer than this run, "
                    f"{self.tokenizer}: set model.tokenizer to {folder}, or start from models of one family"
                )

    def _data_arguments(self, step: StepConfig) -> dict[str, Any]:
        """Arguments of PreferenceData for a step."""
        names, options = sources_of(step, self.config.data)
        paths = [str(self.files[name]) for name in names]
        shape = "demonstration" if names == ("demonstrations",) else self.config.data.format
        shared = {"seed": self.config.seed, "format": shape, "tokenizer": self.tokenizer, **self.config.data.options}
        return {"path": paths[0] if len(paths) == 1 else paths, **shared, **options}

    def _data(self, step: StepConfig) -> PreferenceData:
        """A step's data, read and tokenised once per run."""
        arguments = self._data_arguments(step)
        key = key_of(arguments)
        if key not in self._data_modules:
            data = PreferenceData(**arguments)
            data.setup()
            self._data_modules[key] = data
        return self._data_modules[key]

    def _read(self, name: str, step: StepConfig) -> None:
        try:
            self._data(step)
        except ValueError as error:
            raise ValueError(f"steps.{name}: {error}") from error

    def _criteria(self) -> dict[str, PreferenceData]:
        """One data set per source of pairs that some step uses, split and tokenised as in training."""
        found = {}
        for source in SOURCES[1:]:
            users = [step for step in self.config.steps.values() if source in sources_of(step, self.config.data)[0]]
            if users:
                options = {**sources_of(users[-1], self.config.data)[1], "source": source}
                found[source] = self._data(dataclasses.replace(users[-1], data=options))
        return found

    # ------------------------------------------------------------------- steps

    def _start(self, name: str) -> str:
        """The name of what a step starts from: the step before it, unless it says otherwise."""
        names = list(self.config.steps)
        place = names.index(name)
        return self.config.steps[name].start or (names[place - 1] if place else BASE)

    def _reference(self, name: str) -> str:
        return self.config.steps[name].reference or self._start(name)

    def _model(self, name: str) -> str:
        """The model folder of a step, of the base model, or the folder itself."""
        if name == BASE:
            return self.config.model.model or str(self.inputs / BASE)
        return str(self.folder / name / "model") if name in self.config.steps else name

    def _origin(self, name: str) -> str:
        """The folder of the model that alignment started from: back along `start` to what no alignment step made."""
        while name in self.config.steps and self.config.steps[name].kind != "warmup":
            name = self._start(name)
        return self._model(name)

    def _build(self, name: str) -> FitCLI:
        """The trainer, stage and data of a step, checked; nothing is loaded yet."""
        step = self.config.steps[name]
        spec = dataclasses.replace(self.config.model, config=None, model=self._model(self._start(name)), tokenizer=None)
        try:
            config = fit_config(
                step,
                self.config,
                policy=dataclasses.asdict(spec),
                reference=self._model(self._reference(name)),
                data=self._data_arguments(step),
                folder=self.folder / name,
                progress_bar=sys.stdout.isatty(),
            )
            cli = FitCLI(config)
            if cli.trainer.world_size > 1:
                raise ValueError(
                    f"rsa align runs in one process, trainer.devices asks for {cli.trainer.world_size}: run a step's "
                    "config.yaml with rsa fit for more"
                )
            return cli
        except (ValueError, OSError, ArgumentError, MisconfigurationException) as error:
            raise ValueError(f"steps.{name}: {plain_message(error)}") from error

    def _train(self, name: str, step: StepConfig, beta: float | None) -> None:
        """Trains a step unless its model can be reused. Its stage and trainer are let go of afterwards."""
        folder, data = self.folder / name, self._data(step)
        inputs = self._inputs_of(name, step, beta, data)
        why = self.manifest.why_again(name, inputs, folder / "model")
        if why is None:
            self.console.print(f"[bold]{name}[/]: reused (same configuration, data and start)")
            return
        self.console.print(f"[bold]{name}[/]: {why}; {summary(data.report)}", soft_wrap=True)
        self.manifest.forget(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        cli = self._build(name)
        write_text(folder / "config.yaml", f"# Run:  rsa fit -c {folder / 'config.yaml'}\n{cli.dump()}")
        L.seed_everything(self.config.seed, verbose=False)
        started = time.perf_counter()
        _fit(cli, data)
        seconds = time.perf_counter() - started
        if not (folder / "model").is_dir():
            raise ValueError(
                f"steps.{name}: no optimizer step was made (max_epochs, max_steps or fast_dev_run); raise it"
            )
        self.manifest.finish(
            name,
            inputs,
            folder / "model",
            kind=step.kind,
            start=self._start(name),
            reference=None if step.kind == "warmup" else self._reference(name),
            temperature=beta,
            optimizer_steps=cli.trainer.global_step,
            seconds=round(seconds, 1),
            data=data.report,
        )
        steps = f"{cli.trainer.global_step} steps in {seconds:.0f} s"
        self.console.print(f"  {steps}; {_validation(cli.trainer)}", soft_wrap=True)
        data.trainer = None  # it holds the policy, the reference and the optimizer
        del cli
        gc.collect()

    def _inputs_of(self, name: str, step: StepConfig, beta: float | None, data: PreferenceData) -> dict[str, Any]:
        """Everything that decides a step's model; paths are replaced by the hashes of what they hold."""
        lineage = [self._start(name)] if step.kind == "warmup" else [self._start(name), self._reference(name)]
        settings = dataclasses.asdict(step)
        trainer = {**self.config.trainer, **settings.pop("trainer")}
        for key in ("start", "reference", "data", "temperature"):  # resolved below
            settings.pop(key)
        arguments = self._data_arguments(step)
        for key in ("path", "validation_path", "tokenizer"):
            arguments.pop(key, None)
        return {
            "step": settings,
            "temperature": beta,
            "trainer": {key: value for key, value in trainer.items() if key not in DISPLAY},
            "model": {"dtype": self.config.model.dtype, "trust_remote_code": self.config.model.trust_remote_code},
            "seed": self.config.seed,
            "data": {**arguments, "sha256": list(data.report["sha256"].values())},
            "tokenizer": key_of(folder_hashes(self.tokenizer)),
            "lineage": [key_of(folder_hashes(self._model(target))) for target in lineage],
            "version": version("rsa_lightning"),
        }


def _fit(cli: FitCLI, data: PreferenceData) -> None:
    try:
        cli.trainer.fit(cli.model, data)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stop


def _existing(path: str, key: str) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}: there is no file {path}")
    return Path(path)


def _validation(trainer: L.Trainer) -> str:
    """The figures of the last validation that say how a stage went."""
    wanted = ("val/nll", "val/loss", "val/rewards/accuracies", "val/rewards/margins")
    found = {name: float(trainer.callback_metrics[name]) for name in wanted if name in trainer.callback_metrics}
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "no validation"
