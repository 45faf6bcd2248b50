"""Sample answers from a Hugging Face folder and record them with their log-probabilities in samples.jsonl.

The answers are drawn by a plain loop with a private generator: chunk i is seeded by (seed, i) alone, so a run that
was interrupted and continued writes the same file as one that was not. Log-probabilities come from a second,
teacher-forced pass, the same code for the model and for the model it started from, so that equal weights give equal
numbers and their difference is exactly zero. Several models may answer as one, their mixture: it is called like a
model, so that the law that is sampled and the one whose log-probability is recorded are both the mixture's.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsa_lightning.checkpoint import folder_hashes
from rsa_lightning.data.records import Prompt, RowDefect, plain_text
from rsa_lightning.data.tokenize import encode_prompt, load_tokenizer
from rsa_lightning.evaluation.folders import (
    Folders,
    GenerationError,
    as_one,
    checked_folder,
    common_tokenizer,
    eos_ids,
    load_model,
    members_of,
)
from rsa_lightning.evaluation.samples import Sample, publish, resume_partial, to_line

log = logging.getLogger(__name__)

LOGITS_BYTES = 256 * 2**20  # float32 logits held at once while answers are scored


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The defaults sample from the model's own distribution.

    `logp` is always that of the model itself, at temperature 1. E[logp − ref_logp] is the KL divergence to the start
    model only if the answers were drawn from that same law; with another temperature or with top_p < 1 `ref_logp` is
    therefore recorded as null, and the report shows no KL.
    """

    samples_per_prompt: int = 8
    max_new_tokens: int = 128
    max_prompt_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_new_tokens", "max_prompt_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"sampling.temperature must be positive and finite, got {self.temperature}; 1 is the model's own law"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is a probability mass in (0, 1], got {self.top_p}; 1 keeps every token")

    @property
    def untruncated(self) -> bool:
        return self.temperature == 1 and self.top_p == 1


class Generation(NamedTuple):
    """What one call of `generate` did."""

    path: Path
    samples: int
    resumed: int  # samples that were found in the partial file
    tokens: int  # tokens sampled by this call
    unfinished: int  # answers of this call that reached max_new_tokens without EOS


class Answers(NamedTuple):
    tokens: list[list[int]]  # EOS included where it was sampled
    finished: list[bool]


def generate(
    model_folder: Folders,
    prompts: Mapping[str, Prompt],
    path: Path | str,
    *,
    start_folder: Path | str | None = None,
    template: str | None = None,
    sampling: Sampling = Sampling(),
    device: str = "cpu",
    dtype: str = "auto",
) -> Generation:
    """Answer every prompt `samples_per_prompt` times and write samples.jsonl, with `reward` and `cost` still null.

    Chunks are appended to `<path>.partial`; the file itself appears in one rename when all are there. A rerun with
    the same model, prompts and sampling continues after the last complete chunk, any other rerun starts again and
    says so.

    Args:
        model_folder: the model; or folders with weights, whose mixture answers (see decoding.py). The tokenizer and the
            tokens that end an answer are then those of the first.
        prompts: prompt_id -> prompt, text or messages, tokenised as in training.
        template: of prompts, as in PreferenceData; None leaves text as it is and gives messages the tokenizer's own.
        start_folder: the model whose log-probabilities go into `ref_logp`; None leaves them null.
        dtype: of the weights, as transformers names it; "auto" is that of the file. Softmaxes are float32 in any case.

    Raises:
        GenerationError: no prompts, or one that cannot be tokenised; a folder that is no model; a tokenizer without
            EOS; models with different vocabularies; a context that is too short for the request; weights
            that give NaN.
    """
    path, members = Path(path), members_of(model_folder)
    if not prompts:
        raise GenerationError("there are no prompts to answer: the evaluation split is empty")
    start_folder = _usable_start(start_folder, sampling)
    tokenizer = common_tokenizer([*members, *([start_folder] if start_folder else [])])
    encoded = _encode(tokenizer, prompts, sampling.max_prompt_length, template)
    loaded = {folder: load_model(folder, device, dtype) for folder in (*members, start_folder) if folder}
    for folder in members:
        _check_context(loaded[folder].config, max(map(len, encoded.values())), sampling)
    model, start = as_one(members, loaded), start_folder and loaded[start_folder]
    eos = eos_ids(model, tokenizer)

    rows = [(key, sample_id) for key in prompts for sample_id in range(sampling.samples_per_prompt)]
    partial = path.with_name(path.name + ".partial")
    resumed = resume_partial(partial, _header(members, start_folder, prompts, template, sampling), sampling.batch_size)
    tokens = unfinished = 0
    with partial.open("a", encoding="utf-8") as file:
        for first in range(resumed, len(rows), sampling.batch_size):
            chunk = rows[first : first + sampling.batch_size]
            chunk_prompts = [encoded[key] for key, _ in chunk]
            generator = _chunk_generator(sampling.seed, first, device)
            answers = sample_answers(model, chunk_prompts, eos, sampling, generator)
            texts = tokenizer.batch_decode(answers.tokens, skip_special_tokens=True)
            logps = _logp_pairs(model, start, chunk_prompts, answers.tokens)
            for (key, sample_id), text, (logp, ref_logp) in zip(chunk, texts, logps, strict=True):
                _check_finite(key, logp, ref_logp)
                file.write(to_line(Sample(key, sample_id, plain_text(prompts[key]), text, logp, ref_logp)))
            file.flush()
            os.fsync(file.fileno())
            tokens += sum(map(len, answers.tokens))
            unfinished += answers.finished.count(False)
    publish(partial, path)
    if unfinished:
        log.info("%d of %d answers reached max_new_tokens without EOS", unfinished, len(rows) - resumed)
    return Generation(path, len(rows), resumed, tokens, unfinished)


