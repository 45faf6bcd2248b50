"""The benchmark of packed batches: layouts that disagree are not timed, and all see the same tokens."""

import pytest
import torch

from benchmarks.scale import packing as benchmark
from benchmarks.scale.mixes import long_tailed, written
from rsa_lightning import packing


@pytest.fixture
def mix(tmp_path):
    return written(tmp_path, "long tail", list(long_tailed(40)))


def test_layouts_see_the_same_tokens_and_differ_in_padding(mix, tmp_path):
    disagreements, records = benchmark._measure(mix, True, "cpu", "float32", tmp_path)
    assert disagreements == []
    found = {record["layout"]: record for record in records}
    assert {record["op"] for record in records} == {"packing"}
    assert found["packed"]["padding"] == 0 < found["bucketed"]["padding"] < found["padded"]["padding"]
    assert found["padded"]["x_padded"] == 1
    tokens = found["packed"]["tokens_per_s"] * 4 / found["packed"]["steps_per_s"]
    for record in records:
        assert record["steps"] == 4
        seconds = record["steps"] / record["steps_per_s"]
        assert record["tokens_per_s"] * seconds == pytest.approx(tokens)


def test_layouts_that_disagree_are_not_timed(mix, tmp_path, monkeypatch):
    """A pack whose positions restart one token late."""
    inputs = packing.packed_inputs

    def late(row_bounds, device):
        found = inputs(row_bounds, device)
        return found | {"position_ids": torch.roll(found["position_ids"], 1)}

    monkeypatch.setattr(packing, "packed_inputs", late)
    monkeypatch.setattr(packing, "_check_same", lambda *states: None)  # it would refuse the model
    [message], records = benchmark._measure(mix, True, "cpu", "float32", tmp_path)
    assert records == []
    assert "long tail: packed tokens are" in message
