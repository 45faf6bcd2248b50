"""What a row of data becomes, whatever its format: a preference pair or a rated response. Strings; no torch."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

Row = Mapping[str, object]


class Message(NamedTuple):
    """One turn of a conversation. Roles: system, user, assistant."""

    role: str
    content: str


# text is taken as it is; messages are rendered by a chat template
Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, of which the first is preferred with probability `target`.

    Attributes:
        target: probability that `chosen` is preferred, in [0, 1].
        offset: nats taken off the logit of this pair's loss: what its margin must exceed.
        chosen_safe, rejected_safe: safety labels, where the data has them.
        chosen_cost, rejected_cost: harm, higher for worse. Whether 0 means safe is a property of the data
            (`anchored_costs` of `PreferenceData`): it does for PKU-SafeRLHF's severity levels.
        contradictory: the row's own labels disagree about which response is preferred.
        row_id: where the pair came from, `file:row`, to name it in messages.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    target: float = 1.0
    offset: float = 0.0
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    chosen_cost: float | None = None
    rejected_cost: float | None = None
    contradictory: bool = False
    row_id: str = ""


@dataclass(frozen=True)
class RatedResponse:
    """One response to a prompt, desirable or not: what KTO learns from. A demonstration is a desirable one.

    Attributes:
        cost: graded harm, 0 for none and higher for worse.
        contradictory: the row's own labels disagree.
        row_id: `file:row`; a row that holds several responses appends `/0`, `/1`.
    """

    prompt: Prompt
    response: str
    desirable: bool = True
    cost: float | None = None
    contradictory: bool = False
    row_id: str = ""


Record = PreferencePair | RatedResponse


def at_odds(safe: bool | None, cost: float | None) -> bool:
    """Whether a response's safety label and its own anchored cost disagree: safe is a cost of 0 or less."""
    return safe is not None and cost is not None and safe != (cost <= 0)


def costs_disagree(pair: PreferencePair) -> bool:
    """Whether `at_odds` for either response."""
    return at_odds(pair.chosen_safe, pair.chosen_cost) or at_odds(pair.rejected_safe, pair.rejected_cost)


class FormatError(ValueError):
    """Data that cannot be read as asked; the message names file, row and column where known, and the fix."""


class RowDefect(Exception):
    """A well-formed row that cannot be used, whatever the policies say; `reason` is the name it is counted under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def with_row_id(records: Iterable[Record], row_id: str) -> tuple[Record, ...]:
    """The records of one row, named: `file:row`, with /0, /1 behind it where there are several."""
    found = tuple(records)
    if len(found) == 1:
        return (dataclasses.replace(found[0], row_id=row_id),)
    return tuple(dataclasses.replace(record, row_id=f"{row_id}/{i}") for i, record in enumerate(found))


def row_of(row_id: str) -> str:
    """The row that a record is of, without what `with_row_id` puts behind it where there are several."""
    return re.sub(r"(:\d+)/\d+$", r"\1", row_id)


def split_key(prompt: Prompt) -> str:
    """What decides on which side of a split a prompt falls: its first human turn, or all of a text without turns.

    Dialogue data holds one dialogue at several lengths (146 of the 2354 prompts of HH helpful-base test continue
    another row's), so a longer prompt contains the shorter one's response. Splitting by the whole prompt would leak it.
    """
    if isinstance(prompt, str):
        return prompt.partition(ASSISTANT)[0]
    return next((message.content for message in prompt if message.role == "user"), "")


def human_turns(prompt: Prompt) -> list[str]:
    """The texts of the human side: every user message, every Human turn of a transcript, or all of a plain text."""
    if not isinstance(prompt, str):
        return [message.content for message in prompt if message.role == "user"]
    if not prompt.startswith(HUMAN):
        return [prompt]
    return [turn.partition(ASSISTANT)[0] for turn in prompt.split(HUMAN)[1:]]


def as_transcript(question: str) -> str:
    """A question in the form of Anthropic HH's prompts; a transcript stays as it is."""
    return question if question.startswith(HUMAN) else f"{HUMAN} {question}{ASSISTANT}"


def plain_text(prompt: Prompt) -> str:
    """A prompt to show or to name: text as it is, messages as `role: content` lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)
