"""The model card of an exported model: a text of what its records say, and of what they do not.

A pure function of plain dicts: the manifest.json and results.json of a run, or what a checkpoint knows of itself. No
number is computed here; figures are printed to four significant digits.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rsa_lightning.evaluation.wording import FURTHER_LABELS, LABELS

NOT_RECORDED = "not recorded"
TRAINED_ON = "trained on"
TAG = "rsa_lightning"
BASE = "base"  # what a run calls the model that it begins with
ALIGNING = ("reward", "safety")  # kinds of steps
UPPER = "unsafe_upper"
HELD_OUT = {"reward_accuracy": "implicit-reward accuracy", "logp_accuracy": "log-probability accuracy", "kl": "KL"}
LINEAGE = ("step", "kind", "starts from", "stays near", "loss", "risk", "temperature", "trained", "optimizer steps")
NEVER = (
    "Anything but the prompts, pairs and scorer named here: neither other languages, longer conversations, adversarial "
    "prompts, nor people.",
    "Other abilities (knowledge, reasoning, code), before and after alignment.",
)
USE = """\
For research on preference alignment, and for comparison with other models of its run. It was trained to prefer some
answers to others in the pairs named above, no more: it may still give harmful, wrong or biased answers, above all on
subjects that these pairs do not touch. "Unsafe" means a cost above 0 under the scorer named here, and scorers err, too.
Measure it on your own prompts before anyone depends on it."""

# of a checkpoint nobody has recorded the pairs by name, a scorer, or an evaluation
USE_UNMEASURED = """\
For research on preference alignment. It is a state of training, perhaps not the last, and no figure of it is known: it
may give harmful, wrong or biased answers, above all on subjects that its training data does not touch. Measure it on
your own prompts before anyone depends on it."""


def step_card(
    name: str,
    manifest: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    *,
    adapter: bool = False,
    base: str | None = None,
    datasets: Sequence[str] = (),
    below: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The card of a finished step of `rsa align`.

    Args:
        name: of the step.
        manifest: the content of manifest.json.
        results: that of results.json; None where the run was not evaluated.
        adapter: of the step's adapter alone.
        base: name of the base model on the hub, where it is from there.
        datasets: names of data sets on the hub.
        below: the folder of the model that the adapter was trained on.
        settings: step -> its config.yaml, of those that have one.
    """
    steps = {key: manifest["steps"][key] for key in _ancestors(name, manifest["steps"])}
    measured = next((model for model in (results or {}).get("models", ()) if model["name"] == name), None)
    scorer = (manifest.get("config", {}).get("evaluation") or {}).get("scorer")
    own = base if not adapter or steps[name].get("start") == BASE else None  # else it is no base of the adapter
    origin = _origin(name, steps, results)
    figures = _measured(measured, origin, manifest) if measured else "Nothing: this model was not evaluated."
    began = "The run began with" if adapter else "Base model"
    if adapter and measured:
        figures = f"Of the base of the adapter with the adapter on it. {figures}"
    parts = [
        _front(steps[name]["kind"], adapter, own, datasets),
        f"# {name}\n\n{_what(name, steps[name], adapter)}",
        "## Lineage\n\n" + _table(LINEAGE, [_lineage(key, entry) for key, entry in steps.items()]),
        *([f"Base of the adapter: {_below(name, manifest, base, below)}"] if adapter else []),
        f"{began}: {_base(manifest, base)}. Seed: {manifest.get('seed', NOT_RECORDED)}. {_processes(steps)}",
        "## Training\n\n" + _training(steps, settings or {}),
        "## Data\n\n" + _data(steps, settings or {}),
        "## Loading\n\n" + _loading(steps[name], adapter),
        "## Measured\n\n" + figures,
        "## Intended use and limits\n\n" + USE,
        "## Not measured\n\n" + _bullets([*_missing(measured, scorer), *NEVER]),
        "## Versions\n\n" + _versions(manifest.get("versions", {})),
    ]
    return "\n\n".join(parts) + "\n"


