"""Trainers that take one step at a time: each runs its own loop in a thread and stops after every optimizer step.

Nothing of a step is re-implemented: the loops are those of `lightning.Trainer` and `trl.DPOTrainer`, with their
loaders, hooks, clipping and optimizer calls. A callback hands control back when a step is over.
"""

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from rsa_kernels import RiskMeasure
from rsa_kernels.ops import Impl
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.step.cases import PAD, StepCase, as_text, tokenizer
from benchmarks.timing import peak_extra_bytes_within
from rsa_lightning.data.tokenize import collate
from rsa_lightning.losses import PreferenceLoss
from rsa_lightning.models import PolicySpec
from rsa_lightning.stages import RewardAlignment

BETA, CLIP, LOG_EVERY = 0.1, 1.0, 10
# the same call for every method
ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "foreach": True}

Pause = Callable[[Tensor | None], bool]  # the loss of the step that is over -> whether to take another


class Loop:
    """A training loop that takes a step when told to.

    `train(pause)` runs in a thread of its own. It calls `pause(None)` before its first step and `pause(loss)` after
    each, and ends when that returns False.
    """

    def __init__(self, name: str, train: Callable[[Pause], None]) -> None:
        self.name, self.losses = name, list[float]()
        self._train = train
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._running = True
        self._error: BaseException | None = None
        self._observe: Callable[[], Any] = contextlib.nullcontext
        self._observer = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name=name, daemon=True)
        self._thread.start()
        self._wait()  # for everything that comes before the first step

    def step(self) -> None:
        """One optimizer step; raises what the trainer raises."""
        if not self._running:
            raise RuntimeError(f"{self.name} has no step left: give it more batches")
        self._go.release()
        self._wait()

    def peak_bytes(self) -> int:
        """One more step: most bytes of tensors made in it and alive at once, gradients included.

        Weights and optimizer state are older. So are the gradients that some trainers free at the start of a step; the
        profiler does not subtract what it has not seen made.
        """
        peaks: list[int] = []
        self.observed(partial(peak_extra_bytes_within, peaks))
        return peaks[0]

    def observed(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        """One more step within a context, which is entered in the trainer's thread."""
        self._observe = context
        self.step()
        self._observe = contextlib.nullcontext

    def close(self) -> None:
        """Lets the trainer finish."""
        if self._running:
            self._running = False
            self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _pause(self, loss: Tensor | None) -> bool:
        self._observer.close()
        if loss is not None:
            self.losses.append(loss.item())
        self._done.release()
        if self._running:  # closed before its first step, a trainer takes that one before it asks whether to go on
            self._go.acquire()
        self._observer.enter_context(self._observe())
        return self._running

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # it is a property of the calling thread
        try:
            self._train(self._pause)
        except BaseException as error:  # it belongs to whoever asked for the step
            self._error = error
        finally:
            self._running = False
            self._done.release()


class PauseLightning(L.Callback):
    def __init__(self, pause: Pause) -> None:
        self.pause = pause

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause(None)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = not self.pause(outputs["loss"])


def our_loop(
    name: str, case: StepCase, folder: Path, loss: PreferenceLoss, risk: RiskMeasure, impl: Impl = "auto"
) -> Loop:
    """A stage under `lightning.Trainer`."""
    optimizer = partial(torch.optim.AdamW, lr=case.learning_rate, **ADAMW)
    stage = RewardAlignment(PolicySpec(str(folder)), loss, risk, beta=BETA, optimizer=optimizer, impl=impl)
    make_batch = partial(collate, roles=stage.roles, pad_id=PAD)
    loader: DataLoader = DataLoader(cast(Any, case.pairs), batch_size=case.batch_size, collate_fn=make_batch)

    def train(pause: Pause) -> None:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=CLIP,
            log_every_n_steps=LOG_EVERY,
            logger=CSVLogger(folder / "logs", name),
            callbacks=[PauseLightning(pause)],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(stage, loader)

    return Loop(name, train)


def trl_loop(name: str, case: StepCase, folder: Path, precomputed: bool) -> Loop:
    """`trl.DPOTrainer` on the same weights and texts, without gradient checkpointing.

    Raises:
        ValueError: its token ids are not those of the case.
    """
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

    class PauseTrainer(TrainerCallback):
        def __init__(self, pause: Pause) -> None:
            self.pause = pause

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.pause(None)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= not self.pause(trainer.last_loss)

    class DPOTrainer(trl.DPOTrainer):
        last_loss: Tensor

        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().compute_loss(*args, **kwargs)
            self.last_loss = loss.detach()
            return loss

    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        precompute_ref_log_probs=precomputed,
        beta=BETA,
        max_length=None,
        max_grad_norm=CLIP,
        num_train_epochs=1,
        per_device_train_batch_size=case.batch_size,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list([as_text(pair) for pair in case.pairs]),
        processing_class=tokenizer(case.vocabulary),
        optimizers=(torch.optim.AdamW(model.parameters(), lr=case.learning_rate, **ADAMW), None),
    )
    trainer.remove_callback(PrinterCallback)
    _check_ids(case, trainer.train_dataset)

    def train(pause: Pause) -> None:
        trainer.add_callback(PauseTrainer(pause))
        trainer.train()

    return Loop(name, train)


def _check_ids(case: StepCase, dataset: Any) -> None:
    for pair, row in zip(case.pairs, dataset, strict=True):
        if [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] != [pair.prompt, pair.chosen, pair.rejected]:
            raise ValueError(f"{pair.row_id}: TRL's token ids are not those of the case, so nothing could be compared")
