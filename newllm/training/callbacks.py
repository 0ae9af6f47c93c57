"""What happens between the steps of a training: logs, a bar, signals, clipping."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, TextIO

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from newllm.modules.gate import MemoryGate, gate_histogram
from newllm.runs import Run
from newllm.training.config import TrainConfig
from newllm.training.schedules import clip_norm


class Throughput:
    """Tokens read since the training began, on all devices, and how fast."""

    def __init__(self) -> None:
        self.tokens = 0
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Start the clock."""
        self.tokens, self._began = 0, time.perf_counter()

    def rate(self) -> float:
        """Tokens per second since :meth:`begin`."""
        return self.tokens / max(1e-9, time.perf_counter() - self._began)


class RunLog(TrainerCallback):
    """Writes what the Trainer logs, and how far the memories' gates are open, to ``metrics.jsonl``."""

    def __init__(self, run: Run, model: nn.Module, throughput: Throughput) -> None:
        self.run, self.model, self.throughput = run, model, throughput

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One line per logging step."""
        if not state.is_world_process_zero:
            return
        logs = {name: value for name, value in (logs or {}).items() if name not in ("epoch", "total_flos")}
        gates: dict[str, Any] = {
            f"gate/{name}": [round(g, 4) for g in module.openness().tolist()]
            for name, module in self.model.named_modules()
            if isinstance(module, MemoryGate)
        }
        if gates:
            gates["gate_histogram"] = gate_histogram(self.model)
        if "loss" in logs:
            logs["tokens_per_second"] = round(self.throughput.rate(), 1)
        self.run.log(step=state.global_step, **logs, **gates)


class Finite(TrainerCallback):
    """Ends a training whose loss is no finite number any more, for then its weights are none either.

    Raises RuntimeError with the steps where it happened. In float16, steps of too large gradients are left
    out by the scaler, so a single loss says nothing there.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Look at the mean loss since the last look."""
        loss = (logs or {}).get("loss", 0.0)
        if math.isfinite(loss) or args.fp16:
            return
        good = [row["step"] for row in state.log_history if math.isfinite(row.get("loss", math.nan))]
        last = max(good, default=0)
        raise RuntimeError(
            f"the loss was {loss} within steps {last + 1} to {state.global_step}, and the weights are lost; "
            f"--resume goes on from a checkpoint before step {last} once later ones are removed, and a lower "
            "train.lr may help"
        )


class _Lines:
    """One line below the other: in a log file nothing is overwritten."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self.file.write(f"{line}\n")

    def flush(self) -> None:
        self.file.flush()


class Progress(TrainerCallback):
    """A bar with tokens per second, time left and the latest losses; in a log a line every ten seconds."""

    LOG_SECONDS = 10.0

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar."""
        where = {} if sys.stderr.isatty() else {"file": _Lines(sys.stderr), "mininterval": self.LOG_SECONDS}
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step",
            disable=not state.is_local_process_zero, **where,
        )  # fmt: skip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance it."""
        self.bar.set_postfix({**self.shown, "tokens/s": f"{self.throughput.rate():,.0f}"}, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the losses."""
        names = {"loss": "loss", "eval_loss": "validation"}
        self.shown |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close it."""
        self.bar.close()


class Clipping(TrainerCallback):
    """Sets the norm that gradients are clipped to, step by step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look it up."""
        progress = state.global_step / self.config.steps
        args.max_grad_norm = clip_norm(progress, self.config.clip_schedule, self.config.max_grad_norm)


class Interrupt(TrainerCallback):
    """Ctrl-C or SIGTERM saves a checkpoint and ends the training after the step at hand.

    The same signal a second time does what it always does.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listen; only a main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        signal.signal(number, self._before[number])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
