"""The published tasks: where each is found on the Hub, and which of them count for ChatCORE.

`--tasks` takes their names, or `name=source` for one's own task, or for a published one from elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from modeling_nanochat.errors import UserError

CORE, BITS_PER_BYTE = "core", "bits_per_byte"
# The original's validation text: the last shard of its shuffled FineWeb-EDU, a data set and a file of it.
VALIDATION_TEXT = ("karpathy/fineweb-edu-100b-shuffle", "shard_01822.parquet")


@dataclass(frozen=True)
class PublishedTask:
    """A task that others publish figures of.

    Args:
        source: Its questions, see `modeling_nanochat.text.records`.
        kind: The task that its records belong to, see `evals.tasks.table`.
        baseline: Accuracy of guessing, as in ChatCORE.
    """

    source: str
    kind: str
    baseline: float = 0.0


PUBLISHED = {
    "arc_easy": PublishedTask("allenai/ai2_arc:ARC-Easy:test", "arc", 0.25),
    "arc_challenge": PublishedTask("allenai/ai2_arc:ARC-Challenge:test", "arc", 0.25),
    "mmlu": PublishedTask("cais/mmlu:all:test", "mmlu", 0.25),
    "gsm8k": PublishedTask("openai/gsm8k:main:test", "gsm8k"),
}


def parse_tasks(arguments: Sequence[str]) -> dict[str, str | None]:
    """Return name -> source of each `name` or `name=source`; None: the published source.

    Raises:
        UserError: A name is not published and has no source, or occurs twice; or bits per byte has a source.
    """
    sources: dict[str, str | None] = {}
    for argument in arguments:
        name, equals, source = argument.partition("=")
        if name in sources:
            raise UserError(f"tasks: a task name occurs twice: {name}; give each source its own name")
        if not name or (equals and not source):
            raise UserError(f"tasks: {argument!r} is not name=source; write for example facts=data/eval/facts.jsonl")
        if not equals and name not in (*PUBLISHED, CORE, BITS_PER_BYTE):
            names = ", ".join((CORE, *PUBLISHED, BITS_PER_BYTE))
            raise UserError(f"tasks: {name!r} is not one of {names}; write name=source for a file, folder or Hub id")
        if name == BITS_PER_BYTE and equals:
            raise UserError(f"tasks: {BITS_PER_BYTE} takes no source; give text_files")
        sources[name] = source or None
    return sources
