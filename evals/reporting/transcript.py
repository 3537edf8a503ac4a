"""Sample conversations as plain text, with tool calls and their results."""

from collections.abc import Sequence
from typing import Any

INDENT = 11


def transcript(messages: Sequence[dict[str, Any]]) -> str:
    """Return one block per message, prefixed with the speaker: `python` for a tool call, `result` for its result."""
    blocks = []
    for message in messages:
        if message["role"] == "tool":
            blocks.append(block("  result", message["content"]))
            continue
        calls = message.get("tool_calls") or []
        if message["content"] or not calls:
            blocks.append(block(message["role"], message["content"] or "(nothing)"))
        blocks += [block("  python", call["function"]["arguments"].get("code", "")) for call in calls]
    if messages[-1]["role"] == "user":
        blocks.append(block("assistant", "(no reply: the question does not fit the model's context)"))
    return "\n".join(blocks)


def block(speaker: str, text: str) -> str:
    return f"{speaker:<{INDENT}}" + text.strip().replace("\n", "\n" + " " * INDENT)


def title(sample: dict[str, Any]) -> str:
    """Return `facts: right`; empty for a sample without a task."""
    return f"{sample['task']}: {'right' if sample['correct'] else 'wrong'}" if "task" in sample else ""


def fenced(text: str) -> str:
    """Return a Markdown code block with a fence longer than any run of backticks in `text`."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
