"""From a configuration to trainer, stage and data: one LightningCLI for `rsa fit` and each step of `rsa align`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# imported so that configurations can name their classes without a module path
from rsa_lightning import (  # noqa: F401
    callbacks,
    hidden_cache,
    legacy,
    losses,
    reference,
    stages,
    supervised,
    transforms,
)
from rsa_lightning.config import load_file, parse
from rsa_lightning.data.datamodule import PreferenceData, tokenizer_of
from rsa_lightning.models import check_spec
from rsa_lightning.parallel import strategy
from rsa_lightning.parallel.launch import by_slurm, launched
from rsa_lightning.parallel.shards import is_sharded
from rsa_lightning.policy_stage import PolicyStage

CHECKPOINT_NAMES = ("last", "best", "hpc")  # what Lightning finds by itself
TRAINER_DEFAULTS: dict[str, Any] = {
    # the data module shards by rank itself; Lightning must not wrap its sampler
    "use_distributed_sampler": False,
    # weights that FSDP2 gathers for the first time in inference mode could not be trained with afterwards
    "inference_mode": False,
}


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml beside the logs, once; without a logger there is no such place.

    Raises:
        ValueError: an earlier run with other settings left its config.yaml there.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.logger is None:
            return
        earlier = Path(trainer.log_dir or ".") / self.config_filename
        if not earlier.is_file():
            super().setup(trainer, pl_module, stage)
            return
        then, now = load_file(earlier), parse(self.parser.dump(self.config, skip_validation=True), "this run")
        differing = [key for key in ("seed_everything", "model", "data", "trainer") if then.get(key) != now.get(key)]
        if differing:
            raise ValueError(
                f"{earlier} is of a run with other settings ({', '.join(differing)}): choose another place with "
                "trainer.logger.init_args.save_dir, name or version, and for its model and checkpoints where callbacks "
                "name theirs"
            )


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
            save_config_callback=SaveConfig if self._mapping is None else None,  # a run directory has its own
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs=_parser_options(["fit", "validate", "test"]) if self._mapping is None else _parser_options(),
            args=None if self._mapping else args,  # type: ignore[arg-type]
            run=self._mapping is None,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # not super(): it warns whenever arguments are handed in and sys.argv has some too
        self.config = parser.parse_args(args) if self._mapping is None else parser.parse_object(dict(self._mapping))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        local, nodes = launched()
        asked = self._get(self.config_init, "trainer")
        strategy.check_strategy(asked.get("strategy"))  # before the Trainer, which needs a GPU for some
        # what torchrun or SLURM has started is what is meant; on a CPU Lightning's `auto` is one process
        kwargs |= {"devices": local} if asked.get("devices") == "auto" and local * nodes > 1 else {}
        kwargs |= {"num_nodes": nodes} if asked.get("num_nodes") == 1 and nodes > 1 else {}
        if by_slurm() and asked.get("plugins") is None:
            # Lightning's would save in the middle of whatever a process is doing, at one place for all runs of a folder
            kwargs |= {"plugins": [SLURMEnvironment(auto_requeue=False)]}
        trainer = super().instantiate_trainer(**kwargs)
        used = trainer.num_devices * trainer.num_nodes
        if used != local * nodes and local * nodes > 1:  # each of them would train alone, without a word
            raise ValueError(
                f"{local * nodes} processes were started, the trainer uses {used}: leave trainer.devices "
                "out, or set it to the processes of a node and trainer.num_nodes to the number of nodes"
            )
        return trainer

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:  # of arguments of the trainer; its own words name them
            raise ValueError(f"trainer: {error}") from error
        self.model.check_precision(self.trainer.precision)

    def before_fit(self) -> None:
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if checkpoint not in (None, *CHECKPOINT_NAMES) and not Path(checkpoint).exists():
            raise FileNotFoundError(f"ckpt_path: there is no checkpoint {checkpoint}")
        sharded = checkpoint not in (None, *CHECKPOINT_NAMES) and is_sharded(checkpoint)
        if sharded and not isinstance(self.trainer.strategy, strategy.FSDP2):
            raise ValueError(
                f"ckpt_path: {checkpoint} is a folder of shards, which FSDP2 alone reads: add --trainer.strategy fsdp2 "
                "(one process will do), or make a model of it with rsa export and start from that"
            )
        # before the processes of a run are joined: none of them may wait in a collective while another tokenises
        check_spec(self.model.policy_spec)
        self.datamodule.prepare(tokenizer_of(self.model))
        self.model.read_data(self.datamodule)

    before_validate = before_test = before_fit

    def dump(self) -> str:
        """The resolved configuration, as YAML that `rsa fit -c` takes."""
        return self.parser.dump(self.config, skip_validation=True)


def _parser_options(subcommands: list[str] | None = None) -> dict[str, Any]:
    """Parsers that raise instead of printing their usage and ending the process."""
    options = {"exit_on_error": False}
    return {**options, "prog": "rsa", **dict.fromkeys(subcommands, options)} if subcommands else dict(options)
