"""Relabelling: pairs that are swapped, given offsets or left out by their safety labels, before anything else.

A relabelling is a frozen dataclass, so that it travels in a YAML file and names prepared data in the cache.
"""

import abc
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, final

from rsa_lightning.data.records import FormatError, PreferencePair, Record, RowDefect


class Relabel(abc.ABC):
    """Maps a preference pair to the pair that is trained on. Subclasses are frozen dataclasses of plain values."""

    @abc.abstractmethod
    def __call__(self, pair: PreferencePair) -> PreferencePair:
        """The pair to train on.

        Raises:
            RowDefect: there is none; "both_unsafe" and other names in `quality.INTENDED` are counted, and no fault.
            FormatError: the pair lacks what is needed.
        """


@final
@dataclass(frozen=True)
class SafeDPO(Relabel):
    """SafeDPO (arXiv:2505.20065): one step of DPO on helpfulness pairs from which unsafe preferences are taken out.

    A pair whose chosen response is safe stays; one whose rejected response alone is safe is swapped; one with two
    unsafe responses is left out. With u = 1 for an unsafe response, after the swap,

        loss = −log sigmoid(β (lr_w − lr_l) − (u_l − u_w) · margin),        offset = margin · (u_l − u_w)

    so a safe response must beat an unsafe one by `margin` more before the loss lets go. Of the relabelled pairs no
    unsafe response is ever the preferred one, which is why the margin leaves the optimum where it is (the paper's
    Proposition 4.4); what it changes is how far training gets. The loss is plain DPO.

    Args:
        margin: nats, at least 0; the paper's Δ. It uses 10, and reports harm at 50.
    """

    margin: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"SafeDPO margin is a number of nats, at least 0, got {self.margin}")

    def __call__(self, pair: PreferencePair) -> PreferencePair:
        """The pair, swapped where that makes its chosen response the safe one.

        Raises:
            RowDefect: both responses are unsafe.
            FormatError: a safety label is missing, or the row has a target or an offset of its own.
        """
        if pair.chosen_safe is None or pair.rejected_safe is None:
            raise FormatError(
                "SafeDPO needs safety labels of both responses: give columns chosen_safe and rejected_safe (format "
                "trl), take format pku, or remove relabel"
            )
        if pair.target != 1.0 or pair.offset != 0.0:
            raise FormatError("SafeDPO sets target and offset: remove these columns, or relabel")
        if not (pair.chosen_safe or pair.rejected_safe):
            raise RowDefect("both_unsafe")
        kept = pair if pair.chosen_safe else swapped(pair)
        return replace(kept, offset=0.0 if kept.rejected_safe else self.margin)


def swapped(pair: PreferencePair) -> PreferencePair:
    """The pair with its responses exchanged, and their labels and costs with them."""
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_safe=pair.rejected_safe,
        rejected_safe=pair.chosen_safe,
        chosen_cost=pair.rejected_cost,
        rejected_cost=pair.chosen_cost,
    )


def relabelled(records: tuple[Record, ...], relabel: Relabel | None) -> tuple[Record, ...]:
    """The records as they are trained on. Raises FormatError at a rated response, RowDefect and FormatError as it."""
    if relabel is None:
        return records
    for record in records:
        if not isinstance(record, PreferencePair):
            raise FormatError(f"{type(relabel).__name__} relabels pairs, and this row is a rated response: remove it")
    return tuple(relabel(record) for record in records if isinstance(record, PreferencePair))


def as_relabel(value: "Relabel | str | Mapping[str, Any] | None") -> Relabel | None:
    """A relabelling from what a configuration says: a class name or path, or {class_path, init_args}.

    Raises:
        ValueError: there is no such class, or it does not take these arguments.
    """
    if value is None or isinstance(value, Relabel):
        return value
    setting = {"class_path": value} if isinstance(value, str) else dict(value)
    name, arguments = str(setting.pop("class_path", "")), setting.pop("init_args", None) or {}
    kind = _named(name)
    if setting or not (isinstance(kind, type) and issubclass(kind, Relabel) and is_dataclass(kind)):
        raise ValueError(f"relabel is SafeDPO or {{class_path: NAME, init_args: {{...}}}}, got {value!r}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"relabel {name}: {error}") from error


def _named(name: str) -> Any:
    """The relabelling of that name here, or the object of that dotted name; None where there is none."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module or __name__), attribute, None)
    except ImportError:
        return None
