"""The table of tasks: which task a record belongs to, by its fields, and how it reads as a conversation to train on.

A record of another kind is a conversation {"messages": [...], "tools"?}; nanochat's own parts `python` and
`python_output` are converted, and so are ShareGPT's {"conversations": [{"from", "value"}, ...]}.
"""

from typing import Any

from modeling_nanochat.convert.conversations import from_original, from_sharegpt, has_call_parts
from modeling_nanochat.errors import UserError
from modeling_nanochat.text.conversations import check_messages, check_tools, results_behind_calls
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
CHATS = {"messages": "messages", "sharegpt": "conversations"}  # format -> the field with the messages
FORMATS = (*CHATS, *(task.name for task in TASKS))


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


def to_conversation(record: dict[str, Any], where: str, format: str | None = None) -> dict[str, list[dict]]:
    """Return a training record as {"messages": [...], "tools"?: [...]}: GSM8K with tool calls, ARC and MMLU by letter.

    Args:
        record: One object of a data set. MMLU's auxiliary rows may be wrapped in a field `train`.
        where: File and line, for errors.
        format: One of `FORMATS`; None: told by the fields.

    Raises:
        UserError: The record is malformed, or of a task without answers to train on.
    """
    wrapped = record.get("train")
    record = wrapped if record.keys() == {"train"} and isinstance(wrapped, dict) else record
    format = format or format_of(record)
    if format in CHATS:
        return chat(record, where, CHATS[format])
    task = next((task for task in TASKS if task.name == format and task.fields <= record.keys()), None)
    messages = task.from_record(whole_messages(record), where).conversation() if task else None
    if messages is None:
        raise UserError(f"{where}: no `messages`, and not a record of a task to train on; {fields_of(record)}")
    check_messages(messages, where)
    return {"messages": messages}


def format_of(record: dict[str, Any]) -> str | None:
    """Return the format that the fields of a record tell, one of `FORMATS`."""
    task = task_of(record)
    return next((name for name, field in CHATS.items() if field in record), task.name if task else None)


def chat(record: dict[str, Any], where: str, field: str) -> dict[str, list[dict]]:
    messages = from_sharegpt(record.get(field))
    if has_call_parts(messages):
        messages = from_original(messages, where)
        check_messages(messages, where)
    else:
        check_messages(messages, where)
        messages = results_behind_calls(messages, where)
    if record.get("tools") is None:
        return {"messages": messages}
    check_tools(record["tools"], where)
    return {"messages": messages, "tools": record["tools"]}


def unread_fields(record: dict[str, Any], format: str | None = None) -> set[str]:
    """Return the fields of a conversation's record that are not read; none for tasks, whose fields are known."""
    format = format or format_of(record)
    return record.keys() - {CHATS[format], "tools"} if format in CHATS else set()


def fields_of(record: dict[str, Any]) -> str:
    return f"its fields are {', '.join(record) or 'none'}"
