"""Training at scale, timed: what disagrees is not, all see the same tokens, and bytes sent are those that are counted by hand."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks

from benchmarks import __main__ as command
from benchmarks import pending
from benchmarks.kernels.results import read_run
from benchmarks.scale import cached, cost, crew, goals, processes, run
from benchmarks.scale import packing as benchmark
from benchmarks.scale.cases import PROVIDERS, SIZES, Provider
from benchmarks.scale.crew import Crew, Team
from benchmarks.scale.mixes import long_tailed, written
from benchmarks.scale.report import page
from benchmarks.scale.traffic import Traffic
from benchmarks.timing import ROOT
from rsa_lightning import packing
from rsa_lightning.models import load_policy

LIVE, PACKED, HIDDEN = PROVIDERS[0], PROVIDERS[2], PROVIDERS[3]
SIZE = SIZES["quick"]
RESULTS = ROOT / "benchmarks/results"


# ---- layouts ---------------------------------------------------------------------------------------------------------


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


# ---- a reference on disk ---------------------------------------------------------------------------------------------


class Steps:
    """A loop whose losses are known."""

    def __init__(self, losses):
        self.all, self.losses = losses, []

    def step(self):
        self.losses.append(self.all[len(self.losses)])


def test_a_cached_reference_gives_the_same_losses_and_is_timed(tmp_path):
    """The ceiling by hand: F = 16 rows x 2 x (1 x (4 x 16^2 + 3 x 16 x 44) + 2 x 16 x 16), h = 12 rows x 2 x 16 x 129."""
    shape = {"hidden": 16, "layers": 1, "vocabulary": 129, "tokens": 16, "prompt": 4, "batch_size": 2}
    rows = cached.live_and_cached(tmp_path, **shape, samples=2)
    assert [(row["method"], row["reference"]) for row in rows] == [
        *(("DPO", kind) for kind in ("live", "hidden", "logps")),
        *((method, kind) for method in ("TDPO (KL)", "RSA (CVaR 0.97)") for kind in ("live", "hidden")),
    ]
    forward, head = 16 * 2 * (4 * 16**2 + 3 * 16 * 44 + 2 * 16 * 16), 12 * 2 * 16 * 129
    assert rows[1]["ceiling"] == pytest.approx(4 * (forward + head) / (3 * forward + 4 * head), abs=1e-3)
    assert rows[2]["ceiling"] == pytest.approx(4 / 3, abs=1e-3)
    assert all(row["cpu_ms"] > 0 for row in rows)
    assert all(row["x_cpu"] == 1 for row in rows if row["reference"] == "live")
    verdicts = goals.verdicts(rows, "this CPU")
    assert [verdict["measured"] for verdict in verdicts] == [rows[i]["x_cpu"] for i in (1, 2, 4, 6)]


@pytest.mark.parametrize("moved", [1.0, float("nan")])
def test_a_reference_that_disagrees_has_no_times(moved):
    loops = {"live": Steps([0.5] * 4), "moved": Steps([0.5] * 3 + [moved])}
    with pytest.raises(cached.Disagreement, match="with moved the loss of a step differs by"):
        cached.measured(loops, samples=1)


def test_a_goal_is_met_at_its_limit_and_missed_below():
    rows = [
        {"method": "DPO", "reference": "hidden", "x_cpu": 1.15, "ceiling": 1.3},
        {"method": "TDPO (KL)", "reference": "hidden", "x_cpu": 1.149, "ceiling": 1.3},
    ]
    words = [verdict["verdict"] for verdict in goals.verdicts(rows, "a CPU")]
    assert words == ["met", "not measured", "missed", "not measured"]


# ---- processes -------------------------------------------------------------------------------------------------------


def test_bytes_of_collectives_by_hand():
    """Of 2 processes each: half of the 32 bytes gathered, half of the 48 reduced, twice half of the 8 summed."""

    def counted(rank):
        with Traffic() as traffic:
            dist.all_gather_into_tensor(torch.empty(8), torch.ones(4))
            dist.reduce_scatter_tensor(torch.empty(6), torch.ones(12))
            dist.all_reduce(torch.ones(2))
            dist.barrier()
        return dict(traffic.bytes)

    assert on_ranks(2, counted) == [{"all_gather": 16, "reduce_scatter": 24, "all_reduce": 8}] * 2


def test_a_size_knows_its_parameters():
    policy = load_policy(dataclasses.replace(SIZE.spec(ROOT), config=SIZE.config() | {"vocab_size": SIZE.vocabulary}))
    assert sum(parameter.numel() for parameter in policy.parameters()) == SIZE.parameters


def test_two_processes_come_to_the_losses_of_one_and_send_what_they_must(tmp_path):
    """Half of the weights lies on each; a reference on disk is not gathered; rounding up to shards alone is sent in vain."""
    providers = (LIVE, PACKED, HIDDEN)
    SIZE.write(tmp_path, processes.steps_needed(1))
    teams = [Team(1, sharded=False), Team(2, sharded=True)]
    bad, records = processes.run(teams, SIZE, providers, 1, tmp_path)
    assert bad == []
    found = {(record["processes"], record["reference"], record["layout"]): record for record in records}
    assert len(found) == 6
    alone, live = found[1, "live", "padded"], found[2, "live", "padded"]
    # the policy, the two moments of AdamW, and the reference, whose embedding stays whole
    embedding, whole = SIZE.vocabulary * SIZE.width, SIZE.parameters
    assert alone["held_mib"] * 2**20 == pytest.approx(4 * 4 * whole, rel=0.02)
    halves = 4 * (3 * whole / 2 + (whole - embedding) / 2 + embedding)
    assert live["held_mib"] * 2**20 == pytest.approx(halves, rel=0.05)
    assert alone["traffic"] is None
    blocks = whole - embedding - SIZE.width  # the last norm is no part of a block
    assert live["traffic"]["least"] == {
        "forward": 2 * whole,
        "backward": 2 * blocks,
        "gradients": 2 * whole,
        "replicas": 0,
        "reference": 2 * blocks,
    }
    assert found[2, "hidden", "padded"]["traffic"]["least"]["reference"] == 0
    for record in records[3:]:
        assert 1 <= record["traffic"]["times_least"] < 1.01


def test_losses_that_differ_are_named_with_their_process():
    one, two = Team(1, sharded=False), Team(2, sharded=True)
    bucketed = Provider("RSA", "live", "bucketed")
    losses = {
        (one, LIVE): [0.69, 0.5],
        (one, bucketed): [0.69, 0.4],  # other pairs meet
        (one, Provider("DPO", "live", "padded")): [0.69, 0.3],  # another method
        (two, LIVE): [0.69, 0.50005],
        (two, PACKED): [0.69, 0.6],
        (two, HIDDEN): [0.69, float("nan")],
        (two, bucketed): [0.69, 0.41],
    }
    assert processes.disagreements(losses, "32-true") == [
        "2 processes: the losses of RSA live packed are 0.1 nats from those of RSA live padded on 1 process, no FSDP2 "
        "(tolerance 0.0001)",
        "2 processes: the losses of RSA hidden padded are inf nats from those of RSA live padded on 1 process, no FSDP2 "
        "(tolerance 0.0001)",
        "2 processes: the losses of RSA live bucketed are 0.01 nats from those of RSA live bucketed on 1 process, no FSDP2 "
        "(tolerance 0.0001)",
    ]


def test_processes_that_disagree_are_not_timed(tmp_path, monkeypatch):
    step = crew.Worker._step
    monkeypatch.setattr(
        crew.Worker, "_step", lambda self, name: (*step(self, name)[:2], 0.5 + 0.1 * ("hidden" in name))
    )
    monkeypatch.setattr(processes, "_record", lambda *_: pytest.fail("it was timed"))
    SIZE.write(tmp_path, processes.steps_needed(1))
    [message], records = processes.run([Team(1, sharded=False)], SIZE, (LIVE, HIDDEN), 1, tmp_path)
    assert records == []
    assert "the losses of RSA hidden padded are 0.1 nats from those of RSA live padded" in message


def test_the_error_of_a_process_is_raised_with_its_rank(tmp_path):
    with pytest.raises(RuntimeError, match=r"process 0 of 2: (.|\n)*KeyError: 'unheard of'"):
        Crew(Team(2, sharded=True), SIZE, (Provider("unheard of", "live", "padded"),), tmp_path)


# ---- the cost of a step ----------------------------------------------------------------------------------------------


def test_parts_of_a_step_add_up_to_it():
    """Of one sample, whose median it is; the axes meet in a point that is measured once."""
    bad, records = cost.run(cost.GRIDS["quick"], "cpu", samples=1)
    assert bad == []
    assert [record["axis"] for record in records] == ["tokens"] * 2 + ["vocabulary"] * 2 + ["parameters"] * 2
    for record in records:
        parts = sum(record[f"{part}_ms"] for part in cost.PARTS)
        assert parts == pytest.approx(record["ms"], rel=2e-3)
        assert record["head_ms"] > 0
    base = [{k: v for k, v in record.items() if k != "axis"} for record in records[::2]]
    assert base[0] == base[1] == base[2]


def test_a_step_whose_ways_disagree_has_no_cost(monkeypatch):
    """States of the reference that are not its own."""
    kept = cost._Kept.states
    monkeypatch.setattr(
        cost._Kept, "states", lambda self, batch: kept(self, batch)._replace(weight=torch.ones(129, 32))
    )
    grid = cost.GRIDS["quick"]._replace(tokens=(16,), vocabularies=(), widths=())
    [message], records = cost.run(grid, "cpu", samples=1)
    assert records == []
    assert "without its reference a step has a loss" in message


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_figures_tables_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "PROVIDERS", (LIVE,))
    options = ["--quick", "--samples", "1", "--processes", "1", "--sections", "processes", "cost"]
    assert command.main(["scale", *options, "--output", str(tmp_path)]) == 0
    found = read_run(tmp_path / "scale_cpu.json")  # as `benchmarks figures` reads that folder
    assert found["op"] == "scale"
    assert [record["team"] for record in found["processes"]] == ["1 process, no FSDP2", "1 process"]
    assert len(found["environment"]["load"]) == 3
    assert found["goals"] == []  # small shapes say nothing about them
    assert (tmp_path / "scale_cost.png").stat().st_size > 10_000
    text = (tmp_path / "scale_cpu.md").read_text()
    printed = capsys.readouterr().out
    assert text in printed
    assert "| 1 process | RSA | live | padded |" in text
    assert json.loads(printed.splitlines()[-1])["op"] == "scale"


def test_committed_tables_are_made_of_the_committed_figures():
    found = read_run(RESULTS / "scale_cpu.json")
    assert found["disagreements"] == []
    assert not found["quick"]
    assert page(found) == (RESULTS / "scale_cpu.md").read_text()
    assert found["goals"] == goals.verdicts(found["references"], found["environment"]["device"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3"], "--processes 3: a number that divides 8 pairs"),
        (["--processes", "2", "--replicas", "4"], "is a multiple of --replicas"),
    ],
)
def test_processes_that_cannot_share_the_pairs_are_refused(options, message, capsys):
    assert command.main(["scale", *options]) == 2
    assert message in capsys.readouterr().err


def test_what_needs_several_gpus_is_pending_until_its_file_is_there(tmp_path):
    text = pending.pending(tmp_path)
    for piece in goals.PIECES:
        assert f"| {piece.what} | `{piece.file}` | `{piece.command}` |" in text
    for goal in goals.goals():
        assert f"| {goal} | `scale_cpu.json` | `make bench-scale` |" in text
    files = [piece.file for piece in goals.PIECES]
    assert len(set(files)) == len(files)
    (tmp_path / files[1]).write_text('{"op": "scale"}')
    assert f"| `{files[1]}` |" not in pending.pending(tmp_path)


@pytest.mark.parametrize("piece", goals.PIECES, ids=lambda piece: piece.file)
def test_pending_commands_are_understood_and_write_the_file_that_they_name(piece, monkeypatch):
    """Parsed as on a machine with GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    if piece.nodes > 1:
        monkeypatch.setenv("WORLD_SIZE", str(piece.processes))
    options = command._parse(piece.command.split("-m benchmarks ")[1].split())
    team = run._teams(options)[-1]
    assert (team.processes, team.replicas, team.cpu_offload) == (piece.processes, piece.replicas, piece.cpu_offload)
    assert run._stem(options, team) + ".json" == piece.file
