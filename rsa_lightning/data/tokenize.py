"""Text -> token ids -> `PreferenceBatch`. Prompt and response are tokenised apart and joined, so no token spans both.

The rules, for every tokenizer:

- at most one BOS, before the prompt, if the tokenizer itself would put one there; exactly one EOS, after the response;
- text of the user never becomes a control token: the eight letters of "<|eos|>" inside a prompt stay letters;
- what counts as response is known by length and never by comparing ids, so a pad token equal to EOS hides nothing;
- a prompt is cut from the left, then a response from the right, and never to nothing.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rsa_lightning.data.formats import FormatError, PreferencePair, RowDefect

ROLES = ("chosen", "rejected", "mismatched")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
PaddingSide = Literal["left", "right"]

_TEXTS_PER_CALL = 4096  # bounds the memory of one tokenizer call


class PreferenceBatch(TypedDict):
    """P pairs as B rows sorted by role, and the N response tokens to score, packed in row order."""

    input_ids: Int64[Tensor, "B T"]
    attention_mask: Int64[Tensor, "B T"]
    positions: Int64[Tensor, " N"]  # flat index b * T + t of the hidden state that predicts each response token
    labels: Int64[Tensor, " N"]  # the response tokens, EOS included; prompts and padding never appear
    cu_seqlens: Int64[Tensor, " B+1"]  # boundaries of the rows within the N packed tokens
    roles: Int64[Tensor, " B"]  # index into ROLES
    pair_ids: Int64[Tensor, " B"]  # index of the pair within the batch
    target: Float32[Tensor, " P"] | None  # None when every target is 1
    offset: Float32[Tensor, " P"] | None  # None when every offset is 0
    row_ids: list[str]  # one for each pair, to name a batch in a message


class EncodedPair(NamedTuple):
    """A pair as token ids: the prompt with its BOS, each response with its EOS. A demonstration has no `rejected`."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    target: float = 1.0
    offset: float = 0.0
    row_id: str = ""


class EncodedPairs(NamedTuple):
    """The outcome of `encode_pairs`.

    Attributes:
        examples: the pairs that fit.
        kept: index of each example in the list of pairs given.
        skipped: row ids of the others, by reason.
        truncated: number of prompts and of responses that were cut, among the kept.
    """

    examples: list[EncodedPair]
    kept: list[int]
    skipped: dict[str, list[str]]
    truncated: dict[str, int]


@dataclass(frozen=True)
class Lengths:
    """How long an encoded pair may become, in tokens.

    Attributes:
        max_length: prompt and response together.
        max_prompt_length: the prompt with its BOS. The rest of `max_length` is for the response.
        eos_when_truncated: whether a response that was cut still ends in EOS.
    """

    max_length: int
    max_prompt_length: int
    eos_when_truncated: bool = True

    def __post_init__(self):
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1 token, got {self.max_prompt_length}")
        if self.max_length < self.max_prompt_length + 2:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for one response token and EOS after a prompt of "
                f"max_prompt_length={self.max_prompt_length}: raise max_length or lower max_prompt_length"
            )


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; it round-trips any text, and puts BOS (never EOS) before a plain encoding.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the three special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [BOS, EOS, PAD]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"a tokenizer's vocab_size must hold 256 bytes and {len(special)} special tokens, got {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder, or of a model on the hub. Raises FormatError where there is none, or no EOS."""
    try:
        # AutoTokenizer gives some model types (qwen2) their own class whatever was saved beside them, and that class
        # splits words in another way than the file says: a plain tokenizer.json is taken as it is
        tokenizer = (PreTrainedTokenizerFast if _is_plain(Path(name)) else AutoTokenizer).from_pretrained(str(name))
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"no tokenizer at {name} ({first_line}): name a folder with tokenizer.json and tokenizer_config.json, "
            "or leave tokenizer out to train one on the data"
        ) from None
    check_tokenizer(tokenizer)
    return tokenizer


