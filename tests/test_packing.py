"""Packed rows are padded rows: the same states, losses, gradients, metrics and training, and no attention between rows."""

import copy
import json
from itertools import accumulate, pairwise
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rsa_kernels import CVaR, nested_risk
from test_cli import ONE_STEP, REWARD, SILENT, flags, rsa
from test_stages import WORDS, trainer
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from rsa_lightning import packing
from rsa_lightning.adapters import Lora
from rsa_lightning.data.batch import ROLES, EncodedPair, collate
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.losses import DPO, KTO, RSA, SequenceStats
from rsa_lightning.metrics import per_row
from rsa_lightning.models import Policy, PolicySpec, ReferenceStates, load_policy
from rsa_lightning.packing import PACKED, attend, is_packed, packed_attention, packed_inputs, why_not_varlen
from rsa_lightning.reference import FrozenCopy
from rsa_lightning.saving import save_policy
from rsa_lightning.stages import RewardAlignment
from rsa_lightning.supervised import SupervisedWarmup

VOCABULARY = 97
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = TINY | {"num_key_value_heads": 2}  # two query heads for each key head
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": SHARED,
    "qwen2": SHARED,
    "qwen3": SHARED | {"head_dim": 8},
    "gpt_neox": TINY,
    "gpt2": GPT2,
    "mistral": SHARED | {"sliding_window": 4},
    "starcoder2": SHARED | {"sliding_window": 4},
    "gemma2": SHARED | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gemma3_text": SHARED | {"head_dim": 8, "sliding_window": 4},
    "gpt_oss": SHARED | {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4},
}
DOUBLE = ("gpt2", "gpt_neox", "starcoder2")  # the others' norms compute in float32 whatever the model is in


def pair(prompt: int, chosen: int, rejected: int) -> EncodedPair:
    """Ids that tell prompts, responses and places apart."""
    return EncodedPair(
        [1, *(3 + (7 * i + prompt) % 90 for i in range(prompt - 1))],
        [*(3 + (11 * i + chosen) % 90 for i in range(chosen - 1)), 2],
        [*(3 + (13 * i + 5) % 90 for i in range(rejected - 1)), 2],
    )


PAIRS = [pair(1, 1, 23), pair(17, 3, 1), pair(4, 12, 2), pair(1, 2, 1)]  # rows of 2 to 24 tokens; prompts of one


def layouts(roles=ROLES[:2]):
    return {side or "packed": collate(PAIRS, roles, padding_side=side) for side in ("right", "left", None)}


def fresh(family: str, dtype=torch.float32) -> Policy:
    """Large weights: fresh biases are zero, and fresh attention is close to uniform."""
    fields = {"vocab_size": VOCABULARY, "pad_token_id": 0} | FAMILIES[family]
    policy = load_policy(PolicySpec(config={"model_type": family, **fields}, seed=3)).to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def measured(policy: Policy, reference: Policy, batch) -> dict[str, torch.Tensor]:
    """Hidden states, the losses of DPO and RSA with nested risk, and the gradient of every weight."""
    policy.zero_grad()
    with torch.no_grad():
        states = policy.states(batch)
        frozen = ReferenceStates(reference.states(batch), reference.head.weight, reference.head.bias)
    tokens = policy(batch, frozen, CVaR(0.5), impl="naive")
    logratio = per_row(tokens.logratio, batch)
    risk = nested_risk(tokens.risk, batch["cu_seqlens"]).total
    sides = [SequenceStats(logratio[batch["roles"] == r], risk[batch["roles"] == r]) for r in (0, 1)]
    losses = torch.cat([loss(*sides).losses for loss in (DPO(0.3), RSA(0.3))])
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return {"states": states, "losses": losses.detach(), **gradients}


def assert_same(one, other, tolerance: float) -> None:
    """Of states and losses relative to the largest; of gradients relative to the largest of all weights."""
    assert one.keys() == other.keys()
    steepest = max(value.abs().max() for name, value in one.items() if name not in ("states", "losses"))
    for name, value in one.items():
        scale = value.abs().max() if name in ("states", "losses") else steepest
        gap = (value - other[name]).abs().max() / scale
        assert gap <= tolerance, f"{name} is {gap:.2g} away"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_padded_rows(family):
    policy, reference = fresh(family), fresh(family)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    found = {side: measured(policy, reference, batch) for side, batch in layouts().items()}
    assert len(found["packed"]) > 10
    for side in ("right", "left"):
        assert_same(found[side], found["packed"], 1e-5)


