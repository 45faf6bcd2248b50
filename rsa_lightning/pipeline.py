"""`rsa align`: the steps of one configuration in order, then evaluation and report, all in one run directory.

RUN/manifest.json                  configuration, versions, data fingerprints, model hashes, lineage
RUN/inputs/                        what the run made for itself: generated data, trained tokenizer
RUN/<step>/                        config.yaml, metrics.csv, samples.jsonl, preference.json, model/, checkpoints/
RUN/results.json, RUN/report.md    and the figures
"""

import dataclasses
import json
import shutil
import sys
import time
from argparse import ArgumentError
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rsa_kernels import CVaR

from rsa_lightning import stories
from rsa_lightning.checkpoint import folder_hashes, key_of, write_json
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.readers import fingerprint, read_rows
from rsa_lightning.data.tokenize import pad_id
from rsa_lightning.evaluation.figures import require_matplotlib
from rsa_lightning.evaluation.generate import Sampling, generate
from rsa_lightning.evaluation.preference import Split, judge
from rsa_lightning.evaluation.report import ModelRecord, print_results, write_report
from rsa_lightning.evaluation.score import load_scorer, score
from rsa_lightning.fit import FitCLI
from rsa_lightning.manifest import Manifest
from rsa_lightning.parsing import plain_message
from rsa_lightning.plan import BASE, SOURCES, AlignConfig, StepConfig, fit_config, read_config, sources_of
from rsa_lightning.stages import AlignmentStage

PACKAGES = ("rsa_lightning", "torch", "lightning", "transformers", "torchmetrics", "jsonargparse", "safetensors")


