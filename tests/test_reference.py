"""References: the model a stage starts from, frozen, whether it is a copy or the policy without its adapter."""

import pytest
import torch
from rsa_kernels import CVaR

from rsa_lightning.adapters import TRAINABLE, Lora
from rsa_lightning.data.batch import collate
from rsa_lightning.data.records import PreferencePair
from rsa_lightning.data.tokenize import Lengths, encode_records, pad_id
from rsa_lightning.models import PolicySpec, load_policy
from rsa_lightning.reference import AdapterOff, FrozenCopy
from rsa_lightning.saving import save_policy
from rsa_lightning.stages import SafetyAlignment
from rsa_lightning.supervised import SupervisedWarmup

PAIRS = [
    PreferencePair("How do I keep bread fresh?", " Wrap it in a cloth.", " No answer is better, said the owl."),
    PreferencePair("Who?", " The fox asked the old owl whether the river was safe to cross.", " Assistant"),
]


@pytest.fixture
def batch(tiny_tokenizer):
    examples = encode_records(tiny_tokenizer, PAIRS, Lengths(64, 32)).examples
    return collate(examples, pad_id=pad_id(tiny_tokenizer))


def adapted(folder, **options):
    pytest.importorskip("peft")
    return load_policy(PolicySpec(model=str(folder), lora=Lora(rank=4), **options))


@torch.no_grad()
def move(policy):
    """What training does: the trainable weights change, the frozen ones do not."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_every_reference_says_the_same(tiny_llama, batch):
    """Adapter off, a copy of the policy as it started, and the folder it was loaded from: equal to 1e-6."""
    policy = adapted(tiny_llama)
    references = [AdapterOff(), FrozenCopy(), FrozenCopy(str(tiny_llama))]
    for reference in references:
        reference.prepare(policy)
        reference.place(policy)
    move(policy)
    off, copied, loaded = (reference.states(batch) for reference in references)
    assert (policy.states(batch) - off.hidden).abs().max() > 0.1
    for states in (copied, loaded):
        torch.testing.assert_close(states.hidden, off.hidden, rtol=0, atol=1e-6)
    stats = [policy(batch, states, CVaR(0.3)) for states in (off, copied, loaded)]
    for other in stats[1:]:
        torch.testing.assert_close(other.ref_logp, stats[0].ref_logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.risk, stats[0].risk, rtol=0, atol=1e-5)


def test_a_frozen_copy_keeps_the_starting_weights_without_gradient(tiny_llama, batch):
    policy = load_policy(PolicySpec(model=str(tiny_llama)))
    reference = FrozenCopy()
    reference.prepare(policy)
    before = reference.states(batch)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    after = reference.states(batch)
    assert torch.equal(before.hidden, after.hidden)
    assert not after.hidden.requires_grad
    assert not after.weight.requires_grad


@pytest.mark.parametrize("reference", [AdapterOff(), FrozenCopy()], ids=repr)
def test_no_gradient_reaches_a_reference(reference, tiny_llama, batch):
    policy = adapted(tiny_llama)
    reference.prepare(policy)
    move(policy)
    states = reference.states(batch)
    assert not states.hidden.requires_grad
    policy(batch, states, CVaR(0.3)).risk.sum().backward()
    with_gradient = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in policy.named_parameters() if f".{TRAINABLE}." in name}
    held = [p for p in reference._policy.parameters() if p.grad is not None]
    assert len(held) == (len(with_gradient) if isinstance(reference, AdapterOff) else 0)


def test_adapter_off_holds_no_second_copy(tiny_llama):
    """Bytes of all weights that policy and reference hold together: once, and twice."""

    def held(reference):
        policy = adapted(tiny_llama)
        reference.prepare(policy)
        tensors = {*policy.parameters(), *reference._policy.parameters()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    assert held(FrozenCopy()) == 2 * held(AdapterOff())


def test_adapter_off_needs_an_adapter(tiny_llama):
    with pytest.raises(ValueError, match="AdapterOff is the policy without its adapter, and this policy has none"):
        AdapterOff().prepare(load_policy(PolicySpec(model=str(tiny_llama))))


def test_a_copy_with_adapters_keeps_their_precision(tiny_llama):
    policy, reference = adapted(tiny_llama, dtype="bfloat16"), FrozenCopy()
    reference.prepare(policy)
    reference.place(policy)
    for (name, mine), theirs in zip(policy.named_parameters(), reference._policy.parameters(), strict=True):
        assert mine.dtype == theirs.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_a_copy_of_a_folder_takes_the_precision_of_the_policy(tiny_llama):
    policy, reference = load_policy(PolicySpec(model=str(tiny_llama), dtype="bfloat16")), FrozenCopy(str(tiny_llama))
    reference.prepare(policy)
    reference.place(policy)
    assert {parameter.dtype for parameter in reference._policy.parameters()} == {torch.bfloat16}


def test_by_default_the_reference_is_the_policy_as_it_starts(tiny_llama):
    """With its adapter off where that adapter is new; a copy where all weights or an earlier adapter are trained."""

    def reference_of(lora):
        return SafetyAlignment(PolicySpec(model=str(tiny_llama), lora=lora)).reference

    assert isinstance(reference_of(None), FrozenCopy)
    assert isinstance(reference_of(Lora()), AdapterOff)
    assert isinstance(reference_of(Lora(start="folder")), FrozenCopy)
    assert not hasattr(SupervisedWarmup(PolicySpec(model=str(tiny_llama), lora=Lora())), "reference")


def test_policy_and_reference_share_a_vocabulary(tiny_llama, tiny_tokenizer, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    other = PolicySpec(config={"model_type": "llama", "vocab_size": 400, **small})
    save_policy(load_policy(other), tiny_tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary mismatch: the policy has .* logits, the reference .* has 400"):
        FrozenCopy(str(tmp_path / "other")).prepare(load_policy(PolicySpec(model=str(tiny_llama))))
