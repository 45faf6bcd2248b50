"""SafeDPO's relabelling: which pairs stay, which are swapped, and the paper's loss out of plain DPO."""

import json
import math

import pytest
import torch

from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.data.formats import read_row
from rsa_lightning.data.prepare import PreparationError
from rsa_lightning.data.records import FormatError, PreferencePair, RatedResponse, RowDefect
from rsa_lightning.data.relabel import Relabel, SafeDPO, as_relabel, relabelled
from rsa_lightning.losses import DPO, SequenceStats

SHORT = {"max_length": 48, "tokenizer_vocab_size": 280, "validation_fraction": 0.3}


def pair(chosen_safe, rejected_safe, **more) -> PreferencePair:
    costs = {"chosen_cost": 1.0 - chosen_safe, "rejected_cost": 1.0 - rejected_safe}
    return PreferencePair("p", "a", "b", chosen_safe=chosen_safe, rejected_safe=rejected_safe, **costs, **more)


def test_every_kind_of_pair():
    """Safe over safe stays; safe over unsafe gets the margin; unsafe over safe is swapped first; no safe one: none."""
    relabel = SafeDPO(margin=10)
    assert relabel(pair(True, True)) == pair(True, True)
    assert relabel(pair(True, False)) == pair(True, False, offset=10.0)
    assert relabel(pair(False, True)) == PreferencePair("p", "b", "a", 1.0, 10.0, True, False, 0.0, 1.0)
    with pytest.raises(RowDefect, match="both_unsafe"):
        relabel(pair(False, False))


@pytest.mark.parametrize(
    ("safe", "expected"),
    [
        ((True, True), math.log1p(math.exp(-0.2))),  # -log sigmoid(0.1 (3 - 1))
        ((True, False), math.log1p(math.exp(1.8))),  # the margin of 2 off: -log sigmoid(0.2 - 2)
        ((False, True), math.log1p(math.exp(2.2))),  # swapped: -log sigmoid(0.1 (1 - 3) - 2)
    ],
)
def test_dpo_on_relabelled_pairs_is_the_paper_s_loss(safe, expected):
    """-log sigmoid(beta (lr_w - lr_l) - (u_l - u_w) margin), beta 0.1, margin 2, lr of a 3 and of b 1."""
    logratio = {"a": torch.tensor([3.0], dtype=torch.float64), "b": torch.tensor([1.0], dtype=torch.float64)}
    kept = SafeDPO(margin=2.0)(pair(*safe))
    sides = [SequenceStats(logratio[side]) for side in (kept.chosen, kept.rejected)]
    loss = DPO(beta=0.1)(*sides, offset=torch.tensor([kept.offset], dtype=torch.float64)).losses
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_margin_asks_for_more_before_the_loss_lets_go():
    """At beta h = 5 the pull -dL/d(beta h) is sigmoid(-5) without a margin, and sigmoid(5) with one of 10."""
    for offset, pull in ((0.0, 0.006692850924284856), (10.0, 0.9933071490757153)):
        logratio = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
        nothing = SequenceStats(torch.zeros(1, dtype=torch.float64))
        DPO(beta=1.0)(
            SequenceStats(logratio), nothing, offset=torch.full((1,), offset).double()
        ).losses.sum().backward()
        assert -logratio.grad.item() == pytest.approx(pull, abs=1e-12)


def test_what_it_cannot_read_is_an_error_with_the_mend():
    with pytest.raises(FormatError, match="needs safety labels of both responses: give columns chosen_safe"):
        SafeDPO()(PreferencePair("p", "a", "b", chosen_safe=True))
    for own in ({"target": 0.7}, {"offset": 1.0}):
        with pytest.raises(FormatError, match="SafeDPO sets target and offset: remove these columns"):
            SafeDPO()(pair(True, True, **own))
    with pytest.raises(FormatError, match="SafeDPO relabels pairs, and this row is a rated response"):
        relabelled((RatedResponse("p", "a"),), SafeDPO())
    for margin in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="margin is a number of nats, at least 0"):
            SafeDPO(margin)


