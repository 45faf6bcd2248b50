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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from rsa_lightning import stories
from rsa_lightning.checkpoint import folder_hashes, key_of, write_json
from rsa_lightning.config import dump
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.readers import fingerprint, read_rows
from rsa_lightning.data.tokenize import pad_id
from rsa_lightning.evaluation.generate import Sampling, generate
from rsa_lightning.evaluation.preference import pair_stats, summarise
from rsa_lightning.evaluation.report import ModelRecord, print_results, write_report
from rsa_lightning.evaluation.score import load_scorer, score
from rsa_lightning.fit import FitCLI
from rsa_lightning.models import PolicySpec, load_policy
from rsa_lightning.parsing import plain_message
from rsa_lightning.plan import BASE, SOURCES, AlignConfig, StepConfig, fit_config, read_config, sources_of

MANIFEST = "manifest.json"
FORMAT = 1
PACKAGES = ("rsa_lightning", "torch", "lightning", "transformers", "datasets", "torchmetrics", "jsonargparse", "safetensors")


def align(config: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Runs what a configuration asks for and returns the content of results.json.

    Finished steps whose configuration, data and start are unchanged are reused; every decision is printed.

    Raises:
        ValueError, FileNotFoundError: in the configuration or the data, before anything is trained.
    """
    return Run(read_config(config), dict(config), console or Console()).execute()


class Run:
    """One run directory and the steps that fill it."""

    def __init__(self, config: AlignConfig, given: dict[str, Any], console: Console) -> None:
        self.config, self.given, self.console = config, given, console
        self.folder = Path(config.output)
        self.manifest = _read_manifest(self.folder)
        self.files: dict[str, Path] = {}  # source -> file
        self.tokenizer: str | None = config.model.tokenizer or config.model.model

    def execute(self) -> dict[str, Any]:
        # everything that can be wrong with the configuration is found before the run directory is touched
        self._find_files()
        if self.config.evaluation.scorer:
            load_scorer(self.config.evaluation.scorer)
        runners = {name: self._prepare(name, step) for name, step in self.config.steps.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note(config=self.given, versions={name: version(name) for name in PACKAGES}, seed=self.config.seed)
        self._make_inputs()
        for name, cli in runners.items():
            self._train(name, self.config.steps[name], cli)
        return self._evaluate()

    # ------------------------------------------------------------------ inputs

    def _find_files(self) -> None:
        """The file of every source that a step learns from, and the tokenizer's folder."""
        data, inputs = self.config.data, self.folder / "inputs"
        for name, step in self.config.steps.items():
            try:
                names, _ = sources_of(step, data)
            except ValueError as error:
                raise ValueError(f"steps.{name}: {error}") from error
            for source in names if data.stories is None else ():
                self.files[source] = _existing(getattr(data, source), f"data.{source}")
        if data.prompts is not None:
            self.files["prompts"] = _existing(data.prompts, "data.prompts")
        if data.stories is not None:
            self.files = {name: inputs / f"{name}.jsonl" for name in (*SOURCES, "prompts")}
        self.trains_tokenizer = self.tokenizer is None
        self.tokenizer = self.tokenizer or str(inputs / "tokenizer")

    def _make_inputs(self) -> None:
        """Writes what the run makes for itself: the generated world, and a tokenizer trained on the first step's data."""
        (self.folder / "inputs").mkdir(exist_ok=True)
        if self.config.data.stories is not None:
            world = stories.build(self.config.seed, **dataclasses.asdict(self.config.data.stories))
            for path, rows in zip(self.files.values(), world, strict=True):
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        if self.trains_tokenizer:
            data = PreferenceData(**self._data(next(iter(self.config.steps.values()))))
            data.setup()
            data.tokenizer.save_pretrained(self.tokenizer)
        self._note(data={name: {"path": str(path), "sha256": fingerprint(path)} for name, path in self.files.items()})

    def _data(self, step: StepConfig, **more: Any) -> dict[str, Any]:
        """Arguments of PreferenceData for a step."""
        names, options = sources_of(step, self.config.data)
        paths = [str(self.files[name]) for name in names]
        shape = "demonstration" if names == ("demonstrations",) else self.config.data.format
        shared = {"seed": self.config.seed, "format": shape, **self.config.data.options}
        return {"path": paths[0] if len(paths) == 1 else paths, **shared, **options, **more}

    # ------------------------------------------------------------------- steps

    def _prepare(self, name: str, step: StepConfig) -> FitCLI:
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
        """The model folder of a step, of the base model (None when that is made from a configuration), or the folder itself."""
        if name == BASE:
            return self.config.model.model
        return str(self.folder / name / "model") if name in self.config.steps else name

    def _policy(self, start: str) -> dict[str, Any]:
        model = self._model(start)
        spec = self.config.model if model is None else dataclasses.replace(self.config.model, config=None, model=model)
        if model is None:
            spec = dataclasses.replace(spec, seed=self.config.seed)
        return dataclasses.asdict(dataclasses.replace(spec, tokenizer=self.tokenizer if start == BASE else None))

    def _train(self, name: str, step: StepConfig, cli: FitCLI) -> None:
        folder = self.folder / name
        inputs = self._inputs_of(name, step, cli)
        finished = self.manifest.get("steps", {}).get(name)
        why = _why_again(finished, inputs, folder)
        if why is None:
            self.console.print(f"[bold]{name}[/]: reused (same configuration, data and start)")
            return
        self.console.print(f"[bold]{name}[/]: {why}")
        self._note(steps={key: value for key, value in self.manifest.get("steps", {}).items() if key != name})
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.yaml").write_text(f"# Run: rsa fit -c {folder / 'config.yaml'}\n{cli.dump()}", encoding="utf-8")
        L.seed_everything(self.config.seed, verbose=False)
        started = time.time()
        cli.trainer.fit(cli.model, cli.datamodule)
        if not (folder / "model").is_dir():
            raise RuntimeError(f"steps.{name}: training was interrupted; run the same command again to repeat this step")
        seconds = time.time() - started
        entry = {
            "key": key_of(inputs),
            "inputs": inputs,
            "start": self._neighbours(name)[0],
            "reference": None if step.kind == "warmup" else self._neighbours(name)[1],
            "temperature": getattr(getattr(cli.model, "loss", None), "beta", None),
            "optimizer_steps": cli.trainer.global_step,
            "seconds": round(seconds, 1),
            "data": cli.datamodule.report,
            "model": folder_hashes(folder / "model"),
        }
        self._note(steps=self.manifest.get("steps", {}) | {name: entry})
        self.console.print(f"  {cli.trainer.global_step} steps in {seconds:.0f} s; {_validation(cli.trainer)}", soft_wrap=True)

    def _inputs_of(self, name: str, step: StepConfig, cli: FitCLI) -> dict[str, Any]:
        """Everything that decides a step's model; paths are replaced by the hashes of what they hold."""
        start, reference = self._neighbours(name)
        data = self._data(step)
        paths = [data.pop("path")] if isinstance(data["path"], str) else data.pop("path")
        lineage = [start] if step.kind == "warmup" else [start, reference]
        return {
            "step": dataclasses.asdict(dataclasses.replace(step, start=None, reference=None)),
            "temperatures": [self.config.beta, self.config.lam, self.config.parametrization],
            "model": dataclasses.asdict(self.config.model),
            "trainer": self.config.trainer,
            "seed": self.config.seed,
            "data": {**data, "sha256": [fingerprint(path) for path in paths]},
            "tokenizer": key_of(folder_hashes(str(self.tokenizer))),
            "lineage": [key_of(folder_hashes(str(self._model(target)))) if self._model(target) else BASE for target in lineage],
            "version": version("rsa_lightning"),
        }

    # -------------------------------------------------------------- evaluation

    def _evaluate(self) -> dict[str, Any]:
        prompts = self._prompts()
        records = [self._evaluate_step(name, prompts) for name in self.config.steps]
        found = write_report(
            self.folder,
            records,
            show_examples=self.config.evaluation.show_examples,
            resamples=self.config.evaluation.resamples,
            seed=self.config.seed,
        )
        print_results(found, self.console)
        self.console.print(f"report: {self.folder / 'report.md'}")
        return found

    def _evaluate_step(self, name: str, prompts: dict[str, str]) -> ModelRecord:
        """Samples and judgements of one step's model; kept when nothing they depend on has changed."""
        wanted, folder, origin = self.config.evaluation, self.folder / name, self._origin(name)
        key = key_of(
            {
                "model": self.manifest["steps"][name]["model"],
                "origin": folder_hashes(origin),
                "evaluation": dataclasses.asdict(wanted),
                "prompts": prompts,
                "data": {source: entry["sha256"] for source, entry in self.manifest["data"].items()},
                "options": self.config.data.options,
            }
        )
        samples, judged = folder / "samples.jsonl", folder / "preference.json"
        done = self.manifest.get("evaluations", {}).get(name) == key and samples.exists() and judged.exists()
        if not done:
            self.console.print(f"[bold]{name}[/]: {len(prompts) * wanted.samples_per_prompt} answers are sampled and scored")
            samples.unlink(missing_ok=True)
            generate(folder / "model", prompts, samples, start_folder=origin, sampling=self._sampling(), device=_device())
            score(samples, wanted.scorer)
            write_json(judged, self._judge(folder / "model", origin) if wanted.pairs else {})
            self._note(evaluations=self.manifest.get("evaluations", {}) | {name: key})
        preference = json.loads(judged.read_text(encoding="utf-8"))
        start = self._neighbours(name)[0]
        return ModelRecord(name, samples, start=start if start in self.config.steps else None, preference=preference or None)

    def _origin(self, name: str) -> str:
        """The model that alignment started from: back along `start` to the last one that is not an alignment step's."""
        while name in self.config.steps and self.config.steps[name].kind != "warmup":
            start = self._neighbours(name)[0]
            if start == BASE and self.config.model.model is None:
                return str(self._model(name))  # nothing before it was ever written: measure from its own model
            name = start
        return str(self._model(name))

    def _prompts(self) -> dict[str, str]:
        if "prompts" in self.files:
            return {str(row["prompt_id"]): str(row["prompt"]) for _, row in read_rows(self.files["prompts"])}
        held_out = [pair for data in self._criteria().values() for pair in data.validation_pairs]
        unique = {pair.prompt: pair.row_id for pair in held_out}
        step = max(1, len(unique) // self.config.evaluation.prompts)  # spread over all sources
        return {row_id: prompt for prompt, row_id in list(unique.items())[::step][: self.config.evaluation.prompts]}

    def _criteria(self) -> dict[str, PreferenceData]:
        """One data set per source of pairs that some step uses, split as in training."""
        if not hasattr(self, "_criteria_data"):
            self._criteria_data = {}
            for source in ("helpful", "safety"):
                users = [step for step in self.config.steps.values() if source in sources_of(step, self.config.data)[0]]
                if users:
                    step = dataclasses.replace(users[-1], data=_only(users[-1].data, source))
                    self._criteria_data[source] = PreferenceData(**self._data(step, tokenizer=self.tokenizer))
                    self._criteria_data[source].setup()
        return self._criteria_data

    def _judge(self, model: Path, origin: str) -> dict[str, Any]:
        """Held-out and training pairs of every criterion, judged by a model relative to the origin."""
        policy, start = (load_policy(PolicySpec(model=str(folder))).to(_device()) for folder in (model, origin))
        wanted, found = self.config.evaluation, {}
        for criterion, data in self._criteria().items():
            found[criterion] = {}
            for split, pairs, examples in (
                ("held_out", data.validation_pairs, data.validation_examples),
                ("training", data.train_pairs, data.train_examples),
            ):
                ids = {prompt: i for i, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs[: wanted.pairs]))}
                stats = pair_stats(policy, start, examples[: wanted.pairs], pad_id(data.tokenizer), _risk(self.config))
                clusters = [ids[pair.prompt] for pair in pairs[: wanted.pairs]]
                found[criterion][split] = summarise(stats, clusters, wanted.resamples, self.config.seed)
        return found

    def _sampling(self) -> Sampling:
        names = [f.name for f in dataclasses.fields(Sampling)]
        asked = dataclasses.asdict(self.config.evaluation)
        options = {key: asked[key] for key in names if key in asked}
        return Sampling(**options, seed=self.config.seed, max_prompt_length=self._max_prompt_length())

    def _max_prompt_length(self) -> int:
        step = next(iter(self.config.steps.values()))
        return PreferenceData(**self._data(step)).lengths.max_prompt_length

    def _note(self, **entries: Any) -> None:
        """Adds to the manifest; the file on disk is always whole."""
        self.manifest = {"format": FORMAT, **self.manifest, **entries}
        write_json(self.folder / MANIFEST, self.manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an earlier run in this folder, {} for a new one.

    Raises:
        ValueError: the folder holds something else, or a manifest that cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"output {folder} exists and is not a run directory (no {MANIFEST}): choose another with --output DIR")
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --output, or remove this run") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}, this version writes {FORMAT}: choose another --output")
    return manifest


