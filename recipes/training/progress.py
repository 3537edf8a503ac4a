"""How far training is and how fast: the bar, the log, the trackers, and where the time of a step goes."""

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
from transformers import PretrainedConfig

from evals.speed.device_peaks import device_peaks
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
SECONDS_BETWEEN_EVALUATIONS = 600  # that are printed; the log has all of them


@dataclass(frozen=True)
class TrainState:
    """Where a run got to."""

    steps: int = 0
    tokens: int = 0
    loss: float = math.nan
    tokens_per_second: float = 0.0
    warnings: Sequence[str] = ()  # that nothing was learnt, see `recipes/training/learning.py`

    def after(self, loss: float, tokens: int) -> "TrainState":
        return replace(self, steps=self.steps + 1, tokens=self.tokens + tokens, loss=loss)


@dataclass
class StepTimer:
    """Seconds by kind of work since the last entry of the log: data, model, optimizer, rest; evaluation, checkpoint."""

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
        """Seconds by kind, which then start at zero; the time of training steps is in `training`."""
        taken, self.seconds = self.seconds, defaultdict(float)
        training = sum(taken[kind] for kind in ("data", "model", "optimizer", "rest"))
        return {"training": training, **taken}


class GarbageFreezer:
    """Keeps Python's garbage collector from scanning a large, lasting heap in the middle of steps.

    Everything that is alive after the first step is set aside; a collection every 5,000 steps catches what leaks. The
    original measured half a second for each scan. Afterwards the collector is as it was.
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
    """One line that moves: a bar with time left on a terminal; elsewhere a plain line every half minute.

    Args:
        total: Steps of the whole run.
        done: Steps that an earlier process made.
        enabled: False on all processes but the main one.
        bar: Show the bar where there is a terminal.
    """

    def __init__(self, total: int, done: int = 0, enabled: bool = True, bar: bool = True):
        self.total, self.first, self.enabled = total, done, enabled
        self.started = self.written = time.monotonic()
        shown = None if enabled and bar else True  # None: not where it would go into a file
        self.bar = tqdm(total=total, initial=done, unit="step", disable=shown, mininterval=0.5, leave=False)

    def step(self, step: int, text: str) -> None:
        """After each step; `text` says how it went."""
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
        """Above the bar, by the main process."""
        if self.enabled:
            for line in lines:
                self.bar.write(line)
            sys.stdout.flush()  # in a file, each line when it is true

    def close(self) -> None:
        self.bar.close()


class ProgressReport:
    """The live line, the stage's log and the trackers, on the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: PretrainedConfig,
        plan: Plan,
        args: LoopArguments,
        log: JsonlLogger,
        timer: StepTimer,
        progress: TrainState,
        watch: LearningWatch,
    ):
        self.accelerator, self.plan, self.args, self.log, self.timer = accelerator, plan, args, log, timer
        self.watch, self.tracking = watch, True
        self.flops_per_token = training_flops_per_token(config, args.max_length)
        name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else ""
        self.peak_flops = device_peaks(name)[0]
        self.logged_at = progress.steps
        self.rates: list[float] = []
        self.live = LiveLine(plan.max_steps, progress.steps, accelerator.is_main_process)
        self.shown_at, self.shown_step = time.monotonic(), -1
        self.at_start: dict[str, float] = {}

    def __enter__(self) -> "ProgressReport":
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.close()

    def is_logged(self, step: int) -> bool:
        return step % self.args.logging_steps == 0 or step in (1, self.plan.max_steps)

    def step(self, progress: TrainState, schedule: Schedule, norm: float | None) -> None:
        """After each optimizer step: the bar; at intervals the log and the trackers.

        Args:
            norm: 0 only if all gradients were zero; None where nobody has looked.
        """
        found = self.watch.observe(progress.steps, loss=progress.loss, grad_norm=norm)
        self.live.write(f"warning: {line}" for line in found)
        self.live.step(progress.steps, f"loss {progress.loss:.3f}{self.speed()}")
        if not self.is_logged(progress.steps):
            return
        seconds, steps = self.timer.take(), progress.steps - self.logged_at
        self.logged_at = progress.steps
        self.rates.append(steps * self.plan.total_batch_size / max(seconds["training"], 1e-9))
        values = {
            "loss": progress.loss,
            "tokens_per_second": round(self.rates[-1]),
            "learning_rate_multiplier": schedule.learning_rate_multiplier(progress.steps - 1),
        }
        if self.peak_flops:
            values["mfu_percent"] = round(100 * self.mfu(), 2)
        per_step = {f"seconds_{kind}": round(spent / steps, 6) for kind, spent in seconds.items()}
        self.log.log(step=progress.steps, tokens=progress.tokens, **values, **per_step)
        self.track({f"train/{key}": value for key, value in values.items()}, progress.steps)

    def mfu(self) -> float:
        """Share of the devices' dense bfloat16 peak that the model's own arithmetic makes use of."""
        return self.rates[-1] * self.flops_per_token / (self.peak_flops * self.accelerator.num_processes)

    def speed(self) -> str:
        if not self.rates:
            return ""
        return f", {self.rates[-1]:,.0f} tokens/s" + (f", MFU {100 * self.mfu():.1f} %" if self.peak_flops else "")

    def evaluated(self, progress: TrainState, values: dict[str, Any], lines: list[str]) -> None:
        """Log and track an evaluation, and print its first line where `is_shown`."""
        self.log.log(step=progress.steps, tokens=progress.tokens, **values)
        numbers = {f"val/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        self.track(numbers, progress.steps)
        if progress.steps == 0:
            self.at_start |= numbers
        before = "".join(f" ({self.at_start[key]:.4f} before the first step)" for key in numbers if key in self.at_start)
        if is_verbose():
            self.live.write(f"step {progress.steps:,}: {line}" for line in lines)
        elif self.is_shown(progress.steps):
            self.live.write(f"step {progress.steps:,}: {line}{before}" for line in lines[:1])

    def is_shown(self, step: int) -> bool:
        """Whether the evaluations after `step` are printed: the last step's, in between one step's every ten minutes."""
        now = time.monotonic()
        if step == self.plan.max_steps or now - self.shown_at >= SECONDS_BETWEEN_EVALUATIONS:
            self.shown_at, self.shown_step = now, step
        return step == self.shown_step

    def track(self, values: dict[str, float], step: int) -> None:
        """Trackers raise whatever they like, at a full disk or without a network; training goes on without them."""
        try:
            if self.tracking:
                self.accelerator.log(values, step=step)
        except Exception as error:
            self.tracking = False
            self.live.write([f"warning: report_to {self.args.report_to} failed ({first_line(error)}); training goes on without it"])

    def finished(self, progress: TrainState) -> TrainState:
        """With the speed of the run, the median of the log's entries without the first (it warms up), and the warnings."""
        speed = median(self.rates[1:] or self.rates or [0.0])
        return replace(progress, tokens_per_second=speed, warnings=self.watch.warnings)
