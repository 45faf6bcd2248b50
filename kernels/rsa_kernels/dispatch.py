"""Which implementation runs, and why another one cannot. Reasons are sentences that a user can act on."""

import importlib.util
import logging
import os
import sys
from typing import Literal, get_args

import torch
from torch import Tensor

from rsa_kernels.risk import ERM, KL, CVaR, RiskMeasure

Impl = Literal["auto", "naive", "chunked", "triton"]

FUSED: tuple[type[RiskMeasure], ...] = (KL, CVaR, ERM)  # measures that the Triton kernels know
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Read once: a compiler cannot trace them, and kernels are interpreted or not from their import on.
_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

_log = logging.getLogger("rsa_kernels")
_logged: set[str] = set()


def resolve(impl: str, x: Tensor, risk: RiskMeasure | None) -> Literal["naive", "chunked", "triton"]:
    """The implementation that runs for tensors like `x`: a name is binding, "auto" chooses and logs why, once.

    "auto" is "triton" on GPUs where it can run, "chunked" elsewhere. The environment variable RSA_KERNELS_IMPL replaces
    "auto" only.

    Raises:
        ValueError: no implementation has that name.
        RuntimeError: it exists but cannot run here.
    """
    origin = "impl"
    if impl == "auto":
        impl = os.environ.get("RSA_KERNELS_IMPL") or "auto"
        origin = "impl" if impl == "auto" else "RSA_KERNELS_IMPL"
    if impl not in get_args(Impl):
        raise ValueError(f"{origin} is one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "naive" or impl == "chunked":
        return impl  # type: ignore[return-value]
    reason = why_not_triton(x, risk)
    if impl == "triton":
        if reason is not None:
            mend = (
                "Use impl='auto' or impl='chunked'." if origin == "impl" else f"Unset {origin}, or set it to chunked."
            )
            raise RuntimeError(f"{origin}='triton' cannot run here: {reason}. {mend}")
        return "triton"
    if reason is None and x.device.type == "cpu":
        reason = "the interpreter is for tests, and runs when it is asked for by name"
    chosen: Literal["chunked", "triton"] = "triton" if reason is None else "chunked"
    name = "risk=None" if risk is None else type(risk).__name__
    _log_once(f"impl='auto' is '{chosen}' for {name} on {x.device.type}" + ("" if reason is None else f": {reason}"))
    return chosen


def why_not_triton(x: Tensor, risk: RiskMeasure | None) -> str | None:
    """Why the Triton kernels cannot take tensors like `x` and this measure; None if they can."""
    if sys.platform != "linux":
        return f"Triton runs on Linux, this is {sys.platform}"
    if not _INSTALLED:
        return "Triton is not installed (pip install 'triton>=3.6')"
    if x.device.type == "cpu" and not INTERPRETED:
        return "the tensors are on cpu, where the kernels run in Triton's interpreter only (TRITON_INTERPRET=1)"
    if x.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {x.device.type}, for which there are no kernels"
    if x.dtype not in FUSED_DTYPES:
        return f"the kernels take {', '.join(map(_name, FUSED_DTYPES))}, not {_name(x.dtype)}"
    if risk is not None and type(risk) not in FUSED:
        return f"no kernel knows the risk measure {type(risk).__name__}"
    if x.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _log_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        _log.info(message)
