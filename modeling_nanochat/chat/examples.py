"""What a model card tells a chat: example questions, which the Hub's pages also show, and the stage of training.

    tags: [nanochat, sft]
    widget:
    - messages:
      - role: user
        content: Who are you?

A card is untrusted text: anything but a question is skipped, and only a few short questions are returned.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from ..errors import UserError
from .stages import STAGES

MAX_EXAMPLES, MAX_CHARACTERS = 6, 200
MAX_CARD_BYTES = 2**20  # more than any hand-written card; its YAML would take seconds


def example_questions(folder: str | Path | None) -> list[str]:
    """The questions in the model card of `folder`; empty without a card or questions."""
    widget = card_metadata(folder).get("widget")
    found = (question_of(entry) for entry in (widget if isinstance(widget, list) else []))
    return list(dict.fromkeys(question for question in found if question))[:MAX_EXAMPLES]


def card_metadata(folder: str | Path | None) -> dict[str, Any]:
    """The front matter of `folder`'s README.md; empty if there is none or it cannot be read."""
    card = Path(folder or ".") / "README.md"
    try:
        readable = folder and card.is_file() and card.stat().st_size <= MAX_CARD_BYTES
        metadata = metadata_load(card) if readable else None
    except Exception:  # a card is free text: YAML or not, UTF-8 or not
        return {}
    return metadata if isinstance(metadata, dict) else {}


def training_stage(folder: str | Path | None) -> str | None:
    """The stage in the tags of `folder`'s model card, a key of `STAGES`; None if unknown."""
    tags = card_metadata(folder).get("tags")
    tags = tags if isinstance(tags, list) and "nanochat" in tags else []
    return next((stage for stage in STAGES if stage in tags), None)


def stage_note(folder: str | Path | None) -> str:
    """What a user should know before the first question to the model in `folder`; empty if there is nothing."""
    stage = training_stage(folder)
    return STAGES[stage].note if stage else ""


def question_of(entry: Any) -> str | None:
    """The question of a widget's entry; None for anything else, such as a longer conversation or an image."""
    if not isinstance(entry, dict):
        return None
    text = entry.get("text")
    messages = entry.get("messages")
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict):
        text = messages[0].get("content") if messages[0].get("role") == "user" else None
    return text.strip() if isinstance(text, str) and is_short_line(text.strip()) else None


def is_short_line(text: str) -> bool:
    """Whether `text` is one line that is safe to show: no control characters and no bidirectional overrides."""
    printable = all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text)
    return 0 < len(text) <= MAX_CHARACTERS and printable


def widget(questions: Iterable[str]) -> list[dict[str, Any]]:
    """The `widget` field of a card for these questions."""
    return [{"messages": [{"role": "user", "content": question}]} for question in questions]


def check_examples(questions: list[str] | None) -> None:
    """Raise [`UserError`] for questions that [`example_questions`] would not return."""
    questions = questions or []
    if len(questions) > MAX_EXAMPLES:
        raise UserError(f"examples: {len(questions)} questions, at most {MAX_EXAMPLES} are shown; leave some out")
    for question in questions:
        if not is_short_line(question.strip()):
            limit = f"1 to {MAX_CHARACTERS} printable characters"
            raise UserError(f"examples: {question[:60]!r} must be one line of {limit}; shorten it")