def _logp_pairs(
    model: Any, start: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[tuple[float, float | None]]:
    logp = answer_logps(model, prompts, answers)
    if start is None:
        return [(value, None) for value in logp]
    ref_logp = logp if start is model else answer_logps(start, prompts, answers)
    return list(zip(logp, ref_logp, strict=True))


def _check_finite(prompt_id: str, logp: float, ref_logp: float | None) -> None:
    for whose, value in (("the model", logp), ("its start", ref_logp)):
        if value is not None and not math.isfinite(value):
            raise GenerationError(
                f"{whose} gives an answer to prompt {prompt_id} the log-probability {value}: its weights are damaged, "
                "or its training diverged"
            )


def check_prompts(
    model_folder: Path | str, prompts: Mapping[str, Prompt], sampling: Sampling, template: str | None = None
) -> None:
    """What `generate` would say against these prompts, before a model of this kind has been trained.

    Raises:
        GenerationError: no prompts, a prompt that cannot be tokenised, or no room for the answer in the context.
    """
    from transformers import AutoConfig

    if not prompts:
        raise GenerationError("there are no prompts to answer: the evaluation split is empty")
    encoded = _encode(load_tokenizer(model_folder), prompts, sampling.max_prompt_length, template)
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True)
    _check_context(config, max(map(len, encoded.values())), sampling)


@torch.inference_mode()
def sample_answers(
    model: Any, prompts: Sequence[Sequence[int]], eos: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> Answers:
    """Draw one answer per prompt, token by token: keys and values cached, rows dropped as their answers end."""
    logits, cache, attention_mask, position = _read_prompts(model, prompts)
    stops = torch.tensor(list(eos), device=model.device)
    alive = torch.arange(len(prompts), device=model.device)  # row of the cache -> answer
    drawn = position.new_zeros(len(prompts), sampling.max_new_tokens)
    length = torch.full_like(position, sampling.max_new_tokens)
    finished = torch.zeros_like(position, dtype=torch.bool)
    for step in range(sampling.max_new_tokens):
        token = draw(logits, sampling.temperature, sampling.top_p, generator)
        drawn[alive, step] = token
        stopped = torch.isin(token, stops)
        length[alive[stopped]], finished[alive[stopped]] = step + 1, True
        if stopped.all() or step + 1 == sampling.max_new_tokens:
            break
        if stopped.any():
            keep = (~stopped).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, token, position, attention_mask = alive[keep], token[keep], position[keep], attention_mask[keep]
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        logits = model(
            input_ids=token[:, None],
            attention_mask=attention_mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        position = position + 1
    return Answers([row[:n] for row, n in zip(drawn.tolist(), length.tolist(), strict=True)], finished.tolist())


def draw(
    logits: Float[Tensor, "b v"], temperature: float, top_p: float, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """One token per row from softmax(logits / temperature), cut to its nucleus of mass `top_p`."""
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(~nucleus(probs, top_p), 0.0)
    # fp64: in fp32 a sum over 128k tokens is coarser than the rarest of them
    cumulative = probs.double().cumsum(-1)
    uniform = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64, device=probs.device)
    # right=True: the first token whose cumulative mass exceeds the number drawn, so never one without mass
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].clamp(max=probs.shape[1] - 1)


def nucleus(probs: Float[Tensor, "b v"], top_p: float) -> Bool[Tensor, "b v"]:
    """The likeliest tokens until their mass reaches `top_p`; the one that crosses it stays in (arXiv:1904.09751)."""
    ordered, order = probs.sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)


