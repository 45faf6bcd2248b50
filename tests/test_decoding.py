"""Mixtures of models: the law of every token against full forwards without a cache, in every loop that decodes."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rsa_kernels import CVaR
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rsa_lightning.data.records import PreferencePair
from rsa_lightning.data.tokenize import Lengths, encode_prompt, encode_records
from rsa_lightning.decoding import MixedLogits, Mixture, mixed_logits
from rsa_lightning.evaluation import generate as module
from rsa_lightning.evaluation.generate import GenerationError, Sampling, answer_logps, generate, sample_answers
from rsa_lightning.evaluation.preference import MixedPolicy, Split, judge, pair_stats, response_logps
from rsa_lightning.evaluation.samples import read_samples
from rsa_lightning.models import PolicySpec, load_policy

TEXTS = ["Human: How do I keep bread fresh?\n\nAssistant:", "The fox asked", "A"]
WEIGHTS = [(0.5, 0.3, 0.2), (1.0, 1.0, -1.0), (1.5, -0.5, 0.0)]


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one vocabulary; the second is deeper, which a mixture does not mind."""
    root = tmp_path_factory.mktemp("members")
    found = [tiny_llama]
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LlamaConfig.from_pretrained(tiny_llama, num_hidden_layers=seed + 1)
        LlamaForCausalLM(config).save_pretrained(root / str(seed))
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(root / str(seed))
        found.append(root / str(seed))
    return found


@pytest.fixture(scope="module")
def models(folders: list[Path]) -> list[Any]:
    return [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer: Any) -> list[list[int]]:
    return [encode_prompt(tiny_tokenizer, text, 64) for text in TEXTS]


@torch.no_grad()
def law(models: list[Any], weights: tuple[float, ...], ids: list[int]) -> torch.Tensor:
    """log q of every next token after each of `ids`: the definition, in float64, one row, no cache, no padding."""
    parts = [model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1) for model in models]
    return sum(w * part for w, part in zip(weights, parts, strict=True)).log_softmax(-1)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


# ------------------------------------------------------------------ the formula


def test_a_mixture_of_two_coins():
    """p = (.8, .2), q = (.2, .8): halves give a fair coin; 2 p - q gives .8^2/.2 : .2^2/.8 = 3.2 : .05."""
    p, q = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.2, 0.8]).log()
    assert mixed_logits([p + 7, q - 3], [0.5, 0.5]).softmax(-1).tolist() == pytest.approx([0.5, 0.5])
    assert mixed_logits([p, q], [2.0, -1.0]).softmax(-1).tolist() == pytest.approx([3.2 / 3.25, 0.05 / 3.25])


def test_what_a_member_rules_out_stays_out():
    """Also where the member of negative weight rules it out; a member of weight zero rules out nothing."""
    one, other = torch.tensor([0.0, -torch.inf, 1.0]), torch.tensor([0.0, -torch.inf, -torch.inf])
    assert mixed_logits([one, other], [2.0, -1.0])[1] == -torch.inf
    assert mixed_logits([one, other], [0.5, 0.5]).softmax(-1).tolist() == [1.0, 0.0, 0.0]
    assert torch.equal(mixed_logits([one, other], [1.0, 0.0]), one.log_softmax(-1))


# ------------------------------------------------------------------ generate of transformers


