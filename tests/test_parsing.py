"""What a parser says, in words for the user."""

import pytest

from rsa_lightning.cli import main
from rsa_lightning.parsing import plain_message

UNION = """Does not validate against any of the Union subtypes
Subtypes: [<class 'str'>, <class 'Strategy'>]
Errors:
  - Expected a <class 'str'>
  - {}
Given value type: <class 'Namespace'>
Given value: Namespace(class_path='FSDP2')"""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (UNION.format("strategy.replicas is at least 1, got 0"), "strategy.replicas is at least 1, got 0"),
        ("Expected a <class 'str'>", "Expected a <class 'str'>"),
        (
            "trainer: No supported gpu backend found!",
            "trainer: there is no GPU here; --trainer.accelerator cpu needs none",
        ),
        ("Expected a dot import path string: Beat", "there is no class Beat; losses: DPO"),
    ],
)
def test_a_message_is_what_is_wrong_in_one_line(said, told):
    assert plain_message(ValueError(said)).startswith(told)


def test_what_a_class_says_of_its_arguments_is_all_that_rsa_fit_says(tmp_path, capsys):
    reference = ["--model.reference", "HiddenCache", "--model.reference.folder", str(tmp_path / "cache")]
    words = ["fit", "--model", "RewardAlignment", "--model.policy.config.model_type", "llama", "--data.path", "x.jsonl"]
    assert main([*words, *reference, "--model.reference.keep", "logps"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rsa: error: RSA reads the reference's distribution, and keep=logps")
