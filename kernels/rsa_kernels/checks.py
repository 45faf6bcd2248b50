"""What a call of an operator must look like: errors name the argument, what it is, and the mend."""

import sys
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from rsa_kernels.pairs import RowOptions
from rsa_kernels.risk import RiskMeasure, number

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(**named: Any) -> None:
    """All are whole tensors on one device.

    Raises:
        TypeError: something is no tensor, or a DTensor.
        ValueError: devices differ.
    """
    for name, value in named.items():
        if not isinstance(value, Tensor):
            is_module = isinstance(value, torch.nn.Module)
            mend = f": pass its {name.removeprefix('ref_')}" if is_module else ""
            raise TypeError(f"{name} is a torch.Tensor, got {type(value).__qualname__}{mend}")
        if _is_dtensor(value):
            raise TypeError(
                f"{name} is a DTensor, a shard of the head: call the operator inside the forward of the module that "
                "owns the weight, where it is whole (full_tensor() would give silently wrong gradients)"
            )
    if len({value.device for value in named.values()}) > 1:
        places = ", ".join(f"{name} on {value.device}" for name, value in named.items())
        raise ValueError(f"all tensors are on one device, got {places}: move them with .to(device)")


def floats(**named: Tensor) -> None:
    """The dtypes that operators compute in or convert from.

    Raises:
        ValueError: a tensor has another one.
    """
    for name, tensor in named.items():
        if tensor.dtype not in FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(f"the dtype of {name} is one of {names}, got {tensor.dtype}: convert it")


def options(
    risk: Any, scale: Any, ref_scale: Any, softcap: Any, ref_softcap: Any, ignore_index: Any, entropy: Any
) -> RowOptions:
    """In Python's own types: NumPy's have another repr.

    Raises:
        ValueError: one of them is not what it should be.
    """
    if risk is not None and not isinstance(risk, RiskMeasure):
        raise ValueError(f"risk is a RiskMeasure such as CVaR(tail=0.97), or None; got {risk!r}")
    scales = _positive("scale", scale), _positive("ref_scale", ref_scale)
    caps = (
        None if softcap is None else _positive("softcap", softcap),
        None if ref_softcap is None else _positive("ref_softcap", ref_softcap),
    )
    if not _is_integer(ignore_index):
        raise ValueError(f"ignore_index is an integer, got {ignore_index!r}")
    return RowOptions(risk, *scales, *caps, int(ignore_index), bool(entropy))


def vocabulary(valid_vocab: Any, widths: tuple[int, ...], sizes: str) -> int:
    """The number of columns that exist in every model.

    Raises:
        ValueError: nobody said which of different widths is padding, or there are fewer columns than that.
    """
    if valid_vocab is None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"policy and reference share one vocabulary, but {sizes}: where the surplus is padding, pass the "
                "size of the vocabulary as valid_vocab"
            )
        return widths[0]
    if not _is_integer(valid_vocab) or not 0 < int(valid_vocab) <= min(widths):
        raise ValueError(
            f"valid_vocab is an integer from 1 to {min(widths)}, the columns there are, got {valid_vocab!r}"
        )
    return int(valid_vocab)


def ratio(ratio: Any, labels: Tensor, risk: RiskMeasure | None) -> Tensor | None:
    """A ratio per position in fp32, without gradient.

    Raises:
        ValueError: there is no risk, or it is neither a number nor floats of the labels' shape.
    """
    if ratio is None:
        return None
    if risk is None:
        raise ValueError("risk_over_logp is about the risk, but risk=None: leave it out")
    if not isinstance(ratio, Tensor):
        value = number("risk_over_logp", ratio)
        return torch.full(labels.shape, value, dtype=torch.float32, device=labels.device)
    if ratio.shape != labels.shape or not ratio.is_floating_point() or ratio.device != labels.device:
        raise ValueError(
            f"risk_over_logp is a number or floats [N] = {shape(labels)} on {labels.device}, got {ratio.dtype} "
            f"{shape(ratio)} on {ratio.device}"
        )
    return ratio.detach().float()


def budget(workspace_bytes: Any) -> int | None:
    """Bytes, or None for the default.

    Raises:
        ValueError: it is no positive integer.
    """
    if workspace_bytes is None:
        return None
    if not _is_integer(workspace_bytes) or workspace_bytes <= 0:
        raise ValueError(
            f"workspace_bytes is a positive integer, a number of bytes, got {workspace_bytes!r}; None is the default "
            "of the device"
        )
    return int(workspace_bytes)


