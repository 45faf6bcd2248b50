"""The tables of the study in Markdown: made of the JSON file, and of nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tail_risk.analyse import AXES_OF, COMPARED, LIMITS
from benchmarks.tail_risk.methods import BASELINE, RIVALS, Method, path, reward_model

SPLITS = {"test": "test prompts", "shifted": "tasks that no training data asks for"}
SHOWN = {"cvar_0.05": "CVaR 5 %", "cvar_0.01": "CVaR 1 %", "cost": "mean cost", "kl": "KL"}


def markdown(results: Mapping[str, Any], methods: Sequence[Method]) -> str:
    """All tables."""
    parts = [_head(results)]
    for split in COMPARED:
        for axis, words in AXES_OF[split].items():
            table = _matched(results, methods, BASELINE, split, axis)
            parts.append(f"## At the same {words}, {SPLITS[split]}: difference from SACPO\n\n{table}")
    for rival in RIVALS:
        if rival in results["matched"]:
            title = next(method.title for method in methods if method.name == rival)
            for split in COMPARED:
                axis, words = next(iter(AXES_OF[split].items()))
                table = _matched(results, methods, rival, split, axis)
                parts.append(f"## At the same {words}, {SPLITS[split]}: difference from {title}\n\n{table}")
    for limit in LIMITS:
        words = f"the best reward with CVaR 5 % at most {limit:g} × the warm-up model's"
        parts.append(f"## Picked on validation prompts: {words}\n\n{_selection(results, methods, f'{limit:g}')}")
    for split in COMPARED:
        parts.append(f"## All models, {SPLITS[split]}: means over seeds\n\n{_averages(results, methods, split)}")
    return "\n".join(parts)


def _head(results: Mapping[str, Any]) -> str:
    scale = results["settings"]["scale"]
    return (
        "# Which method lightens the tail of harm\n\n"
        f"Written by `{results['command']}`: {len(results['seeds'])} of {len(scale['seeds'])} seeds, "
        f"{results['parameters']} parameters, {results['steps']} optimizer steps of {scale['batch_size']} pairs in "
        f"every alignment step, β = {results['settings']['beta']:g}. Differences are method − baseline of the same "
        "seed, averaged over the range of reward (or of E[r] − β KL) that both paths cover: median over seeds, in "
        "brackets the 95 % Student interval of the mean over seeds; at the end, in how many of the seeds whose paths "
        "overlap the tail is lighter.\n"
    )


def _matched(results: Mapping[str, Any], methods: Sequence[Method], baseline: str, split: str, axis: str) -> str:
    """A row per method whose path meets the baseline's in some seed, and who never does."""
    table = results["matched"][baseline][split][axis]
    rows, apart = [], []
    for method in methods:
        if method.name not in table:
            continue
        found = table[method.name]
        seeds = found["difference"]["cost"]["seeds"]
        if seeds:
            lighter = sum(one["difference"]["cvar_0.05"] < 0 for one in found["seeds"] if one)
            cells = [_interval(found["difference"][name]) for name in SHOWN]
            rows.append([method.title, *cells, f"{lighter} of {seeds}"])
        else:
            apart.append(method.title)
    words = f"No overlap in any seed: {'; '.join(apart)}.\n" if apart else ""
    return "\n".join(
        filter(None, [_table(["method", *SHOWN.values(), "CVaR 5 % is lower in"], rows) if rows else "", words])
    )


def _interval(summary: Mapping[str, Any]) -> str:
    if summary["low"] is None:
        return f"{summary['median']:+.2f}"
    return f"{summary['median']:+.2f} [{summary['low']:+.2f}, {summary['high']:+.2f}]"


def _selection(results: Mapping[str, Any], methods: Sequence[Method], limit: str) -> str:
    rows = []
    for method in methods:
        found = results["selection"][limit][method.name]
        cells = [_mean(found["test"][name]) for name in ("reward", "cvar_0.05", "cvar_0.01", "cost")]
        seeds = len(found["seeds"])
        rows.append([method.title, f"{found['picked']} of {seeds}", *cells, f"{found['kept_on_test']}"])
    head = ["method", "seeds with a pick", "reward", "CVaR 5 %", "CVaR 1 %", "mean cost", "keep the limit on test"]
    return _table(head, rows)


def _mean(summary: Mapping[str, Any]) -> str:
    return "–" if summary["mean"] is None else f"{summary['mean']:.2f}"


def _averages(results: Mapping[str, Any], methods: Sequence[Method], split: str) -> str:
    names = [("warm-up", "warmup", "")]
    for method in methods:
        if not method.merged:
            names.append((f"{method.title}: reward step", reward_model(method), ""))
        symbol = "q" if method.merged else "λ"
        names += [
            (method.title, name, f"{symbol} = {value:g}")
            for name, value in zip(path(method), method.values, strict=True)
        ]
    shown: dict[str, tuple[str, str]] = {name: (title, value) for title, name, value in reversed(names)}
    order = dict.fromkeys(name for _, name, _ in names)
    rows = []
    for name in order:
        title, value = shown[name]
        f = results["averages"][name][split]
        numbers = [f"{f['reward']:.2f}", f"{f['cost']:.2f}", f"{100 * f['unsafe']:.1f} %"]
        numbers += [f"{f[key]:.1f}" for key in ("var_0.05", "cvar_0.05", "var_0.01", "cvar_0.01")]
        numbers += [f"{f['kl']:.2f}", f"{f['objective']:.2f}", f"{100 * f['broken']:.1f} %"]
        rows.append([_shared(name, methods) or title, value, *numbers])
    head = ["model", "", "reward", "cost", "unsafe", "VaR 5 %", "CVaR 5 %", "VaR 1 %", "CVaR 1 %", "KL"]
    return _table([*head, "E[r] − β KL", "broken"], rows)


def _shared(name: str, methods: Sequence[Method]) -> str | None:
    """Reward steps are named by who shares them."""
    users = [method.title for method in methods if reward_model(method) == name]
    return f"reward step of {'; '.join(users)}" if users else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, align, *rows))
