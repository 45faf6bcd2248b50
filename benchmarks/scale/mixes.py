"""Preference pairs whose lengths are mixed as stories, as a long tail, or as people's are."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rsa_lightning import stories


class Mix(NamedTuple):
    """Pairs whose lengths are mixed in one way: a file of rows."""

    name: str
    path: Path
    format: str = "trl"


def length_mixes(folder: Path, pairs: int, human: Path | None) -> Iterator[Mix]:
    """Files of at least this many training pairs, in `folder`; `human` is one of HH transcripts."""
    train, _ = stories.prompts()
    yield written(folder, "stories", stories.sample_pairs(train, "helpful", pairs + pairs // 4, seed=0))
    yield written(folder, "long tail", list(long_tailed(pairs + pairs // 4)))
    if human is not None:
        yield Mix("HH", human, "hh")


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Mix:
    """The rows as a file of the folder."""
    path = folder / f"{name.replace(' ', '_')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Mix(name, path)


def long_tailed(count: int) -> Iterator[dict[str, str]]:
    """Responses of lognormal length: half below 20 words, one in a hundred above 200."""
    rng = random.Random(0)

    def words(size: float) -> str:
        return "".join(f" {rng.randrange(100)}" for _ in range(max(1, int(size))))

    for index in range(count):
        yield {
            "prompt": f"{index}:{words(rng.uniform(4, 24))}",
            "chosen": words(rng.lognormvariate(3, 1)),
            "rejected": words(rng.lognormvariate(3, 1)),
        }