def _is_plain(folder: Path) -> bool:
    """Whether the folder's tokenizer is nothing but its tokenizer.json."""
    settings = folder / "tokenizer_config.json"
    if not (settings.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    declared = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
    return declared in ("TokenizersBackend", "PreTrainedTokenizerFast")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise FormatError unless the tokenizer has an EOS token: without one a model cannot learn to stop."""
    if tokenizer.eos_token_id is None:
        raise FormatError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no EOS token, so the model could not learn to stop: "
            "set tokenizer.eos_token to one of its special tokens and save it again with tokenizer.save_pretrained"
        )


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer itself begins a plain encoding with it, else []: having a BOS token is not enough."""
    if tokenizer.bos_token_id is None:
        return []
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    return [tokenizer.bos_token_id] if first == [tokenizer.bos_token_id] else []


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows: PAD, or EOS for want of it. Masks go by length, so the choice changes no number."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text alone: no special token is added, and none is recognised inside the text."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        part = list(texts[start : start + _TEXTS_PER_CALL])
        encoding = tokenizer(
            part, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids.extend(encoding["input_ids"])
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_prompt_length: int | None = None) -> list[int]:
    """[BOS] and the prompt, its last `max_prompt_length` tokens at most: what training and generation both start from.

    Raises:
        RowDefect: "no_prompt_token" where nothing would precede the first response token (empty prompt, no BOS);
            "control_token" where the text becomes a special token even so.
    """
    check_tokenizer(tokenizer)
    [ids] = encode_texts(tokenizer, [prompt])
    return join_prompt(ids, bos_prefix(tokenizer), max_prompt_length, control_ids(tokenizer))


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, limits: Lengths) -> EncodedPair:
    """One pair as token ids: `encode_pairs` for a single one. Raises RowDefect where it cannot be used."""
    result = encode_pairs(tokenizer, [pair], limits)
    for reason in result.skipped:
        raise RowDefect(reason)
    return result.examples[0]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], limits: Lengths) -> EncodedPairs:
    """Tokenise all pairs; those that cannot be used are skipped and counted by reason."""
    check_tokenizer(tokenizer)
    bos, eos, control = bos_prefix(tokenizer), tokenizer.eos_token_id, control_ids(tokenizer)
    columns = [encode_texts(tokenizer, [getattr(p, name) for p in pairs]) for name in ("prompt", "chosen", "rejected")]
    result = EncodedPairs([], [], {}, {"prompts": 0, "responses": 0})
    for index, (pair, prompt_ids, chosen_ids, rejected_ids) in enumerate(zip(pairs, *columns, strict=True)):
        # an empty `rejected` marks a demonstration: there is no response, not a response that ends at once
        responses = [chosen_ids, rejected_ids] if pair.rejected else [chosen_ids]
        try:
            prompt = join_prompt(prompt_ids, bos, limits.max_prompt_length, control)
            room = limits.max_length - len(prompt)
            closed = [close_response(ids, eos, room, limits.eos_when_truncated, control) for ids in responses]
        except RowDefect as defect:
            result.skipped.setdefault(defect.reason, []).append(pair.row_id)
            continue
        chosen, rejected = closed if pair.rejected else (closed[0], [])
        result.examples.append(EncodedPair(prompt, chosen, rejected, pair.target, pair.offset, pair.row_id))
        result.kept.append(index)
        result.truncated["prompts"] += len(bos) + len(prompt_ids) > limits.max_prompt_length
        result.truncated["responses"] += sum(len(ids) + 1 > room for ids in responses)
    return result


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids no user text may turn into: all special tokens but UNK, which is what unknown characters are meant to become.

    `split_special_tokens` keeps them out of byte-level vocabularies. A vocabulary that holds "</s>" as a plain piece
    can still produce it, so the ids are checked.
    """
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - roles
    return frozenset(set(tokenizer.all_special_ids) - unknown)


def join_prompt(ids: list[int], bos: list[int], max_length: int | None, control: frozenset[int]) -> list[int]:
    """BOS and the last ids that fit beside it. Raises RowDefect."""
    check_ids(ids, control)
    if max_length is not None and len(bos) + len(ids) > max_length:
        ids = ids[len(ids) - max(max_length - len(bos), 0) :]
    if not bos + ids:  # the first response token would have no state that predicts it
        raise RowDefect("no_prompt_token")
    return bos + ids


def close_response(ids: list[int], eos: int, room: int, eos_when_truncated: bool, control: frozenset[int]) -> list[int]:
    """The response and EOS within `room` tokens, at least one of them text. Raises RowDefect.

    A response of which not one token fits is no response: EOS alone would teach to say nothing.
    """
    check_ids(ids, control)
    if len(ids) + 1 <= room:
        kept, end = ids, [eos]
    elif eos_when_truncated:
        kept, end = ids[: max(room - 1, 0)], [eos]
    else:
        kept, end = ids[: max(room, 0)], []
    if not kept:
        raise RowDefect("no_response_token")
    return kept + end


def check_ids(ids: list[int], control: frozenset[int]) -> None:
    """Raise RowDefect where a text turned into a control token."""
    if not control.isdisjoint(ids):
        raise RowDefect("control_token")


def collate(
    examples: Sequence[EncodedPair],
    roles: Sequence[str] = ("chosen", "rejected"),
    pad_id: int = 0,
    padding_side: PaddingSide = "right",
) -> PreferenceBatch:
    """Pad the rows of all `roles` to one length, and list the response tokens, so the shift by one exists here only.

    A response token at t of row b is predicted by the state at t − 1, whose flat index is b·T + t − 1. Left padding
    moves t by the padding of its row; labels, `cu_seqlens` and everything else are the same.

    Raises:
        ValueError: a role is unknown, a pair lacks the response of a role, or "mismatched" is asked of a single pair.
    """
    rows = [row for role in roles for row in role_rows(examples, role)]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    positions: list[Tensor] = []
    labels: list[int] = []
    for b, (prompt, response) in enumerate(rows):
        size = len(prompt) + len(response)
        start = width - size if padding_side == "left" else 0
        input_ids[b, start : start + size] = torch.tensor([*prompt, *response])
        attention_mask[b, start : start + size] = 1
        first = b * width + start + len(prompt) - 1
        positions.append(torch.arange(first, first + len(response)))
        labels.extend(response)
    return PreferenceBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        positions=torch.cat(positions),
        labels=torch.tensor(labels),
        cu_seqlens=torch.tensor([0, *accumulate(len(response) for _, response in rows)]),
        roles=torch.tensor([ROLES.index(role) for role in roles]).repeat_interleave(len(examples)),
        pair_ids=torch.arange(len(examples)).repeat(len(roles)),
        target=optional([e.target for e in examples], neutral=1.0),
        offset=optional([e.offset for e in examples], neutral=0.0),
        row_ids=[e.row_id for e in examples],
    )


def role_rows(examples: Sequence[EncodedPair], role: str) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(prompt, response) of every pair in one role. Mismatched: the chosen response of the pair before, cyclically."""
    if role == "chosen":
        return [(e.prompt, e.chosen) for e in examples]
    if role == "rejected":
        for e in examples:
            if not e.rejected:
                raise ValueError(f"{e.row_id or 'a pair'} has no rejected response: demonstrations are for a warm-up")
        return [(e.prompt, e.rejected) for e in examples]
    if role == "mismatched":
        if len(examples) < 2:
            raise ValueError("mismatched responses need at least 2 pairs in a batch: raise batch_size to 2 or more")
        # cut to the longest row the pairs have anyway: a foreign response must not push a row beyond max_length
        width = max(len(e.prompt) + max(len(e.chosen), len(e.rejected)) for e in examples)
        return [(e.prompt, examples[i - 1].chosen[: width - len(e.prompt)]) for i, e in enumerate(examples)]
    raise ValueError(f"unknown role {role!r}; roles are {', '.join(ROLES)}")


def optional(values: list[float], neutral: float) -> Float32[Tensor, " P"] | None:
    """The values as float32, or None where all are neutral and a loss may leave the term out."""
    return None if all(v == neutral for v in values) else torch.tensor(values, dtype=torch.float32)