def checkpoint_card(facts: Mapping[str, Any], *, adapter: bool = False, base: str | None = None) -> str:
    """The card of a model that was made of a checkpoint: what is known without the records of a run.

    Args:
        facts: what is shown, by name, in this order.
        adapter: of the adapter alone.
        base: name of the base model on the hub, where it is from there.
    """
    stage, thing = facts.get("stage") or "", "The LoRA adapter" if adapter else "The model"
    missing = "Rewards, costs, unsafe rate, KL and accuracies: no figure is known, a checkpoint holds none."
    parts = [
        _front(stage.removesuffix("Alignment").lower(), adapter, base, ()),
        f"# {stage or 'policy'}\n\n{thing} of a checkpoint of training by rsa_lightning, without the records of a run.",
        "## What is known\n\n" + _table(("", ""), [(name, _text(value)) for name, value in facts.items()]),
        "## Intended use and limits\n\n" + USE_UNMEASURED,
        "## Not measured\n\n" + _bullets([missing, *NEVER[1:]]),
    ]
    return "\n\n".join(parts) + "\n"


def short(name: str) -> str:
    """A local folder or file by its last two names, as the rest is of one machine alone; any other name as it is."""
    path = PurePath(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def is_ours(text: str) -> bool:
    """Whether a card was written here: the tag in its front matter says so."""
    front = text.split("---\n")[1] if text.startswith("---\n") else ""
    return f"- {TAG}" in front.splitlines()


def number(value: float) -> str:
    """Four significant digits; whole numbers whole."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


# ---------------------------------------------------------------------- parts


def _front(kind: str, adapter: bool, base: str | None, datasets: Iterable[str]) -> str:
    """The YAML that the hub reads; strings are written as JSON, which is YAML."""
    tags = [TAG, "preference-alignment", *([kind] if kind else []), *(["lora"] if adapter else [])]
    lines = [f"library_name: {'peft' if adapter else 'transformers'}"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    lines += ["datasets:", *(f"- {json.dumps(name)}" for name in datasets)] if datasets else []
    return "\n".join(["---", *lines, "---"])


def _what(name: str, entry: Mapping[str, Any], adapter: bool) -> str:
    thing = "The LoRA adapter" if adapter else "The model"
    return f"{thing} of the step `{name}` ({entry['kind']}) of a run of `rsa align`, trained or made by rsa_lightning."


def _ancestors(name: str, steps: Mapping[str, Any]) -> list[str]:
    """A step and every step that its model goes back to, as they were run."""
    found: set[str] = set()
    waiting: list[Any] = [name]
    while waiting:
        key = waiting.pop()
        if key in steps and key not in found:
            found.add(key)
            asked = steps[key].get("inputs", {}).get("step") or {}
            waiting += [steps[key].get("start"), steps[key].get("reference"), asked.get("adapter")]
            waiting += asked.get("models") or ()
    return [key for key in steps if key in found]


def _lineage(name: str, entry: Mapping[str, Any]) -> list[str]:
    settings = (entry.get("inputs") or {}).get("step") or {}
    aligned = entry.get("temperature") is not None
    trained = entry.get("made") or _trained((entry.get("inputs") or {}).get("adapter"))
    return [
        name,
        entry["kind"],
        short(entry.get("start") or ""),
        short(entry.get("reference") or ""),
        (_class(settings.get("loss")) + _labels(settings, entry)) if aligned else "",
        _class(settings.get("risk")) if aligned else "",
        number(entry["temperature"]) if aligned else "",
        trained,
        str(entry.get("optimizer_steps", "")),
    ]


def _class(setting: Any) -> str:
    """A class with its arguments, as the configuration names it."""
    if not isinstance(setting, Mapping):
        return str(setting or "the stage's default").split(".")[-1]
    arguments = ", ".join(f"{key}={_plain(value)}" for key, value in (setting.get("init_args") or {}).items())
    return f"{str(setting.get('class_path', 'default')).split('.')[-1]}({arguments})"


def _plain(value: Any) -> str:
    return short(value) if isinstance(value, str) else str(value)


def _labels(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    if settings.get("cost_transform") is None:
        return ""
    return f", labels from {_class(settings['cost_transform'])} at scale {number(entry['label_scale'])}"


def _trained(adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return "all weights"
    below = f" on {adapter['quantize']} weights" if adapter.get("quantize") else ""
    return f"LoRA of rank {adapter.get('rank', 'its start')}{below}"


def _base(manifest: Mapping[str, Any], base: str | None) -> str:
    given = (manifest.get("config") or {}).get("model") or {}
    if base or given.get("model"):
        revision = f", revision {given['revision']}" if given.get("revision") else ""
        return f"`{short(base or given['model'])}`{revision}"
    if given.get("config"):
        return f"a fresh {given['config'].get('model_type')} made by the run, not pretrained"
    return NOT_RECORDED


def _below(name: str, manifest: Mapping[str, Any], base: str | None, folder: str | None) -> str:
    """What an adapter lies on, as the run recorded it."""
    lies, start = PurePath(folder or ""), manifest["steps"][name].get("start")
    found = manifest["steps"].get(lies.parent.name) if lies.name == "model" else None
    if found is not None:
        weights = {file: digest for file, digest in (found.get("model") or {}).items() if file.endswith(".safetensors")}
        told = ", ".join(f"`{file}` with SHA-256 `{digest}`" for file, digest in weights.items())
        model = f"the model of the step `{lies.parent.name}` of this run ({told or NOT_RECORDED})"
    else:
        model = _base(manifest, base) if start == BASE else f"`{short(folder or start or NOT_RECORDED)}`"
    return f"{model}. `adapter_config.json` has the place of it on the machine that trained: give peft yours."


def _processes(steps: Mapping[str, Any]) -> str:
    counts = {key: entry["processes"] for key, entry in steps.items() if "processes" in entry}
    told = ", ".join(f"{key} in {count}" for key, count in counts.items())
    return f"Processes: {told}." if told else "Processes: not recorded."


def _training(steps: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """How each step was optimised, as its config.yaml says: that is the configuration with every default."""
    rows = []
    for name in (name for name in steps if name in settings):
        trainer, model = settings[name].get("trainer") or {}, (settings[name].get("model") or {}).get("init_args") or {}
        pairs = (steps[name].get("inputs") or {}).get("pairs_per_batch", NOT_RECORDED)
        length = f"{trainer.get('max_epochs')} epochs, {trainer.get('max_steps')} steps (-1: no limit)"
        optimizer = _class(model["optimizer"]) if model.get("optimizer") else NOT_RECORDED
        pairs = f"{pairs} x {trainer.get('accumulate_grad_batches', 1)}"
        layout = [_class(trainer.get(key) or NOT_RECORDED) for key in ("precision", "strategy")]
        rows.append([name, optimizer, _schedule(model.get("schedule")), pairs, length, *layout])
    header = ("step", "optimizer", "schedule", "pairs per batch x accumulated", "at most", "precision", "strategy")
    told = f"Precision and strategy are the trainer's; {NOT_RECORDED}: left to its default."
    return f"{_table(header, rows)}\n\n{told}" if rows else f"Optimizer, precision and strategy: {NOT_RECORDED}."


def _schedule(given: Mapping[str, Any] | None) -> str:
    """Of the learning rate."""
    return ", ".join(f"{key} {value}" for key, value in given.items()) if given else "constant rate"


def _data(steps: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, entry in steps.items():
        report, given = entry.get("data") or {}, (settings.get(name) or {}).get("data")
        for path, digest in (report.get("sha256") or {}).items():
            use = _use(path, report, given)
            keys = ("rows", "train_pairs", "validation_pairs")
            counts = [str(report.get(key, "")) if use == TRAINED_ON else "" for key in keys]
            rows.append([name, f"`{path.split('/')[-1]}`", use, *counts, f"`{digest}`"])
    header = ("step", "file", "use", "rows read", "training examples", "held out", "SHA-256")
    return _table(header, rows) if rows else "No step of this lineage records data."


def _use(path: str, report: Mapping[str, Any], given: Mapping[str, Any] | None) -> str:
    """What a file was to a step; its report alone does not tell a validation file from one of training."""
    if given is not None and path == given.get("validation_path"):
        return "validated on"
    if path in report.get("paths", ()):
        return TRAINED_ON if given is not None else "trained or validated on"
    return "kept out of training"


def _loading(entry: Mapping[str, Any], adapter: bool) -> str:
    """How to load it, and what prompts it was trained on."""
    template = (entry.get("data") or {}).get("template")
    if template is None:
        told = (
            "Prompts were given as they are in the data; messages by the tokenizer's chat template, where it has one."
        )
    elif "{" in template:
        told = "Prompts were rendered by a template of the run's own, which is the chat template of the tokenizer."
    else:
        told = f"Prompts were rendered by the template `{short(template)}`, which is the tokenizer's chat template."
    kinds = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    more = "  # with base_model_name_or_path of adapter_config.json set to your base" if adapter else ""
    lines = [f"from {kinds[0]} import {kinds[1]}", "from transformers import AutoTokenizer", ""]
    lines += [f'model = {kinds[1]}.from_pretrained("FOLDER"){more}']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")']
    return "\n".join(["```python", *lines, "```", "", told])


def _figures(entry: Mapping[str, Any], intervals: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[list[str]]:
    """(label, value, interval) of what was measured; `cost_cvar/0.95` is a level of `cost_cvar`."""
    for key, label in names.items():
        outer, _, level = key.partition("/")
        value, interval = entry.get(outer), intervals.get(outer)
        if level:
            value, interval = (value or {}).get(level), (interval or {}).get(level)
        if value is not None:
            yield [label, number(value), f"[{number(interval[0])}, {number(interval[1])}]" if interval else "–"]


def _origin(name: str, steps: Mapping[str, Any], results: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The figures of the model that alignment started from, where that was evaluated, too."""
    origin = name
    while origin in steps and steps[origin]["kind"] in ALIGNING:
        origin = steps[origin].get("start") or BASE
    if origin in steps and steps[origin]["kind"] != "warmup":  # of aligned models, perhaps
        return None
    found = (model for model in (results or {}).get("models", ()) if model["name"] == origin != name)
    return next(found, None)


def _sampling(manifest: Mapping[str, Any]) -> str:
    """How answers were drawn, as far as the configuration says."""
    given = (manifest.get("config", {}).get("evaluation") or {}).get("sampling") or {}
    told = ", ".join(f"{key} {_plain(value)}" for key, value in given.items())
    version = manifest.get("versions", {}).get("rsa_lightning", NOT_RECORDED)
    return f"Sampled with {told or 'no settings given'}; others are the defaults of rsa_lightning {version}."


def _measured(model: Mapping[str, Any], origin: Mapping[str, Any] | None, manifest: Mapping[str, Any]) -> str:
    scorer = (manifest.get("config", {}).get("evaluation") or {}).get("scorer")
    names = {key: label for key, (label, _) in {**LABELS, UPPER: FURTHER_LABELS[UPPER]}.items()}
    about = [f"{model.get('samples', 0)} sampled answers; scorer: {_scorer(scorer)}.", _sampling(manifest)]
    if model.get("unscored"):
        about.append(f"Of them {model['unscored']} were not scored.")
    about.append("Intervals are 95 %, over prompts; they do not hold the variation between training runs.")
    if model.get(UPPER) is not None:
        about.append(f"The {FURTHER_LABELS[UPPER][0]}, is Clopper and Pearson's: one-sided, 95 %, independent answers.")
    figures = _figures(model, model.get("ci95") or {}, names)
    parts = [" ".join(about), _beside(list(figures), names, origin)]
    held_out = {key: found["held_out"] for key, found in (model.get("preference") or {}).items() if "held_out" in found}
    if held_out:
        rows = [
            [criterion, str(found["pairs"]), *figure]
            for criterion, found in held_out.items()
            for figure in _figures(found, found.get("ci95") or {}, HELD_OUT)
        ]
        header = ("held-out pairs of", "pairs", "", "value", "95 % interval")
        parts += [
            "Implicit rewards and KL (nats) are relative to the model that alignment started from.",
            _table(header, rows),
        ]
    return "\n\n".join(parts)


def _beside(figures: list[list[str]], names: Mapping[str, str], origin: Mapping[str, Any] | None) -> str:
    """The figures, and where it was measured those of the model that alignment started from."""
    header = ["", "value", "95 % interval"]
    if origin is None:
        return _table(header, figures)
    started = {label: rest for label, *rest in _figures(origin, origin.get("ci95") or {}, names)}
    header += [f"before alignment (`{origin['name']}`)", "its 95 % interval"]
    return _table(header, [[*row, *started.get(row[0], ["–", "–"])] for row in figures])


def _scorer(scorer: Any) -> str:
    return (scorer if isinstance(scorer, str) else _class(scorer)) if scorer else "none"


def _missing(model: Mapping[str, Any] | None, scorer: Any) -> list[str]:
    """What the records have no figure of."""
    if model is None:
        return ["Rewards, costs, unsafe rate, KL and accuracies: the run has no results of this model."]
    figures = {key: label for key, (label, _) in LABELS.items() if "/" not in key}
    absent = [label for key, label in figures.items() if model.get(key) is None]
    found = [f"{', '.join(absent)}{'' if scorer else ' (no scorer was given)'}."] if absent else []
    if not any("held_out" in split for split in (model.get("preference") or {}).values()):
        found.append("How it judges held-out pairs.")
    found.append("How many answers were cut at max_new_tokens: the records do not say.")
    return [*found, "Other seeds: this is one training run."]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or NOT_RECORDED


def _text(value: Any) -> str:
    if value is None:
        return NOT_RECORDED
    return _class(value) if isinstance(value, Mapping) else _plain(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
