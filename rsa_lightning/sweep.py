"""`rsa sweep`: runs of `rsa align` over a grid of settings, each in its own run directory, equal steps trained once.

OUTPUT/points/<name>/                  the run directory of a point
OUTPUT/cache/                          tokenised data, for all points
OUTPUT/results.csv, results.json       a row for each point and model; OUTPUT/report.md and its figure
"""

import gc
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rsa_lightning.checkpoint import key_of
from rsa_lightning.config import layer_parser, load_layers, merge, nest, overrides, parse
from rsa_lightning.evaluation.comparison import PointRecord, write_comparison
from rsa_lightning.evaluation.figures import require_matplotlib
from rsa_lightning.evaluation.frontier import Rule
from rsa_lightning.manifest import NAME as MANIFEST
from rsa_lightning.parallel.launch import launched
from rsa_lightning.parsing import first_line
from rsa_lightning.pipeline import align
from rsa_lightning.plan import read_config

KEYS = ("align", "output", "grid", "points", "seeds", "select")
OWNED = {
    "output": "output of the sweep",
    "seed": "seeds, a list",
}  # keys of a run that a sweep sets, and instead of what
FAILURES = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)  # of one point; a bug ends the sweep
LONGEST = 100  # characters in the name of a point, which is a folder
EPILOG = """keys of a sweep, each also an option (--output DIR, --seeds [0,1], --select.limit 5):
  align                 layers of rsa align, relative to where the command runs, or its configuration itself
  output                the folder of the sweep
  grid                  KEY: [VALUE, ...] of rsa align (lam, steps.safety.temperature, ...); all combinations are run
  points                NAME: {KEY: VALUE, ...}, further points
  seeds                 every point with each of these seeds
  select.{rule, limit, level}   rule cantelli | cvar | mean | chance: which point to take
Any other option is one of rsa align, for all points (--data.path FILE)."""


@dataclass(frozen=True)
class Point:
    """One run to be: its name, what it sets over the shared configuration, and the whole of it."""

    name: str
    setting: str
    seed: int | None
    overrides: Mapping[str, Any]
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Sweep:
    output: Path
    points: list[Point]
    rule: Rule | None
    draw_figure: bool


def main(arguments: list[str], console: Console | None = None) -> int:
    """Runs every point and compares them. Returns 1 if some point failed, else 0.

    Raises:
        ValueError, FileNotFoundError: in the configuration of the sweep or of any point; nothing is run.
    """
    known, rest = layer_parser("rsa sweep", "[--output DIR] [--KEY VALUE ...]", EPILOG).parse_known_args(arguments)
    given = overrides(rest)
    own = [(key, text) for key, text in given if key.split(".")[0] in KEYS]
    shared = {key: parse(text, f"--{key}") for key, text in given if key.split(".")[0] not in KEYS}
    sweep = read_sweep(load_layers(known.config, own), shared)
    return run_sweep(sweep, console or Console())


def run_sweep(sweep: Sweep, console: Console) -> int:
    """Points in order; what is finished is compared, also when the sweep is interrupted.

    Raises:
        ValueError: several processes were started. A point that fails in one of them would be the next one there, while
            the others wait for it; and all would write the comparison.
    """
    if (started := math.prod(launched())) > 1:
        raise ValueError(
            f"rsa sweep is one process, and {started} were started: run it by itself, or each point as an rsa align "
            "under torchrun or srun"
        )
    if sweep.draw_figure:
        require_matplotlib()
    if sweep.output.is_dir() and (sweep.output / MANIFEST).exists():
        raise ValueError(f"output {sweep.output} is the run directory of one rsa align: choose another --output")
    folders = [sweep.output / "points" / point.name for point in sweep.points]
    records: list[PointRecord] = []
    try:
        for i, (point, folder) in enumerate(zip(sweep.points, folders, strict=True), 1):
            console.rule(f"point {i} of {len(folders)}: {point.name}", align="left")
            records.append(_run(point, folder, folders, console))
            gc.collect()
    finally:
        if records:
            console.rule("sweep", align="left")
            sizes: dict[str, Any] = {"planned": len(sweep.points), "draw_figure": sweep.draw_figure}
            write_comparison(sweep.output, records, sweep.rule, **sizes, console=console)
    return int(any(record.error is not None for record in records))


def _run(point: Point, folder: Path, folders: Sequence[Path], console: Console) -> PointRecord:
    record: dict[str, Any] = {
        "name": point.name,
        "setting": point.setting,
        "seed": point.seed,
        "overrides": point.overrides,
        "folder": folder,
    }
    try:
        return PointRecord(**record, found=align(point.config, console, donors=folders))
    except FAILURES as error:
        console.print(f"{point.name} failed: {error}", style="bold red", soft_wrap=True, markup=False)
        return PointRecord(**record, error=f"{type(error).__name__}: {first_line(error)}")


