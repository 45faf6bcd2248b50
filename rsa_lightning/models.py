"""Policies: the only file that knows Hugging Face models. Loads, checks, owns the head."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from rsa_kernels import Impl, RiskMeasure, Strategy, TokenStats, linear_token_risk
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rsa_lightning import packing
from rsa_lightning.adapters import (
    CONFIG,
    Lora,
    add_adapters,
    check_adapters,
    has_adapter,
    mistaken_for_a_model,
    quantization,
)
from rsa_lightning.architecture import UNREADABLE, fresh_config, impossible
from rsa_lightning.data.batch import PreferenceBatch
from rsa_lightning.parsing import first_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicySpec:
    """Where a policy starts: an existing Hugging Face causal language model, or a fresh one from a configuration.

    Args:
        model: folder (or hub id) with config.json and safetensors weights.
        config: of a fresh model, made where `model` is not given: `model_type` and fields of its transformers
            configuration. Weights are drawn with `seed`; vocabulary size and special token ids come from the tokenizer.
        tokenizer: folder (or hub id) of the tokenizer; by default the model's own.
        dtype: dtype of the weights.
        revision: commit of a hub id.
        trust_remote_code: run code shipped with the model. Off unless you have read it.
        seed: seed of fresh weights, an adapter's included.
        lora: the adapter to train; null trains all weights.
        adapters: folders of adapters of earlier stages, oldest first; they stay on, frozen, below the one of `lora`.
        quantize: hold the frozen weights of `model` in 4 or 8 bits (QLoRA).
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    lora: Lora | None = None
    adapters: list[str] = field(default_factory=list)
    quantize: Literal["4bit", "8bit"] | None = None

    def __post_init__(self) -> None:
        if self.model is None and self.config is None:
            raise ValueError(
                "policy: give `model` (a Hugging Face folder or hub id), or `config` with model_type for a new model"
            )
        if self.model is None and (self.revision is not None or self.trust_remote_code):
            raise ValueError("policy.revision and policy.trust_remote_code belong to `model`: a fresh one has neither")
        if self.model is None and "model_type" not in (self.config or {}):
            raise ValueError("policy.config needs `model_type`, for example llama")
        if self.adapters and self.lora is None:
            raise ValueError(
                "policy.adapters are frozen, and stay below a new one: set policy.lora. To train all weights, give the "
                "merged model in policy.model"
            )
        if self.quantize is not None and (self.lora is None or self.model is None):
            raise ValueError(
                "policy.quantize is for the frozen weights of policy.model below an adapter: quantised weights cannot "
                "be trained. Set policy.model and policy.lora, or drop policy.quantize"
            )


class ReferenceStates(NamedTuple):
    """What the reference says about a batch: hidden states of the N scored positions, and the head that reads them.

    Or, where `logp` is given, the log-probabilities of the labels and nothing else; `risk` must then be None.
    """

    hidden: Float[Tensor, "N R"] | None
    weight: Float[Tensor, "V R"] | None  # None: the policy's own head, frozen
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    logp: Float[Tensor, " N"] | None = None


class RiskHead(nn.Linear):
    """The language-model head; its forward is the token-risk op, so logits of all tokens never exist.

    It must be called as a module: under sharded data parallelism its weight is whole only inside its own forward.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def wrap(cls, linear: nn.Linear, scale: float, softcap: float | None) -> "RiskHead":
        """A head that shares (not copies) the parameters of `linear`, so that tied embeddings stay tied."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        head.scale, head.softcap = scale, softcap
        return head

    def forward(  # type: ignore[override]
        self,
        hidden: Float[Tensor, "N H"],
        labels: Tensor,
        reference: ReferenceStates | None,
        risk: RiskMeasure | None,
        *,
        risk_over_logp: Float[Tensor, " N"] | None = None,
        entropy: bool = False,
        strategy: Strategy = "auto",
        impl: Impl = "auto",
    ) -> TokenStats:
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        options |= {"entropy": entropy, "strategy": strategy, "impl": impl}
        if reference is None or reference.logp is not None:
            stats = self._token_risk(hidden, None, None, labels, risk, bias=self.bias, **options)  # refuses a risk
            return stats if reference is None else stats._replace(ref_logp=cast(Tensor, reference.logp))
        if reference.weight is None:
            frozen = None if self.bias is None else self.bias.detach()
            reference = ReferenceStates(reference.hidden, self.weight.detach(), frozen, self.scale, self.softcap)
        return self._token_risk(
            hidden,
            reference.hidden,
            reference.weight,
            labels,
            risk,
            risk_over_logp=None if risk is None else risk_over_logp,
            bias=self.bias,
            ref_bias=reference.bias,
            ref_scale=reference.scale,
            ref_softcap=reference.softcap,
            **options,
        )

    def _token_risk(
        self,
        hidden: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        labels: Tensor,
        risk: RiskMeasure | None,
        **options: Any,
    ) -> TokenStats:
        """The op, where the whole head is here."""
        return linear_token_risk(hidden, self.weight, ref_hidden, ref_weight, labels, risk, **options)