def test_it_reads_what_configurations_say():
    assert as_relabel(None) is None
    for said in (SafeDPO(), "SafeDPO", "rsa_lightning.data.relabel.SafeDPO", {"class_path": "SafeDPO"}):
        assert as_relabel(said) == SafeDPO(10.0)
    assert as_relabel({"class_path": "SafeDPO", "init_args": {"margin": 2}}) == SafeDPO(2)
    for wrong in ("Nothing", "no.such.Class", "FormatError", {"margin": 2}, {"class_path": "SafeDPO", "margin": 2}):
        with pytest.raises(ValueError, match="relabel is SafeDPO or"):
            as_relabel(wrong)
    with pytest.raises(ValueError, match="relabel SafeDPO: .*unexpected keyword argument 'tail'"):
        as_relabel({"class_path": "SafeDPO", "init_args": {"tail": 2}})


# --- as data


def rows(kinds: str) -> list[dict]:
    """One row for each letter pair: s(afe) or u(nsafe), chosen first."""
    return [
        {"prompt": f"Q{i}?", "chosen": f"C{i}", "rejected": f"R{i}", "chosen_safe": k[0] == "s",
         "rejected_safe": k[1] == "s"} for i, k in enumerate(kinds.split())
    ]  # fmt: skip


def prepared(path, found: list[dict], relabel: Relabel | dict | None, **options) -> PreferenceData:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    data = PreferenceData(str(path), relabel=relabel, **SHORT | options)
    data.setup()
    return data


def test_prepared_pairs_are_swapped_and_what_is_left_out_is_counted_but_no_fault(tmp_path):
    """Two thirds of the pairs are unsafe twice: more than max_dropped, which is about faults of the data."""
    data = prepared(
        tmp_path / "a.jsonl", rows("ss su us uu uu uu uu uu uu" + 3 * " ss su us uu uu uu uu uu uu"), SafeDPO(4)
    )
    assert data.report["skipped"] == {"both_unsafe": 24}
    assert data.report["defects"]["both_unsafe"]["policy"] == "drop"
    assert data.skipped_rows["both_unsafe"][:2] == ["a.jsonl:4", "a.jsonl:5"]
    assert (data.report["rows"], data.report["kept"]) == (36, 12)
    examples = [*data.train_examples, *data.validation_examples]
    offsets = {example.row_id: example.offset for example in examples}
    assert [offsets[f"a.jsonl:{i}"] for i in (1, 2, 3)] == [0, 4, 4]
    said = {e.row_id: data.tokenizer.decode(e.chosen, skip_special_tokens=True) for e in examples}
    assert [said[f"a.jsonl:{i}"] for i in (1, 2, 3)] == ["C0", "C1", "R2"]


def test_it_is_part_of_the_cache_key(tmp_path):
    found = rows("ss su us " * 10)
    folders = [prepared(tmp_path / "a.jsonl", found, r).folder for r in (None, SafeDPO(), SafeDPO(10.0), SafeDPO(5))]
    assert folders[1] == folders[2]
    assert len({*folders}) == 3


def test_a_row_without_labels_fails_by_name(tmp_path):
    found = rows("ss su us " * 10)
    del found[4]["rejected_safe"]
    with pytest.raises(
        PreparationError, match=r"wrong_type: 1 of 30 rows \(a.jsonl:5\); a.jsonl:5: SafeDPO needs safety"
    ):
        prepared(tmp_path / "a.jsonl", found, {"class_path": "SafeDPO"})


def test_pku_carries_the_labels():
    row = {"prompt": "p", "response_0": "zero", "response_1": "one", "is_response_0_safe": True,
           "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0}  # fmt: skip
    [found] = relabelled(read_row("pku", row, "helpful"), SafeDPO())
    assert (found.chosen, found.rejected, found.offset) == ("zero", "one", 10.0)
