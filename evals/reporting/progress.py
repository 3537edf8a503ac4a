"""The report's figures of what was measured during training: at its beginning and at its end."""

from .records import format_value
from .run_folder import MODELS, RunFolder
from .summary import NOTHING

LOGGED = {"bits_per_byte": "validation bits per byte", "validation_loss": "loss on held-out conversations"}


def progress_lines(run: RunFolder) -> list[str]:
    """Return the curves' end points: held-out text and conversations, mean reward at the start and end."""
    lines = []
    for stage in MODELS:
        for key, name in LOGGED.items():
            steps, values = run.series(stage, key)
            if len(values) > 1:
                change = f"{values[0]:.3f} before the first step, {values[-1]:.3f} after step {steps[-1]}"
                lines.append(f"{MODELS[stage]}: {name} {change}")
    _, rewards = run.series("rl", "reward")
    if tenth := len(rewards) // 10:
        first, last = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
        lines.append(
            f"RL: mean reward {first:.3f} over the first {tenth} logged steps, {last:.3f} over the last {tenth}"
        )
    return lines


def evaluation_rows(run: RunFolder) -> list[list[str]]:
    """Return header and rows of the first and last evaluation of SFT's tasks and GRPO's held-out problems."""
    rows = [["during training", "first", "last"]]
    for stage in MODELS:
        for key in run.estimated(stage):
            steps, values = run.series(stage, key)
            errors = dict(zip(*run.series(stage, f"{key}_standard_error"), strict=True))
            cells = [
                f"{format_value({'metric': key, 'value': value, 'standard_error': errors.get(step)})} (step {step:,})"
                for step, value in zip(steps, values, strict=True)
            ]
            if cells:
                rows.append([f"{MODELS[stage]}: {key.replace('_', ' ')}", cells[0], *(cells[1:][-1:] or [NOTHING])])
    return rows
