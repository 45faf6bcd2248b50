"""Files that appear whole or not at all, and the hashes that say whether they are still the same."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# what folders of models and adapters hold: weights, configurations, words, templates, code that a model brings, records
MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm"),
    *("chat_template.*", "additional_chat_templates", "configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *("README.md", "merge.json"),
)


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader, or a crash, sees the old or the new content, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value without NaN, which is not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_replaceable(folder: Path, marker: str = "config.json", kind: str = "model") -> None:
    """Raises ValueError where writing a model (or an adapter) into `folder` would destroy something else."""
    if not folder.exists():
        return
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    if found and (not folder.is_dir() or marker not in found):
        raise ValueError(
            f"{folder} exists and is no {kind} folder (no {marker} in it): choose another folder for the {kind}"
        )
    strange = [name for name in found if not any(fnmatch(name, pattern) for pattern in MODEL_FILES)]
    if strange:
        told = ", ".join(strange[:3]) + (", ..." if strange[3:] else "")
        raise ValueError(
            f"{folder} holds more than a {kind} ({told}), which would be lost: choose another folder, or "
            "move these away"
        )


@contextmanager
def replaced_whole(folder: Path) -> Iterator[Path]:
    """Gives the path to write to, which takes the place of `folder` if all went well, and else is removed.

    What stands beside it is left alone: the names used for the time being are drawn at random.
    """
    folder = folder.resolve()  # of a link what it points to
    drawn = secrets.token_hex(4)
    partial, old = (folder.with_name(f"{folder.name}.{part}-{drawn}") for part in ("partial", "old"))
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hashes(folder: str | Path) -> dict[str, str]:
    """File name -> SHA-256 for every file below a folder, in sorted order; empty when there is no such folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def key_of(value: Mapping[str, Any]) -> str:
    """A short name for everything in a mapping: equal values give equal keys, whatever their order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
