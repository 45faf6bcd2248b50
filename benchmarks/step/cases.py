"""What a training step is timed on: a small fresh model in a folder, and preference pairs as ids and as text.

The words of the tokenizer are numbers, so that text and ids say the same: a trainer that tokenises for itself sees the
very tokens that the others are given.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rsa_lightning.data.tokenize import EncodedPair
from rsa_lightning.models import PolicySpec, load_policy

PAD, EOS, FIRST_WORD = 0, 1, 2
PROMPT, RESPONSE = (16, 48), (48, 80)  # shortest and longest, in tokens: rows of 64 to 128
QUICK_PROMPT, QUICK_RESPONSE = (2, 6), (3, 9)


@dataclass(frozen=True)
class StepCase:
    """A model and the pairs of a run: `steps` batches of `batch_size` pairs, in this order for every method."""

    title: str
    vocabulary: int
    config: dict[str, object]  # of the model, for transformers
    batch_size: int
    learning_rate: float  # such that the losses leave log 2 within a few steps: there is little to agree on at it
    pairs: tuple[EncodedPair, ...]

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.batch_size

    def tokens(self, step: int) -> int:
        """Tokens of prompts and responses in a batch, padding left out: what a throughput counts."""
        batch = self.pairs[step * self.batch_size : (step + 1) * self.batch_size]
        return sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in batch)

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer, from which every method starts."""
        policy = load_policy(PolicySpec(config=self.config))
        policy.model.save_pretrained(folder)
        tokenizer(self.vocabulary).save_pretrained(folder)


def step_cases(quick: bool, steps: int) -> Iterator[StepCase]:
    """A story model with a small vocabulary, and one whose head is as large as the rest."""
    if quick:
        yield _case(129, steps, 2, QUICK_PROMPT, QUICK_RESPONSE, hidden_size=16, layers=1, learning_rate=1e-2)
        return
    for vocabulary in (512, 8192):
        yield _case(vocabulary, steps, 8, PROMPT, RESPONSE, hidden_size=128, layers=4, learning_rate=1e-3)


def _case(
    vocabulary: int,
    steps: int,
    batch_size: int,
    prompt: tuple[int, int],
    response: tuple[int, int],
    hidden_size: int,
    layers: int,
    learning_rate: float,
) -> StepCase:
    config: dict[str, object] = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    lengths = (prompt, response, response)
    return StepCase(
        title=f"H={hidden_size} L={layers} V={vocabulary} batch={batch_size}",
        vocabulary=vocabulary,
        config=config,
        batch_size=batch_size,
        learning_rate=learning_rate,
        pairs=random_pairs(vocabulary, steps * batch_size, lengths),
    )


def random_pairs(vocabulary: int, count: int, lengths: Sequence[tuple[int, int]]) -> tuple[EncodedPair, ...]:
    """Random words. Both responses end in EOS."""
    generator = torch.Generator().manual_seed(0)

    def words(shortest: int, longest: int) -> list[int]:
        size = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return torch.randint(FIRST_WORD, vocabulary, (size,), generator=generator).tolist()

    pairs = []
    for index in range(count):
        prompt, chosen, rejected = (words(*bounds) for bounds in lengths)
        pairs.append(EncodedPair(prompt, [*chosen, EOS], [*rejected, EOS], row_id=f"pair {index}"))
    return tuple(pairs)


def as_text(pair: EncodedPair) -> dict[str, str]:
    """The pair as words, without EOS; responses begin with a space, so that they can be put behind the prompt."""

    def text(ids: Iterable[int]) -> str:
        return " ".join(f"w{i}" for i in ids if i != EOS)

    return {"prompt": text(pair.prompt), "chosen": " " + text(pair.chosen), "rejected": " " + text(pair.rejected)}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token for each word w2, w3, ...; it adds nothing of its own."""
    ids = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
