"""`python -m benchmarks tail_risk`: the study, or a quick one, or the pilot that its multipliers were chosen by."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.tail_risk import analyse, study
from benchmarks.tail_risk.methods import (
    FULL,
    METHODS,
    PILOT_SCALE,
    QUICK,
    QUICK_METHODS,
    Method,
    Scale,
    models,
    path,
    pilot_methods,
)
from benchmarks.tail_risk.prompts import split_prompts
from rsa_lightning.checkpoint import write_json, write_text

STATE = Path("runs/tail_risk")
PACKAGES = ("rsa_lightning", "lightning", "transformers", "tokenizers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="2 seeds, 4 methods, minutes: to see that it runs")
    parser.add_argument("--pilot", action="store_true", help="multipliers on validation prompts of a seed set aside")
    parser.add_argument("--report", action="store_true", help="run nothing: write the results of the complete seeds")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread, a seed each")
    parser.add_argument("--state", type=Path, help="where what is done is kept, to go on from (default runs/tail_risk)")
    parser.add_argument(
        "--output", type=Path, help="folder of the result files (default: benchmarks/results; with --quick, the state)"
    )


def main(options: argparse.Namespace) -> int:
    """Goes on with what is not done, then writes results, tables and pictures of the seeds that are complete."""
    if options.pilot:
        return _pilot(options.state or STATE.with_name("tail_risk_pilot"))
    scale, methods, state = FULL, METHODS, options.state or STATE
    if options.quick:
        scale, state = QUICK, options.state or STATE.with_name("tail_risk_quick")
        methods = tuple(method for method in METHODS if method.name in QUICK_METHODS)
    output = options.output or (state if options.quick else Path("benchmarks/results"))
    seeds = study.found(state, methods, scale) if options.report else study.run(state, methods, scale, options.workers)
    if not seeds:
        raise timing.Refused(f"--report: no seed is complete in {state}; leave --report out to go on with the study")
    command = "python -m benchmarks tail_risk" + (" --quick" if options.quick else "")
    write(results(seeds, methods, scale, command), methods, output)
    print(f"{output / 'tail_risk.md'}: {len(seeds)} seeds")
    return 0


def results(seeds: analyse.Seeds, methods: Sequence[Method], scale: Scale, command: str) -> dict[str, Any]:
    """All that is known, as tail_risk.json holds it."""
    prompts = split_prompts()
    first = next(iter(seeds.values()))
    return {
        "command": command,
        "environment": {**timing.environment(torch.device("cpu")), **{name: version(name) for name in PACKAGES}},
        "settings": study.settings(methods, scale),
        "prompts": {split: len(found) for split, found in prompts.items()},
        "parameters": first["warmup"]["training"]["parameters"],
        "steps": first["reward_dpo"]["training"]["steps"],
        "seconds": seconds(seeds, methods),
        "matched": analyse.matched(seeds, methods),
        "selection": analyse.selection(seeds, methods),
        "averages": analyse.averages(seeds),
        "seeds": seeds,
    }


def seconds(seeds: analyse.Seeds, methods: Sequence[Method]) -> dict[str, float]:
    """Wall-clock of all seeds by part, on a machine that did other work, too."""
    kinds = {model.name: model.kind for model in models(methods)}
    parts = dict.fromkeys([*kinds.values(), "measuring"], 0.0)
    for found in seeds.values():
        for name, one in found.items():
            parts[kinds[name]] += one["training"]["seconds"]
            parts["measuring"] += one["measured"]["seconds"]
    return {part: round(value, 1) for part, value in parts.items()}


def write(found: dict[str, Any], methods: Sequence[Method], output: Path) -> None:
    """tail_risk.json, tail_risk.md and the pictures."""
    from benchmarks.tail_risk import figures, report  # it brings matplotlib

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "tail_risk.json", found)
    write_text(output / "tail_risk.md", report.markdown(found, methods))
    figures.draw(found, methods, output)


def _pilot(state: Path) -> int:
    """Prints what each multiplier gives on validation prompts."""
    methods = pilot_methods()
    seeds = study.run(state, methods, PILOT_SCALE)
    for method in methods:
        for name in path(method):
            told = [found[name]["measured"]["splits"]["validation"] for found in seeds.values()]
            reward, kl = (statistics.fmean(one[key] for one in told) for key in ("reward", "kl"))
            print(json.dumps({"model": name, "reward": round(reward, 3), "kl": round(kl, 3)}), file=sys.stdout)
    return 0
