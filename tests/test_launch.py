"""Runs on several processes and nodes: whatever starts them, they train what one process trains, and they end together.

Losses of every step are compared, from metrics.csv. Forked processes stand for torchrun where only numbers matter.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import on_ranks

from rsa_lightning.cli import main
from rsa_lightning.parallel.launch import is_first, launched

ROOT = Path(__file__).parents[1]
REWARD, QUICKSTART, SBATCH = (
    str(ROOT / f"configs/{name}") for name in ("reward.yaml", "quickstart.yaml", "slurm/align.sbatch")
)
RSA = [sys.executable, "-m", "rsa_lightning"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN = [*LAUNCH, "-m", "rsa_lightning"]
STEPS, PAIRS = 50, 8
ROUNDING = 1e-6


class World:
    """A folder with pairs whose tokens are prepared once, and runs of `rsa fit` in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        write(folder / "train.jsonl", STEPS * PAIRS)
        write(folder / "validation.jsonl", 7, "Held out")
        self.runs = itertools.count()
        self._one: dict[str, tuple[torch.Tensor, dict[str, float]]] = {}

    def one(self, loss: str) -> tuple[torch.Tensor, dict[str, float]]:
        """The figures of a single process, without FSDP2; trained once."""
        if loss not in self._one:
            self._one[loss] = self.figures(self.forked(1, loss, strategy="auto"))
        return self._one[loss]

    def words(self, name: str, processes: int, loss: str, strategy: str = "fsdp2", **more) -> list[str]:
        settings = {
            "data.path": self.folder / "train.jsonl",
            "data.validation_path": self.folder / "validation.jsonl",
            "data.cache_dir": self.folder / "cache",
            "data.batch_size": PAIRS // processes,
            "data.max_length": 32,
            "model.policy.model": self.model,
            "model.loss": loss,
            "model.optimizer.lr": 1e-3,
            "trainer.max_epochs": 1,
            "trainer.accelerator": "cpu",
            "trainer.strategy": strategy,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_checkpointing": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.callbacks": "null",
            "trainer.logger.save_dir": self.folder,
            "trainer.logger.name": name,
        }
        named = {key.replace("__", "."): value for key, value in more.items()}
        return ["fit", "-c", REWARD, *flags(settings | named)]

    def new(self) -> str:
        return f"run{next(self.runs)}"

    def forked(self, processes: int, loss: str, **more) -> str:
        """The name of a run in forked processes."""
        name = self.new()
        words = self.words(name, processes, loss, **more)
        assert on_ranks(processes, lambda rank: main(words)) == [0] * processes
        return name

    def figures(self, name: str) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of every step, and the figures of the last validation. One run wrote them, once."""
        assert [path.name for path in (self.folder / name).iterdir()] == ["version_0"]
        with (self.folder / name / "version_0/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        steps = torch.tensor([float(row["train/loss"]) for row in rows if row["train/loss"]], dtype=torch.float64)
        last = [row for row in rows if row["val/loss"]][-1:]
        return steps, {key: float(value) for key, value in (last[0] if last else {}).items() if key.startswith("val/")}

    def check(self, name: str, loss: str) -> None:
        (mine, validation), (one, expected) = self.figures(name), self.one(loss)
        assert len(mine) == len(one) == STEPS
        assert (mine - one).abs().max() < ROUNDING
        assert validation == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)


def write(path: Path, count: int, word: str = "Question") -> Path:
    rows = ({"prompt": f"{word} {i}?", "chosen": f" yes {i % 7}", "rejected": f" no, {i % 5} no"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(values: dict) -> list[str]:
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **more}


def ended(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Status and output of processes that were started together."""
    texts = [process.communicate() for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def start(words: list[str], folder: Path, **more: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment(**more), start_new_session=True, **pipes)


def errors(text: str) -> set[str]:
    """What `rsa` said on stderr, without what torchrun adds."""
    return {line for line in text.splitlines() if "rsa: error:" in line}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama) -> World:
    return World(tmp_path_factory.mktemp("launch"), tiny_llama)


# --- the same training, whatever starts it


