"""One function per dataset format: a row of a file -> records. Strings in, strings out; no torch, no files.

What can be wrong with a row is told apart by what happens:

- a record is returned, and `quality.py` judges it by the policies set: blank, identical and contradictory responses;
- `RowDefect`: the row is well formed and cannot be used, as real data sets have them (nothing to tell the prompt by, a
  dialogue that ends with the human). It is counted under `reason`;
- `FormatError`: the row is not of this format (a missing column, a number where text belongs). Skipping it would hide a
  wrong file or a wrong `format`, so the message says what to change.
"""

from collections.abc import Callable, Mapping

from rsa_lightning.data.columns import (
    MissingColumn,
    checked_number,
    checked_text,
    flag,
    flag_or_none,
    index,
    is_number,
    last_reply,
    listed,
    messages,
    number,
    number_or_none,
    prompt_of,
    sharegpt_turn,
    sharegpt_turns,
    shown,
    text,
)
from rsa_lightning.data.records import (
    ASSISTANT,
    HUMAN,
    FormatError,
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
    Record,
    Row,
    RowDefect,
    at_odds,
)

# --- TRL


def trl(row: Row) -> PreferencePair:
    """TRL's preference rows: `chosen`, `rejected`, and `prompt` unless both begin with it; text or message lists.

    Also `target` and `offset`, `chosen_cost` and `rejected_cost` (lower is better), `chosen_safe` and `rejected_safe`;
    and where `score_chosen` and `score_rejected` are numbers in the wrong order, the row contradicts itself. Other
    columns are ignored, rewards among them: the order says what they would.
    """
    sides = conversational_sides if isinstance(row.get("chosen"), list) else text_sides
    prompt, chosen, rejected = sides(row)
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        target=number(row, "target", default=1.0, low=0.0, high=1.0),
        offset=number(row, "offset", default=0.0),
        chosen_safe=flag_or_none(row, "chosen_safe"),
        rejected_safe=flag_or_none(row, "rejected_safe"),
        chosen_cost=number_or_none(row, "chosen_cost"),
        rejected_cost=number_or_none(row, "rejected_cost"),
        contradictory=wrong_order(row.get("score_chosen"), row.get("score_rejected")),
    )


def text_sides(row: Row) -> tuple[Prompt, str, str]:
    """(prompt, chosen, rejected) of a row whose responses are text."""
    if "prompt" in row:
        return asked(prompt_of(row)), text(row, "chosen"), text(row, "rejected")
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if chosen.startswith(HUMAN):
        raise FormatError("no column 'prompt', and 'chosen' is a Human/Assistant transcript: set format: hh")
    prompt = common_prompt(chosen, rejected)
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def conversational_sides(row: Row) -> tuple[Prompt, str, str]:
    """(prompt, chosen, rejected) of a row whose responses are message lists, the assistant's reply last."""
    turns, rejected_turns = messages(row, "chosen"), messages(row, "rejected")
    (before, chosen), (before_rejected, rejected) = last_reply(turns), last_reply(rejected_turns)
    if before != before_rejected:
        raise RowDefect("prompt_mismatch")
    return joined(prompt_of(row) if "prompt" in row else (), before), chosen, rejected


