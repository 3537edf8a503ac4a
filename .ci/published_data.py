"""Check that everything that the recipes name on the network is there, and reads as their stages will read it.

python .ci/published_data.py

Streams ten rows of every data set, configuration and split that a YAML in recipes/ names, compares the number of text
shards, and fetches the first bytes of CORE's bundle and of the list of words. Exit code 1 and a line for each failure.
"""

import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from evals.core.bundle import PUBLISHED_BUNDLE
from evals.harness.published import PUBLISHED, SPELLING_BEE, VALIDATION_TEXT
from evals.tasks.table import question_of
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.records import read_records
from modeling_nanochat.text.sources import is_hub_id, load_hub
from recipes.grpo import read_problems
from recipes.training.data.bad_rows import BadRows
from recipes.training.data.conversations import read_conversations
from recipes.training.data.mixtures import parse_mixture

ROOT = Path(__file__).resolve().parents[1]
ROWS = 10
SECONDS_TO_ANSWER = 30.0
ADDRESSES = {PUBLISHED_BUNDLE: b"PK\x03\x04", PUBLISHED[SPELLING_BEE].source: b"a"}  # and how their content begins
Check = Callable[[], None]


def main() -> None:
    failures = 0
    for name, check in sorted(checks(ROOT / "recipes").items()):
        try:
            check()
            print(f"ok: {name}", flush=True)
        except (UserError, OSError, ValueError) as error:
            failures += 1
            print(f"FAILED: {name}: {' '.join(str(error).split())}", flush=True)
    sys.exit(failures > 0)


def checks(recipes: Path) -> dict[str, Check]:
    """What is checked, by the name that is printed; each name once, however many recipes have it."""
    found: dict[str, Check] = {
        f"address {address}": partial(check_address, address, ADDRESSES[address]) for address in ADDRESSES
    }
    for path in sorted(recipes.glob("*/*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found |= dict(checks_of(path.stem, content))
    return found


def checks_of(step: str, content: dict) -> Iterator[tuple[str, Check]]:
    if step == "data":
        shards = shards_of(content)
        yield f"text {content['text']}, {shards} shards", partial(check_text, content["text"], shards)
    for key in ("mixture", "validation_mixture"):
        for source in parse_mixture(content.get(key) or [], key):
            if is_hub_id(source.source) and not source.task:
                yield f"conversations {source.source}", partial(check_conversations, source.source, source.format)
    if step == "grpo":
        for name in filter(is_hub_id, [*content["train_files"], *content.get("eval_files", [])]):
            yield f"problems {name}", partial(read_problems, [name], BadRows(), ROWS)
    for task in {*content.get("tasks", []), *content.get("eval_tasks", [])} & PUBLISHED.keys() - {SPELLING_BEE}:
        yield f"task {task}", partial(check_task, task)


def shards_of(content: dict) -> int:
    return content["train_shards"] + content["val_shards"]


def check_text(name: str, shards: int) -> None:
    files = [path for path in HfApi().list_repo_files(name, repo_type="dataset") if path.endswith(".parquet")]
    if len(files) < shards:
        raise UserError(f"{len(files)} parquet files, {shards} are needed")
    if name == VALIDATION_TEXT[0] and max(files) != VALIDATION_TEXT[1]:
        raise UserError(f"the last file is {max(files)}, not {VALIDATION_TEXT[1]}")
    if not all(isinstance(row["text"], str) for row in load_hub(name, streaming=True).take(ROWS)):
        raise UserError("the column `text` holds no text")


def check_conversations(name: str, format: str | None) -> None:
    read_conversations([name], "mixture", ROWS, format, "error")


def check_task(name: str) -> None:
    published = PUBLISHED[name]
    for where, record in read_records([published.source], "tasks", first=ROWS):
        if (found := question_of(record, where).name) != published.kind:
            raise UserError(f"{where}: a record of {found}, not of {published.kind}")


def check_address(address: str, beginning: bytes) -> None:
    request = urllib.request.Request(address, headers={"Range": "bytes=0-99"})
    with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as response:
        if not response.read(100).startswith(beginning):
            raise UserError(f"its content does not begin with {beginning!r}")


if __name__ == "__main__":
    main()
