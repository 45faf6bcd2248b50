"""`rsa prepare`: data is read, judged and tokenised into the cache before any training, and reported on as a table."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsa_lightning.checkpoint import write_json
from rsa_lightning.config import layer_parser, load_file, load_layers, overrides
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.prepare import PreparationError
from rsa_lightning.fit import FitCLI
from rsa_lightning.pipeline import Run
from rsa_lightning.plan import read_config

SHOWN_ROWS = 3  # row ids in the table; the report has all


class DataCLI(FitCLI):
    """Takes and checks what `rsa fit` takes, and builds the data module alone: no device is needed."""

    def instantiate_classes(self) -> None:
        config = self.config["fit"]
        self.datamodule = PreferenceData(**config["data"].as_dict())
        policy = config["model"]["init_args"]["policy"]
        self.tokenizer_name: str | None = policy.get("tokenizer") or policy.get("model")

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main(arguments: list[str], console: Console | None = None) -> None:
    """Prepares the data of a configuration for `rsa fit` or `rsa align`, prints what was found, writes the report.

    Raises:
        ValueError, FileNotFoundError: in the configuration; nothing is read.
        PreparationError: in the data; the table is printed and the report is written all the same.
    """
    parser = layer_parser("rsa prepare", "[--report FILE] [--KEY VALUE ...]")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the report is written as JSON, too")
    known, rest = parser.parse_known_args(arguments)
    # a file that is missing is named before the parser of `rsa fit` takes it for text
    if any("steps" in load_file(file) for file in known.config):
        config = load_layers(known.config, overrides(rest))
        run = Run(read_config(config), config, console or Console())
        run.check()
        prepare_all(((name, data, None) for name, data in run.data_sets()), known.report, console)
        return
    cli = DataCLI(["fit", *(word for file in known.config for word in ("-c", file)), *rest])
    prepare_all([("data", cli.datamodule, cli.tokenizer_name)], known.report, console)


def prepare_all(
    sets: Iterable[tuple[str, PreferenceData | Mapping[str, Any], str | None]],
    report: Path | None = None,
    console: Console | None = None,
) -> dict[str, PreferenceData]:
    """Prepares several data sets, one after another, and prints a table for each.

    Args:
        sets: (name, data module or the arguments of one, tokenizer of the policy). One that fails does not keep the
            others from being prepared.
        report: file for the reports of all, by name; of a single one alone.

    Returns:
        The data modules by name, prepared.

    Raises:
        ValueError: the report cannot be written there.
        PreparationError: the first that occurred, after all are done and the report is written.
    """
    console = console or Console()
    if report is not None:
        check_place(report)
    reports, modules, errors = {}, {}, []
    for name, data, tokenizer_name in sets:
        module = data if isinstance(data, PreferenceData) else PreferenceData(**data)
        try:
            module.prepare(tokenizer_name)
            modules[name], reports[name] = module, module.report
        except PreparationError as error:
            errors.append(error)
            reports[name] = error.report
        console.print(table(name, reports[name]))
        if module.folder is not None:
            console.print(f"prepared in {module.folder}", soft_wrap=True)
    if report is not None:
        write_json(report, next(iter(reports.values())) if len(reports) == 1 else reports)
        console.print(f"report: {report}", soft_wrap=True)
    if errors:
        raise errors[0]
    return modules


def check_place(report: Path) -> None:
    """Makes the folder of a report. Raises ValueError where none can be written, before any work is done."""
    if report.is_dir():
        raise ValueError(f"--report {report} is a folder: name a file in it, such as {report / 'report.json'}")
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=report.parent):
            pass
    except OSError as error:
        raise ValueError(f"--report {report} cannot be written ({error.strerror}): name another file") from None


def table(name: str, report: Mapping[str, Any]) -> Table:
    """A report as a table: what was read, what was wrong, what is left."""
    found = Table(title=f"{name}: {' and '.join(report['paths'])}", title_justify="left", show_header=False)
    found.add_column(style="bold")
    for what, value in lines(report):
        found.add_row(what, value)
    return found


def lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) in the order they are read in; what a failed preparation did not get to is left out."""
    criterion = f", criterion {report['criterion']}" if report["criterion"] else ""
    found = [("format", report["format"] + criterion), ("rows", str(report["rows"]))]
    for reason, defect in report["defects"].items():
        rows = defect["rows"]
        ids = ", ".join(rows[:SHOWN_ROWS]) + (", ..." if len(rows) > SHOWN_ROWS else "")
        found.append((reason, f"{defect['count']} ({defect['policy']}): {ids}"))
    found += [(f"first {reason}", message) for reason, message in report["first_messages"].items()]
    if "train_pairs" in report:
        found.append(("training examples", str(report["train_pairs"])))
        found.append(("validation examples", str(report["validation_pairs"])))
    if "tokens" in report:
        found.append(("cut", ", ".join(f"{number} {what}" for what, number in report["truncated"].items())))
        found += [(f"tokens of {side}", figures(tokens)) for side, tokens in report["tokens"].items()]
        found += [(str(what).replace("_", " "), figures(value)) for what, value in report["labels"].items()]
        found.append(("boundary merges", "{merged} of {checked} looked at".format(**report["boundary_merges"])))
    if leaking := report["skipped"].get("in_validation_file"):
        found.append(("prompts of the validation file", f"{leaking} (dropped from training)"))
    return found


def figures(value: Any) -> str:
    """A number, or `mean 12.5, median 11, max 40`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
