"""The frozen model a stage stays near. A reference lives outside the module tree: not trained, not checkpointed."""

import abc
import copy
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rsa_lightning.adapters import adapter_off
from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.models import Policy, PolicySpec, ReferenceStates, load_policy
from rsa_lightning.parallel.sharding import is_sharded
from rsa_lightning.scoring import Scoring

# max |log policy - log reference|, nats per token, on the first batch: the same weights differ by rounding only
STEP0_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
STEP0_TOLERANCE_LOW_PRECISION = 1e-2


def load_frozen(spec: PolicySpec) -> Policy:
    """A policy that is not trained, on one device."""
    return load_policy(spec).requires_grad_(False).eval()


class Reference(abc.ABC):
    """Gives hidden states and a head for any batch: the whole reference distribution is known at every token.

    Attributes:
        live: whether it is computed batch by batch beside the policy, so that equal weights give equal numbers.
        knows_distribution: whether there is more than the log-probabilities of labels.
    """

    live: ClassVar[bool] = True

    @property
    def knows_distribution(self) -> bool:
        return True

    def check_loss(self, name: str, *, reads_risk: bool, mismatched: bool) -> None:  # noqa: B027 (a live one says all)
        """Raises ValueError where a loss asks for what this reference cannot say.

        Args:
            name: of the loss.
            reads_risk: whether it needs the distribution.
            mismatched: whether it scores prompts with responses of other examples, which change with the batch.
        """

    @abc.abstractmethod
    def prepare(self, policy: Policy, load: Callable[[PolicySpec], Policy] = load_frozen) -> None:
        """Loads what is needed, once, before the policy's first update. Calling it again does nothing.

        Args:
            load: gives the frozen policy of a specification, sharded where `policy` is.
        """

    @abc.abstractmethod
    def place(self, policy: Policy) -> None:
        """Moves to the policy's device and dtype."""

    def fill(self, policy: Policy, scoring: Callable[[], Scoring]) -> None:  # noqa: B027 (a live one is asked later)
        """Called where a run begins, under the run's precision: a chance to compute what `states` will be asked."""

    @abc.abstractmethod
    def states(self, batch: PreferenceBatch) -> ReferenceStates:
        """No gradient, no dropout."""


@final
class FrozenCopy(Reference):
    """A second copy of a model, frozen.

    Args:
        model: folder (or hub id) of the reference; by default a copy of the policy as it starts.
        revision: commit of a hub id.
        trust_remote_code: run code shipped with the model.
    """

    def __init__(self, model: str | None = None, revision: str | None = None, trust_remote_code: bool = False) -> None:
        self.model = model
        self._load = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._policy: Policy | None = None

    def __repr__(self) -> str:
        return f"FrozenCopy({self.model or 'the policy as it started'})"

    def prepare(self, policy: Policy, load: Callable[[PolicySpec], Policy] = load_frozen) -> None:
        if self._policy is not None:
            return
        if self.model is not None:
            frozen = load(PolicySpec(model=self.model, **self._load))  # type: ignore[arg-type]
            mine, theirs = policy.head.out_features, frozen.head.out_features
            if mine != theirs:
                raise ValueError(
                    f"vocabulary mismatch: the policy has {mine} logits, the reference {self.model} has {theirs}"
                )
        elif is_sharded(policy):  # no copy can be made of it, but what it was loaded from is still there
            assert policy.spec is not None
            frozen = load(policy.spec)
        else:
            frozen = copy.deepcopy(policy)
        self._policy = frozen.requires_grad_(False).eval()

    def place(self, policy: Policy) -> None:
        assert self._policy is not None, "prepare() comes first"
        dtype: torch.dtype | None = policy.head.weight.dtype
        # a copy with adapters has their dtype beside the model's; a sharded one is held in what its forward computes in
        kept = self._policy.adapted or (is_sharded(self._policy) and dtype == torch.float32)
        # the strategy has placed a sharded one: its weights may be held by the host, its buffers never
        device = None if is_sharded(self._policy) else policy.head.weight.device
        self._policy.to(device=device, dtype=None if kept else dtype)

    @torch.no_grad()
    def states(self, batch: PreferenceBatch) -> ReferenceStates:
        assert self._policy is not None, "prepare() comes first"
        hidden, head = self._policy.states(batch), self._policy.head
        if isinstance(head, FSDPModule):
            head.unshard()  # and it stays so: the operator's backward reads it again
        return ReferenceStates(hidden, head.weight, head.bias, head.scale, head.softcap)


