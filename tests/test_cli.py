"""The `rsa` command as users call it: real processes, exit codes, and one clear line per mistake."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rsa_lightning.cli import main

ROOT = Path(__file__).parents[1]
REWARD, SAFETY, QUICKSTART = (str(ROOT / f"configs/{name}.yaml") for name in ("reward", "safety", "quickstart"))


def flags(values: dict) -> list[str]:
    """{"trainer.max_steps": 1} -> ["--trainer.max_steps", "1"]"""
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


ONE_STEP = {"trainer.max_steps": 1, "trainer.limit_val_batches": 1, "data.max_length": 64}
SILENT = {
    "trainer.logger": "false",
    "trainer.callbacks": "null",
    "trainer.enable_checkpointing": "false",
    "trainer.enable_progress_bar": "false",
}
FAST = flags(ONE_STEP | SILENT)


@pytest.fixture(autouse=True)
def _closed_streams(monkeypatch):
    """Lightning logs to the stderr it found at import, which pytest has closed by now; that is no error of the command."""
    monkeypatch.setattr("logging.raiseExceptions", False)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"Question {i}?", "chosen": f" yes {i % 7}", "rejected": f" no, {i % 5} no"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rsa(*arguments, capsys=None) -> tuple[int, str]:
    """Exit status and the last line of stderr, in this process."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # jsonargparse ends so after printing its message
        status = int(stop.code or 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()] if capsys else [""]
    return status, "\n".join(lines)


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    assert "rsa align -c FILE" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    assert rsa("aling", capsys=capsys) == (
        1,
        "rsa: error: unknown command 'aling': choose align, sweep, dual, prepare, merge, export, fit, validate or test",
    )


