"""All models of all seeds, one after another: each is trained and measured once, and what is done stays done.

STATE/seed_0/data, tokenizer, cache      what the seed makes for itself
STATE/seed_0/models/NAME, NAME.json      a model, and how it was trained
STATE/seed_0/scores/NAME.npz, NAME.json  a few numbers of each of its answers, and their statistics

Every file appears whole or not at all, so that a run may be killed at any moment: the same command goes on with the
first model that is not there. A model depends on its seed, its settings and the models it starts from, not on what was
made before it.
"""

import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.tail_risk.measure import Reader, measure, save, statistics
from benchmarks.tail_risk.methods import BETA, LEARNERS, TAIL, THRESHOLD, Method, Model, Scale, models
from benchmarks.tail_risk.train import Workshop
from benchmarks.timing import Refused
from rsa_lightning.checkpoint import write_json


def run(state: Path, methods: Sequence[Method], scale: Scale, workers: int = 1) -> dict[str, Any]:
    """Does what is not done yet, and returns every model's record by seed.

    Raises:
        Refused: the folder holds the state of another study.
    """
    _claim(state, methods, scale)
    if workers == 1:
        for seed in scale.seeds:
            run_seed(state, methods, scale, seed)
    else:
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers) as pool:
            pool.starmap(run_seed, [(state, methods, scale, seed) for seed in scale.seeds], chunksize=1)
    return found(state, methods, scale)


def run_seed(state: Path, methods: Sequence[Method], scale: Scale, seed: int) -> None:
    """One seed, in this process, with one thread."""
    torch.set_num_threads(1)
    _quiet()
    shop = Workshop(state / f"seed_{seed}", seed, scale)
    for model in models(methods):
        told = shop.make(model)
        figures = assess(shop, model)
        if figures.pop("fresh", False):
            test = figures["splits"].get("test") or figures["splits"]["validation"]
            print(
                f"seed {seed} {model.name}: reward {test['reward']:.2f}, cost {test['cost']:.2f}, "
                f"CVaR 5 % {test['cvar_0.05']:.1f}, KL {test['kl']:.2f}; "
                f"{told['seconds']:.0f} + {figures['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def assess(shop: Workshop, model: Model) -> dict[str, Any]:
    """The statistics of a model on every split, drawn and scored unless that is done."""
    record = shop.folder / "scores" / f"{model.name}.json"
    if record.exists():
        return json.loads(record.read_text())
    record.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    reader, origin = Reader(shop.model(model.name)), Reader(shop.model("warmup"))
    logps = dict(shop.scale.logps)
    splits = {
        split: measure(reader, origin, shop.prompts[split], count, logps[split], seed=shop.seed)
        for split, count in shop.scale.answers
    }
    save(record.with_suffix(".npz"), splits)
    figures: dict[str, Any] = {"splits": {split: statistics(scores, BETA) for split, scores in splits.items()}}
    figures["seconds"] = round(time.perf_counter() - start, 2)
    write_json(record, figures)
    return {**figures, "fresh": True}


def found(state: Path, methods: Sequence[Method], scale: Scale) -> dict[str, Any]:
    """seed -> model -> how it was trained and what it does; only seeds that are complete."""
    seeds: dict[str, Any] = {}
    for seed in scale.seeds:
        folder = state / f"seed_{seed}"
        names = [model.name for model in models(methods)]
        if all((folder / "scores" / f"{name}.json").exists() for name in names):
            seeds[str(seed)] = {
                name: {
                    "training": json.loads((folder / "models" / f"{name}.json").read_text()),
                    "measured": json.loads((folder / "scores" / f"{name}.json").read_text()),
                }
                for name in names
            }
    return seeds


def settings(methods: Sequence[Method], scale: Scale) -> dict[str, Any]:
    """Everything that the numbers depend on, as JSON holds it."""
    told = {
        "scale": asdict(scale),
        "beta": BETA,
        "tail": TAIL,
        "threshold": THRESHOLD,
        "learners": {name: [repr(loss), repr(risk)] for name, (loss, risk) in LEARNERS.items()},
        "methods": [asdict(method) for method in methods],
    }
    return json.loads(json.dumps(told))


def _claim(state: Path, methods: Sequence[Method], scale: Scale) -> None:
    """Writes the settings beside the state, or holds them against those that are there."""
    state.mkdir(parents=True, exist_ok=True)
    file, mine = state / "settings.json", settings(methods, scale)
    if file.exists() and json.loads(file.read_text()) != mine:
        theirs = json.loads(file.read_text())
        changed = ", ".join(key for key in mine if theirs.get(key) != mine[key])
        raise Refused(f"--state {state} holds a study with other settings ({changed}): choose another folder")
    if not file.exists():
        write_json(file, mine)


def _quiet() -> None:
    """Two hundred trainings: what Lightning and transformers say of each would hide the one line that matters."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_utilities", "rsa_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
