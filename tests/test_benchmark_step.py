"""The benchmark of a training step: what it times agrees, what disagrees is not timed, and it is beside TRL or says not."""

import importlib.util
import json

import pytest
import torch
from rsa_kernels import CVaR

from benchmarks import __main__ as command
from benchmarks.step import run as step
from benchmarks.step.cached import _measured, live_and_cached
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


def test_a_cached_reference_gives_the_same_losses_and_is_timed(tmp_path):
    """The ceiling by hand: F = 16 rows x 2 x (1 x (4 x 16^2 + 3 x 16 x 44) + 2 x 16 x 16), h = 12 rows x 2 x 16 x 129."""
    shape = {"hidden": 16, "layers": 1, "vocabulary": 129, "tokens": 16, "prompt": 4, "batch_size": 2}
    rows = live_and_cached(tmp_path, **shape, samples=2)
    assert [(row["method"], row["reference"]) for row in rows] == [
        *(("DPO", kind) for kind in ("live", "hidden", "logps")),
        *((method, kind) for method in ("TDPO (KL)", "RSA (CVaR 0.97)") for kind in ("live", "hidden")),
    ]
    forward, head = 16 * 2 * (4 * 16**2 + 3 * 16 * 44 + 2 * 16 * 16), 12 * 2 * 16 * 129
    assert rows[1]["ceiling"] == pytest.approx(4 * (forward + head) / (3 * forward + 4 * head), abs=1e-3)
    assert rows[2]["ceiling"] == pytest.approx(4 / 3, abs=1e-3)
    assert all(row["cpu_ms"] > 0 for row in rows)
    with pytest.raises(ValueError, match="with moved the loss of a step differs by 0.5 from that of a live reference"):
        list(_measured({"live": Steps([0.5] * 4), "moved": Steps([0.5] * 3 + [1.0])}, samples=1))


class Steps:
    """A loop whose losses are known."""

    def __init__(self, losses):
        self.all, self.losses = losses, []

    def step(self):
        self.losses.append(self.all[len(self.losses)])
