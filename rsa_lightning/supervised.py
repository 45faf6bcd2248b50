"""Stages without a reference."""

from typing import final

import torch
from rsa_kernels import Impl
from torch import Tensor

from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.models import PolicySpec
from rsa_lightning.optim import Schedule
from rsa_lightning.policy_stage import OptimizerCallable, PolicyStage


@final
class SupervisedWarmup(PolicyStage):
    """Supervised fine-tuning on the chosen responses: minimises -log policy(response | prompt), in nats per response.

    The loss is a sum over tokens and a mean over responses, so that gradient accumulation and several ranks give the
    same step as one large batch; `nll` is logged in nats per token.

    Args:
        policy: where the policy starts.
        optimizer: built on the trainable parameters.
        schedule: of the learning rate; null keeps it constant.
        impl: implementation of the token-risk op; anything but auto is binding.
    """

    def __init__(
        self,
        policy: PolicySpec,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(policy, optimizer, schedule, impl)

    def shared_step(self, batch: PreferenceBatch, split: str) -> Tensor:
        assert self.policy is not None
        nll = -self.policy(batch, None, None, impl=self.impl).logp
        responses = len(batch["cu_seqlens"]) - 1
        loss = nll.sum() / responses
        self._means[split].update({"loss": loss.detach()}, responses)
        self._means[split].update({"nll": nll.detach()})
        return loss
