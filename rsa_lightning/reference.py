"""The frozen model a stage stays near. A reference lives outside the module tree: not trained, not checkpointed."""

import abc
import copy
from typing import final

import torch

from rsa_lightning import packing
from rsa_lightning.adapters import adapter_off
from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.models import Policy, PolicySpec, ReferenceStates, load_policy

# max |log policy - log reference|, nats per token, on the first batch: the same weights differ by rounding only
STEP0_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
STEP0_TOLERANCE_LOW_PRECISION = 1e-2


class Reference(abc.ABC):
    """Gives hidden states and a head for any batch: the whole reference distribution is known at every token."""

    @abc.abstractmethod
    def prepare(self, policy: Policy) -> None:
        """Loads what is needed, once, before the policy's first update. Calling it again does nothing."""

    @abc.abstractmethod
    def place(self, policy: Policy) -> None:
        """Moves to the policy's device and dtype."""

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

    def prepare(self, policy: Policy) -> None:
        if self._policy is not None:
            return
        if self.model is None:
            frozen = copy.deepcopy(policy)
        else:
            frozen = load_policy(PolicySpec(model=self.model, **self._load))  # type: ignore[arg-type]
            mine, theirs = policy.head.out_features, frozen.head.out_features
            if mine != theirs:
                raise ValueError(
                    f"vocabulary mismatch: the policy has {mine} logits, the reference {self.model} has {theirs}"
                )
        packing.attend(frozen.model, packing.is_packed(policy.model))
        self._policy = frozen.requires_grad_(False).eval()

    def place(self, policy: Policy) -> None:
        assert self._policy is not None, "prepare() comes first"
        # a copy with adapters has their dtype beside the model's, and keeps both
        dtype = None if self._policy.adapted else policy.head.weight.dtype
        self._policy.to(device=policy.head.weight.device, dtype=dtype)

    @torch.no_grad()
    def states(self, batch: PreferenceBatch) -> ReferenceStates:
        assert self._policy is not None, "prepare() comes first"
        head = self._policy.head
        return ReferenceStates(self._policy.states(batch), head.weight, head.bias, head.scale, head.softcap)


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

    def prepare(self, policy: Policy) -> None:
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


def check_start(gap: float, dtype: torch.dtype, policy: PolicySpec, reference: Reference) -> None:
    """Raises ValueError where policy and reference are `gap` nats per token apart before the first update."""
    tolerance = STEP0_TOLERANCE.get(dtype, STEP0_TOLERANCE_LOW_PRECISION)
    if not gap <= tolerance:
        raise ValueError(
            "policy and reference differ before the first update: max |log policy - log reference| is "
            f"{gap:.3g} nats per token (tolerance {tolerance:g}). The policy starts from "
            f"{policy.model or 'fresh weights'}, the reference is {reference!r}. Likely causes: "
            "they are different models (a safety stage and its reference both start from the reward-aligned one), "
            "or an adapter of an earlier stage is missing in one of them (switching off an adapter that is trained "
            "further gives the base, not the reward-aligned model)"
        )