class Policy(nn.Module):
    """A causal language model whose head is a RiskHead. The root of sharding; `model` is the transformers model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        scale, softcap = _logit_scale(model.config), getattr(model.config, "final_logit_softcapping", None)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"{type(model).__name__} has no linear language-model head, so its token risk cannot be computed"
            )
        if not head.weight.is_meta:
            _check_head(model, head, scale, softcap)
        model.set_output_embeddings(RiskHead.wrap(head, scale, softcap))
        self.model = model
        self.spec: PolicySpec | None = None  # what it was loaded from
        self.adapted = has_adapter(model)  # an adapter is trained, and the model below it frozen

    @property
    def head(self) -> RiskHead:
        return self.model.get_output_embeddings()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Policy":
        """Buffers that no state dict holds, rotary frequencies, keep their precision: in bfloat16 positions blur."""
        before = [
            (module, name, module._buffers[name])
            for module in self.modules()
            for name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            moved = module._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        return self

    def check_length(self, tokens: int) -> None:
        """Raises ValueError where sequences of this many tokens have positions the model does not know."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(
                f"max_length is {tokens} tokens, the model knows {limit} positions (max_position_embeddings): "
                f"set data.max_length to at most {limit}, or take a model with a longer context"
            )

    def states(self, batch: PreferenceBatch) -> Float[Tensor, "N H"]:
        """Hidden states that predict the N response tokens of the batch, for callers that need no head.

        Sharded, it is a forward of its own, which gathers the weights; `forward` therefore does not call it.
        """
        return self._states(batch)

    def _states(self, batch: PreferenceBatch) -> Float[Tensor, "N H"]:
        packing.attend(self.model, packed=batch["row_bounds"] is not None)
        inputs = packing.model_inputs(batch)
        hidden = self.model.base_model(input_ids=batch["input_ids"], use_cache=False, **inputs).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch["positions"])

    def forward(
        self,
        batch: PreferenceBatch,
        reference: ReferenceStates | None,
        risk: RiskMeasure | None,
        **options: Any,
    ) -> TokenStats:
        """Token statistics of the batch; `options` are those of `RiskHead.forward`.

        Without a reference only `logp` means anything, and `risk` must be None.
        """
        return self.head(self._states(batch), batch["labels"], reference, risk, **options)


def check_spec(spec: PolicySpec, like: PolicySpec | None = None) -> None:
    """What can be said against a policy before anything is loaded or made; raises like `load_policy`.

    Where its model is not there yet, `like` is a policy of the same architecture, and no adapter is read.
    """
    ground = like or spec
    if ground.model is None:
        fresh_config(ground.config or {})
    else:
        _check_folder(ground.model)
    if spec.lora is not None:
        check_adapters(_without_weights(ground), spec.adapters if like is None else [], spec.lora)
    quantization(spec.quantize, torch.float32)


