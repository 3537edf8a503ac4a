"""The report's pictures: logged values over steps, one panel per stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run_folder import RunFolder

# Okabe and Ito's palette, distinguishable with all types of colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
class Curve:
    """Values at steps, with their standard errors if they were estimated."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Curves of one unit; `smooth` draws a single curve's values thin and their running mean thick."""

    title: str
    label: str
    curves: Sequence[Curve]
    smooth: bool = False
    axis: str = "optimizer step"


def draw_curves(run: RunFolder, folder: Path) -> dict[str, str]:
    """Write the pictures that the logs have data for into `folder`; return name -> file name."""
    nats, calls = "loss (nats per token)", curves(run, "rl", "tool_calls_per_completion")
    panels = {
        "loss": [
            Panel("Pretraining", nats, curves(run, "base", "loss")),
            Panel("Midtraining", nats, curves(run, "mid", "loss")),
            Panel("SFT, assistant tokens", nats, curves(run, "sft", loss="training", validation_loss="held out")),
        ],
        "bits_per_byte": [
            Panel("Pretraining, held-out text", "bits per byte", curves(run, "base", "bits_per_byte")),
            Panel("Midtraining, held-out conversations", "bits per byte", curves(run, "mid", "bits_per_byte")),
        ],
        "reward": [
            Panel("GRPO, reward", "mean reward", curves(run, "rl", "reward"), smooth=True),
            Panel("GRPO, use of the tool", "calls per reply", calls, smooth=True),
        ],
        "evaluations": [
            Panel("SFT, tasks", "accuracy", curves(run, "sft", *run.estimated("sft"))),
            *pass_at_k_panels(run),
        ],
    }
    drawn = {}
    for name, candidates in panels.items():
        if filled := [panel for panel in candidates if panel.curves]:
            folder.mkdir(parents=True, exist_ok=True)
            draw_panels(filled, folder / f"{name}.svg")
            drawn[name] = f"{name}.svg"
    return drawn


def curves(run: RunFolder, stage: str, *keys: str, **named: str) -> list[Curve]:
    """Return a curve for each of the keys that the stage's log has; `named` are keys with names for the legend."""
    found = []
    for key, name in ({key: key.replace("_", " ") for key in keys} | named).items():
        steps, values = run.series(stage, key)
        errors = dict(zip(*run.series(stage, f"{key}_standard_error"), strict=True))
        if steps:
            found.append(Curve(name, steps, values, [errors.get(step, 0) for step in steps] if errors else ()))
    return found


def pass_at_k_panels(run: RunFolder) -> list[Panel]:
    """Return GRPO's panels of held-out problems: the smallest and largest k over steps, and all k before and after."""
    over_steps = sorted(curves(run, "rl", *run.estimated("rl")), key=samples_of)
    title, label = "GRPO, held-out problems", "pass@k"
    panels = [Panel(title, label, ends(over_steps))]
    if len(over_steps) > 1:
        over_k = [over_samples(over_steps, index) for index in ends(range(len(over_steps[0].steps)))]
        panels.append(Panel(title, label, over_k, axis="k, completions of each"))
    return panels


def ends(values: Sequence[Any]) -> Sequence[Any]:
    """Return the first and the last value; a single one once."""
    return values[:: max(1, len(values) - 1)]


def over_samples(pass_at: Sequence[Curve], index: int) -> Curve:
    """Return pass@k over k at one of the steps, from the curves of each k over steps."""
    values, errors = [curve.values[index] for curve in pass_at], [curve.errors[index] for curve in pass_at]
    return Curve(f"step {pass_at[0].steps[index]}", [samples_of(curve) for curve in pass_at], values, errors)


def samples_of(curve: Curve) -> int:
    """Return the k of pass@k."""
    return int(curve.name.removeprefix("pass@"))


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
            drawn = [value for p in (panels if shared else [panel]) for curve in p.curves for value in curve.values]
            # 1 if all values are 0, as without any reward; ChatCORE may be negative
            axis.set_ylim(1.05 * min(0, *drawn), 1.05 * max(0, *drawn) or 1)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def draw_panel(axis: Axes, panel: Panel) -> None:
    first, *others = panel.curves
    shown = first.values
    if panel.smooth and len(first.values) > 4:
        window = max(2, len(first.values) // 10)
        axis.plot(first.steps, first.values, color=GREY, linewidth=0.9, label="as logged")
        shown = running_mean(first.values, window)
        axis.plot(first.steps, shown, color=ORANGE, linewidth=2, label=f"running mean of {window}")
    else:
        for curve, color in zip(panel.curves, cycle(COLORS), strict=False):
            marker = "o" if len(curve.values) <= 20 else None
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.6}
            axis.errorbar(curve.steps, curve.values, curve.errors or None, **style, elinewidth=0.9, label=curve.name)
    last = "" if others else f"\nlast {shown[-1]:.3f}"
    axis.set_title(panel.title + last, fontsize=10)
    if len(axis.lines) > 1:
        axis.legend(frameon=False, fontsize=8)
    axis.set_xlabel(panel.axis)
    axis.set_ylabel(panel.label)
    axis.set_xlim(left=0)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each position, of fewer at the start."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means
