"""Training progress and speed: the bar, the log, the trackers, and the time spent per kind of work."""

import gc
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from evals.speed.device_peaks import device_peaks
from modeling_nanochat import NanoChatConfig
from modeling_nanochat.cli import is_verbose
from modeling_nanochat.sizes import training_flops_per_token
from modeling_nanochat.text.sources import first_line
from recipes.training.optim.hyperparameters import Plan
from recipes.training.optim.schedule import Schedule

from .arguments import LoopArguments
from .learning import LearningWatch
from .stage import JsonlLogger

GARBAGE_STEPS = 5000
SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_EVALUATIONS = 600  # between printed evaluations; the log has all of them


@dataclass
class TrainState:
    """The progress of a run: steps, tokens, last loss."""

    steps: int = 0
    tokens: int = 0
    loss: float = math.nan
    tokens_per_second: float = 0.0
    warnings: Sequence[str] = ()  # signs of failed training, see `recipes/training/learning.py`

    def add_step(self, loss: float, tokens: int) -> None:
        self.steps, self.tokens, self.loss = self.steps + 1, self.tokens + tokens, loss

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; speed and warnings are measured anew."""
        return {"steps": self.steps, "tokens": self.tokens, "loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.tokens, self.loss = state["steps"], state["tokens"], state["loss"]


@dataclass
class StepTimer:
    """Seconds by kind of work since the last log entry: data, model, optimizer, rest; evaluation, checkpoint."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0
    last: float = 0.0

    def start(self) -> None:
        self.last = time.perf_counter()

    def lap(self, kind: str) -> None:
        now = time.perf_counter()
        self.seconds[kind] += now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        """Return the seconds by kind and reset them; `training` is the total of the training steps."""
        taken, self.seconds = self.seconds, defaultdict(float)
        training = sum(taken[kind] for kind in ("data", "model", "optimizer", "rest"))
        return {"training": training, **taken}


class GarbageFreezer:
    """Keeps Python's garbage collector from scanning a large, long-lived heap during steps.

    Freezes every object that is alive after the first step, and collects every 5,000 steps to catch leaks. The
    original measured half a second per scan. On exit the collector's state is restored.
    """

    def __enter__(self) -> "GarbageFreezer":
        self.first = True
        self.was_enabled = gc.isenabled()
        return self

    def after_step(self, step: int) -> None:
        if self.first:
            self.first = False
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % GARBAGE_STEPS == 0:
            gc.collect()

    def __exit__(self, *exception: object) -> None:
        gc.unfreeze()
        if self.was_enabled:
            gc.enable()


class LiveLine:
    """A progress bar with time left on a terminal; elsewhere a plain line every 30 seconds.

    Args:
        total: Steps of the run.
        done: Steps that an earlier process completed.
        enabled: False on all processes but the main one.
        bar: Show the bar on a terminal.
    """

    def __init__(self, total: int, done: int = 0, enabled: bool = True, bar: bool = True):
        self.total, self.first, self.enabled = total, done, enabled
        self.started = self.written = time.monotonic()
        shown = None if enabled and bar else True  # None: tqdm shows it only on a terminal
        self.bar = tqdm(total=total, initial=done, unit="step", disable=shown, mininterval=0.5, leave=False)

    def step(self, step: int, text: str) -> None:
        """Update after each step; `text` describes its result."""
        self.bar.update()
        self.bar.set_postfix_str(text, refresh=False)
        if line := self.plain_line(step):
            self.write([f"{line}, {text}" if text else line])

    def plain_line(self, step: int) -> str | None:
        """`step 120 of 400, 01:20 left`; None on a terminal, and while the last line is recent."""
        now = time.monotonic()
        if sys.stderr.isatty() or now - self.written < SECONDS_BETWEEN_LINES:
            return None
        self.written = now
        left = (now - self.started) / (step - self.first) * (self.total - step)
        return f"step {step:,} of {self.total:,}, {tqdm.format_interval(left)} left"

    def write(self, lines: Iterable[str]) -> None:
        """Print lines above the bar, on the main process."""
        if self.enabled:
            for line in lines:
                self.bar.write(line)
            sys.stdout.flush()  # redirected to a file, lines appear at once

    def close(self) -> None:
        self.bar.close()


