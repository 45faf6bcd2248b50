"""A row of every format becomes the records it stands for, a named defect, or an error with the mend."""

import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsa_lightning.data.formats import check_format, hh, read_row, trl
from rsa_lightning.data.records import (
    ASSISTANT,
    FormatError,
    Message,
    PreferencePair,
    RatedResponse,
    RowDefect,
    human_turns,
    split_key,
    with_row_id,
)

TRL_ROW = {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."}
DIALOGUE = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
USER, SYSTEM = Message("user", "Say hi."), Message("system", "Be kind.")
PKU_ROW = {
    "prompt": "p",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
SHAREGPT_ROW = {
    "conversations": [{"from": "human", "value": "Say hi."}],
    "chosen": {"from": "gpt", "value": "Hi!"},
    "rejected": {"from": "gpt", "value": "No."},
}
SCORED = [{"response": "bad", "overall_score": 1}, {"response": "good", "overall_score": 9.5}]


def said(*turns: str, first: str = "user") -> list[dict[str, str]]:
    """A message list whose roles alternate."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(turns)]


def severe(zero: int, one: int) -> dict[str, int]:
    """Columns of PKU-SafeRLHF's newer release."""
    return {"response_0_severity_level": zero, "response_1_severity_level": one}


# --- TRL


def test_trl_text_row():
    assert trl(TRL_ROW) == PreferencePair("Say hi.", "Hi!", "No.", target=1.0, offset=0.0)
    assert trl({**TRL_ROW, "target": 0.25, "offset": -2, "score_chosen": [1]}) == PreferencePair(
        "Say hi.", "Hi!", "No.", target=0.25, offset=-2.0
    )


def test_costs_and_safety_labels_of_trl():
    """Numbers and booleans, or null where a table of mixed rows has none; rewards are left alone."""
    known = {"chosen_cost": -1, "rejected_cost": 2.5, "chosen_safe": True, "rejected_safe": False}
    assert trl({**TRL_ROW, **known, "chosen_reward": "high"}) == PreferencePair("Say hi.", "Hi!", "No.", **known)
    messages = {"prompt": said("Say hi."), "chosen": said("Hi!", first="assistant"), "rejected": "No."}
    assert trl({**messages, "rejected": said("No.", first="assistant"), **known}).rejected_cost == 2.5
    nothing = dict.fromkeys(known)
    assert trl({**TRL_ROW, **nothing}) == trl(TRL_ROW)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("chosen_cost", True, "'chosen_cost' must be a number, got bool True"),
        ("rejected_cost", float("nan"), "'rejected_cost' must be finite"),
        ("chosen_safe", 1, "'chosen_safe' must be true or false, got int 1"),
    ],
)
def test_costs_are_numbers_and_safety_labels_booleans(column, value, message):
    with pytest.raises(FormatError, match=message):
        trl({**TRL_ROW, column: value})


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": said("Say hi."),
            "chosen": said("Hi!", first="assistant"),
            "rejected": said("No.", first="assistant"),
        },
        {"prompt": "Say hi.", "chosen": said("Hi!", first="assistant"), "rejected": said("No.", first="assistant")},
        {"chosen": said("Say hi.", "Hi!"), "rejected": said("Say hi.", "No.")},
        {"prompt": " Say hi.\n", "chosen": said("Say hi.", "Hi!"), "rejected": said("Say hi.", "No.")},
        {"prompt": said("Say hi."), "chosen": said("Say hi.", "Hi!"), "rejected": said("Say hi.", "No.")},
        {"prompt": said("Say hi."), "chosen": "Hi!", "rejected": "No."},
    ],
    ids=["explicit", "text prompt, replies only", "implicit", "prompt repeated as text", "repeated as list", "mixed"],
)
def test_every_conversational_shape_of_trl_is_one_pair(row):
    assert trl(row) == PreferencePair((USER,), "Hi!", "No.")


def test_a_text_prompt_may_be_the_first_or_the_last_thing_the_user_says():
    """UltraFeedback-binarized has the first, other sets of several turns the last."""
    chosen, rejected = said("one", "two", "three", "yes"), said("one", "two", "three", "no")
    for prompt in ("one", "three"):
        assert trl({"prompt": prompt, "chosen": chosen, "rejected": rejected}).prompt == (
            Message("user", "one"),
            Message("assistant", "two"),
            Message("user", "three"),
        )
    for prompt in ("two", "four"):
        assert defect("trl", {"prompt": prompt, "chosen": chosen, "rejected": rejected}) == "prompt_mismatch"


