"""Training Senri and any causal model of transformers, with the Trainer of transformers."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from newllm.data.streams import Batch
from newllm.files import reading, writing
from newllm.runs import Run
from newllm.training.arguments import training_arguments
from newllm.training.best import best_evaluation, stale_evaluations
from newllm.training.callbacks import Clipping, Finite, Interrupt, Progress, RunLog, Throughput
from newllm.training.carry import CarriedStates
from newllm.training.checkpoints import Checkpoints, replace_folder, step_of
from newllm.training.config import TrainConfig
from newllm.training.feed import AtStart, Batches, Feed, Place, loader
from newllm.training.groups import freeze_features, outside_memory, parameter_groups
from newllm.training.losses import batch_loss, counts, metrics
from newllm.training.schedules import staged_factor
from newllm.training.slicing import Slicing


class LanguageTrainer(Trainer):
    """A Trainer that takes batches by number and loses nothing.

    Optimiser step s of p processes with accumulation a reads the batches from s * a * p on, in turns, so that
    p processes do what one with p times the accumulation does. Logs go to ``run``'s ``metrics.jsonl``,
    checkpoints to its ``checkpoints/``, the best weights by ``validation`` to its ``best/``. Ctrl-C and
    SIGTERM end the training with a checkpoint.

    Args:
        model: any causal language model of transformers.
        dataset: batches to learn from.
        config: how.
        run: the folder of the run.
        validation: batches to judge by, and how many of them.
        tokenizer: saved beside weights.
        carry: the state goes from batch to batch, as the batches' ``reset`` says.
        progress: show a bar.

    Raises:
        ValueError: for what this machine or model cannot do, and looks at validation that is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Batches,
        config: TrainConfig,
        run: Run,
        *,
        validation: tuple[Batches, int] | None = None,
        tokenizer: Any = None,
        carry: bool = False,
        progress: bool = True,
    ) -> None:
        if config.lr is None:
            raise ValueError("train.lr must be a number here, got null")
        if config.eval_steps and validation is None:
            raise ValueError(f"train.eval_steps must be 0 without validation, got {config.eval_steps}")
        self.config, self.run, self.validation = config, run, validation
        self.checkpoints = Checkpoints(run.out / "checkpoints", config.keep)
        self._interrupt, self._throughput = Interrupt(), Throughput()
        self._carried = CarriedStates(model.config) if carry else None
        self._frozen = outside_memory(model) if config.memory_first else []
        if config.freeze_features:
            freeze_features(model)
        self._micro = 0
        self._resumed: Path | None = None
        super().__init__(
            model,
            training_arguments(config, run, model, evaluates=validation is not None),
            train_dataset=Feed(dataset, config.steps * config.accumulation, self._place),
            eval_dataset=None if validation is None else Feed(*validation, self._place),
            processing_class=tokenizer,
            callbacks=[
                AtStart(self._take_up),
                RunLog(run, model, self._throughput),
                Finite(),
                self._interrupt,
                Clipping(config),
                *([Progress(self._throughput)] if progress else []),
            ],
        )
        self._slicing = None
        if config.sequence_ranks > 1:
            ranks, device = config.sequence_ranks, self.args.device.type
            self._slicing = Slicing(model, ranks, self.args.world_size, device, carry=carry)
        if config.checkpointing:
            # Renamed in transformers 5.23; the old name goes with version 6.
            new = hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
        # A batch says itself what its tokens count.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    def _place(self) -> Place:
        read = self.state.global_step * self.config.accumulation
        return Place(read, self._reader, self._readers)

    @property
    def _reader(self) -> int:
        """The number of this process among those that read different batches."""
        return self.args.process_index // self.config.sequence_ranks

    @property
    def _readers(self) -> int:
        return self.args.world_size // self.config.sequence_ranks

    @property
    def interrupted(self) -> int | None:
        """The signal that ended the training before its last step, None if none did."""
        return self._interrupt.asked if self.state.global_step < self.state.max_steps else None

    @property
    def micro_batches(self) -> int:
        """Batches of one optimiser step over all processes."""
        return self.config.accumulation * self._readers

    def fit(self, *, resume: bool = False) -> list[str]:
        """Train, from the newest intact checkpoint if there is one and ``resume`` asks for it.

        The last weights go to ``last/``; afterwards the model has its best ones, if it was judged. Returns a
        sentence for each checkpoint that was damaged.

        Raises:
            OSError: where a checkpoint cannot be written, with its path.
        """
        newest, complaints = self.checkpoints.newest() if resume else (None, [])
        if resume and self.args.should_save:
            self.run.rewind(0 if newest is None else step_of(newest))
        self._resumed = newest
        if newest is not None and self._was_done(newest):
            self._load_from_checkpoint(str(newest))
        else:
            # DDP's buckets would cut a compiled model into a dozen graphs, to send gradients a bit earlier.
            whole = torch._dynamo.config.patch(optimize_ddp=False) if self.config.compile else nullcontext()
            with whole:
                self.train(resume_from_checkpoint=None if newest is None else str(newest))
        if self.interrupted is not None:
            return complaints
        self.save_whole("last")
        best = self.run.out / "best"
        if best_evaluation(self.state.log_history) and best.is_dir():
            self._load_from_checkpoint(str(best))
        return complaints

    def _was_done(self, checkpoint: Path) -> bool:
        """Whether nothing was left to do at ``checkpoint``, whose state is then taken up."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.config.steps and not self._is_stale(state):
            return False
        self.state = state
        return True

    def _is_stale(self, state: TrainerState) -> bool:
        patience = self.config.patience
        return (
            patience is not None and stale_evaluations(state.log_history, self.config.min_delta) >= patience
        )

    # What is read

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The dataset's own batches, from where the training stands."""
        return loader(self.train_dataset, ahead=self.args.device.type == "cuda")

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> Any:
        """Cross-entropy of the next token, as the batch weighs it."""
        self._throughput.tokens += inputs["input_ids"].numel() * self._readers
        chosen = (self._micro * self._readers + self._reader) % self.micro_batches
        self._micro += 1
        inputs = self._own(inputs)
        outputs = model(**self._model_inputs(inputs, self._carried, chosen))
        loss = batch_loss(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss

    def _own(self, inputs: Batch) -> Batch:
        return inputs if self._slicing is None else self._slicing.own(inputs)

    @staticmethod
    def _model_inputs(inputs: Batch, carried: CarriedStates | None, chosen: int) -> dict[str, Any]:
        names = ("input_ids", "attention_mask", "segment_weight")
        kept: dict[str, Any] = {name: inputs[name] for name in names if name in inputs}
        if carried is None:
            return {**kept, "use_cache": False}
        return {**kept, "past_key_values": carried.enter(chosen, inputs["reset"]), "use_cache": True}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch forward and backward; frozen parameters keep no gradient."""
        loss = super().training_step(*args, **kwargs)
        if self._carried is not None:
            self._carried.leave()
        if self.state.global_step < self.config.memory_first:
            for parameter in self._frozen:
                parameter.grad = None
        return loss

    # How it learns

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over ``parameter_groups``."""
        if getattr(self, "optimizer", None) is None:
            assert self.config.lr is not None
            groups = parameter_groups(
                self.model,
                self.config.lr,
                weight_decay=self.config.weight_decay,
                memory_multiplier=self.config.memory_multiplier,
                memory_layer_multiplier=self.config.memory_layer_multiplier,
            )
            self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, 0.95))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rates of ``staged_factor``."""
        config, peak = self.config, self.config.lr
        if getattr(self, "lr_scheduler", None) is None:
            assert peak is not None
            first = peak if config.memory_first_lr is None else config.memory_first_lr
            self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: staged_factor(
                    step,
                    steps=config.steps,
                    warmup=config.warmup_steps,
                    shape=config.schedule,
                    first=config.memory_first,
                    first_factor=first / peak,
                ),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # How it is judged

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss, perplexity and accuracy over the validation batches; the best weights go to ``best/``.

        Ends the training when nothing has improved for ``patience`` looks.
        """
        assert self.validation is not None
        found = {f"eval_{name}": value for name, value in self.judge().items()}
        before = best_evaluation(self.state.log_history)
        self.log(found)
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        self.control: TrainerControl = control
        if not self.is_in_train:
            return found
        if before is None or found["eval_loss"] < before[1]:
            self.save_whole("best")
        if self._is_stale(self.state):
            self.control.should_training_stop = True
        return found

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """What :meth:`evaluate` measures, without any of its consequences."""
        assert self.validation is not None
        batches, count = self.validation
        model, training = self.model, self.model.training
        model.eval()
        carried = CarriedStates(model.config) if self._carried is not None else None
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        rounds = math.ceil(count / self._readers)
        for index in range(self._reader, rounds * self._readers, self._readers):
            # Processes that share a model's weights must all ask for them: who has no batch left reads along.
            inputs = self._own(self._prepare_inputs(batches.batch(min(index, count - 1))))
            with self.compute_loss_context_manager():
                logits = model(**self._model_inputs(inputs, carried, index % self.micro_batches)).logits
            if index < count:
                sums += counts(logits, inputs)
        model.train(training)
        return metrics(self.accelerator.reduce(sums, "sum"))

    # What is kept

    def save_whole(self, name: str) -> None:
        """Write weights, configuration and tokenizer to the run's folder ``name``, all at once."""
        target = self.run.out / name
        temporary = target.with_name(f".{name}-saving")
        with writing(target, "the model folder"):
            if self.args.should_save:
                # What a killed process left there must not become part of this model.
                shutil.rmtree(temporary, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.save_model(str(temporary), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                replace_folder(temporary, target)
            self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, staging = self.state.global_step, self.checkpoints.staging
        if self.args.should_save:
            self.checkpoints.clear_staging()
        self.accelerator.wait_for_everyone()
        try:
            with writing(self.checkpoints.path(step), "the checkpoint"):
                super()._save_checkpoint(model, trial)
                torch.save(self._own_state(), staging / f"checkpoint-{step}" / self._own_name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.checkpoints.commit(step)
        finally:
            if self.args.should_save:
                self.checkpoints.clear_staging()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.staging)

    @property
    def _own_name(self) -> str:
        return f"stream-{self.args.process_index}.pt"

    def _own_state(self) -> dict[str, Any]:
        """What the Trainer does not keep: carried states, and the losses since the last log line."""
        return {
            "carried": None if self._carried is None else self._carried.state_dict(),
            "loss": self._tr_loss.detach().clone(),
            "last_logged": self._globalstep_last_logged,
        }

    def _take_up(self) -> None:
        """Begin the clock, and go on from the checkpoint's own state if the training resumes."""
        self._throughput.begin()
        self._micro = self.state.global_step * self.config.accumulation
        folder = self._resumed
        if folder is None or not (folder / self._own_name).is_file():
            return
        with reading("the checkpoint", folder):
            own = torch.load(folder / self._own_name, map_location="cpu", weights_only=True)
            if self._carried is not None:
                self._carried.load_state_dict(own["carried"], self.args.device)
            self._tr_loss += own["loss"].to(self._tr_loss.device)
            self._globalstep_last_logged = own["last_logged"]

    def asked_to_stop(self) -> bool:
        """Whether any process got a signal."""
        asked = self._interrupt.asked is not None
        if self.args.world_size == 1:
            return asked
        flag = torch.tensor(int(asked), device=self.args.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.asked_to_stop() and not self.control.should_training_stop:
            self._interrupt.asked = self._interrupt.asked or Interrupt.SIGNALS[0]
            self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
