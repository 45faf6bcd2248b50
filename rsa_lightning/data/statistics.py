"""What prepared data looks like in numbers: lengths and labels, for the report."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rsa_lightning.data.records import PreferencePair, RatedResponse, Record, costs_disagree
from rsa_lightning.data.table import SIDES, EncodedTable

DISTINCT_COSTS = 20  # beyond, they are counted in ten equal steps


def token_statistics(tables: Iterable[EncodedTable]) -> dict[str, dict[str, float]]:
    """Mean, median and largest length of prompts and responses, after truncation, BOS and EOS included."""
    opened = list(tables)
    found = {}
    for side in SIDES:
        tokens = np.concatenate([table.tokens(side) for table in opened])
        tokens = tokens[tokens > 0]
        if len(tokens):
            figures = {"mean": round(float(tokens.mean()), 1), "median": float(np.median(tokens))}
            found[side] = {**figures, "max": int(tokens.max())}
    return found


def label_counts(records: Sequence[Record]) -> dict[str, Any]:
    """How many pairs and ratings there are of each kind; a kind that the data knows nothing of is left out."""
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    rated = [record for record in records if isinstance(record, RatedResponse)]
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(kinds(record))
    found: dict[str, Any] = dict(sorted(counts.items()))
    if pairs:
        longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs)
        found["chosen_is_longer"] = round(longer / len(pairs), 3)
    costs = [cost for pair in pairs for cost in (pair.chosen_cost, pair.rejected_cost)]
    costs += [record.cost for record in rated]
    known = [cost for cost in costs if cost is not None]
    if known:
        found["costs"] = histogram(known)
    return found


def kinds(record: Record) -> list[str]:
    """What a record counts as."""
    if isinstance(record, RatedResponse):
        return ["desirable" if record.desirable else "undesirable"]
    found = ["pairs"]
    if record.target != 1.0:
        found.append("soft_targets")
    if record.chosen_safe is not None and record.rejected_safe is not None:
        safe = ("unsafe", "safe")
        found += [f"{safe[record.chosen_safe]}_responses", f"{safe[record.rejected_safe]}_responses"]
        if record.chosen_safe == record.rejected_safe:
            found.append(f"both_{safe[record.chosen_safe]}")
        else:
            found.append("only_chosen_safe" if record.chosen_safe else "only_rejected_safe")
    if record.chosen_cost is not None and record.rejected_cost is not None:
        found.append("costs_of_both")
        if record.chosen_safe is not None and record.rejected_safe is not None and not costs_disagree(record):
            found.append("costs_confirmed")  # by both safety labels
    return found


def histogram(values: Sequence[float]) -> dict[str, int]:
    """How often each value occurs, or how many lie in each of ten equal steps where there are many."""
    counts = Counter(values)
    if len(counts) <= DISTINCT_COSTS:
        return {f"{value:g}": counts[value] for value in sorted(counts)}
    numbers, edges = np.histogram(values, bins=10)
    return {f"{low:g} to {high:g}": int(n) for n, low, high in zip(numbers, edges, edges[1:], strict=False)}


def summary(report: dict[str, Any]) -> str:
    """The report in one line."""
    skipped = ", ".join(f"{reason} {n}" for reason, n in sorted(report["skipped"].items())) or "none"
    return (
        f"{' and '.join(report['paths'])}: {report['rows']} rows; skipped: {skipped}; "
        f"{report['train_pairs']} training and {report['validation_pairs']} validation pairs; "
        f"cut: {report['truncated']['prompts']} prompts, {report['truncated']['responses']} responses"
    )
