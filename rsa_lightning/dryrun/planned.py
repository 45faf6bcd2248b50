"""The steps of a run as they would be trained on many GPUs, planned on this machine: of models config.json is read."""

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoConfig

from rsa_lightning.architecture import UNREADABLE, fresh_config
from rsa_lightning.data.tokenize import load_tokenizer
from rsa_lightning.dryrun.fake_step import Footprint, Work
from rsa_lightning.dryrun.footprint import footprint
from rsa_lightning.fit import FitCLI
from rsa_lightning.hub import is_hub_name
from rsa_lightning.lineage import Lineage
from rsa_lightning.models import PolicySpec
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.parsing import first_line, plain_message
from rsa_lightning.plan import BASE, AlignConfig, StepConfig
from rsa_lightning.policy_stage import PolicyStage
from rsa_lightning.steps import fit_config

# arguments of the Trainer that are about machines or folders
ELSEWHERE = ("accelerator", "devices", "num_nodes", "logger", "callbacks", "profiler", "plugins", "enable_progress_bar")
ATTENDING = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # what says how large a model is
VOCABULARY = 2048  # of a tokenizer that a run trains, unless data.options.tokenizer_vocab_size says otherwise
# matrix products of the head, forward and backward, by strategy: without a reference, without a risk, with one
PRODUCTS = {"cache": (3, 4, 4), "recompute": (4, 5, 6), "frozen": (2, 3, 4)}