@pytest.mark.parametrize("family", DOUBLE)
def test_in_float64_they_are_the_same_to_twelve_digits(family):
    policy, reference = fresh(family, torch.float64), fresh(family, torch.float64)
    with torch.no_grad():
        reference.head.weight.mul_(0.9)
    found = {side: measured(policy, reference, batch) for side, batch in layouts().items()}
    for side in ("right", "left"):
        assert_same(found[side], found["packed"], 1e-12)


def across_rows(*tensors, row_bounds, cu_seq_lens_q, max_length_q, **options):
    """The planted bug: one row from the first to the last token of the pack."""
    end = row_bounds[-1]
    bounds = {"row_bounds": [0, end], "cu_seq_lens_q": cu_seq_lens_q[[0, -1]], "max_length_q": end}
    return packed_attention(*tensors, **bounds, **options)


def positions_go_on(row_bounds, device):
    """The other planted bug."""
    inputs = packed_inputs(row_bounds, device)
    return inputs | {"position_ids": torch.arange(row_bounds[-1])[None]}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bug", ["across", "positions"])
def test_the_comparison_finds_planted_bugs(bug, family, monkeypatch):
    """Both by the comparison above and by the check at the switch. Rotary positions are relative: Llama has no second bug."""
    policy = fresh(family)
    attend(policy.model, packed=True)  # before the bug
    try:
        if bug == "across":
            AttentionInterface.register(PACKED, across_rows)
        else:
            monkeypatch.setattr(packing, "packed_inputs", positions_go_on)
        wrong = measured(policy, policy, layouts()["packed"])
    finally:
        AttentionInterface.register(PACKED, packed_attention)
    right = measured(policy, policy, layouts()["right"])
    if (bug, family) == ("positions", "llama"):
        assert_same(right, wrong, 1e-5)
        return
    with pytest.raises(AssertionError, match="states is .* away"):
        assert_same(right, wrong, 1e-2)
    monkeypatch.setattr(packing, "packed_attention", across_rows if bug == "across" else packed_attention)
    with pytest.raises(ValueError, match="cannot be trained without padding: hidden states of rows of 5, 1, 4 tokens"):
        attend(policy.model, packed=True)


def test_attention_never_sees_the_pack(monkeypatch):
    """Every call is one row, without a mask: neither T x T scores nor a T x T mask exist."""
    policy, batch = fresh("llama"), layouts()["packed"]
    attend(policy.model, packed=True)
    calls = []

    def spy(query, key, value, mask=None, **options):
        calls.append((query.shape[2], key.shape[2], mask, options["is_causal"]))
        return original(query, key, value, mask, **options)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    policy.states(batch)
    lengths = [end - start for start, end in pairwise(batch["row_bounds"])]
    assert calls == [(n, n, None, True) for n in lengths] * 2  # layers


def dense(query, key, value, lengths, scaling, window, softcap, sinks):
    """The definition: scores of all pairs of the pack, and minus infinity between rows, ahead, and beyond the window."""
    groups = query.shape[1] // key.shape[1]
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ahead = torch.arange(len(row))[:, None] - torch.arange(len(row))
    seen = (row[:, None] == row) & (ahead >= 0) & (ahead < (window or len(row)))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(groups, 1)) * scaling
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[None, :, None, None])
    return torch.einsum("bhqk,bhkd->bqhd", weights / total, value.repeat_interleave(groups, 1))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(None, None, False), (3, None, False), (None, 1.5, False), (3, 1.5, True)]
)
def test_attention_is_its_definition(key_heads, window, softcap, sinks):
    lengths = [1, 7, 3, 1]
    query, key, value = (torch.randn(1, h, 12, 8, dtype=torch.float64) for h in (4, key_heads, key_heads))
    extra = torch.randn(4, dtype=torch.float64) if sinks else None
    options = {"scaling": 0.7, "sliding_window": window, "softcap": softcap, "s_aux": extra}
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, **options, **rows_of(lengths))
    torch.testing.assert_close(out, dense(query, key, value, lengths, 0.7, window, softcap, extra), rtol=0, atol=1e-12)


