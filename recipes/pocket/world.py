"""Generates the data of the pocket recipe: a small, closed, synthetic world that a tiny model can learn.

    python recipes/pocket/world.py --output_dir runs/pocket/data --seed 0
    python recipes/pocket/world.py --config recipes/pocket/world.yaml --sft_conversations 4000
    python recipes/pocket/world.py --config recipes/pocket/world.yaml --persona me.yaml

Takes a few seconds on one core, without network; the same arguments give the same bytes. Files written:

    pretrain/{train,val}.parquet    plain text, one document per row
    conversations/train.jsonl       conversations for midtraining, one {"messages": [...]} per line
    sft/train.jsonl                 conversations for SFT, with more of the harder kinds
    problems/train.jsonl            word problems in GSM8K format, for GRPO
    problems/dialogues.jsonl        dialogues for GRPO whose last answer is verifiable
    eval/*.jsonl                    held-out questions, see `evaluation.py`
    world.json                      seed, sizes, counts and what was held out
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import itertools
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.identities.dialogues import write_dialogues
from recipes.identities.persona import Persona, read_persona
from recipes.pocket import chats, evaluation, facts, problems, prose

GRPO_DIALOGUE = 240  # maximum characters of a GRPO prompt with history
MOST_DRAWS = 1000
PERSONA_CONVERSATIONS = 500


@dataclass
class WorldArguments:
    """Sizes of the generated data."""

    output_dir: str = field(default="runs/pocket/data", metadata={"help": "Folder to write; replaces an older world."})
    seed: int = field(default=0, metadata={"help": "Seed of the facts, the held-out split and all sampling."})
    pretrain_characters: int = field(default=5_000_000, metadata={"help": "Size of pretrain/train.parquet."})
    validation_fraction: float = field(default=0.03, metadata={"help": "Size of val.parquet, relative to train."})
    midtrain_conversations: int = field(default=14_000, metadata={"help": "Rows of conversations/train.jsonl."})
    sft_conversations: int = field(default=6_000, metadata={"help": "Rows of sft/train.jsonl."})
    grpo_problems: int = field(default=4_000, metadata={"help": "Rows of problems/train.jsonl."})
    grpo_dialogues: int = field(default=1500, metadata={"help": "Rows of problems/dialogues.jsonl."})
    eval_questions: int = field(
        default=1000, metadata={"help": "Rows of each file in eval/, or as many as the world has."}
    )
    eval_unknown: int = field(default=200, metadata={"help": "Rows of eval/unknown.jsonl."})
    world: str = field(default="english", metadata={"help": "World file: a name in recipes/pocket/worlds, or a path."})
    examples: list[str] = field(
        default_factory=list, metadata={"help": "Questions that the chat shows, kept out of all training text."}
    )
    persona: str | None = field(
        default=None, metadata={"help": "YAML file that says who the model is; default: nanochat, as in the world."}
    )


def main() -> None:
    (arguments,) = parse(WorldArguments)
    summary = write_world(arguments)
    rows = summary["rows"]
    print(
        f"{arguments.output_dir}: {rows['pretrain/train.parquet']:,} documents, "
        f"{rows['conversations/train.jsonl']:,} + {rows['sft/train.jsonl']:,} conversations, "
        f"{rows['problems/train.jsonl']:,} problems, "
        f"{sum(count for name, count in rows.items() if name.startswith('eval/')):,} evaluation questions"
    )


def write_world(arguments: WorldArguments) -> dict:
    """Write all files and return the contents of `world.json`.

    The files are written to a temporary sibling folder, which is renamed at the end, so that `output_dir` is always
    complete.

    Raises:
        UserError: A size is out of range, or `output_dir` holds something other than a generated world.
    """
    check_sizes(arguments)
    target = Path(arguments.output_dir)
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"output_dir {target}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        summary = fill_folder(folder, arguments)
        replace_folder(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return summary


def check_sizes(arguments: WorldArguments) -> None:
    for name, value in asdict(arguments).items():
        if isinstance(value, int) and name != "seed" and value < 1:
            raise UserError(f"{name}: is {value}, must be at least 1; correct the setting")
    if not 0 < arguments.validation_fraction < 1:
        raise UserError(
            f"validation_fraction: is {arguments.validation_fraction}, must be between 0 and 1; correct the setting"
        )


def check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"output_dir {target}: is a file; choose another folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "world.json").is_file():
        raise UserError(f"output_dir {target}: contains files but no generated world; choose another folder")


def replace_folder(new: Path, target: Path) -> None:
    """Replace `target` with `new` by renaming, so that `target` is never incomplete."""
    new.chmod(0o777 & ~current_umask())  # mkdtemp creates it with mode 0700
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.rename(target, old / "data")
        os.rename(new, target)
        shutil.rmtree(old)
    else:
        os.rename(new, target)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def fill_folder(folder: Path, arguments: WorldArguments) -> dict:
    """Write all files into `folder`, each drawn from its own random generator, and return the summary."""
    persona = read_persona(arguments.persona) if arguments.persona else None
    texts = facts.read_texts(arguments.world)
    if persona:
        texts["identity"] = renamed(texts["identity"], persona.name)
    world = facts.World(arguments.seed, texts, arguments.examples)
    documents = pretraining_documents(world, arguments)
    drawn = {
        "conversations/train.jsonl": conversations(
            world, "conversations/train.jsonl", arguments.midtrain_conversations, chats.MIDTRAIN_SHARES, references=0.7
        ),
        "sft/train.jsonl": conversations(
            world, "sft/train.jsonl", arguments.sft_conversations, chats.SFT_SHARES, references=0.8
        ),
    }
    records = {name: [{"messages": messages} for _, messages in pairs] for name, pairs in drawn.items()}
    seen = {message["content"] for _, messages in itertools.chain(*drawn.values()) for message in messages}
    practice = world.for_practice()
    records["problems/train.jsonl"] = grpo_problems(practice, arguments.grpo_problems, seen)
    records["problems/dialogues.jsonl"] = grpo_dialogues(practice, arguments.grpo_dialogues)
    records |= evaluation.evaluation_records(world, arguments.eval_questions, arguments.eval_unknown)
    if persona:
        add_persona(records, persona, world)
    rows = {name: write_parquet(folder / name, texts) for name, texts in documents.items()}
    rows |= {name: write_jsonl(folder / name, lines) for name, lines in records.items()}
    summary = {
        "description": describe(world),
        "seed": arguments.seed,
        "arguments": {
            name: value for name, value in asdict(arguments).items() if name != "output_dir" and value is not None
        },
        "rows": rows,
        "kinds": {name: dict(Counter(kind for kind, _ in pairs)) for name, pairs in drawn.items()},
        "held_out_facts": [[fact.entity, fact.attribute.name, fact.value] for fact in world.held_out_facts],
    }
    (folder / "world.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def renamed(texts: Any, name: str) -> Any:
    """`texts` with another name for nanochat, in lists and mappings too."""
    if isinstance(texts, dict):
        return {key: renamed(text, name) for key, text in texts.items()}
    return [renamed(text, name) for text in texts] if isinstance(texts, list) else texts.replace("nanochat", name)


def add_persona(records: dict[str, list[dict]], persona: Persona, world: facts.World) -> None:
    """Mix in the persona's conversations as the original did: twice for midtraining, once for SFT.

    Those with a question that the evaluation asks or the chat shows are left out.
    """
    asked = {row.get("question") for name, rows in records.items() if name.startswith("eval/") for row in rows}
    asked |= world.shown
    dialogues = write_dialogues(persona, PERSONA_CONVERSATIONS, world.seed)
    kept = [{"messages": talk} for talk in dialogues if not asked & {message["content"] for message in talk}]
    for name, epochs in (("conversations/train.jsonl", 2), ("sft/train.jsonl", 1)):
        records[name] += epochs * kept
        draws(world, f"persona {name}").shuffle(records[name])


def describe(world: facts.World) -> str:
    """Description of the data for the report card."""
    people, towns = len(world.people), len(world.towns)
    share = f"{100 * len(world.held_out_facts) / len(world.facts):.0f} %"
    return (
        f"A synthetic, closed world: {people} made-up people with five attributes each, {towns} made-up towns with "
        "two, and word problems, spellings and stories from closed lists. Scores say how well a model learned this "
        "world, nothing about the real one. Held out by construction, so that no training text contains them: "
        f"{share} of the facts as questions (prose states them), all phrasings of the evaluation's questions, "
        "20 % of the number pairs, 20 % of the pairs of a person and a counted thing, some wordings of every kind of "
        "word problem, 30 % of the words to spell (all their parts occur in other words), and 20 % of the pairs of "
        "hero and object in stories. The evaluation uses only what is held out."
    )


def draws(world: facts.World, name: str) -> random.Random:
    return random.Random(f"{name} {world.seed}")


def conversations(
    world: facts.World, name: str, count: int, shares: dict[chats.Asker, float], references: float
) -> list[tuple[str, chats.Messages]]:
    return chats.write_conversations(world, draws(world, name), count, shares, references)


def pretraining_documents(world: facts.World, arguments: WorldArguments) -> dict[str, list[str]]:
    train, val = "pretrain/train.parquet", "pretrain/val.parquet"
    size = arguments.pretrain_characters
    documents = prose.write_documents(world, draws(world, train), size, held_out=False)
    seen = set(documents)
    size = int(size * arguments.validation_fraction)
    validation = prose.write_documents(world, draws(world, val), size, held_out=True)
    return {train: documents, val: [text for text in validation if text not in seen]}


def grpo_problems(world: facts.World, count: int, seen: set[str]) -> list[dict]:
    """`count` word problems that occur in no conversation, mostly of the kinds that are rare there.

    Problems that a model always solves teach nothing: if all rewards of a step are equal, Muon still takes a full-size
    step, in an arbitrary direction.
    """
    rng = draws(world, "problems/train.jsonl")
    kinds, weights = zip(*chats.GRPO_KINDS.items(), strict=True)
    found: dict[str, dict] = {}
    while len(found) < count:
        (kind,) = rng.choices(kinds, weights)
        problem = problems.make_problem(world, rng, kind, held_out=False)
        if problem["question"] not in seen:
            found[problem["question"]] = problem
    return list(found.values())


def grpo_dialogues(world: facts.World, count: int) -> list[dict]:
    """`count` dialogues of the kinds that training on word problems alone would make the model forget.

    The last turn refers to the first, asks for a sum, a spelling or a fact, or asks about something unknown. All are
    short, because one long prompt would pad all others of its step.
    """
    rng = draws(world, "problems/dialogues.jsonl")
    drawn: dict[Callable[[], chats.Dialogue], int] = {
        lambda: chats.refer(world, rng, False, between=1): 2,
        lambda: chats.later(world, rng, False, (chats.ask_sum, chats.ask_spelling, chats.ask_fact)): 2,
        lambda: [chats.ask_unknown(world, rng, False)]: 3,
    }
    dialogues = (short(draw) for draw in rng.choices(list(drawn), list(drawn.values()), k=count))
    return [evaluation.record(question, history) for *history, question in dialogues]


def short(draw: Callable[[], chats.Dialogue]) -> chats.Dialogue:
    """The first dialogue drawn within GRPO_DIALOGUE characters, or the shortest of MOST_DRAWS."""
    dialogues: list[chats.Dialogue] = []
    while len(dialogues) < MOST_DRAWS and (not dialogues or characters(dialogues[-1]) > GRPO_DIALOGUE):
        dialogues.append(draw())
    return min(dialogues, key=characters)


def characters(dialogue: chats.Dialogue) -> int:
    *history, question = dialogue
    return len(question.question) + sum(len(exchange.question) + len(exchange.answer) for exchange in history)


def write_parquet(path: Path, texts: list[str]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return len(texts)


def write_jsonl(path: Path, records: list[dict]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return len(records)


if __name__ == "__main__":
    exit_on_user_error(main)
