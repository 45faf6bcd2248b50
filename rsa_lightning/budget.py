"""`rsa dual`: the multiplier that a cost budget dictates, from a samples.jsonl, as a table and as a layer of YAML.

The layer sets `steps.NAME.temperature`, β / λ, and not `lam`: it then holds whatever beta, lam and parametrization the
other layers have, and no other step is trained again.

λ is that of the Gibbs policy of the sampled costs. A step that is trained on pairs learns the cost behind the pairs, in
whose unit Bradley-Terry preferences are logistic, and as far as data and training reach: measure what it came to.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rsa_lightning.checkpoint import write_text
from rsa_lightning.config import dump
from rsa_lightning.dual import DualEstimate, dual_lambda
from rsa_lightning.evaluation.samples import Sample, read_samples
from rsa_lightning.evaluation.wording import number, with_interval
from rsa_lightning.manifest import NAME as MANIFEST
from rsa_lightning.manifest import Manifest
from rsa_lightning.tail_dual import TailEstimate, dual_cvar
from rsa_lightning.temperatures import DEFAULT_BETA

MARK = "# Written by rsa dual, which may replace it."
DEFAULT_TAIL = 0.05
EPILOG = """Exit status: 0 when the question is answered; 1 at errors, and where --write was given and there is no
multiplier to write, because the budget is already met or not reachable."""


@dataclass(frozen=True)
class Answers:
    """The answers of a samples file that have a cost (and a reward, where rewards are wanted)."""

    costs: Tensor
    prompts: Tensor
    rewards: Tensor | None
    left_out: int

    @property
    def prompt_count(self) -> int:
        return len(self.prompts.unique())


def main(arguments: list[str], console: Console | None = None) -> int:
    """Prints what a budget asks for; writes the layer if asked to.

    Raises:
        ValueError, OSError: the samples have no costs or too few prompts, a number is out of range, or the file to
            write is not one of ours.
    """
    asked = _parser().parse_args(arguments)
    console = console or Console()
    if asked.tail is not None and asked.cvar_budget is None:
        raise ValueError("--tail is the share of the worst answers of --cvar-budget, and that is not given")
    asked.tail = DEFAULT_TAIL if asked.tail is None else asked.tail
    if asked.write is not None:
        check_ours(asked.write)
    answers = read_answers(read_samples(asked.samples), asked.samples, rewards=asked.rewards)
    beta, notes = _beta(asked)
    found = _estimate(asked, answers, beta)
    dual = found.dual if isinstance(found, TailEstimate) else found
    notes += found.warnings
    table = Table(title=str(asked.samples), title_justify="left", show_header=False)
    table.add_column(style="bold")
    for what, value in lines(asked, answers, found):
        table.add_row(what, value)
    console.print(table)
    for note in notes:
        console.print(f"- {note}", soft_wrap=True, highlight=False)
    if asked.write is None:
        return 0
    if dual.status != "found":
        raise ValueError(f"{asked.write} is not written: {_outcome(dual)}")
    write_text(asked.write, layer(asked, answers, found, notes))
    console.print(f"layer: {asked.write}", soft_wrap=True)
    return 0


def read_answers(samples: Sequence[Sample], path: Path | str, *, rewards: bool) -> Answers:
    """The scored answers, prompts numbered in the order they come in.

    Raises:
        ValueError: no scores, or fewer than two prompts with any: there would be nothing to resample.
    """
    scored = [s for s in samples if s.cost is not None and not (rewards and s.reward is None)]
    if not scored:
        what = "reward and cost" if rewards else "cost"
        raise ValueError(f"{path}: no answer has a {what}: set evaluation.scorer and run rsa align again")
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(sample.prompt_id for sample in scored))}
    if len(numbers) < 2:
        raise ValueError(f"{path}: scored answers to {len(numbers)} prompt, and at least 2 are needed for an interval")
    return Answers(
        torch.tensor([s.cost for s in scored], dtype=torch.float64),
        torch.tensor([numbers[s.prompt_id] for s in scored]),
        torch.tensor([s.reward for s in scored], dtype=torch.float64) if rewards else None,
        len(samples) - len(scored),
    )


def check_ours(path: Path) -> None:
    """Raises ValueError where writing the layer would destroy a file that `rsa dual` did not write."""
    if path.is_dir() or (path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK)):
        raise ValueError(f"--write {path} exists and was not written by rsa dual: name another file")
    if not path.parent.is_dir():
        raise ValueError(f"--write {path}: there is no folder {path.parent}")


def lines(asked: argparse.Namespace, answers: Answers, found: DualEstimate | TailEstimate) -> list[tuple[str, str]]:
    """(what, value) of the table, in the order it is read in."""
    dual = found.dual if isinstance(found, TailEstimate) else found
    percent = asked.chance is not None
    left_out = f" ({answers.left_out} without scores left out)" if answers.left_out else ""
    rows = [
        ("answers", f"{len(answers.costs)} to {answers.prompt_count} prompts{left_out}"),
        ("budget", _budget(asked)),
        (
            "as sampled, the other half" if isinstance(found, TailEstimate) else "as sampled",
            number(found.before if isinstance(found, TailEstimate) else dual.before, percent=percent),
        ),
        ("outcome", _outcome(dual)),
    ]
    if dual.status != "found":
        return rows
    rows += [
        ("multiplier λ", _precise(dual)),
        ("temperature of the step, β / λ", f"{dual.temperature:.4g} (β = {dual.beta:g})"),
        (
            "effective answers per prompt",
            f"{dual.effective_mean:.1f} on average, at least {dual.effective_min:.1f}"
            f"{', of the fitted half' if isinstance(found, TailEstimate) else ''}"
            f" (variance of the weights {dual.weight_variance:.2f})",
        ),
    ]
    if isinstance(found, TailEstimate):
        rows += [
            ("threshold η of (cost − η)₊ / tail", f"{found.eta:.6g}"),
            ("the other half, reweighted", with_interval(found.checked, found.interval)),
            ("effective answers above η there", f"{found.tail_answers:.1f}"),
        ]
    return rows


def layer(asked: argparse.Namespace, answers: Answers, found: DualEstimate | TailEstimate, notes: list[str]) -> str:
    """The YAML of a layer for `rsa align`, headed by how it was made."""
    dual = found.dual if isinstance(found, TailEstimate) else found
    step: dict[str, Any] = {"loss": "DPO", "temperature": dual.temperature}
    if isinstance(found, TailEstimate):
        step["cost_transform"] = {"class_path": "Hinge", "init_args": {"eta": found.eta, "tail": found.tail}}
    elif asked.chance is not None:
        step["cost_transform"] = {"class_path": "Indicator", "init_args": {"threshold": asked.chance[0]}}
    left_out = f", {answers.left_out} without scores left out" if answers.left_out else ""
    head = [
        MARK,
        f"# Run:  rsa align -c YOUR.yaml -c {asked.write}",
        f"# Budget: {_budget(asked)}.",
        f"# From {asked.samples}: {len(answers.costs)} answers to {answers.prompt_count} prompts{left_out}"
        f"{', tilted by their rewards' if asked.rewards else ''}.",
        f"# lam = {dual.lam!r}, 95 % interval {_interval(dual)}; temperature = beta / lam with beta = {dual.beta:g}.",
        "# They are those of the exact policy, to which the loss DPO tends and others do not.",
        *(f"# Caution: {note}." for note in notes),
    ]
    return "\n".join(head) + "\n" + dump({"steps": {asked.step: step}})


def _estimate(asked: argparse.Namespace, answers: Answers, beta: float) -> DualEstimate | TailEstimate:
    shared: dict[str, Any] = {"rewards": answers.rewards, "resamples": asked.resamples, "seed": asked.seed}
    if asked.cvar_budget is not None:
        return dual_cvar(answers.costs, answers.prompts, asked.cvar_budget, asked.tail, beta, **shared)
    if asked.chance is not None:
        threshold, chance = asked.chance
        if not 0 < chance < 1:
            raise ValueError(f"--chance {threshold:g} {chance:g}: the second number is a probability in (0, 1)")
        return dual_lambda((answers.costs > threshold).double(), answers.prompts, chance, beta, **shared)
    return dual_lambda(answers.costs, answers.prompts, asked.budget, beta, **shared)


def _beta(asked: argparse.Namespace) -> tuple[float, list[str]]:
    """The temperature of the reward step: as given, or of the run that the samples lie in; and what is odd about it."""
    folder = Path(asked.samples).resolve().parent
    entries = Manifest(folder.parent).section("steps") if (folder.parent / MANIFEST).is_file() else {}
    kind = entries.get(folder.name, {}).get("kind")
    notes = []
    if kind == "warmup" and not asked.rewards:
        notes.append(
            f"these answers are those of the warm-up {folder.name}: λ is that of a policy without reward alignment "
            "(--rewards tilts them by their rewards)"
        )
    if kind == "reward" and asked.rewards:
        notes.append(f"--rewards is for answers from before alignment: {folder.name} has earned its rewards already")
    if kind not in (None, "reward", "warmup"):
        notes.append(f"these answers are those of the step {folder.name} ({kind}): λ is what is needed on top of it")
    own = entries.get(folder.name, {}).get("temperature")
    if asked.beta is None and kind == "reward":
        return own, notes
    betas = {entry["temperature"] for entry in entries.values() if entry["kind"] == "reward"}
    if asked.beta is None and len(betas) > 1:
        raise ValueError(f"the run has reward steps at the temperatures {sorted(betas)}: say which with --beta")
    if asked.beta is None:
        return (betas.pop() if betas else DEFAULT_BETA), notes
    if kind == "reward" and own != asked.beta:
        raise ValueError(
            f"--beta {asked.beta:g}, but the step {folder.name} that drew the answers was trained at {own:g}: "
            "leave --beta out"
        )
    return asked.beta, notes


def _budget(asked: argparse.Namespace) -> str:
    if asked.cvar_budget is not None:
        return f"mean cost of the worst {100 * asked.tail:g} % at most {asked.cvar_budget:g}"
    if asked.chance is not None:
        return f"at most {100 * asked.chance[1]:g} % of answers cost more than {asked.chance[0]:g}"
    return f"mean cost at most {asked.budget:g}"


def _outcome(dual: DualEstimate) -> str:
    if dual.status == "met":
        return "the budget is already met: no further step is needed"
    if dual.status == "unreachable":
        return (
            f"not reachable on these samples: the cheapest answer to every prompt alone gives {number(dual.least_cost)}"
        )
    return "found"


def _precise(dual: DualEstimate) -> str:
    """λ at four digits with its interval: multipliers of heavy-tailed costs are small numbers."""
    return f"{dual.lam:.4g} {_interval(dual)}".rstrip()


def _interval(dual: DualEstimate) -> str:
    return "" if dual.interval is None else "[{:.4g}, {:.4g}]".format(*dual.interval)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rsa dual",
        description="The multiplier of a cost budget, from answers of the reward-aligned model.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--samples", type=Path, required=True, metavar="FILE", help="RUN/reward/samples.jsonl, scored")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", type=float, metavar="X", help="mean cost <= X")
    budget.add_argument("--cvar-budget", type=float, metavar="X", help="mean cost of the worst share --tail <= X")
    budget.add_argument("--chance", type=float, nargs=2, metavar=("T", "P"), help="P(cost > T) <= P")
    parser.add_argument("--tail", type=float, help="of --cvar-budget, a share of all answers; default: 0.05")
    parser.add_argument("--beta", type=float, help="of the reward step; default: what the run's manifest says, or 0.1")
    parser.add_argument(
        "--rewards", action="store_true", help="the answers are of the model before alignment: tilt by their rewards"
    )
    parser.add_argument("--write", type=Path, metavar="LAYER", help="write a layer for rsa align")
    parser.add_argument("--step", default="safety", metavar="NAME", help="the step that the layer is about")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over prompts")
    parser.add_argument("--seed", type=int, default=0)
    return parser
