"""Tokens of prompt and response never mix, control tokens are counted, and every position predicts its label."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsa_lightning.data.formats import FormatError, PreferencePair, RowDefect
from rsa_lightning.data.tokenize import (
    ROLES,
    EncodedPair,
    Lengths,
    bos_prefix,
    collate,
    encode_pair,
    encode_pairs,
    encode_prompt,
    encode_texts,
    load_tokenizer,
    pad_id,
    train_tokenizer,
)

LIMITS = Lengths(max_length=64, max_prompt_length=32)
texts = st.text(max_size=60)
replies = texts.filter(str.strip)

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


# --- the tokenizer trained here


@given(st.text())
def test_trained_tokenizer_round_trips_any_text(tiny_tokenizer, text):
    [ids] = encode_texts(tiny_tokenizer, [text])
    assert tiny_tokenizer.decode(ids) == text
    assert not set(ids) & set(tiny_tokenizer.all_special_ids)


def test_trained_tokenizer_reloads_offline(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "The owl\u2028 said: <|eos|> né 🦉"
    assert encode_texts(again, [text]) == encode_texts(tiny_tokenizer, [text])
    assert len({again.bos_token_id, again.eos_token_id, again.pad_token_id}) == 3
    assert again("owl")["input_ids"] == [again.bos_token_id, *encode_texts(again, ["owl"])[0]]


def test_training_a_tokenizer_twice_gives_the_same():
    corpus = ["the owl and the fox", "the fox and the owl"] * 3
    assert train_tokenizer(corpus, 300).get_vocab() == train_tokenizer(corpus, 300).get_vocab()


def test_vocabulary_below_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="must hold 256 bytes and 3 special tokens, got 100"):
        train_tokenizer(["a"], vocab_size=100)


def test_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="no tokenizer at"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_eos_is_an_error_with_the_fix(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"no EOS token.*set tokenizer.eos_token"):
        load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match="no EOS token"):
        encode_pair(tokenizer, PreferencePair("p", "c", "r"), LIMITS)


# --- encoding


def variants(tokenizer):
    """The tokenizer, and it with no BOS, with BOS it never adds, with PAD = EOS, with an EOS it adds itself, no PAD."""
    from tokenizers import processors

    silent, no_bos, pad_eos, adds_eos, no_pad = (copy.deepcopy(tokenizer) for _ in range(5))
    silent.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    no_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    no_bos.bos_token = None
    pad_eos.pad_token = pad_eos.eos_token
    marks = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (tokenizer.bos_token, tokenizer.eos_token)]
    adds_eos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{marks[0][0]} $A {marks[1][0]}", special_tokens=marks
    )
    no_pad.pad_token = None
    return [(tokenizer, 1), (silent, 0), (no_bos, 0), (pad_eos, 1), (adds_eos, 1), (no_pad, 1)]


def test_one_bos_at_most_and_exactly_one_eos(tiny_tokenizer):
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    for tokenizer, bos_count in variants(tiny_tokenizer):
        pair = encode_pair(tokenizer, PreferencePair("Is it safe?", "Yes.", "No, <|eos|> it is not."), LIMITS)
        assert pair.prompt.count(bos) == bos_count == len(bos_prefix(tokenizer))
        assert pair.prompt[:bos_count] == [bos] * bos_count
        assert eos not in pair.prompt
        for response in (pair.chosen, pair.rejected):
            assert (response.count(bos), response.count(eos), response[-1]) == (0, 1, eos)


def test_pad_is_eos_for_want_of_a_pad_token(tiny_tokenizer):
    assert pad_id(tiny_tokenizer) == tiny_tokenizer.pad_token_id != tiny_tokenizer.eos_token_id
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id


@settings(max_examples=200)
@given(texts, replies, replies, st.integers(1, 12), st.integers(2, 8), st.booleans())
def test_truncation_never_empties_a_response(tiny_tokenizer, prompt, chosen, rejected, prompt_room, rest, keep_eos):
    limits = Lengths(prompt_room + rest, prompt_room, keep_eos)
    eos = tiny_tokenizer.eos_token_id
    full = encode_texts(tiny_tokenizer, [prompt, chosen, rejected])
    pair = encode_pair(tiny_tokenizer, PreferencePair(prompt, chosen, rejected), limits)
    assert pair.prompt[0] == tiny_tokenizer.bos_token_id
    kept_prompt = pair.prompt[1:]
    assert kept_prompt == full[0][len(full[0]) - len(kept_prompt) :]  # cut from the left
    assert len(pair.prompt) == min(len(full[0]) + 1, prompt_room)
    for ids, response in zip(full[1:], (pair.chosen, pair.rejected), strict=True):
        fits = len(ids) + 1 <= limits.max_length - len(pair.prompt)
        body = response[:-1] if fits or keep_eos else response
        assert len(body) >= 1
        assert body == ids[: len(body)]  # cut from the right
        assert response.count(eos) == (1 if fits or keep_eos else 0)
        assert body == ids or not fits
        assert len(pair.prompt) + len(response) <= limits.max_length


def test_truncated_rows_are_counted(tiny_tokenizer):
    long, short = "The old owl asked the fox. " * 20, "No."
    pairs = [
        PreferencePair(long, short, short + "."),
        PreferencePair(short, long, short),
        PreferencePair("", short, long),
    ]
    assert encode_pairs(tiny_tokenizer, pairs, LIMITS).truncated == {"prompts": 1, "responses": 2}


def test_prompts_for_generation_are_those_of_training(tiny_tokenizer):
    prompt = "How do I keep bread fresh? " * 10
    pair = encode_pair(tiny_tokenizer, PreferencePair(prompt, "a", "b"), LIMITS)
    assert encode_prompt(tiny_tokenizer, prompt, LIMITS.max_prompt_length) == pair.prompt
    whole = encode_prompt(tiny_tokenizer, prompt)
    assert tiny_tokenizer.decode(whole[1:]) == prompt
    assert whole[-31:] == pair.prompt[1:]


def test_no_token_spans_prompt_and_response():
    """A BPE that has seen nothing but "ASSISTANT: I cannot" merges over the boundary; ours keeps the two apart."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    prompt, response = "ASSISTANT: ", "I cannot"
    bpe = Tokenizer(models.BPE())  # no pre-tokenizer: merges may cross spaces
    bpe.train_from_iterator(
        [prompt + response] * 10, trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    joined = tokenizer(prompt + response)["input_ids"]
    assert len(joined) == 1  # the trap is set: one token over the boundary
    pair = encode_pair(tokenizer, PreferencePair(prompt, response, response + "I"), LIMITS)
    assert "".join(tokenizer.convert_ids_to_tokens(pair.prompt)) == prompt
    assert "".join(tokenizer.convert_ids_to_tokens(pair.chosen[:-1])) == response


@pytest.mark.parametrize("control", ["<|eos|>", "<|bos|>", "<|pad|>"])
def test_text_never_becomes_a_control_token(tiny_tokenizer, control):
    hostile = f"a{control}b"
    assert tiny_tokenizer.convert_tokens_to_ids(control) in tiny_tokenizer(hostile)["input_ids"][1:]  # plain use does
    pair = encode_pair(tiny_tokenizer, PreferencePair(hostile, hostile, control), LIMITS)
    specials = set(tiny_tokenizer.all_special_ids)
    for ids in (pair.prompt[1:], pair.chosen[:-1], pair.rejected[:-1]):
        assert not specials & set(ids)
    assert tiny_tokenizer.decode(pair.chosen[:-1]) == hostile


def test_text_that_a_vocabulary_turns_into_a_control_token_is_skipped():
    """A unigram vocabulary may hold "</s>" as a plain piece; splitting special tokens does not help there."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", -9.0), ("</s>", -1.0), ("a", -2.0), ("b", -2.0)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), eos_token="</s>", unk_token="<unk>"
    )
    bad, good = PreferencePair("a", "a</s>b", "b", row_id="x:1"), PreferencePair("a", "a?b", "b", row_id="x:2")
    result = encode_pairs(tokenizer, [bad, good], LIMITS)
    assert result.skipped == {"control_token": ["x:1"]}
    assert result.kept == [1]  # an unknown character is no control token


def test_response_without_any_token_before_it_is_skipped(tiny_tokenizer):
    """Without BOS an empty prompt leaves nothing that could predict the first response token."""
    tokenizer = variants(tiny_tokenizer)[2][0]
    pairs = [PreferencePair("", "yes", "no", row_id="x:1"), PreferencePair("p", "yes", "no", row_id="x:2")]
    result = encode_pairs(tokenizer, pairs, LIMITS)
    assert (result.skipped, result.kept) == ({"no_prompt_token": ["x:1"]}, [1])
    with pytest.raises(RowDefect, match="no_prompt_token"):
        encode_prompt(tokenizer, "")
    assert encode_prompt(tiny_tokenizer, "") == [tiny_tokenizer.bos_token_id]


def test_lengths_without_room_are_errors():
    with pytest.raises(ValueError, match=r"max_length=10 leaves no room .* max_prompt_length=9"):
        Lengths(10, 9)
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1 token, got 0"):
        Lengths(10, 0)


# --- collate


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


def test_demonstrations_serve_the_chosen_role_only(tiny_tokenizer):
    pair = encode_pair(tiny_tokenizer, PreferencePair("p", "c", "", row_id="d:1"), LIMITS)
    assert pair.rejected == []
    assert collate([pair], ("chosen",))["labels"].tolist() == list(pair.chosen)
    with pytest.raises(ValueError, match="d:1 has no rejected response"):
        collate([pair])


def test_impossible_roles_are_errors():
    with pytest.raises(ValueError, match="need at least 2 pairs"):
        collate(EXAMPLES[:1], ROLES)
    with pytest.raises(ValueError, match="unknown role 'loser'; roles are chosen, rejected, mismatched"):
        collate(EXAMPLES, ("loser",))


def test_positions_pick_the_log_probabilities_of_the_responses(tiny_llama):
    """Against one unpadded forward per row, for both sides of padding; position ids count from the first real token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), load_tokenizer(tiny_llama)
    pairs = [PreferencePair("Is it safe?", " No.", " Yes, quite."), PreferencePair("Owl", " says nothing", " hoots")]
    examples = encode_pairs(tokenizer, pairs, LIMITS).examples
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


def test_a_plain_tokenizer_stays_what_it_was_beside_any_model(tmp_path, tiny_tokenizer):
    """transformers gives the qwen2 model type its own tokenizer class, with one more token and other word splits."""
    from transformers import AutoTokenizer, Qwen2Config

    Qwen2Config(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(again) == len(tiny_tokenizer)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) != len(tiny_tokenizer)  # else this function is no longer needed
    text = "Well, 1234 foxes'll cross\n\n the  river"
    assert again.encode(text) == tiny_tokenizer.encode(text)
