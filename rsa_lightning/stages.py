"""Training stages: thin LightningModules that bring batch, policy, reference and loss together."""

import abc
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, cast, final

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rsa_kernels import CVaR, Impl, RiskMeasure, Strategy, TokenStats, nested_risk
from torch import Tensor

from rsa_lightning.cost_labels import KEY as LABELS_KEY
from rsa_lightning.cost_labels import CostLabels, check_state
from rsa_lightning.data.batch import ROLES, PreferenceBatch
from rsa_lightning.losses import RSA, PreferenceLoss, SequenceStats
from rsa_lightning.metrics import per_row, preference_metrics
from rsa_lightning.models import PolicySpec, ReferenceStates
from rsa_lightning.optim import Schedule
from rsa_lightning.policy_stage import OptimizerCallable, PolicyStage
from rsa_lightning.reference import (
    Reference,
    check_continued,
    check_start,
    own_states,
    start_gap,
    start_of,
    working_dtype,
)
from rsa_lightning.scoring import scoring_of
from rsa_lightning.temperatures import Parametrization, resolve_temperature
from rsa_lightning.transforms import CostTransform

log = logging.getLogger(__name__)


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
        name = type(loss).__name__
        self.reference.check_loss(name, reads_risk=loss.reads_risk, mismatched=loss.needs_baseline)
        self._agreement_checked = False

    def trained_as(self) -> dict[str, Any]:
        own = {"loss": repr(self.loss), "risk": repr(self.risk), "discount": self.discount}
        return {**super().trained_as(), **own, "temperature": self.loss.beta}

    def configure_model(self) -> None:
        super().configure_model()
        assert self.policy is not None
        self.reference.prepare(self.policy, partial(self._load, frozen=True))

    def on_fit_start(self) -> None:
        assert self.policy is not None
        self.reference.place(self.policy)
        with self._precision():
            self.reference.fill(self.policy, partial(scoring_of, self.trainer, self.policy_spec, self.policy))

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

    def _precision(self) -> AbstractContextManager[None]:
        """That in which the trainer calls the steps."""
        return self.trainer.precision_plugin.forward_context()

    def check_agreement(self, batch: PreferenceBatch) -> None:
        """Stops a stage whose policy is not its reference: it would spend its first steps on the difference.

        Raises:
            ValueError: with the largest difference and the likely cause.
        """
        assert self.policy is not None
        # two live models are compared as exactly as their weights allow
        with nullcontext() if self.reference.live else self._precision():
            gap, dtype = start_gap(self.policy, batch, self.reference, impl=self.impl), working_dtype(self.policy)
        gap = cast(Tensor, self.all_gather(gap)).max()  # all processes stop, or none
        check_start(gap.item(), dtype, self.policy_spec, self.reference)

    def sequence_stats(
        self, batch: PreferenceBatch, risk: RiskMeasure | None
    ) -> tuple[TokenStats, SequenceStats, SequenceStats]:
        """Per-token statistics of the batch, and those of chosen and rejected responses."""
        assert self.policy is not None
        options = {"risk_over_logp": self._risk_over_logp(batch), "strategy": self.strategy, "impl": self.impl}
        tokens = self.policy(batch, self._reference_states(batch), risk, **options)
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

    def _reference_states(self, batch: PreferenceBatch) -> ReferenceStates:
        """Before the first update those of the policy itself, where a reference is not live and its risk is trained on.

        There every outcome has the log-ratio 0, and CVaR has a kink: the rounding of another batch would decide which
        outcomes are the worst, and an unmoved policy would get a gradient that a live reference does not give it.
        """
        assert self.policy is not None
        if self.reference.live or not self.loss.reads_risk or not self.trainer.training or self.global_step > 0:
            return self.reference.states(batch)
        return own_states(self.policy, batch)

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
        unread = split == "train" and not self.loss.reads_risk
        risk = None if unread or not self.reference.knows_distribution else self.risk
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

    def on_train_start(self) -> None:
        super().on_train_start()
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
