"""Lightning callbacks of the stages."""

import logging
from pathlib import Path

import lightning as L

from rsa_lightning.adapters import CONFIG
from rsa_lightning.checkpoint import check_replaceable
from rsa_lightning.models import PolicySpec
from rsa_lightning.parallel.sharding import is_sharded
from rsa_lightning.policy_stage import PolicyStage
from rsa_lightning.saving import save_adapter, save_policy, whole

log = logging.getLogger(__name__)


class ModelExport(L.Callback):
    """Writes the trained policy and its tokenizer as a Hugging Face folder when training ends.

    A policy with an adapter becomes the merged model, in float32, and the adapter alone goes to the folder `adapter`
    beside it, in peft's format. With frozen adapters below it that one is relative to the model with those merged,
    which it names as its base where that stands beside the last of them; the next step lists it in `policy.adapters`.

    Args:
        folder: where; by default `model` in the logger's folder.
        merge: write the merged model. Off, there is the adapter alone.
    """

    def __init__(self, folder: str | None = None, merge: bool = True) -> None:
        self.folder, self.merge = folder, merge
        if folder is not None and Path(folder).name == "adapter":
            raise ValueError(f"ModelExport writes adapters to the folder adapter beside the model: rename {folder}")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What would fail after the training fails before it."""
        assert isinstance(pl_module, PolicyStage)
        folder, adapted = self._folder(trainer), pl_module.policy_spec.lora is not None
        if not self.merge and not adapted:
            raise ValueError("merge: false exports an adapter alone, and there is none: set policy.lora, or drop merge")
        if self.merge:
            check_replaceable(folder)
        if adapted:
            check_replaceable(folder.with_name("adapter"), CONFIG, "adapter")
        logs = Path(trainer.log_dir).resolve() if trainer.log_dir else None
        if (
            folder.exists()
            and (folder.parent / "config.yaml").is_file()
            and logs not in (None, folder.parent.resolve())
        ):
            raise ValueError(
                f"{folder} is the model of the run whose config.yaml stands beside it, and this one has its logs in "
                f"{logs}: give the folder of ModelExport (and the dirpath of ModelCheckpoint) a new place, too"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PolicyStage)
        assert pl_module.policy is not None
        folder, tokenizer = self._folder(trainer), trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        policy = pl_module.policy
        if is_sharded(policy):
            policy = whole(policy, tokenizer)  # by all processes
        if trainer.is_global_zero:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if self.merge:
                save_policy(policy, tokenizer, folder)
            if policy.adapted:
                save_adapter(policy, folder.with_name("adapter"), base_of(pl_module.policy_spec))
            log.info("model: %s", folder if self.merge else folder.with_name("adapter"))

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "model")


def base_of(spec: PolicySpec) -> str | None:
    """The model that the adapter to train lies on: that of the policy, with its frozen adapters merged."""
    if not spec.adapters:
        return spec.model
    below = Path(spec.adapters[-1]).with_name("model")  # where this callback puts it
    return str(below) if below.is_dir() else spec.model
