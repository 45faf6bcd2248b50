"""Sampling writes the model's answers, their true log-probabilities, and the same file whatever interrupted it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rsa_lightning.data.tokenize import encode_prompt
from rsa_lightning.evaluation import generate as module
from rsa_lightning.evaluation.generate import (
    GenerationError,
    Sampling,
    answer_logps,
    draw,
    generate,
    nucleus,
    sample_answers,
)
from rsa_lightning.evaluation.samples import SampleError, from_line, read_samples

PROMPTS = {
    "bread": "Human: How do I keep bread fresh?\n\nAssistant:",
    "fox": "The fox asked",
    "owl": "No answer is better than a dangerous one, said the owl,",
    "short": "A",
    "river": "the river\u2028was safe",  # a line separator that JSON does not escape
}
SAMPLING = Sampling(samples_per_prompt=4, max_new_tokens=12, batch_size=6, seed=3)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def other_llama(tiny_llama: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("other")
    moved = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def plain_logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    """One unpadded row at a time, without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logp = logits.log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


def encoded(tiny_tokenizer: Any) -> list[list[int]]:
    return [encode_prompt(tiny_tokenizer, prompt, 64) for prompt in PROMPTS.values()]


@pytest.mark.parametrize("rows_at_once", [1, 1000])
def test_logps_are_those_of_single_rows(model: Any, tiny_tokenizer: Any, monkeypatch: Any, rows_at_once: int):
    """Padding on both sides, shared prompts and slices change nothing."""
    prompts = [prompt for prompt in encoded(tiny_tokenizer) for _ in range(2)]
    answers = [list(range(5, 5 + 1 + i % 7)) for i in range(len(prompts))]
    monkeypatch.setattr(module, "LOGITS_BYTES", rows_at_once * 4 * 7 * model.config.vocab_size)
    found = answer_logps(model, prompts, answers)
    expected = [plain_logp(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert found == pytest.approx(expected, abs=2e-4)


def test_greedy_answers_are_those_of_transformers(model: Any, tiny_tokenizer: Any, monkeypatch: Any):
    """With the largest logit in place of a draw, the loop is transformers' own greedy search, prompt by prompt."""
    monkeypatch.setattr(module, "draw", lambda logits, *_: logits.argmax(-1))
    eos = tiny_tokenizer.eos_token_id
    found = sample_answers(model, encoded(tiny_tokenizer), [eos], SAMPLING, torch.Generator())
    for prompt, tokens, finished in zip(encoded(tiny_tokenizer), *found, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=eos
        )
        assert tokens == out[0, len(prompt) :].tolist()
        assert finished == (tokens[-1] == eos)


def test_answers_end_at_eos_and_rows_that_remain_are_undisturbed(model: Any, tiny_tokenizer: Any):
    """Half the vocabulary ends an answer, so rows leave the batch at every step; each keeps its own log-probability."""
    stops = list(range(0, model.config.vocab_size, 2))
    prompts = encoded(tiny_tokenizer) * 10
    found = sample_answers(model, prompts, stops, SAMPLING, torch.Generator().manual_seed(0))
    lengths = {len(tokens) for tokens in found.tokens}
    assert len(lengths) > 3
    for tokens, finished in zip(found.tokens, found.finished, strict=True):
        assert all(token % 2 for token in tokens[:-1])
        assert finished == (tokens[-1] % 2 == 0)


def test_first_tokens_follow_the_model(model: Any, tiny_tokenizer: Any):
    """Chi-square over 20000 first tokens, cells of at least 20 expected; 5 standard deviations allowed."""
    prompt, draws = encoded(tiny_tokenizer)[1], 20000
    one = dataclasses.replace(SAMPLING, max_new_tokens=1)
    found = sample_answers(model, [prompt] * draws, [], one, torch.Generator().manual_seed(0))
    counts = torch.tensor([tokens[0] for tokens in found.tokens]).bincount(minlength=model.config.vocab_size)
    with torch.no_grad():
        expected = draws * model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    cells = expected >= 20
    chi_square = ((counts - expected).square() / expected)[cells].sum().item()
    degrees = int(cells.sum())
    assert degrees > 20
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_nucleus_keeps_the_token_that_crosses():
    probs = torch.tensor([[0.1, 0.5, 0.05, 0.35]])
    assert nucleus(probs, 0.6).tolist() == [[False, True, False, True]]
    assert nucleus(probs, 0.4).tolist() == [[False, True, False, False]]
    tokens = draw(probs.log().expand(500, 4), 1.0, 0.6, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {1, 3}


def test_low_temperature_is_greedy():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert (draw(logits, 1e-3, 1.0, torch.Generator().manual_seed(0)) == logits.argmax(-1)).all()


def test_samples_have_every_field(
    tiny_llama: Path, other_llama: Path, model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
):
    drawn, real = [], module.sample_answers
    monkeypatch.setattr(module, "sample_answers", lambda *args: drawn.append(real(*args)) or drawn[-1])
    done = generate(tiny_llama, PROMPTS, tmp_path / "samples.jsonl", start_folder=other_llama, sampling=SAMPLING)
    samples = read_samples(done.path)
    assert list(json.loads(done.path.read_text().split("\n")[0])) == [
        "prompt_id",
        "sample_id",
        "prompt",
        "text",
        "logp",
        "ref_logp",
        "reward",
        "cost",
    ]
    assert [(s.prompt_id, s.sample_id) for s in samples] == [(key, i) for key in PROMPTS for i in range(4)]
    assert done.samples == len(samples) == 20
    answers, other = (
        [tokens for chunk in drawn for tokens in chunk.tokens],
        AutoModelForCausalLM.from_pretrained(other_llama),
    )
    assert done.tokens == sum(map(len, answers))
    for s, answer in zip(samples, answers, strict=True):
        prompt = encode_prompt(tiny_tokenizer, s.prompt, 64)
        assert (s.prompt, s.reward, s.cost) == (PROMPTS[s.prompt_id], None, None)
        assert s.text == tiny_tokenizer.decode(answer, skip_special_tokens=True)
        assert s.logp == pytest.approx(plain_logp(model, prompt, answer), abs=2e-4)
        assert s.ref_logp == pytest.approx(plain_logp(other.eval(), prompt, answer), abs=2e-4)
        assert abs(s.logp - s.ref_logp) > 1e-3


def test_a_model_is_at_no_distance_from_itself(tiny_llama: Path, tmp_path: Path):
    """Exactly 0, for the same folder and for a copy of it; a model without a start has no distance."""
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    for start in (tiny_llama, copy):
        for s in read_samples(
            generate(tiny_llama, PROMPTS, tmp_path / "s.jsonl", start_folder=start, sampling=SAMPLING).path
        ):
            assert s.logp == s.ref_logp
    assert all(s.ref_logp is None for s in read_samples(generate(tiny_llama, PROMPTS, tmp_path / "n.jsonl").path))


@pytest.mark.parametrize("changed", [{"temperature": 0.7}, {"top_p": 0.9}])
def test_no_kl_from_another_sampler(tiny_llama: Path, tmp_path: Path, caplog: Any, changed: dict[str, float]):
    sampling = dataclasses.replace(SAMPLING, **changed)
    done = generate(tiny_llama, PROMPTS, tmp_path / "s.jsonl", start_folder=tiny_llama, sampling=sampling)
    assert all(s.ref_logp is None and s.logp < 0 for s in read_samples(done.path))
    assert "ref_logp, and with it kl_to_start, stays null" in caplog.text


def test_interrupted_equals_uninterrupted(tiny_llama: Path, tmp_path: Path, monkeypatch: Any):
    """Death in the third chunk, and a torn line on top: the rest is sampled and the file is the same, byte for byte."""
    whole = generate(tiny_llama, PROMPTS, tmp_path / "whole.jsonl", start_folder=tiny_llama, sampling=SAMPLING)
    path, calls, real = tmp_path / "samples.jsonl", [], module.sample_answers

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "sample_answers", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_llama, PROMPTS, path, start_folder=tiny_llama, sampling=SAMPLING)
    assert not path.exists()
    partial = path.with_name("samples.jsonl.partial")
    lines = partial.read_text().split("\n")
    partial.write_text("\n".join(lines[:-1]) + "\n" + lines[-2][:30])
    resumed = generate(tiny_llama, PROMPTS, path, start_folder=tiny_llama, sampling=SAMPLING)
    assert (resumed.resumed, resumed.samples, len(calls)) == (12, 20, 5)
    assert path.read_bytes() == whole.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.jsonl", "whole.jsonl"]


def test_a_torn_chunk_is_sampled_again(tiny_llama: Path, tmp_path: Path, monkeypatch: Any):
    """One line short of a chunk: that chunk is drawn again as a whole, as its generator demands."""
    whole = generate(tiny_llama, PROMPTS, tmp_path / "whole.jsonl", sampling=SAMPLING)
    monkeypatch.setattr(module, "publish", lambda *_: None)
    generate(tiny_llama, PROMPTS, tmp_path / "samples.jsonl", sampling=SAMPLING)
    partial = tmp_path / "samples.jsonl.partial"
    partial.write_text("\n".join(partial.read_text().split("\n")[:12]) + "\n")  # header and 11 of 20 samples
    monkeypatch.undo()
    resumed = generate(tiny_llama, PROMPTS, tmp_path / "samples.jsonl", sampling=SAMPLING)
    assert resumed.resumed == 6
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_a_partial_file_of_another_run_is_not_continued(
    tiny_llama: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
):
    monkeypatch.setattr(module, "publish", lambda *_: None)
    generate(tiny_llama, PROMPTS, tmp_path / "samples.jsonl", sampling=dataclasses.replace(SAMPLING, seed=4))
    monkeypatch.undo()
    done = generate(tiny_llama, PROMPTS, tmp_path / "samples.jsonl", sampling=SAMPLING)
    assert "was written with other sampling: sampling starts again" in caplog.text
    assert done.resumed == 0
    fresh = generate(tiny_llama, PROMPTS, tmp_path / "fresh.jsonl", sampling=SAMPLING)
    assert done.path.read_bytes() == fresh.path.read_bytes()


def test_the_seed_decides_and_the_global_generator_does_not(tiny_llama: Path, tmp_path: Path):
    texts = {}
    for name, seed, torch_seed in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        torch.manual_seed(torch_seed)
        sampling = dataclasses.replace(SAMPLING, seed=seed)
        texts[name] = [
            s.text for s in read_samples(generate(tiny_llama, PROMPTS, tmp_path / name, sampling=sampling).path)
        ]
    assert texts["a"] == texts["b"] != texts["c"]


def test_qwen2_is_sampled_too(tiny_tokenizer: Any, tmp_path: Path):
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tiny_tokenizer.save_pretrained(tmp_path / "qwen")
    samples = read_samples(generate(tmp_path / "qwen", PROMPTS, tmp_path / "s.jsonl", sampling=SAMPLING).path)
    # nearly uniform weights: about log V nats per token
    assert all(-14 * 12 < s.logp < -0.5 for s in samples)


def test_mistakes_are_named(tiny_llama: Path, tiny_tokenizer: Any, tmp_path: Path):
    path = tmp_path / "s.jsonl"
    with pytest.raises(GenerationError, match="it has no config"):
        generate(tmp_path / "nowhere", PROMPTS, path)
    with pytest.raises(GenerationError, match="there are no prompts"):
        generate(tiny_llama, {}, path)
    with pytest.raises(GenerationError, match=r"max_new_tokens=250 exceed the model's 256 positions"):
        generate(tiny_llama, PROMPTS, path, sampling=Sampling(max_new_tokens=250))
    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(GenerationError, match="has no model"):
        generate(bare, PROMPTS, path)
    mute = shutil.copytree(tiny_llama, tmp_path / "mute")
    config = json.loads((mute / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (mute / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no EOS token"):
        generate(mute, PROMPTS, path)
    foreign = shutil.copytree(tiny_llama, tmp_path / "foreign")
    longer = AutoTokenizer.from_pretrained(tiny_llama)
    longer.add_tokens(["<new>"])
    longer.save_pretrained(foreign)
    with pytest.raises(GenerationError, match="have different vocabularies"):
        generate(tiny_llama, PROMPTS, path, start_folder=foreign)
    assert not list(tmp_path.glob("s.jsonl*"))


def test_a_broken_model_is_not_recorded(tiny_llama: Path, tmp_path: Path):
    broken = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "broken")
    with pytest.raises(GenerationError, match="the model gives an answer to prompt bread the log-probability nan"):
        generate(tmp_path / "broken", PROMPTS, tmp_path / "s.jsonl", sampling=SAMPLING)
    with pytest.raises(GenerationError, match="its start gives an answer to prompt bread the log-probability nan"):
        generate(tiny_llama, PROMPTS, tmp_path / "s.jsonl", start_folder=tmp_path / "broken", sampling=SAMPLING)
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"top_p": 1.5}, r"top_p is a probability mass in \(0, 1\], got 1.5"),
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, got 0"),
    ],
)
def test_bad_settings_fail_before_a_model_loads(setting: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_a_line_that_is_no_sample_is_named():
    good = {
        "prompt_id": "p",
        "sample_id": 0,
        "prompt": "",
        "text": "",
        "logp": -1,
        "ref_logp": None,
        "reward": 1,
        "cost": 0,
    }
    assert from_line(json.dumps(good), "f:1").reward == 1
    for change, message in (
        ({"reward": "high"}, "f:1: reward is 'high', expected a finite number or null"),
        ({"cost": float("nan")}, "f:1: cost is nan"),
    ):
        with pytest.raises(SampleError, match=message):
            from_line(json.dumps(good | change), "f:1")
    with pytest.raises(SampleError, match="f:1 lacks cost"):
        from_line(json.dumps({k: v for k, v in good.items() if k != "cost"}), "f:1")
    with pytest.raises(SampleError, match="f:1 is not JSON"):
        from_line('{"prompt_id": "p"', "f:1")
