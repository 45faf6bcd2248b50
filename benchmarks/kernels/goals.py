"""What the operators should reach, as data, and whether they did where it was measured."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rsa_kernels import ERM, KL, CVaR, RiskMeasure

from benchmarks.kernels.cases import CPU_MAIN, GPU_MAIN, Spec
from benchmarks.kernels.results import EXTRA, TIME, Record

GB = 1e9
BOTH_WAYS = "forward+backward"
CPU, GPU = "CPU", "H200-class GPU"
H200_CLASS = (9, 10)  # compute capability: the generation of the H100 and H200, and the next for data centres
CPU_THREADS = (1, 2)
DTYPE = {CPU: "float32", GPU: "bfloat16"}
FLATNESS = 1.05  # of memory that should not grow with the number of tokens

KL_RISK, ERM_RISK, TAILS = KL(), ERM(5.0), (CVaR(0.97), CVaR(0.05))


class Goal(NamedTuple):
    """A metric of a provider is at most `limit`: as it is, times that of another provider, or its own elsewhere."""

    device: str
    threads: int | None
    spec: Spec
    provider: str
    mode: str
    metric: str
    limit: float
    relative_to: str = ""
    than_at: Spec | None = None  # a shape at which the same provider is the measure
    piece: str = ""  # of `python -m benchmarks gpu` that measures it

    def __str__(self) -> str:
        risk = "" if self.spec.op == "nested" else f" {self.spec.risk}"
        what = f"{self.provider}{risk} at {self.spec.size}, {self.mode}: {self.metric.replace('_', ' ')}"
        limit = f"<= {self.limit / GB:g} GB" if not self.relative_to and not self.than_at else f"<= {self.limit:.3g} x"
        other = self.relative_to or (f"at {self.than_at.size}" if self.than_at else "")
        where = f"{self.device}, {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else self.device
        return f"{where}: {what} {limit} {other}".strip()


class Verdict(NamedTuple):
    goal: Goal
    measured: float | None
    device: str  # on which it was measured

    @property
    def word(self) -> str:
        return "not measured" if self.measured is None else "met" if self.measured <= self.goal.limit else "missed"


def goals() -> list[Goal]:
    return [*_on_a_gpu(), *(goal for threads in CPU_THREADS for goal in _on_a_cpu(threads))]


def _on_a_gpu() -> Iterable[Goal]:
    def trainable(risk: RiskMeasure) -> Spec:
        return Spec("linear", GPU_MAIN, risk, "trainable")

    def time(spec: Spec, provider: str, limit: float, other: str, piece: str, mode: str = BOTH_WAYS) -> Goal:
        return Goal(GPU, None, spec, provider, mode, TIME, limit, other, piece=piece)

    def extra(spec: Spec, provider: str, gb: float, piece: str) -> Goal:
        return Goal(GPU, None, spec, provider, BOTH_WAYS, EXTRA, gb * GB, piece=piece)

    for risk, limit in ((KL_RISK, 1.20), (ERM_RISK, 1.20), *((tail, 1.40) for tail in TAILS)):
        yield time(trainable(risk), "triton-cache", limit, "gemms", "linear")
        yield extra(trainable(risk), "triton-cache", 4.5, "linear")
    yield time(trainable(KL_RISK), "triton-recompute", 1.75, "gemms", "linear")
    yield extra(trainable(KL_RISK), "triton-recompute", 1.3, "linear")
    few, many = (Spec("linear", (n, *GPU_MAIN[1:]), KL_RISK, "trainable") for n in (4096, 16384))
    flat = Goal(GPU, None, many, "triton-recompute", BOTH_WAYS, EXTRA, FLATNESS, than_at=few, piece="growth")
    yield flat
    frozen = Spec("linear", GPU_MAIN, KL_RISK, "frozen")
    for provider, limit in (("triton-frozen-ratio", 0.95), ("triton-frozen", 1.15)):
        yield time(frozen, provider, limit, "gemms", "heads")
        yield extra(frozen, provider, 1.3, "heads")
    for mode in ("forward", BOTH_WAYS):  # 80 % of the bandwidth of a copy
        yield time(Spec("logits", (GPU_MAIN[0], GPU_MAIN[2]), KL_RISK), "triton", 1 / 0.8, "copy", "rows", mode)
    for mode in ("forward, graph", f"{BOTH_WAYS}, graph"):
        yield time(Spec("nested", (8192, 512)), "triton", 1.5, "copy", "rows", mode)
    for risk, times in ((KL_RISK, 1.5), *((tail, 1.8) for tail in TAILS)):
        yield time(trainable(risk), "triton-cache", 1 / times, "naive", "linear")
        yield Goal(GPU, None, trainable(risk), "triton-cache", BOTH_WAYS, EXTRA, 1 / 6, "naive", piece="linear")
    yield time(trainable(KL_RISK), "triton-cache", 1.0, "liger-dpo", "linear")


def _on_a_cpu(threads: int) -> Iterable[Goal]:
    for risk in (KL_RISK, ERM_RISK, *TAILS):
        spec = Spec("linear", CPU_MAIN, risk, "trainable")
        # the definition of CVaR sorts
        yield Goal(CPU, threads, spec, "chunked-auto", BOTH_WAYS, TIME, 0.6, "naive")
        yield Goal(CPU, threads, spec, "chunked-auto", BOTH_WAYS, EXTRA, 1 / 3, "naive")


# ---- verdicts --------------------------------------------------------------------------------------------------------


def device_class(environment: dict[str, Any]) -> str:
    """What a goal calls the device of a run."""
    if "capability" not in environment:
        return CPU
    return GPU if environment["capability"][0] in H200_CLASS else environment["device"]


def verdicts(runs: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Every goal, with what the runs measured. A later run replaces what an earlier one found."""
    found: dict[tuple, tuple[Record, str]] = {}
    for run in runs:
        where = device_class(run["environment"])
        for record in run["records"]:
            threads = record["threads"] if where == CPU else None
            if record["dtype"] == DTYPE.get(where) or record["op"] == "nested":
                found[(where, threads, *_identity(record))] = record, run["environment"]["device"]
    return [_verdict(goal, found) for goal in goals()]


