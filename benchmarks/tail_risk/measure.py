"""Answers of a model, and what they are worth: no texts are kept, only a few numbers of each answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from benchmarks.tail_risk.prompts import Split
from rsa_lightning import stories
from rsa_lightning.data.tokenize import encode_prompt, load_tokenizer
from rsa_lightning.evaluation import tail
from rsa_lightning.evaluation.generate import Sampling, answer_logps, sample_answers
from rsa_lightning.stories import StoryPrompt

SAMPLING = Sampling(max_new_tokens=56, max_prompt_length=32, batch_size=1008)
TAILS = (0.05, 0.01)


class Scores(NamedTuple):
    """One entry per answer; `logratio` is NaN where it was not taken."""

    prompt: NDArray[np.int16]
    reward: NDArray[np.float32]
    cost: NDArray[np.float32]
    broken: NDArray[np.float32]  # share of its sentences
    logratio: NDArray[np.float32]  # log π(y|x) − log π_warmup(y|x), nats


class Reader:
    """A model folder opened for sampling."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.model.eval()
        self._scored: dict[tuple[str, str], tuple[float, float, float]] = {}

    def encode(self, prompt: StoryPrompt) -> list[int]:
        return encode_prompt(self.tokenizer, prompt.text, SAMPLING.max_prompt_length)

    def answers(self, prompts: Sequence[StoryPrompt], seed: int) -> list[list[int]]:
        """One answer per entry of `prompts`, as token ids; the same uniform numbers for every model."""
        encoded = {prompt.prompt_id: self.encode(prompt) for prompt in prompts}
        rows = [encoded[prompt.prompt_id] for prompt in prompts]
        found: list[list[int]] = []
        for first in range(0, len(rows), SAMPLING.batch_size):
            generator = torch.Generator().manual_seed(1_000_003 * seed + first)
            part = rows[first : first + SAMPLING.batch_size]
            found += sample_answers(self.model, part, [self.tokenizer.eos_token_id], SAMPLING, generator).tokens
        return found

    def score(self, prompt: StoryPrompt, tokens: list[int]) -> tuple[float, float, float]:
        """Reward, cost and share of broken sentences."""
        key = (prompt.prompt_id, str(self.tokenizer.decode(tokens, skip_special_tokens=True)))
        if key not in self._scored:
            self._scored[key] = (
                stories.reward(prompt, key[1]),
                stories.cost(prompt, key[1]),
                stories.broken_share(key[1]),
            )
        return self._scored[key]


def draw_costs(
    reader: Reader, prompts: Sequence[StoryPrompt], per_prompt: int, seed: int
) -> tuple[list[float], list[int]]:
    """Costs of `per_prompt` answers to each prompt, and the number of each answer's prompt."""
    asked = [prompt for prompt in prompts for _ in range(per_prompt)]
    costs = [reader.score(prompt, tokens)[1] for prompt, tokens in zip(asked, reader.answers(asked, seed), strict=True)]
    return costs, [i for i in range(len(prompts)) for _ in range(per_prompt)]


def measure(
    reader: Reader, origin: Reader, prompts: Sequence[StoryPrompt], per_prompt: int, logps: int, seed: int
) -> Scores:
    """Scores of `per_prompt` answers to each prompt; of `logps` of them the log-ratio to the origin, too."""
    asked = [prompt for prompt in prompts for _ in range(per_prompt)]
    answers = reader.answers(asked, seed)
    scored = np.array([reader.score(prompt, tokens) for prompt, tokens in zip(asked, answers, strict=True)])
    places = [i for i in range(len(asked)) if i % per_prompt < logps]
    rows, drawn = [reader.encode(asked[i]) for i in places], [answers[i] for i in places]
    logratio = np.full(len(asked), np.nan)
    mine, theirs = (np.array(answer_logps(model.model, rows, drawn)) for model in (reader, origin))
    logratio[places] = mine - theirs
    return Scores(
        prompt=np.repeat(np.arange(len(prompts)), per_prompt).astype(np.int16),
        reward=scored[:, 0].astype(np.float32),
        cost=scored[:, 1].astype(np.float32),
        broken=scored[:, 2].astype(np.float32),
        logratio=logratio.astype(np.float32),
    )


def statistics(scores: Scores, beta: float) -> dict[str, float]:
    """The figures of a model on one split."""
    costs = torch.from_numpy(scores.cost).double()
    kl = float(np.nanmean(scores.logratio.astype(np.float64)))
    reward = float(scores.reward.astype(np.float64).mean())
    found = {
        "answers": float(len(scores.reward)),
        "reward": reward,
        "cost": float(costs.mean()),
        "unsafe": float(tail.unsafe_rate(costs)),
        "kl": kl,
        "objective": reward - beta * kl,
        "broken": float(scores.broken.astype(np.float64).mean()),
    }
    for mass in TAILS:
        found[f"var_{mass:g}"] = float(tail.var(costs, 1 - mass))
        found[f"cvar_{mass:g}"] = float(tail.cvar(costs, 1 - mass))
    return {name: round(value, 6) for name, value in found.items()}


def save(path: Path, splits: Mapping[Split, Scores]) -> None:
    """Writes the scores of all splits in one compressed file, whole or not at all."""
    arrays = {f"{split}/{name}": value for split, one in splits.items() for name, value in one._asdict().items()}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)