def test_completions_of_several_turns_belong_to_the_prompt_but_for_the_last():
    more = said("And?", "And what?", first="assistant")
    row = {
        "prompt": [SYSTEM._asdict(), *said("one")],
        "chosen": [*more, *said("yes", first="assistant")],
        "rejected": [*more, *said("no", first="assistant")],
    }
    assert trl(row) == PreferencePair(
        (SYSTEM, Message("user", "one"), Message("assistant", "And?"), Message("user", "And what?")), "yes", "no"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not "The sky is bl"
        ("Q: one? A: yes", "Q: one? A: no", "Q: one? A:"),
        ("one two", "one twofold", "one"),
        ("Q\nyes", "Q\nno", "Q\n"),
        ("one", "one two", "one"),
        ("one ", "one two", "one"),
        ("caf\u00e9 a", "cafe\u0301 b", None),
        ("yes", "no", None),
        (" yes", " no", None),
        ("same text", "same text", None),
    ],
)
def test_the_common_beginning_of_two_texts_ends_between_words(chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    if prompt is None:
        assert defect("trl", row) == "no_prompt"
    else:
        pair = trl(row)
        assert pair.prompt == prompt
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_implicit_prompts_never_cut_a_word_and_lose_no_character(start, one, two):
    chosen, rejected = start + one, start + two
    try:
        pair = trl({"chosen": chosen, "rejected": rejected})
    except RowDefect:
        return
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)
    for response in (pair.chosen, pair.rejected):
        assert not response or response[0].isspace() or pair.prompt[-1].isspace()


@pytest.mark.parametrize(
    ("scores", "contradictory"),
    [((1, 2), True), ((2, 1), False), ((1, 1), False), ((None, 2), False), ((math.nan, 2), False), ((False, 2), False)],
)
def test_scores_in_the_wrong_order_contradict_the_row(scores, contradictory):
    assert trl({**TRL_ROW, "score_chosen": scores[0], "score_rejected": scores[1]}).contradictory is contradictory


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi.", "image": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "Hi!", "rejected": "No."}
    assert trl(row).prompt == (USER,)


# --- PKU-SafeRLHF


def test_pku_criteria_choose_by_their_own_label():
    assert read_row("pku", PKU_ROW, "helpful") == (
        PreferencePair("p", "one", "zero", chosen_safe=False, rejected_safe=True),
    )
    assert read_row("pku", PKU_ROW, "safe") == (
        PreferencePair("p", "zero", "one", chosen_safe=True, rejected_safe=False),
    )


def test_pku_newer_release_has_costs_and_columns_that_are_not_read():
    row = {**PKU_ROW, **severe(0, 3), "prompt_source": "x", "response_0_harm_category": {"Fraud": False}, "sha256": 1}
    [pair] = read_row("pku", row, "helpful")
    assert (pair.chosen_cost, pair.rejected_cost, pair.contradictory) == (3.0, 0.0, False)
    ratings = read_row("pku_labels", row)
    assert ratings == (RatedResponse("p", "zero", True, 0.0), RatedResponse("p", "one", False, 3.0))


@pytest.mark.parametrize(
    ("change", "helpful", "safe"),
    [
        ({}, False, False),
        ({"safer_response_id": 1}, False, True),  # the safer one is flagged unsafe, the other safe
        ({**severe(0, 2)}, False, False),
        ({**severe(1, 2)}, True, True),  # safe with a severity
        ({**severe(0, 0)}, True, True),  # unsafe without one
        ({"is_response_0_safe": False, **severe(1, 2)}, False, False),
        ({"is_response_0_safe": False, **severe(2, 2)}, False, False),
        ({"is_response_0_safe": False, **severe(3, 2)}, False, True),  # of two unsafe ones the worse is called safer
        ({"is_response_0_safe": False, "safer_response_id": 1}, False, False),
        ({"is_response_1_safe": True, "safer_response_id": 1}, False, False),
        ({"response_0_severity_level": None, "response_1_severity_level": 1}, False, False),
    ],
)
def test_pku_labels_that_disagree_are_contradictory(change, helpful, safe):
    """The truth table of the two flags, the two severities and the safety label."""
    row = {**PKU_ROW, **change}
    assert [read_row("pku", row, c)[0].contradictory for c in ("helpful", "safe")] == [helpful, safe]
    assert any(rating.contradictory for rating in read_row("pku_labels", row)) is helpful


