"""samples.jsonl, the record of what a model answered: one JSON object a line. All figures are computed from it."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsa_lightning.checkpoint import write_text

log = logging.getLogger(__name__)


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
    """All samples of a file, in order. Raises SampleError on a folder, a bad line or an empty file."""
    path = Path(path)
    if path.is_dir():
        raise SampleError(f"{path} is a folder: name a file of samples in it, samples.jsonl as runs call it")
    with path.open(encoding="utf-8") as lines:
        samples = [from_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise SampleError(f"{path} holds no samples: generate it again")
    return samples


def write_samples(path: Path | str, samples: Iterable[Sample]) -> None:
    """Replace the file in one step: a reader, or a crash, sees the old file or the new one."""
    write_text(Path(path), "".join(map(to_line, samples)))


def resume_partial(partial: Path, header: dict[str, Any], chunk: int) -> int:
    """Cut a partial file back to its complete chunks and return how many samples they hold, or begin a new one.

    Its first line is `header`, all that the samples depend on; a file with another header is not continued.
    """
    found = _read_partial(partial, header) if partial.is_file() else None
    if found is None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return 0
    complete = len(found) // chunk * chunk
    write_text(partial, json.dumps(header) + "\n" + "".join(found[:complete]))
    log.info("continuing %s after %d samples", partial, complete)
    return complete


def publish(partial: Path, path: Path) -> None:
    """Drop the header and move the samples to their final name in one step."""
    with partial.open(encoding="utf-8") as lines:
        next(lines)
        write_text(path, "".join(lines))
    partial.unlink()


def _read_partial(partial: Path, header: dict[str, Any]) -> list[str] | None:
    """The intact lines of a partial file, or None, with a message, if it belongs to another run."""
    with partial.open(encoding="utf-8", errors="replace") as file:
        first, *lines = list(file) or [""]
    try:
        found = json.loads(first)
    except json.JSONDecodeError:
        log.warning("%s has no readable header: sampling starts again", partial)
        return None
    if changed := [name for name in header if not isinstance(found, dict) or found.get(name) != header[name]]:
        log.warning("%s was written with other %s: sampling starts again", partial, ", ".join(changed))
        return None
    for number, line in enumerate(lines):
        try:
            from_line(line, f"{partial}:{number + 2}")
        except SampleError:  # the line that was being written when the run died; nothing after it can be trusted
            return lines[:number]
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
