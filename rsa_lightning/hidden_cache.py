"""The reference computed once, on disk: hidden states of all rows, by the policy itself before its first update.

A stage's start equals its reference, so no second transformer is ever held. With the frozen head the hidden states are
the whole reference distribution: exact for every risk measure, at H numbers per token instead of V. A row is known by
its content, whatever the order, padding or company it comes in.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, final

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from rsa_lightning.checkpoint import key_of
from rsa_lightning.data.batch import ROLES, EncodedPair, PreferenceBatch, int64
from rsa_lightning.data.cache import locked
from rsa_lightning.hidden_store import HEAD, KEY_BYTES, MANIFEST, HiddenStore, Layout
from rsa_lightning.models import Policy, ReferenceStates
from rsa_lightning.reference import Reference, start_gap, tolerance_of, working_dtype
from rsa_lightning.scoring import Scoring

log = logging.getLogger(__name__)

FORMAT = 1
CHECKED_ROWS = 8  # computed again with the policy before its first update
NAMED_ROWS = 3  # in a message
LIVE = "take FrozenCopy as reference, which is computed batch by batch"

Answer = TypeVar("Answer")


class Ids(NamedTuple):
    """The token ids of a row, and how many of them are its prompt."""

    ids: NDArray[np.int64]
    prompt: int

    @property
    def key(self) -> bytes:
        digest = hashlib.blake2b(self.prompt.to_bytes(8, "little"), digest_size=KEY_BYTES)
        digest.update(np.ascontiguousarray(self.ids).tobytes())
        return digest.digest()


def rows_of(batch: PreferenceBatch) -> list[Ids]:
    """The rows of a batch without their padding, on whichever side it is, if there is any."""
    inside = batch["attention_mask"].cpu().bool()
    bounds = batch["row_bounds"]
    ids = batch["input_ids"].cpu()[inside].numpy()
    lengths = inside.sum(1) if bounds is None else torch.tensor(bounds).diff()
    prompts = (lengths - batch["cu_seqlens"].cpu().diff()).tolist()
    rows = np.split(ids, lengths.cumsum(0)[:-1].numpy())
    return [Ids(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]


@dataclass(frozen=True)
class Rows:
    """Every different row of a stage's data in its order; token ids are read when looked at."""

    sides: Mapping[str, Sequence[EncodedPair]]
    keys: list[bytes]
    places: list[tuple[str, int, str]]  # side, index of the example, role
    tokens: NDArray[np.int64]  # scored
    lengths: NDArray[np.int64]  # of prompt and response

    @classmethod
    def of(cls, sides: Mapping[str, Sequence[EncodedPair]]) -> "Rows":
        found: dict[bytes, tuple[tuple[str, int, str], int, int]] = {}
        for side, examples in sides.items():
            for index, example in enumerate(examples):
                prompt = int64(example.prompt)
                for role in ROLES[:2]:
                    response = int64(getattr(example, role))
                    if len(response):
                        row = Ids(np.concatenate([prompt, response]), len(prompt))
                        found.setdefault(row.key, ((side, index, role), len(response), len(row.ids)))
        places = [place for place, _, _ in found.values()]
        tokens, lengths = (np.array([facts[i] for facts in found.values()], dtype=np.int64) for i in (1, 2))
        return cls(sides, list(found), places, tokens, lengths)

    def example(self, row: int) -> EncodedPair:
        """An example with this row as its chosen response, and no other."""
        side, index, role = self.places[row]
        example = self.sides[side][index]
        return EncodedPair(example.prompt, getattr(example, role), [], row_id=f"{example.row_id} ({role})")

    def names(self, rows: Sequence[int]) -> str:
        """How many rows these are and which the first are."""
        first = ", ".join(self.example(row).row_id for row in rows[:NAMED_ROWS])
        return f"{len(rows)} of {len(self.keys)} rows (first: {first}{', ...' if len(rows) > NAMED_ROWS else ''})"