# --- the others


def test_hh_row_splits_at_the_last_assistant_turn():
    pair = hh({"chosen": DIALOGUE + " four", "rejected": DIALOGUE + " five"})
    assert pair == PreferencePair(DIALOGUE, " four", " five")


@given(st.lists(st.text(), min_size=1, max_size=4), st.text(), st.text())
def test_hh_transcripts_are_rebuilt_exactly(turns, chosen, rejected):
    """prompt + response is the transcript to the last character, whatever the text is (markers aside)."""
    turns, (chosen, rejected) = ([t.replace("\n\n", "") for t in x] for x in (turns, (chosen, rejected)))
    prompt = "".join(f"\n\nHuman: {turn}{ASSISTANT}" for turn in turns)
    pair = hh({"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert pair == PreferencePair(prompt, chosen, rejected)


def test_sharegpt_row():
    assert read_row("sharegpt", SHAREGPT_ROW) == (PreferencePair((USER,), "Hi!", "No."),)
    with_system = {**SHAREGPT_ROW, "system": "Be kind."}
    assert read_row("sharegpt", with_system)[0].prompt == (SYSTEM, USER)
    turns = [{"from": "system", "value": "Be kind."}, *SHAREGPT_ROW["conversations"]]
    for row in ({**with_system, "conversations": turns}, {**SHAREGPT_ROW, "system": None, "conversations": turns}):
        assert read_row("sharegpt", row)[0].prompt == (SYSTEM, USER)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": said("Say hi.", "Hi!")}, (USER,)),
        ({"prompt": "Say hi.", "completion": "Hi!"}, "Say hi."),
        ({"prompt": said("Say hi."), "completion": said("Hi!", first="assistant")}, (USER,)),
        ({"prompt": "Say hi.", "completion": said("Hi!", first="assistant"), "messages": None}, (USER,)),
        ({"prompt": said("Say hi."), "completion": "Hi!"}, (USER,)),
    ],
)
def test_ratings_and_demonstrations_take_text_and_messages(row, prompt):
    for label in (True, False):
        assert read_row("kto", {**row, "label": label}) == (RatedResponse(prompt, "Hi!", label),)
    assert read_row("demonstration", row) == (RatedResponse(prompt, "Hi!", desirable=True),)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "p", "completions": [*SCORED, {"response": "fair", "overall_score": 5}]},
        {"prompt": "p", "completions": [{"text": "bad", "score": 0}, {"text": "good", "score": 1}]},
        {"prompt": "p", "completions": [{"content": "good", "rating": 2}, {"content": "bad", "rating": -2.0}]},
        {"prompt": "p", "responses": ["good", "bad", "also bad"], "scores": [3, 1, 1]},
    ],
)
def test_ultrafeedback_sets_the_best_against_the_worst(row):
    assert read_row("ultrafeedback", row) == (PreferencePair("p", "good", "bad"),)


def test_records_are_named_by_their_row():
    assert [r.row_id for r in with_row_id(read_row("trl", TRL_ROW), "a.jsonl:3")] == ["a.jsonl:3"]
    assert [r.row_id for r in with_row_id(read_row("pku_labels", PKU_ROW), "a:3")] == ["a:3/0", "a:3/1"]


def test_blank_and_equal_responses_are_records():
    """Whether they are dropped is a matter of policy."""
    assert trl({**TRL_ROW, "rejected": " \n"}).rejected == " \n"
    assert hh({"chosen": DIALOGUE, "rejected": DIALOGUE}) == PreferencePair(DIALOGUE, "", "")
    assert read_row("demonstration", {"prompt": "p", "completion": ""}) == (RatedResponse("p", ""),)


# --- what cannot be used


