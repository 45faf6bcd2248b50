"""What is wrong with data that reads well, and what is to be done about it: policies, and the searches they need."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

from rsa_lightning.data.records import PreferencePair, Prompt, RatedResponse, Record, costs_disagree, human_turns

Policy = Literal["drop", "keep", "fail"]
DropOrFail = Literal["drop", "fail"]


@dataclass(frozen=True)
class Defects:
    """What to do with rows that have a defect: drop (and count) them, keep them, or fail after all rows are read.

    Attributes:
        empty: a blank response. Kept, it is trained on as an end token alone.
        identical: both responses are the same, or differ only behind the place where they are cut.
        duplicate: the prompt, the responses and the label of an earlier row; the first stays.
        contradictory: both orders of one pair occur (all such rows), or the labels of a row disagree; a cost and a
            safety label do where one says safe (cost <= 0) and the other does not, unless anchored_costs is false.
        overlong: prompt or response is longer than the limits. Kept, it is cut.
        prompt_mismatch: the two responses do not follow the same prompt.
        wrong_type: the row is not of the format, or its line cannot be read.
        contaminated: a human turn of the prompt is an evaluation prompt.
        unusable: every other defect, by the name it is counted under (human_last, no_prompt, tied, ...).
        max_dropped: largest share of the rows that may be dropped; contaminated rows are not counted, nor what a
            relabelling leaves out.
    """

    empty: Policy = "drop"
    identical: Policy = "drop"
    duplicate: Policy = "drop"
    contradictory: Policy = "drop"
    overlong: Policy = "keep"
    prompt_mismatch: DropOrFail = "drop"
    wrong_type: DropOrFail = "fail"
    contaminated: Policy = "drop"
    unusable: DropOrFail = "drop"
    max_dropped: float = 0.5

    def __post_init__(self) -> None:
        for name in POLICIES:
            value, choices = getattr(self, name), ("drop", "fail") if name in WITHOUT_KEEP else ("drop", "keep", "fail")
            if value not in choices:
                raise ValueError(f"defects.{name} must be one of {', '.join(choices)}, got {value!r}")
        if not 0.0 <= self.max_dropped <= 1.0:
            raise ValueError(f"defects.max_dropped is a share of the rows in [0, 1], got {self.max_dropped}")

    def policy(self, reason: str) -> Policy:
        """What to do with rows that have the defect `reason`."""
        if reason in INTENDED:
            return "drop"
        name = reason if reason in POLICIES else "unusable"
        return getattr(self, name)


POLICIES = [field.name for field in dataclasses.fields(Defects) if field.name != "max_dropped"]
INTENDED = ("both_unsafe",)  # what a relabelling leaves out: no fault of the data, and always dropped
WITHOUT_KEEP = ("prompt_mismatch", "wrong_type", "unusable")  # of these rows there is nothing to keep

# what is wrong with a row that cannot be used, and what to do about it; its name alone says too little
WHY = {
    "already_rendered": "the prompt is a Human/Assistant transcript, and would be framed twice: remove template",
    "assistant_last": "the prompt ends with the assistant: end it with the user",
    "both_unsafe": "both responses are unsafe: there is none to prefer, and relabel leaves the pair out",
    "control_token": "a text contains a control token of the tokenizer or template: take it out of the text",
    "human_last": "the dialogue ends with the human, so there is no reply to rate: end it with the assistant",
    "no_prompt": "nothing tells where the prompt ends, or the user says nothing in it: add a column 'prompt'",
    "no_prompt_token": "the prompt has no token and the tokenizer no BOS: write a prompt",
    "no_response_token": "a response has no token: write one",
    "prompt_mismatch": "the two responses do not follow the same prompt: correct one of them",
    "single_response": "there are fewer than two responses to compare: use a format of ratings, such as kto",
    "template_refused": "the template raises an error for this conversation (a system message, or roles that do not "
    "alternate?): choose another template",
    "tied": "all responses have the same score: there is none to prefer",
}


def defects_of(record: Record, anchored: bool = True) -> tuple[str, ...]:
    """What is wrong with a record alone: empty, identical, contradictory.

    `anchored`: whether a cost of 0 may mean safe; costs and safety labels of a pair that disagree then contradict.
    """
    found = {"contradictory": record.contradictory}
    if isinstance(record, PreferencePair):
        found["contradictory"] = record.contradictory or (anchored and costs_disagree(record))
        found["empty"] = not (record.chosen.strip() and record.rejected.strip())
        found["identical"] = record.chosen == record.rejected
    else:
        found["empty"] = not record.response.strip()
    return tuple(name for name in ("empty", "identical", "contradictory") if found.get(name))


def repeated(records: Iterable[Record]) -> dict[str, list[int]]:
    """What is wrong with records together: {"duplicate": indices, "contradictory": indices}, each in order.

    A duplicate has the prompt, the responses and the label of an earlier record. Contradictory are all records of one
    prompt that prefer the one response and the other, or call one response desirable and undesirable. Space at the ends
    of texts does not count. A record may be both. One pass, and about 300 bytes for each record, whatever its length.
    """
    facts = [fact(record) for record in records]
    seen: set[Fact] = set()
    answers: dict[bytes, set[bool | None]] = {}
    duplicates = []
    for i, each in enumerate(facts):
        if each in seen:
            duplicates.append(i)
        seen.add(each)
        answers.setdefault(each.question, set()).add(each.answer)
    torn = [i for i, each in enumerate(facts) if answers[each.question] >= {True, False}]
    return {"duplicate": duplicates, "contradictory": torn}


class Fact(NamedTuple):
    """What a record says: equal for two that say the same.

    Attributes:
        question: digest of prompt and response; for a pair, of the prompt with both responses in a fixed order.
        answer: whether the response is desirable; for a pair, whether the first of that order is preferred, None where
            neither is.
        label: whether the row's own labels disagree; for a pair also whether it has that order, target and offset.
    """

    question: bytes
    answer: bool | None
    label: tuple[bool, ...] | tuple[bool, bool, float, float]


def fact(record: Record) -> Fact:
    """What a record says, in digests."""
    prompt = prompt_digest(record.prompt)
    if isinstance(record, RatedResponse):
        return Fact(digest("rated", prompt, record.response), record.desirable, (record.contradictory,))
    sides = [digest(record.chosen), digest(record.rejected)]
    question = digest("pair", prompt, *sorted(sides))
    in_order = sides == sorted(sides)
    label = (record.contradictory, in_order, record.target, record.offset)
    if sides[0] == sides[1] or record.target == 0.5:
        return Fact(question, None, label)
    return Fact(question, in_order == (record.target > 0.5), label)


def prompt_digest(prompt: Prompt) -> bytes:
    """A digest of a text or of messages; a text is never equal to messages."""
    if isinstance(prompt, str):
        return digest("text", prompt)
    return digest("messages", *(part for message in prompt for part in message))


def digest(*parts: str | bytes) -> bytes:
    """16 bytes that differ where a part differs, space at its ends aside."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else part.strip().encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "little"))  # so that ("ab", "c") is not ("a", "bc")
        hashed.update(data)
    return hashed.digest()


def evaluation_key(text: str) -> str:
    """A text without case and punctuation: its words of letters and digits, joined by one space.

    An accent may be written in its letter or after it, which gives the same key.
    """
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


def contaminated(records: Iterable[Record], evaluation_keys: set[str]) -> list[int]:
    """The indices of the records in whose prompt the human says an evaluation prompt, by `evaluation_key`."""
    keys = evaluation_keys - {""}  # a prompt without words is no evidence
    if not keys:
        return []
    return [
        i
        for i, record in enumerate(records)
        if any(evaluation_key(turn) in keys for turn in human_turns(record.prompt))
    ]