def joined(given: Prompt, before: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt from a column `given` and the messages `before` the reply.

    A text with nothing before is the user's message. Where there are messages, it must be the first or the last thing
    the user says in them, as in UltraFeedback-binarized; a message list either begins them or is put in front.
    """
    if not isinstance(given, str):
        return asked_messages(before if before[: len(given)] == given else given + before)
    if not before:
        return (Message("user", given),)
    said = [message.content.strip() for message in before if message.role == "user"]
    if given.strip() not in (said[:1] + said[-1:]):
        raise RowDefect("prompt_mismatch")
    return asked_messages(before)


def asked(prompt: Prompt) -> Prompt:
    """A prompt as it is, where messages ask for a reply."""
    return prompt if isinstance(prompt, str) else asked_messages(prompt)


def asked_messages(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of a prompt. Raises RowDefect where the user says nothing in them, or the assistant spoke last."""
    if not any(message.role == "user" for message in turns):
        raise RowDefect("no_prompt")
    if turns[-1].role == "assistant":
        raise RowDefect("assistant_last")
    return turns


def common_prompt(chosen: str, rejected: str) -> str:
    """The longest common beginning that does not end within a word of either text; a last space is the responses'.

    Raises RowDefect "no_prompt" where that is blank, or where the texts are equal and do not tell where it ends.
    """
    shorter = min(len(chosen), len(rejected))
    prompt = chosen[: next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)]
    if any(within_word(side, len(prompt)) for side in (chosen, rejected)):
        prompt = prompt[: -len(prompt.split()[-1])]
    prompt = prompt.removesuffix(" ")
    if not prompt.strip() or chosen == rejected:
        raise RowDefect("no_prompt")
    return prompt


def within_word(side: str, at: int) -> bool:
    """Whether the characters on both sides of a cut before index `at` belong to one word."""
    return 0 < at < len(side) and not side[at - 1].isspace() and not side[at].isspace()


def wrong_order(chosen: object, rejected: object) -> bool:
    """Whether both are numbers, and the rejected response has the higher score."""
    return is_number(chosen) and is_number(rejected) and chosen < rejected


# --- PKU-SafeRLHF


def pku(row: Row, criterion: str) -> PreferencePair:
    """PKU-SafeRLHF (arXiv:2310.12773, 2406.15513), both releases: two responses and two independent labels.

    Args:
        criterion: helpful takes `better_response_id`, safe takes `safer_response_id`. The newer release's severity
            levels become costs.
    """
    preferred = index(row, "better_response_id" if criterion == "helpful" else "safer_response_id")
    responses, safe, costs = [text(row, "response_0"), text(row, "response_1")], flags(row), severities(row)
    other = 1 - preferred
    disagreement = any(map(at_odds, safe, costs))
    if criterion == "safe":
        disagreement = disagreement or less_safe(safe, costs, preferred)
    return PreferencePair(
        text(row, "prompt"),
        responses[preferred],
        responses[other],
        chosen_safe=safe[preferred],
        rejected_safe=safe[other],
        chosen_cost=costs[preferred],
        rejected_cost=costs[other],
        contradictory=disagreement,
    )


def pku_labels(row: Row) -> tuple[RatedResponse, RatedResponse]:
    """PKU-SafeRLHF as unpaired ratings: each response is desirable where it is safe."""
    prompt, safe, costs = text(row, "prompt"), flags(row), severities(row)
    first, second = (
        RatedResponse(prompt, text(row, f"response_{i}"), safe[i], costs[i], contradictory=at_odds(safe[i], costs[i]))
        for i in (0, 1)
    )
    return first, second


def flags(row: Row) -> list[bool]:
    """The safety labels of both responses."""
    return [flag(row, f"is_response_{i}_safe") for i in (0, 1)]


def severities(row: Row) -> list[float | None]:
    """The severity levels of both responses, 0 (none) and up; None where the release has none."""
    return [number_or_none(row, f"response_{i}_severity_level", low=0.0) for i in (0, 1)]


def less_safe(safe: list[bool], costs: list[float | None], preferred: int) -> bool:
    """Whether the response called safer is, by flags or severities, the less safe one."""
    other = 1 - preferred
    if safe[preferred] != safe[other]:
        return not safe[preferred]
    mine, its = costs[preferred], costs[other]
    return not safe[preferred] and mine is not None and its is not None and mine > its


# --- other sources


def hh(row: Row) -> PreferencePair:
    """Anthropic HH transcripts (arXiv:2204.05862): columns `chosen` and `rejected`, whole dialogues as raw text.

    The last Assistant turn is the response; the prompt is everything before it, its `Assistant:` included. Nothing is
    stripped, so a response keeps the space that follows the colon, and prompt + response is the transcript.
    """
    prompt, chosen = transcript(row, "chosen")
    rejected_prompt, rejected = transcript(row, "rejected")
    if prompt != rejected_prompt:
        raise RowDefect("prompt_mismatch")
    return PreferencePair(prompt, chosen, rejected)


