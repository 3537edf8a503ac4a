"""The table of tasks: which task a record belongs to, by its fields, and how it reads as a conversation to train on.

A record of another kind is a conversation {"messages": [...], "tools"?}; nanochat's own parts `python` and
`python_output` are converted.
"""

from typing import Any

from modeling_nanochat.convert.conversations import from_original, has_call_parts
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages, check_tools
from modeling_nanochat.tokenization_nanochat import whole_messages

from .arc import ArcQuestion
from .cloze import ClozeQuestion
from .gsm8k import Gsm8kQuestion
from .humaneval import HumanEvalQuestion
from .match import MatchQuestion
from .mmlu import MmluQuestion
from .question import Question
from .replies import ReplyQuestion

# The first whose fields a record has: a task whose fields include another's comes before it.
TASKS: tuple[type[Question], ...] = (
    ClozeQuestion,
    ArcQuestion,
    MmluQuestion,
    MatchQuestion,
    Gsm8kQuestion,
    HumanEvalQuestion,
)


def task_of(record: dict[str, Any]) -> type[Question] | None:
    """Return the task of a record; None if it has none, or is a conversation."""
    if "messages" in record:
        return None
    return next((task for task in TASKS if task.fields <= record.keys()), None)


def answered_in_words() -> list[str]:
    """Return the names of the tasks with a `ReplyQuestion`, whose replies are graded."""
    return [task.name for task in TASKS if issubclass(task, ReplyQuestion)]


def question_of(record: dict[str, Any], where: str) -> Question:
    """Return a record as a question of its task. Unpaired surrogates, which no file can hold, become U+FFFD.

    Args:
        record: One object of a data set.
        where: File and line, for errors.

    Raises:
        UserError: The record is of no task, or malformed.
    """
    task = task_of(record)
    if task is None:
        names = ", ".join(task.name for task in TASKS)
        raise UserError(f"{where}: not a record of {names}; {fields_of(record)}")
    return task.from_record(whole_messages(record), where)


def to_conversation(record: dict[str, Any], where: str) -> dict[str, list[dict]]:
    """Return a training record as {"messages": [...], "tools"?: [...]}: GSM8K with tool calls, ARC and MMLU by letter.

    Args and errors are those of `question_of`; a task without answers to train on is an error too.
    """
    if "messages" in record:
        return chat(record, where)
    messages = question_of(record, where).conversation() if task_of(record) else None
    if messages is None:
        raise UserError(f"{where}: no `messages`, and not a record of a task to train on; {fields_of(record)}")
    check_messages(messages, where)
    return {"messages": messages}


def chat(record: dict[str, Any], where: str) -> dict[str, list[dict]]:
    messages = record["messages"]
    if has_call_parts(messages):
        messages = from_original(messages, where)
    check_messages(messages, where)
    if record.get("tools") is None:
        return {"messages": messages}
    check_tools(record["tools"], where)
    return {"messages": messages, "tools": record["tools"]}


def fields_of(record: dict[str, Any]) -> str:
    return f"its fields are {', '.join(record) or 'none'}"
