"""A log of completions as text: `runs/pocket/logs/rl.completions.txt`."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from modeling_nanochat.chat.__main__ import printable

from .rewards import Rewarding

PER_STEP = 4  # completions of each logged step, unless num_completions_to_print says otherwise
MOST_BYTES = 2**23  # then the file is renamed to `.old.txt`, so both together hold at most twice as much


class CompletionsLog(TrainerCallback):
    """Appends completions to a text file at every logged step of the main process.

    A file that cannot be written is no reason to lose the training.

    Args:
        trainer: The trainer whose completions are logged.
        path: The file.
        resumed: Append to an existing file, in which lost steps then appear twice; otherwise it is deleted.
    """

    def __init__(self, trainer: Rewarding, path: Path, resumed: bool):
        self.trainer, self.path, self.full = trainer, path, path.with_suffix(".old.txt")
        for old in () if resumed else (self.path, self.full):
            old.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write prompt, completion and rewards of some completions of the step, of different problems if possible."""
        if state.is_world_process_zero and "reward" in (logs or {}):
            graded, wanted = self.trainer.graded, args.num_completions_to_print or PER_STEP
            spread = graded[:: max(1, len(graded) // wanted)][:wanted]
            with suppress(OSError):
                self.append("".join(as_text(state.global_step, *each) for each in spread))

    def append(self, text: str) -> None:
        if self.path.exists() and self.path.stat().st_size > MOST_BYTES:
            self.path.replace(self.full)
        with open(self.path, "a", encoding="utf-8", errors="replace") as file:
            file.write(text)


def as_text(step: int, prompt: list[dict], completion: list[dict], rewards: dict[str, float]) -> str:
    """One completion, with a heading of step and rewards, and a paragraph for each message."""
    heading = ", ".join(f"{name} {reward:g}" for name, reward in rewards.items())
    lines = [line for message in [*prompt, *completion] for line in message_lines(message)]
    return f"=== step {step:,}: {heading} ===\n" + "".join(f"{printable(line)}\n" for line in lines) + "\n"


def message_lines(message: dict[str, Any]) -> list[str]:
    """`user: What is 12+7?`, `python: 12+7` for a call, `tool: 19` for its result."""
    lines = [f"{message['role']}: {message['content']}"] if message.get("content") else []
    calls = [call["function"]["arguments"] for call in message.get("tool_calls") or []]
    return lines + [f"python: {call.get('code', call) if isinstance(call, dict) else call}" for call in calls]
