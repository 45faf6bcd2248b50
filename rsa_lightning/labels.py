"""Preference pairs whose targets come from scores, or from models: MoCAN and PeCAN (arXiv:2405.19544).

Both weigh every response by w and prefer the chosen one with probability target = sigmoid(w_chosen - w_rejected), the
expectation of the papers' Bernoulli relabelling, which a loss with targets trains on without drawing it.

    MoCAN   w = reward - lam * cost, of a scorer
    PeCAN   w = sum_k m_k log(pi_k(y | x) / pi_ref(y | x)), of models: sums over tokens, without a factor beta
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsa_lightning.checkpoint import write_text
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.ledger import Ledger
from rsa_lightning.data.prepare import split
from rsa_lightning.data.records import FormatError, PreferencePair, Prompt, plain_text
from rsa_lightning.data.tokenize import EncodedPair, pad_id
from rsa_lightning.evaluation.preference import response_logps
from rsa_lightning.evaluation.samples import Sample, read_samples, write_samples
from rsa_lightning.evaluation.score import score
from rsa_lightning.models import PolicySpec, load_policy

SCORES = "scores.jsonl"


class Weighed(NamedTuple):
    """w of both responses of every pair, None where there is none, and the columns that say what it was made of."""

    chosen: list[float | None]
    rejected: list[float | None]
    columns: list[dict[str, float]]


class Pairs(NamedTuple):
    """The pairs of a data set as they were, and their tokens; the last ones are a validation file's, if it has one."""

    records: list[PreferencePair]
    examples: list[EncodedPair]
    validation: int  # how many of the last are of the validation file


def check_pairs(data: PreferenceData) -> None:
    """Raises FormatError where data that was set up holds rated responses, which are no pairs."""
    for table in (data.train_examples, data.validation_examples):
        if not (table.tokens("chosen").all() and table.tokens("rejected").all()):
            raise FormatError(
                f"{' and '.join(data.settings.paths)}: format {data.settings.format!r} holds single responses, and "
                "labels are of pairs: give preference pairs"
            )


def read_pairs(data: PreferenceData) -> Pairs:
    """The pairs that training on this data would see, on both sides of its split."""
    sides = split(data.settings, Ledger(data.settings.defects))
    tokens = {e.row_id: e for table in (data.train_examples, data.validation_examples) for e in table}
    found = [record for side in sides for record in side if record.row_id in tokens]
    pairs = [record for record in found if isinstance(record, PreferencePair)]
    of_file = data.settings.validation_path is not None
    held_out = sum(record.row_id in tokens for record in sides.validation) if of_file else 0
    return Pairs(pairs, [tokens[pair.row_id] for pair in pairs], held_out)


def score_responses(pairs: Sequence[PreferencePair], scorer: Any, path: Path, *, begun: bool) -> None:
    """Writes reward and cost of every response to `path`; null where scoring failed.

    Args:
        begun: `path` holds some of these scores, and the scorer is asked about the others only.

    Raises:
        ScoreError: the scorer does not exist, or failed on every response it was asked about.
    """
    if not (begun and path.is_file()):
        write_samples(path, [sample for pair in pairs for sample in _responses(pair)])
    score(path, scorer)


def weigh_by_scores(path: Path, lam: float) -> Weighed:
    """w = reward - lam * cost, from what `score_responses` wrote: the responses in the order of the pairs."""
    samples = read_samples(path)
    found = Weighed([], [], [])
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        found.chosen.append(_worth(chosen, lam))
        found.rejected.append(_worth(rejected, lam))
        sides = {"chosen": chosen, "rejected": rejected}
        values = {f"{side}_{what}": getattr(s, what) for side, s in sides.items() for what in ("reward", "cost")}
        found.columns.append({name: value for name, value in values.items() if value is not None})
    return found


def weigh_by_models(
    examples: Sequence[EncodedPair],
    models: Mapping[str, float],
    reference: str,
    tokenizer: Any,
    device: str,
    options: Mapping[str, Any] | None = None,
) -> Weighed:
    """w = sum_k m_k log(pi_k / pi_ref); one model is held at a time.

    Args:
        models: folder -> m_k.
        reference: folder of pi_ref.
        options: of their PolicySpec, such as dtype.
    """

    def logps(folder: str) -> Tensor:
        policy = load_policy(PolicySpec(model=folder, **(options or {}))).to(device)
        return torch.stack(response_logps(policy, examples, pad_id(tokenizer)))

    base = logps(reference)
    total = sum((factor * (logps(folder) - base) for folder, factor in models.items()), torch.zeros_like(base))
    chosen, rejected = total.tolist()
    return Weighed(chosen, rejected, [{} for _ in examples])


def labelled_rows(
    pairs: Sequence[PreferencePair], weighed: Weighed, targets: bool = True
) -> list[dict[str, Any] | None]:
    """A row of format trl for every pair, None for one without w. Costs and safety labels of the data stay where
    no scorer gave any.

    Without `targets` the pairs keep the label that they have.
    """
    rows: list[dict[str, Any] | None] = []
    for pair, chosen, rejected, columns in zip(pairs, *weighed, strict=True):
        if chosen is None or rejected is None:
            rows.append(None)
            continue
        # a scorer's costs need not agree with the data's safety labels
        known = () if columns else ("chosen_cost", "rejected_cost", "chosen_safe", "rejected_safe")
        given = {name: getattr(pair, name) for name in known} | {"offset": pair.offset or None}
        own = pair.target if pair.target != 1 else None
        rows.append(
            {
                "prompt": _as_column(pair.prompt),
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                **({"target": label} if (label := sigmoid(chosen - rejected) if targets else own) is not None else {}),
                **{name: value for name, value in given.items() if value is not None},
                **columns,
                "row_id": pair.row_id,
            }
        )
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _responses(pair: PreferencePair) -> tuple[Sample, Sample]:
    prompt = plain_text(pair.prompt)
    return Sample(pair.row_id, 0, prompt, pair.chosen), Sample(pair.row_id, 1, prompt, pair.rejected)


def _worth(sample: Sample, lam: float) -> float | None:
    return None if sample.reward is None or sample.cost is None else sample.reward - lam * sample.cost


def _as_column(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [message._asdict() for message in prompt]
