"""LoRA: small trainable matrices beside frozen weights. The only file that knows peft and bitsandbytes.

Both are imported when asked for. A model may carry a stack of adapters, which add up: frozen ones of earlier stages,
and one that is trained. The head and the embeddings never carry one: a reference with the adapter switched off reads
the policy's own head, so the head must be the same with the adapter on.
"""

import copy
import hashlib
import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from rsa_lightning.parsing import first_line

log = logging.getLogger(__name__)

TRAINABLE = "default"  # peft's own name for an only adapter
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before the names of the model's modules

# variants of LoRA that do more than add a product of two matrices to a weight, by their field in adapter_config.json
_VARIANTS = [
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias", "use_dora"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
]
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # other initialisations change the base's weights


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter: the weights W stay as they are, W + alpha / rank * B A is used, and only A and B are trained.

    Source: arXiv:2106.09685. B starts at zero, so that the policy starts as the model below it.

    Args:
        rank: columns of B and rows of A.
        alpha: scale of the product; by default twice the rank.
        dropout: probability with which inputs of A are dropped in training.
        target_modules: names of linear layers (their ends: q_proj), a regular expression for whole names, or
            all-linear: every linear layer but the head.
        rslora: divide alpha by the root of the rank instead of the rank (arXiv:2312.03732).
        start: folder of an adapter whose training is continued; it brings its own rank, alpha and target modules.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    rslora: bool = False
    start: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"lora.alpha must be a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is a probability in [0, 1), got {self.dropout}")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: name linear layers (q_proj), or write all-linear")
        given = [f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
        theirs = [f"lora.{name}" for name in given if name not in ("dropout", "start")]
        if self.start is not None and theirs:
            raise ValueError(
                f"lora.start continues the adapter {self.start}, which brings its own: take out {', '.join(theirs)}"
            )


def check_adapters(model: PreTrainedModel, frozen: Sequence[str], lora: Lora) -> None:
    """What `add_adapters` would say, before a model is loaded: `model` is one like it on the meta device."""
    _stack(model, frozen, lora, seed=0)


def add_adapters(model: PreTrainedModel, frozen: Sequence[str], lora: Lora, seed: int, *, weights: bool = True) -> None:
    """Freezes the model and puts adapters on it, in place: frozen ones from folders, then the one to train.

    Adapter weights are float32 whatever the model's dtype; fresh ones are drawn with `seed`. A model on the meta device
    takes none (`weights`).

    Raises:
        ImportError: peft is not installed.
        FileNotFoundError: a folder, or its safetensors weights, are not there.
        ValueError: an adapter of another model or of another kind, or one on the head or the embeddings.
    """
    _use_training_kernels(model)
    saved = _stack(model, frozen, lora, seed)
    for place, (name, tensors) in enumerate(saved.items() if weights else ()):
        _peft().set_peft_model_state_dict(model, tensors, adapter_name=name)
        if place == 0:  # those above it were trained on the model with the ones below merged
            _warn_of_another_base(model, name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{TRAINABLE}." in name and ".lora_" in name)
    for layer in _layers(model):
        layer._active_adapter = [name for name in model.peft_config if name in layer.lora_A]


def has_adapter(model: nn.Module) -> bool:
    """Whether the model carries an adapter to train."""
    return TRAINABLE in getattr(model, "peft_config", {})


@contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode and without the adapter that is trained; afterwards all is as it was.

    The adapters below it stay on. peft's own switch is not used: it also changes what requires a gradient.
    """
    training = [part for part in module.modules() if part.training]
    active = [(layer, layer._active_adapter) for layer in _layers(module)]
    try:
        for part in training:
            vars(part)["training"] = False  # what eval() does, but that took 10 ms in a model of 32 layers
        for layer, names in active:
            layer._active_adapter = [name for name in names if name != TRAINABLE]
        yield
    finally:
        for layer, names in active:
            layer._active_adapter = names
        for part in training:
            vars(part)["training"] = True


def merged(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model without adapters, on the meta device, and its weights with all adapters added: float32, on the CPU.

    Quantised weights are taken as the adapters were trained on them, that is dequantised. `model` stays as it is.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config).float()
    plain.generation_config = copy.deepcopy(model.generation_config)
    sums: dict[int, Tensor] = {}  # by identity, so that a tied weight stays one tensor
    weights = {}
    for name in plain.state_dict():
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        tensor = getattr(getattr(layer, "base_layer", layer), leaf)
        if id(tensor) not in sums:
            sums[id(tensor)] = _merged(layer, leaf)
        weights[name] = sums[id(tensor)]
    return plain, weights


def write_adapter(model: PreTrainedModel, folder: Path, base: str | None) -> None:
    """The trained adapter in peft's format. It is relative to the model with the frozen adapters below it on."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=TRAINABLE, save_embedding_layers=False)
    folder.mkdir(parents=True)
    tensors = {PREFIX + name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config: Any = copy.deepcopy(model.peft_config[TRAINABLE])
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set is written in another order by each process
    config.inference_mode, config.base_model_name_or_path, config.task_type = True, base, "CAUSAL_LM"
    config.save_pretrained(str(folder))


@torch.no_grad()
def base_fingerprint(module: nn.Module) -> str:
    """A hash of the frozen weights: name, shape, dtype and up to 64 values of each. Cheap, and telling."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            # a sharded weight is gathered, so that the hash does not depend on the number of processes
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            flat = whole.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].contiguous().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def mistaken_for_a_model(folder: str) -> ValueError:
    """What to say where an adapter is given in place of a model."""
    return ValueError(
        f"{folder} is an adapter ({CONFIG}), no model: give the model it belongs to in policy.model, and the adapter "
        "in policy.adapters (frozen, below a new one) or policy.lora.start (trained further); or give the merged model"
    )


def quantization(kind: Literal["4bit", "8bit"] | None, dtype: torch.dtype) -> dict[str, Any]:
    """Options of from_pretrained for weights in NF4 with quantised scales, or in int8; the head stays as it is.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: int8 without a GPU.
    """
    if kind is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("quantize needs bitsandbytes: pip install bitsandbytes, or drop quantize")
    if kind == "8bit":
        if not torch.cuda.is_available():
            raise ValueError(
                "quantize 8bit needs a GPU: on a CPU bitsandbytes rounds activations to int8 in evaluation and "
                "not in training, so a policy would differ from its own reference. Take 4bit, or drop quantize"
            )
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)}


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'rsa_lightning[lora]'") from None
    return peft


def _layers(module: nn.Module) -> list[Any]:
    """The layers that carry adapters. Not by hasattr, which is slow on modules: a reference asks in every step."""
    return [part for part in module.modules() if "lora_A" in part._modules]


def _use_training_kernels(model: nn.Module) -> None:
    """bitsandbytes has a CPU kernel for evaluation only that rounds to bfloat16 and repacks the weights in place.

    A reference is read in evaluation mode and compared with a policy in training, so both must take one way.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _new_config(lora: Lora) -> Any:
    return _peft().LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )


def adapter_config(folder: str) -> Any:
    """The configuration of a saved adapter, without dropout."""
    peft = _peft()
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG}")
    if not (Path(folder) / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}. Pickled .bin weights are refused: save it again with peft"
        )
    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}/{CONFIG} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"{folder} is a {config.peft_type} adapter: only LoRA is supported")
    found = [name for name in _VARIANTS if getattr(config, name, None)]
    found += ["bias"] if config.bias != "none" else []
    found += ["init_lora_weights"] if config.init_lora_weights not in _PLAIN_STARTS else []
    if found:
        raise ValueError(
            f"{folder} is no plain LoRA adapter ({', '.join(found)} in {CONFIG}): merge it with peft's "
            "merge_and_unload and give the merged model, or train it again without"
        )
    config.inference_mode, config.lora_dropout, config.init_lora_weights = False, 0.0, True
    return config