def _identity(record: Record) -> tuple:
    names = ("op", "shape", "risk", "head", "provider", "mode", "metric")
    return (*(record[name] for name in names), record.get("relative_to", ""))


def _verdict(goal: Goal, found: dict[tuple, tuple[Record, str]]) -> Verdict:
    def value(spec: Spec, provider: str, relative_to: str = "") -> tuple[float, str] | None:
        risk = "" if spec.op == "nested" else str(spec.risk)
        case = (spec.op, spec.size, risk, spec.head, provider, goal.mode, goal.metric, relative_to)
        record = found.get((goal.device, goal.threads, *case))
        return None if record is None else (record[0]["q50"], record[1])

    mine: tuple[float, str] | None
    other: tuple[float, str] | None = (1.0, "")
    if goal.metric == TIME:  # relative times are those of samples a moment apart
        mine = value(goal.spec, goal.provider, goal.relative_to)
    else:
        mine = value(goal.spec, goal.provider)
        if goal.than_at is not None:
            other = value(goal.than_at, goal.provider)
        elif goal.relative_to:
            other = value(goal.spec, goal.relative_to)
    if mine is None or other is None or other[0] == 0:
        return Verdict(goal, None, "")
    return Verdict(goal, mine[0] / other[0], mine[1])


def as_records(found: Iterable[Verdict]) -> list[Record]:
    return [
        {"goal": str(v.goal), "limit": v.goal.limit, "measured": v.measured, "verdict": v.word, "device": v.device}
        for v in found
    ]


def goals_table(found: Iterable[Verdict]) -> Table:
    table = Table(title="goals")
    for name in ("goal", "measured", "verdict", "on"):
        table.add_column(name)
    for verdict in found:
        value = "–" if verdict.measured is None else _measured(verdict)
        table.add_row(str(verdict.goal), value, verdict.word, verdict.device)
    return table


def _measured(verdict: Verdict) -> str:
    assert verdict.measured is not None
    absolute = not verdict.goal.relative_to and not verdict.goal.than_at
    return f"{verdict.measured / GB:.2f} GB" if absolute else f"{verdict.measured:.3f} x"
