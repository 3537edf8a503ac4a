"""What `run.py` prints around its stages: a title before each, a line per evaluation, five lines at the end."""

import json
import textwrap
from pathlib import Path
from typing import Any

from evals.reporting.records import summary_line
from evals.reporting.run_folder import MODELS, RunFolder, read_run

TITLES = {
    "data": "texts, conversations, problems and questions",
    "tokenizer": "training the vocabulary on the text",
    "base": "pretraining, the language itself",
    "mid": "midtraining, conversations and the python tool",
    "sft": "fine-tuning on clean conversations",
    "rl": "reinforcement learning on word problems",
    "report": "writing the report card",
}
WIDTH = 110


def title(step: str) -> str:
    """Title of the stage whose first pending step is `step`."""
    stage, _, measurement = step.partition(".")
    return f"{stage}: {'evaluation' if measurement else TITLES[stage]}"


def outcome_lines(result: Path) -> list[str]:
    """An evaluation's figures in one line, its notes and one reply; nothing for the report."""
    if result.suffix != ".json":
        return []
    content = json.loads(result.read_text(encoding="utf-8"))
    if "vocabularies" in content:
        return [compression(content)]
    lines = wrapped("evaluation: " + summary_line(content["records"]))
    noted = [record for record in content["records"] if "note" in record]
    lines += [f"  {record['task'].replace('_', ' ')}: {record['note']}" for record in noted]
    return lines + [exchange(sample["messages"]) for sample in shown_sample(content.get("samples") or [])]


def compression(content: dict[str, Any]) -> str:
    """Bytes per token on text that the tokenizer was not trained on, for every vocabulary compared."""
    text = next((text for text in content["texts"] if text["name"] == "val"), content["texts"][-1])
    ratios = [f"{name} {ratio:.2f}" for name, ratio in text["bytes_per_token"].items()]
    return f"evaluation: bytes per token of the text {text['name']}: {', '.join(ratios)}"


def shown_sample(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most one sample, preferably one with a tool call."""
    calling = [sample for sample in samples if any(message.get("tool_calls") for message in sample["messages"])]
    return (calling or samples)[:1]


def exchange(messages: list[dict[str, Any]]) -> str:
    """The first question and its reply in one line."""
    question, *others = [message for message in messages if message["role"] in ("user", "assistant")]
    reply = " ".join(message["content"] or "" for message in others if message["role"] == "assistant")
    line = f"{question['content']!r} → {' '.join(reply.split())!r}"
    return "  " + textwrap.shorten(line, 2 * WIDTH, placeholder=" …")


def wrapped(line: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def closing_lines(recipe: str, run_dir: Path, stages: list[str], seconds: float, next_commands: str) -> list[str]:
    """Lines on what was trained, its cost and quality, the report's path and the next command."""
    run = read_run(run_dir) if (run_dir / "stages").is_dir() else RunFolder(run_dir)
    lines = [
        ("trained", f"{recipe}{'' if 'report' in stages else f' up to {stages[-1]}'} in {run_dir}{sizes(run)}"),
        ("cost", cost(run, stages, seconds)),
        ("quality", quality(run)),
        ("report", str(run_dir / "report.md") if "report" in stages else ""),
        ("next", next_commands),
    ]
    return [part for name, text in lines if text for part in wrapped(f"{name + ':':<9}{text}", indent=9)]


def sizes(run: RunFolder) -> str:
    """`: 1,179,648 parameters on 2,345,678 tokens in 596 steps`, summed over the stages that train a model."""
    records = [run.stages[stage] for stage in MODELS if stage in run.stages]
    if not records:
        return ""
    steps, tokens = (sum(record.get(key) or 0 for record in records) for key in ("steps", "tokens"))
    return f": {records[-1].get('parameters') or 0:,} parameters on {tokens:,} tokens in {steps:,} steps"


def cost(run: RunFolder, stages: list[str], seconds: float) -> str:
    """Seconds per stage (with its evaluation), in total and of this process; peak memory of the largest process."""
    of_stages = {stage: [run.steps.get(name, {}) for name in (stage, f"{stage}.eval")] for stage in stages}
    spent = {stage: sum(step.get("seconds", 0) for step in steps) for stage, steps in of_stages.items()}
    parts = ", ".join(f"{stage} {value:.0f}" for stage, value in spent.items() if value)
    peak = max((step.get("peak_memory_mib_so_far", 0) for step in run.steps.values()), default=0)
    gpu = max((record.get("machine", {}).get("peak_gpu_memory_mib") or 0 for record in run.stages.values()), default=0)
    memory = f", at most {peak / 1024:.1f} GiB of memory" if peak else ""
    memory += f", {gpu / 1024:.1f} GiB of a GPU's" if gpu else ""
    return f"{sum(spent.values()):.0f} s ({parts}){memory}; this run took {seconds:.0f} s"


def quality(run: RunFolder) -> str:
    """Figures of the last evaluated model; bits per byte only if it has no others."""
    evaluated = [stage for stage in MODELS if stage in run.results]
    if not evaluated:
        return ""
    records = run.results[evaluated[-1]]["records"]
    answers = [record for record in records if record["metric"] != "bits_per_byte"]
    return f"{summary_line(answers or records)} ({evaluated[-1]})"
