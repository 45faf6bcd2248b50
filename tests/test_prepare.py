"""`rsa prepare`: every row is accounted for, one process does the work once, and nothing that matters shares an entry."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsa_lightning.cli import main
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.prepare import PreparationError, prepare
from rsa_lightning.data.quality import Defects
from rsa_lightning.data.records import FormatError, Message, PreferencePair, RatedResponse
from rsa_lightning.data.settings import PrepareSettings, entry_key, fingerprints
from rsa_lightning.data.statistics import label_counts
from rsa_lightning.data.tokenize import Lengths, encode_prompt, load_tokenizer
from rsa_lightning.preparation import prepare_all

ROOT = Path(__file__).parents[1]
REWARD = str(ROOT / "configs/reward.yaml")
SMALL = {"max_length": 48, "tokenizer_vocab_size": 280}


@pytest.fixture(autouse=True)
def _closed_streams(monkeypatch):
    """Lightning logs to the stderr it found at import, which pytest has closed by now; that is no error of the command."""
    monkeypatch.setattr("logging.raiseExceptions", False)


def good_rows(n: int) -> list[dict]:
    return [{"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(n)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planted(path: Path) -> Path:
    """60 rows; six of them have one of five defects: the rows 11, 21, 31, 41, 42 and 51."""
    rows = good_rows(60)
    rows[10]["chosen"] = "  "
    rows[20]["rejected"] = rows[20]["chosen"]
    rows[30] = rows[29]
    rows[41] = {"prompt": rows[40]["prompt"], "chosen": rows[40]["rejected"], "rejected": rows[40]["chosen"]}
    rows[50]["chosen"] = 7
    return write(path, rows)


PLANTED = {
    "empty": ["p.jsonl:11"],
    "identical": ["p.jsonl:21"],
    "duplicate": ["p.jsonl:31"],
    "contradictory": ["p.jsonl:41", "p.jsonl:42"],
    "wrong_type": ["p.jsonl:51"],
}


def prepared(path: Path, **options) -> PreferenceData:
    data = PreferenceData(str(path), **(SMALL | options))
    data.prepare()
    return data


# --- the report


def command(path: Path, *arguments: object, capsys) -> tuple[int, str, str]:
    status = main(["prepare", "-c", REWARD, "--data.path", str(path), *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_five_planted_defects_are_named_with_their_rows(tmp_path, capsys):
    """By the command, which writes the report though it fails, and prints one line for it."""
    file = tmp_path / "report.json"
    status, out, err = command(planted(tmp_path / "p.jsonl"), "--report", file, capsys=capsys)
    report = json.loads(file.read_text())
    assert {reason: defect["rows"] for reason, defect in report["defects"].items()} == PLANTED
    assert {reason: defect["count"] for reason, defect in report["defects"].items()} == {
        reason: len(rows) for reason, rows in PLANTED.items()
    }
    assert all(reason in out for reason in PLANTED)
    assert status == 1
    [line] = err.splitlines()
    assert line.startswith("rsa: error: ")
    assert "wrong_type: 1 of 60 rows (p.jsonl:51)" in line
    assert "column 'chosen' must be text, got int 7" in line
    assert "data.defects.wrong_type to drop" in line
    beside = Path(line.rpartition("report: ")[2])
    assert json.loads(beside.read_text()) == report


def test_dropped_rows_are_gone_and_the_rest_is_ready(tmp_path, capsys):
    path = planted(tmp_path / "p.jsonl")
    status, out, err = command(path, "--data.defects.wrong_type", "drop", capsys=capsys)
    assert (status, err) == (0, "")
    assert "prepared in" in out
    data = prepared(path, defects={"wrong_type": "drop"})
    assert data.report["rows"] == 60
    assert data.report["skipped"] == {reason: len(rows) for reason, rows in PLANTED.items()}
    assert data.skipped_rows == PLANTED
    used = [e.row_id for table in (data.train_examples, data.validation_examples) for e in table]
    assert sorted(used) == sorted(
        {f"p.jsonl:{i}" for i in range(1, 61)} - {row for rows in PLANTED.values() for row in rows}
    )


def test_defects_that_are_kept_are_counted_and_trained_on(tmp_path):
    keep = {"empty": "keep", "identical": "keep", "duplicate": "keep", "contradictory": "keep", "wrong_type": "drop"}
    data = prepared(planted(tmp_path / "p.jsonl"), defects=keep)
    assert data.report["kept"] == 59
    assert data.report["skipped"] == {"wrong_type": 1}
    assert {reason: defect["rows"] for reason, defect in data.report["defects"].items()} == PLANTED
    examples = {e.row_id: e for table in (data.train_examples, data.validation_examples) for e in table}
    assert list(examples["p.jsonl:11"].chosen) == [data.tokenizer.eos_token_id]


@pytest.mark.parametrize("reason", ["empty", "identical", "duplicate", "contradictory"])
def test_every_policy_can_fail(reason, tmp_path):
    policies = {"wrong_type": "drop", reason: "fail"}
    with pytest.raises(PreparationError, match=rf"{reason}: {len(PLANTED[reason])} of 60 rows") as error:
        prepared(planted(tmp_path / "p.jsonl"), defects=policies)
    assert error.value.report["defects"][reason]["policy"] == "fail"
    assert set(error.value.report["defects"]) == set(PLANTED)  # all rows were read, and all else was counted


def test_overlong_rows_are_kept_cut_dropped_or_fail(tmp_path):
    rows = good_rows(30)
    rows[4]["chosen"] = "word " * 100
    path = write(tmp_path / "p.jsonl", rows)
    kept = prepared(path)
    assert (kept.report["kept"], kept.report["truncated"]["responses"]) == (30, 1)
    assert kept.report["defects"]["overlong"] == {"policy": "keep", "count": 1, "rows": ["p.jsonl:5"]}
    dropped = prepared(path, defects={"overlong": "drop"})
    assert (dropped.report["kept"], dropped.report["truncated"]["responses"]) == (29, 0)
    assert dropped.skipped_rows == {"overlong": ["p.jsonl:5"]}
    with pytest.raises(FormatError, match=r"overlong: 1 of 30 rows \(p.jsonl:5\).*data.defects.overlong to drop"):
        prepared(path, defects={"overlong": "fail"})


def test_unusable_rows_are_named_by_what_they_are(tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: q{i}\n\nAssistant: a", "rejected": f"\n\nHuman: q{i}\n\nAssistant: b"}
        for i in range(30)
    ]
    rows[2]["rejected"] = "\n\nHuman: other\n\nAssistant: b"
    rows[3]["chosen"] += "\n\nHuman: and?"
    path = write(tmp_path / "p.jsonl", rows)
    data = prepared(path, format="hh")
    assert data.skipped_rows == {"prompt_mismatch": ["p.jsonl:3"], "human_last": ["p.jsonl:4"]}
    with pytest.raises(FormatError, match="human_last: 1 of 30 rows"):
        prepared(path, format="hh", defects={"unusable": "fail"})


def test_a_wrong_format_does_not_train_on_a_handful(tmp_path):
    """Without max_dropped, 60 rows of another format and three of this one would be a training set of three."""
    rows = [{"question": "q", "answer": "a"} for _ in range(60)] + good_rows(30)
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(FormatError, match=r"67% of the data would be dropped \(wrong_type 60\).* p.jsonl:1: no column"):
        prepared(path, defects={"wrong_type": "drop"})
    assert prepared(path, defects={"wrong_type": "drop", "max_dropped": 0.7}).report["kept"] == 30


def test_responses_that_differ_behind_the_cut_only_are_identical(tmp_path):
    """Such a pair has loss log 2 and no gradient, whatever the model does."""
    rows = good_rows(30)
    rows[4] |= {"chosen": "word " * 99 + "yes", "rejected": "word " * 99 + "no"}
    rows[5] |= {"chosen": "word " * 99, "rejected": "other " * 99}
    path = write(tmp_path / "p.jsonl", rows)
    dropped = prepared(path)
    assert dropped.report["defects"]["identical"] == {"policy": "drop", "count": 1, "rows": ["p.jsonl:5"]}
    assert dropped.report["defects"]["overlong"]["rows"] == ["p.jsonl:5", "p.jsonl:6"]
    assert dropped.skipped_rows == {"identical": ["p.jsonl:5"]}
    assert dropped.report["kept"] == 29
    assert prepared(path, defects={"identical": "keep"}).report["kept"] == 30
    both = prepared(path, defects={"overlong": "drop"})
    assert both.skipped_rows == {"overlong": ["p.jsonl:5", "p.jsonl:6"]}  # each once
    with pytest.raises(FormatError, match=r"identical: 1 of 30 rows \(p.jsonl:5\)"):
        prepared(path, defects={"identical": "fail"})
    rows[4]["rejected"] = rows[4]["chosen"]  # identical before it is cut
    kept = prepared(write(path, rows), defects={"identical": "keep"})
    assert kept.report["defects"]["identical"]["rows"] == ["p.jsonl:5"]


def test_a_report_that_cannot_be_written_is_named_before_any_work(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", good_rows(30))
    status, out, err = command(path, "--report", tmp_path, capsys=capsys)
    assert (status, out) == (1, "")
    assert f"--report {tmp_path} is a folder: name a file in it" in err
    status, out, err = command(path, "--report", path / "report.json", capsys=capsys)
    assert (status, out) == (1, "")
    assert f"--report {path / 'report.json'} cannot be written (" in err


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """Row ids name the rows of two paths, or of training and validation, without doubt."""
    rows = good_rows(30)
    rows[2]["chosen"] = ""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    write(a / "p.jsonl", rows[:15])
    write(b / "p.jsonl", [rows[2], {"prompt": 7}, *rows[15:]])
    lenient = {"defects": {"wrong_type": "drop"}}
    for paths in ([str(a / "p.jsonl"), str(b / "p.jsonl")], [str(a), str(b)]):
        data = PreferenceData(paths, **SMALL, **lenient)
        data.prepare()
        assert data.skipped_rows == {"wrong_type": [f"{b}/p.jsonl:2"], "empty": [f"{a}/p.jsonl:3", f"{b}/p.jsonl:1"]}
        assert data.report["first_messages"]["wrong_type"].startswith(f"{b}/p.jsonl:2: ")
    data = prepared(a / "p.jsonl", validation_path=str(b / "p.jsonl"), **lenient)
    assert {example.row_id for example in data.validation_examples} == {f"{b}/p.jsonl:{i}" for i in range(3, 18)}
    (b / "p.jsonl").rename(b / "q.jsonl")
    data = prepared(a / "p.jsonl", validation_path=str(b / "q.jsonl"), **lenient)
    assert data.skipped_rows == {"wrong_type": ["q.jsonl:2"], "empty": ["p.jsonl:3", "q.jsonl:1"]}


TURN = "\n\nHuman: Why {}?\n\nAssistant:"
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why {}?"}]


@pytest.mark.parametrize(
    ("prompt", "template", "reason", "mend"),
    [
        (TURN, "hh", "already_rendered", "is a Human.Assistant transcript, .*: remove template"),
        (SYSTEM, "beaver", "template_refused", "raises an error .*a system message.*: choose another template"),
        ("Why <|eos|> {}?", "hh", "control_token", "control token .*: take it out of the text"),
    ],
)
def test_rows_that_cannot_be_used_are_named_with_the_mend(prompt, template, reason, mend, tmp_path):
    """Some of them in the report, and in the message where no other is left."""
    rows = [
        {**row, "prompt": json.loads(json.dumps(prompt).replace("{}", str(i)))} for i, row in enumerate(good_rows(8))
    ]
    with pytest.raises(
        PreparationError, match=rf"no usable .*Most are {reason}: 8 of 8 rows .*p.jsonl:[0-9]: .*{mend}"
    ):
        prepared(write(tmp_path / "p.jsonl", rows), template=template)
    report = prepared(write(tmp_path / "q.jsonl", rows[:1] + good_rows(60)), template=template).report
    assert report["skipped"] == {reason: 1}
    assert report["first_messages"][reason].startswith("q.jsonl:1: ")


def test_a_side_that_the_validation_file_empties_is_not_blamed_on_the_fraction(tmp_path):
    path, other = write(tmp_path / "p.jsonl", good_rows(8)), write(tmp_path / "v.jsonl", good_rows(8))
    with pytest.raises(
        FormatError, match=r"left for training \(.*validation_file 8\): use rows whose prompts are not in .*v"
    ):
        prepared(path, validation_path=str(other))
    write(other, [{"prompt": "Which?", "chosen": "", "rejected": "no"}])
    with pytest.raises(FormatError, match=r"left for validation \(skipped: empty 1\): correct the rows of .*v.jsonl"):
        prepared(path, validation_path=str(other))


@pytest.mark.parametrize("option", [{"format": "tlr"}, {"format": "pku"}, {"criterion": "safe"}])
def test_a_format_that_is_none_is_named_before_files_are_read(option, tmp_path):
    with pytest.raises(FormatError, match="unknown format|two labels|one label"):
        prepared(tmp_path / "none.jsonl", cache_dir=str(tmp_path / "cache"), **option)
    assert not list(tmp_path.iterdir())


def test_a_report_is_written_when_nothing_is_left(tmp_path, capsys):
    rows = [{**row, "chosen": "same", "rejected": "same"} for row in good_rows(8)]
    file = tmp_path / "new/report.json"
    status, _, err = command(write(tmp_path / "p.jsonl", rows), "--report", file, capsys=capsys)
    assert status == 1
    assert "no usable pair is left (skipped: identical 8)" in err
    report = json.loads(file.read_text())
    assert (report["rows"], report["kept"], report["skipped"]) == (8, 0, {"identical": 8})


def test_a_report_is_written_for_a_damaged_file(tmp_path):
    path = write(tmp_path / "p.jsonl", good_rows(5))
    path.rename(tmp_path / "p.parquet")
    with pytest.raises(PreparationError, match="p.parquet") as error:
        prepared(tmp_path / "p.parquet")
    assert error.value.report["error"] in str(error.value)


MISTAKES = {
    "a missing file": (["--data.path", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "an unknown format": (["--data.format", "csv"], "unknown format 'csv'"),
    "no criterion": (["--data.format", "pku"], "set criterion: helpful or safe"),
    "an unknown policy": (["--data.defects.empty", "ignore"], "data.defects.empty"),
    "an unknown defect": (["--data.defects.blank", "drop"], "blank"),
    "no place for a cache": (["--data.cache_dir", f"{REWARD}/cache"], "reward.yaml/cache cannot be written"),
    "no tokenizer": (["--data.tokenizer", "nowhere/at/all"], "no tokenizer at nowhere/at/all"),
    "an unknown key": (["--data.pth", "x"], "pth"),
    "a missing configuration": (["-c", "nowhere.yaml"], "nowhere.yaml"),
    "no template": (["--data.template", "lama"], "unknown data.template 'lama'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path, capsys):
    arguments, expected = MISTAKES[name]
    status, _, err = command(write(tmp_path / "p.jsonl", good_rows(20)), *arguments, capsys=capsys)
    assert status == 1
    [line] = err.splitlines()
    assert line.startswith("rsa: error: ")
    assert expected in line


# --- what is kept out of training


def test_evaluation_prompts_are_not_trained_or_validated_on(tmp_path):
    rows = good_rows(40)
    rows[7]["prompt"] = "What is the answer to everything?"
    rows[8]["prompt"] = "\n\nHuman: first things\n\nAssistant: yes\n\nHuman: how do I knit?\n\nAssistant:"
    rows[9]["prompt"] = [{"role": "user", "content": "Name a river!"}]
    path = write(tmp_path / "p.jsonl", rows)
    one = write(tmp_path / "e1.jsonl", [{"prompt": "what is the ANSWER to everything"}, {"prompt": "How do I knit"}])
    two = write(tmp_path / "e2.jsonl", [{"prompt": [{"role": "user", "content": "name a river"}]}, {"prompt": "new"}])
    options = {"template": "hh", "defects": {"unusable": "drop"}}
    for fraction in (0.05, 0.9):  # on whichever side a prompt would be
        data = prepared(path, evaluation_prompts=[str(one), str(two)], validation_fraction=fraction, **options)
        assert data.report["defects"]["contaminated"]["rows"] == ["p.jsonl:8", "p.jsonl:9", "p.jsonl:10"]
        assert data.report["skipped"] == {"contaminated": 3}
    validated = prepared(
        write(tmp_path / "q.jsonl", good_rows(30)),
        validation_path=str(path),
        evaluation_prompts=str(one),
        **options,
    )
    assert {"p.jsonl:8", "p.jsonl:9"} <= set(validated.skipped_rows["contaminated"])
    with pytest.raises(FormatError, match="contaminated: 1 of 40 rows"):
        prepared(
            path,
            evaluation_prompts=str(write(tmp_path / "e.jsonl", [{"prompt": "Question 3?"}])),
            template="hh",
            defects={"contaminated": "fail"},
        )


def test_evaluation_prompts_without_prompts_are_an_error(tmp_path):
    path, wrong = write(tmp_path / "p.jsonl", good_rows(20)), write(tmp_path / "e.jsonl", [{"question": "q"}])
    with pytest.raises(FormatError, match=r"evaluation_prompts .*e.jsonl:1: no column 'prompt'"):
        prepared(path, evaluation_prompts=str(wrong))


# --- labels


def test_labels_are_counted():
    pairs = [
        PreferencePair("p", "long", "b", chosen_safe=True, rejected_safe=False, chosen_cost=0, rejected_cost=2),
        PreferencePair("p", "a", "b", chosen_safe=False, rejected_safe=False, chosen_cost=2, rejected_cost=3),
        PreferencePair("p", "a", "b", chosen_safe=False, rejected_safe=True, target=0.8),
        PreferencePair("p", "a", "b", chosen_safe=True, rejected_safe=True),
    ]
    assert label_counts(pairs) == {
        "pairs": 4,
        "soft_targets": 1,
        "safe_responses": 4,
        "unsafe_responses": 4,
        "only_chosen_safe": 1,
        "only_rejected_safe": 1,
        "both_safe": 1,
        "both_unsafe": 1,
        "chosen_is_longer": 0.25,
        "costs": {"0": 1, "2": 2, "3": 1},
        "costs_of_both": 2,
        "costs_confirmed": 2,
    }
    unknown = [PreferencePair("p", "a", "b", chosen_cost=1.0, rejected_cost=2.0, chosen_safe=True, rejected_safe=False)]
    assert "costs_confirmed" not in label_counts(unknown)  # a safe response costs 1
    assert label_counts([RatedResponse("p", "a"), RatedResponse("p", "b", desirable=False, cost=0.5)]) == {
        "desirable": 1,
        "undesirable": 1,
        "costs": {"0.5": 1},
    }
    assert sum(label_counts([RatedResponse("p", "a", cost=i / 7) for i in range(50)])["costs"].values()) == 50


# --- the cache


def test_cached_is_equal_to_fresh(tmp_path, monkeypatch):
    path = planted(tmp_path / "p.jsonl")
    options = {"defects": {"wrong_type": "drop"}, "template": "hh", "cache_dir": str(tmp_path / "cache")}
    fresh = prepared(path, **options)
    monkeypatch.setattr("rsa_lightning.data.prepare.make", None)  # whoever works again fails
    again = prepared(path, **options)
    for name in ("report", "skipped_rows", "template"):
        assert getattr(again, name) == getattr(fresh, name)
    assert again.state_dict() == fresh.state_dict()
    assert again.tokenizer.get_vocab() == fresh.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == fresh.tokenizer.chat_template == fresh.template
    assert [e.row_id for e in again.train_examples] == [e.row_id for e in fresh.train_examples]
    assert (again.train_examples[0].chosen == fresh.train_examples[0].chosen).all()


def test_no_cache_gives_the_same(tmp_path):
    path = write(tmp_path / "p.jsonl", good_rows(30))
    cached, loose = prepared(path), prepared(path, cache_dir=None)
    assert loose.report == cached.report
    assert loose.folder is None
    assert cached.folder.is_dir()
    assert cached.folder.is_relative_to(Path.home() / ".cache/rsa_lightning")


def test_a_flipped_byte_is_noticed_and_mended(tmp_path, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("rsa_lightning"), "propagate", True)
    path = write(tmp_path / "p.jsonl", good_rows(30))
    folder = prepared(path).folder
    content = bytearray((folder / "train.arrow").read_bytes())
    whole = bytes(content)
    content[len(content) // 2] ^= 1
    (folder / "train.arrow").write_bytes(content)
    with caplog.at_level("WARNING", logger="rsa_lightning"):
        prepared(path)
    assert "train.arrow changed" in caplog.text
    assert (folder / "train.arrow").read_bytes() == whole


def key(settings: PrepareSettings, tokenizer: str | None = None) -> str:
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    return entry_key(settings, fingerprints(settings), loaded)


def test_everything_that_matters_gives_another_key(tmp_path, tiny_llama):
    rows = good_rows(20)
    path, reordered, one_more = (
        str(write(tmp_path / f"{name}/p.jsonl", content))
        for name, content in (("a", rows), ("b", rows[::-1]), ("c", good_rows(21)))
        if (tmp_path / name).mkdir() is None
    )
    evaluation = write(tmp_path / "e.jsonl", [{"prompt": "x"}])
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    base = PrepareSettings((path,), Lengths(48, 24))
    changes = [
        {"paths": (reordered,)},
        {"paths": (one_more,)},
        {"paths": (path, reordered)},
        {"paths": (reordered, path)},
        {"format": "hh"},
        {"criterion": "safe"},
        {"template": "hh"},
        {"template": "tokenizer"},
        {"template": str(template)},
        {"validation_path": one_more},
        {"validation_fraction": 0.2},
        {"evaluation_prompts": (str(evaluation),)},
        {"lengths": Lengths(49, 24)},
        {"lengths": Lengths(48, 23)},
        {"lengths": Lengths(48, 24, eos_when_truncated=False)},
        {"seed": 1},
        {"limit": 10},
        {"tokenizer_vocab_size": 300},
        *(
            {"defects": dataclasses.replace(Defects(), **{field.name: value})}
            for field in dataclasses.fields(Defects)
            for value in [0.4 if field.name == "max_dropped" else "drop" if field.default == "fail" else "fail"]
        ),
    ]
    keys = [key(base), *(key(dataclasses.replace(base, **change)) for change in changes)]
    template.write_text("{{ messages[0]['content'] }}!")
    keys.append(key(dataclasses.replace(base, template=str(template))))
    evaluation.write_text('{"prompt": "y"}\n')
    keys.append(key(dataclasses.replace(base, evaluation_prompts=(str(evaluation),))))
    keys.append(key(base, str(tiny_llama)))
    other = load_tokenizer(tiny_llama)
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "tokenizer")
    keys.append(key(base, str(tmp_path / "tokenizer")))
    other.chat_template = "{{ messages }}"
    other.save_pretrained(tmp_path / "tokenizer")
    keys.append(key(base, str(tmp_path / "tokenizer")))
    Path(path).write_text(Path(path).read_text().replace("Yes 3.", "Yes 4."))
    keys.append(key(base))
    assert len(keys) == 35
    assert len(set(keys)) == len(keys)


def test_what_does_not_matter_shares_an_entry(tmp_path, tiny_llama):
    path = write(tmp_path / "p.jsonl", good_rows(30))
    base = prepared(path, tokenizer=str(tiny_llama))
    for option in [
        {"batch_size": 3},
        {"num_workers": 2},
        {"padding_side": "left"},
        {"padding_free": True},
        {"length_bucketing": True},
        {"tokenizer_vocab_size": 999},  # of a tokenizer that is not trained here
    ]:
        assert prepared(path, **({"tokenizer": str(tiny_llama)} | option)).folder == base.folder
    elsewhere = prepared(path, tokenizer=str(tiny_llama), cache_dir=str(tmp_path / "cache"))
    assert elsewhere.folder.name == base.folder.name


def test_the_sources_count_too(tmp_path, monkeypatch):
    settings = PrepareSettings((str(write(tmp_path / "p.jsonl", good_rows(20))),), Lengths(48, 24))
    before = key(settings)
    monkeypatch.setattr("rsa_lightning.data.settings.source_hashes", lambda: {"formats.py": "other"})
    assert key(settings) != before


# --- templates


def test_a_configured_template_goes_with_the_tokenizer(tmp_path):
    data = prepared(write(tmp_path / "p.jsonl", good_rows(20)), template="hh", max_length=128)
    prompt, example = data.train_prompts[0], data.train_examples[0]
    ids = encode_prompt(data.tokenizer, prompt, template=data.template)
    assert ids == list(example.prompt)
    chat = [Message("user", prompt)._asdict()]
    rendered = data.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert data.tokenizer(rendered, add_special_tokens=False)["input_ids"] == ids
    assert prepared(tmp_path / "p.jsonl").template is None


def test_a_clock_of_the_tokenizers_own_template_is_exported_as_it_was_trained(tmp_path, tiny_tokenizer):
    """Llama 3 templates print the day; the model that is saved must be asked as it was trained, whatever the day."""
    folder = tmp_path / "tokenizer"
    tiny_tokenizer.save_pretrained(folder)
    own = "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(own)
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in good_rows(20)]
    for _ in range(2):  # made, and read again
        data = prepared(write(tmp_path / "p.jsonl", rows), tokenizer=str(folder))
        chat = [message._asdict() for message in data.train_prompts[0]]
        rendered = data.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered.startswith("26 Jul 2024")
        assert data.tokenizer(rendered, add_special_tokens=False)["input_ids"] == list(data.train_examples[0].prompt)
        assert data.template is None
    texts = prepared(write(tmp_path / "q.jsonl", good_rows(20)), tokenizer=str(folder))
    assert texts.tokenizer.chat_template == own  # which has no part in them


# --- processes


def test_two_commands_at_once_make_one_entry(tmp_path):
    path = write(tmp_path / "p.jsonl", good_rows(300))
    words = [sys.executable, "-m", "rsa_lightning", "prepare", "-c", REWARD]
    words += ["--data.path", str(path), "--data.cache_dir", str(tmp_path / "cache")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]  # on stderr, one of them may say that it waits
    assert len([folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]) == 1


SPY = """
import os, sys, torch
from rsa_lightning.data import prepare
tokenise = prepare.encode_records
def spied(*arguments, **options):
    with open("seen.txt", "a") as file:
        print(os.environ["RANK"], torch.distributed.is_initialized(), file=file)
    return tokenise(*arguments, **options)
