"""Every position predicts its label, on either side of the padding and whatever responses the examples have."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rsa_lightning.data.batch import ROLES, EncodedPair, collate
from rsa_lightning.data.records import PreferencePair
from rsa_lightning.data.tokenize import Lengths, encode_records, load_tokenizer, pad_id

LIMITS = Lengths(max_length=64, max_prompt_length=32)

# Three pairs with known ids: BOS 1, EOS 2; prompts of 3, 2 and 1 tokens, responses of 2 to 4
EXAMPLES = [
    EncodedPair([1, 10, 11], [20, 2], [30, 31, 2], row_id="a:1"),
    EncodedPair([1, 12], [21, 22, 23, 2], [32, 2], row_id="a:2"),
    EncodedPair([1], [24, 25, 2], [33, 2], row_id="a:3"),
]


def rows(batch) -> list[tuple[list[int], list[int]]]:
    """(the tokens before each label, the labels) of every row, read back through `positions` alone."""
    width = batch["input_ids"].shape[1]
    flat = batch["input_ids"].flatten()
    bounds = batch["cu_seqlens"].tolist()
    spans = [slice(lo, hi) for lo, hi in itertools.pairwise(bounds)]
    assert all((batch["positions"][span] // width == b).all() for b, span in enumerate(spans))
    return [(flat[batch["positions"][span]].tolist(), batch["labels"][span].tolist()) for span in spans]


def test_batch_by_hand():
    """Two pairs, chosen rows first; T = 6. Row 0 is [1 10 11 20 2 .]: 20 at t = 3 is predicted at 2, EOS at 3."""
    batch = collate(EXAMPLES[:2], pad_id=0)
    assert batch["input_ids"].tolist() == [
        [1, 10, 11, 20, 2, 0],
        [1, 12, 21, 22, 23, 2],
        [1, 10, 11, 30, 31, 2],
        [1, 12, 32, 2, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 6, 6, 4]
    assert batch["positions"].tolist() == [2, 3, 7, 8, 9, 10, 14, 15, 16, 19, 20]
    assert batch["labels"].tolist() == [20, 2, 21, 22, 23, 2, 30, 31, 2, 32, 2]
    assert batch["cu_seqlens"].tolist() == [0, 2, 6, 9, 11]
    assert batch["roles"].tolist() == [0, 0, 1, 1]
    assert batch["pair_ids"].tolist() == [0, 1, 0, 1]
    assert batch["target"] is None
    assert batch["offset"] is None
    assert batch["chosen_costs"] is batch["rejected_costs"] is None
    assert batch["row_ids"] == ["a:1", "a:2"]
    integers = [v for v in batch.values() if isinstance(v, torch.Tensor)]
    assert all(v.dtype == torch.int64 for v in integers)


@pytest.mark.parametrize("roles", [("chosen",), ("rejected",), ("chosen", "rejected"), ROLES])
def test_left_and_right_padding_score_the_same_tokens(roles):
    right, left = (collate(EXAMPLES, roles, pad_id=9, padding_side=side) for side in ("right", "left"))
    assert rows(left) == rows(right)
    for name in ("labels", "cu_seqlens", "roles", "pair_ids"):
        assert torch.equal(left[name], right[name])
    for batch, column in ((left, -1), (right, 0)):
        assert batch["attention_mask"][:, column].all()
        kept = [
            ids[mask].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ]
        assert kept == [
            ids[mask].tolist() for ids, mask in zip(right["input_ids"], right["attention_mask"].bool(), strict=True)
        ]
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 9).all()


@given(st.data())
def test_every_label_follows_its_position(data):
    """For random lengths: the token before each label is the one that precedes it in its row."""
    ids = st.integers(3, 99)
    examples = [
        EncodedPair(
            data.draw(st.lists(ids, min_size=1, max_size=5)),
            data.draw(st.lists(ids, min_size=1, max_size=5)),
            data.draw(st.lists(ids, min_size=1, max_size=5)),
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    batch = collate(examples, padding_side=data.draw(st.sampled_from(["left", "right"])))
    expected = [(e.prompt, e.chosen) for e in examples] + [(e.prompt, e.rejected) for e in examples]
    assert rows(batch) == [([prompt[-1], *response[:-1]], response) for prompt, response in expected]


def test_pad_equal_to_eos_hides_no_eos():
    """Masks go by length: with PAD = EOS = 2 the labels and masks are those of any other pad id."""
    same, other = collate(EXAMPLES, pad_id=2), collate(EXAMPLES, pad_id=0)
    for name in ("attention_mask", "positions", "labels", "cu_seqlens"):
        assert torch.equal(same[name], other[name])
    assert (same["labels"] == 2).sum() == 6


def test_mismatched_rows_answer_the_prompt_of_the_next_pair():
    batch = collate(EXAMPLES, ROLES)
    assert batch["roles"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert rows(batch)[6:] == [
        ([11, 24, 25], [24, 25, 2]),  # prompt 0, chosen 2
        ([12, 20], [20, 2]),  # prompt 1, chosen 0
        ([1, 21, 22, 23], [21, 22, 23, 2]),  # prompt 2, chosen 1
    ]


def test_mismatched_rows_never_widen_the_batch():
    """Prompt 0 has 5 tokens and chosen 1 has 4: together 9, cut to the 6 that the pairs themselves need."""
    examples = [EncodedPair([1, 5, 6, 7, 8], [2], [2]), EncodedPair([1], [20, 21, 22, 2], [2])]
    batch = collate(examples, ROLES)
    assert batch["input_ids"].shape[1] == 6
    assert rows(batch)[4] == ([8], [20])


def test_targets_and_offsets_are_float32_when_any_differs():
    examples = [EXAMPLES[0]._replace(target=0.75), EXAMPLES[1]._replace(offset=-1.5)]
    batch = collate(examples)
    assert torch.equal(batch["target"], torch.tensor([0.75, 1.0]))
    assert torch.equal(batch["offset"], torch.tensor([0.0, -1.5]))
    assert batch["target"].dtype == torch.float32


RATED = [
    EXAMPLES[0]._replace(rejected=[]),  # desirable
    EXAMPLES[1]._replace(chosen=[]),  # undesirable
    EXAMPLES[2],  # a pair among them
    EXAMPLES[0]._replace(chosen=[], row_id="a:4"),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rated_responses_are_rows_of_their_own_role(side):
    """One desirable, two undesirable responses and a pair: 2 chosen rows, 3 rejected rows."""
    batch = collate(RATED, padding_side=side)
    assert batch["roles"].tolist() == [0, 0, 1, 1, 1]
    assert batch["pair_ids"].tolist() == [0, 2, 1, 2, 3]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 7, 9, 12]
    assert batch["labels"].tolist() == [20, 2, 24, 25, 2, 32, 2, 33, 2, 30, 31, 2]
    assert rows(batch)[1] == ([1, 24, 25], [24, 25, 2])
    assert rows(batch)[2] == ([12, 32], [32, 2])
    assert batch["row_ids"] == ["a:1", "a:2", "a:3", "a:4"]  # one for each example, as targets and offsets are


def test_mismatched_rows_borrow_the_response_that_is_there():
    batch = collate(RATED, ROLES)
    assert batch["pair_ids"].tolist()[5:] == [0, 1, 2, 3]
    # prompt i with the response of example i - 1: the rejected one of 3, chosen 0, rejected 1, chosen 2
    assert [labels for _, labels in rows(batch)[5:]] == [[30, 31, 2], [20, 2], [32, 2], [24, 25, 2]]


def test_a_batch_of_one_kind_has_rows_of_that_kind_alone():
    desirable = collate([RATED[0], RATED[0]])
    assert (desirable["roles"].tolist(), desirable["pair_ids"].tolist()) == ([0, 0], [0, 1])
    undesirable = collate([RATED[1]])
    assert (undesirable["roles"].tolist(), undesirable["labels"].tolist()) == ([1], [32, 2])


def test_targets_and_offsets_stay_one_for_each_example():
    batch = collate([e._replace(offset=float(i)) for i, e in enumerate(RATED)])
    assert batch["offset"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert batch["offset"][batch["pair_ids"]].tolist() == [0.0, 2.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("roles", [("chosen", "rejected"), ROLES])
def test_arrays_and_lists_give_the_same_batch(roles):
    """Views of a memory-mapped file are int32; a batch is int64 whatever it was made of."""
    arrays = [
        e._replace(**{name: np.array(getattr(e, name), dtype=np.int32) for name in ("prompt", "chosen", "rejected")})
        for e in RATED
    ]
    lists, mapped = collate(RATED, roles), collate(arrays, roles)
    for name, value in lists.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == mapped[name].dtype == torch.int64
            assert torch.equal(value, mapped[name])


def test_a_batch_does_not_share_memory_with_its_examples():
    prompt = np.array([1, 5], dtype=np.int64)
    batch = collate([EncodedPair(prompt, [7, 2], [])])
    batch["input_ids"].zero_()
    assert prompt.tolist() == [1, 5]


def test_impossible_roles_are_errors():
    with pytest.raises(ValueError, match=r"none of \['a:1'\] has a response for the roles rejected"):
        collate(RATED[:1], ("rejected",))
    with pytest.raises(ValueError, match="need at least 2 pairs"):
        collate(EXAMPLES[:1], ROLES)
    with pytest.raises(ValueError, match="unknown role 'loser'; roles are chosen, rejected, mismatched"):
        collate(EXAMPLES, ("loser",))


def test_positions_pick_the_log_probabilities_of_the_responses(tiny_llama):
    """Against one unpadded forward per row, for both sides of padding; position ids count from the first real token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), load_tokenizer(tiny_llama)
    pairs = [PreferencePair("Is it safe?", " No.", " Yes, quite."), PreferencePair("Owl", " says nothing", " hoots")]
    examples = encode_records(tokenizer, pairs, LIMITS).examples
    alone = []
    for prompt, response in [(e.prompt, e.chosen) for e in examples] + [(e.prompt, e.rejected) for e in examples]:
        logp = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        alone.extend(logp[len(prompt) - 1 + i, token] for i, token in enumerate(response))
    for side in ("right", "left"):
        batch = collate(examples, pad_id=pad_id(tokenizer), padding_side=side)
        mask = batch["attention_mask"]
        logits = model(batch["input_ids"], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        logp = logits.flatten(0, 1)[batch["positions"]].log_softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
        torch.testing.assert_close(logp, torch.stack(alone), atol=1e-5, rtol=0)


def test_costs_reach_the_batch_where_every_example_has_them():
    costly = [e._replace(chosen_cost=0.0, rejected_cost=float(i)) for i, e in enumerate(EXAMPLES)]
    batch = collate(costly)
    assert batch["chosen_costs"].tolist() == [0, 0, 0]
    assert batch["rejected_costs"].tolist() == [0, 1, 2]
    assert batch["chosen_costs"].dtype == batch["rejected_costs"].dtype == torch.float32
    partly = collate([costly[0], costly[1]._replace(rejected_cost=None)])
    assert partly["chosen_costs"].tolist() == [0, 0]
    assert partly["rejected_costs"] is None
