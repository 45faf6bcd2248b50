"""Rows and files of preferences become pairs, or one clear error; real defects are counted, never lost."""

import gzip
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsa_lightning.checkpoint import file_hash
from rsa_lightning.data.formats import (
    ASSISTANT,
    FORMATS,
    FormatError,
    PreferencePair,
    RowDefect,
    demonstration,
    hh,
    split_key,
    trl,
)
from rsa_lightning.data.readers import read_pairs

TRL_ROW = {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."}
DIALOGUE = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"


def write_lines(path: Path, *rows: object) -> Path:
    """One JSON value on each line; a string stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- rows


def test_trl_row():
    assert trl(TRL_ROW) == PreferencePair("Say hi.", "Hi!", "No.", target=1.0, offset=0.0)
    assert trl({**TRL_ROW, "target": 0.25, "offset": -2, "score_chosen": [1]}) == PreferencePair(
        "Say hi.", "Hi!", "No.", target=0.25, offset=-2.0
    )


def test_hh_row_splits_at_the_last_assistant_turn():
    pair = hh({"chosen": DIALOGUE + " four", "rejected": DIALOGUE + " five"})
    assert pair == PreferencePair(DIALOGUE, " four", " five")


def test_demonstration_row_has_no_rejected_response():
    assert demonstration({"prompt": "p", "completion": "c"}) == PreferencePair("p", "c", "")


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("trl", {**TRL_ROW, "rejected": " \n"}, "empty"),
        ("trl", {**TRL_ROW, "rejected": "Hi!"}, "identical"),
        ("hh", {"chosen": DIALOGUE + " a", "rejected": DIALOGUE.replace("one", "six") + " b"}, "prompt_mismatch"),
        ("hh", {"chosen": DIALOGUE + " a", "rejected": DIALOGUE}, "empty"),
        ("hh", {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " a"}, "identical"),
        ("hh", {"chosen": DIALOGUE + " a\n\nHuman: and?", "rejected": DIALOGUE + " b"}, "human_last"),
        ("demonstration", {"prompt": "p", "completion": ""}, "empty"),
    ],
)
def test_defects_are_named(format, row, reason):
    with pytest.raises(RowDefect) as caught:
        FORMATS[format](row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("trl", {"prompt": "p", "chosen": "c"}, r"no column 'rejected' \(columns: 'prompt', 'chosen'\): rename it"),
        ("trl", {"chosen": DIALOGUE, "rejected": DIALOGUE}, "set format: hh"),
        ("trl", {**TRL_ROW, "chosen": None}, "column 'chosen' must be text, got null"),
        ("trl", {**TRL_ROW, "chosen": 7}, "column 'chosen' must be text, got a value of type int"),
        ("trl", {**TRL_ROW, "prompt": [{"role": "user"}]}, "column 'prompt' must be text, got a value of type list"),
        ("trl", {**TRL_ROW, "chosen": "a\ud800"}, "half of a surrogate pair at character 1"),
        ("trl", {**TRL_ROW, "target": 1.5}, r"column 'target' must be in \[0, 1\], got 1.5"),
        ("trl", {**TRL_ROW, "target": math.nan}, r"column 'target' must be in \[0, 1\], got nan"),
        ("trl", {**TRL_ROW, "target": None}, "column 'target' must be a number, got null"),
        ("trl", {**TRL_ROW, "target": True}, "column 'target' must be a number, got bool True"),
        ("trl", {**TRL_ROW, "target": "1"}, "column 'target' must be a number, got a value of type str"),
        ("trl", {**TRL_ROW, "offset": math.inf}, "column 'offset' must be finite, got inf"),
        ("hh", {"chosen": "hello", "rejected": "world"}, "column 'chosen' has no .* turn"),
        ("demonstration", TRL_ROW, "no column 'completion'"),
    ],
)
def test_rows_of_another_format_are_errors_with_the_fix(format, row, message):
    with pytest.raises(FormatError, match=message):
        FORMATS[format](row)


def test_messages_do_not_repeat_the_text_of_a_row():
    secret = ["a text that does not belong on a screen"]
    with pytest.raises(FormatError) as caught:
        trl({**TRL_ROW, "chosen": secret})
    assert secret[0] not in str(caught.value)


@given(st.lists(st.text(), min_size=1, max_size=4), st.text(), st.text())
def test_hh_transcripts_are_rebuilt_exactly(turns, chosen, rejected):
    """prompt + response is the transcript to the last character, whatever the text is (markers aside)."""
    turns, chosen, rejected = ([t.replace("\n\n", "") for t in x] for x in (turns, [chosen], [rejected]))
    prompt = "".join(f"\n\nHuman: {turn}{ASSISTANT}" for turn in turns)
    row = {"chosen": prompt + chosen[0], "rejected": prompt + rejected[0]}
    if chosen == rejected or not (chosen[0].strip() and rejected[0].strip()):
        with pytest.raises(RowDefect, match=r"empty|identical"):
            hh(row)
        return
    pair = hh(row)
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
columns = st.sampled_from(["prompt", "chosen", "rejected", "completion", "target", "offset", "other"])


@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(columns, json_values))
@settings(max_examples=300)
def test_any_row_is_a_pair_a_defect_or_a_format_error(format, row):
    try:
        pair = FORMATS[format](row)
    except (FormatError, RowDefect):
        return
    assert pair.chosen.strip()
    assert pair.chosen != pair.rejected
    assert 0.0 <= pair.target <= 1.0
    assert math.isfinite(pair.offset)


def test_split_key_is_the_first_human_turn():
    assert split_key(DIALOGUE) == split_key(f"\n\nHuman: one{ASSISTANT}") == "\n\nHuman: one"
    assert split_key("a plain prompt") == "a plain prompt"


# --- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_keep_order_and_row_numbers(tmp_path, name):
    """Row 2 is blank and row 4 defective: the ids are those an editor shows."""
    path = write_lines(tmp_path / name, TRL_ROW, "", {**TRL_ROW, "prompt": "2 "}, {**TRL_ROW, "chosen": ""})
    read = read_pairs(path)
    assert [p.row_id for p in read.pairs] == [f"{name}:1", f"{name}:3"]
    assert (read.rows, read.skipped) == (3, {"empty": [f"{name}:4"]})


def test_parquet_reads_as_json_lines_do(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [{**TRL_ROW, "target": 0.5}, {**TRL_ROW, "prompt": "é\u2028 ", "target": 1.0}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_json = read_pairs(write_lines(tmp_path / "a.jsonl", *rows)).pairs
    from_parquet = read_pairs(tmp_path / "a.parquet").pairs
    assert [(p.prompt, p.chosen, p.target) for p in from_parquet] == [(p.prompt, p.chosen, p.target) for p in from_json]


def test_a_line_separator_inside_a_value_does_not_break_the_line(tmp_path):
    row = {**TRL_ROW, "chosen": "one\u2028two\x85three"}
    path = write_lines(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))
    assert read_pairs(path).pairs[0].chosen == row["chosen"]


def test_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TRL_ROW).encode())
    assert len(read_pairs(path).pairs) == 1


def test_limit_reads_the_first_rows_only(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TRL_ROW, {**TRL_ROW, "prompt": "2"}, "not json")
    assert read_pairs(path, limit=2).rows == 2


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        (b'{"prompt": "p", "chosen": 5, "rejected": "r"}', r"a\.jsonl, row 2: column 'chosen' must be text"),
        (b'{"prompt": "p", "chos', r"a\.jsonl, row 2 is not valid JSON"),
        (b'{"prompt": "p", "prompt": "q"}', r"row 2 is not valid JSON \(a name occurs twice"),
        (b"[1, 2]", r"row 2 is a JSON list, not an object"),
        (b'{"prompt": "\xff"}', r"row 2: byte 12 is not UTF-8: convert"),
        (b"[" * 100_000, r"row 2 is not valid JSON"),
    ],
)
def test_bad_lines_are_named_by_file_and_row(tmp_path, second_line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(TRL_ROW).encode() + b"\n" + second_line + b"\n")
    with pytest.raises(FormatError, match=message):
        read_pairs(path)


def test_damaged_gzip_is_one_clear_error(tmp_path):
    rows = [{**TRL_ROW, "prompt": str(random.random())} for _ in range(500)]
    path = write_lines(tmp_path / "a.jsonl.gz", *rows)
    whole = path.read_bytes()
    for damaged, message in [
        (whole[: len(whole) // 2], "is cut off after row"),
        (whole[:-4], "is cut off after row 500"),
        (whole[:-8] + bytes(8), "is damaged after row 500"),
        (whole[:200] + bytes(50) + whole[250:], "is damaged|is not valid JSON|is not UTF-8"),
        (b"no gzip at all", "is damaged after row 0 .*rename it"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=message):
            read_pairs(path)


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(FormatError, match="has no rows"):
        read_pairs(tmp_path / "a.jsonl")


def test_missing_file_folder_suffix_and_format_are_errors(tmp_path):
    write_lines(tmp_path / "a.csv", TRL_ROW)
    with pytest.raises(FormatError, match="does not exist: check the path"):
        read_pairs(tmp_path / "a.jsonl")
    with pytest.raises(FormatError, match="is a folder: name the file"):
        read_pairs(tmp_path)
    with pytest.raises(FormatError, match="unknown suffix; readable are"):
        read_pairs(tmp_path / "a.csv")
    with pytest.raises(FormatError, match="unknown format 'tlr'; known: trl, hh, demonstration"):
        read_pairs(tmp_path / "a.csv", "tlr")


def test_damaged_parquet_is_one_clear_error(tmp_path):
    """Whatever bit flips: the rows, or a FormatError. Parquet without checksums cannot promise more."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([TRL_ROW, {**TRL_ROW, "prompt": "2"}]), path)
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", b"junk" * 100):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="cannot be read as Parquet"):
            read_pairs(path)
    errors = 0
    for position in range(0, len(whole), 13):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            read_pairs(path)
        except FormatError:
            errors += 1
    assert errors > 0


def test_parquet_with_two_columns_of_one_name_or_no_rows_is_an_error(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    parquet.write_table(pa.table([["a"], ["b"], ["c"]], names=["prompt", "chosen", "chosen"]), tmp_path / "a.parquet")
    with pytest.raises(FormatError, match="several columns named 'chosen'"):
        read_pairs(tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_pylist([TRL_ROW]).slice(0, 0), tmp_path / "b.parquet")
    with pytest.raises(FormatError, match="has no rows"):
        read_pairs(tmp_path / "b.parquet")


def test_fingerprint_is_that_of_the_bytes(tmp_path):
    """SHA-256 of "abc", from FIPS 180-2."""
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_formats_need_no_torch():
    """And reading JSON lines needs neither datasets nor pyarrow."""
    code = (
        "import sys, rsa_lightning.data.formats, rsa_lightning.data.readers\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- the real files, where they are present


@pytest.mark.skipif("RSA_TEST_DATA" not in os.environ, reason="RSA_TEST_DATA names no folder with the HH files")
@pytest.mark.parametrize(
    ("name", "rows", "skipped"),
    [
        ("hh_helpful_base_test", 2354, {"prompt_mismatch": 9, "empty": 4, "identical": 2}),
        ("hh_harmless_base_test", 2312, {"prompt_mismatch": 5, "empty": 4}),
    ],
)
def test_hh_files_have_their_known_defects(name, rows, skipped):
    read = read_pairs(Path(os.environ["RSA_TEST_DATA"]) / f"{name}.jsonl.gz", "hh")
    assert read.rows == rows
    assert {reason: len(ids) for reason, ids in read.skipped.items()} == skipped
    assert len(read.pairs) == rows - sum(skipped.values())
    assert all(p.prompt.startswith("\n\nHuman:") and p.prompt.endswith(ASSISTANT) for p in read.pairs)
