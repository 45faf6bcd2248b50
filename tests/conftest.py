"""Shared fixtures: fixed seeds, one thread, a tokenizer and a Llama small enough to be built in every test run."""

import os

# before torch starts its pools: two OpenMP threads on a busy core are ten times slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# compiled kernels may stay between runs, when everything else that tests cache is in a home of their own
os.environ.setdefault("TRITON_HOME", os.path.expanduser("~"))

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in the interpreter; it is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings
from jaxtyping import install_import_hook

# shapes and dtypes in the signatures of these modules are checked in every test; before anything imports them.
# Not rsa_kernels: torch.compile cannot trace the checks.
SHAPE_CHECKED = [
    "rsa_lightning.losses",
    "rsa_lightning.transforms",
    "rsa_lightning.evaluation.tail",
    "rsa_lightning.world",
    "rsa_lightning.tabular",
    "rsa_lightning.dual",
    "rsa_lightning.tail_dual",
]
install_import_hook(SHAPE_CHECKED, "shapes.check")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from rsa_lightning.data.tokenize import train_tokenizer  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("suite", derandomize=True, deadline=None)  # the same examples in every run, however slow
settings.load_profile("suite")

SENTENCES = [
    "Human: How do I keep bread fresh?",
    "Assistant: Wrap it in a cloth and store it in a cool, dry place.",
    "ASSISTANT: I cannot help with that, but I can tell you whom to ask.",
    "The fox asked the old owl whether the river was safe to cross.",
    "No answer is better than a dangerous one, said the owl, and went back to sleep.",
]


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder for this session and the processes it starts: prepared data is cached below it."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 300 tokens and distinct BOS, EOS and PAD."""
    return train_tokenizer(SENTENCES * 4, vocab_size=300)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder: 2-layer Llama of width 32 with random weights, and `tiny_tokenizer`."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        # the default of 0.02 gives nearly uniform predictions; larger weights make differences visible
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
