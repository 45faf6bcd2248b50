"""A head whose vocabulary is spread over processes gives what the whole head gives in one."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from rsa_kernels import ERM, KL, CVaR, RiskMeasure, linear_token_risk
from rsa_kernels.naive import linear_token_risk as definition
from rsa_kernels.pairs import RowOptions
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsa_lightning.parallel.vocab import vocab_parallel_token_risk
from rsa_lightning.parallel.vocab_rows import Across, rows_forward

V, H, R, N = 53, 8, 6, 24
RISKS = [None, KL(), ERM(-1.0), ERM(0.1), ERM(0.05), ERM(5.0), CVaR(0.01), CVaR(0.1), CVaR(0.5), CVaR(0.97), CVaR(1.0)]
SPLITS = {"even": [0, 26, 53], "uneven": [0, 5, 37, 53], "one empty": [0, 20, 20, 50, 53]}


class Problem(NamedTuple):
    """Whole heads, and upstream gradients of logp, risk and kl."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    upstream: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()}
        return Problem(cast, self.options, self.upstream)


def plain() -> Problem:
    """Random heads; labels at both ends of every shard, two rows ignored, one of them nan."""
    draw = torch.Generator().manual_seed(3)
    shapes = {
        "hidden": (N, H),
        "weight": (V, H),
        "ref_hidden": (N, R),
        "ref_weight": (V, R),
        "bias": (V,),
        "ref_bias": (V,),
    }
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    labels = torch.randint(V, (N,), generator=draw)
    labels[:11] = torch.tensor([0, 4, 5, 19, 20, 25, 26, 36, 37, 49, 52])
    labels[[12, 17]] = -100
    tensors["hidden"][12] = torch.nan
    return Problem(tensors | {"labels": labels}, {}, torch.randn(3, N, generator=draw, dtype=torch.float64))


def extreme() -> Problem:
    """Logits up to ±1e4, multiples of 1/16: exact in fp32, so that only the statistics are rounded."""
    problem = plain()
    scales = {"hidden": 400.0, "ref_hidden": 400.0, "weight": 64.0, "ref_weight": 64.0, "bias": 64.0, "ref_bias": 64.0}
    rounded = {name: (problem.tensors[name] * scale).round() / 4 for name, scale in scales.items()}
    return problem._replace(tensors=problem.tensors | rounded)


def absent() -> Problem:
    """Columns that are missing in both models, and some in the reference only; no label among them."""
    problem = plain()
    problem.tensors["bias"][[1, 27, 51]] = problem.tensors["ref_bias"][[1, 27, 51]] = -torch.inf
    problem.tensors["ref_bias"][[2, 30]] = -torch.inf
    return problem


def atoms() -> Problem:
    """Logits that are small integers: a handful of distinct log-ratios, each on all ranks."""
    problem = plain()
    integers = {name: t.round().clamp(-1, 1) if t.is_floating_point() else t for name, t in problem.tensors.items()}
    return problem._replace(tensors=integers)


def tempered() -> Problem:
    return plain()._replace(options={"scale": 0.7, "ref_scale": 1.3, "softcap": 5.0, "ref_softcap": 7.0})


PROBLEMS = {"plain": plain, "extreme": extreme, "absent": absent, "atoms": atoms, "tempered": tempered}


class Answer(NamedTuple):
    """Everything a call gives."""

    logp: Tensor
    ref_logp: Tensor
    risk: Tensor | None
    kl: Tensor | None
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


