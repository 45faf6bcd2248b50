"""Defects are found where they are and nowhere else, and the policies say what becomes of them."""

import dataclasses
import gzip
import itertools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsa_lightning.data import quality
from rsa_lightning.data.formats import read_row
from rsa_lightning.data.quality import Defects, contaminated, defects_of, evaluation_key, repeated
from rsa_lightning.data.records import ASSISTANT, Message, PreferencePair, RatedResponse, RowDefect, human_turns

AB, BA = PreferencePair("p", "a", "b"), PreferencePair("p", "b", "a")
GOOD, BAD = RatedResponse("p", "a", True), RatedResponse("p", "a", False)
MESSAGES = (Message("user", "p"),)


def test_a_safety_label_and_an_anchored_cost_that_disagree_contradict_each_other():
    """0 or less is safe. Costs that are known up to a constant only cannot disagree."""
    for safe, cost, wrong in (
        (True, 0, False),
        (True, -1, False),
        (False, 2, False),
        (True, 2, True),
        (False, 0, True),
    ):
        pair = PreferencePair("p", "a", "b", rejected_safe=safe, rejected_cost=cost)
        assert defects_of(pair) == (("contradictory",) if wrong else ())
        assert defects_of(pair, anchored=False) == ()
    assert defects_of(PreferencePair("p", "a", "b", chosen_cost=2.0)) == ()


# --- policies


def test_every_reason_has_a_policy():
    assert {name: Defects().policy(name) for name in ("empty", "overlong", "wrong_type", "human_last", "tied")} == {
        "empty": "drop",
        "overlong": "keep",
        "wrong_type": "fail",
        "human_last": "drop",
        "tied": "drop",
    }
    chosen = Defects(empty="fail", duplicate="keep", unusable="fail")
    assert [chosen.policy(name) for name in ("empty", "duplicate", "no_prompt", "max_dropped")] == [
        "fail", "keep", "fail", "fail",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty": "ignore"}, "defects.empty must be one of drop, keep, fail, got 'ignore'"),
        ({"wrong_type": "keep"}, "defects.wrong_type must be one of drop, fail, got 'keep'"),
        ({"prompt_mismatch": "keep"}, "defects.prompt_mismatch must be one of drop, fail"),
        ({"unusable": "keep"}, "defects.unusable must be one of drop, fail"),
        ({"max_dropped": 50}, r"defects.max_dropped is a share of the rows in \[0, 1\], got 50"),
    ],
)
def test_impossible_policies_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Defects(**options)


def test_policies_parse_from_the_command_line():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--defects", type=Defects, default=Defects())
    parsed = parser.instantiate(parser.parse_args(['--defects={"duplicate": "keep"}', "--defects.empty=fail"]))
    assert parsed.defects == Defects(duplicate="keep", empty="fail")
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--defects.wrong_type=keep"])


# --- one record


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (AB, ()),
        (PreferencePair("p", " \n", "b"), ("empty",)),
        (PreferencePair("p", "a", ""), ("empty",)),
        (PreferencePair("p", "a", "a"), ("identical",)),
        (PreferencePair("p", "", ""), ("empty", "identical")),
        (PreferencePair("p", "a", "b", contradictory=True), ("contradictory",)),
        (PreferencePair("", "a", "a "), ()),
        (RatedResponse("p", "\t"), ("empty",)),
        (RatedResponse("p", "a", contradictory=True), ("contradictory",)),
        (GOOD, ()),
    ],
)
def test_defects_of_a_record_alone(record, found):
    assert defects_of(record) == found


# --- all records


