"""A policy over the ranks of a tensor mesh takes the steps that it takes in one process."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import on_ranks
from rsa_kernels import ERM, CVaR
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rsa_lightning.data.batch import EncodedPair, PreferenceBatch, collate
from rsa_lightning.losses import DPO, RSA
from rsa_lightning.models import Policy, PolicySpec, ReferenceStates
from rsa_lightning.parallel.clipping import clip_by_norm
from rsa_lightning.parallel.tensor import VocabParallelHead, parallelize
from rsa_lightning.reference import FrozenCopy
from rsa_lightning.stages import RewardAlignment

SIZES = {"vocab_size": 62, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama, tied, with biases": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 3},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}
OBJECTIVES = {
    "DPO": (DPO(), CVaR(0.97)),
    "RSA CVaR(0.97)": (RSA(), CVaR(0.97)),
    "RSA CVaR(0.1)": (RSA(), CVaR(0.1)),
    "RSA ERM(5)": (RSA(), ERM(5.0)),
}


def norm_in_its_own_dtype(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture(scope="module", autouse=True)
def norms() -> Iterator[None]:
    """transformers' norms compute in fp32 whatever the model's dtype: float64 models would not agree in float64."""
    with pytest.MonkeyPatch.context() as patch:
        for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
            patch.setattr(norm, "forward", norm_in_its_own_dtype)
        yield


def fresh(name: str, dtype: torch.dtype) -> Policy:
    torch.manual_seed(0)
    fields = {**SIZES, **MODELS[name]}
    return Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype))


def stage_of(name: str, objective: str, dtype: torch.dtype) -> RewardAlignment:
    """A stage whose policy has left its reference, both of one process."""
    loss, risk = OBJECTIVES[objective]
    stage = RewardAlignment(
        PolicySpec(config={"model_type": "llama"}), loss=loss, risk=risk, reference=FrozenCopy(), beta=0.1
    )
    stage.policy = fresh(name, dtype)
    stage.reference.prepare(stage.policy)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stage.policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype), alpha=0.05)
    return stage


def pairs() -> list[EncodedPair]:
    """Labels in both halves of the vocabulary, padding on the right."""
    first = EncodedPair([1, 40, 3], [4, 35, 6, 60], [7, 38])
    return [
        first,
        EncodedPair([31], [30, 31, 32], [61, 2, 3, 4, 5]),
        EncodedPair([9, 9], [1], [33]),
        EncodedPair([50], [51, 2], [8, 30]),
    ]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def one_step(stage: RewardAlignment, batch: PreferenceBatch) -> tuple[float, dict[str, Tensor]]:
    loss = stage.shared_step(batch, "train")
    loss.backward()
    return loss.item(), {name: whole(p.grad).clone() for name, p in stage.policy.named_parameters()}


def ten_steps(stage: RewardAlignment, batch: PreferenceBatch) -> tuple[list[float], dict[str, Tensor]]:
    """Every second step takes the gradients of the one before along, so that they accumulate."""
    optimizer, losses = torch.optim.AdamW(stage.policy.parameters(), lr=1e-3), []
    for step in range(10):
        if step % 2 == 0:
            optimizer.zero_grad()
        loss = stage.shared_step(batch, "train")
        loss.backward()
        clip_by_norm(stage.policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: whole(p).detach() for name, p in stage.policy.named_parameters()}


CASES = [
    *((objective, torch.float64) for objective in OBJECTIVES),
    ("RSA CVaR(0.1)", torch.float32),
    ("DPO", torch.float32),
]


def every(split: bool, name: str) -> dict[Any, Any]:
    """Loss and gradients of a step of every objective, and ten steps of one."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)) if split else None

    def made(objective: str, dtype: torch.dtype) -> RewardAlignment:
        stage = stage_of(name, objective, dtype)
        if mesh is not None:
            parallelize(stage.policy, mesh)
            parallelize(stage.reference._policy, mesh)
        return stage

    steps = {case: one_step(made(*case), collate(pairs())) for case in CASES}
    return {**steps, "ten": ten_steps(made("RSA CVaR(0.1)", torch.float64), collate(pairs()))}