def defect(format: str, row: dict, criterion: str | None = None) -> str:
    """The reason of the RowDefect that `row` raises."""
    with pytest.raises(RowDefect) as caught:
        read_row(format, row, criterion)
    return caught.value.reason


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("hh", {"chosen": DIALOGUE + " a", "rejected": DIALOGUE.replace("one", "six") + " b"}, "prompt_mismatch"),
        ("hh", {"chosen": DIALOGUE + " a\n\nHuman: and?", "rejected": DIALOGUE + " b"}, "human_last"),
        ("trl", {"chosen": said("a", "b"), "rejected": said("c", "d")}, "prompt_mismatch"),
        ("trl", {"prompt": "a", "chosen": said("b", first="assistant"), "rejected": said("a", "d")}, "prompt_mismatch"),
        ("trl", {"chosen": said("a"), "rejected": said("a", "b")}, "human_last"),
        ("trl", {"chosen": said("b", first="assistant"), "rejected": said("c", first="assistant")}, "no_prompt"),
        ("trl", {"chosen": [], "rejected": []}, "no_prompt"),
        ("trl", {**TRL_ROW, "prompt": []}, "no_prompt"),
        ("trl", {**TRL_ROW, "prompt": said("a", "b")}, "assistant_last"),
        ("sharegpt", {**SHAREGPT_ROW, "conversations": []}, "no_prompt"),
        ("sharegpt", {**SHAREGPT_ROW, "conversations": [{"from": "system", "value": "s"}]}, "no_prompt"),
        (
            "sharegpt",
            {**SHAREGPT_ROW, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "assistant_last",
        ),
        ("kto", {"messages": said("a"), "label": True}, "human_last"),
        ("kto", {"messages": said("a", "b", "c"), "label": True}, "human_last"),
        ("demonstration", {"messages": []}, "no_prompt"),
        ("ultrafeedback", {"prompt": "p", "completions": SCORED[:1]}, "single_response"),
        ("ultrafeedback", {"prompt": "p", "completions": []}, "single_response"),
        ("ultrafeedback", {"prompt": "p", "responses": ["a", "b"], "scores": [1, 1.0]}, "tied"),
    ],
)
def test_defects_are_named(format, row, reason):
    assert defect(format, row) == reason


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("trl", {"prompt": "p", "chosen": "c"}, r"no column 'rejected' \(columns: 'prompt', 'chosen'\): rename it"),
        ("trl", {"chosen": DIALOGUE, "rejected": DIALOGUE}, "set format: hh"),
        ("trl", {**TRL_ROW, "chosen": None}, "column 'chosen' must be text, got null"),
        ("trl", {**TRL_ROW, "chosen": 7}, "column 'chosen' must be text, got int 7"),
        ("trl", {**TRL_ROW, "prompt": {}}, "column 'prompt' must be text, got a value of type dict"),
        ("trl", {**TRL_ROW, "prompt": [{"role": "user"}]}, "'prompt', message 1 must be an object with 'role' and 'con"),
        ("trl", {**TRL_ROW, "chosen": ["a"]}, "'chosen', message 1 must be an object with 'role' and 'content'"),
        ("trl", {**TRL_ROW, "chosen": said("a")}, "column 'rejected' must be a list, got a value of type str"),
        ("trl", {**TRL_ROW, "chosen": "a\ud800"}, "half of a surrogate pair at character 1"),
        ("trl", {**TRL_ROW, "target": 1.5}, r"column 'target' must be in \[0, 1\], got float 1.5"),
        ("trl", {**TRL_ROW, "target": math.nan}, r"column 'target' must be in \[0, 1\], got float nan"),
        ("trl", {**TRL_ROW, "target": None}, "column 'target' must be a number, got null"),
        ("trl", {**TRL_ROW, "target": True}, "column 'target' must be a number, got bool True"),
        ("trl", {**TRL_ROW, "target": "1"}, "column 'target' must be a number, got a value of type str"),
        ("trl", {**TRL_ROW, "offset": math.inf}, "column 'offset' must be finite, got float inf"),
        ("trl", {**TRL_ROW, "offset": -1e300}, "column 'offset' must be finite, got float -1e"),
        ("trl", {**TRL_ROW, "offset": 10**400}, "column 'offset' must be finite, got a value of type int"),
        ("trl", {**TRL_ROW, "prompt": [{"role": "human", "content": "a"}]}, "role 'human'; known: system, user, assi"),
        ("trl", {**TRL_ROW, "prompt": [{"role": "gpt", "content": "a"}]}, "ShareGPT's roles: set format: sharegpt"),
        ("trl", {**TRL_ROW, "prompt": [{"role": "tool", "content": "a"}]}, "role 'tool'; .*: rename it, or drop the row"),
        ("trl", {**TRL_ROW, "prompt": [{"role": "user", "content": None}]}, "message 1 must be text, got null"),
        ("trl", {**TRL_ROW, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image': only"),
        ("trl", PKU_ROW, r"PKU-SafeRLHF columns: set format: pku \(pairs\) or pku_labels"),
        ("trl", SHAREGPT_ROW, "ShareGPT-style preference columns: set format: sharegpt"),
        ("trl", {"messages": said("a", "b"), "label": True}, "unpaired rating columns: set format: kto"),
        ("trl", {"instruction": "p", "completions": SCORED}, "UltraFeedback columns: set format: ultrafeedback"),
        ("hh", {"chosen": "hello", "rejected": "world"}, "column 'chosen' has no .* turn"),
        ("hh", TRL_ROW, "TRL's preference columns: set format: trl"),
        ("demonstration", TRL_ROW, "no column 'completion'.* set format: trl"),
        ("pku", TRL_ROW, "no column 'safer_response_id'.* set format: trl"),
        ("pku", {**PKU_ROW, "safer_response_id": True}, "'safer_response_id' must be 0 or 1, got bool True"),
        ("pku", {**PKU_ROW, "safer_response_id": 2}, "'safer_response_id' must be 0 or 1, got int 2"),
        ("pku", {**PKU_ROW, "is_response_0_safe": 1}, "'is_response_0_safe' must be true or false, got int 1"),
        ("pku", {**PKU_ROW, **severe(0, -1)}, "'response_1_severity_level' must be at least 0, got int -1"),
        ("pku_labels", {**PKU_ROW, "is_response_1_safe": None}, "'is_response_1_safe' must be true or false, got null"),
        ("sharegpt", {**SHAREGPT_ROW, "conversations": said("a")}, "turn 1 must be an object with 'from' and 'value'"),
        ("sharegpt", {**SHAREGPT_ROW, "chosen": {"from": "human", "value": "a"}}, "'chosen' must be a turn of gpt"),
        ("sharegpt", {**SHAREGPT_ROW, "rejected": "No."}, "'rejected' must be an object with 'from' and 'value'"),
        ("sharegpt", {**SHAREGPT_ROW, "system": 1}, "column 'system' must be text"),
        (
            "sharegpt",
            {**SHAREGPT_ROW, "system": "a", "conversations": [{"from": "system", "value": "b"}]},
            "two different system texts: keep one",
        ),
        ("kto", {"prompt": "p", "completion": "c"}, "no column 'label'.* set format: demonstration"),
        ("kto", {"prompt": "p", "completion": "c", "label": 1}, "column 'label' must be true or false, got int 1"),
        ("ultrafeedback", {"prompt": "p"}, "no column 'responses'"),
        ("ultrafeedback", {"prompt": "p", "completions": ["a", "b"]}, "'completions', item 1 must be an object with"),
        ("ultrafeedback", {"prompt": "p", "completions": [{"score": 1}]}, "has none of response, text, content"),
        ("ultrafeedback", {"prompt": "p", "completions": [{"text": "a"}]}, "has none of overall_score, score, rating"),
        (
            "ultrafeedback",
            {"prompt": "p", "completions": [{"text": "a", "score": math.nan}, {"text": "b", "score": 1}]},
            "item 1, its score must be finite, got float nan",
        ),
        ("ultrafeedback", {"prompt": "p", "responses": ["a", "b"], "scores": [1, "2"]}, "'scores', item 2 must be a num"),
        ("ultrafeedback", {"prompt": "p", "responses": ["a"], "scores": []}, "1 'responses' and 0 'scores'"),
    ],
)  # fmt: skip
def test_rows_of_another_format_are_errors_with_the_mend(format, row, message):
    with pytest.raises(FormatError, match=message):
        read_row(format, row, "safe" if format == "pku" else None)