prepare.encode_records = spied
from rsa_lightning.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_ranks_tokenise_once_and_before_they_are_joined(tmp_path, tiny_llama):
    """torchrun on data that nobody prepared: one of two processes does the work, while no process group exists."""
    path = write(tmp_path / "p.jsonl", good_rows(60))
    (tmp_path / "spy.py").write_text(SPY)
    options = {
        "trainer.max_steps": 2,
        "trainer.devices": 2,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.callbacks": "null",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "data.max_length": 64,
        "data.batch_size": 2,
        "model.policy.model": tiny_llama,
        "data.cache_dir": tmp_path / "cache",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "spy.py", "fit", "-c", REWARD, "--data.path", str(path), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()]
    assert len({rank for rank, _ in seen}) == 1
    assert len(seen) == 2  # training and validation
    assert {joined for _, joined in seen} == {"False"}


def test_the_spy_can_see_a_process_group(tmp_path, tiny_llama):
    """A data module that is not prepared tokenises in the group: what the test above must tell apart."""
    code = SPY.replace("from rsa_lightning.cli import main\nsys.exit(main(sys.argv[1:]))", "")
    code += (
        "torch.distributed.init_process_group('gloo', init_method='file://' + os.path.abspath('group'), rank=0, world_size=1)\n"
        "from rsa_lightning.data.datamodule import PreferenceData\n"
        f"PreferenceData(sys.argv[1], cache_dir=None, tokenizer={str(tiny_llama)!r}, max_length=48).setup()\n"
    )
    path = write(tmp_path / "p.jsonl", good_rows(60))
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=tmp_path, check=True, env={**os.environ, "RANK": "0"})
    assert {line.split()[1] for line in (tmp_path / "seen.txt").read_text().splitlines()} == {"True"}


