"""samples.jsonl, the record of what a model answered: one JSON object a line. All figures are computed from it."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class SampleError(ValueError):
    """A line of a samples file is not a sample; the message names file, line and field."""


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt. `logp` and `ref_logp` are sums over its tokens, in nats; None is not known."""

    prompt_id: str
    sample_id: int
    prompt: str
    text: str
    logp: float | None = None
    ref_logp: float | None = None
    reward: float | None = None
    cost: float | None = None


FIELDS = tuple(field.name for field in dataclasses.fields(Sample))
NUMBERS = ("logp", "ref_logp", "reward", "cost")


def to_line(sample: Sample) -> str:
    # allow_nan=False: NaN is not JSON, and another reader would choke on the line
    return json.dumps(dataclasses.asdict(sample), ensure_ascii=False, allow_nan=False) + "\n"


def from_line(line: str, place: str) -> Sample:
    """Parse one line; `place` is "file:line" for the message.

    Raises:
        SampleError: not JSON, not an object, a field missing, or a number that is neither finite nor null.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SampleError(f"{place} is not JSON ({error.msg}): delete the line, or generate the file again") from error
    if not isinstance(row, dict):
        raise SampleError(f"{place} is a {type(row).__name__}, not an object with the fields {', '.join(FIELDS)}")
    if missing := [name for name in FIELDS if name not in row]:
        raise SampleError(f"{place} lacks {', '.join(missing)}: a sample has the fields {', '.join(FIELDS)}")
    for name in NUMBERS:
        if row[name] is not None and not (_is_number(row[name]) and math.isfinite(row[name])):
            raise SampleError(f"{place}: {name} is {row[name]!r}, expected a finite number or null")
    return Sample(**{name: row[name] for name in FIELDS})


def read_samples(path: Path | str) -> list[Sample]:
    """All samples of a file, in order. Raises SampleError on a bad line or an empty file."""
    path = Path(path)
    with path.open(encoding="utf-8") as lines:
        samples = [from_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise SampleError(f"{path} holds no samples: generate it again")
    return samples


def write_samples(path: Path | str, samples: Iterable[Sample]) -> None:
    """Replace the file in one step: a reader, or a crash, sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(to_line, samples))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
