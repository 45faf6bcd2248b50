"""The stages: what they refuse, what they log, and that a step is the same step however the batch is cut."""

import csv
import json
import math
import shutil
from itertools import pairwise
from statistics import fmean

import lightning as L
import pytest
import torch
from rsa_kernels import KL, CVaR

from rsa_lightning.callbacks import ModelExport
from rsa_lightning.data.batch import ROLES, collate
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.records import PreferencePair, RatedResponse
from rsa_lightning.data.relabel import SafeDPO
from rsa_lightning.data.tokenize import Lengths, encode_records, pad_id
from rsa_lightning.losses import DPO, IPO, KTO, RSA, TDPO
from rsa_lightning.models import PolicySpec
from rsa_lightning.optim import Schedule
from rsa_lightning.reference import FrozenCopy
from rsa_lightning.saving import save_policy
from rsa_lightning.stages import RewardAlignment, SafetyAlignment
from rsa_lightning.supervised import SupervisedWarmup
from rsa_lightning.transforms import Exponential, Hinge, Indicator, MeanCost

WORDS = "fox owl river bread cloth place answer human cool dry old safe sleep cross".split()
PAIRS = [
    PreferencePair("How do I keep bread fresh?", " Wrap it in a cloth.", " No answer, said the owl.", 0.3, 0.5),
    PreferencePair("Who?", " The fox asked the old owl whether the river was safe.", " Assistant"),
    PreferencePair("Is it dry?", " Cool.", " It is better than a dangerous one, said the fox.", 0.8, -0.25),
]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """40 pairs; no two prompts are equal."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Q{i} {WORDS[i % 14]}?",
            "chosen": f" {' '.join(WORDS[: i % 5 + 1])}.",
            "rejected": f" {WORDS[(3 * i) % 14]}",
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trainer(tmp_path, **options):
    defaults = {
        "max_steps": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        "limit_val_batches": 0,
    }
    return L.Trainer(**defaults | options)


def data(pairs_file, **options):
    return PreferenceData(str(pairs_file), **{"batch_size": 4, "max_length": 64} | options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def stage(folder, cls=RewardAlignment, loss=None, **options):
    return cls(PolicySpec(model=str(folder)), loss=loss or RSA(beta=0.1), optimizer=sgd, **options)


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}


def _configured(module, tmp_path):
    module.trainer = trainer(tmp_path)
    module.configure_model()
    return module


def _assert_same_step(start, one, other):
    moved = max((one[name] - start[name]).abs().max() for name in start)
    apart = max((one[name] - other[name]).abs().max() for name in start)
    assert moved > 1e-3
    assert apart < 1e-5 * moved + 1e-6


RATED = [
    RatedResponse("How do I keep bread fresh?", " Wrap it in a cloth."),
    RatedResponse("Who?", " Assistant", desirable=False),
    RatedResponse("Is it dry?", " Cool."),
    RatedResponse("Is it safe?", " It is better than a dangerous one, said the fox."),
]


def make_batch(tokenizer, records, roles=ROLES[:2]):
    examples = encode_records(tokenizer, records, Lengths(64, 32)).examples
    assert len(examples) == len(records)
    return collate(examples, roles=roles, pad_id=pad_id(tokenizer))


def by_row(token_values, batch):
    """One list of floats per row of the batch."""
    return [token_values[start:end].tolist() for start, end in pairwise(batch["cu_seqlens"].tolist())]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_a_stage_starts_at_log_two_with_zero_risk(tiny_llama, pairs_file, tmp_path):
    module, run = stage(tiny_llama, risk=CVaR(0.3)), trainer(tmp_path, limit_val_batches=1.0)
    run.validate(module, data(pairs_file), verbose=False)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for side in ("chosen", "rejected"):
        assert abs(found[f"val/risk/{side}"]) < 1e-5
        assert abs(found[f"val/kl/{side}"]) < 1e-5
        assert found[f"val/logps/{side}"] < -1
    assert found["val/rewards/accuracies"] == 0.5


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_step_by_hand(split, tiny_llama, tiny_tokenizer, tmp_path):
    """From the token statistics on, in Python floats, with a discount, soft targets and offsets.

    SRR = sum_t 0.8^t rho_t,  h = lr_w - lr_l - 0.25 (SRR_l - SRR_w),  z = 0.5 h - o,
    loss = t softplus(-z) + (1 - t) softplus(z).
    """
    module = stage(tiny_llama, loss=RSA(beta=0.5, risk_weight=0.25), risk=CVaR(0.3), discount=0.8)
    _configured(module, tmp_path)
    with torch.no_grad():  # the policy has left its reference
        for parameter in module.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch, targets, offsets = make_batch(tiny_tokenizer, PAIRS), [0.3, 1.0, 0.8], [0.5, 0.0, -0.25]
    with torch.no_grad():
        tokens = module.policy(batch, module.reference.states(batch), CVaR(0.3), impl="naive")
    logps, kls = ([sum(row) for row in by_row(values, batch)] for values in (tokens.logp, tokens.kl))
    logratios = [sum(row) for row in by_row(tokens.logp - tokens.ref_logp, batch)]
    risks = [sum(0.8**t * value for t, value in enumerate(row)) for row in by_row(tokens.risk, batch)]
    rewards = [0.5 * (lr + 0.25 * risk) for lr, risk in zip(logratios, risks, strict=True)]
    margins = [chosen - rejected for chosen, rejected in zip(rewards[:3], rewards[3:], strict=True)]
    losses = [
        t * softplus(o - margin) + (1 - t) * softplus(margin - o)
        for margin, t, o in zip(margins, targets, offsets, strict=True)
    ]
    expected = {
        "loss": fmean(losses),
        "rewards/margins": fmean(margins),
        # of the response that the target prefers: in the first pair the rejected one
        "rewards/accuracies": fmean((margin > 0) == (t > 0.5) for margin, t in zip(margins, targets, strict=True)),
    }
    for name, values in {"rewards": rewards, "logps": logps, "kl": kls, "risk": risks}.items():
        expected |= {f"{name}/chosen": fmean(values[:3]), f"{name}/rejected": fmean(values[3:])}
        assert abs(expected[f"{name}/chosen"] - expected[f"{name}/rejected"]) > 0.05  # a swap would show
    loss = module.shared_step(batch, split)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    found = {name: value.item() for name, value in module._means[split].read().items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", [RSA(beta=0.5), DPO(beta=0.5), TDPO(beta=0.5)])
def test_micro_batches_make_the_same_step_as_one_batch(loss, tiny_llama, pairs_file, tmp_path):
    """8 x 1 and 1 x 8 accumulated: the same pairs, the same gradient, the same weights to rounding."""
    after = []
    for size, accumulate in ((8, 1), (1, 8)):
        module = stage(tiny_llama, loss=loss, risk=KL())
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, max_steps=2)
        run.fit(module, data(pairs_file, batch_size=size))
        after.append(weights(module))
    _assert_same_step(weights(_configured(stage(tiny_llama, loss=loss, risk=KL()), tmp_path)), *after)


def test_policy_and_reference_must_agree_before_the_first_update(tiny_llama, pairs_file, tmp_path, tiny_tokenizer):
    other = _configured(stage(tiny_llama), tmp_path)
    with torch.no_grad():
        other.policy.head.weight.mul_(1.1)
    save_policy(other.policy, tiny_tokenizer, tmp_path / "other")
    module = stage(tiny_llama, SafetyAlignment, reference=FrozenCopy(str(tmp_path / "other")))
    with pytest.raises(ValueError, match="policy and reference differ before the first update: max .* Likely causes"):
        trainer(tmp_path).fit(module, data(pairs_file))


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(tiny_llama, pairs_file, tmp_path):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                with torch.no_grad():
                    module.policy.head.weight[0, 0] = float("nan")
                self.before = weights(module)

    poison, module = Poison(), stage(tiny_llama)
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan in batch 1 of epoch 0 \(rows pairs.jsonl:\d+, .*not updated"
    ):
        trainer(tmp_path, max_steps=3, callbacks=[poison]).fit(module, data(pairs_file))
    for name, value in weights(module).items():
        assert torch.equal(value.nan_to_num(), poison.before[name].nan_to_num()), name


def test_the_reference_is_neither_trained_nor_checkpointed(tiny_llama, pairs_file, tmp_path):
    module, run = stage(tiny_llama), trainer(tmp_path, max_steps=2)
    run.fit(module, data(pairs_file))
    run.save_checkpoint(tmp_path / "checkpoint.ckpt")
    saved = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(module.state_dict())
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in module.policy.parameters())
    frozen = module.reference._policy
    assert all(not p.requires_grad for p in frozen.parameters())
    assert not torch.equal(frozen.head.weight, module.policy.head.weight)


def test_dpo_trains_without_risk_and_is_measured_on_it(tiny_llama, pairs_file, tmp_path):
    module, run = (
        stage(tiny_llama, loss=DPO(beta=0.1), risk=CVaR(0.5)),
        trainer(tmp_path, max_steps=2, limit_val_batches=1.0),
    )
    seen = []
    original = module.sequence_stats
    module.sequence_stats = lambda batch, risk: (seen.append(risk), original(batch, risk))[1]
    run.fit(module, data(pairs_file))
    assert seen[:2] == [None, None]
    run.validate(module, data(pairs_file), verbose=False)
    assert float(run.callback_metrics["val/risk/rejected"]) > 0


def test_kto_reads_the_mismatched_rows(tiny_llama, pairs_file, tmp_path):
    module, run = stage(tiny_llama, loss=KTO(beta=0.1)), trainer(tmp_path, max_steps=1)
    batches = []
    module.on_train_batch_end = lambda outputs, batch, batch_idx: batches.append(batch)
    run.fit(module, data(pairs_file))
    assert batches[0]["roles"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    _, chosen, _ = module.sequence_stats(batches[0], None)
    assert chosen.baseline is not None
    assert chosen.baseline.ndim == 0


def test_the_kto_baseline_is_the_mean_log_ratio_of_the_mismatched_rows(tiny_llama, tiny_tokenizer, tmp_path):
    """In a policy that has moved towards them and away from the others, so that z0 = baseline > 0.

    The loss of a step is the one worked by hand from it.
    """
    module = _configured(stage(tiny_llama, loss=KTO(beta=0.4, desirable_weight=1.5)), tmp_path)
    pairs = [PreferencePair(pair.prompt, pair.chosen, pair.rejected) for pair in PAIRS]
    batch = make_batch(tiny_tokenizer, pairs, ROLES)
    towards = torch.where(batch["roles"] == 2, 1.0, -1.0).repeat_interleave(batch["cu_seqlens"].diff())
    (towards * module.policy(batch, None, None).logp).sum().backward()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.002 * parameter.grad)
        tokens = module.policy(batch, module.reference.states(batch), None, impl="naive")
    logratios = [sum(row) for row in by_row(tokens.logratio, batch)]
    chosen, rejected, mismatched = logratios[:3], logratios[3:6], logratios[6:]
    z0 = fmean(mismatched)
    assert z0 > 0.5
    assert max(fmean(chosen), fmean(rejected)) < z0 - 0.5
    assert module.sequence_stats(batch, None)[1].baseline.item() == pytest.approx(z0, rel=1e-4)
    losses = [1.5 / (1 + math.exp(0.4 * (lr - z0))) for lr in chosen]
    losses += [1 / (1 + math.exp(0.4 * (z0 - lr))) for lr in rejected]
    assert module.shared_step(batch, "train").item() == pytest.approx(fmean(losses), rel=1e-4)
    found = module._means["train"].read()
    assert found["rewards/chosen"].item() == pytest.approx(0.4 * fmean(chosen), rel=1e-4)
    assert found["rewards/rejected"].item() == pytest.approx(0.4 * fmean(rejected), rel=1e-4)


def test_kto_takes_single_responses_in_any_numbers(tiny_llama, tiny_tokenizer, tmp_path):
    """Three desirable and one undesirable, worked by hand; every response weighs the same, and there is no margin."""
    module = _configured(stage(tiny_llama, loss=KTO(beta=0.4, undesirable_weight=2.0)), tmp_path)
    assert not module.needs_pairs
    batch = make_batch(tiny_tokenizer, RATED, ROLES)
    assert batch["roles"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        tokens = module.policy(batch, module.reference.states(batch), None, impl="naive")
    logratios = [sum(row) for row in by_row(tokens.logratio, batch)]
    desirable, [undesirable], z0 = logratios[:3], logratios[3:4], max(0.0, fmean(logratios[4:]))
    losses = [1 / (1 + math.exp(0.4 * (lr - z0))) for lr in desirable]
    losses += [2 / (1 + math.exp(0.4 * (z0 - undesirable)))]
    assert module.shared_step(batch, "val").item() == pytest.approx(fmean(losses), rel=1e-4)
    found = {name: value.item() for name, value in module._means["val"].read().items()}
    assert found["loss"] == pytest.approx(fmean(losses), rel=1e-4)
    assert found["rewards/chosen"] == pytest.approx(0.4 * fmean(desirable), rel=1e-4)
    assert found["rewards/rejected"] == pytest.approx(0.4 * undesirable, rel=1e-4)
    assert found["risk/rejected"] > 0
    assert not {"rewards/margins", "rewards/accuracies"} & set(found)


def test_equal_numbers_of_single_responses_are_no_pairs(tiny_llama, tiny_tokenizer, tmp_path):
    module = _configured(stage(tiny_llama, loss=KTO(beta=0.4)), tmp_path)
    module.shared_step(make_batch(tiny_tokenizer, RATED[:2], ROLES), "train")
    assert "rewards/margins" not in module._means["train"].read()
    pairs = [PreferencePair(pair.prompt, pair.chosen, pair.rejected) for pair in PAIRS]
    module.shared_step(make_batch(tiny_tokenizer, pairs, ROLES), "train")
    assert module._means["train"].read()["rewards/margins"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("rated", "absent"), [([RATED[0], RATED[2]], "rejected"), ([RATED[1]] * 2, "chosen")])
def test_a_batch_without_one_kind_has_a_loss_and_no_metric_of_it(rated, absent, tiny_llama, tiny_tokenizer, tmp_path):
    """And where other batches have that kind, their mean is not touched."""
    module = _configured(stage(tiny_llama, loss=KTO(beta=0.4)), tmp_path)
    one_sided, both = (make_batch(tiny_tokenizer, records, ROLES) for records in (rated, RATED))
    loss = module.shared_step(one_sided, "val")
    assert loss.item() == pytest.approx(0.5, abs=1e-5)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.policy.parameters())
    found = module._means["val"].read()
    assert f"logps/{absent}" not in found
    assert not any(value.isnan() for value in found.values())
    module.shared_step(both, "val")
    alone = module._means["val"].read()[f"logps/{absent}"]
    for batch in (one_sided, both):
        module.shared_step(batch, "val")
    torch.testing.assert_close(module._means["val"].read()[f"logps/{absent}"], alone)


def test_single_responses_weigh_the_same_in_any_micro_batch(tiny_llama, tiny_tokenizer, tmp_path):
    """Before the first update the baseline is 0 in every batch, so the gradient is a plain mean over responses."""

    def gradient(*batches):
        module = _configured(stage(tiny_llama, loss=KTO(beta=0.4)), tmp_path)
        for records in batches:
            (module.shared_step(make_batch(tiny_tokenizer, records, ROLES), "train") / len(batches)).backward()
        return torch.cat([p.grad.flatten() for p in module.policy.parameters()])

    whole, parts = gradient(RATED), gradient([RATED[1], RATED[3]], [RATED[0], RATED[2]])
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


def test_which_stages_need_pairs(tiny_llama):
    for loss in (RSA(beta=0.1), DPO(beta=0.1), TDPO(beta=0.1), IPO(beta=0.1)):
        assert stage(tiny_llama, loss=loss, risk=KL()).needs_pairs
    assert not stage(tiny_llama, loss=KTO(beta=0.1)).needs_pairs
    assert not SupervisedWarmup(PolicySpec(model=str(tiny_llama))).needs_pairs


def test_dropout_neither_moves_the_reference_nor_fails_the_agreement(tiny_llama, tiny_tokenizer, tmp_path):
    """The check compares the models, not two draws of dropout, and leaves the policy training with it."""
    folder = shutil.copytree(tiny_llama, tmp_path / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    module = _configured(stage(folder), tmp_path)
    batch = make_batch(tiny_tokenizer, PAIRS)
    draws = [module.policy.states(batch) for _ in range(2)]
    assert (draws[0] - draws[1]).abs().max() > 0.1
    module.check_agreement(batch)
    assert all(part.training for part in module.policy.modules())
    assert torch.equal(module.reference.states(batch).hidden, module.reference.states(batch).hidden)


def test_micro_batches_of_a_warm_up_make_the_same_step_as_one_batch(tiny_llama, pairs_file, tmp_path):
    """8 x 1 and 1 x 8 accumulated: responses are of uneven length, so a mean over tokens would make other steps."""
    warm_up = lambda: SupervisedWarmup(PolicySpec(model=str(tiny_llama)), optimizer=lambda p: torch.optim.SGD(p, 0.02))
    after = []
    for size, accumulate in ((8, 1), (1, 8)):
        module = warm_up()
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, max_steps=2)
        run.fit(module, data(pairs_file, batch_size=size))
        after.append(weights(module))
    _assert_same_step(weights(_configured(warm_up(), tmp_path)), *after)


def test_the_loss_of_a_warm_up_is_per_response_and_its_nll_per_token(tiny_llama, tiny_tokenizer, tmp_path):
    module = _configured(SupervisedWarmup(PolicySpec(model=str(tiny_llama))), tmp_path)
    batch = make_batch(tiny_tokenizer, PAIRS, ROLES[:1])
    with torch.no_grad():
        rows = by_row(-module.policy(batch, None, None, impl="naive").logp, batch)
    assert len({len(row) for row in rows}) == 3  # uneven: neither mean follows from the other
    assert module.shared_step(batch, "train").item() == pytest.approx(fmean(map(sum, rows)), rel=1e-5)
    found = module._means["train"].read()
    assert found["loss"].item() == pytest.approx(fmean(map(sum, rows)), rel=1e-5)
    assert found["nll"].item() == pytest.approx(fmean(value for row in rows for value in row), rel=1e-5)


def test_a_warm_up_learns_its_responses(tiny_llama, pairs_file, tmp_path):
    module = SupervisedWarmup(PolicySpec(model=str(tiny_llama)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    run = trainer(tmp_path, max_steps=60, limit_val_batches=1.0)
    run.validate(module, data(pairs_file), verbose=False)
    before = {name: float(value) for name, value in run.callback_metrics.items()}
    run.fit(module, data(pairs_file))
    assert float(run.callback_metrics["val/nll"]) < 0.5 * before["val/nll"]
    assert before["val/loss"] > before["val/nll"]  # a response has more than one token


def test_temperatures_of_the_stages(tiny_llama):
    assert stage(tiny_llama, loss=DPO(), beta=0.1, lam=4.0).loss.beta == pytest.approx(0.1)
    assert stage(tiny_llama, SafetyAlignment, loss=DPO(), beta=0.1, lam=4.0).loss.beta == pytest.approx(0.025)
    assert stage(tiny_llama, SafetyAlignment, loss=DPO(beta=0.3)).loss.beta == 0.3
    with pytest.raises(ValueError, match="the temperature of the safety stage is given twice"):
        stage(tiny_llama, SafetyAlignment, loss=DPO(beta=0.3), beta=0.1)


def test_a_binding_implementation_that_cannot_run_is_an_error(tiny_llama, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr("rsa_kernels.dispatch.INTERPRETED", False)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here"):
        trainer(tmp_path).fit(stage(tiny_llama, impl="triton"), data(pairs_file))


def test_every_implementation_trains_the_same_curve(tiny_llama, pairs_file, tmp_path):
    after = []
    for impl in ("naive", "chunked", "triton"):
        module = stage(tiny_llama, loss=RSA(beta=0.5), risk=CVaR(0.3), impl=impl)
        trainer(tmp_path, max_steps=5).fit(module, data(pairs_file))
        after.append(weights(module))
    for other in after[1:]:
        assert max((after[0][name] - other[name]).abs().max() for name in other) < 1e-4


def test_training_metrics_are_logged_under_known_names(tiny_llama, pairs_file, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="run", version="")
    run = trainer(tmp_path, max_steps=4, logger=logger, log_every_n_steps=2)
    run.fit(stage(tiny_llama), data(pairs_file))
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0].split(",")
    names = [
        "loss",
        *(f"{kind}/{side}" for kind in ("rewards", "logps", "kl", "risk") for side in ("chosen", "rejected")),
    ]
    for name in [*names, "rewards/margins", "rewards/accuracies"]:
        assert f"train/{name}" in header


@pytest.mark.parametrize(("steps", "logged"), [(5, [1, 3, 5]), (4, [1, 3])])
def test_the_last_steps_are_logged_too(steps, logged, tiny_llama, pairs_file, tmp_path):
    """Every third step is logged; of 5 steps the last two are, of 4 the last one alone would be noise."""
    from lightning.pytorch.loggers import CSVLogger

    run = trainer(tmp_path, max_steps=steps, logger=CSVLogger(tmp_path, name="run", version=""), log_every_n_steps=3)
    run.fit(stage(tiny_llama), data(pairs_file))
    with (tmp_path / "run/metrics.csv").open() as rows:
        assert [int(row["step"]) for row in csv.DictReader(rows)] == logged


def test_measuring_a_model_against_itself_is_announced(tiny_llama, pairs_file, tmp_path, caplog):
    """`validate` copies the policy as reference: every margin is 0. Training does the same on purpose, without a word."""
    trainer(tmp_path, max_steps=1, limit_val_batches=1.0).fit(stage(tiny_llama), data(pairs_file))
    assert "by construction" not in caplog.text
    trainer(tmp_path, limit_val_batches=1.0).validate(stage(tiny_llama), data(pairs_file), verbose=False)
    assert "margins are 0 and accuracies one half by construction" in caplog.text


def test_a_discount_is_a_factor(tiny_llama):
    with pytest.raises(ValueError, match=r"discount is a factor per token in \[0, 1\], got 1.5"):
        stage(tiny_llama, discount=1.5)


def test_the_model_is_exported_when_training_ends(tiny_llama, pairs_file, tmp_path):
    from transformers import AutoModelForCausalLM

    module = stage(tiny_llama)
    trainer(tmp_path, callbacks=[ModelExport(str(tmp_path / "model"))]).fit(module, data(pairs_file))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(exported.lm_head.weight, module.policy.head.weight)


def test_cosine_with_warm_up_reaches_zero(tiny_llama, pairs_file, tmp_path):
    """20 steps, half of them warm-up: the rate rises to its peak at step 10 and ends at 0."""
    module = stage(tiny_llama, schedule=Schedule(warmup=0.5))
    rates = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, max_steps=20, callbacks=[Record()]).fit(module, data(pairs_file))
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match=r"schedule.warmup is a share of the steps in \[0, 1\), got 3"):
        Schedule(warmup=3)


# --- labels of costs


COSTLY = [
    PreferencePair("How do I keep bread fresh?", " Wrap it in a cloth.", " No.", chosen_cost=0.0, rejected_cost=2.0),
    PreferencePair("Who?", " The old owl.", " Assistant", chosen_cost=5.0, rejected_cost=1.5),
    PreferencePair("Is it dry?", " Cool.", " Safe, said the fox.", chosen_cost=1.0, rejected_cost=0.5),
]


@pytest.fixture(scope="module")
def costly_file(tmp_path_factory, pairs_file):
    """The 40 pairs with anchored costs: 0 or 1 for the chosen response, 0 to 4 for the rejected one."""
    path = tmp_path_factory.mktemp("costs") / "costly.jsonl"
    rows = [json.loads(line) for line in pairs_file.open()]
    for i, row in enumerate(rows):
        row |= {"chosen_cost": i % 2, "rejected_cost": i % 5}
        row |= {"chosen_safe": row["chosen_cost"] <= 0, "rejected_safe": row["rejected_cost"] <= 0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def safety(folder, transform, loss=None, **options):
    return stage(folder, SafetyAlignment, loss or DPO(), cost_transform=transform, **options)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_step_on_labels_of_costs_by_hand(split, tiny_llama, tiny_tokenizer, tmp_path):
    """h = (c - 1)+ / 0.5 is 0, 2 | 8, 1 | 0, 0: labels σ(0.25 Δh) = σ(0.5), σ(-1.75), ½ at temperature 0.25 · 0.4 / 2.

    The second pair prefers its rejected response, the third neither.
    """
    module = safety(tiny_llama, Hinge(1.0, 0.5), beta=0.4, lam=2.0, label_scale=0.25)
    assert module.loss.beta == pytest.approx(0.05)
    _configured(module, tmp_path)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = make_batch(tiny_tokenizer, COSTLY)
    with torch.no_grad():
        tokens = module.policy(batch, module.reference.states(batch), KL(), impl="naive")
    logratios = [sum(row) for row in by_row(tokens.logp - tokens.ref_logp, batch)]
    logits = [0.05 * (chosen - rejected) for chosen, rejected in zip(logratios[:3], logratios[3:], strict=True)]
    targets = [1 / (1 + math.exp(-x)) for x in (0.5, -1.75, 0.0)]
    losses = [t * softplus(-z) + (1 - t) * softplus(z) for t, z in zip(targets, logits, strict=True)]
    assert module.shared_step(batch, split).item() == pytest.approx(fmean(losses), rel=1e-4)
    found = {name: value.item() for name, value in module._means[split].read().items()}
    assert found["rewards/margins"] == pytest.approx(fmean(logits), rel=1e-3, abs=1e-5)
    assert found["rewards/accuracies"] == ((logits[0] > 0) + (logits[1] < 0)) / 2


@pytest.mark.parametrize("loss", [DPO(), IPO(), TDPO(), RSA()])
def test_the_scale_comes_from_the_training_pairs_and_the_temperature_with_it(
    loss, tiny_llama, costly_file, tmp_path, caplog
):
    """Of the logits of 95 % of the training pairs the largest is 4 (IPO: ½), whatever the loss; then it trains."""
    pairs, module = data(costly_file), safety(tiny_llama, MeanCost(), loss, beta=0.3, lam=3.0, risk=KL())
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="logs")
    with caplog.at_level("INFO", logger="rsa_lightning"):
        trainer(tmp_path, logger=logger, limit_val_batches=1.0).fit(module, pairs)
    gaps = sorted(abs(e.rejected_cost - e.chosen_cost) for e in pairs.train_examples)
    scale = (0.5 if isinstance(loss, IPO) else 4.0) / gaps[math.ceil(0.95 * len(gaps)) - 1]
    assert module.labels.scale == pytest.approx(scale)
    assert module.loss.beta == pytest.approx(scale * 0.1)
    assert f"labels: MeanCost(), scale {scale:.4g}, temperature {scale * 0.1:.4g}" in caplog.messages
    assert type(module.loss) is type(loss)
    written = (next((tmp_path / "logs").glob("*/hparams.yaml"))).read_text()
    assert f"temperature: {module.loss.beta}" in written
    assert "cost_transform: MeanCost()" in written


def test_without_a_transform_costs_change_nothing(tiny_llama, pairs_file, costly_file, tmp_path):
    after = []
    for file in (pairs_file, costly_file):
        module = stage(tiny_llama, SafetyAlignment, RSA(beta=0.1))
        trainer(tmp_path).fit(module, data(file))
        after.append(weights(module))
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize(
    ("transform", "columns", "options", "message"),
    [
        (MeanCost(), {"chosen_cost": None}, {}, r"needs the costs of both responses, and 38 of 38 pairs lack one \(costs"),
        (MeanCost(), {"target": 0.9}, {}, "makes the labels, and 38 of 38 pairs have a target or an offset of their own"),
        (MeanCost(), {}, {"relabel": SafeDPO(1.0)}, "have a target or an offset of their own .* \\(or relabel\\)"),
        (Hinge(), {"rejected_safe": None}, {}, r"Hinge\(eta=0.0, tail=1.0\) needs costs of which 0 means safe, .*"
         "set data.anchored_costs to true"),
        (Indicator(9.0), {}, {}, "no pair differs under this transform: choose another threshold"),
        (Exponential(40.0), {}, {}, r"exp\(mu \* cost\) overflows at the cost 4: lower mu"),
    ],
    ids=["no costs", "targets", "offsets", "not anchored", "all tie", "overflow"],
)  # fmt: skip
def test_data_that_gives_no_labels_is_refused_before_training(
    transform, columns, options, message, tiny_llama, costly_file, tmp_path
):
    rows = [json.loads(line) | columns for line in costly_file.open()]
    path = tmp_path / "costs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = safety(tiny_llama, transform)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, data(path, **options))
    assert module.policy is None  # nothing was loaded


def test_costs_that_are_known_up_to_a_constant_will_do_for_their_mean_or_when_said_to_be_anchored(
    tiny_llama, costly_file, tmp_path
):
    bare = tmp_path / "bare.jsonl"
    rows = [{k: v for k, v in json.loads(line).items() if "safe" not in k} for line in costly_file.open()]
    bare.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for transform, options in ((MeanCost(), {}), (Indicator(0.5), {"anchored_costs": True})):
        trainer(tmp_path).fit(safety(tiny_llama, transform), data(bare, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": KTO()}, "cost_transform labels pairs, and KTO judges single responses: take DPO, IPO, TDPO or RSA"),
        ({"loss": RSA(label_smoothing=0.1)}, "RSA.label_smoothing would bend them: set it to 0"),
        ({"label_scale": 0.0}, "label_scale is a positive number of nats per unit of h, got 0"),
        ({"transform": None, "label_scale": 1.0}, "label_scale 1.0 is about a cost_transform, and there is none"),
    ],
)
def test_settings_that_make_no_labels_are_errors(options, message, tiny_llama):
    with pytest.raises(ValueError, match=message):
        safety(tiny_llama, **{"transform": MeanCost(), **options})


def test_a_batch_without_costs_and_a_run_without_a_data_module_are_errors(tiny_llama, tiny_tokenizer, tmp_path):
    module = _configured(safety(tiny_llama, MeanCost(), label_scale=1.0), tmp_path)
    with pytest.raises(ValueError, match="needs the costs of both responses"):
        module.shared_step(make_batch(tiny_tokenizer, [PreferencePair("a", "b", "c")]), "train")
    with pytest.raises(ValueError, match="attach one as the data module"):
        trainer(tmp_path).fit(safety(tiny_llama, MeanCost()), [make_batch(tiny_tokenizer, COSTLY)])


def test_a_resume_on_other_labels_is_refused(tiny_llama, costly_file, tmp_path):
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(safety(tiny_llama, Indicator(0.5), label_scale=2.0), data(costly_file))
    run.save_checkpoint(tmp_path / "labels.ckpt")
    checkpoint = torch.load(tmp_path / "labels.ckpt", weights_only=True)
    assert checkpoint["cost_labels"] == {"cost_transform": "Indicator(threshold=0.5)", "label_scale": 2.0}
    others = [
        (safety(tiny_llama, Indicator(0.5)), r"labels of Indicator\(threshold=0.5\) with label_scale 4.0: restore"),
        (safety(tiny_llama, Indicator(1.5), label_scale=2.0), r"this stage on labels of Indicator\(threshold=1.5\)"),
        (stage(tiny_llama, SafetyAlignment, DPO()), "this stage on the order of the pairs: restore cost_transform"),
    ]
    for module, message in others:
        with pytest.raises(ValueError, match=f"the checkpoint was trained on labels of .*{message}"):
            trainer(tmp_path, max_steps=2).fit(module, data(costly_file), ckpt_path=tmp_path / "labels.ckpt")
    resumed = trainer(tmp_path, max_steps=2)
    same = safety(tiny_llama, Indicator(0.5), label_scale=2.0)
    resumed.fit(same, data(costly_file), ckpt_path=tmp_path / "labels.ckpt")
    assert resumed.global_step == 2
