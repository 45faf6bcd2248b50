"""numbers.json and the figures, into one folder."""

import json
from pathlib import Path

from benchmarks.theory import multiplier, stepwise, tail, tokens

PAGES = {
    "1-two-steps-are-one": stepwise,
    "2-token-level-risk": tokens,
    "3-the-multiplier": multiplier,
    "4-aligning-the-tail": tail,
}
DIGITS = 9  # what is below is rounding, and differs from machine to machine


def numbers() -> dict[str, dict[str, float]]:
    """Every number of every page, by page and name."""
    # + 0.0: no minus before a zero
    return {
        page: {name: round(value, DIGITS) + 0.0 for name, value in part.numbers().items()}
        for page, part in PAGES.items()
    }


def write(folder: Path) -> list[Path]:
    """Writes numbers.json and a picture for every page; the same bytes in every run on one machine."""
    found = folder / "numbers.json"
    found.write_text(json.dumps(numbers(), indent=1) + "\n")
    return [found, *(part.draw(folder) for part in PAGES.values())]
