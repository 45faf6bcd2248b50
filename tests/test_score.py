"""A score that failed is null and counted, never 0; scoring again asks only about what is missing."""

import math
from pathlib import Path

import pytest

from rsa_lightning.evaluation.samples import Sample, SampleError, read_samples, write_samples
from rsa_lightning.evaluation.score import ScoreError, Scoring, load_scorer, score


@pytest.fixture
def path(tmp_path: Path) -> Path:
    samples = [Sample(f"p{i // 2}", i % 2, f"prompt {i // 2}", f"answer {i}", -1.0, -2.0) for i in range(6)]
    write_samples(tmp_path / "samples.jsonl", samples)
    return tmp_path / "samples.jsonl"


def length(prompt: str, answer: str) -> tuple[float, float]:
    return len(answer), float(answer[-1]) - 3


def test_every_answer_gets_both_scores_and_keeps_the_rest(path: Path):
    assert score(path, length) == Scoring(scored=6, kept=0, failed=0)
    samples = read_samples(path)
    assert [s.cost for s in samples] == [-3, -2, -1, 0, 1, 2]
    assert all((s.reward, s.logp, s.ref_logp) == (8, -1, -2) for s in samples)
    assert [p.name for p in path.parent.iterdir()] == ["samples.jsonl"]


def test_failed_scores_are_null_and_counted(path: Path, caplog: pytest.LogCaptureFixture):
    """1 raises, 2 has an infinite cost, 3 has no reward, 4 gives a text: each loses what failed and nothing else."""

    def shaky(prompt: str, answer: str) -> tuple[object, object]:
        if answer == "answer 1":
            raise TimeoutError("the judge did not reply")
        return {"answer 2": (1.0, math.inf), "answer 3": (None, 2.0), "answer 4": ("good", 0.5)}.get(
            answer, (1.0, -1.0)
        )

    assert score(path, shaky) == Scoring(scored=2, kept=0, failed=4)
    found = [(s.reward, s.cost) for s in read_samples(path)]
    assert found == [(1, -1), (None, None), (1, None), (None, 2), (None, 0.5), (1, -1)]
    assert "4 of 6 answers" in caplog.text
    assert "prompt p0, sample 1: TimeoutError: the judge did not reply" in caplog.text


def test_a_second_run_asks_only_about_what_is_missing(path: Path):
    score(path, lambda prompt, answer: (0.0, 1 / (answer != "answer 4")))
    asked: list[str] = []

    def counting(prompt: str, answer: str) -> tuple[float, float]:
        asked.append(answer)
        return 5.0, 5.0

    assert score(path, counting) == Scoring(scored=1, kept=5, failed=0)
    assert asked == ["answer 4"]
    assert [s.cost for s in read_samples(path)] == [1, 1, 1, 1, 5, 1]


def test_an_interruption_keeps_what_was_saved(path: Path):
    def dies(prompt: str, answer: str) -> tuple[float, float]:
        if answer == "answer 5":
            raise KeyboardInterrupt
        return 1.0, 1.0

    with pytest.raises(KeyboardInterrupt):
        score(path, dies, save_every=2)
    assert [s.cost for s in read_samples(path)] == [1, 1, 1, 1, None, None]
    assert score(path, length) == Scoring(scored=2, kept=4, failed=0)


def test_without_a_scorer_nothing_changes(path: Path):
    before = path.read_bytes()
    assert score(path, None) == Scoring(scored=0, kept=0, failed=6)
    assert path.read_bytes() == before


def test_a_scorer_that_always_fails_is_an_error(path: Path):
    before = path.read_bytes()
    with pytest.raises(ScoreError, match=r"failed on all 6 answers of .*, first on prompt p0, sample 0: TypeError"):
        score(path, "math.sqrt", save_every=2)
    assert path.read_bytes() == before


def test_scorers_are_found_by_dotted_name(path: Path):
    assert callable(load_scorer("rsa_lightning.stories.score"))
    for name, message in (
        ("score", "'score' is not a dotted name: write package.module.function"),
        ("rsa_lightning.fables.score", "cannot import rsa_lightning.fables"),
        ("math.pi", "math has no function pi"),
    ):
        with pytest.raises(ScoreError, match=message):
            score(path, name)


def test_a_damaged_file_is_named(path: Path):
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(SampleError, match=r"samples.jsonl:2 is not JSON"):
        score(path, length)
    path.write_text("")
    with pytest.raises(SampleError, match="holds no samples"):
        score(path, length)
    with pytest.raises(SampleError, match=r"is a folder: name a file of samples in it"):
        read_samples(path.parent)