@pytest.mark.parametrize(
    ("records", "duplicate", "contradictory"),
    [
        ([AB, AB, AB], [1, 2], []),
        ([AB, dataclasses.replace(AB, chosen=" a\n", prompt="p "), BA], [1], [0, 1, 2]),
        ([AB, BA, AB], [2], [0, 1, 2]),
        ([AB, dataclasses.replace(BA, prompt="q")], [], []),
        ([AB, dataclasses.replace(AB, prompt=MESSAGES), dataclasses.replace(BA, prompt=MESSAGES)], [], [1, 2]),
        ([AB, dataclasses.replace(BA, target=0.2)], [], []),  # b, a with target 0.2 prefers a as well
        ([AB, dataclasses.replace(AB, target=0.2)], [], [0, 1]),
        ([AB, dataclasses.replace(BA, target=0.5)], [], []),
        ([AB, dataclasses.replace(AB, offset=1.0)], [], []),
        ([AB, dataclasses.replace(AB, row_id="x", chosen_safe=True)], [1], []),
        ([PreferencePair("p", "a", "a")] * 2, [1], []),
        ([PreferencePair("p", "a", "a"), PreferencePair("p", "a", "a", target=0.2)], [], []),
        ([dataclasses.replace(AB, contradictory=True), AB, AB], [2], []),  # the first is no row to stay
        ([dataclasses.replace(GOOD, contradictory=True), GOOD, GOOD], [2], []),
        ([GOOD, GOOD, BAD], [1], [0, 1, 2]),
        ([GOOD, dataclasses.replace(BAD, response="b")], [], []),
        ([AB, GOOD, BAD, RatedResponse("p", "b")], [], [1, 2]),
        ([], [], []),
    ],
)  # fmt: skip
def test_duplicates_and_contradictions(records, duplicate, contradictory):
    assert repeated(records) == {"duplicate": duplicate, "contradictory": contradictory}


def test_parts_of_a_text_do_not_run_together():
    pairs = [PreferencePair("ab", "c", "d"), PreferencePair("a", "bc", "d"), PreferencePair("a", "b", "cd")]
    turns = [("ab", "c"), ("a", "bc")]
    pairs += [PreferencePair((Message(*turn),), "c", "d") for turn in turns]
    assert repeated(pairs) == {"duplicate": [], "contradictory": []}


words = st.sampled_from(["a", "b", " a", "c"])
pairs = st.builds(PreferencePair, st.sampled_from(["p", "q", MESSAGES]), words, words, st.sampled_from([0.0, 0.5, 1.0]))
ratings = st.builds(RatedResponse, st.sampled_from(["p", "q"]), words, st.booleans())


@given(st.lists(pairs | ratings, max_size=10))
def test_repeated_is_what_comparing_every_two_records_finds(records):
    def stripped(record):
        names = ("prompt", "chosen", "rejected", "response")
        texts = {n: getattr(record, n).strip() for n in names if isinstance(getattr(record, n, None), str)}
        return dataclasses.replace(record, **texts)

    def clash(one, two) -> bool:
        if type(one) is not type(two) or one.prompt != two.prompt:
            return False
        if isinstance(one, RatedResponse):
            return one.response == two.response and one.desirable != two.desirable
        (winner, loser), (its_winner, its_loser) = (
            (r.chosen, r.rejected) if r.target > 0.5 else (r.rejected, r.chosen) for r in (one, two)
        )
        decided = 0.5 not in (one.target, two.target) and winner != loser
        return decided and (winner, loser) == (its_loser, its_winner)

    records = [stripped(record) for record in records]
    found = repeated(records)
    assert found["duplicate"] == [i for i, record in enumerate(records) if record in records[:i]]
    assert found["contradictory"] == [i for i, record in enumerate(records) if any(clash(record, r) for r in records)]


def test_a_stream_of_long_records_is_taken_once():
    """As a generator, so that nothing needs the texts twice."""
    texts = (f"{i % 7} " * 50_000 for i in itertools.count())
    found = repeated(PreferencePair("p", text, "no") for text in itertools.islice(texts, 21))
    assert found == {"duplicate": list(range(7, 21)), "contradictory": []}


# --- contamination


def test_evaluation_keys_forget_case_and_punctuation():
    assert evaluation_key(" How do I\nkeep  BREAD fresh?!") == evaluation_key("how do i keep bread fresh")
    assert evaluation_key("Straße_2: été") == "strasse 2 été"
    assert evaluation_key("cafe\u0301 au lait") == evaluation_key("caf\u00e9 au lait") == "café au lait"
    assert evaluation_key("...") == ""