@pytest.mark.parametrize("column", ["prompt", "chosen"])
@pytest.mark.parametrize(
    "wrap", [list, lambda texts: [{"role": texts[0], "content": "a"}], lambda texts: {"a": texts[0]}]
)
def test_messages_do_not_repeat_the_text_of_a_row(column, wrap):
    secret = ["a text that does not belong on a screen"]
    with pytest.raises(FormatError) as caught:
        read_row("trl", {**TRL_ROW, column: wrap(secret)})
    assert secret[0] not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "criterion", "message"),
    [
        ("tlr", None, "unknown format 'tlr'; known: trl, pku, pku_labels, hh"),
        ("pku", None, "pku carries two labels per row: set criterion: helpful or safe"),
        ("pku", "harmless", "helpful or safe, got 'harmless'"),
        ("trl", "safe", r"trl carries one label per row: remove criterion \('safe'\)"),
    ],
)
def test_format_and_criterion_must_fit(format, criterion, message):
    with pytest.raises(FormatError, match=message):
        check_format(format, criterion)
    with pytest.raises(FormatError, match=message):
        read_row(format, TRL_ROW, criterion)


def test_split_key_is_the_first_human_turn():
    assert split_key(DIALOGUE) == split_key(f"\n\nHuman: one{ASSISTANT}") == "\n\nHuman: one"
    assert split_key("a plain prompt") == "a plain prompt"
    assert split_key((SYSTEM, USER, Message("user", "more"))) == "Say hi."
    assert human_turns(DIALOGUE) == [" one", " three"]
    assert human_turns((SYSTEM, USER)) == ["Say hi."]