def _why_again(finished: dict[str, Any] | None, inputs: dict[str, Any], folder: Path) -> str | None:
    """Why a step must run, in words; None when its model can be reused."""
    if finished is None:
        return "runs"
    before, now = json.loads(json.dumps(finished["inputs"])), json.loads(json.dumps(inputs, default=str))
    changed = [name for name in now if before.get(name) != now[name]]
    if "step" in changed:
        changed = [f"step.{name}" for name in now["step"] if before["step"].get(name) != now["step"][name]] + changed[1:]
    if changed:
        return f"runs again, changed: {', '.join(changed)}"
    if folder_hashes(folder / "model") != finished["model"]:
        return "runs again, the files of its model are not those it wrote"
    return None


def _existing(path: str, key: str) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}: there is no file {path}")
    return Path(path)


def _only(data: Any, source: str) -> dict[str, Any]:
    """A step's data with a single source."""
    return {**(data if isinstance(data, dict) else {}), "source": source}


def _risk(config: AlignConfig) -> Any:
    """The risk measure that judgements report: the last step's, else CVaR's default."""
    from rsa_kernels import CVaR

    return CVaR()


def _validation(trainer: L.Trainer) -> str:
    """The figures of the last validation that say how a stage went."""
    wanted = ("val/nll", "val/loss", "val/rewards/accuracies", "val/rewards/margins")
    found = {name: float(trainer.callback_metrics[name]) for name in wanted if name in trainer.callback_metrics}
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "no validation"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
