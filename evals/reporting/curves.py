"""The report's pictures: logged values over steps, one panel per stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run_folder import RunFolder

# Okabe and Ito's palette, distinguishable with all types of colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "nanochat",  # the same run gives the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Panel:
    """One curve; `smooth` draws the values thin and their running mean thick."""

    title: str
    label: str
    steps: Sequence[int]
    values: Sequence[float]
    smooth: bool = False


def draw_curves(run: RunFolder, folder: Path) -> dict[str, str]:
    """Write the pictures that the logs have data for into `folder`; return name -> file name."""
    panels = {
        "loss": [
            Panel("Pretraining", "loss (nats per token)", *run.series("base", "loss")),
            Panel("Midtraining", "loss (nats per token)", *run.series("mid", "loss")),
            Panel("SFT, assistant tokens", "loss (nats per token)", *run.series("sft", "loss")),
        ],
        "bits_per_byte": [
            Panel("Pretraining, held-out text", "bits per byte", *run.series("base", "bits_per_byte")),
            Panel("Midtraining, held-out conversations", "bits per byte", *run.series("mid", "bits_per_byte")),
        ],
        "reward": [
            Panel("GRPO, reward", "mean reward", *run.series("rl", "reward"), smooth=True),
            Panel(
                "GRPO, use of the tool", "calls per reply", *run.series("rl", "tool_calls_per_completion"), smooth=True
            ),
        ],
    }
    drawn = {}
    for name, candidates in panels.items():
        if filled := [panel for panel in candidates if panel.steps]:
            folder.mkdir(parents=True, exist_ok=True)
            draw_panels(filled, folder / f"{name}.svg")
            drawn[name] = f"{name}.svg"
    return drawn


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels side by side; if all have the same label, they share the y axis, so that stages can be compared."""
    shared = len({panel.label for panel in panels}) == 1
    with matplotlib.rc_context(STYLE):
        width = 3.4 * max(2, len(panels))
        figure = Figure(figsize=(width, 3.1))
        axes = figure.subplots(1, len(panels), sharey=shared, squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            draw_panel(axis, panel)
            axis.tick_params(labelleft=True)
        for axis, panel in zip(axes[0], panels, strict=True):  # after all curves, otherwise the first sets the scale
            highest = max(max(p.values) for p in (panels if shared else [panel]))
            axis.set_ylim(0, 1.05 * highest or 1)  # 1 if all values are 0, as without any reward
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def draw_panel(axis: Axes, panel: Panel) -> None:
    values = panel.values
    if panel.smooth and len(values) > 4:
        window = max(2, len(values) // 10)
        axis.plot(panel.steps, values, color=GREY, linewidth=0.9, label="as logged")
        values = running_mean(values, window)
        axis.plot(panel.steps, values, color=ORANGE, linewidth=2, label=f"running mean of {window}")
        axis.legend(frameon=False, fontsize=8)
    else:
        marker = "o" if len(values) <= 20 else None
        axis.plot(panel.steps, values, color=BLUE, linewidth=1.6, marker=marker, markersize=4)
    axis.set_title(f"{panel.title}\nlast {values[-1]:.3f}", fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(panel.label)
    axis.set_xlim(left=0)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each position, of fewer at the start."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means
