"""The values of a row, checked: text, numbers, flags, messages. Every error names the column and the mend."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from rsa_lightning.data.records import FormatError, Message, Prompt, Row, RowDefect

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
LARGEST = 3.4028234e38  # of single precision


class MissingColumn(FormatError):
    """A row without a column its format needs: most often a row of another format."""


def required(row: Row, column: str) -> object:
    """The value in `column`. Raises MissingColumn."""
    if column not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise MissingColumn(f"no column {column!r} (columns: {found}): rename it, or choose another format")
    return row[column]


def text(row: Row, column: str) -> str:
    """The string in `column`. Raises FormatError where it is absent, not a string, or not encodable as UTF-8."""
    return checked_text(required(row, column), f"column {column!r}")


def checked_text(value: object, where: str) -> str:
    """`value` where it is a string that UTF-8 can encode, else FormatError naming `where`."""
    if not isinstance(value, str):
        raise FormatError(f"{where} must be text, got {shown(value)}: write one string, or drop the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FormatError(
                f"{where} has half of a surrogate pair at character {error.start}: "
                "write the character whole (\\ud83d\\ude00, not \\ud83d), or drop the row"
            ) from None
    return value


def number(row: Row, column: str, *, default: float, low: float = -math.inf, high: float = math.inf) -> float:
    """The finite number in `column` within [low, high]; `default` where the column is absent."""
    if column not in row:
        return default
    return checked_number(row[column], f"column {column!r}", low=low, high=high)


def checked_number(value: object, where: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` where it is a finite number within [low, high], else FormatError naming `where`."""
    if not is_number(value):
        raise FormatError(f"{where} must be a number, got {shown(value)}: fill it, or drop the column")
    if not (finite(value) and low <= value <= high):
        wanted = "finite" if math.isinf(low) else f"at least {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise FormatError(f"{where} must be {wanted}, got {shown(value)}: correct it, or drop the row")
    return float(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number. A bool is an int to Python, but true or false tells of another format."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: int | float) -> bool:
    """Whether a batch holds it, which has single precision: NaN and the infinities are none, and 1e300 becomes one."""
    return abs(value) <= LARGEST  # NaN is not


def number_or_none(row: Row, column: str, *, low: float = -math.inf) -> float | None:
    """The finite number in `column`, at least `low`; None where it is absent or null."""
    return None if row.get(column) is None else checked_number(row[column], f"column {column!r}", low=low)


def flag_or_none(row: Row, column: str) -> bool | None:
    """True or false in `column`; None where it is absent or null."""
    return None if row.get(column) is None else flag(row, column)


def flag(row: Row, column: str) -> bool:
    """True or false in `column`. Numbers are refused: 1 may as well be a rating."""
    value = required(row, column)
    if not isinstance(value, bool):
        raise FormatError(f"column {column!r} must be true or false, got {shown(value)}: correct it, or drop the row")
    return value


def index(row: Row, column: str) -> int:
    """0 or 1 in `column`: which of two responses is meant."""
    value = required(row, column)
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise FormatError(f"column {column!r} must be 0 or 1, got {shown(value)}: correct it, or drop the row")
    return value


def prompt_of(row: Row, column: str = "prompt") -> Prompt:
    """The prompt in `column`: text, or a list of messages."""
    return messages(row, column) if isinstance(row.get(column), list) else text(row, column)


def messages(row: Row, column: str) -> tuple[Message, ...]:
    """The turns in `column`, a list of {"role": system | user | assistant, "content": text or text parts}."""
    turns = enumerate(listed(row, column), start=1)
    return tuple(turn(value, f"column {column!r}, message {i}", "role", "content", ROLES) for i, value in turns)


def sharegpt_turns(row: Row, column: str) -> tuple[Message, ...]:
    """The turns in `column`, a list of {"from": system | human | gpt, "value": text}."""
    turns = enumerate(listed(row, column), start=1)
    return tuple(turn(value, f"column {column!r}, turn {i}", "from", "value", SHAREGPT_ROLES) for i, value in turns)


def sharegpt_turn(row: Row, column: str) -> Message:
    """The one turn in `column`."""
    return turn(required(row, column), f"column {column!r}", "from", "value", SHAREGPT_ROLES)


def listed(row: Row, column: str) -> Sequence[object]:
    """The list in `column`, else FormatError."""
    value = required(row, column)
    if not isinstance(value, list):
        raise FormatError(f"column {column!r} must be a list, got {shown(value)}: correct it, or choose another format")
    return value


def turn(value: object, where: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Message:
    """One turn of a conversation, its role in our terms. Raises FormatError naming `where`."""
    if not isinstance(value, Mapping) or role_key not in value or text_key not in value:
        raise FormatError(f"{where} must be an object with {role_key!r} and {text_key!r}: correct it, or drop the row")
    role = value[role_key]
    if not isinstance(role, str) or role not in roles:
        raise FormatError(
            f"{where} has the {role_key} {shown_role(role)}; known: {', '.join(roles)}{other_roles(role)}"
        )
    return Message(roles[role], joined_parts(value[text_key], where))


def joined_parts(content: object, where: str) -> str:
    """The text of a message: a string, or a list of {"type": "text", "text": ...} parts joined as they are."""
    if not isinstance(content, list):
        return checked_text(content, where)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = shown_role(part.get("type")) if isinstance(part, Mapping) else shown(part)
            raise FormatError(f"{where} has a part of type {kind}: only text is trained on here; drop the row")
    return "".join(checked_text(part.get("text"), where) for part in content)


def other_roles(role: object) -> str:
    """The mend for a role of another format."""
    if role in ("human", "gpt"):
        return ". These are ShareGPT's roles: set format: sharegpt, or rename them"
    if role in ("user", "assistant"):
        return ". These are the roles of message lists: set format: trl or kto, or rename them"
    return ": rename it, or drop the row"


def shown_role(role: object) -> str:
    """A short name in quotes; a long text in its place is not for the screen."""
    return repr(role) if isinstance(role, str) and len(role) <= 20 and role.isprintable() else shown(role)


def shown(value: object) -> str:
    """The type of a wrong value, with the value itself if it is short: data may be long, and is not for the screen."""
    if value is None:
        return "null"
    name = type(value).__name__
    short = isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**9)
    return f"{name} {value!r}" if short else f"a value of type {name}"


def last_reply(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """(the messages before the last, the text of the last). Raises RowDefect where the last is not the assistant's."""
    if not turns:
        raise RowDefect("no_prompt")
    if turns[-1].role != "assistant":
        raise RowDefect("human_last")
    return turns[:-1], turns[-1].content