@final
class AdapterOff(Reference):
    """The policy itself without the adapter it trains: no second copy of the weights, and the policy's own head.

    It is the model the stage starts from only where the adapter is new. With an adapter whose training is continued it
    is the model below, which the stage left long ago.
    """

    def __init__(self) -> None:
        self._policy: Policy | None = None

    def __repr__(self) -> str:
        return "AdapterOff()"

    def prepare(self, policy: Policy, load: Callable[[PolicySpec], Policy] = load_frozen) -> None:
        if not policy.adapted:
            raise ValueError(
                "the reference AdapterOff is the policy without its adapter, and this policy has none: set policy.lora "
                "or take FrozenCopy as reference"
            )
        self._policy = policy

    def place(self, policy: Policy) -> None:
        """It is where the policy is."""

    @torch.no_grad()
    def states(self, batch: PreferenceBatch) -> ReferenceStates:
        assert self._policy is not None, "prepare() comes first"
        with adapter_off(self._policy):
            return ReferenceStates(self._policy.states(batch), weight=None)


def start_of(policy: PolicySpec) -> Reference:
    """The model a policy starts as. A new adapter adds nothing yet, so without it the policy is that model."""
    return AdapterOff() if policy.lora is not None and policy.lora.start is None else FrozenCopy()


def check_continued(reference: Reference, policy: PolicySpec) -> None:
    """Refuses by name what a stage's check before the first update would refuse by number. Raises ValueError."""
    if isinstance(reference, AdapterOff) and policy.lora is not None and policy.lora.start is not None:
        raise ValueError(
            f"policy.lora.start continues the adapter {policy.lora.start}, and with that adapter off the reference is "
            f"the base model {policy.model}, not the reward-aligned one. Either merge that adapter and start a new one "
            "on the merged model (policy.model: MERGED), or keep it frozen below a new one (policy.adapters: [FOLDER], "
            "no policy.lora.start), or take the merged model as reference (reference: FrozenCopy with model: MERGED)"
        )


def working_dtype(policy: Policy) -> torch.dtype:
    """The dtype in which the head's products are made: that of its weights, or of autocast."""
    weight = policy.head.weight
    devices = (weight.device.type, "cuda")  # offloaded weights lie elsewhere than where they are used
    return next((torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)), weight.dtype)


@torch.no_grad()
def own_states(policy: Policy, batch: PreferenceBatch) -> ReferenceStates:
    """What a reference with the policy's present weights says: without gradient, in eval mode."""
    training = policy.training
    hidden, head = policy.eval().states(batch), policy.head
    policy.train(training)
    return ReferenceStates(hidden, None, scale=head.scale, softcap=head.softcap)


@torch.no_grad()
def start_gap(policy: Policy, batch: PreferenceBatch, reference: Reference, **options: Any) -> Tensor:
    """max |log policy - log reference| over the tokens of a batch, in eval mode, nats.

    In low precision, of a reference that is not live, the mean: rows of another batch are rounded otherwise, which
    moves single tokens of equal models by more than `check_start` tolerates.
    """
    training = policy.training
    policy.eval()
    apart = policy(batch, reference.states(batch), None, **options).logratio.abs()
    policy.train(training)
    if not apart.numel():
        return apart.new_zeros(())
    return apart.max() if reference.live or working_dtype(policy) in STEP0_TOLERANCE else apart.mean()


def tolerance_of(dtype: torch.dtype) -> float:
    """Of `start_gap`."""
    return STEP0_TOLERANCE.get(dtype, STEP0_TOLERANCE_LOW_PRECISION)


def check_start(gap: float, dtype: torch.dtype, policy: PolicySpec, reference: Reference) -> None:
    """Raises ValueError where policy and reference are `gap` nats per token apart before the first update."""
    tolerance = tolerance_of(dtype)
    if not gap <= tolerance:
        raise ValueError(
            "policy and reference differ before the first update: max |log policy - log reference| is "
            f"{gap:.3g} nats per token (tolerance {tolerance:g}). The policy starts from "
            f"{policy.model or 'fresh weights'}, the reference is {reference!r}. Likely causes: "
            "they are different models (a safety stage and its reference both start from the reward-aligned one), "
            "or an adapter of an earlier stage is missing in one of them (switching off an adapter that is trained "
            "further gives the base, not the reward-aligned model)"
        )
