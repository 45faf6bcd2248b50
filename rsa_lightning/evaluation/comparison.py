"""What a sweep found: results.csv, results.json, report.md and the figure, from the results of its points."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rsa_lightning.checkpoint import write_json, write_text
from rsa_lightning.evaluation import figures
from rsa_lightning.evaluation.frontier import Rule, Selection, Trial, pareto_front, select
from rsa_lightning.evaluation.report import STATISTICS, columns, print_tables
from rsa_lightning.evaluation.samples import read_samples
from rsa_lightning.evaluation.wording import DEFINITIONS, LABELS, Table, markdown, number, with_interval

SHOWN = (
    "reward_mean", "cost_mean", "unsafe_rate", "cost_cvar/0.95", "cost_cvar/0.99", "cost_cantelli/0.95", "kl_to_start",
)  # fmt: skip
SPREAD = ("reward_mean", "cost_mean", "unsafe_rate", "cost_cvar/0.95")
FRONTS = ("cost_mean", "cost_cvar/0.95")  # the costs of the two panels
PICTURE = "reward_cost.png"
CAPTION = (
    "Mean reward against cost, one number per point; bars are 95 % intervals. Dark points are on the Pareto front: no "
    "other has more reward at no more cost. A ring marks the point that the rule selects. Up and to the left is better."
)
FURTHER = """\
The *Cantelli bound* is mean + sqrt(0.95 / 0.05) × standard deviation of the cost; no law with that mean and deviation
has a larger VaR 0.95. A point stands for the last model of its run."""
OPTIMISM = "Rule and figures look at the same answers: those of the selected setting are a little flattered."


@dataclass(frozen=True)
class PointRecord:
    """One run of a sweep: what was set, and what it found, or why it failed.

    `setting` is the name without the seed; `found` is the content of its results.json, `folder` its run directory.
    """

    name: str
    setting: str
    seed: int | None
    overrides: Mapping[str, Any]
    folder: Path
    found: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def last(self) -> Mapping[str, Any]:
        """The results of the last model."""
        assert self.found is not None
        return self.found["models"][-1]


def write_comparison(
    folder: Path,
    points: Sequence[PointRecord],
    rule: Rule | None = None,
    *,
    planned: int,
    draw_figure: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Writes results.csv, results.json, report.md and the figure, prints the table, and returns the results.

    Args:
        points: those that were run, finished or failed; `planned` says of how many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    done = [point for point in points if point.found is not None]
    chosen = selection(points, rule) if rule is not None else None
    fronts = {cost: front(done, cost) for cost in FRONTS}
    found: dict[str, Any] = {
        "planned": planned,
        "points": [_summary(point, fronts) for point in points],
        "selection": None if rule is None else _selected(rule, chosen),
        "rows": [row for point in done for row in rows(point)],
    }
    write_text(folder / "results.csv", _csv(found["rows"]))
    write_json(folder / "results.json", found)
    winners = [point.name for point in done if chosen is not None and point.setting == chosen.chosen]
    models = [{**point.last, "name": point.name} for point in done]
    (folder / PICTURE).unlink(missing_ok=True)
    picture = figures.frontier(models, winners, folder / PICTURE) if draw_figure else None
    sentences = _sentences(points, planned, fronts, rule, chosen)
    shown = [_table(done)] if done else []
    parts = ["# Sweep", "\n".join(f"- {sentence}" for sentence in sentences)]
    parts += [text for table in shown for text in (f"## {table[0]}", markdown(table), DEFINITIONS, FURTHER)]
    if len({point.seed for point in done}) > 1:
        parts += ["## Over seeds", markdown(_seed_table(done)), "Mean over the runs of a setting, smallest to largest."]
    parts += [f"![{CAPTION}]({PICTURE})\n\n{CAPTION}"] if picture else []
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    print_tables(shown, console)
    for sentence in sentences:
        console.print(f"- {sentence}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {folder / 'report.md'}", soft_wrap=True)
    return found


def rows(point: PointRecord) -> Iterator[dict[str, Any]]:
    """One row for each model that was judged: the point, what was set, and every figure with its interval."""
    assert point.found is not None
    for model in point.found["models"]:
        row = {"point": point.name, "setting": point.setting, "seed": point.seed, "step": model["name"]}
        row |= {key: value if _plain(value) else str(value) for key, value in point.overrides.items()}
        row["answers"] = model["samples"]
        for key in STATISTICS:
            value, interval = _figure(model, key)
            low, high = (None, None) if interval is None else interval
            name = key.replace("/", "_")
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        yield row


def selection(points: Sequence[PointRecord], rule: Rule) -> Selection | None:
    """What the rule says of the settings all of whose runs have finished; None where there is none with scores."""
    trials: dict[str, list[Trial]] = {}
    for setting in dict.fromkeys(point.setting for point in points):
        runs = [point for point in points if point.setting == setting]
        known = [trial for point in runs if (trial := _trial(point)) is not None]
        if len(known) == len(runs):
            trials[setting] = known
    return select(trials, rule) if trials else None


def front(done: Sequence[PointRecord], cost: str) -> list[str]:
    """Names of the points on the Pareto front of mean reward against a cost, cheapest first."""
    known = [(p.name, p.last["reward_mean"], _figure(p.last, cost)[0]) for p in done]
    scored = [(name, reward, value) for name, reward, value in known if reward is not None and value is not None]
    places = pareto_front([reward for _, reward, _ in scored], [value for *_, value in scored])
    return [scored[i][0] for i in places]


def _trial(point: PointRecord) -> Trial | None:
    if point.found is None or point.last["reward_mean"] is None:
        return None
    costs = columns(read_samples(point.folder / point.last["name"] / "samples.jsonl"))["cost"]
    return None if costs is None else Trial(point.last["reward_mean"], costs.values)


def _figure(model: Mapping[str, Any], key: str) -> tuple[float | None, Sequence[float] | None]:
    group, _, level = key.partition("/")
    value, interval = model[group], model["ci95"][group]
    return (value[level], interval[level]) if level else (value, interval)


def _summary(point: PointRecord, fronts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "name": point.name,
        "setting": point.setting,
        "seed": point.seed,
        "overrides": dict(point.overrides),
        "error": point.error,
        "front": {cost.replace("/", "_"): point.name in names for cost, names in fronts.items()},
    }


def _selected(rule: Rule, found: Selection | None) -> dict[str, Any]:
    told = {"rule": rule.rule, "limit": rule.limit, "level": rule.level, "condition": str(rule), "chosen": None}
    return told if found is None else told | {"chosen": found.chosen, "figures": found.figures}


def _sentences(
    points: Sequence[PointRecord],
    planned: int,
    fronts: Mapping[str, Sequence[str]],
    rule: Rule | None,
    found: Selection | None,
) -> list[str]:
    done = sum(point.found is not None for point in points)
    sentences = [f"{done} of {planned} points are finished."]
    sentences += [f"`{point.name}` failed: {point.error}" for point in points if point.error is not None]
    if fronts[FRONTS[0]]:
        listed = [", ".join(f"`{name}`" for name in fronts[cost]) for cost in FRONTS]
        sentences.append(
            f"On the Pareto front of reward against mean cost: {listed[0]}; against the mean cost of the worst 5 %: "
            f"{listed[1]}."
        )
    if rule is None:
        return sentences
    if found is None:
        return [*sentences, f"The rule {rule} selects nothing: no point has reward and cost."]
    if found.chosen is None:
        least = number(found.figures[found.closest])
        sentences.append(
            f"No setting is admissible under the rule {rule}; `{found.closest}` comes closest with {least}."
        )
        return sentences
    figure, reward = number(found.figures[found.chosen]), number(found.rewards[found.chosen])
    admitted = sum(map(rule.admits, found.figures.values()))
    sentences.append(
        f"Admissible under the rule {rule}: {admitted} of {len(found.figures)} settings. Of these `{found.chosen}` has "
        f"the highest mean reward, {reward}; its figure under the rule is {figure}. {OPTIMISM}"
    )
    return sentences


def _table(done: Sequence[PointRecord]) -> Table:
    header = ["point", *(LABELS[key][0] for key in SHOWN)]
    return "Points", header, [[p.name, *(_cell(p.last, key) for key in SHOWN)] for p in done]


def _seed_table(done: Sequence[PointRecord]) -> Table:
    """Mean and range over the runs of each setting: the variation that no interval of one run contains."""
    cells = []
    for setting in dict.fromkeys(point.setting for point in done):
        runs = [point for point in done if point.setting == setting]
        row = [f"{setting} ({len(runs)} runs)"]
        for key in SPREAD:
            known = [value for run in runs if (value := _figure(run.last, key)[0]) is not None]
            around = [min(known), max(known)] if known else None
            row.append(with_interval(sum(known) / len(known) if known else None, around, percent=LABELS[key][1]))
        cells.append(row)
    return "Over seeds", ["setting", *(LABELS[key][0] for key in SPREAD)], cells


def _cell(model: Mapping[str, Any], key: str) -> str:
    return with_interval(*_figure(model, key), percent=LABELS[key][1])


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _csv(found: Sequence[Mapping[str, Any]]) -> str:
    """All columns that some row has, in the order they first come in; what is not known is empty."""
    names = list(dict.fromkeys(name for row in found for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()