def process(*arguments, cwd) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_fit_trains_and_exports(pairs, tmp_path):
    """A real process, on the shipped configuration, with the loss switched on the command line and two loggers."""
    loggers = [
        {
            "class_path": f"lightning.pytorch.loggers.{name}",
            "init_args": {"save_dir": "logs", "name": "x", "version": 0},
        }
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    options = flags(ONE_STEP | {"model.loss": "DPO", "trainer.logger": json.dumps(loggers)})
    process("rsa_lightning", "fit", "-c", REWARD, "--data.path", pairs, *options, cwd=tmp_path)
    folder = tmp_path / "logs/x/version_0"
    assert (folder / "model/model.safetensors").exists()
    assert "train/rewards/accuracies" in (folder / "metrics.csv").read_text().splitlines()[0]
    assert "class_path: rsa_lightning.losses.DPO" in (folder / "config.yaml").read_text()
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_fit_learns_from_costs_relabels_and_names_the_legacy_measure(pairs, tmp_path, monkeypatch):
    """The commands of the README: a cost transform with its argument, SafeDPO, and Ra-DPO's estimator by short name."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in pairs.open()]
    for i, row in enumerate(rows):
        row |= {"chosen_cost": i % 3, "rejected_cost": i % 7, "chosen_safe": i % 3 <= 0, "rejected_safe": i % 7 <= 0}
    costly = tmp_path / "costs.jsonl"
    costly.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_step = [*flags(ONE_STEP), "--data.path", costly, "--trainer.enable_progress_bar", "false"]
    one_step += ["--trainer.callbacks", "null"]
    transform = ["--model.cost_transform", "Hinge", "--model.cost_transform.eta", "3", "--model.loss", "DPO"]
    assert rsa("fit", "-c", SAFETY, *one_step, *transform)[0] == 0
    written = (tmp_path / "runs/safety/version_0/config.yaml").read_text()
    assert "class_path: rsa_lightning.transforms.Hinge" in written
    assert "eta: 3.0" in written
    assert "label_scale" in (tmp_path / "runs/safety/version_0/hparams.yaml").read_text()
    again = ["-c", tmp_path / "runs/safety/version_0/config.yaml", "--trainer.logger", "false"]
    assert rsa("fit", *again, "--model.loss", "IPO")[0] == 0
    relabel = ["--data.relabel", "SafeDPO", "--data.relabel.margin", "5", "--model.loss", "DPO"]
    assert rsa("fit", "-c", REWARD, *one_step, *relabel)[0] == 0
    assert "margin: 5.0" in (tmp_path / "runs/reward/version_0/config.yaml").read_text()
    legacy = ["--model.risk", "LegacyCVaR", "--model.risk.parts", "1"]
    assert rsa("fit", "-c", REWARD, *one_step, *legacy)[0] == 0
    assert "class_path: rsa_lightning.legacy.LegacyCVaR" in (tmp_path / "runs/reward/version_1/config.yaml").read_text()


def test_validate_measures_and_trains_nothing(pairs, tiny_llama, tmp_path, capsys):
    before = (tiny_llama / "model.safetensors").read_bytes()
    options = flags(SILENT | {"data.max_length": 64, "model.policy.model": tiny_llama})
    assert main(["validate", "-c", REWARD, "--data.path", str(pairs), *options]) == 0
    printed = capsys.readouterr().out
    assert "val/rewards/margins" in printed
    assert "val/risk/rejected" in printed
    assert (tiny_llama / "model.safetensors").read_bytes() == before


def truncated(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 200)[:-12])
    return path


def wrong_columns(tmp_path):
    path = tmp_path / "columns.jsonl"
    path.write_text('{"question": "a", "good": "b", "bad": "c"}\n')
    return path


def empty(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    return path


DATA_MISTAKES = {
    "missing": (lambda tmp_path: tmp_path / "nowhere.jsonl", "nowhere.jsonl"),
    "truncated": (truncated, "cut.jsonl.gz"),
    "wrong columns": (wrong_columns, "no column 'chosen'"),
    "empty": (empty, "empty.jsonl"),
}


@pytest.mark.parametrize("name", DATA_MISTAKES)
def test_bad_data_is_one_line_with_the_file(name, tmp_path, capsys):
    make, expected = DATA_MISTAKES[name]
    status, message = rsa("fit", "-c", REWARD, "--data.path", make(tmp_path), *FAST, capsys=capsys)
    assert status == 1
    last = message.splitlines()[-1]
    assert last.startswith("rsa: error: ")
    assert expected in last
    assert "Traceback" not in message


def test_bad_data_leaves_no_folder_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _ = rsa("fit", "-c", REWARD, "--data.path", wrong_columns(tmp_path), capsys=capsys)
    assert status == 1
    assert [path.name for path in tmp_path.iterdir()] == ["columns.jsonl"]


SETTING_MISTAKES = {
    "temperature twice": (["--model.loss.beta", "0.3"], "the temperature of the safety stage is given twice"),
    "costs that are not there": (["--model.cost_transform", "MeanCost"], "needs the costs of both responses"),
    "temperature of zero": (["--model.beta", "0"], "beta: a temperature must be a positive number, got 0"),
    "multiplier of zero": (["--model.lam", "0"], "lam: the multiplier must be a positive number"),
    "tail in percent": (["--model.risk.tail", "97"], r"CVaR tail is a probability mass in (0, 1], got 97"),
    "binding triton": (["--model.impl", "triton"], "impl='triton' cannot run here"),
    "a batch larger than the data": (
        ["--data.batch_size", "1000"],
        "training pairs are fewer than one optimizer step takes",
    ),
    "no such model": (["--model.policy.model", "./no/model"], "no"),
    "loss and risk that do not fit": (["--model.loss", "TDPO"], "TDPO needs risk KL"),
    "mistyped key": (["--model.beat", "1"], "beat"),
    "mistyped class": (["--model.loss", "DPOO"], "DPOO"),
    "no such checkpoint": (["--ckpt_path", "no.ckpt"], "ckpt_path: there is no checkpoint no.ckpt"),
    "trainer that contradicts itself": (["--trainer.fast_dev_run", "-1"], "trainer: "),
    "positions of the model": (["--data.max_length", "100000"], "max_position_embeddings"),
}


@pytest.mark.parametrize("name", SETTING_MISTAKES)
def test_bad_settings_are_one_line(name, pairs, capsys, monkeypatch):
    monkeypatch.setattr("rsa_kernels.dispatch.INTERPRETED", False)
    extra, expected = SETTING_MISTAKES[name]
    status, message = rsa("fit", "-c", SAFETY, "--data.path", pairs, *FAST, *extra, capsys=capsys)
    assert status != 0
    assert expected in message
    assert "Traceback" not in message


def test_a_tokenizer_without_end_is_named(pairs, tiny_llama, tmp_path, capsys):
    shutil.copytree(tiny_llama, tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))
    status, message = rsa(
        "fit", "-c", REWARD, "--data.path", pairs, *FAST, "--model.policy.model", tmp_path / "model", capsys=capsys
    )
    assert status == 1
    assert "EOS" in message


def test_align_names_a_missing_file_and_writes_nothing(tmp_path, capsys):
    status, message = rsa(
        "align",
        "-c",
        ROOT / "configs/hh.yaml",
        "--output",
        tmp_path / "run",
        "--data.helpful",
        "h.jsonl",
        "--data.safety",
        "s.jsonl",
        capsys=capsys,
    )
    assert (status, message) == (1, "rsa: error: data.helpful: there is no file h.jsonl")
    status, message = rsa("align", "-c", ROOT / "configs/hh.yaml", "--output", tmp_path / "run", capsys=capsys)
    assert status == 1
    assert "data.helpful is not given: pass --data.helpful FILE" in message or "no source" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--steps.reward.los", "DPO"], "steps.reward.los: unknown key"),
        (["--steps.safety.loss", "DPOO"], "DPOO"),
        (["--steps.safety.trainer.max_epoch", "3"], "max_epoch"),
        (["--evaluation.scorer", "rsa_lightning.stories.nothing"], "nothing"),
        (["--data.options.max_lenght", "3"], "max_lenght"),
        (["--lam", "-2"], "lam: the multiplier must be a positive number"),
        (["--output"], "--output needs a value"),
        (["stray"], "expected --KEY VALUE, got 'stray'"),
    ],
)
def test_align_mistakes_are_one_line(extra, expected, tmp_path, capsys):
    status, message = rsa("align", "-c", QUICKSTART, "--output", tmp_path / "run", *extra, capsys=capsys)
    assert status == 1
    assert expected in message.splitlines()[-1]
    assert message.splitlines()[-1].startswith("rsa: error: ")
    assert not (tmp_path / "run").exists()


def test_files_that_cannot_be_used_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    status, message = rsa("align", "-c", QUICKSTART, "--output", tmp_path / "file/run", capsys=capsys)
    assert status == 1
    assert "Traceback" not in message
    assert str(tmp_path / "file/run") in message.splitlines()[-1]


def test_an_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("rsa_lightning.pipeline.align", interrupted)
    status, message = rsa("align", "-c", QUICKSTART, "--output", tmp_path / "run", capsys=capsys)
    assert status == 130
    hint = "the same command reuses every step that is finished, and takes the next from its start"
    assert message == f"rsa: interrupted; {hint}"


def test_print_config_shows_the_merged_layers(capsys):
    assert main(["align", "-c", QUICKSTART, "--print_config", "--lam", "7"]) == 0
    assert "lam: 7" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Only our own sentences are shortened: an error from anywhere else is shown whole."""
    monkeypatch.setattr("rsa_lightning.config.load_layers", lambda *arguments: [][0])
    with pytest.raises(IndexError):
        main(["align", "-c", QUICKSTART])


@pytest.mark.parametrize("loss", ["DPO", "RSA"])
def test_two_ranks_make_the_same_step_as_one(loss, pairs, tiny_llama, tmp_path):
    """Through torchrun and the command line: 2 processes x 4 pairs = 1 process x 8 pairs, three steps."""

    settings = {
        "trainer.max_steps": 3,
        "trainer.accelerator": "cpu",
        "trainer.enable_checkpointing": "false",
        "trainer.check_val_every_n_epoch": 1,
        "trainer.limit_train_batches": 3,
        "trainer.logger.save_dir": tmp_path,
        "data.max_length": 64,
        "data.validation_fraction": 0.3,
        "model.policy.model": tiny_llama,
        "model.loss": loss,
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 1.0,
    }

    def fit(name, batch_size, devices, *launcher):
        mine = {"trainer.logger.name": name, "data.batch_size": batch_size, "trainer.devices": devices}
        process(
            *launcher, "rsa_lightning", "fit", "-c", REWARD, "--data.path", pairs, *flags(settings | mine), cwd=tmp_path
        )
        folder = tmp_path / name / "version_0"
        return load_file(folder / "model/model.safetensors"), validation(folder / "metrics.csv")

    one, figures = fit("one", 8, 1)
    two, figures_of_two = fit("two", 4, 2, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    start = load_file(tiny_llama / "model.safetensors")
    moved = max((one[name] - start[name]).abs().max() for name in start)
    apart = max((one[name] - two[name]).abs().max() for name in start)
    assert moved > 1e-4
    assert apart < 1e-3 * moved
    assert figures["val/loss"] != pytest.approx(0.6931, abs=1e-3)
    assert figures_of_two == pytest.approx(figures, rel=1e-3, abs=1e-4)


def validation(file: Path) -> dict[str, float]:
    """The validation figures in the last row that has them: means over an odd number of pairs, uneven batches and ranks."""
    with file.open() as rows:
        last = [row for row in csv.DictReader(rows) if row["val/loss"]][-1]
    return {name: float(value) for name, value in last.items() if name.startswith("val/")}


def test_processes_that_would_train_alone_are_refused(pairs, monkeypatch, capsys):
    """torchrun with two processes and one device: Lightning would run two unconnected trainings."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")
    status, message = rsa("fit", "-c", REWARD, "--data.path", pairs, *FAST, "--trainer.devices", "1", capsys=capsys)
    assert status == 1
    assert "2 processes were started, the trainer uses 1: leave trainer.devices" in message


def test_the_help_of_align_names_every_key_of_a_configuration(capsys):
    import dataclasses

    from rsa_lightning.plan import AlignConfig, AlignData, Evaluation, StepConfig

    with pytest.raises(SystemExit):
        main(["align", "--help"])
    text = capsys.readouterr().out
    assert all(field.name in text for field in dataclasses.fields(AlignConfig))
    assert all(f"data.{field.name}" in text for field in dataclasses.fields(AlignData) if field.name != "stories")
    assert all(field.name in text for kind in (StepConfig, Evaluation) for field in dataclasses.fields(kind))


def test_a_misspelt_class_is_named_with_those_there_are(tmp_path, capsys):
    config = str(Path(__file__).parents[1] / "configs/quickstart.yaml")
    for key, value in (("loss", "DPQ"), ("cost_transform", "{class_path: Hing, init_args: {eta: 3}}")):
        options = ("--steps.safety.loss", "DPO", f"--steps.safety.{key}", value, "--output", str(tmp_path / "run"))
        status, message = rsa("align", "-c", config, *options, capsys=capsys)
        name = "Hing" if "Hing" in value else value
        assert status == 1
        assert f"{key}: there is no class {name}; losses: DPO" in message
        assert "cost transforms: MeanCost, Indicator, Hinge, Exponential" in message
