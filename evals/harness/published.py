"""The published tasks, and where their questions are found.

`--tasks` takes their names, or `name=source` for one's own task, or for a published one from elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from modeling_nanochat.errors import UserError

CORE, BITS_PER_BYTE, SPELLING_BEE = "core", "bits_per_byte", "spelling_bee"
# The original's validation text: the last shard of its shuffled FineWeb-EDU, a data set and a file of it.
VALIDATION_TEXT = ("karpathy/fineweb-edu-100b-shuffle", "shard_01822.parquet")


@dataclass(frozen=True)
class PublishedTask:
    """A task that others publish figures of, and that counts for ChatCORE.

    Args:
        source: Its questions, see `modeling_nanochat.text.records`, or the words that they are generated from.
        kind: The task that its records belong to, see `evals.tasks.table`.
    """

    source: str
    kind: str


PUBLISHED = {
    "arc_easy": PublishedTask("allenai/ai2_arc:ARC-Easy:test", "arc"),
    "arc_challenge": PublishedTask("allenai/ai2_arc:ARC-Challenge:test", "arc"),
    "mmlu": PublishedTask("cais/mmlu:all:test", "mmlu"),
    "gsm8k": PublishedTask("openai/gsm8k:main:test", "gsm8k"),
    "humaneval": PublishedTask("openai/openai_humaneval:test", "humaneval"),
    SPELLING_BEE: PublishedTask(
        "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt", SPELLING_BEE
    ),
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
