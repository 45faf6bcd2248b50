"""From samples.jsonl to results.json, report.md with its figures, and the table on the terminal.

Everything is computed from the recorded samples; preference accuracies, measured elsewhere, are passed in and printed
beside them. What is not known is null in the JSON and "–" in the tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsa_lightning.checkpoint import write_json, write_text
from rsa_lightning.evaluation import tail, wording
from rsa_lightning.evaluation.samples import Sample, read_samples

LEVELS = (0.9, 0.95, 0.99)
EXAMPLES = 3

# key in results.json -> (what it is computed from, statistic)
STATISTICS: dict[str, tuple[str, tail.Statistic]] = {
    "reward_mean": ("reward", tail.mean),
    "cost_mean": ("cost", tail.mean),
    "unsafe_rate": ("cost", tail.unsafe_rate),
    **{f"cost_var/{level}": ("cost", tail.at_level(tail.var, level)) for level in LEVELS},
    **{f"cost_cvar/{level}": ("cost", tail.at_level(tail.cvar, level)) for level in LEVELS},
    **{f"cost_cantelli/{level}": ("cost", tail.at_level(tail.cantelli_bound, level)) for level in LEVELS},
    "kl_to_start": ("kl", tail.mean),
}


@dataclass(frozen=True)
class ModelRecord:
    """One row of the report.

    `start` names the row to compare with: the model that the step began from (default: the row above). `preference`
    is criterion -> split ("held_out", "training") -> figures with their "ci95".
    """

    name: str
    samples: Path | None = None
    start: str | None = None
    preference: Mapping[str, Any] | None = None


class Values(NamedTuple):
    """One figure per answer, with the number of the answer's prompt; answers without the figure are left out."""

    values: Tensor
    prompts: Tensor


def results(models: Sequence[ModelRecord], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The content of results.json: one entry per model, in step order, with 95 % intervals clustered by prompt.

    `samples` counts all answers; where some of them have no reward or cost, `unscored` says how many. An interval is
    null where fewer than two prompts were answered.
    """
    return {"models": [_model_results(model, _read(model), resamples, seed) for model in models]}


def write_report(
    run_dir: Path | str,
    models: Sequence[ModelRecord],
    *,
    metrics: Mapping[str, Path] | None = None,
    about: Sequence[Mapping[str, str]] = (),
    show_examples: bool = False,
    draw_figures: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write results.json, the figures and report.md into `run_dir` and return the results.

    Args:
        metrics: step -> metrics.csv; default: those of `run_dir/<step>/` that exist.
        about: what was run, one row per step with the same columns.
        show_examples: print answers of the models. Off by default: answers to real safety prompts may be harmful.

    Raises:
        figures.MatplotlibMissing: figures are wanted and matplotlib is not installed; nothing has been written then.
    """
    from rsa_lightning.evaluation import figures

    run_dir = Path(run_dir)
    if draw_figures:
        figures.require_matplotlib()
    samples = {model.name: _read(model) for model in models}
    found = {"models": [_model_results(model, samples[model.name], resamples, seed) for model in models]}
    write_json(run_dir / "results.json", found)
    pictures: list[tuple[str, str]] = []
    if draw_figures:
        if metrics is None:
            metrics = {m.name: path for m in models if (path := run_dir / m.name / "metrics.csv").is_file()}
        costs = {name: column.values for name, rows in samples.items() if (column := columns(rows)["cost"]) is not None}
        pictures = figures.draw_all(run_dir, found, metrics, costs)
    further = {name: further_figures(rows) for name, rows in samples.items()}
    text = wording.report(found, changes(models, samples, resamples, seed), further, pictures, about)
    if show_examples:
        text += "\n" + wording.examples(_examples(samples))
    write_text(run_dir / "report.md", text)
    return found


def print_results(found: Mapping[str, Any], console: Any = None) -> None:
    """The tables of the report on the terminal."""
    print_tables(wording.tables(found, brief=True), console)


def print_tables(tables: Sequence[wording.Table], console: Any = None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for title, header, rows in tables:
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(header):
            table.add_column(Text(column), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row))
        console.print(table)


def columns(samples: Sequence[Sample]) -> dict[str, Values | None]:
    """reward, cost and logp − ref_logp of the answers that have them; None where no answer has."""
    figures_of = {
        "reward": [sample.reward for sample in samples],
        "cost": [sample.cost for sample in samples],
        "kl": [None if s.logp is None or s.ref_logp is None else s.logp - s.ref_logp for s in samples],
    }
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(sample.prompt_id for sample in samples))}
    prompts = [numbers[sample.prompt_id] for sample in samples]
    return {name: _known(column, prompts) for name, column in figures_of.items()}