@dataclass(frozen=True)
class Planned:
    """A step of a run as it would be trained, and its footprint."""

    name: str
    stage: PolicyStage
    spec: PolicySpec  # a configuration, whatever folder the weights come from
    trainer: Any
    work: Work
    world_size: int
    found: Footprint

    @property
    def sharded(self) -> FSDP2 | None:
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, FSDP2) else None

    @property
    def pairs(self) -> int:
        """Of an optimizer step, over all processes."""
        return self.work.pairs * self.world_size * self.work.accumulate

    @property
    def rows(self) -> int:
        """Of a micro-batch of one process."""
        return self.work.pairs * len(self.stage.roles)

    @property
    def compute_bytes(self) -> int:
        """Of a gathered weight."""
        plugin = self.trainer.precision_plugin
        return 2 if isinstance(plugin, MixedPrecision | HalfPrecision) or self.spec.dtype != "float32" else 4

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient that is reduced."""
        return 4 if isinstance(self.trainer.precision_plugin, MixedPrecision) else self.compute_bytes

    @property
    def architecture(self) -> Any:
        return AutoConfig.for_model(**(self.spec.config or {}))


class Planner:
    """Builds every step's stage and trainer for this machine, and finds the footprint of each shape once."""

    def __init__(self, config: AlignConfig, world_size: int) -> None:
        self.config, self.world_size, self.lineage = config, world_size, Lineage(config)
        self.notes: list[str] = []
        self._known: dict[str, Footprint] = {}

    def plan(self, name: str, step: StepConfig) -> Planned:
        try:
            cli = self._build(name, step)
            return self._measure(name, cli)
        except (ValueError, ArgumentError, MisconfigurationException) as error:
            raise ValueError(f"steps.{name}: {plain_message(error)}") from error

    def _build(self, name: str, step: StepConfig) -> FitCLI:
        own = {key: value for key, value in step.data.items() if key != "source"} if isinstance(step.data, dict) else {}
        values = fit_config(
            step,
            self.config,
            policy=self.lineage.policy(name),
            reference=self.lineage.reference_class(name),
            data={"path": "-", **self.config.data.options, **own},
            folder=Path(self.config.output) / name,
            progress_bar=False,
        )
        self._check_layout(name, values["trainer"])
        here = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        given = {key: value for key, value in values["trainer"].items() if key not in ELSEWHERE}
        return FitCLI({**values, "trainer": {**given, **here, "enable_progress_bar": False}})

    def _check_layout(self, name: str, trainer: Mapping[str, Any]) -> None:
        """Whether training on this many processes would take `trainer.devices` and `num_nodes`.

        Raises:
            ValueError: on no number of nodes it would. A number of nodes that is another is a note: N may be a try.
        """
        each, nodes = _devices(trainer.get("devices")), int(trainer.get("num_nodes") or 1)
        mend = "leave trainer.devices and num_nodes out: torchrun or SLURM says them"
        if self.world_size % (each or 1):
            raise ValueError(
                f"trainer.devices {each} does not divide the {self.world_size} processes of --world-size: {mend}"
            )
        if nodes > 1 and self.world_size != nodes * (each or self.world_size // nodes):
            asked = f"{each} x trainer.num_nodes {nodes}" if each else f"auto x trainer.num_nodes {nodes}"
            self.notes.append(
                f"steps.{name}: trainer.devices {asked} is not {self.world_size}, the processes planned for: training "
                f"on {self.world_size} would be refused; {mend}"
            )

    def _measure(self, name: str, cli: FitCLI) -> Planned:
        stage, trainer, data = cli.model, cli.trainer, cli.datamodule
        spec = self._spec(name, stage.policy_spec)
        if data.padding_free:
            self.notes.append("padding_free: as if every row were of max_length, which is the most that a batch holds")
        work = Work(
            pairs=data.batch_size,
            tokens=data.lengths.max_length,
            scored=data.lengths.max_length - data.lengths.max_prompt_length,
            accumulate=trainer.accumulate_grad_batches,
            clip=bool(trainer.gradient_clip_val),
            left_padded=data.padding_side == "left",
        )
        loss = getattr(stage, "loss", None)
        shape = (
            *(type(stage).__name__, spec, work, stage.roles, stage.impl, getattr(stage, "strategy", None)),
            *(type(getattr(stage, "risk", None)), type(getattr(stage, "reference", None))),
            *(getattr(loss, "reads_risk", None), getattr(loss, "risk_over_logratio", None) is None),
            *(cli.config["model"]["init_args"]["optimizer"], cli.config["trainer"]),
        )
        key = repr(shape)
        if key not in self._known:
            strategy, plugin = trainer.strategy, trainer.precision_plugin
            self._known[key] = footprint(stage, spec, strategy, plugin, work, self.world_size)
        return Planned(name, stage, spec, trainer, work, self.world_size, self._known[key])

    def _spec(self, name: str, policy: PolicySpec) -> PolicySpec:
        """The architecture of a step's policy, as a configuration, with its adapter."""
        if policy.quantize is not None:
            raise ValueError(f"quantize {policy.quantize}: a dry run knows weights of 16 and 32 bits; set it to null")
        if policy.adapters:
            self.notes.append(
                f"steps.{name}: the frozen adapters below the one that is trained (handover stack) are left out"
            )
        root = self.lineage.root(name)
        origin = self.config.model if root == BASE else PolicySpec(model=root)
        return PolicySpec(config=self._architecture(origin), dtype=policy.dtype, lora=policy.lora)

    def _architecture(self, origin: PolicySpec) -> dict[str, Any]:
        """All fields of the configuration of a model that transformers has a class for."""
        fresh = {"vocab_size": self._vocabulary(), **(origin.config or {})}
        fields = fresh if origin.model is None else _read(origin)
        made = fresh_config(fields)
        lacking = [name for name in ATTENDING if not isinstance(getattr(made, name, None), int)]
        # types that follow from other fields cannot be cut to fewer layers; they mix attention with state spaces
        if lacking or isinstance(getattr(type(made), "layer_types", None), property):
            why = f"has no {', '.join(lacking)}" if lacking else "has layers of other kinds"
            raise ValueError(
                f"a dry run knows models whose layers all attend, and the configuration of {made.model_type} {why}"
            )
        fields["num_hidden_layers"] = made.num_hidden_layers
        if getattr(made, "layer_types", None):
            fields["layer_types"] = list(made.layer_types)
        return fields

    def _vocabulary(self) -> int:
        tokenizer = self.config.model.tokenizer
        if tokenizer is not None and Path(tokenizer).is_dir():
            return len(load_tokenizer(tokenizer))
        return int(self.config.data.options.get("tokenizer_vocab_size", VOCABULARY))


def _devices(given: Any) -> int | None:
    """How many devices of a node `trainer.devices` asks for; None for as many as there are."""
    if isinstance(given, list):
        return len(given)
    if isinstance(given, str) and "," in given:
        return len([index for index in given.split(",") if index.strip()])
    return None if given in (None, "auto", -1, "-1") else int(given)


def _read(origin: PolicySpec) -> dict[str, Any]:
    """The config.json of a folder or of the hub."""
    source = str(origin.model)
    if not (Path(source) / "config.json").is_file() and not is_hub_name(source):
        raise ValueError(
            f"there is no {source}/config.json, which is all that a dry run reads of a model: put it there, or "
            "describe the architecture in model.config"
        )
    try:
        fields = AutoConfig.from_pretrained(source, revision=origin.revision).to_dict()
        known = AutoConfig.for_model(fields["model_type"])
    except UNREADABLE as error:
        raise ValueError(
            f"{source}: no architecture that transformers has a class for ({first_line(error)[:200]}); a dry run runs "
            "no code of a model's own"
        ) from error
    return {key: value for key, value in fields.items() if hasattr(known, key)}


def sent_by_formula(step: Planned) -> float:
    """Bytes that a process sends in an optimizer step, by what the strategy asks for and without padding.

    With n processes that share a model of b bytes, gathering or reducing it sends (n - 1) / n * b. Blocks are gathered
    for each forward, and for backward unless they are kept; embeddings and head once a batch, and of a frozen copy once
    for all.
    """
    strategy, found, work, world = step.sharded, step.found, step.work, step.world_size
    reference = getattr(step.stage, "reference", None)
    if strategy is None:
        return 2 * (world - 1) / world * found.trained * step.gradient_bytes if world > 1 else 0.0
    shards = world // strategy.replicas
    ring = (shards - 1) / shards
    passes = 2 if strategy.reshards else 1
    if reference is not None and reference.live and strategy.reshards:
        passes += 1
    gathered = step.compute_bytes * (passes * found.in_blocks + found.total - found.in_blocks)
    reduced = step.gradient_bytes * found.trained
    reductions = work.accumulate if strategy.reduce_every_microbatch else 1
    across = 2 * (strategy.replicas - 1) / strategy.replicas * reduced / shards
    return work.accumulate * ring * gathered + reductions * (ring * reduced + across)


def step_tokens(step: Planned) -> int:
    """Of prompts and responses that the policy reads in an optimizer step, over all processes."""
    return step.rows * step.work.tokens * step.world_size * step.work.accumulate


def step_flops(step: Planned) -> float:
    """Floating-point operations of one process in an optimizer step: matrix products, attention and head.

    Forward through the blocks: 2 x their weights x tokens, and 2 x tokens² x width for causal attention, a row and
    layer. Backward costs twice that, once where weights are frozen below an adapter; checkpointing a forward more, a
    live reference another. The head: 2 x vocabulary x width per scored token and product, see `rsa_kernels.workspace`.
    """
    config = step.architecture
    width, vocabulary = config.hidden_size, config.vocab_size
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
    tokens, work = step.rows * step.work.tokens, step.work
    forward = 2 * step.found.in_blocks * tokens + 2 * config.num_hidden_layers * heads * work.tokens * tokens
    passes = 1 + (1 if step.spec.lora is not None else 2)
    passes += step.sharded is not None and step.sharded.recomputes
    reference, loss = getattr(step.stage, "reference", None), getattr(step.stage, "loss", None)
    passes += reference is not None and reference.live
    products = PRODUCTS[step.found.head.strategy][
        0 if reference is None else 2 if loss is not None and loss.reads_risk else 1
    ]
    head = 2 * products * vocabulary * width * step.rows * work.scored
    return work.accumulate * (passes * forward + head)
