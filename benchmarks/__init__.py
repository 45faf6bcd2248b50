"""Benchmarks run from a checkout: `rsa_kernels` is found beside them where it is not installed."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("rsa_kernels") is None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
