"""What all training stages share: a policy that is built, optimised, checked and measured."""

import abc
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import lightning as L
import torch
from rsa_kernels import Impl
from torch import Tensor, nn

from rsa_lightning import packing
from rsa_lightning.adapters import base_fingerprint
from rsa_lightning.data.batch import ROLES, PreferenceBatch
from rsa_lightning.metrics import WeightedMeans
from rsa_lightning.models import Policy, PolicySpec, load_policy
from rsa_lightning.optim import Schedule
from rsa_lightning.parallel.clipping import clip_by_norm
from rsa_lightning.parallel.strategy import FSDP2

log = logging.getLogger(__name__)

OptimizerCallable = Callable[[Iterable], torch.optim.Optimizer]

BASE_KEY = "base_fingerprint"  # in checkpoints that hold an adapter alone
TRAINED_AS = "trained_as"  # in checkpoints: what `PolicyStage.trained_as` said


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
            self.policy = self._load(self.policy_spec).train()
            self.policy.check_length(data.lengths.max_length if data else 0)

    def _load(self, spec: PolicySpec, *, frozen: bool = False) -> Policy:
        """A policy on one device, or sharded over those of the trainer, which attends as the data is laid out."""
        data, strategy = getattr(self.trainer, "datamodule", None), self.trainer.strategy
        tokenizer, packed = getattr(data, "tokenizer", None), getattr(data, "padding_free", False)
        if isinstance(strategy, FSDP2):
            return strategy.load(spec, tokenizer, frozen=frozen, packed=packed)
        policy = load_policy(spec, tokenizer)
        packing.attend(policy.model, packed)
        return policy

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = gradient_clip_algorithm in (None, "norm") and gradient_clip_val
        if norm and isinstance(self.trainer.strategy, FSDP2):  # torch's function refuses parameters on several meshes
            clip_by_norm(self._trainable().values(), float(gradient_clip_val or 0.0))
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

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

    @cached_property
    def _base(self) -> str:
        """Of the frozen weights, which stay; taken once, because those of a sharded policy are all gathered for it."""
        return base_fingerprint(self)

    def trained_as(self) -> dict[str, Any]:
        """What a checkpoint says of the training that it is of, beside its weights; in plain types."""
        spec = self.policy_spec
        lora = None if spec.lora is None else asdict(spec.lora) | {"start": None}
        fresh = None if spec.model else f"a fresh {(spec.config or {}).get('model_type')}, seed {spec.seed}"
        return {
            "stage": type(self).__name__,
            "starts from": fresh or spec.model,
            "frozen adapters below": list(spec.adapters),
            "lora": lora,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[TRAINED_AS] = self.trained_as()
        if self.policy_spec.lora is not None:
            state = checkpoint["state_dict"]  # gathered into one file, the first process alone has it
            checkpoint["state_dict"] = {name: state[name] for name in self._trainable() if state}
            checkpoint[BASE_KEY] = self._base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint is not of this adapter, or of another model below it."""
        if self.policy_spec.lora is None:
            return
        found = checkpoint.get("state_dict") or self._trainable()  # else the strategy has read it, and has checked it
        for name in sorted(self._trainable().keys() ^ found.keys()):
            where = "no trained parameter here" if name in found else "missing in the checkpoint"
            raise ValueError(
                f"the checkpoint is of another adapter: {name} is {where}. Resume with the policy it was trained with"
            )
        if checkpoint.get(BASE_KEY) != self._base:
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


def _under(prefix: str, values: dict[str, Tensor]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}
