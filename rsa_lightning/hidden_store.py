"""Rows of numbers on disk, a row for each scored response, in chunk files that appear whole and are read by key.

FOLDER/manifest.json            what the numbers are of, in words and as hashes; their sizes
FOLDER/head-<sha256>.safetensors        the frozen head that reads hidden states; none where the policy has it
FOLDER/00003-<sha256>.safetensors       a chunk: the values of its rows' tokens, and the rows' keys

A file appears under its name when it is complete, and its name holds the hash of its bytes: what is there is finished,
and a killed process leaves nothing but a .partial. Which row lies in which chunk follows from the rows alone, so any
number of processes writes the same files, and a later run goes on where one was killed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsa_lightning.checkpoint import file_hash, write_json

CHUNK_ROWS, CHUNK_BYTES = 512, 256 * 2**20  # a chunk ends at whichever comes first; one is in memory while it is made
HASHED_CHUNKS = 8  # whose bytes are read and compared with their hash when a store is opened, by each process
OPEN_CHUNKS = 256  # memory maps held at once
KEY_BYTES = 16
VALUES, KEYS = "values", "keys"  # the tensors of a chunk
HEAD = "head"
MANIFEST, SUFFIX, PARTIAL = "manifest.json", ".safetensors", ".partial"
DELETE = "delete the folder {}, it is rebuilt"


class Place(NamedTuple):
    """Where the values of a row lie: the tokens from `start` to `stop` of a chunk."""

    chunk: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Which row lies where: a function of the rows alone.

    Attributes:
        keys: of every row, all different.
        tokens: scored tokens of every row.
        token_shape: of the values of one token: (H,) for hidden states, () for a log-probability.
        dtype: of the values.
    """

    keys: Sequence[bytes]
    tokens: NDArray[np.int64]
    token_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return int(np.prod(self.token_shape, dtype=np.int64)) * self.dtype.itemsize

    @cached_property
    def chunks(self) -> list[range]:
        """The rows of every chunk: at most CHUNK_ROWS, and CHUNK_BYTES unless a single row has more."""
        chunks, first, held = [], 0, 0
        for row, size in enumerate((self.tokens * self.token_bytes).tolist()):
            if row > first and (row - first == CHUNK_ROWS or held + size > CHUNK_BYTES):
                chunks.append(range(first, row))
                first, held = row, 0
            held += size
        return [*chunks, range(first, len(self.keys))] if len(self.keys) else []

    def size(self, chunk: int) -> int:
        """Scored tokens of a chunk."""
        return int(self._ends[self.chunks[chunk].stop] - self._ends[self.chunks[chunk].start])

    def bytes_of(self, chunk: int) -> int:
        return self.size(chunk) * self.token_bytes + len(self.chunks[chunk]) * KEY_BYTES

    def place(self, key: bytes) -> Place | None:
        """Where a row lies; None where it is not among the rows."""
        row = self._rows.get(key)
        if row is None:
            return None
        chunk = int(np.searchsorted(self._firsts, row, side="right")) - 1
        start = int(self._ends[row] - self._ends[self._firsts[chunk]])
        return Place(chunk, start, start + int(self.tokens[row]))

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        return np.array([chunk.start for chunk in self.chunks], dtype=np.int64)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Tokens of all rows before each one, and of all."""
        return np.concatenate([[0], np.cumsum(self.tokens)])


class HiddenStore:
    """The files of one folder. Every process may read all of them; each chunk is written by one.

    Args:
        folder: it need not exist.
        layout: of the rows it shall hold.
        of: everything that decides the values, as plain values.
    """

    def __init__(self, folder: Path, layout: Layout, of: Mapping[str, Any]) -> None:
        self.folder, self.layout = folder, layout
        self.of = json.loads(json.dumps(of, default=str))
        self._files: dict[int | str, str] = {}
        self._slice = lru_cache(OPEN_CHUNKS)(self._open)

    def finished(self) -> dict[int | str, str]:
        """Chunk (or HEAD) -> the name of its file, of the files that are there."""
        found: dict[int | str, str] = {}
        for path in sorted(self.folder.glob(f"*-*{SUFFIX}")):
            name = path.name.partition("-")[0]
            found[int(name) if name.isdecimal() else name] = path.name
        return {part: name for part, name in found.items() if part == HEAD or part in range(len(self.layout.chunks))}

    def check_manifest(self) -> None:
        """Raises ValueError where the manifest of the folder says that it holds something else."""
        path = self.folder / MANIFEST
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs = {"of": found["of"], "sizes": found["sizes"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {DELETE.format(self.folder)}") from error
        for part, mine in (("of", self.of), ("sizes", self.sizes)):
            differing = [key for key in {**mine, **theirs[part]} if mine.get(key) != theirs[part].get(key)]
            if differing:
                raise ValueError(
                    f"{path} is of something else than the folder's name says (its {', '.join(differing)} differ): "
                    f"{DELETE.format(self.folder)}"
                )

    @property
    def sizes(self) -> dict[str, Any]:
        """Rows, chunks and bytes, for the manifest."""
        layout = self.layout
        return {
            "rows": len(layout.keys),
            "tokens": int(layout.tokens.sum()),
            "chunks": len(layout.chunks),
            "values_per_token": int(np.prod(layout.token_shape, dtype=np.int64)),
            "dtype": str(layout.dtype).removeprefix("torch."),
        }

    def check_writable(self) -> None:
        """Makes the folder. Raises ValueError where that is impossible, before any work is done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"the cache {self.folder} lacks rows and cannot be written ({error.strerror}): name another folder"
            ) from None

    def begin(self, missing: Sequence[int], head_bytes: int, words: Mapping[str, Any]) -> None:
        """Makes room for these chunks, and writes the manifest. The caller holds the folder's lock.

        Raises:
            ValueError: the disk has less room than they need.
        """
        needed = head_bytes + sum(map(self.layout.bytes_of, missing))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"the cache {self.folder} needs {_gib(needed)} more, and its disk has {_gib(free)} free: free some, or "
                "name a folder on another disk"
            )
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            leftover.unlink()
        write_json(self.folder / MANIFEST, {**words, "of": self.of, "sizes": self.sizes})

    def write(self, chunk: int, values: Tensor) -> None:
        """Writes the values of a chunk's tokens, [tokens, *token_shape] in the order of its rows."""
        rows = self.layout.chunks[chunk]
        keys = np.frombuffer(b"".join(self.layout.keys[row] for row in rows), dtype=np.uint8)
        self._write(f"{chunk:05d}", {VALUES: values, KEYS: torch.from_numpy(keys.reshape(-1, KEY_BYTES).copy())})

    def write_head(self, tensors: Mapping[str, Tensor]) -> None:
        self._write(HEAD, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        partial = self.folder / f"{name}{PARTIAL}"
        save_file(tensors, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self.folder / f"{name}-{file_hash(partial)}{SUFFIX}")

    def open(self, files: Mapping[int | str, str], offset: int = 0) -> None:
        """Takes these files, after a look at every chunk's size and at the bytes of some chunks.

        Args:
            offset: which chunks are hashed: those `offset` after HASHED_CHUNKS evenly spaced ones. Processes that give
                their rank look at different ones.

        Raises:
            ValueError: a chunk is missing, has another size than its rows, or not the bytes that were written.
        """
        missing = [chunk for chunk in range(len(self.layout.chunks)) if chunk not in files]
        if missing:
            raise ValueError(f"{self.folder} lacks {len(missing)} chunks: all processes must see the same folder")
        self._files = dict(files)
        for chunk in range(len(self.layout.chunks)):
            self._check_size(chunk)
        count = len(self.layout.chunks)
        for place in np.linspace(0, count, min(HASHED_CHUNKS, count), endpoint=False, dtype=int).tolist():
            self._check_bytes((place + offset) % count)
        if HEAD in files:
            self._check_bytes(HEAD)

    def head(self) -> dict[str, Tensor]:
        return load_file(self.folder / self._files[HEAD])

    def read(self, places: Sequence[Place]) -> Tensor:
        """The values of these rows, one after the other: [sum of their tokens, *token_shape] on the CPU."""
        return torch.cat([self._slice(place.chunk)[place.start : place.stop] for place in places])

    def _open(self, chunk: int) -> Any:
        return safe_open(self.folder / self._files[chunk], "pt").get_slice(VALUES)

    def _check_size(self, chunk: int) -> None:
        wanted = [self.layout.size(chunk), *self.layout.token_shape]
        try:
            found = self._open(chunk).get_shape()  # safetensors compares the file's length with its header
        except (SafetensorError, OSError) as error:
            raise self._damaged(chunk, f"cannot be read ({error})") from error
        if found != wanted:
            raise self._damaged(chunk, f"holds values {found}, and its rows have {wanted}")

    def _check_bytes(self, part: int | str) -> None:
        name = self._files[part]
        if file_hash(self.folder / name) != name.partition("-")[2].removesuffix(SUFFIX):
            raise self._damaged(part, "does not hold the bytes that were written")
        if isinstance(part, int):
            rows = self.layout.chunks[part]
            with safe_open(self.folder / name, "pt") as file:
                if file.get_tensor(KEYS).numpy().tobytes() != b"".join(self.layout.keys[row] for row in rows):
                    raise self._damaged(part, "is of other rows")

    def _damaged(self, part: int | str, why: str) -> ValueError:
        return ValueError(f"{self.folder / self._files[part]} {why}: {DELETE.format(self.folder)}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
