"""docs/theory quotes what is computed: a number there is followed by the name, in a comment, of the one in numbers.json."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.theory import command

THEORY = Path(__file__).parents[1] / "docs/theory"
QUOTED = re.compile(r"([−-]?\d+(?:\.\d+)?)( %)?<!--(.+?)-->")


@pytest.fixture(scope="module")
def computed() -> dict[str, dict[str, float]]:
    return command.numbers()


def prose(page: str) -> str:
    return (THEORY / f"{page}.md").read_text()


def is_rounded(text: str, value: float) -> bool:
    """`text` is `value` to the digits that it shows."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace("−", "-")) - value) <= 0.5 * 10**-digits + 1e-9


def test_the_file_of_numbers_is_what_is_computed(computed):
    written = json.loads((THEORY / "numbers.json").read_text())
    assert {page: list(numbers) for page, numbers in written.items()} == {p: list(n) for p, n in computed.items()}
    for page, numbers in computed.items():
        assert written[page] == pytest.approx(numbers, abs=1e-6)


@pytest.mark.parametrize("page", command.PAGES)
def test_pages_quote_the_numbers(page, computed):
    quoted = QUOTED.findall(prose(page))
    assert len(quoted) > 10
    wrong = []
    for text, percent, name in quoted:
        value = computed[page][name] * (100 if percent else 1)
        if not is_rounded(text, value):
            wrong.append(f"{name}: the page says {text}{percent}, it is {value:.6g}")
    assert not wrong


@pytest.mark.parametrize("page", command.PAGES)
def test_no_number_is_quoted_without_its_name(page):
    """What shows three digits or more after the point was computed, unless it is a paper."""
    text = prose(page)
    unnamed = re.sub("<!--.+?-->", "", QUOTED.sub("", text))
    assert re.findall(r"(?<!arXiv:)\b\d+\.\d{3,}", unnamed) == []
    assert text.count("<!--") == len(QUOTED.findall(text))


def test_a_page_that_drifts_is_found():
    assert is_rounded("0.378", 0.377541)
    assert not is_rounded("0.377", 0.377541)
    assert is_rounded("−0.05", -0.0487)
    assert not is_rounded("0.05", -0.0487)


@pytest.mark.parametrize("page", [*command.PAGES, "README"])
def test_links_and_tests_of_the_pages_exist(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (THEORY / target).exists(), target
    for target in re.findall(r"`((?:tests|rsa_lightning|benchmarks)/[\w/]+\.py)`", text):
        assert (THEORY.parents[1] / target).exists(), target


def test_every_figure_is_shown_and_every_part_draws_one(tmp_path):
    """One is drawn here; all of them take half a minute."""
    shown = {name for page in command.PAGES for name in re.findall(r"\]\((\w+\.png)\)", prose(page))}
    assert shown == {file.name for file in THEORY.glob("*.png")}
    drawn = command.PAGES["1-two-steps-are-one"].draw(tmp_path)
    assert drawn.name in shown
    assert drawn.read_bytes()[1:4] == b"PNG"
