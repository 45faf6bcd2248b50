"""One optimizer step of a stage on fake tensors: shapes and no contents, under a `Meter`.

The step is the real one - the stage's policy and reference, sharded by FSDP2 over a process group that does nothing,
autograd, checkpointing, clipping, the optimizer - but for the head, whose operator is opaque (`fake_head.py`), and for
the loss, which takes a number per token.
"""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from lightning.pytorch.strategies import Strategy
from rsa_kernels.dispatch import FUSED
from rsa_kernels.workspace import Plan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from transformers import masking_utils

from rsa_lightning.dryrun.fake_head import HeadMemory
from rsa_lightning.dryrun.meter import Call, Kind, Mark, Meter
from rsa_lightning.models import Policy, PolicySpec, ReferenceStates, load_policy
from rsa_lightning.parallel.clipping import clip_by_norm
from rsa_lightning.parallel.sharding import blocks, is_sharded, materialise
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.policy_stage import PolicyStage
from rsa_lightning.reference import AdapterOff, FrozenCopy, Reference, working_dtype
from rsa_lightning.stages import AlignmentStage

REPEATED = 2  # micro-batches that are run where more are accumulated: the first, and the one that reduces


@dataclass(frozen=True)
class Work:
    """What one process does in an optimizer step: `pairs` a micro-batch, each row of `tokens`, `scored` of them."""

    pairs: int
    tokens: int
    scored: int
    accumulate: int = 1
    clip: bool = False
    left_padded: bool = False
    device: str = "cuda"  # decides the head's budget and what optimizers do by default; nothing runs on it


@dataclass(frozen=True)
class Footprint:
    """Of one process: bytes by kind at the fullest moment of each part of an optimizer step, and its collectives.

    Where the strategy offloads to the host, what `command.ON_HOST` names is there, and is counted here all the same.
    """

    peaks: dict[Mark, dict[Kind, int]]
    calls: dict[Call, float]  # how often in an optimizer step
    trained: int  # parameters, of all processes together
    total: int
    in_blocks: int  # of the total
    head: Plan  # how the head runs

    @property
    def fullest(self) -> Mark:
        return max(self.peaks, key=lambda mark: sum(self.peaks[mark].values()))

    @property
    def peak(self) -> dict[Kind, int]:
        """Bytes by kind at the fullest moment of the step."""
        return self.peaks[self.fullest]

    def most(self, phase: str, without: Collection[Kind] = ()) -> int:
        """Most bytes in a phase, but of some kinds."""
        peaks = [held for mark, held in self.peaks.items() if mark.phase == phase]
        return max((sum(size for kind, size in held.items() if kind not in without) for held in peaks), default=0)

    def sent(self, *phases: str) -> float:
        """Bytes that a process sends, and receives, in an optimizer step; of some phases."""
        return sum(count * call.sent for call, count in self.calls.items() if not phases or call.phase in phases)


def take_step(
    stage: PolicyStage, spec: PolicySpec, *, strategy: Strategy, precision: Precision, work: Work, world_size: int
) -> tuple[Footprint, bool]:
    """The footprint of a step at this depth, and whether its blocks are alike."""
    # transformers reads positions to see whether rows are packs of several, which fake ones cannot say: they are not
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        step = _Step(stage, spec, strategy, precision, work, world_size)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return step.take(), step.alike


