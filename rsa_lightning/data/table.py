"""Tokenised examples in an Arrow file that is read through a memory map: a data set may be larger than the memory."""

import hashlib
import json
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from rsa_lightning.data.batch import EncodedPair
from rsa_lightning.data.records import Message, Prompt

SIDES = ("prompt", "chosen", "rejected")
PLAIN = ("target", "offset", "row_id", "chosen_cost", "rejected_cost")  # the fields of an EncodedPair that hold no ids


class Block(NamedTuple):
    """The examples of one record batch, as views of the file.

    Attributes:
        bounds, values: side -> where each example begins and ends within the ids, and the ids.
        columns: the other columns of Arrow, by name.
    """

    bounds: dict[str, NDArray[np.int32]]
    values: dict[str, NDArray[np.int32]]
    columns: dict[str, Any]

    def ids(self, side: str, row: int) -> NDArray[np.int32]:
        """The token ids of one side of an example: a view, read-only."""
        bounds = self.bounds[side]
        return self.values[side][bounds[row] : bounds[row + 1]]


class EncodedTable(Sequence[EncodedPair]):
    """Examples in the file at `path`, or those of them at `indices`. Ids are views of the file, read when looked at.

    Pickled, it is its path: a worker process maps the file again.
    """

    def __init__(self, path: Path | str, indices: NDArray[np.int64] | None = None) -> None:
        self.path, self.indices = Path(path), indices

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.indices is None else len(self.indices)

    @overload
    def __getitem__(self, index: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedPair]: ...
    def __getitem__(self, index: int | slice) -> EncodedPair | list[EncodedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        block, row = self._find(index)
        prompt, chosen, rejected = (block.ids(side, row) for side in SIDES)
        return EncodedPair(prompt, chosen, rejected, *(block.columns[name][row].as_py() for name in PLAIN))

    def prompt(self, index: int) -> Prompt:
        """The prompt of an example before it was tokenised."""
        block, row = self._find(index)
        return prompt_from(block.columns["source"][row].as_py())

    def select(self, indices: Iterable[int] | NDArray[np.int64]) -> "EncodedTable":
        """The examples at these indices, in their order: a view of the same file."""
        wanted = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        return EncodedTable(self.path, wanted if self.indices is None else self.indices[wanted])

    def tokens(self, side: str) -> NDArray[np.int64]:
        """How many tokens the prompt, chosen or rejected response of every example has; 0 where there is none."""
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(block.bounds[side]) for block in self._blocks)])
        return lengths if self.indices is None else lengths[self.indices]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers, `target`, `offset` or a cost, of every example; nan where an example has none."""
        parts = [block.columns[name].to_numpy(zero_copy_only=False) for block in self._blocks]
        values = np.concatenate([np.zeros(0), *parts])
        return values if self.indices is None else values[self.indices]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the longest row of every example: prompt and longer response. It decides how wide a batch is."""
        return self.tokens("prompt") + np.maximum(self.tokens("chosen"), self.tokens("rejected"))

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedTable, (self.path, self.indices)

    def _find(self, index: int) -> tuple[Block, int]:
        """The block that holds an example, and its row there."""
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} examples, and none at {index}")
        place %= len(self)
        place = place if self.indices is None else int(self.indices[place])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._blocks[number], place - int(self._starts[number])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Index of the first example of every block, and the number of all."""
        return np.cumsum([0, *(len(block.columns["row_id"]) for block in self._blocks)])

    @cached_property
    def _blocks(self) -> list[Block]:
        import pyarrow  # slow to import, and a module that only names this class needs none of it

        with pyarrow.memory_map(str(self.path)) as source, pyarrow.ipc.open_file(source) as reader:
            return [as_block(reader.get_batch(i)) for i in range(reader.num_record_batches)]


class Prompts(Sequence[Prompt]):
    """The prompts of a table before tokenisation, read when looked at."""

    def __init__(self, table: EncodedTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self.table.prompt(i) for i in range(*index.indices(len(self)))]
        return self.table.prompt(index)


class TableWriter:
    """Writes examples to a file for `EncodedTable`, one block at a time; `digest` says what is in it."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        ids, number, text = pyarrow.list_(pyarrow.int32()), pyarrow.float64(), pyarrow.string()
        columns = {
            **dict.fromkeys((*SIDES, *PLAIN), number),
            **dict.fromkeys(SIDES, ids),
            "row_id": text,
            "source": text,
        }
        self._arrow, self._schema = pyarrow, pyarrow.schema(columns.items())
        self._writer = pyarrow.ipc.new_file(str(path), self._schema)
        self._hashes: defaultdict[str, Any] = defaultdict(hashlib.sha256)  # column -> running hash

    def append(self, examples: Sequence[EncodedPair], prompts: Sequence[Prompt]) -> None:
        """Writes a block of examples and the prompts they came from."""
        if not examples:
            return
        lists = [self._ids(side, [getattr(e, side) for e in examples]) for side in SIDES]
        plain = {name: [getattr(e, name) for e in examples] for name in PLAIN}
        plain["source"] = [prompt_text(prompt) for prompt in prompts]
        for name, values in plain.items():
            self._hashes[name].update("".join(json.dumps(value) for value in values).encode())
        self._writer.write_batch(self._arrow.record_batch([*lists, *plain.values()], schema=self._schema))

    def _ids(self, side: str, rows: list[Sequence[int]]) -> Any:
        """One column of token ids."""
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths.sum()))
        self._hashes[f"{side} lengths"].update(lengths.tobytes())
        self._hashes[side].update(values.tobytes())
        return self._arrow.ListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), values)

    @property
    def digest(self) -> str:
        """A hash of the examples in their order, whatever blocks they came in: equal tables give equal batches."""
        parts = [self._hashes[name].hexdigest() for name in sorted(self._hashes)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def as_block(batch: Any) -> Block:
    """A record batch of Arrow as arrays of numpy; nothing is copied."""
    lists = {side: batch.column(side) for side in SIDES}
    return Block(
        {side: column.offsets.to_numpy() for side, column in lists.items()},
        {side: column.values.to_numpy() for side, column in lists.items()},
        {name: batch.column(name) for name in (*PLAIN, "source")},
    )


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string: JSON, so that a text and messages are told apart."""
    return json.dumps(prompt, ensure_ascii=False)


def prompt_from(text: str) -> Prompt:
    """The prompt that `prompt_text` wrote."""
    value = json.loads(text)
    return value if isinstance(value, str) else tuple(Message(*turn) for turn in value)
