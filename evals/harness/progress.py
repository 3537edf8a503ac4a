"""A progress bar for an evaluation; without a terminal, a plain line at intervals."""

import sys
import time

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30


class EvaluationProgress:
    """Count the prompts of all tasks, and show the current task and the time left.

    Args:
        total: Number of prompts of all tasks together.
        quiet: Show nothing, as in all processes but the first.
    """

    def __init__(self, total: int, quiet: bool = False):
        self.done, self.total, self.task = 0, total, ""
        self.started = self.written = time.monotonic()
        self.quiet = quiet
        self.bar = tqdm(total=total, unit="prompt", leave=False, disable=quiet or None)  # None: only on a terminal

    def __enter__(self) -> "EvaluationProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def start(self, task: str) -> None:
        self.task = task
        self.bar.set_description(task)

    def update(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and not self.quiet and now - self.written >= SECONDS_BETWEEN_LINES:
            self.written = now
            left = (now - self.started) / self.done * (self.total - self.done)
            line = f"{self.task}: {self.done:,} of {self.total:,} prompts, {tqdm.format_interval(left)} left"
            print(line, file=sys.stderr, flush=True)