class ProgressReport:
    """The live line, the stage's log and the trackers, on the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: NanoChatConfig,
        plan: Plan,
        args: LoopArguments,
        log: JsonlLogger,
        timer: StepTimer,
        train_state: TrainState,
        watch: LearningWatch,
    ):
        self.accelerator, self.plan, self.args, self.log, self.timer = accelerator, plan, args, log, timer
        self.watch, self.tracking = watch, True
        self.flops_per_token = training_flops_per_token(config, args.max_length)
        name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else ""
        self.peak_flops = device_peaks(name)[0]
        self.logged_at = train_state.steps
        self.rates: list[float] = []
        self.live = LiveLine(plan.max_steps, train_state.steps, accelerator.is_main_process)
        self.shown_at, self.shown_step = time.monotonic(), -1
        self.at_start: dict[str, float] = {}

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.close()

    def is_logged(self, step: int) -> bool:
        return step % self.args.logging_steps == 0 or step in (1, self.plan.max_steps)

    def step(self, train_state: TrainState, schedule: Schedule, norm: float | None) -> None:
        """Update the bar after each optimizer step, and at intervals the log and the trackers.

        Args:
            norm: 0 only if all gradients were zero; None if it was not computed.
        """
        found = self.watch.observe(train_state.steps, loss=train_state.loss, grad_norm=norm)
        self.live.write(f"warning: {line}" for line in found)
        self.live.step(train_state.steps, f"loss {train_state.loss:.3f}{self.speed()}")
        if not self.is_logged(train_state.steps):
            return
        seconds, steps = self.timer.take(), train_state.steps - self.logged_at
        self.logged_at = train_state.steps
        self.rates.append(steps * self.plan.total_batch_size / max(seconds["training"], 1e-9))
        values = {
            "loss": train_state.loss,
            "tokens_per_second": round(self.rates[-1]),
            "learning_rate_multiplier": schedule.learning_rate_multiplier(train_state.steps - 1),
        }
        if self.peak_flops:
            values["mfu_percent"] = round(100 * self.mfu(), 2)
        per_step = {f"seconds_{kind}": round(spent / steps, 6) for kind, spent in seconds.items()}
        self.log.log(step=train_state.steps, tokens=train_state.tokens, **values, **per_step)
        self.track({f"train/{key}": value for key, value in values.items()}, train_state.steps)

    def mfu(self) -> float:
        """Model FLOPs utilization: the share of the devices' dense bfloat16 peak that the model's FLOPs use."""
        return self.rates[-1] * self.flops_per_token / (self.peak_flops * self.accelerator.num_processes)

    def speed(self) -> str:
        if not self.rates:
            return ""
        return f", {self.rates[-1]:,.0f} tokens/s" + (f", MFU {100 * self.mfu():.1f} %" if self.peak_flops else "")

    def evaluated(self, train_state: TrainState, values: dict[str, Any], lines: list[str]) -> None:
        """Log and track an evaluation, and print its first line where `is_shown`."""
        self.log.log(step=train_state.steps, tokens=train_state.tokens, **values)
        numbers = {f"val/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        self.track(numbers, train_state.steps)
        if train_state.steps == 0:
            self.at_start |= numbers
        known = [key for key in numbers if key in self.at_start]
        before = "".join(f" ({self.at_start[key]:.4f} before the first step)" for key in known)
        if is_verbose():
            self.live.write(f"step {train_state.steps:,}: {line}" for line in lines)
        elif self.is_shown(train_state.steps):
            self.live.write(f"step {train_state.steps:,}: {line}{before}" for line in lines[:1])

    def is_shown(self, step: int) -> bool:
        """Whether the evaluations after `step` are printed: at the last step, before it once every ten minutes."""
        now = time.monotonic()
        if step == self.plan.max_steps or now - self.shown_at >= SECONDS_BETWEEN_EVALUATIONS:
            self.shown_at, self.shown_step = now, step
        return step == self.shown_step

    def track(self, values: dict[str, float], step: int) -> None:
        """Send values to the trackers; after any error (no network, full disk) training goes on without them."""
        try:
            if self.tracking:
                self.accelerator.log(values, step=step)
        except Exception as error:
            self.tracking = False
            failed = f"report_to {self.args.report_to} failed ({first_line(error)})"
            self.live.write([f"warning: {failed}; training goes on without it"])

    def finished(self, train_state: TrainState) -> TrainState:
        """Add the warnings and the run's speed: the median of the log entries except the first (warm-up)."""
        speed = median(self.rates[1:] or self.rates or [0.0])
        return replace(train_state, tokens_per_second=speed, warnings=self.watch.warnings)
