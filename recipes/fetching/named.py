"""What the YAMLs of a recipe name on the Hub and elsewhere, put into the cache before training.

Text for pretraining is not: it is streamed, or downloaded as shards.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.core.bundle import core_folder
from evals.harness.downloads import downloaded
from evals.harness.measurements import validation_text
from evals.harness.published import BITS_PER_BYTE, CORE, PUBLISHED, SPELLING_BEE, parse_tasks
from evals.tasks.spelling_bee import read_words
from evals.tasks.task_files import WORDS, keep_words, load_task
from modeling_nanochat.text.sources import is_hub_id, load_hub
from recipes.ladder.step import read_yaml
from recipes.training.data.mixtures import parse_mixture

from .shards import link_to, retried

CORE_LINK = "core"


@dataclass
class Named:
    """Each thing once, in the order of the YAMLs."""

    data_sets: dict[str, None] = field(default_factory=dict)
    words: dict[str, None] = field(default_factory=dict)
    tasks: dict[tuple[str, str | None], None] = field(default_factory=dict)
    core_dirs: dict[str, None] = field(default_factory=dict)


def read_named(configs: Iterable[str]) -> Named:
    """What the YAMLs name, local files included.

    Raises:
        UserError: A YAML is missing or broken, or a mixture or a task in it.
    """
    named = Named()
    for config in configs:
        content = read_yaml(Path(config))
        named.data_sets |= dict.fromkeys(conversation_files(content))
        for key in ("mixture", "validation_mixture"):
            for source in parse_mixture(content.get(key) or [], f"{config}: {key}"):
                if source.words:
                    named.words[source.words] = None
                else:
                    named.data_sets[source.source] = None
        for name, source in parse_tasks([*(content.get("tasks") or []), *(content.get("eval_tasks") or [])]).items():
            if name != BITS_PER_BYTE or not content.get("text_files"):
                named.tasks[name, source] = None
        if content.get("core_dir"):
            named.core_dirs[content["core_dir"]] = None
    return named


def conversation_files(content: dict[str, Any]) -> Iterator[str]:
    """Files of a stage that starts from a model; those of others are text."""
    if "model_name_or_path" in content:
        yield from content.get("train_files") or []
        yield from content.get("eval_files") or []


def cache(named: Named, folder: Path) -> None:
    """Download what is missing, except data on this machine and what is to be in `folder` anyway.

    A list of words called `words.txt` and a `core_dir` called `core` are linked into `folder`: the published ones.

    Raises:
        UserError: Something cannot be downloaded, or is not what the stages need.
    """
    for name in filter(is_hub_id, named.data_sets):
        rows = len(retried(lambda name=name: load_hub(name)))
        print(f"{name}: {rows:,} rows", flush=True)
    for words in named.words:
        if is_hub_id(words):
            retried(lambda words=words: read_words(words))
        elif Path(words).name == WORDS:
            published = retried(lambda: downloaded(PUBLISHED[SPELLING_BEE].source, SPELLING_BEE, keep_words))
            link_to(published / WORDS, folder / WORDS)
    if any(Path(name).name == CORE_LINK for name in named.core_dirs):
        link_to(retried(lambda: core_folder(None)), folder / CORE_LINK)
    for name, source in named.tasks:
        if source is None or is_hub_id(source) or source.startswith("http"):
            cache_task(name, source)


def cache_task(name: str, source: str | None) -> None:
    if name == CORE:
        retried(lambda: core_folder(source))
    elif name == BITS_PER_BYTE:
        retried(validation_text)
    else:
        questions = retried(lambda: load_task(name, source)).questions
        print(f"{name}: {len(questions):,} questions", flush=True)