class _Step:
    """Policy, reference and optimizer of a stage on fake tensors, and one optimizer step with them."""

    def __init__(
        self,
        stage: PolicyStage,
        spec: PolicySpec,
        strategy: Strategy,
        precision: Precision,
        work: Work,
        world_size: int,
    ) -> None:
        self.stage, self.spec, self.strategy, self.precision, self.work = stage, spec, strategy, precision, work
        self.meter, self.world_size = Meter(), world_size
        self.policy = self._outline(spec).train()
        self.policy.check_length(work.tokens)
        self.given: Reference | None = getattr(stage, "reference", None)
        copied = isinstance(self.given, FrozenCopy)
        self.frozen = self._outline(_whole(spec), frozen=True) if copied else None
        shapes = {tuple(parameter.shape for parameter in block.parameters()) for block in blocks(self.policy)}
        self.alike = len(shapes) == 1

    def take(self) -> Footprint:
        """An optimizer step from start to end, the second of a run: states and what stays gathered are there."""
        self._materialise()
        self._prepare()
        self.meter.calls.clear()
        with self.meter as meter:
            self._name()
            runs = min(self.work.accumulate, REPEATED)
            counted: list[list[Call]] = []
            for run in range(runs):
                self._micro_batch(first=run == 0, last=run == runs - 1)
                counted.append(list(meter.calls))
                meter.calls.clear()
            meter.mark("update")
            self._update()
            counted[-1] += meter.calls
        calls: dict[Call, float] = {}
        for run, found in enumerate(counted):
            for call in found:
                calls[call] = calls.get(call, 0) + (self.work.accumulate - runs + 1 if run == 0 else 1)
        peaks = {mark: held for mark, held in meter.peaks().items() if mark.phase != "start"}
        trained, total = (sum(p.numel() for p in found) for found in (self.trained, self.weights))
        head = self.policy.head.forward.plan  # type: ignore[attr-defined]
        in_blocks = sum(parameter.numel() for block in blocks(self.policy) for parameter in block.parameters())
        return Footprint(peaks, calls, trained, total, in_blocks, head)

    def _materialise(self) -> None:
        """Fake memory for what is on the meta device so far, and what is built on it."""
        models = [self.policy] if self.frozen is None else [self.policy, self.frozen]
        for model in models:
            if is_sharded(model):
                materialise(model, torch.device("cpu"))
            else:
                _place(
                    model, self.precision._desired_input_dtype if isinstance(self.precision, HalfPrecision) else None
                )
            model.head.forward = cast(Any, self._head(model))  # type: ignore[method-assign]
            self._watch(model)
        # shards, whatever is gathered later
        self.weights = list(self.policy.parameters())
        self.frozen_weights: list[Tensor] = [] if self.frozen is None else list(self.frozen.parameters())
        self._states = self._reference()
        self.trained = [parameter for parameter in self.weights if parameter.requires_grad]
        self.optimizer = _as_on(self.work.device, self.stage.optimizer(self.trained))
        self.batch = _batch(self.stage, self.work)

    def _prepare(self) -> None:
        """What the first step leaves behind: optimizer states, gradients, and whatever the reference keeps gathered."""
        with self.precision.forward_context():
            self._states()
        for module in self.policy.modules():  # a reference that is the policy gathers it, and backward shards it again
            if isinstance(module, FSDPModule):
                module.reshard()
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        self._update()

    def _name(self) -> None:
        """What is there before the step."""
        name = self.meter.name
        name("parameters", *self.weights, *self.policy.buffers())
        name("gradients", *(parameter.grad for parameter in self.trained))
        states = (value for state in self.optimizer.state.values() for value in state.values())
        name("optimizer", *(value for value in states if isinstance(value, Tensor)))
        name("reference", *self.frozen_weights)
        if self.frozen is not None:
            name("reference", *self.frozen.buffers())
            # a sharded reference keeps its head gathered, and all of it where reshard_after_forward is off
            name(
                "gathered", *(p for p in self.frozen.parameters() if all(p is not kept for kept in self.frozen_weights))
            )

    def _micro_batch(self, first: bool, last: bool) -> None:
        meter, stage, loss = self.meter, self.stage, getattr(self.stage, "loss", None)
        risk = stage.risk if isinstance(stage, AlignmentStage) and stage.loss.reads_risk else None
        with self.precision.forward_context():
            if self.given is not None:
                meter.mark("reference")
            states = self._states()
            meter.mark("forward")
            tokens = self.policy(self.batch, states, risk)
            total = tokens.logp.sum()
            if risk is not None and loss is not None:
                total = total + tokens.risk.sum()
        if first:  # the Trainer frees the gradients of the step before once this one's forward is done
            self.optimizer.zero_grad()
        if isinstance(self.policy, FSDPModule):
            assert isinstance(self.strategy, FSDP2)
            self.policy.set_requires_gradient_sync(last or self.strategy.reduce_every_microbatch)
        del tokens, states
        meter.mark("backward")
        meter.kind = "working"
        total.backward()
        meter.kind = "activations"
        meter.name("gradients", *(parameter.grad for parameter in self.trained))

    def _update(self) -> None:
        meter = self.meter
        meter.kind = "working"
        if not is_sharded(self.policy) and self.world_size > 1:
            self._reduce()
        if self.work.clip:
            clip_by_norm(self.trained, 1.0)
        self.optimizer.step()
        meter.kind = "activations"

    def _reduce(self) -> None:
        """What DistributedDataParallel sends: every gradient, once."""
        size = sum(parameter.nbytes for parameter in self.trained)
        self.meter.calls.append(Call("update", "all-reduce", self.world_size, size))

    # ------------------------------------------------------------------ its parts

    def _outline(self, spec: PolicySpec, frozen: bool = False) -> Policy:
        """On the meta device, as the strategy makes it."""
        if isinstance(self.strategy, FSDP2):
            return self.strategy.outline(spec, None, frozen=frozen)
        policy = load_policy(spec, None, weights=False)
        return policy.requires_grad_(False).eval() if frozen else policy

    def _head(self, policy: Policy) -> HeadMemory:
        """Raises ValueError at the naive head, whose memory nobody has bounded."""
        stage, device = self.stage, self.work.device
        if stage.impl == "naive":
            raise ValueError(
                "impl naive makes every logit several times over, and a dry run does not know it: take auto"
            )
        fused, ratio = device == "cuda" and stage.impl != "chunked", False
        if isinstance(stage, AlignmentStage):
            fused &= type(stage.risk) in FUSED
            ratio = stage.loss.risk_over_logratio is not None
        strategy: Any = getattr(stage, "strategy", "auto")
        return HeadMemory(policy.head, self.meter, device, strategy, fused, ratio)

    def _watch(self, policy: Policy) -> None:
        """Marks of the policy's blocks, forward and backward."""
        meter = self.meter

        def enters(index: int, *_: Any) -> None:
            if meter.phase in ("forward", "reference"):
                meter.mark(meter.phase, index)

        def leaves(index: int, module: Any, given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if meter.phase == "forward" and hidden.requires_grad:
                hidden.register_hook(lambda gradient: meter.mark("backward", index))

        for index, block in enumerate(blocks(policy)):
            block.register_forward_pre_hook(partial(enters, index))
            block.register_forward_hook(partial(leaves, index))

    def _reference(self) -> Callable[[], ReferenceStates | None]:
        """What gives the states of the batch."""
        given, frozen = self.given, self.frozen
        if given is None:
            return lambda: None
        if not given.live:  # a cache on disk
            return self._read_states
        if frozen is not None:
            copied: Reference = FrozenCopy("-")  # of a name, so that it asks for what is loaded here
            copied.prepare(self.policy, lambda spec: frozen)
        else:
            copied = AdapterOff()
            copied.prepare(self.policy)
        return lambda: copied.states(self.batch)

    def _read_states(self) -> ReferenceStates:
        """What a cache brings: hidden states, and their head where the policy's is trained; or log-probabilities."""
        assert self.given is not None
        count, dtype, head = len(self.batch["labels"]), working_dtype(self.policy), self.policy.head
        if not self.given.knows_distribution:
            return ReferenceStates(None, None, logp=torch.empty(count))
        if not self.policy.adapted and not self.frozen_weights:
            self.frozen_weights = [torch.empty(head.out_features, head.in_features, dtype=dtype)]
        hidden = torch.empty(count, head.in_features, dtype=dtype)
        return ReferenceStates(hidden, next(iter(self.frozen_weights), None))


def _whole(spec: PolicySpec) -> PolicySpec:
    """The model below an adapter."""
    return dataclasses.replace(spec, lora=None, adapters=[])


def _place(policy: Policy, dtype: torch.dtype | None) -> None:
    """Fake memory on the CPU for a policy on the meta device; `Module.to_empty` cannot swap fake parameters."""
    made: dict[Tensor, Tensor] = {}
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                placed = torch.empty_like(parameter, device="cpu", dtype=dtype)
                whole = made.setdefault(parameter, torch.nn.Parameter(placed, parameter.requires_grad))
                module._parameters[name] = whole  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")


def _batch(stage: PolicyStage, work: Work) -> Any:
    """The largest batch: every row as long as rows may be."""
    rows = work.pairs * len(stage.roles)
    scored = torch.empty(rows * work.scored, dtype=torch.long)
    ids = torch.empty(rows, work.tokens, dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.empty_like(ids),
        "left_padded": work.left_padded,
        "row_bounds": None,
        "positions": scored,
        "labels": torch.empty_like(scored),
    }


def _as_on(device: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """On a GPU torch updates all parameters of a group together by default, which takes memory."""
    for group in optimizer.param_groups:
        if device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer
