"""Training stages: thin LightningModules that bring batch, policy, reference and loss together."""

import abc
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, cast, final

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rsa_kernels import CVaR, Impl, RiskMeasure, Strategy, TokenStats, nested_risk
from torch import Tensor, nn

from rsa_lightning import packing
from rsa_lightning.adapters import base_fingerprint
from rsa_lightning.cost_labels import KEY as LABELS_KEY
from rsa_lightning.cost_labels import CostLabels, check_state
from rsa_lightning.data.batch import ROLES, PreferenceBatch
from rsa_lightning.losses import RSA, PreferenceLoss, SequenceStats
from rsa_lightning.metrics import WeightedMeans, per_row, preference_metrics
from rsa_lightning.models import Policy, PolicySpec, load_policy
from rsa_lightning.optim import Schedule
from rsa_lightning.reference import Reference, check_continued, check_start, start_of
from rsa_lightning.temperatures import Parametrization, resolve_temperature
from rsa_lightning.transforms import CostTransform

log = logging.getLogger(__name__)

OptimizerCallable = Callable[[Iterable], torch.optim.Optimizer]

BASE_KEY = "base_fingerprint"  # in checkpoints that hold an adapter alone


class PolicyStage(L.LightningModule, abc.ABC):
    """A policy in training: builds it, optimises it, stops on a loss that is not finite, and logs weighted means.

    With an adapter, checkpoints hold what is trained and a fingerprint of what is not.
    """

    roles: tuple[str, ...] = ROLES[:1]  # the rows this stage needs in a batch; the data module asks for it
    needs_pairs: bool = False  # whether every example must have all of them

    def __init__(self, policy: PolicySpec, optimizer: OptimizerCallable, schedule: Schedule | None, impl: Impl) -> None:
        super().__init__()
        self.policy_spec, self.optimizer, self.schedule, self.impl = policy, optimizer, schedule, impl
        self.policy: Policy | None = None
        self.strict_loading = policy.lora is None  # else on_load_checkpoint checks
        self._logged_step = 0
        self._gradients_checked = False
        self._means = {"train": WeightedMeans(), "val": WeightedMeans(), "test": WeightedMeans()}

    def check_precision(self, precision: str) -> None:
        """Raises ValueError where the trainer would cast an adapter, which is trained in float32."""
        if self.policy_spec.lora is not None and precision.endswith("-true") and precision != "32-true":
            raise ValueError(
                f"adapters are trained in float32, and trainer.precision {precision} would cast them: set it to "
                "32-true or bf16-mixed, and dtype of the model to hold the frozen weights in low precision"
            )

    def configure_model(self) -> None:
        if self.policy is None:
            data = getattr(self.trainer, "datamodule", None)
            self.policy = load_policy(self.policy_spec, getattr(data, "tokenizer", None)).train()
            self.policy.check_length(data.lengths.max_length if data else 0)
            packing.attend(self.policy.model, packed=getattr(data, "padding_free", False))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(list(self._trainable().values()))
        if self.schedule is None:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        # that opened the training batches before a checkpoint's progress is restored: they must be opened again, or a
        # resumed run would begin its epoch anew
        self.trainer.fit_loop._combined_loader = None
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule.build(optimizer, total), "interval": "step"},
        }

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained. Raises ValueError where there are none, or an adapter lost its precision."""
        found = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if not found:
            raise ValueError("no parameter of the policy is trainable: nothing would be learnt")
        dtypes = {parameter.dtype for parameter in found.values()}
        if self.policy_spec.lora is not None and dtypes != {torch.float32}:
            raise ValueError(
                "adapters are trained in float32, and trainer.precision has cast them to "
                f"{', '.join(map(str, dtypes))}: set policy.dtype to hold the frozen weights in low precision, and "
                "trainer.precision to 32-true or bf16-mixed"
            )
        return found

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._gradients_checked:
            return
        self._gradients_checked = True
        idle = [name for name, parameter in self._trainable().items() if parameter.grad is None]
        if idle:
            log.warning(
                "%d trainable parameters got no gradient in the first step, so they stay as they are: %s",
                len(idle),
                ", ".join(idle[:5]) + (", ..." if idle[5:] else ""),
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy_spec.lora is not None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in self._trainable()}
            checkpoint[BASE_KEY] = base_fingerprint(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint is not of this adapter, or of another model below it."""
        if self.policy_spec.lora is None:
            return
        for name in sorted(self._trainable().keys() ^ checkpoint["state_dict"].keys()):
            where = "no trained parameter here" if name in checkpoint["state_dict"] else "missing in the checkpoint"
            raise ValueError(
                f"the checkpoint is of another adapter: {name} is {where}. Resume with the policy it was trained with"
            )
        if checkpoint.get(BASE_KEY) != base_fingerprint(self):
            raise ValueError(
                "the checkpoint holds an adapter of another model: the frozen weights differ from those it was trained "
                "on. Resume with the same policy.model, policy.adapters, policy.dtype and policy.quantize"
            )

    def read_data(self, data: Any) -> None:
        """What a stage has to know of its data, a `PreferenceData`, before it trains. Raises ValueError."""

    @abc.abstractmethod
    def shared_step(self, batch: PreferenceBatch, split: str) -> Tensor:
        """The mean loss of a batch; updates the running means of `split`."""

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        loss = self.shared_step(batch, "train")
        if not torch.isfinite(loss):  # before backward, so that the optimizer never sees it
            raise FloatingPointError(
                f"the loss is {loss.item()} in batch {batch_idx} of epoch {self.current_epoch} "
                f"(rows {', '.join(batch['row_ids'])}); the weights were not updated. "
                "Lower the learning rate, or look at these rows"
            )
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    @property
    def log_every(self) -> int:
        return self.trainer.log_every_n_steps  # type: ignore[attr-defined]

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        step = self.global_step  # unchanged by the micro-batches that only accumulate
        if step != self._logged_step and (step == 1 or step % self.log_every == 0):
            self._log_training(step)

    def on_train_end(self) -> None:
        # the last steps, when log_every_n_steps does not divide their number; a few alone would be a noisy last point
        if 2 * (self.global_step - self._logged_step) >= self.log_every:
            self._log_training(self.global_step)

    def _log_training(self, step: int) -> None:
        self._logged_step = step
        means = _under("train", self._means["train"].read())
        for logger in self.loggers:
            logger.log_metrics(means | {"epoch": self.current_epoch}, step)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self.shared_step(batch, "val")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self.shared_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, split: str) -> None:
        with warnings.catch_warnings():
            # the means are already reduced over ranks, which is what this warning asks for
            warnings.filterwarnings("ignore", message=".*sync_dist.*")
            self.log_dict(_under(split, self._means[split].read()))


