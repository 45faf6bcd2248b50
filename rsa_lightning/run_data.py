"""The data of a run: which files each step learns from, and how they are read; each data set once."""

import dataclasses
from pathlib import Path
from typing import Any

from rsa_lightning.checkpoint import key_of
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.formats import CRITERIA as TWO_LABELS
from rsa_lightning.data.readers import Source, fingerprint
from rsa_lightning.hub import is_hub_name
from rsa_lightning.kinds import SOURCES
from rsa_lightning.labels import check_pairs
from rsa_lightning.plan import AlignConfig, StepConfig
from rsa_lightning.policy_stage import PolicyStage
from rsa_lightning.steps import CRITERIA, early_steps, is_late, label_steps, labelled_data, sources_of


class RunData:
    """The data sets of a run's steps.

    Args:
        config: of the run.
        inputs: folder of what the run makes for itself: generated data, and the cache of tokens.

    Attributes:
        files: source -> file, of every source that some step learns from, and `prompts` where they are given.
        tokenizer: its folder; set once the run knows it.

    Raises:
        ValueError, FileNotFoundError: a step has no data, or there is no such file; the step or key is named.
    """

    def __init__(self, config: AlignConfig, inputs: Path) -> None:
        self.config, self.inputs = config, inputs
        self.files = self._find_files()
        self.tokenizer = ""
        self._modules: dict[str, PreferenceData] = {}

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

    def arguments(self, step: StepConfig) -> dict[str, Any]:
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

    def of(self, step: StepConfig) -> PreferenceData:
        """A step's data, read and tokenised once per run."""
        arguments = self.arguments(step)
        key = key_of(arguments)
        if key not in self._modules:
            data = PreferenceData(**arguments)
            data.setup()
            self._modules[key] = data
        return self._modules[key]

    def read(self, name: str, step: StepConfig, stage: PolicyStage | None = None) -> None:
        try:
            data = self.of(step)
            if step.kind == "label":
                check_pairs(data)
            if stage is not None:
                stage.read_data(data)
        except ValueError as error:
            raise ValueError(f"steps.{name}: {error}") from error

    def criteria(self) -> dict[str, PreferenceData]:
        """One data set per source of pairs that some step uses, split and tokenised as in training."""
        found = {}
        for source in SOURCES[1:]:
            steps = early_steps(self.config).values()
            users = [step for step in steps if source in sources_of(step, self.config.data)[0]]
            if users:
                options = {**sources_of(users[-1], self.config.data)[1], "source": source}
                options["relabel"] = None  # pairs are judged as their source has labelled them
                found[source] = self.of(dataclasses.replace(users[-1], data=options))
        return found

    def fingerprints(self) -> dict[str, Any]:
        """Where every source came from, and the hashes of what was read there."""
        revision = self.config.data.options.get("revision")
        return {
            name: {"path": path, "sha256": fingerprint(Source(path, revision=revision))}
            for name, path in self.files.items()
        }


def _existing(path: str, key: str, pinned: bool = False) -> str:
    """The path, if something is there; a name of the hub passes if its revision is pinned."""
    if Path(path).exists() or (pinned and is_hub_name(path)):
        return path
    hint = ": a data set of the hub needs data.options.revision, the commit" if is_hub_name(path) else ""
    raise FileNotFoundError(f"{key}: there is no file {path}{hint}")
