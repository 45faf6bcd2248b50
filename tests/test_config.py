"""Layers and overrides."""

import pytest

from rsa_lightning.config import dump, layer_parser, load_layers, merge, nest, overrides, parse


def test_later_layers_win_key_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: {reward: {loss: DPO, trainer: {max_epochs: 1}}}\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("steps: {reward: {trainer: {max_steps: 5}}}\n")
    config = load_layers(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"], [("steps.reward.trainer.max_epochs", "3"), ("beta", "1e-2")]
    )
    assert config == {
        "steps": {"reward": {"loss": "DPO", "trainer": {"max_epochs": 3, "max_steps": 5}}},
        "seed": 1,
        "beta": 0.01,
    }


def test_a_value_replaces_a_mapping_and_null_removes():
    assert merge({"loss": {"class_path": "RSA"}}, {"loss": "DPO"}) == {"loss": "DPO"}
    assert merge({"model": {"config": {"a": 1}}}, nest("model.config", None)) == {"model": {"config": None}}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("2.0e-5", 2e-5), ("3", 3), ("1.", 1.0), ("a.b", "a.b"), ("[1, 2]", [1, 2])]
)
def test_numbers_are_numbers(text, value):
    found = parse(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_a_merged_configuration_survives_being_written(tmp_path):
    config = {"a": {"b": [1, {"c": None}]}, "d": 1e-5}
    (tmp_path / "x.yaml").write_text(dump(config))
    assert load_layers([tmp_path / "x.yaml"]) == config


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no configuration file .*nowhere.yaml"):
        load_layers([tmp_path / "nowhere.yaml"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="list.yaml must be a mapping of keys, got list"):
        load_layers([tmp_path / "list.yaml"])
    (tmp_path / "latin.yaml").write_bytes("a: \xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.yaml is not UTF-8 \(byte 3\)"):
        load_layers([tmp_path / "latin.yaml"])
    (tmp_path / "twice.yaml").write_text("a: 1\nb: {c: 1, d: 2, c: 3}\n")
    with pytest.raises(ValueError, match="line 2: the key c is written twice"):
        load_layers([tmp_path / "twice.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML: .* line 2"):
        load_layers([tmp_path / "broken.yaml"])


def test_another_class_brings_its_own_arguments():
    """A layer that takes TDPO where RSA was must not hand RSA's arguments on; the same class keeps what is not said."""
    below = {"loss": {"class_path": "RSA", "init_args": {"risk_weight": 0.3}}}
    other = {"loss": {"class_path": "DPO", "init_args": {"label_smoothing": 0.1}}}
    assert merge(below, other) == other
    same = {"loss": {"class_path": "rsa_lightning.losses.RSA", "init_args": {"detach_chosen_risk": False}}}
    assert merge(below, same)["loss"]["init_args"] == {"risk_weight": 0.3, "detach_chosen_risk": False}


def test_two_classes_of_one_name_are_two_classes():
    below = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.99]}}
    assert merge({"o": below}, {"o": {"class_path": "mine.AdamW"}}) == {"o": {"class_path": "mine.AdamW"}}
    assert merge({"o": below}, {"o": {"class_path": "AdamW"}})["o"]["init_args"] == {"betas": [0.9, 0.99]}


@pytest.mark.parametrize("name", ["FSDP2", "rsa_lightning.parallel.strategy.FSDP2", "fsdp2"])
def test_dotted_keys_below_a_class_are_its_arguments(name):
    """However the class was named; as LightningCLI has it."""
    known = "FSDP2" if name == "fsdp2" else name
    named = load_layers([], overrides(["--s", name, "--s.replicas", "2", "--s.init_args.compile", "true"]))
    assert named == {"s": {"class_path": known, "init_args": {"replicas": 2, "compile": True}}}
    assert merge(named, nest("s.replicas", 4))["s"]["init_args"] == {"replicas": 4, "compile": True}
    risk = merge({"risk": {"class_path": "CVaR", "init_args": {"tail": 0.97}}}, nest("risk.tail", 0.5))
    assert risk == {"risk": {"class_path": "CVaR", "init_args": {"tail": 0.5}}}


def test_the_name_of_a_class_alone_leaves_it_its_arguments():
    below = {"strategy": {"class_path": "FSDP2", "init_args": {"replicas": 8}}}
    for name in ("FSDP2", "fsdp2", "rsa_lightning.parallel.strategy.FSDP2"):
        assert merge(below, {"strategy": name})["strategy"]["init_args"] == {"replicas": 8}
    for other in ("ddp", "DDPStrategy"):
        assert merge(below, {"strategy": other}) == {"strategy": other}


def test_what_is_no_class_is_replaced():
    cache = merge({"reference_cache": "runs/cache"}, {"reference_cache": {"folder": "other"}})
    assert cache == {"reference_cache": {"folder": "other"}}
    assert merge({"s": "fsdp"}, nest("s.replicas", 2)) == {"s": {"replicas": 2}}


def test_the_parser_of_layers_leaves_keys_to_overrides():
    """A flag of the command is its own; its beginning is a key of the configuration like any other."""
    parser = layer_parser("rsa try", "[--flag] [--KEY VALUE ...]")
    parser.add_argument("--flag", action="store_true")
    known, rest = parser.parse_known_args(["-c", "a.yaml", "--fla", "1", "--flag", "--config", "b.yaml", "--lam=2"])
    assert (known.config, known.flag) == (["a.yaml", "b.yaml"], True)
    assert overrides(rest) == [("fla", "1"), ("lam", "2")]
    assert parser.format_usage() == "usage: rsa try -c FILE [-c LAYER ...] [--flag] [--KEY VALUE ...]\n"
