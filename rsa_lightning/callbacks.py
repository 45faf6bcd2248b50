"""Lightning callbacks of the stages."""

from pathlib import Path

import lightning as L

from rsa_lightning.models import save_policy
from rsa_lightning.stages import PolicyStage


class ModelExport(L.Callback):
    """Writes the trained policy and its tokenizer as a Hugging Face folder when training ends.

    Args:
        folder: where; by default `model` in the logger's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PolicyStage)
        assert pl_module.policy is not None
        folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "model"
        if trainer.is_global_zero:
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            save_policy(pl_module.policy, trainer.datamodule.tokenizer, folder)  # type: ignore[attr-defined]