def rows_of(lengths):
    return {k: v for k, v in packed_inputs([0, *accumulate(lengths)], "cpu").items() if k != "position_ids"}


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_is_honoured(softcap):
    """Equal keys, values of one: an output is the kept share of L weights over the kept probability, 1 on average."""
    tensors = torch.ones(1, 2, 300, 4), torch.ones(1, 2, 300, 4), torch.ones(1, 2, 300, 4)
    options = {"softcap": softcap, **rows_of([300])}
    kept, _ = packed_attention(torch.nn.Module(), *tensors, None, dropout=0.5, **options)
    last = kept[0, 100:, :, 0]
    assert abs(last.mean() - 1) < 0.02
    assert last.std() > 0.02
    whole, _ = packed_attention(torch.nn.Module(), *tensors, None, **options)
    torch.testing.assert_close(whole, torch.ones_like(whole))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "its attention uses attention_mask, which packed"),
        ({"position_bias": torch.ones(2)}, "its attention uses position_bias,"),
        ({"is_causal": False}, "its attention uses is_causal=False,"),
        ({"row_bounds": None}, "its attention was not told the rows of a pack"),
    ],
)
def test_what_would_be_left_out_is_an_error(given, message):
    options = {"attention_mask": None, "position_ids": torch.arange(2), "use_cache": False} | rows_of([1, 1]) | given
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.nn.Module(), *[torch.ones(1, 1, 2, 4)] * 3, **options)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_autocast_reaches_queries_keys_and_values(softcap, monkeypatch):
    """Rotary embeddings give float32 queries and keys beside bfloat16 values, and the kernel takes one dtype."""
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    asked = []
    monkeypatch.setattr(
        packing, "why_not_varlen", lambda *tensors: asked.append([x.dtype for x in tensors[:3]]) or "no"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        options = {"softcap": softcap, **rows_of([4, 2])}
        out, _ = packed_attention(torch.nn.Module(), query, key, value.bfloat16(), None, **options)
    assert asked == [[torch.bfloat16] * 3]
    assert out.dtype == torch.bfloat16
    whole, _ = packed_attention(torch.nn.Module(), query, key, value, None, **options)
    torch.testing.assert_close(out.float(), whole, rtol=0, atol=3e-2)


REFUSED = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "it has an attention of its own"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, "it ignores position ids or mixes rows"),
    "stablelm": (SHARED, "its attention was not told the rows of a pack: its forward does not hand them on"),
    "phimoe": (
        SHARED | {"sliding_window": 64, "num_local_experts": 2},
        "its sliding window of 64 tokens is in its mask",
    ),
    "lfm2": (SHARED | {"layer_types": ["conv", "full_attention"]}, "it ignores position ids or mixes rows"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_architectures_are_refused_by_name(family):
    """And left as they were."""
    fields, reason = REFUSED[family]
    fields |= {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).train()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"^{type(model).__name__} cannot be trained without padding: .*{reason}"):
        attend(model, packed=True)
    assert model.config._attn_implementation == before
    assert model.training


def test_a_leak_below_the_rounding_of_bfloat16_is_found():
    """A fresh Jamba carries its state on so faintly that its states in bfloat16 differ by rounding alone."""
    fields = SHARED | {"vocab_size": VOCABULARY, "num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", **fields), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Jamba.*the states of a packed row depend on the row before it"):
        attend(model, packed=True)


def test_chunks_are_refused():
    config = SimpleNamespace(layer_types=["chunked_attention"], attention_chunk_size=8192, sliding_window=None)
    with pytest.raises(ValueError, match="attends in chunks"):
        packing._check_windows(config, {None})


def test_the_switch_leaves_no_trace(tiny_llama, tiny_tokenizer, tmp_path):
    """Neither in random numbers, nor in what is saved; and a batch with padding sets it back."""
    policy = load_policy(PolicySpec(model=str(tiny_llama))).train()
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):  # as in a validation
        attend(policy.model, packed=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.model.training
    assert all(p.grad is None for p in policy.parameters())
    assert is_packed(copy.deepcopy(policy).model)
    save_policy(policy, tiny_tokenizer, tmp_path / "model")
    assert is_packed(policy.model)
    assert PACKED not in (tmp_path / "model/config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="was not called by Policy.states"):
        policy.model(torch.ones(1, 3, dtype=torch.long))
    states = {side: policy.eval().states(batch) for side, batch in layouts().items()}
    assert is_packed(policy.model)
    torch.testing.assert_close(policy.states(layouts()["left"]), states["packed"], rtol=0, atol=1e-5)
    assert policy.model.config._attn_implementation == "sdpa"


def test_on_the_meta_device_the_first_batch_asks_again(tiny_llama):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama))
    attend(model, packed=True)
    assert not is_packed(model)