@torch.inference_mode()
def answer_logps(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """log q(answer | prompt) in nats, summed over the tokens of each answer, by teacher forcing in slices of rows."""
    longest = max(map(len, answers))
    rows = max(1, LOGITS_BYTES // (4 * longest * model.config.get_text_config().vocab_size))
    sums: list[float] = []
    for first in range(0, len(prompts), rows):
        sums += _slice_logps(model, prompts[first : first + rows], answers[first : first + rows])
    return sums


def _slice_logps(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    first_logits, cache, mask, position = _read_prompts(model, prompts)
    lengths = torch.tensor([len(answer) for answer in answers], device=model.device)
    at = torch.arange(int(lengths.max()), device=model.device)
    labels = torch.tensor([[*answer, *[0] * (len(at) - len(answer))] for answer in answers], device=model.device)
    inside = at < lengths[:, None]
    logits = first_logits[:, None]  # the last prompt token predicts the first answer token
    if len(at) > 1:
        following = model(
            input_ids=labels[:, :-1],
            attention_mask=torch.cat((mask, inside[:, :-1].long()), 1),
            position_ids=position[:, None] + at[:-1],
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat((logits, following), 1)
    token_logp = -F.cross_entropy(logits[inside].float(), labels[inside], reduction="none")
    table = torch.zeros(inside.shape, dtype=torch.float64, device=model.device)
    table[inside] = token_logp.double()  # a scattered sum would depend on the order of GPU threads
    return table.sum(1).tolist()


class ReadPrompts(NamedTuple):
    """A batch of prompts, left-padded, after one pass of the model."""

    next_logits: Tensor  # [b, v]
    cache: Any
    attention_mask: Tensor  # [b, longest prompt]
    next_position: Tensor  # [b]


def _read_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> ReadPrompts:
    """Each distinct prompt goes through the model once, however many answers it gets."""
    distinct = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    input_ids, attention_mask = _left_pad(list(distinct), model.device)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    row = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=model.device)
    output.past_key_values.batch_select_indices(row)
    mask = attention_mask[row]
    return ReadPrompts(output.logits[row, -1], output.past_key_values, mask, mask.sum(1))


def _left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    # padding is known by position, never by token id: any id will do, and 0 is in every vocabulary
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _chunk_generator(seed: int, first_row: int, device: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{first_row}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _usable_start(start_folder: Path | str | None, sampling: Sampling) -> Path | None:
    if start_folder is None:
        return None
    if not sampling.untruncated:
        settings = f"temperature {sampling.temperature:g} and top_p {sampling.top_p:g}"
        log.warning("%s do not sample the model's own law: ref_logp, and with it kl_to_start, stays null", settings)
        return None
    return checked_folder(start_folder)


def _encode(
    tokenizer: Any, prompts: Mapping[str, Prompt], max_length: int, template: str | None
) -> dict[str, list[int]]:
    encoded = {}
    for key, prompt in prompts.items():
        try:
            encoded[key] = encode_prompt(tokenizer, prompt, max_length, template)
        except RowDefect as defect:
            message = f"prompt {key} cannot be tokenised ({defect.reason}): leave it out of the evaluation prompts"
            raise GenerationError(message) from defect
    return encoded


def _check_context(config: Any, longest_prompt: int, sampling: Sampling) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest_prompt + sampling.max_new_tokens > limit:
        raise GenerationError(
            f"a prompt of {longest_prompt} tokens and sampling.max_new_tokens={sampling.max_new_tokens} "
            f"exceed the model's {limit} positions: lower sampling.max_new_tokens or the length of prompts"
        )


def _header(
    members: Mapping[Path, float],
    start_folder: Path | None,
    prompts: Mapping[str, Prompt],
    template: str | None,
    sampling: Sampling,
) -> dict[str, Any]:
    """What the samples depend on. Weights by SHA-256, not by path: a folder may hold a retrained model."""
    return {
        "sampling": dataclasses.asdict(sampling),
        "prompts": hashlib.sha256(json.dumps([template, *prompts.items()]).encode()).hexdigest(),
        "model": [[weight, folder_hashes(folder)] for folder, weight in members.items()],
        "start": None if start_folder is None else folder_hashes(start_folder),
    }