@pytest.mark.parametrize("weights", WEIGHTS)
def test_generate_decodes_the_product_of_experts(models, prompts, weights):
    """Greedy, a batch with padding on the left: every token is the best of the definition's, at its probability."""
    ids, mask = padded(prompts)
    out = models[0].generate(
        ids,
        attention_mask=mask,
        logits_processor=[MixedLogits(models[1:], weights, mask)],
        do_sample=False,
        max_new_tokens=8,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    scores = torch.stack(out.scores, 1)
    for row, prompt in enumerate(prompts):
        tokens = out.sequences[row, ids.shape[1] :].tolist()
        expected = law(models, weights, prompt + tokens)[len(prompt) - 1 : -1]
        assert torch.allclose(scores[row].double().log_softmax(-1), expected, atol=1e-4)
        assert tokens == expected.argmax(-1).tolist()


def test_weights_one_and_nought_are_the_main_model(models, prompts):
    ids, mask = padded(prompts)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    plain = models[0].generate(ids, **options)
    mixed = models[0].generate(ids, logits_processor=[MixedLogits([models[1]], [1.0, 0.0], mask)], **options)
    assert torch.equal(plain, mixed)


def test_sampling_follows_the_mixture(models, prompts):
    """Chi-square over 20000 first tokens of one prompt, cells of at least 20 expected; 5 standard deviations."""
    weights, draws = (0.6, 0.4), 20000
    ids = torch.tensor([prompts[1]])
    torch.manual_seed(0)
    found = models[0].generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=[MixedLogits(models[1:2], weights)],
        do_sample=True,
        top_k=0,
        max_new_tokens=1,
        num_return_sequences=draws,
        pad_token_id=0,
    )
    counts = found[:, -1].bincount(minlength=models[0].config.vocab_size)
    expected = draws * law(models[:2], weights, prompts[1])[-1].exp()
    cells = expected >= 20
    chi_square = ((counts - expected).square() / expected)[cells].sum().item()
    degrees = int(cells.sum())
    assert degrees > 20
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_one_processor_serves_several_calls_and_beams(models, prompts):
    """Beams change places, so the caches of the last call are of other rows: they are read again, not trusted."""
    ids = torch.tensor([prompts[0]])
    processor = MixedLogits(models[1:2], (0.5, 0.5))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    first = models[0].generate(ids, logits_processor=[processor], **options)
    again = models[0].generate(ids, logits_processor=[processor], **options)
    assert torch.equal(first, again)
    beams = models[0].generate(
        ids,
        logits_processor=[processor],
        num_beams=3,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = beams.sequences[0, ids.shape[1] :]
    steps = law(models[:2], (0.5, 0.5), beams.sequences[0].tolist())[len(prompts[0]) - 1 : -1]
    mean = steps.gather(1, tokens[:, None]).mean().item()
    assert beams.sequences_scores[0].item() == pytest.approx(mean, abs=1e-4)


# ------------------------------------------------------------------ our own loops


@pytest.mark.parametrize("weights", WEIGHTS)
def test_logps_of_a_mixture_are_the_definition(models, prompts, weights):
    answers = [[5, 6, 7, 8], [9], [10, 11]]
    found = answer_logps(Mixture(models, weights), prompts, answers)
    for value, prompt, answer in zip(found, prompts, answers, strict=True):
        steps = law(models, weights, prompt + answer)[len(prompt) - 1 : -1]
        assert value == pytest.approx(steps.gather(1, torch.tensor(answer)[:, None]).sum().item(), abs=1e-4)


def test_our_sampler_draws_from_the_mixture_while_rows_end(models, prompts):
    """A fifth of the vocabulary ends an answer, so rows leave all caches. Second tokens are counted."""
    weights, draws = (0.6, 0.4), 20000
    stops = list(range(0, 300, 5))
    sampling = Sampling(max_new_tokens=2, samples_per_prompt=1)
    mixture = Mixture(models[:2], weights)
    generator = torch.Generator().manual_seed(0)
    found = sample_answers(mixture, [prompts[1]] * draws, stops, sampling, generator)
    assert 1000 < sum(len(tokens) == 1 for tokens in found.tokens) < draws - 1000
    followed = Counter(tokens[0] for tokens in found.tokens if len(tokens) == 2)
    often = {first: count for first, count in followed.items() if count >= 50}
    seconds = torch.tensor([tokens[1] for tokens in found.tokens if tokens[0] in often])
    expected = sum(n * law(models[:2], weights, [*prompts[1], first])[-1].exp() for first, n in often.items())
    counts = seconds.bincount(minlength=len(expected))
    cells = expected >= 20
    chi_square = ((counts - expected).square() / expected)[cells].sum().item()
    degrees = int(cells.sum())
    assert degrees > 5
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_generate_records_the_mixture(folders, models, prompts, tmp_path, monkeypatch):
    """logp is the mixture's and ref_logp the start's, of every answer that was drawn."""
    weights, drawn, real = (1.0, 1.0, -1.0), [], module.sample_answers
    monkeypatch.setattr(module, "sample_answers", lambda *args: drawn.append(real(*args)) or drawn[-1])
    sampling = Sampling(samples_per_prompt=3, max_new_tokens=6, batch_size=4)
    asked, path = dict(zip("abc", TEXTS, strict=True)), tmp_path / "samples.jsonl"
    generate(dict(zip(folders, weights, strict=True)), asked, path, start_folder=folders[2], sampling=sampling)
    answers = [tokens for chunk in drawn for tokens in chunk.tokens]
    for i, (sample, tokens) in enumerate(zip(read_samples(path), answers, strict=True)):
        at, index = len(prompts[i // 3]) - 1, torch.tensor(tokens)[:, None]
        ids = [*prompts[i // 3], *tokens]
        expected = law(models, weights, ids)[at:-1].gather(1, index).sum().item()
        start = law(models[2:], (1.0,), ids)[at:-1].gather(1, index).sum().item()
        assert (sample.logp, sample.ref_logp) == pytest.approx((expected, start), abs=1e-3)


def test_a_mixture_of_one_model_with_itself_is_that_model(folders, tmp_path):
    """Half and half: the same draws, the same log-probabilities."""
    twin = shutil.copytree(folders[0], tmp_path / "twin")
    sampling = Sampling(samples_per_prompt=2, max_new_tokens=6, batch_size=4)
    asked = dict(zip("abc", TEXTS, strict=True))
    generate(folders[0], asked, tmp_path / "one.jsonl", start_folder=folders[1], sampling=sampling)
    generate({folders[0]: 0.5, twin: 0.5}, asked, tmp_path / "two.jsonl", start_folder=folders[1], sampling=sampling)
    for one, two in zip(read_samples(tmp_path / "one.jsonl"), read_samples(tmp_path / "two.jsonl"), strict=True):
        assert (one.text, one.ref_logp) == (two.text, two.ref_logp)
        assert one.logp == pytest.approx(two.logp, abs=1e-5)


# ------------------------------------------------------------------ judging pairs


@pytest.fixture(scope="module")
def examples(tiny_tokenizer):
    pairs = [PreferencePair(text, f" yes {i}, said the owl.", " no") for i, text in enumerate(TEXTS)]
    return encode_records(tiny_tokenizer, pairs, Lengths(96, 64)).examples


@pytest.mark.parametrize("rows_at_once", [1, 1000])
def test_pairs_are_judged_by_the_mixture(folders, models, examples, rows_at_once, monkeypatch):
    """Log-probabilities, KL and nested CVaR of every pair against the definition in float64."""
    monkeypatch.setattr("rsa_lightning.evaluation.preference.LOGITS_BYTES", rows_at_once * 4 * 300 * 4)
    weights = (0.7, 0.3)
    policies = [load_policy(PolicySpec(model=str(folder))) for folder in folders]
    risk = CVaR(0.3)
    found = pair_stats(MixedPolicy(policies[:2], weights), policies[2], examples, 0, risk)
    for i, example in enumerate(examples):
        kls, risks = [], []
        for side, logp, ratio in (
            (example.chosen, found.chosen_logp, found.chosen_logratio),
            (example.rejected, found.rejected_logp, found.rejected_logratio),
        ):
            ids = [*example.prompt, *side]
            log_q = law(models[:2], weights, ids)[len(example.prompt) - 1 : -1]
            log_p = law(models[2:], (1.0,), ids)[len(example.prompt) - 1 : -1]
            index = torch.tensor(side)[:, None]
            assert logp[i].item() == pytest.approx(log_q.gather(1, index).sum().item(), abs=1e-3)
            assert ratio[i].item() == pytest.approx((log_q - log_p).gather(1, index).sum().item(), abs=1e-3)
            kls.append((log_p.exp() * (log_p - log_q)).sum().item())
            risks.append(risk.value(log_p - log_q, log_p).sum().item())
        assert found.kl[i].item() == pytest.approx(sum(kls) / 2, rel=1e-4)
        assert found.risk[i].item() == pytest.approx(sum(risks) / 2, rel=1e-4)


def test_judge_takes_a_mixture(folders, examples):
    split = {"helpful": {"held_out": Split(TEXTS, examples)}}
    options = {"pad_id": 0, "risk": CVaR(0.3), "resamples": 10, "seed": 0}
    mixed = judge(dict(zip(folders[:2], (1.0, 0.0), strict=True)), folders[2], split, **options)
    plain = judge(folders[0], folders[2], split, **options)
    for key in ("margin", "kl", "risk", "chosen_logp"):
        assert mixed["helpful"]["held_out"][key] == pytest.approx(plain["helpful"]["held_out"][key], rel=1e-4)


def test_log_probabilities_of_responses(folders, models, examples):
    chosen, rejected = response_logps(load_policy(PolicySpec(model=str(folders[0]))), examples, 0)
    for i, example in enumerate(examples):
        for side, value in ((example.chosen, chosen[i]), (example.rejected, rejected[i])):
            steps = law(models[:1], (1.0,), [*example.prompt, *side])[len(example.prompt) - 1 : -1]
            assert value.item() == pytest.approx(steps.gather(1, torch.tensor(side)[:, None]).sum().item(), abs=1e-4)


# ------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def wider(tiny_llama: Path) -> Any:
    return LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama, vocab_size=400))


def test_models_of_other_vocabularies_are_refused(models, wider, prompts):
    message = "vocabulary mismatch: member 0 gives 300 logits and member 1 400"
    with pytest.raises(ValueError, match=message.replace("300", str(models[0].config.vocab_size))):
        Mixture([models[0], wider], (0.5, 0.5))
    processor = MixedLogits([wider], (0.5, 0.5))
    with pytest.raises(ValueError, match="vocabulary mismatch: the main model gives .* and model 1 400"):
        processor(torch.tensor([prompts[0]]), torch.zeros(1, models[0].config.vocab_size))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.4), "must sum to 1, got 0.5 the main model .* 0.4 model 1"),
        ((1.0,), "1 further models need 2 weights, the first of them for the model that generates; got 1"),
        ((float("nan"), 1.0), "must be a finite number, got nan"),
    ],
)
def test_wrong_weights_are_refused(models, weights, message):
    with pytest.raises(ValueError, match=message):
        MixedLogits(models[1:2], weights)


