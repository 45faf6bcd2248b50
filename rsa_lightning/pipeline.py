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
from rsa_lightning.data.formats import CRITERIA as TWO_LABELS
from rsa_lightning.data.readers import Source, fingerprint
from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.derived import Derived
from rsa_lightning.fit import FitCLI
from rsa_lightning.hub import is_hub_name
from rsa_lightning.kinds import SOURCES
from rsa_lightning.labels import check_pairs
from rsa_lightning.lineage import Lineage, local
from rsa_lightning.manifest import Manifest
from rsa_lightning.models import PolicySpec, check_spec, load_policy, save_policy
from rsa_lightning.parsing import plain_message
from rsa_lightning.plan import BASE, AlignConfig, StepConfig, read_config
from rsa_lightning.sharing import take_over, trained_inputs
from rsa_lightning.stages import AlignmentStage, PolicyStage
from rsa_lightning.steps import (
    CRITERIA,
    check_adapters,
    check_late,
    early_steps,
    fit_config,
    is_late,
    label_steps,
    labelled_data,
    sources_of,
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
    return Run(read_config(config), dict(config), console or Console(), donors).execute()


class Run:
    """One run directory and the steps that fill it."""

    def __init__(
        self, config: AlignConfig, given: dict[str, Any], console: Console, donors: Sequence[Path] = ()
    ) -> None:
        self.config, self.given, self.console, self.donors = config, given, console, donors
        self.folder = Path(config.output)
        self.inputs = self.folder / "inputs"
        self.manifest = Manifest(self.folder)
        self.files = self._find_files()
        self._data_modules: dict[str, PreferenceData] = {}

    def execute(self) -> dict[str, Any]:
        # everything that can be wrong with the configuration is found before the run directory is touched ...
        stages = self.check()
        assessment = Assessment(self.config, self.folder, self.manifest, self.console)
        # ... and everything wrong with the data before anything is trained
        self.make_inputs()
        alignments = {name: stage for name, stage in stages.items() if isinstance(stage, AlignmentStage)}
        assessment.prepare(self._criteria(), self.files.get("prompts"), self.lineage.model(BASE), alignments)
        betas = {name: self._temperature(name, stages[name]) for name in early_steps(self.config) if name in stages}
        del stages, alignments
        for name, step in self.config.steps.items():
            if step.trains:
                self._train(name, step, betas[name] if name in betas else self._temperature(name))
            else:
                self.derived.run(name, self.data(step) if step.kind == "label" else None)
        steps = self.config.steps.items()
        return assessment.run({name: self._candidate(name, step) for name, step in steps if step.kind != "label"})

    def _temperature(self, name: str, stage: PolicyStage | None = None) -> float | None:
        """Of the step's loss, which may depend on its data."""
        stage = stage or self._build(name).model
        self._read(name, self.config.steps[name], stage)
        return stage.loss.beta if isinstance(stage, AlignmentStage) else None

    def _candidate(self, name: str, step: StepConfig) -> Candidate:
        members = self.lineage.members(name) if step.kind == "mix" else None
        return Candidate(self.lineage.start(name), self.lineage.origin(name), members)

    def check(self) -> dict[str, PolicyStage]:
        """The stage of every step, built from its configuration; the model is fetched if it stands on the hub."""
        check_adapters(self.config)
        self.config = dataclasses.replace(self.config, model=local(self.config.model))
        self.lineage = Lineage(self.config)
        self.tokenizer = self._find_tokenizer()
        self.derived = Derived(self.config, self.lineage, self.manifest, self.console)
        stages = {name: self._build(name).model for name, step in self.config.steps.items() if step.trains}
        for name, stage in stages.items():
            self._check_policy(name, stage.policy_spec)
            if is_late(self.config.steps[name], self.config):
                check_late(name, stage, self._data_arguments(self.config.steps[name]))
        for name in self.config.steps:
            if name not in stages:
                self.derived.check(name)
        return stages

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

    def _find_files(self) -> dict[str, str]:
        """The data of every source that a step learns from, and the prompts where they are given."""
        data = self.config.data
        files: dict[str, str] = {}
        for name, step in self.config.steps.items():
            try:
                names, _ = sources_of(step, data, label_steps(self.config))
            except ValueError as error:
                raise ValueError(f"steps.{name}: {error}") from error
            if data.stories is None and not is_late(step, self.config):
                own = {source: "path" if data.path and source in CRITERIA else source for source in names}
                pinned = "revision" in data.options
                files |= {source: _existing(getattr(data, key), f"data.{key}", pinned) for source, key in own.items()}
        if data.stories is not None:
            return {name: str(self.inputs / f"{name}.jsonl") for name in (*SOURCES, "prompts")}
        return files | ({"prompts": _existing(data.prompts, "data.prompts")} if data.prompts else {})

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
            self._read(name, step)
        self.manifest.note(data=self._fingerprints())

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
            users.setdefault(key_of(self._data_arguments(step)), []).append(name)
        for names in users.values():
            yield ", ".join(names), PreferenceData(**self._data_arguments(self.config.steps[names[0]]))

    def _begin(self) -> None:
        """Makes the run directory, and the story world where there is one."""
        self.inputs.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in PACKAGES}
        self.manifest.note(config=self.given, versions=versions, seed=self.config.seed)
        if self.config.data.stories is not None:
            world = stories.build(self.config.seed, **dataclasses.asdict(self.config.data.stories))
            for path, rows in zip(self.files.values(), world, strict=True):
                write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    @property
    def _trains_tokenizer(self) -> bool:
        return self.tokenizer == str(self.inputs / "tokenizer")

    def _tokenizer_data(self) -> PreferenceData:
        """The data whose training side the run's tokenizer is trained on: that of the first step."""
        first = next(iter(early_steps(self.config).values()))
        return PreferenceData(**self._data_arguments(first) | {"tokenizer": None})

    def _keep_tokenizer(self, data: PreferenceData) -> None:
        data.prepare()
        data.tokenizer.save_pretrained(self.tokenizer)

    def _fingerprints(self) -> dict[str, Any]:
        """Where every source came from, and the hashes of what was read there."""
        revision = self.config.data.options.get("revision")
        return {
            name: {"path": path, "sha256": fingerprint(Source(path, revision=revision))}
            for name, path in self.files.items()
        }

    def _check_vocabularies(self) -> None:
        """Ids must mean the same words in every model of a run."""
        mine = load_tokenizer(self.tokenizer).get_vocab()
        for folder in self.lineage.foreign_models():
            if load_tokenizer(folder).get_vocab() != mine:
                raise ValueError(
                    f"vocabulary mismatch: the model in {folder} has another tokenizer than this run, "
                    f"{self.tokenizer}: set model.tokenizer to {folder}, or start from models of one family"
                )

    def _data_arguments(self, step: StepConfig) -> dict[str, Any]:
        """Arguments of PreferenceData for a step."""
        ours = {
            "seed": self.config.seed,
            "evaluation_prompts": self.files.get("prompts"),
            "tokenizer": self.tokenizer,
            "cache_dir": str(self.inputs / "cache"),
        }
        if is_late(step, self.config):
            return {**ours, **labelled_data(step, self.config)}
        names, options = sources_of(step, self.config.data)
        paths = [self.files[name] for name in names]
        shape = "demonstration" if names == ("demonstrations",) else self.config.data.format
        criterion = self._criterion(names[0], options.get("format", shape))
        shared = {**ours, "format": shape, "criterion": criterion, **self.config.data.options}
        if len(names) > 1:
            # two criteria may judge one pair, alike or not: that neither repeats nor contradicts anything
            shared["defects"] = {"duplicate": "keep", "contradictory": "keep", **(shared.get("defects") or {})}
        return {"path": paths[0] if len(paths) == 1 else paths, **shared, **options}

    def _criterion(self, source: str, shape: str) -> str | None:
        """Which of its two labels a source is, where one data set has both. A step may read it as rated responses."""
        if self.config.data.path is None or (shape not in TWO_LABELS and shape != self.config.data.format):
            return None
        return CRITERIA[source]

    def data(self, step: StepConfig) -> PreferenceData:
        """A step's data, read and tokenised once per run."""
        arguments = self._data_arguments(step)
        key = key_of(arguments)
        if key not in self._data_modules:
            data = PreferenceData(**arguments)
            data.setup()
            self._data_modules[key] = data
        return self._data_modules[key]

    def _read(self, name: str, step: StepConfig, stage: PolicyStage | None = None) -> None:
        try:
            data = self.data(step)
            if step.kind == "label":
                check_pairs(data)
            if stage is not None:
                stage.read_data(data)
        except ValueError as error:
            raise ValueError(f"steps.{name}: {error}") from error

    def _criteria(self) -> dict[str, PreferenceData]:
        """One data set per source of pairs that some step uses, split and tokenised as in training."""
        found = {}
        for source in SOURCES[1:]:
            steps = early_steps(self.config).values()
            users = [step for step in steps if source in sources_of(step, self.config.data)[0]]
            if users:
                options = {**sources_of(users[-1], self.config.data)[1], "source": source}
                options["relabel"] = None  # pairs are judged as their source has labelled them
                found[source] = self.data(dataclasses.replace(users[-1], data=options))
        return found

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
        folder, data = self.folder / name, self.data(step)
        arguments = self._data_arguments(step)
        inputs = trained_inputs(name, beta, self.config, self.lineage, self.tokenizer, arguments, data.report)
        why = self.manifest.why_again(name, inputs, folder / "model")
        if why is None:
            self.console.print(f"[bold]{name}[/]: reused (same configuration, data and start)")
            return
        lineage = {
            "start": self.lineage.start(name),
            "reference": None if step.kind == "warmup" else self.lineage.reference(name),
        }
        if donor := take_over(self.manifest, name, inputs, self.donors, **lineage):
            self._write_config(name, self._build(name))
            told = f"[bold]{name}[/]: taken over from {donor} (same configuration, data and start)"
            self.console.print(told, soft_wrap=True)
            return
        self.console.print(f"[bold]{name}[/]: {why}; {summary(data.report)}", soft_wrap=True)
        self.manifest.forget(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        cli = self._build(name)
        self._write_config(name, cli)
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
            **lineage,
            temperature=beta,
            label_scale=labels.scale if (labels := getattr(cli.model, "labels", None)) else None,
            optimizer_steps=cli.trainer.global_step,
            seconds=round(seconds, 1),
            data=data.report,
        )
        steps = f"{cli.trainer.global_step} steps in {seconds:.0f} s"
        self.console.print(f"  {steps}; {_validation(cli.trainer)}", soft_wrap=True)
        data.trainer = None  # it holds the policy, the reference and the optimizer
        del cli
        gc.collect()

    def _write_config(self, name: str, cli: FitCLI) -> None:
        path = self.folder / name / "config.yaml"
        write_text(path, f"# Run:  rsa fit -c {path}\n{cli.dump()}")


def _fit(cli: FitCLI, data: PreferenceData) -> None:
    try:
        cli.trainer.fit(cli.model, data)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stop


def _existing(path: str, key: str, pinned: bool = False) -> str:
    """The path, if something is there; a name of the hub passes if its revision is pinned."""
    if Path(path).exists() or (pinned and is_hub_name(path)):
        return path
    hint = ": a data set of the hub needs data.options.revision, the commit" if is_hub_name(path) else ""
    raise FileNotFoundError(f"{key}: there is no file {path}{hint}")


def _validation(trainer: L.Trainer) -> str:
    """The figures of the last validation that say how a stage went."""
    wanted = ("val/nll", "val/loss", "val/rewards/accuracies", "val/rewards/margins")
    found = {name: float(trainer.callback_metrics[name]) for name in wanted if name in trainer.callback_metrics}
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "no validation"
