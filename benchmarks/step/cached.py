"""A training step with the reference beside the policy, and with it on disk: the same losses, and how much sooner.

    from benchmarks.step.cached import live_and_cached
    live_and_cached(Path("/tmp/somewhere"))      # a few minutes on one core

By count of products a step beside a live reference takes 4 F + 4 h, and one with hidden states from disk 3 F + 4 h:
F a forward pass of the transformer, h a product of the head with the scored tokens (logits of both models, and the two
gradients). Log-probabilities alone save the reference's logits, too: 3 F + 3 h. The ceiling is 4/3 where the head is
small, and falls towards 1 (4/3 with log-probabilities) where it is large.
"""

import json
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rsa_kernels import KL, CVaR, RiskMeasure

from benchmarks.step.cases import _pairs, as_text, tokenizer
from benchmarks.step.loops import Loop, _PauseLightning
from benchmarks.timing import summary
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.hidden_cache import HiddenCache
from rsa_lightning.losses import DPO, RSA, TDPO, PreferenceLoss
from rsa_lightning.models import PolicySpec
from rsa_lightning.reference import FrozenCopy, Reference
from rsa_lightning.stages import RewardAlignment

METHODS: dict[str, tuple[PreferenceLoss, RiskMeasure]] = {
    "DPO": (DPO(beta=0.1), KL()),
    "TDPO (KL)": (TDPO(beta=0.1), KL()),
    "RSA (CVaR 0.97)": (RSA(beta=0.1), CVaR(0.97)),
}
WARM_UP = 3
TOLERANCE = 1e-5  # nats, of the mean loss of a step


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
    """A row for each method and reference: CPU ms of a step, times the throughput of the live one, and the ceiling.

    Steps are interleaved. CPU time, on one thread, because other processes do not count in it.

    Raises:
        ValueError: the losses of two references differ, so that nothing could be compared.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    response = tokens - prompt - 1
    lengths = ((prompt, prompt), (response, response), (response, response))
    pairs = _pairs(vocabulary, batch_size * (WARM_UP + samples + 4) * 3 // 2, lengths)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(as_text(pair)) + "\n" for pair in pairs))
    tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    config = {"model_type": "llama", **shape, "num_attention_heads": 4, "tie_word_embeddings": True}
    spec = PolicySpec(config=config, tokenizer=str(folder / "tokenizer"))
    ceilings = _ceilings(spec, vocabulary, tokens, response + 1)
    rows: list[dict[str, Any]] = []
    for name, (loss, risk) in METHODS.items():
        references: dict[str, Reference] = {"live": FrozenCopy(), "hidden": HiddenCache(str(folder / "references"))}
        if not loss.reads_risk:
            references["logps"] = HiddenCache(str(folder / "references"), keep="logps")
        loops = {kind: _loop(kind, spec, loss, risk, kept, folder, batch_size) for kind, kept in references.items()}
        rows += [
            {"method": name, "reference": kind, **found, "ceiling": round(ceilings[kind], 3)}
            for kind, found in _measured(loops, samples)
        ]
        for loop in loops.values():
            loop.close()
    return rows


def _measured(loops: dict[str, Loop], samples: int) -> Iterator[tuple[str, dict[str, float]]]:
    """CPU ms of each loop's steps, and the live one's time over it, step by step."""
    times: dict[str, list[float]] = {kind: [] for kind in loops}
    for sample in range(WARM_UP + samples):
        for kind, loop in loops.items():
            start = time.process_time()
            loop.step()
            if sample >= WARM_UP:
                times[kind].append(1e3 * (time.process_time() - start))
    for kind, loop in loops.items():
        worst = max(abs(mine - live) for mine, live in zip(loop.losses, loops["live"].losses, strict=True))
        if worst > TOLERANCE:
            raise ValueError(f"with {kind} the loss of a step differs by {worst:.2g} from that of a live reference")
        ms = summary(times[kind])
        ratio = summary([live / mine for live, mine in zip(times["live"], times[kind], strict=True)])
        figures = {"cpu_ms": ms.median, "times_live": ratio.median, "q20": ratio.low, "q80": ratio.high}
        yield kind, {key: round(value, 3) for key, value in figures.items()}


def _ceilings(spec: PolicySpec, vocabulary: int, tokens: int, scored: int) -> dict[str, float]:
    """Times live that the counts of products allow, attention included."""
    config: Any = spec.config
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    linear = layers * (4 * width**2 + 3 * width * config["intermediate_size"])
    forward = tokens * 2 * (linear + layers * 2 * tokens * width)
    head = scored * 2 * width * vocabulary
    live = 4 * forward + 4 * head
    return {"live": 1.0, "hidden": live / (3 * forward + 4 * head), "logps": live / (3 * forward + 3 * head)}


def _loop(
    name: str,
    spec: PolicySpec,
    loss: PreferenceLoss,
    risk: RiskMeasure,
    reference: Reference,
    folder: Path,
    batch_size: int,
) -> Loop:
    optimizer = partial(torch.optim.AdamW, lr=1e-4)
    stage = RewardAlignment(spec, loss=loss, risk=risk, reference=reference, optimizer=optimizer)
    where = {"tokenizer": spec.tokenizer, "cache_dir": str(folder / "tokens")}
    data = PreferenceData(str(folder / "pairs.jsonl"), batch_size=batch_size, validation_fraction=0.2, **where)  # type: ignore[arg-type]

    def train(pause: Any) -> None:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            callbacks=[_PauseLightning(pause)],
        )
        trainer.fit(stage, data)

    return Loop(name, train)