def test_formats_need_no_torch():
    """And reading JSON lines needs neither datasets nor pyarrow."""
    code = (
        "import sys, rsa_lightning.data.formats, rsa_lightning.data.quality, rsa_lightning.data.readers\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- the real files, where they are present

real = pytest.mark.skipif("RSA_TEST_DATA" not in os.environ, reason="RSA_TEST_DATA names no folder with real data")


def real_records(name: str, format: str, criterion: str | None = None) -> tuple[list, Counter]:
    """(the records, the number of rows by defect) of a real file."""
    records, defects = [], Counter()
    with gzip.open(Path(os.environ["RSA_TEST_DATA"]) / f"{name}.jsonl.gz") as file:
        for line in file:
            try:
                records += read_row(format, json.loads(line), criterion)
            except RowDefect as error:
                defects[error.reason] += 1
    return records, defects


@real
@pytest.mark.parametrize(
    ("name", "format", "criterion", "records", "defects"),
    [
        ("hh_helpful_base_test", "hh", None, 2345, {"prompt_mismatch": 9}),
        ("hh_harmless_base_test", "hh", None, 2307, {"prompt_mismatch": 5}),
        ("pku_saferlhf_legacy32", "pku", "helpful", 32, {}),
        ("pku_saferlhf_legacy32", "pku", "safe", 32, {}),
        ("pku_saferlhf_legacy32", "pku_labels", None, 64, {}),
        ("open_instruct_conversational100", "trl", None, 100, {}),
        ("llamafactory_dpo_en_demo300", "sharegpt", None, 300, {}),
        ("llamafactory_kto_en_demo300", "kto", None, 300, {}),
    ],
)
def test_real_files_have_their_known_rows(name, format, criterion, records, defects):
    read, skipped = real_records(name, format, criterion)
    assert (len(read), skipped) == (records, defects)


@real
def test_real_files_keep_their_shapes():
    transcripts, _ = real_records("hh_helpful_base_test", "hh")
    assert all(p.prompt.startswith("\n\nHuman:") and p.prompt.endswith(ASSISTANT) for p in transcripts)
    sharegpt, _ = real_records("llamafactory_dpo_en_demo300", "sharegpt")
    assert all(p.prompt[-1].role == "user" for p in sharegpt)
    assert sum(p.prompt[0].role == "system" for p in sharegpt) == 80
    kto, _ = real_records("llamafactory_kto_en_demo300", "kto")
    assert Counter(r.desirable for r in kto) == {True: 150, False: 150}


@real
def test_the_two_labels_of_pku_often_disagree():
    """19 of the 32 rows prefer one response as helpful and the other as safe."""
    helpful, _ = real_records("pku_saferlhf_legacy32", "pku", "helpful")
    safe, _ = real_records("pku_saferlhf_legacy32", "pku", "safe")
    assert sum(a.chosen != b.chosen for a, b in zip(helpful, safe, strict=True)) == 19
    assert Counter((p.chosen_safe, p.rejected_safe) for p in safe) == {
        (True, True): 11, (False, False): 16, (True, False): 5,
    }  # fmt: skip