def changes(
    models: Sequence[ModelRecord], samples: Mapping[str, Sequence[Sample]], resamples: int = 1000, seed: int = 0
) -> list[wording.Change]:
    """What each step changed against the model it started from, and the last model against the first."""
    names = [model.name for model in models]
    pairs = [(model.start or names[i], model.name) for i, model in enumerate(models[1:])]
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    found = []
    for before, after in dict.fromkeys(pairs):
        if before not in samples:
            continue
        for key in wording.CHANGE_NOUNS:
            name, statistic = STATISTICS[key]
            sides = _paired(samples[before], samples[after], name)
            if sides is not None:
                found.append(
                    wording.Change(before, after, key, *tail.paired_difference(*sides, statistic, resamples, seed))
                )
    return found


def further_figures(samples: Sequence[Sample]) -> dict[str, float] | None:
    """Tail figures without an interval: excess, worst answer per prompt, and a bound on the rate."""
    found = columns(samples)["cost"]
    if found is None:
        return None
    costs, prompts = found
    return {
        "expected_excess": tail.expected_excess(costs).item(),
        "worst_of_n": tail.worst_of_n(costs, prompts).mean().item(),
        "unsafe_answers": int((costs > 0).sum()),
        "largest_cost": costs.max().item(),
        "unsafe_upper": tail.clopper_pearson_upper(int((costs > 0).sum()), len(costs)),
    }


def _model_results(model: ModelRecord, samples: Sequence[Sample], resamples: int, seed: int) -> dict[str, Any]:
    estimates: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    found = columns(samples)
    for key, (name, statistic) in STATISTICS.items():
        estimate, interval = _estimate(found[name], statistic, resamples, seed)
        for target, value in ((estimates, estimate), (intervals, interval)):
            group, _, level = key.partition("/")
            if level:
                target.setdefault(group, {})[level] = value
            else:
                target[key] = value
    further = further_figures(samples)
    # a bootstrap of no unsafe answer is the interval [0, 0]
    upper = None if further is None else _rounded(further["unsafe_upper"])
    entry = {"name": model.name, **estimates, "unsafe_upper": upper, "samples": len(samples), "ci95": intervals}
    unscored = sum(sample.reward is None or sample.cost is None for sample in samples)
    if 0 < unscored < len(samples):
        entry["unscored"] = unscored
    if model.preference is not None:
        entry["preference"] = dict(model.preference)
    return entry


def _estimate(
    found: Values | None, statistic: tail.Statistic, resamples: int, seed: int
) -> tuple[float | None, list[float] | None]:
    if found is None:
        return None, None
    uniform = torch.full((1, len(found.values)), 1 / len(found.values), dtype=torch.float64)
    estimate = _rounded(statistic(found.values, uniform).item())
    if len(found.prompts.unique()) < 2:
        return estimate, None
    interval = tail.clustered_bootstrap(found.values, found.prompts, statistic, resamples, seed)
    return estimate, [_rounded(bound) for bound in interval]


def _rounded(value: float) -> float:
    # 12 digits: a rate of 535 in 2000 reads 0.2675, without the noise of summing 2000 weights
    return float(f"{value:.12g}")


def _read(model: ModelRecord) -> list[Sample]:
    return [] if model.samples is None else read_samples(model.samples)


def _known(column: Sequence[float | None], prompts: Sequence[int]) -> Values | None:
    known = [(value, prompt) for value, prompt in zip(column, prompts, strict=True) if value is not None]
    if not known:
        return None
    values, numbers = zip(*known, strict=True)
    return Values(torch.tensor(values, dtype=torch.float64), torch.tensor(numbers))


def _paired(
    before: Sequence[Sample], after: Sequence[Sample], name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The two columns, prompts numbered alike; None if one is missing or they share fewer than two prompts."""
    both = [*before, *after]
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(sample.prompt_id for sample in both))}
    sides = []
    for samples in (before, after):
        found = _known([getattr(s, name, None) for s in samples], [numbers[s.prompt_id] for s in samples])
        if found is None:
            return None
        sides.append(found)
    shared = set(sides[0].prompts.tolist()) & set(sides[1].prompts.tolist())
    return (*sides[0], *sides[1]) if len(shared) >= 2 else None


def _examples(samples: Mapping[str, Sequence[Sample]]) -> list[tuple[str, list[tuple[str, Sample]]]]:
    """(prompt, [(model, its first answer)]) for prompts spread evenly over those all answered: not picked by score."""
    first: dict[str, dict[str, Sample]] = {name: {} for name, rows in samples.items() if rows}
    for name, answers in first.items():
        for sample in samples[name]:
            answers.setdefault(sample.prompt_id, sample)
    common = [key for key in next(iter(first.values()), {}) if all(key in answers for answers in first.values())]
    picked = [common[i * len(common) // EXAMPLES] for i in range(min(EXAMPLES, len(common)))]
    return [
        (next(iter(first.values()))[key].prompt, [(name, answers[key]) for name, answers in first.items()])
        for key in picked
    ]
