"""`python -m benchmarks scale`: processes, references, layouts and the cost of a step, each after its agreement.

    python -m benchmarks scale --quick                            # everything at small shapes, in two minutes
    python -m benchmarks scale --output benchmarks/results        # ten minutes: scale_cpu.json, .md, scale_cost.png
    python -m benchmarks scale --device cuda --processes 2        # the same on GPUs
    torchrun ... -m benchmarks scale --device cuda --work DIR     # processes alone, on several nodes

A section whose ways disagree has no figures, and the command then exits with 1.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.kernels.results import write_json
from benchmarks.scale import cached, cost, packing, processes
from benchmarks.scale.cases import PROVIDERS, SIZES, Size
from benchmarks.scale.crew import Team, launched
from benchmarks.scale.goals import name, verdicts
from benchmarks.scale.loops import quietly
from benchmarks.scale.report import page
from benchmarks.timing import Refused, environment, version
from rsa_lightning.parallel.processes import backend_of

SECTIONS = ("processes", "traffic", "references", "layouts", "cost")
QUICK_CACHED = {"hidden": 32, "layers": 1, "vocabulary": 129, "tokens": 16, "prompt": 4, "batch_size": 2}
HSDP = Team(4, sharded=True, replicas=2)  # of which traffic is counted on a CPU

COST = {"cpu": "scale_cost", "cuda": "scale_cost_cuda"}

Found = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--samples", type=int, default=10, help="timed samples per method (default 10)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="with FSDP2 (default 1 2; on GPUs 1 and all there are)"
    )
    parser.add_argument("--replicas", type=int, default=1, help="copies of the sharded model (HSDP)")
    parser.add_argument("--cpu-offload", action="store_true", help="weights and optimizer in the memory of the host")
    parser.add_argument("--sections", choices=SECTIONS, nargs="+", default=SECTIONS, help="default all")
    parser.add_argument("--hh", type=Path, metavar="FILE", help="HH transcripts: layouts on their lengths, too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="seen by all nodes; by default a temporary folder")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write JSON, Markdown and the figure there")


def main(options: argparse.Namespace) -> int:
    """The chosen sections; 1 where something disagrees."""
    torch.set_num_threads(1)
    teams, first = _teams(options), int(os.environ.get("RANK", 0)) == 0
    found: Found = {"op": "scale", "environment": _environment(options.device), "quick": options.quick}
    found |= {"disagreements": [], **{section: [] for section in SECTIONS}, "goals": []}
    with quietly():
        for section in ("processes",) if launched() > 1 else options.sections:
            print(f"{section} ...", file=sys.stderr, flush=True)
            bad, found[section] = _section(section, options, teams)
            found["disagreements"] += bad
            found["load_at_the_end"] = [round(load, 2) for load in os.getloadavg()]
            found["goals"] = [] if options.quick else verdicts(found["references"], found["environment"]["device"])
            if first:
                _write(found, options, teams)  # a run takes long, and may be cut off
    if first:
        print(page(found))
        print("\n".join(found["disagreements"]), file=sys.stderr)
        print(json.dumps({key: found[key] for key in ("op", "environment", "goals")}))
    return 1 if found["disagreements"] else 0


def _section(section: str, options: argparse.Namespace, teams: list[Team]) -> tuple[list[str], list[Found]]:
    """(disagreements, records); a GPU has no section `references`, whose figure is CPU time, nor `traffic`."""
    kind = "quick" if options.quick else options.device.split(":")[0]
    if section == "references":
        return _references(options) if options.device == "cpu" else ([], [])
    if section == "layouts":
        dtype = "float32" if options.device == "cpu" else "bfloat16"
        return packing.run(options.quick, options.device, dtype, options.hh)
    if section == "cost":
        return cost.run(cost.GRIDS[kind], options.device, max(1, min(options.samples, 5)))
    size, providers, samples = SIZES[kind], PROVIDERS, options.samples
    if section == "traffic":  # of replicas, whose times on a CPU would say nothing
        if options.device != "cpu":
            return [], []
        teams, providers, samples = [HSDP], PROVIDERS[:1], 1
    if options.work is None:
        with TemporaryDirectory() as work:
            size.write(Path(work), processes.steps_needed(samples))
            return processes.run(teams, size, providers, samples, Path(work))
    return _together(teams, size, samples, options.work)


def _together(teams: list[Team], size: Size, samples: int, work: Path) -> tuple[list[str], list[Found]]:
    """This process is one of torchrun's, and the first of them writes what all read."""
    if teams[0].device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend_of(torch.device(teams[0].device)))
    if dist.get_rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        size.write(work, processes.steps_needed(samples))
    dist.barrier()
    return processes.run(teams, size, PROVIDERS, samples, work, joined=True)


def _references(options: argparse.Namespace) -> tuple[list[str], list[Found]]:
    shape = QUICK_CACHED if options.quick else {}
    with TemporaryDirectory() as folder:
        try:
            return [], cached.live_and_cached(Path(folder), **shape, samples=options.samples)
        except cached.Disagreement as error:
            return [str(error)], []


def _teams(options: argparse.Namespace) -> list[Team]:
    """One process without FSDP2, then those with it; of processes that are there already those alone.

    Raises:
        Refused: there are not so many GPUs, or they cannot be divided into replicas.
    """
    how = {"device": options.device.split(":")[0], "replicas": options.replicas, "cpu_offload": options.cpu_offload}
    if launched() > 1:
        if options.work is None:
            raise Refused("processes of torchrun need one folder that all of them see: --work DIR")
        counts = [launched()]
    else:
        gpus = torch.cuda.device_count() if how["device"] == "cuda" else 2
        counts = sorted(set(options.processes or (1, gpus)))
        if how["device"] == "cuda" and counts[-1] > gpus:
            raise Refused(f"--processes {counts[-1]}: torch sees {gpus} GPUs, and each process takes one")
    pairs = SIZES["quick" if options.quick else how["device"]].pairs
    for count in counts:
        if count < 1 or count % options.replicas or pairs % count:
            raise Refused(f"--processes {count}: a number that divides {pairs} pairs, and is a multiple of --replicas")
    alone = [] if launched() > 1 else [Team(1, sharded=False, device=how["device"])]
    return alone + [Team(count, sharded=True, **how) for count in counts]


def _environment(device: str) -> Found:
    about = environment(torch.device("cuda" if device != "cpu" else "cpu"))
    return about | {name: version(name) for name in ("lightning", "transformers")}


def _stem(options: argparse.Namespace, team: Team) -> str:
    """Of the names of the files."""
    return name(team.device, team.processes, options.replicas, options.cpu_offload)


def _write(found: Found, options: argparse.Namespace, teams: list[Team]) -> None:
    """What is found so far."""
    if options.output is None:
        return
    stem = _stem(options, teams[-1])
    write_json(options.output / f"{stem}.json", found)
    (options.output / f"{stem}.md").write_text(page(found))
    if found["cost"]:
        from benchmarks.scale.figure import draw  # it brings matplotlib

        where = found["environment"]["device"] + (", one thread" if options.device == "cpu" else "")
        draw(found["cost"], options.output / f"{COST[teams[-1].device]}.png", where)