def answer(op: Any, problem: Problem, risk: RiskMeasure | None, rows: slice = slice(None), **options: Any) -> Answer:
    """The op on some rows of both heads, and its gradients under the problem's upstream."""
    t = {
        name: tensor[rows] if name in ("weight", "bias", "ref_weight", "ref_bias") else tensor
        for name, tensor in problem.tensors.items()
    }
    learnt = {name: t[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    args = learnt["hidden"], learnt["weight"], t["ref_hidden"], t["ref_weight"], t["labels"], risk
    stats = op(*args, bias=learnt["bias"], ref_bias=t["ref_bias"], entropy=True, **problem.options, **options)
    loss = sum(
        (given * g.to(given.dtype)).sum()
        for given, g in zip((stats.logp, stats.risk, stats.kl), problem.upstream, strict=True)
        if given is not None
    )
    loss.backward()
    detached = (None if s is None else s.detach() for s in stats)
    return Answer(*detached, *(learnt[name].grad for name in ("hidden", "weight", "bias")))


def sharded(rank: int, problem: Problem, risk: RiskMeasure | None, cuts: list[int], **options: Any) -> Answer:
    where = {"group": dist.group.WORLD, "vocab_start": cuts[rank], "vocab_size": V}
    return answer(vocab_parallel_token_risk, problem, risk, slice(cuts[rank], cuts[rank + 1]), **where, **options)


def gathered(answers: list[Answer]) -> Answer:
    """The first rank's, with the gradients of all shards."""
    weight, bias = (torch.cat([getattr(a, name) for a in answers]) for name in ("d_weight", "d_bias"))
    return answers[0]._replace(d_weight=weight, d_bias=bias)


def every(rank: int, cuts: list[int]) -> dict[Any, Answer]:
    """A rank's answers to every problem, risk and dtype."""
    cases = [(name, risk, dtype) for name in PROBLEMS for risk in RISKS for dtype in (torch.float64, torch.float32)]
    return {case: sharded(rank, PROBLEMS[case[0]]().to(case[2]), case[1], cuts) for case in cases}


@pytest.fixture(scope="module", params=SPLITS)
def answers(request: pytest.FixtureRequest) -> list[dict[Any, Answer]]:
    cuts = SPLITS[request.param]
    return on_ranks(len(cuts) - 1, every, cuts)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("risk", RISKS, ids=str)
def test_shards_equal_the_whole_head(answers, name, risk):
    ours = gathered([rank[name, risk, torch.float64] for rank in answers])
    whole = answer(linear_token_risk, PROBLEMS[name](), risk)
    for field, mine, theirs in zip(Answer._fields, ours, whole, strict=True):
        if theirs is None:
            assert mine is None, field
            continue
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=partial("{}: {}".format, field))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("risk", RISKS, ids=str)
def test_fp32_is_as_near_the_truth_as_the_definition(answers, name, risk):
    single = PROBLEMS[name]().to(torch.float32)
    ours = gathered([rank[name, risk, torch.float32] for rank in answers])
    exact, same = answer(definition, single.to(torch.float64), risk), answer(definition, single, risk)
    for field, mine, truth, plain_torch in zip(Answer._fields, ours, exact, same, strict=True):
        if truth is not None and field != "d_hidden":  # the definition has nan where an ignored row is nan
            error, allowed = ((t.double() - truth).abs().max() for t in (mine, plain_torch))
            assert error <= 2 * allowed + 1e-6 * (1 + truth.abs().max()), field


def test_all_ranks_have_the_same_bits(answers):
    for case, mine in answers[0].items():
        for other in answers[1:]:
            for field in Answer._fields[:6]:
                a, b = getattr(mine, field), getattr(other[case], field)
                assert (a is None and b is None) or torch.equal(a, b), (case, field)


# ---- one outcome, padding, infinities ---------------------------------------------------------------------------------


def at_the_reference(rank: int, cuts: list[int]) -> list[Answer]:
    problem = plain()
    problem.tensors["hidden"][12] = 0.0
    same = {f"ref_{name}": problem.tensors[name] for name in ("hidden", "weight", "bias")}
    problem = Problem(problem.tensors | same, {}, torch.stack([torch.zeros(N), torch.ones(N), torch.zeros(N)]))
    return [
        sharded(rank, problem.to(dtype), risk, cuts) for risk in RISKS[1:] for dtype in (torch.float32, torch.float64)
    ]


def test_a_policy_at_its_reference_has_no_risk_and_no_gradient():
    """One single tie of all outcomes: shares in proportion to the mass are the policy itself."""
    for given in on_ranks(3, at_the_reference, SPLITS["uneven"])[1]:
        eps = torch.finfo(given.risk.dtype).eps
        assert given.risk.abs().max() <= (0.0 if given.risk.dtype == torch.float32 else 100 * eps)
        assert given.d_weight.abs().max() <= 200 * eps
        assert given.d_hidden.abs().max() <= 200 * eps


def padded(rank: int, cuts: list[int], real: int) -> Answer:
    where = {"group": dist.group.WORLD, "vocab_start": cuts[rank], "vocab_size": real}
    problem = plain()
    problem.tensors["labels"].clamp_(max=real - 1)
    return answer(vocab_parallel_token_risk, problem, CVaR(0.1), slice(cuts[rank], cuts[rank + 1]), **where)


@pytest.mark.parametrize("real", [50, 30])  # part of the last shard is padding, and all of it
def test_rows_beyond_the_vocabulary_are_padding(real):
    ours = gathered(on_ranks(3, padded, SPLITS["uneven"], real))
    problem = plain()
    problem.tensors["labels"].clamp_(max=real - 1)
    whole = answer(linear_token_risk, problem, CVaR(0.1), valid_vocab=real)
    for field in Answer._fields:
        torch.testing.assert_close(getattr(ours, field), getattr(whole, field), rtol=1e-12, atol=1e-12)
    assert not ours.d_weight[real:].any()


def removed(rank: int, cuts: list[int]) -> list[Answer]:
    problem = plain()
    problem.tensors["bias"][[1, 27]] = -torch.inf
    return [sharded(rank, problem, risk, cuts) for risk in RISKS[1:]]


def test_mass_that_the_policy_lost_is_infinite_risk():
    problem = plain()
    problem.tensors["bias"][[1, 27]] = -torch.inf
    shards = on_ranks(2, removed, SPLITS["even"])
    for risk, *answers in zip(RISKS[1:], *shards, strict=True):
        ours, whole = gathered(answers), answer(linear_token_risk, problem, risk)
        scored = problem.tensors["labels"] != -100
        assert ours.risk[scored].isinf().all() == whole.risk[scored].isinf().all() == (risk != ERM(-1.0))
        for field in Answer._fields:
            mine, theirs = getattr(ours, field), getattr(whole, field)
            name = partial("{} {}: {}".format, risk, field)
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


# ---- chunks, strategies, memory ----------------------------------------------------------------------------------------


def alternatives(rank: int, cuts: list[int]) -> list[tuple[Answer, ...]]:
    def given(risk: RiskMeasure | None, strategy: str, workspace_bytes: int | None) -> Answer:
        return sharded(rank, plain(), risk, cuts, strategy=strategy, workspace_bytes=workspace_bytes)

    settings = [("cache", None), ("recompute", None), ("auto", None), ("recompute", 1), ("cache", 1), ("auto", 20_000)]
    return [tuple(given(risk, *setting) for setting in settings) for risk in (None, KL(), ERM(5.0), CVaR(0.1))]


def test_neither_chunks_nor_what_is_kept_change_the_answer():
    for first, *others in on_ranks(2, alternatives, SPLITS["even"])[1]:
        assert all(torch.equal(a, b) for a, b in zip(first, others[0], strict=True) if a is not None)
        for other in others:
            for field in Answer._fields:
                torch.testing.assert_close(getattr(other, field), getattr(first, field), rtol=1e-13, atol=1e-13)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, and the most bytes of them alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.peak, self.alive = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in given or ref.cdata in self.alive:
                    self.alive[ref.cdata] = ref, storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def sizes_of_a_step(rank: int, risk: RiskMeasure, workspace_bytes: int) -> tuple[int, int]:
    tokens, vocabulary, width = 512, 4096, 4
    hidden, ref_hidden = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    weight, ref_weight = torch.randn(vocabulary // 2, width, requires_grad=True), torch.randn(vocabulary // 2, width)
    labels = torch.arange(tokens)
    where = {"group": dist.group.WORLD, "vocab_start": rank * vocabulary // 2, "vocab_size": vocabulary}
    with Sizes() as sizes:
        stats = vocab_parallel_token_risk(
            hidden, weight, ref_hidden, ref_weight, labels, risk, workspace_bytes=workspace_bytes, **where
        )
        (stats.logp.sum() + stats.risk.sum()).backward()
    return sizes.largest, sizes.peak


@pytest.mark.parametrize("risk", [KL(), ERM(5.0), CVaR(0.1)], ids=str)
def test_memory_is_that_of_a_chunk_of_the_shard(risk):
    """16 tokens x 2048 own columns x 14 tensors in fp32, where all tokens would be 32 times that; and the gradients."""
    workspace_bytes = 14 * 4 * 16 * 2048
    gradients = 4 * (2048 * 4 + 2 * 512 * 4)  # of the own rows and of hidden
    per_token = 512 * 64 * 8
    for largest, peak in on_ranks(2, sizes_of_a_step, risk, workspace_bytes):
        assert largest == 16 * 2048
        assert peak <= workspace_bytes + gradients + per_token


class Counting(Across):
    """Counts collectives."""

    calls = 0

    def _reduced(self, *args):
        self.calls += 1
        return super()._reduced(*args)


def collectives(rank: int) -> list[int]:
    counts = []
    for risk in (KL(), ERM(5.0), CVaR(0.1)):
        across, draw = Counting(dist.group.WORLD), torch.Generator().manual_seed(rank)
        z, r = (torch.randn(64, 1000, generator=draw) for _ in range(2))
        options = {
            "scale": 1.0,
            "ref_scale": 1.0,
            "softcap": None,
            "ref_softcap": None,
            "ignore_index": -100,
            "entropy": False,
        }
        rows_forward(z, r, torch.full((64,), 3 if rank == 0 else -1), RowOptions(risk, **options), across)
        counts.append(across.calls)
    return counts


def test_collectives_per_chunk():
    """KL: maxima and sums. ERM: one maximum more. CVaR: the span, then two for each sweep, and the shares."""
    kl, erm, cvar = on_ranks(2, collectives)[0]
    assert (kl, erm) == (2, 3)
    assert (cvar - 4) % 2 == 0
    assert cvar <= 4 + 2 * 6


# ---- dtypes, errors ---------------------------------------------------------------------------------------------------


def low_precision(rank: int, cuts: list[int]) -> tuple[Answer, Answer]:
    problem = plain().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sharded(rank, plain().to(torch.float32), CVaR(0.1), cuts)
    return sharded(rank, problem, CVaR(0.1), cuts), cast


def test_bf16_heads_give_fp32_statistics():
    shards = on_ranks(2, low_precision, SPLITS["even"])
    ours, cast = (gathered(list(parts)) for parts in zip(*shards, strict=True))
    single = plain().to(torch.bfloat16)
    exact, whole = answer(definition, single.to(torch.float64), CVaR(0.1)), answer(linear_token_risk, single, CVaR(0.1))
    assert ours.risk.dtype == torch.float32
    assert ours.d_weight.dtype == torch.bfloat16
    for field, mine, truth, theirs in zip(Answer._fields, ours, exact, whole, strict=True):
        if field != "d_hidden":
            error, allowed = ((t.double() - truth).abs().max() for t in (mine, theirs))
            assert error <= 2 * allowed + 1e-4 * (1 + truth.abs().max()), field
    torch.testing.assert_close(cast.risk, ours.risk)  # autocast rounds the same tensors
    assert cast.d_weight.dtype == torch.float32


def mistakes(rank: int, changes: dict[str, Any]) -> str:
    problem = plain()
    where = {"group": dist.group.WORLD, "vocab_start": 26 * rank, "vocab_size": V}
    rows = slice(26 * rank, (26, 53)[rank])
    try:
        answer(
            vocab_parallel_token_risk,
            problem,
            changes.get("risk", KL()),
            rows,
            **{**where, **{k: v for k, v in changes.items() if k != "risk"}},
        )
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was wrong"


class Median(KL):
    """A measure of one's own."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_start": 0},
            "the shards of the ranks are rows [(0, 26), (0, 27)]: together they must be all of [0, 53)",
        ),
        ({"vocab_size": 60}, "together they must be all of [0, 60)"),
        ({"vocab_size": 40}, "label 49 at position 9 is outside the vocabulary [0, 40)"),
        ({"strategy": "frozen"}, "one of auto, cache, recompute, got 'frozen'"),
        ({"workspace_bytes": 0}, "workspace_bytes is a positive integer"),
        ({"scale": 0.0}, "scale is a positive number"),
        ({"risk": Median()}, "knows the risks KL, CVaR and ERM"),
    ],
)
def test_mistakes_are_named_on_every_rank(changes, message):
    assert all(message in text for text in on_ranks(2, mistakes, changes))


def as_dtensor(rank: int) -> str:
    t = plain().tensors
    weight = distribute_tensor(t["weight"], init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(TypeError) as raised:
        vocab_parallel_token_risk(
            t["hidden"], weight, None, None, t["labels"], None, group=dist.group.WORLD, vocab_start=0, vocab_size=V
        )
    return str(raised.value)


def test_a_dtensor_is_refused():
    assert all(text.startswith("weight is a DTensor: pass weight.to_local()") for text in on_ranks(2, as_dtensor))
