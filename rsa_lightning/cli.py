"""The `rsa` command: one call per subcommand, and one line per user error."""

import argparse
import logging
import sys
import traceback
import warnings

from rsa_lightning.parallel.launch import is_first

USAGE = """usage: rsa COMMAND [options]

  rsa align -c FILE [-c LAYER ...] [--output DIR] [--KEY.SUBKEY VALUE ...]
      the whole pipeline of a YAML: its steps in order, then evaluation and report; finished steps are reused
  rsa align --dry-run --world-size N -c FILE [-c LAYER ...] [--KEY.SUBKEY VALUE ...]
      nothing but tables: memory per GPU, communication and schedule of every step on N GPUs; needs none of them
  rsa fit | validate | test -c FILE [-c LAYER ...] [--KEY.SUBKEY VALUE ...]
      one stage, as a LightningCLI; `rsa fit --help` lists every key
  rsa prepare -c FILE [-c LAYER ...] [--report FILE] [--KEY.SUBKEY VALUE ...]
      the data of a configuration: checked, reported and tokenised into the cache, before any training
  rsa dual --samples RUN/reward/samples.jsonl --budget X | --cvar-budget X [--tail A] | --chance T P [--write LAYER]
      the multiplier that a budget of the cost asks for, from sampled answers alone; `rsa dual --help`
  rsa sweep -c FILE [-c LAYER ...] [--output DIR] [--KEY VALUE ...]
      runs of rsa align over a grid of settings, equal steps trained once; table, Pareto front, selection
  rsa merge --models A B [C ...] (--weights W ... | --ratios Q ...) --output DIR
      a weighted average of models; with ratios DIR/Q = (1 - Q) * A + Q * B for each
  rsa merge --adapter FOLDER --scale Q [--base MODEL] --output DIR
      an adapter times Q, which averages the models without and with it exactly; with --base the model that it makes
  rsa export --run RUN --step NAME --output DIR [--adapter]
      the model (or adapter) of a finished step of rsa align, with a model card of what the run recorded
  rsa export --checkpoint CKPT -c FILE [-c LAYER ...] --output DIR [--adapter]
      a checkpoint, a folder of shards or one file, as a folder that transformers (or peft) loads; FILE is the
      config.yaml of its training, whose data has to be there, too (for the tokenizer and its template)

Configurations are code: their class paths are imported. Run only those you trust.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    _show_our_messages()
    try:
        if command == "align":
            return _align(arguments[1:])
        if command == "prepare":
            from rsa_lightning.preparation import main as prepare

            _quiet_lightning()
            prepare(arguments[1:])
            return 0
        if command == "dual":
            from rsa_lightning.budget import main as dual

            return dual(arguments[1:])
        if command == "sweep":
            from rsa_lightning.sweep import main as sweep

            _quiet_lightning()
            _no_weight_bars()
            return sweep(arguments[1:])
        if command == "merge":
            from rsa_lightning.merge import main as merge

            _no_weight_bars()
            merge(arguments[1:])
            return 0
        if command == "export":
            from rsa_lightning.export import main as export

            _quiet_lightning()
            _no_weight_bars()
            export(arguments[1:])
            return 0
        if command in ("fit", "validate", "test"):
            from rsa_lightning.fit import FitCLI

            _no_weight_bars()
            FitCLI(arguments)
            return 0
        raise ValueError(
            f"unknown command {command!r}: choose align, sweep, dual, prepare, merge, export, fit, validate or test"
        )
    except KeyboardInterrupt:
        hint = (
            "the same command reuses every step that is finished, and takes the next from its start"
            if command in ("align", "sweep")
            else "nothing half-made is left"
        )
        if is_first():
            print(f"rsa: interrupted; {hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_user_error(error):
            raise
        print(f"rsa: error: {_message(error)}", file=sys.stderr)
        return 1


def _align(arguments: list[str]) -> int:
    from rsa_lightning.config import dump, layer_parser, load_layers, overrides

    keys = None
    if not {"-h", "--help"}.isdisjoint(arguments):
        from rsa_lightning.plan import KEYS

        keys = KEYS
    parser = layer_parser("rsa align", "[--output DIR] [--KEY.SUBKEY VALUE ...]", keys)
    parser.add_argument("--print_config", action="store_true", help="print the merged configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="print memory, communication and schedule, and stop")
    parser.add_argument("--world-size", type=int, metavar="N", help="GPUs of a dry run")
    known, rest = parser.parse_known_args(arguments)
    if known.dry_run != (known.world_size is not None):
        raise ValueError("--dry-run and --world-size N belong together: N is the number of GPUs to plan for")
    if known.dry_run and known.world_size < 1:
        raise ValueError(f"--world-size is a number of processes, at least 1, got {known.world_size}")
    config = load_layers(known.config, overrides(rest))

    # what takes seconds to import, after all that can be said without it
    from rsa_lightning.pipeline import align
    from rsa_lightning.plan import read_config

    _quiet_lightning()
    _no_weight_bars()
    if known.dry_run:
        from rsa_lightning.dryrun.command import dry_run

        dry_run(config, known.world_size)
        return 0
    if known.print_config:
        read_config(config)  # its keys; classes and data are checked by a run
        print(dump(config), end="")
        return 0
    align(config)
    return 0


def _is_user_error(error: Exception) -> bool:
    """Whether our own modules or the parser raised it with a message for the user, or a file cannot be used."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    deepest = list(traceback.walk_tb(error.__traceback__))[-1][0].f_globals.get("__name__", "")
    ours = deepest.split(".")[0] in ("rsa_lightning", "rsa_kernels", "jsonargparse")
    return ours and isinstance(
        error, (ValueError, OSError, RuntimeError, FloatingPointError, ImportError, argparse.ArgumentError)
    )


def _message(error: Exception) -> str:
    if not isinstance(error, argparse.ArgumentError) and not str(error).startswith("Does not validate"):
        return str(error)
    from rsa_lightning.parsing import plain_message

    return plain_message(error)


def _show_our_messages() -> None:
    """Our loggers print plain sentences; known noise of libraries on correct use is dropped."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("rsa_lightning", "rsa_kernels"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if is_first() else logging.ERROR)  # what all processes say is said once
    noise = ("LeafSpec", "does not have many workers", "exists and is not empty", "smaller than the logging interval")
    for message in (f".*{part}.*" for part in noise):
        warnings.filterwarnings("ignore", message=message)


def _no_weight_bars() -> None:
    """transformers draws a bar for every file it reads or writes."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _quiet_lightning() -> None:
    """`rsa align` says itself what happens; the hints of a Trainer per step would bury it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
