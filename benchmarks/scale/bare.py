"""A stage without a trainer, where its batches are given: what a stage does between two batches of its loader."""

import torch
from lightning.fabric.utilities import move_data_to_device
from rsa_kernels import CVaR
from torch import Tensor, nn

from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.losses import RSA
from rsa_lightning.models import PolicySpec, load_policy
from rsa_lightning.packing import attend
from rsa_lightning.reference import FrozenCopy
from rsa_lightning.stages import RewardAlignment


class BareStage:
    """RSA near a copy of the policy as it starts, on a device, with AdamW and clipping."""

    def __init__(self, spec: PolicySpec, device: torch.device, packed: bool = False) -> None:
        self.device = device
        reference = FrozenCopy()
        self.stage = RewardAlignment(spec, RSA(), CVaR(0.97), reference=reference, beta=0.1)
        self.policy = load_policy(spec).train().to(device)
        self.stage.policy = self.policy
        attend(self.policy.model, packed)
        reference.prepare(self.policy)
        reference.place(self.policy)
        self.optimizer = torch.optim.AdamW(self.stage.parameters(), lr=1e-4, foreach=True)

    def loss(self, batch: PreferenceBatch) -> Tensor:
        return self.stage.shared_step(batch, "train")

    def step(self, batch: PreferenceBatch) -> Tensor:
        """One optimizer step, to its end; its loss."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.stage.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        return loss.detach()

    def there(self, batch: PreferenceBatch) -> PreferenceBatch:
        return move_data_to_device(batch, self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
