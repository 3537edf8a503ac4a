"""Questions to try a model with: the `widget` of its model card, as the Hub's own pages show it.

    widget:
    - messages:
      - role: user
        content: Who are you?

A card is anybody's text. What is no such question is passed over, and of the others few and short ones are taken.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from ..errors import UserError

MAX_EXAMPLES, MAX_CHARACTERS = 6, 200
MAX_CARD_BYTES = 2**20  # beyond any card of a person's; its YAML would take seconds


def example_questions(folder: str | Path | None) -> list[str]:
    """The questions in the card of the model in `folder`; none where there is no card, or none in it."""
    widget = card_metadata(folder).get("widget")
    found = (question_of(entry) for entry in (widget if isinstance(widget, list) else []))
    return list(dict.fromkeys(question for question in found if question))[:MAX_EXAMPLES]


def card_metadata(folder: str | Path | None) -> dict[str, Any]:
    """The front matter of `folder`'s README.md; empty if there is none that can be read."""
    card = Path(folder or ".") / "README.md"
    try:
        readable = folder and card.is_file() and card.stat().st_size <= MAX_CARD_BYTES
        metadata = metadata_load(card) if readable else None
    except Exception:  # a card is free text: YAML or not, UTF-8 or not
        return {}
    return metadata if isinstance(metadata, dict) else {}


def question_of(entry: Any) -> str | None:
    """The question of a widget's entry, unless it is something else, such as a longer conversation or an image."""
    if not isinstance(entry, dict):
        return None
    text = entry.get("text")
    messages = entry.get("messages")
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict):
        text = messages[0].get("content") if messages[0].get("role") == "user" else None
    return text.strip() if isinstance(text, str) and is_short_line(text.strip()) else None


def is_short_line(text: str) -> bool:
    """Whether `text` is one line that can be shown anywhere: no control characters, none that reverse what follows."""
    printable = all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text)
    return 0 < len(text) <= MAX_CHARACTERS and printable


def widget(questions: Iterable[str]) -> list[dict[str, Any]]:
    """What a card has under `widget` for these questions."""
    return [{"messages": [{"role": "user", "content": question}]} for question in questions]


def check_examples(questions: list[str] | None) -> None:
    """Raise [`UserError`] for questions that no reader of the card would show."""
    questions = questions or []
    if len(questions) > MAX_EXAMPLES:
        raise UserError(f"examples: {len(questions)} questions, at most {MAX_EXAMPLES} are shown; leave some out")
    for question in questions:
        if not is_short_line(question.strip()):
            raise UserError(
                f"examples: {question[:60]!r} must be one line of 1 to {MAX_CHARACTERS} printable characters; shorten it"
            )