def test_a_mask_of_other_prompts_is_refused(models):
    processor = MixedLogits(models[1:2], (0.5, 0.5), torch.ones(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask is of 2 prompts of 9 tokens, and generate has 3 rows of 9"):
        processor(torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, models[0].config.vocab_size))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({0: 0.5, 1: 0.2}, "must sum to 1, got 0.5 .* 0.2"),
        ({0: 0.5, 9: 0.5}, "nowhere is not a Hugging Face model folder"),
    ],
)
def test_folders_that_make_no_mixture_are_refused(folders, members, message, tmp_path):
    named = {folders[i] if i < 3 else tmp_path / "nowhere": weight for i, weight in members.items()}
    with pytest.raises(GenerationError, match=message):
        generate(named, {"a": "A"}, tmp_path / "samples.jsonl")
    assert not (tmp_path / "samples.jsonl.partial").exists()


def test_a_file_of_other_weights_is_not_continued(folders, tmp_path):
    """The header of a partial file holds the weights and the hashes of all members."""
    sampling = Sampling(samples_per_prompt=1, max_new_tokens=2)
    headers = [
        module._header(
            module.members_of(dict(zip(folders[:2], weights, strict=True))), None, {"a": "A"}, None, sampling
        )
        for weights in ((0.5, 0.5), (0.25, 0.75))
    ]
    assert json.dumps(headers[0]["model"]) != json.dumps(headers[1]["model"])
    assert headers[0]["prompts"] == headers[1]["prompts"]


def test_a_token_that_a_member_of_negative_weight_rules_out_is_ruled_out():
    """log-ratios to a model that never says a token are infinite: no mixture is left, and no row may become nan."""
    mine, theirs = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]])
    found = mixed_logits([mine, theirs], [2.0, -1.0]).softmax(-1)
    assert found.tolist() == [[0.5, 0.5, 0.0]]
