"""Agree, then time.

    python -m benchmarks kernels --quick              # the operators at small shapes: a table
    python -m benchmarks kernels --output DIR         # at real ones, as JSON and CSV too
    python -m benchmarks figures DIR                  # pictures, goals and what is still to be measured, of such files
    python -m benchmarks gpu --output DIR             # everything that only a GPU can tell, in pieces
    python -m benchmarks aot                          # the kernels compiled for GPUs that are not here
    python -m benchmarks step                         # whole training steps, beside TRL's DPO
    python -m benchmarks scale                        # processes, references on disk, layouts; what a step costs
    python -m benchmarks tail_risk                    # which method lightens the tail of harm, learned: an hour or two
    python -m benchmarks exact_tail                   # which method lightens the tail of harm, by exact expectations
    python -m benchmarks theory --output DIR          # exact worlds: the numbers and figures of docs/theory

Every provider first has to agree with the definition on the benchmark's own inputs; what agrees in a training step is
said in `step/run.py`. Disagreement prints by how much and exits 1; what disagrees is not timed.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rsa_kernels import ERM, KL, CVaR, RiskMeasure

from benchmarks.kernels.cases import AXES, DTYPES, SUITES, Spec, specs
from benchmarks.kernels.providers import chosen, floors, offers
from benchmarks.timing import Refused

FOLDERS = ("kernels", "gpu", "scale", "theory", "exact_tail", "tail_risk")  # what they write, not a file
MEASURES: dict[str, type[RiskMeasure]] = {"KL": KL, "CVaR": CVaR, "ERM": ERM}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; 1 means that something disagrees with the definition, 2 that nothing could be run."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "kernels": _kernels,
        "figures": _figures,
        "gpu": _gpu,
        "aot": _aot,
        "step": _step,
        "scale": _scale,
        "tail_risk": _tail_risk,
        "theory": _theory,
        "exact_tail": _exact_tail,
    }
    try:
        return commands[options.command](options)
    except Refused as error:
        print(f"python -m benchmarks {options.command}: {error}", file=sys.stderr)
        return 2


def _kernels(options: argparse.Namespace) -> int:
    """Times and memory of the operators and of their peers."""
    from benchmarks.kernels import report, run

    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    wanted = _wanted(options)
    _need_work(wanted, options)
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    setting = run.Setting(
        device, dtype, options.samples, tuple(options.providers), options.compile or device.type == "cuda"
    )
    results = run.empty_results(device)
    before = results if options.output is None else report.earlier(options.output, results.environment)

    def after_case() -> None:
        print(results.done[-1], file=sys.stderr, flush=True)
        if options.output is not None:  # a run takes long, and may be cut off
            report.write(results, options.output, before)

    run.run(wanted, setting, results, after_case)
    report.show(results)
    print(json.dumps(results.environment))
    return 1 if results.disagreements else 0


def _wanted(options: argparse.Namespace) -> list[Spec]:
    """The cases of the suites, with other shapes and risk measures where these are given."""
    found = _known(options)
    if options.shapes:
        found = [s._replace(shape=shape) for s in found for shape in options.shapes if len(shape) == len(s.shape)]
    if options.risks:
        found = [s for s in found if s.op == "nested" or str(s.risk) in options.risks]
    return list(dict.fromkeys(found))


def _known(options: argparse.Namespace) -> list[Spec]:
    suites = SUITES if options.suite == "all" else (options.suite,)
    return [spec for suite in suites for spec in specs(suite, options.device.split(":")[0], options.quick)]


def _need_work(wanted: list[Spec], options: argparse.Namespace) -> None:
    """Raises Refused where the arguments leave nothing to measure."""
    if not wanted:
        known = _known(options)
        risks = ", ".join(sorted({str(spec.risk) for spec in known if spec.op != "nested"})) or "none"
        shapes = " and ".join(sorted({" x ".join(AXES[spec.op]) for spec in known}))
        raise Refused(f"no case of --suite {options.suite} is left: its risks are {risks}, its shapes {shapes}")
    dtype = DTYPES[options.dtype or "float32"]
    device = torch.device(options.device)
    there = [offer for spec in wanted for offer in (*offers(spec, device, dtype, True), *floors(spec))]
    for name in options.providers:
        if not any(chosen(offer, (name,)) for offer in there):
            names = ", ".join(sorted({offer.name for offer in there}))
            raise Refused(f"--providers {name}: there are {names}, or how these begin")


def _figures(options: argparse.Namespace) -> int:
    from benchmarks import figures  # it brings matplotlib

    figures.draw(options.folder)
    return 0


def _gpu(options: argparse.Namespace) -> int:
    from benchmarks.gpu import pieces, queue

    every = pieces.PIECES
    piece = None if options.piece is None else queue.find(options.piece, every)
    if not torch.cuda.is_available():
        raise Refused(
            f"torch {torch.__version__} sees no CUDA device, and a CPU can tell none of it: run it on a machine with a "
            "GPU and a torch built for it; python -m benchmarks aot compiles the kernels without one"
        )
    return queue.run_all(options.output, every) if piece is None else queue.run_one(options.output, piece, every)


def _aot(options: argparse.Namespace) -> int:
    from benchmarks.aot import command

    return command.main(options)


def _theory(options: argparse.Namespace) -> int:
    """Closed forms on enumerable worlds; nothing is timed."""
    from benchmarks.theory import command  # it brings matplotlib

    print("written:", *command.write(options.output))
    return 0


def _exact_tail(options: argparse.Namespace) -> int:
    """Exact expectations of the whole family on random worlds, from hours of closed forms and training."""
    from benchmarks.exact_tail import command  # it brings matplotlib

    print("written:", *command.study(options.work, options.output, options.worlds, options.quick))
    return 0


def _step(options: argparse.Namespace) -> int:
    """Whole training steps."""
    from benchmarks.step import run as step  # it brings the trainers

    disagreements, rows = step.run(options.quick, options.samples, options.trl)
    if disagreements:
        print("\n".join(disagreements), file=sys.stderr)
        return 1
    table: Table = step.table(rows, options.trl)
    Console(width=140).print(table)
    line = json.dumps({"op": "step", "dtype": "torch.float32", "results": rows, **step.step_environment()})
    if options.output is not None:
        options.output.write_text(line + "\n")
    print(line)
    return 0


def _scale(options: argparse.Namespace) -> int:
    from benchmarks.scale import run  # it brings the trainer

    return run.main(options)


def _tail_risk(options: argparse.Namespace) -> int:
    from benchmarks.tail_risk import command  # it brings the trainer

    return command.main(options)


# ---- the command line ------------------------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_kernels(commands.add_parser("kernels", help="the operators and their peers: time and memory"))
    figures = commands.add_parser("figures", help="pictures, goals and what is still to be measured, of result files")
    figures.add_argument("folder", type=_folder)
    gpu = commands.add_parser("gpu", help="everything that only a GPU can tell, in pieces of at most 9 minutes")
    gpu.add_argument("--piece", help="number or name of the only piece to run: agreement, steps, linear, heads, ...")
    gpu.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result files")
    aot = commands.add_parser("aot", help="the kernels compiled ahead of time: registers, spills, bytes")
    if arguments[:1] == ["aot"]:
        from benchmarks.aot.command import add_arguments  # it brings Triton

        add_arguments(aot)
    _add_step(commands.add_parser("step", help="a whole training step beside TRL's DPO, in float32 on the CPU"))
    scale = commands.add_parser("scale", help="processes, references on disk, layouts of batches, cost of a step")
    if arguments[:1] == ["scale"]:
        from benchmarks.scale.run import add_arguments as add_scale  # it brings the trainer

        add_scale(scale)
    tail_risk = commands.add_parser("tail_risk", help="which method lightens the tail of harm, on the story world")
    if arguments[:1] == ["tail_risk"]:
        from benchmarks.tail_risk.command import add_arguments as add_tail_risk  # it brings the trainer

        add_tail_risk(tail_risk)
    theory = commands.add_parser("theory", help="exact worlds: the numbers and figures of docs/theory")
    theory.add_argument("--output", type=Path, default=Path("docs/theory"), metavar="DIR", help="default docs/theory")
    _add_exact_tail(commands.add_parser("exact_tail", help="the family on random exact worlds: who lightens the tail"))
    options = parser.parse_args(arguments)
    if getattr(options, "samples", 1) < 1:
        parser.error(f"--samples is at least 1, got {options.samples}")
    device = str(getattr(options, "device", "cpu"))
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        parser.error(f"--device is cpu, cuda or cuda:N, got {device}")
    if device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {device}: torch sees no GPU; use --device cpu")
    if getattr(options, "threads", None) is not None and options.threads < 1:
        parser.error(f"--threads is at least 1, got {options.threads}")
    output = getattr(options, "output", None)
    if output is not None:
        _writable(parser, output, is_folder=options.command in FOLDERS)
    if options.command == "step" and options.trl and importlib.util.find_spec("trl") is None:
        parser.error(
            "step compares with trl, which is not installed: pip install -c constraints.txt trl (it is in the extra "
            "'peers'), or time our methods alone with --no-trl"
        )
    return options


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, samples=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="of torch; as it comes where it is not given")
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all", help="growth is over N and V (default all)")
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=[], metavar="AxBxC", help="N x H x V, N x V or sequences x tokens"
    )
    parser.add_argument(
        "--risks", type=_risk, nargs="+", default=[], metavar="RISK", help="KL, CVaR(0.97), ERM(5), None"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="naive, chunked-cache, ..., or how names begin: chunked",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of the definition on a CPU, too")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write JSON and CSV there; other cases in them stay")


def _add_step(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, samples=20)
    parser.add_argument("--no-trl", dest="trl", action="store_false", help="time our methods alone")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the line of JSON there, too")


def _add_exact_tail(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="of the results")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/exact_tail"), metavar="DIR", help="what is done stays here"
    )
    parser.add_argument("--worlds", type=int, default=20, help="random worlds, by seed from 0 (default 20)")
    parser.add_argument("--quick", action="store_true", help="two worlds and the closed forms only: minutes")


def _add_common(parser: argparse.ArgumentParser, samples: int) -> None:
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--samples", type=int, default=samples, help=f"timed samples per method (default {samples})")


def _folder(text: str) -> Path:
    if not any(Path(text).glob("*.json")):
        raise argparse.ArgumentTypeError(f"there is no folder {text} with results (*.json), such as benchmarks/results")
    return Path(text)


def _writable(parser: argparse.ArgumentParser, output: Path, is_folder: bool) -> None:
    """Before hours of measuring: the folder of the output is there, or can be made."""
    folder = output if is_folder else output.parent
    if not is_folder and output.is_dir():
        parser.error(f"--output {output} is a folder, and one file is written: name the file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {output}: {error.strerror}: {folder}; choose a folder that can be written")
    if not os.access(folder, os.W_OK):
        parser.error(f"--output {output}: nothing can be written in {folder}; choose another folder")


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes) or len(sizes) not in (2, 3):
        raise argparse.ArgumentTypeError(f"a shape is two or three sizes such as 1024x512x32000, got {text}")
    return tuple(map(int, sizes))


def _risk(text: str) -> str:
    """As records name it: CVaR(0.97) is CVaR(tail=0.97)."""
    found = re.fullmatch(r"(KL|CVaR|ERM)(?:\(([^)]*)\))?", text)
    if text == "None":
        return text
    if found is None:
        raise argparse.ArgumentTypeError(f"a risk is KL, CVaR(tail), ERM(mu) or None, got {text}")
    try:
        return str(MEASURES[found[1]](*([float(found[2])] if found[2] else [])))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no risk: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