class AlignmentStage(PolicyStage, abc.ABC):
    """Preference alignment of a policy towards pairs, near a frozen reference.

    The temperature is `loss.beta` when given; otherwise it is derived from `beta` and `lam` of the whole problem.

    Args:
        policy: where the policy starts.
        loss: the preference loss.
        risk: one-step risk measure of the log-ratio; trained on where the loss reads it, measured in validation always.
        reference: the frozen model; by default the policy as it starts: with its new adapter off where `policy.lora`
            is set, otherwise a copy.
        beta: temperature of the whole problem (default 0.1).
        lam: multiplier of the cost (default 1).
        parametrization: how stage temperatures follow from beta and lam.
        discount: of the nested risk, per token.
        optimizer: built on the trainable parameters.
        schedule: of the learning rate; null keeps it constant.
        impl: implementation of the token-risk op; anything but auto is binding.
        strategy: what that op keeps between forward and backward; auto fits a budget, see `linear_token_risk`.

    Raises:
        ValueError: the temperature is given twice or not positive, the loss is not defined for the risk measure, the
            discount is not in [0, 1], or the reference is not the model that the policy starts as.
    """

    stage: ClassVar[Literal["reward", "safety"]]
    reference: Reference
    labels: CostLabels | None = None  # in place of the order of the pairs

    def __init__(
        self,
        policy: PolicySpec,
        loss: PreferenceLoss = RSA(),  # noqa: B008 (frozen)
        risk: RiskMeasure = CVaR(),  # noqa: B008 (frozen)
        reference: Reference | None = None,
        beta: float | None = None,
        lam: float | None = None,
        parametrization: Parametrization = "total",
        discount: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
        impl: Impl = "auto",
        strategy: Strategy = "auto",
    ) -> None:
        super().__init__(policy, optimizer, schedule, impl)
        if not 0 <= discount <= 1:
            raise ValueError(f"discount is a factor per token in [0, 1], got {discount}")
        loss.check_risk(risk)
        temperature = resolve_temperature(self.stage, loss.beta, beta, lam, parametrization)
        self.loss = loss.with_beta(temperature)
        self.risk, self.discount, self.strategy = risk, discount, strategy
        self.roles = ROLES if loss.needs_baseline else ROLES[:2]
        self.needs_pairs = loss.needs_pairs
        # not a submodule: not trained, not in the checkpoint
        self.__dict__["reference"] = reference or start_of(policy)
        check_continued(self.reference, policy)
        self._agreement_checked = False

    def configure_model(self) -> None:
        super().configure_model()
        assert self.policy is not None
        self.reference.prepare(self.policy)

    def on_fit_start(self) -> None:
        assert self.policy is not None
        self.reference.place(self.policy)

    def on_validation_start(self) -> None:
        self.on_fit_start()
        spec = self.policy_spec
        bare = not spec.adapters and (spec.lora is None or spec.lora.start is None)
        same = getattr(self.reference, "model", None) in (None, spec.model if bare else None)
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if same and not fitting and self.trainer.ckpt_path is None:
            log.warning(
                "policy and reference are the same model, so margins are 0 and accuracies one half by construction: "
                "give the model that the stage started from (--model.reference FrozenCopy "
                "--model.reference.model FOLDER), or a --ckpt_path"
            )

    on_test_start = on_validation_start

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        if self.global_step == 0 and not self._agreement_checked:
            self.check_agreement(batch)
            self._agreement_checked = True

    @torch.no_grad()
    def check_agreement(self, batch: PreferenceBatch) -> None:
        """Stops a stage whose policy is not its reference: it would spend its first steps on the difference.

        Raises:
            ValueError: with the largest difference and the likely cause.
        """
        assert self.policy is not None
        self.policy.eval()
        tokens = self.policy(batch, self.reference.states(batch), None, impl=self.impl)
        self.policy.train()
        gap = tokens.logratio.abs().max().item() if tokens.logp.numel() else 0.0
        check_start(gap, self.policy.head.weight.dtype, self.policy_spec, self.reference)

    def sequence_stats(
        self, batch: PreferenceBatch, risk: RiskMeasure | None
    ) -> tuple[TokenStats, SequenceStats, SequenceStats]:
        """Per-token statistics of the batch, and those of chosen and rejected responses."""
        assert self.policy is not None
        options = {"risk_over_logp": self._risk_over_logp(batch), "strategy": self.strategy, "impl": self.impl}
        tokens = self.policy(batch, self.reference.states(batch), risk, **options)
        logratio = per_row(tokens.logratio, batch)
        total = (
            None if tokens.risk is None else nested_risk(tokens.risk, batch["cu_seqlens"], discount=self.discount).total
        )
        baseline = None
        if self.loss.needs_baseline:
            mismatched = logratio[batch["roles"] == ROLES.index("mismatched")].detach()
            # sums over ranks, which may hold unequal numbers of pairs in validation; before the loss clamps the mean
            parts = torch.stack([mismatched.sum(), mismatched.new_tensor(float(len(mismatched)))])
            total_ratio, count = cast(Tensor, self.all_gather(parts)).reshape(-1, 2).sum(0)
            baseline = total_ratio / count.clamp(min=1)

        def side(role: int) -> SequenceStats:
            rows = batch["roles"] == role
            return SequenceStats(logratio[rows], None if total is None else total[rows], baseline)

        return tokens, side(0), side(1)

    def _risk_over_logp(self, batch: PreferenceBatch) -> Tensor | None:
        """The ratio of the loss's gradients at every token, where it is known: a frozen head then costs less."""
        if not self.loss.reads_risk or self.loss.risk_over_logratio is None:
            return None
        bounds = batch["cu_seqlens"]
        lengths = bounds.diff()
        by_role = torch.tensor([*self.loss.risk_over_logratio, 0.0], device=bounds.device)  # nothing reaches the third
        position = torch.arange(len(batch["labels"]), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
        return by_role[batch["roles"]].repeat_interleave(lengths) * self.discount**position

    def shared_step(self, batch: PreferenceBatch, split: str) -> Tensor:
        # a loss that reads no risk trains without it (two label log-probs per token), and is still measured on it
        risk = None if split == "train" and not self.loss.reads_risk else self.risk
        tokens, chosen, rejected = self.sequence_stats(batch, risk)
        target = batch["target"] if self.labels is None else self.labels.targets(batch)
        terms = self.loss(chosen, rejected, target=target, offset=batch["offset"])
        self._means[split].update(preference_metrics(batch, tokens, chosen, rejected, terms, target))
        return terms.losses.mean()


@final
class RewardAlignment(AlignmentStage):
    """Towards the more helpful response, near the model it starts from, at temperature beta. RSA's first step."""

    stage = "reward"


@final
class SafetyAlignment(AlignmentStage):
    """Towards the safer response, near the model it starts from, at temperature beta / lam. RSA's second step.

    With a cost transform h it learns from the costs c of both responses instead of their order: the label of a pair is
    sigmoid(s (h(c_l) - h(c_w))), and the temperature s beta / lam. The optimum is pi_ref exp(-(lam / beta) h) / Z for
    every s (with token-level risk that of the loss, also for every s; of IPO's labels see `target_at`). Implicit
    rewards are at that temperature, `chosen` may be the response of higher h, margins stay chosen minus rejected, and
    accuracies count the pairs whose response of lower h has the larger reward, without those that tie in h.

    Args:
        cost_transform: h; null learns the order of the pairs. Tails need costs of which 0 means safe.
        label_scale: s; by default the labels of 95 % of the training pairs have a logit of at most 4 (IPO: 0.5).
    """

    stage = "safety"

    def __init__(
        self,
        policy: PolicySpec,
        *,
        cost_transform: CostTransform | None = None,
        label_scale: float | None = None,
        **options: Any,
    ) -> None:
        if cost_transform is None and label_scale is not None:
            raise ValueError(f"label_scale {label_scale} is about a cost_transform, and there is none: set one")
        super().__init__(policy, **options)
        if cost_transform is not None:
            self.labels = self._asked = CostLabels(cost_transform, self.loss, label_scale)
            self.loss = self.labels.loss

    def read_data(self, data: Any) -> None:
        """Finds the label scale, and with it the temperature. Raises ValueError as `CostLabels.fitted`."""
        if self.labels is not None:
            self.labels = self._asked.fitted(data)
            self.loss = self.labels.loss

    def setup(self, stage: str) -> None:
        self.read_data(getattr(self.trainer, "datamodule", None))
        if self.labels is not None:
            rank_zero_only(log.info)("labels: %s, temperature %.4g", self.labels, self.loss.temperature)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.labels is not None:
            for logger in self.loggers:
                logger.log_hyperparams({**self.labels.state(), "temperature": self.loss.temperature})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.labels is not None:
            checkpoint[LABELS_KEY] = self.labels.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint is of other labels, or as every stage."""
        super().on_load_checkpoint(checkpoint)
        check_state(self.labels, checkpoint.get(LABELS_KEY))


def _under(prefix: str, values: dict[str, Tensor]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
