"""From a configuration to a trainer, a stage and its data: one LightningCLI, for `rsa fit` and for every step of `rsa align`."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

# imported so that configurations can name their classes without a module path
from rsa_lightning import callbacks, losses, reference, supervised  # noqa: F401
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.stages import PolicyStage

# the data module shards by rank itself; Lightning must not wrap its sampler
TRAINER_DEFAULTS: dict[str, Any] = {"use_distributed_sampler": False}


class FitCLI(LightningCLI):
    """Stage, data and trainer from YAML and command line, or from one mapping (then nothing runs).

    Raises:
        ValueError, jsonargparse.ArgumentError: a key or value that does not fit, named.
    """

    def __init__(self, args: list[str] | Mapping[str, Any] | None = None) -> None:
        self._mapping = args if isinstance(args, Mapping) else None
        super().__init__(
            PolicyStage,
            PreferenceData,
            subclass_mode_model=True,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False} if self._mapping else {"prog": "rsa"},  # type: ignore[arg-type]
            args=None if self._mapping else args,  # type: ignore[arg-type]
            run=self._mapping is None,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if self._mapping is None:
            super().parse_arguments(parser, args)
        else:
            self.config = parser.parse_object(dict(self._mapping))

    def dump(self) -> str:
        """The resolved configuration, as YAML that `rsa fit -c` takes."""
        return self.parser.dump(self.config, skip_validation=True)