def transcript(row: Row, column: str) -> tuple[str, str]:
    """(everything up to and including the last `Assistant:`, the reply after it) of a transcript."""
    before, marker, reply = text(row, column).rpartition(ASSISTANT)
    if not marker:
        raise FormatError(f"column {column!r} has no {ASSISTANT!r} turn: it is not an HH transcript; known: {known()}")
    if HUMAN in reply:  # the dialogue goes on after the Assistant's last turn: there is no reply to rate
        raise RowDefect("human_last")
    return before + marker, reply


def sharegpt(row: Row) -> PreferencePair:
    """ShareGPT-style rows, as LLaMA-Factory has them: `conversations` of {from, value}, and one turn each in `chosen`
    and `rejected`; optionally a `system` text."""
    turns = sharegpt_turns(row, "conversations")
    if row.get("system"):
        turns = with_system(text(row, "system"), turns)
    return PreferencePair(asked_messages(turns), gpt_reply(row, "chosen"), gpt_reply(row, "rejected"))


def with_system(system: str, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation with its system text first, once."""
    if not turns or turns[0].role != "system":
        return (Message("system", system), *turns)
    if turns[0].content != system:
        raise FormatError("column 'system' and the first turn are two different system texts: keep one of them")
    return turns


def gpt_reply(row: Row, column: str) -> str:
    """The text of the one gpt turn in `column`."""
    reply = sharegpt_turn(row, column)
    if reply.role != "assistant":
        raise FormatError(f"column {column!r} must be a turn of gpt: correct its 'from', or drop the row")
    return reply.content


def kto(row: Row) -> RatedResponse:
    """Unpaired ratings: `messages`, or `prompt` and `completion`; and `label`, true where the response is desirable."""
    return RatedResponse(*answered(row), desirable=flag(row, "label"))


def demonstration(row: Row) -> RatedResponse:
    """TRL's rows for supervised fine-tuning: `messages`, or `prompt` and `completion`. Every response is desirable."""
    return RatedResponse(*answered(row))


def answered(row: Row) -> tuple[Prompt, str]:
    """(prompt, response) from `messages`, or from `prompt` and `completion`, each text or a message list."""
    # a table of mixed rows has null where a row lacks the column
    if row.get("messages") is not None:
        before, response = last_reply(messages(row, "messages"))
        return asked_messages(before), response
    if isinstance(row.get("completion"), list):
        before, response = last_reply(messages(row, "completion"))
        return joined(prompt_of(row), before), response
    return asked(prompt_of(row)), text(row, "completion")


def ultrafeedback(row: Row) -> PreferencePair:
    """Several scored responses to one `instruction` or `prompt`: the best against the worst, the first among equals.

    `completions` is a list of objects with a response and a score (UltraFeedback, arXiv:2310.01377), or `responses` and
    `scores` are lists in step. Raises RowDefect "single_response", or "tied" where all have one score.
    """
    scored = scored_completions(row) if "completions" in row else scored_lists(row)
    if len(scored) < 2:
        raise RowDefect("single_response")
    best, worst = max(scored, key=lambda pair: pair[1]), min(scored, key=lambda pair: pair[1])
    if best[1] == worst[1]:
        raise RowDefect("tied")
    return PreferencePair(asked(prompt_of(row, "instruction" if "instruction" in row else "prompt")), best[0], worst[0])


def scored_completions(row: Row) -> list[tuple[str, float]]:
    """(response, score) of each object in `completions`."""
    found = []
    for i, item in enumerate(listed(row, "completions"), start=1):
        where = f"column 'completions', item {i}"
        if not isinstance(item, Mapping):
            raise FormatError(f"{where} must be an object with a response and a score, got {shown(item)}: correct it")
        response = checked_text(first_of(item, ("response", "text", "content"), where), f"{where}, its response")
        score = checked_number(first_of(item, ("overall_score", "score", "rating"), where), f"{where}, its score")
        found.append((response, score))
    return found


def first_of(item: Mapping[str, object], names: tuple[str, ...], where: str) -> object:
    """The value under the first of `names` that is there."""
    for name in names:
        if name in item:
            return item[name]
    raise FormatError(f"{where} has none of {', '.join(names)}: rename its fields, or choose another format")


def scored_lists(row: Row) -> list[tuple[str, float]]:
    """(response, score) from the parallel lists `responses` and `scores`."""
    responses, scores = listed(row, "responses"), listed(row, "scores")
    if len(responses) != len(scores):
        raise FormatError(f"{len(responses)} 'responses' and {len(scores)} 'scores': give every response its score")
    return [
        (checked_text(response, f"column 'responses', item {i}"), checked_number(score, f"column 'scores', item {i}"))
        for i, (response, score) in enumerate(zip(responses, scores, strict=True), start=1)
    ]


# --- all of them

FORMATS: dict[str, Callable[..., Record | tuple[Record, ...]]] = {
    "trl": trl,
    "pku": pku,
    "pku_labels": pku_labels,
    "hh": hh,
    "sharegpt": sharegpt,
    "kto": kto,
    "ultrafeedback": ultrafeedback,
    "demonstration": demonstration,
}
CRITERIA = {"pku": ("helpful", "safe")}  # the formats with several labels per row

# what tells a format by its columns, the most telling first
SIGNS = [
    ({"response_0", "response_1", "is_response_0_safe"}, "PKU-SafeRLHF", "pku (pairs) or pku_labels (ratings)"),
    ({"conversations", "chosen", "rejected"}, "ShareGPT-style preference", "sharegpt"),
    ({"messages", "label"}, "unpaired rating", "kto"),
    ({"completion", "label"}, "unpaired rating", "kto"),
    ({"completions"}, "UltraFeedback", "ultrafeedback"),
    ({"responses", "scores"}, "UltraFeedback", "ultrafeedback"),
    ({"prompt", "chosen", "rejected"}, "TRL's preference", "trl"),
    ({"prompt", "completion"}, "demonstration", "demonstration"),
    ({"messages"}, "demonstration", "demonstration"),
]


def read_row(format: str, row: Row, criterion: str | None = None) -> tuple[Record, ...]:
    """The records of one row: one, or two where a format rates two responses.

    Raises:
        FormatError: unknown format or criterion, or the row is not of this format.
        RowDefect: the row cannot be used.
    """
    check_format(format, criterion)
    try:
        found = FORMATS[format](row, criterion) if format in CRITERIA else FORMATS[format](row)
    except FormatError as error:
        names = f": {known()}" if isinstance(error, MissingColumn) else ""
        raise FormatError(f"{error}{names}{hint(format, row)}") from None
    return found if isinstance(found, tuple) else (found,)


def check_format(format: str, criterion: str | None) -> None:
    """Raise FormatError unless there is such a format, with a criterion where its rows carry two labels."""
    if format not in FORMATS:
        raise FormatError(f"unknown format {format!r}; known: {known()}")
    choices = CRITERIA.get(format)
    if choices is None and criterion is not None:
        raise FormatError(f"{format} carries one label per row: remove criterion ({criterion!r})")
    if choices is not None and criterion not in choices:
        given = "" if criterion is None else f", got {criterion!r}"
        raise FormatError(f"{format} carries two labels per row: set criterion: {' or '.join(choices)}{given}")


def hint(format: str, row: Row) -> str:
    """What the columns of a row look like, where that is another format."""
    for columns, name, mend in SIGNS:
        if columns <= row.keys():
            return "" if format in mend.split() else f". These are {name} columns: set format: {mend}"
    return ""


def known() -> str:
    """The format names, for messages."""
    return ", ".join(FORMATS)
