"""The benchmark of a training step: what it times agrees, what disagrees is not timed, and it is beside TRL or says not."""

import importlib.util
import json

import pytest
import torch
from rsa_kernels import CVaR

from benchmarks import __main__ as command
from benchmarks.step import run as step
from benchmarks.step.cases import EOS, PAD, as_text, step_cases, tokenizer
from benchmarks.step.loops import Loop
from rsa_lightning.losses import DPO, RSA


@pytest.fixture
def case():
    [case] = step_cases(quick=True, steps=3)
    return case


def test_text_and_ids_of_a_pair_say_the_same(case):
    words = tokenizer(case.vocabulary)
    for pair in case.pairs:
        text = as_text(pair)
        assert words(text["prompt"])["input_ids"] == pair.prompt
        assert words(text["prompt"] + text["chosen"] + "<eos>")["input_ids"] == [*pair.prompt, *pair.chosen]
        assert pair.chosen[-1] == pair.rejected[-1] == EOS
        assert PAD not in [*pair.prompt, *pair.chosen, *pair.rejected]


def test_a_throughput_counts_no_padding(case):
    first, second = case.pairs[2:4]
    rows = [first.prompt, first.prompt, first.chosen, first.rejected]
    rows += [second.prompt, second.prompt, second.chosen, second.rejected]
    assert case.batch_size == 2
    assert case.tokens(1) == sum(map(len, rows))


def test_a_loop_takes_one_step_when_told_to():
    taken = []

    def train(pause):
        pause(None)
        taken.append(1)
        pause(torch.tensor(0.5))
        taken.append(2)
        assert not pause(torch.tensor(0.25))

    loop = Loop("two steps", train)
    assert taken == []
    loop.step()
    assert taken == [1]
    assert loop.losses == [0.5]
    loop.step()
    loop.close()
    assert taken == [1, 2]
    assert loop.losses == [0.5, 0.25]


def test_a_loop_that_is_closed_before_its_first_step_ends():
    """Lightning takes a step before it looks whether to stop."""
    answers = []

    def train(pause):
        answers.append(pause(None))
        answers.append(pause(torch.tensor(0.5)))

    Loop("no step", train).close()
    assert answers == [False, False]


def test_peak_memory_is_that_of_the_step_in_its_thread():
    def train(pause):
        pause(None)
        kept = [torch.zeros(1000)]
        pause(torch.tensor(0.0))
        kept.append(torch.zeros(3000))
        kept.clear()
        pause(torch.tensor(0.0))

    loop = Loop("allocates", train)
    loop.step()
    assert 12000 <= loop.peak_bytes() < 13000


def test_the_error_of_a_trainer_is_raised_by_its_step():
    def train(pause):
        pause(None)
        raise FloatingPointError("the loss is nan")

    loop = Loop("fails", train)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        loop.step()
    with pytest.raises(RuntimeError, match="fails has no step left"):
        loop.step()


def test_our_methods_agree_and_are_timed(capsys, tmp_path):
    """On a figure of each case and method, and on the losses of the naive implementation."""
    file = tmp_path / "step.json"
    assert command.main(["step", "--quick", "--no-trl", "--samples", "2", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "agree with the definition (TRL left out)" in printed
    assert printed.splitlines()[-1] == file.read_text().strip()
    results = json.loads(file.read_text())
    assert [row["method"] for row in results["results"]] == ["DPO", "TDPO (KL)", "RSA (CVaR 0.97)"]
    for row in results["results"]:
        assert row["tokens_per_s"] > 0
        assert row["peak_mib"] > 0
        assert row["times_trl"] is None
    assert results["threads"] == torch.get_num_threads()


def test_methods_that_disagree_are_not_timed(monkeypatch, capsys):
    """A loss at another temperature is named with its step, and the command fails."""
    ours = step.our_loop

    def other_loss_by_the_naive_twin(name, case, folder, loss, risk, impl="auto"):
        return ours(name, case, folder, RSA(risk_weight=1.0) if impl == "naive" else loss, risk, impl)

    monkeypatch.setattr(step, "our_loop", other_loss_by_the_naive_twin)
    monkeypatch.setattr(step, "OURS", {"RSA": (RSA(), CVaR(0.97))})
    monkeypatch.setattr(step, "measure", lambda *_: pytest.fail("it was timed"))
    assert command.main(["step", "--quick", "--no-trl"]) == 1
    output = capsys.readouterr()
    assert "at step 5 RSA has a loss of" in output.err
    assert output.out == ""


def test_without_trl_the_error_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["step", "--quick"])
    assert "pip install -c constraints.txt trl" in capsys.readouterr().err


def test_dpo_agrees_with_trl_step_by_step(capsys):
    pytest.importorskip("trl", reason="the comparison needs TRL: pip install -c constraints.txt trl")
    assert command.main(["step", "--quick", "--samples", "2"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    by_method = {row["method"]: row for row in results}
    assert list(by_method) == [step.TRL, step.TRL_PRECOMPUTED, *step.OURS]
    assert by_method[step.TRL]["times_trl"] == 1.0


def test_another_dpo_would_not_agree_with_trl(monkeypatch, capsys):
    """With the labels flipped in one of ten cases the losses differ from TRL's soon."""
    pytest.importorskip("trl", reason="the comparison needs TRL: pip install -c constraints.txt trl")
    monkeypatch.setitem(step.OURS, "DPO", (DPO(label_smoothing=0.1), CVaR(0.97)))
    assert command.main(["step", "--quick"]) == 1
    assert "at step 2 TRL DPO has a loss of" in capsys.readouterr().err
