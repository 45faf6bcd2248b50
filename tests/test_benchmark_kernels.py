"""The benchmark of the operators: what disagrees is named and not timed, memory and goals are what they are said to be."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rsa_kernels import ERM, KL, CVaR, naive

from benchmarks import __main__ as command
from benchmarks import figures, pending, timing
from benchmarks.gpu import pieces as gpu_pieces
from benchmarks.kernels import agreement as agreement_rule
from benchmarks.kernels import exact, goals, peers, providers, run
from benchmarks.kernels.agreement import EPSILON, check
from benchmarks.kernels.cases import GPU_MAIN, SUITES, Case, Spec, make, specs
from benchmarks.kernels.exact import DPO, JSD, LABELS, NESTED, TOKENS
from benchmarks.kernels.results import COLUMNS, EXTRA, TIME

CPU = torch.device("cpu")
SMALL = Spec("linear", (24, 8, 33), KL(), "trainable")
RISKS = [KL(), CVaR(0.97), CVaR(0.05), ERM(5.0), None]


def case(spec: Spec = SMALL, dtype: torch.dtype = torch.float32) -> Case:
    return make(spec, CPU, dtype)


def quick(*arguments: str) -> int:
    return command.main(["kernels", "--quick", "--samples", "1", *arguments])


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_quick_run_agrees_and_times(capsys, tmp_path):
    """Every provider of every case is timed or listed with a reason, and what it computes was compared."""
    assert quick("--output", str(tmp_path)) == 0
    [file] = tmp_path.glob("*.json")
    run = json.loads(file.read_text())
    assert run["disagreements"] == []
    assert run["done"] == [str(spec) for suite in SUITES for spec in specs(suite, "cpu", True)]
    times = {
        (r["op"], r["shape"], r["risk"], r["head"], r["provider"], r["mode"])
        for r in run["records"]
        if r["metric"] == TIME
    }
    without = {(r["op"], r["shape"], r["risk"], r["head"], r["provider"], r["mode"]) for r in run["missing"]}
    for suite in SUITES:
        for spec in specs(suite, "cpu", True):
            risk = "" if spec.op == "nested" else str(spec.risk)
            for offer in providers.offers(spec, CPU, torch.float32, False):
                key = (spec.op, spec.size, risk, spec.head, offer.name)
                for mode in ("forward", "forward+backward"):
                    assert ((*key, mode) in times) != (bool({(*key, mode), (*key, "")} & without)), (key, mode)
    errors = [r for r in run["records"] if r["metric"].startswith("error of")]
    assert {r["metric"] for r in errors} >= {
        "error of logp",
        "error of risk",
        "error of gradient of weight",
        "error of to_go",
    }
    assert all(0 <= r["q50"] <= r["allowed"] < 1e-3 for r in errors)
    assert all(r["reason"] for r in run["missing"])
    assert run["environment"].keys() >= {
        "device",
        "threads",
        "torch",
        "triton",
        "commit",
        "sources",
        "tf32",
        "variables",
        "date",
    }
    assert "% of gemms" in capsys.readouterr().out


def test_the_csv_holds_the_records_of_the_json(tmp_path):
    assert quick("--suite", "nested", "--output", str(tmp_path)) == 0
    [run] = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    [csv] = [file.read_text().splitlines() for file in tmp_path.glob("*.csv")]
    assert json.loads(csv[0].removeprefix("# ")) == run["environment"]
    assert csv[1] == ",".join(COLUMNS)
    assert len(csv) == 2 + len(run["records"])


def test_a_run_adds_to_the_file_and_replaces_its_own_cases(tmp_path):
    """Hours of measuring must survive a short run into the same folder."""
    both, one = ("KL", "CVaR(0.97)"), ("KL",)
    arguments = ("--suite", "logits", "--providers", "naive", "--output", str(tmp_path), "--risks")
    assert quick(*arguments, *both) == 0
    [file] = tmp_path.glob("*.json")
    before = json.loads(file.read_text())
    assert quick(*arguments, *one) == 0
    after = json.loads(file.read_text())
    assert sorted(after["done"]) == sorted(before["done"])
    assert [r for r in after["records"] if "CVaR" in r["risk"]] == [r for r in before["records"] if "CVaR" in r["risk"]]
    assert len(after["records"]) == len(before["records"])
    assert len(after["missing"]) == len(before["missing"])
    times = [
        [r["q50"] for r in run["records"] if r["risk"] == "KL()" and r["metric"] == TIME] for run in (before, after)
    ]
    assert times[0] != times[1]


@pytest.mark.parametrize("name", ["sources", "torch", "device"])
def test_another_environment_does_not_replace_a_file(name, tmp_path, capsys):
    arguments = ("--suite", "logits", "--risks", "KL", "--providers", "naive", "--output", str(tmp_path))
    assert quick(*arguments) == 0
    [file] = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    content["environment"][name] = "another"
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert quick(*arguments) == 2
    assert f"was measured with other {name}" in capsys.readouterr().err
    assert json.loads(file.read_text()) == content


@pytest.mark.parametrize(("text", "sentence"), [("{", "is no JSON"), ("[1]", "holds no results")])
def test_a_file_that_is_no_result_is_named(text, sentence, tmp_path, capsys):
    (tmp_path / "other.json").write_text(text)
    assert command.main(["figures", str(tmp_path)]) == 2
    assert f"{tmp_path / 'other.json'} {sentence}" in capsys.readouterr().err
    assert not (tmp_path / "PENDING.md").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--suite", "linear", "--shapes", "10x10"], "no case of --suite linear is left: its risks are"),
        (["--suite", "logits", "--risks", "CVaR(0.5)"], "no case of --suite logits is left"),
        (["--suite", "logits", "--providers", "naive", "chunky"], "--providers chunky: there are chunked, "),
    ],
)
def test_nothing_to_do_is_an_error(arguments, sentence, capsys):
    assert quick(*arguments) == 2
    assert sentence in capsys.readouterr().err


def test_shapes_risks_and_providers_are_chosen(tmp_path):
    arguments = [
        "--suite",
        "linear",
        "--shapes",
        "6x4x9",
        "--risks",
        "CVaR(0.05)",
        "None",
        "--providers",
        "naive",
        "chunked-cache",
    ]
    assert quick(*arguments, "--output", str(tmp_path)) == 0
    [run] = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert run["done"] == [
        "linear N=6 H=4 V=9 CVaR(tail=0.05) trainable head",
        "linear N=6 H=4 V=9 None trainable head",
    ]
    assert {record["provider"] for record in run["records"]} == {"naive", "chunked-cache", "gemms"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shapes", "8by8"], "a shape is two or three sizes such as 1024x512x32000, got 8by8"),
        (["--risks", "VaR"], "a risk is KL, CVaR(tail), ERM(mu) or None, got VaR"),
        (
            ["--risks", "CVaR(97)"],
            "CVaR(97) is no risk: CVaR tail is a probability mass in (0, 1], got 97.0: 97 % is 0.97",
        ),
        (["--samples", "0"], "--samples is at least 1, got 0"),
        (["--threads", "0"], "--threads is at least 1, got 0"),
        (["--device", "tpu"], "--device is cpu, cuda or cuda:N, got tpu"),
        (["--output", "/proc/x"], "--output /proc/x: No such file or directory: /proc/x; choose a folder"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        quick(*arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_run_says_so(capsys, tmp_path):
    assert command.main(["gpu", "--output", str(tmp_path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- agreement -------------------------------------------------------------------------------------------------------


def wrong_gradient(spec):
    """The values of the published formulation, and one gradient in a thousand too large."""
    right = published(spec)

    def call(case, t):
        found = right.call(case, t)
        return found | {"logp": found["logp"] + 1e-3 * (found["logp"] - found["logp"].detach())}

    return replace(right, call=call)


published = peers.published


def test_a_provider_that_is_wrong_is_named_and_not_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peers, "published", wrong_gradient)
    assert quick("--suite", "linear", "--risks", "KL", "--output", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "linear N=64 H=32 V=129 KL() trainable head: research gradient of weight is off by" in error
    assert "allowed are" in error
    assert "naive" not in error
    [run] = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    timed = {record["provider"] for record in run["records"] if record["metric"] in (TIME, EXTRA)}
    assert timed >= {"naive", "chunked-auto"}
    assert "research" not in timed


def failing(error):
    def call(case, t):
        raise error

    return call


def agreement(kind: str, call):
    return check(case(), [providers.Provider("it", kind, call), providers._plain(SMALL, False)], torch.float32)


def test_what_ours_raises_is_a_disagreement_and_what_a_peer_raises_a_reason():
    ours = agreement("ours", failing(RuntimeError("no such kernel")))
    assert ours.disagreements == [f"{SMALL}: it failed: RuntimeError: no such kernel"]
    peers = agreement("peer", failing(RuntimeError("no such kernel")))
    assert peers.disagreements == []
    assert peers.missing == [providers.Missing("it", "RuntimeError: no such kernel")]
    assert [p.name for p in ours.providers] == [p.name for p in peers.providers] == ["naive"]


def test_out_of_memory_is_a_reason_for_anybody():
    found = agreement("ours", failing(torch.OutOfMemoryError("CUDA out of memory")))
    assert found.missing == [providers.Missing("it", "out of memory")]
    assert found.disagreements == []


def test_rounding_of_sums_over_responses_is_of_their_size():
    """One token counts as 1; of 300 nats summed the loss sees a tenth, β."""
    values = {"loss": torch.tensor(0.7), "chosen_logps": torch.tensor([-300.0]), "rejected_logps": torch.tensor([-2.0])}
    whole = exact.Results(values, {}, 1.0)
    names = ("chosen_logps", "rejected_logps", "loss", "gradient of weight")
    assert [agreement_rule.magnitude(name, whole) for name in names] == pytest.approx([300, 300, 30, 30])
    rows = exact.Results({"logp": torch.tensor([-300.0])}, {}, 1.0)
    assert agreement_rule.magnitude("logp", rows) == agreement_rule.magnitude("gradient of weight", rows) == 1


def test_nan_disagrees():
    plain = providers.linear_call(KL(), "naive")
    found = agreement("ours", lambda c, t: {name: v * torch.nan for name, v in plain(c, t).items()})
    assert [p.name for p in found.providers] == ["naive"]
    assert "it logp is off by nan" in found.disagreements[0]


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = {o.name: o for o in providers.offers(SMALL, CPU, torch.float32, False)}
    for name in ("liger-dpo", "liger-jsd"):
        assert "pip install -c constraints.txt liger-kernel" in found[name].reason


def test_triton_is_not_timed_on_a_cpu():
    found = {o.name: o for o in providers.offers(SMALL, CPU, torch.float32, False)}
    assert "interpreter" in found["triton-cache"].reason


# ---- the truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("risk", RISKS, ids=str)
@pytest.mark.parametrize("head", ["trainable", "frozen"])
def test_the_truth_is_the_definition_whatever_the_blocks(risk, head):
    whole = case(SMALL._replace(risk=risk, head=head)).cast(torch.float64)
    values, gradients = exact.differentiate(providers.linear_call(risk, "naive"), TOKENS, whole)
    found = exact.defined(whole, TOKENS, blocks=5)
    assert found.values.keys() == values.keys()
    assert found.gradients.keys() == gradients.keys() == ({"hidden", "weight"} if head == "trainable" else {"hidden"})
    for name, tensor in (values | gradients).items():
        ours = (found.values | found.gradients)[name]
        torch.testing.assert_close(ours, tensor.detach(), rtol=0, atol=1e-12)


def whole_gradient(objective, given: Case) -> dict[str, torch.Tensor]:
    """By autograd through everything at once."""

    def call(c, t):
        z, r = t["hidden"] @ t["weight"].T, t["ref_hidden"] @ t["ref_weight"].T
        return objective.finish(objective.rows(z, r, t["labels"], c.spec.risk))

    return exact.differentiate(call, objective, given)[1]


@pytest.mark.parametrize("objective", [DPO, JSD, LABELS], ids=lambda o: o.name)
def test_losses_over_sequences_are_differentiated_through_their_rows(objective):
    given = case().cast(torch.float64)
    found = exact.defined(given, objective, blocks=3)
    for name, gradient in whole_gradient(objective, given).items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-14)
    # gradients of a mean are small, so errors are measured in the largest that reaches a row
    rows = given.spec.shape[0]
    assert found.unit == pytest.approx({"dpo": 0.05, "jsd": 1 / rows, "labels": 1.0}[objective.name], rel=0.1)


def test_preference_loss_hand_worked():
    """Two responses of two tokens: lr is 0.5 and −0.5, so the loss is −log σ(0.1)."""
    rows = {"logp": torch.tensor([-1.0, -1.0, -2.0, -1.0]), "ref_logp": torch.tensor([-1.5, -1.0, -1.5, -1.0])}
    terms = exact.preference_terms(rows)
    assert terms["loss"].item() == pytest.approx(math.log1p(math.exp(-0.1)))
    assert terms["chosen_logps"].tolist() == [-2]
    assert terms["rejected_logps"].tolist() == [-3]


def test_jensen_shannon_hand_worked():
    """0 of a distribution with itself, log 2 of two that share nothing."""
    same, apart = torch.randn(1, 5), torch.tensor([[30.0, 0.0]])
    assert exact.jensen_shannon(same, same).item() == pytest.approx(0, abs=1e-7)
    assert exact.jensen_shannon(apart, apart.flip(1)).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("risk", RISKS, ids=str)
def test_the_published_formulation_is_the_definition(risk):
    """With many ties, as logits in bf16 have them: values, and gradients in the logits."""
    z = torch.randn(12, 40, dtype=torch.float64).mul(2).round().div(2)
    r = z + torch.randint(-1, 2, z.shape) / 2
    r[0] = z[0]  # one single tie
    labels = torch.randint(0, 40, (12,))
    found = []
    for rows in (peers.published_rows, lambda *a: exact.named(naive.token_risk(*a))):
        leaf = z.clone().requires_grad_()
        values = rows(leaf, r, labels, risk)
        loss = values["logp"].sum() - 0.5 * values.get("risk", torch.zeros(12)).sum()
        found.append(values | {"gradient": torch.autograd.grad(loss, leaf)[0]})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-12)


def test_the_tail_of_a_sort_hand_worked():
    """0.5 of mass ties at the threshold for a tail of 0.4: it is shared as 0.3 to 0.2."""
    weights = peers.sorted_tail(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[0.5, 0.3, 0.2]]), 0.4)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.6, 0.4]]))


def test_nested_truth_is_the_recursion():
    given = case(Spec("nested", (3, 5))).cast(torch.float64)
    values, gradients = exact.differentiate(providers.nested_call("naive"), NESTED, given)
    found = exact.defined(given, NESTED)
    for name, tensor in (values | gradients).items():
        torch.testing.assert_close((found.values | found.gradients)[name], tensor.detach(), rtol=0, atol=1e-13)


def test_a_plain_sum_in_low_precision_is_what_a_peer_may_do():
    """Eight blocks summed in bf16 are further from the truth than one, and a peer that sums so is given as much room."""
    given = case(Spec("linear", (512, 16, 33), KL(), "trainable"), torch.bfloat16)
    true = exact.truth(given, TOKENS).gradients["weight"]
    one, many = (exact.defined(given, TOKENS, blocks, torch.bfloat16).gradients["weight"] for blocks in (1, 64))
    assert (many - true).abs().max() > 1.5 * (one - true).abs().max()
    assert EPSILON[torch.bfloat16] == 1e-4


# ---- time and memory -------------------------------------------------------------------------------------------------


def test_methods_take_turns():
    calls = []
    methods = {name: partial(calls.append, name) for name in ("a", "b")}
    times = timing.interleave(methods, 4, CPU)
    assert calls == ["a", "b"] * 5  # the first round warms up
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4}


def test_long_methods_are_sampled_less_often(monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH_S", 0.0)
    assert len(timing.interleave({"a": lambda: None}, 30, CPU)["a"]) == timing.ENOUGH_SAMPLES


def test_a_ratio_is_of_samples_a_moment_apart():
    assert timing.ratio([2.0, 2.0, 200.0], [1.0, 10.0, 100.0]).median == 2


HELD = 10 * 2**20


def hand_made(case, t):
    """Holds ten MiB beside its outputs."""
    held = torch.zeros(HELD, dtype=torch.uint8)
    return {"logp": t["hidden"].sum(1) + t["weight"].sum() + held[0], "risk": t["hidden"].sum(1)}


def measured_extra(spec: Spec, mode: str) -> int:
    given = case(spec)
    method = run.methods_of(given, [providers.Provider("it", "ours", hand_made)], mode)["it"]
    return run.extra_bytes(given, mode, timing.peak_extra_bytes(method, CPU))


def test_extra_memory_is_what_a_provider_adds():
    """Of a hand-made one: what it holds. Not inputs; and where gradients are wanted, not these, alive at the peak or not."""
    large = Spec("linear", (2, 64, 4096), KL(), "trainable")
    d_hidden, gradients = 4 * 2 * 64, 4 * (2 + 4096) * 64
    assert HELD <= measured_extra(large, "forward") < HELD + 2**12
    assert HELD - d_hidden <= measured_extra(large._replace(head="frozen"), "forward+backward") < HELD + 2**13
    assert run.extra_bytes(case(large), "forward+backward", HELD + gradients + 4 * 4096 * 64) == HELD
    assert run.extra_bytes(case(large._replace(head="frozen")), "forward+backward", HELD + 4 * 2 * 64) == HELD
    assert run.extra_bytes(case(large), "forward+backward", 0) == 0


def test_the_buffer_of_the_head_is_in_fp32_whatever_its_dtype():
    given = case(dtype=torch.bfloat16)
    n, h, v = SMALL.shape
    assert run.extra_bytes(given, "forward+backward", 10**6) == 10**6 - 2 * (n + v) * h - 4 * v * h


def test_expected_work_hand_worked():
    """Two products and two more for gradients; row kernels read both logits twice and write one gradient."""
    given = case(Spec("linear", (2, 3, 5), KL(), "trainable"))
    assert given.flops == {"forward": 2 * 60, "forward+backward": 4 * 60}
    assert case(Spec("linear", (2, 3, 5), KL(), "frozen")).flops["forward+backward"] == 3 * 60
    assert case(Spec("logits", (2, 5), KL())).moved == {"forward": 2 * 40, "forward+backward": 5 * 40}
    assert case(Spec("nested", (3, 5))).moved == {"forward": 8 * 15, "forward+backward": 16 * 15}


@pytest.mark.parametrize("at_once", [10**6, 100])
def test_the_copy_moves_the_bytes_of_the_call(monkeypatch, at_once):
    """Read and written together, through one buffer or piece by piece."""
    given = case(Spec("logits", (16, 64), KL()))
    moved: list[int] = []
    monkeypatch.setattr(providers, "COPIED", at_once)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: moved.append(self.nbytes + source.nbytes))
    [copy] = providers.floors(given.spec)
    for mode, way in copy.make(given).items():
        moved.clear()
        way()
        assert sum(moved) == given.moved[mode]


# ---- goals -----------------------------------------------------------------------------------------------------------

MAIN = Spec("linear", GPU_MAIN, KL(), "trainable")


def run_of(records: list[dict], capability=(9, 0), threads=1) -> dict:
    environment = {"device": "NVIDIA H200", "capability": list(capability)} if capability else {"device": "AMD EPYC"}
    return {"environment": environment | {"threads": threads}, "records": records}


def record(
    spec: Spec, provider: str, metric: str, value: float, relative_to: str = "", threads=1, dtype="bfloat16"
) -> dict:
    names = {
        "op": spec.op,
        "shape": spec.size,
        "risk": str(spec.risk),
        "head": spec.head,
        "threads": threads,
        "dtype": dtype,
    }
    return names | {
        "provider": provider,
        "mode": "forward+backward",
        "metric": metric,
        "relative_to": relative_to,
        "q50": value,
    }


def words(runs: list[dict]) -> dict[str, str]:
    return {str(v.goal): v.word for v in goals.verdicts(runs)}


GOAL = "H200-class GPU: triton-cache KL() at N=8192 H=4096 V=128256, forward+backward: "


def test_goals_are_met_missed_or_not_measured():
    found = words(
        [run_of([record(MAIN, "triton-cache", TIME, 1.19, "gemms"), record(MAIN, "triton-cache", EXTRA, 4.6e9)])]
    )
    assert found[f"{GOAL}time <= 1.2 x gemms"] == "met"
    assert found[f"{GOAL}extra memory <= 4.5 GB"] == "missed"
    assert found[f"{GOAL}time <= 1 x liger-dpo"] == "not measured"
    assert set(words([]).values()) == {"not measured"}


def test_goals_of_memory_beside_another_provider_and_beside_fewer_tokens():
    few, many = (Spec("linear", (n, *GPU_MAIN[1:]), KL(), "trainable") for n in (4096, 16384))
    records = [record(MAIN, "triton-cache", EXTRA, 4e9), record(MAIN, "naive", EXTRA, 30e9)]
    records += [record(few, "triton-recompute", EXTRA, 1.0e9), record(many, "triton-recompute", EXTRA, 1.1e9)]
    found = words([run_of(records)])
    assert found[f"{GOAL}extra memory <= 0.167 x naive"] == "met"
    [flat] = [word for goal, word in found.items() if "at N=4096" in goal]
    assert flat == "missed"


def test_goals_hold_on_their_device_only():
    """Not on an older GPU, in another dtype, or with other threads."""
    fast = record(MAIN, "triton-cache", TIME, 1.0, "gemms")
    assert set(words([run_of([fast], capability=(8, 0))]).values()) == {"not measured"}
    assert set(words([run_of([fast | {"dtype": "float32"}])]).values()) == {"not measured"}
    spec = Spec("linear", (1024, 512, 32000), KL(), "trainable")
    slow = record(spec, "chunked-auto", TIME, 0.7, "naive", threads=2, dtype="float32")
    found = words([run_of([slow], capability=None, threads=2)])
    assert [goal for goal, word in found.items() if word == "missed"] == [
        "CPU, 2 threads: chunked-auto KL() at N=1024 H=512 V=32000, forward+backward: time <= 0.6 x naive"
    ]


def test_every_goal_is_of_a_case_that_is_run():
    """By the piece that it names, or by `make bench`."""
    pieces = {piece.name: piece.work.args for piece in gpu_pieces.PIECES if isinstance(piece.work, partial)}
    for goal in goals.goals():
        if goal.device == goals.CPU:
            assert goal.spec in specs("linear", "cpu", False), goal
            continue
        cases, names = pieces[goal.piece]
        for name in filter(None, (goal.provider, goal.relative_to)):
            assert name in ("gemms", "copy") or providers.chosen(providers.Missing(name, ""), names), goal
        assert {goal.spec, goal.than_at or goal.spec} <= set(cases), goal


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_made_from_files_alone(monkeypatch, tmp_path, capsys):
    assert quick("--suite", "all", "--risks", "KL", "--providers", "naive", "chunked", "--output", str(tmp_path)) == 0
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("something was measured"))
    assert command.main(["figures", str(tmp_path)]) == 0
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {f"kernels_{what}.png" for what in ("time", "memory", "share_of_floor", "share_of_copy", "growth")}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("*.png"))
    assert "not measured" in capsys.readouterr().out


def test_growth_is_drawn_along_one_size():
    """N in the file with most points; a shape of another V does not join in."""
    shapes = [(n, 8, 100) for n in (1, 2, 4)] + [(3, 8, 50)]
    records = [
        record(Spec("linear", s, KL(), "trainable"), "naive", TIME, s[0]) | dict(zip("NHV", s, strict=True))
        for s in shapes
    ]
    assert figures.series(records, "N", TIME) == {"naive": [(1, 1), (2, 2), (4, 4)]}
    assert figures.series(records, "V", TIME) == {}


def test_a_folder_that_is_not_there_is_an_error(capsys, tmp_path):
    with pytest.raises(SystemExit):
        command.main(["figures", str(tmp_path / "none")])
    assert "there is no folder" in capsys.readouterr().err


RESULTS = Path(gpu_pieces.ROOT) / "benchmarks/results"


def test_what_is_pending_is_what_the_committed_results_lack():
    """`python -m benchmarks figures benchmarks/results` writes it."""
    page = (RESULTS / "PENDING.md").read_text()
    assert page == pending.pending(RESULTS)


def test_pending_names_each_open_goal_and_piece_with_its_command(tmp_path):
    page = pending.pending(tmp_path)
    for goal in goals.goals():
        piece = f"python -m benchmarks gpu --piece {goal.piece}" if goal.piece else "make bench"
        assert f"| {goal} | `{piece}` |" in page
    (tmp_path / "gpu_0_agreement.json").write_text(json.dumps(run_of([]) | {"piece": "agreement", "complete": True}))
    assert "--piece agreement" not in pending.pending(tmp_path)
