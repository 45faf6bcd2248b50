"""The second half of `rsa align`: every step's model answers, is scored, judges pairs, and the report is written."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rsa_kernels import CVaR, RiskMeasure

from rsa_lightning.checkpoint import folder_hashes, key_of, write_json
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.readers import Source, read_rows
from rsa_lightning.data.records import FormatError, Prompt, as_transcript
from rsa_lightning.data.template import template_text
from rsa_lightning.data.tokenize import EncodedPair, pad_id
from rsa_lightning.evaluation.figures import require_matplotlib
from rsa_lightning.evaluation.folders import Folders
from rsa_lightning.evaluation.generate import check_prompts, generate
from rsa_lightning.evaluation.preference import Split, judge
from rsa_lightning.evaluation.report import ModelRecord, print_results, write_report
from rsa_lightning.evaluation.score import fingerprint, load_scorer, score
from rsa_lightning.manifest import Manifest
from rsa_lightning.plan import AlignConfig
from rsa_lightning.stages import AlignmentStage


class Candidate(NamedTuple):
    """A step's model to be judged.

    Attributes:
        start: the name of what it is compared with.
        origin: the folder of the model that alignment started from.
        members: of a mixture: folder -> weight. Otherwise its model stands in its folder.
    """

    start: str
    origin: str
    members: Mapping[str, float] | None = None


# of the table of what was run
COLUMNS = (
    *("step", "start", "loss", "risk", "labels"),
    *("temperature", "trained", "training pairs", "optimizer steps"),
)


class Assessment:
    """Answers, scores and judgements of a run's models, each kept until something it depends on changes.

    Raises:
        ValueError, ImportError: a scorer that cannot be found, or figures without matplotlib.
    """

    def __init__(self, config: AlignConfig, folder: Path, manifest: Manifest, console: Console) -> None:
        self.config, self.folder, self.manifest, self.console = config, folder, manifest, console
        self.wanted = config.evaluation
        if self.wanted.figures:
            require_matplotlib()
        if self.wanted.scorer:
            load_scorer(self.wanted.scorer)

    def prepare(
        self,
        criteria: Mapping[str, PreferenceData],
        prompts: str | None,
        base: str,
        alignments: Mapping[str, AlignmentStage],
    ) -> None:
        """Reads the prompts and checks them against the base model, so that nothing is trained in vain.

        Args:
            criteria: the data of every criterion, set up.
            prompts: a file of rows {prompt}; without one, held-out prompts are taken.
            alignments: step -> its stage; judgements report the risk measure of the last, and the report shows that of
                those whose loss reads one.
        """
        self.criteria = criteria
        self.risk: RiskMeasure = list(alignments.values())[-1].risk if alignments else CVaR()
        self.reads_risk = {name for name, stage in alignments.items() if stage.loss.reads_risk}
        lengths = {data.lengths.max_prompt_length for data in criteria.values()} or {
            self.wanted.sampling.max_prompt_length
        }
        self.sampling = dataclasses.replace(self.wanted.sampling, max_prompt_length=max(lengths))
        self.prompts = read_prompts(prompts) if prompts else held_out_prompts(criteria, self.wanted.prompts)
        if prompts and self.config.data.format == "hh":  # asked as in training
            self.prompts = {name: as_transcript(str(prompt)) for name, prompt in self.prompts.items()}
        self.template = _template(criteria, self.config.data.options.get("template"))
        check_prompts(base, self.prompts, self.sampling, self.template)

    def run(self, models: Mapping[str, Candidate]) -> dict[str, Any]:
        """Writes results.json, report.md and the figures; `models` is step -> what is judged of it."""
        records = [self._assess(name, candidate) for name, candidate in models.items()]
        found = write_report(
            self.folder,
            records,
            about=self._about(),
            show_examples=self.wanted.show_examples,
            draw_figures=self.wanted.figures,
            resamples=self.wanted.resamples,
            seed=self.config.seed,
        )
        print_results(found, self.console)
        self.console.print(f"report: {self.folder / 'report.md'}", soft_wrap=True)
        return found

    def _about(self) -> list[dict[str, str]]:
        """What was run, from the manifest: one row per step."""
        rows = []
        steps = self.manifest.section("steps")
        for name, entry in ((name, steps[name]) for name in self.config.steps):  # it may remember steps of earlier runs
            if not self.config.steps[name].trains:
                rows.append(_without_training(name, entry))
                continue
            settings = entry["inputs"]["step"]
            beta = "" if entry["temperature"] is None else f"{entry['temperature']:g}"
            cells = (
                f"{name} ({entry['kind']})",
                entry["start"],
                _shown(settings["loss"]) if beta else "",
                _shown(settings["risk"]) if name in self.reads_risk else "",
                _labels(settings.get("cost_transform"), entry.get("label_scale")),
                beta,
                _trained(entry["inputs"].get("adapter")),
                str(entry["data"]["train_pairs"]),
                str(entry["optimizer_steps"]),
            )
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
        return rows

    def _assess(self, name: str, candidate: Candidate) -> ModelRecord:
        folder, (start, origin, members) = self.folder / name, candidate
        model: Folders = folder / "model"
        hashes: Any = folder_hashes(folder / "model")
        if members is not None:
            model = {Path(member): weight for member, weight in members.items()}
            hashes = [[weight, folder_hashes(member)] for member, weight in members.items()]
        weights = {"model": hashes, "origin": folder_hashes(origin)}
        self._answer(name, model, origin, weights)
        preference = self._judge(name, model, origin, weights)
        known = start if start in self.config.steps else None
        return ModelRecord(name, folder / "samples.jsonl", start=known, preference=preference or None)

    def _answer(self, name: str, model: Folders, origin: str, weights: Mapping[str, Any]) -> None:
        """samples.jsonl: drawn again when weights, prompts or sampling changed, scored again when the scorer did."""
        path = self.folder / name / "samples.jsonl"
        drawn = key_of(
            {
                **weights,
                "prompts": self.prompts,
                "template": _template_key(self.template),
                "sampling": dataclasses.asdict(self.sampling),
            }
        )
        if not path.exists() or self._kept(name, "samples") != drawn:
            count = len(self.prompts) * self.sampling.samples_per_prompt
            self.console.print(f"[bold]{name}[/]: {count} answers are sampled")
            generate(
                model,
                self.prompts,
                path,
                start_folder=origin,
                template=self.template,
                sampling=self.sampling,
                device=_device(),
            )
            self._keep(name, samples=drawn, scores=None)
        scores = key_of({"samples": drawn, "scorer": fingerprint(self.wanted.scorer)})
        if self._kept(name, "scores") != scores:
            begun = self._kept(name, "scoring") == scores  # an interrupted scoring goes on where it was
            self._keep(name, scoring=scores, scores=None)
            score(path, self.wanted.scorer, afresh=not begun)
            self._keep(name, scores=scores)

    def _judge(self, name: str, model: Folders, origin: str, weights: Mapping[str, Any]) -> dict[str, Any]:
        """preference.json: held-out and training pairs of every criterion, relative to the origin."""
        path, wanted = self.folder / name / "preference.json", self.wanted
        data = {
            criterion: [module.report["sha256"], module.state_dict()] for criterion, module in self.criteria.items()
        }
        asked = {
            "pairs": wanted.pairs,
            "resamples": wanted.resamples,
            "risk": repr(self.risk),
            "seed": self.config.seed,
        }
        key = key_of({**weights, "data": [[list(sha.values()), state] for sha, state in data.values()], **asked})
        if not path.exists() or self._kept(name, "preference") != key:
            found: dict[str, Any] = {}
            if wanted.pairs and self.criteria:
                found = judge(
                    model,
                    origin,
                    {criterion: _splits(module, wanted.pairs) for criterion, module in self.criteria.items()},
                    pad_id=pad_id(next(iter(self.criteria.values())).tokenizer),
                    risk=self.risk,
                    resamples=wanted.resamples,
                    seed=self.config.seed,
                    device=_device(),
                )
            write_json(path, found)
            self._keep(name, preference=key)
        return json.loads(path.read_text(encoding="utf-8"))

    def _kept(self, name: str, what: str) -> str | None:
        return self.manifest.section("evaluations").get(name, {}).get(what)

    def _keep(self, name: str, **keys: str | None) -> None:
        kept = {**self.manifest.section("evaluations").get(name, {}), **keys}
        self.manifest.put("evaluations", name, {what: key for what, key in kept.items() if key is not None})


def _template(criteria: Mapping[str, PreferenceData], shared: str | None) -> str | None:
    """What prompts are rendered by, as in training. Raises ValueError where the steps render them differently."""
    asked = {data.settings.template for data in criteria.values()} or {shared}
    if len(asked) > 1:
        names = ", ".join(sorted(str(name) for name in asked))
        raise ValueError(
            f"template: the steps render prompts differently ({names}), and all models answer the same prompts: set "
            "data.options.template alone"
        )
    return asked.pop()


def _without_training(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """A row on a step that made something of what was there."""
    known = {
        "step": f"{name} ({entry['kind']})",
        "start": entry["start"] or "",
        "trained": f"nothing: {entry['made']}",
        "training pairs": str(entry["labels"]["pairs"]) if "labels" in entry else "",
    }
    return {column: known.get(column, "") for column in COLUMNS}


def _template_key(template: str | None) -> str | None:
    """What tells two templates apart: of a file its text."""
    return template_text(template) if template is not None and template.endswith(".jinja") else template


def _trained(adapter: Mapping[str, Any] | None) -> str:
    """Which weights a step trained, from what the manifest holds of its adapter."""
    if adapter is None:
        return "all weights"
    ours = ("start", "quantize", "handover", "weights")
    given = ", ".join(f"{key} {value}" for key, value in adapter.items() if key not in ours) or "default settings"
    below = f", {adapter['quantize']} weights below" if adapter["quantize"] else ""
    return f"LoRA ({given}){below}" + (", on frozen adapters" if adapter["handover"] == "stack" else "")


def _labels(transform: Any, scale: float | None) -> str:
    """What a step learns of its pairs: their order, or their costs with the label scale that its temperature holds."""
    return "" if transform is None else f"{_shown(transform)}, scale {scale:.3g}"


def _shown(setting: Any) -> str:
    """A class with its arguments, as a configuration names it; "default" where it names none."""
    if not isinstance(setting, Mapping):
        return str(setting or "default")
    arguments = ", ".join(f"{key}={value}" for key, value in (setting.get("init_args") or {}).items())
    return f"{str(setting.get('class_path', 'default')).split('.')[-1]}({arguments})"


def read_prompts(path: str | Path) -> dict[str, Prompt]:
    """Prompt id -> prompt, from rows {prompt} with an optional `prompt_id`; without one the id is file and row.

    Raises:
        FormatError: a row that is no such object, or an id that occurs twice; named by file and row.
    """
    found: dict[str, Prompt] = {}
    for row_id, row in read_rows(Source(str(path))):
        if isinstance(row, FormatError):
            raise FormatError(f"{row_id}: {row}")
        for column in ("prompt_id", "prompt"):
            if not isinstance(row.get(column, row_id if column == "prompt_id" else None), str):
                raise FormatError(f"{row_id}: column {column!r} must be text, got {row.get(column)!r}")
        name = str(row.get("prompt_id", row_id))
        if name in found:
            raise FormatError(f"{row_id}: the prompt_id {name!r} occurs twice: ids must differ")
        found[name] = str(row["prompt"])
    return found


def held_out_prompts(criteria: Mapping[str, PreferenceData], count: int) -> dict[str, Prompt]:
    """Up to `count` different prompts of the validation splits, spread evenly over all of them."""
    named = {
        prompt: f"{criterion}/{example.row_id}"
        for criterion, data in criteria.items()
        for prompt, example in zip(data.validation_prompts, data.validation_examples, strict=True)
    }
    places = [i * len(named) // min(count, len(named)) for i in range(min(count, len(named)))]
    listed = list(named.items())
    return {listed[i][1]: listed[i][0] for i in places}


def _splits(data: PreferenceData, pairs: int) -> dict[str, Split]:
    """The first `pairs` held-out pairs, and as many training pairs; rated responses are no pairs."""
    sides = {
        "held_out": (data.validation_prompts, data.validation_examples),
        "training": (data.train_prompts, data.train_examples),
    }
    return {name: _first_pairs(prompts, examples, pairs) for name, (prompts, examples) in sides.items()}


def _first_pairs(prompts: Sequence[Prompt], examples: Sequence[EncodedPair], count: int) -> Split:
    both = (i for i in range(len(examples)) if len(examples[i].chosen) and len(examples[i].rejected))
    places = list(islice(both, count))
    return Split([prompts[i] for i in places], [examples[i] for i in places])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