def test_the_losses_are_those_of_a_model_that_learns(world):
    for losses, validation in map(world.one, ("DPO", "RSA")):
        assert losses[-1] < 0.5 * losses[0]
        assert len(validation) >= 6
    assert (world.one("DPO")[0] - world.one("RSA")[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("loss", "more"), [("DPO", {}), ("RSA", {"strategy": "FSDP2", "trainer__strategy__replicas": 2})]
)
def test_four_processes_and_two_by_two(world, loss, more):
    """7 validation pairs on 4 processes: nothing hangs, and every pair counts once."""
    world.check(world.forked(4, loss, **more), loss)


def test_torchrun(world):
    name = world.new()
    [(status, _, text)] = ended(start([*TORCHRUN, *world.words(name, 2, "RSA")], world.folder))
    assert status == 0, text
    world.check(name, "RSA")


LAST_WORDS = """
import sys
import torch.distributed as dist
from rsa_lightning.parallel import processes
dist.init_process_group("gloo")
sys.setswitchinterval(5)  # gloo's thread gets the interpreter where ours waits, or at the end, and not in between
processes.gathered(dist.get_rank())
if sys.argv[1:] == ["all_reduce"]:
    import torch
    dist.all_reduce(torch.ones(1000))
"""


@pytest.mark.parametrize("last", ["gathered", "all_reduce"])
def test_a_process_may_end_right_after_a_collective(tmp_path, last):
    """Without leaving the group, every second run aborts: "terminate called without an active exception"."""
    script = tmp_path / "last_words.py"
    script.write_text(LAST_WORDS)
    for _ in range(2):
        [(status, _, text)] = ended(start([*LAUNCH, str(script), last], tmp_path))
        assert status == 0, text


def test_slurm(world):
    """Two tasks of one node, as srun starts them. Lightning's requeueing is not set up: the job's script does that."""
    name = world.new()
    words = [*RSA, *world.words(name, 2, "DPO")]
    tasks = [start(words, world.folder, **slurm(rank, 2)) for rank in range(2)]
    for status, _, text in ended(*tasks):
        assert status == 0, text
        assert "requeue" not in text
    world.check(name, "DPO")


def slurm(rank: int, tasks: int) -> dict[str, str]:
    numbers = {"NTASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1, "PROCID": rank, "LOCALID": rank, "NODEID": 0}
    words = {"JOB_NAME": "align", "JOB_ID": free_port(), "NODELIST": "localhost"}
    found = {f"SLURM_{key}": str(value) for key, value in (numbers | words).items()}
    return found | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": found["SLURM_JOB_ID"]}


_ports: list[int] = []


def free_port() -> int:
    """A port that was free, the same in this session: the tasks of one job are told one."""
    import socket

    if not _ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            _ports.append(probe.getsockname()[1])
    return _ports[0]


def test_lightning_starts_the_processes_itself(world):
    """`rsa fit` with trainer.devices and no launcher."""
    name = world.new()
    words = [*RSA, *world.words(name, 2, "DPO", trainer__devices=2)]
    [(status, _, text)] = ended(start(words, world.folder))
    assert status == 0, text
    world.check(name, "DPO")


NAMESPACES = """
set -e
{mount}
ip netns add n0; ip netns add n1
trap 'ip netns del n0; ip netns del n1' EXIT
ip link add v0 netns n0 type veth peer name v1 netns n1
for i in 0 1; do
    ip -n n$i addr add 10.77.0.$((i + 1))/24 dev v$i; ip -n n$i link set v$i up; ip -n n$i link set lo up
done
ip netns exec n0 true
{run}
"""
NODES = """
pids=
for i in 0 1; do
    GLOO_SOCKET_IFNAME=v$i ip netns exec n$i "$0" -m torch.distributed.run --nnodes 2 --node-rank $i --nproc-per-node 1 \
        --master-addr 10.77.0.1 --master-port 29501 -m rsa_lightning "$@" & pids="$pids $!"
done
status=0
for pid in $pids; do wait $pid || status=1; done
exit $status
"""


def in_namespaces(run: str, folder: Path, *words: str) -> tuple[int, str, str]:
    """A script in two network namespaces that a cable joins, in a mount and network namespace of its own."""
    script = NAMESPACES.format(mount="mount -t tmpfs none /run", run=run)
    own = ["unshare", "-Urnm", "bash", "-c", script, sys.executable, *words]
    return ended(start(own, folder))[0]


@pytest.fixture(scope="module")
def two_nodes(world) -> World:
    """Skips, with the reason, where the machine makes no network namespaces."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("two nodes: unshare and ip (iproute2) are needed")
    status, _, text = in_namespaces("", world.folder)
    if status:
        pytest.skip(f"two nodes: this machine makes no network namespaces: {text.strip()}")
    return world


def test_two_nodes_and_their_checkpoint_on_one(two_nodes):
    """One process on each of two nodes; what they saved half-way is finished by two processes of one node."""
    world, name = two_nodes, two_nodes.new()
    saved = world.folder / "checkpoints"
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    callback["init_args"] = {"dirpath": str(saved), "every_n_train_steps": STEPS // 2, "save_top_k": -1}
    more = {"trainer__callbacks": json.dumps([callback]), "trainer__enable_checkpointing": "true"}
    status, out, text = in_namespaces(NODES, world.folder, *world.words(name, 2, "RSA", **more))
    assert status == 0, out + text
    world.check(name, "RSA")
    [half] = saved.glob(f"*step={STEPS // 2}.ckpt")
    assert len(list(half.glob("*.distcp"))) == 2
    resumed, _ = world.figures(world.forked(2, "RSA", ckpt_path=half))
    assert len(resumed) == STEPS - STEPS // 2
    assert (resumed - world.one("RSA")[0][STEPS // 2 :]).abs().max() < ROUNDING


# --- rsa align

TINY = {
    "model": {"config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}},
    "data": {"stories": {"demonstrations": 60, "pairs": 60}, "options": {"tokenizer_vocab_size": 400}},
    "trainer": {"accelerator": "cpu", "strategy": "fsdp2", "log_every_n_steps": 1},
    "steps": {"warmup": {"trainer": {"max_epochs": 1}}},
    "evaluation": {
        "sampling": {"samples_per_prompt": 1, "max_new_tokens": 8},
        "prompts": 4,
        "pairs": 8,
        "resamples": 10,
        "figures": False,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the run `one` of a single process, and `two` of torchrun's two; out.txt is what the two said."""
    folder = tmp_path_factory.mktemp("align")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    words = align_words(folder, "one", 1)
    assert on_ranks(1, lambda rank: main(words)) == [0]
    [(status, out, text)] = ended(start([*TORCHRUN, *align_words(folder, "two", 2)], folder))
    assert status == 0, text
    (folder / "out.txt").write_text(out)
    return folder


def align_words(folder: Path, name: str, processes: int) -> list[str]:
    settings = {"output": folder / name, "data.options.batch_size": PAIRS // processes}
    return ["align", "-c", QUICKSTART, "-c", str(folder / "tiny.yaml"), *flags(settings)]


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def results(run: Path) -> list[dict]:
    return json.loads((run / "results.json").read_text())["models"]


def assert_close(mine, theirs, where: str = "") -> None:
    assert type(mine) is type(theirs), where
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key in mine:
            assert_close(mine[key], theirs[key], f"{where}.{key}")
    elif isinstance(mine, list):
        assert len(mine) == len(theirs), where
        for i, (left, right) in enumerate(zip(mine, theirs, strict=True)):
            assert_close(left, right, f"{where}[{i}]")
    else:
        expected = pytest.approx(theirs, rel=1e-4, abs=1e-5) if isinstance(mine, float) else theirs
        assert mine == expected, where


def step_losses(run: Path, step: str) -> list[float]:
    with (run / step / "metrics.csv").open() as rows:
        return [float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")]


def facts(run: Path) -> dict[str, dict]:
    """What a manifest says of its steps, but for the number of processes, the time taken and the hashes of weights."""
    entries = json.loads((run / "manifest.json").read_text().replace(str(run), "RUN"))["steps"]
    kept = ("kind", "start", "reference", "temperature", "optimizer_steps", "data")
    return {name: {key: entry[key] for key in kept} for name, entry in entries.items()}


def test_align_on_two_processes_is_that_on_one(runs):
    one, two = runs / "one", runs / "two"
    assert facts(two) == facts(one)
    assert {entry["processes"] for entry in manifest(two)["steps"].values()} == {2}
    assert_close(results(two), results(one))
    for step in ("reward", "safety"):
        assert step_losses(two, step) == pytest.approx(step_losses(one, step), abs=ROUNDING)
        assert len(step_losses(one, step)) == facts(one)[step]["optimizer_steps"] > 4


def test_align_writes_and_says_everything_once(runs):
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (runs / "one", runs / "two")]
    shards = {name for name in names[1] ^ names[0] if name.endswith(".distcp") or "cache" in name}
    assert names[1] ^ names[0] == shards  # the run directory of two processes is that of one, but for shards
    said = (runs / "out.txt").read_text()
    assert [said.count(f"{step}: runs") for step in ("warmup", "reward", "safety")] == [1, 1, 1]
    assert said.count("report.md") == 1


def test_a_second_run_reuses_everything_in_all_processes(runs, capfd):
    before = manifest(runs / "two")
    words = align_words(runs, "two", 2)
    assert on_ranks(2, lambda rank: main(words)) == [0, 0]
    assert manifest(runs / "two") == before
    assert capfd.readouterr().out.count("reused") == 3


def test_one_process_continues_what_two_began(runs, capfd):
    """Pairs of a batch count over all processes: half as many, unsharded, with twice the batch are the same run."""
    shutil.copytree(runs / "two", runs / "continued")
    shutil.rmtree(runs / "continued/safety")
    words = [*align_words(runs, "continued", 1), "--trainer.strategy", "auto", "--trainer.accelerator", "auto"]
    assert on_ranks(1, lambda rank: main(words)) == [0]
    said = capfd.readouterr().out
    assert said.count("reused") == 2
    assert "safety: runs again, the files of its model" in said
    assert [entry["processes"] for entry in manifest(runs / "continued")["steps"].values()] == [2, 2, 1]
    assert_close(results(runs / "continued"), results(runs / "one"))


def test_another_number_of_pairs_per_step_is_another_run(runs, capfd):
    """The command of two processes on one: batches would be half as large, which no model of the two was trained on."""
    shutil.copytree(runs / "two", runs / "fewer")
    words = [*align_words(runs, "fewer", 2), "--steps.reward", "null", "--steps.safety", "null"]
    assert on_ranks(1, lambda rank: main(words)) == [0]
    assert "warmup: runs again, changed: pairs_per_batch" in capfd.readouterr().out


# --- mistakes end all processes, in a line


MISTAKES = [
    ({"trainer__strateg": "fsdp2"}, "strateg"),
    ({"data__path": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"strategy": "fsdp"}, "trainer.strategy fsdp (FSDP1) gathers the head"),
    (
        {"strategy": "lightning.pytorch.strategies.ModelParallelStrategy", "trainer__strategy__timeout": "null"},
        "trainer.strategy ModelParallelStrategy: its automatic sizes",
    ),
    ({"strategy": "FSDP2", "trainer__strategy__replicas": 3}, "strategy.replicas 3 x tensor_parallel 1 does not"),
    ({"trainer__devices": 1}, "2 processes were started, the trainer uses 1"),
]


def test_a_mistake_is_one_line_of_every_process(world):
    runs = [world.words(world.new(), 2, "DPO", **more) for more, _ in MISTAKES]
    for said in on_ranks(2, lambda rank: [listened(words) for words in runs]):
        for (status, text), (_, message) in zip(said, MISTAKES, strict=True):
            assert status == 1
            assert len(errors(text)) == 1
            assert message in errors(text).pop()


def listened(words: list[str]) -> tuple[int, str]:
    """Status and stderr of a command in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as text:
        return main(words), text.getvalue()


def test_too_few_validation_pairs_are_an_error_of_all_processes(world, tmp_path, capfd):
    few = {"data__validation_path": write(tmp_path / "few.jsonl", 3, "Few"), "data__cache_dir": tmp_path}
    words = world.words(world.new(), 4, "DPO", **few)
    assert on_ranks(4, lambda rank: main(words)) == [1] * 4
    assert "3 pairs are too few for 4 ranks with batches of 1: use at least 4" in errors(capfd.readouterr().err).pop()


def test_torchrun_ends_with_an_error(world):
    [(status, _, text)] = ended(
        start([*TORCHRUN, *world.words("x", 2, "DPO", data__path="nowhere.jsonl")], world.folder)
    )
    assert status != 0
    assert len(errors(text)) == 1
    assert "nowhere.jsonl" in errors(text).pop()


def test_an_error_of_the_first_process_alone_ends_the_others(tmp_path, capfd):
    """Data is read by the first process of `rsa align`; the others wait for it, and hear what happened."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    files = {f"data.{name}": tmp_path / "bad.jsonl" for name in ("helpful", "safety", "demonstrations")}
    words = [*align_words(tmp_path, "run", 2), "--data.stories", "null", *flags(files)]
    (status, first), (other_status, other) = on_ranks(2, lambda rank: listened(words))
    assert (status, other_status) == (1, 1)
    assert "bad.jsonl" in first, first
    assert errors(other).pop().startswith("rsa: error: the first process stopped: "), other


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes(world, sign):
    name = world.new()
    more = {"trainer__max_epochs": 1000, "trainer__logger__flush_logs_every_n_steps": 1}
    run = start([*TORCHRUN, *world.words(name, 2, "DPO", **more)], world.folder)
    metrics = world.folder / name / "version_0/metrics.csv"
    while not metrics.is_file() or metrics.read_text().count("\n") < 3:
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    workers = children(run.pid)
    assert len(workers) == 2
    if sign == signal.SIGINT:
        os.killpg(run.pid, sign)  # what a terminal does
    else:
        run.send_signal(sign)
    run.communicate()
    assert run.returncode != 0
    assert not [worker for worker in workers if alive(worker)]


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, (1, 1)),
        ({"SLURM_NTASKS": "1"}, (1, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, (4, 2)),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, (1, 1)),
        (
            {
                "SLURM_NTASKS": "2",
                "SLURM_NNODES": "2",
                "TORCHELASTIC_RUN_ID": "x",
                "LOCAL_WORLD_SIZE": "4",
                "WORLD_SIZE": "8",
            },
            (4, 2),
        ),
    ],
)
def test_what_was_launched(given, found, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launched() == found


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "1"}, False),
        ({"LOCAL_RANK": "1"}, False),  # of `rsa fit` with trainer.devices and no launcher: Lightning says no RANK
    ],
)
def test_one_process_speaks(given, first, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


@pytest.mark.parametrize("more", [{}, {"SLURM_NTASKS_PER_NODE": "2"}])
def test_uneven_tasks_are_refused(more, monkeypatch):
    for name, value in ({"SLURM_NTASKS": "3", "SLURM_NNODES": "2"} | more).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="3 tasks on 2 nodes, .* give --nodes and --ntasks-per-node"):
        launched()