def _stack(model: PreTrainedModel, frozen: Sequence[str], lora: Lora, seed: int) -> dict[str, dict[str, Tensor]]:
    """Puts all adapters on the model, with fresh weights; returns the saved ones, which fit, by adapter."""
    head, saved = model.get_output_embeddings(), {}
    for index, folder in enumerate(frozen):
        _inject(model, head, f"frozen_{index}", adapter_config(folder), folder)
        saved[f"frozen_{index}"] = _saved(model, f"frozen_{index}", Path(folder))
    config = _new_config(lora) if lora.start is None else adapter_config(lora.start)
    config.lora_dropout = lora.dropout
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # here: frozen adapters below must not change how the new one starts
        _inject(model, head, TRAINABLE, config, lora.start)
    if lora.start is not None:
        saved[TRAINABLE] = _saved(model, TRAINABLE, Path(lora.start))
    return saved


def _inject(model: PreTrainedModel, head: Any, name: str, config: Any, folder: str | None) -> None:
    """Adds one adapter to those the model has, with fresh weights; `folder` is where its settings come from."""
    asked, asked_by = config.target_modules, f"the adapter {folder}" if folder else "lora.target_modules"
    try:
        with warnings.catch_warnings():
            # further adapters, and layers tied to others: both are wanted, and the latter refused below
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            _peft().inject_adapter_in_model(config, model, name)
    except (ValueError, NotImplementedError, TypeError, re.error) as error:
        reason = first_line(error)[:200]
        linear = {path.split(".")[-1] for path, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise ValueError(
            f"{asked_by} ({_shown(asked)}) does not fit {type(model).__name__}: {reason} "
            f"Its linear layers: {', '.join(sorted(linear - {'lm_head', 'embed_out'})) or 'none'}"
        ) from error
    for path, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None and (base is head or isinstance(base, nn.Embedding)):
            raise ValueError(
                f"{asked_by} puts an adapter on {path}: the head and the embeddings stay as they are, because policy "
                "and reference share them. Name other layers; all-linear is every linear layer but the head"
            )
    for layer in _layers(model):
        for part in (layer.lora_A, layer.lora_B):
            if name in part:
                part[name].float()


def _saved(model: PreTrainedModel, name: str, folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, which fit the adapter of this name. Raises ValueError."""
    from peft import get_peft_model_state_dict

    try:
        found = {key.removeprefix(PREFIX): value for key, value in load_file(folder / WEIGHTS).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error})") from error
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for key in sorted(wanted.keys() ^ found.keys()):
        where = "has no place in the model" if key in found else "is missing in the adapter"
        raise ValueError(f"{folder} is an adapter of another model: {key} {where}. Give the model it was trained on")
    for key, value in sorted(found.items()):
        if value.shape != wanted[key].shape:
            raise ValueError(
                f"{folder} is an adapter of another model: {key} is {tuple(value.shape)}, the model needs "
                f"{tuple(wanted[key].shape)}. Give the model it was trained on"
            )
    return found


def _warn_of_another_base(model: PreTrainedModel, name: str) -> None:
    theirs, mine = model.peft_config[name].base_model_name_or_path, model.name_or_path
    if theirs and mine and Path(theirs).resolve() != Path(mine).resolve():
        log.warning("the adapter %s says that it was trained on %s; here it is on %s", name, theirs, mine)


def _shown(targets: Any) -> str:
    return targets if isinstance(targets, str) else ", ".join(sorted(targets or []))


@torch.no_grad()
def _merged(layer: Any, leaf: str) -> Tensor:
    """One weight of a layer with all its adapters added."""
    base = getattr(layer, "base_layer", layer)
    value = getattr(base, leaf)
    if hasattr(value, "quant_state") or hasattr(value, "SCB"):
        from peft.utils.integrations import dequantize_module_weight

        value = dequantize_module_weight(base)
    value = value.detach().cpu()
    value = value.float() if value.is_floating_point() else value
    if leaf == "weight" and hasattr(layer, "lora_A"):
        for name in layer.active_adapters:
            value = value + layer.get_delta_weight(name).float().cpu()
    return value
