"""What a GPU holds and sends in a training step of a model of any depth.

All blocks of a transformer are alike, so steps of two shallow models say what every further block adds: exactly, which
tests check against whole depths. Peaks that were measured hold the rest (tests/test_dryrun.py).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch.distributed as dist
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from rsa_lightning.dryrun.fake_step import Footprint, Work, take_step
from rsa_lightning.dryrun.meter import KINDS, Kind, Mark
from rsa_lightning.models import PolicySpec
from rsa_lightning.parallel.strategy import FSDP2
from rsa_lightning.policy_stage import PolicyStage

SHALLOW = (4, 5)  # depths that are run where the model is deeper: two blocks at either end, and one more between them


@contextlib.contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """A process group of which this is the first of `count` processes, and in which nothing is sent."""
    if dist.is_initialized():
        raise RuntimeError("a dry run makes a process group of its own, and this process is in one: run it alone")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # what DTensor remembers of a mesh names this process its first; a mesh that looks alike would be taken for it
        _clear_sharding_prop_cache()


def footprint(
    stage: PolicyStage, spec: PolicySpec, strategy: Strategy, precision: Precision, work: Work, world_size: int
) -> Footprint:
    """Of a step of a stage whose policy and reference have the architecture of `spec`, a configuration.

    Args:
        strategy: FSDP2, arranged for the world here; any other is taken to hold everything on each process, and to
            reduce gradients as DistributedDataParallel does.

    Raises:
        ValueError: replicas do not divide the processes, or something of the stage is not known to a dry run.
    """
    depth = depth_of(spec)
    with fake_processes(world_size):
        if isinstance(strategy, FSDP2):
            if strategy.tensor_parallel > 1:
                raise ValueError(
                    f"a dry run does not know strategy.tensor_parallel {strategy.tensor_parallel} yet: set it to 1"
                )
            strategy.arrange(world_size, "cpu")
        taken = partial(take_step, stage, strategy=strategy, precision=precision, work=work, world_size=world_size)
        if depth <= SHALLOW[1]:
            return taken(spec)[0]
        (less, _), (more, alike) = (taken(with_depth(spec, blocks)) for blocks in SHALLOW)
        return _deepened(less, more, depth) if alike and _one_kind(spec) else taken(spec)[0]


# ---- depth -----------------------------------------------------------------------------------------------------------


def depth_of(spec: PolicySpec) -> int:
    assert spec.config is not None
    return int(spec.config["num_hidden_layers"])


def _one_kind(spec: PolicySpec) -> bool:
    """Whether the configuration says of all blocks the same: windows of attention may differ where shapes do not."""
    full = depth_of(spec)
    lists = [value for value in (spec.config or {}).values() if isinstance(value, list) and len(value) == full]
    return all(value == value[:1] * full for value in lists)


def with_depth(spec: PolicySpec, depth: int) -> PolicySpec:
    """The same architecture with fewer blocks; lists with an entry for each are cut."""
    full = depth_of(spec)
    cut = {k: v[:depth] if isinstance(v, list) and len(v) == full else v for k, v in (spec.config or {}).items()}
    return dataclasses.replace(spec, config={**cut, "num_hidden_layers": depth})


def _deepened(less: Footprint, more: Footprint, depth: int) -> Footprint:
    """What every block adds, as often as there are more of them.

    Blocks between the ends are left out: what is held while one is computed lies between what is held at both ends.
    """

    def further(a: float, b: float) -> float:
        return b + (depth - SHALLOW[1]) * (b - a)

    def places(found: Footprint, blocks: int) -> dict[tuple[str, str, int], dict[Kind, int]]:
        """Of the two blocks at either end: phase, which end, index from there."""
        near = {(mark.phase, "first", mark.block): held for mark, held in found.peaks.items() if mark.block < 2}
        far = {(m.phase, "last", m.block - blocks): held for m, held in found.peaks.items() if m.block >= blocks - 2}
        return near | far

    before, after = places(less, SHALLOW[0]), places(more, SHALLOW[1])
    peaks = {
        Mark(phase, index if end == "first" else depth + index): {
            kind: round(further(before[phase, end, index][kind], held[kind])) for kind in KINDS
        }
        for (phase, end, index), held in after.items()
    }
    calls = {call: further(less.calls.get(call, 0), more.calls.get(call, 0)) for call in less.calls | more.calls}
    sizes = {n: round(further(getattr(less, n), getattr(more, n))) for n in ("trained", "total", "in_blocks")}
    return Footprint(peaks, calls, **sizes, head=more.head)