def align(config: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Runs what a merged configuration asks for and returns the content of results.json.

    Finished steps whose configuration, data and start are unchanged are reused; every decision is printed.

    Raises:
        ValueError, FileNotFoundError: in the configuration, before anything is written or trained.
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
        own = config.model.tokenizer or config.model.model
        self.trains_tokenizer = own is None
        self.tokenizer = own or str(self.inputs / "tokenizer")

    def execute(self) -> dict[str, Any]:
        # everything that can be wrong with the configuration is found before the run directory is touched
        require_matplotlib()
        if self.config.evaluation.scorer:
            load_scorer(self.config.evaluation.scorer)
        runners = {name: self._prepare(name, step) for name, step in self.config.steps.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in PACKAGES}
        self.manifest.note(config=self.given, versions=versions, seed=self.config.seed)
        self._make_inputs()
        for name, cli in runners.items():
            self._train(name, self.config.steps[name], cli)
        risks = [cli.model.risk for cli in runners.values() if isinstance(cli.model, AlignmentStage)]
        return self._evaluate(risks[-1] if risks else CVaR())

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

    def _make_inputs(self) -> None:
        """Writes what the run makes for itself: the generated world, a tokenizer trained on the first step's data."""
        self.inputs.mkdir(exist_ok=True)
        if self.config.data.stories is not None:
            world = stories.build(self.config.seed, **dataclasses.asdict(self.config.data.stories))
            for path, rows in zip(self.files.values(), world, strict=True):
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        if self.trains_tokenizer:
            data = PreferenceData(**self._data(next(iter(self.config.steps.values()))))
            data.setup()
            data.tokenizer.save_pretrained(self.tokenizer)
        prints = {name: {"path": str(path), "sha256": fingerprint(path)} for name, path in self.files.items()}
        self.manifest.note(data=prints)

    def _data(self, step: StepConfig, **more: Any) -> dict[str, Any]:
        """Arguments of PreferenceData for a step."""
        names, options = sources_of(step, self.config.data)
        paths = [str(self.files[name]) for name in names]
        shape = "demonstration" if names == ("demonstrations",) else self.config.data.format
        shared = {"seed": self.config.seed, "format": shape, **self.config.data.options}
        return {"path": paths[0] if len(paths) == 1 else paths, **shared, **options, **more}

    # ------------------------------------------------------------------- steps

    def _prepare(self, name: str, step: StepConfig) -> FitCLI:
        """The trainer, stage and data of a step, checked; nothing is loaded yet."""
        start, reference = self._neighbours(name)
        try:
            config = fit_config(
                step,
                self.config,
                policy=self._policy(start),
                reference=self._model(reference),
                data=self._data(step, tokenizer=self.tokenizer),
                folder=self.folder / name,
                progress_bar=sys.stdout.isatty(),
            )
            return FitCLI(config)
        except (ValueError, OSError, ArgumentError) as error:
            raise ValueError(f"steps.{name}: {plain_message(error)}") from error

    def _neighbours(self, name: str) -> tuple[str, str]:
        """Names (or folders) of a step's start and reference."""
        names = list(self.config.steps)
        step, place = self.config.steps[name], names.index(name)
        start = step.start or (names[place - 1] if place else BASE)
        return start, step.reference or start

    def _model(self, name: str) -> str | None:
        """The model folder of a step or of the base model (None for a fresh one), or the folder itself."""
        if name == BASE:
            return self.config.model.model
        return str(self.folder / name / "model") if name in self.config.steps else name

    def _policy(self, start: str) -> dict[str, Any]:
        model = self._model(start)
        if model is None:
            spec = dataclasses.replace(self.config.model, seed=self.config.seed, tokenizer=self.tokenizer)
        else:
            spec = dataclasses.replace(self.config.model, config=None, model=model)
        return dataclasses.asdict(spec if start == BASE else dataclasses.replace(spec, tokenizer=None))

    def _train(self, name: str, step: StepConfig, cli: FitCLI) -> None:
        folder, inputs = self.folder / name, self._inputs_of(name, step)
        why = self.manifest.why_again(name, inputs, folder / "model")
        if why is None:
            self.console.print(f"[bold]{name}[/]: reused (same configuration, data and start)")
            return
        self.console.print(f"[bold]{name}[/]: {why}")
        self.manifest.put("steps", name, None)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = f"# Run:  rsa fit -c {folder / 'config.yaml'}\n{cli.dump()}"
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        L.seed_everything(self.config.seed, verbose=False)
        started = time.perf_counter()
        cli.trainer.fit(cli.model, cli.datamodule)
        seconds = time.perf_counter() - started
        if not (folder / "model").is_dir():
            raise RuntimeError(
                f"steps.{name}: training was interrupted; run the same command again to repeat this step"
            )
        start, reference = self._neighbours(name)
        self.manifest.finish(
            name,
            inputs,
            folder / "model",
            kind=step.kind,
            start=start,
            reference=None if step.kind == "warmup" else reference,
            temperature=cli.model.loss.beta if isinstance(cli.model, AlignmentStage) else None,
            optimizer_steps=cli.trainer.global_step,
            seconds=round(seconds, 1),
            data=cli.datamodule.report,
        )
        steps = f"{cli.trainer.global_step} steps in {seconds:.0f} s"
        self.console.print(f"  {steps}; {_validation(cli.trainer)}", soft_wrap=True)

    def _inputs_of(self, name: str, step: StepConfig) -> dict[str, Any]:
        """Everything that decides a step's model; paths are replaced by the hashes of what they hold."""
        start, reference = self._neighbours(name)
        lineage = [self._model(target) for target in ([start] if step.kind == "warmup" else [start, reference])]
        data = self._data(step)
        path = data.pop("path")
        data["sha256"] = [fingerprint(file) for file in ([path] if isinstance(path, str) else path)]
        base = {} if lineage[0] and start != BASE else dataclasses.asdict(self.config.model)
        return {
            "step": dataclasses.asdict(dataclasses.replace(step, start=None, reference=None)),
            "temperatures": [self.config.beta, self.config.lam, self.config.parametrization]
            if step.kind != "warmup"
            else None,
            "model": {key: value for key, value in base.items() if key not in ("model", "tokenizer")},
            "trainer": self.config.trainer,
            "seed": self.config.seed,
            "data": data,
            "tokenizer": key_of(folder_hashes(self.tokenizer)),
            "lineage": [key_of(folder_hashes(model)) if model else BASE for model in lineage],
            "version": version("rsa_lightning"),
        }

    # -------------------------------------------------------------- evaluation

    def _evaluate(self, risk: Any) -> dict[str, Any]:
        prompts = self._prompts()
        records = [self._evaluate_step(name, prompts, risk) for name in self.config.steps]
        found = write_report(
            self.folder,
            records,
            show_examples=self.config.evaluation.show_examples,
            resamples=self.config.evaluation.resamples,
            seed=self.config.seed,
        )
        print_results(found, self.console)
        self.console.print(f"report: {self.folder / 'report.md'}", soft_wrap=True)
        return found

    def _evaluate_step(self, name: str, prompts: dict[str, str], risk: Any) -> ModelRecord:
        """Samples and judgements of one step's model; kept when nothing they depend on has changed."""
        wanted, folder, origin = self.config.evaluation, self.folder / name, self._origin(name)
        key = key_of(
            {
                "model": self.manifest.section("steps")[name]["model"],
                "origin": folder_hashes(origin),
                "evaluation": dataclasses.asdict(wanted),
                "risk": risk,
                "prompts": prompts,
                "data": {source: entry["sha256"] for source, entry in self.manifest.section("data").items()},
                "options": self.config.data.options,
            }
        )
        samples, judged = folder / "samples.jsonl", folder / "preference.json"
        if self.manifest.section("evaluations").get(name) != key or not (samples.exists() and judged.exists()):
            self.console.print(
                f"[bold]{name}[/]: {len(prompts) * wanted.samples_per_prompt} answers are sampled and scored"
            )
            samples.unlink(missing_ok=True)
            generate(
                folder / "model", prompts, samples, start_folder=origin, sampling=self._sampling(), device=_device()
            )
            score(samples, wanted.scorer)
            write_json(judged, self._judge(folder / "model", origin, risk))
            self.manifest.put("evaluations", name, key)
        start = self._neighbours(name)[0]
        preference = json.loads(judged.read_text(encoding="utf-8")) or None
        return ModelRecord(name, samples, start=start if start in self.config.steps else None, preference=preference)

    def _judge(self, model: Path, origin: str, risk: Any) -> dict[str, Any]:
        wanted = self.config.evaluation
        if not wanted.pairs or not self._criteria:
            return {}
        return judge(
            model,
            origin,
            {criterion: _splits(data, wanted.pairs) for criterion, data in self._criteria.items()},
            pad_id=pad_id(next(iter(self._criteria.values())).tokenizer),
            risk=risk,
            resamples=wanted.resamples,
            seed=self.config.seed,
            device=_device(),
        )

    def _origin(self, name: str) -> str:
        """The model that alignment started from: back along `start` to the last one that no alignment step made."""
        while name in self.config.steps and self.config.steps[name].kind != "warmup":
            start = self._neighbours(name)[0]
            if (
                self._model(start) is None
            ):  # a fresh base model was never written: measure from the first step's own model
                break
            name = start
        return str(self._model(name))

    def _prompts(self) -> dict[str, str]:
        """Prompt id -> prompt: the file given, or held-out prompts spread over all sources of pairs."""
        if "prompts" in self.files:
            return {str(row["prompt_id"]): str(row["prompt"]) for _, row in read_rows(self.files["prompts"])}
        held_out = [pair for data in self._criteria.values() for pair in data.validation_pairs]
        unique = {pair.prompt: pair.row_id for pair in held_out}
        stride = max(1, len(unique) // self.config.evaluation.prompts)
        chosen = list(unique.items())[::stride][: self.config.evaluation.prompts]
        return {row_id: prompt for prompt, row_id in chosen}

    @cached_property
    def _criteria(self) -> dict[str, PreferenceData]:
        """One data set per source of pairs that some step uses, split and tokenised as in training."""
        found = {}
        for source in SOURCES[1:]:
            users = [s for s in self.config.steps.values() if source in sources_of(s, self.config.data)[0]]
            if users:
                options = {**sources_of(users[-1], self.config.data)[1], "source": source}
                step = dataclasses.replace(users[-1], data=options)
                found[source] = PreferenceData(**self._data(step, tokenizer=self.tokenizer))
                found[source].setup()
        return found

    def _sampling(self) -> Sampling:
        asked = dataclasses.asdict(self.config.evaluation)
        options = {field.name: asked[field.name] for field in dataclasses.fields(Sampling) if field.name in asked}
        first = PreferenceData(**self._data(next(iter(self.config.steps.values()))))
        return Sampling(**options, seed=self.config.seed, max_prompt_length=first.lengths.max_prompt_length)


def _splits(data: PreferenceData, pairs: int) -> dict[str, Split]:
    """The first `pairs` held-out pairs, and as many training pairs."""
    return {
        "held_out": Split([pair.prompt for pair in data.validation_pairs[:pairs]], data.validation_examples[:pairs]),
        "training": Split([pair.prompt for pair in data.train_pairs[:pairs]], data.train_examples[:pairs]),
    }


def _existing(path: str, key: str) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}: there is no file {path}")
    return Path(path)


def _validation(trainer: L.Trainer) -> str:
    """The figures of the last validation that say how a stage went."""
    wanted = ("val/nll", "val/loss", "val/rewards/accuracies", "val/rewards/margins")
    found = {name: float(trainer.callback_metrics[name]) for name in wanted if name in trainer.callback_metrics}
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "no validation"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