def test_every_reason_of_a_row_that_cannot_be_used_is_explained():
    """By what the sources of this package raise: nobody can mend `tied` without being told what it means."""
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(quality.__file__).parent.glob("*.py"))
    raised = set(re.findall(r"RowDefect\(\"(\w+)\"\)", sources))
    assert len(raised) > 5
    assert raised == quality.WHY.keys()


def test_every_human_turn_is_compared_and_no_other():
    keys = {evaluation_key(text) for text in ("What is it?", "???")}
    asked, answered = "\n\nHuman: Hi", f"{ASSISTANT} What is it?"
    records = [
        PreferencePair("what is IT", "a", "b"),
        PreferencePair(f"{asked}{answered}\n\nHuman: And?{ASSISTANT}", "a", "b"),
        PreferencePair(f"{asked}{ASSISTANT} Yes\n\nHuman: What is it{ASSISTANT}", "a", "b"),
        RatedResponse((Message("user", "Hi"), Message("assistant", "what is it"), Message("user", "ok")), "a"),
        RatedResponse((Message("system", "what is it"), Message("user", "What... is it")), "a"),
        PreferencePair("What is it made of?", "What is it?", "b"),
        PreferencePair("?", "a", "b"),
    ]
    assert contaminated(records, keys) == [0, 2, 4]
    assert contaminated(records, set()) == contaminated(records, {""}) == []


# --- the real files, where they are present

real = pytest.mark.skipif("RSA_TEST_DATA" not in os.environ, reason="RSA_TEST_DATA names no folder with real data")


def real_rows(name: str) -> list[dict]:
    with gzip.open(Path(os.environ["RSA_TEST_DATA"]) / f"{name}.jsonl.gz") as file:
        return [json.loads(line) for line in file]


def real_records(name: str, format: str, criterion: str | None = None) -> list:
    records = []
    for row in real_rows(name):
        try:
            records += read_row(format, row, criterion)
        except RowDefect:
            continue
    return records


@real
@pytest.mark.parametrize(
    ("name", "format", "alone", "duplicates"),
    [
        ("hh_helpful_base_test", "hh", {"empty": 4, "identical": 2}, 0),
        ("hh_harmless_base_test", "hh", {"empty": 4}, 0),
        ("open_instruct_conversational100", "trl", {}, 0),
        ("llamafactory_dpo_en_demo300", "sharegpt", {}, 5),
        ("llamafactory_kto_en_demo300", "kto", {}, 0),
        ("pku_saferlhf_legacy32", "pku_labels", {}, 0),
    ],
)
def test_real_files_have_their_known_defects(name, format, alone, duplicates):
    records = real_records(name, format)
    assert Counter(defect for record in records for defect in defects_of(record)) == alone
    found = repeated(records)
    assert (len(found["duplicate"]), found["contradictory"]) == (duplicates, [])


@real
def test_injected_duplicates_and_swaps_are_found_among_real_rows():
    """Swapping the labels of 20 rows and repeating 30 others adds exactly these defects."""
    records = real_records("hh_harmless_base_test", "hh")
    picked = random.Random(0).sample(range(len(records)), 50)
    swaps = [
        dataclasses.replace(records[i], chosen=records[i].rejected, rejected=records[i].chosen) for i in picked[:20]
    ]
    copies = [records[i] for i in picked[20:]]
    found = repeated([*records, *swaps, *copies])
    n = len(records)
    assert found["duplicate"] == list(range(n + 20, n + 50))
    assert found["contradictory"] == sorted(picked[:20]) + list(range(n, n + 20))


@real
def test_every_helpful_evaluation_prompt_is_found_in_the_file_it_was_taken_from():
    """All 129 are turns of HH's helpful test split; one of them stands in a row whose two prompts differ."""
    keys = {evaluation_key(row["prompt"]) for row in real_rows("sacpo_problems") if row["set"] == "helpful_problem"}
    assert len(keys) == 129
    transcripts = [row["chosen"] for row in real_rows("hh_helpful_base_test")]
    assert keys <= {evaluation_key(turn) for transcript in transcripts for turn in human_turns(transcript)}
    records = real_records("hh_helpful_base_test", "hh")
    assert len(contaminated(records, keys)) == 134
    assert contaminated(real_records("hh_harmless_base_test", "hh"), keys) == []