# --- the script for SLURM


def test_the_script_for_slurm_is_a_script_and_names_what_exists():
    text = Path(SBATCH).read_text()
    subprocess.run(["bash", "-n", SBATCH], check=True)
    for path in re.findall(r"configs/[\w./]+\.yaml", text):
        assert (ROOT / path).is_file(), path
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.MULTILINE))
    assert options["ntasks-per-node"] == re.search(r":(\d+)$", options["gpus-per-node"])[1]
    assert {"nodes", "requeue", "signal", "time"} <= set(options)
    assert "ntasks" not in options


def test_the_script_for_slurm_requeues_itself_and_runs_one_task_per_gpu(tmp_path, monkeypatch):
    """With stand-ins for srun and scontrol: what srun is told parses, and the signal before the time limit requeues."""
    for name, body in (
        ("srun", 'echo "$MASTER_ADDR" "$@" > srun.txt; exec sleep 60'),
        ("scontrol", '[ "$1" = requeue ] && echo "$@" > scontrol.txt || echo node7'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]"}
    job = start(["bash", SBATCH, "-c", QUICKSTART, "--output", "runs/x"], tmp_path, **more)
    while not (tmp_path / "srun.txt").is_file() or not (tmp_path / "srun.txt").read_text().endswith("\n"):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    job.communicate()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"
    address, *words = (tmp_path / "srun.txt").read_text().split()
    assert address == "node7"
    asked = words[words.index("align") :]
    assert asked[-2:] == ["--output", "runs/x"]
    monkeypatch.chdir(ROOT)
    assert main([*asked, "--print_config"]) == 0