# --- several data sets


def test_all_are_prepared_before_the_first_error_is_raised(tmp_path, capsys):
    bad = {"path": str(planted(tmp_path / "p.jsonl")), **SMALL}
    fine = {"path": str(write(tmp_path / "q.jsonl", good_rows(20))), **SMALL}
    report = tmp_path / "all.json"
    with pytest.raises(PreparationError, match="wrong_type"):
        prepare_all([("reward", bad, None), ("safety", fine, None)], report)
    found = json.loads(report.read_text())
    assert (list(found), found["safety"]["kept"]) == (["reward", "safety"], 20)
    assert "reward: " in capsys.readouterr().out
    modules = prepare_all([("safety", fine, None)])
    assert len(modules["safety"].train_examples) == found["safety"]["train_pairs"]


def test_the_command_takes_the_policys_tokenizer(tmp_path, tiny_llama, capsys):
    """So that training finds what was prepared, whichever of the two ways the model is given."""
    path = write(tmp_path / "p.jsonl", good_rows(30))
    folders = set()
    for words in (["--model.policy.model", tiny_llama], ["--model.policy.tokenizer", tiny_llama]):
        status, out, _ = command(path, "--data.max_length", 48, *words, capsys=capsys)
        assert status == 0
        folders.add(out.rpartition("prepared in ")[2].strip())
    data = PreferenceData(str(path), tokenizer=str(tiny_llama), max_length=48)
    data.prepare()
    assert folders == {str(data.folder)}


