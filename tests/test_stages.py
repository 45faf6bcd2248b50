"""The stages: what they refuse, what they log, and that a step is the same step however the batch is cut."""

import json
import math

import lightning as L
import pytest
import torch
from rsa_kernels import KL, CVaR

from rsa_lightning.callbacks import ModelExport
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.losses import DPO, KTO, RSA, TDPO
from rsa_lightning.models import PolicySpec
from rsa_lightning.optim import Schedule
from rsa_lightning.reference import FrozenCopy
from rsa_lightning.stages import RewardAlignment, SafetyAlignment
from rsa_lightning.supervised import SupervisedWarmup

WORDS = "fox owl river bread cloth place answer human cool dry old safe sleep cross".split()


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


@pytest.mark.parametrize("loss", [RSA(beta=0.5), DPO(beta=0.5), TDPO(beta=0.5)])
def test_micro_batches_make_the_same_step_as_one_batch(loss, tiny_llama, pairs_file, tmp_path):
    """8 x 1 and 1 x 8 accumulated: the same pairs, the same gradient, the same weights to rounding."""
    after = []
    for size, accumulate in ((8, 1), (1, 8)):
        module = stage(tiny_llama, loss=loss, risk=KL())
        run = trainer(tmp_path, accumulate_grad_batches=accumulate, max_steps=2)
        run.fit(module, data(pairs_file, batch_size=size))
        after.append(weights(module))
    start = weights(_configured(stage(tiny_llama, loss=loss, risk=KL()), tmp_path))
    moved = max((after[0][name] - start[name]).abs().max() for name in start)
    apart = max((after[0][name] - after[1][name]).abs().max() for name in start)
    assert moved > 1e-3
    assert apart < 1e-5 * moved + 1e-6


def _configured(module, tmp_path):
    module.trainer = trainer(tmp_path)
    module.configure_model()
    return module


def test_policy_and_reference_must_agree_before_the_first_update(tiny_llama, pairs_file, tmp_path, tiny_tokenizer):
    other = _configured(stage(tiny_llama), tmp_path)
    with torch.no_grad():
        other.policy.head.weight.mul_(1.1)
    from rsa_lightning.models import save_policy

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


def test_a_binding_implementation_that_cannot_run_is_an_error(tiny_llama, pairs_file, tmp_path):
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here"):
        trainer(tmp_path).fit(stage(tiny_llama, impl="triton"), data(pairs_file))


def test_every_implementation_trains_the_same_curve(tiny_llama, pairs_file, tmp_path):
    after = []
    for impl in ("naive", "chunked"):
        module = stage(tiny_llama, loss=RSA(beta=0.5), risk=CVaR(0.3), impl=impl)
        trainer(tmp_path, max_steps=5).fit(module, data(pairs_file))
        after.append(weights(module))
    apart = max((after[0][name] - after[1][name]).abs().max() for name in after[0])
    assert apart < 1e-4


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
    module.on_train_batch_start_ = None

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, max_steps=20, callbacks=[Record()]).fit(module, data(pairs_file))
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match=r"schedule.warmup is a share of the steps in \[0, 1\), got 3"):
        Schedule(warmup=3)
