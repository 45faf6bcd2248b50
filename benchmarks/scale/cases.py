"""What is timed: models of three sizes, pairs whose lengths have a long tail, and what a stage may be given of them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rsa_kernels import KL, CVaR, RiskMeasure

from benchmarks.step.cases import tokenizer
from rsa_lightning.losses import DPO, RSA, PreferenceLoss
from rsa_lightning.models import PolicySpec

METHODS: dict[str, tuple[PreferenceLoss, RiskMeasure]] = {
    "DPO": (DPO(beta=0.1), KL()),  # reads no risk, in training
    "RSA": (RSA(beta=0.1), CVaR(0.97)),
}
LAYOUTS: dict[str, dict[str, bool]] = {
    "padded": {},
    "bucketed": {"length_bucketing": True},
    "packed": {"padding_free": True},
}


class Provider(NamedTuple):
    """One way to train: by a method, near a reference that is live or on disk, on batches laid out in one way."""

    method: str
    reference: Literal["live", "hidden", "logps"]
    layout: str

    def __str__(self) -> str:
        return f"{self.method} {self.reference} {self.layout}"


PROVIDERS: tuple[Provider, ...] = (
    Provider("RSA", "live", "padded"),
    Provider("RSA", "live", "bucketed"),
    Provider("RSA", "live", "packed"),
    Provider("RSA", "hidden", "padded"),
    Provider("RSA", "hidden", "packed"),
    Provider("DPO", "live", "padded"),
    Provider("DPO", "hidden", "padded"),
    Provider("DPO", "logps", "padded"),
)


@dataclass(frozen=True)
class Size:
    """A Llama and its batches.

    Args:
        pairs: of an optimizer step, over all processes: every number of processes takes the same steps.
        longest: tokens of prompt and response together.
        precision: of `lightning.Trainer`.
    """

    width: int
    layers: int
    vocabulary: int
    pairs: int
    longest: int
    precision: str = "32-true"

    @property
    def parameters(self) -> int:
        """With tied embeddings."""
        block = 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width
        return self.vocabulary * self.width + self.layers * block + self.width

    @property
    def inner(self) -> int:
        return self.width * 11 // 4

    def config(self) -> dict[str, Any]:
        """For transformers."""
        return {
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(2, self.width // 64),
            "max_position_embeddings": self.longest,
            "tie_word_embeddings": True,
        }

    def spec(self, folder: Path) -> PolicySpec:
        return PolicySpec(config=self.config(), tokenizer=str(folder / "tokenizer"))

    def write(self, folder: Path, steps: int) -> None:
        """The tokenizer, whose words are numbers, and pairs for that many optimizer steps."""
        tokenizer(self.vocabulary).save_pretrained(folder / "tokenizer")
        rows = word_pairs(self, (steps * self.pairs) * 3 // 2 + 8)  # a fifth is set aside for validation
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SIZES = {
    "quick": Size(width=32, layers=1, vocabulary=129, pairs=4, longest=32),
    "cpu": Size(width=256, layers=4, vocabulary=1024, pairs=8, longest=256),
    # all providers of two teams lie side by side on the first GPU, in about 60 GB
    "cuda": Size(width=1024, layers=12, vocabulary=32768, pairs=16, longest=1024, precision="bf16-mixed"),
}


def word_pairs(size: Size, count: int) -> list[dict[str, str]]:
    """Random words: prompts of about a tenth of the longest row, responses lognormal, half below a tenth of it."""
    rng = random.Random(0)
    tenth = max(2, size.longest // 10)

    def words(length: float) -> str:
        return "".join(f" w{rng.randrange(2, size.vocabulary)}" for _ in range(max(1, int(length))))

    def response() -> str:
        return words(min(rng.lognormvariate(0, 1) * tenth, size.longest))

    return [
        {"prompt": words(rng.uniform(0.5, 1.5) * tenth)[1:], "chosen": response(), "rejected": response()}
        for _ in range(count)
    ]
