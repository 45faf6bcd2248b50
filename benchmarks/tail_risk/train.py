"""The models of one seed: each trained once, by our own stages, into a folder that appears whole or not at all."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.tail_risk.measure import Reader, draw_costs
from benchmarks.tail_risk.methods import BETA, LEARNERS, TAIL, THRESHOLD, Model, Scale
from benchmarks.tail_risk.prompts import split_prompts
from rsa_lightning import stories
from rsa_lightning.checkpoint import write_json, write_text
from rsa_lightning.data.datamodule import PreferenceData
from rsa_lightning.merge import merge_models
from rsa_lightning.models import PolicySpec
from rsa_lightning.optim import Schedule
from rsa_lightning.policy_stage import PolicyStage
from rsa_lightning.saving import save_policy
from rsa_lightning.stages import RewardAlignment, SafetyAlignment
from rsa_lightning.supervised import SupervisedWarmup
from rsa_lightning.tail_dual import threshold_at
from rsa_lightning.transforms import CostTransform, Hinge, Indicator, MeanCost

LENGTHS = {"max_length": 96, "max_prompt_length": 32}


class Workshop:
    """One seed's folder: data, tokenizer, prepared tokens, and a folder per model with `training.json` inside."""

    def __init__(self, folder: Path, seed: int, scale: Scale) -> None:
        self.folder, self.seed, self.scale = folder, seed, scale
        self.prompts = split_prompts()

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def record(self, name: str) -> Path:
        return self.folder / "models" / f"{name}.json"

    def make(self, model: Model) -> dict[str, Any]:
        """Trains or merges a model unless that is done; what there is to say about it."""
        if not self.record(model.name).exists():
            self.model(model.name).parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            told = self._merge(model) if model.kind == "merge" else self._train(model)
            write_json(self.record(model.name), {**told, "seconds": round(time.perf_counter() - start, 2)})
        return json.loads(self.record(model.name).read_text())

    # ---------------------------------------------------------------------------------------------------- data

    def _file(self, name: str, split: str) -> Path:
        """Rows of demonstrations, helpful or safety pairs, made by the seed."""
        path = self.folder / "data" / f"{name}_{split}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            prompts = self.prompts["training" if split == "training" else "validation"]
            count = {"demonstrations": self.scale.demonstrations}.get(name, self.scale.pairs)
            count = count if split == "training" else len(prompts)  # the data module wants some; nothing reads them
            if name == "demonstrations":
                rows: list[Any] = stories.sample_demonstrations(prompts, count, self.seed)
            else:
                rows = stories.sample_pairs(prompts, "helpful" if name == "helpful" else "safety", count, self.seed)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    def data(self, name: str, **options: Any) -> PreferenceData:
        return PreferenceData(
            path=str(self._file(name, "training")),
            validation_path=str(self._file(name, "validation")),
            batch_size=self.scale.batch_size,
            defects={"duplicate": "keep"},  # type: ignore[arg-type]  # two equal answers are two draws of a law
            seed=self.seed,
            cache_dir=str(self.folder / "cache"),
            **LENGTHS,  # type: ignore[arg-type]
            **options,
        )

    # ------------------------------------------------------------------------------------------------ training

    def _train(self, model: Model) -> dict[str, Any]:
        if model.kind == "warmup":
            data = self.data("demonstrations", format="demonstration", tokenizer_vocab_size=self.scale.vocabulary)
            data.prepare()
            tokenizer = self.folder / "tokenizer"
            data.tokenizer.save_pretrained(tokenizer)
            stage = self._warmup(tokenizer)
        else:
            data = self.data("helpful" if model.kind == "reward" else "safety")
            stage = self._alignment(model)
        return self._fit(stage, data, model)

    def _warmup(self, tokenizer: Path) -> PolicyStage:
        config = {
            "model_type": "llama",
            "hidden_size": self.scale.hidden_size,
            "intermediate_size": self.scale.hidden_size * 11 // 4,
            "num_hidden_layers": self.scale.layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
        spec = PolicySpec(config=config, tokenizer=str(tokenizer), seed=self.seed)
        return SupervisedWarmup(spec, _adamw(self.scale.warmup_learning_rate), Schedule("cosine", 0.05))

    def _alignment(self, model: Model) -> PolicyStage:
        """The stage of a model: temperatures β, then β/λ, the same optimizer and schedule for all."""
        loss, risk = LEARNERS[model.learner]
        options: dict[str, Any] = {
            "policy": PolicySpec(model=str(self.model(str(model.start)))),
            "loss": loss,
            "risk": risk,
            "beta": BETA,
            "optimizer": _adamw(self.scale.learning_rate),
            "schedule": Schedule("cosine", 0.05),
        }
        if model.kind == "reward":
            return RewardAlignment(**options)
        return SafetyAlignment(**options, lam=model.value, cost_transform=self.transform(model))

    def transform(self, model: Model) -> CostTransform | None:
        """What the labels of a safety step are made of; None: the order of the pairs."""
        if model.labels == "order":
            return None
        if model.labels == "mean":
            return MeanCost()
        if model.labels == "indicator":
            return Indicator(THRESHOLD)
        assert model.value is not None
        costs, prompts = self._reward_model_costs(str(model.start))
        return Hinge(eta=threshold_at(costs, prompts, model.value, TAIL, BETA).eta, tail=TAIL)

    def _reward_model_costs(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Costs of sampled answers of the reward model to the training prompts, and the prompts' numbers."""
        path = self.folder / f"costs_of_{name}.json"
        if not path.exists():
            reader = Reader(self.model(name))
            costs, prompts = draw_costs(reader, self.prompts["training"], self.scale.threshold_answers, self.seed)
            write_json(path, {"costs": costs, "prompts": prompts})
        found = json.loads(path.read_text())
        return torch.tensor(found["costs"], dtype=torch.float64), torch.tensor(found["prompts"])

    def _fit(self, stage: PolicyStage, data: PreferenceData, model: Model) -> dict[str, Any]:
        L.seed_everything(self.seed, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=self.scale.warmup_epochs if model.kind == "warmup" else 1,
            gradient_clip_val=100.0 if model.kind == "warmup" else 1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=self.folder,
        )
        trainer.fit(stage, datamodule=data)
        assert stage.policy is not None
        save_policy(stage.policy, data.tokenizer, self.model(model.name))
        told: dict[str, Any] = {
            "steps": trainer.global_step,
            "parameters": sum(parameter.numel() for parameter in stage.policy.parameters()),
        }
        if isinstance(stage, (RewardAlignment, SafetyAlignment)):
            told["temperature"] = stage.loss.beta
        labels = getattr(stage, "labels", None)
        return told if labels is None else {**told, "labels": repr(labels.transform), "label_scale": labels.scale}

    def _merge(self, model: Model) -> dict[str, Any]:
        """(1 − q) × the reward model + q × the safe model, weight by weight."""
        assert model.value is not None
        reward, safe = self.model(str(model.start)), self.model(str(model.other))
        members: dict[str | Path, float] = {reward: 1 - model.value, safe: model.value}
        merge_models(members, self.model(model.name))
        return {"steps": 0}


def _adamw(learning_rate: float) -> Any:
    return partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0)
