"""What a step costs against length, vocabulary and size: whole, with its reference's states at hand, its head alone.

The differences are the shares: reference = whole - without it; head = what follows the hidden states (token risk of the
logits, recursion, loss, metrics), to the gradients of head and hidden states; transformer = the rest, with clipping and
optimizer. One process, one thread.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final
from unittest.mock import patch

import torch

from benchmarks.scale.bare import BareStage
from benchmarks.scale.cases import Size
from benchmarks.scale.turns import largest_gap, named, take_turns, timed
from benchmarks.step.cases import PAD, random_pairs
from benchmarks.timing import summary
from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.data.tokenize import collate
from rsa_lightning.models import PolicySpec, ReferenceStates
from rsa_lightning.reference import Reference

TOLERANCE = {"float32": 1e-5}  # nats
TOLERANCE_LOW_PRECISION = 5e-2
PARTS = ("transformer", "reference", "head")

Record = dict[str, Any]


class Grid(NamedTuple):
    """Points along each axis, through one that is common to all."""

    base: Size
    tokens: Sequence[int]
    vocabularies: Sequence[int]
    widths: Sequence[int]
    dtype: str = "float32"

    def points(self) -> Iterator[tuple[str, Size]]:
        """An axis, and a size on it."""
        for axis, field, values in (
            ("tokens", "longest", self.tokens),
            ("vocabulary", "vocabulary", self.vocabularies),
            ("parameters", "width", self.widths),
        ):
            for value in values:
                yield axis, dataclasses.replace(self.base, **{field: value})  # type: ignore[arg-type]


GRIDS = {
    "quick": Grid(Size(32, 1, 129, pairs=2, longest=16), (16, 32), (129, 258), (32, 64)),
    "cpu": Grid(
        Size(128, 4, 2048, pairs=2, longest=128),
        (32, 64, 128, 256, 512, 1024),
        (512, 2048, 8192, 32768),
        (64, 128, 256, 512),
    ),
    "cuda": Grid(
        Size(2048, 16, 32768, pairs=4, longest=1024),
        (128, 256, 512, 1024, 2048, 4096),
        (8192, 32768, 128256),
        (512, 1024, 2048, 3072),
        "bfloat16",
    ),
}


def run(grid: Grid, device: str, samples: int) -> tuple[list[str], list[Record]]:
    """(disagreements, records): a record for each point; of one whose ways to its loss disagree there is none."""
    torch.set_num_threads(1)
    disagreements: list[str] = []
    figures: dict[Size, Record] = {}
    for size in dict.fromkeys(size for _, size in grid.points()):
        step = _Step(size, torch.device(device), grid.dtype)
        gap = step.disagreement()
        if gap > TOLERANCE.get(grid.dtype, TOLERANCE_LOW_PRECISION):
            disagreements.append(f"cost at {size}: without its reference a step has a loss {gap:.2g} nats away")
        else:
            figures[size] = step.figures(samples)
    return disagreements, [
        {"axis": axis, "tokens": size.longest, "vocabulary": size.vocabulary, "parameters": size.parameters}
        | {"pairs": size.pairs, **figures[size]}
        for axis, size in grid.points()
        if size in figures
    ]


@final
class _Kept(Reference):
    """Says of one batch what another reference said of it."""

    def __init__(self, states: ReferenceStates) -> None:
        self._states = states

    def prepare(self, policy: Any, load: Any = None) -> None:
        """There is nothing to load."""

    def place(self, policy: Any) -> None:
        """They are where the batch is."""

    def states(self, batch: PreferenceBatch) -> ReferenceStates:
        return self._states


class _Step:
    """A stage and a batch of rows of one length, a quarter of it prompt."""

    def __init__(self, size: Size, device: torch.device, dtype: str) -> None:
        spec = PolicySpec(config=size.config() | {"vocab_size": size.vocabulary}, dtype=dtype)  # type: ignore[arg-type]
        self.bare, self.size = BareStage(spec, device), size
        prompt = size.longest // 4
        response = size.longest - prompt - 1  # EOS is added
        lengths = ((prompt, prompt), (response, response), (response, response))
        self.batch = self.bare.there(collate(random_pairs(size.vocabulary, size.pairs, lengths), pad_id=PAD))
        self.live = self.bare.stage.reference
        states = self.live.states(self.batch)
        self.kept = states._replace(weight=None if states.weight is None else states.weight.clone())
        scored = (len(self.batch["labels"]), size.width)
        self.hidden = torch.randn(scored, device=device, dtype=self.bare.policy.head.weight.dtype, requires_grad=True)

    def disagreement(self) -> float:
        """Nats between the losses with a live reference and with its states at hand, after an update."""
        self.whole()
        with torch.no_grad():
            one = self.bare.loss(self.batch)
            self._near(_Kept(self.kept))
            other = self.bare.loss(self.batch)
        return largest_gap(one, other)

    def figures(self, samples: int) -> Record:
        """By the clock of this process on a CPU, where others do not count; by the wall where a GPU works."""
        ways = {"whole": self.whole, "without": self.without, "head": self.head}
        methods = {name: lambda way=way: timed(way) for name, way in ways.items()}
        found = take_turns(methods, samples, warm_up=1)
        clock = "wall" if self.bare.device.type == "cuda" else "cpu"
        whole, without, head = (getattr(found[name], clock) for name in ways)
        parts = {
            "transformer": [b - c for b, c in zip(without, head, strict=True)],
            "reference": [a - b for a, b in zip(whole, without, strict=True)],
            "head": head,
        }
        medians = {f"{name}_ms": float(f"{summary(values).median:.4g}") for name, values in parts.items()}
        return {"clock": clock, **named("ms", summary(whole)), **medians, "samples": samples}

    def whole(self) -> None:
        self._near(self.live)
        self.bare.step(self.batch)

    def without(self) -> None:
        self._near(_Kept(self.kept))
        self.bare.step(self.batch)

    def head(self) -> None:
        self._near(_Kept(self.kept))
        with patch.object(self.bare.policy, "_states", lambda batch: self.hidden):
            self.bare.loss(self.batch).backward()
        self.hidden.grad = self.bare.policy.head.weight.grad = None
        self.bare.wait()

    def _near(self, reference: Reference) -> None:
        self.bare.stage.__dict__["reference"] = reference