def read_sweep(config: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> Sweep:
    """Types and checks a sweep, and the configuration of each of its points.

    Args:
        shared: dotted keys of rsa align for all points.

    Raises:
        ValueError, FileNotFoundError: an unknown key, a grid that sets nothing, a point that rsa align does not accept.
    """
    for key in config:
        if key not in KEYS:
            raise ValueError(
                f"{key}: unknown key of a sweep; known are {', '.join(KEYS)}. Keys of rsa align go to align"
            )
    if not isinstance(config.get("output"), str):
        raise ValueError("output: name the folder of the sweep, for example  output: runs/sweep")
    output, seeds = Path(config["output"]), _seeds(config.get("seeds"))
    base = _base(config.get("align"))
    settings = {**_grid(config.get("grid")), **_points(config.get("points"))}
    if len(settings) < len(_grid(config.get("grid"))) + len(_points(config.get("points"))):
        raise ValueError("points: a name is also the name of a point of the grid; choose another")
    if not settings:
        raise ValueError("grid: give keys of rsa align with their values, for example  grid: {lam: [1, 2, 4]}")
    for key, value in (shared or {}).items():
        if any(key in values for values in settings.values()):
            raise ValueError(f"--{key} is set by the grid or by a point of the sweep: change it there")
        _check_key(key, f"--{key}")
        base = merge(base, nest(key, value))
    points = [_point(output, base, name, values, seed) for seed in seeds for name, values in settings.items()]
    rule = _rule(config.get("select"))
    judged = [point.config.get("evaluation") or {} for point in points]
    if rule is not None and not all(evaluation.get("scorer") for evaluation in judged):
        raise ValueError("select needs rewards and costs: set evaluation.scorer")
    return Sweep(output, points, rule, draw_figure=any(evaluation.get("figures", True) for evaluation in judged))


def _point(output: Path, base: Mapping[str, Any], setting: str, values: Mapping[str, Any], seed: int | None) -> Point:
    name = setting if seed is None else f"{setting}_seed-{seed}"
    config = dict(base)
    for key, value in values.items():
        config = merge(config, nest(key, value))
    if seed is not None:
        config["seed"] = seed
    config["output"] = str(output / "points" / name)
    # prepared data is found by path and content: points that read the same files share it
    cache = {"data": {"options": {"cache_dir": str(output / "cache")}}}
    config = merge(cache, config)
    try:
        read_config(config)
    except ValueError as error:
        raise ValueError(f"point {name}: {error}") from error
    return Point(name, setting, seed, values, config)


def _base(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ValueError(
            f"align: give layers of rsa align, such as  align: [configs/quickstart.yaml], or its keys; got {given!r}"
        )
    return load_layers(files)


def _grid(given: Any) -> dict[str, dict[str, Any]]:
    """Every combination of the values, the last key changing fastest."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"grid must be a mapping of keys to lists, got {given!r}")
    for key, listed in given.items():
        _check_key(key, f"grid.{key}")
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"grid.{key} must be a list of values, got {listed!r}")
    combinations = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
    short = _short(list(given))
    names = ["_".join(f"{short[key]}-{_slug(value)}" for key, value in values.items()) for values in combinations]
    taken = [name.lower() for name in names]
    found = {}
    for name, values in zip(names, combinations, strict=True):
        unclear = len(name) > LONGEST or taken.count(name.lower()) > 1
        found[f"{name[:LONGEST]}_{key_of(values)[:6]}" if unclear else name] = values
    return {name: values for name, values in found.items() if values}


def _points(given: Any) -> dict[str, dict[str, Any]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"points must be a mapping of names to settings, got {given!r}")
    for name, values in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
            raise ValueError(f"points: {name!r} is no name for a point: use letters, digits, _, ., + and -")
        if not isinstance(values, Mapping):
            raise ValueError(f"points.{name} must be a mapping of keys of rsa align to values, got {values!r}")
        for key in values:
            _check_key(key, f"points.{name}.{key}")
    return {name: dict(values) for name, values in given.items()}


def _check_key(key: Any, where: str) -> None:
    if not isinstance(key, str):
        raise ValueError(f"{where}: a key of rsa align is text, such as lam or steps.safety.temperature")
    if key in OWNED:
        raise ValueError(f"{where}: use {OWNED[key]}")


def _seeds(given: Any) -> list[int | None]:
    if given is None:
        return [None]
    if not isinstance(given, list) or not given or not all(type(seed) is int for seed in given):
        raise ValueError(f"seeds must be a list of whole numbers, got {given!r}")
    if len(set(given)) < len(given):
        raise ValueError(f"seeds: {given} names one twice")
    return list(given)


def _rule(given: Any) -> Rule | None:
    if given is None:
        return None
    known = ("rule", "limit", "level")
    if not isinstance(given, Mapping) or set(given) - set(known) or not {"rule", "limit"} <= set(given):
        raise ValueError(f"select has the keys {', '.join(known)}, the last not for the rule mean; got {given!r}")
    return Rule(**given)


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The end of each key that no other key has: steps.safety.risk.init_args.tail -> tail"""
    parts = {key: [part for part in key.split(".") if part not in ("steps", "init_args")] or [key] for key in keys}
    found = {}
    for key, words in parts.items():
        others = [other for name, other in parts.items() if name != key]
        length = next(
            (n for n in range(1, len(words)) if all(other[-n:] != words[-n:] for other in others)), len(words)
        )
        found[key] = ".".join(words[-length:])
    return found


def _slug(value: Any) -> str:
    """A value as part of a file name."""
    if isinstance(value, Mapping):
        arguments = [f"{key}-{_slug(item)}" for key, item in (value.get("init_args") or {}).items()]
        value = "-".join([str(value.get("class_path", key_of(value)[:6])).split(".")[-1], *arguments])
    elif isinstance(value, list):
        value = "-".join(map(_slug, value))
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", str(text).split("/")[-1]).strip("-") or "empty"