def test_a_packed_batch_by_hand():
    """[1 5 | 7 2], [1 | 8 2], [1 5 | 2], [1 | 9 9 2]: scored tokens at 2 3, 5 6, 9, 11 12 13 follow those before them."""
    batch = collate([EncodedPair([1, 5], [7, 2], [2]), EncodedPair([1], [8, 2], [9, 9, 2])], padding_side=None)
    assert batch["input_ids"].tolist() == [[1, 5, 7, 2, 1, 8, 2, 1, 5, 2, 1, 9, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 14]
    assert batch["row_bounds"] == [0, 4, 7, 10, 14]
    assert batch["positions"].tolist() == [1, 2, 4, 5, 8, 10, 11, 12]
    assert batch["labels"].tolist() == [7, 2, 8, 2, 2, 9, 9, 2]
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 5, 8]
    assert not batch["left_padded"]
    inputs = packed_inputs(batch["row_bounds"], "cpu")
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == 4


@given(st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=2, max_size=5), st.booleans())
def test_layouts_score_the_same_tokens_after_the_same_tokens(sizes, mismatched):
    examples, roles = [pair(*size) for size in sizes], ROLES if mismatched else ROLES[:2]
    padded, packed = (collate(examples, roles, pad_id=95, padding_side=side) for side in ("right", None))
    assert padded["row_bounds"] is None
    for name in ("labels", "cu_seqlens", "roles", "pair_ids"):
        assert torch.equal(padded[name], packed[name])
    before = [batch["input_ids"].flatten()[batch["positions"]] for batch in (padded, packed)]
    assert torch.equal(*before)
    assert packed["input_ids"].shape == (1, padded["attention_mask"].sum())


