"""The report's tokenizer section: the launch post's compression table, its plot, and vocabulary statistics."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .curves import BLUE, GREY, ORANGE, STYLE
from .run_folder import RunFolder

PICTURE = "compression"
GREEN, PURPLE, SKY = "#009E73", "#CC79A7", "#56B4E9"
OTHERS = (GREY, ORANGE, GREEN, PURPLE, SKY)  # also from Okabe and Ito's palette
TABLE_NOTE = (
    "Tokens, and bytes per token (higher is better); `vs`: how many percent fewer tokens ours needs. `per word`: our "
    "tokens per whitespace-separated word."
)


def draw_compression(run: RunFolder, folder: Path) -> dict[str, str]:
    """Draw bytes per token into `folder` if the tokenizer was evaluated; return name -> file name."""
    if run.tokenizer is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    draw_bars(run.tokenizer, folder / f"{PICTURE}.svg")
    return {PICTURE: f"{PICTURE}.svg"}


def draw_bars(record: dict[str, Any], path: Path) -> None:
    """Draw a group of bars per text, one bar per vocabulary, ours last."""
    texts, vocabularies = record["texts"], record["vocabularies"]
    colours = [*(OTHERS[i % len(OTHERS)] for i in range(len(vocabularies) - 1)), BLUE]
    width = 0.84 / len(vocabularies)
    inches = max(1.25, 0.42 * len(vocabularies)) * len(texts)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(7.0, inches), 3.4))
        axis = figure.subplots()
        for number, (vocabulary, colour) in enumerate(zip(vocabularies, colours, strict=True)):
            positions = [group + (number - (len(vocabularies) - 1) / 2) * width for group in range(len(texts))]
            heights = [text["bytes_per_token"][vocabulary["name"]] for text in texts]
            bars = axis.bar(positions, heights, 0.94 * width, color=colour, label=label(vocabulary), zorder=2)
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        axis.set_xticks(range(len(texts)), [text["name"] for text in texts])
        axis.set_ylabel("bytes per token")
        axis.grid(visible=False, axis="x")
        axis.margins(y=0.08)
        axis.legend(
            frameon=False, fontsize=8, ncols=min(6, len(vocabularies)), loc="lower center", bbox_to_anchor=(0.5, 1.0)
        )
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def label(vocabulary: dict[str, Any]) -> str:
    return f"{vocabulary['name']} ({vocabulary['entries']:,})"


def notes(record: dict[str, Any]) -> list[str]:
    """Return the sources of the corpora, and the unavailable vocabularies."""
    corpora = [text for text in record["texts"] if text["documents"] > 1]
    lines = [f"{text['name']}: {text['documents']:,} documents of {shortened(text['source'])}" for text in corpora]
    return lines + [f"left out: {name}, {reason}" for name, reason in record["missing"].items()]


def shortened(source: str, most: int = 3) -> str:
    """Return a list of files; if it is long, only the first file and the number of the others."""
    files = source.split(", ")
    return source if len(files) <= most else f"{files[0]} and {len(files) - 1} more files"


def statistics_rows(statistics: dict[str, Any]) -> list[list[str]]:
    """Return the vocabulary statistics, one row per figure; percentages are of the non-special tokens."""
    sizes, ordinary = statistics["token_bytes"], statistics["entries"] - statistics["special_tokens"]
    shares = {f"of these {kind}": count for kind, count in statistics["kinds"].items()}
    shares |= {f"used by {name}": count for name, count in statistics["used"].items()}
    unreachable = statistics["unreachable"]
    return [
        ["vocabulary", ""],
        ["entries", f"{statistics['entries']:,}"],
        ["special tokens", str(statistics["special_tokens"])],
        ["bytes of a token: min, max", f"{sizes['min']}, {sizes['max']}"],
        ["bytes of a token: mean ± std", f"{sizes['mean']:.2f} ± {sizes['std']:.2f}"],
        ["other tokens", f"{ordinary:,}"],
        *([name, f"{count:,} ({100 * count / ordinary:.1f} %)"] for name, count in shares.items()),
        ["never produced by encoding their own bytes", f"{unreachable['tokens']:,}"],
    ]


def code(token: str) -> str:
    """Return a token in quotes as a Markdown code span."""
    fence = "``" if "`" in token else "`"
    return f"{fence}{json.dumps(token, ensure_ascii=False)}{fence}"
