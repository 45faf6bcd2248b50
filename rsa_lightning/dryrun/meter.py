"""What a piece of training holds and sends, counted from outside: storages by what they are for, collectives by bytes.

It sees operators, on real tensors as on fake ones. What an operator holds inside itself it does not see.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.distributed._tools.fake_collectives  # collectives on fake tensors
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal[
    "parameters", "optimizer", "reference", "gradients", "gathered", "unreduced", "activations", "head", "working"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Operation = Literal["all-gather", "reduce-scatter", "all-reduce"]

# operator -> what it is, and which argument is as large as the whole of what the group shares
COLLECTIVES: dict[str, tuple[Operation, int]] = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
}
GROUP = {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}  # the argument that is the process group
# operators of FSDP2 whose tensors are weights on their way from or to shards, or gradients on theirs
GATHERING = {"fsdp::all_gather_copy_in", "fsdp::split_with_sizes_copy", "c10d::_allgather_base_"}
REDUCING = {"fsdp::chunk_cat", "c10d::_reduce_scatter_base_", "c10d::allreduce_"}


class Mark(NamedTuple):
    """Where in a step something happened: a phase, and the index of a block within it, -1 before the first."""

    phase: str
    block: int


class Call(NamedTuple):
    """A collective: in which phase, which, in a group of how many, on how many bytes that the group shares."""

    phase: str
    operation: Operation
    group: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that one process sends, and receives, in a ring: (n - 1) / n of them, twice to reduce and spread."""
        return (2 if self.operation == "all-reduce" else 1) * self.bytes * (self.group - 1) / self.group


@dataclass
class _Life:
    """What a storage is for, and its sizes: (clock, bytes from then on)."""

    kind: Kind
    certain: bool  # said by name, not guessed from when it was made
    sizes: list[tuple[int, int]] = field(default_factory=list)


class Meter(TorchDispatchMode):
    """Inside, every storage that an operator makes is known until it dies, and every collective is counted.

    `mark` says where the step stands, `kind` what is made from here on; what a tensor is for may turn out later
    (`name`), and then holds from its birth.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind: Kind = "activations"
        self.calls: list[Call] = []
        self._marks: list[tuple[int, Mark]] = [(0, Mark("start", -1))]
        self._clock = 0
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Life]] = {}
        self._lives: list[_Life] = []

    # --------------------------------------------------------------- what it is told

    def mark(self, phase: str, block: int = -1) -> None:
        """From here on the step is in this phase and block."""
        self._marks.append((self._clock, Mark(phase, block)))

    @property
    def phase(self) -> str:
        return self._marks[-1][1].phase

    def name(self, kind: Kind, *tensors: Tensor | None) -> None:
        """What tensors are for, since they were made; of those that nobody has seen made, from now on."""
        for tensor in tensors:
            if tensor is not None:
                life = self._see(_storage(tensor))
                life.kind, life.certain = kind, True

    # --------------------------------------------------------------- what it finds

    def peaks(self) -> dict[Mark, dict[Kind, int]]:
        """Per mark, bytes by kind at its fullest moment. Marks of one name, as of repeated batches, are one."""
        events: list[tuple[int, Kind, int]] = []
        for life in self._lives:
            before = 0
            for clock, size in life.sizes:
                events.append((clock, life.kind, size - before))
                before = size
        events.sort(key=lambda event: event[0])
        held: Counter[Kind] = Counter()
        found: dict[Mark, dict[Kind, int]] = {}
        upcoming = 0
        bounds = [*(clock for clock, _ in self._marks[1:]), self._clock + 1]
        for (_, mark), end in zip(self._marks, bounds, strict=True):
            self._keep_larger(found, mark, held)
            while upcoming < len(events) and events[upcoming][0] <= end:
                _, kind, size = events[upcoming]
                held[kind] += size
                upcoming += 1
                self._keep_larger(found, mark, held)
        return found

    @staticmethod
    def _keep_larger(found: dict[Mark, dict[Kind, int]], mark: Mark, held: Counter[Kind]) -> None:
        if mark not in found or held.total() > sum(found[mark].values()):
            found[mark] = {kind: held[kind] for kind in KINDS}

    # --------------------------------------------------------------- how it looks

    def __enter__(self) -> Self:
        # FSDP2 frees gathered weights by resizing their storages, which is no operator
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._see(storage)

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        self._fake_mode = active_fake_mode()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as operators on shards
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if active_fake_mode() is not self._fake_mode:
            return result  # DTensor asks itself for shapes, on fake tensors as large as the whole
        for tensor in _tensors(result):
            self._see(_storage(tensor))
        name = func._schema.name
        if name in COLLECTIVES:
            operation, whole = COLLECTIVES[name]
            group = ProcessGroup.unbox(args[GROUP[operation]]).size()
            size = sum(tensor.nbytes for tensor in _tensors(args[whole]))
            self.calls.append(Call(self.phase, operation, group, size))
        if name in GATHERING or name in REDUCING:
            kind: Kind = "gathered" if name in GATHERING else "unreduced"
            for tensor in _tensors((args, kwargs, result)):
                life = self._see(_storage(tensor))
                life.kind = life.kind if life.certain else kind
        return result

    def _see(self, storage: torch.UntypedStorage) -> _Life:
        """The life of a storage, which begins now where it is new, and its size."""
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known[0]() is storage:
            life = known[1]
        else:
            life = _Life(self.kind, certain=False)
            self._alive[key] = (weakref.ref(storage, partial(self._dies, key)), life)
            self._lives.append(life)
        self._record(life, storage.nbytes())
        return life

    def _dies(self, key: int, reference: Any) -> None:
        known = self._alive.get(key)
        if known is not None and known[0] is reference:
            del self._alive[key]
            self._record(known[1], 0)

    def _record(self, life: _Life, size: int) -> None:
        if size != (life.sizes[-1][1] if life.sizes else 0):
            self._clock += 1
            life.sizes.append((self._clock, size))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
