"""Preference pairs of unequal lengths, written where trainings of tiny models read them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_pairs(folder: Path, columns: Callable[[int], dict[str, Any]] = lambda i: {}) -> Path:
    """150 pairs in `folder`/pairs.jsonl, each with what `columns` adds to it; gives the folder."""
    rows = [
        {
            "prompt": f"Question {i} about {'x' * (i % 7)}?",
            "chosen": f" yes {i % 5} {'good ' * (i % 4 + 1)}",
            "rejected": f" no {i % 3} {'bad ' * (i % 6 + 1)}",
            **columns(i),
        }
        for i in range(150)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