def load_policy(spec: PolicySpec, tokenizer: PreTrainedTokenizerBase | None = None, *, weights: bool = True) -> Policy:
    """Builds the policy on the CPU; a quantised one on the current GPU where there is one.

    Args:
        weights: false builds it on the meta device, where nothing is read or drawn, for weights that come later.

    Raises:
        FileNotFoundError: no such folder, or no safetensors weights in it.
        ValueError: unknown configuration fields, damaged or incomplete weights, a tokenizer larger than the model, or
            an adapter that does not belong to it.
        ImportError: peft or bitsandbytes is needed and not installed.
    """
    check_spec(spec)
    if not weights:
        model = _without_weights(spec, tokenizer)
    else:
        model = _from_folder(spec) if spec.model is not None else _from_config(spec, tokenizer)
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if tokenizer is not None and len(tokenizer) > rows:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has {len(tokenizer)} ids, the model's embeddings only {rows} rows. "
            "Use the tokenizer that belongs to the model"
        )
    if spec.lora is not None:
        add_adapters(model, spec.adapters, spec.lora, spec.seed, weights=weights)
    policy = Policy(model)
    policy.spec = spec
    return policy


def _from_config(spec: PolicySpec, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    of_tokenizer: dict[str, Any] = {}
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        of_tokenizer = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
    config = fresh_config(spec.config or {}, **of_tokenizer)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))
    except Exception as error:  # whatever transformers raises here is about the configuration
        raise impossible(config.model_type, error) from error


def _without_weights(spec: PolicySpec, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """A model of this architecture on the meta device."""
    if spec.model is None:
        with torch.device("meta"):
            return _from_config(spec, tokenizer)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.model, revision=spec.revision, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype), **options)
    except UNREADABLE as error:
        raise _unreadable(spec.model, error) from error


def _unreadable(source: str, error: BaseException) -> ValueError:
    return ValueError(f"no causal language model can be read from {source!r} ({first_line(error)[:200]})")


def _from_folder(spec: PolicySpec) -> PreTrainedModel:
    source = str(spec.model)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **quantization(spec.quantize, getattr(torch, spec.dtype)),
        )
    except (*UNREADABLE, SafetensorError) as error:
        raise _unreadable(source, error) from error
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers follows an adapter to its base by itself
        raise mistaken_for_a_model(source)
    if info["missing_keys"]:
        found = f"{len(info['missing_keys'])}, first: {min(info['missing_keys'])}"
        raise ValueError(
            f"{source} lacks weights ({found}) that would be random: its config.json and weights do not match"
        )
    if info["unexpected_keys"]:  # an auxiliary head, or a config.json with too few layers: only the user can tell
        found = f"{len(info['unexpected_keys'])}, first: {min(info['unexpected_keys'])}"
        log.warning("%s has weights that no layer of its config.json takes (%s): they are left out", source, found)
    return model


def _check_folder(source: str) -> None:
    """A name that looks like a path must exist: otherwise transformers would ask the hub for it."""
    parent = Path(source).parts[:1]
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(*parent).is_dir()
    if (Path(source) / CONFIG).exists():
        raise mistaken_for_a_model(source)
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise FileNotFoundError(f"{source} is not a Hugging Face folder: it has no config.json")
    if looks_like_path and not Path(source).is_dir():
        raise FileNotFoundError(f"there is no folder {source}")
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise FileNotFoundError(
            f"{source} holds no *.safetensors weights. Pickled .bin or .pt weights are refused: "
            "load them once elsewhere and write them with save_pretrained"
        )


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling."""
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / config.logits_scaling
    return float(getattr(config, "logit_scale", None) or 1.0)


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: nn.Linear, scale: float, softcap: float | None) -> None:
    """The op must compute this model's logits: an architecture that treats them otherwise is refused, not guessed."""
    was_training = model.training
    model.eval()
    ids = torch.arange(3, device=head.weight.device)[None] % head.weight.shape[0]
    logits = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state) * scale
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    if not logits.isfinite().all():
        raise ValueError(
            "the model's weights give logits that are not finite: its training diverged, take an earlier model"
        )
    expected = model(input_ids=ids, use_cache=False).logits
    model.train(was_training)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} does more to its logits than a linear head, a scale and a soft-cap, "
            "so the token-risk op would not compute its distribution: this architecture is not supported"
        )