@final
class HiddenCache(Reference):
    """What the policy says before its first update, kept on disk: no second model in memory, no second forward pass.

    Every combination of model, data, lengths and precision has a folder of its own, FOLDER/<key>, whose manifest.json
    says what it is of. What is missing is computed where the stage begins; a run that was killed goes on after its last
    chunk. All processes of a run must see the same folder.

    Args:
        folder: of all caches; it may be shared by runs.
        keep: hidden states, 2 or 4 bytes x hidden size per token, which give the distribution; or log-probabilities of
            labels only, 4 bytes per token, for losses that read no risk: validation then measures no risk and no KL.
        build: compute rows that are missing; off, they are an error.

    Raises:
        ValueError: `keep` is neither, or `folder` is a file, or a single cache.
    """

    live: ClassVar[bool] = False

    def __init__(self, folder: str, keep: Literal["hidden", "logps"] = "hidden", build: bool = True) -> None:
        if keep not in ("hidden", "logps"):
            raise ValueError(f"HiddenCache keeps hidden or logps, got keep={keep!r}")
        self.folder, self.keep, self.build = Path(folder).expanduser().absolute(), keep, build
        _check_folder(folder, self.folder)
        self._store: HiddenStore | None = None
        self._head: dict[str, Tensor] = {}
        self._logit_options: dict[str, Any] = {}  # scale and softcap of the head

    def __repr__(self) -> str:
        return f"HiddenCache({self.folder}, keep={self.keep})"

    @property
    def knows_distribution(self) -> bool:
        return self.keep == "hidden"

    def check_loss(self, name: str, *, reads_risk: bool, mismatched: bool) -> None:
        if mismatched:
            raise ValueError(
                f"{name} scores prompts with responses of other examples, which change with the batch and cannot be "
                f"kept on disk: {LIVE}"
            )
        if reads_risk and self.keep == "logps":
            raise ValueError(
                f"{name} reads the reference's distribution, and keep=logps leaves log-probabilities of labels only: "
                "set keep=hidden, or take a loss that reads no risk (DPO, IPO)"
            )

    def prepare(self, policy: Policy, load: Any = None) -> None:
        """There is nothing to load: `fill` asks the policy."""

    def place(self, policy: Policy) -> None:
        """What is kept goes where batches are: weights may lie elsewhere, in the memory of the host."""

    def fill(self, policy: Policy, scoring: Callable[[], Scoring]) -> None:
        """Finds the cache of this model and these data, and completes it. Done once.

        Raises:
            ValueError: rows are missing and cannot be computed, or what is there is damaged or of something else.
        """
        if self._store is not None:
            return
        work = scoring()
        rows = Rows.of(work.sides)
        layout = Layout(rows.keys, rows.tokens, *self._values(policy))
        of = _agreed(work, lambda: self._decided_by(work, policy, layout))
        store = HiddenStore(self.folder / key_of(of), layout, of)
        with ExitStack() as held:
            chunks, head = _agreed(work, lambda: self._survey(store, rows, policy, work, held))
            if chunks or head:
                self._make(store, rows, policy, work, chunks, head)
                work.gather(None)  # all have written theirs
        files = _agreed(work, store.finished)
        _all_answers(work, lambda: store.open(files, work.rank))
        self._take(store, policy)
        if work.as_started:
            _all_answers(work, lambda: self._check_rows(rows, policy, work))

    @torch.no_grad()
    def states(self, batch: PreferenceBatch) -> ReferenceStates:
        """Raises ValueError where a row is not in the cache, by name."""
        assert self._store is not None, "fill() comes first"
        found = [self._store.layout.place(row.key) for row in rows_of(batch)]
        places = [place for place in found if place is not None]
        if len(places) < len(found):
            raise ValueError(f"the cache {self._store.folder} has not {_absent(batch, found)}: {LIVE}")
        device = batch["input_ids"].device
        values = self._store.read(places).to(device)
        if self.keep == "logps":
            return ReferenceStates(None, None, logp=values)
        self._head = {name: tensor.to(device) for name, tensor in self._head.items()}
        return ReferenceStates(values, self._head.get("weight"), self._head.get("bias"), **self._logit_options)

    # ------------------------------------------------------------------ what is kept

    def _values(self, policy: Policy) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the values of one token. The head would cast hidden states to that dtype anyway."""
        dtype = working_dtype(policy)
        if self.keep == "hidden":
            return (policy.head.in_features,), dtype
        return (), torch.float64 if dtype == torch.float64 else torch.float32

    def _decided_by(self, work: Scoring, policy: Policy, layout: Layout) -> dict[str, Any]:
        head = {"hidden_size": policy.head.in_features, "vocabulary": policy.head.out_features}
        return {**work.decided_by(), "format": FORMAT, "keep": self.keep, "values": str(layout.dtype), **head}

    def _take(self, store: HiddenStore, policy: Policy) -> None:
        self._store = store
        if self._has_head(policy):
            self._head = store.head()
            self._logit_options = {"scale": policy.head.scale, "softcap": policy.head.softcap}

    def _has_head(self, policy: Policy) -> bool:
        """Whether the cache keeps a head: that of a policy with an adapter is frozen, and the policy's own will do."""
        return self.keep == "hidden" and not policy.adapted

    # ------------------------------------------------------------------ how it is made

    def _survey(
        self, store: HiddenStore, rows: Rows, policy: Policy, work: Scoring, held: ExitStack
    ) -> tuple[list[int], bool]:
        """The chunks to be made, and whether the head is. Then the folder is locked until `held` closes.

        Raises:
            ValueError: something is missing and cannot be made here.
        """
        store.check_manifest()
        if self._missing(store, policy) == ([], False):
            return [], False
        self._check_can_build(store, rows, policy, work)
        store.check_writable()
        held.enter_context(locked(store.folder))
        chunks, head = self._missing(store, policy)  # another run may have made them while this one waited
        if not chunks and not head:
            return chunks, head
        store.begin(chunks, self._head_bytes(policy) if head else 0, self._words(work, policy))
        lacking = [row for chunk in chunks for row in store.layout.chunks[chunk]]
        what = rows.names(lacking) if lacking else "nothing but the head, which is missing,"
        log.info("computing %s for the reference cache %s", what, store.folder)
        return chunks, head

    def _missing(self, store: HiddenStore, policy: Policy) -> tuple[list[int], bool]:
        found = store.finished()
        chunks = [chunk for chunk in range(len(store.layout.chunks)) if chunk not in found]
        return chunks, self._has_head(policy) and HEAD not in found

    def _check_can_build(self, store: HiddenStore, rows: Rows, policy: Policy, work: Scoring) -> None:
        chunks, _ = self._missing(store, policy)
        lacking = [row for chunk in chunks for row in store.layout.chunks[chunk]]
        what = f"the reference cache {store.folder} lacks {rows.names(lacking) if lacking else 'its head'}"
        if not work.as_started:
            raise ValueError(
                f"{what}, and they cannot be computed from here: this policy is resumed or evaluated, and need not be "
                "the one that the stage started from. Complete the cache from the start, by rsa fit with the same "
                f"configuration, no ckpt_path and --trainer.max_steps 0; or {LIVE}"
            )
        if not self.build:
            raise ValueError(f"{what}, and build is false: set it to true, or {LIVE}")

    def _make(
        self, store: HiddenStore, rows: Rows, policy: Policy, work: Scoring, chunks: list[int], head: bool
    ) -> None:
        """Computes chunks, which are dealt to the processes one by one. Each makes the same number of forward passes.

        A sharded policy needs that: every forward pass is one of all processes. One that has nothing to do repeats.
        """
        if head:
            tensors = {name: _whole(tensor) for name, tensor in self._head_of(policy).items()}
            _agreed(work, partial(store.write_head, tensors))
        for first in range(0, len(chunks), work.world_size):
            dealt = chunks[first : first + work.world_size]
            mine = dealt[min(work.rank, len(dealt) - 1)]
            passes = max(-(-len(store.layout.chunks[chunk]) // work.batch_rows) for chunk in dealt)
            values = self._score(store.layout, rows, policy, work, mine, passes)
            writes = work.rank < len(dealt) and work.writes
            _all_answers(work, partial(store.write, mine, values) if writes else lambda: None)
            done = first + len(dealt)
            if done == len(chunks) or 10 * done // len(chunks) > 10 * first // len(chunks):
                rank_zero_only(log.info)("reference cache: %d of %d chunks", done, len(chunks))

    @torch.no_grad()
    def _score(self, layout: Layout, rows: Rows, policy: Policy, work: Scoring, chunk: int, passes: int) -> Tensor:
        """The values of a chunk, on the CPU, in `passes` forward passes or as many as its rows take."""
        inside = layout.chunks[chunk]
        by_length = sorted(inside, key=lambda row: -rows.lengths[row])  # less padding; the longest batch comes first
        batches = [by_length[first : first + work.batch_rows] for first in range(0, len(inside), work.batch_rows)]
        values = torch.empty(layout.size(chunk), *layout.token_shape, dtype=layout.dtype)
        training = policy.training
        policy.eval()
        for number in range(max(passes, len(batches))):
            wanted = batches[min(number, len(batches) - 1)]
            batch = work.collate([rows.example(row) for row in wanted])
            found = policy.states(batch) if self.keep == "hidden" else policy(batch, None, None).logp
            bounds = batch["cu_seqlens"].tolist()
            found = found.to("cpu", layout.dtype)
            for row, start, stop in zip(wanted, bounds[:-1], bounds[1:], strict=True):
                place = layout.place(rows.keys[row])
                assert place is not None
                values[place.start : place.stop] = found[start:stop]
        policy.train(training)
        return values

    def _head_of(self, policy: Policy) -> dict[str, Tensor]:
        tensors = {"weight": policy.head.weight, "bias": policy.head.bias}
        return {name: t.detach().to(working_dtype(policy)) for name, t in tensors.items() if t is not None}

    def _head_bytes(self, policy: Policy) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._head_of(policy).values())

    def _words(self, work: Scoring, policy: Policy) -> dict[str, Any]:
        """What the manifest says to a reader."""
        what = "last hidden states" if self.keep == "hidden" else "log-probabilities of the labels"
        return {
            "what": f"{what} of every response token, by the model that a stage starts from: its frozen reference",
            "about": dict(work.about),
            "head": {"kept": self._has_head(policy), "scale": policy.head.scale, "softcap": policy.head.softcap},
        }

    def _check_rows(self, rows: Rows, policy: Policy, work: Scoring) -> None:
        """Computes some rows again, spread over the cache; processes take different ones."""
        assert self._store is not None
        count = len(rows.keys)
        spread = np.linspace(0, count, min(CHECKED_ROWS, count), endpoint=False, dtype=int)
        again = [(row + work.rank) % count for row in spread.tolist()]
        gap = start_gap(policy, work.collate([rows.example(row) for row in again]), self).item()
        tolerance = tolerance_of(working_dtype(policy))
        if not gap <= tolerance:
            raise ValueError(
                f"rows of the cache {self._store.folder}, computed again ({rows.names(again)}), differ by {gap:.3g} "
                f"nats per token (tolerance {tolerance:g}): it was not made with this policy as it starts. Delete the "
                "folder, it is rebuilt"
            )


def _check_folder(given: str, folder: Path) -> None:
    """Raises ValueError where no folder of caches can be."""
    if not given or folder.is_file():
        raise ValueError(f"HiddenCache keeps files in a folder, and {given!r} is none: give it another one")
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is a single cache or a run itself (it has a {MANIFEST}): give a folder of caches, as its parent "
            f"{folder.parent} may be one"
        )


def _agreed(work: Scoring, ask: Callable[[], Answer]) -> Answer:
    """The first process's answer, or error, on every process."""
    return _all_answers(work, ask if work.is_first else lambda: None)[0]


def _all_answers(work: Scoring, ask: Callable[[], Any]) -> list[Any]:
    """The answer of every process, or the first one's error, on all: none waits for one that has stopped."""
    answer, error = None, None
    try:
        answer = ask()
    except (ValueError, OSError) as problem:
        error = problem
    handed = work.gather((answer, error))
    for _, theirs in handed:
        if theirs is not None:
            raise theirs
    return [found for found, _ in handed]


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor whose processes hold shards of it; they all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _absent(batch: PreferenceBatch, found: Sequence[Any]) -> str:
    """Names the rows that were not found."""
    rows = [row for row, place in enumerate(found) if place is None]
    named = [
        f"{batch['row_ids'][int(batch['pair_ids'][row])]} ({ROLES[int(batch['roles'][row])]})"
        for row in rows[:NAMED_ROWS]
    ]
    return f"{len(rows)} of a batch's {len(found)} rows ({', '.join(named)}{', ...' if len(rows) > len(named) else ''})"
