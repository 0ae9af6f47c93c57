"""Training Senri with the Trainer of transformers."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from newllm.modules.gate import MemoryGate
from newllm.runs import Run
from newllm.training.batches import NeedleBatches
from newllm.training.config import TrainConfig
from newllm.training.groups import parameter_groups


class SenriTrainer(Trainer):
    """A Trainer that takes whole weighted batches and gives the memory's parameters their own group.

    ``train_dataset`` yields batches as ``NeedleBatches`` does. Logs go to ``run``'s ``metrics.jsonl``;
    Ctrl-C ends the training with a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: NeedleBatches,
        config: TrainConfig,
        run: Run,
        *,
        progress: bool = True,
    ) -> None:
        self.config = config
        self._interrupt = Interrupt()
        super().__init__(
            model,
            training_arguments(config, run, model),
            train_dataset=dataset,
            callbacks=[RunLog(run, model), self._interrupt, *([Progress()] if progress else [])],
        )
        if config.checkpointing:
            # Renamed in transformers 5.23; the old name goes with version 6.
            new = hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
        # The weights of a batch already say what its tokens count.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training before its last step."""
        return self._interrupt.asked and self.state.global_step < self.state.max_steps

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The dataset's own batches, in order."""
        return DataLoader(self.train_dataset, batch_size=None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over ``parameter_groups``."""
        if getattr(self, "optimizer", None) is None:
            groups = parameter_groups(
                self.model,
                self.config.lr,
                weight_decay=self.config.weight_decay,
                memory_multiplier=self.config.memory_multiplier,
                memory_layer_multiplier=self.config.memory_layer_multiplier,
            )
            self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, 0.95))
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Cross-entropy of the next token, weighted by ``loss_weight [B, T]`` and summed."""
        ids, weight = inputs["input_ids"], inputs["loss_weight"]
        outputs = model(input_ids=ids, segment_weight=inputs["segment_weight"], use_cache=False)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weight[:, 1:].flatten()).sum()
        return (loss, outputs) if return_outputs else loss


def training_arguments(config: TrainConfig, run: Run, model: nn.Module) -> TrainingArguments:
    """The settings of transformers' Trainer that ``config`` stands for."""
    return TrainingArguments(
        output_dir=str(run.out / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        logging_steps=config.log_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=3,
        seed=config.seed,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
    )


class RunLog(TrainerCallback):
    """Writes what the Trainer logs, and how far each memory's gates are open, to ``metrics.jsonl``."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        self.run, self.model = run, model

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One line per logging step."""
        gates = {
            f"gate/{name}": [round(g, 4) for g in module.openness().tolist()]
            for name, module in self.model.named_modules()
            if isinstance(module, MemoryGate)
        }
        self.run.log(step=state.global_step, **(logs or {}), **gates)


class Progress(TrainerCallback):
    """A bar with rate, time left and the latest loss."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance it."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close it."""
        self.bar.close()


class Interrupt(TrainerCallback):
    """Ctrl-C saves a checkpoint and ends the training after the step at hand; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listen; only a main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop when asked."""
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listen no more."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