def pku_row(i: int) -> dict:
    answers = {"response_0": f"Help yourself {i}.", "response_1": f"Better not {i}."}
    flags = {"is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1}
    return {"prompt": f"May I {i}?"} | answers | flags


def align_arguments(path: Path, output: Path) -> list[str]:
    words = ["-c", ROOT / "configs/pku.yaml", "--data.path", path, "--output", output]
    return [str(word) for word in (*words, "--data.options.tokenizer_vocab_size", 300)]


def test_the_data_of_a_whole_run_is_prepared_where_the_run_will_look(tmp_path, capsys):
    """Three steps, two data sets: warm-up and reward read the helpful labels, safety the others."""
    path = write(tmp_path / "pku.jsonl", [pku_row(i) for i in range(60)])
    arguments = align_arguments(path, tmp_path / "run")
    assert main(["prepare", *arguments]) == 0
    out = capsys.readouterr().out
    assert [title in out for title in ("tokenizer: ", "warmup, reward: ", "safety: ")] == [True] * 3
    entries = {entry.name for entry in (tmp_path / "run/inputs/cache").iterdir() if entry.is_dir()}
    step = ["-c", str(ROOT / "configs/debug.yaml"), "--trainer.max_steps", "1", "--evaluation.pairs", "4"]
    small = ["--evaluation.sampling.samples_per_prompt", "1", "--evaluation.sampling.max_new_tokens", "4"]
    assert main(["align", *arguments[:2], *step[:2], *arguments[2:], *step[2:], *small]) == 0
    assert {entry.name for entry in (tmp_path / "run/inputs/cache").iterdir() if entry.is_dir()} == entries


def test_defects_in_the_data_of_a_whole_run_are_reported_before_anything_is_made_of_it(tmp_path, capsys):
    rows = [pku_row(i) for i in range(60)]
    rows[7]["better_response_id"] = 2
    rows[9]["safer_response_id"] = 0
    path = write(tmp_path / "pku.jsonl", rows)
    assert main(["prepare", *align_arguments(path, tmp_path / "run")]) == 1
    out, err = capsys.readouterr()
    assert "pku.jsonl:8" in out
    assert err.startswith("rsa: error: ")
    assert "better_response_id" in err
    assert not (tmp_path / "run/inputs/tokenizer").exists()


def test_preparing_needs_no_tokenizer_name(tmp_path):
    settings = PrepareSettings((str(write(tmp_path / "p.jsonl", good_rows(20))),), Lengths(48, 24))
    found = prepare(settings, None)
    assert len(found.train) + len(found.validation) == found.report["kept"] == 20


def test_the_share_of_dropped_rows_counts_rows_not_responses(tmp_path):
    """60 of 100 rows are not PKU's; the other 40 hold two responses each, which makes 80 records."""
    rows = [pku_row(i) if i < 40 else {"prompt": "?"} for i in range(100)]
    options = {"format": "pku_labels", "defects": {"wrong_type": "drop"}}
    with pytest.raises(FormatError, match="60% of the data would be dropped"):
        prepared(write(tmp_path / "pku.jsonl", rows), **options)