@pytest.fixture(scope="module", params=MODELS)
def runs(request: pytest.FixtureRequest, norms: None) -> tuple[dict[Any, Any], list[dict[Any, Any]]]:
    """What one process does, and each of two ranks."""
    return every(False, request.param), on_ranks(2, lambda rank: every(True, request.param))


def relative(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_on_two_ranks_is_that_of_one_process(runs, case):
    loss, gradients = runs[0][case]
    tolerance = 1e-5 if case[1] == torch.float32 else 1e-10
    for found, theirs in (rank[case] for rank in runs[1]):
        assert found == pytest.approx(loss, rel=tolerance)
        assert theirs.keys() == gradients.keys()
        for name, grad in gradients.items():
            assert relative(theirs[name], grad) <= tolerance, name


def test_ten_steps_of_adamw_stay_equal(runs):
    losses, weights = runs[0]["ten"]
    assert losses[-1] < losses[0]
    for found, theirs in (rank["ten"] for rank in runs[1]):
        assert found == pytest.approx(losses, rel=1e-9)
        for name, weight in weights.items():
            assert relative(theirs[name], weight) <= 1e-9, name


# ---- what is held, and sent -------------------------------------------------------------------------------------------


def held(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    policy, untouched = fresh("llama, tied, with biases", torch.float32), fresh("qwen3", torch.float32)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    policy.model.base_model.norm.weight.requires_grad_(False)
    parallelize(policy, mesh)
    untouched.requires_grad_(False)
    parallelize(untouched, mesh)
    normed = fresh("qwen3", torch.float32)
    parallelize(normed, mesh)
    normed.states(collate(pairs())).sum().backward()
    with CommDebugMode() as sent:
        policy.states(collate(pairs())).sum().backward()
    return {
        "unsummed": [
            n for n, p in normed.named_parameters() if isinstance(p.grad, DTensor) and p.grad.placements != p.placements
        ],
        "names": list(before) == [name for name, _ in policy.named_parameters()],
        "weights": all(torch.equal(whole(p), before[name]) for name, p in policy.named_parameters()),
        "tied": policy.head.weight is policy.model.get_input_embeddings().weight,
        "frozen": [name for name, p in policy.named_parameters() if not p.requires_grad],
        "thawed": [name for name, p in untouched.named_parameters() if p.requires_grad],
        "bytes": sum(p.to_local().untyped_storage().nbytes() for p in policy.parameters() if isinstance(p, DTensor)),
        "halves": sum(p.to_local().nbytes for p in policy.parameters() if isinstance(p, DTensor)),
        "sent": sum(count for op, count in sent.get_comm_counts().items() if "c10d_functional" in str(op)),
        "head": type(policy.head) is VocabParallelHead,
    }


def test_a_rank_holds_its_part_and_names_stay():
    for found in on_ranks(2, held):
        assert found["names"]
        assert found["weights"]
        assert found["tied"]
        assert found["head"]
        assert found["frozen"] == ["model.model.norm.weight"]
        assert found["thawed"] == []
        assert found["unsummed"] == []  # norms of heads, to whose gradient each rank contributes
        assert found["bytes"] == found["halves"]  # no shard is a view of the whole weight
        # of each of the 2 blocks: attention and MLP, forward and backward; q, k and v enter as one
        assert found["sent"] == 2 * 2 * 2


# ---- with FSDP2 -------------------------------------------------------------------------------------------------------


def on_a_plane(rank: int, name: str) -> tuple[list[float], Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Two data-parallel ranks of two pairs each, times two tensor-parallel ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    stage = stage_of(name, "RSA CVaR(0.1)", torch.float64)
    for policy in (stage.policy, stage.reference._policy):
        parallelize(policy, mesh["tensor"])
    for block in stage.policy.model.base_model.layers:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(stage.policy, mesh=mesh["shard"])
    mine = collate(pairs()[2 * mesh.get_local_rank("shard") :][:2])
    optimizer, losses, norm, gradients = torch.optim.AdamW(stage.policy.parameters(), lr=1e-3), [], None, {}
    for _ in range(3):
        optimizer.zero_grad()
        loss = stage.shared_step(mine, "train")
        loss.backward()
        first = norm is None
        gradients = {n: whole(p.grad).clone() for n, p in stage.policy.named_parameters()} if first else gradients
        norm = clip_by_norm(stage.policy.parameters(), 1.0) if first else norm
        optimizer.step()
        losses.append(loss.item())
    return losses, norm, gradients, {n: whole(p).detach() for n, p in stage.policy.named_parameters()}


@pytest.mark.parametrize("name", ["llama, tied, with biases", "qwen3"])
def test_two_by_two_ranks_with_fsdp2_are_one_process(name):
    stage = stage_of(name, "RSA CVaR(0.1)", torch.float64)
    optimizer, losses = torch.optim.AdamW(stage.policy.parameters(), lr=1e-3), []
    for step in range(3):
        optimizer.zero_grad()
        loss = stage.shared_step(collate(pairs()), "train")
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in stage.policy.named_parameters()}
            norm = torch.nn.utils.clip_grad_norm_(stage.policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    found = on_ranks(4, on_a_plane, name)
    for rank, (_, theirs_norm, theirs, weights) in enumerate(found):
        halves = found[rank % 2][0], found[2 + rank % 2][0]  # the means of two pairs each
        assert [(a + b) / 2 for a, b in zip(*halves, strict=True)] == pytest.approx(losses, rel=1e-10)
        torch.testing.assert_close(theirs_norm, norm, rtol=1e-10, atol=0)
        for parameter, grad in gradients.items():
            assert relative(theirs[parameter], grad) <= 1e-10, parameter
        for parameter, weight in stage.policy.named_parameters():
            assert relative(weights[parameter], weight.detach()) <= 1e-9, parameter


# ---- references -------------------------------------------------------------------------------------------------------


def against(rank: int) -> list[Tensor]:
    """The risk against a reference that is split, whole, and the policy's own head; log-ratios to known labels."""
    mesh = init_device_mesh("cpu", (2,))
    policy, reference = fresh("llama", torch.float64), fresh("qwen2", torch.float64).requires_grad_(False)
    batch, intact = collate(pairs()), copy.deepcopy(reference)
    heads = [intact.head, None]
    parallelize(policy, mesh)
    parallelize(reference, mesh)
    states = reference.states(batch)
    given = [ReferenceStates(states, reference.head.weight), *(ReferenceStates(states, h and h.weight) for h in heads)]
    known = ReferenceStates(None, None, logp=torch.linspace(-3.0, 0.0, len(states), dtype=torch.float64))
    return [*(policy(batch, g, CVaR(0.1)).risk.detach() for g in given), policy(batch, known, None).logratio.detach()]


def test_the_reference_may_be_split_whole_the_policys_own_head_or_labels_alone():
    policy, reference = fresh("llama", torch.float64), fresh("qwen2", torch.float64)
    batch = collate(pairs())
    states = reference.states(batch).detach()
    expected = [
        policy(batch, ReferenceStates(states, w), CVaR(0.1)).risk.detach() for w in (reference.head.weight, None)
    ]
    logp = policy(batch, None, None).logp.detach()
    known = logp - torch.linspace(-3.0, 0.0, len(logp), dtype=torch.float64)
    for split, intact, own, labels in on_ranks(2, against):
        torch.testing.assert_close(labels, known, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(split, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(intact, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own, expected[1], rtol=1e-12, atol=1e-12)


# ---- refusals ---------------------------------------------------------------------------------------------------------


def refused(rank: int, fields: dict[str, Any], size: int, change: str) -> str:
    mesh = init_device_mesh("cpu", (size,))
    policy = Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)))
    if change == "adapted":
        policy.adapted = True
    if change == "twice":
        parallelize(policy, mesh)
    if change == "plan":
        policy.model.config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise_gather_output"}
    if change == "no plan":
        policy.model.config.base_model_tp_plan = None
    if change == "plane":
        mesh = init_device_mesh("cpu", (1, size))
    before = {name: type(p) for name, p in policy.named_parameters()}
    with pytest.raises(ValueError, match=r"parallel|mesh") as error:
        parallelize(policy, mesh)
    assert {name: type(p) for name, p in policy.named_parameters()} == before
    return str(error.value)


LLAMA = {**SIZES, "model_type": "llama"}


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        (
            {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 62},
            "",
            "not gpt2: use FSDP2 with tensor_parallel 1",
        ),
        ({**SIZES, "model_type": "gpt_neox"}, "", "knows llama, mistral, qwen2, qwen3, not gpt_neox"),
        ({**SIZES, "model_type": "mixtral", "num_local_experts": 2}, "", "not mixtral"),
        (
            {
                **SIZES,
                "model_type": "qwen3_moe",
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "moe_intermediate_size": 8,
            },
            "",
            "not qwen3_moe",
        ),
        (
            {**LLAMA, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 12},
            "",
            "num_attention_heads is 3, not a multiple of 2",
        ),
        (
            {**LLAMA, "num_key_value_heads": 1},
            "",
            "num_key_value_heads is 1, not a multiple of 2 tensor-parallel ranks: use tensor_parallel 1 with FSDP2",
        ),
        ({**LLAMA, "intermediate_size": 25}, "", "intermediate_size is 25"),
        (
            {**LLAMA, "vocab_size": 63},
            "",
            "vocab_size is 63, not a multiple of 2 tensor-parallel ranks: use tensor_parallel 1 with FSDP2 (or pad",
        ),
        (LLAMA, "adapted", "does not split adapters: train all weights (no policy.lora)"),
        (LLAMA, "twice", "the policy is sharded already"),
        (LLAMA, "plan", "layers.*.self_attn.q_proj: 'colwise_gather_output', and tensor parallelism knows"),
        (LLAMA, "no plan", "transformers has no plan for layers.*.self_attn.q_proj of this llama"),
        (LLAMA, "plane", "one dimension of a mesh"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_changes(fields, change, message):
    assert all(message in text for text in on_ranks(2, refused, fields, 2, change))


def test_the_mend_names_a_number_of_ranks_that_fits():
    fields = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2}
    assert (
        "num_key_value_heads is 2, not a multiple of 4 tensor-parallel ranks: use tensor_parallel 2"
        in on_ranks(4, refused, fields, 4, "")[0]
    )


def misused(rank: int) -> list[str]:
    mesh, messages = init_device_mesh("cpu", (2,)), []
    policy, other = fresh("llama", torch.float32), fresh("llama", torch.float32)
    parallelize(policy, mesh)
    batch = collate(pairs())
    states = policy.states(batch)
    with pytest.raises(RuntimeError) as error:
        policy.head(states, batch["labels"], None, None, impl="triton")
    messages.append(str(error.value))
    with pytest.raises(ValueError, match=r"rows") as mismatch:
        policy.head(states, batch["labels"], ReferenceStates(states, other.head.weight[:60]), CVaR(0.1))
    return [*messages, str(mismatch.value)]


def test_a_head_names_what_it_cannot_take():
    triton, rows = on_ranks(2, misused)[0]
    assert triton == "impl='triton' cannot run on a vocabulary-parallel head: use impl='auto'"
    assert rows.startswith("the head of the reference has 60 rows, the policy's vocabulary 62, 31 of them here")
