"""A training step with the reference beside the policy, and with it on disk: the same losses, and how much sooner.

    from benchmarks.scale.cached import live_and_cached
    live_and_cached(folder)      # a few minutes on one core

By count of products a step beside a live reference takes 4 F + 4 h, and one with hidden states from disk 3 F + 4 h:
F a forward pass of the transformer, h a product of the head with the scored tokens (logits of both models, and the two
gradients). Log-probabilities alone save the reference's logits, too: 3 F + 3 h. The ceiling is 4/3 where the head is
small, and falls towards 1 (4/3 with log-probabilities) where it is large.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rsa_kernels import KL, CVaR, RiskMeasure

from benchmarks.scale.loops import StageLoop
from benchmarks.scale.turns import largest_gap, take_turns, timed
from benchmarks.step.cases import as_text, random_pairs, tokenizer
from rsa_lightning.hidden_cache import HiddenCache
from rsa_lightning.losses import DPO, RSA, TDPO, PreferenceLoss
from rsa_lightning.models import PolicySpec
from rsa_lightning.reference import FrozenCopy, Reference

METHODS: dict[str, tuple[PreferenceLoss, RiskMeasure]] = {
    "DPO": (DPO(beta=0.1), KL()),
    "TDPO (KL)": (TDPO(beta=0.1), KL()),
    "RSA (CVaR 0.97)": (RSA(beta=0.1), CVaR(0.97)),
}
WARM_UP = 3
TOLERANCE = 1e-5  # nats, of the mean loss of a step


class Disagreement(ValueError):
    """Two ways to the same loss did not come to it."""


def live_and_cached(
    folder: Path,
    *,
    hidden: int = 256,
    layers: int = 4,
    vocabulary: int = 1024,
    tokens: int = 128,
    prompt: int = 32,
    batch_size: int = 8,
    samples: int = 20,
) -> list[dict[str, Any]]:
    """A row for each method and reference: ms of a step, times the live one's speed (`x`), and the ceiling.

    Steps are interleaved, on one thread. The CPU time stands beside, because other processes do not count in it.

    Raises:
        Disagreement: the losses of two references differ, so that nothing could be compared.
    """
    torch.set_num_threads(1)
    response = tokens - prompt - 1
    lengths = ((prompt, prompt), (response, response), (response, response))
    pairs = random_pairs(vocabulary, batch_size * (WARM_UP + samples + 4) * 3 // 2, lengths)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(as_text(pair)) + "\n" for pair in pairs))
    tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    config = {"model_type": "llama", **shape, "num_attention_heads": 4, "tie_word_embeddings": True}
    spec = PolicySpec(config=config, tokenizer=str(folder / "tokenizer"))
    ceilings = _ceilings(spec, vocabulary, tokens, response + 1)
    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        references: dict[str, Reference] = {"live": FrozenCopy(), "hidden": HiddenCache(str(folder / "references"))}
        if not method[0].reads_risk:
            references["logps"] = HiddenCache(str(folder / "references"), keep="logps")
        loops = {kind: StageLoop(kind, spec, method, kept, folder, batch_size, {}) for kind, kept in references.items()}
        rows += [
            {"method": name, "reference": kind, **found, "ceiling": round(ceilings[kind], 3)}
            for kind, found in measured(loops, samples).items()
        ]
        for loop in loops.values():
            loop.close()
    return rows


def measured(loops: Mapping[str, Any], samples: int) -> dict[str, dict[str, float]]:
    """Times of each loop's steps, and the live one's over them, step by step."""
    times = take_turns({kind: lambda loop=loop: timed(loop.step) for kind, loop in loops.items()}, samples, WARM_UP)  # type: ignore[misc]
    for kind, loop in loops.items():
        worst = largest_gap(torch.tensor(loop.losses), torch.tensor(loops["live"].losses))
        if worst > TOLERANCE:
            raise Disagreement(f"with {kind} the loss of a step differs by {worst:.2g} from that of a live reference")
    return {kind: found.figures(times["live"]) for kind, found in times.items()}


def _ceilings(spec: PolicySpec, vocabulary: int, tokens: int, scored: int) -> dict[str, float]:
    """Times live that the counts of products allow, attention included."""
    config: Any = spec.config
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    linear = layers * (4 * width**2 + 3 * width * config["intermediate_size"])
    forward = tokens * 2 * (linear + layers * 2 * tokens * width)
    head = scored * 2 * width * vocabulary
    live = 4 * forward + 4 * head
    return {"live": 1.0, "hidden": live / (3 * forward + 4 * head), "logps": live / (3 * forward + 3 * head)}
