"""One function per dataset format: a row of a file -> `PreferencePair`. Strings in, strings out; no torch, no files.

Two things can be wrong with a row, and they are told apart by type:

- `RowDefect`: the row is well formed and useless, as real data sets have them (an empty reply, two equal replies).
  It is skipped and counted under `reason`.
- `FormatError`: the row is not of this format (a missing column, a number where text belongs). Skipping would hide a
  wrong file or a wrong `format`, so reading stops, and the message says what to change.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

Row = Mapping[str, object]


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, of which the first is preferred with probability `target`.

    Attributes:
        rejected: empty in a demonstration, which has one response only and serves the supervised warm-up.
        target: probability that `chosen` is preferred, in [0, 1].
        offset: nats added to the margin of this pair's loss.
        row_id: where the pair came from, `file:row`, to name it in messages.
    """

    prompt: str
    chosen: str
    rejected: str
    target: float = 1.0
    offset: float = 0.0
    row_id: str = ""


class FormatError(ValueError):
    """Data that cannot be read as asked; the message names file, row and column where known, and the fix."""


class RowDefect(Exception):
    """A well-formed row that cannot be used; `reason` is the name it is counted under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def trl(row: Row) -> PreferencePair:
    """TRL's plain preference rows: `prompt`, `chosen`, `rejected`; also `target` and `offset`; the rest is ignored."""
    if "prompt" not in row and str(row.get("chosen", "")).startswith(HUMAN):
        raise FormatError("no column 'prompt', and 'chosen' is a Human/Assistant transcript: set format: hh")
    pair = PreferencePair(
        prompt=text(row, "prompt"),
        chosen=text(row, "chosen"),
        rejected=text(row, "rejected"),
        target=number(row, "target", default=1.0, low=0.0, high=1.0),
        offset=number(row, "offset", default=0.0),
    )
    return usable(pair)


def hh(row: Row) -> PreferencePair:
    """Anthropic HH transcripts (arXiv:2204.05862): columns `chosen` and `rejected`, whole dialogues as raw text.

    The last Assistant turn is the response; the prompt is everything before it, its `Assistant:` included. Nothing is
    stripped, so a response keeps the space that follows the colon, and prompt + response is the transcript.
    """
    prompt, chosen = last_reply(row, "chosen")
    rejected_prompt, rejected = last_reply(row, "rejected")
    if prompt != rejected_prompt:
        raise RowDefect("prompt_mismatch")
    return usable(PreferencePair(prompt, chosen, rejected))


def demonstration(row: Row) -> PreferencePair:
    """TRL's rows for supervised fine-tuning: `prompt`, `completion`. They have no rejected response."""
    pair = PreferencePair(text(row, "prompt"), text(row, "completion"), rejected="")
    if not pair.chosen.strip():
        raise RowDefect("empty")
    return pair


FORMATS: dict[str, Callable[[Row], PreferencePair]] = {"trl": trl, "hh": hh, "demonstration": demonstration}


def split_key(prompt: str) -> str:
    """What decides on which side of a split a prompt falls: its first Human turn, or all of a prompt without turns.

    Dialogue data holds one dialogue at several lengths (146 of the 2354 prompts of HH helpful-base test continue
    another row's), so a longer prompt contains the shorter one's response. Splitting by the whole prompt would leak it.
    """
    return prompt.partition(ASSISTANT)[0]


def text(row: Row, column: str) -> str:
    """The string in `column`. Raises FormatError where it is absent, not a string, or not encodable as UTF-8."""
    if column not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise FormatError(f"no column {column!r} (columns: {found}): rename it, or choose another format: {known()}")
    value = row[column]
    if not isinstance(value, str):
        raise FormatError(f"column {column!r} must be text, got {shown(value)}: write one string, or drop the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FormatError(
                f"column {column!r} has half of a surrogate pair at character {error.start}: "
                "write the character whole (\\ud83d\\ude00, not \\ud83d), or drop the row"
            ) from None
    return value


def number(row: Row, column: str, *, default: float, low: float = -math.inf, high: float = math.inf) -> float:
    """The finite number in `column` within [low, high]; `default` where the column is absent."""
    if column not in row:
        return default
    value = row[column]
    # bool is an int to Python, but a label true/false in this column means the file is of another format
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"column {column!r} must be a number, got {shown(value)}: fill it, or drop the column")
    if not (math.isfinite(value) and low <= value <= high):
        wanted = "finite" if math.isinf(low) else f"in [{low:g}, {high:g}]"
        raise FormatError(f"column {column!r} must be {wanted}, got {value!r}: correct it, or drop the row")
    return float(value)


def last_reply(row: Row, column: str) -> tuple[str, str]:
    """(everything up to and including the last `Assistant:`, the reply after it) of a transcript."""
    before, marker, reply = text(row, column).rpartition(ASSISTANT)
    if not marker:
        raise FormatError(f"column {column!r} has no {ASSISTANT!r} turn: it is not an HH transcript; known: {known()}")
    if HUMAN in reply:  # the dialogue goes on after the Assistant's last turn: there is no reply to rate
        raise RowDefect("human_last")
    return before + marker, reply


def usable(pair: PreferencePair) -> PreferencePair:
    """The pair itself. Raises RowDefect where a response is blank, or both are the same and nothing can be learned."""
    if not (pair.chosen.strip() and pair.rejected.strip()):
        raise RowDefect("empty")
    if pair.chosen == pair.rejected:
        raise RowDefect("identical")
    return pair


def known() -> str:
    """The format names, for messages."""
    return ", ".join(FORMATS)


def shown(value: object) -> str:
    """The type of a wrong value, with the value itself if it is short: data may be long, and is not for the screen."""
    if value is None:
        return "null"
    name = type(value).__name__
    return f"{name} {value!r}" if isinstance(value, bool | float) else f"a value of type {name}"