def labels_inside(vocabulary: int, labels: Tensor, options: RowOptions) -> None:
    """Dtype, and on a CPU range.

    Raises:
        ValueError: they are not int64, or a label is in no column.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are int64 token ids, got {labels.dtype}: pass labels.long()")
    if not readable(labels):
        return
    outside = (labels != options.ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        position = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"label {int(labels.flatten()[position])} at position {position} is outside the vocabulary [0, "
            f"{vocabulary}); positions to leave out carry ignore_index = {options.ignore_index}"
        )


def model(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, prefix: str) -> None:
    """Shapes of hidden states and of the head that reads them.

    Raises:
        ValueError: they do not fit.
    """
    fits = (
        hidden.ndim == 2
        and weight.ndim == 2
        and hidden.shape[1] == weight.shape[1]
        and labels.shape == hidden.shape[:1]
    )
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        bias_shape = "" if bias is None else f", {prefix}bias {shape(bias)}"
        raise ValueError(
            f"linear_token_risk wants {prefix}hidden [N, H], {prefix}weight [V, H], {prefix}bias [V] and labels [N], "
            f"got {prefix}hidden {shape(hidden)}, {prefix}weight {shape(weight)}{bias_shape}, labels {shape(labels)}"
            + _mend(hidden, weight, labels)
        )


def _mend(hidden: Tensor, weight: Tensor, labels: Tensor) -> str:
    if hidden.ndim == 3 and labels.shape == hidden.shape[:2]:
        return ": pick the scored positions with a mask, hidden[mask] and labels[mask]"
    if hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[0]:
        return ": the weight is transposed, nn.Linear keeps it as [V, H]"
    return ""


def dtypes(model: tuple[Tensor | None, ...], prefix: str) -> None:
    """One dtype of hidden, weight and bias.

    Raises:
        ValueError: there are several.
    """
    found = {t.dtype for t in model if t is not None}
    if len(found) > 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in found))
        raise ValueError(
            f"{prefix}hidden, {prefix}weight and {prefix}bias share one dtype, got {names}: cast them, or use autocast"
        )


def boundaries(step_risk: Tensor, cu_seqlens: Tensor) -> None:
    """Shapes and dtypes of packed sequences, and on a CPU whether boundaries rise.

    Raises:
        ValueError: something does not fit.
    """
    if step_risk.ndim != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"nested_risk wants step_risk [N] and cu_seqlens [S+1], got {shape(step_risk)} and {shape(cu_seqlens)}"
        )
    if not step_risk.is_floating_point() or cu_seqlens.is_floating_point():
        raise ValueError(f"step_risk are floats and cu_seqlens integers, got {step_risk.dtype} and {cu_seqlens.dtype}")
    if not readable(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != step_risk.shape[0] or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens rises from 0 to N = {step_risk.shape[0]}, got {_shorten(bounds)}; lengths become such "
            "boundaries with torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
        )


def forest(values: Tensor, probs: Tensor, parents: Tensor) -> None:
    """Shapes and dtypes of a forest.

    Raises:
        ValueError: something does not fit.
    """
    if values.ndim != 1 or not values.shape == probs.shape == parents.shape:
        raise ValueError(
            "nested_risk_tree wants values, probs and parents [n], got "
            f"{shape(values)}, {shape(probs)} and {shape(parents)}"
        )
    for name, tensor in (("values", values), ("probs", probs)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} are float32 or float64, got {tensor.dtype}")
    if parents.dtype != torch.int64:
        raise ValueError(f"parents are int64 node numbers, -1 at a root, got {parents.dtype}")


def discount(value: object) -> float:
    """A float in [0, 1].

    Raises:
        ValueError: it is not.
    """
    value = number("discount", value)
    if not 0 <= value <= 1:
        raise ValueError(f"discount lies in [0, 1], got {value}")
    return value


def _positive(name: str, value: object) -> float:
    value = number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is a positive number, got {value}")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_dtensor(tensor: Tensor | None) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without the module there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without a device sync, and outside of a compiler's trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _shorten(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"{str(numbers[:4])[:-1]}, ..., {str(numbers[-3:])[1:]}"