def test_settings_of_padding_where_there_is_none_are_errors(pairs_file):
    with pytest.raises(ValueError, match="no padding to be on the left: drop padding_side, or padding_free"):
        PreferenceData(str(pairs_file), padding_free=True, padding_side="left")
    with pytest.raises(ValueError, match="no padding for length_bucketing to save.*: drop length_bucketing, or"):
        PreferenceData(str(pairs_file), padding_free=True, length_bucketing=True)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """40 pairs of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Q{i} {' '.join(WORDS[: 1 + i % 7])}?",
            "chosen": f" {' '.join(WORDS[: (5 * i) % 13 + 1])}.",
            "rejected": f" {' '.join(WORDS[(3 * i) % 14 :])}",
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.values.append(outputs["loss"].item())


def curve(pairs_file, tmp_path, make_stage, steps=20, **options):
    """Losses of the training steps, then the metrics of a validation."""
    data = PreferenceData(str(pairs_file), batch_size=4, max_length=64, validation_fraction=0.2, **options)
    stage, losses = make_stage(), Losses()
    run = trainer(tmp_path, max_steps=steps, limit_val_batches=1.0, callbacks=[losses])
    run.fit(stage, datamodule=data)
    assert is_packed(stage.policy.model) == data.padding_free
    metrics = run.validate(stage, datamodule=data, verbose=False)[0]
    return torch.tensor(losses.values), metrics


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


STAGES = {
    "DPO": lambda folder: RewardAlignment(PolicySpec(str(folder)), DPO(0.3), optimizer=adam),
    "RSA": lambda folder: RewardAlignment(PolicySpec(str(folder)), RSA(0.3), optimizer=adam),
    "KTO": lambda folder: RewardAlignment(PolicySpec(str(folder)), KTO(0.3), optimizer=adam),
    "a folder as reference": lambda folder: RewardAlignment(
        PolicySpec(str(folder)), RSA(0.3), reference=FrozenCopy(str(folder)), optimizer=adam
    ),
    "LoRA": lambda folder: RewardAlignment(PolicySpec(str(folder), lora=Lora(rank=4)), RSA(0.3), optimizer=adam),
    "warm-up": lambda folder: SupervisedWarmup(PolicySpec(str(folder)), optimizer=adam),
}


@pytest.mark.parametrize("name", STAGES)
def test_training_is_the_same_without_padding(name, tiny_llama, pairs_file, tmp_path):
    if name == "LoRA":
        pytest.importorskip("peft")
    padded, packed = (
        curve(pairs_file, tmp_path, lambda: STAGES[name](tiny_llama), padding_free=free) for free in (False, True)
    )
    assert len(packed[0]) == 20
    assert (packed[0] - packed[0][0]).abs().max() > 0.01  # it moved
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-4, atol=1e-5)
    assert packed[1].keys() == padded[1].keys()
    for metric, value in packed[1].items():
        assert value == pytest.approx(padded[1][metric], rel=1e-3, abs=1e-4), metric


def test_activation_checkpointing_recomputes_the_packed_attention(monkeypatch):
    policy, batch = fresh("llama"), layouts()["packed"]
    expected = measured(policy, policy, batch)
    policy.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    rows = packing._attend_row
    monkeypatch.setattr(packing, "_attend_row", lambda *args: calls.append(1) or rows(*args))
    assert_same(expected, measured(policy, policy, batch), 1e-6)
    once = 2 * 8  # layers, rows
    assert len(calls) == 4 * once  # states, reference, forward, and again in backward


def test_rsa_fit_takes_it_from_the_command_line(pairs_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = flags(ONE_STEP | SILENT | {"data.padding_free": "true"})
    assert rsa("fit", "-c", REWARD, "--data.path", pairs_file, *options)[0] == 0
    assert "rsa_packed" not in "".join(f.read_text() for f in tmp_path.rglob("config.json"))


def test_an_architecture_is_refused_before_the_fit_starts(pairs_file, tmp_path):
    started = []
    watch = L.pytorch.callbacks.LambdaCallback(on_fit_start=lambda *args: started.append(args))
    spec = PolicySpec(config={"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 4})
    data = PreferenceData(str(pairs_file), batch_size=4, max_length=64, padding_free=True)
    with pytest.raises(ValueError, match="BloomForCausalLM cannot be trained without padding"):
        trainer(tmp_path, callbacks=[watch]).fit(RewardAlignment(spec, DPO(0.3)), datamodule=data)
    assert started == []


def test_why_not_the_kernel():
    half = [torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)] * 3
    assert why_not_varlen(*half, 0.0, None, None) == "the tensors are on cpu, and it needs CUDA"


@pytest.mark.parametrize(("key_heads", "window"), [(2, None), (4, 3), (1, 3)])
def test_what_the_kernel_is_asked(key_heads, window, monkeypatch):
    """A stand-in that reads its arguments as the documentation says: the window counts keys before the query's own."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert (max_q, max_k, enable_gqa) == (7, 7, key_heads < 4)
        before, after = window_size
        assert after == 0
        lengths = cu_q.diff().tolist()
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return dense(q, k, v, lengths, scale, None if before == -1 else before + 1, None, None)[0]

    monkeypatch.setattr(packing, "varlen_attn", stand_in)
    monkeypatch.setattr(packing, "why_not_varlen", lambda *args: None)
    lengths = [1, 7, 3]
    tensors = [torch.randn(1, h, 11, 8, dtype=torch.float64) for h in (4, key_heads, key_heads)]
    out, _ = packed_attention(torch.nn.Module(), *tensors, None, scaling=0.7, sliding_window=window, **rows_of(lengths))
    torch.testing.assert_close(out, dense(*tensors, lengths, 0.7, window, None, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_kernel_of_this_torch_takes_these_arguments(key_heads, monkeypatch):
    """On the meta device, where torch checks them and computes nothing."""
    monkeypatch.setattr(packing, "why_not_varlen", lambda *args: None)
    query, key, value = (
        torch.randn(1, h, 11, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for h in (4, key_heads, key_heads)
    )
    rows = packed_inputs([0, 1, 8, 11], "meta")
    del rows["position_ids"]
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=3, **rows)
    assert out.shape == (1, 11, 4, 8)
    assert torch.autograd.grad(out.sum(), key)[0].shape == key.shape


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("key_heads", [2, 8])
def test_the_kernel_attends_as_row_by_row(key_heads, window):
    """bfloat16, values and gradients: no further from float64 than twice row by row, plus 1e-3."""
    lengths = [1, 300, 17, 64]
    shapes = [(1, heads, sum(lengths), 64) for heads in (8, key_heads, key_heads)]
    leaves = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    weights = torch.randn(1, sum(lengths), 8, 64, device="cuda")
    assert why_not_varlen(*leaves, 0.0, None, None) is None

    def run(dtype, by_kernel):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        bounds = packed_inputs([0, *accumulate(lengths)], "cuda")
        del bounds["position_ids"]
        with pytest.MonkeyPatch.context() as patch:
            if not by_kernel:
                patch.setattr(packing, "why_not_varlen", lambda *args: "not now")
            out, _ = packed_attention(torch.nn.Module(), *inputs, None, sliding_window=window, **bounds)
        return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), inputs)]

    exact, rows, kernel = run(torch.float64, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
    for e, r, k in zip(exact, rows, kernel, strict=True):
        assert (k - e).abs().max() <= 2 * (r - e).abs().max() + 1e-3
